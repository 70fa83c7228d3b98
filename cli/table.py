"""Plain text tables: columns as wide as their widest cell, two spaces between them."""

from collections.abc import Sequence

__all__ = ["table"]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str = "") -> str:
    """The lines of a table. `align` has a `<` or `>` a column; columns beyond it go to the left. No header: no line."""
    lines = [header, *rows] if header else [*rows]
    if not lines:
        return ""
    sides = align.ljust(len(lines[0]), "<")
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    shape = list(zip(sides, widths, strict=True))
    texts = (
        "  ".join(f"{cell:{side}{width}}" for cell, (side, width) in zip(line, shape, strict=True)) for line in lines
    )
    return "\n".join(text.rstrip() for text in texts)
