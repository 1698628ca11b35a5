"""LSG models against the reference outputs, and everything a model of transformers has to be able to do."""

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

import funneltfm  # noqa: F401  (the Auto classes learn our models)
from funneltfm.errors import InputError
from funneltfm.lsg import attention, layer, selection
from funneltfm.lsg.models import AUTO_CLASSES, MODEL_TYPES, auto_map, base_class, lsg_config, model_class

FIXTURES = Path(__file__).resolve().parents[3] / "shared/fixtures/lsg"
CASES = sorted(path.parent for path in FIXTURES.glob("*/*/case.json")) or [None]
SEQ2SEQ = [name for name, row in MODEL_TYPES.items() if row.is_encoder_decoder]
ENCODERS = [name for name in MODEL_TYPES if name not in SEQ2SEQ]


# ---- reference outputs


@pytest.fixture(params=CASES, ids=lambda path: path and f"{path.parent.name}-{path.name}")
def case(request, fixtures):
    return request.param


def load_case(folder, monkeypatch):
    """The case's model with the converted weights, its inputs by name, and what the original gave."""
    from safetensors.torch import load_file

    case = json.loads((folder / "case.json").read_text())
    keys = {key: value for key, value in case["lsg_config"].items() if value is not None}
    config = lsg_config(AutoConfig.from_pretrained(folder.parent / "base"), **keys)
    model = model_class(case["model"], case["arch"])(config).eval()
    left = model.load_state_dict(load_file(folder.parent / "lsg_weights.safetensors"), strict=False)
    assert not left.unexpected_keys
    assert not [key for key in left.missing_keys if key not in model.all_tied_weights_keys]
    model.tie_weights()
    inputs = {name: {} for name in case["inputs"]}
    for key, value in load_file(folder / "data.safetensors").items():
        name, _, rest = key.partition("/")
        inputs[name][rest] = value
    return case, model, inputs


def encode(model, x, monkeypatch):
    """The encoder's output, with the recorded projections for lsh."""
    numbers = sorted(int(key.removeprefix("lsh_proj_")) for key in x if key.startswith("lsh_proj_"))
    draws = iter([x[f"lsh_proj_{i}"] for i in numbers])
    monkeypatch.setattr(attention, "gaussian", lambda like, number: next(draws))
    core = getattr(model, model.base_model_prefix)
    core = core.get_encoder() if model.config.is_encoder_decoder else core
    return core(input_ids=x["input_ids"], attention_mask=x["attention_mask"]).last_hidden_state


def leaky(original):
    """The original's defect: with bos_pooling, groups of nothing but padding are seen, as means of what is there."""

    def select(query, key, value, visible, settings, draw):
        keys, values, seen = original(query, key, value, visible, settings, draw)
        if seen is None:
            return keys, values, None
        unmasked = original(query * 0, key, value, None, settings, draw)  # softmax of equal scores
        hidden = ~seen[..., None]
        return keys.where(~hidden, unmasked[0]), values.where(~hidden, unmasked[1]), None

    return select


def test_outputs_and_gradients_are_the_original_s(case, monkeypatch):
    _, model, inputs = load_case(case, monkeypatch)
    leaks = "bos_pooling" in case.name or case.name.startswith("lsh_b8_s4_f4")
    grads = inputs.pop("grad_len61_pad", None)
    if leaks:
        monkeypatch.setitem(selection.SELECTIONS, "bos_pooling", leaky(selection.select_bos_pooling))
        # Others leak from padding of the original's own making, and left45 also takes its weights from the padding.
        grads, inputs = None, {name: inputs[name] for name in ("short12", "eq2b16", "len40_pad", "len96_pad")}
    for name, x in inputs.items():
        want = x["encoder_last_hidden_state" if model.config.is_encoder_decoder else "last_hidden_state"]
        out = encode(model, x, monkeypatch)
        with torch.no_grad(), monkeypatch.context() as context:
            context.setattr(layer, "SMALLEST", 1)
            fused = encode(model, x, monkeypatch)
        assert out.shape == want.shape, name
        valid = x["attention_mask"].bool()
        valid = F.pad(valid, (out.shape[1] - valid.shape[1], 0), value=True)
        for got in (out, fused):
            torch.testing.assert_close(
                got[valid], want[valid], rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
            )
        if name == "len61_pad" and grads:
            (out * grads["grad_w"]).sum().backward()
    parameters = dict(model.named_parameters())
    for key, want in (grads or {}).items():
        if key.startswith("grad/"):
            got = parameters[key.removeprefix("grad/")].grad
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * max(1, want.abs().max().item()), msg=key)


def test_logits_are_the_original_s(case, monkeypatch):
    case_json, model, inputs = load_case(case, monkeypatch)
    if case_json["lsg_config"]["sparsity_type"] in ("bos_pooling", "lsh"):
        pytest.skip("the original leaks, or draws at random")
    if model.config.is_encoder_decoder and model.config.mask_first_token:
        pytest.skip(
            "the original writes into its caller's mask, so that the decoder does not see the first token either"
        )
    compared = 0
    for name, x in inputs.items():
        ids = {"input_ids": x.get("input_ids"), "attention_mask": x.get("attention_mask")}
        if "logits" in x:
            valid = x["attention_mask"].bool()
            got, want = model(**ids).logits[valid], x["logits"][valid]
        elif "logits_dec9" in x:
            got, want = model(**ids, decoder_input_ids=x["input_ids"][:, :9]).logits, x["logits_dec9"]
        else:
            continue
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * max(1, want.abs().max().item()), msg=name)
        compared += 1
    assert compared


def test_only_groups_of_padding_differ_from_the_original(fixtures, monkeypatch):
    """bos_pooling as it is here, on texts without padding, whose length needs none."""
    _, model, inputs = load_case(fixtures / "bert/bos_pooling_b8_s8_f2_g1", monkeypatch)
    x = inputs["len40_pad"]
    whole = x["attention_mask"].all(1)
    assert whole.any()
    out = encode(model, x, monkeypatch)
    torch.testing.assert_close(out[whole], x["last_hidden_state"][whole], rtol=0, atol=1e-5)
    assert not torch.allclose(out[~whole][0, 0], x["last_hidden_state"][~whole][0, 0], atol=1e-2)


@pytest.mark.parametrize(("name", "auto"), [("bert", "AutoModelForMaskedLM"), ("bart", "AutoModelForSeq2SeqLM")])
def test_a_published_checkpoint_loads(fixtures, tmp_path, name, auto, monkeypatch):
    """Of the base model's type, with the original's keys, names and code, which transformers cannot run any more."""
    shutil.copy(fixtures / name / "lsg_weights.safetensors", tmp_path / "model.safetensors")
    shutil.copy(fixtures / name / "lsg_config_example.json", tmp_path / "config.json")
    (tmp_path / f"modeling_lsg_{name}.py").write_text("raise NameError('BertEmbeddings')")
    for trust in (None, True):
        model = getattr(transformers, auto).from_pretrained(tmp_path, trust_remote_code=trust)
        assert type(model).__name__.startswith("LSG")
        assert model.config.block_size == 8
        assert not model.config.exact_short
    case = "none_b8_s8_f2_g1" if name == "bert" else "norm_b8_s8_f2_g1"
    if name == "bart":
        model.config.sparsity_type = "norm"
    _, _, inputs = load_case(fixtures / name / case, monkeypatch)
    x = inputs["len61_pad"]
    out, valid = encode(model.eval(), x, monkeypatch), x["attention_mask"].bool()
    want = x["encoder_last_hidden_state" if name == "bart" else "last_hidden_state"]
    torch.testing.assert_close(out[:, -61:][valid], want[:, -61:][valid], rtol=0, atol=1e-5)


# ---- all model types


def run(model, inputs, **kwargs):
    with torch.no_grad():
        return call(model, inputs, **kwargs)


def call(model, inputs, **kwargs):
    lacks = model.config.model_type.endswith("pegasus") and model.config.is_encoder_decoder
    if lacks and hasattr(model, "get_decoder") and "input_ids" in inputs:  # others make these themselves
        kwargs.setdefault("decoder_input_ids", inputs["input_ids"])
    return model(**inputs, **kwargs)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_all_heads_run_and_learn(model_type, tiny, texts):
    """The loss of every head reaches the global tokens."""
    short = texts(40, 5)
    for auto, names in AUTO_CLASSES.items():
        if not isinstance(names.get(model_type), str):
            continue
        model = tiny(model_type, auto)
        assert type(model).__name__ == f"LSG{names[model_type]}"
        inputs = dict(short)
        if model_type in SEQ2SEQ and auto == "AutoModelForSequenceClassification":
            inputs["input_ids"][:, 30] = 2
        if auto == "AutoModelForMultipleChoice":
            inputs = {key: value[:, None].repeat(1, 3, 1) for key, value in inputs.items()}
        out = run(model, inputs)
        tensor = next(value for value in out.values() if isinstance(value, torch.Tensor))
        assert tensor.isfinite().all()
        has_globals = any("global_embeddings" in name for name, _ in model.named_parameters())
        assert has_globals == (not (model_type in SEQ2SEQ and auto == "AutoModelForCausalLM"))
        if has_globals:
            model.train()
            out = call(model, inputs)
            next(value for value in out.values() if isinstance(value, torch.Tensor)).square().sum().backward()
            (table,) = (p for name, p in model.named_parameters() if name.endswith("global_embeddings.weight"))
            assert (table.grad.abs().sum(1) > 0).tolist() == [True] * 2 + [False] * 510


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("tokens", [1, 7, 8, 16, 17, 24, 33])
def test_any_length(model_type, tokens, tiny, texts):
    model = tiny(model_type)
    out = run(model, texts(tokens)).last_hidden_state
    assert out.shape == (2, tokens, 16)
    assert out.isfinite().all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("tokens", [14, 45])
def test_what_stands_in_padding_changes_nothing(model_type, tokens, side, tiny, texts):
    model = tiny(model_type)
    inputs = texts(tokens, 9, side)
    encoder = model.get_encoder() if model_type in SEQ2SEQ else model
    positions = {}
    if MODEL_TYPES[model_type].counts_padding:  # these count the tokens that are not padding
        positions["position_ids"] = torch.arange(2, tokens + 2)[None]
    before = run(encoder, inputs, **positions).last_hidden_state
    padding = inputs["attention_mask"] == 0
    inputs["input_ids"] = inputs["input_ids"].masked_fill(padding, 33)
    after = run(encoder, inputs, **positions).last_hidden_state
    shown = ~F.pad(padding, (before.shape[1] - tokens, 0))
    if model_type not in SEQ2SEQ:
        shown[:, 0] = True  # the first row is the first global token's
    torch.testing.assert_close(before[shown], after[shown], rtol=0, atol=1e-6)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_exact_short_is_the_base_model(model_type, tiny, texts, base_config):
    model = tiny(model_type, exact_short=True)
    base = AutoModel.from_config(base_config(model_type)).eval()
    left = base.load_state_dict(model.state_dict(), strict=False)
    assert not left.missing_keys
    assert all("global_embeddings" in key for key in left.unexpected_keys)
    for tokens in (1, 5, 16):
        for padding in (0, tokens // 2):
            inputs = texts(tokens, padding)
            assert torch.equal(run(model, inputs)[0], run(base, inputs)[0])
    inputs = texts(17)
    assert not torch.allclose(run(model, inputs)[0], run(base, inputs)[0], atol=1e-3)
    usual = tiny(model_type)
    assert not torch.allclose(run(usual, texts(16))[0], run(base, texts(16))[0], atol=1e-3)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_weight_has_a_gradient_from_short_texts_too(model_type, tiny, texts):
    """Distributed training waits for one from each."""
    model = tiny(model_type, exact_short=True).train()
    call(model, texts(5)).last_hidden_state.sum().backward()
    tables = [p for name, p in model.named_parameters() if name.endswith("global_embeddings.weight")]
    assert [p.grad is not None and not p.grad.any() for p in tables] == [True]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_inputs_embeds(model_type, tiny, texts):
    model = tiny(model_type)
    inputs = texts(37)
    ids = inputs.pop("input_ids")
    scale = model.encoder.embed_scale if model_type == "pegasus" else 1
    embeds = model.get_input_embeddings()(ids) * scale
    more = {"decoder_input_ids": ids[:, :5]} if model_type in SEQ2SEQ else {}
    by_ids = run(model, inputs, input_ids=ids, **more)[0]
    torch.testing.assert_close(run(model, inputs, inputs_embeds=embeds, **more)[0], by_ids, rtol=0, atol=1e-6)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_gradient_checkpointing(model_type, tiny, texts):
    model = tiny(model_type).train()
    if not model.supports_gradient_checkpointing:
        pytest.skip(f"transformers has no gradient checkpointing for {model_type}")
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(3)  # dropout is the same
        call(model, texts(45, 4))[0].square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("kind", ["norm", "pooling", "lsh", "bos_pooling"])
def test_bfloat16_and_autocast(model_type, kind, tiny, texts):
    """The original's pooling and lsh crash."""
    model = tiny(model_type, sparsity_type=kind, lsh_seed=0)
    inputs = texts(45, 6)
    full = run(model, inputs)[0]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run(model, inputs)[0]
    half = run(copy.deepcopy(model).to(torch.bfloat16), inputs)[0]
    assert half.dtype == torch.bfloat16
    for out in (mixed, half):
        assert (out.float() - full).abs().mean() < 0.2 * full.abs().mean()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_float16(model_type, tiny, texts):
    model = tiny(model_type)
    inputs = texts(45, 6)
    full = run(model, inputs)[0]
    half = run(model.to(torch.float16), inputs)[0]
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), full, rtol=0, atol=0.02 * full.abs().max().item())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("pass_on", [True, False])
def test_hidden_states(model_type, pass_on, tiny, texts):
    """They are the tokens', without global tokens and padding, except where the decoder sees these."""
    settings = {"pass_global_tokens_to_decoder": pass_on} if model_type in SEQ2SEQ else {}
    model = tiny(model_type, **settings)
    out = run(model, texts(37), output_hidden_states=True)
    states = out.encoder_hidden_states if model_type in SEQ2SEQ else out.hidden_states
    rows = 39 if model_type in SEQ2SEQ and pass_on else 37
    assert [state.shape[1] for state in states] == [rows] * 3
    last = out.encoder_last_hidden_state if model_type in SEQ2SEQ else out.last_hidden_state
    assert torch.equal(states[-1], last)
    as_tuple = run(model, texts(37), return_dict=False)
    torch.testing.assert_close(as_tuple[0], out[0])
    if model_type not in SEQ2SEQ:
        out = run(tiny(model_type, "AutoModelForMaskedLM"), texts(37), output_hidden_states=True)
        assert [state.shape[1] for state in out.hidden_states] == [37] * 3


@pytest.mark.parametrize("model_type", ["albert", "bert", "distilbert", "roberta"])
def test_a_base_model_says_what_it_takes(model_type, tiny, base_config):
    """Callers look at the signature for token_type_ids, inputs_embeds, ..."""
    import inspect

    from transformers import AutoModel

    names = inspect.signature(tiny(model_type).forward).parameters
    assert list(names) == list(inspect.signature(AutoModel.from_config(base_config(model_type)).forward).parameters)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_attention_weights_are_refused(model_type, tiny, texts):
    with pytest.raises(InputError, match="no weights to show"):
        run(tiny(model_type), texts(37), output_attentions=True)


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 37, 37), torch.ones(2, 1, 37, 37), torch.ones(2, 36)], ids=["3d", "4d", "short"]
)
def test_masks_that_are_not_of_tokens_are_refused(mask, tiny, texts):
    with pytest.raises(InputError, match="attention_mask of shape"):
        run(tiny("bert"), {"input_ids": texts(37)["input_ids"], "attention_mask": mask})


def test_the_caller_s_mask_is_left_alone(tiny, texts):
    """The original's bart writes into it."""
    model = tiny("bart", mask_first_token=True)
    inputs = texts(37, 3)
    before = inputs["attention_mask"].clone()
    run(model, inputs)
    assert torch.equal(inputs["attention_mask"], before)


def test_the_first_row_is_the_global_token_s(tiny, texts):
    with_pool, without = tiny("bert"), tiny("bert", pool_with_global=False)
    one, other = run(with_pool, texts(37)), run(without, texts(37))
    assert torch.equal(one[0][:, 1:], other[0][:, 1:])
    assert not torch.allclose(one[0][:, 0], other[0][:, 0], atol=1e-3)
    assert not torch.allclose(one.pooler_output, other.pooler_output, atol=1e-3)
    hidden = tiny("bert", mask_first_token=True, pool_with_global=False)
    assert torch.equal(run(hidden, texts(37))[0], run(tiny("bert", mask_first_token=True), texts(37))[0])


def test_lengths_that_need_padding_are_refused_where_asked(tiny, texts):
    model = tiny("bert", adaptive=False)
    for tokens in (5, 16, 40):
        run(model, texts(tokens))
    with pytest.raises(InputError, match="multiple of block_size 8 tokens, got 41"):
        run(model, texts(41))


def test_lsh_repeats_in_evaluation_if_asked(tiny, texts):
    for seed, same in ((None, False), (3, True)):
        model = tiny("bert", sparsity_type="lsh", lsh_seed=seed, sparse_block_size=4)
        once, twice = (run(model, texts(61)).last_hidden_state for _ in range(2))
        assert torch.equal(once, twice) == same
    model.config.hidden_dropout_prob = 0.0
    assert model.train()  # in training it is drawn anew all the same
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    once, twice = (run(model, texts(61)).last_hidden_state for _ in range(2))
    assert not torch.equal(once, twice)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["bert", "bart"])
def test_compiled(model_type, tiny, texts):
    model = tiny(model_type)
    inputs = texts(45, 6)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(run(compiled, inputs)[0], run(model, inputs)[0], rtol=0, atol=1e-5)
    loss = compiled(**inputs)[0].square().sum()
    loss.backward()
    grad = model.get_input_embeddings().weight.grad.clone()
    model.zero_grad()
    model(**inputs)[0].square().sum().backward()
    torch.testing.assert_close(grad, model.get_input_embeddings().weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pass_on", [True, False])
@pytest.mark.parametrize("model_type", SEQ2SEQ)
def test_generation(model_type, pass_on, tiny, texts):
    model = tiny(model_type, "AutoModelForSeq2SeqLM", pass_global_tokens_to_decoder=pass_on)
    inputs = texts(45, 6)
    for beams in (1, 2):
        out = [model.generate(**inputs, max_new_tokens=6, num_beams=beams, use_cache=cache) for cache in (True, False)]
        assert torch.equal(*out)
    for key in inputs:  # the padded text alone, without its padding, on a grid of blocks of its own
        inputs[key] = inputs[key][1:, :39]
    alone = model.generate(**inputs, max_new_tokens=6, num_beams=2)
    assert torch.equal(alone[0], out[0][1, : alone.shape[1]])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_decoder_s_attention_can_be_chosen(attention, tmp_path, tiny):
    tiny("bart", "AutoModelForSeq2SeqLM").save_pretrained(tmp_path)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, attn_implementation=attention)
    assert model.model.decoder.config._attn_implementation == attention
    assert model.model.encoder.config._attn_implementation == "lsg"
    tiny("bert").save_pretrained(tmp_path / "bert")
    if attention == "eager":
        with pytest.raises(InputError, match="cannot be 'eager'"):
            AutoModel.from_pretrained(tmp_path / "bert", attn_implementation=attention)


# ---- causal models


@pytest.mark.parametrize("model_type", ["bert", "roberta", "camembert", "xlm-roberta", "electra"])
def test_a_causal_model_generates_and_sees_nothing_later(model_type, tiny, texts):
    model = tiny(model_type, "AutoModelForCausalLM", is_decoder=True)
    inputs = texts(45)
    before = run(model, inputs).logits
    inputs["input_ids"][:, 30:] = 7
    after = run(model, inputs).logits
    assert torch.equal(before[:, 1:30], after[:, 1:30])
    assert not torch.allclose(before[:, 30:], after[:, 30:], atol=1e-3)
    for tokens in (5, 16, 30):
        start = texts(tokens)
        out = model.generate(**start, max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert out.shape == (2, tokens + 4)
        ids = start["input_ids"]
        for _ in range(4):
            # transformers counts the positions of a generated text from 0 for all models
            positions = torch.arange(ids.shape[1])[None]
            last = run(model, {"input_ids": ids}, position_ids=positions).logits[:, -1].argmax(-1)
            ids = torch.cat([ids, last[:, None]], 1)
        assert torch.equal(out, ids)
    with pytest.raises(InputError, match="use_cache=False"):
        model.generate(**texts(5), max_new_tokens=2, use_cache=True)


def test_cross_attention_in_an_encoder_is_refused(base_config):
    config = lsg_config(base_config("bert", is_decoder=True, add_cross_attention=True))
    with pytest.raises(InputError, match="cross-attention"):
        AutoModel.from_config(config)


# ---- configs and files


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_models_come_back_from_files_and_pickles(model_type, tmp_path, tiny, texts):
    model = tiny(model_type, exact_short=True, sparsity_type="pooling")
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert again.config.exact_short
    inputs = texts(45, 6)
    out = run(model, inputs)[0]
    for other in (again.eval(), pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(run(other, inputs)[0], out)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == f"lsg-{model_type}"
    assert saved["auto_map"] == auto_map(model_type)


def test_configs_that_do_not_fit_are_refused(tmp_path, base_config):
    with pytest.raises(InputError, match="num_global_tokens must be 1 to 512"):
        lsg_config(base_config("bert"), num_global_tokens=1000)
    config = lsg_config(base_config("bert"), sparsity_type=None)
    assert config.sparsity_type == "none"
    config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"sparsity_type": "norm", "sparsity_factor": 3}))
    with pytest.raises(InputError, match="sparsity_factor"):
        AutoConfig.from_pretrained(tmp_path)


def test_the_config_can_be_changed_at_any_time(tiny, texts):
    model, other = tiny("bert"), tiny("bert", num_global_tokens=1, block_size=4, sparse_block_size=4)
    model.config.num_global_tokens, model.config.block_size, model.config.sparse_block_size = 1, 4, 4
    assert torch.equal(run(model, texts(37))[0], run(other, texts(37))[0])


def test_a_base_model_is_left_alone(tmp_path, base_config):
    base = AutoModel.from_config(base_config("bert"))
    base.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is base_class("bert", "Model")
    assert type(AutoConfig.from_pretrained(tmp_path)) is base_class("bert", "Config")
