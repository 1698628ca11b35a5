"""`funneltfm classify`: finetune a FunnelTFM on text classification."""

from collections.abc import Sequence

from funneltfm.cli.flags import FlagParser
from funneltfm.training.config import GROUPS, make_args


def main(argv: Sequence[str]) -> None:
    parser = FlagParser(
        GROUPS, prog="funneltfm classify", description="Finetune a Funnel-Transformer on text classification."
    )
    flags, given = parser.parse(argv)
    args = make_args(**flags)
    args.given = given

    from funneltfm.training.classify import run  # torch and Lightning, only now

    run(args)
