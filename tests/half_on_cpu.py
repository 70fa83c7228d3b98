"""A package for the cuda target, changed so that the CPU computes what a GPU would: for tests of its numbers.

The CPU provider has no kernel for packed attention, and where it lacks a float16 kernel ONNX Runtime computes whole
chains in float32, which hides both rounding and overflow. Here every operator reads float16, computes in float32 (as
the CUDA kernels accumulate) and rounds its result to float16; packed attention becomes the CPU's.
"""

import dataclasses
import shutil
from pathlib import Path

import onnx_ir as ir
from onnx_ir.tape import Tape

from vlmport.export.lower.attention import LoopSegmentAttention
from vlmport.quant.typed import typed
from vlmport.runtime.package import MANIFEST_NAME, Package, file_entry, manifest_text

__all__ = ["half_on_cpu", "package_on_cpu"]

HALF, SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT
# These move values or round by themselves: their CPU kernels take float16 and compute as said above.
EXACT = {"Cast", "Concat", "Expand", "Gather", "Identity", "Reshape", "ScatterElements", "Shape", "Slice", "Split"}
EXACT |= {"Squeeze", "Transpose", "Unsqueeze", "GroupQueryAttention", "MatMulNBits", "GatherBlockQuantized"}


def half_on_cpu(model: ir.Model) -> None:
    """Changes a lowered cuda graph in place."""
    inferred = {value.name: value.type for node in typed(model).graph for value in node.outputs}
    for node in model.graph:
        for value in node.outputs:
            value.type = inferred.get(value.name, value.type)
    for node in list(model.graph):
        if node.op_type == "PackedMultiHeadAttention":
            _segment_attention(model, node)
        elif node.op_type not in EXACT:
            _round_results(node)
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)  # CUDA has no 8-bit activations
    LoopSegmentAttention()(model)


def _segment_attention(model: ir.Model, node: ir.Node) -> None:
    q, k, v, bias, offset, bounds = node.inputs
    assert bias is None
    assert offset is not None
    tape = Tape()
    wide = [tape.op("Cast", [x], {"to": SINGLE}) for x in (q, k, v)]
    out = tape.op("SegmentAttention", [*wide, bounds], dict(node.attributes), domain="vlmport", version=1)
    new = tape.op("Cast", [out], {"to": HALF})
    new.type = ir.TensorType(HALF)
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], list(tape.nodes), list(node.outputs), [new])
    model.graph.opset_imports["vlmport"] = 1


def _round_results(node: ir.Node) -> None:
    graph = node.graph
    assert graph is not None
    halves = [index for index, value in enumerate(node.inputs) if value is not None and value.dtype == HALF]
    for index in halves:
        cast = ir.node("Cast", [node.inputs[index]], {"to": SINGLE})
        graph.insert_before(node, cast)
        node.replace_input_with(index, cast.outputs[0])
    for value in node.outputs:
        if value.dtype == HALF:
            value.type = ir.TensorType(SINGLE)  # not value.dtype: values may share the object
            cast = ir.node("Cast", [value], {"to": HALF})
            cast.outputs[0].type = ir.TensorType(HALF)
            value.replace_all_uses_with(cast.outputs[0], replace_graph_outputs=True)
            cast.replace_input_with(0, value)
            graph.insert_after(node, cast)


def package_on_cpu(package: Package, folder: Path) -> Package:
    """A copy of a cuda package whose graphs the CPU runs; the runtime takes it for one of the cpu target."""
    shutil.copytree(package.path, folder)
    files = dict(package.manifest.files)
    for name in {graph.graph for variant in package.manifest.variants.values() for graph in variant.graphs.values()}:
        file = folder / "onnx" / name
        model = ir.load(file)
        half_on_cpu(model)
        file.write_bytes(ir.serde.serialize_model(model).SerializeToString())
        files[f"onnx/{name}"] = file_entry(file)
    manifest = dataclasses.replace(package.manifest, target="cpu", files=files)
    (folder / MANIFEST_NAME).write_text(manifest_text(manifest), encoding="utf-8")
    return Package.open(folder)
