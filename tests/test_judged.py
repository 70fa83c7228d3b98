"""The bytes that a verdict is about are read when it is judged, and no verdict is of bytes that change meanwhile."""

import os
from pathlib import Path

import pytest
from fake_package import write_package

from vlmport.runtime.errors import InputError, PackageError
from vlmport.runtime.package import Package, file_entry
from vlmport.validate.judged import changed_since, hash_checkpoint, hash_golden, hash_package


def quiet(_done: int, _total: int, _what: str) -> None:
    pass


@pytest.fixture
def package(tmp_path: Path) -> Package:
    return Package.open(write_package(tmp_path / "package"))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_it_names_the_manifest_and_what_the_variants_are_made_of(package: Package) -> None:
    judged = hash_package(package, ["int4"], quiet).sha256
    assert set(judged) == {
        "vlmport.json",
        *(f"onnx/{role}{end}" for role in ("embed_tokens", "decoder_int4") for end in (".onnx", ".onnx_data")),
    }
    assert all(file_entry(package.path / name).sha256 == sha256 for name, sha256 in judged.items())
    assert "onnx/decoder.onnx_data" in hash_package(package, ["int4", "fp32"], quiet).sha256


def test_bytes_that_are_not_the_manifest_s_get_no_verdict(package: Package) -> None:
    flip(package.path / "onnx" / "decoder_int4.onnx_data")
    with pytest.raises(PackageError, match=r"decoder_int4\.onnx_data: content differs"):
        hash_package(package, ["int4"], quiet)
    hash_package(package, ["fp32"], quiet)  # it is no file of that one


def test_a_change_while_it_is_judged_gets_no_verdict(package: Package) -> None:
    judged = hash_package(package, ["int4"], quiet)
    file = package.path / "onnx" / "decoder_int4.onnx_data"
    os.utime(file)
    judged.check()  # another time, the same bytes
    flip(file)
    with pytest.raises(InputError, match=r"decoder_int4\.onnx_data: changed while it was validated"):
        judged.check()
    flip(file)
    judged.check()
    file.unlink()
    with pytest.raises(InputError, match="changed while it was validated"):
        judged.check()


def test_of_a_checkpoint_it_reads_what_a_model_is_made_from(tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json", "modeling.py", "README.md", "pytorch_model.bin"):
        (tmp_path / name).write_text(name)
    assert list(hash_checkpoint(tmp_path, quiet).sha256) == ["config.json", "model.safetensors", "modeling.py"]
    (tmp_path / "inputs" / "clip").mkdir(parents=True)
    (tmp_path / "inputs" / "clip" / "0.png").write_text("frame")
    judged = hash_golden(tmp_path, quiet)
    assert list(judged.sha256) == ["config.json", "model.safetensors", "modeling.py", "inputs/clip/0.png"]
    (tmp_path / "inputs" / "clip" / "0.png").write_text("other")
    with pytest.raises(InputError, match=r"0\.png: changed while it was validated"):
        judged.check()


def test_a_variant_made_anew_is_told_by_the_manifest_alone(package: Package) -> None:
    judged = dict(hash_package(package, ["int4"], quiet).sha256)
    assert changed_since(package, "int4", judged, None) == ()
    judged["onnx/decoder_int4.onnx"] = "0" * 64
    del judged["onnx/embed_tokens.onnx"]
    future = 2**63  # nothing was written after it, so that nothing but the manifest is read
    assert changed_since(package, "int4", judged, future) == ("onnx/decoder_int4.onnx", "onnx/embed_tokens.onnx")
