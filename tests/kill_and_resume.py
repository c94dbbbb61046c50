"""Kills runs of both stages at random moments, resumes them, and compares with the uninterrupted run bit for bit.

    python tests/kill_and_resume.py 20          # 20 kills of each stage; exit status 0 if every run ended equal

A run is killed (SIGKILL) again and again until it is through; the next kills are for the next run. Moments are uniform
over the time that the uninterrupted run took, so they hit loading, steps, validation and saving alike.
"""

import contextlib
import functools
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


def leaves(x, where: str = "") -> dict:
    """Every tensor and value in nested dictionaries and lists, by its place."""
    if not isinstance(x, (dict, list)) or not len(x):
        return {where: x}
    parts = x.items() if isinstance(x, dict) else enumerate(x)
    return {place: leaf for key, part in parts for place, leaf in leaves(part, f"{where}/{key}").items()}


def same(x, y) -> bool:
    if torch.is_tensor(x) and torch.is_tensor(y):
        return x.dtype == y.dtype and torch.equal(x, y)
    return torch.is_tensor(x) == torch.is_tensor(y) and x == y


def differences(a: pathlib.Path, b: pathlib.Path) -> list[str]:
    """The places in the checkpoints of two run folders where they are not equal, bit for bit."""
    one, other = (leaves({f.name: torch.load(f, weights_only=True) for f in folder.glob("*.pt")}) for folder in (a, b))
    free = {"/last.pt/logged", "/last.pt/checksum"}  # the log has times: its length differs, and so the checksum
    free |= {f"/last.pt/options/{name}" for name in FREE | FILES}
    places = [place for place in one | other if place not in free and not place.startswith("/last.previous.pt")]
    return [place for place in places if not same(one.get(place, "absent"), other.get(place, "absent"))]


def spawn(log: pathlib.Path, act) -> int:
    """act() in a child process, which finds torch loaded; its exit status is what act returns -> its process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            status = act()
        os._exit(status)
    return pid


def kill_and_resume(stage: int, start: list[str], kills: int, folder: pathlib.Path, rng: random.Random) -> bool:
    """Kills runs of a stage until `kills` is reached -> whether all of them ended as the uninterrupted one did."""
    log, whole, began = folder / f"stage{stage}.txt", folder / f"whole{stage}", time.time()
    _, status = os.waitpid(spawn(log, functools.partial(train, stage, [*start, "--out", str(whole)])), 0)
    length, done, equal, runs = time.time() - began, 0, status == 0, 0
    while done < kills and equal:
        runs, out = runs + 1, folder / f"killed{stage}.{runs + 1}"
        argv = [*start, "--out", str(out)]
        while True:
            pid = spawn(log, functools.partial(train, stage, argv))
            end = time.time() + rng.uniform(0, length) if done < kills else float("inf")
            while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.time() < end:
                time.sleep(0.002)
            if ended[0]:
                break
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            done += 1
            if any(out.glob("last*.pt")):  # killed between two renames, only the previous is there
                argv = ["--resume", str(out)]
        unequal = differences(whole, out)
        equal = ended[1] == 0 and not unequal
        if not equal:
            print(f"stage {stage}, run {runs}: exit status {ended[1]}, {unequal[:5]}\n{log.read_text()[-600:]}")
    verdict = "all equal to the uninterrupted run, bit for bit" if equal else "NOT equal"
    print(f"stage {stage}: {done} kills, {runs} runs resumed to the end, {verdict}")
    return equal


def main(kills: int, seed: int = 0) -> int:
    torch.set_num_threads(1)
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        equal = kill_and_resume(1, [*SMALL, *STAGE1], kills, folder, rng)
        second = [*SMALL2, *STAGE2, "--stage1", str(folder / "whole1")]
        equal = equal and kill_and_resume(2, second, kills, folder, rng)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])) if len(sys.argv) > 1 else __doc__)
