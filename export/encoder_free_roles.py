"""Graphs of models without a vision encoder: patches straight to rows, and a decoder that tells modalities apart."""

from torch import nn

from .family import Port, RoleSpec
from .image_processor import PatchGeometry
from .layers import DecoderConfig
from .layers.patch_rows import PatchRows
from .layers.routed import RoutedDecoder, RoutedParts
from .roles import TensorRule, decoder_role

__all__ = ["patch_embed_role", "routed_decoder_role"]

_ROUTING = (
    Port("text_rows", "int64", ("num_text_rows",)),
    Port("visual_rows", "int64", ("num_visual_rows",)),
    Port("row_places", "int64", ("batch_size", "sequence_length")),
)
_NUM_PLAIN_INPUTS = 4  # of a decoder, in front of its cache


def patch_embed_role(geometry: PatchGeometry, inner: int, width: int, tensor: TensorRule) -> RoleSpec:
    """pixel_values float32 [N, patch_dim] and image_rows int64 [R] -> image_features float32 [R, width]."""

    def build() -> nn.Module:
        return PatchRows(geometry.patch_dim, inner, geometry.block, width)

    return RoleSpec(
        build=build,
        inputs=(
            Port("pixel_values", "float32", ("num_patches", geometry.patch_dim)),
            Port("image_rows", "int64", ("num_image_rows",)),
        ),
        outputs=(Port("image_features", "float32", ("num_image_rows", width)),),
        tensor=tensor,
    )


def routed_decoder_role(config: DecoderConfig, parts: RoutedParts, tensor: TensorRule) -> RoleSpec:
    """As decoder_role, with inputs that say which tokens are visual; see RoutedDecoder."""
    plain = decoder_role(config, tensor)
    assert not plain.inputs[_NUM_PLAIN_INPUTS - 1].name.startswith("past_key_values.")
    return RoleSpec(
        build=lambda: RoutedDecoder(config, parts),
        inputs=(*plain.inputs[:_NUM_PLAIN_INPUTS], *_ROUTING, *plain.inputs[_NUM_PLAIN_INPUTS:]),
        outputs=plain.outputs,
        tensor=tensor,
        variadic=plain.variadic,
    )
