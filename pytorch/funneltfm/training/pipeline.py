"""The one training engine's view of a run: a LightningModule that holds a model and a task."""

from collections.abc import Sequence
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor, nn

from funneltfm.data.batching import Batch
from funneltfm.errors import InputError
from funneltfm.tasks.classification import Classification
from funneltfm.training.optim import make_adamw, make_schedule


class Pipeline(lightning.LightningModule):
    """Trains `model` on `task` and scores it on every validation split.

    splits: names of the validation splits, in the order of their loaders. After a validation, `scores` maps each to
    its metrics over the whole split. A test leaves (index, logits) of every batch in `predictions`.
    """

    def __init__(self, model: nn.Module, task: Classification, args: Any, total_steps: int, splits: Sequence[str]):
        super().__init__()
        self.model = model
        self.task = task
        self.args = args
        self.total_steps = total_steps
        self.splits = splits
        self.scores: dict[str, dict[str, float]] = {}
        self.predictions: list[tuple[Tensor, Tensor]] = []
        self._outputs: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._rng: dict[str, Tensor] | None = None

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, C)."""
        _, ret_dict = self.model(batch["inputs"], input_mask=batch["input_mask"], seg_id=batch["seg_id"])
        return ret_dict["cls_logits"]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.task.loss(self(batch), batch["labels"])

    def on_validation_epoch_start(self) -> None:
        self._outputs = {number: [] for number in range(len(self.splits))}

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._outputs[dataloader_idx].append((self(batch).float().cpu(), batch["labels"].cpu()))

    def on_validation_epoch_end(self) -> None:
        for number, split in enumerate(self.splits):
            logits, labels = (torch.cat(part).numpy() for part in zip(*self._outputs[number], strict=True))
            if not np.isfinite(logits).all():
                raise InputError(
                    f"the model's output on {split} is not finite after step {self.global_step}. Training has "
                    f"diverged: lower --lr."
                )
            self.scores[split] = self.task.score(logits, labels)
            for name, value in self.scores[split].items():
                self.log(f"{split}/{name}", value)
        self._outputs = {}

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.predictions.append((batch["index"].cpu(), self(batch).float().cpu()))

    def configure_optimizers(self) -> Any:
        args = self.args
        # A fused optimizer unscales gradients itself, so with loss scaling they could not be clipped first.
        fused = self.trainer.precision != "16-mixed"
        optimizer = make_adamw(self.model, args.lr, args.weight_decay, fused)
        schedule = make_schedule(optimizer, self.total_steps, args.warmup_prop, args.lr, args.min_lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # Dropout goes on with the random numbers that it would have had, so a resumed run equals an uninterrupted one.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rng"] = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            checkpoint["rng"]["cuda"] = torch.cuda.get_rng_state(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._rng = checkpoint["rng"]

    def on_train_start(self) -> None:
        if self._rng is not None:
            torch.set_rng_state(self._rng["cpu"].cpu())
            if "cuda" in self._rng and self.device.type == "cuda":
                torch.cuda.set_rng_state(self._rng["cuda"].cpu(), self.device)
            self._rng = None
