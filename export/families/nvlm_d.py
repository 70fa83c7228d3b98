"""NVLM-D (arXiv 2409.11402): InternViT-6B on tiles, a pixel shuffle and a two-layer MLP, a Qwen2 decoder.

An image is a grid of up to six tiles and the whole of it; the prompt names each in plain text (<tile_1>, ...). Upstream
added seven heads to the tower's 25, and their weights are in the checkpoint: they are computed, but not counted by the
norm of query and key.

There are no golden cases of this family. The tower is checked against transformers' InternVL, and the rest against
upstream's formulas; what upstream is was read from vLLM's port of it.

Dims: N patches of all tiles, C tower width, D decoder width.
"""

from collections.abc import Mapping
from dataclasses import replace

from ...runtime.errors import CheckpointError
from ...runtime.manifest import ImageSpec, PositionSpec, PromptSpec, RatioTileSpec, TileTags, VisionSpec
from ..documents import generation_defaults, special_tokens, token_id
from ..family import FamilySpec, Json, ManifestParts, Port, RoleSpec, TensorRef
from ..fields import read_field, read_size
from ..layers import DecoderConfig
from ..layers.clip import TowerConfig
from ..layers.internvit import InternVisionTower, ShuffleProjector
from ..roles import language_roles, projector_role
from ..text_config import TINY_TEXT, cache_spec, read_decoder
from ..tower import read_tower, tower_unused

__all__ = ["FAMILY"]

MODEL_TYPE = "NVLM_D"
TOWER, DECODER, HEAD = "vision_model.", "language_model.model.", "language_model.lm_head.weight"
NUM_ADDED_HEADS = 7  # of each layer of the tower: a constant of upstream's code
BLOCK_SIDE = 2  # patches a side that become one token
FILLER, PLACEHOLDER, END_OF_TURN = "<|vision_pad|>", "<image>", "<|im_end|>"
NO_ID = -1  # of the placeholder, which is no token: tiles are spelled out before the text is encoded
# Of upstream's InternVisionConfig, for what a file leaves out.
VISION_DEFAULTS: Json = {
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}


# Configuration


def tower_config(config: Json) -> TowerConfig:
    wanted: dict[str, object] = {"qk_normalization": True, "qkv_bias": False, "norm_type": "rms_norm"}
    own = read_field(config, "vision_config", dict)
    for name, value in wanted.items():
        if (found := own.get(name, value)) != value:
            raise CheckpointError(f"config.json: vision_config.{name} is {found!r}; only {value!r} is supported")
    tower = read_tower(
        {"vision_config": {**VISION_DEFAULTS, **own}},
        is_clip=True,  # in that it has a class token
        select_layer=select_layer(config),
    )
    if tower.side % BLOCK_SIDE:
        raise CheckpointError(
            f"config.json: vision_config.image_size has {tower.side} patches a side; give an even one"
        )
    return tower


def select_layer(config: Json) -> int:
    """As an index of transformers' hidden_states: 0 is the embeddings, -1 the last layer."""
    layer = config.get("select_layer", -1)
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise CheckpointError(f"config.json: select_layer is {layer!r}, expected a layer's number")
    return layer


def decoder_config(config: Json) -> DecoderConfig:
    return read_decoder(config, qkv_bias=True, num_axes=1, default_theta=10000.0, at="llm_config.")


def is_tied(config: Json) -> bool:
    return read_field(config, "llm_config.tie_word_embeddings", bool, False)


def tile_spec(config: Json) -> RatioTileSpec:
    """How images are cut. Raises CheckpointError for what upstream's chat() does not do either, or does otherwise."""
    wanted: dict[str, object] = {
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "ps_version": "v2",
        "downsample_ratio": 1 / BLOCK_SIDE,
    }
    for name, value in wanted.items():
        if (found := config.get(name, value)) != value:
            raise CheckpointError(f"config.json: {name} is {found!r}; only {value!r} is supported")
    side = read_size({**VISION_DEFAULTS, **read_field(config, "vision_config", dict)}, "image_size")
    if (forced := read_size(config, "force_image_size", side)) != side:
        raise CheckpointError(
            f"config.json: force_image_size is {forced}, vision_config.image_size {side}; resized positions are not "
            "supported, so make both the same"
        )
    low, high = read_size(config, "min_dynamic_patch", 1), read_size(config, "max_dynamic_patch", 6)
    if low > high:
        raise CheckpointError(f"config.json: min_dynamic_patch {low} is over max_dynamic_patch {high}; lower it")
    return RatioTileSpec(side, low, high)


# Roles


def roles(config: Json) -> dict[str, RoleSpec]:
    tower, decoder = tower_config(config), decoder_config(config)
    patches = {"num_patches": tower.num_patches}

    def tensor(parameter: str, shape: tuple[int, ...]) -> TensorRef:
        stored = {
            "embeddings.patch_embedding.weight": (tower.width, *tower.kernel),
            "embeddings.position_embedding": (1, *shape),
            "embeddings.class_embedding": (1, 1, *shape),
        }
        return TensorRef(f"{TOWER}{parameter}", stored.get(parameter, shape))

    projector = projector_role(
        lambda: ShuffleProjector(tower.width, tower.side, BLOCK_SIDE, decoder.inner, decoder.width),
        tower.width,
        decoder.width,
        "",
    )
    return {
        "vision_encoder": RoleSpec(
            build=lambda: InternVisionTower(tower, NUM_ADDED_HEADS),
            inputs=(Port("pixel_values", "float32", ("num_patches", tower.patch_dim)),),
            outputs=(Port("vision_features", "float32", ("num_patches", tower.width)),),
            tensor=tensor,
            multiples=patches,
        ),
        "projector": replace(projector, multiples=patches),
        **language_roles(decoder, DECODER, tied=is_tied(config), head=HEAD),
    }


def unused(config: Json, name: str) -> bool:
    """What is behind the layer that features are taken from, a head beside tied embeddings, tables."""
    if name.startswith(TOWER):
        return tower_unused(tower_config(config), name.removeprefix(TOWER))
    return (name == HEAD and is_tied(config)) or name.endswith(".rotary_emb.inv_freq")


# Manifest


def manifest(config: Json, documents: Mapping[str, Json]) -> ManifestParts:
    tower, decoder, tiles = tower_config(config), decoder_config(config), tile_spec(config)
    tags = TileTags(
        start="<Image>",
        end="</Image>",
        tile="<tile_{number}>",
        whole="<tile_global_thumbnail>",
        filler=FILLER,
        num_fillers=tower.num_patches // BLOCK_SIDE**2,
    )
    own = {**documents.get("generation_config.json", {}), "eos_token_id": token_id(documents, END_OF_TURN)}
    return ManifestParts(
        image=ImageSpec(
            strategy="ratio_tiles",
            patch_size=tower.patch_size,
            temporal_patch_size=1,
            merge_size=1,
            min_pixels=tiles.side**2,
            max_pixels=tiles.side**2 * tiles.max_tiles,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            rescale=1 / 255,
            resample="bicubic",
            ratio_tiles=tiles,
        ),
        vision=VisionSpec(inputs=(), merge_size=1, window_blocks=0),
        prompt=PromptSpec(
            image_placeholder=PLACEHOLDER,
            video_placeholder=PLACEHOLDER,
            protected_tokens=(PLACEHOLDER, *special_tokens(documents)),
            template_options={"add_generation_prompt": True},
            joiner="\n",
            image_placeholder_id=NO_ID,
            video_placeholder_id=NO_ID,
            tile_tags=tags,
        ),
        positions=PositionSpec(strategy="sequential"),
        cache=cache_spec(decoder, read_size(config, "llm_config.max_position_embeddings", 32768)),
        generation=generation_defaults(own, None, penalty_sees_prompt=False),
    )


TINY_CONFIG: Json = {
    "model_type": MODEL_TYPE,
    "architectures": ["NVLM_D_Model"],
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "force_image_size": 56,
    "max_dynamic_patch": 6,
    "min_dynamic_patch": 1,
    "ps_version": "v2",
    "select_layer": -1,
    "use_thumbnail": True,
    "llm_config": {
        **TINY_TEXT,
    },
    "vision_config": {
        "hidden_size": 48,
        "image_size": 56,
        "intermediate_size": 80,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "patch_size": 14,
        "qk_normalization": True,
        "qkv_bias": False,
        "norm_type": "rms_norm",
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
)
