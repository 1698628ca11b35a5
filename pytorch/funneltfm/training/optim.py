"""AdamW with the right weight-decay groups, and the learning-rate schedule."""

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from funneltfm.funnel.ops import LayerNorm


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups: matrices and tables decay; biases (r_w_bias and its like too) and layer norms do not."""
    norms = {id(p) for m in model.modules() if isinstance(m, LayerNorm | nn.LayerNorm) for p in m.parameters()}
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (free if name.endswith("bias") or id(parameter) in norms else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def make_adamw(model: nn.Module, lr: float, weight_decay: float, fused: bool = True) -> AdamW:
    """The original's AdamW: betas (.9, .99), eps 1e-6. `fused` takes one kernel for all parameters."""
    return AdamW(decay_groups(model, weight_decay), lr=lr, betas=(0.9, 0.99), eps=1e-6, fused=fused)


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


def make_schedule(optimizer: AdamW, total: int, warmup_prop: float, lr: float, min_lr: float) -> LambdaLR:
    warmup = round(warmup_prop * total)
    return LambdaLR(optimizer, lambda step: warmup_linear(step, total, warmup, min_lr / lr))
