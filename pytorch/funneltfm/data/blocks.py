"""Texts without labels to examples, for pretraining: packed into blocks, or in two segments.

    rows of texts -> sentences -> tokenized (by several processes) -> packed or paired -> examples

A row is a document and its lines are sentences; `open_rows(..., documents=True)` reads such rows from text files.
"""

import multiprocessing
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from funneltfm.data.features import Example
from funneltfm.data.text import NO_WORD, Pieces, Text, TextEncoder
from funneltfm.errors import InputError

Texts = Sequence[Text]  # of a row
_CHARACTERS = 2**18  # of text that go through the tokenizer together


def sentences(texts: Texts) -> list[str]:
    """The lines of a document's texts. All but the first begin with a blank: tokenised one by one they give the tokens
    of the sentences joined with blanks, whether or not the tokenizer looks at the blank before a word.

    >>> sentences(["One. \\n\\nTwo.", "Three."])
    ['One.', ' Two.', ' Three.']
    """
    lines = [line.strip() for text in texts for line in str(text).split("\n")]
    return [f" {line}" if i else line for i, line in enumerate(filter(None, lines))]


# ---- tokens


def tokenized(rows: Iterable[Texts], text: TextEncoder, workers: int = 0) -> Iterator[list[Pieces]]:
    """The pieces (without offsets) of the texts of every row, in order. workers: processes that make them, beside this
    one; 0 has none. Few rows at a time are in memory.
    """
    if workers == 0:
        for chunk in _chunks(rows):
            yield from _pieces(text, chunk)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (text,))
    try:
        waiting: deque[Future[list[list[Pieces]]]] = deque()
        for chunk in _chunks(rows):
            waiting.append(pool.submit(_of_worker, chunk))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise InputError(
            "the processes that tokenise (prepare_data_workers) have died: of lack of memory, or, in a script of your "
            'own, of a missing `if __name__ == "__main__":` before its work. 0 tokenises in the main process.'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(rows: Iterable[Texts]) -> Iterator[list[Texts]]:
    chunk: list[Texts] = []
    size = 0
    for texts in rows:
        chunk.append(texts)
        size += sum(map(len, texts)) + 1
        if size >= _CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _pieces(text: TextEncoder, rows: list[Texts]) -> list[list[Pieces]]:
    pieces = (Pieces(found.ids, found.word_ids, []) for found in text.pieces([one for texts in rows for one in texts]))
    return [[next(pieces) for _ in texts] for texts in rows]


_worker: list[TextEncoder] = []  # in a process that tokenises, its tokenizer


def _start_worker(text: TextEncoder) -> None:
    _worker.append(text)


def _of_worker(rows: list[Texts]) -> list[list[Pieces]]:
    return _pieces(_worker[0], rows)


# ---- examples


def packed(documents: Iterable[list[Pieces]], text: TextEncoder, across: bool = False) -> Iterator[Example]:
    """Blocks of text.max_length tokens, special ones around: the sentences of a document one after another, cut where
    a block is full. No token is lost, and none comes twice.

    A document's last block is shorter. With across, blocks go on from one document to the next, the separator between
    them, and the last of all is shorter. "row": the document of a block's first token.
    """
    room, separator = text.room(1), text.layout.suffix_alone[:1]
    ids: list[int] = []
    words: list[int] = []
    starts: list[tuple[int, int]] = []  # in ids, the place where a document begins, and its row
    first_word = 0
    for row, document in enumerate(documents):
        if not any(sentence.ids for sentence in document):
            continue
        if ids:
            ids += separator
            words += [NO_WORD] * len(separator)
        starts.append((len(ids), row))
        of_document, first_word = _counted(document, first_word)
        ids += [i for sentence in document for i in sentence.ids]
        words += [word for sentence in of_document for word in sentence]
        end = len(ids) - len(ids) % room if across else len(ids)
        yield from _blocks(ids[:end], words[:end], starts, room, text)
        ids, words = ids[end:], words[end:]
        starts = [(max(0, start - end), row) for start, row in starts[_owner(starts, end) :]] if ids else []
    yield from _blocks(ids, words, starts, room, text)


def _blocks(
    ids: list[int], words: list[int], starts: list[tuple[int, int]], room: int, text: TextEncoder
) -> Iterator[Example]:
    for i in range(0, len(ids), room):
        block = text.example([ids[i : i + room]], _from_zero([words[i : i + room]]))
        yield block | {"row": starts[_owner(starts, i)][1]}


def _owner(starts: list[tuple[int, int]], place: int) -> int:
    """Which of the documents a token belongs to; a separator belongs to the one before it."""
    return bisect_right(starts, place, key=lambda start: start[0]) - 1


def paired(documents: Iterable[list[Pieces]], text: TextEncoder, short: float = 0.0) -> Iterator[Example]:
    """Two segments A and B of one document, B the continuation of A, with the token types of a pair (the examples of
    ELECTRA and BERT; `swapped` turns one round).

    As many whole sentences as fit make an example; A are those up to the border that is nearest to its middle. A
    sentence that does not fit alone is cut into several; one that is left alone has a segment for itself. No token is
    lost, and none comes twice. "first_length": tokens of A, 0 where there is no B.

    short: the share of examples that end early, after two sentences or more, at a length drawn uniformly (Devlin et al.
    2019, appendix A.2). The draws depend on the document's tokens alone.
    """
    room = text.room(2)
    for row, document in enumerate(documents):
        for run in _runs(document, room, short):
            words, _ = _counted(run, 0)
            cut = _middle([len(sentence.ids) for sentence in run])
            halves = [slice(0, cut), slice(cut, None)] if cut else [slice(None)]
            ids = [[i for sentence in run[half] for i in sentence.ids] for half in halves]
            of_words = [[word for sentence in words[half] for word in sentence] for half in halves]
            yield text.example(ids, of_words) | {"row": row, "first_length": len(ids[0]) if cut else 0}


def swapped(example: Example, text: TextEncoder) -> Example:
    """A pair of `paired` with B before A; the token types are those of the places."""
    layout, first = text.layout, int(example["first_length"])
    a = slice(len(layout.prefix), len(layout.prefix) + first)
    b = slice(a.stop + len(layout.between), len(example["input_ids"]) - len(layout.suffix))
    ids, words = example["input_ids"], example["word_ids"]
    turned = text.example([list(ids[b]), list(ids[a])], [list(words[b]), list(words[a])])
    arrays = {name: np.asarray(values, ids.dtype) for name, values in turned.items()}
    return example | arrays | {"first_length": b.stop - b.start}


def _runs(document: list[Pieces], room: int, short: float) -> Iterator[list[Pieces]]:
    """Sentences one after another that have at most `room` tokens together; `short` of the runs are shorter."""
    rng = np.random.default_rng([i for sentence in document for i in sentence.ids] if short else 0)

    def wanted() -> int:
        return int(rng.integers(2, room + 1)) if short and rng.random() < short else room

    run: list[Pieces] = []
    size, enough = 0, wanted()
    for sentence in document:
        for start in range(0, len(sentence.ids), room):
            part = sentence[start : start + room]
            if run and (size + len(part.ids) > room or (size >= enough and len(run) > 1)):
                yield run
                run, size, enough = [], 0, wanted()
            run.append(part)
            size += len(part.ids)
    if run:
        yield run


def _middle(lengths: Sequence[int]) -> int:
    """After how many of these the half of their sum is nearest, at least one on each side; 0 where there is one only.

    >>> _middle([5, 1, 1]), _middle([1, 1, 5]), _middle([7])
    (1, 2, 0)
    """
    borders = range(1, len(lengths))
    return min(borders, key=lambda border: abs(2 * sum(lengths[:border]) - sum(lengths)), default=0)


def _counted(document: list[Pieces], first: int) -> tuple[list[list[int]], int]:
    """The word ids of sentences, which go on counting from `first`, and the number after the last."""
    counted = []
    for sentence in document:
        counted.append([word if word == NO_WORD else word + first for word in sentence.word_ids])
        first += max(sentence.word_ids, default=NO_WORD) + 1
    return counted, first


def _from_zero(words: list[list[int]]) -> list[list[int]]:
    base = min((word for part in words for word in part if word != NO_WORD), default=0)
    return [[word if word == NO_WORD else word - base for word in part] for part in words]
