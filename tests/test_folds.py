"""Folds are found in every block, and factors in them change nothing; outliers there cost 8 bits next to nothing."""

import base64
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from vlmport.quant.apply import open_float_graph
from vlmport.quant.balance import balance
from vlmport.quant.folds import Fold, find_folds
from vlmport.quant.found import Factors
from vlmport.quant.kv_cache import note_cache_factors
from vlmport.quant.recipe import Recipe, Rule, WeightFormat, load_recipe
from vlmport.quant.rewrite import rewrite
from vlmport.quant.store import write_graph
from vlmport.runtime.package import Package

ROLES = ("decoder", "projector", "vision_encoder")


def folds_of(package: Path, role: str) -> dict[str, Fold]:
    """By the first of the readers."""
    return {fold.readers[0]: fold for fold in find_folds(open_float_graph(Package.open(package), role)[0].graph)}


def test_folds_are_found_in_every_block(package_tiny_a: Path) -> None:
    decoder, tower = (folds_of(package_tiny_a, role) for role in ("decoder", "vision_encoder"))
    block = "layers.1."
    assert decoder[f"{block}self_attn.q_proj.weight"].readers == tuple(
        f"{block}self_attn.{name}_proj.weight" for name in "qkv"
    )
    shared = decoder[f"{block}self_attn.o_proj.weight"]
    assert [rows.parameter for rows in shared.writers] == [
        f"{block}self_attn.v_proj.weight",
        f"{block}self_attn.v_proj.bias",
    ]
    assert shared.num_channels * 2 == len(shared.channels), "two query heads read one value head"
    assert f"{block}mlp.down_proj.weight" in decoder
    assert "blocks.1.mlp.down_proj.weight" in tower
    fused = tower["blocks.1.attn.proj.weight"]
    assert [rows.start for rows in fused.writers] == [128, 128], "values are the last third"
    (merger,) = folds_of(package_tiny_a, "projector").values()
    assert len(merger.channels) == 4 * merger.num_channels, "four patches side by side"


def written(package: Path, role: str, recipe: Recipe, folder: Path, planted: str = "") -> ort.InferenceSession:
    """The graph of a role by a recipe, factors being `planted` in every fold: any "anywhere", or large "outliers"."""
    model, source = open_float_graph(Package.open(package), role)
    random, factors = np.random.default_rng(0), Factors()
    for fold in find_folds(model.graph) if planted else ():
        factors_C = np.exp(random.normal(0, 1, fold.num_channels)).astype(np.float32)
        if planted == "outliers":
            factors_C = np.where(random.random(fold.num_channels) < 0.04, np.float32(1 / 50), np.float32(1))
        factors.add(fold, factors_C, model.graph, source)
    source = factors.apply(model, source)
    source = balance(model.graph, role, recipe, "cpu", source).apply(model, source)
    folder.mkdir()
    graph = write_graph(model, rewrite(model, role, recipe), source, folder, role).graph
    return ort.InferenceSession(folder / graph, providers=["CPUExecutionProvider"])


def output(package: Path, role: str, recipe: Recipe, folder: Path, planted: str = "") -> np.ndarray:
    session = written(package, role, recipe, folder, planted)
    return session.run(None, feeds(role, session))[0]


@pytest.mark.parametrize("role", ROLES)
def test_a_fold_leaves_the_function_alone(package_tiny_a: Path, tmp_path: Path, role: str) -> None:
    """Any factors in every fold at once: a graph says the same in float32."""
    plain = output(package_tiny_a, role, load_recipe("fp32"), tmp_path / "plain")
    folded = output(package_tiny_a, role, load_recipe("fp32"), tmp_path / "folded", "anywhere")
    assert (folded != plain).any()
    np.testing.assert_allclose(folded, plain, atol=2e-4 * np.abs(plain).max())


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("activations", ["float", "int8-dynamic"])
def test_outliers_in_any_fold_cost_nothing(package_tiny_a: Path, tmp_path: Path, role: str, activations) -> None:
    """Of norms, up projections and values; without balancing they cost several times the error."""

    def error(*, balanced: bool, planted: str) -> float:
        recipe = Recipe("mine", (Rule("*/*.weight", WeightFormat(8, activations=activations, balance=balanced)),))
        found = output(package_tiny_a, role, recipe, tmp_path / f"{balanced}{planted}", planted)
        return float(np.sqrt(np.square(found - exact).mean()))

    exact = output(package_tiny_a, role, load_recipe("fp32"), tmp_path / "exact")
    calm = error(balanced=False, planted="")
    assert error(balanced=True, planted="") < 1.5 * calm
    assert error(balanced=True, planted="outliers") < 1.5 * calm
    assert error(balanced=False, planted="outliers") > 2 * calm


def test_the_graph_tells_what_its_cache_is_divided_by(package_tiny_a: Path, tmp_path: Path) -> None:
    """Twice over: what calibration folds comes on top of what balancing does."""
    fp32 = load_recipe("fp32")
    sessions = [written(package_tiny_a, "decoder", fp32, tmp_path / f"{name}a", name) for name in ("", "anywhere")]
    plain, folded = (session.run(["present.1.value"], feeds("decoder", session))[0] for session in sessions)
    told = sessions[1].get_modelmeta().custom_metadata_map["past_key_values.1.value.factors"]
    factors = np.frombuffer(base64.b64decode(told), np.float32).reshape(1, plain.shape[1], 1, plain.shape[3])
    assert np.abs(folded - plain).max() > 0.1 * np.abs(plain).max()
    np.testing.assert_allclose(folded * factors, plain, atol=1e-4 * np.abs(plain).max())
    model, _ = open_float_graph(Package.open(package_tiny_a), "decoder")
    for _ in range(2):
        note_cache_factors(model, {"layers.0.self_attn.o_proj.weight": np.full(128, 3, np.float32)})
    twice = np.frombuffer(base64.b64decode(model.metadata_props["past_key_values.0.value.factors"]), np.float32)
    assert set(twice.tolist()) == {9}


def feeds(role: str, session) -> dict[str, np.ndarray]:
    """Any inputs that fit: one image of 4 x 4 patches, a prompt of 6 tokens."""
    random = np.random.default_rng(1)
    known = {
        "patch_positions": np.stack(np.meshgrid(range(4), range(4), indexing="ij"), -1).reshape(-1, 2),
        "cu_seqlens": np.array([0, 16], np.int32),
        "window_index": np.arange(4),
        "cu_window_seqlens": np.array([0, 16], np.int32),
        "attention_mask": np.ones((1, 6), np.int64),
        "position_ids": np.broadcast_to(np.arange(6), (3, 1, 6)).copy(),
    }
    found = {}
    for port in session.get_inputs():
        if port.name in known:
            found[port.name] = known[port.name]
            continue
        sizes = {"num_patches": 16, "batch_size": 1, "sequence_length": 6, "past_length": 0}
        shape = [size if isinstance(size, int) else sizes[size] for size in port.shape]
        found[port.name] = random.standard_normal(shape).astype(np.float32)
    return found
