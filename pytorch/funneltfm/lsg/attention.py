"""LSG attention on queries, keys and values, and its entry in the attention interface of `transformers`.

The rows are G global tokens, then T tokens in blocks of `block` rows. A global row sees all. Block i sees, in one
softmax,

    [ G globals | S summaries before | S summaries after | blocks i-1, i, i+1 ]

where summary j stands for tokens around [j f, (j + 1) f), and those before and after adjoin the three blocks. What a
block sees beside the globals are windows that slide over the tokens and over their summaries, so a part of what it sees
is (source, first, size, step): block i sees rows [first + i step, first + i step + size) of the source.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from funneltfm.errors import InputError
from funneltfm.lsg.selection import Draw, pad_tokens, select
from funneltfm.lsg.settings import LSGSettings

TOKENS, SUMMARIES = 0, 1  # sources of windows
CHUNK = 2**20  # keys' numbers in the windows that exist at a time: few calls, and yet a cache holds them; two blocks'


class Part(NamedTuple):
    source: int
    first: int
    size: int
    step: int


class Plan(NamedTuple):
    """Everything about a call of `_BlockAttention` that is no tensor."""

    num_globals: int
    block: int
    parts: tuple[Part, ...]
    scale: float
    dropout: float
    causal: bool


def window_parts(settings: LSGSettings, causal: bool) -> tuple[Part, ...]:
    """What block i sees beside the globals; with `causal`, nothing behind it."""
    block, size = settings.block_size, settings.sparse_block_size
    local = Part(TOKENS, -block, (2 if causal else 3) * block, block)
    if settings.selection == "none":
        return (local,)
    step = block // settings.sparsity_factor
    before, after = Part(SUMMARIES, -step - size, size, step), Part(SUMMARIES, 2 * step, size, step)
    return (before, local) if causal else (before, after, local)


def lsg_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    settings: LSGSettings,
    *,
    visible: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
    causal: bool = False,
    draw: Draw | None = None,
) -> Tensor:
    """Attend. The cost is linear in T; no tensor has T x T numbers.

    query, key, value: (B, N, G + T, H), the G = settings.num_global_tokens global tokens first. visible: (B, T), True
    where a token may be seen, None where all may. scale: of the scores, H ** -0.5 by default. causal: a token sees no
    later one, and the globals, which see nothing, keep their query. draw: directions for lsh, Gaussian by default.
    Returns (B, G + T, N, H).
    """
    num_globals, block = settings.num_global_tokens, settings.block_size
    tokens = query.shape[2] - num_globals
    missing = -tokens % block
    if missing:
        if visible is None:
            visible = torch.ones(query.shape[0], tokens, dtype=torch.bool, device=query.device)
        visible = F.pad(visible, (0, missing))
        query, key, value = (pad_tokens(x, missing) for x in (query, key, value))
    seen = None if visible is None else visible[:, None]
    draw = draw or functools.partial(gaussian, query)
    tokens_only = (query[:, :, num_globals:], key[:, :, num_globals:], value[:, :, num_globals:])
    stream = select(*tokens_only, seen, settings, draw)
    keys, values, stream_seen = stream or (key[:, :, :0], value[:, :, :0], None)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    plan = Plan(num_globals, block, window_parts(settings, causal), scale, dropout, causal)
    fused = query.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing()
    attend = _BlockAttention.apply if fused else _attend_at_once
    out = attend(query, key, value, keys, values, seen, stream_seen, plan)
    return out[:, : num_globals + tokens]


def gaussian(like: Tensor, number: int) -> Tensor:
    """Directions for lsh: (1, N, 1, H, number), one set for each head."""
    return torch.randn(1, like.shape[1], 1, like.shape[3], number, device=like.device)


@torch.compiler.assume_constant_result
def seeded_gaussian(seed: int, heads: int, size: int, number: int, device: str) -> Tensor:
    """The same for the same seed, on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, heads, 1, size, number, generator=generator).to(device)


def slide(x: Tensor, part: Part, start: int, count: int) -> Tensor:
    """Windows of blocks start .. start + count - 1 over x (..., L, H): (..., count, size, H), zeros beyond the ends.

    >>> slide(torch.arange(1, 5).view(4, 1), Part(TOKENS, -1, 3, 2), 0, 2).squeeze(-1)
    tensor([[0, 1, 2],
            [2, 3, 4]])
    """
    first = part.first + start * part.step
    last = first + (count - 1) * part.step + part.size
    low, high = (min(max(row, 0), x.shape[-2]) for row in (first, last))
    rows = x[..., low:high, :]
    if high - low < last - first:
        before = min(max(-first, 0), last - first - (high - low))
        rows = F.pad(rows, (0, 0, before, last - first - (high - low) - before))
    return rows.unfold(-2, part.size, part.step).transpose(-1, -2)


class Windows:
    """`slide` for many chunks of blocks: those that are whole are a view, made once."""

    def __init__(self, x: Tensor, part: Part):
        self.x, self.part = x, part
        self.low = max(0, -(part.first // part.step))  # the first block whose window begins on a row
        rows = x[..., part.first + self.low * part.step :, :]
        fits = rows.shape[-2] >= part.size
        self.whole = rows.unfold(-2, part.size, part.step).transpose(-1, -2) if fits else None

    def __call__(self, start: int, count: int) -> Tensor:
        at = start - self.low
        if self.whole is not None and 0 <= at <= self.whole.shape[-3] - count:
            return self.whole[..., at : at + count, :, :]
        return slide(self.x, self.part, start, count)


def add_back(total: Tensor, windows: Tensor, part: Part, start: int) -> None:
    """The transpose of `slide`: add windows (N, count, size, H) to the rows of total (N, L, H) they were taken from."""
    heads, count, _, width = windows.shape
    for offset in range(0, part.size, part.step):
        piece = windows[:, :, offset : offset + part.step]
        first = part.first + start * part.step + offset
        last = first + count * part.step
        if first >= 0 and last <= total.shape[1]:
            rows = total[:, first:last].unflatten(1, (count, part.step))
            rows[:, :, : piece.shape[2]] += piece
        else:
            low, high = max(first, 0), min(last, total.shape[1])
            if low < high:
                full = F.pad(piece, (0, 0, 0, part.step - piece.shape[2])).reshape(heads, -1, width)
                total[:, low:high] += full[:, low - first : high - first]


def _window(ahead: Tensor, windows: list[Windows], start: int, count: int, out: Tensor | None = None) -> Tensor:
    """The keys (or values) that some blocks see: (..., count, K, H), in the memory of `out` if that is given."""
    shape = (*ahead.shape[:-2], count, *ahead.shape[-2:])
    return torch.cat([ahead[..., None, :, :].expand(shape), *(some(start, count) for some in windows)], -2, out=out)


def _windows(tokens: Tensor, summaries: Tensor, plan: Plan) -> list[Windows]:
    return [Windows((tokens, summaries)[part.source], part) for part in plan.parts]


def _window_mask(
    seen: Tensor | None,
    stream_seen: Tensor | None,
    lengths: tuple[int, int],
    plan: Plan,
    start: int,
    count: int,
    like: Tensor,
) -> Tensor | None:
    """What some blocks may see of their windows: bool (..., 1 or N, count, 1 or block, K); None where that is all.

    seen: (..., 1, T), stream_seen: (..., 1 or N, T / f), lengths: T and T / f.
    """
    sources = (seen, stream_seen)
    inside = all(
        part.first + start * part.step >= 0
        and part.first + (start + count - 1) * part.step + part.size <= lengths[part.source]
        for part in plan.parts
    )
    if inside and not plan.causal and all(source is None for source in sources):
        return None
    windows = []
    for part in plan.parts:
        source = sources[part.source]
        if source is None:
            source = torch.ones(1, lengths[part.source], dtype=torch.bool, device=like.device)
        windows.append(slide(source[..., None], part, start, count).squeeze(-1))  # (..., 1 or N, count, size)
    lead = torch.broadcast_shapes(*(window.shape[:-1] for window in windows))
    windows = [window.expand(*lead, -1) for window in windows]
    mask = torch.cat([windows[0].new_ones(*lead, plan.num_globals), *windows], -1)[..., None, :]
    if not plan.causal:
        return mask
    block = plan.block
    earlier = torch.ones(block, mask.shape[-1], dtype=torch.bool, device=like.device)
    earlier[:, -block:] = earlier[:, -block:].tril()
    return mask & earlier


def _attend_at_once(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Tensor | None,
    stream_seen: Tensor | None,
    plan: Plan,
) -> Tensor:
    """All blocks in one call of scaled_dot_product_attention: for GPUs and compilers. As `_BlockAttention`."""
    ahead, block = plan.num_globals, plan.block
    count = (query.shape[2] - ahead) // block
    window_key, window_value = (
        _window(x[:, :, :ahead], _windows(x[:, :, ahead:], stream, plan), 0, count).flatten(0, 1)
        for x, stream in ((key, keys), (value, values))
    )  # (B N, count, K, H)
    blocks = query[:, :, ahead:].unflatten(2, (count, block)).flatten(0, 1)
    lengths = (key.shape[2] - ahead, keys.shape[2])
    mask = _window_mask(seen, stream_seen, lengths, plan, 0, count, query)
    if mask is not None:
        shape = (*query.shape[:2], count, mask.shape[-2], mask.shape[-1])
        mask = mask.expand(shape).flatten(0, 1).expand(-1, -1, block, -1)
    out = F.scaled_dot_product_attention(
        blocks, window_key, window_value, attn_mask=mask, dropout_p=plan.dropout, scale=plan.scale
    )
    out = out.unflatten(0, query.shape[:2]).flatten(2, 3)
    return torch.cat([_global_rows(query, key, value, seen, plan), out], 2).transpose(1, 2)


def _global_rows(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, plan: Plan) -> Tensor:
    """The global tokens' full attention: (B, N, G, H)."""
    ahead = query[:, :, : plan.num_globals]
    if plan.causal:
        return ahead
    mask = None if seen is None else F.pad(seen, (plan.num_globals, 0), value=True)[:, :, None]
    return F.scaled_dot_product_attention(ahead, key, value, attn_mask=mask, dropout_p=plan.dropout, scale=plan.scale)


class _BlockAttention(torch.autograd.Function):
    """Some blocks at a time, so that their windows stay in the cache; backward makes the windows again.

    What is kept between the passes is as large as the inputs. Inputs: query, key, value (B, N, G + T, H); keys, values
    of the summaries (B, N, T / f, H), perhaps of none; seen (B, 1, T) and stream_seen (B, 1 or N, T / f) or None; the
    plan. Returns (B, G + T, N, H).
    """

    @staticmethod
    def forward(ctx, query, key, value, keys, values, seen, stream_seen, plan):
        out = query.new_empty(query.shape[0], query.shape[2], *query.shape[1::2])
        seed = int(torch.randint(2**62, ())) if plan.dropout else 0
        noise = torch.Generator().manual_seed(seed)
        sums = []
        for chunk in _chunks(query, key, value, keys, values, seen, stream_seen, plan):
            rows, some_sums = _forward(chunk, plan, noise)
            out[chunk.example, chunk.rows].copy_(rows.transpose(1, 2).reshape(-1, *rows.shape[1::2]))
            sums.append(some_sums)
        if plan.causal:
            out[:, : plan.num_globals] = query[:, :, : plan.num_globals].transpose(1, 2)
        else:
            for chunk in _global_chunks(query, key, value, seen, plan):
                rows, some_sums = _forward(chunk, plan, noise)
                out[chunk.example, chunk.rows] = rows[0].transpose(0, 1)
                sums.append(some_sums)
        ctx.plan, ctx.seed = plan, seed
        ctx.save_for_backward(query, key, value, keys, values, seen, stream_seen, out, *sums)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        query, key, value, keys, values, seen, stream_seen, out, *sums = ctx.saved_tensors
        plan, ahead = ctx.plan, ctx.plan.num_globals
        noise = torch.Generator().manual_seed(ctx.seed)
        exact = torch.promote_types(query.dtype, torch.float32)  # sums of many terms
        grad_query = _like(query, query.dtype)
        grad_key, grad_value = _like(key, exact).zero_(), _like(value, exact).zero_()
        grad_keys, grad_values = torch.zeros_like(keys, dtype=exact), torch.zeros_like(values, dtype=exact)
        given = iter(sums)
        for chunk in _chunks(query, key, value, keys, values, seen, stream_seen, plan):
            of = chunk.example
            count = chunk.query.shape[0]
            rows, grads = (x[of, chunk.rows].unflatten(0, (count, -1)).transpose(1, 2) for x in (out, grad))
            some, *windows = _backward(chunk, plan, noise, grads, rows, next(given))
            target = grad_query[of, :, chunk.rows].unflatten(1, (count, -1))
            target.copy_(some.transpose(0, 1))
            pairs = (windows[0], grad_key[of], grad_keys[of]), (windows[1], grad_value[of], grad_values[of])
            for window, tokens, summaries in pairs:
                window = window.transpose(0, 1).to(exact)  # (N, count, K, H)
                tokens[:, :ahead] += window[:, :, :ahead].sum(1)
                at = ahead
                for part in plan.parts:
                    add_back(
                        (tokens[:, ahead:], summaries)[part.source],
                        window[:, :, at : at + part.size],
                        part,
                        chunk.start,
                    )
                    at += part.size
        if plan.causal:
            grad_query[:, :, :ahead] = grad[:, :ahead].transpose(1, 2)
        else:
            for chunk in _global_chunks(query, key, value, seen, plan):
                of = chunk.example
                rows, grads = (x[of, chunk.rows].transpose(0, 1)[None] for x in (out, grad))
                some, some_key, some_value = _backward(chunk, plan, noise, grads, rows, next(given))
                grad_query[of, :, :ahead] = some[0]
                grad_key[of] += some_key[0]
                grad_value[of] += some_value[0]
        summed = (grad_key, grad_value, grad_keys, grad_values)
        return grad_query, *(x.to(query.dtype) for x in summed), None, None, None


class _Chunk(NamedTuple):
    """Blocks of one example: query (count, N, rows, H), key and value (count, N, K, H), mask additive or None.

    The next chunk's keys and values take this one's memory.
    """

    example: int
    rows: slice  # of the whole sequence
    start: int  # the first block
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None


def _chunks(query, key, value, keys, values, seen, stream_seen, plan):
    ahead, block = plan.num_globals, plan.block
    examples, heads, length, width = query.shape
    blocks = (length - ahead) // block
    window = ahead + sum(part.size for part in plan.parts)
    step = min(blocks, max(2, CHUNK // (heads * width * window)))
    room = [query.new_empty(heads, step, window, width) for _ in range(2)]
    lengths = (length - ahead, keys.shape[2])
    for example in range(examples):
        some_seen, some_stream = (x if x is None else x[example] for x in (seen, stream_seen))
        sources = [
            (x[example, :, :ahead], _windows(x[example, :, ahead:], y[example], plan), out)
            for x, y, out in ((key, keys, room[0]), (value, values, room[1]))
        ]
        for start in range(0, blocks, step):
            count = min(step, blocks - start)
            rows = slice(ahead + start * block, ahead + (start + count) * block)
            some_key, some_value = (
                _window(first, windows, start, count, out[:, :count]) for first, windows, out in sources
            )
            mask = _window_mask(some_seen, some_stream, lengths, plan, start, count, query)
            if mask is not None:
                mask = _additive(mask.transpose(0, 1), query).expand(count, heads, block, window)
            some = query[example, :, rows].unflatten(1, (count, block)).transpose(0, 1)
            yield _Chunk(example, rows, start, some, some_key.transpose(0, 1), some_value.transpose(0, 1), mask)


def _global_chunks(query, key, value, seen, plan):
    ahead = plan.num_globals
    for example in range(query.shape[0]):
        mask = None
        if seen is not None:
            mask = _additive(F.pad(seen[example, None, None], (ahead, 0), value=True), query)
            mask = mask.expand(1, query.shape[1], ahead, -1)
        some = slice(example, example + 1)
        yield _Chunk(example, slice(0, ahead), 0, query[some, :, :ahead], key[some], value[some], mask)


def _additive(visible: Tensor, like: Tensor) -> Tensor:
    return torch.zeros(visible.shape, dtype=like.dtype).masked_fill_(~visible, -torch.inf)


@contextlib.contextmanager
def _small_products() -> Iterator[None]:
    """Within, no fp32 product is oneDNN's, which torch.set_float32_matmul_precision("medium") asks for: the many small
    ones of fused attention take up to twice as long by it.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None or matmul.fp32_precision in ("none", "ieee"):
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _forward(chunk: _Chunk, plan: Plan, noise: torch.Generator) -> tuple[Tensor, Tensor]:
    """Attention of a chunk (count, N, rows, H), and the logarithms of the softmax's sums, which _backward wants."""
    if not plan.dropout:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        with _small_products():
            return flash(chunk.query, chunk.key, chunk.value, attn_mask=chunk.mask, scale=plan.scale)
    weights, keep, rescale = _weights(chunk, plan), *_kept(chunk, plan, noise)
    out = weights.mul_(keep) @ chunk.value.transpose(0, 1)
    return out.mul_(rescale).transpose(0, 1), weights.new_empty(0)


def _backward(
    chunk: _Chunk, plan: Plan, noise: torch.Generator, grad: Tensor, out: Tensor, sums: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of a chunk's query, key and value."""
    if not plan.dropout:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        tensors = (grad, chunk.query, chunk.key, chunk.value, out, sums)
        with _small_products():
            return flash(*tensors, 0.0, False, attn_mask=chunk.mask, scale=plan.scale)
    weights, keep, rescale = _weights(chunk, plan), *_kept(chunk, plan, noise)
    query, key, value, grad, out = (x.transpose(0, 1) for x in (chunk.query, chunk.key, chunk.value, grad, out))
    through = grad * rescale
    grad_scores = (through @ value.transpose(-1, -2)).mul_(keep)
    grad_scores.sub_((grad * out).sum(-1, keepdim=True)).mul_(weights)
    grad_value = weights.mul_(keep).transpose(-1, -2) @ through
    grads = (grad_scores @ key * plan.scale, grad_scores.transpose(-1, -2) @ (query * plan.scale), grad_value)
    return tuple(x.transpose(0, 1) for x in grads)


def _weights(chunk: _Chunk, plan: Plan) -> Tensor:
    """The softmax (N, count, rows, K), heads first, as the windows lie in memory."""
    scores = (chunk.query * plan.scale).transpose(0, 1) @ chunk.key.permute(1, 0, 3, 2)
    if chunk.mask is not None:
        scores += chunk.mask.transpose(0, 1)
    return torch.softmax(scores, -1)


def _kept(chunk: _Chunk, plan: Plan, noise: torch.Generator) -> tuple[Tensor, float]:
    """1 for the weights that dropout keeps and 0 for the others, (N, count, rows, K), and the factor of those kept.

    A draw of 64 bits decides on four weights, since drawing is what costs; so the rate is rounded to a multiple of
    2 ** -16, and the factor is that of the rounded rate.
    """
    count, heads, rows, _ = chunk.query.shape
    shape = torch.Size((heads, count, rows, chunk.key.shape[-2]))
    rate = min(round(plan.dropout * 2**16), 2**16 - 1)
    draws = torch.empty(-(-shape.numel() // 4), dtype=torch.int64).random_(-(2**63), None, generator=noise)
    lanes = draws.view(torch.int16)[: shape.numel()].view(shape)
    keep = torch.ge(lanes, rate - 2**15, out=chunk.query.new_empty(shape))
    return keep, 1 / (1 - rate / 2**16)


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor (B, N, L, H) that lies in memory as (B, L, N, H), as projections want it."""
    return x.new_empty(x.shape[0], x.shape[2], *x.shape[1::2], dtype=dtype).transpose(1, 2)


# ---- transformers


def lsg_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Self-attention of a layer, as the attention interface of `transformers` calls it.

    query, key, value: (B, N, L, H) with L = G + T, or T alone where the exact mode takes the globals away.
    attention_mask: (B, 1, 1, T) bool, True where a token may be seen, as `lsg_mask` makes it, or None. Inputs of up to
    two blocks have full attention. Returns (B, L, N, H) and None: there are no weights to show.
    """
    settings = LSGSettings.of(module.config)
    length = query.shape[2]
    if key.shape[2] != length:
        raise InputError(
            f"LSG attention is self-attention over the whole text, got {length} queries and {key.shape[2]} keys. "
            "It has no cache of past keys: call the model, or generate, with use_cache=False."
        )
    num_globals = settings.globals_in(length)
    tokens = length - num_globals
    visible = None
    if attention_mask is not None:
        visible = _checked_mask(attention_mask, query.shape[0], tokens)
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    if num_globals and (causal or tokens > 2 * settings.block_size):
        if not settings.adaptive and tokens % settings.block_size:
            raise InputError(
                f"with adaptive=false a text longer than two blocks must have a multiple of block_size "
                f"{settings.block_size} tokens, got {tokens}. Pad it, or set adaptive=true in the config."
            )
        draw = None
        if settings.lsh_seed is not None and not module.training:
            seed = settings.lsh_seed + (getattr(module, "layer_idx", None) or 0)
            draw = functools.partial(seeded_gaussian, seed, query.shape[1], query.shape[3], device=str(query.device))
        out = lsg_attention(
            query, key, value, settings, visible=visible, dropout=dropout, scale=scaling, causal=causal, draw=draw
        )
        return out, None
    mask = None if visible is None else F.pad(visible, (num_globals, 0), value=True)[:, None, None]
    if causal and mask is not None:
        mask = mask & torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, is_causal=causal and mask is None
    )
    return out.transpose(1, 2).contiguous(), None


def _checked_mask(mask: Tensor, batch: int, tokens: int) -> Tensor:
    if mask.dtype != torch.bool or mask.shape != (batch, 1, 1, tokens):
        raise InputError(
            f"LSG attention takes an attention_mask of shape (batch, tokens) = ({batch}, {tokens}), 1 for tokens and "
            f"0 for padding; got one that became {mask.dtype} of shape {tuple(mask.shape)}."
        )
    return mask[:, 0, 0]


def lsg_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    config: Any = None,
    device: torch.device | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask for `lsg_attention_forward`, as the mask interface of `transformers` asks for it.

    attention_mask: (B, T) bool, True where a token may be seen. Returns (B, 1, 1, T), or None where all may be seen.
    """
    settings = LSGSettings.of(config)
    num_globals = settings.globals_in(q_length)
    tokens = q_length - num_globals
    if attention_mask is not None and attention_mask.shape != (batch_size, tokens):
        raise InputError(
            f"LSG attention takes an attention_mask of shape (batch, tokens) = ({batch_size}, {tokens}), 1 for tokens "
            f"and 0 for padding; got {tuple(attention_mask.shape)}."
        )
    if num_globals and settings.mask_first_token:
        shown = torch.ones(batch_size, tokens, dtype=torch.bool, device=device)
        shown[:, 0] = False
        attention_mask = shown if attention_mask is None else attention_mask & shown
    if attention_mask is None:
        return None
    if not torch.compiler.is_compiling() and not torch.jit.is_tracing() and attention_mask.all():
        return None
    return attention_mask[:, None, None]
