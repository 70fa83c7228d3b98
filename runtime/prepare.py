"""Messages to everything the graphs need, on the CPU and without ONNX Runtime: ids, patches, positions.

S  tokens of the prompt, placeholders expanded
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError, PackageError
from .generate import Timings
from .image import Patches, load_image, preprocess_images, source_label
from .manifest import Manifest
from .messages import Visual, read_messages
from .positions import VisualRun, positions
from .prompt import PromptBuilder
from .session import Array
from .video import load_clip, preprocess_clip

__all__ = ["Prepared", "prepare_ids", "prepare_messages"]


@dataclass(frozen=True)
class Prepared:
    """A prompt, ready for the graphs. `visuals` and `runs` go together, in the order of their placeholders."""

    text: str  # the rendered template, each placeholder once; empty where the request came as ids
    input_ids: Array  # int64 [S]
    visuals: tuple[Patches, ...]
    runs: tuple[VisualRun, ...]  # where the rows of each visual go
    position_ids: Array  # int64 [3, S] or [S]
    rope_delta: int  # position of the token after the cache's n-th is n + rope_delta
    timings: Timings

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
    manifest: Manifest,
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
    all_patches: list[Patches] = []
    for visual in conversation.visuals:
        patches, spent = _load_patches(manifest, visual)
        all_patches.append(patches)
        preprocess += spent.preprocess
        timings = replace(timings, decode_image=timings.decode_image + spent.decode_image)
    started = time.perf_counter()
    prompt = builder.build(conversation, all_patches)
    prepared = _place(manifest, prompt.text, prompt.input_ids, all_patches, prompt.runs)
    preprocess += time.perf_counter() - started
    timings = replace(timings, preprocess=preprocess, num_prompt_tokens=len(prompt.input_ids))
    return replace(prepared, timings=timings)


def prepare_ids(
    builder: PromptBuilder, manifest: Manifest, input_ids: Array, images: Sequence[Patches], videos: Sequence[Patches]
) -> Prepared:
    """The same from ids [S] whose placeholders are expanded already. Raises InputError where counts do not match."""
    ids = np.asarray(input_ids, np.int64)
    if ids.ndim != 1 or ids.size == 0:
        raise InputError(f"input_ids: shape {list(ids.shape)} is not one row of at least one id")
    runs = builder.runs(ids, images, videos)
    left = {"image": iter(images), "video": iter(videos)}
    return _place(manifest, "", ids, [next(left[run.kind]) for run in runs], runs)


def _place(
    manifest: Manifest, text: str, ids: Array, visuals: Sequence[Patches], runs: Sequence[VisualRun]
) -> Prepared:
    if manifest.positions is None:
        raise PackageError(
            "vlmport.json: has no positions, so this package takes no prompt; export the checkpoint again"
        )
    place = positions(manifest.positions, len(ids), runs)
    return Prepared(text, ids, tuple(visuals), tuple(runs), place.position_ids, place.rope_delta, Timings())


def _load_patches(manifest: Manifest, visual: Visual) -> tuple[Patches, Timings]:
    """The patches of one visual, and the time it took to decode and to cut it up."""
    if manifest.image is None or (visual.kind == "video" and manifest.video is None):
        raise InputError(f"{visual.where}: this model takes no {visual.kind}; leave it out")
    source = visual.source
    label = source_label(source, visual.where) if isinstance(source, (str, Path)) else visual.where
    started = time.perf_counter()
    if visual.kind == "image":
        image = load_image(visual.source, name=visual.where)
        decoded = time.perf_counter()
        patches = preprocess_images([image], manifest.image, visual.image_options, name=label)
    else:
        assert manifest.video is not None
        clip = load_clip(visual.source, manifest.video, manifest.image, visual.clip_options, name=visual.where)
        decoded = time.perf_counter()
        patches = preprocess_clip(clip, manifest.image, visual.image_options, name=label)
    return patches, Timings(decode_image=decoded - started, preprocess=time.perf_counter() - decoded)
