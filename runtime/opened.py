"""A package put to work: how it is loaded, and its graphs, each opened once and when it is first needed."""

import threading
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from .cache import check_cache_limit
from .decoder import Decoder
from .errors import InputError, PackageError
from .manifest import CacheSpec, Manifest
from .package import Package
from .positions import VIDEO_RULES
from .prepared_copy import open_graph
from .prompt import PromptBuilder
from .session import GraphSession, open_session, require_onnxruntime

__all__ = ["LoadOptions", "OpenedPackage"]


@dataclass(frozen=True)
class LoadOptions:
    """How a package is put to work."""

    num_threads: int | None = None  # of one operator; None: one a core
    cache_length: int | None = None  # the most tokens a sequence may have; None: what the model was made for
    prefill_chunk: int = 256  # tokens of a prompt that go through the decoder at once; bounds the memory of a prefill
    video_rule: str | None = None  # one of positions.VIDEO_RULES, in place of the manifest's, to compare like with like
    cuda_graph: bool = False  # decode steps are captured once and replayed (see device.py); one answer at a time

    def __post_init__(self) -> None:
        if self.num_threads is not None and self.num_threads < 1:
            raise InputError(f"num_threads: {self.num_threads} is not at least 1; leave it out for one thread a core")
        if self.prefill_chunk < 1:
            raise InputError(f"prefill_chunk: {self.prefill_chunk} is not at least 1")
        if self.video_rule is not None and self.video_rule not in VIDEO_RULES:
            raise InputError(f"video_rule: {self.video_rule!r} is not one of {', '.join(VIDEO_RULES)}")


class OpenedPackage:
    """A variant of a package. Graphs are opened when they are first needed, and let go by `close`.

    Threads may share one: each graph is opened once.
    """

    def __init__(self, package: Package, variant: str | None, options: LoadOptions) -> None:
        """See `load`."""
        self.package = package
        self.variant = package.variant(variant)
        self.manifest = _with_video_rule(package.manifest, options.video_rule)
        self.options = options
        if self.manifest.cache is not None:
            check_cache_limit(self.manifest.cache, options.cache_length)
        if options.cuda_graph and self.manifest.target != "cuda":
            raise InputError(f"cuda_graph: a package of target {self.manifest.target} has none; leave it out")
        require_onnxruntime(self.manifest.target)
        self._opening = threading.RLock()
        self._sessions: dict[str, GraphSession] = {}
        self._decoder: Decoder | None = None
        self._builder: PromptBuilder | None = None

    @classmethod
    def load(
        cls,
        path: str | Path,
        variant: str | None = None,
        *,
        num_threads: int | None = None,
        cache_length: int | None = None,
        prefill_chunk: int = 256,
        video_rule: str | None = None,
        cuda_graph: bool = False,
    ) -> Self:
        """Opens a package folder, its first variant where none is named. The rest is LoadOptions.

        Raises PackageError, InputError, or MissingDependencyError where onnxruntime is not installed.
        """
        options = LoadOptions(num_threads, cache_length, prefill_chunk, video_rule, cuda_graph)
        return cls(Package.open(path), variant, options)

    def close(self) -> None:
        """Lets go of every graph. A later call opens them again."""
        with self._opening:
            self._decoder = None
            self._sessions.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def session(self, role: str) -> GraphSession:
        """The graph of a role. Raises PackageError where the package has none."""
        with self._opening:
            if role not in self._sessions:
                self._sessions[role] = open_graph(
                    self.package,
                    role,
                    self.variant.name,
                    lambda path: open_session(
                        path,
                        self.manifest.target,
                        num_threads=self.options.num_threads,
                        cuda_graph=self.options.cuda_graph and role == "decoder",
                    ),
                )
            return self._sessions[role]

    @property
    def decoder(self) -> Decoder:
        """The decoder graph with its cache. Raises PackageError where graph and manifest disagree."""
        with self._opening:
            if self._decoder is None:
                self._decoder = Decoder(
                    self.session("decoder"),
                    self.cache_spec,
                    chunk=self.options.prefill_chunk,
                    step_graph=self.options.cuda_graph,
                )
            return self._decoder

    @property
    def builder(self) -> PromptBuilder:
        """The chat template and the tokenizer."""
        with self._opening:
            if self._builder is None:
                self._builder = PromptBuilder.from_package(self.package.path, self.manifest)
            return self._builder

    @property
    def cache_spec(self) -> CacheSpec:
        """What the manifest says of the cache. Raises PackageError where it says nothing."""
        if self.manifest.cache is None:
            raise PackageError(f"{self.package.path}: vlmport.json has no cache, so this package generates no text")
        return self.manifest.cache


def _with_video_rule(manifest: Manifest, video_rule: str | None) -> Manifest:
    if video_rule is None:
        return manifest
    if manifest.positions is None or manifest.positions.video_rule is None:
        raise InputError(f"video_rule: {video_rule!r} means nothing here, as this package has no video positions")
    return replace(manifest, positions=replace(manifest.positions, video_rule=video_rule))
