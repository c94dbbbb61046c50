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
from engine.subsets import all_subsets
from fsm import FSM

DOCS = Path(__file__).parents[1] / "docs"
MODELS = DOCS / "models"


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
        series = {"a": [(0, [50.0]), (1, [value]), (2, [40.0])], "b": [(0, [60.0]), (2, [60.0])]}
        image = figures.chart("t", "x", {0: "0", 2: "2"}, series, {"a": (200, 0, 0), "b": (0, 0, 200)})
        red = np.abs(np.asarray(image).astype(int) - (200, 0, 0)).sum(2) < 30  # (H, W)
        heights.append(np.nonzero(red[:700, 700:900])[0].min())  # around x = 1, without the legend
    assert heights[1] < heights[0] - 100


def test_lost_shows_the_mean_over_the_subsets_of_each_size(tmp_path, drawn):
    scores = {str(s): {"miou_published": 10.0 * len(s) + (s == (0,))} for s in all_subsets(3)}
    figures.lost(written(tmp_path, {"results": {"student": {"any": scores}, "switch": {"any": scores}}}))
    (series,) = drawn.values()
    assert series == {"student": [(0, [30.0]), (1, [20.0]), (2, [pytest.approx(10 + 1 / 3)])]}


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
    assert loss == {"teacher": [(50, [2.0])], "robust": [(130, [1.5])]}
    assert miou == {
        "teacher, all": [(80, [40.0])],
        "robust, all": [(140, [45.0])],
        "robust, some missing": [(140, [30.0])],
    }


def test_the_sweep_shows_the_seeds_that_all_finished_rows_have(tmp_path, drawn):
    two, third = [{"full": 50.0, "missing": 30.0}, {"full": 52.0, "missing": 31.0}], {"full": 9.0, "missing": 9.0}
    scores = {
        "kl": {"0": two[0], "1": two[1], "2": third},
        "hpdm": {},
        "feedback": {"2": third},
        "random_1": {"1": {"full": 53.0, "missing": 32.0}, "0": {"full": 54.0, "missing": 33.0}},
    }
    figures.sweep(written(tmp_path, {"values": {"alpha": 20.8}, "scores": scores}))
    full, missing = drawn.values()
    assert full["random matching (the paper's)"] == [(0, [50.0, 52.0]), (2, [54.0, 53.0])]
    assert missing["same-modality matching"] == [(0, [30.0, 31.0])]


@torch.inference_mode()
def test_prototypes_are_means_over_pixels_compared_by_their_cosine(drawn):
    figures.prototypes(MODELS)
    by_stage, by_pair = drawn.values()
    model, meta = load_model(MODELS / "teacher.pt", torch.device("cpu"))
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
    assert by_pair["teacher"][2][1] == [pytest.approx(float(expected), abs=1e-3)]  # rgb-lidar
    mean = np.mean([value for _, (value,) in by_pair["student"]])
    assert by_stage["student"][3] == (4, [pytest.approx(mean)])


def test_the_selection_of_a_fresh_fsm_is_the_switch(tmp_path, monkeypatch):
    shutil.copy(MODELS / "teacher.pt", tmp_path / "teacher.pt")
    shutil.copy(MODELS / "student.pt", tmp_path / "robust.pt")
    model, meta = load_model(MODELS / "teacher.pt", torch.device("cpu"))
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


def test_the_pipeline_of_the_docs_lies_inside_the_picture(tmp_path):
    figures.main(["pipeline", str(DOCS / "pipeline.txt"), "--out", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").stat().st_size < 250_000
    edge = np.asarray(figures.pipeline(DOCS / "pipeline.txt"))[[0, -1]]
    assert (edge == 255).all()


def test_the_pipeline_draws_a_box_in_its_place_and_an_arrow_to_it(tmp_path):
    (tmp_path / "table.txt").write_text(
        "box | left | right | middle | colour | arrows from | title\n"
        "a | 100 | 500 | 400 | loss |  | first\n"
        "b | 1100 | 1500 | 400 | frozen | a | second | line\n"
    )
    image = figures.pipeline(tmp_path / "table.txt")  # at half the size
    assert image.getpixel((60, 200)) == figures.FILLS["loss"] and image.getpixel((560, 200)) == figures.FILLS["frozen"]
    row = np.asarray(image)[200, 255:545].sum(1)  # between the boxes
    assert (row == sum(figures.INK)).all()


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["sweep", "wrong.json"], "the file does not hold these numbers"),
        (["lost", "wrong.json"], "the file does not hold these numbers"),
        (["selection", str(MODELS)], "give a run that has finished both stages"),
        (["pipeline", "wrong.json"], "not marked as written by RMMSS"),
    ],
)
def test_a_figure_that_cannot_be_drawn_says_why(argv, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.json").write_text("{}")
    if argv[0] == "pipeline":
        (tmp_path / "a.png").write_bytes(b"somebody's own")
    with pytest.raises(ValueError, match=sentence):
        figures.main([*argv, "--out", "a.png"])


def test_a_source_that_is_not_given_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        figures.main(["sweep", "--out", "a.png"])
    assert "source" in capsys.readouterr().err
