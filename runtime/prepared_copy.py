"""Prepared copies: a package's graphs as ONNX Runtime holds them in memory on this very box, mapped instead of made.

At every load ONNX Runtime rearranges the weights for its kernels, in memory of its own. A prepared copy keeps the
outcome on disk, beside the weights as they are: loading maps it, so that its pages belong to the file and can be
dropped, read again and shared by processes. It fits one CPU and one version of ONNX Runtime; on any other it is as
good as absent. It lies in the user's cache, never in the package:

    <cache>/<key>/graph.onnx, graph.onnx_data, prepared.json      key: hash of the graph's files, CPU, ONNX Runtime
"""

import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .disk import locked, sync
from .errors import CapacityError, InputError, PackageError
from .manifest import FileEntry
from .package import Package, file_entry
from .pages import file_pages_dropped, join_pages
from .schema import SchemaError, from_json, to_json
from .session import GraphSession, require_onnxruntime, save_prepared

__all__ = [
    "PreparedCopy",
    "cache_folder",
    "find_prepared",
    "only_writer",
    "open_graph",
    "prepare_graph",
    "prepared_copies",
    "roles_of",
]

_LAYOUT = 1  # of the folder and of the session options that wrote it
_GRAPH, _DATA, _NOTE = "graph.onnx", "graph.onnx_data", "prepared.json"
_STAGING = ".vlmport-prepare-"  # what hidden siblings are called while they are filled
_UNPREPARED = ("embed_tokens",)  # a table: its kernels read it as it is
_GROWTH = 3  # the copy holds the weights as they were and as the kernels want them, sometimes in a wider type
_SLACK = 64 << 20
_log = logging.getLogger("vlmport")


@dataclass(frozen=True)
class PreparedCopy:
    """What prepared.json says of a copy: what it was made of, where it fits, and its files."""

    package: str  # folder of the package, as far as its maker knew
    graph: str  # file name in the package
    key: str
    cpu: str
    onnxruntime: str
    files: dict[str, FileEntry]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(entry.size for entry in self.files.values())


def cache_folder() -> Path:
    """Where copies are kept: $VLMPORT_CACHE, or vlmport/prepared under $XDG_CACHE_HOME or ~/.cache.

    Raises InputError where none of them is known, as in a container whose user has no home.
    """
    own = os.environ.get("VLMPORT_CACHE")
    if own:
        return Path(own)
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(home) if home else Path.home() / ".cache") / "vlmport" / "prepared"
    except RuntimeError:
        raise InputError("VLMPORT_CACHE: is not set, and this user has no home folder; name a place there") from None


def roles_of(package: Package, variant: str | None = None) -> list[str]:
    """Roles of a variant that gain by a copy. Raises PackageError for packages of another target than cpu."""
    if package.manifest.target != "cpu":
        raise PackageError(
            f"{package.path}: made for {package.manifest.target}; only packages of target cpu can be prepared"
        )
    return [role for role in package.variant(variant).graphs if role not in _UNPREPARED]


def prepare_graph(package: Package, role: str, variant: str | None = None) -> tuple[PreparedCopy, bool]:
    """The copy of a role's graph for this box, and whether it was made now: one that is there and sound is kept.

    Reads and hashes whole files. Raises PackageError where ONNX Runtime cannot load the graph, CapacityError where the
    disk is full.
    """
    name, key = _graph_name(package, role, variant), _key(package, role, variant)
    folder = cache_folder() / key
    with only_writer(folder.parent):
        there = _read(folder)
        if there is not None and all(file_entry(folder / file) == entry for file, entry in there.files.items()):
            return there, False
        source = package.graph_path(role, variant)
        data = sum(package.manifest.files[f"onnx/{file}"].size for file in package.variant(variant).graphs[role].files)
        with _staging(folder, _GROWTH * data + _SLACK) as staging:
            save_prepared(source, staging / _GRAPH, staging / _DATA)
            files = {file.name: file_entry(file) for file in sorted(staging.iterdir())}
            copy = PreparedCopy(str(package.path.resolve()), name, key, _cpu(), _version(), files)
            (staging / _NOTE).write_text(json.dumps(to_json(copy), indent=2) + "\n", encoding="utf-8")
    return copy, True


def find_prepared(package: Package, role: str, variant: str | None = None) -> Path | None:
    """The graph file of a copy that fits this box and has all its bytes, or None. Says nothing of their content."""
    if package.manifest.target != "cpu" or role in _UNPREPARED:
        return None
    try:
        folder = cache_folder() / _key(package, role, variant)
    except InputError:  # nowhere to keep copies, so there are none
        return None
    return folder / _GRAPH if _read(folder) is not None else None


def open_graph(package: Package, role: str, variant: str, opener: Callable[[Path], GraphSession]) -> GraphSession:
    """Opens the graph of a role: its prepared copy where there is one for this box, else the package's own.

    A copy that cannot be loaded is passed over, with one line in the log. Raises what `opener` raises.
    """
    copy = find_prepared(package, role, variant)
    if copy is not None:
        try:
            with file_pages_dropped((copy.parent / _DATA).resolve()):
                return opener(copy)
        except PackageError as error:
            _log.warning("%s; took the package itself, `vlmport prepare` mends the copy", error)
    session = opener(package.graph_path(role, variant))
    if role == "decoder" and package.manifest.target == "cpu":
        # Its weights are read once a token, other roles' once a prompt. Nobody has to wait for it.
        threading.Thread(target=join_pages, name="join-pages", daemon=True).start()
    return session


def prepared_copies(package: Package) -> Iterator[tuple[Path, PreparedCopy, bool]]:
    """All copies made of this package's folder: where each is, what it says, and whether it still fits (package, CPU,
    ONNX Runtime)."""
    current = {
        _key(package, role, variant)
        for variant in package.manifest.variants
        for role in package.variant(variant).graphs
        if package.manifest.target == "cpu"
    }
    folder = cache_folder()
    for place in sorted(folder.iterdir()) if folder.is_dir() else []:
        copy = _read(place)
        if copy is not None and (copy.package == str(package.path.resolve()) or copy.key in current):
            yield place, copy, copy.key in current


def _graph_name(package: Package, role: str, variant: str | None) -> str:
    return package.graph_path(role, variant).name


def _key(package: Package, role: str, variant: str | None) -> str:
    """Names by content: equal graphs share a copy, and a package made anew does not find the old one's."""
    graph = package.variant(variant).graphs.get(role)
    if graph is None:
        raise PackageError(f"{package.path}: no role {role!r}; it has {', '.join(package.variant(variant).graphs)}")
    files = [package.manifest.files[f"onnx/{name}"].sha256 for name in graph.files]
    said: list[Any] = [_LAYOUT, files, _cpu(), _version()]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]


def _version() -> str:
    return str(require_onnxruntime().__version__)


def _cpu() -> str:
    """What the choice of kernels depends on: the CPU's name, and a hash of what it says it can do."""
    lines: list[str] = []
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        first = text.split("\n\n", 1)[0]  # one core stands for all
        wanted = ("model name", "flags", "Features", "CPU part", "CPU implementer")
        lines = [line.split(":", 1)[1].strip() for line in first.splitlines() if line.split("\t")[0].strip() in wanted]
    except OSError:  # not Linux
        lines = [platform.processor()]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]
    return f"{platform.machine()} {lines[0] if lines else ''} {digest}"


def _read(folder: Path) -> PreparedCopy | None:
    """What a folder says of itself, where all its files are there in full; else None."""
    try:
        copy = from_json(PreparedCopy, json.loads((folder / _NOTE).read_text(encoding="utf-8")))
        whole = copy.key == folder.name and _GRAPH in copy.files
        return copy if whole and all((folder / n).stat().st_size == e.size for n, e in copy.files.items()) else None
    except (OSError, SchemaError, ValueError, RecursionError):
        return None


@contextmanager
def only_writer(cache: Path) -> Generator[None]:
    """Waits for the lock of the cache, which ends with the process, however it ends; what was half done then goes.

    Raises CapacityError where the cache cannot be made.
    """
    with ExitStack() as held:
        try:
            cache.mkdir(parents=True, exist_ok=True, mode=0o700)
            held.enter_context(locked(cache))
        except OSError as error:
            raise CapacityError(f"{error.filename}: {error.strerror}; name another place in VLMPORT_CACHE") from error
        for left in cache.glob(f"{_STAGING}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


@contextmanager
def _staging(folder: Path, num_bytes: int) -> Generator[Path]:
    """A hidden sibling that takes the folder's place once it is full and synced, or is removed."""
    try:
        free = shutil.disk_usage(folder.parent).free
        if free < num_bytes:
            raise CapacityError(
                f"{folder.parent}: a copy may take {num_bytes} bytes, the disk has {free} free; make room, or name "
                "another place in VLMPORT_CACHE"
            )
        staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder.parent))
    except OSError as error:
        raise CapacityError(f"{error.filename}: {error.strerror}; name another place in VLMPORT_CACHE") from error
    try:
        yield staging
        for file in staging.iterdir():
            sync(file)
        if folder.exists():  # damaged
            shutil.rmtree(folder)
        staging.rename(folder)
        sync(folder.parent)
    except OSError as error:
        raise CapacityError(f"{folder}: cannot be written: {error.strerror}; make room") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
