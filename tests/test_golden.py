"""Golden folders: strict reading, and a comparison that finds what is wrong and says what it could not look at."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from golden_cases import keep_cases
from safetensors.numpy import load_file, save_file

from vlmport.cli.main import main
from vlmport.runtime.errors import InputError
from vlmport.runtime.package import Package
from vlmport.validate.compare import Comparison, compare_generation
from vlmport.validate.gates import default_gates
from vlmport.validate.golden import find_goldens, load_golden, request_messages
from vlmport.validate.run_golden import validate_golden

GOLDENS = Path(__file__).parent / "goldens" / "qwen2_5_vl"
NAMES = ("tiny_a", "tiny_b")
FOLDERS = find_goldens(GOLDENS.parent)


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(GOLDENS / "tiny_b", tmp_path / "golden"))


def edit(folder, change):
    file = folder / "expected.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    change(document)
    file.write_text(json.dumps(document), encoding="utf-8")


def quiet(_done, _total, _what):
    pass


def validated(package, folder, variant="fp32"):
    report = validate_golden(Package.open(package), [load_golden(folder)], [variant], default_gates(), quiet)
    return report.variants[0]


# Reading


@pytest.mark.parametrize("name", NAMES)
def test_published_folders_are_read_whole(name):
    golden = load_golden(GOLDENS / name)
    document = json.loads((GOLDENS / name / "expected.json").read_text(encoding="utf-8"))
    assert set(golden.cases) == set(document["cases"])
    assert set(golden.alternatives) == set(document["alternatives"])
    messages = [request_messages(golden, case) for case in golden.cases.values()]
    files = [part["image"] for message in messages for turn in message for part in turn["content"] if "image" in part]
    assert files
    assert all(Path(file).is_file() for file in files)


def test_a_root_gives_all_folders_below_it():
    assert [path.name for path in find_goldens(GOLDENS)] == list(NAMES)
    assert find_goldens(GOLDENS / "tiny_a") == (GOLDENS / "tiny_a",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(schema="vlmport-golden/2"), "vlmport-golden/2"),
        (lambda d: d.update(more=1), "'more'"),
        (lambda d: d.pop("cases"), "'cases'"),
        (lambda d: d["cases"]["multi_turn"].update(answer="x"), "multi_turn.*'answer'"),
        (lambda d: d["cases"]["multi_turn"]["stages"][0].update(dtype="F16"), "F16"),
        (lambda d: d["cases"]["multi_turn"]["stages"][0].update(shape=[1]), "JSON says"),
        (lambda d: d["cases"]["multi_turn"]["stages"][0].update(tensor="none"), "no tensor 'none'"),
        (lambda d: d["cases"]["multi_turn"]["stages"][0].update(index="0"), "index"),
        (lambda d: d["alternatives"]["repetition_penalty_1.05"]["cases"].update(x={}), "x"),
        (lambda d: d["alternatives"]["mrope_transformers_5.23.0"].update(tensors="../x.safetensors"), "file name"),
    ],
)
def test_what_the_schema_does_not_say_is_refused(folder, change, words):
    edit(folder, change)
    with pytest.raises(InputError, match=words) as caught:
        load_golden(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["../secret.png", "inputs/../../x.png", "/etc/passwd", "inputs", 7, None])
def test_inputs_stay_below_inputs(folder, path):
    def change(document):
        document["cases"]["multi_turn"]["request"]["messages"][0]["content"][0]["image"] = path

    edit(folder, change)
    golden = load_golden(folder)
    with pytest.raises(InputError, match="inputs"):
        request_messages(golden, golden.cases["multi_turn"])


def test_missing_and_damaged_files(folder, tmp_path):
    with pytest.raises(InputError, match="no golden folder"):
        find_goldens(folder / "inputs")
    with pytest.raises(InputError, match="no such folder"):
        find_goldens(tmp_path / "none")
    (folder / "expected_alt.safetensors").write_bytes(b"not")
    with pytest.raises(InputError, match="not a safetensors file"):
        load_golden(folder)
    (folder / "expected_alt.safetensors").unlink()
    with pytest.raises(InputError, match="missing"):
        load_golden(folder)
    (folder / "expected.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"expected\.json"):
        load_golden(folder)


# Comparing


@pytest.mark.parametrize("golden", FOLDERS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_float32_passes_every_case_of_every_family(golden, package_of):
    variant = validated(package_of(golden), golden)
    assert variant.outcome == "PASS", [row for row in variant.rows if row.outcome != "PASS"]
    assert all(row.values["max_abs"] <= 1e-4 for row in variant.rows if "max_abs" in row.values)
    rows = {row.stage: row for row in variant.rows}
    if any(case.generated_ids for case in load_golden(golden).cases.values()):
        assert rows["generated_ids"].values["match"] == 1.0
        assert rows["input_ids"].values["num_different"] == 0
    # `extra.*` are upstream's inner values; all else is there to be compared.
    # What a whole padded batch has, and what is hidden from all other tokens, one prompt alone has not.
    known = ("is of the padded batch as a whole", "upstream hides them")
    left = [record for record in variant.not_compared if not record.reason.startswith(known)]
    left_out = {record.stage for record in left if not record.stage.startswith("extra.")}
    assert left_out <= {"patch_embed", "tokens_in"}  # inner values of an encoder


@pytest.mark.parametrize("name", NAMES)
def test_float32_passes_every_published_case(name, request):
    variant = validated(request.getfixturevalue(f"package_{name}"), GOLDENS / name)
    rows = {row.stage: row for row in variant.rows}
    assert variant.outcome == "PASS", [row for row in variant.rows if row.outcome != "PASS"]
    floats = ("vision", "projector_image", "projector_video", "prefill_logits_last", "step_logits", "past_key.0")
    assert max(rows[stage].values["max_abs"] for stage in floats) <= 1e-4
    assert rows["generated_ids"].values["match"] == 1.0
    assert rows["pixel_values (sha256)"].values["num_different"] == 0
    assert {"position_ids", "image_grid_thw", "extra.window_index", "extra.cu_window_seqlens"} <= set(rows)
    golden = load_golden(GOLDENS / name)
    num_alternatives = sum(len(alternative.cases) for alternative in golden.alternatives.values())
    num_rows = sum(len(batch.rows) for batch in golden.batches.values())
    assert rows["generated_ids"].num_samples == len(golden.cases) + num_alternatives + num_rows


def test_what_is_not_compared_is_said_with_its_reason(package_tiny_a):
    variant = validated(package_tiny_a, GOLDENS / "tiny_a")
    said = {(record.stage, record.sample) for record in variant.not_compared}
    assert ("patch_embed", "image_exact") in said
    assert all(record.reason for record in variant.not_compared)
    named = {row.stage for row in variant.rows} | {stage for stage, _ in said}
    golden = load_golden(GOLDENS / "tiny_a")
    stages = {entry.stage for case in golden.cases.values() for entry in case.stages}
    assert stages - {"extra.generated_ids"} <= named  # the same ids are compared as generated_ids


@pytest.mark.parametrize("variant", ["int8", "int4"])
def test_quantized_variants_run_and_tell_their_true_numbers(variant, package_tiny_b):
    found = validated(package_tiny_b, GOLDENS / "tiny_b", variant)
    rows = {row.stage: row for row in found.rows}
    assert 1e-4 < rows["step_logits"].values["max_abs"] < 10
    assert rows["step_logits"].column == variant
    assert rows["pixel_values (sha256)"].outcome == "PASS"
    assert rows["generated_ids"].outcome is None  # reported, not judged: ids may differ


@pytest.mark.parametrize("stage", ["position_ids", "vision", "projector_image", "prefill_logits_last", "past_value.0"])
def test_one_wrong_value_fails_its_stage_alone(stage, folder, package_tiny_b):
    keep_cases(folder, "image_upscale")
    tensors = load_file(folder / "expected.safetensors")
    stages = load_golden(folder).cases["image_upscale"].stages
    key = next(entry.tensor for entry in stages if entry.stage == stage)
    wrong = tensors[key].copy()
    wrong.flat[wrong.size // 2] += 1 if wrong.dtype == np.int64 else 1.2e-4
    save_file({**tensors, key: wrong}, folder / "expected.safetensors")
    variant = validated(package_tiny_b, folder)
    assert [row.stage for row in variant.rows if row.outcome == "FAIL"] == [stage]
    assert variant.outcome == "FAIL"


@pytest.mark.parametrize(
    ("change", "stage"),
    [
        (lambda case: case["generated_ids"].__setitem__(15, 0), "generated_ids"),
        (lambda case: case["input_ids"].__setitem__(3, 0), "input_ids"),
        (lambda case: case["hashes"]["pixel_values"].update(sha256_f32="0" * 64), "pixel_values (sha256)"),
        (lambda case: case["request"]["messages"][0]["content"][0].update(image="inputs/none.png"), "request"),
        (lambda case: case["request"]["options"].update(no_such_option=1), "request"),
    ],
)
def test_ids_hashes_and_refused_requests_fail_too(change, stage, folder, package_tiny_b):
    keep_cases(folder, "image_upscale")
    edit(folder, lambda document: change(document["cases"]["image_upscale"]))
    variant = validated(package_tiny_b, folder)
    assert stage in [row.stage for row in variant.rows if row.outcome == "FAIL"]


def test_statistics_stand_in_for_a_tensor_that_is_not_stored(folder, package_tiny_b):
    keep_cases(folder, "image_upscale")
    golden = load_golden(folder)
    entry = next(entry for entry in golden.cases["image_upscale"].stages if entry.stage == "vision")
    array = golden.tensors[entry.tensor].astype(np.float64)

    def change(document):
        case = document["cases"]["image_upscale"]
        case["stages"] = [stage for stage in case["stages"] if stage["stage"] != "vision"]
        numbers = {"mean": array.mean(), "std": array.std(), "min": array.min(), "max": array.max()}
        case["hashes"]["vision"] = {"stage": "vision", "modality": "image", "shape": list(array.shape), **numbers}

    edit(folder, change)
    rows = {row.stage: row for row in validated(package_tiny_b, folder).rows}
    assert rows["vision (mean, std, min, max)"].outcome == "PASS"
    edit(folder, lambda d: d["cases"]["image_upscale"]["hashes"]["vision"].update(max=array.max() + 1e-2))
    rows = {row.stage: row for row in validated(package_tiny_b, folder).rows}
    assert rows["vision (mean, std, min, max)"].outcome == "FAIL"
    edit(
        folder,
        lambda d: [d["cases"]["image_upscale"]["hashes"]["vision"].pop(k) for k in ("mean", "std", "min", "max")],
    )
    edit(folder, lambda d: d["cases"]["image_upscale"]["hashes"]["vision"].update(sha256_f32="0" * 64))
    said = {record.stage: record.reason for record in validated(package_tiny_b, folder).not_compared}
    assert "no bits to compare" in said["vision (hash)"]


def test_statistics_of_logits_and_their_shape(folder, package_tiny_b):
    keep_cases(folder, "image_upscale")
    golden = load_golden(folder)
    entry = next(entry for entry in golden.cases["image_upscale"].stages if entry.stage == "prefill_logits_last")
    array = golden.tensors[entry.tensor].astype(np.float64)
    shape = list(array.shape)

    def change(document):
        case = document["cases"]["image_upscale"]
        case["stages"] = [stage for stage in case["stages"] if stage["stage"] != entry.stage]
        case["hashes"]["last"] = {"stage": entry.stage, "shape": shape, "mean": array.mean(), "max": array.max()}

    edit(folder, change)
    rows = {row.stage: row for row in validated(package_tiny_b, folder).rows}
    assert rows["prefill_logits_last (mean, max)"].outcome == "PASS"
    edit(folder, lambda d: d["cases"]["image_upscale"]["hashes"]["last"].update(shape=[1, *shape]))
    rows = {row.stage: row for row in validated(package_tiny_b, folder).rows}
    assert rows["prefill_logits_last (hash)"].outcome == "FAIL"


def test_unknown_alternatives_and_other_kinds_of_requests_are_listed(folder, package_tiny_b):
    def change(document):
        penalty = document["alternatives"].pop("repetition_penalty_1.05")
        document["alternatives"] = {"temperature_2": penalty}
        case = document["cases"]["image_upscale"]
        for key in ("input_ids", "generation", "generated_ids"):
            case.pop(key)
        case["request"] = {"rows": [["inputs/t1_70x150.png"]], "options": {}}
        document["cases"] = {"image_upscale": case}
        document["alternatives"]["temperature_2"]["cases"] = {}

    edit(folder, change)
    variant = validated(package_tiny_b, folder)
    assert {record.sample for record in variant.not_compared} == {"image_upscale", "temperature_2"}
    assert variant.rows == ()
    assert variant.outcome == "FAIL"  # nothing was compared


def test_where_ids_part_first_decides():
    logits = np.zeros((3, 4))
    logits[:, 1] = [1.0, 0.05, 1.0]
    same = compare_generation("s", (1, 1, 1), (1, 1, 1), logits, 0.1)
    tie = compare_generation("s", (1, 1, 1), (1, 2, 2), logits, 0.1)
    error = compare_generation("s", (1, 1, 1), (2, 1, 1), logits, 0.1)
    shorter = compare_generation("s", (1, 1, 1), (1, 1), logits, 0.1)
    assert same.choices.same[0]
    assert not tie.choices.same[0]
    assert tie.choices.tie[0]
    assert "step 1" in tie.note
    assert not error.choices.tie[0]
    assert not shorter.choices.same[0]
    assert shorter.num_different == 1
    assert isinstance(same, Comparison)


# The command


def test_the_command_prints_a_row_a_stage_and_its_status(package_tiny_b, folder, tmp_path, capsys):
    package = shutil.copytree(package_tiny_b, tmp_path / "package")
    keep_cases(folder, "image_upscale")
    arguments = ["validate", str(package), "--golden", str(folder), "--report", str(tmp_path / "report")]
    assert main(arguments) == 0  # of the first variant alone
    printed = capsys.readouterr().out
    assert "max abs" in printed
    assert "min cosine" in printed
    assert "fp32: PASS" in printed
    assert "int4" not in printed
    edit(folder, lambda document: document["cases"]["image_upscale"]["generated_ids"].__setitem__(0, 0))
    assert main([*arguments, "--variant", "fp32", "int8", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["outcome"] == "FAIL"
    assert [variant["name"] for variant in document["variants"]] == ["fp32", "int8"]


def test_only_folders_of_the_package_s_own_checkpoint_count(package_tiny_b, folder, tmp_path, capsys):
    package = shutil.copytree(package_tiny_b, tmp_path / "package")
    keep_cases(folder, "image_upscale")
    root = folder.parent / "root"
    root.mkdir()
    for name in ("one", "two"):
        shutil.copytree(folder, root / name)
    (root / "two" / "model.safetensors").write_bytes(b"other weights")
    arguments = ["validate", str(package), "--golden", str(root), "--report", str(tmp_path / "report")]
    assert main([*arguments, "--variant", "fp32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == ["one/image_upscale"]
    (root / "one" / "model.safetensors").write_bytes(b"other weights")
    assert main(arguments) == 1
    assert "no golden folder" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--golden", "no/such/folder"], "no such folder"),
        (["--golden", ".", "--variant", "int3"], "no variant 'int3'"),
        (["--golden", ".", "--task", "."], "--reference"),
        (["--golden", ".", "--gates", "none.json"], "no such gates file"),
        ([], "required"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, words, package_tiny_b, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["validate", str(package_tiny_b), *arguments]) == 2
    assert words in capsys.readouterr().err
