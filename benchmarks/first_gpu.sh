#!/usr/bin/env bash
# What to run first on a GPU, in 13 minutes, without a network: benchmarks/first_gpu.sh [OUT] [--dry-run]
# Each step has a time limit and a file of its own in OUT; a step that fails stops no other. Steps 1 to 3 take 6 minutes.
# --dry-run: on a machine without a GPU, the same steps in Triton's interpreter and at small sizes.

set -uo pipefail
cd "$(dirname "$0")/.."
out=runs/first_gpu small=0
for argument in "$@"; do [ "$argument" = --dry-run ] && small=1 || out=$argument; done
mkdir -p "$out" && out=$(cd "$out" && pwd)
export OUT=$out SMALL=$small PYTHONPATH=$PWD
backbone=segformer_b0 size=1024 batches="2 8" quick="" jobs=12 amp=bf16 frames=40
if [ "$small" = 1 ]; then
    export TRITON_INTERPRET=1 OMP_NUM_THREADS=1
    backbone=segformer_tiny size=128 batches=2 quick=--quick jobs=0 amp=off frames=8
fi
python3 -c "import xdist" 2> "$out/xdist.txt" && parallel="-n $jobs" || parallel=""

step() { # name, seconds, command
    local name=$1 limit=$2 begun=$SECONDS
    shift 2
    [ "$small" = 0 ] || limit=$((3 * limit))
    timeout --kill-after=5 "$limit" "$@" > "$out/$name.txt" 2>&1
    local status=$?
    echo "$name: status $status, $((SECONDS - begun)) s" | tee -a "$out/summary.txt"
    tail -n 3 "$out/$name.txt"
}

train() { # stage, folder, then options: 20 steps without a validation in between
    local stage=$1 folder=$2
    shift 2
    python3 "train_stage$stage.py" --out "$folder" --eval-every 99 --workers 4 "$@"
}

real_sizes() {
    python3 - << 'PYTHON'
import os, torch, kernels
from kernels import reference
from benchmarks import bench

small = os.environ["SMALL"] == "1"
os.environ["RMMSS_KERNELS"] = "triton"
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
pixels = 32 if small else 1024
levels = [(c, max(8, pixels // 2 ** (i + 2))) for i, c in enumerate(bench.WIDTHS)]
cases = [("prototype_distance", c, side) for c, side in levels]
cases += [("feature_select", c, side) for c, side in [*levels, (bench.CLASSES, pixels)]]


def cast(x, dtype):
    if isinstance(x, list):
        return [cast(y, dtype) for y in x]
    return x.detach().to(dtype).requires_grad_(x.requires_grad) if torch.is_tensor(x) and x.is_floating_point() else x


def outcome(function, given):
    output = function(*given)
    learns = [x for x in given if torch.is_tensor(x) and x.requires_grad]
    torch.manual_seed(1)
    upstream = torch.randn(output.shape, device=output.device).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, learns, upstream)]


for name, c, side in cases:
    for layout in bench.LAYOUTS:
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            given = bench.inputs(name, c, side, layout)
            given = tuple(cast(x, dtype) if i < 2 - (name == "feature_select") else x for i, x in enumerate(given))
            first, second = (outcome(getattr(kernels, name), given) for _ in range(2))
            truth = outcome(getattr(reference, name), tuple(cast(x, torch.float64) for x in given))
            errors = [float((a.double() - t).abs().max() / t.abs().max()) for a, t in zip(first, truth)]
            same = all(torch.equal(a, b) for a, b in zip(first, second))
            print(name, c, side, layout, dtype, "errors", *(f"{e:.1e}" for e in errors), "equal bits", same, flush=True)
PYTHON
}

same_losses() {
    for path in triton reference; do
        export RMMSS_KERNELS=$path
        train 1 "$out/same_$path" --backbone $backbone --size $((size / 4)) --batch-size 4 --limit $frames --epochs 1 \
            --distill-epochs 2 --amp $amp || return 1
        train 2 "$out/same2_$path" --stage1 "$out/same_$path" --fsm-epochs 2 --student-epochs 1 || return 1
    done
    for run in same same2; do
        for path in triton reference; do echo "$run $path" && cat "$out/${run}_$path/log.jsonl"; done
    done
}

whole_steps() {
    for batch in $batches; do
        train 1 "$out/whole_$batch" --backbone $backbone --size "$size" --batch-size "$batch" --limit $((10 * batch)) \
            --epochs 1 --distill-epochs 2 --amp $amp || return 1
        cat "$out/whole_$batch/log.jsonl"
    done
    python3 - "$backbone" "$size" $amp << 'PYTHON'
import os, sys
import torch
import train_stage1

backbone, size, amp = sys.argv[1:]
given = f"--backbone {backbone} --size {size} --batch-size 2 --limit 8 --epochs 1 --distill-epochs 1 --amp {amp}"
with torch.profiler.profile() as profile:
    train_stage1.main([*given.split(), "--eval-every", "99", "--workers", "0", "--out", os.environ["OUT"] + "/profiled"])
order = "cuda_time_total" if torch.cuda.is_available() else "cpu_time_total"
print(profile.key_averages().table(sort_by=order, row_limit=30))
print(*(f"{e.key}: {e.count}" for e in profile.key_averages() if "Synchronize" in e.key), sep="\n")
PYTHON
}

sanitized() {
    command -v compute-sanitizer || { echo "compute-sanitizer is not here"; return 0; }
    for tool in memcheck racecheck; do
        compute-sanitizer --tool $tool python3 -m pytest -x -q tests/test_kernels.py -k "2-3-5-7-11-4 or score-2-5-7-11"
    done
}

scenes() {
    train 1 "$out/scenes" --backbone $backbone --limit 200 --epochs 2 --distill-epochs 2 --amp $amp &&
        train 2 "$out/scenes2" --stage1 "$out/scenes" --fsm-epochs 1 --student-epochs 1
}

export -f train real_sizes same_losses whole_steps sanitized scenes
export out backbone size batches amp frames
step 0_versions 10 bash -c 'nvidia-smi; python3 -c "from engine import loop; print(loop.versions())"; date'
step 1_tests 110 python3 -m pytest -x $parallel tests/test_kernels.py
step 2_real_sizes 60 bash -c real_sizes
step 3_bench 180 python3 -m benchmarks.bench --only kernels $quick
step 4_same_losses 80 bash -c same_losses
step 5_whole_steps 120 bash -c whole_steps
step 6_sanitizer 60 bash -c sanitized
step 7_scenes 120 bash -c scenes
