"""The kind and range of each modality: learnt from training frames, kept in checkpoints, held wherever frames are read.

A scene in 8 or in 16 bit, in metres or in kilometres, is not the same to the network, and nothing else would tell: a
picture comes out in any case. Not in the paper.

    ranges = {"rgb": ["8 bit", 0.0, 255.0], "lidar": ["float", 0.0, 78.3]}      # kind, minimum, maximum as stored
"""
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mode

import numpy as np

from datasets.files import scaled
from datasets.layouts import Frame

KINDS = {"uint8": "8 bit", "uint16": "16 bit", "float32": "float"}


def learn_ranges(read: Callable, frames: list[Frame], modalities: list[str]) -> dict[str, list]:
    """The ranges over these frames; read(frame) -> (images as stored, label).

    Broken frames are left out, since whoever reads them will be told. Without a sound one there are no ranges.
    """
    def look(frame: Frame) -> list[tuple[str, float, float]] | None:
        try:
            return [(KINDS[image.dtype.name], float(image.min()), float(image.max())) for image in read(frame)[0]]
        except (ValueError, OSError):
            return None

    with ThreadPoolExecutor() as pool:
        seen = [found for found in pool.map(look, frames) if found]
    ranges = {}
    for modality, found in zip(modalities, zip(*seen, strict=True), strict=bool(seen)):
        kind = mode(kind for kind, _, _ in found)       # the most frequent one: then it is the odd file that is refused
        lows, highs = zip(*((low, high) for each, low, high in found if each == kind), strict=True)
        ranges[modality] = [kind, min(lows), max(highs)]
    return ranges


def checked(image: np.ndarray, modality: str, path: Path, ranges: dict[str, list]) -> np.ndarray:
    """The image, 16 bit as float32 in 0..1; ValueError if it is of another kind than `ranges` says, or far outside.

    8 and 16 bit have limits of their own. Floats may lie outside by the width of the range, for it is of few frames.
    """
    kind = KINDS[image.dtype.name]
    known, least, most = ranges.get(modality, (kind, -np.inf, np.inf))
    if kind != known:
        raise ValueError(f"{path} is {kind}, but {modality} of the training split is {known}; convert the one or the "
                         f"other, so that equal numbers mean the same")
    if kind == "float":
        low, high, width = image.min(), image.max(), most - least
        if not least - width <= low <= high <= most + width:
            raise ValueError(f"{path} has values in {low:g}..{high:g}, but {modality} of the training split is in "
                             f"{least:g}..{most:g}; correct the file or its unit")
        if modality == "rgb" and not 0 <= low <= high <= 1:
            raise ValueError(f"{path} has values in {low:g}..{high:g}; rgb as floats must be in 0..1")
    return scaled(image) if kind == "16 bit" else image
