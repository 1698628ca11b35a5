"""Where the weights of a mask may be: free, or in a pattern. A pattern cuts a matrix into groups of units.

A unit is what is on or off as one: a weight, or a block of weights. Every group has as many units on as the others. So
scores (G, U) and one number a group are all that choosing a mask needs, whatever the pattern.

Alphabet: R rows (outputs), C columns (inputs), G groups, U units in a group, S weights in a unit.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from funneltfm.errors import InputError

_STRUCTURED = re.compile(r"([1-9]\d*)([:x])([1-9]\d*)")


@dataclass(frozen=True)
class Pattern:
    """One of: "unstructured"; "constant_fan_in" (every row has as many on as the others); "2:4" (two of four
    consecutive inputs of a row); "4x1" (blocks of four consecutive outputs by one input).
    """

    name: str

    def __post_init__(self) -> None:
        if self.name in ("unstructured", "constant_fan_in"):
            return
        match = _STRUCTURED.fullmatch(self.name)
        if match is None or (match[2] == ":" and int(match[1]) > int(match[3])):
            raise InputError(
                f"pattern must be unstructured, constant_fan_in, N:M with N at most M (such as 2:4), or a block of "
                f"outputs x inputs (such as 4x1 or 16x16); got {self.name!r}."
            )

    def _numbers(self, sign: str) -> tuple[int, int] | None:
        match = _STRUCTURED.fullmatch(self.name)
        return (int(match[1]), int(match[3])) if match and match[2] == sign else None

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """(N, M) of N:M."""
        return self._numbers(":")

    @property
    def block(self) -> tuple[int, int]:
        """Outputs and inputs of a unit."""
        return self._numbers("x") or (1, 1)

    @property
    def grouped(self) -> bool:
        """Whether a matrix has several groups, so that units cannot move freely."""
        return self.name == "constant_fan_in" or self.n_of_m is not None

    def shape(self, rows: int, columns: int, name: str) -> tuple[int, int, int]:
        """(G, U, S) of a matrix. InputError, naming the weight, where the pattern does not divide it."""
        (r, c), n_of_m = self.block, self.n_of_m
        m = n_of_m[1] if n_of_m else 1
        if rows % r or columns % (c * m):
            raise InputError(
                f"the pattern {self.name} does not divide {name}: it has {rows} outputs and {columns} inputs. Leave it "
                f"out with exclude, or choose another pattern."
            )
        if n_of_m:
            return rows * columns // m, m, 1
        if self.name == "constant_fan_in":
            return rows, columns, 1
        return 1, rows * columns // (r * c), r * c

    def to_units(self, matrix: Tensor) -> Tensor:
        """(R, C) -> (G, U, S)."""
        R, C = matrix.shape
        shape = self.shape(R, C, "a matrix")
        if shape[2] == 1:
            return matrix.reshape(shape)
        r, c = self.block
        return matrix.reshape(R // r, r, C // c, c).transpose(1, 2).reshape(shape)

    def to_matrix(self, units: Tensor, rows: int, columns: int) -> Tensor:
        """(G, U) -> (R, C): every weight of a unit gets the unit's value."""
        r, c = self.block
        if (r, c) == (1, 1):
            return units.reshape(rows, columns)
        blocks = units.reshape(rows // r, 1, columns // c, 1)
        return blocks.expand(rows // r, r, columns // c, c).reshape(rows, columns)


def largest(scores: Tensor, among: Tensor, n: int | Tensor) -> Tensor:
    """The `n` largest scores of every group, of those in `among`. Of equal scores the first is taken, so the choice
    is the same on every machine.

    scores: (G, U), finite; among: (G, U) bool; n: one number, or (G,), at most what `among` holds in a group. Returns
    (G, U) bool.
    """
    G, U = scores.shape
    counts = torch.as_tensor(n, device=scores.device).expand(G)
    assert bool((counts <= among.sum(dim=1)).all()), "more to choose than there is"
    scores = scores.masked_fill(~among, -torch.inf)
    if G == 1:
        count = int(counts[0])
        if count == 0:
            return torch.zeros_like(among)
        threshold = scores[0].kthvalue(U - count + 1).values
        chosen = scores > threshold
        ties = (scores[0] == threshold).nonzero()[: count - int(chosen.sum()), 0]
        chosen[0, ties] = True
        return chosen
    ordered = scores.sort(dim=1, descending=True).values
    thresholds = ordered.gather(1, (counts - 1).clamp(min=0)[:, None])
    above, ties = scores > thresholds, scores == thresholds
    missing = counts - above.sum(dim=1)
    return (above | (ties & (ties.cumsum(dim=1) <= missing[:, None]))) & (counts > 0)[:, None]
