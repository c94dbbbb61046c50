"""A run: its processes, folder, log, signals and checkpoints. Everything that `--resume` continues from.

The loops themselves stay in the scripts.
"""

import json
import math
import os
import pathlib
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.checkpoint import load_last, require, save_model, write
from engine.loop import (
    EXIT_STATUS,
    PHASES,
    Batches,
    git_revision,
    keep_freed_memory,
    learning_rate,
    loader,
    peak_memory,
    sync_batch_norm,
    versions,
)

RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))  # by torchrun --max-restarts


class Run:
    """The processes, device and folder of a run, and the signals it was sent. The loops stay in the scripts."""

    def __init__(self, o, script: str):
        self.o, self.script, self.folder, self.started = o, script, pathlib.Path(o.out), time.time()
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if script.startswith("train") and o.batch_size % self.world:
            raise ValueError(f"--batch-size {o.batch_size} counts all processes: make it a multiple of {self.world}.")
        cuda = torch.cuda.is_available() if o.device == "auto" else o.device.startswith("cuda")
        if cuda and not torch.cuda.is_available():
            raise ValueError(f"--device {o.device}: torch sees no CUDA device here; use --device cpu.")
        local = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        self.device = torch.device("cpu" if not cuda else local if o.device in ("auto", "cuda") else o.device)
        if cuda:
            torch.cuda.set_device(self.device)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        else:
            keep_freed_memory()
        if o.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        if self.world > 1 and not dist.is_initialized():
            # torchrun may keep its store over a restart, and with it the addresses of processes that have ended.
            store = dist.PrefixStore(f"start {RESTARTS}", next(dist.rendezvous("env://"))[0])
            dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=self.rank, world_size=self.world)
        self.writer = tensorboard_writer(self.folder) if o.tensorboard and self.rank == 0 else None
        self.signalled = 0

    def on_signal(self, number: int, _frame) -> None:
        self.signalled = number

    def catch_signals(self) -> None:
        """They stop the run after its step. A second Ctrl-C stops it now: that takes a thread, because Python itself
        answers signals between two instructions, and a whole backward pass is one.
        """
        for number in EXIT_STATUS:
            signal.signal(number, self.on_signal)
        received, sent = os.pipe()
        os.set_blocking(sent, False)
        signal.set_wakeup_fd(sent)

        def listen() -> None:
            for _ in range(2):
                while os.read(received, 1)[0] != signal.SIGINT:
                    pass
            os._exit(EXIT_STATUS[signal.SIGINT])

        threading.Thread(target=listen, daemon=True).start()

    def claim(self, phases: tuple[str, ...]) -> dict | None:
        """Takes the run folder for these phases, or returns the state to continue from. Never overwrites a run."""
        self.catch_signals()  # from here on there is something to save
        o, folder = self.o, self.folder
        file = folder / "config.json"
        config = json.loads(file.read_text()) if file.exists() else {}
        # torchrun --max-restarts starts the same command again. Only what the same torchrun began may go on unasked.
        launch = [os.environ.get("TORCHELASTIC_RUN_ID"), os.getppid()]
        own = self.rank > 0 or config.get(self.script, {}).get("torchrun") == launch
        resume = o.resume or (RESTARTS > 0 and own)
        state = load_last(folder) if resume else None
        if state and state["script"] != self.script:
            if phases[0] == "teacher":
                raise ValueError(f"{folder} went on to {state['script']}; resume that one.")
            state = None  # of stage 1, in the same folder: this stage was ended before its first checkpoint

        # A run saves before its first step. So one without a checkpoint has done nothing yet, and may begin again.
        own_stage1 = phases[0] == "fsm" and o.stage1 and folder.resolve() == pathlib.Path(o.stage1).resolve()
        used = [f"{phase}.pt" for phase in phases]
        if resume and phases[0] == "teacher" and o.teacher:
            used.remove("teacher.pt")  # copied there before the first checkpoint
        elif not resume and not own_stage1:
            used += ["last.pt", "last.previous.pt", "log.jsonl"]
        used = [name for name in used if (folder / name).exists()]
        if own_stage1 and not resume and (begun := load_last(folder)) and begun["script"] == self.script:
            used.append("last.pt")
        if used and not state:
            ways = f"continue it with --resume {folder}, or " if not resume else "but no last.pt to continue from; "
            raise ValueError(f"{folder} is not empty ({used[0]}): {ways}choose another folder with --out.")
        if self.world > 1:  # nobody writes before everybody has looked
            found = [None] * self.world
            dist.all_gather_object(found, state and (state["phase"], state["step"]))
            if len(set(found)) > 1:
                raise ValueError(f"the processes found different checkpoints in {folder} ({found}); "
                                 "all nodes must see the same folder.")  # fmt: skip
        if self.rank == 0 and not state:
            folder.mkdir(parents=True, exist_ok=True)
            about = {"options": vars(o), "versions": versions(), "git": git_revision(), "torchrun": launch}
            config[self.script] = about
            replace_text(file, json.dumps(config, indent=1) + "\n")
        return state

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model as the loop calls it: compiled if asked for, and averaging gradients over the processes."""
        if self.world > 1:
            model = sync_batch_norm(model, self.device)
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # a remark on speed
            ids = [self.device.index] if self.device.type == "cuda" else None
            model = nn.parallel.DistributedDataParallel(model, device_ids=ids)
        return torch.compile(model) if self.o.compile else model

    def total(self, x: Tensor) -> Tensor:
        """Sum over the processes."""
        if self.world > 1:
            dist.all_reduce(x := x.clone())
        return x

    def average_gradients(self, model: nn.Module) -> None:
        """For a model that is not `parallel`: its gradients become their mean over the processes."""
        for p in model.parameters() if self.world > 1 else ():
            if p.grad is not None:
                p.grad = self.total(p.grad) / self.world

    def say(self, text: str, end: str = "\n") -> None:
        if self.rank == 0:
            print(text, end=end, flush=True)

    def log(self, **values) -> None:
        """One line of log.jsonl, and the numbers of it to tensorboard if asked for."""
        if self.rank == 0:
            line = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
            file = self.folder / "log.jsonl"
            try:
                with open(file, "a") as lines:
                    lines.write(json.dumps(line) + "\n")
            except OSError as error:
                raise OSError(f"cannot write {file} ({error.strerror}); then --resume {self.folder}.") from error
            for name, value in line.items() if self.writer else ():
                if isinstance(value, float):
                    self.writer.add_scalar(f"{line['phase']}/{name}", value, line["step"])

    def rewind_log(self, phase: str, step: int) -> None:
        """Drops what was logged after the checkpoint that the run continues from; it will be logged again."""
        file = self.folder / "log.jsonl"
        if self.rank == 0 and file.exists():
            whole = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
            values = [json.loads(line) for line in whole]
            keep = [(PHASES.index(v["phase"]), v["step"]) <= (PHASES.index(phase), step) for v in values]
            replace_text(file, "".join(line for line, kept in zip(whole, keep, strict=True) if kept))


def replace_text(file: pathlib.Path, text: str) -> None:
    """Writes a whole file or, when cut off, nothing."""
    beside = file.with_suffix(".new")
    beside.write_text(text)
    os.replace(beside, file)


class Progress:
    """Where a phase stands: step, best score, log, checkpoints. Everything that `--resume` continues from.

    for step, batch in progress.batches(train):      # saves and stops between two turns of the loop
        ...; loss.backward()
        progress.check(loss, losses, names)          # before the optimizer: stops on a value that is not finite
        ...; optimizer.step()
        if progress.validation_due(): ...; progress.validated(score)

    meta describes the model (checkpoint.describe); state is what to continue from, or None.
    """

    def __init__(
        self, run: Run, phase: str, model: nn.Module, optimizer, scaler, frames: int, epochs: float, meta: dict, state,
        beside: dict | None = None,
    ):  # fmt: skip
        o = run.o
        self.run, self.phase, self.model, self.optimizer, self.scaler = run, phase, model, optimizer, scaler
        self.beside = beside or {}  # what else has a state: {name: module, optimizer or average}
        self.meta = {**meta, "frames": frames}  # the stream of batches depends on the number of frames
        self.per_epoch = frames / o.batch_size  # steps, a fraction too: the stream of frames does not stop at an epoch
        self.steps = max(1, math.ceil(epochs * self.per_epoch))
        self.warmup = min(round(o.warmup_epochs * self.per_epoch), self.steps // 2)
        self.every = max(1, round(o.eval_every * self.per_epoch))
        self.step, self.best = 0, -1.0
        if state:
            kept = ("backbone", "classes", "modalities", "frames")
            require(run.folder / "last.pt", state["meta"], {name: self.meta[name] for name in kept})
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
            for name, thing in self.beside.items():
                thing.load_state_dict(state["beside"][name])
            self.step, self.best = state["step"], state["best"]
            run.rewind_log(phase, self.step)
        self.sums: dict[str, Tensor] = {}
        self.since, self.waited, self.counted, self.stop = time.time(), 0.0, 0, 0

    def state(self) -> dict:
        return {"script": self.run.script, "phase": self.phase, "step": self.step, "best": self.best,
                "steps": self.steps, "meta": self.meta, "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                "beside": {name: thing.state_dict() for name, thing in self.beside.items()}}  # fmt: skip

    def batches(self, dataset) -> Iterator[tuple[int, tuple]]:
        run, o = self.run, self.run.o
        keys = Batches(len(dataset), o.batch_size, o.seed, self.step, self.steps, run.rank, run.world)
        source = iter(loader(dataset, keys, o.workers, run.device))
        if self.step == 0:
            self.save()  # a run folder without a checkpoint has done nothing, and too full a disk shows now
        while self.step < self.steps:
            began = time.time()
            batch = next(source)
            self.waited += time.time() - began
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.step, self.steps, self.warmup, o.lr)
            self.model.train()
            yield self.step, batch
            self.step += 1
            self.counted += 1
            if self.step % 50 == 0 or self.step == self.steps or self.stop:
                self.report()
            if self.step % o.save_every == 0 or self.step == self.steps or self.stop:
                self.save()
            if self.stop:
                if run.world > 1:
                    dist.barrier()  # torchrun ends the others soon after the first has left
                why = signal.Signals(self.stop).name if self.stop > 1 else f"--max-minutes {o.max_minutes:g}"
                run.say(f"\nstopped by {why} after step {self.step}; continue with --resume {run.folder}")
                raise SystemExit(EXIT_STATUS.get(self.stop, 0))

    def save(self) -> None:
        if self.run.rank == 0:
            write(self.run.folder / "last.pt", self.state(), keep_previous=True)

    def check(self, loss: Tensor, losses: dict[str, Tensor], names: list[str]) -> None:
        """After backward: a loss or gradient that is not finite ends the run before it can reach the weights.

        The one read of the device in a step; it also tells all processes to stop together when one was asked to.
        """
        run = self.run
        late = run.o.max_minutes and time.time() - run.started > 60 * run.o.max_minutes
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        # fp16's scaler skips steps whose gradients overflow, which is its normal way to find the scale
        flags = torch.tensor([0, 0, run.signalled or int(bool(late))], device=loss.device)
        flags[0] = ~torch.isfinite(loss.detach())
        flags[1] = ~torch.isfinite(norm) & (not self.scaler.is_enabled())
        if run.world > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        bad_loss, bad_gradient, self.stop = flags.tolist()
        if bad_loss or bad_gradient:
            bad = [name for name, value in losses.items() if not bool(torch.isfinite(value))] or ["the gradient"]
            if bad_loss and bool(torch.isfinite(loss)):
                raise ValueError("the loss of another process is not finite; its message names the frames.")
            file = run.folder / f"nonfinite-{run.rank}.pt"
            write(file, {**self.state(), "losses": {k: v.detach() for k, v in losses.items()}, "frames": list(names)})
            raise ValueError(f"{' and '.join(bad)} of phase {self.phase}, step {self.step} is not finite on process "
                             f"{run.rank}; frames of its batch: {', '.join(names)}. The weights were not updated; they "
                             f"are in {file} with the losses.")  # fmt: skip
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()

    def report(self) -> None:
        """The progress line and a line of the log: means since the last one."""
        run, seconds = self.run, time.time() - self.since
        sums = run.total(torch.stack(list(self.sums.values()))) / (self.counted * run.world)
        losses = dict(zip(self.sums, sums.tolist(), strict=True))
        rate = self.counted * run.o.batch_size / seconds
        left = (self.steps - self.step) * seconds / self.counted
        lr = self.optimizer.param_groups[0]["lr"]
        run.log(phase=self.phase, step=self.step, epoch=self.step / self.per_epoch, **losses, lr=lr,
                images_per_second=rate, data_wait=self.waited / seconds,
                peak_memory_mb=peak_memory(run.device))  # fmt: skip
        text = (f"{self.phase} epoch {self.step / self.per_epoch:.1f}/{self.steps / self.per_epoch:.0f} "
                f"step {self.step}/{self.steps} loss {sum(losses.values()):.3f} {rate:.1f} images/s "
                f"{left / 60:.1f} min left")  # fmt: skip
        run.say(f"\r{text}\033[K" if sys.stdout.isatty() else text, "" if sys.stdout.isatty() else "\n")
        self.sums, self.since, self.waited, self.counted = {}, time.time(), 0.0, 0

    def validation_due(self) -> bool:
        return (self.step + 1) % self.every == 0 or self.step + 1 == self.steps

    def validated(self, score: float, model: nn.Module | None = None, **values: float) -> bool:
        """Keeps the best model so far as <phase>.pt, and logs the scores -> whether it is the best."""
        if better := score > self.best:
            self.best = score
            if self.run.rank == 0:
                save_model(self.run.folder / f"{self.phase}.pt", model or self.model, self.meta)
        self.run.log(phase=self.phase, step=self.step + 1, epoch=(self.step + 1) / self.per_epoch, **values)
        shown = ", ".join(f"{name} {value:.2f}" for name, value in values.items())
        self.run.say(f"{chr(10) if sys.stdout.isatty() else ''}{self.phase} step {self.step + 1}: {shown}")
        return better


def require_complete(folder: str) -> None:
    """Refuses a run of stage 1 that was interrupted, or has no robust model: stage 2 would take over its folder."""
    state = load_last(pathlib.Path(folder))
    if state and state["script"] == "train_stage1.py":
        phase, step, steps = state["phase"], state["step"], state.get("steps", state["step"])
        if step < steps:
            raise ValueError(f"stage 1 in {folder} stopped at step {step} of {steps} of phase {phase}: finish it with "
                             f"train_stage1.py --resume {folder}, or name its files with --teacher and --robust.")
        if phase == "teacher":
            raise ValueError(f"stage 1 in {folder} has a teacher only: go on with train_stage1.py --resume {folder}, "
                             f"or, if it was to end there, train_stage1.py --teacher {folder}/teacher.pt --out DIR.")


def tensorboard_writer(folder: pathlib.Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs a package that is not installed: pip install tensorboard") from None
    return SummaryWriter(str(folder))


def guarded(main: Callable, o) -> int:
    """Runs a script's main -> exit status; what the user can mend is told in one sentence, status 2."""
    status = 0
    try:
        main(o)
    except BaseException as error:
        if isinstance(error, SystemExit):
            status = error.code
        elif isinstance(error, KeyboardInterrupt):
            status = EXIT_STATUS[signal.SIGINT]
        else:
            status = 2 if (text := sentence(error)) else 1
            rank = f" (process {os.environ['RANK']})" if "RANK" in os.environ else ""
            print(f"\nerror{rank}: {text}" if text else traceback.format_exc(), file=sys.stderr)
        # The loader lives on in the frames of the error, its workers with it, and Python would wait for them for ever.
        traceback.clear_frames(error.__traceback__)
    if dist.is_initialized():
        dist.destroy_process_group()
    return status


def sentence(error: BaseException) -> str | None:
    """What to tell the user, or None: then it is a mistake of the program, and its traceback is needed."""
    text = str(error)
    if isinstance(error, (ValueError, OSError)):
        # A loader worker sends a traceback, the sentence in its last line.
        return text.strip().splitlines()[-1].partition(": ")[2] if text.startswith("Caught ") else text
    if isinstance(error, dist.DistError) or "gloo" in text:
        return f"another process of this run has ended, perhaps with a message of its own ({text.splitlines()[0]})"
    return None
