"""Attention in chunks gives the numbers of the plain path, forward and backward, however it is cut."""

import itertools

import pytest
import torch
from torch.nn.functional import pad

from funneltfm.errors import InputError
from funneltfm.funnel import attention, chunked
from funneltfm.funnel.model import FunnelTFM

SWITCHES = [
    {"separate_cls": separate_cls, "truncate_seq": truncate_seq, "pool_q_only": pool_q_only}
    for separate_cls, truncate_seq, pool_q_only in itertools.product((True, False), repeat=3)
]
# (scores of a chunk, scores kept for the backward pass): all at once, pieces that are kept, pieces made again.
CUTS = [(2**20, 2**23), (300, 2**23), (300, 0)]


@pytest.fixture(params=CUTS, ids=["whole", "kept", "again"])
def cut(request, monkeypatch):
    monkeypatch.setattr(chunked, "_CHUNK_SCORES", request.param[0])
    monkeypatch.setattr(chunked, "_KEPT_SCORES", request.param[1])


def numbers(model, path, inputs, seg_id, weights_seed=0):
    """Hidden states of real tokens and gradients, all of them touched by a random weighted sum."""
    model.attention_path = path
    model.zero_grad()
    hiddens, ret = model(inputs, seg_id=seg_id)
    weights = torch.randn(hiddens[-1].shape, generator=torch.Generator().manual_seed(weights_seed))
    ((hiddens[-1] * weights).sum(-1).mean() + ret["cls_logits"].square().mean()).backward()
    return hiddens, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, inputs, seg_id):
    plain, plain_grads = numbers(model, "plain", inputs, seg_id)
    fast, fast_grads = numbers(model, "chunked", inputs, seg_id)
    for a, b in zip(plain, fast, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert plain_grads.keys() == fast_grads.keys()
    for name, wanted in plain_grads.items():
        atol = 1e-4 * max(0.1, float(wanted.abs().max()))
        torch.testing.assert_close(fast_grads[name], wanted, atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda keys: "-".join(k for k, v in keys.items() if v) or "none")
@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 17, 43])
@pytest.mark.parametrize("segments", [True, False])
def test_any_config_length_and_padding(tiny, build, batch, cut, switches, length, segments):
    model = build(tiny(block_size="2_1x2_1", **switches))
    inputs, seg_id = batch(length)
    inputs[1, (length + 1) // 2 :] = 0
    assert_same(model, inputs, seg_id if segments else None)


@pytest.mark.parametrize(
    "keys",
    [
        {"pooling_size": 3},
        {"n_head": 3, "d_head": 4},
        {"func_mask": "always", "separate_cls": False},
        {"pooling_type": "max", "block_size": "1_1_1_1"},
        {"seg_id_cls": 7},
    ],
    ids=str,
)
def test_other_configs(tiny, build, batch, cut, keys):
    model = build(tiny(**keys))
    inputs, seg_id = batch(21, rows=3)
    seg_id[seg_id == 2] = model.net_config.seg_id_cls
    seg_id[:, -2:] = 5  # a third segment
    inputs[2] = 0  # a row of padding alone
    assert_same(model, inputs, seg_id)


@pytest.mark.parametrize("switches", [SWITCHES[0], SWITCHES[-1]])
def test_a_loss_that_reads_rows_of_padding_alone(tiny, build, batch, cut, switches):
    """Of scores that are all the lowest number, positions and segments have no gradient on either path."""
    model = build(tiny(**switches))
    inputs, seg_id = batch(9, rows=2)
    mask = torch.ones_like(inputs)
    found = {}
    for path in ("plain", "chunked"):
        model.attention_path = path
        model.zero_grad()
        model(inputs, input_mask=mask, seg_id=seg_id)[1]["cls_logits"].square().sum().backward()
        found[path] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found["plain"].keys() == found["chunked"].keys()
    for name, wanted in found["plain"].items():
        torch.testing.assert_close(
            found["chunked"][name], wanted, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_pooled_queries_with_segments_of_their_own(tiny, build):
    """A segment that keys do not have is another than theirs."""
    model = build(tiny())
    seg_id = torch.tensor([[2, 0, 1, 0, 1, 3, 3, 0, 4, 0, 0]])
    assert_same(model, torch.arange(1, 12)[None], seg_id)


def test_decoder_and_embeddings(tiny, build, batch, cut):
    model = build(tiny(decoder_size="2"))
    inputs, seg_id = batch(19)
    found = []
    for path in ("plain", "chunked"):
        model.attention_path = path
        found.append(model.extract_hiddens(inputs, seg_id=seg_id, use_decoder=True)[0][-1])
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)


def test_gradients_are_the_slopes(cut):
    """torch's own check by differences, in fp64."""
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    n_head, batch, q_len, k_len, width = 2, 3, 5, 9, 4
    layout = chunked.Layout(n_head, shift=2, func_mask=True, dropout=0.0)
    inputs = [tensor(6, q_len, width + 1), tensor(6, k_len, width + 1), tensor(6, k_len, width)]
    inputs += [tensor(n_head * batch, q_len, width), tensor(n_head, 2 * q_len + k_len, width)]
    assert torch.autograd.gradcheck(lambda *tensors: chunked.chunked_attention(*tensors, layout), inputs)


@pytest.mark.parametrize("q_len", [1, 7, 64, 200])
@pytest.mark.parametrize("shift", [1, 2])
def test_pieces_are_all_scores_once(cut, q_len, shift):
    n_head, batch, k_len = 3, 2, shift * q_len
    seen = torch.zeros(n_head * batch, q_len, dtype=torch.int64)
    for piece in chunked.pieces(n_head, batch, q_len, k_len, shift):
        seen[piece.group, piece.queries] += 1
        assert 0 <= piece.distances.start < piece.distances.stop <= shift * q_len + k_len
    assert seen.eq(1).all()


# ---- dropout


def test_dropout_drops_its_share_and_keeps_the_mean():
    keep = chunked.keep_mask(torch.Size((1000, 1001)), 0.1, torch.Generator().manual_seed(0))
    assert keep.dtype == torch.bool
    assert keep.float().mean() == pytest.approx(0.9, abs=2e-3)
    assert keep.float().mean(0).std() == pytest.approx((0.09 / 1000) ** 0.5, rel=0.2)  # as of independent numbers
    assert chunked.keep_scale(0.1) == pytest.approx(1 / 0.9, rel=1e-4)
    assert chunked.keep_mask(torch.Size((1000,)), 0.0, torch.Generator().manual_seed(0)).all()


@pytest.fixture
def dropping(tiny, build):
    return build(tiny(dropatt=0.3, dropout=0.2)).train()


def test_what_is_made_again_is_what_was(dropping, batch, monkeypatch):
    """With dropout too: the backward pass draws the forward pass's masks."""
    inputs, seg_id = batch(30)
    monkeypatch.setattr(chunked, "_CHUNK_SCORES", 300)
    grads = []
    for kept in (2**23, 0):
        monkeypatch.setattr(chunked, "_KEPT_SCORES", kept)
        torch.manual_seed(0)
        grads.append(numbers(dropping, "chunked", inputs, seg_id)[1])
    for name, wanted in grads[0].items():
        assert torch.equal(wanted, grads[1][name]), name


def test_gradient_checkpointing_changes_no_bit(dropping, batch):
    inputs, seg_id = batch(30)
    grads = []
    for dropping.gradient_checkpointing in (False, True):
        torch.manual_seed(0)
        grads.append(numbers(dropping, "auto", inputs, seg_id)[1])
    for name, wanted in grads[0].items():
        assert torch.equal(wanted, grads[1][name]), name


def test_dropout_of_probabilities_is_that_of_the_plain_path_on_average(tiny, build, batch):
    model = build(tiny(dropatt=0.3, dropout=0.0), std=0.1).train()
    inputs, seg_id = batch(9)
    means = {}
    for path in ("plain", "chunked"):
        model.attention_path = path
        torch.manual_seed(0)
        with torch.no_grad():
            drawn = torch.stack([model.extract_hiddens(inputs, seg_id=seg_id)[0][1] for _ in range(600)])
        means[path] = drawn.mean(0), drawn.std(0)
    torch.testing.assert_close(means["plain"][0], means["chunked"][0], atol=0.02, rtol=0)
    torch.testing.assert_close(means["plain"][1], means["chunked"][1], atol=0.03, rtol=0.3)
    assert means["chunked"][1].mean() > 0.01


# ---- precision, caching, choosing


@pytest.mark.parametrize("autocast", [True, False])
@torch.no_grad()
def test_bf16_is_close(tiny, build, batch, autocast):
    model = build(tiny(), std=0.1)
    inputs, seg_id = batch(40)
    inputs[1, 30:] = 0
    wanted = model.extract_hiddens(inputs, seg_id=seg_id)[0][-1]
    if not autocast:
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = model.extract_hiddens(inputs, seg_id=seg_id)[0][-1]
    assert (got.float() - wanted).abs().max() < 0.1
    assert (got.float() - wanted).abs().max() > 0


def test_bf16_trains(tiny, build, batch):
    model = build(tiny(), std=0.1).train()
    inputs, seg_id = batch(40)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(inputs, seg_id=seg_id, cls_target=torch.tensor([0, 1]))[1]["cls_loss"]
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_kept_keys_of_distances_never_grow_old(tiny, build, batch):
    """After any change of the weights, also one that no counter sees, the answer is that of a model without memory."""
    model, fresh = build(tiny()), build(tiny(), seed=1)
    inputs, seg_id = batch(19)

    def check():
        model.attention_path = fresh.attention_path = "chunked"
        fresh.load_state_dict(model.state_dict())
        for layer in fresh.attn_layers:
            attention._LAST_KEYS.pop(layer, None)
        got = model.extract_hiddens(inputs, seg_id=seg_id)[0][-1]
        assert torch.equal(got, model.extract_hiddens(inputs, seg_id=seg_id)[0][-1])
        assert torch.equal(got, fresh.extract_hiddens(inputs, seg_id=seg_id)[0][-1])
        return got

    before = check()
    assert attention._LAST_KEYS[model.attn_layers[0]].keys is not None
    for layer in model.attn_layers:
        layer.r_kernel.data.add_(0.1)
    after = check()
    assert not torch.equal(before, after)
    inputs, seg_id = batch(23)
    check()
    model.double()
    fresh.double()
    assert check().dtype == torch.float64


def test_evaluation_in_inference_mode_spoils_no_training(tiny, build, batch):
    """What evaluation keeps is used in training where there is no dropout."""
    model = build(tiny(dropout=0.0, dropatt=0.0))
    inputs, seg_id = batch(27)
    with torch.inference_mode():
        model.eval().extract_hiddens(inputs, seg_id=seg_id)
    numbers(model.train(), "auto", inputs, seg_id)
    assert model.attn_layers[0].r_kernel.grad.abs().max() > 0


def test_what_is_kept_is_no_part_of_the_model(tiny, build, batch):
    model = build(tiny())
    names = set(model.state_dict())
    with torch.no_grad():
        model.extract_hiddens(batch(9)[0])
    assert set(model.state_dict()) == names
    assert not [key for layer in model.attn_layers for key in vars(layer) if "last" in key.lower()]


def test_auto_is_chunked_on_a_cpu(tiny, build, batch, monkeypatch):
    calls = []
    monkeypatch.setattr(
        attention, "chunked_attention", lambda *args: calls.append(1) or chunked.chunked_attention(*args)
    )
    inputs, seg_id = batch(9)
    for keys, path, called in (
        ({}, "auto", True), ({}, "plain", False), ({}, "chunked", True), ({"attn_type": "factorized"}, "auto", False),
    ):  # fmt: skip
        calls.clear()
        model = build(tiny(**keys))
        model.attention_path = path
        model.extract_hiddens(inputs, seg_id=seg_id)
        assert bool(calls) == called, (keys, path)


def test_factorized_cannot_be_chunked(tiny, build, batch):
    model = build(tiny(attn_type="factorized"))
    model.attention_path = "chunked"
    with pytest.raises(InputError, match=r"rel_shift.*factorized"):
        model.extract_hiddens(batch(9)[0])


def test_memory_of_scores_is_that_of_a_chunk(monkeypatch):
    """No tensor that the call makes is as large as all scores."""
    monkeypatch.setattr(chunked, "_CHUNK_SCORES", 2**12)
    monkeypatch.setattr(chunked, "_KEPT_SCORES", 0)
    largest = []
    softmax = chunked.F.softmax
    monkeypatch.setattr(
        chunked.F, "softmax", lambda scores, dim: largest.append(scores.numel()) or softmax(scores, dim=dim)
    )
    length = 256
    tensors = [torch.randn(2, length, 4).requires_grad_() for _ in range(4)]
    r = torch.randn(2, 2 * length, 4).requires_grad_()
    chunked.chunked_attention(*tensors, r, chunked.Layout(2, 1, True, 0.0)).sum().backward()
    assert len(largest) == 2 * 2 * length // 16
    assert max(largest) <= max(2**12, 16 * length)


def test_padding_changes_nothing(tiny, build, batch):
    """At the canonical length, as on the plain path."""
    from funneltfm.funnel.config import canonical_length

    model = build(tiny())
    inputs, seg_id = batch(14)
    shortest = canonical_length(14, model.net_config)
    found = []
    for length in (shortest, shortest + 8):
        longer = [pad(x, (0, length - 14)) for x in (inputs, seg_id)]
        found.append(model.extract_hiddens(longer[0], seg_id=longer[1])[0][-1][:, 0])
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)
    assert isinstance(model, FunnelTFM)
