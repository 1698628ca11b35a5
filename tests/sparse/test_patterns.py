"""Patterns cut matrices into groups of units, and choosing among them is the same everywhere."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from funneltfm.errors import InputError
from funneltfm.sparse.patterns import Pattern, largest

NAMES = ("unstructured", "constant_fan_in", "2:4", "1:2", "4x1", "2x3", "1x4")


@pytest.mark.parametrize("name", ["", "Unstructured", "4:2", "0:4", "2:", "4x", "0x1", "4x1x1", "2:4 ", "n:m"])
def test_patterns_that_are_none(name: str) -> None:
    with pytest.raises(InputError, match="pattern must be"):
        Pattern(name)


@pytest.mark.parametrize("name", NAMES)
def test_units_go_back_to_where_they_came_from(name: str) -> None:
    pattern = Pattern(name)
    matrix = torch.arange(8 * 12).view(8, 12)
    G, U, S = pattern.shape(8, 12, "w")
    units = pattern.to_units(matrix)
    assert units.shape == (G, U, S)
    assert pattern.grouped == (G > 1)
    numbers = torch.arange(G * U).view(G, U)
    back = pattern.to_matrix(numbers, 8, 12)
    for number in range(G * U):
        of_unit = units.view(G * U, S)[number]
        assert set(matrix[back == number].tolist()) == set(of_unit.tolist())


def test_what_is_together() -> None:
    matrix = torch.arange(16).view(4, 4)
    assert Pattern("4x1").to_units(matrix)[0, 1].tolist() == [1, 5, 9, 13]  # four outputs share an input
    assert Pattern("2x2").to_units(matrix)[0, 1].tolist() == [2, 3, 6, 7]
    assert Pattern("2:4").to_units(matrix)[1, :, 0].tolist() == [4, 5, 6, 7]  # four inputs of an output
    assert Pattern("constant_fan_in").to_units(matrix)[2, :, 0].tolist() == [8, 9, 10, 11]


@pytest.mark.parametrize(("name", "rows", "columns"), [("4x1", 6, 4), ("1x4", 4, 6), ("2:4", 4, 6)])
def test_a_matrix_that_is_not_divided(name: str, rows: int, columns: int) -> None:
    with pytest.raises(InputError, match=rf"{name} does not divide here\.weight: it has {rows} outputs and {columns}"):
        Pattern(name).shape(rows, columns, "here.weight")


def oracle(scores: Tensor, among: Tensor, counts: list[int]) -> Tensor:
    chosen = torch.zeros_like(among)
    for group, count in enumerate(counts):
        order = sorted(
            (i for i in range(scores.size(1)) if among[group, i]), key=lambda i: (-float(scores[group, i]), i)
        )
        chosen[group, order[:count]] = True
    return chosen


@given(st.data())
def test_largest_is_what_sorting_says(data: st.DataObject) -> None:
    G, U = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    numbers = data.draw(st.lists(st.integers(-2, 2), min_size=G * U, max_size=G * U))  # many are equal
    flags = data.draw(st.lists(st.booleans(), min_size=G * U, max_size=G * U))
    scores, among = torch.tensor(numbers).float().view(G, U), torch.tensor(flags).view(G, U)
    counts = [data.draw(st.integers(0, int(row.sum()))) for row in among]
    assert torch.equal(largest(scores, among, torch.tensor(counts)), oracle(scores, among, counts))


def test_one_number_for_all_groups() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0], [3.0, 3.0, 3.0]])
    chosen = largest(scores, torch.ones(2, 3, dtype=torch.bool), 2)
    assert chosen.tolist() == [[False, True, True], [True, True, False]]


def test_more_than_there_is_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="more to choose"):
        largest(torch.zeros(1, 3), torch.tensor([[True, False, False]]), 2)
