"""Qwen2-VL (arXiv 2409.12191): the older sibling of Qwen2.5-VL.

Other in the vision tower only: LayerNorm, a two-layer MLP with quick GELU, full attention a frame without windows;
and video positions count frames, not seconds. In its config, vision `embed_dim` is the tower's width and
`hidden_size` the decoder's.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..family import FamilySpec, Json, ManifestParts, RoleSpec
from ..fields import read_field, read_size
from ..image_processor import PatchGeometry
from ..layers import BlockRunner, Linear, PackedAttention, PackedBlock, PatchEmbed, axis_angles, quick_gelu
from ..roles import merged_vision_roles
from ..text_config import TINY_TEXT, check_activation
from .qwen2_5_vl import manifest_parts, normalise, patch_geometry, text_roles, unused, vision_frequencies

__all__ = ["FAMILY", "INDEX_INPUTS", "VisionConfig", "vision_config", "vision_roles"]

MODEL_TYPE = "qwen2_vl"
INDEX_INPUTS = ("patch_positions", "cu_seqlens")
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
    inverse_frequencies: tuple[float, ...]


def vision_config(config: Json) -> VisionConfig:
    width, num_heads = (read_size(config, f"vision_config.{key}") for key in ("embed_dim", "num_heads"))
    check_activation(config, "vision_config.hidden_act", "quick_gelu")
    return VisionConfig(
        width=width,
        inner=int(width * read_field(config, "vision_config.mlp_ratio", float, 4.0)),
        num_layers=read_size(config, "vision_config.depth"),
        num_heads=num_heads,
        geometry=patch_geometry(config),
        out_width=read_size(config, "vision_config.hidden_size"),
        inverse_frequencies=vision_frequencies(config, width, num_heads),
    )


# Modules


class MLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.width, config.inner, bias=True)
        self.fc2 = Linear(config.inner, config.width, bias=True)

    def forward(self, x_NC: torch.Tensor) -> torch.Tensor:
        return self.fc2(quick_gelu(self.fc1(x_NC)))


def vision_block(config: VisionConfig) -> PackedBlock:
    norm1, norm2 = (nn.LayerNorm(config.width, VISION_EPS) for _ in range(2))
    return PackedBlock(norm1, norm2, PackedAttention(config.width, config.num_heads), MLP(config))


class VisionEncoder(nn.Module):
    """Patches of any number of images and clips -> features [N, C], rows in the order of pixel_values."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config.geometry.patch_dim, config.width)
        self.blocks = nn.ModuleList(vision_block(config) for _ in range(config.num_layers))

    def forward(
        self, pixel_values: torch.Tensor, patch_positions: torch.Tensor, cu_seqlens: torch.Tensor
    ) -> torch.Tensor:
        x_NC = self.patch_embed(pixel_values)
        angles = axis_angles(patch_positions, self.config.inverse_frequencies)
        rotary = (torch.cos(angles), torch.sin(angles))
        run = BlockRunner()
        for layer in self.blocks:
            x_NC = run(layer, x_NC, rotary, cu_seqlens)
        return x_NC.to(torch.float32)


# Roles


def roles(config: Json) -> dict[str, RoleSpec]:
    return {**vision_roles(vision_config(config)), **text_roles(config)}


def vision_roles(
    vision: VisionConfig, *, tower: str = "model.visual.", merger: str = "model.visual.merger."
) -> dict[str, RoleSpec]:
    """vision_encoder and projector; tower, merger: what names of their tensors begin with."""
    return merged_vision_roles(
        lambda: VisionEncoder(vision),
        lambda: nn.LayerNorm(vision.width, VISION_EPS),
        vision.geometry,
        (vision.width, vision.out_width),
        INDEX_INPUTS,
        tower=tower,
        merger=merger,
    )


# Manifest


def manifest(config: Json, documents: Mapping[str, Json]) -> ManifestParts:
    return manifest_parts(config, documents, 0, INDEX_INPUTS, seconds=False)


TINY_CONFIG: Json = {
    "model_type": MODEL_TYPE,
    "architectures": ["Qwen2VLForConditionalGeneration"],
    **TINY_TEXT,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "eos_token_id": 2,
    "vision_config": {
        "depth": 2,
        "embed_dim": 64,
        "hidden_size": 64,
        "mlp_ratio": 2,
        "num_heads": 4,
        "in_chans": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
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
