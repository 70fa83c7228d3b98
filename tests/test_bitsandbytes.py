"""Checkpoints that bitsandbytes has quantized: codes become initializers byte by byte, answers stay theirs."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from float_graphs import decoder, run
from safetensors.torch import load_file, save_file
from test_receipts import CHECKPOINT, bare_module

from vlmport.export.bitsandbytes import keep_packed
from vlmport.export.build import export_checkpoint
from vlmport.export.checkpoint import Checkpoint, CheckpointSource
from vlmport.quant.recipe import load_recipe
from vlmport.quant.variant import write_variant
from vlmport.runtime.errors import CheckpointError
from vlmport.runtime.model import Model
from vlmport.validate.reference import load_reference
from vlmport.validate.stages import run_stages

theirs = pytest.importorskip("bitsandbytes.functional")

KINDS = ("nf4", "nf4 nested", "fp4", "int8")
SHAPE = (65, 96)


def quantized(kind: str, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors of one weight as bitsandbytes saves it."""
    if kind == "int8":
        codes, scales, _ = theirs.int8_vectorwise_quant(weight.half())
        ending = torch.zeros((), dtype=torch.uint8)
        return {name: codes, name.replace("weight", "SCB"): scales, f"{name}_format": ending}
    codes, state = theirs.quantize_4bit(
        weight, blocksize=64, quant_type=kind[:3], compress_statistics=kind.endswith("nested")
    )
    return {name: codes} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}


def values_of(tensors: dict[str, torch.Tensor], shape: tuple[int, int]) -> np.ndarray:
    """What they stand for, by bitsandbytes itself; its scalar code, since that for AVX-512 is wrong at 96 columns."""
    if "a.SCB" in tensors:
        return (tensors["a.weight"].float() * tensors["a.SCB"][:, None] / 127).numpy()
    parts = {key.removeprefix("a.weight."): value for key, value in tensors.items() if key != "a.weight"}
    state = theirs.QuantState.from_dict(parts, device=torch.device("cpu"))
    if state.nested:
        absmax = theirs.dequantize_blockwise(state.absmax, state.state2) + state.offset
    else:
        absmax = state.absmax
    packed = tensors["a.weight"].reshape(-1)
    codes = torch.stack([packed >> 4, packed & 15], 1).reshape(-1).long()
    scales = absmax.float().repeat_interleave(state.blocksize)[: len(codes)]
    return (state.code[codes] * scales)[: shape[0] * shape[1]].reshape(shape).numpy()


def checkpoint_of(tensors: dict[str, torch.Tensor], folder: Path) -> Checkpoint:
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return Checkpoint.open(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_become_initializers_and_values_stay(kind: str, tmp_path: Path) -> None:
    """Blocks that cross rows, an odd number of rows, padding behind the last block of a row."""
    weight = torch.from_numpy(np.random.default_rng(2).standard_normal(SHAPE).astype(np.float32))
    tensors = quantized(kind, "a.weight", weight)
    checkpoint = checkpoint_of(tensors | {"a.bias": torch.zeros(SHAPE[0])}, tmp_path / "checkpoint")
    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == {
        "a.weight": SHAPE,
        "a.bias": SHAPE[:1],
    }
    assert checkpoint.dtype == "float32"
    expected = values_of(tensors, SHAPE)
    model = decoder({"a.weight": SHAPE})
    shapes = {str(v.name): tuple(v.shape.numpy()) for v in model.graph.initializers.values() if v.const_value is None}
    places = {name: checkpoint.tensors["a.weight" if len(shape) > 1 else "a.bias"] for name, shape in shapes.items()}
    source = CheckpointSource(places, shapes)
    rows = np.concatenate([source.rows("a.weight", start, min(start + 7, 65)) for start in range(0, 65, 7)])
    np.testing.assert_allclose(rows, expected, rtol=1e-6)

    held = keep_packed(model, places, source)
    assert [node.op_type for node in model.graph].count("MatMulNBits" if kind == "int8" else "MatMulBnb4") == 1
    codes = held.rows("a.weight_Q", 0, held.shape("a.weight_Q")[0])
    if kind == "int8":
        np.testing.assert_array_equal(codes.reshape(65, -1).view(np.int8) ^ -128, tensors["a.weight"].numpy())
    else:
        np.testing.assert_array_equal(codes, tensors["a.weight"].numpy().reshape(-1))
    folder = tmp_path / "out"
    folder.mkdir()
    variant, _ = write_variant(load_recipe("fp32"), "cpu", ("decoder",), {}, lambda _: (model, held), folder)
    entry = variant.graphs["decoder"]
    assert entry.formats == {"a.weight": kind[:3] if kind != "int8" else "int8"}
    x = np.random.default_rng(1).standard_normal((3, 96)).astype(np.float32)
    found = run(folder / entry.graph, x=x)
    tolerance = 0.05 if kind == "int8" else 2e-5  # ONNX Runtime's 8-bit kernel rounds activations too
    np.testing.assert_allclose(found, x @ expected.T, atol=tolerance * np.abs(expected).max() * 10)


def test_answers_are_those_of_bitsandbytes(tmp_path: Path) -> None:
    """The demo, every linear of its four graphs in NF4 with nested scales, against transformers with bitsandbytes."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(CHECKPOINT / "model.safetensors").items():
        is_linear = tensor.ndim == 2 and "embed_tokens" not in name
        tensors |= quantized("nf4 nested", name, tensor.float()) if is_linear else {name: tensor.float()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    package = export_checkpoint(folder, tmp_path / "package", [load_recipe("fp32")])
    kept = {label for graph in package.variant("fp32").graphs.values() for label in graph.formats.values()}
    assert kept == {"nf4", "float32"}

    reference, receipts = load_reference(folder), bare_module("receipts")
    with Model.load(package.path, "fp32") as model:
        for index in range(1):
            example = receipts.ask(receipts.make_receipt("heldout", 11, index), "text")
            prepared = model.prepare(asked(example))
            expected, _, _ = reference.prefill(prepared)
            tower, _ = reference.vision(prepared.visuals)
            found = run_stages(model, prepared)
            np.testing.assert_allclose(found.prefill_logits, expected, atol=1e-3)
            np.testing.assert_allclose(found.vision, tower, atol=1e-3)


def asked(example: Any) -> list[dict[str, Any]]:
    from PIL import Image

    picture = {"type": "image", "image": Image.fromarray(example.image)}
    return [{"role": "user", "content": [picture, {"type": "text", "text": example.question}]}]


def test_damaged_parts_are_told_in_one_line(tmp_path: Path) -> None:
    tensors = quantized("nf4 nested", "a.weight", torch.ones(SHAPE))
    state = "a.weight.quant_state.bitsandbytes__nf4"
    with pytest.raises(CheckpointError, match=r"a\.weight\.absmax is missing"):
        checkpoint_of({name: value for name, value in tensors.items() if "absmax" not in name}, tmp_path / "a")
    with pytest.raises(CheckpointError, match="quant_state is unreadable"):
        checkpoint_of(tensors | {state: torch.zeros(5, dtype=torch.uint8)}, tmp_path / "b")
    with pytest.raises(CheckpointError, match="values nf4 are neither nf4 nor fp4"):
        checkpoint_of(tensors | {"a.weight.quant_map": torch.linspace(-1, 1, 16)}, tmp_path / "c")
