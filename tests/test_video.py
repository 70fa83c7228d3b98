"""Clips: lists whole, files and arrays sampled by rule, limits before decoding, one clear line for what is no clip."""

import contextlib
import io
import sys
from dataclasses import replace
from pathlib import Path

import av
import golden_cases as golden
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmport.runtime import video_file
from vlmport.runtime.errors import CapacityError, InputError, MissingDependencyError, PackageError, VlmportError
from vlmport.runtime.image import ImageOptions
from vlmport.runtime.manifest import ImageSpec, VideoSpec
from vlmport.runtime.video import ClipOptions, load_clip, preprocess_clip, sampled_frames

SPECS = golden.specs(golden.folders()[0])
IMAGE: ImageSpec = SPECS.image
VIDEO: VideoSpec = SPECS.video
SMALL = replace(VIDEO, min_pixels=28 * 28, max_pixels=56 * 56)  # so that tests do not resize to full size


def grey_frames(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frame i is all 5 i, so that a frame tells its number."""
    return np.broadcast_to((5 * np.arange(count) % 256)[:, None, None, None], (count, height, width, 3)).astype(
        np.uint8
    )


def numbers(frames: tuple[Image.Image, ...]) -> list[float]:
    """Numbers of frames; within 1.5 where a codec has rounded colours."""
    return pytest.approx([float(np.asarray(frame).mean()) / 5 for frame in frames], abs=1.5)


def video(count: int, fps: int = 25, size: tuple[int, int] = (48, 64), form: str = "mp4") -> bytes:
    stream = io.BytesIO()
    with av.open(stream, "w", format=form) as container:
        track = container.add_stream("mpeg4", rate=fps)
        track.height, track.width, track.pix_fmt = *size, "yuv420p"
        for pixels in grey_frames(count, *size):
            container.mux(track.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(track.encode())
    return stream.getvalue()


MP4, MATROSKA = video(6), video(6, form="matroska")


def test_strided_frames_are_those_of_upstreams_example() -> None:
    """range(0, n, round(fps)), and of more than 64 those at int(i * gap + gap / 2)."""
    spec = replace(VIDEO, sampling="strided", fps=1.0, max_frames=64, min_frames=1, frame_multiple=1)
    assert sampled_frames(100, 29.97, spec, ClipOptions()) == [0, 30, 60, 90]
    assert sampled_frames(3, 0.2, spec, ClipOptions()) == [0, 1, 2]
    every = list(range(0, 7000, 25))
    gap = len(every) / 64
    expected = [every[int(i * gap + gap / 2)] for i in range(64)]
    assert sampled_frames(7000, 25.0, spec, ClipOptions()) == expected
    assert sampled_frames(100, 25.0, spec, ClipOptions(num_frames=2)) == [25, 75]
    assert sampled_frames(100, 25.0, spec, ClipOptions(min_frames=10)) == list(range(5, 100, 10))
    assert sampled_frames(100, 25.0, spec, ClipOptions(max_frames=2)) == [25, 75]
    assert sampled_frames(100, 25.0, spec, ClipOptions(fps=5)) == list(range(0, 100, 5))
    with pytest.raises(InputError, match="9 frames of its 5"):
        sampled_frames(5, 25.0, spec, ClipOptions(num_frames=9))
    with pytest.raises(InputError, match="no frames"):
        sampled_frames(0, 25.0, spec, ClipOptions())


def test_frames_keep_their_size_where_the_spec_has_no_pixel_limits() -> None:
    spec = replace(VIDEO, sampling="strided", fps=1.0, min_pixels=None, max_pixels=None, total_pixels=None)
    clip = load_clip(grey_frames(5), spec, IMAGE, ClipOptions(fps=2))
    assert [frame.size for frame in clip.frames] == [(64, 48)] * 3
    assert [float(np.asarray(frame).mean()) / 5 for frame in clip.frames] == [0, 2, 4]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [("linspace", [0, 14, 28, 42, 57, 71, 85, 99]), ("arange", [0, 12, 25, 37, 50, 62, 75, 87])],
)
def test_the_two_rules_differ_as_the_specification_says(sampling: str, expected: list[int]) -> None:
    assert sampled_frames(100, 25.0, replace(VIDEO, sampling=sampling), ClipOptions()) == expected


@pytest.mark.parametrize(
    ("total", "fps", "options", "expected"),
    [
        (3, 25.0, ClipOptions(), [0, 2]),  # no more than there are, rounded down to a multiple
        (2, 25.0, ClipOptions(), [0, 1]),
        (10, 25.0, ClipOptions(), [0, 3, 6, 9]),  # 0.8 frames wanted, 4 at least
        (10, 25.0, ClipOptions(min_frames=5), [0, 2, 4, 5, 7, 9]),  # 5 becomes 6
        (10, 1.0, ClipOptions(fps=9.0), list(range(10))),
        (10, 1.0, ClipOptions(max_frames=5), [0, 3, 6, 9]),
        (10, 25.0, ClipOptions(num_frames=3), [0, 3, 6, 9]),  # 1.5 pairs, halves to even
        (10, 25.0, ClipOptions(num_frames=2), [0, 9]),
    ],
)
def test_numbers_of_sampled_frames(total: int, fps: float, options: ClipOptions, expected: list[int]) -> None:
    assert sampled_frames(total, fps, VIDEO, options) == expected


@given(st.integers(2, 5000), st.floats(0.1, 240), st.sampled_from(["linspace", "arange"]), st.integers(2, 30))
def test_sampled_frames_exist_and_rise(total: int, fps: float, sampling: str, max_frames: int) -> None:
    found = sampled_frames(total, fps, replace(VIDEO, sampling=sampling), ClipOptions(max_frames=max_frames))
    assert found == sorted(found)
    assert found[0] == 0
    assert found[-1] < total
    assert len(found) % 2 == 0
    assert len(found) <= min(max_frames, total)
    if sampling == "linspace":
        assert found[-1] == total - 1


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 20000), st.integers(1, 384))
def test_linspace_is_that_of_torch(total: int, pairs: int) -> None:
    torch = pytest.importorskip("torch")
    count = min(2 * pairs, total // 2 * 2)
    expected = torch.linspace(0, total - 1, count).round().long().tolist()
    assert sampled_frames(total, 1.0, VIDEO, ClipOptions(num_frames=count)) == expected


@pytest.mark.parametrize("total", [0, 1])
def test_clips_that_are_too_short(total: int) -> None:
    with pytest.raises(InputError, match=rf"has {total or 'no'} frames?; give a video with at least 2"):
        sampled_frames(total, 25.0, VIDEO, ClipOptions())


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(PackageError, match="'random'"):
        sampled_frames(9, 1.0, replace(VIDEO, sampling="random"), ClipOptions())


def test_a_list_is_used_whole_and_in_order(tmp_path: Path) -> None:
    pixels = grey_frames(7)
    files = [tmp_path / f"{i}.png" for i in range(7)]
    for file, frame in zip(files, pixels, strict=True):
        Image.fromarray(frame).save(file)
    clip = load_clip([*files[:3], str(files[3]), pixels[4], Image.fromarray(pixels[5]), files[6]], SMALL, IMAGE)
    assert numbers(clip.frames) == list(range(7))
    assert clip.fps == VIDEO.default_fps
    assert load_clip(files, SMALL, IMAGE, ClipOptions(fps=4.0)).fps == 4.0
    patches = preprocess_clip(clip, IMAGE)
    assert patches.grid[0] == 4, "an odd clip repeats its last frame"
    assert patches.seconds_per_grid == 2 / VIDEO.default_fps
    last = patches.pixel_values.reshape(4, -1, 3, 2, 196)[-1]
    np.testing.assert_array_equal(last[:, :, 0], last[:, :, 1])


@pytest.mark.parametrize("form", ["npy", "array", "mp4", "matroska", "bytes"])
def test_arrays_and_files_are_sampled(tmp_path: Path, form: str) -> None:
    options = ClipOptions(fps=10.0) if form in ("npy", "array") else ClipOptions()  # the rate that it has
    source: str | Path | bytes | np.ndarray = tmp_path / ("clip.npy" if form == "npy" else "clip.mp4")
    if form == "npy":
        np.save(source, grey_frames(50))
    elif form == "array":
        source = grey_frames(50)
    elif form == "bytes":
        source = video(50, fps=10)
    else:
        source.write_bytes(video(50, fps=10, form=form))
    clip = load_clip(source, SMALL, IMAGE, options)
    assert numbers(clip.frames) == [0, 5, 11, 16, 22, 27, 33, 38, 44, 49]
    assert clip.fps == pytest.approx(10 / 50 * 10)
    assert {frame.size for frame in clip.frames} == {(56, 56)}
    assert preprocess_clip(clip, IMAGE).seconds_per_grid == pytest.approx(1.0)


def test_a_video_file_is_sampled_at_the_rate_asked_for() -> None:
    clip = load_clip(video(50, fps=10), SMALL, IMAGE, ClipOptions(fps=1.0, max_frames=4))
    assert numbers(clip.frames) == [0, 16, 33, 49]
    assert clip.fps == pytest.approx(0.8)


def test_frames_share_a_budget_of_pixels() -> None:
    pixels = grey_frames(8, 300, 400)

    def size(**changes: int) -> int:
        spec, options = VIDEO, ClipOptions(fps=2.0)
        for field, value in changes.items():
            if field.startswith("spec_"):
                spec = replace(spec, **{field.removeprefix("spec_"): value})
            else:
                options = replace(options, **{field: value})
        frame = load_clip(pixels, spec, IMAGE, options).frames[0]
        return frame.width * frame.height

    assert size() == 308 * 392
    assert size(spec_min_pixels=50_000, spec_total_pixels=4 * 60_000) <= 60_000, "240k over 8 frames, counted by two"
    assert size(spec_min_pixels=50_000, spec_total_pixels=1) <= 52_500, "never under 1.05 of the lower limit"
    assert size(min_pixels=150_000, total_pixels=1) > 140_000, "a limit of one clip"
    assert size(spec_min_pixels=50_000, max_pixels=55_000) <= 55_000
    assert size(min_pixels=200_000) >= 200_000
    with pytest.raises(InputError, match="min_pixels 100352 is over max_pixels 5000; raise max_pixels"):
        size(max_pixels=5000)


def test_image_limits_hold_for_clips_too() -> None:
    clip = load_clip(grey_frames(4, 300, 400), VIDEO, IMAGE)
    assert preprocess_clip(clip, IMAGE, ImageOptions(max_pixels=20_000)).num_patches * 196 <= 2 * 20_000


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (ClipOptions(fps=0.0), InputError, "fps is 0.0"),
        (ClipOptions(fps=float("nan")), InputError, "fps is nan"),
        (ClipOptions(fps=float("inf")), InputError, "fps is inf"),
        (ClipOptions(max_frames=-4), InputError, "max_frames is -4"),
        (ClipOptions(max_frames=10**6), CapacityError, "max_frames 1000000 is over the limit of 768"),
        (ClipOptions(num_frames=10**6), CapacityError, "num_frames 1000000 is over the limit of 768"),
        (ClipOptions(num_frames=100), InputError, "100 frames of its 4 would be shown"),
        (ClipOptions(min_pixels=10**12, max_pixels=10**11), InputError, "is over max_pixels"),
        (ClipOptions(min_pixels=10**12), CapacityError, "makes frames of 1154720x866040; lower it"),
    ],
)
def test_wishes_that_cannot_be_met(options: ClipOptions, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_clip(grey_frames(4), VIDEO, IMAGE, options)


def test_limits_come_before_decoding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="64x48 are over the limit of 100"):
        load_clip(video(4), VIDEO, IMAGE, max_source_pixels=100)
    with pytest.raises(CapacityError, match="769 frames are over the limit of 768"):
        load_clip(["missing.png"] * 769, VIDEO, IMAGE)
    monkeypatch.setattr(video_file, "MAX_SOURCE_FRAMES", 30)
    with pytest.raises(CapacityError, match="more than 30 frames"):
        load_clip(video(31), VIDEO, IMAGE)
    np.save(tmp_path / "clip.npy", grey_frames(2, 4, 4))
    data = (tmp_path / "clip.npy").read_bytes()
    (tmp_path / "clip.npy").write_bytes(data.replace(b"(2, 4, 4, 3)", b"(9**9, 4,4,3)"))
    with pytest.raises(InputError, match=r"clip\.npy: is a damaged \.npy file"):
        load_clip(tmp_path / "clip.npy", VIDEO, IMAGE)


@pytest.mark.parametrize(
    "array", [np.zeros((4, 8, 8), np.uint8), np.zeros((4, 8, 8, 3)), np.zeros((4, 8, 8, 1), np.uint8)]
)
def test_arrays_of_other_kinds(array: np.ndarray) -> None:
    with pytest.raises(InputError, match="give uint8"):
        load_clip(array, VIDEO, IMAGE)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("none.mp4", b"", r"is empty \(0 bytes\)"),
        ("text.mp4", b"I am no video", "is not a video of a known format"),
        ("cut.mp4", video(50)[:2000], "is not a video of a known format"),
        (
            "list.m3u8",
            b"#EXTM3U\n#EXTINF:10,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n",
            "is not a video of a known format",
        ),
        ("x.npy", b"PK\x03\x04 a zip", r"is not an \.npy file"),
        ("y.npy", b"\x93NUM", r"is not an \.npy file"),
        ("z.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': '|O', }", r"is a damaged \.npy file"),
    ],
)
def test_what_is_no_clip_is_told_in_one_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        load_clip(tmp_path / name, VIDEO, IMAGE, name="messages[0].content[0]")
    assert str(caught.value).startswith("messages[0].content[0]: ")
    assert "\n" not in str(caught.value)


def test_pickles_in_npy_are_never_read(tmp_path: Path) -> None:
    np.save(tmp_path / "clip.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="damaged"):
        load_clip(tmp_path / "clip.npy", VIDEO, IMAGE)


def test_empty_lists_and_missing_frames() -> None:
    with pytest.raises(InputError, match="has no frames"):
        load_clip([], VIDEO, IMAGE)
    with pytest.raises(InputError, match="No such file"):
        load_clip("none.mp4", VIDEO, IMAGE)
    with pytest.raises(InputError, match=r"video frame 1: none\.png: cannot be read"):
        load_clip([np.zeros((8, 8, 3), np.uint8), "none.png"], VIDEO, IMAGE)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_damage_never_shows_as_anything_but_our_errors(data: st.DataObject) -> None:
    raw = bytearray(data.draw(st.sampled_from([MP4, MATROSKA])))
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(VlmportError):
        assert load_clip(
            bytes(raw[: data.draw(st.integers(1, len(raw)))]), SMALL, IMAGE, max_source_pixels=10**6
        ).frames


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_npy_headers_are_told(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    file = tmp_path_factory.mktemp("npy") / "clip.npy"
    np.save(file, grey_frames(4, 8, 8))
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 127))] = data.draw(st.integers(0, 255))
    file.write_bytes(raw)
    with contextlib.suppress(VlmportError):
        assert load_clip(file, SMALL, IMAGE).frames


def test_without_pyav_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "clip.mp4").write_bytes(b"...")
    with pytest.raises(MissingDependencyError, match=r"vlmport\[video\]"):
        load_clip(tmp_path / "clip.mp4", VIDEO, IMAGE)
    assert load_clip(grey_frames(4), SMALL, IMAGE).frames, "arrays need no PyAV"
