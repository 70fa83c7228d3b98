"""Clips sampled at midpoints: upstream's frames for any length, lists filled up, stretches in seconds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from test_square import spec as square_spec

from vlmport.runtime.errors import InputError, VlmportError
from vlmport.runtime.manifest import VideoSpec
from vlmport.runtime.messages import read_messages
from vlmport.runtime.midpoints import fill_list, midpoint_frames
from vlmport.runtime.video import ClipOptions, load_clip, sampled_frames

TABLE = Path(__file__).parent / "goldens" / "videollama2" / "tables" / "frame_sampling.json"


def video(**changes: Any) -> VideoSpec:
    said: dict[str, Any] = {
        "sampling": "midpoints",
        "fps": 1.0,
        "min_frames": 1,
        "max_frames": 32,
        "frame_multiple": 1,
        "default_fps": 3.0,
        "num_frames": 4,
        "gif_fps": 25.0,
    }
    return VideoSpec(**{**said, **changes})


IMAGE = square_spec("stretch")


def numbered(count: int) -> np.ndarray:
    """A clip whose frames have their number as colour, uint8 [count, 6, 8, 3]."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 6, 8, 3)).copy()


def numbers(frames: tuple[Image.Image, ...]) -> list[int]:
    return [frame.getpixel((0, 0))[0] for frame in frames]


@pytest.mark.parametrize("row", json.loads(TABLE.read_text())["rows"], ids=lambda row: str(row["total_frames"]))
def test_upstream_s_table(row: dict[str, Any]) -> None:
    spec = video(num_frames=row["num_frames"])
    assert sampled_frames(row["total_frames"], 3.0, spec, ClipOptions()) == row["indices"]
    asked = ClipOptions(num_frames=row["num_frames"])
    assert sampled_frames(row["total_frames"], 3.0, video(), asked) == row["indices"]


@given(st.integers(1, 3000), st.integers(1, 32))
@example(1, 32)
@example(2, 1)
def test_every_clip_gives_as_many_frames_in_order(total: int, count: int) -> None:
    found = midpoint_frames(total, 3.0, count, None, None, "video")
    middles = [(total - 1) / count * (i + 0.5) for i in range(count)]
    assert len(found) == count
    assert found == sorted(found)
    assert 0 <= found[0] <= found[-1] < total
    assert all(abs(index - middle) <= 0.5 + 1e-5 for index, middle in zip(found, middles, strict=True))


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0.9, 3.1, [2, 4, 5, 7]),  # of the golden case
        (3.1, 0.9, [2, 4, 5, 7]),
        (-5, 3.1, [1, 3, 5, 7]),
        (1.0, 1.0, [2, 3, 4, 5]),
        (None, 1.0, [0, 1, 1, 2]),
        (3.0, None, [8, 9, 9, 10]),
        (2.0, 99.0, [6, 7, 8, 9]),
    ],
)
def test_a_stretch_in_seconds(start: float | None, end: float | None, expected: list[int]) -> None:
    assert midpoint_frames(11, 3.0, 4, start, end, "video") == expected


@pytest.mark.parametrize(("start", "end"), [(50.0, 60.0), (None, 0.2), (0.0, 0.1)])
def test_a_stretch_without_frames_is_told(start: float | None, end: float | None) -> None:
    with pytest.raises(InputError, match=r"video: has no frame from second .*change s and e"):
        midpoint_frames(11, 3.0, 4, start, end, "video")


def test_arrays_are_sampled_and_lists_are_not() -> None:
    clip = load_clip(numbered(11), video(), IMAGE)
    assert numbers(clip.frames) == [1, 4, 6, 9]
    clip = load_clip(numbered(11), video(), IMAGE, ClipOptions(s=0.9, e=3.1, fps=3))
    assert numbers(clip.frames) == [2, 4, 5, 7]
    listed = load_clip(list(numbered(11)), video(), IMAGE)
    assert numbers(listed.frames) == list(range(11))
    assert numbers(load_clip(list(numbered(40)), video(), IMAGE).frames) == list(range(32))
    assert numbers(load_clip(numbered(1), video(), IMAGE).frames) == [0, 0, 0, 0]


def test_short_lists_end_in_black_frames_of_sides_swapped() -> None:
    found = load_clip(list(numbered(3)[1:]), video(), IMAGE).frames
    assert [frame.size for frame in found] == [(8, 6), (8, 6), (6, 8), (6, 8)]
    assert numbers(found) == [1, 2, 0, 0]
    assert len(fill_list(found, 2, 3)) == 3


@pytest.mark.parametrize(
    ("source", "options", "told"),
    [
        (numbered(0), {}, "has no frames"),
        ([], {}, "has no frames"),
        (numbered(5), {"num_frames": 1}, "num_frames is 1; give at least 2, or show an image"),
        (numbered(5), {"num_frames": 33}, "over the limit of 32 frames"),
        (numbered(5), {"max_frames": 3}, "max_frames is no option of this package's clips"),
        (numbered(5), {"max_pixels": 300}, "max_pixels is no option of this package's clips"),
    ],
)
def test_what_cannot_be_shown(source: Any, options: dict[str, Any], told: str) -> None:
    with pytest.raises(VlmportError, match=told):
        load_clip(source, video(), IMAGE, ClipOptions(**options))


def test_other_packages_take_no_stretch() -> None:
    spec = video(sampling="strided", num_frames=None)
    with pytest.raises(InputError, match="s is no option of this package's clips"):
        load_clip(numbered(5), spec, IMAGE, ClipOptions(s=1.0))
    with pytest.raises(ValueError, match="num_frames does not go with sampling"):
        video(sampling="strided")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"s": "1"}, "options.s: is '1'; give a number$"),
        ({"e": float("inf")}, "options.e: is inf; give a number$"),
        ({"aspect_ratio": "wide"}, "options.aspect_ratio: is 'wide'; give pad"),
        ({"aspect_ratio": ["pad"]}, "options.aspect_ratio: is .*; give pad"),
    ],
)
def test_options_are_checked_before_anything_is_opened(options: dict[str, Any], told: str) -> None:
    messages = [{"role": "user", "content": [{"type": "video", "video": "nothing.mp4"}]}]
    with pytest.raises(InputError, match=told):
        read_messages(messages, options=options)
    assert read_messages(messages, options={"s": 0, "e": -1.5, "aspect_ratio": "pad"}).visuals[0].clip_options.e == -1.5
