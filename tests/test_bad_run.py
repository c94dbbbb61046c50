"""Bad options, checkpoints, folders and luck in a run: what goes in, and the sentence, status or number that comes out.

Each row of the tables is a bad thing, or a small function that makes it and returns what came of it as text.
"""

import errno
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from kill_and_resume import SMALL, SMALL2, STAGE2, train
from PIL import Image
from small_runs import during, log

import evaluate
from datasets.export import export
from engine import checkpoint, loop, runs
from fsm import FSM

SHORT = [*SMALL, *"--backbone segformer_tiny --epochs 1 --distill-epochs 1 --workers 0".split()]
HOLD = """import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("held", flush=True)
input()"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of stage 1, with the models of a stage 2 that has not trained."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    before = {number: signal.getsignal(number) for number in loop.EXIT_STATUS}
    torch.set_num_threads(1)
    assert train(1, [*SHORT, "--out", str(folder)]) == 0
    robust, meta = checkpoint.load_model(shutil.copy(folder / "robust.pt", folder / "student.pt"), torch.device("cpu"))
    about = {"rule": "score", "temperature": 0.2, "conditioned": True}
    fsm = FSM(robust.widths, len(meta["classes"]), len(meta["modalities"]), **about)
    checkpoint.save_model(folder / "fsm.pt", fsm, {**meta, **about, "widths": list(robust.widths)})
    for number, handler in before.items():
        signal.signal(number, handler)
    return folder


class Place:
    """A folder to work in, with a copy of the trained run; what scripts run there say: 'status: what is on stderr'."""

    def __init__(self, whole: pathlib.Path, folder: pathlib.Path, capfd, monkeypatch):
        self.run, self.out, self.folder = shutil.copytree(whole, folder / "run"), folder / "out", folder
        self.capfd, self.patch = capfd, monkeypatch

    def told(self, script, *arguments) -> str:
        self.capfd.readouterr()
        try:
            status = script(*arguments)
        except SystemExit as end:  # argparse
            status = end.code
        return f"{status}: {self.capfd.readouterr().err.strip()}"

    def train(self, stage: int, *argv) -> str:
        return self.told(train, stage, [*map(str, argv)])

    def start(self, *argv) -> str:
        return self.train(1, *SHORT, "--out", self.out, *argv)

    def resume(self) -> str:
        return self.train(1, "--resume", self.out)

    def evaluate(self, file: pathlib.Path) -> str:
        options = evaluate.options([str(file), "--limit", "2", "--device", "cpu"])
        return self.told(runs.guarded, evaluate.main, options)

    def interrupted(self) -> pathlib.Path:
        """A run of stage 1 that a signal ended after its first step."""
        with pytest.MonkeyPatch.context() as patch:
            during(patch, "teacher", 0, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
            assert self.start().startswith("143")
        return self.out


@pytest.fixture
def place(whole, handlers, tmp_path, capfd, monkeypatch):
    return Place(whole, tmp_path, capfd, monkeypatch)


def change(file: pathlib.Path, drop: tuple = (), key: str | None = "meta", **changes) -> pathlib.Path:
    """Rewrites a checkpoint with other entries of state[key], or of the state itself with key None."""
    state = torch.load(file, weights_only=True)
    inner = state if key is None else state[key]
    inner.update(changes)
    for name in drop:
        del inner[name]
    torch.save(state, file)
    return file


# ---- models of other data -------------------------------------------------------------------------------------------
USE = {
    "teacher.pt": lambda at: at.start("--teacher", at.run / "teacher.pt"),
    "robust.pt": lambda at: at.train(2, *SMALL2, *STAGE2, "--stage1", at.run, "--out", at.out),
    "fsm.pt": lambda at: at.evaluate(at.run),
    "student.pt": lambda at: at.evaluate(at.run / "student.pt"),
}


@pytest.mark.parametrize(
    "name, changes, sentence",
    [
        ("teacher.pt", {"depth": "raw"}, "was trained with depth raw, but here it is hha"),
        ("teacher.pt", {"label_map": "shift:-1"}, "was trained with label_map shift:-1, .* it is None"),
        ("teacher.pt", {"data": "folder"}, "was trained with data folder, but here it is synthetic"),
        ("teacher.pt", {"hold_out": 3}, "was trained with hold_out 3, but here it is 0"),
        ("teacher.pt", {"normalisation": []}, "was trained with normalisation"),
        ("robust.pt", {"label_map": "shift:-1"}, "was trained with label_map shift:-1, .* it is None"),
        ("robust.pt", {"backbone": "cmnext_tiny"}, "was trained with backbone cmnext_tiny, .*segformer_tin"),
        ("fsm.pt", {"depth": "raw"}, "was trained with depth raw, but here it is hha"),
        ("fsm.pt", {"backbone": "segformer_b0"}, "was trained with backbone segformer_b0, .*_tiny"),
        ("fsm.pt", {"widths": [1, 2, 3, 4]}, "was trained with widths 1, 2, 3, 4, but here it is "),
        ("fsm.pt", {"drop": ["widths"]}, "does not say its widths"),
        ("student.pt", {"drop": ["palette"]}, "does not say its palette"),
        ("student.pt", {"drop": ["data"]}, "does not say its data"),
        ("student.pt", {"classes": 3}, ""),
        ("student.pt", {"key": None, "model": None}, "does not hold the weights of a segformer_tiny"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_by_what_it_says_of_itself(place, name, changes, sentence):
    change(place.run / name, **changes)
    told = USE[name](place)
    assert re.search(f"^2: error: .*{name}.*{sentence}", told) and "\n" not in told, told


def a_teacher_trained_elsewhere(at):
    told = at.start("--teacher", change(at.run / "teacher.pt", frames=5, root="elsewhere"), "--eval-every", "9")
    meta = torch.load(at.out / "teacher.pt", weights_only=True)["meta"]
    return f"{told} {meta['frames']} {meta['root']}"


# ---- checkpoints and folders ----------------------------------------------------------------------------------------
def a_pipe_as(option):
    def case(at):
        os.mkfifo(at.folder / "pipe.pt")
        return at.start(option, at.folder / "pipe.pt")

    return case


def weights_to_start_from(**entries):
    return lambda at: at.start("--pretrained", change(at.run / "teacher.pt", key=None, **entries))


def a_last_with(**changes):
    """Resumes a run whose last.pt has other entries, as of another version."""

    def case(at):
        change(at.interrupted() / "last.pt", **changes)
        return at.resume()

    return case


def a_config_of_somebody_else(content):
    def case(at):
        at.out.mkdir()
        (at.out / "config.json").write_text(content)
        told = at.start()
        assert (at.out / "config.json").read_text() == content
        return told

    return case


def held(at, folder, *argv):
    """Trains while another process holds the folder, and again after that one was killed."""
    command = [sys.executable, "-c", HOLD, folder / "lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        told = at.train(1, *argv)
        other.kill()
    return f"{told} Then {at.train(1, *argv)}"


def two_runs_in_one_folder(at):
    at.out.mkdir()
    return held(at, at.out, *SHORT, "--out", at.out)


def resuming_a_run_that_runs(at):
    folder = shutil.copytree(at.interrupted(), at.folder / "copy")  # whose lock this process does not hold
    return held(at, folder, "--resume", folder)


# ---- bad luck -------------------------------------------------------------------------------------------------------
def a_closed_terminal_after_nohup(at):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    during(at.patch, "teacher", 0, lambda *_: os.kill(os.getpid(), signal.SIGHUP))
    return at.start()


def a_terminal_that_is_gone(at):
    def gone(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    at.patch.setattr(sys, "stdout", sys.stdout)  # so that it is put back
    with at.patch.context() as patch:
        patch.setattr("builtins.print", gone)
        return at.start()


def a_log_that_a_loss_of_power_tore(end):
    """The checkpoint counts more of the log than reached the disk; what is left ends in `end`."""

    def case(at):
        file = at.interrupted() / "log.jsonl"
        line = file.read_bytes()
        change(file.with_name("last.pt"), key=None, logged=len(line) + 60)
        file.write_bytes(line + end)
        return f"{at.resume()} {len(log(at.out))} lines"

    return case


def no_program_but_python(at):
    at.patch.setenv("PATH", "")
    return at.start()


# ---- data -----------------------------------------------------------------------------------------------------------
def pictures(at, *argv, label: int | None = None) -> str:
    """Stage 1 on a folder data set whose training labels are all `label`."""
    export(at.folder / "data", "folder", 16, 64, 0)
    for file in (at.folder / "data/labels/train").rglob("*.png") if label is not None else ():
        Image.fromarray(np.full_like(np.array(Image.open(file)), label)).save(file)
    return at.start("--data", "folder", "--root", at.folder / "data", *argv)


def resuming_on_as_many_other_frames(at):
    assert pictures(at, "--distill-epochs", "0") == "0: "
    for file in [*(at.folder / "data").glob("*/train/*/*/000005.*")]:  # the first, by the name of its folder
        file.rename(file.with_stem("000009"))
    return at.resume()


NO_PART = "2: error: .*last.pt does not hold the (optimizer|model) of this phase"
NO_FILE = "2: error: .*pipe.pt does not exist, or is no file"


@pytest.mark.parametrize(
    "case, expected",
    [
        (a_teacher_trained_elsewhere, "^0:  5 elsewhere$"),
        (a_last_with(key="parts", drop=("optimizer",)), NO_PART),
        (a_last_with(key="parts", model={"a": torch.zeros(1)}), NO_PART),
        (a_last_with(key="options", teacher_subsets=0.4), "2: train_stage1.py: error: .* --teacher-subsets=.*"),
        (a_last_with(key="options", drop=("match",)), "2: train_stage1.py: error: .* --match="),
        (a_pipe_as("--pretrained"), NO_FILE),
        (a_pipe_as("--teacher"), NO_FILE),
        (weights_to_start_from(meta=None), "^0: $"),
        (weights_to_start_from(model=None), "2: error: .*teacher.pt"),
        (a_config_of_somebody_else("[1, 2]"), "2: error: .*config.json .*--out"),
        (a_config_of_somebody_else("not json"), "2: error: .*config.json .*--out"),
        (a_config_of_somebody_else('{"model_type": "segformer"}'), "2: error: .*config.json .*--out"),
        (two_runs_in_one_folder, "2: error: another process .* Then 0: $"),
        (resuming_a_run_that_runs, "2: error: another process .* Then 0: $"),
        (a_closed_terminal_after_nohup, "^0: $"),
        (a_terminal_that_is_gone, "^0: $"),
        (a_log_that_a_loss_of_power_tore(b'{"phase": "teach'), "^0:  5 lines"),
        (a_log_that_a_loss_of_power_tore(bytes(40)), "^0:  5 lines"),
        (no_program_but_python, "^0: $"),
        (lambda at: pictures(at, label=255), "2: error: not one pixel of the 8 frames of the train split"),
        (lambda at: pictures(at, "--label-map", "0=0,1=1,"), "2: error: label map .* is not understood"),
        (
            resuming_on_as_many_other_frames,
            "2: error: .*last.pt .*frame names .*/000005 to .* here it is .*/000009 to ",
        ),
        (lambda at: at.train(1, "--data"), "^2: train_stage1.py: error: argument --data: expected one argument$"),
        (lambda at: at.start("--epochs", "1e308"), "^2: train_stage1.py: error: argument --epochs: invalid "),
    ],
)
def test_what_is_wrong_ends_in_one_sentence_or_costs_nothing(place, case, expected):
    told = case(place)
    assert re.search(expected, told) and "Traceback" not in told and "\n" not in told, told
