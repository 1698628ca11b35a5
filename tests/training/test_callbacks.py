"""When validation happens, and what the table of a run holds, with a stand-in for the trainer."""

import csv
import logging
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Timer

from funneltfm.cli.main import _TqdmHandler
from funneltfm.errors import InputError
from funneltfm.training import callbacks
from funneltfm.training.callbacks import History, Progress, validation_steps
from funneltfm.training.runlog import log_file


@given(st.integers(1, 500), st.integers(1, 40))
def test_validation_steps(total: int, n_valid: int) -> None:
    steps = sorted(validation_steps(total, n_valid))
    assert steps[-1] == total
    assert steps[0] >= 1
    if n_valid <= total:
        assert len(steps) == n_valid
        gaps = [b - a for a, b in zip([0, *steps], steps, strict=False)]
        assert max(gaps) - min(gaps) <= 2  # even but for rounding
    else:
        assert steps == list(range(1, total + 1))


def test_validation_steps_by_example() -> None:
    assert validation_steps(100, 10) == set(range(10, 101, 10))
    assert validation_steps(1, 10) == {1}


IDS = [f"id{i}" for i in range(40)]


class Run:
    """A trainer of `total` steps that calls the callbacks as Lightning does."""

    def __init__(
        self, history: History, total: int, *more: Progress, accumulate: int = 1, start: int = 0, device: str = "cpu"
    ) -> None:
        optimizer = SimpleNamespace(param_groups=[{"lr": 0.5}])
        self.trainer = SimpleNamespace(
            optimizers=[optimizer], num_training_batches=total * accumulate, global_step=start,
            accumulate_grad_batches=accumulate, precision_plugin=None, state=SimpleNamespace(fn="fit"),
            sanity_checking=False, loggers=[], callbacks=[],
        )  # fmt: skip
        self.module = SimpleNamespace(scores={}, train_scores={}, device=torch.device(device))
        history.total = total
        self.callbacks = [history, *more]
        self.batch_idx = start * accumulate

    def step(self, loss: float, size: int = 4, weight: float = 1.0, **more: int) -> None:
        """One batch; with `accumulate`, several make a step."""
        batch = {"index": torch.arange(size), "weight": weight} | more
        for callback in self.callbacks:
            callback.on_train_batch_start(self.trainer, self.module, batch, self.batch_idx)
        self.batch_idx += 1
        self.trainer.global_step = self.batch_idx // self.trainer.accumulate_grad_batches
        outputs = {"loss": torch.tensor(loss)}
        for callback in self.callbacks:
            callback.on_train_batch_end(self.trainer, self.module, outputs, batch, self.batch_idx - 1)

    def validate(self, **scores: float) -> None:
        self.module.scores = {"valid": scores}
        for callback in self.callbacks:
            callback.on_validation_end(self.trainer, self.module)


def history_of(path: Path, log_every: int = 2) -> History:
    return History(
        path,
        0,
        per_epoch=4,
        log_every=log_every,
        main="valid/accuracy",
        ids=IDS,
        advice="lower --lr, raise --warmup_prop",
    )


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_rows_of_a_run(tmp_path: Path) -> None:
    history = history_of(tmp_path / "metrics.csv")
    run = Run(history, total=5)
    for loss in (1.0, 2.0, 4.0):
        run.step(loss)
    run.validate(accuracy=0.5, loss=9.0)
    for loss in (6.0, 7.0):
        run.step(loss, size=2)
    run.validate(accuracy=0.5, loss=8.0)
    rows = read(tmp_path / "metrics.csv")
    assert [(row["step"], row["epoch"], row["lr"], row["train/loss"]) for row in rows] == [
        ("2", "0.5", "0.5", "1.5"),
        ("3", "0.75", "", ""),
        ("4", "1.0", "0.5", "5.0"),  # the mean since the last one, over a validation too
        ("5", "1.25", "0.5", "7.0"),  # the last step has a row, whatever log_every says
        ("5", "1.25", "", ""),
    ]
    assert [(row["valid/accuracy"], row["valid/loss"]) for row in rows] == [
        ("", ""), ("0.5", "9.0"), ("", ""), ("", ""), ("0.5", "8.0"),
    ]  # fmt: skip
    assert history.examples == 16
    assert history.best["step"] == 3  # the earliest of equals


def test_best_is_the_highest_main_metric(tmp_path: Path) -> None:
    history = history_of(tmp_path / "metrics.csv")
    run = Run(history, total=4)
    for accuracy in (0.2, 0.8, 0.4, 0.8):
        run.step(1.0)
        run.validate(accuracy=accuracy, loss=1.0)
    assert history.best["step"] == 2
    assert history.best["valid/accuracy"] == 0.8


def test_the_table_is_whole_after_every_row(tmp_path: Path) -> None:
    run = Run(history_of(tmp_path / "metrics.csv", log_every=1), total=3)
    for n in range(1, 4):
        run.step(1.0)
        assert len(read(tmp_path / "metrics.csv")) == n
        assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize("validate_after", [1, 3, 10, 20, 39])
def test_saved_and_loaded_goes_on_with_bit_equal_rows(tmp_path: Path, validate_after: int) -> None:
    """A checkpoint in the middle of a log interval: the mean of the losses does not depend on it."""
    total = 40
    losses = torch.rand(total, generator=torch.Generator().manual_seed(0)).tolist()
    whole = Run(history_of(tmp_path / "whole.csv", log_every=total), total)
    for n, loss in enumerate(losses, 1):
        whole.step(loss)
        if n == validate_after:
            whole.validate(accuracy=0.5, loss=1.0)

    first = history_of(tmp_path / "cut.csv", log_every=total)
    run = Run(first, total)
    for loss in losses[:validate_after]:
        run.step(loss)
    run.validate(accuracy=0.5, loss=1.0)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = history_of(tmp_path / "cut.csv", log_every=total)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    run = Run(second, total, start=validate_after)
    for loss in losses[validate_after:]:
        run.step(loss)
    speedless = [
        [{k: v for k, v in row.items() if not k.endswith("_per_second")} for row in read(tmp_path / name)]
        for name in ("whole.csv", "cut.csv")
    ]
    assert speedless[0] == speedless[1]
    assert float(speedless[0][-1]["train/loss"]) == pytest.approx(sum(losses) / total, abs=1e-6)
    assert second.examples == 4 * total


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path, loss: float) -> None:
    run = Run(history_of(tmp_path / "metrics.csv"), total=9)
    run.step(1.0)
    with pytest.raises(
        InputError, match=rf"loss is {loss} at step 2 \(epoch 0\.50\).* ids id0, id1, id2\. .*--lr.*--warmup_prop"
    ):
        run.step(loss, size=3)


def test_of_many_examples_the_first_ids_are_told(tmp_path: Path) -> None:
    run = Run(history_of(tmp_path / "metrics.csv"), total=9)
    with pytest.raises(InputError, match=r" id30, id31, \.\.\.\. ") as caught:
        run.step(math.nan, size=40)
    assert "id32" not in str(caught.value)


def test_a_gpu_is_asked_for_its_losses_at_log_rows_and_before_saving(tmp_path: Path) -> None:
    """Asking at every step would make it wait. The step that is named is the first bad one all the same."""
    run = Run(history_of(tmp_path / "metrics.csv", log_every=4), total=9, device="cuda")
    run.step(1.0)
    run.step(math.nan, size=2)
    run.step(math.nan, size=3)
    with pytest.raises(InputError, match=r"at step 2 .* ids id0, id1\. "):
        run.step(1.0)
    run = Run(history_of(tmp_path / "metrics.csv", log_every=4), total=9, device="cuda")
    run.step(math.nan)
    with pytest.raises(InputError, match="at step 1 "):
        run.callbacks[0].state_dict()


def test_a_bad_loss_in_the_middle_of_a_window_is_of_that_step(tmp_path: Path) -> None:
    run = Run(history_of(tmp_path / "metrics.csv", log_every=1), total=9, accumulate=3)
    for loss in (1.0, 1.0, 1.0, 1.0, math.inf):
        run.step(loss)
    with pytest.raises(InputError, match="loss is inf at step 2 "):
        run.step(1.0)
    assert [row["step"] for row in read(tmp_path / "metrics.csv")] == ["1"]


def test_rows_of_a_run_that_accumulates(tmp_path: Path) -> None:
    """Lightning has divided each loss by the number of batches: their sum is the step's. A batch of weight 0 only
    keeps step with other processes; its example is not counted.
    """
    history = history_of(tmp_path / "metrics.csv", log_every=2)
    run = Run(history, total=4, accumulate=2)
    for loss in (0.5, 1.5, 1.0, 3.0, 2.0, 2.0):
        run.step(loss)
    run.step(8.0)
    run.step(0.0, size=1, weight=0.0)
    rows = read(tmp_path / "metrics.csv")
    assert [(row["step"], row["epoch"], row["train/loss"]) for row in rows] == [
        ("2", "0.5", "3.0"),
        ("4", "1.0", "6.0"),
    ]
    assert history.examples == 28


def test_speed_leaves_validation_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: clock.now)
    history = history_of(tmp_path / "metrics.csv", log_every=1)
    run = Run(history, total=4)
    original = history.on_train_batch_end

    def slow_step(*args: object) -> None:
        clock.now += 2.0
        original(*args)

    monkeypatch.setattr(history, "on_train_batch_end", slow_step)
    run.step(1.0, tokens=20)
    clock.now += 1000.0
    run.validate(accuracy=0.5, loss=1.0)
    run.step(1.0, tokens=60)
    assert history.train_seconds == 4.0
    assert history.examples_per_second == 2.0
    assert history.tokens_per_second == 20.0
    trained = [row for row in read(tmp_path / "metrics.csv") if row["train/loss"]]
    assert [float(row["examples_per_second"]) for row in trained] == [2, 2]
    assert [float(row["tokens_per_second"]) for row in trained] == [10, 30]  # each since the row before


def test_progress_without_a_terminal_is_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    history = history_of(tmp_path / "metrics.csv")
    progress = Progress(history)
    run = Run(history, 4, progress)
    with caplog.at_level(logging.INFO, "funneltfm"):
        progress.on_train_start(run.trainer, run.module)
        for accuracy in (0.25, 0.75):
            run.step(1.0)
            run.step(2.0)
            run.validate(accuracy=accuracy, loss=0.5)
        progress.teardown(run.trainer, run.module, "fit")
    assert len(caplog.messages) == 4  # no line twice
    assert caplog.messages[0].startswith("step 2/4  epoch 0.50  loss 1.5000  lr 5.00e-01  ")
    assert caplog.messages[0].endswith(" left")
    assert caplog.messages[1] == "step 2  epoch 0.50  valid/accuracy 0.2500  valid/loss 0.5000 (best so far)"
    assert caplog.messages[3] == "step 4  epoch 1.00  valid/accuracy 0.7500  valid/loss 0.5000 (best so far)"


def test_what_is_left_of_a_run_without_a_number_of_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    history = history_of(tmp_path / "metrics.csv", log_every=1)
    progress = Progress(history)
    run = Run(history, 4, progress)
    history.total = None
    with caplog.at_level(logging.INFO, "funneltfm"):
        progress.on_train_start(run.trainer, run.module)
        run.step(1.0)
        timer = Timer("00:00:02:00")
        timer.time_elapsed = lambda stage: 30.0  # type: ignore[assignment, misc, return-value]
        run.trainer.callbacks.append(timer)
        run.step(1.0)
    assert "step 1/?" in caplog.messages[0]
    assert "left" not in caplog.messages[0]
    assert caplog.messages[1].endswith("  01:30 left")  # of --max_time


def test_progress_on_a_terminal_is_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    """With the lines in the log file alone."""
    monkeypatch.setattr(logging.getLogger("funneltfm"), "handlers", [_TqdmHandler()])
    monkeypatch.setattr(callbacks.sys.stderr, "isatty", lambda: True, raising=False)
    history = history_of(tmp_path / "metrics.csv", log_every=1)
    progress = Progress(history)
    run = Run(history, 3, progress)
    progress.on_train_start(run.trainer, run.module)
    with caplog.at_level(logging.INFO, "funneltfm"), log_file(tmp_path / "log.txt", append=False):
        for _ in range(3):
            run.step(1.5, tokens=7)
        run.validate(accuracy=0.5)
    progress.teardown(run.trainer, run.module, "fit")
    progress.teardown(run.trainer, run.module, "fit")  # Lightning may call it again
    shown = capsys.readouterr().err
    assert "training: 100%" in shown
    assert "3/3" in shown
    assert "loss=1.5000" in shown
    assert "lr 5.00e-01" not in shown
    assert "valid/accuracy 0.5000" in shown
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert len(lines) == 4
    assert "step 1/3  epoch 0.25  loss 1.5000  lr 5.00e-01  " in lines[0]
    assert " tokens/s  " in lines[0]
