"""Task folders: questions about images with exact answers, asked of the reference and of each variant.

    DIR/task.json = {"schema": "vlmport-task/1", "name": "...", "metric": "exact_match", "max_new_tokens": 48,
                     "items": [{"id", "image": "images/0000.png", "question", "answer", "kind"}, ...]}

An answer is right when it equals the expected one, white space at both ends aside. Flips (arXiv 2407.09141) are items
whose correctness changes in either direction: equal accuracy can hide them.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from ..runtime.errors import InputError
from ..runtime.generate import Generation, GenerationOptions
from ..runtime.model import Model
from ..runtime.prepare import Prepared
from ..runtime.sample import SamplingParams
from ..runtime.schema import SchemaError, from_json
from .compare import Comparison, compare_logits
from .reference import ReferenceRun
from .report import TaskScore
from .samples import Sample
from .stages import logits_without_cache

__all__ = ["TASK_SCHEMA", "Answer", "Item", "Task", "ask", "load_task", "score", "task_samples"]

TASK_SCHEMA = "vlmport-task/1"


@dataclass(frozen=True)
class Item:
    id: str
    image: str  # path inside the task folder
    question: str
    answer: str
    kind: str  # what is asked, for the score by kind


@dataclass(frozen=True)
class Task:
    schema: str
    name: str
    metric: Literal["exact_match"]
    max_new_tokens: int
    items: tuple[Item, ...]

    def __post_init__(self) -> None:
        if self.schema != TASK_SCHEMA:
            raise ValueError(f"schema {self.schema!r} is not {TASK_SCHEMA!r}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens} is not at least 1")
        if not self.items:
            raise ValueError("items is empty; a task has at least one")
        ids = [item.id for item in self.items]
        if twice := next((name for name in ids if ids.count(name) > 1), None):
            raise ValueError(f"items: id {twice!r} is there twice")


@dataclass(frozen=True)
class Answer:
    """A variant's answer to one item, beside the reference's."""

    item: Item
    text: str
    reference_text: str
    num_tokens: int  # decoded after the first
    seconds: float  # for those

    @property
    def right(self) -> bool:
        return self.text.strip() == self.item.answer.strip()

    @property
    def reference_right(self) -> bool:
        return self.reference_text.strip() == self.item.answer.strip()


def load_task(folder: Path) -> Task:
    """Reads task.json, strictly; every image must be a file inside the folder. Raises InputError."""
    file = folder / "task.json"
    try:
        task = from_json(Task, json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{file}: missing; --task takes a folder with a task.json") from None
    except (SchemaError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{file}: {error}") from error
    for item in task.items:
        parts = PurePosixPath(item.image).parts
        if not parts or item.image.startswith("/") or ".." in parts:
            raise InputError(f"{file}: items: {item.id}: image {item.image!r} is not a path inside the folder")
        if not folder.joinpath(*parts).is_file():
            raise InputError(f"{folder.joinpath(*parts)}: missing, though item {item.id} of {file.name} names it")
    return task


def task_samples(task: Task, folder: Path) -> tuple[Sample, ...]:
    """One prompt an item: the image, then the question."""
    return tuple(
        Sample(
            id=item.id,
            messages=(
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": str(folder / item.image)},
                        {"type": "text", "text": item.question},
                    ],
                },
            ),
            max_new_tokens=task.max_new_tokens,
            ignore_eos=False,
        )
        for item in task.items
    )


def ask(model: Model, item: Item, run: ReferenceRun) -> tuple[Answer, Comparison]:
    """One item: the variant's free-running greedy answer, and its logits along the reference's answer.

    The logits come from one prefill of prompt and answer, without the cache: the stage `cache` compares the two ways.
    """
    prepared = model.prepare(run.sample.messages)
    generation = _answer(model, prepared, run.sample)
    visual = model.features(prepared)
    embeds = model.embed(prepared, None if visual is None else visual.features)
    logits = logits_without_cache(model, prepared, embeds, run.generated_ids[:-1])
    answer = Answer(
        item=item,
        text=generation.text,
        reference_text=model.builder.tokenizer.decode(list(run.generated_ids), skip_special_tokens=True),
        num_tokens=max(generation.timings.num_generated_tokens - 1, 0),
        seconds=generation.timings.decode,
    )
    return answer, compare_logits(item.id, "answer_logits", "decode", run.arrays()["step_logits"], logits)


def score(task: Task, answers: Sequence[Answer]) -> TaskScore:
    """Adds up the answers of one variant."""
    count = len(answers)
    lost = [answer for answer in answers if answer.reference_right and not answer.right]
    gained = [answer for answer in answers if answer.right and not answer.reference_right]
    changed = [answer for answer in answers if answer.text.strip() != answer.reference_text.strip()]
    num_right = sum(answer.right for answer in answers)
    num_reference_right = sum(answer.reference_right for answer in answers)
    kinds = dict.fromkeys(answer.item.kind for answer in answers)
    by_kind = {kind: [answer.right for answer in answers if answer.item.kind == kind] for kind in kinds}
    seconds = sum(answer.seconds for answer in answers)
    return TaskScore(
        task=task.name,
        num_items=count,
        exact_match=num_right / count,
        by_kind={kind: sum(right) / len(right) for kind, right in by_kind.items()},
        reference_exact_match=num_reference_right / count,
        recovery=num_right / num_reference_right if num_reference_right else math.nan,
        num_lost=len(lost),
        num_gained=len(gained),
        flips=(len(lost) + len(gained)) / count,
        num_changed=len(changed),
        changed=len(changed) / count,
        tokens_per_second=sum(answer.num_tokens for answer in answers) / seconds if seconds > 0 else 0.0,
        answers=tuple(_record(answer) for answer in answers),
    )


def _answer(model: Model, prepared: Prepared, sample: Sample) -> Generation:
    options = GenerationOptions(sample.max_new_tokens, SamplingParams(temperature=0.0), ignore_eos=sample.ignore_eos)
    return model.stream_prepared(prepared, options).finish()


def _record(answer: Answer) -> dict[str, str]:
    return {
        "id": answer.item.id,
        "kind": answer.item.kind,
        "image": answer.item.image,
        "question": answer.item.question,
        "expected": answer.item.answer,
        "reference": answer.reference_text,
        "answer": answer.text,
    }
