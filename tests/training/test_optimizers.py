"""Each schedule against its formula, each optimizer against its update in float64, rates by layer, exact resume."""

import gc
import io
import math
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from torch import Tensor, nn

from funneltfm.errors import InputError
from funneltfm.funnel.config import ModelConfig
from funneltfm.funnel.hf import FunnelTFMConfig, FunnelTFMForMaskedLM, FunnelTFMForSequenceClassification
from funneltfm.funnel.model import FunnelTFM
from funneltfm.training.config import Args, typed_args
from funneltfm.training.optim import warmup_decay
from funneltfm.training.optimizer_flags import READS, OptimizerFlags, SchedulerFlags
from funneltfm.training.optimizers import CURVES, MAKERS, layer_depths, make_optimizer, make_scheduler


def make(**flags: Any) -> Args:
    return typed_args((("", OptimizerFlags, ()), ("", SchedulerFlags, ())), "train", flags)


# ---- schedules


def rates(args: Args, total: int | None, steps: int | None = None, **lengths: Any) -> list[float]:
    """The learning rate at every step of the run and at the one after its last, as a share of the highest."""
    optimizer = make_optimizer(nn.Linear(1, 1), args)
    scheduler = make_scheduler(optimizer, args, total, **lengths)
    seen = []
    for _ in range((total or 0) + 1 if steps is None else steps):
        seen.append(optimizer.param_groups[0]["lr"] / args.learning_rate)
        optimizer.step()
        scheduler.step()
    return seen


# Name: (flags, what is left of the fall when the share x of it is behind; t is the step, counted from 1, of T).
FORMULAS: dict[str, tuple[dict[str, Any], Callable[..., float]]] = {
    "constant": ({}, lambda x, t, T, k: 1.0),
    "linear_decay": ({}, lambda x, t, T, k: 1 - x),
    "polynomial_decay": ({"decay_power": 2.0}, lambda x, t, T, k: 1 - 2 * x + x * x),
    "polynomial_decay_layerwise": ({"decay_power": 0.5}, lambda x, t, T, k: math.sqrt(1 - x)),
    "cosine": ({}, lambda x, t, T, k: math.cos(math.pi * x / 2) ** 2),
    "sqrt_decay": ({}, lambda x, t, T, k: (t**-0.5 - T**-0.5) / (k**-0.5 - T**-0.5)),
    "normal_decay": ({}, lambda x, t, T, k: (norm.pdf(3 * x) - norm.pdf(3)) / (norm.pdf(0) - norm.pdf(3))),
}


@pytest.mark.parametrize("end", [0.0, 0.25])
@pytest.mark.parametrize("warmup", [0, 1, 10, 99])
@pytest.mark.parametrize("name", FORMULAS)
def test_the_curve_is_the_formula(name: str, warmup: int, end: float) -> None:
    flags, formula = FORMULAS[name]
    if name == "constant":
        end = 0.0
    else:
        flags = flags | {"end_learning_rate": end * 2e-3}
    constant = {"num_constant_steps": 1} if name == "sqrt_decay" and not warmup else {}
    args = make(scheduler=name, learning_rate=2e-3, num_warmup_steps=warmup, **flags, **constant)
    if name == "polynomial_decay_layerwise":
        args.layerwise_lr_decay = 0.5
        model = nn.Sequential(nn.ModuleList([nn.Linear(1, 1)]), nn.Linear(1, 1))
        optimizer = make_optimizer(model, args)
        scheduler = make_scheduler(optimizer, args, 100)
        both = []
        for _ in range(101):
            both.append([group["lr"] / 2e-3 for group in optimizer.param_groups])
            optimizer.step()
            scheduler.step()
        seen, lower = [head for head, *_ in both], [layer for *_, layer in both]
        assert lower == pytest.approx([0.5 * share for share in seen])
    else:
        seen = rates(args, 100)
    assert seen[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    peak = max(0, warmup - 1)
    assert seen[peak] == pytest.approx(1.0)
    for step in {peak, warmup, warmup + 1, 25, 50, 75, 99, 100} - set(range(peak)):
        fall = formula((step - peak) / (100 - peak), step + 1, 101, peak + 1)
        assert seen[step] == pytest.approx(end + (1 - end) * fall), step
    assert seen[100] == pytest.approx(end if name != "constant" else 1.0, abs=1e-15)


@pytest.mark.parametrize(
    ("name", "flags", "shares"),
    [
        ("linear_decay", {}, (1, 0.75, 0.5, 0.25, 0.01, 0)),
        ("polynomial_decay", {"decay_power": 2.0}, (1, 0.5625, 0.25, 0.0625, 0.0001, 0)),
        ("cosine", {}, (1, 0.85355, 0.5, 0.14645, 0.000247, 0)),
        ("cosine", {"num_cycles": 2}, (1, 0.5, 1, 0.5, 0.000987, 0)),
        ("sqrt_decay", {"num_constant_steps": 25}, (1, 0.96135, 0.40324, 0.15129, 0.00494, 0)),
        ("normal_decay", {}, (1, 0.75209, 0.31707, 0.06922, 0.00105, 0)),
        ("constant", {}, (1, 1, 1, 1, 1, 1)),
    ],
)
def test_the_curve_in_numbers(name: str, flags: dict[str, Any], shares: tuple[float, ...]) -> None:
    seen = rates(make(scheduler=name, **flags), 100)
    assert [seen[step] for step in (0, 25, 50, 75, 99, 100)] == pytest.approx(shares, abs=1e-5)


@given(st.sampled_from(sorted(CURVES)), st.integers(1, 200), st.floats(0, 1), st.floats(0, 0.99), st.floats(0.1, 4))
def test_every_run_rises_to_the_rate_and_falls_to_the_end(
    name: str, total: int, share: float, end: float, power: float
) -> None:
    warmup = max(int(name == "sqrt_decay"), round(share * total))
    flags = make(scheduler=name, learning_rate=1.0, num_warmup_steps=warmup, layerwise_lr_decay=0.5).flags()
    args = Args(**flags | {"end_learning_rate": 0.0 if name == "constant" else end, "decay_power": power})
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    (share_of,) = make_scheduler(optimizer, args, total).lr_lambdas
    seen = [share_of(step) for step in range(total + 3)]
    assert max(seen) == pytest.approx(1.0)
    assert seen[:warmup] == sorted(seen[:warmup])
    assert seen[warmup:] == sorted(seen[warmup:], reverse=True)
    assert all(rate > args.end_learning_rate for rate in seen[warmup:total])  # the last step still learns
    if name != "constant":
        assert seen[total:] == [args.end_learning_rate] * 3


def test_the_linear_schedule_is_that_of_classify() -> None:
    seen = rates(make(num_warmup_steps=7, learning_rate=1.0, end_learning_rate=0.125), 40)
    assert seen == [warmup_decay(step, 40, 7, 0.125) for step in range(41)]


@pytest.mark.parametrize(("cycles", "warmup"), [(3, 0), (3, 10), (7, 11)])
def test_a_cosine_of_several_cycles_starts_again_at_the_top(cycles: int, warmup: int) -> None:
    seen = rates(make(scheduler="cosine", num_cycles=cycles, num_warmup_steps=warmup), 100)
    peak = max(0, warmup - 1)
    for step in range(peak, 100):
        behind = cycles * (step - peak) % (100 - peak) / (100 - peak)
        assert seen[step] == pytest.approx((1 + math.cos(math.pi * behind)) / 2, abs=1e-12), step
    assert seen[100] == 0.0


def test_steps_at_the_top_before_the_fall_with_the_root() -> None:
    seen = rates(make(scheduler="sqrt_decay", num_warmup_steps=10, num_constant_steps=20), 100)
    assert seen[9:30] == pytest.approx([1.0] * 21)
    whole = rates(make(scheduler="sqrt_decay", num_warmup_steps=30), 100)
    assert seen[29:] == pytest.approx(whole[29:])


@pytest.mark.parametrize("optimizer", ["adamw", "tf_adamw", "adafactor"])
def test_one_cycle_by_layer(optimizer: str) -> None:
    """Every group has its own peak; beta1 is lowest there, where the optimizer has one."""
    model = nn.Sequential(nn.ModuleList([nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)]))
    shape = {"one_cycle_pct_start": 0.4, "one_cycle_div_factor": 10.0, "one_cycle_final_div_factor": 100.0}
    args = make(scheduler="one_cycle", optimizer=optimizer, learning_rate=0.5, layerwise_lr_decay=0.5, **shape)
    adam = make_optimizer(model, args)
    scheduler = make_scheduler(adam, args, 10)
    seen, betas = [], []
    for _ in range(10):
        seen.append([group["lr"] for group in adam.param_groups])
        betas.append(adam.param_groups[0].get("betas", (None,))[0])
        adam.step()
        scheduler.step()
    assert len(seen[0]) == 2
    for group, peak in zip(zip(*seen, strict=True), (0.25, 0.125), strict=True):
        assert group[3] == max(group) == pytest.approx(peak)
        assert (group[0], group[-1]) == pytest.approx((peak / 10, peak / 1000))
    assert optimizer == "adafactor" or (betas[0], betas[3], betas[9]) == pytest.approx((0.95, 0.85, 0.95))
    with pytest.raises(InputError, match="needs to know how long the run is"):
        make_scheduler(adam, args, None)


@pytest.mark.parametrize("flags", [{"scheduler_frequency": 10}, {"scheduler_interval": "epoch"}])
def test_falls_now_and_then_over_the_same_run(flags: dict[str, Any]) -> None:
    """The older framework stepped its schedule less often and so never came to the end of it."""
    every_step = rates(make(num_warmup_steps=15), 100)
    seen = rates(make(num_warmup_steps=15, **flags), 100, steps_per_epoch=10)
    assert seen[:15] == every_step[:15]
    assert seen[15:20] == [every_step[15]] * 5
    for start in range(20, 100, 10):
        assert seen[start : start + 10] == [every_step[start]] * 10
    assert seen[100] == 0.0


def test_every_second_epoch() -> None:
    args = make(scheduler_interval="epoch", scheduler_frequency=2)
    assert rates(args, 12, steps_per_epoch=3) == pytest.approx([1.0] * 6 + [0.5] * 6 + [0.0])


def test_a_warm_up_as_a_share_of_the_run() -> None:
    assert rates(make(num_warmup_steps=0.1), 50) == rates(make(num_warmup_steps=5), 50)
    assert rates(make(num_warmup_steps=1.0), 4)[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates(make(num_warmup_steps=1), 4)[0] == 1.0


def test_a_warm_up_longer_than_the_run_is_an_error() -> None:
    rates(make(num_warmup_steps=10), 10)
    with pytest.raises(InputError, match="--num_warmup_steps 11 are more than the 10 steps of the run"):
        rates(make(num_warmup_steps=11), 10)
    with pytest.raises(InputError, match="--num_warmup_steps 5 and --num_constant_steps 6 are more than the 10 steps"):
        rates(make(scheduler="sqrt_decay", num_warmup_steps=5, num_constant_steps=6), 10)


def test_a_run_of_unknown_length() -> None:
    args = make(scheduler="constant", num_warmup_steps=4)
    assert rates(args, None, steps=7) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1])
    for flags in ({}, {"scheduler": "constant", "num_warmup_steps": 0.5}):
        with pytest.raises(InputError, match="give --max_steps"):
            rates(make(**flags), None)
    with pytest.raises(InputError, match="how many steps an epoch has"):
        rates(make(scheduler_interval="epoch"), 10)


# ---- optimizers


class Tiny(nn.Module):
    """A table, a matrix, a bias and a norm, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 5)
        self.dense = nn.Linear(5, 3)
        self.norm = nn.LayerNorm(3)
        self.double()
        for parameter in self.parameters():
            nn.init.normal_(parameter)


def gradients(model: nn.Module, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64) * 10.0 ** (step % 3 - 1)
        for name, p in model.named_parameters()
    }


def take_steps(model: nn.Module, args: Args, first: int, last: int, saved: bytes | None = None) -> bytes:
    """Steps first..last-1 of a run of 6; returns what a checkpoint would hold."""
    optimizer = make_optimizer(model, args)
    scheduler = make_scheduler(optimizer, args, 6)
    if saved is not None:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
    for step in range(first, last):
        for name, grad in gradients(model, step).items():
            model.get_parameter(name).grad = grad.to(model.get_parameter(name).dtype)
        optimizer.step()
        scheduler.step()
    file = io.BytesIO()
    states = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    torch.save({name: part.state_dict() for name, part in states.items()}, file)
    return file.getvalue()


def adam_reference(correct: bool, eps: float) -> Callable[..., Tensor]:
    def run(p: Tensor, grads: list[Tensor], lrs: list[float], decay: float, amsgrad: bool) -> Tensor:
        m = v = top = torch.zeros_like(p)
        for t, (g, lr) in enumerate(zip(grads, lrs, strict=True), start=1):
            m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
            top = torch.maximum(top, v) if amsgrad else v
            c1, c2 = (1 - 0.8**t, 1 - 0.95**t) if correct else (1.0, 1.0)
            p = p - lr * ((m / c1) / ((top / c2).sqrt() + eps) + decay * p)
        return p

    return run


def adafactor_reference(
    p: Tensor, grads: list[Tensor], lrs: list[float], decay: float, beta1: float | None, scale: bool
) -> Tensor:
    """Algorithms 4 and 5 of Shazeer and Stern, 2018, with sums as in the paper."""
    rows, columns, v, m = (torch.zeros(()).double() for _ in range(4))
    for t, (g, lr) in enumerate(zip(grads, lrs, strict=True), start=1):
        beta2, square = 1 - t**-0.7, g * g + 1e-20
        rows = beta2 * rows + (1 - beta2) * square.sum(-1, keepdim=True)
        if p.dim() == 2:
            columns = beta2 * columns + (1 - beta2) * square.sum(0, keepdim=True)
            v = rows * columns / rows.sum()
        else:
            v = beta2 * v + (1 - beta2) * square
        update = g / v.sqrt()
        update = update / max(1.0, update.square().mean().sqrt().item() / 0.5)
        alpha = lr * max(1e-3, p.square().mean().sqrt().item()) if scale else lr
        m = update * alpha if beta1 is None else beta1 * m + (1 - beta1) * update * alpha
        p = p - alpha * decay * p - m
    return p


BETAS = (0.8, 0.95)
ADAFACTOR = {"adafactor_epsilon": (1e-20, 1e-3), "adafactor_decay_rate": -0.7, "adafactor_clip_threshold": 0.5}
ONE_OF_EACH: dict[str, tuple[dict[str, Any], Callable[..., Tensor], dict[str, Any]]] = {
    "adamw": ({"adamw_betas": BETAS}, adam_reference(True, 1e-8), {"amsgrad": False}),
    "adamw amsgrad": (
        {"adamw_betas": BETAS, "adamw_epsilon": 1e-2, "adamw_amsgrad": True},
        adam_reference(True, 1e-2),
        {"amsgrad": True},
    ),
    "fuse_adam": ({"fuse_adam_betas": BETAS}, adam_reference(True, 1e-8), {"amsgrad": False}),
    "fuse_adam amsgrad": (
        {"fuse_adam_betas": BETAS, "fuse_adam_epsilon": 1e-2, "fuse_adam_amsgrad": True},
        adam_reference(True, 1e-2),
        {"amsgrad": True},
    ),
    "tf_adamw": ({"tfadamw_betas": BETAS}, adam_reference(False, 1e-6), {"amsgrad": False}),
    "tf_adamw amsgrad": (
        {"tfadamw_betas": BETAS, "tfadamw_epsilon": 1e-2, "tfadamw_amsgrad": True},
        adam_reference(False, 1e-2),
        {"amsgrad": True},
    ),
    "adafactor": (ADAFACTOR, adafactor_reference, {"beta1": None, "scale": False}),
    "adafactor moment": (ADAFACTOR | {"adafactor_beta1": 0.9}, adafactor_reference, {"beta1": 0.9, "scale": False}),
    "adafactor scale": (
        ADAFACTOR | {"adafactor_scale_parameter": True},
        adafactor_reference,
        {"beta1": None, "scale": True},
    ),
}


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_update_is_the_formula(name: str) -> None:
    flags, reference, settings = ONE_OF_EACH[name]
    args = make(optimizer=name.split()[0], learning_rate=0.1, weight_decay=0.3, **flags)
    torch.manual_seed(0)
    model = Tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    take_steps(model, args, 0, 5)
    lrs = [0.1 * (6 - step) / 6 for step in range(5)]
    for parameter, p in model.named_parameters():
        grads = [gradients(model, step)[parameter] for step in range(5)]
        decay = 0.3 if parameter in ("table.weight", "dense.weight") else 0.0
        expected = reference(before[parameter], grads, lrs, decay, **settings)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("scheduler", [None, "cosine", "polynomial_decay_layerwise", "one_cycle"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_resumed_run_is_equal_bit_by_bit(name: str, scheduler: str | None) -> None:
    schedule: dict[str, Any] = {"scheduler": scheduler, "layerwise_lr_decay": 0.9} if scheduler else {}
    if scheduler != "one_cycle":
        schedule["num_warmup_steps"] = 2
    args = make(optimizer=name.split()[0], weight_decay=0.1, **ONE_OF_EACH[name][0], **schedule)

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Tiny(), nn.ModuleList([Tiny(), Tiny()])).float()

    whole = torch.load(io.BytesIO(take_steps(model(), args, 0, 6)), weights_only=True)
    half = take_steps(model(), args, 0, 3)
    assert half != take_steps(model(), args, 0, 2)
    torch.manual_seed(1)
    fresh = nn.Sequential(Tiny(), nn.ModuleList([Tiny(), Tiny()])).float()
    resumed = torch.load(io.BytesIO(take_steps(fresh, args, 3, 6, half)), weights_only=True)
    for state in (whole, resumed):
        for name in ("_anneal_func_type", "_schedule_phases"):  # words
            state["scheduler"].pop(name, None)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


def test_tf_adamw_runs_a_closure_and_skips_what_has_no_gradient() -> None:
    model = nn.Linear(2, 1)
    before = model.bias.item()
    optimizer = make_optimizer(model, make(optimizer="tf_adamw"))

    def closure() -> Tensor:
        loss = model.weight.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    model.weight.grad = None
    assert optimizer.step(closure) < first
    assert model.bias.item() == before


def test_fuse_adam_is_the_kernel_of_torch() -> None:
    (group, _) = make_optimizer(nn.Linear(2, 2), make(optimizer="fuse_adam")).param_groups
    assert group["fused"]
    assert not make_optimizer(nn.Linear(2, 2), make()).param_groups[0]["fused"]


def test_adafactor_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.optimization", None)
    with pytest.raises(InputError, match=re.escape("pip install 'funneltfm[hf]'")):
        make_optimizer(nn.Linear(2, 2), make(optimizer="adafactor"))


@pytest.mark.parametrize("name", ["adam8bit", "adamw8bit"])
def test_8_bit_without_bitsandbytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        InputError, match=re.escape(f"--optimizer {name} needs `bitsandbytes`: pip install 'funneltfm[bnb]'")
    ):
        make_optimizer(nn.Linear(2, 2), make(optimizer=name))


class Large(nn.Module):
    """Large enough for 8 bits, which start at 4096 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 64)
        self.dense = nn.Linear(64, 64)


@pytest.mark.parametrize("name", ["adam8bit", "adamw8bit"])
def test_8_bit_moments(name: str) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra bnb is not installed")
    args = make(optimizer=name, weight_decay=0.5, learning_rate=1e-2, adamw_betas=BETAS)
    torch.manual_seed(0)
    model, exact = Large(), Large()
    exact.load_state_dict(model.state_dict())
    saved = take_steps(model, args, 0, 3)
    state = torch.load(io.BytesIO(saved), weights_only=True)["optimizer"]["state"]
    bits = sorted(tensor.dtype.itemsize * 8 for p in state.values() for tensor in find(p, "state1"))
    assert bits == [8, 32, 32]  # the matrix; the table and the bias
    take_steps(exact, make(weight_decay=0.5, learning_rate=1e-2, adamw_betas=BETAS), 0, 3)
    torch.testing.assert_close(model.table.weight, exact.table.weight)
    torch.testing.assert_close(model.dense.weight, exact.dense.weight, atol=5e-3, rtol=0)
    assert not torch.equal(model.dense.weight, exact.dense.weight)

    torch.manual_seed(0)
    whole, resumed = Large(), Large()
    take_steps(whole, args, 0, 6)
    take_steps(resumed, args, 3, 6, saved)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_8_bit_forgets_tables_that_are_gone() -> None:
    """bitsandbytes knows parameters by their id, and the next model's may have the same."""
    optim = pytest.importorskip("bitsandbytes.optim", reason="the extra bnb is not installed")
    known = optim.GlobalOptimManager.get_instance().pid2config
    before = set(known)
    model = Large()
    optimizer = make_optimizer(model, make(optimizer="adamw8bit"))
    assert set(known) - before == {id(model.table.weight)}
    del model, optimizer
    gc.collect()
    assert set(known) <= before


def find(state: dict[str, Any], name: str) -> list[Tensor]:
    """`name` in a parameter's state, or one level deeper, where bitsandbytes hides it from FSDP."""
    return [part[name] for part in (state, *(v for v in state.values() if isinstance(v, dict))) if name in part]


# ---- which parameters decay


@pytest.mark.parametrize("name", [name for name in MAKERS if not name.endswith("8bit")])
def test_biases_and_norms_train_under_weight_decay_but_do_not_decay(name: str) -> None:
    """In the older framework, with weight decay, they did not train at all: their group was empty."""
    model = Tiny()
    for gradient, moving in ((1.0, {*dict(model.named_parameters())}), (0.0, {"table.weight", "dense.weight"})):
        optimizer = make_optimizer(model, make(optimizer=name, weight_decay=0.5, learning_rate=0.1))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.full_like(p, gradient)
        optimizer.step()
        assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == moving


SIZES = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
FUNNEL = {"vocab_size": 30, "d_model": 8, "d_embed": 4, "n_head": 2, "d_head": 4, "d_inner": 16, "block_size": "1_2"}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
DEBERTA = {
    **SIZES,
    "relative_attention": True,
    "position_buckets": 4,
    "pos_att_type": ["c2p", "p2c"],
    "norm_rel_ebd": "layer_norm",
    "conv_kernel_size": 3,
}
T5 = {"vocab_size": 30, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
XLM = {"vocab_size": 30, "emb_dim": 8, "n_layers": 3, "n_heads": 2}
HF_FUNNEL = {"vocab_size": 30, "d_model": 8, "n_head": 2, "d_head": 4, "d_inner": 16}
HF_FUNNEL |= {"block_sizes": [1, 2], "num_decoder_layers": 1}
MOBILE = SIZES | {"embedding_size": 8, "true_hidden_size": 8, "intra_bottleneck_size": 8}


def auto(task: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, f"AutoModelFor{task}").from_config(
        getattr(transformers, f"{config}Config")(**settings)
    )


def funnel() -> nn.Module:
    return FunnelTFMForSequenceClassification(FunnelTFMConfig(**FUNNEL))


# Name: (model, patterns of the names of its norms' parameters that are no bias).
NORMS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "bert": (auto("SequenceClassification", "Bert", **SIZES), r"LayerNorm\.weight"),
    "t5": (auto("Seq2SeqLM", "T5", **T5), r"layer_norm\.weight"),
    "llama": (auto("SequenceClassification", "Llama", **SIZES), r"norm\.weight"),
    "modernbert": (auto("SequenceClassification", "ModernBert", **SIZES, **SPECIAL), r"norm\.weight"),
    "mobilebert": (auto("SequenceClassification", "MobileBert", **MOBILE), r"LayerNorm\.weight"),
    "hf funnel": (auto("TokenClassification", "Funnel", **HF_FUNNEL), r"layer_norm\.weight"),
    "funnel_tfm": (funnel, r"layer_norm\.weight|input_layer\.1\.weight"),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_of_every_kind_are_free_of_decay(name: str) -> None:
    build, norms = NORMS[name]
    model = build()
    decayed, free = make_optimizer(model, make(weight_decay=0.1)).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    assert {names[id(p)] for p in decayed["params"] + free["params"]} == set(names.values())
    expected = {name for name in names.values() if re.search(rf"(bias|{norms})$", name)}
    assert {names[id(p)] for p in free["params"]} == expected
    assert any(re.search(rf"({norms})$", name) for name in expected)


def test_a_norm_by_another_name() -> None:
    class Rescale(nn.RMSNorm):
        pass

    (group,) = make_optimizer(Rescale(3), make(weight_decay=0.1)).param_groups
    assert group["weight_decay"] == 0.0


def test_frozen_parameters_are_left_out() -> None:
    model = Tiny()
    model.table.requires_grad_(False)
    model.norm.bias.requires_grad_(False)
    groups = make_optimizer(model, make()).param_groups
    assert [[id(p) for p in group["params"]] for group in groups] == [
        [id(model.dense.weight)],
        [id(model.dense.bias), id(model.norm.weight)],
    ]
    model.requires_grad_(False)
    with pytest.raises(InputError, match="no parameter to train"):
        make_optimizer(model, make())


def test_a_group_that_would_be_empty_is_none() -> None:
    assert len(make_optimizer(nn.Linear(2, 2, bias=False), make()).param_groups) == 1


def test_a_tied_table_is_there_once() -> None:
    model = auto("MaskedLM", "Bert", **SIZES)()
    table = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is table
    optimizer = make_optimizer(model, make(layerwise_lr_decay=0.5))
    places = [group["lr"] for group in optimizer.param_groups for p in group["params"] if p is table]
    assert places == [1e-4 * 0.5**4]


# ---- learning rates by layer

# Name: (model, layers, patterns of names -> depth, the first that fits; what none fits is the head).
LAYERS: dict[str, tuple[Callable[[], nn.Module], list[tuple[str, int]]]] = {
    "bert": (
        auto("SequenceClassification", "Bert", **SIZES),
        [(r"layer\.0", 3), (r"layer\.1", 2), (r"layer\.2", 1), (r"embeddings", 4)],
    ),
    "bert alone": (
        lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),
        [(r"layer\.0", 3), (r"layer\.1", 2), (r"layer\.2", 1), (r"embeddings", 4)],
    ),
    "modernbert": (
        auto("SequenceClassification", "ModernBert", **SIZES, **SPECIAL),
        [(r"layers\.0", 3), (r"layers\.1", 2), (r"layers\.2", 1), (r"embeddings", 4)],
    ),
    "deberta_v2": (
        auto("SequenceClassification", "DebertaV2", **DEBERTA),
        [(r"layer\.0", 3), (r"layer\.1", 2), (r"layer\.2", 1), (r"embeddings|encoder\.(LayerNorm|conv)", 4)],
    ),
    "albert": (
        auto("SequenceClassification", "Albert", **SIZES, embedding_size=4),
        [(r"albert_layer_groups", 1), (r"embedding", 2)],
    ),
    "distilbert": (
        auto("SequenceClassification", "DistilBert", vocab_size=30, dim=8, n_layers=3, n_heads=2, hidden_dim=16),
        [(r"layer\.0", 3), (r"layer\.1", 2), (r"layer\.2", 1), (r"embeddings", 4)],
    ),
    "electra": (
        auto("SequenceClassification", "Electra", **SIZES, embedding_size=4),
        [(r"layer\.0", 3), (r"layer\.1", 2), (r"layer\.2", 1), (r"embeddings", 4)],
    ),
    "funnel_tfm": (
        funnel,
        [(r"layers\.0", 3), (r"layers\.1", 2), (r"layers\.2", 1), (r"input_(layer|projection)", 4)],
    ),
    "funnel_tfm with decoder": (
        lambda: FunnelTFMForMaskedLM(FunnelTFMConfig(**FUNNEL, decoder_size="1")),
        [(r"layers\.0", 4), (r"layers\.1", 3), (r"layers\.2", 2), (r"layers\.3", 1), (r"input_", 5)],
    ),
    "funnel_tfm of torch alone": (
        lambda: FunnelTFM(ModelConfig(**FUNNEL)),
        [(r"layers\.0", 3), (r"layers\.1", 2), (r"layers\.2", 1), (r"input_", 4)],
    ),
    "hf funnel": (
        auto("TokenClassification", "Funnel", **HF_FUNNEL),
        [(r"blocks\.0\.0", 4), (r"blocks\.1\.0", 3), (r"blocks\.1\.1", 2), (r"decoder", 1), (r"embeddings", 5)],
    ),
    "mpnet": (
        lambda: transformers.MPNetModel(transformers.MPNetConfig(**SIZES)),
        [(r"layer\.0", 3), (r"layer\.1", 2), (r"layer\.2", 1), (r"embeddings|relative_attention_bias", 4)],
    ),
    "xlm": (
        auto("SequenceClassification", "XLM", **XLM),
        [
            *((rf"(attentions|ffns|layer_norm\d)\.{layer}\.", 3 - layer) for layer in range(3)),
            (r"embeddings|layer_norm_emb", 4),
        ],
    ),
    "t5": (
        auto("Seq2SeqLM", "T5", **T5),
        [
            *((rf"encoder\.block\.{layer}", 4 - layer) for layer in range(2)),
            *((rf"decoder\.block\.{layer}", 2 - layer) for layer in range(2)),
            (r"shared", 5),
            (r"encoder.final_layer_norm", 2),
        ],
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_rate_of_a_parameter_follows_its_layer(name: str) -> None:
    build, patterns = LAYERS[name]
    model = build()
    optimizer = make_optimizer(model, make(layerwise_lr_decay=0.8, learning_rate=1e-3, weight_decay=0.1))
    seen = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    names = dict(model.named_parameters())
    assert len(seen) == len(names) == sum(len(group["params"]) for group in optimizer.param_groups)
    for parameter, p in names.items():
        depth = next((depth for pattern, depth in patterns if re.search(pattern, parameter)), 0)
        assert seen[id(p)] == pytest.approx(1e-3 * 0.8**depth), parameter
    for pattern, _ in patterns:
        assert any(re.search(pattern, parameter) for parameter in names), pattern
    assert len({(group["lr"], group["weight_decay"]) for group in optimizer.param_groups}) == len(
        optimizer.param_groups
    )


def test_heads_beside_an_encoder_are_heads() -> None:
    """As a mixture of tasks has it: heads in a list of their own, and the encoder somewhere inside."""
    encoder = transformers.BertModel(transformers.BertConfig(**SIZES))
    model = nn.ModuleDict({"heads": nn.ModuleList([nn.Linear(8, 2), nn.Linear(8, 3)]), "encoder": encoder})
    depths = layer_depths(model)
    assert all(depths.get(id(p), 0) == 0 for p in model["heads"].parameters())
    assert depths == layer_depths(encoder)
    assert set(depths.values()) == {0, 1, 2, 3, 4}


def test_lists_without_parameters_are_no_layers() -> None:
    dropouts = nn.ModuleList(nn.Dropout() for _ in range(5))
    model = nn.Sequential(nn.Embedding(3, 2), nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), dropouts)
    assert [layer_depths(model)[id(p)] for p in model.parameters()] == [3, 2, 2, 1, 1]


def test_two_encoders_have_their_own_layers() -> None:
    one, other = (
        transformers.BertModel(transformers.BertConfig(**SIZES | {"num_hidden_layers": n_layer})) for n_layer in (1, 3)
    )
    model = nn.ModuleList([one, other])
    assert layer_depths(model) == layer_depths(one) | layer_depths(other)
    other.embeddings.word_embeddings.weight = one.embeddings.word_embeddings.weight
    assert layer_depths(model)[id(one.embeddings.word_embeddings.weight)] == 2


def test_a_model_without_layers_cannot_tell_them_apart() -> None:
    with pytest.raises(InputError, match="Linear has none"):
        make_optimizer(nn.Linear(2, 2), make(layerwise_lr_decay=0.9))


def test_every_choice_can_be_made() -> None:
    assert set(MAKERS) == set(READS["optimizer"])
    assert set(READS["scheduler"]) == {*CURVES, "one_cycle"}
    assert set(CURVES) == set(FORMULAS)
