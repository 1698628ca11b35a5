"""Questions about a text, out of rows in the forms in which question answering data come."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from funneltfm.errors import InputError, brief


@dataclass(frozen=True)
class Question:
    """One question. Places are characters of the context, the end exclusive."""

    id: str
    text: str
    context: str
    answers: tuple[str, ...] | None
    """Right answers, any of which will do; none at all says that the context has no answer. None: not known."""
    spans: tuple[tuple[int, int], ...]
    """Where the answers are; one may be in several places."""


@dataclass(frozen=True)
class QuestionColumns:
    """Columns of rows with one question each. `labels` None: "labels", where there is such a column."""

    question: str = "question"
    context: str = "context"
    answers: str = "answers"
    labels: str | None = None


def entries_of(row: Mapping[str, Any], columns: QuestionColumns, where: str) -> list[dict[str, Any]]:
    """The questions of a row, each a dict of its own with the columns' default names, not read any further.

    A row is an article of SQuAD ("paragraphs", each with "context" and "qas"), a context of MRQA or a paragraph
    ("context" and "qas"), or one question. where: the data and the row, for messages.
    """
    if "paragraphs" in row:
        paragraphs = _dicts(row["paragraphs"], f"{where}, paragraphs")
        return [entry for i, one in enumerate(paragraphs) for entry in _entries(one, f"{where}, paragraph {i + 1}")]
    if "qas" in row:
        return _entries(row, where)
    entry = dict(row)
    for name in ("question", "context", "answers", "labels"):
        column = getattr(columns, name) or "labels"
        entry.pop(name, None)
        if column in row:
            entry[name] = row[column]
        elif name in ("question", "context"):
            raise InputError(
                f"{where}: no column {column!r}; it has {brief(', '.join(map(str, row)))}. Name it with "
                f"--{'query' if name == 'question' else name}_column."
            )
    if columns.labels is not None and entry.get("labels") is None and entry.get("answers") is not None:
        raise InputError(f"{where}: there are answers, but no column {columns.labels!r} (--label_column).")
    return [entry]


def _entries(paragraph: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    if "context" not in paragraph or "qas" not in paragraph:
        raise InputError(f"{where}: expected context and qas; got {brief(', '.join(map(str, paragraph)))}.")
    return [{**qa, "context": paragraph["context"]} for qa in _dicts(paragraph["qas"], f"{where}, qas")]


def question_of(entry: Mapping[str, Any], where: str, number: str) -> Question:
    """Read an entry. number: its id, where it has none of its own ("id" or "qid").

    Answers are SQuAD's (`answers`: a list of {"text", "answer_start"}, or {"text": [...], "answer_start": [...]};
    `is_impossible`), MRQA's (`answers`: texts; `detected_answers` with "char_spans" [start, end]), or texts with their
    places beside them (`labels`: a list of {"start": [...], "end": [...]}). The ends of the last two are inclusive.
    Raises InputError for what is none of that, and for answers that are not where they should be.
    """
    own = next((entry[name] for name in ("id", "qid") if entry.get(name) is not None), number)
    where = f"{where}, question {own}"
    text, context = (_text(entry.get(name), f"{where}, {name}") for name in ("question", "context"))
    impossible = bool(entry.get("is_impossible"))
    if entry.get("detected_answers") is not None:
        answers, spans = _detected(entry, context, where)
    elif entry.get("labels") is not None:
        answers, spans = _strings(entry.get("answers"), where), _spans(entry["labels"], context, where)
    elif entry.get("answers") is not None:
        answers, spans = _squad(entry["answers"], context, where)
    elif impossible:
        answers, spans = [], []
    else:
        return Question(str(own), text.strip(), context, None, ())
    if impossible and answers:
        raise InputError(f"{where}: is_impossible is true, but there are answers: {brief(repr(answers))}.")
    if entry.get("is_impossible") is False and not answers:
        raise InputError(f"{where}: is_impossible is false, but there are no answers.")
    if bool(answers) != bool(spans):
        raise InputError(f"{where}: {len(answers)} answers, but {len(spans)} places in the context.")
    return Question(str(own), text.strip(), context, tuple(answers), tuple(spans))


def _squad(value: Any, context: str, where: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Answers with their first character."""
    if isinstance(value, Mapping):
        texts, starts = (_list(value.get(name)) for name in ("text", "answer_start"))
        if len(texts) != len(starts):
            raise InputError(f"{where}: {len(texts)} answers, but {len(starts)} answer_start.")
    else:
        value = _list(value)
        if any(isinstance(one, str) for one in value):
            raise InputError(
                f"{where}: answers are texts alone, without their places in the context. Expected text and "
                f"answer_start of each, or a column with places: --label_column."
            )
        texts, starts = ([one.get(name) for one in _dicts(value, where)] for name in ("text", "answer_start"))
    spans = []
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not _is_place(start):
            raise InputError(f"{where}: an answer needs text and answer_start; got {brief(repr((text, start)))}.")
        there = context[start : start + len(text)]
        if not text or start < 0 or there != text:
            raise InputError(
                f"{where}: the answer {brief(repr(text))} is not at answer_start {start} of the context; there is "
                f"{brief(repr(there))}. Correct it, or leave such questions out with --bad_rows skip."
            )
        spans.append((int(start), int(start) + len(text)))
    return texts, spans


def _detected(entry: Mapping[str, Any], context: str, where: str) -> tuple[list[str], list[tuple[int, int]]]:
    """MRQA's: found in the context, while `answers` are what the question's writer gave."""
    detected = entry["detected_answers"]
    if isinstance(detected, Mapping):  # a column of lists
        texts, places = _list(detected.get("text")), _list(detected.get("char_spans"))
    else:
        found = _dicts(detected, where)
        texts, places = [one.get("text") for one in found], [one.get("char_spans") for one in found]
    given = entry.get("answers")
    return _strings(texts if given is None else given, where), _spans(places, context, where)


def _spans(value: Any, context: str, where: str) -> list[tuple[int, int]]:
    """The places of each answer, {"start": [...], "end": [...]} or [[start, end], ...] with inclusive ends."""
    spans: list[tuple[int, int]] = []
    for places in _list(value):
        if isinstance(places, Mapping):
            starts, ends = (_list(places.get(name)) for name in ("start", "end"))
            pairs: list[Any] = list(zip(starts, ends, strict=True)) if len(starts) == len(ends) else [(starts, ends)]
        else:
            pairs = [tuple(_list(pair)) for pair in _list(places)]
        for pair in pairs:
            if len(pair) != 2 or not all(map(_is_place, pair)) or not 0 <= pair[0] <= pair[1] < len(context):
                raise InputError(
                    f"{where}: an answer's place must be its first and its last character, in a context of "
                    f"{len(context)}; got {brief(repr(pair))}. Correct it, or give --bad_rows skip."
                )
            spans.append((int(pair[0]), int(pair[1]) + 1))
    return spans


def _strings(value: Any, where: str) -> list[str]:
    values = _list(value)
    for one in values:
        if not isinstance(one, str):
            raise InputError(f"{where}: answers must be texts; got {brief(repr(one))}.")
    return values


def _list(value: Any) -> list[Any]:
    """A list of what is one, of one thing, or of nothing."""
    if value is None:
        return []
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str | Mapping) else [value]


def _dicts(value: Any, where: str) -> list[Mapping[str, Any]]:
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise InputError(f"{where}: expected a list; got {brief(repr(value))}.")
    values = list(value)
    for one in values:
        if not isinstance(one, Mapping):
            raise InputError(f"{where}: expected a list of objects; got {brief(repr(one))} in it.")
    return values


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: expected a text; got {brief(repr(value))}.")
    return value


def _is_place(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)
