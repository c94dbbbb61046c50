"""Times on this machine: training steps, evaluation, and the fused kernels.

    python -m benchmarks.bench --quick --only kernels    # without --quick some minutes on a GPU, for torch.compile

steps    Both training scripts with DELIVER's recipe, M-SegFormer-B0, 4 images of 256 x 256 (--quick: 128 x 128).
kernels  Forward, then with backward, of what training launches, in float32 even under autocast: DELIVER at 1024 x 1024
         (--quick or no GPU: 512), batch 2, four modalities, B0's widths, channels-last as MSegFormer's features and
         channels-first as CMNeXt's; stage 2's logits. Beside each a copy of the same bytes and the plain definition;
         channels-last also that under torch.compile, and the published loop over the classes.
"""

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import kernels
from datasets.export import export
from engine import loop
from engine.checkpoint import load_model
from engine.options import Parser
from engine.runs import guarded
from engine.subsets import all_subsets, subset_logits
from kernels import reference

ROOT, BACKBONE = Path(__file__).parents[1], "segformer_b0"
BATCH, MODALITIES, CLASSES, WIDTHS = 2, 4, 25, (32, 64, 160, 256)  # of the kernels' inputs
LAYOUTS = ("channels-last", "channels-first")
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
COPY = "copy of the same bytes"
Row = tuple[float, str, str]  # value, unit, of what


def measure(calls: list[Callable], queued: bool = True) -> float:
    """Milliseconds of one call, going round the list; the median of three rounds, after one that is not counted.
    queued: a GPU first sleeps until the host has launched the round, so that no launch is waited for."""
    times = []
    for _ in range(4):
        begun = time.perf_counter()
        if CUDA:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(200_000_000 * queued)  # cycles, about 0.1 s
            start.record()
        for call in calls:
            call()
        elapsed = 1000 * (time.perf_counter() - begun)
        if CUDA:
            stop.record()
            torch.cuda.synchronize()
            elapsed = start.elapsed_time(stop)
        times.append(elapsed / len(calls))
    return statistics.median(times[1:])


def step_rows(quick: bool) -> Iterator[Row]:
    """Both training scripts, as the last report in the log says it; and all subsets as evaluate.py answers them."""
    side, epochs = 128 if quick else 256, 30 if CUDA else 6  # of two steps; a report at 50, and one at the end
    with tempfile.TemporaryDirectory() as folder:
        export(Path(folder, "data"), "deliver", 16, side, 0)
        for command in (
            f"train_stage1.py --data deliver --root data --backbone {BACKBONE} --size {side} --batch-size 4 --out run "
            f"--epochs 0.5 --distill-epochs {epochs} --eval-every 99",
            f"train_stage2.py --stage1 run --fsm-epochs 0.5 --student-epochs {epochs} --eval-every 99",
        ):
            script, *options = command.split()
            subprocess.run([sys.executable, ROOT / script, *options], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        log = [json.loads(line) for line in Path(folder, "run", "log.jsonl").read_text().splitlines()]
        student, _ = load_model(Path(folder, "run", "student.pt"), DEVICE)
    last = {line["phase"]: line for line in log if "lr" in line}
    for stage, report in (1, last["robust"]), (2, last["student"]):
        yield 4000 / report["images_per_second"], "ms", f"stage-{stage} step, {report['data_wait']:.0%} of it loading"
        yield report["peak_memory_mb"], "MB", f"stage {stage}, peak memory{'' if CUDA else ' of the process'}"
    images, subsets = torch.randn(4, 4, 3, side, side, device=DEVICE), all_subsets(4)
    with torch.inference_mode():
        calls = [lambda: [logits.argmax(1) for logits in subset_logits(student, images, subsets)]]
        yield measure(calls, queued=False), "ms", f"all {len(subsets)} subsets of a batch"


def inputs(operation: str, c: int, side: int, layout: str) -> tuple:
    """What a training step gives the operation. Stage 1: every modality present, matched at random; labels in patches
    of 8 x 8, one in ten ignored. Stage 2: the features of two frozen models; the scores' weights learn."""
    shape = (BATCH, side, side, c) if operation == "feature_select" else (BATCH, MODALITIES, side, side, c)
    maps = [torch.randn(shape, device=DEVICE).movedim(-1, -3) for _ in range(2)]  # (..., C, h, w), channels-last
    maps = [x.contiguous() for x in maps] if layout == "channels-first" else maps
    if operation == "feature_select":
        weight, bias = torch.randn(2, c, 3, 3, device=DEVICE) / (3 * c**0.5), torch.zeros(2, device=DEVICE)
        return maps, weight.requires_grad_(), bias.requires_grad_(), "score", 0.2
    student, teacher = maps
    present, match = torch.ones(shape[:2], device=DEVICE).bool(), torch.rand(shape[:2], device=DEVICE).argsort(1)
    labels = torch.randint(0, CLASSES, (BATCH, side // 8, side // 8), device=DEVICE)
    labels[torch.rand(labels.shape, device=DEVICE) < 0.1] = 255
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)  # (B, h, w)
    return student.requires_grad_(), teacher, labels, present, match, CLASSES


def run(function: Callable, given: tuple, gradient: Tensor | None = None) -> Tensor:
    """The function's output; with the `gradient` of that also backward to the inputs that learn."""
    output = function(*given)
    if gradient is not None:
        torch.autograd.grad(output, [x for x in given if isinstance(x, Tensor) and x.requires_grad], gradient)
    return output.detach()


def kernel_rows(quick: bool) -> Iterator[Row]:
    """Each operation in each layout at each level, then the sum of the levels, on each path to the same result."""
    quick = quick or not CUDA  # a CPU takes the definitions, and would need many minutes
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # the definitions are the truth
    pixels = 512 if quick else 1024
    stages = {f"stage {i}": (c, pixels // 2 ** (i + 1)) for i, c in enumerate(WIDTHS, 1)}
    operations = [  # name; levels; how many maps of a level's size a forward pass, and that with backward, must move
        ("prototype_distance", stages, (2 * MODALITIES, 3 * MODALITIES)),
        ("feature_select", {**stages, "logits": (CLASSES, pixels)}, (3, 6)),
    ]
    for (name, levels, maps), layout in itertools.product(operations, LAYOUTS[: 1 if quick else 2]):
        public, definition = getattr(kernels, name), getattr(reference, name)  # without a GPU they are the same
        paths = {"kernels": public, "definition": definition} if CUDA else {"definition": public}
        if layout == LAYOUTS[0]:
            paths |= {} if quick else {"compiled": torch.compile(definition, dynamic=False)}
            paths |= {"published loop": reference.prototype_distance_loop} if name == "prototype_distance" else {}
        moved, sums = defaultdict(int), defaultdict(float)  # bytes by direction, ms by direction and path
        for level, (c, side) in levels.items():
            torch.compiler.reset()
            sizes = [count * BATCH * c * side**2 * 4 for count in maps]  # bytes
            number = min(16, 4 + 2**28 // sizes[1]) if CUDA else 1  # inputs go round, lest the cache answers
            sets = [inputs(name, c, side, layout) for _ in range(number)]
            truth = run(definition, sets[0])
            gradient = torch.randn_like(truth)
            for f in paths.values():
                torch.testing.assert_close(run(f, sets[0]), truth, rtol=0, atol=1e-3 * float(truth.abs().max()))
            for size, direction, g in zip(sizes, ("forward", "with backward"), (None, gradient), strict=True):
                moved[direction] += size
                copies = torch.empty(number, 2, size // 2, dtype=torch.uint8, device=DEVICE)
                rounds = {COPY: [lambda c=c: c[0].copy_(c[1]) for c in copies]}
                rounds |= {path: [lambda f=f, s=s, g=g: run(f, s, g) for s in sets] for path, f in paths.items()}
                times = {}
                for path, calls in rounds.items():
                    times[path] = measure(calls)
                    sums[direction, path] += times[path]
                    yield row(f"{name}, {layout}, {level}, {direction}, {path}", size, times[path], times[COPY])
        for (direction, path), ms in sums.items():
            what = f"{name}, {layout}, all levels, {direction}, {path}"
            yield row(what, moved[direction], ms, sums[direction, COPY])


def row(what: str, size: int, ms: float, copy: float) -> Row:
    return ms, "ms", f"{what}: {size / ms / 1e6:.3g} GB/s, {copy / ms:.0%} of the copy"


SECTIONS = {"steps": step_rows, "kernels": kernel_rows}


def main(argv: list[str] | None = None) -> None:
    parser = Parser("bench.py", __doc__)
    parser.add_argument("--only", choices=SECTIONS, help="one of the two sections. None: both")
    parser.add_argument("--quick", action="store_true", help="small sizes, in about a minute")
    args = parser.parse_args(argv)
    if not CUDA:
        loop.keep_freed_memory()  # as every run does
    device = torch.cuda.get_device_name() if CUDA else "CPU"
    print(device, time.strftime("%Y-%m-%d"), *(f"{name} {value}" for name, value in loop.versions().items()), sep=", ")
    for name in [args.only] if args.only else SECTIONS:
        for value, unit, what in SECTIONS[name](args.quick):
            print(f"{value:10.3g} {unit:<8}  {what}", flush=True)


if __name__ == "__main__":
    sys.exit(guarded(main))
