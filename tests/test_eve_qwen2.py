"""EVEv2: tokens by modality, against the dense formula of the reference; images of any size; prompts that are cut."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmport.export.checkpoint import Checkpoint
from vlmport.export.families.eve_qwen2 import FAMILY
from vlmport.export.family import roles_of
from vlmport.export.layers.rope import apply_rotary, multi_axis_angles
from vlmport.export.layers.routed import RoutedDecoder, RoutedLayer, RoutedParts
from vlmport.export.lower import lower
from vlmport.export.trace import trace
from vlmport.runtime.area import area_size
from vlmport.runtime.errors import CheckpointError, InputError
from vlmport.runtime.manifest import VisionSpec
from vlmport.runtime.model import Model
from vlmport.runtime.routing import routing_inputs
from vlmport.runtime.vision_inputs import image_rows, num_rows
from vlmport.validate.golden import load_golden, request_messages
from vlmport.validate.reference import load_reference

GOLDENS = Path(__file__).parent / "goldens" / "eve_v2"
SPEC = VisionSpec(inputs=("image_rows",), merge_size=2, window_blocks=0, first_rows=1, row_ends=1)
PARTS = [RoutedParts(*map(bool, (n & 1, n & 2, n & 4))) for n in range(1, 8)]


@pytest.fixture(scope="module")
def package(package_of: Any) -> Path:
    return package_of(GOLDENS / "tiny_a")


@pytest.fixture(scope="module")
def model(package: Path) -> Iterator[Model]:
    with Model.load(package, "fp32") as loaded:
        yield loaded


def tiny(parts: RoutedParts) -> RoutedDecoder:
    said = "-".join(name for name in ("norms", "attention", "mlp") if getattr(parts, name))
    words = said.replace("norms", "layernorm").replace("attention", "self_attn")
    role = FAMILY.roles({**FAMILY.tiny_config, "moe_part": words})["decoder"]
    module = role.build().eval()
    assert isinstance(module, RoutedDecoder)
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + values / 8 if parameter.ndim == 1 else values * parameter.shape[1] ** -0.5
    return module


def dense(module: RoutedDecoder, x_SD: torch.Tensor, visual_S: torch.Tensor) -> torch.Tensor:
    """Logits [S, V] by upstream's formula: both sets of weights for all tokens, times the mask."""
    mask = visual_S[:, None].to(x_SD.dtype)
    config = module.config

    def both(owner: torch.nn.Module, name: str, x: torch.Tensor) -> torch.Tensor:
        text = owner.get_submodule(name)
        visual = getattr(owner, f"visual_{name}", None)
        return text(x) if visual is None else text(x) * (1 - mask) + visual(x) * mask

    places = torch.arange(len(x_SD))[None, None]
    angles = multi_axis_angles(places, config.inverse_frequencies, config.rope_sections)
    for layer in module.layers:
        assert isinstance(layer, RoutedLayer)
        attention = layer.self_attn
        normal = both(layer, "input_layernorm", x_SD)
        q, k, v = (both(attention, f"{name}_proj", normal)[None] for name in "qkv")
        q = apply_rotary(q, angles.cos(), angles.sin(), config.num_heads)
        k = apply_rotary(k, angles.cos(), angles.sin(), config.num_kv_heads)
        heads = [x.unflatten(-1, (-1, config.head_dim)).transpose(1, 2) for x in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        x_SD = x_SD + both(attention, "o_proj", out.transpose(1, 2).flatten(-2)[0])
        x_SD = x_SD + both(layer, "mlp", both(layer, "post_attention_layernorm", x_SD))
    return module.lm_head(module.norm(x_SD))


def inputs(module: RoutedDecoder, embeds_SD: np.ndarray, visual_S: np.ndarray) -> dict[str, np.ndarray]:
    """Inputs of a prefill into an empty cache, in the order of the graph."""
    length, config = len(embeds_SD), module.config
    empty = np.zeros((1, config.num_kv_heads, 0, config.head_dim), np.float32)
    names = [f"past_key_values.{n}.{kind}" for n in range(config.num_layers) for kind in ("key", "value")]
    return {
        "inputs_embeds": embeds_SD[None],
        "attention_mask": np.ones((1, length), np.int64),
        "position_ids": np.arange(length)[None],
        "num_logits_to_keep": np.zeros(1, np.int64),
        **routing_inputs(visual_S),
        **dict.fromkeys(names, empty),
    }


def eager(module: RoutedDecoder, embeds_SD: np.ndarray, visual_S: np.ndarray) -> torch.Tensor:
    *fed, _, _, _, _ = [torch.from_numpy(array) for array in inputs(module, embeds_SD, visual_S).values()]
    past = [torch.zeros(1, module.config.num_kv_heads, 0, module.config.head_dim)] * 4
    return module(*fed, past)[0][0]


# Routing


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_rows_apart_and_together_again(visual: list[bool]) -> None:
    mask = np.array(visual)
    found = routing_inputs(mask)
    assert not mask[found["text_rows"]].any()
    assert mask[found["visual_rows"]].all()
    together = np.concatenate([found["text_rows"], found["visual_rows"]])[found["row_places"][0]]
    np.testing.assert_array_equal(together, np.arange(len(mask)))


@pytest.mark.parametrize("parts", PARTS, ids=str)
@settings(max_examples=5)
@given(visual=st.lists(st.booleans(), min_size=2, max_size=24))
@torch.inference_mode()
def test_modules_compute_the_dense_formula_whatever_exists_twice(parts: RoutedParts, visual: list[bool]) -> None:
    module, mask = tiny(parts), np.array(visual)
    embeds = np.random.default_rng(len(visual)).standard_normal((len(mask), 64), dtype=np.float32)
    expected = dense(module, torch.from_numpy(embeds), torch.from_numpy(mask))
    torch.testing.assert_close(eager(module, embeds, mask), expected, atol=2e-5, rtol=1e-4)


@settings(max_examples=20)
@given(
    visual=st.lists(st.booleans(), min_size=1, max_size=30),
    chunk=st.sampled_from([1, 3, 8]),
    steps=st.integers(0, 3),
)
def test_any_interleaving_in_any_chunks(package: Path, visual: list[bool], chunk: int, steps: int) -> None:
    """The package, chunk boundaries anywhere, then text tokens one by one: the same as all of it at once."""
    mask = np.append(np.array(visual), np.zeros(steps, bool))
    embeds = np.random.default_rng(chunk).standard_normal((len(mask), 64), dtype=np.float32)
    module, whole = decoder_of(GOLDENS / "tiny_a"), len(visual)
    with torch.inference_mode():
        expected = dense(module, torch.from_numpy(embeds), torch.from_numpy(mask)).numpy()
    if chunk not in CACHED:
        CACHED[chunk] = Model.load(package, "fp32", prefill_chunk=chunk, num_threads=1)
    decoder = CACHED[chunk].decoder
    cache = decoder.new_cache(64)
    rows = decoder.prefill(embeds[:whole], np.arange(whole), cache, visual_S=mask[:whole], all_logits=True)
    stepped = [decoder.step(embeds[place], place, cache) for place in range(whole, len(mask))]
    np.testing.assert_allclose(np.vstack([rows, *stepped]), expected, atol=1e-4)


CACHED: dict[Any, Any] = {}


def decoder_of(folder: Path) -> RoutedDecoder:
    """The decoder of a checkpoint in PyTorch, once."""
    if folder not in CACHED:
        reference: Any = load_reference(folder)
        CACHED[folder] = reference._modules["decoder"]
    return CACHED[folder]


def test_text_alone_reads_no_weight_of_visuals() -> None:
    """They are NaN here, and the graph answers as if they were not."""
    role = FAMILY.roles(FAMILY.tiny_config)["decoder"]
    module = tiny(RoutedParts(norms=True, attention=True, mlp=True))
    embeds = np.random.default_rng(0).standard_normal((5, 64), dtype=np.float32)
    with torch.inference_mode():
        expected = eager(module, embeds, np.zeros(5, bool)).numpy()
    graph = trace(role, "float32")
    lower(graph, "cpu")
    state = module.state_dict()
    for name, value in graph.graph.initializers.items():
        if value.const_value is None:
            array = np.full_like(state[name].numpy(), np.nan) if "visual_" in name else state[name].numpy()
            value.const_value = ir.tensor(array, name=name)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(
        ir.serde.serialize_model(graph).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    fed = inputs(module, embeds, np.zeros(5, bool))
    np.testing.assert_allclose(session.run(["logits"], fed)[0][0], expected, atol=2e-5)
    fed = inputs(module, embeds, np.eye(1, 5, 4, dtype=bool)[0])
    assert np.isnan(session.run(["logits"], fed)[0][0][4]).all(), "and one visual token would tell"


@pytest.mark.parametrize("variant", ["int8", "int4"])
def test_quantized_weights_take_chunks_of_one_modality(package: Path, variant: str) -> None:
    embeds = np.random.default_rng(1).standard_normal((12, 64), dtype=np.float32)
    mask = np.repeat([False, True, False], 4)
    rows = []
    for chunk in (4, 12):
        with Model.load(package, variant, prefill_chunk=chunk) as loaded:
            cache = loaded.new_cache(16)
            rows.append(loaded.prefill(embeds, np.arange(12), cache, visual_S=mask, all_logits=True))
    np.testing.assert_allclose(*rows, atol=0.05)
    assert np.isfinite(rows[0]).all()


# Images


@pytest.mark.parametrize("row", json.loads((GOLDENS / "tables" / "anyres_resize.json").read_text())["rows"], ids=str)
def test_sizes_as_upstream_has_them(row: dict[str, Any]) -> None:
    width, height = row["size_wh"]
    size = area_size(height, width, 32, row["max_size"] ** 2)
    assert [size[1], size[0]] == row["resized_wh"]
    grid = (1, size[0] // 16, size[1] // 16)
    assert [grid[1] // 2, grid[2] // 2] == row["grid_hw"]
    assert num_rows(SPEC, grid) == row["visual_tokens"] == len(image_rows(SPEC, [grid]))


@given(st.lists(st.tuples(st.just(1), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3))
def test_rows_of_several_images(grids: list[tuple[int, int, int]]) -> None:
    expected: list[int] = []
    block = 2
    for _, rows, columns in grids:
        expected.append(0)
        for _ in range(rows):
            expected += [*range(block, block + columns), 1]
            block += columns
    doubled = [(t, 2 * h, 2 * w) for t, h, w in grids]
    assert image_rows(SPEC, doubled).tolist() == expected


def test_options_of_an_image(model: Model) -> None:
    def ask(**options: Any) -> int:
        image = {"type": "image", "image": Image.new("RGB", (90, 40)), **options}
        return model.prepare([{"role": "user", "content": [image]}]).runs[0].length

    assert ask(max_pixels=64**2) < ask()
    with pytest.raises(InputError, match="min_pixels is no option"):
        ask(min_pixels=64**2)
    with pytest.raises(InputError, match="max_pixels: is 0"):
        ask(max_pixels=0)
    with pytest.raises(InputError, match="takes no video"):
        model.prepare([{"role": "user", "content": [{"type": "video", "video": [Image.new("RGB", (64, 64))]}]}])


# Prompts


def test_conversation_of_upstream(model: Model) -> None:
    def text(*messages: tuple[str, str]) -> str:
        return model.prepare([{"role": role, "content": said} for role, said in messages]).text

    assert text(("system", "Be brief."), ("user", "Hi")) == "Be brief. USER: Hi ASSISTANT:"
    turns = text(("user", "a"), ("assistant", "b"), ("user", "c"))
    assert turns.endswith("questions. USER: a ASSISTANT: b<|im_end|>USER: c ASSISTANT:")
    with pytest.raises(InputError, match="no tool turn"):
        text(("user", "a"), ("tool", "b"))


def test_a_user_who_writes_a_placeholder_shows_nothing(model: Model) -> None:
    prepared = model.prepare([{"role": "user", "content": "What does <image> mean?"}])
    assert not prepared.runs
    assert (prepared.input_ids >= 0).all()
    assert "<image>" in model.builder.tokenizer.decode(prepared.input_ids.tolist())


def test_penalties_count_id_0_for_an_image(model: Model) -> None:
    golden = load_golden(GOLDENS / "tiny_a")
    prepared = model.prepare(request_messages(golden, golden.cases["single_wide"]) or [])
    assert (prepared.input_ids == -200).sum() == prepared.runs[0].length
    np.testing.assert_array_equal(prepared.table_ids[prepared.visual_tokens], 0)


@pytest.mark.parametrize("limit", [100, 60])
def test_long_prompts_with_images_are_cut(package: Path, tmp_path: Path, model: Model, limit: int) -> None:
    """Inside of the question, and inside of the image; what is left is what it was, for nothing looks ahead."""
    shutil.copytree(package, tmp_path / "package")
    file = tmp_path / "package" / "vlmport.json"
    said = json.loads(file.read_text())
    assert said["prompt"]["max_tokens"] == 5000
    said["prompt"]["max_tokens"] = limit
    file.write_text(json.dumps(said))
    golden = load_golden(GOLDENS / "tiny_a")
    messages = request_messages(golden, golden.cases["single_wide"]) or []
    with Model.load(tmp_path / "package", "fp32") as cut:
        whole, short = model.prepare(messages), cut.prepare(messages)
        assert short.num_seen == limit < whole.num_seen == len(short.input_ids)
        rows = []
        for each, prepared in ((model, whole), (cut, short)):
            seen = each.features(prepared)
            assert seen is not None
            embeds, cache = each.embed(prepared, seen.features), each.new_cache(160)
            rows.append(each.prefill_prepared(prepared, embeds, cache, all_logits=True))
        np.testing.assert_allclose(rows[1], rows[0][:limit], atol=1e-4)
        answer = cut.generate(messages, max_new_tokens=3, temperature=0, ignore_eos=True)
        assert answer.token_ids[0] == rows[1][-1].argmax()
        assert cut.prepare([{"role": "user", "content": "long " * limit}]).visible is None, "text alone is not cut"


# Checkpoints


def test_the_reference_is_tied_to_upstream(model: Model) -> None:
    golden = load_golden(GOLDENS / "tiny_a")
    reference = load_reference(GOLDENS / "tiny_a")
    for name in ("single_wide", "text_only"):
        prepared = model.prepare(request_messages(golden, golden.cases[name]) or [])
        logits = reference.prefill(prepared)[0][-1]
        np.testing.assert_allclose(logits, golden.tensors[f"{name}/prefill_logits_last"], atol=1e-4)


def documents() -> dict[str, Any]:
    return dict(Checkpoint.open(GOLDENS / "tiny_a").documents)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"do_resize": True}, "do_resize is true"),
        ({"do_center_crop": None}, "do_center_crop is true"),
        ({"do_normalize": False}, "do_normalize is false"),
        ({"max_size": None}, "max_size is missing"),
        ({"patch_stride": 0}, "patch_stride is 0"),
        ({"dense_stride": "2"}, "dense_stride is '2'"),
    ],
)
def test_processors_that_would_change_answers(change: dict[str, Any], told: str) -> None:
    files = {name: file for name, file in documents().items() if not name.endswith("preprocessor_config.json")}
    said = {**documents()["preprocessor_config.json"], **change}
    config = documents()["config.json"]
    with pytest.raises(CheckpointError, match=f"preprocessor_config.json: {told}"):
        FAMILY.manifest(config, {**files, "preprocessor_config.json": said})
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: missing"):
        roles_of(FAMILY, config, files)


def test_the_vocabulary_is_the_tokenizers() -> None:
    files = documents()
    config = {**files["config.json"], "vocab_size": 400}
    roles = roles_of(FAMILY, config, files)
    assert roles["decoder"].outputs[0].shape[-1] == 333
    wanted = roles["embed_tokens"].tensor("embed_tokens.weight", (333, 64))
    assert wanted.shape == (400, 64)
    assert wanted.rows is not None
    assert (wanted.rows.start, wanted.rows.size) == (0, 333)
    with pytest.raises(CheckpointError, match=r"has 333 tokens, config\.json: vocab_size is 300"):
        roles_of(FAMILY, {**config, "vocab_size": 300}, files)


def test_the_folder_that_is_named_goes_first() -> None:
    files = documents()
    name = f"{files['config.json']['mm_vision_tower']}/preprocessor_config.json"
    files[name] = {**files["preprocessor_config.json"], "max_size": 64}
    found = FAMILY.manifest(files["config.json"], files)
    assert found.image is not None
    assert found.image.max_pixels == 64**2


def test_one_set_of_weights_is_a_plain_decoder() -> None:
    for change in ({"add_moe": False}, {"moe_part": ""}):
        decoder = FAMILY.roles({**FAMILY.tiny_config, **change})["decoder"]
        assert "visual_rows" not in {port.name for port in decoder.inputs}
    parts = replace(PARTS[0], norms=False, attention=True)
    assert "visual_q_proj" in dict(tiny(parts).layers[0].self_attn.named_children())
