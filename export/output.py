"""The output folder of an export: whole or not there.

A package is written to a temporary sibling, synced and renamed. A process that dies at any moment leaves the old
package or none, and at worst a hidden sibling, which the next export to the same place removes.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..runtime.disk import sync, sync_tree
from ..runtime.errors import PackageError
from ..runtime.package import MANIFEST_NAME

__all__ = ["check_output", "whole_folder"]


def check_output(folder: Path, overwrite: bool) -> None:
    """Raises PackageError where something is in the way of the output; `overwrite` lets a package go, nothing else."""
    if not folder.exists() and not folder.is_symlink():
        return
    if overwrite and (folder / MANIFEST_NAME).is_file() and not folder.is_symlink():
        return
    if (folder / MANIFEST_NAME).is_file():
        raise PackageError(f"{folder}: exists already; pass --overwrite to replace it, or another -o")
    raise PackageError(f"{folder}: exists and is not a package; choose another -o")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `target` when the block ends well, and vanishes when it does not."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        folder = Path(tempfile.mkdtemp(prefix=_partial_prefix(target) + f"{os.getpid()}-", dir=target.parent))
    except OSError as error:
        raise PackageError(f"{target}: cannot be written ({error.strerror}); choose another -o") from error
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp's folder is its owner's alone
        sync_tree(folder)
        _put_in_place(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _partial_prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _remove_leftovers(target: Path) -> None:
    """Folders of exports that were killed: their process is gone."""
    prefix = _partial_prefix(target)
    for folder in target.parent.iterdir():  # not glob: the target's name may hold brackets
        pid = folder.name.removeprefix(prefix).split("-")[0]
        if folder.name.startswith(prefix) and not (pid.isdigit() and _is_running(int(pid))):
            shutil.rmtree(folder, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _put_in_place(folder: Path, target: Path) -> None:
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=_partial_prefix(target) + f"{os.getpid()}-", dir=target.parent))
        try:
            target.rename(old / "replaced")
            try:
                folder.rename(target)
            except OSError:
                (old / "replaced").rename(target)
                raise
        finally:
            if target.exists():  # else the only copy is in there
                shutil.rmtree(old, ignore_errors=True)
    else:
        folder.rename(target)
    sync(target.parent)
