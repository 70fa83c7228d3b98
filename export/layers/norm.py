"""Root mean square normalisation (arXiv 1910.07467), computed in float32 whatever the dtype."""

import torch
from torch import nn

from .semantic import emit, is_tracing

__all__ = ["RMSNorm"]


class RMSNorm(nn.Module):
    """x [..., D] -> weight * x / sqrt(mean(x^2) + eps), mean over the last axis, same shape and dtype."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if is_tracing():
            return emit("RMSNorm", [x, self.weight], shape=x.shape, dtype=x.dtype, attributes={"epsilon": self.eps})
        x32 = x.to(torch.float32)
        normal = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normal.to(x.dtype)
