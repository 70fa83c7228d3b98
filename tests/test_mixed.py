"""int4-mixed: the knapsack against all choices, losses against the graphs that are written, and kept promises."""

import functools
import itertools
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmport.cli.main import main
from vlmport.export import mixed as mixed_bits
from vlmport.export.calibrate import package_calibrator
from vlmport.export.candidates import find_candidates
from vlmport.export.feeds import CalibrationOptions
from vlmport.export.float_roles import FloatRoles
from vlmport.export.layers import Linear
from vlmport.export.mixed import mean_and_bound
from vlmport.export.weight_groups import Key
from vlmport.quant.allocate import Choice, Front, Item
from vlmport.quant.apply import open_float_graph
from vlmport.quant.found import FoundCodes
from vlmport.quant.recipe import MIXED_NAME, Recipe, WeightFormat
from vlmport.quant.rtn import dequantize_rows, quantize_rows
from vlmport.runtime.package import Package
from vlmport.runtime.schema import from_json

CHOICES = st.builds(Choice, st.sampled_from([4, 8, 16]), st.integers(1, 300), st.floats(0, 1))
ITEMS = st.lists(
    st.lists(CHOICES, min_size=1, max_size=3).map(lambda choices: Item("w", tuple(choices))), min_size=1, max_size=5
)


@given(ITEMS, st.integers(0, 1500), st.floats(0, 3))
@settings(max_examples=150)
def test_the_knapsack_is_exact(items: list[Item], num_bytes: int, loss: float) -> None:
    front = Front(items)
    every = [
        (sum(c.num_bytes for c in choices), sum(c.loss for c in choices))
        for choices in itertools.product(*(item.choices for item in items))
    ]
    fitting = [lost for size, lost in every if size <= num_bytes]
    pick = front.within_bytes(num_bytes)
    if not fitting:
        assert pick is None
    else:
        assert pick is not None
        assert pick.num_bytes <= num_bytes
        assert pick.loss == pytest.approx(min(fitting))
    small = [size for size, lost in every if lost <= loss - 1e-9]
    if small:
        assert front.within_loss(loss).num_bytes <= min(small)
        assert front.within_loss(loss).loss <= loss + 1e-9


def test_large_weights_are_rounded_to_units_and_stay_within_the_budget() -> None:
    random = np.random.default_rng(0)
    sizes, losses = random.integers(10**6, 10**9, 60).tolist(), random.random(60).tolist()
    items = [
        Item(str(n), tuple(Choice(bits, size * bits // 8, loss / bits**3) for bits in (4, 8, 16)))
        for n, (size, loss) in enumerate(zip(sizes, losses, strict=True))
    ]
    front = Front(items)
    points = front.points(7)
    assert len(points) == 7
    for smaller, larger in itertools.pairwise(points):
        assert smaller.num_bytes < larger.num_bytes
        assert smaller.loss > larger.loss
    least, most = (sum(pick(c.num_bytes for c in item.choices) for item in items) for pick in (min, max))
    for share in (0.1, 0.5, 0.9):
        budget = int(least + share * (most - least))
        pick = front.within_bytes(budget)
        assert pick is not None
        assert budget * 0.99 < pick.num_bytes <= budget


def test_one_weight_that_breaks_at_4_bits_gets_more() -> None:
    losses = dict.fromkeys("abcd", (0.001, 1e-05, 0.0)) | {"broken": (5.0, 4.0, 0.0)}
    items = [
        Item(name, tuple(Choice(bits, 100 * bits, loss) for bits, loss in zip((4, 8, 16), lost, strict=True)))
        for name, lost in losses.items()
    ]
    pick = Front(items).within_bytes(4 * 400 + 1600)
    assert pick is not None
    assert [choice.bits for choice in pick.choices] == [4, 4, 4, 4, 16]


def test_the_bound_counts_samples_not_rows() -> None:
    losses = [torch.full((5,), value, dtype=torch.float64) for value in (0.1, 0.2, 0.3, 0.4)]
    mean, bound = mean_and_bound(losses)
    assert mean == pytest.approx(0.25)
    deviation = np.std([0.1, 0.2, 0.3, 0.4], ddof=1)
    assert bound == pytest.approx(0.25 + 1.645 * deviation / math.sqrt(4))
    assert mean_and_bound(losses[:1])[1] == math.inf


METHODS = {"rtn": MIXED_NAME, "awq+gptq": f"{MIXED_NAME}_awq-gptq"}  # and the variants they make


@pytest.fixture(scope="module")
def mixed(
    package_tiny_a: Path, package_tiny_b: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """By method a package with an int4-mixed of the size of int4; that of rtn has its head tied to the table."""
    packages: dict[str, Path] = {}
    for method, package in zip(METHODS, (package_tiny_b, package_tiny_a), strict=True):
        packages[method] = Path(shutil.copytree(package, tmp_path_factory.mktemp("mixed") / "package"))
        assert main([*quantize(packages[method], calibration), "--max-size", "int4", "--method", method]) == 0
    return packages


def quantize(package: Path, calibration: Path) -> list[str]:
    return ["quantize", str(package), "--recipe", MIXED_NAME, "--calibration", str(calibration)]


@pytest.mark.parametrize(("method", "name"), METHODS.items())
def test_the_budget_is_kept_and_told(method: str, name: str, mixed: dict[str, Path]) -> None:
    package = Package.open(mixed[method])
    variant = package.manifest.variants[name]
    assert variant.allocation is not None
    assert variant.allocation.max_bytes == package.size("int4")
    assert 0.9 * variant.allocation.max_bytes < package.size(name) <= variant.allocation.max_bytes
    stored = {
        f"{role}/{name}": label for role, graph in variant.graphs.items() for name, label in graph.formats.items()
    }
    assert len(set(stored.values())) > 1, "bits are mixed"
    assert stored.keys() == variant.allocation.sensitivity.keys()
    assert {name.split("/")[0] for name in stored} == set(package.manifest.roles)
    assert min(lost["4"] for lost in variant.allocation.sensitivity.values()) > 0
    assert (variant.allocation.num_samples, variant.allocation.num_held_out) == (3, 1)


@pytest.mark.parametrize("method", METHODS)
def test_the_measure_is_that_of_the_written_graphs(
    method: str, mixed: dict[str, Path], calibration: Path, tmp_path: Path
) -> None:
    """Each weight that the measure lowers computes as the node that is written, and all other parameters are as there.

    One by one: behind a few layers a last bit decides which way some activation is rounded, and then the next dozens.
    """
    package = Package.open(mixed[method])
    variant = package.manifest.variants[METHODS[method]]
    formats: dict[Key, WeightFormat] = {}
    for rule in from_json(Recipe, variant.recipe).rules:
        role, _, name = rule.match.partition("/")
        formats[role, name] = rule.format
    assert {format.method for format in formats.values() if format.bits == 4} >= {method}
    calibrator = package_calibrator(package, CalibrationOptions(calibration))
    is_tied = method == "rtn"
    tables = frozenset([("embed_tokens", "embed_tokens.weight"), ("decoder", "lm_head.weight")][: 1 + is_tied])
    open_role = functools.partial(open_float_graph, package)
    found = find_candidates(calibrator, "cpu", open_role, tmp_path, tables, method=method, block_size=32)
    roles = FloatRoles(calibrator.feeds, calibrator.roles, found.open_role, "cpu", tmp_path, found.codes_of)
    exact = roles.logits(0, roles.feeds.start(0), "vision_encoder")
    random = torch.Generator().manual_seed(0)
    with roles.lowered(formats), torch.inference_mode():
        for role, stored in variant.graphs.items():
            graph = onnx.load(package.path / "onnx" / stored.graph)
            values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
            for name, parameter in roles.modules[role].named_parameters():
                if (role, name) not in formats:
                    np.testing.assert_array_equal(parameter, values[name], err_msg=f"{role}/{name}")
                    continue
                owner = roles.modules[role].get_submodule(name.removesuffix(".weight"))
                is_linear = isinstance(owner, Linear)
                bias = owner.bias if isinstance(owner, Linear) and owner.bias is not None else torch.zeros(1)
                x = torch.randn(9, parameter.shape[1], generator=random) if is_linear else torch.arange(len(parameter))
                expected = (owner(x) - bias).numpy()
                written = run_alone(graph, name, x.numpy())
                np.testing.assert_allclose(written, expected, atol=1e-5 * np.abs(expected).max(), err_msg=name)
        assert (roles.logits(0, roles.feeds.start(0), "vision_encoder") != exact).any()
    assert (roles.logits(0, roles.feeds.start(0), "vision_encoder") == exact).all(), "float weights are back"


def run_alone(model: onnx.ModelProto, weight: str, x: np.ndarray) -> np.ndarray:
    """What the node that computes with a weight makes of rows or ids."""
    (cast,) = [node for node in model.graph.node if node.op_type == "Cast" and node.input[0] == weight] or [None]
    names = {weight, f"{weight}_Q", *(cast.output if cast is not None else ())}
    (node,) = [node for node in model.graph.node if node is not cast and names.intersection(node.input)]
    nodes = [node] if cast is None else [cast, node]
    used = {name for each in nodes for name in each.input}
    initializers = [tensor for tensor in model.graph.initializer if tensor.name in used]
    of_rows = "MatMul" in node.op_type
    is_half = not of_rows and initializers[0].data_type == onnx.TensorProto.FLOAT16
    float_type = onnx.TensorProto.FLOAT16 if is_half else onnx.TensorProto.FLOAT
    fed = onnx.helper.make_tensor_value_info(
        node.input[0 if of_rows else 1], onnx.TensorProto.FLOAT if of_rows else onnx.TensorProto.INT64, None
    )
    given = onnx.helper.make_tensor_value_info(node.output[0], float_type, None)
    graph = onnx.helper.make_graph(nodes, "alone", [fed], [given], initializers)
    alone = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    return np.asarray(ort.InferenceSession(alone.SerializeToString()).run(None, {fed.name: x})[0])


def test_a_variant_of_a_name_is_made_once(
    mixed: dict[str, Path], calibration: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*quantize(mixed["rtn"], calibration), "--max-size", "int4"]) == 2
    assert f"has a variant '{MIXED_NAME}'; give this one another name by --name" in capsys.readouterr().err


@given(st.integers(1, 5), st.integers(1, 70), st.sampled_from([4, 8]), st.booleans(), st.integers(0, 99))
@settings(max_examples=40)
def test_codes_on_disk_stand_for_the_same_values(
    num_rows: int, num_columns: int, bits: int, symmetric: bool, seed: int
) -> None:
    format = WeightFormat(bits, 16, symmetric=symmetric)
    weight = np.random.default_rng(seed).standard_normal((num_rows, num_columns)).astype(np.float32)
    codes = quantize_rows(weight, format)
    with tempfile.TemporaryDirectory() as folder:
        found = FoundCodes.write(Path(folder), 0, codes, format)
        values = found.values(num_rows // 2, num_rows, num_columns)
    np.testing.assert_array_equal(values, dequantize_rows(*codes, num_columns)[num_rows // 2 :])


def test_a_promise_is_kept_or_refused(
    package_tiny_a: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = Path(shutil.copytree(package_tiny_a, tmp_path / "package"))
    assert main([*quantize(package, calibration), "--max-kl", "1e-15"]) == 2
    assert "--max-kl 1e-15: the best choice of bits has" in capsys.readouterr().err
    assert main([*quantize(package, calibration), "--max-kl", "0.002"]) == 0
    assert "KL as a whole:" in capsys.readouterr().out
    after = Package.open(package)
    allocation = after.manifest.variants[MIXED_NAME].allocation
    assert allocation is not None
    assert allocation.kl_calibration < 0.002
    assert after.size(MIXED_NAME) < after.size("fp32") / 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", MIXED_NAME, "--max-kl", "1"], "give --calibration DIR"),
        (["--recipe", MIXED_NAME, "--calibration", "DIR"], "give one of --max-size and --max-kl"),
        (
            ["--recipe", MIXED_NAME, "--calibration", "DIR", "--max-kl", "0"],
            "--max-kl 0.0: give a number of nats",
        ),
        (["--recipe", MIXED_NAME, "--calibration", "DIR", "--max-size", "3TB"], "--max-size 3TB: give a size above 0"),
        (["--recipe", MIXED_NAME, "--calibration", "DIR", "--max-size", "int9"], "or a variant: fp32, int"),
        (["--recipe", "int4", "--max-size", "3MB"], "--max-size 3MB: goes with --recipe int4-mixed"),
        (["--recipe", "int4", "--name", "mine"], "--name mine: goes with --recipe int4-mixed"),
        (["--recipe", MIXED_NAME, "--calibration", "DIR", "--method", "x"], "method 'x' is unknown; known methods are"),
        (["--recipe", MIXED_NAME, "--calibration", "DIR", "--max-size", "9kB"], "4 bits everywhere take"),
        (["--recipe", MIXED_NAME, "--calibration", "DIR", "--max-kl", "1", "--name", "My"], "recipe name 'My': use"),
        (["--recipe", MIXED_NAME, "--calibration", "DIR", "--max-kl", "1", "--name", "int2"], "choose another name"),
        (
            ["--recipe", MIXED_NAME, "--calibration", "DIR", "--max-kl", "1", "--calibration-samples", "2"],
            "2 samples are too few",
        ),
    ],
)
def test_what_does_not_go_together(
    arguments: list[str],
    words: str,
    package_tiny_a: Path,
    calibration: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line each, before anything is measured."""
    monkeypatch.setattr(mixed_bits, "find_candidates", None)
    arguments = [str(calibration) if argument == "DIR" else argument for argument in arguments]
    assert main(["quantize", str(package_tiny_a), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.strip().count("\n") == 0 or "quantize" in error
