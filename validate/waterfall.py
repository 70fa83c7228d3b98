"""Where the divergence of a variant comes from: a chain from the reference to the package, one thing swapped a step.

    preprocessing        the runtime's pixels in place of the reference's own, both through the reference
    export               float32 graphs in place of PyTorch
    dtype                graphs of the roles that the variant stores in float16
    weights:<role>       the quantized weights of one role, computed with in float32
    activations          the variant's own kernels, which round activations too
    cache                one token at a time through the cache in place of one pass over the whole answer
    kv_cache             keys and values in 8 bits, where the variant stores them so
    provider             what the variant runs on in place of the CPU

Each step is told by its divergence from the reference (`cumulative`), by how much it changes that (`added`, paired over
samples), and by its divergence from the step before (`alone`): KL is no distance, so that the sum of the last is not
the first. KL(reference || step) in nats, float64, at the positions of the reference's own greedy answer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.errors import PackageError
from ..runtime.package import Package
from ..runtime.prepare import Prepared
from ..runtime.session import GraphSession, open_session
from .intervals import ratio
from .metrics import LogitErrors, logit_errors
from .mixed import MixedModel, Opener, float_activations, float_cache
from .reference import ReferenceModel
from .reference_taps import round_to_bfloat16
from .stages import logits_without_cache, run_stages
from .statistics import KlSummary, summarize_kl

__all__ = [
    "Added",
    "Chain",
    "Link",
    "Step",
    "Tally",
    "Waterfall",
    "chain_of",
    "float_graph",
    "measure",
    "noise_errors",
    "reference_logits",
    "summarise",
]

Array = NDArray[Any]


@dataclass(frozen=True)
class Added:
    """How much a step changes the mean divergence: paired, both sides on the same samples, which are what is drawn."""

    mean: float
    ci_low: float
    ci_high: float


@dataclass(frozen=True)
class Step:
    """One thing swapped. `skipped` says why it was not measured; then there are no numbers."""

    name: str
    about: str
    role: str | None = None
    cumulative: KlSummary | None = None
    alone: KlSummary | None = None
    added: Added | None = None
    skipped: str | None = None


@dataclass(frozen=True)
class Waterfall:
    num_samples: int
    num_positions: int
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Link:
    """A step of a chain before it is measured: which graph each role runs from here on."""

    name: str
    about: str
    role: str | None = None
    graphs: Mapping[str, Path] = field(default_factory=dict[str, Path])
    through_cache: bool = False
    on_target: bool = False  # by the provider that the package is for, not by `Chain.base`
    skipped: str | None = None


@dataclass(frozen=True)
class Chain:
    """The links of a variant behind the reference's own two, in their order. `base` opens all graphs but the last's."""

    variant: str
    links: tuple[Link, ...]
    base: Opener


@dataclass
class Tally:
    """Errors of the links of one chain, sample by sample."""

    cumulative: dict[str, list[LogitErrors]] = field(default_factory=dict[str, list[LogitErrors]])
    alone: dict[str, list[LogitErrors]] = field(default_factory=dict[str, list[LogitErrors]])


def chain_of(package: Package, variant: str, folder: Path, base: Opener | None = None) -> Chain:
    """What is swapped on the way to a variant. Graphs that are made for it go to `folder`.

    `base` opens the graphs of all steps but the provider's: on the CPU, if it is not said, where that takes them all.
    """
    graphs = {role: package.graph_path(role, variant) for role in package.manifest.roles}
    uncached = {role: float_cache(path, folder) or path for role, path in graphs.items()}
    labels = {role: graph.precision for role, graph in package.variant(variant).graphs.items()}
    floats = {role: path for role in graphs if (path := float_graph(package, role)) is not None}
    on_provider, base = _provider(package, graphs, base)
    last = (*_cache_links(graphs, uncached), on_provider)
    about = "the variant's own kernels, which round activations"
    activations = Link("activations", about, graphs=uncached)
    missing = sorted(set(graphs) - set(floats))
    if missing:
        reason = f"no variant of the package has {missing[0]} in float; export it with recipe fp32 among the others"
        whole = Link("export", "everything but preprocessing: no float graphs to tell it apart", graphs=uncached)
        return Chain(variant, (whole, Link("weights", "", skipped=reason), activations, *last), base)
    current = dict(floats)
    links = [Link("export", "float32 graphs in place of PyTorch", graphs=dict(current))]
    narrow = {role: uncached[role] for role, label in labels.items() if label.startswith("fp16")}
    if any(path != current[role] for role, path in narrow.items()):
        current |= narrow
        links.append(Link("dtype", f"float16 in {', '.join(narrow)}", graphs=dict(current)))
    else:
        links.append(Link("dtype", "", skipped="what is not quantized is stored as the float graphs have it"))
    for role, path in uncached.items():
        if path == current[role]:
            continue
        exact = float_activations(path, folder) or path
        current[role] = exact
        links.append(Link(f"weights:{role}", f"{labels[role]} weights, float32 kernels", role, dict(current)))
    if current == uncached:
        activations = Link("activations", about, skipped="no kernel of this variant rounds activations")
    return Chain(variant, (*links, activations, *last), base)


def measure(
    package: Package,
    chain: Chain,
    prepared: Prepared,
    forced_ids: Sequence[int],
    first: Array,
    second: Array,
    tally: Tally,
    pools: Mapping[bool, dict[Path, GraphSession]],
    video_rule: str | None,
) -> None:
    """One sample through all links, sessions by `on_target`.

    `first` [N, V]: the reference on its own pixels; `second`: on the runtime's.
    """
    _count(tally, "preprocessing", first, first, second)
    before = second
    for link in chain.links:
        if link.skipped is not None:
            continue
        open_graph = None if link.on_target else chain.base
        pool = pools[link.on_target]
        with_graphs = MixedModel(package, chain.variant, link.graphs, pool, video_rule, open_graph)
        visual = with_graphs.features(prepared)
        embeds = with_graphs.embed(prepared, None if visual is None else visual.features)
        if link.through_cache:
            logits = run_stages(with_graphs, prepared, forced_ids).step_logits
        else:
            logits = logits_without_cache(with_graphs, prepared, embeds, forced_ids)
        _count(tally, link.name, first, before, logits)
        before = logits


def summarise(chain: Chain, tally: Tally, preprocessing: str | None) -> Waterfall:
    """The steps of a chain over all its samples. `preprocessing`: why that step was not measured, if it was not."""
    steps = [
        Step("preprocessing", "the runtime's pixels in place of the reference's own", skipped=preprocessing),
        *(Step(link.name, link.about, link.role, skipped=link.skipped) for link in chain.links),
    ]
    before: list[LogitErrors] | None = None
    done: list[Step] = []
    for step in steps:
        if step.skipped is not None or step.name not in tally.cumulative:
            done.append(step if step.skipped is not None else replace(step, skipped="no sample was measured"))
            continue
        now = tally.cumulative[step.name]
        cumulative, alone = summarize_kl(now), summarize_kl(tally.alone[step.name])
        done.append(replace(step, cumulative=cumulative, alone=alone, added=_added(before, now)))
        before = now
    parts = next(iter(tally.cumulative.values()), [])
    return Waterfall(len(parts), sum(part.kl.size for part in parts), tuple(done))


def reference_logits(reference: ReferenceModel, prepared: Prepared, forced_ids: Sequence[int]) -> Array:
    """Logits [1 + N, V] of the reference after the prompt and after each forced id."""
    steps = [reference.prefill(prepared)[0][-1]]
    steps += [reference.step(int(token)) for token in forced_ids]
    return np.stack(steps)


def noise_errors(
    reference: ReferenceModel,
    requests: Sequence[tuple[Prepared, Sequence[int], Array]],
    progress: Callable[[int], None],
) -> list[LogitErrors]:
    """The reference in bfloat16 against itself in float32, teacher-forced; it computes in bfloat16 from then on."""
    round_to_bfloat16(reference)
    errors: list[LogitErrors] = []
    for number, (prepared, forced_ids, exact) in enumerate(requests):
        progress(number)
        errors.append(logit_errors(exact, reference_logits(reference, prepared, forced_ids)))
    return errors


def _count(tally: Tally, name: str, first: Array, before: Array, logits: Array) -> None:
    tally.cumulative.setdefault(name, []).append(logit_errors(first, logits))
    tally.alone.setdefault(name, []).append(logit_errors(before, logits))


def _cache_links(graphs: Mapping[str, Path], uncached: Mapping[str, Path]) -> tuple[Link, Link]:
    about = "a token at a time through the cache, as users run it"
    codes = Link("kv_cache", "keys and values in 8 bits", graphs=graphs, through_cache=True)
    if graphs == uncached:
        codes = Link("kv_cache", "", skipped="this variant stores keys and values as floats")
    return Link("cache", about, graphs=uncached, through_cache=True), codes


def _provider(package: Package, graphs: Mapping[str, Path], base: Opener | None) -> tuple[Link, Opener]:
    """The last link, and what opens the graphs of those before it."""
    target = package.manifest.target
    swapped = Link("provider", f"the provider of target {target}", graphs=graphs, through_cache=True, on_target=True)
    if base is not None:
        return swapped, base
    if target == "cpu":
        return Link("provider", "", skipped="the variant runs on the CPU, as all steps before"), open_session
    for role, path in graphs.items():
        try:
            open_session(path)
        except PackageError as error:
            reason = f"all steps run on the provider of target {target}: the CPU does not take {role} ({error})"
            return Link("provider", "", skipped=reason), lambda path: open_session(path, target)
    return swapped, open_session


def float_graph(package: Package, role: str) -> Path | None:
    """The graph that stores the weights of a role as widely as any variant does: float32, else float16."""
    for wanted in ("fp32", "fp16"):
        for name, variant in package.manifest.variants.items():
            if variant.graphs[role].precision == wanted:
                return package.graph_path(role, name)
    return None


def _added(before: Sequence[LogitErrors] | None, now: Sequence[LogitErrors]) -> Added:
    earlier = [0.0] * len(now) if before is None else [float(errors.kl.sum()) for errors in before]
    differences = [float(errors.kl.sum()) - total for errors, total in zip(now, earlier, strict=True)]
    found = ratio(np.array(differences), np.array([float(errors.kl.size) for errors in now]))
    return Added(found.value, found.ci_low, found.ci_high)
