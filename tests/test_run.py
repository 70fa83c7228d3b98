"""`vlmport run`: text as it comes, one JSON object, and one line for every mistake."""

import json
from pathlib import Path

import golden_cases
import pytest

from vlmport.cli.main import main

CASE = next(
    case for case in golden_cases.cases() if case.folder.name == "tiny_a" and case.stages("pixel_values", "image")
)


IMAGE = next((CASE.folder / "inputs").glob("*.png"))


def run(package: Path, *arguments: str) -> int:
    return main(["run", str(package), *arguments, "--threads", "1"])


def image_and_text() -> tuple[str, str]:
    parts = {item["type"]: item for item in CASE.request["messages"][-1]["content"]}
    return str(CASE.folder / parts["image"]["image"]), parts["text"]["text"]


def test_json_tells_text_ids_reason_and_timings(package_tiny_a: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, text = image_and_text()
    greedy = ["--temperature", "0", "--repetition-penalty", "1", "--max-new-tokens", "8", "--json"]
    assert run(package_tiny_a, text, "--image", image, *greedy) == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert out.count("\n") == 1
    assert err == ""
    assert answer["token_ids"] == CASE.case["generated_ids"][: len(answer["token_ids"])]
    assert set(answer) == {"text", "token_ids", "finish_reason", "timings"}
    assert answer["timings"]["num_prompt_tokens"] == len(CASE.case["input_ids"])
    for name in ("decode_image", "preprocess", "vision", "projector", "prefill", "decode", "tokens_per_second"):
        assert answer["timings"][name] > 0


def test_text_is_what_json_says_without_control_characters(
    package_tiny_a: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["Hello", "--max-new-tokens", "16", "--seed", "1", "--temperature", "3", "--system", "Be brief."]
    assert run(package_tiny_a, *arguments) == 0
    printed = capsys.readouterr().out
    assert run(package_tiny_a, *arguments, "--json") == 0
    text = json.loads(capsys.readouterr().out)["text"]
    assert printed == "".join(c if c in "\n\t" or c.isprintable() or c == "\u00a0" else "\ufffd" for c in text) + "\n"


def test_options_by_upstreams_names(package_tiny_a: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths: list[int] = []
    for options in ([], ["add_vision_id=true", "max_pixels=3136"]):
        arguments = ["Hi", "--image", str(IMAGE), "--max-new-tokens", "1", "--json"]
        assert run(package_tiny_a, *arguments, *(["--option", *options] if options else [])) == 0
        lengths.append(json.loads(capsys.readouterr().out)["timings"]["num_prompt_tokens"])
    assert lengths[0] != lengths[1]


def test_a_variant_and_a_stop_string(package_tiny_a: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(package_tiny_a, "Hi", "--variant", "int8", "--max-new-tokens", "3", "--stop", "e", "--json") == 0
    assert "e" not in json.loads(capsys.readouterr().out)["text"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variant", "int3"], "no variant 'int3'; it has fp32, int8, int4"),
        (["--max-new-tokens", "0"], "max_new_tokens: 0 is not at least 1"),
        (["--max-new-tokens", "-7"], "max_new_tokens: -7 is not at least 1"),
        (["--temperature", "nan"], "temperature: nan"),
        (["--cache-length", "3"], "and the cache holds 3: raise --cache-length"),
        (["--image", "nowhere.png"], "nowhere.png"),
        (["--video", "nowhere.mp4"], "nowhere.mp4"),
        (["--option", "add_vision_id"], "--option 'add_vision_id': is not of the form NAME=VALUE"),
        (["--option", "no_such=1"], "options.no_such: is no option of this chat template"),
        (["--option", "fps=1", "fps=2"], "--option fps: is given twice"),
        (["--option", "max_pixels=big"], "options.max_pixels: is 'big'"),
        (["--option", "max_slice_nums=2", "--image", str(IMAGE)], "max_slice_nums is no option of this package"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    package_tiny_a: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(package_tiny_a, "Hello", *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_a_folder_that_is_no_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "Hello") == 2
    assert "not a package" in capsys.readouterr().err
