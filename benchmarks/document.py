"""Tables of a benchmark inside a document, between two marks."""

from pathlib import Path

from vlmport.runtime.errors import InputError

__all__ = ["put_between"]


def put_between(document: Path, name: str, text: str) -> None:
    """Replaces what stands between <!-- name --> and <!-- /name -->. Raises InputError where they are not there."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, found, rest = document.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise InputError(f"{document}: has no {begin.strip()} ... {end} to put the tables between; add the two lines")
    document.write_text(f"{before}{begin}{text}{end}{after}", encoding="utf-8")
