"""What a report says of the insides of a package: drift by layer, the waterfall, bisection, the sweep, and the noise.

All of it comes from a few samples, after the answers are compared: the reference is tapped once, each variant then runs
beside what it left. The reference's own noise is measured last, as it computes in bfloat16 from then on.
"""

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..export.family import RoleSpec
from ..runtime.image import load_image
from ..runtime.model import Model
from ..runtime.package import Package
from ..runtime.prepare import Prepared
from ..runtime.session import GraphSession
from .bisect import OperatorError
from .images import ImageReference, ImageSample
from .localise import Localised, localise, tap_image_reference, tap_reference
from .raises import Raise, measure_raises
from .reference import ReferenceModel, ReferenceRun
from .samples import Sample
from .statistics import KlSummary, summarize_kl
from .sweep import Vision, sweep
from .waterfall import Tally, Waterfall, chain_of, measure, noise_errors, reference_logits, summarise

__all__ = [
    "Insides",
    "LayerDrift",
    "Noise",
    "Plan",
    "VariantInsides",
    "bisection",
    "layer_drift",
    "look_inside",
    "look_inside_images",
]

Array = NDArray[Any]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Plan:
    """How much is looked at."""

    num_samples: int = 16  # of the waterfall: their answers' positions are what divergences are means of
    sweep: bool = True
    bisect: bool = False  # the report names every operator, not the layers alone


@dataclass(frozen=True)
class LayerDrift:
    """The last value of a layer in the whole run of a variant, against the reference."""

    role: str
    layer: int | None
    stage: str
    order: int
    num_samples: int
    relative_l2: float
    snr_db: float
    cosine_min: float
    max_abs: float


@dataclass(frozen=True)
class Noise:
    what: str
    kl: KlSummary


@dataclass(frozen=True)
class VariantInsides:
    layers: tuple[LayerDrift, ...]
    waterfall: Waterfall | None
    bisect: Mapping[str, Any] | None  # see `bisection`
    sweep: tuple[Mapping[str, Any], ...]  # SweepResult and its outcome
    raises: tuple[Raise, ...] = ()  # of a variant that failed


@dataclass(frozen=True)
class Insides:
    noise: Noise | None
    variants: Mapping[str, VariantInsides]


@dataclass(frozen=True)
class _Request:
    """One sample of the waterfall. `first` [N, V]: the reference on its own pixels, `second`: on the runtime's."""

    prepared: Prepared
    forced_ids: tuple[int, ...]
    first: Array
    second: Array


def look_inside(
    package: Package,
    reference: ReferenceModel,
    roles: Mapping[str, RoleSpec],
    runs: Sequence[ReferenceRun],
    variants: Sequence[str],
    plan: Plan,
    progress: Progress,
    failed: Collection[str] = (),
) -> Insides:
    """`runs`: what the reference made of samples, their files still there. `failed`: variants to be raised."""
    positions = package.manifest.positions
    rule = reference.video_rule if positions is not None and positions.video_rule is not None else None
    found: dict[str, VariantInsides] = {}
    with tempfile.TemporaryDirectory(prefix="vlmport-insides-") as folder:
        tapped = tap_reference(package, reference, roles, _telling(runs), Path(folder, "taps"))
        requests, preprocessing = _requests(package, reference, runs, rule, progress)

        def vision(patches: Sequence[Any]) -> Array:
            return reference.vision(patches)[1]

        asked = [(request.prepared, request.forced_ids, request.second) for request in requests]
        for name in variants:
            progress(0, 1, f"{name}, layers")
            localised = localise(package, name, tapped, progress)
            layers = layer_drift(localised)
            found[name] = VariantInsides(
                layers=layers,
                waterfall=_waterfall(package, name, requests, preprocessing, Path(folder), rule, progress),
                bisect=bisection(localised) if plan.bisect else None,
                sweep=_swept(package, name, vision, rule, progress) if plan.sweep else (),
                raises=measure_raises(package, name, layers, asked, Path(folder), rule, progress)
                if name in failed
                else (),
            )
        errors = noise_errors(reference, asked, lambda done: progress(done, len(asked), "noise of the reference"))
    return Insides(Noise("PyTorch float32 against bfloat16", summarize_kl(errors)) if errors else None, found)


def look_inside_images(
    package: Package,
    reference: ImageReference,
    roles: Mapping[str, RoleSpec],
    sample: ImageSample,
    variants: Sequence[str],
    plan: Plan,
    progress: Progress,
) -> Insides:
    """The same for a package without a decoder, on one sample: layers, bisection and sweep."""

    def vision(patches: Sequence[Any]) -> Array:
        return np.concatenate([reference.encode(item).pooled for item in patches])

    found: dict[str, VariantInsides] = {}
    with tempfile.TemporaryDirectory(prefix="vlmport-insides-") as folder:
        tapped = tap_image_reference(package, reference, roles, sample, Path(folder))
        for name in variants:
            localised = localise(package, name, tapped, progress)
            swept = _swept(package, name, vision, None, progress) if plan.sweep else ()
            bisected = bisection(localised) if plan.bisect else None
            found[name] = VariantInsides(layer_drift(localised), None, bisected, swept)
    return Insides(None, found)


def layer_drift(localised: Localised) -> tuple[LayerDrift, ...]:
    """A row for what is outside of blocks and a row a block, in the order of a request; the prompt alone."""
    points = [point for point in localised.points if point.phase == "prompt" and np.isfinite(point.accumulated)]
    blocks: dict[tuple[str, int | None], str] = {}  # what the blocks of a role are called: "layers"
    for point in points:
        if point.layer is not None and point.name.find(f".{point.layer}") > 0:
            blocks.setdefault((point.role, point.layer), point.name.split(f".{point.layer}")[0])
    last: dict[tuple[str, int | None, str], OperatorError] = {}
    for point in points:
        block = blocks.get((point.role, point.layer))
        stage = f"{point.role}.{point.name}" if block is None else f"{point.role}.{block}.{point.layer}"
        last[point.role, point.layer, stage] = point
    return tuple(
        LayerDrift(role, layer, stage, order, 1, point.accumulated, point.snr_db, point.cosine_min, point.max_abs)
        for order, ((role, layer, stage), point) in enumerate(last.items())
    )


def bisection(localised: Localised) -> dict[str, Any]:
    """What a report says of a bisection: all points in their order, and the first that is wrong by itself."""
    points = [{**vars(point), "outcome": point.outcome} for point in localised.points]
    first = next((point for point in points if point["outcome"] == "FAIL"), None)
    tolerances = {" ".join(point.operators): point.tolerance for point in localised.points}
    return {
        "sample": localised.sample,
        "reproduced": localised.is_reproduced,
        "tolerances": tolerances,
        "first": first,
        "points": points,
    }


def _swept(
    package: Package, variant: str, vision: Vision, rule: str | None, progress: Progress
) -> tuple[Mapping[str, Any], ...]:
    results = sweep(package, variant, vision, rule, progress)
    return tuple({**vars(result), "outcome": result.outcome} for result in results)


def _telling(runs: Sequence[ReferenceRun]) -> Sample:
    """The sample to look into: one with pictures, where there is one."""
    return next((run.sample for run in runs if _pictures(run.sample)), runs[0].sample)


def _pictures(sample: Sample) -> list[Mapping[str, Any]]:
    parts = [
        part for message in sample.messages if not isinstance(message["content"], str) for part in message["content"]
    ]
    return [part for part in parts if part.get("type") in ("image", "video")]


def _requests(
    package: Package, reference: ReferenceModel, runs: Sequence[ReferenceRun], rule: str | None, progress: Progress
) -> tuple[list[_Request], str | None]:
    """The samples of the waterfall, and why preprocessing was not measured, if it was not."""
    requests: list[_Request] = []
    skipped: str | None = None
    with Model.load(package.path, video_rule=rule) as model:
        for number, run in enumerate(runs):
            progress(number, len(runs), f"reference, its own pixels, {run.sample.id}")
            prepared, ids = model.prepare(run.sample.messages), run.generated_ids[:-1]
            second = run.arrays()["step_logits"]
            own = _own_pixels(reference, run.sample, prepared)
            if own is None:
                skipped = "the reference has no image processor of its own for these samples"
            first = second if own is None or own is prepared else reference_logits(reference, own, ids)
            requests.append(_Request(prepared, tuple(ids), first, second))
    return requests, skipped


def _own_pixels(reference: ReferenceModel, sample: Sample, prepared: Prepared) -> Prepared | None:
    """The prompt with the reference's own pixels; `prepared` itself where they are equal to the bit."""
    parts = _pictures(sample)
    if not parts:
        return prepared
    if any(set(part) != {"type", "image"} for part in parts):
        return None
    own = reference.pixels([load_image(part["image"]) for part in parts])
    if own is None:
        return None
    sizes = [len(patches.pixel_values) for patches in prepared.visuals]
    if sum(sizes) != len(own[0]):
        return None
    rows = np.split(own[0], np.cumsum(sizes)[:-1])
    if all(np.array_equal(a, patches.pixel_values) for a, patches in zip(rows, prepared.visuals, strict=True)):
        return prepared
    return replace(
        prepared,
        visuals=tuple(replace(p, pixel_values=a) for p, a in zip(prepared.visuals, rows, strict=True)),
    )


def _waterfall(
    package: Package,
    variant: str,
    requests: Sequence[_Request],
    preprocessing: str | None,
    folder: Path,
    rule: str | None,
    progress: Progress,
) -> Waterfall:
    with tempfile.TemporaryDirectory(dir=folder) as made:
        chain, tally = chain_of(package, variant, Path(made)), Tally()
        pools: dict[bool, dict[Path, GraphSession]] = {False: {}, True: {}}
        for number, request in enumerate(requests):
            progress(number, len(requests), f"{variant}, waterfall")
            measure(
                package, chain, request.prepared, request.forced_ids, request.first, request.second, tally, pools, rule
            )
        return summarise(chain, tally, preprocessing)
