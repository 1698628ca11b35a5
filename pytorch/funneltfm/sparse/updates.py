"""How masks change in training: drop and grow (RigL), and prune more and more. Pure: masks and scores in, masks out.

Evci, Gale, Menick, Castro, Elsen: Rigging the Lottery: Making All Tickets Winners, 2020.
Zhu, Gupta: To prune, or not to prune: exploring the efficacy of pruning for model compression, 2017.
Alphabet: G groups, U units in a group (see patterns.py). True = on.
"""

import math
from collections.abc import Callable

from torch import Tensor

from funneltfm.sparse.patterns import largest

# The share of the first drop fraction that is left, by progress from 0 to 1. Rigging the Lottery, eq. 1 and appendix.
ANNEALS: dict[str, Callable[[float], float]] = {
    "cosine": lambda p: 0.5 * (1 + math.cos(math.pi * p)),
    "linear": lambda p: 1 - p,
    "constant": lambda p: 1.0,
}
# The share of the way to the final sparsity, by progress from 0 to 1. To prune, or not to prune, eq. 1 is the cubic.
CURVES: dict[str, Callable[[float], float]] = {
    "cubic": lambda p: 1 - (1 - p) ** 3,
    "linear": lambda p: p,
    "cosine": lambda p: 0.5 * (1 - math.cos(math.pi * p)),
}


def drop_and_grow(on: Tensor, keep: Tensor, grow: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Drop the `n` units with the lowest `keep` (|w|), then grow the `n` with the highest `grow` (|gradient|) of all
    that do not survive: one that was just dropped may come back.

    on: (G, U) bool; keep, grow: (G, U). Where there are several groups, each grows as many as it lost, so that it
    keeps its number (Lasby et al., Dynamic Sparse Training with Structured Sparsity, 2024). Returns the new (G, U), and
    the survivors (G, U).
    """
    G, U = on.shape
    dropped = largest(-keep.reshape(1, -1), on.reshape(1, -1), n).view(G, U)
    survivors = on & ~dropped
    return survivors | largest(grow, ~survivors, dropped.sum(dim=1)), survivors


def prune(on: Tensor, keep: Tensor, count: int) -> Tensor:
    """Leave `count` units on in every group, those with the highest `keep`; a group that has fewer stays as it is.

    on: (G, U) bool; keep: (G, U). What was off stays off.
    """
    return largest(keep, on, on.sum(dim=1).clamp(max=count))
