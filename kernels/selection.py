"""Feature Selection: stencil, sigmoid, weighting and selection in one pass over the two sources, for the GPU.

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

Bytes that must move, with N bytes in one source: forward 2 N read, N written; backward 3 N read. B0 on DELIVER
(1024 x 1024, batch 2): N = 17, 8, 5 and 2 MB at the stages, 210 MB at the logits; maps with one channel are small
beside that. Fused away: the convolution's (B, C, H, W) output, the candidates, the weights.

A program owns a tile of pixels with a halo, for all channels. A stencil would read each feature nine times. Instead
one product on tensor cores, (16 taps x C) times (C x pixels), gives sum_c w[c,t] f[c,p] for every tap, and only these
sums are shifted. The weight's gradient is the transposed product, with dz shifted. Both are three TF32 products, close
to float32 (tf32x3). Once a tile's scores are known, its features are read again, from the cache. Sums over tiles are
added in a fixed order, without atomics: the result is the same every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# ------------------------------------------------------------------------------------------------ jit kernels


@triton.jit
def tile_pixels(H, W, HALO_X: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Rows and columns of this program's pixels, halo included; which are in the image, which are its own."""
    offs_t = tl.arange(0, TILE_H * TILE_W)
    row = offs_t // TILE_W
    column = offs_t % TILE_W
    y = tl.program_id(1) * (TILE_H - 2) + row - 1
    x = tl.program_id(0) * (TILE_W - 2 * HALO_X) + column - HALO_X
    inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
    own = inside & (row > 0) & (row < TILE_H - 1) & (column >= HALO_X) & (column < TILE_W - HALO_X)
    return y, x, inside, own


@triton.jit
def tap_offsets():
    """The 3 x 3 taps in a tile of 4 x 4, whose sides must be powers of two: place in memory, and which exist."""
    tap = tl.arange(0, 16)
    return tap // 4 * 3 + tap % 4, (tap // 4 < 3) & (tap % 4 < 3)


@triton.jit
def shifted(taps, SIGN: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """taps (16, pixels) -> taps[t, p + SIGN * o_t], for own pixels.

    Along the rows, then across them: a gather so short is a single exchange between the threads of a warp.
    """
    taps = tl.reshape(taps, (4, 4, TILE_H, TILE_W))  # row and column of the tap, y, x
    x = tl.arange(0, TILE_W)[None, None, None, :] + SIGN * (tl.arange(0, 4)[None, :, None, None] - 1)
    y = tl.arange(0, TILE_H)[None, None, :, None] + SIGN * (tl.arange(0, 4)[:, None, None, None] - 1)
    x = tl.minimum(tl.maximum(x, 0), TILE_W - 1)  # outside the tile only for the halo's pixels
    y = tl.minimum(tl.maximum(y, 0), TILE_H - 1)
    taps = tl.gather(taps, tl.broadcast_to(x, taps.shape), axis=3)
    taps = tl.gather(taps, tl.broadcast_to(y, taps.shape), axis=2)
    return tl.reshape(taps, (16, TILE_H * TILE_W))


@triton.jit
def load_features(x_ptr, offs_c, offs_p, mask_p, C, stride_c):
    """(BLOCK_C, pixels) of one source and sample as float32, 0 outside the mask; 32-bit offsets within a sample."""
    mask = (offs_c < C)[:, None] & mask_p[None, :]
    return tl.load(x_ptr + (offs_c[:, None] * stride_c + offs_p[None, :]), mask=mask, other=0).to(tl.float32)


@triton.jit
def score_tile(
    x_ptr,
    weight_ptr,
    bias,
    offs_p,
    inside,
    C,
    x_stride_c,
    BLOCK_C: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
):
    """Scores (pixels,) of one source and sample, valid for own pixels; weight (C, 9)."""
    offs_t, mask_t = tap_offsets()
    acc_taps = tl.zeros((16, TILE_H * TILE_W), tl.float32)
    for c in range(0, C, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        mask_w = mask_t[:, None] & (offs_c < C)[None, :]
        w_tile = tl.load(weight_ptr + offs_c[None, :] * 9 + offs_t[:, None], mask=mask_w, other=0)
        x_tile = load_features(x_ptr, offs_c, offs_p, inside, C, x_stride_c)
        acc_taps = tl.dot(w_tile, x_tile, acc_taps, input_precision="tf32x3")
    acc_taps = tl.where(mask_t[:, None], acc_taps, 0.0)  # 0 x NaN is NaN
    z = bias + tl.sum(shifted(acc_taps, 1, TILE_H, TILE_W), axis=0)
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
    x_1_ptr,  # (B, C, H, W) each, of equal strides; read
    weight_ptr,  # (2, C, 9) float32, contiguous; read
    bias_ptr,  # (B, 2) float32, any strides; read
    scores_ptr,  # (2, B, H, W) float32, contiguous; written
    selected_ptr,  # (B, C, H, W), strides as the sources; written
    B,
    C,
    H,
    W,
    x_stride_b,
    x_stride_c,
    x_stride_y,
    x_stride_x,
    bias_stride_b,
    bias_stride_s,
    temperature,
    RULE: tl.constexpr,
    HALO_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
):
    """Scores of a tile, then its selection."""
    HALF_C: tl.constexpr = BLOCK_C // 2  # where both sources take registers
    b = tl.program_id(2).to(tl.int64)
    y, x, inside, own = tile_pixels(H, W, HALO_X, TILE_H, TILE_W)
    offs_p = y * x_stride_y + x * x_stride_x
    x_0_ptr += b * x_stride_b
    x_1_ptr += b * x_stride_b
    selected_ptr += b * x_stride_b
    bias_0 = tl.load(bias_ptr + b * bias_stride_b)
    bias_1 = tl.load(bias_ptr + b * bias_stride_b + bias_stride_s)
    score_0 = score_tile(x_0_ptr, weight_ptr, bias_0, offs_p, inside, C, x_stride_c, BLOCK_C, TILE_H, TILE_W)
    score_1 = score_tile(x_1_ptr, weight_ptr + 9 * C, bias_1, offs_p, inside, C, x_stride_c, BLOCK_C, TILE_H, TILE_W)
    tl.store(scores_ptr + b * H * W + y * W + x, score_0, mask=own)
    tl.store(scores_ptr + (B + b) * H * W + y * W + x, score_1, mask=own)

    for c in range(0, C, HALF_C):
        offs_c = c + tl.arange(0, HALF_C)
        mask = (offs_c < C)[:, None] & own[None, :]
        x_0 = load_features(x_0_ptr, offs_c, offs_p, own, C, x_stride_c)
        x_1 = load_features(x_1_ptr, offs_c, offs_p, own, C, x_stride_c)
        v = weigh(x_0, x_1, score_0, score_1, temperature, RULE)
        if RULE == "hard":
            selected = tl.where(v > 0, x_1, x_0)
        else:
            selected = (1 - v) * x_0 + v * x_1
        tl.store(selected_ptr + (offs_c[:, None] * x_stride_c + offs_p[None, :]), selected, mask=mask)


@triton.jit
def weight_backward_kernel(
    x_0_ptr,
    x_1_ptr,  # (B, C, H, W) each, of equal strides; read
    scores_ptr,  # (2, B, H, W) float32, contiguous; read
    grad_ptr,  # (B, C, H, W) gradient of the selection, any strides; read
    grad_weight_ptr,  # (B, tiles, 2, C, 9) float32, contiguous: each tile's part; written
    grad_bias_ptr,  # (B, tiles, 2) float32, contiguous: each tile's part; written
    B,
    C,
    H,
    W,
    x_stride_b,
    x_stride_c,
    x_stride_y,
    x_stride_x,
    grad_stride_b,
    grad_stride_c,
    grad_stride_y,
    grad_stride_x,
    temperature,
    RULE: tl.constexpr,
    HALO_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """dz of a tile and its halo, and from that the tile's part of the gradients of weight and bias."""
    PIXELS: tl.constexpr = TILE_H * TILE_W
    HALF_C: tl.constexpr = BLOCK_C // 2  # where both sources take registers
    b = tl.program_id(2).to(tl.int64)
    y, x, inside, own = tile_pixels(H, W, HALO_X, TILE_H, TILE_W)
    offs_p = y * x_stride_y + x * x_stride_x
    offs_g = y * grad_stride_y + x * grad_stride_x
    x_0_ptr += b * x_stride_b
    x_1_ptr += b * x_stride_b
    score_0 = tl.load(scores_ptr + b * H * W + y * W + x, mask=inside, other=0)
    score_1 = tl.load(scores_ptr + (B + b) * H * W + y * W + x, mask=inside, other=0)
    grad_0 = tl.zeros((PIXELS,), tl.float32)
    grad_1 = tl.zeros((PIXELS,), tl.float32)
    for c in range(0, C, HALF_C):
        offs_c = c + tl.arange(0, HALF_C)
        g_tile = load_features(grad_ptr + b * grad_stride_b, offs_c, offs_g, inside, C, grad_stride_c)
        x_0 = load_features(x_0_ptr, offs_c, offs_p, inside, C, x_stride_c)
        x_1 = load_features(x_1_ptr, offs_c, offs_p, inside, C, x_stride_c)
        v = weigh(x_0, x_1, score_0, score_1, temperature, RULE)
        d = v * (1 - v) * (x_1 - x_0) * g_tile / temperature
        if RULE == "candidate":
            grad_0 -= tl.sum(x_0 * d, axis=0)
            grad_1 += tl.sum(x_1 * d, axis=0)
        else:
            grad_1 += tl.sum(d, axis=0)
    if RULE == "score":
        grad_0 = -grad_1

    tile = (b * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    dzs = (grad_0 * score_0 * (1 - score_0), grad_1 * score_1 * (1 - score_1))  # 0 outside the image
    offs_t, mask_t = tap_offsets()
    for j in tl.static_range(2):
        tl.store(grad_bias_ptr + tile * 2 + j, tl.sum(tl.where(own, dzs[j], 0.0), axis=0))
        # (C x pixels) times (pixels x 16), in GROUPS of pixels, so that every warp has a product of its own.
        dz_taps = shifted(tl.broadcast_to(dzs[j][None, :], (16, PIXELS)), -1, TILE_H, TILE_W)
        dz_groups = tl.permute(tl.reshape(dz_taps, (16, GROUPS, PIXELS // GROUPS)), (1, 2, 0))
        for c in range(0, C, BLOCK_C):
            offs_c = c + tl.arange(0, BLOCK_C)
            x_tile = load_features((x_0_ptr, x_1_ptr)[j], offs_c, offs_p, own, C, x_stride_c)
            x_groups = tl.permute(tl.reshape(x_tile, (BLOCK_C, GROUPS, PIXELS // GROUPS)), (1, 0, 2))
            grad_w = tl.sum(tl.dot(x_groups, dz_groups, input_precision="tf32x3"), axis=0)  # (BLOCK_C, 16)
            offs_w = ((tile * 2 + j) * C + offs_c)[:, None] * 9 + offs_t[None, :]
            tl.store(grad_weight_ptr + offs_w, grad_w, mask=(offs_c < C)[:, None] & mask_t[None, :])


# --------------------------------------------- launchers, as custom ops: torch.compile does not look into them


def tiling(x: Tensor) -> tuple[dict, tuple[int, int, int]]:
    """Tile, halo included, and grid for sources (B, C, H, W).

    Channels-first the halo is 16 bytes wide, not one pixel, so that a tile's rows begin at multiples of 16 bytes.
    At most 128 registers a thread, so that two programs of 8 warps share a multiprocessor.
    """
    B, C, H, W = x.shape
    halo = 16 // x.element_size() if x.stride(3) == 1 else 1
    narrow = C % 16 > 0 and halo == 1  # rows that cannot be read 16 bytes at a time: every access takes registers
    shape = {"BLOCK_C": 16 if C <= 32 else 32, "num_warps": 16 if narrow or C > 32 else 8}
    blocks = {"HALO_X": halo, "TILE_H": 8, "TILE_W": 32, **shape, "maxnreg": 128}
    return blocks, (triton.cdiv(W, 32 - 2 * halo), triton.cdiv(H, 6), B)


@torch.library.custom_op("rmmss::feature_select", mutates_args=())
def select_op(
    x_0: Tensor, x_1: Tensor, weight: Tensor, bias: Tensor, rule: str, temperature: float
) -> tuple[Tensor, Tensor]:
    """Sources (B, C, H, W), weight (2, C, 3, 3), bias (B, 2) -> selected like a source, scores (2, B, H, W)."""
    B, C, H, W = x_0.shape
    blocks, grid = tiling(x_0)
    scores = torch.empty((2, B, H, W), device=x_0.device, dtype=torch.float32)
    selected = torch.empty_like(x_0)
    with torch.cuda.device_of(x_0):  # Triton launches on the current device, whatever its arguments lie on
        select_kernel[grid](
            x_0,
            x_1,
            weight,
            bias,
            scores,
            selected,
            B,
            C,
            H,
            W,
            *x_0.stride(),
            *bias.stride(),
            temperature,
            RULE=rule,
            **blocks,
            num_stages=2,
        )
    return selected, scores


@select_op.register_fake
def _(x_0, x_1, weight, bias, rule, temperature):
    B, _, H, W = x_0.shape
    return torch.empty_like(x_0), weight.new_empty((2, B, H, W))


@torch.library.custom_op("rmmss::feature_select_backward", mutates_args=())
def select_backward_op(
    grad: Tensor, x_0: Tensor, x_1: Tensor, scores: Tensor, rule: str, temperature: float
) -> tuple[Tensor, Tensor]:
    """Gradient of the selection (B, C, H, W) -> gradients of weight (2, C, 3, 3) and bias (B, 2)."""
    B, C, H, W = grad.shape
    blocks, grid = tiling(x_0)
    grad_weight = torch.empty((B * grid[0] * grid[1], 2, C, 9), device=grad.device, dtype=torch.float32)
    grad_bias = torch.empty((B, grid[0] * grid[1], 2), device=grad.device, dtype=torch.float32)
    with torch.cuda.device_of(grad):
        weight_backward_kernel[grid](
            x_0,
            x_1,
            scores,
            grad,
            grad_weight,
            grad_bias,
            B,
            C,
            H,
            W,
            *x_0.stride(),
            *grad.stride(),
            temperature,
            RULE=rule,
            **blocks,
            GROUPS=blocks["num_warps"],
            num_stages=1,
        )
    return grad_weight.sum(0).unflatten(2, (3, 3)), grad_bias.sum(1)


@select_backward_op.register_fake
def _(grad, x_0, x_1, scores, rule, temperature):
    return scores.new_empty((2, grad.shape[1], 3, 3)), scores.new_empty((grad.shape[0], 2))


def setup_select(ctx, inputs, output):
    x_0, x_1, _, _, ctx.rule, ctx.temperature = inputs
    ctx.save_for_backward(x_0, x_1, output[1])
    ctx.mark_non_differentiable(output[1])


def backward_select(ctx, grad, _):
    return None, None, *select_backward_op(grad, *ctx.saved_tensors, ctx.rule, ctx.temperature), None, None


select_op.register_autograd(backward_select, setup_context=setup_select)

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
    return select_op(x_0, x_1, weight.float().contiguous(), bias, rule, float(temperature))[0]
