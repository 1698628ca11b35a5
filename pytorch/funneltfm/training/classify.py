"""Finetune a FunnelTFM on text classification: from flags to a run folder. `classifier.py` and `funneltfm classify` are doors to it."""

import contextlib
import dataclasses
import logging
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from funneltfm.data.batching import Collator, RunLoader, eval_loader
from funneltfm.data.encoding import EncodedSplit, EncodingConfig, load_split
from funneltfm.data.readers import custom_dataset, get_dataset, read_split, source_files
from funneltfm.data.tokenization import Tokenizer, get_tokenizer
from funneltfm.errors import InputError
from funneltfm.files import existing_file, write_json, write_text
from funneltfm.funnel.checkpoints import load_checkpoint, save_checkpoint
from funneltfm.funnel.config import ModelConfig, model_size
from funneltfm.funnel.model import FunnelTFM
from funneltfm.tasks.baselines import baselines
from funneltfm.tasks.classification import Classification
from funneltfm.training import plots
from funneltfm.training.callbacks import History, Progress, ValidateAt, validation_steps
from funneltfm.training.config import MODEL_SKIP, Args, make_args
from funneltfm.training.pipeline import Pipeline
from funneltfm.training.predictions import write_predictions
from funneltfm.training.rundir import RunDir, find_run, read_labels

log = logging.getLogger(__name__)

PRECISION = {"O0": "32-true", "O1": "16-mixed", "O3": "16-true"}


def classify(**flags: Any) -> dict[str, Any]:
    """Run with flags by name, as `funneltfm classify` does from the command line; returns what results.json holds."""
    return run(make_args(**flags))


def run(args: Args) -> dict[str, Any]:
    """One run: read data, build or load the model, train, keep the best, evaluate, write it all down."""
    data = _load_data(args)
    device = _device(args)
    run_dir = find_run(args.model_dir, data.task.spec.name, args.resume, args.test_only, args.overwrite)
    lightning.seed_everything(args.seed, verbose=False)
    model = _make_model(args, data, run_dir)
    n_param = sum(p.numel() for p in model.parameters())
    log.info("%s: %s examples; %s parameters; %s", data.task.spec.name, data.sizes(), f"{n_param:,}", run_dir.root)

    run_dir.root.mkdir(parents=True, exist_ok=True)
    with _log_file(args, run_dir):
        results: dict[str, Any] = {"task": data.task.spec.name}
        history = None
        if not args.test_only:
            write_text(run_dir.config, yaml.safe_dump(args.flags() | {"model_dir": str(run_dir.root)}, sort_keys=False))
            history = _train(args, data, model, run_dir, device)
            results |= {
                "best_step": history.best["step"],
                "steps": history.rows[-1]["step"],
                "epochs": args.epochs,
                "train_seconds": round(history.train_seconds, 2),
                "examples_per_second": round(history.examples_per_second, 1),
            }
        results |= _evaluate(args, data, model, run_dir, device)
        if args.baselines:
            results["baselines"] = _baselines(args, data)
        if history is not None:
            plots.learning_curves(
                history.rows, data.valid, data.task.main_metric, int(history.best["step"]), run_dir.plots / "learning_curves.png"
            )
        results |= {
            "parameters": n_param,
            "seed": args.seed,
            "device": device["accelerator"],
            "precision": device["precision"],
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "lightning": lightning.__version__,
            },
        }
        write_json(run_dir.results, results)
        log.info("\n%s\n", results_table(results))
        log.info("everything is in %s", run_dir.root)
    return results


# ---- data


@dataclass(frozen=True)
class Data:
    """What a run learns from and is scored on."""

    task: Classification
    tokenizer: Tokenizer
    splits: dict[str, EncodedSplit]

    def sizes(self) -> str:
        return ", ".join(f"{len(encoded)} {split}" for split, encoded in self.splits.items())

    @property
    def valid(self) -> list[str]:
        """The validation splits; the first one selects the best checkpoint."""
        return [split for split in self.splits if split.startswith("valid")]


def _spec(args: Args) -> Any:
    if args.dataset is None:
        raise InputError("name the data: --dataset (CoLA, SST-2, ..., or custom) and --data_dir, the folder with its files.")
    if args.data_dir is None:
        raise InputError(f"name the folder with the files of {args.dataset}: --data_dir.")
    if args.dataset.lower() == "custom":
        spec = custom_dataset(args.data_dir, args.text_a, args.text_b, args.label, args.regression, args.bad_rows)
        return dataclasses.replace(spec, name=Path(args.data_dir).resolve().name)
    if misplaced := {"text_a", "text_b", "label", "regression"} & args.given:
        raise InputError(f"--{min(misplaced)} is for --dataset=custom; the columns of {args.dataset} are known.")
    return get_dataset(args.dataset)


def _load_data(args: Args) -> Data:
    spec = _spec(args)
    if args.tokenizer_path is None:
        raise InputError("name the vocabulary: --tokenizer_path (vocab.uncased.txt of a published checkpoint, say).")
    tokenizer = get_tokenizer(args.tokenizer_type, args.tokenizer_path, args.cased)
    encoding = EncodingConfig(args.max_length, args.seg_id_a, args.seg_id_b, args.seg_id_cls)
    wanted = [split for split in spec.splits if split != "train" or not args.test_only]
    if "train" not in spec.splits and not args.test_only:
        raise InputError(f"{spec.name} has no training data: give --test_only and the model with --init_ckpt.")
    splits = {}
    for split in wanted:
        # Training needs train and valid; a test file may be absent, unless its predictions are asked for.
        optional = args.dataset.lower() == "custom" or not (args.test_only or args.write_prediction)
        if split.startswith("test") and optional and not _present(spec, args, split):
            continue
        splits[split] = load_split(
            spec, Path(args.data_dir), split, tokenizer, encoding, Path(args.output_dir), args.overwrite_data, args.bad_rows
        )
    return Data(Classification(spec), tokenizer, splits)


def _present(spec: Any, args: Args, split: str) -> bool:
    try:
        return bool(source_files(spec, args.data_dir, split))
    except InputError:
        return False


def _baselines(args: Args, data: Data) -> dict[str, dict[str, float]]:
    if data.task.spec.splits.get("train") is None or not data.valid:
        raise InputError(f"--baselines needs train and valid data, which {data.task.spec.name} lacks.")
    train, valid = (
        read_split(data.task.spec, args.data_dir, split, bad_rows=args.bad_rows) for split in ("train", data.valid[0])
    )
    return baselines(data.task, train, valid)


# ---- model


def _net_config(args: Args, data: Data, config_path: Path | None) -> ModelConfig:
    """The model's config: from flags, or from a file whose keys win over flags; the data decides the number of classes."""
    flags = {name: getattr(args, name) for name in ModelConfig.names() if name not in MODEL_SKIP}
    flags["vocab_size"] = args.vocab_size or data.tokenizer.vocab_size
    if args.model_size:
        size = model_size(args.model_size)
        if clash := [key for key in sorted(size.keys() & args.given) if getattr(args, key) != size[key]]:
            raise InputError(f"--model_size={args.model_size} sets {clash[0]} to {size[clash[0]]}, but --{clash[0]}={getattr(args, clash[0])} was given too.")
        flags |= size
    source = Args(**flags, overwrite_keys=args.overwrite_keys)
    if config_path is None:
        config = ModelConfig.init_from_args(source)
    else:
        config = ModelConfig.init_from_json(config_path, source)
        for key in sorted(args.given & set(flags)):
            if flags[key] != getattr(config, key) and key != "vocab_size":
                log.warning(
                    "--%s=%s is not used: %s says %s, and it wins. To change that, give --overwrite_keys=%s.",
                    key, flags[key], config_path, getattr(config, key), key,
                )  # fmt: skip
    if config.vocab_size != data.tokenizer.vocab_size and (
        args.vocab_size != config.vocab_size or config.vocab_size < data.tokenizer.vocab_size
    ):
        raise InputError(
            f"the vocabulary does not match the model: {args.tokenizer_path} has {data.tokenizer.vocab_size} pieces, "
            f"{config_path or '--vocab_size'} says {config.vocab_size}. Give the vocabulary that belongs to the checkpoint; "
            f"if its table is meant to be larger than the vocabulary, say so with --vocab_size={config.vocab_size}."
        )
    # A classifier reads [CLS] from the encoder, so a decoder in the config would only be dead weight.
    return dataclasses.replace(config, num_class=data.task.num_class, pad_id=data.tokenizer.pad_id, decoder_size="0")


def _config_beside(ckpt: Path) -> Path:
    names = ("net_config.json", "net_config.pytorch.json")
    found = [ckpt.parent / name for name in names if (ckpt.parent / name).is_file()]
    if not found:
        raise InputError(f"there is no {' or '.join(names)} beside {ckpt}; name the model's config with --init_ckpt_config.")
    return found[0]


def _make_model(args: Args, data: Data, run_dir: RunDir) -> FunnelTFM:
    ckpt = Path(args.init_ckpt) if args.init_ckpt else None
    if args.test_only and ckpt is None:
        if not run_dir.model.is_file():
            raise InputError(
                f"--test_only needs a trained model: name it with --init_ckpt, or its run with --model_dir. "
                f"There is none in {run_dir.root}."
            )
        ckpt = run_dir.model
        trained = read_labels(run_dir)
        if trained is not None and trained != data.task.spec.labels:
            raise InputError(
                f"the model in {run_dir.root} was trained for the classes {', '.join(trained)}, but {data.task.spec.name} "
                f"has {', '.join(data.task.spec.labels or ['numbers'])}."
            )
    if ckpt is None:
        if args.init_ckpt_config:
            raise InputError("--init_ckpt_config was given without --init_ckpt.")
        return FunnelTFM(_net_config(args, data, None))
    existing_file(ckpt, "the checkpoint")
    config_path = Path(args.init_ckpt_config) if args.init_ckpt_config else _config_beside(ckpt)
    model = FunnelTFM(_net_config(args, data, config_path))
    fresh = load_checkpoint(model, ckpt, new_head=not args.test_only)
    log.info("loaded %s%s", ckpt, f"; new: {', '.join(fresh)}" if fresh else "")
    return model


# ---- training and evaluation


def _device(args: Args) -> dict[str, Any]:
    """Lightning's accelerator, devices and precision."""
    precision = PRECISION[args.amp_opt] if args.fp16 else "32-true"
    device: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "precision": precision}
    if args.device_id >= 0 and torch.cuda.is_available():
        if args.device_id >= torch.cuda.device_count():
            raise InputError(f"device_id {args.device_id}: this machine has GPUs 0 to {torch.cuda.device_count() - 1}.")
        device |= {"accelerator": "cuda", "devices": [args.device_id]}
    elif args.device_id >= 0 and torch.backends.mps.is_available():
        device |= {"accelerator": "mps"}
    elif args.device_id > 0:
        raise InputError(f"device_id {args.device_id}: this machine has no GPU. Leave it out, or give -1 for the CPU.")
    if precision != "32-true" and device["accelerator"] != "cuda":
        raise InputError(f"--fp16 with --amp_opt={args.amp_opt} needs a CUDA GPU, and this run is on the {device['accelerator']}.")
    return device


def _trainer(device: dict[str, Any], **kwargs: Any) -> lightning.Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    return lightning.Trainer(
        **device,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **kwargs,
    )


def _collator(args: Args, model: FunnelTFM) -> Collator:
    return Collator(model.net_config, args.pad_to, args.max_length, args.seg_id_pad)


def _train(args: Args, data: Data, model: FunnelTFM, run_dir: RunDir, device: dict[str, Any]) -> History:
    """Train, and load the best weights into `model`."""
    collator = _collator(args, model)
    workers = {"num_workers": args.num_workers}
    train_loader = RunLoader(data.splits["train"], collator, args.train_bsz, args.epochs, args.seed, **workers)
    valid_loaders = [eval_loader(data.splits[split], collator, args.valid_bsz, **workers) for split in data.valid]
    total = len(train_loader)
    main = f"{data.valid[0]}/{data.task.main_metric}"
    log_every = max(1, train_loader.per_epoch // args.n_log_epoch)

    pipeline = Pipeline(model, data.task, args, total, data.valid)
    history = History(run_dir.metrics, train_loader.per_epoch, log_every, main)
    save = {"dirpath": run_dir.checkpoints, "enable_version_counter": False, "save_on_train_epoch_end": False}
    best = ModelCheckpoint(filename="best", monitor=main, mode="max", save_weights_only=True, **save)
    last = ModelCheckpoint(filename="last", **save)
    callbacks = [ValidateAt(validation_steps(total, args.n_valid)), history, Progress(history), best, last]
    trainer = _trainer(
        device,
        max_epochs=1,  # one pass over all epochs: see RunLoader
        val_check_interval=total,
        gradient_clip_val=args.clip or None,
        callbacks=callbacks,
        default_root_dir=run_dir.root,
    )
    if args.resume and not run_dir.last.is_file():
        raise InputError(f"there is nothing to resume: no {run_dir.last}. Start without --resume.")
    trainer.fit(
        pipeline, train_loader, valid_loaders, ckpt_path=run_dir.last if args.resume else None, weights_only=True
    )
    state = torch.load(run_dir.checkpoints / "best.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})

    run_dir.model.parent.mkdir(exist_ok=True)
    save_checkpoint(model, run_dir.model)
    model.net_config.to_json(run_dir.net_config)
    write_json(run_dir.labels, data.task.spec.labels)
    shutil.copyfile(args.tokenizer_path, run_dir.model.with_name(Path(args.tokenizer_path).name))
    return history


def _evaluate(args: Args, data: Data, model: FunnelTFM, run_dir: RunDir, device: dict[str, Any]) -> dict[str, Any]:
    """Scores of every labelled split but train; pictures and predictions."""
    scores = {}
    task = data.task
    for split, encoded in data.splits.items():
        if split == "train":
            continue
        batch_size = args.test_bsz if split.startswith("test") else args.valid_bsz
        logits = predict(model, task, encoded, _collator(args, model), batch_size, device)
        if encoded.labelled:
            scores[split] = task.score(logits, encoded.labels)
            _plot_errors(task, split, logits, encoded, run_dir)
        if args.write_prediction:
            for path in write_predictions(task, split, encoded, logits, run_dir.predictions):
                log.info("wrote %s", path)
    return scores


def _plot_errors(task: Classification, split: str, logits: np.ndarray, encoded: EncodedSplit, run_dir: RunDir) -> None:
    pred, title = task.predict(logits), f"{task.spec.name} {split}"
    if task.spec.labels is None:
        plots.regression_scatter(pred, encoded.labels, title, run_dir.plots / f"scatter_{split}.png")
    else:
        names = task.spec.class_names or task.spec.labels
        plots.confusion_matrix(pred, encoded.labels, names, title, run_dir.plots / f"confusion_matrix_{split}.png")


def predict(
    model: FunnelTFM, task: Classification, encoded: EncodedSplit, collator: Collator, batch_size: int, device: dict[str, Any]
) -> np.ndarray:
    """Logits (N, C) of every example, in the order of the split."""
    pipeline = Pipeline(model, task, None, 0, ())
    loader = eval_loader(encoded, collator, batch_size)
    _trainer(device, enable_checkpointing=False).test(pipeline, loader, verbose=False)
    index, logits = (torch.cat(part) for part in zip(*pipeline.predictions, strict=True))
    return logits[index.argsort()].numpy()


# ---- the end


@contextlib.contextmanager
def _log_file(args: Args, run_dir: RunDir) -> Iterator[None]:
    """Everything that is logged also goes into the run's log file."""
    path = Path(args.log_path) if args.log_path else run_dir.root / "log.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, mode="a" if args.resume or args.test_only else "w", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("funneltfm")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


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
