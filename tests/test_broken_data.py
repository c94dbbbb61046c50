"""Files, labels, names and lists that are missing or wrong: one clear sentence for each."""

import pathlib
import struct

import numpy as np
import pytest
from data_files import SIZE, fails, folder_dataset, png
from PIL import Image, ImageOps

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
        open_dataset("folder", root, "train", ["rgb"])[0]


# ---- files are what they hold, not what they are called -------------------------------------------------------------
@pytest.mark.parametrize("suffix, kind", [(".jpg", "JPEG"), (".png", "JPEG"), (".png", "MPO"), (".tif", "TIFF")])
def test_labels_compressed_as_jpeg_are_refused_whatever_they_are_called(mini, suffix, kind):
    root = mini("folder")
    label = open_dataset("folder", root, "train").frames[0].label
    picture = Image.open(label).convert("L")
    label.unlink()
    picture.save(label.with_suffix(suffix), kind, **({"compression": "jpeg"} if kind == "TIFF" else {}))
    with fails(ValueError, label.with_suffix(suffix), "JPEG", "PNG"):
        open_dataset("folder", root, "train")[0]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_file_of_several_pictures_is_refused(tmp_path, suffix):
    path, pictures = tmp_path / f"a{suffix}", [Image.new("L", (6, 4), grey) for grey in (0, 1, 2)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:])
    for ids in (False, True):
        with fails(ValueError, path, "several"):
            files.read_file(path, ids)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix, kind", [(".jpg", "JPEG"), (".jpg", "MPO"), (".png", "PNG"), (".tif", "TIFF")])
def test_pictures_are_turned_upright_as_their_exif_says(tmp_path, suffix, kind, orientation):
    smooth = np.add.outer(np.arange(24) * 8, np.arange(16) * 2).astype(np.uint8)
    exif, picture = Image.Exif(), Image.fromarray(smooth)
    exif[0x0112] = orientation
    more = {"save_all": True, "append_images": [picture.resize((4, 6))]} if kind == "MPO" else {}
    more = {"tiffinfo": {0x0112: orientation}} if kind == "TIFF" else {**more, "exif": exif}
    picture.save(path := tmp_path / f"a{suffix}", kind, **more)
    found = files.read_file(path)
    assert found.flags.c_contiguous  # torch takes no flipped views
    picture.getexif()[0x0112] = orientation
    turned = np.asarray(ImageOps.exif_transpose(picture))
    assert found.shape == turned.shape and np.abs(found.astype(int) - turned).max() <= (0 if suffix != ".jpg" else 3)
    assert (found.shape == (16, 24)) == (orientation > 4)


def tiff_of_16_bit_colour(path, array, order, strips):
    """A TIFF writer of the test's own, without compression; order: < or >."""
    height, width, _ = array.shape
    rows = -(-height // strips)
    parts = [array[top : top + rows].astype(f"{order}u2").tobytes() for top in range(0, height, rows)]
    tags, blob = [], b""
    begin = 8 + 2 + 12 * 9 + 4
    for tag, kind, values in (
        (256, "H", [width]), (257, "H", [height]), (258, "H", [16] * 3), (259, "H", [1]), (262, "H", [2]),
        (273, "I", [0] * len(parts)), (277, "H", [3]), (278, "H", [rows]), (279, "I", [*map(len, parts)]),
    ):  # fmt: skip
        tags.append((tag, kind, values, begin + len(blob)))
        packed = struct.pack(f"{order}{len(values)}{kind}", *values)
        blob += packed + bytes(-len(packed) % 4)
    starts = np.cumsum([begin + len(blob), *map(len, parts)])[:-1]
    entries = b""
    for tag, kind, values, where in tags:
        values = starts.tolist() if tag == 273 else values
        packed = struct.pack(f"{order}{len(values)}{kind}", *values)
        blob = blob[: where - begin] + packed + blob[where - begin + len(packed) :]
        inline = packed + bytes(4 - len(packed)) if len(packed) <= 4 else struct.pack(f"{order}I", where)
        entries += struct.pack(f"{order}HHI", tag, {"H": 3, "I": 4}[kind], len(values)) + inline
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(tags))
    path.write_bytes(head + entries + bytes(4) + blob + b"".join(parts))


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("strips", [1, 3])
def test_tiff_of_16_bit_colour_keeps_all_bits(tmp_path, order, strips):
    stored = np.random.default_rng(0).integers(0, 65536, (7, 5, 3), np.uint16)
    tiff_of_16_bit_colour(tmp_path / "a.tif", stored, order, strips)
    assert np.array_equal(files.read_image(tmp_path / "a.tif"), stored)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_deflate"])
@pytest.mark.parametrize("kind", ["u1", "u2", "f4", "colour"])
def test_tiff_of_8_and_16_bit_and_float_is_read_as_stored(tmp_path, kind, compression):
    rng = np.random.default_rng(0)
    colour, dtype = kind == "colour", "u1" if kind == "colour" else kind
    stored = (rng.random((31, 45, 3) if colour else (31, 45)) * (60000 if dtype != "u1" else 255)).astype(dtype)
    Image.fromarray(stored).save(tmp_path / "a.tif", compression=compression)
    assert np.array_equal(files.read_image(tmp_path / "a.tif").squeeze(), stored)
    Image.fromarray(stored.astype(np.int32) if not colour else stored).save(tmp_path / "b.tif")
    if not colour:
        with fails(ValueError, tmp_path / "b.tif", "int32"):
            files.read_image(tmp_path / "b.tif")


def test_a_folder_of_tiff_files_is_a_data_set(tmp_path):
    root = folder_dataset(tmp_path / "d")
    pictures = open_dataset("folder", root, "val")[1][:2]
    for path in sorted(root.glob("*/*/*.png")):
        Image.open(path).save(path.with_suffix(".TIF" if "1" in path.name else ".tiff"))
        path.unlink()
    again = open_dataset("folder", root, "val")[1][:2]
    assert all((one == two).all() for one, two in zip(pictures, again, strict=True))


@pytest.mark.parametrize("kind", ["u1", ">u2", "<i8", ">i4"])
@pytest.mark.parametrize("channels", [(), (1,)])
def test_npy_labels_may_be_integers_of_any_kind_and_of_one_channel(mini, kind, channels):
    root = mini("folder")
    before = open_dataset("folder", root, "val")
    path, label = before.frames[0].label, before[0][1].numpy()
    path.unlink()
    np.save(path.with_suffix(".npy"), label.astype(kind).reshape(label.shape + channels))
    assert (open_dataset("folder", root, "val")[0][1].numpy() == label).all()
    for wrong in (-1, 70000):
        np.save(path.with_suffix(".npy"), np.full_like(label, wrong, "<i8"))
        with fails(ValueError, path.with_suffix(".npy"), "8 or 16 bit"):
            open_dataset("folder", root, "val")[0]
    np.save(path.with_suffix(".npy"), label.astype(np.float32))
    with fails(ValueError, path.with_suffix(".npy"), "8 or 16 bit"):
        open_dataset("folder", root, "val")[0]


@pytest.mark.parametrize("kind", [">u2", ">f4", ">f8"])
def test_npy_images_may_be_big_endian(tmp_path, kind):
    stored = np.random.default_rng(0).integers(0, 65536, (4, 5, 1)).astype(kind)
    np.save(tmp_path / "a.npy", stored)
    image = files.read_image(tmp_path / "a.npy")
    assert image.dtype == ("u2" if kind == ">u2" else "f4") and (image == stored).all()


@pytest.mark.parametrize("what", ["folder", "link", "bmp"])
def test_what_lies_in_the_place_of_a_file_is_named(tmp_path, what):
    root = folder_dataset(tmp_path / "d")
    path = root / "labels/val/2.png"
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "link":
        path.symlink_to(tmp_path / "nowhere.png")
    else:
        Image.new("L", (60, 40)).save(path.with_suffix(".bmp"))
    telling = {"folder": "is a folder", "link": tmp_path / "nowhere.png", "bmp": "2.bmp"}[what]
    with fails(FileNotFoundError, path, telling):
        open_dataset("folder", root, "val")[2]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
def test_lists_and_classes_must_be_utf_8(mini, encoding):
    root = mini("nyuv2")
    for path, name in ((root / "train.txt", "nyuv2"), (mini("folder") / "classes.txt", "folder")):
        text = path.read_text() + ("höhe\n" if encoding == "latin-1" else "")
        path.write_bytes(text.encode(encoding))
        with fails(ValueError, path, "UTF-8"):
            open_dataset(name, path.parent)


@pytest.mark.parametrize("text", ["name,r,g,b\nroad,1,2,3\n", "0;road\n1;sky\n", "road, 1, 2, 3\n"])
def test_classes_as_csv_are_refused(tmp_path, text):
    (tmp_path / "classes.txt").write_text(text)
    with fails(ValueError, "classes.txt", "comma"):
        layouts.read_classes(tmp_path / "classes.txt")


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
