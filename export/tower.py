"""CLIP and SigLIP vision towers as checkpoints describe and store them: configuration, graph, tensor names."""

import re
from collections.abc import Sequence

from ..runtime.errors import CheckpointError
from .family import Json, Port, RoleSpec, TensorRef
from .fields import read_field, read_size
from .layers.clip import ACTIVATIONS, FrameTower, TowerConfig

__all__ = ["read_tower", "tower_role", "tower_unused"]

_CONFIG = "config.json"
# Of transformers' CLIPVisionConfig and SiglipVisionConfig, for what a file leaves out.
_CLIP_DEFAULTS: Json = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_SIGLIP_DEFAULTS: Json = {
    **_CLIP_DEFAULTS,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
# Stored beside the layers: norms behind the last one, the pooling head of SigLIP, a table that can be computed.
_BESIDE = re.compile(r"(post_layernorm|head)\..*|embeddings\.position_ids")


def read_tower(
    config: Json,
    *,
    is_clip: bool,
    select_layer: int | Sequence[int],
    keeps_class_token: bool = False,
    at: str = "vision_config.",
    file: str = _CONFIG,
) -> TowerConfig:
    """The tower whose fields stand in `config` behind the prefix `at`.

    It is run up to `hidden_states[select_layer]` of transformers, of which 0 are the embeddings.
    Of several layers features stand side by side, in the order given. CLIP alone has a class token to keep.
    Raises CheckpointError naming `file` and field.
    """
    part = at.removesuffix(".")
    own = read_field(config, part, dict, file=file) if part else config
    defaults = _CLIP_DEFAULTS if is_clip else _SIGLIP_DEFAULTS
    whole: Json = {**defaults, **{name: value for name, value in own.items() if value is not None}}
    said = {part: whole} if part else whole
    width, num_heads, patch_size = (
        read_size(said, f"{at}{name}", file=file) for name in ("hidden_size", "num_attention_heads", "patch_size")
    )
    if width % num_heads:
        raise CheckpointError(f"{file}: {at}hidden_size {width} is not divided over {num_heads} heads")
    activation = read_field(said, f"{at}hidden_act", str, file=file)
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise CheckpointError(f"{file}: {at}hidden_act is {activation!r}; known are {known}")
    if (channels := read_size(said, f"{at}num_channels", 3, file=file)) != 3:
        raise CheckpointError(f"{file}: {at}num_channels is {channels}; images have 3 (RGB)")
    side = read_size(said, f"{at}image_size", file=file) // patch_size
    if side < 1:
        raise CheckpointError(f"{file}: {at}image_size is less than one patch of {patch_size} pixels")
    num_stored = read_size(said, f"{at}num_hidden_layers", file=file)
    if keeps_class_token and not is_clip:
        raise CheckpointError(f"{file}: the tower is SigLIP's, which has no class token; ask for patches alone")
    single = isinstance(select_layer, int)
    counts = tuple(_num_layers(num_stored, layer) for layer in ([select_layer] if single else select_layer))
    if not counts:
        raise CheckpointError(f"{file}: the list of vision layers is empty; name one at least")
    return TowerConfig(
        width=width,
        inner=read_size(said, f"{at}intermediate_size", file=file),
        num_layers=max(counts),
        num_stored=num_stored,
        num_heads=num_heads,
        patch_size=patch_size,
        side=side,
        eps=read_field(said, f"{at}layer_norm_eps", float, file=file),
        activation=activation,
        has_class_token=is_clip,
        keeps_class_token=keeps_class_token,
        taken=() if single else counts,
    )


def _num_layers(stored: int, select_layer: int) -> int:
    """How many layers are run for `hidden_states[select_layer]`, a Python index of stored + 1 entries."""
    count = select_layer if select_layer >= 0 else stored + 1 + select_layer
    if not 0 <= count <= stored:
        raise CheckpointError(f"{_CONFIG}: vision layer {select_layer} is asked for, of a tower of {stored} layers")
    return count


def tower_role(tower: TowerConfig, prefix: str) -> RoleSpec:
    """pixel_values float32 [N, patch_dim] of whole frames -> vision_features float32 [N, width].

    Tensors are under `prefix`, by their names in transformers. With the class token kept there is a row more a frame.
    """
    rows = "num_feature_rows" if tower.keeps_class_token else "num_patches"

    def tensor(parameter: str, shape: tuple[int, ...]) -> TensorRef:
        if parameter == "embeddings.patch_embedding.weight":
            return TensorRef(f"{prefix}{parameter}", (tower.width, *tower.kernel))
        name = f"{parameter}.weight" if parameter == "embeddings.position_embedding" else parameter
        return TensorRef(f"{prefix}{name}", shape)

    return RoleSpec(
        build=lambda: FrameTower(tower),
        inputs=(Port("pixel_values", "float32", ("num_patches", tower.patch_dim)),),
        outputs=(Port("vision_features", "float32", (rows, tower.feature_width)),),
        tensor=tensor,
        multiples={"num_patches": tower.num_patches},
    )


def tower_unused(tower: TowerConfig, name: str) -> bool:
    """Is this tensor of a tower, by its name without the prefix, left out: later layers, norms and heads?"""
    layer = re.match(r"encoder\.layers\.(\d+)\.", name)
    later = layer is not None and tower.num_layers <= int(layer[1]) < tower.num_stored
    return later or _BESIDE.fullmatch(name) is not None
