"""How right an answer is, from 0 to 1, and from where on it counts as right. Scorers are found by name.

| name | score | right from | source |
|---|---|---|---|
| exact_match | 1 where the texts are equal, white space at both ends aside | 1 | |
| anls | 1 - edit distance / longer length, case aside; 0 below a half | 0.5 | DocVQA, arXiv 1905.13648 |
| relaxed_accuracy | 1 for a number within 5 %, else for equal text, case aside | 1 | ChartQA, arXiv 2203.10244 |
| number_match | 1 where the same numbers stand in the same order, whatever is around them | 1 | |
| iou | intersection over union of two boxes x1, y1, x2, y2 | 0.5 | PASCAL VOC |
| multiple_choice | 1 where the same letter is chosen | 1 | |

Of several expected answers the best counts.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from types import MappingProxyType

__all__ = ["SCORERS", "Scorer"]

# Not within a word: the 2 of "bbox_2d" is none.
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?|(?<![\w.])[-+]?\.\d+")
_GROUPED = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_CHOICE = re.compile(r"\(([A-Z])\)|\b([A-Z])\b(?=\s*(?:[.):,]|$))")
_RELAXED = 0.05
_MAX_EDIT_TEXT = 4096  # characters; the distance takes the product of both lengths


@dataclass(frozen=True)
class Scorer:
    """`score(answer, expected)` in 0..1 for one expected answer."""

    name: str
    score_one: Callable[[str, str], float]
    right_from: float

    def score(self, answer: str, expected: Sequence[str]) -> float:
        """The best over all expected answers, of which there is at least one."""
        return max(self.score_one(answer, each) for each in expected)

    def is_right(self, score: float) -> bool:
        return score >= self.right_from


def _exact_match(answer: str, expected: str) -> float:
    return float(answer.strip() == expected.strip())


def _anls(answer: str, expected: str) -> float:
    left, right = (" ".join(text.lower().split())[:_MAX_EDIT_TEXT] for text in (answer, expected))
    if not left and not right:
        return 1.0
    similarity = 1 - _edit_distance(left, right) / max(len(left), len(right))
    return similarity if similarity >= 0.5 else 0.0


def _relaxed_accuracy(answer: str, expected: str) -> float:
    given, asked = _as_number(answer), _as_number(expected)
    if given is None or asked is None:
        return float(answer.strip().lower() == expected.strip().lower())
    if asked == 0:
        return float(given == 0)
    return float(abs(given - asked) <= abs(asked) * _RELAXED)


def _number_match(answer: str, expected: str) -> float:
    asked = _numbers(expected)
    return float(bool(asked) and _numbers(answer) == asked)


def _iou(answer: str, expected: str) -> float:
    given, asked = _box(answer), _box(expected)
    if given is None or asked is None:
        return 0.0
    width = min(given[2], asked[2]) - max(given[0], asked[0])
    height = min(given[3], asked[3]) - max(given[1], asked[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = _area(given) + _area(asked) - shared
    return shared / union if union > 0 else float(given == asked)


def _multiple_choice(answer: str, expected: str) -> float:
    given, asked = _choice(answer), _choice(expected)
    return float(asked is not None and given == asked)


def _edit_distance(left: str, right: str) -> int:
    """Levenshtein's, two rows at a time."""
    before = list(range(len(right) + 1))
    for row, a in enumerate(left, 1):
        now = [row]
        for column, b in enumerate(right, 1):
            now.append(min(before[column] + 1, now[-1] + 1, before[column - 1] + (a != b)))
        before = now
    return before[-1]


def _as_number(text: str) -> float | None:
    """The number that a whole text is, a per cent sign or a currency aside; as ChartQA, 50 % is 0.5."""
    stripped = text.strip().strip("$€£ ")
    percent = stripped.endswith("%")
    found = _decimal(stripped.rstrip("% "))
    return None if found is None else float(found) / (100 if percent else 1)


def _numbers(text: str) -> list[Decimal]:
    parts: list[str] = []
    for match in _NUMBER.findall(text):
        # A comma separates thousands only between groups of three digits; else it ends a number.
        parts += [match] if "," not in match or _GROUPED.fullmatch(match) else match.split(",")
    return [number for part in parts if (number := _decimal(part)) is not None]


def _decimal(text: str) -> Decimal | None:
    try:
        number = Decimal(text.replace(",", "") if _GROUPED.fullmatch(text) else text)
    except InvalidOperation:
        return None
    return number if number.is_finite() and math.isfinite(float(number)) else None


def _box(text: str) -> tuple[float, float, float, float] | None:
    found = [float(number) for number in _numbers(text)]
    if len(found) != 4:
        return None
    x1, y1, x2, y2 = found
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def _area(box: tuple[float, float, float, float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _choice(text: str) -> str | None:
    """The letter of a choice: "B", "(B)", "B. a dog", "The answer is B"; the last one that is marked as such."""
    stripped = text.strip()
    if len(stripped) == 1 and stripped.isalpha():
        return stripped.upper()
    found = _CHOICE.findall(stripped)
    return "".join(found[-1]) if found else None


SCORERS: Mapping[str, Scorer] = MappingProxyType(
    {
        scorer.name: scorer
        for scorer in (
            Scorer("exact_match", _exact_match, 1.0),
            Scorer("anls", _anls, 0.5),
            Scorer("relaxed_accuracy", _relaxed_accuracy, 1.0),
            Scorer("number_match", _number_match, 1.0),
            Scorer("iou", _iou, 0.5),
            Scorer("multiple_choice", _multiple_choice, 1.0),
        )
    }
)
