"""Sparse training through Lightning's own loop: what is off stays exactly 0, masks change as the papers say, and a run
can be resumed, dealt to two processes, and finetuned, without losing a mask.

The tests of two processes run this file as a program, twice at a time, and look at what it has left.
"""

import copy
import dataclasses
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn

from funneltfm.errors import InputError
from funneltfm.funnel.config import ModelConfig
from funneltfm.funnel.model import FunnelTFM
from funneltfm.sparse.config import SparsityConfig
from funneltfm.sparse.distill import Distilled
from funneltfm.sparse.export import load_sparse, save_sparse
from funneltfm.sparse.masks import apply_masks, attach, densities, fingerprint, sparse_weights
from funneltfm.sparse.patterns import Pattern
from funneltfm.training import ranks
from funneltfm.training.config import make_args, typed_args
from funneltfm.training.optimizer_flags import OptimizerFlags, SchedulerFlags
from funneltfm.training.optimizers import MAKERS, make_optimizer
from funneltfm.training.precision import AmpPrecision
from funneltfm.training.setup import Devices, make_trainer
from funneltfm.training.sparsity import DensityLogger, DistillProgress, GradualPruning, RigL, StaticSparsity

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:DeprecationWarning"),
]

ROOT = Path(__file__).resolve().parents[2]
HALF = SparsityConfig(sparsity=0.5)
TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
FUNNEL = ModelConfig(
    vocab_size=30, d_embed=8, d_model=8, n_head=2, d_head=4, d_inner=16, block_size="1_1", dropout=0.0, dropatt=0.0,
    separate_cls=True, truncate_seq=True, pool_q_only=True,
)  # fmt: skip
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "fused": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01),
}


class Toy(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.table, self.norm, self.dropout = nn.Embedding(30, 8), nn.LayerNorm(8), nn.Dropout(dropout)
        self.inner, self.outer = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.outer(self.dropout(torch.tanh(self.inner(self.norm(self.table(ids).mean(dim=1))))))


class Funnel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.funnel = FunnelTFM(dataclasses.replace(FUNNEL, num_class=4))

    def forward(self, ids: Tensor) -> Tensor:
        return self.funnel(ids, seg_id=ids % 3)[1]["cls_logits"]


class Bert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(
            vocab_size=30, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=16, num_labels=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.bert = transformers.BertForSequenceClassification(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.bert(input_ids=ids).logits


class Batches:
    """A loader that goes on where it was; `size` examples a batch of `n`."""

    def __init__(self, n: int, size: int = 8, rank: int = 0, ranks: int = 1) -> None:
        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(1, 30, (n, size, 6), generator=generator)
        self.batches = [
            {"ids": one[rank::ranks], "labels": ((one > 15).sum(dim=1) // 2).clamp(max=3)[rank::ranks]} for one in ids
        ]
        self.taken = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.batches[self.taken :]:
            self.taken += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.taken = state["taken"]


class Learner(lightning.LightningModule):
    """`spoil` maps a batch to what is put into one gradient of the norm (which is dense)."""

    def __init__(self, model: nn.Module, optimizer: str = "adamw", spoil: dict[int, float] | None = None) -> None:
        super().__init__()
        self.model, self.optimizer_name, self.spoil = model, optimizer, spoil or {}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch["ids"]).float(), batch["labels"])

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.batch_idx = batch_idx

    def on_after_backward(self) -> None:
        if self.batch_idx in self.spoil:
            self.model.norm.bias.grad[0] = self.spoil[self.batch_idx]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer_name in OPTIMIZERS:
            return OPTIMIZERS[self.optimizer_name](self.parameters())
        more: dict[str, Any] = {"adafactor_beta1": 0.9} if self.optimizer_name == "adafactor" else {}
        more |= {"optimizer": self.optimizer_name, "learning_rate": 0.01, "weight_decay": 0.1}
        args = typed_args((("", OptimizerFlags, ()), ("", SchedulerFlags, ())), "train", more)
        return make_optimizer(self.model, args)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if isinstance(self.trainer.precision_plugin, AmpPrecision):
            checkpoint["state_dict"] = self.trainer.precision_plugin.exact_state(self)


class Probe(Callback):
    """Looks at the model after every batch: off weights are 0, also in the optimizer's copies. Notes masks, and moments
    of off weights.
    """

    def __init__(self, moments: bool = True) -> None:
        self.moments = moments
        self.masks: list[dict[str, Tensor]] = []
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert_off_is_zero(module)
        optimizer = trainer.optimizers[0]
        plugin = trainer.precision_plugin
        for weight in sparse_weights(module):
            held = plugin.optimized(weight.weight) if isinstance(plugin, AmpPrecision) else weight.weight
            if held.shape == weight.mask.shape:
                assert not held.detach()[~weight.mask].any(), weight.name
            for key, value in optimizer.state[held].items():
                if self.moments and isinstance(value, Tensor) and value.shape == weight.mask.shape:
                    assert not value[~weight.mask].any(), (weight.name, key)
        self.masks.append({weight.name: weight.mask.clone() for weight in sparse_weights(module)})
        self.steps.append(trainer.global_step)

    def changed(self) -> list[int]:
        """Steps (1-based) that changed a mask; the first one cannot be told."""
        return [
            step
            for step, one, before in zip(self.steps[1:], self.masks[1:], self.masks, strict=False)
            if any(not torch.equal(one[name], before[name]) for name in one)
        ]


def assert_off_is_zero(model: nn.Module) -> None:
    weights = sparse_weights(model)
    assert weights
    for weight in weights:
        assert not weight.weight.detach()[~weight.mask].any(), weight.name


def fit(
    *callbacks: Callback, model: nn.Module | None = None, n: int = 12, level: str | None = None, dtype: str = "fp16",
    loader: Batches | None = None, ckpt_path: Path | None = None, optimizer: str = "adamw",
    spoil: dict[int, float] | None = None, **kwargs: Any,
) -> Learner:  # fmt: skip
    if model is None:
        torch.manual_seed(0)
        model = Toy()
    learner = Learner(model, optimizer, spoil)
    settings = {"max_epochs": 1, "enable_checkpointing": False} | kwargs
    devices = Devices("cpu", -1, level, TYPES[dtype])
    trainer = make_trainer(make_args(device_id=-1), devices, callbacks=list(callbacks), **settings)
    trainer.fit(learner, loader or Batches(n), ckpt_path=ckpt_path)
    return learner


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    return {weight.name: weight.mask.clone() for weight in sparse_weights(model)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- what is off stays 0

LEVELS = [(None, "fp16"), *((level, dtype) for level in ("O1", "O2", "O3") for dtype in ("fp16", "bf16"))]
KINDS: dict[str, Callable[[], StaticSparsity]] = {
    "static": lambda: StaticSparsity(HALF),
    "rigl": lambda: RigL(HALF, every=2, end=1.0),
    "gradual": lambda: GradualPruning(HALF, start=0.1, end=0.9, every=2),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("level", "dtype"), LEVELS)
def test_off_weights_are_zero_after_every_step_in_every_precision(level: str | None, dtype: str, kind: str) -> None:
    """Also with weight decay, clipping, accumulation, and steps that are skipped (batches 3 and 8 are spoiled)."""
    spoil = {3: float("inf"), 8: float("nan")} if level in ("O1", "O2") and dtype == "fp16" else {}
    probe = Probe()
    learner = fit(
        KINDS[kind](),
        probe,
        level=level,
        dtype=dtype,
        n=24,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        spoil=spoil,
    )
    if spoil:
        assert learner.trainer.precision_plugin.skipped >= 2
    assert len(probe.steps) == 24
    assert learner.trainer.global_step == 12
    sparse = densities(learner).sparse
    assert (sparse.on, sparse.size) == (96, 192)
    assert all(parameter.isfinite().all() for parameter in learner.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", [Funnel, Bert])
def test_under_every_optimizer(model: type[nn.Module], optimizer: str, kind: str) -> None:
    torch.manual_seed(0)
    learner = fit(KINDS[kind](), Probe(), model=model(), n=6, optimizer=optimizer)
    assert densities(learner).sparse.mask_density == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", MAKERS)
def test_under_every_optimizer_of_the_command(optimizer: str, kind: str) -> None:
    if optimizer.endswith("8bit"):
        pytest.importorskip("bitsandbytes")
        if kind != "static":
            pytest.skip("refused where masks change")
    learner = fit(KINDS[kind](), Probe(), n=8, optimizer=optimizer)
    assert densities(learner).sparse.mask_density == 0.5
    assert all(parameter.isfinite().all() for parameter in learner.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["adamw", "fused"])
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true"])
def test_under_lightning_s_own_precisions(precision: str, optimizer: str, kind: str) -> None:
    torch.manual_seed(0)
    plugin: Any = HalfPrecision if precision == "bf16-true" else partial(MixedPrecision, device="cpu")
    trainer = lightning.Trainer(
        accelerator="cpu", plugins=plugin(precision), callbacks=[KINDS[kind](), Probe()], max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    learner = Learner(Toy(), optimizer)
    trainer.fit(learner, Batches(8))
    assert densities(learner).sparse.on == 96


def test_a_checkpoint_in_the_middle_of_a_step_is_sparse(tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            trainer.save_checkpoint(tmp_path / f"{batch_idx}.ckpt")

    fit(RigL(HALF, every=2, end=1.0), Save(), n=9, accumulate_grad_batches=3, level="O2")
    for path in tmp_path.iterdir():
        state = torch.load(path, weights_only=True)["state_dict"]
        for name in ("model.inner.weight", "model.outer.weight"):
            assert state[f"{name}_mask"].dtype == torch.bool
            assert not state[name][~state[f"{name}_mask"]].any()


def test_clipping_sees_the_gradients_that_are_on() -> None:
    class Norm(Learner):
        def configure_gradient_clipping(self, optimizer: Any, **kwargs: Any) -> None:
            for weight in sparse_weights(self):
                assert not weight.weight.grad[~weight.mask].any()
                assert weight.weight.grad[weight.mask].any()

    torch.manual_seed(0)
    trainer = make_trainer(
        make_args(device_id=-1), Devices("cpu", -1, None, torch.float16), callbacks=[StaticSparsity(HALF)],
        max_epochs=1, enable_checkpointing=False, gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(Norm(Toy()), Batches(3))


def test_static_training_is_that_of_an_explicit_mask() -> None:
    torch.manual_seed(0)
    model = Toy()
    masked = copy.deepcopy(model)
    attach(masked, HALF)
    masks = {"inner": masked.inner.weight_mask.float(), "outer": masked.outer.weight_mask.float()}

    class Explicit(Toy):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.norm(self.table(ids).mean(dim=1))
            x = torch.tanh(nn.functional.linear(x, self.inner.weight * masks["inner"], self.inner.bias))
            return nn.functional.linear(x, self.outer.weight * masks["outer"], self.outer.bias)

    explicit = Explicit()
    explicit.load_state_dict(model.state_dict())
    fit(StaticSparsity(), model=masked, n=20)
    fit(model=explicit, n=20)
    for name, mask in masks.items():
        assert torch.equal(masked.get_submodule(name).weight, explicit.get_submodule(name).weight * mask)
        assert torch.equal(masked.get_submodule(name).bias, explicit.get_submodule(name).bias)


def test_averages_of_weights_are_sparse_where_the_masks_stay() -> None:
    ema = EMAWeightAveraging(decay=0.5)
    learner = fit(StaticSparsity(HALF), ema, Probe(), n=8)
    assert_off_is_zero(learner)  # the callback has put the average into the module
    assert densities(learner).sparse.on == 96


# ---- RigL


class Count(Callback):
    """Notes how many weights are on in each matrix."""

    def __init__(self) -> None:
        self.counts: list[dict[str, int]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.counts.append({weight.name: int(weight.mask.sum()) for weight in sparse_weights(module)})


@pytest.mark.parametrize(("scope", "n"), [("layer", 1000), ("global", 100)])
def test_density_is_exact_after_a_thousand_updates(scope: Any, n: int) -> None:
    count = Count()
    fit(RigL(HALF, every=1, end=1.0, anneal="constant", scope=scope), count, n=n)
    assert len(count.counts) == n
    assert all(sum(numbers.values()) == 96 for numbers in count.counts)
    if scope == "layer":
        assert all(numbers == {"model.inner.weight": 64, "model.outer.weight": 32} for numbers in count.counts)
    else:
        assert count.counts[-1]["model.inner.weight"] != 64  # densities drift: that is what global means


class Spy(RigL):
    """Notes what an update saw, and what it made of it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.updates: list[dict[str, Any]] = []

    def update(self, step: int, held: Any, optimizer: Any) -> bool:
        def look() -> dict[str, dict[str, Tensor]]:
            return {
                one.weight.name: {
                    "w": one.tensor.detach().clone(), "on": one.weight.mask.clone(),
                    "m": optimizer.state[one.tensor].get("exp_avg", torch.zeros(())).clone(),
                    "v": optimizer.state[one.tensor].get("exp_avg_sq", torch.zeros(())).clone(),
                }
                for one in held
            }  # fmt: skip

        grads = {one.weight.name: one.tensor.grad.clone() for one in held if one.tensor.grad is not None}
        before = look()
        changed = super().update(step, held, optimizer)
        if changed:
            self.updates.append({"step": step, "before": before, "after": look(), "grads": grads})
        return changed


def by_hand(w: Tensor, on: Tensor, grad: Tensor, n: int) -> Tensor:
    """The paper's words for one matrix, with lists."""
    active = [i for i in range(w.numel()) if on.view(-1)[i]]
    dropped = sorted(active, key=lambda i: (float(w.view(-1)[i].abs()), i))[:n]
    survivors = set(active) - set(dropped)
    free = [i for i in range(w.numel()) if i not in survivors]
    grown = sorted(free, key=lambda i: (-float(grad.view(-1)[i].abs()), i))[:n]
    new = torch.zeros_like(on)
    new.view(-1)[sorted(survivors | set(grown))] = True
    return new


@pytest.mark.parametrize(("level", "dtype"), [(None, "fp16"), ("O2", "fp16"), ("O1", "bf16")])
def test_updates_are_those_of_the_paper(level: str | None, dtype: str) -> None:
    spy = Spy(HALF, drop=0.4, every=3, end=0.75)
    fit(spy, Probe(), n=40, level=level, dtype=dtype)
    assert [update["step"] for update in spy.updates] == list(range(3, 31, 3))
    for update in spy.updates:
        fraction = 0.4 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * update["step"] / 30)).item())
        for name, before in update["before"].items():
            n = int(fraction * int(before["on"].sum()))
            new, after = by_hand(before["w"], before["on"], update["grads"][name], n), update["after"][name]
            assert torch.equal(after["on"], new), (update["step"], name)
            old = before["on"]
            stay, grown, gone = old & new, new & ~old, old & ~new
            assert torch.equal(after["w"][stay], before["w"][stay])  # a weight that came back keeps its value
            assert not after["w"][grown].any()
            assert not after["w"][gone].any()
            for moment in ("m", "v"):
                if after[moment].dim():
                    assert not after[moment][grown | gone].any()
                    assert torch.equal(after[moment][stay], before[moment][stay])


def test_what_grew_learns_at_once() -> None:
    spy, probe = Spy(HALF, every=5, end=1.0), Probe()
    learner = fit(spy, probe, n=5)
    (update,) = spy.updates
    grown = 0
    for name, after in update["after"].items():
        new = after["on"] & ~update["before"][name]["on"]
        grown += int(new.sum())
        assert (learner.get_parameter(name).detach()[new] != 0).all()
    assert grown == 0  # at the very end of the schedule nothing is dropped
    spy = Spy(HALF, every=5, end=10)
    learner = fit(spy, n=5)
    for name, after in spy.updates[0]["after"].items():
        new = after["on"] & ~spy.updates[0]["before"][name]["on"]
        assert new.any()
        assert (learner.get_parameter(name).detach()[new] != 0).all()


def test_grown_moments_begin_with_the_mean() -> None:
    spy = Spy(HALF, every=5, end=100, moments="mean")
    fit(spy, Probe(), n=12)
    for update in spy.updates:
        for name, after in update["after"].items():
            before = update["before"][name]
            stay, grown = after["on"] & before["on"], after["on"] & ~before["on"]
            assert grown.any()
            assert torch.allclose(after["v"][grown], before["v"][stay].mean())
            assert not after["m"][grown].any()


def test_the_original_s_way() -> None:
    class SpyOriginal(Spy):
        pass

    reference = RigL.original(HALF, every=4)
    spy = SpyOriginal(
        HALF, every=4, begin=4, end=1.0, scope="global", moments="keep", regrown="zero", mask_gradients=False
    )
    assert {k: v for k, v in vars(spy).items() if k != "updates"} == vars(reference)
    learner = fit(spy, Probe(moments=False), n=20)
    optimizer = learner.trainer.optimizers[0]
    off = torch.cat([optimizer.state[w.weight]["exp_avg"][~w.mask] for w in sparse_weights(learner)])
    assert off.any()  # moments of off weights live on
    assert [update["step"] for update in spy.updates] == [4, 8, 12, 16, 20]
    for update in spy.updates:
        fraction = 0.3 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (update["step"] - 4) / 16)).item())
        names = list(update["before"])

        def joint(part: str, when: str, update: Any = update, names: Any = names) -> Tensor:
            return torch.cat([update[when][name][part].flatten() for name in names])

        n = round(fraction * 96)
        grads = torch.cat([update["grads"][name].flatten() for name in names])
        w, on = joint("w", "before"), joint("on", "before")
        assert torch.equal(joint("on", "after"), by_hand(w, on, grads, n))
        lowest = sorted((i for i in range(len(w)) if on[i]), key=lambda i: (float(w[i].abs()), i))[:n]
        assert not joint("w", "after")[lowest].any()  # also those that came back
        assert torch.equal(joint("m", "after"), joint("m", "before"))


def test_growing_by_lot_depends_on_seed_and_step() -> None:
    def run(seed: int) -> dict[str, Tensor]:
        return masks_of(fit(RigL(SparsityConfig(sparsity=0.5, seed=seed), every=2, end=50, grow="random"), n=8))

    assert same(run(1), run(1))
    assert not same(run(1), run(2))


def test_no_update_outside_of_its_time() -> None:
    probe = Probe()
    fit(RigL(HALF, every=2, begin=6, end=14, anneal="constant"), probe, n=24)
    assert probe.changed() == [6, 8, 10, 12, 14]
    rigl = RigL(HALF, drop=0.3, begin=6, end=14)
    rigl.first, rigl.last = 6, 14
    assert [rigl.fraction(step) for step in (6, 10, 14)] == pytest.approx([0.3, 0.15, 0.0])


def test_steps_are_counted_not_batches() -> None:
    probe = Probe()
    fit(RigL(HALF, every=2, end=0.5, anneal="constant"), probe, n=24, accumulate_grad_batches=3)
    assert probe.changed() == [2, 4]  # of 8 steps, until the 4th


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_growth_uses_the_gradient_of_the_whole_step(scope: str) -> None:
    """Four batches of 4 that make one step, or one batch of 16: the same gradient, hence the same masks."""
    small, large = Batches(8, 4), Batches(2, 16)
    for i in range(2):
        for key in ("ids", "labels"):
            large.batches[i][key] = torch.cat([batch[key] for batch in small.batches[4 * i : 4 * i + 4]])
    runs = []
    for loader, accumulate in ((small, 4), (large, 1)):
        spy = Spy(HALF, every=1, end=100, scope=scope)
        fit(spy, loader=loader, accumulate_grad_batches=accumulate, optimizer="sgd")
        runs.append(spy.updates)
    assert len(runs[0]) == len(runs[1]) == 2
    for one, other in zip(*runs, strict=True):
        for name in one["grads"]:
            assert torch.allclose(one["grads"][name], other["grads"][name], atol=1e-6)
            assert torch.equal(one["after"][name]["on"], other["after"][name]["on"])


def test_a_skipped_step_changes_no_mask_and_the_next_one_does() -> None:
    class SpoilSparse(Learner):
        def on_after_backward(self) -> None:
            if self.batch_idx in self.spoil:
                self.model.inner.weight.grad[0, 0] = float("inf")

    probe, spy = Probe(), Spy(HALF, every=4, end=100)
    torch.manual_seed(0)
    learner = SpoilSparse(Toy(), spoil={3: 1.0, 4: 1.0})
    trainer = make_trainer(
        make_args(device_id=-1), Devices("cpu", -1, "O2", torch.float16), callbacks=[spy, probe], max_epochs=1,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(learner, Batches(9))
    assert probe.changed() == [6, 8]  # due at 4; the gradients of 4 and 5 were not finite
    assert [update["step"] for update in spy.updates] == [6, 8]


PATTERNS = ["constant_fan_in", "2:4", "1:4", "2x1", "2x2", "1x4"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_hold_through_updates(pattern: str) -> None:
    config = SparsityConfig(sparsity=None if ":" in pattern else 0.75, pattern=pattern)
    probe = Probe()
    learner = fit(RigL(config, drop=0.5, every=1, end=100), probe, n=20)
    assert len(probe.changed()) > 10
    for weight in sparse_weights(learner):
        on = weight.units_on(Pattern(pattern))
        count = on.sum(dim=1)
        assert (count == count[0]).all()
        assert int(on.sum()) == round((1 - config.wanted) * on.numel())


@pytest.mark.parametrize("kind", [RigL, GradualPruning])
def test_blocks_of_16_by_16_hold(kind: type[RigL | GradualPruning]) -> None:
    torch.manual_seed(0)
    config = SparsityConfig(sparsity=0.75, pattern="16x16", include=["*encoder*"])
    learner = fit(kind(config, every=2), model=Bert())
    for weight in sparse_weights(learner):
        on = weight.units_on(Pattern("16x16"))
        assert int(on.sum()) == on.numel() // 4, weight.name


def test_a_matrix_without_a_gradient_keeps_its_mask() -> None:
    torch.manual_seed(0)
    model = Toy()
    model.inner.weight.requires_grad_(False)
    probe = Probe()
    fit(RigL(HALF, every=1, end=100), probe, model=model, n=5)
    assert torch.equal(probe.masks[0]["model.inner.weight"], probe.masks[-1]["model.inner.weight"])
    assert not torch.equal(probe.masks[0]["model.outer.weight"], probe.masks[-1]["model.outer.weight"])


# ---- gradual pruning


@pytest.mark.parametrize("distribution", ["uniform", "erk", "global"])
@pytest.mark.parametrize("curve", ["cubic", "linear", "cosine"])
def test_density_falls_and_hits_the_target(curve: str, distribution: str) -> None:
    init = "dense" if distribution == "global" else "random"
    config = SparsityConfig(sparsity=0.6, count="model", include=["*inner*", "*table*"], embeddings=True,
                            distribution=distribution, init=init)  # fmt: skip
    probe, pruning = Probe(), GradualPruning(config, start=0.25, end=0.75, every=3, curve=curve)
    learner = fit(pruning, probe, n=40)
    on = [sum(int(mask.sum()) for mask in masks.values()) for masks in probe.masks]
    total = sum(mask.numel() for mask in probe.masks[0].values())
    assert on[:10] == [total] * 10  # the update of step 10 prunes nothing yet
    assert on == sorted(on, reverse=True)
    assert set(probe.changed()) <= {13, 16, 19, 22, 25, 28, 30}
    found = densities(learner).model
    assert found.on == round(0.4 * found.size)
    assert on[29:] == [on[-1]] * 11
    assert pruning.share(20) == pytest.approx({"cubic": 1 - 0.5**3, "linear": 0.5, "cosine": 0.5}[curve])
    for one, other in zip(probe.masks, probe.masks[1:], strict=False):
        assert not any((other[name] & ~one[name]).any() for name in one)  # what is off stays off


def test_pruning_takes_the_smallest() -> None:
    class Look(GradualPruning):
        def update(self, step: int, held: Any, optimizer: Any) -> bool:
            before = {one.weight.name: (one.tensor.detach().abs().clone(), one.weight.mask.clone()) for one in held}
            changed = super().update(step, held, optimizer)
            for one in held:
                size, old = before[one.weight.name]
                gone, left = size[old & ~one.weight.mask], size[one.weight.mask]
                assert not len(gone) or gone.max() <= left.min()
                looked.append(len(gone))
            return changed

    looked: list[int] = []
    fit(Look(HALF, start=2, end=18, every=4), n=20)
    assert sum(looked) == 96


def test_pruning_begins_with_the_masks_that_are_there() -> None:
    torch.manual_seed(0)
    model = Toy()
    attach(model, SparsityConfig(sparsity=0.3))
    before = masks_of(model)
    learner = fit(GradualPruning(SparsityConfig(sparsity=0.75), start=0, end=10, every=1), Probe(), model=model)
    after = masks_of(learner)
    assert sum(int(mask.sum()) for mask in after.values()) == 48
    assert not any((after[f"model.{name}"] & ~before[name]).any() for name in before)
    with pytest.raises(InputError, match="pruning cannot reach its target"):
        fit(GradualPruning(HALF), model=learner.model)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pruning_into_a_pattern(pattern: str) -> None:
    config = SparsityConfig(sparsity=None if ":" in pattern else 0.75, pattern=pattern)
    learner = fit(GradualPruning(config, start=0, end=10, every=2), Probe())
    for weight in sparse_weights(learner):
        on = weight.units_on(Pattern(pattern))
        assert (on.sum(dim=1) == on.size(1) * (1 - config.wanted)).all()


def test_pruning_then_rigl() -> None:
    """Dense to sparse, then the masks go on moving: two callbacks, one config."""
    probe = Probe()
    learner = fit(GradualPruning(HALF, start=2, end=10, every=2), RigL(begin=12, end=30, every=3), probe, n=30)
    on = [sum(int(mask.sum()) for mask in masks.values()) for masks in probe.masks]
    assert on[0] == 192
    assert set(on[9:]) == {96}
    assert {12, 15, 18} <= set(probe.changed())
    assert densities(learner).sparse.on == 96


# ---- resume


@pytest.mark.parametrize(("level", "dtype"), [(None, "fp16"), ("O1", "bf16"), ("O2", "fp16")])
@pytest.mark.parametrize("kind", ["rigl", "random", "mean", "original", "gradual", "both"])
@pytest.mark.parametrize("at", [8, 10])  # after an update, and between two
def test_a_resumed_run_is_the_whole_one_bit_for_bit(
    kind: str, at: int, level: str | None, dtype: str, tmp_path: Path
) -> None:
    def callbacks() -> list[Callback]:
        return {
            "rigl": [RigL(HALF, every=4, end=1.0)],
            "random": [RigL(HALF, every=4, end=1.0, grow="random")],
            "mean": [RigL(HALF, every=4, end=1.0, moments="mean", scope="global")],
            "original": [RigL.original(HALF, every=4)],
            "gradual": [GradualPruning(SparsityConfig(sparsity=0.8), start=2, end=18, every=4)],
            "both": [GradualPruning(HALF, start=2, end=9, every=2), RigL(every=4, begin=8, end=1.0)],
        }[kind]  # type: ignore[return-value]

    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx + 1 == at:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")

    spoil = {3: float("inf")} if level == "O2" else {}
    whole = fit(*callbacks(), Save(), n=20, level=level, dtype=dtype, spoil=spoil)
    resumed = fit(*callbacks(), n=20, level=level, dtype=dtype, ckpt_path=tmp_path / "cut.ckpt")
    assert same(whole.state_dict(), resumed.state_dict())
    assert any(name.endswith("_mask") for name in whole.state_dict())
    states = [learner.trainer.optimizers[0].state_dict()["state"] for learner in (whole, resumed)]
    for number, state in states[0].items():
        assert same(state, states[1][number])


def test_a_callback_serves_several_runs() -> None:
    pruning = GradualPruning(HALF, start=2, end=8, every=2)
    for _ in range(2):
        probe = Probe()
        learner = fit(pruning, probe, n=10)
        assert probe.changed() == [4, 6, 8]
        assert densities(learner).sparse.on == 96
    other = Bert()
    torch.manual_seed(0)
    learner = fit(pruning, model=other.train())  # of other names and sizes
    assert densities(learner).sparse.mask_density == pytest.approx(0.5, abs=0.001)


def test_a_pending_update_survives(tmp_path: Path) -> None:
    rigl = RigL(HALF)
    rigl._pending = True
    other = RigL(HALF)
    other.load_state_dict(copy.deepcopy(rigl.state_dict()))
    assert other._pending


# ---- models that are sparse already


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("level", [None, "O2"])
def test_finetuning_ends_with_the_masks_it_began_with(level: str | None, compact: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pretrained = transformers.BertForMaskedLM(Bert().bert.config)
    attach(pretrained, SparsityConfig(sparsity=0.8, embeddings=True))
    save_sparse(pretrained, tmp_path, compact=compact)
    before = {name.removeprefix("bert."): mask for name, mask in masks_of(pretrained.bert).items()}
    model = Bert()
    auto = transformers.AutoModelForSequenceClassification
    if compact:
        model.bert = load_sparse(auto, tmp_path)
    else:  # the way every program loads a model: the callback finds the masks by itself
        model.bert = auto.from_pretrained(tmp_path)
        assert not sparse_weights(model)
    model.train()
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    learner = fit(StaticSparsity(), Probe(), model=model, n=10, level=level)
    after = {name.removeprefix("bert."): mask for name, mask in masks_of(learner.model.bert.bert).items()}
    assert same(before, after)
    assert len(before) == 7
    assert any(not torch.equal(value.detach().float(), weights[name]) for name, value in model.named_parameters())
    assert_off_is_zero(model)


def test_a_dense_model_stays_dense_where_nothing_asks() -> None:
    assert not sparse_weights(fit(StaticSparsity(), DensityLogger(1), n=2))
    with pytest.raises(InputError, match="the model has no masks: give a SparsityConfig"):
        fit(RigL())


def test_a_model_that_has_masks_keeps_them() -> None:
    torch.manual_seed(0)
    model = Toy()
    attach(model, SparsityConfig(sparsity=0.75, seed=5))
    before = masks_of(model)
    fit(StaticSparsity(SparsityConfig(sparsity=0.2)), model=model)
    assert same(before, masks_of(model))


def test_a_config_does_not_replace_the_masks_of_a_folder(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    attach(bert := Bert(), SparsityConfig(sparsity=0.75, seed=5))
    save_sparse(bert.bert, tmp_path)
    before = {weight.name: weight.mask.clone() for weight in sparse_weights(bert)}
    again = Bert()
    again.bert = BertForSequenceClassification.from_pretrained(tmp_path).train()
    fit(StaticSparsity(SparsityConfig(sparsity=0.2)), model=again)
    assert same(before, {weight.name: weight.mask for weight in sparse_weights(again)})


def test_a_model_from_the_hub_has_the_masks_of_its_files_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = Bert().bert
    attach(model, HALF)
    cache = tmp_path / "models--someone--sparse"
    commit = "0" * 39 + "1"
    model.save_pretrained(cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    again = Bert()
    again.bert = transformers.BertForSequenceClassification.from_pretrained(
        "someone/sparse", local_files_only=True, cache_dir=tmp_path
    )
    assert not sparse_weights(again.bert.train())
    learner = fit(StaticSparsity(), Probe(), model=again, n=2)
    assert same(masks_of(learner.model.bert), masks_of(model))


def test_masks_are_applied_before_the_first_step() -> None:
    torch.manual_seed(0)
    model = Toy()
    attach(model, HALF)
    nn.init.ones_(model.inner.weight)

    class Look(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            assert_off_is_zero(module)
            looked.append(batch_idx)

    looked: list[int] = []
    fit(StaticSparsity(), Look(), model=model, n=2, level="O2")
    assert looked == [0, 1]


def test_hooks_do_not_outlive_the_run() -> None:
    learner = fit(StaticSparsity(HALF), n=2)
    optimizer = learner.trainer.optimizers[0]
    assert not optimizer._optimizer_step_post_hooks
    apply_masks(sparse_weights(learner))


# ---- what is logged, what is told


def test_densities_are_logged() -> None:
    learner = fit(RigL(HALF, every=2, end=100), DensityLogger(every=2, layers=True), n=4)
    logged = learner.trainer.callback_metrics
    assert logged["density/mask"] == 0.5
    assert logged["density/nonzero"] <= 0.5
    found = densities(learner)
    assert logged["density/model"] == pytest.approx(found.model.mask_density)
    assert logged["density/model.inner.weight"] == 0.5


def test_distillation_learns_how_far_training_is() -> None:
    class Student(Learner):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            seen.append(self.model.progress)
            return self.model(ids=batch["ids"], labels=batch["labels"]).loss

    seen: list[float] = []
    trainer = make_trainer(
        make_args(device_id=-1), Devices("cpu", -1, None, torch.float16), max_epochs=1, enable_checkpointing=False,
        callbacks=[DistillProgress(), StaticSparsity(HALF), Probe()], accumulate_grad_batches=2,
    )  # fmt: skip
    learner = Student(Distilled(Toy(), [Toy()], weight=(1.0, 0.0)))
    trainer.fit(learner, Batches(10))
    assert seen == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1, 1]
    assert set(masks_of(learner)) == {"model.student.inner.weight", "model.student.outer.weight"}


# ---- what cannot be


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RigL(HALF, drop=0.0), "drop must be"),
        (lambda: RigL(HALF, every=0), "every must be at least 1"),
        (lambda: RigL(HALF, end=1.5), "end must be a step"),
        (lambda: RigL(HALF, begin=-1), "begin must be a step"),
        (lambda: RigL(HALF, anneal="step"), "anneal must be one of cosine, linear, constant"),
        (lambda: RigL(HALF, grow="momentum"), "grow must be one of"),  # type: ignore[arg-type]
        (lambda: RigL(HALF, scope="block"), "scope must be one of"),  # type: ignore[arg-type]
        (lambda: RigL(HALF, moments="one"), "moments must be one of"),  # type: ignore[arg-type]
        (lambda: RigL(HALF, regrown="half"), "regrown must be one of"),  # type: ignore[arg-type]
        (lambda: GradualPruning(HALF, curve="step"), "curve must be one of cubic, linear, cosine"),
        (lambda: GradualPruning(HALF, every=0), "every must be at least 1"),
        (lambda: GradualPruning(HALF, moments="mean"), "moments must be one of zero, keep"),  # type: ignore[arg-type]
        (lambda: DensityLogger(0), "every must be at least 1"),
        (lambda: fit(GradualPruning(HALF, start=0.5, end=0.5)), "end must come after start"),
        (lambda: fit(RigL(HALF), EMAWeightAveraging()), "EMAWeightAveraging averages models whose masks differ"),
        (lambda: fit(StaticSparsity(HALF), RigL(SparsityConfig(sparsity=0.6))), "share one SparsityConfig"),
        (
            lambda: fit(RigL(SparsityConfig(sparsity=0.5, pattern="constant_fan_in"), scope="global")),
            "scope='global' moves weights between matrices",
        ),
        (lambda: fit(RigL(HALF), max_epochs=-1), "is a share of all steps, but the run has no end"),
    ],
)
def test_what_cannot_be_asked_for(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_strategies_that_cut_weights_up_are_refused() -> None:
    callback = StaticSparsity(HALF)
    trainer = SimpleNamespace(callbacks=[callback], strategy=FSDPStrategy())
    with pytest.raises(InputError, match="runs on one device or with DDP, not with FSDPStrategy"):
        callback.setup(trainer, Learner(Toy()), "fit")  # type: ignore[arg-type]


def test_masks_that_would_never_change_are_no_rigl() -> None:
    with pytest.raises(InputError, match="no step from 0 to 9 is a multiple of 10"):
        fit(RigL(HALF, every=10))
    with pytest.raises(InputError, match="pruning would end at step 13, but the run ends at step 12"):
        fit(GradualPruning(HALF, start=2, end=13, every=2))


def test_masks_of_another_pattern_are_refused() -> None:
    torch.manual_seed(0)
    model = Toy()
    attach(model, HALF)
    with pytest.raises(InputError, match=r"mask of model\.inner\.weight does not have the pattern constant_fan_in"):
        fit(RigL(SparsityConfig(sparsity=0.5, pattern="constant_fan_in")), model=model)
    with pytest.raises(InputError, match="does not have the pattern 2x1: blocks are cut"):
        fit(RigL(SparsityConfig(sparsity=0.5, pattern="2x1")), model=model)
    with pytest.raises(InputError, match="does not have the pattern constant_fan_in"):
        fit(GradualPruning(SparsityConfig(sparsity=0.75, pattern="constant_fan_in")), model=model)


def test_masks_change_under_one_optimizer_alone() -> None:
    class Two(Learner):
        def __init__(self) -> None:
            super().__init__(Toy())
            self.automatic_optimization = False

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
            raise AssertionError("not reached")

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.model.inner, self.model.outer)]

    trainer = make_trainer(
        make_args(device_id=-1), Devices("cpu", -1, None, torch.float16), callbacks=[RigL(HALF)], max_epochs=1,
        enable_checkpointing=False,
    )  # fmt: skip
    with pytest.raises(InputError, match="one optimizer holds every sparse weight; this run has 2 optimizers"):
        trainer.fit(Two(), Batches(2))


# ---- the page for users


def test_every_block_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("transformers")
    page = (ROOT / "docs/sparse.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec("\n".join(blocks), {"__name__": "page"})
    whole, loaded, turn = map(float, capsys.readouterr().out.split())
    assert whole == pytest.approx(0.2, abs=1e-5)
    assert 0.15 < loaded < 0.2
    assert 1e-5 <= turn <= 1.0


# ---- two processes


class Broken(RigL):
    """One process loses a bit."""

    def update(self, step: int, held: Any, optimizer: Any) -> bool:
        changed = super().update(step, held, optimizer)
        if changed and ranks.rank() == 1:
            held[0].weight.mask.view(-1)[0] ^= True
        return changed


def two(folder: Path) -> None:
    """All that the tests below look at."""
    with ranks.joined(ranks.find_place(1, 0, None), "gloo"):
        rank = ranks.rank()
        found: dict[str, Any] = {}
        for name, callback in {
            "rigl": RigL(HALF, every=2, end=1.0),
            "random": RigL(HALF, every=2, end=1.0, grow="random", scope="global"),
            "gradual": GradualPruning(SparsityConfig(sparsity=0.8), start=0, end=10, every=2),
        }.items():
            torch.manual_seed(0)
            model = Toy(dropout=0.3)
            torch.manual_seed(100 + rank)  # dropout differs
            learner = fit(callback, Probe(), model=model, loader=Batches(12, rank=rank, ranks=2), level="O2")
            found[name] = {"state": learner.state_dict(), "print": fingerprint(sparse_weights(learner))}
        spy = Spy(HALF, every=3, end=100)
        torch.manual_seed(0)
        fit(spy, model=Toy(), loader=Batches(6, rank=rank, ranks=2), optimizer="sgd")
        found["updates"] = spy.updates
        found["broken"] = "went on"
        try:
            fit(Broken(HALF, every=2, end=1.0), model=Toy(), loader=Batches(6, rank=rank, ranks=2))
        except InputError as error:  # told by the main process; the other one leaves in silence
            found["broken"] = str(error)
            ranks.any_rank(True)
        except SystemExit:
            found["broken"] = "left"
        torch.save(found, folder / f"found.{rank}.pt")


def run_pair(*argv: str) -> list[tuple[int, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {
                "PYTHONPATH": str(ROOT / "pytorch"), "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": "2",
                "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            },
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("pair")
    for code, said in run_pair(str(folder)):
        assert code == 0, said
    return [torch.load(folder / f"found.{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", ["rigl", "random", "gradual"])
def test_two_processes_have_the_same_masks(name: str, pair: list[dict[str, Any]]) -> None:
    first, second = (found[name] for found in pair)
    assert first["print"] == second["print"]
    assert same(first["state"], second["state"])
    masks = {key: value for key, value in first["state"].items() if key.endswith("_mask")}
    assert {key: int(value.sum()) for key, value in masks.items()} != {}
    assert sum(int(value.sum()) for value in masks.values()) == (39 if name == "gradual" else 96)


def test_growth_uses_the_mean_gradient_of_both(pair: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    spy = Spy(HALF, every=3, end=100)
    fit(spy, model=Toy(), loader=Batches(6), optimizer="sgd")
    for updates in (pair[0]["updates"], pair[1]["updates"]):
        assert [update["step"] for update in updates] == [3, 6]
        for one, alone in zip(updates, spy.updates, strict=True):
            for name in alone["grads"]:
                assert torch.allclose(one["grads"][name], alone["grads"][name], atol=1e-6)
                assert torch.equal(one["after"][name]["on"], alone["after"][name]["on"])


def test_masks_that_differ_end_the_run(pair: list[dict[str, Any]]) -> None:
    assert "the processes of the run have different masks" in pair[0]["broken"]
    assert pair[1]["broken"] == "left"


if __name__ == "__main__":
    two(Path(sys.argv[1]))
