"""The sparse part of LSG attention: for each head, one key and value that stand for every f tokens.

A selection takes query, key, value (B, N, T, H), T a multiple of the block size; visible (B, 1, T), True where a token
may be seen, or None where all may; the settings; and `draw`, which gives lsh its random directions. It returns keys and
values (B, N, T / f, H) and their visibility (B, 1 or N, T / f) or None. Token j is in or around summary j // f.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from funneltfm.lsg.settings import LSGSettings

Stream = tuple[Tensor, Tensor, Tensor | None]
Draw = Callable[[int], Tensor]  # number of directions -> (1, N, 1, H, number)


def select_identity(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, settings: LSGSettings, draw: Draw
) -> Stream:
    """Every token for itself: the window is wider, nothing is summarised."""
    return key, value, visible


def select_norm(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, settings: LSGSettings, draw: Draw
) -> Stream:
    """Of each chunk, the tokens with the longest keys; hidden tokens come last. No gradient through the choice."""
    tokens, chunk = key.shape[2], settings.chunk
    rows = key.detach().transpose(1, 2)  # as they lie in memory, which is several times as fast
    norms = torch.linalg.vector_norm(rows, dim=-1, dtype=_at_least_float(key)).transpose(1, 2)  # (B, N, T)
    if visible is not None:
        norms = norms.masked_fill(~visible, -1.0)
    kept = norms.unflatten(-1, (-1, chunk)).topk(chunk // settings.sparsity_factor, sorted=False).indices
    first = torch.arange(0, tokens, chunk, device=key.device)[:, None]
    return _take(key, value, visible, (kept + first).flatten(2))


def select_stride(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, settings: LSGSettings, draw: Draw
) -> Stream:
    """Every f-th token; head a begins at a mod f."""
    (_, heads, tokens, _), factor = key.shape, settings.sparsity_factor
    head = torch.arange(heads, device=key.device)[:, None]
    return _take(key, value, visible, torch.arange(0, tokens, factor, device=key.device) + head % factor)


def select_block_stride(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, settings: LSGSettings, draw: Draw
) -> Stream:
    """Of each block, a run of block / f tokens; head a takes the a-th, then from the start again."""
    (_, heads, tokens, _), block = key.shape, settings.block_size
    run = block // settings.sparsity_factor
    head = torch.arange(heads, device=key.device)[:, None, None]
    first = torch.arange(0, tokens, block, device=key.device)[:, None]
    rows = first + (head * run) % block + torch.arange(run, device=key.device)  # (N, blocks, run)
    return _take(key, value, visible, rows.flatten(1))


def select_pooling(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, settings: LSGSettings, draw: Draw
) -> Stream:
    """The mean of each group's visible tokens."""
    factor = settings.sparsity_factor
    keys, values = key.unflatten(2, (-1, factor)), value.unflatten(2, (-1, factor))  # (B, N, T/f, f, H)
    if visible is None:
        return keys.sum(3) / (factor + 1e-6), values.sum(3) / (factor + 1e-6), None
    inside = visible.unflatten(2, (-1, factor))  # (B, 1, T/f, f)
    weights = inside.to(key.dtype) / (inside.sum(-1, keepdim=True).to(key.dtype) + 1e-6)
    return _weighted(keys, values, weights.expand(keys.shape[:-1]), inside)


def select_bos_pooling(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, settings: LSGSettings, draw: Draw
) -> Stream:
    """The mean of each group, weighted by the softmax of the first token's scores in it."""
    factor = settings.sparsity_factor
    if visible is None:
        first = query[:, :, :1]
    else:  # behind padding on the left
        at = visible.int().argmax(-1)[:, :, None, None]
        if settings.mask_first_token:  # which hides column 0
            at = at.masked_fill(at == 1, 0)
        first = query.gather(2, at.expand(-1, query.shape[1], 1, query.shape[3]))
    keys, values = key.unflatten(2, (-1, factor)), value.unflatten(2, (-1, factor))
    scores = (keys @ first[:, :, None].transpose(-1, -2)).squeeze(-1) * query.shape[-1] ** -0.5  # (B, N, T/f, f)
    inside = None if visible is None else visible.unflatten(2, (-1, factor))
    if inside is not None:
        scores = scores.masked_fill(~inside, torch.finfo(scores.dtype).min)
    return _weighted(keys, values, scores.softmax(-1), inside)


def select_lsh(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, settings: LSGSettings, draw: Draw
) -> Stream:
    """Means of buckets of alike keys. In each chunk, some rounds into as many buckets as tokens, then one into as many
    as summaries. Angular hashing (Andoni et al., 2015): the bucket is the nearest of +-r_i for random r_i.
    """
    chunk = settings.chunk
    buckets = [chunk] * settings.lsh_num_pre_rounds + [chunk // settings.sparsity_factor]
    keys, values = (x.to(_at_least_float(x)).unflatten(2, (-1, chunk)) for x in (key, value))  # (B, N, T/c, c, H)
    if visible is None:
        count = torch.ones_like(keys[..., :1])
    else:
        count = visible.unflatten(2, (-1, chunk))[..., None].to(keys.dtype).expand(*keys.shape[:-1], 1)
        keys, values = keys * count, values * count
    for size in buckets:
        nearness = keys.detach() @ draw(size // 2).to(keys.dtype)
        bucket = torch.cat([nearness, -nearness], -1).argmax(-1, keepdim=True)
        keys, values, count = (_add_up(x, bucket, size) for x in (keys, values, count))
    keys, values = (x.to(key.dtype).flatten(2, 3) for x in (keys / (count + 1e-8), values / (count + 1e-8)))
    return keys, values, (count[..., 0] > 0).flatten(2)


SELECTIONS = {
    "identity": select_identity,
    "norm": select_norm,
    "pooling": select_pooling,
    "lsh": select_lsh,
    "stride": select_stride,
    "block_stride": select_block_stride,
    "bos_pooling": select_bos_pooling,
}


def _take(key: Tensor, value: Tensor, visible: Tensor | None, rows: Tensor) -> Stream:
    """The tokens `rows` (B, N, T/f) or (N, T/f) of each head."""
    rows = rows.expand(*key.shape[:2], -1)
    seen = None if visible is None else visible.expand(*key.shape[:3]).gather(2, rows)
    if torch.compiler.is_compiling():  # which would make an instance of the function, and warn of it
        at = rows[..., None].expand(*rows.shape, key.shape[3])
        return key.gather(2, at), value.gather(2, at), seen
    return _TakeRows.apply(key, rows), _TakeRows.apply(value, rows), seen


class _TakeRows(torch.autograd.Function):
    """Rows (B, N, R) of x (B, N, T, H), each at most once: copies of whole rows, several times as fast as gather."""

    @staticmethod
    def forward(ctx, x, rows):
        ctx.save_for_backward(rows)
        ctx.shape = x.shape
        flat, at = _as_rows(x, rows)
        return flat.index_select(0, at).view(*rows.shape, -1)

    @staticmethod
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        batch, heads, tokens, width = ctx.shape
        whole = grad.new_zeros(batch, tokens, heads, width).transpose(1, 2)  # as projections lie in memory
        flat, at = _as_rows(whole, rows)
        flat.index_copy_(0, at, grad.reshape(-1, width))
        return whole, None


def _as_rows(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The memory of x (B, N, T, H) as a list of rows (L, H), and where in it rows (B, N, R) of x are: (B * N * R,)."""
    width = x.shape[3]
    if x.stride(3) != 1 or any(stride % width for stride in x.stride()[:3]):
        x = x.contiguous()
    steps = [stride // width for stride in x.stride()[:3]]
    batch, heads = (torch.arange(size, device=x.device) for size in x.shape[:2])
    at = (batch * steps[0])[:, None, None] + (heads * steps[1])[:, None] + rows * steps[2]
    length = 1 + sum((size - 1) * step for size, step in zip(x.shape[:3], steps, strict=True))
    return x.as_strided((length, width), (width, 1)), at.flatten()


def _at_least_float(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _weighted(keys: Tensor, values: Tensor, weights: Tensor, inside: Tensor | None) -> Stream:
    """Sums over groups (B, N, T/f, f, H) with weights (B, N, T/f, f)."""
    weights = weights[..., None, :]
    seen = None if inside is None else inside.any(-1)
    return (weights @ keys).squeeze(-2), (weights @ values).squeeze(-2), seen


def _add_up(x: Tensor, bucket: Tensor, size: int) -> Tensor:
    """The sums of x (..., c, H) by bucket (..., c, 1): (..., size, H)."""
    sums = x.new_zeros(*x.shape[:-2], size, x.shape[-1])
    return sums.scatter_add(-2, bucket.expand(x.shape), x)


def select(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, settings: LSGSettings, draw: Draw
) -> Stream | None:
    """The summaries that the settings ask for, or None."""
    name = settings.selection
    return None if name == "none" else SELECTIONS[name](query, key, value, visible, settings, draw)


def pad_tokens(x: Tensor, rows: int) -> Tensor:
    """Rows of zeros behind x (..., T, H)."""
    return F.pad(x, (0, 0, 0, rows)) if rows else x
