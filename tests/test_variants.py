"""benchmarks/variants.py: what the paper is compared with, against loops that anyone can follow."""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from losses import SCENES, K, scene, slow_labels

from benchmarks import variants

cosine = functools.partial(F.cosine_similarity, dim=0)
FLOAT32 = {"value": (1e-5, 1e-8), "gradient": (1e-4, 1e-7)}  # tolerances of losses that compute in it


def fused_of(teacher):
    """Each stage's mean over the modalities (B, C, h, w), with noise."""
    g = torch.Generator().manual_seed(1)
    return [f.mean(1) + 0.5 * torch.randn(f[:, 0].shape, generator=g) for f in teacher]


def slow_prototypes(features, labels):
    """features (C, h, w), labels (h, w) -> {class: mean feature (C,)}."""
    return {c: features[:, labels == c].mean(1) for c in labels.unique().tolist() if c != 255}


def slow_kl(p, q):
    return sum(a * (a.log() - b.log()) for a, b in zip(p, q, strict=True))


def agree(loss, slow, student, value=(1e-9, 1e-12), gradient=(1e-7, 1e-11)):
    torch.testing.assert_close(loss.double(), slow, rtol=value[0], atol=value[1])
    ours, obvious = (torch.autograd.grad(x, student, materialize_grads=True) for x in (loss, slow))
    torch.testing.assert_close(ours, obvious, rtol=gradient[0], atol=gradient[1])


def test_unimodal_distillation_equals_its_loop():
    student, teacher, _, present, _ = scene()
    slow = 0
    for s, t in zip(student, teacher, strict=True):
        for b, m in present.nonzero().tolist():
            pixels = (f[b, m].flatten(1).T.softmax(1) for f in (t, s))
            slow = slow + sum(map(slow_kl, *pixels)) / (s[b, m].numel() * len(present))
    agree(variants.umd_loss(student, teacher, present), slow, student, **FLOAT32)


def test_cross_modal_distillation_equals_its_loop():
    student, teacher, _, present, _ = scene()
    slow = 0
    for s, t in zip(student, teacher, strict=True):
        for b in range(len(present)):
            there = present[b].nonzero().flatten().tolist()
            for m, n in itertools.product(there, there):
                pairs = ((f[b, m].flatten(1), f[b, n].flatten(1)) for f in (s, t))
                ours, theirs = (F.cosine_similarity(*pair, dim=1).mean() for pair in pairs)
                slow = slow + (ours - theirs) ** 2 / (len(there) ** 2 * len(present))
    agree(variants.cmd_loss(student, teacher, present), slow, student, **FLOAT32)


def slow_dominant(teacher, fused):
    """The more similar half of the modalities of each sample, rounded up -> (B, M) bool."""
    dominant = torch.zeros(teacher[0].shape[:2], dtype=torch.bool)
    for b, row in enumerate(dominant):
        near = [sum(cosine(t[b, m], f[b]).mean() for t, f in zip(teacher, fused, strict=True)) for m in range(len(row))]
        ranked = sorted(range(len(row)), key=near.__getitem__, reverse=True)
        row[ranked[: math.ceil(len(ranked) / 2)]] = True
    return dominant


def slow_variation(student, teacher, labels, counted):
    total = 0 * student[0].sum()
    for s, t in zip(student, teacher, strict=True):
        y = slow_labels(labels, *s.shape[-2:])
        for b, m in counted.nonzero().tolist():
            labelled, similar = (y[b] != 255).nonzero().tolist(), []
            for f in (t[b, m], s[b, m]):
                means = slow_prototypes(f, y[b])
                similar.append([cosine(f[:, r, c], means[int(y[b, r, c])]) for r, c in labelled])
            if labelled:
                p, q = (torch.stack(x).softmax(0) for x in similar)
                total = total + slow_kl(p, q) / counted.sum()
    return total


@pytest.mark.parametrize("case", SCENES)
def test_published_prototypes_equal_the_published_loop(case):
    """mmkd/Prototype.py and PCUMD.py: a mean divided by its count again, zeros for absent classes; KLDivLoss means over
    classes and channels, and is summed over modalities and stages."""
    student, teacher, labels, present, match = scene(case)
    slow = 0
    for s, t in zip(student, teacher, strict=True):
        y = slow_labels(labels, *s.shape[-2:])
        for b, m in present.nonzero().tolist():
            logs = []
            for features in (s[b, m], t[b, match[b, m]]):
                rows = 0 * features.sum() + torch.zeros(K, s.shape[2], dtype=torch.float64)  # of the graph in any case
                for c, mean in slow_prototypes(features, y[b]).items():
                    rows = rows.index_put((torch.tensor(c),), mean / (y[b] == c).sum())
                logs.append(rows.log_softmax(0))
            slow = slow + F.kl_div(*logs, reduction="none", log_target=True).mean() / len(labels)
    agree(variants.published_hpdm(student, teacher, labels, present, match, K), slow, student)


@pytest.mark.parametrize("case", SCENES)
def test_feature_variation_equals_its_loop(case):
    student, teacher, labels, present, _ = scene(case)
    for counted in (present, present & slow_dominant(teacher, fused_of(teacher)), present & False):
        loss = variants.feature_variation_loss(student, teacher, labels, counted, K)
        assert loss >= 0
        agree(loss, slow_variation(student, teacher, labels, counted), student)


@pytest.mark.parametrize("modalities", [1, 2, 3, 4, 5])
def test_half_of_the_modalities_rounded_up_are_dominant(modalities):
    _, teacher, *_ = scene(modalities=modalities)
    fused = fused_of(teacher)
    assert torch.equal(variants.dominant_modalities(teacher, fused), slow_dominant(teacher, fused))


def test_no_loss_sends_a_gradient_to_the_teacher():
    student, teacher, labels, present, match = scene()
    loss = variants.umd_loss(student, teacher, present) + variants.cmd_loss(student, teacher, present)
    loss = loss + variants.published_hpdm(student, teacher, labels, present, match, K)
    loss = loss + variants.feature_variation_loss(student, teacher, labels, present, K)
    assert all(g is None for g in torch.autograd.grad(loss, teacher, allow_unused=True))
