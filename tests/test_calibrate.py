"""Calibration from samples to a package: folds are exact, methods run on every role, and what is wrong is told."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_cases import GOLDENS

from vlmport.cli.main import main
from vlmport.export.calibrate import package_calibrator, read_rows
from vlmport.export.family import family_of, roles_of
from vlmport.export.feeds import CalibrationOptions
from vlmport.export.shelf import Shelf, Space
from vlmport.export.stages import RoleStages
from vlmport.quant.apply import open_float_graph, quantize_package
from vlmport.quant.recipe import Recipe, Rule, WeightFormat, load_recipe
from vlmport.runtime import load
from vlmport.runtime.errors import CapacityError
from vlmport.runtime.package import Package
from vlmport.validate.samples import draw_picture

TINY = GOLDENS / "tiny_a"


@pytest.fixture
def package(package_tiny_a: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(package_tiny_a, tmp_path / "package"))


def logits(package: Path, variant: str) -> np.ndarray:
    model = load(package, variant=variant)
    picture = {"type": "image", "image": draw_picture(9, 84, 84)}
    prepared = model.prepare([{"role": "user", "content": [picture, {"type": "text", "text": "And this?"}]}])
    visual = model.features(prepared)
    assert visual is not None
    embeds = model.embed(prepared, visual.features)
    cache = model.new_cache(len(embeds) + 1)
    return model.prefill(prepared.seen(embeds), prepared.seen_positions, cache, all_logits=True)


@pytest.mark.parametrize("method", ["awq", "gptq", "awq+gptq"])
def test_every_role_can_be_calibrated(method: str, package: Path, calibration: Path) -> None:
    """With 8 bits in all roles the answer is nearly that of float32."""
    rules = (
        Rule("embed_tokens/*.weight", WeightFormat(8)),
        Rule("decoder/lm_head.weight", WeightFormat(8, method=method)),
        Rule("decoder/*.weight", WeightFormat(8, block_size=64, method=method)),
        Rule("*/*.weight", WeightFormat(8, symmetric=True, method=method)),
    )
    recipe = Recipe("mine", rules)
    calibrator = package_calibrator(Package.open(package), CalibrationOptions(calibration))
    after = quantize_package(package, recipe, calibrate=calibrator)
    record = after.manifest.variants["mine"].calibration
    assert record is not None
    assert (record.num_samples, record.name) == (4, calibration.name)
    assert set(after.manifest.variants["mine"].graphs["decoder"].formats.values()) == {"int8"}
    expected, found = logits(package, "fp32"), logits(package, "mine")
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
    assert not [path.name for path in package.rglob(".calibration*")]


def test_equal_data_give_equal_bytes(package: Path, calibration: Path, tmp_path: Path) -> None:
    """Also where activations wait on disk, not in memory."""
    other = Path(shutil.copytree(package, tmp_path / "other"))
    arguments = ["quantize", str(package), "--recipe", "int4", "--method", "awq+gptq", "--block-size", "64"]
    arguments += ["--calibration-samples", "2", "--calibration-weights", "image=0.25,answer=2"]
    assert main([*arguments, "--calibration", str(calibration)]) == 0
    options = CalibrationOptions(calibration, num_samples=2, image_weight=0.25, answer_weight=2.0, memory=0)
    recipe = load_recipe("int4", block_size=64, method="awq+gptq")
    quantize_package(other, recipe, calibrate=package_calibrator(Package.open(other), options))
    one, two = (Package.open(folder).manifest for folder in (package, other))
    assert one == two
    record = one.variants["int4_b64_awq-gptq"].calibration
    assert record is not None
    assert (record.image_weight, record.text_weight, record.answer_weight) == (0.25, 1.0, 2.0)
    assert one.variants["int4_b64_awq-gptq"].graphs["vision_encoder"].precision == "int8", "shared, as nothing changed"


def test_blocks_run_as_the_whole_role_does(package_tiny_a: Path) -> None:
    """A role run block by block gives what its forward gives; only the block at work has values."""
    documents = {file.name: json.loads(file.read_text()) for file in package_tiny_a.glob("*.json")}
    config = documents["config.json"]
    spec = roles_of(family_of(config, package_tiny_a), config, documents)["vision_encoder"]
    model, source = open_float_graph(Package.open(package_tiny_a), "vision_encoder")
    with torch.device("meta"):
        module = spec.build().eval()
    arrays = [torch.from_numpy(array) for array in feeds_of_tower().values()]
    stages = RoleStages(module, lambda *rows: read_rows(model.graph, source, *rows), {0: arrays}, [torch.ones(16)], {})
    names = []
    for stage in stages.stages(to_the_end=True):
        loaded = [name for name, values in module.named_parameters() if values.device.type != "meta"]
        assert {name.split(".")[1] for name in loaded if name.startswith("blocks.")} <= {str(len(names) - 1)}
        names.append(sorted(stage.linears)[:1])
    assert names[:2] == [["patch_embed.proj.weight"], ["blocks.0.attn.proj.weight"]]
    whole = spec.build().eval()
    with torch.no_grad():
        for name, values in whole.named_parameters():
            values.copy_(torch.from_numpy(read_rows(model.graph, source, name, 0, len(values))))
        torch.testing.assert_close(stages.run(0), whole(*arrays))


def test_memory_of_what_waits_is_bounded(tmp_path: Path) -> None:
    """What goes beyond it waits in files, and comes back as it was; parts of tensors keep no more than themselves."""
    space = Space(3 * 4096)
    shelves = [Shelf(tmp_path / name, space) for name in ("first", "second")]
    values = [(torch.full((2, 512), float(number)), {"more": [torch.arange(2.0)[:0]]}, 7) for number in range(8)]
    for number, value in enumerate(values):
        shelves[number % 2][number] = value
        assert space.left >= 0
        assert len(list(tmp_path.rglob("?"))) == max(0, number - 2)
    shelves[0][0] = (torch.ones(4096)[:8],)
    assert shelves[0][0][0].untyped_storage().nbytes() == 32
    for number, value in list(enumerate(values))[1:]:
        found = shelves[number % 2][number]
        torch.testing.assert_close(found, value, rtol=0, atol=0)
    for shelf in shelves:
        shelf.clear()
    assert space.left == 3 * 4096
    assert not list(tmp_path.rglob("?"))
    (tmp_path / "first" / "9").symlink_to("/dev/full")
    with pytest.raises(CapacityError, match="9: cannot write 4096 bytes: No space left on device; make room"):
        Shelf(tmp_path / "first", Space(0))[9] = torch.ones(1024)


def feeds_of_tower() -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    return {
        "pixel_values": random.standard_normal((16, 1176)).astype(np.float32),
        "patch_positions": np.stack(np.meshgrid(range(4), range(4), indexing="ij"), -1).reshape(-1, 2),
        "cu_seqlens": np.array([0, 16], np.int32),
        "window_index": np.arange(4),
        "cu_window_seqlens": np.array([0, 16], np.int32),
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "samples.jsonl: missing; give a folder with a samples.jsonl"),
        ("\n", "samples.jsonl: is empty; it needs at least one sample"),
        ("{", "samples.jsonl: line 1: "),
        ('{"id": "1"}', "line 1: $: field 'messages' is missing"),
        ('{"id": "1", "messages": [], "answer": "x"}', "line 1: $: unknown field 'answer'"),
        ('{"id": "1", "messages": [{"role": "user", "content": "Hi"}]}', "no sample has an image"),
        (
            '{"id": "1", "messages": [{"role": "user", "content": [{"type": "image", "image": "no.png"}]}]}',
            "no.png is missing; put the file there",
        ),
        (
            '{"id": "1", "messages": [{"role": "user", "content": [{"type": "image", "image": "../no.png"}]}]}',
            "is outside the folder; put the file into it",
        ),
        (
            '{"id": "1", "messages": [{"role": "user", "content": [{"type": "image", "image": "https://a/b.png"}]}]}',
            "is an address on a network",
        ),
    ],
)
def test_bad_samples_are_told_in_one_line(
    text: str | None, words: str, package_tiny_a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "samples.jsonl").write_text(text)
    arguments = [
        "quantize",
        str(package_tiny_a),
        "--recipe",
        "int4",
        "--method",
        "gptq",
        "--calibration",
        str(tmp_path),
    ]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "gptq"], "recipe int4_gptq: its method or cache looks at activations; give --calibration DIR"),
        (["--method", "hqq", "--calibration", "x"], "no method of int4_hqq looks at data; leave it out"),
        (["--calibration-seed", "3"], "--calibration-seed 3: goes with --calibration DIR"),
        (["--calibration-weights", "image=1"], "--calibration-weights image=1: goes with --calibration DIR"),
        (["--calibration", "x", "--calibration-weights", "picture=1"], "'picture': parts are image, text, answer"),
        (["--calibration", "x", "--calibration-weights", "image=1,image=2"], "'image': parts are"),
        (["--calibration", "x", "--calibration-weights", "image"], "'image': give a number of 0 or more, as image=0.5"),
        (["--calibration", "x", "--calibration-weights", "text=-1"], "'text=-1': give a number"),
        (["--calibration", "x", "--calibration-weights", "image=0,text=0,answer=0"], "nothing counts; give"),
        (["--method", "best"], "method 'best' is unknown; known methods are rtn, hqq, awq, gptq, awq+gptq"),
    ],
)
def test_options_that_do_not_go_together(
    arguments: list[str], words: str, package_tiny_a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(package_tiny_a), "--recipe", "int4", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert main(["export", str(TINY), "-o", str(tmp_path / "new"), "--recipe", "int4", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_export_and_quantize_give_equal_bytes(package: Path, calibration: Path, tmp_path: Path) -> None:
    arguments = ["--recipe", "int4", "--method", "awq+gptq", "--calibration", str(calibration)]
    assert main(["export", str(TINY), "-o", str(tmp_path / "new"), *arguments]) == 0
    assert main(["quantize", str(package), *arguments]) == 0
    one, two = (Package.open(folder).manifest for folder in (tmp_path / "new", package))
    assert one.variants["int4_awq-gptq"].calibration == two.variants["int4_awq-gptq"].calibration
    data = "onnx/decoder_int4_awq-gptq.onnx_data"
    assert one.files[data].size == two.files[data].size
    left, right = (logits(folder, "int4_awq-gptq") for folder in (tmp_path / "new", package))
    np.testing.assert_allclose(left, right, atol=1e-3)
