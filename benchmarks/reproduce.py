"""The verdict of docs/results.md: its rows as commands that can be read and copied, one after the other.

    python -m benchmarks.reproduce scenes                     # = make reproduce; painted scenes, seeds 0, 1, 2
    python -m benchmarks.reproduce nyu --root data            # real frames, RGB and depth, ImageNet encoder (lite0.py)
    python -m benchmarks.reproduce deliver --root data/DELIVER --device cuda:0,cuda:1,cuda:2 --pretrained mit_b0.pth
    python -m benchmarks.reproduce scenes --dry-run           # prints the commands

A device trains one seed after the other, and its rows one at a time. The same command goes on where it was interrupted.
Runs lie in runs/reproduce/SETTING/seedN/ROW. Each score enters benchmarks/results/SETTING.json as soon as it is there;
a row that stands in that file with the same commands is not trained again, and no row ever leaves it.
"""

import argparse
import fcntl
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from threading import Lock
from typing import NamedTuple

from data import by_comma
from engine.checkpoint import fitting
from engine.options import COUNT_OR_0, Parser
from engine.output import replace
from engine.runs import guarded
from engine.subsets import all_subsets
from evaluate import subset_name

ROOT = Path(__file__).parents[1]
RDEL = "rgb,depth,event,lidar"


class Setting(NamedTuple):
    title: str
    train: str  # options of the training scripts that all rows have
    teacher: str  # what more a run has that starts from scratch
    epochs: tuple[float, float, float]  # of the teacher, of each model that starts from it, of the FSM
    modalities: str
    split: str = "test"  # that chose nothing
    evaluate: str = ""
    prefix: str = ""  # a module that runs the scripts
    distil: str = ""  # what more a run has that starts from the teacher


TINY = "--batch-size 16 --warmup-epochs 1 --eval-every 10000"  # validated at the end alone: last weights are kept
SCENES = dict(train=f"--limit 300 {TINY}", epochs=(160, 48, 5), modalities=RDEL, evaluate="--limit 300")
FRAMES = "--data nyuv2 --classes 13 --depth raw --backbone segformer_lite0 --modalities {modalities} --lr 1e-3"
NYU = dict(
    train=f"--size 120 {TINY}", teacher=FRAMES, distil="--lr 5e-4", epochs=(20, 10, 3), prefix="-m benchmarks.lite0"
)
PAPERS = dict(train="--workers 8", epochs=(200, 120, 10), split="val")
SETTINGS = {
    "scenes": Setting("painted scenes, segformer_tiny", teacher="--backbone segformer_tiny", **SCENES),
    "scenes_cmnext": Setting("painted scenes, cmnext_tiny", teacher="--backbone cmnext_tiny", **SCENES),
    "nyu": Setting("NYU Depth v2, RGB and depth, ImageNet encoder", modalities="rgb,depth", **NYU),
    "nyu_four": Setting("NYU Depth v2, event and lidar derived, ImageNet encoder", modalities=RDEL, **NYU),
    "deliver": Setting("DELIVER", teacher="--data deliver", modalities=RDEL, **PAPERS),
    "muses": Setting("MUSES", teacher="--data muses", modalities="rgb,event,lidar", **PAPERS),
    "mcubes": Setting("MCubeS", teacher="--data mcubes", modalities="rgb,aolp,dolp,nir", **PAPERS | {"split": "test"}),
}


class Row(NamedTuple):
    name: str
    label: str  # in the picture, if any
    what: str  # in the table
    train: str  # a command; the rows whose folders {seed}/ROW it reads are trained first. Or the row whose run it uses
    take: str = "robust"  # the row's name in evaluate.py's table
    evaluate: str = ""
    against: str = "dropped"  # the row that it is compared with, in the table's Δ, if any


# {long} teacher, {short} a model that starts from it, {both} robust model and student, {all} these three, in epochs
TEACHER = "train_stage1.py {new} --epochs %s --distill-epochs 0"
FROM = "train_stage1.py --teacher {seed}/teacher/teacher.pt --distill-epochs "
VARIANT = "benchmarks/variants.py %s --teacher {seed}/teacher/teacher.pt --distill-epochs {short}"
STAGE2 = "train_stage2.py --stage1 {seed}/hpdm --fsm-epochs {fsm} --student-epochs "
ROWS = [
    Row("teacher", "teacher", "teacher", TEACHER % "{long}", "teacher"),
    Row("longer", "teacher, all", "teacher, as long as all three models", TEACHER % "{all}", "teacher",
        against="dropped_longer"),
    Row("dropped", "dropping", "modalities dropped, CE", FROM + "{short} --lambda-kl 0 --alpha 0", against=""),
    Row("dropped_longer", "dropping, long", "the same, as long as robust model and student",
        FROM + "{both} --lambda-kl 0 --alpha 0", against=""),
    Row("kl", "CE+KL", "CE + KL", FROM + "{short} --alpha 0"),
    Row("hpdm", "HPDM", "CE + KL + HPDM, random matching (the paper)", FROM + "{short}"),
    Row("authors", "authors'", "the authors' script: same matching, published prototypes",
        VARIANT % "published" + " --match same"),
    Row("anyseg", "AnySeg", "AnySeg's losses", VARIANT % "anyseg"),
    Row("zero", "HPDM zero", "the paper, absent modalities as zero images", FROM + "{short} --absent zero"),
    Row("switch", "switch", "switch: teacher if complete, else robust model", "hpdm", "switch"),
    Row("student", "student", "student", STAGE2 + "{short}", "student", against="dropped_longer"),
    Row("fsm", "FSM", "FSM, scores that know what is missing", "student", "FSM ensemble"),
    Row("hard", "FSM hard", "FSM, published hard rule", STAGE2 + "0 --rule candidate", "FSM ensemble",
        "--fsm-rule hard"),
    Row("single", "single", "single model (train_single.py), as long as all three",
        "train_single.py {new} --epochs {all}", "single", against="dropped_longer"),
    Row("same", "", "CE + KL + HPDM, same matching", FROM + "{short} --match same"),
    Row("alpha1", "", "the paper, alpha 1", FROM + "{short} --alpha 1"),
    Row("alpha10", "", "the paper, alpha 10", FROM + "{short} --alpha 10"),
]  # fmt: skip
BY_NAME = {row.name: row for row in ROWS}
ABLATIONS = [BY_NAME[name] for name in ("same", "alpha1", "alpha10")]  # of HPDM: a table of their own
CHILDREN = []  # the commands that were started


def seeds(text: str) -> list[int]:
    return list(dict.fromkeys(COUNT_OR_0(seed) for seed in by_comma(text)))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("reproduce.py", __doc__)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--root", type=lambda folder: ["--root", folder], default=[], help="folder of the data set")
    parser.add_argument("--seeds", type=seeds, default=[0, 1, 2], help="by comma")
    parser.add_argument("--rows", type=by_comma, default=list(BY_NAME), help="by comma; default: all")
    parser.add_argument("--pretrained", metavar="FILE", help="start weights of what starts from scratch")
    parser.add_argument("--device", type=by_comma, default=["cpu"], help="by comma; they share the seeds")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.rows) - set(BY_NAME)):
        parser.error(f"--rows {unknown[0]} is unknown; choose of {', '.join(BY_NAME)}.")
    if args.pretrained == "":
        parser.error("--pretrained is empty; is a variable of the shell not set?")
    args.rows = [BY_NAME[name] for name in args.rows]
    return args


def command(args: argparse.Namespace, row: Row, seed: str) -> list[str]:
    """The training command of a row, without --out and --device. `seed` is the seed's folder, ending in its number."""
    s, (long, short, fsm) = SETTINGS[args.setting], SETTINGS[args.setting].epochs
    data = s.teacher.format(modalities=s.modalities)
    new = f"{data} --pretrained {shlex.quote(args.pretrained)}" if args.pretrained else data
    epochs = dict(long=long, short=short, both=2 * short, all=long + 2 * short, fsm=fsm)
    script, *options = shlex.split(row.train.format(seed=seed, new=new, **epochs))
    options += f"{data} {s.distil}".split() if "--teacher" in options else []  # stage 2 takes its data from the models
    script = ["-m", "benchmarks.variants"] if "/" in script and not s.prefix else [script]
    return [*s.prefix.split(), *script, *options, *s.train.split(), "--seed", seed.rpartition("seed")[2]]


def score(file: Path, row: Row, modalities: list[str]) -> dict[str, float]:
    """The papers' columns from the scores of evaluate.py: mIoU in per cent, absent classes counted as 0."""
    found = json.loads(file.read_text())["results"][row.take]
    found = {p: {c: s["miou_published"] for c, s in columns.items()} for p, columns in found.items()}
    *some, full = (subset_name(subset, modalities) for subset in all_subsets(len(modalities)))
    weak = {c: found["any"][c] for c in some if c == "EL" or len(some) == 2}
    scores = {"full": found["any"][full], **weak, "missing": fmean(found["any"][c] for c in some)}
    return scores | {p.upper(): fmean(found[p].values()) for p in ("emm", "rmm", "nm")}


class Results:
    """benchmarks/results/SETTING.json: rows are added, none is removed, and none changes its commands."""

    def __init__(self, setting: str):
        self.file, self.lock = ROOT / "benchmarks/results" / f"{setting}.json", Lock()
        self.data = {"title": SETTINGS[setting].title, "labels": {}, "what": {}, "commands": {}, "scores": {}}
        if self.file.exists():
            with fitting(f"{self.file} holds no results of this setting; move it away"):
                self.data = json.loads(self.file.read_text())
                if self.data["title"] != SETTINGS[setting].title:
                    raise ValueError(f"its title is {self.data['title']}")
                found = self.data["scores"]
                cells = [scores for seeds in found.values() for scores in seeds.values()]
                if any(found.keys() != self.data[key].keys() for key in ("labels", "what", "commands")):
                    raise ValueError("its labels, texts and commands are not those of its rows")
                if not all(seed.isdecimal() for seeds in found.values() for seed in seeds):
                    raise ValueError("a seed is no number")
                if any(not scores or scores.keys() != cells[0].keys() for scores in cells) or not all(found.values()):
                    raise ValueError("its rows differ in columns, or have none")
                if not all(0 <= value <= 100 for scores in cells for value in scores.values()):
                    raise ValueError("a score is not in 0..100")

    def has(self, row: Row, seed: int, text: str) -> bool:
        known = self.data["commands"].get(row.name, text)
        if known != text:
            raise ValueError(f"{self.file} has {row.name} by other commands: {known}\nNow: {text}\nMove the file away.")
        return str(seed) in self.data["scores"].get(row.name, {})

    def add(self, row: Row, seed: int, text: str, scores: dict) -> None:
        with self.lock:
            for key, value in (("labels", row.label), ("what", row.what), ("commands", text)):
                self.data[key][row.name] = value
            self.data["scores"].setdefault(row.name, {})[str(seed)] = scores
            replace(self.file, f"{json.dumps(self.data, indent=1)}\n".encode())


def run(words: list[str], device: str, log: Path) -> None:
    """Runs a command of this repository; raises ValueError with its last line if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": "1"} if device == "cpu" else {}  # beside another run, one thread is faster than two
    with open(log, "a") as file:
        whole = [sys.executable, *words, "--device", device]
        CHILDREN.append(child := subprocess.Popen(whole, stdout=file, stderr=file, env=os.environ | threads))
    if status := child.wait():
        said = log.read_text().splitlines() or ["nothing was said"]
        raise ValueError(f"{shlex.join(words)} ended with {status}: {said[-1]}")


def chain(row: Row) -> list[Row]:
    """What is trained for a row, in order: the rows whose runs it reads, then the one whose run it uses."""
    owner = BY_NAME.get(row.train, row)
    return [*(first for name in re.findall(r"{seed}/(\w+)", owner.train) for first in chain(BY_NAME[name])), owner]


def described(args: argparse.Namespace, row: Row) -> str:
    """The command of a row as it stands in the results: the seed has no number, and the data no place."""
    return shlex.join([*command(args, chain(row)[-1], "seed"), *row.evaluate.split()])


def train(args: argparse.Namespace, row: Row, base: Path, device: str) -> Path:
    """The run folder of a row. It is trained now if it is not complete."""
    folder, done, words = base / row.name, base / f"{row.name}.done", command(args, row, str(base))
    if not (done.exists() and folder.is_dir()):
        way = "--resume" if (folder / "last.pt").exists() else "--out"  # resumed, the script compares the options
        run([*words, *args.root, way, str(folder)], device, base / f"{row.name}.log")
        done.write_text(shlex.join(words))
    elif done.read_text() != shlex.join(words):
        raise ValueError(f"{folder} was trained by {done.read_text()}, now {shlex.join(words)}: move {base} away.")
    return folder


def train_seeds(args: argparse.Namespace, results: Results, seeds: list[int], device: str) -> None:
    """Trains and evaluates the rows of these seeds that are not there yet, one after the other."""
    s = SETTINGS[args.setting]
    for seed, row in itertools.product(seeds, args.rows):
        base, text = Path("runs/reproduce", args.setting, f"seed{seed}"), described(args, row)
        if results.has(row, seed, text):
            continue
        model, file = [train(args, part, base, device) for part in chain(row)][-1], base / f"{row.name}.json"
        for name in ("teacher.pt", "robust.pt") if (model / "fsm.pt").exists() else ():  # an ensemble lies together
            if not (model / name).exists():
                (model / name).symlink_to(Path("..", "hpdm", name))
        if row.take not in ("switch", "FSM ensemble"):
            model /= f"{row.take}.pt"
        words = [*s.prefix.split(), "evaluate.py", str(model), "--only", row.take, "--protocol", "any,emm,rmm,nm"]
        words += ["--split", s.split, *s.evaluate.split(), *row.evaluate.split(), *args.root, "--json", str(file)]
        run(words, device, base / f"{row.name}.log")
        results.add(row, seed, text, found := score(file, row, s.modalities.split(",")))
        print(f"seed {seed}, {row.what}: {', '.join(f'{k} {v:.2f}' for k, v in found.items())}", flush=True)


def signed(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}"  # never -0.0


def table(data: dict, ablations: bool = False) -> str:
    """The Markdown table of a results file: mean over the seeds, ± half the range where there are several.

    Δ: minus the row `against`, paired by seed: mean, and where there are several the range.
    """
    rows = [row for row in ROWS if row.name in data["scores"] and (row in ABLATIONS) == ablations]
    if not rows:
        return ""
    columns = list(next(iter(data["scores"][rows[0].name].values())))
    lines = [["row", *columns, "Δ full", "Δ missing", "seeds"], ["---", *["---:"] * (len(columns) + 3)]]
    for row in rows:
        seeds, others = data["scores"][row.name], data["scores"].get(row.against, {})
        texts = []
        for column in columns:
            values = [scores[column] for scores in seeds.values()]
            texts.append(f"{fmean(values):.1f}" + (f" ± {(max(values) - min(values)) / 2:.1f}" if values[1:] else ""))
        for column in ("full", "missing"):
            apart = [seeds[seed][column] - others[seed][column] for seed in seeds if seed in others]
            ends = f" ({signed(min(apart))} to {signed(max(apart))})" if apart[1:] else ""
            texts.append(signed(fmean(apart)) + ends if apart else "")
        lines.append([data["what"][row.name], *texts, str(len(seeds))])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    os.chdir(ROOT)
    if args.dry_run:
        rows = dict.fromkeys(part for row in args.rows for part in chain(row))
        for seed, row in itertools.product(args.seeds, rows):
            base = f"runs/reproduce/{args.setting}/seed{seed}"
            more = [*args.root, "--out", f"{base}/{row.name}", "--device", args.device[0]]
            print("python", shlex.join([*command(args, row, base), *more]))
        return
    lock = Path("runs/reproduce", args.setting, "lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "a") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            what = f"another reproduce runs {args.setting}"
            raise ValueError(f"{what}: wait, or give it all seeds and devices.") from None
        train_all(args)


def train_all(args: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, lambda *_: [child.terminate() for child in CHILDREN])  # their failure ends the loops
    results = Results(args.setting)
    for row in args.rows:
        results.has(row, 0, described(args, row))  # other commands are refused now, not after hours
    step = len(args.device)
    with ThreadPoolExecutor(step) as pool:
        shares = [(args.seeds[i::step], device) for i, device in enumerate(args.device)]
        for found in [pool.submit(train_seeds, args, results, *share) for share in shares]:
            found.result()
    print(table(results.data), table(results.data, ablations=True), sep="\n\n")


if __name__ == "__main__":
    sys.exit(guarded(main))
