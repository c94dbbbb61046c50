"""hpdm.py: the losses of stage 1 against loops and plain formulas that anyone can follow."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from losses import SCENES, K, scene, slow_labels

import hpdm
from kernels import reference


def slow_hpdm(student, teacher, labels, present, match):
    """By the loop over samples, modalities and classes that stands beside the definition."""
    pairs = [(s, t, slow_labels(labels, *s.shape[-2:])) for s, t in zip(student, teacher, strict=True)]
    losses = (reference.prototype_distance_loop(s, t, y, present, match, K) for s, t, y in pairs)
    return sum(losses, 0 * student[0].sum())  # which a gradient can always go through


def gradients(loss, inputs):
    """Zeros for an input that the loss does not reach."""
    return torch.autograd.grad(loss, inputs, materialize_grads=True, retain_graph=True)


@pytest.mark.parametrize("size", [(1042, 1042), (512, 768), (64, 64), (45, 70), (37, 33), (1080, 1920)])
def test_labels_shrink_as_nearest_interpolation_does(size):
    labels = torch.randint(0, 256, (2, *size), generator=torch.Generator().manual_seed(0))
    h, w = size
    for _ in range(5):  # down to stride 32
        h, w = (h + 1) // 2, (w + 1) // 2
        assert torch.equal(hpdm.labels_at(labels, (h, w)), slow_labels(labels, h, w))


def test_a_match_is_a_uniform_permutation_of_every_row_and_another_kind_is_refused():
    match = hpdm.draw_match(6000, 3, "random", torch.Generator().manual_seed(0))
    counts = {p: match.tolist().count([*p]) for p in itertools.permutations(range(3))}
    assert sum(counts.values()) == 6000 and match.dtype == torch.int64  # no row is anything else
    deviation = (6000 * (1 / 6) * (5 / 6)) ** 0.5
    assert all(abs(n - 1000) < 4 * deviation for n in counts.values()), counts
    assert hpdm.draw_match(4, 3, "same", torch.Generator()).tolist() == [[0, 1, 2]] * 4
    with pytest.raises(ValueError, match="'Same' .* random or same"):
        hpdm.draw_match(4, 3, "Same", torch.Generator())


@pytest.mark.parametrize("case", [*SCENES, "channels last"])
def test_the_hybrid_prototype_distance_equals_its_loop_and_teaches_the_student_alone(case):
    student, teacher, labels, present, match = scene(case)
    loss = hpdm.hpdm_loss(student, teacher, labels, present, match, K)
    slow = slow_hpdm(student, teacher, labels, present, match)
    assert (loss > 0) == (case != "no label at all")
    torch.testing.assert_close(loss.double(), slow, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradients(loss, student), gradients(slow, student), rtol=1e-7, atol=1e-11)
    assert not any(gradient.any() for gradient in gradients(loss, teacher))


def test_absent_modalities_get_no_gradient_whatever_they_hold():
    student, teacher, labels, present, match = scene()
    expected = hpdm.hpdm_loss(student, teacher, labels, present, match, K)
    broken = [torch.where(present[:, :, None, None, None], s.detach(), torch.nan).requires_grad_() for s in student]
    loss = hpdm.hpdm_loss(broken, teacher, labels, present, match, K)
    assert torch.equal(loss, expected)
    reached = sum(grad.flatten(2).abs().sum(2) for grad in gradients(loss, broken))  # (B, M)
    assert torch.equal(reached > 0, present)


def test_logits_are_distilled_by_the_distribution_of_the_teacher_who_learns_nothing():
    g = torch.Generator().manual_seed(1)
    student, teacher = (2 * torch.randn(2, K, 5, 7, generator=g).double().requires_grad_() for _ in range(2))
    loss = hpdm.distill_logits(student.requires_grad_(), teacher)  # computed in float32
    p, q = teacher.softmax(1), student.softmax(1)
    plain = (p * (p.log() - q.log())).mean()
    torch.testing.assert_close(loss.double(), plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(loss, student), gradients(plain, student), rtol=1e-4, atol=1e-7)
    assert not gradients(loss, teacher)[0].any()


# ---- OHEM -----------------------------------------------------------------------------------------------------------
OHEM = {  # by how much the pixels' own class leads, which share of the pixels is ignored
    "untrained, most pixels are hard": (0.0, 0.3),
    "half trained": (3.0, 0.3),
    "trained, the threshold leaves too few": (9.0, 0.3),
    "losses so tiny that float32 knows few of them": (16.0, 0.3),
    "losses of exactly zero": (60.0, 0.3),
    "losses a few roundings apart": (5.0, 0.2),
    "ties": (6.0, 0.3),
    "few valid pixels": (8.0, 0.97),
    "one valid pixel": (7.0, 1.0),
    "none valid": (3.0, 1.0),
}


def pixels(case):
    lead, ignored = OHEM[case]
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, K, (4, 9, 11), generator=g)
    own, noise = F.one_hot(labels, K).permute(0, 3, 1, 2), torch.randn(4, K, 9, 11, generator=g)
    labels = labels.masked_fill(torch.rand(labels.shape, generator=g) < ignored, 255)
    if case == "one valid pixel":
        labels[2, 3, 4] = 1
    elif case == "losses a few roundings apart":  # some 4 ulp
        noise, lead = 0, lead + 4.8e-7 * torch.randperm(labels.numel(), generator=g).view(4, 1, 9, 11)
    elif case == "ties":
        noise = 0
    return (lead * own + noise).requires_grad_(), labels


def slow_ohem(logits, labels, threshold):
    """The published three lines, on copies that they may read on the host; no valid pixel is a loss of 0."""
    loss = F.cross_entropy(logits, labels, ignore_index=255, reduction="none").view(-1)
    least = labels[labels != 255].numel() // 16
    hard = loss[loss > -math.log(threshold)]
    if hard.numel() < least:
        hard, _ = loss.topk(least)
    return hard.mean() if len(hard) else logits.sum() * 0


@pytest.mark.parametrize("case", OHEM)
@pytest.mark.parametrize("threshold", [0.7, 1.0])  # by the second every pixel is hard
def test_ohem_is_the_published_loss(case, threshold):
    logits, labels = pixels(case)
    slow, loss = slow_ohem(logits, labels, threshold), hpdm.ohem_cross_entropy(logits, labels, threshold)
    torch.testing.assert_close(loss, slow, rtol=1e-5, atol=1e-12)
    ours, obvious = gradients(loss, logits)[0], gradients(slow, logits)[0]
    if "apart" in case or case == "ties":  # any of the equally hard pixels may be taken, but so many
        ours, obvious = ours.abs().sum(), obvious.abs().sum()
    torch.testing.assert_close(ours, obvious, rtol=1e-4, atol=1e-9)
