"""Tiny runs of both stages for tests: started like the run `whole`, stopped at a step, refused, changed, read back."""

import contextlib
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys

import pytest
import torch
from kill_and_resume import SMALL, SMALL2, STAGE1, STAGE2, train

from engine import runs

ROOT = pathlib.Path(__file__).resolve().parent.parent
TIMES = {"images_per_second", "data_wait", "minutes_left", "peak_memory_mb"}


def start(stage: int, whole: pathlib.Path, out: pathlib.Path | None, *more: str) -> list[str]:
    """The command line of `whole`'s run of this stage, into this folder; without one, stage 2 goes on in stage 1's."""
    options = [*SMALL, *STAGE1] if stage == 1 else [*SMALL2, *STAGE2, "--stage1", str(whole / "1")]
    if "--teacher" in more:  # whose epochs are over
        options = [*SMALL, *STAGE1[2:]]
    return [*options, *(["--out", str(out)] if out else []), *more]


@contextlib.contextmanager
def during(phase: str, step: int, act, of="check"):
    """Meanwhile act(*arguments) is called at this step of this phase, before `Phase.check` looks at the losses."""
    original = getattr(runs.Phase, of)

    def replaced(self, *arguments):
        if (self.name, self.step) == (phase, step):
            act(*arguments)
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Phase, of, replaced)
        yield


def crash(*_):
    raise KeyboardInterrupt


def stop(*_):
    signal.raise_signal(signal.SIGTERM)


def change(file: pathlib.Path, key: str | None = None, drop: tuple = (), **entries) -> pathlib.Path:
    """Rewrites a checkpoint as if it had been saved with other entries of state[key], or of the state itself."""
    state = torch.load(file, weights_only=True)
    state.pop("checksum", None)
    inner = state if key is None else state[key]
    inner.update(entries)
    for name in drop:
        del inner[name]
    torch.save(state, file)
    return file


def log(folder: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def said(capfd) -> str:
    """The sentence on stderr, of which there must be just one."""
    text = capfd.readouterr().err.strip()
    assert text.startswith("error: ") and "\n" not in text, text
    return text.removeprefix("error: ")


def refused(capfd, stage: int, argv: list[str]) -> str:
    """The sentence with which a training ends that must not be."""
    capfd.readouterr()
    assert train(stage, argv) == 2
    return said(capfd)


def script(*command, status: int = 0) -> str:
    """Runs Python in the repository -> what it printed; fails with that if the exit status is another."""
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == status, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr
