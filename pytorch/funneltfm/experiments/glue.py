"""Finetuning on GLUE as part of an experiment: nine tasks, several runs each, scores over whole validation sets.

    glue:
      model: what is finetuned, such as "{model:bert_100k}"
      flags: flags of funneltfm train, for all tasks
      tasks: {cola: {num_runs: 10, eval_steps: 75, flags of this task}, ...}
      best: YAML file of flags by task that win over both, as a search writes it
      keep_models: whether the finetuned models stay (they take much room)

Run i of a task has the seed of its flags plus i - 1. Without eval_steps a run is validated once, at its end, so that no
step is selected on the set that is reported; with it, every so many steps, and the best one is taken.
"""

import json
import logging
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from funneltfm.data.readers import DATASETS, DatasetSpec, get_dataset, read_split
from funneltfm.data.sources import open_rows
from funneltfm.errors import InputError, brief
from funneltfm.experiments.registry import Experiment, merge, typed
from funneltfm.files import read_json, write_json, write_text
from funneltfm.metrics import METRICS
from funneltfm.training.config import read_yaml

if TYPE_CHECKING:
    from funneltfm.experiments.runner import Runner

log = logging.getLogger(__name__)
Scores = dict[str, float]  # in per cent


@dataclass(frozen=True)
class GlueTask:
    """What a task is called, and how it is scored."""

    name: str
    """In data.readers."""
    columns: tuple[str, ...]
    """Of its texts on the hub."""
    metrics: tuple[str, ...]
    """In the order of the original's table; accuracy_mm is that of MNLI's mismatched set."""
    monitor: str
    """Score of `funneltfm train` that selects the best step."""

    @property
    def spec(self) -> DatasetSpec:
        return DATASETS[self.name]


SENTENCES = ("sentence1", "sentence2")
GLUE: dict[str, GlueTask] = {
    "cola": GlueTask("CoLA", ("sentence",), ("mcc",), "mcc"),
    "mnli": GlueTask("MNLI", ("premise", "hypothesis"), ("accuracy", "accuracy_mm"), "accuracy"),
    "mrpc": GlueTask("MRPC", SENTENCES, ("f1", "accuracy"), "f1_class_1"),
    "qnli": GlueTask("QNLI", ("question", "sentence"), ("accuracy",), "accuracy"),
    "qqp": GlueTask("QQP", ("question1", "question2"), ("accuracy", "f1"), "f1_class_1"),
    "rte": GlueTask("RTE", SENTENCES, ("accuracy",), "accuracy"),
    "sst2": GlueTask("SST-2", ("sentence",), ("accuracy",), "accuracy"),
    "stsb": GlueTask("STS-B", SENTENCES, ("pearson", "spearman"), "pearson"),
    "wnli": GlueTask("WNLI", SENTENCES, ("accuracy",), "accuracy"),
}
_KEYS = ("model", "flags", "tasks", "best", "keep_models")
_TASK_KEYS = ("num_runs", "eval_steps")


# ---- data


def write_data(task: str, data_dir: str, hub: str | None, folder: Path) -> dict[str, Path]:
    """Write train, valid (and valid_mm) of a task as jsonl with text_a, text_b and label; returns their paths.

    It is read from the folder of the task in data_dir/glue or data_dir: GLUE's own files, or a DatasetDict that the
    datasets library has saved; with hub from there. A file is written only if it is not there as it should be.
    """
    one = GLUE[task]
    source = None if hub is not None else _folder(one, data_dir)
    paths = {}
    for split in one.spec.splits:
        if not split.startswith("test"):
            if source is not None and not (source / "dataset_dict.json").is_file():
                rows: Iterator[dict[str, Any]] = _of_files(one, source, split)
            else:
                rows = _of_datasets(one, task, hub or source, split, on_hub=hub is not None)
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            path = paths[split] = folder / task / f"{split}.jsonl"
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                write_text(path, text)
    return paths


def _folder(one: GlueTask, data_dir: str) -> Path:
    for place in (Path(data_dir, "glue"), Path(data_dir)):
        for folder in sorted(place.iterdir()) if place.is_dir() else ():
            try:
                found = folder.is_dir() and get_dataset(folder.name) is one.spec
            except InputError:  # a folder of something else
                continue
            if found:
                return folder
    raise InputError(
        f"there is no folder of {one.name} in {data_dir}/glue or {data_dir}. Get it with `bash {one.spec.script} "
        f"{one.name}`, or name another folder with --data_dir, or read it from the hub with --glue_hub nyu-mll/glue."
    )


def _of_files(one: GlueTask, folder: Path, split: str) -> Iterator[dict[str, Any]]:
    for example in read_split(one.spec, folder, split):
        texts = {"text_a": example.text_a} | ({} if example.text_b is None else {"text_b": example.text_b})
        yield texts | {"label": example.label}


def _of_datasets(one: GlueTask, task: str, source: Any, split: str, on_hub: bool) -> Iterator[dict[str, Any]]:
    suffix = {"valid": "_matched", "valid_mm": "_mismatched"}.get(split, "") if task == "mnli" else ""
    rows = open_rows(f"{source}/{'train' if split == 'train' else 'validation'}{suffix}", task if on_hub else None)
    names = rows.class_names("label")
    for i, row in enumerate(rows):
        label = row.get("label")
        if one.spec.labels is None:
            written = str(label)
        else:  # numbers where GLUE's files have numbers, else names
            named = names[label] if names is not None and isinstance(label, int) and label >= 0 else str(label)
            written = named if named in one.spec.labels else str(label)
            if written not in one.spec.labels:
                raise InputError(f"{rows.where(i)}: expected a label of {', '.join(one.spec.labels)}, got {label!r}.")
        yield {f"text_{x}": row[column] for x, column in zip("ab", one.columns, strict=False)} | {"label": written}


# ---- scores


def score(task: str, predictions: Path, data: Mapping[str, Path]) -> Scores:
    """Scores of a run in per cent, over the whole sets.

    predictions: the folder with valid.jsonl, for MNLI also test.jsonl, which is that of the mismatched set. Raises
    InputError where they are not of all rows.
    """
    one = GLUE[task]
    found: Scores = {}
    for split, file in (("valid", "valid.jsonl"), ("valid_mm", "test.jsonl")):
        if split in data:
            pred, target = _read(one, predictions / file, data[split])
            for metric in one.metrics:
                if metric.endswith("_mm") == (split == "valid_mm"):
                    found[metric] = 100 * METRICS[metric.removesuffix("_mm")](pred, target)
    return {metric: found[metric] for metric in one.metrics}


def _read(one: GlueTask, path: Path, data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and labels, (N,) each."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    labels = [json.loads(line)["label"] for line in data.read_text(encoding="utf-8").splitlines()]
    if len(rows) != len(labels):
        raise InputError(
            f"{path} has {len(rows)} predictions, {data} {len(labels)} rows: GLUE is scored over whole sets. Leave "
            f"limit_val_batches, limit_test_batches and filters out."
        )
    if one.spec.labels is None:
        return np.array([row["prediction"] for row in rows]), np.array(labels, dtype=float)
    index = {name: i for i, name in enumerate(one.spec.labels)}
    return np.array([index[str(row["prediction"])] for row in rows]), np.array([index[name] for name in labels])


def summary(runs: Mapping[str, Sequence[Scores]]) -> dict[str, Any]:
    """Of the runs of each task: mean and sample standard deviation of each score, and the scores of the best run (by
    the mean of its scores); average_bert over eight tasks without WNLI, average_glue over nine, where all are there.

    A task with two scores counts with their mean, as in the original's averages.
    """
    tasks: dict[str, Any] = {}
    for task in sorted(runs):
        scores = runs[task]
        names = GLUE[task].metrics
        tasks[task] = {
            "runs": list(scores),
            "mean": {name: statistics.fmean(one[name] for one in scores) for name in names},
            "std": {name: statistics.stdev(one[name] for one in scores) if len(scores) > 1 else None for name in names},
            "max": max(scores, key=lambda one: statistics.fmean(one.values())),
        }
    averages = {
        name: {kind: _average(tasks, kind, without) for kind in ("mean", "max")}
        for name, without in (("average_bert", {"wnli"}), ("average_glue", set[str]()))
    }
    return {"tasks": tasks} | averages


def _average(tasks: Mapping[str, Any], kind: str, without: set[str]) -> float | None:
    wanted = GLUE.keys() - without
    if not wanted <= tasks.keys():
        return None
    return statistics.fmean(statistics.fmean(tasks[task][kind].values()) for task in wanted)


# ---- finetuning


def finetune(runner: "Runner", experiment: Experiment) -> None:
    """All runs of the tasks of an experiment, and output_dir/experiments/NAME.glue.json."""
    settings, runs = runner.settings, dict[str, list[Scores]]()
    for task, (num_runs, eval_steps, flags) in task_flags(runner, experiment, settings.tasks).items():
        flags |= validation(flags, eval_steps)
        folder = runner.output / "data" / "glue"
        if settings.dry_run:
            data = {split: folder / task / f"{split}.jsonl" for split in ("train", "valid")}
        else:
            data = write_data(task, settings.data_dir, settings.glue_hub, folder)
        runs[task] = []
        for i in range(num_runs):
            name = f"{experiment.name}-{task}-run_{i + 1}"
            seed = {"seed": flags.get("seed", 1337) + i}
            runner.train(experiment, name, flags | seed | data_flags(task, data))
            if not settings.dry_run:
                runs[task].append(score(task, runner.output / "predictions" / name, data))
                if not experiment.glue.get("keep_models"):
                    for kind in ("checkpoints", "pre_trained_models"):
                        shutil.rmtree(runner.output / kind / name, ignore_errors=True)
        if not settings.dry_run:
            _write(runner, experiment, runs)


def _write(runner: "Runner", experiment: Experiment, runs: Mapping[str, Sequence[Scores]]) -> None:
    """The summary of these tasks, and of those that an earlier call has finetuned on."""
    path = results_path(runner, experiment.name)
    there = read_json(path, "the GLUE scores in")["tasks"] if path.is_file() else {}
    earlier = {task: there[task]["runs"] for task in experiment.glue["tasks"] if task in there and task not in runs}
    write_json(path, {"name": experiment.name} | summary(earlier | dict(runs)))


def results_path(runner: "Runner", name: str) -> Path:
    return runner.output / "experiments" / f"{name}.glue.json"


def task_flags(
    runner: "Runner", experiment: Experiment, tasks: Sequence[str] | None = None
) -> dict[str, tuple[int, int | None, dict[str, Any]]]:
    """For each task (or these) the number of runs, eval_steps, and the flags without those of data and validation.
    Raises InputError for what cannot be.
    """
    glue = experiment.glue
    if unknown := sorted(set(glue) - set(_KEYS)):
        raise InputError(f"{experiment.name}: glue: unknown key {unknown[0]!r}; there are {', '.join(_KEYS)}.")
    if not isinstance(glue.get("tasks"), dict) or not glue["tasks"] or "model" not in glue:
        raise InputError(f"{experiment.name}: glue needs model, and tasks with some of {', '.join(GLUE)}.")
    for task in glue["tasks"]:
        if task not in GLUE:
            raise InputError(f"{experiment.name}: there is no GLUE task {task!r}; there are {', '.join(GLUE)}.")
    best = _best(runner, experiment)
    chosen = {}
    for task, own in glue["tasks"].items():
        if tasks is None or task in tasks:
            own = merge(own or {}, best.get(task, {}))
            keys = {key: own.pop(key, None) for key in _TASK_KEYS}
            num_runs = 1 if keys["num_runs"] is None else keys["num_runs"]
            if not isinstance(num_runs, int) or num_runs < 1:
                raise InputError(f"{experiment.name}: {task}: num_runs must be at least 1; got {num_runs!r}.")
            flags = with_end(glue.get("flags") or {}, own)
            flags = typed({"pre_trained_model": glue["model"]} | flags, f"{experiment.name}: {task}")
            flags = with_end(flags, runner.overridden({}, "glue", task))
            if max(flags.get("max_steps", -1), flags.get("max_epochs", -1)) < 1:
                raise InputError(f"{experiment.name}: {task}: say how long to finetune: max_epochs or max_steps.")
            chosen[task] = (runner.settings.num_runs or num_runs, keys["eval_steps"], runner.filled(experiment, flags))
    return chosen


def _best(runner: "Runner", experiment: Experiment) -> Mapping[str, Any]:
    """What a search has found best, by task."""
    if "best" not in experiment.glue:
        return {}
    path = Path(runner.filled(experiment, {"best": experiment.glue["best"]})["best"])
    if not path.is_file():
        if runner.settings.dry_run:
            return {}
        raise InputError(
            f"{experiment.name} reads its hyper-parameters from {path}, which is not there. Run the search first "
            f"({path.name.partition('.')[0]}, if it is the one that is shipped), or write the file: task: {{flags}}."
        )
    best = read_yaml(path, "the hyper-parameters in")
    if not isinstance(best, dict) or not all(isinstance(best[task], dict) and task in GLUE for task in best):
        raise InputError(f"{path} must hold flags by GLUE task; got {brief(repr(best))}.")
    return best


def with_end(flags: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over flags; where it says how long to train, flags no longer do."""
    ends = ("max_steps", "max_epochs")
    kept = {key: value for key, value in flags.items() if key not in ends or not set(ends) & set(over)}
    return kept | dict(over)


def validation(flags: Mapping[str, Any], eval_steps: int | None = None) -> dict[str, Any]:
    """When to validate: every eval_steps, or at the end."""
    every = eval_steps or (flags["max_steps"] if flags.get("max_steps", -1) > 0 else None)
    if every is None:
        return {"check_val_every_n_epoch": flags["max_epochs"]}
    batches = every * flags.get("accumulate_grad_batches", 1)
    return {"val_check_interval": batches, "check_val_every_n_epoch": None}


def data_flags(task: str, data: Mapping[str, Path]) -> dict[str, Any]:
    """Flags of a task on data as write_data leaves them."""
    one = GLUE[task]
    flags: dict[str, Any] = {
        "pipeline": "seq_class",
        "train_dataset": [str(data["train"])],
        "valid_dataset": str(data["valid"]),
        "input_columns": ["text_a", "text_b"][: len(one.columns)],
        "monitor": f"valid/seq_class/{one.monitor}",
        "save_total_limit": 0,
    }
    if "valid_mm" in data:
        flags["test_dataset"] = str(data["valid_mm"])
    return flags | ({"regression": True} if one.spec.labels is None else {})
