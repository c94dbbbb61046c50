"""predict.py and pictures.py: files in, pictures out, at the input's size and from whichever sensors there are."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from datasets import synthetic
from datasets.export import write_file
from engine import pictures
from engine.checkpoint import save_model
from model import build_model, condition_on_sensors

SENSORS = ["rgb", "depth", "event", "lidar"]
CLASSES = [name for name, _ in synthetic.CLASSES]
PALETTE = [list(colour) for _, colour in synthetic.CLASSES]
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
        model = spread_logits(build_model("segformer_tiny", len(CLASSES), SENSORS, 0.0, 0.0))
        meta = {"backbone": "segformer_tiny", "modalities": SENSORS, "classes": CLASSES, "palette": PALETTE, "size": 64,
                "data": "synthetic", "root": None, "depth": "hha", "label_map": None, "normalisation": "all", "drop_path": 0.0,
                "dropout": 0.0}  # fmt: skip
        save_model(folder / f"{name}.pt", model, meta)
    return folder


@pytest.fixture
def files(tmp_path):
    """One frame of 70 x 93 pixels: 8-bit colour, and 16-bit grey depth that 8 bits cannot hold."""
    rng = np.random.default_rng(5)
    rgb = rng.integers(0, 256, (70, 93, 3), np.uint8)
    depth = rng.integers(0, 65536, (70, 93), np.uint16)
    write_file(tmp_path / "a.png", rgb)
    write_file(tmp_path / "b.png", depth)
    return tmp_path, rgb, depth


def call(*arguments):
    predict.main(predict.options([str(a) for a in arguments]))


def answer_of_submodel(checkpoint, images):
    """Class ids by a model that was built for these sensors alone: images (M, H, W, 3) in 0..1."""
    state = torch.load(checkpoint, weights_only=True)["model"]
    model = build_model("segformer_tiny", len(CLASSES), SENSORS[: len(images)], 0.0, 0.0).eval()
    model.load_state_dict(state)
    x = torch.from_numpy(((np.stack(images) - MEAN) / STD).transpose(0, 3, 1, 2)).float()
    with torch.inference_mode():
        return model(x[None]).logits.argmax(1)[0].numpy()


def test_files_become_the_label_map_of_a_model_with_just_these_sensors(run, files):
    folder, rgb, depth = files
    call(run / "student.pt", "--input", f"rgb={folder / 'a.png'}", f"depth={folder / 'b.png'}", "--out", folder / "out")
    ids = np.asarray(Image.open(folder / "out/a_label.png"))
    expected = answer_of_submodel(run / "student.pt", [rgb / 255, np.dstack([depth / 65535] * 3)])
    assert ids.shape == (70, 93) and len(np.unique(expected)) > 3
    assert (ids != expected).mean() < 1e-3  # ties may fall either way

    colour = np.asarray(Image.open(folder / "out/a_colour.png"))
    assert (colour == np.array(PALETTE)[ids]).all()
    overlay = np.asarray(Image.open(folder / "out/a_overlay.png")).astype(int)
    assert np.abs(overlay - (rgb.astype(int) + colour) / 2).max() <= 1
    assert (folder / "out/a_panel.png").exists()


def test_the_order_of_the_sensors_on_the_command_line_changes_only_the_overlay(run, files):
    folder, _, _ = files
    call(run, "--input", f"rgb={folder / 'a.png'}", f"depth={folder / 'b.png'}", "--out", folder / "one")
    call(run, "--input", f"depth={folder / 'b.png'}", f"rgb={folder / 'a.png'}", "--out", folder / "two")
    one, two = (np.asarray(Image.open(folder / path)) for path in ("one/a_label.png", "two/b_label.png"))
    assert (one == two).all()


@pytest.mark.parametrize("size", ["48", "64x96"])
def test_the_network_may_see_another_size_than_the_outputs_have(run, files, size):
    folder, _, _ = files
    call(run, "--input", f"rgb={folder / 'a.png'}", "--size", size, "--out", folder / "out")
    assert Image.open(folder / "out/a_label.png").size == (93, 70)
    assert Image.open(folder / "out/a_overlay.png").size == (93, 70)


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
    assert "x: rgb; missing depth, event, lidar\n" in printed and "y: rgb, lidar; missing depth, event\n" in printed
    assert len(list((tmp_path / "out").iterdir())) == 8


@pytest.mark.parametrize("inputs, sentence", [
    (["thermal={}/a.png"], "sensor 'thermal' is unknown to .*: it has rgb, depth, event, lidar"),
    (["rgb={}/a.png", "depth={}/c.png"], "c.png has 40 rows of 50 pixels, but .*a.png has 70 of 93"),
    (["rgb={}/nowhere.png"], "nowhere.png: no such file"),
    (["rgb={}/a.png", "depth={}"], "mixes files and folders"),
    (["rgb={}", "depth={}/other"], "have no file stem in common"),
    (["rgb={}/text.png"], "text.png cannot be read"),
    (["rgb={}/empty"], "empty holds no file that ends in .png"),
])  # fmt: skip
def test_bad_input_is_told_in_a_sentence_that_names_it(run, files, inputs, sentence):
    folder, _, _ = files
    write_file(folder / "c.png", np.zeros((40, 50), np.uint8))
    write_file(folder / "text.png", "no picture")
    write_file(folder / "other/z.png", np.zeros((40, 50), np.uint8))
    (folder / "empty").mkdir()
    with pytest.raises((ValueError, OSError), match=sentence):
        call(run, "--input", *(text.format(folder) for text in inputs), "--out", folder / "out")


@pytest.mark.parametrize("arguments, sentence", [
    (["--input", "rgb"], "must be SENSOR=PATH"),
    (["--input", "rgb=a.png", "rgb=b.png"], "names a sensor twice"),
    (["--input", "rgb=a.png", "--data", "deliver"], "leave out --data"),
    (["--export", "student.onnx"], "must end in .pt2"),
    (["--size", "8"], "at least 32"),
    (["--input", "rgb=a.png", "--count", "2"], "leave out --data, --root, --split, --count"),
    (["--panel", "a.bmpx"], "must end in .png or .jpg"),
])  # fmt: skip
def test_contradictory_options_stop_before_anything_is_read(capsys, arguments, sentence):
    with pytest.raises(SystemExit) as stop:
        predict.options(["nowhere.pt", *arguments])
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_help_answers_without_loading_torch():
    code = ("import runpy, sys; sys.argv = ['predict.py', '--help']\n"
            "try: runpy.run_path('predict.py', run_name='__main__')\n"
            "except SystemExit as stop: sys.exit(stop.code or 'torch' in sys.modules)")  # fmt: skip
    folder = predict.__file__.rpartition("/")[0]
    assert subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True).returncode == 0


def test_files_that_are_no_pictures_are_named(run, tmp_path, capsys):
    write_file(tmp_path / "rgb/x.png", np.zeros((40, 50, 3), np.uint8))
    write_file(tmp_path / "rgb/notes.txt", "at noon")
    call(run, "--input", f"rgb={tmp_path / 'rgb'}", "--out", tmp_path / "out")
    assert "left out notes.txt, which end in none of .png" in capsys.readouterr().err


def test_a_data_set_with_some_sensors_left_out(run, tmp_path):
    call(run, "--count", 2, "--sensors", "rgb,depth", "--out", tmp_path)
    scene = synthetic.paint(0, "val", 1, 64)
    expected = answer_of_submodel(run / "student.pt", [scene["rgb"] / 255, scene["depth"] / 255])
    assert (np.asarray(Image.open(tmp_path / "val_000001_label.png")) != expected).mean() < 1e-3


def test_the_panel_of_a_run_shows_scenes_by_row_and_both_models(run, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(pictures, "draw", lambda *args: drawn.update(args=args) or Image.new("RGB", (1, 1)))
    call(run, "--data", "synthetic", "--count", 3, "--panel", tmp_path / "panel.png")
    grid, titles, groups, sides, key, _ = drawn["args"]
    views = ["all sensors", "rgb missing", "rgb and depth missing"]
    assert titles == [*SENSORS, "ground truth", *views, *views] and sides == ["cloud", "fog", "night"]
    assert sum(count for _, count in groups) == len(titles) == len(grid[0])
    scene = synthetic.paint(0, "val", 2, 64)
    assert (np.asarray(grid[2][4].image) == np.array(PALETTE, np.uint8)[scene["label"]]).all()
    shown = {tuple(colour) for row in grid for cell in row[4:] for _, colour in cell.image.getcolors(256)}
    assert {colour for _, colour in key} == shown and len(shown) <= len(CLASSES)
    ids = answer_of_submodel(run / "teacher.pt", [scene[sensor] / 255 for sensor in SENSORS])
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


def test_the_key_names_only_classes_that_occur():
    maps = [np.array([[3, 3]], np.uint8), np.array([[1, 255]], np.uint8)]
    key = pictures.legend(maps, CLASSES, PALETTE)
    assert key == [(CLASSES[1], tuple(PALETTE[1])), (CLASSES[3], tuple(PALETTE[3])), ("ignored", (0, 0, 0))]


def test_the_exported_program_takes_any_batch_and_agrees_with_the_mask(run, tmp_path):
    file = tmp_path / "student.pt2"
    call(run / "student.pt", "--export", file, "--sensors", "event,rgb", "--size", "32x64")
    extra = {"about.json": ""}
    program = torch.export.load(file, extra_files=extra).module()
    assert json.loads(extra["about.json"])["sensors"] == ["rgb", "event"]
    model, _ = predict.load_model(run / "student.pt", torch.device("cpu"))
    images = torch.randn(5, 4, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    present = torch.tensor([True, False, True, False]).expand(5, 4)
    with torch.inference_mode():
        expected = model(images, present).logits
        assert torch.allclose(program(images[:, [0, 2]]), expected, atol=1e-4 * expected.abs().max())


@pytest.mark.parametrize("backbone", ["segformer_tiny", "cmnext_tiny"])
def test_what_a_model_knows_of_its_sensors_is_in_the_weights_of_its_program(backbone):
    torch.manual_seed(4)
    model = build_model(backbone, 5, SENSORS, 0.0, 0.0)
    condition_on_sensors(model)
    for learned in (model.decoder.film, getattr(model, "fusion_logits", None)):
        if learned is not None:
            torch.nn.init.normal_(learned, 0.0, 0.5)
    spread_logits(model)
    images = torch.randn(2, 4, 3, 64, 32)
    for sensors in ([0, 2], [0, 1, 2, 3]):
        with torch.inference_mode():
            expected = model(images, torch.tensor([m in sensors for m in range(4)]).expand(2, 4)).logits
            program = predict.Logits(model, [SENSORS[m] for m in sensors]).eval()
            assert torch.allclose(program(images[:, sensors]), expected, atol=1e-4 * expected.abs().max())
    names = set(dict(program.named_parameters()))
    assert "model.decoder.film" not in names and ("model.fusion_logits" in names) == (backbone == "segformer_tiny")


def test_a_cmnext_for_some_sensors_is_the_masked_model():
    torch.manual_seed(3)
    model = spread_logits(build_model("cmnext_tiny", 5, SENSORS, 0.0, 0.0))
    for name, parameter in model.named_parameters():  # norms of their own, so that the wrong sensor's would show
        if "embed.weight" in name or "embed.bias" in name:
            torch.nn.init.normal_(parameter, 1.0)
    images = torch.randn(2, 4, 3, 64, 32)
    with torch.inference_mode():
        expected = model(images, torch.tensor([True, False, False, True]).expand(2, 4)).logits
        assert torch.allclose(predict.Logits(model, ["rgb", "lidar"]).eval()(images[:, [0, 3]]), expected, atol=1e-4)
    with pytest.raises(ValueError, match="needs rgb and at least one more sensor"):
        predict.Logits(model, ["depth", "lidar"])
