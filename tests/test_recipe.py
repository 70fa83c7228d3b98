"""Recipes as data: what is refused, which rule wins, and what files may be shared by."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmport.quant.recipe import (
    BUILTIN_NAMES,
    Recipe,
    Rule,
    Target,
    WeightFormat,
    file_stem,
    load_recipe,
    precision_label,
)
from vlmport.runtime.errors import RecipeError
from vlmport.runtime.manifest import ROLES
from vlmport.runtime.schema import from_json, to_json

INT8, INT4, HEAD = WeightFormat(bits=8), WeightFormat(bits=4), WeightFormat(bits=8, balance=True)
DYNAMIC = WeightFormat(bits=8, activations="int8-dynamic", balance=True)


def labels(recipe: Recipe, target: Target = "cpu") -> dict[str, str]:
    return {role: precision_label(recipe, role, target) for role in ROLES}


def test_int4_keeps_what_hurts_most_in_8_bits() -> None:
    recipe = load_recipe("int4")
    assert recipe.format_of("decoder", "layers.3.mlp.down_proj.weight") == WeightFormat(bits=4, balance=True)
    assert recipe.format_of("decoder", "lm_head.weight") == HEAD
    assert recipe.format_of("embed_tokens", "embed_tokens.weight") == INT8
    assert recipe.format_of("vision_encoder", "blocks.0.attn.qkv.weight", "cpu") == DYNAMIC
    assert recipe.format_of("vision_encoder", "blocks.0.attn.qkv.weight", "cuda") == INT8
    assert recipe.format_of("projector", "mlp.0.weight", "cpu") == DYNAMIC
    assert recipe.format_of("projector", "mlp.0.weight", "cuda") == INT8
    assert recipe.format_of("decoder", "rope.table") is None


def test_first_match_wins() -> None:
    recipe = Recipe("mine", (Rule("decoder/*", INT8), Rule("*/*", INT4)))
    assert recipe.format_of("decoder", "a.weight") == INT8
    assert recipe.format_of("projector", "a.weight") == INT4


def test_labels_let_variants_share_files() -> None:
    assert labels(load_recipe("int8")) == dict.fromkeys(ROLES, "int8")
    assert labels(load_recipe("int4")) == dict.fromkeys(ROLES, "int8") | {"decoder": "int4"}
    assert labels(load_recipe("int4", block_size=128)) == dict.fromkeys(ROLES, "int8") | {"decoder": "int4_b128"}
    blocks = dict.fromkeys(ROLES, "int8_b64")
    assert labels(load_recipe("int8", block_size=64)) == blocks | {
        "vision_encoder": "int8",
        "projector": "int8",
    }  # no blocks
    assert labels(load_recipe("int8", block_size=64), "cuda") == blocks
    dynamic = dict.fromkeys(ROLES, "int8-dynamic") | dict.fromkeys(
        ("vision_encoder", "projector", "embed_tokens"), "int8"
    )
    assert labels(load_recipe("int8-dynamic")) == dynamic


def test_rules_of_another_target_do_not_count() -> None:
    recipe = Recipe("mine", (Rule("decoder/*", INT4, target="cuda"), Rule("*/*", INT8)))
    assert recipe.format_of("decoder", "a.weight", "cpu") == INT8
    assert recipe.format_of("decoder", "a.weight", "cuda") == INT4
    assert precision_label(recipe, "decoder", "cpu") == precision_label(recipe, "projector", "cpu") == "mine"
    assert "target" not in to_json(recipe.rules[1]), "packages of before stay as they are"


def test_a_recipe_of_ones_own_shares_the_parts_that_equal_a_builtin_one() -> None:
    recipe = Recipe("mine", (Rule("decoder/*.weight", HEAD), Rule("*/*.weight", WeightFormat(bits=16))))
    assert labels(recipe) == dict.fromkeys(ROLES, "fp16") | {"decoder": "int8"}
    odd = Recipe("odd", (Rule("decoder/*.weight", WeightFormat(bits=4, symmetric=True)), Rule("*/*.weight", INT8)))
    assert labels(odd) == dict.fromkeys(ROLES, "int8") | dict.fromkeys(
        ("decoder", "vision_encoder", "projector"), "odd"
    )


FORMATS = st.sampled_from([INT8, INT4, DYNAMIC, WeightFormat(32), WeightFormat(16), WeightFormat(4, block_size=128)])
RULES = st.builds(
    Rule,
    st.sampled_from(["*/*.weight", "decoder/*.weight", "decoder/lm_head.weight", "*o*/*.weight", "*/*"]),
    FORMATS,
    st.sampled_from([None, "cpu", "cuda"]),
)
RECIPES = st.one_of(
    st.sampled_from([load_recipe(name) for name in BUILTIN_NAMES] + [load_recipe("int4", block_size=128)]),
    st.builds(lambda rules: Recipe(f"r{abs(hash(rules))}", rules), st.lists(RULES, min_size=1, max_size=4).map(tuple)),
)
PARAMETERS = ("lm_head.weight", "layers.0.weight", "table")


@given(RECIPES, RECIPES, st.sampled_from(ROLES), st.sampled_from(["cpu", "cuda"]))
def test_equal_labels_mean_equal_content(one: Recipe, other: Recipe, role: str, target: Target) -> None:
    if precision_label(one, role, target) == precision_label(other, role, target):
        formats = [[recipe.format_of(role, name, target) for name in PARAMETERS] for recipe in (one, other)]
        assert formats[0] == formats[1]


@given(RECIPES)
def test_json_and_back(recipe: Recipe) -> None:
    assert from_json(Recipe, json.loads(json.dumps(to_json(recipe)))) == recipe


def test_file_stems() -> None:
    assert file_stem("decoder", "fp32") == "decoder"
    assert file_stem("decoder", "int4_b128") == "decoder_int4_b128"


def test_block_size_is_about_blocks_only() -> None:
    assert load_recipe("int4", block_size=32) == load_recipe("int4")
    assert load_recipe("int4", block_size=128) == load_recipe("int4_b128")
    assert load_recipe("fp32", block_size=128) == load_recipe("fp32")


def test_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"name": "mine", "rules": [{"match": "decoder/*", "format": {"bits": 4}}]}))
    assert load_recipe(str(file)) == Recipe("mine", (Rule("decoder/*", INT4),))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "Expecting value"),
        ("[]", "expected an object"),
        ('{"name": "mine"}', "'rules' is missing"),
        ('{"name": "mine", "rules": []}', "rules is empty"),
        ('{"name": "mine", "rules": [], "extra": 1}', "unknown field 'extra'"),
        ('{"name": "../x", "rules": [{"match": "*/*", "format": {"bits": 4}}]}', "recipe name '../x'"),
        ('{"name": "int8", "rules": [{"match": "*/*", "format": {"bits": 4}}]}', "choose another name"),
        ('{"name": "int4_b128", "rules": [{"match": "*/*", "format": {"bits": 4}}]}', "choose another name"),
        ('{"name": "m", "rules": [{"match": "*/*", "format": {"bits": 5}}]}', "bits 5"),
        ('{"name": "m", "rules": [{"match": "*/*", "format": {"bits": true}}]}', "expected of type int"),
        ('{"name": "m", "rules": [{"match": "*/*", "format": {"bits": 4, "block": 32}}]}', "unknown field 'block'"),
        ('{"name": "m", "rules": [{"match": "*/*", "format": {"bits": 4, "block_size": 48}}]}', "block_size 48"),
        (
            '{"name": "m", "rules": [{"match": "*/*", "format": {"bits": 8, "accuracy_level": 0}}]}',
            "tens of times slower",
        ),
        ('{"name": "m", "rules": [{"match": "*/*", "format": {"bits": 4, "accuracy_level": 3}}]}', "use 0, 1 or 4"),
        ('{"name": "m", "rules": [{"match": "*/*", "format": {"bits": 16, "block_size": 64}}]}', "leave them out"),
        (
            '{"name": "m", "rules": [{"match": "*/*", "format": {"bits": 4, "method": "magic"}}]}',
            "known methods are rtn",
        ),
        (
            '{"name": "m", "rules": [{"match": "*/*", "format": {"bits": 4, "activations": "int8-dynamic"}}]}',
            "use bits 8",
        ),
        ('{"name": "m", "rules": [{"match": "*/*", "format": {"bits": 8, "activations": "int4"}}]}', "is not one of"),
        ('{"name": "m", "rules": [{"match": "*/*", "format": {"bits": 8, "activations": 8}}]}', "is not one of"),
        (
            '{"name": "m", "rules": [{"match": "*/*", "format": {"bits": 8, "activations": "int8-dynamic", '
            '"block_size": 64}}]}',
            "bits 8 with activations int8-dynamic has no block_size",
        ),
        ('{"name": "m", "rules": [{"match": "*/*", "format": {"bits": 8}, "target": "tpu"}]}', "'tpu' is not one of"),
        ('{"name": "m", "rules": [{"match": "decoder.weight", "format": {"bits": 4}}]}', "form role/parameter"),
        ('{"name": "m", "rules": [{"match": "decodr/*", "format": {"bits": 4}}]}', "no role is called 'decodr'"),
    ],
)
def test_bad_files_are_told_in_one_line(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(file))
    assert words in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_names_and_options(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="known are fp32, fp16, int8, int4"):
        load_recipe("int5")
    with pytest.raises(RecipeError, match="known methods are rtn"):
        load_recipe("int4", method="magic")
    with pytest.raises(RecipeError, match="block size 33"):
        load_recipe("int4", block_size=33)
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(str(tmp_path / "missing.json"))
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(f"{tmp_path}/")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"binary\.json"):
        load_recipe(str(tmp_path / "binary.json"))
    with pytest.raises(RecipeError, match=r"deep\.json"):
        load_recipe(str(tmp_path / "deep.json"))
