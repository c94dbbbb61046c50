"""The benchmarks time two forms of the same work; here they compute the same."""

import copy
import math

import pytest
import torch

import hpdm
from benchmarks import bench_kernels, bench_steps
from engine import loop
from fsm import FSM


def test_the_published_structure_gives_the_same_outputs_loss_and_gradients():
    w = bench_steps.work(quick=True)
    present = torch.tensor([[True, False, True, True], [False, False, False, True]])
    w.student.eval()  # no dropout
    ours, published = w.student(w.images, present), bench_steps.published_forward(w.student, w.images, present)
    torch.testing.assert_close(ours.logits, published.logits, rtol=1e-3, atol=1e-4)
    for a, b in zip(ours.per_modality, published.per_modality, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        target = w.teacher(w.images).per_modality
    gradients = []
    for out, distance in ((ours, hpdm.hpdm_loss), (published, bench_steps.published_hpdm)):
        w.student.zero_grad()
        loss = distance(out.per_modality, target, w.labels, present, w.match, bench_steps.CLASSES)
        loss.backward()
        gradients.append((loss.detach(), w.student.stages[0].embed.proj.weight.grad.clone()))
    torch.testing.assert_close(gradients[0][0], gradients[1][0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=1e-3, atol=1e-5)


def test_a_stage_2_step_moves_the_student():
    w = bench_steps.work(quick=True)
    fsm = FSM(w.teacher.widths, bench_steps.CLASSES, len(bench_steps.MODALITIES)).requires_grad_(False)
    before = w.student.decoder.classify.weight.clone()
    loss = bench_steps.stage2_loss(w, copy.deepcopy(w.teacher), fsm)
    bench_steps.train(loss, loop.adamw(w.student, 6e-5, 0.01))
    assert not torch.equal(before, w.student.decoder.classify.weight)


@pytest.fixture
def small(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(bench_kernels, "WIDTHS", (4, 5, 6, 7))
    monkeypatch.setattr(bench_kernels, "PIXELS", 512)
    monkeypatch.setattr(bench_kernels, "measure", lambda calls, repeats=5: [call() for call in calls] and 2.0)


def test_every_level_of_both_operations_is_timed_both_ways(small):
    rows = list(bench_kernels.kernel_rows(quick=True))
    timed = {(row["operation"], row["level"], row["pass"]) for row in rows if row["path"] == "definition"}
    stages = {f"stage {i}" for i in range(1, 5)}
    levels = {"prototype_distance": stages | {"all"}, "feature_select": stages | {"logits", "all"}}
    ways = ("forward", "forward + backward")
    assert timed == {(operation, level, way) for operation in levels for level in levels[operation] for way in ways}
    assert [row["level"] for row in rows if row["path"] == "published loop"] == ["all", "all"]
    assert all(math.isclose(row["of_copy"], 1) for row in rows)  # every time is 2 here, the copy's too


def test_a_kernel_that_computes_something_else_is_not_timed(small, monkeypatch):
    right = bench_kernels.kernels.prototype_distance
    monkeypatch.setattr(bench_kernels.kernels, "prototype_distance", lambda *inputs: 1.01 * right(*inputs))
    with pytest.raises(AssertionError, match="not close"):
        next(bench_kernels.kernel_rows(quick=True))


@pytest.mark.parametrize("layout, channel_stride", [("channels-last", 1), ("channels-first", 6 * 7)])
def test_the_maps_have_the_layout_that_the_table_names(layout, channel_stride):
    maps = bench_kernels.feature_maps(2, 3, 5, 6, 7, layout=layout)
    assert maps.shape == (2, 3, 5, 6, 7) and maps.stride(2) == channel_stride
