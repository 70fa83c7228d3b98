"""The self-check that travels in a package, and the command that runs it."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from vlmport.cli.main import main
from vlmport.runtime.errors import PackageError
from vlmport.runtime.package import Package, file_entry
from vlmport.validate.selfcheck import check_selfcheck, write_selfcheck


@pytest.fixture(scope="module")
def checked(package_tiny_b, tmp_path_factory):
    path = shutil.copytree(package_tiny_b, tmp_path_factory.mktemp("selfcheck") / "package")
    write_selfcheck(path)
    return path


@pytest.fixture
def package(checked, tmp_path):
    return shutil.copytree(checked, tmp_path / "package")


def test_the_box_of_the_export_agrees_with_itself(package, capsys):
    assert main(["verify", str(package)]) == 0
    printed = capsys.readouterr().out
    for word in ("fp32", "int8", "int4", "step_logits", "pixel_values", "PASS"):
        assert word in printed
    assert main(["verify", str(package), "--variant", "int8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["variants"] == {"int8": "PASS"}


def test_it_leaves_the_package_whole(package):
    Package.open(package).verify()
    names = sorted(path.name for path in (package / "parity").rglob("*"))
    assert names == ["fp32.npz", "golden", "int4.npz", "int8.npz", "picture.png", "selfcheck.json"]
    first = (package / "parity" / "golden" / "selfcheck.json").read_bytes()
    write_selfcheck(package)
    assert (package / "parity" / "golden" / "selfcheck.json").read_bytes() == first


def test_another_result_on_this_box_fails(package, capsys):
    folder = package / "parity" / "golden"
    with np.load(folder / "int8.npz") as stored:
        arrays = dict(stored)
    arrays["vision"] = arrays["vision"] * 1.2
    np.savez(folder / "int8.npz", **arrays)
    document = json.loads((folder / "selfcheck.json").read_text())
    document["variants"]["int8"]["sha256"] = file_entry(folder / "int8.npz").sha256
    (folder / "selfcheck.json").write_text(json.dumps(document))
    rows = check_selfcheck(Package.open(package))
    assert {row.stage for row in rows["int8"] if row.outcome == "FAIL"} == {"vision"}
    assert {row.outcome for row in rows["fp32"]} == {"PASS"}
    assert main(["verify", str(package)]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_what_another_box_computed_stays(package):
    folder = package / "parity" / "golden"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "int8.npz").write_bytes(b"damaged")
    with np.load(folder / "fp32.npz") as stored:
        arrays = {**stored, "vision": stored["vision"] * (1 + 1e-6)}  # as other kernels would have it
    np.savez(folder / "fp32.npz", **arrays)
    document = json.loads((folder / "selfcheck.json").read_text())
    document["variants"]["fp32"]["sha256"] = file_entry(folder / "fp32.npz").sha256
    (folder / "selfcheck.json").write_text(json.dumps(document))
    from_another_box = (folder / "fp32.npz").read_bytes()
    write_selfcheck(package)
    assert (folder / "fp32.npz").read_bytes() == from_another_box
    assert (folder / "int8.npz").read_bytes() == before["int8.npz"]
    assert set(check_selfcheck(Package.open(package))) == {"fp32", "int8", "int4"}


def test_a_failure_leaves_the_older_one(package, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    before = sorted((package / "parity").rglob("*"))
    (package / "parity" / "golden" / "int8.npz").write_bytes(b"damaged")
    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="No space"):
        write_selfcheck(package)
    assert sorted((package / "parity").rglob("*")) == before


def test_quantizing_again_adds_what_an_interrupted_one_left_out(package, capsys):
    (package / "parity" / "golden" / "int8.npz").unlink()
    assert main(["quantize", str(package), "--recipe", "int8"]) == 0
    assert main(["verify", str(package)]) == 0


def damage_graph(package):
    file = package / "onnx" / "decoder.onnx_data"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def other_graphs(package):
    file = package / "parity" / "golden" / "selfcheck.json"
    document = json.loads(file.read_text())
    document["variants"]["fp32"]["graphs"]["decoder.onnx"] = "0" * 64
    file.write_text(json.dumps(document))


def unknown_field(package):
    file = package / "parity" / "golden" / "selfcheck.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "more": 1}))


def pickled(package):
    folder = package / "parity" / "golden"
    np.savez(folder / "fp32.npz", vision=np.array([{"a": 1}], dtype=object), allow_pickle=True)
    document = json.loads((folder / "selfcheck.json").read_text())
    document["variants"]["fp32"]["sha256"] = file_entry(folder / "fp32.npz").sha256
    (folder / "selfcheck.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_graph, "differs from its sha256"),
        (other_graphs, "as it is now"),
        (unknown_field, "more"),
        (pickled, "plain arrays"),
        (lambda p: shutil.rmtree(p / "parity"), "missing"),
        (lambda p: (p / "parity" / "golden" / "int4.npz").unlink(), "missing"),
        (lambda p: (p / "parity" / "golden" / "int4.npz").write_bytes(b"x"), "sha256"),
        (lambda p: (p / "parity" / "golden" / "picture.png").unlink(), "missing"),
        (lambda p: (p / "parity" / "golden" / "picture.png").write_bytes(b"x"), "sha256"),
        (lambda p: (p / "parity" / "golden" / "selfcheck.json").write_text("{"), "selfcheck.json"),
    ],
)
def test_damage_is_one_line_and_status_2(damage, words, package, capsys):
    damage(package)
    assert main(["verify", str(package)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in line


def test_an_unknown_variant(package):
    with pytest.raises(PackageError, match="no variant 'int3'"):
        check_selfcheck(Package.open(package), "int3")


def test_verify_needs_the_runtime_alone(package):
    code = f"""
        import sys
        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors"):
                    raise ModuleNotFoundError(name, name=name)
        sys.meta_path.insert(0, Blocked())
        from vlmport.cli.main import main
        sys.exit(main(["verify", {str(package)!r}, "--variant", "fp32"]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_it_waits_for_whoever_adds_a_variant(package):
    """The self-check is of the manifest as it is once the other process is done."""
    lock = os.open(package / "onnx", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    before = (package / "parity" / "golden" / "selfcheck.json").stat().st_mtime_ns
    writer = threading.Thread(target=write_selfcheck, args=(package,))
    writer.start()
    writer.join(0.5)
    assert writer.is_alive()
    assert (package / "parity" / "golden" / "selfcheck.json").stat().st_mtime_ns == before
    os.close(lock)
    writer.join(60)
    assert not writer.is_alive()
    assert (package / "parity" / "golden" / "selfcheck.json").stat().st_mtime_ns > before


def test_of_one_variant_only_its_own_files_are_read(package, capsys):
    """On a box that is to run int4, gigabytes of float32 beside it are no matter."""
    file = package / "onnx" / "decoder.onnx_data"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert main(["verify", str(package), "--variant", "int4"]) == 0
    assert main(["verify", str(package)]) == 2
    assert f"{file}: content differs" in capsys.readouterr().err
