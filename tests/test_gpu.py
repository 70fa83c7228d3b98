"""The cuda target on a CUDA device: `make test-gpu`. Skipped, loudly, where there is none."""

from pathlib import Path

import onnxruntime as ort
import pytest

from vlmport.cli.main import main

GOLDENS = Path(__file__).parent / "goldens" / "qwen2_5_vl"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("CUDAExecutionProvider" not in ort.get_available_providers(), reason="needs onnxruntime-gpu"),
]


@pytest.fixture(scope="module", params=["tiny_a", "tiny_b"])
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(golden folder, package of it for cuda)."""
    folder = GOLDENS / request.param
    package = tmp_path_factory.mktemp("cuda") / folder.name
    command = ["export", str(folder), "-o", str(package), "--target", "cuda", "--recipe", "fp16", "int8", "int4"]
    assert main(command) == 0
    return folder, package


def test_float16_passes_its_gates(golden: tuple[Path, Path], tmp_path: Path) -> None:
    folder, package = golden
    command = ["validate", str(package), "--golden", str(folder), "--variant", "fp16", "--report", str(tmp_path)]
    assert main(command) == 0


@pytest.mark.parametrize("variant", ["int8", "int4"])
def test_quantized_variants_answer(golden: tuple[Path, Path], variant: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder, package = golden
    image = next((folder / "inputs").glob("*.png"))
    command = ["run", str(package), "What is this?", "--image", str(image), "--variant", variant, "--json"]
    assert main([*command, "--max-new-tokens", "8"]) == 0
    assert '"token_ids"' in capsys.readouterr().out
