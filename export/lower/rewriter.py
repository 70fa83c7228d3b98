"""How a pass replaces one semantic operator by nodes that a runtime knows."""

from collections.abc import Callable, Sequence

import onnx_ir as ir
from onnx_ir.tape import Tape

from ..layers.semantic import DOMAIN

__all__ = ["MICROSOFT", "Builder", "attribute", "replace_operator"]

MICROSOFT = "com.microsoft"
Builder = Callable[[Tape, ir.Node], Sequence[ir.Value]]


def replace_operator(model: ir.Model, operator: str, build: Builder) -> bool:
    """Replaces each `vlmport::operator` node by what `build` puts on the tape; True if there was one.

    `build` returns as many values as the node has outputs. They take over the names and consumers of the old ones.
    """
    found = [node for node in model.graph if node.domain == DOMAIN and node.op_type == operator]
    for node in found:
        tape = Tape()
        values = build(tape, node)
        assert len(values) == len(node.outputs), f"{operator}: {len(values)} values for {len(node.outputs)} outputs"
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], list(tape.nodes), list(node.outputs), list(values)
        )
        for domain, version in tape.used_opsets:
            model.graph.opset_imports.setdefault(domain, version or 1)
    return bool(found)


def attribute(node: ir.Node, name: str) -> ir.Attr:
    """The attribute of a node; a missing one is our own mistake."""
    value = node.attributes.get(name)
    assert value is not None, f"{node.op_type} has no attribute {name}"
    return value
