"""Building blocks of the family files: eager PyTorch maths, and the semantic operators they trace to."""

from .attention import cached_attention, last_positions, segment_attention
from .decoder import CausalDecoder, DecoderConfig
from .linear import Embedding, Linear, TokenEmbedding
from .mlp import GatedMLP, quick_gelu
from .norm import RMSNorm
from .repeat import BlockRunner
from .rope import apply_rotary, frequencies, multi_axis_angles
from .vision import PackedAttention, PackedBlock, PatchEmbed, PatchMerger, RotaryTables, axis_angles, reorder_blocks

__all__ = [
    "BlockRunner",
    "CausalDecoder",
    "DecoderConfig",
    "Embedding",
    "GatedMLP",
    "Linear",
    "PackedAttention",
    "PackedBlock",
    "PatchEmbed",
    "PatchMerger",
    "RMSNorm",
    "RotaryTables",
    "TokenEmbedding",
    "apply_rotary",
    "axis_angles",
    "cached_attention",
    "frequencies",
    "last_positions",
    "multi_axis_angles",
    "quick_gelu",
    "reorder_blocks",
    "segment_attention",
]
