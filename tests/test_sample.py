"""The built-in sample: the same bytes every time, balanced, nothing twice, and no bag of words solves it."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from funneltfm.data.readers import custom_dataset, read_split
from funneltfm.data.tokenization import get_tokenizer
from funneltfm.tasks.baselines import baselines
from funneltfm.tasks.classification import Classification

SCRIPT = Path(__file__).resolve().parents[1] / "data-scripts" / "make_sample.py"


def make(folder: Path, hash_seed: int = 0, *more: str) -> Path:
    subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), *more], check=True, timeout=120,
        env=os.environ | {"PYTHONHASHSEED": str(hash_seed)},
    )  # fmt: skip
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def rows(folder: Path, split: str) -> list[dict[str, str]]:
    lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("sample") / "new folder")


def test_the_same_bytes_whatever_the_hash_seed(sample: Path, tmp_path: Path) -> None:
    assert list(digests(sample)) == ["test.jsonl", "train.jsonl", "valid.jsonl", "vocab.txt"]
    assert digests(make(tmp_path / "again", hash_seed=12345)) == digests(sample)


def test_another_seed_is_another_sample(sample: Path, tmp_path: Path) -> None:
    other = digests(make(tmp_path / "other", 0, "--seed=2"))
    assert all(other[name] != digest for name, digest in digests(sample).items() if name != "vocab.txt")


def test_sizes_and_keys(sample: Path) -> None:
    assert [len(rows(sample, split)) for split in ("train", "valid", "test")] == [4000, 1000, 1000]
    for split in ("train", "valid", "test"):
        assert all(set(row) == {"text_a", "label"} for row in rows(sample, split))


def test_no_sentence_twice(sample: Path) -> None:
    texts = Counter(row["text_a"].lower() for split in ("train", "valid", "test") for row in rows(sample, split))
    assert max(texts.values()) == 1


def test_labels_are_balanced(sample: Path) -> None:
    for split in ("train", "valid", "test"):
        counts = Counter(row["label"] for row in rows(sample, split))
        assert set(counts) == {"negative", "positive"}
        assert abs(counts["positive"] / counts.total() - 0.5) < 0.05


def test_sentences_are_sentences(sample: Path) -> None:
    for row in rows(sample, "train"):
        text = row["text_a"]
        assert text[0].isupper()
        assert text.endswith(".")
        assert "  " not in text
        assert "{" not in text
        assert " ," not in text
        assert text.isascii()
        assert 3 <= len(text.split()) <= 30


def test_a_bag_of_words_does_not_solve_it(sample: Path) -> None:
    spec = custom_dataset(sample)
    train, valid, test = (read_split(spec, sample, split) for split in ("train", "valid", "test"))
    for held_out in (valid, test):
        scores = baselines(Classification(spec), train, held_out)
        assert scores["majority"]["accuracy"] < 0.55
        assert 0.5 < scores["bag_of_words"]["accuracy"] < 0.70


def test_the_vocabulary_covers_every_split(sample: Path) -> None:
    tokenizer = get_tokenizer("word_piece", sample / "vocab.txt")
    assert 300 <= tokenizer.vocab_size <= 600
    assert tokenizer.mask_id is not None
    for split in ("train", "valid", "test"):
        ids = tokenizer.convert_texts_to_ids([row["text_a"] for row in rows(sample, split)])
        assert all(tokenizer.unk_id not in text for text in ids)
        assert sum(map(len, ids)) / sum(len(row["text_a"].split()) for row in rows(sample, split)) < 3
