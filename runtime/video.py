"""Clips: from a list of frames, an array or a video file to the patches that the vision encoder takes.

A list of frames is used whole, in order. Arrays and files are sampled: so many frames a second, within bounds, and each
sampled frame is fitted to a budget of pixels as it is decoded, so that a long video never stands in memory.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tokenize import TokenError

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .errors import CapacityError, InputError, PackageError
from .image import (
    MAX_SOURCE_PIXELS,
    RESAMPLE,
    ImageOptions,
    ImageSource,
    Patches,
    check_plain_file,
    load_image,
    preprocess_images,
    smart_resize,
    source_label,
)
from .manifest import ImageSpec, VideoSpec
from .midpoints import fill_list, midpoint_frames
from .video_file import MAX_SOURCE_FRAMES, open_video

__all__ = ["SAMPLING", "Clip", "ClipOptions", "ClipSource", "load_clip", "preprocess_clip", "sampled_frames"]

SAMPLING = ("linspace", "arange", "strided", "midpoints")  # what VideoSpec.sampling may be

_PIXELS = ("min_pixels", "max_pixels", "total_pixels")
# What numpy raises for damaged .npy headers, which it reads as Python text.
_NPY_DAMAGE = (OSError, ValueError, TypeError, LookupError, OverflowError, SyntaxError, RecursionError, TokenError)

ClipSource = Sequence[ImageSource] | str | Path | bytes | NDArray[np.uint8]


@dataclass(frozen=True)
class ClipOptions:
    """Wishes for one clip, in place of the package's own."""

    fps: float | None = None  # of a list or array: its own rate; of a video file: the rate to sample at
    num_frames: int | None = None  # sample so many, whatever the rate
    min_frames: int | None = None
    max_frames: int | None = None
    min_pixels: int | None = None  # a frame
    max_pixels: int | None = None
    total_pixels: int | None = None  # over all frames
    s: float | None = None  # seconds: where in the clip to start, and to end
    e: float | None = None


@dataclass(frozen=True)
class Clip:
    """Frames to be shown to the model, RGB, and how many of them make a second."""

    frames: tuple[Image.Image, ...]
    fps: float


@dataclass(frozen=True)
class _Wish:
    """How a source becomes a clip, and what messages call it."""

    spec: VideoSpec
    image_spec: ImageSpec
    options: ClipOptions
    max_source_pixels: int
    label: str


def load_clip(
    source: ClipSource,
    spec: VideoSpec,
    image_spec: ImageSpec,
    options: ClipOptions | None = None,
    *,
    max_source_pixels: int = MAX_SOURCE_PIXELS,
    name: str = "",
) -> Clip:
    """Loads frames in a list as they are; samples an array uint8 [T, H, W, 3], an .npy file of one, or a video file.

    Limits of frames and pixels are checked before anything is decoded. Raises InputError for what is no clip or has too
    few frames, CapacityError over a limit, MissingDependencyError for a video file without PyAV.
    """
    label = source_label(source, name) if isinstance(source, (str, Path)) else name or "video"
    wish = _Wish(spec, image_spec, _checked(options or ClipOptions(), spec, label), max_source_pixels, label)
    if isinstance(source, np.ndarray):
        return _load_array(source, wish)
    if isinstance(source, (str, Path)):
        if not check_plain_file(source, label):
            raise InputError(f"{label}: is empty (0 bytes); copy the video again")
        if Path(source).suffix == ".npy":
            return _load_array(_open_npy(Path(source), label), wish)
    if isinstance(source, (str, Path, bytes)):
        return _load_file(source, wish)
    return _load_list(source, wish)


def preprocess_clip(
    clip: Clip, image_spec: ImageSpec, options: ImageOptions | None = None, *, name: str = "video"
) -> Patches:
    """Patches of a clip, within the pixel limits of images as the reference does. See preprocess_images for errors."""
    patches = preprocess_images(clip.frames, image_spec, options, name=name)
    return replace(patches, seconds_per_grid=image_spec.temporal_patch_size / clip.fps)


def sampled_frames(total: int, fps: float, spec: VideoSpec, options: ClipOptions, name: str = "video") -> list[int]:
    """Which of `total` frames at `fps` a second to show, rising.

    The number is smart_nframes of qwen-vl-utils 0.0.10 (and of transformers 5): time times the wanted rate, within
    bounds, down to a multiple. "linspace" (qwen-vl-utils) spreads them from the first to the last frame; "arange"
    (transformers 5) takes the first of each of n equal stretches. "strided" takes every n-th frame, and of too many the
    middle of each of so many stretches (MiniCPM-V's example). "midpoints" is runtime/midpoints.py. Raises InputError
    for too short a clip.
    """
    if spec.sampling == "midpoints":
        assert spec.num_frames is not None
        _refuse(options, name, "fps", "min_frames", "max_frames", *_PIXELS, known="num_frames, s and e")
        num_frames = spec.num_frames if options.num_frames is None else options.num_frames
        if num_frames < min(spec.num_frames, 2):
            raise InputError(f"{name}: num_frames is {num_frames}; give at least 2, or show an image")
        return midpoint_frames(total, fps, num_frames, options.s, options.e, name)
    _refuse(options, name, "s", "e", known="fps, num_frames, min_frames and max_frames")
    if spec.sampling == "strided":
        return _strided(total, fps, spec, options, name)
    multiple = spec.frame_multiple
    if total < multiple:
        raise InputError(f"{name}: has {total or 'no'} frames; give a video with at least {multiple}")
    if options.num_frames is not None:
        count = round(options.num_frames / multiple) * multiple
    else:
        low = math.ceil((options.min_frames or spec.min_frames) / multiple) * multiple
        high = math.floor(min(options.max_frames or spec.max_frames, total) / multiple) * multiple
        wanted = total / fps * (options.fps or spec.fps)
        count = math.floor(min(max(wanted, low), high, total) / multiple) * multiple
    if not multiple <= count <= total:
        raise InputError(
            f"{name}: {count} frames of its {total} would be shown, not {multiple} to {total}; give a longer one"
        )
    if spec.sampling == "linspace":
        return _linspace(total, count)
    if spec.sampling == "arange":
        # In float32 as torch does; torch's own arange may give one index too many, past the end.
        return np.arange(0, total, total / count).astype(np.float32).astype(int)[:count].tolist()
    raise PackageError(f"vlmport.json: video.sampling {spec.sampling!r} is not one of {', '.join(SAMPLING)}")


def _strided(total: int, fps: float, spec: VideoSpec, options: ClipOptions, name: str) -> list[int]:
    if total < 1:
        raise InputError(f"{name}: has no frames; give a video with at least 1")
    frames = list(range(0, total, max(round(fps / (options.fps or spec.fps)), 1)))
    wanted = max(min(len(frames), options.max_frames or spec.max_frames), options.min_frames or 1)
    wanted = options.num_frames or wanted
    if wanted == len(frames):
        return frames
    if options.num_frames is not None or wanted > len(frames):
        frames = list(range(total))
    if wanted > total:
        raise InputError(f"{name}: {wanted} frames of its {total} would be shown; give a longer one")
    gap = len(frames) / wanted
    return [frames[int(i * gap + gap / 2)] for i in range(wanted)]


def _refuse(options: ClipOptions, name: str, *unknown: str, known: str) -> None:
    """Raises InputError where one of `unknown` is given to a package that samples otherwise."""
    for option in unknown:
        if getattr(options, option) is not None:
            raise InputError(f"{name}: {option} is no option of this package's clips; they have {known}")


def _linspace(total: int, count: int) -> list[int]:
    """torch.linspace(0, total - 1, count).round() to the bit: float32, from both ends, multiply-adds rounded once."""
    end = np.float32(total - 1)
    step = np.float64(end / np.float32(max(count - 1, 1)))
    index = np.arange(count)
    from_start = (step * index).astype(np.float32)
    from_end = (np.float64(end) - step * (count - 1 - index)).astype(np.float32)
    return np.round(np.where(index < count // 2, from_start, from_end)).astype(int).tolist()


def _load_list(source: Sequence[ImageSource], wish: _Wish) -> Clip:
    spec, label = wish.spec, wish.label
    if not source:
        raise InputError(f"{label}: has no frames; give at least one")
    if spec.num_frames is not None:
        source = source[: spec.max_frames]
    if len(source) > spec.max_frames:
        raise CapacityError(f"{label}: {len(source)} frames are over the limit of {spec.max_frames}; leave some out")
    frames = (
        load_image(frame, max_source_pixels=wish.max_source_pixels, name=f"{label} frame {i}")
        for i, frame in enumerate(source)
    )
    shown = tuple(frames)
    if spec.num_frames is not None:
        shown = fill_list(shown, spec.num_frames, spec.max_frames)
    return Clip(shown, wish.options.fps or spec.default_fps)


def _load_array(array: NDArray[np.uint8], wish: _Wish) -> Clip:
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        raise InputError(f"{wish.label}: is {array.dtype}{list(array.shape)}; give uint8 [frames, height, width, 3]")
    total, height, width, _ = array.shape
    if total > MAX_SOURCE_FRAMES:
        raise CapacityError(f"{wish.label}: {total} frames are over the limit of {MAX_SOURCE_FRAMES}; cut the clip")
    rate = wish.options.fps or wish.spec.default_fps
    indices = sampled_frames(total, rate, wish.spec, replace(wish.options, fps=None), wish.label)
    if not 0 < height * width <= wish.max_source_pixels:
        raise CapacityError(
            f"{wish.label}: frames of {width}x{height} are not within 1 to {wish.max_source_pixels} pixels; resize them"
        )
    frames = (Image.fromarray(np.ascontiguousarray(array[i])) for i in indices)
    return Clip(_fitted(frames, len(indices), wish), len(indices) / total * rate)


def _load_file(source: str | Path | bytes, wish: _Wish) -> Clip:
    with open_video(source, wish.label, wish.max_source_pixels) as video:
        is_gif = isinstance(source, (str, Path)) and Path(source).suffix == ".gif"
        fps = wish.spec.gif_fps if is_gif and wish.spec.gif_fps is not None else video.fps
        indices = sampled_frames(video.num_frames, fps, wish.spec, wish.options, wish.label)
        frames = _fitted(video.frames(indices), len(indices), wish)
        return Clip(frames, len(indices) / video.num_frames * fps)


def _open_npy(file: Path, label: str) -> NDArray[np.uint8]:
    """Maps an .npy file, so that frames that are not sampled are never read."""
    try:
        with file.open("rb") as stream:
            if stream.read(6) != b"\x93NUMPY":
                raise InputError(f"{label}: is not an .npy file; save the clip with numpy.save")
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except _NPY_DAMAGE as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{label}: is a damaged .npy file ({error}); save the clip again") from error


def _fitted(frames: Iterable[Image.Image], count: int, wish: _Wish) -> tuple[Image.Image, ...]:
    """Each frame resized to the pixels that `count` of them may have (fetch_video of qwen-vl-utils 0.0.10)."""
    spec, options = wish.spec, wish.options
    if spec.min_pixels is None or spec.max_pixels is None or spec.total_pixels is None:
        return tuple(frames)
    low = options.min_pixels or spec.min_pixels
    total = options.total_pixels or spec.total_pixels
    high = max(min(spec.max_pixels, total / count * spec.frame_multiple), int(low * 1.05))
    high = min(high, options.max_pixels or high)
    if low > high:
        raise InputError(f"{wish.label}: min_pixels {low} is over max_pixels {high:.0f}; raise max_pixels")
    return tuple(_resized(frame, low, high, wish) for frame in frames)


def _resized(frame: Image.Image, low: int, high: float, wish: _Wish) -> Image.Image:
    spec = wish.image_spec
    try:
        height, width = smart_resize(frame.height, frame.width, spec.patch_size * spec.merge_size, low, high)
    except InputError as error:
        raise InputError(f"{wish.label}: {error}") from error
    if height * width > MAX_SOURCE_PIXELS:
        raise CapacityError(f"{wish.label}: min_pixels {low} makes frames of {width}x{height}; lower it")
    return frame.resize((width, height), RESAMPLE[spec.resample])


def _checked(options: ClipOptions, spec: VideoSpec, name: str) -> ClipOptions:
    """Options with every number above 0, and no more frames than the package allows."""
    for option, value in vars(options).items():
        if value is not None and option not in ("s", "e") and not 0 < value < math.inf:
            raise InputError(f"{name}: {option} is {value}; give a number above 0")
    for option in ("num_frames", "min_frames", "max_frames"):
        value = getattr(options, option)
        if value is not None and value > spec.max_frames:
            raise CapacityError(f"{name}: {option} {value} is over the limit of {spec.max_frames} frames; lower it")
    return options
