"""Files, labels, names and lists that are missing or wrong: one clear sentence for each."""

from pathlib import Path

import numpy as np
import pytest
from data_files import fails, folder_dataset, put_together
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from data import open_dataset
from datasets import files, layouts
from datasets.export import write_file


@pytest.mark.parametrize(
    "layout, expected",
    [
        ("deliver", "img/**/*_rgb_front.png, hha/**/*_depth_front.png"),
        ("muses", "gt_semantic/{train,val}/**/*_gt_labelTrainIds.png"),
        ("mcubes", "train.txt, test.txt, polL_color/**/*.png"),
        ("nyuv2", "RGB/**/*.jpg, HHA/**/*.png, Depth/**/*.png"),
        ("folder", "<modality>/{train,val}/**/*.png, labels/{train,val}/**/*.png"),
    ],
)
def test_a_data_set_that_is_not_there_is_answered_with_what_was_looked_for(tmp_path, layout, expected):
    with fails(FileNotFoundError, tmp_path / "nowhere", expected, "docs/data.md"):
        open_dataset(layout, tmp_path / "nowhere")
    with fails(FileNotFoundError, "--root", expected):
        open_dataset(layout)
    with fails(FileNotFoundError, tmp_path / "classes.txt"):
        layouts.read_classes(tmp_path / "classes.txt")
    (tmp_path / "rgb").mkdir()
    write_file(tmp_path / "classes.txt", "a\nb\n")
    with fails(FileNotFoundError, tmp_path, "val", expected, "docs/data.md"):
        open_dataset(layout, tmp_path, "val")
    assert f"| `{layout}` |" in (Path(__file__).parents[1] / "docs/data.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("sensor", ["deliver/depth", "muses/lidar", "mcubes/dolp", "folder/depth", "nyuv2/depth"])
def test_a_missing_sensor_file_is_named(mini, sensor):
    layout, modality = sensor.split("/")
    root = mini(layout)
    dataset = open_dataset(layout, root, "train")
    path = dataset.frames[1].images[dataset.modalities.index(modality)]
    path.unlink()
    assert len(open_dataset(layout, root, "train")) == len(dataset)
    with fails(FileNotFoundError, path, "missing", "new run with --skip-broken"):
        open_dataset(layout, root, "train")[1]


def test_skip_broken_drops_exactly_the_broken_frames_and_stops_at_one_more(mini):
    root = mini("deliver")
    whole = open_dataset("deliver", root, "train").frames
    bad = [whole[0].images[0], whole[2].label, whole[4].images[2]]
    bad[0].write_bytes(b"no picture")
    bad[1].unlink()
    bad[2].unlink()
    dataset = open_dataset("deliver", root, "train", skip_broken=3)
    assert dataset.frames == [whole[i] for i in (1, 3, 5)] and dataset[0][2] == whole[1].name
    assert [str(path) in text for path, text in zip(bad, dataset.broken, strict=True)] == [True] * 3
    with fails(ValueError, "3 of 6 train frames are broken", "--skip-broken is 2", bad[2]):
        open_dataset("deliver", root, "train", skip_broken=2)
    for frame in whole:
        frame.label.write_bytes(b"no picture")
    with fails(ValueError, "6 of 6 train frames are broken"):
        open_dataset("deliver", root, "train", skip_broken=99)


def test_truncated_and_damaged_pictures_are_named(mini):
    path = open_dataset("deliver", mini("deliver"), "val").frames[0].images[0]
    whole = path.read_bytes()
    broken = [whole[:cut] for cut in (0, 7, 30, len(whole) // 2, len(whole) - 40)]
    for place in np.random.default_rng(0).integers(60, len(whole) - 20, 10):
        broken.append(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
    for content in broken:
        path.write_bytes(content)
        with fails(ValueError, path, "cannot be read"):
            files.read_image(path)


def test_a_picture_beyond_pillows_size_limit_is_named(mini, monkeypatch):
    root = mini("deliver")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with fails(ValueError, root, "_semantic_front.png", "exceeds limit"):
        open_dataset("deliver", root, "val")[0]


@pytest.mark.parametrize("case", ["deliver 26", "muses 19", "mcubes 20", "nyuv2 41", "nyuv2 14", "folder 12"])
def test_a_label_out_of_range_is_named_with_its_value(mini, case):
    layout, value = case.split()
    root, classes = mini(layout), 13 if value == "14" else 40  # of nyuv2
    path = open_dataset(layout, root, "val", classes=classes).frames[0].label
    ids = np.array(Image.open(path))
    ids[9, -5] = int(value)
    write_file(path, ids)
    with fails(ValueError, path, f"label {value},"):
        open_dataset(layout, root, "val", classes=classes)[0]


@pytest.mark.parametrize(
    "name, options, parts",
    [
        ("kitti", {}, ["'kitti'", "deliver"]),
        ("synthetic", {"root": "x"}, ["--root x", "--data folder"]),
        ("synthetic", {"split": "dev"}, ["'dev'", "train, val, test"]),
        ("synthetic", {"modalities": ["rgb", "rgb"]}, ["'rgb'", "twice"]),
        ("deliver", {"modalities": ["rgb", "thermal"]}, ["'thermal'", "rgb, depth, event, lidar"]),
        ("deliver", {"depth": "depth map"}, ["'depth map'", "hha, raw"]),
        ("deliver", {"label_map": "shift:-1"}, ["label map", "folder"]),
        ("folder", {"label_map": "1:2"}, ["'1:2'"]),
        ("folder", {"label_map": "3=40"}, ["3=40"]),
        ("folder", {"label_map": "0=0,1=1,2=2,0=2"}, ["0=0,1=1,2=2,0=2", "twice"]),
        ("folder", {"label_map": "255=1"}, ["labels/train", "the label"]),
        ("folder", {"label_map": "shift:300"}, ["shift:300", "no class"]),
        ("folder", {"label_map": "shift:-300"}, ["shift:-300", "no class"]),
        ("nyuv2", {"classes": 20}, ["20 ", "13, 40"]),
        ("nyuv2", {"hold_out": 6}, ["--hold-out 6", "6 frames"]),
        ("nyuv2", {"hold_out": 7}, ["--hold-out 7", "6 frames"]),
        ("nyuv2", {"hold_out": -1}, ["--hold-out -1", "6 frames"]),
        ("synthetic", {"hold_out": 2}, ["--hold-out", "nyuv2"]),
    ],
)
def test_a_value_that_means_nothing_is_answered_with_those_that_do(exported, name, options, parts):
    root = exported / name if name in layouts.LAYOUTS else None
    with fails(ValueError, *parts):
        open_dataset(name, **{"root": root, **options})[0]


@pytest.mark.parametrize("suffix, telling", [(".h5", "project"), (".bin", "project"), (".bmp", "convert")])
def test_a_file_of_another_format_is_answered_with_what_to_do(mini, suffix, telling):
    root = mini("muses")
    path = open_dataset("muses", root, "val").frames[0].images[1]
    path.rename(path.with_suffix(suffix))
    with fails(FileNotFoundError, path, path.with_suffix(suffix).name, telling):
        open_dataset("muses", root, "val")[0]


def test_a_broken_link_and_a_folder_in_the_place_of_a_file_are_named(tmp_path):
    path = folder_dataset(tmp_path / "d") / "labels/val/2.png"
    path.unlink()
    path.symlink_to(tmp_path / "nowhere.png")
    with fails(FileNotFoundError, path, tmp_path / "nowhere.png"):
        open_dataset("folder", tmp_path / "d", "val")[2]
    path.unlink()
    path.mkdir()
    with fails(FileNotFoundError, path, "is a folder"):
        open_dataset("folder", tmp_path / "d", "val")[2]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])  # float32 cannot hold the last one
def test_values_that_are_not_finite_are_named(mini, bad):
    root = mini("mcubes")
    frame = open_dataset("mcubes", root, "val").frames[1]
    for path in (frame.images[1], root / "multimodal_dataset/polL_aolp_cos" / frame.images[1].name, frame.images[2]):
        values = np.load(path)
        broken = values.astype(float)
        broken[3, 200] = bad
        np.save(path, broken)
        with fails(ValueError, path, "NaN or infinite"):
            open_dataset("mcubes", root, "val")[1]
        np.save(path, values)


@pytest.mark.parametrize("listing", ["mcubes/multimodal_dataset/list_folder/val.txt", "nyuv2/test.txt"])
def test_lists_cannot_lead_out_of_the_root(mini, tmp_path, listing):
    root = mini(listing.split("/")[0])
    (tmp_path / listing).write_text("../../secret\n/etc/passwd\n..\na\\b\n")
    (tmp_path / "secret.png").write_bytes(b"secret")
    frames = open_dataset(root.name, root, "val", skip_broken=None)
    assert len(frames) == 0 and [str(root) in text and "is missing" in text for text in frames.broken] == [True] * 4


# ---- classes and label maps -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text, names, colours",
    [
        ("road 1 2 3\ntraffic light 4 5 6\nsky\n", ["road", "traffic light", "sky"], [[1, 2, 3], [4, 5, 6]]),
        ("\ufeffhöhe\nroute 300", ["höhe", "route 300"], []),  # after a byte order mark
        ("a\u2028b\nc\n", ["a b", "c"], []),  # a line separator of Unicode
    ],
)
def test_classes_txt_is_a_class_a_line_with_or_without_a_colour(tmp_path, text, names, colours):
    write_file(tmp_path / "classes.txt", text)
    found, palette = layouts.read_classes(tmp_path / "classes.txt")
    assert found == names and palette[: len(colours)].tolist() == colours and len(palette) == len(names)


WRONG = [("\n", ["0 classes"]), ("road 1 2 3\nsky\nroad 4 5 6\n", ["'road'", "twice"]), ("sky\nbg 300 0 0\n", ["300"])]
WRONG += [("sky\n# classes\n", ["# classes"]), ("name,r,g,b\nroad,1,2,3\n", ["'name,r,g,b'", "comma"])]
WRONG += [("0;road\n1;sky\n", ["'0;road'", "comma"]), ("road, 1, 2, 3\nsky\n", ["'road, 1, 2, 3'", "comma"])]


@pytest.mark.parametrize("text, parts", WRONG)
def test_a_classes_txt_that_cannot_be_meant_is_refused(tmp_path, text, parts):
    write_file(tmp_path / "classes.txt", text)
    with fails(ValueError, tmp_path / "classes.txt", *parts):
        layouts.read_classes(tmp_path / "classes.txt")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
@pytest.mark.parametrize("text", ["nyuv2/train.txt", "folder/classes.txt"])
def test_lists_and_classes_must_be_utf_8(mini, tmp_path, text, encoding):
    root = mini(text.split("/")[0])
    (tmp_path / text).write_bytes(f"{(tmp_path / text).read_text()}höhe\n".encode(encoding))
    with fails(ValueError, tmp_path / text, "UTF-8"):
        open_dataset(root.name, root)


@pytest.mark.parametrize("label_map", ["shift:-1", "0=255," + ",".join(f"{id}={id - 1}" for id in range(1, 14))])
def test_a_label_map_translates_a_folders_own_ids(tmp_path, label_map):
    root = folder_dataset(tmp_path / "d", classes=13)
    ids = np.random.default_rng(0).integers(0, 14, (40, 60), np.uint8)  # as NYUv2: 0 is unlabelled
    write_file(root / "labels/val/0.png", ids)
    label = open_dataset("folder", root, "val", ["rgb"], label_map=label_map)[0][1]
    assert np.array_equal(label, np.where(ids == 0, 255, ids.astype(int) - 1))


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


def several(path):
    pictures = [Image.new("L", (6, 4), grey) for grey in (0, 1, 2)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:])


@pytest.mark.parametrize("read", [files.read_image, lambda path: files.read_file(path, ids=True)])
@pytest.mark.parametrize(
    "name, write, part",
    [
        ("a.png", several, "several"),
        ("a.tif", several, "several"),
        ("a.png", lambda path: put_together(path, np.zeros((4, 4)), 16, 4, bytes(4 * (1 + 16))), "alpha"),
        ("a.npz", lambda path: np.savez(path, one=np.zeros((4, 4)), two=np.ones((4, 4))), "one, two"),
        ("a.npy", lambda path: np.save(path, np.array([{"a": 1}]), allow_pickle=True), "cannot be read"),
    ],
)
def test_a_file_of_several_pictures_arrays_or_of_python_objects_is_refused(tmp_path, name, write, part, read):
    write(tmp_path / name)
    with fails(ValueError, tmp_path / name, part):
        read(tmp_path / name)


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


@pytest.mark.parametrize("order, magic", [("<", b"II*\0\0\0\0\0"), (">", b"MM\0*\0\0\0\0")])
@pytest.mark.parametrize("rows", [7, 3])  # of a strip
def test_tiff_of_16_bit_colour_keeps_all_bits(tmp_path, order, magic, rows):
    stored = np.random.default_rng(0).integers(0, 65536, (7, 5, 3), np.uint16)
    strips = [stored[top : top + rows].astype(f"{order}u2").tobytes() for top in range(0, 7, rows)]
    sizes = [len(strip) for strip in strips]
    tags = ImageFileDirectory_v2(magic)  # Pillow writes no pixels of this kind
    tags[256], tags[257], tags[258], tags[259], tags[262], tags[277] = 5, 7, (16, 16, 16), 1, 2, 3
    tags[273], tags[278], tags[279] = [sum(sizes[:i]) for i in range(len(sizes))], rows, sizes  # behind the tags
    with (tmp_path / "a.tif").open("wb") as file:
        tags.save(file)
        file.write(b"".join(strips))
    assert np.array_equal(files.read_image(tmp_path / "a.tif"), stored)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_deflate"])
@pytest.mark.parametrize("kind, channels", [("u1", ()), ("u2", ()), ("f4", ()), ("u1", (3,))])
def test_tiff_of_8_and_16_bit_and_float_is_read_as_stored(tmp_path, kind, channels, compression):
    stored = np.random.default_rng(0).uniform(0, 255 if kind == "u1" else 60000, (31, 45, *channels)).astype(kind)
    Image.fromarray(stored).save(tmp_path / "a.tif", compression=compression)
    assert np.array_equal(files.read_image(tmp_path / "a.tif").squeeze(), stored)


def test_tiff_of_32_bit_integers_is_refused(tmp_path):
    Image.fromarray(np.ones((31, 45), np.int32)).save(tmp_path / "a.tif")
    with fails(ValueError, tmp_path / "a.tif", "int32"):
        files.read_image(tmp_path / "a.tif")


def test_a_folder_of_tiff_files_is_a_data_set(root):
    pictures = open_dataset("folder", root, "val")[1][:2]
    for path in sorted(root.glob("*/*/*.png")):
        Image.open(path).save(path.with_suffix(".TIF" if "1" in path.name else ".tiff"))
        path.unlink()
    again = open_dataset("folder", root, "val")[1][:2]
    assert all((one == two).all() for one, two in zip(pictures, again, strict=True))


@pytest.mark.parametrize("kind", ["u1", ">u2", "<i8", ">i4"])
@pytest.mark.parametrize("channels", [(), (1,)])
def test_npy_labels_may_be_integers_of_any_kind_and_of_one_channel(tmp_path, kind, channels):
    ids, codes = np.arange(20).reshape(4, 5), (layouts.label_table("shift:0", 20), np.zeros((20, 3)))
    np.save(tmp_path / "a.npy", ids.astype(kind).reshape(4, 5, *channels))
    assert np.array_equal(files.read_label("folder", tmp_path / "a.npy", *codes), ids)


@pytest.mark.parametrize("kind", [">u2", ">f4", ">f8"])
def test_npy_images_may_be_big_endian(tmp_path, kind):
    stored = np.random.default_rng(0).integers(0, 65536, (4, 5, 1)).astype(kind)
    np.save(tmp_path / "a.npy", stored)
    image = files.read_image(tmp_path / "a.npy")
    assert image.dtype == ("u2" if kind == ">u2" else "f4") and (image == stored).all()
