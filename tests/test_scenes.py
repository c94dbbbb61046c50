"""The synthetic scenes: repeatable, one street under all conditions, and modalities that complement each other."""

import itertools
import timeit
from types import SimpleNamespace

import numpy as np
import pytest

from datasets import synthetic
from datasets.layouts import open_layout
from datasets.synthetic import BILLBOARD, CASES, CONDITIONS, MOVING, PARKED, SPLITS, layout, paint

MODALITIES = ("rgb", "depth", "event", "lidar")
CLASSES = open_layout("synthetic", None, "hha", 40)[2]


def differing(a, b):
    return {name for name in (*MODALITIES, "label") if not np.array_equal(a[name], b[name])}


@pytest.fixture
def painted_twice(monkeypatch):
    """A function that paints a scene, and once more with other things in place of those of class `old`."""

    def paint_both(index, old, new, **changes):
        scene = layout(0, "val", index)
        things = [SimpleNamespace(**vars(t) | {"label": new} | changes) if t.label == old else t for t in scene.things]
        for each in (scene, SimpleNamespace(**{**vars(scene), "things": things})):
            monkeypatch.setattr(synthetic, "layout", lambda *_, each=each: each)
            yield paint(0, "val", 0, condition="cloud", case="none")

    return paint_both


def test_the_same_arguments_give_the_same_bytes_and_any_other_scene_differs():
    first = paint(3, "train", 11)
    assert not differing(first, paint(3, "train", 11))
    for other in ((4, "train", 11), (3, "val", 11), (3, "test", 11), (3, "train", 12)):
        assert differing(first, paint(*other)) == {*MODALITIES, "label"}


def test_no_two_scenes_of_any_splits_are_the_same():
    seen = {paint(seed, split, index)["label"].tobytes() for seed in (0, 1) for split in SPLITS for index in range(60)}
    assert len(seen) == 2 * len(SPLITS) * 60


@pytest.mark.parametrize("size", [64, (37, 90), (8, 8), (130, 65)])
def test_every_modality_has_three_channels_of_the_requested_size(size):
    shape = (size, size) if size == 64 else size
    for index in range(30):
        scene = paint(0, "val", index, size)
        assert {scene[name].shape for name in MODALITIES} == {(*shape, 3)} and scene["label"].shape == shape
        assert {scene[name].dtype for name in (*MODALITIES, "label")} == {np.dtype("uint8")}
        assert scene["label"].max() < len(CLASSES)


def test_every_class_is_in_at_least_three_scenes_of_ten():
    count = np.zeros(len(CLASSES))
    for index in range(200):
        count[np.unique(paint(0, "train", index)["label"])] += 1
    assert not {name: n for name, n in zip(CLASSES, count, strict=True) if n < 60}


def test_conditions_and_cases_are_spread_evenly():
    frames = [paint(0, "val", index, 8) for index in range(150)]
    assert [sum(f["condition"] == c for f in frames) for c in CONDITIONS] == [30] * 5
    assert [sum(f["case"] == c for f in frames) for c in CASES] == [5] * 5
    assert len({(f["condition"], f["case"]) for f in frames}) == len(CONDITIONS) * (len(CASES) + 1)


CHANGES = {"night": "rgb", "fog": "rgb depth lidar", "rain": "rgb lidar", "sun": "rgb", "motionblur": "rgb"}
CHANGES |= {"overexposure": "rgb", "underexposure": "rgb", "lidarjitter": "lidar", "eventlowres": "event"}


@pytest.mark.parametrize("name, expected", CHANGES.items())
def test_a_condition_or_case_changes_its_own_modalities_and_nothing_else(name, expected):
    plain = {"condition": "cloud", "case": "none"}
    change = {"condition" if name in CONDITIONS else "case": name}
    for index in range(5):
        both = (paint(1, "test", index, **given) for given in (plain, plain | change))
        assert differing(*both) == set(expected.split())


def test_night_is_dark_fog_hides_the_distance_and_rain_thins_the_lidar():
    def mean(name, condition, measure):
        return np.mean([measure(paint(0, "val", i, condition=condition, case="none")[name]) for i in range(20)])

    def returns(image):
        return (image > 0).any(-1).mean()

    assert mean("rgb", "night", np.mean) < 0.5 * mean("rgb", "cloud", np.mean)
    assert mean("rgb", "sun", np.mean) > mean("rgb", "cloud", np.mean)
    assert mean("depth", "fog", returns) < 0.95 * mean("depth", "cloud", returns)
    assert mean("lidar", "rain", returns) < 0.7 * mean("lidar", "cloud", returns)


def test_only_events_tell_a_moving_car_from_a_parked_one(painted_twice):
    fired = []
    for index in range(40):
        moving, parked = painted_twice(index, MOVING, PARKED, speed=0.0)
        where = moving["label"] == MOVING
        if where.sum() >= 20:
            assert differing(moving, parked) == {"event", "label"}
            assert np.array_equal(where, parked["label"] != moving["label"])
            fired.append([(image["event"][where] > 0).any(-1).mean() for image in (moving, parked)])
    assert len(fired) >= 20
    moving, parked = np.mean(fired, axis=0)
    assert moving > 1.5 * parked, f"events on {moving:.0%} of a moving car's pixels, on {parked:.0%} of a parked one's"


def test_a_billboard_is_a_car_to_the_camera_and_flat_in_depth(painted_twice):
    for index in range(10):
        painted, car = painted_twice(index, BILLBOARD, PARKED)
        if (painted["label"] == BILLBOARD).sum() > 30:
            assert differing(painted, car) >= {"depth", "label"} and "rgb" not in differing(painted, car)


def test_a_larger_image_is_the_same_scene_drawn_finer():
    for index in range(10):
        small, large = (paint(2, "val", index, size)["label"] for size in (64, 128))
        assert max((small == large[i::2, j::2]).mean() for i in (0, 1) for j in (0, 1)) > 0.92


WRONG = {"training": ("training", 1), "snow": ("val", 1, 64, "snow"), "blur": ("val", 1, 64, "sun", "blur")}
WRONG |= {"-1": ("val", -1), "4 x 64": ("val", 1, (4, 64))}


@pytest.mark.parametrize("word, arguments", WRONG.items())
def test_a_wrong_argument_is_named_in_the_error(word, arguments):
    with pytest.raises(ValueError, match=word):
        paint(0, *arguments)


def test_painting_is_far_from_slow():
    index = itertools.count()
    times = timeit.repeat(lambda: paint(0, "train", next(index)), number=1, repeat=100)
    assert np.median(times) < 0.05  # 2 ms on an idle core; the slack is for busy machines
