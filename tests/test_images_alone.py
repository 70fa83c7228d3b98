"""Packages without a decoder: sizes, token dropping, the commands, and golden cases that have to fail."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file, save_file

from vlmport.cli.main import main
from vlmport.export.families.navit import FAMILY
from vlmport.runtime import load
from vlmport.runtime.errors import InputError, PackageError
from vlmport.runtime.image import ImageOptions, native_size, preprocess_images
from vlmport.runtime.model import Model
from vlmport.runtime.token_drop import keep_patches
from vlmport.validate.golden import load_golden
from vlmport.validate.samples import draw_picture

GOLDENS = Path(__file__).parent / "goldens" / "navit"
TINY_A, TINY_B = GOLDENS / "tiny_a", GOLDENS / "tiny_b"
CONFIG = json.loads((TINY_A / "config.json").read_text(encoding="utf-8"))
NOISE = 2e-5  # float32, on activations of unit scale


@pytest.fixture(scope="module")
def package(package_of) -> Path:
    return package_of(TINY_A)


@pytest.fixture(scope="module")
def model(package):
    with load(package) as opened:
        yield opened


def inputs(name: str = "a") -> Path:
    return next((TINY_A / "inputs").glob(f"{name}_*.png"))


def spec_of(**changes: Any):
    return FAMILY.manifest({**CONFIG, **changes}, {}).image


PICTURES = [
    draw_picture(seed, 16 * width, 16 * height)
    for seed, (width, height) in enumerate([(1, 1), (3, 4), (8, 2), (1, 16), (5, 5), (16, 1), (2, 7), (6, 6)])
]


@pytest.fixture(scope="module")
def alone(model) -> list[tuple[np.ndarray, np.ndarray]]:
    found = [model.encode_images([picture]) for picture in PICTURES]
    return [(one.embeddings[0], one.logits[0]) for one in found]


# Sizes


@example(height=60, width=1500, budget=4096)  # shrunk, its short side is less than a patch
@given(height=st.integers(1, 3000), width=st.integers(1, 3000), budget=st.none() | st.integers(4096, 65536))
def test_sizes_are_whole_patches_inside_the_tables(height, width, budget):
    spec = spec_of(image_size=[256, 512])
    limit = budget or spec.max_pixels
    if max(height, width) > 16 * min(height, width):
        with suppress(InputError):  # too narrow: refused, or just not
            assert np.prod(native_size(height, width, spec, spec.min_pixels, limit)) <= limit
        return
    rows, columns = native_size(height, width, spec, spec.min_pixels, limit)
    assert rows % 16 == columns % 16 == 0
    assert 16 <= rows <= 256
    assert 16 <= columns <= 512
    assert rows * columns <= limit
    if height % 16 == width % 16 == 0 and height <= 256 and width <= 512 and height * width <= limit:
        assert (rows, columns) == (height, width)
    if min(rows, columns) >= 128 and budget is None:  # rounding to patches bends the shape by no more than this
        assert abs(np.log((rows / columns) / (height / width))) < 0.15


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((64, 48), (4, 3)),  # whole patches: kept
        ((70, 50), (4, 3)),  # to the nearest
        ((1024, 512), (16, 8)),  # too large: shrunk in shape
        ((4, 4), (1, 1)),  # less than a patch: grown
        ((5, 40), (1, 8)),
    ],
)
def test_some_sizes(size, expected):
    picture = Image.new("RGB", (size[1], size[0]), (10, 200, 30))
    patches = preprocess_images([picture], spec_of())
    assert patches.grid[1:] == expected
    assert np.ptp(patches.pixel_values.reshape(-1, 3, 256), axis=-1).max() == 0  # of one colour, as it was


def test_a_hair_of_an_image_is_refused_in_one_line(model, tmp_path):
    Image.new("RGB", (5200, 4)).save(tmp_path / "hair.png")
    with pytest.raises(InputError, match=r"hair.png: 5200x4 is too narrow.*crop or pad it") as caught:
        model.encode_images([tmp_path / "hair.png"])
    assert "\n" not in str(caught.value)


def test_a_budget_of_pixels(model):
    found = model.encode_images([draw_picture(1, 256, 128)], max_pixels=64 * 256)
    assert found.num_patches[0] <= 64
    assert found.grids[0][1] / found.grids[0][0] == pytest.approx(2, rel=0.2)
    with pytest.raises(InputError, match="max_pixels is 0"):
        preprocess_images([PICTURES[0]], spec_of(), ImageOptions(max_pixels=0))


# Token dropping


def test_token_dropping_is_off_and_seeded(model):
    whole, again = (model.encode_images(PICTURES) for _ in range(2))
    np.testing.assert_array_equal(whole.embeddings, again.embeddings)
    assert whole.num_patches == tuple(rows * columns for rows, columns in whole.grids)
    first, same, other = (model.encode_images(PICTURES, token_drop=0.5, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.embeddings, same.embeddings)
    assert np.abs(first.embeddings - other.embeddings).max() > 1e-3
    assert first.num_patches == tuple(max(1, num // 2) for num in whole.num_patches)


def test_a_rate_an_image(model):
    found = model.encode_images(PICTURES[1:4], token_drop=[0.0, 0.25, 0.9], seed=0)
    assert found.num_patches == (12, 12, 1)
    np.testing.assert_allclose(found.embeddings[0], model.encode_images(PICTURES[1:2]).embeddings[0], atol=NOISE)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(seed=st.integers(0, 1000))
def test_order_of_patches_does_not_matter(model, alone, seed):
    """All patches kept in another order carry their places with them: the same image."""
    patches = preprocess_images([PICTURES[6]], model.manifest.image)
    order = np.random.default_rng(seed).permutation(patches.num_patches)
    found = model.encode_patches([keep_patches(patches, order)])
    np.testing.assert_allclose(found.embeddings[0], alone[6][0], atol=NOISE)


@pytest.mark.parametrize("rate", [1.0, -0.1, 2.0, float("nan")])
def test_rates_that_cannot_be(model, rate):
    with pytest.raises(InputError, match="token_drop"):
        model.encode_images(PICTURES[:1], token_drop=rate)
    with pytest.raises(InputError, match="2 rates for 1 images"):
        model.encode_images(PICTURES[:1], token_drop=[0.1, 0.2])


@pytest.mark.parametrize("indices", [[], [12], [-1], [0, 0], [[0]]])
def test_indices_that_cannot_be(model, indices):
    patches = preprocess_images([PICTURES[1]], model.manifest.image)
    with pytest.raises(InputError, match="keep_indices"):
        keep_patches(patches, indices)


# Commands


def test_run_gives_class_scores_of_each_image(package, capsys):
    files = [str(inputs(name)) for name in "abe"]
    assert main(["run", str(package), "--image", *files, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [image["image"] for image in answer["images"]] == files
    assert answer["num_calls"] == 1
    golden = load_golden(TINY_A)
    logits = golden.tensors["packed_rows/logits"]
    for image, row in zip(answer["images"], (0, 1, 4), strict=True):
        np.testing.assert_allclose(image["scores"], logits[row], atol=1e-4)
        assert image["class"] == logits[row].argmax()
    assert main(["run", str(package), "--image", files[0]]) == 0
    printed = capsys.readouterr().out
    assert f"{logits[0].argmax()}: {logits[0].max():.3f}" in printed
    assert main(["run", str(package), "--image", files[0], "--embedding"]) == 0
    assert "64 values" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["What is it?", "--image", "a.png"], "PROMPT: "),
        (["--image", "a.png", "--temperature", "0"], "--temperature: "),
        (["--image", "a.png", "--video", "b.mp4"], "--video: "),
        ([], "--image: missing"),
        (["--image", "none.png"], "none.png: cannot be read"),
        (["--image", "a.png", "--max-patches", "0"], "max_patches: 0"),
        (["--image", "a.png", "--token-drop", "1"], "token_drop: 1.0"),
    ],
)
def test_what_run_refuses(package, arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    PICTURES[0].save("a.png")
    assert main(["run", str(package), *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_a_package_that_answers_prompts_has_no_use_for_these(package_tiny_b, capsys):
    assert main(["run", str(package_tiny_b), "What?", "--token-drop", "0.5"]) == 2
    assert "--token-drop" in capsys.readouterr().err
    assert main(["run", str(package_tiny_b)]) == 2
    assert "PROMPT: missing" in capsys.readouterr().err
    with load(package_tiny_b) as opened, pytest.raises(PackageError, match="answers prompts"):
        opened.encode_images(PICTURES[:1])


def test_a_prompt_to_a_package_that_sees_only(model: Model):
    with pytest.raises(PackageError) as caught:
        model.generate([{"role": "user", "content": "Hello"}])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("images", [[], "a.png", b"png"])
def test_images_have_to_be_a_list(model, images):
    with pytest.raises(InputError, match="at least one image"):
        model.encode_images(images)


def test_validate_verify_inspect_and_bench(package, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(TINY_A), "-o", "package", "--recipe", "fp32", "int8"]) == 0
    assert main(["verify", "package"]) == 0
    assert "classes" in capsys.readouterr().out
    assert main(["validate", "package", "--reference", str(TINY_A), "--variant", "fp32", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = {row["stage"]: row for row in report["variants"][0]["rows"]}
    assert {"vision", "pooled", "logits"} <= set(rows)
    assert rows["logits"]["values"]["max_abs"] < 1e-4
    assert main(["validate", "package", "--reference", str(TINY_A), "--task", "."]) == 2
    assert main(["inspect", "package"]) == 0
    assert "classifier" in capsys.readouterr().out
    assert main(["bench", "package", "--variant", "fp32", "--repeats", "1", "--json"]) == 0
    speed = json.loads(capsys.readouterr().out)["variants"]["fp32"]
    assert (speed["one"]["num_images"], speed["packed"]["num_images"]) == (1, 8)
    assert speed["packed"]["images_per_second"]["median"] > 0


# Golden comparisons that have to fail


@pytest.mark.parametrize(
    ("change", "stage"),
    [
        (lambda case: case["request"]["rows"].reverse(), "pixel_values (sha256)"),
        (lambda case: case["request"]["options"].update(group_max_seq_len=64), "rows"),
        (lambda case: case["request"]["options"].update(no_such_option=1), "request"),
        (lambda case: case["request"].update(rows=[["inputs/../x.png"]]), "request"),
        (lambda case: case["request"].update(rows=[]), "request"),
        (lambda case: case["request"]["options"].update(keep_indices=[[0]]), "request"),
    ],
)
def test_wrong_requests_fail(change, stage, package, tmp_path):
    folder = Path(shutil.copytree(TINY_A, tmp_path / "golden"))
    document = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    case = document["cases"]["auto_group"]
    change(case)
    document["cases"] = {"auto_group": case}
    (folder / "expected.json").write_text(json.dumps(document), encoding="utf-8")
    assert stage in failed_stages(package, folder)


@pytest.mark.parametrize("stage", ["hidden", "pooled", "logits", "attn_mask", "pool_mask", "pixel_values"])
def test_one_wrong_value_fails_its_stage_alone(stage, package, tmp_path):
    folder = Path(shutil.copytree(TINY_A, tmp_path / "golden"))
    tensors = load_file(folder / "expected.safetensors")
    key = "single/patches" if stage == "pixel_values" else f"single/{stage}"
    wrong = tensors[key].copy()
    wrong.flat[wrong.size // 2] += 1 if wrong.dtype == np.uint8 else 2e-4
    save_file({**tensors, key: wrong}, folder / "expected.safetensors")
    assert failed_stages(package, folder) == [stage]


def test_padding_of_rows_is_not_compared(package, tmp_path):
    folder = Path(shutil.copytree(TINY_A, tmp_path / "golden"))
    tensors = load_file(folder / "expected.safetensors")
    tensors["packed_rows/hidden"] = tensors["packed_rows/hidden"].copy()
    tensors["packed_rows/hidden"][0, 28:] = 1e6
    save_file(tensors, folder / "expected.safetensors")
    assert failed_stages(package, folder) == []


def failed_stages(package: Path, folder: Path) -> list[str]:
    from vlmport.runtime.package import Package
    from vlmport.validate.gates import default_gates
    from vlmport.validate.run_golden import validate_golden

    report = validate_golden(Package.open(package), [load_golden(folder)], ["fp32"], default_gates(), lambda *_: None)
    return [row.stage for row in report.variants[0].rows if row.outcome == "FAIL"]
