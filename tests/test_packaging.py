"""The wheel holds the tree, dependencies are few and reasoned, versions are pinned, the house installs by plain pip."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from layering import LADDER, ROOT, source_files

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LINES = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
CONSTRAINTS = [
    line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line and line[0] != "#"
]
BASE: list[str] = PROJECT["project"]["dependencies"]
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
# What a distribution is imported as, where the names differ.
IMPORT_NAMES = {"pillow": "PIL", "onnx-ir": "onnx_ir", "onnxruntime-gpu": "onnxruntime", "protobuf": "google"}
# What an extra's code may be told to need by the code of a layer: the extras that a layer's users install.
LAYER_EXTRAS = {
    "runtime": ("cpu", "video"),
    "quant": ("cpu", "video", "export"),
    "export": ("cpu", "video", "export"),
    "validate": ("cpu", "video", "export", "report"),
    "cli": ("cpu", "video", "export"),
}


def distribution(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return match[0].lower()


def import_name(requirement: str) -> str:
    name = distribution(requirement)
    return IMPORT_NAMES.get(name, name.replace("-", "_"))


def imports(file: Path) -> set[str]:
    """Top names of all absolute imports of a file, late ones included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names - {"vlmport"} - sys.stdlib_module_names


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy of the tree, offline: setuptools would leave its droppings in the tree itself."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    tree.mkdir()
    for layer in LADDER:
        shutil.copytree(ROOT / layer, tree / layer, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(folder), str(tree)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *command], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = folder.glob("*.whl")
    return zipfile.ZipFile(file)


def test_wheel_is_the_tree(wheel: zipfile.ZipFile) -> None:
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    tree = {
        f"vlmport/{file.relative_to(ROOT).as_posix()}"
        for layer in LADDER
        for file in (ROOT / layer).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert inside == tree


def test_every_layer_is_typed(wheel: zipfile.ZipFile) -> None:
    assert {f"vlmport/{layer}/py.typed" for layer in LADDER} <= set(wheel.namelist())


def test_wheel_tells_dependencies_extras_and_command(wheel: zipfile.ZipFile) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith("/METADATA")]
    metadata = wheel.read(name).decode()
    needed = [
        line.removeprefix("Requires-Dist: ") for line in metadata.splitlines() if line.startswith("Requires-Dist")
    ]
    assert {distribution(text) for text in needed if "extra ==" not in text} == {
        "numpy",
        "tokenizers",
        "pillow",
        "jinja2",
    }
    offered = {
        line.removeprefix("Provides-Extra: ") for line in metadata.splitlines() if line.startswith("Provides-Extra")
    }
    assert {"cpu", "gpu", "export", "video", "server", "report", "dev"} <= offered
    (points,) = [name for name in wheel.namelist() if name.endswith("/entry_points.txt")]
    assert "vlmport = vlmport.cli.main:main" in wheel.read(points).decode()
    assert any(name.endswith("/licenses/LICENSE") for name in wheel.namelist())


def test_every_dependency_has_its_reason_beside_it() -> None:
    for requirement in [*BASE, *(item for extra in EXTRAS.values() for item in extra)]:
        (line,) = [line for line in LINES if f'"{requirement}"' in line and "requires =" not in line]
        assert len(line.partition("#")[2].strip()) > 8, f"{requirement}: say why it is there"


@pytest.mark.parametrize("layer", LADDER)
def test_layers_import_what_is_declared(layer: str) -> None:
    declared = {import_name(item) for item in BASE}
    declared |= {import_name(item) for extra in LAYER_EXTRAS[layer] for item in EXTRAS[extra]}
    for file in source_files():
        if file.relative_to(ROOT).parts[0] == layer:
            assert imports(file) <= declared, file


def test_nothing_is_declared_that_nobody_uses() -> None:
    """Tools are used by name in the Makefile or pyproject; what is there for another reason says so."""
    files = [*source_files(), *(ROOT / "tests").glob("*.py"), *(ROOT / "examples").rglob("*.py")]
    used: set[str] = set().union(*(imports(file) for file in files))
    text = "".join(file.read_text(encoding="utf-8") for file in files) + (ROOT / "Makefile").read_text(encoding="utf-8")
    for requirement in [*BASE, *(item for extra in EXTRAS.values() for item in extra)]:
        name = import_name(requirement)
        line = next(line for line in LINES if f'"{requirement}"' in line and "#" in line)
        reasons = ("nothing here imports it", "through it", "on all cores")
        known = name in used or name in text or any(reason in line for reason in reasons)
        assert known, f"{requirement}: nothing uses it"


def test_torch_is_pinned_first_and_its_heavy_friends_are_absent() -> None:
    assert CONSTRAINTS[0] == "torch==2.13.0"
    everything = {
        distribution(item) for item in [*CONSTRAINTS, *BASE, *(i for extra in EXTRAS.values() for i in extra)]
    }
    assert not everything & {"torchvision", "torchaudio", "timm"}


def test_constraints_pin_every_dependency_and_are_what_is_installed() -> None:
    pins = dict(line.split("==") for line in CONSTRAINTS)
    pinned = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    for requirement in [*BASE, *(item for extra in EXTRAS.values() for item in extra)]:
        assert distribution(requirement.split("[")[0]) in pinned, requirement
    for name in ("torch", "numpy", "onnx", "onnxscript", "onnx-ir", "transformers", "tokenizers", "pillow"):
        assert importlib.metadata.version(name).partition("+")[0] == pinned[name]


def test_version_is_one() -> None:
    assert importlib.metadata.version("vlmport") == PROJECT["project"]["version"]
    assert f"## [{PROJECT['project']['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_ci_calls_lint_and_test_and_no_more() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    steps = [line for line in script.read_text(encoding="utf-8").splitlines() if line.startswith("make")]
    assert steps == ["make lint", "make test"]


def dry_run(*arguments: str) -> list[str]:
    """What make would do in a tree that is installed."""
    command = ["make", "-n", "-o", ".venv/.installed", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.splitlines()


def environment() -> dict[str, str]:
    """Without what an outer `make test` hands down: its options and variables are not ours."""
    return {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}


def test_make_export_takes_its_variables() -> None:
    first = dry_run("export", "CHECKPOINT=/models/mine", "RECIPES=int4", "TARGET=cuda")[0]
    assert first == (
        ".venv/bin/vlmport export /models/mine -o build/packages/mine --recipe int4 --target cuda --overwrite"
    )
    first = dry_run("export", "CHECKPOINT=/models/mine", "PACKAGE=/data/package")[0].rstrip()
    assert first == ".venv/bin/vlmport export /models/mine -o /data/package --recipe fp32 fp16 int8 int4 --target cpu"


def test_make_export_alone_is_the_demo_with_its_report() -> None:
    export, validate = [line for line in dry_run("export") if "bin/vlmport" in line]
    assert " examples/receipts/checkpoint -o build/packages/receipts " in export
    assert " --reference examples/receipts/checkpoint --task build/tasks/receipts" in validate


def test_make_validate_alone_is_the_whole_report_of_the_demo() -> None:
    (validate,) = [line for line in dry_run("validate") if "vlmport validate" in line]
    assert " --task build/tasks/receipts" in validate
    assert "--no-" not in validate
    (validate,) = [line for line in dry_run("validate", "CHECKPOINT=/models/mine") if "vlmport validate" in line]
    assert "--task" not in validate


def test_too_old_a_python_is_told_before_anything_is_made(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    command = ["make", "test", "PYTHON=false"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "vlmport needs Python 3.11 or later" in done.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("target", ["validate", "bench", "test", "test-slow", "test-gpu", "lint", "help", "clean"])
def test_make_targets_exist(target: str) -> None:
    assert dry_run(target)
