"""What `make bench-smoke` finds that no noise can move: memory, bytes, nodes. Times and speeds are judged nowhere.

A change that is meant moves the figures below with it. For the nodes: `make bench-smoke`, then
`python -m benchmarks nodes build/bench-100m.json > tests/smoke_nodes.json`, and a look at the difference.
"""

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.process import Actor
from benchmarks.report import ShapeReport, VariantReport
from benchmarks.runtime import Runtime
from vlmport.runtime.schema import from_json

MB = 1_000_000
BYTES_A_PATCH = 25_000  # 20 arrays of the tower's width in float32
# Every operator that the int4 package of the 100 M shape may have, by role, and how many nodes of it.
NODES = json.loads((Path(__file__).parent / "smoke_nodes.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("smoke")


@pytest.fixture(scope="module")
def report(folder: Path) -> ShapeReport:
    parts = ["export", "load", "vision", "text", "steady"]
    assert main(["run", "100m", "--smoke", "--folder", str(folder), "--parts", *parts]) == 0
    return from_json(ShapeReport, json.loads((folder / "bench-100m.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def int4(report: ShapeReport) -> VariantReport:
    return report.variants["int4"]


def test_what_was_measured(report: ShapeReport) -> None:
    assert report.num_parameters == 100_480_800
    assert 2 * report.num_parameters < report.checkpoint_size < 2 * report.num_parameters + 0.1 * MB
    assert list(report.variants) == ["int4"]


def test_an_export_takes_little_memory(int4: VariantReport) -> None:
    """torch and the traced graphs; 100 million weights are 400 MB in float32, and never there together."""
    assert int4.export is not None
    assert 200 * MB < int4.export.peak_process <= int4.export.peak_tree < 800 * MB


def test_an_export_reads_and_writes_what_it_must(report: ShapeReport, int4: VariantReport) -> None:
    """Weights are read to be hashed and to be stored, a tied table and what balancing looks at once more; a byte of the
    package is written once."""
    assert int4.export is not None
    assert int4.package_size is not None
    libraries = 150 * MB
    assert report.checkpoint_size < int4.export.bytes_read < 3 * report.checkpoint_size + libraries
    assert int4.package_size < int4.export.bytes_written < 1.05 * int4.package_size + 5 * MB


def test_the_package_is_as_small_as_its_recipe(report: ShapeReport, int4: VariantReport) -> None:
    assert int4.package_size is not None
    assert int4.weight_bytes is not None
    assert 0.6 * report.num_parameters < int4.package_size < 0.9 * report.num_parameters  # the tied table once
    assert 30 * MB < int4.weight_bytes < 62 * MB  # 59 million in the blocks at 5 bits, 19 million in the head at 9


def test_the_runtime_takes_little_memory(int4: VariantReport) -> None:
    assert int4.load is not None
    assert int4.package_size is not None
    assert int4.peak_memory is not None
    graphs = int4.load.after.resident - int4.load.before.resident
    assert 0 < graphs < 1.5 * int4.package_size + 60 * MB  # the graphs themselves, and their working memory
    assert int4.load.after.resident < int4.peak_memory < int4.load.after.resident + 200 * MB


def test_an_image_takes_some_arrays_of_the_towers_width(int4: VariantReport) -> None:
    """One array is 1,280 bytes a patch; scores of all pairs of patches would be 16 KB."""
    runs = [run for case in int4.vision.values() for run in case]
    assert len(runs) == 3
    assert max(run.peak_above / run.num_patches for run in runs) < BYTES_A_PATCH


@pytest.mark.slow
def test_memory_of_an_image_is_linear_in_its_patches(report: ShapeReport, folder: Path) -> None:
    """Layers of full attention included: 16,384 patches have 268 million pairs."""
    with Actor(Runtime, folder / "bench" / "packages" / "100m-int4", "int4") as runtime:
        runtime.ask("load", ["vision_encoder", "projector"])
        run = runtime.ask("vision", [(1792, 1792)])
    assert run.num_patches == 16_384
    assert run.peak_above < BYTES_A_PATCH * run.num_patches


def test_no_decode_step_keeps_memory(int4: VariantReport) -> None:
    first, *_, last = int4.steady_memory
    assert len(int4.steady_memory) == 4
    assert last - first < 5 * MB  # of 150 steps: one row of logits kept by each would be 23 MB


@pytest.mark.parametrize("role", sorted(NODES))
def test_nodes_are_the_expected_ones(int4: VariantReport, role: str) -> None:
    assert int4.nodes[role] == NODES[role]


def test_every_role_is_expected(int4: VariantReport) -> None:
    assert set(int4.nodes) == set(NODES)
