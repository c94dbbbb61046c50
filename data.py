"""Data: DELIVER, MUSES, MCubeS, your own folder and painted scenes, as (images (M, 3, H, W), label (H, W), name).

    python data.py --data deliver --root data/DELIVER --check       # count, open every file once, list the broken
    python data.py --export data/mini --layout deliver --count 24   # painted scenes in DELIVER's layout and formats

Then the joint augmentation of training, modality dropping (stage 1), and the corruptions of EMM, RMM and NM.
Axes: B batch, M modalities, K classes, H W image size. A label of 255 is ignored everywhere.
"""
import argparse
import glob
import os
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datasets import synthetic
from datasets.export import export
from datasets.layouts import (
    DATASETS,
    IGNORED,
    LAYOUTS,
    Layout,
    Picture,
    label_table,
    parse_classes,
    read_classes,
    read_image,
    read_label,
    read_mcubes,
    read_muses_range,
)

SPLITS = ("train", "val", "test")
SUFFIXES = (".png", ".jpg", ".jpeg", ".npy", ".npz")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NEAREST, BILINEAR = Image.Resampling.NEAREST, Image.Resampling.BILINEAR
SPARSE = ("event", "lidar", "radar")    # resized by NEAREST: the mean of a point and of nothing is neither
SYNTHETIC_COUNT = {"train": 2000, "val": 200, "test": 200}
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
    if name == "mcubes":
        listing = next((path for path in (root / "list_folder", root.parent / "list_folder") if path.is_dir()), root)
        listing /= f"{split}.txt"
        keys = set(listing.read_text().split()) if listing.is_file() else set()
        for key in keys:
            if "/" in key or "\\" in key or key == "..":
                raise ValueError(f"{listing} lists {key!r}, which could lead out of {root}; list plain frame names")
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
                 size: int | tuple[int, int] | None, augment: bool, seed: int, table: np.ndarray,
                 shrink_only: bool = False) -> None:
        self.shrink_only = shrink_only
        self.name, self.frames, self.classes, self.palette, self.modalities = name, frames, classes, palette, modalities
        self.size, self.augment, self.seed, self.table = size, augment, seed, table
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
        readers = {("muses", "lidar"): read_muses_range, ("muses", "radar"): read_muses_range}
        reader = read_mcubes if self.name == "mcubes" else read_image
        images = [readers.get((self.name, modality), reader)(path)
                  for modality, path in zip(self.modalities, frame.images, strict=True)]
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
                images[m] = images[m].resize(label.shape[::-1], NEAREST)    # eventlowres: 512 x 512 of 1042 x 1042
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
        rng = np.random.default_rng([self.seed, epoch, index])
        height, width = label.shape
        if self.augment:
            crop = (self.size, self.size) if isinstance(self.size, int) else self.size or label.shape
            # From the published training: 0.5..2. Small painted scenes have fewer pixels to lose.
            scale = rng.uniform(*((0.8, 1.25) if self.name == "synthetic" else (0.5, 2)))
            scaled, flip = (round(height * scale), round(width * scale)), rng.random() < 0.5
            # Where the crop begins in the scaled frame: below 0, so with padding first, where the frame is smaller.
            top, left = (int(rng.integers(min(0, s - c), max(0, s - c) + 1)) for s, c in zip(scaled, crop, strict=True))
        else:
            scale = self.size / min(height, width) if isinstance(self.size, int) else 1
            scale = min(scale, 1) if self.shrink_only else scale
            scaled = self.size if isinstance(self.size, tuple) else (round(height * scale), round(width * scale))
            crop, flip, top, left = scaled, False, 0, 0
        # Only what the crop shows is resized: rows y0..y1 and columns x0..x1 of the scaled frame.
        y0, y1, x0, x1 = max(top, 0), min(top + crop[0], scaled[0]), max(left, 0), min(left + crop[1], scaled[1])
        box = (x0 * width / scaled[1], y0 * height / scaled[0], x1 * width / scaled[1], y1 * height / scaled[0])
        rows, columns, step = slice(y0 - top, y1 - top), slice(x0 - left, x1 - left), 1
        if flip:
            columns, step = slice(crop[1] - columns.stop, crop[1] - columns.start), -1

        pixels = np.zeros((len(images), 3, *crop), self.dtype)
        for m, modality in enumerate(self.modalities):
            image = resize(images[m], (y1 - y0, x1 - x0), NEAREST if modality in SPARSE else BILINEAR, box)
            if self.augment and modality == "rgb":
                image = jitter(image, rng)
            if image.dtype == np.uint8 and self.dtype == np.float32:
                image = image / np.float32(255)
            pixels[m, :, rows, columns] = image[:, ::step].transpose(2, 0, 1)   # (3 or 1 -> 3, h, w)
        classes = np.full(crop, IGNORED, np.uint8)  # int64 on the device only: an eighth of the bytes to move
        label = Image.fromarray(label)
        classes[rows, columns] = resize(label, (y1 - y0, x1 - x0), NEAREST, box)[:, ::step, 0]
        return torch.from_numpy(pixels), torch.from_numpy(classes), self.frames[index].name


def shape_of(image: Picture) -> tuple[int, int]:
    return image.size[::-1] if isinstance(image, Image.Image) else image.shape[:2]


def resize(image: Picture, size: tuple[int, int], method: Image.Resampling,
           box: tuple[float, float, float, float]) -> np.ndarray:
    """The part `box` (left, top, right, bottom) of an image, as an (h, w, 1 or 3) uint8 or float32 array of `size`."""
    if size == shape_of(image) and box == (0, 0, *size[::-1]):
        return np.atleast_3d(np.asarray(image))
    if isinstance(image, Image.Image):
        return np.atleast_3d(np.asarray(image.resize(size[::-1], method, box)))
    planes = [Image.fromarray(plane).resize(size[::-1], method, box) for plane in image.transpose(2, 0, 1)]
    return np.dstack([np.asarray(plane) for plane in planes])


def jitter(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """RGB (H, W, 1 or 3): brightness, contrast and saturation by 0.5..1.5, and a 3 x 3 blur, each with probability 0.2.

    Not in the paper: strengths and probabilities are those of the published CMNeXt training.
    """
    (brightness, contrast, saturation), (colour, blur) = rng.uniform(0.5, 1.5, 3), rng.random(2) < 0.2
    if not colour and not blur:
        return image
    values, top = image.astype(np.float32), 255 if image.dtype == np.uint8 else 1
    if colour:      # each of the three is linear, so together one matrix and one offset
        grey = np.array([[0.299], [0.587], [0.114]] if image.shape[2] == 3 else [[1.0]])    # (C, 1)
        mix = brightness * contrast * (saturation * np.eye(len(grey)) + (1 - saturation) * grey)
        mean = (values.mean((0, 1)) @ grey).item()
        values = values @ mix.astype(np.float32)
        values += np.float32(brightness * (1 - contrast) * mean)
    if blur:        # weights 1 2 1 along both axes
        for lines in (values, values.swapaxes(0, 1)):
            beside = lines[:-2] + lines[2:]
            beside /= 4
            lines[1:-1] /= 2
            lines[1:-1] += beside
    if top == 255:
        np.rint(values, out=values)
    return np.clip(values, 0, top, out=values).astype(image.dtype)


def open_dataset(name: str, root: str | Path | None = None, split: str = "train", modalities: list[str] | None = None,
                 size: int | tuple[int, int] | None = None, augment: bool = False, seed: int = 0,
                 limit: int | None = None, depth: str = "hha", condition: str | None = None, case: str | None = None,
                 label_map: dict[int, int] | str | None = None, skip_broken: int = 0,
                 shrink_only: bool = False) -> FrameDataset:
    """Open a split of a data set; what it yields is said at `FrameDataset`.

    modalities: which and in which order; by default all, but for MUSES those of the papers' tables (no radar).
    size: with `augment`, the crop S x S or (H, W). Without, the length S of the shorter side, with the aspect kept, or
        exactly (H, W). None leaves frames as they are. Synthetic scenes are painted at `size` (by default 64).
    shrink_only: leave frames as they are whose shorter side is below `size`.
    limit: at most so many frames, spread evenly over the sorted list; for synthetic, the number of scenes.
    depth: "hha" or "raw" (DELIVER). condition, case: frames of these only; synthetic paints every scene like that.
    label_map: for the ids of a folder data set, see `label_table`.
    skip_broken: if above 0, open every file now and leave out up to so many broken frames, told in `dataset.broken`.
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
    if name == "synthetic":
        classes, palette = [name for name, _ in synthetic.CLASSES], np.array([rgb for _, rgb in synthetic.CLASSES], np.uint8)
        known = ["rgb", "depth", "event", "lidar"]
    else:
        layout = LAYOUTS[name]
        if root is None or not Path(root).is_dir():
            raise FileNotFoundError(f"{root or f'--data {name} without --root'}: no such folder; {layout.title} is "
                                    f"expected below its root as {layout.expected}; {layout.source}")
        root = Path(root) / "multimodal_dataset" if name == "mcubes" else Path(root)
        root = root if root.is_dir() else root.parent
        if name == "folder":
            folders = sorted(path.name for path in root.iterdir() if path.name != "labels"
                             and any((path / split).is_dir() for split in SPLITS))
            layout = layout._replace(sensors={m: (m, ".png") for m in sorted(folders, key=lambda m: m != "rgb")})
        elif depth == "raw" and name == "deliver":
            layout = layout._replace(sensors={**layout.sensors, "depth": ("depth", "_depth_front.png")})
        known = list(layout.sensors)
        classes, palette = (read_classes(root / "classes.txt") if name == "folder"
                            else parse_classes(layout.classes.split(",")))
    if modalities is None:
        modalities = [m for m in known if (name, m) != ("muses", "radar")]
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
        frames = find_frames(name, layout, root, split, modalities) if modalities else []
        if not frames:
            raise FileNotFoundError(f"{root} has no {split} frames of {layout.title}; expected {layout.expected}; "
                                    f"{layout.source}")
        for kind, wanted in (("condition", condition), ("case", case)):
            occurring = sorted({getattr(frame, kind) for frame in frames})
            if wanted is not None and wanted not in occurring:
                raise ValueError(f"{kind} {wanted!r} is in no {split} frame; choose one of {', '.join(occurring)}")
            frames = [frame for frame in frames if wanted in (None, getattr(frame, kind))]
        count = min(limit or len(frames), len(frames))
        frames = [frames[i * len(frames) // count] for i in range(count)]
    table = label_table(label_map or ("shift:-1" if name == "deliver" else "shift:0"), len(classes))
    dataset = FrameDataset(name, frames, classes, palette, modalities, size, augment, seed, table, shrink_only)
    if name != "synthetic":
        dataset.learn_kinds(lenient=skip_broken > 0)
    if skip_broken:
        dataset.open_all(skip_broken)
        if not dataset.frames and skip_broken < sys.maxsize:    # that is --check, which reports them
            raise ValueError(f"all {split} frames are broken; the last one: {dataset.broken[-1]}")
    return dataset


# ---- on the device: normalisation, modality dropping, corruptions ---------------------------------------------------
def normalise(images: Tensor) -> Tensor:
    """(..., 3, H, W) uint8, or float about 0..1, to float32 by ImageNet's mean and deviation, whatever the sensor."""
    images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


def draw_present(batch_size: int, modalities: int, generator: torch.Generator, complete: float = 0.0) -> Tensor:
    """Which sensors each sample keeps, (B, M) bool: a number uniform in 1..M, then a uniform subset of that size.

    With probability `complete` all of them. `generator` is on the CPU and moves by the same amount in any case.
    """
    number = torch.randint(1, modalities + 1, (batch_size, 1), generator=generator)
    rank = torch.rand(batch_size, modalities, generator=generator).argsort(1).argsort(1)    # (B, M) permutations
    return (rank < number) | (torch.rand(batch_size, 1, generator=generator) < complete)


def zero_fill(images: Tensor, present: Tensor) -> Tensor:
    """EMM: the missing modalities of normalised images (B, M, 3, H, W) become zero; present (B, M) bool."""
    return images.masked_fill(~present[:, :, None, None, None], 0)


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
                                   label_map=options.label_map, skip_broken=sys.maxsize)
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
    group.add_argument("--depth", choices=("hha", "raw"), default="hha", help="DELIVER's depth files (default hha)")
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
