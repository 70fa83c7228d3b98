"""Index inputs of the vision encoder: equal to the golden ones, and sound for any grids."""

import json
from itertools import pairwise
from pathlib import Path

import golden_cases as golden
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmport.runtime.errors import PackageError
from vlmport.runtime.manifest import VisionSpec
from vlmport.runtime.vision_inputs import (
    bucketed_positions,
    cu_seqlens,
    cu_window_seqlens,
    patch_positions,
    vision_inputs,
    window_index,
)

ALL = ("patch_positions", "cu_seqlens", "window_index", "cu_window_seqlens")
grids = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)).map(lambda g: (g[0], 2 * g[1], 2 * g[2])),
    min_size=1,
    max_size=4,
)
specs = st.integers(1, 5).map(lambda side: VisionSpec(ALL, merge_size=2, window_blocks=side))


@pytest.mark.parametrize(("case", "kind"), golden.cases_with_pixels(), ids=str)
def test_golden_windows(case: golden.Golden, kind: str) -> None:
    spec = golden.specs(case.folder).vision
    shapes = [tuple(int(n) for n in grid) for grid in case.tensor(f"{kind}_grid_thw")]
    compared = 0
    for name, found in (
        ("window_index", window_index(spec, shapes)),
        ("cu_window_seqlens", cu_window_seqlens(spec, shapes)),
    ):
        expected = case.tensor(f"extra.{name}", kind)
        if expected is not None:
            np.testing.assert_array_equal(found, expected)
            compared += 1
    natural, ordered = case.tensor("vision", kind), case.tensor("extra.vision_window_order", kind)
    if natural is not None and ordered is not None:
        blocks = natural.reshape(-1, spec.merge_size**2, natural.shape[1])
        np.testing.assert_array_equal(blocks[window_index(spec, shapes)].reshape(natural.shape), ordered)
        compared += 1
    assert compared, "an empty comparison proves nothing"


@given(specs, grids)
def test_windows_are_a_permutation_and_stay_inside_frames(spec: VisionSpec, shapes: list[tuple[int, int, int]]) -> None:
    found = vision_inputs(spec, shapes)
    num_patches = sum(t * h * w for t, h, w in shapes)
    order, windows, frames = found["window_index"], found["cu_window_seqlens"], found["cu_seqlens"]
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(num_patches // 4))
    for cumulated in (windows, frames):
        assert cumulated.dtype == np.int32
        assert cumulated[0] == 0
        assert cumulated[-1] == num_patches
        assert (np.diff(cumulated) > 0).all()
    assert set(frames) <= set(windows), "no window crosses from one frame into the next"
    assert len(frames) == 1 + sum(t for t, _, _ in shapes)
    side = 2 * spec.window_blocks
    positions = found["patch_positions"].reshape(-1, 4, 2)[order].reshape(-1, 2)
    for start, stop in pairwise(windows):
        assert len(set(map(tuple, positions[start:stop] // side))) == 1, "a window is one square of the frame"
        assert 0 < stop - start <= side**2


@given(grids)
def test_patch_positions_follow_the_pixel_layout(shapes: list[tuple[int, int, int]]) -> None:
    expected = [
        (2 * block_y + y, 2 * block_x + x)
        for t, h, w in shapes
        for _ in range(t)
        for block_y in range(h // 2)
        for block_x in range(w // 2)
        for y in range(2)
        for x in range(2)
    ]
    found = patch_positions(VisionSpec(ALL, 2, 4), shapes)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, expected)


@given(specs, grids, grids)
def test_a_packed_call_is_its_entries_side_by_side(spec: VisionSpec, first: list, second: list) -> None:
    one, two, both = (vision_inputs(spec, shapes) for shapes in (first, second, first + second))
    for name in ALL:
        offset = {"window_index": len(one["window_index"]), "patch_positions": 0}.get(name, int(one[name][-1].max()))
        rest = two[name] if name in ("window_index", "patch_positions") else two[name][1:]
        np.testing.assert_array_equal(both[name], np.concatenate([one[name], rest + offset]))


def test_only_what_the_manifest_names_is_made() -> None:
    assert set(vision_inputs(VisionSpec(("cu_seqlens",), 2, 0), [(1, 2, 2)])) == {"cu_seqlens"}
    np.testing.assert_array_equal(cu_seqlens(VisionSpec((), 2, 0), [(2, 2, 4), (1, 2, 2)]), [0, 8, 16, 20])
    with pytest.raises(PackageError, match="'masks'"):
        vision_inputs(VisionSpec(("masks",), 2, 4), [(1, 2, 2)])
    with pytest.raises(PackageError, match="window_blocks is 0"):
        vision_inputs(VisionSpec(("window_index",), 2, 0), [(1, 2, 2)])


# Positions in buckets


def axis_buckets(count: int, side: int) -> list[int]:
    spec = VisionSpec(("bucketed_positions",), merge_size=1, window_blocks=0, position_side=side)
    return bucketed_positions(spec, [(1, 1, count)]).tolist()


def test_buckets_are_those_of_the_published_table() -> None:
    file = Path(__file__).parent / "goldens" / "minicpmv" / "tables" / "bucketized_positions.json"
    tables = json.loads(file.read_text(encoding="utf-8"))["tables"]
    assert tables
    for side, rows in tables.items():
        assert {count: axis_buckets(int(count), int(side)) for count in rows} == rows


@pytest.mark.parametrize("side", [70, 35, 24])
def test_buckets_are_those_of_torch_to_the_bit(side: int) -> None:
    for count in (*range(1, 260), 1029, 3763, 14336):
        starts = torch.arange(0, 1 - 1e-6, 1 / torch.tensor(count, dtype=torch.int32))
        expected = torch.bucketize(starts, torch.arange(1 / side, 1.0, 1 / side), right=True)
        assert axis_buckets(count, side) == expected.tolist(), count


def test_bucketed_positions_are_rows_times_the_side_and_columns_frame_by_frame() -> None:
    spec = VisionSpec(("bucketed_positions",), merge_size=1, window_blocks=0, position_side=70)
    rows, columns = axis_buckets(2, 70), axis_buckets(3, 70)
    expected = [row * 70 + column for row in rows for column in columns]
    found = vision_inputs(spec, [(2, 2, 3), (1, 1, 1)])["bucketed_positions"]
    assert found.dtype == np.int64
    assert found.tolist() == [*expected, *expected, 0]
    with pytest.raises(PackageError, match="position_side 0"):
        bucketed_positions(VisionSpec((), 1, 0), [(1, 1, 1)])
    with pytest.raises(PackageError, match="merge_size"):
        bucketed_positions(VisionSpec((), 2, 0, position_side=70), [(1, 2, 2)])
