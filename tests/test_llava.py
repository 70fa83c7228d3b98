"""LLaVA: both forms of a checkpoint, its tower, prompt and reference; what is not supported is told by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import config_of
from safetensors.numpy import load_file, save_file

from vlmport.export.checkpoint import Checkpoint
from vlmport.export.families.llava import FAMILY, normalise
from vlmport.runtime.errors import CheckpointError
from vlmport.runtime.model import Model
from vlmport.validate.eager import eager_modules
from vlmport.validate.golden import load_golden, request_messages
from vlmport.validate.reference import load_reference

GOLDENS = Path(__file__).parent / "goldens" / "llava"
HF, FULL, SIGLIP, FIRST = (
    GOLDENS / name for name in ("tiny_a_clip", "tiny_b_full", "tiny_c_siglip", "tiny_d_first_release")
)


def documents_of(folder: Path, **changes: Any) -> dict[str, Any]:
    documents = dict(Checkpoint.open(folder).documents)
    documents["preprocessor_config.json"] = {**documents.get("preprocessor_config.json", {}), **changes}
    return documents


@pytest.mark.parametrize("folder", [HF, FIRST], ids=lambda folder: folder.name)
def test_the_reference_computes_what_upstream_did(folder: Path, package_of: Any) -> None:
    golden, reference = load_golden(folder), load_reference(folder)
    with Model.load(package_of(folder)) as model:
        for case in golden.cases.values():
            prepared = model.prepare(request_messages(golden, case) or [])
            stages = {entry.stage: golden.tensors[entry.tensor] for entry in case.stages}
            if prepared.visuals:
                vision, rows = reference.vision(prepared.visuals)
                np.testing.assert_allclose(vision, stages["vision"], atol=2e-5)
                np.testing.assert_allclose(rows, stages["projector"], atol=2e-5)
            logits, _, _ = reference.prefill(prepared)
            np.testing.assert_allclose(logits[-1], stages["prefill_logits_last"], atol=3e-5)
            step = reference.step(case.generated_ids[0] if case.generated_ids else 0)
            np.testing.assert_allclose(step, stages["step_logits"][1], atol=3e-5)


@pytest.mark.parametrize("folder", [HF, FULL, SIGLIP, FIRST], ids=lambda folder: folder.name)
def test_the_reference_s_processor_gives_the_runtime_s_pixels(folder: Path, package_of: Any) -> None:
    from PIL import Image

    reference = load_reference(folder)
    images = [Image.open(file).convert("RGB") for file in sorted((folder / "inputs").glob("*.png"))]
    content = [{"type": "image", "image": image} for image in images]
    with Model.load(package_of(folder)) as model:
        prepared = model.prepare([{"role": "user", "content": content}])
    pixels, grids = reference.pixels(images) or (None, None)
    np.testing.assert_array_equal(pixels, np.concatenate([item.pixel_values for item in prepared.visuals]))
    np.testing.assert_array_equal(grids, [item.grid for item in prepared.visuals])


def test_a_missing_tower_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FIRST, tmp_path / "checkpoint"))
    tensors = load_file(folder / "model.safetensors")
    save_file({name: v for name, v in tensors.items() if "vision_tower" not in name}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="the vision tower tiny-clip is not in the checkpoint; copy") as caught:
        eager_modules(Checkpoint.open(folder), FAMILY)
    assert "\n" not in str(caught.value)
    assert "tensors do not fit" not in str(caught.value)
    first = next(name for name in tensors if "layers.0.mlp.fc1.weight" in name)
    save_file({name: v for name, v in tensors.items() if name != first}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="1 tensors do not fit: missing"):
        eager_modules(Checkpoint.open(folder), FAMILY)


@pytest.mark.parametrize(
    ("folder", "changes", "words"),
    [
        (HF, {"vision_feature_select_strategy": "mean"}, "vision_feature_select_strategy is 'mean'"),
        (HF, {"vision_feature_layer": -9}, "vision layer -9 is asked for, of a tower of 3 layers"),
        (HF, {"vision_feature_layer": []}, "list of vision layers is empty"),
        (HF, {"vision_feature_layer": [-2, "last"]}, "expected integers"),
        (HF, {"vision_feature_layer": "last"}, "vision_feature_layer is 'last'"),
        (HF, {"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
        (HF, {"vision_config__model_type": "pixtral"}, "vision_config.model_type is 'pixtral'"),
        (HF, {"text_config__model_type": "gemma"}, "text_config.model_type is 'gemma'"),
        (HF, {"text_config__rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        (HF, {"text_config__rope_parameters": None, "text_config__rope_scaling": {"type": "dynamic"}}, "'dynamic'"),
        (SIGLIP, {"vision_feature_select_strategy": "default"}, "SigLIP tower has not; set it to 'full'"),
        (FIRST, {"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        (FIRST, {"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'"),
        (FIRST, {"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        (FIRST, {"vision_config": None}, "mm_vision_tower is 'tiny-clip'; known towers are"),
    ],
)
def test_what_is_not_supported_is_told_by_name(folder: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        FAMILY.roles(config_of(folder, **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": {"shortest_edge": 48}}, "does not give what the vision tower takes, 56 x 56"),
        ({"crop_size": {"height": 48, "width": 48}}, "does not give what the vision tower takes"),
        ({"do_center_crop": False}, "without a center crop"),
        ({"do_normalize": False}, "do_normalize is false"),
        ({"resample": 9}, "resample is 9"),
        ({"size": "large"}, "size is 'large'"),
        ({"image_mean": [0.5]}, "expected 3 numbers"),
    ],
)
def test_a_processor_that_does_not_fit_the_tower_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        FAMILY.manifest(config_of(HF), documents_of(HF, **changes))


def test_strategies_come_from_the_files() -> None:
    def strategy(folder: Path, config: dict[str, Any] | None = None, **changes: Any) -> str:
        image = FAMILY.manifest(config or config_of(folder), documents_of(folder, **changes)).image
        assert image is not None
        return image.strategy

    assert strategy(HF) == "center_crop"
    assert strategy(HF, size=56, crop_size=56) == "center_crop"
    assert strategy(HF, do_pad=True) == "center_crop"  # CLIP's own class means something else by it
    assert strategy(FULL) == "pad_square"
    assert strategy(SIGLIP) == "stretch"
    assert strategy(FIRST, size=56, crop_size=56) == "pad_square"
    assert strategy(FIRST, config_of(FIRST, image_aspect_ratio=None), size=56, crop_size=56) == "center_crop"


def test_defaults_are_those_of_transformers() -> None:
    from transformers import LlamaConfig, MistralConfig, Qwen2Config

    from vlmport.export.families.llava import DECODERS

    for kind, of in (("llama", LlamaConfig), ("mistral", MistralConfig), ("qwen2", Qwen2Config)):
        upstream = of().to_dict()
        for name, value in DECODERS[kind].items():
            if name != "attention_bias" or kind == "llama":  # Qwen2 has no field for it
                assert upstream.get(name) == value, (kind, name)


def test_a_sliding_window_bounds_the_prompt_s_length() -> None:
    def longest(**changes: Any) -> int:
        config = config_of(HF, text_config__model_type="mistral", **changes)
        cache = FAMILY.manifest(config, documents_of(HF)).cache
        assert cache is not None
        return cache.max_length

    assert longest(text_config__max_position_embeddings=32768) == 4096  # Mistral's window where the file is silent
    assert longest(text_config__max_position_embeddings=32768, text_config__sliding_window=None) == 32768
    assert longest(text_config__max_position_embeddings=512) == 512


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (
            (
                "language_model.model.layers.0.mlp.up_proj.weight",
                "model.language_model.layers.0.mlp.up_proj.weight",
                "model.layers.0.mlp.up_proj.weight",
            ),
            "model.language_model.layers.0.mlp.up_proj.weight",
        ),
        (("language_model.lm_head.weight", "lm_head.weight"), "lm_head.weight"),
        (
            (
                "vision_tower.vision_model.pre_layrnorm.bias",
                "model.vision_tower.vision_model.pre_layrnorm.bias",
                "model.vision_tower.pre_layrnorm.bias",
                "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias",
            ),
            "model.vision_tower.pre_layrnorm.bias",
        ),
        (
            ("multi_modal_projector.linear_2.bias", "model.mm_projector.2.bias"),
            "model.multi_modal_projector.linear_2.bias",
        ),
    ],
)
def test_all_spellings_of_a_tensor_mean_one(names: tuple[str, ...], wanted: str) -> None:
    assert {normalise(name) for name in names} == {wanted}


@pytest.mark.parametrize("text", ["<image>", "<s>", "a </s> b"])
def test_control_tokens_of_a_user_stay_text(text: str, package_of: Any) -> None:
    for folder in (HF, FIRST):
        with Model.load(package_of(folder)) as model:
            prepared = model.prepare([{"role": "user", "content": [{"type": "text", "text": f"say {text}"}]}])
        assert not prepared.runs
        assert list(prepared.input_ids[:1]) == [1]
        assert (prepared.input_ids[1:] > 2).all()  # neither <s> nor </s> again, and no placeholder


def test_an_image_token_that_the_tokenizer_has_not_is_refused() -> None:
    with pytest.raises(CheckpointError, match="image_token_index is 7, which is no added token"):
        FAMILY.manifest(config_of(HF, image_token_index=7), documents_of(HF))


def test_a_tokenizer_that_ends_every_text_is_refused() -> None:
    documents = documents_of(HF)
    tokenizer = json.loads(json.dumps(documents["tokenizer.json"]))
    tokenizer["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    with pytest.raises(CheckpointError, match="puts '</s>' behind every text"):
        FAMILY.manifest(config_of(HF), {**documents, "tokenizer.json": tokenizer})
