"""The fused operations of RMMSS: the public calls, their checks, and the choice between Triton and PyTorch.

CUDA tensors take the Triton kernels (`prototype.py`, `cosine.py`, `feature_score.py`), all others the plain definitions
in `reference.py`. The environment variable RMMSS_KERNELS, read at every call, overrules that:

    RMMSS_KERNELS=reference   the definitions everywhere
    RMMSS_KERNELS=triton      Triton everywhere; on CPU tensors only with TRITON_INTERPRET=1

Names inside the kernels follow one scheme:

    x_ptr           base address of tensor x; its comment gives shape and what is read or written
    x_stride_b      elements between two neighbours along that axis: b m c k p (flattened pixels) y x (row, column)
    pid_*           which program this is along an axis of the grid
    offs_*          a vector of indices along an axis; mask_* the ones of them that exist
    BLOCK_*         compile-time extent of a tile along an axis, a power of two
    B M K C H W     sizes; every other name in capitals is a compile-time constant
    *_tile          a loaded block; acc_* an accumulator in float32
"""

import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import reference

try:  # here, ahead of the functions below: importing the file feature_score.py later would hide the one of its name
    from . import cosine as _cosine
    from . import feature_score as _feature_score
    from . import prototype as _prototype
except ModuleNotFoundError as error:  # macOS and Windows have no Triton: the definitions serve them
    if error.name != "triton":
        raise
    _cosine = _feature_score = _prototype = None

__all__ = [
    "feature_score",
    "feature_score_select",
    "pixel_prototype_cosine",
    "prototype_distance",
    "prototype_pool",
]

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def prototype_pool(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Prototypes (paper eq. 4): the mean feature of each class, per sample and modality.

    features (B, M, C, h, w) floating; labels (B, h, w) int64, values outside 0..K-1 (255) belong to no class.
    Returns prototypes (B, M, K, C) float32, zeros for a class without a pixel, and counts (B, K) int32.
    Differentiable with respect to the features.
    """
    _check_maps("features", features, labels)
    _check_classes(num_classes)
    return _call(_prototype, "prototype_pool", features, features, labels, num_classes)


def prototype_distance(
    student: Tensor, teacher: Tensor, labels: Tensor, present: Tensor, match: Tensor, num_classes: int
) -> Tensor:
    """Hybrid prototype distance of one stage (paper eq. 5), a float32 scalar >= 0.

    student, teacher (B, M, C, h, w) of one dtype; labels (B, h, w) int64 at the stage's size, 255 = ignore;
    present (B, M) bool: the sensors the student has; match (B, M) int64 in 0..M-1 (not checked on the device):
    the student's modality m answers to the teacher's modality match[b, m].

    Per channel, softmax over the classes that occur in the sample turns the prototypes into a distribution;
    KL(teacher || student) is summed over classes and averaged over channels and present (sample, modality) pairs.
    A sample without a labelled pixel adds 0. Gradient to the student only; absent modalities get zeros.
    """
    _check_maps("student", student, labels)
    _check_classes(num_classes)
    if teacher.shape != student.shape or teacher.dtype != student.dtype:
        raise ValueError(
            f"teacher is {tuple(teacher.shape)} {teacher.dtype} and student {tuple(student.shape)} {student.dtype}: "
            "prototype_distance needs one shape and one dtype."
        )
    for name, tensor, dtype in (("present", present, torch.bool), ("match", match, torch.int64)):
        if tensor.shape != student.shape[:2] or tensor.dtype != dtype:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}: give (B, M) = {tuple(student.shape[:2])} {dtype}."
            )
    _check_device(student, teacher, labels, present, match)
    args = (student, teacher.detach(), labels, present, match, num_classes)
    return _call(_prototype, "prototype_distance", student, *args)


def pixel_prototype_cosine(features: Tensor, labels: Tensor, prototypes: Tensor) -> Tensor:
    """Cosine between each pixel's feature and the prototype of its class -> (B, M, h, w) float32 in -1..1.

    features (B, M, C, h, w), labels (B, h, w) int64, prototypes (B, M, K, C) float32. 0 where the label is outside
    0..K-1, and where the product of the two norms is at most 1e-8: there is no direction to compare there, and the
    gradient is 0 too. Differentiable with respect to features and prototypes. (Intra-class feature variation of
    the CVPR 2026 version of the paper.)
    """
    _check_maps("features", features, labels)
    B, M, C = features.shape[:3]
    if prototypes.ndim != 4 or (prototypes.shape[0], prototypes.shape[1], prototypes.shape[3]) != (B, M, C):
        raise ValueError(f"prototypes are {tuple(prototypes.shape)}: give (B, M, K, C) = ({B}, {M}, K, {C}).")
    _check_device(features, prototypes)
    return _call(_cosine, "pixel_prototype_cosine", features, features, labels, prototypes)


def feature_score(features: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """How much each position of each source counts: sigmoid of a 3x3 convolution C -> 1 with zero padding.

    features: S tensors (B, C, h, w) of one dtype; weight (S, C, 3, 3): the depth-wise 3x3 and the 1x1 convolution
    folded into one, as nothing non-linear stands between them; bias (S,) or, when it depends on the sample, (B, S).
    Returns scores (S, B, 1, h, w) in 0..1, in the features' dtype. Differentiable with respect to all three.
    """
    features = _check_sources(features, weight, bias)
    return _call(_feature_score, "feature_score", features[0], features, weight, bias)


def feature_score_select(
    features: Sequence[Tensor], weight: Tensor, bias: Tensor, temperature: float | None
) -> tuple[Tensor, Tensor]:
    """Feature Selection (stage 2 of the paper): from S sources to one, element by element.

    features, weight, bias as in `feature_score`. With the scores s_j, the candidates are (1 + s_j) f_j.
    temperature None, the published rule: the source with the largest candidate (ties: the first) passes on its
    unscaled feature; gradient to the features only, each element's to the source that was chosen.
    temperature > 0, not in the paper: weights softmax_j(candidate_j / temperature), selected = sum_j weight_j f_j;
    gradients to features, weight and bias.

    Returns selected (B, C, h, w) in the features' dtype, and share (S,) float32, each source's mean weight (hard:
    the part of the elements it was chosen for), a statistic without gradient.
    """
    features = _check_sources(features, weight, bias)
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature is {temperature}: give a number above 0, or None for the hard choice.")
    return _call(_feature_score, "feature_score_select", features[0], features, weight, bias, temperature)


def _call(fused: ModuleType | None, name: str, tensor: Tensor, *args):
    """Runs `name` from the file of Triton kernels or from the definitions."""
    if _wants_triton(tensor):
        with torch.cuda.device_of(tensor):  # Triton launches on the current device, whatever its arguments lie on
            return getattr(fused, name)(*args)
    with torch.autocast(tensor.device.type, enabled=False):  # float32 products under autocast too
        return getattr(reference, name)(*args)


def _wants_triton(tensor: Tensor) -> bool:
    choice = os.environ.get("RMMSS_KERNELS", "auto")
    if choice not in ("auto", "reference", "triton"):
        raise ValueError(f"RMMSS_KERNELS is {choice!r}: set it to reference or triton, or leave it unset.")
    if choice == "auto":
        return tensor.is_cuda and tensor.dtype in TRITON_DTYPES and _prototype is not None
    if choice == "reference":
        return False
    if _prototype is None:
        raise ValueError("RMMSS_KERNELS=triton, but triton is not installed: install it or unset RMMSS_KERNELS.")
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("RMMSS_KERNELS=triton runs CPU tensors in Triton's interpreter only: set TRITON_INTERPRET=1.")
    if tensor.dtype not in TRITON_DTYPES:
        raise ValueError(f"the Triton kernels take float32, bfloat16 and float16, not {tensor.dtype}.")
    return True


def _check_maps(name: str, features: Tensor, labels: Tensor) -> None:
    if features.ndim != 5 or not features.is_floating_point():
        raise ValueError(f"{name} is {tuple(features.shape)} {features.dtype}: give floating (B, M, C, h, w).")
    if features.numel() == 0:
        raise ValueError(f"{name} is {tuple(features.shape)}: an empty batch has no prototypes, skip it.")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype}: give int64.")
    expected = (features.shape[0], *features.shape[3:])
    if labels.shape != expected:
        raise ValueError(f"labels are {tuple(labels.shape)}: give (B, h, w) = {expected}, the size of the stage.")
    _check_device(features, labels)


def _check_classes(num_classes: int) -> None:
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}: give at least 1.")


def _check_sources(features: Sequence[Tensor], weight: Tensor, bias: Tensor) -> list[Tensor]:
    features = list(features)
    if not 1 <= len(features) <= 8:
        raise ValueError(f"features holds {len(features)} sources: give a list of 1 to 8 tensors (B, C, h, w).")
    first = features[0]
    if first.ndim != 4 or not first.is_floating_point():
        raise ValueError(f"features[0] is {tuple(first.shape)} {first.dtype}: give floating (B, C, h, w).")
    if first.numel() == 0:
        raise ValueError(f"features[0] is {tuple(first.shape)}: an empty batch has nothing to select, skip it.")
    for j, source in enumerate(features):
        if source.shape != first.shape or source.dtype != first.dtype:
            raise ValueError(
                f"features[{j}] is {tuple(source.shape)} {source.dtype} and features[0] {tuple(first.shape)} "
                f"{first.dtype}: all sources need one shape and one dtype."
            )
    S, (B, C) = len(features), first.shape[:2]
    if weight.shape != (S, C, 3, 3):
        raise ValueError(f"weight is {tuple(weight.shape)}: give (S, C, 3, 3) = {(S, C, 3, 3)}.")
    if bias.shape not in ((S,), (B, S)):
        raise ValueError(f"bias is {tuple(bias.shape)}: give (S,) = {(S,)} or one per sample, (B, S) = {(B, S)}.")
    _check_device(*features, weight, bias)
    return features


def _check_device(*tensors: Tensor) -> None:
    if len({tensor.device for tensor in tensors}) > 1:
        devices = ", ".join(str(tensor.device) for tensor in tensors)
        raise ValueError(f"the tensors lie on different devices ({devices}): move them to one.")
