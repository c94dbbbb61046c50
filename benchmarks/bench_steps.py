"""Whole steps and evaluation, beside the same work in the structure of the published code.

    python -m benchmarks.bench_steps [--quick] [--json FILE]

MSegFormer-B0, four modalities, 25 classes, 4 images of 256 x 256 (--quick: 2 of 128 x 128), random weights and images.
The published structure, written out from its description: one sample at a time through the encoder, the decoder's
products above the upsampling, prototypes in loops over samples, modalities and classes, AdamW parameter by parameter,
in evaluation the whole network once for each subset. The authors' code itself is not run; tests/test_bench.py checks
that both compute the same. Medians of three, after one that is not counted.
"""

import copy
import multiprocessing
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import bench_kernels
from data import open_dataset
from engine import loop, subsets
from fsm import FSM, ensemble_logits, feature_distance
from hpdm import distill_logits, draw_match, hpdm_loss, labels_at, ohem_cross_entropy
from kernels.reference import prototype_distance_loop
from model import Output, build_model, condition_on_modalities
from segformer import upsample

MODALITIES, CLASSES = ["rgb", "depth", "event", "lidar"], 25
DEVICE = torch.device(bench_kernels.DEVICE)


def published_forward(net: nn.Module, images: Tensor, present: Tensor) -> Output:
    """MSegFormer one sample at a time, its features averaged, the batch decoded in the paper's order."""
    parts = [net.encode(images[i : i + 1], present[i : i + 1]) for i in range(len(images))]
    per_modality = tuple(torch.cat(stage) for stage in zip(*parts, strict=True))  # 4 x (B, M, C_i, h_i, w_i)
    fused = tuple(f.sum(1) / present.sum(1).to(f)[:, None, None, None] for f in per_modality)
    decoder, maps = net.decoder, []
    for x, linear in zip(fused, decoder.linear, strict=True):
        x = linear(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[-2:])  # (B, E, h_i, w_i)
        maps.append(upsample(x, fused[0].shape[-2:]))
    hidden = F.relu(decoder.bn(decoder.fuse(torch.cat(maps[::-1], 1))))  # (B, 4E, h, w) -> (B, E, h, w)
    logits = decoder.classify(F.dropout2d(hidden, decoder.dropout, decoder.training))
    return Output(upsample(logits, images.shape[-2:]), fused, per_modality)


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


def stage1_loss(w: SimpleNamespace, published: bool = False, amp: str = "off") -> Tensor:
    """Of the robust model: CE, KL and prototypes towards the teacher."""
    forward = published_forward if published else lambda net, images, present: net(images, present)
    with loop.autocast(DEVICE, amp):
        with torch.no_grad():
            target = forward(w.teacher, w.images, w.present)
        out = forward(w.student, w.images, w.present)
    pairs = w.labels, w.present.to(DEVICE), w.match.to(DEVICE), CLASSES
    distance = (published_hpdm if published else hpdm_loss)(out.per_modality, target.per_modality, *pairs)
    return ohem_cross_entropy(out.logits, w.labels) + distill_logits(out.logits, target.logits) + distance


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
    return {"what": what, "here": here, "published": published, "ratio": published and published / here}


def step_rows(quick: bool):
    w = work(quick)
    plain, fused = torch.optim.AdamW(w.student.parameters(), 6e-5, foreach=False), loop.adamw(w.student, 6e-5, 0.01)
    published = seconds(lambda: train(stage1_loss(w, published=True), plain))
    yield row("stage-1 step, float32: seconds", seconds(lambda: train(stage1_loss(w), fused)), published)
    yield row("stage-1 step, bf16: seconds", seconds(lambda: train(stage1_loss(w, amp="bf16"), fused)), published)
    robust, fsm = copy.deepcopy(w.teacher), FSM(w.teacher.widths, CLASSES, len(MODALITIES)).to(DEVICE)
    condition_on_modalities(w.student)
    fused = loop.adamw(w.student, 6e-5, 0.01)
    fsm.requires_grad_(False)
    yield row("stage-2 step, float32: seconds", seconds(lambda: train(stage2_loss(w, robust, fsm), fused)))


@torch.inference_mode()
def evaluation_rows(quick: bool):
    w, every = work(quick), subsets.all_subsets(len(MODALITIES))
    net, masks = w.student.eval(), [subsets.present_of(subset, w.present.shape) for subset in every]
    published = seconds(lambda: [published_forward(net, w.images, w.present).logits.argmax(1) for _ in every])
    shared = seconds(lambda: [logits.argmax(1) for logits in subsets.subset_logits(net, w.images, every)])
    masked = seconds(lambda: [net(w.images, mask).logits.argmax(1) for mask in masks])
    yield row("15 subsets of a batch, one encoder pass: seconds", shared, published)
    yield row("15 subsets of a batch, a masked forward each: seconds", masked, published)


def peak(quick: bool, published: bool) -> float:
    """MB by which the losses and gradients of a stage-1 step raise the peak memory of this process."""
    w = work(quick)
    before = loop.peak_memory(DEVICE)
    stage1_loss(w, published).backward()
    return loop.peak_memory(DEVICE) - before


def memory_rows(quick: bool):
    """Each form in a process of its own, whose peak begins with what this one holds: so before the other sections."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        yield row("peak memory of a stage-1 step: MB", *(pool.apply(peak, (quick, form)) for form in (False, True)))


def loading_rows(quick: bool):
    """DELIVER's files (synthetic scenes), 5 PNG a frame, with augmentation; no published structure beside it."""
    side, crop, count = (256, 224, 16) if quick else (1042, 1024, 48)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "data.py", "--export", f"{folder}/x", "--layout", "deliver", "--size", str(side)]
        root = pathlib.Path(__file__).parents[1]
        subprocess.run([*command, "--count", str(2 * count)], check=True, capture_output=True, cwd=root)
        dataset = open_dataset("deliver", f"{folder}/x", "train", size=crop, augment=True)
        for workers in (0, 2):
            batches = torch.arange(count + 4).remainder(len(dataset)).view(-1, 4).tolist()
            frames = iter(loop.loader(dataset, batches, workers, DEVICE))
            next(frames)  # the workers have started
            start = time.perf_counter()
            read = sum(len(images) for images, *_ in frames)
            yield row(f"{side} pixels, crop {crop}, {workers} workers: frames/s", read / (time.perf_counter() - start))


if __name__ == "__main__":
    if DEVICE.type == "cpu":
        loop.keep_freed_memory()  # as every run does; the published structure gains by it as well
    bench_kernels.main({"memory": memory_rows, "steps": step_rows, "evaluation": evaluation_rows,
                        "loading": loading_rows}, __doc__)  # fmt: skip
