"""What the figures show is what was measured."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import figures
from data import normalise, open_dataset
from engine.checkpoint import load_model, save_model
from engine.runs import guarded
from engine.subsets import all_subsets
from fsm import FSM
from model import build_model

MODALITIES = ["rgb", "depth", "event", "lidar"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with teacher.pt and student.pt of random weights, for the scenes."""
    folder, dataset = tmp_path_factory.mktemp("run"), open_dataset("synthetic", split="val", limit=1)
    meta = {"backbone": "segformer_tiny", "modalities": MODALITIES, "classes": dataset.classes, "palette": []}
    meta |= {"data": "synthetic", "root": None, "depth": "hha", "label_map": None, "hold_out": 0, "absent": "skip"}
    meta |= {"size": 64, "val_size": 64, "normalisation": dataset.normalisation, "options": {}}
    for seed, name in enumerate(("teacher", "student")):
        torch.manual_seed(seed)
        model = build_model("segformer_tiny", len(dataset.classes), MODALITIES)
        for parameter in model.parameters():  # as after a training, features tell places apart
            parameter.data.mul_(1 + (parameter.ndim > 1))
        save_model(folder / f"{name}.pt", model, meta)
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The series of every chart that is drawn, by its title."""
    found, chart = {}, figures.chart

    def keep(title, x_label, ticks, series, *colours):
        found[title] = series
        return chart(title, x_label, ticks, series, *colours)

    monkeypatch.setattr(figures, "chart", keep)
    return found


def written(tmp_path: Path, content: dict) -> Path:
    (tmp_path / "numbers.json").write_text(json.dumps(content))
    return tmp_path / "numbers.json"


def test_a_chart_draws_a_higher_value_higher():
    heights = []
    for value in (41.0, 59.0):
        series = {"a": {0: 50.0, 1: value, 2: 40.0}, "b": {0: 60.0, 2: 60.0}}
        image = figures.chart("t", "x", {0: "0", 2: "2"}, series, {"a": (200, 0, 0), "b": (0, 0, 200)})
        red = np.abs(np.asarray(image).astype(int) - (200, 0, 0)).sum(2) < 30  # (H, W)
        heights.append(np.nonzero(red[:700, 700:900])[0].min())  # around x = 1, without the legend
    assert heights[1] < heights[0] - 100


def test_lost_shows_the_mean_over_the_subsets_of_each_size(tmp_path, drawn):
    scores = {str(s): {"miou_published": 10.0 * len(s) + (s == (0,))} for s in all_subsets(3)}
    figures.lost(written(tmp_path, {"results": {"student": {"any": scores}, "switch": {"any": scores}}}))
    (series,) = drawn.values()
    assert series == {"student": {0: 30.0, 1: 20.0, 2: pytest.approx(10 + 1 / 3)}}


def test_curves_put_the_phases_of_a_run_one_after_the_other(tmp_path, drawn):
    lines = [
        {"phase": "teacher", "step": 50, "epoch": 1.0, "ce": 2.0, "lr": 0.1, "data_wait": 9.0},
        {"phase": "teacher", "step": 80, "epoch": 1.6, "miou": 40.0},
        {"phase": "robust", "step": 50, "epoch": 1.0, "ce": 1.0, "kl": 0.5, "lr": 0.1, "data_wait": 9.0},
        {"phase": "robust", "step": 60, "epoch": 1.2, "miou": 31.0, "miou_full": 45.0, "miou_missing": 30.0},
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    figures.curves(tmp_path / "log.jsonl")
    loss, miou = drawn.values()
    assert loss == {"teacher": {50: 2.0}, "robust": {130: 1.5}}
    assert miou == {"teacher, all": {80: 40.0}, "robust, all": {140: 45.0}, "robust, some missing": {140: 30.0}}


def scattered(tmp_path, *contents):
    """The numbers and the picture of a scatter of these files."""
    files = []
    for i, content in enumerate(contents):
        files.append(tmp_path / f"{i}.json")
        files[-1].write_text(json.dumps(content))
    return np.asarray(figures.scatter(*files)).astype(int)


def blue(picture):
    """Rows and columns of the pixels of points and crosses, without the frame around the plot."""
    return np.nonzero(np.abs(picture - figures.COLOURS["teacher"]).sum(2) < 30)


def test_a_scatter_puts_a_row_at_its_means_and_its_cross_over_its_seeds(tmp_path):
    def rows(**scores):
        return {"title": "t", "labels": {"a": "one", "b": "two", "c": "none yet"}, "scores": {"c": {}, **scores}}

    far = {"0": {"full": 60.0, "missing": 40.0}}  # keeps the axes: 40..60 and 20..40
    for full, missing in ([40.0, 40.0], [20.0, 30.0]), ([40.0, 50.0], [20.0, 20.0]):
        seeds = {str(i): {"full": x, "missing": y} for i, (x, y) in enumerate(zip(full, missing, strict=True))}
        y, x = blue(scattered(tmp_path, rows(a=seeds, b=far)))
        y, x = y[x < 1300], x[x < 1300]  # without `far`
        expected = [150 + (v - 40) / 20 * 1320 for v in full], [970 - (v - 20) / 20 * 830 for v in missing]
        for found, values in ((x, expected[0]), (y, expected[1])):
            reach = max(values[-1], values[0]), min(values[-1], values[0])
            centre = sum(values) / 2
            assert (
                abs(found.max() - max(reach[0], centre + 10)) < 4 and abs(found.min() - min(reach[1], centre - 10)) < 4
            )


def test_a_scatter_has_a_panel_for_each_file_and_labels_that_do_not_cover_each_other(tmp_path, monkeypatch):
    rng, boxes, draw = np.random.default_rng(0), [], figures.ImageDraw.ImageDraw.text
    labels = {str(i): f"row number {i}" for i in range(12)}
    scores = {name: {"0": dict(zip(("full", "missing"), rng.normal(40, 2, 2), strict=True))} for name in labels}

    def text(pen, place, words, colour, font, anchor):
        if words in labels.values():
            boxes.append(pen.textbbox(place, words, font, anchor))
        return draw(pen, place, words, colour, font, anchor)

    monkeypatch.setattr(figures.ImageDraw.ImageDraw, "text", text)
    picture = scattered(tmp_path, *[{"title": "t", "labels": labels, "scores": scores}] * 2)
    assert picture.shape[1] == 2 * 1520 and len(boxes) == 24
    for i, one in enumerate(boxes[:12]):
        assert 0 <= one[0] and one[2] <= 1520 and 0 <= one[1] and one[3] <= 1120
        for other in boxes[i + 1 : 12]:
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1], (one, other)


@torch.inference_mode()
def test_prototypes_are_means_over_pixels_compared_by_their_cosine(drawn, run):
    figures.prototypes(run)
    by_stage, by_pair = drawn.values()
    model, meta = load_model(run / "teacher.pt", torch.device("cpu"))
    rgb, lidar = ({k: [] for k in range(12)} for _ in range(2))  # class -> its pixels' features at stage 4
    for image, label, _ in open_dataset("synthetic", None, "val", meta["modalities"], 64, limit=64):
        stage4 = model(normalise(image[None], *meta["normalisation"])).per_modality[3][0]  # (M, C, 2, 2)
        for y in range(2):
            for x in range(2):
                if (k := int(label[32 * y, 32 * x])) < 12:  # nearest neighbour
                    rgb[k].append(stage4[0, :, y, x])
                    lidar[k].append(stage4[3, :, y, x])
    there = [k for k in rgb if rgb[k]]
    a, b = (torch.stack([torch.stack(features[k]).mean(0) for k in there]) for features in (rgb, lidar))  # (K', C)
    expected = torch.cosine_similarity(a - a.mean(0), b - b.mean(0), dim=1).mean()
    assert by_pair["teacher"][2] == pytest.approx(float(expected), abs=1e-3)  # rgb-lidar
    assert by_stage["student"][4] == pytest.approx(np.mean(list(by_pair["student"].values())))


def test_the_selection_of_a_fresh_fsm_is_the_switch(tmp_path, monkeypatch, run):
    shutil.copy(run / "teacher.pt", tmp_path / "teacher.pt")
    shutil.copy(run / "student.pt", tmp_path / "robust.pt")
    model, meta = load_model(run / "teacher.pt", torch.device("cpu"))
    torch.manual_seed(0)
    about = {"rule": "score", "temperature": 0.2, "conditioned": True}
    save_model(tmp_path / "fsm.pt", FSM(model.widths, 12, 4, **about), {**meta, **about, "widths": list(model.widths)})
    shown = []
    draw = figures.draw
    monkeypatch.setattr(figures, "draw", lambda grid, *rest: shown.extend(grid) or draw(grid, *rest))
    figures.selection(tmp_path)
    complete, incomplete, *hard = ([int(cell.caption.split()[0]) for cell in row[1:]] for row in shown)
    assert min(complete[:4]) > 90 and max(incomplete[:4]) < 10 and len(hard) == 2
    assert complete[4] > 50 > incomplete[4]  # logits are larger, so fresh weights move their scores more
    assert all(0 < share < 100 for row in hard for share in row)


@pytest.mark.parametrize(
    "content", [b"{}", b"[1, 2]", b"17", b"", b"\x89PNG", b'{"scores": {"a": 1}, "labels": {"a": 2}}']
)
@pytest.mark.parametrize("figure", ["scatter", "lost", "curves", "selection", "prototypes"])
def test_a_source_that_is_not_ours_is_named_in_a_sentence(figure, content, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.json").write_bytes(content)
    assert guarded(figures.main, [figure, "wrong.json", "--out", "a.png"]) == 2
    said = capsys.readouterr().err
    assert f"{figure} cannot be drawn from wrong.json" in said and "Traceback" not in said
    assert not (tmp_path / "a.png").exists()


def test_a_run_without_its_second_stage_has_no_selection_to_draw(tmp_path, run):
    with pytest.raises(ValueError, match="give a run that has finished both stages"):
        figures.main(["selection", str(run), "--out", str(tmp_path / "a.png")])


def test_a_figure_replaces_no_foreign_file(tmp_path):
    (tmp_path / "a.png").write_bytes(b"somebody's own")
    with pytest.raises(ValueError, match="a.png exists and is not marked as written by RMMSS"):
        figures.main(["lost", "numbers.json", "--out", str(tmp_path / "a.png")])


def test_only_a_scatter_takes_several_sources(capsys):
    with pytest.raises(SystemExit):
        figures.main(["lost", "a.json", "b.json", "--out", "a.png"])
    assert "b.json" in capsys.readouterr().err


def test_a_source_that_is_not_given_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        figures.main(["lost", "--out", "a.png"])
    assert "source" in capsys.readouterr().err
