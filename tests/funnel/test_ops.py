"""Small pieces against worked examples and definitions."""

import doctest

import pytest
import torch

from funneltfm.funnel import ops
from funneltfm.funnel.ops import (
    ACTIVATIONS,
    Dense,
    EmbeddingLookup,
    LayerNorm,
    can_pool,
    pool_hidden,
    pool_mask,
    pool_stride,
    rel_shift,
    sinusoids,
    upsample,
)


def test_doctests():
    result = doctest.testmod(ops)
    assert result.attempted >= 1
    assert result.failed == 0


# ---- positions


def test_sinusoids_are_the_formula():
    pos = torch.tensor([-9, 0, 1, 2, 100])
    sin, cos = sinusoids(pos, 8)
    assert sin.dtype == cos.dtype == torch.float32
    for row, p in enumerate(pos.tolist()):
        for i in range(4):
            angle = torch.tensor(p * 10000.0 ** (-i / 4), dtype=torch.float64)
            assert sin[row, i].item() == pytest.approx(angle.sin().item(), abs=1e-5)
            assert cos[row, i].item() == pytest.approx(angle.cos().item(), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sinusoids_know_neighbours_apart_under_a_half_default(dtype):
    """bf16 has no 257: computed in half precision, positions 256 and 257 would be one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        sin, _ = sinusoids(torch.arange(2100), 8)
    finally:
        torch.set_default_dtype(before)
    assert sin.dtype == torch.float32
    angle = torch.arange(2100).double()[:, None] * 10000.0 ** (-torch.arange(4).double() / 4)
    torch.testing.assert_close(sin, angle.sin().float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shift", [1, 2, 3])
@pytest.mark.parametrize("q_len", [1, 2, 5])
@pytest.mark.parametrize("k_len", [1, 4, 7])
def test_rel_shift_takes_the_column_of_the_distance(shift, q_len, k_len):
    R = shift * q_len + k_len
    x = torch.randn(2, 3, q_len, R, generator=torch.Generator().manual_seed(0))
    out = rel_shift(x, k_len, shift)
    assert out.shape == (2, 3, q_len, k_len)
    for i in range(q_len):
        for j in range(k_len):
            assert torch.equal(out[:, :, i, j], x[:, :, i, shift * (q_len - i) + j])


# ---- layers


def test_layer_norm_eps_and_fp32_statistics():
    norm = LayerNorm(4)
    assert norm.eps == 1e-9
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]]) * 1e-4  # variance 1.25e-8: an eps of 1e-8 would show
    torch.testing.assert_close(norm(x), (x - x.mean()) / (x.var(correction=0) + 1e-9).sqrt())
    assert norm(x)[0, 3] > 1.29
    half = norm.half()(torch.tensor([[300.0, 310.0, 290.0, 60000.0]]).half())  # the squares are beyond fp16
    assert half.dtype == torch.float16
    assert half.isfinite().all()


def test_dense_makes_and_joins_heads():
    make, join = Dense(6, (2, 3)), Dense((2, 3), 6)
    assert make.weight.shape == (6, 2, 3)
    assert make.bias.shape == (2, 3)
    assert join.weight.shape == (2, 3, 6)
    with torch.no_grad():
        make.bias.normal_()
        join.bias.normal_()
    x = torch.randn(4, 5, 6)
    heads = make(x)
    torch.testing.assert_close(heads, torch.einsum("btd,dnh->btnh", x, make.weight) + make.bias)
    torch.testing.assert_close(join(heads), torch.einsum("btnh,nhd->btd", heads, join.weight) + join.bias)
    assert Dense(6, 2, bias=False).bias is None


def test_dense_initialisation():
    weight = Dense(300, (10, 20)).weight
    assert weight.std().item() == pytest.approx((1 / 500) ** 0.5, rel=0.02)
    assert not Dense(3, 4).bias.any()


def test_embedding_lookup():
    table = EmbeddingLookup(5, 3)
    ids = torch.tensor([[4, 0], [0, 4]])
    assert [name for name, _ in table.named_parameters()] == ["lookup_table"]
    assert torch.equal(table(ids), table.lookup_table[ids])
    assert EmbeddingLookup(2000, 50).lookup_table.std().item() == pytest.approx(1, rel=0.02)


def test_activations():
    x = torch.linspace(-5, 5, 101)
    inner = (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    torch.testing.assert_close(ACTIVATIONS["gelu"](x), 0.5 * x * (1 + torch.tanh(inner)), atol=1e-6, rtol=1e-5)
    assert torch.equal(ACTIVATIONS["relu"](x), x.clamp(min=0))


# ---- pooling

# switches -> windows of [0 1 2 3 4 5 6 7] and of the odd [0 1 2 3 4 5 6]
WINDOWS = [
    ({"separate_cls": True, "truncate_seq": False}, 8, [[0], [1, 2], [3, 4], [5, 6], [7]]),
    ({"separate_cls": True, "truncate_seq": True}, 8, [[0], [1, 2], [3, 4], [5, 6]]),
    ({"separate_cls": False, "truncate_seq": False}, 8, [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ({"separate_cls": False, "truncate_seq": True}, 8, [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ({"separate_cls": True, "truncate_seq": False}, 7, [[0], [1, 2], [3, 4], [5, 6]]),
    ({"separate_cls": True, "truncate_seq": True}, 7, [[0], [1, 2], [3, 4], [5]]),
    ({"separate_cls": False, "truncate_seq": False}, 7, [[0, 1], [2, 3], [4, 5], [6]]),
    ({"separate_cls": True, "truncate_seq": False}, 3, [[0], [1, 2]]),
    ({"separate_cls": True, "truncate_seq": True}, 3, [[0], [1]]),
    ({"separate_cls": False, "truncate_seq": False}, 3, [[0, 1], [2]]),
    ({"separate_cls": False, "truncate_seq": False}, 2, [[0, 1]]),
    ({"separate_cls": True, "truncate_seq": False, "pooling_size": 3}, 8, [[0], [1, 2, 3], [4, 5, 6], [7]]),
    ({"separate_cls": True, "truncate_seq": True, "pooling_size": 3}, 8, [[0], [1, 2, 3], [4, 5]]),
    ({"separate_cls": True, "truncate_seq": True, "pooling_size": 3}, 4, [[0], [1]]),
    ({"separate_cls": False, "truncate_seq": False, "pooling_size": 3}, 8, [[0, 1, 2], [3, 4, 5], [6, 7]]),
]


@pytest.mark.parametrize(("switches", "length", "windows"), WINDOWS)
@pytest.mark.parametrize("pooling_type", ["mean", "max", "min"])
def test_pooling_worked_examples(tiny, switches, length, windows, pooling_type):
    config = tiny(pooling_type=pooling_type, **switches)
    assert can_pool(length, config)
    # A line upwards and one downwards: max and min differ, and every window is told from every other.
    x = torch.stack([torch.arange(length) * 10.0, 1000 - torch.arange(length) ** 2.0], dim=-1)[None]
    join = {"mean": lambda w: w.mean(0), "max": lambda w: w.amax(0), "min": lambda w: w.amin(0)}[pooling_type]
    torch.testing.assert_close(pool_hidden(x, config)[0], torch.stack([join(x[0, window]) for window in windows]))
    assert pool_stride(torch.arange(length)[None], config)[0].tolist() == [window[0] for window in windows]
    for n_real in range(1, length + 1):
        mask = torch.arange(length)[None] >= n_real
        wanted = [min(window) >= n_real for window in windows]  # padding only where every token is
        assert pool_mask(mask, config)[0].tolist() == wanted


@pytest.mark.parametrize("separate_cls", [True, False])
@pytest.mark.parametrize("truncate_seq", [True, False])
@pytest.mark.parametrize("pooling_size", [2, 3])
def test_pooling_goes_on_until_nothing_is_left(tiny, separate_cls, truncate_seq, pooling_size):
    config = tiny(separate_cls=separate_cls, truncate_seq=truncate_seq, pooling_size=pooling_size)
    for length in range(1, 40):
        x = torch.arange(float(length)).view(1, length, 1)
        steps = 0
        while can_pool(x.size(1), config):
            shorter = pool_hidden(x, config)
            assert 0 < shorter.size(1) < x.size(1)
            assert pool_mask(x[..., 0] > -1, config).shape == shorter.shape[:2] == pool_stride(x[..., 0], config).shape
            x, steps = shorter, steps + 1
        assert x.size(1) <= (max(2, pooling_size if truncate_seq else 2) if separate_cls else 1)
    assert steps >= 3
    shortest = {True: {2: 2, 3: 3 if truncate_seq else 2}[pooling_size], False: 1}[separate_cls]
    assert not can_pool(shortest, config)
    assert can_pool(shortest + 1, config)


def test_pool_mask_takes_any_pattern(tiny):
    """Padding in the middle, or in front: still per window."""
    config = tiny(truncate_seq=False)
    mask = torch.tensor([[1, 1, 1, 0, 1, 1, 0, 1]]).bool()
    assert pool_mask(mask, config).tolist() == [[True, True, False, False, True]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pooling_type", ["mean", "max", "min"])
def test_pooling_in_every_precision_with_gradients(tiny, dtype, pooling_type):
    x = torch.arange(24.0).view(1, 8, 3).to(dtype).requires_grad_()
    out = pool_hidden(x, tiny(pooling_type=pooling_type))
    assert out.dtype == dtype
    out.sum().backward()
    assert x.grad.sum() == out.numel()


# ---- the decoder's upsampling


@pytest.mark.parametrize(
    ("switches", "pooled", "length", "factor", "wanted"),
    [
        ({"truncate_seq": True}, [9, 1, 2], 8, 4, [9, 1, 1, 1, 1, 2, 2, 2]),
        ({"truncate_seq": True}, [9, 1], 8, 4, [9, 1, 1, 1, 1, 0, 0, 0]),  # truncation dropped the last three
        ({"truncate_seq": False}, [9, 1, 2], 6, 4, [9, 1, 1, 1, 1, 2]),
        ({"separate_cls": False}, [1, 2], 7, 4, [1, 1, 1, 1, 2, 2, 2]),
        ({"separate_cls": False}, [1, 2, 3], 3, 1, [1, 2, 3]),
        ({"truncate_seq": True}, [9], 1, 1, [9]),
    ],
)
def test_upsample_worked_examples(tiny, switches, pooled, length, factor, wanted):
    x = torch.tensor(pooled, dtype=torch.float32).view(1, -1, 1)
    assert upsample(x, length, factor, tiny(**switches)).flatten().tolist() == wanted
