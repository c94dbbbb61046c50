"""The fused operations of RMMSS: the public calls, their checks, and the choice between Triton and PyTorch.

CUDA tensors take the Triton kernels (`prototype.py`: the loss of stage 1; `selection.py`: the FSM of stage 2), all
others the plain definitions in `reference.py`. The environment variable RMMSS_KERNELS, read at every call, chooses:

    RMMSS_KERNELS=reference   the definitions everywhere
    RMMSS_KERNELS=triton      Triton (prototype_distance: up to 256 classes; feature_select: for two sources);
                              on CPU tensors only with TRITON_INTERPRET=1

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
except ModuleNotFoundError as error:  # requirements.txt installs Triton on Linux alone: elsewhere the definitions serve
    if error.name != "triton":
        raise
    prototype = selection = None

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RULES = ("hard", "candidate", "score")


def prototype_distance(
    student: Tensor, teacher: Tensor, labels: Tensor, present: Tensor, match: Tensor, num_classes: int
) -> Tensor:
    """Hybrid prototype distance of one stage (paper eqs. 4 and 5), a float32 scalar >= 0.

    student, teacher (B, M, C, h, w) of one dtype; labels (B, h, w) int64 at the stage's size, 255 = ignore;
    present (B, M) bool: the modalities the student has; match (B, M) int64 in 0..M-1 (not checked, which
    would wait for the GPU): the student's modality m is matched with the teacher's modality match[b, m].

    Per channel, softmax over the classes that occur in the sample turns the prototypes into a distribution.
    KL(teacher || student) is summed over the present modalities, the channels and the samples, then divided by K, C
    and B, as published. A sample without a labelled pixel adds 0. Gradient to the student only; absent modalities get
    zeros.
    """
    _check_floating("student", student, "(B, M, C, h, w)")
    _check("labels", labels, "(B, h, w)", (student.shape[0], *student.shape[3:]), torch.int64, student.device)
    _check("teacher", teacher, "the student's", student.shape, student.dtype, student.device)
    _check("present", present, "(B, M)", student.shape[:2], torch.bool, student.device)
    _check("match", match, "(B, M)", student.shape[:2], torch.int64, student.device)
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}: give at least 1.")
    args = (student, teacher.detach(), labels, present, match, num_classes)
    if _wants_triton(student) and num_classes <= prototype.MAX_CLASSES:
        return prototype.prototype_distance(*args)
    return _by_definition(reference.prototype_distance, *args)


def feature_select(features: Sequence[Tensor], weight: Tensor, bias: Tensor, rule: str, temperature: float) -> Tensor:
    """Feature Selection (stage 2 of the paper): from S sources to one.

    features: S tensors (B, C, h, w) of one dtype (the paper has two, and so has the Triton kernel); weight
    (S, C, 3, 3): the depth-wise 3x3 and the 1x1 convolution folded into one, as nothing non-linear stands between
    them; bias (S,) or, when it depends on the sample, (B, S). The scores are s_j = sigmoid(conv3x3(f_j) + bias_j),
    (B, 1, h, w), with zero padding. `rule` says how they give each source's weight v_j, with temperature > 0:

        "hard"       the paper's: 1 for the largest (1 + s_j) f_j (ties: the first), element by element, else 0
        "candidate"  softmax over the sources of (1 + s_j) f_j / temperature, element by element (not in the paper)
        "score"      softmax over the sources of s_j / temperature, per position (in the published code, commented out)

    Returns sum_j v_j f_j (B, C, h, w) in the features' dtype. Gradients go to weight and bias only, by "hard" to
    nothing: the sources are frozen models. Features that require a gradient are refused.
    """
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
    return _by_definition(reference.feature_select, features, weight, bias, rule, temperature)


def _by_definition(definition: Callable, *args):
    with torch.autocast(args[1].device.type, enabled=False):  # args[1]: a tensor in both. float32 under autocast too
        return definition(*args)


def _wants_triton(tensor: Tensor) -> bool:
    choice = os.environ.get("RMMSS_KERNELS", "auto")
    if choice not in ("auto", "reference", "triton"):
        raise ValueError(f"RMMSS_KERNELS is {choice!r}: set it to reference or triton, or leave it unset.")
    runs = tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    possible = runs and tensor.dtype in TRITON_DTYPES and prototype is not None
    if choice == "triton" and not possible:
        what = "the package triton, features of 32 or 16 bits, and a GPU or TRITON_INTERPRET=1"
        raise ValueError(f"RMMSS_KERNELS=triton needs {what}; found {tensor.dtype} on {tensor.device}: unset it.")
    return choice == "triton" or (choice == "auto" and possible and tensor.is_cuda)


def _check_floating(name: str, x: Tensor, axes: str) -> None:
    if x.ndim != axes.count(",") + 1 or not x.is_floating_point() or x.numel() == 0:
        raise ValueError(f"{name} is {tuple(x.shape)} {x.dtype}: give floating {axes}, not empty.")


def _check(name: str, x: Tensor, axes: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    if x.shape != shape or x.dtype != dtype or x.device != device:
        found = f"{tuple(x.shape)} {x.dtype} on {x.device}"
        raise ValueError(f"{name} is {found}: give {axes} {tuple(shape)} {dtype} on {device}.")
