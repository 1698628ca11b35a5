"""Tables of what experiments have scored, beside the rows of the project that they repeat: Markdown and CSV."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from funneltfm.experiments.glue import GLUE, results_path
from funneltfm.files import read_json, write_text

if TYPE_CHECKING:
    from funneltfm.experiments.runner import Runner

ORIGINAL = Path(__file__).with_name("original_glue.csv")
GLUE_COLUMNS = ("model", "of", "average_bert", "average_glue", *GLUE, "mlm_loss", "note")
_STATISTICS = {"mean": "mean over runs", "max": "best run", "std": "spread (standard deviation)"}
Row = dict[str, str]


def tables(runner: "Runner") -> str:
    """Write output_dir/experiments/{masked_lm,glue}.{md,csv} and return both tables as Markdown."""
    found = []
    for name, rows in (("masked_lm", masked_lm_rows(runner)), ("glue", glue_rows(runner))):
        folder = runner.output / "experiments"
        write_text(folder / f"{name}.csv", as_csv(rows))
        write_text(folder / f"{name}.md", markdown(rows))
        found.append(markdown(rows))
    return "\n".join(found)


def masked_lm_rows(runner: "Runner") -> list[Row]:
    """Loss and perplexity of every experiment with masked language modelling that is finished, or that has a row in
    the original's table.
    """
    rows = []
    for name in runner.experiments.names:
        experiment = runner.experiments.get(name)
        stages = [stage for stage, flags in experiment.stages.items() if flags.get("pipeline") == "masked_lm"]
        for stage in stages:
            path = runner.results(experiment.run_name(stage))
            results = read_json(path, "the results of") if path.is_file() else {}
            original = experiment.original if stage == stages[0] else {}
            scored_on = next((name for name in ("valid", "test") if results.get(name)), "")
            if not scored_on and not original:
                continue
            scores = results.get(scored_on, {})
            density = results.get("density")
            rows.append(
                {
                    "model": experiment.run_name(stage),
                    "steps": str(results.get("steps", "")),
                    "sparsity": f"{1 - density['model']:.4f}" if density else "0" if results else "",
                    "scored_on": scored_on,
                    "loss": _number(scores.get("masked_lm/loss"), 3),
                    "perplexity": _number(scores.get("masked_lm/perplexity"), 3),
                    "original_loss": _number(original.get("loss"), 3),
                    "original_perplexity": _number(original.get("perplexity"), 3),
                }
            )
    return rows


def glue_rows(runner: "Runner") -> list[Row]:
    """The original's rows, then for every experiment with GLUE scores one for the mean over runs, one for the best run
    and one for the spread.
    """
    with open(ORIGINAL, newline="", encoding="utf-8") as handle:
        rows = [{"of": "original", **row} for row in csv.DictReader(handle)]
    for name in runner.experiments.names:
        path = results_path(runner, name)
        if path.is_file():
            rows += summary_rows(name, read_json(path, "the GLUE scores in"))
    return [{column: row.get(column, "") for column in GLUE_COLUMNS} for row in rows]


def summary_rows(name: str, found: dict[str, Any]) -> list[Row]:
    """Three rows of `summary`; a cell of two scores is a/b, and what was not run is empty."""
    rows = []
    for statistic, text in _STATISTICS.items():
        row = {"model": name, "of": text}
        for average in ("average_bert", "average_glue"):
            row[average] = _number(found[average].get(statistic), 2)
        for task, of_task in found["tasks"].items():
            values = [of_task[statistic][metric] for metric in GLUE[task].metrics]
            row[task] = "" if None in values else "/".join(_number(value, 2) for value in values)
        row["note"] = "" if statistic != "mean" else _runs(found["tasks"])
        rows.append(row)
    return rows


def _runs(tasks: dict[str, Any]) -> str:
    return "runs: " + " ".join(f"{task} {len(of_task['runs'])}" for task, of_task in tasks.items())


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def markdown(rows: Sequence[Row]) -> str:
    """A table with a header; empty where there are no rows."""
    if not rows:
        return ""
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    lines += ["| " + " | ".join(row.values()) + " |" for row in rows]
    return "\n".join([*lines, ""])


def as_csv(rows: Sequence[Row]) -> str:
    stream = io.StringIO()
    if rows:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return stream.getvalue()
