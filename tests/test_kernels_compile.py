"""Every Triton kernel compiles to machine code for compute capability 8.0 and 9.0, without a GPU.

The interpreter of the other kernel tests accepts code that the compiler refuses. Here the launchers run as they would
on a GPU, on CPU tensors, with the launch itself replaced by a compilation of exactly what it would launch. A process
of its own does that (this file as a script), because Triton is either interpreter or compiler from its import on.
"""

import importlib
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes of shared memory a program may take

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def compiled():
    """{capability: one record per compiled launch}; the two capabilities compile side by side."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    start = [sys.executable, str(pathlib.Path(__file__).resolve())]
    running = {
        capability: subprocess.Popen(
            [*start, str(capability)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for capability in SHARED_LIMIT
    }
    records = {}
    for capability, process in running.items():
        out, error = process.communicate(timeout=600)
        assert process.returncode == 0, f"compiling for {capability} failed:\n{error[-3000:]}"
        records[capability] = [json.loads(line) for line in out.splitlines()]
    return records


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_every_kernel_is_compiled(compiled, capability):
    source = "".join(file.read_text() for file in (ROOT / "kernels").glob("*.py"))
    names = set(re.findall(r"def (\w+_kernel)\(", source))
    assert {record["kernel"] for record in compiled[capability]} == names


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_no_kernel_spills_registers(compiled, capability):
    spilling = [record for record in compiled[capability] if record["local"] > 0 or record["stack"] > 0]
    assert not spilling, "\n".join(map(str, spilling))


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_every_kernel_fits_the_shared_memory(compiled, capability):
    large = [record for record in compiled[capability] if record["shared"] > SHARED_LIMIT[capability]]
    assert not large, "\n".join(map(str, large))


# ------------------------------------------------------------------------------------- the compiling process


def specialise(value, path):
    """What Triton's launcher makes of one argument: (signature, constants, attributes), as for a real launch."""
    import torch

    if isinstance(value, tuple):
        parts = [specialise(item, (*path, i)) for i, item in enumerate(value)]
        constants = {key: item for part in parts for key, item in part[1].items()}
        return tuple(part[0] for part in parts), constants, {key: item for p in parts for key, item in p[2].items()}
    aligned = {path: [["tt.divisibility", 16]]}
    if isinstance(value, torch.Tensor):
        names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int32": "i32", "int64": "i64", "bool": "i1"}
        return "*" + names[str(value.dtype).removeprefix("torch.")], {}, aligned
    if isinstance(value, float):
        return "fp32", {}, {}
    if value is None or isinstance(value, str) or value is True or value is False or value == 1:
        return "constexpr", {path: value}, {}
    return "i32", {}, aligned if value % 16 == 0 else {}


def resource_usage(cubin):
    """Registers, stack and local memory per thread, read by the cuobjdump in Triton's package."""
    import triton.backends.nvidia

    tool = pathlib.Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text.stdout)
    return {"registers": int(found[1]), "stack": int(found[2]), "local": int(found[3])}


def compile_launches(capability):
    """Replaces the launch of a kernel by its compilation, and prints a record for each new one."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    target = GPUTarget("cuda", capability, 32)
    seen = set()

    def run(self, *args, grid, warmup, **kwargs):
        names = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        options = {name: names.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in names}
        fixed = {p.name for p in self.params if p.is_constexpr}
        signature, constants, attributes = {}, {}, {}
        for i, name in enumerate(self.arg_names):
            if name in fixed:
                signature[name], constants[(i,)] = "constexpr", names[name]
                continue
            signature[name], constant, attribute = specialise(names[name], (i,))
            constants |= constant
            attributes |= attribute
        source = ASTSource(self, signature, constants, attributes)
        key = source.hash() + str(options)
        if key in seen:
            return
        seen.add(key)
        binary = triton.compile(source, target=target, options=options)
        tile = {name: names[name] for name in self.arg_names if name in fixed}
        dtype = next(s for s in signature.values() if s != "constexpr")
        record = {"kernel": self.__name__, "dtype": str(dtype), **tile, **options, "shared": binary.metadata.shared}
        print(json.dumps({**record, **resource_usage(binary.asm["cubin"])}), flush=True)

    JITFunction.run = run


def launch_prototype():
    """Every tile of pool_kernel, plain, with a teacher and with a factor; the others aligned and not."""
    import torch

    from kernels import cosine, prototype

    def maps(M, C, P, dtype, B=2):
        x = torch.zeros(B, M, C, P, dtype=dtype, requires_grad=True)
        return x, torch.zeros(B, P, dtype=torch.int64), torch.ones(B, M, dtype=torch.bool)

    for M, C in ((1, 5), (4, 32)):  # 32 and 64 rows
        for K in (7, 25, 40):  # 16, 32 and 64 classes
            for dtype in (torch.float32, torch.bfloat16):
                x, labels, present = maps(M, C, 256, dtype)
                prototype.launch_pool(x, labels, K, x, present, torch.zeros(2, M, dtype=torch.int64))
            prototype.launch_pool(x, labels, K, factor=torch.zeros(2, M, 256))
    for B, M, C, P, K, dtype in (
        (2, 4, 32, 2048, 25, torch.float32),  # several chunks of pixels
        (2, 4, 32, 256, 25, torch.bfloat16),
        (3, 3, 5, 77, 7, torch.float16),
        (2, 3, 5, 77, 200, torch.float32),
        (1, 1, 1, 1, 1, torch.float32),  # the compiler replaces an argument that is 1 by the constant
    ):
        x, labels, present = maps(M, C, P, dtype, B)
        prototypes, _ = prototype.PrototypePool.apply(x, labels, K)
        cosine.PixelPrototypeCosine.apply(x, labels, prototypes).sum().backward()
        match = torch.zeros(B, M, dtype=torch.int64)
        prototype.PrototypeDistance.apply(x, x.detach(), labels, present, match, K).backward()


def launch_feature_score():
    import torch

    feature_score = importlib.import_module("kernels.feature_score")

    def call(sources, C, h, w, dtype, rules=("scores", None, 0.2), B=2):
        features = [torch.zeros(B, C, h, w, dtype=dtype, requires_grad=True) for _ in range(sources)]
        weight = torch.zeros(sources, C, 3, 3, requires_grad=True)
        bias = torch.zeros(sources, requires_grad=True)
        for rule in rules:
            if rule == "scores":
                feature_score.feature_score(features, weight, bias).sum().backward()
            else:
                feature_score.feature_score_select(features, weight, bias, rule)[0].sum().backward()

    call(2, 32, 16, 16, torch.float32)
    call(2, 5, 7, 9, torch.bfloat16, rules=(0.2,))
    call(1, 1, 1, 1, torch.float32, B=1)
    call(8, 32, 16, 16, torch.float32, rules=(0.2,))


if __name__ == "__main__":
    compile_launches(int(sys.argv[1]))
    launch_prototype()
    launch_feature_score()
