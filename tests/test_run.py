"""Long runs that nothing can ruin: resuming, signals, processes, bad values, bad options. All runs are tiny."""

import contextlib
import json
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kill_and_resume import SMALL, STAGE1, STAGE2, differences, train
from PIL import Image

import evaluate
import train_stage1
import train_stage2
from datasets.export import export
from engine import loop, options, runs
from model import build_model

ROOT = pathlib.Path(__file__).resolve().parent.parent
PHASES = {"teacher": 1, "robust": 1, "fsm": 2, "student": 2}
TIMES = {"images_per_second", "data_wait", "minutes_left", "peak_memory_mb"}


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
    signal.setitimer(signal.ITIMER_REAL, 0)
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
    ("student", signal.SIGHUP, 129),
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


def interrupted_as_whole(monkeypatch, whole: pathlib.Path, folder: pathlib.Path, phase: str, *more: str) -> None:
    """Runs stage 1 with these options into folder / "a", and into "b" with a stop at step 2 of the phase: equal."""
    assert train(1, start(1, whole, folder / "a", *more)) == 0
    with monkeypatch.context() as patch:
        during(patch, phase, 2, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert train(1, start(1, whole, folder / "b", *more)) == 143
    assert train(1, ["--resume", str(folder / "b")]) == 0
    assert differences(folder / "a", folder / "b") == []


def test_all_that_the_options_of_stage_one_train_comes_back(whole, tmp_path, monkeypatch):
    """The teacher that learns by feedback, and conditioning, interrupted and continued."""
    more = "--feedback 12 --beta 12 --conditioned --complete 0.5 --save-every 100".split()
    interrupted_as_whole(monkeypatch, whole, tmp_path, "robust", *more, "--teacher", str(whole / "1/teacher.pt"))
    teachers = [torch.load(f / "teacher.pt", weights_only=True)["model"] for f in (whole / "1", tmp_path / "a")]
    assert any(not torch.equal(teachers[0][k], v) for k, v in teachers[1].items() if k.startswith("stages"))
    assert all(torch.equal(teachers[0][k], v) for k, v in teachers[1].items() if k.startswith("decoder"))


def test_the_papers_teacher_learns_from_complete_inputs_alone(whole, tmp_path, monkeypatch):
    interrupted_as_whole(monkeypatch, whole, tmp_path, "teacher", "--teacher-subsets", "0", "--distill-epochs", "0")
    for folder, subsets in ((whole / "1", True), (tmp_path / "a", False)):
        lines = [line for line in (folder / "log.jsonl").read_text().splitlines() if '"teacher"' in line]
        for what in ("ce_subsets", "miou_missing"):
            assert any(what in line for line in lines) == subsets


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
    assert re.match(r"warning: .*last.pt is corrupt, or .* Continuing from .*last.previous.pt, step 2\.\n$",
                    capfd.readouterr().err)  # fmt: skip
    assert differences(whole / "1", tmp_path) == []


def test_a_run_killed_before_its_first_checkpoint_begins_again_with_or_without_resume(whole, tmp_path, monkeypatch):
    for stage, phase in ((1, "teacher"), (2, "fsm")):
        out = tmp_path / str(stage)
        with monkeypatch.context() as patch:
            during(patch, phase, 0, crash, of="save")
            assert train(stage, start(stage, whole, out)) == 130
        assert sorted(os.listdir(out)) == ["config.json", "lock"]
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
    assert f"{out} holds a run of train_stage{stage}.py" in sentence and f"--resume {out}" in sentence
    assert "--out" in sentence
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
    assert "holds a run of train_stage2.py" in said(capfd)


def test_a_folder_whose_checkpoint_was_deleted_is_not_trained_again(whole, tmp_path, capfd):
    for name in ("config.json", "teacher.pt", "robust.pt"):
        shutil.copy(whole / "1" / name, tmp_path)
    assert train(1, ["--resume", str(tmp_path)]) == 2
    assert "holds teacher.pt, but no last.pt to continue from" in said(capfd)


@pytest.mark.parametrize("phase, step, sentence", [
    ("robust", 1, "is not complete (step 1 of 4 of phase robust): finish it with train_stage1.py --resume"),
    ("teacher", 4, "is not complete (step 4 of 4 of phase teacher): finish it"),
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


@pytest.mark.parametrize("options, losses", [
    ("--losses anyseg", "ce mad umd cmd"),
    ("--lambda-kl 0 --alpha 0 --complete 0.5 --conditioned", "ce"),
    ("--beta 12 --variation all --match same", "ce kl hpdm variation"),
    ("--feedback 12", "ce kl hpdm teacher_ce teacher_variation"),
    ("--prototypes published", "ce kl hpdm"),
])  # fmt: skip
def test_every_row_of_the_comparison_trains_by_its_losses(whole, tmp_path, options, losses):
    teacher = ["--teacher", str(whole / "1/teacher.pt"), "--distill-epochs", "1", "--eval-every", "9"]
    assert train(1, start(1, whole, tmp_path, *teacher, *options.split())) == 0
    means = log(tmp_path)[0]
    assert set(means) - TIMES - {"phase", "step", "epoch", "lr"} == set(losses.split())
    assert all(np.isfinite(means[name]) and means[name] > 0 for name in losses.split()), means


def test_the_robust_model_may_start_where_the_teacher_started(whole, tmp_path, monkeypatch):
    starts = []
    for phase, more in (("teacher", []), ("robust", ["--robust-from", "start", "--teacher", f"{whole}/1/teacher.pt"])):
        with monkeypatch.context() as patch:
            during(patch, phase, 0, crash)
            assert train(1, start(1, whole, tmp_path / phase, *more)) == 130
        starts.append(torch.load(tmp_path / phase / "last.pt", weights_only=True)["parts"]["model"])
    assert all(torch.equal(starts[0][name], value) for name, value in starts[1].items())


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
    (1, ["--batch-size", "0"], "argument --batch-size: invalid int from 1 to 1e+09 value: '0'"),
    (1, ["--lr", "nan"], "argument --lr: invalid float from 1e-09 to 1e+09 value: 'nan'"),
    (1, ["--epochs", "inf"], "argument --epochs: invalid float from 1e-09 to 1e+09 value: 'inf'"),
    (1, ["--out", ""], "--out= is empty; is a variable of the shell not set?"),
    (1, ["--teacher", " "], "--teacher= is empty"),
    (1, ["--epochs", "1e308"], "argument --epochs: invalid float from 1e-09 to 1e+09 value: '1e308'"),
    (1, ["--device", "gpu"], "argument --device: invalid choice: 'gpu' (choose from "),
    (1, ["--size", "16"], "argument --size: invalid int from 32 to 1e+09 value: '16'"),
    (1, ["--teacher", "a.pt", "--pretrained", "b.pth"], "--teacher and --pretrained contradict"),
    (1, ["--resume", "nowhere"], "nowhere/config.json holds no options of train_stage1.py"),
    (1, ["--resume", "WHOLE/1", "--lr", "0.5"], "--lr=0.5 contradicts WHOLE/1/config.json, which has --lr=0.002: "),
    (1, ["--resume", "WHOLE/1", "--out", "elsewhere"], "give neither --out nor --config"),
    (2, ["--resume", "WHOLE/1"], "WHOLE/1/config.json holds no options of train_stage2.py"),
    (1, ["--conditioned", "--distill-epochs", "0"], "which --distill-epochs 0 leaves out"),
    (2, [], "give either --stage1 RUN, or both --teacher FILE and --robust FILE"),
    (2, ["--teacher", "a.pt"], "give either --stage1 RUN, or both"),
    (2, ["--stage1", "WHOLE/1", "--robust", "a.pt"], "give either --stage1 RUN, or both"),
])  # fmt: skip
def test_wrong_or_contradictory_options_end_with_one_sentence(whole, capsys, stage, argv, sentence):
    with pytest.raises(SystemExit, match="2"):
        (options.stage1_options, options.stage2_options)[stage - 1]("", [a.replace("WHOLE", str(whole)) for a in argv])
    text = capsys.readouterr().err
    assert sentence.replace("WHOLE", str(whole)) in text.splitlines()[-1] and "Traceback" not in text


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


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_and_names_term_and_frames(
    whole, tmp_path, monkeypatch, capfd
):
    original = runs.Phase.batches

    def poisoned(self, dataset):
        for images, labels, names in original(self, dataset):
            sound = torch.tensor([name != "train/000005" for name in names])
            yield images.where(sound[:, None, None, None, None], torch.nan), labels, names

    monkeypatch.setattr(runs.Phase, "batches", poisoned)
    assert train(1, start(1, whole, tmp_path, "--save-every", "1")) == 2
    sentence = said(capfd)
    what = r"ce and ce_subsets and the gradient of phase teacher, step (\d) is not finite; frames of"
    step = int(re.match(what, sentence)[1])
    assert "train/000005" in sentence
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    assert last["step"] == step  # saved after every step: the one before the bad one
    weights = {k: v for k, v in last["parts"]["model"].items() if "running" not in k}  # BatchNorm has seen the frame
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_a_gradient_that_is_not_finite_stops_too(whole, tmp_path, monkeypatch, capfd):
    original = torch.nn.utils.get_total_norm
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda gradients: original([gradients[0] * float("nan")]))
    assert train(1, start(1, whole, tmp_path)) == 2
    assert said(capfd).startswith("the gradient of phase teacher, step 0 is not finite; frames of the batch")


def test_frames_of_different_shapes_in_a_batch_are_named(whole, tmp_path, capfd):
    meta = {"modalities": ["rgb"], "classes": ["a", "b"]}
    for i, shape in enumerate([(64, 64), (64, 96)]):
        for folder, array in (("rgb", np.zeros((*shape, 3), np.uint8)), ("labels", np.zeros(shape, np.uint8))):
            file = tmp_path / f"data/{folder}/val/{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(file)
    (tmp_path / "data/classes.txt").write_text("\n".join(meta["classes"]))
    model = build_model("segformer_tiny", 2, ["rgb"])
    about = {"backbone": "segformer_tiny", "drop_path": 0.1, "dropout": 0.1, "size": 64, "val_size": 64,
             "data": "folder", "root": str(tmp_path / "data"), "depth": "hha", "label_map": None,
             "normalisation": "all", "hold_out": 0, "palette": [], **meta}  # fmt: skip
    runs.save_model(tmp_path / "a.pt", model, about)
    for workers in "0", "2":
        assert runs.guarded(evaluate.main, evaluate.options([str(tmp_path / "a.pt"), "--workers", workers])) == 2
        sentence = said(capfd)
        assert "val/0 has 64 x 64 pixels, val/1 has 64 x 96 pixels; use --batch-size 1" in sentence, sentence
    assert runs.guarded(evaluate.main, evaluate.options([str(tmp_path / "a.pt"), "--batch-size", "1"])) == 0


# ---- several processes -----------------------------------------------------------------------------------------------


def test_shards_are_disjoint_complete_and_the_same_stream_for_any_number_of_processes():
    frames, size, seed, steps = 13, 12, 5, 26
    one = list(loop.batch_keys(frames, size, seed, range(steps), slice(None)))
    for world in (2, 3, 4):
        shares = [slice(rank, None, world) for rank in range(world)]
        shards = [list(loop.batch_keys(frames, size, seed, range(steps), share)) for share in shares]
        for step, batch in enumerate(one):
            parts = [shard[step] for shard in shards]
            assert {len(part) for part in parts} == {size // world} and sorted(sum(parts, [])) == sorted(batch)
    keys = [key for batch in one for key in batch]
    for epoch in range(steps * size // frames):
        assert sorted(index for e, index in keys if e == epoch) == list(range(frames))
    assert list(loop.batch_keys(frames, size, seed, range(7, steps), slice(None))) == one[7:]


def in_two_processes(log: pathlib.Path, act) -> None:
    """Calls act() in two children, which torch.distributed will find; fails with what they printed."""
    port, children = str(free_port()), []
    for rank in "01":
        children.append(os.fork())
        if children[-1] == 0:
            with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
                status = runs.guarded(act)
            os._exit(status)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0], log.read_text()


def test_two_processes_train_every_phase_and_evaluate_as_one(whole, tmp_path):
    scores = ["--protocol", "any,nm,condition", "--batch-size", "3", "--limit", "8", "--json"]
    models = [f"{whole}/2/student.pt", f"{whole}/1/robust.pt"]
    stage1 = start(1, whole, tmp_path / "1", "--beta", "2", "--feedback", "2")
    stage2 = [*SMALL, *STAGE2, "--stage1", f"{tmp_path}/1", "--out", f"{tmp_path}/2"]
    in_two_processes(tmp_path / "1.txt", lambda: train_stage1.main(stage1))
    in_two_processes(tmp_path / "2.txt", lambda: train_stage2.main(stage2))
    for folder in "1", "2":
        lines, alone = log(tmp_path / folder), log(whole / folder)
        assert [(line["phase"], line["step"]) for line in lines] == [(line["phase"], line["step"]) for line in alone]

    both, alone = (evaluate.options([*models, *scores, f"{tmp_path}/{name}.json"]) for name in ("both", "alone"))
    in_two_processes(tmp_path / "3.txt", lambda: evaluate.main(both))
    assert runs.guarded(evaluate.main, alone) == 0
    both, alone = (json.loads((tmp_path / f"{name}.json").read_text())["results"] for name in ("both", "alone"))
    assert both == alone


def test_gradients_of_two_processes_are_those_of_the_whole_batch(tmp_path):
    """A mean over the whole batch is the mean of the means over the processes' shares of it."""

    def act():
        run = runs.Run(SimpleNamespace(device="cpu", compile=False), "test")
        torch.manual_seed(0)
        model, rows = torch.nn.Linear(3, 2), torch.arange(12.0).view(4, 3)
        whole = torch.autograd.grad(model(rows).square().mean(), model.weight)[0]
        parallel = run.parallel(model)
        parallel(rows[run.share]).square().mean().backward()
        torch.testing.assert_close(model.weight.grad, whole)
        assert run.total(torch.tensor(run.rank + 1)) == 3

    in_two_processes(tmp_path / "log.txt", act)


def test_a_batch_that_cannot_be_shared_out_is_refused(whole, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(runs.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(runs.dist, "destroy_process_group", lambda: None)
    assert train(1, start(1, whole, tmp_path)) == 2
    assert "--batch-size 4 counts all processes: make it a multiple of 3" in said(capfd)


@pytest.mark.parametrize("backbone", ["segformer_tiny", "cmnext_tiny"])
def test_only_weights_of_linear_layers_and_convolutions_decay(backbone):
    model = build_model(backbone, 3, ["rgb", "depth", "event"])
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, others = ([names[id(p)] for p in group["params"]] for group in loop.adamw(model, 1.0, 0.1).param_groups)
    assert len(decayed) + len(others) == len(names)
    # by their names: norms and biases never decay, stacked ones (CMNeXt's embed.weight, a row per modality) included
    assert not [name for name in decayed if "norm" in name or "bn." in name or not name.endswith("weight")]
    assert not [name for name in decayed if name.endswith("embed.weight")]
    assert not [name for name in others if name.endswith(("proj.weight", "fc1.weight", "q.weight", "fuse.weight"))]
