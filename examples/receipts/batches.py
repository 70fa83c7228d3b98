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
from receipts import KINDS, MAX_ITEMS, Receipt, Split, ask, make_receipt
from tokenizers import Tokenizer

CHUNK = 256  # receipts that are sorted by length together
TOKENS_PER_BATCH = 4096
SHORT_ANSWER_WEIGHT = 3.0  # the whole text has about nine times as many tokens as a short answer
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

    @property
    def mask(self) -> torch.Tensor:
        """bool [R, 1, T, T], true where a query (second last) may see a key (last)."""
        key, query = self.branch[:, None, None, :], self.branch[:, None, :, None]
        return ((key == 0) | (key == query)).tril()


def make_row(tokenizer: Tokenizer, receipt: Receipt, rng: np.random.Generator) -> Row:
    """All kinds of questions about one receipt, two prices where there are two."""
    examples = [ask(receipt, kind) for kind in KINDS if kind != "price"]
    order = rng.permutation(len(receipt.items))[:2]
    examples += [ask(receipt, "price", receipt.items[int(number)]) for number in order]
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


def make_rows(tokenizer: Tokenizer, split: Split, seed: int, numbers: range, max_items: int = MAX_ITEMS) -> list[Row]:
    """Rows of the receipts `numbers` of a stream."""
    rows = []
    for number in numbers:
        rng = np.random.default_rng([3, seed, number])
        rows.append(make_row(tokenizer, make_receipt(split, seed, number, max_items), rng))
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


def training_batches(tokenizer: Tokenizer, seed: int, chunk: int, ramp: int) -> Iterator[tuple[int, Batch]]:
    """(chunk, batch) without end; the longest receipt grows from two to eight items over the first `ramp` chunks."""
    while True:
        max_items = min(MAX_ITEMS, 2 + (MAX_ITEMS - 2) * chunk // ramp)
        numbers = range(chunk * CHUNK, (chunk + 1) * CHUNK)
        batches = into_batches(make_rows(tokenizer, "train", seed, numbers, max_items))
        for index in np.random.default_rng([4, seed, chunk]).permutation(len(batches)):
            yield chunk, batches[int(index)]
        chunk += 1
