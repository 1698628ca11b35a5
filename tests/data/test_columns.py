"""Texts of columns, and conditions on them."""

import json
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from funneltfm.data.columns import filtered, passed, texts_of
from funneltfm.data.sources import open_rows
from funneltfm.errors import InputError

ROW = {"q": "Who?", "t": "A", "s": ["B", "C"], "n": 3, "x": 0.5, "none": None, "yes": True, "mixed": ["B", 1], "no": []}


@pytest.mark.parametrize(
    ("columns", "texts"),
    [
        (["q"], ["Who?"]),
        (["q", "t"], ["Who?", "A"]),
        (["t:q"], ["A Who?"]),
        (["t:q:t", "q"], ["A Who? A", "Who?"]),
        (["*s"], ["B", "C"]),
        (["q", "*s", "t"], ["Who?", "B", "C", "A"]),
        (["+s"], ["B C"]),
        (["t:+s", "+s:q"], ["A B C", "B C Who?"]),
        (["n", "x"], ["3", "0.5"]),
        (["q", "*no", "+no"], ["Who?", ""]),
        ([], []),
    ],
)
def test_texts(columns, texts):
    assert texts_of(ROW, columns, "here") == texts


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("question", "a column 'question', got none"),
        ("mixxed", "a column 'mixxed', got none. Did you mean 'mixed'? The row's columns: ['q', 't', 's', 'n'"),
        ("q:Q", "a column 'Q'"),
        ("", "the name of a column, got an empty name"),
        ("*", "the name of a column, got an empty name"),
        ("+", "the name of a column, got an empty name"),
        ("q:", "the name of a column, got an empty name"),
        (":q", "the name of a column, got an empty name"),
        ("s", "a text in column 's', got a list: ['B', 'C']"),
        ("none", "a text in column 'none', got null"),
        ("yes", "a text in column 'yes', got a bool"),
        ("q:n", "a text in column 'n', got a int"),  # a number is text alone
        ("q:s", "a text in column 's', got a list"),
        ("*q", "a list of texts in column 'q', got a str"),
        ("+q", "a list of texts in column 'q', got a str"),
        ("*mixed", "texts alone in the list of column 'mixed', got a int: 1"),
        ("+mixed", "texts alone in the list"),
        ("q:*s", "a column '*s'"),
    ],
)
def test_wrong_columns(column, message):
    with pytest.raises(InputError) as error:
        texts_of(ROW, ["q", column], "train.csv, line 7")
    assert f"expected {message}" in str(error.value)
    assert str(error.value).startswith("train.csv, line 7: ")
    assert repr(column) in str(error.value)


# ---- conditions

ROWS = [
    {"id": "007", "split": "dev", "label": 2, "score": 0.5, "text": "a cat", "words": ["a", "cat"], "ok": True},
    {"id": "7", "split": "train", "label": 1, "score": 2.0, "text": "dogs", "words": ["dogs"], "ok": False},
    {"id": "x8", "split": "dev", "label": -1, "score": 10, "text": "", "words": [], "ok": None},
]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + '{"id": "9", "split": null}\n')
    return open_rows(str(path))


@pytest.mark.parametrize(
    ("condition", "kept"),
    [
        ("label != 2", [1, 2, 3]),
        ("label == 2.0", [0]),
        ("label==2", [0]),
        ("  label  <  2 ", [1, 2]),
        ("split == dev", [0, 2]),
        ("split != dev", [1, 3]),
        ('split == "dev"', [0, 2]),
        ("split == null", [3]),
        ("split != null", [0, 1, 2]),
        ("split > dev", [1]),
        ("split <= dev", [0, 2]),
        ("score >= 0.5", [0, 1, 2]),
        ("score > 2", [2]),
        ("score <= 2", [0, 1]),
        ("id == 7", [0, 1]),
        ('id == "7"', [1]),
        ("id == '007'", [0]),
        ('label == "2"', [0]),
        ("text ~ ^a", [0]),
        ("text ~ [og]{2}", [1]),
        ("text ~ a|o", [0, 1]),
        ("text == a cat", [0]),
        ('text == ""', [2]),
        ('text != ""', [0, 1, 3]),
        ("len(text) > 4", [0]),
        ("len(text) == 0", [2]),
        ("len(words) >= 1", [0, 1]),
        ("ok == true", [0]),
        ("ok == True", [0]),
        ("ok != true", [1, 2, 3]),
        ("split == a==b", None),
        ("split == 5", None),
    ],
)
def test_conditions(rows, condition, kept):
    if kept is None:
        with pytest.raises(InputError, match=r"rows\.jsonl with .*none among 4"):
            filtered(rows, [condition])
        with pytest.raises(InputError, match=r"rows\.jsonl with .*none among 4\. .* take fewer"):
            list(passed(enumerate(rows), [condition], [rows.name]))
    else:
        assert list(filtered(rows, [condition])) == [rows[i] for i in kept]
        assert list(passed(enumerate(rows), [condition], [rows.name])) == [(i, rows[i]) for i in kept]


def test_conditions_of_a_stream(rows):
    assert [i for i, _ in passed(enumerate(rows), ["split == dev", "label > 0"], ["x"])] == [0]
    with pytest.raises(InputError, match=r"x, line or row 2: expected a number on both sides of <, got '8': 'x8'"):
        list(passed(enumerate(rows), ["id < 8"], ["x"]))
    with pytest.raises(InputError, match=r"a column of x in the condition 'lable == 2'.* Did you mean 'label'"):
        list(passed(enumerate(rows), ["lable == 2"], ["x"]))
    assert list(passed([], ["label == 2"], ["x"])) == []


def test_conditions_one_after_another(rows):
    assert [row["id"] for row in filtered(rows, ["split == dev", "label > 0"])] == ["007"]
    # the later are tried on what the earlier left
    with pytest.raises(InputError, match=r"line 3: expected a number on both sides of <, got '8': 'x8' \(condition id"):
        filtered(rows, ["id < 8"])
    assert [row["id"] for row in filtered(rows, ["id != x8", "id < 8"])] == ["007", "7"]
    assert filtered(rows, []) is rows


def test_filtered_rows_know_their_lines(rows):
    kept = filtered(filtered(rows, ["label != 1"]), ["split == dev"])
    assert kept.where(1) == f"{rows.name}, line 3"
    assert kept.columns == rows.columns


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("label", "expected a condition COLUMN SIGN VALUE"),
        ("label = 2", "expected a condition COLUMN SIGN VALUE"),
        ("label ==", "the empty text is"),
        ("== 2", "expected a condition COLUMN SIGN VALUE"),
        ("", "expected a condition"),
        ("lable == 2", r"got 'lable'\. Did you mean 'label'\? There are id, split, label"),
        ("label => 2", r"got 'label ='\. Did you mean 'label'"),
        ("len(text > 3", r"got 'len\(text'"),
        ("text ~ (", r"expected a regular expression in 'text ~ \('"),
        ("len(text) > many", r"expected a number beside len\(text\)"),
        ("len(text) ~ 3", r"expected a number beside len\(text\)"),
        ("len(label) > 3", r"line 1: expected a text or a list in column 'label', got a int: 2"),
        ("words == a", r"line 1: expected a text or a number in column 'words', got a list"),
        ("words ~ a", r"line 1: expected a text in column 'words', got a list"),
        ("label > many", r"line 1: expected a number on both sides of >, got 'many'"),
        ("__import__('os').system('x') == 1", "expected a column"),
    ],
)
def test_wrong_conditions(rows, condition, message):
    with pytest.raises(InputError, match=message):
        filtered(rows, [condition])


def test_cells_of_tables_are_numbers_where_they_look_like_it(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("#1 ID,score,a column\n1,0.5,x\n2,10,y\n3,,z\n")
    rows = open_rows(str(path))
    assert [row["a column"] for row in filtered(rows, ['score != ""', "score > 2"])] == ["y"]
    assert [row["a column"] for row in filtered(rows, ["#1 ID == 1.0"])] == ["x"]
    assert [row["score"] for row in filtered(rows, ["a column == z"])] == [""]


def test_whole_numbers_are_compared_exactly(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(f"id\n{10**20}\n{10**20 + 1}\n")
    assert len(filtered(open_rows(str(path)), [f"id == {10**20}"])) == 1


def test_other_kinds_of_values_are_refused(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"day": [date(2020, 1, 1)]})
    )
    with pytest.raises(InputError, match="days/train, row 0: expected a text or a number in column 'day', got a date"):
        filtered(open_rows("days/train"), ["day == 2020-01-01"])


@given(
    st.lists(st.integers(-5, 5), min_size=1), st.integers(-5, 5), st.sampled_from(["==", "!=", "<", "<=", ">", ">="])
)
def test_like_python(tmp_path_factory, values, bound, sign):
    path = tmp_path_factory.getbasetemp() / "values.tsv"
    path.write_text("x\n" + "".join(f"{value}\n" for value in values))
    expected = [str(value) for value in values if eval(f"{value} {sign} {bound}")]
    if expected:
        assert [row["x"] for row in filtered(open_rows(str(path)), [f"x {sign} {bound}"])] == expected
    else:
        with pytest.raises(InputError, match="none among"):
            filtered(open_rows(str(path)), [f"x {sign} {bound}"])
