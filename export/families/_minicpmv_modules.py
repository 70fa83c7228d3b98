"""MiniCPM-V 2.6's own modules: the SigLIP tower over packed tiles, and the resampler of learned queries.

Dims: N patches of all tiles, T tiles, Q queries a tile, C tower width, D decoder width.
Checked against the code of openbmb/MiniCPM-V-2_6 (for transformers 4.40.0).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..layers import BlockRunner, Linear
from ..layers.attention import segment_cross_attention
from ..layers.clip import TowerLayer
from ..layers.semantic import float_constant

__all__ = ["RESAMPLER_HEAD", "Resampler", "ResamplerConfig", "VisionConfig", "VisionEncoder", "position_waves"]

RESAMPLER_EPS = 1e-6
RESAMPLER_HEAD = 128  # upstream has as many heads as this goes into the width, rounded down


@dataclass(frozen=True)
class VisionConfig:
    width: int
    inner: int
    num_layers: int
    num_heads: int
    patch_size: int
    side: int  # rows and columns of the table of learned positions
    eps: float

    @property
    def kernel(self) -> tuple[int, int, int]:
        return (3, self.patch_size, self.patch_size)

    @property
    def patch_dim(self) -> int:
        return 3 * self.patch_size**2


@dataclass(frozen=True)
class ResamplerConfig:
    num_queries: int
    width: int
    vision_width: int

    @property
    def num_heads(self) -> int:
        return self.width // RESAMPLER_HEAD


class VisionEmbeddings(nn.Module):
    """Patches [N, 3*p*p] and rows of the position table int64 [N] -> [N, C]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = Linear(config.patch_dim, config.width, bias=True)
        # No Embedding: recipes leave it in floats, for it is small and each value goes straight into a patch.
        self.position_embedding = nn.Parameter(torch.empty(config.side**2, config.width))

    def forward(self, pixel_values: torch.Tensor, bucketed_positions: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(pixel_values.to(self.position_embedding.dtype))
        return patches + self.position_embedding.index_select(0, bucketed_positions)


class VisionEncoder(nn.Module):
    """Patches of any number of tiles -> features [N, C], rows in the order of pixel_values.

    `bucketed_positions` int64 [N] are rows of the table of learned positions, made by the runtime to the bit.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.layers = nn.ModuleList(
            TowerLayer(config.width, config.inner, config.num_heads, config.eps, "gelu_pytorch_tanh")
            for _ in range(config.num_layers)
        )
        self.post_layernorm = nn.LayerNorm(config.width, config.eps)

    def forward(
        self, pixel_values: torch.Tensor, bucketed_positions: torch.Tensor, cu_seqlens: torch.Tensor
    ) -> torch.Tensor:
        x_NC = self.embeddings(pixel_values, bucketed_positions)
        run = BlockRunner()
        for layer in self.layers:
            x_NC = run(layer, x_NC, cu_seqlens)
        return self.post_layernorm(x_NC).to(torch.float32)


class Resampler(nn.Module):
    """features [N, C] -> Q rows a tile [T * Q, D]: the same learned queries look at the patches of each tile.

    Keys, and only they, carry the patch's column and row (int64 [N, 2], row first) as sines and cosines.
    """

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.query = nn.Parameter(torch.empty(config.num_queries, width))
        self.kv_proj = Linear(config.vision_width, width, bias=False) if config.vision_width != width else nn.Identity()
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.attn = nn.ModuleDict({name: Linear(width, width, bias=True) for name in names})
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(width, RESAMPLER_EPS) for _ in range(3))
        self.proj = Linear(width, width, bias=False)

    def forward(
        self, vision_features: torch.Tensor, patch_positions: torch.Tensor, cu_seqlens: torch.Tensor
    ) -> torch.Tensor:
        num_tiles, num_queries = cu_seqlens.shape[0] - 1, self.config.num_queries
        x_ND = self.ln_kv(self.kv_proj(vision_features.to(self.query.dtype)))
        keys = self.attn["k_proj"](x_ND + position_waves(patch_positions, self.config.width).to(x_ND.dtype))
        query_QD = self.attn["q_proj"](self.ln_q(self.query))
        queries = query_QD.unsqueeze(0).expand(num_tiles, -1, -1).reshape(-1, self.config.width)
        bounds = torch.arange(num_tiles + 1, dtype=torch.int32) * num_queries
        seen = segment_cross_attention(
            queries, keys, self.attn["v_proj"](x_ND), bounds, cu_seqlens, self.config.num_heads
        )
        return self.proj(self.ln_post(self.attn["out_proj"](seen))).to(torch.float32)


def position_waves(patch_positions_N2: torch.Tensor, width: int) -> torch.Tensor:
    """float32 [N, width]: sines and cosines of the column in the first half, of the row in the second.

    Frequencies are 10000^(-4k/width), by numpy in float32 as upstream has them. Upstream keeps a table of 70 x 70 and
    makes a larger one where a tile needs it; these are its values for any size.
    """
    exponents = np.arange(width // 4, dtype=np.float32) / np.float32(width / 4)
    inverse = float_constant((np.float32(1) / np.float32(10000) ** exponents).tolist())
    row, column = (patch_positions_N2[:, axis].to(torch.float32).unsqueeze(-1) * inverse for axis in (0, 1))
    return torch.cat((torch.sin(column), torch.cos(column), torch.sin(row), torch.cos(row)), dim=-1)
