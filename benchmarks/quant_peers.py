"""What one would run instead: other quantizers on the same graphs, at the same bytes a weight.

Each gets the decoder in float32 and leaves the other graphs, which are those of this project's `int4`, alone: the head
and the table in 8 bits, towers with rounded activations. One that rounds activations itself gets head and towers in
float32 too. What comes back is a variant of the same package.
"""

import contextlib
import dataclasses
import io
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from vlmport.runtime.manifest import Variant
from vlmport.runtime.package import MANIFEST_NAME, Package, file_entry, manifest_text

__all__ = [
    "BASE",
    "add_variant",
    "float_graph",
    "onnxruntime_blocks",
    "onnxruntime_dynamic",
    "save_bitsandbytes",
]

BASE = "float-decoder"  # the recipe of what peers start from
_BLOCK = 32
_IN_GRAPH = 1024  # bytes; smaller tensors stay in the .onnx file, as this project has them


def float_graph(package: Path, variant: str, role: str) -> onnx.ModelProto:
    """A graph with MatMul(x, W.T) for each linear in float32: peers look for that operator.

    Weights are in memory, but for codes in other graphs' files.
    """
    opened = Package.open(package)
    entry = opened.variant(variant).graphs[role]
    model = onnx.load(package / "onnx" / entry.graph, load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    linears = {node.input[1] for node in model.graph.node if node.op_type == "FusedMatMul"}
    for name, tensor in tensors.items():
        if uses_external_data(tensor) and (name in linears or _location(tensor) not in entry.shared):
            load_external_data_for_tensor(tensor, str(package / "onnx"))
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    for node in model.graph.node:
        if node.op_type == "FusedMatMul" and node.input[1] in tensors:
            weight = tensors[node.input[1]]
            turned = f"{weight.name}_T"  # what is known of the shape goes by the name
            weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).T.copy(), turned))
            node.input[1], node.op_type, node.domain = turned, "MatMul", ""
            del node.attribute[:]
    return model


def onnxruntime_blocks(model: onnx.ModelProto, method: str, bits: int) -> onnx.ModelProto:
    """ONNX Runtime's MatMulNBits quantizer: "default", "hqq" or "k_quant"."""
    from onnxruntime.quantization import matmul_nbits_quantizer as peer

    configs = {
        "default": lambda: peer.DefaultWeightOnlyQuantConfig(block_size=_BLOCK, accuracy_level=4, bits=bits),
        "hqq": lambda: peer.HQQWeightOnlyQuantConfig(block_size=_BLOCK, bits=bits),
        "k_quant": peer.KQuantWeightOnlyQuantConfig,
    }
    quantizer = peer.MatMulNBitsQuantizer(
        model, bits=bits, block_size=_BLOCK, accuracy_level=4, algo_config=configs[method]()
    )
    with contextlib.redirect_stdout(io.StringIO()):  # it draws a bar
        quantizer.process()
    made = quantizer.model
    return getattr(made, "model", made)


def onnxruntime_dynamic(model: onnx.ModelProto) -> onnx.ModelProto:
    """ONNX Runtime's quantize_dynamic by its defaults: 8 bits, a scale a tensor of weights and of activations."""
    from onnxruntime.quantization import quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "quantized.onnx")
        quantize_dynamic(model, file, op_types_to_quantize=["MatMul"])
        return onnx.load(file)


def add_variant(package: Path, name: str, models: Mapping[str, onnx.ModelProto]) -> None:
    """Makes the models the graphs of a new variant, by role, which else is BASE."""
    opened = Package.open(package)
    graphs, files = dict(opened.variant(BASE).graphs), dict(opened.manifest.files)
    folder = package / "onnx"
    for role, model in models.items():
        graph, data = f"{role}_{name}.onnx", f"{role}_{name}.onnx_data"
        (folder / data).unlink(missing_ok=True)
        _move_out(model, folder / data)
        (folder / graph).write_bytes(model.SerializeToString())
        graphs[role] = dataclasses.replace(graphs[role], graph=graph, data=data, precision=name, formats={})
        files |= {f"onnx/{file}": file_entry(folder / file) for file in (graph, data)}
    variants = opened.manifest.variants | {name: Variant(name, {"name": name, "rules": []}, graphs)}
    manifest = dataclasses.replace(opened.manifest, variants=variants, files=dict(sorted(files.items())))
    (package / MANIFEST_NAME).write_text(manifest_text(manifest), encoding="utf-8")


def _move_out(model: onnx.ModelProto, file: Path) -> None:
    """Writes the larger initializers to a data file, as a package has them."""
    with file.open("wb") as stream:
        for tensor in model.graph.initializer:
            raw = tensor.raw_data
            if uses_external_data(tensor) or len(raw) < _IN_GRAPH:
                continue
            stream.write(b"\0" * (-stream.tell() % 64))
            place = {"location": file.name, "offset": str(stream.tell()), "length": str(len(raw))}
            stream.write(raw)
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in place.items():
                tensor.external_data.add(key=key, value=value)


def save_bitsandbytes(checkpoint: Path, folder: Path) -> None:
    """The checkpoint as bitsandbytes saves it: decoder linears in NF4, absmax quantized again; the rest in float32."""
    import torch
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(folder)
    for file in checkpoint.glob("*.json"):
        if not (folder / file.name).exists() and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)


def _location(tensor: onnx.TensorProto) -> str:
    return next(entry.value for entry in tensor.external_data if entry.key == "location")
