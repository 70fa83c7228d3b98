"""Random checkpoints at published shapes: names, sizes and bytes, and how they are written."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import tensors_of
from layering import ROOT
from safetensors import safe_open
from tokenizers import Tokenizer

from benchmarks.checkpoint import plan_tensors, shard_plan, tensor_chunks, write_checkpoint
from benchmarks.shapes import Shape, load_shape, shape_names
from vlmport.export.checkpoint import Checkpoint
from vlmport.export.family import families, load_family
from vlmport.export.graphs import float_graphs
from vlmport.runtime.errors import InputError


def tiny() -> Shape:
    """The smallest shape there is: a tiny config under the documents of the 3B shape."""
    config = load_family("qwen2_5_vl").tiny_config
    return replace(load_shape("3b"), name="tiny", config=config, num_regular_tokens=450)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks") / "tiny"
    write_checkpoint(tiny(), plan_tensors(tiny()), folder, shard_bytes=100_000)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_an_export_finds_every_tensor_and_none_too_many(checkpoint: Path) -> None:
    graphs = float_graphs(checkpoint, "cpu")  # raises for a missing, unexpected or mis-shaped tensor
    assert graphs.checkpoint.dtype == "bfloat16"
    assert len(graphs.checkpoint.files) > 3  # config.json and shards
    assert "visual.patch_embed.proj.weight" in graphs.checkpoint.tensors
    assert "model.layers.0.self_attn.q_proj.weight" in graphs.checkpoint.tensors


def test_index_and_shards_agree(checkpoint: Path) -> None:
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text(encoding="utf-8"))
    found: dict[str, str] = {}
    total = 0
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            for name in list(shard.keys()):
                found[name] = file.name
                total += 2 * int(np.prod(shard.get_slice(name).get_shape()))
    assert found == index["weight_map"]
    assert total == index["metadata"]["total_size"]


def test_weights_are_normal_and_norms_are_one(checkpoint: Path) -> None:
    for name, tensor in Checkpoint.open(checkpoint).tensors.items():
        raw = np.fromfile(tensor.file, "<u2", int(np.prod(tensor.shape)), offset=tensor.offset)
        values = (raw.astype(np.uint32) << 16).view(np.float32)
        if len(tensor.shape) > 1:
            assert abs(values.std() - 0.02) < 0.001, name
            assert abs(values.mean()) < 0.002, name
        elif name.endswith("weight"):
            assert (values == 1).all(), name
        else:
            assert 0 < np.abs(values).max() < 0.2, name


def test_the_same_seed_gives_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    for folder, seed in (("same", 0), ("other", 1)):
        write_checkpoint(tiny(), plan_tensors(tiny()), tmp_path / folder, seed=seed, shard_bytes=100_000)
    assert content(tmp_path / "same") == content(checkpoint)
    other = content(tmp_path / "other")
    assert {name for name, data in content(checkpoint).items() if other[name] != data} == {
        name for name in other if name.endswith(".safetensors")
    }


def test_a_tensor_depends_on_its_name_and_not_on_its_place() -> None:
    pool = np.random.default_rng(0).integers(0, 1 << 15, 1 << 21, dtype=np.uint16)

    def values(name: str, seed: int) -> bytes:
        return b"".join(chunk.tobytes() for chunk in tensor_chunks(name, (1_100, 1_000), pool, seed))

    assert len(values("a.weight", 0)) == 2 * 1_100 * 1_000
    assert values("a.weight", 0) == values("a.weight", 0)
    assert len({values("a.weight", 0), values("a.weight", 1), values("b.weight", 0)}) == 3


def test_shards_are_cut_in_order_and_no_larger_than_asked() -> None:
    sizes = {"a": (10,), "b": (20,), "c": (100,), "d": (5,), "e": (5,)}
    assert [list(shard) for shard in shard_plan(sizes, 60)] == [["a", "b"], ["c"], ["d", "e"]]


@pytest.mark.parametrize("family", families())
def test_any_family_can_be_made(family: str) -> None:
    config: dict[str, Any] = load_family(family).tiny_config
    assert plan_tensors(replace(tiny(), config=config, published_names=())) == tensors_of(config)


# As published: parameters of all tensors, and files of 5 GB at most.
@pytest.mark.parametrize(
    ("name", "parameters", "shards"), [("3b", 3_754_622_976, 2), ("7b", 8_292_166_656, 4), ("100m", 100_480_800, 1)]
)
def test_shapes_have_the_published_sizes(name: str, parameters: int, shards: int) -> None:
    tensors = plan_tensors(load_shape(name))
    assert sum(int(np.prod(shape)) for shape in tensors.values()) == parameters
    plan = shard_plan(tensors, 5_000_000_000)
    assert len(plan) == shards
    assert [tensor for shard in plan for tensor in shard] == list(tensors)


@pytest.mark.parametrize("name", shape_names())
def test_config_tokenizer_and_generation_speak_of_the_same_ids(name: str, tmp_path: Path) -> None:
    from benchmarks.vocabulary import write_tokenizer

    shape = load_shape(name)
    write_tokenizer(shape.documents / "tokenizer.json", tmp_path / "tokenizer.json", shape.num_regular_tokens)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == shape.num_regular_tokens + 22 <= shape.config["vocab_size"]
    for key, token in (
        ("bos_token_id", "<|endoftext|>"),
        ("eos_token_id", "<|im_end|>"),
        ("vision_start_token_id", "<|vision_start|>"),
        ("vision_end_token_id", "<|vision_end|>"),
        ("vision_token_id", "<|vision_pad|>"),
        ("image_token_id", "<|image_pad|>"),
        ("video_token_id", "<|video_pad|>"),
    ):
        if key in shape.config:  # not every family has all of them
            assert tokenizer.token_to_id(token) == shape.config[key], key
    ends = [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    assert shape.generation_config["eos_token_id"] == ends
    text = "What is the total of this receipt? 12,50 €\n"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode())  # merges are at work


def test_an_unknown_shape_is_told() -> None:
    with pytest.raises(InputError, match="'4b' is unknown; known are 100m, 3b, 7b"):
        load_shape("4b")


def test_weights_stream(tmp_path: Path) -> None:
    """The process that writes stays smaller than what it writes; torch, which plans, is not in it."""
    folder = tmp_path / "100m"
    command = [sys.executable, "-m", "benchmarks", "make", "100m", "-o", str(folder), "--json"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=300).stdout
    said = json.loads(printed)
    assert said["size"] == sum(file.stat().st_size for file in folder.iterdir()) > 200_000_000
    assert 20_000_000 < said["peak_memory"] < 130_000_000
