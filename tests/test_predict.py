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
from datasets import synthetic
from datasets.export import write_file
from datasets.layouts import Frame, open_layout
from engine import output, pictures
from engine.checkpoint import load_model, save_model
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
    write_file(file, np.zeros((40, 50), np.uint8))
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
        (["rgb={}", "depth={}/other"], "have no .png.* file with a stem in common"),
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
        (["--input", "rgb=README.md", "--panel", "a.png"], "leave out --data, --root, --modalities and --panel"),
        (["--size", "8"], "at least 32"),
    ],
)
def test_contradictory_options_stop_before_anything_is_read(capsys, arguments, sentence):
    with pytest.raises(SystemExit) as stop:
        predict.options(["nowhere.pt", *arguments])
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_files_that_are_no_pictures_are_left_out(run, tmp_path):
    write_file(tmp_path / "rgb/x.png", np.zeros((40, 50, 3), np.uint8))
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
    assert not list((folder / "out").iterdir())


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
    assert (np.asarray(Image.open(tmp_path / "val_000001_label.png")) != expected).mean() < 1e-3


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
    assert grid[2][5].caption == f"{100 * (ids == scene['label']).mean():.0f} %"


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


def test_the_key_names_only_classes_that_occur(monkeypatch):
    label = np.array([[1, 255]], np.uint8)
    monkeypatch.setattr(predict, "segment", lambda *_: np.array([[3, 3]], np.uint8))
    monkeypatch.setattr(pictures, "draw", lambda grid, titles, sides, key, note: key)
    frame, meta = Frame("a", "fog", "none"), {"modalities": MODALITIES, "classes": CLASSES, "palette": PALETTE}
    key = predict.comparison({"student": None}, [(frame, None, {}, label)], [MODALITIES], meta, "synthetic")
    assert key == [(CLASSES[1], tuple(PALETTE[1])), (CLASSES[3], tuple(PALETTE[3])), ("ignored", (0, 0, 0))]


def test_the_exported_program_takes_any_batch_and_agrees_with_the_mask(run, tmp_path):
    file = tmp_path / "student.pt2"
    call(run / "student.pt", "--export", file, "--modalities", "event,rgb", "--size", "32x64")
    extra = {"about.json": ""}
    program = torch.export.load(file, extra_files=extra).module()
    assert json.loads(extra["about.json"])["modalities"] == ["rgb", "event"]
    model, _ = load_model(run / "student.pt", torch.device("cpu"))
    images = torch.randn(5, 4, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    present = torch.tensor([True, False, True, False]).expand(5, 4)
    with torch.inference_mode():
        expected = model(images, present).logits
        assert torch.allclose(program(images[:, [0, 2]]), expected, atol=1e-4 * expected.abs().max())
