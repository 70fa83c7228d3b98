"""The arguments of `export` and `quantize` that say how codes are found."""

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..quant.recipe import METHODS, Recipe, Target, load_recipe, with_cache, with_guard
from ..quant.samples import SAMPLES_NAME
from ..runtime.errors import InputError

if TYPE_CHECKING:
    from ..export.feeds import CalibrationOptions

__all__ = ["add_calibration", "calibration_options", "recipe_of"]

_DEFAULT_SAMPLES = 128
_PARTS = ("image", "text", "answer")  # of what flows through a decoder
_CACHES: dict[str, Literal["channel", "tensor"]] = {"int8": "channel", "int8-tensor": "tensor"}


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """--method, --kv-cache, --calibration and what goes with it."""
    parser.add_argument(
        "--method",
        metavar="M",
        help=f"how codes of the fewest bits are found: {', '.join(METHODS)}; names the variant int4_awq and the like",
    )
    parser.add_argument(
        "--calibration",
        metavar="DIR",
        type=Path,
        help=f"images and {SAMPLES_NAME}, for methods that look at data; with target cuda also for a float16 that "
        "cannot overflow: fp16_guarded",
    )
    parser.add_argument(
        "--calibration-samples", metavar="N", type=int, help=f"how many of them to take (default: {_DEFAULT_SAMPLES})"
    )
    parser.add_argument(
        "--kv-cache", choices=list(_CACHES), help="key/value cache in 8 bits, a scale a channel or a tensor: int4_kv8"
    )
    parser.add_argument(
        "--calibration-weights",
        metavar="PART=W,...",
        help="how much a row of the decoder counts, by what it is: image, text, answer "
        "(default: image=0.1,text=1,answer=1)",
    )
    parser.add_argument("--calibration-seed", metavar="N", type=int, help="which of them to take (default: 0)")


def recipe_of(args: argparse.Namespace, name: str, target: Target) -> Recipe:
    """The recipe of a name, as the arguments vary it. Where graphs compute in float16, data guard its range too."""
    recipe = load_recipe(name, block_size=args.block_size, method=args.method)
    recipe = recipe if args.kv_cache is None else with_cache(recipe, _CACHES[args.kv_cache])
    return with_guard(recipe) if args.calibration is not None and target == "cuda" else recipe


def calibration_options(args: argparse.Namespace) -> "CalibrationOptions | None":
    """What the arguments say, or None without --calibration. Raises InputError where they do not go together."""
    for name in ("calibration_samples", "calibration_seed", "calibration_weights"):
        value = getattr(args, name)
        if value is not None and args.calibration is None:
            raise InputError(f"--{name.replace('_', '-')} {value}: goes with --calibration DIR; give both or none")
    if args.calibration is None:
        return None
    from ..export.feeds import CalibrationOptions  # torch is needed from here on

    num_samples = _DEFAULT_SAMPLES if args.calibration_samples is None else args.calibration_samples
    if num_samples < 1:
        raise InputError(f"--calibration-samples {num_samples}: at least one is needed, better a hundred")
    weights = {} if args.calibration_weights is None else _weights(args.calibration_weights)
    options = CalibrationOptions(args.calibration, num_samples=num_samples, seed=args.calibration_seed or 0)
    return replace(options, **weights)


def _weights(text: str) -> dict[str, float]:
    """`image=0.1,answer=2` as fields of CalibrationOptions. Raises InputError for what is not of that form."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        if name not in _PARTS or f"{name}_weight" in found:
            raise InputError(f"--calibration-weights {text}: {name!r}: parts are {', '.join(_PARTS)}, each once")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not 0 <= weight < math.inf:
            raise InputError(f"--calibration-weights {text}: {part!r}: give a number of 0 or more, as {name}=0.5")
        found[f"{name}_weight"] = weight
    if all(found.get(f"{name}_weight", 1.0) == 0 for name in _PARTS):
        raise InputError(f"--calibration-weights {text}: nothing counts; give at least one part more than 0")
    return found
