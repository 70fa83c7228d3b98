"""Answer a prompt about images and videos, text as it comes, or one JSON object with --json.

A package without a decoder takes no prompt: it gives class scores or the embedding of each image.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..runtime import Generation, load
from ..runtime.errors import InputError
from ..runtime.schema import to_json
from . import run_images

__all__ = ["add_arguments", "execute"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("package", metavar="PACKAGE", type=Path, help="folder of a package")
    parser.add_argument(
        "prompt",
        metavar="PROMPT",
        nargs="?",
        help="what to ask; images and videos come before it (without a decoder: none)",
    )
    parser.add_argument("--image", metavar="F", nargs="+", action="extend", default=[], help="image files, in order")
    parser.add_argument(
        "--video", metavar="F", nargs="+", action="extend", default=[], help="video or .npy files, in order"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message, in place of the template's own")
    parser.add_argument("--variant", metavar="V", help="which variant to run (default: the first of the package)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end: text, ids, timings")
    length = parser.add_argument_group("length")
    length.add_argument("--max-new-tokens", metavar="N", type=int, default=512, help="longest answer (default: 512)")
    length.add_argument(
        "--stop", metavar="TEXT", nargs="+", action="extend", default=[], help="texts that end the answer"
    )
    length.add_argument(
        "--cache-length", metavar="N", type=int, help="most tokens of prompt and answer (default: the model's)"
    )
    visual = parser.add_argument_group("images and videos")
    visual.add_argument("--max-pixels", metavar="N", type=int, help="shrink each image or frame to so many pixels")
    visual.add_argument("--fps", metavar="N", type=float, help="frames a second to sample from videos")
    visual.add_argument(
        "--option",
        metavar="NAME=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="any option of the template or the preprocessing, by upstream's name, as in max_slice_nums=4",
    )
    choice = parser.add_argument_group("choice of tokens (default: as the checkpoint's generation_config says)")
    choice.add_argument("--temperature", metavar="T", type=float, help="0 is greedy")
    choice.add_argument("--top-k", metavar="K", type=int, help="among the K best; 0 is off")
    choice.add_argument("--top-p", metavar="P", type=float, help="among the best that make up P of the probability")
    choice.add_argument("--min-p", metavar="P", type=float, help="among those at least P as probable as the best")
    choice.add_argument("--repetition-penalty", metavar="X", type=float, help="above 1 discourages repeats; 1 is off")
    choice.add_argument("--seed", metavar="N", type=int, help="draw the same again")
    run_images.add_arguments(parser.add_argument_group("images alone (a package without a decoder)"))
    parser.add_argument("--threads", metavar="N", type=int, help="CPU threads (default: one a core)")
    parser.add_argument("--cuda-graph", action="store_true", help="capture the decode step once (target cuda)")


def execute(args: argparse.Namespace) -> int:
    with load(
        args.package,
        args.variant,
        num_threads=args.threads,
        cache_length=args.cache_length,
        cuda_graph=args.cuda_graph,
    ) as model:
        if "decoder" not in model.manifest.roles:
            return run_images.execute(model, args)
        run_images.refuse(args)
        if args.prompt is None:
            raise InputError("PROMPT: missing; say what to ask, before --image or after --")
        stream = model.stream(
            _messages(args),
            _options(args),
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p,
            repetition_penalty=args.repetition_penalty,
            seed=args.seed,
            stop=args.stop,
        )
        if args.json:
            print(json.dumps(_as_json(stream.finish()), ensure_ascii=False))
            return 0
        for piece in stream:
            sys.stdout.write(_printable(piece))
            sys.stdout.flush()
        sys.stdout.write("\n")
    return 0


def _messages(args: argparse.Namespace) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": file} for file in args.image]
    content += [{"type": "video", "video": file} for file in args.video]
    content.append({"type": "text", "text": args.prompt})
    system = [{"role": "system", "content": args.system}] if args.system is not None else []
    return [*system, {"role": "user", "content": content}]


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of the request. Values of --option are JSON where they can be (numbers, true), else texts."""
    given = {"max_pixels": args.max_pixels, "fps": args.fps}
    options = {name: value for name, value in given.items() if value is not None}
    for text in args.option:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise InputError(f"--option {text!r}: is not of the form NAME=VALUE, as max_slice_nums=4 is")
        if name in options:
            raise InputError(f"--option {name}: is given twice; keep one")
        try:
            options[name] = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            options[name] = value
    return options


def _as_json(generation: Generation) -> dict[str, Any]:
    timings = generation.timings
    speed = {"time_to_first_token": timings.time_to_first_token, "tokens_per_second": timings.tokens_per_second}
    answer = to_json(generation)
    return answer | {"timings": answer["timings"] | speed}


def _printable(text: str) -> str:
    """What a terminal may see: no control characters but newline and tab (a model could say escape sequences), and only
    characters that its encoding has."""
    text = "".join(
        char if (char >= " " and not "\x7f" <= char <= "\x9f") or char in "\n\t" else "\ufffd" for char in text
    )
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
