"""Pixel-to-prototype cosine, fused for the GPU.

Axes: B samples, M modalities, K classes, C channels, P = h*w pixels.

    cos[b,m,i] = f_i . p[y_i] / (|f_i| |p[y_i]|),   0 for ignored pixels and where either has no direction

Bytes that must move, with N bytes in the (B, M, C, h, w) features: forward N, backward 2 N for the features' gradient
(read them, write it) and N for the prototypes', which is two poolings. Labels and the three maps (B, M, h, w) are small
beside it. The (B, M, C, h, w) map of each pixel's own prototype never exists.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .prototype import class_of, launch_class_sums
from .reference import COSINE_EPS

# ------------------------------------------------------------------------------------------------ jit kernels


@triton.jit
def cosine_kernel(
    x_ptr,  # (B, M, C, P) features; read
    labels_ptr,  # (B, P) int64; read
    prototypes_ptr,  # (B, M, K, C) float32; read
    cosine_ptr,  # (B, M, P) float32, contiguous; written
    inverse_ptr,  # (B, M, P) float32, contiguous: 1 / (|f| |p|), 0 where there is no direction; written
    square_ptr,  # (B, M, P) float32, contiguous: |f|^2; written
    M, C, P, K, x_stride_b, x_stride_m, x_stride_c, x_stride_p, labels_stride_b, labels_stride_p,
    p_stride_b, p_stride_m, p_stride_k, p_stride_c, eps,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One pass over the channels of BLOCK_P pixels of one (b, m); a pixel's prototype is looked up as it goes."""
    pid_p = tl.program_id(0)
    m = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    offs_p = pid_p * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < P
    label = class_of(labels_ptr + b * labels_stride_b, offs_p, mask_p, labels_stride_p, K)
    x_ptr += b * x_stride_b + m * x_stride_m
    own_ptrs = prototypes_ptr + b * p_stride_b + m * p_stride_m + label * p_stride_k
    acc_dot = tl.zeros((BLOCK_P,), tl.float32)
    acc_x = tl.zeros((BLOCK_P,), tl.float32)
    acc_own = tl.zeros((BLOCK_P,), tl.float32)
    for c in range(0, C, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        mask = (offs_c < C)[:, None] & (label >= 0)[None, :]
        x_ptrs = x_ptr + offs_c.to(tl.int64)[:, None] * x_stride_c + offs_p[None, :] * x_stride_p
        x_tile = tl.load(x_ptrs, mask=mask, other=0).to(tl.float32)
        own_tile = tl.load(own_ptrs[None, :] + offs_c[:, None] * p_stride_c, mask=mask, other=0)
        acc_dot += tl.sum(x_tile * own_tile, axis=0)
        acc_x += tl.sum(x_tile * x_tile, axis=0)
        acc_own += tl.sum(own_tile * own_tile, axis=0)
    norms = acc_x * acc_own
    inverse = tl.where(norms > eps * eps, tl.rsqrt(tl.where(norms > eps * eps, norms, 1.0)), 0.0)
    offs = (b * M + m) * P + offs_p
    tl.store(cosine_ptr + offs, acc_dot * inverse, mask=mask_p)
    tl.store(inverse_ptr + offs, inverse, mask=mask_p)
    tl.store(square_ptr + offs, acc_x, mask=mask_p)


@triton.jit
def cosine_backward_kernel(
    x_ptr,  # (B, M, C, P) features; read
    labels_ptr,  # (B, P) int64; read
    prototypes_ptr,  # (B, M, K, C) float32; read
    grad_ptr,  # (B, M, P) float32, contiguous: of the cosine; read
    cosine_ptr,  # (B, M, P) float32, contiguous; read
    inverse_ptr,  # (B, M, P) float32, contiguous; read
    square_ptr,  # (B, M, P) float32, contiguous; read
    out_ptr,  # (B, M, C, P): gradient of the features; written
    M, C, P, K, x_stride_b, x_stride_m, x_stride_c, x_stride_p, labels_stride_b, labels_stride_p,
    p_stride_b, p_stride_m, p_stride_k, p_stride_c, out_stride_b, out_stride_m, out_stride_c, out_stride_p,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """df = g (p / (|f| |p|) - cos f / |f|^2): both factors belong to the pixel, so channels are independent."""
    pid_p = tl.program_id(0)
    m = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    offs_p = pid_p * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < P
    label = class_of(labels_ptr + b * labels_stride_b, offs_p, mask_p, labels_stride_p, K)
    offs = (b * M + m) * P + offs_p
    inverse = tl.load(inverse_ptr + offs, mask=mask_p, other=0)
    valid = inverse > 0
    grad = tl.load(grad_ptr + offs, mask=valid, other=0)
    to_own = grad * inverse
    to_self = grad * tl.load(cosine_ptr + offs, mask=valid, other=0) / tl.load(square_ptr + offs, mask=valid, other=1)
    x_ptr += b * x_stride_b + m * x_stride_m
    out_ptr += b * out_stride_b + m * out_stride_m
    own_ptrs = prototypes_ptr + b * p_stride_b + m * p_stride_m + label * p_stride_k
    for c in range(0, C, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        mask_c = (offs_c < C)[:, None]
        x_ptrs = x_ptr + offs_c.to(tl.int64)[:, None] * x_stride_c + offs_p[None, :] * x_stride_p
        x_tile = tl.load(x_ptrs, mask=mask_c & valid[None, :], other=0).to(tl.float32)
        own_tile = tl.load(own_ptrs[None, :] + offs_c[:, None] * p_stride_c, mask=mask_c & valid[None, :], other=0)
        out_tile = to_own[None, :] * own_tile - to_self[None, :] * x_tile
        out_ptrs = out_ptr + offs_c.to(tl.int64)[:, None] * out_stride_c + offs_p[None, :] * out_stride_p
        tl.store(out_ptrs, out_tile, mask=mask_c & mask_p[None, :])


# -------------------------------------------------------------------------------------------------- launchers

COSINE_BLOCKS = {"BLOCK_C": 16, "BLOCK_P": 256, "num_warps": 8}


def launch_cosine(x: Tensor, labels: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, M, C, P), (B, P), (B, M, K, C) -> cosine, 1 / (|f| |p|) and |f|^2, each (B, M, P) float32."""
    B, M, C, P = x.shape
    cosine, inverse, square = (torch.empty((B, M, P), device=x.device, dtype=torch.float32) for _ in range(3))
    grid = (triton.cdiv(P, COSINE_BLOCKS["BLOCK_P"]), M, B)
    cosine_kernel[grid](
        x, labels, prototypes, cosine, inverse, square, M, C, P, prototypes.shape[2],
        *x.stride(), *labels.stride(), *prototypes.stride(), COSINE_EPS, **COSINE_BLOCKS,
    )  # fmt: skip
    return cosine, inverse, square


def launch_cosine_backward(
    x: Tensor, labels: Tensor, prototypes: Tensor, grad: Tensor, cosine: Tensor, inverse: Tensor, square: Tensor
) -> Tensor:
    """The gradient of the features (B, M, C, P), from that of the cosine (B, M, P) and the forward pass's maps."""
    B, M, C, P = x.shape
    out = torch.empty_like(x)
    grid = (triton.cdiv(P, COSINE_BLOCKS["BLOCK_P"]), M, B)
    cosine_backward_kernel[grid](
        x, labels, prototypes, grad, cosine, inverse, square, out, M, C, P, prototypes.shape[2],
        *x.stride(), *labels.stride(), *prototypes.stride(), *out.stride(), **COSINE_BLOCKS,
    )  # fmt: skip
    return out


# --------------------------------------------------------------------------------------------------- autograd


class PixelPrototypeCosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, labels, prototypes):
        cosine, inverse, square = launch_cosine(x, labels, prototypes)
        ctx.save_for_backward(x, labels, prototypes, cosine, inverse, square)
        return cosine

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, labels, prototypes, cosine, inverse, square = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = grad_prototypes = None
        if ctx.needs_input_grad[0]:
            grad_x = launch_cosine_backward(x, labels, prototypes, grad, cosine, inverse, square)
        if ctx.needs_input_grad[2]:
            # dp_k = sum over k's pixels of g f / (|f| |p|), less p_k / |p_k|^2 times the sum of g cos: two poolings
            K = prototypes.shape[2]
            to_x, _ = launch_class_sums(x, labels, K, factor=grad * inverse)  # (B, M, K, C)
            to_self, _ = launch_class_sums((grad * cosine)[:, :, None], labels, K)  # (B, M, K, 1)
            square = prototypes.square().sum(3, keepdim=True).clamp(min=COSINE_EPS**2)
            grad_prototypes = to_x - to_self / square * prototypes
        return grad_x, None, grad_prototypes


# ------------------------------------------------------------------------------------------------ public call
# Documented and checked in __init__.py. flatten is a view of contiguous and channels-last maps, and copies others.


def pixel_prototype_cosine(features: Tensor, labels: Tensor, prototypes: Tensor) -> Tensor:
    cosine = PixelPrototypeCosine.apply(features.flatten(3), labels.flatten(1), prototypes.float())  # (B, M, P)
    return cosine.unflatten(2, features.shape[3:])  # (B, M, h, w)
