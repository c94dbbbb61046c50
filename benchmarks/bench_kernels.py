"""Time of the fused kernels beside a copy of the same bytes, the plain definitions and the published loop.

    python -m benchmarks.bench_kernels                     # compiles for minutes; without a GPU the same as --quick
    python -m benchmarks.bench_kernels --quick --json quick.json                                 # under a minute

What training launches, in float32 even under autocast: DELIVER at 1024 x 1024 (--quick: 512), batch 2, four modalities,
B0's widths, features channels-last as MSegFormer gives them and channels-first as CMNeXt does; stage 2's logits (25
classes). On a GPU the queue is filled before the clock starts, so that no launch is waited for, and the inputs rotate,
so that the cache does not answer. of_copy: the time of a copy that moves the same bytes, over this time; 1 is as fast
as the memory allows.
"""

import argparse
import datetime
import itertools
import json
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

import kernels
from kernels import reference

BATCH, MODALITIES, CLASSES, SOURCES = 2, 4, 25, 2  # sources: teacher and robust model
PIXELS, WIDTHS, STRIDES = 1024, (32, 64, 160, 256), (4, 8, 16, 32)
CUDA = torch.cuda.is_available()
LAYOUTS = ("channels-last", "channels-first")
DEVICE = "cuda" if CUDA else "cpu"
ROTATED = 256 * 2**20 if CUDA else 0  # bytes of inputs to go through before one comes again: several L2 caches


def measure(calls: list[Callable], repeats: int = 5) -> float:
    """Milliseconds of one call, going round the list: the median of the repeats."""
    calls = calls * (max(1, 4 // len(calls)) if CUDA else 1)
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        if CUDA:
            torch.cuda.synchronize()
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(200_000_000)  # cycles, about 0.1 s, in which the host queues the calls
            start.record()
        begun = time.perf_counter()
        for call in calls:
            call()
        elapsed = time.perf_counter() - begun
        if CUDA:
            stop.record()
            torch.cuda.synchronize()
            elapsed = start.elapsed_time(stop) / 1000
        times.append(1000 * elapsed / len(calls))
    return statistics.median(times[1:])


def feature_maps(*shape: int, layout: str) -> Tensor:
    """Random (..., C, h, w), in memory (..., h, w, C) if the layout is channels-last."""
    x = torch.randn(*shape, device=DEVICE)
    return x if layout == "channels-first" else x.movedim(-3, -1).contiguous().movedim(-1, -3)


def distance_inputs(c: int, side: int, layout: str) -> tuple:
    """Stage 1: labels in patches of 8 x 8 positions, one in ten ignored; every modality present, matched at random."""
    coarse = torch.randint(0, CLASSES, (BATCH, -(-side // 8), -(-side // 8)), device=DEVICE)  # (B, h / 8, w / 8)
    coarse[torch.rand(coarse.shape, device=DEVICE) < 0.1] = 255
    labels = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :side, :side].contiguous()  # (B, h, w)
    student, teacher = (feature_maps(BATCH, MODALITIES, c, side, side, layout=layout) for _ in range(2))
    present = torch.ones(BATCH, MODALITIES, dtype=torch.bool, device=DEVICE)
    match = torch.rand(BATCH, MODALITIES, device=DEVICE).argsort(1)
    return student.requires_grad_(), teacher, labels, present, match, CLASSES


def select_inputs(c: int, side: int, layout: str) -> tuple:
    """Stage 2: the features come from frozen models, the scores' weights learn; the default rule."""
    features = [feature_maps(BATCH, c, side, side, layout=layout) for _ in range(SOURCES)]
    weight = torch.randn(SOURCES, c, 3, 3, device=DEVICE) / (3 * c**0.5)
    return features, weight.requires_grad_(), torch.zeros(SOURCES, device=DEVICE, requires_grad=True), "score", 0.2


def call(function: Callable, levels: list[tuple], gradients: list[Tensor] | None = None) -> list[Tensor]:
    """The function at each level; with `gradients` (of its outputs) also backward to the inputs that learn."""
    with torch.set_grad_enabled(gradients is not None):
        outputs = [function(*inputs) for inputs in levels]
    outputs = [out[0] if isinstance(out, tuple) else out for out in outputs]
    if gradients is not None:
        learn = [x for inputs in levels for x in inputs if isinstance(x, Tensor) and x.requires_grad]
        torch.autograd.grad(outputs, learn, gradients)
    return outputs


def kernel_rows(quick: bool):
    """Yields one row of the table after the other."""
    pixels = PIXELS // 2 if quick else PIXELS
    stages = [(c, pixels // stride) for c, stride in zip(WIDTHS, STRIDES, strict=True)]
    named = {f"stage {i + 1}": [size] for i, size in enumerate(stages)}
    logits = (CLASSES, pixels)
    selected = {**named, "logits": [logits], "all": [*stages, logits]}
    operations = [  # function; inputs; levels; maps of a level's size: those read and written, more of them backward
        ("prototype_distance", distance_inputs, {**named, "all": stages}, 2 * MODALITIES, MODALITIES),
        ("feature_select", select_inputs, selected, SOURCES + 1, SOURCES + 1),
    ]
    for (name, make, levels, forth, back), layout in itertools.product(operations, LAYOUTS[: 1 if quick else 2]):
        torch.compiler.reset()
        public, definition = getattr(kernels, name), getattr(reference, name)  # without a GPU they are the same
        paths = {"kernels": public, "definition": definition} if CUDA else {"definition": public}
        paths |= {} if quick else {"compiled": torch.compile(definition, dynamic=False)}
        for level, sizes in levels.items():
            size = sum(BATCH * c * side**2 * 4 for c, side in sizes)  # bytes of a map
            number = min(16, 1 + ROTATED // (forth * size))
            sets = [[make(c, side, layout) for c, side in sizes] for _ in range(number)]
            truth = call(definition, sets[0])
            gradients = [torch.randn_like(out) for out in truth]
            once = (name, level, layout) == ("prototype_distance", "all", LAYOUTS[0])
            loop = {"published loop": reference.prototype_distance_loop} if once else {}
            for (path, function), backward in itertools.product((paths | loop).items(), (False, True)):
                for found, wanted in zip(call(function, sets[0]), truth, strict=True):
                    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3 * wanted.abs().max().item())
                calls = [lambda f=function, s=s, g=gradients if backward else None: call(f, s, g) for s in sets]
                ms = measure(calls[:1], 1) if path in loop else measure(calls)
                half = size * (forth + backward * back) // 2  # a copy reads it and writes it
                copies = torch.empty(number, 2, half, dtype=torch.uint8, device=DEVICE)
                copy = measure([lambda c=c: c[0].copy_(c[1]) for c in copies])
                yield {"operation": name, "layout": layout, "level": level, "path": path, "ms": ms,
                       "pass": "forward + backward" if backward else "forward", "of_copy": copy / ms}  # fmt: skip


def main(sections: dict[str, Callable], doc: str) -> None:
    """Runs the sections, name -> function(quick) that yields rows; shows them, and saves them with their conditions."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, in under a minute")
    parser.add_argument("--json", type=pathlib.Path, help="also write conditions and rows to this file")
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if CUDA else f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    report = {"device": device, "torch": torch.__version__, "date": str(datetime.date.today()), "options": sys.argv[1:]}
    print(*(f"{name} {value}" for name, value in report.items()), sep=", ")
    for name, section in sections.items():
        report[name] = []
        for row in section(args.quick):
            cells = [f"{value:.3g}" if isinstance(value, float) else str(value or "-") for value in row.values()]
            for line in [cells] if report[name] else [list(row), cells]:
                print("  ".join(cell.ljust(20) for cell in line).rstrip(), flush=True)
            report[name].append(row)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64  # the compiled definitions meet more sizes than the usual eight
    main({"kernels": lambda quick: kernel_rows(quick or not CUDA)}, __doc__)
