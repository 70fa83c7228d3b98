"""From a float graph to the graph of a recipe: which node computes with a weight, and which initializers it reads.

A float graph names a weight by its parameter and uses it in one of two nodes:

    linear     com.microsoft.FusedMatMul(x, W), transB = 1, W [N, K]  ->  com.microsoft.MatMulNBits,
                                                                          com.microsoft.MatMulBnb4 (quant/nf4.py) or
                                                                          vlmport.IntegerLinear (quant/dynamic.py)
    embedding  Gather(W, ids), axis 0, W [V, D]                       ->  com.microsoft.GatherBlockQuantized

A parameter is an initializer without a const_value: its bytes come from a WeightSource when the graph is written.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from ..runtime.errors import RecipeError
from .dynamic import channel_shapes, integer_linear
from .nf4 import flat_shapes
from .pack import Piece, gather_shapes, linear_shapes
from .recipe import Recipe, Target, WeightFormat

__all__ = [
    "StoredTensor",
    "is_linear",
    "kept_formats",
    "linear_node",
    "linear_pieces",
    "piece_names",
    "restore_float",
    "rewrite",
    "weights_of",
]

# Names of the initializers of a quantized weight, as ONNX Runtime's own quantizers give them.
_SUFFIX: dict[Piece, str] = {"quantized": "_Q", "scales": "_scales", "zero_points": "_zero_points"}
_WIDENED = "_float32"  # the output of the Cast behind a linear's float16 weight
_NARROW = "_float16"  # the input of the Cast behind the gather from a float16 table
_ANY_ROW = 32  # blocks up to this size are for rows of any length, which they fill with padding
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_NUMPY: dict[ir.DataType, Literal["float32", "float16", "uint8", "int8"]] = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.UINT8: "uint8",
    ir.DataType.INT8: "int8",
}


@dataclass(frozen=True)
class StoredTensor:
    """An initializer to be written, and the piece of which parameter it holds.

    `parameter_shape` is the shape of the parameter in the checkpoint. `format` is None for a tensor that the recipe
    does not reach: it is cast to `dtype` and no more. `transposed`: a row of the parameter is a column of this tensor.
    """

    name: str
    parameter: str
    piece: Piece
    dtype: Literal["float32", "float16", "uint8", "int8"]
    shape: tuple[int, ...]
    parameter_shape: tuple[int, ...]
    format: WeightFormat | None = None
    transposed: bool = False

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * {"float32": 4, "float16": 2, "uint8": 1, "int8": 1}[self.dtype]

    @property
    def is_kept(self) -> bool:
        """True for codes that the checkpoint itself holds."""
        return self.dtype == "uint8" and self.piece == "whole"

    @property
    def stored_as(self) -> str:
        """Short name of the format for people: "int4", "float32"."""
        return self.format.label if self.format is not None else self.dtype


def rewrite(
    model: ir.Model, role: str, recipe: Recipe, target: Target = "cpu", single: Collection[str] = ()
) -> tuple[StoredTensor, ...]:
    """Rewrites the float graph of a role in place by a recipe; gives what is to be stored, in initializer order.

    `target` is what the graph was lowered for; rules for another one do not count. Weights in `single` that the recipe
    stores in float16 are stored in float32.

    Raises RecipeError where the recipe cannot be applied to this graph.
    """
    graph = model.graph
    weights = weights_of(graph)
    _check_rules(recipe, role, list(weights), target)
    stored: list[StoredTensor] = []
    initializers = list(graph.initializers.values())
    graph.initializers.clear()
    for value in initializers:
        name = str(value.name)
        format = recipe.format_of(role, name, target) if name in weights else None
        if format is not None and format.bits == 16 and name in single:
            format = WeightFormat(bits=32)
        if format is not None and format.is_quantized:
            pieces = _quantize(model, value, format)
            stored += [tensor for _, tensor in pieces]
            for piece, _ in pieces:
                graph.initializers.add(piece)
            continue
        graph.initializers.add(value)
        if value.const_value is None:
            if format is not None:
                _store_float(graph, value, format, recipe)
            stored.append(_whole(value, format))
    if any(tensor.format is not None and tensor.format.is_quantized for tensor in stored):
        graph.opset_imports.setdefault("com.microsoft", 1)
    return tuple(stored)


def weights_of(graph: ir.Graph) -> dict[str, ir.Value]:
    """The weights of linears and embedding tables in a float graph: what rules reach, by parameter."""
    return {str(value.name): value for value in graph.initializers.values() if _is_weight(value)}


def piece_names(parameter: str) -> dict[str, Piece]:
    """Name -> piece of the initializers that a parameter may be stored in."""
    return {f"{parameter}{_SUFFIX.get(piece, '')}": piece for piece in ("whole", *_SUFFIX)}


def kept_formats(graph: ir.Graph) -> dict[str, str]:
    """How linears are stored whose codes the graph reads, by parameter: also those that no recipe has reached."""
    found: dict[str, str] = {}
    for node in graph:
        codes = node.inputs[1].name if node.op_type in ("MatMulBnb4", "MatMulNBits") and node.inputs[1] else None
        if codes is not None and codes.endswith(_SUFFIX["quantized"]):
            table = "nf4" if node.attributes.get_int("quant_type", 0) else "fp4"
            label = table if node.op_type == "MatMulBnb4" else f"int{node.attributes.get_int('bits', 4)}"
            found[codes.removesuffix(_SUFFIX["quantized"])] = label
    return found


def restore_float(model: ir.Model) -> None:
    """Takes back, in place, what `rewrite` did for bits 16 in a float32 graph: float16 weights and their Casts."""
    graph = model.graph
    for value in graph.initializers.values():
        if value.const_value is not None or value.dtype != ir.DataType.FLOAT16:
            continue
        for node, _ in _uses(value):
            output = node.outputs[0]
            if node.op_type == "Cast" and output.name == f"{value.name}{_WIDENED}":
                output.replace_all_uses_with(value)
                graph.remove(node, safe=True)
                value.type = ir.TensorType(ir.DataType.FLOAT)
            elif node.op_type == "Gather" and str(output.name).endswith(_NARROW):
                (cast,) = [user for user, _ in _uses(output)]
                name = cast.outputs[0].name
                cast.outputs[0].replace_all_uses_with(output, replace_graph_outputs=True)
                graph.remove(cast, safe=True)
                output.name = name
                output.type = value.type = ir.TensorType(ir.DataType.FLOAT)


def _uses(value: ir.Value) -> list[tuple[ir.Node, int]]:
    return [(use.node, use.idx) for use in value.uses()]


def is_linear(node: ir.Node, index: int = 1) -> bool:
    """True where the node is a linear and the input its weight. FusedMatMul defaults: alpha 1, all else 0."""
    number = {name: attribute.value for name, attribute in node.attributes.items()}
    plain = number.get("alpha", 1.0) == 1.0 and not any(
        number.get(k, 0) for k in ("transA", "transBatchA", "transBatchB")
    )
    fused = (node.domain, node.op_type) == ("com.microsoft", "FusedMatMul")
    return fused and index == 1 and plain and number.get("transB", 0) == 1


def _is_embedding(node: ir.Node, index: int) -> bool:
    """True where the node is an embedding and the input its table."""
    axis = node.attributes.get_int("axis", 0)
    return (node.domain, node.op_type) == ("", "Gather") and index == 0 and axis == 0


def _is_weight(value: ir.Value) -> bool:
    """True for the weight of a linear or an embedding. Raises RecipeError where it is both, or something else too."""
    if value.const_value is not None or value.dtype not in _FLOATS or value.shape is None or len(value.shape) != 2:
        return False
    uses = _uses(value)
    linear = [is_linear(*use) and use[0].graph is value.graph for use in uses]
    embedding = [_is_embedding(*use) and use[0].graph is value.graph for use in uses]
    if not any(linear) and not any(embedding):
        return False
    if not all(linear) and not all(embedding):
        users = ", ".join(sorted({node.op_type for node, _ in uses}))
        raise RecipeError(f"{value.name}: used by {users}; a weight belongs to linears or to embeddings alone")
    return True


def _check_rules(recipe: Recipe, role: str, weights: list[str], target: Target) -> None:
    """A rule made for one role alone that reaches nothing there is a slip of the pen."""
    for rule in recipe.rules:
        if rule.target not in (None, target) or rule.role_glob != role:
            continue
        if not any(rule.covers(role, weight, target) for weight in weights):
            some = ", ".join(weights[:3]) or "none"
            raise RecipeError(
                f"recipe {recipe.name}: {rule.match!r} matches no weight of {role}; its weights: {some}, ..."
            )


def _whole(value: ir.Value, format: WeightFormat | None) -> StoredTensor:
    name, shape = str(value.name), _shape(value)
    if value.dtype == ir.DataType.UINT8:  # codes that the checkpoint holds: nothing is to be changed about them
        return StoredTensor(name, name, "whole", "uint8", shape, shape)
    if value.dtype not in _FLOATS:
        raise RecipeError(f"{name}: parameters are float32 or float16, not {value.dtype}; give its values in the graph")
    dtype = "float32" if value.dtype == ir.DataType.FLOAT else "float16"
    return StoredTensor(name, name, "whole", dtype, shape, shape, format)


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None, value.name
    return tuple(int(size) for size in value.shape.numpy())


def _quantize(model: ir.Model, value: ir.Value, format: WeightFormat) -> list[tuple[ir.Value, StoredTensor]]:
    """Replaces the nodes that use a weight; gives its new initializers."""
    name, (num_rows, num_columns) = str(value.name), _shape(value)
    of_linear = is_linear(*_uses(value)[0])
    if format.has_blocks and format.block_size > max(num_columns, _ANY_ROW):
        raise RecipeError(
            f"{name}: block_size {format.block_size} is larger than its rows of {num_columns} values; use "
            f"{2 ** int(math.log2(max(num_columns, _ANY_ROW)))} at most"
        )
    if format.is_dynamic:
        _check_dynamic(value, of_linear)
        shapes = channel_shapes(num_rows, num_columns)
    elif of_linear:
        shapes = linear_pieces(num_rows, num_columns, format)
    elif format.is_table:
        raise RecipeError(f"{value.name}: an embedding has no values {format.values}; give it bits 8 or 4 alone")
    else:
        shapes = gather_shapes(num_rows, num_columns, format, name)
    assert value.dtype is not None
    pieces: list[tuple[ir.Value, StoredTensor]] = []
    for piece, shape in shapes.items():
        codes = ir.DataType.INT8 if format.is_dynamic else ir.DataType.UINT8
        dtype = value.dtype if piece == "scales" else codes
        tensor = StoredTensor(
            name + _SUFFIX[piece],
            name,
            piece,
            _NUMPY[dtype],
            shape,
            (num_rows, num_columns),
            format,
            transposed=format.is_dynamic and piece == "quantized",
        )
        new = ir.Value(name=tensor.name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        pieces.append((new, tensor))
    values = [piece for piece, _ in pieces]
    for node, _ in _uses(value):
        if format.is_dynamic:
            new = integer_linear(model, node, values)
        elif of_linear:
            new = linear_node(node, values, format, num_rows, num_columns)
        else:
            new = _gather_node(node, values, format)
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [new], node.outputs, new.outputs)
    return pieces


def _check_dynamic(value: ir.Value, of_linear: bool) -> None:
    """Raises RecipeError where activations cannot be rounded: a table has none, and cuda has no kernel."""
    if not of_linear:
        raise RecipeError(f"{value.name}: a table has no activations to round; give it bits 8 alone")
    if value.dtype != ir.DataType.FLOAT:
        raise RecipeError(
            f"{value.name}: activations int8-dynamic are for target cpu; use bits 8 alone, or give the rule target cpu"
        )


def linear_pieces(num_rows: int, num_columns: int, format: WeightFormat) -> Mapping[Piece, tuple[int, ...]]:
    """Shapes of the initializers of the node that `linear_node` makes."""
    if format.is_table:
        return flat_shapes(num_rows, num_columns, format.block_size)
    return linear_shapes(num_rows, num_columns, format)


def linear_node(
    node: ir.Node, pieces: list[ir.Value], format: WeightFormat, num_rows: int, num_columns: int
) -> ir.Node:
    """The node that takes the place of a linear, a weight in blocks before it; not yet in the graph."""
    if format.is_table:
        table = {"K": num_columns, "N": num_rows, "block_size": format.block_size, "quant_type": format.values == "nf4"}
        return ir.node("MatMulBnb4", [node.inputs[0], *pieces], table, domain="com.microsoft", name=node.name)
    attributes = {
        "K": num_columns,
        "N": num_rows,
        "bits": format.bits,
        "block_size": format.block_size,
        "accuracy_level": format.accuracy_level,
    }
    return ir.node("MatMulNBits", [node.inputs[0], *pieces], attributes, domain="com.microsoft", name=node.name)


def _gather_node(node: ir.Node, pieces: list[ir.Value], format: WeightFormat) -> ir.Node:
    codes, *scales = pieces
    attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": format.block_size, "bits": format.bits}
    inputs = [codes, node.inputs[1], *scales]
    return ir.node("GatherBlockQuantized", inputs, attributes, domain="com.microsoft", name=node.name)


def _store_float(graph: ir.Graph, value: ir.Value, format: WeightFormat, recipe: Recipe) -> None:
    """Gives a weight the float dtype of its format. A float16 weight in a float32 graph is cast where it is used."""
    wanted = ir.DataType.FLOAT if format.bits == 32 else ir.DataType.FLOAT16
    if value.dtype == wanted:
        return
    if wanted == ir.DataType.FLOAT:
        raise RecipeError(
            f"recipe {recipe.name}: {value.name}: the graph computes in float16; use fp16 in place of fp32"
        )
    uses = _uses(value)
    value.type = ir.TensorType(wanted)  # not value.dtype: that would change the type of every clone
    if is_linear(*uses[0]):
        cast = _cast(value, f"{value.name}{_WIDENED}")
        first = next(node for node in graph if any(node is user for user, _ in uses))
        graph.insert_before(first, cast)
        for node, index in uses:
            node.replace_input_with(index, cast.outputs[0])
        return
    for node, _ in uses:
        output = node.outputs[0]
        cast = _cast(output, str(output.name))
        graph.insert_after(node, cast)
        output.replace_all_uses_with(cast.outputs[0], replace_graph_outputs=True)
        cast.replace_input_with(0, output)
        cast.outputs[0].shape = output.shape
        output.name, output.type = f"{output.name}{_NARROW}", ir.TensorType(wanted)


def _cast(value: ir.Value, output_name: str) -> ir.Node:
    cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{output_name}_cast")
    cast.outputs[0].name = output_name
    cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    cast.outputs[0].shape = value.shape
    return cast
