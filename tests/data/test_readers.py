"""Each official layout in miniature, each way a file can be wrong, round trips, and the real files where they are."""

import csv
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from funneltfm.data.readers import (
    DATASETS,
    DatasetSpec,
    Example,
    custom_dataset,
    get_dataset,
    read_split,
    source_files,
)
from funneltfm.errors import InputError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def tsv(*rows: str) -> str:
    """`a | b` for a<TAB>b."""
    return "".join(row.replace(" | ", "\t") + "\n" for row in rows)


MNLI_TRAIN = (
    "index | promptID | pairID | genre | sentence1_binary_parse | sentence2_binary_parse | sentence1_parse"
    " | sentence2_parse | sentence1 | sentence2 | label1 | gold_label"
)
MNLI_DEV = MNLI_TRAIN.replace("label1", "label1 | label2 | label3 | label4 | label5")
MNLI_TEST = MNLI_TRAIN.removesuffix(" | label1 | gold_label")
MSR = "\ufeffQuality | #1 ID | #2 ID | #1 String | #2 String"
STSB = "index | genre | filename | year | old_index | source1 | source2 | sentence1 | sentence2"

# set, split, files, the first example
LAYOUTS = [
    (
        "CoLA",
        "train",
        {"train.tsv": tsv("gj04 | 1 |  | It's so.", "gj04 | 0 | * | It so.")},
        ("0", "It's so.", None, "1"),
    ),
    ("CoLA", "valid", {"dev.tsv": tsv("gj04 | 0 | * | It so.")}, ("0", "It so.", None, "0")),
    ("CoLA", "test", {"test.tsv": tsv("index | sentence", "7 | Bill left.")}, ("7", "Bill left.", None, None)),
    ("SST-2", "train", {"train.tsv": tsv("sentence | label", "a joy  | 1")}, ("0", "a joy ", None, "1")),
    ("SST-2", "test", {"test.tsv": tsv("index | sentence", "0 | a joy")}, ("0", "a joy", None, None)),
    ("MRPC", "train", {"train.tsv": tsv(MSR, '1 | 70 | 71 | He said "a. | She')}, ("0", 'He said "a.', "She", "1")),
    ("MRPC", "valid", {"dev.tsv": tsv(MSR, "0 | 70 | 71 | He | She")}, ("0", "He", "She", "0")),
    ("MRPC", "test", {"test.tsv": tsv("index" + MSR[8:], "3 | 70 | 71 | He | She")}, ("3", "He", "She", None)),
    (
        "QQP",
        "train",
        {"train.tsv": tsv("id | qid1 | qid2 | question1 | question2 | is_duplicate", "9 | 1 | 2 | Why? | How? | 0")},
        ("9", "Why?", "How?", "0"),
    ),
    ("QQP", "test", {"test.tsv": tsv("id | question1 | question2", "0 | Why? | How?")}, ("0", "Why?", "How?", None)),
    (
        "STS-B",
        "valid",
        {"dev.tsv": tsv(STSB + " | score", "4 | n | f | 2012 | 5 | x | y | A plane. | A jet. | 4.250")},
        ("4", "A plane.", "A jet.", "4.250"),
    ),
    (
        "STS-B",
        "test",
        {"test.tsv": tsv(STSB, "4 | n | f | 2012 | 5 | x | y | A plane. | A jet.")},
        ("4", "A plane.", "A jet.", None),
    ),
    (
        "MNLI",
        "train",
        {"train.tsv": tsv(MNLI_TRAIN, "0 | 1 | 1n | g | p | p | p | p | All. | Some. | neutral | entailment")},
        ("0", "All.", "Some.", "entailment"),
    ),
    *(
        (
            "MNLI",
            split,
            {name: tsv(MNLI_DEV, "5 | 1 | 1n | g | p | p | p | p | All. | Some. | a | b | c | d | e | neutral")},
            ("5", "All.", "Some.", "neutral"),
        )
        for split, name in {"valid": "dev_matched.tsv", "valid_mm": "dev_mismatched.tsv"}.items()
    ),
    *(
        ("MNLI", split, {name: tsv(MNLI_TEST, "5 | 1 | 1n | g | p | p | p | p | A | B")}, ("5", "A", "B", None))
        for split, name in {"test": "test_matched.tsv", "test_mm": "test_mismatched.tsv"}.items()
    ),
    (
        "QNLI",
        "train",
        {"train.tsv": tsv("index | question | sentence | label", "2 | Who? | He did. | not_entailment")},
        ("2", "Who?", "He did.", "not_entailment"),
    ),
    (
        "RTE",
        "valid",
        {"dev.tsv": tsv("index | sentence1 | sentence2 | label", "2 | A. | B. | entailment")},
        ("2", "A.", "B.", "entailment"),
    ),
    ("RTE", "test", {"test.tsv": tsv("index | sentence1 | sentence2", "2 | A. | B.")}, ("2", "A.", "B.", None)),
    (
        "WNLI",
        "train",
        {"train.tsv": tsv("index | sentence1 | sentence2 | label", "2 | A. | B. | 1")},
        ("2", "A.", "B.", "1"),
    ),
    *(
        ("AX", "test", {name: tsv("index | sentence1 | sentence2", "0 | A. | B.")}, ("0", "A.", "B.", None))
        for name in ("AX.tsv", "diagnostic.tsv", "diagnostic/diagnostic.tsv", "MNLI/diagnostic.tsv")
    ),
    *(
        (name, "train", {"train.csv": r'"2","Good.\n\nHe said \""wow\"", really."' + "\n"}, ("0", text, None, "2"))
        for name, text in {
            "Yelp-2": 'Good.\n\nHe said "wow", really.',
            "Yelp-5": 'Good.\n\nHe said "wow", really.',
        }.items()
    ),
    (
        "AG",
        "train",
        {"train.csv": '"3","Wall St. ""Bears""","a\\band, of"\n'},
        ("0", 'Wall St. "Bears"', "a\\band, of", "3"),
    ),
    ("AG", "valid", {"test.csv": '"3","Title","of test"\n'}, ("0", "Title", "of test", "3")),
    ("AG", "valid", {"test.csv": '"3","T","x"\n', "valid.csv": '"4","T","y"\n'}, ("0", "T", "y", "4")),
    ("AG", "valid", {"test.csv": '"3","T","x"\n', "dev.csv": '"4","T","y"\n'}, ("0", "T", "y", "4")),
    ("DBpedia", "test", {"test.csv": '14,"A Book"," It is one."\n'}, ("0", "A Book", " It is one.", "14")),
    ("Amazon-2", "train", {"train.csv": '"1","","Bad\\none"\n'}, ("0", "", "Bad\none", "1")),
    ("Amazon-5", "train", {"train.csv": '"5","Good","One"\n'}, ("0", "Good", "One", "5")),
    *(
        (
            "IMDB",
            split,
            {f"{folder}/pos/0_9.txt": "Great.<br />\nYes.\n", f"{folder}/neg/3_1.txt": "Bad."},
            ("neg/3_1", "Bad.", None, "neg"),
        )
        for split, folder in {"train": "train", "valid": "test", "test": "test"}.items()
    ),
]


@pytest.mark.parametrize(("name", "split", "files", "expected"), LAYOUTS)
def test_official_layout(tmp_path, name, split, files, expected):
    folder = write(tmp_path, files)
    spec = get_dataset(name)
    assert read_split(spec, folder, split)[0] == Example(*expected)
    used = source_files(spec, str(folder), split)
    assert used
    assert all(path.is_file() for path in used)


def test_each_set_has_a_layout_above():
    assert {name for name, *_ in LAYOUTS} == set(DATASETS)


@pytest.mark.parametrize(("name", "split", "files", "expected"), LAYOUTS)
def test_byte_order_mark_and_crlf_change_nothing(tmp_path, name, split, files, expected):
    plain, other = write(tmp_path / "plain", files), tmp_path / "other"
    texts = {key: text if isinstance(text, bytes) else text.encode() for key, text in files.items()}
    marked = {
        key: b"\xef\xbb\xbf" + text.removeprefix(b"\xef\xbb\xbf") if name == "IMDB" else
        b"\xef\xbb\xbf" + text.removeprefix(b"\xef\xbb\xbf").replace(b"\n", b"\r\n")
        for key, text in texts.items()
    }  # fmt: skip
    spec = get_dataset(name)
    assert read_split(spec, write(other, marked), split) == read_split(spec, plain, split)


def test_columns_are_found_by_name(tmp_path):
    write(tmp_path, {"train.tsv": tsv("extra | label | sentence2 | index | sentence1", "x | entailment | B | 12 | A")})
    assert read_split(DATASETS["RTE"], tmp_path, "train") == [Example("12", "A", "B", "entailment")]


def test_mrpc_as_microsoft_ships_it(tmp_path):
    rows = tsv(MSR, "1 | 1 | 2 | a | b", "0 | 3 | 4 | c | d", "1 | 2 | 1 | e | f").replace("\n", "\r\n")
    write(tmp_path, {"msr_paraphrase_train.txt": rows, "msr_paraphrase_test.txt": rows, "dev_ids.tsv": "3\t4\n"})
    texts = {
        split: [e.text_a for e in read_split(DATASETS["MRPC"], tmp_path, split)] for split in DATASETS["MRPC"].splits
    }
    assert texts == {"train": ["a", "e"], "valid": ["c"], "test": ["a", "c", "e"]}
    assert [e.label for e in read_split(DATASETS["MRPC"], tmp_path, "test")] == [
        "1",
        "0",
        "1",
    ]  # Microsoft's has labels
    assert [e.id for e in read_split(DATASETS["MRPC"], tmp_path, "train")] == ["0", "1"]
    assert [path.name for path in source_files(DATASETS["MRPC"], tmp_path, "valid")] == [
        "msr_paraphrase_train.txt",
        "dev_ids.tsv",
    ]
    (tmp_path / "dev_ids.tsv").unlink()
    with pytest.raises(InputError, match=r"expected dev_ids\.tsv"):
        read_split(DATASETS["MRPC"], tmp_path, "train")
    write(
        tmp_path,
        {"dev_ids.tsv": "3\t4\n", "msr_paraphrase_train.txt": tsv("Quality | #1 String | #2 String", "1 | a | b")},
    )
    with pytest.raises(InputError, match="expected one column named '#1 ID'"):
        read_split(DATASETS["MRPC"], tmp_path, "train")


def test_imdb_order_sources_and_missing_class(tmp_path):
    files = {f"train/{label}/{i}_5.txt": f"{label} {i}<br />x\n" for label in ("pos", "neg") for i in (0, 1)}
    write(tmp_path, {**files, "train/unsup/0_0.txt": "no"})
    examples = read_split(DATASETS["IMDB"], tmp_path, "train")
    assert [(e.id, e.text_a, e.label) for e in examples[1:3]] == [
        ("neg/1_5", "neg 1\nx", "neg"),
        ("pos/0_5", "pos 0\nx", "pos"),
    ]
    assert len(source_files(DATASETS["IMDB"], tmp_path, "train")) == 4
    shutil.rmtree(tmp_path / "train/pos")
    with pytest.raises(InputError, match=r"expected pos/\*\.txt .*the folder holds neg/, unsup/"):
        read_split(DATASETS["IMDB"], tmp_path, "train")


# the table itself


def test_table():
    for name, spec in DATASETS.items():
        assert spec.name == name
        assert set(spec.metrics) <= {"accuracy", "f1", "mcc", "pearson", "spearman"}
        assert set(spec.submission) <= set(spec.splits)
        assert spec.class_names is None or len(spec.class_names) == len(spec.labels or ())
        assert len(set(spec.labels or ())) == len(spec.labels or ())
        assert pickle.loads(pickle.dumps(spec)) == spec
    assert [name for name, spec in DATASETS.items() if spec.labels is None] == ["STS-B"]
    assert DATASETS["MNLI"].submission == {"test": "MNLI-m.tsv", "test_mm": "MNLI-mm.tsv"}
    assert DATASETS["CoLA"].submission == {"test": "CoLA.tsv"}
    assert DATASETS["CoLA"].metrics[0] == "mcc"
    assert len(DATASETS["DBpedia"].labels or ()) == 14
    assert pickle.loads(pickle.dumps(Example("0", "a"))) == Example("0", "a")


@pytest.mark.parametrize(
    ("name", "official"),
    [(name, name) for name in DATASETS]
    + [("cola", "CoLA"), ("sst2", "SST-2"), ("SST-2", "SST-2"), ("sts-b", "STS-B"), ("stsb", "STS-B")]
    + [
        ("MNLI-m", "MNLI"),
        ("diagnostic", "AX"),
        ("ag", "AG"),
        ("ag_news", "AG"),
        ("AG_NEWS", "AG"),
        ("ag_news_csv", "AG"),
    ]
    + [
        ("yelp2", "Yelp-2"),
        ("yelp-2", "Yelp-2"),
        ("yelp_review_polarity", "Yelp-2"),
        ("yelp_review_full_csv", "Yelp-5"),
    ]
    + [("imdb", "IMDB"), ("dbpedia_csv", "DBpedia"), ("amazon_review_full_csv", "Amazon-5"), ("amazon5", "Amazon-5")],
)
def test_names(name, official):
    assert get_dataset(name) is DATASETS[official]


def test_aliases_are_distinct():
    names = Counter(
        plain
        for spec in DATASETS.values()
        for plain in {"".join(filter(str.isalnum, n.lower())) for n in (spec.name, *spec.aliases)}
    )
    assert max(names.values()) == 1


@pytest.mark.parametrize(("name", "hint"), [("colla", "CoLA"), ("yelp", "Yelp-"), ("mnly", "MNLI")])
def test_unknown_name(name, hint):
    with pytest.raises(InputError, match=rf"must be one of CoLA, SST-2.*got '{name}'\. Did you mean .*{hint}"):
        get_dataset(name)
    with pytest.raises(InputError, match=r"got 'zzzzzz'\. Your own"):
        get_dataset("zzzzzz")


# broken rows: set, file, its content with one good row, line of the broken row, what the message says

GOOD = {"CoLA": "gj04\t1\t\tFine.\n", "SST-2": "sentence\tlabel\nfine\t1\n", "AG": '"1","t","x"\n'}
GOOD["STS-B"] = tsv("sentence1 | sentence2 | score", "a | b | 3")
GOOD["MNLI"] = tsv("sentence1 | sentence2 | gold_label", "a | b | neutral")
BROKEN = [
    ("CoLA", "gj04\t1\tFine.\n", 2, "expected 4 columns, got 3"),
    ("CoLA", "gj04\t1\t\tFine.\tmore\n", 2, "expected 4 columns, got 5"),
    ("CoLA", "gj04\t2\t\tFine.\n", 2, "expected a label that is one of 0, 1, got '2'"),
    ("CoLA", "gj04\t1\t\t \n", 2, "expected text, got an empty text"),
    ("CoLA", b"gj04\t1\t\tcaf\xe9.\n", 2, "expected UTF-8 text, got bytes that are not UTF-8"),
    ("CoLA", b"g\xff04\t1\t\tFine\n", 2, "expected UTF-8 text, got bytes that are not UTF-8"),
    ("CoLA", "gj04\t1\t\tFi\0ne.\n", 2, "or a NUL"),
    ("CoLA", "gj04\t1\t\tFine.\r\n\ngj04\t5\t\tFine.\n", 4, "got '5'"),
    ("SST-2", "fine\t\n", 3, "got ''"),
    ("SST-2", "fine\n", 3, "expected 2 columns, got 1"),
    ("MNLI", "a\tb\t-\n", 3, "one of contradiction, entailment, neutral, got '-'"),
    ("MNLI", "a\t\tneutral\n", 3, "got an empty text"),
    ("STS-B", "a\tb\thigh\n", 3, "expected a finite number as label, got 'high'"),
    ("STS-B", "a\tb\tnan\n", 3, "expected a finite number as label, got 'nan'"),
    ("STS-B", "a\tb\t1_0\n", 3, "expected a finite number as label, got '1_0'"),
    ("STS-B", "a\tb\t\u0663\n", 3, "expected a finite number as label"),
    ("STS-B", "a\tb\t\n", 3, "expected a finite number as label, got ''"),
    ("AG", '"5","t","x"\n', 2, "one of 1, 2, 3, 4, got '5'"),
    ("AG", '"1","x"\n', 2, "expected 3 columns, got 2"),
    ("AG", '"1",""," "\n', 2, "got an empty text"),
    ("AG", '"1","t","a\nb"\n"2","t"\n', 4, "expected 3 columns, got 2"),
    ("AG", '"1","t","a\nb"\n"9","t","c\nd\ne"\n', 4, "got '9'"),
    ("AG", '"1","t","never closed\n"1","t","x"\n', 2, "broken quoting"),
    ("AG", '"1","t","x"\n"1","never closed\n1,a,b\n1,c,d\n', 3, "broken quoting that takes it to line 5"),
    ("AG", b'"1","t","\xff"\n', 2, "bytes that are not UTF-8"),
    ("AG", '"1","t","\0"\n', 2, "or a NUL"),
    ("AG", '"1","t",x\ry\n', 2, "broken quoting"),
]


@pytest.mark.parametrize(("name", "bad", "line", "message"), BROKEN)
def test_broken_row(tmp_path, caplog, name, bad, line, message):
    spec = DATASETS[name]
    file = spec.splits["train"].files[0]
    content = GOOD[name].encode() + (bad if isinstance(bad, bytes) else bad.encode())
    write(tmp_path, {file: content})
    with pytest.raises(InputError) as error:
        read_split(spec, tmp_path, "train")
    assert f"{tmp_path / file}, line {line}: " in str(error.value)
    assert message in str(error.value)
    assert "bad_rows=skip" in str(error.value)
    assert "\n" not in str(error.value)
    str(error.value).encode()  # printable, also when the row is not
    with caplog.at_level(logging.WARNING):
        assert len(read_split(spec, tmp_path, "train", bad_rows="skip")) >= 1
    [record] = caplog.records
    assert record.name == "funneltfm.data.readers"
    assert f"line {line}" in record.getMessage()


def test_skipped_rows_are_counted_once_and_keep_their_numbers(tmp_path, caplog):
    write(tmp_path, {"train.csv": '"1","t","x"\n"9","t","x"\n"1","x"\n"2","t","y"\n'})
    examples = read_split(DATASETS["AG"], tmp_path, "train", bad_rows="skip")
    assert [(e.id, e.label) for e in examples] == [("0", "1"), ("3", "2")]
    [record] = caplog.records
    assert "skipped 2 broken rows" in record.getMessage()
    assert "line 2" in record.getMessage()


def test_skipping_test_rows_warns_about_the_submission(tmp_path, caplog):
    write(tmp_path, {"test.tsv": tsv("index | sentence", "0 | a", "1 | ")})
    read_split(DATASETS["SST-2"], tmp_path, "test", bad_rows="skip")
    assert "SST-2.tsv will lack them" in caplog.text


def test_after_a_broken_quote_csv_goes_on(tmp_path):
    write(tmp_path, {"train.csv": '"1","t","x" y\n"2","t","y"\n'})
    assert [e.label for e in read_split(DATASETS["AG"], tmp_path, "train", bad_rows="skip")] == ["2"]


def test_long_row_is_shortened_in_the_message(tmp_path):
    write(tmp_path, {"test.csv": f'"7","t","{"x" * 300_000}"\n'})
    with pytest.raises(InputError) as error:
        read_split(DATASETS["AG"], tmp_path, "test")
    assert len(str(error.value)) < 600


def test_long_fields_are_read_and_the_limit_of_csv_is_put_back(tmp_path):
    write(tmp_path, {"train.csv": f'"1","t","{"x" * 300_000}"\n'})
    before = csv.field_size_limit(1000)
    try:
        assert len(read_split(DATASETS["AG"], tmp_path, "train")[0].text_b or "") == 300_000
        assert csv.field_size_limit() == 1000
    finally:
        csv.field_size_limit(before)


def test_a_label_of_thousands_of_digits_is_a_label(tmp_path):
    write(tmp_path, {"train.tsv": f"text_a\tlabel\nx\t{'9' * 5000}\ny\t2\n"})
    assert custom_dataset(tmp_path).labels == ("2", "9" * 5000)


def test_a_key_twice_in_an_object_is_a_broken_row(tmp_path):
    write(tmp_path, {"train.jsonl": '{"text_a": "x", "label": 1}\n{"text_a": "y", "label": 1, "label": 0}\n'})
    with pytest.raises(InputError, match="line 2: expected a JSON object, got a key is there twice"):
        custom_dataset(tmp_path)


@pytest.mark.parametrize("name", ["label", "id", "idx", "index"])
def test_an_optional_column_twice_is_refused(tmp_path, name):
    write(tmp_path, {"train.csv": "text_a,label\nx,1\n", "test.csv": f"text_a,{name},{name}\nx,1,0\n"})
    with pytest.raises(InputError, match=rf"test\.csv: expected one column named '{name}' .* got several"):
        read_split(custom_dataset(tmp_path), tmp_path, "test")


def test_a_long_header_is_shortened_in_the_message(tmp_path):
    write(tmp_path, {"train.tsv": "x\t" * 100_000 + "\n"})
    with pytest.raises(InputError, match="expected one column named 'sentence'") as error:
        read_split(DATASETS["SST-2"], tmp_path, "train")
    assert len(str(error.value)) < 2000


# files


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("CoLA", "", "it is empty, or a header alone"),
        ("CoLA", "\n\n", "it is empty, or a header alone"),
        ("SST-2", "", "it is empty, or a header alone"),
        ("SST-2", "sentence\tlabel\n", "it is empty, or a header alone"),
        ("SST-2", "text\tlabel\na\t1\n", r"expected one column named 'sentence' .* got none among \['text', 'label'\]"),
        ("SST-2", "sentence\na\n", "expected one column named 'label'"),
        ("SST-2", "sentence\tlabel\tlabel\na\t1\t0\n", "expected one column named 'label' .* got several"),
        ("AG", "", "it is empty, or a header alone"),
    ],
)
def test_useless_file(tmp_path, name, content, message):
    file = DATASETS[name].splits["train"].files[0]
    write(tmp_path, {file: content})
    for bad_rows in ("error", "skip"):
        with pytest.raises(InputError, match=message) as error:
            read_split(DATASETS[name], tmp_path, "train", bad_rows=bad_rows)
        assert str(tmp_path / file) in str(error.value)


def test_all_rows_broken(tmp_path):
    write(tmp_path, {"train.tsv": "x\ny\n"})
    with pytest.raises(InputError, match=r"all its 2 rows are broken; the first: .*line 1"):
        read_split(DATASETS["CoLA"], tmp_path, "train", bad_rows="skip")


@pytest.mark.parametrize(("name", "script"), [("CoLA", "download_glue.sh"), ("AG", "download_textcls.sh")])
def test_missing_file(tmp_path, name, script):
    write(tmp_path, {"other.txt": "x", "sub/x": "x"})
    file = DATASETS[name].splits["train"].files[0]
    for function in (read_split, source_files):
        with pytest.raises(
            InputError, match=rf"expected {file} .*holds other\.txt, sub/\. Get .*data-scripts/{script}"
        ):
            function(DATASETS[name], tmp_path, "train")
    with pytest.raises(InputError, match="there is no such folder"):
        read_split(DATASETS[name], tmp_path / "nowhere", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="the folder holds nothing"):
        read_split(DATASETS[name], tmp_path / "empty", "train")


def test_wrong_arguments(tmp_path):
    with pytest.raises(InputError, match="split of CoLA must be one of train, valid, test, got 'dev'"):
        read_split(DATASETS["CoLA"], tmp_path, "dev")
    with pytest.raises(InputError, match='bad_rows must be "error" or "skip", got \'ignore\''):
        read_split(DATASETS["CoLA"], tmp_path, "train", bad_rows="ignore")
    (tmp_path / "train.tsv").mkdir()
    with pytest.raises(InputError, match=r"train\.tsv cannot be read"):
        read_split(DATASETS["CoLA"], tmp_path, "train")


# anybody's own data


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_custom_classification(tmp_path):
    write(
        tmp_path,
        {
            "train.jsonl": jsonl({"id": 7, "text": "a", "y": 10}, {"text": "b", "y": 2}, {"text": "c", "y": -1}),
            "dev.csv": 'y,id,text\n2,k,"d\n, e"\n10,,f\n',
            "test.tsv": 'text\tother\n"g\t1\n',
        },
    )
    spec = custom_dataset(tmp_path, text_a="text", label="y")
    assert isinstance(spec, DatasetSpec)
    assert (spec.labels, spec.metrics) == (("-1", "2", "10"), ("accuracy",))
    assert read_split(spec, tmp_path, "train")[0] == Example("7", "a", None, "10")
    assert read_split(spec, tmp_path, "valid") == [Example("k", "d\n, e", None, "2"), Example("1", "f", None, "10")]
    assert read_split(spec, tmp_path, "test") == [Example("0", '"g', None, None)]
    assert source_files(spec, tmp_path, "valid") == [tmp_path / "dev.csv"]
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_custom_minus_one_means_unlabelled_unless_it_is_a_label(tmp_path):
    test = "text_a,label\na,1\nb,-1\nc,\n"
    for name, other, labels in [("a", "0", ["1", None, None]), ("b", "-1", ["1", "-1", None])]:
        folder = write(tmp_path / name, {"train.csv": f"text_a,label\na,1\nb,{other}\n", "test.csv": test})
        assert [e.label for e in read_split(custom_dataset(folder), folder, "test")] == labels


def test_custom_json_values(tmp_path):
    rows = [{"idx": 0, "text_a": 5, "text_b": 1.5, "label": True}, {"text_a": "x", "text_b": "y", "label": False}]
    write(
        tmp_path,
        {"train.jsonl": jsonl(*rows).replace("1.5", "1.50") + "\n", "test.jsonl": jsonl({**rows[0], "label": None})},
    )
    spec = custom_dataset(tmp_path, text_b="text_b")
    assert spec.labels == ("false", "true")
    assert read_split(spec, tmp_path, "train")[0] == Example("0", "5", "1.50", "true")
    assert read_split(spec, tmp_path, "test") == [Example("0", "5", "1.5", None)]


def test_custom_regression(tmp_path):
    write(
        tmp_path,
        {"train.csv": "text_a,label\na,1e-1\n", "valid.csv": "text_a,label\nb,inf\n", "test.csv": "text_a\nc\n"},
    )
    spec = custom_dataset(tmp_path, regression=True)
    assert (spec.labels, spec.metrics) == (None, ("pearson", "spearman"))
    assert read_split(spec, tmp_path, "train")[0].label == "1e-1"
    assert read_split(spec, tmp_path, "test")[0].label is None
    with pytest.raises(InputError, match=r"valid\.csv, line 2: expected a finite number as label, got 'inf'"):
        read_split(spec, tmp_path, "valid")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "expected a JSON object"),
        ("[" * 100_000, "expected a JSON object"),
        ("[1]", "expected a JSON object, got other JSON"),
        ('{"text": "a", "label": "x"}', r"expected the keys \['text_a', 'label'\], got none named 'text_a'"),
        ('{"text_a": "a"}', "none named 'label'"),
        ('{"text_a": ["a"], "label": "x"}', "expected a text or a number, got a list"),
        ('{"text_a": null, "label": "x"}', "got an empty text"),
        ('{"text_a": "a", "label": null}', "expected a label that is not empty"),
        ('{"text_a": "\\u0000", "label": "x"}', "or a NUL"),
        ('{"text_a": "\\ud800", "label": "x"}', "not UTF-8"),
    ],
)
def test_custom_broken_json(tmp_path, caplog, row, message):
    write(tmp_path, {"train.jsonl": jsonl({"text_a": "a", "label": "x"}) + "\n" + row + "\n"})
    with pytest.raises(InputError, match=rf"train\.jsonl, line 3: .*{message}"):
        custom_dataset(tmp_path)
    spec = custom_dataset(tmp_path, bad_rows="skip")
    assert not caplog.records  # it is read_split that warns
    assert len(read_split(spec, tmp_path, "train", bad_rows="skip")) == 1
    assert len(caplog.records) == 1


def test_custom_label_not_in_train(tmp_path):
    write(tmp_path, {"train.tsv": "text_a\tlabel\na\tx\nb\ty\n", "validation.tsv": "text_a\tlabel\na\tx\nb\tz\n"})
    with pytest.raises(InputError, match=r"validation\.tsv, line 3: expected a label that is one of x, y, got 'z'"):
        read_split(custom_dataset(tmp_path), tmp_path, "valid")


def test_custom_two_sources_or_none(tmp_path):
    with pytest.raises(InputError, match=r"expected train\.jsonl or train\.csv or train\.tsv .*Put it there"):
        custom_dataset(tmp_path)
    write(tmp_path, {"train.tsv": "text_a\tlabel\na\tx\n", "dev.tsv": "", "valid.csv": ""})
    with pytest.raises(InputError, match=r"expected one source of custom valid, got 2: .*valid\.csv, .*dev\.tsv"):
        read_split(custom_dataset(tmp_path), tmp_path, "valid")
    with pytest.raises(InputError, match=r"test\.jsonl or"):
        read_split(custom_dataset(tmp_path), tmp_path, "test")


def test_custom_missing_column(tmp_path):
    write(tmp_path, {"train.csv": "sentence,label\na,x\n"})
    with pytest.raises(InputError, match=r"named 'text_a' .*among \['sentence', 'label'\].*name the columns"):
        custom_dataset(tmp_path)
    write(tmp_path, {"train.csv": 'text_a,"label"x\na,x\n'})
    with pytest.raises(InputError, match=r"line 1: .*broken quoting.*Correct the header"):
        custom_dataset(tmp_path, bad_rows="skip")


def hub_data():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["bad", "good"]),
            "idx": datasets.Value("int32"),
        }
    )
    rows = {"sentence": ["a", "b"], "label": [1, 0], "idx": [5, 6]}
    train = datasets.Dataset.from_dict(rows, features=features)
    test = datasets.Dataset.from_dict({**rows, "label": [-1, -1]}, features=features)
    return datasets.DatasetDict({"train": train, "validation": train, "test": test})


def save_dict(data, folder: Path) -> None:
    data.save_to_disk(folder)


def save_each(data, folder: Path) -> None:
    for split, part in data.items():
        part.save_to_disk(folder / split)


def save_parquet(data, folder: Path) -> None:
    (folder / "data").mkdir()
    for split, part in data.items():
        for i in range(2):
            part.shard(2, i).to_parquet(folder / "data" / f"{split}-0000{i}-of-00002.parquet")


@pytest.mark.parametrize("save", [save_dict, save_each, save_parquet])
def test_hugging_face(tmp_path, save):
    save(hub_data(), tmp_path)
    spec = custom_dataset(tmp_path, text_a="sentence")
    assert spec.labels == ("bad", "good")
    for split in ("train", "valid"):
        expected = [Example("5", "a", None, "good"), Example("6", "b", None, "bad")]
        assert read_split(spec, tmp_path, split) == expected
    assert [e.label for e in read_split(spec, tmp_path, "test")] == [None, None]
    assert len(source_files(spec, tmp_path, "train")) == (2 if save is save_parquet else 3)
    with pytest.raises(InputError, match="expected one column named 'nothing'"):
        custom_dataset(tmp_path, text_a="nothing")


def test_hugging_face_single_dataset_and_broken_rows(tmp_path):
    data = hub_data()["test"]
    data.save_to_disk(tmp_path / "one")
    with pytest.raises(InputError, match=r"one, row 0: .*expected a label"):  # -1 is no label of a train set
        custom_dataset(tmp_path / "one", text_a="sentence")
    hub_data()["train"].save_to_disk(tmp_path / "two")
    assert custom_dataset(tmp_path / "two", text_a="sentence").labels == ("bad", "good")


def test_hugging_face_regression_test_of_minus_ones(tmp_path):
    datasets = pytest.importorskip("datasets")
    for split, scores in {"train": [0.5, -1.0], "test": [-1.0, -1.0]}.items():
        datasets.Dataset.from_dict({"text_a": ["a", "b"], "label": scores}).to_parquet(tmp_path / f"{split}.parquet")
    spec = custom_dataset(tmp_path, regression=True)
    assert [e.label for e in read_split(spec, tmp_path, "train")] == ["0.5", "-1.0"]
    assert [e.label for e in read_split(spec, tmp_path, "test")] == [None, None]


def test_hugging_face_broken_or_absent_library(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    write(tmp_path, {"train.parquet": "no parquet"})
    with pytest.raises(InputError, match=r"expected data of the datasets library in .*train\.parquet, got an error"):
        custom_dataset(tmp_path)
    write(tmp_path / "disk", {"train/state.json": "{}"})
    with pytest.raises(InputError, match="train"):
        custom_dataset(tmp_path / "disk")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'funneltfm\[datasets\]'"):
        custom_dataset(tmp_path)


def test_importing_does_not_import_datasets():
    code = "import sys, funneltfm.data.readers; sys.exit('datasets' in sys.modules)"
    env = {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0


# round trips

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)
rows_of = st.lists(st.tuples(text, text), min_size=1, max_size=5)


def read_back(name: str, content: str) -> list[tuple[str, str | None]]:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), {name: content})
        spec = custom_dataset(folder, "first", "second")
        return [(e.text_a, e.text_b) for e in read_split(spec, folder, "train")]


@given(rows_of, st.booleans())
@settings(max_examples=60, deadline=None)
def test_jsonl_round_trip(rows, ascii_only):
    dicts = [{"first": a, "second": b, "label": 0} for a, b in rows]
    content = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in dicts)
    assert read_back("train.jsonl", content) == rows


@given(rows_of, st.sampled_from(["\n", "\r\n"]))
@settings(max_examples=60, deadline=None)
def test_csv_round_trip(rows, end):
    class Lines(list):
        write = list.append

    lines = Lines()
    quoting = (
        csv.QUOTE_ALL if end == "\n" else csv.QUOTE_MINIMAL
    )  # "\r" alone is quoted only if it is in the line's end
    csv.writer(lines, lineterminator=end, quoting=quoting).writerows(
        [("first", "second", "label"), *((*r, 0) for r in rows)]
    )
    assert read_back("train.csv", "".join(lines)) == rows


tsv_text = text.map(lambda s: s.replace("\t", " ").replace("\n", " ")).filter(str.strip)


@given(st.lists(st.tuples(tsv_text, tsv_text), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_tsv_round_trip(rows):
    content = "first\tsecond\tlabel\n" + "".join(f"{a}\t{b}\t0\n" for a, b in rows)
    assert read_back("train.tsv", content) == rows


# the real files


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real data is not in {SHARED}")
@pytest.mark.parametrize(
    ("name", "counts"), [("CoLA", (8551, 1043, 1063)), ("SST-2", (67349, 872, 1821))], ids=["CoLA", "SST-2"]
)
def test_real_glue(name, counts):
    splits = {split: read_split(DATASETS[name], SHARED / name, split) for split in ("train", "valid", "test")}
    assert tuple(map(len, splits.values())) == counts
    assert {e.label for e in splits["train"]} == {e.label for e in splits["valid"]} == {"0", "1"}
    assert {e.label for e in splits["test"]} == {None}
    assert [e.id for e in splits["test"]] == [str(i) for i in range(counts[2])]


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real data is not in {SHARED}")
def test_real_ag_news(tmp_path):
    shutil.copy(SHARED / "AG_NEWS/train_20000.csv", tmp_path / "train.csv")
    shutil.copy(SHARED / "AG_NEWS/test.csv", tmp_path / "test.csv")
    counts = {
        split: Counter(e.label for e in read_split(DATASETS["AG"], tmp_path, split))
        for split in ("train", "valid", "test")
    }
    assert counts["train"] == dict.fromkeys("1234", 5000)
    assert counts["valid"] == counts["test"] == dict.fromkeys("1234", 1900)
    assert tuple((SHARED / "AG_NEWS/classes.txt").read_text().split()) == DATASETS["AG"].class_names


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real data is not in {SHARED}")
def test_real_qqp_subset(tmp_path):
    shutil.copy(SHARED / "QQP/train_subset.tsv", tmp_path / "train.tsv")
    examples = read_split(DATASETS["QQP"], tmp_path, "train")
    assert len(examples) == 23497
    assert examples[0].id == "133273"
    assert {e.label for e in examples} == {"0", "1"}
