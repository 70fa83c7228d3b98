"""Tracing a role into a graph without allocating its weights.

Modules are built and traced with fake tensors, so a decoder of billions of parameters takes some hundred MB and
seconds. The graph has initializers without values, named after the parameters; export/build.py says where the values
come from.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from .family import Port, RoleSpec
from .repeat import expand_blocks

__all__ = ["OPSET", "trace"]

OPSET = 23
# Two different sizes a name: a size of 1 is taken for a constant, and equal sizes may be taken for one dim.
_EXAMPLE_SIZE = 2
_FACTOR = 7  # of dims that are multiples
_NUM_PATCHES = 60**2  # merge blocks of 1 to 6 patches a side divide it; fake tensors cost nothing
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "int64": torch.int64, "int32": torch.int32}


def trace(role: RoleSpec, compute_dtype: str) -> ir.Model:
    """The graph of a role with semantic operators (domain `vlmport`) and value-less initializers.

    `compute_dtype` ("float32" or "float16") is the dtype of parameters and of ports marked "compute".
    """
    dtype = _DTYPES[compute_dtype]
    sizes = _example_sizes(role.inputs) | {dim: _FACTOR * size for dim, size in role.multiples.items()}
    previous = torch.get_default_dtype()
    with FakeTensorMode():
        torch.set_default_dtype(dtype)
        try:
            module = role.build().eval()
        finally:
            torch.set_default_dtype(previous)
        examples = [_example(port, sizes, dtype) for port in role.inputs]
    shapes = [_dynamic_dims(port) for port in role.inputs]
    fixed = len(examples) - role.variadic
    arguments = (*examples[:fixed], examples[fixed:]) if role.variadic else tuple(examples)
    dynamic = (*shapes[:fixed], shapes[fixed:]) if role.variadic else tuple(shapes)
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            module,
            arguments,
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            input_names=[port.name for port in role.inputs],
            output_names=[port.name for port in role.outputs],
            dynamic_shapes=dynamic,
        )
    assert program is not None
    model = program.model
    expand_blocks(model.graph)
    _name_ports(model.graph, role)
    return model


def _example_sizes(ports: tuple[Port, ...]) -> dict[str, int]:
    """A distinct size for every named dim."""
    names = dict.fromkeys(dim for port in ports for dim in port.shape if isinstance(dim, str))
    sizes = {name: _EXAMPLE_SIZE + index for index, name in enumerate(names)}
    return sizes | {"num_patches": _NUM_PATCHES}


def _example(port: Port, sizes: dict[str, int], compute: torch.dtype) -> torch.Tensor:
    shape = [sizes[dim] if isinstance(dim, str) else dim for dim in port.shape]
    return torch.zeros(shape, dtype=compute if port.dtype == "compute" else _DTYPES[port.dtype])


def _dynamic_dims(port: Port) -> dict[int, object]:
    return {axis: torch.export.Dim.DYNAMIC for axis, dim in enumerate(port.shape) if isinstance(dim, str)}


def _name_ports(graph: ir.Graph, role: RoleSpec) -> None:
    """Gives every port the dims that the role declares: what the tracer derived has names of its own."""
    for values, ports in ((graph.inputs, role.inputs), (graph.outputs, role.outputs)):
        assert len(values) == len(ports), f"{len(values)} values for {len(ports)} ports"
        for value, port in zip(values, ports, strict=True):
            value.name = port.name
            value.shape = ir.Shape(port.shape)
    for value in graph.initializers.values():
        value.const_value = None  # a fake tensor has no values; whoever reads it by mistake shall fail


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports on stdout and warns of libraries that are not installed; neither concerns our users."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
