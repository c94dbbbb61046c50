"""Where DELIVER, MUSES, MCubeS, NYU Depth v2 and a folder of your own keep their files, and what their classes are.

Facts from the data sets' own pages and tools. `datasets/files.py` decodes the files, `data.py` makes batches of them.
"""
import colorsys
import os
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets import synthetic
from datasets.files import IGNORED, SUFFIXES


# ---- classes and layouts --------------------------------------------------------------------------------------------
class Layout(NamedTuple):
    """Where a data set keeps its files: FOLDER/pattern, with a frame's key being the path less folder and ending."""
    title: str
    classes: str                            # "name r g b, ..."
    modalities: dict[str, tuple[str, str]]  # -> (folder, ending of the file names)
    label: tuple[str, str]
    pattern: str
    expected: str                           # for people
    source: str
    inner: str = ""                         # the folder that all this lies in, where the root is its parent
    raw_depth: tuple[str, str] | None = None    # what depth is read from instead of HHA
    label_map: str = "shift:0"              # see `label_table`
    unasked: tuple[str, ...] = ()           # modalities that are used only where they are named


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
        "see the DELIVER (CMNeXt) project page", raw_depth=("depth", "_depth_front.png"), label_map="shift:-1"),
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
        "see the MUSES project page", unasked=("radar",)),      # as in the papers' tables
    "mcubes": Layout(
        "MCubeS",
        "asphalt 44 160 44, concrete 31 119 180, metal 255 127 14, road_marking 214 39 40, fabric 140 86 75, "
        "glass 127 127 127, plaster 188 189 34, plastic 255 152 150, rubber 23 190 207, sand 174 199 232, "
        "gravel 196 156 148, ceramic 197 176 213, cobblestone 247 182 210, brick 199 199 199, grass 219 219 141, "
        "wood 158 218 229, leaf 57 59 121, water 107 110 207, human 156 158 222, sky 99 121 57",
        {"rgb": ("polL_color", ".png"), "aolp": ("polL_aolp_sin", ".npy"), "dolp": ("polL_dolp", ".npy"),
         "nir": ("NIR_warped", ".png")},
        ("GT", ".png"), "*",
        "multimodal_dataset/{polL_color,polL_aolp_sin,polL_aolp_cos,polL_dolp,NIR_warped,GT}/NAME.* "
        "and multimodal_dataset/list_folder/{train,val,test}.txt",
        "see the MCubeSNet project page", inner="multimodal_dataset"),
    "nyuv2": Layout(
        "NYU Depth v2",
        "wall, floor, cabinet, bed, chair, sofa, table, door, window, bookshelf, picture, counter, blinds, desk, "
        "shelves, curtain, dresser, pillow, mirror, floor mat, clothes, ceiling, books, refridgerator, television, "
        "paper, towel, shower curtain, box, whiteboard, person, night stand, toilet, sink, lamp, bathtub, bag, "
        "otherstructure, otherfurniture, otherprop",
        {"rgb": ("RGB", ".jpg"), "depth": ("HHA", ".png"), "event": ("Depth", ".png"), "lidar": ("Depth", ".png")},
        ("Label", ".png"), "*",
        "NYUDepthv2/{RGB,HHA,Depth,Label}/ID.* (Label13 for 13 classes) and NYUDepthv2/{train,test}.txt",
        "see the project pages of CMX or DFormer",
        inner="NYUDepthv2", raw_depth=("Depth", ".png"), label_map="shift:-1",
        unasked=("event", "lidar")),        # derived from rgb and raw depth
    "folder": Layout(
        "a folder data set", "", {}, ("labels", ".png"), "{split}/**/*",
        "classes.txt, <modality>/{train,val,test}/**/ID.{png,jpg,npy} and labels/{train,val,test}/**/ID.png",
        "python data.py --export DIR --layout folder shows one"),
}
DATASETS = ("synthetic", *LAYOUTS)
LIKE_LABELS = re.compile(r"^\.|^gt|label|mask|annotation|semantic|segment", re.IGNORECASE)   # names of folders
NYUV2_13 = "bed, books, ceiling, chair, floor, furniture, objects, picture, sofa, table, tv, wall, window"


def parse_classes(entries: Iterable[str]) -> tuple[list[str], np.ndarray]:
    """Entries 'name' or 'name r g b' to the K names and a (K, 3) uint8 palette."""
    names, palette = [], []
    for words in filter(None, map(str.split, entries)):
        coloured = len(words) > 3 and all(word.isdecimal() and int(word) < 256 for word in words[-3:])
        names.append(" ".join(words[:-3] if coloured else words))
        number = len(palette)               # steps of the golden ratio spread any number of hues, five brightnesses
        palette.append([int(word) for word in words[-3:]] if coloured
                       else [int(255 * value) for value in colorsys.hsv_to_rgb(
                           0.618 * number % 1, 0.7, 0.95 - 0.12 * (number % 5))])
    return names, np.array(palette, np.uint8).reshape(-1, 3)


def read_classes(path: Path) -> tuple[list[str], np.ndarray]:
    """A folder data set's classes.txt: the class of label 0 in the first line, and so on."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; write a class a line, 'name' or 'name r g b', in label order")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")     # splitlines would split at U+2028 as well
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no UTF-8 text; save it as such") from None
    for line in lines:
        colour = line.split()[1:][-3:]
        coloured = len(colour) == 3 and all(word.isdecimal() for word in colour)
        if line.startswith("#") or coloured and max(map(int, colour)) > 255:
            raise ValueError(f"{path} has the line {line!r}; expected 'name' or 'name r g b' with r, g, b in 0..255")
    names, palette = parse_classes(lines)
    if not 0 < len(names) < 256:
        raise ValueError(f"{path} has {len(names)} classes; expected 1 to 255, one a line")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{path} has the class {name!r} twice; give every class a name of its own")
    return names, palette


def label_table(label_map: str, num_classes: int) -> np.ndarray:
    """Id in a label file -> class or 255, as a (65536,) int16 table where -1 marks ids that must not occur.

    label_map: 'id=class,...' with 255 for ignored, or 'shift:N': class = id + N, ignored when below 0. The id 255 is
    ignored unless the map says otherwise.
    """
    try:
        if label_map.startswith("shift:"):
            shift = int(label_map[len("shift:"):])
            pairs = [(id, id + shift if id + shift >= 0 else IGNORED) for id in range(255) if id + shift < num_classes]
        else:
            pairs = [(int(id), int(target)) for id, target in (pair.split("=") for pair in label_map.split(","))]
    except ValueError:
        raise ValueError(f"label map {label_map!r} is not understood; write id=class,id=class,... or shift:N") from None
    table = np.full(65536, -1, np.int16)
    table[IGNORED] = IGNORED
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"label map {label_map!r} has an id twice; give every id one class")
    for id, target in pairs:
        if not (0 <= id < 65536 and (0 <= target < num_classes or target == IGNORED)):
            raise ValueError(f"label map entry {id}={target} is out of range; classes are 0..{num_classes - 1} or 255")
        table[id] = target
    if set(table.tolist()) == {-1, IGNORED}:
        raise ValueError(f"label map {label_map!r} leaves no class; classes are 0..{num_classes - 1}")
    return table


# ---- frames ---------------------------------------------------------------------------------------------------------
class Frame(NamedTuple):
    """One moment: its files in the order of the chosen modalities; `label` is None where none is published."""
    name: str
    condition: str      # the weather, or "none"
    case: str           # DELIVER's sensor failure, MUSES' day or night, or "none"
    images: tuple[Path, ...] = ()
    label: Path | None = None


def open_layout(name: str, root: str | Path | None, depth: str, classes: int
                ) -> tuple[Layout, Path | None, list[str], np.ndarray]:
    """The layout as the options have it, the folder its paths begin at, the class names and the palette (K, 3)."""
    if name == "synthetic":
        names, palette = zip(*synthetic.CLASSES, strict=True)
        layout = Layout("", "", dict.fromkeys(("rgb", "depth", "event", "lidar")), None, "", "", "")
        return layout, None, list(names), np.array(palette, np.uint8)
    layout = LAYOUTS[name]
    if root is None or not Path(root).is_dir():
        raise FileNotFoundError(f"{root or f'--data {name} without --root'}: no such folder; {layout.title} is "
                                f"expected below its root as {layout.expected}; {layout.source}")
    root = Path(root) / layout.inner if (Path(root) / layout.inner).is_dir() else Path(root)
    if name == "folder":
        folders = sorted(path.name for path in root.iterdir() if path.name != "labels"
                         and any((path / split).is_dir() for split in synthetic.SPLITS))
        layout = layout._replace(modalities={m: (m, ".png") for m in sorted(folders, key=lambda m: m != "rgb")},
                                 unasked=tuple(m for m in folders if LIKE_LABELS.search(m) or holds_labels(root / m)))
        return layout, root, *read_classes(root / "classes.txt")
    if depth == "raw" and layout.raw_depth:
        layout = layout._replace(modalities={**layout.modalities, "depth": layout.raw_depth})
    if name == "nyuv2" and classes == 13:
        layout = layout._replace(classes=NYUV2_13, label=("Label13", ".png"))
    return layout, root, *parse_classes(layout.classes.split(","))


def find_files(base: Path, pattern: str, ending: str) -> dict[str, Path]:
    """Frame key -> file, for all files base/pattern whose names end so, with any extension that can be read.

    pattern: of each folder below base, then * for the file; ** is any number of folders. Leaves out what is hidden.
    Follows links, but refuses those by which a folder would be found twice, a loop or val -> train, say. Raises
    ValueError for a folder that may not be read.
    """
    def unreadable(error: OSError) -> None:
        raise ValueError(f"{error.filename} cannot be listed ({error.strerror}); make it readable, or remove it")

    levels, stem, found, seen = pattern.split("/")[:-1], ending.rpartition(".")[0], {}, set()
    any_depth, home = "**" in levels, os.path.realpath(base)
    fixed = len(levels) - any_depth
    for folder, inner, files in os.walk(base, onerror=unreadable, followlinks=True) if base.is_dir() else ():
        parts, real = Path(folder).relative_to(base).parts, os.path.realpath(folder)
        related = os.path.commonpath([home, real]) in (home, real)      # one of the two lies in the other
        if real in seen or related and real != os.path.join(home, *parts):
            raise ValueError(f"{folder} is a link, by which the frames in {real} are found twice; remove it")
        seen.add(real)
        level = levels[len(parts)] if len(parts) < fixed else None      # None: files lie here
        inner[:] = sorted(name for name in inner if name[0] != "."
                          and (fnmatchcase(name, level) if level else any_depth))
        for name in files if level is None else ():
            path = Path(folder, name)
            if name[0] == "." or path.suffix.lower() not in SUFFIXES or not path.stem.endswith(stem):
                continue
            key = "/".join((*parts, path.stem[:len(path.stem) - len(stem)]))
            if found.setdefault(key, path) != path:
                raise ValueError(f"{path} and {found[key]} are of the same frame; remove one of them")
    return found


def spread(frames: list[Frame], count: int | None) -> list[Frame]:
    """At most `count` of the frames, evenly spread; None: all."""
    count = min(count or len(frames), len(frames))
    return [frames[i * len(frames) // count] for i in range(count)]


def holds_labels(folder: Path) -> bool:
    """Whether all files of a folder data set's modality equal the label files beside it, as far as both exist."""
    for split in synthetic.SPLITS:
        images, labels = (find_files(base, f"{split}/**/*", ".png") for base in (folder, folder.parent / "labels"))
        if both := images.keys() & labels.keys():
            return all(images[key].read_bytes() == labels[key].read_bytes() for key in both)
    return False


def listed(name: str, root: Path, split: str, hold_out: int) -> list[str]:
    """The frame keys in the lists of MCubeS or NYU Depth v2: the first word of each line, without folder and ending.

    Of nyuv2, val is `hold_out` frames of the train list, evenly spread and left out of train; if 0, the test list.
    """
    folder = next((path for path in (root / "list_folder", root.parent / "list_folder") if path.is_dir()), root)
    part = split if name == "mcubes" or split != "val" else "train" if hold_out else "test"
    path = folder / f"{part}.txt"
    lines = path.read_text(encoding="utf-8-sig").splitlines() if path.is_file() else ()
    words = {re.split(r"[/\\]", line.split()[0])[-1] for line in lines if line.strip()}
    keys = sorted({word.removesuffix(Path(word).suffix) if Path(word).suffix.lower() in SUFFIXES else word
                   for word in words})
    if not hold_out or part == "test":
        return keys
    if not 0 < hold_out < len(keys):
        raise ValueError(f"--hold-out {hold_out} is out of range; {path} lists {len(keys)} frames")
    held = {keys[i * len(keys) // hold_out] for i in range(hold_out)}
    return [key for key in keys if (key in held) == (split == "val")]


def find_frames(name: str, layout: Layout, root: Path, split: str, modalities: list[str], hold_out: int) -> list[Frame]:
    """The sorted frames of a split: every key for which a chosen modality or the label has a file."""
    indexed = []
    for folder, ending in [*(layout.modalities[modality] for modality in modalities), layout.label]:
        base = root / "projected_to_rgb" / folder
        base = base if name == "muses" and base.is_dir() else root / folder
        indexed.append((base, ending, find_files(base, layout.pattern.format(split=split), ending)))
    keys = sorted({key for *_, found in indexed for key in found})
    keys = listed(name, root, split, hold_out) if name in ("mcubes", "nyuv2") else keys
    unlabelled = split == "test" and not indexed[-1][2]     # MUSES keeps its test labels to itself
    frames = []
    for base, _, found in indexed:
        if keys and not found and base.name == "HHA":
            raise FileNotFoundError(f"{base} has no files; --depth raw reads {root / 'Depth'} instead")
    for key in keys:
        # A file that is not there keeps the path where it should be, so that reading the frame names it.
        *images, label = (found.get(key, base / (key + ending)) for base, ending, found in indexed)
        folders = key.split("/")[:-1]
        if name == "deliver":   # condition/split/sequence; a failure is part of the sequence's name
            condition, case = folders[0], next((c for c in synthetic.CASES if c in folders[2].lower()), "none")
        else:                   # split/condition/case, as far as there are such folders
            condition, case = (*folders[1:3], "none", "none")[:2]
        frames.append(Frame(key, condition, case, tuple(images), None if unlabelled else label))
    return frames
