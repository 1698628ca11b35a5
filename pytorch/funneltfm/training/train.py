"""Train any encoder on any pipeline: from flags to folders. `funneltfm train` is a door to it."""

import contextlib
import copy
import functools
import json
import logging
import os
import platform
import re
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning
import numpy as np
import torch
import yaml
from lightning.pytorch.callbacks import Callback, DeviceStatsMonitor, StochasticWeightAveraging
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from funneltfm.data.batching import StepSampler, TokenBudget, data_digest, eval_batches
from funneltfm.data.columns import filtered, passed
from funneltfm.data.features import Example, Features, TrainLoader, eval_loader
from funneltfm.data.kept import kept
from funneltfm.data.sources import (
    Deferred,
    Mixture,
    Rows,
    concatenate,
    config_of,
    open_rows,
    shard,
    source_digest,
    stream_rows,
)
from funneltfm.data.streaming import RowNumbers, StreamLoader
from funneltfm.data.text import Cuts, TextEncoder
from funneltfm.errors import InputError, Stopped, brief
from funneltfm.files import read_json, write_json, write_text
from funneltfm.tasks.base import Collate, Prepare, Record, Task, encode_rows, full_name, make_tasks
from funneltfm.tasks.flags import BLOCKS, GENERATION_ELSEWHERE
from funneltfm.tasks.heads import Heads, n_token_types
from funneltfm.tasks.masked_lm import Unlabelled
from funneltfm.training import ranks
from funneltfm.training.callbacks import BestCheckpoint, History, Leave, Patience, Progress, SaveRun, ValidateLast
from funneltfm.training.checkpoint_io import WholeCheckpoints, newest_whole
from funneltfm.training.config import Args, check_accumulate, flag_fields, read_yaml, typed_args
from funneltfm.training.distillation import Teachers
from funneltfm.training.launch import start_here, start_on_ray
from funneltfm.training.model_source import load_tokenizer, make_heads, model_name
from funneltfm.training.outputs import (
    Outputs,
    SaveModels,
    best_state,
    check_name,
    given_flags,
    save_final_model,
    save_model,
    write_model_cards,
)
from funneltfm.training.precision import AmpPrecision
from funneltfm.training.predictions import write_rows
from funneltfm.training.runlog import log_file, log_ranks, quiet
from funneltfm.training.sharding import ShardedStrategy
from funneltfm.training.sparse_run import density_of, sparsity_callbacks
from funneltfm.training.sparsity import GradualPruning, StaticSparsity, restore
from funneltfm.training.speed import fast
from funneltfm.training.task_module import Split, TaskModule
from funneltfm.training.train_config import (
    PREDICT_GROUPS,
    TRAIN_GROUPS,
    flag_words,
    make_predict_args,
    make_train_args,
)

log = logging.getLogger(__name__)

_HYPERPARAMETERS = "hyperparameters.json"  # beside a model: its run's flags, and what its tasks know
# Of how a run was started, which is not how it goes on.
_OF_THE_START = ("resume", "overwrite", "ckpt_path")
# Flags that change neither what is learned nor in which order, so a resumed run may have others.
_FREE_ON_RESUME = {
    *(*_OF_THE_START, "num_workers", "disable_memory_pinning", "debug", "eval_batch_size", "save_total_limit"),
    *("checkpoint_interval", "no_val_checkpointing", "no_epoch_checkpointing", "loggers", "enable_progress_bar"),
    *("predict_dataset", "predict_config", "predict_filter", "predict_shard_dataset", "profiler", "output_dir", "name"),
    *("tokenized_dir", "prepare_data_workers", "launcher"),
    *("test_dataset", "test_config", "test_filter", "test_shard_dataset", "max_time"),
}


def train(**flags: Any) -> dict[str, Any]:
    """Run with flags by name, as `funneltfm train` does from the command line; returns what results.json holds."""
    return run(make_train_args(**flags))


def run(args: Args) -> dict[str, Any]:
    """One run, or one for every seed."""
    args = copy.copy(args)
    args.name = check_name(args.name or f"{args.pipeline}-{model_name(args)}")
    if args.seeds is not None:
        return _over_seeds(args)
    outputs = Outputs(Path(args.output_dir), args.name)
    if args.launcher == "ray" and ranks.find_place(1, 0, None) is None:
        return _start_on_ray(args, outputs)
    if args.resume:
        args = with_run_flags(args, outputs)
    with _processes(args, ["train", *flag_words(given_flags(args))]) as here:
        if here:
            return _run(args, outputs)
    return json.loads(outputs.results.read_text(encoding="utf-8"))


def predict(**flags: Any) -> list[dict[str, Any]]:
    """Predict with a model that `train` has left, with the flags of `funneltfm predict`; returns the rows, and writes
    them to output_file where that is given.
    """
    for name in ("pre_trained_model", "predict_dataset"):
        if not flags.get(name):
            raise InputError(f"--{name} is missing: prediction needs a model and data.")
    typed_args(PREDICT_GROUPS, "predict", flags, GENERATION_ELSEWHERE)
    args = make_predict_args(_hyperparameters(flags["pre_trained_model"])["flags"], flags)
    output = flags.get("output_file")
    if output is not None and (Path(output).is_dir() or not Path(output).absolute().parent.is_dir()):
        raise InputError(f"--output_file={output} must be a file in a folder that is there.")
    with _processes(args, ["predict", *flag_words(flags)]) as here:
        if here:
            return _predict(args, output)
    return [] if output is None else [json.loads(line) for line in Path(output).read_text("utf-8").splitlines()]


def _start_on_ray(args: Args, outputs: Outputs) -> dict[str, Any]:
    """The run in --devices processes of a Ray cluster, which are in the folder that this process is in."""
    if not args.devices.isdigit() or args.devices == "0":
        raise InputError(f"--launcher=ray needs --devices, the number of processes in all; got {args.devices}.")
    own = {name: value for name, value in given_flags(args).items() if name not in ("launcher", "devices", "num_nodes")}
    flags = {"flags": own | {"name": args.name}, "folder": os.getcwd()}
    storage = outputs.root.absolute() / "ray"
    start_on_ray(_on_ray, flags, int(args.devices), storage, args.accelerator in ("auto", "gpu", "cuda"), args.name)
    return json.loads(outputs.results.read_text(encoding="utf-8"))


def _on_ray(config: dict[str, Any]) -> None:
    os.chdir(config["folder"])
    run(make_train_args(**config["flags"]))


@contextlib.contextmanager
def _processes(args: Args, words: Sequence[str]) -> Iterator[bool]:
    """Whether this process does the work, which the processes of a launcher do together; if more than one is wanted
    and none was launched, they are started here, and have done it.
    """
    place = ranks.find_place(1, 0, None)
    n = _devices(args)
    machines = 1 if place is None else place.size // place.local_size
    if "num_nodes" in args.given and args.num_nodes != machines:
        raise InputError(
            f"--num_nodes={args.num_nodes}, but the processes of this run are on {machines}: start the command with "
            f"torchrun --nnodes={args.num_nodes}, or SLURM."
        )
    if place is not None and args.devices != "auto" and n != place.local_size:
        raise InputError(
            f"--devices={args.devices}, but {place.local_size} processes were launched here. Leave the flag out."
        )
    if place is None and n > 1:
        start_here(list(words), n)
        yield False
        return
    cuda = torch.cuda.is_available() and args.accelerator in ("auto", "gpu", "cuda")
    device = "cpu" if _on_cpu(args) else "other"
    with ranks.joined(place, "nccl" if cuda else "gloo"), log_ranks(everyone=False), fast(args, device):
        yield True


def _over_seeds(args: Args) -> dict[str, Any]:
    """A run for every seed, and what they have in common."""
    outputs = Outputs(Path(args.output_dir), args.name)
    if outputs.config.exists():
        raise InputError(f"{outputs.run} has a run of one seed; the table of several goes there. Give another --name.")
    runs = []
    for seed in args.seeds:
        one = copy.copy(args)
        one.seed, one.seeds, one.name = seed, None, f"{args.name}-seed_{seed}"
        one.given = args.given - {"seeds"} | {"seed", "name"}
        done = Outputs(Path(args.output_dir), one.name).results
        finished = args.resume and done.is_file()
        if args.resume and not finished and not Outputs(Path(args.output_dir), one.name).run.exists():
            one.resume = False
        runs.append(json.loads(done.read_text(encoding="utf-8")) if finished else run(one))
    results: dict[str, Any] = {"name": args.name, "seeds": list(args.seeds)}
    for split in ("valid", "test"):
        scores = [one[split] for one in runs if split in one]
        results |= {split: {name: _spread([s[name] for s in scores]) for name in scores[0]}} if scores else {}
    place = ranks.find_place(1, 0, None)
    if place is not None and place.rank > 0:
        return results
    write_json(outputs.results, results)
    lines = [f"{len(runs)} seeds", "", "| split | score | mean | spread | min | max |", "|---|---|---|---|---|---|"]
    for split in ("valid", "test"):
        for name, s in results.get(split, {}).items():
            lines.append(f"| {split} | {name} | {s['mean']:.4f} | {s['std']:.4f} | {s['min']:.4f} | {s['max']:.4f} |")
    write_text(outputs.run / "results.md", "\n".join([*lines, ""]))
    log.info("\n%s", "\n".join(lines))
    return results


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and sample standard deviation."""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": std, "min": min(values), "max": max(values)}


def with_run_flags(args: Args, outputs: Outputs) -> Args:
    """Resuming needs no more than the run's name: what was not given now is taken from its config.yaml."""
    if not outputs.config.is_file():
        raise InputError(f"there is no run named {outputs.name} in {outputs.root} to go on with.")
    saved = read_yaml(outputs.config, "the flags of the run in")
    if not isinstance(saved, dict) or not all(isinstance(key, str) for key in saved):
        raise InputError(f"{outputs.config} must hold the flags of the run: `name: value` lines.")
    given, defaults = given_flags(args), flag_fields(TRAIN_GROUPS)
    for key in sorted(args.given - _FREE_ON_RESUME):
        started = saved.get(key, defaults[key].default)
        started = list(started) if isinstance(started, tuple) else started
        if given[key] not in (started, [started]):
            raise InputError(
                f"the run {outputs.name} was started with --{key}={started}, so it cannot go on with "
                f"--{key}={given[key]}. Leave the flag out, or start another run."
            )
    try:
        return make_train_args(**(saved | given))
    except InputError as error:
        raise InputError(f"in {outputs.config}: {error}") from error


def _on_cpu(args: Args) -> bool:
    other = torch.cuda.is_available() or torch.backends.mps.is_available()
    return args.accelerator == "cpu" or (args.accelerator == "auto" and not other)


def _devices(args: Args) -> int:
    """How many processes --devices asks for on this machine."""
    if args.devices in ("auto", "-1"):
        return 1 if _on_cpu(args) or args.accelerator == "mps" else max(1, torch.cuda.device_count())
    count = args.devices.strip(",").count(",") + 1 if "," in args.devices else args.devices
    try:
        return max(1, int(count))
    except ValueError as error:
        raise InputError(f"devices must be a number, numbers with commas, or auto; got {args.devices!r}.") from error


# ---- one run

_PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}


def _run(args: Args, outputs: Outputs) -> dict[str, Any]:
    lightning.seed_everything(args.seed, verbose=False)
    os.environ.pop("PL_GLOBAL_SEED", None)  # to which Lightning's strategies would put every process back
    tasks, text = _tasks(args)
    tokenizer = text.tokenizer
    splits, draw = ranks.main_first(lambda: load_splits(args, tasks, text))
    resume_from = ranks.main_decides(lambda: _resume_from(args, outputs))
    heads = ranks.main_first(lambda: make_heads(args, tasks, tokenizer))
    text.check_types(n_token_types(heads.backbone))
    restore(heads)
    teachers = None
    if args.distill_from is not None:
        teachers = ranks.main_first(lambda: Teachers(args, tasks, text))
    sparsity = [] if args.train_dataset is None else sparsity_callbacks(args, heads)
    if ranks.rank():  # every process has its own dropout; the main one goes on as a single one would
        torch.manual_seed(args.seed + ranks.rank())
    if ranks.is_main() and not args.fast_dev_run:
        outputs.prepare(args.resume, args.overwrite, resume_from)
        if args.ckpt_path is not None and not outputs.checkpoints.exists():
            best = Path(args.ckpt_path).with_name("best.ckpt")  # the best model may be one of before
            if best.is_file():
                outputs.checkpoints.mkdir(parents=True)
                shutil.copy(best, outputs.checkpoints)
        saved = {name: value for name, value in given_flags(args).items() if name not in _OF_THE_START}
        write_text(outputs.config, yaml.safe_dump(saved, sort_keys=False))
    path = outputs.run / "log.txt" if ranks.is_main() and not args.fast_dev_run else None
    with log_file(path, append=args.resume), quiet(), _loggers(args, outputs) as loggers:
        n_param = sum(p.numel() for p in heads.parameters())
        sizes = ", ".join(f"{len(split.features)} {name}" for name, split in splits.items())
        log.info("%s: %s examples; %s parameters; %s", args.name, sizes, f"{n_param:,}", outputs.run)
        module = TaskModule(heads, tasks, args, splits, teachers)
        results: dict[str, Any] = {"name": args.name, "pipeline": args.pipeline, "seed": args.seed}
        history = None
        if args.train_dataset is not None:
            facts, history = _fit(args, module, text, outputs, draw, resume_from, sparsity, loggers)
            results |= facts
        for stage in [name for name in splits if name != "train" and _limit(args, name) != 0]:
            evaluate(args, module, text, stage)
            if module.scores[stage]:
                results[stage] = module.scores[stage]
                if history is not None and stage != "valid":  # of that, history has every validation
                    scores = {f"{stage}/{name}": value for name, value in results[stage].items()}
                    history.add(results["steps"], scores, loggers)
        results |= {
            "parameters": n_param,
            **({"density": density} if (density := density_of(heads)) else {}),
            "processes": ranks.size(),
            "precision": args.precision,
            "versions": _versions(),
        }
        heads = module.whole("heads")
        if ranks.is_main() and not args.fast_dev_run:
            _write(args, heads, module, tokenizer, outputs, results)
        if ranks.is_main():
            log.info("\n%s\n", results_table(results))
    return results


def _tasks(args: Args) -> tuple[list[Task], TextEncoder]:
    tasks = make_tasks(args.pipeline, args)
    if args.train_dataset is None:  # what they would learn from it, the model's folder knows
        learners = [task for task in tasks if type(task).learn is not Task.learn]
        trained = (Path(args.pre_trained_model or "") / _HYPERPARAMETERS).is_file()
        known = _hyperparameters(args.pre_trained_model)["tasks"] if trained or learners else {}
        for task in tasks:
            if task.name in known:
                task.load_state(known[task.name])
            elif task in learners:
                raise InputError(f"{args.pre_trained_model} was trained for {', '.join(known)}, not for {task.name}.")
    tokenizer = ranks.main_first(lambda: load_tokenizer(args, tasks))
    return tasks, TextEncoder(tokenizer, args.max_sequence_length[0], token_types=args.extended_token_type_ids)


def _hyperparameters(folder: str | None) -> dict[str, Any]:
    """What `train` has written beside a model."""
    path = Path(folder or "") / _HYPERPARAMETERS
    if folder is None or not path.is_file():
        raise InputError(
            "without --train_dataset the model must be trained already: give --pre_trained_model with a folder that "
            f"`funneltfm train` has left. There is no {_HYPERPARAMETERS} in {folder or 'it'}."
        )
    content = read_json(path, "what is known of the model")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), dict) for key in ("flags", "tasks")):
        raise InputError(f"{path} must hold an object with flags and tasks, as `funneltfm train` writes it.")
    return content


def _predict(args: Args, output: str | None) -> list[dict[str, Any]]:
    tasks, text = _tasks(args)
    splits, _ = ranks.main_first(lambda: load_splits(args, tasks, text))
    module = TaskModule(make_heads(args, tasks, text.tokenizer), tasks, args, splits)
    with quiet():
        evaluate(args, module, text, "predict")
    rows: list[dict[str, Any]] = []
    for task in module.scored():
        records, features = _of_split(module, task, "predict")
        of_task = task.predict(records, features, splits["predict"].rows)
        rows += of_task if len(module.scored()) == 1 else ({"task": task.name} | row for row in of_task)
    if ranks.is_main():
        if table := results_table({"predict": module.scores["predict"]} if module.scores["predict"] else {}):
            log.info("\n%s\n", table)
        if output is not None:
            write_rows(Path(output), rows)
            log.info("wrote %s", output)
    return rows


def _resume_from(args: Args, outputs: Outputs) -> Path | None:
    if args.ckpt_path is not None:
        if not Path(args.ckpt_path).is_file():
            raise InputError(f"--ckpt_path={args.ckpt_path}: there is no such file.")
        return Path(args.ckpt_path)
    return newest_whole(outputs.resumable, {}) if args.resume else None


def load_splits(args: Args, tasks: Sequence[Task], text: TextEncoder) -> tuple[dict[str, Split], Mixture | None]:
    """The data of every stage that has some, and what an epoch is drawn from where datasets are mixed by weight."""
    if not any((args.train_dataset, args.valid_dataset, args.test_dataset, args.predict_dataset)):
        raise InputError("there is no data: give --train_dataset, --valid_dataset or --test_dataset.")
    splits: dict[str, Split] = {}
    mixture = None
    if args.streaming:
        for task in tasks:
            if not task.corrupts:
                task.learn(stream_rows(args.train_dataset, buffer=0, **_of_stream(args)))
    elif args.train_dataset is not None and args.tokenized_dir is not None:
        splits["train"] = _kept_split(args, tasks, text, "train", args.train_dataset)
    elif args.train_dataset is not None:
        parts = [_rows(args, "train", source) for source in args.train_dataset]
        rows = concatenate(parts)
        with _said_of(rows.name):
            for task in tasks:
                task.learn(rows)
        splits["train"] = Split("train", rows, encode_rows(tasks, rows, text, rows.name))
        text.cuts.tell(rows.name)
        for task in tasks:
            if not task.corrupts and not splits["train"].labelled(task):
                raise InputError(f"{rows.name} has no labels for {task.name}; training needs them. Name their column.")
        if args.train_weights is not None:
            part_of_row = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
            of_examples = part_of_row[splits["train"].features.plain["row"]]
            mixture = Mixture(of_examples, args.train_weights, [part.name for part in parts])
    for stage in ("valid", "test", "predict"):
        source = getattr(args, f"{stage}_dataset")
        if source is not None and args.tokenized_dir is not None:
            splits[stage] = _kept_split(args, tasks, text, stage, [source])
        elif source is not None:
            rows = _rows(args, stage, source)
            splits[stage] = Split(stage, rows, encode_rows(tasks, rows, text, rows.name))
            text.cuts.tell(rows.name)
    return splits, mixture


@contextlib.contextmanager
def _said_of(source: str) -> Iterator[None]:
    """Errors name the source."""
    try:
        yield
    except InputError as error:
        raise (error if source in str(error) else InputError(f"{source}: {error}")) from error


def _kept_split(args: Args, tasks: Sequence[Task], text: TextEncoder, stage: str, sources: Sequence[str]) -> Split:
    """Of tasks that read texts alone; their data are opened where --tokenized_dir has nothing of them."""
    task, text = tasks[0], replace(text, cuts=Cuts())
    assert isinstance(task, Unlabelled)
    text = task.cutting(text)
    rows = Deferred(" + ".join(sources), lambda: concatenate([_rows(args, stage, source) for source in sources]))
    key = {
        "sources": [source_digest(source, _config(args, stage, source)) for source in sources],
        "tokenizer": text.fingerprint,
        "bad_rows": args.bad_rows,
        **{name: getattr(args, f"{stage}_{name}") for name in ("filter", "shard_dataset")},
        **{name: getattr(args, name) for name in BLOCKS},
    }

    def examples() -> Iterator[Example]:
        some = (rows.select(np.arange(i, min(i + 1024, len(rows)))) for i in range(0, len(rows), 1024))
        return task.examples((texts for part in some for texts in task.texts(part, rows.name)), text)

    name = re.sub(r"\W+", "_", Path(sources[0]).stem)
    features = kept(Path(args.tokenized_dir), name, key, examples, lambda: vars(text.cuts))
    Cuts(**features.note).tell(rows.name)
    if not len(features):
        raise InputError(f"{rows.name}: no row makes an example.")
    return Split(stage, rows, features)


def _rows(args: Args, stage: str, source: str) -> Rows:
    documents = args.packing or args.sentence_pairs
    rows = open_rows(source, _config(args, stage, source), args.bad_rows, documents)
    if conditions := getattr(args, f"{stage}_filter"):
        rows = filtered(rows, conditions)
    n = getattr(args, f"{stage}_shard_dataset")
    return rows if n is None else shard(rows, n)


def _config(args: Args, stage: str, source: str) -> str | None:
    sources = args.train_dataset if stage == "train" else [source]
    return config_of(source, getattr(args, f"{stage}_config"), sources)


# ---- training


def _loading(args: Args) -> dict[str, Any]:
    pin = torch.cuda.is_available() and not args.disable_memory_pinning
    return {"num_workers": args.num_workers, "pin_memory": pin, "persistent_workers": args.num_workers > 0}


def _collate(args: Args, module: TaskModule, text: TextEncoder, teachers: Teachers | None = None) -> Collate:
    length = max(args.max_sequence_length) if args.pad_to_max_length else None
    token_types = n_token_types(module.heads.backbone) > 1 or (teachers is not None and teachers.token_types)
    return Collate(module.tasks, text.tokenizer, length, token_types=token_types)


def _batches(args: Args, module: TaskModule, features: Features, collate: Collate, size: int) -> int | TokenBudget:
    """Examples in a batch, or with --max_tokens the tokens that it may have."""
    if not args.max_tokens:
        return size
    if "parts" in features.ragged:
        raise InputError(f"--max_tokens is for one text an example; {args.pipeline} has several. Give --batch_size.")
    of_encoder = getattr(module.heads.backbone, "padded_length", int)
    return TokenBudget(args.max_tokens, lambda longest: of_encoder(collate.padded_length(longest)))


def _train_loader(
    args: Args, module: TaskModule, text: TextEncoder, draw: Mixture | None
) -> tuple[TrainLoader | StreamLoader, Sequence[str] | np.ndarray]:
    """The batches, and the names of the examples by index."""
    train = _first_batches(module.splits["train"], args)
    check_accumulate(args, len(train.features))
    collate = _collate(args, module, text, module.teachers)
    batches = StepSampler(
        train.features.lengths,
        _batches(args, module, train.features, collate, args.batch_size),
        args.seed,
        args.accumulate_grad_batches,
        ranks.rank(),
        ranks.size(),
        by_length=args.group_by_length,
        draw=None if draw is None else lambda epoch: draw.epoch(args.seed, epoch),
    )
    prepare = Prepare(module.tasks, text, args.seed)
    digest = _digest(args, module, text)
    loader = TrainLoader(train.features, collate, batches, prepare, args.seed, digest, **_loading(args))
    return loader, train.features.plain["row"]


def _digest(args: Args, module: TaskModule, text: TextEncoder) -> str:
    """Of what is learned from and what the best model is chosen by."""
    parts = (module.splits[name].features.digest() for name in ("train", "valid") if name in module.splits)
    return data_digest(text.fingerprint.encode(), *(part.encode() for part in parts))


def _of_stream(args: Args) -> dict[str, Any]:
    """How the rows of the training stream are read."""
    keep = functools.partial(passed, conditions=args.train_filter, sources=args.train_dataset)
    return {
        "config": args.train_config,
        "bad_rows": args.bad_rows,
        "documents": args.packing or args.sentence_pairs,
        "keep": keep if args.train_filter else None,
    }


def _stream_loader(
    args: Args, module: TaskModule, text: TextEncoder
) -> tuple[TrainLoader | StreamLoader, Sequence[str] | np.ndarray]:
    where = f"{' + '.join(args.train_dataset)}, in the stream"
    loader = StreamLoader(
        args.train_dataset,
        functools.partial(encode_rows, module.tasks, text=text, where=where, may_be_none=True),
        Prepare(module.tasks, text, args.seed),
        _collate(args, module, text, module.teachers),
        args.batch_size,
        args.seed,
        args.max_steps * args.accumulate_grad_batches,
        accumulate=args.accumulate_grad_batches,
        buffer=args.streaming_buffer,
        rank=ranks.rank(),
        ranks=ranks.size(),
        **_of_stream(args),
        **_loading(args),
    )
    return loader, RowNumbers(args.train_dataset)


def _fit(
    args: Args,
    module: TaskModule,
    text: TextEncoder,
    outputs: Outputs,
    draw: Mixture | None,
    resume_from: Path | None,
    sparsity: Sequence[StaticSparsity],
    loggers: list[Any],
) -> tuple[dict[str, Any], History | None]:
    """Train, and load the best weights into the module; what there is to tell about it, and where more is noted."""
    if args.max_steps < 0 and args.max_epochs is None and args.max_time is None:
        raise InputError("say how long to train: --max_epochs, --max_steps or --max_time.")
    loader, ids = _stream_loader(args, module, text) if args.streaming else _train_loader(args, module, text, draw)
    validates = "valid" in module.splits and _limit(args, "valid") != 0
    valid = [_eval_loader(args, module, text, "valid")] if validates else None
    main, lower = monitored(args, module.tasks)
    if args.early_stopping and not valid:
        raise InputError("--early_stopping needs --valid_dataset: it watches a score of the validation.")
    _check_interval(args, len(loader))
    per_epoch, total = _steps(args, len(loader))
    module.total_steps, module.steps_per_epoch = total, per_epoch
    if total is None and any(len(x) > 1 for x in (args.distill_weight, args.distill_temperature)):
        raise InputError("a distill_weight or distill_temperature that changes needs a run with an end: --max_steps.")
    advice = "lower --learning_rate, raise --num_warmup_steps, or set --gradient_clip_val"
    metrics = outputs.run / "metrics.csv" if "csv" in args.loggers else None

    def since() -> int:  # before, a model that is pruned is denser than what is wanted
        return max((one.last for one in sparsity if isinstance(one, GradualPruning)), default=0)

    history = History(metrics, total, per_epoch, args.log_every_n_steps, main, ids, advice, lower, since)
    save = SaveRun(outputs, args.checkpoint_interval or (0 if valid else per_epoch), set())
    keeps = not args.fast_dev_run and not args.barebones
    saves = keeps and args.enable_checkpointing
    module.monitor = main if valid and keeps else None
    callbacks: list[Callback] = list(sparsity)
    if keeps:
        callbacks += [history, Progress(history, args.enable_progress_bar)]
    if valid and total is not None and not args.stochastic_weight_averaging:  # whose end is that of an epoch
        callbacks.append(ValidateLast(total))
    if valid and saves:
        callbacks.append(best := _best(outputs, main, lower))
        best.since = since
    if valid and args.early_stopping:
        mode = "min" if lower else "max"
        callbacks.append(Patience(main, patience=args.patience, mode=mode, check_on_train_epoch_end=False))
    if saves:
        callbacks += [SaveModels(outputs, text.tokenizer, args), save]
    if args.stochastic_weight_averaging:
        callbacks.append(StochasticWeightAveraging(swa_lrs=args.learning_rate))
    if args.devices_stats:
        callbacks.append(DeviceStatsMonitor())
    trainer = make_trainer(
        args,
        max_epochs=args.max_epochs,
        min_epochs=args.min_epochs,
        max_steps=args.max_steps,
        min_steps=args.min_steps,
        max_time=args.max_time,
        limit_train_batches=args.limit_train_batches,
        limit_val_batches=_limit(args, "valid"),
        val_check_interval=args.val_check_interval,
        check_val_every_n_epoch=args.check_val_every_n_epoch,
        num_sanity_val_steps=None if args.barebones else args.num_sanity_val_steps,
        log_every_n_steps=None if args.barebones else args.log_every_n_steps,
        accumulate_grad_batches=args.accumulate_grad_batches,
        gradient_clip_val=args.gradient_clip_val,
        gradient_clip_algorithm=args.gradient_clip_algorithm,
        fast_dev_run=args.fast_dev_run,
        barebones=args.barebones,
        profiler=_PROFILERS[args.profiler](outputs.run, "profile") if args.profiler and keeps else args.profiler,
        enable_model_summary=args.enable_model_summary,
        callbacks=callbacks,
        logger=loggers or False,
        plugins=[WholeCheckpoints()],
    )
    try:
        with save.listening(), _said_by_lightning():
            trainer.fit(module, loader, valid, ckpt_path=resume_from, weights_only=True)
            if saves:
                save.leave_if_asked(trainer.global_step)
    except Leave as leave:
        hint = f"Saved after step {leave.step}; go on with --resume --name={args.name} --output_dir={args.output_dir}"
        raise Stopped(leave.signum, hint) from None
    except SystemExit:  # how Lightning leaves after a KeyboardInterrupt
        if not ranks.is_main():
            raise
        raise KeyboardInterrupt(f"--resume --name={args.name} goes on from the last checkpoint.") from None
    if not keeps:
        return {"steps": trainer.global_step}, None
    heads = module.whole("heads")
    if ranks.is_main():
        epoch = max(0, trainer.current_epoch - 1)
        save_final_model(heads, module.tasks, text.tokenizer, args, outputs, epoch, trainer.global_step)
    facts = {
        "steps": trainer.global_step,
        "epochs": trainer.current_epoch,
        "train_seconds": round(history.train_seconds, 2),
        "examples_per_second": round(history.examples_per_second, 1),
        "tokens_per_second": round(history.tokens_per_second, 1),
    }
    if args.stochastic_weight_averaging or not saves or not history.best:
        return facts, history
    module.load_whole(ranks.main_decides(lambda: best_state(outputs)))
    return facts | {"monitor": main, "best_step": history.best["step"], "best": history.best[main]}, history


def _first_batches(train: Split, args: Args) -> Split:
    """--overfit_batches of the training data, or all."""
    if not args.overfit_batches:
        return train
    n = _first(len(train.features), args.overfit_batches, args.batch_size)
    return Split(train.name, train.rows, train.features.take(range(n)))


def _first(n: int, limit: int | float, batch_size: int) -> int:
    """How many of n examples so many batches of each process take, or a share, which is one at least."""
    return min(n, limit * batch_size * ranks.size()) if isinstance(limit, int) else max(1, int(limit * n))


def _limit(args: Args, stage: str) -> int | None:
    """What Lightning is told: no batch of an evaluation, or all of those that `_head` leaves."""
    return 0 if _batch_limit(args, stage) == 0 else None


def _batch_limit(args: Args, stage: str) -> int | float | None:
    """Batches of an evaluation, or the share of its examples."""
    if args.fast_dev_run:
        return 1
    if stage == "valid":
        return args.overfit_batches or args.limit_val_batches
    return getattr(args, f"limit_{stage}_batches")


def _check_interval(args: Args, n_batches: int) -> None:
    """An InputError for a --val_check_interval that no epoch reaches."""
    every = args.val_check_interval
    n_batches = _limited(n_batches, args.limit_train_batches)
    if isinstance(every, int) and args.check_val_every_n_epoch is not None and every > n_batches:
        raise InputError(
            f"--val_check_interval={every}, but an epoch has {n_batches} batches. Lower it, or give "
            f"--check_val_every_n_epoch none to count batches on through all epochs."
        )


def _limited(n_batches: int, limit: int | float | None) -> int:
    if limit is None:
        return n_batches
    return min(n_batches, limit) if isinstance(limit, int) else int(n_batches * limit)


def _steps(args: Args, n_batches: int) -> tuple[int, int | None]:
    """Optimizer steps of an epoch, and of the run, where that has an end."""
    per_epoch = max(1, -(-_limited(n_batches, args.limit_train_batches) // args.accumulate_grad_batches))
    ends = [per_epoch * args.max_epochs] if args.max_epochs is not None and args.max_epochs > 0 else []
    ends += [args.max_steps] if args.max_steps > 0 else []
    return per_epoch, min(ends, default=None)


def monitored(args: Args, tasks: Sequence[Task]) -> tuple[str, bool]:
    """What selects the best model, and whether less of it is better."""
    main = args.monitor or f"valid/{full_name(tasks[0], tasks[0].main_metric)}"
    if args.monitor_direction is not None:
        return main, args.monitor_direction == "min"
    return main, main.rpartition("/")[2] in ("loss", "perplexity")


@contextlib.contextmanager
def _said_by_lightning() -> Iterator[None]:
    """What Lightning has to say about flags, in our words."""
    try:
        yield
    except MisconfigurationException as error:
        raise InputError(f"Lightning's trainer does not take these flags: {error}") from error


def _best(outputs: Outputs, main: str, lower: bool) -> BestCheckpoint:
    return BestCheckpoint(
        dirpath=outputs.checkpoints,
        filename="best",
        monitor=main,
        mode="min" if lower else "max",
        save_weights_only=True,
        enable_version_counter=False,
        save_on_train_epoch_end=False,
    )


@contextlib.contextmanager
def _loggers(args: Args, outputs: Outputs) -> Iterator[list[Any]]:
    """Loggers beside metrics.csv, which History writes; of training alone."""
    loggers: list[Any] = []
    if args.train_dataset is None or args.fast_dev_run or args.barebones:
        yield loggers
        return
    if "tensorboard" in args.loggers:
        # TensorBoard asks TensorFlow for its files, and a folder of that name (ours) is enough to confuse it.
        sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
        from lightning.pytorch.loggers import TensorBoardLogger

        try:
            loggers.append(TensorBoardLogger(outputs.root / "tensorboard", name=outputs.name))
        except ImportError as error:
            raise InputError(
                f"--loggers tensorboard needs TensorBoard: {error}: pip install 'funneltfm[tensorboard]'."
            ) from error
    if "wandb" in args.loggers:
        from lightning.pytorch.loggers import WandbLogger

        try:
            import wandb

            loggers.append(WandbLogger(name=outputs.name, save_dir=outputs.run))
            _ = loggers[-1].experiment  # which begins here
        except ImportError as error:
            raise InputError("--loggers wandb needs Weights & Biases: pip install 'funneltfm[wandb]'.") from error
        except wandb.errors.Error as error:
            raise InputError(
                f"--loggers wandb: {brief(' '.join(str(error).split()), 400)} Log in first (wandb login), or set "
                f"WANDB_MODE=offline."
            ) from error
    for logger in loggers:
        logger.log_hyperparams(given_flags(args))
    try:
        yield loggers
    finally:
        for logger in loggers:
            logger.finalize("success")  # Lightning has done so after training, but not since
        if "wandb" in args.loggers and ranks.is_main():
            wandb.finish()  # the next run of this process, of another seed, is one of its own


def make_trainer(args: Args, **kwargs: Any) -> lightning.Trainer:
    """Lightning's Trainer for the flags' devices; every process of a run makes its own."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    plugins = kwargs.pop("plugins", [])
    on_cpu = _on_cpu(args)
    numbers = [int(word) for word in args.devices.strip(",").split(",")] if "," in args.devices and not on_cpu else None
    precision: str | None = args.precision
    if args.precision == "16-mixed" and on_cpu:  # Lightning's own would silently be bf16 there
        plugins, precision = [*plugins, AmpPrecision("O1", torch.float16, "cpu")], None
    if args.strategy == "fsdp" and ranks.size() == 1:
        log.info("--strategy fsdp with one process: there is nothing to share out.")
    kwargs["strategy"] = "auto" if args.strategy == "fsdp" else args.strategy
    if ranks.size() > 1:
        kwargs |= {"num_nodes": ranks.size() // ranks.local_size(), "devices": numbers or ranks.local_size()}
        plugins = [*plugins, TorchElasticEnvironment()]
        by_name: dict[str, Any] = {"auto": "ddp", "fsdp": ShardedStrategy()}
        kwargs["strategy"] = by_name.get(args.strategy, args.strategy)
    else:
        kwargs["devices"] = 1 if args.devices == "auto" else args.devices
        plugins = [*plugins, LightningEnvironment()]
    checkpoints = {} if args.enable_checkpointing else {"enable_checkpointing": False}
    try:
        trainer = lightning.Trainer(
            accelerator=args.accelerator,
            precision=precision,  # type: ignore[arg-type]
            deterministic=args.deterministic,
            benchmark=args.benchmark or None,
            detect_anomaly=args.detect_anomaly,
            sync_batchnorm=args.sync_batchnorm,
            plugins=plugins,
            enable_progress_bar=False,
            use_distributed_sampler=False,  # StepSampler deals the examples
            inference_mode=args.inference_mode,
            **({"enable_model_summary": False, "logger": False, **checkpoints} | kwargs),
        )
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise InputError(f"Lightning's trainer does not take these flags: {error}") from error
    # Lightning's own handlers would end a run without saving, or talk to other processes out of turn: see SaveRun.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


# ---- evaluation


def _eval_loader(args: Args, module: TaskModule, text: TextEncoder, stage: str) -> Any:
    features, collate = module.splits[stage].features, _collate(args, module, text)
    size = _batches(args, module, features, collate, args.eval_batch_size or args.batch_size)
    return eval_loader(
        features,
        collate,
        size,
        ranks.rank(),
        ranks.size(),
        Prepare(module.scored(), text, args.seed),
        _head(args, module, stage, size),
        **_loading(args),
    )


def _head(args: Args, module: TaskModule, stage: str, size: int | TokenBudget) -> np.ndarray | None:
    """The examples that --limit_STAGE_batches leaves, the first of the data: batches are sorted by length, and the
    first of those would be the shortest. What is scored together comes whole.
    """
    limit, features = _batch_limit(args, stage), module.splits[stage].features
    if limit is None:
        return None
    if isinstance(size, TokenBudget):  # the mean of all its batches
        size = max(1, len(features) // len(eval_batches(features.lengths, size)))
    head = np.arange(_first(len(features), limit, size))
    for task in module.scored():
        if (groups := task.groups(features)) is not None:
            head = np.flatnonzero(np.isin(groups, groups[head]))
    return head


def evaluate(args: Args, module: TaskModule, text: TextEncoder, stage: str) -> None:
    """Score a split: leaves module.scores[stage] and module.records[stage]."""
    module.stage = stage
    limit = _limit(args, stage)
    trainer = make_trainer(args, enable_checkpointing=False, limit_test_batches=limit, fast_dev_run=args.fast_dev_run)
    try:
        with _said_by_lightning():
            trainer.test(module, _eval_loader(args, module, text, stage), verbose=False)
    except SystemExit:  # how Lightning leaves after a KeyboardInterrupt
        raise KeyboardInterrupt("Training is saved; --resume goes on with what comes after it.") from None
    finally:
        module.stage = "valid"


def _of_split(module: TaskModule, task: Task, stage: str) -> tuple[list[Record], Features]:
    records = module.records[stage][task.name]
    return list(records.values()), module.splits[stage].features.take(list(records))


# ---- what is written


def _write(
    args: Args, heads: Heads, module: TaskModule, tokenizer: Any, outputs: Outputs, results: dict[str, Any]
) -> None:
    if args.train_dataset is not None:
        save_model(heads, module.tasks, tokenizer, args, outputs.best)
        write_model_cards(outputs.best, module.tasks, args, results)
    for stage, by_task in module.records.items():
        for task in module.scored():
            if task.name in by_task:
                suffix = f"-{task.name}" if len(module.scored()) > 1 else ""
                path = outputs.predictions / f"{stage}{suffix}.jsonl"
                records, features = _of_split(module, task, stage)
                write_rows(path, task.predict(records, features, module.splits[stage].rows))
                log.info("wrote %s", path)
    write_json(outputs.results, results)  # the last, so that a run that has it is whole
    log.info("everything is in %s", outputs.run)


def _versions() -> dict[str, str]:
    import transformers

    packages = {"torch": torch, "lightning": lightning, "transformers": transformers}
    return {"python": platform.python_version()} | {name: module.__version__ for name, module in packages.items()}


def results_table(results: dict[str, Any]) -> str:
    """Scores as a Markdown table; those of single classes are left to results.json."""
    splits = [split for split in ("valid", "test", "predict") if split in results]
    if not splits:
        return ""
    names = [name for name in results[splits[0]] if "_class_" not in name.rpartition("/")[2]]
    lines = ["| score | " + " | ".join(splits) + " |", "|---" * (len(splits) + 1) + "|"]
    for name in names:
        cells = (f"{results[split][name]:.4f}" if name in results[split] else "" for split in splits)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
