"""Makes synthetic receipt images with questions and exact answers, each a pure function of (split, seed, index).

A receipt has one to eight items with unique names and a printed total, which is the sum of the prices. It is drawn in
one of several faces, sizes, papers and inks, at a native width and height that only chance makes a multiple of 28.

Whether a receipt may be trained on is decided by what is printed on it: a checksum of its text puts it on one side of
the split. No text of a held-out receipt can therefore appear in training, whatever the seeds.

    python examples/receipts/receipts.py OUT --num 500 --seed 7        writes a held-out task folder
"""

import argparse
import functools
import importlib.resources
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from vocabulary import NAMES, TOTAL_LABELS

Split = Literal["train", "heldout"]
Kind = Literal["total", "price", "dearest", "count", "text"]

KINDS: tuple[Kind, ...] = ("total", "price", "dearest", "count", "text")
MAX_ITEMS = 8
MAX_NEW_TOKENS = 128  # the longest whole text takes about 100 tokens
HELDOUT_SHARE = 16  # one text in so many is held out
PRICE_CENTS = (5, 9999)
DEAREST_GAP = 1.5  # the dearest item costs at least so many times the second: reading must decide, not the last cent
FACES = (  # (package, file); None is the face that Pillow carries
    (None, "built-in"),
    ("font_caladea", "Caladea-Regular.ttf"),
    ("font_hanken_grotesk", "HankenGrotesk-Regular.otf"),
    ("font_hanken_grotesk", "HankenGrotesk-SemiBold.otf"),
    ("font_manrope", "Manrope-Medium.ttf"),
)


@dataclass(frozen=True)
class Item:
    """One line of a receipt."""

    name: str
    cents: int


@dataclass(frozen=True)
class Receipt:
    """What is printed, and the picture of it: uint8 [height, width, 3]."""

    items: tuple[Item, ...]
    total_label: str
    image: np.ndarray

    @property
    def text(self) -> str:
        """All that is printed, a line a row."""
        return receipt_text(self.items, self.total_label)


@dataclass(frozen=True)
class Example:
    """A picture (uint8 [height, width, 3]), a question about it and the one exact answer."""

    image: np.ndarray
    question: str
    answer: str
    kind: Kind


def money(cents: int) -> str:
    """Cents as printed: 5 -> 0.05, 79992 -> 799.92."""
    return f"{cents // 100}.{cents % 100:02d}"


def receipt_text(items: tuple[Item, ...], total_label: str) -> str:
    """The printed lines joined by newlines: `name price` for each item, then the label and the sum."""
    return "\n".join(f"{left} {right}" for left, right in printed_rows(items, total_label))


def split_of(text: str) -> Split:
    """The side of the split that a printed text belongs to."""
    return "heldout" if zlib.crc32(text.encode()) % HELDOUT_SHARE == 0 else "train"


def make_receipt(
    split: Split, seed: int, index: int, max_items: int = MAX_ITEMS, variety: tuple[float, float] = (1.0, 1.0)
) -> Receipt:
    """Receipt `index` of stream `seed`. Depends on nothing else: no global random state, no earlier receipt.

    A beginner's lessons have fewer items and a range of less `variety`; held-out tasks have the defaults.
    """
    rng = np.random.default_rng([("train", "heldout").index(split), seed, index])
    while True:
        items = draw_items(rng, int(rng.integers(1, max_items + 1)))
        total_label = str(rng.choice(TOTAL_LABELS))
        if split_of(receipt_text(items, total_label)) == split:
            return Receipt(items, total_label, draw_image(rng, items, total_label, rng.uniform(*variety)))


def draw_items(rng: np.random.Generator, num_items: int) -> tuple[Item, ...]:
    """Items with unique names and one clearly dearest; half of the prices even in value, half even in magnitude."""
    names = rng.choice(NAMES, size=num_items, replace=False)
    low, high = PRICE_CENTS
    while True:
        flat = rng.integers(low, high + 1, size=num_items)
        magnitude = np.exp(rng.uniform(np.log(low), np.log(high + 1), size=num_items)).astype(int)
        cents = np.where(rng.random(num_items) < 0.5, flat, magnitude)
        descending = np.sort(cents)[::-1]
        if num_items == 1 or descending[0] >= DEAREST_GAP * descending[1]:
            return tuple(Item(str(name), int(value)) for name, value in zip(names, cents, strict=True))


@functools.lru_cache(maxsize=64)
def load_face(number: int, size: int) -> ImageFont.FreeTypeFont:
    """Face `number` of FACES at `size` pixels an em. Basic layout, so that the picture does not depend on libraqm."""
    package, file = FACES[number]
    if package is None:
        font = ImageFont.load_default(size)
        assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
        return font.font_variant(layout_engine=ImageFont.Layout.BASIC)
    path = importlib.resources.files(package) / "files" / file
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def draw_colours(rng: np.random.Generator, variety: float) -> tuple[np.ndarray, np.ndarray]:
    """Paper and ink, float [3] in 0..255. Papers are tinted; one receipt in six is light on dark."""
    paper = 255 - variety * (rng.uniform(0, 50) + rng.uniform(0, 25, size=3))
    ink = variety * (rng.uniform(0, 60) + rng.uniform(0, 25, size=3))
    return (ink, paper) if rng.random() < variety / 6 else (paper, ink)


def printed_rows(items: tuple[Item, ...], total_label: str) -> list[tuple[str, str]]:
    """(left, right) of every line."""
    rows = [(item.name, money(item.cents)) for item in items]
    return [*rows, (total_label, money(sum(item.cents for item in items)))]


def draw_image(rng: np.random.Generator, items: tuple[Item, ...], total_label: str, variety: float) -> np.ndarray:
    """The picture, uint8 [height, width, 3]: names at the left, prices at the right or just after the names.

    variety 1 is the task; towards 0 everything draws near to black on white in one face, a line to every 28 pixels.
    """

    def vary(plain: float, low: float, high: float) -> float:
        return plain + variety * (rng.uniform(low, high) - plain)

    size = round(vary(20, 17.5, 22.5))
    font = load_face(int(rng.integers(len(FACES))) if rng.random() < variety else 0, size)
    pitch = vary(28, 27.4, 28.6)
    margin_x, margin_y = vary(6, 3, 10), vary(0, 0, 3)
    rows = printed_rows(items, total_label)
    gap = vary(14, 0.6 * size, 2.0 * size)
    content = max(font.getlength(name) + gap + font.getlength(price) for name, price in rows)
    width = round(content + 2 * margin_x + vary(0, 0, 24))
    ragged = rng.random() < 0.2 * variety
    ruled = rng.random() < 0.5 * variety
    height = round(margin_y + vary(0, 0, 4) + pitch * len(rows))

    mask = Image.new("L", (width, height), 0)
    pen = ImageDraw.Draw(mask)
    for number, (name, price) in enumerate(rows):
        last = number == len(rows) - 1
        y = margin_y + pitch * number + (28 - 1.2 * size) / 2 + vary(0, -1, 1)
        x = margin_x + vary(0, -2, 2)
        pen.text((x, y), name, fill=255, font=font)
        price_x = x + font.getlength(name) + gap if ragged else width - margin_x - font.getlength(price)
        pen.text((price_x + vary(0, -2, 2), y + vary(0, -1, 1)), price, fill=255, font=font)
        if ruled and last:
            pen.line((margin_x, y - 1, width - margin_x, y - 1), fill=160, width=1)

    paper, ink = draw_colours(rng, variety)
    cover = np.asarray(mask, dtype=np.float64)[:, :, None] / 255
    shade = np.linspace(-1, 1, width)[None, :, None] * vary(0, -12, 12)
    noise = rng.normal(0, vary(0, 0, 6), size=(height, width, 1))
    return np.clip(np.rint(paper + (ink - paper) * cover + shade + noise), 0, 255).astype(np.uint8)


def ask(receipt: Receipt, kind: Kind, item: Item | None = None) -> Example:
    """The question of one kind; `item` says whose price is asked for."""
    match kind:
        case "total":
            question, answer = "What is the total?", money(sum(entry.cents for entry in receipt.items))
        case "price":
            assert item in receipt.items
            question, answer = f"How much is the {item.name}?", money(item.cents)
        case "dearest":
            question, answer = "Which item is the dearest?", max(receipt.items, key=lambda entry: entry.cents).name
        case "count":
            question, answer = "How many items are there?", str(len(receipt.items))
        case "text":
            question, answer = "Read the whole receipt.", receipt.text
    return Example(receipt.image, question, answer, kind)


def drawn_example(split: Split, seed: int, index: int) -> Example:
    """Example `index` of a split: the kinds take turns, the item whose price is asked for is drawn."""
    receipt = make_receipt(split, seed, index)
    chosen = int(np.random.default_rng([2, seed, index]).integers(len(receipt.items)))
    return ask(receipt, KINDS[index % len(KINDS)], receipt.items[chosen])


def write_task(folder: Path, num: int, seed: int, split: Split = "heldout") -> None:
    """Write `samples.jsonl` and one PNG a sample below `folder`, with `task.json`: a task, and calibration data too."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(num):
        example = drawn_example(split, seed, index)
        image = f"images/{index:04d}.png"
        Image.fromarray(example.image).save(folder / image)
        content = [{"type": "image", "image": image}, {"type": "text", "text": example.question}]
        sample = {"id": f"{index:04d}", "messages": [{"role": "user", "content": content}]}
        lines.append(json.dumps(sample | {"answers": [example.answer], "kind": example.kind}))
    task = {"schema": "vlmport-task/2", "name": "receipts", "scorer": "exact_match", "max_new_tokens": MAX_NEW_TOKENS}
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "task.json").write_text(json.dumps(task, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a task folder of held-out receipts.")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--num", type=int, default=500, help="number of questions, one image each")
    parser.add_argument("--seed", type=int, default=7, help="stream of held-out receipts")
    parser.add_argument("--split", choices=("heldout", "train"), default="heldout", help="train: to calibrate with")
    args = parser.parse_args()
    write_task(args.out, args.num, args.seed, args.split)
    print(f"{args.out}: {args.num} questions")


if __name__ == "__main__":
    main()
