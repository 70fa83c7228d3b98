"""POINTS1.5 (arXiv 2412.08443): the tower of Qwen2-VL without its merger, a projector of its own, a Qwen2.5 decoder.

Checkpoints come in two layouts: "custom_llama" (Megatron-like names, keys and values fused a head, up and gate in one
matrix) and "qwen2". Both are one decoder with plain positions. The prompt has no system turn, and generation ends with
<|im_end|>: the eos ids of config.json are the trainer's, and generation_config.json is not what upstream generates by.

Dims: C tower width, D decoder width, V vocabulary, F inner width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ...runtime.errors import CheckpointError
from ...runtime.manifest import GenerationDefaults, PositionSpec, PromptSpec, VisionSpec
from ..documents import token_id
from ..family import FamilySpec, Json, ManifestParts, RoleSpec, RowBlocks, TensorRef
from ..fields import read_field, read_size
from ..image_processor import image_processor, smart_resize_spec
from ..layers import DecoderConfig, frequencies
from ..roles import decoder_role, embedding_role, language_roles
from ..text_config import TINY_TEXT, cache_spec, check_activation, read_decoder
from .qwen2_5_vl import PROTECTED
from .qwen2_vl import INDEX_INPUTS, VisionConfig, vision_roles
from .qwen2_vl import vision_config as tower_config

__all__ = ["FAMILY", "TEMPLATE"]

MODEL_TYPE = "pointsv1.5_chat"
ARCHITECTURE = "POINTSV15ChatModel"
END_OF_TURN = "<|im_end|>"
TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role not in ('user', 'assistant') %}
        {{- raise_exception('this model has no ' + message.role + ' turn; put its text into a user message') }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {{- part.text if part.type == 'text' else '<|vision_start|><|image_pad|><|vision_end|>\\n' }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt and messages[-1].role == 'user' %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


# Configuration


def matches(config: Json) -> bool:
    """By model_type, or where the file has none (published ones do not) by the class that upstream loads it with."""
    if "model_type" in config:
        return config["model_type"] == MODEL_TYPE
    return ARCHITECTURE in (config.get("architectures") or ())


@dataclass(frozen=True)
class Layout:
    """How a checkpoint says what its decoder is, and where its tensors are."""

    decoder: Callable[[Json], DecoderConfig]
    text_roles: Callable[[Json], dict[str, RoleSpec]]
    small_sides_any_ratio: bool  # of the image processor that upstream's own example uses
    max_length: int  # tokens, where the file does not say


def layout(config: Json) -> Layout:
    """By llm_config.model_type, or where that is missing by a field that only one of the two has."""
    guess = "custom_llama" if "ffn_hidden_size" in read_field(config, "llm_config", dict) else "qwen2"
    name = read_field(config, "llm_config.model_type", str, guess)
    layouts = {
        "custom_llama": Layout(fused_decoder_config, fused_text_roles, small_sides_any_ratio=True, max_length=4096),
        "qwen2": Layout(plain_decoder_config, plain_text_roles, small_sides_any_ratio=False, max_length=32768),
    }
    if name not in layouts:
        raise CheckpointError(
            f"config.json: llm_config.model_type is {name!r}; only {' and '.join(layouts)} are supported"
        )
    return layouts[name]


def plain_decoder_config(config: Json) -> DecoderConfig:
    return read_decoder(config, qkv_bias=True, num_axes=1, default_theta=10000.0, at="llm_config.")


def fused_decoder_config(config: Json) -> DecoderConfig:
    """What the file leaves out is as upstream's config class has it, whose defaults are not those of any checkpoint."""
    at = "llm_config."
    check_activation(config, f"{at}hidden_act", "swiglu")
    norm_type = read_field(config, f"{at}norm_type", str, "layer_norm")
    if config["llm_config"].get("rms_norm") is not None:
        norm_type = "rms_norm" if read_field(config, f"{at}rms_norm", bool) else "layer_norm"
    plain = {"norm_type": "rms_norm", "rotary_pct": 1.0, "sliding_window_size": -1, "share_kv_num_layers": 1}
    llm = config["llm_config"]
    for name, wanted in plain.items():
        found = norm_type if name == "norm_type" else llm.get(name)
        if found not in (None, wanted):
            raise CheckpointError(f"config.json: {at}{name} is {found!r}; only {wanted!r} is supported")
    num_heads, width = (read_size(config, f"{at}{name}") for name in ("num_attention_heads", "hidden_size"))
    if width % num_heads:
        raise CheckpointError(f"config.json: {at}hidden_size {width} is no multiple of {num_heads} heads")
    head_dim = width // num_heads
    compress = read_field(config, f"{at}rotary_compress", float, 1.0)  # of positions
    inverse = frequencies(head_dim, read_field(config, f"{at}rotary_emb_base", float, 10000.0))
    return DecoderConfig(
        width=width,
        inner=read_size(config, f"{at}ffn_hidden_size"),
        num_layers=read_size(config, f"{at}num_{'layers' if 'num_layers' in llm else 'hidden_layers'}"),
        num_heads=num_heads,
        num_kv_heads=read_size(config, f"{at}num_kv_heads"),
        head_dim=head_dim,
        vocab_size=read_size(config, f"{at}vocab_size"),
        norm_eps=read_field(config, f"{at}layernorm_epsilon", float, 1e-5),
        inverse_frequencies=tuple(compress * value for value in inverse),
        rope_sections=(head_dim // 2,),
        qkv_bias=read_field(config, f"{at}qkv_proj_bias", bool, True),
        output_bias=read_field(config, f"{at}out_proj_bias", bool, True),
        up_bias=read_field(config, f"{at}mlp_fc1_bias", bool, True),
        down_bias=read_field(config, f"{at}mlp_fc2_bias", bool, True),
    )


def is_tied(config: Json) -> bool:
    """Of the decoder alone: the same field beside it and in vision_config is a dump of defaults."""
    return read_field(config, "llm_config.tie_word_embeddings", bool, False)


def vision_config(config: Json) -> VisionConfig:
    """The tower of the sibling. Its own `hidden_size` is that of a merger that is not used."""
    tower = {"hidden_size": 1, **read_field(config, "vision_config", dict)}
    return replace(tower_config({"vision_config": tower}), out_width=layout(config).decoder(config).width)


# Roles


def roles(config: Json) -> dict[str, RoleSpec]:
    vision = vision_roles(vision_config(config), tower="vision_encoder.", merger="vision_projector.")
    return {**vision, **layout(config).text_roles(config)}


def plain_text_roles(config: Json) -> dict[str, RoleSpec]:
    return language_roles(plain_decoder_config(config), "llm.model.", tied=is_tied(config), head="llm.lm_head.weight")


def fused_text_roles(config: Json) -> dict[str, RoleSpec]:
    decoder = fused_decoder_config(config)
    table, tied = "llm.lm.embed_in.weight", is_tied(config)

    def tensor(parameter: str, shape: tuple[int, ...]) -> TensorRef:
        if parameter == "lm_head.weight":
            return TensorRef(table if tied else "llm.embed_out.weight", shape)
        if parameter == "norm.weight":
            return TensorRef("llm.lm.final_layer_norm.weight", shape)
        layer, module, kind = parameter.rsplit(".", 2) if "proj" in parameter else (parameter, "", "")
        if not module:
            return TensorRef(f"llm.lm.{parameter}", shape)
        name, num_rows, rows = fused_tensors(decoder)[module]
        layer = layer.replace(".self_attn", ".attention")
        return TensorRef(f"llm.lm.{layer}.{name}.{kind}", (num_rows, *shape[1:]), rows)

    return {
        "embed_tokens": embedding_role(decoder.vocab_size, decoder.width, lambda _, shape: TensorRef(table, shape)),
        "decoder": decoder_role(decoder, tensor),
    }


def fused_tensors(decoder: DecoderConfig) -> dict[str, tuple[str, int, RowBlocks | None]]:
    """Module -> the one that holds it, its number of rows, and which of them are this module's.

    Keys and values lie a head after the other in turns; with as many heads as queries, so do all three. Of the two
    halves before the activation the first is up and the second gate: upstream computes first * silu(second).
    """
    head, inner, width = decoder.head_dim, decoder.inner, decoder.width
    held: dict[str, tuple[str, int, RowBlocks | None]] = {
        "o_proj": ("dense", width, None),
        "up_proj": ("dense_h_to_4h", 2 * inner, RowBlocks(0, inner, 2 * inner)),
        "gate_proj": ("dense_h_to_4h", 2 * inner, RowBlocks(inner, inner, 2 * inner)),
        "down_proj": ("dense_4h_to_h", width, None),
    }
    if decoder.num_kv_heads < decoder.num_heads:
        held["q_proj"] = ("query_dense", width, None)
        fused, turns = "key_value_dense", ("k_proj", "v_proj")
    else:
        fused, turns = "query_key_value", ("q_proj", "k_proj", "v_proj")
    num_rows, stride = len(turns) * decoder.num_kv_heads * head, len(turns) * head
    for place, module in enumerate(turns):
        held[module] = (fused, num_rows, RowBlocks(place * head, head, stride))
    return held


def unused(config: Json, name: str) -> bool:
    """The tower's own merger, a head saved beside tied embeddings, and frequency tables that can be computed."""
    head = name in ("llm.embed_out.weight", "llm.lm_head.weight")
    return name.startswith("vision_encoder.merger.") or name.endswith(".inv_freq") or (head and is_tied(config))


# Manifest


def manifest(config: Json, documents: Mapping[str, Json]) -> ManifestParts:
    geometry, own = vision_config(config).geometry, layout(config)
    decoder = own.decoder(config)
    return ManifestParts(
        image=replace(
            smart_resize_spec(image_processor(documents), geometry),
            strategy="shrink_then_smart_resize",
            small_sides_any_ratio=own.small_sides_any_ratio,
        ),
        vision=VisionSpec(inputs=INDEX_INPUTS, merge_size=geometry.merge_size, window_blocks=0),
        prompt=PromptSpec(
            image_placeholder="<|image_pad|>",
            video_placeholder="<|video_pad|>",
            protected_tokens=PROTECTED,
            template_options={"add_generation_prompt": True},
        ),
        positions=PositionSpec(strategy="sequential"),
        cache=cache_spec(decoder, read_size(config, "llm_config.max_position_embeddings", own.max_length)),
        generation=GenerationDefaults((token_id(documents, END_OF_TURN),), penalty_sees_prompt=False),
        template=TEMPLATE,
    )


TINY_CONFIG: Json = {
    "architectures": [ARCHITECTURE],
    "llm_config": {
        "model_type": "qwen2",
        **TINY_TEXT,
    },
    "vision_config": {
        "depth": 2,
        "embed_dim": 48,
        "hidden_act": "quick_gelu",
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
    matches=matches,
    roles=roles,
    manifest=manifest,
    normalise=lambda name: name,
    unused=unused,
    tiny_config=TINY_CONFIG,
    remote="_pointsv1_5_chat_remote",
)
