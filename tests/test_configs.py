"""What a checkpoint's JSON asks for is done or refused in one line that names the field; nothing is guessed over."""

from collections.abc import Mapping
from typing import Any

import pytest
from checkpoints import edited

from vlmport.export.documents import generation_defaults
from vlmport.export.family import families, load_family
from vlmport.export.image_processor import PatchGeometry, smart_resize_spec
from vlmport.export.text_config import eos_token_ids, is_tied, read_decoder
from vlmport.export.trace import trace
from vlmport.runtime.errors import CheckpointError

WITH_DECODER = [name for name in families() if "decoder" in load_family(name).roles(load_family(name).tiny_config)]
WITH_MERGE_BLOCKS = [
    name for name in families() if "spatial_merge_size" in load_family(name).tiny_config.get("vision_config", {})
]
# Published files leave the field out, and transformers' default stands for it.
DEFAULTED = {("llava", "rms_norm_eps")}
GEOMETRY = PatchGeometry(channels=3, patch_size=14, merge_size=2, num_frames=2)


def at_text(config: Mapping[str, Any]) -> str:
    """Where the text part of a config stands, as a prefix of paths."""
    if "vocab_size" in config:
        return ""
    return next(f"{key}." for key, part in config.items() if isinstance(part, dict) and "vocab_size" in part)


def at_vision(config: Mapping[str, Any]) -> str | None:
    """The field of a config that describes the vision encoder; None where there is none."""
    return next((key for key, part in config.items() if isinstance(part, dict) and "patch_size" in part), None)


@pytest.mark.parametrize("name", WITH_DECODER)
@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("rope_scaling.type", "yarn", "rope type 'yarn'"),
        ("hidden_act", "gelu", "hidden_act is 'gelu'; only 'silu'"),
        ("vision_config.hidden_act", "relu", "vision_config.hidden_act is 'relu'"),
        ("rms_norm_eps", None, "rms_norm_eps is missing"),
        ("num_attention_heads", 0, "num_attention_heads is 0"),
        ("num_key_value_heads", 0, "num_key_value_heads is 0"),
        ("vision_config.num_heads", 0, r"vision_config.num_(attention_)?heads is 0"),
        ("vision_config.num_heads", 7, "over 7 heads"),
        ("vision_config.patch_size", 0, "patch_size is 0"),
        ("tie_word_embeddings", "yes", "tie_word_embeddings is 'yes'"),
    ],
)
def test_what_the_modules_cannot_do_is_refused(name: str, path: str, value: Any, told: str) -> None:
    spec = load_family(name)
    where = at_text(spec.tiny_config)
    if path.startswith("vision_config"):
        where, tower = "", at_vision(spec.tiny_config)
        if tower is None:
            pytest.skip("has no vision encoder")
        if "num_attention_heads" in spec.tiny_config[tower]:  # as this tower spells it
            path = path.replace("num_heads", "num_attention_heads")
        path = path.replace("vision_config", tower)
        if tower != "vision_config":  # a file of its own, whose fields have no prefix
            told = told.replace("vision_config.", "")
    if value is None and (name, path) in DEFAULTED:
        spec.roles(edited(spec.tiny_config, where + path, value))
        return
    with pytest.raises(CheckpointError, match=f"config.json.*{told}") as caught:
        spec.roles(edited(spec.tiny_config, where + path, value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("vision_config.window_size", 14, "window_size is 14 pixels, less than one merge block"),
        ("vision_config.fullatt_block_indexes", [[1]], "fullatt_block_indexes"),
    ],
)
def test_windows_that_cannot_be(path: str, value: Any, told: str) -> None:
    windowed = [
        spec
        for spec in map(load_family, families())
        if "fullatt_block_indexes" in spec.tiny_config.get("vision_config", {})
    ]
    assert windowed
    for spec in windowed:
        with pytest.raises(CheckpointError, match=told):
            spec.roles(edited(spec.tiny_config, path, value))


@pytest.mark.parametrize("merge_size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "name",
    [name for name in families() if "spatial_merge_size" in load_family(name).tiny_config.get("vision_config", {})],
)
def test_merge_blocks_of_any_side_can_be_traced(name: str, merge_size: int) -> None:
    spec = load_family(name)
    config = edited(spec.tiny_config, "vision_config.spatial_merge_size", merge_size)
    config = edited(config, "vision_config.depth", 1)
    config = edited(config, "vision_config.window_size", 14 * merge_size)
    for role in ("vision_encoder", "projector"):
        assert trace(spec.roles(config)[role], "float32").graph.outputs


def test_one_row_of_positions_takes_all_frequencies() -> None:
    config = next(
        config for config in (load_family(name).tiny_config for name in WITH_DECODER) if "rope_scaling" in config
    )
    plain = read_decoder(edited(config, "rope_scaling", None), qkv_bias=False, num_axes=1, default_theta=10000.0)
    assert plain.rope_sections == (plain.head_dim // 2,)
    assert len(plain.inverse_frequencies) == plain.head_dim // 2


def test_either_level_may_say_it() -> None:
    assert is_tied({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}})
    assert is_tied({"text_config": {"tie_word_embeddings": True}})
    assert not is_tied({"text_config": {"tie_word_embeddings": None}})
    assert eos_token_ids({"eos_token_id": 7, "text_config": {"eos_token_id": None}}) == 7
    assert eos_token_ids({"eos_token_id": 7, "text_config": {"eos_token_id": 0}}) == 0
    assert generation_defaults({"eos_token_id": None}, [7, 8]).eos_token_ids == (7, 8)
    with pytest.raises(CheckpointError, match=r"generation_config.json: temperature is 'hot'"):
        generation_defaults({"temperature": "hot"}, 7)


def test_an_image_processor_as_saved() -> None:
    spec = smart_resize_spec({"size": {"shortest_edge": 3136, "longest_edge": 50176}, "resample": 2}, GEOMETRY)
    assert (spec.min_pixels, spec.max_pixels, spec.resample) == (3136, 50176, "bilinear")
    assert smart_resize_spec({}, GEOMETRY).resample == "bicubic"


@pytest.mark.parametrize(
    ("processor", "told"),
    [
        ({"do_resize": False}, "do_resize is false"),
        ({"do_normalize": False}, "do_normalize is false"),
        ({"resample": 5}, "resample is 5"),
        ({"patch_size": 16}, "patch_size is 16, config.json says 14"),
        ({"merge_size": 1}, "merge_size is 1, config.json says 2"),
        ({"image_mean": [0.5]}, r"image_mean is \[0.5\], expected 3 numbers"),
        ({"min_pixels": 0}, "min_pixels is 0"),
        ({"min_pixels": 5000, "size": {"longest_edge": 4000}}, "min_pixels 5000 is over max_pixels 4000"),
        ({"size": {"longest_edge": "big"}}, "size.longest_edge is 'big'"),
    ],
)
def test_what_the_image_processor_cannot_do_is_refused(processor: dict[str, Any], told: str) -> None:
    with pytest.raises(CheckpointError, match=f"preprocessor_config.json: {told}"):
        smart_resize_spec(processor, GEOMETRY)
