"""Feed-forward blocks. Dims: `...` any leading dims, D width, I inner width."""

import torch
from torch import nn

from .linear import Linear

__all__ = ["GatedMLP", "quick_gelu"]


class GatedMLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x)), x [..., D]. `down_bias`: None is as the others."""

    def __init__(self, width: int, inner: int, *, bias: bool, down_bias: bool | None = None) -> None:
        super().__init__()
        self.gate_proj = Linear(width, inner, bias=bias)
        self.up_proj = Linear(width, inner, bias=bias)
        self.down_proj = Linear(inner, width, bias=bias if down_bias is None else down_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """The sigmoid approximation of GELU that CLIP uses: x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)
