"""VideoLLaMA 2 and 2.1 (arXiv 2406.07476): CLIP or SigLIP on each frame, a connector over frames, Mistral or Qwen2.

The connector makes tokens of blocks of frames, rows and columns (STC: RegNet blocks around a convolution), or of the
mean over frames. A still image stands for `num_frames` equal frames, of which the graphs see one.

The tower's own config is not part of a published checkpoint, which names it alone: two names are known, any other is a
folder of the checkpoint with a config.json and a preprocessor_config.json. Prompts are upstream's mm_infer: the tag of
an image or video and a line break stand before the first message, and Mistral gets a system text. Images are not padded
to squares, whatever `image_aspect_ratio` says: that is of training alone, and the request may ask for it.

Not done: Mixtral (its experts), and the connector `identity`, for which upstream's own code has no way through either.

Checked against DAMO-NLP-SG/VideoLLaMA2 at c0bb03a (timm 1.0.3, transformers 4.40.0); tensor names are its own.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ...runtime.errors import CheckpointError
from ...runtime.manifest import (
    ConnectorSpec,
    GenerationDefaults,
    ImageSpec,
    PositionSpec,
    PromptSpec,
    VideoSpec,
    VisionSpec,
)
from ..documents import generation_defaults, special_tokens, token_id
from ..family import FamilySpec, Json, ManifestParts, Port, RoleSpec, TensorRef
from ..fields import read_field, read_size
from ..image_processor import square_spec
from ..layers import DecoderConfig
from ..layers.clip import TowerConfig
from ..layers.connector import ConnectorConfig, MeanProjector, WindowConnector
from ..roles import language_roles
from ..text_config import TINY_TEXT, cache_spec, is_tied, read_decoder
from ..tower import read_tower, tower_role, tower_unused
from .llava import CLIP_LARGE

__all__ = ["FAMILY"]

MODEL_TYPE = "videollama2"
NAMES = ("videollama2", "videollama2_mistral", "videollama2_llama", "videollama2_qwen2")
WITH_SYSTEM_TEXT = ("videollama2", "videollama2_mistral")
TOWER, CONNECTOR = "model.vision_tower.vision_tower.vision_model.", "model.mm_projector."
TOWER_CONFIG = "mm_vision_tower_config"  # where `completed` puts the config.json of the tower's folder
IMAGE_ID, VIDEO_ID = -200, -201
NUM_FRAMES, MAX_FRAMES = 8, 32  # upstream's constants: where config.json does not say, and the most of a clip
SAMPLED_TEMPERATURE, SAMPLED_TOP_P = 0.2, 0.9  # of mm_infer, which is greedy unless told otherwise
# The towers that published checkpoints name.
KNOWN_TOWERS: Mapping[str, Json] = {
    "clip-vit-large-patch14-336": CLIP_LARGE,
    "siglip-so400m-patch14-384": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
}
SYSTEM_TEXT = """\
<<SYS>>
You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  \
Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. \
Please ensure that your responses are socially unbiased and positive in nature.
If a question does not make any sense, or is not factually coherent, explain why instead of answering something not \
correct. If you don't know the answer to a question, please don't share false information.
<</SYS>>"""
# What mm_infer does to messages before the tokenizer's own template: tags up to the first user's turn stand in front of
# the first message. The last line is an expression, behind which Jinja trims nothing of the template that follows.
PROLOGUE = """\
{%- set all = namespace(messages=SYSTEM, first='', waiting=true) -%}
{%- for message in messages -%}
    {%- for part in message.content if all.waiting and message.content is not string and part.type != 'text' -%}
        {%- set all.first = all.first + '<' + part.type + '>\\n' -%}
    {%- endfor -%}
    {%- set all.waiting = all.waiting and message.role != 'user' -%}
{%- endfor -%}
{%- set all.waiting = true -%}
{%- for message in messages -%}
    {%- set own = namespace(tags='', text=message.content) -%}
    {%- if message.content is not string -%}
        {%- set texts = message.content | selectattr('type', 'equalto', 'text') | map(attribute='text') -%}
        {%- set own.text = texts | join('\\n') -%}
        {%- for part in message.content if part.type != 'text' and not all.waiting -%}
            {%- set own.tags = own.tags + '<' + part.type + '>\\n' -%}
        {%- endfor -%}
    {%- endif -%}
    {%- if loop.first -%}
        {%- set own.tags = all.first or '\\n' -%}
    {%- endif -%}
    {%- set all.messages = all.messages + [{'role': message.role, 'content': own.tags + own.text}] -%}
    {%- set all.waiting = all.waiting and message.role != 'user' -%}
{%- endfor -%}
{%- set messages = all.messages -%}
{{- '' }}"""


# Configuration


def completed(config: Json, documents: Mapping[str, Json]) -> Json:
    """config.json with that of the tower's folder, where the checkpoint has one."""
    own = documents.get(f"{config.get('mm_vision_tower')}/config.json")
    return config if own is None else {**config, TOWER_CONFIG: own}


def decoder_config(config: Json) -> DecoderConfig:
    name = config.get("model_type")
    heads = config.get("num_attention_heads")
    said = {"num_key_value_heads": heads, **{key: value for key, value in config.items() if value is not None}}
    bias = name == "videollama2_qwen2" or (
        name == "videollama2_llama" and read_field(config, "attention_bias", bool, False)
    )
    return read_decoder(said, qkv_bias=bias, num_axes=1, default_theta=10000.0, at="")


def max_length(config: Json) -> int:
    """As far as nothing slides out of a window: within it, attention is that of a decoder without one."""
    length = read_size(config, "max_position_embeddings", 32768)
    slides = config["model_type"] not in ("videollama2_qwen2", "videollama2_llama")  # Qwen2 has a switch, which is read
    return min(length, read_size(config, "sliding_window", length)) if slides else length


@dataclass(frozen=True)
class NamedTower:
    """The tower that config.json names: its description, and that of its image processor."""

    config: Json
    file: str  # that describes it, for messages
    folder: str | None  # of the checkpoint; None: it is a known one
    is_clip: bool


def named_tower(config: Json) -> NamedTower:
    name = read_field(config, "mm_vision_tower", str)
    if "clip" not in name and "siglip" not in name:
        raise CheckpointError(f"config.json: mm_vision_tower {name!r} names neither a CLIP nor a SigLIP tower")
    own = config.get(TOWER_CONFIG)
    if isinstance(own, dict):
        return NamedTower(own, f"{name}/config.json", name, "clip" in name)
    base = name.rstrip("/").rpartition("/")[2]
    if base not in KNOWN_TOWERS:
        raise CheckpointError(
            f"config.json: mm_vision_tower {name!r} is neither {' nor '.join(KNOWN_TOWERS)}, nor a folder of the "
            "checkpoint; put the tower's config.json and preprocessor_config.json into one"
        )
    return NamedTower(KNOWN_TOWERS[base], "config.json", None, "clip" in name)


def tower_config(config: Json) -> TowerConfig:
    named = named_tower(config)
    feature = read_field(config, "mm_vision_select_feature", str, "patch")
    if feature not in ("patch", "cls_patch"):
        raise CheckpointError(f"config.json: mm_vision_select_feature is {feature!r}; give 'patch' or 'cls_patch'")
    layer = config.get("mm_vision_select_layer", -2)
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise CheckpointError(f"config.json: mm_vision_select_layer is {layer!r}, expected int")
    tower = read_tower(
        named.config,
        at="",
        is_clip=named.is_clip,
        select_layer=layer,
        keeps_class_token=feature == "cls_patch",
        file=named.file,
    )
    if (width := read_size(config, "mm_hidden_size")) != tower.width:
        raise CheckpointError(f"config.json: mm_hidden_size is {width}, the vision tower's width {tower.width}")
    return tower


@dataclass(frozen=True)
class Connector:
    """A projector by its name: how frames become tokens, and the sizes of its modules."""

    spec: ConnectorSpec
    pools: bool = False
    depth: int = 0
    num_linears: int = 2


def connector(config: Json) -> Connector:
    if read_field(config, "tune_mm_mlp_adapter", bool, False):
        raise CheckpointError(
            "config.json: tune_mm_mlp_adapter is true: this is a base checkpoint, whose connector is in "
            "mm_projector.bin; put that into the safetensors and set the field to false"
        )
    name = read_field(config, "mm_projector_type", str, "linear")
    frames = num_frames(config)
    depth = re.fullmatch(r"mlp([1-9]\d?)x_gelu", name)
    if name == "linear" or depth is not None:
        return Connector(ConnectorSpec("mean", frames), num_linears=1 if depth is None else int(depth[1]))
    known = {
        "stc_connector": Connector(ConnectorSpec("windows", frames, (2, 2, 2), 1), depth=4),
        "stc_connector_v35": Connector(ConnectorSpec("windows", frames, (2, 2, 2), 0), depth=4),
        "stp_connector": Connector(ConnectorSpec("windows", frames, (2, 2, 2), 0), pools=True, depth=4),
        "spatial_conv": Connector(ConnectorSpec("windows", frames, (1, 2, 2), 1)),
        "spatial_pool": Connector(ConnectorSpec("windows", frames, (1, 2, 2), 0), pools=True),
    }
    if name not in known:
        raise CheckpointError(
            f"config.json: mm_projector_type is {name!r}; known are linear, mlp<n>x_gelu, {', '.join(known)}"
        )
    _check_sizes(config, name, known[name])
    return known[name]


def _check_sizes(config: Json, name: str, found: Connector) -> None:
    tower, width = tower_config(config), read_size(config, "hidden_size")
    if tower.keeps_class_token:
        raise CheckpointError(
            f"config.json: mm_vision_select_feature 'cls_patch' does not go with {name}, whose frames are squares"
        )
    if not found.depth and tower.width != width:
        raise CheckpointError(
            f"config.json: {name} takes features of hidden_size {width}, mm_hidden_size is {tower.width}"
        )
    for size, axis in ((found.spec.num_frames, 0), (tower.side, 1)):
        if size + 2 * found.spec.padding < found.spec.kernel[axis]:
            what = "num_frames" if axis == 0 else "the tower's patches a side"
            raise CheckpointError(f"config.json: {what}: {size} is too few for {name}, which takes 2 at a time")


def num_frames(config: Json) -> int:
    frames = read_size(config, "num_frames", NUM_FRAMES)
    if frames > MAX_FRAMES:
        raise CheckpointError(f"config.json: num_frames is {frames}, over the {MAX_FRAMES} that are kept of a clip")
    return frames


# Roles


def roles(config: Json) -> dict[str, RoleSpec]:
    tower = tower_config(config)
    return {
        "vision_encoder": tower_role(tower, TOWER),
        "projector": projector_role(config, tower),
        **language_roles(decoder_config(config), "model.", tied=is_tied(config)),
    }


def projector_role(config: Json, tower: TowerConfig) -> RoleSpec:
    found, out_width = connector(config), read_size(config, "hidden_size")
    spec = found.spec
    means = spec.strategy == "mean"
    sizes = ConnectorConfig(
        tower.width, out_width, tower.side, spec.kernel, spec.padding, found.pools, found.depth, found.num_linears
    )
    rows = "num_feature_rows" if tower.keeps_class_token else "num_patches"
    index = (
        Port("frame_shares", "float32", ("num_visuals", "num_frames"))
        if means
        else Port("frame_windows", "int64", ("num_windows", spec.kernel[0]))
    )
    return RoleSpec(
        build=lambda: (
            MeanProjector(tower.width, out_width, tower.num_features, found.num_linears)
            if means
            else WindowConnector(sizes)
        ),
        inputs=(Port("vision_features", "float32", (rows, tower.width)), index),
        outputs=(Port("image_features", "float32", ("num_image_tokens", out_width)),),
        tensor=lambda parameter, shape: connector_tensor(parameter, shape, found),
        multiples={rows: tower.num_features, "num_frames": 1},
    )


def connector_tensor(parameter: str, shape: tuple[int, ...], found: Connector) -> TensorRef:
    """Linears here are convolutions there: of kernel 1, or of a block of frames, rows and columns."""
    if parameter.startswith("mlp."):
        name = parameter.removeprefix("mlp.")
        return TensorRef(CONNECTOR + (name.removeprefix("0.") if found.num_linears == 1 else name), shape)
    if parameter == "sampler.conv.weight":
        return TensorRef(f"{CONNECTOR}sampler.0.weight", (shape[0], shape[0], *found.spec.kernel))
    name = CONNECTOR + parameter.replace("sampler.conv.", "sampler.0.")
    is_kernel = re.search(r"(\.conv|\.se\.fc[12])\.weight$", parameter) is not None and len(shape) == 2
    return TensorRef(name, (*shape, 1, 1) if is_kernel else shape)


def unused(config: Json, name: str) -> bool:
    """What of the tower is not run, a head saved beside tied embeddings, and tables that can be computed."""
    if name == "lm_head.weight":
        return is_tied(config)
    in_tower = name.startswith(TOWER) and tower_unused(tower_config(config), name.removeprefix(TOWER))
    return in_tower or name.endswith(".rotary_emb.inv_freq")


# Manifest


def manifest(config: Json, documents: Mapping[str, Json]) -> ManifestParts:
    config = completed(config, documents)
    tower, found, decoder = tower_config(config), connector(config), decoder_config(config)
    system = [{"role": "system", "content": SYSTEM_TEXT}] if config["model_type"] in WITH_SYSTEM_TEXT else []
    means = found.spec.strategy == "mean"
    tokens = named_tokens(documents)
    return ManifestParts(
        image=image_spec(config, tower, documents),
        video=VideoSpec(
            sampling="midpoints",
            fps=1.0,
            min_frames=1,
            max_frames=MAX_FRAMES,
            frame_multiple=1,
            default_fps=3.0,
            num_frames=found.spec.num_frames,
            gif_fps=25.0,
        ),
        vision=VisionSpec(
            inputs=(),
            merge_size=1,
            window_blocks=0,
            projector_inputs=("frame_shares" if means else "frame_windows",),
            first_rows=int(tower.keeps_class_token),
            connector=found.spec,
        ),
        prompt=PromptSpec(
            image_placeholder="<image>",
            video_placeholder="<video>",
            image_placeholder_id=IMAGE_ID,
            video_placeholder_id=VIDEO_ID,
            protected_tokens=("<image>", "<video>", *special_tokens(documents)),
            template_options={"add_generation_prompt": True, **tokens},
        ),
        positions=PositionSpec(strategy="sequential"),
        cache=cache_spec(decoder, max_length(config)),
        generation=generation(config, documents, tokens),
        template_prologue=PROLOGUE.replace("SYSTEM", json.dumps(system)),
    )


def image_spec(config: Json, tower: TowerConfig, documents: Mapping[str, Json]) -> ImageSpec:
    """Of the tower's own processor, whose class upstream chooses by the tower's name."""
    named = named_tower(config)
    pixels = read_size(named.config, "image_size", 224, file=named.file)
    kind = "CLIPImageProcessor" if named.is_clip else "SiglipImageProcessor"
    side = {"height": pixels, "width": pixels}
    if named.folder is None:
        processor: Json = {"size": {"shortest_edge": pixels}, "crop_size": side} if named.is_clip else {"size": side}
    else:
        file = f"{named.folder}/preprocessor_config.json"
        if file not in documents:
            raise CheckpointError(f"{file}: missing; copy it from the tower that the checkpoint was tuned with")
        processor = documents[file]
    return square_spec({**processor, "image_processor_type": kind}, pixels, tower.patch_size, pads=False)


def named_tokens(documents: Mapping[str, Json]) -> dict[str, str]:
    """Special tokens that a chat template may ask for by name."""
    own = documents.get("tokenizer_config.json", {})
    values = {name: own.get(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def generation(config: Json, documents: Mapping[str, Json], tokens: Mapping[str, str]) -> GenerationDefaults:
    """Greedy unless the request says; the tokenizer's end of sequence ends an answer, whatever else does."""
    own = documents.get("generation_config.json", {})
    stated = own.get("eos_token_id", config.get("eos_token_id"))
    eos = list(stated) if isinstance(stated, list) else [] if stated is None else [stated]
    if "eos_token" in tokens:
        eos += [id for id in (token_id(documents, tokens["eos_token"]),) if id not in eos]
    sampling = {"do_sample": False, "temperature": SAMPLED_TEMPERATURE, "top_p": SAMPLED_TOP_P}
    return generation_defaults({**own, **sampling, "eos_token_id": eos}, None, penalty_sees_prompt=False)


TINY_CONFIG: Json = {
    "model_type": "videollama2_mistral",
    "architectures": ["Videollama2MistralForCausalLM"],
    **TINY_TEXT,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "mm_vision_tower": "tower_clip",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_hidden_size": 48,
    "mm_projector_type": "stc_connector",
    "num_frames": 4,
    TOWER_CONFIG: {
        "model_type": "clip_vision_model",
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
    },
}

FAMILY = FamilySpec(
    name=MODEL_TYPE,
    matches=lambda config: config.get("model_type") in NAMES,
    roles=roles,
    manifest=manifest,
    normalise=lambda name: name,
    unused=unused,
    tiny_config=TINY_CONFIG,
    completed=completed,
)
