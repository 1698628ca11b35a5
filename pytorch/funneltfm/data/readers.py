"""Text-classification sets read into examples (one long page: the table DATASETS, and the few functions that read it).

A set is a row of the table, not a class.

    files of a split -> records (path, line, cells by column) -> checked examples

The official files of GLUE and of the sets of Zhang et al. 2015, IMDB's folders, and anybody's own jsonl, csv, tsv or
Hugging Face data (custom_dataset). Whatever is wrong with a file is an InputError that names the file and the line.
"""

import contextlib
import difflib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from funneltfm.data.textfiles import (
    BadRow,
    Cells,
    csv_rows,
    filled_lines,
    is_number,
    json_object,
    named_cells,
    open_text,
    tsv_rows,
)
from funneltfm.errors import InputError, brief

logger = logging.getLogger(__name__)

Column = str | int  # the name in a file with a header, the position in one without


@dataclass(frozen=True, slots=True)
class Example:
    """One text or pair of texts."""

    id: str
    """The file's own `id`, `idx` or `index`, else the 0-based row number, as GLUE submissions want it."""
    text_a: str
    text_b: str | None = None
    label: str | None = None
    """As the file writes it ("1", "entailment", "4.25"), without surrounding blanks; None if there is none."""


@dataclass(frozen=True)
class SplitSpec:
    """Where one split lies and which of its columns mean what."""

    files: tuple[str, ...]
    """Names (or glob patterns of shards) looked for in the data folder; the first that is there is read."""
    text_a: Column
    text_b: Column | None = None
    label: Column | None = None
    width: int | None = None
    """Number of columns of a file without a header; None if there is a header."""
    label_optional: bool = False
    """The label column, or single labels, may be missing (test files)."""
    one_text_suffices: bool = False
    """One text of a pair may be empty: reviews without a title."""
    replacements: tuple[tuple[str, str], ...] = ()
    """What the files write in place of a character: (written, meant)."""
    folders: tuple[str, ...] = ()
    """One folder of single-text files per label (IMDB)."""
    in_dev_ids: bool | None = None
    """MRPC as Microsoft ships it (.txt): keep the pairs that dev_ids.tsv lists (True), or the others (False)."""
    one_source: bool = False
    """Two of `files` at once are an error (custom data), not a matter of preference."""

    @property
    def required(self) -> list[Column]:
        """The columns that each row must have."""
        columns = (self.text_a, self.text_b, None if self.label_optional else self.label)
        return [column for column in columns if column is not None]


@dataclass(frozen=True)
class DatasetSpec:
    """One row of the table."""

    name: str
    labels: tuple[str, ...] | None
    """In class order, as the files write them; None for regression."""
    metrics: tuple[str, ...]
    """Out of accuracy, f1, mcc, pearson, spearman; the first selects the best checkpoint. f1 is the last label's."""
    splits: Mapping[str, SplitSpec]
    """train, valid, test; MNLI also valid_mm and test_mm; AX only test.

    The text classification sets have no official valid file: their valid is test, on which the papers report, unless
    the folder holds a valid.csv or dev.csv (IMDB: a folder valid or dev).
    """
    submission: Mapping[str, str]
    """Split -> name of the file that GLUE's server expects."""
    aliases: tuple[str, ...] = ()
    class_names: tuple[str, ...] | None = None
    """What the labels mean, in their order, where they are numbers."""
    script: str | None = None
    """The script that downloads the set."""


BINARY = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")
NLI = ("contradiction", "entailment", "neutral")
IMDB_FOLDERS = ("neg", "pos")
SENTIMENT = ("negative", "positive")
STARS = ("1 star", "2 stars", "3 stars", "4 stars", "5 stars")
DBPEDIA = (
    *("Company", "EducationalInstitution", "Artist", "Athlete", "OfficeHolder", "MeanOfTransportation", "Building"),
    *("NaturalPlace", "Village", "Animal", "Plant", "Album", "Film", "WrittenWork"),
)
GLUE_SCRIPT, TEXTCLS_SCRIPT = "data-scripts/download_glue.sh", "data-scripts/download_textcls.sh"
NEWLINE = ("\\n", "\n")  # "New lines are escaped by a backslash followed with an n character" (readme of the sets)
QUOTE = ('\\"', '"')  # Yelp's quotes keep a backslash after csv's own unquoting
PAIR_IDS: list[Column] = ["#1 ID", "#2 ID"]  # of Microsoft's paraphrase files
SENTENCES: tuple[Column, Column] = ("sentence1", "sentence2")


def _glue(text_a: Column, text_b: Column | None = None, label: Column = "label", **more: Any) -> dict[str, SplitSpec]:
    """The three tab-separated files of a GLUE set; its test file has no label."""
    return {
        "train": SplitSpec(("train.tsv",), text_a, text_b, label, **more),
        "valid": SplitSpec(("dev.tsv",), text_a, text_b, label, **more),
        "test": SplitSpec(("test.tsv",), text_a, text_b, **more),
    }


def _mrpc() -> dict[str, SplitSpec]:
    """GLUE's files, or Microsoft's own, whose train file holds GLUE's valid rows too and whose test file has labels."""

    def split(*files: str, **more: Any) -> SplitSpec:
        return SplitSpec(files, "#1 String", "#2 String", "Quality", **more)

    return {
        "train": split("train.tsv", "msr_paraphrase_train.txt", in_dev_ids=False),
        "valid": split("dev.tsv", "msr_paraphrase_train.txt", in_dev_ids=True),
        "test": split("test.tsv", "msr_paraphrase_test.txt", label_optional=True),
    }


def _zhang(title: bool, *replacements: tuple[str, str]) -> dict[str, SplitSpec]:
    """Class, title (not in Yelp) and text, quoted, without header; only train and test are official."""
    more: dict[str, Any] = {"label": 0, "replacements": replacements, "one_text_suffices": title}
    columns: dict[str, Any] = {"text_a": 1, "text_b": 2, "width": 3} if title else {"text_a": 1, "width": 2}
    files = {"train": ("train.csv",), "valid": ("valid.csv", "dev.csv", "test.csv"), "test": ("test.csv",)}
    return {split: SplitSpec(names, **columns, **more) for split, names in files.items()}


def _glue_row(
    name: str, labels: tuple[str, ...] | None, metrics: str, splits: Mapping[str, SplitSpec], *aliases: str
) -> DatasetSpec:
    """A set of GLUE."""
    return DatasetSpec(
        name, labels, tuple(metrics.split()), splits, {"test": f"{name}.tsv"}, aliases, script=GLUE_SCRIPT
    )


def _textcls_row(
    name: str, class_names: tuple[str, ...], splits: Mapping[str, SplitSpec], *aliases: str
) -> DatasetSpec:
    """A text classification set: classes are numbered from 1, but IMDB's are folders."""
    labels = IMDB_FOLDERS if name == "IMDB" else tuple(str(i + 1) for i in range(len(class_names)))
    return DatasetSpec(name, labels, ("accuracy",), splits, {}, aliases, class_names, TEXTCLS_SCRIPT)


COLA = {**_glue(3, label=1, width=4), "test": SplitSpec(("test.tsv",), "sentence")}
MNLI = {
    "train": SplitSpec(("train.tsv",), *SENTENCES, "gold_label"),
    "valid": SplitSpec(("dev_matched.tsv",), *SENTENCES, "gold_label"),
    "valid_mm": SplitSpec(("dev_mismatched.tsv",), *SENTENCES, "gold_label"),
    "test": SplitSpec(("test_matched.tsv",), *SENTENCES),
    "test_mm": SplitSpec(("test_mismatched.tsv",), *SENTENCES),
}
MNLI_SUBMISSION = {"test": "MNLI-m.tsv", "test_mm": "MNLI-mm.tsv"}
AX_FILES = ("AX.tsv", "diagnostic.tsv", "AX/AX.tsv", "diagnostic/diagnostic.tsv", "MNLI/diagnostic.tsv", "MNLI/AX.tsv")
IMDB = {
    split: SplitSpec(names, "text", None, "label", folders=IMDB_FOLDERS, replacements=(("<br />", "\n"),))
    for split, names in {"train": ("train",), "valid": ("valid", "dev", "test"), "test": ("test",)}.items()
}

DATASETS: dict[str, DatasetSpec] = {
    spec.name: spec
    for spec in (
        _glue_row("CoLA", BINARY, "mcc accuracy", COLA),
        _glue_row("SST-2", BINARY, "accuracy", _glue("sentence"), "SST"),
        _glue_row("MRPC", BINARY, "accuracy f1", _mrpc()),
        _glue_row("QQP", BINARY, "accuracy f1", _glue("question1", "question2", "is_duplicate")),
        _glue_row("STS-B", None, "pearson spearman", _glue(*SENTENCES, "score")),  # scores 0 to 5
        replace(_glue_row("MNLI", NLI, "accuracy", MNLI, "MNLI-m", "MNLI-matched"), submission=MNLI_SUBMISSION),
        _glue_row("QNLI", ENTAILMENT, "accuracy", _glue("question", "sentence")),
        _glue_row("RTE", ENTAILMENT, "accuracy", _glue(*SENTENCES)),
        _glue_row("WNLI", BINARY, "accuracy", _glue(*SENTENCES)),
        _glue_row("AX", NLI, "mcc accuracy", {"test": SplitSpec(AX_FILES, *SENTENCES)}, "diagnostic", "diagnostics"),
        _textcls_row("Yelp-2", SENTIMENT, _zhang(False, NEWLINE, QUOTE), "yelp_polarity", "yelp_review_polarity"),
        _textcls_row("Yelp-5", STARS, _zhang(False, NEWLINE, QUOTE), "yelp_full", "yelp_review_full"),
        _textcls_row("IMDB", SENTIMENT, IMDB, "aclImdb"),
        _textcls_row("AG", ("World", "Sports", "Business", "Sci/Tech"), _zhang(True), "ag_news"),
        _textcls_row("DBpedia", DBPEDIA, _zhang(True), "dbpedia_14"),
        _textcls_row("Amazon-2", SENTIMENT, _zhang(True, NEWLINE), "amazon_polarity", "amazon_review_polarity"),
        _textcls_row("Amazon-5", STARS, _zhang(True, NEWLINE), "amazon_full", "amazon_review_full"),
    )
}


def _plain(name: str) -> str:
    """`SST_2`, `sst-2` and `SST2` are one name; so are a name and its folder `..._csv`."""
    return re.sub(r"[^a-z0-9]", "", name.lower()).removesuffix("csv")


def get_dataset(name: str) -> DatasetSpec:
    """The table's row for a name, in any spelling of case, `-` and `_`, or for an alias."""
    by_name = {_plain(known): spec for spec in DATASETS.values() for known in (spec.name, *spec.aliases)}
    if (spec := by_name.get(_plain(name))) is not None:
        return spec
    close = dict.fromkeys(by_name[match].name for match in difflib.get_close_matches(_plain(name), by_name))
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise InputError(
        f"dataset must be one of {', '.join(DATASETS)}, got {name!r}.{hint} Your own data: --dataset=custom."
    )


CUSTOM_FILES: tuple[str, ...] = ("{}.jsonl", "{}.csv", "{}.tsv", "{}/state.json")
CUSTOM_FILES += ("{}.parquet", "{}-*.parquet", "data/{}.parquet", "data/{}-*.parquet")


def custom_dataset(
    data_dir: str | Path,
    text_a: str = "text_a",
    text_b: str | None = None,
    label: str = "label",
    regression: bool = False,
    bad_rows: str = "error",
) -> DatasetSpec:
    """Anybody's own data: `train`, `valid` (or `dev`, `validation`) and `test`, each a .jsonl, .csv or .tsv.

    Columns are found by name, so csv and tsv have a header. Also read: what `save_to_disk` of the `datasets` library
    writes, and parquet files (train.parquet, data/train-*.parquet). The labels are those of train, sorted; only test
    may be without. bad_rows: as in read_split.
    """
    names = {"train": ("train",), "valid": ("valid", "dev", "validation"), "test": ("test",)}
    splits = {}
    for split, stems in names.items():
        files = tuple(kind.format(stem) for stem in stems for kind in CUSTOM_FILES)
        files += ("state.json",) if split == "train" else ()  # one Dataset, saved without splits
        splits[split] = SplitSpec(files, text_a, text_b, label, label_optional=split == "test", one_source=True)
    if regression:
        return DatasetSpec("custom", None, ("pearson", "spearman"), splits, {})
    spec = DatasetSpec("custom", (), ("accuracy",), splits, {})
    labels = {example.label or "" for example in _read(spec, data_dir, "train", bad_rows)[0]}
    whole = all(re.fullmatch(r"-?[0-9]{1,18}", name) for name in labels)  # int refuses thousands of digits
    return replace(spec, labels=tuple(sorted(labels, key=lambda name: (int(name) if whole else 0, name))))


def source_files(spec: DatasetSpec, data_dir: str | Path, split: str) -> list[Path]:
    """The files a split is read from, all of them: a cache is keyed by their content."""
    files = _locate(spec, Path(data_dir), split)
    if files[0].name == "state.json":
        return sorted(path for path in files[0].parent.iterdir() if path.is_file())
    return files + ([files[0].with_name("dev_ids.tsv")] if _by_ids(spec.splits[split], files[0]) else [])


def read_split(spec: DatasetSpec, data_dir: str | Path, split: str, *, bad_rows: str = "error") -> list[Example]:
    """The examples of a split, in the order of the file.

    bad_rows: "error" stops at the first broken row; "skip" leaves broken rows out and logs one warning.
    """
    examples, bad = _read(spec, data_dir, split, bad_rows)
    if bad:
        lost = f". {spec.submission[split]} will lack them: GLUE refuses that" if split in spec.submission else ""
        logger.warning("skipped %d broken rows of %s %s; the first: %s%s", len(bad), spec.name, split, bad[0], lost)
    return examples


Record = tuple[Path, int, Cells | BadRow]


def _read(spec: DatasetSpec, data_dir: str | Path, split: str, bad_rows: str) -> tuple[list[Example], list[str]]:
    """The examples, and one entry for each row that was skipped; the first is the message."""
    if bad_rows not in ("error", "skip"):
        raise InputError(f'bad_rows must be "error" or "skip", got {bad_rows!r}')
    files = _locate(spec, Path(data_dir), split)
    row = spec.splits[split]
    examples: list[Example] = []
    bad: list[str] = []
    try:
        for number, (path, line, cells) in enumerate(_records(files, row)):
            try:
                if isinstance(cells, BadRow):
                    raise cells
                examples.append(_example(spec, row, cells, number))
            except BadRow as error:
                unit = "row" if path.is_dir() or path.suffix == ".parquet" else "line"
                bad.append("" if bad else f"{path}, {unit} {line}: {error}")
                if bad_rows == "error":
                    raise InputError(f"{bad[0]}. Correct the row, or leave such rows out with bad_rows=skip.") from None
    except OSError as error:
        raise InputError(f"{spec.name} {split}: {files[0]} cannot be read ({error}). Check the file.") from error
    if not examples:
        what = f"all its {len(bad)} rows are broken; the first: {bad[0]}" if bad else "it is empty, or a header alone"
        raise InputError(f"expected examples of {spec.name} {split} in {files[0]}, but {what}. Get the file again.")
    return examples, bad


def _example(spec: DatasetSpec, row: SplitSpec, cells: Cells, number: int) -> Example:
    for cell in cells.values():
        if isinstance(cell, str) and _BROKEN.search(cell):
            raise BadRow("UTF-8 text", "bytes that are not UTF-8, or a NUL", cell)
    for column in row.required:  # tables have been checked by their header
        if column not in cells:
            raise BadRow(f"the keys {row.required}", f"none named {column!r}", list(cells))
    texts = [_text(cells[column]) for column in (row.text_a, row.text_b) if column is not None]
    for written, meant in row.replacements:
        texts = [text.replace(written, meant) for text in texts]
    blank = [not text.strip() for text in texts]
    if all(blank) or (any(blank) and not row.one_text_suffices):
        raise BadRow("text", "an empty text", dict(cells))
    label = None if row.label is None else _label(spec, row, cells)
    name = next((text for column in ID_COLUMNS if (text := _text(cells.get(column)))), str(number))
    return Example(name, texts[0], texts[1] if len(texts) > 1 else None, label)


def _label(spec: DatasetSpec, row: SplitSpec, cells: Cells) -> str | None:
    assert row.label is not None
    label = _text(cells.get(row.label)).strip()
    if row.label_optional and (not label or (label == "-1" and spec.labels is not None and label not in spec.labels)):
        return None
    if spec.labels is None:
        if not is_number(label):
            raise BadRow("a finite number as label", repr(label), dict(cells))
    elif not label or (spec.labels and label not in spec.labels):  # (): a custom set whose labels are being collected
        known = f"one of {brief(', '.join(spec.labels[:20]))}" if spec.labels else "not empty"
        raise BadRow(f"a label that is {known}", repr(label), dict(cells))
    return label


def _text(value: object) -> str:
    """A cell as text; JSON's spelling for booleans."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, bool | int | float):
        return str(value).lower() if isinstance(value, bool) else str(value)
    raise BadRow("a text or a number", f"a {type(value).__name__}", value)


_BROKEN = re.compile("[\0\ud800-\udfff]")  # what is not UTF-8 is decoded to lone surrogates (PEP 383)
ID_COLUMNS = ("id", "idx", "index")


def _locate(spec: DatasetSpec, folder: Path, split: str) -> list[Path]:
    """The file of a split, or its shards, or (IMDB) its texts."""
    if split not in spec.splits:
        raise InputError(f"split of {spec.name} must be one of {', '.join(spec.splits)}, got {split!r}")
    row = spec.splits[split]
    found = [paths for pattern in row.files if (paths := sorted(folder.glob(pattern)))]
    if not found:
        raise _missing(spec, folder, " or ".join(row.files))
    if row.one_source and len(found) > 1:
        names = ", ".join(str(paths[0]) for paths in found)
        raise InputError(f"expected one source of {spec.name} {split}, got {len(found)}: {names}. Keep one of them.")
    if row.folders:
        groups = {name: sorted((found[0][0] / name).glob("*.txt")) for name in row.folders}
        if empty := [name for name, paths in groups.items() if not paths]:
            raise _missing(spec, found[0][0], f"{empty[0]}/*.txt")
        return [path for paths in groups.values() for path in paths]
    if _by_ids(row, found[0][0]) and not (folder / "dev_ids.tsv").is_file():
        raise _missing(spec, folder, f"dev_ids.tsv (which splits {found[0][0].name}) or {row.files[0]}")
    return found[0]


def _missing(spec: DatasetSpec, folder: Path, wanted: str) -> InputError:
    if not folder.is_dir():
        content = "there is no such folder"
    else:
        names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
        content = "the folder holds " + (", ".join(names[:20]) + (" ..." if len(names) > 20 else "") or "nothing")
    todo = f"Get the set with {spec.script}" if spec.script else "Put it there"
    return InputError(
        f"expected {wanted} in {folder} for {spec.name}, but {content}. {todo}, or correct the data folder."
    )


def _records(files: Iterable[Path], row: SplitSpec) -> Iterator[Record]:
    for path in files:
        records = (_one_text if row.folders else FORMATS[path.suffix])(path, row)
        yield from _split_by_ids(records, path, row) if _by_ids(row, path) else records


def _tsv(path: Path, row: SplitSpec) -> Iterator[Record]:
    return _table(path, row, tsv_rows(path))


def _csv(path: Path, row: SplitSpec) -> Iterator[Record]:
    return _table(path, row, csv_rows(path))


def _table(path: Path, row: SplitSpec, rows: Iterable[tuple[int, list[str] | BadRow]]) -> Iterator[Record]:
    header = range(row.width) if row.width else None
    for line, cells in named_cells(path, rows, partial(_check_columns, row), header):
        yield path, line, cells


def _check_columns(row: SplitSpec, path: Path, header: Sequence[str]) -> None:
    required = row.required + (PAIR_IDS if _by_ids(row, path) else [])
    for column in (*required, *({row.label, *ID_COLUMNS} - {*required, None})):
        if header.count(column) > 1 or (column in required and column not in header):
            got = "none" if column not in header else "several"
            raise InputError(
                f"{path}: expected one column named {column!r} in the header (line 1), got {got} among "
                f"{brief(repr(list(header)), 1000)}. Correct the header, or name the columns to be read."
            )


def _jsonl(path: Path, row: SplitSpec) -> Iterator[Record]:
    """One object per line. Numbers keep the file's spelling: 1 is "1", 1.50 is "1.50"."""
    for line, text in filled_lines(path):
        yield path, line, json_object(text, parse_int=str, parse_float=str, parse_constant=str)


def _one_text(path: Path, row: SplitSpec) -> Iterator[Record]:
    """A file of one text in a folder named like its label."""
    with open_text(path) as stream:
        text = stream.read().rstrip("\r\n")
    yield path, 1, {"id": f"{path.parent.name}/{path.stem}", "label": path.parent.name, "text": text}


def _by_ids(row: SplitSpec, path: Path) -> bool:
    return row.in_dev_ids is not None and path.suffix == ".txt"


def _split_by_ids(records: Iterable[Record], path: Path, row: SplitSpec) -> Iterator[Record]:
    """Of Microsoft's paraphrase pairs, those whose two ids are, or are not, a line of dev_ids.tsv."""
    with open_text(path.with_name("dev_ids.tsv")) as stream:
        dev_ids = {tuple(line.split()) for line in stream}
    for record in records:
        cells = record[2]
        if isinstance(cells, BadRow) or (tuple(cells[name] for name in PAIR_IDS) in dev_ids) == row.in_dev_ids:
            yield record


def datasets_library(source: object) -> Any:
    """The `datasets` module, which `source` needs."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{source} needs the datasets library ({error}): pip install 'funneltfm[datasets]'") from error
    return datasets


@contextlib.contextmanager
def readable(place: object, *more: type[Exception]) -> Iterator[None]:
    """What the datasets library says of files that it cannot read, as an InputError. more: kinds of errors beside its
    usual ones."""
    kinds: tuple[type[Exception], ...] = (ValueError, KeyError, TypeError, *more)
    try:
        yield
    except kinds as error:
        why = " ".join(str(error.__cause__ or error).split())
        raise InputError(
            f"expected data of the datasets library in {place}, got an error: {why}. Save it again."
        ) from error


def _hugging_face(path: Path, row: SplitSpec) -> Iterator[Record]:
    """A parquet file, or a folder of `save_to_disk` (path: its state.json). ClassLabel integers become their names."""
    datasets = datasets_library(path)
    place = path if path.suffix == ".parquet" else path.parent
    with readable(place):
        if place is path:
            import pyarrow.parquet

            data = datasets.Dataset(datasets.table.InMemoryTable(pyarrow.parquet.read_table(path)))
        else:
            data = datasets.Dataset.load_from_disk(str(place))
    _check_columns(row, place, data.column_names)
    columns = [name for name in (row.text_a, row.text_b, row.label, *ID_COLUMNS) if name in data.column_names]
    if row.label_optional and row.label in columns and set(data.unique(row.label)) <= {-1, None}:
        columns.remove(row.label)  # the hub's way to say that a test set has no labels
    names = getattr(data.features.get(row.label), "names", None)
    for number, cells in enumerate(data.select_columns(columns)):
        if names and isinstance(index := cells.get(row.label), int):
            cells[row.label] = names[index] if 0 <= index < len(names) else None
        yield place, number, cells


FORMATS = {
    ".tsv": _tsv,
    ".txt": _tsv,
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".parquet": _hugging_face,
    ".json": _hugging_face,
}
