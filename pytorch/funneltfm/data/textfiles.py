"""Text files record by record: the number of the line a record begins at, and the record, or what is wrong with it.

Lines end at newlines alone, with or without a carriage return; a byte-order mark is dropped; `.gz` is unpacked. Bytes
that are not UTF-8 become lone surrogates (PEP 383), so whoever checks a record can still name its line.
"""

import contextlib
import csv
import gzip
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from funneltfm.errors import InputError, brief
from funneltfm.files import each_key_once

Cells = Mapping[Any, object]  # by the name of the column, or by position in a table without a header
CONLLU = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")  # Universal Dependencies


class BadRow(Exception):
    """A record that cannot be used: what was expected, what came."""

    def __init__(self, expected: str, got: str, row: object) -> None:
        # repr also makes undecodable bytes printable
        super().__init__(f"expected {expected}, got {brief(got)}: {brief(repr(row))}")


def is_number(text: str) -> bool:
    """Whether a text is a finite number as files write it; float also takes 1_000 and digits of other scripts."""
    number = re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text)
    return number is not None and math.isfinite(float(text))


def open_text(path: Path) -> Any:
    packed = path.suffix.lower() == ".gz"
    opened: Any = gzip.open if packed else open
    return opened(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="\n")


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Every line, without its end."""
    with open_text(path) as stream:
        for line, text in enumerate(stream, 1):
            yield line, text.removesuffix("\n").removesuffix("\r")


def filled_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank."""
    return ((line, text) for line, text in text_lines(path) if text.strip())


def documents(path: Path) -> Iterator[tuple[int, str]]:
    """The runs of lines between blank ones: a document's lines, without blanks at their ends, and the number of its
    first.
    """
    start, lines = 0, list[str]()
    for line, text in _with_end(text_lines(path)):
        if text.strip():
            start = start if lines else line
            lines.append(text.strip())
        elif lines:
            yield start, "\n".join(lines)
            lines = []


# ---- tables


def tsv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Tab-separated without quoting: quotes are text."""
    return ((line, text.split("\t") if text else []) for line, text in text_lines(path))


def csv_rows(path: Path) -> Iterator[tuple[int, list[str] | BadRow]]:
    with open_text(path) as stream, _long_fields():
        reader = csv.reader(stream, strict=True)  # not strict, a lost quote would swallow the rest of the file
        while True:
            line = reader.line_num + 1  # where the record begins: it may span lines
            try:
                yield line, next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                got = f"broken quoting that takes it to line {reader.line_num}"
                yield line, BadRow("a row of comma-separated, quoted columns", got, str(error))


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """csv refuses fields over 131,072 characters; the limit is the process's, so it is put back."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def named_cells(
    path: Path,
    rows: Iterable[tuple[int, list[str] | BadRow]],
    check_header: Callable[[Path, Sequence[str]], None],
    header: Sequence[Any] | None = None,
) -> Iterator[tuple[int, Cells | BadRow]]:
    """Rows to cells by column; blank lines are no rows. header: given for files without one."""
    for line, cells in rows:
        if header is None:
            if isinstance(cells, BadRow):
                raise InputError(f"{path}, line {line}: {cells}. Correct the header.")
            names = [name.strip() for name in cells]
            if any(names):
                check_header(path, names)
                header = names
        elif isinstance(cells, BadRow):
            yield line, cells
        elif len(cells) == len(header):
            yield line, dict(zip(header, cells, strict=True))
        elif cells:
            yield line, BadRow(f"{len(header)} columns", f"{len(cells)}", cells)


def _distinct(path: Path, header: Sequence[str]) -> None:
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise InputError(
            f"{path}: expected columns of different names in the header (line 1), got {twice[0]!r} more than once "
            f"among {brief(repr(header), 1000)}. Correct the header."
        )


# ---- JSON lines


def json_object(text: str, **numbers: Any) -> Cells | BadRow:
    """One line of jsonl. numbers: parse_int, parse_float and parse_constant of json.loads."""
    try:
        cells = json.loads(text, object_pairs_hook=each_key_once, **numbers)
    except (ValueError, RecursionError) as error:
        return BadRow("a JSON object", str(error), text.strip())
    return cells if isinstance(cells, dict) else BadRow("a JSON object", "other JSON", cells)


def _json_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines with an object each; the first of an MRQA file describes the set and is none."""
    for number, (line, text) in enumerate(filled_lines(path)):
        if number == 0 and '"header"' in text:
            first = json_object(text)
            if not isinstance(first, BadRow) and list(first) == ["header"] and isinstance(first["header"], dict):
                continue
        yield line, text


# ---- one line a token


def _sentences(path: Path, conllu: bool = False) -> Iterator[tuple[int, Cells | BadRow]]:
    """A row for each sentence: the columns of its tokens as lists.

    Blank lines and -DOCSTART- lines end a sentence. Columns are separated by tabs where there is one in the line, else
    by blanks; all lines of a file have as many. CoNLL-U alone has comments (#), since "#" is a word elsewhere.
    """
    width = len(CONLLU) if conllu else 0
    start, tokens, bad = 0, list[list[str]](), None
    for line, text in _with_end(text_lines(path)):
        fields = text.split("\t") if "\t" in text else text.split()
        if not text.strip() or fields[0] == "-DOCSTART-":
            if bad or tokens:
                yield bad or (start, _columns(tokens, conllu))
            tokens, bad = [], None
        elif conllu and (text.startswith("#") or re.fullmatch(r"[0-9]+[-.][0-9]+", fields[0])):
            continue  # a comment; a range of words that were one token; a node without a word
        else:
            width = width or len(fields)
            start = start if tokens else line
            tokens.append(fields)
            if len(fields) != width and bad is None:
                expected = f"{width} columns, as in the file's first line" if not conllu else f"{width} columns"
                bad = line, BadRow(expected, f"{len(fields)}", text)


def _with_end(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """The lines and one more, blank."""
    yield from lines
    yield 0, ""


def _columns(tokens: list[list[str]], conllu: bool) -> Cells:
    columns = [list(column) for column in zip(*tokens, strict=True)]
    if conllu:
        return {"words": columns[1]} | dict(zip(CONLLU, columns, strict=True))
    named = {f"column_{i}": column for i, column in enumerate(columns)}
    labels = {"labels": columns[-1]} if len(columns) > 1 else {}
    return {"words": columns[0]} | labels | named


# ---- the table


class TextFormat(NamedTuple):
    split: Callable[[Path], Iterator[tuple[int, Any]]]
    """Path -> records as they stand, quick."""
    parse: Callable[[Any], Cells | BadRow] = lambda record: record
    """A record -> a row, where that is work; whoever wants every n-th record does it for those alone."""


CONLL = TextFormat(_sentences)
LINES = TextFormat(filled_lines, lambda text: {"text": text})
DOCUMENTS = TextFormat(documents, lambda text: {"text": text})  # the same files, read otherwise
TEXT_FORMATS: dict[str, TextFormat] = {
    ".jsonl": TextFormat(_json_lines, json_object),
    ".csv": TextFormat(lambda path: named_cells(path, csv_rows(path), _distinct)),
    ".tsv": TextFormat(lambda path: named_cells(path, tsv_rows(path), _distinct)),
    ".txt": LINES,
    ".tokens": LINES,
    ".conllu": TextFormat(lambda path: _sentences(path, conllu=True)),
    **dict.fromkeys((".conll", ".conll.txt", ".iob", ".bio"), CONLL),
}
