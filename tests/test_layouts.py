"""The loaders against files in each data set's own layout and formats: what comes out is what was written."""

import shutil

import numpy as np
import pytest
import torch
from data_files import SIZE, chw, fails, painted, png
from PIL import Image

from data import open_dataset
from datasets import derived, export, files, layouts, synthetic

WIDE = SIZE, SIZE * 16 // 9  # of MUSES


# ---- what comes out is what was written -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "known", ["deliver 25 Building Truck", "muses 19 road bicycle", "mcubes 20 asphalt sky", "nyuv2 40 wall otherprop"]
)
def test_class_lists_have_the_published_lengths_and_distinct_names(known):
    names, palette = layouts.read_classes(layouts.CLASSES / f"{known.split()[0]}.txt")
    assert known.split()[1:] == [str(len(set(names))), names[0], names[-1]]
    assert palette.shape == (len(names), 3) and len(np.unique(palette, axis=0)) >= len(names) - 1


def of_deliver(scene):
    return [chw(scene[modality]) for modality in ("rgb", "depth", "event", "lidar")]


def of_muses(scene):
    lidar = chw(scene["lidar"], 0.004)  # 255 is 102 metres
    columns = torch.arange(lidar.shape[2]) % 4 == 0
    return [lidar, chw(scene["rgb"]) / 255, lidar * columns, chw(scene["event"]) / 255]


def of_mcubes(scene):
    angle = torch.from_numpy(scene["depth"][..., 0]).float() * torch.pi / 255
    dolp, nir = chw(scene["event"])[[0, 0, 0]] / 255, chw(scene["lidar"])[[2, 2, 2]] / 255
    return [chw(scene["rgb"]) / 255, torch.stack([angle.sin(), angle.cos(), angle.sin()]), dolp, nir]


def of_folder(scene):
    return [chw(scene["lidar"]) / 255, chw(scene["depth"])[[0, 0, 0]] / 255, chw(scene["rgb"]) / 255]


@pytest.mark.parametrize(
    "layout, split, modalities, expected",
    [
        *(("deliver", split, "rgb depth event lidar", of_deliver) for split in synthetic.SPLITS),
        ("muses", "train", "lidar rgb radar event", of_muses),
        ("muses", "train", "rgb event", lambda scene: [chw(scene["rgb"]), chw(scene["event"])]),  # all are bytes
        ("mcubes", "test", "rgb aolp dolp nir", of_mcubes),  # without the left 192 columns
        ("folder", "val", "lidar depth rgb", of_folder),
    ],
)
def test_files_come_back_pixel_by_pixel_in_any_order_of_modalities(exported, layout, split, modalities, expected):
    dataset = open_dataset(layout, exported / layout, split, modalities.split())
    names = [frame.name for frame in dataset.frames]
    assert len(names) == (6 if split == "train" else 3) and names == sorted(names)
    own = export.EXPORT_CLASSES[layout].split(",") if layout != "folder" else open_dataset("synthetic").classes
    for images, label, name in dataset:
        scene = painted(split, int(name[-6:]), WIDE if layout == "muses" else SIZE)
        torch.testing.assert_close(images, torch.stack(expected(scene)), rtol=1e-5, atol=1e-7)
        assert label.dtype == torch.uint8
        assert np.array_equal(np.array(dataset.classes)[label], np.array(own)[scene["label"]])


def test_all_modalities_are_used_but_the_radar(exported):
    known = dict.fromkeys(("deliver", "folder"), "rgb depth event lidar")
    known |= {"muses": "rgb event lidar", "mcubes": "rgb aolp dolp nir"}
    for layout, modalities in known.items():
        assert open_dataset(layout, exported / layout).modalities == modalities.split(), layout


def test_conditions_cases_and_raw_depth_of_deliver_are_found(exported):
    frames = open_dataset("deliver", exported / "deliver", "train").frames
    assert {frame.case for frame in frames} == {"none", *synthetic.CASES}
    assert {frame.condition for frame in frames} == set(synthetic.CONDITIONS)
    assert all(frame.name.startswith(f"{frame.condition}/train/MAP_") for frame in frames)
    images, _, name = open_dataset("deliver", exported / "deliver", "train", ["lidar", "depth"], depth="raw")[0]
    scene = painted("train", int(name[-6:]))
    assert torch.equal(images[0], chw(scene["lidar"])) and torch.equal(images[1, 2], chw(scene["depth"])[0])


def test_low_resolution_events_are_enlarged_by_nearest_neighbour(exported):
    dataset = open_dataset("deliver", exported / "deliver", "train", ["event"])
    index = [frame.case for frame in dataset.frames].index("eventlowres")
    stored = np.asarray(Image.open(dataset.frames[index].images[0]))
    assert stored.shape == (SIZE // 2, SIZE // 2, 3)
    assert torch.equal(dataset[index][0][0], chw(stored.repeat(2, axis=0).repeat(2, axis=1)))


@pytest.mark.parametrize("layout, count", [("deliver", 25), ("nyuv2", 40)])
def test_ids_0_and_255_are_ignored_and_the_others_are_classes(mini, layout, count):
    root = mini(layout)
    ids = np.resize([*range(count + 1), 255], (SIZE, SIZE)).astype(np.uint8)
    path = open_dataset(layout, root, "val").frames[0].label
    export.write_file(path, np.dstack([ids, 0 * ids, 0 * ids]) if layout == "deliver" else ids)
    assert open_dataset(layout, root, "val")[0][1].ravel()[: count + 2].tolist() == [255, *range(count), 255]


def test_muses_folders_tell_weather_and_time_of_day_and_its_test_split_has_no_labels(exported):
    frames = open_dataset("muses", exported / "muses", "train").frames  # rain is not found in "train"
    assert [frame.name.split("/")[:3] for frame in frames if frame.condition == "rain"] == [["train", "rain", "day"]]
    assert [frame.name.split("/")[:3] for frame in frames if frame.case == "night"] == [["train", "clear", "night"]]
    assert all((label == 255).all() for _, label, _ in open_dataset("muses", exported / "muses", "test"))


def test_muses_ranges_have_more_than_256_values_and_are_read_from_projected_npz_too(mini):
    root, rng = mini("muses"), np.random.default_rng(0)
    path = open_dataset("muses", root, "val", ["lidar"]).frames[0].images[0]
    stored = rng.integers(0, 65536, (*WIDE, 3), np.uint16)
    png(path, stored, rng.integers(0, 3, SIZE))
    known = {"lidar": ["float", -1, 3.4, [0.0] * 3, [1.0] * 3]}
    image = open_dataset("muses", root, "val", ["lidar"], ranges=known)[0][0][0]
    assert len(image.unique()) > 5000
    assert np.abs(image.numpy().transpose(1, 2, 0) - (stored / 150 - 100) / 100).max() < 1e-6  # of float64
    shutil.move(root / "lidar", root / "projected_to_rgb/lidar")
    moved = (root / "projected_to_rgb" / path.relative_to(root)).with_suffix(".npz")
    moved.with_suffix(".png").unlink()
    np.savez(moved, (stored / 150 - 100).astype(np.float32))
    again = open_dataset("muses", root, "val", ["lidar"])
    assert again.frames[0].images[0] == moved and torch.allclose(again[0][0][0], image, atol=1e-6)


def test_the_mask_of_near_infrared_is_not_applied_as_in_the_published_code(mini):
    root = mini("mcubes")
    before = open_dataset("mcubes", root, "val", ["nir"])
    mask = np.random.default_rng(1).integers(0, 2, (SIZE, SIZE + 192), np.uint8) * 255
    export.write_file(root / "multimodal_dataset/NIR_warped_mask" / before.frames[0].images[0].name, mask)
    assert before[0][0].any() and torch.equal(open_dataset("mcubes", root, "val", ["nir"])[0][0], before[0][0])


def test_a_folder_has_the_conditions_classes_and_colours_of_the_scenes(exported):
    dataset, scenes = open_dataset("folder", exported / "folder", "val"), open_dataset("synthetic", limit=1)
    assert dataset.classes == scenes.classes and dataset.palette.tolist() == scenes.palette.tolist()
    assert (dataset.classes[0], dataset.classes[-1], len(dataset.classes)) == ("Sky", "Pedestrian", 12)
    assert dataset.frames[0].condition in synthetic.CONDITIONS


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
@pytest.mark.parametrize("layout, classes", [("nyuv2", 40), ("nyuv2_13", 13)])
def test_nyuv2_files_come_back_with_either_list_of_classes(exported, layout, classes):
    assert len(open_dataset("nyuv2", exported / "nyuv2", "train")) == 6
    dataset = open_dataset("nyuv2", exported / "nyuv2", "val", classes=classes)
    assert len(dataset) == 6 and len(dataset.classes) == len(dataset.palette) == classes
    assert dataset.modalities == ["rgb", "depth"]
    assert {(frame.condition, frame.case) for frame in dataset.frames} == {("none", "none")}
    for images, label, name in dataset:
        scene = painted(name[:-4], int(name[-4:]))
        assert (images[0].int() - chw(scene["rgb"]).int()).abs().float().mean() < 8  # through JPEG
        assert torch.equal(images[1], chw(scene["depth"]))
        own = np.array(export.EXPORT_CLASSES[layout].split(","))
        assert np.array_equal(np.array(dataset.classes)[label], own[scene["label"]])


def test_nyuv2_holds_out_frames_of_the_train_list_spread_evenly(exported):
    def names(split, hold_out):
        return [frame.name for frame in open_dataset("nyuv2", exported / "nyuv2", split, hold_out=hold_out).frames]

    every, test = names("train", 0), names("test", 0)
    assert names("val", 0) == names("test", 2) == test and not set(every) & set(test)
    assert names("val", 2) == [every[0], every[3]] and names("train", 2) == [every[i] for i in (1, 2, 4, 5)]


def test_nyuv2_lists_may_name_files_and_the_root_may_be_the_parent(mini, tmp_path):
    root = mini("nyuv2")
    before = [frame.images for frame in open_dataset("nyuv2", root, "train").frames]
    ids = (root / "train.txt").read_text().split()
    (root / "train.txt").write_text("\n".join(f"RGB/{id}.jpg Label/{id}.png" for id in ids) + "\n\n")
    assert [frame.images for frame in open_dataset("nyuv2", root, "train").frames] == before
    inner = root.rename(tmp_path / "NYUDepthv2")
    found = [frame.images[0].relative_to(inner) for frame in open_dataset("nyuv2", tmp_path, "train").frames]
    assert found == [images[0].relative_to(root) for images in before]


def test_nyuv2_raw_depth_is_a_tenth_of_the_metres_and_event_and_lidar_are_derived_from_it(mini):
    root, modalities = mini("nyuv2"), ["lidar", "rgb", "depth", "event"]
    dataset = open_dataset("nyuv2", root, "train", modalities, depth="raw")
    frame, images = dataset.frames[1], dataset[1][0]
    rgb, eight = (np.asarray(Image.open(path)) for path in frame.images[1:3])
    assert images.dtype == torch.uint8 and torch.equal(images[2], torch.tensor(eight).expand(3, SIZE, SIZE))
    metres = eight / np.float32(25.5)
    assert torch.equal(images[0], chw(derived.derive_lidar(metres, frame.name)))
    assert torch.equal(images[3], chw(derived.derive_event(rgb, metres, frame.name)))
    assert torch.equal(images[[0, 3]], open_dataset("nyuv2", root, "train", ["lidar", "event"])[1][0])  # never of HHA
    millimetres = np.random.default_rng(0).integers(0, 12000, (SIZE, SIZE)).astype(np.uint16)
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
    pictures, first = before[0][:2], before.frames[0].images[before.modalities.index("rgb")]
    for extra in ("calib", "rgb/train/.ipynb_checkpoints"):
        (root / extra).mkdir()
        shutil.copy(first, root / extra)
    first.rename(first.with_suffix(".PNG"))
    for folder in (*before.modalities, "labels"):
        (root / folder / "train").rename(tmp_path / folder)
        (root / folder / "train").mkdir()
        (root / folder / "train/linked").symlink_to(tmp_path / folder)
    after = open_dataset("folder", root, "train")
    assert after.modalities == before.modalities and len(after) == len(before)
    assert all(torch.equal(a, b) for a, b in zip(after[0][:2], pictures, strict=True))
