"""NVLM-D: there are no golden cases, so a whole package is held against transformers' InternVL with the same weights,
and what InternVL has not (added heads, tiles by ratio, tags) against upstream's formulas."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import with_fields, write_checkpoint
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

from vlmport.export.build import export_checkpoint
from vlmport.export.families.nvlm_d import FAMILY, NUM_ADDED_HEADS
from vlmport.export.layers.internvit import LeadingRMSNorm
from vlmport.quant.recipe import load_recipe
from vlmport.runtime.errors import CheckpointError, InputError
from vlmport.runtime.generate import GenerationOptions
from vlmport.runtime.image import ImageOptions, Patches
from vlmport.runtime.manifest import ImageSpec, RatioTileSpec, TileTags
from vlmport.runtime.model import Model
from vlmport.runtime.ratio_tiles import cut_tiles, nearest_grid

WIDTH, HEADS, SIDE, PATCH = 48, 4, 56, 14
FILLER = "<|vision_pad|>"
SPEC = ImageSpec(
    strategy="ratio_tiles",
    patch_size=PATCH,
    temporal_patch_size=1,
    merge_size=1,
    min_pixels=SIDE**2,
    max_pixels=6 * SIDE**2,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    rescale=1 / 255,
    resample="bicubic",
    ratio_tiles=RatioTileSpec(SIDE, 1, 6),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, but for added heads of zeros; the projector is inside as wide as the decoder, as InternVL's."""
    folder = tmp_path_factory.mktemp("nvlm") / "checkpoint"
    write_checkpoint(
        folder, with_fields(FAMILY.tiny_config, llm_config__vocab_size=448, llm_config__intermediate_size=64)
    )
    tensors = load_file(folder / "model.safetensors")
    for name, values in tensors.items():
        if name.endswith("attn.qkv.weight"):
            values.unflatten(0, (3, -1))[:, WIDTH:] = 0
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def package(checkpoint: Path) -> Path:
    export_checkpoint(checkpoint, checkpoint.parent / "package", [load_recipe(n) for n in ("fp32", "int8", "int4")])
    return checkpoint.parent / "package"


def internvl(checkpoint: Path) -> Any:
    """The same model as transformers has it, without the added heads."""
    tensors = load_file(checkpoint / "model.safetensors")
    vision = InternVLVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        image_size=[SIDE, SIDE],
        patch_size=[PATCH, PATCH],
        norm_type="rms_norm",
        use_qk_norm=True,
        attention_bias=False,
        layer_norm_eps=1e-6,
    )
    text = Qwen2Config(**{**with_fields(FAMILY.tiny_config)["llm_config"], "vocab_size": 448, "intermediate_size": 64})
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=431,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    model = InternVLForConditionalGeneration(config).eval()
    renamed = {new: values for name, values in tensors.items() for new, values in as_internvl(name, values)}
    state = model.state_dict()
    missing = {name for name in state if name not in renamed}
    assert missing == {f"model.multi_modal_projector.linear_{n}.bias" for n in (1, 2)}
    renamed |= {name: torch.zeros_like(state[name]) for name in missing}
    model.load_state_dict(renamed)
    return model


def as_internvl(name: str, values: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    if name.endswith("attn.qkv.weight"):
        layer = as_internvl(name.removesuffix("qkv.weight"), values)[0][0]
        parts = values.unflatten(0, (3, -1))[:, :WIDTH]
        return [(f"{layer}{part}_proj.weight", rows.clone()) for part, rows in zip("qkv", parts, strict=True)]
    if "attn.proj.weight" in name:
        values = values[:, :WIDTH].clone()
    elif "_norm.weight" in name and ".attn." in name:
        values = values[:WIDTH].clone()
    for old, new in (
        ("vision_model.embeddings.class_embedding", "model.vision_tower.embeddings.cls_token"),
        ("vision_model.embeddings.position_embedding", "model.vision_tower.embeddings.position_embeddings"),
        ("vision_model.embeddings.patch_embedding", "model.vision_tower.embeddings.patch_embeddings.projection"),
        ("vision_model.encoder.layers", "model.vision_tower.encoder.layer"),
        (".attn.proj", ".attention.projection_layer"),
        (".attn.", ".attention."),
        (".norm1", ".layernorm_before"),
        (".norm2", ".layernorm_after"),
        (".ls1", ".lambda_1"),
        (".ls2", ".lambda_2"),
        ("mlp1.0", "model.multi_modal_projector.layer_norm"),
        ("mlp1.1", "model.multi_modal_projector.linear_1"),
        ("mlp1.3", "model.multi_modal_projector.linear_2"),
        ("language_model.lm_head", "lm_head"),
        ("language_model.model.", "model.language_model."),
    ):
        name = name.replace(old, new)
    return [(name, values)]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def asked(*parts: Any) -> list[dict[str, Any]]:
    shown = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image", **part} for part in parts]
    return [{"role": "user", "content": shown}]


def as_images(tiles: tuple[Patches, ...]) -> np.ndarray:
    """Patches in raster order as pixels [tiles, 3, side, side]."""
    number = SIDE // PATCH
    patches = np.stack([tile.pixel_values for tile in tiles]).reshape(-1, number, number, 3, PATCH, PATCH)
    return patches.transpose(0, 3, 1, 4, 2, 5).reshape(-1, 3, SIDE, SIDE)


@torch.inference_mode()
def test_a_package_answers_as_transformers_internvl(checkpoint: Path, package: Path) -> None:
    """Tiles of two images, and their tags, are ours; all behind that is transformers'."""
    reference = internvl(checkpoint)
    with Model.load(package) as model:
        prepared = model.prepare(asked({"image": picture(90, 40)}, "and", {"image": picture(30, 33, 1)}, "?"))
        assert len(prepared.visuals) == 4
        features = model.encode_vision(prepared.visuals)
        options = GenerationOptions(max_new_tokens=6, ignore_eos=True)
        ids = list(model.generate_prepared(prepared, options).token_ids)
    pixels = torch.from_numpy(as_images(prepared.visuals))
    tower = reference.model.vision_tower(pixels).last_hidden_state[:, 1:].flatten(0, 1)
    np.testing.assert_allclose(features.vision, tower.numpy(), atol=1e-4)
    rows = torch.cat(tuple(reference.model.get_image_features(pixels, return_dict=True).pooler_output))
    np.testing.assert_allclose(features.features, rows.reshape(-1, 64).numpy(), atol=1e-4)
    prompt = torch.from_numpy(prepared.input_ids)[None]
    output = reference.generate(input_ids=prompt, pixel_values=pixels, max_new_tokens=6, do_sample=False)
    assert output[0, prompt.shape[1] :].tolist() == ids


@pytest.mark.parametrize("variant", ["int8", "int4"])
def test_quantized_variants_answer(package: Path, variant: str) -> None:
    with Model.load(package, variant=variant) as model:
        assert model.generate(asked({"image": picture(90, 40)}, "?"), max_new_tokens=3).token_ids


def test_added_heads_do_not_count_in_the_norm() -> None:
    width = WIDTH + NUM_ADDED_HEADS * WIDTH // HEADS
    norm, x = LeadingRMSNorm(WIDTH, width, 1e-6), torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    norm.weight.data = torch.linspace(0.5, 2, width)
    scale = (x[:, :WIDTH].square().sum(1, keepdim=True) / WIDTH + 1e-6).sqrt()
    torch.testing.assert_close(norm(x).detach(), x / scale * norm.weight.detach())


def upstream_grid(width: int, height: int, side: int, fewest: int, most: int) -> tuple[int, int]:
    """dynamic_preprocess and find_closest_aspect_ratio line by line, on purpose unlike the code that they judge."""
    ratios = {
        (i, j)
        for n in range(fewest, most + 1)
        for i in range(1, n + 1)
        for j in range(1, n + 1)
        if fewest <= i * j <= most
    }
    difference, best = float("inf"), (1, 1)
    for ratio in sorted(ratios, key=lambda r: r[0] * r[1]):
        found = abs(width / height - ratio[0] / ratio[1])
        if found < difference:
            difference, best = found, ratio
        elif found == difference and width * height > 0.5 * side * side * ratio[0] * ratio[1]:
            best = ratio
    return best


@settings(max_examples=60)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 12))
@example(448, 448, 6)  # 1 x 1 and 2 x 2 are equally near: a matter of the area
@example(700, 700, 6)
@example(1250, 1000, 6)  # between 1 x 1 and 3 x 2
@example(3000, 1, 6)
def test_grids_are_those_of_upstream(width: int, height: int, most: int) -> None:
    assert nearest_grid(width, height, 448, 1, most) == upstream_grid(width, height, 448, 1, most)


def test_grids_by_hand() -> None:
    assert [nearest_grid(*size, 448, 1, 6) for size in ((448, 448), (700, 700), (1250, 1000), (100, 700))] == [
        (1, 1),
        (2, 2),
        (3, 2),
        (1, 6),
    ]


def test_tiles_are_cut_and_normalised_as_upstream_does_it() -> None:
    """Pillow's resize and crops, then torchvision's ToTensor and Normalize, equal to the bit."""
    image = picture(170, 110)
    found = cut_tiles(image, SPEC)
    assert found.grid == (3, 2)
    resized = image.resize((3 * SIDE, 2 * SIDE))
    corners = [(x * SIDE, y * SIDE) for y in range(2) for x in range(3)]
    squares = [resized.crop((x, y, x + SIDE, y + SIDE)) for x, y in corners] + [image.resize((SIDE, SIDE))]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (SPEC.mean, SPEC.std))
    tensors = [torch.from_numpy(np.array(square)).permute(2, 0, 1).float().div(255) for square in squares]
    expected = torch.stack([(tensor - mean) / std for tensor in tensors])
    np.testing.assert_array_equal(as_images(found.tiles), expected.numpy())
    alone = cut_tiles(picture(40, 40), SPEC)
    assert (len(alone.tiles), alone.grid) == (1, None)


def test_a_request_may_ask_for_fewer_tiles() -> None:
    image = picture(170, 110)
    assert cut_tiles(image, SPEC, ImageOptions(max_slice_nums=2)).grid == (2, 1)
    with pytest.raises(InputError, match=r"a\.png: max_slice_nums is 0; give 1 or more"):
        cut_tiles(image, SPEC, ImageOptions(max_slice_nums=0), name="a.png")
    with pytest.raises(InputError, match="use_image_id is no option of this package; it has max_slice_nums"):
        cut_tiles(image, SPEC, ImageOptions(use_image_id=True))


def test_tags_are_text_and_only_upstream_s_fillers_are_slots(checkpoint: Path, package: Path) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    pad = FILLER * 4
    tiles = "".join(f"<tile_{number}>{pad}" for number in (1, 2))
    spelled = f"<Image>{tiles}<tile_global_thumbnail>{pad}</Image>", f"<Image><tile_global_thumbnail>{pad}</Image>"
    head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    text = f"{head}{spelled[0]}\n{spelled[1]}\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    with Model.load(package) as model:
        prepared = model.prepare(asked({"image": picture(90, 40)}, {"image": picture(30, 30)}, "What is it?"))
        nasty = model.prepare(asked({"image": picture(30, 30)}, f"<image> {FILLER}<tile_1>"))
        again = model.prepare_ids(prepared.input_ids, prepared.visuals)
        with pytest.raises(InputError, match=r"16 fillers \(<\|vision_pad\|>\) for 3 tiles of 4 tokens"):
            model.prepare_ids(prepared.input_ids, prepared.visuals[:3])
    assert prepared.input_ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids
    filler = tokenizer.token_to_id(FILLER)
    assert [prepared.input_ids[run.start : run.start + run.length].tolist() for run in prepared.runs] == [
        [filler] * 4
    ] * 4
    assert (prepared.input_ids == filler).sum() == 16
    assert again.runs == prepared.runs
    assert len(nasty.runs) == 1
    assert (nasty.input_ids == filler).sum() == 4


def test_fillers_that_do_not_stand_together_are_refused(package: Path) -> None:
    with Model.load(package) as model:
        prepared = model.prepare(asked({"image": picture(30, 30)}))
        torn = np.insert(prepared.input_ids, prepared.runs[0].start + 1, 5)
        with pytest.raises(InputError, match="in one stretch"):
            model.prepare_ids(torn, prepared.visuals)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ps_version": "v1"}, "ps_version is 'v1'; only 'v2'"),
        ({"downsample_ratio": 0.25}, "downsample_ratio is 0.25"),
        ({"use_thumbnail": False}, "use_thumbnail is False"),
        ({"dynamic_image_size": False}, "dynamic_image_size is False"),
        ({"force_image_size": 112}, "force_image_size is 112, vision_config.image_size 56"),
        ({"min_dynamic_patch": 7}, "min_dynamic_patch 7 is over max_dynamic_patch 6"),
        ({"select_layer": "last"}, "select_layer is 'last'"),
        ({"select_layer": -4}, "vision layer -4 is asked for, of a tower of 2 layers"),
        ({"vision_config__qk_normalization": False}, "qk_normalization is False"),
        ({"vision_config__qkv_bias": True}, "qkv_bias is True"),
        ({"vision_config__norm_type": "layer_norm"}, "norm_type is 'layer_norm'"),
        ({"vision_config__image_size": 42, "force_image_size": 42}, "3 patches a side; give an even one"),
    ],
)
def test_what_is_not_supported_is_told_by_name(changes: dict[str, Any], words: str) -> None:
    documents = {"tokenizer.json": {"added_tokens": [{"id": 1, "content": "<|im_end|>"}]}}
    assert FAMILY.manifest(with_fields(FAMILY.tiny_config), documents).generation
    with pytest.raises(CheckpointError, match=f"config.json: .*{words}"):
        FAMILY.manifest(with_fields(FAMILY.tiny_config, **changes), documents)


def test_a_manifest_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="ratio_tiles does not go with strategy 'stretch'"):
        replace(SPEC, strategy="stretch")
    with pytest.raises(ValueError, match="min_tiles 3 is over max_tiles 2"):
        RatioTileSpec(SIDE, 3, 2)
    with pytest.raises(ValueError, match=r"without \{number\}"):
        TileTags("", "", "<tile>", "", FILLER, 4)


def test_the_number_of_parameters_is_the_published_one() -> None:
    """79.38 billion with the added heads, half a billion fewer without."""
    file = Path(__file__).parent / "published" / "nvlm_d_72b.json"
    tensors = json.loads(file.read_text(encoding="utf-8"))["tensors"]
    counts = [math.prod([*shape, *map(int, re.findall(r"{(\d+)}", name))]) for name, shape in tensors.items()]
    assert round(sum(counts) / 1e7) == 7938
