"""Data: DELIVER, MUSES, MCubeS, NYU Depth v2, a folder, synthetic scenes, as (images (M, 3, H, W), label (H, W), name).

    python data.py --data deliver --root data/DELIVER --check       # count, open every file once, list the broken
    python data.py --export data/mini --layout deliver --count 24   # painted scenes in DELIVER's layout and formats

Then the joint augmentation of training, modality dropping (stage 1), and the corruptions of EMM, RMM and NM.
Axes: B batch, M modalities, K classes, H W image size. A label of 255 is ignored everywhere.
"""
import argparse
import glob
import math
import os
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

from datasets import synthetic
from datasets.export import export
from datasets.layouts import (
    DATASETS,
    IGNORED,
    LAYOUTS,
    NYUV2_CLASSES,
    RAW_DEPTH,
    SUFFIXES,
    Layout,
    Picture,
    label_table,
    parse_classes,
    read_classes,
    read_images,
    read_label,
    read_list,
)

SPLITS = ("train", "val", "test")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The published 3 x 3 Gaussian blur: a deviation of 0.8 pixels.
BLUR = ImageFilter.Kernel((3, 3), [math.exp(-(x**2 + y**2) / (2 * 0.8**2)) for y in (-1, 0, 1) for x in (-1, 0, 1)])
SYNTHETIC_COUNT = {"train": 2000, "val": 200, "test": 200}
LEFT_OUT = (("muses", "radar"), ("nyuv2", "event"), ("nyuv2", "lidar"))    # unless asked for
CACHE_BYTES = 256 * 2**20               # a split of painted scenes that fits is kept in memory once painted


# ---- the frames of a split ------------------------------------------------------------------------------------------
class Frame(NamedTuple):
    """One moment: its files in the order of the chosen modalities; `label` is None where none is published."""
    name: str
    condition: str      # the weather, or "none"
    case: str           # DELIVER's sensor failure, MUSES' day or night, or "none"
    images: tuple[Path, ...] = ()
    label: Path | None = None


def find_files(base: Path, pattern: str, ending: str) -> dict[str, Path]:
    """Frame key -> file, for all files base/pattern whose names end so, with any extension that can be read.

    Follows linked folders, leaves out hidden ones.
    """
    stem, found = ending.rpartition(".")[0], {}
    for name in glob.glob(f"{pattern}{stem}.*", root_dir=base, recursive=True):
        path = base / name
        key = Path(name).as_posix()[:-len(stem + path.suffix)]
        if path.suffix.lower() in SUFFIXES and found.setdefault(key, path) != path:
            raise ValueError(f"{path} and {found[key]} are of the same frame; remove one of them")
    return found


def find_frames(name: str, layout: Layout, root: Path, split: str, modalities: list[str]) -> list[Frame]:
    """The sorted frames of a split: every key for which a chosen sensor or the label has a file."""
    indexed = []
    for folder, ending in [*(layout.sensors[modality] for modality in modalities), layout.label]:
        base = root / "projected_to_rgb" / folder
        base = base if name == "muses" and base.is_dir() else root / folder
        indexed.append((base, ending, find_files(base, layout.pattern.format(split=split), ending)))
    keys = {key for *_, found in indexed for key in found}
    if name in ("mcubes", "nyuv2"):
        folders = (root / "list_folder", root.parent / "list_folder") if name == "mcubes" else ()
        keys = read_list(next((path for path in folders if path.is_dir()), root) / f"{split}.txt")
    unlabelled = split == "test" and not indexed[-1][2]     # MUSES keeps its test labels to itself
    frames = []
    for key in sorted(keys):
        # A file that is not there keeps the path where it should be, so that reading the frame names it.
        *images, label = (found.get(key, base / (key + ending)) for base, ending, found in indexed)
        folders = key.split("/")[:-1]
        if name == "deliver":   # condition/split/sequence; a failure is part of the sequence's name
            condition, case = folders[0], next((c for c in synthetic.CASES if c in folders[2].lower()), "none")
        else:                   # split/condition/case, as far as there are such folders
            condition, case = (*folders[1:3], "none", "none")[:2]
        frames.append(Frame(key, condition, case, tuple(images), None if unlabelled else label))
    return frames


class FrameDataset(torch.utils.data.Dataset):
    """The frames of a split; made by `open_dataset`.

    dataset[index] or dataset[epoch, index] is (images (M, 3, H, W), label (H, W) uint8, name). The images are uint8
    when all sensors are 8 bit, else float32: 0..1 for 8 and 16 bit, a .npy file's own scale, 100 metres for MUSES
    ranges. What is random depends on (seed, epoch, index) alone, so neither on workers nor on where a run was resumed.
    """
    ignored = IGNORED

    def __init__(self, name: str, frames: list[Frame], classes: list[str], palette: np.ndarray, modalities: list[str],
                 size: int | tuple[int, int] | None, augment: bool, seed: int, table: np.ndarray) -> None:
        self.name, self.frames, self.classes, self.palette, self.modalities = name, frames, classes, palette, modalities
        self.size, self.augment, self.seed, self.table = size, augment, seed, table
        self.normalisation = "all" if name == "synthetic" else "rgb"    # see `normalise`
        self.dtype, self.kinds, self.broken, self.painted = np.uint8, [], [], {}
        self.class_pixels = np.zeros(256, np.int64)     # counted by `open_all`

    def __len__(self) -> int:
        return len(self.frames)

    def read(self, index: int) -> tuple[list[Picture], np.ndarray]:
        """The frame at its own size: an image per modality, and the label (H, W) uint8."""
        frame = self.frames[index]
        if self.name == "synthetic":
            if index not in self.painted:
                split, number = frame.name.split("/")
                scene = synthetic.paint(0, split, int(number), self.size or 64, frame.condition, frame.case)
                painted = [Image.fromarray(scene[modality]) for modality in self.modalities], scene["label"]
                if len(self) * scene["label"].size * (3 * len(self.modalities) + 1) > CACHE_BYTES:
                    return painted
                self.painted[index] = painted
            return self.painted[index]
        images = read_images(self.name, self.modalities, frame.images)
        for m, path in enumerate(frame.images):
            is_float = isinstance(images[m], np.ndarray)
            if self.kinds and is_float != self.kinds[m]:
                raise ValueError(f"{path} has {'16 bits or floats' if is_float else '8 bits'}, the first frame's file "
                                 f"of {self.modalities[m]} not; a modality must be of one kind")
            if is_float and self.modalities[m] == "rgb" and images[m].max() > 1:
                raise ValueError(f"{path} has values up to {images[m].max():g}; rgb as floats must be in 0..1")
        if frame.label is None:
            label = np.full(shape_of(images[0]), IGNORED, np.uint8)
        else:
            label = read_label(frame.label, self.table, red=self.name == "deliver")
            label = label[:, 192:] if self.name == "mcubes" else label
        for m, path in enumerate(frame.images):
            if shape_of(images[m]) != label.shape:
                if self.name != "deliver" or self.modalities[m] != "event":
                    (h, w), (H, W) = shape_of(images[m]), label.shape
                    raise ValueError(f"{path} has {h} rows of {w} pixels, but {frame.label or frame.images[0]} has "
                                     f"{H} of {W}; the files of a frame must be aligned")
                images[m] = Image.fromarray(nearest(np.asarray(images[m]), label.shape))    # eventlowres: 512 x 512
        return images, label

    def open_all(self, allowed: int) -> None:
        """Read every frame once and leave out at most `allowed` broken ones; `broken` holds a sentence for each."""
        def problem(index: int) -> tuple[str | None, np.ndarray | int]:
            try:
                return None, np.bincount(self.read(index)[1].ravel(), minlength=256)
            except (ValueError, OSError) as error:
                return str(error), 0

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            problems, counts = zip(*pool.map(problem, range(len(self))), strict=True)
        self.class_pixels += sum(counts)
        self.broken = [text for text in problems if text]
        if len(self.broken) > allowed:
            raise ValueError(f"{len(self.broken)} frames are broken, more than --skip-broken {allowed}; the last one: "
                             f"{self.broken[-1]}")
        self.frames = [frame for frame, text in zip(self.frames, problems, strict=True) if not text]

    def learn_kinds(self, lenient: bool) -> None:
        """Which modalities are 8 bit and which float: as in the first frame, or with `lenient` the first sound one."""
        for index in range(len(self)):
            try:
                self.kinds = [isinstance(image, np.ndarray) for image in self.read(index)[0]]
            except (ValueError, OSError):
                if lenient:
                    continue
                raise
            break
        self.dtype = np.float32 if any(self.kinds) else np.uint8

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor, str]:
        epoch, index = key if isinstance(key, (tuple, list)) else (0, key)
        index = range(len(self))[index]     # IndexError past the end
        images, label = self.read(index)
        crop = label.shape
        if self.augment:
            crop = (self.size, self.size) if isinstance(self.size, int) else self.size or crop
            # Synthetic scenes are painted at the crop's size, and have fewer pixels to lose.
            scales = (0.8, 1.25) if self.name == "synthetic" else (0.5, 2)
            rng = np.random.default_rng([self.seed, epoch, index])
            images, label = augmented(images, label, self.modalities, crop, scales, rng)
        else:
            sizes = resized_to(label.shape, self.size) if self.name != "synthetic" else []
            for size in sizes:
                images, label = [resize(image, size) for image in images], nearest(label, size)
            crop = label.shape
        pixels, classes = np.zeros((len(images), 3, *crop), self.dtype), np.full(crop, IGNORED, np.uint8)
        classes[:label.shape[0], :label.shape[1]] = label   # int64 on the device only: an eighth of the bytes to move
        for image, into in zip(images, pixels, strict=True):
            image = np.atleast_3d(np.asarray(image))
            image = image / np.float32(255) if image.dtype == np.uint8 and self.dtype == np.float32 else image
            into[:, :label.shape[0], :label.shape[1]] = image.transpose(2, 0, 1)    # (3 or 1 -> 3, h, w)
        return torch.from_numpy(pixels), torch.from_numpy(classes), self.frames[index].name


# ---- resizing and augmentation, as published (DELIVER, semseg/augmentations_mm.py) ----------------------------------
def resized_to(shape: tuple[int, int], size: int | tuple[int, int] | None) -> list[tuple[int, int]]:
    """The sizes a frame (H, W) is brought to, one after the other: the shorter side to `size`, then multiples of 32."""
    if not isinstance(size, int):
        return [size] if size else []
    once = tuple(round(side * size / min(shape)) for side in shape)
    return [once, tuple(-(-side // 32) * 32 for side in once)]


def augmented(images: list[Picture], label: np.ndarray, modalities: list[str], crop: tuple[int, int],
              scales: tuple[float, float], rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
    """What training sees of a frame: images (h, w, 1 or 3) and label (h, w), h and w at most the crop's.

    Colour jitter and blur of rgb, a flip, the shorter side scaled to `scales` times the crop's, a random crop. Only
    what the crop shows is resized.
    """
    (H, W), shorter = label.shape, rng.uniform(*scales) * min(crop)
    height, width = (int(side * shorter / min(H, W) + 0.5) for side in (H, W))
    top, left = (int(rng.integers(max(0, side - c) + 1)) for side, c in ((height, crop[0]), (width, crop[1])))
    bottom, right, flip = min(top + crop[0], height), min(left + crop[1], width), rng.random() < 0.5
    rows, columns = np.arange(top, bottom) * H // height, np.arange(left, right) * W // width
    box = (left * W / width, top * H / height, right * W / width, bottom * H / height)
    if flip:    # the frame is flipped first: its columns count from the right
        columns, box = W - 1 - columns, (W - box[2], box[1], W - box[0], box[3])
    images = [jitter(image, rng) if modality == "rgb" else image
              for image, modality in zip(images, modalities, strict=True)]
    images = [resize(image, (bottom - top, right - left), box)[:, ::-1 if flip else 1] for image in images]
    return images, label[rows][:, columns]


def shape_of(image: Picture) -> tuple[int, int]:
    return image.size[::-1] if isinstance(image, Image.Image) else image.shape[:2]


def nearest(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, ...) at size (h, w) by nearest neighbour as published: row i is the old row floor(i * H / h)."""
    rows, columns = (np.arange(new) * old // new for old, new in zip(pixels.shape[:2], size, strict=True))
    return pixels[rows][:, columns]


def resize(image: Picture, size: tuple[int, int], box: tuple[float, float, float, float] | None = None) -> np.ndarray:
    """The part `box` (left, top, right, bottom) of an image at `size` (h, w), bilinear with antialiasing.

    Returns an (h, w, 1 or 3) uint8 or float32 array.
    """
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        image = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
    if isinstance(image, Image.Image):
        return np.atleast_3d(np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR, box)))
    planes = [Image.fromarray(plane).resize(size[::-1], Image.Resampling.BILINEAR, box)
              for plane in image.transpose(2, 0, 1)]
    return np.dstack([np.asarray(plane) for plane in planes])


def jitter(image: Picture, rng: np.random.Generator) -> Picture:
    """RGB with brightness, contrast and saturation times 0.5..1.5 each, and blurred; each of both in a fifth of cases.

    8 bits come out of it: 16-bit colours lose no more than the jitter changes.
    """
    colour, blur = rng.random(2) < 0.2
    if isinstance(image, np.ndarray) and (colour or blur):
        image = Image.fromarray(np.rint(image * 255).astype(np.uint8).squeeze())
    if colour:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhance(image).enhance(rng.uniform(0.5, 1.5))
    return image.filter(BLUR) if blur else image


def open_dataset(name: str, root: str | Path | None = None, split: str = "train", modalities: list[str] | None = None,
                 size: int | tuple[int, int] | None = None, augment: bool = False, seed: int = 0,
                 limit: int | None = None, depth: str = "hha", condition: str | None = None, case: str | None = None,
                 label_map: dict[int, int] | str | None = None, skip_broken: int = 0, classes: int = 40,
                 hold_out: int = 0) -> FrameDataset:
    """Open a split of a data set; what it yields is said at `FrameDataset`.

    modalities: which and in which order; by default all, but of MUSES those of the papers' tables (no radar), of
        nyuv2 the real ones (rgb, depth); its event and lidar are derived from rgb and raw depth.
    size: with `augment`, the crop S x S or (H, W). Without, the length S of the shorter side, before both sides go up
        to a multiple of 32, or exactly (H, W). None leaves frames as they are. Synthetic scenes are painted at `size`
        (by default 64).
    limit: at most so many frames, spread evenly over the sorted list; for synthetic, the number of scenes.
    depth: "hha" or "raw", of DELIVER and nyuv2. condition, case: frames of these only; synthetic paints every scene so.
    label_map: for the ids of a folder data set, see `label_table`.
    skip_broken: if above 0, open every file now and leave out up to so many broken frames, told in `dataset.broken`.
    classes, hold_out: of nyuv2, 40 or 13 classes, and how many frames of the train list to validate on, evenly spread
        and not trained on; with 0, validation is on the test list, as everyone reports it.
    Raises ValueError or FileNotFoundError with one sentence about what is missing or wrong.
    """
    choices = (("data set", name, DATASETS), ("split", split, SPLITS), ("depth", depth, ("hha", "raw")))
    for what, value, known in choices:
        if value not in known:
            raise ValueError(f"{what} {value!r} is unknown; choose one of {', '.join(known)}")
    if name == "synthetic" and root is not None:
        raise ValueError(f"--root {root} means nothing to painted scenes: add --data folder, or the data set's name")
    if label_map is not None and name != "folder":
        raise ValueError(f"a label map is for folder data sets only; the ids of {name} are fixed")
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit} leaves no frame; use 1 or more")
    if name != "nyuv2" and (classes, hold_out) != (40, 0):
        raise ValueError(f"--classes and --hold-out are for nyuv2 only; {name} has its own classes and val split")
    if classes not in NYUV2_CLASSES:
        raise ValueError(f"nyuv2 has no list of {classes} classes; choose 40 or 13")
    if name == "synthetic":
        names, palette = zip(*synthetic.CLASSES, strict=True)
        names, palette = list(names), np.array(palette, np.uint8)
        known = ["rgb", "depth", "event", "lidar"]
    else:
        layout = LAYOUTS[name]
        if root is None or not Path(root).is_dir():
            raise FileNotFoundError(f"{root or f'--data {name} without --root'}: no such folder; {layout.title} is "
                                    f"expected below its root as {layout.expected}; {layout.source}")
        root = Path(root)
        inner = root / {"mcubes": "multimodal_dataset", "nyuv2": "NYUDepthv2"}.get(name, "")
        root = inner if inner.is_dir() else root
        if name == "folder":
            folders = sorted(path.name for path in root.iterdir() if path.name != "labels"
                             and any((path / split).is_dir() for split in SPLITS))
            layout = layout._replace(sensors={m: (m, ".png") for m in sorted(folders, key=lambda m: m != "rgb")})
        elif depth == "raw" and name in RAW_DEPTH:
            layout = layout._replace(sensors={**layout.sensors, "depth": RAW_DEPTH[name]})
        if name == "nyuv2":
            layout = layout._replace(classes=NYUV2_CLASSES[classes],
                                     label=("Label" if classes == 40 else "Label13", ".png"))
        known = list(layout.sensors)
        names, palette = (read_classes(root / "classes.txt") if name == "folder"
                          else parse_classes(layout.classes.split(",")))
    if modalities is None:
        modalities = [m for m in known if (name, m) not in LEFT_OUT]
    elif not modalities:
        raise ValueError("the list of modalities is empty; name at least one, or give None for all")
    where = f"{name} at {root}" if name == "folder" else name
    if unknown := [m for m in modalities if m not in known]:
        raise ValueError(f"modality {unknown[0]!r} is unknown; {where} has {', '.join(known) or 'none'}")
    if twice := [m for m in modalities if modalities.count(m) > 1]:
        raise ValueError(f"modality {twice[0]!r} is given twice")
    if name == "synthetic":     # condition and failure as synthetic.paint chooses them by itself
        frames = [Frame(f"{split}/{i:06d}", condition or synthetic.CONDITIONS[i % 5],
                        case or (synthetic.CASES[i // 30 % 5] if i // 5 % 6 == 5 else "none"))
                  for i in range(limit or SYNTHETIC_COUNT[split])]
    else:
        if name == "nyuv2" and depth == "hha" and "depth" in modalities and not (root / "HHA").is_dir():
            raise FileNotFoundError(f"{root} has no folder HHA; add --depth raw to read the depth itself, from Depth")
        listed = split if name != "nyuv2" or split != "val" else "train" if hold_out else "test"
        frames = find_frames(name, layout, root, listed, modalities) if modalities else []
        if not frames:
            raise FileNotFoundError(f"{root} has no {split} frames of {layout.title}; expected {layout.expected}; "
                                    f"{layout.source}")
        if hold_out and not 0 < hold_out < len(frames):
            raise ValueError(f"--hold-out {hold_out} is out of range; 1 to {len(frames) - 1} frames can be held out")
        if hold_out and split != "test":
            held = {i * len(frames) // hold_out for i in range(hold_out)}
            frames = [frame for i, frame in enumerate(frames) if (i in held) == (split == "val")]
        for kind, wanted in (("condition", condition), ("case", case)):
            occurring = sorted({getattr(frame, kind) for frame in frames})
            if wanted is not None and wanted not in occurring:
                raise ValueError(f"{kind} {wanted!r} is in no {split} frame; choose one of {', '.join(occurring)}")
            frames = [frame for frame in frames if wanted in (None, getattr(frame, kind))]
        count = min(limit or len(frames), len(frames))
        frames = [frames[i * len(frames) // count] for i in range(count)]
    table = label_table(label_map or ("shift:-1" if name in ("deliver", "nyuv2") else "shift:0"), len(names))
    dataset = FrameDataset(name, frames, names, palette, modalities, size, augment, seed, table)
    if name != "synthetic":
        dataset.learn_kinds(lenient=skip_broken > 0)
    if skip_broken:
        dataset.open_all(skip_broken)
        if not dataset.frames and skip_broken < sys.maxsize:    # that is --check, which reports them
            raise ValueError(f"all {split} frames are broken; the last one: {dataset.broken[-1]}")
    return dataset


# ---- on the device: normalisation, modality dropping, corruptions ---------------------------------------------------
def normalise(images: Tensor, modalities: list[str], how: str) -> Tensor:
    """(..., M, 3, H, W) uint8, or float about 0..1, to float32 as the network takes it.

    how: "rgb", as published: rgb by ImageNet's mean and deviation, the others in 0..1, so that zeros are an empty
    sensor. "all": every modality by ImageNet's; not in the paper: better on the synthetic scenes from random weights.
    """
    if how not in ("rgb", "all"):
        raise ValueError(f"normalisation {how!r} is unknown; choose rgb or all")
    images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    chosen = [how == "all" or modality == "rgb" for modality in modalities]
    mean = torch.tensor([IMAGENET_MEAN if c else (0, 0, 0) for c in chosen], device=images.device)      # (M, 3)
    deviation = torch.tensor([IMAGENET_STD if c else (1, 1, 1) for c in chosen], device=images.device)
    return (images - mean[..., None, None]) / deviation[..., None, None]


def draw_present(batch_size: int, modalities: int, generator: torch.Generator, complete: float = 0.0) -> Tensor:
    """Which sensors each sample keeps, (B, M) bool: a number uniform in 1..M, then a uniform subset of that size.

    With probability `complete` all of them. `generator` is on the CPU and moves by the same amount in any case.
    """
    number = torch.randint(1, modalities + 1, (batch_size, 1), generator=generator)
    rank = torch.rand(batch_size, modalities, generator=generator).argsort(1).argsort(1)    # (B, M) permutations
    return (rank < number) | (torch.rand(batch_size, 1, generator=generator) < complete)


def frame_rng(seed: int, name: str, modality: int) -> np.random.Generator:
    """Chance for a sensor of a frame: the same in any batch, worker, subset of sensors and on any device."""
    return np.random.default_rng([seed, zlib.crc32(name.encode()), modality])


def random_missing(images: Tensor, present: Tensor, r: float, names: list[str], seed: int = 0) -> Tensor:
    """RMM: each value of a missing modality of normalised images (B, M, 3, H, W) becomes zero with probability r."""
    images = images.clone()
    for b, m in (~present).nonzero().tolist():
        lost = frame_rng(seed, names[b], m).random(images.shape[2:], np.float32) < r
        images[b, m].masked_fill_(torch.from_numpy(lost).to(images.device), 0)
    return images


def sensor_noise(images: Tensor, level: str, names: list[str], modalities: list[str], seed: int = 0) -> Tensor:
    """NM: salt and pepper on every modality of normalised images (B, M, 3, H, W), then Gaussian noise but on events.

    level: low, mid or high, a density of 0.05, 0.1, 0.2 and a deviation of 0.1, 0.2, 0.5. Salt and pepper are the
    largest and smallest value of the image; the published code takes the batch's, so its result depends on the batch.
    """
    density, deviation = {"low": (0.05, 0.1), "mid": (0.1, 0.2), "high": (0.2, 0.5)}[level]
    images = images.clone()
    for b, name in enumerate(names):
        for m, modality in enumerate(modalities):
            rng, image = frame_rng(seed, name, m), images[b, m]     # (3, H, W), a view
            pepper, salt = image.amin(), image.amax()
            chance = torch.from_numpy(rng.random(image.shape, np.float32)).to(image.device)
            image.copy_(torch.where(chance < density / 2, pepper, torch.where(chance >= 1 - density / 2, salt, image)))
            if modality != "event":
                image += deviation * torch.from_numpy(rng.standard_normal(image.shape, np.float32)).to(image.device)
    return images


# ---- command line ---------------------------------------------------------------------------------------------------
def check(options: argparse.Namespace) -> int:
    """Count the frames of each split, open every file once, print a sentence per broken frame; 1 when there is any."""
    lines, broken, error = [], [], None
    for split in SPLITS:
        try:
            dataset = open_dataset(options.data, options.root, split, size=options.size, depth=options.depth,
                                   modalities=options.modalities.split(",") if options.modalities else None,
                                   label_map=options.label_map, skip_broken=sys.maxsize, classes=options.classes,
                                   hold_out=options.hold_out)
        except FileNotFoundError as missing:    # a split may be absent, but not all three
            error = missing
            continue
        never = [name for c, name in enumerate(dataset.classes) if not dataset.class_pixels[c]]
        what = f"; never in a label: {', '.join(never)}" if never else ""
        what = "; not one labelled pixel" if len(never) == len(dataset.classes) else what
        lines.append(f"{split}: {len(dataset) + len(dataset.broken)} frames, {len(dataset.broken)} broken{what}")
        broken += dataset.broken
    if not lines:
        raise error
    print("\n".join(lines + broken))
    return 1 if broken else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--check", action="store_true", help="open every file of --data; exit status 1 if one is bad")
    task.add_argument("--export", type=Path, metavar="DIR", help="write painted scenes into this new folder")
    group = parser.add_argument_group("for --check")
    group.add_argument("--data", choices=DATASETS, default="synthetic", help="data set (default synthetic)")
    group.add_argument("--root", help="its folder")
    group.add_argument("--modalities", help="comma-separated (default: all; of MUSES without radar)")
    group.add_argument("--depth", choices=("hha", "raw"), default="hha", help="of DELIVER, nyuv2 (default hha)")
    group.add_argument("--classes", type=int, choices=(13, 40), default=40, help="of nyuv2 (default 40)")
    group.add_argument("--hold-out", type=int, default=0, help="of nyuv2: train frames to validate on (default 0)")
    group.add_argument("--label-map", help="ids of a folder's labels: shift:-1, or 0=255,1=0,... with 255 for ignored")
    group = parser.add_argument_group("for --export")
    group.add_argument("--layout", choices=tuple(LAYOUTS), default="deliver", help="whose (default deliver)")
    group.add_argument("--count", type=int, default=24, help="scenes, 4 or more; half go to train (default 24)")
    group.add_argument("--size", type=int, help="height in pixels, 8 or more (default 256)")
    group.add_argument("--seed", type=int, default=0, help="0 or more; another seed paints other scenes (default 0)")
    options = parser.parse_args()
    try:
        if options.check:
            return check(options)
        export(options.export, options.layout, options.count, options.size or 256, options.seed)
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 2
    print(f"{options.count} scenes are in {options.export}; look at them with "
          f"python data.py --data {options.layout} --root {options.export} --check")
    return 0


if __name__ == "__main__":
    sys.exit(main())
