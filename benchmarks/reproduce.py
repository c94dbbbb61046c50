"""Does it do what the paper says? A declared list of runs on the synthetic scenes, over several seeds.

    python -m benchmarks.reproduce                          # or: make reproduce; continues where it was interrupted
    python -m benchmarks.reproduce --backbone cmnext_tiny --rows teacher,method,student

Every run is a command line of the training scripts, every row an evaluation on the test split, which nothing else
reads. Writes runs/miniature/BACKBONE/seed*/... and benchmarks/results/miniature.json and .md (mean and standard deviation over the
seeds); the names of other backbones, lengths and splits say so (miniature-cmnext_tiny.json). Two runs at a time, a
thread each: on two cores that is faster than one with two.
"""

import argparse
import concurrent.futures
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys

EPOCHS = {"long": 160, "short": 48}  # of the teacher, and of all that starts from it
SCENES = "--data synthetic --limit 300 --eval-every 1000"  # one validation, at the end: the last weights are kept
# name, script, flags. {x} is the folder of run x of the same seed. Later groups need earlier ones.
RUNS = [
    [("teacher", "train_stage1.py", "--epochs {long} --distill-epochs 0")],
    [("longer", "train_stage1.py", "--pretrained {teacher}/teacher.pt --epochs {short} --distill-epochs 0"),
     ("ce", "train_stage1.py", "--teacher {teacher}/teacher.pt --distill-epochs {short} --lambda-kl 0 --alpha 0"),
     ("kl", "train_stage1.py", "--teacher {teacher}/teacher.pt --distill-epochs {short} --alpha 0"),
     ("same", "train_stage1.py", "--teacher {teacher}/teacher.pt --distill-epochs {short} --match same"),
     ("method", "train_stage1.py", "--teacher {teacher}/teacher.pt --distill-epochs {short}"),
     ("ifv", "train_stage1.py", "--teacher {teacher}/teacher.pt --distill-epochs {short} --beta 12")],
    [("stage2", "train_stage2.py", "--stage1 {method} --out {stage2} --fsm-epochs 5 --student-epochs {short}"),
     ("unconditioned", "train_stage2.py",
      "--stage1 {method} --out {unconditioned} --fsm-epochs 5 --student-epochs {short} --unconditioned-student"),
     ("candidate", "train_stage2.py",
      "--stage1 {method} --out {candidate} --fsm-epochs 5 --student-epochs 0 --rule candidate"),
     ("untargeted", "train_stage2.py",
      "--stage1 {method} --out {untargeted} --student-epochs {short} --gamma-logits 0 --gamma-features 0"),
     ("neither", "train_stage2.py", "--stage1 {method} --out {neither} --student-epochs {short} --gamma-logits 0 "
      "--gamma-features 0 --unconditioned-student")],
]  # fmt: skip
# row, what it is, files, the row of evaluate.py to take, its flags
ROWS = [
    ("teacher", "teacher", "{teacher}/teacher.pt", "teacher", ""),
    ("longer", "teacher trained longer", "{longer}/teacher.pt", "teacher", ""),
    ("ce", "sensors dropped, CE only", "{ce}/robust.pt", "robust", ""),
    ("kl", "+ logit KL: plain distillation", "{kl}/robust.pt", "robust", ""),
    ("same", "+ HPDM, same-modality matching", "{same}/robust.pt", "robust", ""),
    ("method", "+ HPDM, random matching: robust model", "{method}/robust.pt", "robust", ""),
    ("ifv", "+ intra-class feature variation", "{ifv}/robust.pt", "robust", ""),
    ("switch", "switch: teacher if complete, else robust", "{method}", "switch", ""),
    ("hard", "FSM ensemble, published hard rule", "{candidate}", "FSM ensemble", "--fsm-rule hard"),
    ("candidate", "FSM ensemble, relaxed candidates", "{candidate}", "FSM ensemble", ""),
    ("features", "FSM ensemble, scores, feature level", "{stage2}", "FSM ensemble", "--fsm-level features"),
    ("logits", "FSM ensemble, scores, logits level", "{stage2}", "FSM ensemble", "--fsm-level logits"),
    ("both", "FSM ensemble, scores, both levels", "{stage2}", "FSM ensemble", ""),
    ("neither", "student without FSM targets, not conditioned on its sensors", "{neither}/student.pt", "student", ""),
    ("unconditioned", "student, not conditioned on its sensors", "{unconditioned}/student.pt", "student", ""),
    ("untargeted", "student without FSM targets", "{untargeted}/student.pt", "student", ""),
    ("student", "student", "{stage2}/student.pt", "student", ""),
]
COLUMNS = ("full", "missing", "mean", "EL", "EMM", "RMM 0.5", "NM mid")
ROOT = pathlib.Path(__file__).parents[1]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("reproduce.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, 0..N-1 (default 3)")
    parser.add_argument("--length", type=float, default=1.0, help="share of all epochs but the FSM's (default 1)")
    parser.add_argument("--backbone", default="segformer_tiny", help="default segformer_tiny")
    parser.add_argument("--rows", help="only these rows and the runs they need, by comma; default all")
    parser.add_argument("--split", choices=("val", "test"), default="test", help="val while choosing settings")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each (default 2)")
    parser.add_argument("--report-only", action="store_true", help="train nothing, tabulate what is there")
    o = parser.parse_args()
    known = [row[0] for row in ROWS]
    o.rows = o.rows.split(",") if o.rows else known
    o.name = o.backbone if o.length == 1 else f"{o.backbone}-{o.length:g}"
    settings = ((o.backbone, "segformer_tiny"), (f"{o.length:g}", "1"), (o.split, "test"))
    o.table = "-".join(["miniature", *(value for value, usual in settings if value != usual)])
    if unknown := [row for row in o.rows if row not in known]:
        parser.error(f"row {unknown[0]} is unknown; choose of {', '.join(known)}")
    return o


def needed(rows: list[str]) -> set[str]:
    """Names of the runs that these rows, and the runs that those, are made from."""
    texts = [f"{files}" for name, _, files, _, _ in ROWS if name in rows]
    names: set[str] = set()
    for group in reversed(RUNS):
        for name, _, flags in group:
            if any("{" + name + "}" in text for text in texts):
                names.add(name)
                texts.append(flags)
    return names


def call(script: str, flags: list[str], log: pathlib.Path) -> None:
    command = [sys.executable, str(ROOT / script), *flags]
    with open(log, "a") as file:
        done = subprocess.run(command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}; see {log}")


def train(
    name: str, script: str, flags: str, seed: int, folders: dict[str, pathlib.Path], earlier: dict, o
) -> None:  # fmt: skip
    """One run, once those it needs are there; continued if it was interrupted, skipped if it is complete."""
    for other, job in earlier.items():
        if "{" + other + "}" in flags:
            job.result()
    out = folders[name]
    out.mkdir(parents=True, exist_ok=True)
    if (out / "complete").exists():
        return
    if (out / "last.pt").exists():
        arguments = ["--resume", str(out)]
    else:
        epochs = {name: f"{o.length * number:g}" for name, number in EPOCHS.items()}
        arguments = f"{SCENES} {flags} --seed {seed} --out {out}".format(**folders, **epochs).split()
        arguments += ["--backbone", o.backbone] if script == "train_stage1.py" else []
    call(script, arguments, out / "output.txt")
    (out / "complete").touch()


def score(row: tuple, folders: dict[str, pathlib.Path], split: str) -> dict[str, float]:
    """One row of one seed: the scores of evaluate.py, summarised to COLUMNS."""
    name, _, files, take, flags = row
    file = next(iter(folders.values())).parent / f"{name}-{split}.json"
    if not file.exists():
        path = files.format(**folders)
        paths = [path]
        if take in ("switch", "FSM ensemble"):  # evaluate.py wants the models of an ensemble in one folder
            both = file.with_suffix("")
            both.mkdir(exist_ok=True)
            sources = [folders["teacher"] / "teacher.pt", folders["method"] / "robust.pt"]
            sources += [pathlib.Path(path) / "fsm.pt"] if take == "FSM ensemble" else []
            for source in sources:
                link = both / source.name
                link.unlink(missing_ok=True)
                link.symlink_to(source.resolve())
            paths = [str(both), "--only", take]
        options = f"--split {split} --limit 300 --protocol any,emm,rmm,nm --json {file} {flags}".split()
        call("evaluate.py", [*paths, *options], file.with_suffix(".txt"))
    scores = json.loads(file.read_text())["results"][take]
    any_, emm, rmm, nm = ({c: s["miou_published"] for c, s in scores[p].items()} for p in ("any", "emm", "rmm", "nm"))
    missing = [value for column, value in any_.items() if column != "RDEL"]
    return {"full": any_["RDEL"], "missing": statistics.mean(missing), "mean": statistics.mean(any_.values()),
            "EL": any_["EL"], "EMM": statistics.mean(emm.values()), "NM mid": nm["mid"],
            "RMM 0.5": statistics.mean(v for c, v in rmm.items() if c.endswith(" 0.5"))}  # fmt: skip


def report(table: dict[str, list[dict]], o: argparse.Namespace, minutes: float) -> None:
    out = ROOT / "benchmarks" / "results"
    out.mkdir(parents=True, exist_ok=True)
    about = (f"{o.backbone}, synthetic scenes ({o.split} split), seeds 0..{o.seeds - 1}, "
             f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores; "
             f"mIoU in per cent, mean ± standard deviation; `python {' '.join(['reproduce.py', *sys.argv[1:]])}`"
             )  # fmt: skip
    lines = [about, "", "| run | " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * len(COLUMNS)]
    for name, what, *_ in ROWS:
        if name in table:
            cells = []
            for column in COLUMNS:
                values = [scores[column] for scores in table[name]]
                spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.1f}{spread}")
            lines.append(f"| {what} | " + " | ".join(cells) + " |")
    (out / f"{o.table}.md").write_text("\n".join(lines) + "\n")
    data = {"about": about, "minutes of the last sitting": round(minutes, 1), "runs": RUNS, "epochs": EPOCHS,
            "length": o.length, "scenes": SCENES, "scores": table}  # fmt: skip
    (out / f"{o.table}.json").write_text(json.dumps(data, indent=1) + "\n")
    print("\n".join(lines))


def main(o: argparse.Namespace) -> int:
    start = datetime.datetime.now()
    names = needed(o.rows)
    seeds = {s: {run[0]: ROOT / "runs" / "miniature" / o.name / f"seed{s}" / run[0] for g in RUNS for run in g}
             for s in range(o.seeds)}  # fmt: skip
    rows = [row for row in ROWS if row[0] in o.rows]
    with concurrent.futures.ThreadPoolExecutor(o.jobs) as pool:
        try:
            runs: dict[int, dict] = {seed: {} for seed in seeds}
            for run in (run for group in RUNS for run in group if run[0] in names and not o.report_only):
                for seed, folders in seeds.items():  # begun in this order, so what a run waits for is never behind it
                    runs[seed][run[0]] = pool.submit(train, *run, seed, folders, dict(runs[seed]), o)
            for job in concurrent.futures.as_completed(job for jobs in runs.values() for job in jobs.values()):
                job.result()
            jobs = {row[0]: [pool.submit(score, row, folders, o.split) for folders in seeds.values()] for row in rows}
            table = {name: [job.result() for job in found] for name, found in jobs.items()}
        except (RuntimeError, KeyboardInterrupt) as error:  # the runs get Ctrl-C as well, and save what they have
            print(f"reproduce.py: {str(error) or 'interrupted.'}\nThe same command goes on from here.", file=sys.stderr)
            pool.shutdown(cancel_futures=True)  # the runs that are under way end first
            return 1
    report(table, o, (datetime.datetime.now() - start).total_seconds() / 60)
    return 0


if __name__ == "__main__":
    sys.exit(main(options()))
