"""Training batches from a corpus that is read as it is needed, without an end; exact to resume."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from funneltfm.data.features import Batch, Example, Features, step_sizes, steps
from funneltfm.data.sources import BadRows, Group, Numbered, Row, Stream, stream_rows
from funneltfm.errors import InputError

# How far one worker is: passes over the data, rows of this one that are used up, and examples of the group after them.
Position = tuple[int, int, int]
_GROUP = 256  # documents that are made into blocks together
_OF_A_ROW = 2**24  # more examples than a row makes


class _Stream(IterableDataset):
    """(examples, worker, position after them), of this process's share of the corpus, pass after pass.

    A group of rows is encoded together. Where a row is not an example, those of the group come in random order.
    """

    def __init__(
        self,
        sources: Sequence[str],
        config: str | None,
        encode: Callable[[list[Row]], Features],
        prepare: Callable[[Example, int], Example],
        batch_size: int,
        seed: int,
        buffer: int,
        rank: int,
        ranks: int,
        workers: int,
        bad_rows: BadRows,
        documents: bool,
        keep: Callable[[Iterator[Numbered]], Iterator[Numbered]] | None,
    ):
        self.sources, self.config, self.encode, self.prepare = sources, config, encode, prepare
        self.name = " + ".join(sources)
        self.batch_size, self.seed, self.buffer, self.bad_rows = batch_size, seed, buffer, bad_rows
        self.rank, self.ranks, self.workers, self.keep = rank, ranks, workers, keep
        self.documents, self.group = documents, max(_GROUP, batch_size) if documents else batch_size
        self.positions: list[Position] = [(0, 0, 0)] * workers
        self.first = 0  # the worker whose turn it is

    def __iter__(self) -> Iterator[tuple[list[Example], int, Position]]:
        info = get_worker_info()
        worker = ((0 if info is None else info.id) + self.first) % self.workers
        epoch, taken, used = self.positions[worker]
        batch: list[Example] = []
        some_in = epoch  # the last pass that had an example
        for rows, places, after in self._groups(epoch, taken, worker):
            features = self.encode(rows)
            some_in = after[0] if len(features) else some_in
            if after[0] > some_in + 1:
                raise InputError(f"{self.name}: no row makes an example.")
            order = np.arange(len(features))
            if self.documents or len(features) != len(rows):
                number = worker * self.ranks + self.rank
                order = np.random.default_rng([self.seed, 4, *after, number]).permutation(order)
            while used < len(features):
                new = order[used : used + self.batch_size - len(batch)]
                batch += [self._prepared(features, int(i), places) for i in new]
                used += len(new)
                if len(batch) == self.batch_size:
                    # A group that is used up need not be encoded again to go on.
                    yield batch, worker, (epoch, taken, used) if used < len(features) else (*after, 0)
                    batch = []
            (epoch, taken), used = after, 0

    def _prepared(self, features: Features, i: int, places: list[tuple[int, int]]) -> Example:
        """Example i of a group. Its index says which row of the source it is of, and which of that row's examples."""
        of_rows = features.plain["row"]
        epoch, number = places[of_rows[i]]
        index = number * _OF_A_ROW + i - int(np.searchsorted(of_rows, of_rows[i]))
        return self.prepare(features[i] | {"index": index}, epoch)

    def _groups(
        self, epoch: int, taken: int, worker: int
    ) -> Iterator[tuple[list[Row], list[tuple[int, int]], tuple[int, int]]]:
        """Rows, of each the pass and its number in the source, and pass and row after them."""
        rows: list[Row] = []
        places: list[tuple[int, int]] = []
        while True:
            before = taken
            stream = self._pass(epoch, taken, worker)
            for row in stream:
                rows.append(row)
                places.append((epoch, stream.number))
                taken += 1
                if len(rows) == self.group:
                    yield Group(rows, stream), places, (epoch, taken)
                    rows, places = [], []
            if taken == before == 0:
                raise InputError(
                    f"{self.name} has too few rows for {self.ranks} processes with {self.workers} workers: one gets "
                    f"none. Use fewer."
                )
            if rows and self.documents:  # no block is made of two passes
                yield Group(rows, stream), places, (epoch + 1, 0)
                rows, places = [], []
            epoch, taken = epoch + 1, 0

    def _pass(self, epoch: int, taken: int, worker: int) -> Stream:
        return stream_rows(
            self.sources,
            self.config,
            seed=self.seed,
            epoch=epoch,
            buffer=self.buffer,
            taken=taken,
            rank=self.rank,
            ranks=self.ranks,
            worker=worker,
            workers=self.workers,
            bad_rows=self.bad_rows,
            documents=self.documents,
            keep=self.keep,
        )


class StreamLoader(DataLoader):
    """Batches of `batch_size` examples of one or more sources, in an order that depends on (seed, pass, number of
    processes and workers) alone. A batch has "weight": 1, and "step_sizes" as TrainLoader's have.

    encode: rows to features, which have "row" (the row's place among these) in ascending order. prepare: as in
    TrainLoader; called with the pass. An example's "index" depends on its row's place in the source alone, not on who
    reads it, or when. make: examples to a batch. length: how many batches the run will take. accumulate: how many make
    a step. buffer: rows from which the next one is drawn. documents: rows are documents, as `open_rows` says, each of
    many examples. keep: as in `stream_rows`.
    """

    def __init__(
        self,
        sources: Sequence[str],
        encode: Callable[[list[Row]], Features],
        prepare: Callable[[Example, int], Example],
        make: Callable[[list[Example]], Batch],
        batch_size: int,
        seed: int,
        length: int,
        *,
        accumulate: int = 1,
        config: str | None = None,
        buffer: int = 10_000,
        rank: int = 0,
        ranks: int = 1,
        num_workers: int = 0,
        bad_rows: BadRows = "error",
        documents: bool = False,
        keep: Callable[[Iterator[Numbered]], Iterator[Numbered]] | None = None,
        **kwargs: Any,
    ):
        workers = max(1, num_workers)
        stream = _Stream(
            sources, config, encode, prepare, batch_size, seed, buffer, rank, ranks, workers, bad_rows, documents, keep,
        )  # fmt: skip
        super().__init__(
            stream,
            batch_size=None,
            collate_fn=_Made(make),  # type: ignore[arg-type]
            num_workers=num_workers,
            generator=torch.Generator().manual_seed(seed),
            **kwargs,
        )
        self.stream, self.length = stream, length
        self.accumulate, self.taken = accumulate, 0

    def __len__(self) -> int:  # without one Lightning would take a batch ahead, and count it as trained on
        return self.length

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for step in steps(super().__iter__(), self.accumulate, self.taken):
            sizes = step_sizes([batch for batch, _, _ in step])
            for batch, worker, position in step:
                self.stream.positions[worker] = position
                self.stream.first = (worker + 1) % self.stream.workers
                self.taken += 1
                yield batch | {"step_sizes": sizes}

    def state_dict(self) -> dict[str, Any]:
        positions = [list(position) for position in self.stream.positions]
        return {
            "positions": positions,
            "first": self.stream.first,
            "taken": self.taken,
            "sizes": _sizes(self.stream.sources),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["positions"]) != self.stream.workers:
            raise InputError(
                f"the run was started with --num_workers {len(state['positions'])}, which a stream must keep; now it "
                f"is {self.stream.workers}."
            )
        now = _sizes(self.stream.sources)
        for name, size in state.get("sizes", now).items():
            if size != now.get(name):
                raise InputError(
                    f"the run cannot go on: {name} had {size} bytes when it was stopped, now it has {now.get(name)}. "
                    "Put the data back, or start another run."
                )
        self.stream.positions = [(epoch, taken, used) for epoch, taken, used in state["positions"]]
        self.stream.first = state["first"]
        self.taken = state["taken"]


def _sizes(sources: Sequence[str]) -> dict[str, int]:
    """Bytes of those that are files here: a corpus is too large to be read for a digest."""
    return {name: os.path.getsize(name) for name in sources if os.path.isfile(name)}


class _Made:
    def __init__(self, make: Callable[[list[Example]], Batch]):
        self.make = make

    def __call__(self, item: tuple[list[Example], int, Position]) -> tuple[Batch, int, Position]:
        examples, worker, position = item
        return self.make(examples) | {"weight": 1.0}, worker, position


class RowNumbers(Sequence[str]):
    """Names of a stream's examples, which are too many to keep: the numbers of their rows, of several sources with the
    source.
    """

    def __init__(self, sources: Sequence[str]):
        self.sources = sources

    def __getitem__(self, i: Any) -> Any:
        number, which = divmod(int(i) // _OF_A_ROW, len(self.sources))
        return str(number) if len(self.sources) == 1 else f"{self.sources[which]}:{number}"

    def __len__(self) -> int:
        return 0
