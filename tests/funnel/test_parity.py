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


HF_SWITCHES = [
    dict(zip(("separate_cls", "truncate_seq", "pool_q_only", "attn_type", "pooling_type", "ff_activation"), v, strict=True))
    for v in itertools.product(
        (False, True), (False, True), (False, True), ("rel_shift", "factorized"), ("mean", "max"), ("gelu", "relu")
    )
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("block_size", ["1_1_1", "2_1x2_1x3"])
def test_transformers_funnel_without_padding(tiny, batch, hf_funnel, block_size):
    """Encoder (FunnelBaseModel is the encoder of FunnelModel) and decoder, every switch, lengths 9 to 23."""
    worst = {"encoder": 0.0, "decoder": 0.0}
    for seed, switches in enumerate(HF_SWITCHES):
        config = tiny(block_size=block_size, decoder_size="2", **switches)
        theirs, ours = hf_funnel(config, seed)
        n_encoder = sum(n * repeat for n, repeat in config.blocks)
        for length in (9, 12 + seed % 2, 14 + seed % 9, 23):
            inputs, seg_id = batch(length)
            reference = theirs(input_ids=inputs, token_type_ids=seg_id, output_hidden_states=True)
            hiddens, _ = ours.extract_hiddens(inputs, seg_id, torch.zeros_like(inputs), use_decoder=True)
            for hidden, other in zip(hiddens[: n_encoder + 1], reference.hidden_states, strict=False):
                difference = (hidden - other).abs().max().item()
                worst["encoder"] = max(worst["encoder"], difference)
                assert difference <= TOLERANCE, (switches, length)
            difference = (hiddens[-1] - reference.last_hidden_state).abs().max().item()
            worst["decoder"] = max(worst["decoder"], difference)
            assert difference <= TOLERANCE, (switches, length)
    assert 0 < worst["encoder"] and 0 < worst["decoder"]  # something was compared that could differ
