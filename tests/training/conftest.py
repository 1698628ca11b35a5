"""Small data in every layout, and a model small enough to train in a second."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

WORDS = "a bad cat dog good great man not old red story the was we".split()
MODEL = {
    "block_size": "1_1", "d_embed": 8, "d_model": 8, "n_head": 2, "d_head": 4, "d_inner": 16,
    "separate_cls": True, "truncate_seq": True, "pool_q_only": True,
}  # fmt: skip


def sentences(n: int, seed: int) -> list[str]:
    """Sentences of 2 to 12 words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(2, 12))) for _ in range(n)]


def write_vocab(path: Path) -> Path:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    path.write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")
    return path


def write_cola(folder: Path) -> Path:
    """CoLA's layout with labels by chance."""
    rng = random.Random(0)
    for name, n, seed in (("train", 24, 1), ("dev", 11, 2)):
        rows = [f"gj04\t{rng.randint(0, 1)}\t\t{text}\n" for text in sentences(n, seed)]
        (folder / f"{name}.tsv").write_text("".join(rows), encoding="utf-8")
    rows = [f"{i}\t{text}\n" for i, text in enumerate(sentences(5, 3))]
    (folder / "test.tsv").write_text("index\tsentence\n" + "".join(rows), encoding="utf-8")
    return folder


def write_numbers(folder: Path) -> Path:
    """Numbers by chance: the correlation on the dev set goes up and down, never twice the same."""
    rng = random.Random(0)
    for name, n, seed in (("train", 24, 1), ("valid", 15, 2)):
        rows = [{"text_a": text, "label": rng.uniform(-1, 1)} for text in sentences(n, seed)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vocab(tmp_path_factory.mktemp("vocabulary") / "vocab.txt")


@pytest.fixture(scope="session")
def cola(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cola(tmp_path_factory.mktemp("cola"))


@pytest.fixture(scope="session")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_numbers(tmp_path_factory.mktemp("numbers"))


@pytest.fixture
def flags(tmp_path: Path, vocab: Path) -> Callable[..., dict]:
    """Flags of a run of one epoch on CoLA's layout; more of them by name."""

    def make(**more: object) -> dict:
        return {
            "dataset": "CoLA", "tokenizer_path": str(vocab), "output_dir": str(tmp_path / "processed"),
            "epochs": 1, "train_bsz": 4, "valid_bsz": 3, "lr": 1e-2, "device_id": -1, **MODEL,
        } | more  # fmt: skip

    return make
