"""From flags to what a run needs: its data, its model, its devices."""

import dataclasses
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy

from funneltfm.data.batching import data_digest
from funneltfm.data.encoding import EncodedSplit, EncodingConfig, load_split
from funneltfm.data.readers import DatasetSpec, custom_dataset, get_dataset, read_split, source_files
from funneltfm.data.tokenization import Tokenizer, check_case, get_tokenizer
from funneltfm.errors import InputError
from funneltfm.files import existing_file
from funneltfm.funnel.checkpoints import config_beside, load_checkpoint
from funneltfm.funnel.config import ModelConfig
from funneltfm.funnel.model import FunnelTFM
from funneltfm.tasks.baselines import baselines
from funneltfm.tasks.classification import Classification
from funneltfm.training import ranks
from funneltfm.training.config import MODEL_SKIP, Args, check_workers, flag_fields, make_args, read_yaml, size_beside
from funneltfm.training.optim import from_apex
from funneltfm.training.precision import AmpPrecision
from funneltfm.training.rundir import RunDir, find_run, read_labels
from funneltfm.training.sharding import ShardedStrategy

log = logging.getLogger(__name__)

# ---- data


@dataclass(frozen=True)
class Data:
    """What a run learns from and is scored on."""

    task: Classification
    tokenizer: Tokenizer
    vocabulary: bytes
    """The tokenizer's file."""
    splits: dict[str, EncodedSplit]

    def digest(self) -> str:
        """Of all that a run learns from and is chosen by: another one is another run."""
        names = ("train", *self.valid)
        arrays = [array for name in names for array in vars(self.splits[name]).values()]
        return data_digest(self.vocabulary, repr(self.task.spec.labels).encode(), *arrays)

    def sizes(self) -> str:
        return ", ".join(f"{len(encoded)} {split}" for split, encoded in self.splits.items())

    @property
    def valid(self) -> list[str]:
        """The validation splits; the first one selects the best checkpoint."""
        return [split for split in self.splits if split.startswith("valid")]


def _is_custom(args: Args) -> bool:
    return args.dataset is not None and args.dataset.lower() == "custom"


def task_name(args: Args) -> str:
    """What a run is called: the dataset's own name, or that of the folder of custom data."""
    if args.dataset is None:
        raise InputError(
            "name the data: --dataset (CoLA, SST-2, ..., or custom) and --data_dir, the folder with its files."
        )
    if not _is_custom(args):
        return get_dataset(args.dataset).name
    if args.data_dir is None:
        raise InputError("name the folder with the data files: --data_dir.")
    return Path(args.data_dir).resolve().name or "custom"


# Flags that change neither what is learned nor in which order, so a resumed run may have others.
_FREE_ON_RESUME = {
    *("resume", "model_dir", "log_path", "output_dir", "overwrite_data", "num_workers", "save_steps"),
    *("write_prediction", "baselines", "debug", "device_id", "test_bsz", "log_all_processes", "launcher"),
    *("distributed_rank", "distributed_init_method", "distributed_port", "distributed_backend"),
}


_PATHS = ("data_dir", "output_dir", "tokenizer_path", "init_ckpt", "init_ckpt_config", "model_dir", "log_path")


def with_absolute_paths(flags: dict[str, Any]) -> dict[str, Any]:
    """Flags with paths that mean the same from any folder."""
    return {name: os.path.abspath(v) if name in _PATHS and v is not None else v for name, v in flags.items()}


def goes_on(args: Args) -> bool:
    """Whether the run is there already: it is resumed, or its own model is tested."""
    return args.resume or (args.test_only and args.init_ckpt is None)


def with_run_flags(args: Args) -> Args:
    """Resuming or testing a run needs no more than its folder: what was not given now is taken from its config.yaml."""
    if not goes_on(args):
        return args
    name = task_name(args) if args.model_dir is None else ""
    run_dir = find_run(args.model_dir, name, going_on=True, overwrite=False)
    if not run_dir.config.is_file():
        if args.dataset is None:
            raise InputError(f"there is no run to go on with in {run_dir.root}: it has no {run_dir.config.name}.")
        return args
    dropped = {"resume", "overwrite"}
    if args.test_only:
        dropped |= {"init_ckpt", "init_ckpt_config", "distributed_world_size", "launcher"}
    saved = read_yaml(run_dir.config, "the flags of the run in")
    if not isinstance(saved, dict) or not all(isinstance(key, str) for key in saved):
        raise InputError(f"{run_dir.config} must hold the flags of the run: `name: value` lines.")
    saved = {key: value for key, value in saved.items() if key not in dropped}
    given = {name: getattr(args, name) for name in args.given}
    if args.resume:
        for key in sorted(args.given - _FREE_ON_RESUME):
            if key in saved and with_absolute_paths(given)[key] != saved[key]:
                raise InputError(
                    f"the run in {run_dir.root} was started with --{key}={saved[key]}, so it cannot go on with "
                    f"--{key}={given[key]}. Leave the flag out, or start another run."
                )
    defaults = {name: field.default for name, field in flag_fields().items()}
    chosen = {name: value for name, value in saved.items() if name not in defaults or value != defaults[name]}
    try:
        merged = make_args(**(chosen | given | {"model_dir": str(run_dir.root)}))
    except InputError as error:
        raise InputError(f"in {run_dir.config}: {error}") from error
    merged.given = args.given
    return merged


def _spec(args: Args) -> DatasetSpec:
    task_name(args)
    if args.data_dir is None:
        raise InputError(f"name the folder with the files of {args.dataset}: --data_dir.")
    if _is_custom(args):
        spec = custom_dataset(args.data_dir, args.text_a, args.text_b, args.label, args.regression, args.bad_rows)
        return dataclasses.replace(spec, name=task_name(args))
    if misplaced := {"text_a", "text_b", "label", "regression"} & args.given:
        raise InputError(f"--{min(misplaced)} is for --dataset=custom; the columns of {args.dataset} are known.")
    return get_dataset(args.dataset)


def load_data(args: Args) -> Data:
    spec = _spec(args)
    if args.tokenizer_path is None:
        raise InputError("name the vocabulary: --tokenizer_path (vocab.uncased.txt of a published checkpoint, say).")
    if spec.labels is not None and len(spec.labels) < 2:
        raise InputError(
            f"the training data in {args.data_dir} has one class alone ({', '.join(spec.labels)}): there is nothing "
            f"to learn. Is --label={args.label} the right column? For numbers to predict, give --regression."
        )
    if args.tokenizer_type == "word_piece":
        check_case(Path(args.tokenizer_path), args.cased)
    tokenizer = get_tokenizer(args.tokenizer_type, args.tokenizer_path, args.cased)
    encoding = EncodingConfig(args.max_length, args.seg_id_a, args.seg_id_b, args.seg_id_cls)
    wanted = [split for split in spec.splits if split != "train" or not args.test_only]
    if "train" not in spec.splits and not args.test_only:
        raise InputError(f"{spec.name} has no training data: give --test_only and the model with --init_ckpt.")
    splits = {}
    for split in wanted:
        # Training needs train and valid; a test file may be absent, unless its predictions are asked for.
        optional = _is_custom(args) or not (args.test_only or args.write_prediction)
        if split.startswith("test") and optional and not _present(spec, args, split):
            continue
        splits[split] = load_split(
            spec,
            Path(args.data_dir),
            split,
            tokenizer,
            encoding,
            Path(args.output_dir),
            args.overwrite_data,
            args.bad_rows,
        )
    return Data(Classification(spec), tokenizer, Path(args.tokenizer_path).read_bytes(), splits)


def _present(spec: DatasetSpec, args: Args, split: str) -> bool:
    try:
        return bool(source_files(spec, args.data_dir, split))
    except InputError:
        return False


def score_baselines(args: Args, data: Data) -> dict[str, dict[str, float]]:
    if data.task.spec.splits.get("train") is None or not data.valid:
        raise InputError(f"--baselines needs train and valid data, which {data.task.spec.name} lacks.")
    train, valid = (
        read_split(data.task.spec, args.data_dir, split, bad_rows=args.bad_rows) for split in ("train", data.valid[0])
    )
    return baselines(data.task, train, valid)


# ---- model


def _net_config(args: Args, data: Data, config_path: Path | None) -> ModelConfig:
    """The model's config: from flags, or from a file whose keys win over flags; the data decides the number of
    classes.
    """
    flags = {name: getattr(args, name) for name in ModelConfig.names() if name not in MODEL_SKIP}
    flags["vocab_size"] = data.tokenizer.vocab_size if args.vocab_size is None else args.vocab_size
    if args.model_size:
        flags |= size_beside(args.model_size, {name: flags[name] for name in args.given & flags.keys()})
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
            f"{config_path or '--vocab_size'} says {config.vocab_size}. Give the vocabulary that belongs to the "
            "checkpoint; a table that is meant to be larger than the vocabulary must be named with --vocab_size."
        )
    return dataclasses.replace(config, num_class=data.task.num_class, pad_id=data.tokenizer.pad_id)


def make_model(args: Args, data: Data, run_dir: RunDir) -> FunnelTFM:
    ckpt = Path(args.init_ckpt) if args.init_ckpt else None
    if args.test_only and ckpt is None:
        if not run_dir.model.is_file():
            raise InputError(
                f"--test_only needs a trained model: name it with --init_ckpt, or its run with --model_dir. "
                f"There is none in {run_dir.root}."
            )
        ckpt = run_dir.model
    if ckpt is None:
        if args.init_ckpt_config:
            raise InputError("--init_ckpt_config was given without --init_ckpt.")
        if args.overwrite_keys:
            raise InputError("--overwrite_keys is about the config of --init_ckpt, which was not given.")
        return FunnelTFM(_net_config(args, data, None))
    existing_file(ckpt, "the checkpoint")
    trained = read_labels(ckpt)
    if args.test_only and trained is not None and trained != data.task.spec.labels:
        raise InputError(
            f"the model {ckpt} was trained for the classes {', '.join(trained)}, but {data.task.spec.name} "
            f"has {', '.join(data.task.spec.labels or ['numbers'])}."
        )
    config_path = Path(args.init_ckpt_config) if args.init_ckpt_config else config_beside(ckpt, "--init_ckpt_config")
    config = _net_config(args, data, config_path)
    # A classifier reads [CLS] from the encoder, so a decoder would only be dead weight.
    model = FunnelTFM(dataclasses.replace(config, decoder_size="0"))
    fresh = load_checkpoint(model, ckpt, new_head=not args.test_only, decoder_layers=config.decoder[0])
    log.info("loaded %s%s", ckpt, f"; new: {', '.join(fresh)}" if fresh else "")
    return model


# ---- devices


def take_place(args: Args) -> ranks.Place | None:
    """Where a launcher has put this process, if one has; the number of processes becomes a flag that is set."""
    place = ranks.find_place(args.distributed_world_size, args.distributed_rank, args.distributed_init_method)
    wanted = args.distributed_world_size
    if place is not None:
        if wanted > 1 and "distributed_world_size" in args.given and wanted != place.size:
            raise InputError(f"--distributed_world_size={wanted}, but the launcher has started {place.size} processes.")
        args.distributed_world_size = place.size
        args.given |= {"distributed_world_size"}
    elif "distributed_rank" in args.given:
        raise InputError(
            "--distributed_rank is for processes that are started by hand: give --distributed_init_method=tcp://HOST:"
            "PORT too, or leave it out and all processes are started here."
        )
    elif args.launcher == "ray" and wanted == 1:
        raise InputError("--launcher=ray is for several processes: say how many with --distributed_world_size.")
    elif wanted == 0:
        gpus = torch.cuda.device_count() if args.device_id >= 0 else 0
        args.distributed_world_size = gpus or 2
    elif args.launcher != "ray":
        check_workers(wanted, "distributed_world_size")
    return place


def backend(args: Args) -> str:
    """How the processes talk."""
    return args.distributed_backend if args.device_id >= 0 and torch.cuda.is_available() else "gloo"


@dataclass(frozen=True)
class Devices:
    """What a run runs on."""

    accelerator: Literal["cpu", "cuda", "mps"]
    index: int
    """Number of the GPU, where this process is the only one of its machine; else each takes that of its place."""
    level: str | None
    """O0 to O3, or None for plain fp32."""
    dtype: torch.dtype

    @property
    def precision(self) -> str:
        """For people: "fp32", "fp16 O2", ..."""
        return "fp32" if self.level in (None, "O0") else str(self.plugin())

    def plugin(self) -> AmpPrecision | None:
        """A new precision plugin; it holds the state of one training."""
        return None if self.level in (None, "O0") else AmpPrecision(self.level, self.dtype, self.accelerator)  # type: ignore[arg-type]


def choose_devices(args: Args) -> Devices:
    """The accelerator and the precision that the flags ask for; an InputError where this machine lacks it."""
    kind: Literal["cpu", "cuda", "mps"] = "cpu"
    if args.device_id >= 0 and torch.cuda.is_available():
        kind = "cuda"
        gpus, index = torch.cuda.device_count(), args.device_id if ranks.local_size() == 1 else ranks.local_rank()
        if max(index, ranks.local_size() - 1) >= gpus:
            what = f"{ranks.local_size()} processes" if ranks.local_size() > 1 else f"device_id {index}"
            raise InputError(f"{what}: this machine has {gpus} GPUs, numbered from 0. --device_id=-1 is the CPU.")
        if ranks.size() > 1:
            torch.cuda.set_device(index)
    elif args.device_id >= 0 and torch.backends.mps.is_available():
        kind = "mps"
    elif args.device_id > 0 and args.distributed_init_method is None:
        raise InputError(f"device_id {args.device_id}: this machine has no GPU. Leave it out, or give -1 for the CPU.")
    if not (args.fp16 or args.bf16) and "amp_opt" in args.given and args.amp_opt != "O0":
        raise InputError(f"--amp_opt={args.amp_opt} needs --fp16 or --bf16.")
    if (args.fp16 or args.bf16 or ranks.size() > 1) and kind == "mps":
        raise InputError(
            "--fp16, --bf16 and several processes run on CUDA and on the CPU (--device_id=-1), not on MPS."
        )
    if "distributed_backend" in args.given and args.distributed_backend == "nccl" and kind != "cuda":
        raise InputError("--distributed_backend=nccl needs GPUs; leave it out.")
    level = args.amp_opt if args.fp16 or args.bf16 else None
    return Devices(kind, args.device_id, level, torch.bfloat16 if args.bf16 else torch.float16)


def warn_of_diverging(args: Args, config: ModelConfig) -> None:
    """The largest published model diverges in O2, as its authors found."""
    if args.fp16 and args.amp_opt == "O2" and config.block_size == "10_10_10" and config.d_model == 1024:
        log.warning(
            "B10-10-10H1024 with --amp_opt=O2 is known to be unstable; its authors recommend --amp_opt=O1 for it."
        )


def make_trainer(args: Args, devices: Devices, **kwargs: Any) -> lightning.Trainer:
    """Lightning's Trainer for these devices and all processes of the run."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    plugins = kwargs.pop("plugins", [])
    precision = devices.plugin()
    one: Any = [devices.index] if devices.accelerator == "cuda" else 1
    if ranks.size() > 1:
        kwargs["strategy"] = _strategy(args)
        if args.launcher == "ray":  # which has started this process and gives it its device
            from ray.train.lightning import RayLightningEnvironment

            plugins, kwargs["devices"] = [*plugins, RayLightningEnvironment()], "auto"
        else:
            kwargs["num_nodes"] = ranks.size() // ranks.local_size()
            kwargs["devices"] = one if ranks.local_size() == 1 else ranks.local_size()
            plugins = [*plugins, TorchElasticEnvironment()]  # ranks.joined has put everything into the environment
    else:
        kwargs["devices"] = one
        plugins = [*plugins, LightningEnvironment()]  # one process is one process, on SLURM too
    trainer = lightning.Trainer(
        accelerator=devices.accelerator,
        plugins=[*plugins, *([precision] if precision else [])],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **kwargs,
    )
    # Lightning's own handlers would end a run without saving, or talk to other processes out of turn: see SaveRun.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


def _strategy(args: Args) -> Any:
    if args.ddp_backend == "apex" and (apex_ddp := from_apex("parallel.DistributedDataParallel", "torch's own DDP")):

        class ApexStrategy(DDPStrategy):
            def _register_ddp_hooks(self) -> None:
                """apex has none."""

            def _setup_model(self, model: torch.nn.Module) -> Any:
                return apex_ddp(model)

        return ApexStrategy()
    if args.launcher == "ray":
        from ray.train.lightning import RayDDPStrategy

        return RayDDPStrategy()
    return ShardedStrategy() if args.strategy == "fsdp" else DDPStrategy()
