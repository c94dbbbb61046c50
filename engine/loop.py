"""What the training loops and evaluate.py call: batches, randomness, schedule, optimizer, validation.

Everything random in a run is a function of (seed, phase, step) or of (seed, epoch, frame). So a checkpoint needs only
the states of model, optimizer and scaler, step and best score to continue bit for bit, with any number of workers.
"""

import contextlib
import ctypes
import functools
import platform
import resource
import signal
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

import metrics
from data import normalise

PHASES = ("teacher", "robust", "fsm", "student", "single")
# What stops a training run after its step, with all saved; SIGALRM is the clock of --max-minutes.
EXIT_STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129, signal.SIGUSR1: 0, signal.SIGALRM: 0}


def batch_keys(frames: int, batch_size: int, seed: int, steps: range, share: slice) -> Iterator[list[tuple[int, int]]]:
    """For each of these steps, the (epoch, index) of the frames in this process's share of its batch. A run is one
    endless stream of frames, a fresh permutation per epoch, cut into batches; the step gives the position in it."""
    order_of = functools.lru_cache(2)(lambda epoch: np.random.default_rng([seed, epoch]).permutation(frames).tolist())
    for step in steps:
        places = [divmod(position, frames) for position in range(step * batch_size, (step + 1) * batch_size)]
        yield [(epoch, order_of(epoch)[place]) for epoch, place in places[share]]


def quiet_worker(_: int) -> None:
    """Loader workers leave signals to the training process, which finishes its step first."""
    for number in EXIT_STATUS:
        signal.signal(number, signal.SIG_IGN)


def loader(dataset, keys: Iterable[list], workers: int, device: torch.device) -> Iterator[tuple]:
    """For each list of `keys`: its frames' images (B, M, 3, H, W), normalised, labels (B, H, W) int64, names."""
    own = {"worker_init_fn": quiet_worker, "collate_fn": stack, "pin_memory": device.type == "cuda"}
    for images, labels, names in DataLoader(dataset, batch_sampler=keys, num_workers=workers, **own):
        images = normalise(images.to(device, non_blocking=True), *dataset.normalisation)
        yield images, labels.to(device, non_blocking=True).long(), names


def stack(samples: list[tuple[Tensor, Tensor, str]]) -> list:
    """Samples of a batch -> images (B, M, 3, H, W), labels (B, H, W), B names."""
    sizes = {label.shape: f"{name} has {' x '.join(map(str, label.shape))} pixels" for _, label, name in samples}
    if len(sizes) > 1:
        raise ValueError(f"frames of one batch differ: {', '.join(sizes.values())}; use --batch-size 1.")
    return default_collate(samples)


def seed_step(seed: int, phase: str, step: int, rank: int) -> torch.Generator:
    """Seeds torch for the step (dropout, drop path), and returns a generator that is equal on all processes."""
    key = np.random.SeedSequence([seed, PHASES.index(phase), step])
    shared, own = (int(k.generate_state(1, np.uint64)[0] >> 1) for k in (key, *key.spawn(rank + 1)[-1:]))
    torch.manual_seed(own)
    return torch.Generator().manual_seed(shared)


def adamw(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW that decays the weights of linear layers and convolutions alone, by 0.01. As published, which exempts 1-D
    parameters; norms that are stacked here, a row for each modality, are exempt, too."""
    decayed = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d))}
    trained = [p for p in model.parameters() if p.requires_grad]
    weights, others = [p for p in trained if id(p) in decayed], [p for p in trained if id(p) not in decayed]
    groups = [{"params": weights, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up from a tenth of the peak, then poly 0.9 down to 0 (published recipe) -> the step's rate."""
    rate = peak * (1 - (step - warmup) / max(1, steps - warmup)) ** 0.9
    if step < warmup:
        rate = peak * (0.1 + 0.9 * step / warmup)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


@torch.inference_mode()
def score(answers: Callable, columns: int, dataset, batch_size: int, run) -> list[dict]:
    """metrics.scores of each column of a table, over all frames of a data set and all processes. answers(images
    (B, M, 3, H, W) normalised, labels (B, H, W), B names) yields for each column the classes that a model answers
    (`metrics.class_ids`) and the labels that they are compared with, both (B, H, W)."""
    k, starts = len(dataset.classes), range(0, len(dataset), batch_size)[run.rank :: run.world]
    shard = [list(range(i, min(i + batch_size, len(dataset)))) for i in starts]
    matrices = torch.zeros(columns, k, k, dtype=torch.int64, device=run.device)
    begun = told = time.monotonic()
    for done, (images, labels, names) in enumerate(loader(dataset, shard, run.args.workers, run.device)):
        if done and time.monotonic() - told > 60:
            told = time.monotonic()
            left = (told - begun) / done * (len(shard) - done) / 60
            run.say(f"{done * batch_size * run.world} of {len(dataset)} frames, about {left:.0f} min left")
        with run.autocast():
            for matrix, (ids, wanted) in zip(matrices, answers(images, labels, names), strict=True):
                matrix += metrics.confusion(ids, wanted, k)
    matrices = run.reduce(matrices)
    if not matrices.any():
        what = f"not one pixel of the {len(dataset)} {dataset.split} frames has a label"
        raise ValueError(f"{what}: choose another split or --root, or look with python data.py --check.")
    return [metrics.scores(matrix) for matrix in matrices]


def validate(predict: Callable, dataset, subsets: list[tuple[int, ...]], run) -> dict[str, float]:
    """mIoU in per cent by `metrics.rule_for` -> "miou", mean over all subsets; "miou_full", of the complete one, which
    is the last; "miou_missing", mean over the others, if any. predict(images, subsets) yields each one's logits."""

    def answers(images: Tensor, labels: Tensor, names: list[str]) -> Iterator[tuple[Tensor, Tensor]]:
        return ((metrics.class_ids(logits, names), labels) for logits in predict(images, subsets))

    size = 1 if dataset.name == "folder" else run.args.batch_size  # your own frames may differ in size
    results = score(answers, len(subsets), dataset, size, run)
    *missing, full = (scores[f"miou_{metrics.rule_for(dataset.name)}"] for scores in results)
    values = {"miou": (full + sum(missing)) / len(results), "miou_full": full}
    return {**values, "miou_missing": sum(missing) / len(missing)} if missing else values


def keep_freed_memory() -> None:
    """Keeps freed memory in the process, for CPU runs on Linux. By default the C library gives large blocks back to
    the system, which clears their pages when the next step asks again: 5 to 25 % of a B0 step."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library, another system: nothing to tell
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block of its own mapping
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back


def peak_memory(device: torch.device) -> float:
    """MB: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if platform.system() == "Darwin" else 2**10)


def versions() -> dict:
    about = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    about |= {"machine": platform.machine(), "threads": torch.get_num_threads()}
    return about | {"tf32": torch.backends.cuda.matmul.allow_tf32}
