"""data.py: sizes and augmentation, modality dropping and corruptions, the two commands."""

import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_files import SIZE, fails
from models import GOLDEN

import data
from data import open_dataset
from datasets import layouts
from datasets.export import write_file


# ---- sizes, augmentation, reproducibility ---------------------------------------------------------------------------
@pytest.mark.parametrize("size, steps", [(128, 1), (100, 2)])  # 100 is resized twice: to 100, then to 128
def test_deliver_frames_are_what_the_published_loader_and_transform_give(size, steps):
    golden, grey = np.load(GOLDEN / "deliver_val.npz"), np.array([0.0175, 1 / 255, 1 / 255, 1 / 255])  # a level of each
    dataset = open_dataset("deliver", GOLDEN / "deliver", "val", size=size)
    assert len(dataset) == 2
    for images, label, name in dataset:
        frame = f"{size}_{name[-6:]}"
        images = data.normalise(images[None], *dataset.normalisation)[0, :, :, ::3, ::3].numpy()  # (M, 3, h, w)
        assert np.array_equal(label, golden[f"label_{frame}"])
        assert (np.abs(images - golden[f"images_{frame}"]) / grey[:, None, None, None]).max() < 1.001 * steps


def test_evaluation_sizes_are_multiples_of_32_and_labels_are_not_mixed(exported):
    images, label, _ = open_dataset("muses", exported / "muses", "val", size=32)[0]
    assert images.shape == (3, 3, 32, 64) and label.shape == (32, 64)  # 64 x 113, then 32 x 56
    assert set(label.unique().tolist()) <= set(open_dataset("muses", exported / "muses", "val")[0][1].unique().tolist())
    images, label, _ = open_dataset("muses", exported / "muses", "val", size=(48, 40))[0]
    assert images.shape == (3, 3, 48, 40) and label.shape == (48, 40)
    assert open_dataset("folder", exported / "folder", "val", size=2 * SIZE)[0][0].shape == (4, 3, 2 * SIZE, 2 * SIZE)


def gradient_dataset(root):
    """Frames of 40 x 60 whose event image tells a pixel's column and row, and whose label tells the same in bands."""
    y, x = np.mgrid[:40, :60].astype(np.uint8)
    write_file(root / "classes.txt", "".join(f"class {k}\n" for k in range(50)))
    for i in range(12):
        write_file(root / f"event/train/{i:02d}.png", np.dstack([4 * x, 6 * y, np.full_like(x, 200)]))
        write_file(root / f"labels/train/{i:02d}.png", y // 8 * 10 + x // 6)
    return root


def test_augmentation_moves_images_and_label_together_and_pads_right_and_below(tmp_path):
    dataset = open_dataset("folder", gradient_dataset(tmp_path / "d"), size=48, augment=True)
    padded = 0
    for i in range(len(dataset)):
        (image,), label, _ = dataset[3, i]
        assert image.shape == (3, 48, 48) and label.shape == (48, 48)
        inside = label != 255
        assert torch.equal(inside, inside[:, :1] & inside[:1]) and inside[0, 0]  # a rectangle in the corner
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
        scale = np.random.default_rng([5, 1, i]).uniform(0.5, 2) * 30 / 40  # the documented source of chance
        height, width = (label != 255).sum(0).max(), (label != 255).sum(1).max()
        assert (height, width) == (min(30, round(40 * scale)), min(30, round(60 * scale)))
        across, down = image[0, 0, :width].double(), image[1, :height, 0].double()
        assert abs(across[2:-2].diff().mean()).item() == pytest.approx(4 / scale, rel=0.06)
        assert down[2:-2].diff().mean().item() == pytest.approx(6 / scale, rel=0.06)
        flips.add(bool(across[0] > across[-1]))
        starts.add((across.min().item() // 8, down.min().item() // 8))
    assert flips == {True, False} and len(starts) > 5


def chance(draws, factors=()):
    """A source of chance whose answers are known."""
    left = iter(factors)
    return SimpleNamespace(random=lambda _: np.array(draws), uniform=lambda *_: next(left))


@pytest.mark.parametrize("top", [255, 1, 1023 / 65535])  # 8 bit; 16 bit; 16 bit that hold 10
def test_colour_jitter_is_brightness_then_contrast_then_saturation(top):
    image = np.random.default_rng(0).integers(60, 120, (20, 30, 3), np.uint8)
    image[0, 0] = 255

    def grey(values):
        return (values @ [0.299, 0.587, 0.114])[..., None]

    values = 1.2 * image
    values = grey(values).mean() + 0.7 * (values - grey(values).mean())
    values = grey(values) + 0.6 * (values - grey(values))
    given = image if top == 255 else image * np.float32(top / 255)
    jittered = data.jitter(given, chance([0, 1], (1.2, 0.7, 0.6)))
    off = np.abs(jittered * (255 / top) - values)[values[..., 0] < 200]
    assert jittered.dtype == given.dtype and off.max() < 2.5  # rounded after each of the three


def test_blur_has_a_deviation_of_0_8_pixels_and_nothing_happens_by_default():
    image = np.zeros((7, 7, 3), np.uint8)
    image[3, 3] = 255
    weights = np.exp(-np.array([1, 0, 1]) / (2 * 0.8**2))
    expected = 255 * np.outer(weights, weights) / weights.sum() ** 2
    blurred = data.jitter(image, chance([1, 0]))
    assert np.abs(blurred[2:5, 2:5, 0] - expected).max() < 1
    assert blurred.sum((0, 1)).tolist() == [blurred[2:5, 2:5, 0].sum()] * 3
    assert data.jitter(image, chance([0.2, 0.2])) is image


def test_only_rgb_is_jittered(tmp_path):
    root = gradient_dataset(tmp_path / "d")
    shutil.copytree(root / "event", root / "rgb")
    dataset = open_dataset("folder", root, size=48, augment=True)
    changed = [not torch.equal(*dataset[0, i][0]) for i in range(12)]
    assert dataset.modalities == ["rgb", "event"] and 0 < sum(changed) < 12  # 36 % of the frames


@pytest.mark.parametrize("modalities", [["rgb"], ["rgb", "event"]])
def test_rgb_of_16_bit_has_one_range_whether_it_is_jittered_or_not(tmp_path, modalities):
    root, rng = gradient_dataset(tmp_path / "d"), np.random.default_rng(0)
    for i in range(12):
        write_file(root / f"rgb/train/{i:02d}.png", rng.integers(30000, 60000, (40, 60, 3), np.uint16))
    dataset = open_dataset("folder", root, modalities=modalities, size=24, augment=True)
    images = [dataset[0, i][0][0] for i in range(12)]
    assert {image.dtype for image in images} == {torch.float32}
    assert 0.5 < max(image.max() for image in images) <= 60 / 65


def test_items_depend_on_seed_epoch_and_index_only():
    def items(workers, seed=1, epoch=2):
        dataset = open_dataset("synthetic", split="train", size=32, augment=True, seed=seed, limit=10)
        keys = [(epoch, i) for i in (3, 1, 9, 0, 4, 4)]
        loader = torch.utils.data.DataLoader(dataset, batch_size=2, sampler=keys, num_workers=workers)
        np.random.seed(workers)  # global state must not matter
        torch.manual_seed(workers)
        return [torch.cat(parts) for parts in list(zip(*loader, strict=True))[:2]]

    one, two = items(0), items(2)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert torch.equal(one[0][4], one[0][5])
    assert not torch.equal(one[0], items(0, seed=2)[0]) and not torch.equal(one[0], items(0, epoch=3)[0])


def test_limit_spreads_over_the_conditions(exported):
    every = open_dataset("deliver", exported / "deliver", "train").frames
    assert open_dataset("deliver", exported / "deliver", "train", limit=3).frames == [every[0], every[2], every[4]]
    assert open_dataset("deliver", exported / "deliver", "train", limit=100).frames == every


# ---- modality dropping and corruptions ------------------------------------------------------------------------------
def test_normalise_gives_the_same_for_bytes_and_floats():
    images, rng = torch.randint(0, 256, (2, 3, 3, 5, 7), dtype=torch.uint8), np.random.default_rng(0)
    mean, deviation = rng.random((3, 3)), rng.uniform(0.1, 2, (3, 3))  # (M, 3)
    expected = (images.numpy() / 255 - mean[..., None, None]) / deviation[..., None, None]
    for given in (images, images / 255):
        found = data.normalise(given, mean.tolist(), deviation.tolist())
        assert np.abs(found.numpy() - expected).max() < 1e-5 and found.dtype == torch.float32
    with fails(ValueError, "torch.uint16", "16 bit divided by 65535"):
        data.normalise(images.to(torch.uint16), mean.tolist(), deviation.tolist())


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


def noise_inputs():
    generator = torch.Generator().manual_seed(0)
    images, present = torch.randn(7, 3, 3, 24, 20, generator=generator), data.draw_present(7, 3, generator)
    return images, present, [*(f"frame {i}" for i in range(6)), os.fsdecode(b"caf\xe9")]  # a name that is no UTF-8


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
    images[:, :, 0, 0, 0], images[:, :, 0, 0, 1] = -2 - torch.rand(7, 3), 3 + torch.rand(7, 3)  # the extremes
    noisy = data.sensor_noise(images, level, names, ["rgb", "event", "depth"])
    events, clean = noisy[:, 1], images[:, 1]
    salt = events == clean.amax((1, 2, 3), keepdim=True)
    pepper = events == clean.amin((1, 2, 3), keepdim=True)
    assert abs(salt.float().mean() - density / 2) < 0.01 and abs(pepper.float().mean() - density / 2) < 0.01
    assert torch.equal(events[~salt & ~pepper], clean[~salt & ~pepper])  # events get no Gaussian noise
    change = (noisy - images)[:, [0, 2]]
    untouched = change[change.abs() < 0.99 if deviation < 0.3 else change.abs() < 1.4]
    assert abs(untouched.std() - deviation) < 0.05 * deviation + 0.02


@pytest.mark.parametrize(
    "corrupted",
    [
        lambda images, present, names, seed=0: data.random_missing(images, present, 0.5, names, seed),
        lambda images, _, names, seed=0: data.sensor_noise(images, "mid", names, ["rgb", "depth", "event"], seed),
    ],
)
def test_corruptions_depend_on_the_seed_and_not_on_the_batch(corrupted):
    images, present, names = noise_inputs()
    whole, order = corrupted(images, present, names), [5, 0, 3]
    assert torch.equal(whole[order], corrupted(images[order], present[order], [names[i] for i in order]))
    assert not torch.equal(whole, corrupted(images, present, names, seed=1))


# ---- the commands ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_check_counts_every_split_and_lists_the_broken(mini, data_py, layout):
    root = mini(layout)
    status, printed = data_py(f"--data {layout} --root {root} --check")
    n = 6 if layout == "nyuv2" else 3  # which has two lists
    found = [line[: line.index(" frames") + 7] for line in printed.out.splitlines()[:3]]
    assert status == 0 and found == [f"{layout} {part} frames" for part in ("train, 6", f"val, {n}", f"test, {n}")]
    path = open_dataset(layout, root, "train").frames[1].images[0]
    path.write_bytes(path.read_bytes()[:50])
    status, printed = data_py(f"--data {layout} --root {root} --check")
    assert status == 1 and f"{layout} train, 5 frames" in printed.out and "; 1 broken" in printed.out
    assert sum(str(path) in line for line in printed.out.splitlines()) == 1


def test_check_prints_kinds_and_ranges_and_a_file_name_that_is_no_utf_8(root, data_py):
    (root / "rgb/val" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"no picture")
    status, printed = data_py(f"--data folder --root {root} --check")
    assert status == 1 and "rgb (8 bit, 0..255, mean" in printed.out and r"caf\udce9.png" in printed.out


def test_check_and_export_explain_what_they_cannot_do(tmp_path, data_py):
    status, printed = data_py(f"--data muses --root {tmp_path}/none --check")
    assert status == 2 and str(tmp_path / "none") in printed.err and len(printed.err.splitlines()) == 1
    (tmp_path / "kept").write_text("")
    status, printed = data_py(f"--export {tmp_path} --layout folder")
    assert status == 2 and "not empty" in printed.err
    status, printed = data_py(f"--export {tmp_path}/new --count 2")
    assert status == 2 and "--count 2" in printed.err


def test_export_command_writes_what_check_accepts(tmp_path, data_py):
    assert data_py(f"--export {tmp_path}/new --layout mcubes --count 4 --size 16")[0] == 0
    assert data_py(f"--check --data mcubes --root {tmp_path}/new")[0] == 0


def test_check_names_the_classes_that_never_occur(mini, data_py):
    root = mini("folder")
    write_file(root / "classes.txt", (root / "classes.txt").read_text() + "unicorn\n")
    status, printed = data_py(f"--data folder --root {root} --check")
    rows = [line.split() for line in printed.out.splitlines()]
    assert status == 0 and ["unicorn", "none", "none", "none"] in rows
    assert [row[1:] for row in rows].count(["none"] * 3) == 2
