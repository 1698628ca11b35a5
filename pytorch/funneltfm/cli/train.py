"""`funneltfm train`: train any encoder on any pipeline."""

from collections.abc import Sequence

from funneltfm.cli.flags import FlagParser
from funneltfm.training.train_config import ELSEWHERE, TRAIN_GROUPS, make_train_args


def main(argv: Sequence[str]) -> None:
    parser = FlagParser(
        TRAIN_GROUPS,
        elsewhere=ELSEWHERE,
        prog="funneltfm train",
        description="Train any encoder on any pipeline.",
    )
    flags, given = parser.parse(argv)
    args = make_train_args(**{name: flags[name] for name in given})

    from funneltfm.training.train import run  # torch and Lightning, only now

    run(args)
