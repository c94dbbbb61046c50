"""The backbones against the authors' outputs (tests/golden), and the masking against a model that never saw more."""

import math

import pytest
import torch
import torch.nn.functional as F
from models import MODALITIES, agree, golden_images, poisoned, published, random_present, with_random_weights

from model import build_model
from segformer import Block
from train_single import TwoAnswers


@torch.no_grad()
def test_msegformer_reproduces_the_published_outputs(tmp_path):
    golden, model, report = published(tmp_path, "segformer_b0_rdel.npz", "segformer_b0")
    assert report.missing == [] and report.unexpected == ["classifier.weight"]
    images = golden_images(torch.Generator().manual_seed(7))
    out = model(images)
    agree(out.logits[:, :, ::8, ::8], golden["logits"])
    for i in range(4):
        agree(out.per_modality[i][:, :, ::8, ::2, ::2], golden[f"per_modality{i + 1}"])
    for sensors, name in (("RE", "logits_RE"), ("L", "logits_L")):
        present = torch.tensor([[s[0].upper() in sensors for s in MODALITIES]] * 2)
        agree(model(images, present).logits[:, :, ::8, ::8], golden[name])


@torch.no_grad()
def test_cmnext_reproduces_the_published_outputs(tmp_path):
    golden, model, report = published(tmp_path, "cmnext_b2_rdel.npz", "cmnext_b2")
    assert report.missing == [] and report.unexpected == []
    assert model.published_layout  # their weights were trained with the scrambled residual
    images = golden_images(torch.Generator().manual_seed(7))
    out = model(images)
    agree(out.logits[:, :, ::8, ::8], golden["logits"])
    for i in range(4):
        agree(out.fused[i][:, ::16, ::2, ::2], golden[f"fused{i + 1}"])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(58.73, abs=0.01)  # as published
    model.published_layout = False
    assert (model(images).logits - out.logits).abs().max() > 1e-2


@torch.no_grad()
def test_masked_msegformer_equals_one_that_was_given_only_the_present_modalities():
    model = with_random_weights(build_model("segformer_tiny", 7, MODALITIES)).double()
    images, present = torch.randn(5, 4, 3, 45, 70).double(), random_present(5, 4, seed=1)
    out = model(poisoned(images, present), present)
    for b in range(5):
        seen = [m for m in range(4) if present[b, m]]
        alone = with_random_weights(build_model("segformer_tiny", 7, [MODALITIES[m] for m in seen])).double()
        alone.load_state_dict(model.state_dict())
        expected = alone(images[b : b + 1, seen])
        torch.testing.assert_close(out.logits[b], expected.logits[0], rtol=1e-9, atol=1e-9)
        for fused, each, sure in zip(out.fused, out.per_modality, expected.per_modality, strict=True):
            torch.testing.assert_close(each[b, seen], sure[0], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(fused[b], sure[0].mean(0), rtol=1e-6, atol=1e-6)
            assert not each[b, ~present[b]].any()


@torch.no_grad()
@pytest.mark.parametrize("absent", [1, 2, 3])
def test_masked_cmnext_equals_one_that_was_built_without_the_absent_modality(absent):
    model = with_random_weights(build_model("cmnext_tiny", 7, MODALITIES)).double()
    images, seen = torch.randn(2, 4, 3, 64, 64).double(), [m for m in range(4) if m != absent]
    present = torch.tensor([[m != absent for m in range(4)]] * 2)
    smaller = build_model("cmnext_tiny", 7, [MODALITIES[m] for m in seen]).eval().double()
    state, aux = model.state_dict(), [m - 1 for m in seen[1:]]
    for name in smaller.state_dict():
        if ".hub." in name:  # hub score nets are numbered by modality
            head, index, tail = name.rsplit(".", 2)
            state[name] = model.state_dict()[f"{head}.{aux[int(index)]}.{tail}"]
        elif "aux" in name and name.endswith(("embed.weight", "embed.bias")):
            state[name] = state[name][aux]
    smaller.load_state_dict({name: state[name] for name in smaller.state_dict()})
    out, expected = model(poisoned(images, present), present), smaller(images[:, seen])
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["segformer_tiny", "cmnext_tiny"])
def test_each_sample_of_a_mixed_batch_equals_the_sample_alone(backbone):
    model = with_random_weights(build_model(backbone, 7, MODALITIES)).double()
    images, present = torch.randn(6, 4, 3, 64, 64).double(), random_present(6, 4, seed=2)
    present[:2] = torch.tensor([[False, False, False, True], [True, False, False, False]])
    out = model(poisoned(images, present), present)
    for b in range(6):
        alone = model(images[b : b + 1], present[b : b + 1])
        torch.testing.assert_close(out.logits[b : b + 1], alone.logits, rtol=1e-9, atol=1e-9)


def test_an_absent_modality_gets_no_gradient_and_spoils_none():
    model = build_model("cmnext_tiny", 5, MODALITIES)
    images, present = torch.randn(3, 4, 3, 64, 64).requires_grad_(), random_present(3, 4, seed=4)
    model(images, present).logits.square().mean().backward()
    assert torch.equal(images.grad.flatten(2).abs().sum(2) > 0, present)  # (B, M)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_the_feed_forward_is_computed_twice_and_not_kept():
    torch.manual_seed(0)
    block = Block(16, 2, 2, drop_path=0.0, eps=1e-6)
    x, kept = torch.randn(3, 8, 12, 16, requires_grad=True), []
    wanted = [x, *block.parameters()]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape[-1]) or t, lambda t: t):
        out = block(x)
    assert 16 in kept and 64 not in kept
    y = x + block.attn(block.norm1(x))
    plain = y + block.mlp(block.norm2(y))
    ours, direct = (torch.autograd.grad(each.square().sum(), wanted) for each in (out, plain))
    assert all(map(torch.equal, ours, direct))


@pytest.mark.parametrize("backbone", ["segformer_tiny", "cmnext_tiny"])
@pytest.mark.parametrize(
    "shape, present, sentence",
    [
        ((2, 3, 3, 64, 64), None, r"\(B, 4, 3, H, W\) for rgb, depth, event, lidar"),
        ((2, 4, 3, 16, 64), None, "at least 32"),
        ((2, 4, 3, 64, 64), torch.ones(3, 4).bool(), "must be bool"),
        ((2, 4, 3, 64, 64), torch.ones(4, 2).bool(), "must be bool"),
        ((2, 4, 3, 64, 64), torch.ones(2, 4), "must be bool"),
        ((2, 4, 3, 64, 64), torch.tensor([[True] * 4, [False] * 4]), "without any modality"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(backbone, shape, present, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_model(backbone, 5, MODALITIES)(torch.zeros(shape), present)


def test_a_model_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="'resnet50'.*segformer_b0"):
        build_model("resnet50", 7, MODALITIES)
    for modalities, sentence in (["rgb"], "at least one more modality"), (["depth", "rgb"], "rgb.*depth,rgb"):
        with pytest.raises(ValueError, match=sentence):
            build_model("cmnext_tiny", 7, modalities)


@torch.no_grad()
def test_fused_and_per_modality_features_of_msegformer_lie_channels_last():
    model, images = build_model("segformer_tiny", 7, MODALITIES), torch.randn(3, 4, 3, 64, 96)
    for present in (None, random_present(3, 4, seed=11)):
        out = model(images, present)
        for fused, each in zip(out.fused, out.per_modality, strict=True):
            assert fused.movedim(1, -1).is_contiguous() and each.movedim(2, -1).is_contiguous()


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["segformer_tiny", "cmnext_tiny"])
def test_two_answers_to_a_batch_are_those_of_two_calls(backbone):
    model = with_random_weights(build_model(backbone, 5, MODALITIES)).double()
    images, present = torch.randn(3, 4, 3, 64, 64).double(), random_present(3, 4, seed=12)
    complete, subset = TwoAnswers(model)(images, present)
    torch.testing.assert_close(complete, model(images).logits)
    torch.testing.assert_close(subset, model(images, present).logits)
    assert (complete - subset).abs().max() > 0.01


# ---- the start from chance ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backbone", ["segformer_b0", "cmnext_b0"])
def test_each_part_starts_as_published_and_the_first_loss_is_that_of_a_guess(backbone):
    """Encoder by SegFormer's rule, the head by PyTorch's defaults (uniform, 1 / sqrt(3 fan_in)), fuse by fan-out."""
    torch.manual_seed(0)
    model = build_model(backbone, 25, MODALITIES)
    width = model.decoder.classify.in_channels
    expected = {"decoder.classify": (3 * width) ** -0.5, "decoder.fuse": (2 / width) ** 0.5}
    expected |= {f"decoder.linear.{i}": (3 * c) ** -0.5 for i, c in enumerate(model.widths)}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.startswith(("stages", "aux")):
            expected[name] = 0.02
        elif isinstance(layer, torch.nn.Conv2d) and name.startswith(("stages", "aux")):
            expected[name] = (2 * layer.groups / (layer.kernel_size[0] ** 2 * layer.out_channels)) ** 0.5
    for name, deviation in expected.items():
        weight = model.get_submodule(name).weight
        assert weight.std().item() == pytest.approx(deviation, rel=4 / weight.numel() ** 0.5 + 0.02), name
    logits = model(torch.randn(2, 4, 3, 64, 64)).logits
    loss = F.cross_entropy(logits, torch.randint(0, 25, (2, 64, 64)))
    assert loss.item() == pytest.approx(math.log(25), rel=0.1)  # published: 3.3
    assert 0.2 < logits.std() < 0.7  # published: 0.47


@pytest.mark.parametrize("backbone", ["segformer_tiny", "cmnext_tiny"])
@pytest.mark.parametrize("dead", [0, 1])
def test_an_all_zero_modality_has_a_small_first_gradient(backbone, dead):
    torch.manual_seed(0)
    model, images = build_model(backbone, 7, MODALITIES), torch.randn(2, 4, 3, 64, 64)
    norms = []
    for given in (images, images.index_fill(1, torch.tensor([dead]), 0)):
        model.zero_grad()
        F.cross_entropy(model(given).logits, torch.randint(0, 7, (2, 64, 64))).backward()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    assert norms[1] < 10 * norms[0]
