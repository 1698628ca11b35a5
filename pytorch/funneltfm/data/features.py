"""Encoded examples of a pipeline, in flat arrays, and their batches: shuffled by (seed, epoch) alone, dealt to
processes, resumable in the middle of an epoch.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from funneltfm.data.batching import StepSampler, TokenBudget, check_digest, contents, data_digest, eval_batches
from funneltfm.errors import InputError

Example = dict[str, Any]  # input_ids, and what else its task has made
Batch = dict[str, Any]
T = TypeVar("T")
OFFSETS = ".offsets"  # after the name of a field of lists: where each begins and ends


class Features(Dataset):
    """Examples in memory. A field of lists of numbers is one flat array with offsets; a field of numbers an array.

    Example i of `Features.of(examples)` has the fields of examples[i], lists as int64 arrays, and "index": i.
    """

    def __init__(self, ragged: dict[str, tuple[np.ndarray, np.ndarray]], plain: dict[str, np.ndarray], size: int):
        self.ragged, self.plain, self.size = ragged, plain, size

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Features":
        ragged, plain = {}, {}
        for name in examples[0] if examples else ():
            values = [example[name] for example in examples]
            if isinstance(values[0], list | np.ndarray):
                lengths = np.fromiter(map(len, values), np.int64, len(values))
                whole = all(isinstance(v, int | np.integer) for value in values for v in value[:1])
                flat = np.concatenate(values, dtype=np.int32 if whole else np.float64, casting="unsafe")
                ragged[name] = flat, np.concatenate([[0], np.cumsum(lengths)])
            else:
                plain[name] = np.array(values)
        return cls(ragged, plain, len(examples))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Example:
        example: Example = {"index": i}
        for name, (values, offsets) in self.ragged.items():
            part = values[offsets[i] : offsets[i + 1]]
            example[name] = part.astype(np.int64) if part.dtype == np.int32 else part
        return example | {name: values[i] for name, values in self.plain.items()}

    def take(self, indices: Sequence[int]) -> "Features":
        """These examples alone, in this order."""
        if list(indices) == list(range(self.size)):
            return self
        chosen = [self[i] for i in indices]
        for example in chosen:
            del example["index"]
        return Features.of(chosen)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example."""
        return np.diff(self.ragged["input_ids"][1]) if self.size else np.zeros(0, np.int64)

    def arrays(self) -> dict[str, np.ndarray]:
        """Of every field; of lists the numbers, and the offsets under a name of their own."""
        offsets = {f"{name}{OFFSETS}": offsets for name, (_, offsets) in self.ragged.items()}
        return {name: values for name, (values, _) in self.ragged.items()} | offsets | self.plain

    def digest(self) -> str:
        """Equal for equal examples, wherever they are kept."""
        arrays = self.arrays().items()
        return joint_digest({name: hashlib.sha256(contents(array)).hexdigest() for name, array in arrays})


def joint_digest(digests: Mapping[str, str]) -> str:
    """Of all arrays, by the SHA-256 of each."""
    return data_digest(*(f"{name} {digest}".encode() for name, digest in sorted(digests.items())))


def pad(rows: Sequence[np.ndarray], value: int, length: int, left: bool = False) -> torch.Tensor:
    """Rows of different lengths as one tensor (B, length) int64, filled with `value`."""
    out = np.full((len(rows), length), value, np.int64)
    for i, row in enumerate(rows):
        out[i, length - len(row) if left else 0 : length if left else len(row)] = row
    return torch.from_numpy(out)


class _Drawn(Dataset):
    """What a sampler's key stands for: a whole batch, made by `make` from its examples.

    A key is (indices, weight, epoch); each example goes through `prepare(example, epoch)` first.
    """

    def __init__(self, features: Features, prepare: Callable[[Example, int], Example] | None):
        self.features, self.prepare = features, prepare

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, key: tuple[list[int], float, int]) -> tuple[list[Example], float]:
        indices, weight, epoch = key
        examples = [self.features[i] for i in indices]
        if self.prepare is not None:
            examples = [self.prepare(example, epoch) for example in examples]
        return examples, weight


class _Weighted:
    """Makes the batch, with its weight beside it."""

    def __init__(self, make: Callable[[list[Example]], Batch]):
        self.make = make

    def __call__(self, drawn: tuple[list[Example], float]) -> Batch:
        examples, weight = drawn
        return self.make(examples) | {"weight": weight}


def steps(items: Iterable[T], accumulate: int, taken: int = 0) -> Iterator[list[T]]:
    """The items (batches) of one optimizer step after another; the first `taken` batches were given before."""
    step: list[T] = []
    for item in items:
        step.append(item)
        taken += 1
        if taken % accumulate == 0:
            yield step
            step = []
    if step:
        yield step


def step_sizes(step: Sequence[Batch]) -> dict[str, float]:
    """The sums of the batches' "sizes" by name, without those of weight 0."""
    sizes = [batch["sizes"] for batch in step if batch["weight"] and "sizes" in batch]
    return {name: sum(size[name] for size in sizes) for name in (sizes[0] if sizes else ())}


class TrainLoader(DataLoader):
    """The batches of one epoch after another, those of this process: a batch has "weight", a number, as
    `StepSampler` says. Where `make` gives it "sizes" by name, "step_sizes" are their sums over this process's batches
    of the step, without those of weight 0.

    prepare: makes of (example, epoch) what is trained on, for objectives that corrupt their input; it must depend on
    the example's "index" and the epoch alone, whichever worker calls it. batches: what deals the examples. digest: of
    the data; a run that is resumed must have the same.

    Lightning calls `set_epoch` (through `sampler`), and keeps `state_dict` in checkpoints.
    """

    def __init__(
        self,
        features: Features,
        make: Callable[[list[Example]], Batch],
        batches: StepSampler,
        prepare: Callable[[Example, int], Example] | None = None,
        seed: int = 0,
        digest: str = "",
        **kwargs: Any,
    ):
        self.digest = digest
        super().__init__(
            _Drawn(features, prepare),
            batch_size=None,
            sampler=EpochSampler(batches),
            collate_fn=_Weighted(make),  # type: ignore[arg-type]
            generator=torch.Generator().manual_seed(seed),  # takes nothing from the stream that dropout uses
            **kwargs,
        )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        sampler: EpochSampler = self.sampler  # type: ignore[assignment]
        sampler.taken = sampler.begin()
        for step in steps(super().__iter__(), sampler.batches.accumulate, sampler.taken):
            sizes = step_sizes(step)
            for batch in step:
                sampler.taken += 1
                yield batch | {"step_sizes": sizes}

    def state_dict(self) -> dict[str, Any]:
        sampler: EpochSampler = self.sampler  # type: ignore[assignment]
        state = {"epoch": sampler.epoch, "taken": sampler.taken, "per_epoch": len(sampler)}
        return state | ({"digest": self.digest} if self.digest else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_digest(state, self.digest)
        sampler: EpochSampler = self.sampler  # type: ignore[assignment]
        if state["per_epoch"] != len(sampler):
            raise InputError(
                f"an epoch has {state['per_epoch']} batches in the checkpoint and {len(sampler)} now: the training "
                f"data, the batch size or the number of processes has changed. Put it back, or start another run."
            )
        sampler.resume_at = state["epoch"], state["taken"]


class EpochSampler:
    """The keys of one epoch; of a resumed one, those that are left."""

    def __init__(self, batches: StepSampler):
        self.batches = batches
        self.epoch = 0
        self.taken = 0
        self.resume_at = (0, 0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def begin(self) -> int:
        """Batches that this epoch has already given."""
        epoch, taken = self.resume_at
        return taken if epoch == self.epoch and taken < len(self) else 0

    def __len__(self) -> int:
        return self.batches.per_epoch

    def __iter__(self) -> Iterator[tuple[list[int], float, int]]:
        first = self.begin()
        self.resume_at = (self.epoch, 0)  # the next time this epoch begins, it begins at its start
        for indices, weight in self.batches.epoch(self.epoch, first):
            yield indices, weight, self.epoch


def eval_loader(
    features: Features,
    make: Callable[[list[Example]], Batch],
    batch_size: int | TokenBudget,
    rank: int = 0,
    ranks: int = 1,
    prepare: Callable[[Example, int], Example] | None = None,
    indices: np.ndarray | None = None,
    **kwargs: Any,
) -> DataLoader:
    """Every example once, or those with these indices, sorted by length, the longest first (the sanity validation sees
    what takes most memory), in batches that are the same whatever the number of processes; as
    `data.batching.eval_batches` deals them. `prepare` is called with the epoch -1.
    """
    indices = np.arange(len(features)) if indices is None else indices
    own = eval_batches(features.lengths[indices], batch_size, rank, ranks)
    keys = [(indices[batch].tolist(), 1.0, -1) for batch in reversed(own)]
    return DataLoader(
        _Drawn(features, prepare),
        batch_size=None,
        sampler=keys,
        collate_fn=_Weighted(make),  # type: ignore[arg-type]
        generator=torch.Generator().manual_seed(0),
        **kwargs,
    )
