"""Bad inputs of eight kinds: each is refused with a clear error or gives the right result (one page: eight oracles).

    python tests/faults/test_bad_inputs.py --count 10000 --seed 1

prints what became of each kind. The smallest input that goes wrong is written to a file, which --replay runs again.
"""

import argparse
import ast
import contextlib
import functools
import io
import json
import logging
import math
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import types
import typing
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import funneltfm
from funneltfm.cli.flags import BadFlag, FlagParser
from funneltfm.cli.main import main
from funneltfm.data.encoding import EncodingConfig, encode_examples
from funneltfm.data.readers import Example, custom_dataset, get_dataset, read_split
from funneltfm.data.tokenization import get_tokenizer
from funneltfm.errors import InputError
from funneltfm.funnel.checkpoints import load_checkpoint, save_checkpoint
from funneltfm.funnel.config import ModelConfig, canonical_length
from funneltfm.funnel.formats import Options as FormatOptions
from funneltfm.funnel.formats import convert_checkpoint, read_pt
from funneltfm.funnel.model import FunnelTFM
from funneltfm.tasks.flags import TASKS
from funneltfm.training import train as train_module
from funneltfm.training.config import choices, flag_fields, item_type, make_args
from funneltfm.training.setup import with_run_flags
from funneltfm.training.train_config import ELSEWHERE, TRAIN_GROUPS, make_train_args

PACKAGE = Path(funneltfm.__file__).parent
CPU_SECONDS = 20  # no input may take longer


# ---- how inputs are spoilt

LONG = b"x" * 140_000  # more than csv takes by itself
TOKENS = (
    *(b'"', b'""', b'"""', b"\0", b"\r", b"\r\n", b"\n", b"\n\n", b"\t", b",", b", ", b" ", b"\\", b"\\n", b"'", b"-1"),
    *(b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\xe2\x80\xa9", b"\x1c"),
    *(b"nan", b"inf", b"-Infinity", b"1e999", b"1_0", b"4.2", b"true", b"null", b"unknown", b"0", b"9" * 5000, LONG),
    *(b"{", b"}", b"[", b":", b"[" * 5000, b'{"a":' * 5000, b"[" * 20 + b"]" * 20, b"[1, 2]", b'{"text": 1}', b"NaN"),
    *(b"\\ud800", b"\\ud83d\\ude00", b"\\u0000", b'"text_a": "again", ', b'"label": "1", ', b'"id": "7", ', b"1.50"),
    *("\u0661".encode(), "caf\u00e9".encode(), b"#", b"!!python/object:os.system", b"&a [*a]", b"*a", b'"\\UFFFFFFFF"'),
)  # fmt: skip
LINE_ENDS = (b"\r\n", b"\r", b"\xe2\x80\xa8", b"\n\n", b"", b"\t\n", b"\0\n", b" \n")
EDITS = ("insert", "replace", "delete", "cut", "behead", "flip", "cell", "line", "drop line", "repeat line", "ends")
EDITS += ("drop column", "repeat column")

edits = st.lists(
    st.tuples(st.sampled_from(EDITS), st.integers(0, 1 << 20), st.sampled_from(TOKENS) | st.binary(max_size=6)),
    min_size=1,
    max_size=4,
)


def edited(data: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    for what, number, token in changes:
        data = _edited(data, what, number, token)
    return data


def _edited(data: bytes, what: str, number: int, token: bytes) -> bytes:
    at = number % (len(data) + 1)
    if what in ("insert", "replace", "delete"):
        taken = {"insert": 0, "replace": len(token), "delete": 1 + number % 7}[what]
        return data[:at] + (b"" if what == "delete" else token) + data[at + taken :]
    if what == "cut":
        return data[:at]
    if what == "behead":
        return data[at:]
    if what == "flip":
        return data[:at] + bytes(byte ^ (1 << number % 8) for byte in data[at : at + 1]) + data[at + 1 :]
    if what == "ends":
        return data.replace(b"\n", LINE_ENDS[number % len(LINE_ENDS)])
    if what == "cell":
        ends = [match.span() for match in re.finditer(rb'[^\t\n,:"]+', data)]
        start, end = ends[number % len(ends)] if ends else (0, 0)
        return data[:start] + token + data[end:]
    lines = data.split(b"\n")
    if what.endswith("column"):
        separator = b"\t" if b"\t" in lines[0] else b","
        rows = [line.split(separator) for line in lines]
        i = number % len(rows[0])
        rows = [row[:i] + row[i : i + 1] * (2 if what == "repeat column" else 0) + row[i + 1 :] for row in rows]
        return b"\n".join(separator.join(row) for row in rows)
    i = number % len(lines)
    lines[i : i + 1] = {"line": [token], "drop line": [], "repeat line": [lines[i], lines[i]]}[what]
    return b"\n".join(lines)


def spoilt(data: bytes) -> st.SearchStrategy[bytes]:
    """The data as it is, now and then, or with a few edits."""
    return st.one_of(edits, edits, edits, edits, edits, st.just([])).map(functools.partial(edited, data))


# ---- what may become of an input


class Hang(BaseException):
    """An input took too long. No Exception, so that nothing swallows it."""


@dataclass(frozen=True)
class Kind:
    """One kind of input."""

    name: str
    share: int
    """Of 100 inputs."""
    inputs: st.SearchStrategy
    """Literals: their repr can be read back."""
    check: Callable[[Any, Path], bool]
    """Try an input in an empty folder. True: accepted, and the result is right; False: refused with a clear error."""


def refusal(error: Exception, *names: object) -> str:
    """The message, if it is one that helps: one readable paragraph that names the file."""
    message = str(error)
    assert message.strip(), "refused without a word"
    assert "\n" not in message, f"more than one paragraph: {message[:1000]!r}"
    assert len(message) <= 3000, f"a message of {len(message)} characters: {message[:300]!r}"
    for name in names:
        assert str(name) in message, f"the message does not name {name}: {message!r}"
    return message


def outcome(call: Callable[[], Any], *names: object) -> tuple[bool, Any]:
    """(True, the result), or (False, the message of a clear error); any other exception goes on."""
    try:
        return True, call()
    except (InputError, OSError) as error:
        return False, refusal(error, *names)


def verdict(kind: Kind, value: Any) -> str:
    """ "accepted" or "refused"; an exception for an input that goes wrong."""

    def too_long(*_: object) -> None:
        raise Hang(f"more than {CPU_SECONDS} s of CPU time")

    old = signal.signal(signal.SIGPROF, too_long)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="bad-input-") as folder,
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("error")
            return "accepted" if kind.check(value, Path(folder)) else "refused"
    except Hang as hang:
        raise AssertionError(str(hang)) from hang
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)


# ---- 1. data files


def tabs(*rows: str) -> bytes:
    """`a | b` for a<TAB>b."""
    return "".join(row.replace(" | ", "\t") + "\n" for row in rows).encode()


@dataclass(frozen=True)
class Layout:
    """A small valid file, and what its columns mean (said again here, so that readers can be wrong)."""

    name: str
    split: str
    path: str
    content: bytes
    a: str | int
    b: str | int | None = None
    label: str | int | None = None
    labels: str | None = None
    """The allowed ones, separated by blanks; None for any."""
    width: int = 0
    """Columns of a file without a header."""
    number: bool = False
    optional: bool = False
    title: bool = False
    """One of two texts may be empty."""
    written: dict[str, str] = field(default_factory=dict)
    beside: dict[str, bytes] = field(default_factory=dict)
    ids: bool | None = None

    @property
    def custom(self) -> bool:
        return self.name.startswith("custom")


PAIR = "index | sentence1 | sentence2"
NLI_HEADER = "index | promptID | pairID | genre | s1_parse | s2_parse | sentence1 | sentence2 | label1 | gold_label"
NLI_ROWS = [
    "0 | 1 | 1n | g | p | p | All. | Some. | neutral | neutral",
    "1 | 1 | 1e | g | p | p | Some. | All. | neutral | entailment",
]
MSR = "\ufeffQuality | #1 ID | #2 ID | #1 String | #2 String"
MSR_ROWS = ('1 | 70 | 71 | He said "a. | She did', "0 | 72 | 73 | They | We", "1 | 74 | 75 | I | You")
NLI_LABELS = "contradiction entailment neutral"
YELP = {"\\n": "\n", '\\"': '"'}
GOOD_TRAIN = b"text_a,label\nfine,good\npoor,bad\n"
REVIEWS = b'"1","A title","first, ""quoted"" text"\n"2","","second\ntext"\n1,T,plain\n'
JSON_ROWS = (
    b'{"text_a": "a cat", "text_b": "on a mat", "label": 1, "id": "x7"}\n{"text_a": "caf\\u00e9", "text_b": 1.50, '
    b'"label": "0", "more": [1]}\n{"text_a": "\\ud83d\\ude00 yes", "text_b": true, "label": 1, "index": -0}\n'
)

LAYOUTS = {
    f"{layout.name} {layout.split} {layout.path}": layout
    for layout in (
        Layout("CoLA", "train", "train.tsv", tabs("gj | 1 |  | It's so.", "gj | 0 | * | It so.", "gj | 1 |  | Yes."),
               3, None, 1, "0 1", width=4),
        Layout("CoLA", "test", "test.tsv", tabs("index | sentence", "7 | Bill left.", "9 | He."), "sentence"),
        Layout("SST-2", "train", "train.tsv", tabs("sentence | label", "a joy  | 1", "no \"joy | 0", "x | 1"),
               "sentence", None, "label", "0 1"),
        Layout("MRPC", "valid", "dev.tsv", tabs(MSR, *MSR_ROWS), "#1 String", "#2 String", "Quality", "0 1"),
        Layout("MRPC", "train", "msr_paraphrase_train.txt", tabs(MSR, *MSR_ROWS), "#1 String", "#2 String", "Quality",
               "0 1", ids=False, beside={"dev_ids.tsv": b"72\t73\n"}),
        Layout("MRPC", "valid", "msr_paraphrase_train.txt", tabs(MSR, *MSR_ROWS), "#1 String", "#2 String", "Quality",
               "0 1", ids=True, beside={"dev_ids.tsv": b"72\t73\n74\t75\n"}),
        Layout("QQP", "train", "train.tsv",
               tabs("id | qid1 | qid2 | question1 | question2 | is_duplicate", "9 | 1 | 2 | Why? | How? | 0",
                    "8 | 3 | 4 | Who? | Who? | 1"), "question1", "question2", "is_duplicate", "0 1"),
        Layout("STS-B", "valid", "dev.tsv", tabs(f"{PAIR} | score", "4 | A plane. | A jet. | 4.250", "5 | A | B | 0"),
               "sentence1", "sentence2", "score", number=True),
        Layout("MNLI", "train", "train.tsv", tabs(NLI_HEADER, *NLI_ROWS), "sentence1", "sentence2", "gold_label",
               NLI_LABELS),
        Layout("MNLI", "valid_mm", "dev_mismatched.tsv", tabs(NLI_HEADER, *NLI_ROWS), "sentence1", "sentence2",
               "gold_label", NLI_LABELS),
        Layout("QNLI", "valid", "dev.tsv", tabs("index | question | sentence | label", "2 | Who? | He. | entailment",
                                                "3 | Why? | So. | not_entailment"),
               "question", "sentence", "label", "entailment not_entailment"),
        Layout("RTE", "train", "train.tsv", tabs(f"{PAIR} | label", "2 | A. | B. | entailment",
                                                 "3 | C. | D. | not_entailment"),
               "sentence1", "sentence2", "label", "entailment not_entailment"),
        Layout("WNLI", "train", "train.tsv", tabs(f"{PAIR} | label", "2 | A. | B. | 1", "3 | A. | C. | 0"),
               "sentence1", "sentence2", "label", "0 1"),
        Layout("AX", "test", "diagnostic/diagnostic.tsv", tabs(PAIR, "0 | A. | B.", "1 | C. | D."), "sentence1",
               "sentence2"),
        Layout("AG", "train", "train.csv", REVIEWS, 1, 2, 0, "1 2 3 4", width=3, title=True),
        Layout("DBpedia", "test", "test.csv", REVIEWS, 1, 2, 0, " ".join(map(str, range(1, 15))), width=3, title=True),
        Layout("Amazon-5", "valid", "dev.csv", REVIEWS, 1, 2, 0, "1 2 3 4 5", width=3, title=True,
               written={"\\n": "\n"}),
        Layout("Yelp-2", "train", "train.csv", b'"2","Good.\\n\\nHe said \\""wow\\"", really."\n"1","Bad."\n', 1, None,
               0, "1 2", width=2, written=YELP),
        Layout("IMDB", "train", "train/pos/0_9.txt", b"Great.<br />\nYes.\n", "text", None, "label", "neg pos",
               written={"<br />": "\n"}, beside={"train/neg/3_1.txt": b"Bad."}),
        Layout("custom pair", "train", "train.jsonl", JSON_ROWS, "text_a", "text_b", "label"),
        Layout("custom", "test", "test.jsonl", JSON_ROWS, "text_a", None, "label", "bad good 0 1", optional=True,
               beside={"train.csv": GOOD_TRAIN + b"x,0\ny,1\n"}),
        Layout("custom numbers", "train", "train.jsonl", JSON_ROWS, "text_a", None, "label", number=True),
        Layout("custom", "train", "train.csv", b'text_a,label,idx\n"a, ""b""\nc",1,x\nd,0,\nplain,1,z\n', "text_a",
               None, "label"),
        Layout("custom", "test", "test.csv", b"id,text_a,label\n1,d,good\n2,e,\n3,f,-1\n", "text_a", None, "label",
               "bad good", optional=True, beside={"train.csv": GOOD_TRAIN}),
        Layout("custom pair", "valid", "dev.tsv", tabs("text_b | label | text_a", "A. | good | B.", "C | bad | \"D"),
               "text_a", "text_b", "label", "bad good",
               beside={"train.csv": b"text_a,text_b,label\nfine,x,good\npoor,x,bad\n"}),
        Layout("custom numbers", "train", "train.tsv", tabs("text_a | label", "x | 1.5", "y | -2e3", "z | .5"),
               "text_a", None, "label", number=True),
    )
}  # fmt: skip

data_inputs = st.sampled_from(list(LAYOUTS)).flatmap(
    lambda name: st.tuples(st.just(name), st.sampled_from(["error", "skip"]), spoilt(LAYOUTS[name].content))
)
Row = tuple[str, str, str | None, str | None]


class Broken(Exception):
    """The oracle's word for a row that is no example."""


def lines_of(data: bytes) -> list[bytes]:
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return lines[:-1] if lines[-1] == b"" else lines


def tsv_rows(data: bytes) -> Iterator[tuple[int, list[bytes]]]:
    for number, line in enumerate(lines_of(data), 1):
        line = line.removesuffix(b"\r")
        yield number, line.split(b"\t") if line else []


def csv_rows(data: bytes) -> Iterator[tuple[int, list[bytes] | None]]:
    """RFC 4180, byte by byte. None: broken quoting; reading goes on with the next line."""
    state, row, cell, start = "start", [], bytearray(), 1
    lines = [line + b"\n" for line in lines_of(data)]
    if lines and not data.endswith(b"\n"):
        lines[-1] = lines[-1][:-1]
    for number, line in enumerate(lines, 1):
        if state == "start":
            row, cell, start = [], bytearray(), number
        for byte in line:
            char = chr(byte)
            if state == "quoted":
                if char == '"':
                    state = "closed"
                else:
                    cell.append(byte)
            elif state == "end":
                if char not in "\r\n":
                    state = "broken"
                    break
            elif char in "\r\n":
                if state != "start":
                    row.append(bytes(cell))
                state = "end"
            elif char == ",":
                row.append(bytes(cell))
                cell, state = bytearray(), "cell"
            elif char == '"' and state == "closed":
                cell.append(byte)
                state = "quoted"
            elif char == '"' and state in ("start", "cell"):
                state = "quoted"
            elif state == "closed":
                state = "broken"
                break
            else:
                cell.append(byte)
                state = "plain"
        if state == "broken":
            yield start, None
            state = "start"
        elif state != "quoted":
            if state != "end":  # the last line has no newline
                row.append(bytes(cell))
            yield start, row
            state = "start"
    if state == "quoted":
        yield start, None


def plain(cell: object) -> str:
    """A cell as text."""
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "true" if cell else "false"
    if not isinstance(cell, str):
        raise Broken
    return cell


def cells_of(layout: Layout, data: bytes) -> Iterator[tuple[int, dict[Any, object] | None]]:
    """(line, cells by column; None for a broken row). ValueError where the header is wrong."""
    if layout.path.endswith("jsonl"):
        for number, line in enumerate(lines_of(data), 1):
            text = line.decode("utf-8", "surrogateescape")
            if text.strip():
                yield number, json_cells(text)
        return
    rows = csv_rows(data) if layout.path.endswith("csv") else tsv_rows(data)
    header: list[Any] | None = list(range(layout.width)) if layout.width else None
    for number, row in rows:
        if header is None:
            header = [cell.decode("utf-8", "surrogateescape").strip() for cell in row or []]
            needed = {layout.a, layout.b, None if layout.optional else layout.label} - {None}
            needed |= {"#1 ID", "#2 ID"} if layout.ids is not None else set()
            if any(header.count(name) != 1 for name in needed):
                raise ValueError("columns")
            if any(header.count(name) > 1 for name in (layout.label, "id", "idx", "index")):
                raise ValueError("a column twice")
        elif row is None or (row and len(row) != len(header)):
            yield number, None
        elif row:
            texts = [cell.decode("utf-8", "surrogateescape") for cell in row]
            yield number, dict(zip(header, texts, strict=True))


def json_cells(text: str) -> dict[Any, object] | None:
    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    try:
        cells = json.loads(text, object_pairs_hook=once, parse_int=str, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError):
        return None
    return cells if isinstance(cells, dict) else None


def example_of(layout: Layout, cells: dict[Any, object], number: int) -> Row:
    for cell in cells.values():
        if isinstance(cell, str) and any(char == "\0" or 0xD800 <= ord(char) < 0xE000 for char in cell):
            raise Broken
    wanted = [layout.a, *([] if layout.b is None else [layout.b])]
    needed = wanted + ([] if layout.optional or layout.label is None else [layout.label])
    if any(name not in cells for name in needed):
        raise Broken
    texts = [plain(cells[name]) for name in wanted]
    for written, meant in layout.written.items():
        texts = [text.replace(written, meant) for text in texts]
    empty = sum(not text.strip() for text in texts)
    if empty > (1 if layout.title else 0):
        raise Broken
    label = None if layout.label is None else plain(cells.get(layout.label)).strip()
    allowed = layout.labels.split() if layout.labels else None
    if layout.optional and (label == "" or (label == "-1" and "-1" not in (allowed or ()))):
        label = None
    if label is not None:
        good = bool(label) if allowed is None else label in allowed
        if layout.number:
            form = re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", label)
            good = form is not None and math.isfinite(float(label))
        if not good:
            raise Broken
    name = next((text for column in ("id", "idx", "index") if (text := plain(cells.get(column)))), str(number))
    return name, texts[0], texts[1] if len(texts) > 1 else None, label


def expected_data(layout: Layout, data: bytes) -> tuple[list[Row], list[int]] | None:
    """The right examples and the lines of the broken rows; None where the header is wrong."""
    if layout.name == "IMDB":
        text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape").rstrip("\r\n")
        found: list[tuple[int, dict[Any, object] | None]] = [
            (1, {"id": "neg/3_1", "text": "Bad.", "label": "neg"}),
            (1, {"id": "pos/0_9", "text": text, "label": "pos"}),
        ]
    else:
        try:
            found = list(cells_of(layout, data))
        except ValueError:
            return None
    if layout.ids is not None:
        pairs = [tuple(line.split("\t")) for line in layout.beside["dev_ids.tsv"].decode().split("\n")[:-1]]
        found = [row for row in found if not row[1] or ((row[1]["#1 ID"], row[1]["#2 ID"]) in pairs) == layout.ids]
    rows, bad = [], []
    for number, (line, cells) in enumerate(found):
        try:
            if cells is None:
                raise Broken
            rows.append(example_of(layout, cells, number))
        except Broken:
            bad.append(line)
    return rows, bad


def check_data(value: tuple[str, str, bytes], folder: Path) -> bool:
    name, bad_rows, content = value
    layout = LAYOUTS[name]
    for path, data in {**layout.beside, layout.path: content}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)

    def read() -> Any:
        if not layout.custom:
            return read_split(get_dataset(layout.name), folder, layout.split, bad_rows=bad_rows)
        text_b = "text_b" if layout.b else None
        spec = custom_dataset(folder, "text_a", text_b, "label", regression=layout.number, bad_rows=bad_rows)
        examples = read_split(spec, folder, layout.split, bad_rows=bad_rows)
        if layout.split == "train" and spec.labels is not None:
            assert sorted(spec.labels) == sorted({example.label for example in examples})
        return examples

    accepted, result = outcome(read, folder if layout.name == "IMDB" else folder / layout.path)
    expected = expected_data(layout, content)
    rows, bad = expected or ([], [])
    should = bool(rows) and not (bad and bad_rows == "error")
    assert accepted == should, f"{'accepted' if accepted else 'refused'}, but {expected=}: {result}"
    if accepted:
        assert [(e.id, e.text_a, e.text_b, e.label) for e in result] == rows
    elif bad:
        assert f"line {bad[0]}:" in result, f"expected line {bad[0]} to be named in {result!r}"
    return accepted


# ---- 2. vocabularies

SYMBOLS = ("pad", "unk", "cls", "sep")
VOCABULARY = b"<pad>\n<unk>\n<cls>\n<sep>\n<mask>\nthe\ncat\nsat\n##s\na\nb\n##a\n##b\n##c\n.\n[\n]\n5\n,\n"
SQUARE = VOCABULARY.replace(b"<pad>\n<unk>\n<cls>\n<sep>\n<mask>", b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]")


@functools.cache
def sentence_pieces() -> bytes:
    """A SentencePiece model of single characters and little more."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat in 1990, and 2015, too", "[]<>/,.!'| a b"] * 20),
        model_writer=model,
        user_defined_symbols=["<cls>", "<sep>", "<mask>", "5,"],
        bos_id=-1,
        eos_id=-1,
        pad_id=1,
        vocab_size=60,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return model.getvalue()


vocabulary_inputs = st.sampled_from(["word_piece", "square", "sent_piece"]).flatmap(
    lambda kind: st.tuples(
        st.just("sent_piece" if kind == "sent_piece" else "word_piece"),
        spoilt({"word_piece": VOCABULARY, "square": SQUARE, "sent_piece": sentence_pieces()}[kind]),
    )
)


def check_vocabulary(value: tuple[str, bytes], folder: Path) -> bool:
    kind, content = value
    path = folder / "vocab.txt"
    path.write_bytes(content)
    accepted, result = outcome(lambda: get_tokenizer(kind, path), path)
    if kind == "word_piece":
        pieces = expected_pieces(content)
        assert accepted == (pieces is not None), result
        if pieces is not None:
            assert result.convert_ids_to_pieces(range(result.vocab_size)) == pieces
            for role in SYMBOLS:
                symbol = pieces[getattr(result, f"{role}_id")]
                assert symbol in (f"<{role}>", f"[{role.upper()}]")
            for i, piece in enumerate(pieces):
                if re.fullmatch("[a-z]{1,200}", piece):
                    assert result.convert_text_to_ids(f" {piece} ") == [i]
    if accepted:
        for text in ("The cat sats in 1990, 5, <cls>[MASK]", "\u0e01\U0001f600", "a" * 300, "", "  ", "\u2581a"):
            ids = result.convert_text_to_ids(text)
            assert all(type(i) is int and 0 <= i < result.vocab_size for i in ids)
            assert ids == result.convert_text_to_ids(text)
    return accepted


def expected_pieces(content: bytes) -> list[str] | None:
    try:
        text = content.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError:
        return None
    pieces = [line.strip(" \t\r") for line in (text[:-1] if text.endswith("\n") else text).split("\n")]
    if not all(pieces) or len(set(pieces)) < len(pieces):
        return None
    has_all = all(f"<{role}>" in pieces or f"[{role.upper()}]" in pieces for role in SYMBOLS)
    return pieces if has_all else None


# ---- 3. model configs

DEFAULTS = ModelConfig().to_dict()
CHOICES = {
    "pooling_type": ("mean", "max", "min"),
    "attn_type": ("rel_shift", "factorized"),
    "func_mask": ("separate_cls", "always"),
    "ff_activation": ("gelu", "relu"),
}
SWITCHES = ("pool_q_only", "separate_cls", "truncate_seq")
BLOCKS = (
    "4__4",
    "0",
    "",
    "4_4_4",
    "6_3x2",
    "9999999x99999999",
    "-1",
    "1x0",
    "1x",
    "x2",
    "01",
    "4 4",
    "4_4\n",
    "1" * 5000,
)
BLOCKS += (
    "1" + "_1" * 40,
    "1001",
    "1000",
    "500x2",
    "500x3",
    "1\u0662",
    "_4",
    "4_",
    "1_" * 5000 + "1",
    "3x2x1",
    "2147483648",
)
BAD_VALUES = (
    *("null", "true", "false", "-1", "0", "1", "2", "7", "8", "-0.0", "0.5", "1.0", "1.5", "1e3", "1e-400", "NaN"),
    *("Infinity", "-Infinity", "1" + "0" * 400, "-1" + "0" * 400, "9" * 5000, "2147483647", "2147483648", "[]", "{}"),
    *("[4, 4]", '"8"', '"mean"', '"max"', '"factorized"', '"relu"', '"MEAN"', '"always"', '"\\ud800"', '"true"', '""'),
    *('{"a": 1}', "[" * 5000, '"' + "x" * 20000 + '"', *(json.dumps(text) for text in BLOCKS)),
)
KEYS = (*DEFAULTS, "rel_attn_type", "init", "init_std", "n_heads", "", "D_MODEL", "\\ud800")
TINY = '"vocab_size": 99, "d_embed": 8, "d_model": 8, "n_head": 1, "d_head": 8, "d_inner": 8, "block_size": "1_1"'
PYTHON_VALUES = (
    *(None, True, 0, 1, -1, 8, 10**400, -(10**400), 1.5, math.inf, "8", b"8", "", "4_4", (), [], [4], {}, {"a": 1}),
    *(2**31, 0.0, "mean", "relu", "\ud800", "x" * 20000),
)

GOOD_VALUES = {
    **dict.fromkeys(DEFAULTS, ("2", "4", "8", "64", "2147483647")),
    **{key: tuple(json.dumps(value) for value in values) for key, values in CHOICES.items()},
    **dict.fromkeys(SWITCHES, ("true", "false")),
    **dict.fromkeys(("dropout", "dropatt", "dropact"), ("0", "0.0", "0.5", "1e-3", "9.9e-1", "1e-400", "-0.0")),
    **dict.fromkeys(("block_size", "decoder_size"), ("2", '"3x2"', '"1_1"', "0", '"1000"', '"2_1x3_1"')),
    **dict.fromkeys(("init", "init_std"), ('"normal"', "0.1")),
    "rel_attn_type": ('"factorized"', '"rel_shift"'),
}
good_pairs = st.sampled_from(list(GOOD_VALUES)).flatmap(
    lambda key: st.tuples(st.just(key), st.sampled_from(GOOD_VALUES[key]))
)


def config_text(pairs: list[tuple[str, str]]) -> bytes:
    names = [key for key, _ in pairs]
    own = [pair for pair in TINY.split(", ") if ast.literal_eval(pair.split(":")[0]) not in names]
    return ("{" + ", ".join(own + [f'"{key}": {text}' for key, text in pairs]) + "}").encode()


config_inputs = st.one_of(
    st.tuples(st.just("json"), st.lists(good_pairs, max_size=3).map(config_text)),
    st.tuples(
        st.just("json"),
        st.tuples(st.lists(good_pairs, max_size=2), st.tuples(st.sampled_from(KEYS), st.sampled_from(BAD_VALUES))).map(
            lambda drawn: config_text([*drawn[0], drawn[1]])
        ),
    ),
    st.tuples(
        st.just("json"),
        st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(BAD_VALUES)), max_size=3).map(
            lambda pairs: ("{" + ", ".join([TINY] + [f'"{key}": {text}' for key, text in pairs]) + "}").encode()
        ),
    ),
    st.tuples(st.just("json"), st.tuples(st.sampled_from(KEYS), st.sampled_from(BAD_VALUES)).map(
        lambda pair: f'{{"{pair[0]}": {pair[1]}}}'.encode())),
    st.tuples(st.just("json"), spoilt(("{" + TINY.replace(", ", ",\n") + "}").encode())),
    st.tuples(
        st.just("python"),
        st.dictionaries(st.sampled_from(list(DEFAULTS)), st.sampled_from(PYTHON_VALUES), min_size=1, max_size=3),
    ),
)  # fmt: skip


def fits(key: str, value: object) -> bool:
    """Whether a key of the model may have a value, alone."""
    if key in CHOICES:
        return isinstance(value, str) and value in CHOICES[key]
    if key in SWITCHES:
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    if key in ("block_size", "decoder_size"):
        return isinstance(value, int | str)
    if key.startswith("drop"):
        return isinstance(value, int | float) and 0 <= value < 1
    lowest = {"seg_id_cls": 0, "pad_id": 0, "pooling_size": 2}.get(key, 1)
    return isinstance(value, int) and lowest <= value < 2**31


def layers(size: object) -> list[int] | None:
    """Layers applied in each block; None for a text that is no block size."""
    if not isinstance(size, str):
        size = str(size) if isinstance(size, int) and abs(size) < 10**9 else "?"
    if size in ("", "0"):
        return []
    if not re.fullmatch(r"[1-9][0-9]{0,8}(x[1-9][0-9]{0,8})?(_[1-9][0-9]{0,8}(x[1-9][0-9]{0,8})?)*", size):
        return None
    return [math.prod(int(number) for number in block.split("x")) for block in size.split("_")]


def config_is_good(keys: dict[str, Any]) -> bool:
    if not all(key in DEFAULTS and fits(key, value) for key, value in keys.items()):
        return False
    keys = DEFAULTS | keys
    blocks, decoder = layers(keys["block_size"]), layers(keys["decoder_size"])
    if not blocks or decoder is None or len(decoder) > 1 or sum(blocks) + sum(decoder) > 1000:
        return False
    if keys["pooling_size"] ** (len(blocks) - 1) >= 2**31:
        return False
    return keys["d_model"] % 2 == 0 and keys["pad_id"] < keys["vocab_size"]


def check_config(value: tuple[str, Any], folder: Path) -> bool:
    how, content = value
    path = folder / "net_config.json"
    if how == "python":
        accepted, result = outcome(lambda: ModelConfig(**content))
        keys: dict[str, Any] | None = content
    else:
        path.write_bytes(content)
        accepted, result = outcome(lambda: ModelConfig.init_from_json(path), path)
        try:
            pairs = json.loads(content.decode(), object_pairs_hook=list)
            assert type(pairs) is list
            json.dumps(pairs, ensure_ascii=False).encode()  # half a character is no text
            pairs = [(str(key), value) for key, value in pairs]
            good = content.lstrip()[:1] == b"{" and len({key for key, _ in pairs}) == len(pairs)
            good &= not {"rel_attn_type", "attn_type"} <= {key for key, _ in pairs}
        except (ValueError, TypeError, AssertionError, RecursionError):
            good = False
        names = {"rel_attn_type": "attn_type"}
        keys = {names.get(k, k): v for k, v in pairs if k not in ("init", "init_std", "init_range")} if good else None
    assert accepted == (keys is not None and config_is_good(keys)), result
    if accepted:
        got = result.to_dict()
        for key, default in (DEFAULTS | (keys or {})).items():
            meant = str(default) if key in ("block_size", "decoder_size") else default
            assert got[key] == meant
            assert type(got[key]) is type(DEFAULTS[key])
        result.to_json(folder / "again.json")
        assert ModelConfig.init_from_json(folder / "again.json") == result
        assert canonical_length(35, result) >= 35
    return accepted


# ---- 4. checkpoints


@functools.cache
def tiny_model() -> FunnelTFM:
    torch.manual_seed(0)
    return FunnelTFM(ModelConfig.init_from_json(tiny_config()))


@functools.cache
def workshop() -> Path:
    """A folder for what is made once."""
    folder = tempfile.TemporaryDirectory(prefix="bad-input-made-")
    workshop.folder = folder  # type: ignore[attr-defined]  # it lives as long as the process
    return Path(folder.name)


def tiny_net_config() -> bytes:
    return ("{" + TINY.replace("99", str(len(VOCABULARY.split()))) + "}").encode()


@functools.cache
def tiny_config() -> Path:
    path = workshop() / "net_config.json"
    path.write_bytes(tiny_net_config())
    return path


@functools.cache
def tiny_state(how: str = "zip") -> bytes:
    path = workshop() / "model.pt"
    save_checkpoint(tiny_model(), path)
    if how == "legacy":
        torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    return path.read_bytes()


STATE_EDITS = (
    "drop",
    "rename",
    "shape",
    "nan",
    "inf",
    "extra",
    "module",
    "both",
    "not a tensor",
    "meta",
    "sparse",
    "nothing",
)
DTYPES = ("float64", "float16", "bfloat16", "int64", "uint8", "bool", "complex64", "float8_e4m3fn")
OTHER_FILES = (
    *(
        b"",
        b"PK\x03\x04",
        b"PK\x05\x06" + b"\0" * 18,
        b"\x80\x04N.",
        b"\x80\x02}.",
        b"not a checkpoint",
        b"{}",
        b"\0" * 999,
    ),
    b"cos\nsystem\n(S'true'\ntR.",
)

# A name of 100,000 characters in a pickle takes torch half a minute: it searches its own error message, in square time.
short_edits = edits.map(lambda changes: [(what, number, token[:5000]) for what, number, token in changes])
checkpoint_inputs = st.one_of(
    st.tuples(st.just("bytes"), edits),
    st.tuples(st.just("bytes"), st.integers(0, 1 << 20).map(lambda number: [("flip", number, b"")])),
    st.tuples(st.just("legacy"), short_edits),
    st.tuples(st.just("pickle"), short_edits),
    st.tuples(st.just("file"), st.sampled_from(OTHER_FILES)),
    st.tuples(
        st.just("state"),
        st.lists(
            st.tuples(st.sampled_from(STATE_EDITS + DTYPES), st.integers(0, 999)), min_size=1, max_size=3
        ),
    ),
)  # fmt: skip


def edited_state(changes: list[tuple[str, int]]) -> tuple[dict[Any, Any], bool]:
    """The tiny model's tensors with some changed, and whether they are still the model's."""
    state: dict[Any, Any] = {name: tensor.clone() for name, tensor in tiny_model().state_dict().items()}
    good = True
    for what, number in changes:
        name = sorted(state)[number % len(state)]
        tensor = state[name]
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta or tensor.is_sparse:
            continue
        if what in DTYPES:
            if not tensor.is_floating_point():
                continue
            state[name] = tensor.to(getattr(torch, what))
            good &= what in DTYPES[:3] or what.startswith("float8")
            if state[name].is_floating_point():
                good &= bool(state[name].to(torch.float32).isfinite().all())
        elif what in ("nan", "inf") and tensor.is_floating_point() and "float8" not in str(tensor.dtype):
            tensor.view(-1)[number % tensor.numel()] = float(what)
            good = False
        elif what in ("drop", "rename", "shape", "extra", "both", "not a tensor", "meta", "sparse"):
            good = False
            if what in ("drop", "rename"):
                del state[name]
            changed = {
                "rename": ("new." + name, tensor),
                "shape": (name, tensor.unsqueeze(0)),
                "extra": (f"extra.{number}", tensor),
                "both": (f"module.{name}", torch.zeros_like(tensor)),
                "not a tensor": (name, [1.0, number]),
                "meta": (name, tensor.to("meta")),
                "sparse": (name, tensor.to_sparse() if tensor.dtype == torch.float32 else tensor[None]),
            }
            if what in changed:
                state[changed[what][0]] = changed[what][1]
        elif what == "module":
            state = {name if name.startswith("module.") else f"module.{name}": t for name, t in state.items()}
    return state, good


def checkpoint_bytes(how: str, change: Any, path: Path) -> tuple[dict[str, Any] | None, bool | None]:
    """Write the file. (tensors that it must give where it is accepted, None for whatever; whether it must be.)"""
    own = tiny_model().state_dict()
    if how == "bytes":
        path.write_bytes(edited(tiny_state(), change))
        return own, True if path.read_bytes() == tiny_state() else None
    if how == "legacy":  # no checksums: what is still a checkpoint is accepted
        path.write_bytes(edited(tiny_state("legacy"), change))
        return None, None
    if how == "pickle":  # as a program would write it, so the checksums are right
        with zipfile.ZipFile(io.BytesIO(tiny_state())) as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                content = old.read(name)
                new.writestr(name, edited(content, change) if name.endswith("data.pkl") else content)
        return None, None
    if how == "file":
        path.write_bytes(change)
        return None, False
    state, good = edited_state(change)
    torch.save(state, path)
    tensors = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return tensors if good else None, good


def check_checkpoint(value: tuple[str, Any], folder: Path) -> bool:
    path = folder / "model.pt"
    tensors, should = checkpoint_bytes(*value, path)
    with torch.device("meta"):
        model = FunnelTFM(tiny_model().net_config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(7)
    accepted, result = outcome(lambda: load_checkpoint(model, path), path)
    assert should is None or accepted == should, f"accepted: {accepted}, expected {should}: {result}"
    for name, tensor in model.state_dict().items():
        if not accepted:
            assert bool((tensor == 7).all()), f"{name} was changed by a file that was refused"
        elif tensors is not None:
            assert torch.equal(tensor, tensors[name].to(torch.float32)), f"{name} is not what was saved"
        assert bool(tensor.isfinite().all()), f"{name} holds a value that is no number"
    return accepted


# ---- 5. flags

FIELDS = flag_fields()
VALUES = (
    *("0", "1", "-1", "3", "16", "1e-4", "0.5", "1e-400", "1e999", "nan", "-inf", "1_0", " 7", "+5", "0x10", "1e3"),
    *("9" * 30, "9" * 5000, "\u0661", "true", "False", "YES", "no", "null", "~", "", "word", "a=b", "-", "-x"),
    *("4_4", "4__4", "2_2_2", "mean", "max", "rel_shift", "canonical", "word_piece", "sent_piece", "skip", "O1", "O2"),
    *("caf\u00e9", "\udce9", "#5", "%s", "%(prog)s", "{}", "x" * 5000, "CoLA", "/nowhere/at all", "[1]", "2147483648"),
)  # fmt: skip
BAD_NAMES = (
    "learning_rate",
    "lr_",
    "LR",
    "no_lr",
    "epoch",
    "",
    "-",
    "config_",
    "dropouts",
    "model-dir",
    "seg_id",
    "\u00e9",
)
flag_items = st.one_of(
    st.tuples(st.sampled_from(["equals", "equals", "word"]), st.sampled_from(list(FIELDS)), st.sampled_from(VALUES)),
    st.tuples(st.just("bare"), st.sampled_from([f"{no}{name}" for name in FIELDS for no in ("", "no_")]), st.none()),
    st.tuples(st.just("equals"), st.sampled_from(BAD_NAMES), st.sampled_from(VALUES)),
    st.tuples(st.just("junk"), st.sampled_from(["file", "-x", "-5", "=", "--=1", "-h2", "\udce9"]), st.none()),
)


def likely(name: str) -> tuple[str, ...]:
    """Values of the right form for a flag."""
    kinds = kinds_of(name)
    if kinds == (bool,):
        return ("true", "No")
    if kinds == (int,):
        return ("1", "5", "64", "-1", "99999999999")
    if kinds == (float,):
        return ("0.5", "1e-4", "0", "-1", "3")
    return kinds if all(isinstance(kind, str) for kind in kinds) else ("a", "1_1", "")


def kinds_of(name: str) -> tuple[Any, ...]:
    kinds = typing.get_args(FIELDS[name].type) or (FIELDS[name].type,)
    return tuple(kind for kind in kinds if kind is not type(None))


good_items = st.sampled_from(list(FIELDS)).flatmap(
    lambda name: st.tuples(st.just("equals"), st.just(name), st.sampled_from(likely(name)))
)
NEAR_MISSES = {int: ("1_0", " 7", "\u0661", "1.0", "0x10", "9" * 5000), bool: ("1", "on", "t"), str: ("", " ", "#5")}
NEAR_MISSES[float] = ("1_0", " 7", "\u0661", "nan", "1e999", "inf", "0x1p3", "1e", ".")
NUMBERS = [name for name in FIELDS if kinds_of(name)[0] in (int, float)]
wrong_items = st.sampled_from([*FIELDS, *NUMBERS, *NUMBERS]).flatmap(
    lambda name: st.tuples(
        st.just("equals"), st.just(name), st.sampled_from(NEAR_MISSES.get(kinds_of(name)[0], ("", "MEAN", "0")))
    )
)
yaml_items = st.lists(st.one_of(good_items, good_items, wrong_items, flag_items), max_size=4)
PLACES = ("NOWHERE", "FOLDER", "FILE", "PT", "RUN", "DST", "", "\udce9", "x" * 300)
other_items = st.one_of(
    st.tuples(st.just("junk"), st.sampled_from(PLACES), st.none()),
    st.tuples(
        st.just("equals"),
        st.sampled_from(
            ["from", "to", "net_config", "truncate_seq", "attn_type", "overwrite", "drop_heads", "tf", "debu"]
        ),
        st.sampled_from(
            ["pt", "hf", "funneltfm", "auto", "tf", "true", "no", "factorized", "FILE", "NOWHERE", "", "1"]
        ),
    ),
    st.tuples(
        st.just("bare"),
        st.sampled_from(["overwrite", "drop_heads", "no_truncate_seq", "help", "config", "x"]),
        st.none(),
    ),
)

TRAIN_FIELDS = flag_fields(TRAIN_GROUPS)
TRAIN_VALUES = {int: ("1", "5", "-1", "0"), float: ("0.5", "1e-4", "2", "-1"), bool: ("true", "no"), str: ("a", "auto")}
train_items = st.sampled_from(list(TRAIN_FIELDS)).flatmap(
    lambda name: st.tuples(
        st.just(name), st.sampled_from(train_values(name)) | st.sampled_from(VALUES) | st.sampled_from(["none", "1 2"])
    )
)


def train_values(name: str) -> tuple[str, ...]:
    """Values of the right form for a flag of `funneltfm train`."""
    kind = TRAIN_FIELDS[name].type
    words = choices(kind) or choices(item_type(kind))
    kinds = [one for one in (kind, item_type(kind), *typing.get_args(kind)) if one in TRAIN_VALUES]
    return tuple(map(str, words)) if words else tuple(value for one in kinds for value in TRAIN_VALUES[one])


flag_inputs = st.one_of(
    st.tuples(st.just("train"), st.sampled_from(sorted(TASKS)), st.lists(train_items, max_size=4)),
    st.tuples(st.just("train"), st.sampled_from(sorted(TASKS)), st.lists(train_items, max_size=1)),
    st.tuples(st.just("line"), st.lists(st.one_of(good_items, good_items, wrong_items, flag_items), max_size=5)),
    st.tuples(st.just("line"), st.lists(wrong_items, min_size=1, max_size=1)),
    st.tuples(st.just("line"), st.lists(good_items, max_size=5)),
    st.tuples(st.just("yaml"), yaml_items, st.lists(good_items, max_size=2)),
    st.tuples(st.just("text"), spoilt(b"lr: 1e-4\nepochs: 3\ntext_a: '#5'\nblock_size: 2_2_2\ncased: true\n")),
    st.tuples(st.just("convert-ckpt"), st.lists(other_items, max_size=4)),
    st.tuples(st.just("export"), st.lists(other_items, max_size=4)),
)


def words_of(items: list[tuple[str, str, str | None]]) -> list[str]:
    words = []
    for how, name, text in items:
        words += {"equals": [f"--{name}={text}"], "word": [f"--{name}", text or ""], "bare": [f"--{name}"]}.get(
            how, [name]
        )
    return words


def meant(name: str, text: str) -> Any:
    """The value of a flag that a text says; ValueError where it says none."""
    kinds = kinds_of(name)
    if kinds == (bool,):
        if text.lower() not in ("true", "yes", "false", "no"):
            raise ValueError(text)
        return text.lower() in ("true", "yes")
    if kinds == (int,):
        if not re.fullmatch("[+-]?[0-9]{1,4000}", text):
            raise ValueError(text)
        return int(text)
    if kinds == (float,):
        if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text) or not math.isfinite(
            float(text)
        ):
            raise ValueError(text)
        return float(text)
    if kinds != (str,) and text not in kinds:
        raise ValueError(text)
    return text


def said(items: list[tuple[str, str, str | None]]) -> dict[str, Any]:
    """What flags say; ValueError where one cannot be understood."""
    values: dict[str, Any] = {}
    taken = -1
    for i, (how, name, text) in enumerate(items):
        if how == "bare":
            field = name if name in FIELDS else name.removeprefix("no_")
            after = [word for what, word, _ in items[i + 1 : i + 2] if what == "junk"]
            if kinds_of(field) == (bool,):
                values[field] = field == name
            elif name == field and after and after[0] in ("file", "-5", "=", "\udce9"):
                values[name] = meant(name, after[0])
                taken = i + 1
            else:
                raise ValueError(name)
        elif how == "junk" or name not in FIELDS:
            if i != taken:
                raise ValueError(name)
        else:
            values[name] = meant(name, text or "")
    return values


def run_main(argv: list[str]) -> tuple[int, str, list[Any]]:
    """(exit code, what the person reads, what `classify` would run)."""
    seen: list[Any] = []
    stub: Any = types.SimpleNamespace(run=seen.append)
    with (
        mock.patch.dict(sys.modules, {"funneltfm.training.classify": stub}),
        contextlib.redirect_stderr(io.StringIO()) as stream,
    ):
        try:
            code = main(argv)
        except SystemExit as end:  # --help
            code = int(end.code or 0)
        except InputError as error:  # --debug
            code = 2 if isinstance(error, BadFlag) else 1
            print(error, file=stream)
    return code, stream.getvalue(), seen


def check_flags(value: tuple[Any, ...], folder: Path) -> bool:
    how, *rest = value
    if how in ("convert-ckpt", "export"):
        return check_other_verb(how, rest[0], folder)
    if how == "train":
        return check_train_flags(*rest)
    config = folder / "run.yaml"
    argv, expected = ["classify"], None
    if how == "text":
        config.write_bytes(rest[0])
        argv.append(f"--config={config}")
    else:
        items = rest[-1]
        argv += words_of(items)
        with contextlib.suppress(ValueError, KeyError):
            expected = said(items)
        if how == "yaml":
            lines = [f"{json.dumps(name)}: {json.dumps(text or '')}\n" for _, name, text in rest[0]]
            config.write_text("".join(lines), encoding="utf-8")
            argv.append(f"--config={config}")
            try:
                if expected is not None:
                    expected = said_in_file(rest[0]) | expected
            except (ValueError, KeyError):
                expected = None
    code, message, seen = run_main(argv)
    assert (code == 0) == (len(seen) == 1), (code, message)
    if code:
        assert code in (1, 2)
        refusal(InputError(message.removesuffix("\n")))
        if expected is not None:
            assert code == 1, f"{argv} cannot be understood? {message}"
        return False
    args = seen[0]
    for name, value in args.flags().items():
        kinds = typing.get_args(FIELDS[name].type) or (FIELDS[name].type,)
        assert type(value) in kinds or value in kinds, f"{name} is {value!r}"
    assert args.lr > 0 <= args.min_lr <= args.lr
    assert args.epochs > 0
    assert args.max_length >= 5
    assert 0 <= args.warmup_prop <= 1
    if how != "text":
        assert expected is not None, f"accepted: {argv}"
        defaults = {name: flag.default for name, flag in FIELDS.items()}
        assert args.flags() == defaults | expected
    return True


@functools.cache
def train_parser() -> FlagParser:
    return FlagParser(TRAIN_GROUPS, prog="funneltfm train", elsewhere=ELSEWHERE)


def check_train_flags(pipeline: str, items: list[tuple[str, str]]) -> bool:
    """Flags are of their types, and what was read says the same when it is given again, as resuming does."""
    words = [word for name, text in items for word in (f"--{name}", *text.split(" ")) if "\0" not in word]

    def read() -> Any:
        flags, given = train_parser().parse([f"--pipeline={pipeline}", *words])
        return make_train_args(**{name: flags[name] for name in given})

    accepted, args = outcome(read)
    if not accepted:
        return False
    for name, one in TRAIN_FIELDS.items():
        value = getattr(args, name)
        kinds = {one.type, item_type(one.type), *typing.get_args(one.type)}
        if isinstance(value, tuple):
            assert item_type(one.type) is not None
        elif value is not None and not (choices(one.type) and value in (choices(one.type) or ())):
            assert type(value) in kinds or item_type(one.type) is type(value), f"{name} is {value!r}"
    again = make_train_args(**{name: getattr(args, name) for name in args.given})
    assert {name: getattr(again, name) for name in TRAIN_FIELDS} == {name: getattr(args, name) for name in TRAIN_FIELDS}
    return True


def said_in_file(items: list[tuple[str, str, str | None]]) -> dict[str, Any]:
    names = [name for _, name, _ in items]
    if len(set(names)) < len(names):
        raise ValueError("a flag twice")
    values = {}
    for _, name, text in items:
        if name not in FIELDS:
            raise ValueError(name)
        if text in (None, "", "null", "~"):
            if FIELDS[name].default not in (None, ""):
                raise ValueError(name)
        else:
            values[name] = meant(name, text)
    return values


def check_other_verb(verb: str, items: list[tuple[str, str, str | None]], folder: Path) -> bool:
    (folder / "FOLDER").mkdir()
    (folder / "FILE").write_text("[]", encoding="utf-8")
    shutil.copytree(tiny_run(), folder / "RUN")
    (folder / "PT").mkdir()
    shutil.copy(tiny_config(), folder / "PT")
    (folder / "PT" / "model.pt").write_bytes(tiny_state())
    before = sorted(folder.rglob("*"))
    places = [str(folder / name) if name in PLACES and name else name for name in words_of(items)]
    argv = [re.sub("=(FILE|NOWHERE)$", f"={folder}/\\1", word) for word in places]
    code, message, _ = run_main([verb, *argv, *(["--tf_python=false"] if verb == "convert-ckpt" else [])])
    if code:
        assert code in (1, 2)
        refusal(InputError(message.removesuffix("\n")))
        assert sorted(folder.rglob("*")) == before, "a refused command left something behind"
    return not code


# ---- 6. raw text

chars = st.characters() | st.characters(categories=["Cs", "Cc", "Cf", "Mn", "Zs", "Lo", "Nd", "Po"])
FRAGMENTS = ("<cls>", "[CLS]", "<pad>", "[MASK]", "5,", "1990,", "the cat", "\u202e\u05d0", "\u200b", "\ufeff", "\0")
FRAGMENTS += (
    "a" * 100_000,
    "\u0e01" * 3000,
    "\u0301" * 2000,
    "e\u0301",
    "\U0001f468\u200d\U0001f469",
    "\ud800",
    "\u2581",
    "\n\r\t",
)
raw_text = st.lists(st.sampled_from(FRAGMENTS) | st.text(chars, max_size=6) | st.text(max_size=20), max_size=5).map(
    "".join
)
text_inputs = st.tuples(
    st.sampled_from(["word_piece", "sent_piece"]),
    st.booleans(),
    st.integers(5, 40),
    st.sampled_from([0, 0, 0, 5, 2**31 - 1, 2**31, -1, 10**30]),
    raw_text,
    st.none() | raw_text,
)


@functools.cache
def tiny_tokenizer(kind: str, cased: bool) -> Any:
    path = workshop() / f"{kind}.vocabulary"
    path.write_bytes(VOCABULARY if kind == "word_piece" else sentence_pieces())
    return get_tokenizer(kind, path, cased)


def check_text(value: tuple[str, bool, int, int, str, str | None], folder: Path) -> bool:
    kind, cased, max_length, seg_id_a, *texts = value
    tokenizer = tiny_tokenizer(kind, cased)
    given_texts = [text for text in texts if text is not None]
    accepted, result = outcome(lambda: tokenizer.convert_texts_to_ids(given_texts))
    halves = [text for text in given_texts if any(0xD800 <= ord(char) < 0xE000 for char in text)]
    assert accepted == (not halves), result
    if not accepted:
        return False
    symbols = {tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id}
    for text, ids in zip(given_texts, result, strict=True):
        assert ids == tokenizer.convert_text_to_ids(text)
        assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
        assert not symbols & set(ids)
        assert ids or not re.search("[a-z]", text)
    ids_b = result[1] if len(result) > 1 else None
    accepted, config = outcome(lambda: EncodingConfig(max_length, seg_id_a))
    assert accepted == (0 <= seg_id_a < 2**31), config
    if not accepted:
        return False
    encoded = encode_examples([Example("0", texts[0], texts[1], "b")], ("a", "b"), tokenizer, config)
    assert encoded.labels.tolist() == [1]
    inputs, seg_id = encoded.inputs.tolist(), encoded.seg_id.tolist()
    whole = [tokenizer.cls_id, *result[0], tokenizer.sep_id, *([] if ids_b is None else [*ids_b, tokenizer.sep_id])]
    assert len(inputs) == len(seg_id) == min(len(whole), max_length)
    assert inputs == whole or len(whole) > max_length
    assert inputs[0] == tokenizer.cls_id
    assert inputs[-1] == tokenizer.sep_id
    assert inputs.count(tokenizer.sep_id) == len(result)
    cut = inputs.index(tokenizer.sep_id) + 1
    assert seg_id == [2] + [seg_id_a] * (cut - 1) + [1] * (len(inputs) - cut)
    return True


# ---- 7. the folders of runs and of checkpoints

RUN_FLAGS = {"dataset": "CoLA", "data_dir": "/data/CoLA", "lr": 1e-4, "epochs": 3, "text_b": None, "cased": True}
TEXT_CONFIG = {"tokenizer_type": "word_piece", "cased": False, "max_length": 64, "vocabulary": "vocab.txt"}
LABEL_FILES = (
    '["no", "yes"]',
    "null",
    "[]",
    '["a"]',
    '["a", "b", "c"]',
    '["a", "a"]',
    "[1, 2]",
    '"no"',
    '{"a": 1}',
    "12",
)
TEXT_VALUES = (
    "null",
    "true",
    "0",
    "-1",
    "64",
    '"64"',
    '"word_piece"',
    '"sent_piece"',
    '"no.txt"',
    '"../x"',
    '""',
    "[]",
    "{}",
)
TEXT_VALUES += ("NaN", "1e999", '"vocab.txt"', '"\\u0000"', '"\\ud800"', "false", "9" * 5000, '"' + "x" * 5000 + '"')


@functools.cache
def tiny_run() -> Path:
    run = workshop() / "run"
    best = run / "best"
    best.mkdir(parents=True)
    (best / "model.pt").write_bytes(tiny_state())
    shutil.copy(tiny_config(), best)
    (best / "vocab.txt").write_bytes(VOCABULARY)
    (best / "labels.json").write_text(LABEL_FILES[0], encoding="utf-8")
    (best / "text_config.json").write_text(json.dumps(TEXT_CONFIG), encoding="utf-8")
    (run / "config.yaml").write_text(yaml.safe_dump(RUN_FLAGS), encoding="utf-8")
    return run


@functools.cache
def tiny_hf() -> Path:
    """The tiny model as transformers' own."""
    folder = workshop() / "hf"
    convert_checkpoint(tiny_run() / "best", folder, to="hf", kind="pt")
    return folder


def text_configs() -> st.SearchStrategy[bytes]:
    pairs = st.tuples(st.sampled_from([*TEXT_CONFIG, "more"]), st.sampled_from(TEXT_VALUES))
    return pairs.map(lambda pair: as_json(TEXT_CONFIG, dict([pair])))


def as_json(keys: dict[str, Any], texts: dict[str, str]) -> bytes:
    """An object in JSON, with the texts of some values given."""
    texts = {key: json.dumps(value) for key, value in keys.items()} | texts
    return ("{" + ", ".join(f'"{key}": {text}' for key, text in texts.items()) + "}").encode()


HF_VALUES = (
    *TEXT_VALUES,
    "[1, 1]",
    "[1, 0]",
    '["1", "1"]',
    "[[1]]",
    "[1]",
    '{"0": "x"}',
    '"funnel"',
    '"relu"',
    "1.5",
    "8",
)
HF_KEYS = (
    "model_type",
    "block_sizes",
    "block_repeats",
    "d_model",
    "n_head",
    "num_decoder_layers",
    "id2label",
    "hidden_act",
)
HF_KEYS += ("pool_q_only", "attention_type", "vocab_size", "hidden_dropout", "pooling_type", "d_head")

folder_inputs = st.one_of(
    st.tuples(st.just("config.yaml"), spoilt(yaml.safe_dump(RUN_FLAGS, sort_keys=False).encode())),
    st.tuples(st.just("labels.json"), st.sampled_from(LABEL_FILES).map(str.encode) | spoilt(LABEL_FILES[0].encode())),
    st.tuples(st.just("text_config.json"), text_configs() | spoilt(json.dumps(TEXT_CONFIG).encode())),
    st.tuples(st.just("vocab.txt"), spoilt(VOCABULARY)),
    st.tuples(st.just("net_config.json"), spoilt(tiny_net_config())),
    st.tuples(st.just("hf keys"), st.dictionaries(st.sampled_from(HF_KEYS), st.sampled_from(HF_VALUES), max_size=2)),
    st.tuples(st.just("hf bytes"), st.sampled_from(["config.json", "model.safetensors"]), edits),
)


def check_folder(value: tuple[Any, ...], folder: Path) -> bool:
    name, content, *rest = value
    if name.startswith("hf"):
        return check_hf(name, content, rest[0] if rest else None, folder)
    run = shutil.copytree(tiny_run(), folder / "run")
    path = run / name if name == "config.yaml" else run / "best" / name
    path.write_bytes(content)
    if name == "config.yaml":
        return check_run_flags(path)
    target = folder / "exported"
    code, message, _ = run_main(["export", str(run), str(target)])
    if code:
        assert name in refusal(InputError(message.removesuffix("\n"))) or str(run / "best") in message
        assert not target.exists()
        return False
    text = json.loads((run / "best" / "text_config.json").read_bytes())
    labels = json.loads((run / "best" / "labels.json").read_bytes())
    config = json.loads((target / "config.json").read_bytes())
    tokenizer = json.loads((target / "tokenizer_config.json").read_bytes())
    assert tokenizer["model_max_length"] == text["max_length"]
    assert type(text["max_length"]) is int
    assert text["max_length"] > 0
    assert type(text["cased"]) is bool
    assert type(labels) is list
    assert all(type(label) is str for label in labels)
    assert list(config["id2label"].values()) == labels
    assert len(config["label2id"]) == len(labels) == 2, "labels and outputs of the model differ in number"
    pieces = json.loads((target / "tokenizer.json").read_bytes())["model"]["vocab"]
    assert sorted(pieces, key=pieces.get) == expected_pieces((run / "best" / "vocab.txt").read_bytes())
    return True


def check_run_flags(path: Path) -> bool:
    now = make_args(model_dir=str(path.parent), resume=True)
    accepted, result = outcome(lambda: with_run_flags(now), path.parent)
    if accepted:
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert isinstance(saved, dict)
        for key, got in result.flags().items():
            default = {"model_dir": str(path.parent), "resume": True}.get(key, FIELDS[key].default)
            assert got == (default if key in ("model_dir", "resume", "overwrite") else saved.get(key, default))
            kinds = typing.get_args(FIELDS[key].type) or (FIELDS[key].type,)
            assert type(got) in kinds or got in kinds
    return accepted


def check_hf(name: str, content: Any, changes: Any, folder: Path) -> bool:
    source = shutil.copytree(tiny_hf(), folder / "hf")
    if name == "hf keys":
        keys = json.loads((source / "config.json").read_bytes())
        (source / "config.json").write_bytes(as_json(keys, content))
    else:
        (source / content).write_bytes(edited((source / content).read_bytes(), changes))
    target = folder / "pt"
    code, message, _ = run_main(["convert-ckpt", "--to=pt", "--from=hf", str(source), str(target)])
    if code:
        refusal(InputError(message.removesuffix("\n")))
        assert not target.exists()
        return False
    if name == "hf keys" or content == "config.json":
        parts, own = read_pt(target, None, FormatOptions()), tiny_model().state_dict()
        for key, tensor in (parts.core | parts.heads).items():
            assert torch.equal(tensor, own[key])
    return True


# ---- all of them

# ---- 8. the data of pipelines

SQUAD = {
    "version": "v2.0",
    "data": [{"title": "t", "paragraphs": [{"context": "the cat sat on a mat", "qas": [
        {"id": "1", "question": "who sat", "answers": [{"text": "cat", "answer_start": 4}], "is_impossible": False},
        {"id": "2", "question": "who ran", "answers": [], "is_impossible": True},
    ]}]}],
}  # fmt: skip
CHOICE = {"article": "the cat sat", "question": "who sat", "options": ["cat", "mat"], "answer": "A", "id": "1"}
PIPELINE_DATA: dict[str, tuple[str, bytes, dict[str, Any]]] = {
    "seq_class": (
        "x.jsonl", b'{"text": "the cat", "label": "good"}\n{"text": "sat", "label": "bad"}\n',
        {"input_columns": ["text"]},
    ),
    "token_class": ("x.conll", b"the O\ncat B-A\nsat I-A\n\nsat O\n\n", {}),
    "pos_tagging": (
        "x.conllu", b"# sent_id = 1\n1\tthe\tthe\tDET\t_\t_\t2\tdet\t_\t_\n2\tcat\tcat\tNOUN\t_\t_\t0\troot\t_\t_\n\n",
        {"label_column": "upos"},
    ),
    "question_answering": ("x.json", json.dumps(SQUAD, indent=1).encode(), {}),
    "multiple_choice": ("x.jsonl", (json.dumps(CHOICE) + "\n").encode() * 2, {}),
    "answer_selection": (
        "x.csv", b"q,s,y,id\nwho sat,the cat,1,1\nwho sat,a mat,0,1\nthe a,cat,1,2\nthe a,sat,0,2\n",
        {"input_columns": ["q", "s"], "label_column": "y", "index_column": "id"},
    ),
    "retrieval": (
        "x.tsv", b"q\ts\ty\nwho sat\tthe cat\t1\nwho sat\ta mat\t0\n",
        {"input_columns": ["q", "s"], "label_column": "y"},
    ),
    "masked_lm": ("x.txt", b"the cat sat\na mat\n\nthe cat\n", {}),
    "masked_lm+seq_class": (
        "x.csv", b"text,label\nthe cat,1\nsat on,0\n", {"input_columns": ["text"]}
    ),
}  # fmt: skip
pipeline_inputs = st.sampled_from(sorted(PIPELINE_DATA)).flatmap(
    lambda name: st.tuples(st.just(name), spoilt(PIPELINE_DATA[name][1]), st.sampled_from(["error", "skip"]))
)
LONGEST = 12


@functools.cache
def word_piece_file() -> str:
    path = workshop() / "vocab.txt"
    path.write_bytes(SQUARE)
    return str(path)


def check_pipeline(value: tuple[str, bytes, str], folder: Path) -> bool:
    """Examples are token ids within the vocabulary and the length, each of a row; labels are of the classes."""
    pipeline, content, bad_rows = value
    name, _, flags = PIPELINE_DATA[pipeline]
    path = folder / name
    path.write_bytes(content)
    args = make_train_args(
        pipeline=pipeline, model="bert", train_dataset=[str(path)], bad_rows=bad_rows, max_sequence_length=LONGEST,
        pre_trained_tokenizer=word_piece_file(), **flags, **({"doc_stride": 2} if "answering" in pipeline else {}),
    )  # fmt: skip
    tasks, text = train_module._tasks(args)
    accepted, found = outcome(lambda: train_module.load_splits(args, tasks, text), path)
    if not accepted:
        return False
    split = found[0]["train"]
    features = split.features
    assert len(features)
    assert len(split.rows) > max(features.plain["row"])
    for example in (features[i] for i in range(len(features))):
        parts = example.get("parts", [len(example["input_ids"])])
        assert sum(parts) == len(example["input_ids"])
        assert all(2 <= length <= LONGEST for length in parts)
        assert all(0 <= i < text.tokenizer.vocab_size for i in example["input_ids"])
        assert example["input_ids"][0] == text.tokenizer.cls_token_id
    if pipeline == "seq_class" and bad_rows == "error":
        lines = [json.loads(line) for line in content.decode("utf-8-sig").splitlines() if line.strip()]
        assert [row["label"] for row in split.rows] == [line["label"] for line in lines]
    for task in tasks:
        labels = features.plain.get(f"{task.name}_labels")
        names = getattr(getattr(task, "labels", None), "names", None)
        if labels is not None and names:
            assert {*labels} <= {*range(len(names))}
    return True


KINDS = (
    Kind("data files", 25, data_inputs, check_data),
    Kind("vocabularies", 10, vocabulary_inputs, check_vocabulary),
    Kind("model configs", 12, config_inputs, check_config),
    Kind("checkpoints", 10, checkpoint_inputs, check_checkpoint),
    Kind("flags", 12, flag_inputs, check_flags),
    Kind("raw text", 8, text_inputs, check_text),
    Kind("run folders", 8, folder_inputs, check_folder),
    Kind("pipeline data", 15, pipeline_inputs, check_pipeline),
)


class Offence(AssertionError):
    """An input that goes wrong: the smallest one that was found."""


def search(kind: Kind, count: int, seed: int | None = None) -> Counter:
    """Try `count` inputs; how many there were of each verdict. Offence at one that goes wrong."""
    tally: Counter = Counter()
    last: list[Any] = []

    def one(value: Any) -> None:
        last[:] = [value]
        tally["tried"] += 1
        tally[verdict(kind, value)] += 1

    test = settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )(given(kind.inputs)(one))
    if seed is not None:
        test = hypothesis.seed(seed)(test)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore", hypothesis.errors.HypothesisWarning)  # of inputs that are long
            test()
    except Exception as error:
        raise Offence(kind.name, last[0]) from error
    return tally


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_input_is_refused_clearly_or_read_rightly(kind: Kind) -> None:
    tally = search(kind, 10 * kind.share)
    assert tally["refused"]
    assert tally["accepted"]
    assert tally["refused"] + tally["accepted"] == tally["tried"]


def program() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="inputs, all kinds together")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--kind", choices=[kind.name for kind in KINDS], help="this one alone")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for an input that goes wrong")
    parser.add_argument("--replay", type=Path, help="a file that was written: run its input again")
    flags = parser.parse_args()
    logging.getLogger("funneltfm").addHandler(logging.NullHandler())
    if flags.replay:
        name, value = ast.literal_eval(flags.replay.read_text(encoding="utf-8").partition("\n#")[0])
        print(verdict(next(kind for kind in KINDS if kind.name == name), value))
        return 0
    print(f"seed {flags.seed}, {PACKAGE}")
    print(f"{'kind of input':16}{'tried':>8}{'refused':>9}{'accepted':>10}{'seconds':>9}")
    total: Counter = Counter()
    wrong = 0
    for kind in KINDS:
        if flags.kind not in (None, kind.name):
            continue
        start = time.perf_counter()
        try:
            tally = search(kind, math.ceil(flags.count * (1 if flags.kind else kind.share / 100)), flags.seed)
        except Offence as offence:
            path = flags.out / f"bad_input_{kind.name.replace(' ', '_')}.txt"
            trace = [line[:300] for line in "".join(traceback.format_exception(offence.__cause__)).splitlines()]
            comment = "".join(f"# {line}\n" for line in trace)
            path.write_text(f"{offence.args!a}\n{comment}", encoding="utf-8", errors="backslashreplace")
            print(f"{kind.name:16}WRONG: see {path}", *trace[-12:], sep="\n")
            wrong += 1
            continue
        seconds = time.perf_counter() - start
        total += tally + Counter(seconds=seconds)
        print(
            f"{kind.name:16}{tally['tried']:8}{tally['refused']:9}{tally['accepted']:10}{seconds:9.1f}",
            flush=True,
        )
    print(f"{'all':16}{total['tried']:8}{total['refused']:9}{total['accepted']:10}{total['seconds']:9.1f}")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(program())
