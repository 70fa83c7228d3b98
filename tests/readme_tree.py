"""The file tree of the README, made from the first lines of docstrings. `python tests/readme_tree.py` rewrites it.

A test fails where the README differs, so the tree is true and each file's first line has to stand by itself.
"""

import ast
import re
import sys
from pathlib import Path

from layering import ROOT

__all__ = ["README", "between_marks", "tree", "with_tree"]

README = ROOT / "README.md"
_MARKS = re.compile(r"(?<=<!-- tree -->\n)(.*?)(?=<!-- /tree -->)", re.DOTALL)
_WIDTH = 90  # of a description; a longer one is cut at its first colon, semicolon or full stop
_FOLDERS = {
    "runtime": "runs packages; needs neither torch nor transformers nor onnx",
    "quant": "recipes, and the weights they make",
    "export": "from a checkpoint to a package",
    "export/families": "one file a family of models",
    "export/layers": "eager PyTorch blocks, traced to semantic operators",
    "export/lower": "semantic operators -> what a target runs best, one pass each",
    "validate": "reference against package, stage by stage",
    "cli": "the command line, one file a command",
    "benchmarks": "measurements at the shapes of published models, on checkpoints of random weights",
    "examples/receipts": "the demo: a maker of receipts, a training script, a small checkpoint",
    "examples/outliers": "channel outliers for any checkpoint, without a change of what it computes",
}
_OTHERS = {
    "tests/": "offline, on the CPU; goldens/ holds what upstream code computed",
    "docs/": "architecture, adding a family, the package format",
    "Makefile": "all that there is to call; `make help` lists it",
    ".ci/run": "what CI does: make lint, make test",
    "pyproject.toml": "dependencies with their reasons, settings of the tools",
    "constraints.txt": "the versions that CI runs on",
}


def tree() -> str:
    """The tree as text, one line a file."""
    rows: list[tuple[str, str]] = []
    for folder, about in _FOLDERS.items():
        indent = "  " * folder.count("/") if folder.partition("/")[0] in _FOLDERS else ""
        rows.append((f"{indent}{folder}/", about))
        files = sorted(file for file in (ROOT / folder).glob("*.py") if file.stem != "__init__")
        rows += [(f"{indent}  {file.name}", _first_line(file)) for file in files]
    rows += _OTHERS.items()
    width = max(len(name) for name, _ in rows)
    return "".join(f"{name:{width}}  {about}\n" for name, about in rows)


def _first_line(file: Path) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    line = (docstring.splitlines() or [""])[0].rstrip(".:")
    return line if len(line) <= _WIDTH else re.split(r"[:;.] ", line)[0]


def between_marks(text: str) -> str:
    """What the README has now."""
    match = _MARKS.search(text)
    assert match, "README.md has no <!-- tree --> ... <!-- /tree -->"
    return match[0]


def with_tree(text: str) -> str:
    """The README with the tree of today."""
    return _MARKS.sub(lambda _: f"```\n{tree()}```\n", text)


def main() -> int:
    README.write_text(with_tree(README.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
