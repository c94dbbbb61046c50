"""Bad options, checkpoints, folders and luck in a run: what goes in, and the sentence, status or number that comes out.

Each row of the table is a small function that makes the bad thing and returns what came of it as text.
"""

import errno
import json
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

import evaluate
from datasets.export import export
from engine import checkpoint, loop, runs
from fsm import FSM

SHORT = [*SMALL, "--backbone", "segformer_tiny", "--epochs", "1", "--distill-epochs", "1", "--workers", "0"]
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
    """A folder to work in, with copies of the trained run; what scripts run there say."""

    def __init__(self, whole: pathlib.Path, folder: pathlib.Path, capfd, monkeypatch):
        self.run, self.out, self.folder = folder / "run", str(folder / "out"), folder
        self.capfd, self.patch = capfd, monkeypatch
        shutil.copytree(whole, self.run)

    def train(self, stage: int, *argv) -> str:
        """'status: what stood on stderr'."""
        self.capfd.readouterr()
        try:
            status = train(stage, [str(a) for a in argv])
        except SystemExit as end:  # argparse
            status = end.code
        return f"{status}: {self.capfd.readouterr().err.strip()}"

    def evaluate(self, *argv) -> str:
        self.capfd.readouterr()
        status = runs.guarded(evaluate.main, evaluate.options([*map(str, argv), "--limit", "2", "--device", "cpu"]))
        return f"{status}: {self.capfd.readouterr().err.strip()}"

    def stop(self, step: int, act) -> None:
        """Calls act() at this step of the teacher's training."""
        original = runs.Phase.check

        def check(phase, *arguments):
            if (phase.name, phase.step) == ("teacher", step):
                act()
            return original(phase, *arguments)

        self.patch.setattr(runs.Phase, "check", check)

    def interrupted(self) -> pathlib.Path:
        """A run of stage 1 that a signal ended after its first step."""
        with self.patch.context() as patch:
            place, self.patch = self.patch, patch
            self.stop(0, lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert self.train(1, *SHORT, "--out", self.out).startswith("143")
            self.patch = place
        return pathlib.Path(self.out)


@pytest.fixture
def place(whole, tmp_path, capfd, monkeypatch):
    before = {number: signal.getsignal(number) for number in loop.EXIT_STATUS}
    yield Place(whole, tmp_path, capfd, monkeypatch)
    for number, handler in before.items():
        signal.signal(number, handler)


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


def teacher_of(**meta):
    return lambda at: at.train(1, *SHORT[:-4], "--out", at.out, "--teacher", change(at.run / "teacher.pt", **meta))


def robust_of(**meta):
    def case(at):
        change(at.run / "robust.pt", **meta)
        return at.train(2, *SMALL2, *STAGE2, "--stage1", at.run, "--out", at.out)

    return case


def selection_of(**meta):
    def case(at):
        change(at.run / "fsm.pt", **meta)
        return at.evaluate(at.run)

    return case


def a_teacher_trained_elsewhere(at):
    file = change(at.run / "teacher.pt", frames=5, root="elsewhere")
    told = at.train(1, *SHORT, "--out", at.out, "--teacher", file, "--eval-every", "9")
    meta = torch.load(pathlib.Path(at.out) / "teacher.pt", weights_only=True)["meta"]
    return f"{told} {meta['frames']} {meta['root']}"


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def model_without(name):
    return lambda at: at.evaluate(change(at.run / "student.pt", drop=(name,)))


def weights_that_are_none(at):
    return at.evaluate(change(at.run / "student.pt", key=None, model=None))


def classes_that_are_a_number(at):
    return at.evaluate(change(at.run / "student.pt", classes=3))


def a_run_without_its_optimizer(at):
    change(at.interrupted() / "last.pt", key="parts", drop=("optimizer",))
    return at.train(1, "--resume", at.out)


def a_run_of_other_weights(at):
    change(at.interrupted() / "last.pt", key="parts", model={"a": torch.zeros(1)})
    return at.train(1, "--resume", at.out)


def a_pipe_as(option):
    def case(at):
        os.mkfifo(at.folder / "pipe.pt")
        return at.train(1, *SHORT, "--out", at.out, option, at.folder / "pipe.pt")

    return case


def weights_to_start_from(**entries):
    def case(at):
        file = change(at.run / "teacher.pt", key=None, **entries)
        return at.train(1, *SHORT, "--out", at.out, "--pretrained", file)

    return case


# ---- folders --------------------------------------------------------------------------------------------------------


def a_config_of_somebody_else(content):
    def case(at):
        os.mkdir(at.out)
        file = pathlib.Path(at.out) / "config.json"
        file.write_text(content)
        told = at.train(1, *SHORT, "--out", at.out)
        assert file.read_text() == content
        return told

    return case


def a_run_with_options(**options):
    """A last.pt of another version: with an option more, or with None one less."""

    def case(at):
        file = at.interrupted() / "last.pt"
        change(file, key="options", drop=tuple(name for name, value in options.items() if value is None), **options)
        return at.train(1, "--resume", at.out)

    return case


def held(at, folder, *argv):
    """Trains while another process holds the folder, and again after that one was killed."""
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with other:
        other.stdout.readline()
        told = at.train(1, *argv)
        other.kill()
    return f"{told} Then {at.train(1, *argv)}"


def two_runs_in_one_folder(at):
    os.mkdir(at.out)
    return held(at, pathlib.Path(at.out), *SHORT, "--out", at.out)


def resuming_a_run_that_runs(at):
    folder = shutil.copytree(at.interrupted(), at.folder / "copy")  # whose lock this process does not hold
    return held(at, folder, "--resume", folder)


# ---- bad luck -------------------------------------------------------------------------------------------------------


def a_closed_terminal_after_nohup(at):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at.stop(0, lambda: os.kill(os.getpid(), signal.SIGHUP))
    return at.train(1, *SHORT, "--out", at.out)


def a_terminal_that_is_gone(at):
    def gone(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with at.patch.context() as patch:
        patch.setattr("builtins.print", gone)
        stdout = sys.stdout
        told = at.train(1, *SHORT, "--out", at.out)
        sys.stdout = stdout
    return told


def a_log_that_a_loss_of_power_tore(end):
    """The checkpoint counts more of the log than reached the disk; what is left ends in `end`."""

    def case(at):
        log = at.interrupted() / "log.jsonl"
        line = log.read_bytes()
        log.write_bytes(line + b"x" * 60)
        change(log.with_name("last.pt"), key=None, logged=len(line) + 60)
        log.write_bytes(line + end)
        told = at.train(1, "--resume", at.out)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        return f"{told} {len(lines)} lines"

    return case


def no_program_but_python(at):
    at.patch.setenv("PATH", "")
    return at.train(1, *SHORT, "--out", at.out)


# ---- data -----------------------------------------------------------------------------------------------------------


def pictures(at, *argv, label: int | None = None) -> str:
    """Stage 1 on a folder data set whose training labels are all `label`."""
    export(at.folder / "data", "folder", 16, 64, 0)
    for file in (at.folder / "data/labels/train").rglob("*.png") if label is not None else ():
        Image.fromarray(np.full_like(np.array(Image.open(file)), label)).save(file)
    return at.train(1, *SHORT, "--out", at.out, "--data", "folder", "--root", at.folder / "data", *argv)


def labels_that_are_all_ignored(at):
    return pictures(at, label=255)


def label_map(text):
    return lambda at: pictures(at, "--label-map", text)


@pytest.mark.parametrize(
    "case, expected",
    [
        (teacher_of(depth="raw"), "2: error: .*teacher.pt was trained with depth raw, but here it is hha"),
        (teacher_of(label_map="shift:-1"), "2: error: .*teacher.pt was trained with label_map shift:-1, .* it is None"),
        (teacher_of(data="folder"), "2: error: .*teacher.pt was trained with data folder, but here it is synthetic"),
        (teacher_of(hold_out=3), "2: error: .*teacher.pt was trained with hold_out 3, but here it is 0"),
        (teacher_of(normalisation=[]), "2: error: .*teacher.pt was trained with normalisation"),
        (robust_of(label_map="shift:-1"), "2: error: .*robust.pt was trained with label_map shift:-1, .* it is None"),
        (
            robust_of(backbone="cmnext_tiny"),
            "2: error: .*robust.pt was trained with backbone cmnext_tiny, .*segformer_tin",
        ),
        (selection_of(depth="raw"), "2: error: .*fsm.pt was trained with depth raw, but here it is hha"),
        (selection_of(backbone="segformer_b0"), "2: error: .*fsm.pt was trained with backbone segformer_b0, .*_tiny"),
        (selection_of(widths=[1, 2, 3, 4]), "2: error: .*fsm.pt was trained with widths 1, 2, 3, 4, but here it is "),
        (selection_of(drop=("widths",)), "2: error: .*fsm.pt does not say its widths"),
        (a_teacher_trained_elsewhere, "^0:  5 elsewhere$"),
        (model_without("palette"), "2: error: .*student.pt does not say its palette"),
        (model_without("data"), "2: error: .*student.pt does not say its data"),
        (weights_that_are_none, "2: error: .*student.pt does not hold the weights of a segformer_tiny"),
        (classes_that_are_a_number, "2: error: .*student.pt"),
        (a_run_without_its_optimizer, "2: error: .*last.pt does not hold the (optimizer|model) of this phase"),
        (a_run_of_other_weights, "2: error: .*last.pt does not hold the (optimizer|model) of this phase"),
        (a_pipe_as("--pretrained"), "2: error: .*pipe.pt does not exist, or is no file"),
        (weights_to_start_from(meta=None), "^0: $"),
        (weights_to_start_from(model=None), "2: error: .*teacher.pt"),
        (a_pipe_as("--teacher"), "2: error: .*pipe.pt does not exist, or is no file"),
        (a_config_of_somebody_else("[1, 2]"), "2: error: .*config.json .*--out"),
        (a_config_of_somebody_else("not json"), "2: error: .*config.json .*--out"),
        (a_config_of_somebody_else('{"model_type": "segformer"}'), "2: error: .*config.json .*--out"),
        (a_run_with_options(teacher_subsets=0.4), "2: train_stage1.py: error: .* --teacher-subsets=.*"),
        (a_run_with_options(match=None), "2: train_stage1.py: error: .* --match="),
        (two_runs_in_one_folder, "2: error: another process .* Then 0: $"),
        (resuming_a_run_that_runs, "2: error: another process .* Then 0: $"),
        (a_closed_terminal_after_nohup, "^0: $"),
        (a_terminal_that_is_gone, "^0: $"),
        (a_log_that_a_loss_of_power_tore(b'{"phase": "teach'), "^0:  5 lines"),
        (a_log_that_a_loss_of_power_tore(bytes(40)), "^0:  5 lines"),
        (no_program_but_python, "^0: $"),
        (labels_that_are_all_ignored, "2: error: not one pixel of the 8 frames of the train split"),
        (label_map("shift:300"), "2: error: "),
        (label_map("shift:-300"), "2: error: "),
        (label_map("0=0,1=1,"), "2: error: label map .* is not understood"),
        (lambda at: at.train(1, "--data"), "^2: train_stage1.py: error: argument --data: expected one argument$"),
        (
            lambda at: at.train(1, *SHORT, "--epochs", "1e308"),
            "^2: train_stage1.py: error: argument --epochs: invalid ",
        ),
    ],
)
def test_what_is_wrong_ends_in_one_sentence_or_costs_nothing(place, case, expected):
    told = case(place)
    assert re.search(expected, told) and "Traceback" not in told and "\n" not in told, told
