"""CMNeXt (DELIVER, arXiv 2303.01480), the second backbone of RMMSS, and `build_model` for either.

    model = build_model("cmnext_b2", num_classes=25, modalities=["rgb", "depth", "event", "lidar"])
    logits = model(images, present).logits  # images (B, M, 3, H, W), present (B, M) bool or None -> (B, K, H, W)

A MiT for RGB and a light branch for all other modalities, joined at each stage by the FRM and FFM of CMX
(arXiv 2203.04838). MiT, the head and M-SegFormer are in segformer.py.

Axes: B batch, M modalities, N present (sample, modality) pairs, K classes, C channels, H W image, h w stage.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import segformer
from segformer import MixFFN, Output, Preset, check_input, gather, scatter


class ScorePredictor(nn.Module):
    """The self-query hub's score maps: sigmoid(conv1x1(depthwise3x3(x))), own weights for each modality."""

    def __init__(self, channels: int, sources: int):
        super().__init__()
        self.depthwise = nn.ModuleList(nn.Conv2d(channels, channels, 3, 1, 1, groups=channels) for _ in range(sources))
        self.pointwise = nn.ModuleList(nn.Conv2d(channels, 1, 1) for _ in range(sources))

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C, h, w) -> (B, S, 1, h, w) in 0..1."""
        nets = zip(x.unbind(1), self.depthwise, self.pointwise, strict=True)
        return torch.stack([pointwise(depthwise(source)) for source, depthwise, pointwise in nets], 1).sigmoid()


class AuxEmbed(nn.Module):
    """Patch embedding with one convolution for all auxiliary modalities and a LayerNorm for each."""

    def __init__(self, c_in: int, c: int, first: bool, modalities: int):
        super().__init__()
        kernel, stride = (7, 4) if first else (3, 2)
        self.proj = nn.Conv2d(c_in, c, kernel, stride, kernel // 2)
        self.weight = nn.Parameter(torch.ones(modalities, c))
        self.bias = nn.Parameter(torch.zeros(modalities, c))

    def forward(self, x: Tensor, modality: Tensor) -> Tensor:
        """x (N, C_in, H, W), modality (N,) index -> (N, h, w, C)."""
        x = self.proj(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        return x * self.weight[modality][:, None, None] + self.bias[modality][:, None, None]


class MSPABlock(nn.Module):
    """f + A(BN f), then g f + MLP(BN f), both branches scaled per channel. A(u) = u + gate u, the gate from 7x7
    depth-wise maps pooled at three sizes; g a gate per channel."""

    def __init__(self, c: int, ratio: int, drop_path: float):
        super().__init__()
        self.layer_scale_1 = nn.Parameter(torch.full((c,), 1e-2))
        self.layer_scale_2 = nn.Parameter(torch.full((c,), 1e-2))
        self.norm1 = nn.BatchNorm2d(c)
        self.attn = nn.ModuleDict({"conv0": nn.Conv2d(c, c, 7, 1, 3, groups=c), "conv4": nn.Conv2d(c, c, 1)})
        self.norm2 = nn.BatchNorm2d(c)
        self.mlp = MixFFN(c, ratio)
        self.gate = nn.Conv1d(1, 1, 3, padding=1, bias=False)  # along the channels
        self.drop_path = segformer.DropPath(drop_path)

    def forward(self, f: Tensor) -> Tensor:  # (B, C, h, w)
        u = self.norm1(f)
        v = self.attn["conv0"](u)
        v = v + sum(F.avg_pool2d(v, k, 1, k // 2, count_include_pad=False) for k in (3, 7, 11))
        attended = torch.sigmoid(self.attn["conv4"](v)) * u + u
        f = f + self.drop_path(self.layer_scale_1[:, None, None] * attended)
        gate = torch.sigmoid(self.gate(f.mean((2, 3))[:, None]))[:, 0, :, None, None]  # (B, C, 1, 1)
        mlp = self.mlp(self.norm2(f).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return gate * f + self.drop_path(self.layer_scale_2[:, None, None] * mlp)


class FRM(nn.Module):
    """Feature rectification (CMX, section 3.2): each of the pair is corrected by the other, per channel and pixel."""

    def __init__(self, c: int):
        super().__init__()
        self.channel = nn.Sequential(nn.Linear(4 * c, 4 * c), nn.ReLU(), nn.Linear(4 * c, 2 * c), nn.Sigmoid())
        self.spatial = nn.Sequential(nn.Conv2d(2 * c, c, 1), nn.ReLU(), nn.Conv2d(c, 2, 1), nn.Sigmoid())

    def forward(self, rgb: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat((rgb, f), 1)  # (B, 2C, h, w)
        pooled = torch.cat((both.mean((2, 3)), both.amax((2, 3))), 1)  # (B, 4C)
        cw = self.channel(pooled).unflatten(1, (2, -1))[..., None, None]  # (B, 2, C, 1, 1)
        sw = self.spatial(both)[:, :, None]  # (B, 2, 1, h, w)
        return rgb + 0.5 * (cw[:, 1] + sw[:, 1]) * f, f + 0.5 * (cw[:, 0] + sw[:, 0]) * rgb


class FFM(nn.Module):
    """Feature fusion (CMX, section 3.3): linear-cost cross attention, then a convolutional mix of the pair."""

    def __init__(self, c: int, heads: int):
        super().__init__()
        self.heads = heads
        self.channel_proj = nn.ModuleList(nn.Linear(c, 2 * c) for _ in range(2))
        self.kv = nn.ModuleList(nn.Linear(c, 2 * c, bias=False) for _ in range(2))
        self.end_proj = nn.ModuleList(nn.Linear(2 * c, c) for _ in range(2))
        self.norm = nn.ModuleList(nn.LayerNorm(c) for _ in range(2))
        self.residual = nn.Conv2d(2 * c, c, 1, bias=False)
        self.mix = nn.Sequential(
            nn.Conv2d(2 * c, c, 1), nn.Conv2d(c, c, 3, 1, 1, groups=c), nn.ReLU(), nn.Conv2d(c, c, 1), nn.BatchNorm2d(c)
        )
        self.bn = nn.BatchNorm2d(c)

    def forward(self, rgb: Tensor, f: Tensor) -> Tensor:
        pair = [x.permute(0, 2, 3, 1).flatten(1, 2) for x in (rgb, f)]  # 2 x (B, h w, C)
        y, u = zip(*[F.relu(self.channel_proj[i](pair[i])).chunk(2, -1) for i in range(2)], strict=True)
        q = [x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in u]  # (B, heads, h w, d)
        kv = [self.kv[i](u[i]).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4) for i in range(2)]
        contexts = [(k.transpose(-2, -1) @ v * v.shape[-1] ** -0.5).softmax(-2) for k, v in kv]  # (B, heads, d, d)
        crossed = [(q[i] @ contexts[1 - i]).transpose(1, 2).flatten(2) for i in range(2)]  # (B, h w, C)
        out = [self.norm[i](pair[i] + self.end_proj[i](torch.cat((y[i], crossed[i]), -1))) for i in range(2)]
        z = torch.cat(out, -1).unflatten(1, rgb.shape[2:]).permute(0, 3, 1, 2)  # (B, 2C, h, w)
        return self.bn(self.residual(z) + self.mix(z))


class CMNeXt(nn.Module):
    """CMNeXt (arXiv 2303.01480, section 4): RGB by a MiT, the others by one light branch on their element-wise maximum.

    An absent auxiliary modality is left out of the hub's maximum, an absent RGB has zero features; the published code
    feeds zero images through every branch.

    published_layout: before it adds f' for the next stage, the authors' code reads the memory of x_m (B, C, h, w) as
    (B, h, w, C), which scrambles positions and channels. Loading their weights, which were trained with it, switches it
    on, and it travels in checkpoints. From scratch it is off.
    """

    def __init__(self, p: Preset, num_classes: int, modalities: list[str]):
        super().__init__()
        if len(modalities) < 2:
            raise ValueError("CMNeXt needs RGB and at least one more modality; use segformer_* for a single one.")
        if "rgb" in modalities[1:]:
            raise ValueError(f"CMNeXt takes rgb as its first modality, not {','.join(modalities)}.")
        self.modalities = list(modalities)
        self.widths = p.widths
        self.published_layout = False
        self.stages = segformer.mit_stages(p, eps=1e-5)
        self.aux = nn.ModuleList()  # what each stage adds to the RGB branch
        for i, (c, drops) in enumerate(zip(p.widths, segformer.drop_rates(p.depths), strict=True)):
            extra = nn.Module()
            self.aux.append(extra)
            extra.embed = AuxEmbed(3 if i == 0 else p.widths[i - 1], c, i == 0, len(modalities) - 1)
            extra.hub = ScorePredictor(c, len(modalities) - 1) if len(modalities) > 2 else None
            extra.blocks = nn.Sequential(*[MSPABlock(c, (8, 8, 4, 4)[i], drop) for drop in drops])
            extra.norm = nn.LayerNorm(c, eps=1e-6)
            extra.frm = FRM(c)
            extra.ffm = FFM(c, p.heads[i])
        self.aux.apply(segformer.init_weights)
        self.decoder = segformer.Decoder(p.widths, p.cmnext_embed, num_classes)

    def get_extra_state(self) -> dict:
        return {"published_layout": self.published_layout}

    def set_extra_state(self, state: dict) -> None:
        self.published_layout = bool(state["published_layout"])

    def forward(self, images: Tensor, present: Tensor | None = None) -> Output:
        """images (B, M, 3, H, W) normalised; present (B, M) bool, best on the CPU, None: all."""
        check_input(images, present, self.modalities)
        b, m = images.shape[:2]
        parts = (None, None) if present is None else (present[:, 0], present[:, 1:])
        rgb_rows, aux_rows = (segformer.present_rows(part, images.device) for part in parts)
        modality = gather(torch.arange(m - 1, device=images.device).repeat(b), aux_rows)  # (N,), of each row
        present = torch.ones(b, m, dtype=torch.bool) if present is None else present
        absent = ~present[:, 1:, None, None, None].to(images.device, non_blocking=True)  # (B, M-1, 1, 1, 1)
        fused, per_modality = [], []
        rgb, aux = images[:, 0], gather(images[:, 1:].flatten(0, 1), aux_rows)  # (B, 3, H, W), (N, 3, H, W)
        for stage, extra in zip(self.stages, self.aux, strict=True):
            rgb = scatter(stage(gather(rgb, rgb_rows)), rgb_rows, b).permute(0, 3, 1, 2)  # (B, C, h, w)
            x = scatter(extra.embed(aux, modality), aux_rows, b * (m - 1))
            x = x.unflatten(0, (b, m - 1)).permute(0, 1, 4, 2, 3)  # (B, M-1, C, h, w)
            per_modality.append(torch.cat((rgb[:, None], x), 1))

            f = x[:, 0]
            if extra.hub is not None:  # self-query: per element the largest of the present ones, 0 if none is
                x = x + extra.hub(x) * x
                f = x.masked_fill(absent, -torch.inf).amax(1).masked_fill(absent.all(1), 0.0)
            f = extra.blocks(f)
            f = extra.norm(f.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            rgb, f = extra.frm(rgb, f)
            fused.append(extra.ffm(rgb, f))
            if self.published_layout:
                x = x.contiguous().view(b, m - 1, *x.shape[3:], x.shape[2]).permute(0, 1, 4, 2, 3)
            x = f[:, None] if extra.hub is None else x + f[:, None]
            aux = gather(x.flatten(0, 1), aux_rows)
        return Output(self.decoder(fused, images.shape[-2:]), tuple(fused), tuple(per_modality))


BACKBONES = [f"{family}_{size}" for family in ("segformer", "cmnext") for size in "tiny b0 b1 b2 b3 b4 b5".split()]


def build_model(backbone: str, num_classes: int, modalities: list[str]) -> segformer.MSegFormer | CMNeXt:
    """A freshly initialised MSegFormer or CMNeXt.

    backbone: one of BACKBONES; modalities: names in the order of the images' M axis, for CMNeXt RGB first.
    Raises ValueError for an unknown backbone.
    """
    family, _, size = backbone.partition("_")
    preset = segformer.PRESETS.get(backbone if size == "tiny" else size)
    if family not in ("segformer", "cmnext") or "_" in size or preset is None or (family == "cmnext" and preset.stages):
        others = "segformer_lite0 needs python -m benchmarks.lite0 before the script's name"
        raise ValueError(f"unknown backbone '{backbone}'; choose one of {', '.join(BACKBONES)}; {others}.")
    build = segformer.MSegFormer if family == "segformer" else CMNeXt
    return build(preset, num_classes, modalities)
