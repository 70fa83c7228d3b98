"""Graphs that run a piece at a time: the same values, and no more weights in memory than a piece has."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from vlmport.runtime.package import Package
from vlmport.runtime.session import GraphSession, open_session
from vlmport.validate import pieces, selfcheck
from vlmport.validate.pieces import PiecedGraph
from vlmport.validate.selfcheck import check_selfcheck, write_selfcheck


def decoder_feeds(session: GraphSession) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(3)
    sizes = {"batch_size": 1, "sequence_length": 5, "past_length": 0, "total_length": 5}
    feeds = {}
    for name, spec in session.inputs.items():
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape]
        drawn = generator.standard_normal(shape) if spec.dtype == np.float32 else np.ones(shape)
        feeds[name] = drawn.astype(spec.dtype)
    return feeds


@pytest.mark.parametrize("variant", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("budget", [1, 20_000, 1 << 30])
def test_the_decoder_in_pieces_gives_what_it_gives_whole(package_tiny_a: Path, variant: str, budget: int) -> None:
    path = Package.open(package_tiny_a).graph_path("decoder", variant)
    whole = open_session(path)
    pieced = GraphSession(PiecedGraph.open(path, budget), path, "cpu")
    assert (pieced.inputs, pieced.optional, pieced.outputs) == (whole.inputs, whole.optional, whole.outputs)
    feeds = decoder_feeds(whole)
    for more in ({}, {"num_logits_to_keep": np.array([3])}):
        expected = whole.run(feeds | more)
        found = pieced.run(feeds | more)
        assert expected["logits"].shape[1] == (3 if more else 1)
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("budget", [1, 20_000, 1 << 30])
def test_every_node_is_in_one_piece_and_weights_are_within_the_budget(package_tiny_a: Path, budget: int) -> None:
    path = Package.open(package_tiny_a).graph_path("decoder", "fp32")
    graph = onnx.load(path, load_external_data=False).graph
    cut = list(pieces._cut(graph, budget))
    assert [node.name for piece in cut for node in piece] == [node.name for node in graph.node]
    sizes = {tensor.name: pieces._num_bytes(tensor) for tensor in graph.initializer}
    for piece in cut:
        weights = {name for node in piece for name in node.input if name in sizes}
        largest_node = max(sum(sizes[name] for name in set(node.input) if name in sizes) for node in piece)
        assert sum(sizes[name] for name in weights) <= max(budget, largest_node)
    assert (len(cut) == 1) == (budget == 1 << 30)


def test_a_large_package_is_recorded_in_pieces_and_verified_whole(
    package_tiny_b: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shutil.copytree(package_tiny_b, tmp_path / "package", ignore=shutil.ignore_patterns("parity"))
    monkeypatch.setattr(selfcheck, "_WHOLE_BYTES", 0)
    recorded: list[Path] = []
    opened = PiecedGraph.open

    def counted(path: Path) -> PiecedGraph:
        recorded.append(path)
        return opened(path, 20_000)

    monkeypatch.setattr(PiecedGraph, "open", counted)
    write_selfcheck(path)
    package = Package.open(path)
    assert {file.name for file in recorded} == {
        graph.graph for variant in package.manifest.variants.values() for graph in variant.graphs.values()
    }
    recorded.clear()
    for name, rows in check_selfcheck(package).items():
        assert {row.outcome for row in rows} <= {"PASS", None}, name
        assert {"vision", "projector", "inputs_embeds", "step_logits"} <= {row.stage for row in rows}
    assert not recorded, "verify runs what users run"
    with np.load(path / "parity" / "golden" / "int4.npz") as stored:
        assert len(stored["step_logits"]) == 9
