"""The plain definitions of the public calls, in vectorised PyTorch: specification, CPU path and gradcheck target.

All but `prototype_distance_loop` work without a loop over classes, samples or modalities, in float32 (float64 stays
float64). The gradients are autograd's own. `kernels/__init__.py` has the shapes and ranges of `prototype_distance` and
`feature_select`, and calls these two outside autocast. `prototype_pool` and `pixel_prototype_cosine` have no kernel: no
default run calls them.

Axes: B samples, M modalities, K classes, C channels of a stage, h x w its positions, P = h*w, S sources.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

COSINE_EPS = 1e-8  # below this product of the two norms there is no direction to compare: cosine 0, gradient 0
MASKED = -1e30  # a logit that softmax turns into an exact 0, and that gives no NaN where all are masked


def wide(x: Tensor) -> Tensor:
    """float32 at least: bfloat16 and float16 are widened, float64 is kept for gradcheck."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def members(labels: Tensor, num_classes: int, features: Tensor) -> tuple[Tensor, Tensor]:
    """Labels (B, h, w) -> one-hot (B, P, K), which 255 leaves empty, and the pixels of each class (B, 1, 1, K)."""
    classes = torch.arange(num_classes, device=labels.device)
    member = (labels.flatten(1)[:, :, None] == classes).to(torch.promote_types(features.dtype, torch.float32))
    return member, member.sum(1)[:, None, None]


def class_means(features: Tensor, member: Tensor, counts: Tensor) -> Tensor:
    """Means over the pixels of each class, as a product of matrices: (B, M, C, h, w) -> (B, M, C, K).

    0 x NaN is NaN, but the feature of an ignored pixel may be anything: it is set to 0 before the product. That costs
    as much as the product, so on the CPU it is done only if the sums turn out to need it.
    """
    rows, member = wide(features).flatten(3), member[:, None]  # (B, M, C, P), (B, 1, P, K)
    sums = None if features.is_cuda else rows @ member  # on a GPU no branch waits for a value
    if sums is None or not sums.detach().sum().isfinite():
        sums = rows.where(member.any(3)[:, :, None], 0) @ member
    return sums / counts.clamp(min=1)


def prototype_pool(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Prototypes (paper eq. 4): the mean feature of each class, per sample and modality.

    features (B, M, C, h, w), labels (B, h, w) int64, values outside 0..K-1 (255) belong to no class -> prototypes
    (B, M, K, C) float32, zeros for a class without a pixel, and counts (B, K) int32.
    """
    member, counts = members(labels, num_classes, features)
    prototypes = class_means(features, member, counts).transpose(2, 3)  # (B, M, K, C)
    return prototypes, counts[:, 0, 0].to(torch.int32)  # (B, K)


def prototype_distance(
    student: Tensor, teacher: Tensor, labels: Tensor, present: Tensor, match: Tensor, num_classes: int
) -> Tensor:
    """Paper eq. 5: masked softmax over the classes that occur, and KL(teacher || student)."""
    member, counts = members(labels, num_classes, student)
    student_prototypes = class_means(student, member, counts)  # (B, M, C, K)
    teacher_prototypes = class_means(teacher, member, counts)
    matched = match[:, :, None, None].expand_as(teacher_prototypes)
    teacher_prototypes = teacher_prototypes.gather(1, matched)  # (B, M, C, K), row m the teacher's match[b, m]
    # An absent pair is masked before the softmax as well, so that whatever its features hold stays out.
    seen = present[:, :, None, None] & (counts > 0)  # (B, M, 1, K)
    log_s = student_prototypes.masked_fill(~seen, MASKED).log_softmax(3)
    log_t = teacher_prototypes.masked_fill(~seen, MASKED).log_softmax(3)
    divergence = torch.where(seen, log_t.exp() * (log_t - log_s), 0)  # (B, M, C, K)
    return divergence.sum() / (num_classes * student.shape[2] * len(student))


def prototype_distance_loop(
    student: Tensor, teacher: Tensor, labels: Tensor, present: Tensor, match: Tensor, num_classes: int
) -> Tensor:
    """The same one sample, one modality, one class at a time, as the published code does it: for tests and benchmarks
    to compare with. In the features' own dtype."""
    total = student.new_zeros(())
    for b, m in present.nonzero().tolist():
        masks = [mask for k in range(num_classes) if (mask := labels[b] == k).any()]
        if masks:
            log_s = torch.stack([student[b, m][:, mask].mean(1) for mask in masks]).log_softmax(0)  # (classes, C)
            log_t = torch.stack([teacher[b, match[b, m]][:, mask].mean(1) for mask in masks]).log_softmax(0)
            total = total + F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(0).mean()
    return total / (num_classes * len(student))


def pixel_prototype_cosine(features: Tensor, labels: Tensor, prototypes: Tensor) -> Tensor:
    """Cosine between each pixel's feature and the prototype of its class (CVPR 2026 version): features (B, M, C, h, w),
    labels (B, h, w) int64, prototypes (B, M, K, C) -> (B, M, h, w) float32 in -1..1.

    0 where the label is outside 0..K-1, and where there is no direction to compare. All K products of a pixel are one
    matrix product, and its own class's is picked: (B, M, K, P) is smaller than (B, M, C, P) wherever C > K.
    """
    shape, labels = labels.shape[1:], labels.flatten(1)[:, None]  # (B, 1, P)
    inside = (labels >= 0) & (labels < prototypes.shape[2])
    own = labels.where(inside, 0).expand(-1, features.shape[1], -1)  # (B, M, P), class 0 stands in for the ignored
    features = wide(features).flatten(3).where(inside[:, None], 0)  # (B, M, C, P)
    prototypes = wide(prototypes).to(features.dtype)
    dot = (prototypes @ features).gather(2, own[:, :, None])[:, :, 0]  # (B, M, K, P) -> (B, M, P)
    norms = features.square().sum(2) * prototypes.square().sum(3).gather(2, own)  # |f|^2 |p|^2, (B, M, P)
    valid = inside & (norms > COSINE_EPS**2)
    cosine = torch.where(valid, dot * norms.where(valid, 1).rsqrt(), 0)
    return cosine.unflatten(2, shape)


def feature_select(features: list[Tensor], weight: Tensor, bias: Tensor, rule: str, temperature: float) -> Tensor:
    """Folded convolution and sigmoid for the scores, then the sources weighted by the rule."""
    S, sources = len(features), [wide(f) for f in features]
    maps = [F.conv2d(f, w[None].to(f.dtype), padding=1) for f, w in zip(sources, weight, strict=True)]  # (B, 1, h, w)
    bias = wide(bias).expand(maps[0].shape[0], S).t()[:, :, None, None, None]  # (S, B, 1, 1, 1)
    scores = torch.sigmoid(torch.stack(maps) + bias)  # (S, B, 1, h, w)
    rated = scores if rule == "score" else (1 + scores) * torch.stack(sources)  # (S, B, 1 or C, h, w)
    if rule == "hard":
        selected = torch.stack(sources).gather(0, rated.argmax(0, keepdim=True))[0]  # ties: the first source
    else:
        selected = sum(v * f for v, f in zip((rated / temperature).softmax(0), sources, strict=True))
    return selected.to(features[0].dtype)
