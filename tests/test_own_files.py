"""Files and arrays of a stranger that would be read in another sense than his: refused, or said."""

import shutil
import struct

import numpy as np
import pytest
from data_files import fails, folder_dataset
from PIL import Image
from small_runs import change

import predict
from data import open_dataset
from datasets import files, layouts
from datasets.export import write_file


# ---- folders --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("classes", ["a\n", "a\n\nb\n", "name r g b\na\nb\n", "a 0.5 0.25 0.5\nb\n", "a #804080\nb\n"])
def test_a_classes_txt_that_would_shift_or_rename_classes_is_refused(tmp_path, classes):
    (tmp_path / "classes.txt").write_text(classes)
    with fails(ValueError, "classes.txt"):
        layouts.read_classes(tmp_path / "classes.txt")


@pytest.mark.parametrize("folder", ["truth_colour", "seg", "colour_gt", "trainIds", "target", "gtFine"])
def test_folders_that_describe_the_truth_are_no_modalities(root, folder):
    shutil.copytree(root / "rgb", root / folder)
    assert open_dataset("folder", root).modalities == ["rgb", "event"]


def test_a_layout_that_is_the_other_way_round_is_explained(root, tmp_path):
    for part in ("rgb", "labels"):
        shutil.move(root / part / "train", tmp_path / "e/train" / part)
    with fails(FileNotFoundError, "labels/train, not train/labels"):
        open_dataset("folder", tmp_path / "e")
    (root / "event").rename(root / "x=y")
    with fails(ValueError, "x=y"):
        open_dataset("folder", root)


def test_a_modality_without_any_file_in_a_split_is_refused_at_once(root, mini):
    shutil.copytree(root / "event/train", root / "thermal/train")
    with fails(FileNotFoundError, "thermal", "val"):
        open_dataset("folder", root, "val")
    with fails(ValueError, "--depth raw"):
        open_dataset("folder", root, depth="raw")
    deliver = mini("deliver")
    shutil.rmtree(deliver / "hha")
    with fails(FileNotFoundError, "hha", "--depth raw"):
        open_dataset("deliver", deliver)
    assert open_dataset("deliver", deliver, depth="raw")


def test_honest_frames_of_varied_scenes_are_in_range(tmp_path):
    root = folder_dataset(tmp_path / "d", count=16, depth=(0, 1, "u2"))
    for i in range(16):
        top = (300, 2500, 2500, 40000)[i % 4]  # millimetres, indoors and outdoors
        for split in ("train", "val"):
            depth = np.random.default_rng(i).uniform(0.3 * top, top, (40, 60)).astype(np.uint16)
            write_file(root / f"depth/{split}/{i}.png", depth)
    train = open_dataset("folder", root, modalities=["rgb", "depth"])
    val = open_dataset("folder", root, "val", ["rgb", "depth"], ranges=train.ranges)
    assert [len([dataset[i] for i in range(16)]) for dataset in (train, val)] == [16, 16]


@pytest.mark.parametrize("mark", [3500, 1])
def test_check_says_dead_frames_and_marks_for_nothing_measured(tmp_path, data_py, mark):
    root = folder_dataset(tmp_path / "d", depth=(1000, 3000, "u2"), event=(0, 256, "u1"))
    for file in (root / "depth").glob("*/*"):
        depth = files.read_image(file)[..., 0]
        depth[:20] = mark
        write_file(file, depth)
    for i in (0, 1):
        write_file(root / f"event/train/{i}.png", np.zeros((40, 60), np.uint8))
    shutil.rmtree(root / "labels/test")  # on purpose, which is no remark
    status, printed = data_py(f"--check --data folder --root {root}")
    assert status == 0 and "not one pixel" not in printed.out
    assert "train: warning: event is constant in 2 of 4 frames" in printed.out
    assert "train: warning: 50% of depth is its largest or smallest value" in printed.out


@pytest.mark.parametrize("key, value", [(284, 2), (262, 0)])
def test_16_bit_tiffs_that_pillow_reads_wrongly_are_refused(tmp_path, key, value):
    file = tmp_path / "a.tif"
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)).save(file)
    assert files.read_image(file).dtype == np.uint16
    entry = struct.pack("<HHII", key, 3, 1, 1)  # a tag: its key, kind, count and value
    assert file.read_bytes().count(entry) == 1
    file.write_bytes(file.read_bytes().replace(entry, struct.pack("<HHII", key, 3, 1, value)))
    with fails(ValueError, "a.tif", "16-bit TIFF"):
        files.read_image(file)


def test_mcubes_files_that_were_cut_already_are_refused(mini):
    root = mini("mcubes")
    for file in root.rglob("*.npy"):
        np.save(file, np.load(file)[:, 192:])
    with fails(ValueError, "192"):
        open_dataset("mcubes", root)[0]


# ---- arrays of a robot ----------------------------------------------------------------------------------------------
@pytest.fixture
def segmenter(untrained, tmp_path):
    """A function that makes a Segmenter whose depth has this kind and range, of a data set."""

    def make(kind, high, data="folder"):
        ranges, file = {"depth": [kind, 0, high, [0.5] * 3, [0.25] * 3]}, tmp_path / "m.pt"
        shutil.copy(untrained / "student.pt", file)
        change(file, "meta", data=data, depth="raw" if data == "nyuv2" else "hha", ranges=ranges)
        return predict.Segmenter(file, "cpu")

    return make


def test_floats_are_held_to_the_range_of_the_integers_they_stand_for(segmenter):
    model, depth = segmenter("16 bit", 2000), np.random.default_rng(0).uniform(0, 0.03, (64, 64)).astype(np.float32)
    model(depth=depth)
    assert (model(depth=np.rint(65535 * depth).astype(">u2")) == model(depth=np.rint(65535 * depth).astype("u2"))).all()
    nothing = np.where(depth > 0.02, np.nan, depth)
    for wrong, named in ((20 * depth, "depth must be in"), (depth + 1, "0..1"), (nothing, "nan")):
        with fails(ValueError, "depth", named):
            model(depth=wrong)
    with fails(ValueError, "depth", "nan"):
        segmenter("float", 10)(depth=nothing)


def test_raw_depth_of_nyuv2_is_metres_or_millimetres(segmenter):
    model, metres = segmenter("float", 1, "nyuv2"), np.random.default_rng(0).uniform(1, 4, (64, 64)).astype(np.float32)
    millimetres = np.rint(1000 * metres).astype(np.uint16)
    assert (model(depth=millimetres) == model(depth=millimetres / np.float32(1000))).all()
    with fails(ValueError, "beyond"):
        model(depth=1000 * metres)


def test_masked_values_are_nothing_measured(segmenter):
    model, depth = segmenter("8 bit", 255), np.random.default_rng(0).integers(1, 200, (64, 64), np.uint8)
    masked = np.ma.masked_array(depth, depth > 100)
    assert (model(depth=masked) == model(depth=masked.filled(0))).all()


def test_pictures_do_not_go_into_the_folder_of_the_data(untrained, root, tmp_path):
    file = change(shutil.copy(untrained / "student.pt", tmp_path / "m.pt"), "meta", data="folder", root=str(root))
    with fails(ValueError, "--out", "folder of the data"):
        predict.main(predict.options([str(file), "--out", str(root / "predictions")]))
