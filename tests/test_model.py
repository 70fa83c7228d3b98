"""A package at work: golden answers, chunks that do not matter, roles that may be missing, requests refused."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import golden_cases
import numpy as np
import pytest
from golden_cases import Golden

from vlmport.runtime import (
    CapacityError,
    GenerationOptions,
    InputError,
    Model,
    PackageError,
    SamplingParams,
    load,
)

CASES = golden_cases.cases()
TEXT = [{"role": "user", "content": "Read the text on the sign."}]
MODEL_OPTIONS: dict[str, Any] = {"num_threads": 1}


@pytest.fixture(scope="module")
def packages(package_tiny_a: Path, package_tiny_b: Path) -> dict[str, Path]:
    return {"tiny_a": package_tiny_a, "tiny_b": package_tiny_b}


@pytest.fixture(scope="module")
def models(packages: dict[str, Path]) -> Iterator[dict[str, Model]]:
    opened = {name: load(path, "fp32", **MODEL_OPTIONS) for name, path in packages.items()}
    yield opened
    for model in opened.values():
        model.close()


@pytest.fixture(scope="module")
def model(models: dict[str, Model]) -> Model:
    return models["tiny_a"]


def options_of(generation: dict[str, Any]) -> GenerationOptions:
    assert generation["do_sample"] is False
    sampling = SamplingParams(repetition_penalty=generation["repetition_penalty"])
    return GenerationOptions(generation["max_new_tokens"], sampling, ignore_eos=generation["ignore_eos"])


def prepare(model: Model, golden: Golden) -> Any:
    return model.prepare(golden.request["messages"], golden.request["options"], folder=golden.folder)


@pytest.mark.parametrize("golden", CASES, ids=str)
def test_golden_answers(models: dict[str, Model], golden: Golden) -> None:
    model = models[golden.folder.name]
    prepared = prepare(model, golden)
    assert prepared.input_ids.tolist() == golden.case["input_ids"]
    generation = model.generate_prepared(prepared, options_of(golden.case["generation"]))
    assert list(generation.token_ids) == golden.case["generated_ids"]
    assert generation.finish_reason == "length"


@pytest.mark.parametrize(("name", "golden"), golden_cases.alternatives("repetition_penalty_"), ids=str)
def test_golden_answers_under_the_repetition_penalty(models: dict[str, Model], name: str, golden: Golden) -> None:
    model = models[golden.folder.name]
    assert golden.record["generation"]["repetition_penalty"] == float(name)
    generation = model.generate_prepared(prepare(model, golden), options_of(golden.record["generation"]))
    assert list(generation.token_ids) == golden.record["generated_ids"]


@pytest.mark.parametrize(("version", "golden"), golden_cases.alternatives("mrope_transformers_"), ids=str)
def test_golden_answers_by_another_rule_for_clips(packages: dict[str, Path], version: str, golden: Golden) -> None:
    rule = "transformers-" + ".".join(version.split(".")[:2])
    with load(packages[golden.folder.name], "fp32", video_rule=rule, **MODEL_OPTIONS) as model:
        generation = model.generate_prepared(prepare(model, golden), options_of(golden.record["generation"]))
    assert list(generation.token_ids) == golden.record["generated_ids"]


@pytest.mark.parametrize("golden", CASES, ids=str)
def test_stages_are_those_of_the_golden_cases(models: dict[str, Model], golden: Golden) -> None:
    model = models[golden.folder.name]
    prepared = prepare(model, golden)
    seen = model.features(prepared)
    assert (seen is None) == (not prepared.visuals)
    cache = model.new_cache(len(prepared.input_ids) + 16)
    logits = model.prefill(model.embed(prepared, seen.features if seen else None), prepared.position_ids, cache)
    steps = golden.tensor("step_logits")
    assert steps is not None
    rows = [logits[0]]
    rows += [model.step(token_id, cache, prepared.rope_delta) for token_id in golden.case["generated_ids"][:-1]]
    np.testing.assert_allclose(np.stack(rows), steps, atol=1e-4)
    keys = golden.tensor("past_key.0")
    if keys is not None:
        np.testing.assert_allclose(cache.keys(0)[:, : keys.shape[1]], keys, atol=1e-4)
    everything = golden.tensor("prefill_logits")
    if everything is not None:
        ours = model.logits(prepared.input_ids, prepared.images, prepared.videos)
        np.testing.assert_allclose(ours, everything, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_the_chunks_of_a_prefill_do_not_matter(packages: dict[str, Path], models: dict[str, Model], chunk: int) -> None:
    golden = next(case for case in CASES if case.tensor("prefill_logits") is not None and case.stages("pixel_values"))
    with load(packages[golden.folder.name], "fp32", prefill_chunk=chunk, **MODEL_OPTIONS) as model:
        prepared = prepare(model, golden)
        ours = model.logits(prepared.input_ids, prepared.images, prepared.videos)
    whole = models[golden.folder.name].logits(prepared.input_ids, prepared.images, prepared.videos)
    np.testing.assert_allclose(ours, whole, atol=2e-5)


def test_stepping_equals_one_long_prompt(models: dict[str, Model]) -> None:
    golden = next(case for case in CASES if case.stages("pixel_values", "image"))
    model = models[golden.folder.name]
    prepared = prepare(model, golden)
    special = golden_cases.read_json(golden.folder / "expected.json")["special_token_ids"].values()
    answer = [token_id for token_id in golden.case["generated_ids"] if token_id not in special]
    together = model.logits(np.array([*prepared.input_ids, *answer]), prepared.images, prepared.videos)
    cache = model.new_cache(len(together))
    seen = model.features(prepared)
    assert seen is not None
    rows = list(model.prefill(model.embed(prepared, seen.features), prepared.position_ids, cache))
    rows += [model.step(token_id, cache, prepared.rope_delta) for token_id in answer]
    np.testing.assert_allclose(np.stack(rows), together[len(prepared.input_ids) - 1 :], atol=2e-5)


def test_one_packed_vision_call_equals_one_a_visual(models: dict[str, Model]) -> None:
    golden = next(case for case in CASES if len(case.request["messages"][-1]["content"]) > 2)
    model = models[golden.folder.name]
    prepared = prepare(model, golden)
    packed = model.encode_vision(prepared.visuals)
    apart = [model.encode_vision([patches]) for patches in prepared.visuals]
    np.testing.assert_allclose(packed.vision, np.concatenate([one.vision for one in apart]), atol=2e-5)
    np.testing.assert_allclose(packed.features, np.concatenate([one.features for one in apart]), atol=2e-5)


def test_pieces_and_the_whole_agree_and_time_is_told(models: dict[str, Model]) -> None:
    golden = next(case for case in CASES if case.stages("pixel_values", "image"))
    model = models[golden.folder.name]
    messages = json.loads(json.dumps(golden.request["messages"]))
    for item in messages[-1]["content"]:
        if item["type"] == "image":
            item["image"] = str(golden.folder / item["image"])
    settings: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.9, "seed": 4, "ignore_eos": True}
    stream = model.stream(messages, **settings)
    pieces = list(stream)
    whole = model.generate(messages, **settings)
    assert "".join(pieces) == whole.text == stream.generation.text
    assert whole.token_ids == stream.generation.token_ids
    assert model.generate(messages, **(settings | {"seed": 5})).token_ids != whole.token_ids
    timings = whole.timings
    assert min(timings.decode_image, timings.preprocess, timings.vision, timings.projector) > 0
    assert min(timings.prefill, timings.decode, timings.tokens_per_second) > 0
    assert (timings.num_prompt_tokens, timings.num_generated_tokens) == (len(golden.case["input_ids"]), 12)


def test_the_checkpoints_own_settings_are_the_default(models: dict[str, Model]) -> None:
    golden = next(
        case for _, case in golden_cases.alternatives("repetition_penalty_") if not case.base.stages("vision")
    )
    expected = golden.record["generated_ids"]
    model = models[golden.folder.name]
    own = model.manifest.generation
    assert own is not None
    assert own.repetition_penalty == golden.record["generation"]["repetition_penalty"]
    generation = model.generate(
        golden.request["messages"], golden.request["options"], max_new_tokens=16, ignore_eos=True
    )
    assert list(generation.token_ids) == expected


def test_an_end_token_of_the_manifest_ends_the_answer(packages: dict[str, Path], tmp_path: Path) -> None:
    golden = next(case for case in CASES if not case.stages("vision"))
    answer = golden.case["generated_ids"]
    end = answer[2]
    assert end not in answer[:2]
    package = edited(packages[golden.folder.name], tmp_path, generation={"eos_token_ids": [end]})
    with load(package, **MODEL_OPTIONS) as model:
        generation = model.generate(golden.request["messages"], temperature=0, repetition_penalty=1)
    assert list(generation.token_ids) == answer[:3]
    assert generation.finish_reason == "stop"


@pytest.mark.parametrize("variant", ["int8", "int4"])
def test_other_variants_run(packages: dict[str, Path], variant: str) -> None:
    with load(packages["tiny_b"], variant, **MODEL_OPTIONS) as model:
        assert model.variant.name == variant
        assert len(model.generate(TEXT, max_new_tokens=5, ignore_eos=True).token_ids) == 5


def test_text_alone_opens_no_vision_graph(packages: dict[str, Path]) -> None:
    with load(packages["tiny_a"], **MODEL_OPTIONS) as model:
        assert model._sessions == {}
        generation = model.generate(TEXT, max_new_tokens=2)
        assert set(model._sessions) == {"embed_tokens", "decoder"}
        assert generation.timings.vision == generation.timings.projector == 0
        model.close()
        assert model._sessions == {}
        assert model.generate(TEXT, max_new_tokens=2).token_ids == generation.token_ids


def test_two_answers_at_once_do_not_mix(model: Model) -> None:
    other = [{"role": "user", "content": "Something else entirely."}]
    settings: dict[str, Any] = {"max_new_tokens": 10, "ignore_eos": True}
    one, two = model.stream(TEXT, **settings), model.stream(other, **settings)
    for _ in zip(one, two, strict=False):
        pass
    assert one.finish() == replace(model.generate(TEXT, **settings), timings=one.generation.timings)
    assert two.finish() == replace(model.generate(other, **settings), timings=two.generation.timings)


def test_threads_that_come_first_together_open_each_graph_once(packages: dict[str, Path]) -> None:
    with load(packages["tiny_a"], **MODEL_OPTIONS) as model, ThreadPoolExecutor(8) as pool:
        for found in (lambda _: model.decoder, lambda _: model.session("projector"), lambda _: model.builder):
            opened = list(pool.map(found, range(8)))
            assert all(each is opened[0] for each in opened)


def edited(package: Path, tmp_path: Path, *, roles: list[str] | None = None, **parts: Any) -> Path:
    """A copy of a package with another manifest: parts replaced (None: taken out), and only some of its roles."""
    copy = tmp_path / "package"
    shutil.copytree(package, copy)
    file = copy / "vlmport.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    for name, value in parts.items():
        if value is None:
            manifest.pop(name)
        else:
            manifest[name] = manifest.get(name, {}) | value
    if roles is not None:
        manifest["roles"] = roles
        for variant in manifest["variants"].values():
            variant["graphs"] = {role: graph for role, graph in variant["graphs"].items() if role in roles}
    file.write_text(json.dumps(manifest), encoding="utf-8")
    return copy


def test_a_package_without_vision_answers_text(packages: dict[str, Path], tmp_path: Path, model: Model) -> None:
    package = edited(
        packages["tiny_a"], tmp_path, roles=["embed_tokens", "decoder"], image=None, video=None, vision=None
    )
    image = np.zeros((56, 56, 3), np.uint8)
    with load(package, **MODEL_OPTIONS) as blind:
        assert blind.generate(TEXT, max_new_tokens=4).token_ids == model.generate(TEXT, max_new_tokens=4).token_ids
        with pytest.raises(InputError, match="takes no image"):
            blind.generate([{"role": "user", "content": [{"type": "image", "image": image}]}])


def test_a_package_without_decoder_still_sees(packages: dict[str, Path], tmp_path: Path, model: Model) -> None:
    golden = next(case for case in CASES if case.folder.name == "tiny_a" and case.stages("vision"))
    package = edited(packages["tiny_a"], tmp_path, roles=["vision_encoder"], cache=None)
    patches = prepare(model, golden).visuals
    with load(package, **MODEL_OPTIONS) as blind:
        output = blind.encode_vision(patches)
        np.testing.assert_array_equal(output.vision, model.encode_vision(patches).vision)
        np.testing.assert_array_equal(output.features, output.vision)  # nothing to project with
        with pytest.raises(PackageError, match="no cache"):
            blind.generate(TEXT)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"max_new_tokens": -4}, "max_new_tokens: -4"),
        ({"temperature": math.nan}, "temperature: nan"),
        ({"top_p": 7.0}, "top_p: 7"),
        ({"stop": [""]}, "stop: an empty string"),
    ],
)
def test_requests_that_mean_nothing(model: Model, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.stream(TEXT, **settings)  # at once, not when the first piece is asked for


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_threads": 0}, "num_threads: 0"),
        ({"prefill_chunk": 0}, "prefill_chunk: 0"),
        ({"cache_length": 0}, "cache length: 0"),
        ({"cache_length": 10**9}, "cache length: 1000000000"),
        ({"video_rule": "transformers-1"}, "video_rule: 'transformers-1' is not one of"),
    ],
)
def test_load_options_that_mean_nothing(packages: dict[str, Path], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(packages["tiny_a"], **settings)


def test_an_unknown_variant_lists_what_there_is(packages: dict[str, Path]) -> None:
    with pytest.raises(PackageError, match=r"no variant 'int3'; it has fp32, int8, int4"):
        load(packages["tiny_a"], "int3")


def test_a_prompt_that_does_not_fit(packages: dict[str, Path], model: Model) -> None:
    num_tokens = len(model.prepare(TEXT).input_ids)
    refusal = rf"{num_tokens} tokens and the cache holds {num_tokens - 1}"
    with (
        load(packages["tiny_a"], cache_length=num_tokens - 1, **MODEL_OPTIONS) as small,
        pytest.raises(CapacityError, match=refusal),
    ):
        small.stream(TEXT)
    with load(packages["tiny_a"], cache_length=num_tokens + 2, **MODEL_OPTIONS) as small:
        generation = small.generate(TEXT, max_new_tokens=50, ignore_eos=True)
        assert (len(generation.token_ids), generation.finish_reason) == (3, "length")
        assert generation.token_ids == model.generate(TEXT, max_new_tokens=3, ignore_eos=True).token_ids


@pytest.mark.parametrize(
    ("cache", "message"),
    [({"num_layers": 4}, "cache.num_layers of vlmport.json is 4"), ({"head_dim": 8}, "past_key_values.0.key")],
)
def test_a_manifest_that_does_not_fit_its_graphs(
    packages: dict[str, Path], tmp_path: Path, cache: dict[str, Any], message: str
) -> None:
    package = edited(packages["tiny_a"], tmp_path, cache=cache)
    with load(package, **MODEL_OPTIONS) as model, pytest.raises(PackageError, match=message):
        model.generate(TEXT)


def test_vision_inputs_that_do_not_fit_the_graph(packages: dict[str, Path], tmp_path: Path) -> None:
    package = edited(packages["tiny_a"], tmp_path, vision={"inputs": ["patch_positions", "cu_seqlens"]})
    image = np.zeros((56, 56, 3), np.uint8)
    with load(package, **MODEL_OPTIONS) as model, pytest.raises(PackageError, match="wants input 'window_index'"):
        model.generate([{"role": "user", "content": [{"type": "image", "image": image}]}])


def test_features_of_another_prompt_are_refused(model: Model) -> None:
    prepared = model.prepare(TEXT)
    with pytest.raises(InputError, match="3 rows for 0 placeholders"):
        model.embed(prepared, np.zeros((3, 64), np.float32))
    with pytest.raises(InputError, match="input_ids"):
        model.logits(np.zeros((2, 3), np.int64))
    with pytest.raises(InputError, match="input_ids"):
        model.logits(np.zeros(0, np.int64))


def test_without_onnxruntime_a_package_can_be_checked_and_loading_names_the_extras(package_tiny_a: Path) -> None:
    program = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")
sys.meta_path.insert(0, Absent())
from vlmport.runtime import MissingDependencyError, load
from vlmport.runtime.package import Package
Package.open({str(package_tiny_a)!r}).verify()
try:
    load({str(package_tiny_a)!r})
except MissingDependencyError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "vlmport[cpu]" in done.stdout
    assert "vlmport[gpu]" in done.stdout
