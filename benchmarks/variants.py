"""What the paper's losses are compared with: stage 1's own loop, with another function of losses.

    python -m benchmarks.variants anyseg --teacher runs/synthetic/teacher.pt --out runs/anyseg
    python -m benchmarks.variants published --match same --out runs/authors    # the authors' own script
    python -m benchmarks.variants variation --out runs/variation               # the CVPR 2026 version

anyseg      AnySeg's losses (arXiv 2411.17141), the baseline that the paper's margin is over
published   the paper's losses, with the prototypes of the published code
variation   the paper's losses, and intra-class feature variation on the dominant modalities

All other options are those of train_stage1.py. Axes as in hpdm.py; robust and teacher are features of each modality,
4 x (B, M, C_i, h_i, w_i), present (B, M) bool is the robust model's modalities. Gradient to the robust model alone.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import train_stage1
from datasets.files import IGNORED
from engine.runs import guarded
from hpdm import distill_logits, labels_at, ohem_cross_entropy
from kernels.reference import MASKED, pixel_prototype_cosine, prototype_pool
from segformer import Output
from train_stage1 import paper_losses


def anyseg(robust: Output, teacher: Output, labels: Tensor, present: Tensor, match: Tensor, args: Namespace) -> dict:
    """L = CE + 50 MAD + 5 UMD + 10 CMD, the published weights; MAD is the KL on logits."""
    features, present = (robust.per_modality, teacher.per_modality), present.to(labels.device)
    return {
        "ce": ohem_cross_entropy(robust.logits, labels),
        "mad": 50 * distill_logits(robust.logits, teacher.logits),
        "umd": 5 * umd_loss(*features, present),
        "cmd": 10 * cmd_loss(*features, present),
    }


def published(robust: Output, teacher: Output, labels: Tensor, present: Tensor, match: Tensor, args: Namespace) -> dict:
    """CE + lambda KL + alpha L_hpdm as the published code computes it."""
    losses = paper_losses(robust, teacher, labels, present, match, Namespace(lambda_kl=args.lambda_kl, alpha=0))
    features, classes = (robust.per_modality, teacher.per_modality), robust.logits.shape[1]
    return losses | {"hpdm": args.alpha * published_hpdm(*features, labels, present, match, classes)}


def variation(robust: Output, teacher: Output, labels: Tensor, present: Tensor, match: Tensor, args: Namespace) -> dict:
    """The paper's losses + 12 times feature variation on those dominant modalities that are present."""
    losses = paper_losses(robust, teacher, labels, present, match, args)
    counted = present.to(labels.device) & dominant_modalities(teacher.per_modality, teacher.fused)  # (B, M)
    features, classes = (robust.per_modality, teacher.per_modality), robust.logits.shape[1]
    return losses | {"variation": 12 * feature_variation_loss(*features, labels, counted, classes)}


def umd_loss(robust: Sequence[Tensor], teacher: Sequence[Tensor], present: Tensor) -> Tensor:
    """AnySeg's unimodal distillation: KL(teacher || robust) between the features of the same modality, each pixel's
    channels made a distribution by softmax (in the published code the image's rows); mean over channels and pixels,
    summed over stages and present modalities, mean over samples -> scalar >= 0."""
    loss = torch.zeros((), device=present.device)
    for r, t in zip(robust, teacher, strict=True):
        log_r, log_t = (x.float().log_softmax(2) for x in (r, t.detach()))
        divergence = F.kl_div(log_r, log_t, reduction="none", log_target=True).mean((2, 3, 4))  # (B, M)
        loss = loss + (divergence * present).sum(1).mean()
    return loss


def cmd_loss(robust: Sequence[Tensor], teacher: Sequence[Tensor], present: Tensor) -> Tensor:
    """AnySeg's cross-modal distillation: mean squared difference between both models' matrices of cosines between
    modalities, over the pairs of present ones; summed over stages, mean over samples -> scalar >= 0. (The published
    code's cosines are of softmaxes over the image's rows, in one matrix for all modalities of all samples.)"""
    pairs = present[:, :, None] & present[:, None]  # (B, M, M)
    loss = torch.zeros((), device=present.device)
    for r, t in zip(robust, teacher, strict=True):
        difference = (modality_cosines(r) - modality_cosines(t.detach())).square() * pairs
        loss = loss + (difference.sum((1, 2)) / pairs.sum((1, 2))).mean()
    return loss


def modality_cosines(features: Tensor) -> Tensor:
    """Cosine over positions between two modalities, per channel, mean over channels: (B, M, C, h, w) -> (B, M, M)."""
    x = F.normalize(features.float().flatten(3), dim=3).flatten(2)  # (B, M, C h w), each channel of length 1
    return x @ x.transpose(1, 2) / features.shape[2]


def published_hpdm(
    robust: Sequence[Tensor], teacher: Sequence[Tensor], labels: Tensor, present: Tensor, match: Tensor, classes: int
) -> Tensor:
    """`hpdm.hpdm_loss` with the prototypes of the published code (mmkd/Prototype.py): the means are divided by the
    pixel count once more, and classes that do not occur enter the softmax as zeros. So small classes dominate."""
    present, match = (x.to(labels.device) for x in (present, match))
    loss = labels.new_zeros((), dtype=torch.float32)
    for r, t in zip(robust, teacher, strict=True):
        y = labels_at(labels, r.shape[-2:])  # (B, h, w)
        (p_r, counts), (p_t, _) = (prototype_pool(x, y, classes) for x in (r, t.detach()))  # (B, M, K, C), (B, K)
        p_t = p_t.gather(1, match[:, :, None, None].expand_as(p_t))
        log_r, log_t = ((p / counts.clamp(min=1)[:, None, :, None]).log_softmax(2) for p in (p_r, p_t))
        divergence = F.kl_div(log_r, log_t, reduction="none", log_target=True).mean((2, 3))  # (B, M)
        loss = loss + (divergence * present).sum() / len(present)
    return loss


def dominant_modalities(per_modality: Sequence[Tensor], fused: Sequence[Tensor]) -> Tensor:
    """The half of the modalities (rounded up) whose features point most along the fused ones -> (B, M) bool."""
    pairs = zip(per_modality, fused, strict=True)
    cosine = sum(F.cosine_similarity(x.float(), f[:, None].float(), dim=2).mean((2, 3)) for x, f in pairs)  # (B, M)
    best = cosine.topk((cosine.shape[1] + 1) // 2, dim=1).indices
    return torch.zeros_like(cosine, dtype=torch.bool).scatter_(1, best, True)


def feature_variation_loss(
    robust: Sequence[Tensor], teacher: Sequence[Tensor], labels: Tensor, counted: Tensor, classes: int
) -> Tensor:
    """Lets the robust model's features vary within a class as the teacher's do, on the `counted` pairs -> scalar. Per
    pixel the cosine of its feature and the prototype of its class; softmax over the labelled positions;
    KL(teacher || robust) over positions, averaged over the counted (sample, modality) pairs, summed over stages."""
    loss = labels.new_zeros((), dtype=torch.float32)
    for r, t in zip(robust, teacher, strict=True):
        y = labels_at(labels, r.shape[-2:])
        # 2 x (B, M, h w), each with the prototypes (B, M, K, C) of its own model.
        cosines = [pixel_prototype_cosine(x, y, prototype_pool(x, y, classes)[0]).flatten(2) for x in (r, t.detach())]
        ignored = (y == IGNORED).flatten(1)[:, None]
        log_r, log_t = (x.masked_fill(ignored, MASKED).log_softmax(2) for x in cosines)
        divergence = torch.where(ignored, 0.0, log_t.exp() * (log_t - log_r)).sum(2)  # (B, M)
        loss = loss + (divergence * counted).sum() / counted.sum().clamp(min=1)
    return loss


VARIANTS = {f.__name__: f for f in (anyseg, published, variation)}


def main(argv: list[str]) -> None:
    name, *options = argv or [""]
    if name not in VARIANTS:
        raise ValueError(f"the variant {name!r} is unknown; give one of {', '.join(VARIANTS)} first.")
    train_stage1.main(options, VARIANTS[name])


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
