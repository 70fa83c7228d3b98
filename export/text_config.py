"""The text part of a Hugging Face config.json as a DecoderConfig: what Llama, Mistral and Qwen2 decoders say alike.

Reading is strict where a guess would change answers: a field that upstream obeys is obeyed here or refused.
"""

from typing import Any

from ..runtime.errors import CheckpointError
from ..runtime.manifest import CacheSpec
from .family import Json
from .fields import read_field, read_fields, read_size
from .layers import DecoderConfig, frequencies

__all__ = [
    "TINY_TEXT",
    "cache_spec",
    "check_activation",
    "eos_token_ids",
    "is_tied",
    "read_decoder",
    "text_at",
    "text_config",
]

# The text part of a tiny configuration, as tests and traces of a family take it.
TINY_TEXT: Json = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
_PLAIN_ROPE = ("default", "mrope")  # sections are told by mrope_section, whatever the type is called


def text_config(config: Json) -> Json:
    """The text part: config.json itself (as published) or its text_config (as re-saved since transformers 4.52)."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def text_at(config: Json) -> str:
    """Where `text_config` stands in config.json, as a prefix of paths."""
    return "" if text_config(config) is config else "text_config."


def is_tied(config: Json) -> bool:
    """Whether the output head is the embedding table; the field may sit at either level."""
    return any(read_field(part, "tie_word_embeddings", bool, False) for part in (config, text_config(config)))


def eos_token_ids(config: Json) -> Any:
    """eos_token_id of config.json as it stands there, from the level that has one; None where neither has."""
    own = text_config(config).get("eos_token_id")
    return config.get("eos_token_id") if own is None else own


def read_decoder(
    config: Json, *, qkv_bias: bool, num_axes: int, default_theta: float, at: str | None = None
) -> DecoderConfig:
    """The decoder that config.json describes.

    `num_axes` rows of positions: 1, or 3 with `mrope_section` (M-RoPE). `default_theta` is upstream's for this family.
    `at`: prefix of the text part's fields ("llm_config."), where it is neither config.json itself nor its text_config.
    Raises CheckpointError where a field is missing, does not fit the others, or asks for what is not supported.
    """
    at = text_at(config) if at is None else at
    if read_field(config, f"{at}use_sliding_window", bool, False):
        raise CheckpointError(f"config.json: {at}use_sliding_window is true; sliding-window decoders are not supported")
    check_activation(config, f"{at}hidden_act", "silu")
    num_heads, width = read_size(config, f"{at}num_attention_heads"), read_size(config, f"{at}hidden_size")
    head_dim = read_size(config, f"{at}head_dim", width // num_heads)
    rope = _rope(config, at)
    theta = read_field(rope, "rope_theta", float, read_field(config, f"{at}rope_theta", float, default_theta))
    return DecoderConfig(
        width=width,
        inner=read_size(config, f"{at}intermediate_size"),
        num_layers=read_size(config, f"{at}num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=read_size(config, f"{at}num_key_value_heads"),
        head_dim=head_dim,
        vocab_size=read_size(config, f"{at}vocab_size"),
        norm_eps=read_field(config, f"{at}rms_norm_eps", float),
        inverse_frequencies=frequencies(head_dim, theta),
        rope_sections=read_fields(rope, "mrope_section", num_axes) if num_axes > 1 else (head_dim // 2,),
        qkv_bias=qkv_bias,
    )


def cache_spec(decoder: DecoderConfig, max_length: int) -> CacheSpec:
    """The float32 cache of a decoder, for prompts and answers of at most `max_length` tokens."""
    return CacheSpec(
        num_layers=decoder.num_layers,
        num_kv_heads=decoder.num_kv_heads,
        head_dim=decoder.head_dim,
        dtype="float32",
        max_length=max_length,
    )


def check_activation(config: Json, path: str, wanted: str) -> None:
    """Raises CheckpointError where config.json asks for another activation than the modules compute."""
    found = read_field(config, path, str, wanted)
    if found != wanted:
        raise CheckpointError(f"config.json: {path} is {found!r}; only {wanted!r} is supported")


def _rope(config: Json, at: str) -> Json:
    """rope_parameters (transformers 5) or rope_scaling (before); {} where the file has neither."""
    rope = read_field(config, f"{at}rope_parameters", dict, read_field(config, f"{at}rope_scaling", dict, {}))
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in _PLAIN_ROPE:
        raise CheckpointError(
            f"config.json: rope type {kind!r} stretches positions, which is not supported; "
            f"use the checkpoint's own {' or '.join(_PLAIN_ROPE)} rope"
        )
    return rope
