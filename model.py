"""The two backbones of RMMSS (arXiv 2505.12861 v2, section 4): MSegFormer and CMNeXt.

    model = build_model("segformer_b0", num_classes=25, modalities=["rgb", "depth", "event", "lidar"])
    logits = model(images, present).logits  # images (B, M, 3, H, W), present (B, M) bool or None -> (B, K, H, W)

MSegFormer (AnySeg, arXiv 2411.17141): one MiT encoder shared by all modalities, the features of those present averaged
at each stage, a SegFormer head. CMNeXt (DELIVER, arXiv 2303.01480): a MiT for RGB and a light branch for all others,
joined at each stage by the FRM and FFM of CMX (arXiv 2203.04838). MiT and the head are in segformer.py.

Axes: B batch, M modalities, N present (sample, modality) pairs, K classes, C channels, H W image, h w stage.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segformer import MIN_SIDE, PRESETS, Decoder, DropPath, MixFFN, Preset, drop_rates, mit_stages, modality_indicators


class Output(NamedTuple):
    logits: Tensor  # (B, K, H, W); V B rows where `present` has V B, V answers to each image
    fused: tuple[Tensor, ...]  # 4 x (B, C_i, h_i, w_i), rows as the logits
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
        views, rest = divmod(len(present), len(images))  # V B rows: V answers to each image
        if views < 1 or rest or present.shape[1:] != images.shape[1:2] or present.dtype != torch.bool:
            raise ValueError(f"present is {present.dtype} {tuple(present.shape)}, it must be bool (B, M), or (V B, M).")
        if not bool(present.any(1).all()):
            raise ValueError("present has a row without any modality; each sample needs at least one.")


class MSegFormer(nn.Module):
    """One MiT for all modalities, the mean of their features at each stage, a SegFormer head."""

    def __init__(self, p: Preset, num_classes: int, modalities: list[str], drop_path: float, dropout: float):
        super().__init__()
        self.modalities = list(modalities)
        self.widths = p.widths
        self.stages = mit_stages(p, eps=1e-6, drop_path=drop_path)
        self.register_parameter("fusion_logits", None)  # or (M + 2, M), see `condition_on_modalities`
        self.decoder = Decoder(p.widths, p.embed, num_classes, dropout)

    def encode(self, images: Tensor, present: Tensor | None = None) -> tuple[Tensor, ...]:
        """(B, M, 3, H, W) -> 4 x (B, M, C_i, h_i, w_i), each modality on its own, zeros where no answer needs it."""
        check_input(images, present, self.modalities)
        b, m = images.shape[:2]
        rows = present_rows(None if present is None else present.unflatten(0, (-1, b)).any(0), images.device)
        x = gather(images.flatten(0, 1), rows)  # (N, 3, H, W)
        features = []
        for stage in self.stages:
            y = stage(x)  # (N, h, w, C)
            features.append(scatter(y, rows, b * m).unflatten(0, (b, m)).permute(0, 1, 4, 2, 3))
            x = y.permute(0, 3, 1, 2)
        return tuple(features)

    def forward(self, images: Tensor, present: Tensor | None = None) -> Output:
        """present (V B, M) gives V answers to each image, all from one pass of the encoder."""
        per_modality = self.encode(images, present)
        present = torch.ones(images.shape[:2], dtype=torch.bool) if present is None else present
        weights = self.fusion_weights(present).unflatten(0, (-1, len(images)))  # (V, B, M)
        fused = []
        for f in per_modality:
            f = f.permute(0, 1, 3, 4, 2)  # (B, M, h, w, C), the order in memory, so that the mean keeps it
            mean = (weights[..., None, None, None] * f).sum(2).flatten(0, 1).to(f.dtype)  # (V B, h, w, C)
            fused.append(mean.permute(0, 3, 1, 2))
        return Output(self.decoder(fused, images.shape[-2:], present), tuple(fused), per_modality)

    def fusion_weights(self, present: Tensor) -> Tensor:
        """Each modality's weight in the mean, (B, M) bool -> (B, M), a row sums to 1: equal, unless conditioned."""
        there = present.to(self.decoder.bn.weight, non_blocking=True)
        if self.fusion_logits is None:
            return there / there.sum(1, keepdim=True)
        logits = (modality_indicators(there.bool())[:, :, None] * self.fusion_logits).sum(1)  # (B, M)
        return logits.masked_fill(there == 0, -torch.inf).softmax(1)


class ScorePredictor(nn.Module):
    """A score map for each source, sigmoid(conv1x1(depthwise3x3(x))), with weights of its own for each.

    The self-query hub rates the auxiliary modalities with it, the feature selection (fsm.py) the two models.
    """

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
        self.drop_path = DropPath(drop_path)

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
    """CMNeXt (arXiv 2303.01480, section 4): RGB by a MiT, all others by one light branch on their largest features.

    An absent auxiliary modality is left out of the hub's maximum, an absent RGB has zero features; the published code
    feeds zero images through every branch.

    published_layout: before it adds f' for the next stage, the authors' code reads the memory of x_m (B, C, h, w) as
    (B, h, w, C), which scrambles positions and channels. Loading their weights, which were trained with it, switches it
    on, and it travels in checkpoints. From scratch it is off.
    """

    def __init__(self, p: Preset, num_classes: int, modalities: list[str], drop_path: float, dropout: float):
        super().__init__()
        if len(modalities) < 2:
            raise ValueError("CMNeXt needs RGB and at least one more modality; use segformer_* for a single one.")
        self.modalities = list(modalities)
        self.widths = p.widths
        self.published_layout = False
        self.stages = mit_stages(p, eps=1e-5, drop_path=drop_path)
        self.aux = nn.ModuleList()  # what each stage adds to the RGB branch
        for i, (c, drops) in enumerate(zip(p.widths, drop_rates(p.depths, drop_path), strict=True)):
            self.aux.append(extra := nn.Module())
            extra.embed = AuxEmbed(3 if i == 0 else p.widths[i - 1], c, i == 0, len(modalities) - 1)
            extra.hub = ScorePredictor(c, len(modalities) - 1) if len(modalities) > 2 else None
            extra.blocks = nn.Sequential(*[MSPABlock(c, (8, 8, 4, 4)[i], drop) for drop in drops])
            extra.norm = nn.LayerNorm(c, eps=1e-6)
            extra.frm = FRM(c)
            extra.ffm = FFM(c, p.heads[i])
        self.decoder = Decoder(p.widths, p.cmnext_embed, num_classes, dropout)

    def get_extra_state(self) -> dict:
        return {"published_layout": self.published_layout}

    def set_extra_state(self, state: dict) -> None:
        self.published_layout = bool(state["published_layout"])

    def forward(self, images: Tensor, present: Tensor | None = None) -> Output:
        """present may be (V B, M), as for an MSegFormer; but the modalities mix in the encoder, which runs V times."""
        check_input(images, present, self.modalities)
        if present is not None and len(present) > len(images):
            images = images.repeat(len(present) // len(images), 1, 1, 1, 1)
        b, m = images.shape[:2]
        parts = (None, None) if present is None else (present[:, 0], present[:, 1:])
        rgb_rows, aux_rows = (present_rows(part, images.device) for part in parts)
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
        return Output(self.decoder(tuple(fused), images.shape[-2:], present), tuple(fused), tuple(per_modality))


def condition_on_modalities(model: nn.Module) -> None:
    """Tells the model which modalities are present; until it is trained further, it answers as before.

    FiLM (arXiv 1709.07871): after the head's BatchNorm each channel is scaled and shifted by learned amounts, one for
    each present modality and one for "all are there" or "some are missing". An MSegFormer's weights of the mean are
    learned in the same way. Not in the paper, which leaves its final student open.
    """
    m, like = len(model.modalities), model.decoder.bn.weight
    if model.decoder.film is None:
        model.decoder.film = nn.Parameter(like.new_zeros(2, m + 2, len(like)))
        if isinstance(model, MSegFormer):
            model.fusion_logits = nn.Parameter(like.new_zeros(m + 2, m))


def init_weights(module: nn.Module) -> None:
    """As SegFormer: linear layers from a normal of 0.02, convolutions by their fan-out, biases zero."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, 0.0, (2.0 / fan_out) ** 0.5)
    if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
        nn.init.zeros_(module.bias)


BACKBONES = [f"{family}_{size}" for family in ("segformer", "cmnext") for size in "tiny b0 b1 b2 b3 b4 b5".split()]


def build_model(backbone: str, num_classes: int, modalities: list[str], drop_path: float = 0.1, dropout: float = 0.1):
    """A freshly initialised MSegFormer or CMNeXt.

    backbone: one of BACKBONES; modalities: names in the order of the images' M axis, for CMNeXt RGB first; drop_path:
    rate of the last block, dropout: of the head's channels, both from 0 on and below 1. ValueError for an unknown
    backbone.
    """
    family, _, size = backbone.partition("_")
    if backbone not in BACKBONES:
        raise ValueError(f"unknown backbone '{backbone}'; choose one of {', '.join(BACKBONES)}.")
    build = MSegFormer if family == "segformer" else CMNeXt
    model = build(PRESETS[backbone if size == "tiny" else size], num_classes, modalities, drop_path, dropout)
    return model.apply(init_weights)
