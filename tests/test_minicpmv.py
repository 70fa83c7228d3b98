"""MiniCPM-V: tiles in one packed call, pictures by request, hidden tokens, and what its files may say."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from vlmport.export.build import export_checkpoint
from vlmport.export.checkpoint import Checkpoint
from vlmport.export.families._minicpmv_modules import Resampler, position_waves
from vlmport.export.families.minicpmv import FAMILY, resampler_config
from vlmport.quant.recipe import load_recipe
from vlmport.runtime import InputError, Model
from vlmport.runtime.errors import CheckpointError
from vlmport.runtime.image import Patches

GOLDENS = Path(__file__).parent / "goldens" / "minicpmv"
CONFIG = FAMILY.tiny_config
PROCESSOR: dict[str, Any] = {"scale_resolution": 84, "image_feature_size": 16, "use_image_id": True}
TERMINATORS = [{"content": "<|im_end|>", "id": 7}, {"content": "<|endoftext|>", "id": 8}]
DOCUMENTS = {"preprocessor_config.json": PROCESSOR, "tokenizer.json": {"added_tokens": TERMINATORS}}


@pytest.fixture(scope="module")
def model(package_of: Any) -> Any:
    with Model.load(package_of(GOLDENS / "tiny_a"), "fp32", num_threads=1) as opened:
        yield opened


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


def asked(*parts: Any) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


def image(source: Any, **options: Any) -> dict[str, Any]:
    return {"type": "image", "image": source, **options}


# Tiles


def random_tiles(seed: int, num: int) -> list[Patches]:
    generator = np.random.default_rng(seed)
    grids = [tuple(int(side) for side in generator.integers(1, 9, 2)) for _ in range(num)]
    return [Patches(generator.standard_normal((h * w, 588), dtype=np.float32), (1, h, w)) for h, w in grids]


@pytest.mark.parametrize("seed", range(4))
def test_what_a_tile_becomes_does_not_depend_on_its_neighbours(model: Model, seed: int) -> None:
    tiles = random_tiles(seed, 5)
    packed = model.encode_vision(tiles)
    order = np.random.default_rng(seed).permutation(5)
    shuffled = model.encode_vision([tiles[i] for i in order])
    queries = len(packed.features) // 5
    assert queries == 16
    for place, i in enumerate(order):
        alone = model.encode_vision([tiles[i]])
        for found, number in ((packed, i), (shuffled, place)):
            rows = found.features[number * queries : (number + 1) * queries]
            np.testing.assert_allclose(rows, alone.features, atol=2e-5)


def test_all_tiles_of_all_pictures_go_through_in_one_call(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = model.prepare(asked(image(picture(300, 140)), image(picture(60, 50)), "What?"))
    assert len(prepared.visuals) == len(prepared.runs) == 8
    calls: list[int] = []
    encoder = model.session("vision_encoder")
    run = encoder.run
    monkeypatch.setattr(
        encoder, "run", lambda feeds, *a, **k: calls.append(len(feeds["cu_seqlens"])) or run(feeds, *a, **k)
    )
    seen = model.features(prepared)
    assert calls == [9]
    assert seen is not None
    assert len(seen.features) == 8 * 16


# By request


@pytest.mark.parametrize(("most", "tiles"), [(1, 1), (2, 3), (9, 7)])
def test_tiles_and_numbers_are_a_matter_of_the_request(model: Model, most: int, tiles: int) -> None:
    number = model.builder.tokenizer.token_to_id("<image_id>")
    messages = asked(image(picture(300, 140)), "What?")
    for use in (True, False):
        prepared = model.prepare(messages, {"max_slice_nums": most, "use_image_id": use})
        assert len(prepared.visuals) == tiles
        assert (prepared.input_ids == number).sum() == use
    own = asked(image(picture(300, 140), max_slice_nums=most), image(picture(300, 140)), "What?")
    assert len(model.prepare(own).visuals) == tiles + 7


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_slice_nums": 0}, "options.max_slice_nums: is 0; give a whole number above 0"),
        ({"max_slice_nums": 1.5}, "options.max_slice_nums: is 1.5"),
        ({"use_image_id": 1}, "options.use_image_id: is 1; give true or false"),
        ({"max_pixels": 1000}, "max_pixels is no option of this package"),
        ({"max_slices": 3}, "options.max_slices: is no option"),
    ],
)
def test_options_that_cannot_be(model: Model, options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told) as caught:
        model.prepare(asked(image(picture(60, 50)), "What?"), options)
    assert "\n" not in str(caught.value)


def test_a_list_of_frames_is_so_many_images_and_a_clip_has_its_own_defaults(model: Model) -> None:
    frames = [picture(300, 140, seed) for seed in range(3)]
    listed = asked({"type": "video", "video": frames}, "What?")
    images = asked(*[image(frame) for frame in frames], "What?")
    np.testing.assert_array_equal(model.prepare(listed).input_ids, model.prepare(images).input_ids)
    clip = np.stack([np.asarray(frame) for frame in frames])
    sampled = model.prepare(asked({"type": "video", "video": clip, "fps": 1}, "What?"))
    assert len(sampled.visuals) == 3 * 3  # an overview and two tiles each
    assert (sampled.input_ids == model.builder.tokenizer.token_to_id("<image_id>")).sum() == 0
    assert {run.kind for run in sampled.runs} == {"video"}
    other = model.prepare(asked({"type": "video", "video": clip, "fps": 1, "max_slice_nums": 1}, "What?"))
    assert len(other.visuals) == 3


def test_a_very_long_image_is_answered(model: Model) -> None:
    prepared = model.prepare(asked(image(picture(6000, 5)), "What?"))
    assert len(prepared.visuals) > 1
    seen = model.features(prepared)
    assert seen is not None
    assert np.isfinite(seen.features).all()


def test_a_user_cannot_make_a_slot(model: Model) -> None:
    text = "<image><unk></image> (<image>./</image>) <slice></slice>"
    prepared = model.prepare(asked(image(picture(60, 50)), text))
    assert len(prepared.runs) == 1
    assert model.prepare(asked(text)).runs == ()


# Hidden tokens


def test_the_token_of_id_0_is_hidden_as_upstream_does_it_and_only_in_the_prompt(model: Model) -> None:
    prepared = model.prepare(asked("Wow!"))
    (hidden,) = np.flatnonzero(prepared.input_ids == 0)
    assert prepared.visible is not None
    assert np.flatnonzero(~prepared.visible).tolist() == [hidden]
    expected = np.arange(len(prepared.input_ids))
    expected[hidden:] -= 1
    expected[hidden] = 1
    np.testing.assert_array_equal(prepared.position_ids, expected)
    # The rest is as if the token were not there; a generated 0 is a token like any other.
    without = model.prepare_ids(np.delete(prepared.input_ids, hidden))
    np.testing.assert_array_equal(model.logits(prepared.input_ids), model.logits(without.input_ids))
    cache = model.new_cache(80)
    model.prefill(model.embed(without), without.position_ids, cache)
    before = cache.length
    model.step(0, cache, without.rope_delta)
    assert cache.length == before + 1


def test_a_runtime_may_be_told_to_see_it(model: Model, package_of: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(package_of(GOLDENS / "tiny_a"), tmp_path / "package")
    manifest = json.loads((folder / "vlmport.json").read_text())
    assert manifest["positions"]["hidden_token_ids"] == [0]
    manifest["positions"]["hidden_token_ids"] = []
    (folder / "vlmport.json").write_text(json.dumps(manifest))
    with Model.load(folder, "fp32", num_threads=1) as other:
        prepared = other.prepare(asked("Wow!"))
        assert prepared.visible is None
        assert prepared.position_ids.tolist() == list(range(len(prepared.input_ids)))
        seen, unseen = other.logits(prepared.input_ids)[-1], model.logits(prepared.input_ids)[-1]
        assert np.abs(seen - unseen).max() > 1e-3


def test_a_prompt_that_ends_with_a_hidden_token_is_refused(model: Model) -> None:
    with pytest.raises(InputError, match="input_ids: end with 0, a token that this model's own code hides"):
        model.prepare_ids(np.array([5, 6, 0]))


# The resampler's positions


def test_position_waves_are_those_of_upstreams_table() -> None:
    table = load_file(GOLDENS / "tables" / "sincos_pos_embed.safetensors")
    whole = table["sincos_128_5x7"]
    grid = torch.cartesian_prod(torch.arange(5), torch.arange(7))
    np.testing.assert_allclose(position_waves(grid, 128).numpy().reshape(5, 7, 128), whole, atol=1e-6)
    found = position_waves(torch.tensor([[69, 2], [69, 40]]), 3584)
    np.testing.assert_allclose(found.numpy(), table["sincos_3584_row69_col_2_40"], atol=1e-5)


def test_a_tower_as_wide_as_the_decoder_has_no_projection_of_its_own() -> None:
    config = {**CONFIG, "vision_config": {**CONFIG["vision_config"], "hidden_size": 256}}
    names = {name for name, _ in Resampler(resampler_config(config)).named_parameters()}
    assert not any(name.startswith("kv_proj") for name in names)
    narrow = {name for name, _ in Resampler(resampler_config(CONFIG)).named_parameters()}
    assert narrow - names == {"kv_proj.weight"}


# Files


def test_what_the_files_say() -> None:
    parts = FAMILY.manifest(CONFIG, DOCUMENTS)
    assert parts.prompt is not None
    assert parts.prompt.tiles is not None
    assert parts.prompt.tiles.num_fillers == 16
    assert parts.image is not None
    assert parts.image.slices is not None
    assert (parts.image.slices.scale_resolution, parts.image.slices.max_slices) == (84, 9)
    assert parts.vision is not None
    assert parts.vision.position_side == 8
    generation = parts.generation
    assert generation is not None
    assert (generation.eos_token_ids, generation.penalty_sees_prompt) == ((7, 8), False)
    assert (generation.do_sample, generation.temperature, generation.top_k) == (True, 0.7, 100)  # as chat() has it
    own = {**DOCUMENTS, "generation_config.json": {"do_sample": False, "eos_token_id": 3}}
    changed = FAMILY.manifest(CONFIG, own).generation
    assert changed == replace(generation, do_sample=False)


def test_a_file_that_does_not_say_drops_the_towers_last_layer() -> None:
    config = {key: value for key, value in CONFIG.items() if key != "drop_vision_last_layer"}
    layers = {True: 2, False: 1}
    for said, found in ((CONFIG, layers[True]), (config, layers[False])):
        names = dict(FAMILY.roles(said)["vision_encoder"].build().named_parameters())
        assert len({name.split(".")[1] for name in names if name.startswith("layers.")}) == found
    assert FAMILY.unused(config, "vpm.encoder.layers.1.mlp.fc1.bias")
    assert not FAMILY.unused(CONFIG, "vpm.encoder.layers.1.mlp.fc1.bias")
    assert not FAMILY.unused(config, "vpm.encoder.layers.0.mlp.fc1.bias")


@pytest.mark.parametrize(
    ("config", "processor", "told"),
    [
        ({"version": 2.5}, {}, "version is 2.5; of this model_type only 2.6 is supported"),
        ({"version": "4.0"}, {}, "version is '4.0'"),
        ({"hidden_size": 64}, {}, "hidden_size 64 makes no resampler"),
        ({"hidden_size": 388}, {}, "hidden_size 388 makes no resampler"),
        ({"query_num": 32}, {}, "image_feature_size is 16, query_num of config.json 32"),
        ({}, {"patch_size": 16}, "patch_size is 16, config.json says 14"),
        ({}, {"max_slice_nums": 0}, "max_slice_nums is 0"),
        ({}, {"im_start": 3}, "im_start is 3, expected str"),
        ({"vision_config": {"hidden_size": 48, "image_size": 7, "num_attention_heads": 4}}, {}, "less than one patch"),
        ({"vision_config": {"num_channels": 1}}, {}, "num_channels is 1"),
    ],
)
def test_what_cannot_be_is_refused(config: dict[str, Any], processor: dict[str, Any], told: str) -> None:
    said, files = {**CONFIG, **config}, {**DOCUMENTS, "preprocessor_config.json": {**PROCESSOR, **processor}}
    with pytest.raises(CheckpointError, match=told) as caught:
        (FAMILY.roles(said), FAMILY.manifest(said, files))
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_still_has_the_dropped_layer_and_tables(tmp_path: Path) -> None:
    """Upstream leaves them out when it loads; so does the export."""
    folder = shutil.copytree(GOLDENS / "tiny_b", tmp_path / "checkpoint", ignore=shutil.ignore_patterns("inputs"))
    tensors = load_file(folder / "model.safetensors")
    last = max(int(name.split(".")[3]) for name in tensors if name.startswith("vpm.encoder.layers."))
    more = {
        name.replace(f"layers.{last}.", f"layers.{last + 1}."): values
        for name, values in tensors.items()
        if name.startswith(f"vpm.encoder.layers.{last}.")
    }
    save_file(
        {**tensors, **more, "resampler.pos_embed": np.zeros((2, 2, 256), np.float32)}, folder / "model.safetensors"
    )
    assert Checkpoint.open(folder).config["drop_vision_last_layer"] is True
    package = export_checkpoint(folder, tmp_path / "package", [load_recipe("fp32")])
    assert package.manifest.source.num_parameters == sum(values.size for values in tensors.values())
