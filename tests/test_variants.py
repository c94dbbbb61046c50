"""anyseg.py: the baseline's two feature losses against loops over samples, modalities, channels and pixels."""

import itertools

import anyseg
import torch
import torch.nn.functional as F

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
    agree(anyseg.umd_loss(student, teacher, present), slow, student)


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
    agree(anyseg.cmd_loss(student, teacher, present), slow, student)


def test_absent_modalities_get_no_gradient_and_equal_models_no_loss():
    student, teacher, present = features(3)
    loss = anyseg.umd_loss(student, teacher, present) + anyseg.cmd_loss(student, teacher, present)
    for grad in torch.autograd.grad(loss, student):
        assert torch.equal(grad.flatten(2).abs().sum(2) > 0, present)
    assert anyseg.umd_loss(teacher, teacher, present) == 0 and anyseg.cmd_loss(teacher, teacher, present) == 0
