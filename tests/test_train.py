"""What a run does by its options, on bad values, in several processes. All runs are tiny."""

import functools
import json
import os
import re
import socket
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kill_and_resume import spawn, train
from small_runs import TIMES, crash, during, log, refused, start

import evaluate
import train_stage1
import train_stage2
from benchmarks import variants
from datasets.export import export
from engine import checkpoint, loop, runs
from model import build_model

pytestmark = pytest.mark.usefixtures("handlers")


# ---- options ---------------------------------------------------------------------------------------------------------
ROWS = [("paper --lambda-kl 0 --alpha 0", "ce"), ("paper --match same --lambda-kl 2 --alpha 3", "ce kl hpdm")]
ROWS += [("anyseg", "ce mad umd cmd"), ("published --match same", "ce kl hpdm"), ("variation", "ce kl hpdm variation")]


@pytest.mark.parametrize("options, losses", ROWS)
def test_every_row_of_the_comparison_trains_by_its_losses(whole, tmp_path, options, losses):
    name, *more = [*options.split(), "--teacher", f"{whole}/1/teacher.pt", "--distill-epochs", "1", "--eval-every", "9"]
    losses_of = variants.VARIANTS.get(name, train_stage1.paper_losses)
    assert runs.guarded(train_stage1.main, start(1, whole, tmp_path, *more), losses_of) == 0
    means = log(tmp_path)[0]
    assert set(means) - TIMES - {"phase", "step", "epoch", "lr"} == set(losses.split())
    assert all(0 < means[name] < torch.inf for name in losses.split()), means


def test_absent_modalities_may_be_zero_images_in_every_phase_that_drops_them(whole, tmp_path, monkeypatch):
    given, original = {}, runs.Phase.learn

    def learn(self, losses):
        self.learner.register_forward_pre_hook(lambda _, args, n=self.name: given.setdefault(n, []).append(args))
        return original(self, losses)

    monkeypatch.setattr(runs.Phase, "learn", learn)
    assert train(1, start(1, whole, tmp_path / "1", "--absent", "zero")) == 0
    assert train(2, start(2, tmp_path, None)) == 0
    for phase in ("robust", "student"):
        training = [args for args in given[phase] if len(args) == 2]
        assert training and all(present.all() for _, present in training)
        empty = torch.cat([images.flatten(2).eq(0).all(2) for images, _ in training])  # (B, M)
        assert empty.any() and not empty.all(1).any()
    for name in ("teacher", "robust", "student"):
        assert checkpoint.load_model(tmp_path / f"1/{name}.pt", torch.device("cpu"))[0].absent == "zero"


def test_the_robust_model_may_start_where_the_teacher_started(whole, tmp_path):
    starts = []
    for phase, more in (("teacher", []), ("robust", ["--robust-from", "start", "--teacher", f"{whole}/1/teacher.pt"])):
        with during(phase, 0, crash):
            assert train(1, start(1, whole, tmp_path / phase, *more)) == 130
        starts.append(torch.load(tmp_path / phase / "last.pt", weights_only=True)["parts"]["model"])
    assert all(torch.equal(starts[0][name], value) for name, value in starts[1].items())


def test_deterministic_algorithms_run_on_the_cpu_too(whole, tmp_path, request):
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    assert train(1, start(1, whole, tmp_path, "--deterministic")) == 0


# ---- bad data and bad values -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_nan_in_a_file_stops_the_run_with_one_sentence_that_names_it(whole, tmp_path, capfd, workers):
    export(tmp_path / "data", "folder", 16, 64, 0)
    file = sorted((tmp_path / "data/lidar/train").rglob("*.npy"))[3]
    np.save(file, np.full_like(np.load(file), np.nan))
    more = ["--data", "folder", "--root", str(tmp_path / "data"), "--workers", workers]
    sentence = refused(capfd, 1, start(1, whole, tmp_path / "run", *more))
    assert sentence.startswith(f"{file} has NaN or infinite values"), sentence


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_and_is_named(whole, tmp_path, monkeypatch, capfd):
    original = runs.Phase.batches

    def poisoned(self, dataset):
        for images, labels in original(self, dataset):
            bad = torch.tensor([name == "train/000005" for name in self.names])
            yield images.masked_fill(bad[:, None, None, None, None], torch.nan), labels

    monkeypatch.setattr(runs.Phase, "batches", poisoned)
    sentence = refused(capfd, 1, start(1, whole, tmp_path, "--save-every", "1"))
    step = re.match(r"ce and the gradient of phase teacher, step (\d) is not finite; .* train/000005", sentence)[1]
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    assert last["step"] == int(step)  # saved after every step: the one before the bad one
    weights = {k: v for k, v in last["parts"]["model"].items() if "running" not in k}  # BatchNorm has seen the frame
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_a_gradient_that_is_not_finite_stops_too(whole, tmp_path, monkeypatch, capfd):
    original = torch.nn.utils.get_total_norm
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda gradients: original([gradients[0] * torch.nan]))
    sentence = refused(capfd, 1, start(1, whole, tmp_path))
    assert sentence.startswith("the gradient of phase teacher, step 0 is not finite; frames of the batch")


def test_frames_of_different_shapes_in_a_batch_are_named():
    frames = [(torch.zeros(1, 3, 64, width), torch.zeros(64, width), f"val/{width}") for width in (64, 96)]
    with pytest.raises(ValueError, match="val/64 has 64 x 64 pixels, val/96 has 64 x 96 pixels; use --batch-size 1"):
        loop.stack(frames)


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


def in_two_processes(log, act) -> None:
    """Calls act() in two children, which torch.distributed will find; fails with what they printed."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])

    def child(rank: str) -> int:
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        return runs.guarded(act)

    children = [spawn(log, functools.partial(child, rank)) for rank in "01"]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0], log.read_text()


def test_two_processes_train_every_phase_and_evaluate_as_one(whole, tmp_path):
    for stage, main in ((1, train_stage1.main), (2, train_stage2.main)):
        argv = start(stage, tmp_path, tmp_path / str(stage))
        in_two_processes(tmp_path / f"{stage}.txt", functools.partial(main, argv))
        both, alone = ([(line["phase"], line["step"]) for line in log(f / str(stage))] for f in (tmp_path, whole))
        assert both == alone
    words = f"{whole}/2/student.pt {whole}/1/robust.pt --protocol any,nm,condition --batch-size 3 --limit 8 --json"
    both, alone = (evaluate.options([*words.split(), f"{tmp_path}/{name}.json"]) for name in ("both", "alone"))
    in_two_processes(tmp_path / "3.txt", lambda: evaluate.main(both))
    evaluate.main(alone)
    both, alone = (json.loads((tmp_path / f"{name}.json").read_text())["results"] for name in ("both", "alone"))
    assert both == alone


def test_gradients_of_two_processes_are_those_of_the_whole_batch(tmp_path):
    """A mean over the whole batch is the mean of the means over the processes' shares of it."""

    def act():
        run = runs.Run(SimpleNamespace(device="cpu"), "test")
        torch.manual_seed(0)
        model, rows = torch.nn.Linear(3, 2), torch.arange(12.0).view(4, 3)
        whole = torch.autograd.grad(model(rows).square().mean(), model.weight)[0]
        parallel = run.parallel(model)
        parallel(rows[run.share]).square().mean().backward()
        torch.testing.assert_close(model.weight.grad, whole)
        assert run.reduce(torch.tensor(run.rank + 1)) == 3

    in_two_processes(tmp_path / "log.txt", act)


def test_a_batch_that_cannot_be_shared_out_is_refused(whole, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setattr(runs.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(runs.dist, "destroy_process_group", lambda: None)
    sentence = refused(capfd, 1, start(1, whole, tmp_path))
    assert "--batch-size 4 counts all processes: make it a multiple of 3" in sentence


@pytest.mark.parametrize("backbone", ["segformer_tiny", "cmnext_tiny"])
def test_only_weights_of_linear_layers_and_convolutions_decay(backbone):
    model = build_model(backbone, 3, ["rgb", "depth", "event"])
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, others = ([names[id(p)] for p in group["params"]] for group in loop.adamw(model, 1.0).param_groups)
    assert len(decayed) + len(others) == len(names)
    # by their names: norms and biases never decay, stacked ones (CMNeXt's embed.weight, a row per modality) included
    assert not [name for name in decayed if "norm" in name or "bn." in name or not name.endswith("weight")]
    assert not [name for name in decayed if name.endswith("embed.weight")]
    assert not [name for name in others if name.endswith(("proj.weight", "fc1.weight", "q.weight", "fuse.weight"))]
