"""The direction of imports: cli -> validate -> export -> quant -> runtime, and what the runtime must never import.

`make lint` runs this file; test_layering.py calls the same functions and shows that they see a breach.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["LADDER", "ROOT", "Breach", "check_source", "check_tree", "source_files"]

ROOT = Path(__file__).resolve().parent.parent
# Each layer may import itself and those to its right.
LADDER = ("cli", "validate", "export", "quant", "runtime")
# All that the runtime may import beside the standard library; onnxruntime and av come by extras.
RUNTIME_DEPENDENCIES = frozenset({"numpy", "tokenizers", "PIL", "jinja2", "onnxruntime", "av"})


@dataclass(frozen=True)
class Breach:
    """One import that should not be there."""

    place: str  # file:line, relative to the root
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


def source_files(root: Path = ROOT) -> Iterator[Path]:
    """Python files of the layers, sorted."""
    for layer in LADDER:
        yield from sorted((root / layer).rglob("*.py"))


def check_tree(root: Path = ROOT) -> list[Breach]:
    """All breaches under `root`."""
    breaches: list[Breach] = []
    for file in source_files(root):
        breaches += check_source(file.read_text(encoding="utf-8"), file.relative_to(root))
    return breaches


def check_source(source: str, path: Path) -> list[Breach]:
    """Breaches of one file; `path` is relative to the root, so its first part is the layer."""
    breaches: list[Breach] = []
    for node in ast.walk(ast.parse(source, str(path))):
        for module in _imported(node, path):
            message = _judge(module, path.parts[0])
            if message:
                breaches.append(Breach(f"{path}:{getattr(node, 'lineno', 0)}", message))
    return breaches


def _imported(node: ast.AST, path: Path) -> Iterator[str]:
    """Absolute names that an import statement asks for; relative ones become vlmport.<layer>..."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
        yield node.module or ""
    elif isinstance(node, ast.ImportFrom):
        package = ("vlmport", *path.parts[:-1])
        base = package[: len(package) - node.level + 1]
        if node.module:
            yield ".".join((*base, node.module))
        else:  # from .. import runtime
            yield from (".".join((*base, alias.name)) for alias in node.names)


def _judge(module: str, layer: str) -> str:
    """What is wrong with importing `module` in `layer`; empty where nothing is."""
    top, _, rest = module.partition(".")
    if top in LADDER:
        return f"imports {module!r} by its bare name; import relatively"
    if top == "vlmport":
        target = rest.partition(".")[0]
        if target not in LADDER:
            return f"imports {module!r}, which is no layer"
        if LADDER.index(target) < LADDER.index(layer):
            return f"{layer} imports {target}; the ladder is {' -> '.join(LADDER)}"
        return ""
    if layer == "runtime" and top not in RUNTIME_DEPENDENCIES and top not in sys.stdlib_module_names:
        return f"the runtime imports {top!r}; it may use {', '.join(sorted(RUNTIME_DEPENDENCIES))}"
    return ""


def main() -> int:
    breaches = check_tree()
    for breach in breaches:
        print(breach, file=sys.stderr)
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())
