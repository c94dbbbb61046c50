"""The declared list of rows: every command is one that the scripts take, and a table shows what was measured alone."""

import json
import pathlib
import sys

import pytest

from benchmarks import reproduce
from benchmarks.reproduce import Job
from engine import options
from evaluate import options as evaluate_options


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)


def finish(row: str, seed: int, full: float, take: str = "robust", modalities: str = "RD") -> None:
    """Leaves the scores that evaluate.py would leave; the other subsets have half of `full`."""
    subsets = [*modalities, modalities]
    scores = {subset: {"miou_published": full / 2} for subset in subsets} | {modalities: {"miou_published": full}}
    file = pathlib.Path(f"runs/reproduce/synthetic-segformer_tiny/seed{seed}/{row}-test.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"results": {take: {p: scores for p in ("any", "emm", "rmm", "nm")}}}))


@pytest.mark.parametrize("data", reproduce.RECIPES)
def test_every_command_is_understood_by_its_script(data):
    for job in reproduce.plan(reproduce.parse(["--data", data, "--root", "/data", "--pretrained", "mit.pth"])):
        job.done.parent.mkdir(parents=True, exist_ok=True)
        script, *flags = job.command
        if script == "train_stage2.py":  # reads the options of the run that it goes on from
            folder = pathlib.Path(flags[flags.index("--stage1") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text(json.dumps({"train_stage1.py": {"options": {"data": data}}}))
            options.stage2_options("", flags)
        elif script == "train_stage1.py":
            options.stage1_options("", flags)
        else:
            evaluate_options(flags)


def test_a_row_waits_for_its_run_and_that_for_all_it_starts_from():
    jobs = reproduce.plan(reproduce.parse(["--rows", "student", "--seeds", "1"]))
    assert [pathlib.Path(job.done).name for job in jobs] == [
        "teacher.done",
        "hpdm.done",
        "student.done",
        "student-test.json",
    ]
    assert [[need.name for need in job.needs] for job in jobs] == [
        [],
        ["teacher.done"],
        ["teacher.done", "hpdm.done"],
        ["student.done"],
    ]


def test_every_seed_trains_its_own_models():
    argv = ["--seeds", "1,4", "--rows", "dropped", "--backbone", "segformer_b0,cmnext_b0"]
    runs = [job for job in reproduce.plan(reproduce.parse(argv)) if job.command[0] == "train_stage1.py"]
    assert len({job.done for job in runs}) == len(runs) == 8  # two runs, two seeds, two backbones
    for job in runs:
        assert job.done.parent.name == f"seed{job.command[job.command.index('--seed') + 1]}"
        assert all(need.parent == job.done.parent for need in job.needs)


def test_a_model_that_no_other_of_the_project_gives_starts_as_its_backbone_from_the_given_weights():
    argv = ["--rows", "longer,once,start,hpdm", "--backbone", "segformer_b2", "--pretrained", "mit_{}.pth"]
    given = {}
    for job in reproduce.plan(reproduce.parse(argv)):
        if job.command[0] == "train_stage1.py":
            args = options.stage1_options("", job.command[1:])
            given[job.done.stem] = args.backbone, args.pretrained and pathlib.Path(args.pretrained).name
    assert given == {
        "teacher": ("segformer_b2", "mit_b2.pth"),
        "once": ("segformer_b2", "mit_b2.pth"),
        "longer": ("segformer_b2", "teacher.pt"),
        "start": (None, "mit_b2.pth"),
        "hpdm": (None, None),
    }


def test_the_main_rows_of_every_seed_come_before_the_sweep():
    names = [job.done.name for job in reproduce.plan(reproduce.parse(["--seeds", "2"]))]
    assert names[0] == "teacher.done" and names.count("teacher.done") == 2
    assert max(i for i, name in enumerate(names) if name == "student-test.json") < names.index("kl_1.done")


def test_the_published_weights_are_those_of_the_data_set():
    values = reproduce.parse(["--data", "deliver"]).values
    assert (values["lambda"], values["alpha"], values["both"]) == (2, 10, 240)
    assert reproduce.parse(["--data", "nyuv2", "--classes", "40"]).values["lambda"] == 1.25


def test_an_interrupted_run_is_resumed_and_a_finished_one_left_alone():
    args = reproduce.parse(["--rows", "dropped", "--seeds", "1"])
    teacher, dropped, _ = reproduce.plan(args)
    (teacher.done.parent / "dropped").mkdir(parents=True)
    (teacher.done.parent / "dropped" / "config.json").write_text("{}")
    teacher.done.write_text(teacher.text)
    first, _ = reproduce.plan(args)
    assert first.command[-2:] == ["--resume", str(teacher.done.parent / "dropped")]
    assert first.command[:-2] == dropped.command[:-2]  # so the script itself compares the options


def test_a_run_of_other_options_is_not_taken_for_this_one():
    args = reproduce.parse(["--rows", "teacher", "--seeds", "1"])
    teacher = reproduce.plan(args)[0]
    teacher.done.parent.mkdir(parents=True)
    teacher.done.write_text(teacher.text.replace("--epochs 160", "--epochs 3"))
    with pytest.raises(SystemExit, match="teacher was trained with other options.*--epochs 3"):
        reproduce.plan(args)


def test_what_needs_a_failed_run_does_not_begin(capsys):
    args = reproduce.parse(["--jobs", "2", "--device", "cpu"])
    write = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('')"
    path = pathlib.Path.cwd()
    jobs = [
        Job(path / "bad.done", [], ["-c", "raise SystemExit(3)"], "x"),
        Job(path / "after.done", [path / "bad.done"], ["-c", write, "after"], "x"),
        Job(path / "good.done", [], ["-c", write, "good"], "text"),
        Job(path / "last.json", [path / "good.done"], ["-c", write, "last"]),
    ]
    assert reproduce.work(jobs, args) == 1
    assert "ended with 3" in capsys.readouterr().err
    assert not (path / "after").exists() and (path / "last").exists()
    assert (path / "good.done").read_text() == "text" and not (path / "bad.done").exists()


def test_the_report_gives_mean_and_spread_and_names_what_was_not_run(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["reproduce", "--seeds", "2"])
    for seed, full in ((0, 10.0), (1, 14.0)):
        finish("teacher", seed, full, "teacher")
    finish("kl", 1, 20.0)
    text = reproduce.report(reproduce.parse(["--seeds", "2", "--rows", "teacher,kl,same"]), "segformer_tiny")
    assert "| row | full | R | D | missing | mean | EMM | RMM | NM | paper: full | paper: mean |" in text
    assert "| teacher | 12.0 ± 2.8 | 6.0 ± 1.4 | 6.0 ± 1.4 | 6.0 ± 1.4 | 8.0 ± 1.9 |" in text
    assert "| CE + KL, published lambda (1 of 2 seeds) | 20.0 | 10.0 |" in text and "| 61.34 | 46.42 |" in text
    assert "Not run: same." in text
    saved = json.loads(pathlib.Path("benchmarks/results/synthetic-segformer_tiny.json").read_text())
    assert saved["scores"]["teacher"]["1"]["full"] == 14.0


def test_epochs_are_three_numbers_and_other_options_go_on():
    args = reproduce.parse(["--epochs", "3", "2", "1", "--amp", "bf16"])
    assert args.values["all"] == 7 and args.values["fsm"] == 1 and args.flags[-2:] == ["--amp", "bf16"]


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--rows", "teacher,techer"], "--rows techer is unknown"),
        (["--seeds", "three"], "--seeds"),
        (["--epochs", "1,2"], "--epochs"),
    ],
)
def test_a_wrong_option_is_named(argv, sentence, capsys):
    with pytest.raises(SystemExit):
        reproduce.parse(argv)
    assert sentence in capsys.readouterr().err
