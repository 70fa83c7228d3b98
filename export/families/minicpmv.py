"""MiniCPM-V 2.6: SigLIP on tiles of native size, a resampler of learned queries a tile, Qwen2 decoder.

Large images are an overview and up to nine tiles (LLaVA-UHD, arXiv 2403.11703); all tiles of a request go through the
tower in one packed call, and the resampler's queries of a tile see the patches of that tile alone. Positions are 1-D.
Upstream hides every token of id 0 in a prompt, which is "!" in the vocabulary: the manifest says so, and the runtime
does it. Not done: upstream's cut of a prompt at 8192 tokens, which may fall inside an image.

Checked against the code of openbmb/MiniCPM-V-2_6 (for transformers 4.40.0); tensor names are its own.
"""

import re
from collections.abc import Mapping

from ...runtime.errors import CheckpointError
from ...runtime.manifest import (
    ImageSpec,
    PositionSpec,
    PromptSpec,
    SliceSpec,
    TileTokens,
    VideoSpec,
    VisionSpec,
)
from ..documents import generation_defaults, token_id
from ..family import FamilySpec, Json, ManifestParts, Port, RoleSpec, RowBlocks, TensorRef
from ..fields import read_field, read_numbers, read_size
from ..image_processor import image_processor
from ..layers import DecoderConfig
from ..roles import language_roles
from ..text_config import TINY_TEXT, cache_spec, check_activation, is_tied, read_decoder
from ._minicpmv_modules import RESAMPLER_HEAD, Resampler, ResamplerConfig, VisionConfig, VisionEncoder

__all__ = ["FAMILY"]

MODEL_TYPE = "minicpmv"
VERSION = "2.6"
PREPROCESSOR = "preprocessor_config.json"
HIDDEN_TOKEN_IDS = (0,)  # upstream's mask of a prompt is `ids != 0`, padding or not
TERMINATORS = ("<|im_end|>", "<|endoftext|>")
# What upstream's chat() samples with; generation_config.json may say otherwise.
CHAT_SETTINGS: Json = {"do_sample": True, "temperature": 0.7, "top_k": 100, "top_p": 0.8, "repetition_penalty": 1.05}
# Of upstream's config class where config.json has no vision_config, and of its vision class where a field is left out.
PUBLISHED_VISION: Json = {
    "hidden_size": 1152,
    "image_size": 980,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}
VISION_DEFAULTS: Json = {
    "hidden_size": 768,
    "image_size": 224,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "patch_size": 16,
}


# Configuration


def vision_config(config: Json) -> VisionConfig:
    _check_version(config)
    own = read_field(config, "vision_config", dict, PUBLISHED_VISION)
    said = {"vision_config": {**VISION_DEFAULTS, **own}}
    width, num_heads = (read_size(said, f"vision_config.{key}") for key in ("hidden_size", "num_attention_heads"))
    if width % num_heads:
        raise CheckpointError(f"config.json: vision_config.hidden_size {width} is not divided over {num_heads} heads")
    check_activation(said, "vision_config.hidden_act", "gelu_pytorch_tanh")
    if (channels := read_size(said, "vision_config.num_channels", 3)) != 3:
        raise CheckpointError(f"config.json: vision_config.num_channels is {channels}; images have 3 (RGB)")
    num_layers, patch_size = (read_size(said, f"vision_config.{key}") for key in ("num_hidden_layers", "patch_size"))
    side = read_size(said, "vision_config.image_size") // patch_size
    if side < 1:
        raise CheckpointError("config.json: vision_config.image_size is less than one patch")
    return VisionConfig(
        width=width,
        inner=read_size(said, "vision_config.intermediate_size"),
        num_layers=num_layers - drops_last_layer(config),
        num_heads=num_heads,
        patch_size=patch_size,
        side=side,
        eps=read_field(said, "vision_config.layer_norm_eps", float, 1e-6),
    )


def drops_last_layer(config: Json) -> bool:
    """Whether the tower ends one layer early; a file that does not say means yes."""
    return read_field(config, "drop_vision_last_layer", bool, True)


def resampler_config(config: Json) -> ResamplerConfig:
    width = read_size(config, "hidden_size")
    resampler = ResamplerConfig(read_size(config, "query_num", 64), width, vision_config(config).width)
    if width % 4 or resampler.num_heads < 1 or width % resampler.num_heads:
        raise CheckpointError(
            f"config.json: hidden_size {width} makes no resampler: it has to be a multiple of 4 and of "
            f"hidden_size // {RESAMPLER_HEAD}, which is the number of heads"
        )
    return resampler


def decoder_config(config: Json) -> DecoderConfig:
    return read_decoder(config, qkv_bias=True, num_axes=1, default_theta=10000.0, at="")


def _check_version(config: Json) -> None:
    version = config.get("version", VERSION)
    if str(version) != VERSION:
        raise CheckpointError(
            f"config.json: version is {version!r}; of this model_type only {VERSION} is supported, others differ in "
            "their resampler and decoder"
        )


# Roles


def roles(config: Json) -> dict[str, RoleSpec]:
    vision, resampler = vision_config(config), resampler_config(config)
    bounds = Port("cu_seqlens", "int32", ("num_frame_bounds",))
    return {
        "vision_encoder": RoleSpec(
            build=lambda: VisionEncoder(vision),
            inputs=(
                Port("pixel_values", "float32", ("num_patches", vision.patch_dim)),
                Port("bucketed_positions", "int64", ("num_patches",)),
                bounds,
            ),
            outputs=(Port("vision_features", "float32", ("num_patches", vision.width)),),
            tensor=lambda parameter, shape: vision_tensor(parameter, shape, vision),
        ),
        "projector": RoleSpec(
            build=lambda: Resampler(resampler),
            inputs=(
                Port("vision_features", "float32", ("num_patches", vision.width)),
                Port("patch_positions", "int64", ("num_patches", 2)),
                bounds,
            ),
            outputs=(Port("image_features", "float32", ("num_image_tokens", resampler.width)),),
            tensor=lambda parameter, shape: resampler_tensor(parameter, shape, resampler.width),
        ),
        **language_roles(decoder_config(config), "llm.model.", tied=is_tied(config)),
    }


def vision_tensor(parameter: str, shape: tuple[int, ...], vision: VisionConfig) -> TensorRef:
    kernel = parameter == "embeddings.patch_embedding.weight"
    if parameter == "embeddings.position_embedding":
        return TensorRef("vpm.embeddings.position_embedding.weight", shape)
    prefix = "vpm.encoder." if parameter.startswith("layers.") else "vpm."
    return TensorRef(f"{prefix}{parameter}", (vision.width, *vision.kernel) if kernel else shape)


def resampler_tensor(parameter: str, shape: tuple[int, ...], width: int) -> TensorRef:
    """Query, key and value are one tensor; the last matrix is stored for `x @ proj`."""
    if part := re.fullmatch(r"attn\.([qkv])_proj\.(weight|bias)", parameter):
        rows = RowBlocks(start="qkv".index(part[1]) * width, size=width, stride=3 * width)
        return TensorRef(f"resampler.attn.in_proj_{part[2]}", (3 * width, *shape[1:]), rows)
    if parameter == "proj.weight":
        return TensorRef("resampler.proj", shape[::-1], transposed=True)
    return TensorRef(f"resampler.{parameter}", shape)


def normalise(name: str) -> str:
    """The head is beside the decoder, not in it."""
    return name.removeprefix("llm.") if name == "llm.lm_head.weight" else name


def unused(config: Json, name: str) -> bool:
    """What upstream leaves out or computes: a dropped layer, a head beside tied embeddings, tables."""
    if name == "lm_head.weight":
        return is_tied(config)
    dropped = f"vpm.encoder.layers.{vision_config(config).num_layers}."
    tables = ("resampler.pos_embed", "vpm.embeddings.position_ids")
    return (drops_last_layer(config) and name.startswith(dropped)) or name in tables or name.endswith(".inv_freq")


# Manifest


def manifest(config: Json, documents: Mapping[str, Json]) -> ManifestParts:
    vision, decoder, processor = vision_config(config), decoder_config(config), image_processor(documents)
    tokens = tile_tokens(config, processor)
    starts_and_ends = (tokens.start, tokens.end, tokens.tile_start, tokens.tile_end, tokens.id_start, tokens.id_end)
    own = documents.get("generation_config.json", {})
    eos = [token_id(documents, text) for text in TERMINATORS]
    return ManifestParts(
        image=image_spec(vision, processor),
        video=VideoSpec(
            sampling="strided",
            fps=1.0,
            min_frames=1,
            max_frames=64,
            frame_multiple=1,
            default_fps=1.0,
            max_slices=2,
            use_ids=False,
        ),
        vision=VisionSpec(
            inputs=("bucketed_positions", "cu_seqlens"),
            merge_size=1,
            window_blocks=0,
            projector_inputs=("patch_positions", "cu_seqlens"),
            position_side=vision.side,
        ),
        prompt=PromptSpec(
            image_placeholder=tokens.start,
            video_placeholder=tokens.start,
            protected_tokens=starts_and_ends,
            template_options={"add_generation_prompt": True},
            joiner="\n",
            tiles=tokens,
        ),
        positions=PositionSpec(strategy="sequential", hidden_token_ids=HIDDEN_TOKEN_IDS),
        cache=cache_spec(decoder, read_size(config, "max_position_embeddings", 32768)),
        generation=generation_defaults({**CHAT_SETTINGS, **own, "eos_token_id": eos}, None, penalty_sees_prompt=False),
    )


def image_spec(vision: VisionConfig, processor: Json) -> ImageSpec:
    """Settings of the image processor. What the file leaves out is as upstream's class has it."""
    patch = read_size(processor, "patch_size", 14, file=PREPROCESSOR)
    if patch != vision.patch_size:
        raise CheckpointError(
            f"{PREPROCESSOR}: patch_size is {patch}, config.json says {vision.patch_size}; copy both from one "
            "checkpoint"
        )
    scale = read_size(processor, "scale_resolution", 448, file=PREPROCESSOR)
    return ImageSpec(
        strategy="slices",
        patch_size=patch,
        temporal_patch_size=1,
        merge_size=1,
        min_pixels=patch**2,
        max_pixels=max(scale, patch) ** 2,
        mean=read_numbers(processor, "norm_mean", (0.5, 0.5, 0.5), file=PREPROCESSOR),
        std=read_numbers(processor, "norm_std", (0.5, 0.5, 0.5), file=PREPROCESSOR),
        rescale=1 / 255,
        resample="bicubic",
        slices=SliceSpec(
            scale_resolution=scale,
            max_slices=read_size(processor, "max_slice_nums", 9, file=PREPROCESSOR),
            enabled=read_field(processor, "slice_mode", bool, True, file=PREPROCESSOR),
        ),
    )


def tile_tokens(config: Json, processor: Json) -> TileTokens:
    num_queries = read_size(config, "query_num", 64)
    fillers = read_size(processor, "image_feature_size", 64, file=PREPROCESSOR)
    if fillers != num_queries:
        raise CheckpointError(
            f"{PREPROCESSOR}: image_feature_size is {fillers}, query_num of config.json {num_queries}; copy both from "
            "one checkpoint"
        )

    def text(name: str, default: str) -> str:
        return read_field(processor, name, str, default, file=PREPROCESSOR)

    return TileTokens(
        start=text("im_start", "<image>"),
        end=text("im_end", "</image>"),
        tile_start=text("slice_start", "<slice>"),
        tile_end=text("slice_end", "</slice>"),
        filler=text("unk", "<unk>"),
        num_fillers=fillers,
        id_start=text("im_id_start", "<image_id>"),
        id_end=text("im_id_end", "</image_id>"),
        use_ids=read_field(processor, "use_image_id", bool, False, file=PREPROCESSOR),
    )


TINY_CONFIG: Json = {
    "model_type": MODEL_TYPE,
    "architectures": ["MiniCPMV"],
    "version": 2.6,
    **TINY_TEXT,
    "hidden_size": 256,
    "query_num": 16,
    "drop_vision_last_layer": False,
    "vision_config": {
        "hidden_size": 48,
        "image_size": 112,
        "intermediate_size": 80,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "patch_size": 14,
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
)
