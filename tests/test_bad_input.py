"""Bad input and bad luck: what goes in -> the sentence or the value that comes out.

Each case is a function that makes the bad thing below a new folder. Strings given to `case` are parts of the one
sentence that it must raise; any other value is what it must return.
"""

import os
import signal
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from models import about
from PIL import Image

import data
import evaluate
import predict
import train_stage1
from data import open_dataset
from datasets import files, layouts
from datasets.export import write_file
from engine.checkpoint import save_model
from engine.loop import EXIT_STATUS
from model import build_model

CASES = []
SPLITS = ("train", "val", "test")
SIDE = 32


def case(*expected):
    """Takes the function into the table: the parts of its sentence, or the one value that it returns."""

    def add(function):
        CASES.append(pytest.param(function, expected, id=function.__name__))
        return function

    return add


@pytest.fixture(autouse=True)
def handlers():
    """Training takes signals over, for the whole process."""
    before = {number: signal.getsignal(number) for number in EXIT_STATUS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("function, expected", CASES)
def test_bad_input_ends_in_one_sentence_or_the_right_value(function, expected, tmp_path, monkeypatch, capsys):
    given = {"root": tmp_path, "monkeypatch": monkeypatch, "capsys": capsys}
    arguments = [given[name] for name in function.__code__.co_varnames[: function.__code__.co_argcount]]
    if not isinstance(expected[0], str):
        assert function(*arguments) == expected[0]
        return
    with pytest.raises((ValueError, OSError)) as caught:
        function(*arguments)
    sentence = str(caught.value)
    assert "\n" not in sentence and all(part in sentence for part in expected), sentence


# ---- making data sets and models ------------------------------------------------------------------------------------
def eight(rng):
    return rng.integers(0, 256, (SIDE, SIDE), np.uint8)


def sixteen(rng):
    return rng.integers(0, 65536, (SIDE, SIDE), np.uint16)


def metres(rng):
    return rng.uniform(0, 80, (SIDE, SIDE)).astype(np.float32)


def folder(root, splits=SPLITS, **modalities):
    """Four frames a split of the classes a, b, c; modality -> function of a source of chance. By default rgb alone."""
    colour = {"rgb": lambda rng: rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)}
    rng = np.random.default_rng(0)
    write_file(root / "classes.txt", "a 200 0 0\nb 0 200 0\nc 0 0 200\n")
    for split in splits:
        for number in range(4):
            for modality, values in (colour | modalities).items():
                array = values(rng)
                ending = "npy" if array.dtype.kind == "f" else "png"
                write_file(root / modality / split / f"{number}.{ending}", array)
            write_file(root / "labels" / split / f"{number}.png", rng.integers(0, 3, (SIDE, SIDE), np.uint8))
    return root


def few_bits(path, ids, bits, palette=None):
    """A PNG of 1, 2, 4 or 8 bits a pixel, grey, or with a palette."""
    packed = np.packbits(np.unpackbits(ids[..., None], axis=2)[..., 8 - bits :].reshape(len(ids), -1), axis=1)
    rows = np.pad(packed, ((0, 0), (1, 0))).tobytes()
    head = struct.pack(">IIBBBBB", ids.shape[1], ids.shape[0], bits, 0 if palette is None else 3, 0, 0, 0)
    colours = [] if palette is None else [b"PLTE" + np.array(palette, np.uint8).tobytes()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
            for chunk in (b"IHDR" + head, *colours, b"IDAT" + zlib.compress(rows), b"IEND")
        )
    )


def model_of(root, modalities=("rgb", "depth"), **meta):
    """A model with random weights that says it was trained on the folder data set at root."""
    train = open_dataset("folder", root, "train", list(modalities))
    meta = about(
        modalities=list(modalities),
        classes=train.classes,
        palette=train.palette.tolist(),
        size=SIDE,
        val_size=SIDE,
        root=str(root),
        ranges=train.ranges,
        normalisation=train.normalisation,
        **meta,
    )
    torch.manual_seed(0)
    save_model(root / "m.pt", build_model("segformer_tiny", 3, list(modalities)), meta)
    return root / "m.pt"


def run(script, *arguments):
    script.main(script.options([str(argument) for argument in arguments]))


def printed(capsys, script, *arguments):
    run(script, *arguments)
    return capsys.readouterr().out


# ---- labels taken for a modality ------------------------------------------------------------------------------------
def with_label_copies(root):
    folder(root, depth=sixteen)
    for split in SPLITS:
        for path in sorted((root / "labels" / split).iterdir()):
            ids = np.array(Image.open(path))
            for name in ("labels_color", "Label", "gtFine", "mask", "annotations", ".hidden"):
                write_file(root / name / split / path.name, np.dstack([ids * 80] * 3))
            Image.fromarray(ids).save((root / name / split / path.name).with_suffix(".png"))
            write_file(root / "copy" / split / path.name, ids)
    return root


@case(["rgb", "depth"])
def folders_like_labels_or_hidden_are_no_modalities(root):
    return open_dataset("folder", with_label_copies(root), "val").modalities


@case(["mask", "rgb"])
def unless_they_are_named(root):
    return open_dataset("folder", with_label_copies(root), "val", ["mask", "rgb"]).modalities


@case(True)
def evaluation_prints_the_modalities_in_use_and_the_absolute_root(root, monkeypatch, capsys):
    folder(root / "set", depth=metres)
    monkeypatch.chdir(root)
    model_of(Path("set")).rename("m.pt")
    text = printed(capsys, evaluate, "m.pt")
    return "rgb (8 bit, 0..255, mean" in text and "depth (float, 0.0" in text and str(root / "set") in text


@case(True)
def check_prints_the_modalities_in_use(root, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["data.py", "--check", "--data", "folder", "--root", str(folder(root))])
    return data.main() == 0 and "rgb (8 bit, 0..255, mean" in capsys.readouterr().out


@case(True)
def check_prints_a_file_name_that_is_no_utf_8(root, monkeypatch, capsys):
    broken = folder(root) / "rgb/val" / os.fsdecode(b"caf\xe9.png")
    broken.write_bytes(b"no picture")
    monkeypatch.setattr("sys.argv", ["data.py", "--check", "--data", "folder", "--root", str(root)])
    return data.main() == 1 and r"caf\udce9.png" in capsys.readouterr().out


# ---- label files ----------------------------------------------------------------------------------------------------
@case(True)
def grey_labels_of_1_2_4_and_8_bits_are_the_stored_ids(root):
    folder(root)
    for bits in (1, 2, 4, 8):
        ids = np.random.default_rng(bits).integers(0, min(3, 2**bits), (SIDE, SIDE - 1), np.uint8)
        few_bits(root / "a.png", ids, bits)
        if not np.array_equal(files.read_label("folder", root / "a.png", *codes(root)), ids):
            return f"{bits} bits"
    return True


def codes(root):
    dataset = open_dataset("folder", root, "val")
    return dataset.table, dataset.palette


@case(True)
def a_palette_of_the_classes_own_colours_or_of_grey_keeps_the_ids(root):
    ids = np.random.default_rng(1).integers(0, 3, (SIDE, SIDE), np.uint8)
    for bits in (2, 8):
        for palette in ([(200, 0, 0), (0, 200, 0), (0, 0, 200)], [(0, 0, 0), (1, 1, 1), (2, 2, 2)]):
            few_bits(folder(root) / "labels/val/0.png", ids, bits, palette)
            if not np.array_equal(open_dataset("folder", root, "val")[0][1].numpy(), ids):
                return f"{bits} bits, {palette}"
    return True


@case("labels/val/0.png", "palette", "classes.txt", "8-bit grey")
def a_label_whose_palette_was_sorted_anew(root):
    ids = np.random.default_rng(1).integers(0, 3, (SIDE, SIDE), np.uint8)
    few_bits(folder(root) / "labels/val/0.png", ids, 8, [(0, 0, 200), (0, 200, 0), (200, 0, 0)])
    open_dataset("folder", root, "val")[0]


@case("_semantic_front.png", "palette", "8-bit grey")
def a_deliver_label_with_a_palette(root):
    path = root / "semantic/fog/val/MAP_1_point1/000000_semantic_front.png"
    write_file(Path(str(path).replace("semantic", "rgb").replace("/rgb/", "/img/")), np.zeros((8, 8, 3), np.uint8))
    few_bits(path, np.full((8, 8), 2, np.uint8), 8, [(7, 0, 0), (3, 0, 0), (5, 0, 0)])  # red, and so the id, is 5
    open_dataset("deliver", root, "val", ["rgb"])[0]


@case("not one pixel of the 4 frames of the train split", "label-map")
def every_training_label_is_ignored(root):
    folder(root)
    for path in (root / "labels/train").iterdir():
        write_file(path, np.full((SIDE, SIDE), 255, np.uint8))
    open_dataset("folder", root, "train").unseen()


# ---- kinds and ranges -----------------------------------------------------------------------------------------------
@case("lidar/val/2.npy", "1e+30")
def a_float_beyond_all_ranges_in_validation(root):
    folder(root, lidar=metres)
    write_file(root / "lidar/val/2.npy", np.full((SIDE, SIDE), 1e30, np.float32))
    open_dataset("folder", root, "val")[2]


@case("lidar/train/2.npy", "1e+30")
def a_float_beyond_all_ranges_in_training(root):
    folder(root, lidar=metres)
    write_file(root / "lidar/train/2.npy", np.full((SIDE, SIDE), 1e30, np.float32))
    open_dataset("folder", root, "train")[2]


@case("lidar/val/1.npy", "800", "training split")
def ten_times_the_metres_of_training(root):
    folder(root, lidar=metres)
    write_file(root / "lidar/val/1.npy", np.full((SIDE, SIDE), 800, np.float32))
    open_dataset("folder", root, "val")[1]


@case(pytest.approx(120))
def one_and_a_half_times_the_metres_of_training(root):
    folder(root, lidar=metres)
    write_file(root / "lidar/val/1.npy", np.full((SIDE, SIDE), 120, np.float32))
    return float(open_dataset("folder", root, "val", ["lidar"])[1][0].max())


@case("depth/val/0.png", "8 bit", "16 bit", "training split")
def validation_of_8_bits_after_training_of_16(root):
    folder(folder(root, depth=sixteen), ["val"], depth=eight)
    open_dataset("folder", root, "val")[0]


@case("depth/val/0.npy", "float", "16 bit")
def png_mixed_with_metres(root):
    folder(root, depth=sixteen)
    for path in (root / "depth/val").iterdir():
        path.unlink()
    folder(root, ["val"], depth=metres)
    open_dataset("folder", root, "val")[0]


@case("depth/train/0.npy", "float", "16 bit")
def one_odd_training_file_is_the_one_that_is_named(root):
    folder(root, depth=sixteen)
    (root / "depth/train/0.png").unlink()
    write_file(root / "depth/train/0.npy", np.full((SIDE, SIDE), 20, np.float32))
    open_dataset("folder", root, "train")[1]
    open_dataset("folder", root, "train")[0]


@case("rgb/train/0.npy", "-0.99", "0..1")
def colours_in_minus_one_to_one(root):
    open_dataset("folder", folder(root, rgb=lambda rng: rng.uniform(-1, 1, (SIDE, SIDE, 3))), "train")[0]


@case("depth/val/0.png", "8 bit", "16 bit")
def evaluation_on_a_data_set_of_another_kind(root):
    model = model_of(folder(root / "a", depth=sixteen))
    run(evaluate, model, "--data", "folder", "--root", folder(root / "b", depth=eight))


@case("near.png", "8 bit", "16 bit")
def prediction_from_a_file_of_another_kind(root):
    model = model_of(folder(root, depth=sixteen))
    write_file(root / "near.png", np.zeros((SIDE, SIDE), np.uint8))
    run(predict, model, "--input", f"depth={root / 'near.png'}", "--out", root / "out")


@case("far.npy", "1e+30")
def prediction_from_a_float_beyond_all_ranges(root):
    model = model_of(folder(root, depth=metres))
    write_file(root / "far.npy", np.full((SIDE, SIDE), 1e30, np.float32))
    run(predict, model, "--input", f"depth={root / 'far.npy'}", "--out", root / "out")


# ---- orientation ----------------------------------------------------------------------------------------------------
@case((1, 255))
def a_jpeg_that_a_camera_turned_is_read_upright(root):
    picture = np.zeros((16, 32), np.uint8)
    picture[:, 16:] = 255  # the right half is light; turned by 90 degrees clockwise, the lower one
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(picture).save(root / "a.jpg", exif=turned)
    image = files.read_image(root / "a.jpg")
    return image.shape[0] // image.shape[1] - 1, int(image[-1].mean())


# ---- frames that vanish or multiply ---------------------------------------------------------------------------------
@case("rgb/val/night", "cannot be listed", "denied")
def a_folder_that_may_not_be_read(root, monkeypatch):
    folder(root)
    (root / "rgb/val/night").mkdir()
    scandir = os.scandir

    def guarded(path="."):
        if str(path).endswith("val/night"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)  # as root, every folder may be read
    open_dataset("folder", root, "val")


@case("rgb/val/back", "link", "twice")
def a_link_back_to_its_own_folder(root):
    folder(root)
    (root / "rgb/val/back").symlink_to(root / "rgb/val")
    open_dataset("folder", root, "val")


@case("link", "twice")
def two_links_that_lead_to_each_other(root):
    folder(root / "set")
    for one, other in (("a", "b"), ("b", "a")):
        (root / one).mkdir()
        (root / one / other).symlink_to(root / other)
    (root / "set/rgb/val/a").symlink_to(root / "a")
    open_dataset("folder", root / "set", "val")


@case("val", "link", "twice")
def a_validation_folder_that_is_a_link_to_training(root):
    folder(root, ["train"])
    for name in ("rgb", "labels"):
        (root / name / "val").symlink_to("train")
    open_dataset("folder", root, "val")


# ---- single values --------------------------------------------------------------------------------------------------
@case("0=0,1=1,2=2,0=2", "0", "twice")
def a_label_map_with_an_id_given_twice(root):
    open_dataset("folder", folder(root), "val", label_map="0=0,1=1,2=2,0=2")


@case("shift:300", "no class")
def a_label_map_that_leaves_no_class(root):
    open_dataset("folder", folder(root), "val", label_map="shift:300")


@case("labels/val/0.png", "the label")
def a_label_map_for_the_id_255_alone(root):
    open_dataset("folder", folder(root), "val", label_map="255=1")[0]


@case("a.npz", "one, two", "one array")
def an_npz_with_two_arrays(root):
    np.savez(root / "a.npz", one=np.zeros((4, 4)), two=np.ones((4, 4)))
    files.read_image(root / "a.npz")


@case(["a b", "c"])
def classes_with_a_line_separator_of_unicode(root):
    (root / "classes.txt").write_text("a\u2028b\nc\n", encoding="utf-8")
    return layouts.read_classes(root / "classes.txt")[0]


@case([pytest.approx(0.2), pytest.approx(0.2)])
def muses_ranges_in_npy_files_of_either_kind(root):
    np.save(root / "a.npy", np.full((4, 4), 20.0, np.float32))
    (root / "a.npy").rename(root / "A.NPY")
    np.save(root / "b.npy", np.full((4, 4), (20 + 100) * 150, np.uint16))  # the encoding of the PNG files
    return [float(files.read_muses_range(root / name).max()) for name in ("A.NPY", "b.npy")]


@case(pytest.approx(0.3))
def raw_depth_of_3_metres_in_a_float_file_of_nyuv2(root):
    np.save(root / "a.npy", np.full((4, 4), 3.0))
    return float(files.read_nyuv2(root / "a.npy").max())


@case(True)
def a_frame_name_that_is_no_utf_8_under_rmm(root):
    images, name = torch.ones(1, 1, 3, 8, 8), os.fsdecode(b"caf\xe9")
    return bool((data.random_missing(images, torch.zeros(1, 1, dtype=torch.bool), 0.5, [name]) == 0).any())


@case("last.pt", "frame names train/0 to train/3", "here it is train/1 to train/4")
def resuming_on_as_many_other_frames(root):
    options = "--backbone segformer_tiny --epochs 1 --distill-epochs 0 --size 32 --batch-size 4 --device cpu".split()
    options += ["--data", "folder", "--out", str(root / "run")]
    train_stage1.main([*options, "--root", str(folder(root / "set"))])
    for name in ("rgb", "labels"):
        (root / "set" / name / "train/0.png").rename(root / "set" / name / "train/4.png")
    train_stage1.main(["--resume", str(root / "run")])
