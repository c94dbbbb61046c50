"""Whole steps, evaluation, memory and loading, beside the same work in the published code's structure.

Sections of bench_kernels.py. M-SegFormer-B0, four sensors, 25 classes, random images, random weights. The published structure,
written out here from its description: one sample at a time through the encoder, the decoder's products above the
upsampling, prototypes in nested loops over stages, samples, modalities and classes, AdamW parameter by parameter, and
the whole network once per subset in evaluation. Both do the same work on the same weights; test_bench.py compares them.
"""

import copy
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

import fsm
import hpdm
import model
import segformer
from data import open_dataset
from engine import loop

SENSORS = ["rgb", "depth", "event", "lidar"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def plain_decoder(decoder, features, size):
    """SegFormer's head in its published order: project, upsample, concatenate, then the 4E -> E product at stride 4."""
    maps = []
    for x, linear in zip(features, decoder.linear, strict=True):
        x = linear(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[-2:])  # (B, E, h, w)
        maps.append(F.interpolate(x, size=features[0].shape[-2:], mode="bilinear", align_corners=False))
    mixed = F.relu(decoder.bn(decoder.fuse(torch.cat(maps[::-1], 1))))
    return segformer.upsample(decoder.classify(F.dropout2d(mixed, decoder.dropout, decoder.training)), size)


def plain_forward(net, images, present):
    """One sample at a time through the encoder, its features averaged, the batch decoded in the published order."""
    b, m = images.shape[:2]
    per_modality = []
    for i in range(b):
        seen = present[i].nonzero().flatten().tolist()
        x = images[i, seen].contiguous()
        stages = []
        for stage in net.stages:
            x = stage(x).permute(0, 3, 1, 2).contiguous()
            full = x.new_zeros(m, *x.shape[1:])
            full[seen] = x
            stages.append(full)
        per_modality.append(stages)
    per_modality = tuple(torch.stack([s[j] for s in per_modality]) for j in range(4))
    count = present.sum(1).to(images.device)[:, None, None, None]
    fused = tuple(f.sum(1) / count for f in per_modality)
    return model.Output(plain_decoder(net.decoder, fused, images.shape[-2:]), fused, per_modality)


def plain_hpdm(student, teacher, labels, present, match, k):
    """Prototypes and their distance in nested loops over stages, samples, modalities and classes."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        y = hpdm.labels_at(labels, s.shape[-2:])
        for b in range(s.shape[0]):
            seen = y[b][(y[b] >= 0) & (y[b] < k)].unique().tolist()
            for m in range(s.shape[1]):
                if present[b, m] and seen:
                    p = torch.stack([s[b, m][:, y[b] == c].mean(1) for c in seen], 1)  # (C, classes there)
                    q = torch.stack([t[b, match[b, m]][:, y[b] == c].mean(1) for c in seen], 1)
                    divergence = F.kl_div(p.log_softmax(1), q.log_softmax(1), reduction="none", log_target=True)
                    total = total + divergence.sum() / (s.shape[2] * present.sum())
    return total


def make_step(net, teacher, images, labels, present, match, k, plain, amp):
    """A function that does one stage-1 step of MSegFormer: teacher, student, CE, KL, prototype loss, AdamW."""
    forward = plain_forward if plain else lambda n, x, p: n(x, p)
    distance = plain_hpdm if plain else hpdm.hpdm_loss
    optimizer = torch.optim.AdamW(net.parameters(), lr=6e-5, foreach=False) if plain else loop.adamw(net, 6e-5, 0.01)
    everything = torch.ones_like(present)
    seen, answer = present.to(images.device), match.to(images.device)

    def step() -> None:
        with loop.autocast(images.device, amp):
            with torch.no_grad():
                target = forward(teacher, images, everything)
            out = forward(net, images, present)
        loss = hpdm.ohem_cross_entropy(out.logits, labels) + hpdm.distill_logits(out.logits, target.logits)
        loss = loss + distance(out.per_modality, target.per_modality, labels, seen, answer, k)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def stage2_step(net, teacher, robust, selection, images, labels, present):
    """A function that does one stage-2 step of the student, as train_stage2.py does."""
    optimizer = loop.adamw(net, 6e-5, 0.01)

    def step() -> None:
        with torch.no_grad():
            selected = selection([teacher(images, present), robust(images, present)], present.to(images.device))
            target = fsm.ensemble_logits(selected, teacher, robust, present)
        out = net(images, present)
        loss = hpdm.ohem_cross_entropy(out.logits, labels) + hpdm.distill_logits(out.logits, target)
        (loss + fsm.feature_distance(out.fused, selected.fused)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(work: Callable, repeats: int) -> float:
    """Median wall-clock time after one warm-up, the device drained on both sides."""
    times = []
    for _ in range(repeats + 1):
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def gflop_seconds() -> float:
    """1 GFLOP of float32 matrix product, the machine's own unit of time: 2 * 2048^3 operations, the best of nine."""
    a, b = torch.randn(2, 2048, 2048, device=DEVICE).unbind()
    return min(seconds(lambda: a @ b, 1) for _ in range(9)) / (2 * 2048**3 / 1e9)


def row(what: str, time_: float, unit: float, against: float | None = None) -> dict:
    """unit: of `gflop_seconds`, so that machines can be compared; against: the published structure's time."""
    return {"what": what, "seconds": time_, "GFLOPs' time": time_ / unit, "published structure, s": against,
            "times faster": against / time_ if against else None}  # fmt: skip


class Setting:
    """The models and a batch: 4 images of 256 x 256 (quick: 2 of 128 x 128), labels in regions of 16 x 16."""

    def __init__(self, quick: bool, batch: int | None = None, side: int | None = None):
        torch.manual_seed(0)
        if DEVICE.type == "cpu":
            loop.keep_freed_memory()  # as every run does; the published structure gains by it as well
        self.b, self.m, self.k = batch or (2 if quick else 4), len(SENSORS), 25
        side = side or (128 if quick else 256)
        self.images = torch.randn(self.b, self.m, 3, side, side, device=DEVICE)
        labels = torch.randint(0, self.k, (self.b, side // 16, side // 16), device=DEVICE)
        self.labels = labels.repeat_interleave(16, 1).repeat_interleave(16, 2)
        self.net, self.teacher = (model.build_model("segformer_b0", self.k, SENSORS).to(DEVICE) for _ in range(2))
        self.teacher.requires_grad_(False).eval()
        self.full = torch.ones(self.b, self.m, dtype=torch.bool)
        self.match = hpdm.draw_match(self.b, self.m, "random", torch.Generator().manual_seed(0))

    def step(self, present=None, plain: bool = False, amp: str = "off") -> Callable:
        self.net.train()
        present = self.full if present is None else present
        return make_step(self.net, self.teacher, self.images, self.labels, present, self.match, self.k, plain, amp)


def bench_step(quick: bool, repeats: int) -> list[dict]:
    """Training steps of both stages, and what a sensor costs."""
    s, unit = Setting(quick), gflop_seconds()
    plain = seconds(s.step(plain=True), repeats)
    ours = seconds(s.step(), repeats)
    rows = [row("1 GFLOP of float32 matrix product", unit, unit),
            row("stage-1 step, float32", ours, unit, plain),
            row("stage-1 step, bf16", seconds(s.step(amp="bf16"), repeats), unit, plain)]  # fmt: skip
    for count in range(1, s.m + 1):
        present = torch.zeros_like(s.full)
        present[:, :count] = True
        rows.append(row(f"stage-1 step, {count} of {s.m} sensors kept", seconds(s.step(present), repeats), unit))
    for count in range(1, s.m + 1):
        present = torch.zeros_like(s.full)
        present[:, :count] = True
        work = seconds(lambda p=present: sum(f.sum() for f in s.net.encode(s.images, p)).backward(), repeats)
        rows.append(row(f"student's encoder alone, both ways, {count} of {s.m} sensors", work, unit))
    robust, selection = copy.deepcopy(s.teacher), fsm.FSM(s.net.widths, s.k, s.m).to(DEVICE).requires_grad_(False)
    s.net.train()
    model.condition_on_sensors(student := copy.deepcopy(s.net))
    first = seconds(s.step(), repeats)  # once more, next to what is compared with it: the machine's speed may drift
    second = seconds(stage2_step(student, s.teacher, robust, selection, s.images, s.labels, s.full), repeats)
    rows.append(row(f"stage-2 step, {second / first:.2f} times the stage-1 step", second, unit))
    return rows


def bench_pixels(quick: bool, repeats: int) -> list[dict]:
    """How the cost of a stage-1 step grows with the image: one image, all sensors."""
    rows = []
    for side in (64, 128) if quick else (128, 256, 512, 1024):
        time_ = seconds(Setting(quick, 1, side).step(), repeats)
        rows.append({"what": f"stage-1 step, one image of {side} x {side}", "seconds": time_,
                     "microseconds a pixel": 1e6 * time_ / side**2})  # fmt: skip
    return rows


def bench_evaluate(quick: bool, repeats: int) -> list[dict]:
    """Any-modality: predictions for all 15 subsets of one batch."""
    s, unit = Setting(quick), gflop_seconds()
    subsets, net = loop.all_subsets(s.m), s.net.eval()
    masks = [model.present_of(subset, (s.b, s.m)) for subset in subsets]
    ways = {
        "all subsets from one encoder pass": lambda: [x.argmax(1) for x in model.subset_logits(net, s.images, subsets)],
        "a masked forward per subset": lambda: [net(s.images, mask).logits.argmax(1) for mask in masks],
        "15 complete forwards of the same model": lambda: [net(s.images).logits.argmax(1) for _ in subsets],
        "15 complete forwards, published structure":
            lambda: [plain_forward(net, s.images, s.full).logits.argmax(1) for _ in subsets],
    }  # fmt: skip
    with torch.inference_mode():
        shared, masked = (torch.stack(list(ways.values())[i]()) for i in range(2))
        times = {name: seconds(way, repeats) for name, way in ways.items()}
    published = times["15 complete forwards, published structure"]
    rows = [row(name, t, unit, published) for name, t in times.items()]
    share = (shared != masked).float().mean().item()
    return [*rows, {"what": f"pixels that differ between the first two: {share:.1e}"}]


def bench_memory(quick: bool, repeats: int) -> list[dict]:
    """Peak memory that one stage-1 step adds, each form in a process of its own."""
    code = "import sys; from benchmarks import bench_steps; bench_steps.one_step(sys.argv[1] == 'plain', sys.argv[2] == 'quick')"
    megabytes = {}
    for kind in ("plain", "ours"):
        command = [sys.executable, "-c", code, kind, "quick" if quick else "whole"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=pathlib.Path(__file__).parents[1])
        megabytes[kind] = float(done.stdout.split()[-1])
    ours, plain = megabytes["ours"], megabytes["plain"]
    row_ = {"what": "peak memory of a stage-1 step", "MB": ours, "published structure, MB": plain}
    return [{**row_, "ratio": ours / plain}]


def one_step(plain: bool, quick: bool) -> None:
    """For `bench_memory`: one step; prints by how many MB the peak memory of this process grew."""
    s = Setting(quick)
    before = own_peak()
    s.step(plain=plain)()
    print(own_peak() - before)


def own_peak() -> float:
    """Peak MB of this process alone (`ru_maxrss` would begin with what its parent held when it was started)."""
    if DEVICE.type == "cuda":
        return loop.peak_memory(DEVICE)
    status = pathlib.Path("/proc/self/status").read_text()
    return float(status.partition("VmHWM:")[2].split()[0]) / 1024


def bench_load(quick: bool, repeats: int) -> list[dict]:
    """Frames a second: DELIVER's files (painted scenes of 1042 x 1042, 5 PNG a frame), crop 1024, augmentation."""
    side, crop, count = (256, 224, 8) if quick else (1042, 1024, 24)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--export {folder}/x --layout deliver --count {2 * count} --size {side}"
        command = [sys.executable, "data.py", *flags.split()]
        subprocess.run(command, check=True, capture_output=True, cwd=pathlib.Path(__file__).parents[1])
        dataset = open_dataset("deliver", f"{folder}/x", "train", size=crop, augment=True)
        for workers in (0, 2):
            keys = loop.batch_keys(len(dataset), 4, 0, 0, 2 * count // 4, 0, 1)
            frames = iter(loop.loader(dataset, keys, workers, DEVICE))
            next(frames)  # the workers have started
            start = time.perf_counter()
            read = 4 * sum(1 for _ in frames)
            rate = read / (time.perf_counter() - start)
            rows.append({"what": f"DELIVER frames, {side} pixels, crop {crop}, {workers} workers", "frames/s": rate})
    return rows


SECTIONS = {"step": bench_step, "pixels": bench_pixels, "evaluate": bench_evaluate, "memory": bench_memory,
            "load": bench_load}  # fmt: skip
