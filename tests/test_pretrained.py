"""Start weights: as published, as the model hub has them, this project's own; and files that are none of these."""

import copy
import json
import pathlib
import re

import numpy as np
import pytest
import torch
from kill_and_resume import train
from models import GOLDEN, MODALITIES, agree, golden_weights
from small_runs import start

from engine import checkpoint
from engine.pretrained import load_pretrained
from model import build_model

WEIGHT, VARIANCE = "decoder.linear.0.weight", "decoder.bn.running_var"
VALUES = "segformer.encoder.block.2.1.attention.self.value.bias"
HUB = "hf_mit_b0.npz"
SAFETENSORS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}


def b0():
    return build_model("segformer_b0", 25, MODALITIES)


def tiny():
    return build_model("segformer_tiny", 7, ["rgb"])


def published(file: str = "segformer_b0_rdel.npz") -> dict:
    return golden_weights(np.load(GOLDEN / file)["keys"])


def mit_b0() -> dict:
    """MiT-B0 under its published names, with the head that is not used."""
    encoder = {k.removeprefix("encoder."): v for k, v in published().items() if k.startswith("encoder.")}
    return {**encoder, "head.weight": torch.randn(1000, 256), "head.bias": torch.randn(1000)}


def saved(path: pathlib.Path, state) -> str:
    torch.save(state, path)
    return str(path)


def test_mit_weights_start_both_backbones(tmp_path):
    mit = mit_b0()
    path = saved(tmp_path / "mit_b0.pth", mit)
    for backbone in ("segformer_b0", "cmnext_b0"):
        model = build_model(backbone, 25, MODALITIES)
        report = load_pretrained(model, path)
        assert report.source == "MiT encoder, its head left out"
        assert sorted(report.unexpected) == ["head.bias", "head.weight"]
        assert all(name.startswith(("decoder.", "aux.")) for name in report.missing)
        torch.testing.assert_close(model.stages[2].blocks[1].attn.kv.weight, mit["block3.1.attn.kv.weight"])
    for m in range(3):  # `model` is the CMNeXt now
        torch.testing.assert_close(model.aux[1].embed.weight[m], mit["patch_embed2.norm.weight"])
    torch.testing.assert_close(model.aux[1].embed.proj.weight, mit["patch_embed2.proj.weight"])


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


def safetensors(state: dict, change=lambda entries: None) -> bytes:
    """The bytes of such a file, written after change(the entries of its header)."""
    entries, body = {}, b""
    for name, value in state.items():
        raw = bytes(value.contiguous().flatten().view(torch.uint8).tolist())
        about = {"dtype": SAFETENSORS[value.dtype], "shape": list(value.shape)}
        entries[name] = about | {"data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    change(list(entries.values()))
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


@torch.no_grad()
@pytest.mark.parametrize("naming", ["old", "new", "old without prefix", "new without prefix"])
@pytest.mark.parametrize("suffix", [".bin", ".pth", ".safetensors"])
@pytest.mark.parametrize("backbone", ["segformer_b0", "cmnext_b0"])
def test_the_model_hubs_mit_reproduces_its_outputs(tmp_path, backbone, suffix, naming):
    golden, state, path = np.load(GOLDEN / HUB), published(HUB), tmp_path / f"weights{suffix}"
    if "new" in naming:
        state = {as_version_5(name): value for name, value in state.items()}
        assert "segformer.stages.0.blocks.0.attention.q_proj.weight" in state
    if "without" in naming:
        state = {k.removeprefix("segformer."): v for k, v in state.items() if not k.startswith("classifier.")}
    if suffix == ".safetensors":
        path.write_bytes(safetensors(state))
    else:
        torch.save(state, path)
    model = build_model(backbone, 25, MODALITIES).eval()
    report = load_pretrained(model, str(path))
    head = [] if "without" in naming else ["classifier.bias", "classifier.weight"]
    assert report.unexpected == head and report.source.endswith("its head left out" if head else "encoder")
    assert all(name.startswith(("decoder.", "aux.")) for name in report.missing)
    features = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(7))
    for number, stage in enumerate(model.stages, 1):
        features = stage(features).permute(0, 3, 1, 2)
        agree(features[:, ::8, ::2, ::2], golden[f"stage{number}"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_safetensors_are_read_as_what_they_round_to(tmp_path, dtype):
    state = {as_version_5(name): value.to(dtype) for name, value in published(HUB).items()}
    (tmp_path / "half.safetensors").write_bytes(safetensors(state))
    load_pretrained(model := b0(), str(tmp_path / "half.safetensors"))
    attention, block = model.stages[1].blocks[0].attn, "segformer.stages.1.blocks.0.attention."
    kv = torch.cat([state[f"{block}{part}_proj.weight"] for part in "kv"])
    assert torch.equal(attention.kv.weight, kv.float())
    assert torch.equal(attention.q.bias, state[f"{block}q_proj.bias"].float())


def test_the_head_of_a_fine_tuned_segformer_is_left_out_with_a_word(tmp_path):
    state = {k: v for k, v in published(HUB).items() if not k.startswith("classifier.")}
    head = {"decode_head.batch_norm.weight": torch.ones(9), "decode_head.linear_c.0.proj.weight": torch.randn(9, 32)}
    report = load_pretrained(b0(), saved(tmp_path / "segformer.bin", state | head))
    assert report.source.endswith("its head left out") and report.unexpected == list(head)
    state = {f"backbone.{k}": v for k, v in mit_b0().items() if not k.startswith("head.")}
    head = {"decode_head.linear_c1.proj.weight": torch.randn(256, 32)}
    report = load_pretrained(b0(), saved(tmp_path / "segformer.pth", {"state_dict": state | head}))
    assert report.source == "MiT encoder, its head left out"


# ---- no half-loaded model, and no damaged one ----------------------------------------------------------------------
def refused(model, path: pathlib.Path, pattern: str) -> None:
    """Loading raises one sentence of the file and what `pattern` says, and leaves the model as it was."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError) as caught:
        load_pretrained(model, str(path))
    sentence = str(caught.value)
    assert path.name in sentence and re.search(pattern, sentence) and "\n" not in sentence, sentence
    assert "--pretrained" not in sentence  # which gave the file
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def without(state: dict, name: str) -> dict:
    return {k: v for k, v in state.items() if k != name}


def with_a_block_more(state: dict) -> dict:
    return state | {k.replace("block1.1.", "block1.2."): v for k, v in state.items() if k.startswith("block1.1.")}


@pytest.mark.parametrize(
    "state, pattern",
    [
        (lambda: without(mit_b0(), "block2.0.norm1.bias"), "MiT encoder. 175 of 176 .*encoder fit.*stages.1.*norm1.b"),
        (lambda: with_a_block_more(mit_b0()), "MiT encoder. 176 of 176 .* but it has stages.0.blocks.2.* Is it of ano"),
        (lambda: without(published(HUB), VALUES), r"stages.2.blocks.1.attn.kv.bias.*\(160,\).*\(320,\)"),
        (lambda: without(b0().state_dict(), "decoder.bn.bias"), "this project. .* of the model fit.*decoder.bn.bias"),
        (lambda: without(published(), "decoder.linear_fuse.bn.bias"), "published M-Seg.* .*model fit.*decoder.bn.bias"),
        (lambda: {"a.weight": torch.randn(3)}, r"this project. 0 of \d+ tensors .*stages.0.embed.proj.weight"),
        (lambda: build_model("segformer_b0", 9, MODALITIES).state_dict(), r"classify.bias.*\(9,\).*\(25,\)"),
        (lambda: [torch.ones(3)], "holds a list"),
        (lambda: b"not a checkpoint", "is not a readable checkpoint"),
    ],
)
def test_a_file_that_does_not_fill_its_part_of_the_model_is_refused(tmp_path, state, pattern):
    path, content = tmp_path / "x.pth", state()
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    refused(b0(), path, pattern)


def spoilt(value: torch.Tensor, bad: float) -> torch.Tensor:
    value.view(-1)[3] = bad
    return value


@pytest.mark.parametrize(
    "name, change, part",
    [
        (WEIGHT, lambda value: 3, "dense tensor"),
        (WEIGHT, lambda value: value.tolist(), "dense tensor"),
        (WEIGHT, lambda value: value.to_sparse(), "dense tensor"),
        (WEIGHT, lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8), "dense tensor"),
        (WEIGHT, lambda value: value.to("meta"), "dense tensor"),
        (WEIGHT, lambda value: value.to(torch.int8), "floating point"),
        (WEIGHT, lambda value: value > 0, "floating point"),
        (WEIGHT, lambda value: value.to(torch.complex64), "floating point"),
        (WEIGHT, lambda value: spoilt(value, torch.nan), "finite"),
        (WEIGHT, lambda value: spoilt(value, -torch.inf), "finite"),
        (WEIGHT, lambda value: spoilt(value.double(), 1e300), "finite"),
        (VARIANCE, lambda value: spoilt(value, torch.nan), "finite"),
        (VARIANCE, lambda value: spoilt(value, -0.1), "below 0"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:.*TypedStorage", "ignore:.*quantized")
def test_a_value_that_is_no_weight_is_refused_by_name(tmp_path, name, change, part):
    state = tiny().state_dict()
    torch.save({**state, name: change(state[name].clone())}, tmp_path / "x.pth")
    refused(tiny(), tmp_path / "x.pth", f"{name} .*{part}")


def test_two_flipped_bits_in_a_pth_are_noticed_by_its_checksum(tmp_path):
    state, path = tiny().state_dict(), tmp_path / "x.pth"
    torch.save(state, path)
    data = bytearray(path.read_bytes())
    data[data.index(state[WEIGHT].numpy().tobytes()) + 1] ^= 0b11  # so little that every value stays finite
    path.write_bytes(data)
    refused(tiny(), path, "checksum")


def shift(entries: list[dict], by: int) -> None:
    for entry in entries:
        entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]


def same(x):
    return x


@pytest.mark.parametrize(
    "change, end",
    [
        pytest.param(lambda entries: shift(entries[1:2], -4), same, id="overlapping"),
        pytest.param(lambda entries: shift(entries, 4), lambda data: data + bytes(4), id="shifted"),
        pytest.param(lambda entries: entries[1].update(data_offsets=entries[0]["data_offsets"]), same, id="duplicated"),
        pytest.param(lambda entries: shift(entries[:1], -4), same, id="negative"),
        pytest.param(lambda entries: entries[0]["data_offsets"].reverse(), same, id="reversed"),
        pytest.param(lambda entries: shift(entries[-1:], 4), same, id="past the end"),
        pytest.param(lambda entries: entries[0].update(dtype="I32"), same, id="I32"),
        pytest.param(lambda entries: entries[0].update(dtype="F99"), same, id="F99"),
        pytest.param(lambda entries: entries[0]["shape"].append(2), same, id="another shape"),
        pytest.param(same, lambda data: data + bytes(8), id="surplus"),
        pytest.param(same, lambda data: data[:-4], id="cut off"),
        pytest.param(same, lambda data: data[:5000], id="cut off in its header"),
    ],
)
def test_a_damaged_safetensors_file_is_refused_by_name(tmp_path, change, end):
    first = (VARIANCE, VARIANCE.replace("var", "mean"))  # of one size
    state = dict(sorted(tiny().state_dict().items(), key=lambda item: item[0] not in first))
    path = tmp_path / "x.safetensors"
    path.write_bytes(end(safetensors(state, change)))
    refused(tiny(), path, "is not a readable checkpoint")
    path.write_bytes(safetensors(state))
    assert load_pretrained(tiny(), str(path)).missing == []


# ---- this project's checkpoints ------------------------------------------------------------------------------------
def test_weights_of_modalities_in_another_order_are_refused(tmp_path):
    turned = [MODALITIES[0], *MODALITIES[:0:-1]]
    model = build_model("cmnext_tiny", 7, MODALITIES)
    path = saved(tmp_path / "a.pt", {"model": model.state_dict(), "meta": {"modalities": MODALITIES}})
    with pytest.raises(ValueError, match="a.pt was trained with modalities rgb, depth, .* but here it is rgb, "):
        load_pretrained(build_model("cmnext_tiny", 7, turned), path)
    assert load_pretrained(model, path).missing == []


def test_own_checkpoints_come_back_whole(tmp_path):
    first, second = (build_model("cmnext_tiny", 7, MODALITIES) for _ in range(2))
    first.published_layout = True
    report = load_pretrained(second, saved(tmp_path / "own.pt", {"model": first.state_dict()}))
    assert report.source == "this project" and report.missing == [] and report.unexpected == []
    assert second.published_layout
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_checkpoint_of_other_classes_starts_all_but_the_classifier(whole, handlers, tmp_path, capfd):
    file, other = whole / "1/teacher.pt", tmp_path / "a.pt"
    meta = torch.load(file, weights_only=True)["meta"]
    many, same = len(meta["classes"]), meta["classes"]
    model = build_model("segformer_tiny", many, meta["modalities"])
    assert load_pretrained(model, str(file), same).missing == []
    report = load_pretrained(model, str(file), [*same[:-1], "another"])  # as many, but others
    assert report.missing == ["decoder.classify.weight", "decoder.classify.bias"] and "classifier" in str(report)
    fewer = build_model("segformer_tiny", many - 2, meta["modalities"])
    checkpoint.save_model(other, fewer, {**meta, "classes": same[2:]})
    assert train(1, start(1, whole, tmp_path / "out", "--distill-epochs", "0", "--pretrained", str(other))) == 0
    assert "a.pt: this project, but of other classes: the classifier starts fresh" in capfd.readouterr().out
