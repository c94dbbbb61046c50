"""Many subsets of the modalities of one batch, at little more than the cost of one.

With mean fusion each modality goes through the encoder once: all subsets are means of the same features. The decoder is
linear up to its ReLU (BatchNorm too, in eval mode), so that part, too, is computed once for each modality: 15 subsets
cost 2 to 3 times one on a CPU. A CMNeXt runs once for each. The models are put into eval mode; nothing gives gradients.

A subset is a tuple of positions in `model.modalities`. degraded (B or 1, M, 3, H, W) is what the modalities outside it
deliver instead, without the models being told. With None they are left out; for a model that was trained with `--absent
zero` they are zero images.
Axes: B samples, M modalities, N maps to take means of (M, or 2 M with `degraded`), S subsets, E the decoder's width.
"""

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.checkpoint import fitting, read
from fsm import FSM, ensemble_logits
from segformer import Decoder, MSegFormer, Output, upsample


def all_subsets(modalities: int) -> list[tuple[int, ...]]:
    """The 2^M - 1 non-empty subsets, the complete one last."""
    return [subset for size in range(modalities) for subset in combinations(range(modalities), size + 1)]


def present_of(subset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """The same modalities for every sample -> bool (B, M) on the CPU, or (M,), by `shape`."""
    present = torch.zeros(shape, dtype=torch.bool)
    present[..., list(subset)] = True
    return present


@torch.no_grad()
def subset_outputs(model: nn.Module, images: Tensor, subsets: list, degraded=None, with_fused=True) -> Iterator[Output]:
    """Each subset's output. That of an MSegFormer has no `per_modality`, and `fused` only if `with_fused`."""
    model.eval()
    if degraded is None and getattr(model, "absent", "skip") == "zero":
        degraded = torch.zeros_like(images[:1])
    if not isinstance(model, MSegFormer):
        for subset in subsets:
            present = present_of(subset, images.shape[:2])
            mask = present[:, :, None, None, None].to(images.device)
            yield model(images, present) if degraded is None else model(torch.where(mask, images, degraded))
        return
    present = torch.stack([present_of(subset, images.shape[1:2]) for subset in subsets]).float()  # (S, M)
    weights = present / present.sum(1, keepdim=True)
    features = model.encode(images)  # 4 x (B, M, C_i, h_i, w_i)
    if degraded is not None:
        broken = model.encode(degraded)
        features = tuple(torch.cat((f, g.expand_as(f)), 1) for f, g in zip(features, broken, strict=True))
        weights = torch.cat((present, 1 - present), 1) / images.shape[1]  # (S, N)
    for row, logits in zip(weights.tolist(), mean_logits(model.decoder, features, weights), strict=True):
        fused = tuple(sum(w * f[:, i] for i, w in enumerate(row) if w) for f in (features if with_fused else ()))
        yield Output(upsample(logits, images.shape[-2:]), fused, ())


def subset_logits(model: nn.Module, images: Tensor, subsets: list, degraded: Tensor | None = None) -> Iterator[Tensor]:
    """Logits (B, K, H, W) of each subset, as in `subset_outputs`."""
    return (out.logits for out in subset_outputs(model, images, subsets, degraded, with_fused=False))


def mean_logits(decoder: Decoder, features: tuple[Tensor, ...], weights: Tensor) -> Tensor:
    """The decoder's logits, not yet upsampled, for many means of the same maps -> (S, B, K, h_1, w_1).

    features 4 x (B, N, C_i, h_i, w_i); weights (S, N) on the CPU, a row sums to 1. BatchNorm goes into the decoder's
    weights. The means are taken a few rows at a time, to stay in a CPU's cache and within a GPU's memory.
    """
    b, _, _, h, w = features[0].shape
    weights, few = weights.to(features[0]), 64 if features[0].is_cuda else 4  # rows at a time
    scale = decoder.bn.weight / (decoder.bn.running_var + decoder.bn.eps).sqrt()  # (E,)
    layers = [(weight * scale[:, None], bias * scale) for weight, bias in decoder.folded()]
    layers[0][1].add_(decoder.bn.bias - decoder.bn.running_mean * scale)
    logits = features[0].new_empty(len(weights), b, h, w, decoder.classify.out_channels)
    for i in range(b):
        pairs = zip(features, layers, strict=True)
        mixed, *coarse = (F.linear(f[i].permute(0, 2, 3, 1), *layer).permute(0, 3, 1, 2) for f, layer in pairs)
        for x in coarse:  # (N, E, h_i, w_i)
            mixed += upsample(x, (h, w))
        for top in range(0, h, few):
            x = mixed[:, :, top : top + few].permute(0, 2, 3, 1)  # (N, rows, w, E)
            hidden = F.relu_((weights @ x.flatten(1)).unflatten(1, x.shape[1:]))  # (S, rows, w, E)
            logits[:, i, top : top + few] = F.linear(hidden, decoder.classify.weight[:, :, 0, 0], decoder.classify.bias)
    return logits.permute(0, 1, 4, 2, 3)


def switch_logits(teacher: nn.Module, robust: nn.Module, images: Tensor, subsets: list, degraded=None) -> Iterator:
    """Logits of the baseline without an FSM: the teacher's if all modalities are present, else the robust model's."""
    incomplete = subset_logits(robust, images, [s for s in subsets if len(s) < images.shape[1]], degraded)
    for subset in subsets:
        complete = len(subset) == images.shape[1]
        yield next(subset_logits(teacher, images, [subset]) if complete else incomplete)


@torch.no_grad()
def selected_logits(
    fsm, teacher: nn.Module, robust: nn.Module, images: Tensor, subsets: list, degraded=None, rule=None
) -> Iterator[Tensor]:
    """Logits (B, K, H, W) of the ensemble for each subset. With `degraded`, the selection knows which modalities work;
    teacher and robust model do not. rule: another than in training."""
    outputs = (subset_outputs(model, images, subsets, degraded) for model in (teacher, robust))
    for subset, sources in zip(subsets, zip(*outputs, strict=True), strict=True):
        present = present_of(subset, images.shape[:2])
        yield ensemble_logits(fsm(list(sources), present, rule), teacher, robust, present)


def load_fsm(path: Path | str, device: torch.device, expect: dict | None = None) -> FSM:
    """Rebuilds the selection of a `fsm.pt`, in eval mode; expect: as for `load_model`."""
    about = "rule", "temperature", "conditioned"
    state = read(Path(path), says=("widths", "classes", "modalities", "sources", *about), expect=expect)
    meta = state["meta"]
    with fitting(f"{path} does not hold a feature selection"):
        sizes = meta["widths"], len(meta["classes"]), len(meta["modalities"])
        fsm = FSM(*sizes, **{name: meta[name] for name in about})
        fsm.load_state_dict(state["model"])
    return fsm.to(device).eval()
