"""The bytes that a verdict is about: sha256 of every file that takes part, read when it is judged.

The manifest has hashes too, but they say what the files should be. Here they are read, so that a report names what was
there; and read again, where a file has changed by the time the verdict is.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..runtime.errors import InputError, PackageError
from ..runtime.package import MANIFEST_NAME, Package, file_entry, read_entries

__all__ = ["JudgedFiles", "changed_since", "hash_checkpoint", "hash_files", "hash_golden", "hash_package"]

Progress = Callable[[int, int, str], None]
_CHECKPOINT_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".py")


@dataclass(frozen=True)
class JudgedFiles:
    """sha256 by name of some files of a folder, and what tells that they are still the same."""

    folder: Path
    sha256: Mapping[str, str]
    states: Mapping[str, tuple[int, int, int]]  # size, time of the last change, inode

    def check(self) -> None:
        """Raises InputError for a file that has other bytes than when it was read."""
        for name, state in self.states.items():
            file = self.folder / name
            if not file.is_file() or (_state(file) != state and file_entry(file).sha256 != self.sha256[name]):
                raise InputError(f"{file}: changed while it was validated, so there is no verdict; validate again")


def hash_package(package: Package, variants: Iterable[str], progress: Progress) -> JudgedFiles:
    """Reads the files of these variants. Raises PackageError for one that is not what the manifest says."""
    judged = hash_files(package.path, (MANIFEST_NAME, *package.files_of(variants)), progress)
    for name, sha256 in judged.sha256.items():
        if name != MANIFEST_NAME and sha256 != package.manifest.files[name].sha256:
            raise PackageError(
                f"{package.path / name}: content differs from its sha256 in {MANIFEST_NAME}; copy it again"
            )
    return judged


def hash_checkpoint(folder: Path, progress: Progress) -> JudgedFiles:
    """Reads the files of a checkpoint that a reference is made from: weights, configuration, tokenizer, code."""
    return hash_files(folder, _of_checkpoint(folder), progress)


def hash_golden(folder: Path, progress: Progress) -> JudgedFiles:
    """The same of a golden folder, and the inputs of its cases."""
    inputs = sorted(file for file in (folder / "inputs").rglob("*") if file.is_file())
    return hash_files(folder, [*_of_checkpoint(folder), *(f.relative_to(folder).as_posix() for f in inputs)], progress)


def hash_files(folder: Path, names: Sequence[str], progress: Progress = lambda done, total, what: None) -> JudgedFiles:
    """Reads these files of a folder."""
    states = {name: _state(folder / name) for name in names}  # before their bytes: a later change is never missed
    entries = read_entries(folder, names, lambda name: progress(names.index(name), len(names), f"reading {name}"))
    sha256 = {name: entry.sha256 for name, entry in entries}
    progress(len(names), len(names), "read")
    return JudgedFiles(folder, sha256, states)


def changed_since(package: Package, variant: str, judged: Mapping[str, str], since_ns: int | None) -> tuple[str, ...]:
    """Files of a variant that are not the judged ones; all of them are read, or those written at `since_ns` or later.

    A file that the manifest has another hash for needs no reading, nor does one that was not judged.
    """
    changed: list[str] = []
    for name in (MANIFEST_NAME, *package.files_of([variant])):
        entry, file = package.manifest.files.get(name), package.path / name
        if name not in judged or (entry is not None and entry.sha256 != judged[name]):
            changed.append(name)
            continue
        is_read = entry is None or since_ns is None or file.stat().st_mtime_ns >= since_ns
        if is_read and file_entry(file).sha256 != judged[name]:
            changed.append(name)
    return tuple(changed)


def _of_checkpoint(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.is_file() and file.suffix in _CHECKPOINT_SUFFIXES)


def _state(file: Path) -> tuple[int, int, int]:
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns, found.st_ino
