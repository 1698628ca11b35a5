"""`funneltfm export RUN DST`: a finetuned model as a folder that plain `transformers` loads."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from funneltfm.cli.flags import FlagParser
from funneltfm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ExportFlags:
    """Export"""

    to: Literal["hf"] = "hf"
    """Format: transformers' own Funnel classes."""
    overwrite: bool = False
    """Replace the target if it exists."""
    debug: bool = False
    """Show where in the code an error arises."""


def main(argv: Sequence[str]) -> None:
    parser = FlagParser(
        [("Export", ExportFlags, ())],
        prog="funneltfm export",
        usage="funneltfm export [flags] RUN DST",
        description="Write a finetuned model so that transformers serves it without this package.",
        config_file=False,
    )
    parser.add_argument("run", help="folder of a run (exp/CoLA/run_1), or the `best` folder in it")
    parser.add_argument("target", help="folder to write; it appears whole or not at all")
    flags, _ = parser.parse(argv)

    from funneltfm.data.export import name_labels, write_hf_tokenizer
    from funneltfm.funnel.formats import convert_checkpoint
    from funneltfm.training.rundir import read_labels

    best = Path(flags["run"])
    best = best / "best" if (best / "best").is_dir() else best
    text_config = best / "text_config.json"
    if not text_config.is_file():
        raise InputError(f"{best} is no finetuned model: it has no text_config.json. Name the folder of a run.")
    text = json.loads(text_config.read_text(encoding="utf-8"))

    def finish(folder: Path) -> None:
        name_labels(read_labels(best / "model.pt"), folder)
        vocabulary = best / text["vocabulary"]
        write_hf_tokenizer(vocabulary, text["tokenizer_type"], text["cased"], text["max_length"], folder)

    target = Path(flags["target"])
    _, report = convert_checkpoint(best, target, to=flags["to"], kind="pt", overwrite=flags["overwrite"], finish=finish)
    print("\n".join(report))
    print(
        "Note: transformers does not pad to the canonical length, so its scores may differ slightly from those here; "
        "inputs of such a length (funneltfm.canonical_length) give the same."
    )
