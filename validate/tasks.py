"""Task folders: questions with known answers, asked of the reference and of each variant, and scored.

    DIR/samples.jsonl   a line a question: {"id", "messages", "answers", "kind"?, "scorer"?}, media by paths inside DIR;
                        the format of calibration data (quant.samples), whose answers are needed here
    DIR/task.json       may be missing: {"schema": "vlmport-task/2", "name", "scorer", "max_new_tokens"}

A sample without a scorer of its own is scored by the task's. Flips (arXiv 2407.09141) are samples that become right or
wrong: equal accuracy can hide them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..quant.samples import SAMPLES_NAME, CalibrationSample, load_samples, media_files
from ..runtime.errors import InputError
from ..runtime.messages import read_messages
from ..runtime.schema import SchemaError, from_json
from .intervals import Ratio, ratio
from .judged import JudgedFiles, hash_files
from .report import TaskScore
from .samples import Sample
from .scorers import SCORERS, Scorer

__all__ = [
    "TASK_NAME",
    "TASK_SCHEMA",
    "Answer",
    "Item",
    "Task",
    "TaskSettings",
    "load_task",
    "score",
    "task_samples",
]

TASK_NAME = "task.json"
TASK_SCHEMA = "vlmport-task/2"
_ALL = 2**31  # samples
_SOURCES = ("image", "image_url", "video", "video_url", "path", "url")  # of a message part


@dataclass(frozen=True)
class TaskSettings:
    """task.json. Every field has a default, so that a folder with samples alone is a task."""

    schema: str = TASK_SCHEMA
    name: str = ""  # the folder's, if empty
    scorer: str = "exact_match"
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        if self.schema != TASK_SCHEMA:
            raise ValueError(f"schema {self.schema!r} is not {TASK_SCHEMA!r}")
        if self.scorer not in SCORERS:
            raise ValueError(f"scorer {self.scorer!r} is none of {', '.join(SCORERS)}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens} is not at least 1")


@dataclass(frozen=True)
class Item:
    """One question. `image` (path inside the folder, or empty) and `question` are for a report's reader."""

    id: str
    messages: tuple[Mapping[str, Any], ...]
    answers: tuple[str, ...]
    kind: str  # what is asked, for the score by kind; may be empty
    scorer: Scorer
    image: str
    question: str


@dataclass(frozen=True)
class Task:
    name: str
    scorer: str
    max_new_tokens: int
    items: tuple[Item, ...]
    files: JudgedFiles = field(default_factory=lambda: JudgedFiles(Path(), {}, {}))  # settings, questions, media


@dataclass(frozen=True)
class Answer:
    """A variant's answer to one item, beside the reference's."""

    item: Item
    text: str
    reference_text: str
    num_tokens: int  # decoded after the first
    seconds: float  # for those

    @property
    def score(self) -> float:
        return self.item.scorer.score(self.text, self.item.answers)

    @property
    def reference_score(self) -> float:
        return self.item.scorer.score(self.reference_text, self.item.answers)

    @property
    def right(self) -> bool:
        return self.item.scorer.is_right(self.score)

    @property
    def reference_right(self) -> bool:
        return self.item.scorer.is_right(self.reference_score)

    @property
    def changed(self) -> bool:
        return self.text.strip() != self.reference_text.strip()


def load_task(folder: Path) -> Task:
    """Reads a task folder, strictly; every file that a sample names must be inside it. Raises InputError."""
    file = folder / SAMPLES_NAME
    texts = hash_files(folder, [name for name in (SAMPLES_NAME, TASK_NAME) if (folder / name).is_file()])
    settings = _settings(folder / TASK_NAME)
    samples = load_samples(folder, num_samples=_ALL, seed=0)
    ids = [sample.id for sample in samples]
    if twice := next((name for name in ids if ids.count(name) > 1), None):
        raise InputError(f"{file}: id {twice!r} is there twice; each sample needs one of its own")
    shown = {path.resolve() for sample in samples for path in media_files(folder, sample.messages)}
    media = hash_files(folder, sorted(path.relative_to(folder.resolve()).as_posix() for path in shown))
    return Task(
        name=settings.name or folder.resolve().name,
        scorer=settings.scorer,
        max_new_tokens=settings.max_new_tokens,
        items=tuple(_item(folder, file, sample, settings) for sample in samples),
        files=JudgedFiles(folder, {**texts.sha256, **media.sha256}, {**texts.states, **media.states}),
    )


def task_samples(task: Task, folder: Path) -> tuple[Sample, ...]:
    """One prompt an item, its media as absolute paths."""
    return tuple(
        Sample(
            id=item.id,
            messages=tuple(_absolute(message, folder) for message in item.messages),
            max_new_tokens=task.max_new_tokens,
            ignore_eos=False,
        )
        for item in task.items
    )


def score(task: Task, answers: Sequence[Answer]) -> TaskScore:
    """Adds up the answers of one variant, of which there is at least one."""
    count = len(answers)
    lost = [answer for answer in answers if answer.reference_right and not answer.right]
    gained = [answer for answer in answers if answer.right and not answer.reference_right]
    kinds = dict.fromkeys(answer.item.kind for answer in answers)
    by_kind = {kind: [answer.score for answer in answers if answer.item.kind == kind] for kind in kinds}
    seconds = sum(answer.seconds for answer in answers)
    intervals = {name: _ratio(answers, above, below) for name, (above, below) in _RATIOS.items()}
    return TaskScore(
        task=task.name,
        scorer=task.scorer,
        num_items=count,
        score=intervals["score"].value,
        by_kind={kind: sum(scores) / len(scores) for kind, scores in by_kind.items()},
        reference_score=intervals["reference_score"].value,
        recovery=intervals["recovery"].value,
        num_lost=len(lost),
        num_gained=len(gained),
        flips=intervals["flips"].value,
        num_changed=sum(answer.changed for answer in answers),
        changed=intervals["changed"].value,
        tokens_per_second=sum(answer.num_tokens for answer in answers) / seconds if seconds > 0 else 0.0,
        intervals=intervals,
        answers=tuple(_record(answer) for answer in answers),
    )


# Numerator and denominator an answer; `recovery` is paired, both from the same samples.
_RATIOS: Mapping[str, tuple[Callable[[Answer], float], Callable[[Answer], float]]] = {
    "score": (lambda answer: answer.score, lambda _: 1.0),
    "reference_score": (lambda answer: answer.reference_score, lambda _: 1.0),
    "recovery": (lambda answer: answer.score, lambda answer: answer.reference_score),
    "flips": (lambda answer: answer.right != answer.reference_right, lambda _: 1.0),
    "lost": (lambda answer: answer.reference_right and not answer.right, lambda _: 1.0),
    "gained": (lambda answer: answer.right and not answer.reference_right, lambda _: 1.0),
    "changed": (lambda answer: answer.changed, lambda _: 1.0),
}


def _ratio(answers: Sequence[Answer], above: Callable[[Answer], float], below: Callable[[Answer], float]) -> Ratio:
    return ratio(np.array([above(a) for a in answers], float), np.array([below(a) for a in answers], float))


def _settings(file: Path) -> TaskSettings:
    try:
        return from_json(TaskSettings, json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return TaskSettings()
    except NotADirectoryError:
        raise InputError(f"{file.parent}: is no folder; --task takes one with a {SAMPLES_NAME}") from None
    except (SchemaError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{file}: {error}") from error


def _item(folder: Path, file: Path, sample: CalibrationSample, settings: TaskSettings) -> Item:
    where = f"{file}: sample {sample.id!r}"
    if not sample.answers:
        raise InputError(f"{where}: answers is missing or empty; a task needs at least one right answer")
    name = sample.scorer or settings.scorer
    if name not in SCORERS:
        raise InputError(f"{where}: scorer {name!r} is none of {', '.join(SCORERS)}")
    read = read_messages(sample.messages, folder=folder)
    images = [visual.source for visual in read.visuals if visual.kind == "image"]
    paths = [Path(source) for source in images if isinstance(source, (str, Path)) and Path(source).is_file()]
    texts = [
        message["content"] if isinstance(message["content"], str) else _texts(message["content"])
        for message in read.messages
        if message["role"] == "user"
    ]
    return Item(
        id=sample.id,
        messages=sample.messages,
        answers=sample.answers,
        kind=sample.kind or "",
        scorer=SCORERS[name],
        image=paths[0].resolve().relative_to(folder.resolve()).as_posix() if paths else "",
        question=" ".join(filter(None, texts)),
    )


def _texts(parts: Sequence[Mapping[str, Any]]) -> str:
    return " ".join(part["text"] for part in parts if part["type"] == "text")


def _absolute(message: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The message with its files named from the root; load_samples has checked that they are inside the folder."""
    content = message["content"]
    if isinstance(content, str):
        return dict(message)
    return {**message, "content": [_absolute_part(part, folder) for part in content]}


def _absolute_part(part: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    return {
        key: _absolute_part(value, folder)
        if isinstance(value, Mapping)
        else _absolute_source(value, folder)
        if key in _SOURCES
        else value
        for key, value in part.items()
    }


def _absolute_source(value: Any, folder: Path) -> Any:
    """A path, or those of a clip's frames."""
    if isinstance(value, list):
        return [_absolute_source(each, folder) for each in value]
    return str(folder / value) if isinstance(value, str) and not value.startswith("data:") else value


def _record(answer: Answer) -> dict[str, Any]:
    return {
        "id": answer.item.id,
        "kind": answer.item.kind,
        "image": answer.item.image,
        "question": answer.item.question,
        "expected": answer.item.answers[0],
        "reference": answer.reference_text,
        "answer": answer.text,
        "score": answer.score,
        "right": answer.right,
        "reference_right": answer.reference_right,
    }
