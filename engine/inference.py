"""Trained models as evaluate.py and predict.py take them: what a path holds, and the frames that they are shown."""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from data import Frame, FrameDataset, open_dataset, say
from datasets.files import SUFFIXES, read_frame, read_image
from engine.checkpoint import SAME, checksum, load_last, load_model, read, require
from engine.loop import PHASES
from engine.options import ROOTS
from engine.output import ours
from engine.subsets import load_fsm
from fsm import FSM


def load_models(path: Path, device: torch.device, same=SAME) -> tuple[dict[str, nn.Module], FSM | None, dict]:
    """A model file, or all of a run folder in the order of training -> ({stem: model}, feature selection, first meta).
    Raises FileNotFoundError or ValueError; the latter also if the models' metas differ in an entry of `same`."""
    files = [path] if not path.is_dir() else [file for p in PHASES if (file := path / f"{p}.pt").exists()]
    if not files:
        raise FileNotFoundError(f"{path} holds no model: none of {'.pt, '.join(PHASES)}.pt.")
    with contextlib.suppress(ValueError, OSError):  # last.pt may be damaged, the models need not be
        if path.is_dir() and (last := load_last(path, warn=False)) and last["step"] < last["steps"]:
            say(f"note: {path} is not finished: step {last['step']} of {last['steps']} of phase {last['phase']}")
    models, metas, expect = {}, {}, {}
    selection = first = None
    for file in files:
        said, sums = read(file)["meta"], {name: checksum(meta) for name, meta in metas.items()}
        made_of = {"teacher": sums["teacher"]} if "teacher" in sums else {}
        made_of |= {"sources": [sums["teacher"], sums["robust"]]} if {"teacher", "robust"} <= sums.keys() else {}
        require(file, said, {name: made_of[name] for name in made_of.keys() & said.keys()})
        if "rule" in said:
            selection = load_fsm(file, device, expect)
        else:
            model, meta = load_model(file, device, {name: first[name] for name in same} if first else {})
            if path.is_dir() and meta.get("phase", file.stem) != file.stem:
                raise ValueError(f"{file} is a {meta['phase']}, not a {file.stem}: give it back its name.")
            models[file.stem], metas[file.stem] = model, meta
            first = first or meta
            expect = {name: meta[name] for name in ("backbone", *SAME)} | {"widths": list(model.widths)}
    if not models:
        raise ValueError(f"{path}: an FSM selects between a teacher and a robust model; give their run folder.")
    return models, selection, first


def open_data(meta: dict, data: str | None, root: str | None, split: str, size, say=say, **options) -> FrameDataset:
    """The data set that a model was trained on, or `data` if given, with the model's normalisation. options: further
    ones of `open_dataset`. Raises ValueError if its classes are not the model's."""
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
    places = [meta["modalities"].index(name) for name in dataset.modalities]
    dataset.normalisation = [[numbers[m] for m in places] for numbers in meta["normalisation"]]  # whatever its own are
    return dataset


def titles(data: str, modalities: list[str]) -> list[str]:
    """The modalities' names for display. Those of nyuv2 that are computed from others are called derived."""
    return [f"{name} (derived)" if data == "nyuv2" and name in ("event", "lidar") else name for name in modalities]


def samples(dataset: FrameDataset) -> Iterator[tuple]:
    """Each frame at its own size -> (Frame, {modality: (H, W, 1 or 3) uint8 or float32}, label (H, W) or all 255)."""
    for index, frame in enumerate(dataset.frames):
        images, label = dataset.read(index)
        yield frame, dict(zip(dataset.modalities, images, strict=True)), label


def stems(path: Path) -> dict[Path, Path]:
    """The image files of an --input -> their names in its folder, without ending. Pictures of ours are left out."""
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = [file for file in found if file.suffix.lower() in SUFFIXES and file.is_file() and file.name[0] != "."]
    if path.is_dir() and (own := [file for file in found if ours(file)]):
        say(f"left out: {len(own)} pictures in {path} that this program wrote, such as {own[0]}")
        found = [file for file in found if file not in set(own)]
    if not found:
        raise ValueError(f"--input {path} holds no file that ends in {', '.join(SUFFIXES)}.")
    return {file: file.relative_to(path if path.is_dir() else path.parent).with_suffix("") for file in found}


def what_differs(names: Iterable[Path]) -> list[str]:
    """Names without what they all begin and end with: color_0001, color_0002 -> 0001, 0002. Numbers stay whole."""
    texts = [name.name for name in names]
    number = r"\d+$" if len(texts) > 1 else r"\d.*"  # a lone file has nothing to differ from but in its number
    head = re.sub(number, "", os.path.commonprefix(texts))
    tails = [text[len(head) :][::-1] for text in texts]
    tail = re.sub(number, "", os.path.commonprefix(tails))
    return [str(name.parent / t[len(tail) :][::-1]) for name, t in zip(names, tails, strict=True)]


def input_frames(given: dict[str, Path], meta: dict, depth_unit: float) -> Iterator[tuple]:
    """The frames of --input, decoded as in training -> as `samples`. In folders and those inside, files of one name are
    a frame; if there are none, files whose names differ from the others of their folder by the same part. A frame may
    lack some modalities. depth_unit: metres of a step of 16 bit, see `given_depth`."""
    found = {modality: stems(path) for modality, path in given.items()}
    single = not any(path.is_dir() for path in given.values())  # one frame, whatever the names
    for keys in (lambda names: ["one"] * single or list(map(str, names)), what_differs):
        frames: dict[str, dict[str, Path]] = {}
        for modality, names in found.items():
            for file, key in zip(names, keys(names.values()), strict=True):
                if frames.setdefault(key, {}).setdefault(modality, file) != file:
                    raise ValueError(f"{file} and {frames[key][modality]} are of the same frame; remove one of them.")
        if paired := len(given) == 1 or max(map(len, frames.values())) > 1:
            break
    if not paired or set(frames) == {"."}:
        what = f"{' and '.join(map(str, given.values()))} have no {', '.join(SUFFIXES)} file with a name in common"
        hint = "alike (rgb/7.png, depth/7.png) or but for one word at one end (color_0007.png, depth_0007.png)"
        raise ValueError(f"--input: {what}; name a frame's files {hint}, and give files or folders for all modalities.")
    if keys is what_differs:
        pair = next(files for files in frames.values() if len(files) > 1)
        say(f"frames are paired by what differs in their names: {' with '.join(map(str, pair.values()))}")
    decoding = "folder" if meta["data"] == "synthetic" else meta["data"]  # scenes have no files: 8 bit pictures do
    any_kind = ["depth"] if (decoding, meta["depth"]) == ("nyuv2", "raw") else []  # see `given_depth`
    ranges = {m: kept for m, kept in meta.get("ranges", {}).items() if m not in any_kind}
    for _, files in sorted(frames.items()):
        modality, file = next(iter(files.items()))
        frame = Frame(found[modality][file].as_posix(), "none", "none", tuple(files.values()))
        decoded, label = read_frame(decoding, list(files), frame, None, meta["palette"], ranges)
        images = dict(zip(files, decoded, strict=True))
        if decoding == "nyuv2" and "depth" in images:
            images["depth"] = given_depth(files["depth"], read_image(files["depth"]), meta["depth"], depth_unit)
        yield frame, images, label


def given_depth(file: Path | str, stored: np.ndarray, kind: str, unit: float) -> np.ndarray:
    """Depth for a model of nyuv2, from what a file holds: HHA (H, W, 3) as it is, raw depth (H, W, 1) as metres / 10 in
    0..1. kind: "hha" or "raw", what the model was trained on; unit: metres of a step of 16 bit."""
    found, expected = stored.shape[2], {"hha": 3, "raw": 1}[kind]
    if found != expected:
        raise ValueError(f"{file} has {found} channel(s), but the model was trained on {kind} depth, of {expected}.")
    if kind == "hha":
        return stored
    unit = {"uint8": 10 / 255, "uint16": unit}.get(stored.dtype.name, 1.0)  # floats are metres
    metres = stored * np.float32(unit)
    middle = float(np.median(metres[metres > 0])) if (metres > 0).any() else 0.0
    if middle > 10:
        what = f"{file}: in steps of {unit:g} m, half of it is beyond {middle:.0f} m, and the model knows up to 10 m"
        raise ValueError(f"{what}; floats are metres; of 16 bit, give the file's own --depth-unit, e.g. 0.0001.")
    if isinstance(file, Path):  # not for each array of a robot
        say(f"{file}: depth read in steps of {unit:g} m, its median is {middle:.1f} m")
    return np.minimum(metres / 10, 1)
