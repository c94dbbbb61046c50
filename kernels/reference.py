"""The plain definitions of every kernel, in vectorised PyTorch: specification, CPU path and gradcheck target.

No loop over classes, samples or modalities. Everything is computed in float32 (float64 stays float64), and the
gradients are autograd's own. `kernels/__init__.py` holds the public calls, the checks and the choice of the path.

Axes: B samples, M modalities, K classes, C channels of a stage, h x w its positions, P = h*w, S sources.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

COSINE_EPS = 1e-8  # below this product of the two norms there is no direction to compare: cosine 0, gradient 0
MASKED = -1e30  # a logit that softmax turns into an exact 0, and that stays finite when every class is masked


def _wide(x: Tensor) -> Tensor:
    """float32 at least: bfloat16 and float16 are widened, float64 is kept for gradcheck."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _members(labels: Tensor, num_classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Labels (B, h, w) -> one-hot (B, P, K), which 255 leaves empty, and the pixels of each class (B, 1, 1, K)."""
    classes = torch.arange(num_classes, device=labels.device)
    member = (labels.flatten(1)[:, :, None] == classes).to(dtype)  # (B, P, K)
    return member, member.sum(1)[:, None, None]


def _class_sums(features: Tensor, member: Tensor) -> Tensor:
    """Sum over the pixels of each class, as one product of matrices: (B, M, C, h, w) -> (B, M, C, K)."""
    rows = _wide(features).flatten(3).flatten(1, 2)  # (B, M*C, P)
    return torch.bmm(rows, member).unflatten(1, features.shape[1:3])


def prototype_pool(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Paper eq. 4: the mean of the features over the pixels of each class; see `kernels.prototype_pool`."""
    member, counts = _members(labels, num_classes, torch.promote_types(features.dtype, torch.float32))
    prototypes = (_class_sums(features, member) / counts.clamp(min=1)).transpose(2, 3)  # (B, M, K, C)
    return prototypes, counts[:, 0, 0].to(torch.int32)  # (B, K)


def prototype_distance(
    student: Tensor, teacher: Tensor, labels: Tensor, present: Tensor, match: Tensor, num_classes: int
) -> Tensor:
    """Paper eq. 5 with the masked softmax over the classes that occur; see `kernels.prototype_distance`."""
    C = student.shape[2]
    member, counts = _members(labels, num_classes, torch.promote_types(student.dtype, torch.float32))
    seen = present[:, :, None, None] & (counts > 0)  # (B, M, 1, K)
    student_prototypes = _class_sums(student, member) / counts.clamp(min=1)  # (B, M, C, K)
    teacher_prototypes = _class_sums(teacher.detach(), member) / counts.clamp(min=1)
    matched = match[:, :, None, None].expand_as(teacher_prototypes)
    teacher_prototypes = teacher_prototypes.gather(1, matched)  # (B, M, C, K), row m the teacher's match[b, m]
    # An absent pair is masked before the softmax as well, so that whatever its features hold stays out.
    log_s = student_prototypes.masked_fill(~seen, MASKED).log_softmax(3)
    log_t = teacher_prototypes.masked_fill(~seen, MASKED).log_softmax(3)
    divergence = torch.where(seen, log_t.exp() * (log_t - log_s), 0)  # (B, M, C, K)
    return divergence.sum() / (C * present.sum().clamp(min=1))


def pixel_prototype_cosine(features: Tensor, labels: Tensor, prototypes: Tensor) -> Tensor:
    """Intra-class variation (DESIGN section 5, second half); see `kernels.pixel_prototype_cosine`.

    All K products of a pixel are one matrix product and its own class's is picked: (B, M, K, P) is smaller than
    the (B, M, C, P) map of centres for every stage with C > K.
    """
    B, M, C, h, w = features.shape
    K = prototypes.shape[2]
    features = _wide(features).reshape(B, M, C, h * w)  # (B, M, C, P)
    prototypes = _wide(prototypes).to(features.dtype)
    labels = labels.reshape(B, 1, h * w)  # (B, 1, P)
    inside = (labels >= 0) & (labels < K)
    own = labels.where(inside, 0).expand(B, M, h * w)  # (B, M, P), class 0 stands in for the ignored
    dot = (prototypes @ features).gather(2, own[:, :, None])[:, :, 0]  # (B, M, K, P) -> (B, M, P)
    norms = features.square().sum(2) * prototypes.square().sum(3).gather(2, own)  # |f|^2 |p|^2, (B, M, P)
    valid = inside & (norms > COSINE_EPS**2)
    cosine = torch.where(valid, dot * norms.where(valid, 1).rsqrt(), 0)
    return cosine.reshape(B, M, h, w)


def _scores(features: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """The folded 3x3 convolution and its sigmoid -> (S, B, 1, h, w) in float32 (or float64)."""
    S, B = len(features), features[0].shape[0]
    pairs = zip(features, weight, strict=True)
    maps = torch.stack([F.conv2d(_wide(f), _wide(w)[None], padding=1) for f, w in pairs])
    bias = _wide(bias).reshape(-1, S).t().reshape(S, -1, 1, 1, 1)  # (S, 1 or B, 1, 1, 1)
    return torch.sigmoid(maps + bias.expand(S, B, 1, 1, 1))


def feature_score(features: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """sigmoid(conv3x3(f) + bias) per source; see `kernels.feature_score`."""
    return _scores(features, weight, bias).to(features[0].dtype)


def feature_score_select(
    features: list[Tensor], weight: Tensor, bias: Tensor, temperature: float | None
) -> tuple[Tensor, Tensor]:
    """Feature Selection: scores, candidates (1 + s) f, and their hard or relaxed choice; see the public call."""
    dtype = features[0].dtype
    scores = _scores(features, weight, bias)  # (S, B, 1, h, w)
    sources = torch.stack([_wide(f) for f in features])  # (S, B, C, h, w)
    candidates = (1 + scores) * sources
    if temperature is None:
        choice = candidates.argmax(0, keepdim=True)  # (1, B, C, h, w), ties: the first source
        selected = sources.gather(0, choice)[0]
        share = torch.stack([(choice == j).float().mean() for j in range(len(features))])
    else:
        weights = torch.softmax(candidates / temperature, 0)
        selected = (weights * sources).sum(0)
        share = weights.detach().float().mean((1, 2, 3, 4))
    return selected.to(dtype), share
