"""The reference: the checkpoint in PyTorch, run once over all samples; then each variant against what it computed.

The reference's arrays wait on disk (one .npz a sample), so that neither it nor the other variants need to be in memory
while a variant runs. Its pixels come from its own image processor; everything behind them is fed what the runtime
prepared, so that each stage is compared on equal inputs of the stage before.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..runtime.errors import CheckpointError
from ..runtime.image import Patches, load_image
from ..runtime.model import Model
from ..runtime.prepare import Prepared
from .compare import Comparison, NotCompared, compare_generation, compare_ids, compare_logits, compare_tensors
from .images import ImageReference
from .inputs import GivenInputs, compare_inputs, hash_of, input_hashes
from .samples import Sample
from .stages import logits_without_cache, run_stages

__all__ = [
    "AnsweringReference",
    "ReferenceModel",
    "ReferenceRun",
    "compare_sample",
    "given_inputs",
    "load_image_reference",
    "load_reference",
    "run_reference",
]

Array = NDArray[Any]
Progress = Callable[[int, int, str], None]


class AnsweringReference(Protocol):
    """What variants are compared with, from prompts to answers: a checkpoint in PyTorch, or another package."""

    origin: str  # whose code it is, for the report
    video_rule: str | None  # the rule of runtime.positions that it follows; None where there is only one

    def pixels(self, images: Sequence[Image.Image]) -> tuple[Array, Array] | None:
        """Its own image processor: pixel_values [P, patch_dim], grids [n, 3]; None where it has none."""
        ...

    def vision(self, patches: Sequence[Patches]) -> tuple[Array | None, Array]:
        """Vision encoder [P, C] in natural patch order (None: there is none), rows that replace placeholders [R, D]."""
        ...

    def prefill(self, prepared: Prepared) -> tuple[Array, Array, Array | None]:
        """Starts a prompt: logits [S, V], inputs_embeds [S, D], position_ids as the runtime shapes them.

        None where it finds no positions by itself but takes those of `prepared`.
        """
        ...

    def step(self, token_id: int) -> Array:
        """Logits [V] after one more token, through the cache."""
        ...


class ReferenceModel(AnsweringReference, Protocol):
    """One checkpoint of any family in PyTorch, float32, to be looked into. Families give it by `load(folder)`."""

    def modules(self) -> Mapping[str, Any]:
        """Its torch modules, to be tapped: see reference_taps.TappedReference."""
        ...

    def cache(self) -> Sequence[tuple[Array, Array]]:
        """Keys and values of each layer so far, float32 [1, K, T, H], keys after rotary."""
        ...

    def row_order(self, role: str, patches: Sequence[Patches]) -> Array | None:
        """See reference_taps.TappedReference."""
        ...


@dataclass(frozen=True)
class ReferenceRun:
    """What the reference made of one sample. The arrays are in `file`."""

    sample: Sample
    generated_ids: tuple[int, ...]
    file: Path
    inputs: Mapping[str, str] = field(default_factory=dict[str, str])  # sha256 of what it was given

    def arrays(self) -> dict[str, Array]:
        """By stage: step_logits [N, V]; with details also pixels, vision, projector, prefill_logits and so on."""
        with np.load(self.file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}


def load_reference(folder: Path, *, trust_remote_code: bool = False) -> ReferenceModel:
    """The checkpoint by the adapter that its family names, or where there is none by the family's own modules.

    `trust_remote_code` runs the Python files of the checkpoint itself in place of both. Raises CheckpointError.
    """
    from ..export.checkpoint import Checkpoint  # torch is needed from here on, and only by this command
    from ..export.family import family_of
    from .eager import EagerReference

    checkpoint = Checkpoint.open(folder)
    family = family_of(checkpoint.config, folder / "config.json")
    adapter = family.remote if trust_remote_code else family.reference
    if adapter is None and trust_remote_code:
        raise CheckpointError(f"{folder}: no code of its own is known for {family.name}; leave out --trust-remote-code")
    if adapter is None:
        return EagerReference(checkpoint, family)
    reference: ReferenceModel = importlib.import_module(f"..export.families.{adapter}", __package__).load(folder)
    return reference


def load_image_reference(folder: Path) -> ImageReference:
    """The checkpoint of a package without a decoder by its family's own modules. Raises CheckpointError."""
    from ..export.checkpoint import Checkpoint
    from ..export.family import family_of
    from .eager_images import EagerImages

    checkpoint = Checkpoint.open(folder)
    return EagerImages(checkpoint, family_of(checkpoint.config, folder / "config.json"))


def run_reference(
    reference: AnsweringReference,
    model: Model,
    samples: Sequence[Sample],
    num_detailed: int,
    folder: Path,
    progress: Progress,
) -> list[ReferenceRun]:
    """Runs every sample through the reference; `model` only prepares the prompts. Arrays go to `folder`.

    The first `num_detailed` samples keep all stages, the others the logits of their answers.
    """
    eos = model.manifest.generation.eos_token_ids if model.manifest.generation is not None else ()
    runs: list[ReferenceRun] = []
    for number, sample in enumerate(samples):
        progress(number, len(samples), f"reference, {sample.id}")
        prepared = model.prepare(sample.messages)
        given = input_hashes(prepared)
        arrays: dict[str, Array] = {}
        if number < num_detailed and prepared.visuals:
            hidden, arrays["projector"] = reference.vision(prepared.visuals)
            arrays |= {} if hidden is None else {"vision": hidden}
        own = reference.pixels(images) if number < num_detailed and (images := _stills(sample)) else None
        if own is not None:
            arrays["pixel_values"], arrays["image_grid_thw"] = own
        logits, embeds, positions = reference.prefill(prepared)
        if number < num_detailed:
            arrays |= {"prefill_logits": logits, "inputs_embeds": embeds}
            arrays |= {} if positions is None else {"position_ids": positions}
        ids, steps = _greedy(reference, logits[-1], sample, eos)
        file = folder / f"{number}.npz"
        arrays["step_logits"] = steps
        np.savez(file, allow_pickle=False, **arrays)
        if positions is not None:  # it counts by itself
            given["position_ids"] = hash_of([positions])
        runs.append(ReferenceRun(sample, ids, file, given))
    progress(len(samples), len(samples), "reference")
    return runs


def given_inputs(run: ReferenceRun, prepared: Prepared) -> tuple[GivenInputs, Comparison]:
    """What a variant is given for a sample (`prepared`, by its own runtime), beside what the reference was given."""
    given = GivenInputs(run.sample.id, run.inputs, input_hashes(prepared))
    return given, compare_inputs(given)


def compare_sample(
    model: Model, prepared: Prepared, run: ReferenceRun, answer_ids: Sequence[int], tie_margin: float
) -> list[Comparison | NotCompared]:
    """Every stage of one detailed sample, a variant against the reference. answer_ids: its free-running answer."""
    name, arrays = run.sample.id, run.arrays()
    forced = run.generated_ids[:-1]
    stages = run_stages(model, prepared, forced)
    records: list[Comparison | NotCompared] = []
    records += _compare_pixels(name, prepared, arrays)
    if "position_ids" in arrays:
        records.append(compare_ids(name, "position_ids", arrays["position_ids"], prepared.position_ids))
    else:
        records.append(NotCompared(name, "position_ids", "the reference takes the runtime's"))
    for stage, found in (("vision", stages.vision), ("projector", stages.features)):
        theirs = arrays.get(stage)
        if found is not None and theirs is not None:
            records.append(compare_tensors(name, stage, stage, theirs, found))
        elif found is not None or theirs is not None:
            side = "the variant" if found is None else "the reference"
            records.append(NotCompared(name, stage, f"{side} gives none"))
    records.append(compare_tensors(name, "inputs_embeds", "embeddings", arrays["inputs_embeds"], stages.inputs_embeds))
    records.append(compare_logits(name, "prefill_logits", "prompt", arrays["prefill_logits"], stages.prefill_logits))
    records.append(compare_logits(name, "step_logits", "decode", arrays["step_logits"], stages.step_logits))
    whole = logits_without_cache(model, prepared, stages.inputs_embeds, forced)
    records.append(compare_logits(name, "cache", "cache", whole, stages.step_logits))
    records.append(compare_generation(name, run.generated_ids, answer_ids, arrays["step_logits"], tie_margin))
    return records


def _compare_pixels(name: str, prepared: Prepared, arrays: Mapping[str, Array]) -> list[Comparison | NotCompared]:
    """The runtime's patches of stills against the reference's own processor."""
    records: list[Comparison | NotCompared] = []
    if prepared.images and "pixel_values" in arrays:
        grids = np.array([patches.grid for patches in prepared.images], dtype=np.int64)
        pixels = np.concatenate([patches.pixel_values for patches in prepared.images])
        records.append(compare_ids(name, "image_grid_thw", arrays["image_grid_thw"], grids))
        records.append(compare_tensors(name, "pixel_values", "pixels", arrays["pixel_values"], pixels))
    elif prepared.images:
        records.append(NotCompared(name, "pixel_values", "the reference has no image processor of its own for them"))
    if prepared.videos:
        records.append(NotCompared(name, "pixel_values of clips", "the reference's video processor needs torchvision"))
    return records


def _greedy(
    reference: AnsweringReference, logits: Array, sample: Sample, eos: Sequence[int]
) -> tuple[tuple[int, ...], Array]:
    """Greedy ids [N] and the logits that chose them [N, V]. An end-of-sequence id is the last one."""
    ids, steps = [int(logits.argmax())], [logits]
    while len(ids) < sample.max_new_tokens and (sample.ignore_eos or ids[-1] not in eos):
        steps.append(reference.step(ids[-1]))
        ids.append(int(steps[-1].argmax()))
    return tuple(ids), np.stack(steps)


def _stills(sample: Sample) -> list[Image.Image]:
    """The pictures of a sample in order, when none has options of its own."""
    parts = [part for message in sample.messages for part in _parts(message)]
    images = [part for part in parts if part.get("type") == "image"]
    if any(set(part) != {"type", "image"} for part in images):
        return []
    return [load_image(part["image"]) for part in images]


def _parts(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    content = message["content"]
    return [] if isinstance(content, str) else content
