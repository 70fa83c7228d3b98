"""Samples in shards: the reference over some of them, then each variant, and what is kept of them is small.

A shard's arrays are on disk until its variants have run, so neither memory nor disk grows with the number of samples.
With a journal every sample of a variant is on record once it is done, and a later run takes it from there; the
reference runs again only for samples of which a variant is still to come.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from ..runtime.model import Model
from ..runtime.package import Package
from .answers import Asked, answer_freely, ask, compare_answer
from .compare import Choices, Comparison, NotCompared
from .inputs import GivenInputs
from .journal import Journal
from .metrics import LogitErrors, TensorErrors
from .reference import AnsweringReference, ReferenceRun, compare_sample, given_inputs, run_reference
from .samples import Sample
from .tasks import Task

__all__ = ["JOURNAL_TYPES", "Found", "Questions", "compare_in_shards", "provider_of"]

Progress = Callable[[int, int, str], None]
_SHARD = 32  # samples; an answer of 48 tokens over 150 000 words is 29 MB of logits on disk until its variants have run
_KEPT_OPEN = 2 << 30  # bytes of all variants together, up to which they stay loaded from shard to shard


JOURNAL_TYPES = (Comparison, NotCompared, TensorErrors, LogitErrors, Choices, GivenInputs, Asked)


@dataclass
class Found:
    """What is known of one variant after all shards, in the order of the samples."""

    records: list[Comparison | NotCompared] = field(default_factory=list[Comparison | NotCompared])
    answers: list[Asked] = field(default_factory=list[Asked])
    inputs: list[GivenInputs] = field(default_factory=list[GivenInputs])
    provider: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Questions:
    """What is asked: samples, the first of them at every stage, and the task that they are of."""

    samples: Sequence[Sample]
    num_detailed: int
    task: Task | None
    tie_margin: Mapping[str, float]  # by variant, nats


def compare_in_shards(
    package: Package,
    reference: AnsweringReference,
    questions: Questions,
    variants: Sequence[str],
    video_rule: str | None,
    journal: Journal | None,
    progress: Progress,
    prompter: Model | None = None,
) -> dict[str, Found]:
    """Every sample of every variant against the reference. `prompter` prepares the reference's prompts, if it has a
    runtime of its own; else that of the first variant does.
    """
    found = {name: Found() for name in variants}
    shards = _shards(questions, variants, journal)
    total = sum(shard.num_steps for shard in shards)
    starts = accumulate((shard.num_steps for shard in shards), initial=0)
    keep = sum(package.size(name) for name in variants) <= _KEPT_OPEN
    with ExitStack() as opened:
        models: dict[str, Model] = {}
        for shard, start in zip(shards, starts, strict=False):

            def told(done: int, _: int, what: str, start: int = start) -> None:
                progress(start + done, total, what)

            with ExitStack() as closed:
                scope = opened if keep else closed
                for name, records, seconds in _run_shard(
                    package, reference, questions, variants, shard, video_rule, journal, models, scope, told, prompter
                ):
                    _add(found[name], records)
                    found[name].seconds += seconds
                for name in variants:
                    if name in models:
                        found[name].provider = provider_of(models[name])
            if not keep:
                models.clear()
    progress(total, total, "compared")
    return found


Record = Comparison | NotCompared | GivenInputs | Asked


@dataclass(frozen=True)
class _Shard:
    """Some samples, and which (sample, variant) of them are not on record."""

    numbers: range
    missing: frozenset[tuple[str, str]]

    @property
    def num_steps(self) -> int:
        """Of progress: what is on record takes no time, so that what is left is told right after an interruption."""
        return len(self.missing) + len({sample for sample, _ in self.missing})


def _shards(questions: Questions, variants: Sequence[str], journal: Journal | None) -> list[_Shard]:
    found: list[_Shard] = []
    for start in range(0, len(questions.samples), _SHARD):
        numbers = range(start, min(start + _SHARD, len(questions.samples)))
        keys = ((questions.samples[number].id, name) for number in numbers for name in variants)
        found.append(_Shard(numbers, frozenset(key for key in keys if journal is None or key not in journal)))
    return found


def _run_shard(
    package: Package,
    reference: AnsweringReference,
    questions: Questions,
    variants: Sequence[str],
    shard: _Shard,
    video_rule: str | None,
    journal: Journal | None,
    models: dict[str, Model],
    scope: ExitStack,
    progress: Progress,
    prompter: Model | None,
) -> Iterator[tuple[str, list[Record], float]]:
    """(variant, records of one sample, seconds that they took), variants one after the other."""

    def model_of(name: str) -> Model:
        if name not in models:
            models[name] = scope.enter_context(Model.load(package.path, name, video_rule=video_rule))
        return models[name]

    samples, missing = [questions.samples[number] for number in shard.numbers], shard.missing
    with tempfile.TemporaryDirectory(prefix="vlmport-reference-") as folder:
        wanted = [any((sample.id, name) in missing for name in variants) for sample in samples]
        asked = [sample for sample, is_wanted in zip(samples, wanted, strict=True) if is_wanted]
        num_detailed = sum(wanted[: max(questions.num_detailed - shard.numbers.start, 0)])
        runs: dict[str, ReferenceRun] = {}
        if asked:
            runtime = prompter or model_of(variants[0])
            done = run_reference(reference, runtime, asked, num_detailed, Path(folder), progress)
            runs = {run.sample.id: run for run in done}
        num_done = len(asked)
        for name in variants:
            for number, sample in zip(shard.numbers, samples, strict=True):
                if journal is not None and (sample.id, name) not in missing:
                    yield name, journal.read(sample.id, name), 0.0
                    continue
                progress(num_done, 0, f"{name}, {sample.id}")
                num_done += 1
                started = time.perf_counter()
                records = _compare(model_of(name), name, questions, number, runs[sample.id])
                if journal is not None:
                    journal.append(sample.id, name, records)
                yield name, records, time.perf_counter() - started


def _compare(model: Model, name: str, questions: Questions, number: int, run: ReferenceRun) -> list[Record]:
    prepared = model.prepare(run.sample.messages)
    records: list[Record] = [*given_inputs(run, prepared)]
    answer = answer_freely(model, prepared, run.sample)
    if number < questions.num_detailed:
        records += compare_sample(model, prepared, run, answer.token_ids, questions.tie_margin[name])
    if questions.task is not None:
        records.append(compare_answer(model, prepared, run))
    return [*records, ask(model, prepared, run, answer)]


def _add(found: Found, records: Sequence[Record]) -> None:
    for record in records:
        if isinstance(record, Asked):
            found.answers.append(record)
        elif isinstance(record, GivenInputs):
            found.inputs.append(record)
        else:
            found.records.append(record)


def provider_of(model: Model) -> str:
    """What ONNX Runtime runs the graphs with, as the session says."""
    return str(model.session(model.manifest.roles[-1]).raw.get_providers()[0])
