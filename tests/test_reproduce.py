"""The declared rows: every command is one that its script takes; results come, and never go."""

import json
import shlex
from pathlib import Path
from unittest.mock import Mock

import pytest
from data_files import fails

from benchmarks import reproduce
from engine import options, runs
from engine.checkpoint import write
from evaluate import options as evaluate_options

PAGE, FILES = Path("docs/results.md"), sorted(Path("benchmarks/results").glob("*.json"))


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A root in which every command succeeds at once and evaluate.py finds `full` with all, half of it else."""
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    ran, full = [], {"value": 60.0}

    def run(words, device, log):
        ran.append(words)
        if "--json" in words:
            take, file = words[words.index("--only") + 1], Path(words[words.index("--json") + 1])
            names = [reproduce.subset_name(s, reproduce.RDEL.split(",")) for s in reproduce.all_subsets(4)]
            columns = {name: {"miou_published": full["value"] / (1 if name == "RDEL" else 2)} for name in names}
            mixed = dict(sorted(columns.items(), key=lambda item: item[0][::-1]))  # numbers go by name, not by place
            file.write_text(json.dumps({"results": {take: dict.fromkeys(("any", "emm", "rmm", "nm"), mixed)}}))
        else:
            Path(words[-1]).mkdir(parents=True)

    monkeypatch.setattr(reproduce, "run", run)
    return ran, full


def results(setting="scenes") -> dict:
    return json.loads(Path(f"benchmarks/results/{setting}.json").read_text())


@pytest.mark.parametrize("setting", reproduce.SETTINGS)
def test_every_command_is_understood_by_its_script(setting, tmp_path):
    args = reproduce.parse([setting, "--root", "/data", "--pretrained", "mit.pth"])
    for row in reproduce.ROWS:
        words = reproduce.command(args, reproduce.BY_NAME.get(row.train, row), str(tmp_path / "seed3"))
        script = next(i for i, word in enumerate(words) if word.endswith((".py", "variants")))
        flags = words[script + 1 + ("variants" in words[script]) :]
        if "train_stage2.py" in words:  # which reads the options of the run that it goes on from
            saved = dict.fromkeys(options.INHERITED) | {"data": "synthetic"}
            (tmp_path / "seed3/hpdm").mkdir(parents=True, exist_ok=True)
            state = {"format": "", "model": {}, "meta": {"options": saved, "root": None}}
            write(tmp_path / "seed3/hpdm/robust.pt", state)
            options.stage2_options("", flags)
        else:
            parse = options.single_options if "train_single.py" in words else options.stage1_options
            assert parse("", flags).seed == 3
        evaluate_options(["a.pt", *reproduce.SETTINGS[setting].evaluate.split(), *row.evaluate.split()])


def test_rows_run_in_order_once_and_their_scores_go_by_name(elsewhere):
    ran, _ = elsewhere
    for _ in range(2):
        reproduce.main(["scenes", "--seeds", "0", "--rows", "teacher,hpdm,switch,student,fsm"])
        assert [words[0] for words in ran[:2]] == ["train_stage1.py", "evaluate.py"]
    scripts = [words[0] for words in ran]
    assert [scripts.count(f"{name}.py") for name in ("train_stage1", "train_stage2", "evaluate")] == [2, 1, 5]
    assert results()["scores"]["fsm"]["0"] == {"full": 60, "EL": 30, "missing": 30, "EMM": 32, "RMM": 32, "NM": 32}


def test_a_result_never_leaves_its_file(elsewhere, monkeypatch, capfd):
    ran, full = elsewhere
    reproduce.main(["scenes", "--seeds", "0,1", "--rows", "teacher,dropped"])
    before = results()
    reproduce.main(["scenes", "--seeds", "2", "--rows", "kl"])
    after = results()
    assert after["scores"].pop("kl").keys() == {"2"} and after["scores"] == before["scores"]
    monkeypatch.setattr(reproduce, "run", Mock(side_effect=RuntimeError("the command ended with 1")))
    assert runs.guarded(reproduce.main, ["scenes", "--seeds", "3", "--rows", "teacher"]) != 0
    assert results()["scores"]["teacher"] == before["scores"]["teacher"]
    other = reproduce.BY_NAME["teacher"]._replace(train="train_stage1.py {new}")
    monkeypatch.setitem(reproduce.BY_NAME, "teacher", other)
    assert runs.guarded(reproduce.main, ["scenes", "--seeds", "4", "--rows", "teacher"]) == 2
    assert "scenes.json" in capfd.readouterr().err


def test_a_file_that_is_not_its_own_is_named(elsewhere, capfd):
    for content in ("[]", "{}", "no json"):
        Path("benchmarks/results/scenes.json").write_text(content)
        assert runs.guarded(reproduce.main, ["scenes", "--seeds", "0"]) == 2
        assert "scenes.json" in capfd.readouterr().err


@pytest.mark.parametrize("key, value", [
    ("labels", {}), ("commands", {}), ("scores", {"teacher": {"0": {}}}),
    ("scores", {"teacher": {"0": {"full": "60"}}}), ("scores", {"teacher": {"0": {"full": float("nan")}}}),
    ("scores", {"teacher": {"0": {"full": 640}}}), ("scores", {"teacher": {"seed0": {"full": 60.0}}}),
])  # fmt: skip
def test_results_of_another_shape_are_named(elsewhere, key, value):
    file = Path("benchmarks/results/scenes.json")
    found = {name: {"teacher": "x"} for name in ("labels", "what", "commands")}
    found |= {"title": reproduce.SETTINGS["scenes"].title, "scores": {"teacher": {"0": {"full": 60.0}}}}
    file.write_text(json.dumps(found))
    assert reproduce.Results("scenes").data == found
    file.write_text(json.dumps({**found, key: value}))
    with fails(ValueError, "scenes.json"):
        reproduce.Results("scenes")


def test_two_reproduces_of_one_setting_do_not_run_at_once(elsewhere, monkeypatch):
    def again(*_):
        with fails(ValueError, "another reproduce runs scenes"):
            reproduce.main(["scenes", "--seeds", "1", "--rows", "teacher"])

    monkeypatch.setattr(reproduce, "train_all", again)
    reproduce.main(["scenes", "--seeds", "0", "--rows", "teacher"])


def test_a_dry_run_prints_all_that_a_row_needs_ready_to_be_run(capsys):
    options = "deliver --dry-run --seeds 0,00 --rows switch,fsm --root 'my data' --pretrained 'a b'"
    reproduce.main(shlex.split(options))
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(words[words.index("--out") + 1]).name for words in commands] == ["teacher", "hpdm", "student"]
    assert all(words[words.index("--root") + 1] == "my data" for words in commands) and "a b" in commands[0]


def test_a_child_that_says_nothing_is_named(tmp_path):
    with fails(ValueError, "ended with 3", "nothing was said"):
        reproduce.run(["-c", "raise SystemExit(3)"], "cpu", tmp_path / "log")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_cell_of_the_page_is_that_of_the_results(file):
    for ablations in (False, True):
        table = reproduce.table(json.loads(file.read_text()), ablations)
        assert table in PAGE.read_text(), f"{PAGE} lacks the table of {file}"
