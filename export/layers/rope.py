"""Rotary position embeddings (arXiv 2104.09864): angle tables and their application.

Dims: B batch, S sequence, H heads, F frequencies (half of the head size), A position axes.
Tables are float32 whatever the model's dtype: positions in the thousands lose whole radians in float16.
"""

from collections.abc import Sequence

import torch

from .semantic import emit, float_constant, is_tracing

__all__ = ["apply_rotary", "frequencies", "multi_axis_angles"]


def frequencies(size: int, theta: float) -> tuple[float, ...]:
    """Inverse frequencies theta^(-2k/size) for k < size/2, each a float32 value as PyTorch rounds it."""
    inverse = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.int64).to(torch.float32) / size)
    return tuple(inverse.tolist())


def multi_axis_angles(positions_ABS: torch.Tensor, inverse: Sequence[float], sections: Sequence[int]) -> torch.Tensor:
    """Angles float32 [B, S, F]: slots are split by `sections`, and section a takes the positions of axis a (M-RoPE)."""
    assert sum(sections) == len(inverse), "sections must cover every frequency"
    angles_ABSF = positions_ABS.to(torch.float32).unsqueeze(-1) * float_constant(inverse)
    pieces, start = [], 0
    for axis, length in enumerate(sections):
        pieces.append(angles_ABSF[axis, :, :, start : start + length])
        start += length
    return torch.cat(pieces, dim=-1)


def apply_rotary(x_BSD: torch.Tensor, cos_BSF: torch.Tensor, sin_BSF: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rotates each head's two halves, computed in float32. D = num_heads * 2F; result as x in shape and dtype."""
    if is_tracing():
        attributes = {"num_heads": num_heads}
        return emit("Rotary", [x_BSD, cos_BSF, sin_BSF], shape=x_BSD.shape, dtype=x_BSD.dtype, attributes=attributes)
    first, second = x_BSD.to(torch.float32).unflatten(-1, (num_heads, -1)).chunk(2, dim=-1)
    cos, sin = cos_BSF.unsqueeze(2), sin_BSF.unsqueeze(2)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.flatten(-2).to(x_BSD.dtype)
