"""AdamW with the right weight-decay groups, and the learning-rate schedule."""

import importlib
import logging
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from funneltfm.funnel.ops import LayerNorm

log = logging.getLogger(__name__)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups: matrices and tables decay; biases (r_w_bias and its like too) and layer norms do not."""
    norms = {id(p) for m in model.modules() if isinstance(m, LayerNorm | nn.LayerNorm) for p in m.parameters()}
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
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
        log.info("apex.%s is not installed, or not in the apex that is; %s runs instead.", name, instead)
        return None


def warmup_linear(step: int, total: int, warmup: int, min_ratio: float) -> float:
    """Learning rate of optimizer step `step` (0-based) of `total`, as a share of the highest.

    It rises linearly over `warmup` steps, the last of which has 1.0, then falls linearly; it would reach `min_ratio` at
    step `total`, so that the last step still learns, and never falls below it.
    """
    if step < warmup:
        return (step + 1) / warmup
    peak = max(0, warmup - 1)
    remaining = max(0, total - step) / max(1, total - peak)
    return min_ratio + (1 - min_ratio) * remaining


def make_schedule(optimizer: Optimizer, total: int, warmup_prop: float, lr: float, min_lr: float) -> LambdaLR:
    warmup = round(warmup_prop * total)
    return LambdaLR(optimizer, lambda step: warmup_linear(step, total, warmup, min_lr / lr))
