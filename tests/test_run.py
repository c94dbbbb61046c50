"""Long runs that nothing can ruin: resuming, signals, kills, folders. All runs are tiny."""

import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from kill_and_resume import SMALL2, STAGE2, differences, train
from small_runs import TIMES, crash, during, log, said, start

from engine import options, runs

pytestmark = pytest.mark.usefixtures("one_thread", "handlers")
ROOT = pathlib.Path(__file__).resolve().parent.parent
PHASES = {"teacher": 1, "robust": 1, "fsm": 2, "student": 2}


# ---- continuing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "phase, number, status",
    [
        ("teacher", signal.SIGTERM, 143),
        ("robust", signal.SIGINT, 130),
        ("fsm", signal.SIGUSR1, 0),
        ("student", signal.SIGHUP, 129),
    ],
)
def test_a_signal_saves_at_the_next_step_and_the_resumed_run_equals_the_uninterrupted_one(
    whole, tmp_path, monkeypatch, phase, number, status
):
    with monkeypatch.context() as patch:
        during(patch, phase, 1, lambda *_: os.kill(os.getpid(), number))
        more = ["--save-every", "100", "--workers", "2" if phase == "robust" else "0"]
        assert train(PHASES[phase], start(PHASES[phase], whole, tmp_path, *more)) == status
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert (saved["phase"], saved["step"]) == (phase, 2)
    assert train(PHASES[phase], ["--resume", str(tmp_path / "last.pt")]) == 0
    assert differences(whole / str(PHASES[phase]), tmp_path) == []


def test_a_run_stops_by_the_clock_and_goes_on(whole, tmp_path):
    assert train(1, start(1, whole, tmp_path, "--max-minutes", "1e-6")) == 0
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 1
    assert train(1, ["--resume", str(tmp_path), "--max-minutes", "60"]) == 0
    assert differences(whole / "1", tmp_path) == []


def test_a_second_interrupt_stops_at_once():
    run = SimpleNamespace(signalled=0)
    signal.signal(signal.SIGINT, lambda *caught: runs.Run.on_signal(run, *caught))
    signal.raise_signal(signal.SIGINT)
    assert run.signalled == signal.SIGINT  # and no more: the step is finished first
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_run_goes_on_when_nobody_reads_its_output_any_more(whole, tmp_path):
    command = [sys.executable, ROOT / "train_stage1.py", *start(1, whole, tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=120) == 0, error
    assert differences(whole / "1", tmp_path) == []


def test_the_log_of_a_run_that_crashed_has_every_step_once(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        during(patch, "robust", 3, crash)  # after the validation of step 2; the last checkpoint is of step 0
        assert train(1, start(1, whole, tmp_path, "--save-every", "100")) == 130
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"phase": "robust", "st\0\0\0')  # cut off, and zeros as after a loss of power
    assert (log(whole / "1")[-3]["phase"], log(whole / "1")[-3]["step"]) == ("robust", 2)
    assert train(1, ["--resume", str(tmp_path)]) == 0
    for a, b in zip(log(whole / "1"), log(tmp_path), strict=True):
        same = a.keys() - TIMES
        assert {k: a[k] for k in same} == {k: b[k] for k in same}
    assert differences(whole / "1", tmp_path) == []


def test_a_corrupt_last_checkpoint_costs_only_the_steps_since_the_one_before(whole, tmp_path, capfd, monkeypatch):
    with monkeypatch.context() as patch:
        during(patch, "robust", 2, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert train(1, start(1, whole, tmp_path, "--save-every", "1")) == 143
    data = bytearray((tmp_path / "last.pt").read_bytes())
    data[len(data) // 2] ^= 16
    (tmp_path / "last.pt").write_bytes(data)
    capfd.readouterr()
    assert train(1, ["--resume", str(tmp_path)]) == 0
    assert re.match(
        r"warning: .*last.pt is corrupt, or .* Continuing from .*last.previous.pt, step 2\.\n$", capfd.readouterr().err
    )
    assert differences(whole / "1", tmp_path) == []


def test_a_run_killed_before_its_first_checkpoint_begins_again_by_the_same_command(whole, tmp_path, monkeypatch):
    for stage, phase in ((1, "teacher"), (2, "fsm")):
        out = tmp_path / str(stage)
        with monkeypatch.context() as patch:
            during(patch, phase, 0, crash, of="save")
            assert train(stage, start(stage, whole, out)) == 130
        assert sorted(os.listdir(out)) == ["config.json", "lock"]
        assert train(stage, start(stage, whole, out)) == 0
        assert differences(whole / str(stage), out) == []


def test_runs_killed_at_random_moments_end_as_if_they_had_not_been():
    script = pathlib.Path(__file__).with_name("kill_and_resume.py")
    done = subprocess.run([sys.executable, script, "3", str(random.randrange(10**6))], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("equal to the uninterrupted run") == 2, done.stdout + done.stderr


# ---- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2])
def test_a_used_folder_is_refused_with_both_ways_out_and_left_alone(whole, capfd, stage):
    out = whole / str(stage)
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    assert train(stage, start(stage, whole, out)) == 2
    sentence = said(capfd)
    assert f"{out} holds a run of train_stage{stage}.py" in sentence and f"--resume {out}" in sentence
    assert "--out" in sentence
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before


def test_stage_two_goes_on_in_the_folder_of_stage_one_and_stage_one_then_refuses_it(whole, tmp_path, capfd):
    shutil.copytree(whole / "1", tmp_path / "run")
    out = str(tmp_path / "run")
    assert train(2, [*SMALL2, *STAGE2, "--stage1", out]) == 0
    assert differences(whole / "2", tmp_path / "run")[:1] != ["fsm.pt is in one folder only"]
    assert torch.equal(
        *(
            torch.load(f / "student.pt", weights_only=True)["model"]["decoder.classify.weight"]
            for f in (whole / "2", tmp_path / "run")
        )
    )
    capfd.readouterr()
    assert train(1, ["--resume", out]) == 2
    assert "train_stage2.py" in capfd.readouterr().err


def test_a_folder_whose_checkpoint_was_deleted_is_not_trained_again(whole, tmp_path, capfd):
    for name in ("config.json", "teacher.pt", "robust.pt"):
        shutil.copy(whole / "1" / name, tmp_path)
    assert train(1, ["--resume", str(tmp_path)]) == 2
    assert f"{tmp_path}: this folder holds no last.pt" in capfd.readouterr().err
    assert train(1, start(1, whole, tmp_path)) == 2
    assert "teacher.pt" in said(capfd)


@pytest.mark.parametrize(
    "phase, step, sentence",
    [
        ("robust", 1, "is not complete (step 1 of 4 of phase robust): finish it with train_stage1.py --resume"),
        ("teacher", 4, "is not complete (step 4 of 4 of phase teacher): finish it"),
    ],
)
def test_stage_two_leaves_a_stage_one_alone_that_is_not_complete(whole, tmp_path, capfd, phase, step, sentence):
    shutil.copytree(whole / "1", tmp_path / "run")
    last = tmp_path / "run/last.pt"
    torch.save({**torch.load(last, weights_only=True), "phase": phase, "step": step, "steps": 4}, last)
    before = last.read_bytes()
    assert train(2, [*SMALL2, *STAGE2, "--stage1", str(tmp_path / "run")]) == 2
    assert sentence in said(capfd) and last.read_bytes() == before


def test_a_teacher_alone_is_no_start_for_stage_two(whole, tmp_path, capfd):
    shutil.copy(whole / "1/teacher.pt", tmp_path)
    with pytest.raises(SystemExit, match="2"):
        options.stage2_options("", ["--stage1", str(tmp_path)])
    assert f"train_stage1.py --teacher {tmp_path}" in capfd.readouterr().err


def test_a_run_may_be_named_by_one_of_its_files(whole):
    o = options.stage2_options("", ["--stage1", str(whole / "1/teacher.pt")])
    assert o.stage1 == o.out == str(whole / "1")


def test_a_start_that_failed_does_not_take_the_folder(whole, tmp_path, capfd):
    for _ in range(2):
        assert train(1, start(1, whole, tmp_path, "--teacher", "nowhere.pt")) == 2
        assert "nowhere.pt does not exist" in said(capfd)


def test_a_run_on_other_frames_than_it_began_with_is_not_continued(whole, tmp_path, capfd):
    shutil.copytree(whole / "1", tmp_path / "run")
    change(tmp_path / "run/last.pt", "options", limit=12)
    meta = torch.load(tmp_path / "run/teacher.pt")["meta"]
    change(tmp_path / "run/teacher.pt", "meta", options={**meta["options"], "limit": 12})
    (tmp_path / "run/config.json").unlink()
    assert train(1, ["--resume", str(tmp_path / "run")]) == 2
    assert "last.pt was trained with frames 8, but here it is 12" in said(capfd)


def change(file: pathlib.Path, key: str, **entries) -> None:
    state = torch.load(file, weights_only=True)
    state[key].update(entries)
    torch.save(state, file)


@pytest.mark.parametrize("stage, moved", [(1, "robust"), (2, "student")])
def test_a_folder_may_be_renamed_and_resumed_from_anywhere(whole, tmp_path, monkeypatch, stage, moved):
    """Stage 2 goes on in the folder of stage 1, by its relative name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole / "1", "run") if stage == 2 else None
    first = start(1, whole, "run") if stage == 1 else [*SMALL2, *STAGE2, "--stage1", "run"]
    with monkeypatch.context() as patch:
        during(patch, moved, 1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert train(stage, first) == 143
    (tmp_path / "run").rename(tmp_path / "other")
    monkeypatch.chdir("/")
    assert train(stage, ["--resume", str(tmp_path / "other")]) == 0
    for model in ("teacher", "robust") if stage == 1 else ("fsm", "student"):
        weights = [torch.load(f / f"{model}.pt")["model"] for f in (whole / str(stage), tmp_path / "other")]
        assert all(torch.equal(v, weights[1][name]) for name, v in weights[0].items())


@pytest.mark.parametrize(
    "option, value", [("lr", 0.5), ("seed", 3), ("epochs", 9.0), ("batch_size", 2), ("size", 64), ("amp", "bf16")]
)
def test_an_edited_config_is_refused_by_the_option(whole, tmp_path, capfd, option, value):
    shutil.copytree(whole / "1", tmp_path / "run")
    file = tmp_path / "run/config.json"
    config = json.loads(file.read_text())
    config["train_stage1.py"]["options"][option] = value
    file.write_text(json.dumps(config))
    assert train(1, ["--resume", str(tmp_path / "run")]) == 2
    sentence = said(capfd)
    assert str(file) in sentence and f"{option} {value}" in sentence


def test_models_of_another_run_laid_into_the_folder_are_refused(whole, tmp_path, monkeypatch, capfd):
    for stage, phase, laid in ((1, "robust", "teacher"), (2, "student", "robust")):
        out = shutil.copytree(whole / "1", tmp_path / f"from{stage}") if stage == 2 else tmp_path / "from1"
        with monkeypatch.context() as patch:
            during(patch, phase, 1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
            first = start(1, whole, out) if stage == 1 else [*SMALL2, *STAGE2, "--stage1", str(out)]
            assert train(stage, first) == 143
        change(out / f"{laid}.pt", "meta", options={**torch.load(out / f"{laid}.pt")["meta"]["options"], "lr": 0.25})
        capfd.readouterr()
        assert train(stage, ["--resume", str(out)]) == 2
        assert "0.25" in said(capfd)


def test_a_resume_with_another_number_of_threads_says_so(whole, tmp_path, capfd):
    shutil.copytree(whole / "1", tmp_path / "run")
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)
    torch.save({**state, "threads": 64}, tmp_path / "run/last.pt")
    assert train(1, ["--resume", str(tmp_path / "run")]) == 0
    assert "64 threads" in capfd.readouterr().out
