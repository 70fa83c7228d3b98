"""How far a variant is from the checkpoint in PyTorch, by the metrics of `vlmport validate` on a task's questions.

Dims: N answer tokens, V vocabulary, P patches, C tower width.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmport.runtime.model import Model
from vlmport.validate.answers import answer_freely
from vlmport.validate.compare import Comparison, compare_logits, compare_tensors
from vlmport.validate.metrics import TensorErrors
from vlmport.validate.reference import ReferenceModel, ReferenceRun, load_reference, run_reference
from vlmport.validate.stages import run_stages
from vlmport.validate.statistics import summarize_kl
from vlmport.validate.tasks import Answer, Task, load_task, score, task_samples

from .quant_report import Quality

__all__ = ["Reference", "measure_torch", "measure_variant", "reference_runs", "round_trip"]

Progress = Callable[[int, int, str], None]
NUM_DETAILED = 16  # questions whose image is compared behind the vision encoder too


@dataclass(frozen=True)
class Reference:
    """A task, and what the checkpoint in PyTorch answers."""

    task: Task
    runs: tuple[ReferenceRun, ...]


def reference_runs(checkpoint: Path, package: Path, task_folder: Path, folder: Path, progress: Progress) -> Reference:
    """Runs the checkpoint over the task, or reads what an earlier run has left in `folder`."""
    task = load_task(task_folder)
    samples = task_samples(task, task_folder)
    done = folder / "ids.json"
    if done.exists():
        ids = json.loads(done.read_text(encoding="utf-8"))
        known = enumerate(zip(samples, ids, strict=True))
        return Reference(task, tuple(ReferenceRun(s, tuple(kept), folder / f"{i}.npz") for i, (s, kept) in known))
    folder.mkdir(parents=True, exist_ok=True)
    with Model.load(package, "fp32") as model:
        found = run_reference(load_reference(checkpoint), model, samples, NUM_DETAILED, folder, progress)
    done.write_text(json.dumps([run.generated_ids for run in found]), encoding="utf-8")
    return Reference(task, tuple(found))


def measure_variant(package: Path, variant: str, reference: Reference, progress: Progress) -> Quality:
    """A variant of a package, run by this project's runtime: a token at a time, through the cache."""
    records: list[Comparison] = []
    towers: list[Comparison] = []
    answers: list[Answer] = []
    with Model.load(package, variant) as model:
        for number, (item, run) in enumerate(zip(reference.task.items, reference.runs, strict=True)):
            progress(number, len(reference.runs), f"{variant}, {item.id}")
            prepared = model.prepare(run.sample.messages)
            found = run_stages(model, prepared, run.generated_ids[:-1])
            steps = run.arrays()["step_logits"]
            records.append(compare_logits(item.id, "answer_logits", "decode", steps, found.step_logits))
            if number < NUM_DETAILED:
                assert found.vision is not None, item.id
                towers.append(compare_tensors(item.id, "vision", "vision", run.arrays()["vision"], found.vision))
            wanted = model.builder.tokenizer.decode(list(run.generated_ids), skip_special_tokens=True)
            # Where it would choose every token of the reference's answer, that is its answer.
            is_same = found.step_logits.argmax(-1).tolist() == list(run.generated_ids)
            own = wanted if is_same else answer_freely(model, prepared, run.sample).text
            answers.append(Answer(item, own, wanted, 0, 0.0))
    return _quality(records, towers, answers, reference.task)


def measure_torch(candidate: ReferenceModel, package: Path, reference: Reference, progress: Progress) -> Quality:
    """Another model in PyTorch; `package` only prepares the prompts. Its speed is not that of a deployment."""
    records: list[Comparison] = []
    towers: list[Comparison] = []
    answers: list[Answer] = []
    with Model.load(package, "fp32") as model:
        eos = model.manifest.generation.eos_token_ids if model.manifest.generation is not None else ()
        for number, (item, run) in enumerate(zip(reference.task.items, reference.runs, strict=True)):
            progress(number, len(reference.runs), f"PyTorch, {item.id}")
            prepared = model.prepare(run.sample.messages)
            logits, _, _ = candidate.prefill(prepared)
            steps = [logits[-1], *(candidate.step(token) for token in run.generated_ids[:-1])]
            records.append(
                compare_logits(item.id, "answer_logits", "decode", run.arrays()["step_logits"], np.stack(steps))
            )
            if number < NUM_DETAILED:
                tower, _ = candidate.vision(prepared.visuals)
                towers.append(compare_tensors(item.id, "vision", "vision", run.arrays()["vision"], tower))
            ids = _greedy(candidate, candidate.prefill(prepared)[0][-1], eos, run.sample.max_new_tokens)
            decode = model.builder.tokenizer.decode
            own, others = (decode(list(kept), skip_special_tokens=True) for kept in (ids, run.generated_ids))
            answers.append(Answer(item, own, others, 0, 0.0))
    return _quality(records, towers, answers, reference.task)


def round_trip(package: Path, variant: str, maker: ReferenceModel, reference: Reference, progress: Progress) -> float:
    """The largest difference of the logits of an imported checkpoint from those of who made it, along the answers."""
    largest = 0.0
    with Model.load(package, variant) as model:
        for number, run in enumerate(reference.runs[:NUM_DETAILED]):
            progress(number, NUM_DETAILED, run.sample.id)
            prepared = model.prepare(run.sample.messages)
            logits, _, _ = maker.prefill(prepared)
            steps = np.stack([logits[-1], *(maker.step(token) for token in run.generated_ids[:-1])])
            found = run_stages(model, prepared, run.generated_ids[:-1])
            largest = max(largest, float(np.abs(found.step_logits - steps).max()))
            largest = max(largest, float(np.abs(found.prefill_logits - logits).max()))
    return largest


def _greedy(model: ReferenceModel, logits: NDArray[Any], eos: Sequence[int], limit: int) -> list[int]:
    ids = [int(logits.argmax())]
    while len(ids) < limit and ids[-1] not in eos:
        ids.append(int(model.step(ids[-1]).argmax()))
    return ids


def _quality(
    records: Sequence[Comparison],
    towers: Sequence[Comparison],
    answers: Sequence[Answer],
    task: Task,
) -> Quality:
    logits = summarize_kl([record.logits for record in records if record.logits is not None])
    vision = TensorErrors.join([record.tensor for record in towers if record.tensor is not None]).metrics()
    scored = score(task, answers)
    return Quality(
        kl_mean=logits.mean,
        kl_ci_low=logits.ci_low,
        kl_ci_high=logits.ci_high,
        kl_p999=logits.p999,
        same_top1=logits.same_top1,
        exact_match=sum(answer.right for answer in answers) / len(answers),
        reference_exact_match=sum(answer.reference_right for answer in answers) / len(answers),
        num_lost=scored.num_lost,
        num_gained=scored.num_gained,
        flips=scored.flips,
        vision_cosine_p1=vision.cosine_p1,
    )
