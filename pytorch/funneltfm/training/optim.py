"""AdamW with the right weight-decay groups, and the learning-rate schedule."""

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from funneltfm.errors import InputError

log = logging.getLogger(__name__)


def is_norm(module: nn.Module) -> bool:
    """A norm is a module whose class, or a parent of it, has "norm" in its name: so are all of torch and of
    transformers 5.23, and nothing else there that has parameters of its own.
    """
    return any("norm" in cls.__name__.lower() for cls in type(module).__mro__)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups: matrices and tables decay; biases (r_w_bias and its like too) and norms do not. Frozen
    parameters are left out.
    """
    norms = {id(p) for module in model.modules() if is_norm(module) for p in module.parameters(recurse=False)}
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (free if name.endswith("bias") or id(parameter) in norms else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def make_adamw(model: nn.Module, lr: float, weight_decay: float, apex: bool = False) -> Optimizer:
    """The original's AdamW: betas (.9, .99), eps 1e-6, in one kernel for all parameters; apex's own where wanted and
    installed.
    """
    groups = decay_groups(model, weight_decay)
    settings: Any = {"lr": lr, "betas": (0.9, 0.99), "eps": 1e-6}
    if apex and (fused_adam := from_apex("optimizers.FusedAdam", "torch.optim.AdamW(fused=True)")):
        return fused_adam(groups, adam_w_mode=True, **settings)
    return AdamW(groups, fused=True, **settings)


def from_apex(name: str, instead: str) -> Any:
    """What the installed apex offers under `name`, or None; then one line says what runs instead."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(f"apex.{module}"), attribute)
    except (ImportError, AttributeError):
        _say_once(f"apex.{name} is not installed, or not in the apex that is; {instead} runs instead.")
        return None


@functools.cache
def _say_once(text: str) -> None:
    log.info(text)


def linear(left: int, span: int) -> float:
    """What is left of a fall of `span` steps when `left` of them are to come."""
    return left / span


def warmup_decay(
    step: int, total: int, warmup: int, end: float, curve: Callable[[int, int], float] = linear, constant: int = 0
) -> float:
    """Learning rate of optimizer step `step` (0-based) of `total`, as a share of the highest.

    It rises linearly over `warmup` steps, the last of which has 1.0, stays there for `constant` more, and then falls
    to `end`, which it would reach at step `total`, so that the last step still learns; it never falls below.
    curve: (steps to go, steps of the fall) -> share of the way down that is left, from 1.0 to 0.0.
    """
    if step < warmup:
        return (step + 1) / warmup
    peak = max(0, warmup + constant - 1)
    return end + (1 - end) * curve(max(0, total - max(step, peak)), max(1, total - peak))


def make_schedule(optimizer: Optimizer, total: int, warmup_prop: float, lr: float, min_lr: float) -> LambdaLR:
    warmup = round(warmup_prop * total)
    return LambdaLR(optimizer, lambda step: warmup_decay(step, total, warmup, min_lr / lr))


def make_one_cycle(
    optimizer: Optimizer,
    total: int,
    max_lr: float | Sequence[float],
    pct_start: float = 0.3,
    anneal: Literal["linear", "cos"] = "linear",
    betas: tuple[float, float] = (0.85, 0.95),
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
) -> OneCycleLR:
    """One cycle over `total` optimizer steps (Smith and Topin, 2018): the rate rises from max_lr / div_factor to max_lr
    over the first `pct_start` of them, then falls to max_lr / div_factor / final_div_factor at the last. Momentum (of
    Adam beta1) goes the other way, between the two `betas`; an optimizer that has none goes without.

    max_lr: one for all groups of parameters, or one for each.
    """
    highest = max_lr if isinstance(max_lr, Sequence) else [max_lr]
    if not 0 < pct_start < 1 or min(highest) <= 0 or not 0 <= betas[0] <= betas[1] < 1:
        raise InputError(
            f"one cycle needs max_lr above 0, pct_start between 0 and 1, and betas from low to high, below 1; got "
            f"{max_lr}, {pct_start} and {betas}."
        )
    return OneCycleLR(
        optimizer,
        list(max_lr) if isinstance(max_lr, Sequence) else max_lr,
        total_steps=total,
        pct_start=pct_start,
        anneal_strategy=anneal,
        cycle_momentum=not optimizer.defaults.keys().isdisjoint(("betas", "momentum")),
        base_momentum=betas[0],
        max_momentum=betas[1],
        div_factor=div_factor,
        final_div_factor=final_div_factor,
    )
