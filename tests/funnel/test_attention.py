"""The two forms of the position term agree with each other and with a slow reference."""

import dataclasses
import doctest

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from funneltfm.funnel import attention
from funneltfm.funnel.attention import ATTN_TYPES, AttentionStructure, Positions, RelMultiheadAttention

LAYER = 1
KEEP = nn.Identity()


def test_doctests():
    assert doctest.testmod(attention).failed == 0


def test_positions_are_whole_numbers():
    ids = Positions(-3, 4, 5).ids(torch.device("cpu"))
    assert ids.tolist() == [-3, 1, 5, 9, 13]
    assert ids.dtype == torch.int64


# (query positions, key positions): equal lengths, pooled queries over unpooled keys (stride 2 and 3), single tokens.
PAIRS = [
    (Positions(0, 1, 6), Positions(0, 1, 6)),
    (Positions(0, 1, 1), Positions(0, 1, 1)),
    (Positions(-1, 2, 4), Positions(0, 1, 8)),
    (Positions(-1, 2, 4), Positions(-1, 2, 4)),
    (Positions(-3, 4, 3), Positions(-1, 2, 4)),
    (Positions(-3, 4, 2), Positions(-1, 2, 3)),
    (Positions(0, 2, 4), Positions(0, 1, 7)),
    (Positions(-2, 3, 3), Positions(0, 1, 7)),
    (Positions(0, 3, 1), Positions(0, 1, 2)),
    (Positions(-8, 9, 3), Positions(-2, 3, 7)),
]


@pytest.fixture(params=PAIRS, ids=str)
def pair(request):
    return request.param


def listed(positions):
    return [positions.start + positions.stride * i for i in range(positions.length)]


@pytest.mark.parametrize("attn_type", ATTN_TYPES)
@torch.no_grad()
def test_position_scores_are_the_formula(pair, attn_type):
    """(q_i . r_kernel) . [sin(d w), cos(d w)] with d = position of i - position of j, by einsum in fp64."""
    q_pos, k_pos = pair
    B, N, H, D = 2, 3, 4, 12
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, N, q_pos.length, H, generator=generator)
    r_kernel = torch.randn(D, N, H, generator=generator)
    distance = torch.tensor(listed(q_pos)).double()[:, None] - torch.tensor(listed(k_pos)).double()
    angle = distance[..., None] * 10000.0 ** (-torch.arange(D // 2).double() / (D // 2))
    wanted = torch.einsum(
        "bnih,dnh,ijd->bnij", q.double(), r_kernel.double(), torch.cat([angle.sin(), angle.cos()], dim=-1)
    )
    pos_enc = ATTN_TYPES[attn_type].encode(q_pos, k_pos, D, KEEP, q)
    got = ATTN_TYPES[attn_type].score(q, r_kernel, pos_enc, k_pos.length)
    torch.testing.assert_close(got.double(), wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize("attn_type", ATTN_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_encodings_take_the_precision_of_the_hidden_states_last(attn_type, dtype):
    """Rounded after sin and cos, not before: the error is half a unit of the last place, at any position."""
    q_pos, k_pos = Positions(-7, 8, 400), Positions(-3, 4, 800)
    exact = ATTN_TYPES[attn_type].encode(q_pos, k_pos, 8, KEEP, torch.zeros(1))
    for full, low in zip(
        exact, ATTN_TYPES[attn_type].encode(q_pos, k_pos, 8, KEEP, torch.zeros(1, dtype=dtype)), strict=True
    ):
        assert low.dtype == dtype
        assert torch.equal(low, full.to(dtype))  # fmt: skip


@pytest.mark.parametrize("attn_type", ATTN_TYPES)
def test_dropout_acts_on_sines_and_cosines(attn_type):
    q_pos, k_pos = Positions(-1, 2, 4), Positions(0, 1, 8)
    dropped = ATTN_TYPES[attn_type].encode(q_pos, k_pos, 8, nn.Dropout(1.0), torch.zeros(1))
    assert not any(tensor.any() for tensor in dropped)
    kept = ATTN_TYPES[attn_type].encode(q_pos, k_pos, 8, nn.Dropout(0.5).eval(), torch.zeros(1))
    assert all(tensor.any() for tensor in kept)


# ---- a whole layer


def case(model, q_pos, k_pos, with_segments, seed=0):
    """Random hidden states, segments with [CLS] in front, and a mask over some keys but not all."""
    generator = torch.Generator().manual_seed(seed)
    config = model.net_config
    key = torch.randn(2, k_pos.length, config.d_model, generator=generator)
    query = torch.randn(2, q_pos.length, config.d_model, generator=generator)
    k_seg = torch.randint(0, 2, (2, k_pos.length), generator=generator)
    q_seg = torch.randint(0, 2, (2, q_pos.length), generator=generator)
    k_seg[:, 0] = q_seg[:, 0] = config.seg_id_cls
    k_mask = torch.rand(2, k_pos.length, generator=generator) < 0.3
    k_mask[:, 0] = False
    structure = AttentionStructure(
        pos_enc=ATTN_TYPES[config.attn_type].encode(q_pos, k_pos, config.d_model, KEEP, query),
        input_mask=k_mask,
        q_seg=q_seg if with_segments else None,
        k_seg=k_seg if with_segments else None,
        seg_id_cls=config.seg_id_cls,
        func_mask=config.separate_cls,
    )
    return query, key, q_seg, k_seg, k_mask, structure


@pytest.mark.parametrize("attn_type", ATTN_TYPES)
@pytest.mark.parametrize("separate_cls", [True, False])
@pytest.mark.parametrize("with_segments", [True, False])
@torch.no_grad()
def test_layer_is_the_slow_reference(tiny, build, slow, pair, attn_type, separate_cls, with_segments):
    q_pos, k_pos = pair
    model = build(tiny(attn_type=attn_type, separate_cls=separate_cls))
    reference = slow(model)
    query, key, q_seg, k_seg, k_mask, structure = case(model, q_pos, k_pos, with_segments)
    out = model.attn_layers[LAYER](query, key, key, structure)
    for row in range(2):
        wanted = reference.attend(
            LAYER,
            query[row].double().numpy(),
            key[row].double().numpy(),
            listed(q_pos),
            listed(k_pos),
            q_seg[row].tolist() if with_segments else None,
            k_seg[row].tolist() if with_segments else None,
            k_mask[row].tolist(),
        )
        assert np.abs(out[row].double().numpy() - wanted).max() <= 2e-6


@pytest.mark.parametrize("term", ["content", "position", "segment"])
def test_the_reference_would_show_a_missing_term(tiny, build, slow, term):
    """Every term matters in the comparison above: without it the scores are another."""
    model = build(tiny(separate_cls=False))
    q_pos, k_pos = PAIRS[2]
    query, key, q_seg, k_seg, _, _ = case(model, q_pos, k_pos, True)
    args = (LAYER, query[0].double().numpy(), key[0].double().numpy(), listed(q_pos), listed(k_pos))
    args += (q_seg[0].tolist(), k_seg[0].tolist())
    others = [name for name in ("content", "position", "segment") if name != term]
    assert np.abs(slow(model).scores(*args) - slow(model).scores(*args, terms=others)).max() > 0.05


@torch.no_grad()
def test_func_mask_silences_row_and_column_of_cls(tiny, build):
    """With separate_cls no position and no segment reaches [CLS]: its row and column hold content alone."""
    model = build(tiny())
    q_pos, k_pos = PAIRS[2]
    query, _, _, _, _, structure = case(model, q_pos, k_pos, True)
    layer = model.attn_layers[LAYER]
    q = layer.q_head(query).transpose(1, 2) * layer.scale
    bias = layer._position_and_segment(q, k_pos.length, structure)
    assert not bias[:, :, 0].any()
    assert not bias[:, :, :, 0].any()
    assert bias[:, :, 1:, 1:].ne(0).all()


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_masked_keys_count_for_nothing_and_all_masked_is_finite(tiny, build, backend, dtype):
    model = build(tiny(), std=1.5).to(dtype)  # scores of tens, as far as fp16 goes
    q_pos, k_pos = PAIRS[2]
    query, key, _, _, _, structure = case(model, q_pos, k_pos, True)
    query, key = 3 * query.to(dtype), 3 * key.to(dtype)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, 5:] = True
    mask[1] = True
    pos_enc = tuple(tensor.to(dtype) for tensor in structure.pos_enc)
    structure = dataclasses.replace(structure, pos_enc=pos_enc, input_mask=mask, func_mask=True)
    layer = model.attn_layers[LAYER]
    with sdpa_kernel(backend):
        out = layer(query, key, key, structure)
        key[0, 5:] = 7  # another content of the padding
        again = layer(query, key, key, structure)
    assert out.isfinite().all()
    assert torch.equal(out[0], again[0])


def test_dropatt_only_in_training(tiny, build):
    model = build(tiny(dropatt=0.5, dropout=0.0))
    q_pos, k_pos = PAIRS[0]
    query, key, _, _, _, structure = case(model, q_pos, k_pos, True)
    layer = model.attn_layers[LAYER]
    assert torch.equal(layer(query, key, key, structure), layer(query, key, key, structure))
    layer.train()
    assert not torch.equal(layer(query, key, key, structure), layer(query, key, key, structure))


def test_every_parameter_of_a_layer_is_initialised():
    torch.manual_seed(0)
    layer = RelMultiheadAttention(64, 4, 16, 0.0, 0.0, "rel_shift")
    for name, parameter in layer.named_parameters():
        assert parameter.isfinite().all(), name
        if name in ("r_w_bias", "r_r_bias", "r_s_bias", "r_kernel", "seg_embed"):
            assert 0 <= parameter.min() < 0.02, name
            assert 0.08 < parameter.max() <= 0.1, name
