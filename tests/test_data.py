"""data.py: the loaders against files in each data set's own formats, augmentation, modality dropping, corruptions."""
import pathlib
import shutil
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import open_dataset
from datasets import derived, export, files, layouts, synthetic

SIZE = 64
GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folder with 12 painted scenes (6 train, 3 val, 3 test) in each of the layouts."""
    root = tmp_path_factory.mktemp("exported")
    for layout in layouts.LAYOUTS:
        export.export(root / layout, layout, count=12, size=SIZE, seed=3)
    return root


@pytest.fixture
def mini(exported, tmp_path):
    """A function that copies one layout, for a test that breaks something in it."""
    return lambda layout: shutil.copytree(exported / layout, tmp_path / layout)


def painted(split, index, size=SIZE):
    condition, case = synthetic.CONDITIONS[index % 5], ("none", *synthetic.CASES)[index % 6]
    return synthetic.paint(3, split, index, size, condition, case)


def chw(image, scale=1):
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))) * scale


def png(path, array, filters=None):
    """A PNG writer of the test's own; `filters` chooses None (0), Sub (1) or Up (2) for each row."""
    height, width, channels = array.shape
    rows = array.astype(">u2" if array.dtype == np.uint16 else "u1").reshape(height, -1).view(np.uint8).astype(int)
    pixel, lines = array.dtype.itemsize * channels, b""
    for y in range(height):
        kind = filters[y] if filters is not None else 0
        before = {0: 0, 1: np.concatenate([np.zeros(pixel, int), rows[y, :-pixel]]), 2: rows[y - 1] if y else 0}[kind]
        lines += bytes([kind]) + ((rows[y] - before) % 256).astype(np.uint8).tobytes()
    colour = {1: 0, 3: 2, 4: 6}[channels]
    head = struct.pack(">IIBBBBB", width, height, 8 * array.dtype.itemsize, colour, 0, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for chunk in (b"IHDR" + head, b"IDAT" + zlib.compress(lines), b"IEND"):
            file.write(struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)))


def folder_dataset(root, count=4, height=40, width=60, classes=5, seed=0):
    """A folder data set of noise whose event image repeats the label, so that both must move together."""
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("".join(f"class {k}\n" for k in range(classes)))
    for split in synthetic.SPLITS:
        for i in range(count):
            label = rng.integers(0, classes, (height, width, 1), np.uint8)
            png(root / f"rgb/{split}/{i}.png", rng.integers(0, 256, (height, width, 3), np.uint8))
            png(root / f"event/{split}/{i}.png", np.repeat(label + 1, 3, axis=2))
            png(root / f"labels/{split}/{i}.png", label)
    return root


# ---- what comes out is what was written -----------------------------------------------------------------------------
def test_class_lists_have_the_published_lengths_and_distinct_names():
    for layout, count, first, last in (("deliver", 25, "Building", "Truck"), ("muses", 19, "road", "bicycle"),
                                       ("mcubes", 20, "asphalt", "sky"), ("nyuv2", 40, "wall", "otherprop")):
        names, palette = layouts.read_classes(layouts.CLASSES / f"{layout}.txt")
        assert (len(set(names)), names[0], names[-1]) == (count, first, last)
        assert palette.shape == (count, 3) and len(np.unique(palette, axis=0)) >= count - 1


@pytest.mark.parametrize("split", synthetic.SPLITS)
def test_deliver_files_come_back_pixel_by_pixel(exported, split):
    dataset = open_dataset("deliver", exported / "deliver", split)
    assert len(dataset) == {"train": 6, "val": 3, "test": 3}[split]
    assert [frame.name for frame in dataset.frames] == sorted(frame.name for frame in dataset.frames)
    for images, label, name in dataset:
        scene = painted(split, int(name[-6:]))
        for m, modality in enumerate(("rgb", "depth", "event", "lidar")):
            assert torch.equal(images[m], chw(scene[modality])), (name, modality)
        expected = [export.EXPORT_CLASSES["deliver"].split(",")[k] for k in scene["label"].ravel()]
        assert [dataset.classes[k] for k in label.ravel().tolist()] == expected
        assert images.dtype == torch.uint8 and label.dtype == torch.uint8


def test_deliver_conditions_cases_and_raw_depth_are_found(exported):
    dataset = open_dataset("deliver", exported / "deliver", "train")
    assert {frame.case for frame in dataset.frames} == {"none", *synthetic.CASES}
    assert {frame.condition for frame in dataset.frames} == set(synthetic.CONDITIONS)
    assert all(frame.name.startswith(f"{frame.condition}/train/MAP_") for frame in dataset.frames)
    raw = open_dataset("deliver", exported / "deliver", "train", ["lidar", "depth"], depth="raw")
    images, _, name = raw[0]
    scene = painted("train", int(name[-6:]))
    assert torch.equal(images[0], chw(scene["lidar"])) and torch.equal(images[1, 2], chw(scene["depth"])[0])


def test_low_resolution_events_are_enlarged_by_nearest_neighbour(exported):
    dataset = open_dataset("deliver", exported / "deliver", "train", ["event"])
    index = [frame.case for frame in dataset.frames].index("eventlowres")
    stored = np.asarray(Image.open(dataset.frames[index].images[0]))
    assert stored.shape == (SIZE // 2, SIZE // 2, 3)
    assert torch.equal(dataset[index][0][0], chw(stored.repeat(2, axis=0).repeat(2, axis=1)))


def test_deliver_ids_0_and_255_are_ignored_and_1_to_25_are_classes(mini):
    root = mini("deliver")
    path = open_dataset("deliver", root, "val").frames[0].label
    ids = np.zeros((SIZE, SIZE, 3), np.uint8)
    ids[:, :, 0] = np.resize([*range(26), 255], (SIZE, SIZE))
    Image.fromarray(ids).save(path)
    label = open_dataset("deliver", root, "val")[0][1]
    assert label.ravel()[:27].tolist() == [255, *range(25), 255]


def test_muses_files_come_back_in_16_bits_and_in_16_by_9(exported):
    dataset = open_dataset("muses", exported / "muses", "train", ["lidar", "rgb", "radar", "event"])
    for images, label, name in dataset:
        scene = painted("train", int(name[-6:]), (SIZE, SIZE * 16 // 9))
        assert images.shape == (4, 3, SIZE, SIZE * 16 // 9) and images.dtype == torch.float32
        assert torch.allclose(images[0], chw(scene["lidar"], 0.004), atol=1e-7)     # 255 is 102 metres
        assert torch.allclose(images[1], chw(scene["rgb"]) / 255, atol=1e-7)
        columns = torch.arange(images.shape[3]) % 4 == 0
        assert torch.equal(images[2], images[0] * columns)
        expected = [export.EXPORT_CLASSES["muses"].split(",")[k] for k in scene["label"].ravel()]
        assert [dataset.classes[k] for k in label.ravel().tolist()] == expected
    assert open_dataset("muses", exported / "muses", "train").modalities == ["rgb", "event", "lidar"]
    assert open_dataset("muses", exported / "muses", "train", ["rgb", "event"])[0][0].dtype == torch.uint8


def test_muses_test_split_has_no_labels(exported):
    for _, label, _ in open_dataset("muses", exported / "muses", "test"):
        assert label.unique().tolist() == [255]


def test_rain_is_not_found_in_train(exported):
    frames = open_dataset("muses", exported / "muses", "train").frames
    assert [frame.name.split("/")[:3] for frame in frames if frame.condition == "rain"] == [["train", "rain", "day"]]
    assert [frame.name.split("/")[:3] for frame in frames if frame.case == "night"] == [["train", "clear", "night"]]


def test_muses_ranges_have_more_than_256_values_and_read_from_projected_npz_too(mini):
    root = mini("muses")
    frame = open_dataset("muses", root, "val", ["lidar"]).frames[0]
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 65536, (SIZE, SIZE * 16 // 9, 3), np.uint16)
    png(frame.images[0], stored, rng.integers(0, 3, SIZE))
    image = open_dataset("muses", root, "val", ["lidar"], ranges={"lidar": ["float", -1, 3.4]})[0][0][0]
    expected = (stored / 150 - 100) / 100       # float64
    assert len(image.unique()) > 5000
    assert np.abs(image.numpy().transpose(1, 2, 0) - expected).max() < 1e-6

    moved = root / "projected_to_rgb/lidar" / frame.images[0].relative_to(root / "lidar")
    for split in synthetic.SPLITS:
        (root / "projected_to_rgb/lidar" / split).mkdir(parents=True)
    moved.parent.mkdir(parents=True, exist_ok=True)
    np.savez(moved.with_suffix(".npz"), (stored / 150 - 100).astype(np.float32))
    again = open_dataset("muses", root, "val", ["lidar"])
    assert again.frames[0].images[0] == moved.with_suffix(".npz")
    assert torch.allclose(again[0][0][0], image, atol=1e-6)
    moved.with_suffix(".npz").rename(moved.with_suffix(".old"))
    np.save(moved.with_suffix(".npy"), np.full((SIZE, SIZE * 16 // 9, 3), 20.0))       # metres, as in .npz
    assert open_dataset("muses", root, "val", ["lidar"])[0][0].unique().tolist() == [np.float32(0.2)]


def test_mcubes_files_come_back_without_the_left_192_columns(exported):
    dataset = open_dataset("mcubes", exported / "mcubes", "test")
    assert dataset.modalities == ["rgb", "aolp", "dolp", "nir"] and len(dataset) == 3
    for images, label, name in dataset:
        scene = painted("test", int(name[-6:]))
        angle = torch.from_numpy(scene["depth"][..., 0]).float() * torch.pi / 255
        assert torch.allclose(images[0], chw(scene["rgb"]) / 255, atol=1e-6)
        assert torch.allclose(images[1], torch.stack([angle.sin(), angle.cos(), angle.sin()]), atol=1e-6)
        assert torch.allclose(images[2], chw(scene["event"])[:1] / 255, atol=1e-6)
        assert torch.allclose(images[3], chw(scene["lidar"])[2:] / 255, atol=1e-6)
        expected = [export.EXPORT_CLASSES["mcubes"].split(",")[k] for k in scene["label"].ravel()]
        assert [dataset.classes[k] for k in label.ravel().tolist()] == expected


def test_the_mask_of_near_infrared_is_not_applied_as_in_the_published_code(mini):
    root = mini("mcubes")
    frame = open_dataset("mcubes", root, "val", ["nir"]).frames[0]
    mask = np.random.default_rng(1).integers(0, 2, (SIZE, SIZE + 192), np.uint8) * 255
    before = open_dataset("mcubes", root, "val", ["nir"])[0][0]
    export.write_file(root / "multimodal_dataset/NIR_warped_mask" / frame.images[0].name, mask)
    assert before.any() and torch.equal(open_dataset("mcubes", root, "val", ["nir"])[0][0], before)


def test_folder_files_come_back_in_any_order_of_modalities(exported):
    root = exported / "folder"
    dataset = open_dataset("folder", root, "val", ["lidar", "depth", "rgb"])
    scenes = open_dataset("synthetic", limit=1)
    assert dataset.classes == scenes.classes and dataset.palette.tolist() == scenes.palette.tolist()
    assert (dataset.classes[0], dataset.classes[-1], len(dataset.classes)) == ("Sky", "Pedestrian", 12)
    for images, label, name in dataset:
        scene = painted("val", int(name[-6:]))
        assert torch.allclose(images[0], chw(scene["lidar"]) / 255)
        assert torch.allclose(images[1], chw(scene["depth"])[:1] / 255)
        assert torch.allclose(images[2], chw(scene["rgb"]) / 255)
        assert torch.equal(label, torch.from_numpy(scene["label"]).long())
    assert dataset.frames[0].condition in synthetic.CONDITIONS
    assert open_dataset("folder", root, "val").modalities == ["rgb", "depth", "event", "lidar"]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bit_png_keeps_all_bits_whatever_the_row_filter(tmp_path, channels):
    rng = np.random.default_rng(channels)
    stored = rng.integers(0, 65536, (31, 45, channels), np.uint16)
    png(tmp_path / "a.png", stored, rng.integers(0, 3, 31))
    assert np.array_equal(np.atleast_3d(files.read_file(tmp_path / "a.png")), stored[..., :3])
    if channels < 4:
        export.write_file(tmp_path / "b.png", np.squeeze(stored))
        assert np.array_equal(np.atleast_3d(files.read_file(tmp_path / "b.png")), stored)


def test_synthetic_items_are_the_painted_scenes_and_stay_so_when_cached():
    dataset = open_dataset("synthetic", split="val", size=32, limit=7, modalities=["event", "rgb"])
    for _ in range(2):
        for i, (images, label, name) in enumerate(dataset):
            scene = synthetic.paint(0, "val", i, 32)
            assert torch.equal(images[0], chw(scene["event"])) and torch.equal(images[1], chw(scene["rgb"]))
            assert torch.equal(label, torch.from_numpy(scene["label"]).long()) and name == f"val/{i:06d}"
            assert dataset.frames[i][1:3] == (scene["condition"], scene["case"])


# ---- NYU Depth v2 ---------------------------------------------------------------------------------------------------
def of_frame(name):
    return painted(name[:-4], int(name[-4:]))


@pytest.mark.parametrize("classes", [40, 13])
def test_nyuv2_files_come_back_with_either_list_of_classes(exported, classes):
    assert len(open_dataset("nyuv2", exported / "nyuv2", "train")) == 6
    dataset = open_dataset("nyuv2", exported / "nyuv2", "val", classes=classes)
    assert len(dataset) == 6 and len(dataset.classes) == len(dataset.palette) == classes
    assert dataset.modalities == ["rgb", "depth"] and dataset.normalisation == "rgb"
    assert {(frame.condition, frame.case) for frame in dataset.frames} == {("none", "none")}
    for images, label, name in dataset:
        scene = of_frame(name)
        assert (images[0].int() - chw(scene["rgb"]).int()).abs().float().mean() < 8      # through JPEG
        assert torch.equal(images[1], chw(scene["depth"]))
        expected = export.EXPORT_CLASSES["nyuv2" if classes == 40 else "nyuv2_13"].split(",")
        assert [dataset.classes[k] for k in label.ravel().tolist()] == [expected[k] for k in scene["label"].ravel()]


def test_nyuv2_ids_0_and_255_are_ignored_and_higher_ones_than_the_last_class_are_named(mini):
    root = mini("nyuv2")
    path = open_dataset("nyuv2", root, "val").frames[0].label
    ids = np.resize([*range(41), 255], (SIZE, SIZE)).astype(np.uint8)
    Image.fromarray(ids).save(path)
    label = open_dataset("nyuv2", root, "val")[0][1]
    assert label.ravel()[:42].tolist() == [255, *range(40), 255]
    Image.fromarray(ids).save(path.parents[1] / "Label13" / path.name)
    with fails(ValueError, path.parents[1] / "Label13" / path.name, "label 14,"):
        open_dataset("nyuv2", root, "val", classes=13)[0]


def test_nyuv2_holds_out_frames_of_the_train_list_spread_evenly(exported):
    def names(split, hold_out):
        dataset = open_dataset("nyuv2", exported / "nyuv2", split, hold_out=hold_out)
        return [frame.name for frame in dataset.frames]

    every, test = names("train", 0), names("test", 0)
    assert names("val", 0) == test and not set(every) & set(test)
    assert names("val", 2) == [every[0], every[3]] and names("train", 2) == [every[i] for i in (1, 2, 4, 5)]
    assert names("test", 2) == test
    for wrong in (6, 7, -1):
        with fails(ValueError, f"--hold-out {wrong}", "6 frames"):
            names("train", wrong)
    with fails(ValueError, "--hold-out", "nyuv2"):
        open_dataset("synthetic", hold_out=2)


def test_nyuv2_lists_may_name_files_and_the_root_may_be_the_parent(mini, tmp_path):
    root = mini("nyuv2")
    before = [frame.images for frame in open_dataset("nyuv2", root, "train").frames]
    ids = (root / "train.txt").read_text().split()
    (root / "train.txt").write_text("\n".join(f"RGB/{id}.jpg Label/{id}.png" for id in ids) + "\n\n")
    assert [frame.images for frame in open_dataset("nyuv2", root, "train").frames] == before
    root.rename(tmp_path / "NYUDepthv2")
    found = open_dataset("nyuv2", tmp_path, "train").frames
    assert [frame.images[0].relative_to(tmp_path / "NYUDepthv2") for frame in found] == [
        images[0].relative_to(root) for images in before]


def test_nyuv2_raw_depth_is_a_tenth_of_the_metres_and_event_and_lidar_are_derived_from_it(mini):
    root, modalities = mini("nyuv2"), ["lidar", "rgb", "depth", "event"]
    dataset = open_dataset("nyuv2", root, "train", modalities, depth="raw")
    frame, shape = dataset.frames[1], (SIZE, SIZE)
    rgb, eight = np.asarray(Image.open(frame.images[1])), np.asarray(Image.open(frame.images[2]))
    images = dataset[1][0]
    assert images.dtype == torch.uint8 and torch.equal(images[2], torch.tensor(eight).expand(3, *shape))
    metres = eight / np.float32(25.5)
    assert torch.equal(images[0], chw(derived.derive_lidar(metres, frame.name)))
    assert torch.equal(images[3], chw(derived.derive_event(rgb, metres, frame.name)))
    assert torch.equal(images[[0, 3]], open_dataset("nyuv2", root, "train", ["lidar", "event"])[1][0])   # never of HHA

    millimetres = np.random.default_rng(0).integers(0, 12000, shape).astype(np.uint16)
    for path in (root / "Depth").iterdir():
        export.write_file(path, millimetres)
    images = open_dataset("nyuv2", root, "train", modalities, depth="raw")[1][0]
    assert np.abs(images[2].numpy() - (millimetres / 10000).clip(0, 1)).max() < 1e-6
    expected = derived.derive_lidar((millimetres / 1000).clip(0, 10).astype(np.float32), frame.name)
    apart = np.abs(images[0].numpy() * 255 - expected.transpose(2, 0, 1))
    assert apart.max() < 1.01 and (apart > 0.01).mean() < 0.001         # the metres' last bit can turn a rounding


def test_nyuv2_without_hha_asks_for_raw_depth(mini):
    root = mini("nyuv2")
    shutil.rmtree(root / "HHA")
    with fails(FileNotFoundError, root / "HHA", "--depth raw", root / "Depth"):
        open_dataset("nyuv2", root, "train")
    assert len(open_dataset("nyuv2", root, "train", ["rgb"])) == len(open_dataset("nyuv2", root, depth="raw")) == 6


# ---- sizes, augmentation, reproducibility ---------------------------------------------------------------------------
def from_golden(size):
    """How far the two frames are from the published ones: in grey levels, and in label pixels."""
    golden, levels, wrong = np.load(GOLDEN / "deliver_val.npz"), 0, 0
    dataset = open_dataset("deliver", GOLDEN / "deliver", "val", size=size)
    assert len(dataset) == 2
    for images, label, name in dataset:
        frame, grey = f"{size}_{name[-6:]}", np.array([0.0175, 1 / 255, 1 / 255, 1 / 255])[:, None, None, None]
        images = data.normalise(images[None], dataset.modalities, dataset.normalisation)[0]     # (M, 3, H, W)
        assert label.shape == golden[f"label_{frame}"].shape
        wrong += (label.numpy() != golden[f"label_{frame}"]).sum()
        levels = max(levels, (np.abs(images.numpy()[:, :, ::3, ::3] - golden[f"images_{frame}"]) / grey).max())
    return levels, wrong


@pytest.mark.parametrize("size, levels", [(128, 1), (100, 2)])     # 100 is resized twice: to 100, then to 128
def test_deliver_frames_are_what_the_published_loader_and_transform_give(size, levels):
    found, wrong = from_golden(size)
    assert found < 1.001 * levels and wrong == 0


@pytest.mark.parametrize("rule", ["normalisation", "interpolation", "labels", "sizes"])
def test_the_published_frames_tell_other_rules_apart(rule, monkeypatch):
    normalise, centre = data.normalise, lambda old, new: ((np.arange(new) + 0.5) * old / new).astype(int)
    levels, wrong = 2, 0
    if rule == "normalisation":
        monkeypatch.setattr(data, "normalise", lambda images, modalities, how: normalise(images, modalities, "all"))
    elif rule == "interpolation":
        monkeypatch.setattr(data, "resize", data.nearest)
    elif rule == "labels":
        monkeypatch.setattr(data, "nearest", lambda pixels, size: pixels[centre(pixels.shape[0], size[0])][
            :, centre(pixels.shape[1], size[1])])
        levels, wrong = 1e9, 50
    else:       # at once, without the step in between
        monkeypatch.setattr(data, "resized_to", lambda shape, size: [(128, 128)])
    found = from_golden(100)
    assert found[0] > levels or found[1] > wrong


def test_evaluation_sizes_are_multiples_of_32_and_labels_are_not_mixed(exported):
    dataset = open_dataset("muses", exported / "muses", "val", size=32)
    images, label, _ = dataset[0]
    assert images.shape == (3, 3, 32, 64) and label.shape == (32, 64)       # 64 x 113, then 32 x 56
    assert set(label.unique().tolist()) <= set(open_dataset("muses", exported / "muses", "val")[0][1].unique().tolist())
    exact = open_dataset("muses", exported / "muses", "val", size=(48, 40))[0]
    assert exact[0].shape == (3, 3, 48, 40) and exact[1].shape == (48, 40)
    larger = open_dataset("folder", exported / "folder", "val", size=2 * SIZE)[0]
    assert larger[0].shape == (4, 3, 2 * SIZE, 2 * SIZE)


def gradient_dataset(root):
    """Frames of 40 x 60 whose event image tells a pixel's column and row, and whose label tells the same in bands."""
    y, x = np.mgrid[:40, :60].astype(np.uint8)
    root.mkdir()
    (root / "classes.txt").write_text("".join(f"class {k}\n" for k in range(50)))
    for i in range(12):
        png(root / f"event/train/{i:02d}.png", np.dstack([4 * x, 6 * y, np.full_like(x, 200)]))
        png(root / f"labels/train/{i:02d}.png", (y // 8 * 10 + x // 6)[..., None])
    return root


def test_augmentation_moves_images_and_label_together_and_pads_right_and_below(tmp_path):
    dataset = open_dataset("folder", gradient_dataset(tmp_path / "d"), size=48, augment=True)
    padded = 0
    for i in range(len(dataset)):
        (image,), label, _ = dataset[3, i]
        assert image.shape == (3, 48, 48) and label.shape == (48, 48)
        inside = label != 255
        assert torch.equal(inside, inside[:, :1] & inside[:1]) and inside[0, 0]     # a rectangle in the corner
        assert (image[2][inside] == 200).all() and not image[:, ~inside].any()
        column, row, band = image[0][inside] / 4, image[1][inside] / 6, label[inside].int()
        assert (column - band % 10 * 6 - 2.5).abs().max() < 4 and (row - band // 10 * 8 - 3.5).abs().max() < 5
        padded += int((~inside).any())
    assert 0 < padded < 12


def test_the_scale_is_relative_to_the_crop_and_flips_and_places_vary(tmp_path):
    dataset = open_dataset("folder", gradient_dataset(tmp_path / "d"), size=30, augment=True, seed=5)
    starts, flips = set(), set()
    for i in range(len(dataset)):
        (image,), label, _ = dataset[1, i]
        scale = np.random.default_rng([5, 1, i]).uniform(0.5, 2) * 30 / 40     # the documented source of chance
        height, width = (label != 255).sum(0).max(), (label != 255).sum(1).max()
        assert (height, width) == (min(30, round(40 * scale)), min(30, round(60 * scale)))
        across, down = image[0, 0, :width].double(), image[1, :height, 0].double()
        middle = slice(2, -2)
        assert abs(across[middle].diff().mean()).item() == pytest.approx(4 / scale, rel=0.06)
        assert down[middle].diff().mean().item() == pytest.approx(6 / scale, rel=0.06)
        flips.add(bool(across[0] > across[-1]))
        starts.add((across.min().item() // 8, down.min().item() // 8))
    assert flips == {True, False} and len(starts) > 5


class Chance:
    """A source of chance whose answers are known."""
    def __init__(self, draws, factors=()):
        self.draws, self.factors = np.array(draws), iter(factors)

    def random(self, _):
        return self.draws

    def uniform(self, *_):
        return next(self.factors)


@pytest.mark.parametrize("top", [255, 1])
def test_colour_jitter_is_brightness_then_contrast_then_saturation(top):
    image = np.random.default_rng(0).integers(60, 120, (20, 30, 3), np.uint8)

    def grey(values):
        return (values @ [0.299, 0.587, 0.114])[..., None]

    values = 1.2 * image
    values = grey(values).mean() + 0.7 * (values - grey(values).mean())
    values = grey(values) + 0.6 * (values - grey(values))
    given = image if top == 255 else image / np.float32(255)
    jittered = data.jitter(given, Chance([0, 1], (1.2, 0.7, 0.6)))
    assert jittered.dtype == np.uint8 and np.abs(jittered - values).max() < 2.5     # rounded after each of the three


def test_blur_has_a_deviation_of_0_8_pixels_and_nothing_happens_by_default():
    image = np.zeros((7, 7, 3), np.uint8)
    image[3, 3] = 255
    weights = np.exp(-np.array([1, 0, 1]) / (2 * 0.8**2))
    weights /= weights.sum()
    blurred = data.jitter(image, Chance([1, 0]))
    assert np.abs(blurred[2:5, 2:5, 0] - 255 * np.outer(weights, weights)).max() < 1
    assert blurred.sum((0, 1)).tolist() == [blurred[2:5, 2:5, 0].sum()] * 3
    assert data.jitter(image, Chance([0.2, 0.2])) is image


def test_only_rgb_is_jittered(tmp_path):
    root = gradient_dataset(tmp_path / "d")
    shutil.copytree(root / "event", root / "rgb")
    dataset = open_dataset("folder", root, size=48, augment=True)
    changed = [not torch.equal(*dataset[0, i][0]) for i in range(12)]
    assert dataset.modalities == ["rgb", "event"] and 0 < sum(changed) < 12     # 36 % of the frames


def test_items_depend_on_seed_epoch_and_index_only():
    def items(workers, seed=1, epoch=2):
        dataset = open_dataset("synthetic", split="train", size=32, augment=True, seed=seed, limit=10)
        keys = [(epoch, i) for i in (3, 1, 9, 0, 4, 4)]
        loader = torch.utils.data.DataLoader(dataset, batch_size=2, sampler=keys, num_workers=workers)
        np.random.seed(workers)     # global state must not matter
        torch.manual_seed(workers)
        return [torch.cat(parts) for parts in list(zip(*loader, strict=True))[:2]]

    one, two = items(0), items(2)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert torch.equal(one[0][4], one[0][5])
    assert not torch.equal(one[0], items(0, seed=2)[0]) and not torch.equal(one[0], items(0, epoch=3)[0])


def test_limit_spreads_over_the_conditions(exported):
    every = open_dataset("deliver", exported / "deliver", "train").frames
    some = open_dataset("deliver", exported / "deliver", "train", limit=3).frames
    assert some == [every[0], every[2], every[4]]
    assert open_dataset("deliver", exported / "deliver", "train", limit=100).frames == every


# ---- modality dropping and corruptions ------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["rgb", "all"])
def test_normalise_gives_the_same_for_bytes_and_floats(how):
    images, modalities = torch.randint(0, 256, (2, 3, 3, 5, 7), dtype=torch.uint8), ["event", "rgb", "depth"]
    expected = images.numpy() / 255                     # (B, M, 3, H, W)
    for m in (0, 1, 2) if how == "all" else (1,):
        expected[:, m] -= np.reshape([0.485, 0.456, 0.406], (3, 1, 1))
        expected[:, m] /= np.reshape([0.229, 0.224, 0.225], (3, 1, 1))
    for given in (images, images / 255):
        assert np.abs(data.normalise(given, modalities, how).numpy() - expected).max() < 1e-6
        assert data.normalise(given, modalities, how).dtype == torch.float32
    with fails(ValueError, "'none'", "rgb or all"):
        data.normalise(images, modalities, "none")


def test_a_zero_filled_modality_is_an_empty_one_by_the_published_rule(exported):
    for name, empty in (("deliver", 0.0), ("synthetic", -2.0)):
        dataset = open_dataset(name, None if name == "synthetic" else exported / name, "val", limit=1)
        nothing = data.normalise(torch.zeros(1, 4, 3, 2, 2), dataset.modalities, dataset.normalisation)
        assert nothing[:, 1:].max() <= empty / 2 and nothing[:, 0].max() < -1.8, name


def test_present_has_uniform_sizes_and_uniform_subsets():
    draws = data.draw_present(60000, 4, torch.Generator().manual_seed(0))
    assert draws.any(1).all()
    sizes = torch.bincount(draws.sum(1), minlength=5)[1:] / len(draws)
    assert (sizes - 0.25).abs().max() < 0.01, sizes
    pairs = draws[draws.sum(1) == 2].long() @ torch.tensor([1, 2, 4, 8])
    shares = torch.bincount(pairs)[[3, 5, 9, 6, 10, 12]] / len(pairs)
    assert (shares - 1 / 6).abs().max() < 0.015, shares
    complete = data.draw_present(60000, 4, torch.Generator().manual_seed(0), complete=0.4).all(1).float().mean()
    assert abs(complete - (0.4 + 0.6 * 0.25)) < 0.01
    assert data.draw_present(50, 1, torch.Generator().manual_seed(0)).all()


def noise_inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(7, 3, 3, 24, 20, generator=generator)
    present = data.draw_present(7, 3, generator)
    return images, present, [f"frame {i}" for i in range(7)]


@pytest.mark.parametrize("r", [0.25, 0.5, 0.75])
def test_random_missing_zeroes_the_share_r_of_missing_modalities_only(r):
    images, present, names = noise_inputs()
    result = data.random_missing(images, present, r, names)
    assert torch.equal(result[present], images[present])
    lost = result[~present] == 0
    assert torch.equal(result[~present][~lost], images[~present][~lost])
    assert abs(lost.float().mean() - r) < 0.02


@pytest.mark.parametrize("level, density, deviation", [("low", 0.05, 0.1), ("mid", 0.1, 0.2), ("high", 0.2, 0.5)])
def test_sensor_noise_has_the_stated_density_and_deviation(level, density, deviation):
    images, _, names = noise_inputs()
    images = images.clamp(-1, 1) * 0.5
    images[:, :, 0, 0, 0], images[:, :, 0, 0, 1] = -2 - torch.rand(7, 3), 3 + torch.rand(7, 3)     # the extremes
    noisy = data.sensor_noise(images, level, names, ["rgb", "event", "depth"])
    events, clean = noisy[:, 1], images[:, 1]
    salt = events == clean.amax((1, 2, 3), keepdim=True)
    pepper = events == clean.amin((1, 2, 3), keepdim=True)
    assert abs(salt.float().mean() - density / 2) < 0.01 and abs(pepper.float().mean() - density / 2) < 0.01
    assert torch.equal(events[~salt & ~pepper], clean[~salt & ~pepper])         # events get no Gaussian noise
    change = (noisy - images)[:, [0, 2]]
    untouched = change[change.abs() < 0.99 if deviation < 0.3 else change.abs() < 1.4]
    assert abs(untouched.std() - deviation) < 0.05 * deviation + 0.02


def test_corruptions_do_not_depend_on_the_batch():
    images, present, names = noise_inputs()
    order = [5, 0, 3]
    for whole, part in (
            (data.random_missing(images, present, 0.5, names),
             data.random_missing(images[order], present[order], 0.5, [names[i] for i in order])),
            (data.sensor_noise(images, "mid", names, ["rgb", "depth", "event"]),
             data.sensor_noise(images[order], "mid", [names[i] for i in order], ["rgb", "depth", "event"]))):
        assert torch.equal(whole[order], part)
    other = data.sensor_noise(images, "mid", names, ["rgb", "depth", "event"], seed=1)
    assert not torch.equal(other, data.sensor_noise(images, "mid", names, ["rgb", "depth", "event"]))


# ---- one clear sentence for everything that can be wrong ------------------------------------------------------------
def fails(kind, *parts):
    """Expect an error of one line that has all these parts."""
    class Check:
        def __enter__(self):
            self.raises = pytest.raises(kind)
            self.error = self.raises.__enter__()

        def __exit__(self, *args):
            caught = self.raises.__exit__(*args)
            text = str(self.error.value)
            assert "\n" not in text and all(str(part) in text for part in parts), text
            return caught
    return Check()


@pytest.mark.parametrize("layout, expected", [
    ("deliver", "img/**/*_rgb_front.png, hha/**/*_depth_front.png"), ("muses", "gt_semantic/**/*_gt_labelTrainIds.png"),
    ("mcubes", "train.txt, test.txt, polL_color/**/*.png"), ("nyuv2", "RGB/**/*.jpg, HHA/**/*.png, Depth/**/*.png"),
    ("folder", "<modality>/**/*.png, labels/**/*.png")])
def test_a_data_set_that_is_not_there_is_answered_with_what_was_looked_for_and_where_to_read_more(
        tmp_path, layout, expected):
    with fails(FileNotFoundError, tmp_path / "nowhere", expected, "docs/data.md"):
        open_dataset(layout, tmp_path / "nowhere")
    with fails(FileNotFoundError, "--root", expected):
        open_dataset(layout)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/classes.txt").write_text("a\nb\n")
    (tmp_path / "empty/rgb").mkdir()
    with fails(FileNotFoundError, tmp_path / "empty", "val", expected, "docs/data.md"):
        open_dataset(layout, tmp_path / "empty", "val")
    page = (GOLDEN.parents[1] / "docs/data.md").read_text(encoding="utf-8")
    assert f"| `{layout}` |" in page


def test_a_missing_sensor_file_is_named(mini):
    for layout, modality in (("deliver", "depth"), ("muses", "lidar"), ("mcubes", "dolp"), ("folder", "depth"),
                             ("nyuv2", "depth")):
        root = mini(layout)
        dataset = open_dataset(layout, root, "train")
        path = dataset.frames[1].images[dataset.modalities.index(modality)]
        path.unlink()
        again = open_dataset(layout, root, "train")
        assert len(again) == len(dataset)
        with fails(FileNotFoundError, path, "missing"):
            again[1]


def test_a_missing_label_and_a_missing_picture_are_named_too(mini):
    root = mini("deliver")
    frames = open_dataset("deliver", root, "val").frames
    frames[0].label.unlink()
    frames[1].images[0].unlink()
    dataset = open_dataset("deliver", root, "val", modalities=["rgb", "lidar"], skip_broken=2)
    assert [frame.name for frame in dataset.frames] == [frames[2].name]
    assert str(frames[0].label) in dataset.broken[0] and str(frames[1].images[0]) in dataset.broken[1]


def test_truncated_and_damaged_pictures_are_named(mini):
    root = mini("deliver")
    path = open_dataset("deliver", root, "val").frames[0].images[0]
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for cut in (0, 7, 30, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:cut])
        with fails(ValueError, path, "cannot be read"):
            files.read_image(path)
    for place in rng.integers(60, len(whole) - 20, 10):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1:])
        with fails(ValueError, path, "cannot be read"):
            files.read_image(path)


def test_a_picture_beyond_pillows_size_limit_is_named(mini, monkeypatch):
    root = mini("deliver")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with fails(ValueError, root, "_semantic_front.png", "exceeds limit"):
        open_dataset("deliver", root, "val")[0]


def test_sensor_and_label_of_different_size_are_named(mini):
    root = mini("deliver")
    frame = open_dataset("deliver", root, "val").frames[0]
    Image.fromarray(np.zeros((SIZE, SIZE + 2, 3), np.uint8)).save(frame.images[3])
    with fails(ValueError, frame.images[3], f"{SIZE} rows of {SIZE + 2}", frame.label):
        open_dataset("deliver", root, "val")[0]


@pytest.mark.parametrize("layout, value", [("deliver", 26), ("muses", 19), ("mcubes", 20), ("nyuv2", 41),
                                           ("folder", 12)])
def test_a_label_out_of_range_is_named_with_its_value(mini, layout, value):
    root = mini(layout)
    path = open_dataset(layout, root, "val").frames[0].label
    ids = np.array(Image.open(path))
    ids[9, -5] = value
    Image.fromarray(ids).save(path)
    with fails(ValueError, path, f"label {value},"):
        open_dataset(layout, root, "val")[0]


def test_unknown_names_are_answered_with_the_known_ones(exported):
    with fails(ValueError, "'thermal'", "rgb, depth, event, lidar"):
        open_dataset("deliver", exported / "deliver", modalities=["rgb", "thermal"])
    with fails(ValueError, "'rgb'", "twice"):
        open_dataset("synthetic", modalities=["rgb", "rgb"])
    with fails(ValueError, "'kitti'", "deliver"):
        open_dataset("kitti")
    with fails(ValueError, "'dev'", "train, val, test"):
        open_dataset("synthetic", split="dev")
    with fails(ValueError, "'depth map'", "hha, raw"):
        open_dataset("deliver", exported / "deliver", depth="depth map")
    with fails(ValueError, "20 ", "13, 40"):
        open_dataset("nyuv2", exported / "nyuv2", classes=20)
    with fails(ValueError, "label map", "folder"):
        open_dataset("deliver", exported / "deliver", label_map="shift:-1")


@pytest.mark.parametrize("suffix", [".h5", ".bin"])
def test_raw_muses_files_are_answered_with_how_to_project_them(mini, suffix):
    root = mini("muses")
    path = open_dataset("muses", root, "val", ["event"]).frames[0].images[0]
    path.rename(path.with_suffix(suffix))
    with fails(FileNotFoundError, path.with_suffix(suffix), "project"):
        open_dataset("muses", root, "val", ["rgb", "event"])[0]


def test_nan_and_infinity_are_named(mini):
    root = mini("mcubes")
    frame = open_dataset("mcubes", root, "val").frames[1]
    for path in (frame.images[1], root / "multimodal_dataset/polL_aolp_cos" / frame.images[1].name, frame.images[2]):
        values = np.load(path)
        for bad in (np.nan, np.inf):
            broken = values.copy()
            broken[3, 200] = bad
            np.save(path, broken)
            with fails(ValueError, path, "NaN or infinite"):
                open_dataset("mcubes", root, "val")[1]
        np.save(path, values)


@pytest.mark.parametrize("layout, listing", [("mcubes", "multimodal_dataset/list_folder/val.txt"),
                                             ("nyuv2", "test.txt")])
def test_lists_cannot_lead_out_of_the_root(mini, layout, listing):
    root = mini(layout)
    (root / listing).write_text("../../secret\n/etc/passwd\n..\na\\b\n")
    (root.parent / "secret.png").write_bytes(b"secret")
    frames = open_dataset(layout, root, "val", skip_broken=None)
    assert len(frames) == 0 and all(str(root) in text and "is missing" in text for text in frames.broken)
    assert len(frames.broken) == 4


def test_pickled_arrays_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with fails(ValueError, tmp_path / "a.npy", "cannot be read"):
        files.read_image(tmp_path / "a.npy")


def test_classes_txt_is_checked(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("road 1 2 3\n\ntraffic light 4 5 6\nsky\n")
    names, palette = layouts.read_classes(path)
    assert names == ["road", "traffic light", "sky"] and palette[:2].tolist() == [[1, 2, 3], [4, 5, 6]]
    path.write_text("road 1 2 3\nsky\nroad 4 5 6\n")
    with fails(ValueError, path, "'road'", "twice"):
        layouts.read_classes(path)
    path.write_text("\n")
    with fails(ValueError, path, "0 classes"):
        layouts.read_classes(path)
    with fails(FileNotFoundError, tmp_path / "none.txt"):
        layouts.read_classes(tmp_path / "none.txt")


def test_label_maps_translate_a_folders_own_ids(tmp_path):
    root = folder_dataset(tmp_path / "d", classes=13)
    ids = np.random.default_rng(0).integers(0, 14, (40, 60, 1), np.uint8)      # as NYUv2: 0 is unlabelled
    for i in range(4):
        png(root / f"labels/val/{i}.png", ids)
    expected = np.where(ids[..., 0] == 0, 255, ids[..., 0].astype(int) - 1)
    text = "0=255," + ",".join(f"{id}={id - 1}" for id in range(1, 14))
    for label_map in ("shift:-1", text):
        label = open_dataset("folder", root, "val", ["rgb"], label_map=label_map)[0][1]
        assert np.array_equal(label.numpy(), expected)
    with fails(ValueError, root / "labels/val/0.png", "label 13,"):
        open_dataset("folder", root, "val", ["rgb"])[0]
    with fails(ValueError, "'1:2'"):
        open_dataset("folder", root, "val", ["rgb"], label_map="1:2")
    with fails(ValueError, "3=40"):
        open_dataset("folder", root, "val", ["rgb"], label_map="3=40")


def test_a_modality_of_mixed_depth_is_an_error_rather_than_zeros(tmp_path):
    root = folder_dataset(tmp_path / "d")
    png(root / "rgb/train/2.png", np.full((40, 60, 3), 40000, np.uint16))
    dataset = open_dataset("folder", root, "train", ["rgb"])
    with fails(ValueError, root / "rgb/train/2.png", "is 16 bit, but rgb of the training split is 8 bit"):
        dataset[2]


def test_skip_broken_drops_exactly_the_broken_frames_and_stops_at_one_more(mini):
    root = mini("deliver")
    whole = open_dataset("deliver", root, "train").frames
    whole[0].images[0].write_bytes(b"no picture")
    whole[4].images[2].unlink()
    dataset = open_dataset("deliver", root, "train", skip_broken=2)
    assert dataset.frames == [frame for i, frame in enumerate(whole) if i not in (0, 4)]
    assert str(whole[0].images[0]) in dataset.broken[0] and str(whole[4].images[2]) in dataset.broken[1]
    assert len(dataset.broken) == 2 and dataset[0][2] == whole[1].name
    with fails(ValueError, "2 of 6 train frames are broken", "--skip-broken is 1", whole[4].images[2]):
        open_dataset("deliver", root, "train", skip_broken=1)


# ---- the commands ---------------------------------------------------------------------------------------------------
def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
    return data.main(), capsys.readouterr()


def test_check_counts_every_split_and_lists_the_broken(mini, monkeypatch, capsys):
    for layout in layouts.LAYOUTS:
        root = mini(layout)
        status, printed = run(monkeypatch, capsys, "--data", layout, "--root", root, "--check")
        assert status == 0
        held = "6" if layout == "nyuv2" else "3"            # which has two lists
        assert [line.partition(": rgb (")[0] for line in printed.out.splitlines()] == [
            f"{layout} train, 6 frames", f"{layout} val, {held} frames", f"{layout} test, {held} frames"]
        victim = open_dataset(layout, root, "train").frames[1].images[0]
        victim.write_bytes(victim.read_bytes()[:50])
        status, printed = run(monkeypatch, capsys, "--data", layout, "--root", root, "--check")
        assert status == 1 and f"{layout} train, 5 frames" in printed.out and "; 1 broken" in printed.out
        assert printed.out.splitlines()[3].startswith(str(victim)) and len(printed.out.splitlines()) == 4


def test_check_and_export_explain_what_they_cannot_do(tmp_path, monkeypatch, capsys):
    status, printed = run(monkeypatch, capsys, "--data", "muses", "--root", tmp_path / "none", "--check")
    assert status == 2 and str(tmp_path / "none") in printed.err and len(printed.err.splitlines()) == 1
    (tmp_path / "kept").write_text("")
    status, printed = run(monkeypatch, capsys, "--export", tmp_path, "--layout", "folder")
    assert status == 2 and "not empty" in printed.err
    status, printed = run(monkeypatch, capsys, "--export", tmp_path / "new", "--count", 2)
    assert status == 2 and "--count 2" in printed.err


def test_export_command_writes_what_check_accepts(tmp_path, monkeypatch, capsys):
    status, _ = run(monkeypatch, capsys, "--export", tmp_path / "new", "--layout", "mcubes", "--count", 4, "--size", 16)
    assert status == 0
    assert run(monkeypatch, capsys, "--check", "--data", "mcubes", "--root", tmp_path / "new")[0] == 0


def test_what_is_no_sensor_is_left_out_and_linked_folders_and_upper_case_endings_are_found(mini, tmp_path):
    root = mini("folder")
    before = open_dataset("folder", root, "train")
    pictures = before[0][:2]
    (root / "calib").mkdir()
    (root / "rgb/train/.ipynb_checkpoints").mkdir()
    first = before.frames[0].images[before.modalities.index("rgb")]
    shutil.copy(first, root / "rgb/train/.ipynb_checkpoints" / first.name)
    first.rename(first.with_suffix(".PNG"))
    for folder in (*before.modalities, "labels"):
        (root / folder / "train").rename(tmp_path / folder)
        (root / folder / "train").mkdir()
        (root / folder / "train/linked").symlink_to(tmp_path / folder)
    after = open_dataset("folder", root, "train")
    assert after.modalities == before.modalities and len(after) == len(before)
    assert all(torch.equal(a, b) for a, b in zip(after[0][:2], pictures, strict=True))


def test_a_modality_is_of_one_kind_and_float_colours_in_range(mini):
    root = mini("folder")
    frames = open_dataset("folder", root, "train", ["rgb", "depth"]).frames
    Image.fromarray(np.zeros((SIZE, SIZE), np.uint8)).save(frames[1].images[1])
    with fails(ValueError, frames[1].images[1], "is 8 bit, but depth of the training split is 16 bit"):
        open_dataset("folder", root, "train", ["rgb", "depth"])[1]
    for frame in frames:
        frame.images[0].unlink()
        np.save(frame.images[0].with_suffix(".npy"), np.full((SIZE, SIZE, 3), 255.0))
    with fails(ValueError, frames[0].images[0].with_suffix(".npy"), "255", "0..1"):
        open_dataset("folder", root, "train", ["rgb"])


def test_labels_that_cannot_be_trusted_are_refused(mini):
    root = mini("folder")
    label = open_dataset("folder", root, "train").frames[0].label
    Image.open(label).save(label.with_suffix(".jpg"))
    label.unlink()
    with fails(ValueError, label.with_suffix(".jpg"), "PNG"):
        open_dataset("folder", root, "train")[0]
    label.with_suffix(".jpg").unlink()
    np.save(label.with_suffix(".npy"), np.full((SIZE, SIZE), 70000, np.uint32))
    with fails(ValueError, label.with_suffix(".npy"), "8 or 16 bit"):
        open_dataset("folder", root, "train")[0]


def test_floats_beyond_float32_count_as_infinite(tmp_path):
    np.save(tmp_path / "a.npy", np.full((4, 4), 1e300))
    with fails(ValueError, "a.npy", "NaN or infinite"):
        files.read_image(tmp_path / "a.npy")


@pytest.mark.parametrize("text, found", [("bg 300 0 0", "300"), ("# classes", "# classes")])
def test_a_line_of_classes_txt_that_cannot_be_meant_is_named(tmp_path, text, found):
    (tmp_path / "classes.txt").write_text(f"sky\n{text}\n")
    with fails(ValueError, "classes.txt", found):
        layouts.read_classes(tmp_path / "classes.txt")


def test_classes_txt_may_begin_with_a_byte_order_mark_but_must_be_utf_8(tmp_path):
    (tmp_path / "classes.txt").write_bytes("\ufeffhöhe\nroute 300".encode())
    assert layouts.read_classes(tmp_path / "classes.txt")[0] == ["höhe", "route 300"]
    (tmp_path / "classes.txt").write_bytes("höhe".encode("latin-1"))
    with fails(ValueError, "classes.txt", "UTF-8"):
        layouts.read_classes(tmp_path / "classes.txt")


def test_nothing_is_left_when_all_frames_are_broken(mini):
    root = mini("folder")
    for frame in open_dataset("folder", root, "val").frames:
        frame.label.write_bytes(b"no picture")
    with fails(ValueError, "3 of 3 val frames are broken"):
        open_dataset("folder", root, "val", skip_broken=99)


def test_check_names_the_classes_that_never_occur(mini, capsys, monkeypatch):
    root = mini("folder")
    with open(root / "classes.txt", "a") as file:
        file.write("unicorn\n")
    monkeypatch.setattr(sys, "argv", ["data.py", "--data", "folder", "--root", str(root), "--check"])
    assert data.main() == 0
    assert "0 broken; never in a label:" in (text := capsys.readouterr().out) and "unicorn" in text


def test_painted_scenes_have_no_root():
    with fails(ValueError, "--root x", "--data folder"):
        open_dataset("synthetic", "x")
