"""Inputs that bite: shapes, packings and lengths on which ports break, each with what must hold.

Against the reference: extreme aspect ratios, smallest and largest sizes, paddings of attention windows, odd numbers of
frames. Against the package itself: an image's features must not depend on its neighbours in a packed call, nor an
answer on the chunks of its prompt, on what the cache held before, or on the other rows of a batch. The runtime answers
one request at a time, so a batch is asked of the decoder graph itself; images are the batch that it has.

Errors are relative L2. Limits are by the precision that was asked: a rounded activation may go the other way.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..runtime.errors import CapacityError, InputError
from ..runtime.image import Patches
from ..runtime.manifest import Manifest
from ..runtime.model import Model
from ..runtime.opened import LoadOptions
from ..runtime.package import Package
from ..runtime.prepare import Prepared
from .bisect import relative_l2
from .compare import StageRow, stage_columns
from .gates import GateTable, judge
from .samples import draw_picture
from .tapped import TappedModel

__all__ = ["SweepResult", "Vision", "sweep", "sweep_row"]

Array = NDArray[Any]
Vision = Callable[[Sequence[Patches]], Array]  # the reference's rows in place of placeholders
Progress = Callable[[int, int, str], None]

_REFERENCE = {"fp32": 1e-4, "fp16": 1e-2, "int8": 0.1, "int4": 0.1}  # as the gates of towers: 0.1 is 20 dB
_ITSELF = {"fp32": 1e-5, "fp16": 2e-3, "int8": 1e-2, "int4": 1e-2}
_MOST_PIXELS = 640 * 640  # of the largest image: what a tower takes grows with the square
_LONG = 600  # tokens: more than two chunks of a prompt
_CHUNKS = (37, 256)
_MOST_IMAGES = 8  # in one call
_NUM_ROWS = 3  # of a batch


@dataclass(frozen=True)
class SweepResult:
    """One case. `skipped` says why there is no number; that is never a pass."""

    variant: str
    case: str
    id: str
    about: str
    stage: str
    metric: str = "relative_l2"
    value: float | None = None
    limit: float = 0.0
    skipped: str | None = None

    @property
    def outcome(self) -> Literal["PASS", "FAIL"] | None:
        """None where it was skipped."""
        if self.value is None:
            return None
        return "PASS" if self.value <= self.limit else "FAIL"


def sweep(
    package: Package, variant: str, vision: Vision | None, video_rule: str | None, progress: Progress
) -> tuple[SweepResult, ...]:
    """All cases that the package's roles allow. `vision`: the reference's, None where there is none to ask."""
    columns = stage_columns(package.variant(variant))
    results: list[SweepResult] = []
    with Model.load(package.path, variant, video_rule=video_rule) as model:
        cases = [*_visual_cases(model, variant, vision, columns)]
        if "decoder" in package.manifest.roles:
            cases += _text_cases(model, variant, columns)
        for number, (result, value) in enumerate(cases):
            progress(number, len(cases), f"{variant}, sweep, {result.case} {result.id}")
            results.append(_measured(result, value))
    progress(len(cases), len(cases), f"{variant}, sweep")
    return tuple(results)


def sweep_row(results: Sequence[Mapping[str, Any]], table: GateTable, column: str) -> StageRow:
    """All cases of a variant as one judged stage: how many left their limits. `results` as a report has them.

    Skipped ones are no evidence: where nothing was measured the gate fails.
    """
    measured = [each for each in results if each["outcome"] is not None]
    failed = [each for each in measured if each["outcome"] == "FAIL"]
    values = {"num_cases": float(len(measured)), "num_failed": float(len(failed))} if measured else {}
    return StageRow(
        stage="sweep",
        kind="sweep",
        column=column,
        num_samples=len(measured),
        values=values,
        worst_sample=max(failed, key=lambda each: each["value"] - each["limit"])["id"] if failed else "",
        gates=judge(table, column, "sweep", "sweep", values),
        notes=tuple(f"{each['case']}, {each['id']}: {each['value']:.3g}, limit {each['limit']:g}" for each in failed),
    )


Case = tuple[SweepResult, Callable[[], float | str]]


def _measured(result: SweepResult, value: Callable[[], float | str]) -> SweepResult:
    try:
        found = value()
    except (InputError, CapacityError) as error:  # a request that the runtime refuses is no wrong answer
        found = f"refused: {error}"
    return replace(result, skipped=found) if isinstance(found, str) else replace(result, value=found)


def _visual_cases(model: Model, variant: str, vision: Vision | None, columns: Mapping[str, str]) -> Iterator[Case]:
    manifest = model.manifest
    if manifest.image is None:
        return
    limit = _REFERENCE[columns["projector"].removesuffix("-unit")]
    for case, name, about, visual in _shapes(manifest):
        result = SweepResult(variant, case, name, about, "projector", limit=limit)
        yield result, lambda visual=visual: _against(model, vision, visual)
    limit = _ITSELF[columns["projector"].removesuffix("-unit")]
    alone: dict[int, Array] = {}
    for count in range(1, _MOST_IMAGES + 1):
        about = "each image alone, against all in one call, in order and shuffled; the worst image"
        images = "1 image" if count == 1 else f"{count} unequal images"
        result = SweepResult(variant, "packing", images, about, "projector", limit=limit)
        yield result, lambda count=count: _packing(model, count, alone)


def _shapes(manifest: Manifest) -> Iterator[tuple[str, str, str, Mapping[str, Any]]]:
    """(case, id, about, content part) of pictures and clips whose shapes are at an edge."""
    assert manifest.image is not None
    unit = manifest.image.patch_size * manifest.image.merge_size
    most = min(manifest.image.max_pixels, _MOST_PIXELS)
    side = int(most**0.5 * 1.1)
    sizes = {
        ("aspect", "wide"): (16 * unit, unit),
        ("aspect", "tall"): (unit, 16 * unit),
        ("size", "smallest"): (unit, unit),
        ("size", "below the smallest"): (unit // 2 + 1, unit // 2 + 1),
        ("size", "largest"): (side, side),
        ("size", "odd"): (5 * unit + 1, 3 * unit - 1),
    }
    blocks = manifest.vision.window_blocks if manifest.vision is not None else 0
    if blocks:
        sizes["window", "one block over"] = ((blocks + 1) * unit, (blocks + 1) * unit)
        sizes["window", "one block short"] = ((2 * blocks - 1) * unit, blocks * unit)
    for number, ((case, name), (width, height)) in enumerate(sizes.items()):
        part = {"type": "image", "image": draw_picture(30 + number, width, height)}
        yield case, f"{name} ({width} x {height})", "features against the reference's", part
    for count in (1, 3, 5) if manifest.video is not None else ():
        frames = [draw_picture(50 + number, 4 * unit, 3 * unit) for number in range(count)]
        part = {"type": "video", "video": frames, "fps": 2.0}
        yield "frames", f"{count} frames", "features of a clip against the reference's", part


def _against(model: Model, vision: Vision | None, visual: Mapping[str, Any]) -> float | str:
    if vision is None:
        return "no reference was asked"
    visuals = _visuals(model, [visual])
    return relative_l2(vision(visuals), model.encode_vision(visuals).features)


def _packing(model: Model, count: int, alone: dict[int, Array]) -> float:
    """The largest error of an image among the others. `alone` keeps features of single images from case to case."""
    assert model.manifest.image is not None
    unit = model.manifest.image.patch_size * model.manifest.image.merge_size
    shapes = [(2 + number % 4, 2 + number * 3 % 5) for number in range(count)]
    pictures = [draw_picture(60 + n, width * unit, height * unit) for n, (width, height) in enumerate(shapes)]
    each = [_visuals(model, [{"type": "image", "image": picture}]) for picture in pictures]
    for index, visuals in enumerate(each):
        if index not in alone:
            alone[index] = model.encode_vision(visuals).features
    errors: list[float] = []
    for order in (list(range(count)), list(np.random.default_rng(7).permutation(count))):
        rows = model.encode_vision([patches for index in order for patches in each[index]]).features
        ends = np.cumsum([len(alone[index]) for index in order])
        parts = np.split(rows, ends[:-1])
        errors += [relative_l2(alone[index], part) for index, part in zip(order, parts, strict=True)]
    return max(errors)


def _visuals(model: Model, parts: Sequence[Mapping[str, Any]]) -> Sequence[Patches]:
    """The patches of some visuals, as a prompt that shows them has them."""
    if "decoder" not in model.manifest.roles:
        from ..runtime.encode import EncodeOptions, prepare_images

        return prepare_images(model.manifest.image, [part["image"] for part in parts], EncodeOptions())[0]
    text = {"type": "text", "text": "What is it?"}
    return model.prepare([{"role": "user", "content": [*parts, text]}]).visuals


def _text_cases(model: Model, variant: str, columns: Mapping[str, str]) -> Iterator[Case]:
    limit = _ITSELF[columns["prefill"].removesuffix("-unit")]
    for chunk in _CHUNKS:
        about = f"a long prompt, a picture in it, in chunks of {chunk} tokens against one pass"
        result = SweepResult(variant, "chunks", f"chunks of {chunk}", about, "prefill_logits", limit=limit)
        yield result, lambda chunk=chunk: _chunks(model, chunk)
    about = "a prompt on a cache that held another one, against a fresh cache"
    result = SweepResult(variant, "cache_reuse", "a used cache", about, "prefill_logits", metric="max_abs", limit=0.0)
    yield result, lambda: _reused(model)
    about = f"{_NUM_ROWS} prompts as rows of one run of the decoder graph, against each alone; the runtime answers one"
    result = SweepResult(variant, "batch", f"{_NUM_ROWS} rows", f"{about} at a time", "prefill_logits", limit=limit)
    yield result, lambda: _batch(model)


def _prompt(model: Model, text: str, *pictures: Mapping[str, Any]) -> tuple[Prepared, Array]:
    prepared = model.prepare([{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}])
    visual = model.features(prepared)
    return prepared, model.embed(prepared, None if visual is None else visual.features)


def _chunks(model: Model, chunk: int) -> float | str:
    image = model.manifest.image
    unit = 0 if image is None else image.patch_size * image.merge_size
    picture = [] if image is None else [{"type": "image", "image": draw_picture(70, 9 * unit, 7 * unit)}]
    prepared, embeds = _prompt(model, "Name the colours of the sea and of the sky. " * (_LONG // 8), *picture)
    if len(embeds) <= chunk:
        return f"{len(embeds)} tokens are one chunk"
    logits: list[Array] = []
    for size in (len(embeds), chunk):
        options = LoadOptions(prefill_chunk=size, video_rule=model.options.video_rule)
        with Model(model.package, model.variant.name, options) as other:
            cache = other.new_cache(len(embeds) + 1)
            logits.append(other.prefill_prepared(prepared, embeds, cache, all_logits=True))
    return relative_l2(*logits)


def _reused(model: Model) -> float:
    first, second = (_prompt(model, text) for text in ("One two three four five six.", "Seven eight."))
    room = len(first[1]) + len(second[1])
    used, fresh = model.new_cache(room), model.new_cache(room)
    model.prefill_prepared(*first, used)
    used.reset()
    warm, cold = (model.prefill_prepared(*second, cache) for cache in (used, fresh))
    return float(np.abs(warm - cold).max())


def _batch(model: Model) -> float | str:
    with TappedModel(model.package, model.variant.name, model.options.video_rule) as tapped:
        prepared, embeds = _prompt(tapped, "One two three four.")
        prompts = [np.roll(embeds, shift, axis=0) for shift in range(_NUM_ROWS)]
        alone = [tapped.prefill_prepared(prepared, rows, tapped.new_cache(len(rows) + 1)) for rows in prompts]
        calls = [call.feeds for call in tapped.calls if call.role == "decoder"]
        axes = {name: -2 if name == "position_ids" else 0 for name in calls[0] if name != "num_logits_to_keep"}
        if any(name.endswith("_rows") for name in axes):
            return "the graph sorts the tokens of one request by their kind"
        feeds = {name: np.concatenate([feeds[name] for feeds in calls], axis) for name, axis in axes.items()}
        if "num_logits_to_keep" in calls[0]:
            feeds["num_logits_to_keep"] = calls[0]["num_logits_to_keep"]
        (logits,) = tapped.session("decoder").raw.run(["logits"], feeds)
    return relative_l2(np.concatenate(alone), logits[:, -1])
