"""Puts copies of a traced block in the places of its repetitions; see layers/repeat.py for what marks them."""

from collections.abc import Mapping

import onnx_ir as ir

from .layers.repeat import ENTER, KIND, LEAVE, REPEAT
from .layers.semantic import DOMAIN

__all__ = ["expand_blocks"]


def expand_blocks(graph: ir.Graph) -> None:
    """Replaces every RepeatBlock by a copy of the first block of its kind, and takes the markers away, in place.

    What the first block uses from outside (shapes, tables, constants) its copies use too.
    """
    enters, leaves = ({_kind(n): n for n in graph if _is(n, operator)} for operator in (ENTER, LEAVE))
    bodies = {kind: _between(graph, enters[kind], leaves[kind]) for kind in enters}
    for number, call in enumerate([node for node in graph if _is(node, REPEAT)], start=1):
        kind = _kind(call)
        enter, leave = enters[kind], leaves[kind]
        assert len(call.inputs) == len(enter.inputs), f"a block takes {len(call.inputs)}, its first {len(enter.inputs)}"
        own = dict(zip(enter.inputs, call.inputs, strict=True))  # parameters; the first outputs are the other inputs
        own |= dict(zip(enter.outputs, call.inputs, strict=False))
        for node in bodies[kind]:
            call.prepend(_copy(node, own, f"_block{number}"))
        for result, output in zip(leave.inputs, call.outputs, strict=True):
            output.replace_all_uses_with(_mapped(result, own), replace_graph_outputs=True)
        graph.remove(call, safe=True)
    for node in (*enters.values(), *leaves.values()):
        for result, output in zip(node.inputs, node.outputs, strict=False):
            assert result is not None
            output.replace_all_uses_with(result, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _is(node: ir.Node, operator: str) -> bool:
    return node.domain == DOMAIN and node.op_type == operator


def _kind(node: ir.Node) -> int:
    return node.attributes[KIND].as_int()


def _between(graph: ir.Graph, enter: ir.Node, leave: ir.Node) -> list[ir.Node]:
    nodes = list(graph)
    # Constants are left out: copies share them.
    body = [node for node in nodes[nodes.index(enter) + 1 : nodes.index(leave)] if node.inputs]
    assert not any(node.domain == DOMAIN and node.op_type in (ENTER, LEAVE, REPEAT) for node in body), "nested blocks"
    return body


def _mapped(value: ir.Value | None, own: Mapping[ir.Value | None, ir.Value | None]) -> ir.Value:
    found = own.get(value, value)
    assert found is not None
    return found


def _copy(node: ir.Node, own: dict[ir.Value | None, ir.Value | None], suffix: str) -> ir.Node:
    """A copy of a node on the values in `own`, which learns of its outputs."""
    inputs = [own.get(value, value) for value in node.inputs]
    outputs = [ir.Value(name=f"{v.name}{suffix}", type=v.type, shape=v.shape) for v in node.outputs]
    own |= dict(zip(node.outputs, outputs, strict=True))
    return ir.Node(
        node.domain,
        node.op_type,
        inputs,
        list(node.attributes.values()),
        overload=node.overload,
        outputs=outputs,
        version=node.version,
        name=f"{node.name}{suffix}",
    )
