"""Reading checkpoints: every dtype and layout gives the same rows; whatever is wrong is told in one line with all of
it."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from vlmport.export.checkpoint import Checkpoint, CheckpointSource, resolve
from vlmport.export.documents import chat_template
from vlmport.export.family import RowBlocks, TensorRef
from vlmport.export.output import whole_folder
from vlmport.runtime.errors import CheckpointError

GOLDEN = Path(__file__).parent / "goldens" / "qwen2_5_vl" / "tiny_a"
VALUES = np.linspace(-3, 3, 7 * 5, dtype=np.float32).reshape(7, 5)


def checkpoint(folder: Path, tensors: dict[str, np.ndarray]) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint.open(folder)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_rows_are_the_stored_values_in_float32(tmp_path: Path, dtype: type) -> None:
    opened = checkpoint(tmp_path, {"a": np.zeros(3, dtype), "w": VALUES.astype(dtype)})
    source = CheckpointSource({"w": opened.tensors["w"]}, {"w": (7, 5)})
    assert source.rows("w", 2, 6).dtype == np.float32
    np.testing.assert_array_equal(source.rows("w", 2, 6), VALUES.astype(dtype).astype(np.float32)[2:6])


@given(bounds=st.tuples(st.integers(0, 7), st.integers(0, 7)).map(sorted))
def test_any_slice_of_rows(tmp_path_factory: pytest.TempPathFactory, bounds: list[int]) -> None:
    folder = tmp_path_factory.getbasetemp() / "slices"
    opened = checkpoint(folder, {"w": VALUES})
    source = CheckpointSource({"w": opened.tensors["w"]}, {"w": (7, 5)})
    np.testing.assert_array_equal(source.rows("w", *bounds), VALUES[slice(*bounds)])


@given(
    size=st.integers(1, 4),
    more=st.integers(0, 3),
    offset=st.integers(0, 3),
    num_blocks=st.integers(1, 4),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
)
def test_any_slice_of_the_rows_of_one_part_of_a_fused_tensor(
    tmp_path_factory: pytest.TempPathFactory,
    size: int,
    more: int,
    offset: int,
    num_blocks: int,
    ends: list[float],
) -> None:
    stride, offset = size + more, min(offset, more)
    values = np.arange(num_blocks * stride * 3, dtype=np.float32).reshape(num_blocks * stride, 3)
    wanted = values.reshape(num_blocks, stride, 3)[:, offset : offset + size].reshape(-1, 3)
    opened = checkpoint(tmp_path_factory.getbasetemp() / "fused", {"w": values})
    ref = TensorRef("w", values.shape, RowBlocks(offset, size, stride))
    stored = resolve(opened, {"part": ref}, lambda name: name, lambda name: False)
    bounds = slice(*(int(end * len(wanted)) for end in ends))
    rows = CheckpointSource(stored, {"part": wanted.shape}).rows("part", bounds.start, bounds.stop)
    np.testing.assert_array_equal(rows, wanted[bounds])


def test_sharded_and_single_file_are_the_same(tmp_path: Path) -> None:
    whole = load_file(GOLDEN / "model.safetensors")
    names = sorted(whole)
    shutil.copy(GOLDEN / "config.json", tmp_path)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, mine in parts.items():
        save_file({name: whole[name] for name in mine}, tmp_path / file)
    index = {"weight_map": {name: file for file, mine in parts.items() for name in mine}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    opened = Checkpoint.open(tmp_path)
    assert set(opened.tensors) == set(names)
    for name in names:
        rows = CheckpointSource({name: opened.tensors[name]}, {name: whole[name].shape}).rows(name, 0, len(whole[name]))
        np.testing.assert_array_equal(rows, whole[name])


def test_dtype_is_that_of_most_values(tmp_path: Path) -> None:
    opened = checkpoint(tmp_path, {"norm": np.ones(4, np.float32), "w": VALUES.astype(np.float16)})
    assert opened.dtype == "float16"
    mixed = checkpoint(tmp_path, {"head": VALUES[:1], "w": VALUES.astype(np.float16)})
    assert mixed.dtype == "float32", "float16 would not hold the head unchanged"


# Bad checkpoints


def broken(tmp_path: Path) -> Path:
    folder = tmp_path / "broken"
    shutil.copytree(GOLDEN, folder, ignore=shutil.ignore_patterns("inputs", "expected*"))
    return folder


def message(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_folder_and_config(tmp_path: Path) -> None:
    assert "no such folder" in message(tmp_path / "nowhere")
    assert "no config.json" in message(tmp_path)


def test_no_weights_tells_of_pickles(tmp_path: Path) -> None:
    folder = broken(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle" in message(folder)


def test_missing_shards_are_all_named(tmp_path: Path) -> None:
    folder = broken(tmp_path)
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "2 of 3 shards are missing: model-1.safetensors, model-2.safetensors" in message(folder)


def test_a_shard_outside_the_folder_is_refused(tmp_path: Path) -> None:
    folder = broken(tmp_path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    assert "outside" in message(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_truncated_weights(tmp_path: Path, keep: int) -> None:
    file = broken(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "model.safetensors: truncated" in message(file.parent)


@pytest.mark.parametrize("content", ["", "{", "\xff", "[" * 100_000])
def test_bad_json(tmp_path: Path, content: str) -> None:
    folder = broken(tmp_path)
    (folder / "config.json").write_text(content, encoding="latin-1")
    assert "config.json: not valid JSON" in message(folder)


def test_every_tensor_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    opened = checkpoint(
        tmp_path,
        {"good": VALUES, "shape": VALUES, "extra": VALUES, "left_out": VALUES, "kind": VALUES.astype(np.float64)},
    )
    wanted = {name: TensorRef(name, (7, 5)) for name in ("good", "missing", "kind")} | {"s": TensorRef("shape", (5, 7))}
    with pytest.raises(CheckpointError) as caught:
        resolve(opened, wanted, lambda name: name, lambda name: name == "left_out")
    text = str(caught.value)
    assert "4 tensors do not fit" in text
    assert "\n" not in text
    for part in ("missing missing [7, 5]", "unexpected extra [7, 5]", "shape is [7, 5]", "[5, 7]", "kind is F64"):
        assert part in text
    assert "left_out" not in text
    assert "good" not in text


def test_a_matrix_turned_over_is_read_by_columns(tmp_path: Path) -> None:
    opened = checkpoint(tmp_path, {"w": VALUES})
    stored = resolve(opened, {"p": TensorRef("w", (7, 5), transposed=True)}, lambda name: name, lambda name: False)
    source = CheckpointSource(stored, {"p": (5, 7)})
    for start, stop in ((0, 5), (1, 3), (4, 5), (2, 2)):
        found = source.rows("p", start, stop)
        np.testing.assert_array_equal(found, VALUES.T[start:stop])
        assert found.flags.c_contiguous
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="ends inside p"):
        source.rows("p", 4, 5)


def test_a_tensor_under_two_spellings_is_told(tmp_path: Path) -> None:
    save_file({"norm": np.ones(4, np.float32), "model.norm": np.zeros(4, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    wanted = {"norm": TensorRef("norm", (4,))}
    with pytest.raises(CheckpointError, match="norm is there twice, under two spellings of norm"):
        resolve(Checkpoint.open(tmp_path), wanted, lambda name: name.removeprefix("model."), lambda name: False)


def test_the_default_of_several_chat_templates(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, {}, {"tokenizer_config.json": {"chat_template": TEMPLATES}}, {})
    assert chat_template(checkpoint) == "plain"


TEMPLATES = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]


def test_leftovers_of_others_are_left_alone(tmp_path: Path) -> None:
    """A target's name may hold the signs of a glob."""
    other, own = tmp_path / ".a1.partial-1-x", tmp_path / ".a[1].partial-999999999-x"
    for folder in (other, own):
        folder.mkdir()
    with whole_folder(tmp_path / "a[1]"):
        pass
    assert other.is_dir()
    assert not own.exists()
