"""Reads weights into a model: as published, as the model hub has them, and this project's own."""

import itertools
import json
import re
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.checkpoint import fitting, require, unpack
from model import build_model


class LoadReport(NamedTuple):
    """What `load_pretrained` did; as text, one line."""

    source: str  # what kind of file it was
    loaded: list[str]  # names in this model
    missing: list[str]  # names in this model that such a file does not give: they keep their values
    unexpected: list[str]  # names in the file that nothing in this model takes, such as another head

    def __str__(self) -> str:
        loaded, missing, unexpected = map(len, self[1:])
        return f"{self.source}; {loaded} tensors loaded, {missing} start fresh, {unexpected} unused"


# What a name in the file contains -> what kind of file it is. All others are taken for this project's.
KINDS = {
    "backbone.extra_": "published CMNeXt",
    "encoder.patch_embed1.": "published M-SegFormer",
    "patch_embed1.": "MiT encoder",
    "patch_embeddings.": "model hub's SegFormer encoder",
}
# How names in such a file become this model's, rule by rule. "name[1]" is part 1 of a tensor that is one here.
NAMES = {
    r"^(model\.)?(segformer\.)?((backbone|decode_head|encoder|decoder)\.)?": "",
    r"^(\w+?|FFMs\..*(?:proj|norm|kv))(\d)(?=\.)": lambda found: f"{found[1]}.{int(found[2]) - 1}",  # they count from 1
    r"^extra_downsample_layers\.(\d)\.proj\.module": r"aux.\1.embed.proj",
    r"^extra_downsample_layers\.(\d)\.norm\.ln_(\d+)\.(\w+)": r"aux.\1.embed.\3[\2]",
    r"^extra_score_predictor\.(\d)\.score_nets\.(\d+)\.0": r"aux.\1.hub.depthwise.\2",
    r"^extra_score_predictor\.(\d)\.score_nets\.(\d+)\.1": r"aux.\1.hub.pointwise.\2",
    r"^extra_block\.(\d)": r"aux.\1.blocks",
    r"c_nets\.0": "gate",
    r"^extra_norm\.(\d)": r"aux.\1.norm",
    r"^FRMs\.(\d)\.(channel|spatial)_weights\.mlp": r"aux.\1.frm.\2",
    r"channel_emb\.norm": "channel_emb.bn",
    r"channel_emb\.channel_embed": "channel_emb.mix",
    r"^FFMs\.(\d)\.(cross\.cross_attn|cross|channel_emb)": r"aux.\1.ffm",
    r"^linear_c\.(\d)\.proj": r"decoder.linear.\1",
    r"^linear_fuse\.conv": "decoder.fuse",
    r"^linear_fuse\.bn": "decoder.bn",
    r"^linear_pred": "decoder.classify",
    # MiT as published; as the model hub has it, up to version 4 of transformers; and from version 5 on
    r"^(?:patch_embed|patch_embeddings)\.(\d)|^stages\.(\d)\.patch_embeddings": r"stages.\1\2.embed",
    r"^(?:norm|layer_norm)\.(\d)|^stages\.(\d)\.layer_norm": r"stages.\1\2.norm",
    r"^block\.(\d)": r"stages.\1.blocks",
    r"layer_norm_1|layernorm_before": "norm1",
    r"layer_norm_2|layernorm_after": "norm2",
    r"attention\.(self\.query|q_proj)": "attn.q",
    r"attention\.(self\.key|k_proj)\.(\w+)": r"attn.kv.\2[0]",
    r"attention\.(self\.value|v_proj)\.(\w+)": r"attn.kv.\2[1]",
    r"attention\.(self\.sr|sequence_reduction\.sequence_reduction)": "attn.sr",
    r"attention\.(self|sequence_reduction)\.layer_norm": "attn.norm",
    r"attention\.(output\.dense|o_proj)": "attn.proj",
    r"\.layer_norm\.": ".norm.",
    r"mlp\.dense": "mlp.fc",
    r"dwconv\.dwconv": "dwconv",
}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def load_pretrained(model: nn.Module, path: str, classes: list[str] | None = None) -> LoadReport:
    """Loads a file of weights (.pth, .pt, .bin or .safetensors) into `model` in place.

    MiT encoders go into either backbone: as published, or of the model hub, fine-tuned or not. In CMNeXt they start the
    auxiliary patch embeddings and norms, too; the authors' start from chance. Published M-SegFormer and CMNeXt weights
    and this project's checkpoints fill the whole model; published CMNeXt weights switch `published_layout` on.
    classes: the model's; of a checkpoint of this project that says others, the classifier is left out.
    Raises FileNotFoundError, or ValueError if the file cannot be read or does not fit; then nothing is loaded.
    """
    state = read_weights(Path(path))
    meta = state["meta"] if isinstance(state.get("meta"), dict) else {}
    for key in ("model", "state_dict", "model_state_dict"):
        state = state[key] if isinstance(state.get(key), dict) else state
    state = {str(name).removeprefix("module."): value for name, value in state.items()}
    source = next((kind for mark, kind in KINDS.items() if any(mark in name for name in state)), "this project")
    part = "encoder" if source.endswith("encoder") else "model"
    parts = ("stages.",) if part == "encoder" else ("stages.", "aux.", "decoder.", "_extra_state")
    other = ("decoder.classify.",) if classes and meta.get("classes", classes) != classes else ()
    own, is_cmnext = model.state_dict(), hasattr(model, "aux")
    if "modalities" in meta and is_cmnext:  # with weights of its own for each modality
        require(path, meta, {"modalities": model.modalities})
    found, unexpected = {}, []
    for name in sorted(state, key=lambda name: (len(name), name)):  # part 10 after part 9
        new = name
        for pattern, replacement in NAMES.items() if source != "this project" else ():
            new = re.sub(pattern, replacement, new)
        new, _, row = new.partition("[")
        if not new.startswith(parts) or new.startswith(other):
            unexpected.append(name)
            continue
        if new != "_extra_state":
            check_weight(path, name, state[name])
        value = state[name][None] if row and new.startswith("aux.") else state[name]  # else keys, values
        with fitting(f"{path} (taken for: {source}) has {name} twice, or its parts differ"):
            found[new] = torch.cat((found[new], value)) if new in found else value
    tensors = {name: value for name, value in own.items() if isinstance(value, Tensor)}
    for name in [name for name in found if name in tensors]:
        if tensors[name].ndim == 2 and found[name].shape[2:] == (1, 1):
            found[name] = found[name][:, :, 0, 0]  # a 1x1 convolution there, the linear layer that equals it here
        there, here = tuple(found[name].shape), tuple(tensors[name].shape)
        if there != here:
            raise ValueError(f"{path} (taken for: {source}) has {name} with shape {there}, this model has {here}.")
    wanted = [name for name in tensors if name.startswith(parts) and not name.startswith(other)]
    missing, surplus = [name for name in wanted if name not in found], [name for name in found if name not in own]
    if missing or surplus:
        first = f"the first that is missing is {missing[0]}" if missing else f"but it has {surplus[0]}, too"
        fit = f"{len(wanted) - len(missing)} of {len(wanted)} tensors of the {part} fit"
        raise ValueError(f"{path} was taken for: {source}. {fit}, {first}. Is it of another model or size?")
    if part == "encoder" and is_cmnext:
        for i, p in itertools.product(range(4), ("weight", "bias")):
            found[f"aux.{i}.embed.proj.{p}"] = found[f"stages.{i}.embed.proj.{p}"]
            found[f"aux.{i}.embed.{p}"] = found[f"stages.{i}.embed.norm.{p}"].expand(len(model.modalities) - 1, -1)
    if source == "published CMNeXt":
        found["_extra_state"] = {"published_layout": True}
    with fitting(f"{path} does not fit"):
        model.load_state_dict({**own, **found})
    source += ", its head left out" if part == "encoder" and unexpected else ""
    source += ", but of other classes: the classifier starts fresh" if other else ""
    return LoadReport(source, sorted(found), [name for name in tensors if name not in found], unexpected)


def check_weight(path: str, name: str, value) -> None:
    """Refuses what torch would cast, or what would show only in the results."""
    plain = isinstance(value, Tensor) and value.layout == torch.strided and not (value.is_quantized or value.is_meta)
    if not plain or not (value.is_floating_point() or name.endswith("num_batches_tracked")):
        raise ValueError(f"{path}: {name} is no dense tensor of floating point.")
    if not value.float().isfinite().all() or (name.endswith("running_var") and (value.float() < 0).any()):
        raise ValueError(f"{path}: {name} holds values that are not finite, or variances below 0; the file is damaged.")


def start_model(run, meta: dict) -> nn.Module:
    """What a run starts from: --pretrained, or chance; the same at each call and on each process. `meta` gets the
    checksum of the file as "start", or must have that one."""
    torch.manual_seed(run.args.seed)
    model = build_model(meta["backbone"], len(meta["classes"]), meta["modalities"]).to(run.device)
    model.absent = meta["absent"]
    if run.args.pretrained:
        run.say(f"{run.args.pretrained}: {load_pretrained(model, run.args.pretrained, meta['classes'])}")
        start = zlib.crc32(Path(run.args.pretrained).read_bytes())
        if start != meta.setdefault("start", start):
            raise ValueError(f"--pretrained {run.args.pretrained} is not the file that this run started from.")
    return model


def read_weights(path: Path) -> dict:
    """The dictionary in a file of torch.save or a .safetensors, told apart by their first bytes; runs no code in it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, or is no file.")
    with fitting(f"{path} is not a readable checkpoint of tensors"):
        data = bytearray(path.read_bytes())
        if data[8:9] == b"{":  # 8 bytes: n; n bytes of JSON: {name: {dtype, shape, data_offsets}}; the tensors' bytes
            n = int.from_bytes(data[:8], "little")
            state = json.loads(data[8 : 8 + n])
            state.pop("__metadata__", None)
            raw = torch.frombuffer(data, dtype=torch.uint8)[8 + n :]
            spans = [[0, 0], *sorted(about["data_offsets"] for about in state.values()), [len(raw), len(raw)]]
            if any(not start <= end == after for (start, end), (after, _) in itertools.pairwise(spans)):
                raise ValueError("its tensors do not fill it one after the other, without a gap")
            for name, about in state.items():
                start, end = about["data_offsets"]
                if about["dtype"] not in DTYPES:
                    raise ValueError(f"{name} is of {about['dtype']}, not one of {', '.join(DTYPES)}")
                state[name] = raw[start:end].clone().view(DTYPES[about["dtype"]]).reshape(about["shape"])
        else:
            state = unpack(data)
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a dictionary of weights.")
    return state
