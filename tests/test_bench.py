"""`vlmport bench`: figures that make sense, written where a program finds them."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmport.cli.bench import Spread, measure
from vlmport.cli.main import main


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_json_is_printed_and_written(package_tiny_a: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--variant", "int4", "--repeats", "2", "--max-new-tokens", "5", "--json"]
    assert main(["bench", str(package_tiny_a), *arguments]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((here / "build" / "bench.json").read_text(encoding="utf-8"))
    assert printed["repeats"] == 2
    assert list(printed["variants"]) == ["int4"]
    speed = printed["variants"]["int4"]
    assert speed["num_generated_tokens"] == 5
    assert speed["num_prompt_tokens"] > 12 * 16  # a 448 x 336 image alone has that many
    assert speed["load"] > 0
    assert speed["peak_memory"] > 20_000_000  # numpy and ONNX Runtime alone
    assert speed["time_to_first_token"]["median"] > speed["vision"]["median"] > 0
    for name in ("vision", "time_to_first_token", "prefill_speed", "decode_speed"):
        assert 0 < speed[name]["low"] <= speed[name]["median"] <= speed[name]["high"]


def test_all_variants_and_a_table_by_default(
    package_tiny_a: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = Path(__file__).parent / "goldens" / "qwen2_5_vl" / "tiny_a" / "inputs" / "small_90x30.png"
    options = ["--repeats", "1", "--max-new-tokens", "2", "--image", str(image)]
    assert main(["bench", str(package_tiny_a), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["variant", "fp32", "int8", "int4"]
    assert lines[4].startswith("90 x 30 image, ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--variant", "int3"], "no variant 'int3'"),
        (["--repeats", "0"], "--repeats 0"),
        (["--max-new-tokens", "1"], "--max-new-tokens 1"),
        (["--image", "nowhere.png"], "nowhere.png"),
    ],
)
def test_mistakes(
    package_tiny_a: Path, here: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["bench", str(package_tiny_a), *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (here / "build").exists()


def test_figures_are_printed_even_where_they_cannot_be_kept(
    package_tiny_a: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "build").touch()  # a file, where a folder is to be made
    options = ["--variant", "int4", "--repeats", "1", "--max-new-tokens", "2"]
    assert main(["bench", str(package_tiny_a), *options]) == 2
    captured = capsys.readouterr()
    assert "int4" in captured.out
    assert captured.err == "vlmport: error: build: File exists\n"


@given(st.lists(st.floats(0, 1e9), min_size=1))
def test_spread_holds_all_values(values: list[float]) -> None:
    spread = Spread.of(values)
    assert spread.low == min(values)
    assert spread.high == max(values)
    assert spread.low <= spread.median <= spread.high
    assert sum(value < spread.median for value in values) <= len(values) / 2


def test_module_is_what_other_processes_can_import() -> None:
    """Each variant is measured in a process of its own, which finds the function by its name."""
    assert measure.__module__ == "vlmport.cli.bench"
