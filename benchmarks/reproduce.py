"""Does the method do what its papers say? A declared list of rows, on any data set, over several seeds.

    python -m benchmarks.reproduce                               # synthetic scenes, all rows; or: make reproduce
    python -m benchmarks.reproduce --data nyuv2 --root data --rows main,sweep
    python -m benchmarks.reproduce --data deliver --root data/DELIVER --rows teacher,anyseg,hpdm,student \\
        --backbone segformer_b0,segformer_b2 --pretrained mit_b0.pth,mit_b2.pth --seeds 1

Every run is a command line of a training script, every row an evaluation on a split that chose nothing (DELIVER and
MUSES: val, as published). The same command goes on where it was interrupted; --dry-run shows what is left to do. Writes
runs/reproduce/NAME/seed*/ and benchmarks/results/NAME.md and .json; `python -m benchmarks.figures sweep` draws them.
"""

import argparse
import datetime
import itertools
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

import torch

ROOT = pathlib.Path(__file__).parents[1]
RDEL = "rgb,depth,event,lidar"
TINY = "--batch-size 16 --lr 2e-3 --warmup-epochs 1 --eval-every 10000"  # validated at the end alone: last weights kept
# epochs: of the teacher, of each model that starts from it, of the FSM; flags: of both training scripts
PUBLISHED = dict(backbone="segformer_b0", epochs="200,120,10", classes=25, modalities=RDEL, split="val", flags="")
RECIPES = {
    "synthetic": dict(backbone="segformer_tiny", epochs="160,48,5", classes=12, modalities=RDEL, split="test",
                      flags="--limit 300 " + TINY),
    "nyuv2": dict(backbone="segformer_tiny", epochs="40,20,5", classes=13, modalities="rgb,depth", split="test",
                  flags="--classes {classes} --depth raw --size 120 --hold-out 0 " + TINY),
    "deliver": PUBLISHED,
    "muses": dict(PUBLISHED, classes=19, modalities="rgb,event,lidar"),
    "mcubes": dict(PUBLISHED, classes=20, modalities="rgb,aolp,dolp,nir", split="test"),
}  # fmt: skip


class Row(NamedTuple):
    """A row of the table. groups: its names for --rows. train: its run's flags; a row without is a view of `run`.

    take: its name in evaluate.py's table.  paper: full and mean of the CVPR 2026 version (DELIVER val, MiT-B0).
    """

    name: str
    groups: str
    what: str
    train: str = ""
    take: str = "robust"
    paper: tuple[float, float] | None = None
    run: str = ""
    evaluation: str = ""


# {x} is the folder of run x of the same seed; {long}, {short}, {both} (robust model and student together) and {fsm} are
# epochs; {lambda} and {alpha} are the published weights, normalised as here.
GROUPS = ("main", "sweep", "cvpr", "ablation", "stage2")
ROBUST, LONGER = (f"--teacher {{teacher}}/teacher.pt --distill-epochs {{{epochs}}}" for epochs in ("short", "both"))
CE = " --lambda-kl 0 --alpha 0"
KL = ROBUST + " --lambda-kl {lambda}"
HPDM = KL + " --alpha {alpha}"
VARIATION = " --beta 12 --variation all"
SELECT = "--stage1 {hpdm} --fsm-epochs {fsm} --student-epochs 0"
STUDENT = "--stage1 {hpdm} --fsm-epochs {fsm} --student-epochs {short}"
PLAIN = " --gamma-logits 0 --gamma-features 0"
UNCONDITIONED = " --unconditioned-student"
ROWS = [
    Row("teacher", "main", "teacher", "--epochs {long} --distill-epochs 0", "teacher"),
    Row("longer", "main", "teacher, trained on as long as robust model and student",
        "--pretrained {teacher}/teacher.pt --epochs {both} --distill-epochs 0", "teacher"),
    Row("dropped", "main", "modalities dropped, CE only", ROBUST + CE),
    Row("dropped_longer", "main", "the same, as long as robust model and student", LONGER + CE),
    Row("simple", "main", "the same, half of the inputs complete", LONGER + CE + " --complete 0.5"),
    Row("conditioned", "main", "the same, conditioned", LONGER + CE + " --complete 0.5 --conditioned"),
    Row("anyseg", "main", "AnySeg's losses", ROBUST + " --losses anyseg"),
    Row("kl_0.3", "sweep", "CE + KL, lambda 0.3", ROBUST + " --lambda-kl 0.3 --alpha 0"),
    Row("kl_1", "sweep", "CE + KL, lambda 1", ROBUST + " --lambda-kl 1 --alpha 0"),
    Row("kl", "main sweep cvpr", "CE + KL, published lambda", KL + " --alpha 0", paper=(61.34, 46.42)),
    *(Row(f"{match}_{a}", "sweep", f"+ HPDM, {match} matching, alpha {a}", f"{KL} --alpha {a} --match {match}")
      for match in ("random", "same") for a in (0.1, 1, 5)),
    Row("same", "main sweep", "+ HPDM, same matching, published alpha", HPDM + " --match same"),
    Row("hpdm", "main sweep cvpr", "+ HPDM, random matching, published alpha", HPDM, paper=(60.11, 49.06)),
    Row("prototypes", "ablation", "the same, published prototypes", HPDM + " --prototypes published"),
    Row("start", "ablation", "the same, from the teacher's start weights", HPDM + " --robust-from start"),
    Row("variation", "cvpr", "KL + feature variation", KL + " --alpha 0" + VARIATION, paper=(59.71, 47.51)),
    Row("both", "cvpr", "HPDM + feature variation", HPDM + VARIATION, paper=(61.11, 48.63)),
    Row("dominant", "cvpr", "the same, on dominant modalities", HPDM + " --beta 12", paper=(61.26, 49.10)),
    Row("feedback", "cvpr", "+ feedback to the teacher", HPDM + " --beta 12 --feedback 12", paper=(61.85, 49.91)),
    Row("switch", "main stage2", "switch: teacher if complete, else robust", "", "switch", run="hpdm"),
    Row("hard", "stage2", "FSM, hard rule", "", "FSM ensemble", run="candidate", evaluation="--fsm-rule hard"),
    Row("candidate", "stage2", "FSM, relaxed candidates", SELECT + " --rule candidate", "FSM ensemble"),
    Row("score", "stage2", "FSM, scores", SELECT + " --unconditioned-scores", "FSM ensemble"),
    Row("fsm", "main stage2", "FSM, conditioned scores", "", "FSM ensemble", run="student"),
    Row("neither", "stage2", "student without targets, not conditioned", STUDENT + PLAIN + UNCONDITIONED, "student"),
    Row("unconditioned", "stage2", "student, not conditioned", STUDENT + UNCONDITIONED, "student"),
    Row("untargeted", "stage2", "student without targets", STUDENT + PLAIN, "student"),
    Row("student", "main stage2", "student", STUDENT, "student"),
]  # fmt: skip
TRAIN = {row.name: row.train for row in ROWS if row.train}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; those unknown here go to both training scripts as they are (`args.flags`)."""
    parser = argparse.ArgumentParser("reproduce.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="All other options go to both training scripts.")  # fmt: skip
    names = ["all", *GROUPS, *(row.name for row in ROWS)]
    parser.add_argument("--data", choices=RECIPES, default="synthetic")
    parser.add_argument("--root", help="folder of the data set")
    parser.add_argument("--backbone", help="by comma; default segformer_tiny (synthetic, nyuv2) or segformer_b0")
    parser.add_argument("--pretrained", help="start weights of the teacher, by comma, a file for each backbone")
    parser.add_argument("--seeds", default="3", help="how many, from 0 on, or a list by comma, 0,2 (default 3)")
    parser.add_argument("--rows", default="all", help=f"groups and rows, by comma: {', '.join(names)}")
    parser.add_argument("--modalities", help="by comma; default: those of the papers, for nyuv2 rgb,depth")
    parser.add_argument("--classes", type=int, help="of nyuv2: 13 (default) or 40")
    parser.add_argument("--epochs", help="of the teacher, of each model that starts from it, of the FSM; as 160,48,5")
    parser.add_argument("--split", choices=("val", "test"), help="to evaluate on; val while choosing settings")
    parser.add_argument("--tag", help="a word that keeps the runs of other settings apart")
    parser.add_argument("--device", help="by comma, as cuda:0,cuda:1; default: all GPUs, or the CPU")
    parser.add_argument("--jobs", type=int, help="runs at a time on each device; default 1, on a CPU 2")
    parser.add_argument("--dry-run", action="store_true", help="print the commands that are left to do")
    parser.add_argument("--report-only", action="store_true", help="train nothing, tabulate what is there")
    args, args.flags = parser.parse_known_args(argv)
    for name, usual in RECIPES[args.data].items():
        if name != "flags":
            setattr(args, name, getattr(args, name) or usual)
    try:
        seeds = [int(seed) for seed in args.seeds.split(",") if seed]
        args.seeds = seeds if "," in args.seeds else list(range(*seeds))
        long, short, fsm = (float(epochs) for epochs in args.epochs.split(","))
    except (ValueError, TypeError):
        parser.error("--seeds must be a number or a list by comma, --epochs three numbers by comma.")
    present = (args.modalities.count(",") + 2) / 2  # of M modalities, on average
    args.values = {"long": f"{long:g}", "short": f"{short:g}", "both": f"{2 * short:g}", "fsm": f"{fsm:g}",
                   "lambda": f"{50 / args.classes:.3g}", "alpha": f"{100 / args.classes * present:.3g}"}  # fmt: skip
    backbones, rows = args.backbone.split(","), args.rows.split(",")
    weights = args.pretrained.split(",") if args.pretrained else [""] * len(backbones)
    if len(weights) != len(backbones):
        parser.error(f"--pretrained names {len(weights)} files for {len(backbones)} backbones.")
    args.backbone = dict(zip(backbones, weights, strict=True))
    if unknown := [name for name in rows if name not in names]:
        parser.error(f"--rows {unknown[0]} is unknown; choose of {', '.join(names)}.")
    args.rows = [row for row in ROWS if {"all", row.name, *row.groups.split()} & set(rows)]
    args.device = args.device or ",".join(f"cuda:{i}" for i in range(torch.cuda.device_count())) or "cpu"
    args.device = args.device.split(",") * (args.jobs or (2 if args.device == "cpu" else 1))
    return args


class Job(NamedTuple):
    """A command that can begin once the files `needs` are there; `done` says that it is finished, and holds `text`."""

    done: pathlib.Path
    needs: list[pathlib.Path]
    command: list[str]
    text: str = ""


def stem(args: argparse.Namespace, backbone: str) -> str:
    return "-".join(filter(None, (args.data, backbone, args.tag)))


def chain(run: str) -> list[str]:
    """A run after all that it starts from."""
    return [*(name for other in re.findall(r"{(teacher|hpdm)}", TRAIN[run]) for name in chain(other)), run]


def plan(args: argparse.Namespace) -> list[Job]:
    """What is left to do, the most important first: the main rows of every seed, then those of the other groups."""
    jobs: dict[pathlib.Path, Job] = {}
    recipe = RECIPES[args.data]["flags"].format(classes=args.classes)
    shared = ["--data", args.data, "--modalities", args.modalities, *recipe.split(), *args.flags]
    root = ["--root", args.root] if args.root else []
    for group, seed, (backbone, start) in itertools.product(GROUPS, args.seeds, args.backbone.items()):
        base = pathlib.Path("runs", "reproduce", stem(args, backbone), f"seed{seed}")
        values = {**args.values, "teacher": base / "teacher", "hpdm": base / "hpdm"}
        for row in [row for row in args.rows if row.groups.split()[0] == group]:
            if row.name == "feedback" and backbone.startswith("cmnext"):  # it needs one encoder for all modalities
                continue
            for run in chain(row.run or row.name):
                out, done = base / run, base / f"{run}.done"
                flags = TRAIN[run].format(**values).split() + shared + ["--seed", str(seed)]
                flags += ["--backbone", backbone] if run == "teacher" else []
                flags += ["--pretrained", start] if start and run in ("teacher", "start") else []
                if done.exists() and done.read_text() != shlex.join(flags):
                    sys.exit(f"{out} was trained with other options: {done.read_text()}\nGive --tag, or remove it.")
                script = "train_stage2.py" if "{hpdm}" in TRAIN[run] else "train_stage1.py"
                go_on = "--resume" if (out / "config.json").exists() else "--out"
                needs = [base / f"{other}.done" for other in chain(run)[:-1]]
                jobs[done] = Job(done, needs, [script, *flags, go_on, str(out), *root], shlex.join(flags))
            file = out if row.take in ("switch", "FSM ensemble") else out / f"{row.take}.pt"
            done = base / f"{row.name}-{args.split}.json"
            limit = ["--limit", "300"] if args.data == "synthetic" else []
            flags = ["--split", args.split, "--protocol", "any,emm,rmm,nm", "--only", row.take, *row.evaluation.split()]
            command = ["evaluate.py", str(file), *flags, *limit, "--json", str(done), *root]
            jobs[done] = Job(done, [base / f"{run}.done"], command)
    return [job for job in jobs.values() if not job.done.exists()]


def begin(job: Job, args: argparse.Namespace, device: str) -> subprocess.Popen:
    job.done.parent.mkdir(parents=True, exist_ok=True)
    folder = pathlib.Path(job.command[1])
    for name in ("teacher.pt", "robust.pt") if (folder / "fsm.pt").exists() else ():  # one folder for an ensemble
        if not (folder / name).exists():
            (folder / name).symlink_to(pathlib.Path("..", "hpdm", name))
    threads = str(max(1, (os.cpu_count() or 1) // len(args.device)))
    with open(f"{job.done}.log", "a") as log:
        return subprocess.Popen([sys.executable, *job.command, "--device", device], stdout=log, stderr=log,
                                env={**os.environ, "OMP_NUM_THREADS": threads}, start_new_session=True)  # fmt: skip


def work(jobs: list[Job], args: argparse.Namespace) -> None:
    """Runs the jobs, one at a time on each device, each as soon as what it needs is there."""
    free, running = list(args.device), []
    try:
        while running or any(all(need.exists() for need in job.needs) for job in jobs):
            for job in [job for job in jobs if all(need.exists() for need in job.needs)][: len(free)]:
                jobs.remove(job)
                device = free.pop()
                running.append((begin(job, args, device), job, device))
            time.sleep(0.5)
            for process, job, device in [entry for entry in running if entry[0].poll() is not None]:
                running.remove((process, job, device))
                free.append(device)
                if process.returncode:
                    print(f"{job.command[0]} ended with {process.returncode}: see {job.done}.log", file=sys.stderr)
                elif job.text:
                    job.done.write_text(job.text)
    finally:  # interrupted: the runs save what they have
        for process, _, _ in running:
            process.terminate()
        for process, _, _ in running:
            process.wait()


def score(file: pathlib.Path, take: str) -> dict[str, float]:
    """The papers' columns from the scores of evaluate.py: mIoU in per cent, absent classes counted as 0."""
    results = json.loads(file.read_text())["results"][take]
    found = {p: {c: s["miou_published"] for c, s in columns.items()} for p, columns in results.items()}
    *missing, full = found["any"]
    weak = {c: found["any"][c] for c in missing if c == "EL" or len(missing) == 2}
    means = {protocol: statistics.mean(values.values()) for protocol, values in found.items()}
    return {"full": found["any"][full], **weak, "missing": statistics.mean(found["any"][c] for c in missing),
            "mean": means["any"], "EMM": means["emm"], "RMM": means["rmm"], "NM": means["nm"]}  # fmt: skip


def report(args: argparse.Namespace, backbone: str) -> str:
    """Writes the table of the rows that are finished -> its text."""
    table, lines, left = {}, [], []
    for row in args.rows:
        base = pathlib.Path("runs", "reproduce", stem(args, backbone))
        files = {seed: base / f"seed{seed}" / f"{row.name}-{args.split}.json" for seed in args.seeds}
        scores = table[row.name] = {s: score(file, row.take) for s, file in files.items() if file.exists()}
        if not scores:
            left.append(row.name)
            continue
        columns = list(next(iter(scores.values())))
        if not lines:
            lines = [f"| | {' | '.join(columns)} | paper: full | paper: mean |", "|---|" + "---:|" * (len(columns) + 2)]
        cells = [row.what + (f" ({len(scores)} of {len(files)} seeds)" if len(scores) < len(files) else "")]
        for values in ([s[column] for s in scores.values()] for column in columns):
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        cells += [f"{number:.2f}" for number in row.paper or ()] or ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    git = ["git", "describe", "--always", "--dirty"]
    revision = shutil.which("git") and subprocess.run(git, capture_output=True, text=True).stdout.strip()
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    about = (f"{args.data} ({args.split}), {backbone}, {args.modalities}, seeds {args.seeds}, epochs {args.epochs}; "
             f"{machine}, {datetime.date.today()}, revision {revision or 'unknown'}; mIoU in per cent, mean ± standard "
             f"deviation; `python -m benchmarks.reproduce {shlex.join(sys.argv[1:])}`")  # fmt: skip
    text = "\n".join([about, "", *lines, "", f"Not run: {', '.join(left) or 'nothing'}.", ""])
    out = ROOT / "benchmarks" / "results" / (stem(args, backbone) + ("-val" if args.split == "val" else ""))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_name(f"{out.name}.md").write_text(text)
    data = {"about": about, "values": args.values, "runs": TRAIN, "scores": table}
    out.with_name(f"{out.name}.json").write_text(json.dumps(data, indent=1) + "\n")
    return text


def main() -> None:
    args = parse()
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    jobs = plan(args)
    if args.dry_run:
        for job in jobs:
            print(shlex.join(["python", *job.command, "--device", args.device[0]]))
        return
    try:
        if not args.report_only:
            work(jobs, args)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here.")
    for backbone in args.backbone:
        print(report(args, backbone))


if __name__ == "__main__":
    main()
