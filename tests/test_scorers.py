"""Scorers: what each calls right, on answers as models give them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmport.validate.scorers import SCORERS

CASES = [
    ("exact_match", " 12.40\n", ["12.40"], 1.0),
    ("exact_match", "12.4", ["12.40"], 0.0),
    ("exact_match", "b", ["a", "b"], 1.0),
    ("anls", "Hello  World", ["hello world"], 1.0),
    ("anls", "hella world", ["hello world"], 1 - 1 / 11),
    ("anls", "abcdef", ["abcxyz"], 0.5),
    ("anls", "abcde", ["vwxyz"], 0.0),
    ("anls", "", ["word"], 0.0),
    ("relaxed_accuracy", "104.9", ["100"], 1.0),
    ("relaxed_accuracy", "105.1", ["100"], 0.0),
    ("relaxed_accuracy", "-95", ["-100"], 1.0),
    ("relaxed_accuracy", "50 %", ["0.5"], 1.0),
    ("relaxed_accuracy", "$1,204", ["1204"], 1.0),
    ("relaxed_accuracy", "0.01", ["0"], 0.0),
    ("relaxed_accuracy", "Norway", ["norway"], 1.0),
    ("relaxed_accuracy", "nan", ["nan"], 1.0),
    ("number_match", "The total is 1,204.50 EUR.", ["1204.5"], 1.0),
    ("number_match", "1, 2 and 3", ["1,2,3"], 1.0),
    ("number_match", "no number", ["none"], 0.0),
    ("number_match", "12 or 13", ["12"], 0.0),
    ("iou", "[0, 0, 10, 10]", ["0 0 10 5"], 0.5),
    ("iou", '{"bbox_2d": [1, 1, 3, 3]}', ["1, 1, 3, 3"], 1.0),
    ("iou", "[10, 10, 0, 0]", ["[0, 0, 10, 10]"], 1.0),
    ("iou", "[5, 5, 6, 6]", ["[0, 0, 1, 1]"], 0.0),
    ("iou", "nothing there", ["[0, 0, 1, 1]"], 0.0),
    ("multiple_choice", "b", ["B"], 1.0),
    ("multiple_choice", "(C) a dog", ["C"], 1.0),
    ("multiple_choice", "A dog is seen. The answer is B.", ["B"], 1.0),
    ("multiple_choice", "D. A thing", ["D"], 1.0),
    ("multiple_choice", "I do not know", ["A"], 0.0),
]


@pytest.mark.parametrize(("name", "answer", "expected", "score"), CASES)
def test_answers_as_models_give_them(name, answer, expected, score):
    assert SCORERS[name].score(answer, expected) == pytest.approx(score)


@pytest.mark.parametrize("name", list(SCORERS))
@given(answer=st.text(max_size=40), expected=st.lists(st.text(max_size=40), min_size=1, max_size=3))
def test_every_score_lies_between_0_and_1_whatever_a_model_says(name, answer, expected):
    scorer = SCORERS[name]
    score = scorer.score(answer, expected)
    assert 0 <= score <= 1
    assert score >= scorer.score(answer, expected[:1]), "one more answer that is right cannot hurt"


@pytest.mark.parametrize("name", ["exact_match", "anls", "relaxed_accuracy"])
@given(text=st.text(max_size=40))
def test_an_answer_is_right_by_itself(name, text):
    assert SCORERS[name].is_right(SCORERS[name].score(text, [text]))


@given(
    box=st.lists(st.integers(0, 1000), min_size=4, max_size=4),
    other=st.lists(st.integers(0, 1000), min_size=4, max_size=4),
)
def test_iou_is_symmetric_and_1_for_a_box_with_itself(box, other):
    score = SCORERS["iou"].score
    assert score(str(box), [str(box)]) == 1
    assert score(str(box), [str(other)]) == score(str(other), [str(box)])
