"""Reads weights into a model: the published ones under their own names, and this project's checkpoints.

    report = load_pretrained(model, "mit_b0.pth")
    print(report.source, len(report.loaded), report.missing, report.unexpected)

Understood: MiT ImageNet weights (SegFormer), M-SegFormer (AnySeg) and CMNeXt (DELIVER) as published, and checkpoints
written here (a student that is conditioned on its sensors only into a model that is, too).  tests/golden proves the two
segmentation models against the authors' outputs.
"""

import re
from typing import NamedTuple

import torch
from torch import Tensor, nn


class LoadReport(NamedTuple):
    source: str  # what kind of checkpoint it was
    loaded: list[str]  # names in this model
    missing: list[str]  # names in this model that the file does not give
    unexpected: list[str]  # names in the file that nothing in this model takes


# Published names -> this model's. MiT first, then what the two segmentation models add; first match wins.
MIT_NAMES = [
    (r"patch_embed(\d)\.(proj|norm)\.(\w+)", lambda i, part, p: f"stages.{int(i) - 1}.embed.{part}.{p}"),
    (r"block(\d)\.(\d+)\.mlp\.dwconv\.dwconv\.(\w+)", lambda i, j, p: f"stages.{int(i) - 1}.blocks.{j}.mlp.dwconv.{p}"),
    (r"block(\d)\.(\d+)\.(.+)", lambda i, j, rest: f"stages.{int(i) - 1}.blocks.{j}.{rest}"),
    (r"norm(\d)\.(\w+)", lambda i, p: f"stages.{int(i) - 1}.norm.{p}"),
]
DECODER_NAMES = [
    (r"linear_c(\d)\.proj\.(\w+)", lambda i, p: f"decoder.linear.{int(i) - 1}.{p}"),
    (r"linear_fuse\.conv\.weight", lambda: "decoder.fuse.weight"),
    (r"linear_fuse\.bn\.(\w+)", lambda p: f"decoder.bn.{p}"),
    (r"linear_pred\.(\w+)", lambda p: f"decoder.classify.{p}"),
]
CMNEXT_NAMES = [
    (r"extra_downsample_layers\.(\d)\.proj\.module\.(\w+)", lambda i, p: f"aux.{i}.embed.proj.{p}"),
    (r"extra_downsample_layers\.(\d)\.norm\.ln_(\d+)\.(\w+)", lambda i, m, p: f"aux.{i}.embed.{p}[{m}]"),
    (r"extra_score_predictor\.(\d)\.score_nets\.(\d+)\.0\.(\w+)", lambda i, m, p: f"aux.{i}.hub.depthwise.{m}.{p}"),
    (r"extra_score_predictor\.(\d)\.score_nets\.(\d+)\.1\.(\w+)", lambda i, m, p: f"aux.{i}.hub.pointwise.{m}.{p}"),
    (r"extra_block(\d)\.(\d+)\.mlp\.dwconv\.dwconv\.(\w+)",
     lambda i, j, p: f"aux.{int(i) - 1}.blocks.{j}.mlp.dwconv.{p}"),
    (r"extra_block(\d)\.(\d+)\.c_nets\.0\.weight", lambda i, j: f"aux.{int(i) - 1}.blocks.{j}.gate.weight"),
    (r"extra_block(\d)\.(\d+)\.(.+)", lambda i, j, rest: f"aux.{int(i) - 1}.blocks.{j}.{rest}"),
    (r"extra_norm(\d)\.(\w+)", lambda i, p: f"aux.{int(i) - 1}.norm.{p}"),
    (r"FRMs\.(\d)\.(channel|spatial)_weights\.mlp\.(\d)\.(\w+)", lambda i, w, j, p: f"aux.{i}.frm.{w}.{j}.{p}"),
    (r"FFMs\.(\d)\.cross\.(channel_proj|end_proj|norm)(\d)\.(\w+)",
     lambda i, part, j, p: f"aux.{i}.ffm.{part}.{int(j) - 1}.{p}"),
    (r"FFMs\.(\d)\.cross\.cross_attn\.kv(\d)\.weight", lambda i, j: f"aux.{i}.ffm.kv.{int(j) - 1}.weight"),
    (r"FFMs\.(\d)\.channel_emb\.residual\.weight", lambda i: f"aux.{i}.ffm.residual.weight"),
    (r"FFMs\.(\d)\.channel_emb\.channel_embed\.(\d)\.(\w+)", lambda i, j, p: f"aux.{i}.ffm.mix.{j}.{p}"),
    (r"FFMs\.(\d)\.channel_emb\.norm\.(\w+)", lambda i, p: f"aux.{i}.ffm.bn.{p}"),
]  # fmt: skip


def translate(name: str, rules: list) -> str | None:
    for pattern, make in rules:
        if found := re.fullmatch(pattern, name):
            return make(*found.groups())
    return None


def load_pretrained(model: nn.Module, path: str) -> LoadReport:
    """Loads a checkpoint file into `model` in place: the published weights, or this project's own.

    MiT weights go into either backbone; in CMNeXt they also start the auxiliary patch embeddings and their norms by
    copy, as the authors do.  Published CMNeXt weights switch `model.published_layout` on, which they were trained with.

    Raises:
        ValueError: the file is no checkpoint, nothing in it fits, or a shape differs (both shapes are named).
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"checkpoint {path} does not exist.") from None
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint of tensors ({type(error).__name__}).") from error
    sensors = state.get("meta", {}).get("modalities") if isinstance(state, dict) else None
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a dictionary of weights.")
    state = {name.removeprefix("module."): value for name, value in state.items()}

    own = model.state_dict()
    is_cmnext = hasattr(model, "aux")
    if any(name.startswith("backbone.extra_") for name in state):
        source, rules = "published CMNeXt", CMNEXT_NAMES + MIT_NAMES + DECODER_NAMES
    elif "encoder.patch_embed1.proj.weight" in state:
        source, rules = "published M-SegFormer", MIT_NAMES + DECODER_NAMES
    elif "patch_embed1.proj.weight" in state:
        source, rules = "MiT encoder", MIT_NAMES
    else:
        source, rules = "this project", [(r"(.+)", lambda name: name)]
    if "decoder.film" in state and "decoder.film" not in own:
        raise ValueError(f"{path} holds a model conditioned on its sensors, which a plain one cannot continue; "
                         "give it as --teacher, or load it with checkpoint.load_model.")  # fmt: skip
    if source == "this project" and sensors and (is_cmnext or "decoder.film" in state) and sensors != model.modalities:
        raise ValueError(f"{path} has weights of their own for each of {', '.join(sensors)}, in this order; "
                         f"this model has {', '.join(model.modalities)}.")  # fmt: skip
    part = "" if source == "this project" else r"^(backbone|decode_head|encoder|decoder)\."

    fitted, unexpected = {}, []
    for name, value in state.items():
        target = translate(re.sub(part, "", name), rules)
        base, _, row = (target or "").partition("[")  # "aux.0.embed.weight[2]": a row of a stacked parameter
        if base not in own or not isinstance(value, Tensor):
            if base in own:  # extra state: the switches that travel with this project's checkpoints
                fitted[base] = value
            else:
                unexpected.append(name)
            continue
        expected = own[base][int(row[:-1])] if row and int(row[:-1]) < len(own[base]) else own[base]
        if expected.ndim == 2 and value.shape[2:] == (1, 1):
            value = value[:, :, 0, 0]  # a 1x1 convolution there, the linear layer that equals it here
        if expected.shape != value.shape:
            raise ValueError(f"{path}: {name} has shape {tuple(value.shape)}, "
                             f"but {target} of this model has {tuple(expected.shape)}.")  # fmt: skip
        if row:
            fitted.setdefault(base, own[base].clone())[int(row[:-1])] = value
        else:
            fitted[base] = value
    if source == "MiT encoder" and is_cmnext:
        for i in range(4):
            for p in ("weight", "bias"):
                fitted[f"aux.{i}.embed.proj.{p}"] = state[f"patch_embed{i + 1}.proj.{p}"]
                norm = state[f"patch_embed{i + 1}.norm.{p}"]
                fitted[f"aux.{i}.embed.{p}"] = norm.expand_as(own[f"aux.{i}.embed.{p}"])  # one row per modality
    if not any(isinstance(value, Tensor) for value in fitted.values()):
        raise ValueError(f"{path}: none of its {len(state)} entries fits this {type(model).__name__}; "
                         f"the first is '{next(iter(state), 'nothing')}'.")  # fmt: skip
    if source == "published CMNeXt" and is_cmnext:
        fitted["_extra_state"] = {"published_layout": True}
    model.load_state_dict({**own, **fitted})
    return LoadReport(source, sorted(fitted), sorted(set(own) - set(fitted) - {"_extra_state"}), unexpected)
