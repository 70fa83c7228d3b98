"""InternViT (arXiv 2312.14238) with heads added for tensor parallelism, and the projector behind a pixel shuffle.

Dims: F frames (tiles), P patches a frame, N = F * P patches of all frames, T = P + 1 tokens a frame, C tower width, A
attention width with the added heads, M patches a block of the shuffle, I inner width of the projector, D decoder width.
"""

import torch
from torch import nn

from .attention import segment_attention
from .clip import FrameEmbeddings, TowerConfig, TowerMLP
from .linear import Linear
from .norm import RMSNorm
from .repeat import BlockRunner

__all__ = ["InternVisionTower", "ShuffleProjector"]


class LeadingRMSNorm(nn.Module):
    """x [..., A] -> weight * x / sqrt(mean(x[..., :C]^2) + eps): the first C values say by how much all are scaled.

    Where A is C this is RMSNorm; behind it are heads that were added to a trained model, and do not count.
    """

    def __init__(self, width: int, attention_width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(attention_width))
        self.width, self.eps = width, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.to(torch.float32)
        # As the length of a vector with eps in one more place: an operator that targets have in float32.
        more = x32[..., :1] * 0 + (self.width * self.eps) ** 0.5
        length = torch.linalg.vector_norm(torch.cat((x32[..., : self.width], more), -1), dim=-1, keepdim=True)
        return self.weight * (x32 / length * self.width**0.5).to(x.dtype)


class InternAttention(nn.Module):
    """Bidirectional attention within segments, x [N, C]; query and key are normed over all heads at once."""

    def __init__(self, config: TowerConfig, num_added_heads: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads + num_added_heads
        self.inner = config.width // config.num_heads * self.num_heads
        self.qkv = Linear(config.width, 3 * self.inner, bias=False)
        self.q_norm, self.k_norm = (LeadingRMSNorm(config.width, self.inner, config.eps) for _ in range(2))
        self.proj = Linear(self.inner, config.width, bias=True)

    def forward(self, x_NC: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        qkv, a = self.qkv(x_NC), self.inner
        query, key = self.q_norm(qkv[:, :a]), self.k_norm(qkv[:, a : 2 * a])
        return self.proj(segment_attention(query, key, qkv[:, 2 * a :], cu_seqlens, self.num_heads))


class InternLayer(nn.Module):
    """A pre-norm layer whose branches are scaled a channel: x [N, C], segments by cu_seqlens int32 -> [N, C]."""

    def __init__(self, config: TowerConfig, num_added_heads: int) -> None:
        super().__init__()
        self.attn = InternAttention(config, num_added_heads)
        self.mlp = TowerMLP(config.width, config.inner, config.activation)
        self.norm1, self.norm2 = (RMSNorm(config.width, config.eps) for _ in range(2))
        self.ls1, self.ls2 = (nn.Parameter(torch.empty(config.width)) for _ in range(2))

    def forward(self, x_NC: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        x_NC = x_NC + self.attn(self.norm1(x_NC), cu_seqlens) * self.ls1
        return x_NC + self.mlp(self.norm2(x_NC)) * self.ls2


class InternVisionTower(nn.Module):
    """Patches of any number of frames in raster order, float32 [N, 3*p*p] -> features float32 [N, C].

    The class token is seen by all patches of its frame and left out at the end. Parameters have the names of upstream's
    InternVisionModel.
    """

    def __init__(self, config: TowerConfig, num_added_heads: int) -> None:
        super().__init__()
        self.config = config
        self.embeddings = FrameEmbeddings(config, bias=True)
        layers = nn.ModuleList(InternLayer(config, num_added_heads) for _ in range(config.num_layers))
        self.encoder = nn.ModuleDict({"layers": layers})

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        config, num_tokens = self.config, self.config.num_patches + 1
        x_NC = self.embeddings(pixel_values)
        num_frames = pixel_values.reshape(-1, config.num_patches, config.patch_dim).shape[0]
        cu_seqlens = torch.arange(num_frames + 1, dtype=torch.int32) * num_tokens
        run = BlockRunner()
        for layer in self.encoder["layers"]:  # pyright: ignore[reportGeneralTypeIssues]
            x_NC = run(layer, x_NC, cu_seqlens)
        return x_NC.reshape(-1, num_tokens, config.width)[:, 1:].reshape(-1, config.width).to(torch.float32)


class ShuffleProjector(nn.Module):
    """features [N, C] of frames of side x side patches -> rows [N / M, D]: each block of patches becomes one row.

    The patches of a block lie row by row in the row's columns, and blocks in raster order: upstream's pixel_shuffle in
    its version v2. LayerNorm, Linear, GELU (by erf), Linear, without biases but that of the norm.
    """

    def __init__(self, width: int, side: int, block_side: int, inner: int, out_width: int) -> None:
        super().__init__()
        self.side, self.block_side, self.merged = side, block_side, width * block_side**2
        linears = Linear(self.merged, inner, bias=False), Linear(inner, out_width, bias=False)
        self.mlp1 = nn.Sequential(nn.LayerNorm(self.merged), linears[0], nn.GELU(), linears[1])  # numbered as stored

    def forward(self, vision_features: torch.Tensor) -> torch.Tensor:
        blocks, block = self.side // self.block_side, self.block_side
        x = vision_features.to(next(self.parameters()).dtype)
        x = x.reshape(-1, blocks, block, blocks, block, x.shape[-1]).transpose(2, 3).reshape(-1, self.merged)
        return self.mlp1(x).to(torch.float32)
