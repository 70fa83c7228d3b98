"""The causal decoder that most families share: pre-norm, grouped-query attention, SwiGLU, rotary positions.

Dims: B batch, S new tokens, D width, A position axes (3 for M-RoPE), V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...runtime.errors import CheckpointError
from .attention import cached_attention, last_positions
from .linear import Linear
from .mlp import GatedMLP
from .norm import RMSNorm
from .repeat import BlockRunner
from .rope import apply_rotary, multi_axis_angles

__all__ = ["CausalDecoder", "DecoderConfig"]


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder. `rope_sections` splits the head_dim/2 frequencies over the position axes."""

    width: int
    inner: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    inverse_frequencies: tuple[float, ...]
    rope_sections: tuple[int, ...]
    qkv_bias: bool
    output_bias: bool = False
    up_bias: bool = False  # of gate and up
    down_bias: bool = False

    def __post_init__(self) -> None:
        if sum(self.rope_sections) * 2 != self.head_dim:
            raise CheckpointError(
                f"config.json: rope sections {self.rope_sections} must sum to half of the head size {self.head_dim}"
            )
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"config.json: {self.num_heads} attention heads cannot share {self.num_kv_heads} key/value heads"
            )


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        query_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.width, query_width, bias=config.qkv_bias)
        self.k_proj = Linear(config.width, kv_width, bias=config.qkv_bias)
        self.v_proj = Linear(config.width, kv_width, bias=config.qkv_bias)
        self.o_proj = Linear(query_width, config.width, bias=config.output_bias)

    def forward(
        self,
        x_BSD: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        past: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query = apply_rotary(self.q_proj(x_BSD), *rotary, self.num_heads)
        key = apply_rotary(self.k_proj(x_BSD), *rotary, self.num_kv_heads)
        out, present_key, present_value = cached_attention(
            query,
            key,
            self.v_proj(x_BSD),
            *past,
            attention_mask,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
        )
        return self.o_proj(out), present_key, present_value


class Layer(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)
        self.mlp = GatedMLP(config.width, config.inner, bias=config.up_bias, down_bias=config.down_bias)

    def forward(
        self,
        x_BSD: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        past: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        out, key, value = self.self_attn(self.input_layernorm(x_BSD), rotary, past, attention_mask)
        x_BSD = x_BSD + out
        return x_BSD + self.mlp(self.post_attention_layernorm(x_BSD)), key, value


class CausalDecoder(nn.Module):
    """inputs_embeds [B, S, D] and a cache -> logits [B, kept, V] in float32 and the grown cache.

    `position_ids` int64 [A, B, S], or [B, S] where there is one axis; `past` is key, value, key, value, ... by layer,
    each [B, kv_heads, P, head_dim].
    The boundary is float32 whatever the compute dtype, so that runtimes need not know it.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.lm_head = Linear(config.width, config.vocab_size, bias=False)
        self.config = config

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        num_logits_to_keep: torch.Tensor,
        past: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        positions_ABS = position_ids if position_ids.dim() == 3 else position_ids.unsqueeze(0)
        angles = multi_axis_angles(positions_ABS, self.config.inverse_frequencies, self.config.rope_sections)
        rotary = (torch.cos(angles), torch.sin(angles))
        x_BSD = inputs_embeds.to(self.norm.weight.dtype)
        present: list[torch.Tensor] = []
        run = BlockRunner()
        for index, layer in enumerate(self.layers):
            x_BSD, key, value = run(layer, x_BSD, rotary, (past[2 * index], past[2 * index + 1]), attention_mask)
            present += [key, value]
        logits = self.lm_head(self.norm(last_positions(x_BSD, num_logits_to_keep)))
        return logits.to(torch.float32), *present
