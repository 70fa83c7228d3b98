"""Stages of RegNet blocks (arXiv 2003.13678) over frames, as timm builds them with a LayerNorm over channels.

Dims: F frames, h w rows and columns of a frame, M = F * h * w places, C and D channels.

Places are rows, channels last, so that a convolution of kernel 1 is a linear, which recipes quantize; the depthwise
convolution has 9 values a channel and stays in floats.
"""

import torch
from torch import nn

from .linear import Linear
from .repeat import BlockRunner

__all__ = ["RegStage"]

_EPS = 1e-5  # of timm's LayerNormAct2d, which is not that of its LayerNorm2d
_SQUEEZE = 0.25  # of a block's input channels


class ConvNorm(nn.Module):
    """A convolution of kernel 1 without bias, then the norm: rows [M, C] -> [M, D]."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.conv = Linear(num_inputs, num_outputs, bias=False)
        self.bn = nn.LayerNorm(num_outputs, _EPS)

    def forward(self, x_MC: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x_MC))


class DepthwiseNorm(nn.Module):
    """A 3 x 3 convolution of each channel by itself, zeros around the frame, then the norm: [M, D] -> [M, D]."""

    def __init__(self, width: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.bn = nn.LayerNorm(width, _EPS)

    def forward(self, x_MD: torch.Tensor) -> torch.Tensor:
        width = x_MD.shape[-1]
        x_FDhw = self.conv(x_MD.reshape(-1, *self.size, width).permute(0, 3, 1, 2))
        return self.bn(x_FDhw.permute(0, 2, 3, 1).reshape(-1, width))


class SqueezeExcite(nn.Module):
    """Each channel times a gate that is made of the means of all channels over the frame (arXiv 1709.01507)."""

    def __init__(self, width: int, inner: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.num_places = size[0] * size[1]
        self.fc1 = Linear(width, inner, bias=True)
        self.fc2 = Linear(inner, width, bias=True)

    def forward(self, x_MD: torch.Tensor) -> torch.Tensor:
        x_FPD = x_MD.reshape(-1, self.num_places, x_MD.shape[-1])
        gate_FD = torch.sigmoid(self.fc2(nn.functional.silu(self.fc1(x_FPD.mean(1)))))
        return (x_FPD * gate_FD.unsqueeze(1)).reshape(-1, x_MD.shape[-1])


class RegBlock(nn.Module):
    """Kernel 1, depthwise 3 x 3, squeeze and excite, kernel 1, and the shortcut: rows [M, C] -> [M, D]."""

    def __init__(self, num_inputs: int, width: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.conv1 = ConvNorm(num_inputs, width)
        self.conv2 = DepthwiseNorm(width, size)
        self.se = SqueezeExcite(width, round(_SQUEEZE * num_inputs), size)
        self.conv3 = ConvNorm(width, width)
        self.downsample = ConvNorm(num_inputs, width) if num_inputs != width else nn.Identity()

    def forward(self, x_MC: torch.Tensor) -> torch.Tensor:
        silu = nn.functional.silu
        y_MD = self.se(silu(self.conv2(silu(self.conv1(x_MC)))))
        return silu(self.conv3(y_MD) + self.downsample(x_MC))


class RegStage(nn.ModuleDict):
    """`depth` blocks b1, b2, ... over frames of one `size` (rows, columns): rows [M, C] in raster order -> [M, D].

    `run` is the one BlockRunner of the forward pass.
    """

    def __init__(self, num_inputs: int, width: int, size: tuple[int, int], depth: int) -> None:
        blocks = [RegBlock(width if number else num_inputs, width, size) for number in range(depth)]
        super().__init__({f"b{number}": block for number, block in enumerate(blocks, start=1)})

    def forward(self, x_MC: torch.Tensor, run: BlockRunner) -> torch.Tensor:
        for block in self.values():
            x_MC = run(block, x_MC)
        return x_MC
