"""`funneltfm curves RUN`: the curves of a run, finished or not, as a picture."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from funneltfm.cli.flags import FlagParser
from funneltfm.errors import InputError, brief
from funneltfm.files import existing_file

_MOST = 12  # panels of a picture where none were asked for


@dataclass(frozen=True, kw_only=True)
class CurveFlags:
    """The picture"""

    scores: tuple[str, ...] | None = None
    """What to draw, such as loss token_detection/f1 masked_lm/perplexity lr. Default: what was measured in training
    and validation, those of single classes left out; 12 at most.
    """
    debug: bool = False
    """Show where in the code an error arises."""


def main(argv: Sequence[str]) -> None:
    parser = FlagParser(
        [("The picture", CurveFlags, ())],
        prog="funneltfm curves",
        usage="funneltfm curves [flags] RUN",
        description="Draw the scores of a run over its steps.",
        config_file=False,
    )
    parser.add_argument("run", help="a folder with metrics.csv: outputs/runs/NAME, or one of `funneltfm classify`")
    parser.add_argument("-o", "--output", help="file to write (default: curves.png in the folder)")
    flags, _ = parser.parse(argv)

    from funneltfm.training.plots import score_curves, score_of

    table = existing_file(Path(flags["run"]) / "metrics.csv", "the scores of the run,")
    rows = _read(table)
    columns = dict.fromkeys(column for row in rows for column in row if column not in ("step", "epoch"))
    known = dict.fromkeys(map(score_of, columns))
    if unknown := [score for score in flags["scores"] or () if score not in known]:
        raise InputError(f"{table} has no {', '.join(unknown)}. It has {brief(', '.join(known), 1000)}.")
    plain = [score for score in known if "_class_" not in score and score != "lr" and not score.endswith("_per_second")]
    scores = list(flags["scores"] or plain[:_MOST])
    if not scores:
        raise InputError(f"{table} has no scores to draw yet. Wait for the first line of the log.")
    output = Path(flags["output"] or table.with_name("curves.png"))
    score_curves(rows, scores, output)
    print(f"{output}: {', '.join(scores)}")


def _read(table: Path) -> list[dict[str, float]]:
    """The rows, without what they lack."""
    with open(table, newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    try:
        return [{name: float(value) for name, value in row.items() if value} for row in rows]
    except (TypeError, ValueError) as error:
        raise InputError(f"{table} must be a table of numbers, as a run writes it: {brief(str(error))}.") from error
