"""Packages that many tests read. Exported once a run, shared by all workers; a test that changes one copies it
first."""

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# A busy box is no reason to fail: time is not what the properties are about.
settings.register_profile("house", deadline=None)
settings.load_profile("house")

GOLDENS = Path(__file__).parent / "goldens"
RECIPES = ("fp32", "int8", "int4")


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of a run have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def own_cache(shared_folder: Path) -> Iterator[None]:
    """Prepared copies that whoever runs the tests may have are of no matter here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLMPORT_CACHE", str(shared_folder / "prepared"))
        yield


@pytest.fixture(scope="session")
def package_tiny_a(shared_folder: Path) -> Path:
    """Package of the golden checkpoint tiny_a (untied head, GQA) with fp32, int8 and int4."""
    return exported(GOLDENS / "qwen2_5_vl" / "tiny_a", shared_folder)


@pytest.fixture(scope="session")
def package_tiny_b(shared_folder: Path) -> Path:
    """Package of the golden checkpoint tiny_b (tied head, one key/value head) with fp32, int8 and int4."""
    return exported(GOLDENS / "qwen2_5_vl" / "tiny_b", shared_folder)


@pytest.fixture(scope="session")
def package_of(shared_folder: Path) -> Callable[[Path], Path]:
    """Package of any golden checkpoint with fp32, int8 and int4."""
    return functools.partial(exported, folder=shared_folder)


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three samples with a picture and an answer each, one of text alone."""
    import json

    from vlmport.validate.samples import draw_picture

    folder = tmp_path_factory.mktemp("calibration")
    lines = []
    for number, (width, height) in enumerate([(84, 56), (56, 112), (112, 84)]):
        draw_picture(number, width, height).save(folder / f"{number}.png")
        content = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": "What is it?"}]
        lines.append({"id": str(number), "messages": [{"role": "user", "content": content}], "answers": ["a house"]})
    lines.append({"id": "text", "messages": [{"role": "user", "content": "Say something."}]})
    (folder / "samples.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return folder


def exported(checkpoint: Path, folder: Path) -> Path:
    import fcntl

    from vlmport.export.build import export_checkpoint
    from vlmport.quant.recipe import load_recipe

    name = f"{checkpoint.parent.name}-{checkpoint.name}"
    package = folder / f"package-{name}"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first worker exports, the others wait for it
        if not package.exists():
            staged = folder / f"staged-{name}"
            export_checkpoint(checkpoint, staged, [load_recipe(name) for name in RECIPES])
            staged.rename(package)
    return package
