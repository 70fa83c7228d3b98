"""EVEv2 (arXiv 2502.06788): no vision encoder. Two convolutions make rows of patches, and the layers of a Qwen2.5
decoder hold a second set of weights for them.

An image is a class row, then its cells row by row with a split row at the end of each; all of them count as visual.
The strides of the convolutions are in the image processor's file, and the vocabulary that counts is the tokenizer's, so
both files belong to the configuration here.

Dims: D decoder width, E width between the convolutions, V vocabulary.
Checked against github.com/baaivision/EVE, folder EVEv2, at cc63ec7; tensor names are its own.
"""

from collections.abc import Mapping
from dataclasses import replace

from ...runtime.errors import CheckpointError
from ...runtime.manifest import PositionSpec, PromptSpec, VisionSpec
from ..documents import generation_defaults, token_id
from ..encoder_free_roles import patch_embed_role, routed_decoder_role
from ..family import FamilySpec, Json, ManifestParts, RoleSpec, RowBlocks, TensorRef
from ..fields import read_field, read_size
from ..image_processor import PatchGeometry, fixed_area_spec, image_processor
from ..layers import DecoderConfig
from ..layers.routed import RoutedParts
from ..roles import decoder_role, embedding_role
from ..text_config import TINY_TEXT, cache_spec, is_tied, read_decoder

__all__ = ["FAMILY", "TEMPLATE"]

MODEL_TYPE = "eve-qwen2"
PREPROCESSOR = "preprocessor_config.json"
PLACEHOLDER, PLACEHOLDER_ID = "<image>", -200
END_OF_TURN = "<|im_end|>"
SECOND_SET = "moe_"  # of names
# Upstream's conversation "qwen2"; its system text is a field, so a system message takes its place.
TEMPLATE = """\
{%- macro text(content) %}
    {%- if content is string %}
        {{- content }}
    {%- else %}
        {%- for part in content %}
            {{- part.text if part.type == 'text' else '<image>\\n' }}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- set turns = messages %}
{%- if messages and messages[0].role == 'system' %}
    {%- set turns = messages[1:] %}
    {{- text(messages[0].content) }}
{%- else %}
    {{- "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, " }}
    {{- "detailed, and polite answers to the user's questions." }}
{%- endif %}
{{- ' ' }}
{%- for message in turns %}
    {%- if message.role not in ('user', 'assistant') %}
        {{- raise_exception('this model has no ' + message.role + ' turn here; a system message goes first') }}
    {%- endif %}
    {%- set said = text(message.content) %}
    {{- 'USER:' if message.role == 'user' else 'ASSISTANT:' }}
    {%- if said %}
        {{- ' ' + said + (' ' if message.role == 'user' else '<|im_end|>') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'ASSISTANT:' }}
{%- endif %}
"""


# Configuration


def completed(config: Json, documents: Mapping[str, Json]) -> Json:
    """config.json with the image processor's settings and the number of tokens that the tokenizer has."""
    if "image_processor" in config:
        return config
    return {
        **config,
        "image_processor": tower_processor(config, documents),
        "num_tokens": num_tokens(documents.get("tokenizer.json", {})),
    }


def tower_processor(config: Json, documents: Mapping[str, Json]) -> Json:
    """The processor's file in the folder that mm_vision_tower names, as upstream has it, or else beside config.json."""
    own = documents.get(f"{read_field(config, 'mm_vision_tower', str)}/{PREPROCESSOR}")
    return own or image_processor(documents)


def num_tokens(tokenizer: Json) -> int | None:
    """len(tokenizer) of transformers; None where there is no tokenizer.json."""
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict) or not isinstance(added, list):
        return None
    return len({*vocabulary, *(token.get("content") for token in added if isinstance(token, dict))})


def geometry_of(config: Json) -> PatchGeometry:
    said = {"image_processor": read_field(config, "image_processor", dict, {})}
    sizes = [read_size(said["image_processor"], name, file=PREPROCESSOR) for name in ("patch_stride", "dense_stride")]
    return PatchGeometry(channels=3, patch_size=sizes[0], merge_size=sizes[1], num_frames=1)


def decoder_config(config: Json) -> DecoderConfig:
    """The decoder. Upstream cuts the vocabulary to the tokenizer's when it loads a checkpoint."""
    decoder = read_decoder(config, qkv_bias=True, num_axes=1, default_theta=10000.0, at="")
    tokens = read_size(config, "num_tokens", decoder.vocab_size)
    if tokens > decoder.vocab_size:
        raise CheckpointError(
            f"tokenizer.json: has {tokens} tokens, config.json: vocab_size is {decoder.vocab_size}; the rows of the "
            "others would be random, copy both files from one checkpoint"
        )
    return replace(decoder, vocab_size=tokens)


def parts_of(config: Json) -> RoutedParts:
    """What there are two of. Upstream looks for three words in one text."""
    said = read_field(config, "moe_part", str, "") if read_field(config, "add_moe", bool, False) else ""
    return RoutedParts(norms="layernorm" in said, attention="self_attn" in said, mlp="mlp" in said)


# Roles


def roles(config: Json) -> dict[str, RoleSpec]:
    geometry, decoder, parts = geometry_of(config), decoder_config(config), parts_of(config)
    inner, stored_vocab = read_size(config, "mm_hidden_size"), read_size(config, "vocab_size")

    def patch_tensor(parameter: str, shape: tuple[int, ...]) -> TensorRef:
        module, _, kind = parameter.partition(".")
        if not kind:
            return TensorRef(f"model.vision_tower.{module}", shape)
        number, sides = (0, geometry.kernel[-2:]) if module == "patches" else (2, (geometry.merge_size,) * 2)
        channels = geometry.channels if module == "patches" else inner
        kernel = (shape[0], channels, *sides) if kind == "weight" else shape
        return TensorRef(f"model.vision_tower.patch_embedding.{number}.{kind}", kernel)

    def vocabulary(name: str, shape: tuple[int, ...]) -> TensorRef:
        rows = RowBlocks(0, shape[0], stored_vocab) if shape[0] < stored_vocab else None
        return TensorRef(name, (stored_vocab, *shape[1:]), rows)

    head = "model.embed_tokens.weight" if is_tied(config) else "lm_head.weight"

    def text_tensor(parameter: str, shape: tuple[int, ...]) -> TensorRef:
        if parameter == "lm_head.weight":
            return vocabulary(head, shape)
        return TensorRef(f"model.{parameter.replace('visual_', SECOND_SET)}", shape)

    decoder_graph = decoder_role(decoder, text_tensor)
    if parts.norms or parts.attention or parts.mlp:
        decoder_graph = routed_decoder_role(decoder, parts, text_tensor)
    return {
        "patch_embed": patch_embed_role(geometry, inner, decoder.width, patch_tensor),
        "embed_tokens": embedding_role(
            decoder.vocab_size, decoder.width, lambda _, shape: vocabulary("model.embed_tokens.weight", shape)
        ),
        "decoder": decoder_graph,
    }


def unused(config: Json, name: str) -> bool:
    """A head saved beside tied embeddings, and frequency tables that can be computed."""
    return name.endswith(".inv_freq") or (name == "lm_head.weight" and is_tied(config))


# Manifest


def manifest(config: Json, documents: Mapping[str, Json]) -> ManifestParts:
    config = completed(config, documents)
    geometry, decoder = geometry_of(config), decoder_config(config)
    limit = config.get("tokenizer_model_max_length")
    generation = generation_defaults(documents.get("generation_config.json", {}), config.get("eos_token_id"))
    end = token_id(documents, END_OF_TURN)  # upstream stops at its text too
    return ManifestParts(
        image=fixed_area_spec(
            config["image_processor"], patch_size=geometry.patch_size, merge_size=geometry.merge_size
        ),
        vision=VisionSpec(
            inputs=("image_rows",), merge_size=geometry.merge_size, window_blocks=0, first_rows=1, row_ends=1
        ),
        prompt=PromptSpec(
            image_placeholder=PLACEHOLDER,
            video_placeholder=PLACEHOLDER,
            protected_tokens=(PLACEHOLDER,),
            template_options={"add_generation_prompt": True},
            image_placeholder_id=PLACEHOLDER_ID,
            video_placeholder_id=PLACEHOLDER_ID,
            max_tokens=None if limit is None else read_size(config, "tokenizer_model_max_length"),
        ),
        positions=PositionSpec(strategy="sequential"),
        cache=cache_spec(decoder, read_size(config, "max_position_embeddings", 32768)),
        generation=replace(generation, eos_token_ids=tuple(dict.fromkeys((*generation.eos_token_ids, end)))),
        template=TEMPLATE,
    )


TINY_CONFIG: Json = {
    "model_type": MODEL_TYPE,
    "add_moe": True,
    "moe_part": "layernorm-self_attn-mlp",
    **TINY_TEXT,
    "eos_token_id": 2,
    "mm_hidden_size": 48,
    "mm_vision_tower": "tower",
    "image_processor": {
        "do_resize": False,
        "do_center_crop": False,
        "max_size": 128,
        "patch_stride": 16,
        "dense_stride": 2,
    },
}

FAMILY = FamilySpec(
    name=MODEL_TYPE,
    matches=lambda config: config.get("model_type") == MODEL_TYPE,
    roles=roles,
    manifest=manifest,
    normalise=lambda name: name,
    unused=unused,
    tiny_config=TINY_CONFIG,
    completed=completed,
)
