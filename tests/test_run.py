"""Long runs that nothing can ruin, and that are silent about nothing. All runs are tiny.

What the machine does is caused for real where a CPU can: sizes that no machine has, a worker that kills itself, a pipe
without a reader, a full disk. What only CUDA or a container can say is raised with their words.
"""

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

import numpy as np
import pytest
import torch
from kill_and_resume import differences, train
from small_runs import ROOT, TIMES, change, crash, during, log, refused, said, start, stop

import evaluate
import predict
import segformer
from data import FrameDataset
from engine import loop, options, runs

pytestmark = pytest.mark.usefixtures("handlers")
STOPS = [("teacher", "SIGTERM", 143), ("robust", "SIGINT", 130), ("fsm", "SIGUSR1", 0), ("student", "SIGHUP", 129)]


# ---- continuing ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("phase, name, status", STOPS)
def test_a_signal_saves_at_the_next_step_and_the_resumed_run_equals_the_whole_one(whole, tmp_path, phase, name, status):
    stage = 1 if phase in ("teacher", "robust") else 2
    more = ["--save-every", "100", "--workers", "2" if phase == "robust" else "0"]
    with during(phase, 1, lambda *_: signal.raise_signal(signal.Signals[name])):
        assert train(stage, start(stage, whole, tmp_path, *more)) == status
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert (saved["phase"], saved["step"]) == (phase, 2)
    assert train(stage, ["--resume", str(tmp_path / "last.pt")]) == 0
    assert differences(whole / str(stage), tmp_path) == []


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


def test_the_log_of_a_run_that_crashed_has_every_step_once(whole, tmp_path):
    with during("robust", 3, crash):  # after the validation of step 2; the last checkpoint is of step 0
        assert train(1, start(1, whole, tmp_path, "--save-every", "100")) == 130
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"phase": "robust", "st\0\0\0')  # cut off, and zeros as after a loss of power
    assert (log(whole / "1")[-3]["phase"], log(whole / "1")[-3]["step"]) == ("robust", 2)
    assert train(1, ["--resume", str(tmp_path)]) == 0
    for a, b in zip(log(whole / "1"), log(tmp_path), strict=True):
        assert {k: v for k, v in a.items() if k not in TIMES} == {k: v for k, v in b.items() if k not in TIMES}
    assert differences(whole / "1", tmp_path) == []


def test_a_corrupt_last_checkpoint_costs_only_the_steps_since_the_one_before(whole, tmp_path, capfd):
    with during("robust", 2, stop):
        assert train(1, start(1, whole, tmp_path, "--save-every", "1")) == 143
    data = bytearray((tmp_path / "last.pt").read_bytes())
    data[len(data) // 2] ^= 16
    (tmp_path / "last.pt").write_bytes(data)
    capfd.readouterr()
    assert train(1, ["--resume", str(tmp_path)]) == 0
    warning = r"warning: .*last.pt is corrupt, or .* Instead: .*last.previous.pt, step 2\.\n"
    assert re.fullmatch(warning, capfd.readouterr().err)
    assert differences(whole / "1", tmp_path) == []


@pytest.mark.parametrize("stage, phase", [(1, "teacher"), (2, "fsm")])
def test_a_run_killed_before_its_first_checkpoint_begins_again_by_the_same_command(whole, tmp_path, stage, phase):
    with during(phase, 0, crash, of="save"):
        assert train(stage, start(stage, whole, tmp_path)) == 130
    assert sorted(os.listdir(tmp_path)) == ["config.json", "lock"]
    assert train(stage, start(stage, whole, tmp_path)) == 0
    assert differences(whole / str(stage), tmp_path) == []


def test_runs_killed_at_random_moments_end_as_if_they_had_not_been():
    script = pathlib.Path(__file__).with_name("kill_and_resume.py")
    done = subprocess.run([sys.executable, script, "3", str(random.randrange(10**6))], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("equal to the uninterrupted run") == 2, done.stdout + done.stderr


# ---- memory, workers, streams, disks --------------------------------------------------------------------------------
SCRIPTS = {
    "training": lambda whole, out: train(1, start(1, whole, out)),
    "evaluate": lambda whole, _: runs.guarded(evaluate.main, evaluate.options([f"{whole}/1", "--device", "cpu"])),
    "predict": lambda whole, out: runs.guarded(predict.main, predict.options([f"{whole}/1", "--out", str(out)])),
    "export": lambda whole, out: runs.guarded(predict.main, predict.options([f"{whole}/1", "--export", f"{out}.pt2"])),
}


@pytest.mark.parametrize(
    "script, needs",
    [  # while it traces, torch.export takes no memory
        *((script, lambda: torch.empty(2**50)) for script in SCRIPTS if script != "export"),
        *((script, lambda: np.empty(2**50)) for script in SCRIPTS),
        ("training", lambda: bytearray(2**62)),
    ],
)
def test_too_little_memory_is_one_sentence_in_every_script(whole, tmp_path, monkeypatch, capfd, script, needs):
    monkeypatch.setattr(segformer.MSegFormer, "encode", lambda *_: needs())
    assert SCRIPTS[script](whole, tmp_path / "out") == 2
    sentence = said(capfd)
    assert all(part in sentence for part in ("out of memory", "--batch-size", "--size")), sentence


def fail(error: Exception):
    raise error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_what_cuda_and_the_system_say_of_memory_is_understood(error, capfd):
    assert runs.guarded(fail, error) == 2
    assert "--batch-size" in said(capfd)


@pytest.mark.parametrize(
    "act, option",
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "--workers 0"),
        (lambda: fail(RuntimeError("unable to write to file </torch_7_1>: No space left on")), "--workers 0"),
        (lambda: fail(RuntimeError("unable to allocate shared memory(shm) for file </torch_7_1>")), "--workers 0"),
        (lambda: bytearray(2**62), "--batch-size"),
    ],
)
def test_a_loader_worker_that_gives_out_is_one_sentence(whole, tmp_path, monkeypatch, capfd, act, option):
    monkeypatch.setattr(FrameDataset, "__getitem__", lambda *_: act())
    assert option in refused(capfd, 1, start(1, whole, tmp_path, "--workers", "1"))


CLOSED = [("train_stage1.py", how) for how in ("no stdout", "no reader", "a reader of one line")]
CLOSED += [("evaluate.py", "no stdout"), *((name, "no reader") for name in ("evaluate.py", "predict.py", "data.py"))]


@pytest.mark.parametrize("script, closed", CLOSED)
def test_a_closed_stdout_costs_nothing(whole, exported, tmp_path, script, closed):
    words = {
        "train_stage1.py": start(1, whole, tmp_path),
        "evaluate.py": [str(whole / "1"), "--json", str(tmp_path / "out.json"), "--limit", "2"],
        "predict.py": [str(whole / "1"), "--out", str(tmp_path), "--count", "4"],
        "data.py": ["--data", "folder", "--root", str(exported / "folder"), "--check"],
    }[script]
    shell = 'exec "$@" >&-' if closed == "no stdout" else 'exec "$@"'
    command = ["sh", "-c", shell, "sh", sys.executable, ROOT / script, *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if "one line" in closed:
        process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0
    process.stderr.close()
    if script == "train_stage1.py":
        assert differences(whole / "1", tmp_path) == []
    written = {"evaluate.py": 1, "predict.py": 4 * 3}  # out.json, pictures
    assert script not in written or len([path for path in tmp_path.rglob("*.*") if path.is_file()]) == written[script]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_at_a_log_line_ends_in_one_sentence_and_the_run_goes_on(whole, tmp_path, capfd):
    file = tmp_path / "log.jsonl"
    with during("teacher", 1, lambda *_: file.symlink_to("/dev/full")):
        sentence = refused(capfd, 1, start(1, whole, tmp_path))
    assert all(part in sentence for part in (str(file), "No space left", f"--resume {tmp_path}"))
    file.unlink()
    assert train(1, ["--resume", str(tmp_path)]) == 0
    assert [line["phase"] for line in log(tmp_path)] == [line["phase"] for line in log(whole / "1")]
    with open("/dev/full", "w") as full:
        command = [sys.executable, "train_stage2.py", *start(2, whole, tmp_path / "2", "--max-minutes=1e-6")]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stderr.count("cannot be printed: No space left") == 1


# ---- folders ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", [1, 2])
def test_a_used_folder_is_refused_with_both_ways_out_and_left_alone(whole, capfd, stage):
    out = whole / str(stage)
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    sentence = refused(capfd, stage, start(stage, whole, out))
    assert all(part in sentence for part in (f"{out} holds a run of train_stage{stage}.py", f"--resume {out}", "--out"))
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before


def test_a_folder_whose_checkpoint_was_deleted_is_not_trained_again(whole, run, capfd):
    for name in ("last.pt", "last.previous.pt", "log.jsonl"):
        (run / name).unlink()
    assert "teacher.pt" in refused(capfd, 1, start(1, whole, run))


@pytest.mark.parametrize("phase, step", [("robust", 1), ("teacher", 4)])
def test_stage_two_leaves_a_stage_one_alone_that_is_not_complete(whole, run, capfd, phase, step):
    change(run / "last.pt", phase=phase, step=step, steps=4)
    before = (run / "last.pt").read_bytes()
    sentence = f"no finished robust model (step {step} of 4 of {phase}): train_stage1.py --resume"
    resumed = ["--resume", str(shutil.copytree(whole / "2", run.parent / "2")), "--stage1", str(run)]
    assert all(sentence in refused(capfd, 2, argv) for argv in (start(2, run.parent, None), resumed))
    assert (run / "last.pt").read_bytes() == before


def test_a_run_may_be_named_by_one_of_its_files_and_like_one(whole, run):
    o = options.stage2_options("", ["--stage1", str(whole / "1/teacher.pt")])
    assert o.stage1 == o.out == str(whole / "1")
    folder = str(run.rename(run.with_name("a.pt")))
    assert options.stage1_options("", ["--resume", folder]).out == folder


@pytest.fixture
def stopped(whole, tmp_path, monkeypatch):
    """A function that stops a run of a stage in its second phase, in the folder 1 and told so by its relative name."""

    def run(stage: int) -> pathlib.Path:
        monkeypatch.chdir(tmp_path)
        if stage == 2:  # which goes on in the folder of stage 1
            shutil.copytree(whole / "1", "1")
        with during("robust" if stage == 1 else "student", 1, stop):
            assert train(stage, start(stage, pathlib.Path(), "1" if stage == 1 else None)) == 143
        monkeypatch.chdir("/")
        return tmp_path / "1"

    return run


@pytest.mark.parametrize("stage", [1, 2])
def test_a_folder_may_be_renamed_and_resumed_from_anywhere(whole, tmp_path, stopped, stage):
    stopped(stage).rename(tmp_path / "other")
    assert train(stage, ["--resume", str(tmp_path / "other")]) == 0
    for model in ("teacher", "robust") if stage == 1 else ("fsm", "student"):
        weights = [torch.load(f / f"{model}.pt")["model"] for f in (whole / str(stage), tmp_path / "other")]
        assert all(torch.equal(v, weights[1][name]) for name, v in weights[0].items())


@pytest.mark.parametrize("option, value", dict(lr=0.5, seed=3, epochs=9.0, batch_size=2, size=64, amp="bf16").items())
def test_an_edited_config_is_refused_by_the_option(run, capfd, option, value):
    config = json.loads((run / "config.json").read_text())
    config["train_stage1.py"]["options"][option] = value
    (run / "config.json").write_text(json.dumps(config))
    sentence = refused(capfd, 1, ["--resume", str(run)])
    assert str(run / "config.json") in sentence and f"{option} is {value}" in sentence


@pytest.mark.parametrize("stage, laid", [(1, "teacher"), (2, "robust")])
def test_models_of_another_run_laid_into_the_folder_are_refused(stopped, capfd, stage, laid):
    run = stopped(stage)
    options = torch.load(run / f"{laid}.pt", weights_only=True)["meta"]["options"]
    change(run / f"{laid}.pt", "meta", options={**options, "lr": 0.25})
    sentence = refused(capfd, stage, ["--resume", str(run)])
    assert "made with another" in sentence and laid in sentence


def test_a_resume_with_another_number_of_threads_says_so(run, capfd):
    change(run / "last.pt", threads=64)
    assert train(1, ["--resume", str(run)]) == 0
    assert "64 threads" in capfd.readouterr().out


# ---- told at once, told rightly -------------------------------------------------------------------------------------
@pytest.mark.parametrize("setting", ["RANK=abc", "WORLD_SIZE=two", "LOCAL_RANK=", "RANK=1", "LOCAL_RANK=-1"])
def test_variables_that_torchrun_did_not_set(whole, tmp_path, monkeypatch, capfd, setting):
    monkeypatch.setenv(*setting.split("="))
    assert setting.split("=")[0] in refused(capfd, 1, start(1, whole, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words, told",
    [
        ("--backbone cmnext_tiny --batch-size 1", "--batch-size 1 .*--size 32 .*BatchNorm"),
        ("--backbone cmnext_own", "cmnext_own"),
        ("--device cuda:15", "--device cuda:15"),
        ("--teacher nowhere.pt", "nowhere.pt does not exist"),
        ("--teacher {}/1/teacher.pt --modalities rgb,depth", "with modalities rgb, depth, lidar, but .* is rgb, depth"),
        ("--teacher {}/1/teacher.pt --backbone cmnext_tiny", "with backbone segformer_tiny, but .* is cmnext_tiny"),
    ],
)
def test_what_cannot_train_is_told_at_once_and_takes_no_folder(whole, tmp_path, monkeypatch, capfd, words, told):
    stages = segformer.PRESETS["b0"]._replace(stages=segformer.mit_stages)  # an encoder of one's own, as in lite0
    monkeypatch.setitem(segformer.PRESETS, "own", stages)
    for _ in range(2):
        assert re.search(told, refused(capfd, 1, start(1, whole, tmp_path, *words.format(whole).split())))
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize("score, told", [(60.0, True), (40.0, False)])
def test_a_robust_model_below_its_teacher_is_told(whole, tmp_path, monkeypatch, capfd, score, told):
    def validate(predict, dataset, subsets, run):
        teaches = not any(p.requires_grad for p in predict.args[0].parameters())
        return {"miou": score if teaches and len(subsets) == 7 else 50.0}

    monkeypatch.setattr(loop, "validate", validate)
    assert train(1, start(1, whole, tmp_path, "--teacher", f"{whole}/1/teacher.pt")) == 0
    assert ("the robust model reaches 50.00 mIoU, its teacher 60.00" in capfd.readouterr().out) == told
