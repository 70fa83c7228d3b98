"""Images: from a file to the patches that the vision encoder takes.

Dims: T frames, C = 3 channels, H W pixels after the resize, P patches of p x p pixels, m merge side in patches.

The order of operations is that of the reference's Pillow processor, so that pixels are equal to the bit: RGB, resize in
uint8, times 1/255 in float64 rounded to float32, minus mean, over std in float32. A pixel has 256 values, so the last
three steps are a table of 256 entries a channel.

EXIF orientation is not applied and alpha is dropped, not blended: the reference does neither.
"""

import io
import math
import stat
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .area import area_size
from .errors import CapacityError, InputError, PackageError
from .manifest import SQUARE_STRATEGIES, ImageSpec
from .square import make_square, pad_to_square

__all__ = [
    "MAX_SOURCE_PIXELS",
    "RESAMPLE",
    "ImageOptions",
    "ImageSource",
    "Patches",
    "check_plain_file",
    "fit",
    "load_image",
    "native_size",
    "patchify",
    "preprocess_images",
    "smart_resize",
    "source_label",
]

MAX_SOURCE_PIXELS = 178_956_970  # of an image as stored; the limit at which Pillow itself refuses
_MAX_FILE_BYTES = 1 << 30  # more than MAX_SOURCE_PIXELS take in any format below
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # of Pillow's many; some others start programs
RESAMPLE = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# What Pillow raises for damaged files, by format and place of the damage.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError, struct.error, zlib.error)
_MAX_RATIO = 200  # of the sides; the reference refuses more

ImageSource = str | Path | bytes | Image.Image | NDArray[np.uint8]


@dataclass(frozen=True)
class ImageOptions:
    """Wishes for one image, in place of the package's own settings; each strategy knows those of its kind."""

    min_pixels: int | None = None
    max_pixels: int | None = None
    max_slice_nums: int | None = None  # the most tiles of an image (runtime/slices.py)
    use_image_id: bool | None = None  # whether the prompt numbers its pictures
    aspect_ratio: str | None = None  # "pad": to a square first, where images become squares (runtime/square.py)

    def refuse(self, name: str, *unknown: str, known: str) -> None:
        """Raises InputError where one of `unknown` is given, to a package that has only `known`."""
        for option in unknown:
            if getattr(self, option) is not None:
                raise InputError(f"{name}: {option} is no option of this package; it has {known}")


@dataclass(frozen=True)
class Patches:
    """One image or clip as the vision encoder takes it: merge blocks in raster order, each block's patches together."""

    pixel_values: NDArray[np.float32]  # [P, C * frames a patch * p * p], columns channel, frame, y, x
    grid: tuple[int, int, int]  # frames over frames a patch, rows, columns; in patches
    seconds_per_grid: float | None = None  # time from one grid row of frames to the next; None: a still image
    kept: NDArray[np.int64] | None = None  # which of the grid's patches pixel_values holds, in its order; None: all

    @property
    def num_patches(self) -> int:
        return math.prod(self.grid)

    def num_tokens(self, merge_size: int) -> int:
        """Tokens that it takes in a prompt: one a merge block."""
        return self.num_patches // merge_size**2


def load_image(source: ImageSource, *, max_source_pixels: int = MAX_SOURCE_PIXELS, name: str = "") -> Image.Image:
    """Decodes an image from a file, its bytes, an array uint8 [H, W, 3] or a Pillow image, to RGB.

    The number of pixels is read from the header, before anything is decoded. `name` stands in messages where the source
    has no name of its own. Raises CapacityError over `max_source_pixels` and InputError for what is no readable image.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, max_source_pixels, name or "image array")
    if isinstance(source, Image.Image):
        return _decode(source, max_source_pixels, name or "image")
    if isinstance(source, bytes):
        return _from_bytes(source, max_source_pixels, name or "image data")
    label = source_label(source, name)
    return _from_bytes(_read_plain_file(source, label), max_source_pixels, label)


def source_label(source: str | Path, name: str) -> str:
    """How messages call a file: where it was asked for, and its name on one line."""
    text = str(source) if str(source).isprintable() else ascii(str(source))
    return f"{name}: {text}" if name else text


def check_plain_file(path: str | Path, label: str) -> int:
    """Bytes of a plain file; devices, pipes and folders are refused before they are opened. Raises InputError."""
    try:
        status = Path(path).stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{label}: cannot be read ({reason}); check the path") from error
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{label}: is not a plain file; give the path of an image or video file")
    return status.st_size


def _read_plain_file(path: str | Path, label: str) -> bytes:
    size = check_plain_file(path, label)
    if size > _MAX_FILE_BYTES:
        raise CapacityError(f"{label}: {size} bytes are over the limit of {_MAX_FILE_BYTES} for an image; convert it")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{label}: cannot be read ({error.strerror}); check the permissions") from error


def _from_bytes(data: bytes, max_source_pixels: int, label: str) -> Image.Image:
    if not data:
        raise InputError(f"{label}: is empty (0 bytes); copy the image again")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise CapacityError(f"{label}: {str(error).partition(', could be')[0]}; make the image smaller") from error
    except _DAMAGE as error:
        raise InputError(
            f"{label}: is not an image of a known format ({', '.join(_FORMATS)}), or its header is damaged"
        ) from error
    return _decode(image, max_source_pixels, label)


def _decode(image: Image.Image, max_source_pixels: int, label: str) -> Image.Image:
    _check_pixels(image.height, image.width, max_source_pixels, label)
    try:
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise CapacityError(f"{label}: {str(error).partition(', could be')[0]}; make the image smaller") from error
    except _DAMAGE as error:
        raise InputError(f"{label}: is a damaged image ({error}); copy or convert it again") from error


def _from_array(array: NDArray[np.uint8], max_source_pixels: int, label: str) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise InputError(f"{label}: is {array.dtype}{list(array.shape)}; give uint8 [height, width, 3]")
    _check_pixels(array.shape[0], array.shape[1], max_source_pixels, label)
    return Image.fromarray(np.ascontiguousarray(array))


def _check_pixels(height: int, width: int, max_source_pixels: int, label: str) -> None:
    if height < 1 or width < 1:
        raise InputError(f"{label}: has no pixels ({width}x{height}); give another image")
    if height * width > max_source_pixels:
        raise CapacityError(
            f"{label}: {width}x{height} is {height * width} pixels, over the limit of {max_source_pixels}; "
            "make the image smaller or raise the limit"
        )


def preprocess_images(
    frames: Sequence[Image.Image], spec: ImageSpec, options: ImageOptions | None = None, *, name: str = "image"
) -> Patches:
    """Patches of one image (a single frame) or of the frames of one clip, all resized to what the first one asks for.

    Too few frames for a whole patch in time repeat the last one. Raises InputError for sides that cannot be fitted and
    CapacityError where the options ask for more pixels than MAX_SOURCE_PIXELS.
    """
    assert frames, "an image or a clip has at least one frame"
    strategies: dict[str, _Strategy] = {
        "smart_resize": _smart_resized,
        "shrink_then_smart_resize": _shrunk_first,
        "native": _native,
        "fixed_area": _fixed_area,
        **dict.fromkeys(SQUARE_STRATEGIES, _squared),
    }
    if spec.strategy not in strategies:
        raise PackageError(
            f"vlmport.json: image.strategy {spec.strategy!r} is not one of {', '.join(strategies)}; "
            "export the checkpoint again"
        )
    options = options or ImageOptions()
    options.refuse(name, "max_slice_nums", "use_image_id", known="min_pixels and max_pixels")
    if spec.square is None:
        options.refuse(name, "aspect_ratio", known="min_pixels and max_pixels")
    return strategies[spec.strategy](frames, spec, options, name)


_Strategy = Callable[[Sequence[Image.Image], ImageSpec, ImageOptions, str], Patches]


def _smart_resized(frames: Sequence[Image.Image], spec: ImageSpec, options: ImageOptions, name: str) -> Patches:
    """As Qwen2-VL does it. The options replace the package's limits."""
    return _resized(frames, *fit(frames[0], spec, options, name), spec, name)


def _shrunk_first(frames: Sequence[Image.Image], spec: ImageSpec, options: ImageOptions, name: str) -> Patches:
    """As POINTS1.5 does it: an image over `max_pixels` of the options is made smaller by itself, and fitted after that.

    So what is asked for with one image bounds it before the package's own limits, which may enlarge it again.
    """
    limit = options.max_pixels
    height, width = frames[0].height, frames[0].width
    if limit is not None and limit < 1:
        raise InputError(f"{name}: max_pixels is {limit}; give a number of pixels above 0")
    if limit is not None and height * width > limit:
        shrink = math.sqrt((height * width) / limit)
        size = math.floor(width / shrink), math.floor(height / shrink)
        if min(size) < 1:
            raise InputError(f"{name}: {width}x{height} has no {limit} pixels of its shape; raise max_pixels")
        frames = [frame.resize(size, Image.Resampling.BICUBIC) for frame in frames]
    return _smart_resized(frames, spec, replace(options, max_pixels=None), name)


def _native(frames: Sequence[Image.Image], spec: ImageSpec, options: ImageOptions, name: str) -> Patches:
    """Each image at its own size, as far as that is a whole number of patches and the position tables reach."""
    low, high = _limits(spec, options, name)
    try:
        height, width = native_size(frames[0].height, frames[0].width, spec, low, high)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    return _resized(frames, height, width, spec, name)


def _squared(frames: Sequence[Image.Image], spec: ImageSpec, options: ImageOptions, name: str) -> Patches:
    """Each image as the square that the vision encoder takes; a convolution leaves out what makes no whole patch."""
    assert spec.square is not None
    options.refuse(name, "min_pixels", "max_pixels", known="images of one size")
    if options.aspect_ratio == "pad":
        frames = [pad_to_square(frame, spec.square, MAX_SOURCE_PIXELS, name) for frame in frames]
    block = spec.patch_size * spec.merge_size
    whole = slice(0, spec.square.side // block * block)
    return patchify([make_square(frame, spec, MAX_SOURCE_PIXELS, name)[whole, whole] for frame in frames], spec)


def _fixed_area(frames: Sequence[Image.Image], spec: ImageSpec, options: ImageOptions, name: str) -> Patches:
    """All images scaled to one area, as EVEv2 does it. The option replaces the package's."""
    options.refuse(name, "min_pixels", known="max_pixels")
    pixels = spec.max_pixels if options.max_pixels is None else options.max_pixels
    if pixels < 1:
        raise InputError(f"{name}: max_pixels is {pixels}; give a number of pixels above 0")
    size = area_size(frames[0].height, frames[0].width, spec.patch_size * spec.merge_size, pixels)
    return _resized(frames, *size, spec, name)


def _resized(frames: Sequence[Image.Image], height: int, width: int, spec: ImageSpec, name: str) -> Patches:
    if height * width * len(frames) > MAX_SOURCE_PIXELS:
        raise CapacityError(
            f"{name}: {len(frames)} frames of {width}x{height} are over the limit of {MAX_SOURCE_PIXELS} pixels; "
            "lower min_pixels or max_pixels"
        )
    resample = RESAMPLE[spec.resample]
    return patchify([np.asarray(frame.resize((width, height), resample)) for frame in frames], spec)


def fit(image: Image.Image, spec: ImageSpec, options: ImageOptions, name: str) -> tuple[int, int]:
    """Height and width that an image is resized to. Raises InputError naming the limit that is wrong."""
    low, high = _limits(spec, options, name)
    try:
        factor = spec.patch_size * spec.merge_size
        return smart_resize(image.height, image.width, factor, low, high, thin_ok=spec.small_sides_any_ratio)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _limits(spec: ImageSpec, options: ImageOptions, name: str) -> tuple[int, int]:
    """The fewest and most pixels of an image: the package's own, as far as the options say no others."""
    limits = {"min_pixels": spec.min_pixels, "max_pixels": spec.max_pixels}
    if options.min_pixels is not None:
        limits["min_pixels"] = options.min_pixels
    if options.max_pixels is not None:
        limits["max_pixels"] = options.max_pixels
    for option, value in limits.items():
        if value < 1:
            raise InputError(f"{name}: {option} is {value}; give a number of pixels above 0")
    if limits["min_pixels"] > limits["max_pixels"]:
        raise InputError(
            f"{name}: min_pixels {limits['min_pixels']} is over max_pixels {limits['max_pixels']}; raise max_pixels"
        )
    return limits["min_pixels"], limits["max_pixels"]


def native_size(height: int, width: int, spec: ImageSpec, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Sides of whole patches, no longer than `max_sides`, as near as can be to the image's own size and shape.

    An image that fits keeps every pixel. One that is too large shrinks, one of less than a patch a side grows, both in
    shape; then each side goes to the nearest whole patch. Raises InputError where a side would round to nothing.
    """
    assert spec.max_sides is not None
    size, area = spec.patch_size, height * width
    grown = max(1.0, math.sqrt(min_pixels / area), size / min(height, width))
    scale = min(grown, math.sqrt(max_pixels / area), spec.max_sides[0] / height, spec.max_sides[1] / width)
    rows, columns = round(height * scale / size), round(width * scale / size)
    if rows * columns * size**2 > max_pixels:
        most = max(1, max_pixels // size**2)  # of one side, where the other is raised to a whole patch
        rows, columns = (min(max(1, math.floor(side * scale / size)), most) for side in (height, width))
    if min(rows, columns) < 1:
        raise InputError(
            f"{width}x{height} is too narrow: of at most {max_pixels} pixels, within "
            f"{spec.max_sides[1]}x{spec.max_sides[0]}, its short side has less than half a patch of {size} pixels; "
            "crop or pad it"
        )
    return rows * size, columns * size


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: float, *, thin_ok: bool = False
) -> tuple[int, int]:
    """The nearest size whose sides are multiples of `factor` and whose area is within the limits, shape kept.

    As transformers' qwen2_vl image processor since 4.50 (earlier ones refuse sides under `factor`), with Python's
    rounding of halves to even. Raises InputError where one side is over 200 times the other; with `thin_ok` only if
    both are at least `factor`.
    """
    ratio = max(height, width) / min(height, width)
    if ratio > _MAX_RATIO and not (thin_ok and min(height, width) < factor):
        raise InputError(
            f"{width}x{height} has one side {ratio:.0f} times the other, over {_MAX_RATIO}; crop or pad it"
        )
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def patchify(frames: Sequence[NDArray[np.uint8]], spec: ImageSpec) -> Patches:
    """Frames uint8 [H, W, 3] -> float32 patches; rows (t, block y, block x, row, column), columns (c, frame, y, x)."""
    size, merge, depth = spec.patch_size, spec.merge_size, spec.temporal_patch_size
    height, width, channels = frames[0].shape
    t, h, w = -(-len(frames) // depth), height // size, width // size
    shape = (h // merge, merge, size, w // merge, merge, size)
    table = _normalisation(spec)
    patches = np.empty((t, h // merge, w // merge, merge, merge, channels, depth, size, size), np.float32)
    plane = np.empty((height, width), np.float32)
    for channel in range(channels):
        for frame in range(t * depth):
            if frame < len(frames):  # after the last frame, the plane still holds it
                np.take(table[channel], frames[frame][:, :, channel], out=plane, mode="clip")
            target = patches[frame // depth, :, :, :, :, channel, frame % depth]
            target[:] = plane.reshape(shape).transpose(0, 3, 1, 4, 2, 5)
    return Patches(patches.reshape(t * h * w, -1), (t, h, w))


def _normalisation(spec: ImageSpec) -> NDArray[np.float32]:
    """What each of the 256 values of a channel becomes, float32 [3, 256]."""
    scaled = (np.arange(256, dtype=np.float64) * spec.rescale).astype(np.float32)
    mean, std = np.array(spec.mean, np.float32)[:, None], np.array(spec.std, np.float32)[:, None]
    return (scaled - mean) / std
