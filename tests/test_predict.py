"""predict.py and pictures.py: files in, pictures out, at the input's size and from whichever modalities there are."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from data import normalise
from datasets import synthetic
from datasets.export import write_file
from datasets.layouts import Frame, open_layout
from engine import output, pictures
from engine.checkpoint import load_model, save_model
from engine.subsets import all_subsets
from model import build_model

MODALITIES = ["rgb", "depth", "event", "lidar"]
_, _, CLASSES, PALETTE = open_layout("synthetic", None, "hha", 40)
PALETTE = PALETTE.tolist()
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def spread_logits(model):
    """Untrained models answer one class everywhere; wider weights make maps of many classes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    return model.eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with random teacher.pt and student.pt for the painted scenes."""
    folder = tmp_path_factory.mktemp("run")
    for seed, name in enumerate(("teacher", "student")):
        torch.manual_seed(seed)
        model = spread_logits(build_model("segformer_tiny", len(CLASSES), MODALITIES))
        meta = {
            "backbone": "segformer_tiny",
            "modalities": MODALITIES,
            "classes": CLASSES,
            "palette": PALETTE,
            "size": 64,
            "val_size": 64,
            "data": "synthetic",
            "root": None,
            "depth": "hha",
            "label_map": None,
            "hold_out": 0,
            "normalisation": [[MEAN.tolist()] * 4, [STD.tolist()] * 4],
            "absent": "skip",
            "options": {},
        }
        save_model(folder / f"{name}.pt", model, meta)
    return folder


@pytest.fixture
def frame(tmp_path):
    """One frame of 64 x 96 pixels: 8-bit colour, and 16-bit grey depth that 8 bits cannot hold."""
    rng = np.random.default_rng(5)
    rgb = rng.integers(0, 256, (64, 96, 3), np.uint8)
    depth = rng.integers(0, 65536, (64, 96), np.uint16)
    write_file(tmp_path / "a.png", rgb)
    write_file(tmp_path / "b.png", depth)
    return tmp_path, rgb, depth


def call(*arguments):
    predict.main(predict.options([str(a) for a in arguments]))


def answer_of_submodel(checkpoint, images):
    """Class ids by a model that was built for these sensors alone: images (M, H, W, 3) in 0..1."""
    state = torch.load(checkpoint, weights_only=True)["model"]
    model = build_model("segformer_tiny", len(CLASSES), MODALITIES[: len(images)]).eval()
    model.load_state_dict(state)
    x = torch.from_numpy(((np.stack(images) - MEAN) / STD).transpose(0, 3, 1, 2)).float()
    with torch.inference_mode():
        return model(x[None]).logits.argmax(1)[0].numpy()


def test_files_become_the_label_map_of_a_model_with_just_these_sensors(run, frame):
    folder, rgb, depth = frame
    call(run / "student.pt", "--input", f"rgb={folder / 'a.png'}", f"depth={folder / 'b.png'}", "--out", folder / "out")
    ids = np.asarray(Image.open(folder / "out/a_label.png"))
    expected = answer_of_submodel(run / "student.pt", [rgb / 255, np.dstack([depth / 65535] * 3)])
    assert ids.shape == (64, 96) and len(np.unique(expected)) > 3
    assert (ids != expected).mean() < 1e-3  # ties may fall either way

    colour = np.asarray(Image.open(folder / "out/a_colour.png"))
    assert (colour == np.array(PALETTE)[ids]).all()
    overlay = np.asarray(Image.open(folder / "out/a_overlay.png")).astype(int)
    assert np.abs(overlay - (rgb.astype(int) + colour) / 2).max() <= 1


def test_the_order_of_the_modalities_on_the_command_line_changes_only_the_overlay(run, frame):
    folder, _, _ = frame
    call(run, "--input", f"rgb={folder / 'a.png'}", f"depth={folder / 'b.png'}", "--out", folder / "one")
    call(run, "--input", f"depth={folder / 'b.png'}", f"rgb={folder / 'a.png'}", "--out", folder / "two")
    one, two = (np.asarray(Image.open(folder / path)) for path in ("one/a_label.png", "two/b_label.png"))
    assert (one == two).all()


@pytest.mark.parametrize("size", ["48", "64x96"])
def test_the_network_may_see_another_size_than_the_outputs_have(run, frame, size):
    folder, _, _ = frame
    call(run, "--input", f"rgb={folder / 'a.png'}", "--size", size, "--out", folder / "out")
    assert Image.open(folder / "out/a_label.png").size == (96, 64)
    assert Image.open(folder / "out/a_overlay.png").size == (96, 64)


def test_a_file_name_that_is_no_utf_8_is_printed_with_its_bytes_as_numbers(run, tmp_path):
    file = tmp_path / os.fsdecode(b"caf\xe9.png")
    write_file(file, np.arange(2000, dtype=np.uint8).reshape(40, 50))
    command = [sys.executable, "predict.py", str(run / "student.pt"), "--input", f"depth={file}", "--out", "out"]
    command[1] = str(Path(predict.__file__))
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, env={**os.environ, "PYTHONUTF8": "1"})
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert b"out/caf\\udce9_*.png: depth; missing rgb" in done.stdout
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_frames_smaller_than_the_network_needs_work(run, tmp_path):
    write_file(tmp_path / "small.png", np.random.default_rng(0).integers(0, 256, (20, 31), np.uint8))
    call(run, "--input", f"event={tmp_path / 'small.png'}", "--out", tmp_path / "out")
    assert Image.open(tmp_path / "out/small_label.png").size == (31, 20)


def test_folders_are_matched_by_stem_and_a_frame_may_lack_a_sensor(run, tmp_path, capsys):
    rng = np.random.default_rng(1)
    for path in ("rgb/x.png", "rgb/y.png", "lidar/y.npy"):
        image = rng.random((40, 50, 3), np.float32)
        write_file(tmp_path / path, image if path.endswith("npy") else np.uint8(255 * image))
    call(run, "--input", f"rgb={tmp_path / 'rgb'}", f"lidar={tmp_path / 'lidar'}", "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    assert "x_*.png: rgb; missing depth, event, lidar\n" in printed
    assert "y_*.png: rgb, lidar; missing depth, event\n" in printed
    assert len(list((tmp_path / "out").iterdir())) == 6


@pytest.mark.parametrize(
    "inputs, sentence",
    [
        (["thermal={}/a.png"], "has no modality thermal; it has rgb, depth, event, lidar"),
        (["rgb={}/a.png", "depth={}/c.png"], "c.png has 40 rows of 50 pixels, but .*a.png has 64 of 96"),
        (["rgb={}/a.png", "depth={}/other"], "give files or folders for all"),
        (["rgb={}", "depth={}/other"], "have no .png.* file with a name in common"),
        (["rgb={}/text.png"], "text.png cannot be read"),
        (["rgb={}/empty"], "empty holds no file that ends in .png"),
    ],
)
def test_bad_input_is_told_in_a_sentence_that_names_it(run, frame, inputs, sentence):
    folder, _, _ = frame
    write_file(folder / "c.png", np.zeros((40, 50), np.uint8))
    write_file(folder / "text.png", "no picture")
    write_file(folder / "other/z.png", np.zeros((40, 50), np.uint8))
    (folder / "empty").mkdir()
    with pytest.raises((ValueError, OSError), match=sentence):
        call(run, "--input", *(text.format(folder) for text in inputs), "--out", folder / "out")


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--input", "rgb"], "must be MODALITY=PATH"),
        (["--input", "rgb=nowhere.png"], "'rgb=nowhere.png' must be MODALITY=PATH with a file or folder that exists"),
        (["--input", "rgb=README.md", "rgb=Makefile"], "names a modality twice"),
        (["--input", "rgb=README.md", "--data", "deliver"], "leave out --data"),
        (["--input", "rgb=README.md", "--panel", "a.png"], "leave out --panel"),
        (["--size", "8"], "at least 32"),
    ],
)
def test_contradictory_options_stop_before_anything_is_read(capsys, arguments, sentence):
    with pytest.raises(SystemExit) as stop:
        predict.options(["nowhere.pt", *arguments])
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_files_that_are_no_pictures_are_left_out(run, tmp_path):
    write_file(tmp_path / "rgb/x.png", np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    write_file(tmp_path / "rgb/notes.txt", "at noon")
    call(run, "--input", f"rgb={tmp_path / 'rgb'}", "--out", tmp_path / "out")
    assert {path.name[:2] for path in (tmp_path / "out").iterdir()} == {"x_"}


@pytest.mark.parametrize("flag, name", [("--out", "out/a_label.png"), ("--panel", "p.png"), ("--export", "x.pt2")])
def test_no_file_is_replaced_that_this_program_did_not_write(run, frame, flag, name):
    folder, rgb, _ = frame
    write_file(folder / "truth.png", rgb)
    (folder / "out").mkdir()
    foreign = (folder / "truth.png").rename(folder / name).read_bytes()
    given = ["--input", f"rgb={folder / 'a.png'}"] if flag == "--out" else ["--count", "1"]
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{re.escape(name)} exists and is not marked as written by RMMSS"):
            call(run, *given, flag, folder / ("out" if flag == "--out" else name))
    assert (folder / name).read_bytes() == foreign


def test_what_this_program_wrote_is_replaced(run, frame):
    folder, _, _ = frame
    call(run, "--input", f"rgb={folder / 'a.png'}", "--out", folder / "out")
    before = (folder / "out/a_label.png").read_bytes()
    call(run, "--input", f"depth={folder / 'b.png'}", "--out", folder / "two")
    (folder / "two/b_label.png").rename(folder / "out/a_label.png")
    call(run, "--input", f"rgb={folder / 'a.png'}", "--out", folder / "out")
    assert (folder / "out/a_label.png").read_bytes() == before
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["a_colour.png", "a_label.png", "a_overlay.png"]


def test_every_kind_of_picture_carries_the_mark_where_it_is_looked_for(tmp_path):
    for mode, size in (("L", (2000, 3)), ("RGB", (3, 2000))):
        output.write_picture(tmp_path / f"{mode}.png", Image.new(mode, size))
        output.check_output(tmp_path / f"{mode}.png")  # else it would raise


def test_an_answer_that_is_not_finite_names_the_frame(run, frame, tmp_path):
    folder, _, _ = frame
    state = torch.load(run / "student.pt", weights_only=True)
    name = max(state["model"], key=lambda n: n.startswith("decoder") and n.endswith("bias"))
    state["model"][name].fill_(float("nan"))
    torch.save(state, tmp_path / "broken.pt")
    with pytest.raises(ValueError, match="frame a is not finite"):
        call(tmp_path / "broken.pt", "--input", f"rgb={folder / 'a.png'}", "--out", folder / "out")
    assert not list(folder.glob("out/*"))


@pytest.fixture
def indoor(run, tmp_path):
    """A model of nyuv2 with raw depth, and a frame of 64 x 96 with 8-bit and 16-bit depth in 1..4 m."""
    state = torch.load(run / "student.pt", weights_only=True)
    state["meta"] |= {
        "data": "nyuv2",
        "depth": "raw",
        "normalisation": [[MEAN.tolist(), *[[0.0] * 3] * 3], [STD.tolist(), *[[1.0] * 3] * 3]],
        "root": str(tmp_path),
        "ranges": {"rgb": ["8 bit", 0, 255], "depth": ["8 bit", 0, 255]},
    }
    torch.save(state, tmp_path / "student.pt")
    metres = np.random.default_rng(6).uniform(1, 4, (64, 96))
    write_file(tmp_path / "millimetres.png", np.rint(1000 * metres).astype(np.uint16))
    write_file(tmp_path / "tenths.png", np.rint(10000 * metres).astype(np.uint16))
    write_file(tmp_path / "grey.png", np.rint(25.5 * metres).astype(np.uint8))
    return tmp_path


def test_16_bit_depth_is_read_in_millimetres_or_in_the_unit_given_and_the_unit_is_said(indoor, capsys):
    def ids(file, *options):
        call(indoor / "student.pt", "--input", f"depth={indoor / file}", "--out", indoor / "out", *options)
        return np.asarray(Image.open(indoor / "out" / f"{file.partition('.')[0]}_label.png"))

    plain = ids("millimetres.png")
    said = capsys.readouterr().out
    assert re.search(r"millimetres.png: depth read in steps of 0.001 m, its median is 2\.[45] m", said)
    assert len(np.unique(plain)) > 3
    assert (ids("tenths.png", "--depth-unit", "0.0001") != plain).mean() < 0.01
    assert (ids("grey.png") != plain).mean() < 0.2  # steps of 4 cm
    said = capsys.readouterr().out
    assert re.search(r"grey.png: depth read in steps of 0\.0392157 m, its median is 2\.[45] m", said)
    np.save(indoor / "metres.npy", np.asarray(Image.open(indoor / "millimetres.png")).astype(np.float32) / 1000)
    assert (ids("metres.npy") != plain).mean() < 0.01
    with pytest.raises(ValueError, match="tenths.png: in steps of 0.001 m, half of it is beyond 2[45] m.*--depth-unit"):
        ids("tenths.png")
    write_file(indoor / "hha.png", np.zeros((64, 96, 3), np.uint8))
    with pytest.raises(ValueError, match="hha.png has 3 channel.s., but the model was trained on raw depth"):
        ids("hha.png")


def test_a_data_set_with_some_modalities_left_out(run, tmp_path):
    call(run, "--count", 2, "--modalities", "rgb,depth", "--out", tmp_path)
    scene = synthetic.paint(0, "val", 1, 64)
    expected = answer_of_submodel(run / "student.pt", [scene["rgb"] / 255, scene["depth"] / 255])
    assert (np.asarray(Image.open(tmp_path / "val/000001_label.png")) != expected).mean() < 1e-3


def test_the_panel_of_a_run_shows_scenes_by_row_and_both_models(run, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(pictures, "draw", lambda *args: drawn.update(args=args) or Image.new("RGB", (1, 1)))
    call(run, "--data", "synthetic", "--count", 3, "--panel", tmp_path / "panel.png")
    grid, titles, sides, key, _ = drawn["args"]
    views = ["all modalities", "rgb missing", "rgb and depth missing"]
    says = [f"{name}: {view}" for name in ("teacher", "student") for view in views]
    assert titles == [*MODALITIES, "ground truth", *says] and len(titles) == len(grid[0])
    assert sides == ["val/000000, cloud", "val/000001, fog", "val/000002, night"]
    scene = synthetic.paint(0, "val", 2, 64)
    assert (np.asarray(grid[2][4].image) == np.array(PALETTE, np.uint8)[scene["label"]]).all()
    shown = {tuple(colour) for row in grid for cell in row[4:] for _, colour in cell.image.getcolors(256)}
    assert {colour for _, colour in key} == shown and len(shown) <= len(CLASSES)
    ids = answer_of_submodel(run / "teacher.pt", [scene[modality] / 255 for modality in MODALITIES])
    ious = []
    for k in np.union1d(ids, scene["label"]):
        predicted, labelled = ids == k, scene["label"] == k
        ious.append((predicted & labelled).sum() / (predicted | labelled).sum())
    assert abs(float(grid[2][5].caption) - 100 * np.mean(ious)) <= 1  # ties may fall either way


def test_a_drawn_panel_keeps_every_cell_whole_and_every_colour_exact():
    rng = np.random.default_rng(2)
    sizes = [(64, 64), (50, 700)]  # enlarged by a whole factor; shrunk
    cells = [pictures.label_map(rng.integers(0, 12, size, np.uint8), PALETTE) for size in sizes]
    image = pictures.draw([[pictures.Cell(cells[0])], [pictures.Cell(cells[1])]], ["a long title of many words " * 3])
    pixels = np.asarray(image)
    assert np.asarray(pictures.fit(pictures.Cell(cells[0]), 420)).shape == (384, 384, 3)
    assert np.asarray(pictures.fit(pictures.Cell(cells[1]), 420)).shape == (30, 420, 3)
    for cell in cells:
        block = np.asarray(pictures.fit(pictures.Cell(cell), 420))
        columns = pixels[:, pictures.GAP : pictures.GAP + block.shape[1]]
        assert any((columns[y : y + len(block)] == block).all() for y in range(len(columns) - len(block) + 1))


def test_the_key_names_only_classes_that_occur(run, monkeypatch):
    label = np.array([[1, 255]], np.uint8)
    segmenter = predict.Segmenter(run / "student.pt", "cpu")
    monkeypatch.setattr(segmenter, "answer", lambda *_: np.array([[3, 3]], np.uint8))
    monkeypatch.setattr(pictures, "draw", lambda grid, titles, sides, key, note: key)
    key = predict.comparison(
        segmenter, ["student"], [(Frame("a", "fog", "none"), {}, label)], [MODALITIES], "synthetic"
    )
    assert key == [(CLASSES[1], tuple(PALETTE[1])), (CLASSES[3], tuple(PALETTE[3])), ("ignored", (0, 0, 0))]


# ---- from Python -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 96), (45, 71), (20, 31)])
def test_the_segmenter_gives_the_bits_of_the_label_picture(run, tmp_path, size):
    rng = np.random.default_rng(8)
    rgb, depth = rng.integers(0, 256, (*size, 3), np.uint8), rng.integers(0, 65536, size, np.uint16)
    event = rng.random((*size, 3), np.float32)
    write_file(tmp_path / "a.png", rgb)
    write_file(tmp_path / "b.png", depth)
    np.save(tmp_path / "c.npy", event)
    files = {"rgb": "a.png", "depth": "b.png", "event": "c.npy"}
    call(run, "--input", *(f"{m}={tmp_path / name}" for m, name in files.items()), "--out", tmp_path / "out")
    picture = np.asarray(Image.open(tmp_path / "out/a_label.png"))
    segmenter = predict.Segmenter(run / "student.pt", "cpu")
    ids = segmenter(rgb=rgb, depth=depth, event=event, lidar=None)
    assert ids.dtype == np.uint8 and (ids == picture).all() and len(np.unique(ids)) > 3
    assert (segmenter(event=event.astype(np.float64), depth=depth[..., None], rgb=rgb) == picture).all()
    flipped = segmenter(rgb=rgb[:, ::-1], depth=depth[:, ::-1], event=event[:, ::-1])  # a view with negative strides
    assert flipped.shape == size


def test_a_constant_image_counts_as_missing_unless_it_is_meant(run, frame, capsys):
    folder, rgb, _ = frame
    segmenter, meant = (predict.Segmenter(run, "cpu", keep_constant=keep) for keep in (False, True))
    alone = segmenter(rgb=rgb)
    for dead in (np.zeros((64, 96), np.uint16), np.full((64, 96), 0.5, np.float32), np.full((64, 96, 3), 7, np.uint8)):
        assert (segmenter(rgb=rgb, depth=dead) == alone).all()
        assert (meant(rgb=rgb, depth=dead) != alone).any()
    write_file(folder / "dead.png", np.zeros((64, 96), np.uint16))
    given = ["--input", f"rgb={folder / 'a.png'}", f"depth={folder / 'dead.png'}", "--out", folder / "out"]
    pictures = []
    for more, says in ([], "missing depth (constant), event, lidar\n"), (["--keep-constant"], "missing event, lidar\n"):
        call(run, *given, *more)
        assert says in capsys.readouterr().out
        pictures.append(np.asarray(Image.open(folder / "out/a_label.png")))
    assert (pictures[0] == alone).all() and (pictures[1] != alone).any()
    with pytest.raises(ValueError, match="dead .*--keep-constant"):
        call(run, "--input", f"depth={folder / 'dead.png'}", "--out", folder / "out")


@pytest.mark.parametrize(
    "images, named",
    [
        ({"thermal": np.zeros((40, 50))}, "thermal"),
        ({"rgb": np.zeros((40, 50, 4), np.uint8)}, "rgb"),
        ({"rgb": np.zeros((40, 50, 3), np.int64)}, "rgb is int64"),
        ({"depth": np.arange(2000).reshape(40, 50) * 0.1}, "depth has values in 0..199.9"),
        ({"depth": np.full((40, 50), np.nan)}, "depth has values"),
        ({"rgb": np.eye(40, 50), "depth": np.eye(50, 40)}, r"depth \(50, 40\)"),
        ({"rgb": None}, "no image"),
        ({}, "no image"),
    ],
)
def test_arrays_that_are_no_images_are_told_by_name(run, tmp_path, images, named):
    state = torch.load(run / "student.pt", weights_only=True)
    state["meta"]["ranges"] = {"rgb": ["8 bit", 0, 255], "depth": ["16 bit", 0, 9000]}
    torch.save(state, tmp_path / "student.pt")
    with pytest.raises(ValueError, match=named):
        predict.Segmenter(tmp_path / "student.pt", "cpu")(**images)


def test_a_model_of_zero_images_is_given_them(run, frame, tmp_path):
    state = torch.load(run / "student.pt", weights_only=True)
    state["meta"]["absent"] = "zero"
    torch.save(state, tmp_path / "zero.pt")
    _, rgb, _ = frame
    model, _ = load_model(tmp_path / "zero.pt", torch.device("cpu"))
    x = torch.zeros(1, 4, 3, 64, 96)
    x[0, 0] = torch.from_numpy((rgb / 255 - MEAN) / STD).permute(2, 0, 1)
    with torch.inference_mode():
        expected = model(x).logits.argmax(1)[0].numpy()
    ids = predict.Segmenter(tmp_path / "zero.pt", "cpu")(rgb=rgb)
    assert (ids != expected).mean() < 1e-3 and (ids != predict.Segmenter(run, "cpu")(rgb=rgb)).any()


def test_a_single_model_is_a_runs_final_model(run, frame, tmp_path):
    folder, rgb, _ = frame
    (tmp_path / "run").mkdir()
    (tmp_path / "run/single.pt").write_bytes((run / "student.pt").read_bytes())
    assert (predict.Segmenter(tmp_path / "run")(rgb=rgb) == predict.Segmenter(run)(rgb=rgb)).all()
    call(tmp_path / "run", "--count", 1, "--panel", tmp_path / "panel.png")


# ---- names, folders and pipes ----------------------------------------------------------------------------------------


def noise(path, seed=0):
    write_file(path, np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8))


@pytest.mark.parametrize(
    "files, frames",
    [
        (["rgb/a/1.png", "rgb/b/1.png", "depth/a/1.png"], {"a/1": "rgb, depth", "b/1": "rgb"}),
        (["rgb/a_1.png", "rgb/a/1.png", "depth/a_1.png"], {"a_1": "rgb, depth", "a/1": "rgb"}),
        (["rgb/color_0001.png", "depth/depth_0001.png"], {"color_0001": "rgb, depth"}),
        (
            ["rgb/color_0009.png", "rgb/color_0010.png", "depth/depth_0010.png"],
            {"color_0009": "rgb", "color_0010": "rgb, depth"},
        ),
        (["rgb/s/7_rgb.png", "rgb/s/17_rgb.png", "depth/s/7_d.png"], {"s/7_rgb": "rgb, depth", "s/17_rgb": "rgb"}),
        (
            ["rgb/img.png", "rgb/img_2.png", "depth/d.png", "depth/d_2.png"],
            dict.fromkeys(("img", "img_2"), "rgb, depth"),
        ),
        (["rgb/1.png", "rgb/.hidden.png", "depth/1.png"], {"1": "rgb, depth"}),
    ],
)
def test_files_of_a_frame_are_found_in_folders_and_paired_by_name_or_by_what_differs(
    run, tmp_path, capsys, files, frames
):
    for seed, file in enumerate(files):
        noise(tmp_path / file, seed)
    call(run, "--input", f"rgb={tmp_path / 'rgb'}", f"depth={tmp_path / 'depth'}", "--out", tmp_path / "out")
    lines = [line for line in capsys.readouterr().out.splitlines() if "_*.png" in line]
    found = {line.split("_*.png: ")[0]: line.split("_*.png: ")[1].split(";")[0] for line in lines}
    assert found == {str(tmp_path / "out" / name): modalities for name, modalities in frames.items()}
    assert all((tmp_path / f"out/{name}_{kind}.png").is_file() for name in frames for kind in ("label", "overlay"))


def test_names_that_cannot_be_paired_are_shown_how_they_must_look(run, tmp_path):
    for file in ("rgb/a.png", "depth/b.png"):
        noise(tmp_path / file)
    with pytest.raises(ValueError, match="color_0007.png, depth_0007.png"):
        call(run, "--input", f"rgb={tmp_path / 'rgb'}", f"depth={tmp_path / 'depth'}", "--out", tmp_path / "out")


def test_pictures_of_an_earlier_run_are_no_frames_of_the_next(run, tmp_path, capsys):
    noise(tmp_path / "x.png")
    for _ in range(2):
        call(run, "--input", f"rgb={tmp_path}", "--out", tmp_path)
    assert "left out: 3 pictures" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 4


def test_an_output_folder_that_is_a_file_is_named(run, frame):
    folder, *_ = frame
    with pytest.raises(ValueError, match="--out .*b.png is a file"):
        call(run, "--input", f"rgb={folder / 'a.png'}", "--out", folder / "b.png")


def test_predictions_go_on_when_nobody_reads_the_lines(run, tmp_path):
    for i in range(4):
        noise(tmp_path / f"in/{i}.png")
    command = [
        sys.executable,
        predict.__file__,
        str(run),
        "--input",
        f"rgb={tmp_path / 'in'}",
        "--out",
        tmp_path / "out",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0
    assert len(list((tmp_path / "out").iterdir())) == 12


def test_two_processes_write_into_one_folder(run, tmp_path):
    noise(tmp_path / "a.png")
    command = [
        sys.executable,
        predict.__file__,
        str(run),
        "--input",
        f"rgb={tmp_path / 'a.png'}",
        "--out",
        tmp_path / "out",
    ]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    for process in both:
        assert process.communicate()[1] == b"" and process.returncode == 0
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_two_writers_of_one_file_do_not_share_what_they_write_beside_it(tmp_path, monkeypatch):
    inner = []

    def other_process(_):
        monkeypatch.setattr(output.os, "fsync", lambda _: None)
        monkeypatch.setattr(output.os, "getpid", lambda: 1)
        inner.append(output.write_output(tmp_path / "a.txt", f"{output.MARK}, the other"))

    monkeypatch.setattr(output.os, "fsync", other_process)
    output.write_output(tmp_path / "a.txt", f"{output.MARK}, this")
    assert inner and (tmp_path / "a.txt").read_text() == f"{output.MARK}, this"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "arguments, named", [(["--depth-unit", "0.001"], "--depth-unit"), (["--file-ids"], "--file-ids")]
)
def test_options_without_effect_are_refused(run, frame, arguments, named):
    folder, *_ = frame
    with pytest.raises(ValueError, match=named):
        call(run, "--input", f"depth={folder / 'b.png'}", "--out", folder / "out", *arguments)
    assert not (folder / "out").exists()


@pytest.mark.parametrize("label_map, ids", [("shift:-1", range(1, 13)), ("300=0,7=1,9=1,0=255", [300, 7])])
def test_label_pictures_can_be_had_in_the_ids_of_the_users_files(run, frame, tmp_path, label_map, ids):
    folder, rgb, _ = frame
    state = torch.load(run / "student.pt", weights_only=True)
    state["meta"] |= {"label_map": label_map, "data": "folder"}
    torch.save(state, tmp_path / "mapped.pt")
    given = [tmp_path / "mapped.pt", "--input", f"rgb={folder / 'a.png'}", "--out"]
    call(*given, tmp_path / "plain")
    call(*given, tmp_path / "mapped", "--file-ids")
    plain, mapped = (np.asarray(Image.open(tmp_path / name / "a_label.png")) for name in ("plain", "mapped"))
    assert all((mapped[plain == k] == id).all() for k, id in enumerate(ids)) and (plain < len(ids)).any()
    one, two = ((tmp_path / name / "a_colour.png").read_bytes() for name in ("plain", "mapped"))
    assert one == two


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
    one = program(x[:1], rows[:1]).argmax(1)
assert torch.equal(one[0], ids[0])
assert not any(name in sys.modules for name in ("segformer", "predict", "engine"))
np.save("ids.npy", ids.numpy().astype(np.uint8))
"""


@pytest.mark.parametrize("absent", ["skip", "zero"])
def test_one_program_answers_every_subset_like_predict_without_the_repository(run, tmp_path, capsys, absent):
    rng, size = np.random.default_rng(3), (32, 64)
    arrays = {m: rng.integers(0, 256, (*size, 3), np.uint8) for m in MODALITIES}
    arrays["depth"], arrays["lidar"] = rng.integers(0, 65536, size, np.uint16), rng.random(size, np.float32)
    state = torch.load(run / "student.pt", weights_only=True)
    kinds = {m: {"uint8": "8 bit", "uint16": "16 bit", "float32": "float"}[a.dtype.name] for m, a in arrays.items()}
    numbers = [[rng.uniform(low, high, 3).tolist() for _ in MODALITIES] for low, high in ((0.2, 0.6), (0.1, 0.4))]
    state["meta"] |= {"ranges": {m: [k, 0, 1] for m, k in kinds.items()}, "absent": absent, "normalisation": numbers}
    torch.save(state, tmp_path / "model.pt")
    for _ in range(2):  # it may be written again
        call(tmp_path / "model.pt", "--export", tmp_path / "student.pt2", "--size", "32x64")
    printed = capsys.readouterr().out
    assert re.search(r"student.pt2: .* million parameters, \d+ ms an image", printed)
    about = json.loads((tmp_path / "about.json").read_text())
    assert about["modalities"] == MODALITIES and about["divisors"] == [255, 65535, 255, 1] and about["size"] == [32, 64]
    assert about["classes"] == CLASSES and about["palette"] == PALETTE
    rows = np.array([[m in subset for m in range(4)] for subset in all_subsets(4)])
    np.savez(tmp_path / "arrays.npz", rows=rows, **arrays)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-I", "-c", ELSEWHERE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    segmenter = predict.Segmenter(tmp_path / "model.pt", "cpu", size=size)
    for row, ids in zip(rows, np.load(tmp_path / "ids.npy"), strict=True):
        expected = segmenter(**{m: arrays[m] for m, there in zip(MODALITIES, row, strict=True) if there})
        assert (ids != expected).mean() < 1e-3, row
    assert len(np.unique(ids)) > 3


@pytest.mark.parametrize("absent", ["skip", "zero"])
def test_a_cmnext_is_exported_as_far_as_torch_export_can(run, tmp_path, capsys, absent):
    state = torch.load(run / "student.pt", weights_only=True)
    torch.manual_seed(4)
    model = spread_logits(build_model("cmnext_tiny", len(CLASSES), MODALITIES))
    save_model(tmp_path / "model.pt", model, {**state["meta"], "backbone": "cmnext_tiny", "absent": absent})
    call(tmp_path / "model.pt", "--export", tmp_path / "a.pt2", "--size", "32")
    program, images = torch.export.load(tmp_path / "a.pt2").module(), torch.rand(3, 4, 3, 32, 32)
    x = normalise(images, *state["meta"]["normalisation"])
    with torch.inference_mode():
        if absent == "skip":
            assert "needs all modalities" in capsys.readouterr().out
            found, expected = program(images), model(x).logits
        else:
            present = torch.tensor([[True, False, True, False]]).expand(3, 4)
            found, expected = program(images, present), model(x * present[:, :, None, None, None]).logits
    assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max())


def test_a_program_that_does_not_fit_on_the_disk_is_named(run, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output.os, "fsync", full)
    with pytest.raises(OSError, match="a.pt2 .No space left"):
        call(run, "--export", tmp_path / "a.pt2", "--size", "32")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["about.json", "a.pt2"])
def test_an_export_replaces_no_foreign_file(run, tmp_path, name):
    (tmp_path / name).write_text("somebody's own")
    with pytest.raises(ValueError, match=f"{name} exists and is not marked"):
        call(run, "--export", tmp_path / "a.pt2", "--size", "32")
    assert (tmp_path / name).read_text() == "somebody's own" and len(list(tmp_path.iterdir())) == 1
