"""The generation loop against scripted logits: when it ends, what it says and what it counts."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from vlmport.runtime.errors import InputError
from vlmport.runtime.generate import (
    Generation,
    GenerationOptions,
    GenerationStream,
    Timings,
    generate_tokens,
    sampling_params,
)
from vlmport.runtime.manifest import GenerationDefaults
from vlmport.runtime.sample import Sampler, SamplingParams
from vlmport.runtime.text_stream import TextStream

TOKENIZER = Tokenizer.from_file(str(Path(__file__).parent / "goldens/qwen2_5_vl/tiny_a/tokenizer.json"))
EOS = TOKENIZER.token_to_id("<|im_end|>")
SIZE = 512


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def scripted(ids: Sequence[int], options: GenerationOptions) -> tuple[GenerationStream, list[int]]:
    """A model that says `ids` one after another, and the list of ids that were put through it as steps."""
    stepped: list[int] = []

    def logits(index: int) -> np.ndarray:
        row = np.zeros(SIZE, np.float32)
        row[ids[index]] = 1.0
        return row

    def step(token_id: int) -> np.ndarray:
        stepped.append(token_id)
        return logits(len(stepped))

    prefill: Callable[[], tuple[np.ndarray, Timings]] = lambda: (logits(0), Timings(vision=1.5, num_prompt_tokens=9))  # noqa: E731
    stream = TextStream(TOKENIZER, options.stop)
    pieces = generate_tokens(prefill, step, Sampler(options.sampling, []), stream, options, (EOS, 420))
    return GenerationStream(pieces), stepped


def test_an_end_token_ends_it_and_is_counted_but_not_spoken() -> None:
    ids = [*ids_of("two words"), EOS, 5]
    stream, stepped = scripted(ids, GenerationOptions())
    generation = stream.finish()
    assert generation.text == "two words"
    assert generation.token_ids == tuple(ids[:-1])
    assert generation.finish_reason == "stop"
    assert stepped == ids[:-2]  # nothing is computed after the end
    assert generation.timings.vision == 1.5
    assert generation.timings.num_prompt_tokens == 9
    assert generation.timings.num_generated_tokens == len(ids) - 1
    assert generation.timings.decode > 0


def test_length_ends_it_and_an_unfinished_character_shows() -> None:
    ids = ids_of("a€")
    generation = scripted(ids, GenerationOptions(max_new_tokens=2))[0].finish()
    assert (generation.text, generation.finish_reason, len(generation.token_ids)) == ("a\ufffd", "length", 2)


def test_end_tokens_can_be_ignored() -> None:
    ids = [EOS, 420, *ids_of("on"), EOS]
    options = GenerationOptions(max_new_tokens=len(ids), ignore_eos=True)
    generation = scripted(ids, options)[0].finish()
    assert (generation.text, generation.finish_reason, generation.token_ids) == ("on", "length", tuple(ids))


def test_a_stop_string_ends_it_without_a_trace() -> None:
    stream, stepped = scripted([*ids_of("one STOP two"), EOS], GenerationOptions(stop=("STOP",)))
    generation = stream.finish()
    assert (generation.text, generation.finish_reason) == ("one ", "stop_string")
    assert TOKENIZER.decode(list(generation.token_ids)).startswith("one STOP")
    assert len(stepped) == len(generation.token_ids) - 1


@settings(max_examples=150, deadline=None)
@given(
    ids=st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=30),
    stop=st.lists(st.text("abe €", min_size=1, max_size=3), max_size=2),
    ignore_eos=st.booleans(),
)
def test_pieces_add_up_to_the_text(ids: list[int], stop: list[str], ignore_eos: bool) -> None:
    options = GenerationOptions(max_new_tokens=len(ids), stop=tuple(stop), ignore_eos=ignore_eos)
    stream, _ = scripted(ids, options)
    pieces = list(stream)
    generation = stream.generation
    assert all(pieces)
    assert "".join(pieces) == generation.text
    assert generation.token_ids == tuple(ids[: len(generation.token_ids)])
    assert not any(string in generation.text for string in stop)
    if generation.finish_reason != "stop_string":
        assert generation.text == TOKENIZER.decode(list(generation.token_ids))


def test_the_answer_is_there_only_at_the_end() -> None:
    stream, _ = scripted([*ids_of("hi there"), EOS], GenerationOptions())
    next(stream)
    with pytest.raises(InputError, match="not finished"):
        _ = stream.generation
    assert isinstance(stream.finish(), Generation)
    with pytest.raises(StopIteration):
        next(stream)
    assert stream.generation.finish_reason == "stop"


def test_a_closed_stream_computes_nothing_more() -> None:
    stream, stepped = scripted([*ids_of("hi there"), EOS], GenerationOptions())
    next(stream)
    done = len(stepped)
    stream.close()
    assert list(stream) == []
    assert len(stepped) == done


def test_a_piece_is_out_before_the_next_token_is_computed() -> None:
    stream, stepped = scripted([*ids_of("hi there"), EOS], GenerationOptions())
    assert next(stream)
    assert stepped == [], "the first token needs the prompt alone"


@pytest.mark.parametrize("count", [0, -1])
def test_no_tokens_to_generate(count: int) -> None:
    with pytest.raises(InputError, match=f"max_new_tokens: {count} is not at least 1"):
        GenerationOptions(max_new_tokens=count)


def test_an_empty_stop_string() -> None:
    with pytest.raises(InputError, match="stop: an empty string"):
        GenerationOptions(stop=("",))


def test_speed_and_first_token() -> None:
    timings = Timings(1.0, 2.0, 3.0, 4.0, 5.0, decode=2.0, num_prompt_tokens=7, num_generated_tokens=5)
    assert timings.time_to_first_token == 15.0
    assert timings.tokens_per_second == 2.0
    assert Timings(num_generated_tokens=1).tokens_per_second == 0.0


OWN = GenerationDefaults((1,), do_sample=True, temperature=0.3, top_k=4, top_p=0.8, repetition_penalty=1.05)


def test_the_checkpoint_decides_what_the_caller_leaves_open() -> None:
    assert sampling_params(OWN) == SamplingParams(0.3, 4, 0.8, 0.0, 1.05)
    own_but_greedy = GenerationDefaults((1,), do_sample=False, temperature=0.3, repetition_penalty=1.05)
    assert sampling_params(own_but_greedy) == SamplingParams(repetition_penalty=1.05)


def test_the_caller_overrides_field_by_field() -> None:
    assert sampling_params(OWN, temperature=0.0, repetition_penalty=1.0).temperature == 0
    assert sampling_params(OWN, top_k=0, top_p=1.0, seed=3) == SamplingParams(0.3, 0, 1.0, 0.0, 1.05, 3)
    greedy = GenerationDefaults((1,))
    assert sampling_params(greedy).temperature == 0
    assert sampling_params(greedy, top_p=0.9).temperature == 1.0
    assert sampling_params(greedy, top_p=1.0, top_k=0, min_p=0.0).temperature == 0
    assert sampling_params(greedy, temperature=0.0, top_p=0.9).temperature == 0
