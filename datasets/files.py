"""Decoding the files of the data sets: PNG and JPEG of 8 and 16 bit, .npy and .npz, as arrays (H, W, C).

And the kind and range of each modality: learnt from training frames, kept in checkpoints, held wherever frames are
read. Not in the paper. A missing, damaged or odd file is a FileNotFoundError or ValueError of one sentence.
"""

import functools
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import mode
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from datasets.derived import derive_event, derive_lidar

IGNORED = 255
LARGEST = 1e6  # a float beyond it is a mark for "nothing measured" rather than a measurement
FEW_BITS = {"1": 1, "L;2": 85, "L;4": 17}  # what Pillow multiplies grey of 1, 2 and 4 bits by
SUFFIXES = (".png", ".jpg", ".jpeg", ".npy", ".npz")
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # mean and deviation of its RGB
PUBLISHED = ("deliver", "muses", "mcubes")  # normalised as published: RGB by ImageNet's numbers, the rest not at all
LARGEST_OF = {"8 bit": 255, "16 bit": 65535}
KINDS = {"uint8": "8 bit", "uint16": "16 bit", "float32": "float"}


class Frame(NamedTuple):
    """One moment: its files in the order of the chosen modalities; `label` is None where none is published."""

    name: str
    condition: str  # the weather, or "none"
    case: str  # DELIVER's sensor failure, MUSES' day or night, or "none"
    images: tuple[Path, ...] = ()
    label: Path | None = None


# ---- single files ---------------------------------------------------------------------------------------------------
def read_file(path: Path, ids: bool = False) -> np.ndarray:
    """The values of a file as stored, (H, W) or (H, W, C); a JPEG turned upright as its EXIF says.

    ids: the file holds labels. Grey of 1, 2 or 4 bits is not scaled to 0..255 then, and a palette PNG becomes
        (H, W, 4) uint8, index and colour.
    """
    if not path.is_file():
        for raw in (path.with_suffix(".h5"), path.with_suffix(".bin")):
            if raw.is_file():
                raise FileNotFoundError(f"{raw} is raw data; project it onto the camera with the MUSES SDK, to {path}")
        raise FileNotFoundError(f"{path} is missing; restore it, or try a new run with --skip-broken or --modalities")
    try:
        if path.suffix.lower() == ".npy":
            return np.load(path, allow_pickle=False)
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                if len(archive.files) != 1:
                    raise ValueError(f"it holds {', '.join(archive.files) or 'nothing'}; save one array in it")
                return archive[archive.files[0]]
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            mode, tile = image.mode, image.tile[0]
            packing = str(tile[3])
            if mode.startswith("I"):  # 16-bit grey
                return np.asarray(image).astype(np.uint16)
            if ids and packing in FEW_BITS:
                return np.array(image).astype(np.uint8) // FEW_BITS[packing]
            if ids and mode == "P":
                return np.dstack([np.array(image), np.array(image.convert("RGB"))])
            if not packing.endswith(";16B"):
                image = ImageOps.exif_transpose(image) if image.format == "JPEG" else image
                return np.array(image if image.mode in ("L", "RGB") else image.convert("RGB"))
            high = np.asarray(image)
        # Of 16-bit colour, Pillow keeps the high bytes. Told that the file is little-endian, it yields the low ones.
        with Image.open(path, formats=("PNG",)) as image:
            image.tile = [(*tile[:3], packing.replace("16B", "16L"))]
            return (high.astype(np.uint16) << 8 | np.asarray(image))[..., :3]
    except Exception as error:  # a decoder may raise anything on a damaged file
        raise ValueError(f"{path} cannot be read: {str(error) or type(error).__name__}") from error


def read_image(path: Path) -> np.ndarray:
    """A modality's file as (H, W, 1 or 3) uint8, uint16 or float32, as stored."""
    image = read_file(path)
    image = image[..., None] if image.ndim == 2 else image
    known = image.dtype.kind == "f" or image.dtype in ("u1", "u2")
    if image.ndim != 3 or image.shape[2] not in (1, 3) or not image.size or not known:
        raise ValueError(f"{path} is {image.dtype} {image.shape}; expected (H, W, 1 or 3) uint8, uint16 or float")
    if image.dtype.kind == "u":
        return image
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is found below
        image = image.astype(np.float32)
    largest = np.abs(image).max()
    if not largest <= LARGEST:  # NaN neither, whose comparisons are all false
        raise ValueError(f"{path} has NaN or infinite values, or some beyond {LARGEST:g} ({largest:g}); put 0 there")
    return image


def scaled(image: np.ndarray) -> np.ndarray:
    """An image as float32: 8 and 16 bit in 0..1, floats as they are."""
    return image if image.dtype == np.float32 else image / np.float32(np.iinfo(image.dtype).max)


def read_muses_range(path: Path) -> np.ndarray:
    """MUSES lidar or radar: v / 100, so about 0..1 for metres. 16 bit hold (v + 100) * 150, floats v; empty is 0."""
    stored = read_image(path)
    if stored.dtype == np.uint8:
        raise ValueError(f"{path} has 8 bits; MUSES lidar and radar are 16-bit PNG files; write them with the SDK")
    return stored / 100 if stored.dtype == np.float32 else (stored.astype(np.float32) - 15000) / 15000


def read_mcubes(path: Path) -> np.ndarray:
    """A MCubeS modality in floats without its left 192 columns, as is usual; AoLP as sin, cos, sin; NIR unmasked."""
    image = scaled(read_image(path))
    if path.parent.name == "polL_aolp_sin":
        image = np.dstack([image, scaled(read_image(path.parents[1] / "polL_aolp_cos" / path.name)), image])
    return image[:, 192:]


def read_nyuv2(path: Path) -> np.ndarray:
    """A NYU Depth v2 file. Raw depth is metres / 10, at most 1: 16 bit hold millimetres, 8 bit 25.5 a metre."""
    image = read_image(path)
    if image.dtype == np.uint8 or image.shape[2] == 3:  # colours, HHA
        return image
    return np.minimum(image / np.float32(10 if image.dtype == np.float32 else 10000), 1)


def derive(modality: str, depth: Path, read: Callable[[Path], np.ndarray]) -> np.ndarray:
    """The event or lidar image derived from the files Depth/ID.* and RGB/ID.* of a real frame, decoded by `read`."""
    stored = read(depth)[..., 0]
    metres = stored / np.float32(25.5) if stored.dtype == np.uint8 else stored * np.float32(10)
    if modality == "lidar":
        return derive_lidar(metres, depth.stem)
    files = [depth.parents[1] / "RGB" / (depth.stem + suffix) for suffix in SUFFIXES]
    return derive_event(read(next(filter(Path.is_file, files), files[1])), metres, depth.stem)


# ---- kinds and ranges -----------------------------------------------------------------------------------------------
def learn_ranges(name: str, modalities: list[str], frames: list[Frame], *codes: np.ndarray) -> dict[str, list]:
    """modality -> [kind, minimum, maximum, mean (3), deviation (3)] in these frames.

    Minimum and maximum are of values as stored; mean and deviation are of each channel, of values as `scaled`, or for
    the published data sets the published ones. A constant channel has deviation 1. codes: table and palette of labels.
    Broken frames are left out, since whoever reads them will be told. Without a sound one there are no ranges.
    ValueError for a modality that is constant over all frames.
    """
    seen, ranges = [], {}  # seen: (kind, minimum, maximum, mean, variance) of each modality, by frame
    for frame in frames:
        with suppress(ValueError, OSError):
            images, _ = read_frame(name, modalities, frame, *codes)
            seen.append([values_of(image) for image in images])
    for modality, values in zip(modalities, zip(*seen, strict=True), strict=False):
        kind = mode(kind for kind, *_ in values)  # the most frequent: then it is the odd file that is refused
        _, lows, highs, means, variances = zip(*(value for value in values if value[0] == kind), strict=True)
        low, high, top = min(lows), max(highs), LARGEST_OF.get(kind, 1)
        mean, deviation = np.mean(means, 0), np.sqrt(np.mean(variances, 0) + np.var(means, 0))
        varies = deviation > max(1e-4 * (high - low), 1e-9 * max(-low, high))  # the second is rounding
        if name in PUBLISHED:
            numbers = IMAGENET if modality == "rgb" else ([0.0] * 3, [1.0] * 3)
        elif varies.any():
            numbers = (mean / top).tolist(), np.where(varies, deviation / top, 1).tolist()
        else:
            raise ValueError(
                f"{modality} is {mean[0]:g} (almost) everywhere in {len(values)} training frames; look at "
                f"{frames[0].images[modalities.index(modality)]}, or leave {modality} out of --modalities"
            )
        ranges[modality] = [kind, low, high, *numbers]
    return ranges


def values_of(image: np.ndarray) -> tuple:
    """Kind, minimum, maximum, mean (3,) and variance (3,) of an image (H, W, 1 or 3)."""
    moments = (np.broadcast_to(moment((0, 1), dtype=np.float64), 3) for moment in (image.mean, image.var))
    return KINDS[image.dtype.name], float(image.min()), float(image.max()), *moments


def checked(image: np.ndarray, modality: str, path: Path, ranges: dict[str, list]) -> np.ndarray:
    """The image, 16 bit as float32 in 0..1; ValueError if it is of another kind than `ranges` says, or far outside.

    8 and 16 bit have limits of their own. Floats may lie outside by the width of the range, for it is of few frames.
    """
    kind = KINDS[image.dtype.name]
    known, least, most, *_ = ranges.get(modality, (kind, -np.inf, np.inf))
    if kind != known:
        raise ValueError(f"{path} is {kind}, but {modality} of the training split is {known}; convert one of them")
    if kind == "float":
        low, high, width = image.min(), image.max(), most - least
        least, most = (0, 1) if modality == "rgb" else (least - width, most + width)
        if not least <= low <= high <= most:
            raise ValueError(
                f"{path} has values in {low:g}..{high:g}, but {modality} must be in {least:g}..{most:g}, "
                f"by the training split; correct the file or its unit"
            )
    return scaled(image) if kind == "16 bit" else image


# ---- labels and frames ----------------------------------------------------------------------------------------------
def read_label(name: str, path: Path, table: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """A label file of a data set as (H, W) uint8 classes by `layouts.label_table`; DELIVER's ids are in red.

    The indices of a palette PNG are taken for ids if its colours are those of the classes, `palette` (K, 3), or grey
    of the same number. Else the program that wrote it may have sorted them anew, and the file is refused.
    """
    if path.suffix.lower() in (".jpg", ".jpeg"):
        raise ValueError(f"{path} is a JPEG, whose compression changes class ids; write labels as PNG")
    ids = read_file(path, ids=True)
    if ids.ndim == 3 and ids.shape[2] == 4:
        ids, colours = ids[..., 0], ids[..., 1:]
        classes = table.take(ids)
        right = (classes == IGNORED) | (palette[classes.clip(0, len(palette) - 1)] == colours).all(2)
        if not right.all() and (ids[..., None] != colours).any():
            raise ValueError(
                f"{path} has a palette of other colours than the classes, so its indices may not be their "
                f"ids; save the ids as 8-bit grey PNG, or write the palette's colours into classes.txt"
            )
    ids = ids[..., 0] if name == "deliver" and ids.ndim == 3 else ids
    if ids.ndim != 2 or ids.dtype not in ("u1", "u2"):
        raise ValueError(f"{path} is no label map; expected class ids of 8 or 16 bit in one channel")
    label = table.take(ids)  # (H, W), in int16: no id can wrap around
    if label.min() < 0:
        known = np.flatnonzero(table >= 0)
        raise ValueError(
            f"{path} holds the label {ids[label < 0][0]}, but the ids are {known[0]}..{known[-2:][0]} and "
            f"{known[-1]}; correct the file, classes.txt or --label-map"
        )
    return label[:, 192 if name == "mcubes" else 0 :].astype(np.uint8)


def nearest(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) or (H, W, C) at size (h, w) by nearest neighbour: row i is the old row floor(i * H / h)."""
    rows, columns = (np.arange(new) * old // new for old, new in zip(pixels.shape[:2], size, strict=True))
    return pixels[rows][:, columns]


def read_frame(
    name: str,
    modalities: list[str],
    frame: Frame,
    table: np.ndarray,
    palette: np.ndarray,
    ranges: dict[str, list] | None = None,
) -> tuple[list[np.ndarray], np.ndarray]:
    """A frame of a data set: an image (H, W, 1 or 3) per modality, and its label (H, W) uint8 as of `read_label`.

    The images are uint8, uint16 or float32, as stored; with `ranges`, all are checked, and 16 bit are float32 in 0..1.
    """
    read = functools.cache({"mcubes": read_mcubes, "nyuv2": read_nyuv2}.get(name, read_image))
    images, label = [], read_label(name, frame.label, table, palette) if frame.label else None
    for modality, path in zip(modalities, frame.images, strict=True):
        if name == "muses" and modality in ("lidar", "radar"):
            image = read_muses_range(path)
        elif name == "nyuv2" and modality in ("event", "lidar") and path.parent.name == "Depth":
            image = derive(modality, path, read)
        else:
            image = read(path)
        label = np.full(image.shape[:2], IGNORED, np.uint8) if label is None else label
        if image.shape[:2] != label.shape:
            if (name, modality) != ("deliver", "event"):  # whose eventlowres is of 512 x 512
                raise ValueError(
                    "{} has {} rows of {} pixels, but {} has {} of {}; files of a frame must be aligned".format(
                        path, *image.shape[:2], frame.label or frame.images[0], *label.shape
                    )
                )
            image = nearest(image, label.shape)
        images.append(image if ranges is None else checked(image, modality, path, ranges))
    return images, label
