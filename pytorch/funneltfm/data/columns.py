"""What rows say: the texts of columns (`a:b`, `*a`, `+a`), and conditions on columns (`label != 2`)."""

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from funneltfm.data.sources import Numbered, Row, Rows, closest
from funneltfm.data.textfiles import BadRow, is_number
from funneltfm.errors import InputError, brief


def texts_of(row: Row, columns: Sequence[str], where: str) -> list[str]:
    """The texts that columns name, in their order.

    `a` is the text of column a (a number counts as its digits), `a:b` the texts of a and b joined by a blank, `+a` a
    list of texts joined by blanks, `*a` a list of texts that are texts of their own. where: Rows.where of the row.

    >>> texts_of({"q": "Who?", "t": "A", "s": ["B", "C"]}, ["q", "t:+s", "*s"], "here")
    ['Who?', 'A B C', 'B', 'C']
    """
    texts: list[str] = []
    for written in columns:
        try:
            if written.startswith("*"):
                texts += _list(row, written[1:])
            elif ":" in written or written.startswith("+"):
                texts.append(" ".join(_joined(row, part) for part in written.split(":")))
            else:
                value = _cell(row, written)
                number = isinstance(value, int | float) and not isinstance(value, bool)
                texts.append(_text(str(value) if number else value, f"a text in column {written!r}"))
        except BadRow as error:
            raise InputError(
                f"{where}: {error} (column {written!r}). Correct the row, or the column: a (a text), a:b (two joined), "
                f"+a (a list joined), *a (a list)."
            ) from None
    return texts


def _joined(row: Row, part: str) -> str:
    if part.startswith("+"):
        return " ".join(_list(row, part[1:]))
    return _text(_cell(row, part), f"a text in column {part!r}")


def _list(row: Row, name: str) -> list[str]:
    value = _cell(row, name)
    if not isinstance(value, list):
        raise BadRow(f"a list of texts in column {name!r}", _kind(value), value)
    return [_text(item, f"texts alone in the list of column {name!r}") for item in value]


def _cell(row: Row, name: str) -> object:
    if not name:
        raise BadRow("the name of a column", "an empty name", list(row))
    if name not in row:
        raise BadRow(f"a column {name!r}", f"none.{closest(name, row)} The row's columns", list(row))
    return row[name]


def _text(value: object, expected: str) -> str:
    if not isinstance(value, str):
        raise BadRow(expected, _kind(value), value)
    return value


def _kind(value: object) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


# ---- conditions


_ORDERS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_CONDITION = re.compile(
    r"\s*(?P<length>len\()?(?P<column>\S.*?)(?(length)\))\s*(?P<sign>==|!=|<=|>=|<|>|~)\s*(?P<value>.+?)\s*", re.DOTALL
)


def filtered(rows: Rows, conditions: Sequence[str]) -> Rows:
    """The rows for which all conditions hold; each is tried on the rows that the earlier ones left.

    A condition is `COLUMN SIGN VALUE` with a sign of == != < <= > >=, or `COLUMN ~ REGEX` (found anywhere in the text);
    `len(COLUMN)` counts the characters of a text or the items of a list. Where both sides are numbers (a text of digits
    is one) they are compared as numbers, else as text. `null` is what is missing: it equals itself alone, and is never
    smaller or greater. A value in quotes is text as it stands: `id == "007"`, `label != ""`, `name != "null"`.
    """
    for text in conditions:
        condition = _Condition.read(text, rows.columns, rows.name)
        indices = [i for i, row in enumerate(rows) if condition.holds(row, partial(rows.where, i))]
        if not indices:
            raise InputError(f"expected rows of {rows.name} with {text}, but there are none among {len(rows)}.")
        rows = rows.select(np.array(indices))
    return rows


def passed(rows: Iterable[Numbered], conditions: Sequence[str], sources: Sequence[str]) -> Iterator[Numbered]:
    """The rows of a stream, each with its number, for which all conditions hold, as in `filtered`. The columns are
    those of the first row.
    """
    name = " + ".join(sources)
    read: list[_Condition] = []
    seen = kept = 0
    for number, row in rows:
        seen += 1
        read = read or [_Condition.read(text, tuple(row), name) for text in conditions]
        if all(condition.holds(row, partial(_where, number, sources)) for condition in read):
            kept += 1
            yield number, row
    if seen and not kept:
        raise InputError(
            f"expected rows of {name} with {', '.join(conditions)}, but there are none among {seen}. Of a stream each "
            f"process and worker needs some: take fewer, or weaker conditions."
        )


def _where(number: int, sources: Sequence[str]) -> str:
    line, which = divmod(number, len(sources))
    return f"{sources[which]}, line or row {line}"


@dataclass(frozen=True)
class _Condition:
    text: str
    length: bool
    column: str
    sign: str
    written: str
    value: int | float | str | re.Pattern[str] | None

    @classmethod
    def read(cls, text: str, columns: Sequence[str], name: str) -> "_Condition":
        match = _CONDITION.fullmatch(text)
        if match is None:
            raise InputError(
                f"expected a condition COLUMN SIGN VALUE with a sign of {' '.join(_ORDERS)} ~ , got {text!r}. Example: "
                f'label != 2; the empty text is "".'
            )
        length, column, sign, written = bool(match["length"]), match["column"], match["sign"], match["value"]
        if column not in columns:
            raise InputError(
                f"expected a column of {name} in the condition {text!r}, got {column!r}."
                f"{closest(column, columns)} There are {brief(', '.join(columns), 1000)}."
            )
        value: int | float | str | re.Pattern[str] | None = None
        if quoted := re.fullmatch(r"(['\"])(.*)\1", written, re.DOTALL):
            value = written = quoted[2]
        elif written != "null":
            value = _number(written)
            value = written if value is None else value
        if sign == "~":
            try:
                value = re.compile(written)
            except re.error as error:
                raise InputError(f"expected a regular expression in {text!r}, got one with: {error}.") from None
        if length and not isinstance(value, int | float):
            raise InputError(f"expected a number beside len({column}), got {text!r}.")
        return cls(text, length, column, sign, written, value)

    def holds(self, row: Row, where: Callable[[], str]) -> bool:
        """Whether the row is as the condition says. where: says where it stands, for messages."""
        cell = row.get(self.column)
        if cell is None or self.value is None:
            same = cell is None and self.value is None
            return {"==": same, "!=": not same}.get(self.sign, False)
        try:
            return self._compare(cell)
        except BadRow as error:
            raise InputError(
                f"{where()}: {error} (condition {self.text}). Correct the row, or put a condition before this "
                f"one that leaves such rows out."
            ) from None

    def _compare(self, cell: object) -> bool:
        if self.length:
            if not isinstance(cell, str | list):
                raise BadRow(f"a text or a list in column {self.column!r}", _kind(cell), cell)
            cell = len(cell)
        if isinstance(self.value, re.Pattern):
            return self.value.search(_text(cell, f"a text in column {self.column!r}")) is not None
        if isinstance(cell, bool):
            cell = str(cell).lower() if self.written != str(cell) else self.written  # true, as JSON has it, or True
        if not isinstance(cell, str | int | float):
            raise BadRow(f"a text or a number in column {self.column!r}", _kind(cell), cell)
        order = _ORDERS[self.sign]
        number = _number(cell) if isinstance(cell, str) else cell
        if number is not None and not isinstance(self.value, str):
            return order(number, self.value)
        if self.sign in ("==", "!="):
            return order(str(cell), self.written)
        if not isinstance(cell, str) or not isinstance(self.value, str):
            raise BadRow(f"a number on both sides of {self.sign}", repr(self.written), cell)
        return order(cell, self.value)


def _number(text: str) -> int | float | None:
    """The number that a text is; whole ones exactly, however long."""
    if not is_number(text):
        return None
    return int(text) if re.fullmatch("[+-]?[0-9]+", text) else float(text)
