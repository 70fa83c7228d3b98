"""Which layers to raise: the gain of each is measured by having it in floats, and a damaged layer gains most."""

import shutil

import numpy as np
import onnx
import pytest

from vlmport.runtime.model import Model
from vlmport.runtime.package import Package
from vlmport.validate.advice import raising
from vlmport.validate.answers import answer_freely
from vlmport.validate.insides import LayerDrift
from vlmport.validate.mixed import MixedModel
from vlmport.validate.points import layer_of
from vlmport.validate.raises import measure_raises, raised_graph
from vlmport.validate.report import plain
from vlmport.validate.samples import built_in_samples
from vlmport.validate.stages import run_stages


@pytest.fixture(scope="module")
def package(package_tiny_b, tmp_path_factory):
    """int4 whose last decoder layer has scales that are wrong by a half."""
    path = shutil.copytree(package_tiny_b, tmp_path_factory.mktemp("raises") / "package")
    file = path / "onnx" / "decoder_int4.onnx"
    model = onnx.load(file, load_external_data=False)
    last = num_layers(path) - 1
    for tensor in model.graph.initializer:
        if layer_of(tensor.name) != last or not tensor.name.endswith("_scales"):
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        if not place:
            tensor.raw_data = (onnx.numpy_helper.to_array(tensor) * 1.5).astype(np.float32).tobytes()
            continue
        with (path / "onnx" / place["location"]).open("r+b") as data:
            data.seek(int(place["offset"]))
            scales = np.frombuffer(data.read(int(place["length"])), np.float32)
            data.seek(int(place["offset"]))
            data.write((scales * 1.5).tobytes())
    file.write_bytes(model.SerializeToString())
    return Package.open(path)


def num_layers(path):
    return Package.open(path).manifest.cache.num_layers


@pytest.fixture(scope="module")
def requests(package):
    found = []
    with Model.load(package.path, "fp32") as model:
        for sample in built_in_samples(package.manifest)[:3]:
            prepared = model.prepare(sample.messages)
            ids = answer_freely(model, prepared, sample).token_ids[:6]
            found.append((prepared, ids, run_stages(model, prepared, ids).step_logits))
    return found


def drift(package):
    """Errors that would point at the first layer."""
    errors = {"layer": 0, "order": 0, "num_samples": 1, "snr_db": 0.0, "cosine_min": 0.0, "max_abs": 0.0}
    layers = range(num_layers(package.path))
    return [
        LayerDrift(
            **{**errors, "role": "decoder", "layer": n, "stage": f"decoder.layers.{n}", "relative_l2": 1 + 0.1 * n}
        )
        for n in layers
    ]


@pytest.fixture(scope="module")
def raised(package, requests, tmp_path_factory):
    """What raising each layer gained, and the folder that graphs were made in."""
    folder = tmp_path_factory.mktemp("raised")
    return measure_raises(package, "int4", drift(package), requests, folder, None, lambda *_: None), folder


def test_the_damaged_layer_gains_most(package, raised):
    found, folder = raised
    last = num_layers(package.path) - 1
    assert found[0].layer == last
    assert {each.layer for each in found} == set(range(last + 1))
    assert found[0].gain == pytest.approx(found[0].before - found[0].after)
    assert found[0].gain > 0.3 * found[0].before
    assert all(each.ci_low <= each.gain <= each.ci_high and each.num_bytes > 0 for each in found)
    assert list(folder.iterdir()) == []  # copies of graphs are gone


@pytest.mark.parametrize(("role", "precise"), [("decoder", "int8"), ("vision_encoder", "int8")])
def test_a_graph_with_every_layer_raised_is_the_float_one_but_for_what_is_outside(package, tmp_path, role, precise):
    """Of layers that a recipe has balanced too: their norms come along."""
    graph, floats = package.graph_path(role, precise), package.graph_path(role, "fp32")
    wide = onnx.load(floats)
    linears = [t for t in wide.graph.initializer if t.name.endswith(".weight") and len(t.dims) == 2]
    layers = sorted({n for t in linears if (n := layer_of(t.name)) is not None})
    known = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in wide.graph.initializer}
    for layer in layers:
        folder = tmp_path / str(layer)
        folder.mkdir()
        graph, grown = raised_graph(graph, floats, layer, folder)
        assert grown > 0
    made = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(graph).graph.initializer}
    inside = [name for name in known if layer_of(name) is not None]
    assert inside
    assert [name for name in inside if not np.array_equal(made[name], known[name])] == []


def test_a_raised_layer_computes_what_its_float_graph_does(package, requests, tmp_path):
    """With all layers raised one after the other, the tower is the float one but for what is outside of blocks."""
    prepared = next(request[0] for request in requests if request[0].visuals)
    graph, floats = package.graph_path("vision_encoder", "int8"), package.graph_path("vision_encoder", "fp32")
    errors = []
    with Model.load(package.path, "fp32") as model:
        reference = model.encode_vision(prepared.visuals).vision
    for layer in (None, 0, 1):
        if layer is not None:
            (tmp_path / str(layer)).mkdir()
            graph, _ = raised_graph(graph, floats, layer, tmp_path / str(layer))
        mixed = MixedModel(package, "int8", {"vision_encoder": graph}, {}, None)
        errors.append(float(np.abs(mixed.encode_vision(prepared.visuals).vision - reference).max()))
    assert errors[0] > errors[-1]


def test_a_layer_that_is_float_already_is_none(package, tmp_path):
    graph = package.graph_path("decoder", "fp32")
    assert raised_graph(graph, graph, 0, tmp_path) is None


def test_the_advice_tells_gains_that_are_sure(package, raised):
    found, _ = raised
    variant = {"outcome": "FAIL", "raises": plain(found)}
    assert raising({**variant, "outcome": "PASS"}) == ""
    unsure = [{**each, "ci_low": -1.0} for each in variant["raises"]]
    assert raising({**variant, "raises": unsure}).startswith("No single layer")
    sure = [{**each, "ci_low": 0.1 * each["gain"]} for each in variant["raises"][:1]]
    assert f"decoder.layers.{num_layers(package.path) - 1} (" in raising({**variant, "raises": sure})
