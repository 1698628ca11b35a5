"""Masking: what is selected, how much of it, what becomes of it, and that nothing else is touched."""

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from funneltfm.data.corruption import (
    infilled,
    masked,
    n_noise,
    noise_spans,
    permuted,
    replaced,
    spanned,
    unspanned_length,
)
from funneltfm.errors import InputError

MASK, BERT = 4, (0.8, 0.1, 0.1)
ORDINARY = np.arange(5, 50)
# [CLS], a word of one piece, one of four, one of two, [SEP], one of three, [SEP]
WORDS = np.array([-1, 0, 1, 1, 1, 1, 2, 2, -1, 3, 3, 3, -1])
IDS = np.array([2, 10, 11, 12, 13, 14, 15, 16, 3, 17, 18, 19, 3])


def corrupt(seed: int, probability: float = 0.15, actions: tuple[float, float, float] = BERT, **more: Any) -> Any:
    more = {"mask_id": MASK, "ordinary": ORDINARY} | more
    return masked(IDS, WORDS >= 0, np.random.default_rng(seed), probability, actions, **more)


def chosen_often(n: int, **more: Any) -> np.ndarray:
    """(n, T) bool: what is selected with the seeds 0 to n - 1."""
    return np.stack([corrupt(seed, **more)[1] for seed in range(n)])


def test_a_word_of_four_pieces_is_selected_whole_or_not_at_all() -> None:
    """The older framework followed the first piece by one only: [1, 1, 0, 0]."""
    chosen = chosen_often(400, probability=0.5, words=WORDS)
    for word in range(4):
        pieces = chosen[:, word == WORDS]
        assert (pieces == pieces[:, :1]).all()
        assert 0 < pieces[:, 0].mean() < 1
    apart = chosen_often(400, probability=0.5)
    assert (apart[:, WORDS == 1] != apart[:, WORDS == 1][:, :1]).any()


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("probability", [0.15, 0.4])
def test_every_token_has_the_same_chance(whole: bool, probability: float) -> None:
    n = 6000
    rates = chosen_often(n, probability=probability, words=WORDS if whole else None).mean(axis=0)
    error = np.sqrt(probability * (1 - probability) / n)
    assert (np.abs(rates - probability)[WORDS >= 0] < 4.5 * error).all()
    assert (rates[WORDS < 0] == 0).all()


@given(st.integers(0, 2**31), st.floats(0.01, 1.0), st.booleans(), st.booleans())
def test_what_is_not_selected_is_not_touched(seed: int, probability: float, whole: bool, exact: bool) -> None:
    before = IDS.copy()
    ids, chosen = corrupt(seed, probability, words=WORDS if whole else None, exact=exact)
    assert (ids[~chosen] == IDS[~chosen]).all()
    assert not chosen[WORDS < 0].any()
    assert (before == IDS).all()  # in place of which a copy was made
    assert np.isin(ids[chosen & (ids != IDS)], [MASK, *ORDINARY]).all()


@given(st.integers(0, 2**31), st.floats(0.01, 1.0))
def test_exact_budget(seed: int, probability: float) -> None:
    _, chosen = corrupt(seed, probability, exact=True)
    assert chosen.sum() == max(1, round(probability * 10))
    _, chosen = corrupt(seed, probability, exact=True, words=WORDS)
    assert len({*WORDS[chosen].tolist()}) == max(1, round(probability * 4))
    assert np.isin(WORDS, WORDS[chosen])[WORDS >= 0].sum() == chosen.sum()


def test_exact_budget_takes_every_token_equally_often() -> None:
    rates = chosen_often(4000, probability=0.3, exact=True)[:, WORDS >= 0].mean(axis=0)
    assert (np.abs(rates - 0.3) < 4.5 * np.sqrt(0.3 * 0.7 / 4000)).all()


@pytest.mark.parametrize("actions", [BERT, (0.7, 0.2, 0.1), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)])
def test_shares_of_what_becomes_of_the_selected(actions: tuple[float, float, float]) -> None:
    """.7 + .2 + .1 is not 1 in floating point; (0, 1, 0) is swapped language modelling."""
    counts, n = np.zeros(3), 0
    for seed in range(1500):
        ids, chosen = corrupt(seed, 0.5, actions, ordinary=np.arange(100, 200))  # never what was there
        n += chosen.sum()
        counts += [(ids[chosen] == MASK).sum(), (ids[chosen] >= 100).sum(), (ids[chosen] == IDS[chosen]).sum()]
    assert counts.sum() == n
    for share, expected in zip(counts / n, actions, strict=True):
        assert share == expected if expected in (0, 1) else abs(share - expected) < 4.5 * np.sqrt(0.25 / n)


def test_random_tokens_are_all_ordinary_ones_evenly() -> None:
    drawn = np.concatenate([(r := corrupt(seed, 1.0, (0.0, 1.0, 0.0)))[0][r[1]] for seed in range(2000)])
    values, counts = np.unique(drawn, return_counts=True)
    assert values.tolist() == ORDINARY.tolist()
    expected = len(drawn) / len(ORDINARY)
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()


def test_the_seed_decides() -> None:
    one, again, other = corrupt(1, 0.5), corrupt(1, 0.5), corrupt(2, 0.5)
    assert (one[0] == again[0]).all()
    assert (one[1] == again[1]).all()
    assert (one[1] != other[1]).any()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_nothing_to_select(exact: bool, whole: bool) -> None:
    ids = np.array([2, 3])
    words = np.array([-1, -1]) if whole else None
    more: dict[str, Any] = {"mask_id": MASK, "ordinary": ORDINARY, "words": words, "exact": exact}
    rng = np.random.default_rng(0)
    result, chosen = masked(ids, np.zeros(2, bool), rng, 0.5, BERT, **more)
    assert (result.tolist(), chosen.any()) == ([2, 3], False)
    more["words"] = np.zeros(0, int) if whole else None
    empty, chosen = masked(ids[:0], np.zeros(0, bool), rng, 0.5, BERT, **more)
    assert len(empty) == len(chosen) == 0


def test_a_special_token_within_a_word() -> None:
    """What is special is left out, the rest of the word stays one word."""
    words, selectable = np.array([0, 0, 0, 1]), np.array([True, False, True, True])
    for seed in range(50):
        more: dict[str, Any] = {"mask_id": MASK, "ordinary": ORDINARY, "words": words}
        _, chosen = masked(np.array([10, 1, 11, 12]), selectable, np.random.default_rng(seed), 0.5, BERT, **more)
        assert chosen[0] == chosen[2]
        assert not chosen[1]


def test_probabilities_that_do_not_add_up() -> None:
    with pytest.raises(InputError, match=r"must add to 1; got \(0.8, 0.1, 0.2\)"):
        corrupt(0, 0.15, (0.8, 0.1, 0.2))


# ---- replacing by another token


def test_a_replacement_is_another_token_and_each_as_often() -> None:
    ids, chosen = np.full(8000, 7), np.arange(8000) % 2 == 0
    ordinary = np.array([5, 7, 9, 12, 13])
    out = replaced(ids, chosen, np.random.default_rng(0), ordinary)
    assert (out[~chosen] == 7).all()
    assert (ids == 7).all()
    values, counts = np.unique(out[chosen], return_counts=True)
    assert values.tolist() == [5, 9, 12, 13]
    assert (np.abs(counts / 4000 - 0.25) < 4.5 * np.sqrt(0.25 * 0.75 / 4000)).all()
    for edge in (5, 13):  # the first and the last
        assert edge not in replaced(np.full(500, edge), np.ones(500, bool), np.random.default_rng(1), ordinary)


# ---- text infilling

TEXT = np.arange(100, 140)
TEXT_WORDS = np.array([-1, *np.repeat(np.arange(19), 2), -1])  # two pieces a word
INNER = TEXT_WORDS >= 0


def fill(seed: int, probability: float = 0.3, mean: float = 3.0, **more: Any) -> np.ndarray:
    more = {"mask_id": MASK, "longest": 100} | more
    return infilled(TEXT, INNER, TEXT_WORDS, np.random.default_rng(seed), probability, mean, **more)


@given(st.integers(0, 2**31), st.floats(0, 1), st.floats(0.3, 6), st.booleans())
def test_infilling_removes_exactly_its_budget(seed: int, probability: float, mean: float, whole: bool) -> None:
    filled = fill(seed, probability, mean, whole_words=whole)
    left = filled[filled != MASK]
    budget = 2 * round(probability * 19) if whole else round(probability * 38)
    assert len(left) == 40 - budget
    assert (left == TEXT[np.isin(TEXT, left)]).all()  # in their order
    assert filled[0] == 100  # special tokens stay at the ends
    assert filled[-1] == 139
    assert (filled == MASK).any() == (budget > 0)
    if whole:
        assert all(np.isin([100 + i, 101 + i], left).sum() != 1 for i in range(1, 39, 2))


def spans_of(filled: np.ndarray) -> list[int]:
    """What each mask stands for: the numbers of tokens that are missing where masks are, where there is one mask."""
    lengths, at = [], 0
    while at < len(filled):
        if filled[at] == MASK:
            end = at
            while filled[end] == MASK:
                end += 1
            missing = int(filled[end] - filled[at - 1] - 1)
            lengths += [missing] if end == at + 1 else []
            at = end
        else:
            at += 1
    return lengths


def test_lengths_of_spans_are_poisson_and_empty_ones_are_inserted() -> None:
    """The older framework's empty spans vanished, and its lengths were scaled to fit."""
    n = 4000
    ids, lengths = np.arange(100, 100 + n), []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        filled = infilled(ids, ids > 100, ids, rng, 0.1, 3.0, mask_id=MASK, longest=2 * n)
        lengths += spans_of(np.append(filled, 100 + n))
    assert len(lengths) > 800
    shares = np.bincount(lengths, minlength=12)[:12] / len(lengths)
    expected = [math.exp(-3) * 3**k / math.factorial(k) for k in range(12)]
    assert np.abs(shares - expected).max() < 0.03
    assert 0.03 < shares[0] < 0.07


def test_spans_start_at_words_where_there_is_room() -> None:
    for seed in range(300):
        filled = fill(seed, 0.15, 2.0)
        before = np.flatnonzero(filled == MASK) - 1
        first = [filled[i] for i in before if filled[i] != MASK]  # the last token before a mask ends a word
        assert all(token == 100 or (token - 100) % 2 == 0 for token in first)


def test_every_token_is_infilled_with_about_the_same_chance() -> None:
    gone = np.mean([~np.isin(TEXT, fill(seed)) for seed in range(4000)], axis=0)
    assert gone[[0, -1]].max() == 0
    assert gone[1:-1].mean() == pytest.approx(round(0.3 * 38) / 38)
    assert gone[3:-3].min() > 0.2
    assert gone[1:-1].max() < 0.4


def test_infilling_is_kept_within_limits() -> None:
    for seed in range(300):
        assert (fill(seed, 0.5, 3.0, max_spans=2) == MASK).sum() <= 2
        assert len(fill(seed, 0.1, 0.2, longest=40)) <= 40  # empty spans are left out rather
    longer = [len(fill(seed, 0.1, 0.2)) for seed in range(300)]
    assert max(longer) > 40
    nothing = infilled(TEXT, np.zeros(40, bool), TEXT_WORDS, np.random.default_rng(0), 0.3, 3.0, mask_id=4, longest=99)
    assert (nothing == TEXT).all()
    none = np.zeros(0, np.int64)
    assert not len(infilled(none, none > 0, none, np.random.default_rng(0), 0.3, 3.0, mask_id=4, longest=9))


# ---- sentence permutation


def test_permutation_permutes() -> None:
    """The older framework split the text and joined it again: 20 draws, one result."""
    ends = np.isin(np.arange(12), [3, 5, 9])  # 4 sentences: 1-3, 4-5, 6-9, 10
    fixed = np.isin(np.arange(12), [0, 11])
    orders = [tuple(permuted(ends, fixed, np.random.default_rng(seed))) for seed in range(600)]
    sentences = [(1, 2, 3), (4, 5), (6, 7, 8, 9), (10,)]
    wanted = {(0, *sum(order, ()), 11) for order in itertools.permutations(sentences)}
    assert set(orders) == wanted
    counts = np.unique(np.array(orders), axis=0, return_counts=True)[1]
    assert counts.min() > 8  # of 25


def test_sentences_stay_between_what_is_fixed() -> None:
    ends, fixed = np.isin(np.arange(9), [1, 5, 6]), np.isin(np.arange(9), [3])
    for seed in range(50):
        order = permuted(ends, fixed, np.random.default_rng(seed))
        assert sorted(order[:3]) == [0, 1, 2]
        assert order[3] == 3
        assert sorted(order[4:]) == [4, 5, 6, 7, 8]
    assert list(permuted(np.zeros(0, bool), np.zeros(0, bool), np.random.default_rng(0))) == []


# ---- span corruption


@pytest.mark.parametrize(
    ("length", "n", "target"), [(512, 568, 114), (128, 141, 29), (64, 70, 14)]
)  # the first one is T5's (Raffel et al. 2020, section 3.1.4 and its code: 568 and 114)
def test_texts_are_as_long_as_fits(length: int, n: int, target: int) -> None:
    assert unspanned_length(length - 1, 0.15, 3.0, 100) == n
    noise, spans = n_noise(n, 0.15, 3.0, 100)
    assert n - noise + spans + 1 == length
    assert noise + spans + 1 == target
    noise, spans = n_noise(n + 1, 0.15, 3.0, 100)
    assert n + 1 - noise + spans + 1 > length


@given(st.integers(0, 300), st.floats(0.01, 0.9), st.floats(0.5, 8), st.integers(1, 40), st.integers(0, 2**31))
def test_inputs_and_targets_rebuild_the_text(n: int, density: float, mean: float, most: int, seed: int) -> None:
    ids, sentinels = np.arange(1000, 1000 + n), np.arange(40)
    noise = noise_spans(n, np.random.default_rng(seed), density, mean, most)
    assert noise.sum() == (0 if n < 2 else min(max(round(n * density), 1), n - 1))
    inputs, targets = spanned(ids, noise, sentinels)
    count = n_noise(n, density, mean, most)[1]
    assert inputs[inputs < 1000].tolist() == targets[targets < 1000].tolist() == list(range(count))  # in order
    assert len(inputs) == n - noise.sum() + count
    assert len(targets) == noise.sum() + count
    rebuilt: list[int] = []
    for token in inputs.tolist():
        if token >= 1000:
            rebuilt.append(token)
            continue
        start = targets.tolist().index(token) + 1
        rebuilt += itertools.takewhile(lambda other: other >= 1000, targets[start:].tolist())
    assert rebuilt == ids.tolist()
    if count:
        assert noise[-1]
        assert not noise[0]


def test_lengths_are_drawn_from_all_compositions_alike() -> None:
    """10 tokens, 4 of noise in 2 spans: 3 ways to cut the noise, 5 to cut the rest."""
    seen = Counter(tuple(noise_spans(10, np.random.default_rng(seed), 0.4, 2.0, 9).tolist()) for seed in range(3000))
    assert len(seen) == 15
    assert min(seen.values()) > 140  # of 200


def test_whole_words_are_noise_or_not() -> None:
    words = TEXT_WORDS[1:-1]
    for seed in range(100):
        noise = noise_spans(38, np.random.default_rng(seed), 0.3, 3.0, 9, words)
        assert (noise[::2] == noise[1::2]).all()
        assert noise[::2].sum() == round(0.3 * 19)
