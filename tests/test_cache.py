"""The cache in place: whatever the chunks, the logits are those of the whole sequence at once."""

import tracemalloc
from pathlib import Path

import decoder_graph as tiny
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmport.runtime.cache import plan_cache_length
from vlmport.runtime.decoder import Decoder
from vlmport.runtime.errors import CapacityError, InputError, PackageError
from vlmport.runtime.session import open_session

TOKENS = 13


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("graph") / "decoder.onnx")


def inputs(num_tokens: int = TOKENS) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    embeds = rng.standard_normal((num_tokens, tiny.D)).astype(np.float32)
    return embeds, rng.integers(0, 40, (3, num_tokens))


@pytest.mark.parametrize("chunk", [1, 3, 4, 12, 13, 256])
def test_chunks_do_not_change_the_logits(graph: Path, chunk: int) -> None:
    embeds, positions = inputs()
    expected = tiny.reference(embeds, positions)
    decoder = Decoder(open_session(graph, num_threads=1), tiny.spec(), chunk=chunk)
    everything = decoder.prefill(embeds, positions, decoder.new_cache(TOKENS), all_logits=True)
    np.testing.assert_allclose(everything, expected, atol=1e-5)
    last = decoder.prefill(embeds, positions, decoder.new_cache(40))
    assert last.shape == (1, tiny.V)
    np.testing.assert_allclose(last[0], expected[-1], atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(split=st.integers(1, TOKENS - 1), spare=st.integers(0, 9))
def test_prefill_and_steps_equal_the_whole_sequence(graph: Path, split: int, spare: int) -> None:
    embeds, positions = inputs()
    positions[:] = positions[0]  # a step has one position on all rows
    expected = tiny.reference(embeds, positions)
    decoder = Decoder(open_session(graph, num_threads=1), tiny.spec(), chunk=5)
    cache = decoder.new_cache(TOKENS + spare)
    rows = [decoder.prefill(embeds[:split], positions[:, :split], cache)[0]]
    rows += [decoder.step(embeds[i], int(positions[0, i]), cache) for i in range(split, TOKENS)]
    np.testing.assert_allclose(np.stack(rows), expected[split - 1 :], atol=1e-5)
    assert cache.length == TOKENS


def test_a_step_keeps_what_was_returned_before(graph: Path) -> None:
    decoder = Decoder(open_session(graph, num_threads=1), tiny.spec())
    cache = decoder.new_cache(8)
    embeds, positions = inputs(2)
    first = decoder.prefill(embeds, positions, cache)
    kept = first.copy()
    decoder.step(embeds[0], 2, cache)
    np.testing.assert_array_equal(first, kept)


def test_the_buffers_are_written_in_place_and_nothing_else_is_allocated(graph: Path) -> None:
    decoder = Decoder(open_session(graph, num_threads=1), tiny.spec())
    cache = decoder.new_cache(10)
    embeds, positions = inputs(4)
    decoder.prefill(embeds, positions, cache)
    before = cache.keys(1)
    decoder.step(embeds[0], 4, cache)
    assert before.shape == (tiny.KV, 4, tiny.HEAD)
    np.testing.assert_array_equal(cache.keys(1)[:, :4], before)
    assert np.abs(cache.values(1)[:, 4]).min() > 0
    whole = cache._buffers["past_key_values.1.key"].numpy()
    assert whole.shape == (1, tiny.KV, 10, tiny.HEAD)
    assert not whole[0, :, 5:].any()


def test_steps_reuse_their_buffers(graph: Path) -> None:
    """Memory that Python holds does not grow from step to step, and inputs and logits stay where they are."""
    decoder = Decoder(open_session(graph, num_threads=1), tiny.spec())
    cache = decoder.new_cache(300)
    embeds, positions = inputs(4)
    decoder.prefill(embeds, positions, cache)
    for position in range(4, 20):
        decoder.step(embeds[0], position, cache)
    buffers = cache.step_buffers
    assert buffers is not None
    places = [held.value.data_ptr() for held in (buffers._embeds, buffers._positions, buffers._logits)]
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for position in range(20, 220):
            decoder.step(embeds[0], position, cache)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 2000, grown
    assert cache.step_buffers is buffers
    assert [held.value.data_ptr() for held in (buffers._embeds, buffers._positions, buffers._logits)] == places


def test_prompts_and_steps_may_alternate(graph: Path) -> None:
    """A prompt after steps binds other shapes, and the steps after it find theirs again."""
    embeds, positions = inputs()
    positions[:] = positions[0]
    decoder = Decoder(open_session(graph, num_threads=1), tiny.spec(), chunk=3)
    cache = decoder.new_cache(TOKENS)
    rows = [decoder.prefill(embeds[:4], positions[:, :4], cache, all_logits=True)]
    rows += [decoder.step(embeds[i], int(positions[0, i]), cache)[None] for i in (4, 5)]
    rows += [decoder.prefill(embeds[6:10], positions[:, 6:10], cache, all_logits=True)]
    rows += [decoder.step(embeds[i], int(positions[0, i]), cache)[None] for i in range(10, TOKENS)]
    np.testing.assert_allclose(np.concatenate(rows), tiny.reference(embeds, positions), atol=1e-5)


def test_two_caches_do_not_mix_and_a_reset_one_starts_anew(graph: Path) -> None:
    decoder = Decoder(open_session(graph, num_threads=1), tiny.spec())
    embeds, positions = inputs(6)
    one, two = decoder.new_cache(8), decoder.new_cache(20)
    decoder.prefill(embeds[::-1], positions, two)
    expected = decoder.prefill(embeds, positions, one)
    two.reset()
    np.testing.assert_array_equal(decoder.prefill(embeds, positions, two), expected)


def test_plain_positions(tmp_path: Path) -> None:
    embeds, positions = inputs()
    decoder = Decoder(open_session(tiny.save(tmp_path / "d.onnx", mrope=False), num_threads=1), tiny.spec())
    cache = decoder.new_cache(TOKENS)
    decoder.prefill(embeds[:-1], positions[0, :-1], cache)
    logits = decoder.step(embeds[-1], int(positions[0, -1]), cache)
    np.testing.assert_allclose(logits, tiny.reference(embeds, positions[0])[-1], atol=1e-5)


def test_too_many_tokens_are_refused_before_anything_is_computed(graph: Path) -> None:
    decoder = Decoder(open_session(graph, num_threads=1), tiny.spec(), chunk=2)
    cache = decoder.new_cache(5)
    embeds, positions = inputs(6)
    with pytest.raises(CapacityError, match=r"5 tokens holds 0 and cannot take 6 more: make it longer"):
        decoder.prefill(embeds, positions, cache)
    assert cache.length == 0
    decoder.prefill(embeds[:5], positions[:, :5], cache)
    with pytest.raises(CapacityError, match="cannot take 1 more"):
        decoder.step(embeds[0], 5, cache)
    with pytest.raises(InputError, match="empty"):
        decoder.prefill(embeds[:0], positions[:, :0], decoder.new_cache(5))


def test_all_logits_need_their_switch_in_the_graph(tmp_path: Path) -> None:
    embeds, positions = inputs()
    decoder = Decoder(open_session(tiny.save(tmp_path / "d.onnx", keep=False), num_threads=1), tiny.spec())
    last = decoder.prefill(embeds, positions, decoder.new_cache(TOKENS))
    np.testing.assert_allclose(last[0], tiny.reference(embeds, positions)[-1], atol=1e-5)
    with pytest.raises(PackageError, match="num_logits_to_keep"):
        decoder.prefill(embeds, positions, decoder.new_cache(TOKENS), all_logits=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 3}, r"2 layers, cache.num_layers of vlmport.json is 3"),
        ({"num_layers": 1}, r"2 layers, cache.num_layers of vlmport.json is 1"),
        ({"head_dim": 16}, r"past_key_values.0.key is float32"),
        ({"num_kv_heads": 2}, r"says float32 \[1, 2, length, 8\]"),
        ({"dtype": "float16"}, r"says float16"),
    ],
)
def test_manifest_and_graph_must_agree(graph: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(PackageError, match=message):
        Decoder(open_session(graph, num_threads=1), tiny.spec(**changes))


def test_a_graph_without_a_cache(tmp_path: Path) -> None:
    path = tiny.save(tmp_path / "d.onnx", num_layers=0)
    with pytest.raises(PackageError, match="0 layers"):
        Decoder(open_session(path, num_threads=1), tiny.spec())


def test_a_cache_that_no_memory_holds(graph: Path) -> None:
    decoder = Decoder(open_session(graph, num_threads=1), tiny.spec())
    with pytest.raises(CapacityError, match=r"10000000000000 tokens takes 1280000\.0 GB.*--cache-length"):
        decoder.new_cache(10**13)
    with pytest.raises(InputError, match="cache length: 0"):
        decoder.new_cache(0)


@pytest.mark.parametrize("chunk", [0, -1])
def test_chunks_below_one(graph: Path, chunk: int) -> None:
    with pytest.raises(InputError, match="prefill chunk"):
        Decoder(open_session(graph, num_threads=1), tiny.spec(), chunk=chunk)


def test_planned_length() -> None:
    spec = tiny.spec(max_length=1000)
    assert plan_cache_length(spec, 100, 20) == 128
    assert plan_cache_length(spec, 100, 28) == 128
    assert plan_cache_length(spec, 100, 29) == 192
    assert plan_cache_length(spec, 990, 500) == 1000
    assert plan_cache_length(spec, 100, 500, limit=120) == 120
    assert plan_cache_length(spec, 1000, 1) == 1000
    with pytest.raises(CapacityError, match=r"1001 tokens and the model was made for 1000.*shorten"):
        plan_cache_length(spec, 1001, 1)
    with pytest.raises(CapacityError, match=r"121 tokens and the cache holds 120: raise --cache-length.*1000"):
        plan_cache_length(spec, 121, 1, limit=120)
    for limit in (0, -5, 1001):
        with pytest.raises(InputError, match=f"cache length: {limit} is not between 1 and the 1000"):
            plan_cache_length(spec, 1, 1, limit=limit)
