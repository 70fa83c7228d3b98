"""Parts of vision towers that take packed patches: embedding, attention within segments, 2-D angles, merger.

Dims: N patches of all images of a call, M patches a merge block, C tower width, D decoder width, F rotary frequencies.
"""

import torch
from torch import nn

from .attention import segment_attention
from .linear import Linear
from .norm import RMSNorm
from .rope import apply_rotary, multi_axis_angles

__all__ = [
    "PackedAttention",
    "PackedBlock",
    "PatchEmbed",
    "PatchMerger",
    "RotaryTables",
    "axis_angles",
    "reorder_blocks",
]

RotaryTables = tuple[torch.Tensor, torch.Tensor]  # cos and sin, float32 [1, N, F]


class PatchEmbed(nn.Module):
    """A convolution whose kernel is its stride, so a linear map of each flattened patch: [N, patch_dim] -> [N, C]."""

    def __init__(self, patch_dim: int, width: int) -> None:
        super().__init__()
        self.proj = Linear(patch_dim, width, bias=False)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.proj(patches.to(self.proj.weight.dtype))


class PackedAttention(nn.Module):
    """Rotary attention within segments, query, key and value by one linear: x [N, C], cu_seqlens int32 -> [N, C]."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.width = num_heads, width
        self.qkv = Linear(width, 3 * width, bias=True)
        self.proj = Linear(width, width, bias=True)

    def forward(self, x_NC: torch.Tensor, rotary: RotaryTables, cu_seqlens: torch.Tensor) -> torch.Tensor:
        qkv, c = self.qkv(x_NC), self.width
        query, key = (
            apply_rotary(part.unsqueeze(0), *rotary, self.num_heads).squeeze(0)
            for part in (qkv[:, :c], qkv[:, c : 2 * c])
        )
        return self.proj(segment_attention(query, key, qkv[:, 2 * c :], cu_seqlens, self.num_heads))


class PackedBlock(nn.Module):
    """A pre-norm block of a tower: attention, then the MLP, each added to x [N, C]."""

    def __init__(self, norm1: nn.Module, norm2: nn.Module, attn: PackedAttention, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm1, norm2
        self.attn = attn
        self.mlp = mlp

    def forward(self, x_NC: torch.Tensor, rotary: RotaryTables, cu_seqlens: torch.Tensor) -> torch.Tensor:
        x_NC = x_NC + self.attn(self.norm1(x_NC), rotary, cu_seqlens)
        return x_NC + self.mlp(self.norm2(x_NC))


class PatchMerger(nn.Module):
    """features [N, C] -> rows that replace placeholder embeddings [N / M, D]: each merge block becomes one row."""

    def __init__(self, norm: RMSNorm | nn.LayerNorm, width: int, block: int, out_width: int) -> None:
        super().__init__()
        self.ln_q = norm
        self.merged = width * block
        inner, outer = Linear(self.merged, self.merged, bias=True), Linear(self.merged, out_width, bias=True)
        self.mlp = nn.Sequential(inner, nn.GELU(), outer)  # numbered as checkpoints do: 0 and 2

    def forward(self, vision_features: torch.Tensor) -> torch.Tensor:
        x = vision_features.to(self.ln_q.weight.dtype)
        return self.mlp(self.ln_q(x).reshape(-1, self.merged)).to(torch.float32)


def axis_angles(patch_positions_N2: torch.Tensor, inverse: tuple[float, ...]) -> torch.Tensor:
    """Angles [1, N, F] of (row, column) int64 [N, 2]: the first half of the slots turns by row, the rest by column."""
    half = len(inverse) // 2
    return multi_axis_angles(patch_positions_N2.transpose(0, 1).unsqueeze(1), inverse, (half, half))


def reorder_blocks(x: torch.Tensor, order: torch.Tensor, block: int) -> torch.Tensor:
    """Rows of x [N, ...] in groups of `block`, the groups put into `order` [N / block]."""
    return x.reshape(-1, block, x.shape[-1]).index_select(0, order).reshape(-1, x.shape[-1])
