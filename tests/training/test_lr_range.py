"""The range test raises the rate step by step and finds where the loss turns."""

import itertools
import math
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from funneltfm.errors import InputError
from funneltfm.training.config import make_args
from funneltfm.training.lr_range import LRRange
from funneltfm.training.setup import Devices, make_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:DeprecationWarning"),
]


class Bowl(lightning.LightningModule):
    """loss = w^2 / 2: gradient descent at rate r multiplies w by 1 - r, so it turns at r = 1 and diverges beyond 2."""

    def __init__(self, schedule: bool = False) -> None:
        super().__init__()
        self.w, self.schedule = nn.Parameter(torch.tensor(1.0)), schedule
        self.rates: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.w.square() / 2

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.5)
        if not self.schedule:
            return optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def run(test: LRRange, n: int = 40, schedule: bool = False, **kwargs: Any) -> Bowl:
    bowl = Bowl(schedule)
    devices = Devices("cpu", -1, None, torch.float16)
    settings = {"max_epochs": 1, "enable_checkpointing": False} | kwargs
    make_trainer(make_args(device_id=-1), devices, callbacks=[test], **settings).fit(
        bowl, DataLoader([torch.zeros(1)] * n, batch_size=None)
    )
    return bowl


@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.parametrize("mode", ["exponential", "linear"])
def test_rates_go_from_the_lowest_to_the_highest(mode: Any, schedule: bool) -> None:
    test = LRRange(1e-4, 1e-1, 10, mode)
    bowl = run(test, schedule=schedule)
    assert bowl.rates == pytest.approx([lr for lr, _ in test.curve])
    assert (bowl.rates[0], bowl.rates[-1], len(bowl.rates)) == (pytest.approx(1e-4), pytest.approx(1e-1), 10)
    steps = [math.log(rate) if mode == "exponential" else rate for rate in bowl.rates]
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    assert gaps == pytest.approx([gaps[0]] * 9)
    assert bowl.trainer.global_step == 10  # of 40


def test_a_step_of_several_batches_is_one_point() -> None:
    test = LRRange(1e-4, 1e-1, 5)
    bowl = run(test, accumulate_grad_batches=4)
    assert len(test.curve) == len(bowl.rates) == 5


def test_it_turns_where_the_loss_is_lowest_and_stops_when_it_diverges() -> None:
    def loss(module: lightning.LightningModule) -> float:
        return float(module.w.detach().square() / 2 + 1)  # type: ignore[union-attr, operator]

    test = LRRange(0.1, 1000, 40, evaluate=loss)
    bowl = run(test)
    assert len(test.curve) < 40  # it was stopped
    w = 1.0
    for rate, value in test.curve:
        w *= 1 - rate
        assert value == pytest.approx(w * w / 2 + 1, rel=1e-3)
    assert test.curve[-1][1] > 4
    assert test.turn == min(test.curve, key=lambda point: point[1])[0]
    assert 0.5 < test.turn < 2.6
    assert bowl.trainer.should_stop


def test_the_training_loss_is_smoothed() -> None:
    test = LRRange(1e-3, 1e-2, 3)
    run(test)
    w, losses = 1.0, []
    for rate, _ in test.curve:
        losses.append(w * w / 2)
        w *= 1 - rate
    weights = [0.9**2, 0.9, 1.0]
    assert test.curve[0][1] == pytest.approx(losses[0])
    expected = sum(a * b for a, b in zip(weights, losses, strict=True)) / sum(weights)
    assert test.curve[2][1] == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_is_no_number_ends_it() -> None:
    test = LRRange(1e-3, 1e-2, 9, evaluate=lambda module: float("nan"))
    run(test)
    assert len(test.curve) == 1
    with pytest.raises(InputError, match="has no finite loss: lower min_lr"):
        _ = test.turn


def test_the_curve_as_csv(tmp_path: Path) -> None:
    test = LRRange(1e-3, 1e-2, 3)
    run(test)
    test.write(tmp_path / "curve.csv")
    rows = (tmp_path / "curve.csv").read_text().splitlines()
    assert rows[0] == "lr,loss"
    assert [tuple(map(float, row.split(","))) for row in rows[1:]] == test.curve


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_lr": 0.0}, "must go from min_lr, above 0, up to max_lr"),
        ({"min_lr": 1.0, "max_lr": 0.1}, "up to max_lr; got 1.0 and 0.1"),
        ({"steps": 1}, "at least 2 steps"),
        ({"mode": "cosine"}, "mode must be one of exponential, linear"),
    ],
)
def test_what_cannot_be_asked_for(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LRRange(**settings)


def test_more_steps_than_the_run_has() -> None:
    with pytest.raises(InputError, match="takes 50 steps, the run has 40"):
        run(LRRange(steps=50))
