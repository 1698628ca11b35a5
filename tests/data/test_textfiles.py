"""Sentences, lines and what is no row among JSON lines; tables and broken JSON are in test_readers.py."""

import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st

from funneltfm.data.textfiles import TEXT_FORMATS, BadRow, is_number

CONLL = """-DOCSTART- -X- O O

EU NNP I-NP B-ORG
rejects VBZ I-VP O

# # # O
  \t
-DOCSTART- -X- O O
Peter NNP I-NP B-PER"""

CONLLU = "\n".join([
    "# text = I don't",
    "1\tI\tI\tPRON\t_\t_\t3\tnsubj\t_\t_",
    "2-3\tdon't\t_\t_\t_\t_\t_\t_\t_\t_",
    "2\tdo\tdo\tAUX\t_\t_\t0\troot\t_\t_",
    "3\tn't\tnot\tPART\t_\t_\t2\tadvmod\t_\t_",
    "3.1\tgo\tgo\tVERB\t_\t_\t_\t_\t_\t_",
    "",
    "# another",
    "1\tNew York\tNew York\tPROPN\t_\t_\t0\troot\t_\t_",
    "",
])  # fmt: skip


def records(tmp_path, suffix, content):
    path = tmp_path / f"file{suffix}"
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    form = TEXT_FORMATS[suffix.removesuffix(".gz")]
    return [(line, form.parse(record)) for line, record in form.split(path)]


def changed(content):
    """The same content as other systems write it."""
    return [
        (".gz", content),
        ("", "\ufeff" + content),
        ("", content.replace("\n", "\r\n")),
        ("", content + "\n"),
        ("", content + "\n\n\n"),
    ]


def test_conll(tmp_path):
    got = records(tmp_path, ".conll", CONLL)
    assert [line for line, _ in got] == [3, 6, 9]
    assert got[0][1] == {
        "words": ["EU", "rejects"],
        "labels": ["B-ORG", "O"],
        "column_0": ["EU", "rejects"],
        "column_1": ["NNP", "VBZ"],
        "column_2": ["I-NP", "I-VP"],
        "column_3": ["B-ORG", "O"],
    }
    assert got[1][1]["words"] == ["#"]  # a word here, no comment
    assert got[2][1]["labels"] == ["B-PER"]
    for suffix in (".conll.txt", ".iob", ".bio"):
        assert records(tmp_path, suffix, CONLL) == got
    for suffix, content in changed(CONLL):
        assert records(tmp_path, ".conll" + suffix, content) == got


def test_conll_with_tabs_has_words_with_blanks_and_empty_cells(tmp_path):
    [(_, row)] = records(tmp_path, ".bio", "New York\t\tB-LOC\n\u00a0\tx\tO\n")
    assert row["words"] == ["New York", "\u00a0"]
    assert row["column_1"] == ["", "x"]


def test_conll_of_words_alone_has_no_labels(tmp_path):
    assert records(tmp_path, ".conll", "EU\nrejects\n") == [
        (1, {"words": ["EU", "rejects"], "column_0": ["EU", "rejects"]})
    ]


def test_conllu(tmp_path):
    got = records(tmp_path, ".conllu", CONLLU)
    assert [line for line, _ in got] == [2, 9]
    first, second = (row for _, row in got)
    assert first["words"] == first["form"] == ["I", "do", "n't"]
    assert first["id"] == ["1", "2", "3"]
    assert first["upos"] == ["PRON", "AUX", "PART"]
    assert second["words"] == ["New York"]
    assert " ".join(first) == "words id form lemma upos xpos feats head deprel deps misc"
    for suffix, content in changed(CONLLU):
        assert records(tmp_path, ".conllu" + suffix, content) == got


@pytest.mark.parametrize(
    ("suffix", "content", "line", "message"),
    [
        (".conll", "a X O\nb O\nc X O\n\nd X O\n", 2, "expected 3 columns, as in the file's first line, got 2: 'b O'"),
        (".conllu", CONLLU.replace("2\tdo\tdo", "2 do do"), 4, "expected 10 columns, got 8"),
    ],
)
def test_a_sentence_with_a_broken_line_is_one_bad_row(tmp_path, suffix, content, line, message):
    got = records(tmp_path, suffix, content)
    assert len(got) == 2
    assert got[0][0] == line
    assert isinstance(got[0][1], BadRow)
    assert message in str(got[0][1])
    assert isinstance(got[1][1], dict)


@pytest.mark.parametrize("suffix", [".txt", ".tokens"])
def test_lines(tmp_path, suffix):
    content = "\n = A title = \n \n\u2028b\x0cc\rd\x85\n"
    expected = [(2, {"text": " = A title = "}), (4, {"text": "\u2028b\x0cc\rd\x85"})]
    assert records(tmp_path, suffix, content) == expected
    for packed, other in changed(content):
        assert records(tmp_path, suffix + packed, other) == expected


def test_the_header_of_mrqa_is_no_row(tmp_path):
    header = '{"header": {"dataset": "SQuAD", "split": "dev"}}\n'
    for content in (header + '{"context": "x"}\n', "\n" + header + '\n{"context": "x"}'):
        assert [row for _, row in records(tmp_path, ".jsonl", content)] == [{"context": "x"}]
    for row in ({"header": "a text"}, {"header": {}, "text": "x"}):  # nor are these headers
        content = str(row).replace("'", '"')
        assert records(tmp_path, ".jsonl", f"{content}\n{content}\n") == [(1, row), (2, row)]
    assert len(records(tmp_path, ".jsonl", '{"context": "x"}\n' + header)) == 2


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers())
def test_what_python_writes_is_a_number(number):
    assert is_number(str(number))


@pytest.mark.parametrize("text", ["", ".", "nan", "inf", "1_0", "\u0663", "1e999", "9" * 400, " 1", "0x1", "e5"])
def test_no_number(text):
    assert not is_number(text)


def test_a_bad_row_is_an_error_that_can_be_told(tmp_path):
    [(_, bad)] = records(tmp_path, ".jsonl", b'{"a": \xff}\n')
    str(bad).encode()
    assert "\n" not in str(bad)
