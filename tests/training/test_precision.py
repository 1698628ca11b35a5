"""O0 to O3 through Lightning's own loop, on the CPU: what is kept in which type, what happens to a step whose gradients
are not finite, and that nothing finer than half precision is lost between steps or in a checkpoint.
"""

import copy
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from funneltfm.errors import InputError
from funneltfm.funnel.config import ModelConfig
from funneltfm.funnel.model import FunnelTFM
from funneltfm.funnel.ops import LayerNorm
from funneltfm.training.checkpoint_io import WholeCheckpoints
from funneltfm.training.config import make_args
from funneltfm.training.optim import make_adamw
from funneltfm.training.precision import AmpPrecision
from funneltfm.training.setup import Devices, make_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:DeprecationWarning"),
]

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
CONFIG = ModelConfig(
    vocab_size=30, d_embed=8, d_model=8, n_head=2, d_head=4, d_inner=16, block_size="1_1", dropout=0.0, dropatt=0.0,
    separate_cls=True, truncate_seq=True, pool_q_only=True,
)  # fmt: skip


class Toy(nn.Module):
    """A table, a norm, two linear maps."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 8)
        self.norm = LayerNorm(8)
        self.inner = nn.Linear(8, 16)
        self.outer = nn.Linear(16, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(self.norm(self.table(ids).mean(dim=1)))))


class Funnel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.funnel = FunnelTFM(CONFIG)

    def forward(self, ids: Tensor) -> Tensor:
        return self.funnel(ids, seg_id=ids % 3)[1]["cls_logits"]


def batches(n: int) -> list[dict[str, Tensor]]:
    """Which half of the table most ids of a row are from is to be learned."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for _ in range(n):
        ids = torch.randint(1, 30, (8, 9), generator=generator)
        made.append({"ids": ids, "labels": ((ids > 15).sum(dim=1) > 4).long()})
    return made


class Watched(lightning.LightningModule):
    """Trains a model; notes of every step what the optimizer saw. `spoil` maps a batch to what is put into one of its
    gradients.
    """

    def __init__(self, model: nn.Module, lr: float = 1e-2, spoil: dict[int, float] | None = None) -> None:
        super().__init__()
        self.model, self.lr, self.spoil = model, lr, spoil or {}
        self.losses: list[float] = []
        self.logits: list[torch.dtype] = []
        self.grads: list[list[Tensor]] = []
        self.norms: list[float] = []
        self.after: list[dict[str, Any]] = []

    @property
    def precision(self) -> Any:
        return self.trainer.precision_plugin

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits = self.model(batch["ids"])
        loss = nn.functional.cross_entropy(logits.float(), batch["labels"])
        self.logits.append(logits.dtype)
        self.losses.append(float(loss.detach()))
        self._batch_idx = batch_idx
        return loss

    def on_after_backward(self) -> None:
        if self._batch_idx in self.spoil:
            weight = next(p for name, p in self.model.named_parameters() if "weight" in name)
            weight.grad.view(-1)[-1] = self.spoil[self._batch_idx]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = make_adamw(self.model, self.lr, weight_decay=0.1)
        optimizer.register_step_post_hook(self._note)
        return optimizer

    def _note(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        grads = [p.grad.clone() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.grads.append(grads)
        self.norms.append(float(torch.stack([g.float().norm() for g in grads]).norm()))

    def on_train_batch_end(self, *_: Any) -> None:
        self.after.append(self.everything())

    def everything(self) -> dict[str, Any]:
        """A copy of all that a step may change."""
        plugin = self.precision if isinstance(self.precision, AmpPrecision) else None
        optimizer = self.trainer.optimizers[0]
        return copy.deepcopy({
            "weights": [p.detach() for p in self.model.parameters()],
            "masters": [m.detach() for m in plugin._masters.values()] if plugin else [],
            "moments": [state[key] for state in optimizer.state.values() for key in sorted(state)],
            "scale": plugin.scaler.get_scale() if plugin and plugin.scaler else None,
        })  # fmt: skip

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if isinstance(self.precision, AmpPrecision):
            checkpoint["state_dict"] = self.precision.exact_state(self)


def trainer_of(level: str | None, dtype: str = "fp16", **kwargs: Any) -> lightning.Trainer:
    settings = {"max_epochs": 1, "enable_checkpointing": False} | kwargs
    return make_trainer(make_args(device_id=-1), Devices("cpu", -1, level, TYPES[dtype]), **settings)


def train(
    level: str | None, dtype: str = "fp16", n: int = 6, model: type[nn.Module] | nn.Module = Toy,
    spoil: dict[int, float] | None = None, lr: float = 1e-2, growth: int | None = None,
    data: list[dict[str, Tensor]] | None = None, **kwargs: Any,
) -> Watched:  # fmt: skip
    torch.manual_seed(0)
    watched = Watched(model() if isinstance(model, type) else model, lr, spoil)
    trainer = trainer_of(level, dtype, **kwargs)
    if growth is not None:
        trainer.precision_plugin.scaler.set_growth_interval(growth)
    trainer.fit(watched, DataLoader(data or batches(n), batch_size=None))
    return watched


def same(one: dict[str, Any], other: dict[str, Any], *keys: str) -> bool:
    return all(
        len(one[key]) == len(other[key]) and all(torch.equal(a, b) for a, b in zip(one[key], other[key], strict=True))
        for key in keys
    )


def representable(tensor: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(tensor.to(dtype).float(), tensor)


# ---- types


@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
@pytest.mark.parametrize("model", [Toy, Funnel])
def test_what_is_kept_in_which_type(level: str, dtype: str, model: type[nn.Module]) -> None:
    half = TYPES[dtype]
    watched = train(level, dtype, n=2, model=model)
    norms = {id(p) for m in watched.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    assert norms
    for name, parameter in watched.model.named_parameters():
        in_half = level == "O3" or (level == "O2" and id(parameter) not in norms)
        assert parameter.dtype == (half if in_half else torch.float32), name
    assert set(watched.logits) == {half}  # the work is done in half at every level
    optimizer = watched.trainer.optimizers[0]
    for group in optimizer.param_groups:
        assert {p.dtype for p in group["params"]} == {torch.float32}
    assert {v.dtype for state in optimizer.state.values() for v in state.values()} == {torch.float32}
    n_master = sum(p.dtype == half for p in watched.model.parameters())
    assert len(watched.precision._masters) == n_master
    assert (watched.precision.scaler is not None) == (dtype == "fp16" and level != "O3")


class OfTransformers(nn.Module):
    """With a norm that is none of torch's: it multiplies half by its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 8)
        self.norm = LlamaRMSNorm(8)
        self.outer = nn.Linear(8, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.outer(self.norm(self.table(ids).mean(dim=1)))


class Rms(OfTransformers):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(8)


@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize("model", [OfTransformers, Rms])
def test_norms_of_every_kind_stay_fp32_in_o2(model: type[nn.Module], dtype: str) -> None:
    watched = train("O2", dtype, n=2, model=model)
    types = {name: parameter.dtype for name, parameter in watched.model.named_parameters()}
    assert types.pop("norm.weight") == torch.float32
    assert {*types.values(), *watched.logits} == {TYPES[dtype]}


def test_masters_are_finer_than_the_weights_in_o2_and_not_in_o3() -> None:
    """What is added to a weight is often less than its last digit in fp16."""
    watched = train("O2", n=3)
    pairs = list(watched.precision._masters.items())
    assert len(pairs) == 5  # all but the two of the norm
    assert not all(representable(master.detach(), torch.float16) for _, master in pairs)
    for weight, master in pairs:
        assert torch.equal(weight.detach(), master.detach().half())
    assert all(master.numel() == 0 for master in train("O3", n=3).precision._masters.values())  # nothing is kept


class Constant(nn.Module):
    """Logits that do not depend on the ids; weights that start at 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, ids: Tensor) -> Tensor:
        logit = self.weight.sum().expand(len(ids))
        return torch.stack([logit, -logit], dim=1)


def test_masters_learn_what_half_weights_cannot() -> None:
    """A step of 1e-5 from 1 rounds to no step in fp16; many of them reach a master, and from it the weight."""
    data = [batch | {"labels": torch.ones(8, dtype=torch.long)} for batch in batches(60)]
    kept, lost = (train(level, model=Constant, lr=1e-5, data=data) for level in ("O2", "O3"))
    (master,) = kept.precision._masters.values()
    torch.testing.assert_close(master.detach(), torch.full((4,), 1 - 60e-5), atol=1e-4, rtol=0)
    assert (kept.model.weight < 1).all()
    assert (lost.model.weight == 1).all()


# ---- as fp32, within what half precision allows

# The largest difference of a loss from that of fp32, in 40 steps from 0.86 down to 0.25 (Toy) and 0.01 (Funnel).
# Measured, the worst of O1, O2 and O3 (which is O3): fp16 0.0007, bf16 0.010.
TOLERANCE = {"fp16": 0.005, "bf16": 0.05}


@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
@pytest.mark.parametrize("model", [Toy, Funnel])
def test_the_loss_curve_is_that_of_fp32(level: str, dtype: str, model: type[nn.Module]) -> None:
    data = batches(4) * 10
    exact = train(None, model=model, data=data)
    watched = train(level, dtype, model=model, data=data)
    difference = (torch.tensor(watched.losses) - torch.tensor(exact.losses)).abs().max()
    assert exact.losses[-1] < 0.4  # it learns
    assert 0 < difference < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", list(TYPES))
def test_o0_is_fp32_to_the_last_bit(dtype: str) -> None:
    exact = train(None)
    assert Devices("cpu", -1, "O0", TYPES[dtype]).plugin() is None
    torch.manual_seed(0)
    watched = Watched(Toy())
    plugin = AmpPrecision("O0", TYPES[dtype], "cpu")
    trainer_of(None, plugins=[plugin]).fit(watched, DataLoader(batches(6), batch_size=None))
    assert watched.precision is plugin
    assert watched.losses == exact.losses
    assert same(watched.everything(), exact.everything(), "weights", "moments")


# ---- a step that is skipped


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("model", [Toy, Funnel])
def test_an_infinite_gradient_skips_exactly_its_step(level: str, bad: float, model: type[nn.Module]) -> None:
    watched = train(level, n=5, model=model, spoil={2: bad})
    before, skipped, later = watched.after[1:4]
    assert same(before, skipped, "weights", "masters", "moments")
    assert not same(skipped, later, "weights")
    assert not same(skipped, later, "moments")
    assert (level == "O1") == (skipped["masters"] == [])
    assert [after["scale"] for after in watched.after] == [2.0**16, 2.0**16, 2.0**15, 2.0**15, 2.0**15]
    assert watched.precision.skipped == 1
    # It goes on as a run that never had the batch, but for the digits that the other scale gives.
    torch.manual_seed(0)
    without = Watched(model())
    data = batches(5)
    trainer_of(level).fit(without, DataLoader(data[:2] + data[3:], batch_size=None))
    assert torch.tensor(without.losses).sub(torch.tensor(watched.losses[:2] + watched.losses[3:])).abs().max() < 1e-3


def test_without_scaling_an_infinite_gradient_is_not_hidden() -> None:
    """bf16 and O3 have no scale: what is wrong shows in the loss, which stops a run."""
    for level, dtype in (("O2", "bf16"), ("O3", "fp16")):
        assert not torch.tensor(train(level, dtype, n=4, spoil={1: float("nan")}).losses[3]).isfinite()


def test_the_scale_doubles_after_good_steps() -> None:
    watched = train("O2", n=8, growth=3, spoil={4: float("inf")})
    scales = [after["scale"] / 2**16 for after in watched.after]
    assert scales == [1, 1, 2, 2, 1, 1, 1, 2]  # the bad step starts the count anew
    assert train("O2", n=1).precision.scaler.get_growth_interval() == 2000


def test_small_gradients_survive_by_the_scale() -> None:
    """1e-9 is 0 in fp16. Scaled by 2^16 it is not; unscaled again it is 1e-9."""

    class Faint(Toy):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * 1e-7

    scaled, plain = (train(level, n=1, model=Faint) for level in ("O2", "O3"))
    exact = train(None, n=1, model=Faint)
    assert float(scaled.norms[0]) == pytest.approx(exact.norms[0], rel=0.05)
    assert plain.norms[0] < 0.5 * exact.norms[0]


def test_a_scale_that_collapses_ends_the_run() -> None:
    with pytest.raises(InputError, match=r"^27 steps had gradients .*Lower --lr, or give --bf16.*, or --amp_opt=O1\.$"):
        train("O2", n=40, spoil=dict.fromkeys(range(40), float("inf")))
    with pytest.raises(InputError, match=r"or give --bf16 in place of --fp16\.$"):
        train("O1", n=40, spoil=dict.fromkeys(range(40), float("inf")))


# ---- clipping and accumulation


@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
def test_gradients_are_clipped_after_they_are_unscaled(level: str, dtype: str) -> None:
    free = train(None, n=3)
    limit = free.norms[0] / 4
    exact = train(None, n=3, gradient_clip_val=limit)
    clipped = train(level, dtype, n=3, gradient_clip_val=limit)
    assert clipped.norms == pytest.approx([limit] * 3, rel=1e-3)
    for one, other in zip(clipped.grads[0], exact.grads[0], strict=True):
        torch.testing.assert_close(one, other, atol=0.02 * limit, rtol=0)
    loose = train(level, dtype, n=3, gradient_clip_val=4 * max(free.norms))  # scaled, they would be far above it
    assert loose.norms == pytest.approx(free.norms, rel=0.02)


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
def test_batches_of_a_step_are_added_up(level: str) -> None:
    watched = train(level, n=6, accumulate_grad_batches=3)
    exact = train(None, n=6, accumulate_grad_batches=3)
    assert len(watched.grads) == 2
    for one, other in zip(watched.grads[0], exact.grads[0], strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=0.01)
    assert not torch.allclose(exact.grads[0][1], train(None, n=1).grads[0][1], atol=1e-3)  # nor is it the first alone
    first, second, third, fourth = watched.after[:4]
    assert same(first, second, "weights", "masters")
    assert not same(second, third, "weights")
    assert same(third, fourth, "weights", "masters", "moments")


def test_one_bad_batch_skips_the_whole_step() -> None:
    watched = train("O2", n=6, accumulate_grad_batches=3, spoil={4: float("inf")})
    assert same(watched.after[2], watched.after[5], "weights", "masters", "moments")
    assert watched.precision.skipped == 1


# ---- which parameters have masters


class Tied(Toy):
    """The table is also the output, and one norm is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.table
        self.out_weight = self.table.weight
        self.outer = nn.Linear(16, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return (super().forward(ids) @ self.out_weight.t())[:, :2]


def test_a_tied_weight_has_one_master() -> None:
    watched = train("O2", n=3, model=Tied)
    assert len(watched.precision._masters) == 5
    state = watched.precision.exact_state(watched)
    master = watched.precision._masters[watched.model.table.weight]
    for name in ("model.table.weight", "model.again.weight", "model.out_weight"):
        assert torch.equal(state[name], master)
    assert not representable(master.detach(), torch.float16)


def test_masters_start_as_the_weights_that_were_given() -> None:
    """Also where a weight is met twice: the second time it is half already."""
    model = Tied()
    exact = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    plugin = AmpPrecision("O2", torch.bfloat16, "cpu")
    plugin.convert_module(model)
    for name, parameter in model.named_parameters():
        master = plugin._masters.get(parameter, parameter)
        assert torch.equal(master.detach(), exact[name]), name


@pytest.mark.parametrize("level", [None, "O1", "O2", "O3"])
def test_what_has_no_gradient_in_a_step_stays(level: str | None) -> None:
    """The gradient of the step before is not used again."""

    class Sometimes(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(2, 2)
            self.calls = 0

        def forward(self, ids: Tensor) -> Tensor:
            self.calls += 1
            logits = super().forward(ids)
            return self.extra(logits) if self.calls == 1 else logits

    watched = train(level, n=3, model=Sometimes)
    index = [name for name, _ in watched.model.named_parameters()].index("extra.weight")
    first, second, third = (after["weights"][index] for after in watched.after)
    assert torch.equal(first, second)
    assert torch.equal(second, third)


def test_what_does_not_learn_stays_and_is_saved_exactly() -> None:
    model = Toy()
    model.table.weight.requires_grad_(False)
    before = model.table.weight.clone()
    watched = train("O2", n=3, model=model)
    assert torch.equal(model.table.weight, before.half())
    assert torch.equal(watched.precision.exact_state(model)["table.weight"], before)


def test_buffers_follow_but_for_those_of_norms_and_whole_numbers() -> None:
    class Buffered(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("real", torch.ones(2))
            self.register_buffer("whole", torch.ones(2, dtype=torch.long))
            self.batch_norm = nn.BatchNorm1d(3)

    plugin = AmpPrecision("O2", torch.bfloat16, "cpu")
    model = plugin.convert_module(Buffered())
    assert (model.real.dtype, model.whole.dtype) == (torch.bfloat16, torch.int64)
    assert model.batch_norm.running_mean.dtype == model.batch_norm.weight.dtype == torch.float32


# ---- checkpoints


@pytest.mark.parametrize(("level", "dtype"), [("O1", "fp16"), ("O2", "fp16"), ("O2", "bf16"), ("O3", "fp16")])
def test_a_checkpoint_holds_the_masters_and_resumes_bit_for_bit(level: str, dtype: str, tmp_path: Path) -> None:
    """Weights, masters, moments and the scale; the scale has been halved once before and is to double once after."""
    growth = 4 if dtype == "fp16" and level != "O3" else None
    spoil = {1: float("inf")} if growth else {}
    whole = train(level, dtype, n=9, growth=growth, spoil=spoil, model=Funnel)

    path = tmp_path / "cut.ckpt"
    cut = train(level, dtype, n=4, growth=growth, spoil=spoil, model=Funnel, plugins=[WholeCheckpoints()])
    cut.trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert {value.dtype for value in saved["state_dict"].values()} == {torch.float32}
    if level == "O2":
        for name, parameter in cut.named_parameters():
            expected = cut.precision._masters.get(parameter, parameter)
            assert torch.equal(saved["state_dict"][name], expected.detach()), name
        assert not all(representable(value, TYPES[dtype]) for value in saved["state_dict"].values())
    if growth:
        assert saved["AmpPrecision"]["scaler"]["scale"] == 2.0**15
        assert saved["AmpPrecision"]["skipped"] == 1

    torch.manual_seed(9)  # a new process knows nothing of the old one
    resumed = Watched(Funnel())
    trainer = trainer_of(level, dtype, plugins=[WholeCheckpoints()], max_epochs=2)
    trainer.fit(resumed, DataLoader(batches(9)[4:], batch_size=None), ckpt_path=path, weights_only=True)
    assert resumed.losses == whole.losses[4:]
    one, other = resumed.everything(), whole.everything()
    assert same(one, other, "weights", "masters", "moments")
    assert one["scale"] == other["scale"] == (2.0**16 if growth else None)
    if growth:
        assert resumed.precision.skipped == 1


# ---- mistakes


def test_unknown_levels_and_types() -> None:
    with pytest.raises(InputError, match="amp_opt must be one of O0, O1, O2, O3; got 'O4'"):
        AmpPrecision("O4", torch.float16, "cpu")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"dtype must be .*; got torch\.float64"):
        AmpPrecision("O1", torch.float64, "cpu")


def test_what_it_is_called() -> None:
    assert str(AmpPrecision("O2", torch.float16, "cpu")) == "fp16 O2"
    assert str(AmpPrecision("O1", torch.bfloat16, "cpu")) == "bf16 O1"
    assert (
        Devices("cpu", -1, None, torch.float16).precision == Devices("cpu", -1, "O0", torch.float16).precision == "fp32"
    )
    assert Devices("cpu", -1, "O3", torch.float16).precision == "fp16 O3"
