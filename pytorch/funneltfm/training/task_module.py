"""The training engine's view of a pipeline: a LightningModule that holds one encoder with heads, and their tasks."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funneltfm.data.features import Batch, Features
from funneltfm.errors import InputError
from funneltfm.tasks.base import Record, Row, Task, full_name
from funneltfm.tasks.heads import Heads
from funneltfm.training import ranks
from funneltfm.training.callbacks import logs_at
from funneltfm.training.distillation import Teachers, for_encoder
from funneltfm.training.optimizers import make_optimizer, make_scheduler
from funneltfm.training.pipeline import ExactResume
from funneltfm.training.sparse_run import density_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """The data of a stage."""

    name: str
    """train, valid, test or predict."""
    rows: Sequence[Row]
    features: Features

    def labelled(self, task: Task) -> bool:
        """Whether the task can be scored on it."""
        if task.unlabelled:
            return True
        return any(name.startswith(f"{task.name}_") for name in (*self.features.plain, *self.features.ragged))


class TaskModule(ExactResume):
    """Trains the heads of `tasks` on one encoder and scores them.

    splits: those that evaluations are made on, by name. `stage` says which one an evaluation is of (Lightning's
    validation is "valid"); after it, `scores[stage]` has its metrics, TASK/METRIC, and `records[stage]` what each task
    kept of every example, by its index. Splits are dealt to the processes; every process ends with the results of all.

    total_steps, steps_per_epoch: optimizer steps of the run, None where it has no end, and of an epoch; to be set
    before training. (Lightning's own estimate makes the loaders before their state is restored, which is then lost.)
    teachers: what training distils from.
    """

    def __init__(
        self,
        heads: Heads,
        tasks: Sequence[Task],
        args: Any,
        splits: dict[str, Split],
        teachers: Teachers | None = None,
    ):
        super().__init__()
        self.heads = heads
        self.tasks = tasks
        self.args = args
        self.splits = splits
        self.teachers = teachers
        self.stage = "valid"
        self.total_steps: int | None = None
        self.steps_per_epoch = 0
        self.monitor: str | None = None  # what selects the best model in training
        self.scores: dict[str, dict[str, float]] = {}
        self.records: dict[str, dict[str, dict[int, Record]]] = {}
        self.train_scores: dict[str, float] = {}
        self._kept: dict[str, dict[int, Record]] = {}

    def weight(self, name: str) -> float:
        """Of a loss where there are several."""
        weight = getattr(self.args, f"{name}_weight")
        return self.args.seq_class_weight if weight is None else weight

    def encode(self, tasks: Sequence[Task], batch: Batch) -> tuple[Batch, Any]:
        """The batch as the encoder has seen it, and what the encoder says."""
        for task in tasks:
            batch = task.corrupt(self.heads.of_task(task.name)[1], batch)
        batch = for_encoder(self.heads, batch)
        first = tasks[0]  # what the others take too
        return batch, self.heads(first.inputs(self.heads.models[first.name], batch))

    # ---- training

    def on_fit_start(self) -> None:
        if self.teachers is not None:
            self.teachers.to(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        said = {} if self.teachers is None else self.teachers.logits(batch)
        batch, hidden = self.encode(self.tasks, batch)
        logits = {task.name: task.logits(self.heads.models[task.name], hidden, batch) for task in self.tasks}
        losses = {name: loss for task in self.tasks for name, loss in task.losses(logits[task.name], batch).items()}
        parts: dict[str, Tensor] = {}
        if self.teachers is not None:
            progress = min(1.0, self.global_step / max(1, (self.total_steps or 1) - 1))
            for task in self.tasks:
                hard = losses[task.name]
                losses[task.name], soft = self.teachers.loss(
                    task, logits[task.name], said[task.name], hard, batch, progress
                )
                parts |= {f"{task.name}/hard_loss": hard, f"{task.name}/soft_loss": soft}
        shares = self._shares(batch)
        loss = torch.zeros((), device=self.device)
        for name, value in losses.items():
            share = shares[name] if name in shares else batch["weight"]
            loss = loss + (self.weight(name) if len(losses) > 1 else 1.0) * share * value
        with torch.no_grad():
            for task in self.tasks:
                task.update(self.heads.of_task(task.name)[1], logits[task.name].detach(), batch)
        if logs_at(self.global_step + 1, self.args.log_every_n_steps, self.total_steps) and not self.args.barebones:
            self.train_scores = {f"train/{name}/loss": value.item() for name, value in losses.items()}
            self.train_scores |= {f"train/{name}": value.item() for name, value in parts.items()}
            self.train_scores |= {f"density/{name}": value for name, value in density_of(self.heads).items()}
            with torch.no_grad():
                for task in self.tasks:
                    for name, score in task.train_scores(logits[task.name].detach(), batch).items():
                        self.train_scores[f"train/{full_name(task, name)}"] = score
        return loss

    def _shares(self, batch: Batch) -> dict[str, float]:
        """The weight of a batch in its step for the losses that are no mean over examples: with it the mean over
        processes and batches is the mean over all that they have together (tokens, say), however it was dealt.
        """
        if not batch["sizes"]:
            return {}
        gathered = ranks.gather(batch["step_sizes"])
        parts = len(gathered) * self.trainer.accumulate_grad_batches
        totals = {name: sum(sizes.get(name, 0.0) for sizes in gathered) for name in batch["sizes"]}
        return {
            name: size * parts / totals[name] if batch["weight"] and totals[name] else 0.0
            for name, size in batch["sizes"].items()
        }

    # ---- evaluation: validation, test and prediction are the same

    def scored(self) -> list[Task]:
        """The tasks of an evaluation. Where one has labels the input is clean: one that corrupts has nothing to say."""
        none_labelled = all(task.unlabelled for task in self.tasks)
        return [task for task in self.tasks if none_labelled or not task.corrupts]

    def on_validation_epoch_start(self) -> None:
        self._kept = {task.name: {} for task in self.scored()}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        batch, hidden = self.encode(self.scored(), batch)
        for task in self.scored():
            records = task.evaluated(self.heads.models[task.name], hidden, batch, self.stage)
            self._kept[task.name].update(zip(batch["index"].tolist(), records, strict=True))

    def on_validation_epoch_end(self) -> None:
        split = self.splits[self.stage]
        self.scores[self.stage], self.records[self.stage] = {}, {}
        for task in self.scored():
            by_index = _gathered(self._kept[task.name])
            self.records[self.stage][task.name] = by_index
            if not split.labelled(task):
                continue
            records, features = list(by_index.values()), split.features.take(list(by_index))
            try:
                if self.stage == "valid":
                    task.tune(records, features, split.rows)
                scores = task.score(records, features, split.rows)
            except InputError as error:  # every process has the same
                ranks.fail(error)
            for name, value in ((full_name(task, name), value) for name, value in scores.items()):
                if not np.isfinite(value):
                    at = f"step {self.global_step}"
                    ranks.fail(
                        InputError(
                            f"{self.stage}/{name} is {value} at {at}. Training has diverged, or the model "
                            f"is damaged: lower --learning_rate."
                        )
                    )
                self.scores[self.stage][name] = value
        self._kept = {}
        self._check_monitor()
        named = {f"{self.stage}/{name}": value for name, value in self.scores[self.stage].items()}
        if not self.args.barebones:
            self.log_dict(named, logger=False)  # every process has the same

    def _check_monitor(self) -> None:
        """A validation must have measured what selects the best model."""
        fit = self.trainer.state.fn == "fit" and not self.trainer.sanity_checking
        measured = [f"valid/{name}" for name in self.scores[self.stage]]
        if fit and self.monitor is not None and self.monitor.startswith("valid/") and self.monitor not in measured:
            ranks.fail(
                InputError(
                    f"{self.monitor} selects the best model, but the validation has not measured it; it has "
                    f"{', '.join(measured) or 'no labels'}. Give another --monitor."
                )
            )

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    # ---- optimizer

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.heads, self.args)
        schedule = make_scheduler(optimizer, self.args, self.total_steps, self.steps_per_epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _gathered(own: dict[int, Record]) -> dict[int, Record]:
    """The records of all processes by index, in order; an example that came twice is taken once."""
    together = {index: record for part in ranks.gather(own) for index, record in part.items()}
    return dict(sorted(together.items()))
