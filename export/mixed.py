"""Bits weight by weight: how much the answers suffer from each, and the choice that fits a budget.

The measure is the mean KL divergence, in nats, of the answers' next-token distributions from those of float weights,
images in context. Each weight of every role is lowered alone; the choice that a knapsack makes of these losses is
lowered as a whole; and samples that took no part in it tell whether the promise holds.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from ..quant.allocate import Choice, Front, Item, Pick
from ..quant.data_file import Progress
from ..quant.recipe import MIXED_NAME, Recipe, Rule, Target, WeightFormat
from ..quant.rewrite import weights_of
from ..quant.source import WeightSource
from ..runtime.errors import InputError, RecipeError
from ..runtime.manifest import Allocation
from .calibrate import Calibrator, OpenRole
from .candidates import Candidates, ChosenCodes, find_candidates
from .float_roles import Answers, FloatRoles
from .weight_groups import Group, Key, StoredSizes, group_weights, shared_with_tables

__all__ = ["Budget", "Mixed", "choose_bits", "mean_and_bound"]

_HELD_OUT = 4  # one sample of so many takes no part in the choice
_FEWEST = 3  # samples: two take part in the choice, for a bound of one is infinite
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
    graphs: Mapping[str, ir.Model]  # float, by role, and their weights, with the factors of the method in them
    sources: Mapping[str, WeightSource]
    codes: ChosenCodes  # what the method found


def choose_bits(
    calibrator: Calibrator,
    open_role: OpenRole,
    target: Target,
    budget: Budget,
    folder: Path,
    *,
    name: str = MIXED_NAME,
    method: str = "rtn",
    block_size: int = 32,
    progress: Progress | None = None,
) -> Mixed:
    """Measures every weight, and chooses, for a recipe `name`; `folder` takes 4 bytes a parameter and the codes.

    Raises RecipeError where no choice fits, InputError for too few samples.
    """
    num_samples = calibrator.feeds.num_samples
    if num_samples < _FEWEST:
        raise InputError(f"recipe {MIXED_NAME}: {num_samples} samples are too few, some being held out; give a hundred")
    groups, without = _groups(calibrator.roles, open_role, budget, target, block_size)
    candidates = find_candidates(
        calibrator, target, open_role, folder, without, method=method, block_size=block_size, progress=progress
    )
    open_role = candidates.open_role
    roles = FloatRoles(calibrator.feeds, calibrator.roles, open_role, target, folder, candidates.codes_of)
    sizes = StoredSizes(roles.graphs, roles.sources, target, block_size)
    _check_budget(budget, sizes, groups)  # factors stand in the graphs by now
    held_out = list(range(1, num_samples, _HELD_OUT))
    samples = [number for number in range(num_samples) if number not in held_out]
    search = _Search(roles, groups, candidates, sizes, samples, held_out, progress)
    front = Front(search.items)
    if budget.max_bytes is not None:
        pick, measured = search.within_bytes(front, budget.max_bytes)
    else:
        assert budget.max_kl is not None
        pick, measured = search.within_kl(front, budget.max_kl)
    allocation = Allocation(
        kl_calibration=measured.mean,
        kl_promised=measured.bound if budget.max_kl is None else budget.max_kl,
        kl_held_out=measured.unseen,
        num_samples=len(samples),
        num_held_out=len(held_out),
        num_answer_tokens=search.answers.num_rows + search.unseen.num_rows,
        calibration=calibrator.record,
        sensitivity=search.sensitivity(),
        max_bytes=budget.max_bytes,
        max_kl=budget.max_kl,
    )
    recipe = Recipe(name, tuple(Rule("/".join(key), format) for key, format in search.formats_of(pick).items()))
    codes = ChosenCodes(calibrator.record, candidates.found)
    points = tuple(front.points(_NUM_POINTS))
    return Mixed(recipe, allocation, pick, points, sizes.fixed, roles.graphs, roles.sources, codes)


def _groups(
    roles: Iterable[str], open_role: OpenRole, budget: Budget, target: Target, block_size: int
) -> tuple[list[Group], frozenset[Key]]:
    """Weights that share a choice, and those that have no codes of a method, being tables too.

    Raises RecipeError where the budget is less than they can take: before anything is measured.
    """
    opened = {role: open_role(role) for role in roles}
    graphs = {role: graph for role, (graph, _) in opened.items()}
    num_weights = sum(len(weights_of(model.graph)) for model in graphs.values())
    sources = {role: source for role, (_, source) in opened.items()}
    groups = group_weights(graphs, sources, by_input=num_weights > _MANY_WEIGHTS)
    _check_budget(budget, StoredSizes(graphs, sources, target, block_size), groups)
    return groups, shared_with_tables(graphs, groups)


def _check_budget(budget: Budget, sizes: StoredSizes, groups: Iterable[Group]) -> None:
    least = sizes.fixed + sum(sizes.of(group, 4) for group in groups)
    if budget.max_bytes is not None and budget.max_bytes < least:
        raise RecipeError(
            f"--max-size {budget.max_bytes / 1e6:.3f} MB: 4 bits everywhere take {least / 1e6:.3f} MB; allow more"
        )


@dataclass(frozen=True)
class _Measured:
    """Of a choice as a whole: mean KL on the samples of the choice and on others, and what both stay under."""

    mean: float
    unseen: float
    bound: float


class _Search:
    """The losses of single weights, and whole choices measured."""

    def __init__(
        self,
        roles: FloatRoles,
        groups: Sequence[Group],
        candidates: Candidates,
        sizes: StoredSizes,
        samples: Sequence[int],
        held_out: Sequence[int],
        progress: Progress | None,
    ) -> None:
        self.first = next(iter(roles.modules))
        self._roles, self._groups, self._candidates, self._sizes = roles, groups, candidates, sizes
        self._progress = progress
        self.answers, self.unseen = Answers(roles, samples), Answers(roles, held_out)
        self.items = [self._item(number, group) for number, group in enumerate(groups)]

    def within_bytes(self, front: Front, max_bytes: int) -> tuple[Pick, _Measured]:
        """The pick with the least sum of losses in so many bytes, and its real losses."""
        pick = front.within_bytes(max_bytes - self._sizes.fixed)
        assert pick is not None, "4 bits everywhere fit"
        return pick, self._measure(pick)

    def within_kl(self, front: Front, max_kl: float) -> tuple[Pick, _Measured]:
        """The smallest pick found whose real losses stay under `max_kl`, with 95 % for other samples too.

        Samples of the choice alone would promise too much: what took part in a choice suffers less from it.

        Losses of single weights do not quite add up, so the sum that is allowed is moved, and the real one measured.
        """
        low, high = 0.0, math.inf  # sums that are known to be allowed, and not to be
        found: tuple[Pick, _Measured] | None = None
        allowed, before = max_kl, None
        for _ in range(_ROUNDS):
            pick = front.within_loss(allowed)
            if pick == before:
                break
            measured = self._measure(pick)
            before, bound = pick, measured.bound
            if bound <= max_kl:
                low = allowed
                if found is None or pick.num_bytes < found[0].num_bytes:
                    found = pick, measured
            else:
                high = allowed
            scaled = allowed * max_kl / max(bound, 1e-12)
            middle = math.sqrt(low * high) if low > 0 and high < math.inf else scaled
            allowed = scaled if low < scaled < high else middle
        if found is None:
            pick = front.within_loss(0.0)
            measured = self._measure(pick)
            if measured.bound > max_kl:
                raise RecipeError(f"--max-kl {max_kl}: the best choice of bits has {measured.bound:.2g}; allow more")
            found = pick, measured
        return found

    def formats_of(self, pick: Pick) -> dict[Key, WeightFormat]:
        """By weight."""
        chosen = zip(self._groups, pick.choices, strict=True)
        return {key: self._candidates.format_of(key, choice.bits) for group, choice in chosen for key in group}

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
            with self._roles.lowered({key: self._candidates.format_of(key, bits) for key in group}):
                loss = mean_and_bound(self.answers.losses(group[0][0]))[0]
            choices.append(Choice(bits, self._sizes.of(group, bits), loss))
        floats = 32 if self._roles.float16_overflows.intersection(group) else 16
        return Item(name, (*choices, Choice(floats, self._sizes.of(group, floats), 0.0)))

    def _measure(self, pick: Pick) -> _Measured:
        if self._progress is not None:
            self._progress(0, 0, f"{MIXED_NAME}: measuring a choice")
        with self._roles.lowered(self.formats_of(pick)):
            mean, bound = mean_and_bound(self.answers.losses(self.first))
            unseen, unseen_bound = mean_and_bound(self.unseen.losses(self.first))
        return _Measured(mean, unseen, max(bound, unseen_bound if math.isfinite(unseen_bound) else unseen))

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
