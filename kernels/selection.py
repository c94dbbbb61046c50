"""Feature Selection: the folded convolution, sigmoid, weighting and selection of two sources, for the GPU.

Called in a default run: by `fsm.FSM`, for the four stages and the logits in every step of stage 2, in `train_fsm` with
the gradients of the scores, and wherever the ensemble is evaluated. All come channels-last and float32, but under
autocast the logits, and a CMNeXt's features, are bfloat16. Both layouts are read and written 16 bytes at a time, where
rows are multiples of 16 bytes (25 classes channels-last are not).

Axes: B samples, C channels, H x W pixels of a level; j = 0, 1 the sources (teacher, robust model), t = 0..8 the taps of
a 3x3 kernel, o_t their offsets. tau is the temperature, g the gradient of the selection.

Score        z_j[q] = bias_j + sum_t sum_c w_j[c,t] f_j[c, q + o_t],   s_j = sigmoid(z_j)
             (the depth-wise 3x3 and the 1x1 convolution of the paper's score predictor, folded into one)
Weight       of source 1, a softmax over two: "score"      v = sigmoid((s_1 - s_0) / tau), one for a pixel's channels
                                              "candidate"  v = sigmoid(((1 + s_1) f_1 - (1 + s_0) f_0) / tau)
                                              "hard"       v = 1 where (1 + s_1) f_1 > (1 + s_0) f_0: the paper's rule
Selection    selected = (1 - v) f_0 + v f_1
Backward     d = v (1 - v) (f_1 - f_0) g / tau
             "score": ds_1 = -ds_0 = sum_c d;   "candidate": ds_1 = sum_c f_1 d, ds_0 = -sum_c f_0 d
             dz_j = s_j (1 - s_j) ds_j,   dw_j[c,t] = sum_p f_j[c,p] dz_j[p - o_t],   db_j = sum_p dz_j
             None for "hard", and none to the features: the sources are frozen models.

Two kernels forward, two backward, each a plain pass over the pixels. A stencil would read each feature nine times.
Instead one product on tensor cores, (9 taps x C) times (C x P), gives u_j[t,p] = sum_c w_j[c,t] f_j[c,p], and only
these sums are shifted: z_j[q] = bias_j + sum_t u_j[t, q + o_t]. The weight's gradient is the transposed product, with
dz shifted. Both are three TF32 products, close to float32 (tf32x3).

Bytes that move, with N bytes in one source and T = 36 P in its taps: forward 2 N + 2 T, then 2 T + 3 N; backward 3 N,
then 2 N. B0 on DELIVER (1024 x 1024, batch 2): N = 17, 8, 5 and 2 MB at the stages, 210 MB at the logits; T = 4.7 MB at
stage 1, 75 MB at the logits. Fused away: the candidates, the weights, the convolution's nine shifted copies. Sums over
chunks of pixels are added in a fixed order, without atomics: the result is the same every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .prototype import chunk_size


# ------------------------------------------------------------------------------------------------ jit kernels
@triton.jit
def load_features(x_ptr, offs_c, offs_p, C, P, stride_c, stride_p):
    """(BLOCK_C, BLOCK_P) of one source and sample as float32, 0 outside; 32-bit offsets within a sample."""
    mask = (offs_c < C)[:, None] & (offs_p < P)[None, :]
    return tl.load(x_ptr + (offs_c[:, None] * stride_c + offs_p[None, :] * stride_p), mask=mask, other=0).to(tl.float32)


@triton.jit
def neighbour(offs_p, dy, dx, H, W):
    """The pixel dy below and dx to the right, and whether it is in the image."""
    y = offs_p // W + dy
    x = offs_p % W + dx
    return y * W + x, (y >= 0) & (y < H) & (x >= 0) & (x < W)


@triton.jit
def taps_kernel(
    x_0_ptr, x_1_ptr, weight_ptr, taps_ptr, B, C, P, x_strides, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Products of one source's features with the nine taps, at their own pixel.

    Reads x_0, x_1 (B, C, P), of equal strides, and weight (2, C, 9) float32, contiguous; writes taps (2, B, 9, P)
    float32, contiguous.
    """
    j = tl.program_id(1) // B
    b = (tl.program_id(1) % B).to(tl.int64)
    offs_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_t = tl.arange(0, 16)  # a side of a product is a multiple of 16
    x_ptr = (x_1_ptr if j > 0 else x_0_ptr) + b * x_strides[0]
    acc_taps = tl.zeros((16, BLOCK_P), tl.float32)
    for c in range(0, C, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        offs_w = (j * C + offs_c)[None, :] * 9 + offs_t[:, None]
        w_tile = tl.load(weight_ptr + offs_w, mask=(offs_t < 9)[:, None] & (offs_c < C)[None, :], other=0)
        x_tile = load_features(x_ptr, offs_c, offs_p, C, P, x_strides[1], x_strides[2])
        acc_taps = tl.dot(w_tile, x_tile, acc_taps, input_precision="tf32x3")
    offs = (tl.program_id(1) * 9 + offs_t).to(tl.int64)[:, None] * P + offs_p[None, :]
    tl.store(taps_ptr + offs, acc_taps, mask=(offs_t < 9)[:, None] & (offs_p < P)[None, :])


@triton.jit
def score(taps_ptr, bias, offs_p, H, W):
    """Scores (BLOCK_P,) of one source and sample; taps (9, P)."""
    z = bias + tl.zeros_like(offs_p).to(tl.float32)
    for t in tl.static_range(9):
        q, inside = neighbour(offs_p, t // 3 - 1, t % 3 - 1, H, W)
        z += tl.load(taps_ptr + q, mask=inside, other=0)
        taps_ptr += H * W
    return 1 / (1 + tl.exp(-z))


@triton.jit
def weigh(x_0, x_1, score_0, score_1, temperature, RULE: tl.constexpr):
    """Weight v of source 1 (BLOCK_C, pixels), for "score" one row of it."""
    logit_0 = score_0[None, :]
    logit_1 = score_1[None, :]
    if RULE != "score":
        logit_0 = (1 + logit_0) * x_0
        logit_1 = (1 + logit_1) * x_1
    if RULE == "hard":  # as arg-max: of equal ones the first, and NaN above all numbers, so that none is hidden
        return ((logit_0 == logit_0) & ~(logit_1 <= logit_0)).to(tl.float32)
    return 1 / (1 + tl.exp((logit_0 - logit_1) / temperature))


@triton.jit
def select_kernel(
    x_0_ptr,
    x_1_ptr,  # (B, C, P) each, of equal strides; read
    taps_ptr,  # (2, B, 9, P) float32, contiguous; read
    bias_ptr,  # (B, 2) float32, any strides; read
    scores_ptr,  # (2, B, P) float32, contiguous; written
    selected_ptr,  # (B, C, P), strides as the sources; written
    B,
    C,
    H,
    W,
    x_strides,
    bias_strides,
    temperature,
    RULE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Scores of BLOCK_P pixels, then the selection of BLOCK_C of their channels."""
    b = tl.program_id(2).to(tl.int64)
    P = H * W
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    bias_ptr += b * bias_strides[0]
    score_0 = score(taps_ptr + b * 9 * P, tl.load(bias_ptr), offs_p, H, W)
    score_1 = score(taps_ptr + (B + b) * 9 * P, tl.load(bias_ptr + bias_strides[1]), offs_p, H, W)
    if tl.program_id(1) == 0:
        tl.store(scores_ptr + b * P + offs_p, score_0, mask=offs_p < P)
        tl.store(scores_ptr + (B + b) * P + offs_p, score_1, mask=offs_p < P)

    x_0 = load_features(x_0_ptr + b * x_strides[0], offs_c, offs_p, C, P, x_strides[1], x_strides[2])
    x_1 = load_features(x_1_ptr + b * x_strides[0], offs_c, offs_p, C, P, x_strides[1], x_strides[2])
    v = weigh(x_0, x_1, score_0, score_1, temperature, RULE)
    if RULE == "hard":
        selected = tl.where(v > 0, x_1, x_0)
    else:
        selected = (1 - v) * x_0 + v * x_1
    offs = offs_c[:, None] * x_strides[1] + offs_p[None, :] * x_strides[2]
    mask = (offs_c < C)[:, None] & (offs_p < P)[None, :]
    tl.store(selected_ptr + b * x_strides[0] + offs, selected, mask=mask)


@triton.jit
def score_backward_kernel(
    x_0_ptr,
    x_1_ptr,  # (B, C, P) each, of equal strides; read
    scores_ptr,  # (2, B, P) float32, contiguous; read
    grad_ptr,  # (B, C, P) gradient of the selection, any strides; read
    dz_ptr,  # (2, B, P) float32, contiguous; written
    B,
    C,
    P,
    x_strides,
    grad_strides,
    temperature,
    RULE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Gradients of both scores, before the sigmoid, at BLOCK_P pixels."""
    b = tl.program_id(1).to(tl.int64)
    offs_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    score_0 = tl.load(scores_ptr + b * P + offs_p, mask=offs_p < P, other=0)
    score_1 = tl.load(scores_ptr + (B + b) * P + offs_p, mask=offs_p < P, other=0)
    acc_0 = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    acc_1 = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for c in range(0, C, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        x_0 = load_features(x_0_ptr + b * x_strides[0], offs_c, offs_p, C, P, x_strides[1], x_strides[2])
        x_1 = load_features(x_1_ptr + b * x_strides[0], offs_c, offs_p, C, P, x_strides[1], x_strides[2])
        g_tile = load_features(grad_ptr + b * grad_strides[0], offs_c, offs_p, C, P, grad_strides[1], grad_strides[2])
        v = weigh(x_0, x_1, score_0, score_1, temperature, RULE)
        d = v * (1 - v) * (1 / temperature) * (x_1 - x_0) * g_tile
        if RULE == "candidate":
            acc_0 -= x_0 * d
            acc_1 += x_1 * d
        else:
            acc_1 += d
    grad_1 = tl.sum(acc_1, axis=0)
    grad_0 = tl.sum(acc_0, axis=0) if RULE == "candidate" else -grad_1
    tl.store(dz_ptr + b * P + offs_p, grad_0 * score_0 * (1 - score_0), mask=offs_p < P)
    tl.store(dz_ptr + (B + b) * P + offs_p, grad_1 * score_1 * (1 - score_1), mask=offs_p < P)


@triton.jit
def weight_backward_kernel(
    x_0_ptr, x_1_ptr, dz_ptr, parts_ptr, B, C, H, W, chunk, x_strides, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):
    """The gradient of BLOCK_C channels' weights, of one source, from one chunk of pixels of one sample.

    Reads x_0, x_1 (B, C, P), of equal strides, and dz (2, B, P) float32, contiguous; writes parts (2, B, CHUNKS, C, 9)
    float32, contiguous: each chunk's part of the weight's gradient.
    """
    j = tl.program_id(2) // B
    b = (tl.program_id(2) % B).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_t = tl.arange(0, 16)  # a side of a product is a multiple of 16
    P = H * W
    x_ptr = (x_1_ptr if j > 0 else x_0_ptr) + b * x_strides[0]
    dz_ptr += tl.program_id(2).to(tl.int64) * P
    acc_w = tl.zeros((16, BLOCK_C), tl.float32)
    start = tl.program_id(0) * chunk
    for p in range(start, tl.minimum(start + chunk, P), BLOCK_P):
        offs_p = p + tl.arange(0, BLOCK_P)
        q, inside = neighbour(offs_p[None, :], 1 - offs_t[:, None] // 3, 1 - offs_t[:, None] % 3, H, W)
        inside = inside & (offs_t < 9)[:, None] & (offs_p < P)[None, :]
        dz_taps = tl.load(dz_ptr + q, mask=inside, other=0)  # (16, BLOCK_P)
        x_tile = load_features(x_ptr, offs_c, offs_p, C, P, x_strides[1], x_strides[2])
        acc_w = tl.dot(dz_taps, tl.trans(x_tile), acc_w, input_precision="tf32x3")
    parts_ptr += (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * C * 9
    mask = (offs_t < 9)[:, None] & (offs_c < C)[None, :]
    tl.store(parts_ptr + offs_c[None, :] * 9 + offs_t[:, None], acc_w, mask=mask)


# ------------------------------------------------------------------------------------------------ launchers
def launch_select(
    x_0: Tensor, x_1: Tensor, weight: Tensor, bias: Tensor, rule: str, temperature: float
) -> tuple[Tensor, Tensor]:
    """Sources (B, C, H, W), weight (2, C, 3, 3), bias (B, 2) -> selected like a source, scores (2, B, H, W)."""
    B, C, H, W = x_0.shape
    strides, pixel_blocks = x_0.flatten(2).stride(), triton.cdiv(H * W, 128)
    taps = torch.empty((2, B, 9, H, W), device=x_0.device, dtype=torch.float32)
    scores = torch.empty((2, B, H, W), device=x_0.device, dtype=torch.float32)
    selected = torch.empty_like(x_0)
    block = {"BLOCK_C": 32, "BLOCK_P": 128, "num_warps": 4, "num_stages": 1, "maxnreg": 255}  # else ptxas may spill
    with torch.cuda.device_of(x_0):  # Triton launches on the current device, whatever its arguments lie on
        taps_kernel[(pixel_blocks, 2 * B)](x_0, x_1, weight, taps, B, C, H * W, strides, **block)
        grid = (pixel_blocks, triton.cdiv(C, 32), B)
        sources = x_0, x_1, taps, bias, scores, selected
        select_kernel[grid](*sources, B, C, H, W, strides, bias.stride(), temperature, RULE=rule, **block)
    return selected, scores


def launch_backward(
    grad: Tensor, x_0: Tensor, x_1: Tensor, scores: Tensor, rule: str, temperature: float
) -> tuple[Tensor, Tensor]:
    """Gradient of the selection (B, C, H, W) -> gradients of weight (2, C, 3, 3) and bias (B, 2)."""
    B, C, H, W = grad.shape
    P, grad, strides = H * W, grad.flatten(2), x_0.flatten(2).stride()
    dz = torch.empty_like(scores)
    channel_blocks = triton.cdiv(C, 32)
    chunk = chunk_size(P, channel_blocks * 2 * B)
    parts = torch.empty((2, B, triton.cdiv(P, chunk), C, 9), device=grad.device, dtype=torch.float32)
    with torch.cuda.device_of(grad):
        sizes = B, C, P, strides, grad.stride(), temperature
        block = {"BLOCK_C": 32, "BLOCK_P": 64, "num_warps": 4}
        score_backward_kernel[(triton.cdiv(P, 64), B)](x_0, x_1, scores, grad, dz, *sizes, RULE=rule, **block)
        sizes = B, C, H, W, chunk, strides
        # one warp, so that no two fetch the same values
        block = {"BLOCK_C": 32, "BLOCK_P": 32, "num_warps": 1, "num_stages": 1, "maxnreg": 255}
        weight_backward_kernel[(parts.shape[2], channel_blocks, 2 * B)](x_0, x_1, dz, parts, *sizes, **block)
    return parts.sum((1, 2)).unflatten(2, (3, 3)), dz.sum((2, 3)).t()


class FeatureSelect(torch.autograd.Function):
    """The selection; its gradient goes to weight and bias only."""

    @staticmethod
    def forward(ctx, x_0, x_1, weight, bias, rule, temperature):
        selected, scores = launch_select(x_0, x_1, weight, bias, rule, temperature)
        ctx.save_for_backward(x_0, x_1, scores)
        ctx.about = rule, temperature
        return selected

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return None, None, *launch_backward(grad, *ctx.saved_tensors, *ctx.about), None, None


# ------------------------------------------------------------------------------------------------ public call
def feature_select(features: list[Tensor], weight: Tensor, bias: Tensor, rule: str, temperature: float) -> Tensor:
    """Documented and checked in `__init__.py`."""
    x_0, x_1 = features
    layouts = torch.contiguous_format, torch.channels_last
    if not any(x_0.is_contiguous(memory_format=f) and x_1.is_contiguous(memory_format=f) for f in layouts):
        x_0, x_1 = x_0.contiguous(), x_1.contiguous()  # not in training: both models have one structure
    if rule == "hard":
        weight, bias = weight.detach(), bias.detach()
    bias = bias.float().expand(x_0.shape[0], 2)  # (B, 2)
    return FeatureSelect.apply(x_0, x_1, weight.float().contiguous(), bias, rule, float(temperature))
