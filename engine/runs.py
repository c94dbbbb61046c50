"""A training run: its processes, folder, log and signals, and where each of its phases stands."""

import fcntl
import json
import math
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data import open_dataset, say
from engine import loop
from engine.checkpoint import FILES, FREE, SAME, fitting, frame_names, has_model, load_last, require, save_model, write
from engine.output import replace

# Messages of torch, CUDA, NumPy and the system; their exceptions' types tell less.
NO_MEMORY = "out of memory|(can't|cannot|unable to) allocate|not enough memory|ALLOC_FAILED"
NO_WORKER = r"DataLoader worker \(pid|shared memory|file </torch_"
SCRIPTS = {"train_stage1.py", "train_stage2.py", "train_single.py"}


class Run:
    """The processes and the device of a script, and for training its folder and the signals it was sent."""

    def __init__(self, args, script: str):
        self.args, self.script = args, script
        with fitting("RANK, LOCAL_RANK and WORLD_SIZE are not as torchrun sets them, which alone should"):
            given = (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
            self.rank, local, self.world = (int(os.environ.get(name, default)) for name, default in given)
            if not 0 <= self.rank < self.world or local < 0 or self.world > 1 and "MASTER_ADDR" not in os.environ:
                raise ValueError(f"process {self.rank} of {self.world}")
        self.share = slice(self.rank, None, self.world)  # this process's rows of what is drawn for the whole batch
        cuda = args.device.startswith("cuda") or (args.device == "auto" and torch.cuda.is_available())
        own = args.device if ":" in args.device else f"cuda:{local}"
        self.device = torch.device(own if cuda else "cpu")
        if cuda and self.device.index >= (count := torch.cuda.device_count()):
            raise ValueError(f"--device {args.device}: torch sees {count} CUDA devices here; use --device cpu or auto.")
        if cuda:
            torch.cuda.set_device(self.device)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # but see `claim`
        else:
            loop.keep_freed_memory()
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")

    def claim(self, phases: tuple[str, ...]) -> dict | None:
        """Takes the run folder for these phases -> the state to continue from, or None. Never overwrites a run."""
        args, self.folder = self.args, Path(self.args.out)
        self.signalled = self.stopping = 0  # numbers of signals
        if args.batch_size % self.world:
            raise ValueError(f"--batch-size {args.batch_size} counts all processes: make it a multiple of {self.world}")
        if args.size == 32 and args.batch_size == self.world:
            raise ValueError("--batch-size 1 (a process) and --size 32 leave BatchNorm single values: enlarge one.")
        if args.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            raise ValueError(f"--out {self.folder} is no folder; give one.")
        if args.root and self.folder.resolve() == Path(args.root).resolve():
            raise ValueError(f"--out {self.folder} is the folder of the data; choose another.")
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / "lock", "a")  # locked until this process ends, however it ends
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock would go on to loader workers
            except (BlockingIOError, PermissionError):
                raise ValueError(f"another process trains in {self.folder}: wait, or choose another --out.") from None
            except OSError:
                pass  # a file system without locks
        state = load_last(self.folder)
        ours = state is not None and state["script"] == self.script
        after = vars(args).get("stage1")  # in whose folder stage 2 may go on
        follows = not ours and after and self.folder.resolve() == Path(after).resolve()
        files = [f"{name}.pt" for name in (phases if follows else (*loop.PHASES, "last", "last.previous"))]
        files += [] if follows else ["log.jsonl"]
        used = [name for name in files if (self.folder / name).exists()]
        if used and not (ours and args.resume):
            what = f"{used[0]} of an earlier run:"
            if state:
                what = f"a run of {state['script']}: continue it with --resume {self.folder}, or"
            raise ValueError(f"{self.folder} holds {what} choose another folder with --out.")
        self.meet()  # nobody writes before everybody has looked
        if self.device.type == "cuda":  # the published code: TF32 in convolutions, not in linear layers
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
            self.say("float32 products use TF32 in this training; evaluate.py and predict.py work without it")
        self.record(ours)
        for number in loop.EXIT_STATUS:  # from here on there is something to save
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, self.on_signal)
        signal.setitimer(signal.ITIMER_REAL, 60 * (args.max_minutes or 0))  # SIGALRM, or never
        return state if ours else None

    def record(self, resumed: bool) -> None:
        """config.json, for people. The options that count are in the checkpoints, so an edited one is refused."""
        file, mine = self.folder / "config.json", {"options": vars(self.args), "versions": loop.versions()}
        way = f"delete {file.name}, which is for people alone" if resumed else "choose another folder with --out"
        with fitting(f"{file} was not written by this program; {way}"):
            config = json.loads(file.read_text()) if file.is_file() else {}
            found = config.get(self.script, mine)["options"]
            if config.keys() - SCRIPTS:
                raise ValueError("it has other entries")
        for name in vars(self.args).keys() - FREE - FILES if resumed else ():
            edited, own = found.get(name), getattr(self.args, name)
            if edited != own:
                what = f"in {file} {name} is {edited}, in last.pt {own}: one of them was edited, or is of another run"
                raise ValueError(f"{what}; put back the right last.pt, or {way}.")
        if not resumed and self.rank == 0:
            replace(file, f"{json.dumps({**config, self.script: mine}, indent=1)}\n".encode())

    def on_signal(self, number: int, _frame) -> None:
        """Stops the run after its step; a second Ctrl-C stops it at once."""
        self.signalled = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def open_splits(self) -> tuple:
        """The training split, augmented, and the validation split, as the options say."""
        names = ("root", "modalities", "seed", "limit", "depth", "label_map", "skip_broken", "classes", "hold_out")
        same = {name: getattr(self.args, name) for name in names}
        train = open_dataset(self.args.data, split="train", size=self.args.size, augment=True, **same)
        val = open_dataset(self.args.data, split="val", size=self.args.val_size, ranges=train.ranges, **same)
        broken = [f"left out: {problem}" for problem in (*train.broken, *val.broken)]
        self.say("\n".join([*broken, train.describe(), val.describe()]))
        self.val_frames = frame_names(val)  # a best score is of these
        val.unseen()  # refused without any labelled pixel, as train is
        if never := train.unseen():
            self.say(f"warning: no pixel of the train split is {', '.join(never[:9])}{', ...' if never[9:] else ''}")
        return train, val

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model as the loop calls it: its gradients, and on GPUs BatchNorm's statistics, are over all processes."""
        if self.world > 1:
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # a remark on speed
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model) if self.device.type == "cuda" else model
            model = nn.parallel.DistributedDataParallel(model)
        return model

    def autocast(self) -> torch.autocast:
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.args.amp)
        return torch.autocast(self.device.type, kind, enabled=kind is not None)

    def reduce(self, x: Tensor, op=dist.ReduceOp.SUM) -> Tensor:
        """Sum (or another `op`) over the processes, which all get the result."""
        if self.world > 1:
            dist.all_reduce(x := x.clone(), op)
        return x

    def meet(self) -> None:
        """Waits until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def say(self, text: str) -> None:
        if self.rank == 0:
            say(text)

    def save_model(self, name: str, model: nn.Module, meta: dict) -> None:
        if self.rank == 0:
            save_model(self.folder / f"{name}.pt", model, meta)
        self.meet()  # the others may read it next


class Phase:
    """A phase of a run: one model that learns, its step, its best score, and all that has a state.

    meta: what its model says of itself (`checkpoint.describe`); state: what to continue from, or None; calls: a
    module around the model that the loop calls instead of it. A training loop iterates over `batches`: it draws from
    `generator`, calls `model` under `Run.autocast`, then `learn` with the losses and `keep`.
    """

    def __init__(self, run: Run, name: str, model: nn.Module, epochs: float, meta: dict, state, calls=None):
        args = run.args
        self.run, self.name, self.meta, self.learner = run, name, meta, model
        self.log_file = run.folder / "log.jsonl"
        self.model = run.parallel(calls or model)
        self.optimizer = loop.adamw(model, args.lr)
        # Keeps small fp16 gradients from becoming zero; does nothing for other types.
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=args.amp == "fp16")
        self.parts = {"model": model, "optimizer": self.optimizer, "scaler": self.scaler}
        self.per_epoch = meta["frames"] / args.batch_size  # steps, a fraction too: the stream of frames has no gap
        self.steps = max(1, math.ceil(epochs * self.per_epoch))
        self.warmup = min(round(args.warmup_epochs * self.per_epoch), self.steps // 2)
        self.eval_steps = max(1, round(args.eval_every * self.per_epoch))
        self.step, self.best = 0, -1.0
        if state:
            self.restore(run.folder / "last.pt", state)
        else:
            self.save()  # a folder without a checkpoint has done nothing, and too full a disk shows now
        self.sums, self.began, self.waited, self.reported = {}, time.monotonic(), 0.0, self.step

    def restore(self, file: Path, state: dict) -> None:
        """Continues from the last checkpoint, without what was logged since: that will be logged again."""
        run, meta = self.run, self.meta
        known = ("backbone", "frames", "frame names", *SAME, "teacher", "sources")
        require(file, state["meta"], {key: meta[key] for key in known if key in meta})
        require(file, state, {"val_frames": run.val_frames, "phase": self.name})
        for key, part in self.parts.items():
            with fitting(f"{file} does not hold the {key} of this phase"):
                part.load_state_dict(state["parts"][key])
        self.step, self.best = state["step"], state["best"]
        best = run.folder / f"{self.name}.pt"
        if not has_model(best, meta) and self.best >= 0:
            if self.step == self.steps:
                raise FileNotFoundError(f"{best} is missing, and its training is over: put it back.")
            run.say(f"note: {best}, the best model so far, is missing; the best from now on will be kept")
            self.best = -1.0
        run.say(f"continuing {self.name} at step {self.step} of {self.steps}")
        if state["threads"] != (now := torch.get_num_threads()):
            run.say(f"note: the run had {state['threads']} threads and now has {now}: its last bits will differ")
        if run.rank == 0 and self.log_file.exists():
            lines = self.log_file.read_bytes()[: state["logged"]].splitlines(keepends=True)
            whole = [line for line in lines if line.rstrip().endswith(b"}")]  # a crash tears lines
            replace(self.log_file, b"".join(whole))

    def save(self) -> None:
        """last.pt, all that `--resume` continues from. Ends the run if a signal or the clock asked for that."""
        run = self.run
        if run.rank == 0:
            state = {"script": run.script, "phase": self.name, "step": self.step, "steps": self.steps}
            state |= {"best": self.best, "val_frames": run.val_frames, "meta": self.meta, "options": vars(run.args)}
            state["logged"] = self.log_file.stat().st_size if self.log_file.exists() else 0  # bytes
            state["parts"] = {key: part.state_dict() for key, part in self.parts.items()}
            state["threads"] = torch.get_num_threads()
            write(run.folder / "last.pt", state, keep_previous=True)
        if run.stopping:
            run.meet()  # torchrun ends the others soon after the first has left
            number = signal.Signals(run.stopping)
            name = f"--max-minutes {run.args.max_minutes:g}" if number == signal.SIGALRM else number.name
            run.say(f"stopped by {name} after step {self.step}; continue with --resume {run.folder}")
            raise SystemExit(loop.EXIT_STATUS[run.stopping])

    def batches(self, dataset) -> Iterator[tuple[Tensor, Tensor]]:
        """From this step on: images (B, M, 3, H, W) normalised and labels (B, H, W) int64, on the device. Before each
        batch the learning rate is set and all chance is seeded by the step, `generator` equally on all processes."""
        run, args, asked = self.run, self.run.args, time.monotonic()
        keys = loop.batch_keys(len(dataset), args.batch_size, args.seed, range(self.step, self.steps), run.share)
        for images, labels, self.names in loop.loader(dataset, keys, args.workers, run.device):
            self.waited += time.monotonic() - asked
            self.lr = loop.set_learning_rate(self.optimizer, self.step, self.steps, self.warmup, args.lr)
            self.generator = loop.seed_step(args.seed, self.name, self.step, run.rank)
            self.model.train()
            yield images, labels
            asked = time.monotonic()

    def learn(self, losses: dict[str, Tensor]) -> None:
        """One step of the optimizer on the sum of the losses, unless it or the gradient is not finite."""
        self.scaler.scale(sum(losses.values())).backward()
        self.check(losses)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1

    def check(self, losses: dict[str, Tensor]) -> None:
        """After backward: a loss or gradient that is not finite ends the run before it reaches the weights; else the
        losses enter the next report. Here the host reads from the device, and the processes agree to stop."""
        run = self.run
        values = {name: value.detach() for name, value in losses.items()}
        if run.args.amp != "fp16":  # its scaler skips steps whose gradients overflow: so it finds the scale
            gradients = [p.grad for p in self.learner.parameters() if p.grad is not None]
            values["the gradient"] = torch.nn.utils.get_total_norm(gradients)
        flags = [~value.isfinite() for value in values.values()]
        stop = torch.tensor(int(run.signalled), device=run.device)
        *bad, run.stopping = run.reduce(torch.stack([*flags, stop]).int(), dist.ReduceOp.MAX).tolist()
        if any(bad):
            what = " and ".join(name for name, flag in zip(values, bad, strict=True) if flag)
            what += f" of phase {self.name}, step {self.step} is not finite"
            batch = f"frames of the batch of process {run.rank}: {', '.join(self.names)}"
            raise ValueError(f"{what}; {batch}. The weights were not updated; try a smaller --lr.")
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()

    def keep(self, predict: Callable, dataset, subsets: list[tuple[int, ...]]) -> None:
        """After a step, when each is due: a report, a validation, the best model, and last.pt; then the run may end.
        predict: as for `loop.validate`."""
        run = self.run
        if self.due(50) or run.stopping:
            self.report()
        if self.due(self.eval_steps):
            scores = loop.validate(predict, dataset, subsets, run)
            self.log(scores)
            if scores["miou"] > self.best:
                self.best = scores["miou"]
                run.save_model(self.name, self.learner, self.meta)
        if self.due(run.args.save_every) or run.stopping:
            self.save()

    def due(self, steps: int) -> bool:
        return self.step % steps == 0 or self.step == self.steps

    def report(self) -> None:
        """Logs the means since the last report."""
        run, steps = self.run, self.step - self.reported
        seconds = max(time.monotonic() - self.began, 1e-9)
        means = run.reduce(torch.stack(list(self.sums.values()))) / (steps * run.world)
        speed = steps / seconds
        values = dict(zip(self.sums, means.tolist(), strict=True))
        values |= {"lr": self.lr, "data_wait": self.waited / seconds, "images_per_second": speed * run.args.batch_size}
        values["peak_memory_mb"] = loop.peak_memory(run.device)
        self.log({**values, "minutes_left": (self.steps - self.step) / speed / 60})
        self.sums, self.began, self.waited, self.reported = {}, time.monotonic(), 0.0, self.step

    def log(self, values: dict[str, float]) -> None:
        """A line of log.jsonl, and one to read."""
        values = {name: float(f"{value:.6g}") for name, value in values.items()}
        line = {"phase": self.name, "step": self.step, "epoch": self.step / self.per_epoch, **values}
        if self.run.rank == 0:
            try:
                with open(self.log_file, "a") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                text = f"cannot write {self.log_file} ({error.strerror}): mend that, then --resume {self.run.folder}"
                raise OSError(text) from error
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.run.say(f"{self.name} step {self.step} of {self.steps}: {shown}")


def guarded(main: Callable, *arguments) -> int:
    """Runs a script's main -> exit status. An error that the user can mend is one sentence on stderr, status 2."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None: closed from the start
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may hold what the terminal cannot print
    try:
        main(*arguments)
        return 0
    except SystemExit as end:
        return end.code
    except KeyboardInterrupt:
        return loop.EXIT_STATUS[signal.SIGINT]
    except Exception as error:
        mendable, text = isinstance(error, (ValueError, OSError)), str(error).strip()
        if text.startswith("Caught "):  # a loader worker sends a traceback, the sentence in its last line
            text = text.splitlines()[-1].partition(": ")[2]
        reason = f" ({text.splitlines()[0]})" if text else ""
        if re.search(NO_WORKER, text):
            mendable, text = True, f"a loader worker died or found too little shared memory: use --workers 0{reason}"
        elif isinstance(error, MemoryError) or re.search(NO_MEMORY, text, re.IGNORECASE):
            mendable, text = True, f"out of memory: a smaller --batch-size or --size needs less{reason}"
        print(f"\nerror: {text}" if mendable else traceback.format_exc(), file=sys.stderr)
        # The loader lives on in the frames of the error, its workers with it, and Python would wait for them for ever.
        traceback.clear_frames(error.__traceback__)
        return 2 if mendable else 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
