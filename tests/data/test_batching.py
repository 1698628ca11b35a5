"""Batches: every example once, a function of (seed, epoch), padded no further than needed, and no result that depends
on the batch.
"""

import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from funneltfm.data.batching import (
    Collator,
    RunLoader,
    StepSampler,
    TokenBudget,
    epoch_batches,
    eval_batches,
    eval_loader,
)
from funneltfm.data.encoding import EncodedSplit
from funneltfm.errors import InputError
from funneltfm.funnel.config import ModelConfig, canonical_length
from funneltfm.funnel.model import FunnelTFM

CONFIG = ModelConfig(
    vocab_size=50, d_embed=8, d_model=8, n_head=2, d_head=4, d_inner=16, block_size="1_1_1",
    separate_cls=True, truncate_seq=True, pool_q_only=True,
)  # fmt: skip


def split_of(lengths: list[int], seed: int = 0, labels: bool = True) -> EncodedSplit:
    """Examples of random ids (1 to 49) of the given lengths."""
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    return EncodedSplit(
        inputs=rng.integers(1, 50, total).astype(np.int32),
        seg_id=rng.integers(0, 3, total).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        labels=rng.integers(0, 2, len(lengths)) if labels else np.array([], np.int64),
        ids=np.array([f"id{i}" for i in range(len(lengths))]),
    )


def lengths_of(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 128, n)


# ---- the order of an epoch


@given(st.integers(1, 200), st.integers(1, 40), st.integers(0, 2**32 - 1), st.integers(0, 20))
def test_every_example_once_in_an_epoch(n: int, batch_size: int, seed: int, epoch: int) -> None:
    batches = epoch_batches(lengths_of(n), batch_size, seed, epoch)
    assert sorted(np.concatenate(batches)) == list(range(n))
    assert len(batches) == -(-n // batch_size)
    assert sorted(map(len, batches))[1:] == [batch_size] * (len(batches) - 1)  # one alone may be smaller


def test_every_example_once_over_several_pools() -> None:
    batches = epoch_batches(lengths_of(1003), 4, seed=1, epoch=0)
    assert sorted(np.concatenate(batches)) == list(range(1003))
    assert Counter(map(len, batches)) == {4: 250, 3: 1}


def flat(lengths: np.ndarray, seed: int, epoch: int) -> list[int]:
    return np.concatenate(epoch_batches(lengths, 8, seed, epoch)).tolist()


def test_order_is_a_function_of_seed_and_epoch() -> None:
    lengths = lengths_of(200)
    assert flat(lengths, 3, 4) == flat(lengths, 3, 4)
    orders = {(seed, epoch): tuple(flat(lengths, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(set(orders.values())) == 16  # (1, 2) is not (2, 1) either


def test_order_takes_nothing_from_the_global_random_numbers() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    loader = RunLoader(split_of([5] * 9), Collator(CONFIG), 2, epochs=2, seed=1)
    list(loader)
    list(eval_loader(split_of([5] * 9), Collator(CONFIG), 2))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


def test_examples_of_one_length_are_shuffled_between_epochs() -> None:
    """The members of a batch change: it is not the same groups in another order."""
    lengths = np.full(64, 10)
    groups = [{frozenset(batch.tolist()) for batch in epoch_batches(lengths, 8, 0, epoch)} for epoch in range(2)]
    assert not groups[0] & groups[1]


def waste(lengths: np.ndarray, batches: list[np.ndarray]) -> float:
    """Share of padding when every batch is padded to its longest."""
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    return 1 - lengths.sum() / padded


def test_similar_lengths_are_together() -> None:
    lengths = lengths_of(3000)
    random = np.split(np.random.default_rng(0).permutation(3000), range(16, 3000, 16))
    assert waste(lengths, random) > 0.3
    assert waste(lengths, epoch_batches(lengths, 16, seed=0, epoch=0)) < 0.04


def test_batches_come_in_no_order_of_length() -> None:
    lengths = lengths_of(800)
    longest = [lengths[batch].max() for batch in epoch_batches(lengths, 16, seed=0, epoch=0)]
    assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.5


# ---- padding


@pytest.mark.parametrize(("pad_to", "expected"), [("longest", 9), ("max_length", 40), ("canonical", 11)])
def test_padded_length(pad_to: str, expected: int) -> None:
    split = split_of([4, 9, 7])
    batch = Collator(CONFIG, pad_to, max_length=40)([split[i] for i in range(3)])
    assert batch["inputs"].shape == batch["seg_id"].shape == batch["input_mask"].shape == (3, expected)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.booleans(), st.booleans(), st.integers(1, 4))
def test_canonical_padding_is_the_canonical_length(
    lengths: list[int], separate_cls: bool, truncate_seq: bool, n_block: int
) -> None:
    config = ModelConfig(
        block_size="_".join("1" * n_block), separate_cls=separate_cls, truncate_seq=truncate_seq and separate_cls
    )
    split = split_of(lengths)
    batch = Collator(config)([split[i] for i in range(len(lengths))])
    assert batch["inputs"].shape[1] == canonical_length(max(lengths), config) >= max(lengths)


def test_content_and_mask() -> None:
    config = ModelConfig(**(CONFIG.to_dict() | {"pad_id": 7}))
    split = split_of([4, 9, 7])
    batch = Collator(config, seg_id_pad=9)([split[i] for i in (2, 0)])
    assert batch["index"].tolist() == [2, 0]
    assert batch["labels"].tolist() == [split.labels[2], split.labels[0]]
    assert batch["inputs"].dtype == batch["seg_id"].dtype == torch.int64
    assert batch["input_mask"].dtype == torch.bool
    for row, i in enumerate((2, 0)):
        n = int(split.lengths[i])
        assert batch["inputs"][row, :n].tolist() == split[i]["inputs"].tolist()
        assert batch["seg_id"][row, :n].tolist() == split[i]["seg_id"].tolist()
        assert (batch["inputs"][row, n:] == 7).all()
        assert (batch["seg_id"][row, n:] == 9).all()
        assert not batch["input_mask"][row, :n].any()
        assert batch["input_mask"][row, n:].all()


def test_max_length_never_cuts() -> None:
    split = split_of([12])
    assert Collator(CONFIG, "max_length", max_length=10)([split[0]])["inputs"].shape == (1, 12)


def test_a_token_equal_to_pad_id_is_not_masked() -> None:
    """What is padding is said by lengths, not by ids."""
    split = EncodedSplit(
        np.array([2, 0, 3], np.int32), np.zeros(3, np.int32), np.array([0, 3]), np.array([1]), np.array(["a"])
    )
    assert Collator(CONFIG, "longest")([split[0]])["input_mask"].tolist() == [[False, False, False]]


def test_labels_only_where_there_are_any() -> None:
    assert "labels" not in Collator(CONFIG)([split_of([4], labels=False)[0]])


def test_unknown_pad_to() -> None:
    with pytest.raises(InputError, match="pad_to must be canonical, longest or max_length; got 'short'"):
        Collator(CONFIG, "short")  # type: ignore[arg-type]


@pytest.mark.parametrize("block_size", ["1_1_1", "2", "1_1x2"])
@pytest.mark.parametrize("truncate_seq", [True, False])
@pytest.mark.parametrize("separate_cls", [True, False])
@pytest.mark.parametrize("attn_type", ["rel_shift", "factorized"])
def test_a_sentence_alone_and_in_any_batch_is_the_same(
    block_size: str, truncate_seq: bool, separate_cls: bool, attn_type: str
) -> None:
    keys = {"separate_cls": separate_cls, "truncate_seq": truncate_seq, "attn_type": attn_type}
    config = ModelConfig(**(CONFIG.to_dict() | keys | {"block_size": block_size}))
    torch.manual_seed(0)
    model = FunnelTFM(config).eval()
    for name, parameter in model.named_parameters():  # biases that are zero would hide mistakes
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    split = split_of([1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 31, 64])
    collator = Collator(config)

    def logits(indices: list[int]) -> torch.Tensor:
        batch = collator([split[i] for i in indices])
        with torch.no_grad():
            return model(batch["inputs"], input_mask=batch["input_mask"], seg_id=batch["seg_id"])[1]["cls_logits"]

    together = logits(list(range(len(split))))
    alone = torch.cat([logits([i]) for i in range(len(split))])
    assert together.std() > 0.01
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits([9, 3, 5]), together[[9, 3, 5]], atol=1e-5, rtol=0)


# ---- loaders


def content(batches: list[dict]) -> list[tuple]:
    return [tuple((key, torch.as_tensor(value).tolist()) for key, value in sorted(batch.items())) for batch in batches]


def run_loader(epochs: int = 3, **kwargs: int) -> RunLoader:
    return RunLoader(split_of(lengths_of(23).tolist()), Collator(CONFIG), 4, epochs, seed=5, **kwargs)


def test_run_loader_goes_over_every_epoch() -> None:
    loader = run_loader()
    assert loader.steps_per_epoch == 6
    assert len(loader) == loader.steps == 18
    batches = list(loader)
    assert len(batches) == 18
    orders = []
    for epoch in range(3):
        order = torch.cat([batch["index"] for batch in batches[6 * epoch : 6 * epoch + 6]]).tolist()
        assert sorted(order) == list(range(23))
        orders.append(tuple(order))
    assert len(set(orders)) == 3


@pytest.mark.parametrize("taken", [0, 1, 5, 6, 7, 17, 18])
def test_run_loader_resumes_with_exactly_the_remaining(taken: int) -> None:
    whole = content(list(run_loader()))
    first = run_loader()
    stream = iter(first)
    assert content([next(stream) for _ in range(taken)]) == whole[:taken]
    assert first.state_dict()["taken"] == taken
    second = run_loader()
    second.load_state_dict(first.state_dict())
    assert content(list(second)) == whole[taken:]
    assert second.state_dict()["taken"] == 18


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a machine of one core
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_run_loader_resumes_with_workers() -> None:
    """Workers prepare batches ahead; what counts is what was taken."""
    whole = content(list(run_loader()))
    first = run_loader(num_workers=2)
    stream = iter(first)
    assert content([next(stream) for _ in range(8)]) == whole[:8]
    assert first.state_dict()["taken"] == 8
    del stream
    second = run_loader(num_workers=2)
    second.load_state_dict(first.state_dict())
    assert content(list(second)) == whole[8:]


def test_run_loader_refuses_another_number_of_batches() -> None:
    """The state of a run on other data, or with another batch size, would skip the wrong examples."""
    with pytest.raises(InputError, match="18 batches in its checkpoint and 24 now"):
        run_loader(epochs=4).load_state_dict(run_loader().state_dict())


def test_run_loader_smaller_than_a_batch() -> None:
    loader = RunLoader(split_of([5]), Collator(CONFIG), 16, epochs=2, seed=0)
    assert [batch["index"].tolist() for batch in loader] == [[0], [0]]


@pytest.mark.parametrize("batch_size", [1, 4, 23, 50])
def test_eval_loader_covers_everything_once(batch_size: int) -> None:
    split = split_of(lengths_of(23).tolist(), labels=False)
    batches = list(eval_loader(split, Collator(CONFIG), batch_size))
    assert len(batches) == -(-23 // batch_size)
    order = torch.cat([batch["index"] for batch in batches])
    assert sorted(order.tolist()) == list(range(23))
    lengths = torch.cat([(~batch["input_mask"]).sum(dim=1) for batch in batches])
    assert lengths.tolist() == sorted(split.lengths.tolist())
    assert lengths.tolist() == split.lengths[order.numpy()].tolist()
    again = torch.cat([batch["index"] for batch in eval_loader(split, Collator(CONFIG), batch_size)])
    assert torch.equal(order, again)


# ---- several processes, several batches a step


def run_batches(
    n: int, batch_size: int, epochs: int, ranks: int, accumulate: int
) -> list[list[tuple[list[int], float]]]:
    """What the loaders of a run take, by rank: (examples, weight)."""
    split = split_of(lengths_of(n).tolist())
    loaders = [
        RunLoader(split, Collator(CONFIG, "longest"), batch_size, epochs, 5, accumulate, rank, ranks)
        for rank in range(ranks)
    ]
    return [[(batch["index"].tolist(), batch["weight"]) for batch in loader] for loader in loaders]


def steps_of(batches: list[list[tuple[list[int], float]]], accumulate: int) -> list[list[tuple[list[int], float]]]:
    """The batches of all ranks that make each step."""
    n = len(batches[0])
    assert [len(of_rank) for of_rank in batches] == [n] * len(batches)  # or a rank would wait for ever
    assert n % accumulate == 0  # or the last step of an epoch would take from the next
    return [
        [batch for of_rank in batches for batch in of_rank[start : start + accumulate]]
        for start in range(0, n, accumulate)
    ]


@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=60)
def test_ranks_and_turns_share_an_epoch(n: int, batch_size: int, ranks: int, accumulate: int, epochs: int) -> None:
    steps = steps_of(run_batches(n, batch_size, epochs, ranks, accumulate), accumulate)
    assert len(steps) == epochs * -(-n // (batch_size * ranks * accumulate))
    per_epoch = len(steps) // epochs
    values = np.random.default_rng(0).normal(size=n)
    for epoch in range(epochs):
        taken = []
        for step in steps[epoch * per_epoch : (epoch + 1) * per_epoch]:
            assert all(examples for examples, _ in step)  # every rank has something to compute on
            assert all(len(examples) <= batch_size for examples, _ in step)
            real = [examples for examples, weight in step if weight]
            together = [i for examples in real for i in examples]
            assert max(map(len, real)) - min(map(len, real)) <= 1  # dealt evenly
            weighted = sum(weight * values[examples].mean() for examples, weight in step) / (ranks * accumulate)
            assert weighted == pytest.approx(values[together].mean(), abs=1e-9)
            taken += together
        assert sorted(taken) == list(range(n))


def test_a_full_step_has_weights_of_one() -> None:
    """Bit for bit: then a run of one process is what it was without weights."""
    for of_rank in run_batches(48, 4, 2, ranks=2, accumulate=3):
        assert [weight for _, weight in of_rank] == [1.0] * 12
    for examples, weight in run_batches(23, 4, 1, ranks=1, accumulate=1)[0]:
        assert weight == 1.0, examples


@pytest.mark.parametrize("n", [48, 50, 25, 3, 1])
def test_however_a_step_is_shared_it_has_the_same_examples(n: int) -> None:
    whole, ranks, turns, both = (
        [
            sorted(i for examples, weight in step if weight for i in examples)
            for step in steps_of(run_batches(n, size, 3, ranks, accumulate), accumulate)
        ]
        for size, ranks, accumulate in ((24, 1, 1), (8, 3, 1), (6, 1, 4), (4, 2, 3))
    )
    assert whole == ranks == turns == both


@pytest.mark.parametrize(("rank", "ranks", "accumulate"), [(0, 1, 3), (1, 2, 1), (0, 2, 3), (2, 3, 2)])
def test_a_share_resumes_from_anywhere(rank: int, ranks: int, accumulate: int) -> None:
    """Also in the middle of a window of accumulation, and at the border of two epochs."""
    more = {"accumulate": accumulate, "rank": rank, "ranks": ranks}
    whole = content(list(run_loader(epochs=2, **more)))
    for taken in range(len(whole) + 1):
        loader = run_loader(epochs=2, **more)
        loader.load_state_dict({"taken": taken, "total": len(whole)})
        assert content(list(loader)) == whole[taken:]
        assert loader.state_dict() == {"taken": len(whole), "total": len(whole)}


def test_the_state_of_another_share_is_refused() -> None:
    with pytest.raises(InputError, match="18 batches in its checkpoint and 9 now"):
        run_loader(ranks=2).load_state_dict(run_loader().state_dict())


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_workers_give_a_share_the_same_batches() -> None:
    more = {"accumulate": 2, "rank": 1, "ranks": 2}
    assert content(list(run_loader(num_workers=2, **more))) == content(list(run_loader(**more)))
    split = split_of(lengths_of(23).tolist())
    shares = [list(eval_loader(split, Collator(CONFIG), 4, 1, 2, num_workers=workers)) for workers in (0, 2)]
    assert content(shares[0]) == content(shares[1])


def test_the_loaders_can_be_sent_to_another_process() -> None:
    """Where processes are spawned, not forked."""
    loader = run_loader(accumulate=2, rank=1, ranks=2)
    whole = content(list(run_loader(accumulate=2, rank=1, ranks=2)))
    sent = pickle.loads(pickle.dumps((loader.dataset, loader.sampler, loader.collate_fn)))
    dataset, sampler, collate_fn = sent
    assert content([collate_fn(dataset[batch]) for batch in sampler]) == whole
    evaluation = eval_loader(split_of([5, 4, 9]), Collator(CONFIG), 2)
    dataset, batches, collate_fn = pickle.loads(
        pickle.dumps((evaluation.dataset, evaluation.batch_sampler, evaluation.collate_fn))
    )
    assert content([collate_fn([dataset[i] for i in batch]) for batch in batches]) == content(list(evaluation))


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 6))
@settings(max_examples=60)
def test_eval_loaders_of_all_ranks_cover_everything(n: int, batch_size: int, ranks: int) -> None:
    """Each batch is one that a single process would have made, so the numbers are the same to the last bit."""
    split = split_of(lengths_of(n).tolist())
    collator = Collator(CONFIG)
    alone = content(list(eval_loader(split, collator, batch_size)))
    shares = [content(list(eval_loader(split, collator, batch_size, rank, ranks))) for rank in range(ranks)]
    assert [len(share) for share in shares] == [-(-len(alone) // ranks)] * ranks
    assert {str(batch) for share in shares for batch in share} == {str(batch) for batch in alone}
    count = Counter(str(batch) for share in shares for batch in share)
    assert sum(count.values()) - len(alone) < ranks  # no rank takes more than one batch in vain


# ---- batches by tokens


def budget(max_tokens: int = 200) -> TokenBudget:
    return TokenBudget(max_tokens, Collator(CONFIG).padded_length)


@pytest.mark.parametrize(("accumulate", "ranks"), [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_token_batches_are_within_the_budget_and_hold_each_example_once(accumulate: int, ranks: int) -> None:
    lengths = lengths_of(500)
    dealt = []
    for rank in range(ranks):
        sampler = StepSampler(lengths, budget(), 3, accumulate, rank, ranks)
        batches = list(sampler.epoch(1))
        assert len(batches) == sampler.per_epoch == sampler.steps_per_epoch * accumulate
        for indices, weight in batches:
            assert len(indices) * Collator(CONFIG).padded_length(int(lengths[indices].max())) <= 200
            dealt += indices if weight else []
    assert sorted(dealt) == list(range(500))


def test_token_batches_are_full_and_equally_many_in_every_epoch() -> None:
    lengths = lengths_of(2000)
    sampler = StepSampler(lengths, budget(400), 3)
    epochs = [[indices for indices, _ in sampler.epoch(number)] for number in range(4)]
    assert {len(epoch) for epoch in epochs} == {sampler.steps_per_epoch}
    tokens = [len(batch) * Collator(CONFIG).padded_length(int(lengths[batch].max())) for batch in epochs[0]]
    assert np.mean(tokens) > 0.8 * 400
    groups = [{frozenset(batch) for batch in epoch} for epoch in epochs[:2]]
    assert len(groups[0] & groups[1]) < len(groups[0]) / 2
    assert [indices for indices, _ in sampler.epoch(2)] == epochs[2]
    longest = [lengths[batch].max() for batch in epochs[0]]
    assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.5


@pytest.mark.parametrize("ranks", [1, 2])
def test_evaluation_by_tokens(ranks: int) -> None:
    lengths = lengths_of(100)
    dealt = [eval_batches(lengths, budget(), rank, ranks) for rank in range(ranks)]
    assert sorted({i for own in dealt for batch in own for i in batch}) == list(range(100))
    for own in dealt:
        assert all(len(b) * Collator(CONFIG).padded_length(int(lengths[b].max())) <= 200 for b in own)


def test_a_budget_that_holds_no_example() -> None:
    with pytest.raises(InputError, match=r"max_tokens.*11.*10"):
        budget(10).cut(np.array([5, 9]))
    assert budget(11).cut(np.array([5, 9])) == [1]
    assert budget(11).cut(np.array([], dtype=np.int64)) == []


@pytest.mark.parametrize(("accumulate", "ranks"), [(1, 1), (2, 2)])
def test_epochs_that_are_drawn_have_equally_many_token_batches(accumulate: int, ranks: int) -> None:
    """Each epoch has other examples, of other lengths; nothing is over the budget, nothing empty."""
    lengths = lengths_of(400)

    def draw(epoch: int) -> np.ndarray:
        rng = np.random.default_rng(epoch)
        return rng.choice(400, 150, p=(odds := lengths ** (epoch % 3 - 1.0)) / odds.sum())

    drawn = 0
    for rank in range(ranks):
        sampler = StepSampler(lengths, budget(), 3, accumulate, rank, ranks, draw=draw)
        for epoch in range(6):
            batches = list(sampler.epoch(epoch))
            assert len(batches) == sampler.per_epoch
            assert [indices for indices, _ in sampler.epoch(epoch, 3)] == [indices for indices, _ in batches[3:]]
            for indices, weight in batches:
                assert len(indices) * Collator(CONFIG).padded_length(int(lengths[indices].max())) <= 200
                assert set(indices) <= set(draw(epoch))
                drawn += len(indices) if weight else 0
    assert drawn > 0.5 * 6 * 150
