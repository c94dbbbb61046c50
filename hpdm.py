"""Hybrid Prototype Distillation (RMMSS, arXiv 2505.12861 v2, section 4.2): the loss of stage 1.

A frozen teacher sees all sensors, the student a random subset of them. Both encode every sensor on its own; the
class prototypes of the student's sensors are pulled to those of randomly matched teacher sensors, so that each sensor
learns what the others know and can stand in for them.

    eq. 4   prototype   p[b, m, c]  = mean of the features of sensor m over the pixels of class c in sample b
    eq. 5   matching    student sensor m answers to teacher sensor pi_b(m), pi_b a random permutation per sample
            distance    KL(softmax_c p_teacher[pi(m)] || softmax_c p_student[m]), over the classes that occur,
                        averaged over channels and present (sample, sensor) pairs, summed over the four stages
    total   L = CE + lambda * KL(student logits || teacher logits) + alpha * L_hpdm           (CE is OHEM)

Weights. Published: lambda 50 on a mean over pixels and classes, which is 50 / K on the mean over pixels used here;
alpha 100 on a mean over classes and channels, summed over modalities and stages. The published prototype code
divides by the pixel count twice, which makes its prototypes almost zero and alpha almost without effect; here the
formula is the paper's, and the weights are small ones that cost little: none helped (README, results).

Axes: B samples, M modalities, K classes, C channels of a stage, H W image, h w stage.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels

IGNORE = 255


def draw_match(batch_size: int, modalities: int, how: str, generator: torch.Generator) -> Tensor:
    """Which teacher modality each student modality answers to (eq. 5) -> (B, M) int64 on the CPU.

    how: "random", the paper's hybrid matching, a permutation per sample; "same", the ablation without it.
    """
    if how == "same":
        return torch.arange(modalities).expand(batch_size, modalities).contiguous()
    return torch.rand(batch_size, modalities, generator=generator).argsort(1)


def labels_at(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest neighbour: (B, H, W) -> (B, h, w). A class too small for the stage simply has no prototype there."""
    h, w = size
    rows = torch.arange(h, device=labels.device) * labels.shape[1] // h
    columns = torch.arange(w, device=labels.device) * labels.shape[2] // w
    return labels[:, rows[:, None], columns]


def hpdm_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], labels: Tensor, present: Tensor, match: Tensor,
    num_classes: int,
) -> Tensor:  # fmt: skip
    """Section 4.2, eqs. 4 and 5, summed over the stages -> scalar >= 0, gradient to the student only.

    student, teacher: per-modality features, 4 x (B, M, C_i, h_i, w_i); labels (B, H, W) with 255 = ignore;
    present (B, M) bool, the student's sensors; match (B, M) from `draw_match`.
    """
    total = labels.new_zeros((), dtype=torch.float32)
    for s, t in zip(student, teacher, strict=True):
        t = t.to(s.dtype)
        total = total + kernels.prototype_distance(s, t, labels_at(labels, s.shape[-2:]), present, match, num_classes)
    return total


def distill_logits(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher) of the class distributions, mean over all pixels -> scalar.

    In this direction the student must not believe what the teacher rules out, but need not share all its doubts.
    Ignored pixels count too: the teacher has an opinion where the annotator had none.
    """
    log_s, log_t = student.float().log_softmax(1), teacher.float().log_softmax(1)  # (B, K, H, W)
    return F.kl_div(log_t, log_s, reduction="none", log_target=True).sum(1).mean()


def ohem_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    threshold: float = 0.7,
    min_share: float = 1 / 16,
    total: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Cross entropy over the hard pixels: those whose own class has a probability of at most `threshold`, and at
    least the hardest `min_share` of the valid ones -> scalar (0 if no pixel is valid).

    logits (B, K, H, W), labels (B, H, W) with 255 = ignore. `total` sums a tensor over the processes of a run, so
    that N of them select and average exactly as one would.
    """
    ce = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")  # (B, H, W)
    valid = labels != IGNORE
    # The k-th hardest pixel without a sort: non-negative floats are ordered like their bit patterns, so 31 halvings
    # find the largest bound that leaves enough pixels. Nothing is copied to the host.
    bits = ce.detach().abs().view(torch.int32).masked_fill(~valid, -1)
    enough = (total(valid.sum()) * min_share).ceil()
    high = torch.tensor(abs(math.log(threshold)), device=ce.device).view(torch.int32)  # abs: -log(1) is -0.0
    low = torch.where(total((bits >= high).sum()) >= enough, high, 0)  # the threshold alone may leave enough
    for _ in range(31):
        middle = low + (high - low) // 2
        fits = total((bits >= middle).sum()) >= enough
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    hard = bits >= low
    count = total(hard.sum()) / total(torch.ones((), device=ce.device))  # pixels per process
    return (ce * hard).sum() / count.clamp(min=1e-6)


# ---- the optional second half: intra-class feature variation (CVPR 2026 version) ------------------------------


def dominant_modalities(per_modality: Sequence[Tensor], fused: Sequence[Tensor]) -> Tensor:
    """The half of the modalities (rounded up) whose features point most along the fused ones -> (B, M) bool."""
    cosine = sum(F.cosine_similarity(x.float(), f[:, None].float(), dim=2).mean((2, 3)) for x, f in
                 zip(per_modality, fused, strict=True))  # (B, M)  # fmt: skip
    best = cosine.topk((cosine.shape[1] + 1) // 2, dim=1).indices
    return torch.zeros_like(cosine, dtype=torch.bool).scatter_(1, best, True)


def feature_variation_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], teacher_fused: Sequence[Tensor], labels: Tensor,
    present: Tensor, num_classes: int, total: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:  # fmt: skip
    """How features vary within a class, student like teacher, on the dominant modalities -> scalar >= 0.

    Per pixel the cosine between its feature and its class's prototype; softmax over the labelled positions;
    KL(teacher || student) over positions, averaged over the present dominant (sample, modality) pairs, summed over
    stages. Shapes as in `hpdm_loss`; teacher_fused 4 x (B, C_i, h_i, w_i); `total` as in `ohem_cross_entropy`.
    """
    counted = dominant_modalities(teacher, teacher_fused) & present  # (B, M)
    pairs = total(counted.sum()) / total(torch.ones((), device=labels.device))  # per process
    loss = labels.new_zeros((), dtype=torch.float32)
    for s, t in zip(student, teacher, strict=True):
        y = labels_at(labels, s.shape[-2:])
        cosines = []
        for x in (s, t):
            prototypes, _ = kernels.prototype_pool(x, y, num_classes)  # (B, M, K, C)
            cosines.append(kernels.pixel_prototype_cosine(x, y, prototypes).flatten(2))  # (B, M, h w)
        ignored = (y == IGNORE).flatten(1)[:, None]
        # a large negative number and not -inf, so that a sample without any label gives 0 instead of NaN
        log_s, log_t = (x.masked_fill(ignored, -1e30).log_softmax(2) for x in cosines)
        divergence = torch.where(ignored, 0.0, log_t.exp() * (log_t - log_s)).sum(2)  # (B, M)
        loss = loss + (divergence * counted).sum() / pairs.clamp(min=1e-6)
    return loss
