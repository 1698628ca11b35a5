"""The learning-rate range test: train a few steps at rates that go up, and see where the loss turns.

Smith: Cyclical Learning Rates for Training Neural Networks, 2017, section 3.3.
"""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning
from lightning import Callback

from funneltfm.errors import InputError
from funneltfm.files import atomic_path
from funneltfm.training import ranks

_SMOOTHING = 0.9  # of the training loss, which one batch alone makes noisy


class LRRange(Callback):
    """Sets the learning rate of every step from `min_lr` up to `max_lr`, records the loss, and ends training after
    `steps` optimizer steps, or when the loss is four times its lowest or no number.

    mode: "exponential" or "linear". evaluate: a function of the module that gives the loss after a step, on part of a
    validation set, say; None takes the training loss, smoothed and averaged over processes.

    Whatever schedule the run has is overruled. The model is spoiled by this: load or build it anew afterwards. `curve`
    holds (learning rate, loss) of every step, and `turn` the rate with the lowest loss: take it, or a little less, as
    the highest rate of a schedule.
    """

    def __init__(
        self,
        min_lr: float = 1e-6,
        max_lr: float = 1e-1,
        steps: int = 100,
        mode: Literal["exponential", "linear"] = "exponential",
        evaluate: Callable[[lightning.LightningModule], float] | None = None,
    ):
        if not 0 < min_lr < max_lr:
            raise InputError(f"the range must go from min_lr, above 0, up to max_lr; got {min_lr} and {max_lr}.")
        if steps < 2:
            raise InputError(f"a range test needs at least 2 steps; got {steps}.")
        if mode not in ("exponential", "linear"):
            raise InputError(f"mode must be one of exponential, linear; got {mode!r}.")
        self.min_lr, self.max_lr, self.steps, self.mode, self.evaluate = min_lr, max_lr, steps, mode, evaluate
        self.curve: list[tuple[float, float]] = []
        self._losses: list[Any] = []
        self._average = 0.0

    def lr(self, step: int) -> float:
        """The rate of step `step` (0-based)."""
        progress = step / (self.steps - 1)
        if self.mode == "linear":
            return self.min_lr + (self.max_lr - self.min_lr) * progress
        return self.min_lr * (self.max_lr / self.min_lr) ** progress

    @property
    def turn(self) -> float:
        """The learning rate at which the loss was lowest."""
        finite = [(loss, lr) for lr, loss in self.curve if math.isfinite(loss)]
        if not finite:
            raise InputError("the range test has no finite loss: lower min_lr.")
        return min(finite)[1]

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if trainer.estimated_stepping_batches < self.steps:
            raise InputError(
                f"the range test takes {self.steps} steps, the run has {trainer.estimated_stepping_batches:g}: give "
                f"it fewer steps, or train for longer."
            )

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr(len(self.curve))

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._losses.append(outputs["loss"].detach())
        if trainer.global_step == len(self.curve):
            return  # the step goes on with the next batch
        loss = ranks.mean(float(sum(self._losses)) / len(self._losses))
        self._losses = []
        step = len(self.curve) + 1
        if self.evaluate is not None:
            loss = self.evaluate(module)
        else:
            self._average = _SMOOTHING * self._average + (1 - _SMOOTHING) * loss
            loss = self._average / (1 - _SMOOTHING**step)
        self.curve.append((self.lr(step - 1), loss))
        lowest = min(loss for _, loss in self.curve)
        if step == self.steps or not math.isfinite(loss) or loss > 4 * lowest > 0:
            trainer.should_stop = True

    def write(self, path: str | Path) -> None:
        """The curve as CSV: lr, loss."""
        with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
            csv.writer(handle).writerows([("lr", "loss"), *self.curve])
