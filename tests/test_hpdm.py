"""hpdm.py: the losses of stage 1 against loops over samples, modalities, classes and pixels that anyone can follow."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import hpdm
from kernels import reference

K = 6
STAGES = ((5, 8, 9), (7, 4, 5), (3, 2, 3), (4, 1, 2))  # C, h, w for images of 32 x 36


def scene(seed, samples=3, modalities=3):
    """Random features of student and teacher, fused teacher features, labels with 255, present; all in float64."""
    g = torch.Generator().manual_seed(seed)
    student, teacher = (
        [torch.randn(samples, modalities, c, h, w, generator=g).double() for c, h, w in STAGES] for _ in range(2)
    )
    fused = [f.mean(1) + 0.5 * torch.randn(f[:, 0].shape, generator=g) for f in teacher]
    blocks = torch.randint(0, K + 1, (samples, 8, 9), generator=g)  # blocks of 4 x 4, so that coarse stages see classes
    labels = blocks.where(blocks < K, 255).repeat_interleave(4, 1).repeat_interleave(4, 2)
    flips = torch.rand(labels.shape, generator=g) < 0.2
    labels = torch.where(flips, torch.randint(0, K, labels.shape, generator=g), labels)
    present = torch.rand(samples, modalities, generator=g) < 0.5
    present[torch.arange(samples), torch.randint(0, modalities, (samples,), generator=g)] = True
    match = hpdm.draw_match(samples, modalities, "random", g)
    return [s.requires_grad_() for s in student], teacher, fused, labels, present, match


def any_scene():
    return scene(1)


def classes_that_never_occur():
    *rest, labels, present, match = scene(2)
    return *rest, labels.masked_fill((labels == 1) | (labels == 4), 3), present, match


def a_sample_without_labels():
    *rest, labels, present, match = scene(3)
    labels[1] = 255
    return *rest, labels, present, match


def no_label_at_all():
    *rest, labels, present, match = scene(4)
    return *rest, torch.full_like(labels, 255), present, match


def one_modality():
    return scene(5, modalities=1)


def one_present_modality():
    *rest, present, match = scene(6)
    return *rest, torch.tensor([[False, True, False], [False, False, True], [True, False, False]]), match


SCENES = pytest.mark.parametrize(
    "make",
    [any_scene, classes_that_never_occur, a_sample_without_labels, no_label_at_all, one_modality, one_present_modality],
)


def slow_labels(labels, h, w):
    return F.interpolate(labels[:, None].double(), size=(h, w), mode="nearest")[:, 0].long()


def slow_prototypes(features, labels):
    """features (C, h, w), labels (h, w) -> {class: mean feature (C,)}, pixel by pixel."""
    members = {}
    for y, x in itertools.product(range(labels.shape[0]), range(labels.shape[1])):
        if (c := int(labels[y, x])) != 255:
            members.setdefault(c, []).append(features[:, y, x])
    return {c: sum(pixels) / len(pixels) for c, pixels in members.items()}


def slow_kl(p, q):
    return sum(a * (a.log() - b.log()) for a, b in zip(p, q, strict=True))


def slow_hpdm(student, teacher, labels, present, match):
    total = torch.zeros((), dtype=torch.float64)
    for s, t in zip(student, teacher, strict=True):
        y, channels = slow_labels(labels, *s.shape[-2:]), s.shape[2]
        distances = []
        for b, m in present.nonzero().tolist():
            own, other = slow_prototypes(s[b, m], y[b]), slow_prototypes(t[b, match[b, m]], y[b])
            per_channel = [torch.zeros((), dtype=torch.float64)] * channels
            for c in range(channels if own else 0):
                p = torch.stack([other[k][c] for k in sorted(other)]).softmax(0)
                q = torch.stack([own[k][c] for k in sorted(own)]).softmax(0)
                per_channel[c] = slow_kl(p, q)
            distances.append(sum(per_channel) / (channels * K))
        total = total + sum(distances) / len(labels)
    return total


def same_value_and_gradient(loss, slow, inputs):
    """Both values and their gradients; a loss that does not reach an input has a gradient of zero there."""
    torch.testing.assert_close(loss.double(), slow, rtol=1e-9, atol=1e-12)
    ours, obvious = (
        torch.autograd.grad(x, inputs, allow_unused=True) if x.requires_grad else [None] * len(inputs)
        for x in (loss, slow)
    )
    for i, (a, b, x) in enumerate(zip(ours, obvious, inputs, strict=True)):
        zeros = torch.zeros_like(x)
        torch.testing.assert_close(
            zeros if a is None else a,
            zeros if b is None else b,
            rtol=1e-7,
            atol=1e-11,
            msg=lambda text, i=i: f"gradient of input {i}: {text}",
        )


@pytest.mark.parametrize("size", [(1042, 1042), (512, 768), (64, 64), (45, 70), (37, 33), (1080, 1920)])
def test_labels_shrink_as_nearest_interpolation_does(size):
    labels = torch.randint(0, 256, (2, *size), generator=torch.Generator().manual_seed(0))
    h, w = size
    for _ in range(5):  # down to stride 32
        h, w = (h + 1) // 2, (w + 1) // 2
        assert torch.equal(hpdm.labels_at(labels, (h, w)), slow_labels(labels, h, w))


def test_a_match_is_a_uniform_permutation_of_every_row():
    match = hpdm.draw_match(6000, 3, "random", torch.Generator().manual_seed(0))
    rows = [tuple(row) for row in match.tolist()]
    counts = {p: rows.count(p) for p in itertools.permutations(range(3))}
    assert sum(counts.values()) == 6000 and match.dtype == torch.int64  # no row is anything else
    deviation = (6000 * (1 / 6) * (5 / 6)) ** 0.5
    assert all(abs(n - 1000) < 4 * deviation for n in counts.values()), counts
    assert hpdm.draw_match(4, 3, "same", torch.Generator()).tolist() == [[0, 1, 2]] * 4


@SCENES
def test_prototypes_equal_the_mean_over_the_pixels_of_their_class(make):
    student, *_, labels, _, _ = make()
    for s in student:
        y = slow_labels(labels, *s.shape[-2:])
        prototypes, counts = reference.prototype_pool(s, y, K)
        for b, m in itertools.product(*map(range, s.shape[:2])):
            expected = slow_prototypes(s[b, m], y[b])
            for c in range(K):
                assert counts[b, c] == (y[b] == c).sum()
                vector = expected.get(c, torch.zeros(s.shape[2], dtype=torch.float64))
                torch.testing.assert_close(prototypes[b, m, c], vector, rtol=1e-9, atol=1e-12)


@SCENES
def test_the_hybrid_prototype_distance_equals_its_loop(make):
    student, teacher, _, labels, present, match = make()
    loss = hpdm.hpdm_loss(student, teacher, labels, present, match, K)
    assert loss >= 0 and (loss > 0) == bool((labels != 255).any())
    same_value_and_gradient(loss, slow_hpdm(student, teacher, labels, present, match), student)


def test_absent_modalities_get_no_gradient_whatever_they_hold():
    student, teacher, _, labels, present, match = scene(7)
    expected = hpdm.hpdm_loss(student, teacher, labels, present, match, K)
    broken = [torch.where(present[:, :, None, None, None], s.detach(), torch.nan).requires_grad_() for s in student]
    loss = hpdm.hpdm_loss(broken, teacher, labels, present, match, K)
    assert torch.equal(loss, expected)
    reached = sum(grad.flatten(2).abs().sum(2) for grad in torch.autograd.grad(loss, broken))  # (B, M)
    assert torch.equal(reached > 0, present)


def test_identical_models_are_at_distance_zero_only_when_modalities_answer_to_themselves():
    student, _, _, labels, present, _ = scene(8)
    own, moved = torch.arange(3).expand(3, 3).contiguous(), torch.tensor([[1, 2, 0]] * 3)
    assert hpdm.hpdm_loss(student, student, labels, present, own, K).abs() < 1e-12
    assert hpdm.hpdm_loss(student, student, labels, present, moved, K) > 1e-2


def test_an_unknown_matching_is_refused():
    with pytest.raises(ValueError, match="'Same' .* random or same"):
        hpdm.draw_match(4, 3, "Same", torch.Generator())


def test_no_loss_sends_a_gradient_to_the_teacher():
    student, teacher, _, labels, present, match = scene(10)
    teacher = [t.requires_grad_() for t in teacher]
    losses = [hpdm.hpdm_loss(student, teacher, labels, present, match, K)]
    losses.append(hpdm.distill_logits(student[0][:, 0], teacher[0][:, 0]))
    for loss in losses:
        assert all(g is None for g in torch.autograd.grad(loss, teacher, retain_graph=True, allow_unused=True))


def test_logits_are_distilled_by_the_teachers_distribution():
    g = torch.Generator().manual_seed(1)
    student = (2 * torch.randn(2, K, 5, 7, generator=g)).double().requires_grad_()
    teacher = (2 * torch.randn(2, K, 5, 7, generator=g)).double()
    pixels = list(itertools.product(range(2), range(5), range(7)))
    slow = sum(slow_kl(teacher[b, :, y, x].softmax(0), student[b, :, y, x].softmax(0)) for b, y, x in pixels)
    loss = hpdm.distill_logits(student, teacher)  # computed in float32
    torch.testing.assert_close(loss.double(), slow / (K * len(pixels)), rtol=1e-5, atol=1e-6)
    ours, obvious = (torch.autograd.grad(x, student)[0] for x in (loss, slow / (K * len(pixels))))
    torch.testing.assert_close(ours, obvious, rtol=1e-4, atol=1e-7)


# ---- OHEM -------------------------------------------------------------------------------------------------------


def pixels(seed, confidence, ignored=0.3, samples=4):
    """logits whose own class leads by about `confidence`, labels of which a share is 255."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, K, (samples, 9, 11), generator=g)
    logits = torch.randn(samples, K, 9, 11, generator=g) + confidence * F.one_hot(labels, K).permute(0, 3, 1, 2)
    return logits, labels.masked_fill(torch.rand(labels.shape, generator=g) < ignored, 255)


def slow_ohem(logits, labels):
    """The published three lines, on copies that they may read on the host; no valid pixel is a loss of 0."""
    loss = F.cross_entropy(logits, labels, ignore_index=255, reduction="none").view(-1)
    least = labels[labels != 255].numel() // 16
    hard = loss[loss > -math.log(0.7)]
    if hard.numel() < least:
        hard, _ = loss.topk(least)
    return hard.mean() if len(hard) else logits.sum() * 0


def tied():
    logits, labels = pixels(5, 6.0)
    return logits[:, :, :1, :1].repeat(1, 1, 9, 11), labels[:, :1, :1].repeat(1, 9, 11).where(labels != 255, 255)


def a_few_roundings_apart():
    """Every pixel's own class leads by 5 and a bit more, in another order; the losses lie some 4 ulp apart."""
    _, labels = pixels(5, 0.0, ignored=0.0)
    order = torch.randperm(labels.numel(), generator=torch.Generator().manual_seed(0)).view(labels.shape)
    lead = 5 + 4.8e-7 * order
    return F.one_hot(labels, K).permute(0, 3, 1, 2) * lead[:, None], labels.masked_fill(order % 5 == 0, 255)


def one_valid_pixel():
    logits, labels = pixels(6, 7.0)
    only = torch.full_like(labels, 255)
    only[2, 3, 4] = 1
    return logits, only


OHEM = {
    "untrained, most pixels are hard": lambda: pixels(1, 0.0),
    "half trained": lambda: pixels(2, 3.0),
    "trained, the threshold leaves too few": lambda: pixels(3, 9.0),
    "losses so tiny that float32 knows few of them": lambda: pixels(4, 16.0),
    "losses of exactly zero": lambda: pixels(4, 60.0),
    "losses a few roundings apart": a_few_roundings_apart,
    "ties": tied,
    "few valid pixels": lambda: pixels(7, 8.0, ignored=0.97),
    "one valid pixel": one_valid_pixel,
    "none valid": lambda: pixels(8, 3.0, ignored=1.1),
}


@pytest.mark.parametrize("case", OHEM)
def test_ohem_is_the_published_loss(case):
    logits, labels = OHEM[case]()
    logits.requires_grad_()
    slow, loss = slow_ohem(logits, labels), hpdm.ohem_cross_entropy(logits, labels)
    torch.testing.assert_close(loss, slow, rtol=1e-5, atol=1e-12)
    ours, obvious = (torch.autograd.grad(x, logits)[0] for x in (loss, slow))
    if "apart" in case or case == "ties":  # any of the equally hard pixels may be taken, but so many
        ours, obvious = (x.abs().sum() for x in (ours, obvious))
    torch.testing.assert_close(ours, obvious, rtol=1e-4, atol=1e-9)


def test_ohem_with_every_pixel_hard_is_plain_cross_entropy():
    logits, labels = pixels(9, 2.0)
    plain = F.cross_entropy(logits, labels, ignore_index=255)
    torch.testing.assert_close(hpdm.ohem_cross_entropy(logits, labels, threshold=1.0), plain)
