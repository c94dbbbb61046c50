"""The two backbones of RMMSS (arXiv 2505.12861 v2, section 4): MSegFormer and CMNeXt, from scratch.

    model = build_model("segformer_b0", num_classes=25, modalities=["rgb", "depth", "event", "lidar"])
    out = model(images, present)        # images (B, M, 3, H, W), present (B, M) bool or None (all there)
    out.logits                          # (B, K, H, W)

MSegFormer (AnySeg): one MiT encoder (SegFormer, arXiv 2105.15203, section 3.1) shared by all modalities, the stage
features of the present ones averaged, and a SegFormer head.  CMNeXt (DELIVER, arXiv 2303.01480): a MiT for RGB, a light
auxiliary branch for all other sensors, joined at every stage by the FRM and FFM of CMX (arXiv 2203.04838).
The encoder and the head themselves are in segformer.py.

Axes: B batch, M modalities, N packed (sample, modality) pairs, K classes, C channels, H W image, h w stage.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from engine.pretrained import load_pretrained
from segformer import (
    MIN_SIDE,
    PRESETS,
    Decoder,
    DropPath,
    MixFFN,
    Preset,
    drop_rates,
    mit_stages,
    sensor_indicators,
    upsample,
)

__all__ = ["BACKBONES", "Output", "build_model", "condition_on_sensors", "load_pretrained", "subset_logits"]


class Output(NamedTuple):
    logits: Tensor  # (B, K, H, W)
    fused: tuple[Tensor, ...]  # 4 x (B, C_i, h_i, w_i)
    per_modality: tuple[Tensor, ...]  # 4 x (B, M, C_i, h_i, w_i), zeros where absent


# ---- packing: only the present (sample, modality) pairs are computed ---------------------------------------


def pack_index(present: Tensor | None, device: torch.device) -> Tensor | None:
    """Flat positions of the True entries of `present`, None when all are True.

    Keep `present` on the CPU: its count decides the size of the packed batch, which the host must know, and reading
    it from a GPU would stop the queue once a step.
    """
    if present is None or bool(present.all()):
        return None
    return present.flatten().nonzero().squeeze(1).to(device, non_blocking=True)


def take(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(0, index)


def put(packed: Tensor, index: Tensor | None, rows: int) -> Tensor:
    """Inverse of `take`: rows that were not taken are zeros."""
    return packed if index is None else packed.new_zeros(rows, *packed.shape[1:]).index_copy(0, index, packed)


def check_input(images: Tensor, present: Tensor | None, modalities: list[str]) -> None:
    expected = f"(B, {len(modalities)}, 3, H, W) for {', '.join(modalities)}"
    if images.ndim != 5 or images.shape[1] != len(modalities) or images.shape[2] != 3:
        raise ValueError(f"images have shape {tuple(images.shape)}, this model needs {expected}.")
    if min(images.shape[-2:]) < MIN_SIDE:
        raise ValueError(f"images are {tuple(images.shape[-2:])} pixels, both sides must be at least {MIN_SIDE}.")
    if present is not None:
        if present.shape != images.shape[:2] or present.dtype != torch.bool:
            raise ValueError(f"present is {present.dtype} {tuple(present.shape)}, it must be bool (B, M).")
        if not present.is_cuda and not bool(present.any(1).all()):
            raise ValueError("present has a row without any sensor; at least one per sample is needed.")


# ---- MSegFormer --------------------------------------------------------------------------------------------


class MSegFormer(nn.Module):
    """One MiT for all modalities, mean fusion at each stage, SegFormer head (the backbone of AnySeg and RMMSS)."""

    def __init__(self, p: Preset, num_classes: int, modalities: list[str], drop_path: float, dropout: float):
        super().__init__()
        self.modalities = list(modalities)
        self.num_classes = num_classes
        self.widths = p.widths
        self.stages = mit_stages(p, eps=1e-6, drop_path=drop_path)
        self.register_parameter("fusion_logits", None)  # or (M + 2, M), see `condition_on_sensors`
        self.decoder = Decoder(p.widths, p.head, num_classes, dropout)

    def encode(self, images: Tensor, present: Tensor | None = None) -> tuple[Tensor, ...]:
        """(B, M, 3, H, W) -> 4 x (B, M, C_i, h_i, w_i); every present pair goes through the encoder on its own."""
        check_input(images, present, self.modalities)
        b, m = images.shape[:2]
        index = pack_index(present, images.device)
        x = take(images.flatten(0, 1), index)  # (N, 3, H, W)
        features = []
        for stage in self.stages:
            y = stage(x)  # (N, h, w, C)
            features.append(put(y, index, b * m).unflatten(0, (b, m)).permute(0, 1, 4, 2, 3))
            x = y.permute(0, 3, 1, 2)
        return tuple(features)

    def forward(self, images: Tensor, present: Tensor | None = None) -> Output:
        per_modality = self.encode(images, present)
        present = torch.ones(images.shape[:2], dtype=torch.bool) if present is None else present
        if self.fusion_logits is None:  # the plain mean; absent sensors are zeros
            count = present.sum(1).to(images.device, non_blocking=True)[:, None, None, None]
            fused = tuple(f.sum(1) / count.to(f.dtype) for f in per_modality)  # (B, C, h, w)
        else:
            weights = self.fusion_weights(present)[:, :, None, None, None]
            fused = tuple((weights * f).sum(1).to(f.dtype) for f in per_modality)
        return Output(self.decoder(fused, images.shape[-2:], present), fused, per_modality)

    def fusion_weights(self, present: Tensor) -> Tensor:
        """Weight of each sensor in the mean, (B, M) bool -> (B, M), a row sums to 1: equal, unless conditioned."""
        if self.fusion_logits is None:
            return present / present.sum(1, keepdim=True)
        present = present.to(self.fusion_logits.device, non_blocking=True)
        logits = (sensor_indicators(present)[:, :, None] * self.fusion_logits).sum(1)
        return logits.masked_fill(~present, -torch.inf).softmax(1)


def subset_logits(
    model: nn.Module, images: Tensor, subsets: list[tuple[int, ...]], degraded: Tensor | None = None
) -> Iterator[Tensor]:
    """Logits (B, K, H, W) of every subset of the sensors, given as tuples of positions in `model.modalities`.

    degraded: what the sensors outside a subset deliver instead, (B or 1, M, 3, H, W); None leaves them out.
    With mean fusion each sensor goes through the encoder once, all subsets are means of the same features, and no
    gradients are given. Raises ValueError for an MSegFormer in training mode.
    """
    if isinstance(model, MSegFormer):
        features, weights, declared = shared_features(model, images, subsets, degraded)
        for logits in model.decoder.mean_logits(features, weights.to(images.device), declared):
            yield upsample(logits, images.shape[-2:])
    else:
        for out in subset_outputs(model, images, subsets, degraded):
            yield out.logits


def subset_outputs(
    model: nn.Module, images: Tensor, subsets: list[tuple[int, ...]], degraded: Tensor | None = None
) -> Iterator[Output]:
    """As `subset_logits`, with the fused features beside the logits; with mean fusion per_modality is ()."""
    if isinstance(model, MSegFormer):
        features, weights, declared = shared_features(model, images, subsets, degraded)
        for row, there in zip(weights.tolist(), declared, strict=True):
            fused = tuple(sum(w * f[:, i] for i, w in enumerate(row) if w) for f in features)
            yield Output(model.decoder(fused, images.shape[-2:], there.expand(len(images), -1)), fused, ())
    else:
        for subset in subsets:
            present = present_of(subset, images.shape[:2])
            if degraded is None:
                yield model(images, present)
            else:
                yield model(composite(images, present, degraded))


def shared_features(
    model: MSegFormer, images: Tensor, subsets: list[tuple[int, ...]], degraded: Tensor | None = None
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """What all subsets share -> features 4 x (B, V, C_i, h_i, w_i), V = M, or 2 M with `degraded`; the weight of each
    map in each subset's mean (S, V), on the CPU; the sensors that each subset is declared to have (S, M), with
    `degraded` all of them, because those protocols do not announce the failure."""
    if model.training:
        raise ValueError("many subsets from one pass need BatchNorm's running statistics: call model.eval() first.")
    present = torch.stack([present_of(subset, images.shape[1:2]) for subset in subsets])  # (S, M)
    declared = present if degraded is None else torch.ones_like(present)
    weights = model.fusion_weights(declared).cpu()  # before the encoder is queued, so that nothing waits for it
    features = model.encode(images)
    if degraded is not None:
        broken = model.encode(degraded)
        features = tuple(torch.cat((f, g.expand_as(f)), 1) for f, g in zip(features, broken, strict=True))
        weights = torch.cat((weights * present, weights * ~present), 1)
    return features, weights, declared


def composite(images: Tensor, present: Tensor, degraded: Tensor) -> Tensor:
    """`images` where a sensor is present, `degraded` elsewhere."""
    return torch.where(present.to(images.device)[:, :, None, None, None], images, degraded)


def present_of(subset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """The same sensors for every sample of a batch -> (B, M) bool on the CPU; shape (M,) for one row of it."""
    present = torch.zeros(shape, dtype=torch.bool)
    present[..., list(subset)] = True
    return present


# ---- CMNeXt ------------------------------------------------------------------------------------------------


class ScorePredictor(nn.Module):
    """One score map per source: sigmoid(conv1x1(depthwise3x3(x))), weights of its own for each source.

    No non-linearity stands between the two convolutions, so they fold into one 3x3 convolution C -> 1 with weight
    `w_pw[c] * w_dw[c]` and bias `b_pw + sum_c w_pw[c] b_dw[c]`, which the kernels compute in one pass.
    Used by CMNeXt's self-query hub and by the feature selection of stage 2.
    """

    def __init__(self, channels: int, sources: int):
        super().__init__()
        self.depthwise = nn.ModuleList(nn.Conv2d(channels, channels, 3, 1, 1, groups=channels) for _ in range(sources))
        self.pointwise = nn.ModuleList(nn.Conv2d(channels, 1, 1) for _ in range(sources))

    def folded(self) -> tuple[Tensor, Tensor]:
        """weight (S, C, 3, 3) and bias (S,) of the folded convolution."""
        dw = torch.stack([conv.weight[:, 0] for conv in self.depthwise])  # (S, C, 3, 3)
        db = torch.stack([conv.bias for conv in self.depthwise])  # (S, C)
        pw = torch.stack([conv.weight[0, :, 0, 0] for conv in self.pointwise])  # (S, C)
        pb = torch.cat([conv.bias for conv in self.pointwise])  # (S,)
        return pw[:, :, None, None] * dw, pb + (pw * db).sum(1)


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


class MSPA(nn.Module):
    """Multi-scale pooling attention, A(u) of CMNeXt: a 7x7 depth-wise map pooled at four scales makes a gate."""

    def __init__(self, c: int):
        super().__init__()
        self.conv0 = nn.Conv2d(c, c, 7, 1, 3, groups=c)
        self.conv4 = nn.Conv2d(c, c, 1)

    def forward(self, u: Tensor) -> Tensor:
        v = self.conv0(u)
        pooled = [F.avg_pool2d(v, k, 1, k // 2, count_include_pad=False) for k in (3, 7, 11)]
        return torch.sigmoid(self.conv4(v + sum(pooled))) * u + u


class AuxBlock(nn.Module):
    def __init__(self, c: int, ratio: int, drop_path: float):
        super().__init__()
        self.layer_scale_1 = nn.Parameter(torch.full((c,), 1e-2))
        self.layer_scale_2 = nn.Parameter(torch.full((c,), 1e-2))
        self.norm1 = nn.BatchNorm2d(c)
        self.attn = MSPA(c)
        self.norm2 = nn.BatchNorm2d(c)
        self.mlp = MixFFN(c, ratio)
        self.gate = nn.Conv1d(1, 1, 3, padding=1, bias=False)  # along the channels
        self.drop_path = DropPath(drop_path)

    def forward(self, f: Tensor) -> Tensor:  # (B, C, h, w)
        f = f + self.drop_path(self.layer_scale_1[:, None, None] * self.attn(self.norm1(f)))
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
        b, c, h, w = rgb.shape
        pair = [x.permute(0, 2, 3, 1).flatten(1, 2) for x in (rgb, f)]  # 2 x (B, h w, C)
        y, u = zip(*[F.relu(self.channel_proj[i](pair[i])).chunk(2, -1) for i in range(2)], strict=True)
        contexts = []
        for kv, x in zip(self.kv, u, strict=True):
            k, v = kv(x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, h w, d)
            contexts.append(((k.transpose(-2, -1) @ v) * (c // self.heads) ** -0.5).softmax(-2))  # (B, heads, d, d)
        out = []
        for i in range(2):
            q = u[i].unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, h w, d)
            crossed = (q @ contexts[1 - i]).transpose(1, 2).flatten(2)  # (B, h w, C)
            out.append(self.norm[i](pair[i] + self.end_proj[i](torch.cat((y[i], crossed), -1))))
        z = torch.cat(out, -1).unflatten(1, (h, w)).permute(0, 3, 1, 2)  # (B, 2C, h, w)
        return self.bn(self.residual(z) + self.mix(z))


class AuxStage(nn.Module):
    """Everything that one stage of CMNeXt adds to the RGB branch."""

    def __init__(self, c_in: int, c: int, i: int, heads: int, modalities: int, drops: list[float]):
        super().__init__()
        self.embed = AuxEmbed(c_in, c, i == 0, modalities)
        self.hub = ScorePredictor(c, modalities) if modalities > 1 else None
        self.blocks = nn.Sequential(*[AuxBlock(c, (8, 8, 4, 4)[i], p) for p in drops])
        self.norm = nn.LayerNorm(c, eps=1e-6)
        self.frm = FRM(c)
        self.ffm = FFM(c, heads)


class CMNeXt(nn.Module):
    """CMNeXt (arXiv 2303.01480, section 4): RGB by a MiT, all others by one light branch that asks for the best sensor.

    `present=False` leaves an auxiliary modality out of the hub's maximum and sets RGB's stage features to zero, where
    the published code feeds zero images through every branch.

    published_layout: the authors' code reinterprets the memory of x_m (B, C, h, w) as (B, h, w, C) before it adds f'
    for the next stage, which scrambles positions and channels; their weights were trained with it.  `load_pretrained`
    switches it on for their weights, and it travels in checkpoints; from scratch it is off.
    """

    def __init__(self, p: Preset, num_classes: int, modalities: list[str], drop_path: float, dropout: float):
        super().__init__()
        if len(modalities) < 2:
            raise ValueError(f"CMNeXt needs RGB and at least one more modality, got {', '.join(modalities)}; "
                             "use segformer_* for a single one.")  # fmt: skip
        self.modalities = list(modalities)
        self.num_classes = num_classes
        self.widths = p.widths
        self.published_layout = False
        self.stages = mit_stages(p, eps=1e-5, drop_path=drop_path)
        ins, drops = (3, *p.widths), drop_rates(p.depths, drop_path)
        self.aux = nn.ModuleList(
            AuxStage(ins[i], p.widths[i], i, p.heads[i], len(modalities) - 1, drops[i]) for i in range(4)
        )
        self.decoder = Decoder(p.widths, p.cmnext_head, num_classes, dropout)

    def get_extra_state(self) -> dict:
        return {"published_layout": self.published_layout}

    def set_extra_state(self, state: dict) -> None:
        self.published_layout = bool(state["published_layout"])

    def forward(self, images: Tensor, present: Tensor | None = None) -> Output:
        check_input(images, present, self.modalities)
        b, m = images.shape[:2]
        rgb_index = pack_index(None if present is None else present[:, 0], images.device)
        aux_index = pack_index(None if present is None else present[:, 1:], images.device)
        modality = torch.arange(m - 1, device=images.device).repeat(b)  # (B (M-1),) which sensor a row holds
        modality = take(modality, aux_index)
        some_aux = None if aux_index is None else present[:, 1:].to(images.device, non_blocking=True)  # (B, M-1)

        rgb, aux = images[:, 0], take(images[:, 1:].flatten(0, 1), aux_index)  # (B, 3, H, W), (N, 3, H, W)
        fused, per_modality = [], []
        for i, (stage, extra) in enumerate(zip(self.stages, self.aux, strict=True)):
            # an absent RGB has zero features, and costs nothing; it still receives from f in the FRM
            rgb = put(stage(take(rgb, rgb_index)), rgb_index, b).permute(0, 3, 1, 2)  # (B, C, h, w)
            x = put(extra.embed(aux, modality), aux_index, b * (m - 1))
            x = x.unflatten(0, (b, m - 1)).permute(0, 1, 4, 2, 3)  # (B, M-1, C, h, w)
            per_modality.append(torch.cat((rgb[:, None], x), 1))

            if extra.hub is None:
                f = x[:, 0]
            else:
                scores = kernels.feature_score(list(x.unbind(1)), *extra.hub.folded())  # (M-1, B, 1, h, w)
                x = x + scores.transpose(0, 1).to(x.dtype) * x
                if some_aux is None:
                    f = x.amax(1)
                else:  # the maximum over the present sensors; zeros where none is there
                    absent = ~some_aux[:, :, None, None, None]
                    f = x.masked_fill(absent, -torch.inf).amax(1).masked_fill(absent.all(1), 0.0)
            f = extra.blocks(f)
            f = extra.norm(f.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

            rgb, f = extra.frm(rgb, f)
            fused.append(extra.ffm(rgb, f))
            if i < 3:
                if extra.hub is None:
                    x = f[:, None]
                else:
                    if self.published_layout:
                        _, _, c, h, w = x.shape
                        x = x.contiguous().view(b, m - 1, h, w, c).permute(0, 1, 4, 2, 3)
                    x = x + f[:, None]
                aux = take(x.flatten(0, 1), aux_index)
        present = torch.ones(b, m, dtype=torch.bool) if present is None else present
        return Output(self.decoder(tuple(fused), images.shape[-2:], present), tuple(fused), tuple(per_modality))


# ---- conditioning on the sensors ---------------------------------------------------------------------------


def condition_on_sensors(model: nn.Module) -> None:
    """Changes the model so that it knows which sensors are present; until it is trained further, it answers as before.

    FiLM (arXiv 1709.07871): a scale and a shift of the head's channels after BatchNorm, each the sum of one learned
    vector per present sensor and one for "all are there" or "some are missing". So one model can read complete and
    incomplete features differently. In an MSegFormer also each sensor's weight in the mean, a softmax over those
    present. All stays linear in the features, so subsets still share their pass. Not in the paper, which leaves its
    final student open.
    """
    m, like = len(model.modalities), model.decoder.bn.weight
    if model.decoder.film is None:
        model.decoder.film = nn.Parameter(like.new_zeros(2, m + 2, len(like)))
        if isinstance(model, MSegFormer):
            model.fusion_logits = nn.Parameter(like.new_zeros(m + 2, m))


# ---- building and loading ----------------------------------------------------------------------------------


def init_weights(module: nn.Module) -> None:
    """As SegFormer: linear layers from a normal of 0.02, convolutions by their fan-out."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, 0.0, (2.0 / fan_out) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


SIZES = ("tiny", "b0", "b1", "b2", "b3", "b4", "b5")
BACKBONES = [f"{family}_{size}" for family in ("segformer", "cmnext") for size in SIZES]


def build_model(
    backbone: str, num_classes: int, modalities: list[str], drop_path: float = 0.1, dropout: float = 0.1
) -> MSegFormer | CMNeXt:
    """A freshly initialised model.

    Args:
        backbone: "segformer_b0" .. "segformer_b5", "cmnext_b0" .. "cmnext_b5", "segformer_tiny", "cmnext_tiny".
        num_classes: K, at least 1.
        modalities: names in the order of the images' M axis; for CMNeXt the first is the RGB branch.
        drop_path: rate of the last block, 0..1; dropout: of the decoder's channels, 0..1.
    Raises:
        ValueError: an unknown backbone, or one modality for CMNeXt.
    """
    family, _, size = backbone.partition("_")
    if backbone not in BACKBONES:
        raise ValueError(f"unknown backbone '{backbone}'; choose one of {', '.join(BACKBONES)}.")
    build = MSegFormer if family == "segformer" else CMNeXt
    model = build(PRESETS[backbone if size == "tiny" else size], num_classes, modalities, drop_path, dropout)
    model.apply(init_weights)
    return model
