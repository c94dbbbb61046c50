"""The backbones against the authors' outputs (tests/golden), and the masking against a model that never saw more."""

import pytest
import torch
import torch.nn.functional as F
from models import MODALITIES, agree, golden_images, poisoned, published, random_present, randomised

from model import build_model, condition_on_modalities, gather, present_rows, scatter
from segformer import Block, Decoder


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
@pytest.mark.parametrize("backbone", ["segformer_tiny", "cmnext_tiny"])
def test_a_conditioned_model_starts_as_it_was_and_learns_by_its_modalities(backbone):
    model = randomised(build_model(backbone, 7, MODALITIES))
    images, present = torch.randn(3, 4, 3, 64, 64).double(), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1], [0, 1, 1, 0]])
    before = model(images, present.bool()).logits
    condition_on_modalities(model)
    torch.testing.assert_close(model(images, present.bool()).logits, before, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(images[:1]).logits, before[:1], rtol=1e-6, atol=1e-6)
    indicators = {0: [0, 1], 2: [0, 2], 4: [0], 5: [1, 2]}  # RGB is there, events are, all are, some are missing
    for indicator, moved in indicators.items():
        for part in (0, 1):  # scale, shift
            model.decoder.film.zero_()[part, indicator] = 0.3
            changed = (model(images, present.bool()).logits - before).abs().amax((1, 2, 3)) > 1e-3
            assert changed.nonzero().flatten().tolist() == moved


def test_conditioning_stays_float32_under_autocast():
    model, present = build_model("segformer_tiny", 7, MODALITIES), random_present(5, 4, seed=6)
    condition_on_modalities(model)
    with torch.no_grad():
        model.decoder.film.fill_(0.001)  # bfloat16 knows nothing between 1 and 1.0078
        model.fusion_logits.copy_(torch.randn(6, 4))
    expected = model.decoder.scale_and_shift(present), model.fusion_weights(present)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, direct in zip(
            (model.decoder.scale_and_shift(present), model.fusion_weights(present)), expected, strict=True
        ):
            assert torch.equal(ours, direct)
        out = model(torch.randn(5, 4, 3, 64, 64), present)
        assert out.logits.dtype == out.fused[0].dtype == torch.bfloat16
        out.logits.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (model.decoder.film, model.fusion_logits))


@torch.no_grad()
def test_fusion_weights_make_a_weighted_mean_of_the_present_modalities():
    model, present = randomised(build_model("segformer_tiny", 7, MODALITIES)), random_present(6, 4, seed=5)
    torch.testing.assert_close(model.fusion_weights(present), present.double() / present.sum(1, keepdim=True))
    condition_on_modalities(model)
    model.fusion_logits.copy_(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    for there, share in zip(present, model.fusion_weights(present), strict=True):
        indicators = [*there, there.all(), not there.all()]
        logits = sum(row for row, holds in zip(model.fusion_logits, indicators, strict=True) if holds)
        expected = torch.where(there, logits.exp(), 0)
        torch.testing.assert_close(share, expected / expected.sum())
    images = torch.randn(6, 4, 3, 64, 64).double()
    out, share = model(poisoned(images, present), present), model.fusion_weights(present)
    for fused, each in zip(out.fused, out.per_modality, strict=True):
        torch.testing.assert_close(fused, torch.einsum("bm,bmchw->bchw", share, each))


def test_the_decoder_equals_its_published_order():
    torch.manual_seed(0)
    decoder = Decoder((8, 12, 20, 28), 24, 5, dropout=0.0).eval().double()
    features = [torch.randn(2, c, 32 // s, 40 // s).double() for c, s in ((8, 1), (12, 2), (20, 4), (28, 8))]
    upsampled = []
    for x, linear in zip(features, decoder.linear, strict=True):
        x = linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        upsampled.append(F.interpolate(x, size=(32, 40), mode="bilinear", align_corners=False))
    hidden = F.relu(decoder.bn(decoder.fuse(torch.cat(upsampled[::-1], 1))))
    published_order = F.interpolate(decoder.classify(hidden), size=(128, 160), mode="bilinear", align_corners=False)
    ours = decoder(tuple(features), (128, 160), torch.ones(2, 4, dtype=torch.bool))
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
@pytest.mark.parametrize("conditioned", [False, True])
def test_fused_and_per_modality_features_of_msegformer_lie_channels_last(conditioned):
    model, images = build_model("segformer_tiny", 7, MODALITIES), torch.randn(3, 4, 3, 64, 96)
    if conditioned:
        condition_on_modalities(model)
    for present in (None, random_present(3, 4, seed=11)):
        out = model(images, present)
        for fused, each in zip(out.fused, out.per_modality, strict=True):
            _, c, h, w = fused.shape
            assert fused.stride() == (h * w * c, 1, w * c, c)
            assert each.stride() == (4 * h * w * c, h * w * c, 1, w * c, c)


@pytest.mark.parametrize("backbone", ["segformer_tiny", "cmnext_tiny"])
def test_several_answers_to_an_image_are_those_of_several_calls(backbone):
    torch.manual_seed(0)
    model = build_model(backbone, 5, ["rgb", "depth", "event"]).eval()
    condition_on_modalities(model)
    for p in (p for name, p in model.named_parameters() if "film" in name or "fusion" in name):
        torch.nn.init.normal_(p)
    images, present = torch.randn(3, 3, 3, 64, 64), torch.rand(2, 3, 3) < 0.6
    present[:, :, 0] |= ~present.any(2)
    both = model(images, present.flatten(0, 1))
    for v, found in enumerate(both.logits.unflatten(0, (2, 3))):
        torch.testing.assert_close(found, model(images, present[v]).logits)
    for stage, fused in enumerate(both.fused):
        torch.testing.assert_close(fused[3:], model(images, present[1]).fused[stage])


@pytest.mark.parametrize("backbone", ["segformer_tiny", "cmnext_tiny"])
@pytest.mark.parametrize(
    "present, sentence",
    [
        (torch.ones(3, 2) > 0, "must be bool"),
        (torch.ones(4, 1) > 0, "must be bool"),
        (torch.ones(4, 2), "must be bool"),
        (torch.zeros(4, 2) > 0, "without any modality"),
    ],
)
def test_what_is_present_must_be_told_for_whole_batches(backbone, present, sentence):
    model = build_model(backbone, 5, ["rgb", "depth"])
    with pytest.raises(ValueError, match=sentence):
        model(torch.zeros(2, 2, 3, 32, 32), present)
