"""The flags of optimizers and learning-rate schedules, and which of them each one reads. No torch here.

Apart from training.optimizers, so that `funneltfm train --help` need not wait for torch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from funneltfm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class OptimizerFlags:
    """The optimizer"""

    optimizer: Literal["adamw", "adafactor", "fuse_adam", "tf_adamw", "adam8bit", "adamw8bit"] = "adamw"
    """adamw; fuse_adam: AdamW in one kernel, on CPU and CUDA; tf_adamw: AdamW without bias correction, as BERT was
    trained; adafactor: little memory, at the learning rate given; adam8bit, adamw8bit: moments in 8 bits, those of
    embedding tables in 32 (bitsandbytes, where both decay weights as AdamW does).
    """
    learning_rate: float = 1e-4
    """Highest learning rate."""
    weight_decay: float = 0.0
    """Weight decay, apart from the gradient; biases and norms have none."""
    layerwise_lr_decay: float = field(default=1.0, metadata={"alias": "--layerwise_lr_decay_power"})
    """Factor of the learning rate from a layer to the one below. The head has learning_rate, the encoder's last layer
    that times this, the one below that times this squared, and so on down to the embeddings; 1 is the same for all.
    """
    adamw_epsilon: float = 1e-8
    """adamw, adam8bit, adamw8bit: added to the root of the second moment."""
    adamw_betas: tuple[float, ...] = (0.9, 0.999)
    """adamw, adam8bit, adamw8bit: decay of the two moments."""
    adamw_amsgrad: bool = False
    """adamw: divide by the largest second moment so far."""
    fuse_adam_epsilon: float = 1e-8
    """fuse_adam: added to the root of the second moment."""
    fuse_adam_betas: tuple[float, ...] = (0.9, 0.999)
    """fuse_adam: decay of the two moments."""
    fuse_adam_amsgrad: bool = False
    """fuse_adam: divide by the largest second moment so far."""
    tfadamw_epsilon: float = 1e-6
    """tf_adamw: added to the root of the second moment."""
    tfadamw_betas: tuple[float, ...] = (0.9, 0.999)
    """tf_adamw: decay of the two moments."""
    tfadamw_amsgrad: bool = False
    """tf_adamw: divide by the largest second moment so far."""
    adafactor_epsilon: tuple[float, ...] = (1e-30, 1e-3)
    """adafactor: added to the squared gradient; and, with adafactor_scale_parameter, the smallest size of a
    parameter.
    """
    adafactor_beta1: float | None = None
    """adafactor: decay of the first moment. Default: no first moment, and no memory for it."""
    adafactor_decay_rate: float = -0.8
    """adafactor: the second moment decays by 1 - t to this power at step t."""
    adafactor_clip_threshold: float = 1.0
    """adafactor: largest root mean square of an update, before it is multiplied by the learning rate."""
    adafactor_scale_parameter: bool = False
    """adafactor: multiply the learning rate by the root mean square of the parameter, as in the paper."""


@dataclass(frozen=True, kw_only=True)
class SchedulerFlags:
    """The learning rate over the run"""

    scheduler: Literal[
        "constant",
        "cosine",
        "polynomial_decay_layerwise",
        "linear_decay",
        "sqrt_decay",
        "polynomial_decay",
        "normal_decay",
        "one_cycle",
    ] = "linear_decay"
    """How the learning rate falls from learning_rate, after the warm-up, to end_learning_rate at the end of the run:
    in a line, as half a cosine wave, as a power of what is left (polynomial_decay; polynomial_decay_layerwise needs
    layerwise_lr_decay too), as one over the root of the steps (sqrt_decay), as a bell curve (normal_decay), or not at
    all (constant). one_cycle rises to learning_rate and falls again, and momentum goes the other way.
    """
    num_warmup_steps: int | float = 0
    """Steps in which the learning rate rises from 0; a number with a point, such as 0.1, is a share of the run. Of
    every schedule but one_cycle.
    """
    end_learning_rate: float = 0.0
    """Learning rate at the end of the run, of every schedule but constant and one_cycle."""
    num_cycles: int = 1
    """cosine: how many times the learning rate falls; each time but the first it starts at learning_rate again."""
    decay_power: float = field(default=1.0, metadata={"alias": "--lr_decay_power"})
    """polynomial_decay, polynomial_decay_layerwise: the power; 1 is a line."""
    num_constant_steps: int = 0
    """sqrt_decay: steps at learning_rate between warm-up and fall."""
    one_cycle_pct_start: float = 0.3
    """one_cycle: share of the run in which the learning rate rises."""
    one_cycle_anneal: Literal["linear", "cos"] = "linear"
    """one_cycle: rise and fall in a line, or as half a cosine wave."""
    one_cycle_betas: tuple[float, ...] = (0.85, 0.95)
    """one_cycle: beta1 of the optimizer at the highest learning rate, and at the ends of the run."""
    one_cycle_div_factor: float = 25.0
    """one_cycle: the learning rate begins at learning_rate divided by this."""
    one_cycle_final_div_factor: float = 10_000.0
    """one_cycle: it ends at the one it began with divided by this."""
    scheduler_interval: Literal["step", "epoch"] = "step"
    """Whether the learning rate falls in steps or in epochs. The warm-up is in steps either way."""
    scheduler_frequency: int = 1
    """The learning rate falls every so many steps (or epochs), and stays what it is between them."""


_ADAMW = ("adamw_epsilon", "adamw_betas")
_WARMUP = ("num_warmup_steps",)
_DECAY = (*_WARMUP, "end_learning_rate", "scheduler_interval", "scheduler_frequency")
# Which flags are read by an optimizer or a schedule; what no line names is read by all.
READS: dict[str, dict[str, tuple[str, ...]]] = {
    "optimizer": {
        "adamw": (*_ADAMW, "adamw_amsgrad"),
        "adafactor": (
            *("adafactor_epsilon", "adafactor_beta1", "adafactor_decay_rate", "adafactor_clip_threshold"),
            "adafactor_scale_parameter",
        ),
        "fuse_adam": ("fuse_adam_epsilon", "fuse_adam_betas", "fuse_adam_amsgrad"),
        "tf_adamw": ("tfadamw_epsilon", "tfadamw_betas", "tfadamw_amsgrad"),
        "adam8bit": _ADAMW,
        "adamw8bit": _ADAMW,
    },
    "scheduler": {
        "constant": _WARMUP,
        "cosine": (*_DECAY, "num_cycles"),
        "polynomial_decay_layerwise": (*_DECAY, "decay_power"),
        "linear_decay": _DECAY,
        "sqrt_decay": (*_DECAY, "num_constant_steps"),
        "polynomial_decay": (*_DECAY, "decay_power"),
        "normal_decay": _DECAY,
        "one_cycle": (
            *("one_cycle_pct_start", "one_cycle_anneal", "one_cycle_betas", "one_cycle_div_factor"),
            "one_cycle_final_div_factor",
        ),
    },
}

_RANGES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (
        (
            *("learning_rate", "adamw_epsilon", "fuse_adam_epsilon", "tfadamw_epsilon", "adafactor_epsilon"),
            *("adafactor_clip_threshold", "num_cycles", "decay_power", "scheduler_frequency", "one_cycle_div_factor"),
            "one_cycle_final_div_factor",
        ),
        lambda x: x > 0,
        "more than 0",
    ),
    (("weight_decay", "end_learning_rate", "num_constant_steps"), lambda x: x >= 0, "at least 0"),
    (
        ("adamw_betas", "fuse_adam_betas", "tfadamw_betas", "adafactor_beta1", "one_cycle_betas"),
        lambda x: 0 <= x < 1,
        "at least 0 and less than 1",
    ),
    (("layerwise_lr_decay",), lambda x: 0 < x <= 1, "more than 0 and at most 1"),
    (("adafactor_decay_rate",), lambda x: x < 0, "less than 0"),
    (
        ("num_warmup_steps",),
        lambda x: x >= 0 and (isinstance(x, int) or x <= 1),
        "a whole number of steps, or a share of the run from 0.0 to 1.0",
    ),
)


def check_optimizer_flags(args: Any) -> None:
    """Raises InputError for a value out of range, and for a flag that was given (args.given) but is not read by the
    optimizer or schedule of the run.
    """
    for kind, reads in READS.items():
        for name in sorted(args.given):
            readers = [reader for reader, names in reads.items() if name in names]
            if readers and getattr(args, kind) not in readers:
                raise InputError(
                    f"--{name} is read by --{kind} {' or '.join(readers)} alone, and this run has --{kind} "
                    f"{getattr(args, kind)}: leave it out, or choose another {kind}."
                )
    for names, fits, expected in _RANGES:
        for name in names:
            value = getattr(args, name)
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and not fits(number):
                    raise InputError(f"{name} must be {expected}; got {number}.")
    for name in ("adamw_betas", "fuse_adam_betas", "tfadamw_betas", "adafactor_epsilon", "one_cycle_betas"):
        if len(getattr(args, name)) != 2:
            raise InputError(f"{name} must be two numbers; got {len(getattr(args, name))}.")
    if args.adafactor_epsilon[1] != OptimizerFlags.adafactor_epsilon[1] and not args.adafactor_scale_parameter:
        raise InputError("the second value of --adafactor_epsilon is read with --adafactor_scale_parameter alone.")
    if args.end_learning_rate >= args.learning_rate:
        raise InputError(
            f"end_learning_rate must be less than learning_rate ({args.learning_rate}); got {args.end_learning_rate}. "
            "--scheduler constant keeps it where it is."
        )
    if args.scheduler == "polynomial_decay_layerwise" and args.layerwise_lr_decay == 1:
        raise InputError(
            "--scheduler polynomial_decay_layerwise needs --layerwise_lr_decay below 1, such as 0.9; "
            "polynomial_decay is the one without layers."
        )
    if args.optimizer == "adafactor" and "one_cycle_betas" in args.given:
        raise InputError("--one_cycle_betas moves beta1 of an optimizer of the Adam family; adafactor keeps its own.")
    if args.scheduler == "sqrt_decay" and not (args.num_warmup_steps or args.num_constant_steps):
        raise InputError(
            "--scheduler sqrt_decay falls with one over the root of the steps since the start, and has to know from "
            "where: give --num_warmup_steps or --num_constant_steps."
        )
