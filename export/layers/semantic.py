"""Semantic operators: one node each in a traced graph, plain PyTorch when run.

A layer asks `is_tracing()`; while `torch.onnx.export` traces, it emits a node of the domain `vlmport`, which a pass of
`export/lower` turns into what the target runs best. Otherwise it computes the same function, so that the modules are
their own PyTorch reference.
"""

from collections.abc import Mapping, Sequence

import torch

__all__ = ["DOMAIN", "Size", "emit", "emit_many", "float_constant", "is_tracing"]

DOMAIN = "vlmport"
_VERSION = 1

Attribute = int | float | str | bool | Sequence[int] | Sequence[float] | Sequence[str] | Sequence[bool]
Attributes = Mapping[str, Attribute]
Size = int | torch.SymInt


def is_tracing() -> bool:
    """True while a graph is being traced from this call."""
    return torch.compiler.is_exporting()


def emit(
    operator: str,
    inputs: Sequence[torch.Tensor | None],
    *,
    shape: Sequence[Size],
    dtype: torch.dtype,
    attributes: Attributes | None = None,
) -> torch.Tensor:
    """Puts one `vlmport::operator` node into the traced graph and returns its only output."""
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{operator}", inputs, attrs=dict(attributes or {}), dtype=dtype, shape=shape, version=_VERSION
    )


def emit_many(
    operator: str,
    inputs: Sequence[torch.Tensor | None],
    *,
    shapes: Sequence[Sequence[Size]],
    dtypes: Sequence[torch.dtype],
    attributes: Attributes | None = None,
) -> Sequence[torch.Tensor]:
    """As `emit`, for a node with several outputs."""
    return torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{operator}", inputs, attrs=dict(attributes or {}), dtypes=dtypes, shapes=shapes, version=_VERSION
    )


def float_constant(values: Sequence[float]) -> torch.Tensor:
    """A float32 vector that is part of the graph, not of the checkpoint (fake tensors carry no values to trace)."""
    if is_tracing():
        attributes = {"values": list(values)}
        return emit("FloatConstant", [], shape=[len(values)], dtype=torch.float32, attributes=attributes)
    return torch.tensor(values, dtype=torch.float32)
