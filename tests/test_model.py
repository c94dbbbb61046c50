"""The backbones against the authors' own outputs (tests/golden), and the masking against a model that never saw more.

The golden arrays were made with the authors' implementation; weights follow from the parameter names, inputs from a
seed, so the files hold only names, shapes and outputs.
"""

import json
import pathlib
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine.pretrained import load_pretrained
from model import build_model, condition_on_modalities, gather, present_rows, scatter
from segformer import Block, Decoder

GOLDEN = pathlib.Path(__file__).parent / "golden"
SENSORS = ["rgb", "depth", "event", "lidar"]


def golden_weights(keys: np.ndarray) -> dict[str, torch.Tensor]:
    """The weights that follow from the published names and shapes."""
    state = {}
    for name, shape in json.loads(bytes(keys)).items():
        r = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        if name.endswith("num_batches_tracked"):
            value = torch.zeros(shape, dtype=torch.int64)
        elif name.endswith("running_var"):
            value = 0.8 + 0.2 * r.abs()
        elif name.endswith("running_mean"):
            value = 0.1 * r
        elif r.ndim == 1 and name.endswith("weight"):
            value = 1 + 0.1 * r
        elif r.ndim <= 1:
            value = 0.1 * r
        else:
            value = r / r[0].numel() ** 0.5
        state[name] = value
    return state


def golden_images(generator: torch.Generator) -> torch.Tensor:
    return torch.stack([torch.randn(2, 3, 64, 96, generator=generator) for _ in range(4)], 1)  # (B, M, 3, H, W)


def published(tmp_path, file: str, backbone: str):
    golden = np.load(GOLDEN / file)
    torch.save(golden_weights(golden["keys"]), tmp_path / "published.pth")
    model = build_model(backbone, 25, SENSORS).eval()
    report = load_pretrained(model, str(tmp_path / "published.pth"))
    return golden, model, report


def agree(ours: torch.Tensor, golden: np.ndarray, atol: float = 1e-4) -> None:
    assert ours.shape == golden.shape
    torch.testing.assert_close(ours, torch.from_numpy(golden), rtol=0, atol=atol)


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
        present = torch.tensor([[s[0].upper() in sensors for s in SENSORS]] * 2)
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
    count = sum(p.numel() for p in build_model("cmnext_b2", 25, SENSORS).parameters())
    assert count / 1e6 == pytest.approx(58.73, abs=0.01)


def random_present(b: int, m: int, seed: int) -> torch.Tensor:
    present = torch.rand(b, m, generator=torch.Generator().manual_seed(seed)) < 0.5
    present[torch.arange(b), torch.randint(0, m, (b,))] = True
    return present


def poisoned(images: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Absent slices hold NaN: whoever reads one shows."""
    return images.masked_fill(~present[:, :, None, None, None], torch.nan)


def randomised(model):
    """Running statistics, biases and layer scales away from their trivial start values."""
    g = torch.Generator().manual_seed(3)
    for name, value in model.state_dict().items():
        if value.is_floating_point() if isinstance(value, torch.Tensor) else False:
            noise = torch.randn(value.shape, generator=g)
            value.add_(0.1 * noise.abs() if name.endswith("running_var") else 0.05 * noise)
    return model.eval().double()  # so that what is equal on paper is equal here to many digits


@torch.no_grad()
def test_masked_msegformer_equals_one_that_was_given_only_the_present_modalities():
    model = randomised(build_model("segformer_tiny", 7, SENSORS))
    images, present = torch.randn(5, 4, 3, 45, 70).double(), random_present(5, 4, seed=1)
    out = model(poisoned(images, present), present)
    for b in range(5):
        seen = [m for m in range(4) if present[b, m]]
        alone = randomised(build_model("segformer_tiny", 7, [SENSORS[m] for m in seen]))
        alone.load_state_dict(model.state_dict())
        expected = alone(images[b : b + 1, seen])
        torch.testing.assert_close(out.logits[b : b + 1], expected.logits, rtol=1e-9, atol=1e-9)
        for i in range(4):
            torch.testing.assert_close(out.per_modality[i][b, seen], expected.per_modality[i][0], rtol=1e-9, atol=1e-9)
            assert not out.per_modality[i][b, ~present[b]].any()


@torch.no_grad()
def test_masked_cmnext_equals_one_that_was_built_without_the_absent_sensor():
    model = randomised(build_model("cmnext_tiny", 7, SENSORS))
    images = torch.randn(2, 4, 3, 64, 64).double()
    for absent in (1, 2, 3):
        seen = [m for m in range(4) if m != absent]
        present = torch.tensor([[m != absent for m in range(4)]] * 2)
        smaller = build_model("cmnext_tiny", 7, [SENSORS[m] for m in seen]).eval().double()
        state, aux = {}, [m - 1 for m in seen[1:]]
        for name in smaller.state_dict():
            source = name
            if ".hub." in name:  # hub score nets are numbered by sensor
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
    model = randomised(build_model(backbone, 7, SENSORS))
    images, present = torch.randn(6, 4, 3, 64, 64).double(), random_present(6, 4, seed=2)
    present[0] = torch.tensor([False, False, False, True])
    present[1] = torch.tensor([True, False, False, False])
    out = model(poisoned(images, present), present)
    assert torch.isfinite(out.logits).all()
    for b in range(6):
        alone = model(images[b : b + 1], present[b : b + 1])
        torch.testing.assert_close(out.logits[b : b + 1], alone.logits, rtol=1e-9, atol=1e-9)


def test_an_absent_modality_gets_no_gradient_and_spoils_none():
    model = build_model("cmnext_tiny", 5, SENSORS)
    images = torch.randn(3, 4, 3, 64, 64).requires_grad_()
    present = random_present(3, 4, seed=4)
    model(images, present).logits.square().mean().backward()
    reached = images.grad.flatten(2).abs().sum(2) > 0  # (B, M)
    assert torch.equal(reached, present)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["segformer_tiny", "cmnext_tiny"])
def test_a_conditioned_model_starts_as_it_was_and_learns_by_its_sensors(backbone):
    model = randomised(build_model(backbone, 7, SENSORS))
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
    model, present = build_model("segformer_tiny", 7, SENSORS), random_present(5, 4, seed=6)
    condition_on_modalities(model)
    with torch.no_grad():
        model.decoder.film.fill_(0.001)  # bfloat16 knows nothing between 1 and 1.0078
        model.fusion_logits.copy_(torch.randn(6, 4))
    expected = model.decoder.scale_and_shift(present), model.fusion_weights(present)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, direct in zip((model.decoder.scale_and_shift(present), model.fusion_weights(present)), expected,
                                strict=True):  # fmt: skip
            assert torch.equal(ours, direct)
        out = model(torch.randn(5, 4, 3, 64, 64), present)
        assert out.logits.dtype == out.fused[0].dtype == torch.bfloat16
        out.logits.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (model.decoder.film, model.fusion_logits))


@torch.no_grad()
def test_fusion_weights_make_a_weighted_mean_of_the_present_sensors():
    model, present = randomised(build_model("segformer_tiny", 7, SENSORS)), random_present(6, 4, seed=5)
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


def test_mit_weights_start_both_backbones(tmp_path):
    b0 = {k.removeprefix("encoder."): v
          for k, v in golden_weights(np.load(GOLDEN / "segformer_b0_rdel.npz")["keys"]).items()
          if k.startswith("encoder.")}  # fmt: skip
    b0["head.weight"], b0["head.bias"] = torch.randn(1000, 256), torch.randn(1000)
    torch.save(b0, tmp_path / "mit_b0.pth")
    for backbone in ("segformer_b0", "cmnext_b0"):
        model = build_model(backbone, 25, SENSORS)
        report = load_pretrained(model, str(tmp_path / "mit_b0.pth"))
        assert report.source == "MiT encoder" and sorted(report.unexpected) == ["head.bias", "head.weight"]
        assert not any(name.startswith("stages.") for name in report.missing)
        torch.testing.assert_close(model.stages[2].blocks[1].attn.kv.weight, b0["block3.1.attn.kv.weight"])
    for m in range(3):  # `model` is the CMNeXt now
        torch.testing.assert_close(model.aux[1].embed.weight[m], b0["patch_embed2.norm.weight"])
    torch.testing.assert_close(model.aux[1].embed.proj.weight, b0["patch_embed2.proj.weight"])


def test_loading_says_what_does_not_fit(tmp_path):
    path = str(tmp_path / "x.pth")
    model = build_model("segformer_tiny", 7, SENSORS)
    torch.save({"something.weight": torch.randn(3)}, path)
    with pytest.raises(ValueError, match="none of its 1 entries fits"):
        load_pretrained(model, path)
    torch.save(build_model("segformer_tiny", 9, SENSORS).state_dict(), path)
    with pytest.raises(ValueError, match=r"\(9, 128, 1, 1\).*\(7, 128, 1, 1\)"):
        load_pretrained(model, path)
    (tmp_path / "x.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_pretrained(model, path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_pretrained(model, str(tmp_path / "nothing.pth"))


def test_a_conditioned_checkpoint_is_no_start_for_a_plain_model(tmp_path):
    student, path = build_model("segformer_tiny", 7, SENSORS), str(tmp_path / "student.pt")
    condition_on_modalities(student)
    torch.save({"model": student.state_dict()}, path)
    with pytest.raises(ValueError, match="student.pt .* conditioned on its sensors.*--teacher"):
        load_pretrained(build_model("segformer_tiny", 7, SENSORS), path)
    other = build_model("segformer_tiny", 7, SENSORS)
    condition_on_modalities(other)
    assert load_pretrained(other, path).unexpected == []


@pytest.mark.parametrize("backbone", ["segformer_tiny", "cmnext_tiny"])
def test_weights_of_sensors_in_another_order_are_refused(tmp_path, backbone):
    model, turned = (build_model(backbone, 7, sensors) for sensors in (SENSORS, [SENSORS[0], *SENSORS[:0:-1]]))
    for each in (model, turned):
        condition_on_modalities(each)
    torch.save({"model": model.state_dict(), "meta": {"modalities": SENSORS}}, path := str(tmp_path / "a.pt"))
    with pytest.raises(ValueError, match="a.pt has weights of their own for each of rgb, depth"):
        load_pretrained(turned, path)
    assert load_pretrained(model, path).missing == []


def test_own_checkpoints_come_back_whole(tmp_path):
    path = str(tmp_path / "own.pt")
    first, second = (build_model("cmnext_tiny", 7, SENSORS) for _ in range(2))
    first.published_layout = True
    torch.save({"model": first.state_dict()}, path)
    report = load_pretrained(second, path)
    assert report.source == "this project" and report.missing == [] and report.unexpected == []
    assert second.published_layout
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_bad_input_is_named():
    model = build_model("segformer_tiny", 7, SENSORS)
    with pytest.raises(ValueError, match=r"\(B, 4, 3, H, W\) for rgb, depth, event, lidar"):
        model(torch.randn(2, 3, 3, 64, 64))
    with pytest.raises(ValueError, match="at least 32"):
        model(torch.randn(2, 4, 3, 16, 64))
    with pytest.raises(ValueError, match="without any modality"):
        model(torch.randn(2, 4, 3, 64, 64), torch.tensor([[True] * 4, [False] * 4]))
    with pytest.raises(ValueError, match="unknown backbone 'resnet50'.*segformer_b0"):
        build_model("resnet50", 7, SENSORS)
    with pytest.raises(ValueError, match="at least one more modality"):
        build_model("cmnext_b0", 7, ["rgb"])


def test_gather_takes_the_present_pairs_in_order_and_scatter_puts_them_back():
    present, x = random_present(4, 3, seed=9), torch.rand(12, 2)
    rows = present_rows(present, torch.device("cpu"))
    assert rows.tolist() == [b * 3 + m for b in range(4) for m in range(3) if present[b, m]]
    packed = gather(x, rows)
    assert torch.equal(packed, x[present.flatten()])
    assert torch.equal(scatter(packed, rows, 12), x * present.flatten()[:, None])
    assert present_rows(torch.ones(2, 3, dtype=torch.bool), torch.device("cpu")) is None


@torch.no_grad()
@pytest.mark.parametrize("conditioned", [False, True])
def test_fused_and_per_modality_features_of_msegformer_lie_channels_last(conditioned):
    model, images = build_model("segformer_tiny", 7, SENSORS), torch.randn(3, 4, 3, 64, 96)
    if conditioned:
        condition_on_modalities(model)
    for present in (None, random_present(3, 4, seed=11)):
        out = model(images, present)
        for fused, each in zip(out.fused, out.per_modality, strict=True):
            _, c, h, w = fused.shape
            assert fused.stride() == (h * w * c, 1, w * c, c)
            assert each.stride() == (4 * h * w * c, h * w * c, 1, w * c, c)
