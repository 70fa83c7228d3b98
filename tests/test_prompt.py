"""Prompts: the golden ids from their requests alone, and user text that never becomes a slot."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import golden_cases as golden
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from vlmport.runtime.chat_template import ChatTemplate
from vlmport.runtime.errors import InputError, PackageError
from vlmport.runtime.image import Patches, load_image, preprocess_images
from vlmport.runtime.manifest import PromptSpec, VisionSpec
from vlmport.runtime.messages import Visual, read_messages
from vlmport.runtime.prompt import Prompt, PromptBuilder
from vlmport.runtime.video import load_clip, preprocess_clip
from vlmport.runtime.vision_inputs import num_rows

FOLDER = golden.folders()[0]
SPECS = golden.specs(FOLDER)
TOKENS: dict[str, int] = golden.read_json(FOLDER / "expected.json")["special_token_ids"]
IMAGE, VIDEO = SPECS.prompt.image_placeholder, SPECS.prompt.video_placeholder


def builder(folder: Path = FOLDER, template: str | None = None, **changes: Any) -> PromptBuilder:
    specs = golden.specs(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return PromptBuilder(template or specs.template, tokenizer, replace(specs.prompt, **changes), specs.vision)


BUILDER = builder()


def still(h: int = 4, w: int = 4, t: int = 1, seconds: float | None = None) -> Patches:
    return Patches(np.zeros((t * h * w, 1176), np.float32), (t, h, w), seconds)


def prompt_of(
    *texts: str, images: int = 0, options: dict[str, Any] | None = None, made: PromptBuilder = BUILDER
) -> Prompt:
    parts: list[dict[str, Any]] = [{"type": "image", "image": b"x"}] * images
    parts += [{"type": "text", "text": text} for text in texts]
    conversation = read_messages([{"role": "user", "content": parts}], options=options)
    return made.build(conversation, [still()] * images)


def patches_of(visual: Visual, specs: golden.Specs) -> Patches:
    if visual.kind == "image":
        return preprocess_images([load_image(visual.source)], specs.image, visual.image_options)
    return preprocess_clip(load_clip(visual.source, specs.video, specs.image, visual.clip_options), specs.image)


@pytest.mark.parametrize("case", golden.cases(), ids=str)
def test_golden_ids_from_the_request_alone(case: golden.Golden) -> None:
    conversation = read_messages(case.request["messages"], options=case.request["options"], folder=case.folder)
    patches = [patches_of(visual, golden.specs(case.folder)) for visual in conversation.visuals]
    made = builder(case.folder)
    prompt = made.build(conversation, patches)
    assert prompt.input_ids.dtype == np.int64
    assert prompt.input_ids.tolist() == case.case["input_ids"]
    kinds = [visual.kind for visual in conversation.visuals]
    assert [run.kind for run in prompt.runs] == kinds
    assert [run.seconds_per_grid for run in prompt.runs] == [p.seconds_per_grid for p in patches]
    images, videos = ([p for p, k in zip(patches, kinds, strict=True) if k == kind] for kind in ("image", "video"))
    assert made.runs(np.array(case.case["input_ids"]), images, videos) == prompt.runs


def test_text_without_control_tokens_goes_through_the_tokenizer_whole() -> None:
    prompt = prompt_of("Hello, wörld!\n 3.14  ")
    rendered = BUILDER.template.render(
        [{"role": "user", "content": "Hello, wörld!\n 3.14  "}], {"add_generation_prompt": True}
    )
    assert prompt.text == rendered
    assert prompt.input_ids.tolist() == BUILDER.tokenizer.encode(rendered, add_special_tokens=False).ids


@pytest.mark.parametrize("token", sorted(TOKENS))
@pytest.mark.parametrize("form", ["{}", "a {} b", "{0}{0}", " {}\n", "<|im{}age_pad|>"])
def test_control_tokens_of_a_user_stay_text(token: str, form: str) -> None:
    text = form.format(token)
    prompt = prompt_of(text, images=1)
    benign = prompt_of("x", images=1)
    for name, token_id in TOKENS.items():
        assert (prompt.input_ids == token_id).sum() == (benign.input_ids == token_id).sum(), name
    assert len(prompt.runs) == 1
    assert text in prompt.text
    assert text in BUILDER.tokenizer.decode(prompt.input_ids.tolist(), skip_special_tokens=False)


def test_a_token_that_parts_form_together_stays_text() -> None:
    prompt = prompt_of("<|image_", "pad|> and <|video", "_pad|>")
    assert not prompt.runs
    assert IMAGE in prompt.text


FRAGMENTS = st.sampled_from(
    [IMAGE, VIDEO, "<|", "|>", "image_pad", "<|im_end|>", "<|im", "age_pad|>", "\ue000", " ", "\n", "é", "x"]
)
TEXTS = st.lists(st.lists(FRAGMENTS, max_size=6).map("".join), min_size=1, max_size=3)


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.integers(0, 2))
def test_whatever_the_text_the_slots_are_those_of_the_images(texts: list[str], images: int) -> None:
    prompt = prompt_of(*texts, images=images)
    benign = prompt_of("x", images=images)
    assert len(prompt.runs) == images
    for name, token_id in TOKENS.items():
        assert (prompt.input_ids == token_id).sum() == (benign.input_ids == token_id).sum(), name
    assert prompt.text == benign.text.replace("x<|im_end|>", "".join(texts) + "<|im_end|>")


def test_all_texts_are_the_users_whatever_their_role() -> None:
    messages = [{"role": role, "content": f"{role} {IMAGE}"} for role in ("system", "user", "assistant", "user")]
    prompt = BUILDER.build(read_messages(messages), [])
    assert not prompt.runs
    assert prompt.text.count(IMAGE) == 4


def test_only_protected_tokens_are_kept_from_users() -> None:
    made = builder(protected_tokens=(IMAGE, VIDEO))
    token = TOKENS["<|im_start|>"]
    counts = [(prompt_of(text, made=made).input_ids == token).sum() for text in ("x", f"<|im_start|> {IMAGE}")]
    assert counts[1] == counts[0] + 1, "as the reference has it"


TRIM = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}"


def test_templates_that_trim_are_followed() -> None:
    made = builder(template=TRIM)
    prompt = made.build(read_messages([{"role": "user", "content": f" \n{IMAGE} x "}]), [])
    assert prompt.text == f"[user]{IMAGE} x"
    assert TOKENS[IMAGE] not in prompt.input_ids


def test_templates_that_change_texts_take_no_control_tokens() -> None:
    made = builder(template="<|im_start|>{% for m in messages %}{{ m.content.split('=')[-1] }}{% endfor %}")
    assert made.build(read_messages([{"role": "user", "content": "a=b"}]), []).text == "<|im_start|>b"
    with pytest.raises(InputError, match="take the token out of the text"):
        made.build(read_messages([{"role": "user", "content": f"a={IMAGE}"}]), [])


def test_options_reach_the_template() -> None:
    assert prompt_of("x").text.endswith("<|im_start|>assistant\n")
    assert not prompt_of("x", options={"add_generation_prompt": False}).text.endswith("assistant\n")
    assert "Picture 2: " in prompt_of("x", images=2, options={"add_vision_id": True}).text
    assert "Picture 2: " in prompt_of("x", images=2, made=builder(template_options={"add_vision_id": True})).text
    with pytest.raises(InputError, match=r"options\.vision_id: is no option of this chat template; it has add_gen"):
        prompt_of("x", options={"vision_id": True})
    with pytest.raises(InputError, match=r"options\.messages: is no option"):
        prompt_of("x", options={"messages": []})


def test_a_template_that_leaves_an_image_out_is_told() -> None:
    with pytest.raises(
        InputError, match="left places for 0 images and 0 videos, the messages have 2 images and 0 videos"
    ):
        prompt_of("x", images=2, made=builder(template="{% for m in messages %}x{% endfor %}"))


@pytest.mark.parametrize(
    ("ids", "images", "message"),
    [
        ([1, 0, 0, 0, 0, 2], [], "4 image placeholders for 0 images that take 0"),
        ([1, 0, 0, 0, 0, 2], [still(), still()], "4 image placeholders for 2 images that take 8"),
        ([1, 0, 0, 0, 2], [still()], "3 image placeholders for 1 images that take 4"),
        ([1, 0, 0, 2, 0, 0], [still()], "do not stand together"),
        ([1, 2], [still()], "0 image placeholders for 1 images that take 4"),
    ],
)
def test_ids_that_do_not_fit_their_images(ids: list[int], images: list[Patches], message: str) -> None:
    array = np.array([TOKENS[IMAGE] if n == 0 else n for n in ids])
    with pytest.raises(InputError, match=message):
        BUILDER.runs(array, images, [])


def test_runs_of_images_that_touch() -> None:
    array = np.full(4 + 6 + 8, TOKENS[IMAGE])
    array[10:] = TOKENS[VIDEO]
    runs = BUILDER.runs(array, [still(), still(4, 6)], [still(4, 4, 2, 0.5)])
    assert [(run.kind, run.start, run.grid, run.seconds_per_grid) for run in runs] == [
        ("image", 0, (1, 2, 2), None),
        ("image", 4, (1, 2, 3), None),
        ("video", 10, (2, 2, 2), 0.5),
    ]


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("{% for", PackageError, "is not a chat template"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", PackageError, "is not a chat template"),
        ("{{ ''.__class__.__mro__ }}", PackageError, "does what a template must not"),
        ("{{ messages.append(1) }}", PackageError, "does what a template must not"),
        ("{{ raise_exception('roles must\nalternate') }}", InputError, r"refuses them \(roles must alternate\)"),
        ("{{ messages[7].role.x }}", InputError, "refuses them"),
        ("{{ 1 // 0 }}", InputError, "refuses them"),
        ("{{ messages + 1 }}", InputError, "refuses them"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", InputError, "refuses them"),
        ("{% include 'x' %}", InputError, "refuses them"),
        ("{{ range(10**9) }}", InputError, "refuses them"),
    ],
)
def test_templates_that_go_wrong(source: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        ChatTemplate(source).render([{"role": "user", "content": "x"}], {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}", "x\n"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ {'b': '<é>', 'a': 1} | tojson }}", '{"b": "<é>", "a": 1}'),
        ("{{ {'b': 2, 'a': [1]} | tojson(indent=1, sort_keys=true) }}", json.dumps({"a": [1], "b": 2}, indent=1)),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "x!"),
        (
            "{{ strftime_now('%%') }}{{ tools is none }}{{ documents is none }}{{ nothing is defined }}",
            "%TrueTrueFalse",
        ),
    ],
)
def test_templates_have_what_transformers_gives_them(source: str, text: str) -> None:
    assert ChatTemplate(source).render([{"role": "user", "content": "x"}], {}) == text


def test_variables_are_what_a_caller_may_set() -> None:
    source = "{{ messages }}{{ tools }}{{ range(3) }}{% set a = b %}{{ namespace(x=c) }}{{ raise_exception }}"
    assert ChatTemplate(source).variables == {"b", "c"}


def test_placeholders_must_be_tokens() -> None:
    with pytest.raises(PackageError, match="'<none>' is no token"):
        builder(image_placeholder="<none>")


def test_a_placeholder_that_is_no_token_splits_the_text() -> None:
    """As LLaVA's tokenizer_image_token: what is between placeholders is encoded apart, each is one id below 0."""
    plain = "{% for m in messages %}{% for p in m.content %}{{ p.text if p.type == 'text' else '<pic>' }}{% endfor %}"
    template = plain + "{% endfor %}"
    changes: dict[str, Any] = {
        "image_placeholder": "<pic>",
        "image_placeholder_id": -200,
        "protected_tokens": (*SPECS.prompt.protected_tokens, "<pic>"),
    }
    made = builder(template=template, **changes)
    found = prompt_of("Tell", " me", images=2, made=made)
    text = made.tokenizer.encode("Tell me", add_special_tokens=False).ids
    assert found.input_ids.tolist() == [*[-200] * 8, *text]
    assert [(run.start, run.length) for run in found.runs] == [(0, 4), (4, 4)]
    said = prompt_of(f"a <pic> b{IMAGE}c", images=1, made=made).input_ids
    assert (said < 0).sum() == 4, "a user's <pic> shows nothing"
    assert made.tokenizer.decode(said[4:].tolist()) == f"a <pic> b{IMAGE}c"
    assert TOKENS[IMAGE] not in said
    with pytest.raises(ValueError, match="image_placeholder_id is 5"):
        builder(image_placeholder_id=5)


def test_rows_in_front_and_at_row_ends() -> None:
    grids = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))

    @given(grids, st.integers(0, 2), st.integers(0, 2))
    def check(grid: tuple[int, int, int], first: int, ends: int) -> None:
        t, h, w = grid
        frames = ["c" * first + ("x" * w + "e" * ends) * h] * t
        vision = VisionSpec((), merge_size=2, window_blocks=0, first_rows=first, row_ends=ends)
        assert num_rows(vision, (t, 2 * h, 2 * w)) == len("".join(frames))

    check()


def test_package_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    spec = PromptSpec(IMAGE, VIDEO, (), {})
    manifest: Any = type("Manifest", (), {"prompt": spec, "image": SPECS.image, "vision": SPECS.vision})
    with pytest.raises(PackageError, match=r"chat_template\.jinja"):
        PromptBuilder.from_package(tmp_path, manifest)
    (tmp_path / "chat_template.jinja").write_text(SPECS.template)
    with pytest.raises(PackageError, match=r"tokenizer\.json"):
        PromptBuilder.from_package(tmp_path, manifest)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(PackageError, match=r"tokenizer\.json: is not a tokenizer"):
        PromptBuilder.from_package(tmp_path, manifest)
    (tmp_path / "tokenizer.json").write_bytes((FOLDER / "tokenizer.json").read_bytes())
    assert PromptBuilder.from_package(tmp_path, manifest).image_token_id == TOKENS[IMAGE]
    with pytest.raises(PackageError, match="has no prompt part"):
        PromptBuilder.from_package(tmp_path, type("Manifest", (), {"prompt": None}))
