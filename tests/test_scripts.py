"""Whole runs of the scripts, as a user starts them: both stages, evaluation, on painted scenes and on every layout."""

import json
import pathlib

import pytest
import torch
from small_runs import log, script

STAGE1 = "--epochs 1 --distill-epochs 1 --batch-size 4 --workers 0".split()
STAGE2 = "--fsm-epochs 1 --student-epochs 1 --workers 0".split()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    script("train_stage1.py", "--out", folder, "--limit", 12, "--size", 64, *STAGE1)
    script("train_stage2.py", "--stage1", folder, *STAGE2)
    return folder


def test_both_stages_write_what_they_promise(run_folder):
    for name in ("config.json", "log.jsonl", "teacher.pt", "robust.pt", "fsm.pt", "student.pt", "last.pt"):
        assert (run_folder / name).stat().st_size > 0
    lines = log(run_folder)
    assert list(dict.fromkeys(line["phase"] for line in lines)) == ["teacher", "robust", "fsm", "student"]
    robust = next(line for line in lines if line["phase"] == "robust" and "lr" in line)
    assert {"ce", "kl", "hpdm", "images_per_second", "data_wait", "peak_memory_mb"} <= set(robust)
    student = torch.load(run_folder / "student.pt", weights_only=True)
    assert student["meta"]["modalities"] == ["rgb", "depth", "event", "lidar"] and len(student["meta"]["classes"]) == 12
    teacher = torch.load(run_folder / "teacher.pt", weights_only=True)
    assert student["model"].keys() == teacher["model"].keys()  # one model, of the teacher's cost
    assert any(not torch.equal(student["model"][k], teacher["model"][k]) for k in teacher["model"])


def test_evaluation_of_a_run_prints_a_row_per_model(run_folder, tmp_path):
    text = script("evaluate.py", run_folder, "--limit", 4, "--json", tmp_path / "out.json")
    for row in ("teacher", "robust", "switch", "FSM ensemble", "student"):
        assert f"\n| {row} " in text
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert len(results["student"]["any"]) == 15
    script("evaluate.py", run_folder, "--limit", 4, "--only", "switch,FSM ensemble", "--json", tmp_path / "two.json")
    two = json.loads((tmp_path / "two.json").read_text())["results"]
    assert two == {name: results[name] for name in ("switch", "FSM ensemble")}
    text = script("evaluate.py", run_folder, "--only", "pupil", status=2)
    assert "--only pupil" in text and "FSM ensemble" in text


@pytest.mark.parametrize("layout", ["deliver", "muses", "mcubes", "folder"])
def test_both_stages_and_all_protocols_run_on_every_layout(layout, tmp_path):
    script("data.py", "--export", tmp_path / "data", "--layout", layout, "--count", 24, "--size", 64)
    backbone = "cmnext_tiny" if layout == "muses" else "segformer_tiny"
    where = f"--data {layout} --root {tmp_path}/data --backbone {backbone} --limit 4 --out {tmp_path}/run"
    script("train_stage1.py", *where.split(), "--size", 64, "--val-size", 64, *STAGE1)
    script("train_stage2.py", "--stage1", tmp_path / "run", *STAGE2)
    text = script("evaluate.py", tmp_path / "run/student.pt", "--limit", 2, "--protocol", "all")
    groups = () if layout == "mcubes" else ("weather", "sensor failure")  # its frames have neither
    for title in ("any-modality", "EMM", "RMM", "NM", *groups):
        assert title in text
