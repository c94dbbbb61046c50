"""Trained models as evaluate.py and predict.py take them: what a path holds, and the frames it was trained on."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from data import FrameDataset, open_dataset
from engine.checkpoint import SAME, load_model, read, require
from engine.loop import PHASES
from engine.options import ROOTS
from engine.subsets import load_fsm
from fsm import FSM


def load_models(
    path: Path, device: torch.device, same: Sequence[str] = SAME, first: dict | None = None
) -> tuple[dict[str, nn.Module], FSM | None, dict | None]:
    """A model file, or all of a run folder in the order of training -> ({stem: model}, feature selection, first meta).

    same: entries of meta in which all models must agree with each other, and with `first` if it is given.
    Raises FileNotFoundError or ValueError with one sentence.
    """
    files = [path] if not path.is_dir() else [file for p in PHASES if (file := path / f"{p}.pt").exists()]
    if not files:
        raise FileNotFoundError(f"{path} holds no teacher.pt, robust.pt, fsm.pt or student.pt.")
    models, selection, sources = {}, None, {}
    for file in files:
        if "rule" in read(file)["meta"]:
            selection = load_fsm(file, device, sources)
        else:
            model, meta = load_model(file, device, first and {name: first.get(name) for name in same})
            models[file.stem], first = model, first or meta
            sources = {name: meta[name] for name in ("backbone", *SAME)} | {"widths": list(model.widths)}
    if not models:
        raise ValueError(f"{path}: an FSM selects between a teacher and a robust model; give their run folder.")
    return models, selection, first


def open_data(meta: dict, data: str | None, root: str | None, split: str, size, **options) -> FrameDataset:
    """The data set that a model was trained on, or `data` if that is given; options: further ones of `open_dataset`.

    Raises ValueError if its classes are not the model's.
    """
    data = data or meta["data"]
    if data == meta["data"]:
        root = root or meta["root"]
        options["label_map"] = options.get("label_map") or meta["label_map"]
    if data == "nyuv2":
        options.update(classes=len(meta["classes"]), hold_out=meta["hold_out"])
    options = {"modalities": meta["modalities"], "depth": meta["depth"], "ranges": meta.get("ranges"), **options}
    root = root or ROOTS.get(data)
    dataset = open_dataset(data, root, split, size=size, **options)
    print(dataset.describe() + (f"; in {Path(root).resolve()}" if root else ""))  # a root may be relative
    require("the model", meta, {"classes": list(dataset.classes)})
    dataset.normalisation = meta["normalisation"]  # the model's, should the data set's differ
    return dataset


def titles(data: str, modalities: list[str]) -> list[str]:
    """The modalities' names for people: of nyuv2, event and lidar are computed from the others, and called derived."""
    return [f"{name} (derived)" if data == "nyuv2" and name in ("event", "lidar") else name for name in modalities]


def caption(dataset: FrameDataset, split: str, meta: dict) -> str:
    """What a table shows: data set, split, frames and modalities."""
    held = " (held out of the train list)" if dataset.name == "nyuv2" and split == "val" and meta["hold_out"] else ""
    return f"{dataset.name} {split}{held}, {len(dataset)} frames, {', '.join(titles(dataset.name, dataset.modalities))}"
