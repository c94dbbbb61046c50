"""Derived event and lidar: they follow from the frame alone, and behave as such sensors do."""
import numpy as np
import pytest
from PIL import Image

from benchmarks import figures
from datasets import derived
from datasets.derived import derive_event, derive_lidar
from datasets.synthetic import paint


def textured(H, W, seed=0):
    """Colour with an edge every few pixels, smooth in between."""
    coarse = np.random.default_rng(seed).integers(0, 256, (H // 8, W // 8, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((W, H), Image.Resampling.BICUBIC))


def fired(event):
    return (event > 0).any(-1)


def still(monkeypatch, forward=0.0, sideways=0.0, turn=0.0):
    """Fix the camera's motion."""
    monkeypatch.setattr(derived, "FORWARD", (forward, forward))
    monkeypatch.setattr(np.random.Generator, "uniform", None, raising=False)


@pytest.mark.parametrize("H, W", [(240, 320), (61, 83), (8, 8), (1, 1), (3, 40)])
def test_both_have_the_frames_size_and_three_channels_of_bytes(H, W):
    rgb, metres = np.random.default_rng(0).integers(0, 256, (H, W, 3), np.uint8), np.full((H, W), 2, np.float32)
    for image in (derive_event(rgb, metres, "a"), derive_lidar(metres, "a")):
        assert image.shape == (H, W, 3) and image.dtype == np.uint8
