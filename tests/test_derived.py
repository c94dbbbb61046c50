"""Derived event and lidar: they follow from the frame alone, and behave as such sensors do."""

import io
import timeit

import numpy as np
import pytest
from PIL import Image

from datasets import derived
from datasets.derived import derive_event, derive_lidar

RNG = np.random.default_rng(0)
BLOCKS = RNG.integers(0, 256, (30, 40, 3), np.uint8).repeat(8, 0).repeat(8, 1)  # (240, 320, 3): many sharp edges
SLOPE = np.linspace(8, 1, 240, dtype=np.float32)[:, None].repeat(320, 1)  # a floor: far above, near below


def fired(event):
    return (event > 0).any(-1)


def move(monkeypatch, forward=0.0, sideways=0.0, turn=0.0):
    """Let the camera move like this and no more."""
    monkeypatch.setattr(derived, "FORWARD", (forward, forward))
    monkeypatch.setattr(derived, "SIDEWAYS", sideways)
    monkeypatch.setattr(derived, "TURN", turn)


@pytest.mark.parametrize("H, W", [(240, 320), (61, 83), (8, 8), (3, 40), (1, 1)])
def test_both_have_the_size_of_the_frame_and_three_channels_of_bytes(H, W):
    rgb, metres = RNG.integers(0, 256, (H, W, 3), np.uint8), RNG.random((H, W), np.float32) * 9
    for image in (derive_event(rgb, metres, "a"), derive_lidar(metres, "a")):
        assert image.shape == (H, W, 3) and image.dtype == np.uint8


def test_the_name_decides_and_nothing_else_does():
    for derive in (lambda name: derive_event(BLOCKS, SLOPE, name), lambda name: derive_lidar(SLOPE, name)):
        first = derive("0001")
        np.random.default_rng(1).random(5)
        assert np.array_equal(first, derive("0001"))
        assert not np.array_equal(first, derive("0002"))


def test_events_of_a_wall_are_the_frame_against_itself_shifted_sideways(monkeypatch):
    move(monkeypatch, sideways=0.1)
    level = np.log(BLOCKS[..., 1] / 255 + 0.05)
    shifts = set()
    for name in "abcdef":
        event = derive_event(BLOCKS, np.full((240, 320), 2, np.float32), name)
        found = []
        for shift in range(-13, 14):  # 0.81 * 320 * 0.1 / 2 = 13 pixels at most
            inside = slice(max(-shift, 0), 320 - max(shift, 0))
            change = (level - np.roll(level, -shift, axis=1))[:, inside]
            expected = np.stack([change > 0.2, change < -0.2, np.zeros_like(change)], -1) * 255
            found += [shift] * np.array_equal(event[:, inside], expected)
        assert len(found) == 1, f"motion '{name}' fits the shifts {found}"
        shifts.update(found)
    assert len(shifts) > 3 and min(shifts) < 0 < max(shifts)


def test_near_things_fire_more_events_than_far_ones_and_forward_motion_spares_the_middle(monkeypatch):
    share = np.mean([fired(derive_event(BLOCKS, SLOPE, str(i))) for i in range(40)], axis=0)  # (240, 320)
    far, near = share[:120].mean(), share[120:].mean()
    assert near > 1.5 * far > 0, f"{near:.3f} of the near pixels fire, {far:.3f} of the far ones"
    move(monkeypatch, forward=0.05)
    event = fired(derive_event(BLOCKS, np.full((240, 320), 1, np.float32), "a"))
    assert event[:, :40].mean() > 1.5 * event[110:130, 140:180].mean() and event.any()


def test_without_a_measurement_only_the_turn_moves_a_pixel(monkeypatch):
    unknown = np.zeros((240, 320), np.float32)
    move(monkeypatch, forward=0.08, sideways=0.1)
    assert not derive_event(BLOCKS, unknown, "a").any()
    assert derive_event(BLOCKS, SLOPE, "a").any()
    move(monkeypatch, turn=0.02)
    assert fired(derive_event(BLOCKS, unknown, "a")).mean() > 0.05


@pytest.mark.parametrize("width", [4, 5, 7, 16])
def test_a_white_border_after_scaling_and_jpeg_fires_no_events_and_none_beside_it(width):
    grey = np.full((480, 640, 3), 90, np.uint8)
    grey[200:280, 200:400] = 200
    for side in (np.s_[:width], np.s_[-width:], np.s_[:, :width], np.s_[:, -width:]):
        grey[side] = 255
    file = io.BytesIO()
    Image.fromarray(grey).resize((320, 240), Image.Resampling.BOX).save(file, "JPEG", quality=86)
    rgb = np.asarray(Image.open(file))
    for i in range(10):
        event = fired(derive_event(rgb, np.full((240, 320), 1, np.float32), str(i)))
        outside = np.ones_like(event)
        outside[80:160, 80:220] = False
        assert not event[outside].any() and event.any()


def test_a_plain_frame_fires_nothing_and_a_lamp_in_the_dark_is_no_border():
    dark, near = np.zeros((64, 64, 3), np.uint8), np.full((64, 64), 0.7, np.float32)
    assert not derive_event(dark, near, "a").any()
    dark[40, 10] = 255
    assert any(derive_event(dark, near, str(i)).any() for i in range(5))


def test_colour_and_depth_of_two_sizes_or_of_16_bits_are_refused_by_the_name_of_the_frame():
    with pytest.raises(ValueError, match=r"frame 0007.*uint8 \(240, 320, 3\).*\(240, 300\)"):
        derive_event(BLOCKS, SLOPE[:, :300], "0007")
    for rgb in (BLOCKS.astype(np.uint16), BLOCKS[..., :1]):
        with pytest.raises(ValueError, match="frame 0007: rgb is uint.*8-bit colours"):
            derive_event(rgb, SLOPE, "0007")


def test_the_lidar_lies_on_the_depth_along_a_fifth_of_the_rows_and_sees_less_of_what_is_far():
    depth = RNG.uniform(0.6, 10, (240, 320)).astype(np.float32)
    depth[:, 100:120] = 0
    lidar = derive_lidar(depth, "a")
    assert (lidar == lidar[..., :1]).all() and not lidar[:, 100:120].any()
    hit = lidar[..., 0] > 0
    assert hit.any(1).sum() == 48 and 0.5 < hit[hit.any(1)].mean() < 0.9
    metres = 0.5 * np.exp((255 - lidar[..., 0][hit].astype(float)) / 80)
    error = np.abs(metres - depth[hit])
    rounding = depth[hit] / 150  # half a level of the code: 1 / 160 of the range, and of the noise
    assert (error < 0.03 + rounding).all() and error[depth[hit] < 1].max() > 0.02
    near, far = ((derive_lidar(np.full((240, 320), z, np.float32), "a") > 0).sum() for z in (1, 9))
    assert far < 0.75 * near


def test_deriving_both_costs_less_than_twice_the_decoding():
    """Alone it costs less than once; the rest is for machines that are busy, or have less cache."""
    files = io.BytesIO(), io.BytesIO()
    noisy = (BLOCKS // 2 + RNG.integers(0, 60, BLOCKS.shape, np.uint8)).astype(np.uint8)
    Image.fromarray(noisy).save(files[0], "JPEG", quality=86)
    Image.fromarray((SLOPE * 25.5).astype(np.uint8) + RNG.integers(0, 3, SLOPE.shape, np.uint8)).save(files[1], "PNG")

    def decode():
        for file in files:
            np.asarray(Image.open(io.BytesIO(file.getvalue())))

    def derive():
        derive_event(noisy, SLOPE, "a")
        derive_lidar(SLOPE, "a")

    decoding, deriving = (min(timeit.repeat(work, number=1, repeat=30)) for work in (decode, derive))
    assert deriving < 2 * decoding, f"deriving takes {1e3 * deriving:.2f} ms, decoding {1e3 * decoding:.2f} ms"
