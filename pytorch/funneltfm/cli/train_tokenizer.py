"""`funneltfm train-tokenizer TEXT... -o FOLDER`: learn a tokenizer from texts."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from funneltfm.cli.flags import FlagParser
from funneltfm.data.vocabulary import TokenizerFlags
from funneltfm.training.config import typed_args


@dataclass(frozen=True, kw_only=True)
class TextFlags:
    """The texts"""

    input_columns: tuple[str, ...] = ("text",)
    """Columns with texts: a, a:b (two joined), +a (a list joined), *a (a list). Text files have one, text."""
    dataset_config: str | None = None
    """Configuration of sources on the hub."""
    bad_rows: Literal["error", "skip"] = "error"
    """What to do with a broken row of a text file: stop, or skip it and say how many were skipped."""
    overwrite: bool = False
    """Replace the folder if it holds a tokenizer, and nothing else."""
    debug: bool = False
    """Show where in the code an error arises."""


def main(argv: Sequence[str]) -> None:
    groups = [("The tokenizer", TokenizerFlags, ()), ("The texts", TextFlags, ())]
    parser = FlagParser(
        groups,
        prog="funneltfm train-tokenizer",
        usage="funneltfm train-tokenizer [flags] -o FOLDER TEXT [TEXT ...]",
        description="Learn a tokenizer from texts: a folder that AutoTokenizer and `funneltfm train` load.",
        config_file=False,
    )
    parser.add_argument("sources", nargs="+", metavar="TEXT", help="files, dataset folders or names, as for `train`")
    parser.add_argument("-o", "--output", required=True, help="folder to write; it appears whole or not at all")
    flags, given = parser.parse(argv)
    sources, output = flags["sources"], Path(flags["output"])
    args = typed_args(groups, "train-tokenizer", {name: flags[name] for name in given})

    from funneltfm.data.columns import texts_of
    from funneltfm.data.sources import stream_rows
    from funneltfm.data.vocabulary import check_folder, train_tokenizer, write_tokenizer

    def texts() -> Iterator[str]:
        for source in sources:
            rows = stream_rows(source, args.dataset_config, buffer=0, bad_rows=args.bad_rows)
            for number, row in enumerate(rows, 1):
                yield from texts_of(row, args.input_columns, f"{source}, row {number}")

    check_folder(output, args.overwrite)
    start = time.perf_counter()
    tokenizer = train_tokenizer(texts, args)
    write_tokenizer(tokenizer, output, args.overwrite)
    print(f"{output}: {len(tokenizer)} pieces ({args.type}), {time.perf_counter() - start:.0f} s")
