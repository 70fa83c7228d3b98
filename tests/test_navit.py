"""NaViT: inner values of the family's modules against upstream's, packing that no image notices, positions,
checkpoints that cannot be."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import edited
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from vlmport.cli.main import main
from vlmport.export.build import export_checkpoint
from vlmport.export.checkpoint import Checkpoint
from vlmport.export.families._navit_modules import PositionTable
from vlmport.export.families.navit import FAMILY
from vlmport.quant.recipe import load_recipe
from vlmport.runtime import load
from vlmport.runtime.errors import CapacityError, CheckpointError
from vlmport.runtime.image import Patches, load_image, preprocess_images
from vlmport.runtime.token_drop import keep_patches
from vlmport.runtime.vision_inputs import patch_fractions, patch_fractions_by_longest, patch_positions
from vlmport.validate.eager import eager_modules
from vlmport.validate.eager_images import EagerImages
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


# The modules, tied to upstream by its inner values too


@pytest.mark.parametrize("folder", [TINY_A, TINY_B], ids=lambda folder: folder.name)
def test_inner_values_are_upstream_s(folder):
    """patch_embed and tokens_in, which no graph gives: caught in the modules, image by image."""
    golden = load_golden(folder)
    reference = EagerImages(Checkpoint.open(folder), FAMILY)
    encoder: Any = reference._modules["vision_encoder"]
    seen: dict[str, torch.Tensor] = {}
    encoder.patch_embed.register_forward_hook(lambda _m, _a, out: seen.update(patch_embed=out))
    encoder.layers[0].register_forward_pre_hook(lambda _m, args: seen.update(tokens_in=args[0]))
    image = FAMILY.manifest(json.loads((folder / "config.json").read_text(encoding="utf-8")), {}).image
    compared = 0
    for name, case in golden.cases.items():
        kept = iter(case.request["options"].get("keep_indices", []))
        for number, row in enumerate(case.request["rows"]):
            start = 0
            for file in row:
                patches = preprocess_images([load_image(folder / file)], image)
                if indices := next(kept, None):
                    patches = keep_patches(patches, indices)
                reference.encode(patches)
                stop = start + len(patches.pixel_values)
                for stage, found in seen.items():
                    expected = golden.tensors[f"{name}/{stage}"][number, start:stop]
                    np.testing.assert_allclose(found.numpy(), expected, atol=NOISE)
                    compared += 1
                start = stop
    assert compared >= 12


def test_a_head_of_zeros_is_not_nan():
    """Queries and keys are divided by no less than 1e-12: a blank image through weights of zero stays finite."""
    modules = eager_modules(Checkpoint.open(TINY_A), FAMILY)
    attention: Any = modules["projector"].attention
    found = attention.q_norm(torch.zeros(2, 64))
    assert torch.equal(found, torch.zeros(2, 64))


# Packing


PICTURES = [
    draw_picture(seed, 16 * width, 16 * height)
    for seed, (width, height) in enumerate([(1, 1), (3, 4), (8, 2), (1, 16), (5, 5), (16, 1), (2, 7), (6, 6)])
]


@pytest.fixture(scope="module")
def alone(model) -> list[tuple[np.ndarray, np.ndarray]]:
    found = [model.encode_images([picture]) for picture in PICTURES]
    return [(one.embeddings[0], one.logits[0]) for one in found]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    order=st.lists(st.integers(0, len(PICTURES) - 1), min_size=1, max_size=24),
    max_patches=st.none() | st.integers(36, 200),
)
def test_an_image_does_not_notice_its_neighbours(model, alone, order, max_patches):
    found = model.encode_images([PICTURES[number] for number in order], max_patches=max_patches)
    assert found.logits is not None
    assert (found.num_calls == 1) or max_patches is not None
    for row, number in enumerate(order):
        np.testing.assert_allclose(found.embeddings[row], alone[number][0], atol=NOISE)
        np.testing.assert_allclose(found.logits[row], alone[number][1], atol=NOISE)


def test_neighbours_of_wild_values_are_not_noticed_either(model, alone):
    """What leaks is seen at once when the neighbour is a thousand times larger."""
    patches = preprocess_images([PICTURES[1]], model.manifest.image)
    wild = Patches(np.random.default_rng(0).standard_normal((36, 768)).astype(np.float32) * 1e3, (1, 6, 6))
    found = model.encode_patches([wild, patches, wild])
    np.testing.assert_allclose(found.embeddings[1], alone[1][0], atol=NOISE)


@pytest.mark.parametrize("variant", ["int8", "int4"])
def test_packing_does_not_change_quantized_variants_beyond_their_own_noise(package, variant):
    with load(package, variant) as opened:
        together = opened.encode_images(PICTURES)
        for row, picture in enumerate(PICTURES):
            one = opened.encode_images([picture])
            assert np.linalg.norm(together.embeddings[row] - one.embeddings[0]) < 0.05 * np.linalg.norm(one.embeddings)


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30), limit=st.integers(40, 100))
def test_calls_are_filled_in_order(sizes, limit):
    from vlmport.runtime.encode import next_fit

    groups = next_fit(sizes, limit)
    assert [number for group in groups for number in group] == list(range(len(sizes)))
    filled = [sum(sizes[number] for number in group) for group in groups]
    assert max(filled) <= limit
    assert all(total + sizes[after.start] > limit for total, after in zip(filled, groups[1:], strict=False))


def test_an_image_over_the_limit_of_a_call_is_told(model):
    with pytest.raises(CapacityError, match=r"images\[1\]: 36 patches are over max_patches 35"):
        model.encode_images([PICTURES[0], PICTURES[7]], max_patches=35)
    assert model.encode_images([PICTURES[7], PICTURES[7]], max_patches=72).num_calls == 1  # exactly full still fits


# Positions


def test_fractions_of_positions():
    grids = [(1, 2, 4), (1, 1, 1)]
    spec = FAMILY.manifest({**CONFIG, "position_coordinates": "fractional"}, {}).vision
    rows, columns = patch_fractions(spec, grids).T
    np.testing.assert_allclose(rows, [0, 0, 0, 0, 0.5, 0.5, 0.5, 0.5, 0])
    np.testing.assert_allclose(columns, [0, 0.25, 0.5, 0.75, 0, 0.25, 0.5, 0.75, 0])
    rows, columns = patch_fractions_by_longest(spec, grids).T
    np.testing.assert_allclose(rows, [0, 0, 0, 0, 0.25, 0.25, 0.25, 0.25, 0])
    np.testing.assert_allclose(columns, [0, 0.25, 0.5, 0.75, 0, 0.25, 0.5, 0.75, 0])
    assert patch_positions(spec, grids).tolist()[4:6] == [[1, 0], [1, 1]]


def test_fractions_read_a_table_by_linear_interpolation():
    table = PositionTable(5, 2)
    table.table.data = torch.tensor([[0.0, 10.0], [1.0, 8.0], [4.0, 8.0], [4.0, 0.0], [5.0, 5.0]])
    found = table(torch.tensor([0.0, 0.125, 0.25, 0.625, 1.0]))
    torch.testing.assert_close(found, torch.tensor([[0, 10], [0.5, 9], [1, 8], [4, 4], [5, 5]]))
    torch.testing.assert_close(table(torch.tensor([0, 4])), torch.tensor([[0.0, 10], [5, 5]]))


@pytest.mark.parametrize(
    ("coordinates", "port", "dtype"),
    [
        ("absolute", "patch_positions", "int64"),
        ("fractional", "patch_fractions", "float32"),
        ("fractional_longest", "patch_fractions_by_longest", "float32"),
    ],
)
def test_the_graph_takes_what_the_runtime_makes(coordinates, port, dtype):
    config = {**CONFIG, "position_coordinates": coordinates}
    found = {p.name: p.dtype for p in FAMILY.roles(config)["vision_encoder"].inputs}
    assert found[port] == dtype
    assert FAMILY.manifest(config, {}).vision.inputs == (port, "cu_seqlens")


def test_a_package_with_fractional_positions(tmp_path):
    """Runs as its modules do, packed or alone; and it is not what absolute positions give."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    shutil.copy(TINY_A / "model.safetensors", folder)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "position_coordinates": "fractional"}), encoding="utf-8")
    made = export_checkpoint(folder, tmp_path / "package", [load_recipe("fp32")])
    reference = EagerImages(Checkpoint.open(folder), FAMILY)
    absolute = EagerImages(Checkpoint.open(TINY_A), FAMILY)
    with load(made.path) as opened:
        patches = [preprocess_images([picture], opened.manifest.image) for picture in PICTURES]
        found = opened.encode_patches(patches)
    for row, item in enumerate(patches):
        np.testing.assert_allclose(found.embeddings[row], reference.encode(item).pooled[0], atol=NOISE)
    other = absolute.encode(patches[2]).pooled[0]
    assert np.abs(found.embeddings[2] - other).max() > 1e-2


# Checkpoints


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("image_size", 250, "image_size is 250; its sides have to be multiples of patch_size 16"),
        ("image_size", [256, 0], r"image_size is \[256, 0\]"),
        ("image_size", [256], r"image_size is \[256\], expected 2 integers"),
        ("channels", 1, "channels is 1; images have 3"),
        ("heads", 0, "heads is 0"),
        ("dim", None, "dim is missing"),
        ("num_classes", None, "num_classes is missing"),
        ("position_coordinates", "fourier", "position_coordinates is 'fourier'; known are absolute"),
    ],
)
def test_configurations_that_cannot_be(path, value, told):
    with pytest.raises(CheckpointError, match=f"config.json: {told}"):
        FAMILY.roles(edited(CONFIG, path, value))


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "input_normalization is missing"),
        ({"mean": [0, 0, 0]}, "input_normalization: std is missing"),
        ({"mean": [0, 0], "std": [1, 1, 1]}, "mean is .*expected 3 numbers"),
        ({"mean": [0, 0, 0], "std": [1, 1, 1], "scale": "half"}, "scale is 'half'"),
    ],
)
def test_normalisation_has_to_be_said(value, told):
    with pytest.raises(CheckpointError, match=told):
        FAMILY.manifest(edited(CONFIG, "input_normalization", value), {})


def test_one_side_means_a_square_and_defaults_are_upstream_s():
    assert spec_of(image_size=224).max_sides == (224, 224)
    plain = {name: value for name, value in CONFIG.items() if name not in ("channels", "dim_head")}
    gain = FAMILY.roles(plain)["projector"].build().attention.q_norm.gamma
    assert gain.shape == (4, 64)


@pytest.fixture(scope="module")
def headless(tmp_path_factory):
    """A checkpoint that says it has no classes, its unused head left in the file."""
    folder = tmp_path_factory.mktemp("headless")
    shutil.copy(TINY_A / "model.safetensors", folder)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_classes": 0}), encoding="utf-8")
    return export_checkpoint(folder, folder / "package", [load_recipe("fp32")]).path


def test_without_a_head_there_are_embeddings(headless, model, capsys):
    with load(headless) as opened:
        assert "classifier" not in opened.manifest.roles
        found = opened.encode_images([inputs()])
    assert found.logits is None
    np.testing.assert_array_equal(found.embeddings, model.encode_images([inputs()]).embeddings)
    assert main(["run", str(headless), "--image", str(inputs()), "--json"]) == 0
    (image,) = json.loads(capsys.readouterr().out)["images"]
    assert len(image["embedding"]) == 64
    assert "scores" not in image


def test_a_buffer_of_the_norms_is_taken_as_it_is(tmp_path):
    """`beta` is zero in upstream's files; a file that says otherwise is believed, as upstream's loading does."""
    tensors = load_file(TINY_A / "model.safetensors")
    tensors["mlp_head.0.beta"] = np.ones_like(tensors["mlp_head.0.beta"])
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(TINY_A / "config.json", tmp_path)
    shifted, plain = (EagerImages(Checkpoint.open(folder), FAMILY) for folder in (tmp_path, TINY_A))
    patches = preprocess_images([PICTURES[1]], spec_of())
    expected = plain.encode(patches).logits + tensors["mlp_head.1.weight"].sum(axis=1)
    np.testing.assert_allclose(shifted.encode(patches).logits, expected, atol=NOISE)


def test_other_names_of_tensors_are_told(tmp_path):
    """The nested-tensor sibling has other names and another scale: it is refused, not run wrongly."""
    tensors = load_file(TINY_A / "model.safetensors")
    tensors["attn_pool.to_queries.weight"] = tensors.pop("attn_pool.to_q.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(TINY_A / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"missing attn_pool\.to_q\.weight.*unexpected attn_pool\.to_queries"):
        eager_modules(Checkpoint.open(tmp_path), FAMILY)
