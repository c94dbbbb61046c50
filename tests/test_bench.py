"""The benchmarks time what they say, and nothing that computes something else."""

import itertools

import pytest
import torch

from benchmarks import bench


@pytest.fixture
def small(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(bench, "WIDTHS", (4, 5, 6, 7))
    monkeypatch.setattr(bench, "measure", lambda calls, queued=True: [call() for call in calls] and 2.0)


def test_every_level_of_both_operations_is_timed_beside_a_copy_and_summed(small):
    times = {what.split(":")[0]: ms for ms, unit, what in bench.kernel_rows(quick=True)}
    stages, expected = [f"stage {i}" for i in range(1, 5)], {}
    for name, levels, path in (
        *itertools.product(["prototype_distance"], [stages], [bench.COPY, "definition", "published loop"]),
        *itertools.product(["feature_select"], [[*stages, "logits"]], [bench.COPY, "definition"]),
    ):
        for direction in ("forward", "with backward"):
            expected |= {f"{name}, channels-last, {level}, {direction}, {path}": 2.0 for level in levels}
            expected[f"{name}, channels-last, all levels, {direction}, {path}"] = 2.0 * len(levels)
    assert times == expected


def test_the_bytes_are_those_that_must_move(small):
    """Of stage 1, with four channels, 128 x 128, a batch of 2 and 4 modalities: 2 maps are read, 1 gradient written."""
    speeds = dict(what.split(": ") for *_, what in itertools.islice(bench.kernel_rows(True), 6))
    for direction, maps in (("forward", 2), ("with backward", 3)):
        expected = f"{maps * 2 * 4 * 4 * 128 * 128 * 4 / 0.002 / 1e9:.3g} GB/s, 100% of the copy"
        assert speeds[f"prototype_distance, channels-last, stage 1, {direction}, definition"] == expected


def test_a_kernel_that_computes_something_else_is_not_timed(small, monkeypatch):
    right = bench.kernels.prototype_distance
    monkeypatch.setattr(bench.kernels, "prototype_distance", lambda *given: 1.01 * right(*given))
    with pytest.raises(AssertionError, match="not close"):
        next(bench.kernel_rows(quick=True))


@pytest.mark.parametrize("operation", ["prototype_distance", "feature_select"])
@pytest.mark.parametrize("layout, channel_stride", [("channels-last", 1), ("channels-first", 8 * 8)])
def test_the_maps_have_the_layout_that_the_table_names(operation, layout, channel_stride):
    first, second, *_ = bench.inputs(operation, 5, 8, layout)
    for x in first if operation == "feature_select" else (first, second):
        assert x.shape[-3:] == (5, 8, 8) and x.stride(-3) == channel_stride


def test_a_backward_pass_reaches_all_inputs_that_learn():
    weight, frozen, asked = torch.ones(3, requires_grad=True), torch.ones(3), []
    weight.register_hook(asked.append)
    bench.run(torch.mul, (weight, frozen), torch.tensor([1.0, 2.0, 3.0]))
    assert [gradient.tolist() for gradient in asked] == [[1, 2, 3]]


def test_the_steps_are_those_of_the_training_scripts(monkeypatch):
    monkeypatch.setattr(bench, "BACKBONE", "segformer_tiny")
    rows = list(bench.step_rows(quick=True))
    what = ["stage-1 step", "stage 1", "stage-2 step", "stage 2", "all 15 subsets of a batch"]
    assert [name.split(",")[0] for *_, name in rows] == what
    assert [unit for _, unit, _ in rows] == ["ms", "MB", "ms", "MB", "ms"] and all(value > 0 for value, _, _ in rows)
