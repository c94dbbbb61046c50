"""The loaders against files in each data set's own layout and formats: what comes out is what was written."""

import shutil

import numpy as np
import pytest
import torch
from data_files import SIZE, chw, fails, painted, png
from PIL import Image

from data import open_dataset
from datasets import derived, export, files, layouts, synthetic


# ---- what comes out is what was written -----------------------------------------------------------------------------
def test_class_lists_have_the_published_lengths_and_distinct_names():
    for layout, count, first, last in (
        ("deliver", 25, "Building", "Truck"),
        ("muses", 19, "road", "bicycle"),
        ("mcubes", 20, "asphalt", "sky"),
        ("nyuv2", 40, "wall", "otherprop"),
    ):
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
        assert torch.allclose(images[0], chw(scene["lidar"], 0.004), atol=1e-7)  # 255 is 102 metres
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
    image = open_dataset("muses", root, "val", ["lidar"], ranges={"lidar": ["float", -1, 3.4, [0.0] * 3, [1.0] * 3]})[
        0
    ][0][0]
    expected = (stored / 150 - 100) / 100  # float64
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
    np.save(moved.with_suffix(".npy"), np.full((SIZE, SIZE * 16 // 9, 3), 20.0))  # metres, as in .npz
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
    assert dataset.modalities == ["rgb", "depth"]
    assert {(frame.condition, frame.case) for frame in dataset.frames} == {("none", "none")}
    for images, label, name in dataset:
        scene = of_frame(name)
        assert (images[0].int() - chw(scene["rgb"]).int()).abs().float().mean() < 8  # through JPEG
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
        images[0].relative_to(root) for images in before
    ]


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
    assert torch.equal(images[[0, 3]], open_dataset("nyuv2", root, "train", ["lidar", "event"])[1][0])  # never of HHA

    millimetres = np.random.default_rng(0).integers(0, 12000, shape).astype(np.uint16)
    for path in (root / "Depth").iterdir():
        export.write_file(path, millimetres)
    images = open_dataset("nyuv2", root, "train", modalities, depth="raw")[1][0]
    assert np.abs(images[2].numpy() - (millimetres / 10000).clip(0, 1)).max() < 1e-6
    expected = derived.derive_lidar((millimetres / 1000).clip(0, 10).astype(np.float32), frame.name)
    apart = np.abs(images[0].numpy() * 255 - expected.transpose(2, 0, 1))
    assert apart.max() < 1.01 and (apart > 0.01).mean() < 0.001  # the metres' last bit can turn a rounding


def test_nyuv2_without_hha_asks_for_raw_depth(mini):
    root = mini("nyuv2")
    shutil.rmtree(root / "HHA")
    with fails(FileNotFoundError, root / "HHA", "--depth raw", root / "Depth"):
        open_dataset("nyuv2", root, "train")
    assert len(open_dataset("nyuv2", root, "train", ["rgb"])) == len(open_dataset("nyuv2", root, depth="raw")) == 6


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
