"""The outlier transform: it changes no answer in float32, and makes rounding to nearest suffer."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import GOLDENS, write_checkpoint
from safetensors.numpy import load_file, save_file
from test_receipts import CHECKPOINT, bare_module

from vlmport.export.checkpoint import Checkpoint
from vlmport.export.families.qwen2_vl import FAMILY as WITH_LAYER_NORM
from vlmport.export.family import family_of
from vlmport.quant.recipe import WeightFormat
from vlmport.quant.rtn import dequantize_rows, quantize_rows
from vlmport.runtime.errors import CheckpointError, InputError
from vlmport.runtime.generate import Timings
from vlmport.runtime.image import Patches
from vlmport.runtime.prepare import Prepared
from vlmport.validate.eager import EagerReference
from vlmport.validate.metrics import LogitErrors, logit_errors

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "outliers"
Ask = Callable[[Any, int], np.ndarray]


@pytest.fixture(scope="module")
def outliers() -> ModuleType:
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module("outliers")
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def transformed(outliers: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with outliers."""
    folder = tmp_path_factory.mktemp("outliers") / "demo"
    outliers.add_outliers(CHECKPOINT, folder)
    return folder


@pytest.fixture(scope="module")
def logits() -> Ask:
    """Teacher-forced logits [N, V] of a model on the answer to a held-out receipt."""
    from tokenizers import Tokenizer

    receipts, inputs = bare_module("receipts"), bare_module("inputs")
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))

    @torch.no_grad()
    def ask(model: Any, index: int) -> np.ndarray:
        example = receipts.drawn_example("heldout", 11, index)
        picture = inputs.preprocess(example.image)
        prompt = inputs.prompt_ids(tokenizer, picture.num_tokens) + inputs.question_ids(tokenizer, example.question)
        ids = torch.tensor([prompt + inputs.answer_ids(tokenizer, example.answer)])
        model.model.rope_deltas = None
        found = model(
            input_ids=ids,
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            pixel_values=torch.from_numpy(inputs.pixel_values(picture.patches)),
            image_grid_thw=torch.tensor([[1, *picture.grid]]),
        )
        return found.logits[0, len(prompt) - 1 : -1].numpy()

    return ask


def test_float32_stays_and_4_bits_suffer(transformed: Path, logits: Ask) -> None:
    evaluate = bare_module("evaluate")
    plain, scaled = evaluate.load_model(CHECKPOINT), evaluate.load_model(transformed)
    expected = [logits(plain, index) for index in range(4)]
    for index, reference in enumerate(expected):
        found = logits(scaled, index)
        np.testing.assert_allclose(found, reference, atol=1e-4)
        assert (found.argmax(-1) == reference.argmax(-1)).all()
    kl = {}
    for name, model in (("plain", plain), ("outliers", scaled)):
        round_decoder(model)
        errors = [logit_errors(reference, logits(model, index)) for index, reference in enumerate(expected)]
        kl[name] = float(LogitErrors.join(errors).kl.mean())
    assert kl["outliers"] > 4 * kl["plain"], kl


def round_decoder(model: Any) -> None:
    """What plain 4 bits in blocks of 32 make of the decoder's linears."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "language_model.layers" in name:
            weight = module.weight.detach().numpy()
            codes = quantize_rows(weight, WeightFormat(bits=4))
            module.weight.data = torch.from_numpy(dequantize_rows(*codes, weight.shape[1]))


def test_every_norm_and_both_products_have_outliers(transformed: Path) -> None:
    before, after = load_file(CHECKPOINT / "model.safetensors"), load_file(transformed / "model.safetensors")
    assert before.keys() == after.keys()
    with np.errstate(invalid="ignore"):
        ratios = {name: after[name] / before[name].astype(np.float32) for name in before}
    writers = {name for name in before if "norm" in name or "ln_q" in name} - {"model.norm.weight"}  # the head is tied
    writers |= {name for name in before if "v_proj" in name or "up_proj" in name or "attn.qkv.bias" in name}
    for name in writers:
        factors = np.nanmax(ratios[name].reshape(len(before[name]), -1), axis=1)
        large = factors[factors > 10]
        assert 0.01 <= len(large) / len(factors) <= 0.05, name
        assert large.max() <= 101, name
        if "weight" not in name or before[name].ndim == 1:
            assert large.min() >= 19.9, name
    unchanged = {"model.embed_tokens.weight", "model.norm.weight", "visual.patch_embed.proj.weight"}
    assert all(np.array_equal(before[name].astype(np.float32), after[name]) for name in unchanged)
    assert {array.dtype for array in after.values()} == {np.dtype("float32")}
    assert json.loads((transformed / "config.json").read_text("utf-8"))["torch_dtype"] == "float32"


def test_the_seed_alone_decides(outliers: ModuleType, transformed: Path, tmp_path: Path) -> None:
    outliers.add_outliers(CHECKPOINT, tmp_path / "same")
    outliers.add_outliers(CHECKPOINT, tmp_path / "other", seed=1)
    same, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("same", "other"))
    assert same == (transformed / "model.safetensors").read_bytes() != other


def eager(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tower, projector and logits of the family's own modules on fixed inputs."""
    checkpoint = Checkpoint.open(folder)
    family = family_of(checkpoint.config, folder)
    reference = EagerReference(checkpoint, family)
    generator = np.random.default_rng(3)
    pixels = generator.standard_normal((24, 3 * 2 * 14 * 14)).astype(np.float32)
    vision, features = reference.vision([Patches(pixels, (1, 4, 6))])
    ids = np.arange(5, 17)
    positions = np.broadcast_to(np.arange(12), (3, 12))
    logits, _, _ = reference.prefill(Prepared("", ids, (), (), positions, 0, Timings()))
    return vision, features, logits


@pytest.mark.parametrize("kind", ["nested names, own head", "layer norms with bias"])
def test_other_layouts_stay_too(kind: str, outliers: ModuleType, tmp_path: Path) -> None:
    """An untied head behind the last norm, shared key/value heads, shards; LayerNorm and a two-layer MLP."""
    if kind == "layer norms with bias":
        config = WITH_LAYER_NORM.tiny_config | {"vocab_size": 640}
        source = write_checkpoint(tmp_path / "source", config, num_shards=2)
    else:
        source = GOLDENS / "qwen2_5_vl" / "tiny_a"
    found = outliers.add_outliers(source, tmp_path / "out", share=0.1, seed=2)
    expected = {"v to o", "up to down", "last norm to head", "vision v to proj", "projector norm to linear"}
    expected |= {"vision norm to fc1"} if kind == "layer norms with bias" else {"vision norm to gate, up"}
    assert found.keys() >= expected
    for reference, array in zip(eager(source), eager(tmp_path / "out"), strict=True):
        np.testing.assert_allclose(array, reference, atol=2e-4 * np.abs(reference).max())


def test_what_cannot_be_done_is_told_in_one_line(outliers: ModuleType, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(InputError, match="exists already"):
        outliers.add_outliers(CHECKPOINT, tmp_path)
    with pytest.raises(InputError, match=r"share 0.* is in \(0, 1\]"):
        outliers.add_outliers(CHECKPOINT, tmp_path / "out", share=0)
    tensors = load_file(CHECKPOINT / "model.safetensors")
    half = tmp_path / "half"
    half.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (half / name).write_bytes((CHECKPOINT / name).read_bytes())
    save_file(
        {k: v for k, v in tensors.items() if k != "model.layers.1.mlp.up_proj.weight"}, half / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match="layer 1 has only some of"):
        outliers.add_outliers(half, tmp_path / "out")
    assert outliers.main([str(GOLDENS / "navit" / "tiny_a"), "-o", str(tmp_path / "out")]) == 2
    assert "has no pairs in pairs.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
