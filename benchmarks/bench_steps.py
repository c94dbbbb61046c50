"""Memory and time of whole steps, of evaluation and of loading, beside the same work in the published code's structure.

    python -m benchmarks.bench_steps [--quick] [--json FILE]

MSegFormer-B0, four modalities, 25 classes, 4 images of 256 x 256 (--quick: 2 of 128 x 128), random weights and images.
The published structure, written out from its description: one sample at a time through the encoder, prototypes in loops
over samples, modalities and classes, in evaluation the whole network once for each subset. The authors' code itself is
not run; tests/test_bench.py checks that both compute the same. Medians of three, after one that is not counted.
"""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks import bench_kernels
from data import open_dataset
from datasets.export import export
from engine import loop, subsets
from fsm import FSM, ensemble_logits, feature_distance
from hpdm import distill_logits, draw_match, hpdm_loss, labels_at, ohem_cross_entropy
from kernels.reference import prototype_distance_loop
from model import Output, build_model

MODALITIES, CLASSES = ["rgb", "depth", "event", "lidar"], 25
DEVICE = torch.device(bench_kernels.DEVICE)


def published_forward(net: nn.Module, images: Tensor, present: Tensor) -> Output:
    """MSegFormer one sample at a time, its features averaged and the batch decoded."""
    parts = [net.encode(images[i : i + 1], present[i : i + 1]) for i in range(len(images))]
    per_modality = tuple(torch.cat(stage) for stage in zip(*parts, strict=True))  # 4 x (B, M, C_i, h_i, w_i)
    fused = tuple(f.sum(1) / present.sum(1).to(f)[:, None, None, None] for f in per_modality)
    return Output(net.decoder(fused, images.shape[-2:], present), fused, per_modality)


def published_hpdm(student, teacher, labels: Tensor, present: Tensor, match: Tensor, classes: int) -> Tensor:
    return sum(prototype_distance_loop(s, t, labels_at(labels, s.shape[-2:]), present, match, classes)
               for s, t in zip(student, teacher, strict=True))  # fmt: skip


def work(quick: bool) -> SimpleNamespace:
    """A batch with every modality and labels in regions of 16 x 16, and its models."""
    torch.manual_seed(0)
    b, side, m = (2, 128, len(MODALITIES)) if quick else (4, 256, len(MODALITIES))
    images = torch.randn(b, m, 3, side, side, device=DEVICE)
    labels = torch.randint(0, CLASSES, (b, side // 16, side // 16), device=DEVICE)
    labels = labels.repeat_interleave(16, 1).repeat_interleave(16, 2)  # (B, H, W)
    student, teacher = (build_model("segformer_b0", CLASSES, MODALITIES).to(DEVICE) for _ in range(2))
    present, match = torch.ones(b, m).bool(), draw_match(b, m, "random", torch.Generator().manual_seed(0))  # (B, M)
    return SimpleNamespace(student=student.train(), teacher=teacher.requires_grad_(False).eval(), images=images,
                           labels=labels, present=present, match=match)  # fmt: skip


def stage1_loss(w: SimpleNamespace, forward: Callable = nn.Module.__call__, hpdm: Callable = hpdm_loss) -> Tensor:
    """Of the robust model: CE, KL and prototypes towards the teacher."""
    with torch.no_grad():
        target = forward(w.teacher, w.images, w.present)
    out = forward(w.student, w.images, w.present)
    loss = ohem_cross_entropy(out.logits, w.labels) + distill_logits(out.logits, target.logits)
    pairs = w.present.to(DEVICE), w.match.to(DEVICE)
    return loss + hpdm(out.per_modality, target.per_modality, w.labels, *pairs, CLASSES)


def stage2_loss(w: SimpleNamespace, robust: nn.Module, fsm: FSM) -> Tensor:
    """Of the final student: CE, KL to the ensemble's answer, distance to the selected features."""
    with torch.no_grad():
        selected = fsm([net(w.images, w.present) for net in (w.teacher, robust)], w.present.to(DEVICE))
        target = ensemble_logits(selected, w.teacher, robust, w.present)
    out = w.student(w.images, w.present)
    loss = ohem_cross_entropy(out.logits, w.labels) + distill_logits(out.logits, target)
    return loss + feature_distance(out.fused, selected.fused)


def train(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def seconds(function: Callable) -> float:
    times = []
    for _ in range(4):
        start = time.perf_counter()
        function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def row(what: str, here: float, published: float | None = None) -> dict:
    return {"here": here, "published": published, "ratio": published and published / here, "what": what}


def model_rows(quick: bool):
    w, every = work(quick), subsets.all_subsets(len(MODALITIES))
    before = loop.peak_memory(DEVICE)  # it never falls: so this comes first
    stage1_loss(w).backward()
    yield row("peak memory of a stage-1 step: MB", loop.peak_memory(DEVICE) - before)

    optimizer = loop.adamw(w.student, 6e-5, 0.01)
    published = seconds(lambda: train(stage1_loss(w, published_forward, published_hpdm), optimizer))
    yield row("stage-1 step: seconds", seconds(lambda: train(stage1_loss(w), optimizer)), published)

    robust, fsm = copy.deepcopy(w.teacher), FSM(w.teacher.widths, CLASSES, len(MODALITIES)).to(DEVICE)
    yield row("stage-2 step: seconds", seconds(lambda: train(stage2_loss(w, robust, fsm), optimizer)))

    net = w.student.eval()
    with torch.inference_mode():
        published = seconds(lambda: [published_forward(net, w.images, w.present).logits.argmax(1) for _ in every])
        shared = seconds(lambda: [logits.argmax(1) for logits in subsets.subset_logits(net, w.images, every)])
    yield row("15 subsets of a batch: seconds", shared, published)


def loading_rows(quick: bool):
    """DELIVER's files (synthetic scenes), 5 PNG a frame, with augmentation; no published structure beside it."""
    side, crop, count = (256, 224, 16) if quick else (1042, 1024, 48)
    with tempfile.TemporaryDirectory() as folder:
        export(Path(folder), "deliver", 2 * count, side, 0)
        dataset = open_dataset("deliver", folder, "train", size=crop, augment=True)
        for workers in (0, 2):
            frames = iter(loop.loader(dataset, torch.arange(count).view(-1, 4).tolist(), workers, DEVICE))
            next(frames)  # the workers have started
            start = time.perf_counter()
            read = sum(len(images) for images, *_ in frames)
            yield row(f"{side} pixels, crop {crop}, {workers} workers: frames/s", read / (time.perf_counter() - start))


if __name__ == "__main__":
    if DEVICE.type == "cpu":
        loop.keep_freed_memory()  # as every run does; the published structure gains by it as well
    bench_kernels.main({"models": model_rows, "loading": loading_rows}, __doc__)
