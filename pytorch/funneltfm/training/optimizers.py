"""Optimizers and learning-rate schedules by the names of the flags, with learning rates by layer."""

import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from funneltfm.errors import InputError
from funneltfm.funnel.ops import EmbeddingLookup
from funneltfm.training.optim import decay_groups, linear, make_one_cycle, warmup_decay
from funneltfm.training.optimizer_flags import check_optimizer_flags

# ---- parameter groups


def encoder_layers(module: nn.Module) -> list[list[nn.Module]]:
    """The layers below `module`, from input to output, found in its ModuleLists; each is one module or several.

    Lists of the same length in one parent run side by side (FunnelTFM's attn_layers and pffn_layers), other lists one
    after another, in the order in which they were registered. A list of lists is the list of what is in them; lists
    inside of a layer are a part of it. A layer that is used several times counts once.
    """
    layers: list[list[nn.Module]] = []
    siblings: dict[int, list[list[nn.Module]]] = {}
    for child in module.children():
        if next(child.parameters(), None) is None:
            continue
        if not isinstance(child, nn.ModuleList):
            layers += encoder_layers(child)
            continue
        found = [layer for item in child for layer in (item if isinstance(item, nn.ModuleList) else [item])]
        if len(found) in siblings:
            for layer, part in zip(siblings[len(found)], found, strict=True):
                layer.append(part)
        else:
            siblings[len(found)] = [[layer] for layer in found]
            layers += siblings[len(found)]
    return layers


def layer_depths(model: nn.Module) -> dict[int, int]:
    """How far below the head each parameter of an encoder of n layers stands, by the parameter's id.

    The last layer 1, the first one n, embeddings and whatever else comes before the layers n + 1. What an encoder has
    after its layers (a last norm, a pooler) stands with the head at 0; so does, by its absence, what is outside of the
    encoder. The encoder is the `base_model` of a transformers model, wherever that stands in `model`, or else `model`.
    """
    depths: dict[int, int] = {}
    for base in list(_base_models(model)) or [model]:
        layers = encoder_layers(base)
        bottom = len(layers) + 1
        own = {
            id(parameter): bottom - index
            for index, layer in enumerate(layers, start=1)
            for part in layer
            for parameter in part.parameters()
        }
        tables = _tables_after_layers(base)
        following = bottom if layers else 0
        for parameter in base.parameters():  # in the order of the computation, as far as a module tells it
            if id(parameter) in own:
                following = own[id(parameter)] - 1
            else:
                own[id(parameter)] = bottom if id(parameter) in tables else following
        depths = own | depths
    return depths


def _base_models(module: nn.Module) -> Iterator[nn.Module]:
    base = getattr(module, "base_model", None)
    if isinstance(base, nn.Module):
        yield base
    else:
        for child in module.children():
            yield from _base_models(child)


def _tables_after_layers(base: nn.Module) -> set[int]:
    """Ids of parameters that belong to the embeddings though a stack of layers is registered before them: tables of
    relative positions, with what stands beside them (deberta_v2's norm of its table).
    """
    tables = set()
    for parent in base.modules():
        children = list(parent.children())
        stacks = [i for i, child in enumerate(children) if isinstance(child, nn.ModuleList)]
        after = children[stacks[-1] + 1 :] if stacks else []
        if any(isinstance(child, nn.Embedding) for child in after):
            tables |= {id(parameter) for child in after for parameter in child.parameters()}
    return tables


def parameter_groups(model: nn.Module, args: Any) -> list[dict[str, Any]]:
    """Groups by learning rate (args.layerwise_lr_decay) and weight decay; every parameter that trains is in one.

    The learning rate at depth d (see layer_depths) is learning_rate * layerwise_lr_decay^d, as in ULMFiT (Howard and
    Ruder, 2018, section 3.2). Raises InputError where nothing trains, and where there are no layers to tell apart.
    """
    depths: dict[int, int] = {}
    if args.layerwise_lr_decay < 1:
        depths = layer_depths(model)
        if not any(depths.values()):
            raise InputError(
                f"--layerwise_lr_decay needs an encoder whose layers stand in a torch.nn.ModuleList; "
                f"{type(model).__name__} has none. Leave it out."
            )
    groups: dict[tuple[int, int], dict[str, Any]] = {}
    for number, group in enumerate(decay_groups(model, args.weight_decay)):
        for parameter in group["params"]:
            depth = depths.get(id(parameter), 0)
            lr = args.learning_rate * args.layerwise_lr_decay**depth
            new = {"params": [], "weight_decay": group["weight_decay"], "lr": lr}
            groups.setdefault((depth, number), new)["params"].append(parameter)
    if not groups:
        raise InputError("the model has no parameter to train: all are frozen.")
    return [groups[key] for key in sorted(groups)]


# ---- optimizers


class TFAdamW(Optimizer):
    """AdamW without bias correction: the optimizer of BERT's TensorFlow code, under which its recipes were found.

    m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; p = p - lr (m / (sqrt(v) + eps) + weight_decay p). The first steps
    are up to (1 - b1) / sqrt(1 - b2) = 3.2 times those of AdamW, so it wants a warm-up. amsgrad divides by the
    largest v so far.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            names = ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else []))
            state.update({name: torch.zeros_like(parameter) for name in names})
        beta1, beta2 = group["betas"]
        exp_avg = state["exp_avg"].lerp_(grad, 1 - beta1)
        exp_avg_sq = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        if group["amsgrad"]:
            exp_avg_sq = torch.maximum(state["max_exp_avg_sq"], exp_avg_sq, out=state["max_exp_avg_sq"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(exp_avg, exp_avg_sq.sqrt().add_(group["eps"]), value=-group["lr"])


def _adamw(groups: list[dict[str, Any]], args: Any) -> Optimizer:
    return AdamW(groups, args.learning_rate, betas=args.adamw_betas, eps=args.adamw_epsilon, amsgrad=args.adamw_amsgrad)


def _fuse_adam(groups: list[dict[str, Any]], args: Any) -> Optimizer:
    settings: Any = {"eps": args.fuse_adam_epsilon, "amsgrad": args.fuse_adam_amsgrad, "fused": True}
    return AdamW(groups, args.learning_rate, betas=args.fuse_adam_betas, **settings)


def _tf_adamw(groups: list[dict[str, Any]], args: Any) -> Optimizer:
    return TFAdamW(
        groups, args.learning_rate, betas=args.tfadamw_betas, eps=args.tfadamw_epsilon, amsgrad=args.tfadamw_amsgrad
    )


def _adafactor(groups: list[dict[str, Any]], args: Any) -> Optimizer:
    """That of transformers. torch.optim.Adafactor has no first moment (adafactor_beta1), and its learning rate always
    scales with the parameter and never exceeds one over the root of the steps; here the schedule alone decides.
    """
    try:
        from transformers.optimization import Adafactor
    except ImportError as error:
        raise InputError("--optimizer adafactor needs `transformers`: pip install 'funneltfm[hf]'") from error
    return Adafactor(
        groups,
        args.learning_rate,
        eps=args.adafactor_epsilon,
        clip_threshold=args.adafactor_clip_threshold,
        decay_rate=args.adafactor_decay_rate,
        beta1=args.adafactor_beta1,
        scale_parameter=args.adafactor_scale_parameter,
        relative_step=False,
    )


def _eight_bit(groups: list[dict[str, Any]], args: Any) -> Optimizer:
    try:
        import bitsandbytes
    except ImportError as error:
        raise InputError(
            f"--optimizer {args.optimizer} needs `bitsandbytes`: pip install 'funneltfm[bnb]'. It could not be "
            f"imported: {error}"
        ) from error
    kind = {"adam8bit": "Adam8bit", "adamw8bit": "AdamW8bit"}[args.optimizer]
    settings: Any = {"betas": args.adamw_betas, "eps": args.adamw_epsilon}
    return getattr(bitsandbytes.optim, kind)(groups, args.learning_rate, **settings)


def _keep_tables_exact(model: nn.Module) -> None:
    """Moments of embedding tables in 32 bits, for stability (Dettmers et al., 8-bit Optimizers via Block-wise
    Quantization, 2022).
    """
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding | EmbeddingLookup):
            manager.override_config(module.weight, "optim_bits", 32)
            # It knows parameters by their id, for ever; the id of a table that is gone may become another's.
            weakref.finalize(module.weight, manager.pid2config.pop, id(module.weight), None)


MAKERS: dict[str, Callable[[list[dict[str, Any]], Any], Optimizer]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "fuse_adam": _fuse_adam,
    "tf_adamw": _tf_adamw,
    "adam8bit": _eight_bit,
    "adamw8bit": _eight_bit,
}


def make_optimizer(model: nn.Module, args: Any) -> Optimizer:
    """The optimizer that the flags name, over the parameters of `model` that train.

    args: flags of OptimizerFlags and SchedulerFlags (training.config.Args). Raises InputError as check_optimizer_flags
    and parameter_groups do, and where a library or the device is missing.
    """
    check_optimizer_flags(args)
    optimizer = MAKERS[args.optimizer](parameter_groups(model, args), args)
    if MAKERS[args.optimizer] is _eight_bit:
        _keep_tables_exact(model)
    return optimizer


# ---- schedules
#
# What is left of the way from learning_rate to end_learning_rate with `left` steps to go of a fall of `span`: 1.0 at
# left = span, 0.0 at left = 0. `peak` is the 0-based step at which the fall starts; below x = left / span.


def _constant(left: int, span: int, peak: int, args: Any) -> float:
    return 1.0


def _linear(left: int, span: int, peak: int, args: Any) -> float:
    """x."""
    return linear(left, span)


def _polynomial(left: int, span: int, peak: int, args: Any) -> float:
    """x^decay_power."""
    return (left / span) ** args.decay_power


def _cosine(left: int, span: int, peak: int, args: Any) -> float:
    """(1 - cos(pi y)) / 2, where y is what is left of the current one of num_cycles equal falls, warm restarts between
    them (Loshchilov and Hutter, SGDR, 2017, eq. 5).
    """
    y = ((args.num_cycles * left - 1) % span + 1) / span if left else 0.0
    return (1 - math.cos(math.pi * y)) / 2


def _inverse_sqrt(left: int, span: int, peak: int, args: Any) -> float:
    """(r(t) - r(T)) / (1 - r(T)), r(t) = sqrt(k / t), after t steps of T, k = peak + 1: the fall of Vaswani et al.,
    2017, section 5.3, stretched so that it ends.
    """
    k = peak + 1
    rate, end = math.sqrt(k / (k + span - left)), math.sqrt(k / (k + span))
    return (rate - end) / (1 - end)


def _normal(left: int, span: int, peak: int, args: Any) -> float:
    """(g(1 - x) - g(1)) / (1 - g(1)), g(z) = exp(-(3 z)^2 / 2): a bell curve from its middle to three standard
    deviations, stretched so that it ends.
    """
    end = math.exp(-4.5)
    return (math.exp(-4.5 * (1 - left / span) ** 2) - end) / (1 - end)


CURVES: dict[str, Callable[[int, int, int, Any], float]] = {
    "constant": _constant,
    "cosine": _cosine,
    "polynomial_decay_layerwise": _polynomial,
    "linear_decay": _linear,
    "sqrt_decay": _inverse_sqrt,
    "polynomial_decay": _polynomial,
    "normal_decay": _normal,
}


def make_scheduler(
    optimizer: Optimizer, args: Any, total_steps: int | None, steps_per_epoch: int | None = None
) -> LRScheduler:
    """The schedule that the flags name, to be stepped after every step of the optimizer, whatever scheduler_interval
    and scheduler_frequency say: the schedule itself stays where it is between them.

    total_steps: steps of the optimizer in the run; None is unknown. steps_per_epoch: those in an epoch. Raises
    InputError for a warm-up that is longer than the run, and where the flags need to know a length that is not known.
    With the shape f of CURVES, end e and layer's rate lr, the learning rate is lr (e + (1 - e) f), e being
    end_learning_rate / learning_rate. one_cycle is torch's own.
    """
    check_optimizer_flags(args)
    warmup, constant = args.num_warmup_steps, args.num_constant_steps
    if total_steps is None:
        if args.scheduler != "constant" or isinstance(warmup, float):
            raise InputError(
                f"--scheduler {args.scheduler} with --num_warmup_steps {warmup} needs to know how long the run is, and "
                "the training data do not tell: give --max_steps."
            )
        total_steps = warmup
    if args.scheduler == "one_cycle":
        return make_one_cycle(
            optimizer,
            total_steps,
            [group["lr"] for group in optimizer.param_groups],
            pct_start=args.one_cycle_pct_start,
            anneal=args.one_cycle_anneal,
            betas=args.one_cycle_betas,
            div_factor=args.one_cycle_div_factor,
            final_div_factor=args.one_cycle_final_div_factor,
        )
    if isinstance(warmup, float):
        warmup = round(warmup * total_steps)
    if warmup + constant > total_steps:
        raise InputError(
            f"--num_warmup_steps {warmup}{f' and --num_constant_steps {constant}' if constant else ''} are more than "
            f"the {total_steps} steps of the run: train longer, or give fewer."
        )
    every = args.scheduler_frequency
    if args.scheduler_interval == "epoch":
        if steps_per_epoch is None:
            raise InputError(
                "--scheduler_interval epoch needs to know how many steps an epoch has, and the training data do not "
                "tell: leave it out."
            )
        every *= steps_per_epoch
    curve, peak = CURVES[args.scheduler], max(0, warmup + constant - 1)
    end = args.end_learning_rate / args.learning_rate

    def share(step: int) -> float:
        if step >= warmup:
            step = max(warmup, step - step % every)
        return warmup_decay(step, total_steps, warmup, end, lambda left, span: curve(left, span, peak, args), constant)

    return LambdaLR(optimizer, share)
