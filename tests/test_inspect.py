"""`vlmport inspect`: tells all that the manifest knows, loads nothing, folds layers that are alike."""

import json
import os
from pathlib import Path

import pytest
from fake_package import ROLES, write_package
from hypothesis import given
from hypothesis import strategies as st

from vlmport.cli.inspect import folded
from vlmport.cli.main import main
from vlmport.runtime.package import file_entry


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return write_package(tmp_path / "package")


def test_text_tells_roles_variants_sizes_tensors_and_bits(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(package)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "source my-finetune, 1,234,567 parameters in bfloat16" in lines
    assert "context 32,768 tokens" in lines
    assert "variant embed_tokens decoder all parity" in lines
    assert "fp32 2.0 kB 3.0 MB 3.0 MB not validated" in lines
    assert "int4 2.0 kB 2.0 kB 4.0 kB not validated" in lines
    assert "in past_key_values.0-3.key float32 [batch, 2, past_length, 16]" in lines
    assert "out logits float32 [batch, kept, 512]" in lines
    assert "layers.0-1,3.mlp.down_proj.weight float32 int4" in lines
    assert "layers.2.mlp.down_proj.weight float32 float32" in lines


def test_json_has_the_same(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(package), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["roles"] == list(ROLES)
    assert set(found["variants"]) == {"fp32", "int4"}
    decoder = found["variants"]["int4"]["graphs"]["decoder"]
    assert decoder["formats"]["layers.0.mlp.down_proj.weight"] == "int4"
    assert decoder["outputs"]["logits"] == {"dtype": "float32", "shape": ["batch", "kept", "512"]}
    assert decoder["size"] == 2000
    assert found["size"] == 3_005_000


def write_report(package: Path, place: Path) -> None:
    """Of int4 alone, made at this moment."""
    files = json.loads((package / "vlmport.json").read_text())["files"]
    judged = {name: entry["sha256"] for name, entry in files.items() if name != "onnx/decoder.onnx_data"}
    report = {
        "schema": "vlmport-report/3",
        "mode": "reference",
        "package": {"files": {**judged, "vlmport.json": file_entry(package / "vlmport.json").sha256}},
        "variants": [{"name": "int4", "outcome": "FAIL", "rows": []}],
    }
    place.parent.mkdir(exist_ok=True)
    place.write_text(json.dumps(report), encoding="utf-8")


def parities(package: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, str]:
    assert main(["inspect", str(package), "--json", *options]) == 0
    return {name: variant["parity"] for name, variant in json.loads(capsys.readouterr().out)["variants"].items()}


def flip(file: Path, *, later: bool = True) -> None:
    """One bit of a file; `later` tells by its time that it was written."""
    times = file.stat()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    if not later:
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_last_parity_is_told(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_report(package, package / "parity" / "report.json")
    assert parities(package, capsys) == {"fp32": "not validated", "int4": "FAIL (reference)"}


@pytest.mark.parametrize("name", ["onnx/decoder_int4.onnx_data", "onnx/embed_tokens.onnx"])
def test_one_bit_since_the_report_is_told_with_its_file(
    package: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_report(package, package / "parity" / "report.json")
    flip(package / name)
    assert parities(package, capsys)["int4"] == f"out of date, was FAIL (reference); changed since: {name}"


def test_a_change_of_what_was_not_judged_is_none(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_report(package, package / "parity" / "report.json")
    flip(package / "onnx" / "decoder.onnx_data")  # of fp32
    assert parities(package, capsys)["int4"] == "FAIL (reference)"


def test_a_report_that_is_named_is_held_against_every_byte(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even where the time of a file hides that it was written."""
    report = tmp_path / "report.json"
    write_report(package, report)
    assert parities(package, capsys)["int4"] == "not validated"
    assert parities(package, capsys, "--report", str(report))["int4"] == "FAIL (reference)"
    flip(package / "onnx" / "decoder_int4.onnx_data", later=False)
    assert "decoder_int4.onnx_data" in parities(package, capsys, "--report", str(report))["int4"]


def test_another_manifest_is_a_change(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_report(package, package / "parity" / "report.json")
    manifest = package / "vlmport.json"
    manifest.write_text(manifest.read_text().replace("some_family", "same_family"))
    assert parities(package, capsys)["int4"].endswith("changed since: vlmport.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"variants": [3]}', '{"variants": [], "mode": "golden"}'])
def test_broken_report_is_one_line(package: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (package / "parity").mkdir()
    (package / "parity" / "report.json").write_text(text, encoding="utf-8")
    assert main(["inspect", str(package)]) == 2
    assert "report.json: not a report" in capsys.readouterr().err


def test_not_a_package_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "vlmport.json" in message


@given(st.dictionaries(st.tuples(st.sampled_from("abc"), st.integers(0, 30)), st.sampled_from("xy")))
def test_folding_loses_no_name(labels: dict[tuple[str, int], str]) -> None:
    named = {f"{head}.{number}.w": label for (head, number), label in labels.items()}
    back = {}
    for name, label in folded(named):
        head, numbers, tail = name.split(".")
        for run in numbers.split(","):
            first, _, last = run.partition("-")
            for number in range(int(first), int(last or first) + 1):
                back[f"{head}.{number}.{tail}"] = label
    assert back == named


def test_names_without_a_number_stay() -> None:
    assert folded({"norm.weight": "float32", "b.c": "int8"}) == [("norm.weight", "float32"), ("b.c", "int8")]
