"""Bits weight by weight: how much the answers suffer from each, and the choice that fits a budget.

The measure is the mean KL divergence, in nats, of the answers' next-token distributions from those of float weights,
images in context. Each weight of every role is lowered alone; the choice that a knapsack makes of these losses is
lowered as a whole; and samples that took no part in it tell whether the promise holds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..quant.allocate import Choice, Front, Item, Pick
from ..quant.data_file import Progress
from ..quant.recipe import MIXED_NAME, Recipe, Rule, Target, WeightFormat
from ..quant.rewrite import weights_of
from ..runtime.errors import InputError, RecipeError
from ..runtime.manifest import Allocation
from .float_roles import Answers, FloatRoles, Key
from .weight_groups import Group, StoredSizes, group_weights

__all__ = ["Budget", "Mixed", "choose_bits", "mean_and_bound"]

_HELD_OUT = 4  # one sample of so many takes no part in the choice
_MANY_WEIGHTS = 300  # above, linears that read one input are measured together: half of the time, less to choose from
_ROUNDS = 8  # of measuring a choice as a whole, for a promise
_ONE_SIDED_95 = 1.645  # standard errors
_NUM_POINTS = 9


@dataclass(frozen=True)
class Budget:
    """One of two: bytes of the variant's files, or the mean KL that it may have."""

    max_bytes: int | None = None
    max_kl: float | None = None

    def __post_init__(self) -> None:
        if (self.max_bytes is None) == (self.max_kl is None):
            raise InputError(f"recipe {MIXED_NAME}: give one of --max-size and --max-kl")
        if self.max_kl is not None and not 0 < self.max_kl < math.inf:
            raise InputError(f"--max-kl {self.max_kl}: give a number of nats above 0, as 0.01")


@dataclass(frozen=True)
class Mixed:
    """What was chosen, and the best picks of other sizes."""

    recipe: Recipe
    allocation: Allocation
    chosen: Pick
    points: tuple[Pick, ...]
    fixed_bytes: int  # of what has no choice; picks count weights alone


def choose_bits(
    roles: FloatRoles, target: Target, budget: Budget, *, block_size: int = 32, progress: Progress | None = None
) -> Mixed:
    """Measures every weight, and chooses. Raises RecipeError where no choice fits, InputError for too few samples."""
    num_samples = roles.feeds.num_samples
    if num_samples < 2:
        raise InputError(f"recipe {MIXED_NAME}: one sample is too few, as some are held out; give a hundred")
    held_out = list(range(1, num_samples, _HELD_OUT))
    search = _Search(roles, [n for n in range(num_samples) if n not in held_out], target, block_size, progress)
    front = Front(search.items)
    if budget.max_bytes is not None:
        pick, losses = search.within_bytes(front, budget.max_bytes)
    else:
        assert budget.max_kl is not None
        pick, losses = search.within_kl(front, budget.max_kl)
    answers = Answers(roles, held_out)
    formats = search.formats_of(pick)
    with roles.lowered(formats):
        unseen = answers.losses(search.first)
    mean, bound = mean_and_bound(losses)
    allocation = Allocation(
        kl_calibration=mean,
        kl_promised=bound if budget.max_kl is None else budget.max_kl,
        kl_held_out=mean_and_bound(unseen)[0],
        num_samples=num_samples - len(held_out),
        num_held_out=len(held_out),
        num_answer_tokens=search.answers.num_rows + answers.num_rows,
        calibration=roles.feeds.record,
        sensitivity=search.sensitivity(),
        max_bytes=budget.max_bytes,
        max_kl=budget.max_kl,
    )
    rules = tuple(Rule("/".join(key), format) for key, format in formats.items())
    return Mixed(Recipe(MIXED_NAME, rules), allocation, pick, tuple(front.points(_NUM_POINTS)), search.sizes.fixed)


class _Search:
    """The losses of single weights, and whole choices measured."""

    def __init__(
        self,
        roles: FloatRoles,
        samples: Sequence[int],
        target: Target,
        block_size: int,
        progress: Progress | None,
    ) -> None:
        self.first = next(iter(roles.modules))
        self._roles, self._progress = roles, progress
        num_weights = sum(len(weights_of(model.graph)) for model in roles.graphs.values())
        self._groups = group_weights(roles.graphs, roles.sources, by_input=num_weights > _MANY_WEIGHTS)
        self._formats = {
            4: WeightFormat(4, block_size),
            8: WeightFormat(8, block_size),
            16: WeightFormat(16),
            32: WeightFormat(32),
        }
        graph_floats = 32 if target == "cpu" else 16
        wanted = [format for format in self._formats.values() if format.bits <= graph_floats]
        self.sizes = StoredSizes(roles.graphs, roles.sources, target, wanted)
        self.answers = Answers(roles, samples)
        self.items = [self._item(number, group) for number, group in enumerate(self._groups)]

    def within_bytes(self, front: Front, max_bytes: int) -> tuple[Pick, list[torch.Tensor]]:
        """The pick with the least sum of losses in so many bytes, and its real losses."""
        pick = front.within_bytes(max_bytes - self.sizes.fixed)
        if pick is None:
            least = (front.points(2)[0].num_bytes + self.sizes.fixed) / 1e6
            raise RecipeError(f"--max-size {max_bytes / 1e6:.3f} MB: 4 bits everywhere take {least:.3f} MB; allow more")
        return pick, self._losses(pick)

    def within_kl(self, front: Front, max_kl: float) -> tuple[Pick, list[torch.Tensor]]:
        """The smallest pick found whose real losses stay under `max_kl`, with 95 % for other samples too.

        Losses of single weights do not quite add up, so the sum that is allowed is moved, and the real one measured.
        """
        low, high = 0.0, math.inf  # sums that are known to be allowed, and not to be
        found: tuple[Pick, list[torch.Tensor]] | None = None
        allowed, before = max_kl, None
        for _ in range(_ROUNDS):
            pick = front.within_loss(allowed)
            if pick == before:
                break
            losses = self._losses(pick)
            before, bound = pick, mean_and_bound(losses)[1]
            if bound <= max_kl:
                low = allowed
                if found is None or pick.num_bytes < found[0].num_bytes:
                    found = pick, losses
            else:
                high = allowed
            scaled = allowed * max_kl / max(bound, 1e-12)
            middle = math.sqrt(low * high) if low > 0 and high < math.inf else scaled
            allowed = scaled if low < scaled < high else middle
        if found is None:
            pick = front.within_loss(0.0)
            losses = self._losses(pick)
            bound = mean_and_bound(losses)[1]
            if bound > max_kl:
                raise RecipeError(f"--max-kl {max_kl}: the best choice of bits has {bound:.2g}; allow more")
            found = pick, losses
        return found

    def formats_of(self, pick: Pick) -> dict[Key, WeightFormat]:
        """By weight."""
        chosen = zip(self._groups, pick.choices, strict=True)
        return {key: self._formats[choice.bits] for group, choice in chosen for key in group}

    def sensitivity(self) -> dict[str, dict[str, float]]:
        """Losses by weight and bits, those that were measured."""
        return {
            "/".join(key): {str(choice.bits): choice.loss for choice in item.choices if choice.bits < 16}
            for group, item in zip(self._groups, self.items, strict=True)
            for key in group
        }

    def _item(self, number: int, group: Group) -> Item:
        """Measures a group at 4 and 8 bits; a float of 16 is taken to lose nothing until the whole is measured."""
        name = "/".join(group[0])
        choices: list[Choice] = []
        for bits in (4, 8):
            self._tell(2 * number + bits // 8, 2 * len(self._groups), name)
            with self._roles.lowered(dict.fromkeys(group, self._formats[bits])):
                loss = mean_and_bound(self.answers.losses(group[0][0]))[0]
            choices.append(Choice(bits, self.sizes.of(group, self._formats[bits]), loss))
        floats = 32 if self._roles.float16_overflows.intersection(group) else 16
        return Item(name, (*choices, Choice(floats, self.sizes.of(group, self._formats[floats]), 0.0)))

    def _losses(self, pick: Pick) -> list[torch.Tensor]:
        if self._progress is not None:
            self._progress(0, 0, f"{MIXED_NAME}: measuring a choice")
        with self._roles.lowered(self.formats_of(pick)):
            return self.answers.losses(self.first)

    def _tell(self, done: int, total: int, name: str) -> None:
        if self._progress is not None:
            self._progress(done, total, name)


def mean_and_bound(losses: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Mean over the rows of all samples, and its one-sided 95 % bound; rows of one sample are not independent.

    The standard error is that of a ratio estimator, sum of losses by number of rows, over samples as clusters
    (Cochran, Sampling Techniques, 6.9). Infinite for a single sample.
    """
    totals = torch.stack([rows.sum() for rows in losses])
    counts = torch.tensor([len(rows) for rows in losses], dtype=torch.float64)
    mean = float(totals.sum() / counts.sum())
    num = len(losses)
    if num < 2:
        return mean, math.inf
    residual = float(((totals - mean * counts) ** 2).sum())
    return mean, mean + _ONE_SIDED_95 * math.sqrt(num / (num - 1) * residual) / float(counts.sum())
