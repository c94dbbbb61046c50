"""How DELIVER, MUSES, MCubeS, NYU Depth v2 and a folder lie on disk: classes, palettes, paths, and how files decode.

Facts from the data sets' own pages and tools. Nothing here knows of splits being trained on; `data.py` makes frames
and batches of it. A label of 255 is ignored everywhere.
"""
import colorsys
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

IGNORED = 255
SUFFIXES = (".png", ".jpg", ".jpeg", ".npy", ".npz")


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
    "nyuv2": Layout(
        "NYU Depth v2", "",     # the classes: NYUV2_CLASSES
        {"rgb": ("RGB", ".jpg"), "depth": ("HHA", ".png"), "event": ("Depth", ".png"), "lidar": ("Depth", ".png")},
        ("Label", ".png"), "*",
        "NYUDepthv2/{RGB,HHA,Depth,Label}/ID.* (Label13 for 13 classes) and NYUDepthv2/{train,test}.txt",
        "see the project pages of CMX or DFormer"),
    "folder": Layout(
        "a folder data set", "", {}, ("labels", ".png"), "{split}/**/*",
        "classes.txt, <modality>/{train,val,test}/**/ID.{png,jpg,npy} and labels/{train,val,test}/**/ID.png",
        "python data.py --export DIR --layout folder shows one"),
}
DATASETS = ("synthetic", *LAYOUTS)
RAW_DEPTH = {"deliver": ("depth", "_depth_front.png"), "nyuv2": ("Depth", ".png")}      # instead of HHA
NYUV2_CLASSES = {
    40: "wall, floor, cabinet, bed, chair, sofa, table, door, window, bookshelf, picture, counter, blinds, desk, "
        "shelves, curtain, dresser, pillow, mirror, floor mat, clothes, ceiling, books, refridgerator, television, "
        "paper, towel, shower curtain, box, whiteboard, person, night stand, toilet, sink, lamp, bathtub, bag, "
        "otherstructure, otherfurniture, otherprop",
    13: "bed, books, ceiling, chair, floor, furniture, objects, picture, sofa, table, tv, wall, window",
}


def read_list(path: Path) -> set[str]:
    """The frames that train.txt or test.txt names: the first word of each line, without folders and ending."""
    lines = path.read_text(encoding="utf-8-sig").splitlines() if path.is_file() else ()
    names = {re.split(r"[/\\]", line.split()[0])[-1] for line in lines if line.strip()}
    return {Path(name).stem if Path(name).suffix.lower() in SUFFIXES else name for name in names}


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
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
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
    with np.errstate(over="ignore"):        # what float32 cannot hold becomes infinite, and is found below
        image = image.astype(np.float32)
    if not np.isfinite(image).all():
        raise ValueError(f"{path} has NaN or infinite values; replace them, for example by 0")
    return image


def read_float(path: Path) -> np.ndarray:
    """A sensor's file as (H, W, 1 or 3) float32, 8 and 16 bit in 0..1."""
    return as_float(read_image(path))


def as_float(image: Picture) -> np.ndarray:
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


def read_nyuv2(path: Path) -> Picture:
    """A NYU Depth v2 file; raw depth becomes metres / 10 in 0..1: of 16 bit from millimetres, 8 bit being just that."""
    image = read_image(path)
    if isinstance(image, np.ndarray) and path.suffix.lower() == ".png":
        return np.minimum(image * np.float32(65535 / 10000), 1)
    return image


def derived(modality: str, depth: Path, read: Callable[[Path], Picture]) -> Image.Image:
    """What an event camera or a lidar would have seen of a real frame, from its files Depth/ID.* and RGB/ID.*."""
    from datasets.derived import derive_event, derive_lidar

    metres = as_float(read(depth))[..., 0] * 10
    if modality == "lidar":
        return Image.fromarray(derive_lidar(metres, depth.stem))
    files = [depth.parents[1] / "RGB" / (depth.stem + suffix) for suffix in SUFFIXES]
    rgb = read(next((file for file in files if file.is_file()), files[1]))
    return Image.fromarray(derive_event(np.asarray(rgb.convert("RGB")), metres, depth.stem))


def read_images(name: str, modalities: list[str], paths: Sequence[Path]) -> list[Picture]:
    """The modalities of a frame of a data set, from their files."""
    if name == "nyuv2":
        read = functools.cache(read_nyuv2)      # derived modalities share files
        return [derived(modality, path, read) if modality in ("event", "lidar") and path.parent.name == "Depth"
                else read(path) for modality, path in zip(modalities, paths, strict=True)]
    readers = {("muses", "lidar"): read_muses_range, ("muses", "radar"): read_muses_range}
    reader = read_mcubes if name == "mcubes" else read_image
    return [readers.get((name, modality), reader)(path) for modality, path in zip(modalities, paths, strict=True)]


def read_label(path: Path, table: np.ndarray, red: bool) -> np.ndarray:
    """A label file as (H, W) uint8 classes by `label_table`; `red`: the ids are in a colour image's red channel."""
    if path.suffix.lower() in (".jpg", ".jpeg"):
        raise ValueError(f"{path} is a JPEG, whose compression changes class ids; write labels as PNG")
    ids = read_file(path)
    ids = np.asarray(ids.getchannel(0) if red and isinstance(ids, Image.Image) else ids)
    if ids.ndim != 2 or ids.dtype not in ("u1", "u2"):
        raise ValueError(f"{path} is no label map; expected class ids of 8 or 16 bit in one channel")
    label = table.take(ids)                 # (H, W), in int16: no id can wrap around
    if label.min() < 0:
        known = np.flatnonzero(table >= 0)
        raise ValueError(f"{path} holds the label {ids[label < 0][0]}, but the ids are {known[0]}..{known[-2]} and "
                         f"{known[-1]}; correct the file, classes.txt or --label-map")
    return label.astype(np.uint8)
