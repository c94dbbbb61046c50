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
times the bandwidth of the L1 cache; instead a pixel's nine products sum_c w[c,t] f[c,p] come from one read, as a
product of matrices (16 x C) times (C x pixels) on tensor cores in three TF32 parts, and what is shifted is their
sum over the channels: nine numbers a pixel. The backward pass likewise shifts dz, one number a pixel. The second
look at the features of the tile, now that the scores are known, finds them in the cache.

Nothing is saved for the backward pass but the inputs and the scores. Sums over tiles are added in a fixed order, so
that the result is the same every time (no atomics).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

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
def shifted(values, SIGN: tl.constexpr, TILE_W: tl.constexpr):
    """values (16, pixels) -> row t moved by tap t: out[t, p] = values[t, p + SIGN * o_t]; right for own pixels."""
    offs_p = tl.arange(0, values.shape[1])
    tap = tl.arange(0, 16)
    move = SIGN * ((tap // 3 - 1) * TILE_W + tap % 3 - 1)
    origin = offs_p[None, :] + move[:, None]
    origin = tl.minimum(tl.maximum(origin, 0), values.shape[1] - 1)  # of the halo, whose values nobody uses
    return tl.gather(values, origin, axis=1)


@triton.jit
def load_features(x_ptr, offs_c, offs_p, mask_p, C, stride_c):
    """(BLOCK_C, pixels) of one source and sample as float32, 0 outside the mask."""
    mask = (offs_c < C)[:, None] & mask_p[None, :]
    ptrs = x_ptr + offs_c.to(tl.int64)[:, None] * stride_c + offs_p[None, :]
    return tl.load(ptrs, mask=mask, other=0).to(tl.float32)


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
    out_stride_b, out_stride_c, out_stride_y, out_stride_x, temperature,
    HARD: tl.constexpr, S: tl.constexpr, BLOCK_C: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    y, x, inside, own = tile_pixels(H, W, TILE_H, TILE_W)
    offs_p = y * x_stride_y + x * x_stride_x
    tap = tl.arange(0, 16)

    scores = ()
    for j in tl.static_range(S):
        acc_taps = tl.zeros((16, TILE_H * TILE_W), tl.float32)
        for c in range(0, C, BLOCK_C):
            offs_c = c + tl.arange(0, BLOCK_C)
            x_tile = load_features(x_ptrs[j] + b * x_stride_b, offs_c, offs_p, inside, C, x_stride_c)
            mask_w = (tap < 9)[:, None] & (offs_c < C)[None, :]
            w_tile = tl.load(weight_ptr + (j * C + offs_c)[None, :] * 9 + tap[:, None], mask=mask_w, other=0)
            acc_taps = tl.dot(w_tile, x_tile, acc_taps, input_precision="tf32x3")
        z = tl.sum(shifted(acc_taps, 1, TILE_W), axis=0)
        z += tl.load(bias_ptr + b * bias_stride_b + j * bias_stride_s)
        score = 1 / (1 + tl.exp(-z))
        tl.store(scores_ptr + (j * B + b) * H * W + y * W + x, score, mask=own)
        scores = scores + (score,)

    if selected_ptr is not None:
        offs_out = y * out_stride_y + x * out_stride_x
        shares = ()
        for j in tl.static_range(S):
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
            out_ptrs = selected_ptr + b * out_stride_b + offs_c.to(tl.int64)[:, None] * out_stride_c
            tl.store(out_ptrs + offs_out[None, :], selected, mask=mask)
        tiles = tl.num_programs(0) * tl.num_programs(1)
        tile = b * tiles + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        elements = B.to(tl.float32) * C * H * W
        for j in tl.static_range(S):
            tl.store(share_ptr + tile * S + j, tl.sum(shares[j], axis=0) / elements)


@triton.jit
def score_backward_kernel(
    x_ptrs,  # S x (B, C, H, W), all with the strides below; read
    weight_ptr,  # (S, C, 9) float32, contiguous; read
    scores_ptr,  # (S, B, H, W) float32, contiguous; read
    grad_ptr,  # (B, C, H, W) gradient of the relaxed selection, or None; read
    grad_scores_ptr,  # (S, B, H, W) float32, contiguous: gradient of the scores where grad_ptr is None; read
    grad_x_ptrs,  # S x (B, C, H, W), all with the strides out_*, or None; written
    grad_weight_ptr,  # (B, tiles, S, C, 9) float32, contiguous: each tile's part, or None; written
    grad_bias_ptr,  # (B, tiles, S) float32, contiguous: each tile's part; written
    B, C, H, W, x_stride_b, x_stride_c, x_stride_y, x_stride_x, grad_stride_b, grad_stride_c, grad_stride_y,
    grad_stride_x, out_stride_b, out_stride_c, out_stride_y, out_stride_x, temperature,
    S: tl.constexpr, BLOCK_C: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    PIXELS: tl.constexpr = TILE_H * TILE_W
    b = tl.program_id(2).to(tl.int64)
    y, x, inside, own = tile_pixels(H, W, TILE_H, TILE_W)
    offs_p = y * x_stride_y + x * x_stride_x
    offs_g = y * grad_stride_y + x * grad_stride_x
    tap = tl.arange(0, 16)
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
    if grad_ptr is not None:  # the scores' gradients of the whole tile, for its own pixels see their neighbours'
        for c in range(0, C, BLOCK_C):
            offs_c = c + tl.arange(0, BLOCK_C)
            g_tile = load_features(grad_ptr + b * grad_stride_b, offs_c, offs_g, inside, C, grad_stride_c)
            x_tiles = ()
            for j in tl.static_range(S):
                x_tiles = x_tiles + (load_features(x_ptrs[j] + b * x_stride_b, offs_c, offs_p, inside, C, x_stride_c),)
            weights, selected = relax(x_tiles, scores, temperature, S)
            grown = ()
            for j in tl.static_range(S):
                candidate_grad = weights[j] * (x_tiles[j] - selected) * g_tile / temperature
                grown = grown + (grad_scores[j] + tl.sum(candidate_grad * x_tiles[j], axis=0),)
            grad_scores = grown

    for j in tl.static_range(S):
        dz = grad_scores[j] * scores[j] * (1 - scores[j])  # 0 outside the image
        tl.store(grad_bias_ptr + tile * S + j, tl.sum(tl.where(own, dz, 0.0), axis=0))
        dz_taps = shifted(tl.broadcast_to(dz[None, :], (16, PIXELS)), -1, TILE_W)  # dz_j[p - o_t]
        for c in range(0, C, BLOCK_C):
            offs_c = c + tl.arange(0, BLOCK_C)
            if grad_weight_ptr is not None:
                # (C x pixels) times (pixels x 16), in GROUPS of pixels so that every warp has its own product.
                x_tile = load_features(x_ptrs[j] + b * x_stride_b, offs_c, offs_p, own, C, x_stride_c)
                x_groups = tl.permute(tl.reshape(x_tile, (BLOCK_C, GROUPS, PIXELS // GROUPS)), (1, 0, 2))
                dz_groups = tl.permute(tl.reshape(dz_taps, (16, GROUPS, PIXELS // GROUPS)), (1, 2, 0))
                grad_w = tl.sum(tl.dot(x_groups, dz_groups, input_precision="tf32x3"), axis=0)  # (BLOCK_C, 16)
                offs_w = ((tile * S + j) * C + offs_c)[:, None] * 9 + tap[None, :]
                tl.store(grad_weight_ptr + offs_w, grad_w, mask=(offs_c < C)[:, None] & (tap < 9)[None, :])
            if grad_x_ptrs is not None:
                mask_w = (offs_c < C)[:, None] & (tap < 9)[None, :]
                w_tile = tl.load(weight_ptr + (j * C + offs_c)[:, None] * 9 + tap[None, :], mask=mask_w, other=0)
                grad_x = tl.dot(w_tile, dz_taps, input_precision="tf32x3")  # (BLOCK_C, pixels)
                if grad_ptr is not None:
                    g_tile = load_features(grad_ptr + b * grad_stride_b, offs_c, offs_g, own, C, grad_stride_c)
                    x_tiles = ()
                    for i in tl.static_range(S):
                        x_ptr = x_ptrs[i] + b * x_stride_b
                        x_tiles = x_tiles + (load_features(x_ptr, offs_c, offs_p, own, C, x_stride_c),)
                    weights, selected = relax(x_tiles, scores, temperature, S)
                    candidate_grad = weights[j] * (x_tiles[j] - selected) * g_tile / temperature
                    grad_x += weights[j] * g_tile + (1 + scores[j])[None, :] * candidate_grad
                out_ptrs = grad_x_ptrs[j] + b * out_stride_b + offs_c.to(tl.int64)[:, None] * out_stride_c
                mask = (offs_c < C)[:, None] & own[None, :]
                tl.store(out_ptrs + (y * out_stride_y + x * out_stride_x)[None, :], grad_x, mask=mask)


@triton.jit
def hard_backward_kernel(
    x_ptrs,  # S x (B, C, H, W), all with the strides below; read
    scores_ptr,  # (S, B, H, W) float32, contiguous; read
    grad_ptr,  # (B, C, H, W) gradient of the selection; read
    grad_x_ptrs,  # S x (B, C, H, W), all with the strides out_*: grad where the source was chosen, else 0; written
    B, C, H, W, x_stride_b, x_stride_c, x_stride_y, x_stride_x, grad_stride_b, grad_stride_c, grad_stride_y,
    grad_stride_x, out_stride_b, out_stride_c, out_stride_y, out_stride_x,
    S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Repeats the choice from the saved scores, which costs less than to save it: no neighbours are involved."""
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    b = tl.program_id(2).to(tl.int64)
    y = offs_p // W
    x = offs_p % W
    mask_p = offs_p < H * W
    scores = ()
    x_tiles = ()
    for j in tl.static_range(S):
        scores = scores + (tl.load(scores_ptr + (j * B + b) * H * W + offs_p, mask=mask_p, other=0),)
        x_ptr = x_ptrs[j] + b * x_stride_b
        x_tiles = x_tiles + (load_features(x_ptr, offs_c, y * x_stride_y + x * x_stride_x, mask_p, C, x_stride_c),)
    index, _ = choose(x_tiles, scores, S)
    g_ptr = grad_ptr + b * grad_stride_b
    g_tile = load_features(g_ptr, offs_c, y * grad_stride_y + x * grad_stride_x, mask_p, C, grad_stride_c)
    mask = (offs_c < C)[:, None] & mask_p[None, :]
    for j in tl.static_range(S):
        out_ptrs = grad_x_ptrs[j] + b * out_stride_b + offs_c.to(tl.int64)[:, None] * out_stride_c
        tl.store(out_ptrs + (y * out_stride_y + x * out_stride_x)[None, :], tl.where(index == j, g_tile, 0.0), mask=mask)


# -------------------------------------------------------------------------------------------------- launchers


def tile_blocks(sources: int) -> dict:
    """Tile of the stencil kernels, halo included. The tiles of all sources are held at once: more, smaller."""
    return {"BLOCK_C": 16, "TILE_H": 16 if sources <= 2 else 8, "TILE_W": 32, "num_warps": 8, "num_stages": 2}


HARD_BLOCKS = {"BLOCK_C": 8, "BLOCK_P": 256, "num_warps": 8}
GROUPS = 8  # parts of a tile's pixels that the weight's gradient is summed over, one for each warp


def _tile_grid(features: list[Tensor], blocks: dict) -> tuple[int, int, int]:
    B, _, H, W = features[0].shape
    return triton.cdiv(W, blocks["TILE_W"] - 2), triton.cdiv(H, blocks["TILE_H"] - 2), B


def launch_select(
    features: list[Tensor], weight: Tensor, bias: Tensor, temperature: float | None, scores_only: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """S x (B, C, H, W), weight (S, C, 3, 3), bias (B, S) -> scores (S, B, H, W), selected (B, C, H, W), share (S,)."""
    S, first = len(features), features[0]
    B, C, H, W = first.shape
    blocks = tile_blocks(S)
    grid = _tile_grid(features, blocks)
    scores = torch.empty((S, B, H, W), device=first.device, dtype=torch.float32)
    selected = shares = None
    if not scores_only:
        selected = torch.empty_like(first)
        shares = torch.empty((B * grid[0] * grid[1], S), device=first.device, dtype=torch.float32)
    select_kernel[grid](
        tuple(features), weight, bias, scores, selected, shares, B, C, H, W,
        *first.stride(), *bias.stride(), *(first if selected is None else selected).stride(),
        temperature or 1.0, HARD=temperature is None, S=S, **blocks,
    )  # fmt: skip
    return scores, selected, None if shares is None else shares.sum(0)


def launch_score_backward(
    features: list[Tensor],
    weight: Tensor,
    scores: Tensor,
    grad: Tensor | None,
    grad_scores: Tensor | None,
    temperature: float,
    need_features: bool,
    need_weight: bool,
) -> tuple[list[Tensor] | None, Tensor | None, Tensor]:
    """Gradients of features S x (B, C, H, W) and weight (S, C, 3, 3), where needed, and of bias (B, S).

    grad (B, C, H, W) is the relaxed selection's gradient; without it grad_scores (S, B, H, W) is the scores'.
    """
    S, first = len(features), features[0]
    B, C, H, W = first.shape
    blocks = tile_blocks(S)
    grid = _tile_grid(features, blocks)
    parts = B, grid[0] * grid[1], S
    grad_bias = torch.empty(parts, device=first.device, dtype=torch.float32)
    grad_x = [torch.empty_like(first) for _ in features] if need_features else None
    grad_weight = torch.empty((*parts, C, 9), device=first.device, dtype=torch.float32) if need_weight else None
    score_backward_kernel[grid](
        tuple(features), weight, scores, grad, grad_scores,
        tuple(grad_x) if need_features else None, grad_weight, grad_bias, B, C, H, W,
        *first.stride(), *(first if grad is None else grad).stride(), *(grad_x or features)[0].stride(),
        temperature, S=S, GROUPS=GROUPS, **blocks,
    )  # fmt: skip
    if need_weight:
        grad_weight = grad_weight.sum((0, 1)).unflatten(2, (3, 3))  # (S, C, 3, 3)
    return grad_x, grad_weight, grad_bias.sum(1)


def launch_hard_backward(features: list[Tensor], scores: Tensor, grad: Tensor) -> list[Tensor]:
    """The gradient (B, C, H, W) handed to the source that each element was taken from: S x (B, C, H, W)."""
    first = features[0]
    B, C, H, W = first.shape
    grad_x = [torch.empty_like(first) for _ in features]
    grid = (triton.cdiv(H * W, HARD_BLOCKS["BLOCK_P"]), triton.cdiv(C, HARD_BLOCKS["BLOCK_C"]), B)
    hard_backward_kernel[grid](
        tuple(features), scores, grad, tuple(grad_x), B, C, H, W,
        *first.stride(), *grad.stride(), *grad_x[0].stride(), S=len(features), **HARD_BLOCKS,
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
    def backward(ctx, grad_scores):
        weight, scores, *features = ctx.saved_tensors
        need = any(ctx.needs_input_grad[2:]), ctx.needs_input_grad[0]
        gradients = launch_score_backward(features, weight, scores, None, grad_scores.contiguous(), 1.0, *need)
        grad_x, grad_weight, grad_bias = gradients
        return grad_weight, grad_bias, *(grad_x or [None] * len(features))


class FeatureScoreSelect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, bias, temperature, *features):
        scores, selected, share = launch_select(list(features), weight, bias, temperature)
        ctx.save_for_backward(weight, scores, *features)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(share)
        return selected, share

    @staticmethod
    def backward(ctx, grad, _):
        weight, scores, *features = ctx.saved_tensors
        need_features, need_weight = any(ctx.needs_input_grad[3:]), ctx.needs_input_grad[0]
        if ctx.temperature is None:
            grad_x = launch_hard_backward(features, scores, grad) if need_features else [None] * len(features)
            return None, None, None, *grad_x
        gradients = launch_score_backward(
            features, weight, scores, grad, None, ctx.temperature, need_features, need_weight
        )
        grad_x, grad_weight, grad_bias = gradients
        return grad_weight, grad_bias, None, *(grad_x or [None] * len(features))


# ----------------------------------------------------------------------------------------------- public calls
# Documented and checked in __init__.py.


def _arguments(features: list[Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """float32 weight, bias per sample, and sources that share their strides (those that do not are copied)."""
    first = features[0]
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
