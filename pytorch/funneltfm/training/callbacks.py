"""What happens beside the training steps: when to validate, what to record, what to show."""

import csv
import logging
import sys
import time
from pathlib import Path
from typing import Any

import lightning
import numpy as np
from lightning import Callback
from tqdm import tqdm

from funneltfm.errors import InputError
from funneltfm.files import atomic_path

log = logging.getLogger(__name__)


class ValidateAt(Callback):
    """Validate after exactly these steps (1-based), whatever the length of an epoch."""

    def __init__(self, steps: set[int]):
        self.steps = steps

    def on_train_batch_start(self, trainer: lightning.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        # Lightning validates when the number of batches is a multiple of this.
        trainer.val_check_batch = 1 if batch_idx + 1 in self.steps else sys.maxsize


def validation_steps(total: int, n_valid: int) -> set[int]:
    """`n_valid` steps evenly spaced over `total`, the last one included; fewer where there are fewer steps."""
    return {max(1, round(total * i / n_valid)) for i in range(1, n_valid + 1)}


class History(Callback):
    """The run's numbers: rows for metrics.csv, kept in the checkpoint, so that a resumed run goes on with the same
    table.
    """

    def __init__(self, path: Path, per_epoch: int, log_every: int, main: str):
        self.path, self.per_epoch, self.log_every, self.main = path, per_epoch, log_every, main
        self.rows: list[dict[str, float]] = []
        self.train_seconds = 0.0
        self.examples = 0
        self._losses: list[Any] = []
        self._since = (0.0, 0)
        self._tick = 0.0
        self._lr = 0.0

    @property
    def examples_per_second(self) -> float:
        """In training, validation left out."""
        return self.examples / self.train_seconds if self.train_seconds else 0.0

    @property
    def best(self) -> dict[str, float]:
        """The row with the best main metric, the earliest of equals."""
        scored = (row for row in self.rows if self.main in row)
        return max(scored, key=lambda row: np.float32(row[self.main]))  # as ModelCheckpoint compares

    def on_train_batch_start(self, trainer: lightning.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]
        if not self._tick:
            self._tick = time.perf_counter()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self.train_seconds += now - self._tick
        self._tick = now
        self.examples += len(batch["index"])
        self._losses.append(outputs["loss"].detach())
        step = batch_idx + 1
        if step % self.log_every == 0 or step == trainer.num_training_batches:
            seconds, examples = self.train_seconds - self._since[0], self.examples - self._since[1]
            self._since = self.train_seconds, self.examples
            loss = sum(map(float, self._losses)) / len(self._losses)
            self._losses = []
            if loss != loss or loss in (float("inf"), float("-inf")):
                raise InputError(
                    f"the training loss is not finite at step {step}. Training has diverged: lower --lr, or raise "
                    f"--warmup_prop."
                )
            rate = examples / seconds if seconds else 0.0
            self._add(step, {"lr": self._lr, "train/loss": loss, "examples_per_second": rate})

    def on_validation_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self._tick = 0.0
        if trainer.state.fn == "fit":
            scores = {f"{split}/{name}": v for split, by_name in module.scores.items() for name, v in by_name.items()}
            self._add(trainer.global_step, scores)

    def _add(self, step: int, values: dict[str, float]) -> None:
        self.rows.append({"step": step, "epoch": round(step / self.per_epoch, 4), **values})
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        with atomic_path(self.path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, columns, restval="")
            writer.writeheader()
            writer.writerows(self.rows)

    def state_dict(self) -> dict[str, Any]:
        losses = [float(loss) for loss in self._losses]
        since = list(self._since)
        return {
            "rows": self.rows,
            "train_seconds": self.train_seconds,
            "examples": self.examples,
            "losses": losses,
            "since": since,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = state["rows"]
        self.train_seconds, self.examples = state["train_seconds"], state["examples"]
        self._losses, self._since = state["losses"], tuple(state["since"])


class Progress(Callback):
    """A bar over the whole run with loss, speed and time left; plain lines where the output is no terminal."""

    def __init__(self, history: History):
        self.history = history
        self._bar: tqdm | None = None
        self._shown = 0

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self._shown = len(self.history.rows)
        if sys.stderr.isatty():
            total = int(trainer.num_training_batches)
            self._bar = tqdm(total=total, initial=trainer.global_step, desc="training", unit="step", dynamic_ncols=True)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._bar is not None:
            self._bar.update()
        self._show(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self._show(trainer)

    def _show(self, trainer: lightning.Trainer) -> None:
        for row in self.history.rows[self._shown :]:
            if "train/loss" not in row:
                scores = "  ".join(
                    f"{name} {value:.4f}" for name, value in row.items() if name not in ("step", "epoch")
                )
                best = " (best so far)" if row is self.history.best else ""
                self._say(f"step {row['step']}  epoch {row['epoch']:.2f}  {scores}{best}")
            elif self._bar is not None:
                self._bar.set_postfix(
                    {"loss": f"{row['train/loss']:.4f}", "ex/s": f"{row['examples_per_second']:.0f}"}, refresh=False
                )
            else:
                left = (trainer.num_training_batches - row["step"]) * self.history.train_seconds / row["step"]
                self._say(
                    f"step {row['step']}/{trainer.num_training_batches}  epoch {row['epoch']:.2f}  loss "
                    f"{row['train/loss']:.4f}  lr {row['lr']:.2e}  {row['examples_per_second']:.0f} examples/s  "
                    f"{tqdm.format_interval(left)} left"
                )
        self._shown = len(self.history.rows)

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        log.info(line)
        if self._bar is not None:
            self._bar.refresh()

    def teardown(self, trainer: lightning.Trainer, module: Any, stage: str) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
