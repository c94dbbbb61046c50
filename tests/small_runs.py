"""Tiny runs of both stages for tests: started like the run `whole`, watched at a step, read back."""

import json
import pathlib

from kill_and_resume import SMALL, SMALL2, STAGE1, STAGE2

from engine import runs

TIMES = {"images_per_second", "data_wait", "minutes_left", "peak_memory_mb"}


def start(stage: int, whole: pathlib.Path, out: pathlib.Path, *more: str) -> list[str]:
    """The command line of `whole`'s run of this stage, into another folder."""
    options = [*SMALL, *STAGE1] if stage == 1 else [*SMALL2, *STAGE2, "--stage1", str(whole / "1")]
    return [*options, "--out", str(out), *more]


def during(monkeypatch, phase: str, step: int, act, of="check") -> None:
    """Calls act(*arguments) at this step of this phase, before `Phase.check` looks at the losses."""
    original = getattr(runs.Phase, of)

    def replaced(self, *arguments):
        if (self.name, self.step) == (phase, step):
            act(*arguments)
        return original(self, *arguments)

    monkeypatch.setattr(runs.Phase, of, replaced)


def crash(*_):
    raise KeyboardInterrupt


def log(folder: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def said(capfd) -> str:
    """The sentence on stderr, of which there must be just one."""
    text = capfd.readouterr().err.strip()
    assert text.startswith("error: ") and "\n" not in text, text
    return text.removeprefix("error: ")
