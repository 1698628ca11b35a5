"""`funneltfm classify`: finetune a FunnelTFM on text classification; with --pre_trained_model, any encoder."""

from collections.abc import Sequence

from funneltfm.cli import train
from funneltfm.cli.flags import FlagParser
from funneltfm.training.config import GROUPS, make_args


def main(argv: Sequence[str]) -> None:
    if any(word.partition("=")[0] == "--pre_trained_model" for word in argv):
        return train.main(["--pipeline=seq_class", *argv])
    parser = FlagParser(
        GROUPS,
        elsewhere={"deepspeed": "what DeepSpeed shards, --strategy=fsdp does too, without another package"},
        prog="funneltfm classify",
        description="Finetune a Funnel-Transformer on text classification. With --pre_trained_model, an encoder of "
        "transformers: flags are then those of `funneltfm train --pipeline seq_class`.",
    )
    flags, given = parser.parse(argv)
    args = make_args(**{name: flags[name] for name in given})

    from funneltfm.training.classify import run  # torch and Lightning, only now

    run(args)
