"""Blocks that are traced once: the graph is the one that tracing each of them gives."""

import copy
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import nn

from vlmport.export.family import RoleSpec, families, load_family
from vlmport.export.layers import Linear, repeat
from vlmport.export.layers.repeat import BlockRunner
from vlmport.export.lower import lower
from vlmport.export.trace import trace

DEEP = {"num_hidden_layers": 5}
DEEP_VISION = {"depth": 5, "fullatt_block_indexes": [1, 3]}


def deep_roles(family: str) -> dict[str, RoleSpec]:
    config = copy.deepcopy(load_family(family).tiny_config) | DEEP
    if "vision_config" in config:
        config["vision_config"] |= DEEP_VISION
    return dict(load_family(family).roles(config))


def form(model: ir.Model) -> tuple[Any, ...]:
    """What a graph computes, without names of inner values; constants are their bytes, wherever they stand."""
    places: dict[ir.Value | None, Any] = {None: None}
    places |= {value: value.name for value in model.graph.inputs}
    for name, value in model.graph.initializers.items():
        places[value] = name if value.const_value is None else value.const_value.tobytes()
    nodes = []
    for node in model.graph:
        if node.op_type == "Constant":
            places[node.outputs[0]] = [_plain(attribute) for attribute in node.attributes.values()]
            continue
        attributes = sorted((name, _plain(attribute)) for name, attribute in node.attributes.items())
        places |= {value: (len(nodes), index) for index, value in enumerate(node.outputs)}
        nodes.append((node.domain, node.op_type, [places[value] for value in node.inputs], attributes))
    return (
        nodes,
        [places[value] for value in model.graph.outputs],
        {name for name, value in model.graph.initializers.items() if value.const_value is None},
    )


def _plain(attribute: ir.Attr) -> object:
    return attribute.as_tensor().tobytes() if attribute.type == ir.AttributeType.TENSOR else attribute.value


@pytest.mark.parametrize("role", ["vision_encoder", "decoder"])
@pytest.mark.parametrize("family", families())
def test_copies_are_what_tracing_each_block_gives(family: str, role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    roles = deep_roles(family)
    if role not in roles:
        pytest.skip(f"{family} has no {role}")
    spec = roles[role]
    once = trace(spec, "float32")
    monkeypatch.setattr(repeat, "_signature", lambda block: object())
    each = trace(spec, "float32")
    for model in (once, each):
        lower(model, "cpu")
    assert [v for v in once.graph.initializers if "." in v] == [v for v in each.graph.initializers if "." in v]
    assert form(once) == form(each)


def test_a_block_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    forward = Linear.forward

    def counted(self: Linear, x: torch.Tensor) -> torch.Tensor:
        calls.append("linear")
        return forward(self, x)

    monkeypatch.setattr(Linear, "forward", counted)
    trace(deep_roles("qwen2_5_vl")["decoder"], "float32")
    assert len(calls) == 7 + 1, "one block's linears, and the head"


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.linear = Linear(4, 4, bias=False)
        self.factor = factor


def test_blocks_that_differ_in_a_number_are_not_alike() -> None:
    assert repeat._signature(Scaled(1.0)) == repeat._signature(Scaled(1.0))
    assert repeat._signature(Scaled(1.0)) != repeat._signature(Scaled(2.0))
    with_table = [Scaled(1.0), Scaled(1.0)]
    for block in with_table:
        block.register_buffer("table", torch.zeros(3))
    assert repeat._signature(with_table[0]) != repeat._signature(with_table[1])


def test_outside_of_a_trace_it_is_a_call() -> None:
    layer = nn.Linear(2, 2)
    x = torch.ones(1, 2)
    assert torch.equal(BlockRunner()(layer, x), layer(x))
