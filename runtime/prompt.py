"""Messages to token ids: chat template, tokenizer, and as many placeholder tokens as an image or clip has features.

The text of a message is the user's: when it spells a control token such as an image placeholder, that stretch is
encoded as ordinary text and becomes no slot. Where it spells none, the rendered text goes through the tokenizer whole,
exactly as the reference does it. To know whose a stretch is, the template is rendered again with texts between marks.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .chat_template import ChatTemplate
from .errors import InputError, PackageError
from .image import Patches
from .manifest import Manifest, PromptSpec, VisionSpec
from .messages import Conversation
from .positions import VisualRun
from .slices import Pictures
from .tile_prompt import Kind, TilePrompt, tile_prompt
from .vision_inputs import num_rows

__all__ = ["Prompt", "PromptBuilder"]

_PRIVATE_USE = range(0xE000, 0xF900)  # code points without a meaning, for the two marks


@dataclass(frozen=True)
class Prompt:
    """What the decoder is asked, and where its images and clips go."""

    text: str  # as the template wrote it, each placeholder once
    input_ids: NDArray[np.int64]  # [S], each placeholder as often as it has features
    runs: tuple[VisualRun, ...]  # in order of the placeholders


class PromptBuilder:
    """The template and tokenizer of one package."""

    def __init__(self, template: str, tokenizer: Tokenizer, spec: PromptSpec, vision: VisionSpec) -> None:
        """vision: says how many tokens an image takes. Raises PackageError."""
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer
        self.template = ChatTemplate(template)
        self.image_token_id = self._placeholder_id(spec.image_placeholder, spec.image_placeholder_id)
        self.video_token_id = self._placeholder_id(spec.video_placeholder, spec.video_placeholder_id)
        self._spec = spec
        self._vision = vision
        ids = {spec.image_placeholder: self.image_token_id, spec.video_placeholder: self.video_token_id}
        self._marks = {text: id for text, id in ids.items() if id < 0}  # placeholders that are no tokens
        self._leading = [self._token_id(token) for token in spec.leading_tokens]
        self._tiles = tile_prompt(spec, self._token_id)
        longest_first = sorted(spec.protected_tokens, key=len, reverse=True)  # as the tokenizer matches them
        self._protected = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @classmethod
    def from_package(cls, folder: Path, manifest: Manifest) -> "PromptBuilder":
        """Reads chat_template.jinja and tokenizer.json of a package. Raises PackageError naming the file."""
        if manifest.prompt is None:
            raise PackageError(f"{folder}: vlmport.json has no prompt part, so this package takes no messages")
        file = folder / "tokenizer.json"
        try:
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PackageError(f"{folder}: {error}; export the checkpoint again") from error
        try:
            tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises nothing narrower
            raise PackageError(
                f"{file}: is not a tokenizer ({str(error)[:200]}); export the checkpoint again"
            ) from error
        vision = manifest.vision or VisionSpec((), manifest.image.merge_size if manifest.image else 1, 0)
        return cls(template, tokenizer, manifest.prompt, vision)

    def build(self, conversation: Conversation, shown: Sequence[Patches | Pictures]) -> Prompt:
        """The prompt of a conversation whose images and clips became `shown`, in the same order.

        Raises InputError for unknown template options and where the template leaves out a part.
        """
        assert len(shown) == len(conversation.visuals), "one entry a visual"
        options = self._options(conversation.template_options)
        counts = [len(item.pictures) if isinstance(item, Pictures) else 1 for item in shown]
        text = self._render(conversation.messages, counts, options)
        user_tokens = self._user_tokens(conversation, counts, options, text)
        if self._tiles is not None:
            pictures = [item for item in shown if isinstance(item, Pictures)]
            return self._build_tiles(self._tiles, conversation, pictures, text, user_tokens)
        patches = [item for item in shown if isinstance(item, Patches)]
        ids = self._led(text, self._encode_between(text, user_tokens))
        kinds = [visual.kind for visual in conversation.visuals]
        slots = np.flatnonzero(self._is_placeholder(ids))
        found = [self._kind(ids[slot]) for slot in slots]
        if found != kinds:
            raise InputError(
                f"messages: the chat template left places for {_counts(found)}, the messages have {_counts(kinds)}; "
                "put images and videos where the template takes them"
            )
        repeats = np.ones(len(ids), np.int64)
        repeats[slots] = [num_rows(self._vision, p.grid) for p in patches]
        ids = np.repeat(ids, repeats)
        by_kind = {k: [p for p, kind in zip(patches, kinds, strict=True) if kind == k] for k in ("image", "video")}
        return Prompt(text, ids, self.runs(ids, by_kind["image"], by_kind["video"]))

    def _build_tiles(
        self,
        tiles: TilePrompt,
        conversation: Conversation,
        shown: Sequence[Pictures],
        text: str,
        user_tokens: Sequence[tuple[int, int]],
    ) -> Prompt:
        """The prompt whose pictures are spelled out in the text, as the reference does it before it encodes that."""
        matches = re.finditer(re.escape(self._spec.image_placeholder), text)
        slots = [match.span() for match in matches if match.span() not in user_tokens]
        pictures = [(picture, item.use_ids) for item in shown for picture in item.pictures]
        if len(slots) != len(pictures):
            raise InputError(
                f"messages: the chat template left places for {len(slots)} pictures, the messages have "
                f"{len(pictures)}; put images and videos where the template takes them"
            )
        spelled = {
            slot: tiles.text(picture.grid, number, use_ids)
            for number, (slot, (picture, use_ids)) in enumerate(zip(slots, pictures, strict=True))
        }
        ids = self._led(text, self._encode(_cut(text, user_tokens, spelled)))
        kinds: list[Kind] = [
            visual.kind for visual, item in zip(conversation.visuals, shown, strict=True) for _ in item.tiles
        ]
        return Prompt(text, ids, tiles.runs(ids, kinds))

    def runs(
        self, input_ids: NDArray[np.int64], images: Sequence[Patches], videos: Sequence[Patches]
    ) -> tuple[VisualRun, ...]:
        """Where images and videos go in ids [S] whose placeholders are expanded. Raises InputError on any mismatch."""
        if self._tiles is not None:
            kinds: list[Kind] = ["image"] * len(images)
            if videos:
                raise InputError("videos: this package takes the frames of a clip as images; give their tiles there")
            return self._tiles.runs(input_ids, kinds)
        waiting = {"image": iter(images), "video": iter(videos)}
        slots = np.flatnonzero(self._is_placeholder(input_ids))
        runs: list[VisualRun] = []
        done = 0
        while done < len(slots):
            start = int(slots[done])
            kind = self._kind(input_ids[start])
            patches = next(waiting[kind], None)
            length = 0 if patches is None else num_rows(self._vision, patches.grid)
            if patches is None or not (input_ids[start : start + length] == input_ids[start]).all() or not length:
                self._refuse(input_ids, images, videos)
            (t, h, w), merge = patches.grid, self._vision.merge_size
            runs.append(VisualRun(kind, start, (t, h // merge, w // merge), patches.seconds_per_grid, length))
            done += length
        if sum(run.length for run in runs) != len(slots) or len(runs) != len(images) + len(videos):
            self._refuse(input_ids, images, videos)
        return tuple(runs)

    def _refuse(self, input_ids: NDArray[np.int64], images: Sequence[Patches], videos: Sequence[Patches]) -> NoReturn:
        for name, id_, patches in (("image", self.image_token_id, images), ("video", self.video_token_id, videos)):
            places = int((input_ids == id_).sum())
            needed = [num_rows(self._vision, p.grid) for p in patches]
            if places != sum(needed):
                raise InputError(
                    f"input_ids: {places} {name} placeholders for {len(needed)} {name}s that take {sum(needed)}; "
                    f"give each {name} its own number of placeholders"
                )
        raise InputError("input_ids: placeholders of images or videos do not stand together; keep each run whole")

    def _options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The package's defaults under what the user wishes; a generation prompt unless told otherwise."""
        known = self.template.variables | set(self._spec.template_options) | {"add_generation_prompt"}
        unknown = sorted(set(given) - known)
        if unknown:
            raise InputError(
                f"options.{unknown[0]}: is no option of this chat template; it has {', '.join(sorted(known))}"
            )
        return {"add_generation_prompt": True, **self._spec.template_options, **given}

    def _render(self, messages: Sequence[Mapping[str, Any]], counts: Sequence[int], options: Mapping[str, Any]) -> str:
        """The template's text. Where it takes texts, the parts of a message are joined to one; counts: pictures."""
        if self._spec.joiner is None:
            return self.template.render(messages, options)
        waiting = iter(counts)
        return self.template.render([self._joined(message, waiting) for message in messages], options)

    def _joined(self, message: Mapping[str, Any], counts: Iterator[int]) -> dict[str, Any]:
        content: str | list[dict[str, Any]] = message["content"]
        if isinstance(content, str):
            return {**message}
        texts: list[str] = []
        for part in content:
            texts += [part["text"]] if part["type"] == "text" else [self._spec.image_placeholder] * next(counts)
        return {**message, "content": str(self._spec.joiner).join(texts)}

    def _user_tokens(
        self, conversation: Conversation, counts: Sequence[int], options: Mapping[str, Any], text: str
    ) -> list[tuple[int, int]]:
        """Stretches of the rendered text that spell a protected token with at least one character of the user's."""
        matches = [match.span() for match in self._protected.finditer(text)]
        if not matches:
            return []
        spans = self._user_spans(conversation, counts, options, text)
        if spans is None:
            if any(self._protected.search(part) for message in conversation.messages for part in _texts(message)):
                raise InputError(
                    "messages: a text holds a control token, and this chat template changes texts so that it cannot be "
                    "told from the template's own; take the token out of the text"
                )
            return []
        return [match for match in matches if any(start < match[1] and match[0] < stop for start, stop in spans)]

    def _user_spans(
        self, conversation: Conversation, counts: Sequence[int], options: Mapping[str, Any], text: str
    ) -> list[tuple[int, int]] | None:
        """Where texts of messages stand in the rendered text; None where the template changes them."""
        taken = {*text, *self.template.source}
        free = (chr(code) for code in _PRIVATE_USE if chr(code) not in taken)
        opening, closing = next(free, ""), next(free, "")
        if not closing:
            return None
        marked = self._render([_marked(m, opening, closing) for m in conversation.messages], counts, options)
        plain: list[str] = []
        spans: list[tuple[int, int]] = []
        length, start = 0, None
        for piece in re.split(f"([{opening}{closing}])", marked):
            if piece == opening and start is None:
                start = length
            elif piece == closing and start is not None:
                spans.append((start, length))
                start = None
            elif piece in (opening, closing):
                return None
            else:
                plain.append(piece)
                length += len(piece)
        return spans if start is None and "".join(plain) == text else None

    def _led(self, text: str, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Ids with the leading tokens in front, as transformers' processors do it: once, whoever writes them."""
        if not self._leading or text.startswith(self._spec.leading_tokens[0]):
            return ids
        return np.concatenate([np.array(self._leading, np.int64), ids])

    def _encode_between(self, text: str, user_tokens: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
        """Ids of the prompt with each placeholder once.

        Where placeholders are no tokens, the text between them is encoded a stretch at a time, as LLaVA's
        tokenizer_image_token does it. One that a user spells is text like any other.
        """
        spans = [match.span() for match in re.finditer("|".join(map(re.escape, self._marks)) or "(?!)", text)]
        control = [span for span in user_tokens if span not in spans]
        ids: list[NDArray[np.int64]] = []
        done = 0
        for start, stop in [*(span for span in spans if span not in user_tokens), (len(text), len(text))]:
            inside = [(first - done, last - done) for first, last in control if done <= first < start]
            ids.append(self._encode(_cut(text[done:start], inside)))
            ids.append(np.array([self._marks[text[start:stop]]] if stop > start else [], np.int64))
            done = stop
        return np.concatenate(ids)

    def _encode(self, pieces: Sequence[tuple[str, bool]]) -> NDArray[np.int64]:
        """Ids of a text in pieces: the user's control tokens as ordinary text, all else as the tokenizer has it."""
        ids: list[int] = []
        for text, plain in pieces:
            encoded = self._encode_plainly(text) if plain else self.tokenizer.encode(text, add_special_tokens=False).ids
            ids += encoded
        return np.array(ids, np.int64)

    def _encode_plainly(self, text: str) -> list[int]:
        """Ids of a control token's letters: the tokenizer's steps one by one, without its table of added tokens."""
        normalizer, pre_tokenizer = self.tokenizer.normalizer, self.tokenizer.pre_tokenizer
        text = normalizer.normalize_str(text) if normalizer else text
        pieces = [piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)] if pre_tokenizer else [text]
        ids = [token.id for piece in pieces for token in self.tokenizer.model.tokenize(piece)]
        if self.tokenizer.token_to_id(text) in ids:
            raise InputError(f"messages: the tokenizer cannot spell {text} as ordinary text; take it out of the text")
        return ids

    def _token_id(self, placeholder: str) -> int:
        token_id = self.tokenizer.token_to_id(placeholder)
        if token_id is None:
            raise PackageError(f"vlmport.json: the placeholder {placeholder!r} is no token of tokenizer.json")
        return token_id

    def _placeholder_id(self, placeholder: str, no_token: int | None) -> int:
        return self._token_id(placeholder) if no_token is None else no_token

    def _is_placeholder(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        return (ids == self.image_token_id) | (ids == self.video_token_id)

    def _kind(self, token_id: np.int64) -> Kind:
        return "image" if token_id == self.image_token_id else "video"


def _texts(message: Mapping[str, Any]) -> Iterator[str]:
    content: str | list[dict[str, Any]] = message["content"]
    if isinstance(content, str):
        yield content
    else:
        yield from (part["text"] for part in content if part["type"] == "text")


def _marked(message: Mapping[str, Any], opening: str, closing: str) -> dict[str, Any]:
    """The message with each text between marks, inside of its outer white space: templates trim that."""

    def mark(text: str) -> str:
        core = text.strip()
        return text.replace(core, opening + core + closing, 1) if core else text

    content: str | list[dict[str, Any]] = message["content"]
    if isinstance(content, str):
        return {**message, "content": mark(content)}
    parts = [{**part, "text": mark(part["text"])} if part["type"] == "text" else part for part in content]
    return {**message, "content": parts}


def _cut(
    text: str, user_tokens: Sequence[tuple[int, int]], replaced: Mapping[tuple[int, int], str] | None = None
) -> list[tuple[str, bool]]:
    """A text in pieces (text, is it a user's control token), with stretches replaced. What may stay whole does."""
    swaps = replaced or {}
    pieces: list[tuple[str, bool]] = []
    whole, done = "", 0
    for start, stop in sorted([*user_tokens, *swaps]):
        whole += text[done:start]
        done = stop
        if (start, stop) in swaps:
            whole += swaps[start, stop]
            continue
        pieces += [(whole, False), (text[start:stop], True)]
        whole = ""
    return [*pieces, (whole + text[done:], False)]


def _counts(kinds: Sequence[str]) -> str:
    return f"{kinds.count('image')} images and {kinds.count('video')} videos"
