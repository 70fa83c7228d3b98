"""LLaVA-1.5 (arXiv 2310.03744): a CLIP or SigLIP tower on squares, a two-layer MLP, a Llama, Mistral or Qwen2 decoder.

Checkpoints come in two forms. "llava" is transformers' own (llava-hf): the file says the tower, the processor and the
prompt. "llava_llama" is that of the first release: the decoder's fields at the top level, the tower by its name alone
and its weights in the file only where it was tuned; images are padded to squares where `image_aspect_ratio` says so,
and an image is no token of the prompt.

Dims: N patches of all images, C tower width, K layers that features are taken from, D decoder width.
Checked against transformers 5.23 (LlavaForConditionalGeneration, LlavaProcessor); the first release by its
specification.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn

from ...runtime.errors import CheckpointError
from ...runtime.manifest import ImageSpec, PositionSpec, PromptSpec, VisionSpec
from ..documents import generation_defaults, leading_tokens, special_tokens
from ..family import FamilySpec, Json, ManifestParts, Port, RoleSpec, TensorRef
from ..fields import read_field, read_fields, read_size
from ..image_processor import image_processor, square_spec
from ..layers import DecoderConfig, Linear
from ..layers.clip import TowerConfig
from ..roles import language_roles
from ..text_config import cache_spec, check_activation, eos_token_ids, is_tied, read_decoder
from ..tower import read_tower, tower_role, tower_unused

__all__ = ["CLIP_LARGE", "FAMILY", "TEMPLATE", "image_size", "is_first_form", "known_tower", "normalise", "text_part"]

MODEL_TYPE = "llava"
FIRST_MODEL_TYPE = "llava_llama"
TOWER, PROJECTOR, DECODER = "model.vision_tower.", "model.multi_modal_projector.", "model.language_model."
IMAGE_ID = -200  # of the first release, whose placeholder is no token
# What transformers' config classes have where text_config leaves a field out; the size of the vocabulary it must say.
LLAMA: Json = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 2,
}
DECODERS: Mapping[str, Json] = {
    "llama": LLAMA,
    "mistral": {
        **LLAMA,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": {
        **LLAMA,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
        "eos_token_id": None,
        "attention_bias": True,
    },
}
# Towers that checkpoints of the first release name; their own configs are not in the checkpoint.
CLIP_LARGE: Json = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
KNOWN_TOWERS: Mapping[str, Json] = {
    "clip-vit-large-patch14-336": CLIP_LARGE,
    "clip-vit-large-patch14": {**CLIP_LARGE, "image_size": 224},
}
TEMPLATE = """\
{%- if messages[0].role == 'system' %}
    {{- messages[0].content }}
{%- else %}
    {{- "A chat between a curious user and an artificial intelligence assistant. " }}
    {{- "The assistant gives helpful, detailed, and polite answers to the user's questions." }}
{%- endif %}
{{- ' ' }}
{%- for message in messages if message.role != 'system' %}
    {{- 'USER: ' if message.role == 'user' else 'ASSISTANT: ' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {{- part.text if part.type == 'text' else '<image>\\n' }}
        {%- endfor %}
    {%- endif %}
    {{- ' ' if message.role == 'user' else '</s>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'ASSISTANT:' }}
{%- endif %}
"""


# Configuration


def is_first_form(config: Json) -> bool:
    """By a field, for the first checkpoints had the model_type that transformers took later."""
    return "mm_vision_tower" in config


def tower_config(config: Json) -> TowerConfig:
    return _first_tower(config) if is_first_form(config) else _own_tower(config)


def _own_tower(config: Json) -> TowerConfig:
    check_activation(config, "projector_hidden_act", "gelu")
    strategy = read_field(config, "vision_feature_select_strategy", str, "default")
    if strategy not in ("default", "full"):
        raise CheckpointError(f"config.json: vision_feature_select_strategy is {strategy!r}; give 'default' or 'full'")
    kind = read_field(config, "vision_config.model_type", str, "clip_vision_model")
    if kind not in ("clip_vision_model", "siglip_vision_model"):
        raise CheckpointError(f"config.json: vision_config.model_type is {kind!r}; only CLIP and SigLIP are supported")
    is_clip = kind == "clip_vision_model"
    if not is_clip and strategy == "default":
        raise CheckpointError(
            "config.json: vision_feature_select_strategy 'default' drops a class token, which a SigLIP tower has not; "
            "set it to 'full'"
        )
    return read_tower(
        config,
        is_clip=is_clip,
        select_layer=_feature_layers(config, "vision_feature_layer"),
        keeps_class_token=is_clip and strategy == "full",
    )


def _first_tower(config: Json) -> TowerConfig:
    wanted: dict[str, tuple[object, ...]] = {
        "mm_projector_type": ("mlp2x_gelu",),
        "image_aspect_ratio": ("pad", "square", None),
        "mm_use_im_start_end": (False, None),
        "tune_mm_mlp_adapter": (False, None),
    }
    for name, known in wanted.items():
        if config.get(name) not in known:
            raise CheckpointError(f"config.json: {name} is {config.get(name)!r}; only {known[0]!r} is supported")
    feature = read_field(config, "mm_vision_select_feature", str, "patch")
    if feature not in ("patch", "cls_patch"):
        raise CheckpointError(f"config.json: mm_vision_select_feature is {feature!r}; give 'patch' or 'cls_patch'")
    return read_tower(
        {"vision_config": known_tower(config)},
        is_clip=True,
        select_layer=_feature_layers(config, "mm_vision_select_layer"),
        keeps_class_token=feature == "cls_patch",
    )


def known_tower(config: Json) -> Json:
    """The config of a tower that the file only names, unless it has one of its own as vision_config."""
    name = read_field(config, "mm_vision_tower", str)
    own = config.get("vision_config")
    if isinstance(own, dict):
        return own
    if name.rsplit("/", 1)[-1] not in KNOWN_TOWERS:
        raise CheckpointError(
            f"config.json: mm_vision_tower is {name!r}; known towers are {', '.join(KNOWN_TOWERS)}. Add the "
            "tower's own config as vision_config"
        )
    return KNOWN_TOWERS[name.rsplit("/", 1)[-1]]


def image_size(config: Json) -> int:
    """Pixels a side of what the tower takes."""
    said = {"vision_config": known_tower(config)} if is_first_form(config) else config
    return read_size(said, "vision_config.image_size", 224)


def _feature_layers(config: Json, name: str) -> int | tuple[int, ...]:
    """A number or a list, as transformers' hidden_states are counted: 0 is the embeddings, -1 the last layer."""
    value = config.get(name, -2)
    if isinstance(value, list):
        return read_fields(config, name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise CheckpointError(f"config.json: {name} is {value!r}, expected a layer's number or a list of them")
    return value


def text_part(config: Json) -> Json:
    """config.json whose text_config has every field: that of the file, with transformers' defaults."""
    own = config if is_first_form(config) else read_field(config, "text_config", dict)
    kind = "llama" if is_first_form(config) else read_field(config, "text_config.model_type", str, "llama")
    if kind not in DECODERS:
        raise CheckpointError(f"config.json: text_config.model_type is {kind!r}; known are {', '.join(DECODERS)}")
    said = {**DECODERS[kind], **{name: value for name, value in own.items() if value is not None}}
    if kind == "mistral" and "sliding_window" in own and own["sliding_window"] is None:
        del said["sliding_window"]  # null is no window; without the field upstream has one
    said.setdefault("num_key_value_heads", said["num_attention_heads"])
    return {"text_config": said, "tie_word_embeddings": is_tied(config)}


def decoder_config(config: Json) -> DecoderConfig:
    said = text_part(config)
    bias = read_field(said, "text_config.attention_bias", bool, False)
    decoder = read_decoder(said, qkv_bias=bias, num_axes=1, default_theta=10000.0, at="text_config.")
    mlp_bias = read_field(said, "text_config.mlp_bias", bool, False)
    is_llama = said["text_config"].get("model_type", "llama") != "qwen2"  # whose output has never a bias
    return replace(decoder, output_bias=bias and is_llama, up_bias=mlp_bias, down_bias=mlp_bias)


def max_length(config: Json) -> int:
    """Tokens of the longest sequence; within a sliding window, all tokens see all that came before."""
    said = text_part(config)
    longest = read_size(said, "text_config.max_position_embeddings")
    if said["text_config"].get("model_type") != "mistral":
        return longest
    return min(longest, read_size(said, "text_config.sliding_window", longest))


# Modules


class Projector(nn.Module):
    """features [N, C * K] -> rows that replace placeholders [N, D]."""

    def __init__(self, width: int, out_width: int, *, bias: bool) -> None:
        super().__init__()
        self.linear_1 = Linear(width, out_width, bias=bias)
        self.linear_2 = Linear(out_width, out_width, bias=bias)

    def forward(self, vision_features: torch.Tensor) -> torch.Tensor:
        x = vision_features.to(self.linear_1.weight.dtype)
        return self.linear_2(nn.functional.gelu(self.linear_1(x))).to(torch.float32)


# Roles


def roles(config: Json) -> dict[str, RoleSpec]:
    tower, decoder = tower_config(config), decoder_config(config)
    vision = tower_role(tower, TOWER)
    rows = vision.outputs[0].shape[0]
    bias = read_field(config, "multimodal_projector_bias", bool, True)
    return {
        "vision_encoder": replace(vision, tensor=_with_hint(vision.tensor, config)),
        "projector": RoleSpec(
            build=lambda: Projector(tower.feature_width, decoder.width, bias=bias),
            inputs=(Port("vision_features", "float32", (rows, tower.feature_width)),),
            outputs=(Port("image_features", "float32", (rows, decoder.width)),),
            tensor=lambda parameter, shape: TensorRef(f"{PROJECTOR}{parameter}", shape),
        ),
        **language_roles(decoder, DECODER, tied=is_tied(config)),
    }


def _with_hint(
    tensor: Callable[[str, tuple[int, ...]], TensorRef], config: Json
) -> Callable[[str, tuple[int, ...]], TensorRef]:
    """Tensors of a tower that checkpoints of the first release may leave to a second download."""
    if not is_first_form(config):
        return tensor
    name = config["mm_vision_tower"]
    hint = (
        f"the vision tower {name} is not in the checkpoint; copy its tensors vision_model.* into it as "
        "model.vision_tower.vision_tower.vision_model.*, or take the checkpoint in the form of transformers (llava-hf)"
    )
    return lambda parameter, shape: replace(tensor(parameter, shape), hint=hint)


def normalise(name: str) -> str:
    """Four layouts: transformers 4 (decoder and tower at the top), 4.52 on (below model.), 5, the first release."""
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    name = re.sub(r"^language_model\.(model\.)?", DECODER, name)
    name = re.sub(r"^(vision_tower|multi_modal_projector)\.", r"model.\1.", name)
    name = re.sub(r"^model\.vision_tower\.(vision_tower\.)?(vision_model\.)?", TOWER, name)
    name = re.sub(r"^model\.(embed_tokens|layers|norm)\.", rf"{DECODER}\1.", name)
    return re.sub(r"^model\.mm_projector\.([02])\.", lambda at: f"{PROJECTOR}linear_{int(at[1]) // 2 + 1}.", name)


def unused(config: Json, name: str) -> bool:
    """What is behind the layer that features are taken from, a head beside tied embeddings, tables."""
    if name.startswith(TOWER):
        return tower_unused(tower_config(config), name.removeprefix(TOWER))
    return (name == "lm_head.weight" and is_tied(config)) or name.endswith(".rotary_emb.inv_freq")


# Manifest


def manifest(config: Json, documents: Mapping[str, Json]) -> ManifestParts:
    tower, decoder, first = tower_config(config), decoder_config(config), is_first_form(config)
    generation = documents.get("generation_config.json", {})
    return ManifestParts(
        image=image_spec(config, documents),
        vision=VisionSpec(inputs=(), merge_size=1, window_blocks=0, first_rows=int(tower.keeps_class_token)),
        prompt=PromptSpec(
            image_placeholder="<image>" if first else image_token(config, documents),
            video_placeholder="<image>" if first else image_token(config, documents),
            protected_tokens=("<image>", *special_tokens(documents)) if first else special_tokens(documents),
            template_options={"add_generation_prompt": True},
            image_placeholder_id=IMAGE_ID if first else None,
            video_placeholder_id=IMAGE_ID if first else None,
            leading_tokens=leading_tokens(documents),
        ),
        positions=PositionSpec(strategy="sequential"),
        cache=cache_spec(decoder, max_length(config)),
        # The first release generates from embeddings, so that a penalty sees the answer alone.
        generation=generation_defaults(generation, eos_token_ids(text_part(config)), penalty_sees_prompt=not first),
        template=TEMPLATE if first else None,
    )


def image_spec(config: Json, documents: Mapping[str, Json]) -> ImageSpec:
    """The processor's own settings. Those of the first release are its tower's, where the file is not there."""
    side, patch = image_size(config), tower_config(config).patch_size
    if not is_first_form(config):
        processor = {name: value for name, value in image_processor(documents).items() if value is not None}
        # Other classes obey do_pad by filling up a batch, whose images are of one size here.
        own_class = str(processor.get("image_processor_type", "")).startswith("LlavaImageProcessor")
        return square_spec(processor, side, patch, pads=own_class and read_field(processor, "do_pad", bool, False))
    published: Json = {"size": side, "crop_size": side}
    own = documents.get("preprocessor_config.json", published)
    return square_spec(own, side, patch, pads=config.get("image_aspect_ratio") == "pad")


def image_token(config: Json, documents: Mapping[str, Json]) -> str:
    """The text of the token that stands for a row of an image. Raises CheckpointError where the tokenizer has none."""
    number = read_field(config, "image_token_index", int, read_field(config, "image_token_id", int, 32000))
    added = documents.get("tokenizer.json", {}).get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and token.get("id") == number:
            return str(token.get("content"))
    raise CheckpointError(
        f"config.json: image_token_index is {number}, which is no added token of tokenizer.json; copy both from the "
        "checkpoint that this one was tuned from"
    )


TINY_CONFIG: Json = {
    "model_type": MODEL_TYPE,
    "architectures": ["LlavaForConditionalGeneration"],
    "image_token_index": 500,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "text_config": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": 512,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 1024,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 48,
        "image_size": 28,
        "intermediate_size": 80,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "patch_size": 14,
    },
}

FAMILY = FamilySpec(
    name=MODEL_TYPE,
    matches=lambda config: config.get("model_type") in (MODEL_TYPE, FIRST_MODEL_TYPE),
    roles=roles,
    manifest=manifest,
    normalise=normalise,
    unused=unused,
    tiny_config=TINY_CONFIG,
    reference="_llava_reference",
)
