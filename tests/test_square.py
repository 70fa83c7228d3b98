"""Images as squares: pixels are those of transformers' processors for any size; wild shapes are refused."""

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from vlmport.runtime.errors import CapacityError, InputError
from vlmport.runtime.image import ImageOptions, preprocess_images
from vlmport.runtime.manifest import SQUARE_STRATEGIES, ImageSpec, SquareSpec

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PATCH = 14


def spec(strategy: str, side: int = 56, resized: int = 56, **more: Any) -> ImageSpec:
    settings = {
        "patch_size": PATCH,
        "temporal_patch_size": 1,
        "merge_size": 1,
        "min_pixels": side**2,
        "max_pixels": side**2,
        "mean": MEAN,
        "std": STD,
        "rescale": 1 / 255,
        "resample": "bicubic",
        "square": SquareSpec(side, resized, tuple(int(255 * value) for value in MEAN)),
    }
    return ImageSpec(strategy=strategy, **{**settings, **more})


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def as_chw(image: Image.Image, image_spec: ImageSpec) -> np.ndarray:
    """Patches put together again, float32 [3, side, side]."""
    patches = preprocess_images([image], image_spec)
    _, rows, columns = patches.grid
    blocks = patches.pixel_values.reshape(rows, columns, 3, PATCH, PATCH)
    return blocks.transpose(2, 0, 3, 1, 4).reshape(3, rows * PATCH, columns * PATCH)


SIZES = st.tuples(st.integers(1, 120), st.integers(1, 120))


@settings(max_examples=40)
@given(SIZES, st.integers(0, 30))
@example((56, 56), 0)
@example((57, 31), 5)
@example((1, 120), 0)
def test_center_crop_is_clip_s(size: tuple[int, int], more: int) -> None:
    image = picture(*size)
    upstream = CLIPImageProcessorPil(size={"shortest_edge": 56 + more}, crop_size={"height": 56, "width": 56})
    expected = upstream(images=image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(as_chw(image, spec("center_crop", 56, 56 + more)), expected)


@settings(max_examples=40)
@given(SIZES)
@example((56, 57))
@example((31, 30))
def test_pad_square_is_llava_s(size: tuple[int, int]) -> None:
    image = picture(*size)
    upstream = LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    expected = upstream(images=image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(as_chw(image, spec("pad_square")), expected)


@settings(max_examples=20)
@given(SIZES)
def test_stretch_is_a_resize_to_both_sides(size: tuple[int, int]) -> None:
    image = picture(*size)
    upstream = CLIPImageProcessorPil(size={"height": 56, "width": 56}, do_center_crop=False)
    expected = upstream(images=image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(as_chw(image, spec("stretch")), expected)


def test_what_is_left_of_a_patch_is_cut_off_at_the_right_and_bottom() -> None:
    whole, cut = (as_chw(picture(60, 60), spec("stretch", side, side)) for side in (56, 60))
    assert cut.shape == whole.shape == (3, 56, 56)
    upstream = CLIPImageProcessorPil(size={"height": 60, "width": 60}, do_center_crop=False)
    expected = upstream(images=picture(60, 60), return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(cut, expected[:, :56, :56])


def test_a_clip_s_frames_are_squares_one_after_the_other() -> None:
    frames = [picture(70, 60), picture(20, 90)]
    patches = preprocess_images(frames, spec("center_crop"))
    assert patches.grid == (2, 4, 4)
    alone = [preprocess_images([frame], spec("center_crop")).pixel_values for frame in frames]
    np.testing.assert_array_equal(patches.pixel_values, np.concatenate(alone))


@pytest.mark.parametrize("strategy", ["center_crop", "pad_square"])
def test_sides_too_unequal_are_refused_before_memory_is_taken(strategy: str) -> None:
    with pytest.raises(CapacityError, match=r"a\.png: 60000x1 has one side 60000 times the other"):
        preprocess_images([Image.new("RGB", (60000, 1))], spec(strategy), name="a.png")


@pytest.mark.parametrize("option", ["min_pixels", "max_pixels", "max_slice_nums"])
@pytest.mark.parametrize("strategy", SQUARE_STRATEGIES)
def test_options_of_other_strategies_are_refused(strategy: str, option: str) -> None:
    with pytest.raises(InputError, match=f"{option} is no option of this package"):
        preprocess_images([picture(20, 20)], spec(strategy), ImageOptions(**{option: 100}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"square": None}, "square does not go with"),
        ({"square": SquareSpec(13, 13)}, "a merge block at least"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"strategy": "smart_resize"}, "square does not go with"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        spec(**{"strategy": "center_crop", **change})
    with pytest.raises(ValueError, match="less than side"):
        SquareSpec(56, 55)
    with pytest.raises(ValueError, match="from 0 to 255"):
        SquareSpec(56, 56, (0, 256, 0))
