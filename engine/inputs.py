"""What predict.py looks at: files of your own, decoded as in training, or frames of a data set."""

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from data import Frame, FrameDataset, normalise
from datasets.files import SUFFIXES, read_image
from engine import pictures


class Sample(NamedTuple):
    name: str
    about: str  # the name, and the weather and failure as far as they are known
    shown: dict[str, Image.Image]  # modality -> picture for the eye, at the frame's own size
    network: dict[str, Tensor]  # modality -> (3, h, w) normalised, what the model sees
    label: np.ndarray  # (H, W) uint8, 255 where there is none


def samples(datasets: Iterable[FrameDataset], meta: dict, depth_unit: float) -> Iterator[Sample]:
    """All frames of these data sets as a model with this meta sees them, resized as in validation.

    depth_unit: metres of a step of 16-bit raw depth for a model of nyuv2.
    """
    for dataset in datasets:
        dataset.read = functools.lru_cache(1)(dataset.read)  # for the eye and for the network: decoded once
        for index, frame in enumerate(dataset.frames):
            (images, label), names = dataset.read(index), dataset.modalities
            if dataset.split == "input" and dataset.name == "nyuv2" and "depth" in names:
                m = names.index("depth")  # changed in the list that is kept, so for both
                images[m] = given_depth(frame.images[m], images[m], meta["depth"], depth_unit)
            network = normalise(dataset[index][0], names, meta["normalisation"])  # (G, 3, h, w)
            shown = map(pictures.photograph, images)
            about = ", ".join(word for word in (frame.name, frame.condition, frame.case) if word != "none")
            yield Sample(frame.name.replace("/", "_"), about, dict(zip(names, shown, strict=True)),
                         dict(zip(names, network, strict=True)), label)  # fmt: skip


def input_frames(given: dict[str, Path], meta: dict, size: int | tuple[int, int]) -> Iterator[FrameDataset]:
    """The frames of --input, each in a data set of its own, so that it is decoded as in training. In folders, files of
    one stem are a frame, which may lack some modalities."""
    frames: dict[str, dict[str, Path]] = {}
    first = next(iter(given.values())).stem
    for modality, path in given.items():
        files = [file for file in path.iterdir() if file.suffix.lower() in SUFFIXES] if path.is_dir() else [path]
        if not files:
            raise ValueError(f"--input {modality}={path} holds no file that ends in {', '.join(SUFFIXES)}.")
        for file in files:
            other = frames.setdefault(file.stem if path.is_dir() else first, {}).setdefault(modality, file)
            if other != file:
                raise ValueError(f"{file} and {other} are of the same frame; remove one of them.")
    if len(given) > 1 and max(map(len, frames.values())) == 1:
        raise ValueError(f"--input: {' and '.join(map(str, given.values()))} have no file stem in common; name the "
                         "files of a frame alike, and give files or folders for all modalities.")  # fmt: skip
    decoding = "folder" if meta["data"] == "synthetic" else meta["data"]  # exported scenes are a plain folder
    for name, files in sorted(frames.items()):
        frame, classes = Frame(name, "none", "none", tuple(files.values())), (meta["classes"], meta["palette"])
        dataset = FrameDataset(decoding, [frame], *classes, list(files), size, False, 0, None, "input")
        any_kind = ["depth"] if decoding == "nyuv2" and meta["depth"] == "raw" else []  # see `given_depth`
        dataset.ranges = {m: kept for m, kept in meta.get("ranges", {}).items() if m not in any_kind}
        yield dataset


def given_depth(file: Path, image: np.ndarray, kind: str, unit: float) -> np.ndarray:
    """Depth of --input for a model of nyuv2: HHA (H, W, 3) as read, or raw depth (H, W, 1) as metres / 10 in 0..1.

    kind: "hha" or "raw", what the model was trained on; unit: metres of a step of 16 bit. Says in which it is read.
    """
    wanted, channels = {"hha": ("HHA", 3), "raw": ("raw depth", 1)}[kind]
    if image.shape[2] != channels:
        raise ValueError(f"{file} has {image.shape[2]} channel(s), but the model was trained on {wanted}: {channels}.")
    if kind == "hha":
        return image
    stored = read_image(file)
    unit = {"uint8": 10 / 255, "uint16": unit}.get(stored.dtype.name, 1.0)  # floats are metres
    metres = stored * np.float32(unit)
    middle = float(np.median(metres[metres > 0])) if (metres > 0).any() else 0.0
    if middle > 10:
        raise ValueError(f"{file}: in steps of {unit:g} m, half of it is beyond {middle:.0f} m, and the model knows up "
                         "to 10 m; of 16 bit, give the file's own --depth-unit, e.g. 0.0001.")  # fmt: skip
    print(f"{file}: depth read in steps of {unit:g} m, its median is {middle:.1f} m")
    return np.minimum(metres / 10, 1)
