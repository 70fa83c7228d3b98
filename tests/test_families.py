"""Every family found in families/: its tiny config traces, lowers, and the graph computes what its PyTorch modules
compute."""

import copy
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from vlmport.export.family import RoleSpec, families, family_of, load_family
from vlmport.export.lower import COMPUTE_DTYPE, TARGETS, lower
from vlmport.export.trace import OPSET, trace
from vlmport.runtime.errors import CheckpointError

ROLES = [(name, role) for name in families() for role in load_family(name).roles(load_family(name).tiny_config)]


def role_of(family: str, role: str) -> RoleSpec:
    spec = load_family(family)
    return spec.roles(spec.tiny_config)[role]


@functools.cache
def lowered(family: str, role: str, target: str) -> ir.Model:
    """Traced and lowered once a test process; whoever changes it clones it first."""
    model = trace(role_of(family, role), COMPUTE_DTYPE[target])
    lower(model, target)
    return model


def test_families_are_found_by_listing() -> None:
    assert len(families()) >= 2
    for name in families():
        assert re.sub(r"\W", "_", load_family(name).name).lower() == name


@pytest.mark.parametrize("name", families())
def test_config_finds_its_family_and_no_other(name: str) -> None:
    config = load_family(name).tiny_config
    assert [other for other in families() if load_family(other).matches(config)] == [name]
    assert family_of(config, Path("config.json")) is load_family(name)


def test_unknown_model_type_lists_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match=r"'banana'.*known ones are") as caught:
        family_of({"model_type": "banana"}, Path("x/config.json"))
    assert all(load_family(name).name in str(caught.value) for name in families())


@pytest.mark.parametrize("name", families())
def test_normalise_is_idempotent(name: str) -> None:
    spec = load_family(name)
    for role, role_spec in spec.roles(spec.tiny_config).items():
        for parameter in lowered(name, role, "cpu").graph.initializers:
            wanted = role_spec.tensor(parameter, (1,)).name
            assert spec.normalise(wanted) == wanted


@pytest.mark.parametrize("name", families())
def test_a_missing_field_is_named(name: str) -> None:
    spec = load_family(name)
    config: dict[str, Any] = copy.deepcopy(spec.tiny_config)
    if "decoder" not in spec.roles(config):
        pytest.skip("has no vocabulary")
    text = next(part for part in (config, *config.values()) if isinstance(part, dict) and "vocab_size" in part)
    del text["vocab_size"]
    with pytest.raises(CheckpointError, match="vocab_size is missing"):
        spec.roles(config)
    text["vocab_size"] = "many"
    with pytest.raises(CheckpointError, match="vocab_size is 'many', expected int"):
        spec.roles(config)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("family", "role"), ROLES)
def test_lowered_graph_is_valid_and_dynamic(family: str, role: str, target: str) -> None:
    spec, model = role_of(family, role), lowered(family, role, target)
    assert model.opset_imports[""] == OPSET
    functions = {name for _, name, _ in model.functions}
    assert {node.op_type for node in model.graph if node.domain == "vlmport"} <= functions
    for value, port in zip((*model.graph.inputs, *model.graph.outputs), (*spec.inputs, *spec.outputs), strict=True):
        assert value.name == port.name
        assert [str(dim) for dim in value.shape or ()] == [str(dim) for dim in port.shape]
    filled = with_values(model, torch_module(spec))
    onnx.checker.check_model(ir.serde.serialize_model(filled))


@pytest.mark.parametrize(("family", "role"), ROLES)
def test_graph_equals_its_modules_at_sizes_it_was_not_traced_at(family: str, role: str) -> None:
    spec, model = role_of(family, role), lowered(family, role, "cpu")
    module = torch_module(spec)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    serialized = ir.serde.serialize_model(with_values(model, module)).SerializeToString()
    session = ort.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])
    for sizes in SIZES:
        feeds = {
            port.name: array
            for port in spec.inputs
            for array in [example(port.name, port.shape, port.dtype, sizes, spec.multiples)]
        }
        arguments: list[Any] = [torch.from_numpy(feed) for feed in feeds.values()]
        if spec.variadic:
            arguments = [*arguments[: -spec.variadic], arguments[-spec.variadic :]]
        with torch.no_grad():
            expected = module(*arguments)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for want, have in zip(expected, session.run(None, feeds), strict=True):
            np.testing.assert_allclose(have, want.numpy(), atol=5e-5, rtol=1e-4)


# One image of 4 x 4 patches, then two of 4 x 2 and 2 x 6; batch 1 and 2, with and without a past.
SIZES = (
    {"grids": [(4, 4)], "batch_size": 1, "sequence_length": 1, "past_length": 0, "num_logits": 0},
    {"grids": [(4, 2), (2, 6)], "batch_size": 1, "sequence_length": 5, "past_length": 3, "num_logits": 1},
    {"grids": [(6, 6)], "batch_size": 2, "sequence_length": 4, "past_length": 0, "num_logits": 2},
)


def routing(sizes: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every third token is visual, but the first and so a single one."""
    places = np.arange(sizes["batch_size"] * sizes["sequence_length"])
    text, visual = places[places % 3 != 2], places[places % 3 == 2]
    order = np.argsort(np.concatenate([text, visual])).reshape(sizes["batch_size"], -1)
    return {"text_rows": text, "visual_rows": visual, "row_places": order}


def example(
    name: str, shape: tuple[int | str, ...], dtype: str, sizes: dict[str, Any], multiples: Mapping[str, int]
) -> np.ndarray:
    """A sound value of a named input; index inputs are those of the sizes' grids, one window an image.

    Where images are of one size, there are as many frames as the sizes have grids.
    """
    areas = [h * w for h, w in sizes["grids"]]
    bounds = np.cumsum([0, *areas]).astype(np.int32)
    generator = np.random.default_rng(len(name))
    blocks = bounds[-1] // 4
    known: dict[str, np.ndarray] = {
        "cu_seqlens": bounds,
        "cu_window_seqlens": bounds,
        "window_index": generator.permutation(blocks) if len(areas) == 1 else np.arange(blocks),
        "patch_positions": generator.integers(0, 6, (bounds[-1], 2)),
        "num_logits_to_keep": np.array([sizes["num_logits"]]),
        "image_rows": generator.integers(0, 2 + blocks, 7),
        **routing(sizes),
        "frame_windows": generator.integers(0, len(areas), (3, *shape[1:])) if name == "frame_windows" else bounds,
    }
    if name in known:
        return known[name]
    total = sizes["past_length"] + sizes["sequence_length"]
    dims = {
        **sizes,
        "num_patches": int(bounds[-1]),
        "num_merge_blocks": int(blocks),
        "num_images": len(areas),
        "total_length": total,
        "num_visuals": len(areas),
        **{dim: size * len(areas) for dim, size in multiples.items()},
    }
    size = [dims[dim] if isinstance(dim, str) else dim for dim in shape]
    if name == "attention_mask":
        return np.ones(size, np.int64)
    if dtype == "int64":
        return generator.integers(0, 50, size)
    return generator.standard_normal(size, dtype=np.float32)


def torch_module(spec: RoleSpec) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(7)
    module = spec.build().eval()
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator) * 0.2
        parameter.data = values + 1 if parameter.ndim == 1 and "bias" not in name else values
    return module


def with_values(model: ir.Model, module: torch.nn.Module) -> ir.Model:
    filled = model.clone()
    state = module.state_dict()
    for name, value in filled.graph.initializers.items():
        if value.const_value is None:
            assert value.dtype is not None
            value.const_value = ir.tensor(state[name].numpy().astype(value.dtype.numpy()), name=name)
    return filled


def test_both_config_layouts_mean_the_same() -> None:
    """The flat layout as published and the nested one as re-saved by transformers 5."""
    for folder in sorted((Path(__file__).parent / "goldens" / "qwen2_5_vl").iterdir()):
        flat, nested = (json.loads((folder / name).read_text()) for name in ("config.json", "config.tf5.json"))
        spec = family_of(flat, folder)
        assert spec.matches(nested)
        first, second = spec.roles(flat), spec.roles(nested)
        for role in first:
            assert first[role].inputs == second[role].inputs
            assert first[role].outputs == second[role].outputs
            names, again = (dict(spec[role].build().named_parameters()) for spec in (first, second))
            assert {name: values.shape for name, values in names.items()} == {n: v.shape for n, v in again.items()}
            for name in names:
                assert first[role].tensor(name, (2, 2)) == second[role].tensor(name, (2, 2))
        documents: dict[str, Any] = {"preprocessor_config.json": {"min_pixels": 3136, "max_pixels": 100352}}
        nested_processor = {"size": {"shortest_edge": 3136, "longest_edge": 100352}}
        newer = {"processor_config.json": {"image_processor": nested_processor}}
        assert spec.manifest(flat, documents) == spec.manifest(nested, newer)
