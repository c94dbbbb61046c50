"""SegFormer (arXiv 2105.15203) and M-SegFormer (AnySeg, arXiv 2411.17141), the first backbone of RMMSS.

    model = MSegFormer(PRESETS["b0"], num_classes=25, modalities=["rgb", "depth", "event", "lidar"])
    logits = model(images, present).logits  # images (B, M, 3, H, W), present (B, M) bool or None -> (B, K, H, W)

The MiT encoder (SegFormer, section 3.1) and the all-MLP head (section 3.2); then M-SegFormer, which shares one MiT
among all modalities, averages the features of those present at each stage, and decodes them with one head.

Axes: B samples, M modalities, N images or present (sample, modality) pairs, C channels, H W image, h w stage, E the
head's width, K classes. Features live in memory as (N, h, w, C), so that linear layers, LayerNorms and convolutions all
read them in place; `.permute(0, 3, 1, 2)` gives the convolutions their (N, C, h, w) view without a copy.
"""

from collections.abc import Callable, Sequence
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
    stages: Callable | None = None  # builds another encoder than MiT, called as `mit_stages`


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
DROP_PATH, DROPOUT = 0.1, 0.1  # published: rate of the last block; of the head's channels
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


def init_weights(module: nn.Module) -> None:
    """SegFormer's rule for an encoder: linear layers from a normal of 0.02, convolutions by fan-out, biases zero.

    But the bias of a convolution that reads images keeps PyTorch's default: an all-zero image would else give the first
    LayerNorm a constant, and four stages of that an infinite gradient.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, 0.0, (2.0 / fan_out) ** 0.5)
    if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
        if getattr(module, "in_channels", 0) != 3:
            nn.init.zeros_(module.bias)


def drop_rates(depths: tuple[int, ...]) -> list[list[float]]:
    """DropPath rises linearly over the blocks from 0 to DROP_PATH."""
    rates = iter(torch.linspace(0, DROP_PATH, sum(depths)).tolist())
    return [[next(rates) for _ in range(depth)] for depth in depths]


def mit_stages(p: Preset, eps: float) -> nn.ModuleList:
    """The four stages of a MiT, from chance; eps: of the LayerNorms in blocks and after stages."""
    ins, drops = (3, *p.widths), drop_rates(p.depths)
    stages = (Stage(ins[i], p.widths[i], i == 0, p.heads[i], REDUCTIONS[i], drops[i], eps) for i in range(4))
    return nn.ModuleList(stages).apply(init_weights)


class Decoder(nn.Module):
    """SegFormer head (section 3.2): each stage to E channels, upsampled to stage 1, fused, then classified.

    The paper upsamples, then fuses the concatenation (c4, c3, c2, c1) by a 1x1 convolution F = (F_4, F_3, F_2, F_1). F
    mixes channels, upsampling positions, and both are linear, so F can go first, where it is many times cheaper:
        F cat_i(up(W_i x_i + b_i)) = sum_i up(F_i (W_i x_i + b_i)) = sum_i up((F_i W_i) x_i + F_i b_i)
    """

    def __init__(self, widths: tuple[int, ...], width: int, num_classes: int):
        super().__init__()
        self.linear = nn.ModuleList(nn.Linear(c, width) for c in widths)
        self.fuse = nn.Conv2d(4 * width, width, 1, bias=False)
        init_weights(self.fuse)  # by fan-out, as published (mmcv's ConvModule); the others keep PyTorch's defaults
        self.bn = nn.BatchNorm2d(width)
        self.classify = nn.Conv2d(width, num_classes, 1)

    def folded(self) -> list[tuple[Tensor, Tensor]]:
        """F_i W_i (E, C_i) and F_i b_i (E,) of the stages 1..4."""
        fuse = self.fuse.weight[:, :, 0, 0].chunk(4, 1)[::-1]  # F_1..F_4, each (E, E)
        return [(f @ linear.weight, f @ linear.bias) for f, linear in zip(fuse, self.linear, strict=True)]

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Fused features 4 x (N, C_i, h_i, w_i) -> logits (N, K, *size)."""
        pairs = zip(features, self.folded(), strict=True)
        maps = [F.linear(x.permute(0, 2, 3, 1), *layer).permute(0, 3, 1, 2) for x, layer in pairs]  # (N, E, h_i, w_i)
        mixed = upsample(maps[3], maps[0].shape[-2:])
        for x in maps[2::-1]:
            mixed += upsample(x, mixed.shape[-2:])
        hidden = F.dropout2d(F.relu_(self.bn(mixed)), DROPOUT, self.training)
        return upsample(self.classify(hidden), size)


def upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    same = x.shape[-2:] == tuple(size)
    return x if same else F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


# ---- M-SegFormer ----------------------------------------------------------------------------------------------------
class Output(NamedTuple):
    logits: Tensor  # (B, K, H, W)
    fused: tuple[Tensor, ...]  # 4 x (B, C_i, h_i, w_i)
    per_modality: tuple[Tensor, ...]  # 4 x (B, M, C_i, h_i, w_i), zeros where absent


def present_rows(present: Tensor | None, device: torch.device) -> Tensor | None:
    """Positions of the present (sample, modality) pairs -> (N,) int64; None when all are present."""
    if present is None or bool(present.all()):  # `present` should lie on the CPU: a GPU would have to be waited for
        return None
    return present.flatten().nonzero().squeeze(1).to(device, non_blocking=True)


def gather(x: Tensor, rows: Tensor | None) -> Tensor:
    """(B M, ...) -> (N, ...): only present pairs are computed, so an absent modality costs nothing."""
    return x if rows is None else x.index_select(0, rows)


def scatter(x: Tensor, rows: Tensor | None, total: int) -> Tensor:
    """(N, ...) -> (total = B M, ...), zeros where absent."""
    return x if rows is None else x.new_zeros(total, *x.shape[1:]).index_copy(0, rows, x)


def check_input(images: Tensor, present: Tensor | None, modalities: list[str]) -> None:
    expected = f"(B, {len(modalities)}, 3, H, W) for {', '.join(modalities)}"
    if images.ndim != 5 or images.shape[1] != len(modalities) or images.shape[2] != 3:
        raise ValueError(f"images have shape {tuple(images.shape)}, this model needs {expected}.")
    if min(images.shape[-2:]) < MIN_SIDE:
        raise ValueError(f"images are {tuple(images.shape[-2:])} pixels, both sides must be at least {MIN_SIDE}.")
    if present is not None:
        if present.shape != images.shape[:2] or present.dtype != torch.bool:
            raise ValueError(f"present is {present.dtype} {tuple(present.shape)}, it must be bool (B, M).")
        if not bool(present.any(1).all()):
            raise ValueError("present has a row without any modality; each sample needs at least one.")


class MSegFormer(nn.Module):
    """One MiT for all modalities, the mean of their features at each stage, a SegFormer head."""

    def __init__(self, p: Preset, num_classes: int, modalities: list[str]):
        super().__init__()
        self.modalities = list(modalities)
        self.widths = p.widths
        self.stages = (p.stages or mit_stages)(p, eps=1e-6)
        self.decoder = Decoder(p.widths, p.embed, num_classes)

    def encode(self, images: Tensor, present: Tensor | None = None) -> tuple[Tensor, ...]:
        """(B, M, 3, H, W) -> 4 x (B, M, C_i, h_i, w_i): each modality on its own, zeros where absent."""
        check_input(images, present, self.modalities)
        b, m = images.shape[:2]
        rows = present_rows(present, images.device)
        x = gather(images.flatten(0, 1), rows)  # (N, 3, H, W)
        features = []
        for stage in self.stages:
            y = stage(x)  # (N, h, w, C)
            features.append(scatter(y, rows, b * m).unflatten(0, (b, m)).permute(0, 1, 4, 2, 3))
            x = y.permute(0, 3, 1, 2)
        return tuple(features)

    def answer(self, per_modality: tuple[Tensor, ...], present: Tensor | None, size: tuple[int, int]) -> Output:
        """The mean of `encode`'s features over `present`, (B, M) bool or None: all; and its logits of this size."""
        present = torch.ones(per_modality[0].shape[:2], dtype=torch.bool) if present is None else present
        weights = present.to(per_modality[0].device, torch.float32, non_blocking=True)
        weights = (weights / weights.sum(1, keepdim=True))[..., None, None, None]  # (B, M, 1, 1, 1)
        fused = []
        for f in per_modality:
            f = f.permute(0, 1, 3, 4, 2)  # (B, M, h, w, C), the order in memory, so that the mean keeps it
            fused.append((weights * f).sum(1).to(f.dtype).permute(0, 3, 1, 2))
        return Output(self.decoder(fused, size), tuple(fused), per_modality)

    def forward(self, images: Tensor, present: Tensor | None = None) -> Output:
        """images (B, M, 3, H, W) normalised; present (B, M) bool, best on the CPU, None: all."""
        return self.answer(self.encode(images, present), present, images.shape[-2:])
