"""`vlmport quantize`: a variant added in place, with the bytes of an export, or nothing at all."""

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from float_graphs import F16, F32, decoder, embedding, random_source

from vlmport.cli.main import main
from vlmport.quant.apply import quantize_package
from vlmport.quant.recipe import Recipe, Rule, WeightFormat, file_stem, load_recipe, precision_label
from vlmport.quant.rewrite import rewrite
from vlmport.quant.store import write_graph
from vlmport.runtime.errors import CapacityError, PackageError, RecipeError
from vlmport.runtime.manifest import SCHEMA, Manifest, Source, Variant
from vlmport.runtime.package import MANIFEST_NAME, Package, file_entry, manifest_text
from vlmport.runtime.schema import to_json

SHAPES = {"layers.0.weight": (96, 102), "lm_head.weight": (33, 96)}
FLOAT16_KINDS = [("float16", F32), ("float16", F16)]


def float_models(dtype=F32) -> dict:
    return {"embed_tokens": embedding(40, 108, dtype), "decoder": decoder(SHAPES, dtype)}


def sources(dtype: str) -> dict:
    """Weights as a checkpoint of this dtype holds them."""
    found = {role: random_source(model, seed) for seed, (role, model) in enumerate(float_models().items())}
    for source in found.values():
        source.arrays = {name: array.astype(dtype) for name, array in source.arrays.items()}
    return found


def make_package(folder: Path, *recipes: Recipe, dtype: str = "float32", compute=F32) -> Package:
    """A package as an export writes it."""
    (folder / "onnx").mkdir(parents=True)
    variants, files = {}, {}
    for recipe in recipes:
        graphs = {}
        for role, model in float_models(compute).items():
            label = precision_label(recipe, role)
            stored = rewrite(model, role, recipe)
            written = write_graph(model, stored, sources(dtype)[role], folder / "onnx", file_stem(role, label))
            graphs[role] = written.graph_file(label)
            files |= {f"onnx/{name}": entry for name, entry in written.files.items()}
        variants[recipe.name] = Variant(recipe.name, to_json(recipe), graphs)
    source = Source("tiny", "tiny", dtype, 1, {})
    roles = ("embed_tokens", "decoder")
    target = "cpu" if compute == F32 else "cuda"
    manifest = Manifest(SCHEMA, "tiny", target, source, roles, variants, {}, dict(sorted(files.items())))
    (folder / MANIFEST_NAME).write_text(manifest_text(manifest))
    return Package.open(folder)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def recipes(*names: str) -> list[Recipe]:
    return [load_recipe(name) for name in names]


def test_the_bytes_are_those_of_an_export(tmp_path: Path) -> None:
    exported = make_package(tmp_path / "exported", *recipes("fp32", "fp16", "int8", "int4", "int4_b64", "int8-dynamic"))
    make_package(tmp_path / "grown", load_recipe("fp32"))
    for recipe in recipes("fp16", "int8", "int4", "int4_b64", "int8-dynamic"):
        package = quantize_package(tmp_path / "grown", recipe)
    assert package.manifest == exported.manifest
    assert content(tmp_path / "grown") == content(tmp_path / "exported")
    package.verify()


@pytest.mark.parametrize(("dtype", "compute"), FLOAT16_KINDS)
def test_float16_weights_of_a_float16_checkpoint_are_as_good(dtype: str, compute, tmp_path: Path) -> None:
    names = ("fp16", "int8", "int4") if compute == F16 else ("fp16", "fp32", "int8", "int4")
    exported = make_package(tmp_path / "exported", *recipes(*names), dtype=dtype, compute=compute)
    make_package(tmp_path / "grown", load_recipe("fp16"), dtype=dtype, compute=compute)
    for recipe in recipes(*names[1:]):
        quantize_package(tmp_path / "grown", recipe)
    assert content(exported.path) == content(tmp_path / "grown")


def test_variants_share_files(tmp_path: Path) -> None:
    make_package(tmp_path / "p", *recipes("fp32", "int8"))
    before = content(tmp_path / "p")
    inode = (tmp_path / "p" / "onnx" / "embed_tokens_int8.onnx_data").stat().st_ino
    manifest = quantize_package(tmp_path / "p", load_recipe("int4")).manifest
    assert (tmp_path / "p" / "onnx" / "embed_tokens_int8.onnx_data").stat().st_ino == inode, "it was written again"
    assert manifest.variants["int4"].graphs["embed_tokens"] == manifest.variants["int8"].graphs["embed_tokens"]
    assert set(content(tmp_path / "p")) - set(before) == {"onnx/decoder_int4.onnx", "onnx/decoder_int4.onnx_data"}


@pytest.mark.parametrize("rules", [[{"match": "*/*.weight", "format": {"bits": 4}}], [{"match": "*", "new": 1}], None])
def test_a_label_that_meant_something_else_is_refused(rules: list[dict[str, Any]] | None, tmp_path: Path) -> None:
    """Builtin rules change between versions: files of the older ones are not taken for those of the newer."""
    package = make_package(tmp_path / "package", *recipes("fp32", "int4"))
    variants = dict(package.manifest.variants)
    variants["mine"] = dataclasses.replace(variants.pop("int4"), name="mine", recipe={"name": "mine", "rules": rules})
    older = dataclasses.replace(package.manifest, variants=variants)
    (package.path / MANIFEST_NAME).write_text(manifest_text(older))
    before = content(package.path)
    with pytest.raises(RecipeError, match=r"'mine' has .* in int[48] by the rules of another version"):
        quantize_package(package.path, load_recipe("int4"))
    assert content(package.path) == before


def test_weights_of_the_caller_go_first(tmp_path: Path) -> None:
    """What --checkpoint does: the package needs no float variant then."""
    exported = make_package(tmp_path / "exported", *recipes("int8", "int4"))
    make_package(tmp_path / "grown", load_recipe("int8"))
    graphs = float_models()
    quantize_package(tmp_path / "grown", load_recipe("int4"), graphs=graphs, sources=sources("float32"))
    assert content(exported.path) == content(tmp_path / "grown")
    assert "FusedMatMul" in [node.op_type for node in graphs["decoder"].graph], "the caller's graphs stay as they were"


def test_weights_that_were_rounded_are_no_source(tmp_path: Path) -> None:
    for dtype, names in (("float32", ("fp16", "int8")), ("bfloat16", ("fp16",)), ("float16", ("int8",))):
        kept = "float32" if dtype == "bfloat16" else dtype
        package = make_package(tmp_path / dtype, *recipes(*names), dtype=kept)
        source = dataclasses.replace(package.manifest.source, dtype=dtype)
        text = manifest_text(dataclasses.replace(package.manifest, source=source))
        (package.path / MANIFEST_NAME).write_text(text)
        before = content(package.path)
        with pytest.raises(RecipeError, match=rf"no variant holds the {dtype} weights .* unchanged; give --checkpoint"):
            quantize_package(package.path, load_recipe("int4"))
        assert content(package.path) == before


def test_a_table_that_is_shared_needs_no_source(tmp_path: Path) -> None:
    """Only what is written needs the weights of the checkpoint."""
    rules = (Rule("decoder/*.weight", WeightFormat(bits=32)), Rule("embed_tokens/*.weight", WeightFormat(bits=8)))
    table = Recipe("table8", rules)
    labels = [precision_label(recipe, "embed_tokens") for recipe in (table, load_recipe("int8"))]
    assert labels[0] == labels[1]
    make_package(tmp_path / "p", table)
    made = quantize_package(tmp_path / "p", load_recipe("int8")).manifest.variants
    assert made["int8"].graphs["embed_tokens"] == made["table8"].graphs["embed_tokens"]


def test_a_variant_that_is_there_already(tmp_path: Path) -> None:
    make_package(tmp_path / "p", *recipes("fp32"))
    mine = Recipe("mine", (Rule("*/*.weight", WeightFormat(bits=4)),))
    quantize_package(tmp_path / "p", mine)
    before = content(tmp_path / "p")
    quantize_package(tmp_path / "p", mine)
    other = Recipe("mine", (Rule("*/*.weight", WeightFormat(bits=4, symmetric=True)),))
    with pytest.raises(RecipeError, match="has a variant 'mine' by other rules"):
        quantize_package(tmp_path / "p", other)
    assert content(tmp_path / "p") == before


def test_damaged_weights_are_found(tmp_path: Path) -> None:
    make_package(tmp_path / "p", *recipes("fp32"))
    file = tmp_path / "p" / "onnx" / "decoder.onnx_data"
    data = bytearray(file.read_bytes())
    data[5000] ^= 1
    file.write_bytes(data)
    before = content(tmp_path / "p")
    with pytest.raises(PackageError, match=r"decoder\.onnx_data: content differs from its sha256"):
        quantize_package(tmp_path / "p", load_recipe("int8"))
    assert content(tmp_path / "p") == before


def test_a_graph_that_points_elsewhere_is_refused(tmp_path: Path) -> None:
    package = make_package(tmp_path / "p", *recipes("fp32"))
    file = tmp_path / "p" / "onnx" / "decoder.onnx"
    model = onnx.load(file, load_external_data=False)
    next(iter(model.graph.initializer[1].external_data)).value = "../../secret"
    file.write_bytes(model.SerializeToString())
    files = package.manifest.files | {"onnx/decoder.onnx": file_entry(file)}
    (package.path / MANIFEST_NAME).write_text(manifest_text(dataclasses.replace(package.manifest, files=files)))
    with pytest.raises(PackageError, match=r"layers\.0\.weight lies outside decoder\.onnx_data"):
        quantize_package(tmp_path / "p", load_recipe("int8"))


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    make_package(tmp_path / "p", *recipes("fp32"))
    other = os.open(tmp_path / "p" / "onnx", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(PackageError, match="another process is adding a variant"):
        quantize_package(tmp_path / "p", load_recipe("int8"))
    os.close(other)
    quantize_package(tmp_path / "p", load_recipe("int8"))


def test_a_package_that_cannot_be_changed(tmp_path: Path) -> None:
    make_package(tmp_path / "p", *recipes("fp32"))
    (tmp_path / "p" / ".quantize").write_text("in the way")
    with pytest.raises(PackageError, match=r"\.quantize: cannot be changed \(Not a directory\)"):
        quantize_package(tmp_path / "p", load_recipe("int8"))


def test_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_package(tmp_path / "p", *recipes("fp32"))
    before = content(tmp_path / "p")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(CapacityError, match="make room"):
        quantize_package(tmp_path / "p", load_recipe("int8"))
    assert content(tmp_path / "p") == before


def killed_at(step: int, folder: Path) -> bool:
    """Adds int8 in a child that is killed at its `step`-th touch of the disk; False where it got through."""
    child = os.fork()
    if child == 0:
        left = step

        def count(event: str, arguments: tuple) -> None:
            nonlocal left
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.listdir"):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        quantize_package(folder, load_recipe("int8"))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_killed_at_any_moment_it_is_the_old_package_or_the_new(tmp_path: Path) -> None:
    make_package(tmp_path / "whole", *recipes("fp32", "int8"))
    make_package(tmp_path / "old", *recipes("fp32"))
    whole, outcomes = content(tmp_path / "whole"), []
    for step in range(1000):
        folder = tmp_path / f"killed-{step}"
        shutil.copytree(tmp_path / "old", folder)
        if not killed_at(step, folder):
            break
        package = Package.open(folder)
        package.verify()
        outcomes.append(tuple(package.manifest.variants))
        quantize_package(folder, load_recipe("int4"))  # cleans up, whatever was left
        quantize_package(folder, load_recipe("int8"))
        left = content(folder)
        assert {name: left[name] for name in whole if name != MANIFEST_NAME} == {
            name: data for name, data in whole.items() if name != MANIFEST_NAME
        }
        assert set(left) - set(whole) == {"onnx/decoder_int4.onnx", "onnx/decoder_int4.onnx_data"}
        shutil.rmtree(folder)
    assert outcomes[0] == ("fp32",)
    assert outcomes[-1] == ("fp32", "int8"), "the manifest is not the last thing"
    assert outcomes == sorted(outcomes, key=len)
    assert len(outcomes) > 20


def without(package: Path, folder: Path, *names: str) -> Path:
    """A copy of a package that never had these variants."""
    manifest = Package.open(package).manifest
    variants = {name: variant for name, variant in manifest.variants.items() if name not in names}
    used = {f"onnx/{n}" for v in variants.values() for g in v.graphs.values() for n in g.files}
    files = {name: e for name, e in manifest.files.items() if name in used or not name.startswith("onnx/")}
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(package / name, folder / name)
    text = manifest_text(dataclasses.replace(manifest, variants=variants, files=files))
    (folder / MANIFEST_NAME).write_text(text)
    return folder


@pytest.mark.parametrize("case", ["package_tiny_a", "package_tiny_b"])
def test_a_real_package_grows_what_an_export_writes(
    case: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported: Path = request.getfixturevalue(case)
    grown = without(exported, tmp_path / "grown", "int8", "int4")
    assert main(["quantize", str(grown), "--recipe", "int8"]) == 0
    assert main(["quantize", str(grown), "--recipe", "int4"]) == 0
    assert "added int4" in capsys.readouterr().out
    assert content(grown) == content(exported)
    assert main(["quantize", str(grown), "--recipe", "int4"]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_from_the_checkpoint(package_tiny_a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = Path(__file__).parent / "goldens" / "qwen2_5_vl"
    grown = without(package_tiny_a, tmp_path / "grown", "fp32", "int8")
    before = content(grown)
    command = ["quantize", str(grown), "--recipe", "int8", "--checkpoint"]
    assert main([*command, str(checkpoints / "tiny_b")]) == 2
    assert "is not what" in capsys.readouterr().err
    assert content(grown) == before
    assert main([*command, str(checkpoints / "tiny_a")]) == 0
    built, exported = Package.open(grown).manifest, Package.open(package_tiny_a).manifest
    assert built.variants["int8"] == exported.variants["int8"]
    assert {name: exported.files[name] for name in built.files} == built.files


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--recipe", "int5"], "recipe 'int5' is unknown; known are fp32, fp16, int8, int4"),
        (["--recipe", "int4", "--method", "best"], "method 'best' is unknown; known methods are rtn"),
        (["--recipe", "int4", "--block-size", "100"], "block size 100: use one of"),
        (["--recipe", "missing.json"], "missing.json: no such file"),
    ],
)
def test_mistakes_take_one_line(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_package(tmp_path / "p", *recipes("fp32"))
    assert main(["quantize", str(tmp_path / "p"), *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_not_a_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(tmp_path), "--recipe", "int8"]) == 2
    assert "not a package" in capsys.readouterr().err
    assert json.dumps(content(tmp_path)) == "{}"
