"""Trained models as evaluate.py and predict.py take them: what a path holds, and the frames that they are shown."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from data import Frame, FrameDataset, normalise, open_dataset
from datasets.files import SUFFIXES, read_image
from engine import pictures
from engine.checkpoint import SAME, load_model, read, require
from engine.loop import PHASES
from engine.options import ROOTS
from engine.subsets import load_fsm
from fsm import FSM


def load_models(
    path: Path, device: torch.device, same: Sequence[str] = SAME
) -> tuple[dict[str, nn.Module], FSM | None, dict]:
    """A model file, or all of a run folder in the order of training -> ({stem: model}, feature selection, first meta).

    Raises FileNotFoundError or ValueError with one sentence, also if the models differ in an entry `same` of meta.
    """
    files = [path] if not path.is_dir() else [file for p in PHASES if (file := path / f"{p}.pt").exists()]
    if not files:
        raise FileNotFoundError(f"{path} holds no teacher.pt, robust.pt, fsm.pt or student.pt.")
    models, selection, first, expect = {}, None, None, {}
    for file in files:
        if "rule" in read(file)["meta"]:
            selection = load_fsm(file, device, expect)
        else:
            model, meta = load_model(file, device, {name: first[name] for name in same} if first else {})
            models[file.stem], first = model, first or meta
            expect = {name: meta[name] for name in ("backbone", *SAME)} | {"widths": list(model.widths)}
    if not models:
        raise ValueError(f"{path}: an FSM selects between a teacher and a robust model; give their run folder.")
    return models, selection, first


def open_data(meta: dict, data: str | None, root: str | None, split: str, size, say=print, **options) -> FrameDataset:
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
    say(dataset.describe() + (f"; in {Path(root).resolve()}" if root else ""))  # a root may be relative
    require("the model", meta, {"classes": list(dataset.classes)})
    dataset.normalisation = normalisation_of(dataset.modalities, meta)  # the model's, should the data set's differ
    return dataset


def normalisation_of(names: list[str], meta: dict) -> list[list]:
    """Mean and deviation of these modalities, as the model was trained with."""
    return [[numbers[meta["modalities"].index(name)] for name in names] for numbers in meta["normalisation"]]


def titles(data: str, modalities: list[str]) -> list[str]:
    """The modalities' names for people: of nyuv2, event and lidar are computed from the others, and called derived."""
    return [f"{name} (derived)" if data == "nyuv2" and name in ("event", "lidar") else name for name in modalities]


def samples(datasets: Iterable[FrameDataset], meta: dict, depth_unit: float) -> Iterator[tuple]:
    """Each frame as a model with this meta sees it, resized as in validation, and as it is for the eye.

    -> (the Frame, images (M, 3, h, w) normalised with zeros where absent, {modality: picture at the frame's own size},
    label (H, W) uint8 at the same size, 255 where there is none). depth_unit: see `given_depth`.
    """
    known = meta["modalities"]
    for dataset in datasets:
        dataset.read = functools.lru_cache(1)(dataset.read)  # for the eye and for the model: decoded once
        for index, frame in enumerate(dataset.frames):
            (decoded, label), names = dataset.read(index), dataset.modalities
            if dataset.split == "input" and dataset.name == "nyuv2" and "depth" in names:
                m = names.index("depth")  # changed in the list that is kept, so for both
                decoded[m] = given_depth(frame.images[m], decoded[m], meta["depth"], depth_unit)
            found = normalise(dataset[index][0], *normalisation_of(names, meta))  # (its modalities, 3, h, w)
            images = found.new_zeros(len(known), *found.shape[1:])
            images[[known.index(name) for name in names]] = found
            yield frame, images, dict(zip(names, map(pictures.photograph, decoded), strict=True)), label


def input_frames(given: dict[str, Path], meta: dict, size: int | tuple[int, int]) -> Iterator[FrameDataset]:
    """The frames of --input, each in a data set of its own, so that it is decoded as in training. In folders, files of
    one stem are a frame, which may lack some modalities."""
    frames: dict[str, dict[str, Path]] = {}
    first = next(iter(given.values())).stem
    for modality, path in given.items():
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            name = file.stem if path.is_dir() else first
            if file.suffix.lower() in SUFFIXES and frames.setdefault(name, {}).setdefault(modality, file) != file:
                raise ValueError(f"{file} and {frames[name][modality]} are of the same frame; remove one of them.")
        if not any(modality in files for files in frames.values()):
            raise ValueError(f"--input {modality}={path} holds no file that ends in {', '.join(SUFFIXES)}.")
    if len(given) > 1 and max(map(len, frames.values())) == 1:
        raise ValueError(
            f"--input: {' and '.join(map(str, given.values()))} have no {', '.join(SUFFIXES)} file with a "
            "stem in common; name a frame's files alike, and give files or folders for all modalities."
        )
    decoding = "folder" if meta["data"] == "synthetic" else meta["data"]  # scenes have no files: 8 bit pictures do
    for name, files in sorted(frames.items()):
        frame, classes = Frame(name, "none", "none", tuple(files.values())), (meta["classes"], meta["palette"])
        dataset = FrameDataset(decoding, [frame], *classes, list(files), size, False, 0, None, "input")
        any_kind = ["depth"] if (decoding, meta["depth"]) == ("nyuv2", "raw") else []  # see `given_depth`
        dataset.ranges = {m: kept for m, kept in meta.get("ranges", {}).items() if m not in any_kind}
        yield dataset


def given_depth(file: Path, image: np.ndarray, kind: str, unit: float) -> np.ndarray:
    """Depth of --input for a model of nyuv2: HHA (H, W, 3) as read, or raw depth (H, W, 1) as metres / 10 in 0..1.

    kind: "hha" or "raw", what the model was trained on; unit: metres of a step of 16 bit. Says in which it is read.
    """
    found, expected = image.shape[2], {"hha": 3, "raw": 1}[kind]
    if found != expected:
        raise ValueError(f"{file} has {found} channel(s), but the model was trained on {kind} depth, of {expected}.")
    if kind == "hha":
        return image
    stored = read_image(file)
    unit = {"uint8": 10 / 255, "uint16": unit}.get(stored.dtype.name, 1.0)  # floats are metres
    metres = stored * np.float32(unit)
    middle = float(np.median(metres[metres > 0])) if (metres > 0).any() else 0.0
    if middle > 10:
        raise ValueError(
            f"{file}: in steps of {unit:g} m, half of it is beyond {middle:.0f} m, and the model knows up "
            "to 10 m; of 16 bit, give the file's own --depth-unit, e.g. 0.0001."
        )
    print(f"{file}: depth read in steps of {unit:g} m, its median is {middle:.1f} m")
    return np.minimum(metres / 10, 1)
