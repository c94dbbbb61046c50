"""Long runs that nothing can ruin: resuming, signals, processes, bad values, bad options. All runs are tiny."""

import hashlib
import json
import multiprocessing
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kill_and_resume import SMALL, STAGE1, STAGE2, differences, train
from PIL import Image

import evaluate
import train_stage1
from datasets.export import export
from engine import loop, options, runs

ROOT = pathlib.Path(__file__).resolve().parent.parent
PHASES = {"teacher": 1, "robust": 1, "fsm": 2, "student": 2}
PLAIN = ["--drop-path", "0", "--dropout", "0"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the runs started as processes of their own: other threads, other sums."""
    threads, before = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    torch.set_num_threads(threads)
    os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in loop.EXIT_STATUS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    assert multiprocessing.active_children() == []  # a loader worker left behind would keep a script from ending


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Run folders of both stages that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    before = {number: signal.getsignal(number) for number in loop.EXIT_STATUS}
    assert train(1, [*SMALL, *STAGE1, "--out", str(folder / "1")]) == 0
    assert train(2, [*SMALL, *STAGE2, "--stage1", str(folder / "1"), "--out", str(folder / "2")]) == 0
    for number, handler in before.items():
        signal.signal(number, handler)
    return folder


def start(stage: int, whole: pathlib.Path, out: pathlib.Path, *more: str) -> list[str]:
    """The command line of `whole`'s run of this stage, into another folder."""
    extra = STAGE1 if stage == 1 else [*STAGE2, "--stage1", str(whole / "1")]
    return [*SMALL, *extra, "--out", str(out), *more]


def during(monkeypatch, phase: str, step: int, act, of="check") -> None:
    """Calls act(*arguments) once, at this step of this phase, before `Progress.check` looks at the losses."""
    original = getattr(runs.Progress, of)

    def replaced(self, *arguments):
        if (self.phase, self.step) == (phase, step):
            act(*arguments)
        return original(self, *arguments)

    monkeypatch.setattr(runs.Progress, of, replaced)


def log(folder: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def said(capfd) -> str:
    """The sentence on stderr, of which there must be just one."""
    text = capfd.readouterr().err.strip()
    assert text.startswith("error: ") and "\n" not in text, text
    return text.removeprefix("error: ")


# ---- continuing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase, number, status", [
    ("teacher", signal.SIGTERM, 143), ("robust", signal.SIGINT, 130), ("fsm", signal.SIGUSR1, 0),
    ("student", signal.SIGTERM, 143),
])  # fmt: skip
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


def test_a_second_interrupt_stops_at_once_even_in_the_middle_of_one_long_call():
    pid = os.fork()
    if pid == 0:
        runs.Run.catch_signals(SimpleNamespace(on_signal=lambda *_: None))
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes, in C
        os._exit(1)
    time.sleep(0.5)
    os.kill(pid, signal.SIGINT)
    time.sleep(0.5)
    assert os.waitpid(pid, os.WNOHANG)[0] == 0  # the first one waits for the step
    os.kill(pid, signal.SIGINT)
    asked = time.time()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130 and time.time() - asked < 5


def test_the_log_of_a_run_that_crashed_has_every_step_once(whole, tmp_path, monkeypatch):
    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        during(patch, "robust", 3, crash)  # after the validation of step 2; the last checkpoint is of step 0
        assert train(1, start(1, whole, tmp_path, "--save-every", "100")) == 130
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"phase": "robust", "st')  # cut off
    assert (log(whole / "1")[-3]["phase"], log(whole / "1")[-3]["step"]) == ("robust", 2)
    assert train(1, ["--resume", str(tmp_path)]) == 0
    for a, b in zip(log(whole / "1"), log(tmp_path), strict=True):
        same = a.keys() - {"images_per_second", "data_wait", "peak_memory_mb"}
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
    assert re.match(r"warning: .*last.pt is corrupt: .* Continuing from .*last.previous.pt, step 2\.\n$",
                    capfd.readouterr().err)  # fmt: skip
    assert differences(whole / "1", tmp_path) == []


def test_a_run_killed_before_its_first_checkpoint_begins_again_with_or_without_resume(whole, tmp_path, monkeypatch):
    def crash(*_):
        raise KeyboardInterrupt

    for stage, phase in ((1, "teacher"), (2, "fsm")):
        out = tmp_path / str(stage)
        with monkeypatch.context() as patch:
            during(patch, phase, 0, crash, of="save")
            assert train(stage, start(stage, whole, out)) == 130
        assert os.listdir(out) == ["config.json"]
        assert train(stage, start(stage, whole, out) if stage == 1 else ["--resume", str(out)]) == 0
        assert differences(whole / str(stage), out) == []


def test_runs_killed_at_random_moments_end_as_if_they_had_not_been():
    script = pathlib.Path(__file__).with_name("kill_and_resume.py")
    done = subprocess.run([sys.executable, script, "3", str(random.randrange(10**6))], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("equal to the uninterrupted run") == 2, done.stdout + done.stderr


# ---- folders and options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2])
def test_a_used_folder_is_refused_with_both_ways_out_and_left_alone(whole, capfd, stage):
    out = whole / str(stage)
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    assert train(stage, start(stage, whole, out)) == 2
    sentence = said(capfd)
    assert f"{out} is not empty" in sentence and f"--resume {out}" in sentence and "--out" in sentence
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before


def test_stage_two_goes_on_in_the_folder_of_stage_one_and_stage_one_then_refuses_it(whole, tmp_path, capfd):
    shutil.copytree(whole / "1", tmp_path / "run")
    out = str(tmp_path / "run")
    assert train(2, [*SMALL, *STAGE2, "--stage1", out]) == 0
    assert differences(whole / "2", tmp_path / "run")[:1] != ["fsm.pt is in one folder only"]
    assert torch.equal(*(torch.load(f / "student.pt", weights_only=True)["model"]["decoder.classify.weight"]
                         for f in (whole / "2", tmp_path / "run")))  # fmt: skip
    capfd.readouterr()
    assert train(1, ["--resume", out]) == 2
    assert "went on to train_stage2.py" in said(capfd)


def test_a_folder_whose_checkpoint_was_deleted_is_not_trained_again(whole, tmp_path, capfd):
    for name in ("config.json", "teacher.pt", "robust.pt"):
        shutil.copy(whole / "1" / name, tmp_path)
    assert train(1, ["--resume", str(tmp_path)]) == 2
    assert "no last.pt to continue from" in said(capfd)


@pytest.mark.parametrize("phase, step, sentence", [
    ("robust", 1, "stopped at step 1 of 4 of phase robust: finish it with train_stage1.py --resume"),
    ("teacher", 4, "has a teacher only"),
])  # fmt: skip
def test_stage_two_leaves_a_stage_one_alone_that_is_not_complete(whole, tmp_path, capfd, phase, step, sentence):
    shutil.copytree(whole / "1", tmp_path / "run")
    last = tmp_path / "run/last.pt"
    torch.save({**torch.load(last, weights_only=True), "phase": phase, "step": step, "steps": 4}, last)
    before = last.read_bytes()
    assert train(2, [*SMALL, *STAGE2, "--stage1", str(tmp_path / "run")]) == 2
    assert sentence in said(capfd) and last.read_bytes() == before


def test_a_run_may_be_named_by_one_of_its_files(whole):
    o = options.stage2_options("", ["--stage1", str(whole / "1/teacher.pt")])
    assert o.stage1 == o.out == str(whole / "1")


def test_a_start_that_failed_does_not_take_the_folder(whole, tmp_path, capfd):
    for _ in range(2):
        assert train(1, start(1, whole, tmp_path, "--teacher", "nowhere.pt")) == 2
        assert "nowhere.pt does not exist" in said(capfd)


def test_config_json_alone_repeats_a_run(whole, tmp_path):
    assert train(1, ["--config", str(whole / "1" / "config.json"), "--out", str(tmp_path / "1")]) == 0
    assert differences(whole / "1", tmp_path / "1") == []


def test_the_number_of_loader_workers_changes_no_bit(whole, tmp_path):
    assert train(1, start(1, whole, tmp_path, "--workers", "2")) == 0
    assert differences(whole / "1", tmp_path) == []


def test_deterministic_algorithms_run_on_the_cpu_too(whole, tmp_path):
    try:
        assert train(1, start(1, whole, tmp_path, "--deterministic")) == 0
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("stage, argv, sentence", [
    (1, ["--epoch", "3"], "unrecognized arguments: --epoch 3"),
    (1, ["--batch-size", "0"], "argument --batch-size: invalid int above 0 value: '0'"),
    (1, ["--lr", "nan"], "argument --lr: invalid float above 0 value: 'nan'"),
    (1, ["--epochs", "inf"], "argument --epochs: invalid float above 0 value: 'inf'"),
    (1, ["--device", "gpu"], "argument --device: 'gpu' must be auto, cpu, cuda or cuda:N"),
    (1, ["--size", "16"], "--size 16 is too small"),
    (1, ["--data", "folder"], "--data folder needs --root"),
    (1, ["--config", "WHOLE/1/config.json"], "give it a folder of its own with --out DIR"),
    (1, ["--label-map", "0=1"], "--label-map is for --data folder"),
    (1, ["--teacher", "a.pt", "--pretrained", "b.pth"], "--teacher and --pretrained contradict"),
    (1, ["--resume", "nowhere"], "nowhere/config.json holds no options of train_stage1.py"),
    (1, ["--resume", "WHOLE/1", "--lr", "0.5"], "--lr 0.5 contradicts"),
    (1, ["--resume", "WHOLE/1", "--out", "elsewhere"], "give neither --out nor --config"),
    (1, ["--resume", "WHOLE/1/teacher.pt"], "give the run folder or its last.pt"),
    (2, ["--resume", "WHOLE/1"], "WHOLE/1/config.json holds no options of train_stage2.py"),
    (2, [], "give either --stage1 RUN, or both --teacher FILE and --robust FILE"),
    (2, ["--teacher", "a.pt"], "--teacher and --robust belong together"),
    (2, ["--stage1", "WHOLE/1", "--robust", "a.pt"], "give either --stage1 RUN, or both"),
])  # fmt: skip
def test_wrong_or_contradictory_options_end_with_one_sentence(whole, capsys, stage, argv, sentence):
    with pytest.raises(SystemExit, match="2"):
        (options.stage1_options, options.stage2_options)[stage - 1]("", [a.replace("WHOLE", str(whole)) for a in argv])
    text = capsys.readouterr().err
    assert sentence.replace("WHOLE", str(whole)) in text.splitlines()[-1] and "Traceback" not in text


@pytest.mark.parametrize("script", ["train_stage1.py", "train_stage2.py"])
def test_help_comes_before_torch_is_loaded(script):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "usage:" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3


@pytest.mark.parametrize("argv, sentence", [
    (["--modalities", "rgb,depth"], "with modalities rgb, depth, lidar, but here it is rgb, depth"),
    (["--backbone", "cmnext_tiny"], "with backbone segformer_tiny, but here it is cmnext_tiny"),
])  # fmt: skip
def test_a_teacher_of_another_kind_is_refused_with_both_descriptions(whole, tmp_path, capfd, argv, sentence):
    assert train(1, [*start(1, whole, tmp_path / "x")[:-4], "--out", str(tmp_path / "x"), *argv,
                     "--teacher", str(whole / "1/teacher.pt")]) == 2  # fmt: skip
    assert sentence in said(capfd)


def test_a_run_on_other_frames_than_it_began_with_is_not_continued(whole, tmp_path, capfd):
    shutil.copytree(whole / "1", tmp_path / "run")
    file = tmp_path / "run/config.json"
    file.write_text(file.read_text().replace('"limit": 8', '"limit": 12'))
    assert train(1, ["--resume", str(tmp_path / "run")]) == 2
    assert "last.pt was trained with frames 8, but here it is 12" in said(capfd)


# ---- bad data and bad values -----------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """Eight training and four validation frames of a folder data set, its lidar as .npy files of floats."""
    export(tmp_path / "data", "folder", 16, 64, 0)
    return tmp_path / "data"


def folder_run(pictures: pathlib.Path, out: pathlib.Path, *more: str) -> list[str]:
    return [*SMALL, *STAGE1, "--data", "folder", "--root", str(pictures), "--workers", "0", "--out", str(out),
            *more]  # fmt: skip


def plant(pictures: pathlib.Path, value: float) -> str:
    """Puts a value into one training frame's lidar -> the frame's name."""
    file = sorted((pictures / "lidar/train").rglob("*.npy"))[3]
    array = np.load(file)
    array[5:20, 5:20] = value
    np.save(file, array)
    return file.relative_to(pictures / "lidar").with_suffix("").as_posix()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_nan_in_a_file_stops_the_run_with_one_sentence_that_names_it(pictures, tmp_path, capfd, workers):
    name = plant(pictures, float("nan"))
    assert train(1, folder_run(pictures, tmp_path / "run", "--workers", workers)) == 2
    sentence = said(capfd)
    assert sentence.startswith(f"{pictures}/lidar/{name}.npy has NaN or infinite values"), sentence


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_and_names_term_and_frames(pictures, tmp_path, capfd):
    name, out = plant(pictures, 3e38), tmp_path / "run"  # finite in the file, infinite once normalised
    assert train(1, folder_run(pictures, out, "--save-every", "1")) == 2
    sentence = said(capfd)
    step = int(re.match(r"ce of phase teacher, step (\d) is not finite on process 0; frames of its batch", sentence)[1])
    assert name in sentence and f"{out}/nonfinite-0.pt" in sentence
    seen = torch.load(out / "nonfinite-0.pt", weights_only=True)
    assert name in seen["frames"] and seen["step"] == step and not torch.isfinite(seen["losses"]["ce"])
    last = torch.load(out / "last.pt", weights_only=True)
    assert last["step"] == step  # saved after every step; parameters as before the bad one
    for key, value in last["model"].items():
        assert "running" in key or "tracked" in key or torch.equal(value, seen["model"][key]), key


def test_a_gradient_that_is_not_finite_stops_too(whole, tmp_path, monkeypatch, capfd):
    original = torch.nn.utils.get_total_norm
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda gradients: original([gradients[0] * float("nan")]))
    assert train(1, start(1, whole, tmp_path)) == 2
    assert said(capfd).startswith("the gradient of phase teacher, step 0 is not finite on process 0; frames")


def test_frames_of_different_shapes_in_a_batch_are_named(whole, tmp_path, capfd):
    meta = {"modalities": ["rgb"], "classes": ["a", "b"]}
    for i, shape in enumerate([(64, 64), (64, 96)]):
        for folder, array in (("rgb", np.zeros((*shape, 3), np.uint8)), ("labels", np.zeros(shape, np.uint8))):
            file = tmp_path / f"data/{folder}/val/{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(file)
    (tmp_path / "data/classes.txt").write_text("\n".join(meta["classes"]))
    model = train_stage1.build_model("segformer_tiny", 2, ["rgb"])
    about = {"backbone": "segformer_tiny", "drop_path": 0.1, "dropout": 0.1, "size": 64, "val_size": 64,
             "data": "folder", "root": str(tmp_path / "data"), "depth": "hha", "label_map": None,
             "normalisation": "all", **meta}  # fmt: skip
    runs.save_model(tmp_path / "a.pt", model, about)
    for workers in "0", "2":
        assert runs.guarded(evaluate.main, evaluate.options([str(tmp_path / "a.pt"), "--workers", workers])) == 2
        sentence = said(capfd)
        assert "val/1 has 64 x 96 pixels, but val/0 in its batch has 64 x 64; use --batch-size 1" in sentence, sentence
    assert runs.guarded(evaluate.main, evaluate.options([str(tmp_path / "a.pt"), "--batch-size", "1"])) == 0


# ---- several processes -----------------------------------------------------------------------------------------------


def test_shards_are_disjoint_complete_and_the_same_stream_for_any_number_of_processes():
    frames, size, seed, steps = 13, 12, 5, 26
    one = list(loop.Batches(frames, size, seed, 0, steps, 0, 1))
    for world in (2, 3, 4):
        shards = [list(loop.Batches(frames, size, seed, 0, steps, rank, world)) for rank in range(world)]
        for step, batch in enumerate(one):
            parts = [shard[step] for shard in shards]
            assert {len(part) for part in parts} == {size // world} and sorted(sum(parts, [])) == sorted(batch)
    keys = [key for batch in one for key in batch]
    for epoch in range(steps * size // frames):
        assert sorted(index for e, index in keys if e == epoch) == list(range(frames))
    assert list(loop.Batches(frames, size, seed, 7, steps, 0, 1)) == one[7:]


# Runs the scripts one after the other in a process that loads torch once. Each gets a port of its own.
DRIVER = """
import json, os, runpy, sys
for port, argv in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"], sys.argv = str(port), argv
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code: raise
"""
# Stands before a script: process 1 kills itself at a step of the robust phase, the first time.
SUICIDE = """
import os, runpy, signal, sys
from engine import loop
from engine import runs
check = runs.Progress.check
def dying(self, *rest):
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if first and (self.phase, self.step, self.run.rank) == ("robust", 2, 1):
        os.kill(os.getpid(), signal.SIGKILL)
    check(self, *rest)
runs.Progress.check = dying
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def processes(code: str, argv: list[str], world: int = 2) -> list[subprocess.Popen]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}  # fmt: skip
    return [subprocess.Popen([sys.executable, "-c", code, *argv], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)})
            for r in range(world)]  # fmt: skip


def jobs(whole: pathlib.Path, out: pathlib.Path) -> list[list[str]]:
    """Every phase and an evaluation. Phases start from `whole`'s models, so that each compares by itself: AdamW makes
    steps of full size from a gradient that is zero but for rounding, as biases before a BatchNorm have.
    """
    small = [*SMALL, *PLAIN]
    return [
        ["train_stage1.py", *small, *STAGE1, "--out", f"{out}/1"],
        ["train_stage1.py", *small, *STAGE1, "--teacher", f"{whole}/1/teacher.pt", "--beta", "2", "--out",
         f"{out}/robust"],
        ["train_stage2.py", *small, *STAGE2, "--stage1", f"{whole}/1", "--out", f"{out}/2"],
        ["evaluate.py", f"{whole}/2/student.pt", f"{whole}/1/robust.pt", "--protocol", "any,nm,condition",
         "--batch-size", "3", "--limit", "8", "--json", f"{out}/scores.json"],
    ]  # fmt: skip


@pytest.fixture(scope="module")
def two(whole, tmp_path_factory):
    """The folder of `jobs` done by two processes."""
    out = tmp_path_factory.mktemp("two")
    pair = processes(DRIVER, [json.dumps([(free_port(), job) for job in jobs(whole, out)])])
    ends = [process.communicate(timeout=300)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], "\n".join(ends)
    return out


def test_two_processes_train_and_evaluate_as_one(whole, two, tmp_path):
    stage1, robust, stage2, evaluation = (job[1:] for job in jobs(whole, tmp_path))
    assert train(1, [*stage1, "--distill-epochs", "0"]) == 0 and train(1, robust) == 0 and train(2, stage2) == 0
    assert runs.guarded(evaluate.main, evaluate.options(evaluation)) == 0
    compared = set()
    for folder in "1", "robust", "2":
        for a, b in zip(log(tmp_path / folder), log(two / folder), strict=False):
            for name in a.keys() & {"ce", "kl", "hpdm", "ifv", "ce_logits", "ce_features", "features"}:
                assert (a["phase"], a["step"]) == (b["phase"], b["step"])
                assert abs(a[name] - b[name]) < 1e-5 * max(1, a[name]), (a["phase"], name, a[name], b[name])
                compared.add((a["phase"], name))
    assert len(compared) == 1 + 4 + 2 + 3, compared
    results = [json.loads((folder / "scores.json").read_text())["results"] for folder in (tmp_path, two)]
    assert results[0] == results[1]


def test_a_batch_that_cannot_be_shared_out_is_refused(whole, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert train(1, start(1, whole, tmp_path)) == 2
    assert said(capfd) == "--batch-size 4 counts all processes: make it a multiple of 3."


def test_when_one_of_two_is_killed_the_other_ends_within_a_minute_with_an_error(whole, tmp_path):
    pair = processes(SUICIDE, ["train_stage1.py", *start(1, whole, tmp_path)])
    assert pair[1].wait(timeout=200) == -signal.SIGKILL
    killed = time.time()
    text = pair[0].communicate(timeout=60)[0]
    assert time.time() - killed < 60 and pair[0].returncode == 2
    assert "error (process 0): another process of this run has ended" in text and "Traceback" not in text, text


def test_torchrun_continues_a_killed_run_by_itself(whole, two, tmp_path):
    script = tmp_path / "suicide.py"
    script.write_text(SUICIDE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=1",
                "--monitor-interval=0.1", f"--master-port={free_port()}", str(script), "train_stage1.py"]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    first = start(1, whole, tmp_path / "run", *PLAIN)
    done = subprocess.run([*torchrun, *first], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "exitcode: -9" in done.stderr
    assert differences(two / "1", tmp_path / "run") == []  # bit for bit as two processes that nobody killed
    assert [v["step"] for v in log(tmp_path / "run")] == [v["step"] for v in log(two / "1")]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_restart_by_torchrun_does_not_touch_a_run_that_another_command_began(whole, capfd, monkeypatch, stage):
    monkeypatch.setattr(runs, "RESTARTS", 1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    test_a_used_folder_is_refused_with_both_ways_out_and_left_alone(whole, capfd, stage)


def test_batch_norm_over_processes_equals_torchs_for_one_and_takes_bf16(monkeypatch):
    monkeypatch.setattr(loop.dist, "all_reduce", lambda x: None)  # one process: its sums are the sums
    torch.manual_seed(0)
    x = 3 * torch.randn(4, 5, 6, 7) + 1
    plain, synced = torch.nn.BatchNorm2d(5), torch.nn.BatchNorm2d(5)
    loop.sync_batch_norm(synced, torch.device("cpu"))
    assert type(synced) is loop.SyncedBatchNorm
    torch.testing.assert_close(synced(x), plain(x))
    torch.testing.assert_close(synced.running_var, plain.running_var)
    torch.testing.assert_close(synced(x.bfloat16()), plain(x.bfloat16().float()))
