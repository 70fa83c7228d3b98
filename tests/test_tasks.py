"""Task folders: strict reading, exact match, flips in both directions."""

import json
import math
import shutil
from pathlib import Path

import pytest

from vlmport.cli.main import main
from vlmport.runtime.errors import InputError
from vlmport.validate.samples import draw_picture
from vlmport.validate.tasks import TASK_SCHEMA, Answer, Item, Task, load_task, score, task_samples

GOLDENS = Path(__file__).parent / "goldens" / "qwen2_5_vl"


def document(*answers):
    items = [
        {"id": f"i{n}", "image": f"images/{n}.png", "question": "What?", "answer": answer, "kind": f"k{n % 2}"}
        for n, answer in enumerate(answers)
    ]
    return {"schema": TASK_SCHEMA, "name": "toy", "metric": "exact_match", "max_new_tokens": 6, "items": items}


def write(folder, content):
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "task.json").write_text(json.dumps(content), encoding="utf-8")
    for number in range(len(content.get("items", []))):
        draw_picture(number, 60 + 20 * number, 56).save(folder / "images" / f"{number}.png")
    return folder


def test_a_task_becomes_prompts(tmp_path):
    task = load_task(write(tmp_path, document("1", "2")))
    samples = task_samples(task, tmp_path)
    assert [sample.id for sample in samples] == ["i0", "i1"]
    picture, question = samples[1].messages[0]["content"]
    assert picture == {"type": "image", "image": str(tmp_path / "images" / "1.png")}
    assert question == {"type": "text", "text": "What?"}
    assert samples[0].max_new_tokens == 6
    assert not samples[0].ignore_eos


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(schema="vlmport-task/2"), "vlmport-task/2"),
        (lambda d: d.update(metric="bleu"), "bleu"),
        (lambda d: d.update(extra=1), "extra"),
        (lambda d: d.update(items=[]), "items is empty"),
        (lambda d: d.update(max_new_tokens=0), "max_new_tokens"),
        (lambda d: d["items"][0].pop("answer"), "answer"),
        (lambda d: d["items"][0].update(answer=3), "answer"),
        (lambda d: d["items"][0].update(id="i1"), "twice"),
        (lambda d: d["items"][0].update(image="../x.png"), "inside the folder"),
        (lambda d: d["items"][0].update(image="/x.png"), "inside the folder"),
        (lambda d: d["items"][0].update(image="images/none.png"), "missing"),
    ],
)
def test_a_wrong_task_is_one_clear_line(change, words, tmp_path):
    content = document("1", "2")
    write(tmp_path, content)
    change(content)
    (tmp_path / "task.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match=words) as caught:
        load_task(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_task_json(tmp_path):
    with pytest.raises(InputError, match=r"task\.json: missing"):
        load_task(tmp_path)


def test_a_task_nested_too_deep(tmp_path):
    (tmp_path / "task.json").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(InputError, match=r"task\.json: .*recursion"):
        load_task(tmp_path)


def scored(*pairs):
    """Of (expected, reference, answer)."""
    items = [Item(str(n), "x.png", "?", expected, f"k{n % 2}") for n, (expected, _, _) in enumerate(pairs)]
    answers = [
        Answer(item, answer, reference, num_tokens=10, seconds=0.5)
        for item, (_, reference, answer) in zip(items, pairs, strict=True)
    ]
    return score(Task(TASK_SCHEMA, "toy", "exact_match", 8, tuple(items)), answers)


def test_flips_count_in_both_directions():
    found = scored(("1", "1", "1"), ("2", "2", "x"), ("3", "x", "3"), ("4", "x", "y"))
    assert found.exact_match == 0.5
    assert found.reference_exact_match == 0.5
    assert found.recovery == 1.0  # which hides that two items changed sides
    assert (found.num_lost, found.num_gained, found.flips) == (1, 1, 0.5)
    assert (found.num_changed, found.changed) == (3, 0.75)
    assert found.by_kind == {"k0": 1.0, "k1": 0.0}
    assert found.tokens_per_second == pytest.approx(20.0)
    assert [answer["expected"] for answer in found.answers] == ["1", "2", "3", "4"]


def test_white_space_at_the_ends_is_no_part_of_an_answer():
    assert scored(("a b", " a b\n", "a b")).changed == 0
    assert scored(("a b", "a b", " a b\n")).exact_match == 1
    assert scored(("a b", "a b", "a  b")).exact_match == 0


def test_a_reference_that_is_never_right_recovers_nothing():
    assert math.isnan(scored(("1", "x", "1")).recovery)


def test_float32_answers_as_pytorch_does(package_tiny_b, tmp_path, capsys):
    package = shutil.copytree(package_tiny_b, tmp_path / "package")
    task = write(tmp_path / "task", document("a", "b", "c"))
    reference = str(GOLDENS / "tiny_b")
    arguments = ["validate", str(package), "--reference", reference, "--task", str(task)]
    arguments += ["--report", str(tmp_path / "report"), "--variant", "fp32", "int4"]
    main(arguments)
    printed = capsys.readouterr().out
    assert "exact match" in printed
    assert printed.count("What?") == 2  # two items, with each variant's answer
    assert printed.count("PyTorch") == 2
    document_ = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    float32, int4 = document_["variants"]
    assert float32["outcome"] == "PASS"
    assert float32["task"]["num_changed"] == 0
    assert float32["task"]["num_items"] == 3
    assert float32["task"]["tokens_per_second"] > 0
    rows, low = ({row["stage"]: row["values"] for row in variant["rows"]} for variant in (float32, int4))
    assert rows["answer_logits"]["max_abs"] < 1e-4
    assert rows["answer_logits"]["kl_mean"] < low["answer_logits"]["kl_mean"]
    assert rows["answers"]["changed"] == 0
    assert "exact match" in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
