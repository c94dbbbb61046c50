"""SegFormer (arXiv 2105.15203): the MiT encoder of section 3.1 and the all-MLP head of section 3.2.

Axes: N images, M modalities, C channels, H W image, h w stage, E the head's width, K classes.
Features live in memory as (N, h, w, C), so that linear layers, LayerNorms and convolutions all read them in place;
`.permute(0, 3, 1, 2)` gives the convolutions their (N, C, h, w) view of it (channels-last), without a copy.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute


class Preset(NamedTuple):
    widths: tuple[int, ...]  # channels of stages 1..4
    depths: tuple[int, ...]  # blocks of stages 1..4
    embed: int  # E, the decoder's width in MSegFormer
    cmnext_embed: int  # the same in CMNeXt
    heads: tuple[int, ...] = (1, 2, 5, 8)  # attention heads


PRESETS = {
    "segformer_tiny": Preset((16, 32, 64, 96), (1, 1, 2, 1), 128, 64, heads=(1, 2, 4, 6)),  # for demo and tests,
    "cmnext_tiny": Preset((16, 24, 32, 64), (1, 1, 2, 1), 128, 64, heads=(1, 2, 4, 8)),  # not in any paper
    "b0": Preset((32, 64, 160, 256), (2, 2, 2, 2), 768, 256),
    "b1": Preset((64, 128, 320, 512), (2, 2, 2, 2), 768, 256),
    "b2": Preset((64, 128, 320, 512), (3, 4, 6, 3), 768, 512),
    "b3": Preset((64, 128, 320, 512), (3, 4, 18, 3), 768, 512),
    "b4": Preset((64, 128, 320, 512), (3, 8, 27, 3), 768, 512),
    "b5": Preset((64, 128, 320, 512), (3, 6, 40, 3), 768, 512),
}
REDUCTIONS = (8, 4, 2, 1)  # keys and values are taken on a grid this much coarser, per stage
MIN_SIDE = 32  # the coarsest key grid must keep one cell: 32 / 4 / 8 = 1


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
        return self.norm(self.proj(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1))


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
        d = c // self.heads  # not -1 in the views below: n can be 0, in a CMNeXt without RGB
        q = self.q(x).view(n, h * w, self.heads, d).transpose(1, 2)  # (N, heads, h w, d)
        if self.sr is not None:
            x = self.norm(self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))  # (N, h / r, w / r, C)
        k, v = self.kv(x).view(n, x.shape[1] * x.shape[2], 2, self.heads, d).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, h, w, c))


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
        # Four times as wide inside, it is most of what training would keep for the backward pass: compute it twice.
        y = recompute(self.mlp, self.norm2(x), use_reentrant=False, preserve_rng_state=False)
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
    ins, drops = (3, *p.widths), drop_rates(p.depths, drop_path)
    return nn.ModuleList(Stage(ins[i], p.widths[i], i == 0, p.heads[i], REDUCTIONS[i], drops[i], eps) for i in range(4))


class Decoder(nn.Module):
    """SegFormer head (section 3.2): each stage to E channels, upsampled to stage 1, fused, then classified.

    The paper upsamples, then fuses the concatenation (c4, c3, c2, c1) by a 1x1 convolution F = (F_4, F_3, F_2, F_1). F
    mixes channels, upsampling positions, and both are linear, so F can go first, where it is many times cheaper:
        F cat_i(up(W_i x_i + b_i)) = sum_i up(F_i (W_i x_i + b_i)) = sum_i up((F_i W_i) x_i + F_i b_i)
    """

    def __init__(self, widths: tuple[int, ...], width: int, num_classes: int, dropout: float):
        super().__init__()
        self.linear = nn.ModuleList(nn.Linear(c, width) for c in widths)
        self.fuse = nn.Conv2d(4 * width, width, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.register_parameter("film", None)  # or (2, M + 2, E), see `model.condition_on_modalities`
        self.dropout = dropout
        self.classify = nn.Conv2d(width, num_classes, 1)

    def folded(self) -> list[tuple[Tensor, Tensor]]:
        """F_i W_i (E, C_i) and F_i b_i (E,) of the stages 1..4."""
        fuse = self.fuse.weight[:, :, 0, 0].chunk(4, 1)[::-1]  # F_1..F_4, each (E, E)
        return [(f @ linear.weight, f @ linear.bias) for f, linear in zip(fuse, self.linear, strict=True)]

    def forward(self, features: tuple[Tensor, ...], size: tuple[int, int], present: Tensor) -> Tensor:
        """Logits (N, K, *size) of features 4 x (N, C_i, h_i, w_i) of the modalities `present`, (N, M) bool."""
        pairs = zip(features, self.folded(), strict=True)
        maps = [F.linear(x.permute(0, 2, 3, 1), *layer).permute(0, 3, 1, 2) for x, layer in pairs]  # (N, E, h_i, w_i)
        mixed = upsample(maps[3], maps[0].shape[-2:])
        for x in maps[2::-1]:
            mixed += upsample(x, mixed.shape[-2:])
        hidden = self.bn(mixed)
        if self.film is not None:
            scale, shift = self.scale_and_shift(present)[..., None, None]
            hidden = (scale * hidden + shift).to(hidden.dtype)
        hidden = F.dropout2d(F.relu_(hidden), self.dropout, self.training)
        return upsample(self.classify(hidden), size)

    def scale_and_shift(self, present: Tensor) -> Tensor:
        """FiLM: what BatchNorm's output is multiplied by and shifted by, (N, M) bool -> (2, N, E)."""
        indicators = modality_indicators(present).to(self.film, non_blocking=True)  # (N, M + 2)
        scale, shift = (indicators[:, :, None] * self.film[:, None]).sum(2)  # not a matmul: autocast would round it
        return torch.stack((1 + scale, shift))


def upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    same = x.shape[-2:] == tuple(size)
    return x if same else F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def modality_indicators(present: Tensor) -> Tensor:
    """(N, M) bool -> (N, M + 2) of 0 and 1: each modality is there, all are there, some are missing."""
    complete = present.all(1, keepdim=True)
    return torch.cat((present, complete, ~complete), 1).float()
