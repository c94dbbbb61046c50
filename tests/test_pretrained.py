"""Start weights: as published, as the model hub has them, this project's own; and files that are none of these."""

import json
import re

import numpy as np
import pytest
import torch
from models import GOLDEN, MODALITIES, agree, golden_weights

from engine.pretrained import load_pretrained
from model import build_model


def mit_b0():
    """MiT-B0 under its published names, with the head that is not used."""
    weights = golden_weights(np.load(GOLDEN / "segformer_b0_rdel.npz")["keys"])
    b0 = {k.removeprefix("encoder."): v for k, v in weights.items() if k.startswith("encoder.")}
    return {**b0, "head.weight": torch.randn(1000, 256), "head.bias": torch.randn(1000)}


def test_mit_weights_start_both_backbones(tmp_path):
    b0 = mit_b0()
    torch.save(b0, tmp_path / "mit_b0.pth")
    for backbone in ("segformer_b0", "cmnext_b0"):
        model = build_model(backbone, 25, MODALITIES)
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
    model = build_model(backbone, 25, MODALITIES).eval()
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
    model = build_model("segformer_b0", 25, MODALITIES)
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
    report = load_pretrained(build_model("segformer_b0", 25, MODALITIES), str(tmp_path / "segformer.bin"))
    assert report.source.endswith("its head left out") and report.unexpected == list(head)
    published = {f"backbone.{k}": v for k, v in mit_b0().items() if not k.startswith("head.")}
    torch.save(
        {"state_dict": published | {"decode_head.linear_c1.proj.weight": torch.randn(256, 32)}},
        tmp_path / "segformer.pth",
    )
    report = load_pretrained(build_model("segformer_b0", 25, MODALITIES), str(tmp_path / "segformer.pth"))
    assert report.source == "MiT encoder, its head left out"


def test_a_damaged_safetensors_file_is_refused_by_name(tmp_path):
    good, path = safetensors_bytes(hub_b0()), tmp_path / "x.safetensors"
    model = build_model("segformer_b0", 25, MODALITIES)
    length = int.from_bytes(good[:8], "little")
    moved = good[8 : 8 + length].replace(b"[0, 18816]", b"[-4,18812]")
    longer = good[8 : 8 + length].replace(b"[32, 3, 7, 7]", b"[32, 3, 7, 8]")
    assert moved != longer != good[8 : 8 + length]
    for bad in (
        good[:-4],
        good[: length // 2],
        good[:8] + moved + good[8 + length :],
        good[:8] + longer + good[8 + length :],
        good[:8] + good[8:].replace(b'"F32"', b'"F99"'),
    ):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"x.safetensors is not a readable checkpoint"):
            load_pretrained(model, str(path))


# ---- no half-loaded model ------------------------------------------------------------------------------------------


def test_a_file_that_fills_its_part_only_partly_is_refused_and_changes_nothing(tmp_path):
    path = str(tmp_path / "x.pth")
    hub, mit = hub_b0(), mit_b0()
    more = {f"block1.2.{k.removeprefix('block1.1.')}": v for k, v in mit.items() if k.startswith("block1.1.")}
    own = build_model("segformer_b0", 25, MODALITIES).state_dict()
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
        (build_model("segformer_b0", 9, MODALITIES).state_dict(), r"decoder.classify.bias.*\(9,\).*\(25,\)"),
    ]
    model = build_model("segformer_b0", 25, MODALITIES)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for state, message in cases:
        torch.save(state, path)
        with pytest.raises(ValueError, match=r"x.pth.*" + message):
            load_pretrained(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_unreadable_file_is_named(tmp_path):
    model = build_model("segformer_tiny", 7, MODALITIES)
    (tmp_path / "x.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="x.pth is not a readable checkpoint"):
        load_pretrained(model, str(tmp_path / "x.pth"))
    torch.save([torch.ones(3)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="list.pth holds a list"):
        load_pretrained(model, str(tmp_path / "list.pth"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_pretrained(model, str(tmp_path / "nothing.pth"))


def test_weights_of_modalities_in_another_order_are_refused(tmp_path):
    model, turned = (
        build_model("cmnext_tiny", 7, sensors) for sensors in (MODALITIES, [MODALITIES[0], *MODALITIES[:0:-1]])
    )
    torch.save({"model": model.state_dict(), "meta": {"modalities": MODALITIES}}, path := str(tmp_path / "a.pt"))
    with pytest.raises(ValueError, match="a.pt was trained with modalities rgb, depth, .* but here it is rgb, "):
        load_pretrained(turned, path)
    assert load_pretrained(model, path).missing == []


def test_own_checkpoints_come_back_whole(tmp_path):
    path = str(tmp_path / "own.pt")
    first, second = (build_model("cmnext_tiny", 7, MODALITIES) for _ in range(2))
    first.published_layout = True
    torch.save({"model": first.state_dict()}, path)
    report = load_pretrained(second, path)
    assert report.source == "this project" and report.missing == [] and report.unexpected == []
    assert second.published_layout
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
