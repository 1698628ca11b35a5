"""`funneltfm run`: run named experiments one after another."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from funneltfm.cli.flags import BadFlag, FlagParser
from funneltfm.experiments.registry import Experiments
from funneltfm.experiments.runner import RESERVED, Runner, Settings
from funneltfm.training.config import Group, flag_fields
from funneltfm.training.train_config import TRAIN_GROUPS


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """Which experiments, and where"""

    list_: bool = False
    """List the experiments; with names or globs those, one a line."""
    table: bool = False
    """Run nothing: print the tables of the finished experiments in output_dir, beside the original's rows."""
    dry_run: bool = False
    """Run nothing: print the `funneltfm train` commands that the experiments stand for."""
    file: tuple[str, ...] = ()
    """YAML files with experiments of your own; they may extend those that are here."""
    data_dir: str = "data"
    """Folder of the data: what {data_dir} means in experiments. GLUE is in its folder glue, or in it."""
    output_dir: str = "outputs"
    """Folder of the runs, as of `funneltfm train`; tables and records are in its folder experiments."""
    tasks: tuple[str, ...] | None = None
    """GLUE tasks to finetune on (cola mnli mrpc qnli qqp rte sst2 stsb wnli). Default: all that an experiment has."""
    num_runs: int | None = None
    """Runs for each GLUE task, with a seed each. Default: as many as an experiment says for the task."""
    glue_hub: str | None = None
    """Read GLUE from the Hugging Face hub under this name, such as nyu-mll/glue, and not from data_dir."""
    overwrite: bool = False
    """Run anew what is finished or begun."""
    debug: bool = False
    """Show where in the code an error arises."""


_OWN = frozenset(name.rstrip("_") for name in RunFlags.__dataclass_fields__)
# The same flag with another meaning here, or none.
_SKIPPED = _OWN | frozenset(RESERVED)
_GROUPS: tuple[Group, ...] = (
    ("Which experiments, and where", RunFlags, ()),
    *((title, cls, tuple(flag_fields([(title, cls, ())]).keys() & _SKIPPED)) for title, cls, _ in TRAIN_GROUPS),
)


def main(argv: Sequence[str]) -> None:
    argv, by_stage = _split(argv)
    parser = _parser("funneltfm run")
    parser.add_argument("names", nargs="*", metavar="NAME", help="experiments by name, or globs such as 'glue-*'")
    names, words = _names(argv)
    flags, given = parser.parse(words)
    overrides: dict[str, dict[str, Any]] = {"": {name: flags[name] for name in given - _OWN}}
    for stage, of_stage in by_stage.items():
        values, found = _parser(f"funneltfm run --{stage}.FLAG").parse(of_stage)
        if found & _OWN:
            raise BadFlag(f"--{stage}.{min(found & _OWN)} is not about a stage: give it as --{min(found & _OWN)}.")
        overrides[stage] = {name: values[name] for name in found}
    experiments = Experiments(flags["file"])
    settings = Settings(
        overrides={stage: some for stage, some in overrides.items() if some},
        **{
            name: flags[name]
            for name in ("data_dir", "output_dir", "tasks", "num_runs", "glue_hub", "overwrite", "dry_run")
        },
    )
    if flags["list"]:
        print("\n".join(_listed(experiments, names)))
    elif flags["table"]:
        from funneltfm.experiments.tables import tables

        print(tables(Runner(experiments, settings)))
    elif not names:
        raise BadFlag("name an experiment: `funneltfm run NAME [NAME ...]`; --list shows them.")
    else:
        from funneltfm.experiments.launch import run

        run(experiments, settings, experiments.select(names))


def _parser(prog: str) -> FlagParser:
    return FlagParser(
        _GROUPS,
        prog=prog,
        usage="funneltfm run NAME [NAME ...] [flags]",
        description="Run experiments one after another, each run in a process of its own. What is finished is skipped, "
        "what was cut short goes on. Flags of `funneltfm train` are set in all stages, --STAGE.FLAG in one.",
        config_file=False,
    )


def _listed(experiments: Experiments, names: Sequence[str]) -> list[str]:
    """A line for each experiment; without names, a grid of them is one."""
    grids = {} if names else {made[0]: (grid, made) for grid, made in experiments.grids.items() if grid[0] != "_"}
    hidden = {name for _, made in grids.values() for name in made[1:]}
    lines = []
    for name in experiments.select(names or ["*"]):
        if name not in hidden:
            shown = grids[name][0] if name in grids else name
            lines.append(f"{shown:44} {' '.join(experiments.get(name).about.split())}".rstrip())
    return lines


def _names(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names come first, since flags may take several values."""
    first = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    return list(argv[:first]), list(argv[first:])


def _split(argv: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """--STAGE.FLAG VALUE ... apart from the other words."""
    rest: list[str] = []
    by_stage: dict[str, list[str]] = {}
    where = rest
    for word in argv:
        if match := re.match(r"--([\w+-]+)\.(\w+)", word):
            where = by_stage.setdefault(match[1], [])
            word = f"--{word[len(match[1]) + 3 :]}"
        elif word.startswith("-") and not re.match(r"-[0-9.]", word):
            where = rest
        where.append(word)
    return rest, by_stage
