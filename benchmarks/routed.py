"""`python -m benchmarks.routed`: what a second set of weights for visual tokens costs a decode step: nothing should.

A random checkpoint whose layers hold two sets of weights, and the same shape with one set (`add_moe` false), exported
alike. Both decode in turns in this process, so that a machine that is slower for a while is so for both. The table has
tokens a second of each, and the median ratio of neighbouring turns.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vlmport.cli.table import table

from .checkpoint import make_checkpoint
from .runtime import Runtime
from .shapes import Shape, load_shape

__all__ = ["RoutedSpeed", "compare", "main"]

_CONTEXT = 64  # tokens in the cache before the first step
_WARM = 8
_SWITCH = 3  # steps after the other one's turn that are not counted: caches are cold, and its threads still spin


@dataclass(frozen=True)
class RoutedSpeed:
    """Tokens a second of one recipe, medians over the turns."""

    routed: float
    plain: float
    ratio: float  # median of the turns' own


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routed", description=__doc__)
    parser.add_argument("--shape", default="eve-300m")
    parser.add_argument("--folder", type=Path, default=Path("build", "bench"))
    parser.add_argument("--recipe", nargs="+", default=["int8", "int4"])
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=16, help="of a turn")
    args = parser.parse_args(arguments)
    shape = load_shape(args.shape)
    one_set = replace(shape, name=f"{shape.name}-one-set", config={**shape.config, "add_moe": False})
    routed, plain = (_package(each, args.folder, args.recipe) for each in (shape, one_set))
    found = {recipe: compare(routed, plain, recipe, args.turns, args.tokens) for recipe in args.recipe}
    rows = [(name, f"{s.routed:.1f}", f"{s.plain:.1f}", f"{s.ratio:.3f}") for name, s in found.items()]
    print(table(("recipe", "two sets tok/s", "one set tok/s", "ratio"), rows, "<>>>"))
    file = args.folder.parent / "bench-routed.json"
    file.write_text(json.dumps({name: vars(speed) for name, speed in found.items()}, indent=2) + "\n")
    return 0


def compare(routed: Path, plain: Path, variant: str, turns: int, tokens: int) -> RoutedSpeed:
    """Decodes with both packages, a turn each and again."""
    pair = Runtime(routed, variant), Runtime(plain, variant)
    for runtime in pair:
        runtime.start(_CONTEXT + _WARM + turns * (_SWITCH + tokens) + 1)
        runtime.prefill(_CONTEXT)
        runtime.decode(_WARM)
    speeds: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns):
        for which in (0, 1) if turn % 2 else (1, 0):
            pair[which].decode(_SWITCH)
            speeds[which].append(tokens / pair[which].decode(tokens))
    ratios = [two / one for two, one in zip(*speeds, strict=True)]
    return RoutedSpeed(statistics.median(speeds[0]), statistics.median(speeds[1]), statistics.median(ratios))


def _package(shape: Shape, folder: Path, recipes: Sequence[str]) -> Path:
    """The package of a shape, made where it is not there yet."""
    from vlmport.export.build import export_checkpoint
    from vlmport.quant.recipe import load_recipe

    package = folder / "packages" / f"{shape.name}-{'-'.join(recipes)}"
    checkpoint = folder / "checkpoints" / shape.name
    if not package.exists():
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        package.parent.mkdir(parents=True, exist_ok=True)
        if not checkpoint.exists():
            make_checkpoint(shape, checkpoint)
        export_checkpoint(checkpoint, package, [load_recipe(recipe) for recipe in recipes])
    return package


if __name__ == "__main__":
    raise SystemExit(main())
