"""What the figures show is what was measured."""

import itertools
import json
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from models import sources_in

from benchmarks import figures
from data import normalise, open_dataset
from engine.checkpoint import load_model, save_model
from engine.runs import guarded
from engine.subsets import all_subsets
from fsm import FSM

pytestmark = pytest.mark.usefixtures("inside")


@pytest.fixture
def drawn(monkeypatch):
    """A function that gives the series of every chart that was drawn."""
    chart = Mock(wraps=figures.chart)
    monkeypatch.setattr(figures, "chart", chart)
    return lambda: [call.args[3] for call in chart.call_args_list]


def test_a_chart_draws_a_higher_value_higher():
    heights = []
    for value in (41.0, 59.0):
        series = {"a": {0: 50.0, 1: value, 2: 40.0}, "b": {0: 60.0, 2: 60.0}}
        image = figures.chart("t", "x", {0: "0", 2: "2"}, series, {"a": (200, 0, 0), "b": (0, 0, 200)})
        red = np.abs(np.asarray(image).astype(int) - (200, 0, 0)).sum(2) < 30  # (H, W)
        heights.append(np.nonzero(red[:700, 700:900])[0].min())  # around x = 1, without the legend
    assert heights[1] < heights[0] - 100


def test_lost_shows_the_mean_over_the_subsets_of_each_size(drawn):
    scores = {"".join("RDE"[m] for m in s): {"miou_published": 10.0 * len(s) + (s == (0,))} for s in all_subsets(3)}
    results = {"student": {"any": scores}, "switch": {"any": scores}}
    Path("numbers.json").write_text(json.dumps({"rule": "published", "results": results}))
    figures.lost(Path("numbers.json"))
    (series,) = drawn()
    assert series == {"student": {0: 30.0, 1: 20.0, 2: pytest.approx(10 + 1 / 3)}}


def test_curves_put_the_phases_of_a_run_one_after_the_other(drawn):
    lines = [
        {"phase": "teacher", "step": 50, "epoch": 1.0, "ce": 2.0, "lr": 0.1, "data_wait": 9.0},
        {"phase": "teacher", "step": 80, "epoch": 1.6, "miou": 40.0},
        {"phase": "robust", "step": 50, "epoch": 1.0, "ce": 1.0, "kl": 0.5, "lr": 0.1, "data_wait": 9.0},
        {"phase": "robust", "step": 60, "epoch": 1.2, "miou": 31.0, "miou_full": 45.0, "miou_missing": 30.0},
    ]
    Path("log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    figures.curves(Path("log.jsonl"))
    loss, miou = drawn()
    assert loss == {"teacher": {50: 2.0}, "robust": {130: 1.5}}
    assert miou == {"teacher, all": {80: 40.0}, "robust, all": {140: 45.0}, "robust, some missing": {140: 30.0}}


def scattered(labels, scores, panels=1):
    """The picture of a scatter of this many files of these rows."""
    Path("rows.json").write_text(json.dumps({"title": "t", "labels": labels, "scores": scores}))
    return np.asarray(figures.scatter(*[Path("rows.json")] * panels)).astype(int)


@pytest.mark.parametrize("full, missing", [([40.0, 40.0], [36.0, 38.0]), ([40.0, 50.0], [36.0, 36.0])])
def test_a_scatter_puts_a_row_at_its_means_and_its_cross_over_its_seeds(full, missing):
    seeds = {str(i): {"full": x, "missing": y} for i, (x, y) in enumerate(zip(full, missing, strict=True))}
    far, below = ({"0": {"full": 60.0, "missing": y}} for y in (40.0, 20.0))  # the axes: 40..60 and 36..40
    labels = {"a": "one", "b": "two", "c": "none yet", "d": "three", "e": "below"}
    picture = scattered(labels, {"c": {}, "a": seeds, "b": far, "d": far, "e": below})
    y, x = np.nonzero(np.abs(picture - figures.COLOURS["teacher"]).sum(2) < 30)  # of points and crosses
    y, x = y[x < 1300], x[x < 1300]  # without `far`
    across, down = [150 + (v - 40) / 20 * 1320 for v in full], [970 - (v - 36) / 4 * 790 for v in missing]
    for found, values in ((x, across), (y, down)):
        centre = sum(values) / 2
        assert abs(found.max() - max(*values, centre + 10)) < 4 and abs(found.min() - min(*values, centre - 10)) < 4


def test_a_scatter_has_a_panel_for_each_file_and_labels_that_do_not_cover_each_other(monkeypatch):
    rng, boxes, draw = np.random.default_rng(0), [], figures.ImageDraw.ImageDraw.text
    labels = {str(i): f"row number {i}" for i in range(12)}
    scores = {i: {"0": {"full": x, "missing": y}} for i, (x, y) in zip(labels, rng.normal(40, 2, (12, 2)), strict=True)}

    def text(pen, place, words, colour, font, anchor):
        if words in labels.values():
            boxes.append(pen.textbbox(place, words, font, anchor))
        return draw(pen, place, words, colour, font, anchor)

    monkeypatch.setattr(figures.ImageDraw.ImageDraw, "text", text)
    assert scattered(labels, scores, panels=2).shape[1] == 2 * 1520 and len(boxes) == 24
    left, top, right, bottom = np.transpose(boxes[:12])
    assert left.min() >= 0 and right.max() <= 1520 and top.min() >= 0 and bottom.max() <= 1120
    beside, above = right[:, None] <= left, bottom[:, None] <= top  # (12, 12): one label and another
    assert (beside | beside.T | above | above.T | np.eye(12, dtype=bool)).all()


@torch.inference_mode()
def test_prototypes_are_means_over_pixels_compared_by_their_cosine(drawn, untrained):
    figures.prototypes(untrained)
    by_stage, by_pair = drawn()
    model, meta = load_model(untrained / "teacher.pt", torch.device("cpu"))
    rgb, lidar = ({k: [] for k in range(12)} for _ in range(2))  # class -> its pixels' features at stage 4
    for image, label, _ in open_dataset("synthetic", None, "val", meta["modalities"], 64, limit=64):
        stage4 = model(normalise(image[None], *meta["normalisation"])).per_modality[3][0]  # (M, C, 2, 2)
        for y, x in itertools.product(range(2), range(2)):
            if (k := int(label[32 * y, 32 * x])) < 12:  # nearest neighbour
                rgb[k].append(stage4[0, :, y, x])
                lidar[k].append(stage4[3, :, y, x])
    there = [k for k in rgb if rgb[k]]
    a, b = (torch.stack([torch.stack(features[k]).mean(0) for k in there]) for features in (rgb, lidar))  # (K', C)
    expected = torch.cosine_similarity(a - a.mean(0), b - b.mean(0), dim=1).mean()
    assert by_pair["teacher"][2] == pytest.approx(float(expected), abs=1e-3)  # rgb-lidar
    assert by_stage["student"][4] == pytest.approx(np.mean(list(by_pair["student"].values())))


def test_the_selection_of_a_fresh_fsm_is_the_switch(monkeypatch, untrained):
    for old, new in (("student", "robust"), ("teacher", "teacher")):
        model, meta = load_model(untrained / f"{old}.pt", torch.device("cpu"))
        save_model(Path(f"{new}.pt"), model, meta)
    torch.manual_seed(0)
    about = {"rule": "score", "temperature": 0.2, "conditioned": True}
    meta |= {**about, "widths": list(model.widths), "sources": sources_in(Path())}
    save_model(Path("fsm.pt"), FSM(model.widths, 12, 4, **about), meta)
    draw = Mock(wraps=figures.draw)
    monkeypatch.setattr(figures, "draw", draw)
    figures.selection(Path())
    shown = draw.call_args.args[0]
    complete, incomplete, *hard = ([int(cell.caption.split()[0]) for cell in row[1:]] for row in shown)
    assert min(complete[:4]) > 90 and max(incomplete[:4]) < 10 and len(hard) == 2
    assert complete[4] > 50 > incomplete[4]  # logits are larger, so fresh weights move their scores more
    assert all(0 < share < 100 for row in hard for share in row)


@pytest.mark.parametrize("content", ["{}", "[1, 2]", "17", "", "\x89PNG", '{"scores": {"a": 1}, "labels": {"a": 2}}'])
@pytest.mark.parametrize("figure", ["scatter", "lost", "curves", "selection", "prototypes"])
def test_a_source_that_is_not_ours_is_named_in_a_sentence(figure, content, capsys):
    Path("wrong.json").write_text(content, "latin-1")
    assert guarded(figures.main, [figure, "wrong.json", "--out", "a.png"]) == 2
    said = capsys.readouterr().err
    assert f"{figure} cannot be drawn from wrong.json" in said and "Traceback" not in said
    assert not Path("a.png").exists()


def test_a_run_without_its_second_stage_has_no_selection_to_draw(untrained):
    with pytest.raises(ValueError, match="give a run that has finished both stages"):
        figures.main(["selection", str(untrained), "--out", "a.png"])


def test_a_figure_replaces_no_foreign_file():
    Path("a.png").write_bytes(b"somebody's own")
    with pytest.raises(ValueError, match="a.png exists and is not marked as written by RMMSS"):
        figures.main(["lost", "numbers.json", "--out", "a.png"])
    assert Path("a.png").read_bytes() == b"somebody's own"
