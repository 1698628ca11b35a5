"""The flags of a finetuning run: frozen dataclasses whose attribute docstrings are the help texts. No torch here."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, Literal, get_args, get_origin

import yaml

from funneltfm.errors import InputError, brief
from funneltfm.funnel.config import ModelConfig, model_size


@dataclass(frozen=True, kw_only=True)
class StartFlags:
    """Where the model comes from"""

    model_size: str | None = None
    """A size by name: H768 or H1024 sets d_embed, d_model, n_head, d_head and d_inner; B4-4-4H768 sets block_size
    too.
    """
    vocab_size: int | None = None
    """Rows of the embedding table. Default: as many as the vocabulary has pieces."""
    init_ckpt: str | None = None
    """Checkpoint (model.pt) to start from; without it training starts from scratch."""
    init_ckpt_config: str | None = None
    """Config (JSON) of init_ckpt. Its keys win over flags. Default: the net_config*.json beside init_ckpt."""
    overwrite_keys: str = ""
    """Config keys, separated by commas, for which flags win over init_ckpt_config."""


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """Data and text"""

    dataset: str | None = None
    """A known set (CoLA, SST-2, MRPC, QQP, STS-B, MNLI, QNLI, RTE, WNLI, AX, Yelp-2, Yelp-5, IMDB, AG, DBpedia,
    Amazon-2, Amazon-5), or custom for your own files.
    """
    data_dir: str | None = None
    """Folder with the set's files; for custom: train, valid (or dev) and test as .jsonl, .csv or .tsv, or a
    Hugging Face dataset folder.
    """
    text_a: str = "text_a"
    """custom: column of the text, or of the first text of a pair."""
    text_b: str | None = None
    """custom: column of the second text of a pair."""
    label: str = "label"
    """custom: column of the label."""
    regression: bool = False
    """custom: labels are numbers to predict, not classes."""
    bad_rows: Literal["error", "skip"] = "error"
    """What to do with a broken row of the data: stop, or skip it and say how many were skipped."""
    output_dir: str = "proc_data"
    """Folder of the processed data, reused when nothing that matters has changed."""
    overwrite_data: bool = False
    """Process the data anew even if it is there."""
    max_length: int = 128
    """Longest input in tokens, special ones included; longer texts are cut."""
    pad_to: Literal["canonical", "longest", "max_length"] = "canonical"
    """How far a batch is padded: canonical is the shortest length at which padding changes no result, longest is
    the original's way.
    """
    tokenizer_type: Literal["word_piece", "sent_piece"] = "word_piece"
    """Kind of vocabulary."""
    tokenizer_path: str | None = None
    """Vocabulary file: one piece a line (word_piece) or a SentencePiece model (sent_piece)."""
    cased: bool = False
    """Keep upper case and accents."""
    seg_id_a: int = 0
    """Segment id of the first text."""
    seg_id_b: int = 1
    """Segment id of the second text."""
    seg_id_pad: int = 0
    """Segment id of padding."""
    num_workers: int = 0
    """Processes that prepare batches; 0 prepares them in the main process."""


@dataclass(frozen=True, kw_only=True)
class TrainFlags:
    """Training and evaluation"""

    lr: float = 1e-5
    """Highest learning rate."""
    warmup_prop: float = 0.1
    """Share of the steps in which the learning rate rises from 0 to lr; then it falls linearly to min_lr."""
    min_lr: float = 0.0
    """Learning rate at the end."""
    weight_decay: float = 0.01
    """Weight decay of AdamW; biases and layer norms have none."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    epochs: int = 10
    """Passes over the training data."""
    train_bsz: int = 16
    """Batch size in training, per device."""
    accumulate_grad_batches: int = 1
    """Batches whose gradients make one step: a step learns from train_bsz * devices * this many examples."""
    gradient_checkpointing: bool = False
    """Keep less for the backward pass and compute it again: less memory, more time, the same numbers."""
    valid_bsz: int = 32
    """Batch size in validation."""
    test_bsz: int = 32
    """Batch size in testing."""
    n_valid: int = 10
    """Validations in the run, evenly spaced, the last one at the end."""
    save_steps: int = 0
    """Save a checkpoint to resume from every so many steps too; 0 saves at validations and when asked to stop."""
    n_log_epoch: int = 20
    """Log lines in an epoch."""
    seed: int = 42
    """Seed of initialisation, data order and dropout. The same seed gives the same numbers on the same machine."""


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """The run"""

    model_dir: str | None = None
    """Folder of the run: config, metrics, checkpoints, best model, predictions, plots. Default: the next free
    exp/DATASET/run_N.
    """
    log_path: str | None = None
    """Log file. Default: log.txt in model_dir."""
    overwrite: bool = False
    """Start anew in a model_dir that already holds a run; its files are removed first."""
    resume: bool = False
    """Go on with the run in model_dir (by default the newest exp/DATASET/run_N) from its last checkpoint."""
    test_only: bool = False
    """No training: evaluate init_ckpt, or else the best model in model_dir."""
    write_prediction: bool = False
    """Write predictions of the valid and test sets, for GLUE sets also in the form that its server takes."""
    baselines: bool = False
    """Also score the majority class and a linear model on a bag of words, for comparison."""
    debug: bool = False
    """Show where in the code an error arises."""


@dataclass(frozen=True, kw_only=True)
class DeviceFlags:
    """Devices and precision"""

    device_id: int = 0
    """GPU to use; -1 is the CPU. Without a GPU the CPU is used. Several processes take one GPU each."""
    fp16: bool = False
    """Train in fp16, in the way that amp_opt says."""
    bf16: bool = False
    """Train in bf16, in the way that amp_opt says: the range of fp32, so no loss scaling, and fewer digits."""
    amp_opt: Literal["O0", "O1", "O2", "O3"] = "O2"
    """With fp16 or bf16: O0 is fp32, O1 fp32 weights and autocast, O2 half weights with norms and master weights in
    fp32, O3 all half. O1 and O2 scale the loss of fp16 dynamically.
    """
    distributed_world_size: int = 1
    """Number of processes; 0 is one for each GPU, or two where there is none. They are started here, unless torchrun,
    SLURM or Ray has started them.
    """
    distributed_rank: int = 0
    """Rank of this process, where it is started by hand (with distributed_init_method)."""
    distributed_init_method: str | None = None
    """tcp://HOST:PORT of the process of rank 0, where processes are started by hand. device_id is then the GPU."""
    distributed_port: int = 11111
    """Port at which the processes started here meet. Default: a free one."""
    distributed_backend: Literal["nccl", "gloo"] = "nccl"
    """How GPUs talk to each other; CPUs always use gloo."""
    ddp_backend: Literal["apex", "pytorch"] = "pytorch"
    """Data parallelism of PyTorch, or that of apex (and its fused optimizer) where the installed apex has them."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """What processes share out: ddp the examples; fsdp also weights, gradients and optimizer state (fp32, or --amp_opt
    O1 with --bf16).
    """
    launcher: Literal["local", "ray"] = "local"
    """Who starts the processes: this machine, or the Ray cluster at RAY_ADDRESS (a local one where there is none)."""
    log_all_processes: bool = False
    """Every process logs, not the first alone."""


@dataclass(frozen=True, kw_only=True)
class SpeedFlags:
    """Speed"""

    max_tokens: int = 0
    """Batches of as many examples of similar length as fit into so many tokens, padding included, in place of batch
    sizes; 0 counts examples.
    """
    matmul_precision: Literal["highest", "high", "medium", "auto"] = "auto"
    """Of products of fp32 matrices, in torch's words. On many CPUs medium is another library, as exact and up to twice
    as fast; elsewhere it is less exact. auto takes medium on a CPU where a trial finds it as exact as highest,
    for models at least 256 wide.
    """
    attention_path: Literal["auto", "plain", "chunked"] = "auto"
    """How a FunnelTFM computes attention, with the same numbers: plain in one call, chunked in pieces that stay in the
    cache of a CPU. auto is chunked on a CPU, plain elsewhere and with compile.
    """
    compile: bool = False
    """Compile the encoder with torch.compile, once for all lengths and batch sizes."""


def check_speed_flags(args: Any, batch_sizes: Sequence[str]) -> None:
    """What both commands that train refuse. batch_sizes: the flags that max_tokens replaces."""
    if args.max_tokens < 0:
        raise InputError(f"max_tokens must not be negative; got {args.max_tokens}.")
    if args.max_tokens and (twice := sorted(args.given.intersection(batch_sizes))):
        raise InputError(f"max_tokens decides how large batches are; leave out {twice[0]}, or max_tokens.")
    if args.compile and args.attention_path == "chunked":
        raise InputError("attention_path chunked is not for torch.compile; leave it out, or compile.")
    if args.compile and args.strategy == "fsdp":
        raise InputError("fsdp does not go with --compile: leave it out, or fsdp.")


# What the data decides (num_class, pad_id) and what a classifier does not use (decoder_size) are no flags.
MODEL_SKIP = ("vocab_size", "num_class", "pad_id", "decoder_size")
Group = tuple[str, type, tuple[str, ...]]  # (title, dataclass, names to leave out)
GROUPS: tuple[Group, ...] = (
    ("Data and text", DataFlags, ()),
    ("Where the model comes from", StartFlags, ()),
    ("The model", ModelConfig, MODEL_SKIP),
    ("Training and evaluation", TrainFlags, ()),
    ("The run", RunFlags, ()),
    ("Devices and precision", DeviceFlags, ()),
    ("Speed", SpeedFlags, ()),
)

_PATH_ENDINGS = ("_dir", "_path", "_file", "_ckpt", "_dataset")
_POSITIVE = ("lr", "epochs", "train_bsz", "accumulate_grad_batches", "valid_bsz", "test_bsz", "n_valid", "n_log_epoch")
_NOT_NEGATIVE = (
    *(
        "min_lr",
        "weight_decay",
        "clip",
        "seed",
        "num_workers",
        "seg_id_a",
        "seg_id_b",
        "seg_id_pad",
        "save_steps",
    ),
    *("distributed_world_size", "distributed_rank"),
)


class Args(SimpleNamespace):
    """All flags of a run in one flat namespace, checked. `given` holds the names that were set on purpose."""

    given: frozenset[str] = frozenset()

    def flags(self) -> dict[str, Any]:
        """Every flag and its value."""
        return {name: value for name, value in vars(self).items() if name != "given"}


def flag_fields(groups: Sequence[Group] = GROUPS) -> dict[str, dataclasses.Field]:
    """Every flag by name, in the order of the help."""
    return {field.name: field for _, cls, skip in groups for field in dataclasses.fields(cls) if field.name not in skip}


def other_names(groups: Sequence[Group]) -> dict[str, str]:
    """The second names of flags that have one, to the first."""
    fields = flag_fields(groups).values()
    names = {field.metadata["alias"].lstrip("-"): field.name for field in fields if "alias" in field.metadata}
    return {other: name for other, name in names.items() if other != name}


def typed_args(
    groups: Sequence[Group], verb: str, flags: dict[str, Any], elsewhere: Mapping[str, str] = MappingProxyType({})
) -> Args:
    """Flags over their defaults. Raises InputError for a name that is no flag and for values of another type.
    elsewhere: what to say of names that people look for here.
    """
    fields, names = flag_fields(groups), other_names(groups)
    for other in sorted(names.keys() & flags.keys()):
        if names[other] in flags:
            raise InputError(f"{other} and {names[other]} are the same flag; give one of them.")
    flags = {names.get(name, name): value for name, value in flags.items()}
    if unknown := sorted(set(flags) - set(fields)):
        if unknown[0] in elsewhere:
            raise InputError(f"there is no flag {unknown[0]}: {elsewhere[unknown[0]]}.")
        raise InputError(f"unknown flag {', '.join(unknown)}; `funneltfm {verb} --help` lists them.")
    flags = {name: _checked(name, fields[name].type, value) for name, value in flags.items()}
    if empty := [name for name, value in flags.items() if value == "" and name.endswith(_PATH_ENDINGS)]:
        raise InputError(f"{empty[0]} is empty. Name a path, or leave the flag out.")
    args = Args(**{name: field.default for name, field in fields.items()} | flags)
    args.given = frozenset(flags)
    return args


def make_args(**flags: Any) -> Args:
    """Flags of `funneltfm classify`. Raises InputError for a name that is no flag and for values out of range."""
    args = typed_args(GROUPS, "classify", flags)
    _check(args)
    return args


def size_beside(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """What `--model_size=NAME` sets; an InputError where a flag that was given says otherwise."""
    size = model_size(name)
    if clash := [key for key in sorted(size.keys() & given.keys()) if given[key] != size[key]]:
        raise InputError(
            f"--model_size={name} sets {clash[0]} to {size[clash[0]]}, but --{clash[0]}={given[clash[0]]} was given "
            "too."
        )
    return size


def item_type(kind: Any) -> Any:
    """Type of the items of a flag that takes several values (tuple[T, ...], or None beside it); else None."""
    lists = [k for k in (kind, *get_args(kind)) if get_origin(k) is tuple]
    return get_args(lists[0])[0] if lists else None


def choices(kind: Any) -> tuple[Any, ...] | None:
    """The values that a flag may have (Literal[...], or None beside it); else None."""
    literals = [k for k in (kind, *get_args(kind)) if get_origin(k) is Literal]
    return get_args(literals[0]) if literals else None


def _checked(name: str, kind: Any, value: Any) -> Any:
    """`value` if it is of the flag's type; whole numbers are taken for numbers, lists for tuples, a number for a
    tuple of one.
    """
    kinds = get_args(kind) or (kind,)
    if type(None) in kinds and len(kinds) == 2 and get_origin(kinds[0]) is Literal:  # a choice, or none
        return None if value is None else _checked(name, kinds[0], value)
    if (item := item_type(kind)) is not None:
        if value is None and type(None) in kinds:
            return None
        if isinstance(value, int | float) and item is not str:
            value = (value,)
        if not isinstance(value, list | tuple) or not value:
            raise InputError(f"{name} must be a list of values; got {value!r}.")
        return tuple(_checked(name, item, v) for v in value)
    if (words := choices(kind)) is not None:
        if value not in words and not (value is None and type(None) in kinds):
            raise InputError(f"{name} must be one of {', '.join(map(str, words))}; got {value!r}.")
        return value
    whole = isinstance(value, int) and not isinstance(value, bool)
    if float in kinds and int not in kinds and whole and abs(value) < 2**1000:
        value = float(value)
    if type(value) not in kinds or (isinstance(value, float) and not math.isfinite(value)):
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        expected = "a number" if float in kinds else names[kinds[0]]
        raise InputError(f"{name} must be {expected}; got {value!r}.")
    return value


def _check(args: Args) -> None:
    for name in _POSITIVE:
        if getattr(args, name) <= 0:
            raise InputError(f"{name} must be more than 0; got {getattr(args, name)}.")
    for name in _NOT_NEGATIVE:
        if getattr(args, name) < 0:
            raise InputError(f"{name} must not be negative; got {getattr(args, name)}.")
    for name, value in args.flags().items():
        if isinstance(value, int) and value >= (limit := 2**32 if name == "seed" else 2**31):
            raise InputError(f"{name} must be below {limit}; got {value}.")
    check_workers(args.num_workers)
    if args.overwrite and (args.resume or args.test_only):
        raise InputError(
            f"--overwrite removes the run that --{'resume' if args.resume else 'test_only'} needs; give one of them."
        )
    if not 0 <= args.warmup_prop <= 1:
        raise InputError(f"warmup_prop must be between 0 and 1; got {args.warmup_prop}.")
    if args.min_lr > args.lr:
        raise InputError(f"min_lr must not be above lr; got {args.min_lr} and {args.lr}.")
    if args.max_length < 5:
        raise InputError(f"max_length must leave room for [CLS], [SEP] and text: at least 5; got {args.max_length}.")
    if args.device_id < -1:
        raise InputError(f"device_id must be the number of a GPU, or -1 for the CPU; got {args.device_id}.")
    if not 0 < args.distributed_port < 2**16:
        raise InputError(f"distributed_port must be between 1 and 65535; got {args.distributed_port}.")
    check_speed_flags(args, ("train_bsz", "valid_bsz", "test_bsz"))
    if args.attention_path == "chunked" and args.attn_type != "rel_shift":
        raise InputError(f"attention_path chunked is for attn_type rel_shift; got {args.attn_type}.")
    if args.fp16 and args.bf16:
        raise InputError("fp16 and bf16 exclude each other; give one.")
    if args.strategy == "fsdp":
        half = args.fp16 or (args.bf16 and args.amp_opt != "O1")
        if (half and args.amp_opt != "O0") or args.launcher == "ray" or args.ddp_backend == "apex":
            raise InputError(
                "--strategy fsdp goes with fp32 weights (no half precision, or --bf16 --amp_opt O1), and not with "
                "--launcher ray or --ddp_backend apex."
            )


def check_accumulate(args: Args, examples: int) -> None:
    """An InputError for a step of more batches than there are training examples."""
    if args.accumulate_grad_batches > examples:
        raise InputError(
            f"accumulate_grad_batches={args.accumulate_grad_batches}: a step needs as many examples at least, and "
            f"there are {examples} to train on."
        )


def check_workers(number: int, what: str = "num_workers") -> None:
    """An InputError for more processes than any machine of this size is for."""
    if number > (most := max(64, 4 * (os.cpu_count() or 1))):
        raise InputError(f"{what} must be at most {most} on this machine; got {number}.")


def read_yaml(path: str | os.PathLike[str], what: str, loader: str = "SafeLoader") -> Any:
    """The content of a YAML file in which no key comes twice; else an InputError that says `what` it should be.

    loader: "SafeLoader", or "BaseLoader" for values that all are text.
    """

    class EachKeyOnce(getattr(yaml, loader)):  # type: ignore[misc]
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := [name for i, name in enumerate(names) if name in names[:i]]:
                raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} is there twice", node.start_mark)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), Loader=EachKeyOnce)
    except (OSError, ValueError, OverflowError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"cannot read {what} {path}: {brief(' '.join(str(error).split()), 1000)}") from error
