"""The declared list of runs: what a row needs, and that every name in it exists."""

import json
import string
import time

import pytest

from benchmarks import reproduce
from engine import options
from evaluate import options as evaluate_options


def placeholders(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def test_a_row_needs_its_runs_and_what_those_start_from():
    assert reproduce.needed(["teacher"]) == {"teacher"}
    assert reproduce.needed(["method"]) == {"teacher", "method"}
    assert reproduce.needed(["student"]) == {"teacher", "method", "stage2"}
    assert reproduce.needed(["hard"]) == {"teacher", "method", "candidate"}
    assert reproduce.needed([row[0] for row in reproduce.ROWS]) == {run[0] for group in reproduce.RUNS for run in group}


def test_every_command_line_is_understood_and_refers_only_to_earlier_runs(tmp_path):
    known = set()
    for group in reproduce.RUNS:
        for name, script, flags in group:
            assert placeholders(flags) - {name, *reproduce.EPOCHS} <= known
            folders = {n: tmp_path / n for n in {name, *known}}
            if script == "train_stage1.py":
                line = f"{reproduce.SCENES} {flags} --out {folders[name]}".format(**folders, **reproduce.EPOCHS)
                options.stage1_options("", line.split())
            else:
                saved = {"train_stage1.py": {"options": {"data": "synthetic"}}}
                folders["method"].mkdir(exist_ok=True)
                (folders["method"] / "config.json").write_text(json.dumps(saved))
                options.stage2_options("", f"{reproduce.SCENES} {flags}".format(**folders, **reproduce.EPOCHS).split())
        known |= {run[0] for run in group}
    for _, _, files, _, flags in reproduce.ROWS:
        assert placeholders(files) <= known
        evaluate_options([files, *flags.split()])


def test_the_report_gives_mean_and_standard_deviation(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["reproduce.py", "--seeds", "2", "--rows", "teacher", "--length", "0.5"])
    o = reproduce.options()
    reproduce.report({"teacher": [dict.fromkeys(reproduce.COLUMNS, v) for v in (10.0, 14.0)]}, o, 1.0)
    assert "| teacher | 12.0 ± 2.8 |" in capsys.readouterr().out
    saved = json.loads((tmp_path / "benchmarks" / "results" / "miniature-0.5.json").read_text())
    assert saved["length"] == 0.5 and len(saved["scores"]["teacher"]) == 2


def test_an_unknown_row_is_named(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["reproduce.py", "--rows", "teacher,techer"])
    with pytest.raises(SystemExit):
        reproduce.options()
    assert "techer" in capsys.readouterr().err


def test_after_a_failed_run_no_other_begins(tmp_path, monkeypatch, capsys):
    begun = []

    def fail(name, script, flags, seed, *_):
        begun.append((name, seed))
        time.sleep(0.1)
        raise RuntimeError(f"{name} {seed} ended with 1")

    monkeypatch.setattr(reproduce, "train", fail)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["reproduce.py", "--jobs", "1"])
    assert reproduce.main(reproduce.options()) == 1
    assert "ended with 1\nThe same command goes on" in capsys.readouterr().err
    assert len(begun) < 5 and not (tmp_path / "benchmarks" / "results").exists()
