"""`vlmport bench` on a package without a decoder: how long a call takes for one image, and for many of unequal sizes.

Each variant is measured in a process of its own. One untimed call of each kind comes first.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..runtime.encode import EncodeOptions, prepare_images
from ..runtime.image import load_image
from ..runtime.model import Model
from ..runtime.package import Package
from ..runtime.schema import to_json
from ..validate.samples import draw_picture
from .bench import RESULT, Spread, peak_memory
from .progress import Progress
from .table import table

__all__ = ["CallSpeed", "EncodeReport", "EncodeSpeed", "execute", "measure", "render"]

_SIZES = ((448, 336), (224, 224), (128, 320), (500, 100), (64, 64), (336, 448), (160, 160), (96, 240))  # of the pack


@dataclass(frozen=True)
class CallSpeed:
    """One packed call. Times in seconds, of preprocessing and graphs apart."""

    num_images: int
    num_patches: int
    preprocess: Spread
    encode: Spread
    images_per_second: Spread


@dataclass(frozen=True)
class EncodeSpeed:
    size: int  # bytes
    load: float  # seconds, opening all graphs, once
    one: CallSpeed
    packed: CallSpeed
    peak_memory: int  # bytes, resident set of the process


@dataclass(frozen=True)
class EncodeReport:
    """What build/bench.json holds for such a package."""

    schema: str
    package: str
    box: dict[str, str]
    repeats: int
    variants: dict[str, EncodeSpeed]


def execute(package: Package, args: argparse.Namespace, box: Mapping[str, str]) -> int:
    pictures = [draw_picture(number, width, height) for number, (width, height) in enumerate(_SIZES)]
    if args.image is not None:
        pictures[0] = load_image(args.image)
    names = [package.variant(args.variant).name] if args.variant else list(package.manifest.variants)
    variants: dict[str, EncodeSpeed] = {}
    with Progress("bench") as progress:
        for done, name in enumerate(names):
            progress(done, len(names), name)
            variants[name] = _in_own_process(package.path, name, pictures, args.repeats)
    report = EncodeReport("vlmport-bench-images/1", str(package.path), dict(box), args.repeats, variants)
    text = json.dumps(to_json(report), indent=2, ensure_ascii=False)
    print(text if args.json else render(report), flush=True)  # first: what took minutes is not lost to a full disk
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(text + "\n", encoding="utf-8")
    return 0


def _in_own_process(path: Path, variant: str, pictures: Sequence[Image.Image], repeats: int) -> EncodeSpeed:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(measure, path, variant, pictures, repeats).result()


def measure(path: Path, variant: str, pictures: Sequence[Image.Image], repeats: int) -> EncodeSpeed:
    """Measures one variant in this process: the first picture alone, then all in one call."""
    started = time.perf_counter()
    with Model.load(path, variant) as model:
        for role in model.manifest.roles:
            model.session(role)
        load = time.perf_counter() - started
        one, packed = (_measure_call(model, group, repeats) for group in (pictures[:1], pictures))
        return EncodeSpeed(model.package.size(variant), load, one, packed, peak_memory())


def _measure_call(model: Model, pictures: Sequence[Image.Image], repeats: int) -> CallSpeed:
    preprocess: list[float] = []
    encode: list[float] = []
    num_patches = 0
    for _ in range(repeats + 1):
        started = time.perf_counter()
        patches, _ = prepare_images(model.manifest.image, pictures, EncodeOptions())
        between = time.perf_counter()
        found = model.encode_patches(patches)
        encode.append(time.perf_counter() - between)
        preprocess.append(between - started)
        num_patches = sum(found.num_patches)
    del preprocess[0], encode[0]
    both = [before + after for before, after in zip(preprocess, encode, strict=True)]
    return CallSpeed(
        num_images=len(pictures),
        num_patches=num_patches,
        preprocess=Spread.of(preprocess),
        encode=Spread.of(encode),
        images_per_second=Spread.of(len(pictures) / seconds for seconds in both),
    )


def render(report: EncodeReport) -> str:
    """The table that `vlmport bench` prints; a range stands behind its median."""
    header = ("variant", "MB", "load s", "images", "patches", "preprocess ms", "encode ms", "images/s", "peak MB")
    rows = [
        (
            name,
            f"{speed.size / 1e6:,.1f}",
            f"{speed.load:.2f}",
            str(call.num_images),
            str(call.num_patches),
            _cell(call.preprocess, 1000),
            _cell(call.encode, 1000),
            _cell(call.images_per_second),
            f"{speed.peak_memory / 1e6:,.0f}",
        )
        for name, speed in report.variants.items()
        for call in (speed.one, speed.packed)
    ]
    note = f"one packed call a line; median of {report.repeats} (lowest-highest); also in {RESULT}"
    return f"{table(header, rows, '<>>>>>>>>')}\n{note}"


def _cell(spread: Spread, scale: float = 1.0) -> str:
    return f"{spread.median * scale:,.1f} ({spread.low * scale:,.1f}-{spread.high * scale:,.1f})"
