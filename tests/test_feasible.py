"""Requests that cannot be met: one line, status 2, and the package as it was. None begins to calibrate."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from golden_cases import GOLDENS

from vlmport.cli.main import main
from vlmport.export import calibrate
from vlmport.quant.recipe import METHODS

TINY = GOLDENS / "tiny_a"
DATA = ["--calibration", "DATA"]
MIXED = ["--recipe", "int4-mixed", "--max-size", "1MB"]
LARGER = r"block_size (64|128|256) is larger than its rows of \d+ values; use (32|64) at most"
QUANTIZE = [
    *(
        (
            [
                "--recipe",
                recipe,
                "--block-size",
                "256",
                "--method",
                method,
                *DATA * (method in ("awq", "gptq", "awq+gptq")),
            ],
            LARGER,
        )
        for recipe in ("int8", "int4")
        for method in METHODS
    ),
    (["--recipe", "int4", "--block-size", "48"], "block size 48: use one of 16, 32"),
    (["--recipe", "int2", "--block-size", "256"], "int2_b256"),
    (["--recipe", "int2", "--block-size", "128"], LARGER),
    ([*MIXED, "--block-size", "256", *DATA], LARGER),
    ([*MIXED], "int4-mixed: bits are chosen by what answers lose; give --calibration DIR"),
    ([*MIXED, "--kv-cache", "int8", *DATA], "--kv-cache int8"),
    (["--recipe", "int4-mixed", *DATA], "give one of --max-size and --max-kl"),
    (["--recipe", "int4-mixed", "--max-kl", "-1", *DATA], "--max-kl -1"),
    *(
        (["--recipe", name, "--method", "awq", *DATA], "no codes that a method finds")
        for name in ("nf4", "fp16", "fp32")
    ),
    (["--recipe", "int8-dynamic", "--method", "gptq"], "int8-dynamic has no codes that a method finds"),
    (["--recipe", "nf4", "--method", "hqq"], "nf4 has no codes that a method finds"),
    (["--recipe", "int4", "--kv-cache", "int8"], "its method or cache looks at activations; give --calibration DIR"),
    (["--recipe", "int4", "--method", "gptq"], "give --calibration DIR"),
    (["--recipe", "fp16", *DATA], "the cpu target computes in float32"),
    (["--recipe", "int4", *DATA], "no method of int4 looks at data"),
    *(
        ([*request, "--calibration", folder], words)
        for request in (["--recipe", "int4", "--method", "awq"], ["--recipe", "fp32", "--kv-cache", "int8"], MIXED)
        for folder, words in (
            ("EMPTY", "samples.jsonl"),
            ("MISSING", "samples.jsonl"),
            ("NONE", "no samples|is empty|at least"),
        )
    ),
    (["--recipe", "int4", "--method", "awq", *DATA, "--calibration-samples", "0"], "--calibration-samples 0"),
]
FORMATS = [
    ({"bits": 3}, "bits 3: use 32, 16, 8, 4 or 2"),
    ({"bits": 1}, "bits 1: use"),
    ({"bits": 4, "block_size": 512}, "block_size 512: use one of"),
    ({"bits": 2, "block_size": 16}, "block_size 16 with bits 2.*no kernel"),
    ({"bits": 8, "accuracy_level": 0}, "accuracy_level 0 with bits 8: use 4; ONNX Runtime has no kernel"),
    ({"bits": 16, "method": "awq"}, "bits 16 is a float and has no"),
    ({"bits": 4, "values": "nf4", "method": "gptq"}, "values nf4: takes bits 4 and a block_size"),
    ({"bits": 4, "activations": "int8-dynamic"}, "activations int8-dynamic with bits 4"),
]


def content(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


@pytest.fixture
def refused(
    package_tiny_a: Path,
    calibration: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[list[str]], str]:
    """Runs `quantize`, which has to refuse; gives its one line."""
    folders = {
        "DATA": calibration,
        "EMPTY": tmp_path / "empty",
        "MISSING": tmp_path / "missing",
        "NONE": tmp_path / "none",
    }
    folders["EMPTY"].mkdir()
    folders["NONE"].mkdir()
    (folders["NONE"] / "samples.jsonl").write_text("")

    def never(*_: object) -> None:
        raise AssertionError("calibration has begun")

    monkeypatch.setattr(calibrate, "quantize_stage", never)

    def run(options: list[str]) -> str:
        before = content(package_tiny_a)
        arguments = [str(folders.get(option, option)) for option in options]
        assert main(["quantize", str(package_tiny_a), *arguments]) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert len(said) == 1
        assert content(package_tiny_a) == before
        return said[0]

    return run


@pytest.mark.parametrize(
    ("options", "words"), QUANTIZE, ids=lambda value: "_".join(value) if isinstance(value, list) else ""
)
def test_a_request_is_refused_in_one_line(options: list[str], words: str, refused: Callable[[list[str]], str]) -> None:

    assert re.search(words, said := refused(options)), said


@pytest.mark.parametrize(("format", "words"), FORMATS)
def test_a_format_without_a_kernel_is_refused(
    format: dict[str, object], words: str, refused: Callable[[list[str]], str], tmp_path: Path
) -> None:

    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"name": "mine", "rules": [{"match": "decoder/*.weight", "format": format}]}))
    assert re.search(words, said := refused(["--recipe", str(file)])), said


def test_a_block_may_be_as_long_as_the_rows(package_tiny_a: Path, tmp_path: Path) -> None:
    package = Path(shutil.copytree(package_tiny_a, tmp_path / "package"))
    assert main(["quantize", str(package), "--recipe", "int4", "--block-size", "64"]) == 0


@pytest.mark.parametrize(
    "options", [["--kv-cache", "int8", "--calibration", "DATA"], ["--recipe", "fp16", "--method", "awq"]]
)
def test_export_refuses_before_it_traces(
    options: list[str], tmp_path: Path, calibration: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", str(TINY), "-o", str(tmp_path / "p"), "--target", "cuda", "--recipe", "fp16"]
    assert main([*arguments, *(str(calibration) if option == "DATA" else option for option in options)]) == 2
    said = capsys.readouterr().err
    assert "tracing" not in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())
