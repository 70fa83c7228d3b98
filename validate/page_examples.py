"""The worst examples of report.html: picture, question, what each side answered, and where they part."""

import base64
import io
import math
from collections.abc import Callable, Sequence

from markupsafe import Markup, escape
from PIL import Image

from .page_parts import Document, ExampleCard, Section, number
from .report_text import reference_name

__all__ = ["Pictures", "examples"]

Pictures = Callable[[str], bytes | None]  # by the path that a task names; None where there is none
_NUM_EXAMPLES = 10
_THUMBNAIL = 512  # pixels of the longer side


def examples(document: Document, pictures: Pictures) -> Section | None:
    scored = [v for v in document["variants"] if v.get("task")]
    if not scored:
        return None
    items = scored[0]["task"]["answers"]
    named = reference_name(document)
    worst = sorted(range(len(items)), key=lambda index: _severity(scored, index), reverse=True)
    cards = [
        _card(scored, index, pictures, named) for index in worst[:_NUM_EXAMPLES] if _severity(scored, index) > (0, 0)
    ]
    if not cards:
        return None
    about = (
        "Answers that are not the reference's, those first that became wrong or right by it. "
        "Marked: where a text first differs from the reference's."
    )
    return Section("examples", "Worst examples", about, examples=tuple(cards))


def _severity(scored: Sequence[Document], index: int) -> tuple[int, int]:
    given = [variant["task"]["answers"][index] for variant in scored]
    flipped = sum(answer.get("right") != answer.get("reference_right") for answer in given)
    return flipped, sum(answer["answer"].strip() != answer["reference"].strip() for answer in given)


def _card(scored: Sequence[Document], index: int, pictures: Pictures, named: str) -> ExampleCard:
    item = scored[0]["task"]["answers"][index]
    steps: list[str] = []
    who: dict[str, list[str]] = {item["reference"]: [named]}  # by text, so that equal answers stand there once
    for variant in scored:
        who.setdefault(variant["task"]["answers"][index]["answer"], []).append(variant["name"])
        for each in (variant.get("statistics") or {}).get("divergences", ()):
            if each["sample"] == item["id"]:
                kind = "a near tie" if each["tie_like"] else "an error"
                margin = number(each["reference_margin"])
                detail = f"the reference's margin there is {margin:.2g} nats, {kind}" if math.isfinite(margin) else kind
                steps.append(f"{variant['name']} leaves at token {each['step']} ({detail})")
    file = pictures(item["image"]) if item["image"] else None
    return ExampleCard(
        title=item["question"],
        about=f"{', '.join(filter(None, (item['id'], item['kind'])))}. {'; '.join(steps)}",
        picture="" if file is None else _thumbnail(file),
        alt=f"the picture of example {item['id']}",
        answers=(
            ("expected", escape(item["expected"])),
            *((", ".join(names), _marked(item["reference"], text)) for text, names in who.items()),
        ),
    )


def _marked(reference: str, text: str) -> Markup:
    """The answer with its first other word marked."""
    start = next(
        (i for i, (a, b) in enumerate(zip(reference, text, strict=False)) if a != b), min(len(reference), len(text))
    )
    if reference == text:
        return escape(text)
    start = max(text.rfind(mark, 0, start) + 1 for mark in (" ", "\n"))
    end = min((place for mark in (" ", "\n") if (place := text.find(mark, start)) >= 0), default=len(text))
    marked = text[start:end] or "(ends here)"
    return escape(text[:start]) + Markup("<mark>") + escape(marked) + Markup("</mark>") + escape(text[end:])


def _thumbnail(file: bytes) -> str:
    with Image.open(io.BytesIO(file)) as picture:
        small = picture.convert("RGB")
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
