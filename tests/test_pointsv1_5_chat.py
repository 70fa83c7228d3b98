"""POINTS1.5: the fused layout in every variant against upstream's formulas, what is refused, the whole in low bits."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import config_of, write_checkpoint
from safetensors.torch import load_file
from torch.nn import functional

from vlmport.export.build import export_checkpoint
from vlmport.export.checkpoint import Checkpoint
from vlmport.export.documents import generation_defaults
from vlmport.export.families.pointsv1_5_chat import FAMILY
from vlmport.export.family import families, load_family
from vlmport.quant.recipe import load_recipe
from vlmport.runtime.errors import CheckpointError
from vlmport.runtime.generate import GenerationOptions
from vlmport.runtime.model import Model
from vlmport.runtime.package import Package
from vlmport.runtime.sample import SamplingParams
from vlmport.validate import eager
from vlmport.validate.eager import EagerReference, eager_modules
from vlmport.validate.gates import default_gates
from vlmport.validate.golden import load_golden
from vlmport.validate.run_golden import validate_golden

GOLDENS = Path(__file__).parent / "goldens" / "points1_5"
FUSED, PLAIN = GOLDENS / "tiny_a_custom_llama", GOLDENS / "tiny_b_qwen2"
TINY_FUSED: dict[str, Any] = {
    "model_type": "custom_llama",
    "hidden_size": 64,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "ffn_hidden_size": 80,
    "hidden_act": "swiglu",
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "norm_type": "rms_norm",
    "rotary_emb_base": 1000000.0,
    "out_proj_bias": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},
    "as many key and value heads": {"num_kv_heads": 4},
    "one key and value head": {"num_kv_heads": 1},
    "defaults of the class": {
        "out_proj_bias": None,
        "mlp_fc1_bias": None,
        "mlp_fc2_bias": None,
        "rotary_emb_base": None,
    },
    "no bias": {"qkv_proj_bias": False, "num_kv_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "compressed positions": {"rotary_compress": 0.25},
    "the older field for the norm": {"norm_type": None, "rms_norm": True, "layernorm_epsilon": 1e-3},
}


def fused_config(**changes: Any) -> dict[str, Any]:
    llm = {name: value for name, value in {**TINY_FUSED, **changes}.items() if value is not None}
    return {**copy.deepcopy(FAMILY.tiny_config), "llm_config": llm}


# The decoder of the fused layout


def upstream_logits(tensors: dict[str, torch.Tensor], llm: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
    """CustomLlamaForCausalLM of the checkpoints' own code, from its tensors as stored: x [S, D] -> logits [S, V]."""
    num_heads, num_kv = llm["num_attention_heads"], llm["num_kv_heads"]
    length, head = len(x), llm["hidden_size"] // num_heads

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + llm.get("layernorm_epsilon", 1e-5))
        return x * scale * tensors[f"{name}.weight"]

    base, compress = llm.get("rotary_emb_base", 10000), llm.get("rotary_compress", 1.0)
    inverse = 1.0 / (base ** (torch.arange(0, head, 2).float() / head))
    angles = torch.outer(torch.arange(length).float() * compress, inverse)
    cos, sin = (torch.cat((f(angles), f(angles)), -1)[:, None] for f in (torch.cos, torch.sin))

    def rotary(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    for layer in range(llm["num_layers"]):
        at = f"llm.lm.layers.{layer}"
        y = norm(f"{at}.input_layernorm", x)
        if num_kv < num_heads:
            query = linear(f"{at}.attention.query_dense", y).view(length, num_heads, head)
            key, value = linear(f"{at}.attention.key_value_dense", y).view(length, num_kv, 2 * head).chunk(2, -1)
        else:
            fused = linear(f"{at}.attention.query_key_value", y).view(length, num_heads, 3 * head)
            query, key, value = fused.chunk(3, -1)
        query, key = rotary(query), rotary(key)
        key, value = (part.repeat_interleave(num_heads // num_kv, 1) for part in (key, value))
        scores = torch.einsum("ihd,jhd->hij", query, key) / math.sqrt(head)
        scores = scores + torch.full((length, length), -torch.inf).triu(1)
        out = torch.einsum("hij,jhd->ihd", scores.softmax(-1), value).reshape(length, -1)
        x = x + linear(f"{at}.attention.dense", out)
        first, second = linear(f"{at}.mlp.dense_h_to_4h", norm(f"{at}.post_attention_layernorm", x)).chunk(2, -1)
        x = x + linear(f"{at}.mlp.dense_4h_to_h", first * functional.silu(second))
    head_name = "llm.lm.embed_in" if llm.get("tie_word_embeddings") else "llm.embed_out"
    return linear(head_name, norm("llm.lm.final_layer_norm", x))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_the_fused_decoder_computes_what_upstreams_code_does(changes: dict[str, Any], tmp_path: Path) -> None:
    config = fused_config(**changes)
    folder = write_checkpoint(tmp_path / "checkpoint", config)
    modules = eager_modules(Checkpoint.open(folder), FAMILY)
    tensors = load_file(folder / "model.safetensors")
    assert any("query_key_value" in name for name in tensors) == (config["llm_config"]["num_kv_heads"] == 4)
    ids = torch.arange(3, 20)
    embeds = modules["embed_tokens"](ids[None])
    torch.testing.assert_close(embeds[0], tensors["llm.lm.embed_in.weight"][ids])
    past = [torch.zeros(1, config["llm_config"]["num_kv_heads"], 0, 16)] * 4
    with torch.inference_mode():
        found = modules["decoder"](embeds, torch.ones(1, 17).long(), torch.arange(17)[None], torch.tensor([0]), past)[0]
        expected = upstream_logits(tensors, config["llm_config"], embeds[0])
    assert expected.std() > 0.1
    torch.testing.assert_close(found[0], expected, atol=2e-5, rtol=1e-4)


def test_weights_of_modules_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "checkpoint", fused_config()))
    whole = eager_modules(checkpoint, FAMILY)
    monkeypatch.setattr(eager, "_CHUNK_BYTES", 700)  # two rows of most
    for role, module in eager_modules(checkpoint, FAMILY).items():
        torch.testing.assert_close(
            dict(module.named_parameters()), dict(whole[role].named_parameters()), atol=0, rtol=0
        )


def test_a_package_of_fused_queries_keys_and_values_with_every_bias(tmp_path: Path) -> None:
    every = {"num_kv_heads": 4, "out_proj_bias": True, "mlp_fc1_bias": True, "mlp_fc2_bias": True}
    config = fused_config(**every, tie_word_embeddings=True)
    folder = write_checkpoint(tmp_path / "checkpoint", config)
    export_checkpoint(folder, tmp_path / "package", [load_recipe("fp32"), load_recipe("int8")])
    tensors = load_file(folder / "model.safetensors")
    ids = np.arange(3, 30)
    expected = upstream_logits(tensors, config["llm_config"], tensors["llm.lm.embed_in.weight"][ids]).numpy()
    with Model.load(tmp_path / "package", prefill_chunk=10) as model:
        np.testing.assert_allclose(model.logits(ids), expected, atol=1e-4)
    with Model.load(tmp_path / "package", "int8") as model:
        logits = model.logits(ids)
    assert 1e-4 < np.abs(logits - expected).max() < 0.5


# Recognising and refusing


def test_a_config_without_model_type_is_known_by_its_class() -> None:
    bare = {name: value for name, value in config_of(FUSED).items() if name != "model_type"}
    for config in (bare, config_of(FUSED), config_of(PLAIN), fused_config()):
        assert [name for name in families() if load_family(name).matches(config)] == ["pointsv1_5_chat"]
    assert not FAMILY.matches({"architectures": ["Other"]})
    assert not FAMILY.matches({"architectures": None})
    assert not FAMILY.matches({**bare, "model_type": "points"})


def test_the_layout_is_known_by_its_fields_where_it_has_no_name() -> None:
    for config in (config_of(FUSED), config_of(PLAIN)):
        named = FAMILY.roles(config)["decoder"]
        del config["llm_config"]["model_type"]
        guessed = FAMILY.roles(config)["decoder"]
        assert guessed.inputs == named.inputs
        parameter = "layers.0.self_attn.k_proj.weight"
        assert guessed.tensor(parameter, (32, 64)) == named.tensor(parameter, (32, 64))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "llama"}, "llm_config.model_type is 'llama'; only custom_llama and qwen2"),
        ({"norm_type": "layer_norm"}, "llm_config.norm_type is 'layer_norm'"),
        ({"norm_type": None}, "llm_config.norm_type is 'layer_norm'"),
        ({"rms_norm": False}, "llm_config.norm_type is 'layer_norm'"),
        ({"hidden_act": "gelu"}, "llm_config.hidden_act is 'gelu'; only 'swiglu'"),
        ({"rotary_pct": 0.25}, "llm_config.rotary_pct is 0.25"),
        ({"sliding_window_size": 4096}, "llm_config.sliding_window_size is 4096"),
        ({"share_kv_num_layers": 2}, "llm_config.share_kv_num_layers is 2"),
        ({"num_attention_heads": 7}, "hidden_size 64 is no multiple of 7 heads"),
        ({"num_kv_heads": 3}, "4 attention heads cannot share 3"),
        ({"num_kv_heads": None}, "llm_config.num_kv_heads is missing"),
        ({"vocab_size": None}, "llm_config.vocab_size is missing"),
        ({"ffn_hidden_size": -3}, "llm_config.ffn_hidden_size is -3"),
        ({"layernorm_epsilon": "small"}, "llm_config.layernorm_epsilon is 'small'"),
        ({"num_layers": [2]}, "llm_config.num_layers"),
        ({"num_layers": None, "num_hidden_layers": "two"}, "llm_config.num_hidden_layers is 'two'"),
    ],
)
def test_what_the_fused_decoder_cannot_do_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: .*{told}") as caught:
        FAMILY.roles(fused_config(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["llm_config", "vision_config"])
@pytest.mark.parametrize("value", [None, [], "x", 3])
def test_a_missing_or_mistyped_part_is_named(part: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: {part}"):
        FAMILY.roles({**fused_config(), part: value})


def test_a_tower_needs_no_width_of_a_merger_that_is_not_used() -> None:
    config = config_of(PLAIN)
    projector = FAMILY.roles(config)["projector"]
    del config["vision_config"]["hidden_size"]
    assert FAMILY.roles(config)["projector"].outputs == projector.outputs


def test_heads_and_mergers_that_are_not_used_may_be_there() -> None:
    tied, untied = fused_config(tie_word_embeddings=True), fused_config()
    assert FAMILY.unused(tied, "llm.embed_out.weight")
    assert not FAMILY.unused(untied, "llm.embed_out.weight")
    assert FAMILY.unused(untied, "vision_encoder.merger.mlp.0.weight")
    assert FAMILY.unused(untied, "llm.lm.layers.0.attention.rotary_emb.inv_freq")
    assert not FAMILY.unused(untied, "vision_projector.mlp.0.weight")


def test_answers_end_with_the_turn_whatever_the_files_say() -> None:
    for folder in (FUSED, PLAIN):
        documents = {
            name: json.loads((folder / name).read_text()) for name in ("tokenizer.json", "preprocessor_config.json")
        }
        tokens = json.loads((folder / "expected.json").read_text())["special_token_ids"]
        documents["generation_config.json"] = {"eos_token_id": [2, 3], "do_sample": True}
        found = FAMILY.manifest(config_of(folder), documents).generation
        assert found is not None
        assert found.eos_token_ids == (tokens["<|im_end|>"],)
        assert not found.do_sample
        assert not found.penalty_sees_prompt
    assert generation_defaults({}, 7).penalty_sees_prompt
    documents["tokenizer.json"] = {"added_tokens": [{"content": "<s>", "id": 1}, "x"]}
    with pytest.raises(CheckpointError, match=r"tokenizer.json: .*<\|im_end\|>"):
        FAMILY.manifest(config_of(PLAIN), documents)


# The whole


def test_the_penalty_counts_generated_tokens_alone(package_of: Callable[[Path], Path]) -> None:
    case = load_golden(PLAIN).cases["one_shot"]
    reference = EagerReference(Checkpoint.open(PLAIN), FAMILY)
    with Model.load(package_of(PLAIN)) as model:
        ids = np.array([token for token in case.input_ids if token != model.builder.image_token_id])
        prepared = model.prepare_ids(ids)
        options = GenerationOptions(12, SamplingParams(temperature=0.0, repetition_penalty=1.6), ignore_eos=True)
        found = model.generate_prepared(prepared, options).token_ids
        logits, wanted = reference.prefill(prepared)[0][-1], []
        for _ in range(12):
            scores = logits.copy()
            seen = list(set(wanted))
            scores[seen] = np.where(scores[seen] < 0, scores[seen] * 1.6, scores[seen] / 1.6)
            wanted.append(int(scores.argmax()))
            logits = reference.step(wanted[-1])
    assert list(found) == wanted


@pytest.mark.parametrize("variant", ["int8", "int4"])
@pytest.mark.parametrize("folder", [FUSED, PLAIN], ids=lambda folder: folder.name)
def test_quantized_variants_tell_their_true_numbers(
    variant: str, folder: Path, package_of: Callable[[Path], Path]
) -> None:
    report = validate_golden(
        Package.open(package_of(folder)), [load_golden(folder)], [variant], default_gates(), lambda *_: None
    )
    rows = {row.stage: row for row in report.variants[0].rows}
    assert rows["input_ids"].outcome == "PASS"
    assert 1e-4 < rows["step_logits"].values["max_abs"] < 10
    assert rows["step_logits"].values["kl_mean"] < (0.01 if variant == "int8" else 0.2)
