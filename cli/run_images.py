"""`vlmport run` on a package without a decoder: class scores or the embedding of each image, all in one packed call."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from ..runtime.encode import ImageEncoding
from ..runtime.errors import InputError
from ..runtime.model import Model
from ..runtime.schema import to_json
from .table import table

__all__ = ["add_arguments", "execute", "refuse"]

_NUM_CLASSES = 5  # shown an image; --json has all
_NUM_VALUES = 6
_TEXT_ONLY = ("prompt", "system", "video", "fps", "option", "stop", "cache_length")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_IMAGES_ONLY = ("embedding", "token_drop", "max_patches")


def add_arguments(group: Any) -> None:
    """Adds what only such a package takes to an argument group."""
    group.add_argument("--embedding", action="store_true", help="the embedding of each image, not its class scores")
    group.add_argument(
        "--token-drop", metavar="RATE", type=float, help="leave out this share of the patches at random (--seed N)"
    )
    group.add_argument("--max-patches", metavar="N", type=int, help="patches of one call (default: all in one)")


def refuse(args: argparse.Namespace) -> None:
    """Raises InputError for an option that only a package without a decoder takes."""
    if given := _given(args, _IMAGES_ONLY):
        raise InputError(f"{given[0]}: {args.package} answers prompts, which this option is not for; leave it out")


def execute(model: Model, args: argparse.Namespace) -> int:
    if given := _given(args, (*_TEXT_ONLY, *_SAMPLING)):
        raise InputError(f"{given[0]}: {args.package} has no decoder and takes images alone; leave it out")
    if not args.image:
        raise InputError("--image: missing; this package takes images alone, give at least one")
    encoding = model.encode_images(
        args.image,
        max_pixels=args.max_pixels,
        token_drop=args.token_drop or 0.0,
        seed=args.seed,
        max_patches=args.max_patches,
    )
    scores = None if args.embedding else encoding.logits
    if args.json:
        print(json.dumps(_as_json(args.image, encoding, with_scores=scores is not None), ensure_ascii=False))
    else:
        print(_render(args.image, encoding, with_scores=scores is not None))
    return 0


def _given(args: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """The options among `names` that were given, as the user wrote them."""
    values = {name: getattr(args, name) for name in names}
    given = [name for name, value in values.items() if value is not None and value is not False and value != []]
    return ["PROMPT" if name == "prompt" else f"--{name.replace('_', '-')}" for name in given]


def _as_json(files: Sequence[str], encoding: ImageEncoding, *, with_scores: bool) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    for number, file in enumerate(files):
        image: dict[str, Any] = {
            "image": file,
            "grid": list(encoding.grids[number]),
            "num_patches": encoding.num_patches[number],
        }
        if with_scores and encoding.logits is not None:
            image |= {"class": int(encoding.logits[number].argmax()), "scores": encoding.logits[number].tolist()}
        else:
            image["embedding"] = encoding.embeddings[number].tolist()
        images.append(image)
    return {"images": images, "num_calls": encoding.num_calls, "timings": to_json(encoding.timings)}


def _render(files: Sequence[str], encoding: ImageEncoding, *, with_scores: bool) -> str:
    rows: list[list[str]] = []
    for number, file in enumerate(files):
        row = [_printable(file), "{} x {}".format(*encoding.grids[number]), str(encoding.num_patches[number])]
        if with_scores and encoding.logits is not None:
            scores = encoding.logits[number]
            best = (-scores).argsort(kind="stable")[:_NUM_CLASSES]
            row.append("  ".join(f"{index}: {scores[index]:.3f}" for index in best))
        else:
            values = encoding.embeddings[number]
            shown = " ".join(f"{value:.3f}" for value in values[:_NUM_VALUES])
            row.append(shown if len(values) <= _NUM_VALUES else f"{shown} ... ({len(values)} values, --json has all)")
        rows.append(row)
    what = "class: score" if with_scores else "embedding"
    return table(["image", "rows x columns", "patches", what], rows, "<>><")


def _printable(text: str) -> str:
    return text if text.isprintable() else ascii(text)
