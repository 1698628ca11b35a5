"""Finetune a FunnelTFM on text classification: from flags to a run folder. `classifier.py` and `funneltfm
classify` are doors to it.
"""

import copy
import functools
import json
import logging
import os
import platform
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import yaml

from funneltfm.data.batching import Collator, RunLoader, TokenBudget, eval_loader
from funneltfm.errors import InputError, Stopped
from funneltfm.files import atomic_path, existing_file, write_json, write_text
from funneltfm.funnel.checkpoints import save_checkpoint
from funneltfm.funnel.config import without_truncation
from funneltfm.funnel.model import FunnelTFM
from funneltfm.training import plots, ranks
from funneltfm.training.callbacks import BestCheckpoint, History, Leave, Progress, SaveRun, ValidateAt, validation_steps
from funneltfm.training.checkpoint_io import WholeCheckpoints, newest_whole
from funneltfm.training.config import Args, check_accumulate, make_args
from funneltfm.training.launch import classify_flags, classify_words, start_here, start_on_ray
from funneltfm.training.pipeline import Pipeline
from funneltfm.training.predictions import write_predictions
from funneltfm.training.rundir import RunDir, find_run
from funneltfm.training.runlog import log_file, log_ranks, quiet
from funneltfm.training.setup import (
    Data,
    Devices,
    backend,
    choose_devices,
    goes_on,
    load_data,
    make_model,
    make_trainer,
    score_baselines,
    take_place,
    task_name,
    warn_of_diverging,
    with_absolute_paths,
    with_run_flags,
)
from funneltfm.training.speed import fast, speed_up

log = logging.getLogger(__name__)


def classify(**flags: Any) -> dict[str, Any]:
    """Run with flags by name, as `funneltfm classify` does from the command line; returns what results.json holds."""
    return run(make_args(**flags))


def run(args: Args) -> dict[str, Any]:
    """One run: read data, build or load the model, train, keep the best, evaluate, write it all down.

    With several processes each runs this; the main one writes the files. Where they are still to be started, this
    starts them and waits.
    """
    args = copy.copy(args)
    place = take_place(args)
    args = with_run_flags(args)
    if place is None and args.distributed_world_size > 1:
        return _launch(args)
    with ranks.joined(place, backend(args)), log_ranks(args.log_all_processes):
        devices = ranks.main_first(lambda: choose_devices(args))
        with fast(args, devices.accelerator):
            return _run(args, devices)


def _launch(args: Args) -> dict[str, Any]:
    run_dir = find_run(args.model_dir, task_name(args), goes_on(args), args.overwrite)
    for name, value in with_absolute_paths(args.flags()).items():
        setattr(args, name, value)  # the processes may start in another folder
    if args.launcher == "ray":
        root = run_dir.root.absolute()
        start_on_ray(_on_ray, classify_flags(args, root), args.distributed_world_size, root, args.device_id >= 0)
    else:
        port = args.distributed_port if "distributed_port" in args.given else 0
        start_here(classify_words(args, run_dir.root.absolute()), args.distributed_world_size, port)
    return json.loads(run_dir.results.read_text(encoding="utf-8"))


def _on_ray(flags: dict[str, Any]) -> None:
    run(make_args(**flags))


def _run(args: Args, devices: Devices) -> dict[str, Any]:
    data = ranks.main_first(lambda: load_data(args))
    find = functools.partial(find_run, args.model_dir, data.task.spec.name, goes_on(args), args.overwrite)
    run_dir = ranks.main_decides(find)
    lightning.seed_everything(args.seed, verbose=False)
    os.environ.pop("PL_GLOBAL_SEED", None)  # to which Lightning's strategies would put every process back
    model = ranks.main_first(lambda: make_model(args, data, run_dir))
    shapes = {f"model.{name}": value.shape for name, value in model.state_dict().items()}
    resume_from = ranks.main_decides(lambda: newest_whole(run_dir.resumable, shapes)) if args.resume else None
    if ranks.rank():  # every process has its own dropout; the main one goes on as a single one would
        torch.manual_seed(args.seed + ranks.rank())
    model.gradient_checkpointing = args.gradient_checkpointing
    if args.pad_to == "canonical":
        model.pooling = without_truncation(model.net_config)
    speed_up(model, args)
    warn_of_diverging(args, model.net_config)
    if ranks.is_main():
        if args.resume:
            run_dir.sweep()
        elif args.overwrite and not goes_on(args):
            run_dir.clear()  # only now: whatever could be wrong with the new run would have shown
    path = Path(args.log_path) if args.log_path else run_dir.root / "log.txt"
    append = args.resume or args.test_only
    if ranks.main_decides(lambda: args.log_path is not None and path.exists() and not (append or args.overwrite)):
        ranks.fail(InputError(f"--log_path={path} is there already. Name another, or give --overwrite to replace it."))
    with log_file(path if ranks.is_main() else None, append), quiet():
        if ranks.is_main():
            run_dir.root.mkdir(parents=True, exist_ok=True)  # after the log file, which may be elsewhere and impossible
        n_param = sum(p.numel() for p in model.parameters())
        log.info("%s: %s examples; %s parameters; %s", data.task.spec.name, data.sizes(), f"{n_param:,}", run_dir.root)
        if ranks.size() > 1:
            log.info("%d processes, %s, %s", ranks.size(), devices.accelerator, devices.precision)
        history = None if args.test_only else _train(args, data, model, run_dir, devices, resume_from)
        logits = {
            split: predict(model, data, split, args, devices) for split in data.splits if not split.startswith("train")
        }
        results = _results(args, data, logits, history, run_dir) | _facts(args, n_param, devices)
        if not ranks.is_main():
            return results
        write_json(run_dir.results, results)
        if args.write_prediction:
            for split, values in logits.items():
                for path in write_predictions(data.task, split, data.splits[split], values, run_dir.predictions):
                    log.info("wrote %s", path)
        _plot(data, logits, history, run_dir)
        log.info("\n%s\n", results_table(results))
        log.info("everything is in %s", run_dir.root)
    return results


def _results(
    args: Args, data: Data, logits: dict[str, np.ndarray], history: History | None, run_dir: RunDir
) -> dict[str, Any]:
    """What was measured: training, every labelled split, and baselines where asked for."""
    results: dict[str, Any] = {"task": data.task.spec.name}
    if args.test_only and run_dir.results.is_file():  # a test adds to what is known of the run
        results = json.loads(run_dir.results.read_text(encoding="utf-8"))
    if history is not None:
        results |= {
            "best_step": history.best["step"],
            "steps": history.rows[-1]["step"],
            "epochs": args.epochs,
            "train_seconds": round(history.train_seconds, 2),
            "examples_per_second": round(history.examples_per_second, 1),
        }
    for split, values in logits.items():
        if data.splits[split].labelled:
            results[split] = data.task.score(values, data.splits[split].labels)
    if args.baselines and ranks.is_main():
        results["baselines"] = score_baselines(args, data)
    return results


def _facts(args: Args, n_param: int, devices: Devices) -> dict[str, Any]:
    return {
        "parameters": n_param,
        "seed": args.seed,
        "device": devices.accelerator,
        "processes": ranks.size(),
        "precision": devices.precision,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
        },
    }


def _plot(data: Data, logits: dict[str, np.ndarray], history: History | None, run_dir: RunDir) -> None:
    if history is not None:
        best = int(history.best["step"])
        path = run_dir.plots / "learning_curves.png"
        plots.learning_curves(history.rows, data.valid, data.task.main_metric, best, path)
    spec = data.task.spec
    for split, values in logits.items():
        if not data.splits[split].labelled:
            continue
        pred, target, title = data.task.predict(values), data.splits[split].labels, f"{spec.name} {split}"
        if spec.labels is None:
            plots.regression_scatter(pred, target, title, run_dir.plots / f"scatter_{split}.png")
        else:
            names = spec.class_names or spec.labels
            plots.confusion_matrix(pred, target, names, title, run_dir.plots / f"confusion_matrix_{split}.png")


# ---- training and evaluation


def _collator(args: Args, model: FunnelTFM) -> Collator:
    return Collator(model.pooling, args.pad_to, args.max_length, args.seg_id_pad)


def _batches(args: Args, collator: Collator, batch_size: int) -> int | TokenBudget:
    return TokenBudget(args.max_tokens, collator.padded_length) if args.max_tokens else batch_size


def _train(
    args: Args, data: Data, model: FunnelTFM, run_dir: RunDir, devices: Devices, resume_from: Path | None
) -> History:
    """Train, and load the best weights into `model`."""
    if ranks.is_main():
        flags = with_absolute_paths(
            args.flags() | {"model_dir": str(run_dir.root), "resume": False, "overwrite": False}
        )
        write_text(run_dir.config, yaml.safe_dump(flags, sort_keys=False))
    collator = _collator(args, model)
    own: Any = {"rank": ranks.rank(), "ranks": ranks.size(), "num_workers": args.num_workers}
    train = data.splits["train"]
    accumulate = args.accumulate_grad_batches
    check_accumulate(args, len(train))
    train_bsz, valid_bsz = (_batches(args, collator, size) for size in (args.train_bsz, args.valid_bsz))
    train_loader = RunLoader(
        train, collator, train_bsz, args.epochs, args.seed, accumulate, digest=data.digest(), **own
    )
    valid_loaders = [eval_loader(data.splits[split], collator, valid_bsz, **own) for split in data.valid]
    total, per_epoch = train_loader.steps, train_loader.steps_per_epoch
    main = f"{data.valid[0]}/{data.task.main_metric}"

    pipeline = Pipeline(model, data.task, args, total, data.valid)
    validations = validation_steps(total, args.n_valid)
    advice = "lower --lr, raise --warmup_prop, or lower --clip; with --fp16 try --amp_opt=O1 or --bf16"
    log_every = max(1, per_epoch // args.n_log_epoch)
    history = History(run_dir.metrics, total, per_epoch, log_every, main, train.ids, advice)
    best = BestCheckpoint(
        dirpath=run_dir.checkpoints,
        filename="best",
        monitor=main,
        mode="max",
        save_weights_only=True,
        enable_version_counter=False,
        save_on_train_epoch_end=False,
    )
    save = SaveRun(run_dir, args.save_steps, validations)
    trainer = make_trainer(
        args,
        devices,
        max_epochs=1,  # one pass over all epochs: see RunLoader
        val_check_interval=len(train_loader),
        accumulate_grad_batches=accumulate,
        gradient_clip_val=args.clip or None,
        callbacks=[ValidateAt(validations), history, Progress(history), best, save],
        default_root_dir=run_dir.root,
        plugins=[WholeCheckpoints()],
    )
    try:
        with save.listening():
            trainer.fit(pipeline, train_loader, valid_loaders, ckpt_path=resume_from, weights_only=True)
            save.leave_if_asked(total)  # by a signal that came while the last checkpoint was written
    except Leave as leave:
        hint = f"Saved after step {leave.step}; go on with --resume --model_dir={run_dir.root}"
        raise Stopped(leave.signum, hint) from None
    except SystemExit:  # how Lightning leaves after a KeyboardInterrupt
        if not ranks.is_main():
            raise
        hint = f"Go on with --resume --model_dir={run_dir.root}" if run_dir.last.is_file() else "Nothing was saved yet"
        raise KeyboardInterrupt(f"{hint}.") from None
    state = ranks.main_decides(lambda: _best_state(run_dir))
    model.float().load_state_dict(state)
    if ranks.is_main():
        _export(args, data, model, run_dir)
    return history


def _best_state(run_dir: RunDir) -> dict[str, torch.Tensor]:
    path = existing_file(run_dir.checkpoints / "best.ckpt", "the best checkpoint of the run")
    state = WholeCheckpoints().load_checkpoint(path, map_location="cpu", weights_only=True)
    return {name.removeprefix("model."): value for name, value in state["state_dict"].items()}


def _export(args: Args, data: Data, model: FunnelTFM, run_dir: RunDir) -> None:
    """The best model as people use it: weights under the original's names, config, labels, vocabulary."""
    run_dir.model.parent.mkdir(exist_ok=True)
    save_checkpoint(model, run_dir.model)
    model.net_config.to_json(run_dir.net_config)
    write_json(run_dir.labels, data.task.spec.labels)
    vocabulary = Path(args.tokenizer_path).name
    with atomic_path(run_dir.model.with_name(vocabulary)) as temporary:
        temporary.write_bytes(data.vocabulary)
    text = {"tokenizer_type": args.tokenizer_type, "cased": args.cased, "max_length": args.max_length}
    write_json(run_dir.text_config, text | {"vocabulary": vocabulary})


def predict(model: FunnelTFM, data: Data, split: str, args: Args, devices: Devices) -> np.ndarray:
    """Logits (N, C) of every example of a split, in its order; in every process those of all."""
    batch_size = args.test_bsz if split.startswith("test") else args.valid_bsz
    own: Any = {"rank": ranks.rank(), "ranks": ranks.size(), "num_workers": args.num_workers}
    collator = _collator(args, model)
    loader = eval_loader(data.splits[split], collator, _batches(args, collator, batch_size), **own)
    pipeline = Pipeline(model, data.task, args, 0, ())
    try:
        make_trainer(args, devices, enable_checkpointing=False).test(pipeline, loader, verbose=False)
    except SystemExit:  # how Lightning leaves after a KeyboardInterrupt
        raise KeyboardInterrupt("Training is saved; --resume goes on with what comes after it.") from None
    logits = pipeline.predictions
    if len(logits) != len(data.splits[split]):
        raise RuntimeError(f"{len(logits)} predictions for the {len(data.splits[split])} examples of {split}")
    if not np.isfinite(logits).all():
        ranks.fail(
            InputError(
                f"the model gives no numbers (NaN or infinity) on {split}. Its checkpoint is damaged, or its training "
                f"diverged."
            )
        )
    return logits


# ---- the end


def results_table(results: dict[str, Any]) -> str:
    """The run's scores beside the baselines', as text."""
    splits = {key: value for key, value in results.items() if key.startswith(("valid", "test"))}
    rows: list[tuple[str, str, dict[str, float]]] = []
    for name, scores in results.get("baselines", {}).items():
        rows.append((name.replace("_", " "), next(iter(splits)), scores))
    rows += [("FunnelTFM", split, scores) for split, scores in splits.items()]
    metrics = [name for name in dict.fromkeys(name for *_, scores in rows for name in scores) if name != "loss"]
    cells = [[results["task"], "split", *metrics]]
    for name, split, scores in rows:
        cells.append([name, split, *(f"{scores[m]:.4f}" if m in scores else "" for m in metrics)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
