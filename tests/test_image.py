"""Images: pixels equal to the golden tensors to the bit, and one clear line for whatever is no image."""

import contextlib
import hashlib
import io
import math
import os
import struct
import zlib
from pathlib import Path

import golden_cases as golden
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmport.runtime.errors import CapacityError, InputError, PackageError, VlmportError
from vlmport.runtime.image import ImageOptions, Patches, load_image, preprocess_images, smart_resize
from vlmport.runtime.manifest import ImageSpec

SPEC = ImageSpec(
    strategy="smart_resize",
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    min_pixels=3136,
    max_pixels=12845056,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    rescale=1 / 255,
    resample="bicubic",
)


def noise(height: int, width: int, mode: str = "RGB") -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, channels), np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, form)
    return stream.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that says its size and begins its pixels, but holds none."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 9999) + b"IDAT"


def gif_header(width: int, height: int) -> bytes:
    """A GIF that says its size and begins its first frame."""
    screen = struct.pack("<HHBBB", width, height, 0, 0, 0)
    return b"GIF89a" + screen + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x08"


def patches_of(case: golden.Golden, kind: str) -> list[Patches]:
    spec = golden.specs(case.folder).image
    parts = [part for message in case.request["messages"] for part in message["content"] if part["type"] == kind]
    sources = [part[kind] if kind == "video" else [part[kind]] for part in parts]
    return [preprocess_images([load_image(case.folder / frame) for frame in frames], spec) for frames in sources]


@pytest.mark.parametrize(("case", "kind"), golden.cases_with_pixels(), ids=str)
def test_golden_pixels_to_the_bit(case: golden.Golden, kind: str) -> None:
    found = patches_of(case, kind)
    pixels = np.concatenate([patches.pixel_values for patches in found])
    grid = case.tensor(f"{kind}_grid_thw")
    np.testing.assert_array_equal([patches.grid for patches in found], grid)
    compared = 0
    for record, expected in case.stages("pixel_values", kind):
        part = slice(None) if record["part"] is None else slice(record["part"]["start"], record["part"]["stop"])
        assert pixels[part].tobytes() == expected.tobytes()
        compared += 1
    for entry in case.case["hashes"].values():
        if entry["stage"] == "pixel_values" and entry.get("modality") == kind:
            assert hashlib.sha256(pixels.tobytes()).hexdigest() == entry["sha256_f32"]
            compared += 1
    assert compared, "an empty comparison proves nothing"


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 10**5), st.integers(1, 10**6))
def test_smart_resize_fits(height: int, width: int, low: int, extra: int) -> None:
    high = max(low, 784) + extra
    if max(height, width) / min(height, width) > 200:
        with pytest.raises(InputError, match="one side"):
            smart_resize(height, width, 28, low, high)
        return
    new_height, new_width = smart_resize(height, width, 28, low, high)
    assert new_height % 28 == new_width % 28 == 0
    assert min(new_height, new_width) >= 28
    nearest = round(height / 28) * 28 * round(width / 28) * 28
    area = new_height * new_width
    if low <= nearest <= high:
        assert area == nearest
    elif nearest > high:
        assert area <= high or min(new_height, new_width) == 28  # a side is never less, whatever the limit
    else:
        assert area >= low


@pytest.mark.parametrize(
    ("size", "expected"),
    [((42, 70), (56, 56)), ((98, 126), (112, 112)), ((1, 1), (56, 56)), ((10, 1500), (28, 700)), ((56, 56), (56, 56))],
)
def test_smart_resize_rounds_halves_to_even(size: tuple[int, int], expected: tuple[int, int]) -> None:
    # 42/28 = 1.5 and 70/28 = 2.5 both become 2; 98/28 = 3.5 and 126/28 = 4.5 both become 4.
    assert smart_resize(*size, 28, 3136, 12845056) == expected


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 5))
def test_patches_hold_every_pixel_where_the_layout_says(height: int, width: int, num_frames: int) -> None:
    frames = [noise(height, width + i).resize((width, height)) for i in range(num_frames)]
    patches = preprocess_images(frames, SPEC)
    t, h, w = patches.grid
    assert t == math.ceil(num_frames / 2)
    assert patches.pixel_values.shape == (t * h * w, 1176)
    assert patches.pixel_values.dtype == np.float32
    assert patches.num_tokens(2) == t * h * w // 4
    rng = np.random.default_rng(0)
    for _ in range(10):
        frame, y, x, c = rng.integers(0, 2 * t), rng.integers(0, h * 14), rng.integers(0, w * 14), rng.integers(0, 3)
        resized = frames[min(frame, num_frames - 1)].resize((w * 14, h * 14), Image.Resampling.BICUBIC)
        value = np.float32(resized.getpixel((int(x), int(y)))[c] * (1 / 255))
        value = (value - np.float32(SPEC.mean[c])) / np.float32(SPEC.std[c])
        row, column = y // 14, x // 14
        block = (row // 2) * (w // 2) + column // 2
        index = (frame // 2) * h * w + block * 4 + (row % 2) * 2 + column % 2
        assert patches.pixel_values[index].reshape(3, 2, 14, 14)[c, frame % 2, y % 14, x % 14] == value


def test_limits_of_one_image() -> None:
    image = noise(200, 300)
    small = preprocess_images([image], SPEC, ImageOptions(max_pixels=20000))
    large = preprocess_images([image], SPEC, ImageOptions(min_pixels=200_000))
    assert small.num_patches * 196 <= 20000 < 200_000 <= large.num_patches * 196
    with pytest.raises(InputError, match=r"min_pixels 3136 is over max_pixels 100"):
        preprocess_images([image], SPEC, ImageOptions(max_pixels=100))
    with pytest.raises(InputError, match=r"page: max_pixels is -1"):
        preprocess_images([image], SPEC, ImageOptions(max_pixels=-1), name="page")
    with pytest.raises(CapacityError, match="lower min_pixels"):
        preprocess_images([image], SPEC, ImageOptions(min_pixels=10**12, max_pixels=10**13))


def test_an_unknown_strategy_is_refused() -> None:
    spec = ImageSpec(**{**SPEC.__dict__, "strategy": "anyres"})
    with pytest.raises(PackageError, match="anyres"):
        preprocess_images([noise(30, 30)], spec)


@pytest.mark.parametrize("form", ["PNG", "BMP", "GIF", "TIFF", "PPM"])
def test_every_way_to_give_an_image_is_the_same(tmp_path: Path, form: str) -> None:
    image = noise(20, 30).quantize(200).convert("RGB")  # so that GIF keeps it
    data = encoded(image, form)
    file = tmp_path / "a"
    file.write_bytes(data)
    expected = np.asarray(image)
    for source in (file, str(file), data, image, expected):
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(loaded), expected)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "P", "1", "I;16"])
def test_modes_become_rgb_as_pillow_converts_them(mode: str) -> None:
    image = noise(9, 8, "RGBA")
    image = (
        noise(9, 8, "L").convert("I").point(lambda v: v * 200).convert("I;16")
        if mode == "I;16"
        else image.convert(mode)
    )
    form = "TIFF" if mode == "CMYK" else "PNG"
    loaded = load_image(encoded(image, form))
    assert loaded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(loaded), np.asarray(image.convert("RGB")))


def test_exif_orientation_is_left_alone() -> None:
    image, stream = noise(20, 40), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(stream, "JPEG", exif=exif)
    assert load_image(stream.getvalue()).size == (40, 20)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("zero.png", b"", r"zero\.png: is empty"),
        ("text.png", b"hello, I am no image", r"text\.png: is not an image of a known format"),
        ("head.png", png_header(64, 64), r"head\.png: is a damaged image"),
        ("cut.png", encoded(noise(64, 64))[:5000], r"cut\.png: is a damaged image"),
        ("cut.jpg", encoded(noise(64, 64), "JPEG")[:2000], r"cut\.jpg: is a damaged image"),
        ("flat.gif", b"GIF89a" + struct.pack("<HHBBB", 0, 0, 0, 0, 0) + b";", r"flat\.gif: "),
        ("x.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", r"x\.eps: is not an image of a known format"),
    ],
)
def test_what_is_no_image_is_told_in_one_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        load_image(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        png_header(200_000, 200_000),
        png_header(2**31 - 1, 2**31 - 1),
        gif_header(65535, 65535),
        png_header(13_500, 13_500),
    ],
)
def test_bombs_are_refused_from_their_header(data: bytes) -> None:
    with pytest.raises(CapacityError, match=r"limit of \d+( pixels)?; make the image smaller"):
        load_image(data)


def test_the_pixel_cap_is_exact_and_comes_before_decoding() -> None:
    data = encoded(noise(10, 10))
    assert load_image(data, max_source_pixels=100).size == (10, 10)
    with pytest.raises(CapacityError, match="10x10 is 100 pixels, over the limit of 99"):
        load_image(data[:60], max_source_pixels=99)  # cut: decoding it would tell of damage instead
    with pytest.raises(CapacityError, match="99"):
        load_image(np.zeros((10, 10, 3), np.uint8), max_source_pixels=99)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for source, message in [
        (tmp_path / "none.png", "No such file"),
        (tmp_path, "is not a plain file"),
        (tmp_path / "pipe", "is not a plain file"),
        ("a\0b.png", "null byte"),
        ("a\nb.png", "No such file"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            load_image(source, name="messages[0].content[1]")
        assert str(caught.value).startswith("messages[0].content[1]: ")
        assert "\n" not in str(caught.value)
        assert "\0" not in str(caught.value)


@pytest.mark.parametrize("array", [np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)])
def test_arrays_of_other_kinds_are_refused(array: np.ndarray) -> None:
    with pytest.raises(InputError, match="give uint8"):
        load_image(array)


def test_extreme_sides() -> None:
    assert preprocess_images([load_image(encoded(noise(1, 1)))], SPEC).grid == (1, 4, 4)
    for size in [(1, 20000), (20000, 1)]:
        with pytest.raises(InputError, match="one side 20000 times the other"):
            preprocess_images([load_image(encoded(Image.new("RGB", size)))], SPEC)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]), st.data())
def test_damage_never_shows_as_anything_but_our_errors(form: str, data: st.DataObject) -> None:
    raw = bytearray(encoded(noise(17, 23), form))
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    with contextlib.suppress(VlmportError):
        assert load_image(bytes(raw[: cut or None]), max_source_pixels=10**6).mode == "RGB"
