"""What the documents say is so: the file tree, the fields of the formats, the names of commands and targets."""

import dataclasses
import re

import pytest
from layering import ROOT
from readme_tree import README, between_marks, with_tree

from vlmport.cli.main import COMMANDS
from vlmport.export.family import FamilySpec, ManifestParts, RoleSpec
from vlmport.runtime import manifest

DOCUMENTS = sorted([README, *(ROOT / "docs").glob("*.md")])


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_file_tree_of_the_readme_is_the_tree() -> None:
    text = read("README.md")
    assert between_marks(text) == between_marks(with_tree(text)), "run `make readme`"


@pytest.mark.parametrize("part", [FamilySpec, RoleSpec])
def test_every_field_of_a_family_is_explained(part: type) -> None:
    text = read("docs/add-a-family.md")
    assert [f.name for f in dataclasses.fields(part) if f"`{f.name}`" not in text] == []


def test_every_manifest_part_is_named_to_family_writers() -> None:
    text = read("docs/add-a-family.md")
    assert [f.name for f in dataclasses.fields(ManifestParts) if f.name not in text] == []


def test_every_field_of_the_manifest_is_explained() -> None:
    text = read("docs/package-format.md")
    parts = [part for name in manifest.__all__ if dataclasses.is_dataclass(part := getattr(manifest, name))]
    assert len(parts) > 10
    missing = [
        f"{part.__name__}.{f.name}" for part in parts for f in dataclasses.fields(part) if f"`{f.name}`" not in text
    ]
    assert missing == []
    assert f"`{manifest.SCHEMA}`" in text
    assert [role for role in manifest.ROLES if f"`{role}`" not in text] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_paths_lead_somewhere(document: object) -> None:
    text = read(str(document))
    folder = README.parent if document == README else ROOT / "docs"
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    assert [link for link in links if not (folder / link).exists()] == []
    paths = re.findall(r"`((?:runtime|quant|export|validate|cli|tests|docs|examples|benchmarks)/[\w./]*)`", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_and_targets_exist(document: object) -> None:
    text = read(str(document))
    code = "\n".join(re.findall(r"`+([^`]+)`+", text))
    assert set(re.findall(r"^\s*vlmport ([a-z]+)", code, re.MULTILINE)) <= set(COMMANDS)
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    assert set(re.findall(r"^\s*make ([a-z-]+)", code, re.MULTILINE)) <= targets
