"""Files, labels, names and lists that are missing or wrong: one clear sentence for each."""

import pathlib

import numpy as np
import pytest
from data_files import SIZE, fails, folder_dataset, png
from PIL import Image

from data import open_dataset
from datasets import files, layouts

DOCS = pathlib.Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize(
    "layout, expected",
    [
        ("deliver", "img/**/*_rgb_front.png, hha/**/*_depth_front.png"),
        ("muses", "gt_semantic/**/*_gt_labelTrainIds.png"),
        ("mcubes", "train.txt, test.txt, polL_color/**/*.png"),
        ("nyuv2", "RGB/**/*.jpg, HHA/**/*.png, Depth/**/*.png"),
        ("folder", "<modality>/**/*.png, labels/**/*.png"),
    ],
)
def test_a_data_set_that_is_not_there_is_answered_with_what_was_looked_for_and_where_to_read_more(
    tmp_path, layout, expected
):
    with fails(FileNotFoundError, tmp_path / "nowhere", expected, "docs/data.md"):
        open_dataset(layout, tmp_path / "nowhere")
    with fails(FileNotFoundError, "--root", expected):
        open_dataset(layout)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/classes.txt").write_text("a\nb\n")
    (tmp_path / "empty/rgb").mkdir()
    with fails(FileNotFoundError, tmp_path / "empty", "val", expected, "docs/data.md"):
        open_dataset(layout, tmp_path / "empty", "val")
    page = (DOCS / "data.md").read_text(encoding="utf-8")
    assert f"| `{layout}` |" in page


def test_a_missing_sensor_file_is_named(mini):
    for layout, modality in (
        ("deliver", "depth"),
        ("muses", "lidar"),
        ("mcubes", "dolp"),
        ("folder", "depth"),
        ("nyuv2", "depth"),
    ):
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
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
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


@pytest.mark.parametrize(
    "layout, value", [("deliver", 26), ("muses", 19), ("mcubes", 20), ("nyuv2", 41), ("folder", 12)]
)
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


@pytest.mark.parametrize(
    "layout, listing", [("mcubes", "multimodal_dataset/list_folder/val.txt"), ("nyuv2", "test.txt")]
)
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
    ids = np.random.default_rng(0).integers(0, 14, (40, 60, 1), np.uint8)  # as NYUv2: 0 is unlabelled
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


def test_a_modality_is_of_one_kind_and_float_colours_in_range(mini):
    root = mini("folder")
    frames = open_dataset("folder", root, "train", ["rgb", "depth"]).frames
    Image.fromarray(np.zeros((SIZE, SIZE), np.uint8)).save(frames[1].images[1])
    with fails(ValueError, frames[1].images[1], "is 8 bit, but depth of the training split is 16 bit"):
        open_dataset("folder", root, "train", ["rgb", "depth"])[1]
    for frame in frames:
        frame.images[0].unlink()
        np.save(frame.images[0].with_suffix(".npy"), np.linspace(1, 255, SIZE**2 * 3).reshape(SIZE, SIZE, 3))
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


def test_painted_scenes_have_no_root():
    with fails(ValueError, "--root x", "--data folder"):
        open_dataset("synthetic", "x")
