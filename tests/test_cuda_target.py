"""The cuda target, as far as a box without a GPU can tell: sound graphs, and all but the CUDA kernels computes.

Graphs are run by the CPU with float16 results after every operator (half_on_cpu.py), packed attention replaced by the
CPU's; the offsets that the packed attention of CUDA takes are checked by themselves.
"""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from half_on_cpu import half_on_cpu, package_on_cpu
from onnx_ir.tape import Tape
from test_families import ROLES, SIZES, example, lowered, role_of, torch_module, with_values

from vlmport.cli.main import main
from vlmport.export.build import export_checkpoint
from vlmport.export.lower.attention import token_offset
from vlmport.export.lower.cuda import LastPositionsOnHost
from vlmport.quant.recipe import load_recipe
from vlmport.runtime import load
from vlmport.runtime.errors import VlmportError

GOLDENS = Path(__file__).parent / "goldens" / "qwen2_5_vl"
GOLDEN = GOLDENS / "tiny_b"
COMPUTING = [(family, role) for family, role in ROLES if role != "embed_tokens"]


def session(model: ir.Model) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    serialized = ir.serde.serialize_model(model).SerializeToString()
    return ort.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("family", "role"), COMPUTING)
def test_float16_graph_is_close_to_the_float32_graph(family: str, role: str) -> None:
    spec, module = role_of(family, role), torch_module(role_of(family, role))
    model = with_values(lowered(family, role, "cuda"), module)
    half_on_cpu(model)
    half, single = session(model), session(with_values(lowered(family, role, "cpu"), module))
    for sizes in SIZES:
        feeds = {port.name: example(port.name, port.shape, port.dtype, sizes, spec.multiples) for port in spec.inputs}
        narrow = {port.name for port in spec.inputs if port.dtype == "compute"}
        results = half.run(None, {n: f.astype(np.float16) if n in narrow else f for n, f in feeds.items()})
        expected = single.run(None, feeds)
        assert results[0].dtype == np.float32, "float32 at the boundary, but for the cache"
        assert all(result.dtype == np.float16 for result in results[1:])
        for want, have in zip(expected, results, strict=True):
            assert np.abs(want - have).max() < 0.02 * np.abs(want).max()


@pytest.mark.parametrize("name", ["tiny_a", "tiny_b"])
def test_golden_cases_hold_in_float16(name: str, tmp_path: Path) -> None:
    """All stages of all cases, answers included, at the gates of fp16: what a GPU would compute, by the CPU."""
    package = export_checkpoint(GOLDENS / name, tmp_path / "cuda", [load_recipe("fp16")], target="cuda")
    package = package_on_cpu(package, tmp_path / "cpu")
    command = ["validate", str(package.path), "--golden", str(GOLDENS / name), "--report", str(tmp_path / "report")]
    assert main(command) == 0


def test_half_on_cpu_overflows_where_float16_does() -> None:
    """Without it ONNX Runtime computes the chain in float32 and 300 * 300 / 300 is 300; on a GPU it is infinite."""
    x = ir.val("x", ir.DataType.FLOAT16, [1])
    tape = Tape()
    y = tape.op("Div", [tape.op("Mul", [x, x]), x])
    for node in tape.nodes:
        node.outputs[0].dtype = ir.DataType.FLOAT16
    y.name, y.shape = "y", ir.Shape([1])
    graph = ir.Graph([x], [y], nodes=list(tape.nodes), opset_imports={"": 23}, name="chain")
    model = ir.Model(graph, ir_version=10)
    feeds = {"x": np.array([300], np.float16)}
    assert session(model).run(None, feeds)[0] == 300
    half_on_cpu(model)
    assert np.isinf(session(model).run(None, feeds)[0])


@pytest.mark.parametrize("role", ["vision_encoder", "decoder"])
def test_residual_stream_leaves_the_range_of_float16(role: str) -> None:
    """A last MLP that adds some 200,000 to the stream: infinite in float16, and NaN behind the next norm."""
    spec, module = role_of("qwen2_5_vl", role), torch_module(role_of("qwen2_5_vl", role))
    *_, weight = (p for name, p in module.named_parameters() if name.endswith("down_proj.weight"))
    weight.data *= 3e5 / weight.abs().max()
    with np.errstate(over="ignore"):
        weight.data.clamp_(-6e4, 6e4)  # in range, as are the weights of any checkpoint
    model = with_values(lowered("qwen2_5_vl", role, "cuda"), module)
    half_on_cpu(model)
    half, single = session(model), session(with_values(lowered("qwen2_5_vl", role, "cpu"), module))
    feeds = {port.name: example(port.name, port.shape, port.dtype, SIZES[1], spec.multiples) for port in spec.inputs}
    narrow = {port.name for port in spec.inputs if port.dtype == "compute"}
    want = single.run(None, feeds)[0]
    have = half.run(None, {n: f.astype(np.float16) if n in narrow else f for n, f in feeds.items()})[0]
    assert role == "decoder" or np.abs(want).max() > 65504
    assert np.abs(want - have).max() < 0.02 * np.abs(want).max()


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_last_positions_keep_what_they_keep_on_the_cpu(count: int) -> None:
    x, n = ir.val("x", ir.DataType.FLOAT, ["b", "s", 2]), ir.val("n", ir.DataType.INT64, [1])
    tape = Tape()
    y = tape.op("LastPositions", [x, n], domain="vlmport", version=1)
    y.name, y.dtype, y.shape = "y", ir.DataType.FLOAT, ir.Shape(["b", "kept", 2])
    imports = {"": 23, "vlmport": 1}
    graph = ir.Graph([x, n], [y], nodes=list(tape.nodes), opset_imports=imports, name="last")
    model = ir.Model(graph, ir_version=10)
    LastPositionsOnHost()(model)
    rows = np.arange(6, dtype=np.float32).reshape(1, 3, 2)
    kept = session(model).run(None, {"x": rows, "n": np.array([count])})[0]
    np.testing.assert_array_equal(kept, rows[:, -count:])


@pytest.mark.parametrize("bounds", [[0, 3], [0, 2, 6, 7], [0, 4, 8, 12], [0, 1, 2]])
def test_token_offsets_list_real_slots_first(bounds: list[int]) -> None:
    """token_offset as ONNX Runtime's PackedMultiHeadAttention documents it: slots of the padded layout."""
    value = ir.val("bounds", ir.DataType.INT32, ["n"])
    tape = Tape()
    offset = token_offset(tape, value)
    offset.name, offset.dtype, offset.shape = "offset", ir.DataType.INT32, ir.Shape(["b", "s"])
    graph = ir.Graph([value], [offset], nodes=list(tape.nodes), opset_imports={"": 23}, name="offsets")
    result = session(ir.Model(graph, ir_version=10)).run(None, {"bounds": np.array(bounds, np.int32)})[0]
    lengths = np.diff(bounds)
    longest = int(lengths.max())
    real = [row * longest + column for row, length in enumerate(lengths) for column in range(length)]
    padding = sorted(set(range(len(lengths) * longest)) - set(real))
    assert result.tolist() == np.array(real + padding).reshape(len(lengths), longest).tolist()


def test_cuda_package_is_half_the_size_and_says_what_it_needs(tmp_path: Path, package_tiny_b: Path) -> None:
    package = export_checkpoint(GOLDEN, tmp_path / "package", [load_recipe("fp16"), load_recipe("int4")], target="cuda")
    assert package.manifest.target == "cuda"
    assert package.manifest.cache is not None
    assert package.manifest.cache.dtype == "float16"
    data = sum(package.manifest.files[f"onnx/{g.data}"].size for g in package.variant("fp16").graphs.values())
    full = sum(file.stat().st_size for file in (package_tiny_b / "onnx").glob("*[a-z].onnx_data"))
    assert data < 0.55 * full
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        with pytest.raises(VlmportError, match=r"CUDAExecutionProvider.*vlmport\[gpu\]"):
            load(package.path)


def test_float32_on_cuda_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VlmportError, match="fp16"):
        export_checkpoint(GOLDEN, tmp_path / "package", [load_recipe("fp32")], target="cuda")
    assert not (tmp_path / "package").exists()
