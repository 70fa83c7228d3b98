"""Graphs on disk: layout, determinism, bounded memory, and nothing left behind where it fails."""

import resource
import shutil
import tracemalloc
from collections import namedtuple
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from float_graphs import F32, ArraySource, decoder, embedding, random_source, run

from vlmport.quant import data_file
from vlmport.quant.recipe import load_recipe
from vlmport.quant.rewrite import rewrite
from vlmport.quant.store import WrittenGraph, write_graph
from vlmport.runtime.errors import CapacityError, CheckpointError, RecipeError
from vlmport.runtime.manifest import TensorInfo
from vlmport.runtime.package import file_entry

SHAPES = {"layers.0.weight": (300, 102), "lm_head.weight": (33, 300)}


def write(folder: Path, recipe: str = "int4", source: ArraySource | None = None, **options) -> WrittenGraph:
    model = decoder(SHAPES)
    source = random_source(model) if source is None else source
    stored = rewrite(model, "decoder", load_recipe(recipe))
    folder.mkdir(exist_ok=True)
    return write_graph(model, stored, source, folder, "decoder", **options)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_layout(tmp_path: Path) -> None:
    written = write(tmp_path)
    assert (written.graph, written.data) == ("decoder.onnx", "decoder.onnx_data")
    assert written.files == {name: file_entry(tmp_path / name) for name in ("decoder.onnx", "decoder.onnx_data")}
    end = 0
    for tensor in onnx.load(tmp_path / written.graph, load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if not place:
            assert len(tensor.raw_data) < 1024
            continue
        assert int(place["length"]) >= 1024
        assert place["location"] == "decoder.onnx_data"
        assert end <= int(place["offset"]) < end + 4096
        assert int(place["offset"]) % 64 == 0
        end = int(place["offset"]) + int(place["length"])
    assert end == (tmp_path / written.data).stat().st_size


def test_big_tensors_start_on_pages(tmp_path: Path) -> None:
    model = decoder({"layers.0.weight": (300, 301), "lm_head.weight": (64, 300)})
    write_graph(model, rewrite(model, "decoder", load_recipe("fp32")), random_source(model), tmp_path, "decoder")
    weight = model.graph.initializers["lm_head.weight"].const_value
    assert isinstance(weight, ir.ExternalTensor)
    assert weight.offset is not None
    assert weight.offset % 4096 == 0


def test_what_the_manifest_says(tmp_path: Path) -> None:
    entry = write(tmp_path).graph_file("int4")
    assert entry.inputs == {"x": TensorInfo("float32", ("rows", "102"))}
    assert entry.outputs == {"lm_head.weight_sum": TensorInfo("float32", ("rows", "33"))}
    assert entry.formats == {"layers.0.weight": "int4", "lm_head.weight": "int8"}


@pytest.mark.parametrize("recipe", ["fp32", "fp16", "int8", "int4"])
def test_equal_bytes_every_time_and_in_any_chunks(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", recipe)
    monkeypatch.setattr(data_file, "_CHUNK_BYTES", 1000)  # two rows
    monkeypatch.delattr("os.sched_getaffinity", raising=False)  # as on macOS
    monkeypatch.delattr("os.fdatasync", raising=False)
    write(tmp_path / "b", recipe)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_constants_of_the_graph_go_along(tmp_path: Path) -> None:
    model = decoder({"lm_head.weight": (33, 512)})
    factors = np.linspace(0, 1, 512, dtype=np.float32)
    model.graph.initializers["scale"].const_value = ir.Tensor(factors, name="scale")
    model.graph.initializers["scale"].shape = ir.Shape((512,))
    ids = ir.Value(name="ids", const_value=ir.Tensor(np.arange(400), name="ids"))
    model.graph.initializers.add(ids)
    source = random_source(model)
    written = write_graph(model, rewrite(model, "decoder", load_recipe("fp32")), source, tmp_path, "decoder")
    x = np.ones((2, 512), np.float32)
    expected = (x * factors) @ source.arrays["lm_head.weight"].T + source.arrays["lm_head.bias"]
    np.testing.assert_allclose(run(tmp_path / written.graph, x=x), expected, rtol=1e-4, atol=1e-4)
    loaded = {t.name: t for t in onnx.load(tmp_path / written.graph).graph.initializer}
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(loaded["ids"]), np.arange(400))


class HugeTable:
    """A table that exists only where it is read."""

    def __init__(self, num_rows: int, num_columns: int) -> None:
        self.size = (num_rows, num_columns)
        self.read_to = 0

    def shape(self, parameter: str) -> tuple[int, ...]:
        return self.size

    def origin(self, parameter: str) -> str:
        return parameter

    def rows(self, parameter: str, start: int, stop: int) -> np.ndarray:
        assert start == self.read_to, "a table is read once, in order"
        self.read_to = stop
        row = np.linspace(-1, 1, self.size[1], dtype=np.float32)
        return np.multiply.outer(np.arange(start, stop, dtype=np.float32) % 97 + 1, row)


@pytest.mark.parametrize("recipe", ["fp16", "int8"])
def test_memory_does_not_grow_with_the_table(recipe: str, tmp_path: Path) -> None:
    source = HugeTable(151_936, 512)  # 311 MB in float32
    model = embedding(*source.size)
    stored = rewrite(model, "embed_tokens", load_recipe(recipe))
    tracemalloc.start()
    try:
        written = write_graph(model, stored, source, tmp_path, "embed_tokens")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20
    assert written.files[written.data].size > 151_936 * 512
    rows = run(tmp_path / written.graph, ids=np.array([0, 96, 151_935]))
    expected = np.multiply.outer([1, 97, 151_935 % 97 + 1], np.linspace(-1, 1, 512))
    np.testing.assert_allclose(rows, expected, atol=0.2)


def test_progress_reaches_its_total(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_file, "_CHUNK_BYTES", 4000)
    calls: list[tuple[int, int, str]] = []
    write(tmp_path, progress=lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert done[-1] == calls[-1][1]
    assert {call[2] for call in calls} == {name.replace("weight", end) for name in SHAPES for end in ("weight", "bias")}


def broken(name: str, index: tuple[int, ...], value: float) -> ArraySource:
    source = random_source(decoder(SHAPES))
    source.arrays[name][index] = value
    return source


def test_bad_weights_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: holds NaN or infinity"):
        write(tmp_path, "int8", broken("lm_head.weight", (32, 299), np.nan))
    with pytest.raises(RecipeError, match=r"lm_head\.weight: 70000 does not fit float16; give this weight bits 32"):
        write(tmp_path, "fp16", broken("lm_head.weight", (32, 299), -70000))
    source = random_source(decoder(SHAPES))
    source.arrays["layers.0.bias"] = np.zeros(5, np.float32)
    with pytest.raises(CheckpointError, match=r"layers\.0\.bias: shape \[5\], the graph says \[300\]"):
        write(tmp_path, "fp32", source)
    assert content(tmp_path) == {}


def test_float32_weights_pass_through_bit_by_bit(tmp_path: Path) -> None:
    """Even what is no number: storing is not judging."""
    source = broken("lm_head.weight", (32, 299), np.nan)
    write(tmp_path, "fp32", source)
    assert source.arrays["lm_head.weight"].tobytes() in (tmp_path / "decoder.onnx_data").read_bytes()


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int, what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, progress=stop)
    assert content(tmp_path) == {}


def test_a_full_disk_is_told_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 0))
    with pytest.raises(CapacityError, match=r"decoder\.onnx_data: needs \d+ bytes, the disk has 0 free; make room"):
        write(tmp_path)
    assert content(tmp_path) == {}


def test_a_disk_that_fills_up_while_writing(tmp_path: Path) -> None:
    """A limit on file sizes stands in for the disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))
    try:
        with pytest.raises(CapacityError, match=r"decoder\.onnx_data: cannot write \d+ bytes: File too large"):
            write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert content(tmp_path) == {}


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    model = decoder(SHAPES)
    stored = rewrite(model, "decoder", load_recipe("fp32"))
    with pytest.raises(CapacityError, match=r"decoder\.onnx_data: cannot write"):
        write_graph(model, stored, random_source(model), tmp_path / "missing", "decoder")


def test_small_weights_stay_in_the_graph(tmp_path: Path) -> None:
    model = decoder({"lm_head.weight": (3, 16)}, F32)
    source = random_source(model)
    written = write_graph(model, rewrite(model, "decoder", load_recipe("int8")), source, tmp_path, "decoder")
    assert written.files[written.data].size == 0
    assert run(tmp_path / written.graph, x=np.ones((2, 16), np.float32)).shape == (2, 3)
