"""Measures the fused kernels against plain PyTorch, and prints one table with the conditions it was taken under.

    python -m benchmarks.bench_kernels                              # all of it; on a machine without a GPU the CPU paths
    python -m benchmarks.bench_kernels --quick                      # B0, 512 pixels, batch 2, float32
    python -m benchmarks.bench_kernels --what kernels --json benchmarks/h200.json

Writes nothing but the file named by --json. Columns of the section kernels: milliseconds (median, 20th and 80th
percentile), memory at the peak beyond the inputs (GPU), the bytes that must move over the time, and that as a part of
what a plain copy reached in the same run; each path's result is checked against the transparent loop or the definitions
before it is timed. What the other sections time (bench_steps.py) is compared by tests/test_bench.py.
"""

import argparse
import datetime
import itertools
import json
import os
import pathlib
import platform
import sys
import time

import torch
import torch.nn.functional as F

import kernels
from benchmarks import bench_steps
from kernels import reference

WIDTHS = {"B0": (32, 64, 160, 256), "B2": (64, 128, 320, 512)}  # channels of the stages, strides 4, 8, 16, 32
MODALITIES, CLASSES, SOURCES = 4, 25, 2  # DELIVER's sensors and classes; teacher and robust model
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ROTATED = 256 * 2**20 if CUDA else 0  # bytes of inputs to go through before one comes again: several times the L2 cache


# ------------------------------------------------------------------------------------------------- measuring


def measure(calls: list, repeats: int) -> dict:
    """Milliseconds of one call, going round the list (each with inputs of its own), and peak memory in MiB."""
    for call in calls[: 3 if CUDA else 1]:
        call()
    memory = None
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    times = []
    for i in range(repeats):
        call = calls[i % len(calls)]
        if CUDA:
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            stop.record()
            times.append((start, stop))
        else:
            start = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - start))
    if CUDA:
        torch.cuda.synchronize()
        times = [start.elapsed_time(stop) for start, stop in times]
        memory = (torch.cuda.max_memory_allocated() - before) / 2**20
    low, median, high = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return {"ms": median, "ms_20": low, "ms_80": high, "memory_mib": memory}


def copy_bandwidth() -> float:
    """GB/s read plus written by a copy of 512 MiB (CPU: 128 MiB)."""
    source = torch.empty((512 if CUDA else 128) * 2**18, device=DEVICE).normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / measure([lambda: target.copy_(source)], 20)["ms"] / 1e6


def with_path(path: str, function):
    """The function with RMMSS_KERNELS set to path while it runs."""

    def run(*args):
        before = os.environ.get("RMMSS_KERNELS")
        os.environ["RMMSS_KERNELS"] = path
        try:
            return function(*args)
        finally:
            os.environ.pop("RMMSS_KERNELS") if before is None else os.environ.update(RMMSS_KERNELS=before)

    return run


# --------------------------------------------------------------------------------------------------- kernels


def loop_distance(student, teacher, labels, present, match, num_classes):
    """The same distance as the published code computes it: one sample, one modality, one class at a time."""
    total = torch.zeros((), device=student.device)
    for b, m in itertools.product(range(student.shape[0]), range(student.shape[1])):
        if not present[b, m]:
            continue
        student_means, teacher_means = [], []
        for k in range(num_classes):
            mask = labels[b] == k
            count = mask.sum()
            if count > 0:
                student_means.append((student[b, m].float() * mask).sum((1, 2)) / count)
                teacher_means.append((teacher[b, match[b, m]].float() * mask).sum((1, 2)) / count)
        if student_means:
            log_s = torch.stack(student_means).log_softmax(0)  # (classes seen, C)
            log_t = torch.stack(teacher_means).log_softmax(0)
            total = total + F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(0).mean()
    return total / present.sum()


def scene_labels(batch: int, side: int) -> torch.Tensor:
    """Labels in patches of 8 x 8 pixels of the stage, one in ten ignored: (B, h, w)."""
    coarse = torch.randint(0, CLASSES, (batch, -(-side // 8), -(-side // 8)))
    coarse[torch.rand(coarse.shape) < 0.1] = 255
    return coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :side, :side].contiguous().to(DEVICE)


def distance_inputs(batch, channels, side, dtype):
    student, teacher = torch.randn(2, batch, MODALITIES, channels, side, side, device=DEVICE).to(dtype)
    present = torch.ones(batch, MODALITIES, dtype=torch.bool, device=DEVICE)
    match = torch.rand(batch, MODALITIES, device=DEVICE).argsort(1)
    return student.clone().requires_grad_(), teacher.clone(), scene_labels(batch, side), present, match, CLASSES


def select_inputs(batch, channels, side, dtype):
    """As in stage 2: the features come from frozen models, the scores learn."""
    features = [torch.randn(batch, channels, side, side, device=DEVICE).to(dtype) for _ in range(SOURCES)]
    weight = torch.randn(SOURCES, channels, 3, 3, device=DEVICE) / (3 * channels**0.5)
    return features, weight.requires_grad_(), torch.zeros(SOURCES, device=DEVICE, requires_grad=True)


def select(features, weight, bias):
    return kernels.feature_score_select(features, weight, bias, 0.2)[0]


def select_definition(features, weight, bias):
    return reference.feature_score_select(features, weight, bias, 0.2)[0]


def all_stages(operation, backward: bool, inputs: list, wanted: list):
    """One call of the operation per stage, summed, and the gradients of what is wanted."""
    outputs = [operation(*stage) for stage in inputs]
    if backward:
        torch.autograd.grad(outputs, wanted, [torch.ones_like(out) for out in outputs])


def bench_kernels(quick: bool, repeats: int) -> list[dict]:
    quick = quick or not CUDA  # a CPU would take hours for the others
    bandwidth = copy_bandwidth()
    operations = {  # name: inputs, traffic in tensors of the features' size (forward, backward), call, definition
        "distance": (distance_inputs, (2, 1), kernels.prototype_distance, reference.prototype_distance),
        "select": (select_inputs, (SOURCES + 1, SOURCES + 1), select, select_definition),
    }
    rows = []
    settings = itertools.product(
        operations, ["B0"] if quick else WIDTHS, [512] if quick else [512, 1024], [2] if quick else [2, 8],
        [torch.float32] if quick or not CUDA else [torch.float32, torch.bfloat16], ["1", "1-4"], [False, True],
    )  # fmt: skip
    for name, backbone, pixels, batch, dtype, stages, backward in settings:
        make, traffic, operation, definition = operations[name]
        shapes = [(c, pixels // s) for c, s in zip(WIDTHS[backbone], (4, 8, 16, 32), strict=True)]
        shapes = shapes[:1] if stages == "1" else shapes
        paths = {"pytorch": with_path("reference", operation)}
        if CUDA:
            torch.compiler.reset()
            paths = {
                "triton": with_path("triton", operation),
                **paths,
                "compile": torch.compile(definition),
            }
        if name == "distance":
            paths["loop"] = loop_distance

        elements = sum(batch * (MODALITIES if name == "distance" else 1) * c * side**2 for c, side in shapes)
        moved = elements * dtype.itemsize * sum(traffic[: 1 + backward])
        rounds = max(1, -(-ROTATED // moved))
        sets = [[make(batch, c, side, dtype) for c, side in shapes] for _ in range(rounds)]
        truth = paths.get("loop", paths["pytorch"])(*sets[0][-1])
        tolerance = 1e-3 if dtype == torch.float32 else 2e-2
        for path, function in paths.items():
            if not torch.allclose(function(*sets[0][-1]).float(), truth.float(), rtol=tolerance, atol=tolerance):
                raise SystemExit(f"{name} by {path} differs from the plain definition: run the tests before timing it.")
            calls = []
            for inputs in sets:
                wanted = [x for stage in inputs for x in stage if torch.is_tensor(x) and x.requires_grad]
                calls.append(lambda f=function, i=inputs, w=wanted, back=backward: all_stages(f, back, i, w))
            slow = path == "loop"
            row = {
                "operation": name, "widths": backbone, "pixels": pixels, "batch": batch,
                "dtype": str(dtype).removeprefix("torch."), "stages": stages,
                "pass": "forward + backward" if backward else "forward", "path": path,
                **measure(calls[:1] if slow else calls, min(repeats, 3) if slow else repeats),
            }  # fmt: skip
            row["gb_per_s"] = moved / row["ms"] / 1e6
            row["of_copy"] = row["gb_per_s"] / bandwidth
            rows.append(row)
            show(row)
        del sets, calls
    print(f"copy: {bandwidth:.0f} GB/s")
    return rows


# ------------------------------------------------------------------------------------------------------ table


def show(row: dict) -> None:
    """One line of the table; the first call also prints the head."""
    cells = {k: f"{v:.3g}" if isinstance(v, float) else "-" if v is None else str(v) for k, v in row.items()}
    widths = [max(len(k), {"pass": 18, "what": 52}.get(k, 9)) for k in cells]
    if tuple(cells) != show.head:
        show.head = tuple(cells)
        print("  ".join(k.ljust(w) for k, w in zip(cells, widths, strict=True)))
    print("  ".join(v.ljust(w) for v, w in zip(cells.values(), widths, strict=True)), flush=True)


show.head = ()


def conditions() -> dict:
    """What a number depends on: device, versions, threads, date."""
    try:
        import triton

        triton_version = triton.__version__
    except ModuleNotFoundError:
        triton_version = None
    return {
        "device": torch.cuda.get_device_name() if CUDA else f"CPU {platform.machine()}",
        "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__,
        "triton": triton_version, "cuda": torch.version.cuda,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }  # fmt: skip


SECTIONS = {"kernels": bench_kernels, **bench_steps.SECTIONS}  # name: function (quick, repeats) -> rows of the table


def main(what: list[str], quick: bool, repeats: int, json_path: pathlib.Path | None) -> None:
    torch.manual_seed(0)
    report = {"conditions": conditions(), "command": "python -m benchmarks.bench_kernels " + " ".join(sys.argv[1:])}
    print("  ".join(f"{k} {v}" for k, v in report["conditions"].items()))
    for section in what:
        print(f"\n{section}")
        report[section] = SECTIONS[section](quick, repeats)
        for row in report[section] if section != "kernels" else ():  # which shows its rows as they come
            show(row)
        show.head = ()
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="sections to run")
    parser.add_argument("--quick", action="store_true", help="one small setting instead of all")
    parser.add_argument("--repeats", type=int, default=100 if CUDA else 5, help="timed calls per row (>= 1)")
    parser.add_argument("--json", type=pathlib.Path, help="write conditions and rows to this file")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}: give at least 1.")
    main(options.what, options.quick, options.repeats, options.json)
