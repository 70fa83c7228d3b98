"""Token ids to text, piece by piece: a piece never splits a character and never holds a part of a stop string.

The pieces put together are the text, by definition. For a byte-level tokenizer that equals decoding all ids at once.
"""

import codecs
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer, decoders

from .errors import InputError

__all__ = ["StopFilter", "TextStream"]

_REPLACEMENT = "\ufffd"


class _Decoder(Protocol):
    def push(self, token_id: int) -> str: ...
    def flush(self) -> str: ...


class TextStream:
    """One answer on its way to text. Special tokens leave none."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        kind = _ByteLevelDecoder if isinstance(tokenizer.decoder, decoders.ByteLevel) else _WindowDecoder
        self._decoder: _Decoder = kind(tokenizer, special)
        self._filter = StopFilter(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has been met; nothing comes after it."""
        return self._filter.stopped

    def push(self, token_id: int) -> str:
        """The text that this token settles, often empty."""
        return self._filter.push(self._decoder.push(token_id))

    def flush(self) -> str:
        """What was held back; the end of an unfinished character becomes U+FFFD."""
        return self._filter.push(self._decoder.flush()) + self._filter.flush()


class StopFilter:
    """Lets text through up to the first stop string, which it withholds.

    The first is the one that ends first, and of those that end together the longest, however the text was cut into
    pieces.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        if "" in stop:
            raise InputError("stop: an empty string would end every answer at once; leave it out")
        self._stop = tuple(stop)
        self._held: str = ""  # the end of the text that could still become a stop string
        self.stopped = False

    def push(self, text: str) -> str:
        if self.stopped or not text:
            return ""
        text = self._held + text
        ends = [(text.find(stop) + len(stop), -len(stop)) for stop in self._stop if stop in text]
        if ends:
            end, minus_length = min(ends)
            self.stopped = True
            return text[: end + minus_length]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """The text that was held back, where no stop string came of it."""
        held, self._held = ("" if self.stopped else self._held), ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class _ByteLevelDecoder:
    """Exact and O(1) a token: each token is some bytes, and UTF-8 is decoded as they come."""

    def __init__(self, tokenizer: Tokenizer, special: set[int]) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        token = None if token_id in self._special else self._tokenizer.id_to_token(token_id)
        if token is None:  # special, or a row of the vocabulary that stands for no token
            return ""
        if all(char in _BYTE_OF_CHAR for char in token):
            return self._utf8.decode(bytes(_BYTE_OF_CHAR[char] for char in token))
        return self._utf8.decode(token.encode())  # an added token, stored as plain text

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowDecoder:
    """For any other tokenizer: decodes the last few tokens after the ones before them, and takes the difference.

    A token's text can depend on the token before it (the space that SentencePiece drops at the start), and a character
    can be spread over several tokens; then the decoded text ends in U+FFFD and waits, for as many tokens as a character
    can have bytes.
    """

    _LONGEST = 4  # bytes of a UTF-8 character

    def __init__(self, tokenizer: Tokenizer, special: set[int]) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        if token_id in self._special:
            return ""
        self._pending.append(token_id)
        unfinished = self._text(self._context + self._pending).endswith(_REPLACEMENT)
        return "" if unfinished and len(self._pending) < self._LONGEST else self.flush()

    def flush(self) -> str:
        text = self._text(self._context + self._pending)
        piece = text[len(self._text(self._context)) :]
        if self._pending:
            self._context, self._pending = self._pending, []
        return piece

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet of bytes: printable bytes stand for themselves, the others for U+0100 and on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()
