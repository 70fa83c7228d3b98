"""A byte-level BPE tokenizer of any size, made up on the spot.

What a tokenizer costs in time and memory depends on how many tokens it has, not on which.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

__all__ = ["write_tokenizer"]

_LETTERS = "Ġetaoinshrdlcumwfgypbvkxjqz"  # by frequency; Ġ is the space


def write_tokenizer(skeleton: Path, file: Path, num_regular: int) -> None:
    """`skeleton`, a tokenizer.json without vocabulary and without ids, with `num_regular` tokens before its added ones.

    The tokens are 256 bytes, then pairs, triples and quadruples of letters.
    """
    document: dict[str, Any] = json.loads(skeleton.read_text(encoding="utf-8"))
    merges = list(itertools.islice(_merges(), num_regular - 256))
    tokens = [*sorted(ByteLevel.alphabet()), *(left + right for left, right in merges)]
    assert len(tokens) == num_regular, f"{num_regular} tokens are more than four letters can make"
    document["model"] |= {
        "vocab": {token: index for index, token in enumerate(tokens)},
        "merges": [f"{left} {right}" for left, right in merges],
    }
    for index, token in enumerate(document["added_tokens"]):
        document["added_tokens"][index] = {"id": num_regular + index, **token}
    file.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


def _merges() -> Iterator[tuple[str, str]]:
    """Pairs of tokens that become one, shorter tokens first, so that each is there before it is a part."""
    pairs = [a + b for a, b in itertools.product(_LETTERS, _LETTERS)]
    yield from itertools.product(_LETTERS, _LETTERS)
    yield from itertools.product(pairs, _LETTERS)
    yield from itertools.product(pairs, pairs)
