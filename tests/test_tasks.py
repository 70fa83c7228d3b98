"""Task folders: strict reading, exact match, flips in both directions."""

import json
import math
import shutil
from pathlib import Path

import pytest

from vlmport.cli.main import main
from vlmport.runtime.errors import InputError
from vlmport.validate.samples import draw_picture
from vlmport.validate.scorers import SCORERS
from vlmport.validate.tasks import TASK_SCHEMA, Answer, Item, Task, load_task, score, task_samples

GOLDENS = Path(__file__).parent / "goldens" / "qwen2_5_vl"


def lines(*answers):
    return [
        {
            "id": f"i{n}",
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": f"images/{n}.png"}, {"type": "text", "text": "What?"}],
                }
            ],
            "answers": [answer],
            "kind": f"k{n % 2}",
        }
        for n, answer in enumerate(answers)
    ]


SETTINGS = {"schema": TASK_SCHEMA, "name": "toy", "scorer": "exact_match", "max_new_tokens": 6}


def write(folder, samples, settings=SETTINGS):
    (folder / "images").mkdir(parents=True, exist_ok=True)
    if settings is not None:
        (folder / "task.json").write_text(json.dumps(settings), encoding="utf-8")
    text = "\n".join(json.dumps(sample) for sample in samples)
    (folder / "samples.jsonl").write_text(text + "\n", encoding="utf-8")
    for number in range(2):
        draw_picture(number, 60 + 20 * number, 56).save(folder / "images" / f"{number}.png")
    return folder


def test_a_task_becomes_prompts(tmp_path):
    task = load_task(write(tmp_path, lines("1", "2")))
    samples = task_samples(task, tmp_path)
    assert [sample.id for sample in samples] == ["i0", "i1"]
    picture, question = samples[1].messages[0]["content"]
    assert picture == {"type": "image", "image": str(tmp_path / "images" / "1.png")}
    assert question == {"type": "text", "text": "What?"}
    assert samples[0].max_new_tokens == 6
    assert not samples[0].ignore_eos
    assert (task.items[1].image, task.items[1].question) == ("images/1.png", "What?")


def test_samples_alone_are_a_task(tmp_path):
    """The forms of OpenAI's API too: a text instead of parts, an image as a URL, several right answers."""
    url = {"type": "image_url", "image_url": {"url": "images/0.png"}}
    samples = [
        {"id": "text", "messages": [{"role": "user", "content": "2 + 2?"}], "answers": ["4", "four"]},
        {"id": "url", "messages": [{"role": "user", "content": [url]}], "answers": ["B"], "scorer": "multiple_choice"},
    ]
    task = load_task(write(tmp_path / "mine", samples, settings=None))
    assert (task.name, task.scorer) == ("mine", "exact_match")
    assert task.items[0].scorer.score("four", task.items[0].answers) == 1
    assert task.items[1].scorer.score("(b) or rather B.", task.items[1].answers) == 1
    first, second = task_samples(task, tmp_path / "mine")
    assert first.messages == ({"role": "user", "content": "2 + 2?"},)
    assert second.messages[0]["content"][0]["image_url"]["url"] == str(tmp_path / "mine" / "images" / "0.png")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(schema="vlmport-task/1"), "vlmport-task/1"),
        (lambda d: d.update(scorer="bleu"), "bleu.* none of exact_match, anls"),
        (lambda d: d.update(extra=1), "extra"),
        (lambda d: d.update(max_new_tokens=0), "max_new_tokens"),
    ],
)
def test_wrong_settings_are_one_clear_line(change, words, tmp_path):
    settings = dict(SETTINGS)
    change(settings)
    with pytest.raises(InputError, match=words) as caught:
        load_task(write(tmp_path, lines("1", "2"), settings))
    assert str(caught.value).startswith(str(tmp_path / "task.json"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.clear(), "empty"),
        (lambda s: s[0].pop("answers"), "answers is missing"),
        (lambda s: s[0].update(answers=3), "answers"),
        (lambda s: s[0].update(id="i1"), "'i1' is there twice"),
        (lambda s: s[0].update(scorer="bleu"), "bleu"),
        (lambda s: s[0].update(extra=1), "extra"),
        (lambda s: s[0]["messages"][0]["content"][0].update(image="../x.png"), "outside the folder"),
        (lambda s: s[0]["messages"][0]["content"][0].update(image="images/none.png"), "missing"),
        (lambda s: s[0]["messages"][0]["content"][0].update(image="http://a/x.png"), "network|fetch|address"),
    ],
)
def test_a_wrong_sample_is_one_clear_line(change, words, tmp_path):
    samples = lines("1", "2")
    change(samples)
    with pytest.raises(InputError, match=words) as caught:
        load_task(write(tmp_path, samples))
    assert str(caught.value).startswith(str(tmp_path / "samples.jsonl"))
    assert "\n" not in str(caught.value)


def test_no_task_there(tmp_path):
    with pytest.raises(InputError, match=r"samples\.jsonl: missing"):
        load_task(tmp_path)


def test_it_names_the_bytes_of_questions_and_media(tmp_path):
    """A picture that changes under the same name is another task; nothing is judged of one that changes meanwhile."""
    clip = {"type": "video", "video": ["images/0.png", "images/1.png"]}
    samples = lines("1")
    samples[0]["messages"][0]["content"].append(clip)
    task = load_task(write(tmp_path, samples))
    assert set(task.files.sha256) == {"samples.jsonl", "task.json", "images/0.png", "images/1.png"}
    (prompt,) = task_samples(task, tmp_path)
    assert prompt.messages[0]["content"][-1]["video"] == [str(tmp_path / name) for name in clip["video"]]
    draw_picture(9, 80, 56).save(tmp_path / "images" / "1.png")
    assert load_task(tmp_path).files.sha256 != task.files.sha256
    with pytest.raises(InputError, match=r"1\.png: changed while it was validated"):
        task.files.check()


def test_settings_nested_too_deep(tmp_path):
    write(tmp_path, lines("1"))
    (tmp_path / "task.json").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(InputError, match=r"task\.json: .*recursion"):
        load_task(tmp_path)


def scored(*pairs, scorer="exact_match"):
    """Of (expected, reference, answer)."""
    items = [
        Item(str(n), (), (expected,), f"k{n % 2}", SCORERS[scorer], "", "?") for n, (expected, _, _) in enumerate(pairs)
    ]
    answers = [
        Answer(item, answer, reference, num_tokens=10, seconds=0.5)
        for item, (_, reference, answer) in zip(items, pairs, strict=True)
    ]
    return score(Task("toy", scorer, 8, tuple(items)), answers)


def test_flips_count_in_both_directions():
    found = scored(("1", "1", "1"), ("2", "2", "x"), ("3", "x", "3"), ("4", "x", "y"))
    assert found.score == 0.5
    assert found.reference_score == 0.5
    assert found.recovery == 1.0  # which hides that two items changed sides
    assert (found.num_lost, found.num_gained, found.flips) == (1, 1, 0.5)
    assert (found.num_changed, found.changed) == (3, 0.75)
    assert found.by_kind == {"k0": 1.0, "k1": 0.0}
    assert found.tokens_per_second == pytest.approx(20.0)
    assert [answer["expected"] for answer in found.answers] == ["1", "2", "3", "4"]
    low, high = found.intervals["flips"].ci_low, found.intervals["flips"].ci_high
    assert 0 <= low < 0.5 < high <= 1
    for name in ("lost", "gained"):
        share = found.intervals[name]
        assert (share.value, share.num_samples) == (0.25, 4), name
        assert 0 <= share.ci_low < 0.25 < share.ci_high <= 1, name


def test_scores_in_between_are_averaged_and_right_from_the_scorers_own_limit():
    found = scored(("hello", "hello", "hella"), ("hello", "hello", "world"), scorer="anls")
    assert found.score == pytest.approx(0.4)
    assert (found.reference_score, found.recovery) == (1.0, pytest.approx(0.4))
    assert (found.num_lost, found.num_changed) == (1, 2)


def test_white_space_at_the_ends_is_no_part_of_an_answer():
    assert scored(("a b", " a b\n", "a b")).changed == 0
    assert scored(("a b", "a b", " a b\n")).score == 1
    assert scored(("a b", "a b", "a  b")).score == 0


def test_a_reference_that_is_never_right_recovers_nothing():
    assert math.isnan(scored(("1", "x", "1")).recovery)


def test_float32_answers_as_pytorch_does(package_tiny_b, tmp_path, capsys):
    package = shutil.copytree(package_tiny_b, tmp_path / "package")
    task = write(tmp_path / "task", lines("a", "b"))
    reference = str(GOLDENS / "tiny_b")
    arguments = ["validate", str(package), "--reference", reference, "--task", str(task), "--no-insides"]
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
    assert float32["task"]["num_items"] == 2
    assert float32["task"]["tokens_per_second"] > 0
    rows, low = ({row["stage"]: row["values"] for row in variant["rows"]} for variant in (float32, int4))
    assert rows["answer_logits"]["max_abs"] < 1e-4
    assert rows["answer_logits"]["kl_mean"] < low["answer_logits"]["kl_mean"]
    assert rows["answers"]["changed"] == 0
    assert "exact match" in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
