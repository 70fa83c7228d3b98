"""Packed attention on the CPU: every way in which segments can lie side by side gives what PyTorch gives."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmport.export.layers import segment_attention
from vlmport.export.lower.attention import LoopSegmentAttention

HEADS, WIDTH = 2, 16


@pytest.fixture(scope="module")
def session() -> ort.InferenceSession:
    names = ("q", "k", "v")
    inputs = [ir.val(name, ir.DataType.FLOAT, ["n", WIDTH]) for name in names]
    inputs.append(ir.val("cu_seqlens", ir.DataType.INT32, ["bounds"]))
    attributes = {"num_heads": HEADS, "scale": (WIDTH // HEADS) ** -0.5}
    node = ir.node("SegmentAttention", inputs, attributes, domain="vlmport")
    output = node.outputs[0]
    output.name, output.dtype, output.shape = "y", ir.DataType.FLOAT, ir.Shape(["n", WIDTH])
    graph = ir.Graph(inputs, [output], nodes=[node], opset_imports={"": 23, "vlmport": 1}, name="attention")
    model = ir.Model(graph, ir_version=10)
    LoopSegmentAttention()(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    serialized = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])


def check(session: ort.InferenceSession, lengths: list[int]) -> None:
    bounds = np.cumsum([0, *lengths]).astype(np.int32)
    random = np.random.default_rng(len(lengths))
    q, k, v = (random.standard_normal((bounds[-1], WIDTH)).astype(np.float32) for _ in range(3))
    expected = segment_attention(*(torch.from_numpy(x) for x in (q, k, v)), torch.from_numpy(bounds), HEADS)
    (y,) = session.run(None, {"q": q, "k": k, "v": v, "cu_seqlens": bounds})
    np.testing.assert_allclose(y, expected.numpy(), atol=2e-6)


@pytest.mark.parametrize(
    "lengths",
    [[1], [40], [4, 4, 4], [4, 4, 2], [2, 4, 4], [4, 2, 4], [3, 3, 5, 5, 5, 3], [1, 2, 3, 4], [64] * 16, [300]],
    ids=lambda lengths: "-".join(map(str, lengths[:6])),
)
def test_segments(session: ort.InferenceSession, lengths: list[int]) -> None:
    check(session, lengths)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12))
@settings(max_examples=50, deadline=None)
def test_any_segments(session: ort.InferenceSession, lengths: list[int]) -> None:
    check(session, lengths)
