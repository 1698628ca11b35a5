"""Kept features: the same as in memory, made once, for one key; whole or made anew; several writers at once."""

import json
import multiprocessing
import pickle
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from funneltfm.data import kept as module
from funneltfm.data.features import Features
from funneltfm.data.kept import kept
from funneltfm.errors import InputError

KEY = {"source": "a", "length": 8}


def examples(n: int = 10, start: int = 0) -> list[dict[str, Any]]:
    return [{"input_ids": [*range(start, start + i % 4 + 1)], "row": i, "weights": [0.5] * (i % 3)} for i in range(n)]


def same(a: Features, b: Features) -> bool:
    assert len(a) == len(b)
    for i in range(len(a)):
        assert a[i].keys() == b[i].keys()
        assert all(np.array_equal(a[i][name], b[i][name]) for name in a[i])
        assert all(getattr(a[i][name], "dtype", 0) == getattr(b[i][name], "dtype", 0) for name in a[i])
    assert np.array_equal(a.lengths, b.lengths)
    return True


def never() -> Any:
    raise AssertionError("it was there already")


def folders(path: Path) -> list[Path]:
    return sorted(path.iterdir())


@pytest.mark.parametrize("at_once", [1, 3, 4096])
@pytest.mark.parametrize("n", [1, 2, 3, 10])
def test_they_are_those_in_memory(tmp_path: Path, at_once: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    wanted = Features.of([one | {"weights": [0.5, 1.5]} for one in examples(n)])
    made = kept(tmp_path, "x", KEY, lambda: (one | {"weights": [0.5, 1.5]} for one in examples(n)))
    assert same(made, wanted)
    again = kept(tmp_path, "x", KEY, never)
    assert same(again, wanted)
    flat = again.ragged["input_ids"][0]
    assert isinstance(flat.base, np.memmap)
    assert not flat.flags.writeable
    assert len(folders(tmp_path)) == 1  # nothing else is left


def test_a_note_is_kept_beside(tmp_path: Path) -> None:
    made: list[int] = []

    def some() -> Iterator[dict[str, Any]]:
        for one in examples(3):
            made.append(one["row"])
            yield one

    assert kept(tmp_path, "x", KEY, some, lambda: {"rows": made}).note == {"rows": [0, 1, 2]}
    assert kept(tmp_path, "x", KEY, never, never).note == {"rows": [0, 1, 2]}


def test_another_process_gets_the_folder_and_not_the_numbers(tmp_path: Path) -> None:
    many = kept(tmp_path, "x", KEY, lambda: examples(20_000))
    assert len(pickle.dumps(many)) < 1000
    assert same(pickle.loads(pickle.dumps(many)), many)


def test_every_key_has_its_own(tmp_path: Path) -> None:
    kept(tmp_path, "x", KEY, lambda: examples(3))
    assert len(kept(tmp_path, "x", KEY | {"length": 9}, lambda: examples(4))) == 4
    assert len(kept(tmp_path, "x", KEY, never)) == 3
    assert len(folders(tmp_path)) == 2


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _as_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("mine")


DAMAGES = {
    "a flipped bit": lambda folder: _flip(folder / "input_ids.npy", -1),
    "a flipped bit of the offsets": lambda folder: _flip(folder / "input_ids.offsets.npy", -8),
    "a cut": lambda folder: (folder / "row.npy").write_bytes((folder / "row.npy").read_bytes()[:-1]),
    "another type": lambda folder: _flip(folder / "row.npy", (folder / "row.npy").read_bytes().index(b"<i8") + 2),
    "a file less": lambda folder: (folder / "row.npy").unlink(),
    "no meta": lambda folder: (folder / "meta.json").unlink(),
    "torn meta": lambda folder: (folder / "meta.json").write_text('{"key": '),
    "other meta": lambda folder: (folder / "meta.json").write_text("[1]"),
    "a foreign key": lambda folder: _edit(folder / "meta.json", key={"source": "b"}),
    "no arrays": lambda folder: _edit(folder / "meta.json", arrays=None),
    "an empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
    "a file in its place": _as_file,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_made_anew_and_said(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    kept(tmp_path, "x", KEY, lambda: examples(10))
    (folder,) = folders(tmp_path)
    DAMAGES[damage](folder)
    wanted = Features.of(examples(10, start=5))
    assert same(kept(tmp_path, "x", KEY, lambda: examples(10, start=5)), wanted)
    assert f"{folder} is not what was written there" in caplog.text
    assert same(kept(tmp_path, "x", KEY, never), wanted)
    assert folders(tmp_path) == [folder]


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield from examples(10)
        raise InputError("line 11 is broken")

    with pytest.raises(InputError, match="line 11"):
        kept(tmp_path, "x", KEY, broken)
    assert folders(tmp_path) == []


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--tokenized_dir=.*file must be a folder, or nothing yet; it is a file"):
        kept(tmp_path / "file", "x", KEY, never)


def test_the_one_that_was_first_is_taken(tmp_path: Path) -> None:
    """Another process ends while this one still writes."""

    def slow() -> Iterator[dict[str, Any]]:
        kept(tmp_path, "x", KEY, lambda: examples(10))
        yield from examples(10, start=7)

    assert same(kept(tmp_path, "x", KEY, slow), Features.of(examples(10)))
    assert len(folders(tmp_path)) == 1


def test_one_that_was_first_and_broken_is_replaced(tmp_path: Path) -> None:
    def slow() -> Iterator[dict[str, Any]]:
        kept(tmp_path, "x", KEY, lambda: examples(10))
        (folder,) = [path for path in folders(tmp_path) if not path.name.startswith(".")]
        _flip(folder / "input_ids.npy", -1)
        yield from examples(10, start=7)

    assert same(kept(tmp_path, "x", KEY, slow), Features.of(examples(10, start=7)))
    assert len(folders(tmp_path)) == 1


def _write(folder: str, barrier: Any, results: Any) -> None:
    barrier.wait()
    features = kept(Path(folder), "x", KEY, lambda: examples(5000))
    results.put((len(features), int(features.ragged["input_ids"][0].sum())))


@pytest.mark.parametrize("torn", [False, True])
def test_two_processes_at_once(tmp_path: Path, torn: bool) -> None:
    if torn:
        kept(tmp_path, "x", KEY, lambda: examples(5000))
        _flip(folders(tmp_path)[0] / "input_ids.npy", -1)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    writers = [context.Process(target=_write, args=(str(tmp_path), barrier, results)) for _ in range(2)]
    for writer in writers:
        writer.start()
    got = [results.get(timeout=120) for _ in writers]
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
        writer.close()
    wanted = Features.of(examples(5000))
    assert got == [(5000, int(wanted.ragged["input_ids"][0].sum()))] * 2
    assert same(kept(tmp_path, "x", KEY, never), wanted)
    assert len(folders(tmp_path)) == 1


def test_the_digest_is_that_in_memory_and_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a run may be resumed with a folder of kept tokens or without, but not with other texts."""
    monkeypatch.setattr(module, "_AT_ONCE", 3)
    some = [one | {"weights": [0.5, 1.5]} for one in examples(10)]
    wanted = Features.of(some).digest()
    assert Features.of([*some[:9], some[8]]).digest() != wanted
    kept(tmp_path, "x", KEY, lambda: some)
    again = kept(tmp_path, "x", KEY, never)
    monkeypatch.setattr(Features, "arrays", never)
    assert again.digest() == wanted
    assert pickle.loads(pickle.dumps(again)).digest() == wanted


def test_a_digest_copies_no_array() -> None:
    features = Features.of([{"input_ids": np.zeros(1_000_000, np.int64)}])
    tracemalloc.start()
    try:
        features.digest()
        assert tracemalloc.get_traced_memory()[1] < 1_000_000  # of 4 million bytes
    finally:
        tracemalloc.stop()
