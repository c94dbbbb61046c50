"""The benchmarks time what they say, and nothing that computes something else."""

import pytest
import torch

from benchmarks import bench


@pytest.fixture
def small(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(bench, "WIDTHS", (4, 5, 6, 7))
    monkeypatch.setattr(bench, "measure", lambda calls, queued=True: [call() for call in calls] and 2.0)


def test_every_level_of_both_operations_is_timed_beside_a_copy_and_summed(small):
    times = {what: ms for ms, unit, what in bench.kernel_rows(quick=True)}
    stages = [f"stage {i}" for i in range(1, 5)]
    levels = {"prototype_distance": stages, "feature_select": [*stages, "logits"]}
    paths = {
        "prototype_distance": ["copy of the same bytes", "definition", "published loop"],
        "feature_select": ["copy of the same bytes", "definition"],
    }
    expected = {
        f"{name}, channels-last, {level}, {path}": 2.0
        for name in levels
        for level in levels[name]
        for path in paths[name]
    }
    sums = {
        f"{name}, channels-last, all levels, {path}": 2.0 * len(levels[name]) for name in levels for path in paths[name]
    }
    assert times == {**expected, **sums}


def test_a_kernel_that_computes_something_else_is_not_timed(small, monkeypatch):
    right = bench.kernels.prototype_distance
    monkeypatch.setattr(bench.kernels, "prototype_distance", lambda *given: 1.01 * right(*given))
    with pytest.raises(AssertionError, match="not close"):
        next(bench.kernel_rows(quick=True))


@pytest.mark.parametrize("operation", ["prototype_distance", "feature_select"])
@pytest.mark.parametrize("layout, channel_stride", [("channels-last", 1), ("channels-first", 8 * 8)])
def test_the_maps_have_the_layout_that_the_table_names(operation, layout, channel_stride):
    given = bench.inputs(operation, 5, 8, layout)
    maps = given[:2] if operation == "prototype_distance" else given[0]
    for x in maps:
        assert x.shape[-3:] == (5, 8, 8) and x.stride(-3) == channel_stride


def test_a_backward_pass_reaches_all_inputs_that_learn():
    weight, frozen = torch.ones(3, requires_grad=True), torch.ones(3)
    asked = []
    weight.register_hook(lambda gradient: asked.append(gradient))
    bench.run(lambda w, f: w * f, (weight, frozen), torch.tensor([1.0, 2.0, 3.0]))
    assert len(asked) == 1 and torch.equal(asked[0], torch.tensor([1.0, 2.0, 3.0]))


def test_the_steps_are_those_of_the_training_scripts(monkeypatch):
    monkeypatch.setattr(bench, "BACKBONE", "segformer_tiny")
    rows = list(bench.step_rows(quick=True))
    what = [what.split(",")[0] for _, _, what in rows]
    assert what == ["stage-1 step", "stage 1", "stage-2 step", "stage 2", "all 15 subsets of a batch"]
    assert [unit for _, unit, _ in rows] == ["ms", "MB", "ms", "MB", "ms"] and all(value > 0 for value, _, _ in rows)
