"""Hybrid Prototype Distillation (RMMSS, arXiv 2505.12861 v2, section 4.2): the losses of stage 1.

A frozen teacher sees all modalities, the student (the robust model) a random subset. The class prototypes of the
student's modalities are pulled towards those of randomly matched teacher modalities, so that each learns what the
others know.

    eq. 4   prototype   p[b, m, k]  = mean of the features of modality m over the pixels of class k in sample b
    eq. 5   matching    student modality m answers to teacher modality pi_b(m) = match[b, m], a random permutation
            L_hpdm      KL(softmax_k p_teacher[pi(m)] || softmax_k p_student[m]), over the classes that occur,
                        averaged over channels and present (sample, modality) pairs, summed over the four stages
    total   L = CE + lambda * KL(teacher logits || student logits) + alpha * L_hpdm           (CE is OHEM)

The published weights in the units used here: lambda 50 / K (there 50, on a mean over classes, too) and alpha 100 / K
times (M + 1) / 2, the mean number of present modalities (there 100, on a mean over classes and a sum over modalities):
2 and 10 on DELIVER. The default of alpha is smaller (engine/options.py).

Axes: B samples, M modalities, K classes, C channels of a stage, H W image, h w stage.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels.reference import MASKED

IGNORE = 255


def draw_match(batch_size: int, modalities: int, how: str, generator: torch.Generator) -> Tensor:
    """Which teacher modality each student modality answers to (eq. 5) -> (B, M) int64 on the CPU.

    how: "random", the paper's hybrid matching, a permutation per sample; "same", the ablation without it. (The
    published script trains with "same"; where it matches at random, that is no permutation: docs/paper_vs_code.md.)
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
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    labels: Tensor,
    present: Tensor,
    match: Tensor,
    num_classes: int,
    prototypes: str = "mean",
) -> Tensor:
    """Section 4.2, eqs. 4 and 5, summed over the stages -> scalar >= 0, gradient to the student only.

    student, teacher: per-modality features, 4 x (B, M, C_i, h_i, w_i); labels (B, H, W) with 255 = ignore; present
    (B, M) bool, the student's modalities; match (B, M) from `draw_match`; prototypes: "mean", or "published" (below).
    """
    if prototypes not in ("mean", "published"):
        raise ValueError(f"prototypes {prototypes!r} are unknown; choose mean or published.")
    distance = kernels.prototype_distance if prototypes == "mean" else published_distance
    loss = labels.new_zeros((), dtype=torch.float32)
    for s, t in zip(student, teacher, strict=True):
        y = labels_at(labels, s.shape[-2:])  # (B, h, w)
        loss = loss + distance(s, t.detach().to(s.dtype), y, present, match, num_classes)
    return loss


def published_distance(
    student: Tensor, teacher: Tensor, labels: Tensor, present: Tensor, match: Tensor, num_classes: int
) -> Tensor:
    """`kernels.prototype_distance` as the published code has it (mmkd/Prototype.py): the means are divided by the pixel
    count once more, and classes that do not occur enter the softmax as zeros. So small classes dominate."""
    (p_s, counts), (p_t, _) = (kernels.prototype_pool(x, labels, num_classes) for x in (student, teacher))
    p_t = p_t.gather(1, match[:, :, None, None].expand_as(p_t))  # (B, M, K, C)
    log_s, log_t = ((p / counts.clamp(min=1)[:, None, :, None]).log_softmax(2) for p in (p_s, p_t))
    divergence = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(2).mean(2)  # (B, M)
    return (divergence * present).sum() / present.sum()


def distill_logits(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of the class distributions (B, K, H, W), mean over all pixels -> scalar.

    Ignored pixels count too: the teacher has an opinion where the annotator had none. Gradient to the student only.
    """
    log_s, log_t = student.float().log_softmax(1), teacher.detach().float().log_softmax(1)
    return F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1).mean()


def ohem_cross_entropy(logits: Tensor, labels: Tensor, threshold: float = 0.7) -> Tensor:
    """Cross entropy over the hard pixels: those whose own class has a probability below `threshold`, or, if they are
    fewer than a sixteenth of the valid ones, that hardest sixteenth -> scalar (0 if no pixel is valid).

    logits (B, K, H, W), labels (B, H, W) with 255 = ignore. Both means are computed, so that nothing waits for a count.
    """
    loss = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none").flatten()  # 0 where ignored
    hard = loss > -math.log(threshold)
    hardest = loss.topk(len(loss) // 16).values  # in descending order; the first `least` of them count
    least = (labels != IGNORE).sum() // 16
    first = torch.arange(len(hardest), device=loss.device) < least
    few, enough = (hardest * first).sum() / least.clamp(min=1), (loss * hard).sum() / hard.sum().clamp(min=1)
    return torch.where(hard.sum() < least, few, enough)


# ---- the optional second half: intra-class feature variation (CVPR 2026 version) ------------------------------


def dominant_modalities(per_modality: Sequence[Tensor], fused: Sequence[Tensor]) -> Tensor:
    """The half of the modalities (rounded up) whose features point most along the fused ones -> (B, M) bool."""
    pairs = zip(per_modality, fused, strict=True)
    cosine = sum(F.cosine_similarity(x.float(), f[:, None].float(), dim=2).mean((2, 3)) for x, f in pairs)  # (B, M)
    best = cosine.topk((cosine.shape[1] + 1) // 2, dim=1).indices
    return torch.zeros_like(cosine, dtype=torch.bool).scatter_(1, best, True)


def feature_variation_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], labels: Tensor, counted: Tensor, num_classes: int
) -> Tensor:
    """Lets the student's features vary within a class as the teacher's do, on the `counted` (B, M) pairs -> scalar.

    Per pixel the cosine between its feature and its class's prototype; softmax over the labelled positions;
    KL(teacher || student) over positions, averaged over the counted (sample, modality) pairs, summed over stages.
    Shapes as in `hpdm_loss`; gradient to the student.
    """
    loss = labels.new_zeros((), dtype=torch.float32)
    for s, t in zip(student, teacher, strict=True):
        y = labels_at(labels, s.shape[-2:])
        cosines = []
        for x in (s, t.detach()):
            means, _ = kernels.prototype_pool(x, y, num_classes)  # (B, M, K, C)
            cosines.append(kernels.pixel_prototype_cosine(x, y, means).flatten(2))  # (B, M, h w)
        ignored = (y == IGNORE).flatten(1)[:, None]
        log_s, log_t = (x.masked_fill(ignored, MASKED).log_softmax(2) for x in cosines)
        divergence = torch.where(ignored, 0.0, log_t.exp() * (log_t - log_s)).sum(2)  # (B, M)
        loss = loss + (divergence * counted).sum() / counted.sum().clamp(min=1)
    return loss
