"""Questions out of the forms in which data sets have them: all forms of one say the same."""

from typing import Any

import pytest

from funneltfm.data.questions import Question, QuestionColumns, entries_of, question_of
from funneltfm.errors import InputError

CONTEXT = "The cat sat on the mat. A cat ran."
RIGHT = Question("q1", "Who sat?", CONTEXT, ("cat", "The cat"), ((4, 7), (0, 7)))
PAIRS = [{"text": "cat", "answer_start": 4}, {"text": "The cat", "answer_start": 0}]
LISTS = {"text": ["cat", "The cat"], "answer_start": [4, 0]}


def read(row: dict[str, Any], **columns: str) -> list[Question]:
    entries = entries_of(row, QuestionColumns(**columns), "data, row 1")
    return [question_of(entry, "data, row 1", f"1-{i + 1}") for i, entry in enumerate(entries)]


@pytest.mark.parametrize(
    "row",
    [
        {"id": "q1", "question": " Who sat? ", "context": CONTEXT, "answers": PAIRS},
        {"id": "q1", "question": "Who sat?", "context": CONTEXT, "answers": LISTS, "is_impossible": False},
        {"context": CONTEXT, "qas": [{"id": "q1", "question": "Who sat?", "answers": PAIRS}]},
        {
            "title": "x",
            "paragraphs": [{"context": CONTEXT, "qas": [{"id": "q1", "question": "Who sat?", "answers": PAIRS}]}],
        },
        {
            "context": CONTEXT,
            "qas": [
                {
                    "qid": "q1",
                    "question": "Who sat?",
                    "answers": ["cat", "The cat"],
                    "detected_answers": [
                        {"text": "cat", "char_spans": [[4, 6]]},
                        {"text": "The cat", "char_spans": [[0, 6]]},
                    ],
                }
            ],
        },
        {
            "qid": "q1",
            "question": "Who sat?",
            "context": CONTEXT,
            "answers": ["cat", "The cat"],
            "detected_answers": {
                "text": ["cat", "The cat"],
                "char_spans": [{"start": [4], "end": [6]}, {"start": [0], "end": [6]}],
            },
        },
        {
            "id": "q1",
            "question": "Who sat?",
            "context": CONTEXT,
            "answers": ["cat", "The cat"],
            "labels": [{"start": [4], "end": [6]}, {"start": [0], "end": [6]}],
        },
    ],
    ids=["pairs", "lists", "paragraph", "article", "MRQA", "MRQA columns", "labels"],
)
def test_forms(row: dict[str, Any]) -> None:
    assert read(row) == [RIGHT]


def test_one_answer_in_several_places() -> None:
    row = {"question": "Who?", "context": CONTEXT, "answers": ["cat"], "labels": [{"start": [4, 26], "end": [6, 28]}]}
    (question,) = read(row)
    assert question.id == "1-1"
    assert [CONTEXT[a:b] for a, b in question.spans] == ["cat", "cat"]


def test_columns_of_other_names() -> None:
    row = {"q": "Who?", "text": CONTEXT, "a": ["cat"], "places": [{"start": [4], "end": [6]}], "answers": "unused"}
    names = {"question": "q", "context": "text", "answers": "a", "labels": "places"}
    (question,) = read(row, **names)
    assert (question.answers, question.spans) == (("cat",), ((4, 7),))
    with pytest.raises(InputError, match=r"no column 'places' \(--label_column"):
        read(row | {"places": None}, **names)


@pytest.mark.parametrize(
    ("more", "answers"),
    [
        ({}, None),
        ({"answers": None}, None),
        ({"is_impossible": False}, None),
        ({"answers": []}, ()),
        ({"answers": [], "is_impossible": True, "plausible_answers": PAIRS}, ()),
        ({"is_impossible": True}, ()),
        ({"answers": {"text": [], "answer_start": []}}, ()),
        ({"answers": [], "labels": []}, ()),
    ],
)
def test_no_answer_and_no_label_are_two_things(more: dict[str, Any], answers: Any) -> None:
    (question,) = read({"question": "Who?", "context": CONTEXT} | more)
    assert question.answers == answers
    assert question.spans == ()


def test_places_are_characters_not_bytes() -> None:
    context = "\U0001f600 caf\u00e9 d\u00e9j\u00e0"
    (question,) = read(
        {"question": "?", "context": context, "answers": [{"text": "d\u00e9j\u00e0", "answer_start": 7}]}
    )
    assert context[slice(*question.spans[0])] == "d\u00e9j\u00e0"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"answers": [{"text": "cat", "answer_start": 5}]}, "'cat' is not at answer_start 5 of the context.*'at '"),
        ({"answers": [{"text": "cat", "answer_start": -1}]}, "is not at answer_start -1"),
        ({"answers": [{"text": "", "answer_start": 0}]}, "the answer '' is not"),
        ({"answers": [{"text": "cat", "answer_start": "4"}]}, "needs text and answer_start"),
        ({"answers": [{"text": "cat"}]}, "needs text and answer_start"),
        ({"answers": {"text": ["cat"], "answer_start": []}}, "1 answers, but 0 answer_start"),
        ({"answers": ["cat"]}, "texts alone, without their places"),
        ({"answers": "cat"}, "texts alone, without their places"),
        ({"answers": PAIRS, "is_impossible": True}, "is_impossible is true, but"),
        ({"answers": [], "is_impossible": False}, "is_impossible is false, but"),
        ({"answers": ["cat"], "labels": []}, "1 answers, but 0 places"),
        ({"answers": ["cat"], "labels": [{"start": [4], "end": [34]}]}, "first and its last character.*34"),
        ({"answers": ["cat"], "labels": [{"start": [4, 5], "end": [6]}]}, "first and its last character"),
        ({"answers": ["cat"], "labels": [{"start": [6], "end": [4]}]}, "first and its last character"),
        ({"answers": [1], "labels": [{"start": [4], "end": [6]}]}, "answers must be texts; got 1"),
        ({"question": None}, "question: expected a text; got None"),
        ({"context": 3}, "context: expected a text; got 3"),
    ],
)
def test_what_cannot_be_used(more: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"data, row 1, question 7.*{message}"):
        read({"id": 7, "question": "Who?", "context": CONTEXT} | more)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Who?"}, "no column 'context'; it has question. Name it with --context_column"),
        ({"context": "x"}, "no column 'question'.*--query_column"),
        ({"paragraphs": [{"context": "x"}]}, "paragraph 1: expected context and qas; got context"),
        ({"paragraphs": "x"}, "expected a list; got 'x'"),
        ({"paragraphs": ["x"]}, "expected a list of objects; got 'x'"),
        ({"context": "x", "qas": {"question": "Who?"}}, "qas: expected a list"),
    ],
)
def test_rows_of_no_known_form(row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"data, row 1.*{message}"):
        read(row)
