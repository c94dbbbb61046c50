"""Decoding the files of the data sets: PNG and JPEG of 8 and 16 bit, .npy and .npz, as arrays (H, W, C).

A missing or damaged file is a FileNotFoundError or ValueError of one sentence that names it.
"""
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.derived import derive_event, derive_lidar

IGNORED = 255
SUFFIXES = (".png", ".jpg", ".jpeg", ".npy", ".npz")


def read_file(path: Path, ids: bool = False) -> np.ndarray:
    """The values of a file as stored, (H, W) or (H, W, C); `ids`: of a palette PNG the indices, not the colours.

    A missing or damaged file is a FileNotFoundError or ValueError of one sentence that names it.
    """
    if not path.is_file():
        for raw in (path.with_suffix(".h5"), path.with_suffix(".bin")):
            if raw.is_file():
                raise FileNotFoundError(f"{raw} is raw sensor data; project it onto the camera with the MUSES SDK "
                                        f"and put the images it writes at {path}, or below projected_to_rgb/")
        raise FileNotFoundError(f"{path} is missing, though its frame has other files; restore it, choose --modalities "
                                f"without it, or let --skip-broken leave the frame out")
    try:
        if path.suffix.lower() == ".npy":
            return np.load(path, allow_pickle=False)
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return archive[archive.files[0]]
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            mode, tile = image.mode, image.tile[0]
            if mode.startswith("I"):        # 16-bit grey
                return np.asarray(image).astype(np.uint16)
            if not str(tile[3]).endswith(";16B"):
                return np.array(image if mode in ("L", "RGB", "P" if ids else "L") else image.convert("RGB"))
            high = np.asarray(image)
        # Of 16-bit colour, Pillow keeps the high bytes. Told that the file is little-endian, it yields the low ones.
        with Image.open(path, formats=("PNG",)) as image:
            image.tile = [(*tile[:3], tile[3].replace("16B", "16L"))]
            return (high.astype(np.uint16) << 8 | np.asarray(image))[..., :3]
    except Exception as error:              # a decoder may raise anything on a damaged file
        raise ValueError(f"{path} cannot be read: {str(error) or type(error).__name__}") from error


def read_image(path: Path) -> np.ndarray:
    """A modality's file as (H, W, 1 or 3): 8 bit as stored, 16 bit as float32 in 0..1, floats as they are."""
    image = read_file(path)
    image = image[..., None] if image.ndim == 2 else image
    if image.ndim != 3 or image.shape[2] not in (1, 3) or not (image.dtype.kind == "f" or image.dtype in ("u1", "u2")):
        raise ValueError(f"{path} holds {image.dtype} of shape {image.shape}; expected (H, W), (H, W, 1) or (H, W, 3) "
                         f"of uint8, uint16 or float")
    if image.dtype == np.uint8:
        return image
    if image.dtype == np.uint16:
        return image.astype(np.float32) / 65535
    with np.errstate(over="ignore"):        # what float32 cannot hold becomes infinite, and is found below
        image = image.astype(np.float32)
    if not np.isfinite(image).all():
        raise ValueError(f"{path} has NaN or infinite values; replace them, for example by 0")
    return image


def read_float(path: Path) -> np.ndarray:
    """A modality's file as (H, W, 1 or 3) float32, 8 and 16 bit in 0..1."""
    image = read_image(path)
    return image if image.dtype == np.float32 else image / np.float32(255)


def read_muses_range(path: Path) -> np.ndarray:
    """MUSES lidar or radar: v / 100, so about 0..1 for metres. A PNG holds (v + 100) * 150, a .npz v; empty is 0."""
    if path.suffix in (".npy", ".npz"):
        return read_float(path) / 100
    stored = np.atleast_3d(read_file(path))
    if stored.dtype == np.uint8:
        raise ValueError(f"{path} has 8 bits; MUSES lidar and radar are 16-bit PNG files; write them with the SDK")
    return (stored.astype(np.float32) - 15000) / 15000


def read_mcubes(path: Path) -> np.ndarray:
    """A MCubeS modality without its left 192 columns, as is usual; AoLP as sin, cos, sin; NIR 0 outside its mask."""
    image, root = read_float(path), path.parent.parent
    if path.parent.name == "polL_aolp_sin":
        image = np.dstack([image, read_float(root / "polL_aolp_cos" / path.name), image])
    mask = root / "NIR_warped_mask" / path.name
    if path.parent.name == "NIR_warped" and mask.is_file():
        image = image * (read_float(mask)[..., :1] > 0)
    return image[:, 192:]


def read_nyuv2(path: Path) -> np.ndarray:
    """A NYU Depth v2 file. Raw depth is metres / 10, at most 1: 16 bit hold millimetres, 8 bit 25.5 a metre."""
    image = read_image(path)
    return np.minimum(image * np.float32(65535 / 10000), 1) if image.dtype != np.uint8 else image


def derive(modality: str, depth: Path, read: Callable[[Path], np.ndarray]) -> np.ndarray:
    """The event or lidar image derived from the files Depth/ID.* and RGB/ID.* of a real frame."""
    metres = read(depth)[..., 0]
    metres = metres * np.float32(10) if metres.dtype != np.uint8 else metres / np.float32(25.5)
    if modality == "lidar":
        return derive_lidar(metres, depth.stem)
    files = [depth.parents[1] / "RGB" / (depth.stem + suffix) for suffix in SUFFIXES]
    rgb = read(next(filter(Path.is_file, files), files[1]))
    if rgb.dtype != np.uint8 or rgb.shape[2] != 3:
        raise ValueError(f"{depth.parents[1] / 'RGB' / depth.stem} has no 8-bit colours; events are derived from such")
    return derive_event(rgb, metres, depth.stem)


def read_images(name: str, modalities: list[str], paths: Sequence[Path]) -> list[np.ndarray]:
    """The modalities of a frame of a data set, from their files."""
    if name == "nyuv2":
        read = functools.cache(read_nyuv2)      # derived modalities share files
        return [derive(modality, path, read) if modality in ("event", "lidar") and path.parent.name == "Depth"
                else read(path) for modality, path in zip(modalities, paths, strict=True)]
    readers = {("muses", "lidar"): read_muses_range, ("muses", "radar"): read_muses_range}
    reader = read_mcubes if name == "mcubes" else read_image
    return [readers.get((name, modality), reader)(path) for modality, path in zip(modalities, paths, strict=True)]


def read_label(name: str, path: Path, table: np.ndarray) -> np.ndarray:
    """A label file of a data set as (H, W) uint8 classes by `layouts.label_table`; DELIVER's ids are in red."""
    if path.suffix.lower() in (".jpg", ".jpeg"):
        raise ValueError(f"{path} is a JPEG, whose compression changes class ids; write labels as PNG")
    ids = read_file(path, ids=True)
    ids = ids[..., 0] if name == "deliver" and ids.ndim == 3 else ids
    if ids.ndim != 2 or ids.dtype not in ("u1", "u2"):
        raise ValueError(f"{path} is no label map; expected class ids of 8 or 16 bit in one channel")
    label = table.take(ids)                 # (H, W), in int16: no id can wrap around
    if label.min() < 0:
        known = np.flatnonzero(table >= 0)
        raise ValueError(f"{path} holds the label {ids[label < 0][0]}, but the ids are {known[0]}..{known[-2]} and "
                         f"{known[-1]}; correct the file, classes.txt or --label-map")
    return label[:, 192 if name == "mcubes" else 0:].astype(np.uint8)
