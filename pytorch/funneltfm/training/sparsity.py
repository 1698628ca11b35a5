"""Sparse training as Lightning callbacks, for any LightningModule: masks that hold, RigL, gradual pruning, densities
(together, hence over 400 lines: they share who holds a weight and who acts first).

They count optimizer steps, so accumulation changes nothing; they work on gradients that are accumulated, reduced over
the processes and unscaled, before these are clipped. The masks are in the module's state dict, hence in checkpoints.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import lightning
import torch
from lightning import Callback
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from funneltfm.errors import InputError
from funneltfm.sparse.config import SparsityConfig, allocate, total_on
from funneltfm.sparse.distill import Distilled
from funneltfm.sparse.export import local_folder, restore_masks
from funneltfm.sparse.masks import (
    SUFFIX,
    SparseWeight,
    attach,
    cut,
    densities,
    fingerprint,
    lot,
    model_size,
    reset_moments,
    sparse_weights,
    zero_off,
)
from funneltfm.sparse.patterns import Pattern, largest
from funneltfm.sparse.updates import ANNEALS, CURVES, drop_and_grow, prune
from funneltfm.training import ranks
from funneltfm.training.precision import AmpPrecision

log = logging.getLogger(__name__)

When = float | int
"""A step (int), or a share of all steps (float, 0.75)."""


class Held(NamedTuple):
    """A sparse weight in training."""

    weight: SparseWeight
    tensor: Tensor
    """What the optimizer holds: the parameter, or its fp32 master."""


class StaticSparsity(Callback):
    """Keeps the off weights of a model at exactly 0, through every step of every optimizer and precision.

    config: makes a dense model sparse before training. None: the model is sparse already, or was loaded by
        `from_pretrained` from a folder, or by a name from the hub, that holds masks, which are then taken from there; a
        dense model stays dense. (Of another revision than main give `from_pretrained` the folder in the cache.)
        A model that has masks, or whose folder has, keeps them, whatever config says.

    Several of the callbacks below work together in one run; one config is enough for all of them.
    """

    mask_gradients = True
    needs_masks = False
    """Whether a model that stays dense is an error."""

    def __init__(self, config: SparsityConfig | None = None):
        self.config = config
        self._held: list[Held] = []
        self._handles: list[Any] = []

    # ---- one of them, the first, does what is to be done once

    def _team(self, trainer: lightning.Trainer) -> list["StaticSparsity"]:
        return [callback for callback in trainer.callbacks if isinstance(callback, StaticSparsity)]  # type: ignore[attr-defined]

    def _leads(self, trainer: lightning.Trainer) -> bool:
        return self._team(trainer)[0] is self

    def first_config(self, config: SparsityConfig) -> SparsityConfig:
        """What a dense model begins as."""
        return config

    def setup(self, trainer: lightning.Trainer, module: lightning.LightningModule, stage: str) -> None:
        self.forget()
        team = self._team(trainer)
        configs = [callback.config for callback in team if callback.config is not None]
        if any(config != configs[0] for config in configs):
            raise InputError("the sparsity callbacks of a run share one SparsityConfig: give it to one of them.")
        if self.config is None and configs:
            self.config = configs[0]
        if team[0] is not self:
            return
        if not isinstance(trainer.strategy, DDPStrategy | SingleDeviceStrategy):
            raise InputError(
                f"masks need whole weights in every process: sparse training runs on one device or with DDP, not with "
                f"{type(trainer.strategy).__name__}."
            )
        averaging = [one for one in trainer.callbacks if isinstance(one, StochasticWeightAveraging | WeightAveraging)]  # type: ignore[attr-defined]
        if averaging and any(callback.needs_masks for callback in team):
            raise InputError(
                f"{type(averaging[0]).__name__} averages models whose masks differ: that is not sparse. Train "
                f"without it, or with masks that stay (StaticSparsity)."
            )
        if sparse_weights(module) or restore(module):
            if self.config is not None:
                log.info("the model has masks already; they stay.")
        elif self.config is not None:
            config = self.config
            for callback in team:
                config = callback.first_config(config)
            attach(module, config)
        elif any(callback.needs_masks for callback in team):
            raise InputError("the model has no masks: give a SparsityConfig, or load a sparse model.")
        # DDP would send every mask at every forward pass. They are equal because they are made equal; that is checked.
        names = [f"{weight.name}{SUFFIX}" for weight in sparse_weights(module)]
        if isinstance(trainer.strategy, DDPStrategy):
            names += getattr(module, "_ddp_params_and_buffers_to_ignore", [])
            nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)

    def on_fit_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if not self._leads(trainer):
            return
        plugin = trainer.precision_plugin
        self._held = [
            Held(weight, plugin.optimized(weight.weight) if isinstance(plugin, AmpPrecision) else weight.weight)
            for weight in sparse_weights(module)
        ]
        check_agreement([held.weight for held in self._held])
        for held in self._held:
            _mask(held)
        self._handles = [optimizer.register_step_post_hook(self._after_step) for optimizer in trainer.optimizers]

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        # Not before: to ask for the number of steps loads the data, and a resumed loader would forget its place.
        if not self._leads(trainer):
            return
        if any(callback.needs_masks for callback in self._team(trainer)) and (
            len(trainer.optimizers) != 1 or len(self._of(trainer.optimizers[0])) < len(self._held)
        ):
            raise InputError(
                f"masks change in training only where one optimizer holds every sparse weight; this run has "
                f"{len(trainer.optimizers)} optimizers, and not all weights are in the first. Leave frozen weights out "
                f"with exclude, or keep masks as they are with StaticSparsity."
            )
        for callback in self._team(trainer):
            callback.begin_fit(trainer, module, self._held)

    def on_fit_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, optimizer: Optimizer
    ) -> None:
        team = self._team(trainer)
        if team[0] is not self:
            return
        mine = self._of(optimizer)
        changed = [callback.update(trainer.global_step + 1, mine, optimizer) for callback in team]
        if any(changed):
            check_agreement([held.weight for held in mine])
        if all(callback.mask_gradients for callback in team):
            for held in mine:
                if held.tensor.grad is not None:
                    zero_off(held.tensor.grad, held.weight.mask)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        for held in self._of(optimizer):
            zero_off(held.tensor, held.weight.mask)

    def _of(self, optimizer: Optimizer) -> list[Held]:
        parameters = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return [held for held in self._held if id(held.tensor) in parameters]

    # ---- what a callback that changes masks adds

    def forget(self) -> None:
        """A callback may serve several runs: begin anew. What a checkpoint holds comes after this."""

    def begin_fit(self, trainer: lightning.Trainer, module: lightning.LightningModule, held: Sequence[Held]) -> None:
        """The weights are known, and the number of steps."""

    def update(self, step: int, held: Sequence[Held], optimizer: Optimizer) -> bool:
        """Change masks before optimizer step `step` (1-based); whether something was changed."""
        return False

    def pattern(self) -> Pattern:
        return Pattern("unstructured" if self.config is None else self.config.pattern)


def restore(module: nn.Module) -> bool:
    """Give the models of `transformers` in a module the masks of the folders that they were loaded from, or of the
    hub's files in the cache; whether there were any.
    """
    seen: set[int] = set()
    found = False
    for part in module.modules():
        folder = getattr(part, "name_or_path", None)
        if id(part) in seen or not (isinstance(folder, str) and folder and local_folder(folder)):
            continue
        seen |= {id(inner) for inner in part.modules()}
        if restore_masks(part, folder):
            log.info("the model is sparse: its masks are those in %s.", folder)
            found = True
    return found


def _mask(held: Held) -> None:
    zero_off(held.weight.weight, held.weight.mask)
    if held.tensor.shape == held.weight.mask.shape:  # O3 empties its masters between steps
        zero_off(held.tensor, held.weight.mask)


def check_agreement(weights: Sequence[SparseWeight]) -> None:
    """Every process must have the same masks, bit for bit."""
    if ranks.size() > 1 and len(set(ranks.gather(fingerprint(weights)))) > 1:
        ranks.fail(
            InputError(
                "the processes of the run have different masks: their weights or gradients are not equal. Do all "
                "start from the same weights, and are gradients reduced over all of them?"
            )
        )


def _step_of(name: str, when: When, total: float) -> int:
    if isinstance(when, int):
        return when
    if not math.isfinite(total):
        raise InputError(f"{name}={when} is a share of all steps, but the run has no end: give a step, or max_steps.")
    return round(when * total)


def _check_when(**named: When) -> None:
    for name, when in named.items():
        if isinstance(when, bool) or when < 0 or (isinstance(when, float) and when > 1):
            raise InputError(
                f"{name} must be a step (a whole number) or a share of all steps (0.0 to 1.0); got {when!r}."
            )


def _change(held: Held, new: Tensor, pattern: Pattern, optimizer: Optimizer, moments: str) -> None:
    """Give a weight a new mask (G, U). Grown weights begin at 0; those that stay keep all they have."""
    mask = held.weight.from_units(new, pattern)
    if moments != "keep":
        reset_moments(optimizer, held.tensor, held.weight.mask, mask, moments)
    held.weight.mask.copy_(mask)
    _mask(held)


class RigL(StaticSparsity):
    """Drops the weights of least magnitude and grows those with the largest gradient, as many, every `every` steps.

    Evci et al., Rigging the Lottery, 2020. The number of weights that are on never changes.

    drop: share of the on weights that the first update drops; later ones less, by `anneal` (cosine, linear, constant)
        from `begin` to `end`. end 0.75 is the paper's.
    grow: "gradient", or "random" (SET, Mocanu et al., 2018; the lot depends on seed, step and name alone).
    scope: "layer", in which every matrix keeps its density, or "global", in which all compete.
    moments: what the optimizer remembers of grown weights: "zero" (the paper), "mean" (second moments begin with the
        mean of the others', so that Adam's first step is no larger than theirs), or "keep".
    regrown: whether a weight that is dropped and grown in one update "keep"s its value or begins at "zero".
    mask_gradients: False lets the optimizer see gradients of off weights, and gather moments for them.

    It uses the gradient of the step itself: accumulated, reduced and unscaled. A step whose gradients are not finite
    (a loss scale that was too large) changes no masks; the update is made at the next one. A matrix without a gradient
    keeps its mask. The pattern that updates keep is config's; without one, weights move freely.
    """

    needs_masks = True

    def __init__(
        self,
        config: SparsityConfig | None = None,
        drop: float = 0.3,
        every: int = 100,
        begin: When = 0,
        end: When = 0.75,
        anneal: str = "cosine",
        grow: Literal["gradient", "random"] = "gradient",
        scope: Literal["layer", "global"] = "layer",
        moments: Literal["zero", "mean", "keep"] = "zero",
        regrown: Literal["keep", "zero"] = "keep",
        mask_gradients: bool = True,
    ):
        super().__init__(config)
        if not 0 < drop <= 1:
            raise InputError(f"drop must be the share of weights that an update drops, above 0 to 1; got {drop}.")
        if every < 1:
            raise InputError(f"every must be at least 1 step; got {every}.")
        _check_when(begin=begin, end=end)
        for name, value, allowed in (
            ("anneal", anneal, tuple(ANNEALS)),
            ("grow", grow, ("gradient", "random")),
            ("scope", scope, ("layer", "global")),
            ("moments", moments, ("zero", "mean", "keep")),
            ("regrown", regrown, ("keep", "zero")),
        ):
            if value not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}; got {value!r}.")
        self.drop, self.every, self.begin, self.end, self.anneal = drop, every, begin, end, anneal
        self.grow, self.scope, self.moments, self.regrown = grow, scope, moments, regrown
        self.mask_gradients = mask_gradients
        self.first = self.last = 0
        self._pending = False

    @classmethod
    def original(cls, config: SparsityConfig | None = None, drop: float = 0.3, every: int = 100) -> "RigL":
        """As the 2021 project that this one is measured against did it, to compare with: all matrices compete, updates
        go on to the end of training, weights that come back begin at 0, and moments of off weights are neither masked
        nor reset. (It took the gradient of a fresh batch after dropping, and threw the step's own away.)
        """
        return cls(
            config,
            drop,
            every,
            begin=every,
            end=1.0,
            scope="global",
            moments="keep",
            regrown="zero",
            mask_gradients=False,
        )

    def begin_fit(self, trainer: lightning.Trainer, module: lightning.LightningModule, held: Sequence[Held]) -> None:
        total = trainer.estimated_stepping_batches
        self.first, self.last = _step_of("begin", self.begin, total), _step_of("end", self.end, total)
        if self.scope == "global" and self.pattern().grouped:
            raise InputError(f"scope='global' moves weights between matrices, which {self.pattern().name} forbids.")
        for weight, _ in held:
            check_groups(weight, self.pattern())
        if self.last // self.every * self.every < max(1, self.first) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise InputError(
                f"the masks would never change: no step from {self.first} to {self.last} is a multiple of "
                f"{self.every}. Give a smaller interval (every), or train for longer."
            )

    def forget(self) -> None:
        self._pending = False

    def fraction(self, step: int) -> float:
        """Share of the on weights that an update at `step` drops."""
        progress = (step - self.first) / max(1, self.last - self.first)
        return self.drop * ANNEALS[self.anneal](min(1.0, max(0.0, progress)))

    def update(self, step: int, held: Sequence[Held], optimizer: Optimizer) -> bool:
        due = self.first <= step <= self.last and step % self.every == 0
        if not (due or self._pending):
            return False
        moving = [one for one in held if one.tensor.grad is not None]
        finite = all(bool(one.tensor.grad.isfinite().all()) for one in moving)  # type: ignore[union-attr]
        self._pending = not (moving and finite)
        if self._pending:
            return False
        pattern = self.pattern()
        on = [weight.units_on(pattern) for weight, _ in moving]
        keep = [weight.scores(tensor, pattern) for weight, tensor in moving]
        grow = [self._grow_scores(step, weight, tensor, pattern) for weight, tensor in moving]
        if self.scope == "global":
            joint = torch.cat(on, dim=1)
            n = round(self.fraction(step) * int(joint.sum()))
            new, survivors = drop_and_grow(joint, torch.cat(keep, dim=1), torch.cat(grow, dim=1), n)
            results = list(zip(cut(new, on), cut(survivors, on), strict=True))
        else:
            results = [
                drop_and_grow(on_, keep_, grow_, math.floor(self.fraction(step) * int(on_.sum())))
                for on_, keep_, grow_ in zip(on, keep, grow, strict=True)
            ]
        for one, (new, survivors) in zip(moving, results, strict=True):
            if self.regrown == "zero":
                zero_off(one.tensor, one.weight.from_units(survivors, pattern))
            _change(one, new, pattern, optimizer, self.moments)
        return True

    def _grow_scores(self, step: int, weight: SparseWeight, tensor: Tensor, pattern: Pattern) -> Tensor:
        if self.grow == "gradient":
            assert tensor.grad is not None
            return weight.scores(tensor.grad, pattern)
        seed = self.config.seed if self.config else 0
        shape = weight.units_on(pattern).shape
        return lot(shape, seed, step, weight.name).to(tensor.device)

    def state_dict(self) -> dict[str, Any]:
        return {"pending": self._pending}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._pending = state_dict["pending"]


def check_groups(weight: SparseWeight, pattern: Pattern) -> None:
    """InputError where a mask does not have the pattern: every group must have as many units on as the others."""
    on = weight.units_on(pattern).sum(dim=1)
    n_of_m = pattern.n_of_m
    if (on != on[0]).any() or (n_of_m and not n_of_m[0] <= int(on[0]) <= n_of_m[1]):
        raise InputError(
            f"the mask of {weight.name} does not have the pattern {pattern.name}: its groups have {int(on.min())} to "
            f"{int(on.max())} weights on. Give the SparsityConfig with which it was made."
        )


class GradualPruning(StaticSparsity):
    """Prunes the weights of least magnitude, more and more, until the model is as sparse as config says.

    Zhu, Gupta, 2017. A dense model begins with all weights on, a sparse one with its own mask; what is off stays off.

    start, end: when the first and the last weights go. Pruning from 25 to 75 % of training is close to the best (The
        Journey Matters, 2025). every: steps between updates; the last one is at `end`, whatever `every` is.
    curve: cubic (fast first, then slowly), linear or cosine.
    Its targets are those of config; with distribution="global" the weights of all matrices compete.
    """

    needs_masks = True

    def __init__(
        self,
        config: SparsityConfig,
        start: When = 0.25,
        end: When = 0.75,
        every: int = 100,
        curve: str = "cubic",
        moments: Literal["zero", "keep"] = "zero",
    ):
        super().__init__(config)
        _check_when(start=start, end=end)
        if every < 1:
            raise InputError(f"every must be at least 1 step; got {every}.")
        if curve not in CURVES:
            raise InputError(f"curve must be one of {', '.join(CURVES)}; got {curve!r}.")
        if moments not in ("zero", "keep"):
            raise InputError(f"moments must be one of zero, keep; got {moments!r}.")
        self.start, self.end, self.every, self.curve, self.moments = start, end, every, curve, moments
        self.first = self.last = 0
        self._from: dict[str, int] = {}
        self._to: dict[str, int] = {}

    def first_config(self, config: SparsityConfig) -> SparsityConfig:
        return replace(config, init="dense", rescale=False)

    def begin_fit(self, trainer: lightning.Trainer, module: lightning.LightningModule, held: Sequence[Held]) -> None:
        assert self.config is not None
        total = trainer.estimated_stepping_batches
        self.first, self.last = _step_of("start", self.start, total), _step_of("end", self.end, total)
        if self.last <= self.first:
            raise InputError(f"end must come after start; they are the steps {self.last} and {self.first}.")
        if self.last > total:
            raise InputError(
                f"pruning would end at step {self.last}, but the run ends at step {total:g}: train longer."
            )
        pattern = self.pattern()
        for weight, _ in held:
            check_groups(weight, pattern)
        rooms = [weight.room(pattern) for weight, _ in held]
        on = {weight.name: int(weight.units_on(pattern).sum(dim=1).max()) for weight, _ in held}
        if self.config.distribution == "global":
            on = {"": sum(on.values())}
            self._to = {"": total_on(rooms, self.config, model_size(module)) // rooms[0].unit_size}
        else:
            counts = allocate(rooms, self.config, model_size(module))
            self._to = {weight.name: count for (weight, _), count in zip(held, counts, strict=True)}
        self._from = self._from or on  # a resumed run knows where it began
        for name, count in self._to.items():
            if count > on[name]:
                raise InputError(
                    f"pruning cannot reach its target: {name or 'the model'} has {on[name]} units on in a group, and "
                    f"{count} are to stay. Raise the sparsity, or begin with a denser model."
                )

    def forget(self) -> None:
        self._from = {}

    def share(self, step: int) -> float:
        """How far the way to the final sparsity is at `step`."""
        progress = (step - self.first) / (self.last - self.first)
        return CURVES[self.curve](min(1.0, max(0.0, progress)))

    def update(self, step: int, held: Sequence[Held], optimizer: Optimizer) -> bool:
        if not (self.first <= step <= self.last and ((step - self.first) % self.every == 0 or step == self.last)):
            return False
        pattern, share = self.pattern(), self.share(step)
        target = {name: round(start + (self._to[name] - start) * share) for name, start in self._from.items()}
        on = [weight.units_on(pattern) for weight, _ in held]
        keep = [weight.scores(tensor, pattern) for weight, tensor in held]
        if "" in target:
            joint = torch.cat(on, dim=1)
            results = cut(largest(torch.cat(keep, dim=1), joint, min(target[""], int(joint.sum()))), on)
        else:
            results = [
                prune(on_, keep_, target[weight.name]) for (weight, _), on_, keep_ in zip(held, on, keep, strict=True)
            ]
        for one, new in zip(held, results, strict=True):
            _change(one, new, pattern, optimizer, self.moments)
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"from": self._from}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._from = state_dict["from"]


class DensityLogger(Callback):
    """Logs densities to the trainer's loggers, every `every` steps: `density/mask` (the truth) and `density/nonzero`
    (less after growing) of all sparse weights, `density/model`, and with `layers` `density/NAME` of each.
    """

    def __init__(self, every: int = 100, layers: bool = False):
        if every < 1:
            raise InputError(f"every must be at least 1 step; got {every}.")
        self.every, self.layers = every, layers
        self._logged = -1

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.every or step == self._logged:
            return
        self._logged = step
        found = densities(module)
        if not found.weights:
            return
        values = {
            "density/mask": found.sparse.mask_density,
            "density/nonzero": found.sparse.nonzero_density,
            "density/model": found.model.mask_density,
        }
        if self.layers:
            values |= {f"density/{name}": density.mask_density for name, density in found.weights.items()}
        module.log_dict(values)


class DistillProgress(Callback):
    """Tells every `Distilled` in the module how far training is, for schedules of its weight and temperature."""

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        total = trainer.estimated_stepping_batches
        for part in module.modules():
            if isinstance(part, Distilled):
                part.progress = _progress(trainer.global_step, total)


def _progress(step: int, total: float) -> float:
    if not math.isfinite(total):
        raise InputError("schedules of distillation need a run with an end: give max_steps.")
    return min(1.0, step / max(1, total - 1))
