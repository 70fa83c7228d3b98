"""Hashes made beside other work are those of the files."""

import hashlib
import os
import threading
from pathlib import Path

import pytest

from vlmport.quant import digest
from vlmport.quant.digest import FileDigests, FollowingDigest
from vlmport.runtime import package
from vlmport.runtime.package import file_entry


def test_a_file_is_hashed_as_it_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_BLOCK_BYTES", 7)
    monkeypatch.setattr(digest, "_SYNC_BYTES", 20)
    content = os.urandom(1000)
    path = tmp_path / "file"
    with path.open("w+b", buffering=0) as stream, FollowingDigest(stream.fileno()) as following:
        os.ftruncate(stream.fileno(), 1000)
        for start in range(0, 1000, 90):
            os.pwrite(stream.fileno(), content[start : start + 90], start)
            following.advance(min(1000, start + 90))
            following.advance(0)  # what ends before is no news
        assert following.finish() == file_entry(path)
    assert path.read_bytes() == content


def test_nothing_beyond_what_was_told_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"early" + b"not yet")
    with path.open("rb") as stream, FollowingDigest(stream.fileno()) as following:
        following.advance(5)
        assert following.finish().sha256 == hashlib.sha256(b"early").hexdigest()


def test_a_disk_error_is_told_where_the_digest_is_asked_for() -> None:
    with FollowingDigest(10_000) as following:
        following.advance(4)
        with pytest.raises(OSError, match="Bad file descriptor"):
            following.finish()


def test_files_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "_BLOCK_BYTES", 100)
    files = [tmp_path / "a", tmp_path / "b"]
    for number, file in enumerate(files):
        file.write_bytes(os.urandom(1000 * number))
    with FileDigests(files) as digests:
        assert digests.entries() == {file.name: file_entry(file) for file in files}
    with FileDigests([tmp_path / "missing"]) as digests, pytest.raises(FileNotFoundError):
        digests.entries()


def test_an_early_end_waits_for_no_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "_BLOCK_BYTES", 1)
    file = tmp_path / "large"
    file.write_bytes(bytes(50_000_000))  # minutes, a byte at a time
    with FileDigests([file]):
        assert threading.active_count() > 1
