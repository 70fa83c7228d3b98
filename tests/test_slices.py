"""Large images in tiles: sizes are upstream's for any image, tiles lie where they should, wild shapes are refused."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from vlmport.runtime import slices
from vlmport.runtime.errors import CapacityError, InputError, PackageError
from vlmport.runtime.image import ImageOptions, preprocess_images
from vlmport.runtime.manifest import ImageSpec, SliceSpec
from vlmport.runtime.slices import MAX_TILE_PATCHES, Slicing, cut_picture, plan_slices

TABLE = Path(__file__).parent / "goldens" / "minicpmv" / "tables" / "slicing.json"
SPEC = ImageSpec(
    strategy="slices",
    patch_size=14,
    temporal_patch_size=1,
    merge_size=1,
    min_pixels=14 * 14,
    max_pixels=448 * 448,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    rescale=1 / 255,
    resample="bicubic",
    slices=SliceSpec(scale_resolution=448, max_slices=9),
)


def test_sizes_of_the_published_table() -> None:
    document = json.loads(TABLE.read_text(encoding="utf-8"))
    scale, patch = document["settings"]["scale_resolution"], document["settings"]["patch_size"]
    assert len(document["rows"]) > 10
    for row in document["rows"]:
        plan = plan_slices(*row["size_wh"], scale, patch, row["max_slice_nums"])
        found = [plan.grid, plan.overview, plan.refined]
        assert [size and list(size) for size in found] == [
            row["grid_cols_rows"],
            row["source_resize_wh"],
            row["refine_size_wh"],
        ], row
        width, height = plan.overview
        assert [height // patch, width // patch] == row["tgt_size_source_hw"]
        if plan.tile is not None and plan.grid is not None:
            assert [plan.tile[1] // patch, plan.tile[0] // patch] == row["tgt_size_slice_hw"]
            assert math.prod(plan.grid) + 1 == row["num_images"]


def as_specified(width: int, height: int, scale: int, patch: int, most: int) -> Slicing:
    """The specification's own formulas, written down line by line, on purpose unlike the code that they judge."""

    def ensure_divide(n, k):
        return max(round(n / k) * k, k)

    def find_best_resize(w, h, allow_up):
        if w * h > scale * scale or allow_up:
            r = w / h
            h = int(scale / math.sqrt(r))
            w = int(h * r)
        return ensure_divide(w, patch), ensure_divide(h, patch)

    multiple = min(math.ceil(width * height / (scale * scale)), most)
    if multiple <= 1:
        return Slicing(find_best_resize(width, height, True))
    candidates = []
    for n in [multiple - 1, multiple, multiple + 1]:
        if n == 1 or n > most:
            continue
        candidates += [[m, n // m] for m in range(1, n + 1) if n % m == 0]
    errors = [abs(math.log(width / height) - math.log(m / k)) for m, k in candidates]
    cx, cy = candidates[errors.index(min(errors))]  # the first of equals
    rw, rh = ensure_divide(width, cx), ensure_divide(height, cy)
    gw, gh = find_best_resize(rw / cx, rh / cy, True)
    return Slicing(find_best_resize(width, height, False), (cx, cy), (gw * cx, gh * cy))


sides = st.one_of(st.integers(1, 3000), st.integers(1, 200_000))


@given(sides, sides, st.sampled_from([84, 112, 448, 980]), st.sampled_from([7, 14, 16]), st.integers(1, 25))
@example(52800, 44, 448, 14, 9)
@example(44, 52800, 448, 14, 9)
@example(1, 200_000, 448, 14, 9)
@example(449, 448, 448, 14, 9)
def test_any_size_is_cut_as_specified(width: int, height: int, scale: int, patch: int, most: int) -> None:
    plan = plan_slices(width, height, scale, patch, most)
    assert plan == as_specified(width, height, scale, patch, most)
    assert all(side % patch == 0 and side >= patch for side in plan.overview)
    if plan.grid is not None:
        assert plan.tile is not None
        assert 2 <= math.prod(plan.grid) <= most
        assert all(side % patch == 0 and side >= patch for side in plan.tile)


def pixels(values: np.ndarray) -> np.ndarray:
    """The uint8 pixels [patches, 3, p, p] behind normalised ones."""
    return np.round((values * 0.5 + 0.5) * 255).astype(np.uint8).reshape(-1, 3, 14, 14)


def test_tiles_are_cut_row_by_row_from_the_original() -> None:
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 255, (700, 1500, 3), np.uint8))
    picture, plan = cut_picture(image, SPEC), plan_slices(1500, 700, 448, 14, 9)
    assert plan.grid is not None
    assert plan.refined is not None
    assert plan.tile is not None
    assert picture.grid == plan.grid
    assert len(picture.tiles) == 1 + math.prod(plan.grid)
    refined = np.asarray(image.resize(plan.refined, Image.Resampling.BICUBIC))
    (columns, rows), (width, height) = plan.grid, plan.tile
    for index, tile in enumerate(picture.tiles[1:]):
        y, x = divmod(index, columns)
        part = refined[y * height : (y + 1) * height, x * width : (x + 1) * width]
        assert tile.grid == (1, height // 14, width // 14)
        patches = part.reshape(height // 14, 14, width // 14, 14, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 14, 14)
        np.testing.assert_array_equal(pixels(tile.pixel_values), patches)
    assert index == columns * rows - 1
    overview = np.asarray(image.resize(plan.overview, Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(pixels(picture.tiles[0].pixel_values)[0], overview[:14, :14].transpose(2, 0, 1))


def test_one_tile_and_small_images_are_an_overview_alone() -> None:
    image = Image.new("RGB", (1500, 700), (10, 20, 30))
    assert cut_picture(image, SPEC, ImageOptions(max_slice_nums=1)).grid is None
    small = cut_picture(Image.new("RGB", (20, 10)), SPEC)
    assert small.grid is None
    assert small.tiles[0].num_patches > 900  # made larger
    four = cut_picture(image, SPEC, ImageOptions(max_slice_nums=4))
    assert len(four.tiles) <= 5


def test_without_slicing_an_image_keeps_its_size_but_for_the_rest_of_a_patch() -> None:
    spec = replace(SPEC, slices=SliceSpec(448, 9, enabled=False))
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (45, 33, 3), np.uint8))
    picture = cut_picture(image, spec)
    assert picture.grid is None
    assert [tile.grid for tile in picture.tiles] == [(1, 3, 2)]
    expected = np.asarray(image)[14:28, 14:28].transpose(2, 0, 1)
    np.testing.assert_array_equal(pixels(picture.tiles[0].pixel_values)[3], expected)
    with pytest.raises(InputError, match="13x45 is less than one patch"):
        cut_picture(Image.new("RGB", (13, 45)), spec)


# Shapes that no one meant


@pytest.mark.parametrize("size", [(52800, 44), (44, 52800)])
def test_a_very_long_image_works(size: tuple[int, int]) -> None:
    picture = cut_picture(Image.new("RGB", size, (0, 128, 255)), SPEC)
    assert picture.grid is not None
    assert sorted(picture.grid) == [1, 9]
    assert max(tile.num_patches for tile in picture.tiles) <= 3 * 1100
    for tile in picture.tiles:
        assert (pixels(tile.pixel_values)[:, 1] == 128).all()


def test_a_shape_that_upstreams_sizes_run_away_with_is_refused_before_it_is_resized() -> None:
    with pytest.raises(InputError, match=r"photo: 1x4000000 has one side 4000000 times the other.*crop or pad it"):
        cut_picture(Image.new("RGB", (1, 4_000_000)), SPEC, name="photo")
    plan = plan_slices(1, 448 * 448, 448, 14, 1)
    assert math.prod(plan.overview) <= MAX_TILE_PATCHES * 14 * 14


def test_options_of_other_packages_and_wrong_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("RGB", (30, 20))
    with pytest.raises(InputError, match="max_pixels is no option of this package; it has max_slice_nums"):
        cut_picture(image, SPEC, ImageOptions(max_pixels=100))
    with pytest.raises(InputError, match="max_slice_nums is 0"):
        cut_picture(image, SPEC, ImageOptions(max_slice_nums=0))
    plain = replace(SPEC, strategy="smart_resize", slices=None)
    with pytest.raises(InputError, match="use_image_id is no option of this package; it has min_pixels"):
        preprocess_images([image], plain, ImageOptions(use_image_id=False))
    with pytest.raises(PackageError, match="slices"):
        preprocess_images([image], SPEC)
    with pytest.raises(ValueError, match="slices does not go with strategy"):
        replace(SPEC, slices=None)
    monkeypatch.setattr(slices, "MAX_SOURCE_PIXELS", 1_000_000)
    with pytest.raises(CapacityError, match=r"lower max_slice_nums"):
        cut_picture(Image.new("RGB", (1500, 1000)), SPEC, ImageOptions(max_slice_nums=9))
