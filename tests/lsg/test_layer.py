"""Layers whose products are oneDNN's, against the same layers as transformers computes them."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from funneltfm.lsg import layer
from funneltfm.lsg.models import MODEL_TYPES

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")),
    reason="layers are fused where torch has oneDNN and the CPU has AVX",
)


@pytest.fixture
def products(monkeypatch):
    """The fused products that were computed; models may be as small as they like."""
    done = []

    def counted(x, *args, original=layer._product, **kwargs):
        done.append(x.shape)
        return original(x, *args, **kwargs)

    monkeypatch.setattr(layer, "_product", counted)
    monkeypatch.setattr(layer, "SMALLEST", 1)
    return done


def own_way(model, inputs):
    """Hidden states as transformers' layers compute them."""
    core = model.get_encoder() if model.config.is_encoder_decoder else model
    with torch.enable_grad():
        return core(**inputs).last_hidden_state.detach()


@torch.no_grad()
def run(model, inputs, **kwargs):
    core = model.get_encoder() if model.config.is_encoder_decoder else model
    return core(**inputs, **kwargs).last_hidden_state


def close(got, want, inputs):
    valid = inputs["attention_mask"].bool()
    valid = nn.functional.pad(valid, (want.shape[1] - valid.shape[1], 0), value=True)
    torch.testing.assert_close(got[valid], want[valid], rtol=0, atol=1e-5 * max(1, want.abs().max().item()))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_outputs_are_those_of_transformers(model_type, side, tiny, texts, products, monkeypatch):
    monkeypatch.setattr(layer, "PIECE", 20)
    model, inputs = tiny(model_type), texts(45, 6, side)
    got = run(model, inputs)
    assert len(products) == 2 * (4 + 2 * 5)  # 94 rows in pieces of about 20
    assert len({shape[0] for shape in products if len(shape) == 2}) <= 2  # of nearly one size
    close(got, own_way(model, inputs), inputs)


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_python", "relu", "silu", "tanh"])
@pytest.mark.parametrize("model_type", ["bert", "albert", "distilbert", "bart", "pegasus"])
def test_any_activation(model_type, name, tiny, texts, products, base_config, monkeypatch):
    key = {"distilbert": "activation", "bart": "activation_function", "pegasus": "activation_function"}
    key = key.get(model_type, "hidden_act")
    monkeypatch.setitem(tiny.__globals__["OWN"], model_type, tiny.__globals__["OWN"].get(model_type, {}) | {key: name})
    model, inputs = tiny(model_type), texts(45)
    assert getattr(model.config, key) == name
    got = run(model, inputs)
    assert products
    close(got, own_way(model, inputs), inputs)


def test_sizes_at_which_it_is_worth_it(tiny, texts, monkeypatch, products):
    monkeypatch.setattr(layer, "SMALLEST", 256)
    shape = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512, "max_position_embeddings": 600}
    monkeypatch.setitem(tiny.__globals__["OWN"], "roberta", shape)
    model = tiny("roberta")
    for inputs, fused in ((texts(400), True), (texts(100, batch=1), False), (texts(140, batch=2), True)):
        products.clear()
        got = run(model, inputs)
        assert bool(products) == fused
        close(got, own_way(model, inputs), inputs)
    products.clear()
    run(tiny("bert"), texts(200))
    assert not products


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_short_texts_are_the_base_model_s(model_type, tiny, texts, products):
    model = tiny(model_type, exact_short=True)
    inputs = texts(16)
    assert torch.equal(run(model, inputs), own_way(model, inputs))
    assert not products


def hooked(model, seen):
    module = next(module for module in model.modules() if type(module) is nn.Linear and module.out_features == 20)
    module.register_forward_hook(lambda *args: seen.append("called"))


def hooked_before(model, seen):
    model.get_submodule("encoder.layer.1.attention.self").register_forward_pre_hook(lambda *args: seen.append("called"))


def wrapped(model, seen):
    module = model.get_submodule("encoder.layer.0.output")
    forward = module.forward
    module.forward = lambda *args: seen.append("called") or forward(*args)


def exchanged(model, seen):
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            seen.append("called")
            return self.base(x)

    attention = model.get_submodule("encoder.layer.0.attention.self")
    attention.query = Adapter(attention.query)


@pytest.mark.parametrize("change", [hooked, hooked_before, wrapped, exchanged])
def test_what_was_hung_on_a_module_happens(change, tiny, texts, products):
    model, inputs, seen = tiny("bert"), texts(45), []
    change(model, seen)
    run(model, inputs)
    assert seen
    assert len(products) == 6  # the other layer's


def test_hooks_on_all_modules_happen(tiny, texts, products):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *args: seen.append(type(module)))
    try:
        run(tiny("bert"), texts(45))
    finally:
        handle.remove()
    assert nn.Linear in seen
    assert not products


def test_counters_see_every_product(tiny, texts, products):
    model, inputs = tiny("bert").requires_grad_(False), texts(45)
    with FlopCounterMode(display=False) as counter:
        run(model, inputs)
    assert not products
    with FlopCounterMode(display=False) as other:
        own_way(model, inputs)
    assert counter.get_total_flops() == other.get_total_flops() > 0


def test_hidden_states_that_were_asked_for_once_cost_nothing_afterwards(tiny, texts, products):
    model, inputs = tiny("bert"), texts(45)
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    assert products
    for got, want in zip(states, model(**inputs, output_hidden_states=True).hidden_states, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)  # none was written over
    products.clear()
    run(model, inputs)
    assert len(products) == 12


def test_where_nothing_is_fused(tiny, texts, products):
    model, inputs = tiny("bert"), texts(45)
    own_way(model, inputs)  # there are gradients
    run(copy.deepcopy(model).train(), inputs)
    run(copy.deepcopy(model).to(torch.bfloat16), inputs)
    run(copy.deepcopy(model).double(), inputs)
    noisy = copy.deepcopy(model)
    for block in noisy.encoder.layer:
        block.output.dropout.train()
    assert not torch.equal(run(noisy, inputs), run(noisy, inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(model, inputs)
    torch.backends.mkldnn.enabled = False
    try:
        run(model, inputs)
    finally:
        torch.backends.mkldnn.enabled = True
    half = copy.deepcopy(model)
    half.encoder.layer.to(torch.bfloat16)
    with pytest.raises(RuntimeError):  # as transformers has it
        run(half, inputs)
    assert not products
    with torch.inference_mode():
        run(copy.deepcopy(model), inputs)
    assert len(products) == 12


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra"])
def test_causal_models(model_type, tiny, texts, products, monkeypatch):
    monkeypatch.setitem(
        tiny.__globals__["OWN"], model_type, tiny.__globals__["OWN"].get(model_type, {}) | {"is_decoder": True}
    )
    model, inputs = tiny(model_type), texts(45)
    got = run(model, inputs)
    assert products
    close(got, own_way(model, inputs), inputs)
