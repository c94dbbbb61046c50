"""The backbones against the authors' own outputs (tests/golden), and the masking against a model that never saw more.

The golden arrays were made with the authors' implementation; weights follow from the parameter names, inputs from a
seed, so the files hold only names, shapes and outputs.
"""

import json
import pathlib
import re
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
def test_masked_cmnext_equals_one_that_was_built_without_the_absent_modality():
    model = randomised(build_model("cmnext_tiny", 7, SENSORS))
    images = torch.randn(2, 4, 3, 64, 64).double()
    for absent in (1, 2, 3):
        seen = [m for m in range(4) if m != absent]
        present = torch.tensor([[m != absent for m in range(4)]] * 2)
        smaller = build_model("cmnext_tiny", 7, [SENSORS[m] for m in seen]).eval().double()
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
def test_a_conditioned_model_starts_as_it_was_and_learns_by_its_modalities(backbone):
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
def test_fusion_weights_make_a_weighted_mean_of_the_present_modalities():
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


def mit_b0():
    """MiT-B0 under its published names, with the head that is not used."""
    weights = golden_weights(np.load(GOLDEN / "segformer_b0_rdel.npz")["keys"])
    b0 = {k.removeprefix("encoder."): v for k, v in weights.items() if k.startswith("encoder.")}
    return {**b0, "head.weight": torch.randn(1000, 256), "head.bias": torch.randn(1000)}


def test_mit_weights_start_both_backbones(tmp_path):
    b0 = mit_b0()
    torch.save(b0, tmp_path / "mit_b0.pth")
    for backbone in ("segformer_b0", "cmnext_b0"):
        model = build_model(backbone, 25, SENSORS)
        report = load_pretrained(model, str(tmp_path / "mit_b0.pth"))
        assert report.source == "MiT encoder, its head left out"
        assert sorted(report.unexpected) == ["head.bias", "head.weight"]
        assert not any(name.startswith("stages.") for name in report.missing)
        assert all(name.startswith(("decoder.", "aux.")) for name in report.missing)
        torch.testing.assert_close(model.stages[2].blocks[1].attn.kv.weight, b0["block3.1.attn.kv.weight"])
    for m in range(3):  # `model` is the CMNeXt now
        torch.testing.assert_close(model.aux[1].embed.weight[m], b0["patch_embed2.norm.weight"])
    torch.testing.assert_close(model.aux[1].embed.proj.weight, b0["patch_embed2.proj.weight"])


# ---- the model hub's files -----------------------------------------------------------------------------------------


def as_version_5(name: str) -> str:
    """A name of the hub's files as newer versions of the library save it."""
    changes = {
        r"encoder\.block\.(\d)\.": r"stages.\1.blocks.",
        r"encoder\.patch_embeddings\.(\d)\.": r"stages.\1.patch_embeddings.",
        r"encoder\.layer_norm\.(\d)\.": r"stages.\1.layer_norm.",
        "layer_norm_1": "layernorm_before",
        "layer_norm_2": "layernorm_after",
        "attention.self.query": "attention.q_proj",
        "attention.self.key": "attention.k_proj",
        "attention.self.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "attention.self.sr": "attention.sequence_reduction.sequence_reduction",
        "attention.self.layer_norm": "attention.sequence_reduction.layer_norm",
        "mlp.dense": "mlp.fc",
    }
    for old, new in changes.items():
        name = re.sub(old, new, name)
    return name


def safetensors_bytes(state: dict, dtype: str = "F32") -> bytes:
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, value in state.items():
        value = value.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype])
        raw = bytes(value.contiguous().flatten().view(torch.uint8).tolist())
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def hub_b0() -> dict:
    return golden_weights(np.load(GOLDEN / "hf_mit_b0.npz")["keys"])


def stage_outputs(model, images: torch.Tensor) -> list[torch.Tensor]:
    outputs = []
    for stage in model.stages:
        images = stage(images).permute(0, 3, 1, 2)
        outputs.append(images)
    return outputs


@torch.no_grad()
@pytest.mark.parametrize("naming", ["old", "new", "old without prefix", "new without prefix"])
@pytest.mark.parametrize("suffix", [".bin", ".pth", ".safetensors"])
@pytest.mark.parametrize("backbone", ["segformer_b0", "cmnext_b0"])
def test_the_model_hubs_mit_reproduces_its_outputs(tmp_path, backbone, suffix, naming):
    golden, state, path = np.load(GOLDEN / "hf_mit_b0.npz"), hub_b0(), tmp_path / f"weights{suffix}"
    if "new" in naming:
        state = {as_version_5(name): value for name, value in state.items()}
        assert "segformer.stages.0.blocks.0.attention.q_proj.weight" in state
    if "without" in naming:
        state = {k.removeprefix("segformer."): v for k, v in state.items() if not k.startswith("classifier.")}
    if suffix == ".safetensors":
        path.write_bytes(safetensors_bytes(state))
    else:
        torch.save(state, path)
    model = build_model(backbone, 25, SENSORS).eval()
    report = load_pretrained(model, str(path))
    head = [] if "without" in naming else ["classifier.bias", "classifier.weight"]
    assert report.unexpected == head and report.source.endswith("its head left out" if head else "encoder")
    assert all(name.startswith(("decoder.", "aux.")) for name in report.missing)
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(7))
    for i, out in enumerate(stage_outputs(model, images), 1):
        agree(out[:, ::8, ::2, ::2], golden[f"stage{i}"])


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_safetensors_are_read_as_what_they_round_to(tmp_path, dtype):
    state = {as_version_5(name): value for name, value in hub_b0().items()}
    (tmp_path / "half.safetensors").write_bytes(safetensors_bytes(state, dtype))
    model = build_model("segformer_b0", 25, SENSORS)
    load_pretrained(model, str(tmp_path / "half.safetensors"))
    rounded = {k: v.to(torch.float16 if dtype == "F16" else torch.bfloat16).float() for k, v in state.items()}
    block = "segformer.stages.1.blocks.0.attention."
    kv = torch.cat([rounded[f"{block}{part}_proj.weight"] for part in "kv"])
    assert torch.equal(model.stages[1].blocks[0].attn.kv.weight, kv)
    assert torch.equal(model.stages[1].blocks[0].attn.q.bias, rounded[f"{block}q_proj.bias"])


def test_the_head_of_a_fine_tuned_segformer_is_left_out_with_a_word(tmp_path):
    state = {k: v for k, v in hub_b0().items() if not k.startswith("classifier.")}
    head = {"decode_head.batch_norm.weight": torch.ones(9), "decode_head.linear_c.0.proj.weight": torch.randn(9, 32)}
    torch.save(state | head, tmp_path / "segformer.bin")
    report = load_pretrained(build_model("segformer_b0", 25, SENSORS), str(tmp_path / "segformer.bin"))
    assert report.source.endswith("its head left out") and report.unexpected == list(head)
    published = {f"backbone.{k}": v for k, v in mit_b0().items() if not k.startswith("head.")}
    torch.save({"state_dict": published | {"decode_head.linear_c1.proj.weight": torch.randn(256, 32)}},
               tmp_path / "segformer.pth")  # fmt: skip
    report = load_pretrained(build_model("segformer_b0", 25, SENSORS), str(tmp_path / "segformer.pth"))
    assert report.source == "MiT encoder, its head left out"


def test_a_damaged_safetensors_file_is_refused_by_name(tmp_path):
    good, path = safetensors_bytes(hub_b0()), tmp_path / "x.safetensors"
    model = build_model("segformer_b0", 25, SENSORS)
    length = int.from_bytes(good[:8], "little")
    moved = good[8 : 8 + length].replace(b"[0, 18816]", b"[-4,18812]")
    longer = good[8 : 8 + length].replace(b"[32, 3, 7, 7]", b"[32, 3, 7, 8]")
    assert moved != longer != good[8 : 8 + length]
    for bad in (good[:-4], good[: length // 2], good[:8] + moved + good[8 + length :],
                good[:8] + longer + good[8 + length :], good[:8] + good[8:].replace(b'"F32"', b'"F99"')):  # fmt: skip
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"x.safetensors is not a readable checkpoint"):
            load_pretrained(model, str(path))


# ---- no half-loaded model ------------------------------------------------------------------------------------------


def test_a_file_that_fills_its_part_only_partly_is_refused_and_changes_nothing(tmp_path):
    path = str(tmp_path / "x.pth")
    hub, mit = hub_b0(), mit_b0()
    more = {f"block1.2.{k.removeprefix('block1.1.')}": v for k, v in mit.items() if k.startswith("block1.1.")}
    own = build_model("segformer_b0", 25, SENSORS).state_dict()
    m_segformer = golden_weights(np.load(GOLDEN / "segformer_b0_rdel.npz")["keys"])
    without = lambda state, name: {k: v for k, v in state.items() if k != name}  # noqa: E731
    value = "segformer.encoder.block.2.1.attention.self.value.bias"
    cases = [
        (without(mit, "block2.0.norm1.bias"), r"MiT encoder. 175 of 176 .*encoder fit.*stages.1.blocks.0.norm1.bias"),
        (mit | more, r"MiT encoder. 176 of 176 .* but it has stages.0.blocks.2.* Is it of another"),
        (without(hub, value), r"stages.2.blocks.1.attn.kv.bias.*shape \(160,\).*\(320,\)"),
        (without(own, "decoder.bn.bias"), r"this project. .* of the model fit.*decoder.bn.bias"),
        (without(m_segformer, "decoder.linear_fuse.bn.bias"), r"published M-SegFormer. .*model fit.*decoder.bn.bias"),
        ({"something.weight": torch.randn(3)}, r"this project. 0 of \d+ tensors .*stages.0.embed.proj.weight"),
        (build_model("segformer_b0", 9, SENSORS).state_dict(), r"decoder.classify.bias.*\(9,\).*\(25,\)"),
    ]
    model = build_model("segformer_b0", 25, SENSORS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for state, message in cases:
        torch.save(state, path)
        with pytest.raises(ValueError, match=r"x.pth.*" + message):
            load_pretrained(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_unreadable_file_is_named(tmp_path):
    model = build_model("segformer_tiny", 7, SENSORS)
    (tmp_path / "x.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="x.pth is not a readable checkpoint"):
        load_pretrained(model, str(tmp_path / "x.pth"))
    torch.save([torch.ones(3)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="list.pth holds a list"):
        load_pretrained(model, str(tmp_path / "list.pth"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_pretrained(model, str(tmp_path / "nothing.pth"))


def test_a_conditioned_checkpoint_is_no_start_for_a_plain_model(tmp_path):
    student, path = build_model("segformer_tiny", 7, SENSORS), str(tmp_path / "student.pt")
    condition_on_modalities(student)
    torch.save({"model": student.state_dict()}, path)
    with pytest.raises(ValueError, match="student.pt .*has .*decoder.film, too"):
        load_pretrained(build_model("segformer_tiny", 7, SENSORS), path)
    other = build_model("segformer_tiny", 7, SENSORS)
    condition_on_modalities(other)
    assert load_pretrained(other, path).unexpected == []


@pytest.mark.parametrize("backbone", ["segformer_tiny", "cmnext_tiny"])
def test_weights_of_modalities_in_another_order_are_refused(tmp_path, backbone):
    model, turned = (build_model(backbone, 7, sensors) for sensors in (SENSORS, [SENSORS[0], *SENSORS[:0:-1]]))
    for each in (model, turned):
        condition_on_modalities(each)
    torch.save({"model": model.state_dict(), "meta": {"modalities": SENSORS}}, path := str(tmp_path / "a.pt"))
    with pytest.raises(ValueError, match="a.pt was trained with modalities rgb, depth, .* but here it is rgb, "):
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
    gathered = gather(x, rows)
    assert torch.equal(gathered, x[present.flatten()])
    assert torch.equal(scatter(gathered, rows, 12), x * present.flatten()[:, None])
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
@pytest.mark.parametrize("present, sentence", [
    (torch.ones(3, 2) > 0, "must be bool"), (torch.ones(4, 1) > 0, "must be bool"), (torch.ones(4, 2), "must be bool"),
    (torch.zeros(4, 2) > 0, "without any modality"),
])  # fmt: skip
def test_what_is_present_must_be_told_for_whole_batches(backbone, present, sentence):
    model = build_model(backbone, 5, ["rgb", "depth"])
    with pytest.raises(ValueError, match=sentence):
        model(torch.zeros(2, 2, 3, 32, 32), present)
