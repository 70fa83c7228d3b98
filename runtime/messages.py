"""Chat messages as people send them, checked in full before anything is opened.

Two forms are read, that of OpenAI's API and that of Hugging Face's processors:

    {"role": "user", "content": "text"}
    {"role": "user", "content": [{"type": "text", "text": "..."},
                                 {"type": "image", "image": <path, data: URI, bytes, array, Pillow>, "max_pixels": 1},
                                 {"type": "image_url", "image_url": {"url": <path or data: URI>}},
                                 {"type": "video", "video": <path or list of frames>, "fps": 2},
                                 {"type": "image"}]}           takes the next of a separate list of images

Nothing is fetched: an address on a network is refused. Every error names messages[i].content[j].
"""

import base64
import binascii
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from PIL import Image

from .errors import InputError
from .image import ImageOptions
from .video import ClipOptions

__all__ = ["Conversation", "Visual", "read_messages"]

_ROLES = ("system", "user", "assistant", "tool")
_KINDS: dict[str, Literal["image", "video"]] = {
    "image": "image",
    "image_url": "image",
    "video": "video",
    "video_url": "video",
}
_SOURCE_KEYS = ("path", "url")  # besides the part's own type
_ALIASES = {"nframes": "num_frames"}  # as qwen-vl-utils has it
_INTEGERS = ("num_frames", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels", "max_slice_nums")
_SWITCHES = ("use_image_id",)
_CHOICES = {"aspect_ratio": ("pad",)}
_SECONDS = ("s", "e")
_IMAGE_OPTIONS = frozenset(field.name for field in fields(ImageOptions))
_CLIP_OPTIONS = frozenset(field.name for field in fields(ClipOptions))
_OPTIONS = _IMAGE_OPTIONS | _CLIP_OPTIONS  # of a video part, whose frames are images too
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:(?=//)|data:", re.IGNORECASE)


@dataclass(frozen=True)
class Visual:
    """An image or a clip that a message shows."""

    kind: Literal["image", "video"]
    source: Any  # an ImageSource or ClipSource; URIs are resolved
    where: str  # "messages[0].content[1]"
    image_options: ImageOptions
    clip_options: ClipOptions


@dataclass(frozen=True)
class Conversation:
    """Checked messages: what the chat template sees, and what it must leave a placeholder for, in that order."""

    messages: tuple[dict[str, Any], ...]  # role and content; parts are {"type": "text", "text": ...} or {"type": kind}
    visuals: tuple[Visual, ...]
    template_options: dict[str, Any]


@dataclass(frozen=True)
class _Request:
    """What holds for all messages of one call."""

    image_options: ImageOptions
    clip_options: ClipOptions
    folder: Path | None
    allow_files: bool


def read_messages(
    messages: Sequence[Mapping[str, Any]],
    *,
    images: Sequence[Any] = (),
    videos: Sequence[Any] = (),
    options: Mapping[str, Any] | None = None,
    folder: Path | None = None,
    allow_files: bool = True,
) -> Conversation:
    """Checks messages and finds their images and videos; nothing is opened yet.

    images, videos: for the parts without data, in order. options: pixel and frame limits for all parts without their
    own; the rest is for the chat template. folder: where relative file names start. allow_files=False: a server's
    choice, takes data: URIs and attached objects alone. Raises InputError naming the message and part.
    """
    limits, template_options = _split_options(options or {})
    image_options = replace(ImageOptions(), **{k: v for k, v in limits.items() if k in _IMAGE_OPTIONS})
    clip_options = replace(ClipOptions(), **{k: v for k, v in limits.items() if k in _CLIP_OPTIONS})
    request = _Request(image_options, clip_options, folder, allow_files)
    _expect(isinstance(messages, (list, tuple)), "messages", f"is a {type(messages).__name__}, not a list of messages")
    _expect(len(messages) > 0, "messages", "is empty; give at least one message")
    plain: list[dict[str, Any]] = []
    visuals: list[Visual] = []
    for i, message in enumerate(messages):
        role, content = _role_and_content(message, f"messages[{i}]")
        if isinstance(content, str):
            plain.append({"role": role, "content": content})
            continue
        parts: list[dict[str, Any]] = []
        for j, part in enumerate(content):
            found = _read_part(part, f"messages[{i}].content[{j}]", request)
            if isinstance(found, Visual):
                visuals.append(found)
                parts.append({"type": found.kind})
            else:
                parts.append({"type": "text", "text": found})
        plain.append({"role": role, "content": parts})
    filled = _fill(visuals, {"image": images, "video": videos}, request)
    return Conversation(tuple(plain), filled, template_options)


def _role_and_content(message: Any, where: str) -> tuple[str, str | Sequence[Any]]:
    fields_ = _object(message, where)
    _known(fields_, ("role", "content"), where)
    role, content = fields_.get("role"), fields_.get("content")
    _expect(role in _ROLES, f"{where}.role", f"is {_shown(role)}; give one of {', '.join(_ROLES)}")
    if isinstance(content, str):
        return str(role), _text(content, f"{where}.content")
    _expect(isinstance(content, (list, tuple)), f"{where}.content", "is neither a text nor a list of parts")
    return str(role), cast("Sequence[Any]", content)


def _read_part(part: Any, where: str, request: _Request) -> str | Visual:
    """The text of a text part, or the Visual of any other."""
    values = _object(part, where)
    kind = values.pop("type", None)
    if kind == "text":
        _known(values, ("text",), where)
        return _text(values.get("text"), f"{where}.text")
    _expect(
        isinstance(kind, str) and kind in _KINDS, f"{where}.type", f"is {_shown(kind)}; give text, {', '.join(_KINDS)}"
    )
    keys = [key for key in (kind, *_SOURCE_KEYS) if key in values]
    _expect(len(keys) <= 1, where, f"has both {' and '.join(keys)}; give one source")
    source = values.pop(keys[0]) if keys else None
    if isinstance(source, Mapping) and str(kind).endswith("_url"):
        source = _read_url(cast("Mapping[str, Any]", source), f"{where}.{kind}")
    kind = _KINDS[str(kind)]
    own = _read_options(values, where, _IMAGE_OPTIONS if kind == "image" else _OPTIONS)
    clip_own = {k: v for k, v in own.items() if k in _CLIP_OPTIONS}
    return Visual(
        kind,
        None if source is None else _resolve_source(kind, source, where, request),
        where,
        replace(request.image_options, **{k: v for k, v in own.items() if k in _IMAGE_OPTIONS}),
        replace(request.clip_options, **clip_own) if kind == "video" else request.clip_options,
    )


def _fill(visuals: Sequence[Visual], attached: Mapping[str, Sequence[Any]], request: _Request) -> tuple[Visual, ...]:
    """Parts without data take what is attached, in order, if there is one for each."""
    for kind, objects in attached.items():
        slots = sum(visual.kind == kind and visual.source is None for visual in visuals)
        _expect(
            slots == len(objects),
            "messages",
            f"{slots} {kind} parts have no data and {len(objects)} {kind}s are attached; give each part its {kind}",
        )
    waiting = {kind: iter(objects) for kind, objects in attached.items()}
    return tuple(
        replace(visual, source=_resolve_source(visual.kind, next(waiting[visual.kind]), visual.where, request))
        if visual.source is None
        else visual
        for visual in visuals
    )


def _read_url(value: Mapping[str, Any], where: str) -> Any:
    values = _object(value, where)
    _known(values, ("url", "detail"), where)
    detail = values.get("detail", "auto")
    _expect(
        detail in ("auto", "high"), f"{where}.detail", f"is {_shown(detail)}; give auto, or set max_pixels of the part"
    )
    _expect("url" in values, where, "has no url")
    return values["url"]


def _split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Limits of images and clips, and what is left for the chat template."""
    named = {_ALIASES.get(name, name): value for name, value in options.items()}
    limits = {name: value for name, value in named.items() if name in _OPTIONS}
    rest = {name: value for name, value in named.items() if name not in _OPTIONS}
    return _read_options(limits, "options", _OPTIONS), rest


def _read_options(values: Mapping[str, Any], where: str, known: frozenset[str]) -> dict[str, Any]:
    """Numbers above 0 and switches, by their names here."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = _ALIASES.get(key, key)
        _expect(name in known, f"{where}.{key}", f"is unknown; known are {', '.join(sorted(known))}")
        if name in _SWITCHES:
            _expect(isinstance(value, bool), f"{where}.{key}", f"is {_shown(value)}; give true or false")
            found[name] = value
            continue
        if name in _CHOICES:
            _expect(
                value in _CHOICES[name], f"{where}.{key}", f"is {_shown(value)}; give {' or '.join(_CHOICES[name])}"
            )
            found[name] = value
            continue
        kinds = (int,) if name in _INTEGERS else (int, float)
        least = -float("inf") if name in _SECONDS else 0
        fits = isinstance(value, kinds) and not isinstance(value, bool) and least < value < float("inf")
        wanted = f"{'a whole' if name in _INTEGERS else 'a'} number{'' if name in _SECONDS else ' above 0'}"
        _expect(fits, f"{where}.{key}", f"is {_shown(value)}; give {wanted}")
        found[name] = value
    return found


def _resolve_source(kind: str, source: Any, where: str, request: _Request) -> Any:
    if kind == "image":
        return _resolve(source, where, request)
    if isinstance(source, (list, tuple)):
        frames = cast("Sequence[Any]", source)
        return tuple(_resolve(frame, f"{where} frame {i}", request) for i, frame in enumerate(frames))
    _expect(not isinstance(source, Image.Image), where, "is one image; give a list of frames, or type image")
    return _resolve(source, where, request)


def _resolve(source: Any, where: str, request: _Request) -> Any:
    """A path, bytes, array or Pillow image; URIs become one of them. Raises InputError for any other."""
    if isinstance(source, (bytes, Image.Image, np.ndarray)):
        return cast("Any", source)
    _expect(
        isinstance(source, (str, Path)), where, f"is a {type(source).__name__}; give a path, a data: URI or an image"
    )
    text = str(source)
    match = _SCHEME.match(text) if isinstance(source, str) else None
    scheme = match.group().lower() if match else ""
    if scheme == "data:":
        return _decode_data(text, where)
    _expect(
        scheme in ("", "file:"),
        where,
        f"{text[:80]!r} is an address on a network; download it and give the file's path",
    )
    _expect(request.allow_files, where, "is a file of this machine; attach it as a data: URI")
    if scheme == "file:":
        parts = urllib.parse.urlsplit(text)
        _expect(parts.netloc in ("", "localhost"), where, f"{text[:80]!r} is on another machine; copy the file here")
        text = urllib.parse.unquote(parts.path)
    return request.folder / text if request.folder is not None else Path(text)


def _decode_data(uri: str, where: str) -> bytes:
    head, comma, body = uri.partition(",")
    _expect(
        bool(comma) and head.lower().endswith(";base64"), where, "is no data: URI of the form data:<type>;base64,<data>"
    )
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{where}: its data: URI is not base64 ({error}); encode it again") from error


def _object(value: Any, where: str) -> dict[str, Any]:
    """A JSON object without the fields that are null, which clients add for what they do not use."""
    _expect(isinstance(value, Mapping), where, f"is a {type(value).__name__}, not an object")
    return {key: item for key, item in cast("Mapping[str, Any]", value).items() if item is not None}


def _text(value: Any, where: str) -> str:
    _expect(isinstance(value, str), where, "is missing or not a text")
    text = str(value)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{where}: holds half of a surrogate pair, or a byte that is not UTF-8, at {error.start}; "
                "send whole characters"
            ) from error
    return text


def _known(values: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    unknown = sorted(str(key) for key in values if key not in known)
    _expect(not unknown, where, f"has an unknown field {unknown[:1]}; known are {', '.join(known)}")


def _shown(value: Any) -> str:
    """A value on one line, cut to a readable length."""
    return " ".join(repr(value).split())[:80]


def _expect(holds: bool, where: str, message: str) -> None:
    if not holds:
        raise InputError(f"{where}: {message}")
