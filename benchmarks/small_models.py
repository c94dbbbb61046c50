"""Keeps a run's teacher and student in half precision: the models of docs/models, and what they reach so.

    python -m benchmarks.small_models runs/demo docs/models
    python evaluate.py docs/models/teacher.pt docs/models/student.pt --limit 60 --markdown docs/models/numbers.md

`make look` draws a panel from these files, and tests/test_look.py holds them to their numbers. Every script reads them:
`load_model` copies the weights into a float32 model.
"""

import sys
from pathlib import Path

from engine.checkpoint import read, write
from engine.options import Parser
from engine.runs import guarded


def main(argv: list[str] | None = None) -> None:
    parser = Parser("small_models.py", __doc__)
    parser.add_argument("run", type=Path, help="the folder of a run that has finished both stages")
    parser.add_argument("out", type=Path, help="the folder to write into")
    args = parser.parse_args(argv)
    states = {name: read(args.run / name) for name in ("teacher.pt", "student.pt")}
    args.out.mkdir(parents=True, exist_ok=True)
    for name, state in states.items():
        halves = {key: x.half() if x.is_floating_point() else x for key, x in state["model"].items()}
        write(args.out / name, {**state, "model": halves})


if __name__ == "__main__":
    sys.exit(guarded(main))
