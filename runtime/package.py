"""The package folder: opening it, trusting it, finding the files of a variant.

Nothing is trusted before it is checked: names stay inside the folder, no links, sizes as the manifest says. External
data of a graph are plain file names in the same folder (a graph that could point elsewhere could read any file of the
box).
"""

import hashlib
import json
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .disk import locked
from .errors import PackageError
from .manifest import FileEntry, GraphFile, Manifest, Variant
from .schema import SchemaError, from_json, to_json

__all__ = ["MANIFEST_NAME", "Package", "file_entry", "manifest_text", "only_writer", "read_entries"]

MANIFEST_NAME = "vlmport.json"
# A thread that runs Python hands over every few milliseconds only: large blocks, so that few such waits are needed.
_BLOCK_BYTES = 16 << 20
_NUM_READERS = 4


@dataclass(frozen=True)
class Package:
    """An opened package: its folder and its checked manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> "Package":
        """Reads the manifest and checks that every file it lists is there, plain, unlinked and of the right size.

        Raises PackageError with the file and the fix. Hashes are checked by `verify`.
        """
        folder = Path(path)
        file = folder / MANIFEST_NAME
        if not file.is_file():
            raise PackageError(f"{folder}: not a package, it has no {MANIFEST_NAME}; make one with `vlmport export`")
        try:
            manifest = from_json(Manifest, json.loads(file.read_text(encoding="utf-8")))
        except (SchemaError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise PackageError(f"{file}: {error}") from error
        for name, entry in manifest.files.items():
            _check_file(folder, name, entry)
        package = cls(folder, manifest)
        for variant in manifest.variants.values():
            for graph in variant.graphs.values():
                _check_graph_names(folder, graph, manifest)
        return package

    def variant(self, name: str | None = None) -> Variant:
        """The named variant, or the only or first one. Raises PackageError that lists what there is."""
        variants = self.manifest.variants
        if name is None:
            return next(iter(variants.values()))
        if name not in variants:
            raise PackageError(
                f"{self.path}: no variant {name!r}; it has {', '.join(variants)} "
                f"(add one with `vlmport quantize {self.path} --recipe {name}`)"
            )
        return variants[name]

    def graph_path(self, role: str, variant: str | None = None) -> Path:
        """Path of the .onnx file of a role. Raises PackageError where the package has no such role."""
        graphs = self.variant(variant).graphs
        if role not in graphs:
            raise PackageError(f"{self.path}: no role {role!r}; it has {', '.join(graphs)}")
        return self.path / "onnx" / graphs[role].graph

    def size(self, variant: str) -> int:
        """Bytes of the graphs and weights of a variant, each file counted once."""
        graphs = self.variant(variant).graphs.values()
        names = {f"onnx/{name}" for graph in graphs for name in graph.files}
        return sum(self.manifest.files[name].size for name in names)

    def files_of(self, variants: Iterable[str]) -> tuple[str, ...]:
        """Names of what some variants are made of: their graphs and weights, and all that is no other variant's."""
        graphs = {
            name: {f"onnx/{file}" for graph in variant.graphs.values() for file in graph.files}
            for name, variant in self.manifest.variants.items()
        }
        wanted = {file for name in variants for file in graphs[name]}
        others = {file for files in graphs.values() for file in files} - wanted
        return tuple(name for name in self.manifest.files if name not in others)

    def verify(self, progress: Callable[[str], None] | None = None, names: Sequence[str] | None = None) -> None:
        """Compares the sha256 of every file, or of `names`, with the manifest.

        Raises PackageError naming the first that differs.
        """
        for name, found in read_entries(self.path, list(self.manifest.files) if names is None else names, progress):
            if found.sha256 != self.manifest.files[name].sha256:
                raise PackageError(
                    f"{self.path / name}: content differs from its sha256 in {MANIFEST_NAME}; copy it again"
                )


def only_writer(folder: Path, *, wait: bool = False) -> AbstractContextManager[None]:
    """Holds the lock of a package, which ends with the process, however it ends.

    Raises PackageError where another process has it, unless told to `wait`.
    """
    busy = None if wait else f"{folder}: another process is adding a variant; wait until it is done"
    return locked(folder / "onnx", busy=busy)


def manifest_text(manifest: Manifest) -> str:
    """The text of vlmport.json. Equal manifests give equal bytes."""
    return json.dumps(to_json(manifest), indent=2, ensure_ascii=False) + "\n"


def read_entries(
    folder: Path, names: Sequence[str], progress: Callable[[str], None] | None = None
) -> Iterator[tuple[str, FileEntry]]:
    """Size and sha256 of files in the order of their names, several at a time: one core reads slower than a disk."""
    stop = threading.Event()

    def read(name: str) -> FileEntry:
        return file_entry(folder / name, stop)

    with ThreadPoolExecutor(max_workers=_NUM_READERS) as pool:
        entries = pool.map(read, names)
        try:
            for name in names:
                if progress is not None:
                    progress(name)
                yield name, next(entries)
        finally:
            stop.set()  # whoever stops here waits for no other file


def file_entry(path: Path, stop: threading.Event | None = None) -> FileEntry:
    """Size and sha256 of a file, read in blocks; of what was read until then where `stop` is set meanwhile."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as stream:
        buffer = bytearray(min(_BLOCK_BYTES, max(1, path.stat().st_size)))
        while not (stop and stop.is_set()) and (count := stream.readinto(buffer)):
            digest.update(memoryview(buffer)[:count])
            size += count
    return FileEntry(sha256=digest.hexdigest(), size=size)


def _check_file(folder: Path, name: str, entry: FileEntry) -> None:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or str(PurePosixPath(name)) != name:
        raise PackageError(f"{folder / MANIFEST_NAME}: files: {name!r} is not a plain path inside the package")
    place, status = folder, folder.lstat()
    for part in parts:
        place = place / part
        try:
            status = place.lstat()
        except FileNotFoundError:
            raise PackageError(f"{place}: missing, though {MANIFEST_NAME} lists it; copy the package again") from None
        if stat.S_ISLNK(status.st_mode):
            raise PackageError(f"{place}: is a symbolic link; a package holds plain files only")
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        raise PackageError(f"{place}: is not a plain file of its own (hard links count); copy the package again")
    if status.st_size != entry.size:
        raise PackageError(f"{place}: {status.st_size} bytes, {MANIFEST_NAME} says {entry.size}; copy it again")


def _check_graph_names(folder: Path, graph: GraphFile, manifest: Manifest) -> None:
    for name in graph.files:
        if "/" in name or f"onnx/{name}" not in manifest.files:
            raise PackageError(f"{folder / MANIFEST_NAME}: graph file {name!r} is not among its files under onnx/")
