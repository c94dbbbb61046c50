"""The backbones against the authors' outputs (tests/golden), and the masking against a model that never saw more."""

import math

import pytest
import torch
import torch.nn.functional as F
from models import MODALITIES, agree, golden_images, poisoned, published, random_present, randomised

from model import build_model
from segformer import Block, Decoder, gather, present_rows, scatter
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
    out = model(golden_images(torch.Generator().manual_seed(7)))
    agree(out.logits[:, :, ::8, ::8], golden["logits"])
    for i in range(4):
        agree(out.fused[i][:, ::16, ::2, ::2], golden[f"fused{i + 1}"])
    model.published_layout = False
    other = model(golden_images(torch.Generator().manual_seed(7)))
    assert (other.logits[:, :, ::8, ::8] - torch.from_numpy(golden["logits"])).abs().max() > 1e-2


def test_parameter_counts_match_the_published_model():
    count = sum(p.numel() for p in build_model("cmnext_b2", 25, MODALITIES).parameters())
    assert count / 1e6 == pytest.approx(58.73, abs=0.01)


@torch.no_grad()
def test_masked_msegformer_equals_one_that_was_given_only_the_present_modalities():
    model = randomised(build_model("segformer_tiny", 7, MODALITIES))
    images, present = torch.randn(5, 4, 3, 45, 70).double(), random_present(5, 4, seed=1)
    out = model(poisoned(images, present), present)
    for b in range(5):
        seen = [m for m in range(4) if present[b, m]]
        alone = randomised(build_model("segformer_tiny", 7, [MODALITIES[m] for m in seen]))
        alone.load_state_dict(model.state_dict())
        expected = alone(images[b : b + 1, seen])
        torch.testing.assert_close(out.logits[b : b + 1], expected.logits, rtol=1e-9, atol=1e-9)
        for i in range(4):
            torch.testing.assert_close(out.per_modality[i][b, seen], expected.per_modality[i][0], rtol=1e-9, atol=1e-9)
            assert not out.per_modality[i][b, ~present[b]].any()


@torch.no_grad()
def test_masked_cmnext_equals_one_that_was_built_without_the_absent_modality():
    model = randomised(build_model("cmnext_tiny", 7, MODALITIES))
    images = torch.randn(2, 4, 3, 64, 64).double()
    for absent in (1, 2, 3):
        seen = [m for m in range(4) if m != absent]
        present = torch.tensor([[m != absent for m in range(4)]] * 2)
        smaller = build_model("cmnext_tiny", 7, [MODALITIES[m] for m in seen]).eval().double()
        state, aux = {}, [m - 1 for m in seen[1:]]
        for name in smaller.state_dict():
            source = name
            if ".hub." in name:  # hub score nets are numbered by modality
                head, index, tail = name.rsplit(".", 2)
                source = f"{head}.{aux[int(index)]}.{tail}"
            value = model.state_dict()[source]
            state[name] = value[aux] if name.endswith(("embed.weight", "embed.bias")) and "aux" in name else value
        smaller.load_state_dict(state)
        out, expected = model(poisoned(images, present), present), smaller(images[:, seen])
        torch.testing.assert_close(out.logits, expected.logits, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["segformer_tiny", "cmnext_tiny"])
def test_each_sample_of_a_mixed_batch_equals_the_sample_alone(backbone):
    model = randomised(build_model(backbone, 7, MODALITIES))
    images, present = torch.randn(6, 4, 3, 64, 64).double(), random_present(6, 4, seed=2)
    present[0] = torch.tensor([False, False, False, True])
    present[1] = torch.tensor([True, False, False, False])
    out = model(poisoned(images, present), present)
    assert torch.isfinite(out.logits).all()
    for b in range(6):
        alone = model(images[b : b + 1], present[b : b + 1])
        torch.testing.assert_close(out.logits[b : b + 1], alone.logits, rtol=1e-9, atol=1e-9)


def test_an_absent_modality_gets_no_gradient_and_spoils_none():
    model = build_model("cmnext_tiny", 5, MODALITIES)
    images = torch.randn(3, 4, 3, 64, 64).requires_grad_()
    present = random_present(3, 4, seed=4)
    model(images, present).logits.square().mean().backward()
    reached = images.grad.flatten(2).abs().sum(2) > 0  # (B, M)
    assert torch.equal(reached, present)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@torch.no_grad()
def test_the_fused_features_are_the_mean_of_the_present_modalities():
    model, present = randomised(build_model("segformer_tiny", 7, MODALITIES)), random_present(6, 4, seed=5)
    out = model(poisoned(torch.randn(6, 4, 3, 64, 64).double(), present), present)
    weights = present.double() / present.sum(1, keepdim=True)
    for fused, each in zip(out.fused, out.per_modality, strict=True):
        torch.testing.assert_close(fused, torch.einsum("bm,bmchw->bchw", weights, each), rtol=1e-6, atol=1e-6)


def test_the_decoder_equals_its_published_order():
    torch.manual_seed(0)
    decoder = Decoder((8, 12, 20, 28), 24, 5).eval().double()
    features = [torch.randn(2, c, 32 // s, 40 // s).double() for c, s in ((8, 1), (12, 2), (20, 4), (28, 8))]
    upsampled = []
    for x, linear in zip(features, decoder.linear, strict=True):
        x = linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        upsampled.append(F.interpolate(x, size=(32, 40), mode="bilinear", align_corners=False))
    hidden = F.relu(decoder.bn(decoder.fuse(torch.cat(upsampled[::-1], 1))))
    published_order = F.interpolate(decoder.classify(hidden), size=(128, 160), mode="bilinear", align_corners=False)
    ours = decoder(tuple(features), (128, 160))
    torch.testing.assert_close(ours, published_order, rtol=1e-9, atol=1e-9)


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
    for ours, direct in zip(*(torch.autograd.grad(o.square().sum(), wanted) for o in (out, plain)), strict=True):
        assert torch.equal(ours, direct)


def test_bad_input_is_named():
    model = build_model("segformer_tiny", 7, MODALITIES)
    with pytest.raises(ValueError, match=r"\(B, 4, 3, H, W\) for rgb, depth, event, lidar"):
        model(torch.randn(2, 3, 3, 64, 64))
    with pytest.raises(ValueError, match="at least 32"):
        model(torch.randn(2, 4, 3, 16, 64))
    with pytest.raises(ValueError, match="without any modality"):
        model(torch.randn(2, 4, 3, 64, 64), torch.tensor([[True] * 4, [False] * 4]))
    with pytest.raises(ValueError, match="unknown backbone 'resnet50'.*segformer_b0"):
        build_model("resnet50", 7, MODALITIES)
    with pytest.raises(ValueError, match="at least one more modality"):
        build_model("cmnext_b0", 7, ["rgb"])


def test_gather_takes_the_present_pairs_in_order_and_scatter_puts_them_back():
    present, x = random_present(4, 3, seed=9), torch.rand(12, 2)
    rows = present_rows(present, torch.device("cpu"))
    assert rows.tolist() == [b * 3 + m for b in range(4) for m in range(3) if present[b, m]]
    gathered = gather(x, rows)
    assert torch.equal(gathered, x[present.flatten()])
    assert torch.equal(scatter(gathered, rows, 12), x * present.flatten()[:, None])
    assert present_rows(torch.ones(2, 3, dtype=torch.bool), torch.device("cpu")) is None


@torch.no_grad()
def test_fused_and_per_modality_features_of_msegformer_lie_channels_last():
    model, images = build_model("segformer_tiny", 7, MODALITIES), torch.randn(3, 4, 3, 64, 96)
    for present in (None, random_present(3, 4, seed=11)):
        out = model(images, present)
        for fused, each in zip(out.fused, out.per_modality, strict=True):
            _, c, h, w = fused.shape
            assert fused.stride() == (h * w * c, 1, w * c, c)
            assert each.stride() == (4 * h * w * c, h * w * c, 1, w * c, c)


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["segformer_tiny", "cmnext_tiny"])
def test_two_answers_to_a_batch_are_those_of_two_calls(backbone):
    model = randomised(build_model(backbone, 5, MODALITIES))
    images, present = torch.randn(3, 4, 3, 64, 64).double(), random_present(3, 4, seed=12)
    complete, subset = TwoAnswers(model)(images, present)
    torch.testing.assert_close(complete, model(images).logits)
    torch.testing.assert_close(subset, model(images, present).logits)
    assert (complete - subset).abs().max() > 0.01


# ---- the start from chance ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["segformer_b0", "cmnext_b0"])
def test_each_part_starts_as_published(backbone):
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


@pytest.mark.parametrize("backbone", ["segformer_b0", "cmnext_b0"])
def test_the_first_cross_entropy_is_that_of_a_guess(backbone):
    torch.manual_seed(0)
    logits = build_model(backbone, 25, MODALITIES)(torch.randn(2, 4, 3, 64, 64)).logits
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


@pytest.mark.parametrize("backbone", ["segformer_tiny", "cmnext_tiny"])
@pytest.mark.parametrize(
    "present, sentence",
    [
        (torch.ones(3, 2) > 0, "must be bool"),
        (torch.ones(4, 1) > 0, "must be bool"),
        (torch.ones(2, 2), "must be bool"),
        (torch.zeros(2, 2) > 0, "without any modality"),
    ],
)
def test_what_is_present_must_be_told_for_whole_batches(backbone, present, sentence):
    model = build_model(backbone, 5, ["rgb", "depth"])
    with pytest.raises(ValueError, match=sentence):
        model(torch.zeros(2, 2, 3, 32, 32), present)
