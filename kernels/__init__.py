"""The fused operations of RMMSS: the public calls, their checks, and the choice between Triton and PyTorch.

CUDA tensors take the Triton kernels (`prototype.py`: the loss of stage 1; `selection.py`: the FSM of stage 2), all
others the plain definitions in `reference.py`. `prototype_pool` and `pixel_prototype_cosine`, which no default run
calls, have the definition alone. The environment variable RMMSS_KERNELS, read at every call, overrules that:

    RMMSS_KERNELS=reference   the definitions everywhere
    RMMSS_KERNELS=triton      Triton everywhere; on CPU tensors only with TRITON_INTERPRET=1

Names inside the kernels: x_ptr is the address of tensor x, x_stride_b the elements between two neighbours along an
axis (b m c k, p flattened pixels, y x row and column); pid_* says which program this is, offs_* are indices along an
axis, mask_* the ones that exist; *_tile is a loaded block, acc_* a sum in float32. B M K C H W are sizes; every other
name in capitals is a compile-time constant.
"""

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import reference

try:
    from . import prototype, selection
except ModuleNotFoundError as error:  # macOS and Windows have no Triton: the definitions serve them
    if error.name != "triton":
        raise
    prototype = selection = None

__all__ = ["feature_select", "pixel_prototype_cosine", "prototype_distance", "prototype_pool"]

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RULES = ("hard", "candidate", "score")


def prototype_pool(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Prototypes (paper eq. 4): the mean feature of each class, per sample and modality.

    features (B, M, C, h, w) floating; labels (B, h, w) int64, values outside 0..K-1 (255) belong to no class.
    Returns prototypes (B, M, K, C) float32, zeros for a class without a pixel, and counts (B, K) int32.
    Differentiable with respect to the features.
    """
    _check_maps("features", features, labels, num_classes)
    return _define(reference.prototype_pool, features, labels, num_classes)


def prototype_distance(
    student: Tensor, teacher: Tensor, labels: Tensor, present: Tensor, match: Tensor, num_classes: int
) -> Tensor:
    """Hybrid prototype distance of one stage (paper eq. 5), a float32 scalar >= 0.

    student, teacher (B, M, C, h, w) of one dtype; labels (B, h, w) int64 at the stage's size, 255 = ignore;
    present (B, M) bool: the modalities the student has; match (B, M) int64 in 0..M-1 (not checked, which
    would wait for the GPU): the student's modality m answers to the teacher's modality match[b, m].

    Per channel, softmax over the classes that occur in the sample turns the prototypes into a distribution;
    KL(teacher || student) is summed over classes and averaged over channels and present (sample, modality) pairs.
    A sample without a labelled pixel adds 0. Gradient to the student only; absent modalities get zeros.
    """
    _check_maps("student", student, labels, num_classes)
    _check("teacher", teacher, "the student's", student.shape, student.dtype, student.device)
    _check("present", present, "(B, M)", student.shape[:2], torch.bool, student.device)
    _check("match", match, "(B, M)", student.shape[:2], torch.int64, student.device)
    args = (student, teacher.detach(), labels, present, match, num_classes)
    if _wants_triton(student):
        return prototype.prototype_distance(*args)
    return _define(reference.prototype_distance, *args)


def pixel_prototype_cosine(features: Tensor, labels: Tensor, prototypes: Tensor) -> Tensor:
    """Cosine between each pixel's feature and the prototype of its class -> (B, M, h, w) float32 in -1..1.

    features (B, M, C, h, w), labels (B, h, w) int64, prototypes (B, M, K, C) float32. 0 where the label is outside
    0..K-1, and where the product of the two norms is at most 1e-8: there is no direction to compare there, and the
    gradient is 0 too. Differentiable with respect to features and prototypes. (Intra-class feature variation of
    the CVPR 2026 version of the paper.)
    """
    _check_maps("features", features, labels)
    _check_floating("prototypes", prototypes, "(B, M, K, C)")
    (B, M, C), K = features.shape[:3], prototypes.shape[2]
    _check("prototypes", prototypes, "(B, M, K, C)", (B, M, K, C), prototypes.dtype, features.device)
    return _define(reference.pixel_prototype_cosine, features, labels, prototypes)


def feature_select(
    features: Sequence[Tensor], weight: Tensor, bias: Tensor, rule: str, temperature: float
) -> tuple[Tensor, Tensor]:
    """Feature Selection (stage 2 of the paper): from S sources to one.

    features: S tensors (B, C, h, w) of one dtype (the paper has two, and so has the Triton kernel); weight
    (S, C, 3, 3): the depth-wise 3x3 and the 1x1 convolution folded into one, as nothing non-linear stands between
    them; bias (S,) or, when it depends on the sample, (B, S). The scores are s_j = sigmoid(conv3x3(f_j) + bias_j),
    (B, 1, h, w), with zero padding. `rule` says how they give each source's weight v_j, with temperature > 0:

        "hard"       the paper's: 1 for the largest (1 + s_j) f_j (ties: the first), element by element, else 0
        "candidate"  softmax over the sources of (1 + s_j) f_j / temperature, element by element (not in the paper)
        "score"      softmax over the sources of s_j / temperature, per position (in the published code, commented out)

    Returns selected = sum_j v_j f_j (B, C, h, w) in the features' dtype, and share (S,) float32, each source's mean
    weight, without gradient. Gradients go to weight and bias only, by "hard" to nothing: the sources are frozen
    models. Features that require a gradient are refused.
    """
    features = list(features)
    if not features:
        raise ValueError("features is empty: give a list of tensors (B, C, h, w), one for each source.")
    first, S = features[0], len(features)
    _check_floating("features[0]", first, "(B, C, h, w)")
    if first[0].numel() >= 2**31:
        raise ValueError(f"features[0] is {tuple(first.shape)}: a sample must have less than 2^31 elements.")
    for j, x in enumerate(features):
        _check(f"features[{j}]", x, "as features[0]", first.shape, first.dtype, first.device)
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"features[{j}] requires a gradient, which feature_select does not compute: detach it.")
    _check("weight", weight, "(S, C, 3, 3)", (S, first.shape[1], 3, 3), weight.dtype, first.device)
    bias_shape = (S,) if bias.ndim == 1 else (first.shape[0], S)
    _check("bias", bias, "(S,) or (B, S)", bias_shape, bias.dtype, first.device)
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}: give one of {', '.join(RULES)}.")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: give a number above 0.")
    if S == 2 and _wants_triton(first):
        return selection.feature_select(features, weight, bias, rule, temperature)
    return _define(reference.feature_select, features, weight, bias, rule, temperature)


def _define(definition: Callable, *args):
    with torch.autocast(args[1].device.type, enabled=False):  # float32 products under autocast too
        return definition(*args)


def _wants_triton(tensor: Tensor) -> bool:
    choice = os.environ.get("RMMSS_KERNELS", "auto")
    if choice not in ("auto", "reference", "triton"):
        raise ValueError(f"RMMSS_KERNELS is {choice!r}: set it to reference or triton, or leave it unset.")
    runs = tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    possible = runs and tensor.dtype in TRITON_DTYPES and prototype is not None
    if choice == "triton" and not possible:
        raise ValueError("RMMSS_KERNELS=triton needs the package triton, features of 32 or 16 bits, and a GPU or "
                         f"TRITON_INTERPRET=1; found {tensor.dtype} on {tensor.device}: unset it.")  # fmt: skip
    return choice == "triton" or (choice == "auto" and possible and tensor.is_cuda)


def _check_maps(name: str, features: Tensor, labels: Tensor, num_classes: int = 1) -> None:
    _check_floating(name, features, "(B, M, C, h, w)")
    _check("labels", labels, "(B, h, w)", (features.shape[0], *features.shape[3:]), torch.int64, features.device)
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}: give at least 1.")


def _check_floating(name: str, x: Tensor, axes: str) -> None:
    if x.ndim != axes.count(",") + 1 or not x.is_floating_point() or x.numel() == 0:
        raise ValueError(f"{name} is {tuple(x.shape)} {x.dtype}: give floating {axes}, not empty.")


def _check(name: str, x: Tensor, axes: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    if x.shape != shape or x.dtype != dtype or x.device != device:
        found = f"{tuple(x.shape)} {x.dtype} on {x.device}"
        raise ValueError(f"{name} is {found}: give {axes} {tuple(shape)} {dtype} on {device}.")
