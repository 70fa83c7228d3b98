"""NaViT (arXiv 2307.06304): a plain vision transformer on packed images of any size, one vector and class scores each.

Checked against lucidrains/vit-pytorch na_vit.py at 69d24fe. There is no text: no decoder, no prompt.

Upstream pads packed rows to the longest and masks; here images lie in one sequence and attention keeps to their bounds,
so there is nothing to pad, and no row of pure padding.
"""

import re
from collections.abc import Mapping

from ...runtime.errors import CheckpointError
from ...runtime.manifest import ImageSpec, VisionSpec
from ..family import FamilySpec, Json, ManifestParts, Port, RoleSpec, TensorRef
from ..fields import read_field, read_fields, read_numbers, read_size
from ._navit_modules import AttentionPool, Classifier, NaViTConfig, VisionEncoder

__all__ = ["FAMILY"]

MODEL_TYPE = "navit"
# How rows and columns become places of the position tables -> the input that the runtime makes.
POSITIONS = {
    "absolute": "patch_positions",
    "fractional": "patch_fractions",
    "fractional_longest": "patch_fractions_by_longest",
}


# Configuration


def navit_config(config: Json) -> NaViTConfig:
    """The constructor's arguments, by upstream's names and defaults. Dropouts are for training and change nothing."""
    patch_size = read_size(config, "patch_size")
    sides = image_sides(config)
    for side in sides:
        if side % patch_size:
            raise CheckpointError(
                f"config.json: image_size is {config['image_size']}; its sides have to be multiples of patch_size "
                f"{patch_size}"
            )
    if (channels := read_size(config, "channels", 3)) != 3:
        raise CheckpointError(f"config.json: channels is {channels}; images have 3 (RGB)")
    positions = read_field(config, "position_coordinates", str, "absolute")
    if positions not in POSITIONS:
        raise CheckpointError(f"config.json: position_coordinates is {positions!r}; known are {', '.join(POSITIONS)}")
    return NaViTConfig(
        width=read_size(config, "dim"),
        inner=read_size(config, "mlp_dim"),
        num_layers=read_size(config, "depth"),
        num_heads=read_size(config, "heads"),
        head_size=read_size(config, "dim_head", 64),
        patch_size=patch_size,
        table_sizes=(sides[0] // patch_size, sides[1] // patch_size),
        num_classes=read_field(config, "num_classes", int),
        positions=positions,  # pyright: ignore[reportArgumentType]
    )


def image_sides(config: Json) -> tuple[int, int]:
    """Height and width of the largest image, in pixels: `image_size` is one number or a pair."""
    if not isinstance(config.get("image_size"), list):
        side = read_size(config, "image_size")
        return side, side
    height, width = read_fields(config, "image_size", 2)
    if min(height, width) < 1:
        raise CheckpointError(f"config.json: image_size is {[height, width]}, expected numbers of at least 1")
    return height, width


# Roles: graphs, their ports, and where each parameter's values are

# Modules of a graph -> those of the checkpoint. What is not here has its name in common.
ENCODER_NAMES = (
    (r"^patch_embed\.norm_in\.", "to_patch_embedding.0."),
    (r"^patch_embed\.proj\.", "to_patch_embedding.1."),
    (r"^patch_embed\.norm_out\.", "to_patch_embedding.2."),
    (r"^rows\.table$", "pos_embed_height"),
    (r"^columns\.table$", "pos_embed_width"),
    (r"^layers\.(\d+)\.attention\.", r"transformer.layers.\1.0."),
    (r"^layers\.(\d+)\.mlp\.norm\.", r"transformer.layers.\1.1.0."),
    (r"^layers\.(\d+)\.mlp\.inner\.", r"transformer.layers.\1.1.1."),
    (r"^layers\.(\d+)\.mlp\.outer\.", r"transformer.layers.\1.1.4."),
    (r"^norm\.", "transformer.norm."),
)
POOL_NAMES = ((r"^query$", "attn_pool_queries"), (r"^attention\.", "attn_pool."))
CLASSIFIER_NAMES = ((r"^norm\.", "mlp_head.0."), (r"^head\.", "mlp_head.1."))
# Upstream's own layer norm calls its two vectors gamma and beta. The second is a buffer of zeros, saved all the same.
NORM_NAMES = (
    (r"(^|\.)to_out\.", r"\1to_out.0."),
    (r"(norm|to_patch_embedding\.[02]|layers\.\d+\.1\.0|mlp_head\.0)\.weight$", r"\1.gamma"),
    (r"(norm|to_patch_embedding\.[02]|layers\.\d+\.1\.0|mlp_head\.0)\.bias$", r"\1.beta"),
)


def stored_name(parameter: str, names: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in (*names, *NORM_NAMES):
        parameter = re.sub(pattern, replacement, parameter)
    return parameter


def tensor_ref(parameter: str, shape: tuple[int, ...], names: tuple[tuple[str, str], ...]) -> TensorRef:
    gain = parameter.endswith(("q_norm.gamma", "k_norm.gamma"))  # stored as [heads, 1, head size]
    return TensorRef(stored_name(parameter, names), (shape[0], 1, *shape[1:]) if gain else shape)


def roles(config: Json) -> dict[str, RoleSpec]:
    """vision_encoder, projector (the pooling) and, where the checkpoint has a head, classifier."""
    navit = navit_config(config)
    places = "int64" if navit.positions == "absolute" else "float32"
    bounds = Port("cu_seqlens", "int32", ("num_frame_bounds",))
    features = Port("vision_features", "float32", ("num_patches", navit.width))
    pooled = Port("image_features", "float32", ("num_images", navit.width))
    found = {
        "vision_encoder": RoleSpec(
            build=lambda: VisionEncoder(navit),
            inputs=(
                Port("pixel_values", "float32", ("num_patches", navit.patch_dim)),
                Port(POSITIONS[navit.positions], places, ("num_patches", 2)),
                bounds,
            ),
            outputs=(features,),
            tensor=lambda parameter, shape: tensor_ref(parameter, shape, ENCODER_NAMES),
        ),
        "projector": RoleSpec(
            build=lambda: AttentionPool(navit),
            inputs=(features, bounds),
            outputs=(pooled,),
            tensor=lambda parameter, shape: tensor_ref(parameter, shape, POOL_NAMES),
        ),
    }
    if navit.num_classes:
        found["classifier"] = RoleSpec(
            build=lambda: Classifier(navit),
            inputs=(pooled,),
            outputs=(Port("logits", "float32", ("num_images", navit.num_classes)),),
            tensor=lambda parameter, shape: tensor_ref(parameter, shape, CLASSIFIER_NAMES),
        )
    return found


def unused(config: Json, name: str) -> bool:
    """The head of a checkpoint whose config.json says that it has no classes."""
    return name.startswith("mlp_head.") and not navit_config(config).num_classes


# Manifest: what the runtime needs to know


def manifest(config: Json, documents: Mapping[str, Json]) -> ManifestParts:
    navit = navit_config(config)
    height, width = image_sides(config)
    mean, std, rescale = normalisation(config)
    return ManifestParts(
        image=ImageSpec(
            strategy="native",
            patch_size=navit.patch_size,
            temporal_patch_size=1,
            merge_size=1,
            min_pixels=navit.patch_size**2,
            max_pixels=height * width,
            max_sides=(height, width),
            mean=mean,
            std=std,
            rescale=rescale,
            resample="bicubic",
        ),
        vision=VisionSpec(
            inputs=(POSITIONS[navit.positions], "cu_seqlens"),
            merge_size=1,
            window_blocks=0,
            projector_inputs=("cu_seqlens",),
        ),
    )


def normalisation(config: Json) -> tuple[tuple[float, float, float], tuple[float, float, float], float]:
    """Mean, deviation and factor of pixels. Upstream leaves them to its user, so the checkpoint has to say them."""
    settings = read_field(config, "input_normalization", dict)
    mean, std = (read_numbers(settings, name, file=NORMALISATION) for name in ("mean", "std"))
    scale = settings.get("scale", "1/255")
    if scale == "1/255":
        return mean, std, 1 / 255
    return mean, std, read_field(settings, "scale", float, file=NORMALISATION)


NORMALISATION = "config.json: input_normalization"

TINY_CONFIG: Json = {
    "model_type": MODEL_TYPE,
    "image_size": [112, 168],
    "patch_size": 14,
    "num_classes": 5,
    "dim": 32,
    "depth": 2,
    "heads": 2,
    "mlp_dim": 48,
    "dim_head": 16,
    "input_normalization": {"scale": "1/255", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
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
