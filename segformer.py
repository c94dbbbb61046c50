"""SegFormer (arXiv 2105.15203): the MiT encoder of section 3.1 and the all-MLP head of section 3.2, from scratch.

Both backbones of model.py are built of these two. Not in that paper, and in the head because RMMSS needs it there: many
means of the same features answered in one pass, and FiLM conditioning on which sensors are present.

Axes: N images (or B samples of M sensors), C channels, H W image, h w stage, E the head's width, K classes.
Features live in memory as (N, h, w, C), so that linear layers, LayerNorms and convolutions all read them in place;
`.permute(0, 3, 1, 2)` gives the convolutions their (N, C, h, w) view of it (channels-last), without a copy.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute


@dataclass(frozen=True)
class Preset:
    widths: tuple[int, ...]  # channels of stages 1..4
    depths: tuple[int, ...]  # blocks of stages 1..4
    head: int  # E, the decoder's width in MSegFormer
    cmnext_head: int  # the same in CMNeXt
    heads: tuple[int, ...] = (1, 2, 5, 8)  # attention heads


PRESETS = {
    "segformer_tiny": Preset((16, 32, 64, 96), (1, 1, 2, 1), 128, 64, heads=(1, 2, 4, 6)),  # not in the paper: for the
    "cmnext_tiny": Preset((16, 24, 32, 64), (1, 1, 2, 1), 128, 64, heads=(1, 2, 4, 8)),  # demo and the tests
    "b0": Preset((32, 64, 160, 256), (2, 2, 2, 2), 768, 256),
    "b1": Preset((64, 128, 320, 512), (2, 2, 2, 2), 768, 256),
    "b2": Preset((64, 128, 320, 512), (3, 4, 6, 3), 768, 512),
    "b3": Preset((64, 128, 320, 512), (3, 4, 18, 3), 768, 512),
    "b4": Preset((64, 128, 320, 512), (3, 8, 27, 3), 768, 512),
    "b5": Preset((64, 128, 320, 512), (3, 6, 40, 3), 768, 512),
}
REDUCTIONS = (8, 4, 2, 1)  # keys and values are taken on a grid this much coarser, per stage
MIN_SIDE = 32  # the coarsest key grid must keep one cell: 32 / 4 / 8 = 1


# ---- the encoder -------------------------------------------------------------------------------------------


class DropPath(nn.Module):
    """Drops a residual branch per sample with probability p while training, and scales the kept ones by 1 / (1 - p)."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0.0 or not self.training:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - self.p)
        return x * keep.div_(1 - self.p)


class PatchEmbed(nn.Module):
    """Overlapping patch embedding: (N, C_in, H, W) -> (N, h, w, C), stride 4 or 2."""

    def __init__(self, c_in: int, c: int, kernel: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2d(c_in, c, kernel, stride, kernel // 2)
        self.norm = nn.LayerNorm(c, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x.contiguous(memory_format=torch.channels_last))
        return self.norm(x.permute(0, 2, 3, 1))


class Attention(nn.Module):
    """Self-attention whose keys and values come from a grid reduced `reduction` times (SegFormer, equation 2)."""

    def __init__(self, c: int, heads: int, reduction: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(c, c)
        self.kv = nn.Linear(c, 2 * c)
        self.proj = nn.Linear(c, c)
        self.sr = nn.Conv2d(c, c, reduction, reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(c, eps=1e-5) if reduction > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        d = c // self.heads  # spelled out, because a batch without a single RGB image is an empty one here
        q = self.q(x).view(n, h * w, self.heads, d).transpose(1, 2)  # (N, heads, h w, d)
        if self.sr is not None:
            x = self.norm(self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))  # (N, h / r, w / r, C)
        k, v = self.kv(x).view(n, x.shape[1] * x.shape[2], 2, self.heads, d).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)  # (N, heads, h w, d)
        return self.proj(y.transpose(1, 2).reshape(n, h, w, c))


class MixFFN(nn.Module):
    """Linear, 3x3 depth-wise convolution (the position information), GELU, linear (SegFormer, equation 3)."""

    def __init__(self, c: int, ratio: int = 4):
        super().__init__()
        self.fc1 = nn.Linear(c, ratio * c)
        self.dwconv = nn.Conv2d(ratio * c, ratio * c, 3, 1, 1, groups=ratio * c)
        self.fc2 = nn.Linear(ratio * c, c)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(F.gelu(x))


class Block(nn.Module):
    def __init__(self, c: int, heads: int, reduction: int, drop_path: float, eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(c, eps=eps)
        self.attn = Attention(c, heads, reduction)
        self.norm2 = nn.LayerNorm(c, eps=eps)
        self.mlp = MixFFN(c)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        if torch.is_grad_enabled() and x.requires_grad:
            # Its four times wider insides are most of what training would keep for the backward pass: compute it twice.
            y = recompute(self.mlp, self.norm2(x), use_reentrant=False, preserve_rng_state=False)
        else:
            y = self.mlp(self.norm2(x))
        return x + self.drop_path(y)


class Stage(nn.Module):
    """Embedding, blocks, norm: (N, C_in, H, W) -> (N, h, w, C)."""

    def __init__(self, c_in: int, c: int, first: bool, heads: int, reduction: int, drops: list[float], eps: float):
        super().__init__()
        self.embed = PatchEmbed(c_in, c, *((7, 4) if first else (3, 2)))
        self.blocks = nn.Sequential(*[Block(c, heads, reduction, p, eps) for p in drops])
        self.norm = nn.LayerNorm(c, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(self.embed(x)))


def drop_rates(depths: tuple[int, ...], last: float) -> list[list[float]]:
    """DropPath rises linearly over the blocks from 0 to `last`."""
    rates = iter(torch.linspace(0, last, sum(depths)).tolist())
    return [[next(rates) for _ in range(depth)] for depth in depths]


def mit_stages(p: Preset, eps: float, drop_path: float) -> nn.ModuleList:
    ins = (3, *p.widths)
    drops = drop_rates(p.depths, drop_path)
    return nn.ModuleList(Stage(ins[i], p.widths[i], i == 0, p.heads[i], REDUCTIONS[i], drops[i], eps) for i in range(4))


# ---- the head ----------------------------------------------------------------------------------------------


class Projected(NamedTuple):
    coarse: list[Tensor]  # of the stages 2, 3, 4: F_i W_i x_i, (N, h_i, w_i, E)
    down: list[Tensor]  # bilinear upsampling of their rows, (h, h_i)
    across: Tensor  # and of their columns, side by side: (w, w_2 + w_3 + w_4)
    weight: Tensor  # of the finest stage: F_1 W_1, (E, C_1)


class Decoder(nn.Module):
    """SegFormer head (section 3.2), its fuse convolution moved below the upsampling.

    Published order: linear C_i -> E per stage, upsample, concatenate (c4, c3, c2, c1), 1x1 convolution 4E -> E.
    Upsampling mixes positions, both products mix channels, all are linear, so they commute:
        fuse(cat_i up(W_i x_i + b_i)) = sum_i up(F_i W_i x_i + F_i b_i)
    and the two products of a stage collapse into one small matrix F_i W_i (E x C_i): for B0 at 256 x 256 the products
    shrink about fiftyfold, with the published parameters and the same result.
    """

    def __init__(self, widths: tuple[int, ...], width: int, num_classes: int, dropout: float):
        super().__init__()
        self.linear = nn.ModuleList(nn.Linear(c, width) for c in widths)
        self.fuse = nn.Conv2d(4 * width, width, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.register_parameter("film", None)  # or (2, M + 2, E), see `model.condition_on_sensors`
        self.dropout = dropout
        self.classify = nn.Conv2d(width, num_classes, 1)

    def project(self, features: tuple[Tensor, ...]) -> Projected:
        """All that `mix` needs beside the finest features: the three coarse stages' products, still coarse."""
        parts = self.fuse.weight[:, :, 0, 0].chunk(4, 1)[::-1]  # F_1..F_4
        weights = [f @ linear.weight for f, linear in zip(parts, self.linear, strict=True)]
        bias = sum(f @ linear.bias for f, linear in zip(parts, self.linear, strict=True))
        coarse = [F.linear(x.permute(0, 2, 3, 1), w) for x, w in zip(features[1:], weights[1:], strict=True)]
        coarse[-1] = coarse[-1] + bias  # of all stages: upsampling keeps a constant as it is
        h, w = features[0].shape[-2:]
        down = [bilinear(x.shape[1], h, x) for x in coarse]
        across = torch.cat([bilinear(x.shape[2], w, x) for x in coarse], 1)
        return Projected(coarse, down, across, weights[0])

    @staticmethod
    def mix(finest: Tensor, projected: Projected, top: int = 0, bottom: int | None = None) -> Tensor:
        """The part that is linear in the features, rows top..bottom: finest (N, C_1, h, w) -> (N, rows, w, E).

        Bilinear upsampling of an axis is a product with a matrix, too. Down the rows it is done stage by stage, across
        the columns for the three stages side by side: one pass over the large map instead of six.
        """
        coarse, down, across, weight = projected
        h, bottom = finest.shape[2], bottom or finest.shape[2]
        mixed = finest[:, :, top:bottom].permute(0, 2, 3, 1).flatten(0, 1) @ weight.t()  # (N rows, w, E)
        tall = []
        for x, matrix in zip(coarse, down, strict=True):
            n = x.shape[1]
            near = slice(max(0, top * n // h - 1), bottom * n // h + 2)  # the coarse rows that these rows lie between
            tall.append((matrix[top:bottom, near] @ x[:, near].flatten(2)).unflatten(2, x.shape[2:]))
        tall = torch.cat(tall, 2).flatten(0, 1)  # (N rows, w_2 + w_3 + w_4, E)
        return mixed.baddbmm_(across.expand(tall.shape[0], -1, -1), tall).unflatten(0, (-1, bottom - top))

    def forward(self, features: tuple[Tensor, ...], size: tuple[int, int], present: Tensor) -> Tensor:
        mixed = self.mix(features[0], self.project(features)).permute(0, 3, 1, 2)  # (N, E, h_1, w_1)
        mixed = self.bn(mixed)
        if self.film is not None:
            scale, shift = self.scale_and_shift(present)[..., None, None]
            mixed = torch.addcmul(shift, mixed, scale).to(mixed.dtype)
        # Dropping or scaling a whole channel and the ReLU commute, and in this order both can be done in place.
        hidden = F.relu(F.dropout2d(mixed, self.dropout, self.training, inplace=True), inplace=True)
        return upsample(self.classify(hidden), size)

    def scale_and_shift(self, present: Tensor) -> Tensor:
        """FiLM after BatchNorm: what samples with these sensors, (N, M), are multiplied by and shifted by -> (2, N, E).

        Summed, not multiplied as matrices: autocast would round a scale of 1.003 to 1.
        """
        indicators = sensor_indicators(present).to(self.film, non_blocking=True)  # (N, M + 2)
        scale, shift = (indicators[:, :, None] * self.film[:, None]).sum(2)
        return torch.stack((1 + scale, shift))

    @torch.no_grad()
    def mean_logits(self, features: tuple[Tensor, ...], share: Tensor, present: Tensor) -> Tensor:
        """Logits of many means of the same feature maps, in eval mode, not yet upsampled -> (S, B, K, h_1, w_1).

        features 4 x (B, V, C_i, h_i, w_i); share (S, V): the share of each of the V maps in each mean, a row sums to 1;
        present (S, M): the sensors that each is said to be of, for the FiLM.
        Up to the ReLU all is linear, BatchNorm with its running statistics too. So a mean costs one weighted sum, a
        ReLU and the classifier. A few rows at a time: what stays in a CPU's cache is several times faster, and a GPU
        need not hold the wide maps of all means at once. Gives no gradients.
        """
        b, v, _, h, w = features[0].shape
        few = 64 if share.is_cuda else 4
        scale, shift = (None, None) if self.film is None else self.scale_and_shift(present)[:, :, None, None]
        projected = self.project(tuple(f.flatten(0, 1) for f in features))
        logits = features[0].new_empty(len(share), b, h, w, self.classify.out_channels)
        for i in range(b):
            ours = projected._replace(coarse=[x[i * v : (i + 1) * v] for x in projected.coarse])
            for top in range(0, h, few):
                x = self.mix(features[0][i], ours, top, min(top + few, h))  # (V, rows, w, E)
                x = self.bn(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
                hidden = (share.to(x.dtype) @ x.flatten(1)).unflatten(1, x.shape[1:])  # (S, rows, w, E)
                if self.film is not None:
                    hidden = hidden.mul_(scale).add_(shift)
                hidden = F.relu(hidden, inplace=True)
                logits[:, i, top : top + few] = F.linear(hidden, self.classify.weight[:, :, 0, 0], self.classify.bias)
        return logits.permute(0, 1, 4, 2, 3)


def bilinear(n: int, out: int, like: Tensor) -> Tensor:
    """Bilinear resampling of an axis from n to `out` positions as a matrix (out, n)."""
    one_hot = torch.eye(n, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)[None]
    return F.interpolate(one_hot, size=out, mode="linear", align_corners=False)[0].t().to(like.dtype)


def upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def sensor_indicators(present: Tensor) -> Tensor:
    """What is known of the sensors, (B, M) bool -> (B, M + 2) of 0 and 1: each is there, all are, some are missing."""
    complete = present.all(1, keepdim=True)
    return torch.cat((present, complete, ~complete), 1).float()
