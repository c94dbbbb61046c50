"""The kind and range of each modality: learnt from training frames, kept in checkpoints, held wherever frames are read.

A scene in 8 or in 16 bit, in metres or in kilometres, is not the same to the network, and nothing else would tell: a
picture comes out in any case. {"rgb": ["8 bit", 0, 255], "lidar": ["float", 0.0, 78.3]}: kind, minimum, maximum as
stored. Not in the paper.
"""
from collections.abc import Callable
from contextlib import suppress
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
    found = {modality: [] for modality in modalities}       # -> [(kind, minimum, maximum) of each frame]
    for frame in frames:
        with suppress(ValueError, OSError):
            for modality, image in zip(modalities, read(frame)[0], strict=True):
                found[modality].append((KINDS[image.dtype.name], float(image.min()), float(image.max())))
    ranges = {}
    for modality, seen in found.items():
        if seen:        # the most frequent kind: then it is the odd file that is refused
            kind = mode(kind for kind, _, _ in seen)
            _, lows, highs = zip(*(values for values in seen if values[0] == kind), strict=True)
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
        least, most = (0, 1) if modality == "rgb" else (least - width, most + width)
        if not least <= low <= high <= most:
            raise ValueError(f"{path} has values in {low:g}..{high:g}, but {modality} must be in {least:g}..{most:g}, "
                             f"by the training split; correct the file or its unit")
    return scaled(image) if kind == "16 bit" else image
