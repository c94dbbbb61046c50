"""engine/subsets.py: many subsets from one pass against one masked forward pass for each subset."""

import pytest
import torch
from models import MODALITIES, with_random_weights

from data import incomplete
from engine.subsets import all_subsets, present_of, subset_logits, subset_outputs
from model import build_model

BACKBONES = pytest.mark.parametrize("backbone", ["segformer_tiny", "cmnext_tiny"])


def model_and_images(backbone, sides):
    torch.manual_seed(0)
    return with_random_weights(build_model(backbone, 7, MODALITIES)).double(), torch.randn(2, 4, 3, *sides).double()


@torch.no_grad()
@pytest.mark.parametrize("sides", [(64, 96), (45, 70)])
@BACKBONES
def test_every_subset_equals_a_masked_forward_pass(backbone, sides):
    model, images = model_and_images(backbone, sides)
    subsets = all_subsets(4)
    for subset, ours in zip(subsets, subset_outputs(model, images, subsets), strict=True):
        masked = model(images, present_of(subset, (2, 4)))
        torch.testing.assert_close(ours.logits, masked.logits, rtol=1e-6, atol=1e-6)
        for a, b in zip(ours.fused, masked.fused, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@torch.no_grad()
@BACKBONES
@pytest.mark.parametrize("samples, scale", [(1, 0), (1, 1), (2, 1)])  # zeros, damage alike in all samples, of each
def test_degraded_modalities_equal_images_composed_by_hand(backbone, samples, scale):
    model, images = model_and_images(backbone, (45, 64))
    damaged = scale * torch.randn(samples, 4, 3, 45, 64).double()
    subsets = all_subsets(4)[:: -1 if backbone == "segformer_tiny" else -3]  # a CMNeXt is slower
    for subset, ours in zip(subsets, subset_logits(model, images, subsets, damaged), strict=True):
        composed = images.clone()
        for m in set(range(4)) - set(subset):
            composed[:, m] = damaged[:, m]
        torch.testing.assert_close(ours, model(composed).logits, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_the_shared_pass_in_bfloat16_is_as_close_to_float32_as_the_masked_one():
    model, images = model_and_images("segformer_tiny", (64, 64))
    model, images = model.float(), images.float()
    subsets = all_subsets(4)
    exact = [model(images, present_of(subset, (2, 4))).logits for subset in subsets]
    with torch.autocast("cpu", torch.bfloat16):
        shared = [x.float() for x in subset_logits(model, images, subsets)]
        masked = [model(images, present_of(subset, (2, 4))).logits.float() for subset in subsets]
    errors = [max(float((a - b).abs().max()) for a, b in zip(x, exact, strict=True)) for x in (shared, masked)]
    assert 0 < errors[0] <= 2 * errors[1], errors


@torch.no_grad()
def test_a_model_in_training_mode_answers_as_in_eval_mode_and_keeps_its_running_statistics():
    model, images = model_and_images("segformer_tiny", (64, 64))
    expected, before = model(images).logits, model.decoder.bn.running_mean.clone()
    found = next(subset_logits(model.train(), images, [(0, 1, 2, 3)]))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(before, model.decoder.bn.running_mean) and not model.training


@torch.no_grad()
@BACKBONES
def test_absent_modalities_of_a_model_trained_on_zero_images_are_zero_images(backbone):
    model, images = model_and_images(backbone, (64, 64))
    model.absent, subsets = "zero", [(1,), (0, 2, 3)]
    for subset, ours in zip(subsets, subset_logits(model, images, subsets), strict=True):
        filled, present = incomplete(images, present_of(subset, (2, 4)), "zero")
        assert present.all() and filled[:, list(subset)].equal(images[:, list(subset)]) and not filled.all()
        torch.testing.assert_close(ours, model(filled).logits, rtol=1e-6, atol=1e-6)
