"""Masks: what gets one, how many weights it leaves on, and that what is off stays exactly 0."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from funneltfm.errors import InputError
from funneltfm.sparse.config import SparsityConfig
from funneltfm.sparse.masks import (
    apply_masks,
    attach,
    attach_masks,
    candidates,
    densities,
    detach,
    fingerprint,
    keep_masks,
    lot,
    reset_moments,
    sparse_weights,
    zero_off,
)
from funneltfm.sparse.patterns import Pattern

Make = Callable[..., nn.Module]


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    return {weight.name: weight.mask.clone() for weight in sparse_weights(model)}


def same_masks(a: nn.Module, b: nn.Module) -> bool:
    first, second = masks_of(a), masks_of(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def assert_off_is_zero(model: nn.Module) -> None:
    for weight in sparse_weights(model):
        off = weight.weight.detach()[~weight.mask]
        assert torch.equal(off, torch.zeros_like(off)), weight.name
        assert not off.signbit().any(), weight.name


# ---- what can be sparse


def test_what_can_be_sparse_in_bert(bert: Make) -> None:
    names = [weight.name for weight in candidates(bert())]
    layers = [name for name in names if ".encoder." in name]
    assert len(layers) == 2 * 6
    assert set(names) - set(layers) == {
        "bert.embeddings.word_embeddings.weight",
        "cls.predictions.transform.dense.weight",
    }


def test_what_can_be_sparse_in_a_funnel(funnel: nn.Module) -> None:
    names = {weight.name for weight in candidates(funnel)}
    first = {f"attn_layers.0.{name}" for name in ("q_head.weight", "k_head.weight", "v_head.weight", "r_kernel")}
    assert first | {"input_layer.0.lookup_table", "pffn_layers.1.pffn.3.weight"} <= names
    assert not any("bias" in name or "norm" in name or "seg_embed" in name for name in names)


def test_convolutions_and_torch_s_own_attention() -> None:
    model = nn.ModuleDict(
        {"conv": nn.Conv1d(4, 6, 3), "attention": nn.MultiheadAttention(8, 2), "norm": nn.LayerNorm((3, 4))}
    )
    assert [weight.name for weight in candidates(model)] == [
        "conv.weight", "attention.in_proj_weight", "attention.out_proj.weight",
    ]  # fmt: skip


def test_conv1d_of_transformers_has_its_inputs_first() -> None:
    gpt = pytest.importorskip("transformers.pytorch_utils")
    model = nn.Sequential(gpt.Conv1D(6, 4))
    attach(model, SparsityConfig(sparsity=0.5, pattern="constant_fan_in"))
    (weight,) = sparse_weights(model)
    assert (weight.rows, weight.columns) == (6, 4)
    assert weight.mask.sum(dim=0).tolist() == [2] * 6


def test_selecting_nothing_names_what_there_is() -> None:
    with pytest.raises(InputError, match=r"select no weight of the model.*: 0\.weight, 2\.weight"):
        attach(mlp(), SparsityConfig(sparsity=0.5, include=["encoder.*"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"include": ["*0.*", "qurey*"]},
            r"include has the glob 'qurey\*', which fits none of the 2 names .* 0\.weight",
        ),
        ({"exclude": ["qurey*"]}, r"exclude has the glob 'qurey\*', which fits none of the 4 names"),
        ({"distribution": {"0.*": 0.2, "*qurey*": 0.5}}, r"distribution has the glob '\*qurey\*'"),
        ({"distribution": {"0.*": 0.2}, "exclude": ["0.*"]}, r"distribution has the glob '0\.\*'"),  # of no effect
    ],
)
def test_a_glob_that_fits_nothing_is_named(settings: dict[str, Any], message: str) -> None:
    model = mlp()
    with pytest.raises(InputError, match=message):
        attach(model, SparsityConfig(sparsity=0.5, **settings))
    assert not sparse_weights(model)


def test_what_is_dense_anyway_can_be_excluded() -> None:
    attach(model := mlp(), SparsityConfig(sparsity=0.5, exclude=["*bias"]))
    assert len(sparse_weights(model)) == 2


def test_a_model_is_made_sparse_once() -> None:
    model = mlp()
    attach(model, SparsityConfig(sparsity=0.5))
    with pytest.raises(InputError, match="sparse already"):
        attach(model, SparsityConfig(sparsity=0.5))


def test_buffers_that_only_look_like_masks_are_none() -> None:
    model = mlp()
    model[0].register_buffer("weight_mask", torch.ones(3, dtype=torch.bool))
    model[2].register_buffer("weight_mask", torch.ones(4, 16))
    assert sparse_weights(model) == []


# ---- density

PATTERNS: list[dict[str, Any]] = [
    {"sparsity": 0.8},
    {"sparsity": 0.8, "distribution": "erk"},
    {"sparsity": 0.8, "init": "magnitude"},
    {"sparsity": 0.75, "pattern": "constant_fan_in"},
    {"sparsity": 0.75, "pattern": "4x1"},
    {"sparsity": 0.75, "pattern": "4x2", "init": "magnitude"},
    {"sparsity": 0.75, "pattern": "16x16"},
    {"pattern": "2:4"},
    {"pattern": "1:4", "init": "magnitude"},
]


@pytest.mark.parametrize("settings", PATTERNS, ids=str)
def test_density_is_exact(settings: dict[str, Any], bert: Make) -> None:
    model = bert()
    config = SparsityConfig(**settings)
    pattern = Pattern(config.pattern)
    attach(model, config)
    found = densities(model)
    if config.distribution == "erk":
        assert found.sparse.on == round((1 - config.wanted) * found.sparse.size)
    else:
        for weight in sparse_weights(model):
            units = weight.units_on(pattern)
            assert (units.sum(dim=1) == round((1 - config.wanted) * units.size(1))).all(), weight.name
    assert_off_is_zero(model)


@pytest.mark.parametrize("sparsity", [0.8, 0.85, 0.9])
@pytest.mark.parametrize("distribution", ["uniform", "erk", "global"])
def test_the_whole_model_hits_the_target(sparsity: float, distribution: str, bert: Make) -> None:
    model = bert()
    init = "magnitude" if distribution == "global" else "random"
    attach(
        model,
        SparsityConfig(sparsity=sparsity, count="model", embeddings=True, distribution=distribution, init=init),
    )
    found = densities(model).model
    assert found.size == sum(parameter.numel() for parameter in model.parameters())
    assert found.on == round((1 - sparsity) * found.size)


def test_global_takes_the_largest_of_all() -> None:
    model = mlp()
    attach(model, SparsityConfig(sparsity=0.7, distribution="global", init="magnitude"))
    before = torch.cat([mlp()[i].weight.detach().abs().flatten() for i in (0, 2)])
    on = torch.cat([weight.mask.flatten() for weight in sparse_weights(model)])
    assert int(on.sum()) == round(0.3 * on.numel())
    assert before[on].min() > before[~on].max()


def test_magnitude_takes_the_largest_of_each() -> None:
    model = mlp()
    attach(model, SparsityConfig(sparsity=0.5, init="magnitude"))
    for i in (0, 2):
        weight, mask = mlp()[i].weight.detach().abs(), model[i].weight_mask
        assert weight[mask].min() > weight[~mask].max()


def test_begin_dense() -> None:
    model = mlp()
    attach(model, SparsityConfig(sparsity=0.9, init="dense"))
    assert densities(model).sparse.mask_density == 1.0
    with pytest.raises(InputError, match="the whole model cannot have"):  # it is known before training
        attach(mlp(), SparsityConfig(sparsity=0.95, init="dense", count="model", include=["0.*"]))


@pytest.mark.parametrize("model", ["funnel", "bert"])
def test_constant_fan_in_counts_inputs(model: str, funnel: nn.Module, bert: Make) -> None:
    net = funnel if model == "funnel" else bert()
    attach(net, SparsityConfig(sparsity=0.75, pattern="constant_fan_in"))
    if model == "funnel":  # d_model 8 -> (2 heads, 4), and back
        assert (net.attn_layers[0].q_head.weight_mask.sum(dim=0) == 2).all()
        assert (net.attn_layers[0].post_proj.weight_mask.sum(dim=(0, 1)) == 2).all()
        assert (net.attn_layers[0].r_kernel_mask.sum(dim=0) == 2).all()
    else:
        assert (net.bert.encoder.layer[0].output.dense.weight_mask.sum(dim=1) == 16).all()


def test_what_grew_is_on_and_zero() -> None:
    model = mlp()
    attach(model, SparsityConfig(sparsity=0.5))
    with torch.no_grad():
        model[0].weight[model[0].weight_mask] = 0
    found = densities(model)
    assert found.weights["0.weight"].on == 64
    assert found.weights["0.weight"].nonzero == 0
    assert found.sparse.mask_density == 0.5 > found.sparse.nonzero_density


def test_a_dense_model_is_dense() -> None:
    found = densities(mlp())
    assert found.weights == {}
    assert found.sparse.mask_density == found.sparse.nonzero_density == found.model.mask_density == 1.0


# ---- tied weights, names, seeds


def test_a_tied_table_has_one_mask_and_stays_tied(bert: Make) -> None:
    model = bert()
    attach(model, SparsityConfig(sparsity=0.8, embeddings=True))
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert not hasattr(model.cls.predictions.decoder, "weight_mask")
    assert model.bert.embeddings.word_embeddings.weight_mask.sum() == round(0.2 * 60 * 32)


def test_a_tied_table_is_an_embedding_wherever_it_is_met_first() -> None:
    model = nn.ModuleDict({"decoder": nn.Linear(8, 20, bias=False), "table": nn.Embedding(20, 8)})
    model["decoder"].weight = model["table"].weight
    with pytest.raises(InputError, match="select no weight"):
        attach(model, SparsityConfig(sparsity=0.5))
    (weight,) = attach(model, SparsityConfig(sparsity=0.5, embeddings=True))
    assert (weight.name, weight.aliases) == ("table.weight", ("decoder.weight", "table.weight"))


def test_keys_are_those_of_the_dense_model_and_the_masks(bert: Make) -> None:
    dense, sparse = bert(), bert()
    weights = attach(sparse, SparsityConfig(sparsity=0.8))
    assert sparse.state_dict().keys() == dense.state_dict().keys() | {f"{weight.name}_mask" for weight in weights}
    detach(sparse)
    assert sparse.state_dict().keys() == dense.state_dict().keys()


def test_a_lot_depends_on_its_seed_and_name_alone() -> None:
    config = SparsityConfig(sparsity=0.7, seed=3)
    first, second, other = mlp(), mlp(1), mlp()
    attach(first, config)
    torch.rand(100)
    attach(second, config)
    attach(other, SparsityConfig(sparsity=0.7, seed=4))
    assert same_masks(first, second)
    assert fingerprint(sparse_weights(first)) == fingerprint(sparse_weights(second))
    assert not same_masks(first, other)
    assert fingerprint(sparse_weights(first)) != fingerprint(sparse_weights(other))
    assert not torch.equal(lot((9,), 0, 1, "a"), lot((9,), 0, 2, "a"))
    assert not torch.equal(lot((9,), 0, 1, "a"), lot((9,), 0, 1, "b"))


def test_rescaling_keeps_the_variance_of_outputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4000, 50, bias=False))
    x = torch.randn(200, 4000)
    before = model(x).std().item()
    plain = copy.deepcopy(model)
    attach(model, SparsityConfig(sparsity=0.8, rescale=True))
    attach(plain, SparsityConfig(sparsity=0.8))
    assert model(x).std().item() == pytest.approx(before, rel=0.05)
    assert plain(x).std().item() == pytest.approx(before * 0.2**0.5, rel=0.05)
    assert torch.allclose(model[0].weight, plain[0].weight * 0.2**-0.5)


def test_masks_travel_in_the_state_dict() -> None:
    first, second = mlp(), mlp(1)
    attach(first, SparsityConfig(sparsity=0.8, seed=1))
    with pytest.raises(RuntimeError, match="weight_mask"):  # a dense model does not lose them silently
        second.load_state_dict(first.state_dict())
    attach(second, SparsityConfig(sparsity=0.8, seed=2))
    second.load_state_dict(first.state_dict())
    assert same_masks(first, second)
    assert_off_is_zero(second)


def test_masks_that_are_there_already() -> None:
    first, second = mlp(), mlp(1)
    attach(first, SparsityConfig(sparsity=0.8))
    attach_masks(second, masks_of(first))
    assert same_masks(first, second)
    assert_off_is_zero(second)
    with pytest.raises(InputError, match=r"mask of 1\.weight .* does not fit the model: no such weight"):
        attach_masks(second, {"1.weight": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(InputError, match=r"does not fit the model: shape \(16, 8\)"):
        attach_masks(second, {"0.weight": torch.ones(2, 2, dtype=torch.bool)})


def test_a_copy_has_masks_of_its_own() -> None:
    model = mlp()
    attach(model, SparsityConfig(sparsity=0.8))
    other = copy.deepcopy(model)
    other[0].weight_mask.fill_(True)
    assert model[0].weight_mask.sum() == 26


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zero_is_zero_and_the_rest_keeps_its_bits(dtype: torch.dtype) -> None:
    values = [-1.5, float("nan"), float("inf"), -float("inf"), -0.0, 3e-7, 65504.0, 1.0]
    x = torch.tensor([values, values], dtype=dtype).t()  # not contiguous
    before, mask = x.clone(), torch.tensor([[True] * 8, [False] * 8]).t()
    zero_off(x, mask)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    assert torch.equal(x[mask].view(integers), before[mask].view(integers))
    assert not x[~mask].view(integers).any()


def test_a_mask_heals_what_is_no_number() -> None:
    model = mlp()
    attach(model, SparsityConfig(sparsity=0.8))
    with torch.no_grad():
        model[0].weight[~model[0].weight_mask] = float("nan")
    apply_masks(sparse_weights(model))
    assert_off_is_zero(model)


# ---- training with a loop of one's own

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "adamax": lambda p: torch.optim.Adamax(p, 0.01),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.01),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.01),
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - x[:, :4]).square().mean()
        loss.backward()
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_off_weights_stay_zero_under_every_optimizer(name: str) -> None:
    model = mlp()
    attach(model, SparsityConfig(sparsity=0.8))
    optimizer = OPTIMIZERS[name](model.parameters())
    handles = keep_masks(optimizer, sparse_weights(model))
    before = model[0].weight.detach().clone()
    for _ in range(10):
        step(model, optimizer, torch.randn(6, 8))
        assert_off_is_zero(model)
    assert not torch.equal(model[0].weight, before)
    for handle in handles:
        handle.remove()
    if name != "lbfgs":
        step(model, optimizer, torch.randn(6, 8))
        assert model[0].weight[~model[0].weight_mask].any()


def test_a_masked_layer_is_a_dense_one_with_an_explicit_mask() -> None:
    masked, explicit = mlp(), mlp()
    attach(masked, SparsityConfig(sparsity=0.7))
    masks = [masked[0].weight_mask.float(), masked[2].weight_mask.float()]

    def forward(x: Tensor) -> Tensor:
        h = torch.tanh(nn.functional.linear(x, explicit[0].weight * masks[0], explicit[0].bias))
        return nn.functional.linear(h, explicit[2].weight * masks[1], explicit[2].bias)

    optimizers = [torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.0) for model in (masked, explicit)]
    keep_masks(optimizers[0], sparse_weights(masked))
    torch.manual_seed(1)
    for _ in range(30):
        x = torch.randn(6, 8)
        losses = [(run(x) - x[:, :4]).square().mean() for run in (masked, forward)]
        assert torch.equal(losses[0], losses[1])
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert torch.equal(masked[0].weight, explicit[0].weight * masks[0])


# ---- what an optimizer remembers


@pytest.mark.parametrize("grown", ["zero", "mean"])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw foreach", "adamw fused", "rmsprop", "adagrad"])
def test_moments_of_what_changed_are_reset_and_no_others(name: str, grown: str) -> None:
    model = mlp()
    (weight,) = attach(model, SparsityConfig(sparsity=0.5, include=["0.*"]))
    optimizer = OPTIMIZERS[name](model.parameters())
    keep_masks(optimizer, [weight])
    for _ in range(3):
        step(model, optimizer, torch.randn(6, 8))
    old = weight.mask.clone()
    new = old.clone()
    new[0, :4], new[1, :4] = False, True
    before = copy.deepcopy(optimizer.state)
    states = {id(p): copy.deepcopy(optimizer.state[p]) for p in model.parameters()}
    reset_moments(optimizer, weight.weight, old, new, grown)
    assert len(before) == 4
    changed = old ^ new
    assert changed.any()
    for parameter in model.parameters():
        for key, value in optimizer.state[parameter].items():
            was = states[id(parameter)][key]
            if parameter is not weight.weight or not isinstance(value, Tensor) or value.shape != old.shape:
                assert value is None or torch.equal(torch.as_tensor(value), torch.as_tensor(was)), key
                continue
            assert torch.equal(value[~changed], was[~changed]), key
            assert not value[old & ~new].any(), key
            mean = was[old & new].mean() if grown == "mean" and ("sq" in key or key in ("square_avg", "sum")) else 0.0
            assert (value[new & ~old] == float(mean)).all(), key


@pytest.mark.parametrize("hidden", [False, True])
def test_moments_in_8_bits_cannot_be_reset(hidden: bool) -> None:
    """Code 0 is the most negative number. bitsandbytes has its state in a dict of its own, or beside the others'."""
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = torch.optim.SGD([weight], 0.1)
    codes = {"state1": torch.full((4, 4), 127, dtype=torch.uint8)}
    optimizer.state[weight] = {"__state__": codes} if hidden else codes
    old, new = torch.eye(4, dtype=torch.bool), torch.ones(4, 4, dtype=torch.bool)
    with pytest.raises(InputError, match="SGD keeps moments as 8-bit codes"):
        reset_moments(optimizer, weight, old, new)
    assert (codes["state1"] == 127).all()


def test_moments_of_rows_and_columns_stay() -> None:
    optimization = pytest.importorskip("transformers.optimization")
    weight = nn.Parameter(torch.ones(4, 6))
    optimizer = optimization.Adafactor([weight], 0.1, beta1=0.9, relative_step=False)
    weight.grad = torch.arange(1.0, 25).view(4, 6)
    optimizer.step()
    before = copy.deepcopy(optimizer.state[weight])
    old, new = torch.zeros(4, 6, dtype=torch.bool), torch.zeros(4, 6, dtype=torch.bool)
    old[0], new[0], new[1, 2], old[0, 5] = True, True, True, False
    reset_moments(optimizer, weight, old, new, "mean")
    after = optimizer.state[weight]
    for name in ("exp_avg_sq_row", "exp_avg_sq_col"):
        assert torch.equal(after[name], before[name])
    assert torch.equal(after["exp_avg"], before["exp_avg"].masked_fill(old ^ new, 0))
