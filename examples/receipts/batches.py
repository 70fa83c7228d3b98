"""Endless training batches: several questions about one image share its prompt, rows of like length share a batch.

A row is `prompt, (question, answer), (question, answer), ...`. Each pair sees the prompt and itself but no other pair,
and starts at the same position, so for the model it is a conversation with one question: what it will be asked in use.

Dims: R rows, T tokens of the longest row, N patches of all rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from inputs import Picture, answer_ids, image_positions, preprocess, prompt_ids, question_ids
from receipts import KINDS, Receipt, Split, ask, make_receipt
from tokenizers import Tokenizer

CHUNK = 64  # receipts that are sorted by length together
TOKENS_PER_BATCH = 2560  # a rank
SHORT_A_ROW = 6
TEXT_SHARE = 0.45  # of the rows have the whole text
READ_WELL = 0.06  # mean loss at which the next lesson begins
SHORT_ANSWER_WEIGHT = 6.0  # the whole text has about nine times as many tokens as a short answer
NO_TARGET = -100


@dataclass(frozen=True)
class Row:
    """One image with its questions; all arrays run along T."""

    picture: Picture
    tokens: np.ndarray  # int64 [T]
    targets: np.ndarray  # int64 [T]: the next token where that belongs to an answer, else NO_TARGET
    branch: np.ndarray  # int64 [T]: 0 in the prompt, then 1, 2, ... a question
    kinds: tuple[str, ...]  # of branch 1, 2, ...
    positions: np.ndarray  # int64 [3, T]


@dataclass(frozen=True)
class Batch:
    """Padded rows as tensors."""

    patches: torch.Tensor  # uint8 [N, 588]
    grid: torch.Tensor  # int64 [R, 3]
    tokens: torch.Tensor  # int64 [R, T]
    targets: torch.Tensor  # int64 [R, T]
    weights: torch.Tensor  # float32 [R, T]
    positions: torch.Tensor  # int64 [3, R, T]
    branch: torch.Tensor  # int64 [R, T], -1 in the padding
    kinds: tuple[tuple[str, ...], ...]

    def attention_bias(self, dtype: torch.dtype) -> torch.Tensor:
        """[R, 1, T, T]: 0 where a query (second last) may see a key (last), else far below any score."""
        key, query = self.branch[:, None, None, :], self.branch[:, None, :, None]
        hidden = ((key == 0) | (key == query)).tril().logical_not()
        return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -1e4)


LESSONS: tuple[tuple[int, tuple[float, float]], ...] = (  # (most items, variety): reading is learnt on easy ones first
    *((3, (0.0, 0.5)), (3, (0.0, 1.0)), (4, (0.0, 1.0)), (5, (0.25, 1.0)), (6, (0.5, 1.0)), (8, (0.5, 1.0))),
    (8, (1.0, 1.0)),
)


@dataclass
class Lesson:
    """Where the training stands in LESSONS."""

    number: int = 0

    def advance(self, mean_loss: float, progress: float) -> None:
        """The next lesson once this one is read well, at the latest by an even ramp over the first half."""
        due = progress / 0.5 * (len(LESSONS) - 1)
        if self.number < len(LESSONS) - 1 and (mean_loss < READ_WELL or due > self.number + 1):
            self.number += 1


def make_row(tokenizer: Tokenizer, receipt: Receipt, rng: np.random.Generator, num_short: int) -> Row:
    """Mostly the whole text, which teaches reading, and `num_short` short questions, up to five of them prices.

    Prices outnumber the rest because looking a name up is what is learnt last.
    """
    short = [ask(receipt, kind) for kind in KINDS if kind not in ("price", "text")]
    order = rng.permutation(len(receipt.items))[:5]
    short += [ask(receipt, "price", receipt.items[int(number)]) for number in order]
    examples = [ask(receipt, "text")] if rng.random() < TEXT_SHARE else []
    examples += [short[int(index)] for index in rng.permutation(len(short))[:num_short]]
    picture = preprocess(receipt.image)
    prompt = prompt_ids(tokenizer, picture.num_tokens)
    positions = [image_positions(len(prompt), picture)]
    start = positions[0].max() + 1
    tokens, targets, branch = [prompt], [[NO_TARGET] * len(prompt)], [[0] * len(prompt)]
    for number, example in enumerate(examples, start=1):
        question, answer = question_ids(tokenizer, example.question), answer_ids(tokenizer, example.answer)
        length = len(question) + len(answer)
        tokens.append(question + answer)
        targets.append([NO_TARGET] * (len(question) - 1) + answer + [NO_TARGET])
        branch.append([number] * length)
        positions.append(np.broadcast_to(start + np.arange(length), (3, length)))
    flat = [np.concatenate([np.asarray(part, dtype=np.int64) for part in parts]) for parts in (tokens, targets, branch)]
    kinds = tuple(example.kind for example in examples)
    return Row(picture, *flat, kinds, np.concatenate(positions, axis=1))


def collate(rows: list[Row]) -> Batch:
    """Pad rows at the right; a padded token sees only padding and has no target."""
    length = max(len(row.tokens) for row in rows)

    def padded(name: str, value: int) -> torch.Tensor:
        parts = [np.pad(getattr(row, name), (0, length - len(row.tokens)), constant_values=value) for row in rows]
        return torch.from_numpy(np.stack(parts))

    branch, targets = padded("branch", -1), padded("targets", NO_TARGET)
    weights = torch.full(branch.shape, SHORT_ANSWER_WEIGHT)
    for number, row in enumerate(rows):
        if "text" in row.kinds:
            weights[number][branch[number] == row.kinds.index("text") + 1] = 1.0
    weights[targets == NO_TARGET] = 0.0
    positions = [np.pad(row.positions, ((0, 0), (0, length - row.positions.shape[1]))) for row in rows]
    return Batch(
        patches=torch.from_numpy(np.concatenate([row.picture.patches for row in rows])),
        grid=torch.tensor([[1, *row.picture.grid] for row in rows]),
        tokens=padded("tokens", 0),
        targets=targets,
        weights=weights,
        positions=torch.from_numpy(np.stack(positions, axis=1)),
        branch=branch,
        kinds=tuple(row.kinds for row in rows),
    )


def make_rows(
    tokenizer: Tokenizer,
    split: Split,
    seed: int,
    numbers: range,
    lesson: tuple[int, tuple[float, float]] = LESSONS[-1],
    num_short: int = 5,
) -> list[Row]:
    """Rows of the receipts `numbers` of a stream."""
    rows = []
    for number in numbers:
        rng = np.random.default_rng([3, seed, number])
        rows.append(make_row(tokenizer, make_receipt(split, seed, number, *lesson), rng, num_short))
    return rows


def into_batches(rows: list[Row]) -> list[Batch]:
    """Rows of like length together, about TOKENS_PER_BATCH tokens each."""
    batches, group = [], []
    for row in sorted(rows, key=lambda row: len(row.tokens)):
        if group and (len(group) + 1) * len(row.tokens) > TOKENS_PER_BATCH:
            batches.append(collate(group))
            group = []
        group.append(row)
    return [*batches, collate(group)]


def training_batches(tokenizer: Tokenizer, seed: int, chunk: int, lesson: Lesson) -> Iterator[tuple[int, Batch]]:
    """(chunk, batch) without end, from receipts of the training split as the lesson stands when a chunk begins."""
    while True:
        numbers = range(chunk * CHUNK, (chunk + 1) * CHUNK)
        batches = into_batches(make_rows(tokenizer, "train", seed, numbers, LESSONS[lesson.number], SHORT_A_ROW))
        for index in np.random.default_rng([4, seed, chunk]).permutation(len(batches)):
            yield chunk, batches[int(index)]
        chunk += 1
