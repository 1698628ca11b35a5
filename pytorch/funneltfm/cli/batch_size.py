"""`funneltfm batch-size`: the largest training batch that fits, for models and lengths."""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from funneltfm.cli.flags import BadFlag, FlagParser, whole_number
from funneltfm.errors import InputError
from funneltfm.files import write_json
from funneltfm.funnel.config import ModelConfig
from funneltfm.training.config import DeviceFlags, TrainFlags, size_beside


@dataclass(frozen=True, kw_only=True)
class BatchSizeFlags:
    """What is looked for"""

    model_size: str | None = None
    """Sizes by name, separated by commas (B8-8-8H1024,B10-10-10H1024), as they were published: with separate_cls,
    pool_q_only and truncate_seq. Default: the one model of the flags below.
    """
    lengths: str = "64,128,256,512"
    """Lengths of the examples in tokens, separated by commas; batches are padded to the canonical length."""
    memory_limit: float | None = None
    """Memory in GiB that training may take. On a GPU it is what PyTorch takes, by default all that the GPU has. On
    the CPU it must be given, and is the resident memory of a whole process: weights, optimizer, activations, and
    torch itself (about half a GiB).
    """
    max_batch: int = 1024
    """Larger batches are not looked for; a + in the table says that they may fit."""
    output: str | None = None
    """JSON file to write: the table with peaks and all trials."""
    debug: bool = False
    """Show where in the code an error arises."""


def _without(cls: type, *names: str) -> tuple[str, ...]:
    """The fields of a dataclass but for these."""
    return tuple(field.name for field in dataclasses.fields(cls) if field.name not in names)


_TRAIN = ("gradient_checkpointing", "accumulate_grad_batches")
_DEVICE = ("device_id", "fp16", "bf16", "amp_opt")
_GROUPS = (
    ("What is looked for", BatchSizeFlags, ()),
    ("Training", TrainFlags, _without(TrainFlags, *_TRAIN)),
    ("Device and precision", DeviceFlags, _without(DeviceFlags, *_DEVICE)),
    ("The model", ModelConfig, ("seg_id_cls", "pad_id", "decoder_size")),  # these change no classifier's memory
)


def main(argv: Sequence[str]) -> None:
    parser = FlagParser(
        _GROUPS,
        prog="funneltfm batch-size",
        description="Find the largest training batches that fit, by training: two steps of finetuning for each size "
        "that is tried. In a run data, validation and checkpoints come on top, and on the CPU the peak varies by a few "
        "percent: leave a little room.",
        config_file=False,
    )
    flags, given = parser.parse(argv)
    models = _models(flags, given)
    lengths = _lengths(flags["lengths"])
    output = Path(flags["output"]) if flags["output"] else None
    if output is not None and output.is_dir():
        raise InputError(f"output must be a file to write; {output} is a folder.")

    from funneltfm.training.batch_size import find_batch_sizes  # torch and Lightning, only now

    train_flags = {name: flags[name] for name in (*_TRAIN, *_DEVICE) if name in given}
    guideline = find_batch_sizes(models, lengths, flags["memory_limit"], flags["max_batch"], **train_flags)
    print(guideline)
    if output is not None:
        write_json(output, guideline.to_dict())


def _models(flags: dict[str, Any], given: frozenset[str]) -> dict[str, ModelConfig]:
    """The models to look at, by name."""
    keys = {name: flags[name] for name in ModelConfig.names() if name in given}
    if flags["model_size"] is None:
        configs = [ModelConfig(**keys)]
    else:
        configs = []
        for name in flags["model_size"].split(","):
            size_beside(name.strip(), keys)
            configs.append(ModelConfig.from_size(name.strip(), **keys))
    return {f"B{config.block_size.replace('_', '-')}H{config.d_model}": config for config in configs}


def _lengths(text: str) -> list[int]:
    try:
        return [whole_number(word) for word in text.split(",")]
    except argparse.ArgumentTypeError:
        raise BadFlag(f"lengths must be whole numbers separated by commas, as in 64,128; got {text!r}.") from None
