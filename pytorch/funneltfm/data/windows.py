"""Long texts in windows that overlap (Devlin et al. 2019 read SQuAD so)."""

import itertools
from collections.abc import Sequence

import numpy as np

from funneltfm.errors import InputError


def split_windows(n: int, room: int, overlap: int, where: str) -> list[tuple[int, int]]:
    """Windows of at most `room` tokens, from and to, over a text of n; neighbours share `overlap` tokens.

    >>> split_windows(10, 5, 2, "here"), split_windows(0, 5, 2, "here")
    ([(0, 5), (3, 8), (6, 10)], [(0, 0)])
    """
    if room < 1 or (n > room and overlap >= room):
        raise InputError(
            f"{where}: beside the question there is room for {max(0, room)} tokens of the context, which has {n}; its "
            f"windows need more than the {overlap} that they share. Raise --max_sequence_length, or lower --doc_stride "
            f"or --max_query_length."
        )
    count = 1 if n <= room else 1 + -(-(n - room) // (room - overlap))
    return [(i * (room - overlap), min(n, i * (room - overlap) + room)) for i in range(count)]


def most_context(n: int, windows: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """For each window the tokens, from and to, that have more context in it than in the others: the smaller of what
    is on their left and right, and a thousandth of the window's length; the first of equals.

    >>> most_context(10, [(0, 5), (3, 8), (6, 10)])
    [(0, 4), (4, 7), (7, 10)]
    """
    if len(windows) == 1:
        return [(0, n)]
    first, last = np.array(windows).T[:, :, None]
    place = np.arange(n)
    scores = np.minimum(place - first, last - 1 - place) + 0.001 * (last - first)
    owner = np.where((place >= first) & (place < last), scores, -np.inf).argmax(axis=0)  # never decreases
    bounds = np.searchsorted(owner, np.arange(len(windows) + 1)).tolist()
    return list(itertools.pairwise(bounds))


def token_spans(spans: Sequence[tuple[int, int]], starts: np.ndarray, ends: np.ndarray) -> list[tuple[int, int]]:
    """The tokens, first and last, that hold spans of characters; spans that no token holds are left out.

    starts, ends: (T,), the characters of each token.
    """
    found = []
    for start, end in spans:
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(starts, end, side="left")) - 1
        if first <= last:
            found.append((first, last))
    return found
