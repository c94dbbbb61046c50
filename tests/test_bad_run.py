"""Bad options, checkpoints, folders and luck in a run: they end in one sentence, or cost nothing."""

import errno
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from kill_and_resume import SMALL2, STAGE2, train
from small_runs import change, during, log, start, stop

import evaluate
from datasets.export import export, write_file
from engine import runs

HOLD = """import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("held", flush=True)
input()"""


class Place:
    """A folder to work in, with a run of both stages; what scripts run there tell: 'status: line on stderr'."""

    def __init__(self, whole: pathlib.Path, folder: pathlib.Path, capfd):
        self.run, self.out, self.folder, self.capfd = folder / "run", folder / "out", folder, capfd
        for stage in "12":
            shutil.copytree(whole / stage, self.run, dirs_exist_ok=True)

    def told(self, script, *arguments) -> str:
        self.capfd.readouterr()
        try:
            status = script(*arguments)
        except SystemExit as end:  # argparse
            status = end.code
        told = f"{status}: {self.capfd.readouterr().err.strip()}"
        assert "\n" not in told and "Traceback" not in told, told
        return told

    def train(self, stage: int, *argv) -> str:
        return self.told(train, stage, [*map(str, argv)])

    def start(self, *argv) -> str:
        return self.train(1, *start(1, self.run, self.out, *argv))

    def evaluate(self, file: pathlib.Path) -> str:
        options = evaluate.options([str(file), "--limit", "2", "--device", "cpu"])
        return self.told(runs.guarded, evaluate.main, options)

    def interrupted(self) -> pathlib.Path:
        """A run of stage 1 that a signal ended after its first step."""
        with during("teacher", 0, stop):
            assert self.start().startswith("143")
        return self.out


@pytest.fixture
def place(whole, handlers, tmp_path, capfd):
    return Place(whole, tmp_path, capfd)


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
        ("teacher.pt", {"normalisation": []}, "other data: normalisation"),
        ("robust.pt", {"label_map": "shift:-1"}, "was trained with label_map shift:-1, .* it is None"),
        ("robust.pt", {"backbone": "cmnext_tiny"}, "was trained with backbone cmnext_tiny, .*segformer_tin"),
        ("fsm.pt", {"depth": "raw"}, "was trained with depth raw, but here it is hha"),
        ("fsm.pt", {"backbone": "segformer_b0"}, "was trained with backbone segformer_b0, .*_tiny"),
        ("fsm.pt", {"widths": [1, 2, 3, 4]}, "was trained with widths 1, 2, 3, 4, but here it is "),
        ("fsm.pt", {"drop": ["widths"]}, "does not say its widths"),
        ("student.pt", {"drop": ["palette"]}, "does not say its palette"),
        ("student.pt", {"drop": ["data"]}, "does not say its data"),
        ("student.pt", {"classes": 3}, ""),
        ("student.pt", {"val_size": 0}, ""),
        ("student.pt", {"val_size": "64"}, ""),
        ("student.pt", {"palette": [[300, 0, 0]]}, ""),
        ("student.pt", {"ranges": {"rgb": 5}}, ""),
        ("student.pt", {"model": None}, "does not hold the weights of a segformer_tiny"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_by_what_it_says_of_itself(place, name, changes, sentence):
    change(place.run / name, None if "model" in changes else "meta", **changes)
    assert re.search(f"^2: error: .*{name}.*{sentence}", USE[name](place))


def test_a_teacher_trained_elsewhere_still_says_so_in_the_new_folder(place):
    file = change(place.run / "teacher.pt", "meta", frames=5, root="elsewhere")
    assert place.start("--teacher", file, "--eval-every", "9") == "0: "
    meta = torch.load(place.out / "teacher.pt", weights_only=True)["meta"]
    assert (meta["frames"], meta["root"]) == (5, "elsewhere")


# ---- checkpoints and folders ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("entries, told", [({"meta": None}, "^0: $"), ({"model": None}, "^2: error: .*teacher.pt")])
def test_weights_to_start_from_need_not_say_what_they_are_of(place, entries, told):
    assert re.search(told, place.start("--pretrained", change(place.run / "teacher.pt", **entries)))


@pytest.mark.parametrize("option", ["--pretrained", "--teacher"])
def test_a_pipe_is_no_file_of_weights(place, option):
    os.mkfifo(place.folder / "pipe.pt")
    told = place.start(option, place.folder / "pipe.pt")
    assert re.search("^2: error: .*pipe.pt does not exist, or is no file", told)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"key": "parts", "drop": ["optimizer"]}, "error: .*last.pt does not hold the .* of this phase"),
        ({"key": "parts", "model": {"a": torch.zeros(1)}}, "error: .*last.pt does not hold the .* of this phase"),
        ({"key": "options", "teacher_subsets": 0.4}, "train_stage1.py: error: .* --teacher-subsets=.*"),
        ({"key": "options", "drop": ["match"]}, "train_stage1.py: error: .* --match="),
    ],
)
def test_a_run_of_another_version_is_not_resumed(place, changes, sentence):
    change(place.interrupted() / "last.pt", **changes)
    assert re.search(f"^2: {sentence}", place.train(1, "--resume", place.out))


@pytest.mark.parametrize("content", ["[1, 2]", "not json", '{"model_type": "segformer"}'])
def test_a_config_of_somebody_else_is_left_alone(place, content):
    place.out.mkdir()
    (place.out / "config.json").write_text(content)
    assert re.search("^2: error: .*config.json .*--out", place.start())
    assert (place.out / "config.json").read_text() == content


@pytest.mark.parametrize("resumed", [False, True])
def test_a_folder_is_refused_while_another_process_holds_it_and_taken_when_that_was_killed(place, resumed):
    # The lock of the copy is not held by this process.
    folder = shutil.copytree(place.interrupted(), place.folder / "copy") if resumed else place.out
    folder.mkdir(exist_ok=True)
    argv = ["--resume", folder] if resumed else start(1, place.run, folder)
    command = [sys.executable, "-c", HOLD, folder / "lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert place.train(1, *argv).startswith("2: error: another process ")
        other.kill()
    assert place.train(1, *argv) == "0: "


# ---- bad luck -------------------------------------------------------------------------------------------------------
def test_a_closed_terminal_after_nohup_costs_nothing(place):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with during("teacher", 0, lambda *_: os.kill(os.getpid(), signal.SIGHUP)):
        assert place.start() == "0: "


def test_a_terminal_that_is_gone_costs_nothing(place, monkeypatch):
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # so that it is put back
    monkeypatch.setattr("builtins.print", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    assert place.start() == "0: "


@pytest.mark.parametrize("end", [b'{"phase": "teach', bytes(40)])
def test_a_log_that_a_loss_of_power_tore_is_mended(place, end):
    """The checkpoint counts more of the log than reached the disk; what is left ends in `end`."""
    file = place.interrupted() / "log.jsonl"
    line = file.read_bytes()
    change(place.out / "last.pt", logged=len(line) + 60)
    file.write_bytes(line + end)
    assert place.train(1, "--resume", place.out) == "0: " and len(log(place.out)) == 7


def test_no_program_but_python_is_needed(place, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert place.start() == "0: "


# ---- data and options -----------------------------------------------------------------------------------------------
@pytest.fixture
def pictures(place):
    """The options for a folder data set."""
    export(place.folder / "data", "folder", 16, 64, 0)
    return ["--data", "folder", "--root", place.folder / "data"]


def test_labels_that_are_all_ignored_are_refused(place, pictures):
    for file in (place.folder / "data/labels/train").rglob("*.png"):
        write_file(file, np.full((64, 64), 255, np.uint8))
    sentence = "^2: error: not one pixel of the 8 frames of the train split .*--label-map"
    assert re.search(sentence, place.start(*pictures))


def test_as_many_other_frames_are_no_frames_to_resume_on(place, pictures):
    assert place.start(*pictures, "--distill-epochs", "0") == "0: "
    for file in [*(place.folder / "data").glob("*/train/*/*/000005.*")]:  # the first, by the name of its folder
        file.rename(file.with_stem("000009"))
    sentence = "2: error: .*last.pt .*frame names .*/000005 to .* here it is .*/000009 to "
    assert re.search(sentence, place.train(1, "--resume", place.out))


def test_a_label_map_that_is_not_understood_is_refused(place, pictures):
    assert re.search("^2: error: label map .* is not understood", place.start(*pictures, "--label-map", "0=0,1=1,"))
