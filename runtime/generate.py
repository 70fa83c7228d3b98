"""The loop that turns a prompt into an answer, one token at a time, and what comes out of it.

The loop knows two callables (the prompt's logits, the next token's logits) and nothing of graphs or caches.
"""

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from .errors import InputError
from .manifest import GenerationDefaults
from .sample import Sampler, SamplingParams
from .session import Array
from .text_stream import TextStream

__all__ = [
    "FinishReason",
    "Generation",
    "GenerationOptions",
    "GenerationStream",
    "Timings",
    "generate_tokens",
    "sampling_params",
]

FinishReason = Literal["stop", "length", "stop_string"]


@dataclass(frozen=True)
class GenerationOptions:
    """How long to go on and how to pick tokens. `stop` are strings that end the answer and are not part of it."""

    max_new_tokens: int = 512
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False  # go on to max_new_tokens whatever comes (measurements, golden cases)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens: {self.max_new_tokens} is not at least 1")
        if "" in self.stop:
            raise InputError("stop: an empty string would end every answer at once; leave it out")


@dataclass(frozen=True)
class Timings:
    """Where the time of a request went, in seconds, and how many tokens it had."""

    decode_image: float = 0.0  # files to pixels
    preprocess: float = 0.0  # resize, normalise, patches, template, positions
    vision: float = 0.0
    projector: float = 0.0
    prefill: float = 0.0  # token embedding and the prompt through the decoder, up to the first token
    decode: float = 0.0  # every token after the first
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0

    @property
    def time_to_first_token(self) -> float:
        """Seconds from the request to its first token."""
        return self.decode_image + self.preprocess + self.vision + self.projector + self.prefill

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed: tokens after the first a second; 0 where there are none."""
        return (self.num_generated_tokens - 1) / self.decode if self.decode > 0 else 0.0


@dataclass(frozen=True)
class Generation:
    """A finished answer.

    token_ids: all that were generated, the end-of-sequence token included (as upstream counts). finish_reason: "stop"
    at such a token, "stop_string" at one of the caller's, "length" at max_new_tokens or at the end of the cache.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    timings: Timings


class GenerationStream(Iterator[str]):
    """Pieces of an answer as they are settled. Once they are all out, `generation` has the whole."""

    def __init__(self, pieces: Generator[str, None, Generation]) -> None:
        self._pieces = pieces
        self._generation: Generation | None = None

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            self._generation = end.value if end.value is not None else self._generation
            raise StopIteration from None

    @property
    def generation(self) -> Generation:
        """The finished answer. Raises InputError while pieces are still to come."""
        if self._generation is None:
            raise InputError("the answer is not finished: iterate the stream to its end before asking for .generation")
        return self._generation

    def finish(self) -> Generation:
        """Runs to the end and returns the whole answer."""
        for _ in self:
            pass
        return self.generation

    def close(self) -> None:
        """Stops early and frees the cache."""
        self._pieces.close()


def generate_tokens(
    prefill: Callable[[], tuple[Array, Timings]],
    step: Callable[[int], Array],
    sampler: Sampler,
    text_stream: TextStream,
    options: GenerationOptions,
    eos_token_ids: tuple[int, ...],
) -> Generator[str, None, Generation]:
    """Yields pieces of text and returns the Generation.

    prefill: computes the logits [V] after the prompt, and the timings so far. step: the logits [V] after one more
    token.
    """
    logits_V, timings = prefill()
    eos: frozenset[int] = frozenset() if options.ignore_eos else frozenset(eos_token_ids)
    token_ids: list[int] = []
    pieces: list[str] = []
    reason: FinishReason | None = None
    decode_seconds = 0.0
    while reason is None:
        started = time.perf_counter()
        if token_ids:  # here, so that a piece is out before the token after it is computed
            logits_V = step(token_ids[-1])
        token_ids.append(sampler(logits_V))
        piece = text_stream.push(token_ids[-1])
        reason = _finish_reason(token_ids, eos, text_stream.stopped, options.max_new_tokens)
        if reason is not None:
            piece += text_stream.flush()
            # An unfinished character or word of the tail may complete a stop string only now.
            reason = "stop_string" if text_stream.stopped else reason
        decode_seconds += time.perf_counter() - started  # not the time that the reader of a piece takes
        if piece:
            pieces.append(piece)
            yield piece
    timings = replace(timings, decode=decode_seconds, num_generated_tokens=len(token_ids))
    return Generation("".join(pieces), tuple(token_ids), reason, timings)


def sampling_params(
    defaults: GenerationDefaults,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
) -> SamplingParams:
    """The checkpoint's own settings, with whatever the caller gives in their place (None: not given).

    temperature 0 is greedy. A top_k, top_p or min_p that asks for a choice turns sampling on where the checkpoint is
    greedy and the caller gives no temperature, since it would mean nothing otherwise.
    """
    wants_choice = bool(top_k) or (top_p is not None and top_p < 1) or bool(min_p)
    own_temperature = defaults.temperature if defaults.do_sample or wants_choice else 0.0
    penalty = defaults.repetition_penalty if repetition_penalty is None else repetition_penalty
    return SamplingParams(
        temperature=own_temperature if temperature is None else temperature,
        top_k=defaults.top_k if top_k is None else top_k,
        top_p=defaults.top_p if top_p is None else top_p,
        min_p=0.0 if min_p is None else min_p,
        repetition_penalty=penalty,
        seed=seed,
    )


def _finish_reason(
    token_ids: list[int], eos: frozenset[int], stopped: bool, max_new_tokens: int
) -> FinishReason | None:
    if token_ids[-1] in eos:
        return "stop"
    if stopped:
        return "stop_string"
    return "length" if len(token_ids) >= max_new_tokens else None
