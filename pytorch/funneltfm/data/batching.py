"""Examples to batches: similar lengths together, padded no further than the canonical length. The one place that
makes padding masks.
"""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from funneltfm.data.encoding import EncodedSplit
from funneltfm.errors import InputError
from funneltfm.funnel.config import ModelConfig, canonical_length

PadTo = Literal["canonical", "longest", "max_length"]
Batch = dict[str, Tensor]

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


class _RunSampler:
    """The batches of a whole run, epoch after epoch, from batch `start` on."""

    def __init__(self, lengths: np.ndarray, batch_size: int, epochs: int, seed: int):
        self.lengths, self.batch_size, self.epochs, self.seed = lengths, batch_size, epochs, seed
        self.per_epoch = -(-len(lengths) // batch_size)
        self.start = 0

    def __len__(self) -> int:
        return self.per_epoch * self.epochs

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(self.start, len(self)):
            epoch, i = divmod(number, self.per_epoch)
            if i == 0 or number == self.start:
                batches = epoch_batches(self.lengths, self.batch_size, self.seed, epoch)
            yield batches[i].tolist()


class RunLoader(DataLoader):
    """All the batches of a run in one pass. It remembers how many were taken, so that a resumed run goes on with
    the next.

    One pass rather than one per epoch: validation every n steps, the schedule and a resumed run need no rule at
    epoch borders.
    """

    def __init__(self, split: EncodedSplit, collator: Collator, batch_size: int, epochs: int, seed: int, **kwargs: Any):
        sampler = _RunSampler(split.lengths, batch_size, epochs, seed)
        # Its own generator: the loader takes no random numbers from the stream that dropout uses.
        super().__init__(
            split,  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=collator,
            generator=torch.Generator().manual_seed(seed),
            **kwargs,
        )
        self.run_sampler = sampler
        self.taken = 0

    @property
    def per_epoch(self) -> int:
        return self.run_sampler.per_epoch

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self.run_sampler.start = self.taken
        for batch in super().__iter__():
            self.taken += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken, "total": len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if state["total"] != len(self):
            raise InputError(
                f"the run has {state['total']} steps in its checkpoint and {len(self)} now: the training data has "
                f"changed. Put the data back as it was, or start another run."
            )
        self.taken = state["taken"]


def eval_loader(split: EncodedSplit, collator: Collator, batch_size: int, **kwargs: Any) -> DataLoader:
    """Every example once, sorted by length."""
    order = np.argsort(split.lengths, kind="stable")
    batches = [part.tolist() for part in np.split(order, range(batch_size, len(order), batch_size))]
    generator = torch.Generator().manual_seed(0)
    return DataLoader(split, batch_sampler=batches, collate_fn=collator, generator=generator, **kwargs)  # type: ignore[arg-type]
