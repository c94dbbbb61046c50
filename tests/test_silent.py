"""What would give a wrong number without a word: each case was found by somebody who had not seen the tests."""

import json
import shlex
import shutil
import struct
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
from datasets import files, layouts, synthetic
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
@pytest.mark.parametrize("how", ["another teacher", "another robust model", "student for teacher", "swapped"])
def test_an_ensemble_of_other_models_than_its_own_is_refused(whole, tmp_path, capfd, how):
    run = shutil.copytree(whole / "2", tmp_path / "run")
    for name in ("teacher.pt", "robust.pt"):
        shutil.copy(whole / "1" / name, run)
    evaluated = evaluate.options([str(run), "--limit", "2", "--device", "cpu"])
    assert runs.guarded(evaluate.main, evaluated) == 0
    if how.startswith("another"):
        file = run / ("teacher.pt" if "teacher" in how else "robust.pt")
        change(file, "meta", options={**torch.load(file, weights_only=True)["meta"]["options"], "seed": 5})
    elif how == "swapped":
        names = run / "teacher.pt", run / "robust.pt"
        contents = [name.read_bytes() for name in names]
        for name, content in zip(names, contents[::-1], strict=True):
            name.write_bytes(content)
    else:
        shutil.copy(run / "student.pt", run / "teacher.pt")
    capfd.readouterr()
    assert runs.guarded(evaluate.main, evaluated) == 2
    told = {
        "another teacher": "robust.pt was made with another teacher",
        "another robust model": "fsm.pt was made with",
    }
    assert told.get(how, "not a teacher: give it back its name") in said(capfd)


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
    ("scores", {"teacher": {"0": {"full": 640}}}), ("scores", {"teacher": {"seed0": {"full": 60.0}}}),
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


# ---- own data, once more --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "classes",
    ["a\n", "a\n\nb\n", "name r g b\na\nb\n", "a 0.5 0.25 0.5\nb\n", "a #804080\nb\n"],
)
def test_a_classes_txt_that_would_shift_or_rename_classes_is_refused(tmp_path, classes):
    (tmp_path / "classes.txt").write_text(classes)
    with fails(ValueError, "classes.txt"):
        layouts.read_classes(tmp_path / "classes.txt")


@pytest.mark.parametrize("folder", ["truth_colour", "seg", "colour_gt", "trainIds", "target", "gtFine"])
def test_folders_that_describe_the_truth_are_no_modalities(tmp_path, folder):
    root = folder_dataset(tmp_path / "d")
    shutil.copytree(root / "rgb", root / folder)
    assert open_dataset("folder", root).modalities == ["rgb", "event"]


def test_a_layout_that_is_the_other_way_round_is_explained(tmp_path):
    root = folder_dataset(tmp_path / "d")
    for part in ("rgb", "labels"):
        shutil.move(root / part / "train", tmp_path / "e/train" / part)
    with fails(FileNotFoundError, "labels/train, not train/labels"):
        open_dataset("folder", tmp_path / "e")
    (root / "x=y").mkdir()
    shutil.move(root / "event/train", root / "x=y/train")
    with fails(ValueError, "x=y"):
        open_dataset("folder", root)


def test_a_modality_without_any_file_in_a_split_is_refused_at_once(tmp_path, mini):
    root = folder_dataset(tmp_path / "d")
    shutil.copytree(root / "event/train", root / "thermal/train")
    with fails(FileNotFoundError, "thermal", "val"):
        open_dataset("folder", root, "val")
    shutil.rmtree(mini("deliver") / "hha")
    with fails(FileNotFoundError, "hha", "--depth raw"):
        open_dataset("deliver", tmp_path / "deliver")
    assert open_dataset("deliver", tmp_path / "deliver", depth="raw")
    with fails(ValueError, "--depth raw"):
        open_dataset("folder", root, depth="raw")


def test_labels_of_nyuv2_whose_ids_were_shifted_are_refused(mini):
    root = mini("nyuv2")
    for path in (root / "Label").iterdir():
        label = files.read_image(path)[..., 0]
        write_file(path, np.where(label == 0, 255, label - 1).astype(np.uint8))
    path.write_bytes(path.read_bytes())
    label[:2] = 0
    write_file(path, np.where(label == 0, 255, label - 1).astype(np.uint8))
    dataset = open_dataset("nyuv2", root, "train" if path.stem.startswith("train") else "test")
    with fails(ValueError, path.name, "255"):
        [dataset[i] for i in range(len(dataset))]


def test_validation_frames_of_train_are_found_by_image_and_label(tmp_path):
    root = folder_dataset(tmp_path / "d")
    for part in ("rgb", "labels"):
        shutil.copy(root / part / "train/1.png", root / part / "val/2.png")
    with fails(ValueError, "val/2"):
        open_dataset("folder", root, "val")


def test_check_says_dead_frames_and_marks_for_nothing_measured(tmp_path, monkeypatch, capsys):
    root = with_depth(tmp_path / "d")
    for path in [*(root / "depth").glob("*/*")]:
        depth = files.read_image(path)[..., 0]
        depth[:20] = 3500
        write_file(path, depth)
    for path in [*(root / "event/train").iterdir()][:2]:
        write_file(path, np.zeros((40, 60, 3), np.uint8))
    monkeypatch.setattr("sys.argv", ["data.py", "--check", "--data", "folder", "--root", str(root)])
    assert data.main() == 0
    printed = capsys.readouterr().out
    assert "train: warning: event is constant in 2 of 4 frames" in printed
    assert "train: warning: 50% of depth is its largest value" in printed


@pytest.mark.parametrize("tags", [{284: 2}, {262: 0}])
def test_16_bit_tiffs_that_pillow_reads_wrongly_are_refused(tmp_path, tags):
    image = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8))
    image.save(tmp_path / "a.tif")
    assert files.read_image(tmp_path / "a.tif").dtype == np.uint16
    with Image.open(tmp_path / "a.tif") as opened:
        known = opened.tag_v2
    data = bytearray((tmp_path / "a.tif").read_bytes())
    entry = {key: struct.pack("<HHI", key, 3, 1) + struct.pack("<I", known.get(key, 1)) for key in tags}
    for key, value in tags.items():
        place = data.find(entry[key])
        assert place >= 0
        data[place + 8 : place + 12] = struct.pack("<I", value)
    (tmp_path / "a.tif").write_bytes(data)
    with fails(ValueError, "a.tif", "16-bit TIFF"):
        files.read_image(tmp_path / "a.tif")


def test_mcubes_files_that_were_cut_already_are_refused(mini):
    root = mini("mcubes")
    for path in root.rglob("*.npy"):
        np.save(path, np.load(path)[:, 192:])
    with fails(ValueError, "192"):
        open_dataset("mcubes", root)[0]


# ---- arrays of a robot ----------------------------------------------------------------------------------------------
@pytest.fixture
def metric(untrained, tmp_path):
    """A function that makes a Segmenter whose depth has this kind and range, of a data set."""

    def make(kind, high, data="folder"):
        ranges = {"depth": [kind, 0, high, [0.5] * 3, [0.25] * 3]}
        file = shutil.copy(untrained / "student.pt", tmp_path / "m.pt")
        change(file, "meta", data=data, depth="raw" if data == "nyuv2" else "hha", ranges=ranges)
        return predict.Segmenter(file, "cpu")

    return make


def test_floats_are_held_to_the_range_of_the_integers_they_stand_for(metric):
    depth = np.random.default_rng(0).uniform(0, 0.03, (64, 64)).astype(np.float32)
    model = metric("16 bit", 2000)
    model(depth=depth)
    model(depth=depth / depth.max() * np.float32(0.04))
    for wrong, named in (
        (depth * 20, "depth must be in"),
        (depth + 1, "0..1"),
        (np.where(depth > 0.02, np.nan, depth), "nan"),
    ):
        with fails(ValueError, "depth", named):
            model(depth=wrong)
    with fails(ValueError, "depth", "nan"):
        metric("float", 10)(depth=np.where(depth > 0.02, np.nan, depth))


def test_raw_depth_of_nyuv2_is_metres_or_millimetres(metric):
    metres, model = np.random.default_rng(0).uniform(1, 4, (64, 64)).astype(np.float32), metric("float", 1, "nyuv2")
    millimetres = np.rint(1000 * metres).astype(np.uint16)
    assert (model(depth=millimetres) == model(depth=millimetres / np.float32(1000))).all()
    with fails(ValueError, "beyond"):
        model(depth=1000 * metres)


def test_masked_values_are_nothing_measured(metric):
    depth = np.random.default_rng(0).integers(1, 200, (64, 64), np.uint8)
    mask = depth > 100
    model = metric("8 bit", 255)
    assert (
        model(depth=np.ma.masked_array(depth, mask)) == model(depth=np.where(mask, 0, depth).astype(np.uint8))
    ).all()


def test_pictures_do_not_go_into_the_folder_of_the_data(untrained, tmp_path, mini):
    root = mini("folder")
    file = change(shutil.copy(untrained / "student.pt", tmp_path / "m.pt"), "meta", data="folder", root=str(root))
    with fails(ValueError, "--out", "folder of the data"):
        predict.main(predict.options([str(file), "--out", str(root / "predictions")]))
    with pytest.raises(SystemExit):
        predict.options([str(file), "--panel", "p.png", "--file-ids"])


# ---- reproduce and figures, once more -------------------------------------------------------------------------------
def test_a_dry_run_prints_all_that_a_row_needs_ready_to_be_run(capsys):
    argv = [
        "deliver",
        "--dry-run",
        "--seeds",
        "0,00",
        "--rows",
        "switch,fsm",
        "--root",
        "my data",
        "--pretrained",
        "a b",
    ]
    reproduce.main(argv)
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(words[words.index("--out") + 1]).name for words in commands] == ["teacher", "hpdm", "student"]
    assert all(words[words.index("--root") + 1] == "my data" for words in commands) and "a b" in commands[0]
    with pytest.raises(SystemExit):
        reproduce.main(["deliver", "--dry-run", "--pretrained", ""])


def test_a_child_that_says_nothing_is_named(tmp_path):
    with fails(ValueError, "ended with 3", "nothing was said"):
        reproduce.run(["-c", "raise SystemExit(3)"], "cpu", tmp_path / "log")


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
