"""The one training engine's view of a run: a LightningModule that holds a model and a task."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from funneltfm.data.batching import Batch
from funneltfm.errors import InputError
from funneltfm.tasks.classification import Classification
from funneltfm.training import ranks
from funneltfm.training.optim import make_adamw, make_schedule
from funneltfm.training.precision import AmpPrecision
from funneltfm.training.sharding import Shardable

log = logging.getLogger(__name__)


class ExactResume(Shardable):
    """A module whose dropout goes on, after resuming, with the random numbers that it would have had: a resumed run
    equals an uninterrupted one.
    """

    _rng: list[dict[str, Tensor]] | None = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        precision = self.trainer.precision_plugin
        if isinstance(precision, AmpPrecision) and precision.meaning.half:
            checkpoint["state_dict"] = precision.exact_state(self)
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        checkpoint["rng"] = ranks.gather(rng)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._rng = checkpoint["rng"]

    def on_train_start(self) -> None:
        if self._rng is not None:
            rng = self._rng[ranks.rank()]
            torch.set_rng_state(rng["cpu"].cpu())
            if "cuda" in rng and self.device.type == "cuda":
                torch.cuda.set_rng_state(rng["cuda"].cpu(), self.device)
            self._rng = None


class Pipeline(ExactResume):
    """Trains `model` on `task` and scores it on every validation split.

    splits: names of the validation splits, in the order of their loaders. After a validation, `scores` maps each to
    its metrics over the whole split. A test leaves logits (N, C) of the whole split, in its order, in `predictions`.
    Splits are dealt to the processes; every process ends with the results of all.
    """

    def __init__(self, model: nn.Module, task: Classification, args: Any, total_steps: int, splits: Sequence[str]):
        super().__init__()
        self.model = model
        self.task = task
        self.args = args
        self.total_steps = total_steps
        self.splits = splits
        self.scores: dict[str, dict[str, float]] = {}
        self.predictions = np.empty(0)
        self.train_scores: dict[str, float] = {}  # the loss says enough
        self._outputs: dict[int, list[tuple[Tensor, ...]]] = {}

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, C)."""
        _, ret_dict = self.model(batch["inputs"], input_mask=batch["input_mask"], seg_id=batch["seg_id"])
        return ret_dict["cls_logits"]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.task.loss(self(batch), batch["labels"]) * batch["weight"]

    def on_validation_epoch_start(self) -> None:
        self._outputs = {number: [] for number in range(len(self.splits))}

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        outputs = batch["index"].cpu(), self(batch).float().cpu(), batch["labels"].cpu()
        self._outputs[dataloader_idx].append(outputs)

    def on_validation_epoch_end(self) -> None:
        for number, split in enumerate(self.splits):
            logits, labels = whole_split(self._outputs[number])
            if not np.isfinite(logits).all():
                ranks.fail(
                    InputError(
                        f"the model's output on {split} is not finite after step {self.global_step}. Training has "
                        f"diverged: lower --lr."
                    )
                )
            self.scores[split] = self.task.score(logits, labels)
            for name, value in self.scores[split].items():
                self.log(f"{split}/{name}", value)  # every process has the same
        self._outputs = {}

    def on_test_epoch_start(self) -> None:
        self._outputs = {0: []}

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._outputs[0].append((batch["index"].cpu(), self(batch).float().cpu()))

    def on_test_epoch_end(self) -> None:
        (self.predictions,) = whole_split(self._outputs[0])
        self._outputs = {}

    def configure_optimizers(self) -> Any:
        args = self.args
        apex = args.ddp_backend == "apex" and self.device.type == "cuda"
        if args.ddp_backend == "apex" and not apex:
            log.info("apex's optimizers need CUDA; torch.optim.AdamW(fused=True) runs instead.")
        optimizer = make_adamw(self.model, args.lr, args.weight_decay, apex)
        schedule = make_schedule(optimizer, self.total_steps, args.warmup_prop, args.lr, args.min_lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def whole_split(outputs: list[tuple[Tensor, ...]]) -> list[np.ndarray]:
    """Outputs of batches, each (index, values...), gathered from all processes: the values of every example once, in
    the order of the split.
    """
    gathered = ranks.gather([torch.cat(part).numpy() for part in zip(*outputs, strict=True)])
    index, *values = (np.concatenate(part) for part in zip(*gathered, strict=True))
    _, first = np.unique(index, return_index=True)  # sorted; an example that came twice is taken once
    return [value[first] for value in values]
