"""The benchmark's own instruments: processes from outside, the roof, profiles, node counts, the report."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from benchmarks.__main__ import main
from benchmarks.calibration import stages_of, write_samples
from benchmarks.floor import Floor
from benchmarks.graphs import count_nodes, weight_bytes
from benchmarks.plan import PARTS, Plan, smoke_plan
from benchmarks.process import Actor, Finished, Memory, reset_peak, run_watched
from benchmarks.profiling import OperatorTime, self_times
from benchmarks.report import SCHEMA, Decode, ShapeReport, VariantReport, machine, markdown, merged, rows, text
from benchmarks.roof import READERS, Roof
from benchmarks.runtime import Loaded, VisionRun
from vlmport.cli.bench import Spread
from vlmport.cli.progress import Progress
from vlmport.quant.samples import load_samples
from vlmport.runtime.schema import SchemaError, from_json, to_json

MB = 1_000_000
TINY = Path(__file__).parent / "goldens" / "qwen2_5_vl" / "tiny_a"


# Processes


def python(code: str, log: Path) -> Finished:
    return run_watched([sys.executable, "-c", code], log)


def test_memory_of_a_whole_tree_is_seen(tmp_path: Path) -> None:
    one = "import time; x = bytearray(b'1') * 120_000_000; time.sleep(1.5)"
    two = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {one!r}]); {one}; time.sleep(1)"
    alone, together = python(one, tmp_path / "one"), python(two, tmp_path / "two")
    assert 120 * MB < alone.peak_process <= alone.peak_tree < 170 * MB
    assert 240 * MB < together.peak_tree < 340 * MB
    assert together.peak_process < 170 * MB
    assert (alone.num_processes, together.num_processes) == (1, 2)


def test_bytes_of_children_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write = f"open({str(file)!r}, 'wb').write(b'x' * 7_000_000); len(open({str(file)!r}, 'rb').read())"
    idle = python("pass", tmp_path / "log")
    own = python(write, tmp_path / "log")
    child = python(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {write!r}])", tmp_path / "log")
    for finished in (own, child):
        assert 7 * MB <= finished.bytes_written < 7.1 * MB
        assert 7 * MB <= finished.bytes_read < 9 * MB + 2 * idle.bytes_read
    assert idle.bytes_written < 0.1 * MB


def test_a_command_that_fails_is_told_with_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        python("print('the reason'); raise SystemExit(3)", tmp_path / "log")
    assert caught.value.returncode == 3
    assert "the reason" in caught.value.output


class Remembers:
    """What an actor may be: it keeps its state from one question to the next."""

    def __init__(self, start: int) -> None:
        self.total = start

    def add(self, number: int) -> int:
        self.total += number
        return self.total

    def fail(self) -> None:
        raise ValueError(self.total)


def test_an_actor_keeps_its_state_and_tells_of_its_end(capfd: pytest.CaptureFixture[str]) -> None:
    with Actor(Remembers, 5) as actor:
        assert [actor.ask("add", 1), actor.ask("add", 2)] == [6, 8]
        with pytest.raises(RuntimeError, match="fail: its process ended with status 1"):
            actor.ask("fail")
    assert "ValueError: 8" in capfd.readouterr().err


def test_the_high_water_mark_can_start_again() -> None:
    held = np.ones(10_000_000)
    del held
    before = Memory.of().peak
    reset_peak()
    assert Memory.of().peak < before - 40 * MB


# The roof


def test_every_reader_reads_all_of_it() -> None:
    part = np.full(1000, 1, np.float32)
    for read in READERS.values():
        seen = read(part)
        part[-1] = 3  # the last value has an influence on what comes out
        assert read(part) != seen
        part[-1] = 1


def test_the_roof_is_the_fastest_of_the_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    roof = Roof(64 << 20, 2)
    parts = roof._parts
    assert parts.nbytes == 64 << 20
    assert (parts == 1).all()
    measured = roof.measure()
    assert 0.2e9 < measured < 1e12  # no machine that runs this is outside
    seconds = {"slow": 0.2, "fast": 0.1}
    monkeypatch.setattr(roof, "_read", lambda name: 1 / seconds[name])
    monkeypatch.setattr("benchmarks.roof.READERS", seconds)
    assert roof.measure() == 10


# Profiles and graphs


def event(name: str, start: int, duration: int) -> dict[str, object]:
    return {"name": f"{name}_kernel_time", "ts": start, "dur": duration, "args": {"op_name": name}}


def test_time_inside_a_loop_is_counted_once() -> None:
    events = [
        event("Loop", 0, 100),
        event("MatMul", 10, 30),
        event("Add", 50, 20),
        event("MatMul", 100, 7),
        {"name": "Loop_fence_before", "ts": 0, "dur": 100, "args": {"op_name": "Loop"}},
    ]
    assert self_times(events[::-1]) == [("Loop", 50), ("MatMul", 30), ("Add", 20), ("MatMul", 7)]


def graph_file(folder: Path) -> Path:
    """x @ weight + table[ids], the addition in a branch of an If and once more in a local function."""
    branch = helper.make_graph(
        [helper.make_node("Add", ["y", "rows"], ["z"])],
        "branch",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["y"]),
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("If", ["flag"], ["out"], then_branch=branch, else_branch=branch),
        helper.make_node("Twice", ["out"], ["last"], domain="own"),
    ]
    twice = helper.make_function(
        "own", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 21)]
    )
    weights = [
        helper.make_tensor("weight", TensorProto.FLOAT, [8, 4], np.zeros(32, np.float32)),
        helper.make_tensor("table", TensorProto.FLOAT, [100, 4], np.zeros(400, np.float32)),
    ]
    graph = helper.make_graph(nodes, "graph", [], [], initializer=weights)
    file = folder / "graph.onnx"
    onnx.save(helper.make_model(graph, functions=[twice]), file)
    return file


def test_nodes_are_counted_in_branches_and_functions(tmp_path: Path) -> None:
    assert count_nodes(graph_file(tmp_path)) == {"Add": 3, "Gather": 1, "If": 1, "MatMul": 1, "own.Twice": 1}


def test_a_table_that_is_looked_up_is_not_read(tmp_path: Path) -> None:
    assert weight_bytes(graph_file(tmp_path)) == 8 * 4 * 4


def test_weight_bytes_are_those_of_the_data_file(package_tiny_a: Path) -> None:
    from vlmport.runtime.package import Package

    package = Package.open(package_tiny_a)
    for variant in ("fp32", "int4"):
        graph = package.graph_path("decoder", variant)
        found, size = (
            weight_bytes(graph),
            (graph.parent / package.variant(variant).graphs["decoder"].data).stat().st_size,
        )
        assert 0.9 * size < found < size + 40_000  # small ones are in the .onnx file


def test_the_floor_quantizes_each_weight_once(tmp_path: Path) -> None:
    """The tied table is one tensor: of the same format in both roles, it counts once."""
    floor = Floor(TINY)
    (tmp_path / "file").write_bytes(b"x" * 100_000)
    times = floor.measure("int8", tmp_path)
    assert times.digest is not None
    assert min(times.read, times.quantize, times.write, times.digest) > 0
    assert times.total == times.read + times.quantize + times.write
    untied = floor._weights("int8")
    tied = Floor(TINY.parent / "tiny_b")._weights("int8")
    assert sum(rows == 512 for (rows, _), _ in untied) == 2
    assert sum(rows == 448 for (rows, _), _ in tied) == 1
    assert {format.bits for _, format in floor._weights("int4")} == {4, 8}


# The report


def example() -> ShapeReport:
    spread = Spread(2.0, 1.0, 3.0)
    memory = Memory(2_000_000_000, 1_500_000_000, 3_000_000_000)
    finished = Finished(30.0, 2_100_000_000, 2_000_000_000, 2, 8_000_000_000, 2_600_000_000, 0, 0)
    full = VariantReport(
        export=finished,
        package_size=1_000_000_000,
        nodes={"decoder": {"MatMul": 3}},
        weight_bytes=900_000_000,
        cache_bytes=1_000_000,
        load=Loaded(1.5, memory, memory),
        vision={"448x448": (VisionRun(1024, 4.0, 5), VisionRun(1024, 5.0, 5), VisionRun(1024, 9.0, 5))},
        float32_speedup=spread,
        prefill={"256": 40.0},
        decode=(Decode(256, Spread(10.0, 9.0, 11.0), Spread(20e9, 10e9, 30e9), Spread(0.8, 0.7, 0.9)),),
        steady_memory=(200_000_000, 201_000_000),
        profile={"decode": tuple(OperatorTime(f"Op{n}", 0.01, 0.1, 2) for n in range(10))},
    )
    return ShapeReport(
        SCHEMA, "3b", "about", "2026-01-01", {"cpu": "x"}, 2, 1, 1, {"int4": full, "int8": VariantReport()}
    )


def test_a_report_survives_its_json() -> None:
    report = example()
    assert from_json(ShapeReport, json.loads(json.dumps(to_json(report)))) == report
    with pytest.raises(SchemaError):
        from_json(ShapeReport, to_json(report) | {"speed": 1})


def test_every_row_has_its_figures() -> None:
    found = {name: cells for name, *cells in rows(example())}
    assert found["export"] == ["30.0 s", "-"]
    assert found["export, peak RSS of the process tree"] == ["2.10 GB", "-"]
    assert found["RSS after load / package"] == ["2.00", "-"]
    assert found["vision 448x448"] == ["5.00 (4.00-9.00) s", "-"]
    assert found["decode at 256, tokens/s"] == ["10.0 (9.0-11.0)", "-"]
    assert found["bandwidth beside decode at 256, GB/s"] == ["20.0 (10.0-30.0)", "-"]
    assert found["decode at 256, share of the roof"] == ["80% (70%-90%)", "-"]
    assert found["cache read a token at 256"] == ["0.26 GB", "-"]
    assert found["MB of its own after 50 .. 200 decode steps"] == ["200 201", "-"]
    assert "load, prepared" not in found  # measured for no variant


def test_tables_and_markdown_show_the_same() -> None:
    report = example()
    plain, marked = text(report), markdown(report)
    for row in rows(report):
        assert f"| {' | '.join(row)} |" in marked
        assert row[0] in plain
    for output in (plain, marked):
        assert "int4: decode" in output
        assert "2 others" in output
    assert "| 2 others | 20.0 | 20.0% | 4 |" in marked


def test_the_machine_is_in_the_tables() -> None:
    box = {"cpu": "a CPU (amx_int8)", "memory": "24 GB", "onnxruntime": "1.2.3"}
    report = replace(example(), box=box)
    assert machine(report) == "a CPU (amx_int8), 2 cores, 24 GB, ONNX Runtime 1.2.3, 2026-01-01"
    assert machine(report) in text(report)
    assert machine(report) in markdown(report)


def test_a_later_run_adds_what_it_has_measured() -> None:
    old = example()
    again = VariantReport(export=old.variants["int4"].export, prefill={"256": 50.0})
    new = replace(old, date="2026-01-02", variants={"int4": again, "fp32": VariantReport(package_size=1)})
    found = merged(old, new)
    assert found.date == "2026-01-02"
    assert found.variants == {
        "int4": replace(old.variants["int4"], prefill={"256": 50.0}),
        "int8": VariantReport(),
        "fp32": VariantReport(package_size=1),
    }


def test_render_prints_the_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(to_json(example())))
    assert main(["render", str(file)]) == 0
    assert capsys.readouterr().out == markdown(example())


def test_render_puts_the_tables_between_their_marks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, document = tmp_path / "bench.json", tmp_path / "doc.md"
    file.write_text(json.dumps(to_json(example())))
    document.write_text("a\n<!-- 3b -->\nold\n<!-- /3b -->\nz\n<!-- 7b -->\nkept\n<!-- /7b -->\n")
    for _ in range(2):  # the second time changes nothing
        assert main(["render", str(file), "--into", str(document)]) == 0
    tables = f"<!-- 3b -->\n{markdown(example())}<!-- /3b -->"
    assert document.read_text() == f"a\n{tables}\nz\n<!-- 7b -->\nkept\n<!-- /7b -->\n"
    document.write_text("no marks")
    assert main(["render", str(file), "--into", str(document)]) == 2
    assert document.read_text() == "no marks"
    assert "has no <!-- 3b -->" in capsys.readouterr().err


def test_nodes_are_those_of_the_first_variant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(to_json(example())))
    assert main(["nodes", str(file)]) == 0
    assert json.loads(capsys.readouterr().out) == {"decoder": {"MatMul": 3}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["make", "4b", "-o", "out"], "shape '4b' is unknown"),
        (["make", "3b", "-o", str(TINY)], "exists already"),
        (["run", "4b"], "shape '4b' is unknown"),
        (["render", "nowhere.json"], "nowhere.json: cannot be read"),
        (["render", str(TINY / "config.json")], "unknown"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_smoke_plan_is_a_part_of_the_whole(tmp_path: Path) -> None:
    plan = smoke_plan(Plan("100m", tmp_path))
    assert set(plan.parts) < set(PARTS)
    assert set(plan.recipes) < set(Plan("100m", tmp_path).recipes)
    assert replace(plan, parts=PARTS) != plan


# Calibration


def test_made_up_samples_are_a_calibration_folder(tmp_path: Path) -> None:
    samples = load_samples(write_samples(tmp_path, 3, seed=1), 3, 0)
    assert len({sample.answers for sample in samples}) == 3
    again = write_samples(tmp_path / "again", 3, seed=1)
    for file in ("samples.jsonl", "images/0002.png"):
        assert (again / file).read_bytes() == (tmp_path / file).read_bytes()


def test_stages_are_read_from_what_an_export_tells(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as stream:
        progress = Progress("export", stream)
        progress.started = progress._part.started = time.monotonic() - 90.0
        for done in range(12):
            progress._shown_at = 0.0
            progress(done, 12, f"int4_gptq: calibrating decoder, stage {done + 1} of 12")
    stages, seconds = stages_of(log.read_text("utf-8"))
    assert stages == {"decoder": 12}
    assert 0 <= seconds["decoder"] < 1
