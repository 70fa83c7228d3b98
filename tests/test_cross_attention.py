"""Attention from the queries of a segment to its keys: the graphs of both targets compute what PyTorch does."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmport.export.family import Port, RoleSpec, TensorRef
from vlmport.export.layers.attention import segment_attention, segment_cross_attention
from vlmport.export.lower import TARGETS, lower
from vlmport.export.trace import trace

HEADS, SIZE = 3, 8
NAMES = ("q", "k", "v", "cu_queries", "cu_keys")


class Cross(torch.nn.Module):
    def forward(self, q, k, v, cu_queries, cu_keys):
        return segment_cross_attention(q, k, v, cu_queries, cu_keys, HEADS, scale=0.7)


@pytest.fixture(scope="module")
def sessions():
    """A session a target: the cuda graph is standard ONNX, so the CPU can run it (traced in float32 here)."""
    width = HEADS * SIZE
    spec = RoleSpec(
        build=Cross,
        inputs=(
            Port("q", "float32", ("num_queries", width)),
            Port("k", "float32", ("num_keys", width)),
            Port("v", "float32", ("num_keys", width)),
            Port("cu_queries", "int32", ("num_bounds",)),
            Port("cu_keys", "int32", ("num_bounds",)),
        ),
        outputs=(Port("out", "float32", ("num_queries", width)),),
        tensor=lambda name, shape: TensorRef(name, shape),
    )
    opened = {}
    for target in TARGETS:
        model = trace(spec, "float32")
        lower(model, target)
        opened[target] = ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    return opened


@pytest.mark.parametrize("target", TARGETS)
@given(lengths=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 40)), min_size=1, max_size=6), seed=st.integers(0))
def test_graph_equals_module(target, sessions, lengths, seed):
    random = np.random.default_rng(seed)
    cu_queries, cu_keys = (np.cumsum([0, *sizes]).astype(np.int32) for sizes in zip(*lengths, strict=True))
    arrays = [
        3 * random.standard_normal((bounds[-1], HEADS * SIZE), dtype=np.float32)
        for bounds in (cu_queries, cu_keys, cu_keys)
    ]
    arrays += [cu_queries, cu_keys]
    expected = Cross()(*map(torch.from_numpy, arrays)).numpy()
    found = sessions[target].run(None, dict(zip(NAMES, arrays, strict=True)))[0]
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-4)


def test_a_segment_sees_its_own_keys_only():
    values = torch.arange(6.0).repeat_interleave(SIZE).reshape(6, SIZE)  # row i holds i
    nothing = torch.zeros(6, SIZE)
    out = segment_cross_attention(
        nothing[:2], nothing, values, torch.tensor([0, 1, 2]), torch.tensor([0, 2, 6]), 1, scale=1.0
    )
    torch.testing.assert_close(out[:, 0], torch.tensor([0.5, 3.5]))  # equal scores: the mean of its keys
    within = segment_attention(nothing, nothing, values, torch.tensor([0, 2, 6]), 1)
    torch.testing.assert_close(within[:, 0], torch.tensor([0.5, 0.5, 3.5, 3.5, 3.5, 3.5]))


def test_scale_is_that_of_the_head_where_none_is_given():
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, 2 * SIZE) for _ in range(3))
    bounds = torch.tensor([0, 4])
    default = segment_attention(q, k, v, bounds, 2)
    torch.testing.assert_close(default, segment_attention(q, k, v, bounds, 2, scale=SIZE**-0.5))
    assert not torch.allclose(default, segment_attention(q, k, v, bounds, 2, scale=1.0), atol=1e-3)
