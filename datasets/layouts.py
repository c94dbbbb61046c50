"""Where DELIVER, MUSES, MCubeS, NYU Depth v2 and a folder of your own keep their files; their classes are in classes/.

Facts from the data sets' own pages and tools. `datasets/files.py` decodes the files.
"""

import colorsys
import os
import re
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import numpy as np

from datasets.files import IGNORED, SUFFIXES, Frame, why_missing
from datasets.synthetic import CASES, SPLITS


# ---- classes and layouts --------------------------------------------------------------------------------------------
class Layout(NamedTuple):
    """Where a data set keeps its files: FOLDER/**/*ENDING. What ** and * stand for is the KEY, the name of a frame."""

    modalities: dict[str, str]
    label: str
    split_level: int  # how many folders of KEY lie above train, val, test; -1: there are lists
    inner: str = ""  # the folder that all this lies in, where the root is its parent
    raw_depth: str = ""  # what depth is read from instead of HHA
    label_map: str = "shift:0"  # see `label_table`
    unasked: tuple[str, ...] = ()  # modalities that are used only where they are named

    def expected(self) -> str:
        """For people: the files that are looked for, and where to read more."""
        lists = ["train.txt", "test.txt"] if self.split_level < 0 else []
        files = dict.fromkeys([*lists, *self.modalities.values(), self.label])
        files = [name.replace("**", "{train,val}/**") if self.split_level == 0 else name for name in files]
        return f"expected {', '.join(files)}; docs/data.md has all folders, and where to get them"


LAYOUTS = {
    "deliver": Layout(
        {"rgb": "img/**/*_rgb_front.png", "depth": "hha/**/*_depth_front.png",
         "event": "event/**/*_event_front.png", "lidar": "lidar/**/*_lidar_front.png"},
        "semantic/**/*_semantic_front.png", 1, raw_depth="depth/**/*_depth_front.png", label_map="shift:-1",
    ),
    "muses": Layout(
        {"rgb": "frame_camera/**/*_frame_camera.png", "event": "event_camera/**/*_event_camera.png",
         "lidar": "lidar/**/*_lidar.png", "radar": "radar/**/*_radar.png"},
        "gt_semantic/**/*_gt_labelTrainIds.png", 0, unasked=("radar",),  # as in the papers' tables
    ),
    "mcubes": Layout(
        {"rgb": "polL_color/**/*.png", "aolp": "polL_aolp_sin/**/*.npy",
         "dolp": "polL_dolp/**/*.npy", "nir": "NIR_warped/**/*.png"},
        "GT/**/*.png", -1, inner="multimodal_dataset",
    ),
    "nyuv2": Layout(  # event and lidar are derived from rgb and raw depth
        {"rgb": "RGB/**/*.jpg", "depth": "HHA/**/*.png", "event": "Depth/**/*.png", "lidar": "Depth/**/*.png"},
        "Label/**/*.png", -1, "NYUDepthv2", "Depth/**/*.png", "shift:-1", unasked=("event", "lidar"),
    ),
    "folder": Layout({"<modality>": "<modality>/**/*.png"}, "labels/**/*.png", 0),  # its own are found on disk
}  # fmt: skip
DATASETS = ("synthetic", *LAYOUTS)
# Names of folders that are no modalities, unless they are asked for.
LIKE_LABELS = re.compile(
    r"^\.|(^|_)(gt|seg)($|_|fine|coarse)|label|mask|annotation|truth|target|trainid|semantic|segment|panoptic|instance",
    re.IGNORECASE,
)
CLASSES = Path(__file__).parent / "classes"  # NAME.txt for each data set, in the format of a folder's classes.txt


def spread(frames: list, count: int | None) -> list:
    """At most `count` of the frames, evenly spread; None: all."""
    count = min(count or len(frames), len(frames))
    return [frames[i * len(frames) // count] for i in range(count)]


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text that are not empty."""
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    if "\0" in text or "\ufffd" in text:  # the first is at every other byte of UTF-16, the second for no UTF-8
        raise ValueError(f"{path} is no UTF-8 text; save it as such")
    return [line for line in text.split("\n") if line.strip()]  # splitlines would split at U+2028 as well


def read_classes(path: Path) -> tuple[list[str], np.ndarray]:
    """A classes.txt: the K names, label 0 in the first line, and the palette (K, 3); a missing colour is made up."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; write a class a line, 'name' or 'name r g b', in label order")
    lines = [line.split() for line in read_lines(path)]
    if not 1 < len(lines) < 256:
        raise ValueError(f"{path} has {len(lines)} classes; expected 2 to 255, one a line")
    if re.search(r"\n[ \t\r]*\n\s*\S", path.read_text(encoding="utf-8-sig")):
        raise ValueError(f"{path} has an empty line before its end; an unused class has a line with a name, too")
    ids = [words[0].rstrip(":.)") for words in lines]
    if all(map(str.isdecimal, ids)) and ids != [str(number) for number in range(len(ids))]:
        raise ValueError(f"{path} numbers its lines {', '.join(ids[:4])}, ...; write only names, label 0 first")
    classes = {}
    for number, words in enumerate(lines):
        hue, brightness = 0.618 * number % 1, 0.95 - 0.12 * ((number - 1) % 5)  # golden ratio
        colour = [int(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.7 * (number > 0), brightness)]  # 0: grey
        if len(words) > 3 and all(map(str.isdecimal, words[-3:])):
            words, colour = words[:-3], [int(word) for word in words[-3:]]
        name = " ".join(words)
        if max(colour) > 255 or name in classes or re.search(r"[,;#]|\d\.\d+$| r g b$", name):
            what = f"{path} has the class {name!r} of colour {colour}; write 'name' or 'name r g b' a line"
            raise ValueError(f"{what}, no name twice, no comma, semicolon or #, and r, g, b in 0..255")
        classes[name] = colour
    return list(classes), np.array(list(classes.values()), np.uint8)


def label_table(label_map: str, num_classes: int) -> np.ndarray:
    """Id in a label file -> class or 255, as a (65536,) int16 table where -1 marks ids that must not occur.

    label_map: 'id=class,...' with 255 for ignored, or 'shift:N': class = id + N, ignored when below 0. The id 255 is
    ignored unless the map says otherwise.
    """
    try:
        if label_map.startswith("shift:"):
            shift = int(label_map.removeprefix("shift:"))
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
def open_layout(name: str, root: str | Path | None, depth: str, classes: int) -> tuple:
    """The Layout as the options have it, the Path its files are below, the class names and the palette (K, 3)."""
    if name == "synthetic":
        layout = Layout(dict.fromkeys(("rgb", "depth", "event", "lidar"), ""), "", -1)
        return layout, None, *read_classes(CLASSES / "synthetic.txt")
    layout = LAYOUTS[name]
    known, label, unasked = dict(layout.modalities), layout.label, layout.unasked
    if root is None or not Path(root).is_dir():
        raise FileNotFoundError(f"{root or f'--data {name} without --root'}: no such folder; {layout.expected()}")
    root = Path(root) / layout.inner if (Path(root) / layout.inner).is_dir() else Path(root)
    labels = label.partition("/**")[0]
    near = [*root.glob(f"*/{labels}"), *root.glob(f"*/*/{labels}"), root.parent / labels]
    if not (root / labels).is_dir() and (near := [path for path in near if path.is_dir()]):
        hint = f"did you mean --root {near[0].parent}?"
        if (root / "train" / labels).is_dir():
            hint = f"its folders must be {labels}/train, not train/{labels}, and so on"
        raise FileNotFoundError(f"{root} has no {labels}; {hint}")
    if name == "folder":
        dead = [path for path in root.iterdir() if path.is_symlink() and not path.exists() and path.name[0] != "."]
        if dead:  # it may be a sensor on a disk that is not mounted, without which training would go on
            raise FileNotFoundError(why_missing(dead[0]))
        folders = {path.name for path in root.iterdir() if any((path / split).is_dir() for split in SPLITS)}
        for found in folders:
            if re.search("[=,]", found):
                raise ValueError(f"{root / found} has a name that no option can take; rename it without = and comma")
            if found != (right := found.lower()) and right in ("labels", "rgb", "depth", "event", "lidar"):
                raise ValueError(f"{root / found} is named in capitals; rename it to {right}")
        known = {m: f"{m}/**/*.png" for m in sorted(folders - {"labels"}, key=lambda m: (m != "rgb", m))}
        unasked = tuple(m for m in known if LIKE_LABELS.search(m) or holds_labels(root, known[m]))
    if name == "muses":
        near = {m: f"projected_to_rgb/{files}" for m, files in known.items()}
        known = {m: near[m] if (root / near[m]).parents[1].is_dir() else known[m] for m in known}
    if depth == "raw" and layout.raw_depth:
        known["depth"] = layout.raw_depth
    if name == "nyuv2" and classes == 13:
        name, label = "nyuv2_13", "Label13/**/*.png"
    layout = layout._replace(modalities=known, unasked=unasked, label=label)
    return layout, root, *read_classes(root / "classes.txt" if name == "folder" else CLASSES / f"{name}.txt")


def find_files(root: Path, pattern: str, split_level: int, split: str) -> dict[str, Path]:
    """Frame key -> file, for all files of a pattern of `Layout`, with any extension that can be read.

    At `split_level` only the folder named `split` is entered; what is hidden is left out. Links are followed, but
    refused if they lead to the same folder twice: a loop, or val -> train. A folder that cannot be listed is refused.
    """

    def unreadable(error: OSError) -> None:
        raise ValueError(f"{error.filename} cannot be listed ({error.strerror}); make it readable, or remove it")

    folder, ending = pattern.split("/**/*")
    base, stem, found, seen = root / folder, ending.rpartition(".")[0], {}, set()
    home = os.path.realpath(base)
    for folder, inner, files in os.walk(base, onerror=unreadable, followlinks=True) if base.is_dir() else ():
        parts, real = Path(folder).relative_to(base).parts, os.path.realpath(folder)
        related = os.path.commonpath([home, real]) in (home, real)  # one of the two lies in the other
        if real in seen or related and real != os.path.join(home, *parts):
            raise ValueError(f"{folder} is a link, by which the frames in {real} are found twice; remove it")
        seen.add(real)
        inner[:] = sorted(name for name in inner if name[0] != "." and (len(parts) != split_level or name == split))
        for path in (Path(folder, name) for name in files if len(parts) > split_level):
            if path.name[0] != "." and path.suffix.lower() in SUFFIXES and path.stem.endswith(stem):
                key = "/".join((*parts, path.stem.removesuffix(stem)))
                if found.setdefault(key, path) != path:
                    raise ValueError(f"{path} and {found[key]} are of the same frame; remove one of them")
    return found


def holds_labels(root: Path, pattern: str) -> bool:
    """Whether all files of a folder data set's modality equal the label files beside it, as far as both exist."""
    for split in SPLITS:
        images, labels = (find_files(root, files, 0, split) for files in (pattern, LAYOUTS["folder"].label))
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
    lines = read_lines(path) if path.is_file() else ()
    files = [PureWindowsPath(line.split()[0]) for line in lines]  # its separators are / and \\
    keys = sorted({file.stem if file.suffix.lower() in SUFFIXES else file.name for file in files})
    if not hold_out or part == "test":
        return keys
    if not 0 < hold_out < len(keys):
        raise ValueError(f"--hold-out {hold_out} is out of range; {path} lists {len(keys)} frames")
    held = set(spread(keys, hold_out))
    return [key for key in keys if (key in held) == (split == "val")]


def find_frames(name: str, layout: Layout, root: Path, split: str, modalities: list[str], hold_out: int) -> list[Frame]:
    """The sorted frames of a split: every key for which a chosen modality or the label has a file."""
    patterns = [*(layout.modalities[modality] for modality in modalities), layout.label]
    indexed = {pattern: find_files(root, pattern, layout.split_level, split) for pattern in patterns}
    keys = sorted({key for found in indexed.values() for key in found})
    keys = listed(name, root, split, hold_out) if name in ("mcubes", "nyuv2") else keys
    hha, raw = LAYOUTS[name].modalities.get("depth"), LAYOUTS[name].raw_depth.partition("/**")[0]
    for pattern, found in indexed.items() if keys else ():
        if not found and (pattern != layout.label or split != "test"):
            hint = f"; --depth raw reads {root / raw} instead" if raw and pattern == hha else ""
            if pattern == layout.label and name == "folder" and layout.unasked:
                hint = f"; rename {layout.unasked[0]} to labels, if it holds them"
            folder, ending = pattern.split("/**/")
            what = f"{root / folder} has no {ending} of {split} ({', '.join(SUFFIXES)} are read)"
            raise FileNotFoundError(f"{what}, though other folders have files{hint}")
    whole = (key for key in keys if all(key in found for found in indexed.values() if found))
    if keys and layout.split_level >= 0 and not any(whole):  # else each frame would be called broken, for no reason
        some = " and ".join(str(min(found.values())) for found in indexed.values() if found)
        raise ValueError(f"no frame of {split} has all of its files, such as {some}; give those of a frame one name")
    frames = []
    for key in keys:
        # A file that is not there keeps the path where it should be, so that reading the frame names it.
        *images, label = (indexed[pattern].get(key, root / pattern.replace("**/*", key)) for pattern in patterns)
        folders = key.split("/")[:-1]
        if name == "deliver":  # condition/split/sequence; a failure is part of the sequence's name
            condition, case = folders[0], next((c for c in CASES if c in key.lower()), "none")
        else:  # split/condition/case, as far as there are such folders
            condition, case = (*folders[1:3], "none", "none")[:2]
        unlabelled = split == "test" and not indexed[patterns[-1]]  # MUSES keeps its test labels to itself
        frames.append(Frame(key, condition, case, tuple(images), None if unlabelled else label))
    return frames
