"""Decoding the files of the data sets, PNG, JPEG, TIFF, .npy and .npz, as arrays (H, W, C).

And the kind and range of each modality: learnt from training frames, kept in checkpoints, checked wherever frames are
read. Not in the paper. A missing, damaged or odd file is a FileNotFoundError or ValueError of one sentence.
"""

import functools
import glob
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import mode
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from datasets.derived import derive_event, derive_lidar

IGNORED = 255
LARGEST = 1e6  # a float beyond it is a mark for "nothing measured" rather than a measurement
FEW_BITS = {"1": 1, "L;2": 85, "L;4": 17}  # what Pillow multiplies grey of 1, 2 and 4 bits by
OTHER_ORDER = {";16B": ";16L", ";16L": ";16B", ";16N": ";16B"}  # of the bytes of 16-bit colour
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".npy", ".npz")
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
    """The values of a file as stored, (H, W) or (H, W, C), turned upright as its EXIF says.

    ids: the file holds labels, so it must be no JPEG. Grey of 1, 2 or 4 bits is not scaled to 0..255 then, and a
        palette picture becomes (H, W, 4) uint8, index and colour.
    """
    if not path.is_file():
        raise FileNotFoundError(why_missing(path))
    try:
        if path.suffix.lower() in (".npy", ".npz"):
            array = np.load(path, allow_pickle=False)
            if path.suffix.lower() == ".npz":
                if len(array.files) != 1:
                    raise ValueError(f"it holds {', '.join(array.files) or 'nothing'}; save one array in it")
                array = array[array.files[0]]
            return array.astype(array.dtype.newbyteorder("="), copy=False)
        # Not by its path: of a TIFF on its side, Pillow would map rows of the wrong length.
        with path.open("rb") as file, Image.open(file, formats=("PNG", "JPEG", "TIFF")) as image:
            kind, mode, packing = image.format, image.mode, packings(image)[0]
            if kind != "MPO" and getattr(image, "n_frames", 1) > 1:  # of a phone's MPO, the second is a preview
                raise ValueError("it holds several pictures; save one")
            if ids and (kind in ("JPEG", "MPO") or image.info.get("compression") == "jpeg"):
                raise ValueError("it is a JPEG, whose compression changes class ids; write labels as PNG")
            if packing.startswith("LA;16"):
                raise ValueError("it is 16-bit grey with alpha; save it without alpha")
            tags = image.tag_v2 if kind == "TIFF" else {}
            if max(tags.get(258, (8,))) > 8 and (tags.get(284) == 2 or tags.get(262) == 0):  # Pillow reads them wrongly
                raise ValueError("it is a 16-bit TIFF in planes, or with 0 for white; save it interleaved, 0 for black")
            if mode.startswith("I;16") or (kind, mode) == ("PNG", "I"):  # 16-bit grey
                array = np.asarray(image).astype(np.uint16)
            elif ids and packing in FEW_BITS:
                array = np.array(image).astype(np.uint8) // FEW_BITS[packing]
            elif ids and mode == "P":
                array = np.dstack([np.array(image), np.array(image.convert("RGB"))])
            else:
                array = np.array(image if mode in ("L", "RGB", "I", "F") else image.convert("RGB"))
            turn = image.getexif().get(0x0112, 1)  # Pillow has turned a TIFF by itself, and says 1
        if array.dtype == np.uint8 and packing[-4:] in OTHER_ORDER:
            # Of 16-bit colour, Pillow keeps the high bytes. Told of the other byte order, it yields the low ones.
            with Image.open(path, formats=("PNG", "TIFF")) as image:
                packings(image, packing[:-4] + OTHER_ORDER[packing[-4:]])
                array = array.astype(np.uint16) << 8 | np.asarray(image)[..., :3]
        array = array.swapaxes(0, 1) if turn > 4 else array
        array = array[::-1] if turn in (3, 4, 7, 8) else array
        return np.ascontiguousarray(array[:, ::-1] if turn in (2, 3, 6, 7) else array)  # torch takes no flipped views
    except Exception as error:  # a decoder may raise anything on a damaged file
        unknown = isinstance(error, UnidentifiedImageError)
        why = "it is empty, or no PNG, JPEG or TIFF" if unknown else str(error) or type(error).__name__
        raise ValueError(f"{path} cannot be read: {why}") from error


def turned(path: Path) -> bool:
    """Whether a picture's EXIF has it turned or mirrored; sizes do not show all of these turns."""
    with suppress(OSError), Image.open(path) as image:
        return image.getexif().get(0x0112, 1) != 1
    return False


def packings(image: Image.Image, new: str | None = None) -> list[str]:
    """How the tiles of an opened picture are packed, such as RGB;16B; `new` has them read as packed like that."""
    tiles = [(*tile[:3], (tile[3],) if isinstance(tile[3], str) else tile[3]) for tile in image.tile]
    if new:
        make = getattr(image.tile[0], "_make", tuple)  # a named tuple since Pillow 11
        image.tile = [make((*tile, (new, *rest) if rest else new)) for *tile, (_, *rest) in tiles]
    return [arguments[0] for *_, arguments in tiles]


def why_missing(path: Path) -> str:
    """One sentence on a path that is no file."""
    if path.is_dir():
        return f"{path} is a folder; a file is expected there"
    if path.is_symlink():
        return f"{path} is a link to {path.readlink()}, which is missing; mend or remove it"
    for found in sorted(path.parent.glob(f"{glob.escape(path.stem)}.*")) if path.parent.is_dir() else ():
        if found.suffix in (".h5", ".bin"):
            return f"{found} is raw data; project it onto the camera with the MUSES SDK, to {path}"
        return f"{path} is missing; {found.name} is there, but only {', '.join(SUFFIXES)} are read: convert it"
    return f"{path} is missing; restore it, or try a new run with --skip-broken or --modalities"


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
    if image.shape[1] <= 192:
        raise ValueError(f"{path} has {image.shape[1]} columns, but the left 192 are left out; give the uncut files")
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
    """modality -> [kind, minimum, maximum, mean (3), deviation (3)] in these frames; codes: table, palette of labels.

    Minimum and maximum: of values as stored, without the tenth of frames (and one more) that are lowest or highest.
    Mean and deviation: of each channel, of values as `scaled`; for the published data sets the published ones. A
    constant channel has deviation 1. Broken frames and those beyond `limits` are left out; whoever reads them will be
    told. Without a sound one there are no ranges.
    Raises ValueError for a modality that is constant over all frames, or that is of two units.
    """
    seen, ranges = [], {}  # seen: (kind, minimum, maximum, mean, variance, file) of each modality, by frame
    for frame in frames:
        with suppress(ValueError, OSError):
            images, _ = read_frame(name, modalities, frame, *codes)
            seen.append([(*measured(image), path) for image, path in zip(images, frame.images, strict=True)])
    for modality, values in zip(modalities, zip(*seen, strict=True), strict=False):
        kind = mode(kind for kind, *_ in values)  # the most frequent: then it is the odd file that is refused
        values = [value for value in values if value[0] == kind]
        ends = [value[1:3] for value in values if value[1] < value[2]] or [values[0][1:3]]
        lows, highs = map(sorted, zip(*ends, strict=True))
        odd = min((len(ends) - 1) // 2, 1 + len(ends) // 10)
        low, high, top = float(lows[odd]), float(highs[-1 - odd]), LARGEST_OF.get(kind, 1)
        least, most = limits([kind, low, high], modality)
        near = [v for v in values if (v[1] == 0 or least <= v[1]) and (v[2] == 0 or v[2] <= most)] or values
        *_, means, variances, paths = zip(*near, strict=True)
        mean, deviation = np.mean(means, 0), np.sqrt(np.mean(variances, 0) + np.var(means, 0))
        varies = deviation > max(1e-4 * (high - low), 1e-9 * max(-low, high))  # the second is rounding
        if name in PUBLISHED:
            numbers = IMAGENET if modality == "rgb" else ([0.0] * 3, [1.0] * 3)
        elif varies.any():
            numbers = (mean / top).tolist(), np.where(varies, deviation / top, 1).tolist()
        else:
            what = f"{modality} is {mean[0]:g} (almost) everywhere in {len(means)} frames"
            raise ValueError(f"{what}; look at {paths[0]}, or leave {modality} out of --modalities")
        if kind != "8 bit" and name not in PUBLISHED:
            tops = [(float(most), path) for _, least, most, *_, path in values if 0 <= least < most]
            refuse_two_units(modality, tops)
        ranges[modality] = [kind, low, high, *numbers]
    return ranges


def measured(image: np.ndarray) -> tuple:
    """Kind, minimum, maximum, and mean and variance of each of three channels, of an image (H, W, 1 or 3)."""
    image = np.broadcast_to(image, (*image.shape[:2], 3))
    return KINDS[image.dtype.name], image.min(), image.max(), image.mean((0, 1), float), image.var((0, 1), float)


def refuse_two_units(modality: str, tops: list[tuple[float, Path]]) -> None:
    """ValueError if the largest values of the files, `tops`, fall into two groups that are 30 times apart."""
    tops = sorted(tops)
    few = max(2, len(tops) // 10)  # of each group at least; a single odd file is refused by `checked`
    for (below, one), (above, other) in zip(tops[few - 1 :], tops[few : 1 - few], strict=False):
        if above > 30 * below:
            what = f"{modality} reaches {below:g} in {one}, but {above:g} in {other}"
            raise ValueError(f"{what}; is it of two units? Write all files in one, or leave out {modality}")


def limits(known: list, modality: str) -> tuple[float, float]:
    """What values other than 0 may be by an entry of `learn_ranges`: beyond its range by 4 widths at most."""
    kind, low, high, *_ = known
    if modality == "rgb" or kind == "8 bit":  # which have limits of their own
        return 0, LARGEST_OF.get(kind, 1)
    least, most = low - 4 * (high - low), high + 4 * (high - low)
    return (least, most) if kind == "float" else (max(0, least), min(LARGEST_OF[kind], most))


def checked(image: np.ndarray, modality: str, path: Path | str, ranges: dict[str, list]) -> np.ndarray:
    """The image, 16 bit as float32 in 0..1; ValueError if it is of another kind than `ranges` says, or far outside."""
    if modality in ranges:
        kind, (known, *_) = KINDS[image.dtype.name], ranges[modality]
        if kind != known:
            raise ValueError(f"{path} is {kind}, but {modality} of the training split is {known}; convert one of them")
        values = image[image != 0] if kind != "8 bit" else image[:0]  # 0: nothing measured; 8 bit: no value is too far
        least, most = limits(ranges[modality], modality)
        if not ((least <= values) & (values <= most)).all():  # NaN neither
            low, high = values.min(), values.max()
            what = f"values in {low:g}..{high:g}, but {modality} must be in {least:g}..{most:g}, by the training split"
            raise ValueError(f"{path} has {what}; correct the file or its unit, or clip it")
    return scaled(image) if image.dtype == np.uint16 else image


# ---- labels and frames ----------------------------------------------------------------------------------------------
def read_label(name: str, path: Path, table: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """A label file of a data set as (H, W) uint8 classes by `layouts.label_table`; DELIVER's ids are in red.

    The indices of a palette PNG are taken for ids if its colours are those of the classes, `palette` (K, 3), or grey
    of the same number. Else the program that wrote it may have sorted them anew, and the file is refused.
    """
    ids = read_file(path, ids=True)
    if ids.ndim == 3 and ids.shape[2] == 4:
        ids, colours = ids[..., 0], ids[..., 1:]
        classes = table.take(ids)
        right = (classes == IGNORED) | (palette[classes.clip(0, len(palette) - 1)] == colours).all(2)
        if not right.all() and (ids[..., None] != colours).any():
            what = f"{path} has a palette of other colours than the classes, so its indices may not be their ids"
            raise ValueError(f"{what}; save the ids as 8-bit grey PNG, or write the palette's colours into classes.txt")
    ids = ids[..., 0] if ids.ndim == 3 and (name == "deliver" or ids.shape[2] == 1) else ids
    if ids.ndim != 2 or not ids.size or ids.dtype.kind not in "ui" or not 0 <= ids.min() <= ids.max() < len(table):
        what = f"{path} is {ids.dtype} {ids.shape}, no label map"
        raise ValueError(f"{what}; expected class ids of 8 or 16 bit, 0..65535, in one channel")
    label = table.take(ids)  # (H, W), in int16: no id can wrap around
    if label.min() < 0:
        known = np.flatnonzero(table >= 0)
        what = f"the label {ids[label < 0][0]}, but the ids are {known[0]}..{known[-2:][0]} and {known[-1]}"
        raise ValueError(f"{path} holds {what}; correct the file, classes.txt or --label-map")
    return label[:, 192 if name == "mcubes" else 0 :].astype(np.uint8)


def nearest(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) or (H, W, C) at size (h, w) by nearest neighbour: row i is the old row floor(i * H / h)."""
    rows, columns = (np.arange(new) * old // new for old, new in zip(pixels.shape[:2], size, strict=True))
    return pixels[rows][:, columns]


def read_frame(
    name: str, modalities: list, frame: Frame, table: np.ndarray, palette: np.ndarray, ranges: dict | None = None
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
        raw_depth = name == "nyuv2" and image.dtype == np.float32 and modality in (ranges or ())
        if raw_depth and np.median(image[image > 0]) == 1:  # as it has been cut off
            raise ValueError(f"{path} is beyond 10 m in half of its pixels; 16 bit must be millimetres, floats metres")
        label = np.full(image.shape[:2], IGNORED, np.uint8) if label is None else label
        (h, w), (H, W) = image.shape[:2], label.shape
        if (h, w) != (H, W) and (name, modality) == ("deliver", "event"):  # whose eventlowres is of 512 x 512
            image = nearest(image, label.shape)
        elif (h, w) != (H, W):
            first = frame.label or frame.images[0]
            what = f"{h} rows of {w} pixels, but {first} has {H} of {W}"
            raise ValueError(f"{path} has {what}; files of a frame must be aligned")
        images.append(image if ranges is None else checked(image, modality, path, ranges))
    return images, label
