"""Where a package leaves its reference: every operator of one request, and the first that is wrong by itself.

A request goes through both sides once: visuals, prompt, and one token through the cache. What the runtime feeds the
graphs (positions, spliced embeddings) is judged beside the graphs' own operators, as it comes before them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..export.family import RoleSpec
from ..runtime.cache import cache_names
from ..runtime.encode import EncodeOptions, prepare_images
from ..runtime.model import Model
from ..runtime.package import Package
from ..runtime.prepare import Prepared
from .bisect import OperatorError, RoleRun, judge_role, relative_l2
from .image_stages import run_images
from .images import ImageReference, ImageSample
from .pieces import PIECE_BYTES
from .reference import ReferenceModel
from .reference_taps import TappedModule, TapStore, record_taps, tapped_modules
from .samples import Sample
from .stages import run_stages
from .tapped import Call, TappedModel

__all__ = ["Localised", "TappedRequest", "localise", "tap_image_reference", "tap_reference"]

Array = NDArray[Any]
Progress = Callable[[int, int, str], None]
_VISUAL = ("vision_encoder", "projector", "patch_embed", "classifier")
_TOKEN = ("embed_tokens", "embed_tokens", "out")
_REPRODUCED = 1e-3  # relative L2 of the last logits, tapped against untapped: fused kernels add up in another order


@dataclass(frozen=True)
class Localised:
    """All known values of one request in the order in which a request meets them."""

    sample: str
    reproduced: float  # relative L2 of the last output, tapped against as users run it
    points: tuple[OperatorError, ...]

    @property
    def first(self) -> OperatorError | None:
        """The first operator that is wrong though it was fed right values."""
        return next((point for point in self.points if point.outcome == "FAIL"), None)

    @property
    def is_reproduced(self) -> bool:
        """False where the graph computes something else once its inner values are looked at: suspect a fused kernel."""
        return self.reproduced <= _REPRODUCED


@dataclass(frozen=True)
class TappedRequest:
    """One request as the reference sees it: what its modules took and gave, and what it has of the graphs' ports.

    By phase ("prompt", and "step" for one token through the cache). Arrays are in the folder it was tapped into.
    """

    sample: str
    messages: Sequence[Mapping[str, Any]]
    images: Sequence[Any]  # in place of messages, for a package without a decoder
    token: int  # that goes through the cache
    video_rule: str | None
    modules: Sequence[TappedModule]
    stores: Mapping[str, TapStore]
    feeds: Mapping[tuple[str, str], Mapping[str, Array]]  # (role, phase) -> inputs of the graph
    outputs: Mapping[tuple[str, str], Mapping[str, Array]]
    embeds: Array | None = None  # [S, D], spliced
    position_ids: Array | None = None


def tap_reference(
    package: Package,
    reference: ReferenceModel,
    roles: Mapping[str, RoleSpec],
    sample: Sample,
    folder: Path,
) -> TappedRequest:
    """Runs the reference once: visuals, prompt, one token. `package` only prepares the request."""
    positions = package.manifest.positions
    rule = reference.video_rule if positions is not None and positions.video_rule is not None else None
    modules = tapped_modules(reference, roles)
    visual = [tapped for tapped in modules if tapped.role in _VISUAL]
    others = [tapped for tapped in modules if tapped.role not in _VISUAL]
    with Model.load(package.path, video_rule=rule) as model:
        prepared = model.prepare(sample.messages)
    orders = {role: reference.row_order(role, prepared.visuals) for role in _VISUAL}
    prompt = TapStore(folder / "prompt", {role: order for role, order in orders.items() if order is not None})
    step = TapStore(folder / "step")
    hidden = features = None
    if prepared.visuals:
        with record_taps(visual, prompt):
            hidden, features = reference.vision(prepared.visuals)
    with record_taps(others, prompt):
        logits, embeds, position_ids = reference.prefill(prepared)
    prompt_cache = _cache(reference)
    token = int(logits[-1].argmax())
    with record_taps(others, step):
        next_logits = reference.step(token)
    step_cache = _cache(reference)
    feeds: dict[tuple[str, str], dict[str, Array]] = {
        ("decoder", "prompt"): {"inputs_embeds": prepared.seen(embeds)[None]}
    }
    outputs = {
        ("decoder", "prompt"): {"logits": logits, **prompt_cache},
        ("decoder", "step"): {"logits": next_logits, **step_cache},
    }
    if hidden is not None:
        feeds["projector", "prompt"] = outputs["vision_encoder", "prompt"] = {"vision_features": hidden}
    if features is not None:
        outputs["projector", "prompt"] = outputs["patch_embed", "prompt"] = {"image_features": features}
    if _TOKEN in step:
        feeds["decoder", "step"] = {"inputs_embeds": step.rows(_TOKEN)[None]}
    stores = {"prompt": prompt, "step": step}
    return TappedRequest(
        sample.id, sample.messages, (), token, rule, modules, stores, feeds, outputs, embeds, position_ids
    )


def _cache(reference: ReferenceModel) -> dict[str, Array]:
    """The reference's keys and values by the names of the graph's outputs, copied: the next token changes them."""
    names = [present for _, present in cache_names(len(reference.cache()))]
    return dict(zip(names, (array.copy() for pair in reference.cache() for array in pair), strict=True))


def tap_image_reference(
    package: Package, reference: ImageReference, roles: Mapping[str, RoleSpec], sample: ImageSample, folder: Path
) -> TappedRequest:
    """The same for a package without a decoder; the reference takes the images one by one."""
    modules = tapped_modules(reference, roles)
    store = TapStore(folder / "prompt")
    patches, _ = prepare_images(package.manifest.image, sample.images, EncodeOptions())
    with record_taps(modules, store):
        alone = [reference.encode(item) for item in patches]
    vision, pooled = (np.concatenate([getattr(one, name) for one in alone]) for name in ("vision", "pooled"))
    hidden, features = {"vision_features": vision}, {"image_features": pooled}
    feeds = {("projector", "prompt"): hidden, ("classifier", "prompt"): features}
    outputs = {("vision_encoder", "prompt"): hidden, ("projector", "prompt"): features}
    return TappedRequest(sample.id, (), sample.images, 0, None, modules, {"prompt": store}, feeds, outputs)


def localise(
    package: Package, variant: str, request: TappedRequest, progress: Progress = lambda done, total, what: None
) -> Localised:
    """A variant on the same request, tapped. Raises PackageError where a graph cannot be run."""
    tapped = TappedModel(package, variant, request.video_rule)
    with Model.load(package.path, variant, video_rule=request.video_rule) as model, tapped:
        if request.embeds is None:
            patches, _ = prepare_images(package.manifest.image, request.images, EncodeOptions())
            plain, found = (run_images(side, patches).pooled for side in (model, tapped))
            runtime = []
        else:
            prepared = model.prepare(request.messages)
            stages = run_stages(tapped, prepared, [request.token])
            plain, found = run_stages(model, prepared, [request.token]).step_logits, stages.step_logits
            runtime = _runtime_points(request, prepared, stages.inputs_embeds)
        judged = _judge(package, variant, tapped.calls, request, progress)
    before = [point for point in judged if point.role != "decoder" and point.phase == "prompt"]
    after = [point for point in judged if point.role == "decoder" or point.phase != "prompt"]
    return Localised(request.sample, relative_l2(plain, found), (*before, *runtime, *after))


def _judge(
    package: Package, variant: str, calls: Sequence[Call], request: TappedRequest, progress: Progress
) -> list[OperatorError]:
    """Every call of a graph; the second call of a role is the token that goes through the cache."""
    graphs = package.variant(variant).graphs
    errors: list[OperatorError] = []
    presents: dict[str, Array] = {}  # by name of the cache's input: what the reference's own keys and values give
    met: set[str] = set()
    for number, call in enumerate(calls):
        progress(number, len(calls), f"{variant}, {call.role}")
        phase = "step" if call.role in met else "prompt"
        met.add(call.role)
        modules = [tapped for tapped in request.modules if tapped.role == call.role]
        cache = {name: array for name, array in presents.items() if name in call.feeds}
        run = RoleRun(
            role=call.role,
            graph=call.graph,
            formats=graphs[call.role].formats,
            feeds=call.feeds,
            reference_feeds={**cache, **request.feeds.get((call.role, phase), {})},
            outputs=request.outputs.get((call.role, phase), {}),
            modules=tuple(tapped.path for tapped in modules),
            weight_of=lambda path, known={tapped.path: tapped for tapped in modules}: (
                known[path].weight() if path in known else None
            ),
            phase=phase,
        )
        judged, outputs = judge_role(run, request.stores[phase], PIECE_BYTES)
        errors += judged
        presents |= {name.replace("present.", "past_key_values."): array for name, array in outputs.items()}
    progress(len(calls), len(calls), variant)
    return errors


def _runtime_points(request: TappedRequest, prepared: Prepared, embeds: Array) -> list[OperatorError]:
    """What the runtime makes between the graphs of visuals and tokens on one side and the decoder on the other."""
    assert request.embeds is not None
    points = [_spliced(request.embeds, embeds)]
    if request.position_ids is not None:
        points.insert(0, _exact("position_ids", request.position_ids, prepared.position_ids))
    return points


def _spliced(reference: Array, candidate: Array) -> OperatorError:
    """Embeddings with the visual rows in their places: right where they are as near as the rows and the table are."""
    error = relative_l2(reference, candidate)
    return OperatorError("runtime", None, "inputs_embeds", ("splice",), 0.0, error, 1.0)


def _exact(name: str, reference: Array, candidate: Array) -> OperatorError:
    same = reference.shape == candidate.shape and bool((reference == candidate).all())
    error = 0.0 if same else float("inf")
    return OperatorError("runtime", None, name, ("positions",), error, error, 0.0)
