"""The graphs that families share, with their ports: packed vision encoder, projector, token embedding, decoder.

Dynamic dims have one name each in all graphs: batch_size, sequence_length, past_length, total_length, num_logits;
num_patches, num_merge_blocks, num_frame_bounds, num_window_bounds.
"""

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from .family import Port, RoleSpec, TensorRef
from .image_processor import PatchGeometry
from .layers import CausalDecoder, DecoderConfig, PatchMerger, RMSNorm, TokenEmbedding

__all__ = [
    "TensorRule",
    "decoder_role",
    "embedding_role",
    "language_roles",
    "merged_vision_roles",
    "packed_vision_role",
    "projector_role",
]

TensorRule = Callable[[str, tuple[int, ...]], TensorRef]
# What runtime/vision_inputs.py makes from grids, by the same names.
_INDEX_PORTS: Mapping[str, Port] = {
    port.name: port
    for port in (
        Port("patch_positions", "int64", ("num_patches", 2)),
        Port("cu_seqlens", "int32", ("num_frame_bounds",)),
        Port("window_index", "int64", ("num_merge_blocks",)),
        Port("cu_window_seqlens", "int32", ("num_window_bounds",)),
    )
}


def packed_vision_role(
    build: Callable[[], nn.Module], geometry: PatchGeometry, width: int, index_inputs: Sequence[str], prefix: str
) -> RoleSpec:
    """pixel_values float32 [N, patch_dim] and the named index inputs -> vision_features float32 [N, width].

    Tensors are under `prefix`; that of `patch_embed.proj` is a convolution's kernel.
    """

    def tensor(parameter: str, shape: tuple[int, ...]) -> TensorRef:
        kernel = parameter == "patch_embed.proj.weight"
        return TensorRef(f"{prefix}{parameter}", (width, *geometry.kernel) if kernel else shape)

    return RoleSpec(
        build=build,
        inputs=(
            Port("pixel_values", "float32", ("num_patches", geometry.patch_dim)),
            *(_INDEX_PORTS[name] for name in index_inputs),
        ),
        outputs=(Port("vision_features", "float32", ("num_patches", width)),),
        tensor=tensor,
    )


def projector_role(build: Callable[[], nn.Module], width: int, out_width: int, prefix: str) -> RoleSpec:
    """vision_features float32 [N, width] -> image_features float32 [N / M, out_width]; tensors are under `prefix`."""
    return RoleSpec(
        build=build,
        inputs=(Port("vision_features", "float32", ("num_patches", width)),),
        outputs=(Port("image_features", "float32", ("num_merge_blocks", out_width)),),
        tensor=lambda parameter, shape: TensorRef(f"{prefix}{parameter}", shape),
    )


def merged_vision_roles(
    encoder: Callable[[], nn.Module],
    norm: Callable[[], RMSNorm | nn.LayerNorm],
    geometry: PatchGeometry,
    widths: tuple[int, int],
    index_inputs: Sequence[str],
    *,
    tower: str,
    merger: str,
) -> dict[str, RoleSpec]:
    """A packed vision_encoder, and as projector a PatchMerger behind `norm`.

    widths: of the tower and of what the merger gives. tower, merger: what names of their tensors begin with.
    """
    width, out_width = widths
    return {
        "vision_encoder": packed_vision_role(encoder, geometry, width, index_inputs, tower),
        "projector": projector_role(
            lambda: PatchMerger(norm(), width, geometry.block, out_width), width, out_width, merger
        ),
    }


def language_roles(
    decoder: DecoderConfig, prefix: str, *, tied: bool, head: str = "lm_head.weight"
) -> dict[str, RoleSpec]:
    """embed_tokens and decoder, their tensors under `prefix`; the head is `head`, or where `tied` the table again."""
    table = f"{prefix}embed_tokens.weight"

    def decoder_tensor(parameter: str, shape: tuple[int, ...]) -> TensorRef:
        if parameter == "lm_head.weight":
            return TensorRef(table if tied else head, shape)
        return TensorRef(f"{prefix}{parameter}", shape)

    return {
        "embed_tokens": embedding_role(
            decoder.vocab_size, decoder.width, lambda parameter, shape: TensorRef(table, shape)
        ),
        "decoder": decoder_role(decoder, decoder_tensor),
    }


def embedding_role(vocab_size: int, width: int, tensor: TensorRule) -> RoleSpec:
    """input_ids int64 [B, S] -> inputs_embeds float32 [B, S, D]."""
    return RoleSpec(
        build=lambda: TokenEmbedding(vocab_size, width),
        inputs=(Port("input_ids", "int64", ("batch_size", "sequence_length")),),
        outputs=(Port("inputs_embeds", "float32", ("batch_size", "sequence_length", width)),),
        tensor=tensor,
    )


def decoder_role(config: DecoderConfig, tensor: TensorRule) -> RoleSpec:
    """inputs_embeds and a cache -> logits of the last positions and the grown cache; see CausalDecoder."""
    batch, new = "batch_size", "sequence_length"
    heads, size = config.num_kv_heads, config.head_dim
    axes = (len(config.rope_sections),) if len(config.rope_sections) > 1 else ()
    names = [f"{layer}.{kind}" for layer in range(config.num_layers) for kind in ("key", "value")]
    return RoleSpec(
        build=lambda: CausalDecoder(config),
        inputs=(
            Port("inputs_embeds", "float32", (batch, new, config.width)),
            Port("attention_mask", "int64", (batch, "total_length")),
            Port("position_ids", "int64", (*axes, batch, new)),
            Port("num_logits_to_keep", "int64", (1,), default=(1,)),
            *(Port(f"past_key_values.{name}", "compute", (batch, heads, "past_length", size)) for name in names),
        ),
        outputs=(
            Port("logits", "float32", (batch, "num_logits", config.vocab_size)),
            *(Port(f"present.{name}", "compute", (batch, heads, "present_length", size)) for name in names),
        ),
        tensor=tensor,
        variadic=len(names),
    )
