"""Decode steps as CUDA graphs, as far as the CPU can tell: the same buffers, masks and run options, the same answers.

On the CPU nothing is captured (ONNX Runtime's CPU provider ignores the id), everything else is the same code.
"""

import gc
from pathlib import Path

import numpy as np
import pytest

from vlmport.runtime import load
from vlmport.runtime.decoder import Decoder
from vlmport.runtime.device import NOT_CAPTURED, graph_run_options
from vlmport.runtime.errors import CapacityError, InputError
from vlmport.runtime.model import Model


@pytest.fixture(scope="module")
def model(package_tiny_a: Path) -> Model:
    return load(package_tiny_a, "int4")


@pytest.fixture
def graphs(model: Model) -> Decoder:
    return Decoder(model.session("decoder"), model.cache_spec, step_graph=True)


def embeds(model: Model, length: int, seed: int = 0) -> np.ndarray:
    width = model.session("decoder").inputs["inputs_embeds"].shape[-1]
    return np.random.default_rng(seed).standard_normal((length, width)).astype(np.float32) * 0.3


def run(decoder: Decoder, rows: np.ndarray, prompt: int, length: int) -> tuple[list[np.ndarray], np.ndarray, object]:
    """(logits after the prompt and each step, keys of the first layer, the cache)."""
    cache = decoder.new_cache(length)
    positions = np.tile(np.arange(prompt), (3, 1))
    logits = [decoder.prefill(rows[:prompt], positions, cache)[0]]
    logits += [decoder.step(rows[at], at, cache) for at in range(prompt, len(rows))]
    return logits, cache.keys(0), cache


def test_a_mask_of_full_length_changes_no_bit(model: Model, graphs: Decoder) -> None:
    rows = embeds(model, 12)
    plain, keys, _ = run(model.decoder, rows, 7, 64)
    fixed, same, _ = run(graphs, rows, 7, 64)
    for want, have in zip(plain, fixed, strict=True):
        np.testing.assert_array_equal(want, have)
    np.testing.assert_array_equal(keys, same)


def test_shapes_and_places_stay_from_step_to_step(model: Model, graphs: Decoder) -> None:
    cache = graphs.new_cache(40)
    graphs.prefill(embeds(model, 3), np.tile(np.arange(3), (3, 1)), cache)
    buffers = cache.step_buffers
    assert buffers is not None
    inner = [buffers._mask, buffers._embeds, buffers._positions, buffers._logits]
    values = [part.value for part in inner if part is not None]
    assert len(values) == 4
    places = [value.data_ptr() for value in values]
    for position in range(3, 8):
        graphs.step(embeds(model, 1)[0], position, cache)
        assert cache.step_buffers is buffers
        assert [value.data_ptr() for value in values] == places
    assert values[0].numpy().tolist() == [[1] * 8 + [0] * (values[0].shape()[1] - 8)]


def test_buffers_are_used_again_and_hold_nothing_of_the_last_answer(model: Model, graphs: Decoder) -> None:
    """A graph knows addresses: the next answer has to have the same ones, and may see nothing that was there."""
    _, _, first = run(graphs, embeds(model, 20), 9, 64)
    buffers, options = first.step_buffers, first.step_options
    del first
    gc.collect()
    rows = embeds(model, 12, seed=1)
    again, _, second = run(graphs, rows, 5, 50)
    assert second.step_buffers is buffers
    assert second.step_options is options
    for want, have in zip(run(model.decoder, rows, 5, 50)[0], again, strict=True):
        np.testing.assert_array_equal(want, have)


def test_answers_at_the_same_time_have_buffers_and_graphs_of_their_own(graphs: Decoder) -> None:
    first, second = graphs.new_cache(64), graphs.new_cache(64)
    ids = [cache.step_options.get_run_config_entry("gpu_graph_id") for cache in (first, second)]
    assert len(set(ids)) == 2
    assert str(NOT_CAPTURED) not in ids
    assert first.step_buffers is not second.step_buffers


def test_lengths_are_few_but_limits_hold(model: Model, graphs: Decoder) -> None:
    first = graphs.new_cache(10)
    buffers = first.step_buffers
    del first
    gc.collect()
    second = graphs.new_cache(200)
    assert second.step_buffers is buffers, "both lengths are met by one"
    assert second.max_length == 200
    third = graphs.new_cache(4)
    graphs.prefill(embeds(model, 4), np.tile(np.arange(4), (3, 1)), third)
    with pytest.raises(CapacityError):
        graphs.step(embeds(model, 1)[0], 4, third)


def test_prompts_are_not_captured() -> None:
    assert graph_run_options(NOT_CAPTURED).get_run_config_entry("gpu_graph_id") == "-1"


def test_cuda_graphs_are_for_the_cuda_target(package_tiny_a: Path) -> None:
    with pytest.raises(InputError, match="cuda_graph"):
        load(package_tiny_a, "int4", cuda_graph=True)
