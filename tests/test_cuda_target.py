"""The cuda target, as far as a box without a GPU can tell: sound graphs, and all but the CUDA kernels computes.

The decoder runs whole on the CPU provider, which has float16 kernels or casts for all of its operators. The vision
encoder's packed attention has no CPU kernel: its offsets are checked by themselves, and the rest runs with the CPU's
attention put in.
"""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.tape import Tape
from test_families import SIZES, example, lowered, role_of, torch_module, with_values

from vlmport.export.build import export_checkpoint
from vlmport.export.family import families
from vlmport.export.lower.attention import LoopSegmentAttention, token_offset
from vlmport.quant.recipe import load_recipe
from vlmport.runtime import load
from vlmport.runtime.errors import VlmportError

GOLDEN = Path(__file__).parent / "goldens" / "qwen2_5_vl" / "tiny_b"


def session(model: ir.Model) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    serialized = ir.serde.serialize_model(model).SerializeToString()
    return ort.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("family", families())
def test_float16_decoder_is_close_to_its_float32_modules(family: str) -> None:
    spec, module = role_of(family, "decoder"), torch_module(role_of(family, "decoder"))
    graph = session(with_values(lowered(family, "decoder", "cuda"), module))
    for sizes in SIZES:
        feeds = {port.name: example(port.name, port.shape, port.dtype, sizes) for port in spec.inputs}
        half = {port.name for port in spec.inputs if port.dtype == "compute"}
        cpu = session(with_values(lowered(family, "decoder", "cpu"), module))
        expected = cpu.run(None, feeds)
        results = graph.run(None, {n: f.astype(np.float16) if n in half else f for n, f in feeds.items()})
        assert results[0].dtype == np.float32, "logits are float32 at the boundary"
        assert {result.dtype for result in results[1:]} == {np.dtype(np.float16)}
        for want, have in zip(expected, results, strict=True):
            scale = np.abs(want).max()
            assert np.abs(want - have).max() < 0.02 * scale


@pytest.mark.parametrize("family", families())
def test_float16_vision_encoder_but_for_its_attention_kernel(family: str) -> None:
    spec = role_of(family, "vision_encoder")
    model = with_values(lowered(family, "vision_encoder", "cuda"), torch_module(spec))
    packed = [node for node in model.graph if node.op_type == "PackedMultiHeadAttention"]
    assert packed
    for node in packed:
        tape = Tape()
        q, k, v, bias, offset, bounds = node.inputs
        assert bias is None
        assert offset is not None
        wide = [tape.op("Cast", [x], {"to": ir.DataType.FLOAT}) for x in (q, k, v)]  # the CPU kernel is float32 only
        out = tape.op("SegmentAttention", [*wide, bounds], dict(node.attributes), domain="vlmport", version=1)
        new = tape.op("Cast", [out], {"to": ir.DataType.FLOAT16})
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], list(tape.nodes), list(node.outputs), [new])
    model.graph.opset_imports["vlmport"] = 1
    LoopSegmentAttention()(model)
    half, single = session(model), session(with_values(lowered(family, "vision_encoder", "cpu"), torch_module(spec)))
    for sizes in SIZES:
        feeds = {port.name: example(port.name, port.shape, port.dtype, sizes) for port in spec.inputs}
        want, have = single.run(None, feeds)[0], half.run(None, feeds)[0]
        assert np.abs(want - have).max() < 0.02 * np.abs(want).max()


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
