"""The attention against a slow one that is written from the formulas alone: a dense mask over all keys."""

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from torch.nn import functional as F

from funneltfm.errors import InputError
from funneltfm.lsg import attention, selection
from funneltfm.lsg.attention import lsg_attention
from funneltfm.lsg.selection import SELECTIONS
from funneltfm.lsg.settings import SPARSITY_TYPES, LSGSettings


def summaries(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, at: LSGSettings, head: int, draws: list[Tensor]):
    """One head's keys, values and visibility (T / f, ...), one by one. query, key, value: (T, H); seen: (T,)."""
    tokens, width = key.shape
    f, chunk, kind = at.sparsity_factor, min(at.block_size, at.sparse_block_size), at.sparsity_type
    if kind == "lsh" and f == at.sparse_block_size:
        kind = "bos_pooling"
    if f == 1:
        return key, value, seen
    rows: list[tuple[Tensor, Tensor, bool]] = []
    if kind in ("norm", "lsh"):
        for start in range(0, tokens, chunk):
            inside = range(start, start + chunk)
            if kind == "norm":
                order = sorted((j for j in inside if seen[j]), key=lambda j: -float(key[j].detach().norm()))
                none = (key.new_zeros(width), key.new_zeros(width), False)
                rows += [(key[j], value[j], True) for j in order[: chunk // f]]
                rows += [none] * (chunk // f - len(order))
                continue
            items = [(key[j], value[j], 1.0) for j in inside if seen[j]]
            for number, draw in zip([chunk] * at.lsh_num_pre_rounds + [chunk // f], draws, strict=True):
                buckets: list[list] = [[] for _ in range(number)]
                for item in items:
                    near = item[0].detach() @ draw[0, head, 0]
                    buckets[int(torch.cat([near, -near]).argmax())].append(item)
                zero = (key.new_zeros(width), key.new_zeros(width), 0.0)
                items = [tuple(sum(parts[1:], parts[0]) for parts in zip(zero, *b, strict=True)) for b in buckets]
            rows += [(k / (c + 1e-8), v / (c + 1e-8), c > 0) for k, v, c in items]
    elif kind == "block_stride":
        run = at.block_size // f
        for start in range(0, tokens, at.block_size):
            chosen = [start + (head * run) % at.block_size + j for j in range(run)]
            rows += [(key[j], value[j], bool(seen[j])) for j in chosen]
    else:
        bos = query[int(seen.int().argmax())]
        for start in range(0, tokens, f):
            group = [j for j in range(start, start + f) if seen[j]]
            if kind == "stride":
                j = start + head % f
                rows.append((key[j], value[j], bool(seen[j])))
            elif not group:
                rows.append((key.new_zeros(width), key.new_zeros(width), False))
            elif kind == "pooling":
                rows.append((key[group].sum(0) / (len(group) + 1e-6), value[group].sum(0) / (len(group) + 1e-6), True))
            else:
                weight = (key[group] @ bos / width**0.5).softmax(0)
                rows.append((weight @ key[group], weight @ value[group], True))
    keys, values, shown = zip(*rows, strict=True)
    return torch.stack(keys), torch.stack(values), torch.tensor(shown)


def slow(query, key, value, at: LSGSettings, visible: Tensor, causal: bool, draws: list[Tensor]) -> Tensor:
    """Section by section of the definition: (B, N, G + T, H) -> (B, G + T, N, H)."""
    (batch, heads, rows, width), g, block = query.shape, at.num_global_tokens, at.block_size
    real = rows - g
    missing = -real % block
    query, key, value = (F.pad(x, (0, 0, 0, missing)) for x in (query, key, value))
    tokens = real + missing
    out = []
    for b in range(batch):
        seen = F.pad(visible[b], (0, missing))
        for a in range(heads):
            q, k, v = (x[b, a] for x in (query, key, value))
            if at.has_sparse:
                ks, vs, ss = summaries(q[g:], k[g:], v[g:], seen, at, a, draws)
            else:
                ks, vs, ss = k[:0], v[:0], seen[:0]
            mask = torch.zeros(g + tokens, g + tokens + len(ks), dtype=torch.bool)
            mask[:, :g] = True
            mask[:g, g : g + tokens] = seen
            step = block // at.sparsity_factor if at.has_sparse else 0
            for t in range(tokens):
                i = t // block
                for s in range(max(0, (i - 1) * block), min(tokens, (i + 2) * block)):
                    mask[g + t, g + s] = seen[s] and not (causal and s > t)
                before = range((i - 1) * step - at.sparse_block_size, (i - 1) * step)
                after = range((i + 2) * step, (i + 2) * step + at.sparse_block_size)
                for j in [*before, *([] if causal else after)] if at.has_sparse else []:
                    if 0 <= j < len(ks):
                        mask[g + t, g + tokens + j] = ss[j]
            scores = q @ torch.cat([k, ks]).T / width**0.5
            result = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ torch.cat([v, vs])
            out.append(torch.cat([q[:g], result[g:]]) if causal else result)
    return torch.stack(out).view(batch, heads, -1, width).transpose(1, 2)[:, : g + real]


@st.composite
def cases(draw):
    kind = draw(st.sampled_from(SPARSITY_TYPES))
    block = draw(st.sampled_from([2, 3, 4, 6, 8]))
    factor = draw(st.sampled_from([f for f in range(1, block + 1) if block % f == 0]))
    size = draw(st.integers(1, 2 * block))
    try:
        at = LSGSettings(
            block_size=block, sparse_block_size=size, sparsity_factor=factor, sparsity_type=kind,
            num_global_tokens=draw(st.integers(1, 3)), lsh_num_pre_rounds=draw(st.integers(0, 2)),
        )  # fmt: skip
    except InputError:
        at = LSGSettings(block_size=8, sparse_block_size=8, sparsity_factor=2, sparsity_type=kind, num_global_tokens=2)
    tokens, batch, heads = draw(st.integers(1, 5 * block)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    padding = draw(st.lists(st.integers(0, tokens - 1), min_size=batch, max_size=batch))
    side = draw(st.sampled_from(["none", "left", "right"]))
    return at, tokens, heads, padding, side, draw(st.booleans()), draw(st.integers(0, 2**31))


def made(case):
    at, tokens, heads, padding, side, _, seed = case
    noise = torch.Generator().manual_seed(seed)
    shape = (len(padding), at.num_global_tokens + tokens, heads, 4)
    tensors = [torch.randn(shape, generator=noise, dtype=torch.float64).transpose(1, 2) for _ in range(4)]
    row, length = torch.arange(tokens), torch.tensor(padding)[:, None]
    visible = {
        "none": torch.ones(len(padding), tokens, dtype=torch.bool),
        "left": row >= length,
        "right": row < tokens - length,
    }[side]
    chunk = min(at.block_size, at.sparse_block_size)
    numbers = [chunk] * at.lsh_num_pre_rounds + ([chunk // at.sparsity_factor] if at.sparsity_factor else [])
    draws = [torch.randn(1, heads, 1, 4, n // 2, generator=noise, dtype=torch.float64) for n in numbers]
    return tensors, (None if side == "none" else visible), visible, draws


def both(case, attend):
    """Outputs and gradients of the fast and the slow way."""
    at, *_, causal, _ = case
    tensors, mask, visible, draws = made(case)
    weight = tensors.pop().transpose(1, 2) * F.pad(visible, (at.num_global_tokens, 0), value=True)[..., None, None]
    results = []
    for fast in (True, False):
        leaves = [x.clone().requires_grad_() for x in tensors]
        if fast:
            in_order = iter(draws)
            out = attend(*leaves, at, visible=mask, causal=causal, draw=lambda _, it=in_order: next(it))
        else:
            out = slow(*leaves, at, visible, causal, draws)
        loss = (out * weight).sum()
        results.append([out * (weight != 0), *torch.autograd.grad(loss, leaves)])
    return zip(*results, strict=True)


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_fast_is_slow(case):
    for fast, slow_one in both(case, lsg_attention):
        torch.testing.assert_close(fast, slow_one, rtol=0, atol=1e-9)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_at_once_is_slow(case):
    """The way of GPUs and compilers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        for fast, slow_one in both(case, lsg_attention):
            torch.testing.assert_close(fast, slow_one, rtol=0, atol=1e-9)


@pytest.mark.parametrize("chunk", [1, 2**12, 2**30])
def test_any_number_of_blocks_at_a_time_is_the_same(monkeypatch, chunk):
    monkeypatch.setattr(attention, "CHUNK", chunk)
    at = LSGSettings(block_size=4, sparse_block_size=6, sparsity_factor=2, sparsity_type="pooling", num_global_tokens=2)
    for fast, slow_one in both((at, 39, 3, [0, 7], "right", False, 3), lsg_attention):
        torch.testing.assert_close(fast, slow_one, rtol=0, atol=1e-9)


def tensors(tokens, heads=2, width=8, batch=2, seed=0, dtype=torch.float32):
    noise = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, tokens, width, generator=noise).to(dtype) for _ in range(3)]


@pytest.mark.parametrize(
    "layout", [lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: x.mT.contiguous().mT]
)
def test_rows_are_taken_from_any_layout(layout):
    x = layout(tensors(11, heads=3, batch=2)[0])[:, :, 1:]
    rows = torch.tensor([[[7, 0], [1, 2], [9, 4]], [[3, 5], [6, 8], [0, 9]]])
    at = rows[..., None].expand(2, 3, 2, x.shape[-1])
    given, wanted = (x.detach().requires_grad_() for _ in range(2))
    taken, gathered = selection._TakeRows.apply(given, rows), wanted.gather(2, at)
    weight = torch.randn(taken.shape, generator=torch.Generator().manual_seed(1))
    (taken * weight).sum().backward()
    (gathered * weight).sum().backward()
    assert torch.equal(taken, gathered)
    assert torch.equal(given.grad, wanted.grad)


def test_there_is_a_selection_for_each_type():
    assert set(SPARSITY_TYPES) == {"none"} | set(SELECTIONS) - {"identity"}


@pytest.mark.parametrize("kind", SPARSITY_TYPES)
def test_a_window_as_wide_as_the_text_is_full_attention(kind):
    query, key, value = tensors(1 + 16)
    at = LSGSettings(block_size=8, sparse_block_size=8, sparsity_type=kind)  # two blocks see each other
    out = lsg_attention(query, key, value, at)
    full = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    torch.testing.assert_close(out, full, rtol=0, atol=1e-6)
    wide = LSGSettings(block_size=8, sparse_block_size=32, sparsity_factor=1, sparsity_type="norm")
    query, key, value = tensors(1 + 40)
    full = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    torch.testing.assert_close(lsg_attention(query, key, value, wide), full, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", SPARSITY_TYPES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mask_first", [False, True])
def test_what_stands_in_padding_is_not_seen(kind, side, mask_first):
    """The original's bos_pooling saw groups of padding."""
    more = {"num_global_tokens": 2, "mask_first_token": mask_first}
    at = LSGSettings(block_size=8, sparse_block_size=8, sparsity_factor=4, sparsity_type=kind, **more)
    query, key, value = tensors(2 + 61)
    pad = slice(2, 2 + 19) if side == "left" else slice(-19, None)
    visible = torch.ones(2, 63, dtype=torch.bool)
    visible[1, pad] = False
    visible[:, 2] &= not mask_first
    torch.manual_seed(0)
    before = lsg_attention(query, key, value, at, visible=visible[:, 2:])
    for x in (query, key, value):
        x[1, :, pad] += 5.0
    torch.manual_seed(0)
    after = lsg_attention(query, key, value, at, visible=visible[:, 2:])
    assert torch.equal(before[visible], after[visible])


@pytest.mark.parametrize("kind", SPARSITY_TYPES)
def test_no_token_sees_a_later_one(kind):
    at = LSGSettings(block_size=4, sparse_block_size=8, sparsity_factor=2, sparsity_type=kind)
    query, key, value = tensors(1 + 50)
    torch.manual_seed(0)
    before = lsg_attention(query, key, value, at, causal=True)
    for x in (query, key, value):
        x[:, :, 1 + 33 :] += 5.0
    torch.manual_seed(0)
    after = lsg_attention(query, key, value, at, causal=True)
    assert torch.equal(before[:, : 1 + 33], after[:, : 1 + 33])
    assert not torch.allclose(before[:, 1 + 33 :], after[:, 1 + 33 :])


def test_fused_attention_keeps_its_products_and_the_users_setting():
    """Under "medium" it gives what it gives without, bit for bit, forward and backward, and "medium" is still set."""
    at = LSGSettings(block_size=4, sparse_block_size=4, sparsity_factor=2)
    runs = []
    before = torch.get_float32_matmul_precision()
    for name in ("highest", "medium"):
        leaves = [x.requires_grad_() for x in tensors(40)]
        torch.set_float32_matmul_precision(name)
        try:
            out = lsg_attention(*leaves, at)
            out.sum().backward()
            assert torch.get_float32_matmul_precision() == name
            assert (torch.backends.mkldnn.matmul.fp32_precision == "bf16") == (name == "medium")
        finally:
            torch.set_float32_matmul_precision(before)
        runs.append([out, *(x.grad for x in leaves)])
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", SPARSITY_TYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kind, dtype):
    at = LSGSettings(block_size=8, sparse_block_size=8, sparsity_type=kind, lsh_seed=0)
    inputs = tensors(1 + 50, dtype=dtype)
    for x in inputs:
        x.requires_grad_()
    visible = torch.arange(50) < torch.tensor([[50], [37]])
    torch.manual_seed(0)
    out = lsg_attention(*inputs, at, visible=visible)
    out.float().sum().backward()
    torch.manual_seed(0)
    close = lsg_attention(*(x.detach().float() for x in inputs), at, visible=visible)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), close, rtol=0, atol=0.05)
    assert all(x.grad.dtype == dtype and x.grad.isfinite().all() for x in inputs)


# ---- dropout


def dropped(at, inputs, p, seed, **options):
    torch.manual_seed(seed)
    return lsg_attention(*inputs, at, dropout=p, **options)


def test_dropout_drops_weights_of_its_rate_and_keeps_the_mean():
    at = LSGSettings(block_size=8, sparse_block_size=8, sparsity_type="pooling")
    query, key, value = tensors(1 + 64, batch=1)
    value = torch.ones_like(value)
    outs = torch.stack([dropped(at, (query, key, value), 0.25, seed) for seed in range(200)])
    torch.testing.assert_close(outs.mean(0), torch.ones_like(outs[0]), rtol=0, atol=0.1)
    # Queries of zero: all K weights are 1 / K, and the sum of those kept says how many they were.
    outs = dropped(at, (query * 0, key, value), 0.25, 0)[0, 1 + 24 : 1 + 32, 0, 0] * 0.75
    kept = outs * (1 + 2 * 8 + 3 * 8)
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-3)
    assert len(set(kept.round().tolist())) > 1


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_with_dropout(causal):
    at = LSGSettings(block_size=4, sparse_block_size=4, sparsity_type="pooling")
    inputs = [x.double().requires_grad_() for x in tensors(1 + 22, width=3)]
    visible = torch.arange(22) < torch.tensor([[22], [15]])
    options = {"visible": visible, "causal": causal}
    assert torch.autograd.gradcheck(lambda *x: dropped(at, x, 0.3, 1, **options), inputs)


def test_dropout_repeats_from_the_seed_and_not_without():
    at = LSGSettings(block_size=8, sparse_block_size=8)
    inputs = tensors(1 + 64)
    one, again, other = (dropped(at, inputs, 0.1, seed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


# ---- settings


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sparsity_type": "norms"}, "one of none, norm"),
        ({"num_global_tokens": 0}, "1 to 512"),
        ({"num_global_tokens": 1000}, "1 to 512"),
        ({"sparsity_factor": 3}, "a divisor of block_size 128"),
        ({"block_size": 0}, "at least 1"),
        ({"block_size": "128"}, "a whole number"),
        ({"adaptive": 1}, "true or false"),
        ({"block_size": True}, "a whole number"),
        ({"block_size": 8, "sparse_block_size": 6}, "at least block_size 8, or a divisor"),
        ({"block_size": 8, "sparse_block_size": 2, "sparsity_factor": 4, "sparsity_type": "lsh"}, "divisor"),
        ({"block_size": 4, "sparse_block_size": 8, "sparsity_factor": 4, "sparsity_type": "lsh"}, "at most half"),
        ({"sparse_block_size": -1}, "at least 0"),
        ({"lsh_seed": "x"}, "a whole number or null"),
    ],
)
def test_settings_that_do_not_fit_are_refused(given, said):
    with pytest.raises(InputError, match=said):
        LSGSettings(**given)


def test_settings_of_a_config():
    config = dataclasses.make_dataclass("Config", ["block_size", "sparsity_type"])(64, None)
    assert LSGSettings.of(config) == LSGSettings(block_size=64, sparsity_type="none")
