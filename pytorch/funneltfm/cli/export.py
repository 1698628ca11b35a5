"""`funneltfm export RUN DST`: a finetuned model as a folder that plain `transformers` loads, or a sparse one small."""

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

    to: Literal["hf", "compact"] = "hf"
    """hf: what transformers reads, of a run of classify (its own Funnel classes) or of a compact folder. compact: of a
    sparse model of train, a bit for each weight and the values that are on."""
    values: Literal["fp32", "fp16"] = "fp32"
    """Numbers in a compact folder; fp16 rounds them."""
    overwrite: bool = False
    """Replace the target if it exists."""
    debug: bool = False
    """Show where in the code an error arises."""


def main(argv: Sequence[str]) -> None:
    parser = FlagParser(
        [("Export", ExportFlags, ())],
        prog="funneltfm export",
        usage="funneltfm export [flags] RUN DST",
        description="Write a finetuned model so that transformers serves it without this package, or a sparse model "
        "small.",
        config_file=False,
    )
    parser.add_argument("run", help="folder of a run (exp/CoLA/run_1), or the `best` folder in it, or of a model")
    parser.add_argument("target", help="folder to write; it appears whole or not at all")
    flags, _ = parser.parse(argv)
    if flags["values"] != "fp32" and flags["to"] != "compact":
        parser.error("--values is for --to=compact")
    best, target = Path(flags["run"]), Path(flags["target"])
    best = best / "best" if (best / "best").is_dir() else best
    if (best / "text_config.json").is_file():
        _export_run(best, target, flags)
    else:
        _export_sparse(best, target, flags)


def _export_sparse(source: Path, target: Path, flags: dict[str, Any]) -> None:
    from funneltfm.sparse.export import COMPACT, compact_folder, expand_folder

    if not (source / "config.json").is_file():
        tasks = sorted(path.parent.name for path in source.glob("*/config.json"))
        hint = "Name the folder of a run, or of a model."
        if tasks:
            hint = f"It has models of {', '.join(tasks)}: name the folder of one."
        raise InputError(
            f"{source} is no finetuned model: it has neither the text_config.json of a run of classify nor a "
            f"config.json. {hint}"
        )
    if flags["to"] == "compact":
        compact_folder(source, target, flags["values"], flags["overwrite"])
    elif (source / COMPACT).is_file():
        expand_folder(source, target, flags["overwrite"])
    else:
        raise InputError(
            f"{source} is a folder that transformers reads, as it is. --to=compact makes a sparse one small."
        )
    before, after = (sum(path.stat().st_size for path in _weights(folder)) for folder in (source, target))
    print(f"{target}: {after:,} bytes of weights; {source} has {before:,}, {before / after:.2f} times as many")


def _weights(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]


def _export_run(best: Path, target: Path, flags: dict[str, Any]) -> None:
    if flags["to"] != "hf":
        raise InputError(f"{best} is a model of classify, which is dense: compact is for sparse models of train.")

    from funneltfm.data.export import name_labels, write_hf_tokenizer
    from funneltfm.funnel.formats import convert_checkpoint
    from funneltfm.training.rundir import read_labels

    text_config = best / "text_config.json"
    text = _read_text_config(text_config)
    vocabulary = existing_file(best / text["vocabulary"], f"the vocabulary that {text_config} names,")

    def finish(folder: Path) -> None:
        name_labels(read_labels(best / "model.pt"), folder)
        write_hf_tokenizer(vocabulary, text["tokenizer_type"], text["cased"], text["max_length"], folder)

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
