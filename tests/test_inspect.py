"""`vlmport inspect`: tells all that the manifest knows, loads nothing, folds layers that are alike."""

import json
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


def write_report(package: Path, manifest_sha256: str) -> None:
    (package / "parity").mkdir()
    report = {
        "schema": "vlmport-report/2",
        "mode": "reference",
        "package": {"manifest_sha256": manifest_sha256},
        "variants": [{"name": "int4", "outcome": "FAIL", "rows": []}],
    }
    (package / "parity" / "report.json").write_text(json.dumps(report), encoding="utf-8")


def parities(package: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    assert main(["inspect", str(package), "--json"]) == 0
    return {name: variant["parity"] for name, variant in json.loads(capsys.readouterr().out)["variants"].items()}


def test_last_parity_is_told(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_report(package, file_entry(package / "vlmport.json").sha256)
    assert parities(package, capsys) == {"fp32": "not validated", "int4": "FAIL (reference)"}


def test_parity_of_other_bytes_is_no_evidence(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_report(package, "0" * 64)
    assert parities(package, capsys) == {"fp32": "not validated", "int4": "out of date"}


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
