"""predict.py and pictures.py: files in, pictures out, at the input's size and from whichever modalities there are."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from data_files import fails
from models import MODALITIES, about_scenes, with_wide_weights
from PIL import Image
from small_runs import change

import predict
from data import normalise
from datasets import synthetic
from datasets.export import write_file
from datasets.layouts import Frame
from engine import output, pictures
from engine.checkpoint import load_model, save_model
from engine.subsets import all_subsets
from model import build_model

CLASSES, PALETTE, (MEAN, STD) = (about_scenes()[name] for name in ("classes", "palette", "normalisation"))
MEAN, STD = np.array(MEAN[0]), np.array(STD[0])  # of RGB; the other modalities have the same
pytestmark = pytest.mark.usefixtures("inside")


@pytest.fixture
def frame(inside):
    """Files of one frame of 64 x 96 pixels: 8-bit colour, and 16-bit grey depth that 8 bits cannot hold."""
    rng = np.random.default_rng(5)
    rgb, depth = rng.integers(0, 256, (64, 96, 3), np.uint8), rng.integers(0, 65536, (64, 96), np.uint16)
    write_file(Path("a.png"), rgb)
    write_file(Path("b.png"), depth)
    return rgb, depth


def call(*arguments):
    predict.main(predict.options([str(a) for a in arguments]))


def picture(path):
    return np.asarray(Image.open(path))


def labels(checkpoint, *arguments):
    """The label picture of a frame, after --input; the first file names it."""
    call(checkpoint, "--out", "out", "--input", *arguments)
    return picture(f"out/{Path(arguments[0].split('=')[1]).stem}_label.png")


def changed(run, **meta):
    """A copy of the student that says something else of itself."""
    return change(Path(shutil.copy(run / "student.pt", "changed.pt")), "meta", **meta)


def answer_of_submodel(checkpoint, images):
    """Class ids by a model that was built for these sensors alone: images (M, H, W, 3) in 0..1."""
    model = build_model("segformer_tiny", len(CLASSES), MODALITIES[: len(images)]).eval()
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    x = torch.from_numpy(((np.stack(images) - MEAN) / STD).transpose(0, 3, 1, 2)).float()
    with torch.inference_mode():
        return model(x[None]).logits.argmax(1)[0].numpy()


def test_files_become_the_label_map_of_a_model_with_just_these_sensors(untrained, frame):
    rgb, depth = frame
    ids = labels(untrained / "student.pt", "rgb=a.png", "depth=b.png")
    expected = answer_of_submodel(untrained / "student.pt", [rgb / 255, np.dstack([depth / 65535] * 3)])
    assert ids.shape == (64, 96) and len(np.unique(expected)) > 3
    assert (ids != expected).mean() < 1e-3  # ties may fall either way
    colour = picture("out/a_colour.png")
    assert (colour == np.array(PALETTE)[ids]).all()
    assert np.abs(picture("out/a_overlay.png") - (rgb.astype(float) + colour) / 2).max() <= 1
    assert (labels(untrained, "depth=b.png", "rgb=a.png") == ids).all()  # another order changes the overlay alone


@pytest.mark.parametrize("size", ["48", "64x96"])
def test_the_network_may_see_another_size_than_the_outputs_have(untrained, frame, size):
    assert labels(untrained, "rgb=a.png", "--size", size).shape == picture("out/a_overlay.png").shape[:2] == (64, 96)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ("thermal=a.png", "has no modality thermal; it has rgb, depth, event, lidar"),
        ("rgb=a.png depth=c.png", "c.png has 40 rows of 50 pixels, but .*a.png has 64 of 96"),
        ("rgb=a.png depth=other", "give files or folders for all"),
        ("rgb=. depth=other", "have no .png.* file with a name in common"),
        ("rgb=one depth=other", "color_0007.png, depth_0007.png"),  # names that cannot be paired: how they must look
        ("rgb=text.png", "text.png cannot be read"),
        ("rgb=empty", "empty holds no file that ends in .png"),
        ("depth=dead.png", "dead.*--keep-constant"),
        ("rgb=a.png --out b.png", "--out .*b.png is a file"),
        ("depth=b.png --depth-unit 0.001", "--depth-unit"),
        ("depth=b.png --file-ids", "--file-ids"),
    ],
)
def test_bad_input_is_told_in_a_sentence_that_names_it_and_nothing_is_written(untrained, frame, arguments, sentence):
    for name in ("c.png", "one/a.png", "other/z.png", "dead.png"):
        write_file(Path(name), np.zeros((40, 50), np.uint8))
    write_file(Path("text.png"), "no picture")
    Path("empty").mkdir()
    with pytest.raises((ValueError, OSError), match=sentence):
        call(untrained, "--input", *arguments.split())
    assert not Path("predictions").exists()


FOREIGN = [("--out out --input rgb=a.png", "out/a_label.png"), ("--panel p.png", "p.png")]
FOREIGN += [("--export a.pt2 --size 32", "a.pt2"), ("--export a.pt2 --size 32", "about.json")]


@pytest.mark.parametrize("arguments, name", FOREIGN)
def test_no_file_is_replaced_that_this_program_did_not_write(untrained, frame, arguments, name):
    Path(name).parent.mkdir(exist_ok=True)
    shutil.copy("a.png", name)
    before = sorted(Path().rglob("*"))
    for _ in range(2):
        with fails(ValueError, name, "exists and is not marked as written by RMMSS"):
            call(untrained, *arguments.split())
    assert Path(name).read_bytes() == Path("a.png").read_bytes() and sorted(Path().rglob("*")) == before


def test_what_this_program_wrote_is_replaced(untrained, frame):
    before, other = labels(untrained, "rgb=a.png"), labels(untrained, "depth=b.png")
    Path("out/b_label.png").rename("out/a_label.png")
    assert (labels(untrained, "rgb=a.png") == before).all() and (other != before).any()
    assert len(os.listdir("out")) == 5  # three of a, two of b


def test_an_answer_that_is_not_finite_names_the_frame(untrained, frame):
    state = torch.load(untrained / "student.pt", weights_only=True)
    state["model"]["decoder.classify.bias"].fill_(float("nan"))
    torch.save(state, "broken.pt")
    with pytest.raises(ValueError, match="frame a is not finite"):
        labels("broken.pt", "rgb=a.png")
    assert not Path("out").exists()


def test_16_bit_depth_is_read_in_millimetres_or_in_the_unit_given_and_the_unit_is_said(untrained, capsys):
    ranges = {"rgb": ["8 bit", 0, 255], "depth": ["8 bit", 0, 255]}
    numbers = [[MEAN.tolist(), *[[0.0] * 3] * 3], [STD.tolist(), *[[1.0] * 3] * 3]]
    model = changed(untrained, data="nyuv2", depth="raw", normalisation=numbers, root=".", ranges=ranges)
    metres = np.random.default_rng(6).uniform(1, 4, (64, 96))
    write_file(Path("metres.npy"), np.float32(np.rint(1000 * metres) / 1000))
    write_file(Path("millimetres.png"), np.rint(1000 * metres).astype(np.uint16))
    write_file(Path("tenths.png"), np.rint(10000 * metres).astype(np.uint16))
    write_file(Path("grey.png"), np.rint(25.5 * metres).astype(np.uint8))
    plain = labels(model, "depth=millimetres.png")
    assert len(np.unique(plain)) > 3
    assert (labels(model, "depth=metres.npy") != plain).mean() < 0.01
    assert (labels(model, "depth=tenths.png", "--depth-unit", "0.0001") != plain).mean() < 0.01
    assert (labels(model, "depth=grey.png") != plain).mean() < 0.2  # steps of 4 cm
    said = capsys.readouterr().out
    for file, unit in ("millimetres.png", "0.001"), ("grey.png", "0.0392157"):
        assert re.search(rf"{file}: depth read in steps of {unit} m, its median is 2\.[45] m", said)
    with pytest.raises(ValueError, match="tenths.png: in steps of 0.001 m, half of it is beyond 2[45] m.*--depth-unit"):
        labels(model, "depth=tenths.png")
    write_file(Path("hha.png"), np.zeros((64, 96, 3), np.uint8))
    with pytest.raises(ValueError, match="hha.png has 3 channel.s., but the model was trained on raw depth"):
        labels(model, "depth=hha.png")


def test_a_data_set_with_some_modalities_left_out(untrained):
    call(untrained, "--count", 2, "--modalities", "rgb,depth", "--out", "out")
    scene = synthetic.paint(0, "val", 1, 64)
    expected = answer_of_submodel(untrained / "student.pt", [scene["rgb"] / 255, scene["depth"] / 255])
    assert (picture("out/val/000001_label.png") != expected).mean() < 1e-3


def test_the_panel_of_a_run_shows_scenes_by_row_and_both_models(untrained, monkeypatch):
    draw = Mock(return_value=Image.new("RGB", (1, 1)))
    monkeypatch.setattr(pictures, "draw", draw)
    call(untrained, "--data", "synthetic", "--count", 3, "--panel", "panel.png")
    grid, titles, sides, key, _ = draw.call_args.args
    views = ["all modalities", "rgb missing", "rgb and depth missing"]
    says = [f"{name}: {view}" for name in ("teacher", "student") for view in views]
    assert titles == [*MODALITIES, "ground truth", *says] and len(titles) == len(grid[0])
    assert sides == ["val/000000, cloud", "val/000001, fog", "val/000002, night"]
    scene = synthetic.paint(0, "val", 2, 64)
    assert (np.asarray(grid[2][4].image) == np.array(PALETTE)[scene["label"]]).all()
    shown = {tuple(colour) for row in grid for cell in row[4:] for _, colour in cell.image.getcolors(256)}
    assert {colour for _, colour in key} == shown and len(shown) <= len(CLASSES)
    ids, truth = answer_of_submodel(untrained / "teacher.pt", [scene[m] / 255 for m in MODALITIES]), scene["label"]
    ious = [((ids == k) & (truth == k)).sum() / ((ids == k) | (truth == k)).sum() for k in np.union1d(ids, truth)]
    assert abs(float(grid[2][5].caption) - 100 * np.mean(ious)) <= 1  # ties may fall either way


def test_a_drawn_panel_keeps_every_cell_whole_and_every_colour_exact():
    rng = np.random.default_rng(2)
    sizes = [(64, 64), (50, 700)]  # enlarged by a whole factor; shrunk
    cells = [pictures.Cell(pictures.label_map(rng.integers(0, 12, size, np.uint8), PALETTE)) for size in sizes]
    pixels = np.asarray(pictures.draw([[cell] for cell in cells], ["a long title of many words " * 3]))
    for cell, shape in zip(cells, [(384, 384, 3), (30, 420, 3)], strict=True):
        block = np.asarray(pictures.fit(cell, 420))
        assert block.shape == shape
        columns = pixels[:, pictures.GAP : pictures.GAP + block.shape[1]]
        assert any((columns[y : y + len(block)] == block).all() for y in range(len(columns) - len(block) + 1))


def test_the_key_names_only_classes_that_occur(untrained, monkeypatch):
    segmenter = predict.Segmenter(untrained, "cpu")
    frame = Frame("a", "fog", "none"), {}, np.array([[1, 255]], np.uint8)
    monkeypatch.setattr(segmenter, "answer", lambda *_: np.array([[3, 3]], np.uint8))
    monkeypatch.setattr(pictures, "draw", lambda grid, titles, sides, key, note: key)
    key = predict.comparison(segmenter, ["student"], [frame], [MODALITIES], "synthetic")
    assert key == [(CLASSES[1], tuple(PALETTE[1])), (CLASSES[3], tuple(PALETTE[3])), ("ignored", (0, 0, 0))]


# ---- from Python -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(64, 96), (45, 71), (20, 31)])
def test_the_segmenter_gives_the_bits_of_the_label_picture(untrained, size):
    rng = np.random.default_rng(8)
    rgb, depth = rng.integers(0, 256, (*size, 3), np.uint8), rng.integers(0, 65536, size, np.uint16)
    event = rng.random((*size, 3), np.float32)
    for name, image in {"a.png": rgb, "b.png": depth, "c.npy": event}.items():
        write_file(Path(name), image)
    expected = labels(untrained, "rgb=a.png", "depth=b.png", "event=c.npy")
    segmenter = predict.Segmenter(untrained, "cpu")
    ids = segmenter(rgb=rgb, depth=depth, event=event, lidar=None)
    assert ids.dtype == np.uint8 and ids.shape == expected.shape == size
    assert (ids == expected).all() and len(np.unique(ids)) > 3
    assert (segmenter(event=event.astype(np.float64), depth=depth[..., None], rgb=rgb) == ids).all()
    flipped = segmenter(rgb=rgb[:, ::-1], depth=depth[:, ::-1], event=event[:, ::-1])  # a view with negative strides
    assert flipped.shape == size


def test_a_constant_image_counts_as_missing_unless_it_is_meant(untrained, frame, capsys):
    rgb, _ = frame
    segmenter, meant = (predict.Segmenter(untrained, "cpu", keep_constant=keep) for keep in (False, True))
    alone = segmenter(rgb=rgb)
    for dead in (np.zeros((64, 96), np.uint16), np.full((64, 96), 0.5, np.float32), np.full((64, 96, 3), 7, np.uint8)):
        assert (segmenter(rgb=rgb, depth=dead) == alone).all()
        assert (meant(rgb=rgb, depth=dead) != alone).any()
    write_file(Path("dead.png"), np.zeros((64, 96), np.uint16))
    assert (labels(untrained, "rgb=a.png", "depth=dead.png") == alone).all()
    assert "missing depth (constant), event, lidar\n" in capsys.readouterr().out
    assert (labels(untrained, "rgb=a.png", "depth=dead.png", "--keep-constant") != alone).any()
    assert "missing event, lidar\n" in capsys.readouterr().out
    write_file(Path("some/dead.png"), np.full((64, 96, 3), 7, np.uint8))
    shutil.copy("a.png", "some/z.png")
    with pytest.raises(ValueError, match="1 frame.*dead.*--keep-constant"):
        call(untrained, "--input", "rgb=some", "--out", "answers")
    assert {path.name[:2] for path in Path("answers").iterdir()} == {"z_"}


@pytest.mark.parametrize(
    "images, named",
    [
        ({"thermal": np.zeros((40, 50))}, "thermal"),
        ({"rgb": np.zeros((40, 50, 4), np.uint8)}, "rgb"),
        ({"rgb": np.zeros((40, 50, 3), np.int64)}, "rgb is int64"),
        ({"rgb": np.zeros((40, 50, 3), np.uint16)}, "16 bit, but rgb"),
        ({"depth": np.arange(2000).reshape(40, 50) * 0.1}, "depth has values in 0..199.9"),
        ({"depth": np.full((40, 50), np.nan)}, "depth has values"),
        ({"rgb": np.eye(40, 50), "depth": np.eye(50, 40) / 10}, r"depth \(50, 40\)"),
        ({"rgb": None}, "no image"),
        ({}, "no image"),
    ],
)
def test_arrays_that_are_no_images_are_told_by_name(untrained, images, named):
    model = changed(untrained, ranges={"rgb": ["8 bit", 0, 255], "depth": ["16 bit", 0, 9000]})
    with pytest.raises(ValueError, match=named):
        predict.Segmenter(model, "cpu")(**images)


def test_a_model_of_zero_images_is_given_them(untrained, frame):
    rgb, _ = frame
    zero = changed(untrained, absent="zero")
    model, _ = load_model(zero, torch.device("cpu"))
    x = torch.zeros(1, 4, 3, 64, 96)
    x[0, 0] = torch.from_numpy((rgb / 255 - MEAN) / STD).permute(2, 0, 1)
    with torch.inference_mode():
        expected = model(x).logits.argmax(1)[0].numpy()
    ids = predict.Segmenter(zero, "cpu")(rgb=rgb)
    assert (ids != expected).mean() < 1e-3 and (ids != predict.Segmenter(untrained, "cpu")(rgb=rgb)).any()


def test_a_single_model_is_a_runs_final_model(untrained, frame):
    Path("one").mkdir()
    save_model(Path("one/single.pt"), *load_model(untrained / "student.pt", torch.device("cpu")))
    assert (labels("one", "rgb=a.png") == labels(untrained, "rgb=a.png")).all()
    call("one", "--count", 1, "--panel", "panel.png")


# ---- names, folders and pipes ----------------------------------------------------------------------------------------
def noise(name, seed=0):
    image = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)
    write_file(Path(name), {".png": image, ".npy": np.float32(image / 255), ".txt": "at noon"}[Path(name).suffix])


@pytest.mark.parametrize(
    "files, frames",
    [
        ("rgb/a/1.png rgb/b/1.png depth/a/1.png", {"a/1": "rgb, depth", "b/1": "rgb"}),
        ("rgb/a_1.png rgb/a/1.png depth/a_1.png", {"a_1": "rgb, depth", "a/1": "rgb"}),
        ("rgb/color_0001.png depth/depth_0001.png", {"color_0001": "rgb, depth"}),
        ("rgb/c_0009.png rgb/c_0010.png depth/depth_0010.png", {"c_0009": "rgb", "c_0010": "rgb, depth"}),
        ("rgb/s/7_rgb.png rgb/s/17_rgb.png depth/s/7_d.png", {"s/7_rgb": "rgb, depth", "s/17_rgb": "rgb"}),
        ("rgb/img.png rgb/img_2.png depth/d.png depth/d_2.png", {"img": "rgb, depth", "img_2": "rgb, depth"}),
        ("rgb/x.png rgb/y.png lidar/y.npy", {"x": "rgb", "y": "rgb, lidar"}),
        ("rgb/x.png rgb/notes.txt", {"x": "rgb"}),
        ("rgb/1.png rgb/.hidden.png depth/1.png", {"1": "rgb, depth"}),
    ],
)
def test_files_of_a_frame_are_found_in_folders_and_paired_by_name_or_by_what_differs(untrained, capsys, files, frames):
    for seed, file in enumerate(files.split()):
        noise(file, seed)
    folders = dict.fromkeys(file.split("/")[0] for file in files.split())
    call(untrained, "--out", "out", "--input", *(f"{name}={name}" for name in folders))
    missing = {name: ", ".join(m for m in MODALITIES if m not in found) for name, found in frames.items()}
    said = [line for line in capsys.readouterr().out.splitlines() if "_*.png" in line]
    assert sorted(said) == sorted(f"out/{name}_*.png: {frames[name]}; missing {missing[name]}" for name in frames)
    written = {str(path.relative_to("out")) for path in Path("out").rglob("*.png")}
    assert written == {f"{name}_{kind}.png" for name in frames for kind in ("label", "colour", "overlay")}


def test_pictures_of_an_earlier_run_are_no_frames_of_the_next(untrained, capsys):
    noise("x.png")
    for _ in range(2):
        call(untrained, "--input", "rgb=.", "--out", ".")
    assert "left out: 3 pictures" in capsys.readouterr().out
    assert len(os.listdir()) == 4


def test_a_file_name_that_is_no_utf_8_is_printed_with_its_bytes_as_numbers(untrained):
    file = Path(os.fsdecode(b"caf\xe9.png"))
    write_file(file, np.arange(2000, dtype=np.uint8).reshape(40, 50))
    command = [sys.executable, predict.__file__, untrained, "--out", "out", "--input", f"depth={file}"]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONUTF8": "1"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"out/caf\\udce9_*.png: depth; missing rgb" in done.stdout
    assert len(os.listdir("out")) == 3


def test_two_writers_of_one_file_do_not_share_what_they_write_beside_it(monkeypatch):
    inner = []

    def other_process(_):
        monkeypatch.setattr(output.os, "fsync", lambda _: None)
        monkeypatch.setattr(output.os, "getpid", lambda: 1)
        inner.append(output.write_output("a.txt", f"{output.MARK}, the other"))

    monkeypatch.setattr(output.os, "fsync", other_process)
    output.write_output("a.txt", f"{output.MARK}, this")
    assert inner and Path("a.txt").read_text() == f"{output.MARK}, this" and os.listdir() == ["a.txt"]


@pytest.mark.parametrize("label_map, ids", [("shift:-1", range(1, 13)), ("300=0,7=1,9=1,0=255", [300, 7])])
def test_label_pictures_can_be_had_in_the_ids_of_the_users_files(untrained, frame, label_map, ids):
    model = changed(untrained, label_map=label_map, data="folder")
    plain, colour = labels(model, "rgb=a.png"), picture("out/a_colour.png")
    mapped = labels(model, "rgb=a.png", "--file-ids")
    assert all((mapped[plain == k] == id).all() for k, id in enumerate(ids)) and (plain < len(ids)).any()
    assert (picture("out/a_colour.png") == colour).all()


# ---- the exported program --------------------------------------------------------------------------------------------
ELSEWHERE = """
import json, sys
import numpy as np, torch

about = json.load(open("about.json"))
program = torch.export.load(about["program"]).module()
arrays = np.load("arrays.npz")
images = np.zeros((1, len(about["modalities"]), 3, *about["size"]), np.float32)
for m, (name, divisor) in enumerate(zip(about["modalities"], about["divisors"])):
    image = np.atleast_3d(arrays[name]) / divisor
    images[0, m] = np.broadcast_to(image, (*image.shape[:2], 3)).transpose(2, 0, 1)
rows = torch.from_numpy(arrays["rows"])
x = torch.from_numpy(images).expand(len(rows), -1, -1, -1, -1).clone()
x[~rows] = float("nan")  # whatever an absent sensor delivers
with torch.inference_mode():
    ids = program(x, rows).argmax(1)
    assert torch.equal(program(x[:1], rows[:1]).argmax(1)[0], ids[0])
assert not any(name in sys.modules for name in ("segformer", "predict", "engine"))
np.save("ids.npy", ids.numpy().astype(np.uint8))
"""


@pytest.mark.parametrize("absent", ["skip", "zero"])
def test_one_program_answers_every_subset_like_predict_without_the_repository(untrained, capsys, absent):
    rng, size = np.random.default_rng(3), (32, 64)
    arrays = {m: rng.integers(0, 256, (*size, 3), np.uint8) for m in MODALITIES}
    arrays["depth"], arrays["lidar"] = rng.integers(0, 65536, size, np.uint16), rng.random(size, np.float32)
    ranges = {"rgb": ["8 bit", 0, 1], "depth": ["16 bit", 0, 65535], "event": ["8 bit", 0, 1], "lidar": ["float", 0, 1]}
    numbers = [[rng.uniform(low, high, 3).tolist() for _ in MODALITIES] for low, high in ((0.2, 0.6), (0.1, 0.4))]
    model = changed(untrained, ranges=ranges, absent=absent, normalisation=numbers)
    call(model, "--export", "student.pt2", "--size", "32x64")
    for name in ("student.pt2", "about.json"):
        output.check_output(name)  # it may be written again
    assert re.search(r"student.pt2: .* million parameters, \d+ ms an image", capsys.readouterr().out)
    about = json.loads(Path("about.json").read_text())
    assert about["modalities"] == MODALITIES and about["divisors"] == [255, 65535, 255, 1] and about["size"] == [32, 64]
    assert about["classes"] == CLASSES and about["palette"] == PALETTE
    rows = np.array([[m in subset for m in range(4)] for subset in all_subsets(4)])
    np.savez("arrays.npz", rows=rows, **arrays)
    subprocess.run([sys.executable, "-I", "-c", ELSEWHERE], check=True)  # -I: without PYTHONPATH
    segmenter = predict.Segmenter(model, "cpu", size=size)
    for row, ids in zip(rows, np.load("ids.npy"), strict=True):
        expected = segmenter(**{m: arrays[m] for m, there in zip(MODALITIES, row, strict=True) if there})
        assert (ids != expected).mean() < 1e-3, row
    assert len(np.unique(ids)) > 3


@pytest.mark.parametrize("absent", ["skip", "zero"])
def test_a_cmnext_is_exported_as_far_as_torch_export_can(capsys, absent):
    torch.manual_seed(4)
    model, meta = with_wide_weights(build_model("cmnext_tiny", len(CLASSES), MODALITIES)), about_scenes(absent=absent)
    save_model(Path("model.pt"), model, {**meta, "backbone": "cmnext_tiny"})
    call("model.pt", "--export", "a.pt2", "--size", "32")
    program, images = torch.export.load("a.pt2").module(), torch.rand(3, 4, 3, 32, 32)
    x = normalise(images, *meta["normalisation"])
    with torch.inference_mode():
        if absent == "skip":
            assert "needs all modalities" in capsys.readouterr().out
            found, expected = program(images), model(x).logits
        else:
            present = torch.tensor([[True, False, True, False]]).expand(3, 4)
            found, expected = program(images, present), model(x * present[:, :, None, None, None]).logits
    assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max())


def test_a_program_that_does_not_fit_on_the_disk_is_named(untrained, monkeypatch):
    monkeypatch.setattr(output.os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="a.pt2 .No space left"):
        call(untrained, "--export", "a.pt2", "--size", "32")
    assert not os.listdir()
