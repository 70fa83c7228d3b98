"""A head that is tied to the embedding's table is stored once, where both are stored alike."""

from collections.abc import Hashable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from float_graphs import ArraySource, decoder, embedding, random_source, run

from vlmport.quant.recipe import Recipe, Rule, WeightFormat, load_recipe
from vlmport.quant.variant import write_variant
from vlmport.runtime.manifest import GraphFile
from vlmport.runtime.package import Package

ROWS = 4000
TABLE, HEAD = "embed_tokens.weight", "lm_head.weight"


class TiedSource(ArraySource):
    """Sources whose table and head are the same tensor."""

    def origin(self, parameter: str) -> Hashable:
        return "table" if parameter in (TABLE, HEAD) else super().origin(parameter)


def sources(width: int, *, tied: bool) -> dict[str, tuple[ir.Model, ArraySource]]:
    models = {
        "embed_tokens": embedding(ROWS, width),
        "decoder": decoder({"layers.0.weight": (width, width)} | head(width)),
    }
    arrays = {name: array for model in models.values() for name, array in random_source(model).arrays.items()}
    arrays[HEAD] = arrays[TABLE]
    source = (TiedSource if tied else ArraySource)(arrays)
    return {role: (model, source) for role, model in models.items()}


def head(width: int) -> dict[str, tuple[int, int]]:
    return {HEAD: (ROWS, width)}


def written(folder: Path, recipe: Recipe, width: int, *, tied: bool) -> dict[str, GraphFile]:
    folder.mkdir(parents=True)
    opened = sources(width, tied=tied)
    variant, _ = write_variant(recipe, "cpu", ("decoder", "embed_tokens"), {}, opened.__getitem__, folder)
    assert list(variant.graphs) == ["decoder", "embed_tokens"]
    return variant.graphs


@pytest.mark.parametrize("recipe", ["fp32", "fp16", "int8", "int4"])
def test_the_head_reads_the_file_of_the_table(recipe: str, tmp_path: Path) -> None:
    once = written(tmp_path / "once", load_recipe(recipe), 128, tied=True)
    twice = written(tmp_path / "twice", load_recipe(recipe), 128, tied=False)
    assert once["decoder"].shared == (once["embed_tokens"].data,)
    assert twice["decoder"].shared == once["embed_tokens"].shared == ()
    table = (tmp_path / "once" / once["embed_tokens"].data).read_bytes()
    assert table == (tmp_path / "twice" / twice["embed_tokens"].data).read_bytes()
    sizes = [
        (tmp_path / place / graph.data).stat().st_size
        for place, graph in (("once", once["decoder"]), ("twice", twice["decoder"]))
    ]
    assert sizes[1] - sizes[0] >= len(table) - 4096
    x = np.random.default_rng(1).standard_normal((3, 128)).astype(np.float32)
    results = [run(tmp_path / place / once["decoder"].graph, x=x) for place in ("once", "twice")]
    assert results[0].shape == (3, ROWS)
    np.testing.assert_array_equal(*results)


def test_what_is_stored_otherwise_is_stored_twice(tmp_path: Path) -> None:
    """By other formats, and where rows end inside a block, which a linear pads and a table does not."""
    other = Recipe(
        "other",
        (Rule("decoder/*.weight", WeightFormat(bits=8, block_size=64)), Rule("*/*.weight", WeightFormat(bits=8))),
    )
    assert written(tmp_path / "other", other, 128, tied=True)["decoder"].shared == ()
    assert written(tmp_path / "partial", load_recipe("int8"), 120, tied=True)["decoder"].shared == ()
    assert written(tmp_path / "whole", load_recipe("fp32"), 120, tied=True)["decoder"].shared != ()


def test_a_table_that_is_there_is_read_where_it_lies(tmp_path: Path) -> None:
    """Wherever that is: a package may be of a version that laid files out otherwise. Nothing is done to it again."""
    opened = sources(128, tied=True)
    first, _ = write_variant(load_recipe("int8"), "cpu", opened, {}, opened.__getitem__, tmp_path)
    table = first.graphs["embed_tokens"]
    shift(tmp_path, table, 8192)

    def open_role(role: str) -> tuple[ir.Model, ArraySource]:
        assert role == "decoder"
        return sources(128, tied=True)[role]

    second, files = write_variant(
        load_recipe("int4"),
        "cpu",
        opened,
        {"int8": first},
        open_role,
        tmp_path,
        open_tables=lambda entry: (ir.load(tmp_path / entry.graph).graph, opened["embed_tokens"][1]),
    )
    assert second.graphs["decoder"].shared == (table.data,)
    assert set(files) == {"onnx/decoder_int4.onnx", "onnx/decoder_int4.onnx_data"}
    whole = written(tmp_path / "whole", load_recipe("int4"), 128, tied=False)
    x = np.random.default_rng(1).standard_normal((3, 128)).astype(np.float32)
    paths = (tmp_path / "decoder_int4.onnx", tmp_path / "whole" / whole["decoder"].graph)
    np.testing.assert_array_equal(*(run(path, x=x) for path in paths))


def shift(folder: Path, entry: GraphFile, num_bytes: int) -> None:
    """Moves the weights of a graph further back in their file."""
    data = folder / entry.data
    data.write_bytes(bytes(num_bytes) + data.read_bytes())
    model = ir.load(folder / entry.graph)
    for value in model.graph.initializers.values():
        old = value.const_value
        if isinstance(old, ir.ExternalTensor):
            place = (old.offset or 0) + num_bytes
            value.const_value = ir.ExternalTensor(
                entry.data, place, old.length, old.dtype, shape=old.shape, name=str(value.name)
            )
    ir.save(model, folder / entry.graph)


def test_in_a_package_of_a_tied_checkpoint(package_tiny_a: Path, package_tiny_b: Path) -> None:
    tied, untied = (Package.open(path).variant("fp32").graphs["decoder"] for path in (package_tiny_b, package_tiny_a))
    assert tied.shared == ("embed_tokens.onnx_data",)
    assert untied.shared == ()
