"""Masking: what is selected, how much of it, what becomes of it, and that nothing else is touched."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from funneltfm.data.corruption import masked, replaced
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
