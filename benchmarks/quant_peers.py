"""What one would run instead: other quantizers on the same decoder, at the same bytes a weight.

Each gets the decoder in float32 and leaves the other graphs, which are those of this project's `int4`, alone: the head
and the table in 8 bits, towers with rounded activations. What comes back is a variant of the same package.
"""

import contextlib
import dataclasses
import io
import shutil
from pathlib import Path

import onnx
from onnx import numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from vlmport.runtime.manifest import Variant
from vlmport.runtime.package import MANIFEST_NAME, Package, file_entry, manifest_text

__all__ = [
    "BASE",
    "add_decoder",
    "float_decoder",
    "onnxruntime_decoder",
    "save_bitsandbytes",
]

BASE = "float-decoder"  # the recipe of what peers start from
_BLOCK = 32
_IN_GRAPH = 1024  # bytes; smaller tensors stay in the .onnx file, as this project has them


def float_decoder(package: Path) -> onnx.ModelProto:
    """The decoder of the variant BASE with MatMul(x, W.T) for each linear: peers look for that operator.

    Weights are in memory but for those of other graphs' files.
    """
    opened = Package.open(package)
    entry = opened.variant(BASE).graphs["decoder"]
    model = onnx.load(package / "onnx" / entry.graph, load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for tensor in tensors.values():
        if uses_external_data(tensor) and _location(tensor) not in entry.shared:
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


def onnxruntime_decoder(model: onnx.ModelProto, method: str, bits: int) -> onnx.ModelProto:
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


def add_decoder(package: Path, name: str, model: onnx.ModelProto) -> None:
    """Makes the model the decoder of a new variant, which else is BASE."""
    opened = Package.open(package)
    base = opened.variant(BASE)
    graph, data = f"decoder_{name}.onnx", f"decoder_{name}.onnx_data"
    folder = package / "onnx"
    (folder / data).unlink(missing_ok=True)
    _move_out(model, folder / data)
    (folder / graph).write_bytes(model.SerializeToString())
    entry = dataclasses.replace(base.graphs["decoder"], graph=graph, data=data, precision=name, formats={})
    variant = Variant(name, {"name": name, "rules": []}, {**base.graphs, "decoder": entry})
    files = opened.manifest.files | {f"onnx/{file}": file_entry(folder / file) for file in (graph, data)}
    manifest = dataclasses.replace(
        opened.manifest, variants=opened.manifest.variants | {name: variant}, files=dict(sorted(files.items()))
    )
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
