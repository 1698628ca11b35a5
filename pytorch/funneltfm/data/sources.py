"""Where rows come from: files, folders of the datasets library and the Hugging Face hub, as sequences of dicts.

    source -> open_rows -> Rows -> filtered (data.columns), shard, concatenate -> tasks (-> Mixture)
    source -> stream_rows -> rows one after another, for corpora that fit into no memory

One long page, since each kind of source has its few lines here and nothing else. Text files are packed into one block
of bytes (which worker processes share), parquet files and folders stay mapped from the disk.
"""

import difflib
import gzip
import hashlib
import json
import logging
import math
import operator
import re
import zlib
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from funneltfm.data.readers import datasets_library, readable
from funneltfm.data.textfiles import DOCUMENTS, LINES, TEXT_FORMATS, BadRow
from funneltfm.errors import InputError, brief
from funneltfm.files import each_key_once, file_digest, read_json

logger = logging.getLogger(__name__)

Row = dict[str, Any]  # str, int, float, bool, None, and lists and dicts of them, as the source has them
BadRows = Literal["error", "skip"]
Numbered = tuple[int, Row]  # a row of a stream, and its number


class Rows(Sequence[Row]):
    """A read-only, picklable sequence of rows. Each `[i]` is a new dict."""

    name: str
    """The source, for messages."""
    columns: tuple[str, ...]
    """All names that rows have, in the order they first occur; a row of mixed JSON lines may lack some."""

    @abstractmethod
    def _row(self, i: int) -> Row:
        """Row i, 0 <= i < len(self)."""

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return self.select(np.arange(len(self))[i])
        return self._row(self._index(i))

    def _index(self, i: Any) -> int:
        i = operator.index(i)
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)} rows of {self.name}")
        return i % len(self)

    def number(self, i: int) -> int:
        """The line of row i in its file, or where it has none its number in its source, from 1 on."""
        return self._index(i) + 1

    def where(self, i: int) -> str:
        """Where row i stands, for messages: "train.csv, line 7"."""
        return f"{self.name}, row {self._index(i)}"

    def class_names(self, column: str) -> list[str] | None:
        """The names of the integers in a column, where the source knows them (ClassLabel of the datasets library)."""
        return None

    def select(self, indices: np.ndarray) -> "Rows":
        return _Selected(self, indices)


def place(rows: Sequence[Row], i: int, where: str) -> str:
    """Where row i stands, for messages; `where`: what rows that do not know it themselves are called."""
    return rows.where(i) if isinstance(rows, Rows) else f"{where}, row {i + 1}"


def number(rows: Sequence[Row], i: int) -> int:
    """Rows.number, of rows that may not know it."""
    return rows.number(i) if isinstance(rows, Rows) else i + 1


class _Selected(Rows):
    """Some rows of others, in any order."""

    def __init__(self, rows: Rows, indices: np.ndarray):
        self.rows, self.indices = rows, np.asarray(indices, np.int64)
        self.name, self.columns = rows.name, rows.columns

    def __len__(self) -> int:
        return len(self.indices)

    def _row(self, i: int) -> Row:
        return self.rows[self.indices[i]]

    def number(self, i: int) -> int:
        return self.rows.number(self.indices[i])

    def where(self, i: int) -> str:
        return self.rows.where(self.indices[i])

    def class_names(self, column: str) -> list[str] | None:
        return self.rows.class_names(column)


class _Concatenated(Rows):
    """Several sources one after another."""

    def __init__(self, parts: list[Rows]):
        self.parts = parts
        self.ends = np.cumsum([len(rows) for rows in parts])
        self.name = " + ".join(rows.name for rows in parts)
        self.columns = tuple(dict.fromkeys(column for rows in parts for column in rows.columns))

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _find(self, i: int) -> tuple[Rows, int]:
        part = int(np.searchsorted(self.ends, i, side="right"))
        return self.parts[part], i - int(self.ends[part - 1] if part else 0)

    def _row(self, i: int) -> Row:
        rows, i = self._find(i)
        return rows[i]

    def number(self, i: int) -> int:
        rows, i = self._find(self._index(i))
        return rows.number(i)

    def where(self, i: int) -> str:
        rows, i = self._find(self._index(i))
        return rows.where(i)

    def class_names(self, column: str) -> list[str] | None:
        names = [rows.class_names(column) for rows in self.parts]
        for rows, other in zip(self.parts, names, strict=True):
            if other != names[0]:
                raise InputError(
                    f"expected the same classes in column {column!r} of {self.parts[0].name} and {rows.name}, got "
                    f"{brief(repr(names[0]))} and {brief(repr(other))}. Bring them into one order first."
                )
        return names[0]


class _Packed(Rows):
    """Rows of a text file, as JSON in one block: a list of dicts would be several times as large, and worker processes
    would copy it bit by bit, since each access changes the counts of references."""

    def __init__(self, name: str, unit: str, records: Iterable[tuple[int, Row, str]]):
        self.name, self.unit = name, unit
        self.block, self.ends, self.places = bytearray(), array("q", [0]), array("q")
        columns: dict[str, None] = {}
        for place, row, text in records:
            columns.update(dict.fromkeys(row))
            self.block += text.encode()
            self.ends.append(len(self.block))
            self.places.append(place)
        self.columns = tuple(columns)

    def __len__(self) -> int:
        return len(self.places)

    def _row(self, i: int) -> Row:
        return json.loads(str(self.block[self.ends[i] : self.ends[i + 1]], "utf-8"))

    def number(self, i: int) -> int:
        return self.places[self._index(i)]

    def where(self, i: int) -> str:
        return f"{self.name}, {self.unit} {self.number(i)}"


class _Arrow(Rows):
    """A Dataset of the datasets library, mapped from its files."""

    def __init__(self, name: str, data: Any):
        self.name, self.data = name, data.with_format(None)
        self.columns = tuple(data.column_names)

    def __len__(self) -> int:
        return len(self.data)

    def _row(self, i: int) -> Row:
        return self.data[i]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.data)

    def class_names(self, column: str) -> list[str] | None:
        return _classes(self.data.features).get(column)


def _classes(features: Any) -> dict[str, list[str]]:
    """The names of the integers of columns that have them; features: of the datasets library."""
    of_items = {name: getattr(feature, "feature", feature) for name, feature in features.items()}  # of lists
    return {name: feature.names for name, feature in of_items.items() if getattr(feature, "names", None)}


class Deferred(Rows):
    """Rows that are opened when they are first looked at."""

    def __init__(self, name: str, opened: Callable[[], Rows]):
        self.name, self._open = name, opened

    @cached_property
    def _rows(self) -> Rows:
        return self._open()

    @property
    def columns(self) -> tuple[str, ...]:  # type: ignore[override]
        return self._rows.columns

    def __len__(self) -> int:
        return len(self._rows)

    def _row(self, i: int) -> Row:
        return self._rows[i]

    def number(self, i: int) -> int:
        return self._rows.number(i)

    def where(self, i: int) -> str:
        return self._rows.where(i)

    def class_names(self, column: str) -> list[str] | None:
        return self._rows.class_names(column)


# ---- a source by its name


# A split has no dot, so what ends like a file is none.
_HUB = re.compile(r"([\w-][\w.-]*(?:/[\w-][\w.-]*)?)/([^/.\s]+)")


def open_rows(source: str, config: str | None = None, bad_rows: BadRows = "error", documents: bool = False) -> Rows:
    """The rows of a source.

    source, by what it is:
      .jsonl .csv .tsv   an object a line (the header line of MRQA files is left out); tables with a header, whose
                         cells stay text. tsv knows no quoting
      .json              a list of objects, or an object with such a list under "data" (SQuAD: a row an article)
      .txt .tokens       a row for each line that is not blank: "text"
      .conll .conll.txt .iob .bio    a row a sentence: lists "words" (first column), "labels" (last), "column_0", ...
      .conllu            a row a sentence: "words" (the forms), "id", "form", "lemma", "upos", ... of single words
      .parquet           converted once into the cache of the datasets library (HF_DATASETS_CACHE), and mapped
      a folder           as Dataset.save_to_disk writes it, or `folder/split` of a DatasetDict
      owner/name/split or name/split    of the Hugging Face hub, unless it looks like a path: if it has one of the
                         suffixes above, or its first part exists here
    Text files may be packed (.gz). config: the configuration of a set of the hub.
    bad_rows: "error" stops at the first broken row of a file; "skip" leaves such rows out and logs one warning.
    documents: of .txt and .tokens, a row for each document, which blank lines separate: "text", its lines.
    """
    if bad_rows not in ("error", "skip"):
        raise InputError(f'bad_rows must be "error" or "skip", got {bad_rows!r}')
    path = _local(source, config)
    rows: Rows
    if path is None:
        rows = _Arrow(source, _from_hub(source, config))
    elif path.is_dir():
        rows = _folder(path)
    elif _suffix(path) == ".parquet":
        datasets = datasets_library(path)
        with readable(path, OSError, datasets.exceptions.DatasetsError):
            rows = _Arrow(source, datasets.Dataset.from_parquet(str(path)))
    elif _suffix(path) == ".json":
        rows = _Packed(source, "row", _checked(path, "row", _json_items(path), bad_rows))
    else:
        rows = _Packed(source, "line", _checked(path, "line", _records(path, documents=documents), bad_rows))
    if not len(rows):
        raise _empty(source)
    return rows


def on_hub(source: str) -> bool:
    """Whether a source is the name of a set on the Hugging Face hub. Raises InputError where it is nothing."""
    return _local(source, None) is None


def config_of(source: str, config: str | None, sources: Sequence[str]) -> str | None:
    """The configuration of one of several sources: those on the hub take it, and where none is there all do, which is
    an error on opening.
    """
    return config if config is None or on_hub(source) or not any(map(on_hub, sources)) else None


def source_digest(source: str, config: str | None = None) -> str:
    """SHA-256 of a source's content: of its file, of all files of its folder; of a set on the hub, its fingerprint."""
    path = _local(source, config)
    if path is None:
        parts = [_from_hub(source, config)._fingerprint]
    else:
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        parts = [f"{file.relative_to(path)} {file_digest(file)}" for file in files]
    return hashlib.sha256("\n".join([_suffix(path) or "" if path else "hub", *parts]).encode()).hexdigest()


def _empty(source: str) -> InputError:
    return InputError(f"expected rows in {source}, but it is empty, or a header alone. Get it again.")


def _suffix(path: Path) -> str | None:
    """The suffix that says how a file is read."""
    name = path.name.lower()
    known = [suffix for suffix in (*TEXT_FORMATS, ".json") if name.removesuffix(".gz").endswith(suffix)]
    return max(known, key=len, default=".parquet" if name.endswith(".parquet") else None)


def _local(source: str, config: str | None) -> Path | None:
    """The path of a file or folder that is there; None: the source is a name on the hub."""
    if not source:
        raise InputError("expected the name of a file, a folder or a set on the Hugging Face hub, got an empty text")
    path = Path(source)
    there = path.exists()
    if not there and _HUB.fullmatch(source) and not Path(path.parts[0]).exists():
        return None
    if not there:
        raise _missing(path)
    if not path.is_dir() and _suffix(path) is None:
        known = ", ".join((*TEXT_FORMATS, ".json", ".parquet"))
        raise InputError(f"expected a file that ends in one of {known}, got {source}. Convert or rename it.")
    if config is not None:
        raise InputError(
            f"a configuration ({config!r}) belongs to a set of the Hugging Face hub; {source} lies here. Leave it out."
        )
    return path


def _missing(path: Path) -> InputError:
    folder = path.parent
    if (folder / "dataset_dict.json").is_file():
        return _no_split(folder, f"no split {path.name!r}")
    if not folder.is_dir():
        found = f"there is no folder {folder}."
    else:
        names = sorted(entry.name for entry in folder.iterdir())
        found = f"{folder.resolve()} holds {brief(', '.join(names), 400) or 'nothing'}.{closest(path.name, names)}"
    return InputError(
        f"expected a file or folder {path}, but {found} Correct the path; a set of the Hugging Face hub is "
        f"owner/name/split, where no file or folder is called like its beginning."
    )


def closest(name: str, known: Iterable[str]) -> str:
    """ " Did you mean ...?", where there is a name like it."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _folder(path: Path) -> Rows:
    if (path / "state.json").is_file():
        datasets = datasets_library(path)
        with readable(path, OSError, datasets.exceptions.DatasetsError):
            return _Arrow(str(path), datasets.Dataset.load_from_disk(str(path)))
    if (path / "dataset_dict.json").is_file():
        raise _no_split(path, "none")
    names = sorted(entry.name for entry in path.iterdir())
    raise InputError(
        f"expected a folder that Dataset.save_to_disk wrote (with state.json), but {path} holds "
        f"{brief(', '.join(names), 400) or 'nothing'}. Name a file in it, or save the set again."
    )


def _no_split(folder: Path, got: str) -> InputError:
    splits = read_json(folder / "dataset_dict.json", "the list of splits")["splits"]
    return InputError(
        f"expected one of the splits {', '.join(splits)} of the DatasetDict in {folder}, got {got}. Write "
        f"{folder}/{splits[0] if splits else 'SPLIT'}."
    )


def _from_hub(source: str, config: str | None, **options: Any) -> Any:
    """A split of a set on the hub (options: of datasets.load_dataset)."""
    datasets = datasets_library(source)
    match = _HUB.fullmatch(source)
    assert match is not None
    name, split = match.groups()
    try:
        return datasets.load_dataset(name, config, split=split, **options)
    except Exception as error:  # of the network, the hub, the set's own files: each library has its own kinds
        why = brief(" ".join(f"{type(error).__name__}: {error}".split()), 400)
        raise InputError(
            f"expected the split {split!r} of the set {name!r}{f' ({config})' if config else ''} on the Hugging Face "
            f"hub, got {why}. Correct the name, or the path if {source} was meant to be a file or folder here."
        ) from error


# ---- records to rows


def _records(path: Path, first: int = 0, step: int = 1, documents: bool = False) -> Iterator[tuple[int, Any]]:
    """The records of a text file from the first on, of which every step-th is taken: (line, cells or BadRow)."""
    form = TEXT_FORMATS[_suffix(path) or ""]
    form = DOCUMENTS if documents and form is LINES else form
    return ((line, form.parse(record)) for line, record in islice(form.split(path), first, None, step))


def _json_items(path: Path) -> Iterator[tuple[int, Any]]:
    opened: Any = gzip.open if path.suffix.lower() == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig", errors="surrogateescape") as stream:
        text = stream.read()
    try:
        value = json.loads(text, object_pairs_hook=each_key_once) if text.strip() else []
    except (ValueError, RecursionError) as error:
        hint = " If it holds an object a line, call it .jsonl." if "Extra data" in str(error) else ""
        place = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(f"{path}{place}: expected JSON, got {brief(str(error))}.{hint}") from error
    items = value.get("data") if isinstance(value, dict) else value
    if not isinstance(items, list):
        got = f"an object with {brief(', '.join(value)) or 'nothing'}" if isinstance(value, dict) else "other JSON"
        raise InputError(f'{path}: expected a list of objects, or an object with such a list under "data", got {got}.')
    for i, item in enumerate(items):
        yield i, item if isinstance(item, dict) else BadRow("an object", "other JSON", item)


def _checked(
    path: Path, unit: str, records: Iterable[tuple[int, Any]], bad_rows: BadRows
) -> Iterator[tuple[int, Row, str]]:
    """The rows among records, each also as JSON; broken ones are an error, or counted in one warning at the end."""
    bad, first = 0, ""
    try:
        for place, row in records:
            try:
                if isinstance(row, BadRow):
                    raise row
                text = _as_json(row)
            except BadRow as error:
                first = first or f"{path}, {unit} {place}: {error}"
                bad += 1
                if bad_rows == "error":
                    raise InputError(f"{first}. Correct the row, or leave such rows out with bad_rows=skip.") from None
                continue
            yield place, row, text
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}). Check the file.") from error
    if bad:
        logger.warning("skipped %d broken rows of %s; the first: %s", bad, path, first)


def _as_json(row: Row) -> str:
    """A row as JSON, which checks it: UTF-8 text without NULs, finite numbers."""
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        text.encode()
    except UnicodeEncodeError:
        raise BadRow("UTF-8 text", "bytes that are not UTF-8, or half a character", row) from None
    except (ValueError, RecursionError) as error:
        got = "a number that is not" if "compliant" in str(error) else str(error)
        raise BadRow("finite numbers (null for one that is missing)", got, row) from None
    if "\\u0000" in text and "\\u0000" in text.replace("\\\\", ""):
        raise BadRow("UTF-8 text", "a NUL in it", row)
    return text


# ---- fewer and more


def shard(rows: Rows, n: int) -> Rows:
    """Every n-th row, from the first on: 1/n of them."""
    if n < 1:
        raise InputError(f"a shard is 1/n of the rows with n a positive number, got {n}.")
    return rows[::n]


def concatenate(parts: Sequence[Rows]) -> Rows:
    """Several sources as one; the columns are those of all."""
    if not parts:
        raise InputError("expected one source or more, got none")
    return parts[0] if len(parts) == 1 else _Concatenated(list(parts))


class Mixture:
    """Which examples of several sources an epoch has.

    parts: (N,) int, the number of each example's source, from 0. weights: a positive number for each source. names: of
    the sources, for messages.

    An epoch has N examples, of which each source has its share by weight, rounded by largest remainders. A source's
    examples are taken in random order, over as many epochs as that lasts or several times in one, and none comes again
    before all have come.
    """

    def __init__(self, parts: np.ndarray, weights: Sequence[float], names: Sequence[str]):
        self.members = [np.flatnonzero(parts == part) for part in range(len(weights))]
        for members, name in zip(self.members, names, strict=True):
            if not len(members):
                raise InputError(f"expected examples of {name} to draw from, but no row makes one. Leave it out.")
        self.quotas = _largest_remainders(len(parts), weights)

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """(N,) int64 indices of examples, in random order: a function of (seed, epoch) alone."""
        taken = [
            members[_passes(len(members), epoch * quota, quota, (seed, 1, part))]
            for part, (members, quota) in enumerate(zip(self.members, self.quotas, strict=True))
        ]
        return np.random.default_rng([seed, 2, epoch]).permutation(np.concatenate(taken))


def _largest_remainders(total: int, weights: Sequence[float]) -> list[int]:
    """total dealt by weights, in whole numbers; what is left goes to the largest fractions, the first of equals."""
    exact = [Fraction(str(weight)) for weight in weights]  # as written: .7 is 7/10
    shares = [total * weight / sum(exact) for weight in exact]
    order = sorted(range(len(shares)), key=lambda i: (math.floor(shares[i]) - shares[i], i))
    left = total - sum(map(math.floor, shares))
    return [math.floor(share) + (i in order[:left]) for i, share in enumerate(shares)]


def _passes(size: int, start: int, count: int, key: tuple[int, ...]) -> np.ndarray:
    """Members start to start + count of an endless row of random orders of range(size)."""
    first, last = start // size, (start + count - 1) // size
    orders = [np.random.default_rng([*key, number]).permutation(size) for number in range(first, last + 1)]
    return np.concatenate([np.empty(0, np.int64), *orders])[start - first * size :][:count]


# ---- streams


class Stream(Iterator[Row]):
    """Rows one after another. rows: each with its number. classes: the names of the integers of columns that have them.

    number: of the row that came last, the line where a text file has it, elsewhere its place in the source; of several
    sources as `divmod(number, how many)` takes it apart, into that and which source. It is the same whoever reads it,
    in whatever order.
    """

    number: int

    def __init__(self, rows: Iterator[Numbered], classes: Mapping[str, list[str]]):
        self.rows, self.classes = rows, classes

    def __next__(self) -> Row:
        self.number, row = next(self.rows)
        return row

    def class_names(self, column: str) -> list[str] | None:
        return self.classes.get(column)


class Group(list[Row]):
    """Some rows of a stream."""

    def __init__(self, rows: Iterable[Row], stream: Stream):
        super().__init__(rows)
        self.class_names = stream.class_names


def stream_rows(
    source: str | Sequence[str],
    config: str | None = None,
    *,
    seed: int = 0,
    epoch: int = 0,
    buffer: int = 10_000,
    taken: int = 0,
    rank: int = 0,
    ranks: int = 1,
    worker: int = 0,
    workers: int = 1,
    bad_rows: BadRows = "error",
    documents: bool = False,
    keep: Callable[[Iterator[Numbered]], Iterator[Numbered]] | None = None,
) -> Stream:
    """The rows of a source, or of several, one after another, in constant memory. config: of sources on the hub.

    Worker `worker` of `workers` in process `rank` of `ranks` has every (ranks * workers)-th row: together they have
    each row once. Where the number of rows cannot be divided, some have one more. Each shuffles its own within
    `buffer` rows, as a function of (seed, epoch, which worker it is); 0 keeps the order of the source.
    taken: how many rows this worker has had before; it goes on with the next (reading the others again).
    documents: as in `open_rows`. keep: what leaves some of the rows out, before they are shuffled and counted.
    """
    if bad_rows not in ("error", "skip"):
        raise InputError(f'bad_rows must be "error" or "skip", got {bad_rows!r}')
    if not (0 <= rank < ranks and 0 <= worker < workers and buffer >= 0 and taken >= 0):
        raise InputError(
            f"expected 0 <= rank < ranks, 0 <= worker < workers, buffer >= 0 and taken >= 0, got {rank=} {ranks=} "
            f"{worker=} {workers=} {buffer=} {taken=}."
        )
    number, of = rank * workers + worker, ranks * workers
    sources = [source] if isinstance(source, str) else source
    parts: list[Iterator[Numbered]] = []
    classes: dict[str, list[str]] = {}
    for which, name in enumerate(sources):
        first = (number - which) % of  # by turns: each may have a row alone
        rows, named = _stream(name, config_of(name, config, sources), first, of, bad_rows, documents)
        if which and named != classes:
            raise InputError(f"expected the same classes in {sources[0]} and {name}, got {classes} and {named}.")
        classes = named
        if first == 0:  # the one worker that has a row of it if there is any
            rows = _some(rows, name)
        parts.append(_of_several(rows, which, len(sources)))
    rows = chain.from_iterable(parts)
    if keep is not None:
        rows = keep(rows)
    rows = _shuffled(rows, buffer, np.random.default_rng([seed, 3, epoch, number]))
    return Stream(islice(rows, taken, None), classes)


def _of_several(rows: Iterator[Numbered], which: int, sources: int) -> Iterator[Numbered]:
    return ((place * sources + which, row) for place, row in rows)


def _some(rows: Iterator[Numbered], source: str) -> Iterator[Numbered]:
    for row in rows:
        yield row
        break
    else:
        raise _empty(source)
    yield from rows


def _stream(
    source: str, config: str | None, first: int, step: int, bad_rows: BadRows, documents: bool
) -> tuple[Iterator[Numbered], dict[str, list[str]]]:
    """Every step-th row from the first on, in the order of the source, with their numbers, and the names of classes."""
    path = _local(source, config)
    if path is None:
        data = _from_hub(source, config, streaming=True)
        return _stream_batches(data, first, step), _classes(data.features or {})
    if path.is_dir() or _suffix(path) == ".json":
        rows = open_rows(source, bad_rows=bad_rows)
        named = {column: names for column in rows.columns if (names := rows.class_names(column))}
        return ((i, rows[i]) for i in range(first, len(rows), step)), named
    if _suffix(path) == ".parquet":
        datasets = datasets_library(path)
        with readable(path, OSError, datasets.exceptions.DatasetsError):
            import pyarrow.parquet

            named = _classes(datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(path)))
        return _stream_parquet(path, first, step), named
    records = _records(path, first, step, documents)
    return ((line, row) for line, row, _ in _checked(path, "line", records, bad_rows)), {}


def _stream_batches(data: Any, first: int, step: int) -> Iterator[Numbered]:
    """Of an IterableDataset. Its own iterator would, in a worker of torch's loader, deal out its files once more."""
    rows = (
        dict(zip(batch, values, strict=True))
        for batch in data.iter(batch_size=256)
        for values in zip(*batch.values(), strict=True)
    )
    return islice(enumerate(rows), first, None, step)


def _stream_parquet(path: Path, first: int, step: int) -> Iterator[Numbered]:
    datasets = datasets_library(path)
    with readable(path, OSError, datasets.exceptions.DatasetsError):
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            start = 0
            for batch in file.iter_batches(batch_size=1024):
                chosen = list(range((first - start) % step, len(batch), step))
                yield from zip((start + i for i in chosen), batch.take(chosen).to_pylist(), strict=True)
                start += len(batch)


def _shuffled(rows: Iterator[Numbered], buffer: int, rng: np.random.Generator) -> Iterator[Numbered]:
    held = list(islice(rows, buffer))
    for row in rows:
        if held:
            i = int(rng.integers(len(held)))
            row, held[i] = held[i], row
        yield row
    yield from (held[i] for i in rng.permutation(len(held)))
