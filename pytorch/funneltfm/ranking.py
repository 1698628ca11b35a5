"""How well scores rank the right candidates of every query first.

Candidates with equal scores have no order of their own. A metric here is its expected value when ties are put in
order at random, computed exactly (McSherry and Najork 2008, "Computing information retrieval performance measures
efficiently in the presence of tied scores"): the order of the data and of the labels does not change it, and equal
scores for all candidates get what guessing gets.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

Action = Literal["skip", "neg", "pos"]


@dataclass(frozen=True)
class Ties:
    """The candidates of one query in groups of equal scores, the best first. Arrays (G,), one number a group."""

    size: np.ndarray
    """Candidates of the group."""
    right: np.ndarray
    """Right ones among them."""
    before: np.ndarray
    """Candidates of all groups before."""
    found: np.ndarray
    """Right ones among those."""

    @classmethod
    def of(cls, scores: np.ndarray, right: np.ndarray) -> "Ties":
        """scores: (n,), more is better. right: (n,) bool."""
        _, group = np.unique(-scores, return_inverse=True)
        size, right = np.bincount(group), np.bincount(group, weights=right)
        return cls(size, right, np.cumsum(size) - size, np.cumsum(right) - right)

    def first(self) -> tuple[int, int, int]:
        """Size, right ones and candidates before, of the first group with a right one."""
        at = int(np.argmax(self.right > 0))
        return int(self.size[at]), int(self.right[at]), int(self.before[at])


def _all_wrong(size: int, right: int) -> np.ndarray:
    """Chances that the first 0, 1, 2, ... of a group's candidates are all wrong: (size - right + 1,)."""
    drawn = np.arange(size - right)
    return np.concatenate([[1.0], np.cumprod((size - right - drawn) / (size - drawn))])


# ---- metrics of one query that has a right candidate


def average_precision(ties: Ties) -> float:
    """Mean of the precisions at the ranks of the right candidates."""
    size, right, before, found = (np.repeat(x, ties.size) for x in (ties.size, ties.right, ties.before, ties.found))
    rank = np.arange(1, len(size) + 1)
    others = (rank - before - 1) * (right - 1) / np.maximum(size - 1, 1)  # right ones of the group that come before
    return float((right / size * (found + 1 + others) / rank).sum() / ties.right.sum())


def reciprocal_rank(ties: Ties) -> float:
    """1 / rank of the first right candidate."""
    size, right, before = ties.first()
    wrong = _all_wrong(size, right)
    place = np.arange(1, len(wrong) + 1)  # of the first right one within its group
    return float((wrong * right / (size - place + 1) / (before + place)).sum())


def precision_at(k: int, ties: Ties) -> float:
    """Right ones among the first k candidates, divided by k, as trec_eval does also where there are fewer than k."""
    return float((ties.right / ties.size * np.clip(k - ties.before, 0, ties.size)).sum() / k)


def hit_rate_at(k: int, ties: Ties) -> float:
    """1 where a right one is among the first k candidates, else 0."""
    size, right, before = ties.first()
    drawn = min(max(k - before, 0), size)
    return 1.0 if drawn > size - right else 1.0 - float(_all_wrong(size, right)[drawn])


def ndcg(ties: Ties) -> float:
    """Discounted gain with the discount 1 / log2(rank + 1), divided by that of the best order."""
    discount = 1 / np.log2(np.arange(2, ties.size.sum() + 2))
    gain = (ties.right / ties.size * np.add.reduceat(discount, ties.before)).sum()
    return float(gain / discount[: int(ties.right.sum())].sum())


METRICS: dict[str, Callable[[Ties], float]] = {
    "mean_average_precision": average_precision,
    "mean_reciprocal_rank": reciprocal_rank,
    **{f"precision_at_{k}": partial(precision_at, k) for k in (1, 5, 100)},
    **{f"hit_rate_at_{k}": partial(hit_rate_at, k) for k in (5, 100)},
    "ndcg": ndcg,
}


# ---- over all queries


def ranking_scores(
    names: Sequence[str],
    scores: np.ndarray,
    right: np.ndarray,
    queries: np.ndarray,
    empty_target_action: Action = "skip",
) -> dict[str, float]:
    """Means over the queries of the named METRICS.

    scores: (N,), more is better. right: (N,) bool or 0 and 1. queries: (N,), equal where candidates belong together.
    empty_target_action: what a query without a right candidate counts: nothing, 0 or 1.

    NAME is the mean by that rule; raw_NAME that over all queries, where one without a right candidate counts 0;
    clean_NAME that over the queries with both right and wrong candidates. 0 where no query is left; NaN where scores
    are.
    """
    right = np.asarray(right).astype(bool)
    order = np.argsort(queries, kind="stable")
    _, first = np.unique(np.asarray(queries)[order], return_index=True)
    parts = np.split(order, first[1:])
    some = np.array([right[part].any() for part in parts])
    mixed = some & np.array([not right[part].all() for part in parts])
    values = np.zeros((len(names), len(parts)))
    for at in np.flatnonzero(some):
        ties = Ties.of(scores[parts[at]], right[parts[at]])
        values[:, at] = [METRICS[name](ties) for name in names]
    if np.isnan(scores).any():
        values[:] = np.nan
    empty = 1.0 if empty_target_action == "pos" else 0.0
    kinds = (
        ("", np.where(some, values, empty), some | (empty_target_action in ("neg", "pos"))),
        ("raw_", values, np.ones_like(some)),
        ("clean_", values, mixed),
    )
    return {
        prefix + name: float(of_kind[i, kept].mean()) if kept.any() else 0.0
        for prefix, of_kind, kept in kinds
        for i, name in enumerate(names)
    }


def best_threshold(scores: np.ndarray, right: np.ndarray) -> float:
    """The threshold t for which "right where score >= t" has the highest F1, then the highest accuracy; between two
    scores, and of several the highest. scores: (N,). right: (N,) bool or 0 and 1.
    """
    right = np.asarray(right).astype(bool)
    levels, group = np.unique(-scores, return_inverse=True)
    levels = -levels  # falling
    taken = np.concatenate([[0], np.cumsum(np.bincount(group))])  # by thresholds from above all scores to below all
    hits = np.concatenate([[0], np.cumsum(np.bincount(group, weights=right))])
    f1 = 2 * hits / np.maximum(taken + right.sum(), 1)
    correct = hits + (len(right) - taken) - (right.sum() - hits)
    best = np.lexsort((-np.arange(len(f1)), correct, f1))[-1]
    if best == 0:
        return float(np.nextafter(levels[0], np.inf))
    if best == len(levels):
        return float(levels[-1])
    middle = (levels[best - 1] + levels[best]) / 2
    return float(middle if middle > levels[best] else levels[best - 1])
