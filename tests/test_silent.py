"""What would give a wrong number without a word: each case was found by somebody who had not seen the tests."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import fails, folder_dataset
from PIL import Image
from small_runs import change, during, refused, said, start, stop, train

import evaluate
import predict
from benchmarks import figures
from data import open_dataset
from datasets import synthetic
from datasets.export import write_file
from engine import runs
from engine.checkpoint import load_last

pytestmark = pytest.mark.usefixtures("handlers")


# ---- a validation split that is not like train ----------------------------------------------------------------------
@pytest.mark.parametrize("val", [(0, 1e-9), (2000, 2000 + 1e-9), (100, 300), (12000, 36000)])
def test_a_validation_sensor_that_is_dead_or_in_another_unit_is_refused(tmp_path, val):
    root = folder_dataset(tmp_path / "d", depth=(1000, 3000, "u2"))
    for path in (root / "depth/val").iterdir():
        write_file(path, np.random.default_rng(0).uniform(*val, (40, 60)).astype("u2"))
    train = open_dataset("folder", root, modalities=["rgb", "depth"])
    with fails(ValueError, "depth"):
        open_dataset("folder", root, "val", ["rgb", "depth"], ranges=train.ranges)
    assert open_dataset("folder", root, "val", ["rgb"], ranges=train.ranges)


def test_two_units_in_one_split_are_refused_and_a_single_odd_frame_is_not(tmp_path):
    root = folder_dataset(tmp_path / "d", depth=(1000, 1500, "u2"))
    open_dataset("folder", root)
    for i in (1, 3):
        write_file(root / f"depth/train/{i}.png", np.full((40, 60), 40 + i, np.uint16) + np.eye(40, 60).astype("u2"))
    with fails(ValueError, "depth reaches 44 in", "3.png", "but 1499 in"):
        open_dataset("folder", root)


def test_a_picture_that_exif_turns_upside_down_is_said_if_its_label_is_not(root):
    exif = Image.Exif()
    exif[0x0112] = 3
    assert "EXIF" not in open_dataset("folder", root).describe()
    Image.open(root / "rgb/train/2.png").save(root / "rgb/train/2.png", exif=exif)
    assert "files of train/2" in open_dataset("folder", root).describe()


@pytest.mark.parametrize("given", [".", "d/rgb", "../x"])
def test_a_root_that_is_a_level_off_gets_a_hint(tmp_path, given):
    root = folder_dataset(tmp_path / "x/d")
    with fails(FileNotFoundError, "did you mean --root", f"{root.name}?"):
        open_dataset("folder", root.parent / given)


@pytest.mark.parametrize("count, prefix, put", [(4, "", shutil.copy), (4, "copy_", shutil.copy), ("", "", os.symlink)])
def test_a_validation_split_of_frames_of_train_is_refused(root, count, prefix, put):
    for path in root.glob("*/train/*"):
        (path.parents[1] / "val" / path.name).unlink()
        put(path, path.parents[1] / "val" / f"{prefix}{path.name}")
    assert open_dataset("folder", root)
    with fails(ValueError, f"{count} frames of val are frames of train", f"val/{prefix}0"):
        open_dataset("folder", root, "val")


def test_what_describes_the_truth_is_no_modality_and_numbered_classes_are_refused(root):
    (root / "event").rename(root / "panoptic")
    train = open_dataset("folder", root)
    assert train.modalities == ["rgb"] and "not used" in train.describe() and "panoptic" in train.describe()
    (root / "classes.txt").write_text("0 a\n1 b\n10 c\n2 d\n3 e\n")
    with fails(ValueError, "classes.txt", "0, 1, 10, 2"):
        open_dataset("folder", root)


def test_every_scene_has_lidar_returns():
    for size in range(32, 132, 4):
        assert synthetic.paint(0, "train", 0, size)["lidar"].any(), size


def test_a_split_without_a_sound_frame_is_checked_without_a_warning(root, data_py, recwarn):
    for path in (root / "rgb/val").iterdir():
        path.write_bytes(b"")
    status, printed = data_py(f"--check --data folder --root {root}")
    assert status == 2 and not recwarn.list and printed.out.count("cannot be read") == 4


# ---- a run and its models -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["teacher", "robust", "student", "student for teacher", "swapped"])
def test_an_ensemble_of_other_models_than_its_own_is_refused(whole, tmp_path, capfd, how):
    run = shutil.copytree(whole / "2", tmp_path / "run")
    for name in ("teacher.pt", "robust.pt"):
        shutil.copy(whole / "1" / name, run)
    evaluated = evaluate.options([str(run), "--limit", "2", "--device", "cpu"])
    assert runs.guarded(evaluate.main, evaluated) == 0
    refuses = {"teacher": "robust.pt", "robust": "fsm.pt", "student": "student.pt"}  # which was made with the others
    if how in refuses:
        change(run / f"{how}.pt", "meta", sources=[1, 2])
    elif how == "swapped":
        names = run / "teacher.pt", run / "robust.pt"
        for name, content in zip(names, [name.read_bytes() for name in names[::-1]], strict=True):
            name.write_bytes(content)
    else:
        shutil.copy(run / "student.pt", run / "teacher.pt")
    capfd.readouterr()
    assert runs.guarded(evaluate.main, evaluated) == 2
    named = f"{refuses[how]} was made with another" if how in refuses else "not a teacher: give it back its name"
    assert named in said(capfd)


@pytest.mark.parametrize("key, entries", [(None, {"step": 1}), (None, {"phase": "teacher"}), ("options", {"lr": 1.0})])
def test_a_checkpoint_that_was_edited_by_hand_is_refused(run, key, entries):
    state = torch.load(run / "last.pt", weights_only=True)
    (state[key] if key else state).update(entries)
    torch.save(state, run / "last.pt")
    (run / "last.previous.pt").unlink()
    with fails(ValueError, "last.pt was edited"):
        load_last(run)


def test_a_run_goes_on_with_its_own_validation_frames_alone_and_is_called_unfinished(run, capfd):
    evaluated = evaluate.options([str(run), "--limit", "2", "--device", "cpu"])
    change(run / "last.pt", step=1)
    assert runs.guarded(evaluate.main, evaluated) == 0 and "step 1 of 4 of phase robust" in capfd.readouterr().out
    change(run / "last.pt", val_frames="a to b")
    assert "val_frames a to b" in refused(capfd, 1, ["--resume", str(run)])


def test_stage_1_does_not_start_in_a_folder_that_holds_models_of_stage_2(whole, tmp_path, capfd):
    shutil.copy(whole / "2/fsm.pt", tmp_path)
    assert "fsm.pt" in refused(capfd, 1, start(1, whole, tmp_path))


def test_files_that_moved_are_found_again_by_their_options(whole, run, tmp_path, capfd):
    assert train(2, start(2, run.parent, tmp_path / "2", "--max-minutes", "1e-6")) == 0
    run.rename(tmp_path / "moved")
    assert "place by --stage1" in refused(capfd, 2, ["--resume", str(tmp_path / "2")])
    assert train(2, ["--resume", str(tmp_path / "2"), "--stage1", str(tmp_path / "moved"), "--max-minutes", "60"]) == 0


def test_start_weights_that_moved_are_given_again(whole, tmp_path):
    weights = shutil.copy(whole / "1/teacher.pt", tmp_path / "start.pt")
    with during("robust", 1, stop):
        assert train(1, start(1, whole, tmp_path / "1", "--pretrained", str(weights))) == 143
    moved = Path(weights).rename(tmp_path / "moved.pt")
    assert train(1, ["--resume", str(tmp_path / "1"), "--pretrained", str(moved)]) == 0


def test_swapped_models_and_a_stage_1_that_is_unfinished_or_has_no_robust_model_are_named(whole, run, tmp_path, capfd):
    swapped = [*start(2, whole, tmp_path / "2")[:-4], "--teacher", f"{run}/robust.pt", "--robust", f"{run}/teacher.pt"]
    assert "swap them" in refused(capfd, 2, swapped)
    (run / "robust.pt").unlink()
    for way in (f"--teacher {run}/teacher.pt", f"--resume {run}"):
        assert train(2, start(2, run.parent, tmp_path / "2")) == 2
        assert f"train_stage1.py {way}" in capfd.readouterr().err
        change(run / "last.pt", step=1)


# ---- inference ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [16, 64.0, "64", (64, 64, 64)])
def test_a_size_or_device_that_means_nothing_is_refused(untrained, size):
    with fails(ValueError, f"size {size!r}"):
        predict.Segmenter(untrained / "student.pt", "cpu", size)
    with fails(ValueError, "device 'gpu'"):
        predict.Segmenter(untrained / "student.pt", "gpu")


def test_the_segmenter_takes_any_integers_for_its_size(untrained):
    for size in (np.int64(64), (64,), np.array([64, 96])):
        assert predict.Segmenter(untrained / "student.pt", "cpu", size).size in (64, (64, 96))


def test_an_exported_program_keeps_its_about_json(untrained, tmp_path):
    files = [str(tmp_path / name) for name in ("m.pt2", "n.pt2")]
    first, second = (predict.options([f"{untrained}/student.pt", "--export", file]) for file in files)
    predict.main(first)
    with fails(ValueError, "about.json", "m.pt2"):
        predict.main(second)
    about = tmp_path / "about.json"
    about.write_text(about.read_text().replace('"program"', '"x"'))
    with fails(ValueError, "about.json", "program"):
        predict.main(first)


# ---- figures and results --------------------------------------------------------------------------------------------
def test_curves_of_two_runs_are_refused_and_rows_that_are_not_drawn_are_said(tmp_path, capsys):
    line = {"phase": "teacher", "step": 2, "epoch": 1, "ce": 1.0, "lr": 0.1}
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({**line, "step": step}) + "\n" for step in (2, 4, 2)))
    with fails(ValueError, "two runs"):
        figures.curves(tmp_path / "log.jsonl")
    scores = {"any": {"R": {"miou_published": 50.0}}}
    report = {"rule": "published", "results": {"teacher": scores, "a/student.pt": scores}}
    (tmp_path / "r.json").write_text(json.dumps(report))
    figures.lost(tmp_path / "r.json")
    assert "not drawn: a/student.pt" in capsys.readouterr().out


def test_the_lost_figure_goes_by_the_names_of_its_columns(tmp_path, monkeypatch):
    names = ["RD", "D", "R"]  # any order
    scores = {name: {"miou_occurring": {"RD": 60.0, "D": 20.0, "R": 30.0}[name]} for name in names}
    report = {"rule": "occurring", "results": {"teacher": {"any": scores}}}
    Path(tmp_path / "r.json").write_text(json.dumps(report))
    monkeypatch.setattr(figures, "chart", lambda title, _, ticks, series: (title, series))
    title, series = figures.lost(tmp_path / "r.json")
    assert series == {"teacher": {0: 60.0, 1: 25.0}} and "occurring" in title
    scores["D"] = {"miou_occurring": 530.0}
    (tmp_path / "r.json").write_text(json.dumps(report))
    with fails(ValueError, "0..100"):
        figures.lost(tmp_path / "r.json")
    del scores["D"]
    (tmp_path / "r.json").write_text(json.dumps(report))
    with fails(ValueError, "teacher", "2 of the 3"):
        figures.lost(tmp_path / "r.json")
