"""The key/value cache in 8 bits: bounds of its codes, the graph that keeps them, and what is told where it cannot."""

import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vlmport.cli.main import main
from vlmport.quant.kv_cache import cache_scales
from vlmport.quant.recipe import CacheFormat, Recipe, load_recipe, with_cache
from vlmport.runtime import load
from vlmport.runtime.cache import Cache
from vlmport.runtime.errors import RecipeError
from vlmport.runtime.package import Package
from vlmport.validate.samples import draw_picture


@given(
    hnp.arrays(np.float32, (5, 2, 3), elements=st.floats(-1e3, 1e3, width=32)), st.sampled_from(["channel", "tensor"])
)
@settings(max_examples=80)
def test_codes_of_what_was_seen_err_by_half_a_scale(values_TGE: np.ndarray, scales: str) -> None:
    found = cache_scales(np.abs(values_TGE).max(0), CacheFormat(8, scales))
    scale = found.astype(np.float64) if len(found) == 1 else found.reshape(2, 3).astype(np.float64)
    assert (found > 0).all()
    codes = np.rint(values_TGE / scale)
    assert np.abs(codes).max() <= 127
    assert (np.abs(codes * scale - values_TGE) <= scale * 0.5001).all()


def test_a_large_channel_costs_the_others_nothing_with_scales_of_channels() -> None:
    values = np.random.default_rng(0).standard_normal((64, 2, 16)).astype(np.float32)
    values[:, 0, 3] *= 60
    errors = {}
    for scales in ("channel", "tensor"):
        scale = cache_scales(np.abs(values).max(0), CacheFormat(8, scales))
        scale = scale if len(scale) == 1 else scale.reshape(2, 16)
        errors[scales] = np.delete(np.abs(np.rint(values / scale) * scale - values).reshape(64, -1), 3, axis=1).mean()
    assert errors["channel"] < errors["tensor"] / 20


@pytest.fixture(scope="module")
def package(package_tiny_a: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_a with fp32 and int4 on a cache in 8 bits."""
    folder = Path(shutil.copytree(package_tiny_a, tmp_path_factory.mktemp("kv") / "package"))
    for recipe, cache in (("fp32", "int8"), ("int4", "int8-tensor")):
        arguments = ["quantize", str(folder), "--recipe", recipe, "--kv-cache", cache]
        assert main([*arguments, "--calibration", str(calibration)]) == 0
    return folder


def run(package: Path, variant: str, chunk: int = 256) -> tuple[np.ndarray, np.ndarray, Cache]:
    """Logits of a prompt with a picture, of one token more, and the cache."""
    model = load(package, variant=variant, prefill_chunk=chunk)
    picture = {"type": "image", "image": draw_picture(9, 84, 84)}
    prepared = model.prepare([{"role": "user", "content": [picture, {"type": "text", "text": "And this?"}]}])
    visual = model.features(prepared)
    assert visual is not None
    embeds = prepared.seen(model.embed(prepared, visual.features))
    cache = model.new_cache(len(embeds) + 8)
    logits = model.prefill(embeds, prepared.seen_positions, cache, all_logits=True)
    return logits, model.step(5, cache, prepared.rope_delta), cache


def test_the_cache_is_in_codes_and_answers_stay(package: Path) -> None:
    expected, expected_step, floats = run(package, "fp32")
    logits, step, cache = run(package, "fp32_kv8")
    for found, right in ((logits, expected), (step, expected_step)):
        assert 0 < np.linalg.norm(found - right) < 0.1 * np.linalg.norm(right)
    assert cache.num_bytes * 4 == floats.num_bytes
    for found, wanted, scales in (
        (cache.keys(0), floats.keys(0), scales_of(package, "fp32_kv8", "past_key_values.0.key")),
        (cache.values(0), floats.values(0), scales_of(package, "fp32_kv8", "past_key_values.0.value")),
    ):
        assert found.dtype == np.float32
        right = np.clip(np.rint(wanted / scales), -128, 127) * scales  # of the first layer, whose input is the same
        np.testing.assert_allclose(found, right, atol=1.001 * scales.max(), err_msg="a tie goes either way")
        assert np.mean(np.abs(found - right)) < 1e-3 * scales.max()
    chunked, _, _ = run(package, "fp32_kv8", chunk=7)
    assert np.linalg.norm(chunked - logits) < 0.01 * np.linalg.norm(logits)


def scales_of(package: Path, variant: str, name: str) -> np.ndarray:
    """[G, 1, E] of an input of the decoder."""
    graph = ir.load(Package.open(package).graph_path("decoder", variant)).graph
    past = next(value for value in graph.inputs if value.name == name)
    return graph.initializers[f"{name}.scale"].const_value.numpy().reshape(past.shape[1], 1, past.shape[3])


def test_the_manifest_tells(package: Path) -> None:
    manifest = Package.open(package).manifest
    variant = manifest.variants["int4_kv8t"]
    assert variant.recipe["cache"] == {"bits": 8, "scales": "tensor"}
    assert variant.calibration is not None
    decoder = variant.graphs["decoder"]
    assert {port.dtype for name, port in decoder.inputs.items() if name.startswith("past_")} == {"int8"}
    assert {port.dtype for name, port in decoder.outputs.items() if name.startswith("present")} == {"int8"}
    assert variant.graphs["vision_encoder"] == manifest.variants["int4"].graphs["vision_encoder"], "shared"
    assert decoder.formats == manifest.variants["int4"].graphs["decoder"].formats


def test_answers_are_generated(package: Path) -> None:
    answers = [
        load(package, variant=variant).generate([{"role": "user", "content": "Say something."}], max_new_tokens=6)
        for variant in ("fp32", "fp32_kv8")
    ]
    assert len(answers[0].token_ids) == len(answers[1].token_ids) == 6
    assert answers[0].token_ids[:2] == answers[1].token_ids[:2]


def test_names_and_what_cannot_be(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert with_cache(load_recipe("int4", block_size=128), "channel").name == "int4_b128_kv8"
    with pytest.raises(RecipeError, match="builtin recipe has other rules"):
        Recipe("int4", load_recipe("int4").rules, CacheFormat())
    assert main(["quantize", str(package), "--recipe", "int8", "--kv-cache", "int8"]) == 2
    assert "give --calibration DIR" in capsys.readouterr().err
