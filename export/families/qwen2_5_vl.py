"""Qwen2.5-VL (arXiv 2502.13923): windowed vision tower, 2x2 patch merger, Qwen2 decoder with M-RoPE.

Dims: N patches, M = merge_size^2 patches a merge block, C vision width, D decoder width, F rotary frequencies.
Checked against transformers 4.49.0; tensor names are those of transformers >= 4.52 in memory.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ...runtime.errors import CheckpointError
from ...runtime.manifest import (
    CacheSpec,
    ImageSpec,
    PositionSpec,
    PromptSpec,
    VideoSpec,
    VisionSpec,
)
from ..documents import generation_defaults, image_processor
from ..family import FamilySpec, Json, ManifestParts, Port, RoleSpec, TensorRef
from ..fields import read_field, read_fields
from ..layers import (
    DecoderConfig,
    GatedMLP,
    Linear,
    RMSNorm,
    apply_rotary,
    frequencies,
    multi_axis_angles,
    segment_attention,
)
from ..roles import decoder_role, embedding_role

__all__ = [
    "FAMILY",
    "PatchEmbed",
    "PatchMerger",
    "VisionAttention",
    "decoder_config",
    "language_roles",
    "manifest",
    "manifest_parts",
    "merger_role",
    "normalise",
    "patch_angles",
    "patch_sizes",
    "unused",
]

MODEL_TYPE = "qwen2_5_vl"
PROTECTED = ("<|image_pad|>", "<|video_pad|>", "<|vision_pad|>", "<|vision_start|>", "<|vision_end|>")
VISION_THETA = 10000.0
VISION_EPS = 1e-6


# Configuration


@dataclass(frozen=True)
class VisionConfig:
    width: int
    inner: int
    num_layers: int
    num_heads: int
    patch_dim: int  # channels * frames * patch height * patch width
    conv_shape: tuple[int, ...]  # of the patch embedding as the checkpoint stores it
    merge_size: int
    out_width: int
    window_blocks: int  # side of a window in merge blocks
    full_attention_layers: frozenset[int]
    inverse_frequencies: tuple[float, ...]  # of the two axes, one after the other


def text_config(config: Json) -> Json:
    """The text part: config.json itself (as published) or its text_config (as re-saved since transformers 4.52)."""
    nested = config.get("text_config")
    if not isinstance(nested, dict):
        return config
    return {"tie_word_embeddings": config.get("tie_word_embeddings"), **nested}


def is_tied(config: Json) -> bool:
    """Whether the output head is the embedding table; the field may sit at either level."""
    return any(bool(part.get("tie_word_embeddings")) for part in (config, text_config(config)))


def vision_config(config: Json) -> VisionConfig:
    width, num_heads = (read_field(config, f"vision_config.{key}", int) for key in ("hidden_size", "num_heads"))
    patch, merge, frames = patch_sizes(config)
    channels = read_field(
        config, "vision_config.in_channels", int, read_field(config, "vision_config.in_chans", int, 3)
    )
    window = read_field(config, "vision_config.window_size", int, 112)
    axis = frequencies(width // num_heads // 2, VISION_THETA)
    return VisionConfig(
        width=width,
        inner=read_field(config, "vision_config.intermediate_size", int),
        num_layers=read_field(config, "vision_config.depth", int),
        num_heads=num_heads,
        patch_dim=channels * frames * patch * patch,
        conv_shape=(width, channels, frames, patch, patch),
        merge_size=merge,
        out_width=read_field(config, "vision_config.out_hidden_size", int),
        window_blocks=window // merge // patch,
        full_attention_layers=frozenset(read_field(config, "vision_config.fullatt_block_indexes", list)),
        inverse_frequencies=axis + axis,
    )


def patch_sizes(config: Json) -> tuple[int, int, int]:
    """(patch_size, spatial_merge_size, temporal_patch_size)."""
    defaults = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    patch, merge, frames = (read_field(config, f"vision_config.{key}", int, size) for key, size in defaults.items())
    return patch, merge, frames


def decoder_config(config: Json) -> DecoderConfig:
    text = text_config(config)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if read_field(text, "use_sliding_window", bool, False):
        raise CheckpointError("config.json: use_sliding_window is true; sliding-window decoders are not supported")
    num_heads, width = read_field(text, "num_attention_heads", int), read_field(text, "hidden_size", int)
    head_dim = read_field(text, "head_dim", int, width // num_heads)
    theta = read_field(rope, "rope_theta", float, read_field(text, "rope_theta", float, 1000000.0))
    return DecoderConfig(
        width=width,
        inner=read_field(text, "intermediate_size", int),
        num_layers=read_field(text, "num_hidden_layers", int),
        num_heads=num_heads,
        num_kv_heads=read_field(text, "num_key_value_heads", int),
        head_dim=head_dim,
        vocab_size=read_field(text, "vocab_size", int),
        norm_eps=read_field(text, "rms_norm_eps", float, 1e-6),
        inverse_frequencies=frequencies(head_dim, theta),
        rope_sections=read_fields(rope, "mrope_section", 3),
        qkv_bias=True,
    )


# Modules


class VisionAttention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.width = num_heads, width
        self.qkv = Linear(width, 3 * width, bias=True)
        self.proj = Linear(width, width, bias=True)

    def forward(
        self, x_NC: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], cu_seqlens: torch.Tensor
    ) -> torch.Tensor:
        qkv, c = self.qkv(x_NC), self.width
        query, key = (
            apply_rotary(part.unsqueeze(0), *rotary, self.num_heads).squeeze(0)
            for part in (qkv[:, :c], qkv[:, c : 2 * c])
        )
        return self.proj(segment_attention(query, key, qkv[:, 2 * c :], cu_seqlens, self.num_heads))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.width, VISION_EPS)
        self.norm2 = RMSNorm(config.width, VISION_EPS)
        self.attn = VisionAttention(config.width, config.num_heads)
        self.mlp = GatedMLP(config.width, config.inner, bias=True)

    def forward(
        self, x_NC: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], cu_seqlens: torch.Tensor
    ) -> torch.Tensor:
        x_NC = x_NC + self.attn(self.norm1(x_NC), rotary, cu_seqlens)
        return x_NC + self.mlp(self.norm2(x_NC))


class PatchEmbed(nn.Module):
    """A convolution whose kernel is its stride, so a linear map of each flattened patch."""

    def __init__(self, patch_dim: int, width: int) -> None:
        super().__init__()
        self.proj = Linear(patch_dim, width, bias=False)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.proj(patches)


class VisionEncoder(nn.Module):
    """Patches of any number of images and clips -> features [N, C], rows in the order of pixel_values."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config.patch_dim, config.width)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.num_layers))

    def forward(
        self,
        pixel_values: torch.Tensor,
        patch_positions: torch.Tensor,
        cu_seqlens: torch.Tensor,
        window_index: torch.Tensor,
        cu_window_seqlens: torch.Tensor,
    ) -> torch.Tensor:
        block = self.config.merge_size**2
        x_NC = self.patch_embed(pixel_values.to(self.patch_embed.proj.weight.dtype))
        x_NC = reorder_blocks(x_NC, window_index, block)
        positions = reorder_blocks(patch_positions, window_index, block).transpose(0, 1).unsqueeze(1)
        angles = patch_angles(positions, self.config.inverse_frequencies)
        rotary = (torch.cos(angles), torch.sin(angles))
        for index, layer in enumerate(self.blocks):
            full = index in self.config.full_attention_layers
            x_NC = layer(x_NC, rotary, cu_seqlens if full else cu_window_seqlens)
        order = torch.arange(window_index.shape[0])
        inverse = torch.zeros_like(window_index).scatter(0, window_index, order)
        return reorder_blocks(x_NC, inverse, block).to(torch.float32)


def patch_angles(positions_AN: torch.Tensor, inverse: tuple[float, ...]) -> torch.Tensor:
    """Angles [1, N, F] of (row, column) positions [2, 1, N]: the first half of the slots turns by row, the rest by
    column."""
    half = len(inverse) // 2
    return multi_axis_angles(positions_AN, inverse, (half, half))


def reorder_blocks(x: torch.Tensor, order: torch.Tensor, block: int) -> torch.Tensor:
    """Rows of x [N, ...] in groups of `block`, the groups put into `order` [N / block]."""
    return x.reshape(-1, block, x.shape[-1]).index_select(0, order).reshape(-1, x.shape[-1])


class PatchMerger(nn.Module):
    """features [N, C] -> rows that replace placeholder embeddings [N / M, D]: each merge block becomes one row."""

    def __init__(self, norm: RMSNorm | nn.LayerNorm, width: int, block: int, out_width: int) -> None:
        super().__init__()
        self.ln_q = norm
        self.merged = width * block
        inner, outer = Linear(self.merged, self.merged, bias=True), Linear(self.merged, out_width, bias=True)
        self.mlp = nn.Sequential(inner, nn.GELU(), outer)  # numbered as the checkpoint does: 0 and 2

    def forward(self, vision_features: torch.Tensor) -> torch.Tensor:
        x = vision_features.to(self.ln_q.weight.dtype)
        return self.mlp(self.ln_q(x).reshape(-1, self.merged)).to(torch.float32)


# Roles: graphs, their ports, and where each parameter's values are


def roles(config: Json) -> dict[str, RoleSpec]:
    vision = vision_config(config)
    norm_width = vision.width

    def encoder_tensor(parameter: str, shape: tuple[int, ...]) -> TensorRef:
        kernel = parameter == "patch_embed.proj.weight"
        return TensorRef(f"model.visual.{parameter}", vision.conv_shape if kernel else shape)

    encoder = RoleSpec(
        build=lambda: VisionEncoder(vision),
        inputs=(
            Port("pixel_values", "float32", ("num_patches", vision.patch_dim)),
            Port("patch_positions", "int64", ("num_patches", 2)),
            Port("cu_seqlens", "int32", ("num_frame_bounds",)),
            Port("window_index", "int64", ("num_merge_blocks",)),
            Port("cu_window_seqlens", "int32", ("num_window_bounds",)),
        ),
        outputs=(Port("vision_features", "float32", ("num_patches", vision.width)),),
        tensor=encoder_tensor,
    )
    merger = merger_role(
        lambda: PatchMerger(RMSNorm(norm_width, VISION_EPS), norm_width, vision.merge_size**2, vision.out_width),
        norm_width,
        vision.out_width,
    )
    return {"vision_encoder": encoder, "projector": merger, **language_roles(config)}


def merger_role(build: Callable[[], nn.Module], width: int, out_width: int) -> RoleSpec:
    return RoleSpec(
        build=build,
        inputs=(Port("vision_features", "float32", ("num_patches", width)),),
        outputs=(Port("image_features", "float32", ("num_merge_blocks", out_width)),),
        tensor=lambda parameter, shape: TensorRef(f"model.visual.merger.{parameter}", shape),
    )


def language_roles(config: Json) -> dict[str, RoleSpec]:
    decoder, tied = decoder_config(config), is_tied(config)
    table = "model.language_model.embed_tokens.weight"

    def decoder_tensor(parameter: str, shape: tuple[int, ...]) -> TensorRef:
        if parameter == "lm_head.weight":
            return TensorRef(table if tied else "lm_head.weight", shape)
        return TensorRef(f"model.language_model.{parameter}", shape)

    return {
        "embed_tokens": embedding_role(
            decoder.vocab_size, decoder.width, lambda parameter, shape: TensorRef(table, shape)
        ),
        "decoder": decoder_role(decoder, decoder_tensor),
    }


def normalise(name: str) -> str:
    """Published names (`visual.`, `model.layers.`) to those that transformers >= 4.52 holds in memory."""
    name = re.sub(r"^visual\.", "model.visual.", name)
    return re.sub(r"^model\.(?!language_model\.|visual\.)", "model.language_model.", name)


def unused(config: Json, name: str) -> bool:
    """A head saved beside tied embeddings (upstream ignores it), and frequency tables that can be computed."""
    return (name == "lm_head.weight" and is_tied(config)) or name.endswith(".rotary_emb.inv_freq")


# Manifest: what the runtime needs to know


def manifest(config: Json, documents: Mapping[str, Json]) -> ManifestParts:
    vision = vision_config(config)
    return manifest_parts(config, documents, vision.window_blocks, WINDOWED_INPUTS, seconds=True)


WINDOWED_INPUTS = ("patch_positions", "cu_seqlens", "window_index", "cu_window_seqlens")


def manifest_parts(
    config: Json, documents: Mapping[str, Json], window_blocks: int, inputs: tuple[str, ...], *, seconds: bool
) -> ManifestParts:
    """Shared with the sibling. `seconds`: video positions advance by seconds, not by frames."""
    patch, merge, frames = patch_sizes(config)
    decoder = decoder_config(config)
    unit = (patch * merge) ** 2  # pixels of one merge block
    return ManifestParts(
        image=image_spec(image_processor(documents), patch, merge, frames),
        video=VideoSpec(
            sampling="linspace",
            fps=2.0,
            min_frames=4,
            max_frames=768,
            frame_multiple=frames,
            min_pixels=128 * unit,
            max_pixels=768 * unit,
            total_pixels=int(128000 * unit * 0.9),
            default_fps=2.0,
        ),
        vision=VisionSpec(inputs=inputs, merge_size=merge, window_blocks=window_blocks),
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
        cache=CacheSpec(
            num_layers=decoder.num_layers,
            num_kv_heads=decoder.num_kv_heads,
            head_dim=decoder.head_dim,
            dtype="float32",
            max_length=read_field(text_config(config), "max_position_embeddings", int, 32768),
        ),
        generation=generation_defaults(
            documents.get("generation_config.json", {}),
            text_config(config).get("eos_token_id", config.get("eos_token_id")),
        ),
    )


def image_spec(preprocessor: Json, patch: int, merge: int, frames: int) -> ImageSpec:
    """`size` of newer files holds pixel counts under names of edges."""
    size = preprocessor.get("size") or {}
    low, high = size.get("shortest_edge", 56 * 56), size.get("longest_edge", 28 * 28 * 1280)
    mean, std = (
        tuple(read_field(preprocessor, f"image_{key}", list, default))
        for key, default in (("mean", list(CLIP_MEAN)), ("std", list(CLIP_STD)))
    )
    return ImageSpec(
        strategy="smart_resize",
        patch_size=read_field(preprocessor, "patch_size", int, patch),
        temporal_patch_size=read_field(preprocessor, "temporal_patch_size", int, frames),
        merge_size=read_field(preprocessor, "merge_size", int, merge),
        min_pixels=read_field(preprocessor, "min_pixels", int, low),
        max_pixels=read_field(preprocessor, "max_pixels", int, high),
        mean=mean,
        std=std,
        rescale=read_field(preprocessor, "rescale_factor", float, 1 / 255),
        resample="bicubic",
    )


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


TINY_CONFIG: Json = {
    "model_type": MODEL_TYPE,
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
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
