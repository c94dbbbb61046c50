"""Hybrid Prototype Distillation (RMMSS, arXiv 2505.12861 v2, section 4.2): the losses of stage 1.

A frozen teacher sees all modalities, the robust model a random subset. The class prototypes of the robust model's
modalities are pulled towards those of randomly matched teacher modalities, so that each learns what the others know.

    eq. 4   prototype   p[b, m, k]  = mean of the features of modality m over the pixels of class k in sample b
    eq. 5   matching    modality m of the robust model is matched with teacher modality pi_b(m) = match[b, m], a
                        random permutation (the inverse of the paper's pi, as random)
            L_hpdm      KL(softmax_k p_teacher[pi(m)] || softmax_k p_robust[m]): sum over the classes that occur, over
                        channels, present modalities and stages; divided by K and C, mean over samples
    total   L = CE + 50 KL(teacher logits || robust logits) + 100 L_hpdm; CE is OHEM, KL a mean over pixels and classes

Axes: B samples, M modalities, K classes, C channels of a stage, H W image, h w stage.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from datasets.files import IGNORED


def draw_match(batch_size: int, modalities: int, how: str, generator: torch.Generator) -> Tensor:
    """The teacher modality that each modality of the robust model is matched with (eq. 5) -> (B, M) int64 on the CPU.

    how: "random", the paper's hybrid matching, a permutation per sample; "same", the ablation without it. (The
    published stage 1 uses "same"; another script matches at random, but by no permutation: docs/paper_vs_code.md.)
    """
    if how not in ("random", "same"):
        raise ValueError(f"matching {how!r} is unknown; choose random or same.")
    if how == "same":
        return torch.arange(modalities).expand(batch_size, modalities)
    return torch.rand(batch_size, modalities, generator=generator).argsort(1)


def labels_at(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest neighbour: (B, H, W) -> (B, h, w). A class too small for the stage simply has no prototype there."""
    return F.interpolate(labels[:, None].float(), size=size, mode="nearest")[:, 0].long()


def hpdm_loss(
    robust: Sequence[Tensor], teacher: Sequence[Tensor], labels: Tensor, present: Tensor, match: Tensor, classes: int
) -> Tensor:
    """L_hpdm (section 4.2, eqs. 4 and 5) -> scalar >= 0, gradient to the robust model only.

    robust, teacher: per-modality features, 4 x (B, M, C_i, h_i, w_i); labels (B, H, W) with 255 = ignore; present
    (B, M) bool, the robust model's modalities; match (B, M) from `draw_match`.
    """
    present, match = (x.to(labels.device, non_blocking=True) for x in (present, match))
    loss = labels.new_zeros((), dtype=torch.float32)
    for r, t in zip(robust, teacher, strict=True):
        y = labels_at(labels, r.shape[-2:])  # (B, h, w)
        loss = loss + kernels.prototype_distance(r, t.detach().to(r.dtype), y, present, match, classes)
    return loss


def distill_logits(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of the class distributions (B, K, H, W), mean over pixels and classes -> scalar.

    Ignored pixels count too: the teacher has an opinion where the annotator had none. Gradient to the student only.
    """
    log_s, log_t = student.float().log_softmax(1), teacher.detach().float().log_softmax(1)
    return F.kl_div(log_s, log_t, reduction="none", log_target=True).mean()


def ohem_cross_entropy(logits: Tensor, labels: Tensor, threshold: float = 0.7) -> Tensor:
    """Online hard example mining (OHEM): cross entropy over the hard pixels, those whose own class has a probability
    below `threshold`, or, if they are fewer than a sixteenth of the valid ones, that hardest sixteenth -> scalar (0 if
    no pixel is valid).

    logits (B, K, H, W), labels (B, H, W) with 255 = ignore.
    """
    loss = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none").flatten()  # 0 where ignored
    hard = loss[~(loss <= -math.log(threshold))]  # so a NaN counts, and is seen
    least = int((labels != IGNORED).sum()) // 16
    hard = hard if len(hard) >= least else loss.topk(least).values
    return hard.sum() / max(len(hard), 1)
