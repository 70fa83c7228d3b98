"""Two packages, or two variants of one, without PyTorch: the same report as against a checkpoint."""

import errno
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import vlmport.cli.validate as cli
from vlmport.cli.main import main
from vlmport.validate.against import PackageReference

GOLDENS = Path(__file__).parent / "goldens"
BLOCKED = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors")


@pytest.fixture(scope="module")
def package(package_tiny_b, tmp_path_factory):
    return shutil.copytree(package_tiny_b, tmp_path_factory.mktemp("against") / "package")


@pytest.fixture(scope="module")
def compared(package, tmp_path_factory):
    """int4 and fp32 against fp32, in a process that has the runtime alone."""
    folder = tmp_path_factory.mktemp("report")
    arguments = ["validate", str(package), "--against", f"{package}:fp32", "--variant", "fp32", "int4", "--limit", "3"]
    code = f"""
        import sys
        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {BLOCKED!r}:
                    raise ModuleNotFoundError(name, name=name)
        sys.meta_path.insert(0, Blocked())
        from vlmport.cli.main import main
        sys.exit(main({[*arguments, "--report", str(folder)]!r}))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done, json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_it_needs_the_runtime_alone_and_tells_all_stages(compared):
    done, document = compared
    assert done.returncode == 1  # int4 of random weights
    assert document["mode"] == "against"
    assert document["reference"]["variant"] == "fp32"
    same, low = document["variants"]
    assert {row["stage"] for row in low["rows"]} == {
        "inputs", "pixel_values", "image_grid_thw", "position_ids", "vision", "projector", "inputs_embeds",
        "prefill_logits", "step_logits", "cache", "generated_ids",
    }  # fmt: skip
    assert (same["outcome"], low["outcome"]) == ("PASS", "FAIL")


def test_a_variant_against_itself_is_equal_to_the_bit(compared):
    same, low = compared[1]["variants"]
    rows = {row["stage"]: row["values"] for row in same["rows"]}
    assert rows["vision"]["max_abs"] == rows["step_logits"]["max_abs"] == 0
    assert rows["generated_ids"]["match"] == 1
    assert same["statistics"]["kl"]["max"] == 0
    assert low["statistics"]["kl"]["mean"] > 1e-4
    assert low["statistics"]["kl"]["num_samples"] == compared[1]["num_samples"]


def test_inputs_are_proven_equal(compared):
    done, document = compared
    for variant in document["variants"]:
        assert variant["inputs"]["num_equal"] == document["num_samples"] == len(document["inputs"]["samples"])
        assert variant["inputs"]["sha256"] == document["inputs"]["sha256"]
    assert f"inputs equal on {document['num_samples']} of {document['num_samples']} samples" in done.stdout


def other_mean(package, folder):
    """A copy that normalises pictures by another mean."""
    other = shutil.copytree(package, folder)
    manifest = json.loads((other / "vlmport.json").read_text())
    manifest["image"]["mean"][0] += 1e-3
    (other / "vlmport.json").write_text(json.dumps(manifest))
    return other


def test_a_package_that_reads_pictures_otherwise_fails_at_its_inputs(package, tmp_path, capsys):
    other = other_mean(package, tmp_path / "other")
    arguments = ["validate", str(package), "--against", str(other), "--variant", "fp32", "--limit", "2"]
    assert main([*arguments, "--report", str(tmp_path / "report")]) == 1
    document = json.loads((tmp_path / "report" / "report.json").read_text())
    (variant,) = document["variants"]
    assert variant["inputs"]["num_equal"] == 1  # the text alone
    assert [each["input"] for each in variant["inputs"]["different"]] == ["pixel_values"]
    outcomes = {row["stage"]: row["outcome"] for row in variant["rows"]}
    assert outcomes["inputs"] == outcomes["pixel_values"] == "FAIL"
    assert "not equal: pixel_values of picture" in capsys.readouterr().out


def test_a_stage_that_the_other_side_lacks_is_told(package, tmp_path, monkeypatch):
    original = PackageReference.vision
    monkeypatch.setattr(PackageReference, "vision", lambda self, patches: (None, original(self, patches)[1]))
    arguments = ["validate", str(package), "--against", f"{package}:fp32", "--variant", "fp32", "--limit", "2"]
    assert main([*arguments, "--report", str(tmp_path)]) == 0
    (variant,) = json.loads((tmp_path / "report.json").read_text())["variants"]
    assert "vision" not in {row["stage"] for row in variant["rows"]}
    lacks = {"sample": "picture", "stage": "vision", "reason": "the reference gives none"}
    assert variant["not_compared"] == [lacks]


def test_what_was_found_is_kept_until_its_report_is_written(package, tmp_path, monkeypatch):
    """A disk that is full then costs nothing but the page."""
    arguments = ["validate", str(package), "--against", f"{package}:fp32", "--variant", "fp32", "--limit", "1"]
    arguments += ["--report", str(tmp_path)]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "report.json"))

    with monkeypatch.context() as patch:
        patch.setattr(cli, "write_report", full)
        assert main(arguments) == 2
    assert len(list((tmp_path / "unfinished").iterdir())) == 1
    monkeypatch.setattr(PackageReference, "prefill", None)  # nothing is left to be asked
    assert main(arguments) == 0
    assert not (tmp_path / "unfinished").exists()


def test_a_task_is_asked_of_both(package, calibration, tmp_path, capsys):
    task = shutil.copytree(calibration, tmp_path / "task")
    lines = (task / "samples.jsonl").read_text().splitlines()[:2]
    (task / "samples.jsonl").write_text("\n".join(lines) + "\n")
    (task / "task.json").write_text(json.dumps({"schema": "vlmport-task/2", "max_new_tokens": 4}))
    arguments = ["validate", str(package), "--against", f"{package}:fp32", "--variant", "int8", "--task", str(task)]
    main([*arguments, "--report", str(tmp_path / "report")])
    assert "reference, fp32" in capsys.readouterr().out
    document = json.loads((tmp_path / "report" / "report.json").read_text())
    assert document["variants"][0]["task"]["num_items"] == 2
    assert set(document["task_files"]) == {"samples.jsonl", "task.json", "0.png", "1.png"}


def test_the_variant_itself_is_not_among_those_compared(package, tmp_path):
    arguments = ["validate", str(package), "--against", f"{package}:int8", "--limit", "1"]
    main([*arguments, "--report", str(tmp_path)])
    document = json.loads((tmp_path / "report.json").read_text())
    assert [variant["name"] for variant in document["variants"]] == ["fp32", "int4"]
    assert {row["column"] for row in document["variants"][0]["rows"]} == {"int8"}  # fp32 judged by the noise of int8


@pytest.fixture(scope="module")
def images(package_of):
    """A package without a decoder."""
    return package_of(GOLDENS / "navit" / "tiny_a")


def test_packages_of_images_alone_are_compared_at_all_their_stages(images, tmp_path):
    arguments = ["validate", str(images), "--against", f"{images}:fp32", "--variant", "fp32", "int8"]
    status = main([*arguments, "--report", str(tmp_path)])
    document = json.loads((tmp_path / "report.json").read_text())
    same, low = document["variants"]
    for variant in document["variants"]:
        assert {row["stage"] for row in variant["rows"]} == {"inputs", "vision", "pooled", "logits"}
        assert {row["num_samples"] for row in variant["rows"]} == {document["num_samples"]}
        assert variant["inputs"]["num_equal"] == document["num_samples"]
        assert variant["inputs"]["sha256"] == document["inputs"]["sha256"]
    exact, rounded = ({row["stage"]: row for row in variant["rows"]} for variant in (same, low))
    assert same["outcome"] == "PASS"
    assert exact["logits"]["values"]["kl_max"] < 1e-9 < rounded["logits"]["values"]["kl_mean"]
    assert {row["column"] for row in low["rows"]} == {"int8"}
    assert document["provider"] == "CPUExecutionProvider"
    assert status == (document["outcome"] == "FAIL")
    assert set(document["reference_files"]) < set(document["package"]["files"])


def test_packages_that_cut_up_images_otherwise_fail_at_their_inputs(images, tmp_path):
    other = other_mean(images, tmp_path / "other")
    arguments = ["validate", str(images), "--against", str(other), "--variant", "fp32", "--limit", "2"]
    assert main([*arguments, "--report", str(tmp_path / "report")]) == 1
    document = json.loads((tmp_path / "report" / "report.json").read_text())
    (variant,) = document["variants"]
    assert (document["num_samples"], variant["inputs"]["num_equal"]) == (2, 0)
    assert {each["input"] for each in variant["inputs"]["different"]} == {"pixel_values"}
    assert next(row["outcome"] for row in variant["rows"] if row["stage"] == "inputs") == "FAIL"


def test_what_means_nothing_without_a_decoder_is_one_line(images, package, tmp_path, capsys):
    for options, words in (
        (["--against", f"{images}:fp32", "--task", str(tmp_path)], "no decoder"),
        (["--against", str(package)], "one of the two packages has no decoder"),
    ):
        assert main(["validate", str(images), *options]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("other", "words"),
    [("nowhere", "not a package"), ("{package}:int3", "no variant 'int3'"), ("{package}:", "no variant ''")],
)
def test_a_reference_that_is_none_is_one_line(package, other, words, capsys):
    assert main(["validate", str(package), "--against", other.format(package=package)]) == 2
    assert words in capsys.readouterr().err
