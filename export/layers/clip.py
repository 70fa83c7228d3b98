"""Towers of CLIP (arXiv 2103.00020) and SigLIP (arXiv 2303.15343): frames of one size, each a segment of its own.

Dims: F frames, P patches a frame, N = F * P patches of all frames, T = P + 1 tokens a frame where there is a class
token, C width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn

from .attention import segment_attention
from .linear import Linear
from .mlp import quick_gelu
from .repeat import BlockRunner

__all__ = ["ACTIVATIONS", "FrameEmbeddings", "FrameTower", "TowerConfig", "TowerLayer", "TowerMLP"]

Activation = Literal["quick_gelu", "gelu", "gelu_pytorch_tanh"]
ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": nn.functional.gelu,
    "gelu_pytorch_tanh": partial(nn.functional.gelu, approximate="tanh"),
}


@dataclass(frozen=True)
class TowerConfig:
    """A tower as far as it is run. CLIP has a class token, a norm before the first layer, and patches without bias."""

    width: int
    inner: int
    num_layers: int  # that are run: the output is that of the last of them, without any norm
    num_stored: int  # layers that the checkpoint has
    num_heads: int
    patch_size: int
    side: int  # patches a side of a frame
    eps: float
    activation: Activation
    has_class_token: bool
    keeps_class_token: bool = False  # as the first row of each frame's features
    taken: tuple[int, ...] = ()  # after how many layers features are taken, to stand side by side; (): after all

    @property
    def kernel(self) -> tuple[int, int, int]:
        """Shape of the patch embedding's kernel without its first axis, as checkpoints store it."""
        return (3, self.patch_size, self.patch_size)

    @property
    def patch_dim(self) -> int:
        """Values of a patch: a row of pixel_values."""
        return 3 * self.patch_size**2

    @property
    def num_patches(self) -> int:
        """Patches of a frame."""
        return self.side**2

    @property
    def feature_width(self) -> int:
        """Columns of the features."""
        return self.width * max(1, len(self.taken))

    @property
    def num_features(self) -> int:
        """Rows of features a frame."""
        return self.num_patches + self.keeps_class_token


class TowerAttention(nn.Module):
    """Bidirectional attention within segments, x [N, C]."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(width, width, bias=True) for _ in range(4))

    def forward(self, x_NC: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        query, key, value = self.q_proj(x_NC), self.k_proj(x_NC), self.v_proj(x_NC)
        return self.out_proj(segment_attention(query, key, value, cu_seqlens, self.num_heads))


class TowerMLP(nn.Module):
    """fc2(activation(fc1(x))), x [N, C]."""

    def __init__(self, width: int, inner: int, activation: Activation) -> None:
        super().__init__()
        self.fc1 = Linear(width, inner, bias=True)
        self.fc2 = Linear(inner, width, bias=True)
        self.activation: Activation = activation

    def forward(self, x_NC: torch.Tensor) -> torch.Tensor:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x_NC)))


class TowerLayer(nn.Module):
    """A pre-norm layer with LayerNorms and biases everywhere: x [N, C], segments by cu_seqlens int32 -> [N, C]."""

    def __init__(self, width: int, inner: int, num_heads: int, eps: float, activation: Activation) -> None:
        super().__init__()
        self.self_attn = TowerAttention(width, num_heads)
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(width, eps) for _ in range(2))
        self.mlp = TowerMLP(width, inner, activation)

    def forward(self, x_NC: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        x_NC = x_NC + self.self_attn(self.layer_norm1(x_NC), cu_seqlens)
        return x_NC + self.mlp(self.layer_norm2(x_NC))


class FrameEmbeddings(nn.Module):
    """Patches of whole frames [N, 3*p*p] in raster order -> [F * T, C], the class token first in each frame."""

    def __init__(self, config: TowerConfig, *, bias: bool) -> None:
        super().__init__()
        self.num_patches = config.num_patches
        self.patch_embedding = Linear(config.patch_dim, config.width, bias=bias)
        # No Embedding: recipes leave it in floats, for it is small and each value goes straight into a patch.
        self.position_embedding = nn.Parameter(torch.empty(self.num_patches + config.has_class_token, config.width))
        self.class_embedding = nn.Parameter(torch.empty(config.width)) if config.has_class_token else None

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        positions, width = self.position_embedding, self.position_embedding.shape[1]
        x_FTC = self.patch_embedding(pixel_values.to(positions.dtype)).reshape(-1, self.num_patches, width)
        if self.class_embedding is not None:
            x_FTC = torch.cat((self.class_embedding.expand(x_FTC.shape[0], 1, -1), x_FTC), dim=1)
        return (x_FTC + positions).reshape(-1, width)


class FrameTower(nn.Module):
    """Patches of any number of frames, float32 [N, 3*p*p] -> features float32 [N, C], or [F * T, C] with class tokens;
    times as many columns as layers are `taken`.

    All frames have the same number of patches, so bounds and positions are the graph's own. Parameters have the names
    of transformers' CLIPVisionTransformer and SiglipVisionTransformer, but for `position_embedding`, which is a plain
    table there too (`position_embedding.weight`).
    """

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = FrameEmbeddings(config, bias=not config.has_class_token)
        self.pre_layrnorm = nn.LayerNorm(config.width, config.eps) if config.has_class_token else nn.Identity()
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(self._layer(config) for _ in range(config.num_layers))})

    @staticmethod
    def _layer(config: TowerConfig) -> TowerLayer:
        return TowerLayer(config.width, config.inner, config.num_heads, config.eps, config.activation)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        config = self.config
        num_patches, num_tokens = config.num_patches, config.num_patches + config.has_class_token
        x_NC = self.pre_layrnorm(self.embeddings(pixel_values))
        num_frames = pixel_values.reshape(-1, num_patches, config.patch_dim).shape[0]
        cu_seqlens = torch.arange(num_frames + 1, dtype=torch.int32) * num_tokens
        run, states = BlockRunner(), [x_NC]
        for layer in self.encoder["layers"]:  # pyright: ignore[reportGeneralTypeIssues]
            states.append(run(layer, states[-1], cu_seqlens))
        x_NC = torch.cat([states[count] for count in config.taken], dim=-1) if config.taken else states[-1]
        if config.has_class_token and not config.keeps_class_token:
            x_NC = x_NC.reshape(-1, num_tokens, config.feature_width)[:, 1:].reshape(-1, config.feature_width)
        return x_NC.to(torch.float32)
