"""The trained models of docs/models are what their numbers say, and `make look` can draw from them."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import predict
from benchmarks import small_models
from engine.checkpoint import load_model, read, write

FOLDER = Path(__file__).parents[1] / "docs" / "models"


def test_the_models_reach_the_numbers_beside_them():
    stored = json.loads((FOLDER / "numbers.json").read_text())["miou"]
    found = small_models.measure(FOLDER)["miou"]
    assert sorted(stored) == sorted(found) == sorted(small_models.MODELS) and len(stored["student"]) == 15
    for name in small_models.MODELS:
        assert found[name] == pytest.approx(stored[name], abs=0.3)


def test_each_model_is_below_one_megabyte_and_loads_in_float32():
    for name in small_models.MODELS:
        assert (FOLDER / f"{name}.pt").stat().st_size < 2**20
        model, _ = load_model(FOLDER / f"{name}.pt", torch.device("cpu"))
        assert {x.dtype for x in model.state_dict().values()} == {torch.float32, torch.int64}


def test_the_panel_is_drawn_from_them(tmp_path):
    predict.main(predict.options([str(FOLDER), "--count", "1", "--panel", str(tmp_path / "panel.png")]))
    assert Image.open(tmp_path / "panel.png").width > 1000


def test_weights_are_kept_in_half_precision(tmp_path, monkeypatch):
    monkeypatch.setattr(small_models, "measure", lambda folder: {"file": "written by RMMSS"})
    state = read(FOLDER / "student.pt")
    state["model"] = {key: x + 1e-5 if x.is_floating_point() else x for key, x in state["model"].items()}
    for name in small_models.MODELS:
        write(tmp_path / f"{name}.pt", state)
    small_models.main([str(tmp_path), "--out", str(tmp_path / "kept")])
    kept, _ = load_model(tmp_path / "kept" / "teacher.pt", torch.device("cpu"))
    for key, x in kept.state_dict().items():
        assert torch.equal(x, state["model"][key].to(torch.float16 if x.is_floating_point() else x.dtype)), key
