"""benchmarks/variants.py: what the paper is compared with, against loops that anyone can follow."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from test_hpdm import SCENES, K, same_value_and_gradient, scene, slow_kl, slow_labels, slow_prototypes

from benchmarks import variants

STAGES = ((5, 4, 6), (7, 2, 3))  # C, h, w


def features(seed):
    """Features of student and teacher in float64, 2 x (B, M, C, h, w), and present (B, M): one, two and three."""
    g = torch.Generator().manual_seed(seed)
    student, teacher = ([torch.randn(3, 3, *shape, generator=g).double() for shape in STAGES] for _ in range(2))
    present = torch.tensor([[False, True, False], [True, False, True], [True, True, True]])
    return [s.requires_grad_() for s in student], teacher, present


def agree(loss, slow, student):
    torch.testing.assert_close(loss.double(), slow, rtol=1e-5, atol=1e-8)  # computed in float32
    for ours, obvious in zip(*(torch.autograd.grad(x, student) for x in (loss, slow)), strict=True):
        torch.testing.assert_close(ours, obvious, rtol=1e-4, atol=1e-7)


def test_unimodal_distillation_equals_its_loop():
    student, teacher, present = features(1)
    slow = torch.zeros((), dtype=torch.float64)
    for s, t in zip(student, teacher, strict=True):
        for b, m in present.nonzero().tolist():
            pixels = list(itertools.product(range(s.shape[3]), range(s.shape[4])))
            for y, x in pixels:
                p, q = (f[b, m, :, y, x].softmax(0) for f in (t, s))
                slow = slow + (p * (p.log() - q.log())).sum() / (len(pixels) * s.shape[2] * len(present))
    agree(variants.umd_loss(student, teacher, present), slow, student)


def test_cross_modal_distillation_equals_its_loop():
    student, teacher, present = features(2)
    slow = torch.zeros((), dtype=torch.float64)
    for s, t in zip(student, teacher, strict=True):
        for b in range(len(present)):
            there = present[b].nonzero().flatten().tolist()
            for m, n in itertools.product(there, there):
                ours, theirs = (
                    sum(F.cosine_similarity(f[b, m, c].flatten(), f[b, n, c].flatten(), 0) for c in range(f.shape[2]))
                    / f.shape[2]
                    for f in (s, t)
                )
                slow = slow + (ours - theirs) ** 2 / (len(there) ** 2 * len(present))
    agree(variants.cmd_loss(student, teacher, present), slow, student)


def test_absent_modalities_get_no_gradient_and_equal_models_no_loss():
    student, teacher, present = features(3)
    loss = variants.umd_loss(student, teacher, present) + variants.cmd_loss(student, teacher, present)
    for grad in torch.autograd.grad(loss, student):
        assert torch.equal(grad.flatten(2).abs().sum(2) > 0, present)
    assert variants.umd_loss(teacher, teacher, present) == 0 and variants.cmd_loss(teacher, teacher, present) == 0


def slow_cosine(a, b):
    return (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt())


def slow_dominant(teacher, fused):
    """The more similar half of the modalities of each sample, rounded up -> (B, M) bool."""
    dominant = torch.zeros(teacher[0].shape[:2], dtype=torch.bool)
    for b in range(dominant.shape[0]):
        similar = torch.zeros(dominant.shape[1], dtype=torch.float64)
        for m, (t, f) in itertools.product(range(dominant.shape[1]), zip(teacher, fused, strict=True)):
            places = list(itertools.product(range(f.shape[2]), range(f.shape[3])))
            similar[m] += sum(slow_cosine(t[b, m, :, y, x], f[b, :, y, x]) for y, x in places) / len(places)
        ranked = sorted(range(dominant.shape[1]), key=lambda m: -similar[m])
        dominant[b, ranked[: math.ceil(len(ranked) / 2)]] = True
    return dominant


def slow_variation(student, teacher, labels, counted):
    pairs = counted.nonzero().tolist()
    total = torch.zeros((), dtype=torch.float64)
    for s, t in zip(student, teacher, strict=True):
        y = slow_labels(labels, *s.shape[-2:])
        for b, m in pairs:
            places = [(r, c) for r, c in itertools.product(*map(range, y[b].shape)) if y[b, r, c] != 255]
            p, q = (
                torch.stack([slow_cosine(f[:, r, c], centres[int(y[b, r, c])]) for r, c in places]).softmax(0)
                if places
                else torch.ones(1)
                for f in (t[b, m], s[b, m])
                for centres in [slow_prototypes(f, y[b])]
            )
            total = total + slow_kl(p, q) / len(pairs)
    return total


@SCENES
def test_published_prototypes_equal_the_published_loop(make):
    """mmkd/Prototype.py and PCUMD.py: a mean divided by its count again, zeros for absent classes; KLDivLoss means over
    classes and channels, and is summed over modalities and stages."""
    student, teacher, _, labels, present, match = make()
    expected = torch.zeros((), dtype=torch.float64)
    for s, t in zip(student, teacher, strict=True):
        y = slow_labels(labels, *s.shape[-2:])
        for b, m in present.nonzero().tolist():
            logs = []
            for features in (s[b, m], t[b, match[b, m]]):
                rows = torch.zeros(K, s.shape[2], dtype=torch.float64)
                for c, mean in slow_prototypes(features, y[b]).items():
                    rows = rows.index_put((torch.tensor(c),), mean / (y[b] == c).sum())
                logs.append(rows.log_softmax(0))
            mean = F.kl_div(*logs, reduction="none", log_target=True).mean()
            expected = expected + mean / len(labels)
    loss = variants.published_hpdm(student, teacher, labels, present, match, K)
    same_value_and_gradient(loss, expected, student)


@SCENES
def test_feature_variation_equals_its_loop(make):
    student, teacher, fused, labels, present, _ = make()
    for counted in (present, present & slow_dominant(teacher, fused), present & False):
        loss = variants.feature_variation_loss(student, teacher, labels, counted, K)
        assert loss >= 0
        same_value_and_gradient(loss, slow_variation(student, teacher, labels, counted), student)


@pytest.mark.parametrize("modalities", [1, 2, 3, 4, 5])
def test_half_of_the_modalities_rounded_up_are_dominant(modalities):
    _, teacher, fused, *_ = scene(9, modalities=modalities)
    dominant = variants.dominant_modalities(teacher, fused)
    assert torch.equal(dominant, slow_dominant(teacher, fused))
    assert dominant.sum(1).tolist() == [math.ceil(modalities / 2)] * 3


def test_no_variant_sends_a_gradient_to_the_teacher_and_equal_models_do_not_vary():
    student, teacher, _, labels, present, match = scene(10)
    teacher = [t.requires_grad_() for t in teacher]
    losses = [variants.published_hpdm(student, teacher, labels, present, match, K)]
    losses.append(variants.feature_variation_loss(student, teacher, labels, present, K))
    for loss in losses:
        assert all(g is None for g in torch.autograd.grad(loss, teacher, retain_graph=True, allow_unused=True))
    assert variants.feature_variation_loss(student, student, labels, present, K).abs() < 1e-12
