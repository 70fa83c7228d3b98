"""Time of one attention on a cache in float32 and in 8 bits: `python -m benchmarks.kv_cache`.

The attention of a 3B shape (16 query heads, 2 key/value heads of 128), a token at a time behind caches of some lengths,
kinds interleaved, the median of many calls.
"""

import statistics
import time

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

HEADS, KV_HEADS, SIZE = 16, 2, 128
KINDS = {"float32": None, "int8, a channel": "PER_CHANNEL", "int8, a tensor": "PER_TENSOR"}
LENGTHS = (512, 2048, 8192)
CALLS = 40


def attention(kind: str | None) -> ort.InferenceSession:
    """One GroupQueryAttention whose past and present are as long as the cache."""
    cache = ir.DataType.FLOAT if kind is None else ir.DataType.INT8
    types = dict.fromkeys(("query", "key", "value"), ir.DataType.FLOAT) | dict.fromkeys(
        ("past_key", "past_value"), cache
    )
    types |= {"last": ir.DataType.INT32, "total": ir.DataType.INT32}
    inputs = [ir.Value(name=name, type=ir.TensorType(dtype)) for name, dtype in types.items()]
    widths = {"query": HEADS * SIZE, "key": KV_HEADS * SIZE, "value": KV_HEADS * SIZE}
    for value in inputs:
        if value.name in widths:
            value.shape = ir.Shape([1, 1, widths[value.name]])
        else:
            value.shape = ir.Shape({"last": [1], "total": []}.get(str(value.name), [1, KV_HEADS, "capacity", SIZE]))
    attributes: dict[str, int | float | str] = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "scale": SIZE**-0.5}
    constants: list[ir.Value] = []
    reads: list[ir.Value | None] = [*inputs]
    if kind is not None:
        attributes |= {"k_quant_type": kind, "v_quant_type": kind, "kv_cache_bit_width": 8}
        scales = np.full(1 if kind == "PER_TENSOR" else KV_HEADS * SIZE, 0.03, np.float32)
        constants = [ir.Value(name=f"{part}_scale", const_value=ir.tensor(scales)) for part in "kv"]
        reads += [None] * 5 + constants
    node = ir.node("GroupQueryAttention", reads, attributes, domain="com.microsoft", num_outputs=3)
    for value, name in zip(node.outputs, ("out", "present_key", "present_value"), strict=True):
        value.name, value.type = name, ir.TensorType(ir.DataType.FLOAT if name == "out" else cache)
    graph = ir.Graph(
        inputs, node.outputs, nodes=[node], initializers=constants, opset_imports={"": 21, "com.microsoft": 1}
    )
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return ort.InferenceSession(model, providers=["CPUExecutionProvider"])


def step(session: ort.InferenceSession, kind: str | None, length: int) -> ort.IOBinding:
    """A bound call that adds the last token of a cache of `length`."""
    random = np.random.default_rng(0)
    cache = random.standard_normal((1, KV_HEADS, length, SIZE)).astype(np.float32)
    held = cache if kind is None else np.rint(cache * 30).clip(-128, 127).astype(np.int8)
    binding = session.io_binding()
    for name, heads in (("query", HEADS), ("key", KV_HEADS), ("value", KV_HEADS)):
        binding.bind_cpu_input(name, random.standard_normal((1, 1, heads * SIZE)).astype(np.float32))
    binding.bind_cpu_input("last", np.array([length - 1], np.int32))
    binding.bind_cpu_input("total", np.array(length, np.int32))
    for part in ("key", "value"):
        buffer = ort.OrtValue.ortvalue_from_numpy(held.copy())
        binding.bind_ortvalue_input(f"past_{part}", buffer)
        binding.bind_ortvalue_output(f"present_{part}", buffer)
    binding.bind_output("out")
    return binding


def main() -> None:
    print(f"{'cache':>6}  " + "  ".join(f"{name:>16}" for name in KINDS))
    sessions = {name: attention(kind) for name, kind in KINDS.items()}
    for length in LENGTHS:
        bound = {name: step(sessions[name], kind, length) for name, kind in KINDS.items()}
        times: dict[str, list[float]] = {name: [] for name in KINDS}
        for _ in range(CALLS):
            for name, binding in bound.items():
                started = time.perf_counter()
                sessions[name].run_with_iobinding(binding)
                times[name].append(time.perf_counter() - started)
        print(f"{length:>6}  " + "  ".join(f"{statistics.median(times[name]) * 1e6:>13.0f} us" for name in KINDS))


if __name__ == "__main__":
    main()
