"""Each module says in `__all__` what it offers: nothing missing, nothing leaked; ruff keeps it sorted."""

import ast
from pathlib import Path

import pytest
from layering import ROOT, source_files

MODULES = [file for file in source_files() if file.read_text(encoding="utf-8").strip()]


def listed(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return list(ast.literal_eval(node.value))
    return None


def defined(tree: ast.Module) -> set[str]:
    """Functions, classes and CONSTANTS of the module. Type aliases and type variables are nobody's interface."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {t.id for t in targets if isinstance(t, ast.Name) and len(t.id) > 1 and t.id.isupper()}
    return {name for name in names if not name.startswith("_")}


def available(tree: ast.Module) -> set[str]:
    """All names that the top level of a module binds."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
    return names


def imported(tree: ast.Module, file: Path) -> list[tuple[Path, str]]:
    """(module file, name) of each name that a file takes from another of this tree."""
    found: list[tuple[Path, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            base = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            source = base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__init__.py"
            found += [(source, alias.name) for alias in node.names if not (base / f"{alias.name}.py").is_file()]
    return found


def faults(source: str) -> list[str]:
    tree = ast.parse(source)
    names = listed(tree)
    if names is None:
        return ["no __all__"] if defined(tree) or len(tree.body) > 1 else []
    return [
        *(f"{name} is in __all__ but not in the module" for name in names if name not in available(tree)),
        *(f"{name} is public but not in __all__" for name in sorted(defined(tree) - set(names))),
        *(f"{name} is in __all__ twice" for name in sorted(set(names)) if names.count(name) > 1),
        *(f"{name} is private but in __all__" for name in names if name.startswith("_")),
    ]


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_all_is_all(file: Path) -> None:
    found = faults(file.read_text(encoding="utf-8"))
    # The modules of a network are many classes that only their own file puts together.
    if file.relative_to(ROOT).parts[0] == "export":
        found = [fault for fault in found if "public but not" not in fault]
    assert found == []


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_only_listed_names_are_imported_elsewhere(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    taken = imported(tree, file)
    assert [
        f"{name} is not in __all__ of {source.relative_to(ROOT)}"
        for source, name in taken
        if name not in (listed(ast.parse(source.read_text(encoding="utf-8"))) or [])
    ] == []


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_module_says_what_it_is_for(file: Path) -> None:
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    assert docstring, "a module starts with a docstring; its first line goes into the file tree of the README"
    assert docstring.splitlines()[0].strip()


@pytest.mark.parametrize(
    "source",
    [
        "def f(): ...",
        "__all__ = ['f', 'g']\ndef f(): ...",
        "__all__ = ['f']\ndef f(): ...\nclass G: ...",
        "__all__ = []\nLIMIT = 3",
        "__all__ = ['f', 'f']\ndef f(): ...",
        "__all__ = ['_f']\ndef _f(): ...",
    ],
)
def test_faults_are_seen(source: str) -> None:
    assert len(faults(source)) == 1
