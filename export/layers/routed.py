"""A causal decoder whose layers hold a second set of weights for visual tokens (EVEv2, arXiv 2502.06788).

Tokens are gathered by modality once, at the start, and stay apart: each linear and norm reads the rows of its own
modality and no others. They meet in attention, which is one over all tokens, and in front of the head. A set of weights
without a row costs nothing: a step that adds a text token reads the weights for text alone.

Dims: B batch, S new tokens, T text rows, V visual rows (T + V = B * S), D width, Q width of queries, keys or values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .attention import cached_attention, last_positions
from .decoder import DecoderConfig
from .linear import Linear
from .mlp import GatedMLP
from .norm import RMSNorm
from .repeat import BlockRunner
from .rope import apply_rotary, multi_axis_angles

__all__ = ["RoutedDecoder", "RoutedParts"]

Rows = tuple[torch.Tensor, torch.Tensor]  # text rows [T, ...], visual rows [V, ...]


@dataclass(frozen=True)
class RoutedParts:
    """Which parts of a layer exist twice. The others serve all tokens."""

    norms: bool
    attention: bool  # the four projections
    mlp: bool


@dataclass(frozen=True)
class Routing:
    """Where rows are: of text and of visuals among the tokens, of each token among text rows and then visual rows."""

    text_rows: torch.Tensor  # int64 [T]
    visual_rows: torch.Tensor  # int64 [V]
    row_places: torch.Tensor  # int64 [B, S]

    def apart(self, x_ND: torch.Tensor) -> Rows:
        """Rows of tokens in their order -> by modality."""
        return x_ND.index_select(0, self.text_rows), x_ND.index_select(0, self.visual_rows)

    def together(self, rows: Rows) -> torch.Tensor:
        """Rows by modality -> [B, S, ...]."""
        return nn.functional.embedding(self.row_places, torch.cat(rows))


class RoutedAttention(nn.Module):
    """Attention over all tokens; its projections may exist twice."""

    def __init__(self, config: DecoderConfig, *, twice: bool) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.twice = config.num_heads, config.num_kv_heads, twice
        query_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        for prefix in ("", "visual_")[: 1 + twice]:
            for name, width in (("q", query_width), ("k", kv_width), ("v", kv_width)):
                self.add_module(f"{prefix}{name}_proj", Linear(config.width, width, bias=config.qkv_bias))
            self.add_module(f"{prefix}o_proj", Linear(query_width, config.width, bias=config.output_bias))

    def forward(
        self,
        rows: Rows,
        routing: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        rotary: tuple[torch.Tensor, torch.Tensor],
        past: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor,
    ) -> tuple[Rows, torch.Tensor, torch.Tensor]:
        route = Routing(*routing)
        query, key, value = (self._project(name, rows, route) for name in ("q_proj", "k_proj", "v_proj"))
        out_BSQ, present_key, present_value = cached_attention(
            apply_rotary(query, *rotary, self.num_heads),
            apply_rotary(key, *rotary, self.num_kv_heads),
            value,
            *past,
            attention_mask,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
        )
        if not self.twice:
            out_BSD = self.get_submodule("o_proj")(out_BSQ)
            return route.apart(_rows(out_BSD)), present_key, present_value
        text, visual = route.apart(_rows(out_BSQ))
        projected = self.get_submodule("o_proj")(text), self.get_submodule("visual_o_proj")(visual)
        return projected, present_key, present_value

    def _project(self, name: str, rows: Rows, route: Routing) -> torch.Tensor:
        """[B, S, Q] of rows by modality."""
        if not self.twice:
            return self.get_submodule(name)(route.together(rows))
        text, visual = rows
        return route.together((self.get_submodule(name)(text), self.get_submodule(f"visual_{name}")(visual)))


class RoutedLayer(nn.Module):
    def __init__(self, config: DecoderConfig, parts: RoutedParts) -> None:
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(config.width, config.norm_eps)

        def mlp() -> GatedMLP:
            return GatedMLP(config.width, config.inner, bias=config.up_bias, down_bias=config.down_bias)

        self.input_layernorm, self.visual_input_layernorm = norm(), norm() if parts.norms else None
        self.self_attn = RoutedAttention(config, twice=parts.attention)
        self.post_attention_layernorm, self.visual_post_attention_layernorm = norm(), norm() if parts.norms else None
        self.mlp, self.visual_mlp = mlp(), mlp() if parts.mlp else None

    def forward(
        self,
        rows: Rows,
        routing: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        rotary: tuple[torch.Tensor, torch.Tensor],
        past: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor,
    ) -> tuple[Rows, torch.Tensor, torch.Tensor]:
        normal = _each(self.input_layernorm, self.visual_input_layernorm, rows)
        out, key, value = self.self_attn(normal, routing, rotary, past, attention_mask)
        rows = _sum(rows, out)
        normal = _each(self.post_attention_layernorm, self.visual_post_attention_layernorm, rows)
        if self.visual_mlp is not None:
            return _sum(rows, _each(self.mlp, self.visual_mlp, normal)), key, value
        both = self.mlp(torch.cat(normal))  # one call, so that a runtime packs its weights once
        num_text = normal[0].shape[0]
        return _sum(rows, (both[:num_text], both[num_text:])), key, value


class RoutedDecoder(nn.Module):
    """As CausalDecoder, with three more inputs that say which tokens are visual (runtime/routing.py makes them).

    `text_rows` int64 [T] and `visual_rows` int64 [V]: their indices among the B * S tokens, each token in one of the
    two. `row_places` int64 [B, S]: where each token is among the text rows with the visual rows behind them.
    """

    def __init__(self, config: DecoderConfig, parts: RoutedParts) -> None:
        super().__init__()
        self.layers = nn.ModuleList(RoutedLayer(config, parts) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.lm_head = Linear(config.width, config.vocab_size, bias=False)
        self.config = config

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        num_logits_to_keep: torch.Tensor,
        text_rows: torch.Tensor,
        visual_rows: torch.Tensor,
        row_places: torch.Tensor,
        past: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        angles = multi_axis_angles(
            position_ids.unsqueeze(0), self.config.inverse_frequencies, self.config.rope_sections
        )
        rotary = (torch.cos(angles), torch.sin(angles))
        routing = (text_rows, visual_rows, row_places)
        dtype = self.norm.weight.dtype
        text, visual = Routing(*routing).apart(_rows(inputs_embeds))
        rows = text.to(dtype), visual.to(dtype)
        present: list[torch.Tensor] = []
        run = BlockRunner()
        for index, layer in enumerate(self.layers):
            cached = (past[2 * index], past[2 * index + 1])
            rows, key, value = run(layer, rows, routing, rotary, cached, attention_mask)
            present += [key, value]
        last = last_positions(row_places, num_logits_to_keep)
        logits = self.lm_head(self.norm(nn.functional.embedding(last, torch.cat(rows))))
        return logits.to(torch.float32), *present


def _each(text: nn.Module, visual: nn.Module | None, rows: Rows) -> Rows:
    return text(rows[0]), (text if visual is None else visual)(rows[1])


def _sum(left: Rows, right: Rows) -> Rows:
    return left[0] + right[0], left[1] + right[1]


def _rows(x_BSE: torch.Tensor) -> torch.Tensor:
    """[B * S, E], its first size left open: a product of sizes would be a node of its own in every layer."""
    return x_BSE.reshape(-1, x_BSE.shape[-1])
