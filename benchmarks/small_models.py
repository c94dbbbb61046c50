"""Keeps a run's teacher and student in half precision, and a table of the mIoU that they reach so.

    python -m benchmarks.small_models runs/demo --out docs/models      # teacher.pt, student.pt and numbers.md

`make look` draws a panel from these files, and tests/test_look.py holds them to their numbers. Every script reads them:
`load_model` copies the weights into a float32 model.
"""

import sys
from pathlib import Path

import evaluate
from engine.checkpoint import read, write
from engine.options import Parser
from engine.runs import guarded


def main(argv: list[str] | None = None) -> None:
    parser = Parser("small_models.py", __doc__)
    parser.add_argument("run", type=Path, help="the folder of a run that has finished both stages")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write into")
    args = parser.parse_args(argv)
    states = {args.out / f"{name}.pt": read(args.run / f"{name}.pt") for name in ("teacher", "student")}
    args.out.mkdir(parents=True, exist_ok=True)
    for file, state in states.items():
        halves = {key: x.half() if x.is_floating_point() else x for key, x in state["model"].items()}
        write(file, {**state, "model": halves})
    options = [*map(str, states), "--limit", "60", "--markdown", str(args.out / "numbers.md")]
    evaluate.main(evaluate.options(options))


if __name__ == "__main__":
    sys.exit(guarded(main))
