"""What training launches compiles to fast machine code, for compute capability 8.0 and 9.0 and without a GPU.
`tests/compile_all.sh` compiles it for 10.0 and 12.0 too, with the Triton versions that people have.

The interpreter of the other kernel tests accepts code that the compiler refuses, and knows nothing of speed. Here the
public calls run on tensors of real shapes and layouts, and Triton compiles each launch; only the launch is left out.
A process of its own does that (this file as a script): Triton is either interpreter or compiler from its import on.

Sizes: DELIVER at 1024 x 1024, batch 2, four modalities, B0. An access of 16 bytes to features needs rows that are
multiples of 16 bytes: all but 25 classes channels-last.
"""

import functools
import importlib.util
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes of shared memory a program may take
STAGES = ((32, 256), (64, 128), (160, 64), (256, 32))  # channels, side
LOGITS = (25, 1024)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def compiled():
    """One record per compiled launch."""
    environment, records = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, []
    for capability in SHARED_LIMIT:
        start = [sys.executable, __file__, str(capability)]
        done = subprocess.run(start, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"compiling for {capability} failed:\n{done.stderr[-3000:]}"
        records += map(json.loads, done.stdout.splitlines())
    return records


def test_every_kernel_is_compiled_for_both_layouts_and_capabilities(compiled):
    source = "".join(file.read_text() for file in (ROOT / "kernels").glob("*.py"))
    names = set(re.findall(r"def (\w+_kernel)\(", source)) - {"distance_kernel"}  # which never sees the features
    expected = set(itertools.product(names, ("last", "first"), SHARED_LIMIT))
    assert {(r["kernel"], r["layout"], r["capability"]) for r in compiled} >= expected


def test_no_kernel_spills_registers_or_exceeds_the_shared_memory(compiled):
    assert [r for r in compiled if r["local"] or r["stack"] or r["shared"] > SHARED_LIMIT[r["capability"]]] == []


OTHERS = {"spread_kernel": (2, 0), "taps_kernel": (4, 0), "select_kernel": (20, 2), "score_backward_kernel": (8, 2)}
OTHERS |= {"weight_backward_kernel": (16, 16)}  # loads and stores of maps without channels, weights and labels


@pytest.mark.parametrize("i, kind", [(0, "loads"), (1, "stores")])
def test_features_are_read_and_written_16_bytes_at_a_time(compiled, i, kind):
    aligned = [r for r in compiled if r["kernel"] in OTHERS and (r["layout"], r["C"]) != ("last", 25)]
    bad = [r for r in aligned if sum(r[kind].values()) - r[kind].get("16", 0) > OTHERS[r["kernel"]][i]]
    assert aligned and bad == []


def test_pooling_copies_features_asynchronously_and_16_bytes_at_a_time(compiled):
    pooling = [r for r in compiled if r["kernel"] == "pool_kernel"]
    assert pooling and [r for r in pooling if set(r["async"]) != {"8", "16"}] == []  # labels, features


# ------------------------------------------------------------------------------------- the compiling process
def resource_usage(cubin):
    """Stack and local memory per thread, read by the cuobjdump in Triton's package."""
    import triton.backends.nvidia

    tool = pathlib.Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    stack, local = re.search(r"STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text.stdout).groups()
    return {"stack": int(stack), "local": int(local)}


def access_widths(ptx):
    """{width in bytes: instructions} of loads (asynchronous ones too), asynchronous copies and stores."""
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global\s.*?\],\s*\[.*?\],\s*(0x[0-9a-f]+|\d+)", ptx)
    widths = {"ld": [], "st": [], "async": [int(width, 0) for width in copies]}
    for operation, vector, bits in re.findall(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx):
        widths[operation].append(int(vector or 1) * int(bits) // 8)
    kinds = {"loads": widths["ld"] + widths["async"], "async": widths["async"], "stores": widths["st"]}
    return {kind: Counter(found) for kind, found in kinds.items()}


def compile_launches(capability, launches):
    """Runs the launches, each (description, call), and prints a record for every kernel that they compile."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    driver = SimpleNamespace(  # all that Triton asks of a GPU's driver before it launches
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    triton.runtime.driver.set_active(driver)
    run, seen, about = JITFunction.run, {}, {}

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if id(kernel) not in seen:
            seen[id(kernel)] = kernel
            record = {"kernel": self.__name__, "capability": capability, **about, "shared": kernel.metadata.shared}
            record |= access_widths(kernel.asm["ptx"]) | resource_usage(kernel.asm["cubin"])
            print(json.dumps(record), flush=True)

    JITFunction.run = compile_only
    for description, call in launches:
        about.update(description)
        call()


def maps(layout, dtype, *shape):
    """(..., C, h, w) in one of the two layouts; never touched, so it costs no memory."""
    if layout == "first":
        return torch.empty(shape, dtype=dtype)
    *outer, C, h, w = shape
    return torch.empty((*outer, h, w, C), dtype=dtype).movedim(-1, -3)


def distance(layout, dtype, C, side, K=25):
    from kernels import prototype

    student, teacher = (maps(layout, dtype, 2, 4, C, side, side) for _ in range(2))
    labels, present = torch.zeros(2, side, side, dtype=torch.int64), torch.ones(2, 4, dtype=torch.bool)
    match = torch.zeros(2, 4, dtype=torch.int64)
    loss = prototype.prototype_distance(student.requires_grad_(), teacher, labels, present, match, K)
    torch.autograd.grad(loss, student)


def select(layout, dtype, C, side, rule):
    from kernels import selection

    *sources, gradient = (maps(layout, dtype, 2, C, side, side) for _ in range(3))
    weight, bias = torch.zeros(2, C, 3, 3, requires_grad=True), torch.zeros(2, 2, requires_grad=True)
    selected = selection.feature_select(sources, weight, bias, rule, 0.2)
    if rule != "hard":
        torch.autograd.grad(selected, [weight, bias], gradient)


def launches():
    """(description, call) of each; stages whose specialisation is the same share one compilation."""
    wanted = []
    for layout, dtype in itertools.product(("last", "first"), (torch.float32, torch.bfloat16)):
        wanted += [(distance, layout, dtype, *stage) for stage in STAGES]
        wanted += [(select, layout, dtype, *level, "score") for level in (*STAGES, LOGITS)]
    wanted += [(select, "last", torch.float32, *STAGES[0], rule) for rule in ("candidate", "hard")]
    wanted += [(distance, "last", torch.float32, *STAGES[1], K) for K in (7, 40, 100, 200)]
    for call, layout, dtype, C, side, *more in wanted:
        description = {"layout": layout, "dtype": str(dtype), "C": C, "more": more}
        yield description, functools.partial(call, layout, dtype, C, side, *more)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    compile_launches(int(sys.argv[1]), launches())
