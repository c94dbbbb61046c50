"""Data: DELIVER, MUSES, MCubeS, NYU Depth v2, a folder, synthetic scenes, as (images (M, 3, H, W), label (H, W), name).

    python data.py --data deliver --root data/DELIVER --check       # count, open every file once, list the broken
    python data.py --export data/mini --layout deliver --count 24   # synthetic scenes in DELIVER's layout and formats

Then the joint augmentation of training, modality dropping (stage 1), and the corruptions of RMM and NM.
Axes: B batch, M modalities, K classes, C channels, H, W image size. A label of 255 is ignored everywhere.
"""

import argparse
import errno
import filecmp
import itertools
import math
import os
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

from datasets import synthetic
from datasets.derived import frame_rng
from datasets.export import export
from datasets.files import IGNORED, IMAGENET, Frame, learn_ranges, nearest, read_frame, read_label, scaled, turned
from datasets.layouts import DATASETS, LAYOUTS, find_frames, label_table, open_layout, spread

# The published 3 x 3 Gaussian blur: a deviation of 0.8 pixels.
BLUR = ImageFilter.Kernel((3, 3), [math.exp(-(x**2 + y**2) / (2 * 0.8**2)) for y in (-1, 0, 1) for x in (-1, 0, 1)])
CACHE_BYTES = 256 * 2**20  # a split of synthetic scenes that fits is kept in memory once painted


# ---- the frames of a split ------------------------------------------------------------------------------------------
@dataclass(eq=False, repr=False)
class FrameDataset(torch.utils.data.Dataset):
    """The frames of a split; made by `open_dataset`.

    dataset[index] or dataset[epoch, index] is (images (M, 3, H, W), label (H, W) uint8, name). The images are uint8
    when all modalities are 8 bit, else float32: 0..1 for 8 and 16 bit, a .npy file's own scale, 100 metres for MUSES
    ranges. What is random depends on (seed, epoch, index) alone, so neither on workers nor on where a run was resumed.
    """

    name: str
    frames: list[Frame]
    classes: list[str]
    palette: np.ndarray  # (K, 3)
    modalities: list[str]
    size: int | tuple[int, int] | None
    augment: bool
    seed: int
    table: np.ndarray  # see `label_table`
    split: str
    ranges: dict[str, list] = field(default_factory=dict)  # of each modality, see `learn_ranges`
    normalisation: list[list] = field(default_factory=list)  # mean and deviation of each modality, see `normalise`
    cache: dict[int, tuple] = field(default_factory=dict)  # see `read`
    broken: list[str] = field(default_factory=list)  # by `open_all`: a sentence for each frame that is left out
    looks: list[tuple] = field(default_factory=list)  # of the others, see `open_all`
    notes: str = ""  # what `describe` says of a folder besides

    def __len__(self) -> int:
        return len(self.frames)

    def read(self, index: int) -> tuple[list[np.ndarray], np.ndarray]:
        """The frame at its own size: an (H, W, 1 or 3) uint8 or float32 per modality, and the label (H, W) uint8."""
        if self.name != "synthetic":
            return read_frame(self.name, self.modalities, self.frames[index], self.table, self.palette, self.ranges)
        if index in self.cache:
            return self.cache[index]
        scene = synthetic.paint(0, self.split, index, self.size or 64)
        item = [scene[modality] for modality in self.modalities], scene["label"]
        if len(self) * scene["label"].size * (3 * len(self.modalities) + 1) < CACHE_BYTES:
            self.cache[index] = item
        return item

    def describe(self) -> str:
        """One line: name, split, number of frames; each modality with kind, range, and what normalises it."""
        what = [
            f"{modality} ({kind}, {low:g}..{high:g}, mean {np.mean(mean):.3g}, deviation {np.mean(deviation):.3g})"
            for modality, (kind, low, high, mean, deviation) in self.ranges.items()
        ]
        frames = f"{len(self)} frames" + (", ranges of train" if self.split != "train" else "")
        return f"{self.name} {self.split}, {frames}: {', '.join(what)}{self.notes}"

    def unseen(self) -> list[str]:
        """The classes that no pixel of this split has, read until none is left; ValueError if no pixel has a class."""
        pixels, codes = np.zeros(256, np.int64), (self.table, self.palette)
        for i, frame in enumerate(self.frames):
            label = read_label(self.name, frame.label, *codes) if frame.label else self.read(i)[1]
            pixels += np.bincount(label.ravel(), minlength=256)
            if pixels[: len(self.classes)].all():
                break
        if not self.frames and self.broken:
            raise ValueError(f"all frames of the {self.split} split are broken; the last one: {self.broken[-1]}")
        if not pixels[:IGNORED].any():
            which = f"the {len(self)} frames of the {self.split} split"
            raise ValueError(f"not one pixel of {which} has a class; look at the labels and --label-map")
        return [name for name, count in zip(self.classes, pixels, strict=False) if not count]

    def open_all(self, allowed: int | None) -> None:
        """Read every frame, leave out the broken; ValueError if more than `allowed`, or all, are (None: never)."""

        def look(index: int) -> tuple | str:
            try:
                images, label = self.read(index)
                medians = [float(np.median(image[image != 0])) if image.any() else 0.0 for image in images]
                means = [float(scaled(image).mean()) for image in images]
                return label.shape, np.bincount(label.ravel(), minlength=256), medians, list(map(mark, images)), means
            except (ValueError, OSError) as error:
                return str(error)

        with ThreadPoolExecutor() as pool:
            looks = list(pool.map(look, range(len(self))))
        self.broken = [look for look in looks if isinstance(look, str)]
        self.looks = [look for look in looks if not isinstance(look, str)]
        self.frames = [frame for frame, look in zip(self.frames, looks, strict=True) if not isinstance(look, str)]
        if allowed is not None and (len(self.broken) > allowed or not self.frames):
            what = f"{len(self.broken)} of {len(looks)} {self.split} frames are broken, but --skip-broken is {allowed}"
            raise ValueError(f"{what}; the last one: {self.broken[-1]}")

    def augmented(self, images: list, label: np.ndarray, crop: int, rng: np.random.Generator) -> tuple:
        """What training sees of a frame as of `read`: images (h, w, C) and label (h, w), with h and w at most `crop`.

        As published (DELIVER, semseg/augmentations_mm.py): colour jitter and blur of rgb, a flip, the shorter side
        scaled to `scales` times the crop, a random crop. Here the crop comes first, so that only what it shows is
        resized; that moves pixels by less than one.
        """
        # Synthetic scenes are painted at the crop's size, and have fewer pixels to lose.
        scales = (0.8, 1.25) if self.name == "synthetic" else (0.5, 2)
        scale, flip = rng.uniform(*scales) * crop / min(label.shape), rng.random() < 0.5
        size = [min(crop, round(side * scale)) for side in label.shape]
        seen = [min(side, round(crop / scale)) for side in label.shape]
        top, left = (int(rng.integers(side - part + 1)) for side, part in zip(label.shape, seen, strict=True))
        window = slice(top, top + seen[0]), slice(left, left + seen[1])
        images = [jitter(images[m], rng) if name == "rgb" else images[m] for m, name in enumerate(self.modalities)]
        images, label = [resize(image[window], size) for image in images], label[window]
        if flip:
            images, label = [image[:, ::-1] for image in images], label[:, ::-1]
        return images, nearest(label, size)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor, str]:
        epoch, index = key if isinstance(key, (tuple, list)) else (0, key)
        index = range(len(self))[index]  # IndexError past the end
        images, label = self.read(index)
        kind = np.result_type(*images)  # uint8, or float32 if any modality is
        if self.augment:
            crop = self.size or min(label.shape)
            images, label = self.augmented(images, label, crop, np.random.default_rng([self.seed, epoch, index]))
        elif self.name != "synthetic":
            for size in resized_to(label.shape, self.size):
                images, label = [resize(image, size) for image in images], nearest(label, size)
        h, w = label.shape
        H, W = (crop, crop) if self.augment else (h, w)
        pixels, classes = np.zeros((len(images), 3, H, W), kind), np.full((H, W), IGNORED, np.uint8)
        for image, into in zip(images, pixels, strict=True):  # (h, w, 1 or 3) -> (3, h, w)
            into[:, :h, :w] = (image if image.dtype == kind else image / np.float32(255)).transpose(2, 0, 1)
        classes[:h, :w] = label  # int64 on the device only: an eighth of the bytes to move
        return torch.from_numpy(pixels), torch.from_numpy(classes), self.frames[index].name


def mark(image: np.ndarray) -> float:
    """The share of pixels that the smallest or the largest value has, if it is not 0; 1 for a constant image."""
    ends = [end for end in (image.min(), image.max()) if end != 0]
    return max((float((image == end).mean()) for end in ends), default=0.0) if np.ptp(image) else 1.0


# ---- resizing and colours, as published (DELIVER, semseg/augmentations_mm.py) ---------------------------------------
def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, C) uint8 or float32 at size (h, w), bilinear with antialiasing."""
    planes = torch.from_numpy(image).permute(2, 0, 1)[None]  # (1, C, H, W)
    return F.interpolate(planes, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


def resized_to(shape: tuple[int, int], size: int | tuple[int, int] | None) -> list[tuple[int, int]]:
    """The sizes that validation brings a frame (H, W) to, one after the other; `size` as in `open_dataset`."""
    if not isinstance(size, int):
        return [size] if size else []
    first = tuple(round(side * size / min(shape)) for side in shape)
    return list(dict.fromkeys([first, tuple(math.ceil(side / 32) * 32 for side in first)]))


def jitter(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """RGB, in a fifth of cases with brightness, contrast and saturation times 0.5..1.5, in a fifth blurred.

    In 8 bit, as published; a float image in 256 levels up to its largest value.
    """
    colour, blur = rng.random(2) < 0.2
    if not colour and not blur:
        return image
    top = None if image.dtype == np.uint8 else max(float(image.max()), 1e-6)  # 10-bit colour fills 1/64 of 16 bit
    image = np.rint(image * (255 / top)).astype(np.uint8) if top else image
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    if colour:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            picture = enhance(picture).enhance(rng.uniform(0.5, 1.5))
    image = np.atleast_3d(np.array(picture.filter(BLUR) if blur else picture))
    return image * np.float32(top / 255) if top else image


def open_dataset(
    name: str,
    root: str | Path | None = None,
    split: str = "train",
    modalities: list[str] | None = None,  # in this order; None or empty: all but those named below
    size: int | tuple[int, int] | None = None,  # with `augment`, the crop's side; synthetic scenes: by default 64
    augment: bool = False,
    seed: int = 0,  # of the augmentation
    limit: int | None = None,  # at most so many frames, evenly spread; of synthetic, their number; None or 0: all
    depth: str = "hha",  # or "raw", of DELIVER and nyuv2
    classes: int = 40,  # or 13, of nyuv2
    hold_out: int = 0,  # of nyuv2: validate on so many frames of the train list, evenly spread and not trained on
    label_map: str | None = None,  # of a folder's ids, see `label_table`
    skip_broken: int | None = 0,  # if not 0, open all files now and leave out at most so many frames; None: any number
    ranges: dict[str, list] | None = None,  # what values must keep to, and are normalised by; None: by the train split
) -> FrameDataset:
    """Open a split of a data set; what it yields is said at `FrameDataset`.

    Used only where they are asked for: radar of MUSES, event and lidar of nyuv2, of a folder what is named or filled
    like labels. Without `augment`, the shorter side becomes `size`, then both go up to a multiple of 32; (H, W) is
    exact; None leaves frames as they are. With hold_out 0, nyuv2 validates on the test list, as everyone reports it.
    Raises ValueError or FileNotFoundError with one sentence about what is missing or wrong.
    """
    given = [("data set", name, DATASETS), ("split", split, synthetic.SPLITS)]
    given += [("depth", depth, ("hha", "raw")), ("number of classes", classes, (13, 40))]
    for what, value, known in given:
        if value not in known:
            raise ValueError(f"{what} {value!r} is unknown; choose one of {', '.join(map(str, known))}")
    if name == "synthetic" and root is not None:
        raise ValueError(f"--root {root} means nothing to synthetic scenes: add --data folder, or the data set's name")
    if depth == "raw" and not (name in LAYOUTS and LAYOUTS[name].raw_depth):
        raise ValueError(f"--depth raw is for deliver and nyuv2; {name} has its own depth")
    if label_map is not None and name != "folder" or (classes, hold_out) != (40, 0) and name != "nyuv2":
        raise ValueError(f"a label map is for folder data sets, --classes and --hold-out for nyuv2; {name} has its own")
    layout, root, names, palette = open_layout(name, root, depth, classes)
    modalities = modalities or [modality for modality in layout.modalities if modality not in layout.unasked]
    known = ", ".join(layout.modalities) or "none"
    for modality in modalities:
        if modality not in layout.modalities or modalities.count(modality) > 1:
            raise ValueError(f"modality {modality!r} is unknown or given twice; {root or name} has {known}")
    if name == "synthetic":
        count = limit or (2000 if split == "train" else 200)
        frames = [Frame(f"{split}/{i:06d}", *synthetic.weather(i)) for i in range(count)]
        ranges = {modality: ["8 bit", 0, 255, *IMAGENET] for modality in modalities}
    else:
        frames = find_frames(name, layout, root, split, modalities, hold_out) if modalities else []
        if not frames:
            near = [path for path in Path(root).glob("*/*") if path.name.lower().startswith(split) and path.is_dir()]
            alike = [path for path in near if path.name != split]
            what = f"rename {alike[0]} and its like to {split}" if alike else LAYOUTS[name].expected()
            if layout.unasked and not modalities:
                what = f"{layout.unasked[0]} is named or filled like labels; use it by --modalities {layout.unasked[0]}"
            raise FileNotFoundError(f"{root} has no {split} frames of {name}; {what}")
        train = frames if split == "train" else find_frames(name, layout, root, "train", modalities, hold_out)
        if split != "train":
            real = {os.path.realpath(frame.images[0]) for frame in train}
            both = [frame.name for frame in frames if os.path.realpath(frame.images[0]) in real]
            both += copies(spread(frames, 16), train) if name == "folder" else []
            if both:
                raise ValueError(f"{len(both)} frames of {split} are frames of train as well, such as {both[0]}")
    table = label_table(label_map or layout.label_map, len(names))
    dataset = FrameDataset(name, spread(frames, limit), names, palette, modalities, size, augment, seed, table, split)
    if ranges and split != "train" and name in ("nyuv2", "folder"):
        refuse_unlike(learn_ranges(name, modalities, spread(frames, 16), table, palette), ranges, split)
    ranges = ranges or learn_ranges(name, modalities, spread(train or frames, 64), table, palette)
    if ranges:  # if any of those frames is sound
        dataset.ranges = {modality: ranges[modality] for modality in modalities}
        dataset.normalisation = [[ranges[modality][part] for modality in modalities] for part in (3, 4)]
    if name == "folder":
        if unused := [modality for modality in layout.unasked if modality not in modalities]:
            dataset.notes += f"; not used, as named or filled like labels: {', '.join(unused)}"
        others = (path for path in sorted(root.iterdir()) if path.is_dir() and path.name[0] != ".")
        if stray := [path.name for path in others if not any((path / part).is_dir() for part in synthetic.SPLITS)]:
            dataset.notes += f"; not used, as without a folder train or val: {', '.join(stray)}"
        files = {frame.name: (*frame.images, *([frame.label] if frame.label else [])) for frame in spread(frames, 64)}
        if some := [name for name, paths in files.items() if len(set(map(turned, paths))) > 1]:
            dataset.notes += f"; warning: EXIF turns some files of {some[0]}, but not all"
    if skip_broken != 0:
        dataset.open_all(skip_broken)
    return dataset


def copies(frames: list[Frame], train: list[Frame]) -> list[str]:
    """The names of those frames whose files have the content of a training frame's, whatever their names."""
    by_size = defaultdict(list)  # bytes of each file: the training frames
    for frame in train:
        by_size[sizes_of(frame)].append(frame)
    pairs = [(frame, other) for frame in frames for other in by_size[sizes_of(frame)] if None not in sizes_of(frame)]
    same = [f.name for f, other in pairs if all(map(filecmp.cmp, f.images, other.images, itertools.repeat(False)))]
    return list(dict.fromkeys(same))


def sizes_of(frame: Frame) -> tuple:
    return tuple(path.stat().st_size if path.is_file() else None for path in frame.images)


def refuse_unlike(found: dict[str, list], ranges: dict[str, list], split: str) -> None:
    """ValueError if the largest values of a 16-bit or float modality are off by a factor of 8 from train's."""
    for modality, (kind, low, high, *_) in found.items():
        known, _, top, *_ = ranges[modality]
        if kind == known != "8 bit" and low >= 0 and not top / 8 < high < 8 * top:
            what = f"{modality} reaches {high:g} in {split}, but {top:g} in train"
            raise ValueError(f"{what}; is one of the splits in another unit, or a sensor dead?")


# ---- on the device: normalisation, modality dropping, corruptions ---------------------------------------------------
def normalise(images: Tensor, mean: list, deviation: list) -> Tensor:
    """(..., M, 3, H, W) uint8, or float about 0..1, to float32 as the network takes it: (x - mean) / deviation.

    mean, deviation: (M, 3) numbers, of each modality and channel of values in 0..1; a data set's `normalisation`.
    """
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}; give uint8, or float: 16 bit divided by 65535")
    images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    mean, deviation = (torch.tensor(x, device=images.device)[..., None, None] for x in (mean, deviation))
    return (images - mean) / deviation


def draw_present(batch_size: int, modalities: int, generator: torch.Generator, complete: float = 0.0) -> Tensor:
    """Which modalities each sample keeps, (B, M) bool: a number uniform in 1..M, then a uniform subset of that size.

    With probability `complete` all of them. `generator` is on the CPU.
    """
    number = torch.randint(1, modalities + 1, (batch_size, 1), generator=generator)
    rank = torch.rand(batch_size, modalities, generator=generator).argsort(1).argsort(1)  # (B, M) permutations
    return (rank < number) | (torch.rand(batch_size, 1, generator=generator) < complete)


def incomplete(images: Tensor, present: Tensor, absent: str) -> tuple[Tensor, Tensor]:
    """What a model is given of normalised images (B, M, 3, H, W) and present (B, M) -> images, present.

    absent: "skip", absent modalities are left out; "zero", as in the authors' zero-filling scripts: they are zero
    images, encoded and matched like any other.
    """
    if absent == "skip":
        return images, present
    return images * present.to(images.device)[:, :, None, None, None], torch.ones_like(present)


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
            rng, image = frame_rng(seed, name, m), images[b, m]  # (3, H, W), a view
            pepper, salt = image.amin(), image.amax()
            chance = torch.from_numpy(rng.random(image.shape, np.float32)).to(image.device)
            image.copy_(torch.where(chance < density / 2, pepper, torch.where(chance >= 1 - density / 2, salt, image)))
            if modality != "event":
                image += deviation * torch.from_numpy(rng.standard_normal(image.shape, np.float32)).to(image.device)
    return images


# ---- command line ---------------------------------------------------------------------------------------------------
def say(text: str) -> None:
    """Prints a line. Once nobody reads any more, as after `| head`, the work goes on without; of a full disk, it says
    so on stderr."""
    try:
        print(text, flush=True)
    except OSError as error:
        sys.stdout = open(os.devnull, "w")
        if error.errno == errno.ENOSPC:  # else what follows would be lost without a word
            print(f"warning: what follows cannot be printed: {error.strerror}", file=sys.stderr)


def by_comma(text: str) -> list[str]:
    """Type of an option: names, separated by commas."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found or len(set(found)) != len(found):
        raise argparse.ArgumentTypeError(f"'{text}' must be names separated by commas, none twice")
    return found


def remarks(dataset: FrameDataset, pixels: np.ndarray) -> list[str]:
    """Remarks for the user on a split whose frames were all read; pixels (256,): of each class."""
    sizes = Counter(f"{rows} x {columns}" for (rows, columns), *_ in dataset.looks).most_common(5)
    found = [f"{count} frames of {size} pixels" for size, count in sizes] + dataset.broken
    if pixels[0] and pixels[IGNORED] and not pixels[1:IGNORED].any():
        found.append("warning: labels of 0 and 255 alone, and 255 is ignored; for binary masks, --label-map 0=0,255=1")
    for m, (modality, (kind, low, _, mean, deviation)) in enumerate(dataset.ranges.items() if dataset.looks else ()):
        medians, marks, means = (np.array([look[part][m] for look in dataset.looks]) for part in (2, 3, 4))
        if (constant := int((marks == 1).sum())) > len(marks) / 10:
            found.append(f"warning: {modality} is constant in {constant} of {len(marks)} frames; is the sensor dead?")
        if kind != "8 bit" and (share := np.median(marks)) > 0.05 and not constant:
            what = f"{share:.0%} of {modality} is its largest or smallest value"
            found.append(f"warning: {what}; 0 must stand for nothing measured")
        if abs(off := (means.mean() - np.mean(mean)) / np.mean(deviation)) > 2:
            what = f"{modality} is on average {off:+.1f} deviations from train's mean"
            found.append(f"warning: {what}; is it of another unit, or another sensor?")
        middle = np.quantile(medians, 0.5, method="higher")
        far = (marks < 1) & (middle > 0) & ((medians > 5 * middle) | (5 * medians < middle))
        if kind != "8 bit" and low >= 0 and far.any():
            first = dataset.frames[far.argmax()].name
            found.append(f"warning: {modality} of {far.sum()} frames, such as {first}, is 5 times off; another unit?")
    return [f"{dataset.split}: {text}" for text in found]


def check(args: argparse.Namespace) -> int:
    """Read every frame and tell what is there -> exit status 1 if a frame is broken, 2 if training would refuse."""
    options = {name: getattr(args, name) for name in ("modalities", "depth", "label_map", "classes")}
    parts, refused, notes = [], [], []
    for split in synthetic.SPLITS:
        try:
            ranges = parts[0].ranges if parts else None
            parts.append(open_dataset(args.data, args.root, split, skip_broken=None, ranges=ranges, **options))
            say(f"{parts[-1].describe()}; {len(parts[-1].broken)} broken")
            if not (split == "test" and parts[-1].frames and parts[-1].frames[0].label is None):
                parts[-1].unseen()  # but for a test split without labels
        except (ValueError, FileNotFoundError) as error:
            refused += [error] * (split != "test")  # which may be absent, or without labels
            notes += [f"test: {error}"] * (split == "test" and isinstance(error, ValueError))
    if not parts:
        raise refused[0]
    pixels = [sum((look[1] for look in part.looks), np.zeros(256, int)) for part in parts]
    say(f"\n{'percent of pixels':24}" + "".join(f"{part.split:>8}" for part in parts))
    for c, name in [*enumerate(parts[0].classes), (IGNORED, "(ignored)")]:
        shares = [f"{100 * count[c] / count.sum():.2f}" if count[c] else "none" for count in pixels]
        say(f"{name:24}" + "".join(f"{share:>8}" for share in shares))
    found = [text for part, count in zip(parts, pixels, strict=True) for text in remarks(part, count)]
    say("\n".join(found + notes))
    for error in refused:
        print(f"training would refuse: {error}", file=sys.stderr)
    return 2 if refused else int(any(part.broken for part in parts))


def main() -> int:
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shown, allow_abbrev=False)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--check", action="store_true", help="read all of --data; status 1: a broken file, 2: refused")
    task.add_argument("--export", type=Path, metavar="DIR", help="write synthetic scenes into this new folder")
    add = parser.add_argument_group("for --check").add_argument
    add("--data", choices=DATASETS, default="synthetic", help="data set (default synthetic)")
    add("--root", help="its folder")
    add("--modalities", type=by_comma, help="by comma (all, but muses no radar, nyuv2 rgb,depth)")
    add("--depth", choices=("hha", "raw"), default="hha", help="of deliver and nyuv2 (default hha)")
    add("--classes", type=int, choices=(13, 40), default=40, help="of nyuv2 (default 40)")
    add("--label-map", help="ids of a folder's labels: shift:-1, or 0=255,1=0,... with 255 for ignored")
    add = parser.add_argument_group("for --export").add_argument
    add("--layout", choices=tuple(LAYOUTS), default="deliver", help="whose (default deliver)")
    add("--count", type=int, default=24, help="scenes, 4 or more; half go to train (default 24)")
    add("--size", type=int, default=256, help="height in pixels, 8 or more (default 256)")
    add("--seed", type=int, default=0, help="0 or more; another seed gives other scenes (default 0)")
    args = parser.parse_args()
    others = {"--layout", "--count", "--size", "--seed"}
    if args.export:
        others = {"--data", "--root", "--modalities", "--depth", "--classes", "--label-map"}
    if useless := others & {word.partition("=")[0] for word in sys.argv}:
        parser.error(f"{min(useless)} has no effect on --{'export' if args.export else 'check'}: leave it out")
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may be no UTF-8
    try:
        if args.check:
            return check(args)
        export(args.export, args.layout, args.count, args.size, args.seed)
    except (ValueError, OSError) as error:
        unfinished = f"{args.export} is not complete: " if args.export and isinstance(error, OSError) else ""
        print(f"data.py: {unfinished}{error}", file=sys.stderr)
        return 2
    say(f"{args.count} scenes written; next: python data.py --data {args.layout} --root {args.export} --check")
    return 0


if __name__ == "__main__":
    sys.exit(main())
