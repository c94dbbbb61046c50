"""Feature scores and Feature Selection, fused for the GPU: stencil, sigmoid, weighting and selection in one pass.

Axes: B samples, S sources, C channels, H x W pixels of the stage; t = 0..8 the taps of a 3x3 kernel, with the offset
o_t = (t // 3 - 1, t % 3 - 1).

Score        z_j[q] = bias_j + sum_c sum_t w_j[c,t] f_j[c, q + o_t],   s_j = sigmoid(z_j)
             (the depth-wise 3x3 and the 1x1 convolution of the paper's score predictor, folded into one)
Candidates   a_j = (1 + s_j) f_j
Hard rule    selected = f_j of the largest a_j, element by element
Relaxed      v_j = softmax_j(a_j / T),   selected = sum_j v_j f_j
Backward     da_j = v_j (f_j - selected) g / T,   dz_j = s_j (1 - s_j) sum_c f_j da_j
             df_j[c,p] = v_j g + (1 + s_j) da_j + sum_t w_j[c,t] dz_j[p - o_t]
             dw_j[c,t] = sum_p f_j[c,p] dz_j[p - o_t],   db_j = sum_p dz_j

Bytes that must move, with N bytes in one source: forward S N read, N written; backward (S + 1) N read, and S N written
where the features need gradients (in stage 2 they come from frozen models and do not). Maps with one channel are
small beside that. Fused away: the depth-wise convolution's (B, C, H, W) output, the candidates, the weights, the
stacked copies of the sources: about 8 S N in plain PyTorch.

A program owns a tile of pixels with a halo of one, for all channels. Nine shifted reads of the features would ask nine
times the bandwidth of the L1 cache; instead a pixel's nine products sum_c w[c,t] f[c,p] come from one read, and what
is shifted is these sums: nine numbers a pixel, not nine times C. The backward pass likewise shifts dz, one number a
pixel. The weight's gradient is a product (C x pixels) times (pixels x 9), on tensor cores in three TF32 parts. The
second look at a tile's features, once its scores are known, finds them in the cache.

Nothing is saved for the backward pass but the inputs and the scores. Sums over tiles are added in a fixed order, so
that the result is the same every time (no atomics).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# ------------------------------------------------------------------------------------------------ jit kernels


@triton.jit
def tile_pixels(H, W, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Rows and columns of this program's pixels, halo of one included; which are in the image, which are its own."""
    offs_t = tl.arange(0, TILE_H * TILE_W)
    row = offs_t // TILE_W
    column = offs_t % TILE_W
    y = tl.program_id(1) * (TILE_H - 2) + row - 1
    x = tl.program_id(0) * (TILE_W - 2) + column - 1
    inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
    own = inside & (row > 0) & (row < TILE_H - 1) & (column > 0) & (column < TILE_W - 1)
    return y, x, inside, own


@triton.jit
def shifted(values, tap, SIGN: tl.constexpr, TILE_W: tl.constexpr):
    """values (rows, pixels) of a tile, row r moved by tap[r]: out[r, p] = values[r, p + SIGN * o_t]; for own pixels."""
    origin = tl.arange(0, values.shape[1])[None, :] + SIGN * ((tap // 3 - 1) * TILE_W + tap % 3 - 1)[:, None]
    origin = tl.minimum(tl.maximum(origin, 0), values.shape[1] - 1)  # out of the tile only for the halo's pixels
    return tl.gather(values, origin, axis=1)


@triton.jit
def load_features(x_ptr, offs_c, offs_p, mask_p, C, stride_c):
    """(BLOCK_C, pixels) of one source and sample as float32, 0 outside the mask.

    Samples are found with 64-bit offsets, elements within one with 32 bits: half the registers, shared by the sources.
    """
    mask = (offs_c < C)[:, None] & mask_p[None, :]
    return tl.load(x_ptr + (offs_c[:, None] * stride_c + offs_p[None, :]), mask=mask, other=0).to(tl.float32)


@triton.jit
def relax(x_tiles, scores, temperature, S: tl.constexpr):
    """Weights of the sources, a softmax of their candidates, and the weighted sum: S tiles -> S tiles, one tile."""
    top = (1 + scores[0])[None, :] * x_tiles[0]
    for j in tl.static_range(1, S):
        top = tl.maximum(top, (1 + scores[j])[None, :] * x_tiles[j])
    total = tl.zeros(top.shape, tl.float32)
    selected = tl.zeros(top.shape, tl.float32)
    weights = ()
    for j in tl.static_range(S):
        weight = tl.exp(((1 + scores[j])[None, :] * x_tiles[j] - top) / temperature)
        total += weight
        selected += weight * x_tiles[j]
        weights = weights + (weight,)
    normal = ()
    for j in tl.static_range(S):
        normal = normal + (weights[j] / total,)
    return normal, selected / total


@triton.jit
def choose(x_tiles, scores, S: tl.constexpr):
    """The source with the largest candidate, the first of equals, and its feature: S tiles -> index, tile."""
    best = (1 + scores[0])[None, :] * x_tiles[0]
    selected = x_tiles[0]
    index = tl.zeros(best.shape, tl.int32)
    for j in tl.static_range(1, S):
        candidate = (1 + scores[j])[None, :] * x_tiles[j]
        better = candidate > best
        best = tl.where(better, candidate, best)
        selected = tl.where(better, x_tiles[j], selected)
        index = tl.where(better, j, index)
    return index, selected


@triton.jit
def select_kernel(
    x_ptrs,  # S x (B, C, H, W), all with the strides below; read
    weight_ptr,  # (S, C, 9) float32, contiguous; read
    bias_ptr,  # (B, S) float32, any strides; read
    scores_ptr,  # (S, B, H, W) float32, contiguous; written
    selected_ptr,  # (B, C, H, W), or None for the scores alone; written
    share_ptr,  # (B, tiles, S) float32, contiguous: each tile's part of the mean weights, or None; written
    B, C, H, W, x_stride_b, x_stride_c, x_stride_y, x_stride_x, bias_stride_b, bias_stride_s,
    out_stride_b, out_stride_c, out_stride_y, out_stride_x, temperature, elements,
    HARD: tl.constexpr, S: tl.constexpr, BLOCK_C: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    y, x, inside, own = tile_pixels(H, W, TILE_H, TILE_W)
    offs_p = y * x_stride_y + x * x_stride_x

    scores = ()
    for j in tl.static_range(S):
        sums = ()  # over the channels, one for each tap
        for _ in tl.static_range(9):
            sums = sums + (tl.zeros((TILE_H * TILE_W,), tl.float32),)
        for c in range(0, C, BLOCK_C):
            offs_c = c + tl.arange(0, BLOCK_C)
            x_tile = load_features(x_ptrs[j] + b * x_stride_b, offs_c, offs_p, inside, C, x_stride_c)
            grown = ()
            for t in tl.static_range(9):
                w = tl.load(weight_ptr + (j * C + offs_c) * 9 + t, mask=offs_c < C, other=0)
                grown = grown + (sums[t] + tl.sum(w[:, None] * x_tile, axis=0),)
            sums = grown
        z = tl.zeros((TILE_H * TILE_W,), tl.float32)
        for t in tl.static_range(9):
            z += tl.sum(shifted(sums[t][None, :], tl.full((1,), t, tl.int32), 1, TILE_W), axis=0)
        z += tl.load(bias_ptr + b * bias_stride_b + j * bias_stride_s)
        score = 1 / (1 + tl.exp(-z))
        tl.store(scores_ptr + (j * B + b) * H * W + y * W + x, score, mask=own)
        scores = scores + (score,)

    if selected_ptr is not None:
        offs_out = y * out_stride_y + x * out_stride_x
        shares = ()
        for _ in tl.static_range(S):
            shares = shares + (tl.zeros((TILE_H * TILE_W,), tl.float32),)
        for c in range(0, C, BLOCK_C):
            offs_c = c + tl.arange(0, BLOCK_C)
            mask = (offs_c < C)[:, None] & own[None, :]
            x_tiles = ()
            for j in tl.static_range(S):
                x_tiles = x_tiles + (load_features(x_ptrs[j] + b * x_stride_b, offs_c, offs_p, own, C, x_stride_c),)
            grown = ()
            if HARD:
                index, selected = choose(x_tiles, scores, S)
                for j in tl.static_range(S):
                    grown = grown + (shares[j] + tl.sum((mask & (index == j)).to(tl.float32), axis=0),)
            else:
                weights, selected = relax(x_tiles, scores, temperature, S)
                for j in tl.static_range(S):
                    grown = grown + (shares[j] + tl.sum(tl.where(mask, weights[j], 0.0), axis=0),)
            shares = grown
            out_ptr = selected_ptr + b * out_stride_b
            tl.store(out_ptr + (offs_c[:, None] * out_stride_c + offs_out[None, :]), selected, mask=mask)
        tiles = tl.num_programs(0) * tl.num_programs(1)
        tile = b * tiles + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        for j in tl.static_range(S):
            tl.store(share_ptr + tile * S + j, tl.sum(shares[j], axis=0) / elements)


@triton.jit
def weight_backward_kernel(
    x_ptrs,  # S x (B, C, H, W), all with the strides below; read
    scores_ptr,  # (S, B, H, W) float32, contiguous; read
    grad_ptr,  # (B, C, H, W) gradient of the relaxed selection, or None; read
    grad_scores_ptr,  # (S, B, H, W) float32, contiguous: gradient of the scores where grad_ptr is None; read
    dz_ptr,  # (S, B, H, W) float32, contiguous; written
    grad_weight_ptr,  # (B, tiles, S, C, 9) float32, contiguous: each tile's part; written
    grad_bias_ptr,  # (B, tiles, S) float32, contiguous: each tile's part; written
    B, C, H, W, x_stride_b, x_stride_c, x_stride_y, x_stride_x,
    grad_stride_b, grad_stride_c, grad_stride_y, grad_stride_x, temperature,
    S: tl.constexpr, BLOCK_C: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """dz of a tile and its halo, and from that the tile's part of the gradients of weight and bias."""
    PIXELS: tl.constexpr = TILE_H * TILE_W
    HALF_C: tl.constexpr = BLOCK_C // 2  # the products below need 16 channels, here all sources take registers
    b = tl.program_id(2).to(tl.int64)
    y, x, inside, own = tile_pixels(H, W, TILE_H, TILE_W)
    offs_p = y * x_stride_y + x * x_stride_x
    offs_g = y * grad_stride_y + x * grad_stride_x
    tiles = tl.num_programs(0) * tl.num_programs(1)
    tile = b * tiles + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)

    scores = ()
    grad_scores = ()
    for j in tl.static_range(S):
        offs_s = (j * B + b) * H * W + y * W + x
        scores = scores + (tl.load(scores_ptr + offs_s, mask=inside, other=0),)
        if grad_ptr is None:
            grad_scores = grad_scores + (tl.load(grad_scores_ptr + offs_s, mask=inside, other=0),)
        else:
            grad_scores = grad_scores + (tl.zeros((PIXELS,), tl.float32),)
    if grad_ptr is not None:
        for c in range(0, C, HALF_C):
            offs_c = c + tl.arange(0, HALF_C)
            g_tile = load_features(grad_ptr + b * grad_stride_b, offs_c, offs_g, inside, C, grad_stride_c)
            x_tiles = ()
            for j in tl.static_range(S):
                x_tiles = x_tiles + (load_features(x_ptrs[j] + b * x_stride_b, offs_c, offs_p, inside, C, x_stride_c),)
            weights, selected = relax(x_tiles, scores, temperature, S)
            grown = ()
            for j in tl.static_range(S):
                grad_candidate = weights[j] * (x_tiles[j] - selected) * g_tile / temperature
                grown = grown + (grad_scores[j] + tl.sum(grad_candidate * x_tiles[j], axis=0),)
            grad_scores = grown

    tap = tl.arange(0, 16)
    for j in tl.static_range(S):
        dz = grad_scores[j] * scores[j] * (1 - scores[j])  # 0 outside the image
        tl.store(dz_ptr + (j * B + b) * H * W + y * W + x, dz, mask=own)
        tl.store(grad_bias_ptr + tile * S + j, tl.sum(tl.where(own, dz, 0.0), axis=0))
        # (C x pixels) times (pixels x 16), in GROUPS of pixels, so that every warp has a product of its own.
        dz_taps = shifted(tl.broadcast_to(dz[None, :], (16, PIXELS)), tap, -1, TILE_W)  # dz_j[p - o_t]
        dz_groups = tl.permute(tl.reshape(dz_taps, (16, GROUPS, PIXELS // GROUPS)), (1, 2, 0))
        for c in range(0, C, BLOCK_C):
            offs_c = c + tl.arange(0, BLOCK_C)
            x_tile = load_features(x_ptrs[j] + b * x_stride_b, offs_c, offs_p, own, C, x_stride_c)
            x_groups = tl.permute(tl.reshape(x_tile, (BLOCK_C, GROUPS, PIXELS // GROUPS)), (1, 0, 2))
            grad_w = tl.sum(tl.dot(x_groups, dz_groups, input_precision="tf32x3"), axis=0)  # (BLOCK_C, 16)
            offs_w = ((tile * S + j) * C + offs_c)[:, None] * 9 + tap[None, :]
            tl.store(grad_weight_ptr + offs_w, grad_w, mask=(offs_c < C)[:, None] & (tap < 9)[None, :])


@triton.jit
def features_backward_kernel(
    x_ptrs,  # S x (B, C, H, W), all with the strides below; read with grad_ptr
    weight_ptr,  # (S, C, 9) float32, contiguous; read with dz_ptr
    scores_ptr,  # (S, B, H, W) float32, contiguous; read with grad_ptr
    dz_ptr,  # (S, B, H, W) float32, contiguous, or None under the hard rule; read
    grad_ptr,  # (B, C, H, W) gradient of the selection, or None for the scores alone; read
    grad_x_ptrs,  # S x (B, C, H, W), all with the strides out_*; written
    B, C, H, W, x_stride_b, x_stride_c, x_stride_y, x_stride_x,
    grad_stride_b, grad_stride_c, grad_stride_y, grad_stride_x,
    out_stride_b, out_stride_c, out_stride_y, out_stride_x, temperature,
    S: tl.constexpr, BLOCK_C: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """Gradient of the features: through the selection, element by element, and through the scores, from dz.

    The hard rule's choice is repeated from the saved scores; to save it would cost more.
    """
    channel_blocks = tl.cdiv(C, BLOCK_C)
    b = (tl.program_id(2) // channel_blocks).to(tl.int64)
    offs_c = tl.program_id(2) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_t = tl.arange(0, TILE_H * TILE_W)
    y = tl.program_id(1) * TILE_H + offs_t // TILE_W
    x = tl.program_id(0) * TILE_W + offs_t % TILE_W
    inside = (y < H) & (x < W)
    mask = (offs_c < C)[:, None] & inside[None, :]
    offs_out = y * out_stride_y + x * out_stride_x

    scores = ()
    x_tiles = ()
    if grad_ptr is not None:
        offs_g = y * grad_stride_y + x * grad_stride_x
        g_tile = load_features(grad_ptr + b * grad_stride_b, offs_c, offs_g, inside, C, grad_stride_c)
        offs_p = y * x_stride_y + x * x_stride_x
        for j in tl.static_range(S):
            offs_s = (j * B + b) * H * W + y * W + x
            scores = scores + (tl.load(scores_ptr + offs_s, mask=inside, other=0),)
            x_tiles = x_tiles + (load_features(x_ptrs[j] + b * x_stride_b, offs_c, offs_p, inside, C, x_stride_c),)
        if dz_ptr is None:
            index, _ = choose(x_tiles, scores, S)
        else:
            weights, selected = relax(x_tiles, scores, temperature, S)
    for j in tl.static_range(S):
        if dz_ptr is None:
            grad_x = tl.where(index == j, g_tile, 0.0)
        else:
            grad_x = tl.zeros((BLOCK_C, TILE_H * TILE_W), tl.float32)
            for t in tl.static_range(9):
                y_t = y - (t // 3 - 1)
                x_t = x - (t % 3 - 1)
                mask_t = (y_t >= 0) & (y_t < H) & (x_t >= 0) & (x_t < W)
                dz = tl.load(dz_ptr + (j * B + b) * H * W + y_t * W + x_t, mask=mask_t, other=0)
                w = tl.load(weight_ptr + (j * C + offs_c) * 9 + t, mask=offs_c < C, other=0)
                grad_x += w[:, None] * dz[None, :]
            if grad_ptr is not None:
                grad_candidate = weights[j] * (x_tiles[j] - selected) * g_tile / temperature
                grad_x += weights[j] * g_tile + (1 + scores[j])[None, :] * grad_candidate
        out_ptr = grad_x_ptrs[j] + b * out_stride_b
        tl.store(out_ptr + (offs_c[:, None] * out_stride_c + offs_out[None, :]), grad_x, mask=mask)


# -------------------------------------------------------------------------------------------------- launchers


def select_blocks(sources: int) -> dict:
    """Tile of select_kernel, halo included. The tiles of all sources are held at once: the more, the more warps."""
    return {"BLOCK_C": 8, "TILE_H": 8, "TILE_W": 32, "num_warps": 4 if sources <= 2 else 8}


def weight_blocks(sources: int) -> dict:
    """Tile of weight_backward_kernel, halo included; a group of pixels for each warp."""
    blocks = {"BLOCK_C": 16, "TILE_H": 8, "TILE_W": 32, "num_stages": 1}
    if sources <= 2:
        return {**blocks, "GROUPS": 16, "num_warps": 16}
    return {**blocks, "GROUPS": 8, "num_warps": 8, "maxnreg": 255}  # or the compiler stops at 128 and spills


def features_blocks(sources: int) -> dict:
    """Tile of features_backward_kernel, which needs no halo."""
    return {"BLOCK_C": 8 if sources <= 2 else 2, "TILE_H": 4, "TILE_W": 64, "num_warps": 8}


def launch_select(
    features: list[Tensor], weight: Tensor, bias: Tensor, temperature: float | None, scores_only: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """S x (B, C, H, W), weight (S, C, 3, 3), bias (B, S) -> scores (S, B, H, W), selected (B, C, H, W), share (S,)."""
    S, first = len(features), features[0]
    B, C, H, W = first.shape
    blocks = select_blocks(S)
    grid = triton.cdiv(W, blocks["TILE_W"] - 2), triton.cdiv(H, blocks["TILE_H"] - 2), B
    scores = torch.empty((S, B, H, W), device=first.device, dtype=torch.float32)
    selected = shares = None
    if not scores_only:
        selected = torch.empty_like(first)
        shares = torch.empty((B * grid[0] * grid[1], S), device=first.device, dtype=torch.float32)
    select_kernel[grid](
        tuple(features), weight, bias, scores, selected, shares, B, C, H, W,
        *first.stride(), *bias.stride(), *(first if selected is None else selected).stride(),
        temperature or 1.0, float(first.numel()), HARD=temperature is None, S=S, **blocks,
    )  # fmt: skip
    return scores, selected, None if shares is None else shares.sum(0)


def launch_weight_backward(
    features: list[Tensor], scores: Tensor, grad: Tensor | None, grad_scores: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dz (S, B, H, W), and the gradients of weight (S, C, 3, 3) and bias (B, S).

    grad (B, C, H, W) is the relaxed selection's gradient; without it grad_scores (S, B, H, W) is the scores'.
    """
    S, first = len(features), features[0]
    B, C, H, W = first.shape
    blocks = weight_blocks(S)
    grid = triton.cdiv(W, blocks["TILE_W"] - 2), triton.cdiv(H, blocks["TILE_H"] - 2), B
    dz = torch.empty((S, B, H, W), device=first.device, dtype=torch.float32)
    grad_weight = torch.empty((B * grid[0] * grid[1], S, C, 9), device=first.device, dtype=torch.float32)
    grad_bias = torch.empty((B, grid[0] * grid[1], S), device=first.device, dtype=torch.float32)
    weight_backward_kernel[grid](
        tuple(features), scores, grad, grad_scores, dz, grad_weight, grad_bias, B, C, H, W,
        *first.stride(), *(first if grad is None else grad).stride(), temperature, S=S, **blocks,
    )  # fmt: skip
    return dz, grad_weight.sum(0).unflatten(2, (3, 3)), grad_bias.sum(1)


def launch_features_backward(
    features: list[Tensor],
    weight: Tensor,
    scores: Tensor,
    dz: Tensor | None,
    grad: Tensor | None,
    temperature: float | None,
) -> list[Tensor]:
    """The gradients of the features, S x (B, C, H, W): through the scores from dz, through the selection from grad."""
    first = features[0]
    B, C, H, W = first.shape
    grad_x = [torch.empty_like(first) for _ in features]
    blocks = features_blocks(len(features))
    grid = triton.cdiv(W, blocks["TILE_W"]), triton.cdiv(H, blocks["TILE_H"]), B * triton.cdiv(C, blocks["BLOCK_C"])
    features_backward_kernel[grid](
        tuple(features), weight, scores, dz, grad, tuple(grad_x), B, C, H, W,
        *first.stride(), *(first if grad is None else grad).stride(), *grad_x[0].stride(),
        temperature or 1.0, S=len(features), **blocks,
    )  # fmt: skip
    return grad_x


# --------------------------------------------------------------------------------------------------- autograd


class FeatureScore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, bias, *features):
        scores, _, _ = launch_select(list(features), weight, bias, None, scores_only=True)
        ctx.save_for_backward(weight, scores, *features)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_scores):
        weight, scores, *features = ctx.saved_tensors
        dz, *grads = launch_weight_backward(features, scores, None, grad_scores.contiguous(), 1.0)
        grad_x = [None] * len(features)
        if any(ctx.needs_input_grad[2:]):
            grad_x = launch_features_backward(features, weight, scores, dz, None, None)
        return *grads, *grad_x


class FeatureScoreSelect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, bias, temperature, *features):
        scores, selected, share = launch_select(list(features), weight, bias, temperature)
        ctx.save_for_backward(weight, scores, *features)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(share)
        return selected, share

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        weight, scores, *features = ctx.saved_tensors
        dz, grads = None, (None, None)
        if ctx.temperature is not None:  # the hard rule has no gradient for weight and bias
            dz, *grads = launch_weight_backward(features, scores, grad, None, ctx.temperature)
        grad_x = [None] * len(features)
        if any(ctx.needs_input_grad[3:]):
            grad_x = launch_features_backward(features, weight, scores, dz, grad, ctx.temperature)
        return *grads, None, *grad_x


# ----------------------------------------------------------------------------------------------- public calls
# Documented and checked in __init__.py.


def _arguments(features: list[Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """float32 weight, bias per sample, and sources that share their strides (those that do not are copied)."""
    first = features[0]
    if sum((size - 1) * abs(stride) for size, stride in zip(first.shape[1:], first.stride()[1:], strict=True)) >= 2**31:
        raise ValueError(f"features[0] is {tuple(first.shape)}: one sample must span less than 2^31 elements.")
    if any(x.stride() != first.stride() for x in features):
        features = [x.contiguous() for x in features]
    return weight.float().contiguous(), bias.float().expand(first.shape[0], len(features)), features


def feature_score(features: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    weight, bias, features = _arguments(features, weight, bias)
    scores = FeatureScore.apply(weight, bias, *features)  # (S, B, h, w)
    return scores[:, :, None].to(features[0].dtype)  # (S, B, 1, h, w)


def feature_score_select(
    features: list[Tensor], weight: Tensor, bias: Tensor, temperature: float | None
) -> tuple[Tensor, Tensor]:
    weight, bias, features = _arguments(features, weight, bias)
    return FeatureScoreSelect.apply(weight, bias, temperature, *features)
