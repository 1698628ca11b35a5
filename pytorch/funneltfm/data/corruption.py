"""Corrupting token sequences, for objectives that learn to undo it. All randomness comes from the generator given."""

import numpy as np

from funneltfm.errors import InputError


def masked(
    ids: np.ndarray,
    selectable: np.ndarray,
    rng: np.random.Generator,
    probability: float,
    actions: tuple[float, float, float],
    *,
    mask_id: int,
    ordinary: np.ndarray,
    words: np.ndarray | None = None,
    exact: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Select tokens and mask, replace or leave them (Devlin et al. 2019, section 3.1).

    ids: (T,). selectable: (T,) bool, False for special tokens. actions: probabilities that a selected token becomes
    mask_id, one of `ordinary` (ids, uniformly), or stays; drawn for each token. words: (T,) word ids; all pieces of a
    word are selected or none. exact: select max(1, round(p * n)) of the n tokens (words), not each with probability p.

    Returns the corrupted ids and which tokens were selected, both (T,). Every token's chance of being selected is
    `probability` (exact: the rounded count's share).
    """
    if abs(sum(actions) - 1) > 1e-6:
        raise InputError(f"the probabilities of masking, replacing and leaving must add to 1; got {actions}.")
    chosen = select(selectable, rng, probability, words, exact)
    action = rng.random(len(ids))
    corrupt = ids.copy()
    corrupt[chosen & (action < actions[0])] = mask_id
    replace = chosen & (action >= actions[0]) & (action < actions[0] + actions[1])
    corrupt[replace] = rng.choice(ordinary, int(replace.sum()))
    return corrupt, chosen


def select(
    selectable: np.ndarray,
    rng: np.random.Generator,
    probability: float,
    words: np.ndarray | None = None,
    exact: bool = False,
) -> np.ndarray:
    """Which tokens are selected, (T,) bool; the arguments are those of `masked`."""
    places = np.flatnonzero(selectable)
    group = np.arange(len(places)) if words is None else np.unique(words[places], return_inverse=True)[1]
    n = int(group.max(initial=-1)) + 1
    if exact:
        drawn = np.zeros(n, bool)
        drawn[rng.permutation(n)[: max(1, round(probability * n))]] = True
    else:
        drawn = rng.random(n) < probability
    chosen = np.zeros(len(selectable), bool)
    chosen[places] = drawn[group]
    return chosen


def replaced(ids: np.ndarray, chosen: np.ndarray, rng: np.random.Generator, ordinary: np.ndarray) -> np.ndarray:
    """ids (T,) with every chosen token, one of `ordinary`, replaced by another of `ordinary` (sorted), uniformly."""
    corrupt, places = ids.copy(), np.searchsorted(ordinary, ids[chosen])
    drawn = rng.integers(len(ordinary) - 1, size=len(places))
    corrupt[chosen] = ordinary[drawn + (drawn >= places)]
    return corrupt
