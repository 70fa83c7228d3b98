"""A package is trusted only after it was checked: plain files, inside the folder, of the right size and hash."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_package import write_package
from hypothesis import given
from hypothesis import strategies as st

from vlmport.runtime.errors import PackageError
from vlmport.runtime.manifest import GraphFile, Manifest
from vlmport.runtime.package import Package, file_entry, manifest_text
from vlmport.runtime.schema import SchemaError, from_json, to_json


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return write_package(tmp_path / "package")


def edit(package: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = package / "vlmport.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    change(data)
    file.write_text(json.dumps(data), encoding="utf-8")


def test_opens_and_verifies(package: Path) -> None:
    opened = Package.open(package)
    seen: list[str] = []
    opened.verify(seen.append)
    assert seen == list(opened.manifest.files)
    assert opened.variant().name == "fp32"
    assert opened.graph_path("decoder", "int4") == package / "onnx" / "decoder_int4.onnx"
    assert opened.size("int4") == 4000
    assert manifest_text(opened.manifest) == (package / "vlmport.json").read_text(encoding="utf-8")


def test_what_is_not_there_is_told_with_what_is(package: Path) -> None:
    opened = Package.open(package)
    with pytest.raises(PackageError, match="no variant 'int8'; it has fp32, int4"):
        opened.variant("int8")
    with pytest.raises(PackageError, match="no role 'projector'; it has embed_tokens, decoder"):
        opened.graph_path("projector")


def test_changed_byte_is_found_by_its_hash(package: Path) -> None:
    file = package / "onnx" / "decoder.onnx_data"
    content = bytearray(file.read_bytes())
    content[1_500_000] ^= 1
    file.write_bytes(content)
    opened = Package.open(package)  # the size is right
    with pytest.raises(PackageError, match=r"decoder\.onnx_data: content differs"):
        opened.verify()


def test_size_and_absence_are_found_on_opening(package: Path) -> None:
    file = package / "onnx" / "decoder.onnx"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(PackageError, match=r"decoder\.onnx: 999 bytes, vlmport\.json says 1000"):
        Package.open(package)
    file.unlink()
    with pytest.raises(PackageError, match=r"decoder\.onnx: missing"):
        Package.open(package)


def link_file(package: Path, outside: Path) -> None:
    file = package / "onnx" / "decoder.onnx"
    outside.write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(outside)


def link_folder(package: Path, outside: Path) -> None:
    (package / "onnx").rename(outside)
    (package / "onnx").symlink_to(outside, target_is_directory=True)


def hard_link(package: Path, outside: Path) -> None:
    os.link(package / "onnx" / "decoder.onnx", outside)


def folder_for_a_file(package: Path, outside: Path) -> None:
    file = package / "onnx" / "decoder.onnx"
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("attack", [link_file, link_folder, hard_link, folder_for_a_file])
def test_links_and_odd_files_are_refused(package: Path, tmp_path: Path, attack: Callable[[Path, Path], None]) -> None:
    attack(package, tmp_path / "outside")
    with pytest.raises(PackageError, match=r"link|plain file"):
        Package.open(package)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/../../secret", "onnx//x", "./x", "", ".", "a\\b", "a/"]
)
def test_names_stay_inside(package: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_bytes(b"s")
    edit(package, lambda data: data["files"].update({name: {"sha256": "0" * 64, "size": 1}}))
    with pytest.raises(PackageError, match="not a plain path inside the package"):
        Package.open(package)


@pytest.mark.parametrize("name", ["../decoder.onnx", "absent.onnx", "sub/decoder.onnx"])
def test_graphs_are_listed_files(package: Path, name: str) -> None:
    edit(package, lambda data: data["variants"]["fp32"]["graphs"]["decoder"].update(graph=name))
    with pytest.raises(PackageError, match="not among its files under onnx/"):
        Package.open(package)


IMAGE = {
    "strategy": "smart_resize",
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "rescale": 1 / 255,
    "min_pixels": 3136,
    "max_pixels": 20000,
    "mean": [0, 0, 0],
    "std": [1, 1, 1],
    "resample": "bicubic",
}
VIDEO = {
    "sampling": "linspace",
    "fps": 2.0,
    "min_frames": 4,
    "max_frames": 768,
    "frame_multiple": 2,
    "min_pixels": 3136,
    "max_pixels": 20000,
    "total_pixels": 10**6,
    "default_fps": 2.0,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(surprise=1), "unknown field 'surprise'"),
        (lambda data: data.pop("roles"), "field 'roles' is missing"),
        (lambda data: data.update(target="tpu"), "target"),
        (lambda data: data.update(schema="vlmport-package/9"), "vlmport-package/9"),
        (lambda data: data.update(roles=["decoder", "oracle"]), "unknown role 'oracle'"),
        (lambda data: data["variants"]["int4"]["graphs"].pop("decoder"), "variant 'int4' has graphs for"),
        (lambda data: data["cache"].update(num_layers="four"), "cache.num_layers"),
        (lambda data: data["cache"].update(num_layers=True), "cache.num_layers"),
        (lambda data: data.update(variants={}), "variants is empty"),
        (lambda data: data["cache"].update(max_length=-5), r"cache: max_length is -5; it has to be above 0"),
        (lambda data: data.update(image=IMAGE | {"patch_size": 0}), r"image: patch_size is 0"),
        (lambda data: data.update(image=IMAGE | {"std": [1, 0, 1]}), r"image: std is \[1\.0, 0\.0, 1\.0\]"),
        (lambda data: data.update(video=VIDEO | {"fps": 0}), r"video: fps is 0"),
        (lambda data: data["files"].update(x=None), "files.x"),
    ],
)
def test_wrong_manifest_names_its_field(package: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    edit(package, change)
    with pytest.raises(PackageError, match=message):
        Package.open(package)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"3", b"[" * 100_000, b'{"schema": NaN}'])
def test_garbage_is_told_by_file(package: Path, content: bytes) -> None:
    (package / "vlmport.json").write_bytes(content)
    with pytest.raises(PackageError, match=r"vlmport\.json"):
        Package.open(package)


def test_folder_without_manifest_is_no_package(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="not a package"):
        Package.open(tmp_path)
    with pytest.raises(PackageError, match="not a package"):
        Package.open(tmp_path / "nowhere")


def test_file_entry_reads_in_blocks(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"")
    assert file_entry(file).sha256 == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    file.write_bytes(b"a" * 1_000_000)
    assert file_entry(file).sha256 == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"
    assert file_entry(file).size == 1_000_000


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(json_values)
def test_no_json_at_all_gets_past_the_schema_by_another_error(data: Any) -> None:
    for kind in (Manifest, GraphFile):
        with pytest.raises(SchemaError):
            from_json(kind, data)


@given(st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3), st.text(max_size=8))
def test_json_round_trip(formats: dict[str, str], name: str) -> None:
    graph = GraphFile(name, f"{name}_data", "int4", formats=formats)
    assert from_json(GraphFile, json.loads(json.dumps(to_json(graph)))) == graph
