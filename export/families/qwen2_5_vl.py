"""Qwen2.5-VL (arXiv 2502.13923): windowed vision tower, 2x2 patch merger, Qwen2 decoder with M-RoPE.

Dims: N patches, M = merge_size^2 patches a merge block, C vision width, D decoder width, F rotary frequencies.
Checked against transformers 4.49.0; tensor names are those of transformers >= 4.52 in memory.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ...runtime.errors import CheckpointError
from ...runtime.manifest import (
    PositionSpec,
    PromptSpec,
    VideoSpec,
    VisionSpec,
)
from ..documents import generation_defaults
from ..family import FamilySpec, Json, ManifestParts, RoleSpec
from ..fields import read_field, read_fields, read_size
from ..image_processor import PatchGeometry, image_processor, smart_resize_spec
from ..layers import (
    BlockRunner,
    DecoderConfig,
    GatedMLP,
    PackedAttention,
    PackedBlock,
    PatchEmbed,
    RMSNorm,
    axis_angles,
    frequencies,
    reorder_blocks,
)
from ..roles import language_roles, merged_vision_roles
from ..text_config import TINY_TEXT, cache_spec, check_activation, eos_token_ids, is_tied, read_decoder, text_config

__all__ = [
    "FAMILY",
    "PROTECTED",
    "decoder_config",
    "manifest",
    "manifest_parts",
    "normalise",
    "patch_geometry",
    "text_roles",
    "unused",
    "vision_frequencies",
]

MODEL_TYPE = "qwen2_5_vl"
PROTECTED = ("<|image_pad|>", "<|video_pad|>", "<|vision_pad|>", "<|vision_start|>", "<|vision_end|>")
INDEX_INPUTS = ("patch_positions", "cu_seqlens", "window_index", "cu_window_seqlens")
VISION_THETA = 10000.0
VISION_EPS = 1e-6


# Configuration


@dataclass(frozen=True)
class VisionConfig:
    width: int
    inner: int
    num_layers: int
    num_heads: int
    geometry: PatchGeometry
    out_width: int
    window_blocks: int  # side of a window in merge blocks
    full_attention_layers: frozenset[int]
    inverse_frequencies: tuple[float, ...]  # of the two axes, one after the other


def vision_config(config: Json) -> VisionConfig:
    width, num_heads = (read_size(config, f"vision_config.{key}") for key in ("hidden_size", "num_heads"))
    geometry = patch_geometry(config)
    check_activation(config, "vision_config.hidden_act", "silu")
    window = read_size(config, "vision_config.window_size", 112)
    if window < geometry.merge_size * geometry.patch_size:
        raise CheckpointError(f"config.json: vision_config.window_size is {window} pixels, less than one merge block")
    return VisionConfig(
        width=width,
        inner=read_size(config, "vision_config.intermediate_size"),
        num_layers=read_size(config, "vision_config.depth"),
        num_heads=num_heads,
        geometry=geometry,
        out_width=read_size(config, "vision_config.out_hidden_size"),
        window_blocks=window // geometry.merge_size // geometry.patch_size,
        full_attention_layers=frozenset(read_fields(config, "vision_config.fullatt_block_indexes")),
        inverse_frequencies=vision_frequencies(config, width, num_heads),
    )


def patch_geometry(config: Json) -> PatchGeometry:
    """Sizes of a patch; files spell the channels in two ways."""
    channels = read_size(config, "vision_config.in_channels", read_size(config, "vision_config.in_chans", 3))
    return PatchGeometry(
        channels=channels,
        patch_size=read_size(config, "vision_config.patch_size", 14),
        merge_size=read_size(config, "vision_config.spatial_merge_size", 2),
        num_frames=read_size(config, "vision_config.temporal_patch_size", 2),
    )


def vision_frequencies(config: Json, width: int, num_heads: int) -> tuple[float, ...]:
    """Those of rows, then those of columns: a quarter of the head size each."""
    if width % (4 * num_heads):
        raise CheckpointError(
            f"config.json: vision_config: width {width} over {num_heads} heads is no head size that is a multiple of 4"
        )
    theta = read_field(config, "vision_config.rope_parameters.rope_theta", float, VISION_THETA)
    return 2 * frequencies(width // num_heads // 2, theta)


def decoder_config(config: Json) -> DecoderConfig:
    """Qwen2 with biased query, key and value, and positions for time, height and width."""
    return read_decoder(config, qkv_bias=True, num_axes=3, default_theta=1000000.0)


# Modules


def vision_block(config: VisionConfig) -> PackedBlock:
    norm1, norm2 = (RMSNorm(config.width, VISION_EPS) for _ in range(2))
    return PackedBlock(
        norm1, norm2, PackedAttention(config.width, config.num_heads), GatedMLP(config.width, config.inner, bias=True)
    )


class VisionEncoder(nn.Module):
    """Patches of any number of images and clips -> features [N, C], rows in the order of pixel_values."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config.geometry.patch_dim, config.width)
        self.blocks = nn.ModuleList(vision_block(config) for _ in range(config.num_layers))

    def forward(
        self,
        pixel_values: torch.Tensor,
        patch_positions: torch.Tensor,
        cu_seqlens: torch.Tensor,
        window_index: torch.Tensor,
        cu_window_seqlens: torch.Tensor,
    ) -> torch.Tensor:
        block = self.config.geometry.block
        x_NC = reorder_blocks(self.patch_embed(pixel_values), window_index, block)
        positions = reorder_blocks(patch_positions, window_index, block)
        angles = axis_angles(positions, self.config.inverse_frequencies)
        rotary = (torch.cos(angles), torch.sin(angles))
        run = BlockRunner()
        for index, layer in enumerate(self.blocks):
            full = index in self.config.full_attention_layers
            x_NC = run(layer, x_NC, rotary, cu_seqlens if full else cu_window_seqlens)
        order = torch.arange(window_index.shape[0])
        inverse = torch.zeros_like(window_index).scatter(0, window_index, order)
        return reorder_blocks(x_NC, inverse, block).to(torch.float32)


# Roles: graphs, their ports, and where each parameter's values are


def roles(config: Json) -> dict[str, RoleSpec]:
    vision = vision_config(config)
    return {
        **merged_vision_roles(
            lambda: VisionEncoder(vision),
            lambda: RMSNorm(vision.width, VISION_EPS),
            vision.geometry,
            (vision.width, vision.out_width),
            INDEX_INPUTS,
            tower="model.visual.",
            merger="model.visual.merger.",
        ),
        **text_roles(config),
    }


def text_roles(config: Json) -> dict[str, RoleSpec]:
    """embed_tokens and decoder, the same in both siblings."""
    return language_roles(decoder_config(config), "model.language_model.", tied=is_tied(config))


def normalise(name: str) -> str:
    """Published names (`visual.`, `model.layers.`) to those that transformers >= 4.52 holds in memory."""
    name = re.sub(r"^visual\.", "model.visual.", name)
    return re.sub(r"^model\.(?!language_model\.|visual\.)", "model.language_model.", name)


def unused(config: Json, name: str) -> bool:
    """A head saved beside tied embeddings (upstream ignores it), and frequency tables that can be computed."""
    return (name == "lm_head.weight" and is_tied(config)) or name.endswith(".rotary_emb.inv_freq")


# Manifest: what the runtime needs to know


def manifest(config: Json, documents: Mapping[str, Json]) -> ManifestParts:
    window_blocks = vision_config(config).window_blocks
    return manifest_parts(config, documents, window_blocks, INDEX_INPUTS, seconds=True)


def manifest_parts(
    config: Json, documents: Mapping[str, Json], window_blocks: int, inputs: tuple[str, ...], *, seconds: bool
) -> ManifestParts:
    """Shared with the sibling. `seconds`: video positions advance by seconds, not by frames."""
    geometry, decoder = patch_geometry(config), decoder_config(config)
    unit = (geometry.patch_size * geometry.merge_size) ** 2  # pixels of one merge block
    return ManifestParts(
        image=smart_resize_spec(image_processor(documents), geometry),
        video=VideoSpec(
            sampling="linspace",
            fps=2.0,
            min_frames=4,
            max_frames=768,
            frame_multiple=geometry.num_frames,
            min_pixels=128 * unit,
            max_pixels=768 * unit,
            total_pixels=int(128000 * unit * 0.9),
            default_fps=2.0,
        ),
        vision=VisionSpec(inputs=inputs, merge_size=geometry.merge_size, window_blocks=window_blocks),
        prompt=PromptSpec(
            image_placeholder="<|image_pad|>",
            video_placeholder="<|video_pad|>",
            protected_tokens=PROTECTED,
            template_options={"add_generation_prompt": True, "add_vision_id": False},
        ),
        positions=PositionSpec(
            strategy="mrope",
            video_rule="transformers-4.49",
            # the library's own default is 4; published checkpoints say 2
            tokens_per_second=float(read_field(config, "vision_config.tokens_per_second", int, 4)) if seconds else None,
        ),
        cache=cache_spec(decoder, read_size(text_config(config), "max_position_embeddings", 32768)),
        generation=generation_defaults(documents.get("generation_config.json", {}), eos_token_ids(config)),
    )


TINY_CONFIG: Json = {
    "model_type": MODEL_TYPE,
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    **TINY_TEXT,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "eos_token_id": 2,
    "vision_config": {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 108,
        "num_heads": 4,
        "in_chans": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 56,
        "tokens_per_second": 2,
        "fullatt_block_indexes": [1],
        "out_hidden_size": 64,
    },
}

FAMILY = FamilySpec(
    name=MODEL_TYPE,
    matches=lambda config: config.get("model_type") == MODEL_TYPE,
    roles=roles,
    manifest=manifest,
    normalise=normalise,
    unused=unused,
    tiny_config=TINY_CONFIG,
    reference="_qwen2_5_vl_reference",
)
