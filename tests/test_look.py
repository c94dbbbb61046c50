"""The trained models of docs/models are what their numbers say, and `make look` can draw from them."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import evaluate
import predict
from engine.checkpoint import load_model

FOLDER = Path(__file__).parents[1] / "docs" / "models"
MODELS = ("teacher", "student")


def numbers(table: Path) -> list[list[str]]:
    """The rows of a table of evaluate.py that hold numbers; a difference in brackets is a number too."""
    rows = [re.findall(r"[^\s|()]+", line) for line in table.read_text().splitlines() if line.startswith("| ")]
    return [row for row in rows if row[0] in MODELS]


def test_the_models_reach_the_numbers_beside_them(inside):
    files = [str(FOLDER / f"{name}.pt") for name in MODELS]
    evaluate.main(evaluate.options([*files, "--limit", "60", "--markdown", "found.md"]))
    stored, found = numbers(FOLDER / "numbers.md"), numbers(Path("found.md"))
    assert [row[0] for row in stored] == [row[0] for row in found] == list(MODELS) and len(stored[0]) == 1 + 15 + 4
    for row, expected in zip(found, stored, strict=True):
        assert [float(x) for x in row[1:]] == pytest.approx([float(x) for x in expected[1:]], abs=0.3)


@pytest.mark.parametrize("name", MODELS)
def test_each_model_is_below_one_megabyte_and_loads_in_float32(name):
    assert (FOLDER / f"{name}.pt").stat().st_size < 2**20
    model, _ = load_model(FOLDER / f"{name}.pt", torch.device("cpu"))
    assert {x.dtype for x in model.state_dict().values()} == {torch.float32, torch.int64}


def test_the_panel_is_drawn_from_them(inside):
    predict.main(predict.options([str(FOLDER), "--count", "1", "--panel", "panel.png"]))
    assert Image.open("panel.png").width > 1000
