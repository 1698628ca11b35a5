"""Split a text corpus into train.jsonl and valid.jsonl by lot, document by document.

    python data-scripts/split_corpus.py data/wiki_books wikimedia/wikipedia/train:20231101.en books.parquet

SOURCE is a file, a folder of the datasets library, or OWNER/NAME/SPLIT[:CONFIG] on the Hugging Face hub, as
`funneltfm train` reads them; several are put one after another. Each row needs a column of text. Needs this package,
for the hub and parquet its extra `datasets`.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

import numpy as np

from funneltfm.data.sources import stream_rows
from funneltfm.errors import InputError
from funneltfm.files import atomic_path


def split(folder: Path, sources: list[str], column: str, valid: float, seed: int) -> dict[str, int]:
    """Write both files, whole or not at all; returns the number of documents in each."""
    if not 0 < valid < 1:
        raise InputError(f"--valid must be between 0 and 1; got {valid}.")
    rng, counts = np.random.default_rng(seed), {"train": 0, "valid": 0}
    with contextlib.ExitStack() as stack:
        paths = {name: stack.enter_context(atomic_path(folder / f"{name}.jsonl")) for name in counts}
        files = {name: stack.enter_context(open(path, "w", encoding="utf-8")) for name, path in paths.items()}
        for source in sources:
            name, _, config = source.partition(":") if not Path(source).exists() else (source, "", "")
            for number, row in enumerate(stream_rows(name, config or None, buffer=0), 1):
                if not isinstance(row.get(column), str):
                    raise InputError(
                        f"{source}, row {number}: expected text in the column {column!r}, got {row.get(column)!r:.80}; "
                        f"its columns are {', '.join(row)}. Name the right one with --column."
                    )
                part = "valid" if rng.random() < valid else "train"
                files[part].write(json.dumps({"text": row[column]}, ensure_ascii=False) + "\n")
                counts[part] += 1
        if not all(counts.values()):
            raise InputError(f"of so few documents ({sum(counts.values())}) one part got none; raise --valid.")
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where train.jsonl and valid.jsonl go")
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="where the documents are")
    parser.add_argument("--column", default="text", help="column of the text (default text)")
    parser.add_argument("--valid", type=float, default=0.05, help="share that is held out (default 0.05)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the lot (default 0)")
    args = parser.parse_args()
    try:
        counts = split(args.folder, args.sources, args.column, args.valid, args.seed)
    except (InputError, OSError) as error:
        print(f"split_corpus: error: {error}", file=sys.stderr)
        return 1
    print(", ".join(f"{name}: {count} documents" for name, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
