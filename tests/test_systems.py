"""The README's table of systems says what families, manifests and golden cases show."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from layering import ROOT

from vlmport.export.checkpoint import Checkpoint
from vlmport.export.family import families, family_of

GOLDENS = Path(__file__).parent / "goldens"
HEAD = ("System", "Family", "Export", "Image", "Multi-image", "Video", "int8", "int4", "Golden")


def table() -> list[dict[str, str]]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.split("<!-- systems -->")[1].split("<!-- /systems -->")[0]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in block.strip().splitlines())
    assert tuple(head) == HEAD
    return [dict(zip(head, row, strict=True)) for row in rows]


ROWS = {row["Family"].strip("`"): row for row in table() if row["Family"]}


def visuals(value: Any) -> Iterator[str]:
    """ "image" or "video" for each that a request shows, wherever it stands."""
    if isinstance(value, Mapping):
        if value.get("type") in ("image", "video"):
            yield value["type"]
        else:
            for each in value.values():
                yield from visuals(each)
    elif isinstance(value, list):
        for each in value:
            yield from visuals(each)
    elif isinstance(value, str) and value.endswith(".png"):
        yield "image"


def shown() -> dict[str, list[list[str]]]:
    """By family: what each of its golden cases shows."""
    found: dict[str, list[list[str]]] = {}
    for file in sorted(GOLDENS.glob("*/*/expected.json")):
        config = json.loads((file.parent / "config.json").read_text(encoding="utf-8"))
        module = re.sub(r"\W", "_", family_of(config, file).name)
        cases = json.loads(file.read_text(encoding="utf-8"))["cases"].values()
        found.setdefault(module, []).extend(list(visuals(case["request"])) for case in cases)
    return found


SHOWN = shown()


def cell(is_so: bool) -> str:
    return "yes" if is_so else "no"


def test_every_family_has_one_row_and_every_row_a_family() -> None:
    named = [row["Family"].strip("`") for row in table() if row["Family"]]
    assert sorted(named) == sorted(families())
    assert set().union(*(set(row.values()) for row in ROWS.values())) - {"yes", "no"} == {
        value for row in ROWS.values() for value in (row["System"], row["Family"])
    }


def test_a_system_without_a_family_is_promised_nothing_and_explained() -> None:
    text = (ROOT / "docs" / "systems.md").read_text(encoding="utf-8")
    for row in table():
        if not row["Family"]:
            assert set(list(row.values())[2:]) == {"no"}
            assert [name for name in row["System"].split(", ") if f"| {name}" not in text] == []


@pytest.mark.parametrize("family", sorted(ROWS))
def test_cells_say_what_golden_cases_show(family: str) -> None:
    row, cases = ROWS[family], SHOWN.get(family, [])
    assert row["Golden"] == cell(bool(cases))
    if cases:  # of each, the suite makes and validates a package with fp32, int8 and int4 (test_golden)
        assert (row["Export"], row["int8"], row["int4"]) == ("yes", "yes", "yes")
        assert row["Image"] == cell(any("image" in case for case in cases))
        assert row["Multi-image"] == cell(any(case.count("image") > 1 for case in cases))
        assert row["Video"] == cell(any("video" in case for case in cases))


@pytest.mark.parametrize("folder", sorted(file.parent for file in GOLDENS.glob("*/*/expected.json")), ids=str)
def test_video_is_what_the_manifest_says(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    family = family_of(checkpoint.config, folder)
    parts = family.manifest(checkpoint.config, checkpoint.documents)
    row = ROWS[re.sub(r"\W", "_", family.name)]
    assert (row["Image"], row["Video"]) == (cell(parts.image is not None), cell(parts.video is not None))
