"""What both training loops must share to be correct: batches, randomness, schedule, validation.

Everything random in a run is a function of (seed, phase, step) or of (seed, epoch, frame). So a checkpoint holds
weights, optimizer state, step and best score, and nothing else is needed to continue bit for bit, with any number of
loader workers.
"""

import contextlib
import copy
import ctypes
import pathlib
import platform
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import metrics
from data import normalise
from model import subset_logits

PHASES = ("teacher", "robust", "fsm", "student")
EXIT_STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 0}


class Batches:
    """Keys (epoch, index) of this process's share of every batch from `first_step` on.

    The run is one endless stream of frames, a fresh permutation per epoch, cut into batches: every frame is seen once
    an epoch, every batch is full, and the position in the stream follows from the step alone.
    """

    def __init__(self, frames: int, batch_size: int, seed: int, first_step: int, steps: int, rank: int, world: int):
        self.frames, self.batch_size, self.seed = frames, batch_size, seed
        self.first_step, self.steps, self.rank, self.world = first_step, steps, rank, world

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, None
        for step in range(self.first_step, self.steps):
            batch = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                if position // self.frames != epoch:
                    epoch = position // self.frames
                    order = np.random.default_rng([self.seed, epoch]).permutation(self.frames)
                batch.append((epoch, int(order[position % self.frames])))
            yield batch[self.rank :: self.world]


def quiet_worker(_: int) -> None:
    """Loader workers leave signals to the training process, which finishes its step first."""
    signal.set_wakeup_fd(-1)
    for number in EXIT_STATUS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def loader(dataset, batches, workers: int, device: torch.device) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=workers, worker_init_fn=quiet_worker,
                                       pin_memory=device.type == "cuda", collate_fn=stack)  # fmt: skip


def stack(samples: list[tuple[Tensor, Tensor, str]]) -> list:
    """Samples of a batch -> images (B, M, 3, H, W), labels (B, H, W), B names."""
    (_, first, name), *others = samples
    for _, label, other in others:
        if label.shape != first.shape:
            sizes = [" x ".join(map(str, x.shape)) for x in (label, first)]
            raise ValueError(f"{other} has {sizes[0]} pixels, but {name} in its batch has {sizes[1]}; "
                             "use --batch-size 1, or frames of one shape.")  # fmt: skip
    return torch.utils.data.default_collate(samples)


def seed_step(seed: int, phase: str, step: int, rank: int) -> torch.Generator:
    """Seeds torch for the step (dropout, drop path), and returns a generator that is equal on all processes."""
    key = np.random.SeedSequence([seed, PHASES.index(phase), step])
    shared, own = (int(k.generate_state(1, np.uint64)[0] >> 1) for k in (key, *key.spawn(rank + 1)[-1:]))
    torch.manual_seed(own)
    return torch.Generator().manual_seed(shared)


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up from a tenth of the peak, then poly 0.9 down to 0 (published recipe)."""
    if step < warmup:
        return peak * (0.1 + 0.9 * step / warmup)
    return peak * (1 - (step - warmup) / max(1, steps - warmup)) ** 0.9


def adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW without weight decay for 1-D parameters (norms and biases), as published. Those that are stacked, a row for
    each sensor, count as matrices."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]  # fmt: skip
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def grad_scaler(device: torch.device, amp: str) -> torch.amp.GradScaler:
    """Does nothing but for fp16, whose small gradients it keeps from becoming zero."""
    return torch.amp.GradScaler(device.type, enabled=amp == "fp16")


def autocast(device: torch.device, amp: str) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp), enabled=amp != "off")


class Average:
    """The mean of a model's weights and statistics over the steps at which `update` was called: `model`."""

    def __init__(self, model: nn.Module):
        self.model, self.count = copy.deepcopy(model).requires_grad_(False).eval(), 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.count += 1
        for mean, new in zip(self.model.state_dict().values(), model.state_dict().values(), strict=True):
            if torch.is_tensor(new):
                mean.lerp_(new, 1 / self.count) if mean.is_floating_point() else mean.copy_(new)

    def state_dict(self) -> dict:
        return {"model": self.model.state_dict(), "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.count = state["count"]


def keep_freed_memory() -> None:
    """For CPU runs on Linux. The C library returns large blocks to the system as soon as they are free, and the system
    clears every page of them when the next step asks again: up to a third of a step. Told so, it keeps them.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library, another system: nothing to tell
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block of its own mapping
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back


# ---- validation, log values --------------------------------------------------------------------------------


@torch.inference_mode()
def validate(predict: Callable, dataset, subsets: list[tuple[int, ...]], run) -> list[dict]:
    """metrics.scores of each subset of sensors. predict(images, subsets) yields logits per subset (`predictor`)."""
    size = 1 if run.o.data == "folder" else run.o.batch_size  # your own frames may differ in size
    shard = [list(range(i, min(i + size, len(dataset)))) for i in range(0, len(dataset), size)]
    k = len(dataset.classes)
    matrices = torch.zeros(len(subsets), k, k, dtype=torch.int64, device=run.device)
    for images, labels, names in loader(dataset, shard[run.rank :: run.world], run.o.workers, run.device):
        labels = labels.to(run.device, non_blocking=True).long()
        with autocast(run.device, run.o.amp):
            images = normalise(images.to(run.device, non_blocking=True), dataset.modalities, dataset.normalisation)
            for i, logits in enumerate(predict(images, subsets)):
                matrices[i] += metrics.confusion(metrics.class_ids(logits, names), labels, k)
    matrices = run.total(matrices)
    if not matrices.any():
        raise ValueError(f"not one pixel of the {len(dataset)} validation frames has a label; look at them with "
                         "python data.py --check.")  # fmt: skip
    return [metrics.scores(matrix) for matrix in matrices]


def summarise(results: list[dict]) -> dict[str, float]:
    """Scores of all subsets, the complete one last -> mIoU (published rule) of all, the complete one, the others."""
    *missing, full = (scores["miou_published"] for scores in results)
    values = {"miou": (full + sum(missing)) / len(results), "miou_full": full}
    return {**values, "miou_missing": sum(missing) / len(missing)} if missing else values


def predictor(model: nn.Module) -> Callable:
    return lambda images, subsets, degraded=None: subset_logits(model.eval(), images, subsets, degraded)


def all_subsets(modalities: int) -> list[tuple[int, ...]]:
    """The 2^M - 1 non-empty subsets, the complete one last."""
    subsets = [tuple(m for m in range(modalities) if bits >> m & 1) for bits in range(1, 2**modalities)]
    return sorted(subsets, key=lambda s: (len(s), s))


def peak_memory(device: torch.device) -> float:
    """MB: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def versions() -> dict:
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "machine": platform.machine(), "threads": torch.get_num_threads()}  # fmt: skip


def git_revision() -> str:
    command = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


# ---- BatchNorm over all processes --------------------------------------------------------------------------


class SumOverProcesses(torch.autograd.Function):
    """All-reduce with a gradient: what every process gets depends on every process's input."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        dist.all_reduce(x := x.clone())
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return SumOverProcesses.forward(ctx, grad)


class SyncedBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the batches of all processes, for CPUs; on GPUs torch has its own."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        x = x.float()  # sums of bf16 would lose the small ones
        n = x.new_full((1,), x.numel() / x.shape[1])
        sums = SumOverProcesses.apply(torch.cat((x.sum((0, 2, 3)), x.square().sum((0, 2, 3)), n)))
        mean, square = (sums[:-1] / sums[-1]).chunk(2)
        var = square - mean.square()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * sums[-1] / (sums[-1] - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()  # (C,)
        return x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]


def sync_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncedBatchNorm  # the same parameters and buffers, another forward
    return model
