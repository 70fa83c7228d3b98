"""POINTS1.5: its prompts against upstream's joining, its limits of pixels against upstream's formulas."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import config_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlmport.export.families.pointsv1_5_chat import FAMILY, TEMPLATE
from vlmport.runtime.chat_template import ChatTemplate
from vlmport.runtime.errors import InputError
from vlmport.runtime.image import ImageOptions, preprocess_images
from vlmport.runtime.model import Model
from vlmport.runtime.package import Package

GOLDENS = Path(__file__).parent / "goldens" / "points1_5"
FUSED, PLAIN = GOLDENS / "tiny_a_custom_llama", GOLDENS / "tiny_b_qwen2"


# Prompts

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ue000\ue001"), max_size=12)
PARTS = st.one_of(TEXTS.map(lambda text: {"type": "text", "text": text}), st.just({"type": "image"}))
TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant"]), "content": st.one_of(TEXTS, st.lists(PARTS, max_size=4))}
)


@given(messages=st.lists(TURNS, min_size=1, max_size=5))
def test_prompts_are_joined_as_upstream_joins_them(messages: list[dict[str, Any]]) -> None:
    wanted = ""
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        image = "<|vision_start|><|image_pad|><|vision_end|>\n"
        text = "".join(part["text"] if part["type"] == "text" else image for part in parts)
        wanted += f"<|im_start|>{message['role']}\n{text}<|im_end|>\n"
    if messages[-1]["role"] == "user":
        wanted += "<|im_start|>assistant\n"
    assert ChatTemplate(TEMPLATE).render(messages, {"add_generation_prompt": True}) == wanted


def test_what_the_model_cannot_be_asked_is_told(package_of: Callable[[Path], Path]) -> None:
    with Model.load(package_of(PLAIN)) as model:
        with pytest.raises(InputError, match="this model has no system turn"):
            model.prepare([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
        with pytest.raises(InputError, match="takes no video"):
            model.prepare([{"role": "user", "content": [{"type": "video", "video": ["a.png"]}]}])
        prompt = model.prepare([{"role": "user", "content": "An <|image_pad|> in a text is no image"}])
        assert prompt.runs == ()
        assert prompt.position_ids.shape == prompt.input_ids.shape


# Pixels


def upstream_size(
    height: int, width: int, low: int, high: int, limit: int | None, *, small: bool
) -> tuple[int, int] | None:
    """Sides after the item's own limit and the processor's; None where upstream has no answer."""
    if limit is not None and width * height > limit:
        beta = math.sqrt((height * width) / limit)
        width, height = math.floor(width / beta), math.floor(height / beta)
    if min(height, width) < 1 or (
        max(height, width) / min(height, width) > 200 and not (small and min(height, width) < 28)
    ):
        return None
    rows, columns = round(height / 28) * 28, round(width / 28) * 28
    if rows * columns > high:
        beta = math.sqrt((height * width) / high)
        rows, columns = math.floor(height / beta / 28) * 28, math.floor(width / beta / 28) * 28
    elif rows * columns < low:
        beta = math.sqrt(low / (height * width))
        rows, columns = math.ceil(height * beta / 28) * 28, math.ceil(width * beta / 28) * 28
    return (rows, columns) if rows and columns else None


@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    limit=st.one_of(st.none(), st.integers(1, 60000)),
    folder=st.sampled_from([FUSED, PLAIN]),
)
def test_sizes_are_upstreams(width: int, height: int, limit: int | None, folder: Path) -> None:
    documents = {
        name: json.loads((folder / name).read_text()) for name in ("tokenizer.json", "preprocessor_config.json")
    }
    spec = FAMILY.manifest(config_of(folder), documents).image
    assert spec is not None
    wanted = upstream_size(height, width, spec.min_pixels, spec.max_pixels, limit, small=folder == FUSED)
    image = Image.new("RGB", (width, height))
    if wanted is None:
        return  # upstream fails; ours refuses or takes one row of patches
    patches = preprocess_images([image], spec, ImageOptions(max_pixels=limit))
    assert patches.grid == (1, wanted[0] // 14, wanted[1] // 14)
    assert patches.pixel_values.shape == (patches.num_patches, 1176)


def test_thin_images_are_taken_or_refused_in_one_line(package_of: Callable[[Path], Path]) -> None:
    thin, long = Image.new("RGB", (6000, 20)), Image.new("RGB", (6000, 29))
    for folder, picture, told in (
        (FUSED, thin, None),
        (FUSED, long, "over 200"),
        (PLAIN, thin, "over 200"),
    ):
        spec = Package.open(package_of(folder)).manifest.image
        assert spec is not None
        if told is None:
            assert preprocess_images([picture], spec).grid[1] == 2
        else:
            with pytest.raises(InputError, match=told):
                preprocess_images([picture], spec)
    with pytest.raises(InputError, match="has no 50 pixels of its shape; raise max_pixels"):
        preprocess_images([thin], spec, ImageOptions(max_pixels=50))
