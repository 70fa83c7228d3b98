"""Golden cases against a variant: every stage that both sides have, for cases, batches and alternatives.

The variant gets the request alone. Its steps are teacher-forced with upstream's ids, so that one flipped token does not
hide the logits behind it; the ids themselves are compared free-running.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.errors import VlmportError
from ..runtime.generate import GenerationOptions
from ..runtime.model import Model
from ..runtime.positions import VIDEO_RULES
from ..runtime.prepare import Prepared
from ..runtime.sample import SamplingParams
from .candidate import Key, candidate_stages, upstream_ids, visible_tokens
from .compare import (
    Choices,
    Comparison,
    NotCompared,
    compare_generation,
    compare_ids,
    compare_logits,
    compare_tensors,
)
from .golden import AlternativeCase, Batch, Case, Generating, Golden, HashEntry, StageEntry, request_messages
from .golden_rows import at_visible, is_joint, joined, row_of, token_axis, unpadded
from .metrics import margins
from .stages import run_stages

__all__ = ["compare_golden", "compare_hash"]

Array = NDArray[Any]
Record = Comparison | NotCompared
# Upstream's name of a stage -> its gates. A stage that is not here and is an integer is exact; `extra.*` floats are
# inner values of the vision encoder.
_KINDS = {
    "pixel_values": "pixels",
    "patch_embed": "vision",
    "vision": "vision",
    "projector": "projector",
    "projector_image": "projector",
    "projector_video": "projector",
    "inputs_embeds": "embeddings",
    "prefill_logits": "prompt",
    "prefill_logits_last": "prefill",
    "step_logits": "decode",
    "past_key": "past",
    "past_value": "past",
}
_HIDDEN = "upstream hides them from all other tokens, so they are left out"
_LOGITS = ("prefill_logits", "prefill_logits_last", "step_logits")
_IDS = "extra.generated_ids"
_MROPE_ALTERNATIVE = re.compile(r"mrope_transformers_(\d+\.\d+)(\.\d+)*")
_PENALTY_ALTERNATIVE = re.compile(r"repetition_penalty_[0-9.]+")


@dataclass(frozen=True)
class _Run:
    """What the variant made of one case."""

    stages: Mapping[Key, Array]
    input_ids: Array  # as upstream's generate gets them
    generated_ids: tuple[int, ...]
    visible: Array  # bool, one a token of input_ids


def compare_golden(
    golden: Golden,
    load: Callable[[str | None], Model],
    tie_margin: float,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Record]:
    """All records of one golden folder. `load` gives the variant under a rule of runtime.positions (None: its own).

    tie_margin: in nats; a free run that leaves the reference where its margin is not above this has met a tie.
    """
    records: list[Record] = []
    runs: dict[str, _Run] = {}
    model = load(None)
    for number, (name, case) in enumerate(golden.cases.items()):
        if progress is not None:
            progress(number, len(golden.cases), name)
        run = _run(golden, case, case.generation, case.generated_ids, model, name, records)
        if run is not None:
            runs[name] = run
            records += _compare_case(golden, name, case, run, tie_margin)
    for name, batch in golden.batches.items():
        records += _compare_batch(golden, name, batch, runs, tie_margin)
    for name, alternative in golden.alternatives.items():
        rule, reason = _rule_of(name, model)
        if reason:
            records.append(NotCompared(name, "all", reason))
            continue
        other = model if rule is None else load(rule)
        for case_name, case in alternative.cases.items():
            records += _compare_alternative(golden, f"{case_name}@{name}", case_name, case, other, tie_margin)
    return records


def _run(
    golden: Golden,
    case: Case,
    setting: Generating | None,
    generated_ids: Sequence[int] | None,
    model: Model,
    sample: str,
    records: list[Record],
) -> _Run | None:
    """Runs one request. What cannot be run becomes a record: of another kind of model, or refused by the runtime."""
    messages = request_messages(golden, case)
    if messages is None or setting is None or generated_ids is None:
        records.append(NotCompared(sample, "all", "the request is no conversation, and the package has only those"))
        return None
    if setting.do_sample:
        records.append(NotCompared(sample, "generated_ids", "sampled by upstream's own random numbers"))
    try:
        prepared = model.prepare(messages, dict(case.request.get("options", {})))
        stages = run_stages(model, prepared, generated_ids[:-1])
        ids = _generate(model, prepared, setting)
    except VlmportError as error:
        records.append(Comparison(sample, "request", "exact", num_values=1, num_different=1, note=str(error)))
        return None
    return _Run(candidate_stages(model, prepared, stages), upstream_ids(prepared), ids, visible_tokens(prepared))


def _generate(model: Model, prepared: Prepared, setting: Generating) -> tuple[int, ...]:
    sampling = SamplingParams(temperature=0.0, repetition_penalty=setting.repetition_penalty)
    options = GenerationOptions(setting.max_new_tokens, sampling, ignore_eos=setting.ignore_eos)
    return model.stream_prepared(prepared, options).finish().token_ids


def _compare_case(golden: Golden, name: str, case: Case, run: _Run, tie_margin: float) -> list[Record]:
    records: list[Record] = []
    if case.input_ids is not None:
        records.append(compare_ids(name, "input_ids", np.array(case.input_ids), run.input_ids))
    for entry in case.stages:
        if entry.stage != _IDS:  # the same as generated_ids of the JSON, which is compared below
            records += _compare_entry(name, entry, golden.tensors[entry.tensor], run.stages, run.visible)
    for entry in case.hashes.values():
        if token_axis(entry.stage) is not None and not run.visible.all():
            records.append(NotCompared(name, f"{entry.stage} (hash) of hidden tokens", _HIDDEN))
            continue
        records += compare_hash(name, entry, case.stages, run.stages)
    if case.prefill_argmax is not None:
        records.append(_compare_argmax(name, case.prefill_argmax, run, tie_margin))
    records += _compare_generation(golden, name, case, case.stages, run, tie_margin)
    return records


def _compare_generation(
    golden: Golden, name: str, case: Case | AlternativeCase, entries: Sequence[StageEntry], run: _Run, tie_margin: float
) -> list[Record]:
    if case.generated_ids is None or case.generation is None or case.generation.do_sample:
        return []
    whole = [golden.tensors[e.tensor] for e in entries if e.stage == "step_logits" and e.part is None]
    logits = whole[0] if whole and case.generation.repetition_penalty == 1.0 else None
    return [compare_generation(name, case.generated_ids, run.generated_ids, logits, tie_margin)]


def _compare_alternative(
    golden: Golden, sample: str, case_name: str, case: AlternativeCase, model: Model, tie_margin: float
) -> list[Record]:
    records: list[Record] = []
    run = _run(golden, golden.cases[case_name], case.generation, case.generated_ids, model, sample, records)
    if run is None:
        return records
    for entry in case.stages:
        if entry.stage != _IDS:
            records += _compare_entry(sample, entry, golden.tensors[entry.tensor], run.stages, run.visible)
    return records + _compare_generation(golden, sample, case, case.stages, run, tie_margin)


def _compare_batch(
    golden: Golden, name: str, batch: Batch, runs: Mapping[str, _Run], tie_margin: float
) -> list[Record]:
    """Each row alone against its row of the padded batch: the runtime needs no batch to answer several prompts."""
    records: list[Record] = []
    mask = unpadded(np.array(batch.attention_mask, dtype=bool))
    ids = np.array(batch.input_ids)
    if all(case in runs for case in batch.rows):
        records += _compare_joint(golden, name, batch, [runs[case].stages for case in batch.rows])
    for row, case_name in enumerate(batch.rows):
        sample = f"{name}[{row}] {case_name}, row alone"
        run = runs.get(case_name)
        if run is None:
            records.append(NotCompared(sample, "all", "its case could not be run"))
            continue
        records.append(compare_ids(sample, "input_ids", ids[row][mask[row]], run.input_ids))
        step_logits = None
        for entry in batch.stages:
            if is_joint(entry):
                continue
            array = row_of(entry, golden.tensors[entry.tensor], row, mask)
            if entry.stage == "step_logits" and entry.part is None:
                step_logits = array
            if entry.stage in ("extra.rope_deltas", "extra.attention_mask"):
                records.append(NotCompared(sample, entry.stage, "counts the padding of the batch"))
            elif entry.stage not in (_IDS, "extra.input_ids"):
                records += _compare_entry(sample, entry, array, run.stages, run.visible)
        ids_row = batch.generated_ids[row]
        records.append(compare_generation(sample, ids_row, run.generated_ids, step_logits, tie_margin))
    return records


def _compare_joint(golden: Golden, name: str, batch: Batch, rows: Sequence[Mapping[Key, Array]]) -> list[Record]:
    """What a batch has of all rows at once, against the rows alone, one after the other."""
    stages, sample = joined(rows), f"{name}, rows alone"
    records: list[Record] = []
    for entry in filter(is_joint, batch.stages):
        records += _compare_entry(sample, entry, golden.tensors[entry.tensor], stages, np.ones(0, bool))
    for key, entry in batch.hashes.items():
        found = stages.get((entry.stage, entry.modality, entry.index))
        if found is not None and found.shape == entry.shape:
            records += compare_hash(sample, entry, batch.stages, stages)
        else:
            records.append(NotCompared(name, f"{key} (hash)", "is of the padded batch as a whole"))
    return records


def _compare_entry(
    sample: str, entry: StageEntry, reference: Array, stages: Mapping[Key, Array], visible: Array
) -> list[Record]:
    """One record, and one more where tokens are hidden that the stage has rows for."""
    candidate = stages.get((entry.stage, entry.modality, entry.index))
    if candidate is None:
        return [NotCompared(sample, entry.stage, "the package's graphs and runtime do not give it")]
    axis = token_axis(entry.stage)
    hidden: list[Record] = []
    if axis is not None and not visible.all():
        reference, candidate = at_visible(entry, axis, reference, candidate, visible)
        hidden.append(NotCompared(sample, f"{entry.stage} of hidden tokens", _HIDDEN))
    elif entry.part is not None:
        candidate = candidate[(slice(None),) * entry.part.axis + (slice(entry.part.start, entry.part.stop),)]
    if _leaves_out_pixels(entry.stage, reference.shape, candidate.shape):
        reference = reference[..., : candidate.shape[-2], : candidate.shape[-1]]
    if np.issubdtype(reference.dtype, np.integer):
        return [compare_ids(sample, entry.stage, reference, candidate), *hidden]
    kind = _KINDS.get(entry.stage.split(".")[0], "vision")
    compare = compare_logits if entry.stage in _LOGITS else compare_tensors
    return [compare(sample, entry.stage, kind, reference, candidate), *hidden]


def compare_hash(
    sample: str, entry: HashEntry, entries: Sequence[StageEntry], stages: Mapping[Key, Array]
) -> list[Record]:
    """The sha256 of pixels; the statistics of a stage whose tensor is not stored. Other hashes hold no news."""
    stored = any(
        e.stage == entry.stage and e.modality == entry.modality and e.index == entry.index and e.part is None
        for e in entries
    )
    digest = entry.sha256_f32 or entry.sha256_u8
    is_pixels = entry.stage in ("pixel_values", "pixels_u8")
    if stored and not (is_pixels and digest):
        return []  # the tensor itself is compared
    if not is_pixels and (entry.mean, entry.std, entry.min, entry.max) == (None,) * 4:
        return [NotCompared(sample, f"{entry.stage} (hash)", "results of float arithmetic have no bits to compare")]
    candidate = stages.get((entry.stage, entry.modality, entry.index))
    if candidate is None:
        return [NotCompared(sample, f"{entry.stage} (hash)", "the package's graphs and runtime do not give it")]
    if _leaves_out_pixels(entry.stage, entry.shape, candidate.shape):
        return [
            NotCompared(sample, f"{entry.stage} (hash)", "counts pixels that make no whole patch, and are left out")
        ]
    if digest is not None and is_pixels:
        dtype = np.float32 if entry.sha256_f32 else np.uint8
        same = (
            candidate.shape == entry.shape and digest == hashlib.sha256(candidate.astype(dtype).tobytes()).hexdigest()
        )
        note = "" if same else "bytes differ from upstream's"
        stage = f"{entry.stage} (sha256)"
        return [Comparison(sample, stage, "exact", num_values=1, num_different=int(not same), note=note)]
    # Four numbers are no distributions: statistics of logits have the limits of tensors.
    kind = "past" if entry.stage in _LOGITS else _KINDS.get(entry.stage.split(".")[0], "vision")
    if candidate.shape != entry.shape:
        return [compare_tensors(sample, f"{entry.stage} (hash)", kind, np.broadcast_to(0.0, entry.shape), candidate)]
    values = candidate.astype(np.float64)
    recorded = {"mean": entry.mean, "std": entry.std, "min": entry.min, "max": entry.max}
    known = {name: value for name, value in recorded.items() if value is not None}
    reference = np.array(list(known.values()), dtype=np.float64)
    found = np.array([getattr(values, name)() for name in known])
    return [compare_tensors(sample, f"{entry.stage} ({', '.join(known)})", kind, reference, found)]


def _leaves_out_pixels(stage: str, whole: tuple[int, ...], seen: tuple[int, ...]) -> bool:
    """Does the reference have pixels at the right and bottom that make no whole patch, so that no graph reads them?"""
    frames = stage in ("pixel_values", "pixels_u8") and len(whole) == len(seen) >= 3 and whole[:-2] == seen[:-2]
    return (
        frames
        and all(0 <= long - short < short for long, short in zip(whole[-2:], seen[-2:], strict=True))
        and (whole != seen)
    )


def _compare_argmax(sample: str, reference: Sequence[int], run: _Run, tie_margin: float) -> Comparison:
    """First choices at every position of the prefill. Upstream records no margins there, so the variant's own count."""
    logits = run.stages["prefill_logits", None, None]
    found, expected = logits.argmax(axis=-1), np.array(reference)
    if len(expected) == len(run.visible):
        expected = expected[run.visible]
    if found.shape != expected.shape:
        return compare_ids(sample, "prefill_argmax", expected, found, "argmax")
    same = found == expected
    choices = Choices(same, ~same & (margins(logits) <= tie_margin))
    different = int((~same).sum())
    return Comparison(
        sample, "prefill_argmax", "argmax", num_values=len(expected), num_different=different, choices=choices
    )


def _rule_of(name: str, model: Model) -> tuple[str | None, str]:
    """(the rule of positions that an alternative's name asks for, why it cannot be run)."""
    if _PENALTY_ALTERNATIVE.fullmatch(name):
        return None, ""
    match = _MROPE_ALTERNATIVE.fullmatch(name)
    rule = f"transformers-{match[1]}" if match else ""
    if rule not in VIDEO_RULES:
        return None, "no rule of the runtime goes by this name"
    if model.manifest.positions is None or model.manifest.positions.video_rule is None:
        return None, "the package's positions follow no such rule"
    return rule, ""
