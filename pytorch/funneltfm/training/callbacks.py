"""What happens beside the training steps: when to validate, what to record, what to show."""

import contextlib
import csv
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import lightning
import numpy as np
from lightning import Callback
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint, Timer
from tqdm import tqdm

from funneltfm.errors import Diverged
from funneltfm.files import atomic_path
from funneltfm.training import ranks
from funneltfm.training.precision import AmpPrecision

log = logging.getLogger(__name__)

_ASK_TO_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class ValidateAt(Callback):
    """Validate after exactly these steps (1-based), whatever the length of an epoch."""

    def __init__(self, steps: set[int]):
        self.steps = steps

    def on_train_batch_start(self, trainer: lightning.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        # Lightning validates when the number of batches is a multiple of this.
        due = ends_step(trainer, batch_idx) and trainer.global_step + 1 in self.steps
        trainer.val_check_batch = 1 if due else sys.maxsize


class ValidateLast(Callback):
    """Validate after the last of `total` steps too, whenever the others are: it may have the best model."""

    def __init__(self, total: int):
        self.total = total

    def on_train_batch_start(self, trainer: lightning.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if ends_step(trainer, batch_idx) and trainer.global_step + 1 == self.total:
            trainer.val_check_batch, trainer.check_val_every_n_epoch = 1, None


def ends_step(trainer: lightning.Trainer, batch_idx: int) -> bool:
    """Whether an optimizer step ends with this batch of the epoch."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or batch_idx + 1 == trainer.num_training_batches


def ended_step(trainer: lightning.Trainer, batch_idx: int) -> int:
    """After a batch: the step (1-based) that has ended with it, or 0 where more batches belong to it."""
    return trainer.global_step if ends_step(trainer, batch_idx) else 0


def logs_at(step: int, every: int, total: int | None) -> bool:
    """Whether a step has a row in the log."""
    return step % every == 0 or step == total


def validation_steps(total: int, n_valid: int) -> set[int]:
    """`n_valid` steps evenly spaced over `total`, the last one included; fewer where there are fewer steps."""
    n_valid = min(n_valid, total)
    return {max(1, round(total * i / n_valid)) for i in range(1, n_valid + 1)}


class History(Callback):
    """The run's numbers: rows for metrics.csv, kept in the checkpoint, so that a resumed run goes on with the same
    table. It stops a run whose loss is no number.

    path: metrics.csv; None writes none. total: steps in the run, None without an end. per_epoch: in an epoch.
    log_every: between rows. main: name of the metric that selects the best, where `lower` is better or higher. ids:
    each training example's own id. advice: what to try when training diverges. since: from which step on a model can
    be the best.
    """

    def __init__(
        self,
        path: Path | None,
        total: int | None,
        per_epoch: int,
        log_every: int,
        main: str,
        ids: Sequence[str] | np.ndarray,
        advice: str,
        lower: bool = False,
        since: Callable[[], int] = lambda: 0,
    ):
        self.since = since
        self.path, self.total, self.per_epoch, self.log_every = path, total, per_epoch, log_every
        self.main, self.lower, self.ids, self.advice = main, lower, ids, advice
        self.rows: list[dict[str, float]] = []
        self.train_seconds = 0.0
        self.examples = 0
        self.tokens = 0  # real ones, where batches say how many they have
        self._losses: list[float] = []  # of the steps since the last row, of all processes
        self._own: list[tuple[int, Any, Any]] = []  # (step, loss, example indices) of this process's batches
        self._own_examples = self._own_tokens = 0
        self._since = (0.0, 0, 0)  # seconds, examples and tokens at the last row
        self._tick = 0.0
        self._lr = 0.0

    @property
    def examples_per_second(self) -> float:
        """In training, validation left out."""
        return self.examples / self.train_seconds if self.train_seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """The same of tokens, without padding."""
        return self.tokens / self.train_seconds if self.train_seconds else 0.0

    @property
    def best(self) -> dict[str, float]:
        """The row with the best main metric, the earliest of equals; empty where there is none yet."""
        scored = (row for row in self.rows if self.main in row and row["step"] >= self.since())
        choose = min if self.lower else max
        return choose(scored, key=lambda row: np.float32(row[self.main]), default={})  # as ModelCheckpoint compares

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
        if batch["weight"]:
            self._own_examples += len(batch["index"])
            self._own_tokens += batch.get("tokens", 0)
        step = ended_step(trainer, batch_idx)
        self._own.append((step or trainer.global_step + 1, outputs["loss"].detach(), batch["index"]))
        if not step:
            return
        logs = logs_at(step, self.log_every, self.total)
        if logs or module.device.type == "cpu":  # a GPU is not made to wait at every step
            self._check_losses()
        if logs:
            self._pool()
            now_at = self.train_seconds, self.examples, self.tokens
            seconds, examples, tokens = (a - b for a, b in zip(now_at, self._since, strict=True))
            self._since = now_at
            loss = sum(self._losses) / len(self._losses)
            self._losses = []
            values = {"lr": self._lr, "train/loss": loss, "examples_per_second": examples / seconds if seconds else 0.0}
            if self.tokens:
                values["tokens_per_second"] = tokens / seconds if seconds else 0.0
            precision = trainer.precision_plugin
            if isinstance(precision, AmpPrecision) and precision.scaler is not None:
                values |= {"loss_scale": precision.scaler.get_scale(), "skipped_steps": precision.skipped}
            self.add(step, values | module.train_scores, trainer.loggers)

    def _check_losses(self) -> None:
        """Stop at the first step whose loss is not finite, in whichever process."""
        bad = next(((step, loss, index) for step, loss, index in self._own if not loss.isfinite()), None)
        if not ranks.any_rank(bad is not None):
            return
        first = min(b for b in ranks.gather(bad and (bad[0], float(bad[1]), bad[2].tolist())) if b is not None)
        step, loss, index = first
        names = [str(self.ids[i]) for i in index]
        ranks.fail(
            Diverged(
                f"the training loss is {loss} at step {step} (epoch {step / self.per_epoch:.2f}), on the examples with "
                f"the ids {', '.join(names[:32])}{', ...' if len(names) > 32 else ''}. Training has diverged: "
                f"{self.advice}. What was saved before is kept."
            )
        )

    def _pool(self) -> None:
        """Put this process's steps together with those of the others."""
        by_step: dict[int, float] = {}
        for step, loss, _ in self._own:
            by_step[step] = by_step.get(step, 0.0) + float(loss)  # Lightning has divided by the number of batches
        gathered = ranks.gather((list(by_step.values()), self._own_examples, self._own_tokens))
        self._losses += [sum(of_step) / ranks.size() for of_step in zip(*(g[0] for g in gathered), strict=True)]
        self.examples += sum(examples for _, examples, _ in gathered)
        self.tokens += sum(tokens for _, _, tokens in gathered)
        self._own, self._own_examples, self._own_tokens = [], 0, 0

    def on_validation_start(self, trainer: lightning.Trainer, module: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._check_losses()  # before the validation says that something is wrong, but not since when

    def on_validation_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self._tick = 0.0
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            scores = {f"{split}/{name}": v for split, by_name in module.scores.items() for name, v in by_name.items()}
            self.add(trainer.global_step, scores, trainer.loggers)

    def add(self, step: int, values: dict[str, float], loggers: Iterable[Any]) -> None:
        """Note a row of scores, here, in metrics.csv and with the loggers."""
        row = {"step": step, "epoch": round(step / self.per_epoch, 4), **values}
        self.rows.append(row)
        if not ranks.is_main():
            return
        for logger in loggers:
            logger.log_metrics(row, step)
        if self.path is None:
            return
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        with atomic_path(self.path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, columns, restval="")
            writer.writeheader()
            writer.writerows(self.rows)

    def state_dict(self) -> dict[str, Any]:
        self._check_losses()  # what has diverged is not worth a checkpoint
        self._pool()
        return {
            "rows": self.rows,
            "train_seconds": self.train_seconds,
            "examples": self.examples,
            "tokens": self.tokens,
            "losses": self._losses,
            "since": list(self._since),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = state["rows"]
        self.train_seconds, self.examples = state["train_seconds"], state["examples"]
        self.tokens = state.get("tokens", 0)
        self._losses = state["losses"]
        seconds, examples, tokens = [*state["since"], self.tokens][:3]  # older runs have no tokens there
        self._since = seconds, examples, tokens


class BestCheckpoint(ModelCheckpoint):
    """Knows its best also after the run's folder has moved; Lightning's own would forget it. `since()`: the step from
    which on a model can be the best.
    """

    since: Callable[[], int] = staticmethod(lambda: 0)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.global_step >= self.since():
            super().on_validation_end(trainer, pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def here(path: str) -> str:
            return os.path.join(str(self.dirpath), os.path.basename(path)) if path else path

        paths = {name: here(state_dict[name]) for name in ("best_model_path", "kth_best_model_path", "last_model_path")}
        best = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict | paths | {"dirpath": self.dirpath, "best_k_models": best})


class Patience(EarlyStopping):
    """Has stopped for good: a run that is resumed after that does not go on."""

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        trainer.should_stop = self.wait_count >= self.patience


class Leave(Exception):
    """Raised in training after a signal, when everything is saved."""

    def __init__(self, signum: int, step: int):
        super().__init__(signum, step)
        self.signum, self.step = signum, step


class Resumable(Protocol):
    """A run's folder."""

    @property
    def resumable(self) -> list[Path]:
        """Checkpoints to resume from: the next, the last, the one before."""


class SaveRun(Checkpoint):
    """Saves the whole state of a run: after validations, every `every` steps (0: not), and when a signal asks to stop.

    SIGINT (Ctrl-C), SIGTERM and SIGUSR1 (how SLURM announces the end) end the run after the present step; a second
    Ctrl-C ends a single process at once. The checkpoint before is kept as previous.ckpt, so that a damaged last.ckpt
    costs little. `validations` are the steps after which a validation follows, and with it the saving.
    """

    def __init__(self, run_dir: Resumable, every: int, validations: set[int]):
        self.run_dir, self.every, self.validations = run_dir, every, validations
        self.signum = 0
        self._in_window = False  # batches were computed whose step is still to come
        self._due = False

    # ---- signals

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Put the handlers of signals back at the end."""
        before = {signum: signal.getsignal(signum) for signum in _ASK_TO_STOP}
        try:
            yield
        finally:
            if threading.current_thread() is threading.main_thread():
                for signum, handler in before.items():
                    if handler is not None:  # one that was not set from Python cannot be put back
                        signal.signal(signum, handler)

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            for signum in _ASK_TO_STOP:
                signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, frame: Any) -> None:
        if self.signum == signum == signal.SIGINT and ranks.size() == 1:
            raise KeyboardInterrupt  # asked twice
        self.signum = signum
        if ranks.is_main():
            os.write(2, b"\nstopping after this step, or validation ...\n")  # safe in a signal handler, unlike print

    # ---- saving

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = ended_step(trainer, batch_idx)
        self._in_window = not step
        if not step or step in self.validations:
            return
        leaves = ranks.any_rank(self.signum > 0) and not self._validation_follows(trainer, batch_idx)
        if leaves or self._due or (self.every and step % self.every == 0):
            self._save(trainer, leaves)

    def _validation_follows(self, trainer: lightning.Trainer, batch_idx: int) -> bool:
        """Whether Lightning validates after this batch: a run that left before would go on behind it."""
        loop = trainer.fit_loop.epoch_loop
        if self.validations or not loop._should_check_val_epoch():
            return False
        at = loop.total_batch_idx if trainer.check_val_every_n_epoch is None else batch_idx
        every = trainer.val_check_batch  # None where it is a time
        return every is not None and (at + 1) % every == 0

    def on_validation_end(self, trainer: lightning.Trainer, module: Any) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if self._in_window:  # the gradients of the batches before would be lost: save when the step is made
            self._due = True
        else:
            self._save(trainer, ranks.any_rank(self.signum > 0))

    def _save(self, trainer: lightning.Trainer, leaves: bool) -> None:
        self._due = False
        new, last, previous = self.run_dir.resumable
        trainer.save_checkpoint(new)
        if ranks.is_main():
            if last.is_file():
                os.replace(last, previous)
            os.replace(new, last)
        if leaves:
            self._leave(trainer.global_step)

    def leave_if_asked(self, step: int) -> None:
        if ranks.any_rank(self.signum > 0):
            self._leave(step)

    def _leave(self, step: int) -> NoReturn:
        ranks.fail(Leave(max(ranks.gather(self.signum)), step))


class Progress(Callback):
    """A bar over the whole run with loss, speed and time left, whose lines go to the log file alone; plain lines where
    the output is no terminal, or without `bar`.
    """

    def __init__(self, history: History, bar: bool = True):
        self.history, self.bar = history, bar
        self._bar: tqdm | None = None
        self._shown = 0

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self._shown = len(self.history.rows)
        if self.bar and ranks.is_main() and sys.stderr.isatty():
            self._bar = tqdm(
                total=self.history.total, initial=trainer.global_step, desc="training", unit="step", dynamic_ncols=True
            )

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._bar is not None and ended_step(trainer, batch_idx):
            self._bar.update()
        self._show(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self._show(trainer)

    def _show(self, trainer: lightning.Trainer) -> None:
        for row in self.history.rows[self._shown :]:
            if "train/loss" not in row:
                shown = {name: value for name, value in row.items() if "_class_" not in name.rpartition("/")[2]}
                scores = "  ".join(
                    f"{name} {value:.4f}" for name, value in shown.items() if name not in ("step", "epoch")
                )
                best = " (best so far)" if row is self.history.best else ""
                self._say(f"step {row['step']}  epoch {row['epoch']:.2f}  {scores}{best}")
            else:
                self._show_training(trainer, row)
        self._shown = len(self.history.rows)

    def _show_training(self, trainer: lightning.Trainer, row: dict[str, float]) -> None:
        """A line; where there is a bar, what it says is shown beside that."""
        scores, loss = self._train_scores(row), f"{row['train/loss']:.4f}"
        speeds = {name: row.get(f"{name}_per_second") for name in ("examples", "tokens")}
        speed = "  ".join(f"{value:.0f} {name}/s" for name, value in speeds.items() if value is not None)
        self._say(
            f"step {row['step']}/{self.history.total or '?'}  epoch {row['epoch']:.2f}  loss {loss}  {scores}"
            f"lr {row['lr']:.2e}  {speed}{self._left(trainer, row['step'])}",
            in_bar=self._bar is not None,
        )
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss={loss}  {scores}{speed}", refresh=False)

    def _left(self, trainer: lightning.Trainer, step: float) -> str:
        """How long the run still takes, by its steps or --max_time; nothing where neither says."""
        total = self.history.total
        ends = [] if total is None else [(total - step) * self.history.train_seconds / step]
        timers = (one for one in trainer.callbacks if isinstance(one, Timer))  # type: ignore[attr-defined]
        ends += [timer.time_remaining() or 0.0 for timer in timers]
        return f"  {tqdm.format_interval(max(0.0, min(ends)))} left" if ends else ""

    def _train_scores(self, row: dict[str, float]) -> str:
        """Of the training batch: F1 and perplexity, and the score that selects the best model."""
        main = self.history.main.replace("valid/", "train/", 1)
        shown = [name for name in row if name.startswith("train/") and name.endswith(("/f1", "/perplexity"))]
        shown += [main] if main in row and main not in shown else []
        return "".join(f"{name.removeprefix('train/')} {row[name]:.4f}  " for name in shown)

    def _say(self, line: str, in_bar: bool = False) -> None:
        if self._bar is not None:
            self._bar.clear()
        log.info(line, extra={"in_bar": in_bar})
        if self._bar is not None:
            self._bar.refresh()

    def teardown(self, trainer: lightning.Trainer, module: Any, stage: str) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
