"""AnySeg's losses (arXiv 2411.17141), the baseline that the paper's margin is over: the same models, the same dropping.

    L = CE + 50 MAD + 5 UMD + 10 CMD        as published; MAD is `hpdm.distill_logits`

UMD pulls each of the student's modalities towards the same modality of the teacher, pixel by pixel; CMD pulls the
relations between modalities towards the teacher's. Where the published code does otherwise, the docstring says so.

Axes: B samples, M modalities, C channels of a stage, h w stage. student, teacher: per-modality features,
4 x (B, M, C_i, h_i, w_i); present (B, M) bool, the student's modalities, at least one per row. Gradient to the student.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def umd_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], present: Tensor) -> Tensor:
    """Unimodal distillation: KL(teacher || student) between the features of the same modality, each pixel's channels
    made a distribution by softmax; mean over channels and pixels, summed over stages and present modalities, mean over
    samples -> scalar >= 0. (The published code, UMD.py, takes the softmax over the image's rows instead.)
    """
    loss = torch.zeros((), device=present.device)
    for s, t in zip(student, teacher, strict=True):
        log_s, log_t = s.float().log_softmax(2), t.detach().float().log_softmax(2)
        divergence = F.kl_div(log_s, log_t, reduction="none", log_target=True).mean((2, 3, 4))  # (B, M)
        loss = loss + (divergence * present).sum(1).mean()
    return loss


def cmd_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], present: Tensor) -> Tensor:
    """Cross-modal distillation: mean squared difference between the student's and the teacher's matrices of cosines
    between modalities, over the pairs of present ones; summed over stages, mean over samples -> scalar >= 0. (The
    published code, CMD.py, takes the cosines of the student's log-softmax and of the teacher's softmax over the image's
    rows, and one matrix for all modalities of all samples.)
    """
    pairs = present[:, :, None] & present[:, None]  # (B, M, M)
    loss = torch.zeros((), device=present.device)
    for s, t in zip(student, teacher, strict=True):
        difference = (modality_cosines(s) - modality_cosines(t.detach())).square() * pairs
        loss = loss + (difference.sum((1, 2)) / pairs.sum((1, 2))).mean()
    return loss


def modality_cosines(features: Tensor) -> Tensor:
    """Cosine over positions between two modalities, per channel, mean over channels: (B, M, C, h, w) -> (B, M, M)."""
    x = F.normalize(features.float().flatten(3), dim=3).flatten(2)  # (B, M, C h w), each channel of length 1
    return x @ x.transpose(1, 2) / features.shape[2]
