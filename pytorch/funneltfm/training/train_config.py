"""The flags of `funneltfm train`: those of the tasks, the data, the model, Lightning's trainer, optimizers, the run."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from funneltfm.errors import InputError
from funneltfm.tasks.flags import (
    GENERATION_ELSEWHERE,
    TASK_GROUPS,
    WITH_K,
    GenerationFlags,
    check_task_flags,
    own_flags,
    task_names,
)
from funneltfm.training.config import Args, Group, SpeedFlags, check_speed_flags, check_workers, flag_fields, typed_args
from funneltfm.training.optimizer_flags import OptimizerFlags, SchedulerFlags, check_optimizer_flags
from funneltfm.training.sparsity_flags import DistillFlags, SparsityFlags, check_sparsity_flags


@dataclass(frozen=True, kw_only=True)
class PipelineFlags:
    """The pipeline"""

    pipeline: str | None = None
    """What to learn: seq_class, token_class (pos_tagging, named_entity_recognition), question_answering,
    multiple_choice, answer_selection, retrieval, masked_lm, electra, random_token_detection,
    cluster_random_token_detection, denoising, summarization, or several joined with +, such as masked_lm+seq_class.
    """
    name: str | None = None
    """Name of the run, and of its folders in output_dir. Default: PIPELINE-MODEL."""
    output_dir: str = "outputs"
    """Folder for tensorboard/NAME, checkpoints/NAME, pre_trained_models/NAME, predictions/NAME and runs/NAME."""
    overwrite: bool = False
    """Remove the run of this name first, and start anew."""
    resume: bool = False
    """Go on with the run of this name from its last checkpoint."""
    ckpt_path: str | None = None
    """Go on from this checkpoint instead, a .ckpt of an equal run."""
    seed: int = 1337
    """Seed of initialisation, data order, masks and dropout."""
    seeds: tuple[int, ...] | None = None
    """Several seeds: one run each, NAME-seed_N, and a table of means and spreads."""
    debug: bool = False
    """Show where in the code an error arises."""


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """The model"""

    model: str | None = None
    """Architecture: bert, roberta, deberta, deberta_v2, electra, albert, distilbert, camembert, xlm_roberta,
    modernbert, funnel, bart, t5, or another of transformers. Needed only where neither a model nor a config is given.
    """
    pre_trained_model: str | None = None
    """Checkpoint to start from: a folder, or a name on the hub. It implies config and tokenizer."""
    pre_trained_tokenizer: str | None = None
    """Tokenizer: a folder, a name, a tokenizer.json, or a vocab.txt."""
    pre_trained_config: str | None = None
    """Config: a folder, a config.json, or a name. Alone it means training from scratch."""
    pre_trained_generator_model: str | None = None
    """electra: checkpoint of the generator, a model with a masked language modelling head and the same vocabulary.
    Default: the one in the folder of pre_trained_model, or a smaller discriminator (generator_size), from scratch.
    """
    pre_trained_generator_config: str | None = None
    """electra: config of the generator, which is trained from scratch: a folder, a config.json, or a name."""
    additional_config_kwargs: tuple[str, ...] = ()
    """Keys of the config to set, as in hidden_size=128 hidden_dropout_prob=0.0; values are read as YAML."""
    max_sequence_length: tuple[int, ...] = (128,)
    """Longest input in tokens, special ones included; how many were longer, and are cut, is logged. retrieval takes one
    number, or two: of the first text (the query) and of the second.
    """
    gradient_checkpointing: bool = False
    """Keep less for the backward pass and compute it again: less memory, more time."""
    dynamo_fallback_eager: bool = False
    """With compile: where it fails, run uncompiled."""


@dataclass(frozen=True, kw_only=True)
class DatasetFlags:
    """The data"""

    train_dataset: tuple[str, ...] | None = None
    """Training data: .jsonl, .csv, .tsv, .parquet, .json, .txt, CoNLL files, folders of Hugging Face datasets, or
    names on the hub with the split (name/train). Several are mixed. A stage without data is left out.
    """
    train_config: str | None = None
    """Configuration of a dataset on the hub; of several train_dataset, those on the hub take it."""
    train_weights: tuple[float, ...] | None = None
    """Shares of several train_dataset in an epoch, of its examples; a row may make several (windows,
    questions, blocks). Default: each example once.
    """
    train_filter: tuple[str, ...] = ()
    """Rows to keep for training, such as "label != 2" "len(text) > 20"; all conditions hold."""
    streaming: bool = False
    """Read the training data as they are needed, for corpora that fit into no memory; needs max_steps. Classes are
    looked for first, in all rows, unless the source names them or num_labels are found.
    """
    streaming_buffer: int = 10_000
    """Rows from which a stream draws the next one."""
    train_shard_dataset: int | None = None
    """Keep every n-th training row only."""
    valid_dataset: str | None = None
    """Validation data; it selects the best model."""
    valid_config: str | None = None
    """Its configuration on the hub."""
    valid_filter: tuple[str, ...] = ()
    """Rows to keep for validation."""
    valid_shard_dataset: int | None = None
    """Keep every n-th validation row only."""
    test_dataset: str | None = None
    """Test data; the best model is scored on it at the end."""
    test_config: str | None = None
    """Its configuration on the hub."""
    test_filter: tuple[str, ...] = ()
    """Rows to keep for testing."""
    test_shard_dataset: int | None = None
    """Keep every n-th test row only."""
    predict_dataset: str | None = None
    """Data to predict with the best model at the end, labels or not."""
    predict_config: str | None = None
    """Its configuration on the hub."""
    predict_filter: tuple[str, ...] = ()
    """Rows to keep for prediction."""
    predict_shard_dataset: int | None = None
    """Keep every n-th row for prediction only."""
    tokenized_dir: str | None = None
    """masked_lm, electra, denoising and their kind: folder that keeps the tokenised texts for later runs; they stay on
    the disk, mapped into memory. Default: they are tokenised in every run, and kept in memory.
    """
    prepare_data_workers: int = 0
    """masked_lm, electra, denoising and their kind: processes that tokenise; 0 does it in the main process."""
    clusters_filename: str | None = None
    """cluster_random_token_detection: file with a line for each token, by its id: the number of its cluster
    (`funneltfm cluster-tokens` makes one). A model that was trained so has its own.
    """
    bad_rows: Literal["error", "skip"] = "error"
    """What to do with a broken row of a text file, or a question whose answer is not where it should be: stop, or skip
    it and say how many were skipped.
    """
    batch_size: int = 32
    """Examples in a batch, per device."""
    eval_batch_size: int | None = None
    """Examples in a batch of validation, test and prediction. Default: batch_size."""
    group_by_length: bool = True
    """Put texts of similar lengths into the same batch, so that little is padded."""
    pad_to_max_length: bool = False
    """Pad every batch to max_sequence_length, not to its longest text."""
    num_workers: int = 0
    """Processes that prepare batches; 0 prepares them in the main process."""
    disable_memory_pinning: bool = False
    """Do not pin batches in memory on their way to a GPU."""


@dataclass(frozen=True, kw_only=True)
class TrainerFlags:
    """Lightning's trainer"""

    accelerator: str = "auto"
    """cpu, gpu, cuda, mps, or auto."""
    strategy: str = "auto"
    """How several devices work together: ddp (auto), or fsdp, which gives each a part of weights and optimizer state.
    ddp_find_unused_parameters_true and the like are known too.
    """
    devices: str = "auto"
    """Number of devices, or their numbers (0,1), or auto: all GPUs, or one CPU process."""
    num_nodes: int = 1
    """Machines; start the same command on each with torchrun or SLURM."""
    launcher: Literal["local", "ray"] = "local"
    """Who starts the processes: this machine (or torchrun, or SLURM), or the Ray cluster at RAY_ADDRESS (a local one
    where there is none), where devices is their number in all.
    """
    precision: str = "32-true"
    """16-mixed, bf16-mixed, 16-true, bf16-true, 32-true or 64-true; 16 and bf16 mean mixed, 32 and 64 true."""
    fast_dev_run: bool = False
    """One batch of everything, nothing is saved."""
    max_epochs: int | None = None
    """Passes over the training data; -1 has no end."""
    min_epochs: int | None = None
    """Passes that early stopping must wait for."""
    max_steps: int = -1
    """Optimizer steps; -1 leaves it to max_epochs."""
    min_steps: int | None = None
    """Steps that early stopping must wait for."""
    max_time: str | None = None
    """Longest training time, DD:HH:MM:SS."""
    limit_train_batches: int | float | None = None
    """Batches of an epoch, as a number or a share (1.0 is all, 1 is one batch)."""
    limit_val_batches: int | float | None = None
    """Validate on the first examples of the data: so many batches of each device, or this share of all; whole queries
    and questions. 0 is no validation.
    """
    limit_test_batches: int | float | None = None
    """Test on the first examples only, likewise."""
    limit_predict_batches: int | float | None = None
    """Predict the first examples only, likewise."""
    overfit_batches: int | float = 0.0
    """Train on so many of the first batches only (or this share), and validate on as many: a check of the code."""
    val_check_interval: int | float | None = None
    """Validate every so many batches, or every share of an epoch. Default: at the end of each epoch. After the
    last step of a run there is a validation in any case.
    """
    check_val_every_n_epoch: int | None = 1
    """Validate every so many epochs; none counts the batches of val_check_interval on through all epochs."""
    num_sanity_val_steps: int = 2
    """Validation batches before training, to find errors early: those with the longest texts; -1 is all."""
    log_every_n_steps: int = 50
    """Steps between two lines of the training log."""
    accumulate_grad_batches: int = 1
    """Batches whose gradients make one step."""
    gradient_clip_val: float | None = None
    """Largest norm (or value) of the gradient; none does not clip."""
    gradient_clip_algorithm: Literal["norm", "value"] = "norm"
    """What gradient_clip_val limits."""
    deterministic: bool = False
    """Use deterministic algorithms only, and fail where there is none."""
    benchmark: bool = False
    """Let cuDNN look for the fastest algorithms."""
    detect_anomaly: bool = False
    """Say which operation made a NaN in the backward pass; slow."""
    sync_batchnorm: bool = False
    """Batch norms over all devices."""
    profiler: Literal["simple", "advanced", "pytorch"] | None = None
    """Measure where the time goes, into a file in runs/NAME."""
    enable_progress_bar: bool = True
    """Show a progress bar on a terminal, in place of lines."""
    enable_model_summary: bool = False
    """Show the model's parts and sizes."""
    barebones: bool = False
    """No logging, checkpoints, bars: for measuring the speed of training alone."""
    stochastic_weight_averaging: bool = False
    """Average the weights over the last fifth of max_epochs, at a constant rate; the average is kept, not the best."""
    devices_stats: bool = False
    """Log memory and load of the devices, to tensorboard or wandb."""
    enable_checkpointing: bool = True
    """Save checkpoints, to resume from and of the best model; without them the last model alone is kept."""
    inference_mode: bool = True
    """Evaluate in torch's inference mode, not under no_grad."""


# What is no flag: other arguments of Lightning's trainer, and flags of the older framework.
ELSEWHERE = {
    "logger": "give --loggers",
    **dict.fromkeys(("fp16", "bf16", "amp_opt"), "give --precision, as in --precision bf16-mixed"),
    "default_root_dir": "give --output_dir",
    "callbacks": "the run has its own; from Python, train a TaskModule with a trainer of yours",
    "plugins": "the run has its own; from Python, train a TaskModule with a trainer of yours",
    "use_distributed_sampler": "rows are always dealt out to the processes, and count once",
    "reload_dataloaders_every_n_epochs": "every epoch is drawn anew, by its seed and number",
    "enable_autolog_hparams": "flags are always logged",
    **dict.fromkeys(("model_registry", "temporary_models_folder"), "models go to pre_trained_models in --output_dir"),
    "iterable": "give --streaming",
    "scheduler_cycle": "a schedule ends with the run; --scheduler cosine has --num_cycles",
    "save_additional_data_interval": "the counts of clusters are in every checkpoint; give --checkpoint_interval",
    **dict.fromkeys(
        ("prepare_data_per_node", "prepare_data_batch_size", "prepare_data_do_not_use_cache", "keep_in_memory"),
        "data are prepared in memory at every start, or once into --tokenized_dir",
    ),
    "temporary_data_folder": "give --tokenized_dir",
    **dict.fromkeys(
        (f"reload_{stage}_dataset_every_epoch" for stage in ("train", "valid", "test", "predict")),
        "every epoch is drawn anew, by its seed and number",
    ),
    **GENERATION_ELSEWHERE,
}


@dataclass(frozen=True, kw_only=True)
class KeepFlags:
    """What is kept"""

    monitor: str | None = None
    """The score that selects the best model and stops early, such as valid/seq_class/accuracy. Default: the
    pipeline's own.
    """
    monitor_direction: Literal["min", "max"] | None = None
    """Which end of monitor is better. Default: max, min for losses and perplexities."""
    early_stopping: bool = False
    """Stop when monitor has not improved in so many validations as patience says."""
    patience: int = 5
    """Validations without improvement that early stopping waits for."""
    checkpoint_interval: int | None = None
    """Save a checkpoint to resume from, and a pre_trained_models folder, every so many steps. A checkpoint is saved
    after each validation too; where there is none, after each epoch.
    """
    no_val_checkpointing: bool = False
    """No pre_trained_models folder at validations."""
    no_epoch_checkpointing: bool = False
    """No pre_trained_models folder at ends of epochs."""
    save_total_limit: int | None = 2
    """pre_trained_models folders to keep beside best and the final one; 0 keeps none, none keeps all."""
    loggers: tuple[str, ...] = ("csv",)
    """Where scores go: csv (runs/NAME/metrics.csv), tensorboard, wandb; or none."""


TRAIN_GROUPS: tuple[Group, ...] = (
    ("The pipeline", PipelineFlags, ()),
    ("The model", ModelFlags, ()),
    ("The data", DatasetFlags, ()),
    *TASK_GROUPS,
    ("Optimizer", OptimizerFlags, ()),
    ("Learning rate", SchedulerFlags, ()),
    ("Sparse training", SparsityFlags, ()),
    ("Distillation", DistillFlags, ()),
    ("Lightning's trainer", TrainerFlags, ()),
    ("Speed", SpeedFlags, ()),
    ("What is kept", KeepFlags, ()),
)
_PRECISIONS = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}
_PRECISIONS |= {
    name: name for name in ("16-mixed", "bf16-mixed", "16-true", "bf16-true", "32-true", "64-true")
}  # fmt: skip
_AT_LEAST_ONE = (
    *("batch_size", "eval_batch_size", "accumulate_grad_batches", "num_nodes", "patience"),
    *("log_every_n_steps", "check_val_every_n_epoch", "checkpoint_interval", "train_shard_dataset", "n_best_size"),
    *("valid_shard_dataset", "test_shard_dataset", "predict_shard_dataset", "k", "max_answer_length"),
    *("max_number_of_spans", "max_target_length", "max_multi_token_predictions", "generation_num_beams"),
    *("generation_max_length", "generation_max_new_tokens", "generation_no_repeat_ngram_size"),
    "generation_encoder_no_repeat_ngram_size",
)
_NOT_NEGATIVE = (
    *("num_workers", "streaming_buffer", "save_total_limit", "doc_stride", "margin", "bert_score_layer"),
    "prepare_data_workers",
    *("generation_min_length", "generation_min_new_tokens", "generation_top_k"),
)
_MORE_THAN_0 = ("temperature", "mean_span_length", "generation_temperature", "generation_repetition_penalty")
_SHARES = (
    *("probability", "probability_masked", "probability_replaced", "probability_unchanged", "label_smoothing"),
    *("short_pairs", "generation_top_p", "generation_typical_p"),
)
# Flags that do nothing without another one.
_NEEDED = (
    *(("train_weights", "train_dataset"), ("selection", "scores_column"), ("scores_column", "selection")),
    *(("patience", "early_stopping"), ("gradient_clip_algorithm", "gradient_clip_val")),
    *(("dynamo_fallback_eager", "compile"), ("streaming_buffer", "streaming"), ("across_documents", "packing")),
    ("short_pairs", "sentence_pairs"),
)
# Flags of a stage that has no data.
_OF_STAGES = {
    **{
        f"{stage}_{name}": f"{stage}_dataset"
        for stage in ("train", "valid", "test", "predict")
        for name in ("config", "filter", "shard_dataset")
    },
    "limit_train_batches": "train_dataset",
    "limit_val_batches": "valid_dataset",
    "limit_test_batches": "test_dataset",
    "limit_predict_batches": "predict_dataset",
    **dict.fromkeys(("monitor", "monitor_direction"), "valid_dataset"),
}
_LOGGERS = ("csv", "tensorboard", "wandb", "none")


def make_train_args(**flags: Any) -> Args:
    """Flags of `funneltfm train`, checked. Raises InputError for what is no flag, out of range, or not read by the
    pipeline.
    """
    args = typed_args(TRAIN_GROUPS, "train", flags, ELSEWHERE)
    if args.pipeline is not None:
        check_task_flags(task_names(args.pipeline), args.given)
        own_flags(args.task_flags, args.pipeline)
    elif not (args.resume and args.name):  # the run knows
        raise InputError("say what to learn: --pipeline seq_class, for one; --help lists them.")
    _check_ranges(args)
    check_optimizer_flags(args)
    check_sparsity_flags(args)
    if args.precision not in _PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(_PRECISIONS)}; got {args.precision!r}.")
    args.precision = _PRECISIONS[args.precision]
    total = args.probability_masked + args.probability_replaced + args.probability_unchanged
    if abs(total - 1) > 1e-6:
        raise InputError(f"probability_masked, _replaced and _unchanged must add to 1; got {total}.")
    if not re.fullmatch(r"auto|fsdp|ddp(?!_(spawn|fork|notebook))\w*", args.strategy):
        raise InputError(
            f"strategy must be auto, ddp, a kind of ddp, or fsdp; got {args.strategy!r}. What DeepSpeed shards, fsdp "
            "does too, without another package; and processes are not forked here."
        )
    if args.strategy == "fsdp" and args.precision == "16-mixed":
        raise InputError("fsdp goes with fp32 and bf16: give --precision bf16-mixed, or another --strategy.")
    check_speed_flags(args, ("batch_size", "eval_batch_size"))
    if args.strategy == "fsdp" and args.stochastic_weight_averaging:
        raise InputError("fsdp does not go with --stochastic_weight_averaging: leave it out, or fsdp.")
    if args.max_tokens and "group_by_length" in args.given and not args.group_by_length:
        raise InputError("--max_tokens makes batches of similar lengths: leave out --group_by_length, or max_tokens.")
    if args.max_tokens and args.overfit_batches:
        raise InputError("--overfit_batches counts batches of --batch_size: leave it out, or --max_tokens.")
    if args.optimizer == "fuse_adam" and args.precision == "16-mixed" and args.gradient_clip_val is not None:
        raise InputError(
            "fuse_adam unscales fp16 gradients by itself, so they cannot be clipped: use adamw or bf16-mixed."
        )
    for logger in args.loggers:
        if logger not in _LOGGERS:
            raise InputError(f"loggers must be some of {', '.join(_LOGGERS)}; got {logger!r}.")
    if "none" in args.loggers and len(args.loggers) > 1:
        raise InputError(f"--loggers {' '.join(args.loggers)}: none is no logger. Leave it out, or the others.")
    if args.resume and args.overwrite:
        raise InputError("--resume goes on with the run, --overwrite removes it; give one of them.")
    for flag, needs in (*_NEEDED, *(() if args.resume else _OF_STAGES.items())):  # a resumed run knows its data
        if flag in args.given and getattr(args, flag) is not None and not getattr(args, needs):
            raise InputError(f"--{flag} needs --{needs}. Give that too, or leave it out.")
    if args.monitor is not None and not args.monitor.startswith("valid/"):
        raise InputError(f"--monitor is a score of the validation, valid/TASK/METRIC; got {args.monitor!r}.")
    if args.devices_stats and not {"tensorboard", "wandb"} & {*args.loggers}:
        raise InputError("--devices_stats needs a place to go: --loggers csv tensorboard (or wandb).")
    if args.stochastic_weight_averaging and (not args.max_epochs or args.max_epochs < 0 or args.max_steps > 0):
        raise InputError("--stochastic_weight_averaging needs --max_epochs, and no --max_steps: it begins by epochs.")
    if args.stochastic_weight_averaging and args.early_stopping:
        raise InputError("--stochastic_weight_averaging begins late, and --early_stopping may end before. Give one.")
    if args.overfit_batches and args.train_weights is not None:
        raise InputError("--overfit_batches takes the first batches, --train_weights draws from all. Give one.")
    if args.packing and args.sentence_pairs:
        raise InputError("--packing and --sentence_pairs are two ways to make blocks of documents; give one.")
    if args.tokenized_dir is not None and args.train_weights is not None:
        raise InputError("--tokenized_dir keeps all datasets as one; --train_weights draws from each. Leave one out.")
    if args.streaming:
        _check_streaming(args)
    for flag in WITH_K:
        if flag in args.given and args.k is None:
            raise InputError(f"--{flag} is for rows of k candidates: give -k too, or leave it out.")
    if args.train_weights is not None and len(args.train_weights) != len(args.train_dataset):
        raise InputError(
            f"--train_weights has {len(args.train_weights)} numbers, --train_dataset {len(args.train_dataset)} names."
        )
    if args.train_weights is not None and min(args.train_weights) <= 0:
        raise InputError(f"--train_weights must be more than 0; got {' '.join(map(str, args.train_weights))}.")
    return args


@dataclass(frozen=True, kw_only=True)
class PredictFlags:
    """Prediction"""

    pre_trained_model: str | None = None
    """Folder that `funneltfm train` has left: pre_trained_models/NAME/best."""
    predict_dataset: str | None = None
    """The data: a file, a folder, or a name on the hub, as for training; labels are not needed, but scored."""
    predict_config: str | None = None
    """Its configuration on the hub."""
    predict_filter: tuple[str, ...] = ()
    """Rows to keep."""
    predict_shard_dataset: int | None = None
    """Keep every n-th row only."""
    output_file: str | None = None
    """Where the predictions go, a row a line (jsonl)."""
    bad_rows: Literal["error", "skip"] = "error"
    """What to do with a broken row of a text file: stop, or skip it and say how many were skipped."""
    batch_size: int = 32
    """Examples in a batch, per device."""
    limit_predict_batches: int | float | None = None
    """Predict the first examples of the data only: so many batches of each device, or this share of all; whole queries
    and questions.
    """
    num_workers: int = 0
    """Processes that prepare batches; 0 prepares them in the main process."""
    accelerator: str = "auto"
    """cpu, gpu, cuda, mps, or auto."""
    devices: str = "auto"
    """Number of devices, or their numbers (0,1), or auto: all GPUs, or one CPU process."""
    precision: str = "32-true"
    """As for training."""
    debug: bool = False
    """Show where in the code an error arises."""


def _columns(group: Group) -> Group:
    """The flags of a group that name columns."""
    title, cls, _ = group
    return title, cls, tuple(name for name in flag_fields([group]) if not re.search(r"_columns?$|^task_flags$", name))


PREDICT_GROUPS: tuple[Group, ...] = (
    ("Prediction", PredictFlags, ()),
    *(group for group in map(_columns, TASK_GROUPS) if flag_fields([group])),
    (str(GenerationFlags.__doc__), GenerationFlags, ()),
    ("Speed", SpeedFlags, ("compile",)),
)
# Of the run that has trained a model, prediction goes by these.
_OF_THE_MODEL = frozenset(flag_fields(TASK_GROUPS)) | {"pipeline", "max_sequence_length", "seed"}


def make_predict_args(saved: dict[str, Any], flags: dict[str, Any]) -> Args:
    """Flags of `funneltfm train` with which a trained model predicts. saved: those of its run; flags: of prediction,
    which win.
    """
    given = {name: value for name, value in flags.items() if name != "output_file"}
    of_the_model = {name: value for name, value in saved.items() if name in _OF_THE_MODEL}
    if flags.get("limit_predict_batches") == 0:
        raise InputError("limit_predict_batches must be more than 0.")
    own = [*of_the_model.get("task_flags", ()), *given.get("task_flags", ())]
    if "label_column" in given and (named := next((word for word in own if ".label_column=" in word), None)):
        raise InputError(
            f"--label_column={given['label_column']}, but tasks of this model have their own columns ({named}). Name "
            f"them with --task_flags TASK.label_column=NAME."
        )
    if own:
        given["task_flags"] = tuple({word.partition("=")[0]: word for word in own}.values())
    if given.keys() & {"input_column", "input_columns"}:  # two names of one thing
        for name in ("input_column", "input_columns"):
            of_the_model.pop(name, None)
    return make_train_args(**(of_the_model | given))


def flag_words(flags: Mapping[str, Any]) -> list[str]:
    """Flags of `funneltfm train` or `predict` as a command line."""
    words, fields = [], flag_fields(TRAIN_GROUPS) | flag_fields(PREDICT_GROUPS)
    for name, value in flags.items():
        if isinstance(value, list | tuple):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={value}")
        elif fields[name].default is not None:
            words.append(f"--{name}=none")
    return words


def _check_streaming(args: Args) -> None:
    if args.train_dataset is None:
        raise InputError("--streaming needs --train_dataset.")
    if args.max_steps < 0:
        raise InputError("--streaming needs --max_steps: a stream has no end of its own.")
    for flag in (
        *("train_weights", "train_shard_dataset", "overfit_batches", "limit_train_batches", "k"),
        *("tokenized_dir", "prepare_data_workers", "max_tokens"),
    ):
        if getattr(args, flag):
            raise InputError(f"--{flag} does not go with --streaming.")
    for flag in ("max_epochs", "min_epochs"):
        if getattr(args, flag) is not None:
            raise InputError(f"--{flag}: a stream has no epochs. Leave it out; --max_steps ends the run.")
    if args.group_by_length and "group_by_length" in args.given:
        raise InputError("--group_by_length does not go with --streaming: a stream is read in batches.")


def _check_ranges(args: Args) -> None:
    for name in _AT_LEAST_ONE:
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"{name} must be at least 1; got {value}.")
    lengths = args.max_sequence_length
    if min(lengths) < 1:
        raise InputError(f"max_sequence_length must be at least 1; got {min(lengths)}.")
    if args.pipeline is not None and len(lengths) > (most := 2 if "retrieval" in task_names(args.pipeline) else 1):
        raise InputError(
            f"--max_sequence_length takes {'one number or two' if most == 2 else 'one number'} with --pipeline "
            f"{args.pipeline}; got {' '.join(map(str, lengths))}. Two are for retrieval, one a text."
        )
    for name in _NOT_NEGATIVE:
        if (value := getattr(args, name)) is not None and value < 0:
            raise InputError(f"{name} must not be negative; got {value}.")
    for name in _SHARES:
        if (value := getattr(args, name)) is not None and not 0 <= value <= 1:
            raise InputError(f"{name} must be between 0 and 1; got {value}.")
    for name in ("limit_train_batches", "val_check_interval", "max_epochs"):
        if getattr(args, name) == 0:
            raise InputError(f"{name} must be more than 0.")
    for name in ("limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches"):
        value = getattr(args, name)
        if value is not None and (value < 0 or (isinstance(value, float) and value > 1)):
            raise InputError(f"{name} must be a number of batches, or a share; got {value}.")
    if args.seeds is not None and ("seed" in args.given or len({*args.seeds}) < len(args.seeds)):
        raise InputError(f"--seeds must be different numbers, and takes the place of --seed; got {args.seeds}.")
    for flag in ("min_epochs", "min_steps"):
        if getattr(args, flag) is not None and not args.early_stopping and args.max_time is None:
            raise InputError(f"--{flag} holds back --early_stopping and --max_time. Give one of them, or leave it out.")
    check_workers(args.num_workers)
    for seed in (args.seed, *(args.seeds or ())):
        if not 0 <= seed < 2**32:
            raise InputError(f"seeds must be from 0 to {2**32 - 1}; got {seed}.")
    for name, value in args.flags().items():
        if name.endswith("_weight") and isinstance(value, float) and value < 0:
            raise InputError(f"{name} must not be negative; got {value}.")
    for name in _MORE_THAN_0:
        if (value := getattr(args, name)) is not None and value <= 0:
            raise InputError(f"{name} must be more than 0; got {value}.")
    for name, losses in (
        ("margin", ("contrastive_loss", "online_contrastive_loss")),
        ("temperature", ("in_batch_negatives_loss",)),
    ):
        if name in args.given and args.loss_fn not in losses:
            raise InputError(f"--{name} is read by --loss_fn {' or '.join(losses)}, not by {args.loss_fn}.")
