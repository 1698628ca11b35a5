"""`funneltfm export RUN DST`: a finetuned model as a folder that plain `transformers` loads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from funneltfm.cli.flags import FlagParser
from funneltfm.errors import InputError, brief
from funneltfm.files import existing_file, read_json


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
    text = _read_text_config(text_config)
    vocabulary = existing_file(best / text["vocabulary"], f"the vocabulary that {text_config} names,")

    def finish(folder: Path) -> None:
        name_labels(read_labels(best / "model.pt"), folder)
        write_hf_tokenizer(vocabulary, text["tokenizer_type"], text["cased"], text["max_length"], folder)

    target = Path(flags["target"])
    _, report = convert_checkpoint(best, target, to=flags["to"], kind="pt", overwrite=flags["overwrite"], finish=finish)
    print("\n".join(report))
    print(
        "Note: transformers does not pad to the canonical length, so its scores may differ slightly from those here; "
        "inputs of such a length (funneltfm.canonical_length) give the same."
    )


_TEXT_CONFIG = {"tokenizer_type": str, "cased": bool, "max_length": int, "vocabulary": str}


def _read_text_config(path: Path) -> dict[str, Any]:
    text = read_json(path, "the text config")
    fits = isinstance(text, dict) and all(type(text.get(key)) is kind for key, kind in _TEXT_CONFIG.items())
    if not fits or text["max_length"] < 1:
        raise InputError(
            f"{path} must say {', '.join(_TEXT_CONFIG)}, as a run writes them; got {brief(repr(text))}. Copy it again."
        )
    return text
