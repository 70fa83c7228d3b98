"""Prepared copies: the same bits as without, used where they fit, passed over where not, whole or not there."""

import fcntl
import json
import logging
import os
import shutil
import threading
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from vlmport.cli.main import main
from vlmport.runtime import CapacityError, InputError, Model, PackageError, load, pages, prepared_copy
from vlmport.runtime.manifest import FileEntry
from vlmport.runtime.package import Package
from vlmport.runtime.prepared_copy import find_prepared, prepare_graph, prepared_copies, roles_of

IDS = np.arange(3, 40)
ROLES = ("vision_encoder", "projector", "decoder")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("VLMPORT_CACHE", str(folder))
    return folder


@pytest.fixture
def package(package_tiny_a: Path, cache: Path) -> Package:
    return Package.open(package_tiny_a)


def outputs(path: Path, variant: str, expected_folder: Path) -> list[np.ndarray]:
    """What the stages compute, checked to come from graphs under `expected_folder`."""
    with load(path, variant, num_threads=1) as model:
        pixels = np.random.default_rng(2).standard_normal((64, 1176)).astype(np.float32)
        vision = vision_of(model, pixels)
        cache = model.new_cache(64)
        embeds = model.embed(model.prepare_ids(IDS))
        rows = model.prefill(embeds, np.tile(np.arange(len(IDS)), (3, 1)), cache, all_logits=True)
        steps = [model.step(7, cache) for _ in range(3)]
        for role in ROLES[::2]:
            assert model.session(role).path.is_relative_to(expected_folder), role
        return [vision, rows, *steps]


def vision_of(model: Model, pixels: np.ndarray) -> np.ndarray:
    from vlmport.runtime.image import Patches

    return model.encode_vision([Patches(pixels, (1, 8, 8))]).features


@pytest.mark.parametrize("variant", ["fp32", "int8", "int4"])
def test_a_copy_gives_the_same_bits(package: Package, cache: Path, variant: str) -> None:
    before = outputs(package.path, variant, package.path)
    assert roles_of(package, variant) == list(ROLES)
    for role in ROLES:
        copy, is_new = prepare_graph(package, role, variant)
        assert is_new
        assert copy.size > 0
    for a, b in zip(before, outputs(package.path, variant, cache), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_damaged_copy_is_passed_over_and_mended(
    package: Package, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepare_graph(package, "decoder", "int4")
    graph = find_prepared(package, "decoder", "int4")
    assert graph is not None
    graph.write_bytes(b"\xff" * graph.stat().st_size)  # as long as before, and no graph
    with load(package.path, "int4") as model, caplog.at_level(logging.WARNING, "vlmport"):
        assert model.session("decoder").path.is_relative_to(package.path)
    (line,) = caplog.messages
    assert "\n" not in line
    assert "vlmport prepare" in line
    assert prepare_graph(package, "decoder", "int4")[1]
    assert not prepare_graph(package, "decoder", "int4")[1]
    graph.with_name("graph.onnx_data").write_bytes(b"short")
    assert find_prepared(package, "decoder", "int4") is None
    (graph.parent / "prepared.json").write_text("{")
    assert find_prepared(package, "decoder", "int4") is None


def test_a_changed_bit_of_the_weights_is_found_by_prepare(package: Package) -> None:
    prepare_graph(package, "decoder", "int4")
    graph = find_prepared(package, "decoder", "int4")
    assert graph is not None
    with graph.with_name("graph.onnx_data").open("r+b") as stream:
        first = stream.read(1)
        stream.seek(0)
        stream.write(bytes([first[0] ^ 1]))
    assert prepare_graph(package, "decoder", "int4")[1]


@pytest.mark.parametrize("what", ["_cpu", "_version"])
def test_another_box_does_not_use_it(package: Package, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_graph(package, "decoder", "int4")
    monkeypatch.setattr(prepared_copy, what, lambda: "another")
    assert find_prepared(package, "decoder", "int4") is None
    assert [fits for _, _, fits in prepared_copies(package)] == [False]


def test_a_package_made_anew_does_not_use_the_old_one(package: Package) -> None:
    prepare_graph(package, "decoder", "int4")
    graph = package.variant("int4").graphs["decoder"]
    package.manifest.files.update({f"onnx/{graph.data}": FileEntry("0" * 64, 1)})
    assert find_prepared(package, "decoder", "int4") is None


def test_a_full_disk_leaves_nothing(package: Package, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    with pytest.raises(CapacityError, match=r"the disk has 1000 free.*VLMPORT_CACHE"):
        prepare_graph(package, "decoder", "int4")
    assert list(cache.iterdir()) == []


def test_a_write_that_fails_leaves_nothing(package: Package, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path, graph: Path, data: Path) -> None:
        data.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(data))

    monkeypatch.setattr(prepared_copy, "save_prepared", fail)
    with pytest.raises(CapacityError, match="No space left on device"):
        prepare_graph(package, "decoder", "int4")
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_made(package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VLMPORT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CapacityError, match=r"Not a directory.*VLMPORT_CACHE"):
        prepare_graph(package, "decoder", "int4")
    assert find_prepared(package, "decoder", "int4") is None


def test_what_a_killed_run_left_goes(package: Package, cache: Path) -> None:
    left, other = cache / f"{prepared_copy._STAGING}x", cache / ".other"
    for folder in (left, other):
        folder.mkdir(parents=True)
        (folder / "graph.onnx_data").write_bytes(b"half")
    assert prepare_graph(package, "decoder", "int4")[1]
    assert not left.exists()
    assert other.exists()  # the cache may be a folder that holds other things too


def test_one_process_prepares_at_a_time(package: Package, cache: Path) -> None:
    cache.mkdir()
    made: list[bool] = []
    lock = os.open(cache, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    waiting = [
        threading.Thread(target=lambda: made.append(prepare_graph(package, "decoder", "int4")[1])) for _ in range(2)
    ]
    for thread in waiting:
        thread.start()
    waiting[0].join(0.5)
    assert list(cache.iterdir()) == made == []
    os.close(lock)
    for thread in waiting:
        thread.join()
    assert sorted(made) == [False, True]  # the second finds what the first has made


def test_a_user_without_a_home_runs_packages(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("VLMPORT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert find_prepared(package, "decoder", "int4") is None
    with pytest.raises(InputError, match="VLMPORT_CACHE"):
        prepare_graph(package, "decoder", "int4")


def test_other_targets_are_refused(package: Package, tmp_path: Path) -> None:
    folder = tmp_path / "gpu"
    shutil.copytree(package.path, folder)
    manifest = folder / "vlmport.json"
    manifest.write_text(manifest.read_text().replace('"target": "cpu"', '"target": "cuda"'))
    with pytest.raises(PackageError, match="made for cuda"):
        roles_of(Package.open(folder))
    assert find_prepared(Package.open(folder), "decoder") is None


def test_the_command(package: Package, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(package.path)
    assert main(["prepare", folder, "--list"]) == 0
    assert "no prepared copy" in capsys.readouterr().out
    assert main(["prepare", folder, "--variant", "int4"]) == 0
    assert "prepared vision_encoder, projector, decoder of int4" in capsys.readouterr().out
    assert main(["prepare", folder, "--variant", "int4"]) == 0
    assert "already" in capsys.readouterr().out
    for note in cache.glob("*/prepared.json"):  # a copy for a CPU that this box has no more
        stale = note.parent.with_name("stale")
        shutil.copytree(note.parent, stale)
        (stale / "prepared.json").write_text(json.dumps(json.loads(note.read_text()) | {"key": "stale"}))
        break
    assert main(["prepare", folder, "--list", "--json"]) == 0
    assert [copy["fits"] for copy in json.loads(capsys.readouterr().out)].count(False) == 1
    assert main(["prepare", folder, "--variant", "int4"]) == 0  # removes what fits no more
    assert not stale.exists()
    assert main(["prepare", folder, "--remove"]) == 0
    assert "removed 3 copies" in capsys.readouterr().out
    assert list(cache.iterdir()) == []
    for mistake in (["--variant", "nothing"], ["--json"], ["--remove", "--variant", "int4"]):
        assert main(["prepare", folder, *mistake]) == 2


def test_pages_change_no_value(tmp_path: Path) -> None:
    """Dropped pages of a file come back as they were; changed ones are not dropped; joined ones keep their values."""
    file = tmp_path / "weights"
    values = np.arange(6 << 20, dtype=np.int32)
    values.tofile(file)
    older = np.memmap(file, np.int32, "c")
    assert int(older.sum()) == int(values.sum())
    before = resident(file)
    with pages.file_pages_dropped(file):
        mapped, changed = np.memmap(file, np.int32, "c"), np.memmap(file, np.int32, "c")
        assert int(mapped.sum()) == int(values.sum())
        changed[5] = -1
        if before:  # Linux
            assert resident(file) >= 2 * before
    if before:
        assert before <= resident(file) <= 1.1 * before  # another thread may let go of the older one at any time
    pages.join_pages()
    np.testing.assert_array_equal(mapped, values)
    np.testing.assert_array_equal(values, np.arange(6 << 20, dtype=np.int32))
    assert changed[5] == -1


def resident(file: Path) -> int:
    return sum(mapping.resident for mapping in pages._mappings() if mapping.name == str(file))
