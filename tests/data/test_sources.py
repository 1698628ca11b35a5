"""Every kind of source, what can be wrong with it, what is taken from it, and the real files where they are."""

import gzip
import json
import logging
import multiprocessing
import pickle
import sys
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from funneltfm.data.sources import Deferred, Mixture, Rows, concatenate, open_rows, shard, source_digest, stream_rows
from funneltfm.errors import InputError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"

ROWS = [
    {"text": "caf\u00e9, \"x\"\\u0000", "label": 1, "score": 0.1, "ok": True, "words": ["a"], "more": {"k": [None]}},
    {"text": "", "label": -(10**20), "score": 1e-300, "ok": False, "words": [], "more": {"k": []}},
    {"text": "\u2028\x85\r\t", "label": 0, "score": 2.0, "ok": None, "words": ["\U0001f600"], "more": None},
]  # fmt: skip
SMALL = [row | {"label": i, "score": i / 2} for i, row in enumerate(ROWS)]  # integers that arrow can hold


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    library = pytest.importorskip("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        library.disable_progress_bars()
        yield library
        library.enable_progress_bars()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path, rows, datasets=None):
    """Rows as a source of the kind that the path's name says."""
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".jsonl"):
        return put(path, jsonl(rows))
    if name.endswith(".json"):
        return put(path, json.dumps({"version": "1.1", "data": rows} if "data" in name else rows))
    data = datasets.Dataset.from_list(rows)
    if name.endswith(".parquet"):
        data.to_parquet(path)
    elif path.parent.name == "splits":
        datasets.DatasetDict({path.name: data, "test": data.select([0])}).save_to_disk(path.parent)
    else:
        data.save_to_disk(path)
    return str(path)


KINDS = ["x.jsonl", "x.jsonl.gz", "X.JSONL", "x.json", "data.json", "data.json.gz", "x.parquet", "folder", "splits/dev"]


@pytest.mark.parametrize("kind", KINDS)
def test_values_come_back_as_they_were(tmp_path, kind, datasets):
    expected = ROWS if "json" in kind.lower() else SMALL
    source = write(tmp_path / kind, expected, datasets)
    rows = open_rows(source)
    assert isinstance(rows, Rows)
    assert (rows.name, len(rows), rows.columns) == (source, 3, tuple(ROWS[0]))
    assert list(rows) == [rows[i] for i in range(3)] == expected
    assert repr(list(rows)) == repr(expected)  # == takes 1 for True and 1.0
    assert [rows[-1], rows[np.int64(0)]] == [expected[2], expected[0]]
    assert list(rows[1:]) == expected[1:]
    for i in (3, -4):
        with pytest.raises(IndexError, match="of 3 rows"):
            rows[i]
    rows[0]["words"].append("changed")
    assert rows[0] == expected[0]
    again = pickle.loads(pickle.dumps(rows))
    assert list(again) == expected
    assert again.where(1) == rows.where(1)
    assert list(stream_rows(source, buffer=0)) == expected


@pytest.mark.parametrize(("suffix", "mark"), [(".csv", ","), (".tsv", "\t"), (".csv.gz", ","), (".tsv.gz", "\t")])
def test_tables(tmp_path, suffix, mark):
    content = f"id{mark}text{mark}\n007{mark}caf\u00e9{mark}nan\n\n8{mark}{mark}x\n"
    expected = [{"id": "007", "text": "caf\u00e9", "": "nan"}, {"id": "8", "text": "", "": "x"}]
    for i, other in enumerate((content, "\ufeff" + content, content.replace("\n", "\r\n"), content.rstrip("\n"))):
        rows = open_rows(put(tmp_path / f"{i}{suffix}", other))
        assert list(rows) == expected
        assert rows.columns == ("id", "text", "")
        assert rows.where(1) == f"{tmp_path / f'{i}{suffix}'}, line 4"


def test_quotes_are_quotes_in_csv_and_text_in_tsv(tmp_path):
    assert list(open_rows(put(tmp_path / "a.csv", 'a,b\n"x, ""y""\nz",1\n'))) == [{"a": 'x, "y"\nz', "b": "1"}]
    assert list(open_rows(put(tmp_path / "a.tsv", 'a\tb\n"x\ty"\n'))) == [{"a": '"x', "b": 'y"'}]


def test_lines_and_sentences(tmp_path):
    assert list(open_rows(put(tmp_path / "a.tokens", "a\n \nb\r\n"))) == [{"text": "a"}, {"text": "b"}]
    row = {"words": ["a", "b"], "labels": ["O", "B"], "column_0": ["a", "b"], "column_1": ["O", "B"]}
    assert list(open_rows(put(tmp_path / "a.conll.txt", "a O\nb B\n"))) == [row]
    assert open_rows(put(tmp_path / "a.txt", "a O\nb B\n"))[0] == {"text": "a O"}


def test_mixed_columns(tmp_path):
    mixed = [{"a": 1}, {"b": 2, "a": 3}, {}, {"c": None}]
    source = put(tmp_path / "x.jsonl", jsonl(mixed))
    rows = open_rows(source)
    assert list(rows) == mixed
    assert rows.columns == ("a", "b", "c")
    assert list(stream_rows(source, buffer=0)) == mixed


def test_text_is_packed(tmp_path):
    content = jsonl({"id": i, "text": "word " * 20} for i in range(2000))
    rows = open_rows(put(tmp_path / "x.jsonl", content))
    assert len(pickle.dumps(rows)) < 1.2 * len(content)
    assert rows[1234]["id"] == 1234


def test_parquet_and_folders_stay_on_the_disk(tmp_path, datasets):
    many = [{"text": "word " * 1000} for _ in range(200)]
    for kind in ("x.parquet", "folder"):
        rows = open_rows(write(tmp_path / kind, many, datasets))
        assert len(pickle.dumps(rows)) < 10_000  # the names of files alone
        assert rows[199] == many[199]


def test_a_new_parquet_file_of_the_same_name_is_read_anew(tmp_path, datasets):
    for text in ("old", "newer"):
        assert list(open_rows(write(tmp_path / "x.parquet", [{"text": text}], datasets))) == [{"text": text}]


def test_a_folder_with_a_format_gives_plain_values(tmp_path, datasets):
    datasets.Dataset.from_list([{"x": [1, 2]}]).with_format("numpy").save_to_disk(tmp_path / "set")
    assert type(open_rows(str(tmp_path / "set"))[0]["x"]) is list


def test_class_names(tmp_path, datasets):
    names = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features(label=names, tags=datasets.List(names), text=datasets.Value("string"))
    data = datasets.Dataset.from_list([{"label": 1, "tags": [0, 1], "text": "x"}] * 3, features=features)
    data.save_to_disk(tmp_path / "set")
    data.to_parquet(tmp_path / "x.parquet")
    for source in ("set", "x.parquet"):
        rows = open_rows(str(tmp_path / source))
        assert rows[0] == {"label": 1, "tags": [0, 1], "text": "x"}
        both = concatenate([shard(rows, 2), rows[1:]])
        for view in (rows, both):
            assert [view.class_names(c) for c in ("label", "tags", "text", "none")] == [["neg", "pos"]] * 2 + [None] * 2
    plain = open_rows(put(tmp_path / "x.jsonl", '{"label": 1}\n'))
    assert plain.class_names("label") is None
    with pytest.raises(InputError, match=r"the same classes in column 'label' of .*set and .*x\.jsonl, got .*'neg'"):
        concatenate([open_rows(str(tmp_path / "set")), plain]).class_names("label")


# ---- what is wrong with a source

GOOD = {".jsonl": '{"a": 1}\n', ".csv": "a,b\n1,2\n", ".tsv": "a\tb\n1\t2\n", ".txt": "x\n", ".conll": "a O\n\n"}
GOOD |= {".jsonl.gz": GOOD[".jsonl"], ".conllu": "1\ta" + "\t_" * 8 + "\n\n"}
BROKEN = [
    (".jsonl", "{\n", "line 2: expected a JSON object, got Expecting property name"),
    (".jsonl", "[1]\n", "line 2: expected a JSON object, got other JSON: [1]"),
    (".jsonl.gz", "\n1\n", "line 3: expected a JSON object"),
    (".jsonl", '{"a": 1, "a": 2}\n', "line 2: expected a JSON object, got a key is there twice"),
    (".jsonl", '{"a": NaN}\n', "line 2: expected finite numbers (null for one that is missing)"),
    (".jsonl", '{"a": [-Infinity]}\n', "line 2: expected finite numbers"),
    (".jsonl", '{"a": 1e999}\n', "line 2: expected finite numbers"),
    (".jsonl", b'{"a": "\xff"}\n', "line 2: expected UTF-8 text, got bytes that are not UTF-8"),
    (".jsonl", b'{"\xff": 1}\n', "line 2: expected UTF-8 text, got bytes that are not UTF-8"),
    (".jsonl", '{"a": ["\\ud800"]}\n', "line 2: expected UTF-8 text, got bytes that are not UTF-8, or half a char"),
    (".jsonl", '{"a": "x\\u0000"}\n', "line 2: expected UTF-8 text, got a NUL in it"),
    (".jsonl", '{"a": "\\\\\\u0000"}\n', "line 2: expected UTF-8 text, got a NUL in it"),
    (".jsonl", "[" * 100_000, "line 2: expected a JSON object"),
    (".csv", "1\n", "line 3: expected 2 columns, got 1: ['1']"),
    (".csv", '"1"x,2\n', "line 3: expected a row of comma-separated, quoted columns"),
    (".csv", '"3\n4",5,6\n', "line 3: expected 2 columns, got 3"),
    (".csv", b"\xff,2\n", "line 3: expected UTF-8 text"),
    (".tsv", "1\0\t2\n", "line 3: expected UTF-8 text, got a NUL"),
    (".tsv", "1\t2\t3\n", "line 3: expected 2 columns, got 3"),
    (".txt", b"\n\xe9\n", "line 3: expected UTF-8 text"),
    (".conll", "b O\nc\n\n", "line 4: expected 2 columns, as in the file's first line, got 1: 'c'"),
    (".conllu", "1\tb\n\n", "line 3: expected 10 columns, got 2"),
]


@pytest.mark.parametrize(("suffix", "bad", "message"), BROKEN)
def test_broken_row(tmp_path, caplog, suffix, bad, message):
    good = GOOD[suffix].encode()
    rest = good.split(b"\n", 1)[1] if suffix in (".csv", ".tsv") else good
    source = put(tmp_path / f"x{suffix}", good + (bad if isinstance(bad, bytes) else bad.encode()) + b"\n" + rest)
    for read in (open_rows, lambda source: list(stream_rows(source))):
        with pytest.raises(InputError) as error:
            read(source)
        assert f"{source}, {message}" in str(error.value)
        assert "bad_rows=skip" in str(error.value)
        assert "\n" not in str(error.value)
        str(error.value).encode()
    with caplog.at_level(logging.WARNING):
        rows = open_rows(source, bad_rows="skip")
        assert len(rows) == 2
        assert rows[0] == rows[1]
        assert list(stream_rows(source, bad_rows="skip")) == list(rows)
    assert len(caplog.records) == 2  # of each reading
    for record in caplog.records:
        assert f"skipped 1 broken rows of {source}; the first: {source}, {message}" in record.getMessage()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", '[{"a": 1}, 2]', r"x\.json, row 1: expected an object, got other JSON: 2"),
        ("x.json", '{"data": [{"a": NaN}]}', r"x\.json, row 0: expected finite numbers"),
        ("x.json", '{"data": {}, "version": 1}', 'such a list under "data", got an object with data, version'),
        ("x.json", "3", "got other JSON"),
        ("x.json", '[\n{"a": 1},\n]', r"x\.json, line 3: expected JSON, got "),
        ("x.json", '[{"a": 1, "a": 2}]', "a key is there twice"),
        ("x.json", '{"a": 1}\n{"a": 2}\n', r"line 2: expected JSON, got Extra data.*call it \.jsonl"),
        ("x.json", b'[{"a": "\xff"}]', "row 0: expected UTF-8 text"),
        ("x.json", "[" * 100_000, "expected JSON"),
        ("x.csv", "a,a\n1,2\n", r"x\.csv: expected columns of different names in the header \(line 1\), got 'a' more"),
        ("x.tsv", "a\t \ta\n", "got 'a' more than once"),
        ("x.csv", '"a\n', "line 1: expected a row of comma-separated"),
        ("x.xlsx", "", r"expected a file that ends in one of \.jsonl, .*\.parquet, got .*x\.xlsx"),
        ("x", "", "expected a file that ends in one of"),
        ("x.tokens.head", "a", "expected a file that ends in one of"),
    ],
)
def test_useless_file(tmp_path, name, content, message):
    source = put(tmp_path / name, content)
    with pytest.raises(InputError, match=message):
        open_rows(source)
    with pytest.raises(InputError, match=message):
        list(stream_rows(source))


@pytest.mark.parametrize(
    ("name", "content"),
    [(f"x{suffix}", content) for suffix in (*GOOD, ".json") for content in ("", "\n \n", "\ufeff")]
    + [("x.csv", "a,b\n"), ("x.tsv", "a\tb\n\n"), ("x.json", "[]"), ("x.json", '{"data": []}')]
    + [("x.jsonl", '{"header": {"dataset": "x"}}\n'), ("x.conllu", "# a comment\n"), ("x.conll", "-DOCSTART- O\n")],
)
def test_empty_file(tmp_path, name, content):
    source = put(tmp_path / name, content)
    with pytest.raises(InputError, match=r"expected rows in .*, but it is empty, or a header alone"):
        open_rows(source)
    with pytest.raises(InputError, match=r"expected rows in .*, but it is empty, or a header alone"):
        list(stream_rows(source))
    assert name == "x.json" or list(stream_rows(source, worker=1, workers=2)) == []  # one says it for all


def test_all_rows_broken(tmp_path):
    with pytest.raises(InputError, match="expected rows in"):
        open_rows(put(tmp_path / "x.jsonl", "1\n2\n"), bad_rows="skip")


@pytest.mark.parametrize(
    "content", [b"no gzip", gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:-20], b"\x1f\x8b\x08\0" + b"x" * 50]
)
def test_broken_gz(tmp_path, content):
    source = tmp_path / "x.jsonl.gz"
    source.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.jsonl\.gz cannot be read .*Check the file"):
        open_rows(str(source))


def test_folders_that_are_nothing(tmp_path, datasets):
    (tmp_path / "empty").mkdir()
    put(tmp_path / "other/a.jsonl", "{}")
    for folder, holds in (("empty", "holds nothing"), ("other", r"holds a\.jsonl\. Name a file in it")):
        with pytest.raises(InputError, match=holds):
            open_rows(str(tmp_path / folder))
    write(tmp_path / "splits/dev", SMALL, datasets)
    for source in (tmp_path / "splits", tmp_path / "splits/train"):
        with pytest.raises(InputError, match=r"one of the splits dev, test of the DatasetDict in .*splits, got .*/dev"):
            open_rows(str(source))
    assert len(open_rows(str(tmp_path / "splits/test"))) == 1
    write(tmp_path / "set", SMALL, datasets)
    for broken in ("data-00000-of-00001.arrow", "state.json"):
        (tmp_path / "set" / broken).write_text("{}")
        with pytest.raises(InputError, match=r"expected data of the datasets library in .*set, got an error: "):
            open_rows(str(tmp_path / "set"))


def test_broken_parquet(tmp_path, datasets):
    datasets.Dataset.from_dict({"a": []}).to_parquet(tmp_path / "empty.parquet")
    put(tmp_path / "x.parquet", b"PAR1 nothing PAR1")
    for name in ("empty", "x"):
        for read in (open_rows, lambda source: list(stream_rows(source))):
            with pytest.raises(InputError, match=rf"{name}\.parquet"):
                read(str(tmp_path / f"{name}.parquet"))


def test_bug_11_what_looks_local_never_goes_to_the_hub(tmp_path, monkeypatch):
    """`x.jsonl` was taken for the set `x` of the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)  # whoever imports it fails
    put(Path("x/y.jsonl"), '{"a": 1}\n')
    assert list(open_rows("x/y.jsonl")) == [{"a": 1}]
    for source, message in [
        ("x/z.jsonl", r"expected a file or folder x/z\.jsonl, but .*/x holds y\.jsonl\. Did you mean 'y\.jsonl'\?"),
        ("nowhere/x/y.csv", "there is no folder nowhere/x"),
        ("x/train", "expected a file or folder x/train"),  # there is a folder x
        ("x/y/train", "expected a file or folder x/y/train"),
        ("./squad/train", "expected a file or folder squad/train"),
        ("/squad/train", "expected a file or folder /squad/train"),
        ("../squad/train", "expected a file or folder"),
        ("y.parquet", "expected a file or folder y"),
        ("squad", "owner/name/split"),
        ("a/b/c/d", "owner/name/split"),
        ("a b/train", "owner/name/split"),
        ("", "got an empty text"),
    ]:
        with pytest.raises(InputError, match=message):
            open_rows(source)
        with pytest.raises(InputError, match=message):
            stream_rows(source)


def test_the_hub(tmp_path, monkeypatch, datasets):
    calls = []

    def load_dataset(*args, streaming=False, **kwargs):
        calls.append((args, kwargs))
        data = datasets.Dataset.from_list([{"text": str(i)} for i in range(1000)])
        return data.to_iterable_dataset() if streaming else data

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = open_rows("glue/train", "cola")
    assert (rows.name, len(rows), rows[7]) == ("glue/train", 1000, {"text": "7"})
    assert rows.where(7) == "glue/train, row 7"
    open_rows("owner/a_name-1.0/validation[:10%]")
    parts = [list(stream_rows("owner/name/test", rank=i, ranks=3, buffer=10)) for i in range(3)]
    assert sorted(int(row["text"]) for part in parts for row in part) == list(range(1000))
    assert calls == [
        (("glue", "cola"), {"split": "train"}),
        (("owner/a_name-1.0", None), {"split": "validation[:10%]"}),
        *([(("owner/name", None), {"split": "test"})] * 3),
    ]


@pytest.mark.parametrize(
    "error", [ConnectionError("no\nnetwork"), ValueError("Unknown split"), RuntimeError("scripts")]
)
def test_the_hub_fails(tmp_path, monkeypatch, datasets, error):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = rf"the split 'train' of the set 'owner/name' \(c\) on the .* hub, got {type(error).__name__}: "
    for read in (open_rows, lambda *source: list(stream_rows(*source))):
        with pytest.raises(InputError, match=message) as caught:
            read("owner/name/train", "c")
        assert "\n" not in str(caught.value)


def test_a_configuration_is_for_the_hub_alone(tmp_path):
    source = put(tmp_path / "x.txt", "x")
    for read in (open_rows, stream_rows):
        with pytest.raises(InputError, match=r"a configuration \('c'\) belongs to a set of the Hugging Face hub"):
            read(source, "c")


def test_without_the_datasets_library(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    put(tmp_path / "x.parquet", "")
    put(tmp_path / "folder/state.json", "{}")
    for source in ("x.parquet", "folder", "squad/train"):
        for read in (open_rows, lambda source: list(stream_rows(source))):
            with pytest.raises(InputError, match=rf"{source} needs the datasets library .*'funneltfm\[datasets\]'"):
                read(source)


def test_wrong_arguments(tmp_path):
    source = put(tmp_path / "x.txt", "x")
    for read in (open_rows, stream_rows):
        with pytest.raises(InputError, match='bad_rows must be "error" or "skip", got \'ignore\''):
            read(source, bad_rows="ignore")
    for wrong in ({"rank": 1}, {"worker": -1}, {"workers": 0}, {"buffer": -1}, {"taken": -1}):
        with pytest.raises(InputError, match="expected 0 <= rank < ranks"):
            stream_rows(source, **wrong)


# ---- fewer and more


def numbers(folder, name, count):
    return open_rows(put(folder / f"{name}.csv", "x\n" + "".join(f"{name}{i}\n" for i in range(count))))


def test_shard(tmp_path):
    rows = numbers(tmp_path, "a", 7)
    assert [row["x"] for row in shard(rows, 3)] == ["a0", "a3", "a6"]
    assert list(shard(rows, 1)) == list(rows)
    assert len(shard(rows, 100)) == 1
    assert shard(rows, 3).where(-1).endswith("a.csv, line 8")
    with pytest.raises(InputError, match="positive number, got 0"):
        shard(rows, 0)


def test_concatenate(tmp_path):
    a, b = numbers(tmp_path, "a", 3), open_rows(put(tmp_path / "b.jsonl", '{"y": 1}\n\n{"x": 2}\n'))
    both = concatenate([a, b, a])
    assert list(both) == [*a, *b, *a]
    assert both.columns == ("x", "y")
    assert [both[-1], both[3]] == [{"x": "a2"}, {"y": 1}]
    assert both.where(4) == f"{b.name}, line 3"
    assert both.where(-1) == f"{a.name}, line 4"
    assert both.name == f"{a.name} + {b.name} + {a.name}"
    assert list(pickle.loads(pickle.dumps(both[::-1]))) == [*a, *b, *a][::-1]
    assert concatenate([a]) is a
    with pytest.raises(InputError, match="got none"):
        concatenate([])


def mixed(sizes, weights):
    """Of sources of these sizes, one after another."""
    return Mixture(np.repeat(np.arange(len(sizes)), sizes), weights, [f"set {i}" for i in range(len(sizes))])


def test_a_mixture_has_its_shares_exactly():
    mixture = mixed([45, 5], [0.7, 0.3])
    epoch = mixture.epoch(1, 0)
    assert epoch.dtype == np.int64
    counts = np.bincount(epoch, minlength=50)
    assert counts[:45].sum() == 35
    assert set(counts[:45]) == {0, 1}
    assert set(counts[45:]) == {3}  # 15 of 5
    assert (epoch == mixture.epoch(1, 0)).all()
    for other in ((1, 1), (2, 0)):
        assert (epoch != mixture.epoch(*other)).any()


def test_examples_of_a_source_need_not_stand_together():
    parts = np.array([0, 1, 0, 0, 1, 0])
    epoch = Mixture(parts, [1, 2], ["a", "b"]).epoch(0, 0)
    assert sorted(parts[epoch]) == [0, 0, 1, 1, 1, 1]
    assert Counter(epoch[parts[epoch] == 1].tolist()) == {1: 2, 4: 2}


def test_a_mixture_goes_through_all_examples_before_any_comes_again():
    mixture = mixed([10, 2], [1, 1])
    taken = [i for epoch in range(5) for i in mixture.epoch(3, epoch).tolist()]
    assert Counter(i for i in taken if i < 10) == dict.fromkeys(range(10), 3)
    assert Counter(i for i in taken if i >= 10) == {10: 15, 11: 15}
    first = [i for i in mixture.epoch(3, 0).tolist() + mixture.epoch(3, 1).tolist() if i < 10]
    assert len(first) == 12
    assert set(first) == set(range(10))


@given(st.lists(st.tuples(st.integers(1, 12), st.floats(1e-3, 1e3)), min_size=1, max_size=4))
def test_any_mixture(parts):
    epoch_size = sum(size for size, _ in parts)
    mixture = mixed(*zip(*parts, strict=True))
    total = sum(weight for _, weight in parts)
    starts = np.cumsum([0] + [size for size, _ in parts])
    counts = np.zeros(starts[-1], int)
    for epoch in range(3):
        indices = mixture.epoch(7, epoch)
        assert len(indices) == epoch_size
        counts += np.bincount(indices, minlength=starts[-1])
        for i, (_, weight) in enumerate(parts):
            share = ((starts[i] <= indices) & (indices < starts[i + 1])).sum()
            assert abs(share - epoch_size * weight / total) < 1
    for start, end in pairwise(starts):
        assert np.ptp(counts[start:end]) <= 1  # over three epochs together


def test_equal_fractions_go_to_the_first():
    assert mixed([3, 3, 2], [1, 1, 1]).quotas == [3, 3, 2]
    assert mixed([4, 3, 3], [0.1, 0.2, 0.7]).quotas == [1, 2, 7]
    assert mixed([1, 2, 2], [0.3, 0.1, 0.6]).quotas == [2, 0, 3]  # 1.5, 0.5 and 3: as written, not as floats
    assert mixed([1, 2], [1e-9, 1]).quotas == [0, 3]
    assert len(mixed([1, 2], [1e-9, 1]).epoch(0, 5)) == 3


def test_a_source_without_examples_cannot_be_drawn_from():
    with pytest.raises(InputError, match="expected examples of set 1 to draw from, but no row makes one"):
        mixed([3, 0], [1, 1])


# ---- streams

STREAMED = ["x.jsonl", "x.jsonl.gz", "x.csv", "x.tsv", "x.txt", "x.conll", "x.json", "x.parquet", "folder"]


def streamed(folder, kind, datasets, count=3000):
    name = folder / kind
    texts = [str(i) for i in range(count)]
    if kind in ("x.csv", "x.tsv"):
        return put(name, "text\n" + "\n".join(texts))
    if kind in ("x.txt", "x.conll"):
        return put(name, "\n\n".join(texts))
    return write(name, [{"text": text} for text in texts], datasets)


def value(row):
    return int(row["text"] if "text" in row else row["words"][0])


def values(rows):
    return [value(row) for row in rows]


@pytest.mark.parametrize("kind", STREAMED)
def test_streams(tmp_path, kind, datasets):
    source = streamed(tmp_path, kind, datasets)
    assert values(stream_rows(source, buffer=0)) == values(stream_rows(source, buffer=1)) == list(range(3000))
    whole = values(stream_rows(source, seed=1, buffer=100))
    assert sorted(whole) == list(range(3000))
    assert whole != sorted(whole)
    assert whole == values(stream_rows(source, seed=1, buffer=100))
    assert whole != values(stream_rows(source, seed=2, buffer=100))
    assert whole != values(stream_rows(source, seed=1, epoch=1, buffer=100))
    # one goes on where another stopped
    for taken in (0, 1, 1500, 2999, 3000, 4000):
        assert values(stream_rows(source, seed=1, buffer=100, taken=taken)) == whole[taken:]
    # together they have each row once; 7 divides neither the rows nor the batches of parquet
    for ranks, workers in ((1, 2), (2, 3), (7, 1)):
        places = [{"rank": rank, "worker": worker} for rank in range(ranks) for worker in range(workers)]
        parts = [values(stream_rows(source, ranks=ranks, workers=workers, buffer=10, **place)) for place in places]
        assert sorted(chain(*parts)) == list(range(3000))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("kind", STREAMED)
def test_rows_of_a_stream_have_the_same_numbers_for_all(tmp_path, kind, datasets):
    source = streamed(tmp_path, kind, datasets)
    stream = stream_rows(source, buffer=0)
    numbers = {value(row): stream.number for row in stream}
    assert len({*numbers.values()}) == 3000
    for worker in range(7):
        stream = stream_rows(source, seed=worker, buffer=10, worker=worker, workers=7)
        assert all(numbers[value(row)] == stream.number for row in stream)


def test_a_stream_of_few_rows(tmp_path):
    source = put(tmp_path / "x.txt", "0\n1\n2\n")
    assert [values(stream_rows(source, worker=i, workers=5)) for i in range(5)] == [[0], [1], [2], [], []]
    orders = {tuple(values(stream_rows(source, seed=seed))) for seed in range(100)}
    assert len(orders) == 6


def test_a_stream_of_several_sources(tmp_path):
    """Each row once, whoever reads it; files of one row are dealt to all."""
    sources = [put(tmp_path / f"{i}.txt", f"{i}\n") for i in range(4)]
    sources.append(put(tmp_path / "many.txt", "".join(f"{i}\n" for i in range(4, 50))))
    stream = stream_rows(sources, buffer=0)
    numbers = {value(row): stream.number for row in stream}
    assert list(numbers) == list(range(50))
    assert [divmod(numbers[i], 5) for i in (2, 4, 49)] == [(1, 2), (1, 4), (46, 4)]  # line, source
    shares = []
    for worker in range(4):
        stream = stream_rows(sources, buffer=3, worker=worker, workers=4)
        shares.append([value(row) for row in stream if numbers[value(row)] == stream.number])
    assert sorted(i for share in shares for i in share) == list(range(50))
    assert all(len({*share} & {0, 1, 2, 3}) == 1 for share in shares)
    empty = put(tmp_path / "empty.txt", "")
    with pytest.raises(InputError, match=r"empty\.txt"):
        list(stream_rows([*sources, empty]))
    with pytest.raises(InputError, match=r"configuration .*0\.txt lies here"):
        stream_rows(sources, "en")


def test_a_row_does_not_come_before_the_buffer_has_it(tmp_path):
    source = put(tmp_path / "x.txt", "\n".join(map(str, range(1000))))
    order = values(stream_rows(source, buffer=50))
    assert all(value <= place + 50 for place, value in enumerate(order))
    assert max(abs(value - place) for place, value in enumerate(order)) > 50


def test_a_stream_reads_no_further_than_it_must(tmp_path):
    source = put(tmp_path / "x.jsonl", '{"text": "0"}\n' * 20 + "broken\n")
    stream = stream_rows(source, buffer=5)
    assert len([next(stream) for _ in range(15)]) == 15
    with pytest.raises(InputError, match="line 21"):
        list(stream)


def test_a_stream_of_the_hub_in_workers_of_a_loader(monkeypatch, tmp_path, datasets):
    """An IterableDataset deals itself out to the workers of torch's loader; dealt out twice, rows would be lost."""
    torch_data = pytest.importorskip("torch.utils.data")
    data = datasets.Dataset.from_list([{"text": str(i)} for i in range(100)]).to_iterable_dataset(num_shards=4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)

    class Stream(torch_data.IterableDataset):
        def __iter__(self):
            worker = torch_data.get_worker_info()
            return stream_rows("owner/name/train", worker=worker.id, workers=worker.num_workers)

    loader = torch_data.DataLoader(Stream(), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert sorted(values(loader)) == list(range(100))


@pytest.mark.parametrize("kind", ["folder", "x.parquet", "hub"])
def test_a_stream_knows_the_names_of_classes(kind, monkeypatch, tmp_path, datasets):
    names = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features({"label": names, "tags": datasets.Sequence(names), "text": datasets.Value("string")})
    rows = [{"label": i % 2, "tags": [1, 0], "text": str(i)} for i in range(6)]
    data = datasets.Dataset.from_list(rows, features=features)
    source = "owner/name/train" if kind == "hub" else str(tmp_path / kind)
    if kind == "hub":
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data.to_iterable_dataset())
    elif kind == "folder":
        data.save_to_disk(source)
    else:
        data.to_parquet(source)
    stream = stream_rows(source, buffer=0)
    assert [stream.class_names(column) for column in ("label", "tags", "text", "none")] == [["neg", "pos"]] * 2 + [
        None,
        None,
    ]
    assert list(stream) == rows


def test_rows_in_a_process_of_its_own(tmp_path, datasets):
    sources = [write(tmp_path / kind, SMALL, datasets) for kind in ("x.jsonl", "x.parquet", "folder")]
    rows = concatenate([open_rows(source) for source in sources])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(rows.__getitem__, range(9)) == SMALL * 3


# ---- the real files


def real(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip("the shared data are not on this machine")
    return str(path)


@pytest.mark.parametrize(
    ("name", "count", "columns"),
    [
        ("WikiGold/wikigold.conll.txt", 1696, "words labels column_0 column_1"),
        (
            "UD_English-LinES/en_lines-ud-train.conllu",
            3457,
            "words id form lemma upos xpos feats head deprel deps misc",
        ),
        ("UD_English-LinES/en_lines-ud-dev.conllu", 1118, "words id form lemma upos xpos feats head deprel deps misc"),
        ("UD_English-LinES/en_lines-ud-test.conllu", 1121, "words id form lemma upos xpos feats head deprel deps misc"),
        ("SQuAD-v1.1/dev-v1.1.32articles.json", 32, "title paragraphs"),
        ("RACE/dev_middle.jsonl", 368, "answers options questions article id"),
        ("RACE/dev_high.jsonl", 1021, "answers options questions article id"),
        ("WikiQA/WikiQA-dev.tsv", 2733, "QuestionID Question DocumentID DocumentTitle SentenceID Sentence Label"),
        ("WikiQA/WikiQA-test.tsv", 6165, "QuestionID Question DocumentID DocumentTitle SentenceID Sentence Label"),
        ("wikitext-2/wiki.valid.tokens", 2461, "text"),
        ("wikitext-2/wiki.test.tokens", 2891, "text"),
        ("wikitext-2/wiki.train.tokens", 23767, "text"),
        ("SciTLDR-A/dev.jsonl", 619, "source source_labels rouge_scores paper_id target title"),
        ("DialogSum/dialogsum.dev.jsonl", 500, "fname dialogue summary topic"),
    ],
)
def test_real_files(name, count, columns):
    rows = open_rows(real(name))
    assert len(rows) == count
    assert " ".join(rows.columns) == columns
    assert rows[-1]


def test_real_questions_words_and_lines():
    questions = [
        q for row in open_rows(real("SQuAD-v1.1/dev-v1.1.32articles.json")) for p in row["paragraphs"] for q in p["qas"]
    ]
    assert len(questions) == 7595
    gold = open_rows(real("WikiGold/wikigold.conll.txt"))
    assert {label for row in gold for label in row["labels"]} == {"O", "I-PER", "I-LOC", "I-ORG", "I-MISC"}
    assert all(len(row["words"]) == len(row["labels"]) for row in gold)
    content = Path(real("UD_English-LinES/en_lines-ud-dev.conllu")).read_text(encoding="utf-8")
    words = sum(line.split("\t")[0].isdigit() for line in content.split("\n"))
    assert sum(len(row["words"]) for row in open_rows(real("UD_English-LinES/en_lines-ud-dev.conllu"))) == words
    lines = Path(real("wikitext-2/wiki.valid.tokens")).read_text(encoding="utf-8").split("\n")
    assert len(lines) - 1 == 3760
    assert [row["text"] for row in open_rows(real("wikitext-2/wiki.valid.tokens"))] == [x for x in lines if x.strip()]


# ---- documents


DOCUMENTS = "\n \nOne.\r\n  Two. \n\t\n\n = Three = \nFour"


@pytest.mark.parametrize("name", ["a.txt", "a.tokens", "a.txt.gz"])
def test_documents_of_text_files(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(DOCUMENTS.encode()) if name.endswith(".gz") else DOCUMENTS.encode())
    rows = open_rows(str(path), documents=True)
    assert list(rows) == [{"text": "One.\nTwo."}, {"text": "= Three =\nFour"}]
    assert [rows.where(i).rpartition(", ")[2] for i in range(2)] == ["line 3", "line 7"]
    assert list(stream_rows(str(path), buffer=0, documents=True)) == list(rows)
    shares = [list(stream_rows(str(path), buffer=0, rank=rank, ranks=2, documents=True)) for rank in range(2)]
    assert [row for share in shares for row in share] == list(rows)
    assert len(open_rows(str(path))) == 4  # lines


def test_documents_of_other_files_are_their_rows(tmp_path):
    source = put(tmp_path / "a.jsonl", '{"text": "a\\nb"}\n\n{"text": "c"}\n')
    assert list(open_rows(source, documents=True)) == list(open_rows(source)) == [{"text": "a\nb"}, {"text": "c"}]


def test_documents_with_bytes_that_are_no_text(tmp_path):
    source = tmp_path / "a.txt"
    source.write_bytes(b"good\n\nfine\n\xe9\n\nlast\n")
    with pytest.raises(InputError, match="line 3: expected UTF-8 text"):
        open_rows(str(source), documents=True)
    assert [row["text"] for row in open_rows(str(source), bad_rows="skip", documents=True)] == ["good", "last"]


# ---- what a source holds


def test_the_digest_is_of_the_content(tmp_path):
    first = put(tmp_path / "a.txt", "one\n")
    digest = source_digest(first)
    assert digest == source_digest(put(tmp_path / "b.txt", "one\n"))
    assert digest != source_digest(put(tmp_path / "b.txt", "two\n"))
    assert digest != source_digest(put(tmp_path / "b.csv", "one\n"))  # read otherwise
    with pytest.raises(InputError, match="expected a file or folder"):
        source_digest(str(tmp_path / "c.txt"))


def test_the_digest_of_a_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    digests = []
    for name, texts in (("a", ["x", "y"]), ("b", ["x", "z"])):
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / name)
        digests.append(source_digest(str(tmp_path / name)))
        assert source_digest(str(tmp_path / name)) == digests[-1]
    assert digests[0] != digests[1]


# ---- rows that are opened late


def test_deferred_rows_are_opened_once(tmp_path):
    source = put(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": "b"}\n')
    opened = []

    def now():
        opened.append(1)
        return open_rows(source)

    rows = Deferred("late", now)
    assert rows.name == "late"
    assert not opened
    assert (len(rows), list(rows), rows.columns) == (2, [{"text": "a"}, {"text": "b"}], ("text",))
    assert rows.where(1).endswith("line 2")
    assert list(rows[1:]) == [{"text": "b"}]
    assert rows.class_names("text") is None
    assert len(opened) == 1
