"""Kills runs of both stages at random moments, resumes them, and compares with the uninterrupted run bit for bit.

    python tests/kill_and_resume.py 20          # 20 kills of each stage; exit status 0 if every run ended equal

A run is killed (SIGKILL) again and again until it is through; the next kills are for the next run. Moments are uniform
over the time that the uninterrupted run took, so they hit loading, steps, validation and saving alike.
"""

import contextlib
import os
import pathlib
import random
import signal
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch

import train_stage1
import train_stage2
from engine import runs
from engine.checkpoint import FILES, FREE

SMALL2 = "--limit 8 --size 32 --batch-size 4 --eval-every 1 --save-every 2 --device cpu".split()
SMALL = [*SMALL2, "--modalities", "rgb,depth,lidar"]  # stage 2 takes the modalities from its models
STAGE1 = "--epochs 2 --distill-epochs 2 --backbone segformer_tiny".split()
STAGE2 = "--fsm-epochs 1 --student-epochs 2".split()


def train(stage: int, argv: list[str]) -> int:
    """A training script in this process -> its exit status."""
    return runs.guarded((train_stage1.main, train_stage2.main)[stage - 1], argv)


def differences(a: pathlib.Path, b: pathlib.Path) -> list[str]:
    """What is not equal, bit for bit, in the checkpoints of two run folders."""
    files = sorted({file.name for folder in (a, b) for file in folder.glob("*.pt")} - {"last.previous.pt"})
    found, free = [], {"last.pt/logged", *(f"last.pt/options/{name}" for name in FREE | FILES)}

    def compare(where: str, x, y) -> None:
        if isinstance(x, dict) and isinstance(y, dict) and x.keys() == y.keys():
            for key in x:
                compare(f"{where}/{key}", x[key], y[key])
        elif isinstance(x, list) and isinstance(y, list) and len(x) == len(y):
            for i, pair in enumerate(zip(x, y, strict=True)):
                compare(f"{where}/{i}", *pair)
        elif torch.is_tensor(x) and torch.is_tensor(y):
            if x.dtype != y.dtype or not torch.equal(x, y):
                found.append(f"{where}: {x.flatten()[:3].tolist()} and {y.flatten()[:3].tolist()} ...")
        elif x != y and where not in free:  # the log's length changes with the digits of its times
            found.append(f"{where}: {x} and {y}")

    for name in files:
        if not ((a / name).exists() and (b / name).exists()):
            found.append(f"{name} is in one folder only")
        else:
            compare(name, *(torch.load(folder / name, weights_only=True) for folder in (a, b)))
    return found


def spawn(stage: int, argv: list[str], log: pathlib.Path) -> int:
    """`train` in a child process, which finds torch loaded -> its process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            status = train(stage, argv)
        os._exit(status)
    return pid


def kill_and_resume(stage: int, start: list[str], kills: int, folder: pathlib.Path, rng: random.Random) -> bool:
    """Kills runs of a stage until `kills` is reached -> whether all of them ended as the uninterrupted one did."""
    log, began = folder / f"stage{stage}.txt", time.time()
    _, status = os.waitpid(spawn(stage, [*start, "--out", str(folder / f"whole{stage}")], log), 0)
    length, done, equal, runs = time.time() - began, 0, status == 0, 0
    while done < kills and equal:
        out, runs, begun = folder / f"killed{stage}.{runs + 1}", runs + 1, False
        while True:
            pid = spawn(stage, ["--resume", str(out)] if begun else [*start, "--out", str(out)], log)
            end = time.time() + rng.uniform(0, length) if done < kills else float("inf")
            while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.time() < end:
                time.sleep(0.002)
            if ended[0]:
                break
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            done, begun = done + 1, any(out.glob("last*.pt"))  # killed between two renames, only the previous is there
        unequal = differences(folder / f"whole{stage}", out)
        equal = ended[1] == 0 and not unequal
        if not equal:
            print(
                f"stage {stage}, run {runs}: exit status {ended[1]}, {unequal[:5]}",
                *log.read_text().splitlines()[-5:],
                sep="\n",
            )
    print(
        f"stage {stage}: {done} kills, {runs} runs resumed to the end, "
        f"{'all equal to the uninterrupted run, bit for bit' if equal else 'NOT equal'}"
    )
    return equal


def main(kills: int, seed: int = 0) -> int:
    torch.set_num_threads(1)
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        first = kill_and_resume(1, SMALL + STAGE1, kills, folder, rng)
        start = ["--stage1", str(folder / "whole1"), *SMALL2, *STAGE2]
        second = first and kill_and_resume(2, start, kills, folder, rng)
    return 0 if first and second else 1


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])) if len(sys.argv) > 1 else __doc__)
