"""Folder data sets that are not what they should be: labels taken for sensors, palettes, kinds and ranges, links."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from data_files import fails, few_bits, folder_dataset
from models import about
from PIL import Image

import evaluate
import predict
from data import open_dataset
from datasets import files
from datasets.export import write_file
from engine.checkpoint import save_model
from model import build_model

SIDE = 32
EIGHT, SIXTEEN, METRES = (0, 256, "u1"), (0, 65536, "u2"), (0, 80, "f4")  # from, to below, and the kind
COLOURS, GREYS = [(200, 0, 0), (0, 200, 0), (0, 0, 200)], [(0, 0, 0), (1, 1, 1), (2, 2, 2)]
KEPT = [(1, None), (2, None), (4, None), (8, None), (2, COLOURS), (8, COLOURS), (2, GREYS), (8, GREYS)]  # bits, palette


# ---- making data sets and models ------------------------------------------------------------------------------------
def flat(value, kind="f4", width=SIDE):
    return np.full((SIDE, width), value, kind)


def folder(root, **sensors):
    """Four frames of noise a split, of the classes a, b, c; sensor -> from, to below, kind. Always of rgb."""
    folder_dataset(root, shape=(SIDE, SIDE), classes=3, **{"rgb": EIGHT, **sensors})
    write_file(root / "classes.txt", "a 200 0 0\nb 0 200 0\nc 0 0 200\n")
    return root


def model_of(root):
    """A model with random weights that says it was trained on the folder data set at root."""
    train = open_dataset("folder", root)
    learnt = {name: getattr(train, name) for name in ("modalities", "classes", "ranges", "normalisation")}
    meta = about(**learnt, palette=train.palette.tolist(), root=str(root), size=SIDE, val_size=SIDE)
    save_model(root / "m.pt", build_model("segformer_tiny", 3, train.modalities), meta)
    return root / "m.pt"


def run(script, *arguments):
    script.main(script.options([str(argument) for argument in arguments]))


# ---- labels ---------------------------------------------------------------------------------------------------------
def test_folders_named_or_filled_like_labels_and_hidden_ones_are_no_modalities_unless_they_are_named(tmp_path):
    root = folder(tmp_path, depth=SIXTEEN)
    for path in sorted(root.glob("labels/*/*")):
        ids = np.array(Image.open(path))
        for name in ("labels_color", "Label", "gtFine", "mask", "annotations", ".hidden", "copy"):
            write_file(root / name / path.relative_to(root / "labels"), ids if name == "copy" else 80 * ids)
    assert open_dataset("folder", root, "val").modalities == ["rgb", "depth"]
    assert open_dataset("folder", root, "val", ["mask", "rgb"]).modalities == ["mask", "rgb"]


@pytest.mark.parametrize("bits, palette", KEPT)
def test_grey_of_few_bits_and_a_palette_of_the_classes_or_of_grey_keep_the_stored_ids(tmp_path, bits, palette):
    root, shape = folder(tmp_path), (SIDE, SIDE - 1)  # a row ends within a byte
    ids = np.random.default_rng(bits).integers(0, min(3, 2**bits), shape, np.uint8)
    write_file(root / "rgb/val/0.png", np.zeros((*shape, 3), np.uint8))
    few_bits(root / "labels/val/0.png", ids, bits, palette)
    assert np.array_equal(open_dataset("folder", root, "val")[0][1], ids)


def test_a_label_whose_palette_was_sorted_anew_is_refused(tmp_path):
    path = folder(tmp_path) / "labels/val/0.png"
    few_bits(path, np.array(Image.open(path)), 8, COLOURS[::-1])
    with fails(ValueError, path, "palette", "classes.txt", "8-bit grey"):
        open_dataset("folder", tmp_path, "val")[0]


def test_a_deliver_label_with_a_palette_is_refused(mini):
    root = mini("deliver")
    path = open_dataset("deliver", root, "val").frames[0].label
    few_bits(path, flat(2, "u1"), 8, [(7, 0, 0), (3, 0, 0), (5, 0, 0)])  # red, and so the id, is 5
    with fails(ValueError, path, "palette", "8-bit grey"):
        open_dataset("deliver", root, "val")[0]


# ---- kinds and ranges -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "sensors, file, values, parts",
    [
        ({"lidar": METRES}, "lidar/val/2.npy", flat(1e30), ["1e+30"]),
        ({"lidar": METRES}, "lidar/train/2.npy", flat(1e30), ["1e+30"]),
        ({"lidar": METRES}, "lidar/val/1.npy", flat(800), ["800", "training split"]),
        (
            {"heat": (283, 311, "f4")},
            "heat/val/1.npy",
            20 * np.eye(SIDE, dtype="f4"),
            ["20..20", "or clip it"],
        ),  # Celsius
        ({"depth": SIXTEEN}, "depth/val/0.png", flat(9, "u1"), ["is 8 bit, but depth", "training split is 16 bit"]),
        ({"depth": SIXTEEN}, "depth/train/1.png", flat(0, "u1"), ["is 8 bit, but depth", "is 16 bit"]),
        ({"depth": SIXTEEN}, "depth/val/0.npy", flat(20), ["is float, but depth", "is 16 bit"]),
        ({"depth": SIXTEEN}, "depth/train/0.npy", flat(20), ["is float, but depth", "is 16 bit"]),
        ({}, "rgb/train/2.png", np.full((SIDE, SIDE, 3), 40000, np.uint16), ["is 16 bit, but rgb", "is 8 bit"]),
        ({}, "rgb/val/1.png", flat(0, "u1", SIDE + 2), ["has 32 rows of 34 pixels", "labels/val/1.png"]),
        ({}, "labels/val/0.npy", flat(-1, "i8"), ["8 or 16 bit"]),
        ({}, "labels/val/1.npy", flat(70000, "i8"), ["8 or 16 bit"]),
        ({}, "labels/val/2.npy", flat(1), ["8 or 16 bit"]),
        ({"rgb": (-1, 1, "f4")}, "rgb/train/0.npy", None, ["-0.99", "0..1"]),
        ({"rgb": (1, 255, "f4")}, "rgb/train/0.npy", None, ["..254.", "0..1"]),
    ],
)
def test_a_file_of_a_wrong_kind_range_or_size_is_named_and_the_others_are_read(tmp_path, sensors, file, values, parts):
    root = folder(tmp_path, **sensors)
    if values is not None:
        next((root / file).parent.glob(f"{Path(file).stem}.*")).unlink()
        write_file(root / file, values)
    split, number = Path(file).parts[1], int(Path(file).stem)
    dataset = open_dataset("folder", root, split)
    with fails(ValueError, root / file, *parts):
        dataset[number]
    assert values is None or dataset[3 - number]


@pytest.mark.parametrize("least, value", [(0, 120), (283, 0)])  # half beyond the range; nothing measured
def test_one_and_a_half_times_the_values_of_training_are_read_and_0_always(tmp_path, least, value):
    write_file(folder(tmp_path, lidar=(least, least + 80, "f4")) / "lidar/val/1.npy", np.eye(SIDE, dtype="f4") * value)
    assert open_dataset("folder", tmp_path, "val", ["lidar"])[1][0].max() == pytest.approx(value)


def test_evaluation_prints_the_modalities_in_use_and_the_absolute_root(tmp_path, monkeypatch, capsys):
    folder(tmp_path / "set", depth=METRES)
    monkeypatch.chdir(tmp_path)
    model_of(Path("set")).rename("m.pt")
    run(evaluate, "m.pt")
    text = capsys.readouterr().out
    assert "rgb (8 bit, 0..255, mean" in text and "depth (float, 0.0" in text and str(tmp_path / "set") in text


def test_evaluation_on_a_data_set_of_another_kind_is_refused(tmp_path):
    model, other = model_of(folder(tmp_path / "a", depth=SIXTEEN)), folder(tmp_path / "b", depth=EIGHT)
    with fails(ValueError, "depth/val/0.png", "8 bit", "16 bit"):
        run(evaluate, model, "--data", "folder", "--root", other)


@pytest.mark.parametrize(
    "depth, name, values, parts",
    [(SIXTEEN, "near.png", flat(0, "u1"), ["8 bit", "16 bit"]), (METRES, "far.npy", flat(1e30), ["1e+30"])],
)
def test_prediction_from_a_file_of_another_kind_or_range_is_refused(tmp_path, depth, name, values, parts):
    model = model_of(folder(tmp_path, depth=depth))
    write_file(tmp_path / name, values)
    with fails(ValueError, name, *parts):
        run(predict, model, "--input", f"depth={tmp_path / name}", "--out", tmp_path / "out")


FILES = [(files.read_muses_range, "A.NPY", flat(20), 0.2), (files.read_nyuv2, "a.npy", flat(3.0, "f8"), 0.3)]
FILES += [(files.read_muses_range, "b.npy", flat((20 + 100) * 150, "u2"), 0.2)]  # the encoding of the PNG files


@pytest.mark.parametrize("read, name, values, expected", FILES)
def test_metres_of_muses_and_nyuv2_may_be_in_npy_files(tmp_path, read, name, values, expected):
    with (tmp_path / name).open("wb") as file:
        np.save(file, values)
    assert read(tmp_path / name).max() == pytest.approx(expected)


# ---- frames that vanish or multiply ---------------------------------------------------------------------------------
def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    (folder(tmp_path) / "rgb/val/night").mkdir()
    scandir = os.scandir

    def guarded(path="."):
        if str(path).endswith("val/night"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)  # as root, every folder may be read
    with fails(ValueError, "rgb/val/night", "cannot be listed", "denied"):
        open_dataset("folder", tmp_path, "val")


@pytest.mark.parametrize(
    "links, named",
    [
        ({"set/rgb/val/back": "set/rgb/val"}, "rgb/val/back"),  # back to its own folder
        ({"a/b": "b", "b/a": "a", "set/rgb/val/a": "a"}, "rgb/val/a"),  # two that lead to each other
        ({"set/rgb/val": "set/rgb/train", "set/labels/val": "set/labels/train"}, "val"),
    ],
)
def test_links_by_which_frames_are_found_twice_are_refused(tmp_path, links, named):
    folder(tmp_path / "set")
    for link, target in links.items():
        (tmp_path / link).parent.mkdir(exist_ok=True)
        shutil.rmtree(tmp_path / link, ignore_errors=True)
        (tmp_path / link).symlink_to(tmp_path / target)
    with fails(ValueError, named, "link", "twice"):
        open_dataset("folder", tmp_path / "set", "val")
