"""A search for the hyper-parameters of finetuning, task by task, with Optuna; the best are written to a YAML file.

    search:
      glue: the name of an experiment with glue, whose model and flags are searched from
      holdout: share of the training data on which trials are compared (default 0.1)
      tasks:
        cola: {trials: 30, learning_rate: {low: 1e-6, high: 1e-2, log: true}, max_steps: {low: 100, high: 5000},
               num_warmup_steps: [0, 0.1]}

A flag is drawn from a range (low, high, with log or not; whole numbers where both ends are) or from a list. Trials
train on the rest of the training data and are compared on what is held out of it, so that the validation set, on which
GLUE is reported, has no part in the choice. Every trial is a run, NAME-TASK-trial_N. The search goes on where it was
cut short.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from funneltfm.errors import Diverged, InputError
from funneltfm.experiments.glue import GLUE, data_flags, task_flags, validation, with_end, write_data
from funneltfm.experiments.registry import Experiment
from funneltfm.files import read_json, write_text
from funneltfm.training.config import flag_fields
from funneltfm.training.train_config import TRAIN_GROUPS

if TYPE_CHECKING:
    from funneltfm.experiments.runner import Runner

log = logging.getLogger(__name__)
_KEYS = ("glue", "holdout", "tasks", "seed")
_RANGE = {"low", "high", "log"}
Data = dict[str, Path]  # of a split
Choice = tuple[str, tuple[Any, ...]]  # ("float", (low, high, log)), ("int", (low, high, log)), ("list", values)


def search(runner: "Runner", experiment: Experiment) -> None:
    """All trials of all tasks, and output_dir/experiments/NAME.best.yaml."""
    spaces, source, holdout = _read(runner, experiment)
    path = runner.output / "experiments" / f"{experiment.name}.best.yaml"
    best: dict[str, Any] = {}
    for task, (trials, space) in spaces.items():
        if runner.settings.tasks is not None and task not in runner.settings.tasks:
            continue
        ((_, _, flags),) = task_flags(runner, source, (task,)).values()
        if runner.settings.dry_run:
            print(f"# {experiment.name}: {trials} trials of {task}: {space}")
            continue
        whole = write_data(task, runner.settings.data_dir, runner.settings.glue_hub, runner.output / "data" / "glue")
        data = hold_out(whole["train"], holdout, runner.output / "data" / experiment.name / task)
        best[task] = _search_task(runner, experiment, task, flags, (trials, space), data)
        there = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
        write_text(path, yaml.safe_dump(there | best, sort_keys=True))
        log.info("%s: best for %s: %s (in %s)", experiment.name, task, best[task], path)


def _search_task(
    runner: "Runner",
    experiment: Experiment,
    task: str,
    flags: Mapping[str, Any],
    wanted: tuple[int, dict[str, Choice]],
    data: Data,
) -> dict[str, Any]:
    """The flags of the best trial."""
    try:
        import optuna
    except ImportError as error:
        raise InputError(f"a search needs Optuna ({error}): pip install 'funneltfm[tune]'.") from error
    trials, space = wanted
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seed = experiment.search.get("seed", 1337)
    # Trial n is a function of (seed, the trials before), so that a search that is called again asks for the same ones,
    # finds their runs finished, and goes on from there.
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    for number in range(trials):
        trial = study.ask()
        drawn = {name: _draw(trial, name, choice) for name, choice in space.items()}
        name = f"{experiment.name}-{task}-trial_{number + 1}"
        try:
            value = _trial(runner, experiment, task, name, with_end(flags, drawn), data)
        except Diverged:
            log.warning("%s has diverged with %s, and counts as failed", name, drawn)
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        log.info("%s: %.4f with %s", name, value, drawn)
        study.tell(trial, value)
    if not any(trial.value is not None for trial in study.trials):
        raise InputError(f"{experiment.name}: every trial of {task} diverged. Lower the ranges, learning_rate first.")
    return dict(study.best_params)


def _trial(runner: "Runner", experiment: Experiment, task: str, name: str, flags: dict[str, Any], data: Data) -> float:
    """The score of a trial on what is held out."""
    runner.train(experiment, name, flags | validation(flags) | data_flags(task, data))
    for kind in ("checkpoints", "pre_trained_models"):
        shutil.rmtree(runner.output / kind / name, ignore_errors=True)
    return read_json(runner.results(name), "the results of")["valid"][f"seq_class/{GLUE[task].monitor}"]


def hold_out(train: Path, share: float, folder: Path) -> Data:
    """Split jsonl into rows to train on and rows to compare on ("valid"): every so many-th is held out."""
    lines = train.read_text(encoding="utf-8").splitlines(keepends=True)
    every = round(1 / share)
    if len(lines) <= every:
        raise InputError(f"{train} has {len(lines)} rows, of which a share of {share} is none. Raise holdout.")
    parts = [line for i, line in enumerate(lines) if i % every], lines[::every]
    paths = {"train": folder / "train.jsonl", "valid": folder / "held_out.jsonl"}
    for path, part in zip(paths.values(), parts, strict=True):
        text = "".join(part)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
    return paths


def _draw(trial: Any, name: str, choice: Choice) -> Any:
    kind, values = choice
    if kind == "list":
        return trial.suggest_categorical(name, list(values))
    low, high, log_scale = values
    suggest = trial.suggest_int if kind == "int" else trial.suggest_float
    return suggest(name, low, high, log=log_scale)


# ---- what is asked for


def _read(
    runner: "Runner", experiment: Experiment
) -> tuple[dict[str, tuple[int, dict[str, Choice]]], Experiment, float]:
    """Trials and space of each task, the experiment that is searched from, and the share that is held out."""
    asked, name = experiment.search, experiment.name
    if unknown := sorted(set(asked) - set(_KEYS)):
        raise InputError(f"{name}: search: unknown key {unknown[0]!r}; there are {', '.join(_KEYS)}.")
    if not isinstance(asked.get("tasks"), dict) or not asked["tasks"] or not isinstance(asked.get("glue"), str):
        raise InputError(f"{name}: search needs glue, the name of an experiment, and tasks, each with trials.")
    source = runner.experiments.get(asked["glue"])
    holdout = asked.get("holdout", 0.1)
    if not isinstance(holdout, float) or not 0 < holdout <= 0.5:
        raise InputError(f"{name}: holdout must be more than 0 and at most 0.5; got {holdout!r}.")
    spaces = {}
    for task, own in asked["tasks"].items():
        if task not in GLUE or task not in (source.glue.get("tasks") or {}):
            raise InputError(f"{name}: search: {source.name} has no GLUE task {task!r}.")
        trials = own.get("trials")
        if not isinstance(trials, int) or trials < 1:
            raise InputError(f"{name}: search: {task}: trials must be at least 1; got {trials!r}.")
        space = {key: _choice(f"{name}: search: {task}", key, value) for key, value in own.items() if key != "trials"}
        if not space:
            raise InputError(f"{name}: search: {task} has no flag to search for, such as learning_rate.")
        spaces[task] = (trials, space)
    return spaces, source, holdout


def _choice(where: str, flag: str, value: Any) -> Choice:
    if flag not in flag_fields(TRAIN_GROUPS):
        raise InputError(f"{where}: {flag!r} is no flag of `funneltfm train`.")
    if isinstance(value, list) and value:
        return "list", tuple(value)
    if isinstance(value, dict) and {"low", "high"} <= set(value) <= _RANGE:
        try:
            low, high = (one if isinstance(one, int) else float(one) for one in (value["low"], value["high"]))
        except (TypeError, ValueError):
            low = high = 0
        if low < high:
            whole = isinstance(low, int) and isinstance(high, int)
            return ("int" if whole else "float"), (low, high, bool(value.get("log", False)))
    raise InputError(
        f"{where}: {flag} needs a list of values, or low and high (low below high) and log; got {value!r}."
    )
