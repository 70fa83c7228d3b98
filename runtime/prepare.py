"""Messages to everything the graphs need, on the CPU and without ONNX Runtime: ids, patches, positions.

S  tokens of the prompt, placeholders expanded
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from .errors import InputError, PackageError
from .generate import Timings
from .image import Patches, load_image, preprocess_images, source_label
from .manifest import ImageSpec, PositionSpec, PromptSpec, VideoSpec
from .messages import Visual, read_messages
from .positions import VisualRun, positions
from .prompt import PromptBuilder
from .ratio_tiles import cut_tiles
from .session import Array
from .slices import Pictures, cut_picture
from .video import load_clip, preprocess_clip

__all__ = ["Prepared", "RequestParts", "prepare_ids", "prepare_messages"]

_CUTTERS = {"slices": cut_picture, "ratio_tiles": cut_tiles}  # strategies that make several tiles of an image


class RequestParts(Protocol):
    """What of a manifest a request needs; also there before a package is."""

    @property
    def image(self) -> ImageSpec | None: ...
    @property
    def video(self) -> VideoSpec | None: ...
    @property
    def positions(self) -> PositionSpec | None: ...
    @property
    def prompt(self) -> PromptSpec | None: ...


@dataclass(frozen=True)
class Prepared:
    """A prompt, ready for the graphs. `visuals` and `runs` go together, in the order of their placeholders.

    There is one of each a tile where pictures are cut into tiles, else one an image or clip.
    """

    text: str  # the rendered template, each placeholder once; empty where the request came as ids
    input_ids: Array  # int64 [S]
    visuals: tuple[Patches, ...]
    runs: tuple[VisualRun, ...]  # where the rows of each visual go
    position_ids: Array  # int64 [3, S] or [S]
    rope_delta: int  # position of the token after the cache's n-th is n + rope_delta
    timings: Timings
    visible: Array | None = None  # bool [S]: which tokens the decoder sees; None: all

    @property
    def num_seen(self) -> int:
        """How many tokens the decoder sees."""
        return len(self.input_ids) if self.visible is None else int(self.visible.sum())

    @property
    def table_ids(self) -> Array:
        """The ids that the embedding table has, int64 [S]: 0 for placeholders that are no tokens.

        So does LLaVA's code, and a repetition penalty then counts id 0. What is embedded there is replaced.
        """
        return np.maximum(self.input_ids, 0)

    @property
    def visual_tokens(self) -> Array:
        """Which tokens are rows of an image or clip, bool [S]."""
        found = np.zeros(len(self.input_ids), bool)
        for run in self.runs:
            found[run.start : run.start + run.length] = True
        return found

    @property
    def seen_positions(self) -> Array:
        """Positions of the tokens that the decoder sees, int64 [3, S] or [S]."""
        return self.position_ids if self.visible is None else self.position_ids[..., self.visible]

    def seen(self, rows_SX: Array) -> Array:
        """Of one row a token, those that the decoder sees. No other token attends to the rest, so they are left out."""
        return rows_SX if self.visible is None else rows_SX[self.visible]

    @property
    def images(self) -> tuple[Patches, ...]:
        """Stills, in order."""
        return self._of_kind("image")

    @property
    def videos(self) -> tuple[Patches, ...]:
        """Clips, in order."""
        return self._of_kind("video")

    def _of_kind(self, kind: str) -> tuple[Patches, ...]:
        return tuple(patches for patches, run in zip(self.visuals, self.runs, strict=True) if run.kind == kind)


def prepare_messages(
    builder: PromptBuilder,
    manifest: RequestParts,
    messages: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    *,
    folder: Path | None = None,
    allow_files: bool = True,
) -> Prepared:
    """Reads the messages, loads and cuts up their images and videos, renders the template, finds positions.

    options: by upstream names (see messages.py). folder: where relative file names start. allow_files=False takes only
    attached objects and data: URIs. Raises InputError for what cannot be used.
    """
    timings = Timings()
    started = time.perf_counter()
    conversation = read_messages(messages, options=options, folder=folder, allow_files=allow_files)
    preprocess = time.perf_counter() - started
    shown: list[Patches | Pictures] = []
    for visual in conversation.visuals:
        item, spent = _load(manifest, visual)
        shown.append(item)
        preprocess += spent.preprocess
        timings = replace(timings, decode_image=timings.decode_image + spent.decode_image)
    started = time.perf_counter()
    prompt = builder.build(conversation, shown)
    all_patches = [tile for item in shown for tile in (item.tiles if isinstance(item, Pictures) else (item,))]
    prepared = _place(manifest, prompt.text, prompt.input_ids, all_patches, prompt.runs)
    preprocess += time.perf_counter() - started
    timings = replace(timings, preprocess=preprocess, num_prompt_tokens=len(prompt.input_ids))
    return replace(prepared, timings=timings)


def prepare_ids(
    builder: PromptBuilder,
    manifest: RequestParts,
    input_ids: Array,
    images: Sequence[Patches],
    videos: Sequence[Patches],
) -> Prepared:
    """The same from ids [S] whose placeholders are expanded already. Raises InputError where counts do not match."""
    ids = np.asarray(input_ids, np.int64)
    if ids.ndim != 1 or ids.size == 0:
        raise InputError(f"input_ids: shape {list(ids.shape)} is not one row of at least one id")
    runs = builder.runs(ids, images, videos)
    left = {"image": iter(images), "video": iter(videos)}
    return _place(manifest, "", ids, [next(left[run.kind]) for run in runs], runs)


def _place(
    manifest: RequestParts, text: str, ids: Array, visuals: Sequence[Patches], runs: Sequence[VisualRun]
) -> Prepared:
    if manifest.positions is None:
        raise PackageError(
            "vlmport.json: has no positions, so this package takes no prompt; export the checkpoint again"
        )
    hidden = np.isin(ids, manifest.positions.hidden_token_ids)
    if hidden.any():
        return _place_around(hidden, Prepared(text, ids, tuple(visuals), tuple(runs), ids, 0, Timings()))
    place = positions(manifest.positions, len(ids), runs)
    limit = None if manifest.prompt is None or not runs else manifest.prompt.max_tokens
    visible = None if limit is None or len(ids) <= limit else np.arange(len(ids)) < limit
    return Prepared(text, ids, tuple(visuals), tuple(runs), place.position_ids, place.rope_delta, Timings(), visible)


def _place_around(hidden: Array, prepared: Prepared) -> Prepared:
    """Positions of a prompt, of which `hidden` [S] tokens have none of their own (the reference gives them 1)."""
    if hidden[-1]:
        raise InputError(
            f"input_ids: end with {prepared.input_ids[-1]}, a token that this model's own code hides; end with another"
        )
    visible = ~hidden
    place = np.where(visible, np.cumsum(visible) - 1, 1)
    return replace(prepared, position_ids=place, visible=visible)


def _load(manifest: RequestParts, visual: Visual) -> tuple[Patches | Pictures, Timings]:
    """What one visual becomes, and the time it took to decode and to cut it up."""
    if manifest.image is None or (visual.kind == "video" and manifest.video is None):
        raise InputError(f"{visual.where}: this model takes no {visual.kind}; leave it out")
    source = visual.source
    label = source_label(source, visual.where) if isinstance(source, (str, Path)) else visual.where
    started = time.perf_counter()
    clip = None
    if visual.kind == "image":
        frames = (load_image(visual.source, name=visual.where),)
    else:
        assert manifest.video is not None
        clip = load_clip(visual.source, manifest.video, manifest.image, visual.clip_options, name=visual.where)
        frames = clip.frames
    decoded = time.perf_counter()
    if manifest.image.strategy in _CUTTERS:
        item = _cut(frames, manifest, visual, label)
    elif clip is None:
        item = preprocess_images(frames, manifest.image, visual.image_options, name=label)
    else:
        item = preprocess_clip(clip, manifest.image, visual.image_options, name=label)
    return item, Timings(decode_image=decoded - started, preprocess=time.perf_counter() - decoded)


def _cut(frames: Sequence[Image.Image], manifest: RequestParts, visual: Visual, label: str) -> Pictures:
    """An image or each frame of a clip in tiles. A list of frames is so many images; a clip has defaults of its own."""
    assert manifest.image is not None
    cut, options, video = _CUTTERS[manifest.image.strategy], visual.image_options, manifest.video
    if visual.kind == "video" and video is not None and not isinstance(visual.source, (list, tuple)):
        options = replace(
            options,
            max_slice_nums=video.max_slices if options.max_slice_nums is None else options.max_slice_nums,
            use_image_id=video.use_ids if options.use_image_id is None else options.use_image_id,
        )
    return Pictures(tuple(cut(frame, manifest.image, options, name=label) for frame in frames), options.use_image_id)
