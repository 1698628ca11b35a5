"""Drop and grow, and prune: against what sorting by hand says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from funneltfm.sparse.updates import ANNEALS, CURVES, drop_and_grow, prune


def oracle(on: Tensor, keep: Tensor, grow: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The paper's words, unit by unit."""
    G, U = on.shape
    active = [(g, u) for g in range(G) for u in range(U) if on[g, u]]
    dropped = sorted(active, key=lambda i: (float(keep[i]), i))[:n]
    survivors = set(active) - set(dropped)
    new = set(survivors)
    for g in range(G):
        lost = sum(d[0] == g for d in dropped)
        free = [(g, u) for u in range(U) if (g, u) not in survivors]
        new |= set(sorted(free, key=lambda i: (-float(grow[i]), i))[:lost])

    def mask(units: set[tuple[int, int]]) -> Tensor:
        return torch.tensor([[(g, u) in units for u in range(U)] for g in range(G)]).view(G, U)

    return mask(new), mask(survivors)


@given(st.data())
def test_drop_and_grow_is_what_sorting_says(data: st.DataObject) -> None:
    G, U = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 8))

    def numbers() -> Tensor:  # many are equal
        return torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=G * U, max_size=G * U))).float().view(G, U)

    on = torch.tensor(data.draw(st.lists(st.booleans(), min_size=G * U, max_size=G * U))).view(G, U)
    keep, grow = numbers(), numbers()
    n = data.draw(st.integers(0, int(on.sum())))
    new, survivors = drop_and_grow(on, keep, grow, n)
    expected_new, expected_survivors = oracle(on, keep, grow, n)
    assert torch.equal(new, expected_new)
    assert torch.equal(survivors, expected_survivors)
    # What holds whatever the scores: the number of every group, and what may be where.
    assert torch.equal(new.sum(dim=1), on.sum(dim=1))
    assert int((on & ~survivors).sum()) == n
    assert not (survivors & ~on).any()
    assert not (survivors & ~new).any()


def test_by_hand() -> None:
    w = torch.tensor([[4.0, 0, 1, 0], [0, 3, 0, 2], [5, 0, 0, 6], [0, 7, 8, 0]])
    g = torch.tensor([[0.0, 9, 1, 2], [3, 0, 8, 1], [0, 7, 1, 0], [1, 0, 0, 1]])
    on = w != 0
    new, survivors = drop_and_grow(on.view(1, -1), w.view(1, -1), g.view(1, -1), 2)
    assert (on & ~survivors.view(4, 4)).nonzero().tolist() == [[0, 2], [1, 3]]  # 1 and 2 go
    assert (new & ~survivors).view(4, 4).nonzero().tolist() == [[0, 1], [1, 2]]  # 9 and 8 come
    # With rows of a constant number, each grows what it lost.
    new, survivors = drop_and_grow(on, w, g, 3)
    assert (on & ~survivors).nonzero().tolist() == [[0, 2], [1, 1], [1, 3]]
    assert (new & ~survivors).nonzero().tolist() == [[0, 1], [1, 0], [1, 2]]


def test_a_weight_may_come_back() -> None:
    on = torch.tensor([[True, True, False]])
    new, survivors = drop_and_grow(on, torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[9.0, 0.0, 1.0]]), 1)
    assert survivors.tolist() == [[False, True, False]]
    assert new.tolist() == on.tolist()


@given(st.integers(1, 3), st.integers(1, 9), st.integers(0, 9), st.integers(0, 2**31))
def test_pruning_takes_the_smallest_and_never_brings_back(G: int, U: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    on = torch.rand(G, U, generator=generator) < 0.7
    keep = torch.rand(G, U, generator=generator)
    new = prune(on, keep, count)
    assert not (new & ~on).any()
    assert torch.equal(new.sum(dim=1), on.sum(dim=1).clamp(max=count))
    for g in range(G):
        left, gone = keep[g][new[g]], keep[g][on[g] & ~new[g]]
        assert not len(left) or not len(gone) or left.min() >= gone.max()


def test_schedules_begin_and_end_where_they_should() -> None:
    for name, anneal in ANNEALS.items():
        assert anneal(0.0) == 1.0
        assert anneal(1.0) == pytest.approx(float(name == "constant"))
    for curve in CURVES.values():
        assert curve(0.0) == 0.0
        assert curve(1.0) == 1.0  # exactly: the last update hits the target
        values = [curve(i / 100) for i in range(101)]
        assert values == sorted(values)
    assert ANNEALS["cosine"](0.5) == pytest.approx(0.5)
    assert CURVES["cubic"](0.5) == pytest.approx(1 - 0.5**3)
