"""Text from tokens: whole characters only, never a part of a stop string, and in the end the same text."""

import itertools
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from vlmport.runtime.errors import InputError
from vlmport.runtime.text_stream import StopFilter, TextStream

TOKENIZER = Tokenizer.from_file(str(Path(__file__).parent / "goldens/qwen2_5_vl/tiny_a/tokenizer.json"))
IDS = st.lists(st.integers(0, 520), max_size=60)  # bytes, pieces, special tokens, and ids that stand for nothing
TEXTS = st.text("abc€😀", max_size=30)
STOPS = st.lists(st.text("abc€", min_size=1, max_size=4), max_size=3)


def pieces_of(ids: list[int], stop: list[str] | None = None) -> list[str]:
    stream = TextStream(TOKENIZER, stop or [])
    return [*(stream.push(token_id) for token_id in ids), stream.flush()]


@settings(max_examples=500, deadline=None)
@given(ids=IDS)
def test_pieces_add_up_to_decoding_all_at_once(ids: list[int]) -> None:
    assert "".join(pieces_of(ids)) == TOKENIZER.decode(ids, skip_special_tokens=True)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=20))
@example(text="größer 你好 👩‍👩‍👧 e\u0301")
def test_no_piece_splits_a_character(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    if TOKENIZER.decode(ids) != text:  # normalisation, or a special token spelt out
        text = TOKENIZER.decode(ids)
    pieces = pieces_of(ids)
    assert "".join(pieces) == text
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


def test_pieces_come_as_soon_as_they_are_settled() -> None:
    ids = TOKENIZER.encode("a€b", add_special_tokens=False).ids
    assert pieces_of(ids) == ["a", "", "", "€", "b", ""]


def test_special_tokens_leave_no_text_and_others_do() -> None:
    ids = TOKENIZER.encode("<|im_start|>hi<tool_call>\n<|im_end|>", add_special_tokens=False).ids
    assert "".join(pieces_of(ids)) == "hi<tool_call>\n"


@settings(max_examples=500, deadline=None)
@given(text=TEXTS, stops=STOPS, data=st.data())
@example(text="abcab", stops=["bca", "c"], data=None)
def test_stop_strings_do_not_depend_on_the_pieces(text: str, stops: list[str], data: st.DataObject | None) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text))))) if data is not None else [1]
    stop_filter = StopFilter(stops)
    bounds = [0, *cuts, len(text)]
    pieces = [stop_filter.push(text[a:b]) for a, b in itertools.pairwise(bounds)]
    out = "".join(pieces)
    ends = {text.find(stop) + len(stop): stop for stop in sorted(stops, key=len) if stop in text}
    if ends:
        first = min(ends)
        assert stop_filter.stopped
        assert out == text[: first - len(ends[first])]
        assert stop_filter.flush() == ""
    else:
        assert not stop_filter.stopped
        assert out + stop_filter.flush() == text


@settings(max_examples=200, deadline=None)
@given(text=TEXTS, stops=STOPS)
def test_nothing_is_let_out_that_a_stop_string_could_still_take_back(text: str, stops: list[str]) -> None:
    stop_filter = StopFilter(stops)
    out = ""
    for index, char in enumerate(text):
        out += stop_filter.push(char)
        if stop_filter.stopped:
            break
        held = text[len(out) : index + 1]
        beginnings = {stop[:n] for stop in stops for n in range(1, len(stop))}
        assert not any(text[: index + 1].endswith(part) and len(part) > len(held) for part in beginnings)
        assert held == "" or held in beginnings


def test_a_stop_string_across_tokens_and_inside_a_flush() -> None:
    ids = TOKENIZER.encode("one STOP two", add_special_tokens=False).ids
    stream = TextStream(TOKENIZER, ["STOP"])
    text = ""
    for token_id in ids:
        text += stream.push(token_id)
        if stream.stopped:
            break
    assert (text + stream.flush(), stream.stopped) == ("one ", True)
    stream = TextStream(TOKENIZER, ["\ufffd"])
    assert stream.push(TOKENIZER.encode("€", add_special_tokens=False).ids[0]) == ""
    assert (stream.flush(), stream.stopped) == ("", True)


def test_an_empty_stop_string() -> None:
    with pytest.raises(InputError, match="empty"):
        StopFilter(["a", ""])


def sentencepiece_like() -> Tokenizer:
    words = ["▁Hello", "▁wor", "ld", ".", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def test_a_tokenizer_of_another_kind() -> None:
    tokenizer = sentencepiece_like()
    names = ["▁Hello", "▁wor", "ld", ".", "▁", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "▁Hello", "</s>", "<0xE2>"]
    ids = [tokenizer.token_to_id(name) for name in names]
    stream = TextStream(tokenizer)
    pieces = [*(stream.push(token_id) for token_id in ids), stream.flush()]
    assert pieces == ["Hello", " wor", "ld", ".", " ", "", "", "", "😀", " Hello", "", "", "\ufffd"]
    assert "".join(pieces) == tokenizer.decode(ids)
