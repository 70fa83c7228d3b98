"""The receipts demo: its maker is deterministic and honest about the split, its checkpoint is whole and reads."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "receipts"
CHECKPOINT = FOLDER / "checkpoint"
LIMIT_BYTES = 6_000_000


@pytest.fixture(scope="module")
def receipts() -> ModuleType:
    """The maker, imported as its scripts import it: by its bare name."""
    return bare_module("receipts")


def bare_module(name: str) -> ModuleType:
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


def test_a_receipt_depends_on_split_seed_and_index_only(receipts):
    first = receipts.make_receipt("train", 3, 11)
    np.random.seed(0)
    receipts.make_receipt("train", 3, 12)
    again = receipts.make_receipt("train", 3, 11)
    assert first.text == again.text
    assert np.array_equal(first.image, again.image)
    for other in (("train", 3, 12), ("train", 4, 11), ("heldout", 3, 11)):
        assert receipts.make_receipt(*other).text != first.text


def test_the_split_is_decided_by_the_printed_text(receipts):
    for split in ("train", "heldout"):
        texts = [receipts.make_receipt(split, 7, index).text for index in range(60)]
        assert {receipts.split_of(text) for text in texts} == {split}


def test_every_answer_follows_from_the_printed_lines(receipts):
    for index in range(60):
        receipt = receipts.make_receipt("heldout", 7, index)
        *lines, last = [line.rsplit(" ", 1) for line in receipt.text.split("\n")]
        prices = {name: float(price) for name, price in lines}
        assert 1 <= len(prices) == len(lines) <= receipts.MAX_ITEMS
        assert float(last[1]) == pytest.approx(sum(prices.values()))
        dearest = max(prices, key=prices.__getitem__)
        assert sorted(prices.values())[-1:] != sorted(prices.values())[-2:-1]
        chosen = receipt.items[0]
        answers = {kind: receipts.ask(receipt, kind, chosen).answer for kind in receipts.KINDS}
        expected = {"total": last[1], "dearest": dearest, "count": str(len(lines)), "text": receipt.text}
        assert answers == expected | {"price": f"{prices[chosen.name]:.2f}"}


def test_sizes_are_native_and_vary(receipts):
    receipt_list = [receipts.make_receipt("train", 5, index) for index in range(60)]
    assert {len(receipt.items) for receipt in receipt_list} == set(range(1, receipts.MAX_ITEMS + 1))
    heights, widths = zip(*(receipt.image.shape[:2] for receipt in receipt_list), strict=True)
    assert len(set(heights)) > 30
    assert len(set(widths)) > 30
    assert any(height % 28 for height in heights)
    assert max(heights) <= 360
    assert max(widths) <= 280
    means = [receipt.image.mean() for receipt in receipt_list]
    assert min(means) < 90 < 200 < max(means)  # light on dark and dark on light


def test_a_task_folder_has_every_kind_and_its_images(receipts, tmp_path):
    receipts.write_task(tmp_path, 10, 7)
    task = json.loads((tmp_path / "task.json").read_text(encoding="utf-8"))
    assert task["schema"] == "vlmport-task/2"
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {sample["kind"] for sample in samples} == set(receipts.KINDS)
    for sample in samples:
        assert set(sample) == {"id", "messages", "answers", "kind"}
        assert (tmp_path / sample["messages"][0]["content"][0]["image"]).is_file()


def test_calibration_data_are_of_the_training_split(receipts, tmp_path):
    receipts.write_task(tmp_path, 5, 7, "train")
    for index in range(5):
        drawn = receipts.make_receipt("train", 7, index)
        assert receipts.split_of(drawn.text) == "train"
        with Image.open(tmp_path / "images" / f"{index:04d}.png") as picture:
            assert np.array_equal(np.asarray(picture), drawn.image)


def test_the_checkpoint_is_small_and_as_published():
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) < LIMIT_BYTES
    config = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    assert config["torch_dtype"] == "float16"
    with safe_open(CHECKPOINT / "model.safetensors", "np") as weights:
        names = set(weights.keys())
        assert weights.get_tensor("model.embed_tokens.weight").dtype == np.float16
    assert "lm_head.weight" not in names
    assert {name.split(".")[0] for name in names} == {"visual", "model"}
    tokens = json.loads((CHECKPOINT / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    assert [token["id"] for token in tokens] == list(range(config["vocab_size"] - 22, config["vocab_size"]))
    assert config["image_token_id"] == next(token["id"] for token in tokens if token["content"] == "<|image_pad|>")


def test_the_checkpoint_reads_an_unseen_receipt(receipts):
    pytest.importorskip("transformers", reason="the reference needs the export extra")
    from tokenizers import Tokenizer

    evaluate, inputs = bare_module("evaluate"), bare_module("inputs")
    model = evaluate.load_model(CHECKPOINT)
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    examples = [receipts.drawn_example("heldout", 7, index) for index in range(5)]
    said = [evaluate.answer(model, tokenizer, inputs.preprocess(entry.image), entry.question) for entry in examples]
    assert sum(text == entry.answer for text, entry in zip(said, examples, strict=True)) >= 4  # 95 % in 500
