"""FunnelTFM among `transformers`: what its users take for granted, and equality with its own Funnel."""

import copy
import inspect
import json
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast, pipeline

from funneltfm.errors import InputError
from funneltfm.funnel import convert
from funneltfm.funnel.config import ModelConfig, canonical_length
from funneltfm.funnel.hf import (
    AUTO_CLASSES,
    FunnelTFMConfig,
    FunnelTFMForMaskedLM,
    FunnelTFMForMultipleChoice,
    FunnelTFMForPreTraining,
    FunnelTFMForQuestionAnswering,
    FunnelTFMForSequenceClassification,
    FunnelTFMForTokenClassification,
    FunnelTFMModel,
    register,
)
from funneltfm.funnel.model import FunnelTFM

CLASSES = list(AUTO_CLASSES.values())
SEQUENCE = (FunnelTFMForSequenceClassification, FunnelTFMForMultipleChoice)
TOKEN = [cls for cls in CLASSES if cls not in (*SEQUENCE, FunnelTFMModel)]
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


@pytest.fixture
def config(tiny):
    """config(key=value): tiny, 3 blocks and a decoder."""

    def make(**keys):
        return FunnelTFMConfig.from_net_config(tiny(decoder_size="1"), **keys)

    return make


@pytest.fixture
def make(config):
    """make(cls, key=value): a model in eval mode whose every parameter is random and far from zero."""

    def build(cls, config_=None, seed=0, **keys):
        model = cls(config_ or config(**keys)).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator) * 0.3
                parameter.copy_(1 + noise if name.endswith("layer_norm.weight") else noise)
        return model

    return build


def inputs_for(cls, length=9, rows=2, seed=0):
    """Token ids and segments without padding: (2, length), or (2, 3, length) for multiple choice."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, 3, length) if cls is FunnelTFMForMultipleChoice else (rows, length)
    ids = torch.randint(1, 50, shape, generator=generator)
    return {"input_ids": ids, "token_type_ids": (torch.arange(length) >= length // 2).long().expand(shape)}


def labels_for(cls, inputs):
    ids = inputs["input_ids"]
    if cls is FunnelTFMForQuestionAnswering:
        return {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 2])}
    labels = torch.tensor([1, 0]) if cls in SEQUENCE else (ids % 2).long()
    return {} if cls is FunnelTFMModel else {"labels": labels}


def outputs(model, **inputs):
    """Every tensor of the output, the loss first."""
    with torch.no_grad():
        return model(**inputs, return_dict=False)


def assert_same(model, other, atol=1e-6):
    """Outputs may differ by a rounding: where a tensor lies in memory decides how it is summed."""
    inputs = inputs_for(type(model))
    for a, b in zip(outputs(model, **inputs), outputs(other, **inputs), strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=atol)


def logits_of(cls, output):
    if cls is FunnelTFMModel:
        return output.last_hidden_state
    return torch.stack([output.start_logits, output.end_logits], -1) if "start_logits" in output else output.logits


# ---- the config


def test_config_has_the_keys_and_defaults_of_model_config():
    config, defaults = FunnelTFMConfig(), ModelConfig()
    assert config.net_config() == defaults
    assert {name: getattr(config, name) for name in ModelConfig.names()} == defaults.to_dict()
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (768, 12, 12)
    assert (config.lm_transform, config.pad_to_canonical, config.tie_word_embeddings) == (True, True, True)


def test_config_round_trips(tmp_path, tiny):
    net_config = tiny(block_size="1_2x2_1", decoder_size="1x2", ff_activation="relu", pad_id=3, num_class=5)
    config = FunnelTFMConfig.from_net_config(net_config, lm_transform=False, pad_to_canonical=False)
    assert config.net_config() == net_config
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "funnel_tfm"
    assert "num_class" not in saved
    assert "pad_token_id" not in saved
    for again in (FunnelTFMConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(again) is FunnelTFMConfig
        assert again.net_config() == net_config
        assert again.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))


def test_one_truth_under_two_names():
    config = FunnelTFMConfig(hidden_size=32, num_attention_heads=4, pad_token_id=7, num_labels=3)
    net_config = config.net_config()
    assert (net_config.d_model, net_config.n_head, net_config.pad_id, net_config.num_class) == (32, 4, 7, 3)
    config.num_labels, config.pad_token_id = 4, 1
    assert (config.num_class, config.pad_id, len(config.id2label)) == (4, 1, 4)
    assert FunnelTFMConfig(num_class=6).num_labels == 6
    assert FunnelTFMConfig(id2label={0: "no", 1: "yes", 2: "unknown"}).net_config().num_class == 3
    with pytest.raises(InputError, match="num_class is another name of num_labels, but they differ"):
        FunnelTFMConfig(num_labels=3, num_class=4)


def test_from_net_config_lets_keywords_win(tiny):
    assert FunnelTFMConfig.from_net_config(tiny(num_class=5)).num_labels == 5
    assert FunnelTFMConfig.from_net_config(tiny(num_class=5), num_labels=4).num_labels == 4
    assert FunnelTFMConfig.from_net_config(tiny(num_class=5), id2label={0: "a", 1: "b", 2: "c"}).num_labels == 3
    assert FunnelTFMConfig.from_net_config(tiny(), pad_token_id=9, hidden_size=24).net_config().pad_id == 9


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"d_model": 7}, "d_model must be even"),
        ({"block_size": "4-4"}, "block_size must be numbers"),
        ({"pooling_type": "median"}, "pooling_type must be one of"),
        ({"num_labels": 0}, "num_class must be a whole number"),
        ({"pad_token_id": None}, "pad_id must be a whole number"),
        ({"dropout": 1.5}, "dropout must be a probability"),
    ],
)
def test_errors_of_model_config_surface(keys, message):
    with pytest.raises(InputError, match=message):
        FunnelTFMConfig(**keys)


def test_numbers_in_place_of_text_become_text():
    assert FunnelTFMConfig(decoder_size=2).decoder_size == "2"


# ---- Auto classes, save and load


def test_register_twice():
    register()
    assert isinstance(AutoConfig.for_model("funnel_tfm"), FunnelTFMConfig)


@pytest.mark.parametrize(("auto", "cls"), AUTO_CLASSES.items(), ids=AUTO_CLASSES)
def test_save_load(auto, cls, make, tmp_path):
    model = make(cls, num_labels=3)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    for loader in (cls, getattr(transformers, auto)):
        again, info = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert type(again) is cls
        assert not any(info.values()), info
        assert not again.training
        state = again.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
        assert_same(model, again)


@every_class
def test_auto_class_builds_from_a_config(cls, config):
    auto = next(auto for auto, value in AUTO_CLASSES.items() if value is cls)
    assert type(getattr(transformers, auto).from_config(config())) is cls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_class
def test_load_in_half_precision(cls, dtype, make, tmp_path):
    model = make(cls)
    model.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in again.parameters()} == {dtype}
    inputs = inputs_for(cls)
    for exact, half in zip(outputs(model, **inputs), outputs(again, **inputs), strict=True):
        assert half.dtype is dtype
        assert torch.nn.functional.cosine_similarity(exact.flatten(), half.float().flatten(), dim=0) > 0.99
    loss = again(**inputs, **labels_for(cls, inputs))[0] if cls is not FunnelTFMModel else torch.zeros(())
    assert loss.isfinite()


@every_class
def test_half_runs_with_padding(cls, make):
    inputs = inputs_for(cls)
    inputs["input_ids"][0, ..., -4:] = 0
    assert all(x.isfinite().all() for x in outputs(make(cls).half(), **inputs))


@every_class
def test_nothing_stays_uninitialised(cls, config, make, tmp_path, monkeypatch):
    """From the default path of from_pretrained, which builds on the meta device: a checkpoint of the bare encoder."""
    bare = make(FunnelTFMModel, config(decoder_size="0"))
    bare.save_pretrained(tmp_path)
    # What is not loaded would stay as torch.empty_like left it: make that visible.
    monkeypatch.setattr(torch, "empty_like", lambda x, **kwargs: torch.full_like(x, math.nan, **kwargs))
    model, info = cls.from_pretrained(tmp_path, config=config(), output_loading_info=True)
    assert all(parameter.device.type == "cpu" and parameter.isfinite().all() for parameter in model.parameters())
    net = (model if cls is FunnelTFMModel else model.funnel).net
    for name, tensor in bare.net.state_dict().items():
        assert torch.equal(net.state_dict()[name], tensor), name
    fresh = FunnelTFM(config().net_config(), cls_target=False)
    for name in info["missing_keys"]:
        tensor = model.get_parameter(name)
        mine = dict(fresh.named_parameters()).get(name.rpartition("net.")[2])
        if mine is not None:  # of the same distribution as where the module begins by itself
            torch.testing.assert_close(tensor.std(), mine.std(), rtol=0.5, atol=0.01)
            torch.testing.assert_close(tensor.mean(), mine.mean(), rtol=0, atol=0.1)


def test_missing_part_of_a_module_leaves_the_rest(make, tmp_path):
    model = make(FunnelTFMForMaskedLM)
    state = model.state_dict()
    left_out = ("funnel.net.attn_layers.0.r_kernel", "lm_head.dense.bias", "lm_head.bias")
    model.save_pretrained(tmp_path, state_dict={name: x for name, x in state.items() if name not in left_out})
    again, info = FunnelTFMForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == set(left_out)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, state[name]) != (name in left_out), name
    assert not again.lm_head.bias.any()
    assert 0 <= again.state_dict()[left_out[0]].min() <= again.state_dict()[left_out[0]].max() <= 0.1


@every_class
def test_deepcopy_and_pickle(cls, make):
    model = make(cls)
    assert_same(model, copy.deepcopy(model))
    assert_same(model, pickle.loads(pickle.dumps(model)))


def test_state_dict_is_of_plain_tensors(make, tmp_path):
    model = make(FunnelTFMForSequenceClassification)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    model.load_state_dict(state)
    FunnelTFM(model.funnel.net.net_config, cls_target=False).load_state_dict(
        {name.removeprefix("funnel.net."): x for name, x in state.items() if name.startswith("funnel.net.")}
    )


def test_base_model_into_head_and_back(make, tmp_path):
    make(FunnelTFMForMaskedLM).save_pretrained(tmp_path / "lm")
    bare = FunnelTFMModel.from_pretrained(tmp_path / "lm")
    bare.save_pretrained(tmp_path / "bare")
    tagger, info = FunnelTFMForTokenClassification.from_pretrained(tmp_path / "bare", output_loading_info=True)
    assert sorted(info["missing_keys"]) == ["token_head.dense.bias", "token_head.dense.weight"]
    assert_same(bare, tagger.funnel)


@pytest.mark.parametrize("cls", SEQUENCE)
def test_sequence_heads_leave_the_decoder_out(cls, make, tmp_path):
    make(FunnelTFMModel).save_pretrained(tmp_path)
    model, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert model.funnel.net.net_config.decoder_size == "0"
    assert model.config.decoder_size == "1"  # still what the config says, for who needs it
    assert not info["unexpected_keys"]
    assert all(name.startswith("cls_head.") for name in info["missing_keys"])


# ---- with the net inside


def test_bare_model_is_the_net(make):
    model = make(FunnelTFMModel, pad_to_canonical=False)
    inputs = inputs_for(FunnelTFMModel, length=11)
    seg_id = inputs["token_type_ids"].clone()
    seg_id[:, 0] = 2
    with torch.no_grad():
        hiddens, _ = model.net.extract_hiddens(inputs["input_ids"], seg_id=seg_id, use_decoder=True)
        output = model(**inputs, output_hidden_states=True)
    assert len(output.hidden_states) == len(hiddens) == 5
    assert all(torch.equal(a, b) for a, b in zip(output.hidden_states, hiddens, strict=True))
    assert torch.equal(output.last_hidden_state, hiddens[-1])
    assert torch.equal(output.pooler_output, hiddens[3][:, 0])


def test_without_a_decoder_the_last_hidden_is_short(make):
    model = make(FunnelTFMModel, decoder_size="0")
    inputs = inputs_for(FunnelTFMModel, length=11)  # canonical: 15 -> 8 -> 4
    output = model(**inputs, output_hidden_states=True)
    assert [x.size(1) for x in output.hidden_states] == [11, 11, 8, 4]
    assert output.hidden_states[-1] is output.last_hidden_state
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])


@pytest.mark.parametrize("cls", TOKEN)
def test_token_heads_need_a_decoder(cls, config, tiny):
    with pytest.raises(InputError, match=f"{cls.__name__} needs .* decoder"):
        cls(config(decoder_size="0"))
    one_block = FunnelTFMConfig.from_net_config(tiny(block_size="2"))  # nothing was pooled, nothing to restore
    assert cls(one_block)(torch.ones(2, 5, dtype=torch.long))[0].shape[:2] == (2, 5)


@pytest.mark.parametrize("cls", SEQUENCE)
def test_sequence_heads_need_none(cls, make, tmp_path):
    model = make(cls, decoder_size="0", num_labels=3)
    model.save_pretrained(tmp_path)
    assert_same(model, cls.from_pretrained(tmp_path))


@every_class
def test_tuples(cls, make):
    model = make(cls)
    inputs = inputs_for(cls)
    whole = model(**inputs, **labels_for(cls, inputs), output_hidden_states=True)
    parts = model(**inputs, **labels_for(cls, inputs), output_hidden_states=True, return_dict=False)
    assert type(parts) is tuple
    assert len(parts) == len(whole) == (4 if cls is FunnelTFMForQuestionAnswering else 3)
    for a, b in zip(parts[:-1], whole.to_tuple()[:-1], strict=True):
        assert torch.equal(a, b)
    model.config.return_dict = False
    model.config.output_hidden_states = True
    assert len(model(**inputs, **labels_for(cls, inputs))) == len(parts)


@every_class
def test_attentions_are_refused(cls, make, config):
    inputs = inputs_for(cls)
    with pytest.raises(InputError, match="output_attentions"):
        make(cls)(**inputs, output_attentions=True)
    with pytest.raises(InputError, match="output_attentions"):
        cls(config(output_attentions=True, attn_implementation="eager"))(**inputs)


@every_class
def test_unknown_arguments_are_refused(cls, make):
    with pytest.raises(TypeError, match="head_mask"):
        make(cls)(**inputs_for(cls), head_mask=torch.ones(3, 2))


@every_class
def test_trainer_sees_the_signature(cls):
    """It drops columns that forward does not name, and must not think that `**kwargs` takes num_items_in_batch."""
    parameters = inspect.signature(cls.forward).parameters
    assert {"input_ids", "attention_mask", "token_type_ids", "inputs_embeds"} <= set(parameters)
    assert not [p for p in parameters.values() if p.kind is p.VAR_KEYWORD]
    expected = {FunnelTFMModel: [], FunnelTFMForQuestionAnswering: ["start_positions", "end_positions"]}
    assert transformers.utils.find_labels(cls) == expected.get(cls, ["labels"])


# ---- padding


def sentences(lengths=(1, 2, 5, 9, 10, 14)):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 50, (n,), generator=generator) for n in lengths]


def batch_of(rows, length, side):
    """ids, mask, segments (B, length), padded on one side."""
    ids, mask, segments = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(3))
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[i, at], mask[i, at], segments[i, at] = row, 1, (torch.arange(len(row)) > len(row) // 2).long()
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": segments}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("keys", [{}, {"truncate_seq": False}, {"separate_cls": False}, {"block_size": "1_1"}], ids=str)
@pytest.mark.parametrize("extra", [0, 7])
def test_a_sentence_gets_the_same_in_any_batch(side, keys, extra, make):
    model = make(FunnelTFMModel, **keys)
    rows = sentences()
    batch = batch_of(rows, 14 + extra, side)
    with torch.no_grad():
        together = model(**batch, output_hidden_states=True)
        for i, row in enumerate(rows):
            alone = model(**batch_of([row], len(row), "right"))
            real = batch["attention_mask"][i].bool()
            torch.testing.assert_close(
                together.last_hidden_state[i, real], alone.last_hidden_state[0], rtol=0, atol=1e-5
            )
            torch.testing.assert_close(together.pooler_output[i], alone.pooler_output[0], rtol=0, atol=1e-5)
            assert not together.last_hidden_state[i, ~real].any()
    assert together.last_hidden_state.shape[1] == 14 + extra
    longest = canonical_length(14, model.net.net_config)
    assert together.hidden_states[0].size(1) == 14 + extra
    assert together.hidden_states[-2].size(1) < longest


@every_class
def test_every_head_gives_the_same_in_any_batch(cls, make):
    if cls is FunnelTFMForMultipleChoice:
        return  # its rows are those of the classifier
    model = make(cls)
    rows = sentences((5, 12))
    with torch.no_grad():
        right, left = (logits_of(cls, model(**batch_of(rows, 17, side))) for side in ("right", "left"))
        alone = logits_of(cls, model(**batch_of(rows[:1], 5, "right")))
    if cls in SEQUENCE:
        torch.testing.assert_close(right[:1], alone, rtol=0, atol=1e-5)
        torch.testing.assert_close(left[:1], alone, rtol=0, atol=1e-5)
    else:
        torch.testing.assert_close(right[:1, :5], alone, rtol=0, atol=1e-5)
        torch.testing.assert_close(left[:1, 12:], alone, rtol=0, atol=1e-5)


def test_what_stands_at_padding_is_nothing(make):
    model = make(FunnelTFMModel)
    batch = batch_of(sentences((5, 12)), 12, "right")
    other = {name: x.clone() for name, x in batch.items()}
    other["input_ids"][0, 5:] = 17
    other["token_type_ids"][0, 5:] = 1
    for a, b in zip(outputs(model, **batch), outputs(model, **other), strict=True):
        assert torch.equal(a, b)


def test_mask_is_taken_from_pad_token_id(make):
    model = make(FunnelTFMModel, pad_token_id=4)
    rows = [row.masked_fill(row == 4, 5) for row in sentences((5, 12))]
    batch = batch_of(rows, 12, "right")
    batch["input_ids"][batch["attention_mask"] == 0] = 4
    mask = batch.pop("attention_mask")
    for a, b in zip(outputs(model, **batch), outputs(model, **batch, attention_mask=mask), strict=True):
        assert torch.equal(a, b)
    for form in (mask.bool(), mask.float()):
        assert torch.equal(outputs(model, **batch)[0], outputs(model, **batch, attention_mask=form)[0])


def test_a_hole_in_the_mask_stays_masked(make):
    model = make(FunnelTFMModel, pad_to_canonical=False)
    batch = batch_of(sentences((9,)), 9, "right")
    batch["attention_mask"][0, 2:5] = 0
    seg_id = batch["token_type_ids"].clone()
    seg_id[:, 0] = 2
    mask = 1 - batch["attention_mask"]
    with torch.no_grad():
        hiddens, _ = model.net.extract_hiddens(batch["input_ids"], seg_id, mask, use_decoder=True)
    assert torch.equal(outputs(model, **batch)[0], hiddens[-1])
    batch["attention_mask"][:] = 1
    assert not torch.allclose(outputs(model, **batch)[0], hiddens[-1], atol=1e-3)


def test_a_row_of_padding_is_finite(make):
    batch = batch_of([*sentences((5,)), torch.zeros(0, dtype=torch.long)], 6, "right")
    model = make(FunnelTFMModel)
    result = outputs(model, **batch)
    assert all(x.isfinite().all() for x in result)
    alone = outputs(model, **{name: x[:1] for name, x in batch.items()})
    torch.testing.assert_close(result[0][:1], alone[0], rtol=0, atol=1e-5)


def test_the_given_shape_on_request(make):
    """pad_to_canonical=False computes what FunnelTFM computes; left padding is moved, not computed over."""
    model = make(FunnelTFMModel, pad_to_canonical=False)
    rows = sentences((5, 12))
    right, left = batch_of(rows, 13, "right"), batch_of(rows, 13, "left")
    seg_id = right["token_type_ids"].clone()
    seg_id[:, 0] = 2
    with torch.no_grad():
        mask = 1 - right["attention_mask"]
        hiddens, _ = model.net.extract_hiddens(right["input_ids"], seg_id, mask, use_decoder=True)
        assert torch.equal(model(**right).last_hidden_state, hiddens[-1])
        moved = model(**left).last_hidden_state
    torch.testing.assert_close(moved[0, 8:], hiddens[-1][0, :5], rtol=0, atol=1e-6)
    torch.testing.assert_close(moved[1, 1:], hiddens[-1][1, :12], rtol=0, atol=1e-6)


def test_segments(make):
    model = make(FunnelTFMModel, separate_cls=False)  # so that [CLS] has a segment term
    ids = inputs_for(FunnelTFMModel)["input_ids"]
    zeros = torch.zeros_like(ids)
    cls = zeros.clone()
    cls[:, 0] = 2
    none = outputs(model, input_ids=ids)[0]
    assert torch.equal(none, outputs(model, input_ids=ids, token_type_ids=zeros)[0])
    assert torch.equal(none, outputs(model, input_ids=ids, token_type_ids=cls)[0])
    pair = (torch.arange(9) > 4).long().expand(2, 9)
    assert not torch.allclose(none, outputs(model, input_ids=ids, token_type_ids=pair)[0], atol=1e-3)
    assert not pair[:, 0].any()  # what was given is not written to


@every_class
def test_inputs_embeds(cls, make):
    model = make(cls)
    inputs = inputs_for(cls)
    inputs["input_ids"][0, ..., -3:] = 0
    inputs["attention_mask"] = (inputs["input_ids"] != 0).long()
    ids = inputs["input_ids"]
    embeds = inputs | {"inputs_embeds": model.get_input_embeddings()(ids)}
    del embeds["input_ids"]
    labels = labels_for(cls, inputs)
    for a, b in zip(outputs(model, **inputs, **labels), outputs(model, **embeds, **labels), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    for wrong in (inputs | embeds, {"attention_mask": inputs["attention_mask"]}):
        with pytest.raises(InputError, match="input_ids"):
            model(**wrong)


def test_shapes_are_checked(make):
    model = make(FunnelTFMModel)
    ids = torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(InputError, match=r"attention_mask must have the shape of the input, \(2, 5\).*\(2, 4\)"):
        model(ids, attention_mask=torch.ones(2, 4))
    with pytest.raises(InputError, match=r"token_type_ids must have the shape of the input, \(2, 5\)"):
        model(ids, token_type_ids=torch.ones(2, 4, dtype=torch.long))
    with pytest.raises(InputError, match=r"length at least 1; got \(2, 0\)"):
        model(ids[:, :0])
    with pytest.raises(InputError, match=r"\(batch, choices, length\)"):
        make(FunnelTFMForMultipleChoice)(ids)


# ---- labels and losses


def test_detection_loss_counts_real_labelled_tokens(make):
    model = make(FunnelTFMForPreTraining)
    batch = batch_of(sentences((5, 12)), 12, "right")
    labels = (batch["input_ids"] % 2).masked_fill(batch["input_ids"] % 5 == 0, -100)
    output = model(**batch, labels=labels)
    assert output.logits.shape == (2, 12)
    by_hand = [
        -math.log(p if label == 1 else 1 - p)
        for row in zip(output.logits.sigmoid().tolist(), labels.tolist(), batch["attention_mask"].tolist(), strict=True)
        for p, label, real in zip(*row, strict=True)
        if real and label != -100
    ]
    assert output.loss.item() == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-5)
    del batch["attention_mask"]  # pad_token_id says the same
    assert model(**batch, labels=labels).loss.item() == pytest.approx(output.loss.item(), abs=1e-6)


@pytest.mark.parametrize("cls", [FunnelTFMForMaskedLM, FunnelTFMForTokenClassification])
def test_token_losses_ignore_unlabelled_tokens(cls, make):
    model = make(cls, num_labels=3)
    inputs = inputs_for(cls)
    labels = (inputs["input_ids"] % 3).masked_fill(inputs["input_ids"] % 2 == 0, -100)
    output = model(**inputs, labels=labels)
    assert output.logits.shape == (2, 9, 50 if cls is FunnelTFMForMaskedLM else 3)
    by_hand = [
        -output.logits[b, t].log_softmax(-1)[labels[b, t]].item()
        for b in range(2)
        for t in range(9)
        if labels[b, t] != -100
    ]
    assert 0 < len(by_hand) < 18
    assert output.loss.item() == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-5)
    assert model(**inputs, labels=torch.full_like(labels, -100)).loss == 0  # and no nan


def test_language_model_reads_the_table(make):
    model = make(FunnelTFMForMaskedLM, lm_transform=False)
    inputs = inputs_for(FunnelTFMForMaskedLM)
    hidden = outputs(model.funnel, **inputs)[0]
    table = model.get_input_embeddings().weight
    torch.testing.assert_close(outputs(model, **inputs)[0], hidden @ table.t() + model.lm_head.bias)
    assert [name for name, x in model.named_parameters() if x.shape == table.shape] == [
        "funnel.net.input_layer.0.lookup_table"
    ]
    assert model.get_output_embeddings() is None


def test_language_model_with_another_embedding_width(make, config):
    assert outputs(make(FunnelTFMForMaskedLM, d_embed=8), **inputs_for(FunnelTFMForMaskedLM))[0].shape == (2, 9, 50)
    with pytest.raises(InputError, match=r"d_embed \(8\) must be d_model \(16\)"):
        FunnelTFMForMaskedLM(config(d_embed=8, lm_transform=False))
    with pytest.raises(InputError, match="tie_word_embeddings must be True"):
        FunnelTFMForMaskedLM(config(tie_word_embeddings=False))


@pytest.mark.parametrize(
    ("keys", "labels", "kind", "by_hand"),
    [
        ({"num_labels": 1}, torch.tensor([0.5, 2.0]), "regression", lambda x, y: ((x[:, 0] - y) ** 2).mean()),
        ({"num_labels": 1}, torch.tensor([[1], [2]]), "regression", lambda x, y: ((x - y) ** 2).mean()),
        (
            {"num_labels": 3, "problem_type": "regression"},
            torch.randn(2, 3),
            "regression",
            lambda x, y: ((x - y) ** 2).mean(),
        ),
        (
            {"num_labels": 3},
            torch.tensor([2, 0]),
            "single_label_classification",
            lambda x, y: -(x.log_softmax(-1)[[0, 1], y]).mean(),
        ),
        (
            {"num_labels": 3},
            torch.tensor([[1.0, 0, 1], [0, 0, 1]]),
            "multi_label_classification",
            lambda x, y: -(y * x.sigmoid().log() + (1 - y) * (1 - x.sigmoid()).log()).mean(),
        ),
        (
            {"num_labels": 3, "problem_type": "multi_label_classification"},
            torch.tensor([[1, 0, 1], [0, 0, 1]]),
            "multi_label_classification",
            lambda x, y: -(y * x.sigmoid().log() + (1 - y) * (1 - x.sigmoid()).log()).mean(),
        ),
    ],
    ids=["number", "number in a column", "numbers", "class", "classes", "classes as integers"],
)
def test_problem_types(keys, labels, kind, by_hand, make):
    model = make(FunnelTFMForSequenceClassification, **keys)
    output = model(**inputs_for(FunnelTFMForSequenceClassification), labels=labels)
    assert output.logits.shape == (2, keys["num_labels"])
    torch.testing.assert_close(output.loss, by_hand(output.logits, labels), rtol=0, atol=1e-5)
    assert model.config.problem_type == kind  # saved with the model, read by pipelines


def test_classifier_has_the_labels_of_the_config(make, tmp_path):
    model = make(FunnelTFMForSequenceClassification, id2label={0: "bad", 1: "fair", 2: "good"})
    assert model.cls_head[3].bias.shape == (3,)
    model.save_pretrained(tmp_path)
    again = FunnelTFMForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    wider = FunnelTFMForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert wider.cls_head[3].bias.shape == (5,)
    assert wider.funnel.net.net_config.num_class == 5


def test_multiple_choice(make):
    model = make(FunnelTFMForMultipleChoice, num_labels=5)  # num_labels has no say
    inputs = inputs_for(FunnelTFMForMultipleChoice)
    output = model(**inputs, labels=torch.tensor([2, 0]))
    assert output.logits.shape == (2, 3)
    torch.testing.assert_close(output.loss, -output.logits.log_softmax(-1)[[0, 1], [2, 0]].mean())
    one = outputs(model, **{name: x[1:, 2:] for name, x in inputs.items()})[0]
    torch.testing.assert_close(one[0, 0], output.logits[1, 2], rtol=0, atol=1e-5)


def test_question_answering_losses(make):
    model = make(FunnelTFMForQuestionAnswering, num_labels=5)  # num_labels has no say
    inputs = inputs_for(FunnelTFMForQuestionAnswering)
    start, end = torch.tensor([1, 4]), torch.tensor([3, 8])
    output = model(**inputs, start_positions=start, end_positions=end)
    s, e = output.start_logits.log_softmax(-1), output.end_logits.log_softmax(-1)
    assert s.shape == e.shape == (2, 9)
    torch.testing.assert_close(output.loss, -(s[[0, 1], start].mean() + e[[0, 1], end].mean()) / 2)
    columns = model(**inputs, start_positions=start[:, None], end_positions=end[:, None])
    assert columns.loss == output.loss
    for outside in (9, 400, -100, -1):
        cut = model(
            **inputs, start_positions=torch.tensor([1, outside]), end_positions=torch.tensor([outside, outside])
        )
        torch.testing.assert_close(cut.loss, -s[0, 1] / 2)


def test_answers_are_not_in_padding(make):
    model = make(FunnelTFMForQuestionAnswering)
    batch = batch_of(sentences((5, 12)), 12, "right")
    output = model(**batch)
    assert (output.start_logits + output.end_logits).isfinite().all()
    assert output.start_logits.softmax(-1)[0, 5:].sum() == 0
    labels = {"start_positions": torch.tensor([1]), "end_positions": torch.tensor([3])}
    first = model(**{name: x[:1] for name, x in batch.items()}, **labels)
    alone = model(**batch_of(sentences((5,)), 5, "right"), **labels)
    torch.testing.assert_close(first.loss, alone.loss)


# ---- embeddings


@pytest.mark.parametrize("mean_resizing", [True, False])
@pytest.mark.parametrize("size", [61, 40])
@every_class
def test_resize_token_embeddings(cls, size, mean_resizing, make, tmp_path):
    model = make(cls)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    embeddings = model.resize_token_embeddings(size, mean_resizing=mean_resizing)
    assert embeddings is model.get_input_embeddings()
    assert embeddings.weight.shape == (size, 16)
    assert (embeddings.num_embeddings, embeddings.embedding_dim) == (size, 16)
    assert model.config.vocab_size == size
    kept = min(size, 50)
    for name, x in model.state_dict().items():
        assert torch.equal(x[:kept], before[name][:kept]) if x.shape != before[name].shape else True
    net = (model if cls is FunnelTFMModel else model.funnel).net
    assert net.net_config.vocab_size == size
    assert next(iter(net.state_dict())) == "input_layer.0.lookup_table"
    inputs = inputs_for(cls)
    inputs["input_ids"] = inputs["input_ids"] % 40
    inputs["input_ids"][..., 1] = size - 1
    model(**inputs)
    if cls is FunnelTFMForMaskedLM:
        assert outputs(model, **inputs)[0].shape == (2, 9, size)
        assert model.lm_head.bias.shape == (size,)
    model.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path)
    for a, b in zip(outputs(model, **inputs), outputs(again, **inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_resize_to_a_multiple_and_to_nothing_new(make):
    model = make(FunnelTFMForMaskedLM)
    table = model.get_input_embeddings().weight
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    assert model.resize_token_embeddings(50).weight is table
    assert model.resize_token_embeddings(pad_to_multiple_of=8).num_embeddings == 56
    assert model.get_input_embeddings().weight is table  # the same parameter, so that an optimizer keeps it
    model(**inputs_for(FunnelTFMForMaskedLM), labels=torch.full((2, 9), 55)).loss.backward()
    assert table.grad.shape == (56, 16)


def test_set_input_embeddings(make):
    model = make(FunnelTFMForTokenClassification)
    new = torch.nn.Embedding(70, 16)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings().weight is new.weight
    assert "funnel.net.input_layer.0.lookup_table" in model.state_dict()
    ids = torch.full((1, 5), 69)
    assert torch.equal(model.get_input_embeddings()(ids), new(ids))
    with pytest.raises(InputError, match=r"weight of shape \(vocab_size, 16\)"):
        model.set_input_embeddings(torch.nn.Embedding(70, 8))


# ---- training


def gradients(model, inputs):
    model.zero_grad()
    torch.manual_seed(0)
    model(**inputs, **labels_for(type(model), inputs)).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Newer versions of `transformers` have another name for it.
renamed = pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")


@renamed
@pytest.mark.parametrize("cls", [FunnelTFMForMaskedLM, FunnelTFMForSequenceClassification])
def test_gradient_checkpointing(cls, make):
    model = make(cls).train()
    inputs = inputs_for(cls)
    expected = gradients(model, inputs)
    assert len(expected) == len(list(model.parameters()))
    assert model.supports_gradient_checkpointing
    model.gradient_checkpointing_enable()
    assert model.funnel.net.gradient_checkpointing
    got = gradients(model, inputs)
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])
    model.gradient_checkpointing_disable()
    assert not model.funnel.net.gradient_checkpointing


def test_gradients_reach_every_parameter_with_padding(make):
    for side in ("right", "left"):
        model = make(FunnelTFMForMaskedLM).train()
        batch = batch_of(sentences((5, 12)), 15, side)
        model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@renamed
@pytest.mark.parametrize("cls", [FunnelTFMForSequenceClassification, FunnelTFMForQuestionAnswering])
def test_trainer(cls, config, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    model = cls(config())
    before = copy.deepcopy(model.state_dict())
    inputs = inputs_for(cls, rows=2)
    rows = [{name: x[i] for name, x in (inputs | labels_for(cls, inputs)).items()} for i in range(2)] * 4
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    assert not trainer.model_accepts_loss_kwargs
    assert trainer.train().global_step == 2
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert any(not torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert_same(model.eval(), cls.from_pretrained(tmp_path / "checkpoint-2"))


# ---- the beam head


def beam_by_hand(model, batch, p_mask):
    """For every row: its allowed columns, start log probabilities, those of ends given each start, answerability."""
    with torch.no_grad():
        hidden = model.funnel(**batch).last_hidden_state.double()
    w = {name: x.detach().double() for name, x in model.beam_head.state_dict().items()}
    rows = []
    for h, mask, p in zip(hidden, batch["attention_mask"].tolist(), p_mask.tolist(), strict=True):
        allowed = [t for t in range(len(mask)) if mask[t] and not p[t]]
        starts = torch.stack([h[t] @ w["start.weight"][:, 0] + w["start.bias"][0] for t in allowed])
        ends = []
        for i in allowed:
            logits = []
            for j in allowed:
                x = torch.tanh(torch.cat([h[j], h[i]]) @ w["end_dense_0.weight"] + w["end_dense_0.bias"])
                x = (x - x.mean()) / (x.var(unbiased=False) + 1e-9).sqrt()
                x = x * w["end_layer_norm.weight"] + w["end_layer_norm.bias"]
                logits.append((x @ w["end_dense_1.weight"] + w["end_dense_1.bias"])[0])
            logits = torch.stack(logits)
            ends.append(dict(zip(allowed, (logits - logits.exp().sum().log()).tolist(), strict=True)))
        log_probs = starts - starts.exp().sum().log()
        weighted = sum(p * h[t] for p, t in zip(log_probs.exp(), allowed, strict=True))
        x = torch.cat([weighted, h[mask.index(1)]]) @ w["answer_dense_0.weight"] + w["answer_dense_0.bias"]
        answer = (torch.tanh(x) @ w["answer_dense_1.weight"]).item()
        starts_by_column = dict(zip(allowed, log_probs.tolist(), strict=True))
        rows.append((starts_by_column, dict(zip(allowed, ends, strict=True)), answer))
    return rows


def beam_batch(side="right", length=12, lengths=(5, 9, 12)):
    """A batch, and a p_mask that rules out two tokens of every sentence."""
    rows = sentences(lengths)
    p_mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        first = 0 if side == "right" else length - len(row)
        p_mask[i, first + 1 : first + 3] = 1
    return batch_of(rows, length, side), p_mask


@pytest.fixture
def beam(make):
    return lambda **keys: make(FunnelTFMForQuestionAnswering, qa_head="beam", **keys)


@pytest.mark.parametrize("side", ["right", "left"])
def test_beam_of_all_columns_is_exhaustive(side, beam):
    batch, p_mask = beam_batch(side)
    model = beam(start_n_top=12, end_n_top=12)
    output = model(**batch, p_mask=p_mask)
    assert output.start_top_index.shape == (3, 12)
    assert output.end_top_index.shape == output.end_top_log_probs.shape == (3, 144)
    for i, (starts, ends, answer) in enumerate(beam_by_hand(model, batch, p_mask)):
        expected = {(s, e): starts[s] + ends[s][e] for s in starts for e in ends[s]}
        assert sum(math.exp(x) for x in expected.values()) == pytest.approx(1)
        got = {}
        for number, (e, log_prob) in enumerate(
            zip(output.end_top_index[i].tolist(), output.end_top_log_probs[i].tolist(), strict=True)
        ):
            s = output.start_top_index[i, number // 12].item()
            got[s, e] = output.start_top_log_probs[i, number // 12].item() + log_prob
        assert len(got) == 144
        assert {pair for pair, log_prob in got.items() if math.exp(log_prob) > 0} == set(expected)
        assert max(got, key=got.get) == max(expected, key=expected.get)
        for pair, log_prob in expected.items():
            assert got[pair] == pytest.approx(log_prob, abs=1e-4)
        assert output.cls_logits[i].item() == pytest.approx(answer, abs=1e-4)


@pytest.mark.parametrize(("n_start", "n_end"), [(1, 1), (2, 3), (5, 2)])
def test_beam_keeps_the_best_starts_and_the_best_ends_of_each(n_start, n_end, beam):
    batch, p_mask = beam_batch("left")
    model = beam(start_n_top=n_start, end_n_top=n_end)
    output = model(**batch, p_mask=p_mask)
    assert output.start_top_index.shape == (3, n_start)
    assert output.end_top_index.shape == (3, n_start * n_end)
    for i, (starts, ends, _) in enumerate(beam_by_hand(model, batch, p_mask)):
        best = sorted(starts, key=starts.get, reverse=True)[:n_start]
        n = len(best)  # the shortest row has three columns where an answer can be
        assert output.start_top_index[i, :n].tolist() == best
        torch.testing.assert_close(
            output.start_top_log_probs[i, :n], torch.tensor([starts[s] for s in best]), rtol=0, atol=1e-4
        )
        best_ends = [sorted(ends[s], key=ends[s].get, reverse=True)[:n_end] for s in best]
        assert output.end_top_index[i].unflatten(0, (n_start, n_end))[:n].tolist() == best_ends
        expected = torch.tensor([[ends[s][e] for e in row] for s, row in zip(best, best_ends, strict=True)])
        torch.testing.assert_close(
            output.end_top_log_probs[i].unflatten(0, (n_start, n_end))[:n], expected, rtol=0, atol=1e-4
        )
        assert not output.start_top_log_probs[i, n:].exp().any()
        # What users of the plain head read: the starts, and the ends of the best one.
        for logits, log_probs in ((output.start_logits, starts), (output.end_logits, ends[best[0]])):
            expected = torch.zeros(12).scatter(0, torch.tensor([*log_probs]), torch.tensor([*log_probs.values()]).exp())
            torch.testing.assert_close(logits[i].softmax(-1), expected, rtol=0, atol=1e-4)
    assert (output.start_logits + output.end_logits).isfinite().all()


def test_beam_losses_by_hand(beam):
    batch, p_mask = beam_batch("left")  # sentences begin at columns 7, 3 and 0
    model = beam(start_n_top=2, end_n_top=2)
    by_hand = beam_by_hand(model, batch, p_mask)
    labels = {"start_positions": torch.tensor([10, 3, 4]), "end_positions": torch.tensor([11, 3, 9])}
    s = [-row[0][at] for row, at in zip(by_hand, (10, 3, 4), strict=True)]
    e = [-row[1][at][to] for row, at, to in zip(by_hand, (10, 3, 4), (11, 3, 9), strict=True)]
    spans = (sum(s) / 3 + sum(e) / 3) / 2
    loss = model(**batch, p_mask=p_mask, **labels).loss
    assert loss.item() == pytest.approx(spans, abs=1e-4)

    def answer_loss(x, impossible):
        p = 1 / (1 + math.exp(-x))
        return -math.log(p if impossible else 1 - p)

    answers = [answer_loss(row[2], impossible) for row, impossible in zip(by_hand, (0, 1, 0), strict=True)]
    for form in (torch.tensor([0, 1, 0]), torch.tensor([[0.0], [1], [0]]), torch.tensor([False, True, False])):
        loss = model(**batch, p_mask=p_mask, **labels, is_impossible=form).loss
        assert loss.item() == pytest.approx(spans + 0.5 * sum(answers) / 3, abs=1e-4)
    columns = {name: x[:, None] for name, x in labels.items()}
    assert model(**batch, p_mask=p_mask, **columns, is_impossible=form).loss == loss

    none = torch.tensor([0, -100, -100])
    loss = model(**batch, p_mask=p_mask, **labels, is_impossible=none).loss
    assert loss.item() == pytest.approx(spans + 0.5 * answers[0], abs=1e-4)
    for outside in (12, 400, -100, -1):
        labels = {"start_positions": torch.tensor([10, 3, outside]), "end_positions": torch.tensor([outside, 3, 9])}
        # The end of the first is outside; that of the last is given a start which is not there.
        expected = ((s[0] + s[1]) / 2 + e[1]) / 2
        assert model(**batch, p_mask=p_mask, **labels).loss.item() == pytest.approx(expected, abs=1e-4)
        labels = {name: torch.full((3,), outside) for name in labels}
        assert model(**batch, p_mask=p_mask, **labels).loss == 0
        loss = model(**batch, p_mask=p_mask, **labels, is_impossible=torch.tensor([0, 1, 0])).loss
        assert loss.item() == pytest.approx(0.5 * sum(answers) / 3, abs=1e-4)


@pytest.mark.parametrize("side", ["right", "left"])
def test_beam_gives_the_same_in_any_batch(side, beam):
    model = beam(start_n_top=3, end_n_top=2)
    batch, p_mask = beam_batch(side, length=15, lengths=(6, 9, 12))
    labels = {"start_positions": torch.tensor([3, 0, 4]), "end_positions": torch.tensor([5, 0, 9])}
    first = torch.tensor([0, 0, 0] if side == "right" else [9, 6, 3])
    output = model(
        **batch,
        p_mask=p_mask,
        **{name: x + first for name, x in labels.items()},
        is_impossible=torch.tensor([0, 1, 0]),
    )
    losses = []
    for i, n in enumerate((6, 9, 12)):
        columns = slice(first[i], first[i] + n)
        alone = model(
            **{name: x[i : i + 1, columns] for name, x in batch.items()},
            p_mask=p_mask[i : i + 1, columns],
            **{name: x[i : i + 1] for name, x in labels.items()},
            is_impossible=torch.tensor([int(i == 1)]),
        )
        losses.append(alone.loss)
        for name in ("start_top_log_probs", "end_top_log_probs", "cls_logits"):
            torch.testing.assert_close(output[name][i], alone[name][0], rtol=0, atol=1e-5)
        for name in ("start_top_index", "end_top_index"):
            assert torch.equal(output[name][i], alone[name][0] + first[i])
        for name in ("start_logits", "end_logits"):
            torch.testing.assert_close(output[name][i, columns], alone[name][0], rtol=0, atol=1e-5)
            assert output[name][i].softmax(-1)[batch["attention_mask"][i] == 0].sum() == 0
    torch.testing.assert_close(output.loss, torch.stack(losses).mean())


def test_beam_of_a_short_row_keeps_every_token(beam):
    output = beam()(**batch_of(sentences((2, 3)), 3, "right"))
    assert output.start_top_index.shape == (2, 3)
    assert output.end_top_index.shape == (2, 9)
    assert output.start_top_index[0, 2] == 2  # the padding, last
    assert output.start_top_log_probs[0].exp()[2] == 0
    nothing = batch_of([torch.zeros(0, dtype=torch.long)], 3, "right")
    assert all(x.isfinite().all() for x in outputs(beam(), **nothing))


def test_beam_is_left_out_of_training_with_labels(beam):
    model = beam(dropout=0.0, dropatt=0.0, start_n_top=2)
    inputs = inputs_for(FunnelTFMForQuestionAnswering)
    labels = labels_for(FunnelTFMForQuestionAnswering, inputs) | {"is_impossible": torch.tensor([0, 1])}
    names = ["start_top_log_probs", "start_top_index", "end_top_log_probs", "end_top_index"]
    whole = ["loss", *names, "cls_logits", "start_logits", "end_logits"]
    evaluated = model(**inputs, **labels)
    assert [*evaluated] == whole
    assert [*model(**inputs)] == whole[1:]
    trained = model.train()(**inputs, **labels)
    assert [*trained] == ["loss", "cls_logits", "start_logits"]
    torch.testing.assert_close(trained.loss, evaluated.loss)
    assert [*model(**inputs)] == whole[1:]
    parts = model(**inputs, return_dict=False, output_hidden_states=True)
    assert type(parts) is tuple
    assert len(parts) == 8
    assert [x.shape for x in parts[:5]] == [(2, 2), (2, 2), (2, 10), (2, 10), (2,)]


@pytest.mark.parametrize("side", ["right", "left"])
def test_gradients_reach_every_parameter_of_the_beam(side, beam):
    model = beam().train()
    batch, p_mask = beam_batch(side)
    first = batch["attention_mask"].argmax(1)
    labels = {"start_positions": first + 3, "end_positions": first + 4, "is_impossible": torch.tensor([0, 1, 0])}
    model(**batch, p_mask=p_mask, **labels).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if not name.endswith((".k_head.bias", "beam_head.start.bias", "beam_head.end_dense_1.bias")):
            assert parameter.grad.any(), name  # a softmax does not see what all its logits share


def test_beam_save_load(beam, tmp_path):
    model = beam(start_n_top=3, end_n_top=2)
    model.save_pretrained(tmp_path)
    for loader in (FunnelTFMForQuestionAnswering, transformers.AutoModelForQuestionAnswering):
        again, info = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        assert (again.config.qa_head, again.config.start_n_top, again.config.end_n_top) == ("beam", 3, 2)
        assert {name.split(".")[0] for name in again.state_dict()} == {"funnel", "beam_head"}
        assert_same(model, again)
        assert_same(model, pickle.loads(pickle.dumps(again)))


def test_beam_begins_by_itself_from_a_bare_encoder(make, config, tmp_path, monkeypatch):
    make(FunnelTFMModel).save_pretrained(tmp_path)
    monkeypatch.setattr(torch, "empty_like", lambda x, **kwargs: torch.full_like(x, math.nan, **kwargs))
    model, info = FunnelTFMForQuestionAnswering.from_pretrained(tmp_path, qa_head="beam", output_loading_info=True)
    assert all(name.startswith("beam_head.") for name in info["missing_keys"])
    assert len(info["missing_keys"]) == len(model.beam_head.state_dict()) == 11
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not model.beam_head.start.bias.any()
    assert (model.beam_head.end_layer_norm.weight == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_beam_in_half_precision(dtype, beam):
    model = beam(start_n_top=2, end_n_top=2)
    batch, p_mask = beam_batch()
    labels = {"start_positions": torch.tensor([3, 0, 4]), "end_positions": torch.tensor([4, 0, 9])}
    inputs = batch | {"p_mask": p_mask} | labels | {"is_impossible": torch.tensor([0, 1, 0])}
    with torch.no_grad():
        exact = model(**inputs)
        with torch.autocast("cpu", dtype):
            mixed = model(**inputs)
        half = copy.deepcopy(model).to(dtype)(**inputs)
    assert half.start_logits.dtype is half.end_logits.dtype is dtype
    for output in (mixed, half):
        assert output.start_top_log_probs.dtype is output.end_top_log_probs.dtype is torch.float32
        assert output.cls_logits.dtype is output.loss.dtype is torch.float32
        assert all(x.isfinite().all() for x in output.values())
        assert (output.start_logits + output.end_logits).isfinite().all()
        torch.testing.assert_close(output.loss, exact.loss, rtol=0.1, atol=0.1)
        for logits in (output.start_logits, output.end_logits):
            assert logits.float().softmax(-1)[(p_mask == 1) | (batch["attention_mask"] == 0)].sum() == 0


@renamed
def test_trainer_of_the_beam(config, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    model = FunnelTFMForQuestionAnswering(config(qa_head="beam", start_n_top=3))
    before = copy.deepcopy(model.state_dict())
    inputs = inputs_for(FunnelTFMForQuestionAnswering) | {"p_mask": torch.zeros(2, 9, dtype=torch.long)}
    labels = labels_for(FunnelTFMForQuestionAnswering, inputs) | {"is_impossible": torch.tensor([0, 1])}
    rows = [{name: x[i] for name, x in (inputs | labels).items()} for i in range(2)] * 3
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, per_device_eval_batch_size=4,
        use_cpu=True, report_to=[], disable_tqdm=True, dataloader_pin_memory=False, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert all(not torch.equal(x, before[name]) for name, x in model.state_dict().items() if "beam_head" in name)
    prediction = trainer.predict(rows)
    assert math.isfinite(prediction.metrics["test_loss"])
    assert [x.shape for x in prediction.predictions] == [(6, 3), (6, 3), (6, 15), (6, 15), (6,), (6, 9), (6, 9)]


def test_what_the_heads_refuse(make, beam, config):
    inputs = inputs_for(FunnelTFMForQuestionAnswering)
    labels = labels_for(FunnelTFMForQuestionAnswering, inputs)
    impossible = {"is_impossible": torch.tensor([0, 1])}
    with pytest.raises(InputError, match="is_impossible is a label of the beam head"):
        make(FunnelTFMForQuestionAnswering)(**inputs, **labels, **impossible)
    with pytest.raises(InputError, match="give start_positions and end_positions"):
        beam()(**inputs, **impossible)
    for model in (make(FunnelTFMForQuestionAnswering), beam()):
        with pytest.raises(InputError, match=r"p_mask must have the shape of the input, \(2, 9\).*\(2, 8\)"):
            model(**inputs, p_mask=torch.zeros(2, 8))
    with pytest.raises(InputError, match="qa_head must be one of plain, beam; got 'xlnet'"):
        config(qa_head="xlnet")
    for name in ("start_n_top", "end_n_top"):
        for value in (0, 2.0, True, "5"):
            with pytest.raises(InputError, match=f"{name} must be a whole number of at least 1; got {value!r}"):
                config(**{name: value})


def test_p_mask_of_the_plain_head(make):
    model = make(FunnelTFMForQuestionAnswering)
    batch, p_mask = beam_batch()
    plain, masked = model(**batch), model(**batch, p_mask=p_mask)
    ruled_out = (p_mask == 1) | (batch["attention_mask"] == 0)
    for a, b in ((plain.start_logits, masked.start_logits), (plain.end_logits, masked.end_logits)):
        assert torch.equal(a[~ruled_out], b[~ruled_out])
        assert not b.softmax(-1)[ruled_out].any()


def test_beam_head_is_that_of_xlnet(beam):
    """From the same weights, without masks. XLNet's own model lays the ends out end by end, not start by start."""
    from transformers.models.xlnet import modeling_xlnet

    model = beam(start_n_top=3, end_n_top=2)
    head, config = model.beam_head, transformers.XLNetConfig(d_model=16, n_head=2, layer_norm_eps=1e-9)
    poolers = {
        "PoolerStartLogits": {"dense": head.start},
        "PoolerEndLogits": {"dense_0": head.end_dense_0, "LayerNorm": head.end_layer_norm, "dense_1": head.end_dense_1},
        "PoolerAnswerClass": {"dense_0": head.answer_dense_0, "dense_1": head.answer_dense_1},
    }
    theirs = []
    for name, parts in poolers.items():
        pooler = getattr(modeling_xlnet, f"XLNet{name}")(config).eval()
        state = {f"{part}.{key}": x.t() for part, mine in parts.items() for key, x in mine.state_dict().items()}
        pooler.load_state_dict(state)
        theirs.append(pooler)
    inputs = inputs_for(FunnelTFMForQuestionAnswering)
    with torch.no_grad():
        hidden = model.funnel(**inputs).last_hidden_state
        output = model(**inputs)
        start = theirs[0](hidden)
        ends = [theirs[1](hidden, start_positions=output.start_top_index[:, j]) for j in range(3)]
        weighted = torch.einsum("blh,bl->bh", hidden, start.softmax(-1))
        answer = theirs[2](hidden, start_states=weighted, cls_index=torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(output.start_logits, start, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.end_logits, ends[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(output.cls_logits, answer, rtol=0, atol=1e-5)
    for j, end in enumerate(ends):
        best = end.log_softmax(-1).topk(2)
        assert torch.equal(output.end_top_index[:, 2 * j : 2 * j + 2], best.indices)
        torch.testing.assert_close(output.end_top_log_probs[:, 2 * j : 2 * j + 2], best.values, rtol=0, atol=1e-5)


# ---- tokenizer and pipelines


@pytest.fixture
def tokenizer():
    """A tiny WordPiece tokenizer of the BERT kind."""
    from tokenizers import BertWordPieceTokenizer

    words = "a good bad film was the ##s ##ly it very not great dull story"
    vocab = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words.split()))}
    fast = BertWordPieceTokenizer(vocab, lowercase=True)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=fast._tokenizer,
        mask_token="[MASK]",
        **names,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def saved(cls, make, tokenizer, folder, **keys):
    make(cls, vocab_size=len(tokenizer), **keys).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_tokenizer_beside_the_model(make, tokenizer, tmp_path):
    folder = saved(FunnelTFMForSequenceClassification, make, tokenizer, tmp_path)
    again = AutoTokenizer.from_pretrained(folder)
    texts = ["the film was good", "bad story"]
    assert again(texts).input_ids == tokenizer(texts).input_ids
    assert again("good", "bad").token_type_ids == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("side", ["right", "left"])
def test_text_classification_pipeline(side, make, tokenizer, tmp_path):
    tokenizer.padding_side = side
    names = {"id2label": {0: "bad", 1: "fair", 2: "good"}}
    folder = saved(FunnelTFMForSequenceClassification, make, tokenizer, tmp_path, **names)
    classify = pipeline("text-classification", model=folder, tokenizer=folder, device="cpu")
    texts = ["the film was good", "bad", "it was a very very dull story not good"]
    alone = [classify(text)[0] for text in texts]
    together = classify(texts, batch_size=3)
    for a, b in zip(alone, together, strict=True):
        assert a["label"] == b["label"] in names["id2label"].values()
        assert a["score"] == pytest.approx(b["score"], abs=1e-5)


def test_fill_mask_pipeline(make, tokenizer, tmp_path):
    folder = saved(FunnelTFMForMaskedLM, make, tokenizer, tmp_path)
    fill = pipeline("fill-mask", model=folder, tokenizer=folder, device="cpu")
    answers = fill("the film was [MASK]", top_k=3)
    assert len(answers) == 3
    ids = tokenizer("the film was [MASK]", return_tensors="pt")
    with torch.no_grad():
        logits = FunnelTFMForMaskedLM.from_pretrained(folder)(**ids).logits[0, 4]
    assert [answer["token"] for answer in answers] == logits.topk(3).indices.tolist()


def test_token_classification_and_feature_extraction_pipelines(make, tokenizer, tmp_path):
    folder = saved(FunnelTFMForTokenClassification, make, tokenizer, tmp_path)
    tags = pipeline("token-classification", model=folder, tokenizer=folder, device="cpu", ignore_labels=[])
    assert len(tags("the film was good")) == 4
    features = pipeline("feature-extraction", model=folder, tokenizer=folder, device="cpu")
    assert torch.tensor(features("the film was good")).shape == (1, 6, 16)


# ---- transformers' own Funnel, from the same weights

PAIRS = {
    "FunnelModel": FunnelTFMModel,
    "FunnelForPreTraining": FunnelTFMForPreTraining,
    "FunnelForMaskedLM": FunnelTFMForMaskedLM,
    "FunnelForSequenceClassification": FunnelTFMForSequenceClassification,
    "FunnelForMultipleChoice": FunnelTFMForMultipleChoice,
    "FunnelForTokenClassification": FunnelTFMForTokenClassification,
    "FunnelForQuestionAnswering": FunnelTFMForQuestionAnswering,
}


def theirs(name, **keys):
    """A model of transformers' Funnel, every parameter random and far from zero."""
    sizes = {"d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24, "block_sizes": [1, 2, 1], "vocab_size": 50}
    model = getattr(transformers, name)(transformers.FunnelConfig(**(sizes | {"num_decoder_layers": 2} | keys))).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(1 + noise if "layer_norm.weight" in parameter_name else noise)
    return model


def ours(model):
    """The same model of ours."""
    cls = PAIRS[type(model).__name__]
    parts = convert.from_hf(model.state_dict(), model.config.to_dict())
    config = FunnelTFMConfig.from_net_config(parts.config, lm_transform=False, pad_to_canonical=False)
    prefix = "net." if cls is FunnelTFMModel else "funnel.net."
    mine = cls(config).eval()
    mine.load_state_dict({prefix + name: x for name, x in parts.core.items()} | parts.heads)
    return mine


PARITY = {
    "as published": {},
    "all switches off": {"separate_cls": False, "truncate_seq": False, "pool_q_only": False},
    "factorized, repeats": {"attention_type": "factorized", "block_repeats": [1, 2, 1]},
    "max pooling, relu": {"pooling_type": "max", "hidden_act": "relu", "truncate_seq": False},
}


@pytest.mark.parametrize("keys", PARITY.values(), ids=PARITY)
@pytest.mark.parametrize("name", PAIRS)
def test_equal_to_funnel_of_transformers(name, keys):
    reference = theirs(name, **keys)
    model = ours(reference)
    for length in range(9, 24):
        inputs = inputs_for(PAIRS[name], length=length, seed=length)
        inputs["token_type_ids"] = inputs["token_type_ids"].clone()
        inputs["token_type_ids"][..., 0] = 2  # their tokenizer gives this
        labels = labels_for(PAIRS[name], inputs)
        with torch.no_grad():
            expected, got = reference(**inputs, **labels), model(**inputs, **labels)
        names = ["last_hidden_state"] if name == "FunnelModel" else [n for n in expected if n in got]
        assert len(names) > (name != "FunnelModel")
        for key in names:
            torch.testing.assert_close(got[key], expected[key], rtol=1e-5, atol=1e-5)
        if name == "FunnelModel":
            states = reference(**inputs, output_hidden_states=True).hidden_states
            mine = model(**inputs, output_hidden_states=True).hidden_states
            n_encoder = len(mine) - 2  # theirs has one more, the sum that enters the decoder
            for a, b in zip(mine, (*states[:n_encoder], *states[n_encoder + 1 :]), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_with_padding_funnel_of_transformers_pools_its_mask_wrongly(monkeypatch):
    """A window of one real and one padded token becomes padding there. That is all: set right, both are equal."""
    from transformers.models.funnel.modeling_funnel import FunnelAttentionStructure

    reference = theirs("FunnelModel")
    model = ours(reference)
    batch = batch_of(sentences((8, 10, 15)), 15, "right")
    batch["token_type_ids"][:, 0] = 2
    got, real = outputs(model, **batch)[0], batch["attention_mask"].bool()
    assert (got - outputs(reference, **batch)[0])[real].abs().max() > 0.01
    pool = FunnelAttentionStructure.pool_tensor
    monkeypatch.setattr(
        FunnelAttentionStructure,
        "pool_tensor",
        lambda self, tensor, mode="mean", stride=2: pool(self, tensor, "max" if mode == "min" else mode, stride),
    )
    torch.testing.assert_close(got[real], outputs(reference, **batch)[0][real], rtol=1e-5, atol=1e-5)


def test_head_formulas_by_hand(make):
    """Beside the parity: tanh-GELU and LayerNorm of the language modelling transform, in fp64."""
    model = make(FunnelTFMForMaskedLM).double()
    inputs = inputs_for(FunnelTFMForMaskedLM)
    hidden = outputs(model.funnel, **inputs)[0]
    head = model.lm_head
    x = F.gelu(hidden @ head.dense.weight + head.dense.bias, approximate="tanh")
    x = F.layer_norm(x, (16,), head.layer_norm.weight, head.layer_norm.bias, 1e-9)
    expected = x @ model.get_input_embeddings().weight.t() + head.bias
    torch.testing.assert_close(outputs(model, **inputs)[0], expected, rtol=0, atol=1e-4)
