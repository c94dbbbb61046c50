"""Data: DELIVER, MUSES, MCubeS, your own folder and painted scenes, as (images (M, 3, H, W), label (H, W), name).

    python data.py --data deliver --root data/DELIVER --check       # count, open every file once, list the broken
    python data.py --export data/mini --layout deliver --count 24   # painted scenes in DELIVER's layout and formats

Then the joint augmentation of training, modality dropping (stage 1), and the corruptions of EMM, RMM and NM.
Axes: B batch, M modalities, K classes, H W image size. A label of 255 is ignored everywhere.
"""
import argparse
import colorsys
import os
import struct
import sys
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import scenes

IGNORED = 255
SPLITS = ("train", "val", "test")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NEAREST, BILINEAR = Image.Resampling.NEAREST, Image.Resampling.BILINEAR
SPARSE = ("event", "lidar", "radar")    # resized by NEAREST: the mean of a point and of nothing is neither
SYNTHETIC_COUNT = {"train": 2000, "val": 200, "test": 200}
CACHE_BYTES = 256 * 2**20               # a split of painted scenes that fits is kept in memory once painted


# ---- classes and layouts --------------------------------------------------------------------------------------------
class Layout(NamedTuple):
    """Where a data set keeps its files: FOLDER/pattern, with a frame's key being the path less folder and ending."""
    title: str
    classes: str                            # "name r g b, ..."
    sensors: dict[str, tuple[str, str]]     # modality -> (folder, ending of the file names)
    label: tuple[str, str]
    pattern: str
    expected: str                           # for people
    source: str


LAYOUTS = {
    "deliver": Layout(
        "DELIVER",
        "Building 70 70 70, Fence 100 40 40, Other 55 90 80, Pedestrian 220 20 60, Pole 153 153 153, "
        "RoadLine 157 234 50, Road 128 64 128, SideWalk 244 35 232, Vegetation 107 142 35, Cars 0 0 142, "
        "Wall 102 102 156, TrafficSign 220 220 0, Sky 70 130 180, Ground 81 0 81, Bridge 150 100 100, "
        "RailTrack 230 150 140, GroundRail 180 165 180, TrafficLight 250 170 30, Static 110 190 160, "
        "Dynamic 170 120 50, Water 45 60 150, Terrain 145 170 100, TwoWheeler 0 0 230, Bus 0 60 100, Truck 0 0 70",
        {"rgb": ("img", "_rgb_front.png"), "depth": ("hha", "_depth_front.png"),
         "event": ("event", "_event_front.png"), "lidar": ("lidar", "_lidar_front.png")},
        ("semantic", "_semantic_front.png"), "*/{split}/*/*",
        "{img,depth,hha,event,lidar,semantic}/{cloud,fog,night,rain,sun}/{train,val,test}/MAP_*_point*/*_front.png",
        "see the DELIVER (CMNeXt) project page"),
    "muses": Layout(
        "MUSES",
        "road 128 64 128, sidewalk 244 35 232, building 70 70 70, wall 102 102 156, fence 190 153 153, "
        "pole 153 153 153, traffic light 250 170 30, traffic sign 220 220 0, vegetation 107 142 35, "
        "terrain 152 251 152, sky 70 130 180, person 220 20 60, rider 255 0 0, car 0 0 142, truck 0 0 70, "
        "bus 0 60 100, train 0 80 100, motorcycle 0 0 230, bicycle 119 11 32",
        {"rgb": ("frame_camera", "_frame_camera.png"), "event": ("event_camera", "_event_camera.png"),
         "lidar": ("lidar", "_lidar.png"), "radar": ("radar", "_radar.png")},
        ("gt_semantic", "_gt_labelTrainIds.png"), "{split}/*/*/*",
        "{frame_camera,event_camera,lidar,radar,gt_semantic}/{train,val,test}/{clear,fog,rain,snow}/{day,night}/"
        "REC*_frame_*.png (the projected sensors there or below projected_to_rgb/)",
        "see the MUSES project page"),
    "mcubes": Layout(
        "MCubeS",
        "asphalt 44 160 44, concrete 31 119 180, metal 255 127 14, road_marking 214 39 40, fabric 140 86 75, "
        "glass 127 127 127, plaster 188 189 34, plastic 255 152 150, rubber 23 190 207, sand 174 199 232, "
        "gravel 196 156 148, ceramic 197 176 213, cobblestone 247 182 210, brick 199 199 199, grass 219 219 141, "
        "wood 158 218 229, leaf 57 59 121, water 107 110 207, human 156 158 222, sky 99 121 57",
        {"rgb": ("polL_color", ".png"), "aolp": ("polL_aolp_sin", ".npy"), "dolp": ("polL_dolp", ".npy"),
         "nir": ("NIR_warped", ".png")},
        ("GT", ".png"), "*",
        "multimodal_dataset/{polL_color,polL_aolp_sin,polL_aolp_cos,polL_dolp,NIR_warped,NIR_warped_mask,GT}/NAME.* "
        "and multimodal_dataset/list_folder/{train,val,test}.txt",
        "see the MCubeSNet project page"),
    "folder": Layout(
        "a folder data set", "", {}, ("labels", ".png"), "{split}/**/*",
        "classes.txt, <modality>/{train,val,test}/**/ID.{png,jpg,npy} and labels/{train,val,test}/**/ID.png",
        "python data.py --export DIR --layout folder shows one"),
}
DATASETS = ("synthetic", *LAYOUTS)


def parse_classes(entries: Iterable[str]) -> tuple[list[str], np.ndarray]:
    """Entries 'name' or 'name r g b' to the K names and a (K, 3) uint8 palette."""
    names, palette = [], []
    for words in filter(None, map(str.split, entries)):
        coloured = len(words) > 3 and all(word.isdecimal() and int(word) < 256 for word in words[-3:])
        names.append(" ".join(words[:-3] if coloured else words))
        hue = 0.618 * len(palette) % 1      # steps of the golden ratio spread any number of hues
        palette.append([int(word) for word in words[-3:]] if coloured
                       else [int(255 * value) for value in colorsys.hsv_to_rgb(hue, 0.7, 0.9)])
    return names, np.array(palette, np.uint8).reshape(-1, 3)


def read_classes(path: Path) -> tuple[list[str], np.ndarray]:
    """A folder data set's classes.txt: the class of label 0 in the first line, and so on."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; write a class a line, 'name' or 'name r g b', in label order")
    names, palette = parse_classes(path.read_text(encoding="utf-8").splitlines())
    if not 0 < len(names) < 256:
        raise ValueError(f"{path} has {len(names)} classes; expected 1 to 255, one a line")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{path} has the class {name!r} twice; give every class a name of its own")
    return names, palette


def label_table(label_map: dict[int, int] | str, num_classes: int) -> np.ndarray:
    """Id in a label file -> class or 255, as a (65536,) int16 table where -1 marks ids that must not occur.

    label_map: {id: class} or 'id=class,...' with 255 for ignored, or 'shift:N': class = id + N, ignored when below 0.
    The id 255 is ignored unless the map says otherwise.
    """
    try:
        if not isinstance(label_map, str):
            pairs = label_map
        elif label_map.startswith("shift:"):
            shift = int(label_map[len("shift:"):])
            pairs = {id: id + shift if id + shift >= 0 else IGNORED for id in range(255) if id + shift < num_classes}
        else:
            pairs = {int(id): int(target) for id, target in (pair.split("=") for pair in label_map.split(","))}
    except ValueError:
        raise ValueError(f"label map {label_map!r} is not understood; write id=class,id=class,... or shift:N") from None
    table = np.full(65536, -1, np.int16)
    table[IGNORED] = IGNORED
    for id, target in pairs.items():
        if not (0 <= id < 65536 and (0 <= target < num_classes or target == IGNORED)):
            raise ValueError(f"label map entry {id}={target} is out of range; classes are 0..{num_classes - 1} or 255")
        table[id] = target
    return table


# ---- decoding -------------------------------------------------------------------------------------------------------
Picture = Image.Image | np.ndarray  # 8 bit: L or RGB; else (H, W, 1 or 3) float32. Pillow resizes its own the fastest.


def read_file(path: Path) -> Picture:
    """The values of a file as stored: 8-bit .png and .jpg an L, P or RGB image, others an (H, W) or (H, W, C) array.

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
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return archive[archive.files[0]]
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            mode, tile = image.mode, image.tile[0]
            if mode.startswith("I"):        # 16-bit grey
                return np.asarray(image).astype(np.uint16)
            if not str(tile[3]).endswith(";16B"):
                image.load()
                return image if mode in ("L", "P", "RGB") else image.convert("RGB")
            high = np.asarray(image)
        # Of 16-bit colour, Pillow keeps the high bytes. Told that the file is little-endian, it yields the low ones.
        with Image.open(path, formats=("PNG",)) as image:
            image.tile = [(*tile[:3], tile[3].replace("16B", "16L"))]
            return (high.astype(np.uint16) << 8 | np.asarray(image))[..., :3]
    except Exception as error:              # a decoder may raise anything on a damaged file
        raise ValueError(f"{path} cannot be read: {str(error) or type(error).__name__}") from error


def read_image(path: Path) -> Picture:
    """A sensor's file: 8 bit as stored, 16 bit as float32 in 0..1, floats (.npy, .npz) as they are."""
    image = read_file(path)
    if isinstance(image, Image.Image):
        return image.convert("RGB") if image.mode == "P" else image
    image = image[..., None] if image.ndim == 2 else image
    if image.ndim != 3 or image.shape[2] not in (1, 3) or not (image.dtype.kind == "f" or image.dtype in ("u1", "u2")):
        raise ValueError(f"{path} holds {image.dtype} of shape {image.shape}; expected (H, W), (H, W, 1) or (H, W, 3) "
                         f"of uint8, uint16 or float")
    if image.dtype == np.uint8:
        return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    if image.dtype == np.uint16:
        return image.astype(np.float32) / 65535
    if not np.isfinite(image).all():
        raise ValueError(f"{path} has NaN or infinite values; replace them, for example by 0")
    return image.astype(np.float32)


def read_float(path: Path) -> np.ndarray:
    """A sensor's file as (H, W, 1 or 3) float32, 8 and 16 bit in 0..1."""
    image = read_image(path)
    return image if isinstance(image, np.ndarray) else np.atleast_3d(np.asarray(image)) / np.float32(255)


def read_muses_range(path: Path) -> np.ndarray:
    """MUSES lidar or radar: v / 100, so about 0..1 for metres. A PNG holds (v + 100) * 150, an .npz v; empty is 0."""
    if path.suffix == ".npz":
        return read_float(path) / 100
    stored = read_file(path)
    if isinstance(stored, Image.Image):
        raise ValueError(f"{path} has 8 bits; MUSES lidar and radar are 16-bit PNG files; write them with the SDK")
    return (np.atleast_3d(stored).astype(np.float32) - 15000) / 15000


def read_mcubes(path: Path) -> np.ndarray:
    """A MCubeS sensor without the left 192 columns, as is the custom; AoLP as sin, cos, sin; NIR 0 outside its mask."""
    image, root = read_float(path), path.parent.parent
    if path.parent.name == "polL_aolp_sin":
        image = np.dstack([image, read_float(root / "polL_aolp_cos" / path.name), image])
    mask = root / "NIR_warped_mask" / path.name
    if path.parent.name == "NIR_warped" and mask.is_file():
        image = image * (read_float(mask)[..., :1] > 0)
    return image[:, 192:]


def read_label(path: Path, table: np.ndarray, red: bool) -> np.ndarray:
    """A label file as (H, W) uint8 classes by `label_table`; `red`: the ids are in a colour image's red channel."""
    ids = read_file(path)
    ids = np.asarray(ids.getchannel(0) if red and isinstance(ids, Image.Image) else ids)
    if ids.ndim != 2 or ids.dtype.kind != "u":
        raise ValueError(f"{path} is no label map; expected class ids of 8 or 16 bit in one channel")
    label = table.take(ids)                 # (H, W), in int16: no id can wrap around
    if label.min() < 0:
        known = np.flatnonzero(table >= 0)
        raise ValueError(f"{path} holds the label {ids[label < 0][0]}, but the ids are {known[0]}..{known[-2]} and "
                         f"{known[-1]}; correct the file, classes.txt or --label-map")
    return label.astype(np.uint8)


# ---- the frames of a split ------------------------------------------------------------------------------------------
class Frame(NamedTuple):
    """One moment: its files in the order of the chosen modalities; `label` is None where none is published."""
    name: str
    condition: str      # the weather, or "none"
    case: str           # DELIVER's sensor failure, MUSES' day or night, or "none"
    images: tuple[Path, ...] = ()
    label: Path | None = None


def find_files(base: Path, pattern: str, ending: str) -> dict[str, Path]:
    """Frame key -> file, for all files base/pattern whose names end so, with any extension that can be read."""
    stem, found = ending.rpartition(".")[0], {}
    for path in base.glob(f"{pattern}{stem}.*"):
        key = path.relative_to(base).as_posix()[:-len(stem + path.suffix)]
        if path.suffix in (".png", ".jpg", ".npy", ".npz") and found.setdefault(key, path) != path:
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
            condition, case = folders[0], next((c for c in scenes.CASES if c in folders[2].lower()), "none")
        else:                   # split/condition/case, as far as there are such folders
            condition, case = (*folders[1:3], "none", "none")[:2]
        frames.append(Frame(key, condition, case, tuple(images), None if unlabelled else label))
    return frames


class FrameDataset(torch.utils.data.Dataset):
    """The frames of a split; made by `open_dataset`.

    dataset[index] or dataset[epoch, index] is (images (M, 3, H, W), label (H, W) int64, name). The images are uint8
    when all sensors are 8 bit, else float32: 0..1 for 8 and 16 bit, a .npy file's own scale, 100 metres for MUSES
    ranges. What is random depends on (seed, epoch, index) alone, so neither on workers nor on where a run was resumed.
    """
    ignored = IGNORED

    def __init__(self, name: str, frames: list[Frame], classes: list[str], palette: np.ndarray, modalities: list[str],
                 size: int | tuple[int, int] | None, augment: bool, seed: int, table: np.ndarray) -> None:
        self.name, self.frames, self.classes, self.palette, self.modalities = name, frames, classes, palette, modalities
        self.size, self.augment, self.seed, self.table = size, augment, seed, table
        self.dtype, self.broken, self.painted = np.uint8, [], {}

    def __len__(self) -> int:
        return len(self.frames)

    def read(self, index: int) -> tuple[list[Picture], np.ndarray]:
        """The frame at its own size: an image per modality, and the label (H, W) uint8."""
        frame = self.frames[index]
        if self.name == "synthetic":
            if index not in self.painted:
                split, number = frame.name.split("/")
                scene = scenes.paint(0, split, int(number), self.size or 64, frame.condition, frame.case)
                painted = [Image.fromarray(scene[modality]) for modality in self.modalities], scene["label"]
                if len(self) * scene["label"].size * (3 * len(self.modalities) + 1) > CACHE_BYTES:
                    return painted
                self.painted[index] = painted
            return self.painted[index]
        readers = {("muses", "lidar"): read_muses_range, ("muses", "radar"): read_muses_range}
        reader = read_mcubes if self.name == "mcubes" else read_image
        images = [readers.get((self.name, modality), reader)(path)
                  for modality, path in zip(self.modalities, frame.images, strict=True)]
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

    def drop_broken(self, allowed: int) -> None:
        """Read every frame once and leave out at most `allowed` broken ones; `broken` holds a sentence for each."""
        def problem(index: int) -> str | None:
            try:
                self.read(index)
            except (ValueError, OSError) as error:
                return str(error)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            problems = list(pool.map(problem, range(len(self))))
        self.broken = [text for text in problems if text]
        if len(self.broken) > allowed:
            raise ValueError(f"{len(self.broken)} frames are broken, more than --skip-broken {allowed}; the last one: "
                             f"{self.broken[-1]}")
        self.frames = [frame for frame, text in zip(self.frames, problems, strict=True) if not text]

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
            elif image.dtype != self.dtype:
                raise ValueError(f"{self.frames[index].images[m]} has 16 bits or floats, but all of the first frame's "
                                 f"files have 8 bits; a modality must be of one kind")
            pixels[m, :, rows, columns] = image[:, ::step].transpose(2, 0, 1)   # (3 or 1 -> 3, h, w)
        classes = np.full(crop, IGNORED, np.int64)
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
                 label_map: dict[int, int] | str | None = None, skip_broken: int = 0) -> FrameDataset:
    """Open a split of a data set; what it yields is said at `FrameDataset`.

    modalities: which and in which order; by default all, but for MUSES those of the papers' tables (no radar).
    size: with `augment`, the crop S x S or (H, W). Without, the length S of the shorter side, with the aspect kept, or
        exactly (H, W). None leaves frames as they are. Synthetic scenes are painted at `size` (by default 64).
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
    if label_map is not None and name != "folder":
        raise ValueError(f"a label map is for folder data sets only; the ids of {name} are fixed")
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit} leaves no frame; use 1 or more")
    if name == "synthetic":
        classes, palette = [name for name, _ in scenes.CLASSES], np.array([rgb for _, rgb in scenes.CLASSES], np.uint8)
        known = ["rgb", "depth", "event", "lidar"]
    else:
        layout = LAYOUTS[name]
        if root is None or not Path(root).is_dir():
            raise FileNotFoundError(f"{root or f'--data {name} without --root'}: no such folder; {layout.title} is "
                                    f"expected below its root as {layout.expected}; {layout.source}")
        root = Path(root) / "multimodal_dataset" if name == "mcubes" else Path(root)
        root = root if root.is_dir() else root.parent
        if name == "folder":
            folders = sorted(path.name for path in root.iterdir() if path.is_dir() and path.name != "labels")
            layout = layout._replace(sensors={m: (m, ".png") for m in sorted(folders, key=lambda m: m != "rgb")})
        elif depth == "raw" and name == "deliver":
            layout = layout._replace(sensors={**layout.sensors, "depth": ("depth", "_depth_front.png")})
        known = list(layout.sensors)
        classes, palette = (read_classes(root / "classes.txt") if name == "folder"
                            else parse_classes(layout.classes.split(",")))
    if modalities is None:
        modalities = [m for m in known if (name, m) != ("muses", "radar")]
    wrong = [m for m in modalities if m not in known or modalities.count(m) > 1]
    if wrong or not modalities:
        raise ValueError(f"modality {wrong[0] if wrong else 'list'!r} is unknown, empty or given twice; "
                         f"{name} has {', '.join(known)}")
    if name == "synthetic":     # condition and failure as scenes.paint chooses them by itself
        frames = [Frame(f"{split}/{i:06d}", condition or scenes.CONDITIONS[i % 5],
                        case or (scenes.CASES[i // 30 % 5] if i // 5 % 6 == 5 else "none"))
                  for i in range(limit or SYNTHETIC_COUNT[split])]
    else:
        frames = find_frames(name, layout, root, split, modalities)
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
    dataset = FrameDataset(name, frames, classes, palette, modalities, size, augment, seed, table)
    if skip_broken:
        dataset.drop_broken(skip_broken)
    if name != "synthetic" and dataset.frames and any(isinstance(image, np.ndarray) for image in dataset.read(0)[0]):
        dataset.dtype = np.float32      # the first frame decides
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


# ---- painted scenes as another data set's files ---------------------------------------------------------------------
# What each of scenes.CLASSES, in that order, is called there. Parked and moving cars are the same to all three.
EXPORT_CLASSES = {
    "deliver": "Sky,Building,Vegetation,Road,RoadLine,SideWalk,Pole,TrafficSign,Static,Cars,Cars,Pedestrian",
    "muses": "sky,building,vegetation,road,road,sidewalk,pole,traffic sign,wall,car,car,person",
    "mcubes": "sky,brick,leaf,asphalt,road_marking,concrete,metal,plastic,wood,metal,metal,human",
}
MUSES_WEATHER = {"cloud": "snow/day", "fog": "fog/day", "night": "clear/night", "rain": "rain/day", "sun": "clear/day"}


def scene_files(layout: str, split: str, index: int, scene: dict, ids: np.ndarray) -> dict[str, np.ndarray]:
    """A painted scene as the files of a data set, path -> uint8 or uint16 for PNG and float32 for .npy.

    MUSES' radar is every fourth column of the lidar. MCubeS gets 192 empty columns on the left, and depth, events and
    lidar stand in for its AoLP, DoLP and near infrared.
    """
    rgb, depth, event, lidar = (scene[modality] for modality in ("rgb", "depth", "event", "lidar"))
    label, condition, case = ids[scene["label"]].astype(np.uint8), scene["condition"], scene["case"]
    if layout == "deliver":
        key = f"{condition}/{split}/MAP_1_point{index % 3 + 1}{'' if case == 'none' else '_' + case}/{index:06d}"
        event = event[::2, ::2] if case == "eventlowres" else event
        red = np.dstack([label + 1, 0 * label, 0 * label])
        return {f"img/{key}_rgb_front.png": rgb, f"hha/{key}_depth_front.png": depth,
                f"depth/{key}_depth_front.png": depth[..., 0], f"event/{key}_event_front.png": event,
                f"lidar/{key}_lidar_front.png": lidar, f"semantic/{key}_semantic_front.png": red}
    if layout == "muses":
        key = f"{split}/{MUSES_WEATHER[condition]}/REC{index % 3:04d}_frame_{index:06d}"
        lidar = 15000 + 60 * lidar.astype(np.uint16)    # 0..255 as 0..102 metres
        radar = np.where(np.arange(lidar.shape[1])[:, None] % 4, 15000, lidar).astype(np.uint16)
        files = {f"frame_camera/{key}_frame_camera.png": rgb, f"event_camera/{key}_event_camera.png": event,
                 f"lidar/{key}_lidar.png": lidar, f"radar/{key}_radar.png": radar,
                 f"gt_semantic/{key}_gt_labelTrainIds.png": label}
        return files if split != "test" else dict(list(files.items())[:-1])
    if layout == "mcubes":
        key, angle = f"scene{index % 3}_{split}_{index:06d}", depth[..., 0] * np.float32(np.pi / 255)
        files = {f"polL_color/{key}.png": rgb.astype(np.uint16) * 257, f"polL_aolp_sin/{key}.npy": np.sin(angle),
                 f"polL_aolp_cos/{key}.npy": np.cos(angle), f"polL_dolp/{key}.npy": event[..., 0] / np.float32(255),
                 f"NIR_warped/{key}.png": lidar[..., 2].astype(np.uint16) * 257, f"GT/{key}.png": label,
                 f"NIR_warped_mask/{key}.png": np.full_like(label, 255), f"SS/{key}.png": label}
        return {f"multimodal_dataset/{path}": np.pad(array, [(0, 0), (192, 0), (0, 0)][:array.ndim])
                for path, array in files.items()}
    key = f"{split}/{condition}/{case}/{index:06d}"
    return {f"rgb/{key}.png": rgb, f"depth/{key}.png": depth[..., 0].astype(np.uint16) * 257, f"event/{key}.png": event,
            f"lidar/{key}.npy": lidar / np.float32(255), f"labels/{key}.png": label}


def export(out: Path, layout: str, count: int, size: int, seed: int) -> None:
    """Write `count` scenes of height `size` (MUSES 16:9, else square): half train, a quarter each val and test.

    Weather conditions and sensor failures take turns, so that six frames of a split show all of them.
    """
    if count < 4:
        raise ValueError(f"--count {count} leaves a split empty; use 4 or more")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; choose a new folder")
    ids = np.arange(len(scenes.CLASSES))
    if layout != "folder":
        names = parse_classes(LAYOUTS[layout].classes.split(","))[0]
        ids = np.array([names.index(name) for name in EXPORT_CLASSES[layout].split(",")])
    for split, number in (("train", count - count // 4 * 2), ("val", count // 4), ("test", count // 4)):
        keys = []
        for i in range(number):
            condition, case = scenes.CONDITIONS[i % 5], ("none", *scenes.CASES)[i % 6]
            shape = (size, size * 16 // 9 if layout == "muses" else size)
            files = scene_files(layout, split, i, scenes.paint(seed, split, i, shape, condition, case), ids)
            keys.append(Path(next(iter(files))).stem)
            for path, array in files.items():
                write_file(out / path, array)
        if layout == "mcubes":
            write_file(out / f"multimodal_dataset/list_folder/{split}.txt", "\n".join(keys) + "\n")
    if layout == "folder":
        write_file(out / "classes.txt", "".join(f"{name} {r} {g} {b}\n" for name, (r, g, b) in scenes.CLASSES))


def write_file(path: Path, content: np.ndarray | str) -> None:
    """Text, .npy, or PNG of 8 or 16 bit; Pillow writes no 16-bit colour, so those chunks are put together here."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif path.suffix == ".npy":
        np.save(path, content)
    elif content.dtype == np.uint8:
        Image.fromarray(content).save(path)
    else:
        height, width = content.shape[:2]
        rows = content.astype(">u2").reshape(height, -1).view(np.uint8)     # (H, 2 W C)
        rows = np.pad(rows, ((0, 0), (1, 0)))                               # a row begins with its filter: none
        header = struct.pack(">IIBBBBB", width, height, 16, 2 if content.ndim == 3 else 0, 0, 0, 0)
        chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b""))
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks))


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
        lines.append(f"{split}: {len(dataset) + len(dataset.broken)} frames, {len(dataset.broken)} broken")
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
