"""A variant's own answer to a prompt, and its logits along the reference's answer."""

from dataclasses import dataclass

from ..runtime.generate import Generation, GenerationOptions
from ..runtime.model import Model
from ..runtime.prepare import Prepared
from ..runtime.sample import SamplingParams
from .compare import Comparison, compare_logits
from .reference import ReferenceRun
from .samples import Sample
from .stages import logits_without_cache

__all__ = ["ANSWER_STAGE", "Asked", "answer_freely", "ask", "compare_answer"]

ANSWER_STAGE = "answer_logits"  # of the records of `compare_answer`


@dataclass(frozen=True)
class Asked:
    """A variant's free-running greedy answer to one sample, beside the reference's."""

    sample: str
    text: str
    reference_text: str
    num_tokens: int  # decoded after the first
    seconds: float  # for those
    ids: tuple[int, ...]
    reference_ids: tuple[int, ...]
    num_patches: int  # of all its images and clips


def answer_freely(model: Model, prepared: Prepared, sample: Sample) -> Generation:
    """The greedy answer, as long as the sample allows."""
    options = GenerationOptions(sample.max_new_tokens, SamplingParams(temperature=0.0), ignore_eos=sample.ignore_eos)
    return model.stream_prepared(prepared, options).finish()


def ask(model: Model, prepared: Prepared, run: ReferenceRun, generation: Generation) -> Asked:
    """What is kept of an answer."""
    return Asked(
        sample=run.sample.id,
        text=generation.text,
        reference_text=model.builder.tokenizer.decode(list(run.generated_ids), skip_special_tokens=True),
        num_tokens=max(generation.timings.num_generated_tokens - 1, 0),
        seconds=generation.timings.decode,
        ids=tuple(generation.token_ids),
        reference_ids=tuple(run.generated_ids),
        num_patches=sum(len(patches.pixel_values) for patches in prepared.visuals),
    )


def compare_answer(model: Model, prepared: Prepared, run: ReferenceRun) -> Comparison:
    """Logits along the reference's answer, by one prefill of prompt and answer; the stage `cache` has single steps."""
    visual = model.features(prepared)
    embeds = model.embed(prepared, None if visual is None else visual.features)
    logits = logits_without_cache(model, prepared, embeds, run.generated_ids[:-1])
    return compare_logits(run.sample.id, ANSWER_STAGE, "decode", run.arrays()["step_logits"], logits)
