"""`vlmport bench`: time and memory of each variant on this box, as medians with their range.

Each variant is measured in a process of its own, so that its peak memory is its own. One untimed run comes first. The
request is one image and a short question, answered greedily for a fixed number of tokens.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..runtime.errors import InputError
from ..runtime.generate import Timings
from ..runtime.image import load_image
from ..runtime.model import Model
from ..runtime.package import Package
from ..runtime.schema import to_json
from .progress import Progress
from .table import table

__all__ = [
    "RESULT",
    "BenchReport",
    "Spread",
    "VariantSpeed",
    "add_arguments",
    "box",
    "drawn_image",
    "execute",
    "measure",
    "peak_memory",
    "render",
]

RESULT = Path("build", "bench.json")
_EYES = ("vision_encoder", "patch_embed")  # a package that sees has one of them
_QUESTION = "Describe this image."
_IMAGE_SIZE = (448, 336)  # pixels, width and height of the picture that stands in for --image


@dataclass(frozen=True)
class Spread:
    """A figure measured several times."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        numbers = sorted(values)
        return cls(statistics.median(numbers), numbers[0], numbers[-1])


@dataclass(frozen=True)
class VariantSpeed:
    """Times in seconds, speeds in tokens a second, sizes in bytes."""

    size: int
    load: float  # opening all graphs, once
    num_prompt_tokens: int
    num_generated_tokens: int
    vision: Spread  # vision encoder and projector
    time_to_first_token: Spread  # from the request: image, vision, prompt
    prefill_speed: Spread
    decode_speed: Spread
    peak_memory: int  # resident set of the process


@dataclass(frozen=True)
class BenchReport:
    """What build/bench.json holds."""

    schema: str
    package: str
    box: dict[str, str]
    repeats: int
    image_size: tuple[int, int]  # pixels, width and height
    variants: dict[str, VariantSpeed]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("package", metavar="PACKAGE", help="folder that `vlmport export` made")
    parser.add_argument("--variant", metavar="V", help="measure this one only (default: all)")
    parser.add_argument("--image", metavar="F", type=Path, help="image to ask about (default: a drawn one)")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=32, help="tokens to generate (default: 32)")
    parser.add_argument("--repeats", metavar="N", type=int, default=5, help="measured runs (default: 5)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def execute(args: argparse.Namespace) -> int:
    package = Package.open(args.package)
    if args.repeats < 1 or args.max_new_tokens < 2:
        raise InputError(
            f"--repeats {args.repeats} --max-new-tokens {args.max_new_tokens}: at least 1 and 2 are needed"
        )
    if "decoder" not in package.manifest.roles:
        from . import bench_images  # takes its figures from here

        return bench_images.execute(package, args, box())
    if not set(_EYES) & set(package.manifest.roles):
        raise InputError(f"{package.path}: bench asks about an image, and the package has no {' or '.join(_EYES)}")
    image = drawn_image(*_IMAGE_SIZE) if args.image is None else load_image(args.image)
    names = [package.variant(args.variant).name] if args.variant else list(package.manifest.variants)
    variants: dict[str, VariantSpeed] = {}
    with Progress("bench") as progress:
        for done, name in enumerate(names):
            progress(done, len(names), name)
            variants[name] = _in_own_process(package.path, name, image, args.max_new_tokens, args.repeats)
    report = BenchReport("vlmport-bench/1", str(package.path), box(), args.repeats, image.size, variants)
    text = json.dumps(to_json(report), indent=2, ensure_ascii=False)
    print(text if args.json else render(report), flush=True)  # first: what took minutes is not lost to a full disk
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(text + "\n", encoding="utf-8")
    return 0


def _in_own_process(path: Path, variant: str, image: Image.Image, max_new_tokens: int, repeats: int) -> VariantSpeed:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(measure, path, variant, image, max_new_tokens, repeats).result()


def measure(path: Path, variant: str, image: Image.Image, max_new_tokens: int, repeats: int) -> VariantSpeed:
    """Measures one variant in this process. The first run, which warms caches and kernels, is left out."""
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": _QUESTION}]}
    ]
    started = time.perf_counter()
    cuda_graph = Package.open(path).manifest.target == "cuda"
    with Model.load(path, variant, cuda_graph=cuda_graph) as model:
        for role in model.manifest.roles:
            model.session(role)
        load = time.perf_counter() - started
        runs: list[Timings] = []
        for _ in range(repeats + 1):
            answer = model.generate(
                messages, max_new_tokens=max_new_tokens, temperature=0, repetition_penalty=1.0, ignore_eos=True
            )
            runs.append(answer.timings)
        size = model.package.size(variant)
    del runs[0]
    return VariantSpeed(
        size=size,
        load=load,
        num_prompt_tokens=runs[0].num_prompt_tokens,
        num_generated_tokens=runs[0].num_generated_tokens,
        vision=Spread.of(run.vision + run.projector for run in runs),
        time_to_first_token=Spread.of(run.time_to_first_token for run in runs),
        prefill_speed=Spread.of(run.num_prompt_tokens / run.prefill for run in runs),
        decode_speed=Spread.of(run.tokens_per_second for run in runs),
        peak_memory=peak_memory(),
    )


def drawn_image(width: int, height: int) -> Image.Image:
    """A picture with edges and gradients. Times depend on its size alone."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    bands = [(x * 255 // width), (y * 255 // height), ((x // 28 + y // 28) % 2 * 255)]
    return Image.fromarray(np.stack(bands, axis=-1).astype(np.uint8), "RGB")


def peak_memory() -> int:
    """The largest resident set this process has had, in bytes.

    Linux is asked by /proc, for getrusage there starts from the memory of the parent process.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def box() -> dict[str, str]:
    """What the figures depend on."""
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "processors": str(os.cpu_count()),
        "python": platform.python_version(),
        "vlmport": importlib.metadata.version("vlmport"),
    }


def render(report: BenchReport) -> str:
    """The table that `vlmport bench` prints; a range stands behind its median."""
    rows = [
        (
            name,
            f"{speed.size / 1e6:,.1f}",
            f"{speed.load:.2f}",
            _cell(speed.vision, 1000),
            _cell(speed.time_to_first_token, 1000),
            _cell(speed.prefill_speed),
            _cell(speed.decode_speed),
            f"{speed.peak_memory / 1e6:,.0f}",
        )
        for name, speed in report.variants.items()
    ]
    header = ("variant", "MB", "load s", "vision ms", "first token ms", "prefill tok/s", "decode tok/s", "peak MB")
    first = next(iter(report.variants.values()))
    width, height = report.image_size
    note = (
        f"{width} x {height} image, {first.num_prompt_tokens} prompt tokens, {first.num_generated_tokens} generated; "
        f"median of {report.repeats} (lowest-highest); also in {RESULT}"
    )
    return f"{table(header, rows, '<>>>>>>>')}\n{note}"


def _cell(spread: Spread, scale: float = 1.0) -> str:
    return f"{spread.median * scale:,.1f} ({spread.low * scale:,.1f}-{spread.high * scale:,.1f})"
