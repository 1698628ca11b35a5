"""Windows against what must hold of them, and every token's best window by trying all."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from funneltfm.data.windows import most_context, split_windows, token_spans
from funneltfm.errors import InputError


@given(st.integers(0, 200), st.integers(1, 40), st.integers(0, 60))
def test_windows_hold_every_token_and_share_what_they_should(n: int, room: int, overlap: int) -> None:
    if n > room and overlap >= room:
        with pytest.raises(InputError, match=f"there is room for {room} tokens of the context, which has {n}"):
            split_windows(n, room, overlap, "data")
        return
    windows = split_windows(n, room, overlap, "data")
    assert windows[0][0] == 0
    assert windows[-1][1] == n
    for (a, b), (c, d) in itertools.pairwise(windows):
        assert b - a == room
        assert b - c == overlap
        assert d > b  # none is of no use


@given(st.integers(1, 120), st.integers(2, 30), st.integers(0, 20))
def test_every_token_belongs_to_the_window_with_most_of_its_context(n: int, room: int, overlap: int) -> None:
    windows = split_windows(n, room, min(overlap, room - 1), "data")
    owner = [i for i, (a, b) in enumerate(most_context(n, windows)) for _ in range(a, b)]
    assert len(owner) == n
    for token in range(n):
        best, score = -1, -1.0
        for i, (a, b) in enumerate(windows):
            if a <= token < b and min(token - a, b - 1 - token) + 0.001 * (b - a) > score + 1e-12:
                best, score = i, min(token - a, b - 1 - token) + 0.001 * (b - a)
        assert owner[token] == best


def test_spans_that_no_token_holds() -> None:
    starts, ends = np.array([0, 4, 4, 9]), np.array([3, 4, 8, 12])
    assert token_spans([(0, 3), (1, 2), (3, 4), (4, 5), (2, 10), (8, 9), (12, 13)], starts, ends) == [
        *((0, 0), (0, 0), (2, 2), (0, 3)),
    ]
