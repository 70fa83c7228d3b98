"""Exporting: what is in a package, that it is whole or not there, and that bad input leaves nothing behind."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from vlmport.cli.main import main
from vlmport.export import build
from vlmport.export.build import export_checkpoint
from vlmport.export.output import whole_folder
from vlmport.quant.recipe import Recipe, Rule, WeightFormat, load_recipe
from vlmport.runtime.errors import CheckpointError, PackageError, RecipeError, VlmportError
from vlmport.runtime.package import MANIFEST_NAME, Package

GOLDEN = Path(__file__).parent / "goldens" / "qwen2_5_vl" / "tiny_a"
FP32 = [load_recipe("fp32")]
VLMPORT = [sys.executable, "-c", "import sys; from vlmport.cli.main import main; sys.exit(main())"]


def checkpoint_copy(folder: Path) -> Path:
    shutil.copytree(GOLDEN, folder, ignore=shutil.ignore_patterns("inputs", "expected*"))
    return folder


def folder_state(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# What a package holds


def test_package_opens_and_its_hashes_hold(package_tiny_a: Path) -> None:
    package = Package.open(package_tiny_a)
    package.verify()
    manifest = package.manifest
    assert manifest.roles == ("vision_encoder", "projector", "embed_tokens", "decoder")
    assert list(manifest.variants) == ["fp32", "int8", "int4"]
    assert manifest.source.dtype == "float32"
    stored = load_file(GOLDEN / "model.safetensors")
    assert manifest.source.num_parameters == sum(values.size for values in stored.values())


def test_documents_are_the_checkpoints_own(package_tiny_a: Path) -> None:
    for name in ("tokenizer.json", "config.json", "generation_config.json", "preprocessor_config.json"):
        assert (package_tiny_a / name).read_bytes() == (GOLDEN / name).read_bytes()
    template = json.loads((GOLDEN / "chat_template.json").read_text())["chat_template"]
    assert (package_tiny_a / "chat_template.jinja").read_text(encoding="utf-8") == template


def test_nothing_in_a_package_names_the_machine_it_was_made_on(package_tiny_a: Path) -> None:
    for file in package_tiny_a.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert str(Path.home()).encode() not in content, file
            assert str(Path(__file__).parent).encode() not in content, file


def test_variants_share_files_of_equal_precision(package_tiny_a: Path) -> None:
    variants = Package.open(package_tiny_a).manifest.variants
    for role in ("vision_encoder", "projector", "embed_tokens"):
        assert variants["int4"].graphs[role] == variants["int8"].graphs[role]
    assert variants["int4"].graphs["decoder"] != variants["int8"].graphs["decoder"]


def test_float32_weights_are_the_checkpoints_bytes(package_tiny_a: Path) -> None:
    stored = load_file(GOLDEN / "model.safetensors")
    model = onnx.load(str(package_tiny_a / "onnx" / "decoder.onnx"))
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    np.testing.assert_array_equal(weights["layers.1.mlp.up_proj.weight"], stored["model.layers.1.mlp.up_proj.weight"])
    np.testing.assert_array_equal(weights["lm_head.weight"], stored["lm_head.weight"])


def test_every_graph_passes_the_checker_and_keeps_data_in_one_plain_file(package_tiny_a: Path) -> None:
    for file in sorted((package_tiny_a / "onnx").glob("*.onnx")):
        onnx.checker.check_model(str(file))
        model = onnx.load(str(file), load_external_data=False)
        assert model.opset_import[0].version >= 23
        places = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
        assert places == {f"{file.name}_data"}


def test_export_is_the_same_to_the_byte_every_time(package_tiny_b: Path, tmp_path: Path) -> None:
    golden = GOLDEN.parent / "tiny_b"
    again = export_checkpoint(golden, tmp_path / "again", [load_recipe(name) for name in ("fp32", "int8", "int4")])
    first = Package.open(package_tiny_b)
    assert again.manifest == first.manifest


def test_a_checkpoint_saved_again_by_transformers_gives_the_same_graphs(tmp_path: Path, package_tiny_a: Path) -> None:
    """What a fine-tune saves: nested config, other dtype field, names as transformers 5 writes them, two shards."""
    transformers = pytest.importorskip("transformers")
    folder = checkpoint_copy(tmp_path / "checkpoint")
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype="float32")
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    model.save_pretrained(folder, max_shard_size="1MB")
    assert "text_config" in json.loads((folder / "config.json").read_text())
    assert len(list(folder.glob("*.safetensors"))) > 1
    package = export_checkpoint(folder, tmp_path / "package", FP32)
    before = Package.open(package_tiny_a).manifest
    assert package.manifest.variants["fp32"] == before.variants["fp32"]
    graphs = {name: entry for name, entry in package.manifest.files.items() if name.startswith("onnx/")}
    assert graphs == {name: before.files[name] for name in graphs}
    for part in ("image", "video", "vision", "prompt", "positions", "cache"):
        assert getattr(package.manifest, part) == getattr(before, part), part


# Whole or not there


def test_an_existing_output_is_left_alone(tmp_path: Path, package_tiny_a: Path) -> None:
    other = tmp_path / "photos"
    other.mkdir()
    (other / "holiday.txt").write_text("keep me")
    for overwrite in (False, True):
        with pytest.raises(PackageError, match="photos: exists and is not a package"):
            export_checkpoint(GOLDEN, other, FP32, overwrite=overwrite)
    with pytest.raises(PackageError, match="--overwrite"):
        export_checkpoint(GOLDEN, package_tiny_a, FP32)
    assert folder_state(tmp_path) == ["photos", "photos/holiday.txt"]


def test_a_failure_half_way_leaves_the_old_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "package"
    export_checkpoint(GOLDEN, output, FP32)
    before = (output / MANIFEST_NAME).read_bytes()

    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(build, "manifest_text", fail)
    with pytest.raises(OSError, match="Input/output"):
        export_checkpoint(GOLDEN, output, FP32, overwrite=True)
    assert (output / MANIFEST_NAME).read_bytes() == before
    assert os.listdir(tmp_path) == ["package"]
    monkeypatch.undo()
    export_checkpoint(GOLDEN, output, [load_recipe("int8")], overwrite=True)
    assert list(Package.open(output).manifest.variants) == ["int8"]
    assert os.listdir(tmp_path) == ["package"]


def test_a_package_that_cannot_be_put_in_its_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "package"
    output.mkdir()
    (output / MANIFEST_NAME).write_text("old")
    rename = Path.rename

    def busy(self: Path, target: Path) -> Path:
        if target == output and self.name != "replaced":
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(OSError, match="busy"), whole_folder(output) as folder:
        (folder / "new").touch()
    assert folder_state(tmp_path) == ["package", f"package/{MANIFEST_NAME}"]


def test_a_package_that_cannot_answer_is_not_put_in_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint_copy(tmp_path / "checkpoint")
    (folder / "tokenizer.json").write_text("{}")
    assert main(["export", str(folder), "-o", str(tmp_path / "package")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("vlmport: error: ")
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_killed_at_any_moment_there_is_no_package_or_a_whole_one(tmp_path: Path) -> None:
    output = tmp_path / "package"
    command = [*VLMPORT, "export", str(GOLDEN), "-o", str(output), "--recipe", "fp32", "int8"]
    started = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    whole = time.monotonic() - started
    shutil.rmtree(output)
    for share in (0.3, 0.75, 0.85, 0.95):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(whole * share)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if output.exists():
            Package.open(output).verify()
            shutil.rmtree(output)
    export_checkpoint(GOLDEN, output, FP32)
    assert os.listdir(tmp_path) == ["package"], "leftovers of killed exports are removed by the next one"


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(VlmportError, match="free") as caught:
        export_checkpoint(GOLDEN, tmp_path / "package", FP32)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_two_recipes_of_one_name(tmp_path: Path) -> None:
    first, second = (Recipe("mine", (Rule("*/*.weight", WeightFormat(bits)),)) for bits in (8, 4))
    with pytest.raises(RecipeError, match="recipe mine: two of this name"):
        export_checkpoint(GOLDEN, tmp_path / "package", [first, second])
    with pytest.raises(RecipeError, match="none is given"):
        export_checkpoint(GOLDEN, tmp_path / "package", [])
    assert os.listdir(tmp_path) == []


# Bad checkpoints leave nothing


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda f: [p.unlink() for p in f.glob("*template*")] + [drop_template(f)], "no chat template"),
        (lambda f: (f / "preprocessor_config.json").unlink(), "preprocessor_config.json: missing"),
        (lambda f: edit_config(f, model_type="banana"), "'banana' is not supported; known ones are"),
        (lambda f: edit_config(f, intermediate_size=96), "config.json implies"),
        (lambda f: edit_config(f, num_hidden_layers=2), "unexpected model.language_model.layers.2"),
        (lambda f: edit_config(f, num_hidden_layers=4), "missing model.language_model.layers.3"),
        (lambda f: edit_config(f, num_attention_heads=3), "attention heads cannot share|sections"),
        (lambda f: edit_config(f, rope_scaling=None), "mrope_section is missing"),
        (lambda f: edit_config(f, use_sliding_window=True), "use_sliding_window"),
    ],
)
def test_bad_checkpoints(tmp_path: Path, break_it, told: str) -> None:
    folder = checkpoint_copy(tmp_path / "checkpoint")
    break_it(folder)
    with pytest.raises(VlmportError, match=told) as caught:
        export_checkpoint(folder, tmp_path / "package", FP32)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["checkpoint"]


def edit_config(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def drop_template(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text())
    del content["chat_template"]
    file.write_text(json.dumps(content))


def test_tensors_changed_after_the_header_was_read(tmp_path: Path) -> None:
    folder = checkpoint_copy(tmp_path / "checkpoint")
    file = folder / "model.safetensors"
    size = file.stat().st_size

    def cut(done: int, total: int, what: str) -> None:
        if total:
            os.truncate(file, size // 2)

    with pytest.raises(CheckpointError, match=r"model.safetensors: ends inside"):
        export_checkpoint(folder, tmp_path / "package", FP32, progress=cut)
    assert os.listdir(tmp_path) == ["checkpoint"]
