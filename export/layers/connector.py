"""Connectors between a tower of frames and a decoder: blocks of frames, rows and columns become one token each.

Dims: F frames, h w rows and columns of a frame, P = h * w, W windows in time, k l m kernel in frames, rows and columns,
C tower width, D decoder width, R rows of tokens.

Which frames a window takes is an index input (runtime/connector.py), so clips of any lengths and stills go through in
one call. The three-dimensional convolution moves by its own kernel, so it is a linear map of each block, and the
largest matrix by far: 8 * D * D values, which recipes quantize as any linear.
"""

from dataclasses import dataclass

import torch
from torch import nn

from .linear import Linear
from .regnet import RegStage
from .repeat import BlockRunner

__all__ = ["ConnectorConfig", "MeanProjector", "WindowConnector", "mlp"]


@dataclass(frozen=True)
class ConnectorConfig:
    """Sizes of a connector. `kernel` is that of the sampler and its stride; `padding` places of zeros are around."""

    width: int  # of the tower
    out_width: int
    side: int  # rows and columns of a frame
    kernel: tuple[int, int, int]
    padding: int
    pools: bool  # the sampler is a mean, without weights
    depth: int  # blocks of the stages before and behind the sampler; 0: there are none
    num_linears: int = 2  # of the readout

    @property
    def sampled_side(self) -> int:
        """Rows and columns behind the sampler."""
        return (self.side + 2 * self.padding) // self.kernel[1]


class Sampler(nn.Module):
    """Rows [F * P, D] of frames -> rows [W * h' * w', D]: a convolution or a mean of each block, then SiLU."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.config = config
        block = config.kernel[0] * config.kernel[1] * config.kernel[2]
        if not config.pools:
            self.conv = Linear(config.out_width * block, config.out_width, bias=True)

    def forward(self, x_MD: torch.Tensor, frame_windows_Wk: torch.Tensor) -> torch.Tensor:
        config = self.config
        (depth, rows, columns), side, pad, width = config.kernel, config.sampled_side, config.padding, config.out_width
        x_FhwD = x_MD.reshape(-1, config.side, config.side, width)
        if pad:
            x_FhwD = nn.functional.pad(x_FhwD, (0, 0, pad, pad, pad, pad))
            x_FhwD = torch.cat((x_FhwD, torch.zeros_like(x_FhwD[:1])))  # what windows beyond the ends of a clip see
        x_FhwD = x_FhwD[:, : side * rows, : side * columns]
        seen = x_FhwD.index_select(0, frame_windows_Wk.reshape(-1))
        blocks = seen.reshape(-1, depth, side, rows, side, columns, width)
        if config.pools:
            sampled = blocks.mean(dim=(1, 3, 5)).reshape(-1, width)
        else:
            sampled = self.conv(blocks.permute(0, 2, 4, 6, 1, 3, 5).reshape(-1, self.conv.weight.shape[1]))
        return nn.functional.silu(sampled)


class WindowConnector(nn.Module):
    """features float32 [F * P, C], frames of each window int64 [W, k] -> rows float32 [W * h' * w', D].

    A stage of RegNet blocks, the sampler, another stage, an MLP (VideoLLaMA 2's STC connector, arXiv 2406.07476).
    """

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        before, behind = ((side, side) for side in (config.side, config.sampled_side))
        if config.depth:
            self.s1 = RegStage(config.width, config.out_width, before, config.depth)
            self.s2 = RegStage(config.out_width, config.out_width, behind, config.depth)
        self.has_stages = config.depth > 0
        self.sampler = Sampler(config)
        self.readout = mlp(config.out_width, config.out_width, config.num_linears)

    def forward(self, vision_features: torch.Tensor, frame_windows: torch.Tensor) -> torch.Tensor:
        x = vision_features.to(next(self.parameters()).dtype)
        run = BlockRunner()
        x = self.s1(x, run) if self.has_stages else x
        x = self.sampler(x, frame_windows)
        x = self.s2(x, run) if self.has_stages else x
        return self.readout(x).to(torch.float32)


class MeanProjector(nn.Module):
    """features float32 [F * P, C], shares float32 [V, F] -> rows float32 [V * P, D]: the mean over frames, an MLP."""

    def __init__(self, width: int, out_width: int, num_features: int, num_linears: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.mlp = mlp(width, out_width, num_linears)

    def forward(self, vision_features: torch.Tensor, frame_shares: torch.Tensor) -> torch.Tensor:
        width = vision_features.shape[-1]
        mean = frame_shares @ vision_features.reshape(-1, self.num_features * width)
        return self.mlp(mean.reshape(-1, width).to(next(self.parameters()).dtype)).to(torch.float32)


def mlp(width: int, out_width: int, num_linears: int) -> nn.Sequential:
    """Linears with GELU (by erf) between them, numbered as nn.Sequential does: 0, 2, 4, ..."""
    modules: list[nn.Module] = [Linear(width, out_width, bias=True)]
    for _ in range(1, num_linears):
        modules += [nn.GELU(), Linear(out_width, out_width, bias=True)]
    return nn.Sequential(*modules)
