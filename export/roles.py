"""The graphs that every family with a decoder has: token embedding and decoder, with their ports.

Dynamic dims have one name each in all graphs: batch_size, sequence_length, past_length, total_length, num_logits.
"""

from collections.abc import Callable

from .family import Port, RoleSpec, TensorRef
from .layers import CausalDecoder, DecoderConfig, TokenEmbedding

__all__ = ["decoder_role", "embedding_role"]

TensorRule = Callable[[str, tuple[int, ...]], TensorRef]


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
    names = [f"{layer}.{kind}" for layer in range(config.num_layers) for kind in ("key", "value")]
    return RoleSpec(
        build=lambda: CausalDecoder(config),
        inputs=(
            Port("inputs_embeds", "float32", (batch, new, config.width)),
            Port("attention_mask", "int64", (batch, "total_length")),
            Port("position_ids", "int64", (len(config.rope_sections), batch, new)),
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
