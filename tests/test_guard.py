"""float16 that cannot overflow: planted values beyond its range stay float32, and a clean model keeps nothing there.

What is planted changes nothing in float32: a power of two from one linear into the next. Graphs are run as a GPU would
compute them (half_on_cpu.py).
"""

import base64
import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from golden_cases import GOLDENS, keep_cases
from half_on_cpu import package_on_cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from record_cuda_kernels import overflow
from safetensors.torch import load_file, save_file
from test_families import ROLES, lowered

from vlmport.cli.main import main
from vlmport.export.build import export_checkpoint
from vlmport.export.feeds import CalibrationOptions
from vlmport.export.placement import predict
from vlmport.quant.guard import LARGEST, Guard
from vlmport.quant.ranges import Ranges, module_of, value_ranges
from vlmport.quant.recipe import RangeGuard, load_recipe, with_guard
from vlmport.quant.rewrite import rewrite
from vlmport.quant.typed import typed
from vlmport.runtime.errors import RecipeError
from vlmport.runtime.package import Package
from vlmport.runtime.placement import CUDA, SHAPES, UNKNOWN

TINY = GOLDENS / "tiny_a"
FACTOR = 2.0**16
PLANTED = {
    "visual.blocks.3.mlp.up_proj": FACTOR,
    "visual.blocks.3.mlp.down_proj": 1 / FACTOR,
    "model.layers.1.mlp.up_proj": FACTOR,
    "model.layers.1.mlp.down_proj": 1 / FACTOR,
    "model.layers.2.self_attn.v_proj": FACTOR,  # attention with a cache has no float32 kernel
    "model.layers.2.self_attn.o_proj": 1 / FACTOR,
}
CACHE = "past_value.2"  # not that of the golden checkpoint


def planted(folder: Path, factors: dict[str, float]) -> Path:
    """tiny_a with some linears multiplied; the bias of one that is made smaller stays, for it is added behind."""
    shutil.copytree(TINY, folder)
    weights = load_file(folder / "model.safetensors")
    for name, factor in factors.items():
        weights[f"{name}.weight"] *= factor
        if f"{name}.bias" in weights and factor > 1:
            weights[f"{name}.bias"] *= factor
    save_file(weights, folder / "model.safetensors")
    return folder


def judged(package: Package, variant: str, tmp_path: Path) -> dict[str, str | None]:
    """Outcome by stage of a variant, against a golden case of the checkpoint that nothing was planted in."""
    report = tmp_path / variant
    golden = keep_cases(Path(shutil.copytree(TINY, report / "golden")), "image_exact")
    command = ["validate", str(package.path), "--golden", str(golden), "--variant", variant, "--report", str(report)]
    status = main(command)
    (found,) = json.loads((report / "report.json").read_text())["variants"]
    assert (status == 0) == (found["outcome"] == "PASS")
    return {row["stage"]: row["outcome"] for row in found["rows"]}


@pytest.fixture(scope="module")
def overflowing(calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    """A planted checkpoint in float16 without a guard and with one, and in 4 bits with one."""
    folder = tmp_path_factory.mktemp("overflow")
    recipes = (load_recipe("fp16"), *(with_guard(load_recipe(name)) for name in ("fp16", "int4")))
    checkpoint, options = planted(folder / "checkpoint", PLANTED), CalibrationOptions(calibration, num_samples=2)
    return export_checkpoint(checkpoint, folder / "package", recipes, target="cuda", calibration=options)


def test_a_planted_overflow_stays_float32(overflowing: Package, tmp_path: Path) -> None:
    """Unguarded no case has an answer; guarded all gates of fp16 hold, as they do where nothing is planted."""
    on_cpu = package_on_cpu(overflowing, tmp_path / "cpu")
    assert "FAIL" in judged(on_cpu, "fp16", tmp_path).values()
    outcomes = judged(on_cpu, "fp16_guarded", tmp_path)
    assert outcomes.pop(CACHE) == "FAIL", "the cache is read in the values of the planted checkpoint"
    assert set(outcomes.values()) <= {"PASS", "reported", None}
    assert outcomes["generated_ids"] == outcomes["step_logits"] == "PASS"


@pytest.mark.parametrize("name", ["fp16_guarded", "int4_guarded"])
def test_what_stayed_float32_is_in_the_manifest(overflowing: Package, name: str) -> None:
    variant = overflowing.manifest.variants[name]
    assert variant.calibration is not None
    record = variant.ranges
    assert record is not None
    assert record.limit == LARGEST / 4
    kept = ["vision_encoder/blocks.3.mlp", "decoder/layers.1.mlp"]
    wanted = {f"{block}.{part}_proj.weight" for block in kept for part in ("down", "up")}
    wanted |= {f"decoder/layers.2.self_attn.{part}_proj.weight" for part in "vo"}
    assert set(record.float32) == wanted
    assert {f"{block}.up_proj output" for block in kept} < set(record.exceeded)
    assert all(size > record.limit for size in record.exceeded.values())
    assert record.num_operators < 18, "the operators that need it, and no more"
    for role in ("vision_encoder", "decoder"):
        formats = variant.graphs[role].formats
        assert variant.graphs[role].precision == name
        single = {f"{role}/{parameter}" for parameter, format in formats.items() if format == "float32"}
        assert single == ({kept for kept in wanted if kept.startswith(role)} if name == "fp16_guarded" else set())
    assert variant.graphs["projector"].precision == name.removesuffix("_guarded").replace("int4", "int8")


def test_inspect_tells_what_stayed_float32(overflowing: Package, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(overflowing.path)]) == 0
    said = capsys.readouterr().out
    assert "vision_encoder/blocks.3.mlp.up_proj output" in said
    assert main(["inspect", "--json", str(overflowing.path)]) == 0
    found = json.loads(capsys.readouterr().out)["variants"]
    assert found["fp16_guarded"]["ranges"]["num_operators"] > 0
    assert found["fp16"].get("ranges") is None


def test_a_clean_model_keeps_nothing_and_shares_all_files(tmp_path: Path, calibration: Path) -> None:
    arguments = ["export", str(TINY), "-o", str(tmp_path / "p"), "--recipe", "fp16", "--target", "cuda"]
    assert main([*arguments, "--calibration", str(calibration), "--calibration-samples", "2"]) == 0
    package = Package.open(tmp_path / "p")
    assert list(package.manifest.variants) == ["fp16_guarded"]
    record = package.manifest.variants["fp16_guarded"].ranges
    assert record is not None
    assert (record.exceeded, record.float32, record.num_operators) == ({}, (), 0)
    graphs = package.manifest.variants["fp16_guarded"].graphs
    assert {graph.precision for graph in graphs.values()} == {"fp16"}, "bytes of fp16, so its name"


def test_the_cache_tells_what_it_is_divided_by(overflowing: Package) -> None:
    decoder = overflowing.manifest.variants["fp16_guarded"].graphs["decoder"]
    noted = ir.load(overflowing.path / "onnx" / decoder.graph).metadata_props["past_key_values.2.value.scale"]
    (factor,) = np.frombuffer(base64.b64decode(noted), np.float32)
    assert factor > 1
    assert np.log2(factor) % 1 == 0


@pytest.mark.parametrize(("family", "role"), ROLES)
def test_every_float16_value_of_every_family_is_bounded(family: str, role: str) -> None:
    """By what is seen of modules, inputs and parameters; and no operator makes much of ones."""
    model = lowered(family, role, "cuda").clone()
    ranges = seen_as_ones(model)
    assert Guard(RangeGuard()).widen(model, role, ranges) is None
    sizes = value_ranges(model.graph, ranges)
    halves = [value for node in model.graph for value in node.outputs if value.dtype == ir.DataType.FLOAT16]
    assert halves
    assert max(sizes[value] for value in halves) < 20
    if role != "embed_tokens":
        with pytest.raises(RecipeError, match=f"{role}: no sample of the calibration data goes through"):
            Guard(RangeGuard()).widen(lowered(family, role, "cuda").clone(), role, None)


@pytest.mark.parametrize(("family", "role"), [("qwen2_5_vl", "decoder")])
def test_what_stays_float32_has_kernels_on_cuda(family: str, role: str) -> None:
    """Everything that can be put into float32 at once, in floats and in codes."""
    for recipe in ("fp16", "int4"):
        model = lowered(family, role, "cuda").clone()
        rewrite(model, role, load_recipe(recipe), "cuda", overflow(model, role))
        placed = predict(typed(model)).nodes
        assert {node.provider for node in placed if node.reason != SHAPES} == {CUDA}
        assert not [node for node in placed if node.reason == UNKNOWN]


def seen_as_ones(model: ir.Model) -> Ranges:
    ranges = Ranges(
        {str(value.name): 1.0 for value in model.graph.inputs}, dict.fromkeys(model.graph.initializers, 1.0)
    )
    for node in model.graph:
        if (name := module_of(node)) is not None:
            ranges.reads[name] = ranges.writes[name] = 1.0
    return ranges


@given(st.floats(1, 1024))
@settings(max_examples=10)
def test_a_margin_moves_the_limit(margin: float) -> None:
    assert Guard(RangeGuard(margin)).record().limit == LARGEST / margin


@pytest.mark.parametrize("margin", [0.5, float("nan"), 1e9])
def test_margins_that_mean_nothing_are_refused(margin: float) -> None:
    with pytest.raises(RecipeError, match="margin"):
        RangeGuard(margin)


def test_on_a_target_of_float32_there_is_nothing_to_watch(
    tmp_path: Path, calibration: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", str(TINY), "-o", str(tmp_path / "p"), "--recipe", "fp16", "--calibration", str(calibration)]
    assert main(arguments) == 2
    assert "the cpu target computes in float32" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()
