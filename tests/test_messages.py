"""Messages in both forms, and one clear line that names the part for whatever is wrong with them."""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlmport.runtime.errors import InputError, VlmportError
from vlmport.runtime.image import ImageOptions
from vlmport.runtime.messages import read_messages
from vlmport.runtime.video import ClipOptions

PIXELS = np.zeros((4, 4, 3), np.uint8)
DATA = "data:image/png;base64," + base64.b64encode(b"abc").decode()


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ({"type": "image", "image": "a.png"}, Path("a.png")),
        ({"type": "image", "image": Path("a.png")}, Path("a.png")),
        ({"type": "image", "path": "a.png"}, Path("a.png")),
        ({"type": "image", "url": "file:///tmp/a%20b.png"}, Path("/tmp/a b.png")),
        ({"type": "image", "image": DATA}, b"abc"),
        ({"type": "image", "image": b"abc"}, b"abc"),
        ({"type": "image_url", "image_url": {"url": DATA, "detail": "auto"}}, b"abc"),
        ({"type": "image_url", "image_url": DATA, "cache_control": None}, b"abc"),
        ({"type": "video", "video": "a.mp4"}, Path("a.mp4")),
        ({"type": "video_url", "video_url": {"url": "a.mp4"}}, Path("a.mp4")),
        ({"type": "video", "video": ["a.png", DATA]}, (Path("a.png"), b"abc")),
    ],
)
def test_both_forms_name_a_source(part: dict[str, Any], source: Any) -> None:
    read = read_messages(user({"type": "text", "text": "What is it?"}, part))
    (visual,) = read.visuals
    assert visual.source == source
    assert visual.where == "messages[0].content[1]"
    parts = [{"type": "text", "text": "What is it?"}, {"type": visual.kind}]
    assert read.messages == ({"role": "user", "content": parts},), "the template sees no sources"


@pytest.mark.parametrize("source", [PIXELS, Image.fromarray(PIXELS)])
def test_attached_objects_are_passed_on(source: Any) -> None:
    assert read_messages(user({"type": "image", "image": source})).visuals[0].source is source


def test_relative_names_start_in_the_folder(tmp_path: Path) -> None:
    messages = user({"type": "image", "image": "a.png"}, {"type": "video", "video": ["b.png", "/c.png"]})
    visuals = read_messages(messages, folder=tmp_path).visuals
    assert visuals[0].source == tmp_path / "a.png"
    assert visuals[1].source == (tmp_path / "b.png", Path("/c.png"))


def test_options_of_the_part_come_before_those_of_the_call() -> None:
    messages = user(
        {"type": "image", "image": "a.png", "max_pixels": 500},
        {"type": "image", "image": "b.png"},
        {"type": "video", "video": "c.mp4", "fps": 4, "nframes": 6},
    )
    options = {"max_pixels": 900, "fps": 1.0, "max_frames": 8, "add_vision_id": True}
    read = read_messages(messages, options=options)
    assert [visual.image_options for visual in read.visuals] == [ImageOptions(max_pixels=n) for n in (500, 900, 900)]
    assert read.visuals[2].clip_options == ClipOptions(fps=4, num_frames=6, max_frames=8, max_pixels=900)
    assert read.template_options == {"add_vision_id": True}


def test_parts_without_data_take_what_is_attached_in_order() -> None:
    messages = [
        *user({"type": "image"}, {"type": "video"}, {"type": "image", "image": "own.png"}),
        {"role": "assistant", "content": "A cat."},
        *user({"type": "image", "image": None}),
    ]
    read = read_messages(messages, images=["a.png", b"b"], videos=[["f.png"]])
    assert [visual.source for visual in read.visuals] == [Path("a.png"), (Path("f.png"),), Path("own.png"), b"b"]


@pytest.mark.parametrize(
    ("attached", "message"),
    [
        ({}, "1 image parts have no data and 0 images are attached"),
        ({"images": ["a", "b"]}, "1 image parts have no data and 2 images are attached"),
        ({"images": ["a"], "videos": ["b"]}, "0 video parts have no data and 1 videos are attached"),
    ],
)
def test_too_few_or_too_many_attached(attached: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_messages(user({"type": "image"}), **attached)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", r"messages: is a str, not a list"),
        ([], r"messages: is empty"),
        (["hello"], r"messages\[0\]: is a str, not an object"),
        ([{"role": "user"}], r"messages\[0\]\.content: is neither a text nor a list"),
        ([{"content": "hi"}], r"messages\[0\]\.role: is None; give one of system"),
        ([{"role": "root", "content": "hi"}], r"messages\[0\]\.role: is 'root'"),
        ([{"role": ["user"], "content": "hi"}], r"messages\[0\]\.role: is \['user'\]"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": 3}], r"messages\[1\]\.content: is neither"),
        ([{"role": "user", "content": "a", "tool_calls": []}], r"messages\[0\]: has an unknown field \['tool_calls'\]"),
        (user("text"), r"messages\[0\]\.content\[0\]: is a str, not an object"),
        (user({"text": "a"}), r"messages\[0\]\.content\[0\]\.type: is None; give text, image"),
        (user({"type": "audio"}), r"messages\[0\]\.content\[0\]\.type: is 'audio'"),
        (user({"type": ["image"]}), r"messages\[0\]\.content\[0\]\.type: is \['image'\]"),
        (user({"type": "text"}), r"messages\[0\]\.content\[0\]\.text: is missing"),
        (user({"type": "text", "text": 3}), r"messages\[0\]\.content\[0\]\.text: is missing or not a text"),
        (user({"type": "text", "text": "a", "image": "b"}), r"unknown field \['image'\]"),
        (user({"type": "text", "text": "a\ud800"}), r"half of a surrogate pair, or a byte that is not UTF-8, at 1"),
        (user({"type": "image", "image": "a", "url": "b"}), r"has both image and url; give one source"),
        (user({"type": "image", "image": "a", "fps": 2}), r"content\[0\]\.fps: is unknown; known are aspect_ratio"),
        (user({"type": "image", "image": "a", "max_pixels": 2.5}), r"max_pixels: is 2\.5; give a whole number"),
        (user({"type": "image", "image": "a", "max_pixels": True}), r"max_pixels: is True; give a whole number"),
        (user({"type": "image", "image": "a", "min_pixels": 0}), r"min_pixels: is 0; give a whole number above 0"),
        (user({"type": "video", "video": "a", "fps": float("nan")}), r"fps: is nan; give a number above 0"),
        (user({"type": "video", "video": "a", "fps": "2"}), r"fps: is '2'; give a number above 0"),
        (user({"type": "image", "image": 7}), r"content\[0\]: is a int; give a path, a data: URI or an image"),
        (user({"type": "image", "image": ["a"]}), r"content\[0\]: is a list; give a path"),
        (user({"type": "video", "video": ["a", 7]}), r"content\[0\] frame 1: is a int"),
        (user({"type": "video", "video": Image.fromarray(PIXELS)}), r"is one image; give a list of frames"),
        (user({"type": "image_url", "image_url": {}}), r"image_url: has no url"),
        (user({"type": "image_url", "image_url": {"url": "a", "detail": "low"}}), r"detail: is 'low'; give auto"),
        (user({"type": "image", "image": "http://a.b/c.png"}), r"is an address on a network; download it"),
        (user({"type": "image", "image": "HTTPS://a.b/c.png"}), r"is an address on a network; download it"),
        (user({"type": "image", "image": "s3://a/c.png"}), r"is an address on a network; download it"),
        (user({"type": "image", "image": "file://host/c.png"}), r"is on another machine"),
        (user({"type": "image", "image": "data:image/png,abc"}), r"is no data: URI of the form"),
        (user({"type": "image", "image": "data:image/png;base64,a b*"}), r"is not base64"),
    ],
)
def test_wrong_messages_are_told_by_place(messages: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_messages(messages)
    assert "\n" not in str(caught.value)


def test_structure_is_checked_before_counts_and_sources() -> None:
    messages = [*user({"type": "image"}, {"type": "image", "image": "missing.png"}), {"role": "root", "content": ""}]
    with pytest.raises(InputError, match=r"messages\[1\]\.role"):
        read_messages(messages)


@pytest.mark.parametrize("source", ["/etc/hostname", "file:///etc/hostname", Path("a"), "data.png"])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_server_reads_no_files(kind: str, source: Any) -> None:
    for part in ({"type": kind, kind: source}, {"type": "video", "video": [source]}):
        with pytest.raises(InputError, match="is a file of this machine; attach it as a data: URI"):
            read_messages(user(part), allow_files=False)
    assert read_messages(user({"type": "image", "image": DATA}), allow_files=False).visuals[0].source == b"abc"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_pixels": "5"}, r"options\.max_pixels: is '5'"), ({"fps": 0}, r"options\.fps: is 0; give a number above 0")],
)
def test_wrong_options_are_told_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_messages(user({"type": "text", "text": "a"}), options=options)


KEYS = st.sampled_from(["role", "content", "type", "text", "image", "image_url", "video", "url", "path", "fps", "x"])
WORDS = st.sampled_from(
    ["user", "assistant", "text", "image", "image_url", "video", "a.png", "data:,", "http://x", "\ud800", ""]
)
JSON = st.recursive(
    WORDS | st.none() | st.booleans() | st.integers() | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(JSON | st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": JSON}), max_size=2))
def test_any_json_is_read_or_refused_in_one_line(messages: Any) -> None:
    try:
        read_messages(messages)
    except VlmportError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message
