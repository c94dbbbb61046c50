"""What training launches compiles to fast machine code, for compute capability 8.0 and 9.0 and without a GPU.
`tests/compile_all.sh` compiles it for 10.0 and 12.0 too, with the Triton versions that people have.

The interpreter of the other kernel tests accepts code that the compiler refuses, and knows nothing of speed. Here the
public calls run as on a GPU, on tensors of the real shapes and layouts, and Triton specialises and compiles each
launch itself; only the launch is left out. A process of its own does that (this file as a script), because Triton is
either interpreter or compiler from its import on.

Sizes: DELIVER at 1024 x 1024, batch 2, four modalities, B0. An access of 16 bytes to features needs rows that are
multiples of 16 bytes: all but 25 classes channels-last.
"""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

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
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    start = [sys.executable, str(pathlib.Path(__file__).resolve())]
    records = []
    for capability in SHARED_LIMIT:
        done = subprocess.run([*start, str(capability)], env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"compiling for {capability} failed:\n{done.stderr[-3000:]}"
        records += map(json.loads, done.stdout.splitlines())
    return records


def failing(records, wrong):
    return "\n".join(str(record) for record in records if wrong(record))


def test_every_kernel_is_compiled_for_both_layouts_and_capabilities(compiled):
    source = "".join(file.read_text() for file in (ROOT / "kernels").glob("*.py"))
    names = set(re.findall(r"def (\w+_kernel)\(", source)) - {"distance_kernel"}  # which never sees the features
    expected = {(name, layout, capability) for name in names for layout in ("last", "first") for capability in (80, 90)}
    assert {(r["kernel"], r["layout"], r["capability"]) for r in compiled} >= expected


def test_no_kernel_spills_registers_or_exceeds_the_shared_memory(compiled):
    bad = failing(compiled, lambda r: r["local"] or r["stack"] or r["shared"] > SHARED_LIMIT[r["capability"]])
    assert not bad, bad


@pytest.mark.parametrize("kind", ["loads", "stores"])
def test_features_are_read_and_written_16_bytes_at_a_time(compiled, kind):
    """All accesses of a thread but those to maps without channels, weights and labels, which are counted here."""
    others = {  # kernel: loads, stores
        "spread_kernel": (2, 0),
        "taps_kernel": (4, 0),
        "select_kernel": (20, 2),
        "score_backward_kernel": (8, 2),
        "weight_backward_kernel": (16, 16),
    }
    aligned = [r for r in compiled if r["kernel"] in others and (r["layout"], r["C"]) != ("last", 25)]
    narrow = {id(r): sum(r[kind].values()) - r[kind].get("16", 0) for r in aligned}
    bad = failing(aligned, lambda r: narrow[id(r)] > others[r["kernel"]][kind == "stores"])
    assert aligned and not bad, bad


def test_pooling_copies_features_asynchronously_and_16_bytes_at_a_time(compiled):
    pooling = [r for r in compiled if r["kernel"] == "pool_kernel"]
    bad = failing(pooling, lambda r: set(r["async"]) != {"8", "16"})  # labels, features
    assert pooling and not bad, bad


# ------------------------------------------------------------------------------------- the compiling process


def resource_usage(cubin):
    """Stack and local memory per thread, read by the cuobjdump in Triton's package."""
    import triton.backends.nvidia

    tool = pathlib.Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text.stdout)
    return {"registers": int(found[1]), "stack": int(found[2]), "local": int(found[3])}


def access_widths(ptx):
    """{width in bytes: instructions} of loads (asynchronous ones too), asynchronous copies and stores."""
    widths = {"loads": {}, "async": {}, "stores": {}}

    def count(kind, width):
        widths[kind][width] = widths[kind].get(width, 0) + 1

    for operation, vector, bits in re.findall(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx):
        count("loads" if operation == "ld" else "stores", int(vector or 1) * int(bits) // 8)
    for width in re.findall(r"cp\.async\.c[ag]\.shared\.global\s.*?\],\s*\[.*?\],\s*(0x[0-9a-f]+|\d+)", ptx):
        for kind in ("loads", "async"):
            count(kind, int(width, 0))
    return widths


class Driver:
    """All that Triton asks of a GPU's driver before it launches."""

    def __init__(self, capability):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_launches(capability, launches):
    """Runs the launches, each (description, call), and prints a record for every kernel that they compile."""
    import triton
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(Driver(capability))
    run, seen, kept, about = JITFunction.run, set(), [], {}

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if id(kernel) not in seen:
            seen.add(id(kernel))
            kept.append(kernel)
            record = {"kernel": self.__name__, "capability": capability, **about}
            record |= {"shared": kernel.metadata.shared, **access_widths(kernel.asm["ptx"])}
            print(json.dumps({**record, **resource_usage(kernel.asm["cubin"])}), flush=True)

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

    sources = [maps(layout, dtype, 2, C, side, side) for _ in range(2)]
    weight, bias = torch.zeros(2, C, 3, 3, requires_grad=True), torch.zeros(2, 2, requires_grad=True)
    selected = selection.feature_select(sources, weight, bias, rule, 0.2)
    if rule != "hard":
        torch.autograd.grad(selected, [weight, bias], maps(layout, dtype, 2, C, side, side))


def launches():
    """(description, call) of each; stages whose specialisation is the same share one compilation."""

    def one(call, layout, dtype, C, side, *more):
        description = {"layout": layout, "dtype": str(dtype), "C": C, "more": more}
        return description, lambda: call(layout, dtype, C, side, *more)

    for layout in ("last", "first"):
        for dtype in (torch.float32, torch.bfloat16):
            for stage in STAGES:
                yield one(distance, layout, dtype, *stage)
            for level in (*STAGES, LOGITS):
                yield one(select, layout, dtype, *level, "score")
    for rule in ("candidate", "hard"):
        yield one(select, "last", torch.float32, *STAGES[0], rule)
    for K in (7, 40, 100, 200):
        yield one(distance, "last", torch.float32, *STAGES[1], K)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    compile_launches(int(sys.argv[1]), launches())
