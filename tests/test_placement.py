"""Where nodes run: told by ONNX Runtime of the cpu target, predicted of the cuda target."""

import json
import sys
from pathlib import Path

import onnx_ir as ir
import pytest
from test_families import ROLES, lowered, role_of

from vlmport.cli.main import main
from vlmport.export.build import export_checkpoint
from vlmport.export.lower import lower
from vlmport.export.placement import predict
from vlmport.export.trace import trace
from vlmport.quant.recipe import load_recipe
from vlmport.quant.rewrite import rewrite
from vlmport.quant.typed import typed
from vlmport.runtime.placement import CPU, CUDA, NO_KERNEL, SHAPES, UNKNOWN

GOLDEN = Path(__file__).parent / "goldens" / "qwen2_5_vl" / "tiny_a"
DECODERS = [name for name, role in ROLES if role == "decoder"]


@pytest.fixture(scope="module")
def cuda_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipes = [load_recipe("fp16"), load_recipe("int4")]
    return export_checkpoint(GOLDEN, tmp_path_factory.mktemp("cuda") / "package", recipes, target="cuda").path


def told(package: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict:
    assert main(["inspect", str(package), "--placement", "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def operators(graph: dict, provider: str) -> dict[str, int]:
    return {group["operator"]: group["num_nodes"] for group in graph["groups"] if group["provider"] == provider}


def test_onnxruntime_tells_of_the_cpu_target(package_tiny_a: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(package_tiny_a, capsys, "--variant", "int4")
    assert not found["is_prediction"]
    assert "onnxruntime" in found["told_by"]
    roles = found["variants"]["int4"]
    assert list(found["variants"]) == ["int4"]
    assert set(roles) == {"vision_encoder", "projector", "embed_tokens", "decoder"}
    layers = json.loads((GOLDEN / "config.json").read_text())["num_hidden_layers"]
    decoder = operators(roles["decoder"], CPU)
    assert decoder["GroupQueryAttention"] == layers
    assert roles["decoder"]["num_nodes"] == {CPU: sum(decoder.values())}
    assert all(group.get("reason") is None for role in roles.values() for group in role["groups"])
    assert "QuickGelu" in operators(roles["vision_encoder"], CPU), "x * sigmoid(x) is fused, and fusions are shown"
    assert operators(roles["vision_encoder"], CPU)["MultiHeadAttention"] == 1, "one node, however often its loop ran"


def test_cuda_is_predicted_and_says_so(cuda_package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(cuda_package, capsys)
    assert found["is_prediction"]
    assert set(found["variants"]) == {"fp16", "int4"}
    decoder = found["variants"]["int4"]["decoder"]
    assert decoder["copies"] == 0
    assert "com.microsoft.MatMulNBits" in operators(decoder, CUDA)
    assert {group["reason"] for group in decoder["groups"] if group["provider"] == CPU} == {SHAPES}
    assert main(["inspect", str(cuda_package), "--placement"]) == 0
    text = capsys.readouterr().out
    assert "PREDICTED" in text
    assert "nothing was run" in text
    assert SHAPES in text


def test_prediction_is_what_onnxruntime_gpu_did(cuda_package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Noted from the node placements in the log of onnxruntime-gpu 1.31.1 for these graphs (it ran nothing)."""
    roles = told(cuda_package, capsys)["variants"]["fp16"]
    assert operators(roles["decoder"], CPU) == {"Squeeze": 1, "Cast": 1, "Sub": 2}
    assert operators(roles["vision_encoder"], CPU) == {"Squeeze": 1}
    assert {role: graph["copies"] for role, graph in roles.items()} == {
        "vision_encoder": 2,
        "projector": 0,
        "embed_tokens": 0,
        "decoder": 0,
    }


def test_without_onnx_the_prediction_names_the_extra(
    cuda_package: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("vlmport.export.placement", "vlmport.quant.typed"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main(["inspect", str(cuda_package), "--placement"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "vlmport[export]" in message
    assert "CUDAExecutionProvider" in message


def test_a_variant_is_for_placement_only(cuda_package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(cuda_package), "--variant", "fp16"]) == 2
    assert "--placement" in capsys.readouterr().err


@pytest.mark.parametrize(("family", "role"), ROLES)
def test_every_node_of_a_cuda_graph_has_a_kernel(family: str, role: str) -> None:
    """Where this fails for a new operator, record anew: python tests/record_cuda_kernels.py tells how."""
    for recipe in ("fp16", "int8", "int4"):
        model = lowered(family, role, "cuda").clone()
        rewrite(model, role, load_recipe(recipe), "cuda")
        found = predict(typed(model))
        elsewhere = [node for node in found.nodes if node.reason not in (None, SHAPES)]
        assert not elsewhere
        assert role != "decoder" or found.copies == 0, "a copy a step, and no CUDA graph"


@pytest.mark.parametrize("family", DECODERS[:1])
def test_float32_attention_falls_to_the_cpu(family: str) -> None:
    """Found by the prediction as by ONNX Runtime, with a copy for every key, value and query."""
    model = trace(role_of(family, "decoder"), "float32")
    lower(model, "cuda")
    found = predict(typed(model))
    fallen = {node.operator for node in found.nodes if node.reason == NO_KERNEL}
    assert fallen == {"com.microsoft.GroupQueryAttention"}
    assert found.copies > 0


def test_an_operator_that_is_not_in_the_table_is_told() -> None:
    x = ir.val("x", ir.DataType.FLOAT16, [2])
    node = ir.node("Hardmax", [x])
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT16)
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 23}, name="one")
    (placed,) = predict(typed(ir.Model(graph, ir_version=10))).nodes
    assert (placed.operator, placed.inputs, placed.reason) == ("Hardmax", ("float16",), UNKNOWN)
