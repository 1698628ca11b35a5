"""Streams of batches: every row once a pass, in the same order for the same seed, exact to resume."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch

from funneltfm.data.features import Features
from funneltfm.data.streaming import RowNumbers, StreamLoader
from funneltfm.errors import InputError


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"n": n}) + "\n" for n in range(50)))
    return str(path)


def encode(rows: list[dict]) -> Features:
    return Features.of([{"row": i, "input_ids": [row["n"]] * (row["n"] % 3 + 1)} for i, row in enumerate(rows)])


def prepare(example: dict, epoch: int) -> dict:
    return example | {"epoch": epoch}


def make(examples: list[dict]) -> dict:
    return {
        "n": torch.tensor([example["input_ids"][0] for example in examples]),
        "index": torch.tensor([example["index"] for example in examples]),
        "epoch": torch.tensor([example["epoch"] for example in examples]),
    }


def loader(source: str, **more) -> StreamLoader:
    settings = {"batch_size": 4, "seed": 1, "length": 1000, "buffer": 8} | more
    return StreamLoader([source], encode, prepare, make, **settings)


def rows(batches) -> list[int]:
    return [n for batch in batches for n in batch["n"].tolist()]


def test_a_pass_has_every_row_once_and_the_next_another_order(source):
    seen = rows(islice(loader(source), 25))
    assert Counter(seen) == Counter(dict.fromkeys(range(50), 2))
    assert Counter(seen[:50]) == Counter(range(50))
    assert seen[:50] != seen[50:]
    assert seen == rows(islice(loader(source), 25))
    assert seen != rows(islice(loader(source, seed=2), 25))


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_share_a_pass(source, workers):
    """With 3 processes and 2 workers each worker has 8 or 9 rows."""
    seen = []
    for rank in range(3):
        own = loader(source, rank=rank, ranks=3, batch_size=1, num_workers=workers)
        batches = list(islice(own, 30))
        first = [batch for batch in batches if batch["epoch"].item() == 0]
        seen += rows(first)
        assert len({batch["index"].item() for batch in first}) == len(first)
    assert Counter(seen) == Counter(range(50))


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("cut", [1, 7, 12, 13, 30])
def test_a_resumed_stream_goes_on(source, workers, cut):
    whole = [batch["index"].tolist() for batch in islice(loader(source, num_workers=workers), 40)]
    first = loader(source, num_workers=workers)
    iterator = iter(first)
    for _ in range(cut):
        next(iterator)
    state = json.loads(json.dumps(first.state_dict()))
    iterator.close()
    second = loader(source, num_workers=workers)
    second.load_state_dict(state)
    assert [batch["index"].tolist() for batch in islice(second, 40 - cut)] == whole[cut:]


def test_what_cannot_go_on_is_said(source, tmp_path):
    with pytest.raises(InputError, match=r"--num_workers 2.* now it is 1"):
        loader(source).load_state_dict({"positions": [[0, 0], [0, 0]], "first": 0})
    few = tmp_path / "few.jsonl"
    few.write_text('{"n": 1}\n')
    with pytest.raises(InputError, match="too few rows for 2 processes"):
        next(iter(loader(str(few), rank=1, ranks=2)))


@pytest.mark.parametrize("kind", ["jsonl", "json", "bad lines"])
def test_an_example_is_known_by_its_row_whoever_reads_it(source, tmp_path, kind):
    """So what is drawn for it depends on (seed, pass, row) alone."""
    if kind == "json":
        (tmp_path / "rows.json").write_text(json.dumps([{"n": n} for n in range(50)]))
        source = str(tmp_path / "rows.json")
    elif kind == "bad lines":
        Path(source).write_text("".join(f'broken\n\n{{"n": {n}}}\n' if n % 3 else f'{{"n": {n}}}\n' for n in range(50)))
    known = {}
    settings = [
        *({}, {"num_workers": 2}, {"num_workers": 2, "batch_size": 7}, {"buffer": 0}, {"seed": 5, "buffer": 50}),
        *({"rank": 0, "ranks": 2}, {"rank": 1, "ranks": 2, "num_workers": 2}),
    ]
    for more in settings:
        first = {}
        for batch in islice(loader(source, **more, bad_rows="skip"), 40):
            for n, index, epoch in zip(*(batch[name].tolist() for name in ("n", "index", "epoch")), strict=True):
                assert known.setdefault(n, index) == index
                first[n] = first.get(n, 0) + (epoch == 0)
        assert set(first.values()) == {1}  # the end of a pass is of that pass, though the batch goes on with the next
    assert len(set(known.values())) == len(known) == 50


def test_blocks_are_known_by_their_rows(source, small_groups):
    known = {}
    for more in ({}, {"num_workers": 2}, {"batch_size": 5, "buffer": 0}):
        for batch in islice(block_loader(source, **more), 74):
            for pair, index in zip(batch["pairs"], batch["index"].tolist(), strict=True):
                assert known.setdefault(pair, index) == index
    assert len(set(known.values())) == len(known) == 147


# ---- documents, each of many examples


def blocks(rows: list[dict]) -> Features:
    """Three examples of row n, [n], [n, n] and [n, n, n]; none of row 7."""
    return Features.of([{"row": i, "input_ids": [row["n"]] * k} for i, row in enumerate(rows) for k in (1, 2, 3)
                        if row["n"] != 7])  # fmt: skip


def make_blocks(examples: list[dict]) -> dict:
    return make(examples) | {"pairs": [(int(e["input_ids"][0]), len(e["input_ids"])) for e in examples]}


def block_loader(source: str, **more) -> StreamLoader:
    settings = {"batch_size": 4, "seed": 1, "length": 1000, "buffer": 8, "documents": True} | more
    return StreamLoader([source], blocks, prepare, make_blocks, **settings)


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("funneltfm.data.streaming._GROUP", 12)


def test_batches_of_blocks_are_full_and_have_each_once(source, small_groups):
    batches = list(islice(block_loader(source), 74))
    assert all(len(batch["pairs"]) == 4 for batch in batches)
    seen = [pair for batch in batches for pair in batch["pairs"]]
    everything = [(n, k) for n in range(50) for k in (1, 2, 3) if n != 7]
    assert Counter(seen[:147]) == Counter(everything)
    assert Counter(seen[147:294]) == Counter(everything)
    assert seen[:147] != seen[147:294]
    index = [int(i) for batch in batches for i in batch["index"]]
    assert len({*index[:147]}) == 147
    documents = [len({n for n, _ in batch["pairs"]}) for batch in batches]
    assert sum(documents) / len(documents) > 3  # one document's blocks are spread


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cut", [1, 5, 9, 10, 37, 40])
def test_a_resumed_stream_of_blocks_goes_on(source, workers, cut, small_groups):
    whole = [batch["index"].tolist() for batch in islice(block_loader(source, num_workers=workers), 60)]
    first = block_loader(source, num_workers=workers)
    iterator = iter(first)
    for _ in range(cut):
        next(iterator)
    state = json.loads(json.dumps(first.state_dict()))
    iterator.close()
    second = block_loader(source, num_workers=workers)
    second.load_state_dict(state)
    assert [batch["index"].tolist() for batch in islice(second, 60 - cut)] == whole[cut:]


def test_a_stream_of_text_files_is_of_documents(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("".join(f"{n}\n{n}\n\n" for n in range(30)))

    def lines(rows: list[dict]) -> Features:
        return Features.of([
            {"row": i, "input_ids": [int(n) for n in row["text"].split()]} for i, row in enumerate(rows)
        ])  # fmt: skip

    seen = [batch["n"].tolist() for batch in islice(StreamLoader(
        [str(path)], lines, prepare, make, batch_size=3, seed=0, length=10, buffer=4, documents=True
    ), 10)]  # fmt: skip
    assert Counter(n for batch in seen for n in batch) == Counter(range(30))


def test_examples_of_one_row_are_spread(source):
    """A row may be an article of many questions."""
    batches = list(islice(StreamLoader(
        [source], blocks, prepare, make_blocks, batch_size=4, seed=1, length=9, buffer=0
    ), 3))  # fmt: skip
    assert Counter(pair for batch in batches for pair in batch["pairs"]) == Counter(
        (n, k) for n in range(4) for k in (1, 2, 3)
    )
    assert all(len({n for n, _ in batch["pairs"]}) > 2 for batch in batches)


@pytest.mark.parametrize("documents", [True, False])
def test_groups_without_examples_are_passed_over(source, small_groups, documents):
    def first_ones(rows: list[dict]) -> Features:
        return Features.of([{"row": i, "input_ids": [row["n"]]} for i, row in enumerate(rows) if row["n"] < 3])

    def loader_of(encode) -> StreamLoader:
        return StreamLoader(
            [source], encode, prepare, make, batch_size=1, seed=1, length=9, buffer=0, documents=documents
        )  # fmt: skip

    assert Counter(rows(islice(loader_of(first_ones), 9))) == Counter({0: 3, 1: 3, 2: 3})
    with pytest.raises(InputError, match="no row makes an example"):
        next(iter(loader_of(lambda rows: Features.of([]))))


def test_a_stream_of_other_data_does_not_go_on(source):
    first = loader(source)
    list(islice(first, 3))
    state = json.loads(json.dumps(first.state_dict()))
    with open(source, "a", encoding="utf-8") as file:
        file.write("\n")
    with pytest.raises(InputError, match=r"had \d+ bytes when it was stopped, now it has"):
        loader(source).load_state_dict(state)


def test_names_of_a_streams_examples():
    assert RowNumbers(["a.txt"])[7 * 2**24 + 3] == "7"
    assert RowNumbers(["a.txt", "b.txt"])[(7 * 2 + 1) * 2**24 + 3] == "b.txt:7"
