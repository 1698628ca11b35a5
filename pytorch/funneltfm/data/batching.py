"""Examples to batches: similar lengths together, padded no further than the canonical length. The one place that
makes padding masks.
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from funneltfm.data.encoding import EncodedSplit
from funneltfm.errors import InputError
from funneltfm.funnel.config import ModelConfig, canonical_length

PadTo = Literal["canonical", "longest", "max_length"]
Batch = dict[str, Any]  # of tensors (B, ...), and in training a number

_POOL = 50  # batches that are sorted by length together: enough to waste little, few enough to stay shuffled


class Collator:
    """Pads examples into a batch.

    pad_to: "canonical" pads to the shortest length at which padding no longer changes any result
    (`funneltfm.canonical_length`), "longest" to the longest example in the batch, "max_length" always to max_length.

    A batch holds "index" (B,), "inputs" and "seg_id" (B, T) int64, "input_mask" (B, T) bool with True = pad, and
    "labels" (B,) where there are any.
    """

    def __init__(
        self, net_config: ModelConfig, pad_to: PadTo = "canonical", max_length: int = 128, seg_id_pad: int = 0
    ):
        if pad_to not in ("canonical", "longest", "max_length"):
            raise InputError(f"pad_to must be canonical, longest or max_length; got {pad_to!r}.")
        self.net_config = net_config
        self.pad_to = pad_to
        self.max_length = max_length
        self.seg_id_pad = seg_id_pad

    def padded_length(self, longest: int) -> int:
        if self.pad_to == "canonical":
            return canonical_length(longest, self.net_config)
        return longest if self.pad_to == "longest" else max(longest, self.max_length)

    def __call__(self, examples: list[dict[str, Any]]) -> Batch:
        lengths = np.array([len(example["inputs"]) for example in examples])
        shape = len(examples), self.padded_length(int(lengths.max()))
        inputs = np.full(shape, self.net_config.pad_id, np.int64)
        seg_id = np.full(shape, self.seg_id_pad, np.int64)
        for row, example in enumerate(examples):
            inputs[row, : lengths[row]] = example["inputs"]
            seg_id[row, : lengths[row]] = example["seg_id"]
        batch = {
            "index": torch.tensor([example["index"] for example in examples]),
            "inputs": torch.from_numpy(inputs),
            "seg_id": torch.from_numpy(seg_id),
            "input_mask": torch.from_numpy(np.arange(shape[1]) >= lengths[:, None]),
        }
        if "label" in examples[0]:
            batch["labels"] = torch.from_numpy(np.array([example["label"] for example in examples]))
        return batch


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of one epoch, a function of (seed, epoch) alone: every example once, similar lengths together,
    in random order.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    pool = _POOL * batch_size
    order = np.concatenate([
        part[np.argsort(lengths[part], kind="stable")] for part in np.split(order, range(pool, len(order), pool))
    ])  # fmt: skip
    batches = np.split(order, range(batch_size, len(order), batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]


class TokenBudget(NamedTuple):
    """Batches by tokens: as many examples of similar length as fit into `max_tokens`, padding included."""

    max_tokens: int
    padded_length: Callable[[int], int]
    """Longest example -> how far a batch is padded."""

    def cut(self, lengths: np.ndarray, parts: int = 1) -> list[int]:
        """Where ascending lengths are cut, so that each piece makes `parts` batches within the budget."""
        if len(lengths) and (longest := self.padded_length(int(lengths[-1]))) > self.max_tokens:
            raise InputError(
                f"max_tokens must hold the longest example, which is padded to {longest} tokens; got {self.max_tokens}."
            )
        cuts, start = [], 0
        rows = {int(n): parts * (self.max_tokens // self.padded_length(int(n))) for n in np.unique(lengths)}
        for i, n in enumerate(lengths.tolist()):
            if i - start >= rows[n]:
                cuts.append(i)
                start = i
        return cuts


def token_batches(lengths: np.ndarray, budget: TokenBudget, seed: int, epoch: int, parts: int = 1) -> list[np.ndarray]:
    """The batches of one epoch as `epoch_batches` makes them, but by tokens, and equally many in every epoch: examples
    of the same length change places, and the batches come in random order.
    """
    rng = np.random.default_rng([seed, epoch])
    order = np.lexsort((rng.random(len(lengths)), lengths))
    batches = np.split(order, budget.cut(lengths[order], parts))
    return [batches[i] for i in rng.permutation(len(batches))]


def exactly(batches: list[np.ndarray], count: int) -> list[np.ndarray]:
    """`count` of batches that come in random order: those that are too many are left out, missing ones are made by
    halving the largest.
    """
    batches = batches[:count]
    while len(batches) < count:
        largest = max(range(len(batches)), key=lambda i: len(batches[i]))
        batches[largest : largest + 1] = np.array_split(batches[largest], 2)
    return batches


class StepSampler:
    """The batches of every epoch, (example indices, weight) of this rank, a function of (seed, epoch) alone.

    A step learns from `batch_size * ranks * accumulate` examples. They are dealt evenly to the ranks, and on each to
    `accumulate` batches one after another. The weight of a batch makes the mean over ranks and batches the mean over
    the step's examples, also where the last step of an epoch cannot be dealt evenly. A batch that gets no example has
    one of weight 0, so that every rank takes part in every step.

    batch_size: examples in a batch, or the tokens that it may have. by_length: similar lengths together. draw: the
    indices of an epoch's examples, which may come more than once or not at all, always equally many; without it each
    comes once. By tokens they make more or fewer batches than in the first epoch, which `exactly` evens out.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int | TokenBudget,
        seed: int,
        accumulate: int = 1,
        rank: int = 0,
        ranks: int = 1,
        *,
        by_length: bool = True,
        draw: Callable[[int], np.ndarray] | None = None,
    ):
        self.lengths, self.seed, self.by_length, self.draw = lengths, seed, by_length, draw
        self.accumulate, self.rank, self.ranks = accumulate, rank, ranks
        self.batch_size = batch_size
        self.steps_per_epoch = len(self._steps(lengths if draw is None else lengths[draw(0)], 0))
        self.per_epoch = self.steps_per_epoch * accumulate

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[list[int], float]]:
        """The batches of an epoch from number `start` on."""
        chosen = None if self.draw is None else self.draw(epoch)
        steps = exactly(
            self._steps(self.lengths if chosen is None else self.lengths[chosen], epoch), self.steps_per_epoch
        )
        for number in range(start, self.per_epoch):
            step = steps[number // self.accumulate]
            yield self._share(step if chosen is None else chosen[step], number % self.accumulate)

    def _steps(self, lengths: np.ndarray, epoch: int) -> list[np.ndarray]:
        parts = self.ranks * self.accumulate
        if isinstance(self.batch_size, TokenBudget):
            return token_batches(lengths, self.batch_size, self.seed, epoch, parts)
        lengths = lengths if self.by_length else np.ones_like(lengths)
        return epoch_batches(lengths, self.batch_size * parts, self.seed, epoch)

    def _share(self, step: np.ndarray, turn: int) -> tuple[list[int], float]:
        parts = self.ranks * self.accumulate
        number = turn * self.ranks + self.rank
        size, longer = divmod(len(step), parts)  # the first so many have one more
        start = number * size + min(number, longer)
        share = step[start : start + size + (number < longer)]
        if len(share) == 0:
            return [int(step[0])], 0.0
        return share.tolist(), len(share) * parts / len(step)


class _RunSampler:
    """The batches of a whole run, epoch after epoch, from batch `start` on."""

    def __init__(self, batches: StepSampler, epochs: int):
        self.batches, self.epochs = batches, epochs
        self.start = 0

    def __len__(self) -> int:
        return self.batches.per_epoch * self.epochs

    def __iter__(self) -> Iterator[tuple[list[int], float]]:
        first, skip = divmod(self.start, self.batches.per_epoch)
        for epoch in range(first, self.epochs):
            yield from self.batches.epoch(epoch, skip if epoch == first else 0)


class _Examples:
    """A split, with what a sampler gives as an index: a whole batch at once."""

    def __init__(self, split: EncodedSplit):
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, batch: tuple[list[int], float]) -> tuple[list[dict[str, Any]], float]:
        indices, weight = batch
        return [self.split[i] for i in indices], weight


def _weighted(collator: Collator, batch: tuple[list[dict[str, Any]], float]) -> Batch:
    examples, weight = batch
    return collator(examples) | {"weight": weight}


def data_digest(*parts: bytes | np.ndarray) -> str:
    """SHA-256 of what a run learns from, for its checkpoints."""
    digest = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else contents(part)
        digest.update(memoryview(content).nbytes.to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def contents(array: np.ndarray) -> bytes | memoryview:
    """What a digest reads of an array: its numbers where they are, not a copy; of objects what they print."""
    return repr(array.tolist()).encode() if array.dtype == object else np.ravel(array).data


def check_digest(state: dict[str, Any], digest: str) -> None:
    """An InputError where the data of a checkpoint are not those of now."""
    if digest and state.get("digest", digest) != digest:
        raise InputError(
            "the data, its labels or the vocabulary are not those that the run began with, so it cannot go on. Put "
            "them back as they were, or start another run."
        )


class RunLoader(DataLoader):
    """All the batches of a run in one pass, those of this rank. It remembers how many were taken, so that a resumed
    run goes on with the next.

    One pass rather than one per epoch: validation every n steps, the schedule and a resumed run need no rule at
    epoch borders. A batch has "weight", a number: see `StepSampler`. digest: of the data; a run that is resumed must
    have the same.
    """

    def __init__(
        self,
        split: EncodedSplit,
        collator: Collator,
        batch_size: int | TokenBudget,
        epochs: int,
        seed: int,
        accumulate: int = 1,
        rank: int = 0,
        ranks: int = 1,
        digest: str = "",
        **kwargs: Any,
    ):
        sampler = _RunSampler(StepSampler(split.lengths, batch_size, seed, accumulate, rank, ranks), epochs)
        # Its own generator: the loader takes no random numbers from the stream that dropout uses.
        super().__init__(
            _Examples(split),  # type: ignore[arg-type]
            batch_size=None,
            sampler=sampler,
            collate_fn=partial(_weighted, collator),
            generator=torch.Generator().manual_seed(seed),
            **kwargs,
        )
        self.run_sampler = sampler
        self.digest = digest
        self.taken = 0

    @property
    def steps_per_epoch(self) -> int:
        return self.run_sampler.batches.steps_per_epoch

    @property
    def steps(self) -> int:
        """Optimizer steps in the whole run."""
        return self.steps_per_epoch * self.run_sampler.epochs

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self.run_sampler.start = self.taken
        for batch in super().__iter__():
            self.taken += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken, "total": len(self)} | ({"digest": self.digest} if self.digest else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_digest(state, self.digest)
        if state["total"] != len(self):
            raise InputError(
                f"the run has {state['total']} batches in its checkpoint and {len(self)} now: the training data has "
                f"changed. Put the data back as it was, or start another run."
            )
        self.taken = state["taken"]


def eval_batches(lengths: np.ndarray, batch_size: int | TokenBudget, rank: int = 0, ranks: int = 1) -> list[list[int]]:
    """Every example once, sorted by length. The batches are the same whatever the number of ranks, and are dealt to
    them in turn; a rank that would have fewer takes its last one (or the first of all) twice, so that all take equally
    many.
    """
    order = np.argsort(lengths, kind="stable")
    if isinstance(batch_size, TokenBudget):
        cuts = batch_size.cut(lengths[order])
    else:
        cuts = list(range(batch_size, len(order), batch_size))
    batches = [part.tolist() for part in np.split(order, cuts)]
    own = batches[rank::ranks] or batches[:1]
    return own + own[-1:] * (-(-len(batches) // ranks) - len(own))


def eval_loader(
    split: EncodedSplit, collator: Collator, batch_size: int | TokenBudget, rank: int = 0, ranks: int = 1, **kwargs: Any
) -> DataLoader:
    """Every example once, in the batches of `eval_batches`."""
    own = eval_batches(split.lengths, batch_size, rank, ranks)
    generator = torch.Generator().manual_seed(0)
    return DataLoader(split, batch_sampler=own, collate_fn=collator, generator=generator, **kwargs)  # type: ignore[arg-type]
