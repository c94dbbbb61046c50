"""What would give a wrong number without a word: each case was found by somebody who had not seen the tests."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import fails, folder_dataset
from PIL import Image
from small_runs import change, during, refused, said, start, stop, train

import data
import evaluate
import predict
from benchmarks import figures, reproduce
from data import open_dataset
from datasets import files, synthetic
from datasets.export import write_file
from engine import runs
from engine.checkpoint import load_last
from engine.options import stage1_options
from model import build_model


# ---- a validation split that is not like train ----------------------------------------------------------------------
def with_depth(root, train=(1000, 3000), val=(1000, 3000)):
    """A folder data set whose depth has these 16-bit values."""
    folder_dataset(root)
    for split, ends in (("train", train), ("val", val)):
        for i in range(4):
            values = np.random.default_rng(i).uniform(*ends, (40, 60)).astype(np.uint16)
            write_file(root / f"depth/{split}/{i}.png", values)
    return root


@pytest.mark.parametrize("val", [(0, 1e-9), (2000, 2000 + 1e-9), (200, 600), (5000, 15000)])
def test_a_validation_sensor_that_is_dead_or_in_another_unit_is_refused(tmp_path, val):
    root = with_depth(tmp_path / "d", val=val)
    train = open_dataset("folder", root, modalities=["rgb", "depth"])
    with fails(ValueError, "depth"):
        open_dataset("folder", root, "val", ["rgb", "depth"], ranges=train.ranges)
    assert open_dataset("folder", root, "val", ["rgb"], ranges=train.ranges)


def test_two_units_in_one_split_are_refused_and_a_single_odd_frame_is_not(tmp_path):
    root = with_depth(tmp_path / "d", (1000, 1500), (1000, 1500))
    open_dataset("folder", root)
    for i in (1, 3):
        write_file(root / f"depth/train/{i}.png", np.full((40, 60), 40 + i, np.uint16) + np.eye(40, 60).astype("u2"))
    with fails(ValueError, "depth reaches 44 in", "3.png", "but 1499 in"):
        open_dataset("folder", root)


def test_a_picture_that_exif_turns_upside_down_is_said_if_its_label_is_not(tmp_path):
    root, exif = folder_dataset(tmp_path / "d"), Image.Exif()
    exif[0x0112] = 3
    assert "EXIF" not in open_dataset("folder", root).describe()
    Image.open(root / "rgb/train/2.png").save(root / "rgb/train/2.png", exif=exif)
    assert "files of train/2" in open_dataset("folder", root).describe()


@pytest.mark.parametrize("given", [".", "d/rgb", "../x"])
def test_a_root_that_is_a_level_off_gets_a_hint(tmp_path, given):
    root = folder_dataset(tmp_path / "x/d")
    with fails(FileNotFoundError, "did you mean --root", f"{root.name}?"):
        open_dataset("folder", root.parent / given)


@pytest.mark.parametrize("prefix", ["", "copy_"])
def test_a_validation_split_that_is_a_copy_of_train_is_refused(tmp_path, prefix):
    root = folder_dataset(tmp_path / "d")
    for path in [path for part in ("rgb", "event", "labels") for path in (root / part / "train").iterdir()]:
        (path.parents[1] / "val" / path.name).unlink()
        shutil.copy(path, path.parents[1] / "val" / f"{prefix}{path.name}")
    with fails(ValueError, "4 frames of val", f"val/{prefix}0"):
        open_dataset("folder", root, "val")


def test_what_describes_the_truth_is_no_modality_and_numbered_classes_are_refused(tmp_path):
    root = folder_dataset(tmp_path / "d")
    (root / "event").rename(root / "panoptic")
    train = open_dataset("folder", root)
    assert train.modalities == ["rgb"] and "not used" in train.describe() and "panoptic" in train.describe()
    (root / "classes.txt").write_text("0 a\n1 b\n10 c\n2 d\n3 e\n")
    with fails(ValueError, "classes.txt", "0, 1, 10, 2"):
        open_dataset("folder", root)


def test_every_scene_has_lidar_returns():
    for size in range(32, 132, 4):
        assert synthetic.paint(0, "train", 0, size)["lidar"].any(), size


def test_a_split_without_a_sound_frame_is_checked_without_a_warning(tmp_path, monkeypatch, capsys, recwarn):
    root = folder_dataset(tmp_path / "d")
    for path in (root / "rgb/val").iterdir():
        path.write_bytes(b"")
    monkeypatch.setattr("sys.argv", ["data.py", "--check", "--data", "folder", "--root", str(root)])
    assert data.main() == 2 and not recwarn.list
    assert capsys.readouterr().out.count("cannot be read") == 4


@pytest.mark.parametrize("argv, named", [("--check --count 3", "--count"), ("--export x --data folder", "--data")])
def test_options_of_checking_and_exporting_do_not_mix(monkeypatch, capsys, argv, named):
    monkeypatch.setattr("sys.argv", ["data.py", *argv.split()])
    with pytest.raises(SystemExit):
        data.main()
    assert f"{named} has no effect" in capsys.readouterr().err


# ---- a run and its models -------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("how", ["another teacher", "student for teacher", "swapped"])
def test_an_ensemble_of_other_models_than_its_own_is_refused(whole, tmp_path, capfd, how):
    run = shutil.copytree(whole / "2", tmp_path / "run")
    for name in ("teacher.pt", "robust.pt"):
        shutil.copy(whole / "1" / name, run)
    evaluated = evaluate.options([str(run), "--limit", "2", "--device", "cpu"])
    assert runs.guarded(evaluate.main, evaluated) == 0
    if how == "another teacher":
        options = torch.load(run / "teacher.pt", weights_only=True)["meta"]["options"]
        change(run / "teacher.pt", "meta", options={**options, "seed": 5})
    elif how == "swapped":
        names = run / "teacher.pt", run / "robust.pt"
        contents = [name.read_bytes() for name in names]
        for name, content in zip(names, contents[::-1], strict=True):
            name.write_bytes(content)
    else:
        shutil.copy(run / "student.pt", run / "teacher.pt")
    capfd.readouterr()
    assert runs.guarded(evaluate.main, evaluated) == 2
    wrong = "fsm.pt was made with other models" if how == "another teacher" else "not a teacher: give it back its name"
    assert wrong in said(capfd)


@pytest.mark.parametrize("key, entries", [(None, {"step": 1}), (None, {"phase": "teacher"}), ("options", {"lr": 1.0})])
def test_a_checkpoint_that_was_edited_by_hand_is_refused(run, key, entries):
    state = torch.load(run / "last.pt", weights_only=True)
    (state[key] if key else state).update(entries)
    torch.save(state, run / "last.pt")
    (run / "last.previous.pt").unlink()
    with fails(ValueError, "last.pt was edited"):
        load_last(run)


@pytest.mark.usefixtures("handlers")
def test_a_run_goes_on_with_its_own_validation_frames_alone_and_is_called_unfinished(run, capfd):
    evaluated = evaluate.options([str(run), "--limit", "2", "--device", "cpu"])
    change(run / "last.pt", step=1)
    assert runs.guarded(evaluate.main, evaluated) == 0 and "step 1 of 4 of phase robust" in capfd.readouterr().out
    change(run / "last.pt", val_frames="a to b")
    assert "val_frames a to b" in refused(capfd, 1, ["--resume", str(run)])


@pytest.mark.parametrize(
    "entry", [{"val_size": 0}, {"val_size": "64"}, {"palette": [[300, 0, 0]]}, {"ranges": {"rgb": 5}}]
)
def test_an_edited_model_is_refused(untrained, tmp_path, entry):
    change(shutil.copy(untrained / "student.pt", tmp_path / "m.pt"), "meta", **entry)
    with fails(ValueError, "m.pt"):
        predict.Segmenter(tmp_path / "m.pt", "cpu")


@pytest.mark.usefixtures("handlers")
def test_stage_1_does_not_start_in_a_folder_that_holds_models_of_stage_2(whole, tmp_path, capfd):
    shutil.copy(whole / "2/fsm.pt", tmp_path)
    assert "fsm.pt" in refused(capfd, 1, start(1, whole, tmp_path))


@pytest.mark.usefixtures("handlers")
def test_files_that_moved_are_found_again_by_their_options(whole, run, tmp_path):
    assert train(2, start(2, run.parent, tmp_path / "2", "--max-minutes", "1e-6")) == 0
    run.rename(tmp_path / "moved")
    assert train(2, ["--resume", str(tmp_path / "2"), "--stage1", str(tmp_path / "moved"), "--max-minutes", "60"]) == 0


@pytest.mark.usefixtures("handlers")
def test_start_weights_that_moved_are_given_again(whole, tmp_path):
    weights = shutil.copy(whole / "1/teacher.pt", tmp_path / "start.pt")
    argv = start(1, whole, tmp_path / "1", "--pretrained", str(weights))
    with during("robust", 1, stop):
        assert train(1, argv) == 143
    moved = Path(weights).rename(tmp_path / "moved.pt")
    assert train(1, ["--resume", str(tmp_path / "1"), "--pretrained", str(moved)]) == 0


@pytest.mark.usefixtures("handlers")
def test_swapped_models_and_an_unfinished_stage_1_are_named(whole, run, tmp_path, capfd):
    swapped = [*start(2, whole, tmp_path / "2")[:-4], "--teacher", f"{run}/robust.pt", "--robust", f"{run}/teacher.pt"]
    assert "swap them" in refused(capfd, 2, swapped)
    (run / "robust.pt").unlink()
    change(run / "last.pt", step=1)
    capfd.readouterr()
    assert train(2, start(2, run.parent, tmp_path / "2")) == 2
    assert f"--resume {run}" in capfd.readouterr().err


@pytest.mark.parametrize(
    "argv, losses, named",
    [
        ("--alpha 0 --match same", "paper_losses", "--match"),
        ("--teacher t.pt --epochs 9", "paper_losses", "--epochs"),
        ("--alpha 7", "anyseg", "--alpha"),
        ("--distill-epochs 0", "published", "published"),
    ],
)
def test_options_without_effect_are_refused(argv, losses, named, capsys):
    with pytest.raises(SystemExit):
        stage1_options("", argv.split(), losses)
    assert named in capsys.readouterr().err


def test_a_cmnext_wants_rgb_first():
    with fails(ValueError, "rgb", "depth,rgb"):
        build_model("cmnext_tiny", 3, ["depth", "rgb"])


# ---- inference ------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("given, named", [
    ({"rgb": np.uint16}, "16 bit"), ({"rgb": 300.0}, "0..1"), ({"size": 16}, "size 16"), ({"size": 64.0}, "size 64.0"),
    ({"size": "64"}, "size '64'"), ({"device": "gpu"}, "device 'gpu'"), ({"size": (64, 64, 64)}, "size (64"),
])  # fmt: skip
def test_the_segmenter_refuses_what_predict_refuses(whole, given, named):
    rgb = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    if "rgb" in given:
        rgb = rgb.astype(given["rgb"]) if isinstance(given["rgb"], type) else rgb * given.pop("rgb")
    with fails(ValueError, named):
        predict.Segmenter(whole / "1", given.get("device", "cpu"), given.get("size"))(rgb=rgb)


def test_the_segmenter_takes_any_integers_for_its_size(untrained):
    for size in (np.int64(64), (64,), np.array([64, 96])):
        assert predict.Segmenter(untrained / "student.pt", "cpu", size).size in (64, (64, 96))


def test_one_file_for_two_modalities_is_refused(tmp_path, capsys):
    (tmp_path / "a.png").touch()
    with pytest.raises(SystemExit):
        predict.options(["m.pt", "--input", f"rgb={tmp_path}/a.png", f"depth={tmp_path}/a.png"])
    assert "a.png to two modalities" in capsys.readouterr().err


@pytest.mark.parametrize("argv", ["--export m.pt2 --count 3", "--export m.pt2 --split val", "--input rgb=" + 300 * "x"])
def test_predict_options_that_can_do_nothing_are_refused(argv, capsys):
    with pytest.raises(SystemExit):
        predict.options(["m.pt", *argv.split()])
    assert ("MODALITY=PATH" if "xxx" in argv else argv.split()[2]) in capsys.readouterr().err


def test_an_exported_program_keeps_its_about_json(untrained, tmp_path):
    first, second = (
        predict.options([str(untrained / "student.pt"), "--export", str(tmp_path / name)])
        for name in ("m.pt2", "n.pt2")
    )
    predict.main(first)
    with fails(ValueError, "about.json", "m.pt2"):
        predict.main(second)
    about = tmp_path / "about.json"
    about.write_text(about.read_text().replace('"program"', '"x"'))
    with fails(ValueError, "about.json", "program"):
        predict.main(first)


def test_evaluate_takes_no_path_twice(untrained):
    with fails(ValueError, "given twice"):
        evaluate.main(evaluate.options([str(untrained), f"{untrained}/", "--limit", "1", "--device", "cpu"]))


# ---- figures and results --------------------------------------------------------------------------------------------
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


@pytest.mark.parametrize("key, value", [
    ("labels", {}), ("commands", {}), ("scores", {"teacher": {"0": {}}}),
    ("scores", {"teacher": {"0": {"full": "60"}}}), ("scores", {"teacher": {"0": {"full": float("nan")}}}),
    ("scores", {"teacher": {"0": {"full": 640}}}),
])  # fmt: skip
def test_results_of_another_shape_are_named(tmp_path, monkeypatch, key, value):
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    found = {name: {"teacher": "x"} for name in ("labels", "what", "commands")}
    found |= {"title": reproduce.SETTINGS["scenes"].title, "scores": {"teacher": {"0": {"full": 60.0}}}}
    (tmp_path / "benchmarks/results/scenes.json").write_text(json.dumps(found))
    assert reproduce.Results("scenes").data == found
    (tmp_path / "benchmarks/results/scenes.json").write_text(json.dumps({**found, key: value}))
    with fails(ValueError, "scenes.json"):
        reproduce.Results("scenes")


def test_two_reproduces_of_one_setting_do_not_run_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)

    def again(*_):
        with fails(ValueError, "another reproduce runs scenes"):
            reproduce.main(["scenes", "--seeds", "1", "--rows", "teacher"])

    monkeypatch.setattr(reproduce, "train_all", again)
    reproduce.main(["scenes", "--seeds", "0", "--rows", "teacher"])


def test_grey_of_16_bits_with_alpha_is_named(tmp_path):
    from data_files import put_together

    put_together(tmp_path / "a.png", np.zeros((4, 4)), 16, 4, bytes(4 * (1 + 16)))
    with fails(ValueError, "a.png", "alpha"):
        files.read_image(tmp_path / "a.png")
