"""`funneltfm predict`: predict with a model that `funneltfm train` has left."""

from collections.abc import Sequence

from funneltfm.cli.flags import BadFlag, FlagParser
from funneltfm.tasks.flags import GENERATION_ELSEWHERE
from funneltfm.training.train_config import PREDICT_GROUPS


def main(argv: Sequence[str]) -> None:
    parser = FlagParser(
        PREDICT_GROUPS,
        elsewhere=GENERATION_ELSEWHERE,
        prog="funneltfm predict",
        description="Predict with a trained model; columns have the names of its training data, or those of flags.",
    )
    flags, given = parser.parse(argv)
    if flags["output_file"] is None:
        raise BadFlag("--output_file is missing: where the predictions go.")

    from funneltfm.training.train import predict  # torch and Lightning, only now

    predict(**{name: flags[name] for name in given})
