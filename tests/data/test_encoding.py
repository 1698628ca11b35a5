"""Ids and segments of examples, and the processed cache: what makes another key, what happens to a damaged file."""

import dataclasses
import json
import logging
import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from funneltfm.data import encoding
from funneltfm.data.encoding import EncodedSplit, EncodingConfig, encode_examples, fit_pair, load_split
from funneltfm.data.readers import Example, custom_dataset
from funneltfm.data.tokenization import get_tokenizer
from funneltfm.errors import InputError

WORDS = ("a", "bad", "cat", "dog", "good", "man", "old", "red", "the", "was", "yes", "Zoo")


@pytest.fixture
def vocab(tmp_path: Path) -> Path:
    path = tmp_path / "vocab.txt"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(word.lower() for word in WORDS)]
    path.write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")
    return path


def write_data(folder: Path, rows: list[tuple[str, str]], split: str = "train") -> Path:
    folder.mkdir(exist_ok=True)
    lines = (json.dumps({"text_a": text, "label": label}) + "\n" for text, label in rows)
    (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


ROWS = [("the cat was good", "yes"), ("the old dog was bad", "no"), ("a man", "yes")]


# ---- pairs


def one_by_one(n_a: int, n_b: int, limit: int) -> tuple[int, int]:
    """The rule as BERT states it: while both do not fit, take a token from the longer, from b where they are equal."""
    while n_a + n_b > limit:
        if n_a > n_b:
            n_a -= 1
        else:
            n_b -= 1
    return n_a, n_b


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 300))
def test_fit_pair_removes_one_by_one(n_a: int, n_b: int, limit: int) -> None:
    assert fit_pair(n_a, n_b, limit) == one_by_one(n_a, n_b, limit)


def test_fit_pair_small_exhaustive() -> None:
    for n_a in range(14):
        for n_b in range(14):
            for limit in range(28):
                assert fit_pair(n_a, n_b, limit) == one_by_one(n_a, n_b, limit)


def test_fit_pair_is_quick_for_huge_texts() -> None:
    assert fit_pair(10**12, 3, 125) == (122, 3)


# ---- one example


def test_single_layout() -> None:
    inputs, seg_id = EncodingConfig(max_length=128).encode([11, 12, 13], None, cls_id=2, sep_id=3)
    assert inputs == [2, 11, 12, 13, 3]
    assert seg_id == [2, 0, 0, 0, 0]


def test_pair_layout() -> None:
    inputs, seg_id = EncodingConfig(max_length=128).encode([11, 12], [21, 22, 23], cls_id=2, sep_id=3)
    assert inputs == [2, 11, 12, 3, 21, 22, 23, 3]
    assert seg_id == [2, 0, 0, 0, 1, 1, 1, 1]


def test_an_empty_second_text_is_still_a_pair() -> None:
    inputs, seg_id = EncodingConfig().encode([11], [], cls_id=2, sep_id=3)
    assert inputs == [2, 11, 3, 3]
    assert seg_id == [2, 0, 0, 1]


def test_segment_ids_are_the_configured_ones() -> None:
    config = EncodingConfig(seg_id_a=5, seg_id_b=6, seg_id_cls=7)
    assert config.encode([1], [1], cls_id=2, sep_id=3)[1] == [7, 5, 5, 6, 6]


@given(st.integers(0, 60), st.none() | st.integers(0, 60), st.integers(5, 40))
def test_cut_to_max_length_and_no_shorter(n_a: int, n_b: int | None, max_length: int) -> None:
    ids_a = list(range(100, 100 + n_a))
    ids_b = None if n_b is None else list(range(300, 300 + n_b))
    inputs, seg_id = EncodingConfig(max_length=max_length).encode(ids_a, ids_b, cls_id=2, sep_id=3)
    whole = n_a + 2 if n_b is None else n_a + n_b + 3
    assert len(inputs) == len(seg_id) == min(whole, max_length)
    assert inputs[0] == 2
    assert inputs[-1] == 3
    assert inputs.count(3) == (1 if n_b is None else 2)
    kept_a = [i for i in inputs if 100 <= i < 300]
    assert kept_a == ids_a[: len(kept_a)]  # the beginning is kept
    if ids_b is None:
        assert len(kept_a) == min(n_a, max_length - 2)
    else:
        kept_b = [i for i in inputs if i >= 300]
        assert kept_b == ids_b[: len(kept_b)]
        assert (len(kept_a), len(kept_b)) == one_by_one(n_a, len(ids_b), max_length - 3)


# ---- a split


def test_encoded_split_holds_every_example_in_order(vocab: Path) -> None:
    tokenizer = get_tokenizer("word_piece", vocab)
    examples = [
        Example("x7", "the cat", None, "no"),
        Example("y", "a dog was bad", "the man", "yes"),
        Example("z", "\u200b", None, "no"),  # a text of no tokens
    ]
    encoded = encode_examples(examples, ("no", "yes"), tokenizer, EncodingConfig())
    assert len(encoded) == 3
    assert encoded.labelled
    assert encoded.ids.tolist() == ["x7", "y", "z"]
    assert encoded.labels.tolist() == [0, 1, 0]
    assert encoded.lengths.tolist() == [4, 9, 2]
    cls_id, sep_id = tokenizer.cls_id, tokenizer.sep_id
    a, b = (tokenizer.convert_text_to_ids(text) for text in ("a dog was bad", "the man"))
    item = encoded[1]
    assert item["index"] == 1
    assert item["label"] == 1
    assert item["inputs"].tolist() == [cls_id, *a, sep_id, *b, sep_id]
    assert item["seg_id"].tolist() == [2] + [0] * 5 + [1] * 3
    assert encoded[2]["inputs"].tolist() == [cls_id, sep_id]


def test_labels_may_be_absent_or_numbers_but_not_half(vocab: Path) -> None:
    tokenizer = get_tokenizer("word_piece", vocab)
    none = encode_examples([Example("0", "the cat")], ("no", "yes"), tokenizer, EncodingConfig())
    assert not none.labelled
    assert "label" not in none[0]
    numbers = encode_examples([Example("0", "a", "a", "4.25")], None, tokenizer, EncodingConfig())
    assert numbers.labels.dtype == np.float64
    assert numbers.labels.tolist() == [4.25]


def test_half_labelled_data_is_named(vocab: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text_a": "a", "label": "no"}\n{"text_a": "a", "label": "yes"}\n')
    (tmp_path / "test.jsonl").write_text('{"text_a": "a", "label": "no"}\n{"text_a": "a"}\n')
    tokenizer = get_tokenizer("word_piece", vocab)
    with pytest.raises(InputError, match=r"test in .*1 of 2"):
        load_split(custom_dataset(tmp_path), tmp_path, "test", tokenizer, EncodingConfig(), tmp_path / "cache")


# ---- the cache


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The splits that were read from their files, not taken from the cache."""
    seen: list[str] = []
    original = encoding.read_split

    def counted(spec, data_dir, split, **kwargs):
        seen.append(split)
        return original(spec, data_dir, split, **kwargs)

    monkeypatch.setattr(encoding, "read_split", counted)
    return seen


class Loader:
    """load_split with everything that belongs to the key at hand."""

    def __init__(self, folder: Path, vocab: Path, cache: Path) -> None:
        self.folder, self.vocab, self.cache = folder, vocab, cache

    def __call__(
        self,
        cased: bool = False,
        overwrite: bool = False,
        bad_rows: str = "error",
        labels: tuple[str, ...] | None = None,
        split: str = "train",
        **config: int,
    ) -> EncodedSplit:
        spec = custom_dataset(self.folder)
        if labels is not None:
            spec = dataclasses.replace(spec, labels=labels)
        tokenizer = get_tokenizer("word_piece", self.vocab, cased)
        return load_split(
            spec, self.folder, split, tokenizer, EncodingConfig(**config), self.cache, overwrite, bad_rows
        )


@pytest.fixture
def load(tmp_path: Path, vocab: Path) -> Loader:
    return Loader(write_data(tmp_path / "data", ROWS), vocab, tmp_path / "cache")


def same(one: EncodedSplit, other: EncodedSplit) -> bool:
    return all(
        np.array_equal(getattr(one, field.name), getattr(other, field.name))
        and getattr(one, field.name).dtype == getattr(other, field.name).dtype
        for field in dataclasses.fields(EncodedSplit)
    )


def test_second_time_is_from_the_cache(load: Loader, reads: list[str]) -> None:
    first, second = load(), load()
    assert reads == ["train"]
    assert same(first, second)
    assert len(list(load.cache.iterdir())) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 6},
        {"cased": True},
        {"seg_id_a": 3},
        {"seg_id_b": 3},
        {"seg_id_cls": 3},
        {"bad_rows": "skip"},
        {"labels": ("yes", "no")},
        {"split": "valid"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_setting_is_another_key(load: Loader, reads: list[str], change: dict) -> None:
    write_data(load.folder, ROWS, "valid")  # equal bytes in another split are still another split
    load()
    changed = load(**change)
    assert len(reads) == 2
    assert len(list(load.cache.iterdir())) == 2
    assert same(changed, load(**change))
    assert same(load(), load(overwrite=True))
    assert len(reads) == 3  # the last one alone


def test_another_setting_changes_the_result(load: Loader) -> None:
    """The key would be no use if the setting did nothing."""
    assert load(max_length=6).lengths.max() == 6
    assert load().lengths.max() == 7
    assert load(labels=("yes", "no")).labels.tolist() == [0, 1, 0]
    assert load(labels=("no", "yes")).labels.tolist() == [1, 0, 1]


def test_another_content_of_data_is_another_key(load: Loader, reads: list[str]) -> None:
    before = load()
    stat = (load.folder / "train.jsonl").stat()
    write_data(load.folder, [("the dog was good", "yes"), *ROWS[1:]])
    os.utime(load.folder / "train.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time
    assert (load.folder / "train.jsonl").stat().st_size == stat.st_size
    after = load()
    assert len(reads) == 2
    assert not same(before, after)


def test_another_content_of_the_vocabulary_is_another_key(load: Loader, reads: list[str]) -> None:
    before = load()
    pieces = load.vocab.read_text(encoding="utf-8").split()
    load.vocab.write_text("".join(f"{piece}\n" for piece in [*pieces[:4], *reversed(pieces[4:])]), encoding="utf-8")
    after = load()
    assert len(reads) == 2
    assert not np.array_equal(before.inputs, after.inputs)


def test_a_copy_elsewhere_shares_the_cache(load: Loader, reads: list[str], tmp_path: Path) -> None:
    load()
    load.folder = write_data(tmp_path / "copy", ROWS)
    load.vocab = Path(load.vocab.rename(tmp_path / "renamed.txt"))
    load()
    assert reads == ["train"]


def test_overwrite_reads_again_and_replaces(load: Loader, reads: list[str]) -> None:
    load()
    (path,) = load.cache.iterdir()
    before = path.stat().st_ino
    load(overwrite=True)
    assert len(reads) == 2
    assert list(load.cache.iterdir()) == [path]
    assert path.stat().st_ino != before


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {
            "empty": b"",
            "text": b"this is no archive",
            "half": content[:middle],
            "cut at the end": content[:-3],
            "flipped": content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :],
            "zeros": b"\0" * len(content),
        }.get(how, content)
    )
    if how == "array":
        with open(path, "wb") as handle:
            np.save(handle, np.arange(3))
    elif how == "pickle":
        with open(path, "wb") as handle:
            np.save(handle, np.array([{"an": "object"}], dtype=object), allow_pickle=True)
    elif how == "other keys":
        with open(path, "wb") as handle:
            np.savez(handle, something=np.arange(3))


@pytest.mark.parametrize(
    "how",
    ["empty", "text", "half", "cut at the end", "flipped", "zeros", "array", "pickle", "other keys"],
)
def test_a_damaged_file_is_made_anew(
    load: Loader, reads: list[str], how: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = load()
    (path,) = load.cache.iterdir()
    damage(path, how)
    with caplog.at_level(logging.WARNING, "funneltfm"):
        again = load()
    assert same(good, again)
    assert len(reads) == 2
    assert len(caplog.records) == 1
    assert "damaged" in caplog.text
    assert str(path) in caplog.text
    caplog.clear()
    assert same(good, load())
    assert len(reads) == 2  # it is whole again
    assert not caplog.records


def test_any_flipped_byte_is_harmless(load: Loader, reads: list[str]) -> None:
    """Wherever the disk went wrong, the ids are right or the file is made anew; never another exception."""
    good = load()
    (path,) = load.cache.iterdir()
    content = path.read_bytes()
    rng = random.Random(0)
    for position in rng.sample(range(len(content)), 120):
        path.write_bytes(
            content[:position] + bytes([content[position] ^ (1 << rng.randrange(8))]) + content[position + 1 :]
        )
        assert same(good, load()), position


def test_a_write_that_fails_leaves_nothing(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(file, **arrays):
        Path(file).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encoding.np, "savez", broken)
    with pytest.raises(OSError, match="No space"):
        load()
    assert list(load.cache.iterdir()) == []
    monkeypatch.undo()
    load()
    good = load.cache.joinpath(next(load.cache.iterdir()))
    content = good.read_bytes()
    monkeypatch.setattr(encoding.np, "savez", broken)
    with pytest.raises(OSError, match="No space"):
        load(overwrite=True)
    assert list(load.cache.iterdir()) == [good]
    assert good.read_bytes() == content  # the old one is untouched


def test_readers_never_see_half_a_file(load: Loader, caplog: pytest.LogCaptureFixture) -> None:
    """While one rewrites the file again and again, another always reads it whole."""
    good = load()
    stop = threading.Event()

    def rewrite() -> None:
        while not stop.is_set():
            load(overwrite=True)

    thread = threading.Thread(target=rewrite)
    thread.start()
    try:
        for _ in range(60):
            assert same(good, load())
    finally:
        stop.set()
        thread.join()
    assert not caplog.records


@pytest.mark.parametrize("number", [-1, 2**31, 10**30])
def test_segment_ids_fit_their_array(number: int) -> None:
    with pytest.raises(InputError, match="seg_id_b must be"):
        EncodingConfig(seg_id_b=number)
