"""The cuda target on a CUDA device: `make test-gpu`. Skipped, loudly, where there is none."""

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from half_on_cpu import package_on_cpu
from PIL import Image

from vlmport.cli.main import main
from vlmport.export.cuda_kernels import HOST_INPUTS, HOST_OUTPUTS, KERNELS
from vlmport.runtime import load
from vlmport.runtime.model import Model
from vlmport.runtime.package import Package
from vlmport.runtime.placement import CUDA, SHAPES, measure

GOLDENS = Path(__file__).parent / "goldens" / "qwen2_5_vl"
RECIPES = ("fp16", "int8", "int4")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("CUDAExecutionProvider" not in ort.get_available_providers(), reason="needs onnxruntime-gpu"),
]


@pytest.fixture(scope="module", params=["tiny_a", "tiny_b"])
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(golden folder, package of it for cuda)."""
    folder = GOLDENS / request.param
    package = tmp_path_factory.mktemp("cuda") / folder.name
    command = ["export", str(folder), "-o", str(package), "--target", "cuda", "--recipe", *RECIPES]
    assert main(command) == 0
    return folder, package


@pytest.fixture(scope="module")
def on_cpu(golden: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same package, for the CPU to compute with float16 results."""
    return package_on_cpu(Package.open(golden[1]), tmp_path_factory.mktemp("cpu") / "package").path


def shown(text: str) -> list[dict]:
    picture = Image.fromarray(np.random.default_rng(3).integers(0, 255, (84, 112, 3), dtype=np.uint8))
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]


def answer_logits(model: Model, *, chunk: int | None = None) -> np.ndarray:
    """Logits of every position of a prompt with a picture, in one call or `chunk` tokens a call."""
    prepared = model.prepare(shown("What is this?"))
    seen = model.features(prepared)
    assert seen is not None
    embeds = model.embed(prepared, seen.features)
    cache = model.new_cache(len(embeds) + 8)
    step = chunk or len(embeds)
    return np.concatenate(
        [
            model.prefill(embeds[at : at + step], prepared.position_ids[..., at : at + step], cache, all_logits=True)
            for at in range(0, len(embeds), step)
        ]
    )


def assert_close(want: np.ndarray, have: np.ndarray, share: float) -> None:
    assert np.isfinite(have).all()
    assert np.abs(want - have).max() < share * np.abs(want).max()


def test_float16_passes_its_gates(golden: tuple[Path, Path], tmp_path: Path) -> None:
    folder, package = golden
    command = ["validate", str(package), "--golden", str(folder), "--variant", "fp16", "--report", str(tmp_path)]
    assert main(command) == 0


@pytest.mark.parametrize("variant", RECIPES)
def test_no_computing_node_is_on_the_cpu(golden: tuple[Path, Path], variant: str) -> None:
    placed = measure(Package.open(golden[1]), variant)
    for role in placed.values():
        assert {node.reason for node in role.nodes if node.provider != CUDA} <= {SHAPES}
    assert placed["decoder"].copies == 0


@pytest.mark.parametrize("variant", RECIPES)
def test_gpu_computes_what_the_cpu_does_in_float16(golden: tuple[Path, Path], on_cpu: Path, variant: str) -> None:
    with load(golden[1], variant) as gpu, load(on_cpu, variant) as cpu:
        assert_close(answer_logits(cpu), answer_logits(gpu), 0.03)


def test_prefill_in_one_call_in_chunks_and_by_steps(golden: tuple[Path, Path]) -> None:
    with load(golden[1], "fp16") as model:
        whole = answer_logits(model)
        assert_close(whole, answer_logits(model, chunk=5), 0.02)
        assert_close(whole, answer_logits(model, chunk=1), 0.02)


@pytest.mark.parametrize("variant", RECIPES)
def test_cuda_graph_changes_no_answer(golden: tuple[Path, Path], variant: str) -> None:
    """Several answers after one another, so that graphs are captured, replayed and reused with other prompts."""
    texts = ("What is this?", "And what is that, in a few more words?", "What is this?")
    answers = {}
    for graph in (False, True):
        with load(golden[1], variant, cuda_graph=graph) as model:
            answers[graph] = [
                model.generate(shown(text), max_new_tokens=24, temperature=0, ignore_eos=True).token_ids
                for text in texts
            ]
    assert answers[True][0] == answers[True][2]
    assert answers[True] == answers[False]


@pytest.mark.parametrize("variant", ["int8", "int4"])
def test_quantized_variants_answer(golden: tuple[Path, Path], variant: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder, package = golden
    image = next((folder / "inputs").glob("*.png"))
    command = ["run", str(package), "What is this?", "--image", str(image), "--variant", variant, "--json"]
    assert main([*command, "--max-new-tokens", "8"]) == 0
    assert len(json.loads(capsys.readouterr().out)["token_ids"]) <= 8


def test_table_of_kernels_is_that_of_this_onnxruntime() -> None:
    from record_cuda_kernels import recorded

    assert recorded() == (KERNELS, HOST_INPUTS, HOST_OUTPUTS)
