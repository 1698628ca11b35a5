"""Examples in flat arrays, and their batches: the same whatever the processes and workers, resumable anywhere."""

from typing import Any

import lightning
import numpy as np
import pytest
import torch
from torch import nn

from funneltfm.data.batching import StepSampler
from funneltfm.data.features import Batch, Example, Features, TrainLoader, eval_loader, pad
from funneltfm.errors import InputError
from funneltfm.training.runlog import quiet

N = 23


def examples(n: int = N) -> list[Example]:
    return [
        {"row": i, "input_ids": list(range(1 + i * 7 % 11)), "label": i / 2, "weights": [0.5] * (i % 3)}
        for i in range(n)
    ]


def test_examples_come_back() -> None:
    features = Features.of(examples())
    assert len(features) == N
    for i, example in enumerate(examples()):
        back = features[i]
        assert back.keys() == {"index", *example}
        assert back["index"] == i
        assert back["input_ids"].dtype == np.int64
        assert back["weights"].dtype == np.float64
        for name in example:
            assert np.array_equal(back[name], example[name]), name
    assert features.lengths.tolist() == [len(example["input_ids"]) for example in examples()]
    assert features.ragged["input_ids"][0].dtype == np.int32  # half the memory


def test_some_of_the_examples() -> None:
    features = Features.of(examples())
    assert features.take(range(N)) is features
    some = features.take([5, 2, 2])
    assert [int(some[i]["row"]) for i in range(3)] == [5, 2, 2]
    assert [some[i]["index"] for i in range(3)] == [0, 1, 2]
    assert some[0]["input_ids"].tolist() == features[5]["input_ids"].tolist()
    assert some[0]["weights"].dtype == np.float64
    assert len(features.take([])) == 0


def test_no_examples() -> None:
    assert len(Features.of([])) == 0
    assert Features.of([]).lengths.tolist() == []


def test_padding_on_either_side() -> None:
    rows = [np.array([1, 2]), np.array([3]), np.array([], np.int64)]
    assert pad(rows, 9, 3).tolist() == [[1, 2, 9], [3, 9, 9], [9, 9, 9]]
    assert pad(rows, 9, 3, left=True).tolist() == [[9, 1, 2], [9, 9, 3], [9, 9, 9]]


# ---- batches


def make(drawn: list[Example]) -> Batch:
    return {"index": torch.tensor([e["index"] for e in drawn]), "x": torch.tensor([float(e["x"]) for e in drawn])}


def prepare(example: Example, epoch: int) -> Example:
    """A number that depends on the seed, the epoch and the example, as masks do."""
    return example | {"x": np.random.default_rng([7, epoch + 1, example["index"]]).random()}


def loader(batch_size: int = 4, accumulate: int = 1, rank: int = 0, ranks: int = 1, **more: Any) -> TrainLoader:
    features = Features.of(examples())
    batches = StepSampler(features.lengths, batch_size, 3, accumulate, rank, ranks)
    return TrainLoader(features, make, batches, prepare, seed=3, **more)


def epoch_of(loader: TrainLoader, epoch: int) -> list[tuple[list[int], list[float], float]]:
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return [(b["index"].tolist(), b["x"].tolist(), b["weight"]) for b in loader]


def test_every_example_once_in_an_order_of_its_own() -> None:
    one = loader()
    epochs = [epoch_of(one, epoch) for epoch in range(3)]
    for batches in epochs:
        assert sorted(i for index, _, _ in batches for i in index) == list(range(N))
        assert len(batches) == len(one) == 6
    assert epochs[0] != epochs[1]
    assert epoch_of(loader(), 1) == epochs[1]  # a function of the epoch alone


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int) -> None:
    """The older framework's masks were the same in every epoch with workers, and depended on how many there were."""
    alone, helped = loader(), loader(num_workers=workers, persistent_workers=True)
    np.random.default_rng(0).random()
    torch.rand(3)  # nor does the state of the parent's generators
    for epoch in (0, 1, 1, 4):
        assert epoch_of(helped, epoch) == epoch_of(alone, epoch)
    draws = [
        {i: x for index, xs, _ in epoch_of(helped, epoch) for i, x in zip(index, xs, strict=True)} for epoch in (0, 1)
    ]
    assert all(draws[0][i] != draws[1][i] for i in range(N))


def test_the_loader_takes_no_random_numbers() -> None:
    before = torch.get_rng_state()
    epoch_of(loader(), 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 1, 4, 5, 6])
def test_resume_in_the_middle_of_an_epoch(taken: int, workers: int) -> None:
    whole = epoch_of(loader(), 2)
    first = loader(num_workers=workers)
    first.sampler.set_epoch(2)  # type: ignore[attr-defined]
    iterator = iter(first)
    for _ in range(taken):
        next(iterator)
    state = first.state_dict()
    assert state == {"epoch": 2, "taken": taken, "per_epoch": 6}
    second = loader(num_workers=workers)
    second.load_state_dict(state)
    assert epoch_of(second, 2) == (whole[taken:] if taken < 6 else whole)
    assert second.state_dict()["taken"] == 6
    assert epoch_of(second, 2) == whole  # only the first time
    assert epoch_of(second, 3) == epoch_of(loader(), 3)


def test_a_resumed_epoch_counts_on() -> None:
    second = loader()
    second.load_state_dict({"epoch": 1, "taken": 2, "per_epoch": 6})
    second.sampler.set_epoch(1)  # type: ignore[attr-defined]
    next(iter(second))
    assert second.state_dict() == {"epoch": 1, "taken": 3, "per_epoch": 6}


def test_a_resumed_run_of_other_data() -> None:
    with pytest.raises(InputError, match="6 batches in the checkpoint and 3 now"):
        loader(batch_size=8).load_state_dict({"epoch": 0, "taken": 2, "per_epoch": 6})


@pytest.mark.parametrize(("batch_size", "accumulate", "ranks"), [(4, 1, 3), (2, 3, 1), (3, 2, 2), (5, 1, 2), (1, 4, 5)])
def test_ranks_and_accumulation_are_one_large_batch(batch_size: int, accumulate: int, ranks: int) -> None:
    """The mean over ranks and batches of weight x mean is the mean over a step's examples, each taken once."""
    dealt = [epoch_of(loader(batch_size, accumulate, rank, ranks), 1) for rank in range(ranks)]
    large = epoch_of(loader(batch_size * accumulate * ranks), 1)
    assert {len(batches) for batches in dealt} == {len(large) * accumulate}
    for step, (index, x, weight) in enumerate(large):
        parts = [batch for batches in dealt for batch in batches[step * accumulate : (step + 1) * accumulate]]
        assert weight == 1
        assert sorted(i for part, _, w in parts if w for i in part) == sorted(index)
        assert np.mean([w * np.mean(xs) for _, xs, w in parts]) == pytest.approx(np.mean(x), rel=1e-12)


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_evaluation_sees_every_example(batch_size: int, ranks: int) -> None:
    features = Features.of(examples())
    dealt = [list(eval_loader(features, make, batch_size, rank, ranks, prepare)) for rank in range(ranks)]
    assert len({len(batches) for batches in dealt}) == 1
    seen = {int(i): float(x) for part in dealt for b in part for i, x in zip(b["index"], b["x"], strict=True)}
    assert sorted(seen) == list(range(N))
    assert all(seen[i] == pytest.approx(prepare({"index": i}, -1)["x"]) for i in seen)


def test_evaluation_of_some_examples_begins_with_the_longest() -> None:
    features = Features.of(examples())
    chosen = np.arange(3, N, 2)
    index = [i for batch in eval_loader(features, make, 4, 0, 1, prepare, chosen) for i in batch["index"].tolist()]
    assert sorted(index) == chosen.tolist()
    assert features.lengths[index[0:4]].max() == features.lengths[chosen].max()
    assert features.lengths[index[-4:]].min() == features.lengths[chosen].min()


class Sums(lightning.LightningModule):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[int]]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, batch["index"].tolist()))
        return self.weight * batch["x"].mean() * batch["weight"]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Save(lightning.Callback):
    """Saves after a step, as a run does when it is asked to stop."""

    def __init__(self, step: int, path: Any):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(train: TrainLoader, *callbacks: lightning.Callback, resume: Any = None) -> Sums:
    module = Sums()
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False, callbacks=list(callbacks),
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, train, ckpt_path=resume, weights_only=True)
    return module


@pytest.mark.parametrize("stop", [1, 4, 6, 8, 12, 17])
def test_lightning_sets_the_epoch_and_resumes(stop: int, tmp_path: Any) -> None:
    expected = [(epoch, index) for epoch in range(3) for index, _, _ in epoch_of(loader(), epoch)]
    with quiet():
        whole = fit(loader(), Save(stop, tmp_path / "stop.ckpt"))
        rest = fit(loader(), resume=tmp_path / "stop.ckpt")
    assert whole.seen == expected
    assert rest.seen == expected[stop:]
    assert torch.equal(rest.weight, whole.weight)


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_sizes_of_a_step(start: int) -> None:
    """Of the batches that are left of it, where a run is resumed within it; what has the weight 0 does not count."""
    features = Features.of(examples(7))
    batches = StepSampler(features.lengths, 1, 3, accumulate=3, rank=1, ranks=2)

    def sized(drawn: list[Example]) -> Batch:
        return {"index": torch.tensor([e["index"] for e in drawn]), "sizes": {"a": float(len(drawn[0]["input_ids"]))}}

    train = TrainLoader(features, sized, batches)
    train.load_state_dict({"epoch": 0, "taken": start, "per_epoch": 6})
    out = list(train)
    assert len(out) == 6 - start
    for step in (0, 1):
        of_step = out[max(0, 3 * step - start) : 3 * step + 3 - start]
        expected = sum(batch["sizes"]["a"] for batch in of_step if batch["weight"])
        assert [batch["step_sizes"].get("a", 0.0) for batch in of_step] == [expected] * len(of_step)
    assert [bool(batch["weight"]) for batch in out[-3:]] == [False] * 3
