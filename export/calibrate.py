"""Calibration, samples through the modules of a family stage by stage, each stage quantized on the way.

Dims: S tokens of prompt and answer, D width of a token embedding, R rows of visual features.

Roles are run in the order in which a request goes through them, each on what the quantized one before it gave.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from tokenizers import Tokenizer

from ..quant.calibrate import quantize_stage
from ..quant.data_file import Progress
from ..quant.folds import find_folds
from ..quant.found import FoundRole
from ..quant.recipe import CALIBRATED_METHODS, Recipe, Target
from ..quant.samples import CalibrationSample, load_samples, samples_digest
from ..quant.source import WeightSource
from ..runtime.errors import InputError, RecipeError
from ..runtime.image import ImageOptions, Patches, load_image, preprocess_images
from ..runtime.manifest import Calibration, VisionSpec
from ..runtime.messages import read_messages
from ..runtime.package import Package
from ..runtime.prepare import Prepared, prepare_messages
from ..runtime.prompt import PromptBuilder
from ..runtime.routing import routing_inputs
from ..runtime.vision_inputs import vision_inputs
from .documents import TEMPLATE
from .family import ManifestParts, RoleSpec, family_of, roles_of
from .stages import RoleStages

__all__ = ["CalibrationOptions", "Calibrator", "check_calibration", "package_calibrator", "prompt_builder", "read_rows"]

_TEXT_ROLES = ("embed_tokens", "decoder")
_VISUAL_ROWS = "visual rows"  # what the last role of the vision side gives, in place of placeholders

OpenRole = Callable[[str], tuple[ir.Model, WeightSource]]


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


@dataclass(frozen=True)
class _Request:
    """One sample, ready for the roles."""

    visuals: tuple[Patches, ...]
    prepared: Prepared | None  # None where a package takes no prompts
    answer_ids: tuple[int, ...]


def check_calibration(recipes: Sequence[Recipe], target: Target, options: CalibrationOptions | None) -> None:
    """Raises RecipeError where there are data and nothing looks at them, or the other way round."""
    needing = [recipe.name for recipe in recipes if recipe.is_calibrated(target=target)]
    if needing and options is None:
        raise RecipeError(f"recipe {needing[0]}: its method looks at activations; give --calibration DIR")
    if options is not None and not needing:
        names = ", ".join(recipe.name for recipe in recipes)
        raise RecipeError(
            f"--calibration {options.folder}: no method of {names} looks at data; leave it out, "
            f"or give --method {', '.join(CALIBRATED_METHODS)}"
        )


def prompt_builder(parts: ManifestParts, documents: Mapping[str, bytes]) -> PromptBuilder | None:
    """The template and tokenizer of a checkpoint before it is a package; None where it takes no prompts."""
    if parts.prompt is None:
        return None
    tokenizer = Tokenizer.from_str(documents["tokenizer.json"].decode())
    vision = parts.vision or VisionSpec(inputs=(), merge_size=1, window_blocks=0)
    return PromptBuilder(documents[TEMPLATE].decode(), tokenizer, parts.prompt, vision)


class Calibrator:
    """Calibrates recipes on one folder of samples."""

    def __init__(
        self,
        options: CalibrationOptions,
        roles: Mapping[str, RoleSpec],
        parts: ManifestParts,
        builder: PromptBuilder | None,
        progress: Progress | None = None,
    ) -> None:
        """Reads and checks the samples. Raises InputError naming what is wrong with them."""
        self._roles, self._parts, self._builder, self._progress = roles, parts, builder, progress
        self._options, folder = options, options.folder
        samples = load_samples(folder, options.num_samples, options.seed)
        self._requests = [self._request(folder, sample) for sample in samples]
        if not any(request.visuals for request in self._requests) and parts.image is not None:
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

    def calibrate(self, recipe: Recipe, target: Target, open_role: OpenRole, folder: Path) -> dict[str, FoundRole]:
        """What the calibrated methods of a recipe find, by role; their files go below `folder`."""
        calibrated = [role for role in self._roles if recipe.is_calibrated(role, target)]
        last = max(list(self._roles).index(role) for role in calibrated)
        found: dict[str, FoundRole] = {}
        known: list[dict[str, torch.Tensor]] = [self._pixels(request) for request in self._requests]
        for number, name in enumerate(list(self._roles)[: last + 1]):
            place = folder / name
            place.mkdir(parents=True)
            found[name] = self._role(name, recipe, target, open_role, known, place, is_last=number == last)
        return {role: found[role] for role in calibrated}

    @torch.no_grad()
    def _role(
        self,
        name: str,
        recipe: Recipe,
        target: Target,
        open_role: OpenRole,
        known: list[dict[str, torch.Tensor]],
        folder: Path,
        *,
        is_last: bool,
    ) -> FoundRole:
        """Quantizes a role, and adds its outputs to what is known of the samples."""
        model, source = open_role(name)
        spec, found = self._roles[name], FoundRole(folder)
        feeds: list[list[Any]] = []
        weights: list[torch.Tensor] = []
        # Samples without images go through the roles of text alone.
        taking = [n for n, values in enumerate(known) if name in _TEXT_ROLES or "pixel_values" in values]
        for number in taking:
            feed, rows = self._feed(name, self._requests[number], known[number])
            feeds.append(feed)
            weights.append(rows)
        if not feeds:
            return found
        with torch.device("meta"):
            module = spec.build().eval()
        run = RoleStages(module, lambda *place: read_rows(model.graph, source, *place), feeds, weights)
        names = {key for key, value in module.named_parameters() if value.dim() == 2}
        formats = {key: format for key in names if (format := recipe.format_of(name, key, target)) is not None}
        folds = find_folds(model.graph)
        to_the_end = not is_last or any(formats[key].is_calibrated for key in run.outside & formats.keys())
        for done, stage in enumerate(run.stages(to_the_end=to_the_end), start=1):
            if self._progress is not None:
                self._progress(0, 0, f"{recipe.name}: calibrating {name}, stage {done}")
            quantize_stage(stage, formats, folds, "float32" if target == "cpu" else "float16", found)
        if to_the_end:
            for place, number in enumerate(taking):
                outputs = run.run(place)
                output = outputs[0] if isinstance(outputs, tuple) else outputs
                known[number][spec.outputs[0].name] = output
                if name not in _TEXT_ROLES:
                    known[number][_VISUAL_ROWS] = output
        return found

    def _request(self, folder: Path, sample: CalibrationSample) -> _Request:
        if self._builder is None:
            visuals = read_messages(sample.messages, folder=folder).visuals
            assert self._parts.image is not None
            patches = [preprocess_images([load_image(v.source)], self._parts.image, ImageOptions()) for v in visuals]
            return _Request(tuple(patches), None, ())
        try:
            prepared = prepare_messages(self._builder, self._parts, sample.messages, {}, folder=folder)
        except InputError as error:
            raise InputError(f"{folder}: sample {sample.id}: {error}") from error
        ids: tuple[int, ...] = ()
        if sample.answers:
            encoded = self._builder.tokenizer.encode(sample.answers[0], add_special_tokens=False)
            ends = () if self._parts.generation is None else self._parts.generation.eos_token_ids[:1]
            ids = (*encoded.ids, *ends)
        return _Request(prepared.visuals, prepared, ids)

    def _pixels(self, request: _Request) -> dict[str, torch.Tensor]:
        if not request.visuals:
            return {}
        pixels = np.concatenate([patches.pixel_values for patches in request.visuals])
        return {"pixel_values": torch.from_numpy(pixels.astype(np.float32))}

    def _feed(self, role: str, request: _Request, known: Mapping[str, torch.Tensor]) -> tuple[list[Any], torch.Tensor]:
        """Arguments of a role's forward, and the weights of its rows."""
        if role == "decoder":
            return self._decoder_feed(request, known)
        if role == "embed_tokens":
            assert request.prepared is not None
            ids = [*request.prepared.table_ids.tolist(), *request.answer_ids[:-1]]
            return [torch.tensor([ids])], torch.ones(len(ids))
        spec = self._parts.vision or VisionSpec(inputs=(), merge_size=1, window_blocks=0)
        names = [port.name for port in self._roles[role].inputs]
        grids = [patches.grid for patches in request.visuals]
        missing = [name for name in names if name not in known]
        indices = {name: torch.from_numpy(array) for name, array in vision_inputs(spec, grids, missing).items()}
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


def package_calibrator(package: Package, options: CalibrationOptions, progress: Progress | None = None) -> Calibrator:
    """For a package by its own files: the modules follow from its config.json. Raises as Calibrator does."""
    documents = {file.name: json.loads(file.read_text(encoding="utf-8")) for file in package.path.glob("*.json")}
    config = documents["config.json"]
    family = family_of(config, package.path / "config.json")
    parts = family.manifest(config, documents)
    builder = None if parts.prompt is None else PromptBuilder.from_package(package.path, package.manifest)
    return Calibrator(options, roles_of(family, config, documents), parts, builder, progress)


def read_rows(graph: ir.Graph, source: WeightSource, parameter: str, start: int, stop: int) -> np.ndarray:
    """Rows of a parameter: a stored graph has vectors as constants, a traced one has all of them in the source."""
    value = graph.initializers[parameter]
    if value.const_value is not None:
        return value.const_value.numpy()[start:stop].astype(np.float32)
    return source.rows(parameter, start, stop)
