"""Does the method do what its papers say? The rows of rows.py, on any data set, over several seeds.

    python -m benchmarks.reproduce                               # synthetic scenes, all rows; or: make reproduce
    python -m benchmarks.reproduce --data nyuv2 --root data --rows main,sweep
    python -m benchmarks.reproduce --data deliver --root data/DELIVER --rows teacher,anyseg,hpdm,student \\
        --backbone segformer_b0,segformer_b2 --pretrained weights/mit_{}.pth --seeds 1

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
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import namedtuple

import torch

from benchmarks.rows import GROUPS, PAPER, RECIPES, ROWS, TRAIN

ROOT = pathlib.Path(__file__).parents[1]


def seeds(text: str) -> list[int]:
    return [int(seed) for seed in text.split(",")] if "," in text else list(range(int(text)))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options; those unknown here go to both training scripts as they are (`args.flags`)."""
    names = ["all", *GROUPS, *(row.name for row in ROWS)]
    parser = argparse.ArgumentParser(
        "python -m benchmarks.reproduce",
        description=__doc__,
        allow_abbrev=False,
        epilog="All other options go to both training scripts as they are.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", choices=RECIPES, default="synthetic")
    parser.add_argument("--root", help="folder of the data set")
    parser.add_argument("--backbone", help="by comma; default segformer_tiny (synthetic, nyuv2) or segformer_b0")
    parser.add_argument("--pretrained", help="start weights of the teacher; {} stands for the backbone's b0, b1, ...")
    parser.add_argument("--seeds", type=seeds, default="3", help="how many, from 0 on, or a list by comma (default 3)")
    parser.add_argument("--rows", default="all", help=f"groups and rows, by comma: {', '.join(names)}")
    parser.add_argument("--modalities", help="by comma; default: those of the papers, for nyuv2 rgb,depth")
    parser.add_argument("--classes", type=int, help="of nyuv2: 13 (default) or 40")
    parser.add_argument("--limit", help="frames of each split; default all, of the synthetic 300")
    parser.add_argument("--epochs", nargs=3, type=float, help="of the teacher, each model after it, the FSM")
    parser.add_argument("--split", choices=("val", "test"), help="to evaluate on; val while choosing settings")
    parser.add_argument("--tag", help="a word that keeps the runs of other settings apart")
    parser.add_argument("--device", help="by comma, as cuda:0,cuda:1; default: all GPUs, or the CPU")
    parser.add_argument("--jobs", type=int, help="runs at a time on each device; default 1, on a CPU 2")
    parser.add_argument("--dry-run", action="store_true", help="print the commands that are left to do")
    parser.add_argument("--report-only", action="store_true", help="train nothing, tabulate what is there")
    parser.set_defaults(**RECIPES[parser.parse_known_args(argv)[0].data])  # `flags`, too
    args, others = parser.parse_known_args(argv)
    if unknown := [name for name in args.rows.split(",") if name not in names]:
        parser.error(f"--rows {unknown[0]} is unknown; choose of {', '.join(names)}.")
    args.rows = [row for row in ROWS if {"all", row.name, *row.groups.split()} & set(args.rows.split(","))]
    present = (args.modalities.count(",") + 2) / 2  # modalities, on average
    long, short, fsm = args.epochs
    args.values = dict(
        long=long, short=short, both=2 * short, all=long + 2 * short, fsm=fsm, alpha=100 / args.classes * present
    )
    args.values["lambda"] = 50 / args.classes
    args.root, args.limit = (["--root", args.root] * bool(args.root), ["--limit", args.limit] * bool(args.limit))
    args.flags = [
        "--data",
        args.data,
        "--modalities",
        args.modalities,
        *args.limit,
        *args.flags.format(classes=args.classes).split(),
        *others,
    ]
    args.device = args.device or ",".join(f"cuda:{i}" for i in range(torch.cuda.device_count())) or "cpu"
    args.device = args.device.split(",") * (args.jobs or (2 if args.device == "cpu" else 1))
    return args


# A command that can begin once the files `needs` are there; `done` says that it is finished, and holds `text`.
Job = namedtuple("Job", "done needs command text", defaults=("",))


def folder(args: argparse.Namespace, backbone: str) -> pathlib.Path:
    return pathlib.Path("runs", "reproduce", "-".join(filter(None, (args.data, backbone, args.tag))))


def chain(run: str) -> list[str]:
    """A run after all that it starts from."""
    return [*(name for other in ("teacher", "hpdm") if f"{{{other}}}" in TRAIN[run] for name in chain(other)), run]


def training(args: argparse.Namespace, run: str, backbone: str, base: pathlib.Path, seed: int) -> Job:
    """The run's command line: begun in its folder, or resumed there (then the script compares the options)."""
    out, done = base / run, base / f"{run}.done"
    values = {name: f"{value:.4g}" for name, value in args.values.items()}
    flags = TRAIN[run].format(teacher=base / "teacher", hpdm=base / "hpdm", **values).split()
    if not {"--teacher", "--stage1"} & set(flags):
        flags += ["--backbone", backbone]
    if args.pretrained and ("start" in flags or not {"--teacher", "--stage1", "--pretrained"} & set(flags)):
        flags += ["--pretrained", args.pretrained.format(backbone.split("_")[-1])]
    flags += [*args.flags, "--seed", str(seed)]
    if done.exists() and sorted(shlex.split(done.read_text())) != sorted(flags):
        sys.exit(f"{out} was trained with other options: {done.read_text()}\nGive --tag, or remove its seed's folder.")
    script = "train_stage2.py" if "{hpdm}" in TRAIN[run] else "train_stage1.py"
    way = "--resume" if (out / "config.json").exists() else "--out"
    needs = [base / f"{name}.done" for name in chain(run)[:-1]]
    return Job(done, needs, [script, *flags, way, str(out), *args.root], shlex.join(flags))


def plan(args: argparse.Namespace) -> list[Job]:
    """What is left to do, the most important first: the main rows of every seed, then those of the other groups."""
    jobs = {}
    for group, seed, backbone in itertools.product(GROUPS, args.seeds, args.backbone.split(",")):
        base = folder(args, backbone) / f"seed{seed}"
        for row in [row for row in args.rows if row.groups.split()[0] == group]:
            run, done = row.name if row.name in TRAIN else row.train, base / f"{row.name}-{args.split}.json"
            if run == "feedback" and backbone.startswith("cmnext"):  # it needs one encoder for all modalities
                continue
            jobs |= {base / name: training(args, name, backbone, base, seed) for name in chain(run)}
            model = base / run / ("" if row.take in ("switch", "FSM ensemble") else f"{row.take}.pt")
            command = [
                "evaluate.py",
                str(model),
                "--only",
                row.take,
                *row.evaluation.split(),
                "--split",
                args.split,
                "--protocol",
                "any,emm,rmm,nm",
                "--json",
                str(done),
                *args.limit,
                *args.root,
            ]
            jobs[done] = Job(done, [base / f"{run}.done"], command)
    return [job for job in jobs.values() if not job.done.exists()]


def begin(job: Job, args: argparse.Namespace, device: str) -> subprocess.Popen:
    job.done.parent.mkdir(parents=True, exist_ok=True)
    run = pathlib.Path(job.command[1])
    for name in ("teacher.pt", "robust.pt") if (run / "fsm.pt").exists() else ():  # an ensemble lies in one folder
        if not (run / name).exists():
            (run / name).symlink_to(pathlib.Path("..", "hpdm", name))
    # two threads beside another busy process are ten times slower than one
    threads = "1" if device == "cpu" else str(max(1, (os.cpu_count() or 1) // len(args.device)))
    with open(f"{job.done}.log", "a") as log:
        return subprocess.Popen(
            [sys.executable, *job.command, "--device", device],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": threads},
            start_new_session=True,
        )


def work(jobs: list[Job], args: argparse.Namespace) -> int:
    """Runs the jobs, one at a time on each device, each as soon as what it needs is there -> how many failed."""
    free, running, failed = list(args.device), {}, 0
    try:
        while True:
            ready = [job for job in jobs if all(need.exists() for need in job.needs)]
            if not (ready or running):
                return failed
            for job in ready[: len(free)]:
                jobs.remove(job)
                device = free.pop()
                running[begin(job, args, device)] = job, device
            time.sleep(0.5)
            for process in [process for process in running if process.poll() is not None]:
                job, device = running.pop(process)
                free.append(device)
                if process.returncode:
                    failed += 1
                    print(f"{job.command[0]} ended with {process.returncode}: see {job.done}.log", file=sys.stderr)
                elif job.text:
                    job.done.write_text(job.text)
    finally:  # interrupted: the runs save what they have
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def score(file: pathlib.Path, take: str) -> dict[str, float]:
    """The papers' columns from the scores of evaluate.py: mIoU in per cent, absent classes counted as 0."""
    results = json.loads(file.read_text())["results"][take]
    found = {p: {c: s["miou_published"] for c, s in columns.items()} for p, columns in results.items()}
    *missing, full = found["any"]
    weak = {c: found["any"][c] for c in missing if c == "EL" or len(missing) == 2}
    means = {protocol: statistics.mean(values.values()) for protocol, values in found.items()}
    return {
        "full": found["any"][full],
        **weak,
        "missing": statistics.mean(found["any"][c] for c in missing),
        "mean": means["any"],
        "EMM": means["emm"],
        "RMM": means["rmm"],
        "NM": means["nm"],
    }


def report(args: argparse.Namespace, backbone: str) -> str:
    """Writes the table of the rows that are finished -> its text."""
    base, table, lines = folder(args, backbone), {}, []
    for row in args.rows:
        files = {seed: base / f"seed{seed}" / f"{row.name}-{args.split}.json" for seed in args.seeds}
        table[row.name] = {seed: score(file, row.take) for seed, file in files.items() if file.exists()}
        if not (scores := list(table[row.name].values())):
            continue
        cells = [row.what + (f" ({len(scores)} of {len(files)} seeds)" if len(scores) < len(files) else "")]
        for values in zip(*(found.values() for found in scores), strict=True):
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        cells += [f"{number:.2f}" for number in PAPER.get(row.name, ())] or ["", ""]
        lines = lines or [["row", *scores[0], "paper: full", "paper: mean"], ["---"] + ["---:"] * (len(cells) - 1)]
        lines.append(cells)
    git = ["git", "describe", "--always", "--dirty"]
    revision = shutil.which("git") and subprocess.run(git, capture_output=True, text=True).stdout.strip()
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    derived = " (event and lidar derived)" if args.data == "nyuv2" and args.modalities.count(",") > 1 else ""
    about = (
        f"{args.data} ({args.split}), {backbone}, {args.modalities}{derived}, seeds {list(args.seeds)}, "
        f"{machine}, {datetime.date.today()}, revision {revision or 'unknown'}; mIoU in per cent, mean ± standard "
        "deviation; paper: CVPR 2026 version, DELIVER val, MiT-B0; "
        f"`python -m benchmarks.reproduce {shlex.join(sys.argv[1:])}`"
    )
    left = [name for name, scores in table.items() if not scores]
    text = "\n".join(
        [
            about,
            "",
            *("| " + " | ".join(cells) + " |" for cells in lines),
            "",
            f"Not run: {', '.join(left) or 'nothing'}.",
            "",
        ]
    )
    split = "" if args.split == RECIPES[args.data]["split"] else f"-{args.split}"
    out = pathlib.Path("benchmarks", "results", base.name + split)
    out.parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(f"{out}.md").write_text(text)
    data = {"about": about, "values": args.values, "runs": TRAIN, "scores": table}
    pathlib.Path(f"{out}.json").write_text(json.dumps(data, indent=1) + "\n")
    return text


def main() -> None:
    args = parse()
    os.chdir(ROOT)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    jobs = plan(args)
    if args.dry_run:
        print(*(shlex.join(["python", *job.command, "--device", args.device[0]]) for job in jobs), sep="\n")
        return
    try:
        failed = work([] if args.report_only else jobs, args)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here.")
    for backbone in args.backbone.split(","):
        print(report(args, backbone))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
