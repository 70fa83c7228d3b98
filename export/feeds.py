"""What a calibration folder gives to the roles of a family: samples as the arguments of each role's forward.

Dims: S tokens of prompt and answer, D width of a token embedding, R rows of visual features.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from ..quant.samples import CalibrationSample, load_samples, samples_digest
from ..runtime.errors import InputError
from ..runtime.image import ImageOptions, Patches, load_image, preprocess_images
from ..runtime.manifest import Calibration, VisionSpec
from ..runtime.messages import read_messages
from ..runtime.prepare import Prepared, prepare_messages
from ..runtime.prompt import PromptBuilder
from ..runtime.routing import routing_inputs
from ..runtime.vision_inputs import vision_inputs
from .documents import TEMPLATE
from .family import ManifestParts, RoleSpec

__all__ = ["CalibrationOptions", "SampleFeeds", "prompt_builder"]

_TEXT_ROLES = ("embed_tokens", "decoder")
_VISUAL_ROWS = "visual rows"  # what the last role of the vision side gives, in place of placeholders


@dataclass(frozen=True)
class CalibrationOptions:
    """What calibration runs, and how much each row of the decoder counts.

    Images have many tokens, each of little weight for the answer (MBQ, CVPR 2025: a tenth of that of text and less).
    """

    folder: Path
    num_samples: int = 128
    seed: int = 0
    image_weight: float = 0.1
    text_weight: float = 1.0
    answer_weight: float = 1.0
    memory: int = 1 << 30  # bytes of activations that wait in memory for the next stage; the rest waits on disk


@dataclass(frozen=True)
class _Request:
    """One sample, ready for the roles but for its pixels, which are read again when they are needed."""

    grids: tuple[tuple[int, int, int], ...]  # of its images and clips
    prepared: Prepared | None  # None where a package takes no prompts; without visuals
    answer_ids: tuple[int, ...]


def prompt_builder(parts: ManifestParts, documents: Mapping[str, bytes]) -> PromptBuilder | None:
    """The template and tokenizer of a checkpoint before it is a package; None where it takes no prompts."""
    if parts.prompt is None:
        return None
    tokenizer = Tokenizer.from_str(documents["tokenizer.json"].decode())
    vision = parts.vision or VisionSpec(inputs=(), merge_size=1, window_blocks=0)
    return PromptBuilder(documents[TEMPLATE].decode(), tokenizer, parts.prompt, vision)


class SampleFeeds:
    """The samples of one folder, as far as the roles before have brought them."""

    def __init__(
        self,
        options: CalibrationOptions,
        roles: Mapping[str, RoleSpec],
        parts: ManifestParts,
        builder: PromptBuilder | None,
    ) -> None:
        """Reads and checks the samples. Raises InputError naming what is wrong with them."""
        self._roles, self._parts, self._builder = roles, parts, builder
        self._options, folder = options, options.folder
        samples = self._samples = load_samples(folder, options.num_samples, options.seed)
        self._requests = [self._request(sample) for sample in samples]
        if not any(request.grids for request in self._requests) and parts.image is not None:
            raise InputError(f"{folder}: no sample has an image; text alone calibrates a model that sees badly")
        num_tokens = sum(
            len(request.answer_ids) + (0 if request.prepared is None else len(request.prepared.input_ids))
            for request in self._requests
        )
        self.record = Calibration(
            name=folder.resolve().name,
            sha256=samples_digest(folder, samples),
            num_samples=len(samples),
            num_tokens=num_tokens,
            seed=options.seed,
            image_weight=options.image_weight,
            text_weight=options.text_weight,
            answer_weight=options.answer_weight,
        )

    @property
    def memory(self) -> int:
        """Bytes of activations that may wait in memory."""
        return self._options.memory

    @property
    def num_samples(self) -> int:
        return len(self._requests)

    def num_answer_rows(self, sample: int) -> int:
        """How many of the decoder's last rows say an answer; without one, the row behind the prompt."""
        return max(1, len(self._requests[sample].answer_ids))

    def start(self, sample: int) -> dict[str, torch.Tensor]:
        """What is known of a sample before any role has run."""
        if not self._requests[sample].grids:
            return {}
        visuals, _ = self._prepare(self._samples[sample])
        pixels = np.concatenate([patches.pixel_values for patches in visuals])
        return {"pixel_values": torch.from_numpy(pixels.astype(np.float32))}

    def takes(self, role: str, known: Mapping[str, torch.Tensor]) -> bool:
        """Whether a sample goes through a role: those without images go through the roles of text alone."""
        return role in _TEXT_ROLES or "pixel_values" in known

    def keep(self, role: str, known: dict[str, torch.Tensor], results: Any) -> None:
        """Adds what a role's forward gave to what is known of a sample."""
        output = results[0] if isinstance(results, tuple) else results
        known[self._roles[role].outputs[0].name] = output
        if role not in _TEXT_ROLES:
            known[_VISUAL_ROWS] = output

    def feed(self, role: str, sample: int, known: Mapping[str, torch.Tensor]) -> tuple[list[Any], torch.Tensor]:
        """Arguments of a role's forward, and the weights of its rows."""
        request = self._requests[sample]
        if role == "decoder":
            return self._decoder_feed(request, known)
        if role == "embed_tokens":
            assert request.prepared is not None
            ids = [*request.prepared.table_ids.tolist(), *request.answer_ids[:-1]]
            return [torch.tensor([ids])], torch.ones(len(ids))
        spec = self._parts.vision or VisionSpec(inputs=(), merge_size=1, window_blocks=0)
        names = [port.name for port in self._roles[role].inputs]
        missing = [name for name in names if name not in known]
        indices = {name: torch.from_numpy(array) for name, array in vision_inputs(spec, request.grids, missing).items()}
        feed = [{**known, **indices}[name] for name in names]
        return feed, torch.ones(len(feed[0]))

    def _decoder_feed(self, request: _Request, known: Mapping[str, torch.Tensor]) -> tuple[list[Any], torch.Tensor]:
        prepared, options = request.prepared, self._options
        assert prepared is not None
        num_prompt = len(prepared.input_ids)
        embeds_SD = known["inputs_embeds"][0].clone()
        num_more = len(embeds_SD) - num_prompt
        is_visual_S = np.pad(prepared.visual_tokens, (0, num_more))
        if is_visual_S.any():
            embeds_SD[torch.from_numpy(is_visual_S)] = known[_VISUAL_ROWS]
        weights_S = np.where(is_visual_S, options.image_weight, options.text_weight).astype(np.float32)
        if request.answer_ids:
            weights_S[num_prompt - 1 :] = options.answer_weight  # rows that say an answer's token
        if prepared.visible is not None:
            seen = np.pad(prepared.visible, (0, num_more), constant_values=True)
            embeds_SD, weights_S, is_visual_S = embeds_SD[torch.from_numpy(seen)], weights_S[seen], is_visual_S[seen]
        positions = prepared.seen_positions
        steps = np.arange(positions.shape[-1], len(embeds_SD)) + prepared.rope_delta
        positions = np.concatenate([positions, np.broadcast_to(steps, (*positions.shape[:-1], num_more))], axis=-1)
        values = {
            "inputs_embeds": embeds_SD[None],
            "attention_mask": torch.ones(1, len(embeds_SD), dtype=torch.int64),
            "position_ids": torch.from_numpy(np.ascontiguousarray(positions)).unsqueeze(-2),
            "num_logits_to_keep": torch.tensor([0]),
        } | {name: torch.from_numpy(array) for name, array in routing_inputs(is_visual_S).items()}
        spec = self._roles["decoder"]
        single, past = spec.inputs[: len(spec.inputs) - spec.variadic], spec.inputs[len(spec.inputs) - spec.variadic :]
        cache = [torch.zeros(1, int(port.shape[1]), 0, int(port.shape[3])) for port in past]
        return [*(values[port.name] for port in single), cache], torch.from_numpy(weights_S)

    def _prepare(self, sample: CalibrationSample) -> tuple[tuple[Patches, ...], Prepared | None]:
        """Images and clips of a sample, and its prompt."""
        folder = self._options.folder
        if self._builder is None:
            visuals = read_messages(sample.messages, folder=folder).visuals
            assert self._parts.image is not None
            image = self._parts.image
            return tuple(preprocess_images([load_image(v.source)], image, ImageOptions()) for v in visuals), None
        try:
            prepared = prepare_messages(self._builder, self._parts, sample.messages, {}, folder=folder)
        except InputError as error:
            raise InputError(f"{folder}: sample {sample.id}: {error}") from error
        return prepared.visuals, replace(prepared, visuals=())

    def _request(self, sample: CalibrationSample) -> _Request:
        visuals, prepared = self._prepare(sample)
        ids: tuple[int, ...] = ()
        if sample.answers and self._builder is not None:
            encoded = self._builder.tokenizer.encode(sample.answers[0], add_special_tokens=False)
            ends = () if self._parts.generation is None else self._parts.generation.eos_token_ids[:1]
            ids = (*encoded.ids, *ends)
        return _Request(tuple(patches.grid for patches in visuals), prepared, ids)
