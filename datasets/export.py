"""Synthetic scenes in another data set's own layout and file formats, so that every loader can be tried without it.

Called by `python data.py --export DIR --layout deliver|muses|mcubes|nyuv2|folder`. Not in the paper.
"""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from datasets import synthetic
from datasets.layouts import CLASSES, read_classes

# The classes of classes/synthetic.txt, in that order, in other data sets. Parked and moving cars are the same outdoors.
EXPORT_CLASSES = {
    "deliver": "Sky,Building,Vegetation,Road,RoadLine,SideWalk,Pole,TrafficSign,Static,Cars,Cars,Pedestrian",
    "muses": "sky,building,vegetation,road,road,sidewalk,pole,traffic sign,wall,car,car,person",
    "mcubes": "sky,brick,leaf,asphalt,road_marking,concrete,metal,plastic,wood,metal,metal,human",
    "nyuv2": "ceiling,wall,curtain,floor,floor mat,desk,lamp,picture,whiteboard,sofa,bed,person",
    "nyuv2_13": "ceiling,wall,objects,floor,floor,table,objects,picture,objects,sofa,bed,objects",
}
MUSES_WEATHER = {"cloud": "snow/day", "fog": "fog/day", "night": "clear/night", "rain": "rain/day", "sun": "clear/day"}


def scene_files(layout: str, split: str, index: int, scene: dict) -> dict[str, np.ndarray]:
    """A synthetic scene as the files of a data set, path -> uint8 or uint16 for PNG and JPEG, float32 for .npy."""
    rgb, depth, event, lidar, painted, condition, case = scene.values()
    label = painted if layout == "folder" else class_ids(layout)[painted]
    if layout == "deliver":
        key = f"{condition}/{split}/MAP_1_point{index % 3 + 1}{'' if case == 'none' else '_' + case}/{index:06d}"
        files = {"img/KEY_rgb_front.png": rgb, "hha/KEY_depth_front.png": depth, "lidar/KEY_lidar_front.png": lidar}
        files["depth/KEY_depth_front.png"] = depth[..., 0]
        files["event/KEY_event_front.png"] = event[::2, ::2] if case == "eventlowres" else event
        files["semantic/KEY_semantic_front.png"] = np.dstack([label + 1, 0 * label, 0 * label])  # ids in red
    elif layout == "muses":
        key = f"{split}/{MUSES_WEATHER[condition]}/REC{index % 3:04d}_frame_{index:06d}"
        lidar = 15000 + 60 * lidar.astype(np.uint16)  # 0..255 as 0..102 metres
        radar = np.where(np.arange(lidar.shape[1])[:, None] % 4, 15000, lidar).astype(np.uint16)  # every fourth column
        files = {"frame_camera/KEY_frame_camera.png": rgb, "event_camera/KEY_event_camera.png": event}
        files |= {"lidar/KEY_lidar.png": lidar, "radar/KEY_radar.png": radar}
        if split != "test":
            files["gt_semantic/KEY_gt_labelTrainIds.png"] = label
    elif layout == "mcubes":  # depth, events and lidar stand in for AoLP, DoLP and near infrared
        key, angle = f"scene{index % 3}_{split}_{index:06d}", depth[..., 0] * np.float32(np.pi / 255)
        files = {"polL_color/KEY.png": rgb.astype(np.uint16) * 257, "GT/KEY.png": label}
        files |= {"polL_aolp_sin/KEY.npy": np.sin(angle), "polL_aolp_cos/KEY.npy": np.cos(angle)}
        files["polL_dolp/KEY.npy"] = event[..., 0] / np.float32(255)
        files["NIR_warped/KEY.png"] = lidar[..., 2].astype(np.uint16) * 257
        margins = [(0, 0), (192, 0), (0, 0)]  # loaders leave out the 192 columns on the left
        files = {f"multimodal_dataset/{path}": np.pad(x, margins[: x.ndim]) for path, x in files.items()}
    elif layout == "nyuv2":
        key = f"{split}{index:04d}"
        files = {"RGB/KEY.jpg": rgb, "HHA/KEY.png": depth, "Depth/KEY.png": depth[..., 0], "Label/KEY.png": label + 1}
        files["Label13/KEY.png"] = class_ids("nyuv2_13")[painted] + 1
    else:
        key = f"{split}/{condition}/{case}/{index:06d}"
        files = {"rgb/KEY.png": rgb, "event/KEY.png": event, "labels/KEY.png": label}
        files["depth/KEY.png"] = depth[..., 0].astype(np.uint16) * 257
        files["lidar/KEY.npy"] = lidar / np.float32(255)
    return {path.replace("KEY", key): array for path, array in files.items()}


def class_ids(layout: str) -> np.ndarray:
    """For each class of the synthetic scenes its number in a data set's list of classes."""
    names, _ = read_classes(CLASSES / f"{layout}.txt")
    return np.array([names.index(name) for name in EXPORT_CLASSES[layout].split(",")], np.uint8)


def export(out: Path, layout: str, count: int, size: int, seed: int) -> None:
    """Write `count` scenes of height `size` (MUSES 16:9, else square): half train, a quarter each val and test.

    Conditions and failures take turns, so that six frames of a split show all. Of nyuv2, test.txt lists val, too.
    """
    if count < 4:
        raise ValueError(f"--count {count} leaves a split empty; use 4 or more")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; choose a new folder")
    lists = dict.fromkeys(synthetic.SPLITS, "")
    for split, number in (("train", count - count // 4 * 2), ("val", count // 4), ("test", count // 4)):
        for i in range(number):
            condition, case = synthetic.CONDITIONS[i % 5], ("none", *synthetic.CASES)[i % 6]
            shape = (size, size * 16 // 9 if layout == "muses" else size)
            files = scene_files(layout, split, i, synthetic.paint(seed, split, i, shape, condition, case))
            lists["test" if (layout, split) == ("nyuv2", "val") else split] += Path(next(iter(files))).stem + "\n"
            for path, array in files.items():
                write_file(out / path, array)
    for split, text in lists.items():
        if text and layout in ("mcubes", "nyuv2"):
            write_file(out / ("multimodal_dataset/list_folder" if layout == "mcubes" else "") / f"{split}.txt", text)
    if layout == "folder":
        write_file(out / "classes.txt", (CLASSES / "synthetic.txt").read_text(encoding="utf-8"))


def write_file(path: Path, content: np.ndarray | str) -> None:
    """Text, .npy, JPEG, PNG of 8 or 16 bit; Pillow writes no 16-bit colour, so those chunks are put together here."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif path.suffix == ".npy":
        np.save(path, content)
    elif content.dtype == np.uint8:
        Image.fromarray(content).save(path, quality=95)  # of JPEG
    else:
        height, width = content.shape[:2]
        rows = content.astype(">u2").reshape(height, -1).view(np.uint8)  # (H, 2 W C)
        rows = np.pad(rows, ((0, 0), (1, 0)))  # a row begins with its filter: none
        header = struct.pack(">IIBBBBB", width, height, 16, 2 if content.ndim == 3 else 0, 0, 0, 0)
        chunks = b"IHDR" + header, b"IDAT" + zlib.compress(rows.tobytes()), b"IEND"
        chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
