"""The schedule's shape, which parameters decay, and what is taken from apex where there is one."""

import logging
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from funneltfm.errors import InputError
from funneltfm.funnel.config import ModelConfig
from funneltfm.funnel.model import FunnelTFM
from funneltfm.training import optim
from funneltfm.training.optim import (
    decay_groups,
    from_apex,
    make_adamw,
    make_one_cycle,
    make_schedule,
    warmup_decay,
)

TINY = {"vocab_size": 20, "d_model": 8, "n_head": 2, "d_head": 4, "d_inner": 16, "block_size": "1_1"}


def rates(total: int, warmup_prop: float, lr: float = 1.0, min_lr: float = 0.0) -> list[float]:
    """The learning rate of every optimizer step, as AdamW sees it."""
    optimizer = make_adamw(nn.Linear(1, 1), lr, 0.0)
    schedule = make_schedule(optimizer, total, warmup_prop, lr, min_lr)
    seen = []
    for _ in range(total):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_warm_up_then_linear_decay() -> None:
    seen = rates(100, 0.1, lr=2e-3, min_lr=2e-4)
    assert seen[0] == pytest.approx(2e-4)  # lr / W
    assert seen[9] == pytest.approx(2e-3)  # the peak, at the last step of the warm-up
    assert seen[-1] == pytest.approx(2e-4 + 1.8e-3 / 91)  # min_lr is where the next step would be
    rise, fall = torch.tensor(seen[:10]).diff(), torch.tensor(seen[9:]).diff()
    torch.testing.assert_close(rise, torch.full_like(rise, 2e-4))
    torch.testing.assert_close(fall, torch.full_like(fall, -1.8e-3 / 91))


def test_no_warm_up() -> None:
    seen = rates(10, 0.0)
    assert seen == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


def test_warm_up_alone() -> None:
    assert rates(4, 1.0) == pytest.approx([0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize("warmup_prop", [0.0, 0.1, 1.0])
def test_a_run_of_one_step_learns(warmup_prop: float) -> None:
    (rate,) = rates(1, warmup_prop)
    assert rate > 0


@given(st.integers(1, 300), st.floats(0, 1), st.floats(0, 1))
def test_never_below_min_lr_after_warm_up_never_above_lr(total: int, warmup_prop: float, min_ratio: float) -> None:
    warmup = round(warmup_prop * total)
    seen = [warmup_decay(step, total, warmup, min_ratio) for step in range(total + 5)]
    assert all(0 <= rate <= 1 for rate in seen)
    assert all(rate >= min_ratio - 1e-12 for rate in seen[warmup:])
    assert seen[warmup:] == sorted(seen[warmup:], reverse=True)
    if warmup:
        assert max(seen) == seen[warmup - 1] == 1.0
    assert seen[total:] == pytest.approx([min_ratio] * 5)
    assert seen[total - 1] > 0  # the last step still learns


def named_groups(model: nn.Module) -> tuple[set[str], set[str]]:
    decayed, free = decay_groups(model, 0.01)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.01, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    one, other = ({names[id(parameter)] for parameter in group["params"]} for group in (decayed, free))
    assert not one & other
    return one, other


@pytest.mark.parametrize("d_embed", [8, 4])
def test_every_parameter_is_in_one_group(d_embed: int) -> None:
    decayed, free = named_groups(FunnelTFM(ModelConfig(**TINY, d_embed=d_embed)))
    assert all(name.endswith(("bias", "layer_norm.weight")) or name == "input_layer.1.weight" for name in free)
    assert not any(name.endswith("bias") or "norm" in name or name == "input_layer.1.weight" for name in decayed)
    for kind in ("r_w_bias", "r_r_bias", "r_s_bias", "k_head.bias", "layer_norm.weight", "layer_norm.bias"):
        assert any(name.endswith(kind) for name in free), kind
    for kind in ("lookup_table", "q_head.weight", "r_kernel", "seg_embed", "pffn.0.weight", "cls_head.3.weight"):
        assert any(name.endswith(kind) for name in decayed), kind
    assert ("input_projection.weight" in decayed) == (d_embed != 8)


def test_norms_of_torch_do_not_decay_either() -> None:
    decayed, free = named_groups(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    assert decayed == {"0.weight"}
    assert free == {"0.bias", "1.weight", "1.bias"}


def test_the_settings_of_the_original() -> None:
    optimizer = make_adamw(nn.Linear(2, 2), 1e-3, 0.01)
    for group in optimizer.param_groups:
        assert group["betas"] == (0.9, 0.99)
        assert group["eps"] == 1e-6


def test_everything_trains_and_only_matrices_decay() -> None:
    """A step with gradients moves every parameter; a step with none moves the matrices alone, by lr * decay."""
    torch.manual_seed(0)
    model = FunnelTFM(ModelConfig(**TINY, d_embed=8))
    for parameter in model.parameters():  # zeros would hide decay
        nn.init.normal_(parameter)
    _, free = named_groups(model)

    def moved(gradient: float) -> dict[str, torch.Tensor]:
        optimizer = make_adamw(model, lr=0.1, weight_decay=0.5)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
        return {name: (parameter.detach() / before[name]) for name, parameter in model.named_parameters()}

    for name, ratio in moved(0.0).items():
        expected = 1.0 if name in free else 1 - 0.1 * 0.5
        torch.testing.assert_close(ratio, torch.full_like(ratio, expected), msg=name)
    assert all((ratio != 1).all() for ratio in moved(1.0).values())


# ---- apex


class FusedAdam:
    """What is called like apex's, and remembers what it was given."""

    def __init__(self, groups: list[dict], **settings: Any) -> None:
        self.groups, self.settings = groups, settings


class DistributedDataParallel:
    pass


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An apex with the optimizer, and with a `parallel` that has lost its DistributedDataParallel, as today's has."""
    package, optimizers, parallel = (ModuleType(name) for name in ("apex", "apex.optimizers", "apex.parallel"))
    optimizers.FusedAdam = FusedAdam  # type: ignore[attr-defined]
    package.__path__ = []
    for module in (package, optimizers, parallel):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return parallel


@pytest.fixture(autouse=True)
def nothing_said() -> None:
    """What was said once is said again in the next test."""
    optim._say_once.cache_clear()


@pytest.fixture
def no_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "apex", None)  # as if not installed


def test_what_an_apex_offers_is_used(apex: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "funneltfm"):
        optimizer: Any = make_adamw(nn.Linear(2, 2), 1e-3, 0.01, apex=True)
        apex.DistributedDataParallel = DistributedDataParallel  # type: ignore[attr-defined]
        assert from_apex("parallel.DistributedDataParallel", "torch's own DDP") is DistributedDataParallel
    assert caplog.messages == []
    assert isinstance(optimizer, FusedAdam)
    assert optimizer.settings == {"adam_w_mode": True, "lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-6}
    assert [group["weight_decay"] for group in optimizer.groups] == [0.01, 0.0]


@pytest.mark.usefixtures("apex")
def test_what_an_apex_has_removed_is_said_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "funneltfm"):
        for _ in range(2):
            assert from_apex("parallel.DistributedDataParallel", "torch's own DDP") is None
    assert caplog.messages == [
        "apex.parallel.DistributedDataParallel is not installed, or not in the apex that is; torch's own DDP runs "
        "instead."
    ]


@pytest.mark.usefixtures("no_apex")
def test_without_apex_torch_runs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "funneltfm"):
        optimizer = make_adamw(nn.Linear(2, 2), 1e-3, 0.01, apex=True)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert caplog.messages == [
        "apex.optimizers.FusedAdam is not installed, or not in the apex that is; torch.optim.AdamW(fused=True) runs "
        "instead."
    ]


@pytest.mark.usefixtures("apex")
def test_apex_is_not_used_unasked() -> None:
    assert isinstance(make_adamw(nn.Linear(2, 2), 1e-3, 0.01), torch.optim.AdamW)


# ---- one cycle


def one_cycle(total: int = 50, **settings: Any) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=123.0)
    return optimizer, make_one_cycle(optimizer, total, **{"max_lr": 1e-3} | settings)


def cycle(optimizer: torch.optim.Optimizer, schedule: Any, n: int) -> list[tuple[float, float]]:
    """The learning rate and beta1 of the next n steps."""
    found = []
    for _ in range(n):
        group = optimizer.param_groups[0]
        found.append((group["lr"], group["betas"][0]))
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("anneal", ["linear", "cos"])
def test_one_cycle_rises_falls_and_ends_low(anneal: Any) -> None:
    rates, betas = zip(*cycle(*one_cycle(50, pct_start=0.3, anneal=anneal), 50), strict=True)
    assert rates[0] == pytest.approx(1e-3 / 25)
    assert max(range(50), key=lambda i: rates[i]) == 14  # the 15th of 50 steps
    assert rates[14] == pytest.approx(1e-3)
    assert rates[49] == pytest.approx(1e-3 / 25 / 1e4)
    assert (betas[0], betas[14], betas[49]) == (0.95, pytest.approx(0.85), pytest.approx(0.95))
    # Momentum mirrors the rate: where one is a share of the way up, the other is that share of the way down.
    for rate, beta in list(zip(rates, betas, strict=True))[:15]:
        assert (rate - rates[0]) / (rates[14] - rates[0]) == pytest.approx((0.95 - beta) / 0.1, abs=1e-9)


def test_one_cycle_goes_on_where_it_was() -> None:
    whole = cycle(*one_cycle(), 50)
    optimizer, schedule = one_cycle()
    first = cycle(optimizer, schedule, 20)
    states = optimizer.state_dict(), schedule.state_dict()
    optimizer, schedule = one_cycle()
    optimizer.load_state_dict(states[0])
    schedule.load_state_dict(states[1])
    assert first + cycle(optimizer, schedule, 30) == whole


@pytest.mark.parametrize("settings", [{"max_lr": 0.0}, {"pct_start": 0.0}, {"pct_start": 1.0}, {"betas": (0.95, 0.85)}])
def test_one_cycle_that_is_none(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="one cycle needs max_lr above 0"):
        one_cycle(**settings)
