"""Rows that are candidates of queries: which belong together, which are right, how well they are ranked."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from funneltfm.data.features import Example, Features
from funneltfm.data.sources import place
from funneltfm.errors import InputError, brief
from funneltfm.ranking import ranking_scores
from funneltfm.tasks.base import Row

_TRUTH = {1: 1, 0: 0, "1": 1, "0": 0}  # True == 1 == 1.0


def right_label(row: Row, column: str, where: str) -> int | None:
    """1 for a right candidate, 0 for a wrong one, None where the row has no label."""
    value = row.get(column)
    if value is None:
        return None
    if isinstance(value, bool | int | float | str) and value in _TRUTH:
        return _TRUTH[value]
    raise InputError(f"{where}: {column} must be 1 for a right candidate or 0 for a wrong one; got {value!r}.")


def right_labels(rows: Sequence[Row], column: str, where: str) -> np.ndarray | None:
    """(N,) int64 of 0 and 1; None where no row has a label."""
    labels = [right_label(row, column, place(rows, i, where)) for i, row in enumerate(rows)]
    known = [label for label in labels if label is not None]
    if known and len(known) < len(labels):
        raise InputError(f"{place(rows, labels.index(None), where)}: no {column}, but other rows have one.")
    return np.array(known) if known else None


def query_numbers(rows: Sequence[Row], first_texts: Sequence[Any], column: str | None, where: str) -> np.ndarray:
    """(N,): which query each row belongs to, numbered from 0 as they appear. Rows with equal values of the column are
    one query; without a column, those with equal first texts.
    """
    numbers: dict[Any, int] = {}
    found = np.empty(len(rows), np.int64)
    for i, (row, text) in enumerate(zip(rows, first_texts, strict=True)):
        key = text if column is None else row.get(column)
        if key is None or isinstance(key, list | dict):
            raise InputError(
                f"{place(rows, i, where)}: {column} must name the query of the row, by a text or a number; got "
                f"{brief(repr(key))}. Name its column with --index_column, or leave the flag out: then rows with equal "
                f"queries belong together."
            )
        found[i] = numbers.setdefault(key, len(numbers))
    return found


def mark_answerable(examples: list[Example], queries: Sequence[int], right: Sequence[bool]) -> None:
    """Give every example "answerable": whether some example of its query has something right."""
    some = {query for query, good in zip(queries, right, strict=True) if good}
    for example, query in zip(examples, queries, strict=True):
        example["answerable"] = query in some


def check_answerable(features: Features, rows: Sequence[Row], action: str) -> None:
    """What --metrics_empty_target_action=error asks for: an InputError for a query without a right candidate."""
    answerable = features.plain["answerable"]
    if action == "error" and not answerable.all():
        row = int(features.plain["row"][int(np.argmin(answerable))])
        raise InputError(
            f"{place(rows, row, 'the data')}: its query has no right candidate. Give "
            f"--metrics_empty_target_action skip, neg or pos, or take such queries out."
        )


def ranked(
    names: Sequence[str], scores: np.ndarray, right: np.ndarray, queries: np.ndarray, action: str
) -> dict[str, float]:
    """`ranking_scores` of candidates whose queries `check_answerable` has looked at: a part of the data may well have
    a query's wrong candidates alone.
    """
    return ranking_scores(names, scores, right, queries, "skip" if action == "error" else action)  # type: ignore[arg-type]
