"""What predict.py looks at: files of your own, decoded as in training, or frames of a data set."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data import Frame, FrameDataset, normalise, resize, resized_to
from datasets.files import SUFFIXES, read_image, scaled
from engine import pictures


class Sample(NamedTuple):
    name: str
    about: str  # the name, and the weather and failure as far as they are known
    shown: dict[str, Image.Image]  # modality -> picture for the eye, at the frame's own size
    network: dict[str, Tensor]  # modality -> (3, h, w) normalised, what the model sees
    label: np.ndarray | None  # (H, W) uint8


def samples(frames: Iterable[tuple[FrameDataset, int]], meta: dict, size, depth_unit: float) -> Iterator[Sample]:
    """(data set, index) -> the frames as a model with this meta sees them, resized as in validation.

    size: shorter side, or (h, w); depth_unit: metres of a step of 16-bit raw depth for a model of nyuv2.
    """
    for dataset, index in frames:
        images, label = dataset.read(index)
        frame, painted = dataset.frames[index], dataset.name == "synthetic"  # those have the right size
        for m, modality in enumerate(dataset.modalities):
            if modality == "depth" and dataset.name == "nyuv2" and not frame.label:  # a file of --input
                images[m] = given_depth(frame.images[m], images[m], meta["depth"], depth_unit)
        resized = images
        for step in [] if painted else resized_to(label.shape, size):
            resized = [resize(image, step) for image in resized]
        network = torch.from_numpy(np.stack([planes(image) for image in resized]))  # (G, 3, h, w)
        network = normalise(network, dataset.modalities, meta["normalisation"])
        shown = [pictures.photograph(planes(image)) for image in images]
        about = ", ".join([frame.name, *(word for word in (frame.condition, frame.case) if word != "none")])
        yield Sample(frame.name.replace("/", "_"), about, dict(zip(dataset.modalities, shown, strict=True)),
                     dict(zip(dataset.modalities, network, strict=True)),
                     label if painted or frame.label else None)  # fmt: skip


def input_frames(given: dict[str, Path], meta: dict) -> Iterator[tuple[FrameDataset, int]]:
    """The frames of --input, each in a data set of its own, so that it is decoded as in training. In folders, files of
    one stem are a frame, which may lack some modalities."""
    frames: dict[str, dict[str, Path]] = {}
    first = next(iter(given.values()))
    for modality, path in given.items():
        files = [file for file in path.iterdir() if file.suffix.lower() in SUFFIXES] if path.is_dir() else [path]
        if not files:
            raise ValueError(f"--input {modality}={path} holds no file that ends in {', '.join(SUFFIXES)}.")
        for file in files:
            frame = frames.setdefault(file.stem if path.is_dir() else first.stem, {})
            if frame.setdefault(modality, file) != file:
                raise ValueError(f"{file} and {frame[modality]} are of the same frame; remove one of them.")
    if len(given) > 1 and max(map(len, frames.values())) == 1:
        raise ValueError(f"--input: {' and '.join(map(str, given.values()))} have no file stem in common; name the "
                         "files of a frame alike, and give files or folders for all modalities.")  # fmt: skip
    decoding = "folder" if meta["data"] == "synthetic" else meta["data"]  # exported scenes are a plain folder
    for name, files in sorted(frames.items()):
        frame = Frame(name, "none", "none", tuple(files.values()))
        dataset = FrameDataset(decoding, [frame], meta["classes"], meta["palette"], list(files), None, False, 0, None,
                               "input")  # fmt: skip
        dataset.ranges = dict(meta.get("ranges", {}))
        if decoding == "nyuv2" and meta["depth"] == "raw":
            dataset.ranges.pop("depth", None)  # which may be of either kind: `given_depth` knows the units
        yield dataset, 0


def given_depth(file: Path, image: np.ndarray, kind: str, unit: float):
    """Depth of --input for a model of nyuv2, trained on HHA or on raw depth (metres / 10 in 0..1). Says the unit."""
    channels = image.shape[2]
    if channels != (3 if kind == "hha" else 1):
        wanted = "HHA, which has three" if kind == "hha" else "raw depth (--depth raw), which has one"
        raise ValueError(f"{file} has {channels} channel(s), but the model was trained on {wanted}.")
    if kind == "raw" and file.suffix.lower() == ".png" and image.dtype != np.uint8:  # 16 bit
        metres = read_image(file) * np.float32(unit)
        middle = float(np.median(metres[metres > 0])) if metres.any() else 0.0
        if middle > 10:
            raise ValueError(f"{file}: in steps of {unit:g} m, half of it is beyond {middle:.0f} m, and the model "
                             "knows up to 10 m; give the file's own --depth-unit, e.g. 0.0001.")  # fmt: skip
        print(f"{file}: depth read in steps of {unit:g} m, its median is {middle:.1f} m")
        return np.minimum(metres / 10, 1)
    if kind == "raw":
        print(f"{file}: depth read as metres / 10{', 255 being 1' if image.dtype == np.uint8 else ''}")
    return image


def planes(image: np.ndarray) -> np.ndarray:
    """A modality's picture as (3, H, W) float32, 8 bit in 0..1."""
    return np.repeat(scaled(image), 3 // image.shape[2], 2).transpose(2, 0, 1)
