"""`funneltfm convert-lsg`: a checkpoint of transformers becomes an LSG model for long texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from funneltfm.cli.flags import BadFlag, FlagParser
from funneltfm.errors import brief


@dataclass(frozen=True, kw_only=True)
class ConvertLSGFlags:
    """Conversion"""

    initial_model: str = ""
    """The checkpoint: a folder, or a name on the Hugging Face hub. Required."""
    model_name: str = ""
    """The folder to write; it appears whole or not at all. Required."""
    max_sequence_length: int = 4096
    """Tokens that the model can take; the source's positions are repeated."""
    architecture: str | None = None
    """Class of the model, BertForSequenceClassification for instance. Default: the one in the source's config."""
    random_global_init: bool = False
    """Draw the global tokens from the distribution of the word embeddings."""
    global_positional_stride: int = 64
    """Distance of the positions of successive global tokens. Divides 512."""
    keep_first_global_token: bool = False
    """Of an LSG source: keep the first global token, and make the others anew."""
    resize_lsg: bool = False
    """Of an LSG source: keep all global tokens, and change the number of positions only."""
    model_kwargs: str = "{}"
    """Keys of the config: YAML or JSON, {sparsity_type: pooling, block_size: 64}, or key=value pairs, or a file of
    either. `funneltfm lsg-pattern --help` explains LSG's."""
    use_token_ids: bool = True
    """Add the first token type to the global tokens (albert, bert, electra)."""
    use_auth_token: bool = False
    """Use the token that is stored for the Hugging Face hub."""
    run_test: bool = False
    """Read the written folder back, run it on short and long random texts, and compare."""
    seed: int = 123
    """Of what is random: global tokens, heads that the source has not."""
    overwrite: bool = False
    """Replace the target if it exists."""
    debug: bool = False
    """Show where in the code an error arises."""


def main(argv: Sequence[str]) -> None:
    if len(argv) == 1 and argv[0].endswith(".json"):  # as the original takes it
        argv = ["--config", argv[0]]
    parser = FlagParser(
        [("Conversion", ConvertLSGFlags, ())],
        prog="funneltfm convert-lsg",
        description="Convert a checkpoint of transformers into an LSG model. A single .json of flags is taken too.",
    )
    flags, _ = parser.parse(argv)
    for name in ("initial_model", "model_name"):
        if not flags[name]:
            parser.error(f"--{name} is required")
    model_kwargs = read_model_kwargs(flags["model_kwargs"])

    from funneltfm.files import check_target
    from funneltfm.lsg.convert import LSGConverter, check_converted, save_converted

    target = Path(flags["model_name"])
    check_target(target, flags["overwrite"])
    names = (
        "max_sequence_length", "random_global_init", "global_positional_stride", "keep_first_global_token",
        "resize_lsg", "use_token_ids", "seed",
    )  # fmt: skip
    converter = LSGConverter(**{name: flags[name] for name in names})
    model, tokenizer = converter.convert_from_pretrained(
        flags["initial_model"], flags["architecture"], flags["use_auth_token"], **model_kwargs
    )
    save_converted(model, tokenizer, target, flags["overwrite"])
    print(f"{target}: {type(model).__name__} for {flags['max_sequence_length']} tokens")
    if flags["run_test"]:
        print("\n".join(check_converted(target, flags["initial_model"], model)))


def read_model_kwargs(text: str) -> dict[str, Any]:
    """Keys of a config from {YAML or JSON}, from key=value pairs with blanks or commas between them, or from a file."""
    text = text.strip()
    if Path(text).suffix in (".json", ".yaml", ".yml") and "=" not in text:
        try:
            text = Path(text).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise BadFlag(f"--model_kwargs: cannot read {brief(text)}: {error}.") from error
    elif text and not text.startswith("{"):
        pairs = text.replace(",", " ").split()
        if bad := [pair for pair in pairs if not pair.partition("=")[0] or "=" not in pair]:
            raise BadFlag(f"--model_kwargs must be {{key: value}} or key=value pairs, got {brief(repr(bad[0]))}.")
        text = "\n".join(f"{name}: {value}" for name, _, value in (pair.partition("=") for pair in pairs))
        if len({pair.partition("=")[0] for pair in pairs}) < len(pairs):
            raise BadFlag(f"--model_kwargs has a key twice in {brief(repr(text))}.")
    try:
        values = yaml.safe_load(text or "{}")
    except yaml.YAMLError as error:
        raise BadFlag(f"--model_kwargs is neither YAML nor JSON: {brief(str(error), 300)}.") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise BadFlag(f"--model_kwargs must give values to keys, {{key: value}}; got {brief(repr(values))}.")
    return {name: None if value == "None" else value for name, value in values.items()}
