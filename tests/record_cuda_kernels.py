"""Writes export/cuda_kernels.py: ONNX Runtime itself is asked which nodes of our cuda graphs its CUDA provider takes.

    python tests/record_cuda_kernels.py        with onnxruntime-gpu and the export extra; no GPU: standin_cuda.py

Every kind of node (an operator and the dtypes of its inputs) is put into a graph of its own, and a session is opened on
it. The provider has to start; nothing is computed.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort
from test_families import ROLES, lowered, role_of

from vlmport.export.lower import lower
from vlmport.export.placement import Signature, signature
from vlmport.export.trace import trace
from vlmport.quant.guard import Guard
from vlmport.quant.ranges import Ranges, module_of
from vlmport.quant.recipe import RangeGuard, load_recipe
from vlmport.quant.rewrite import rewrite
from vlmport.quant.typed import typed

__all__ = ["graphs", "one_node", "recorded"]

FILE = Path(__file__).parent.parent / "export" / "cuda_kernels.py"
RECIPES = ("fp16", "int8", "int4", "int4_b64")
CUDA = "CUDAExecutionProvider"
HEAD = '''"""Operators that ONNX Runtime's CUDA provider has kernels for, of those in our graphs, by dtypes of inputs.

Written by tests/record_cuda_kernels.py, which asks ONNX Runtime itself; do not edit.
"""

from collections.abc import Mapping

__all__ = ["HOST_INPUTS", "HOST_OUTPUTS", "KERNELS", "VERSION"]

'''


def graphs() -> Iterator[ir.Model]:
    """All lowered graphs of all families for cuda, by every recipe that changes them."""
    for family, role in ROLES:
        for name in RECIPES:
            model = lowered(family, role, "cuda").clone()
            rewrite(model, role, load_recipe(name), "cuda")
            yield typed(model)
            model = lowered(family, role, "cuda").clone()
            single = overflow(model, role)
            rewrite(model, role, load_recipe(name), "cuda", single)
            yield typed(model)
        if role == "decoder":  # attention with a cache has no float32 kernel: the table tells that too
            model = trace(role_of(family, role), "float32")
            lower(model, "cuda")
            yield typed(model)


def overflow(model: ir.Model, role: str) -> set[str]:
    """Puts everything into float32 that a guard can; gives the weights."""
    ranges = Ranges(dict.fromkeys((str(value.name) for value in model.graph.inputs), 1e6))
    for node in model.graph:
        if (name := module_of(node)) is not None:
            ranges.reads[name] = ranges.writes[name] = 1e6
    ranges.parameters = dict.fromkeys(model.graph.initializers, 1e6)
    return Guard(RangeGuard()).widen(model, role, ranges) or set()


def one_node(node: ir.Node) -> bytes:
    """A model of this node alone, its inputs those of the graph."""
    inputs = [None if x is None else ir.val(f"x{i}", x.dtype) for i, x in enumerate(node.inputs)]
    copy = ir.node(node.op_type, inputs, dict(node.attributes), domain=node.domain, num_outputs=len(node.outputs))
    for index, (new, old) in enumerate(zip(copy.outputs, node.outputs, strict=True)):
        new.name, new.type = f"y{index}", old.type
    imports = {"": 23, "com.microsoft": 1}
    given = [value for value in inputs if value is not None]
    graph = ir.Graph(given, copy.outputs, nodes=[copy], opset_imports=imports, name="one_node")
    return ir.serde.serialize_model(ir.Model(graph, ir_version=10)).SerializeToString()


def asked(node: ir.Node) -> tuple[bool, tuple[int, ...], bool]:
    """Whether the CUDA provider takes the node; inputs that its kernel reads on the host; whether it writes there."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    state = ort.capi.onnxruntime_pybind11_state
    try:
        session = ort.InferenceSession(one_node(node), options, providers=[CUDA, "CPUExecutionProvider"])
    except state.NotImplemented:  # no provider has a kernel
        return False, (), False
    assert CUDA in session.get_providers(), "the CUDA provider did not start"
    (only,) = session.get_provider_graph_assignment_info()
    if only.ep_name != CUDA:
        return False, (), False
    places = iter(session.get_input_memory_infos())
    on_host = tuple(
        index for index, value in enumerate(node.inputs) if value is not None and next(places).name != "Cuda"
    )
    return True, on_host, all(info.name != "Cuda" for info in session.get_output_memory_infos())


def recorded() -> tuple[dict[str, dict[tuple[str, ...], bool]], dict[str, tuple[int, ...]], set[str]]:
    """KERNELS, HOST_INPUTS and HOST_OUTPUTS of the installed onnxruntime."""
    nodes: dict[Signature, ir.Node] = {}
    for model in graphs():
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            if node.op_type != "Constant":
                nodes.setdefault(signature(node), node)
    kernels: dict[str, dict[tuple[str, ...], bool]] = {}
    host_inputs: dict[str, tuple[int, ...]] = {}
    host_outputs: set[str] = set()
    for found in sorted(nodes):
        taken, on_host, writes_there = asked(nodes[found])
        kernels.setdefault(found.operator, {})[found.inputs] = taken
        if on_host and len(on_host) > len(host_inputs.get(found.operator, ())):
            host_inputs[found.operator] = on_host
        if writes_there:
            host_outputs.add(found.operator)
    return kernels, host_inputs, host_outputs


def main() -> int:
    kernels, host_inputs, host_outputs = recorded()
    lines = [HEAD, f'VERSION = "onnxruntime-gpu {ort.__version__}"\n\n']
    lines.append("# Operator -> dtypes of its inputs -> whether there is a kernel.\n")
    lines.append("KERNELS: Mapping[str, Mapping[tuple[str, ...], bool]] = {\n")
    for operator, found in kernels.items():
        lines.append(f'    "{operator}": {{\n')
        for dtypes, taken in found.items():
            inner = ", ".join(f'"{dtype}"' for dtype in dtypes) + ("," if len(dtypes) == 1 else "")
            lines.append(f"        ({inner}): {taken},\n")
        lines.append("    },\n")
    lines.append("}\n\n# Inputs that the CUDA kernel reads on the host.\n")
    lines.append("HOST_INPUTS: Mapping[str, tuple[int, ...]] = {\n")
    lines += [f'    "{name}": {places},\n' for name, places in sorted(host_inputs.items())]
    names = ", ".join(f'"{name}"' for name in sorted(host_outputs))
    lines.append(
        f"}}\n\n# Operators whose CUDA kernel writes its result there.\nHOST_OUTPUTS = frozenset({{{names}}})\n"
    )
    FILE.write_text("".join(lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
