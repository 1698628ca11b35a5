"""The same numbers as the original TensorFlow code, and as transformers' Funnel, from the same weights."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from funneltfm.funnel.config import ModelConfig
from funneltfm.funnel.model import FunnelTFM

FIXTURES = (
    "enc_2_2_2",
    "dec_2_2_2_d2",
    "dec_maxpool",
    "share_dec_2_1x2_1x2_d1x2",
    "mlm_2_2_2_d2",
    "electra_2_2_2_d2",
)
TOLERANCE = 1e-5


@pytest.fixture(params=FIXTURES)
def fixture(request, shared):
    return shared / "fixtures" / "funnel" / request.param


def published(folder, attn_type="rel_shift"):
    """The encoder of a fixture as a user of a published checkpoint gets it."""
    config = ModelConfig.init_from_json(folder / "net_config.pytorch.json")
    truncate = json.loads((folder / "meta.json").read_text())["truncate_seq"]
    config = dataclasses.replace(config, attn_type=attn_type, truncate_seq=truncate)
    model = FunnelTFM(config, cls_target=False).eval()
    model.load_state_dict(torch.load(folder / "converted.pt", weights_only=True), strict=True)
    return model


def test_names_and_shapes_of_the_original(fixture):
    state = torch.load(fixture / "converted.pt", weights_only=True)
    own = FunnelTFM(ModelConfig.init_from_json(fixture / "net_config.pytorch.json"), cls_target=False).state_dict()
    assert {name: tensor.shape for name, tensor in own.items()} == {name: t.shape for name, t in state.items()}


def test_head_has_the_names_of_the_original(tiny):
    with_head = set(FunnelTFM(tiny()).state_dict()) - set(FunnelTFM(tiny(), cls_target=False).state_dict())
    assert with_head == {"cls_head.0.weight", "cls_head.0.bias", "cls_head.3.weight", "cls_head.3.bias"}


@torch.no_grad()
def test_every_hidden_state_of_the_tensorflow_code(fixture):
    stored = np.load(fixture / "hiddens.npz")
    cases = json.loads((fixture / "meta.json").read_text())["cases"]
    models = {attn_type: published(fixture, attn_type) for attn_type in ("rel_shift", "factorized")}
    assert {case.split("__")[0] for case in cases} == set(models)
    compared = 0
    for case in cases:
        values = {name: torch.from_numpy(stored[f"{case}__{name}"]) for name in ("inputs", "seg", "mask")}
        assert values["mask"].any() == case.endswith("__pad")
        hiddens, ret = models[case.split("__")[0]].extract_hiddens(
            values["inputs"].long(), seg_id=values["seg"], input_mask=values["mask"]
        )
        wanted = ["emb", *sorted(k.split("__")[-1] for k in stored.files if k.startswith(f"{case}__hid"))]
        assert len(wanted) == len(hiddens)
        for name, hidden, mask in zip(wanted, hiddens, ret["hidden_masks"], strict=True):
            reference = torch.from_numpy(stored[f"{case}__{name}"])
            assert hidden.shape == reference.shape
            difference = (hidden - reference)[~mask].abs().max().item()
            assert difference <= TOLERANCE, f"{case} {name}: {difference}"
            compared += 1
    assert compared >= 4 * 7  # four cases or more of an embedding and six layers


def hf_pair(config, seed=0):
    from transformers import FunnelConfig, FunnelModel

    torch.manual_seed(seed)
    theirs = FunnelModel(
        FunnelConfig(
            vocab_size=config.vocab_size,
            block_sizes=[n for n, _ in config.blocks],
            block_repeats=[r for _, r in config.blocks],
            num_decoder_layers=config.decoder[0],
            d_model=config.d_model,
            n_head=config.n_head,
            d_head=config.d_head,
            d_inner=config.d_inner,
            hidden_act={"gelu": "gelu_new", "relu": "relu"}[config.ff_activation],
            pooling_type=config.pooling_type,
            attention_type={"rel_shift": "relative_shift", "factorized": "factorized"}[config.attn_type],
            separate_cls=config.separate_cls,
            truncate_seq=config.truncate_seq,
            pool_q_only=config.pool_q_only,
        )
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    ours = FunnelTFM(config, cls_target=False).eval()
    ours.load_state_dict(renamed(theirs.state_dict(), config))
    return theirs, ours


def renamed(hf, config):
    """transformers' tensors under the original's names and in its shapes."""
    d_model, heads = config.d_model, (config.n_head, config.d_head)
    layers = [f"encoder.blocks.{b}.{i}" for b, (n, _) in enumerate(config.blocks) for i in range(n)]
    layers += [f"decoder.layers.{i}" for i in range(config.decoder[0])]
    state = {
        "input_layer.0.lookup_table": hf["embeddings.word_embeddings.weight"],
        "input_layer.1.weight": hf["embeddings.layer_norm.weight"],
        "input_layer.1.bias": hf["embeddings.layer_norm.bias"],
    }
    for number, layer in enumerate(layers):
        attention, ffn = f"attn_layers.{number}", f"pffn_layers.{number}"
        for name in ("q_head", "k_head", "v_head"):
            state[f"{attention}.{name}.weight"] = hf[f"{layer}.attention.{name}.weight"].t().reshape(d_model, *heads)
            if name != "q_head":
                state[f"{attention}.{name}.bias"] = hf[f"{layer}.attention.{name}.bias"].reshape(heads)
        for name in ("r_w_bias", "r_r_bias", "r_s_bias", "r_kernel", "seg_embed"):
            state[f"{attention}.{name}"] = hf[f"{layer}.attention.{name}"]
        state[f"{attention}.post_proj.weight"] = hf[f"{layer}.attention.post_proj.weight"].t().reshape(*heads, d_model)
        state[f"{attention}.post_proj.bias"] = hf[f"{layer}.attention.post_proj.bias"]
        for name in ("weight", "bias"):
            state[f"{attention}.layer_norm.{name}"] = hf[f"{layer}.attention.layer_norm.{name}"]
            state[f"{ffn}.layer_norm.{name}"] = hf[f"{layer}.ffn.layer_norm.{name}"]
        for ours, theirs in (("pffn.0", "linear_1"), ("pffn.3", "linear_2")):
            state[f"{ffn}.{ours}.weight"] = hf[f"{layer}.ffn.{theirs}.weight"].t()
            state[f"{ffn}.{ours}.bias"] = hf[f"{layer}.ffn.{theirs}.bias"]
    return state


HF_KEYS = ("separate_cls", "truncate_seq", "pool_q_only", "attn_type", "pooling_type", "ff_activation")
HF_SWITCHES = [
    dict(zip(HF_KEYS, values, strict=True))
    for values in itertools.product(
        (False, True), (False, True), (False, True), ("rel_shift", "factorized"), ("mean", "max"), ("gelu", "relu")
    )
]


@torch.no_grad()
@pytest.mark.parametrize("block_size", ["1_1_1", "2_1x2_1x3"])
def test_transformers_funnel_without_padding(tiny, batch, block_size):
    """Encoder and decoder, every combination of switches, lengths 9 to 23."""
    lengths = set()
    for seed, switches in enumerate(HF_SWITCHES):
        config = tiny(block_size=block_size, decoder_size="2", **switches)
        theirs, ours = hf_pair(config, seed)
        n_encoder = sum(n * repeat for n, repeat in config.blocks)
        for length in (9 + seed % 7, 16 + seed % 8):
            lengths.add(length)
            inputs, seg_id = batch(length)
            reference = theirs(input_ids=inputs, token_type_ids=seg_id, output_hidden_states=True)
            hiddens, _ = ours.extract_hiddens(inputs, seg_id, torch.zeros_like(inputs), use_decoder=True)
            assert len(hiddens) == 1 + n_encoder + 2
            wanted = [*reference.hidden_states[: n_encoder + 1], reference.last_hidden_state]
            for hidden, other in zip([*hiddens[: n_encoder + 1], hiddens[-1]], wanted, strict=True):
                assert (hidden - other).abs().max() <= TOLERANCE, (switches, length)
    assert lengths == set(range(9, 24))


@torch.no_grad()
def test_transformers_funnel_base_model(tiny, batch):
    """FunnelBaseModel, as the published `-base` checkpoints are used: the encoder alone."""
    from transformers import FunnelBaseModel

    config = tiny(block_size="2_1x2_1")
    theirs, _ = hf_pair(dataclasses.replace(config, decoder_size="1"))
    base = FunnelBaseModel(theirs.config).eval()
    encoder = {name: tensor for name, tensor in theirs.state_dict().items() if not name.startswith("decoder.")}
    base.load_state_dict(encoder)
    ours = FunnelTFM(config, cls_target=False).eval()
    ours.load_state_dict(renamed(encoder, config))
    for length in range(9, 24):
        inputs, seg_id = batch(length)
        reference = base(input_ids=inputs, token_type_ids=seg_id).last_hidden_state
        hidden = ours.extract_hiddens(inputs, seg_id, torch.zeros_like(inputs))[0][-1]
        assert (hidden - reference).abs().max() <= TOLERANCE, length
