"""A training step of each stage gives the same loss and gradients by the definitions and by Triton."""

import importlib.util

import pytest
import torch

import fsm
import hpdm
from data import draw_present
from model import build_model

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
K, MODALITIES = 5, ["rgb", "depth", "event"]


def assert_both_paths_agree(monkeypatch, loss_of, module) -> None:
    results = []
    for path in ("reference", "triton"):
        monkeypatch.setenv("RMMSS_KERNELS", path)
        loss = loss_of()
        grads = torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad], allow_unused=True)
        results.append((loss.detach(), [g for g in grads if g is not None]))
    (loss, grads), (other, others) = results
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-6)
    assert len(grads) == len(others) > 10
    for a, b in zip(others, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max().clamp(min=1e-3)) + 1e-7)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    images, labels = torch.randn(2, 3, 3, 32, 32), torch.randint(0, K, (2, 4, 4))
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels[0, :8] = 255
    present = draw_present(2, 3, torch.Generator().manual_seed(3))
    models = [build_model("segformer_tiny", K, MODALITIES).to(DEVICE).eval() for _ in range(2)]
    return images.to(DEVICE), labels.to(DEVICE), present, *models


def test_a_step_of_stage_1_agrees(monkeypatch, batch):
    images, labels, present, teacher, student = batch
    masks = present.to(DEVICE), hpdm.draw_match(2, 3, "random", torch.Generator().manual_seed(1)).to(DEVICE)

    def loss():
        with torch.no_grad():
            target = teacher(images)
        out = student(images, present)
        distance = hpdm.hpdm_loss(out.per_modality, target.per_modality, labels, *masks, K)
        return distance + hpdm.ohem_cross_entropy(out.logits, labels) + hpdm.distill_logits(out.logits, target.logits)

    assert_both_paths_agree(monkeypatch, loss, student)


@pytest.mark.parametrize("rule", ["score", "candidate"])
def test_a_step_of_stage_2_agrees(rule, monkeypatch, batch):
    images, labels, present, *sources = batch
    torch.manual_seed(1)
    selection = fsm.FSM(sources[0].widths, K, 3, rule=rule).to(DEVICE)

    def loss():
        with torch.no_grad():
            outputs = [source(images, present) for source in sources]
        selected = selection(outputs, present.to(DEVICE))
        decoded = fsm.decode(selected, *sources, present)
        return hpdm.ohem_cross_entropy(selected.logits, labels) + hpdm.ohem_cross_entropy(decoded, labels)

    assert_both_paths_agree(monkeypatch, loss, selection)
