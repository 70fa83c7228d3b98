"""NaViT's modules, as plain layers and packed attention.

Dims: N patches of all images, I images, D width, H heads, E head size, C classes, L places of a position table.
Checked against lucidrains/vit-pytorch na_vit.py at 69d24fe.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ..layers import Linear
from ..layers.attention import segment_attention, segment_cross_attention

__all__ = ["AttentionPool", "Classifier", "NaViTConfig", "PositionTable", "VisionEncoder"]

NORM_EPS = 1e-5
MIN_NORM = 1e-12  # torch.nn.functional.normalize divides by no less


@dataclass(frozen=True)
class NaViTConfig:
    width: int
    inner: int
    num_layers: int
    num_heads: int
    head_size: int
    patch_size: int
    table_sizes: tuple[int, int]  # patches of the largest image, down and across
    num_classes: int  # 0: no head
    positions: Literal["absolute", "fractional", "fractional_longest"]

    @property
    def patch_dim(self) -> int:
        return 3 * self.patch_size**2


def layer_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, NORM_EPS)


class HeadNorm(nn.Module):
    """x [N, H*E] -> each head's vector over its length, times sqrt(E) and a gain of its own; in float32."""

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(config.num_heads, config.head_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_NHE = x.to(torch.float32).unflatten(-1, self.gamma.shape)
        length = torch.linalg.vector_norm(x_NHE, dim=-1, keepdim=True).clamp_min(MIN_NORM)
        normal = x_NHE / length * math.sqrt(self.gamma.shape[-1])
        return (normal * self.gamma).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Attention with a norm in front. Its scale is 1, for queries and keys have sqrt(E) each already."""

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        self.num_heads, self.inner = config.num_heads, config.num_heads * config.head_size
        self.norm = layer_norm(config.width)
        self.q_norm, self.k_norm = HeadNorm(config), HeadNorm(config)
        self.to_q = Linear(config.width, self.inner, bias=False)
        self.to_kv = Linear(config.width, 2 * self.inner, bias=False)
        self.to_out = Linear(self.inner, config.width, bias=False)

    def keys_values(self, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kv = self.to_kv(context)
        return self.k_norm(kv[:, : self.inner]), kv[:, self.inner :]

    def forward(self, x_ND: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """Within images: x is its own context, pre-normed."""
        x_ND = self.norm(x_ND)
        keys, values = self.keys_values(x_ND)
        query = self.q_norm(self.to_q(x_ND))
        return self.to_out(segment_attention(query, keys, values, cu_seqlens, self.num_heads, scale=1.0))

    def pool(self, query_1D: torch.Tensor, context_ND: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """One query an image over its own patches, [I, D]; the context is taken as it is."""
        num_images = cu_seqlens.shape[0] - 1
        query = self.q_norm(self.to_q(self.norm(query_1D))).expand(num_images, -1)
        keys, values = self.keys_values(context_ND)
        bounds = torch.arange(num_images + 1, dtype=torch.int32)
        return self.to_out(segment_cross_attention(query, keys, values, bounds, cu_seqlens, self.num_heads, scale=1.0))


class FeedForward(nn.Module):
    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        self.norm = layer_norm(config.width)
        self.inner = Linear(config.width, config.inner, bias=True)
        self.outer = Linear(config.inner, config.width, bias=True)

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        return self.outer(nn.functional.gelu(self.inner(self.norm(x_ND))))


class Layer(nn.Module):
    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.mlp = FeedForward(config)

    def forward(self, x_ND: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        x_ND = self.attention(x_ND, cu_seqlens) + x_ND
        return self.mlp(x_ND) + x_ND


class PatchEmbedding(nn.Module):
    """Raw patches [N, 3*p*p], columns channel, y, x -> [N, D]: normed, mapped, normed again."""

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        self.norm_in, self.norm_out = layer_norm(config.patch_dim), layer_norm(config.width)
        self.proj = Linear(config.patch_dim, config.width, bias=True)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.norm_out(self.proj(self.norm_in(patches.to(self.proj.weight.dtype))))


class PositionTable(nn.Module):
    """One axis of the factorised positions, a learned row [D] for each of L places."""

    def __init__(self, num_places: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(num_places, width))

    def forward(self, places: torch.Tensor) -> torch.Tensor:
        """places int64 [N] are rows of the table; float ones in [0, 1] span it, linear between neighbouring rows."""
        if not places.is_floating_point():
            return self.table.index_select(0, places)
        last = self.table.shape[0] - 1
        scaled = places * last
        lower = scaled.floor()
        share = (scaled - lower).unsqueeze(-1).to(self.table.dtype)
        low = lower.to(torch.int64)
        high = (low + 1).clamp_max(last)
        return torch.lerp(self.table.index_select(0, low), self.table.index_select(0, high), share)


class VisionEncoder(nn.Module):
    """Patches of any number of images -> features [N, D] behind the final norm, rows in the order of pixel_values."""

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        self.patch_embed = PatchEmbedding(config)
        self.rows, self.columns = (PositionTable(size, config.width) for size in config.table_sizes)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = layer_norm(config.width)

    def forward(self, pixel_values: torch.Tensor, places: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        x_ND = self.patch_embed(pixel_values)
        x_ND = x_ND + (self.rows(places[:, 0]) + self.columns(places[:, 1]))
        for layer in self.layers:
            x_ND = layer(x_ND, cu_seqlens)
        return self.norm(x_ND).to(torch.float32)


class AttentionPool(nn.Module):
    """Features [N, D] -> one vector an image [I, D]: one learned query for all of them, added to what it finds."""

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(config.width))
        self.attention = Attention(config)

    def forward(self, vision_features: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        context = vision_features.to(self.query.dtype)
        query = self.query.unsqueeze(0)
        return (self.attention.pool(query, context, cu_seqlens) + query).to(torch.float32)


class Classifier(nn.Module):
    """Vectors [I, D] -> class scores [I, C], before any softmax or sigmoid."""

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        self.norm = layer_norm(config.width)
        self.head = Linear(config.width, config.num_classes, bias=False)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(image_features.to(self.head.weight.dtype))).to(torch.float32)
