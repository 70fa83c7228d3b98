"""The ladder of imports holds, the checker sees each kind of breach, and the runtime needs nothing but its own."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from layering import LADDER, ROOT, check_source, check_tree, source_files

HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "onnxruntime", "av", "optimum")
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_TEST_LINES = 400


def test_tree_keeps_the_ladder() -> None:
    assert [str(breach) for breach in check_tree()] == []
    assert len(list(source_files())) > 20  # the check looked at something


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("runtime", "from ..quant.recipe import Recipe"),
        ("quant", "from ..export import build"),
        ("export", "from .. import validate"),
        ("validate", "from vlmport.cli.main import main"),
        ("export", "import vlmport.validate.metrics"),
        ("quant", "def inner():\n    from ..cli import main"),
        ("validate", "from runtime.package import Package"),
        ("cli", "import export"),
        ("runtime", "import torch"),
        ("runtime", "def late():\n    from safetensors.numpy import load_file"),
        ("cli", "from ..utils import thing"),
    ],
)
def test_breaches_are_seen(layer: str, source: str) -> None:
    assert len(check_source(source, Path(layer, "module.py"))) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("cli/run.py", "from ..runtime.model import Model"),
        ("export/families/some.py", "from ...runtime.manifest import Manifest\nfrom ..family import FamilySpec"),
        ("export/build.py", "import torch\nfrom ..quant import recipe\nfrom . import trace"),
        ("runtime/session.py", "import onnxruntime\nimport os.path\nfrom PIL import Image"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert check_source(source, Path(path)) == []


def run_blocked(code: str, blocked: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Runs `code` where importing `blocked` fails as if they were not installed."""
    block = f"import sys\nfor name in {blocked!r}:\n    sys.modules[name] = None\n"
    return subprocess.run(
        [sys.executable, "-c", block + code], capture_output=True, text=True, timeout=120, cwd="/", check=False
    )


def runtime_modules() -> list[str]:
    return [
        f"vlmport.runtime.{file.stem}" for file in sorted((ROOT / "runtime").glob("*.py")) if file.stem != "__init__"
    ]


def test_every_runtime_module_imports_with_its_own_dependencies_only() -> None:
    """onnxruntime and av too are imported when they are needed, so that a missing one is told in a line."""
    code = "import importlib\n" + "".join(f"importlib.import_module({name!r})\n" for name in runtime_modules())
    done = run_blocked("import vlmport.runtime\n" + code, HEAVY)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["prepare", "run", "verify", "inspect", "bench"])
def test_commands_of_the_edge_need_the_runtime_only(command: str, tmp_path: Path) -> None:
    extra = {"run": ["hello"]}.get(command, [])
    call = ["vlmport", command, str(tmp_path), *extra]
    done = run_blocked(f"sys.argv = {call!r}\nfrom vlmport.cli.main import main\nsys.exit(main())", HEAVY)
    assert done.returncode == 2, done.stderr
    assert "not a package" in done.stderr
    assert done.stderr.count("\n") == 1


def test_importing_has_no_side_effects_worth_seconds() -> None:
    """`import vlmport.runtime` must not drag the exporter in by a back door."""
    done = run_blocked(
        "import vlmport.runtime\nprint(sorted(set(sys.modules) & {'torch', 'transformers', 'onnx'}))", ()
    )
    assert done.stdout.strip() == "[]", done.stderr


def family_words() -> set[str]:
    """Names of families, from the files of the folder: `some_vl_2` gives `some_vl_2` and `some`."""
    names = {file.stem.lower() for file in (ROOT / "export" / "families").glob("*.py")} - {"__init__"}
    assert names
    first = {"".join(letter for letter in name.split("_")[0] if not letter.isdigit()) for name in names}
    return names | {word for word in first if len(word) >= 4}


def code_words(source: str) -> list[tuple[int, str]]:
    """Names and strings of a file with their lines, docstrings left out: those may cite a source."""
    tree = ast.parse(source)
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body
            if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                docstrings.add(body[0].value)
    words: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            words.append((node.lineno, node.value))
        elif isinstance(node, ast.Name):
            words.append((node.lineno, node.id))
        elif isinstance(node, ast.Attribute):
            words.append((node.lineno, node.attr))
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            words.append((node.lineno, node.name))
        elif isinstance(node, ast.ImportFrom | ast.alias):
            name = node.module if isinstance(node, ast.ImportFrom) else node.name
            words.append((node.lineno, name or ""))
    return words


def test_no_family_is_named_outside_its_file() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{line}: {word!r}"
        for file in source_files()
        if file.parent.name != "families"
        for line, word in code_words(file.read_text(encoding="utf-8"))
        if any(family in word.lower() for family in family_words())
    ]
    assert found == []


def test_family_check_sees_names_and_strings_but_no_docstrings() -> None:
    source = '"""of some_vl"""\nx = "some_vl"\nclass SomeVl:\n    """some_vl"""\n    some_vl = 1\n'
    assert [line for line, word in code_words(source) if "some_vl" in word] == [2, 5]


def test_there_is_no_utils_and_no_common() -> None:
    bad = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert [str(file) for file in source_files() if file.stem in bad or file.parent.name in bad] == []


def test_files_and_functions_stay_readable() -> None:
    long: list[str] = []
    for file in source_files():
        text = file.read_text(encoding="utf-8")
        if text.count("\n") > MAX_FILE_LINES:
            long.append(f"{file.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if num_lines > MAX_FUNCTION_LINES:
                    long.append(f"{file.relative_to(ROOT)}:{node.lineno}: {node.name} has {num_lines} lines")
    for file in sorted((ROOT / "tests").glob("*.py")):
        num_lines = file.read_text(encoding="utf-8").count("\n")
        if num_lines > MAX_TEST_LINES:
            long.append(f"tests/{file.name}: {num_lines} lines")
    assert long == []


def test_checker_is_a_command_too(tmp_path: Path) -> None:
    """`make lint` relies on its exit status."""
    for layer in LADDER:
        (tmp_path / layer).mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "layering.py").write_bytes((ROOT / "tests" / "layering.py").read_bytes())
    command = [sys.executable, str(tmp_path / "tests" / "layering.py")]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0
    (tmp_path / "runtime" / "bad.py").write_text("import torch\n", encoding="utf-8")
    done = subprocess.run(command, timeout=60, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"runtime{os.sep}bad.py:1: the runtime imports 'torch'")
