"""Keeps a run's teacher and student in half precision, and the mIoU that they reach so on 60 synthetic scenes.

    python -m benchmarks.small_models runs/demo --out docs/models      # teacher.pt, student.pt and numbers.json

`make look` draws a panel from these files, and tests/test_look.py holds them to their numbers. Every script reads them:
`load_model` copies the weights into a float32 model.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import evaluate
from engine.checkpoint import read, write
from engine.files import MARK, write_output
from engine.runs import guarded

MODELS = ("teacher", "student")


def measure(folder: Path) -> dict:
    """mIoU in per cent (published rule) of each model and subset, on 60 scenes of the validation split."""
    with tempfile.TemporaryDirectory() as beside:
        files = [str(folder / f"{name}.pt") for name in MODELS]
        options = [*files, "--data", "synthetic", "--limit", "60", "--json", f"{beside}/scores.json"]
        evaluate.main(evaluate.options(options))
        report = json.loads(Path(beside, "scores.json").read_text())
    miou = {name: {subset: round(score["miou_published"], 2) for subset, score in rows["any"].items()}
            for name, rows in report["results"].items()}  # fmt: skip
    return {"file": MARK, "about": report["about"].split(";")[0], "versions": report["versions"], "miou": miou}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run on synthetic scenes that has finished both stages")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write into")
    args = parser.parse_args(argv)
    states = {name: read(args.run / f"{name}.pt") for name in MODELS}
    args.out.mkdir(parents=True, exist_ok=True)
    for name, state in states.items():
        halves = {key: x.half() if x.is_floating_point() else x for key, x in state["model"].items()}
        write(args.out / f"{name}.pt", {**state, "model": halves})
    write_output(args.out / "numbers.json", json.dumps(measure(args.out), indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(guarded(main))
