"""Relative attention on a CPU, a piece of the scores at a time: the numbers of the plain path in less time and memory.

The plain path (`funnel.attention`) makes position scores for all distances, shifts them, adds what the segments say,
masks, and hands (B, N, Tq, Tk) numbers to scaled_dot_product_attention. Here

- the queries go in chunks, so that only those distances are multiplied that a chunk can need, about half of them at
  great length, and no tensor of all scores is needed, going backward either;
- the shift is a view: row i of the product begins `shift` columns earlier than row i + 1;
- segments and padding are a few more columns of the query and the key, so that one product adds all other terms to the
  position term where it stands.

Alphabet: G heads and batch together (N * B, heads first), Tq, Tk tokens, H d_head, K = H and the columns of segments
and padding, R relative distances, C queries of a chunk.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK_SCORES = 2**20  # scores of a chunk, unless a single query of a head has more: they stay in the cache
_KEPT_SCORES = 2**23  # scores of a layer that are kept for the backward pass; more are computed again


class Layout(NamedTuple):
    """What a call is, beside its tensors."""

    n_head: int
    shift: int
    """How many columns of distances a row is from the next: the stride of the queries over that of the keys."""
    func_mask: bool
    """No position term in the column of the first key. (In its row the caller's query is zero.)"""
    dropout: float


class Piece(NamedTuple):
    """A chunk: some of G, some of the heads that they belong to, some queries, and the distances these need."""

    group: slice
    heads: slice
    queries: slice
    distances: slice


def pieces(n_head: int, batch: int, q_len: int, k_len: int, shift: int) -> Iterator[Piece]:
    """Whole heads where they fit into a chunk, else some queries of one head of one batch row after another."""
    row = 2 * k_len  # numbers that a query makes: its distances and its scores, near enough
    n_query = min(q_len, max(16, _CHUNK_SCORES // (row * batch)))
    heads = max(1, _CHUNK_SCORES // (row * batch * n_query))
    for head in range(0, n_head, heads):
        last = min(head + heads, n_head)
        for start in range(0, q_len, n_query):
            stop = min(start + n_query, q_len)
            # Row i, key j is column shift * (Tq - i) + j; see `rel_shift`.
            first = shift * (q_len - stop + 1)
            width = shift * (stop - start - 1) + k_len
            yield Piece(
                slice(head * batch, last * batch),
                slice(head, last),
                slice(start, stop),
                slice(first, first + width),
            )


def shifted(by_distance: Tensor, k_len: int, shift: int) -> Tensor:
    """The view of products by distance (g, C, W), contiguous, as scores by key (g, C, Tk)."""
    g, rows, width = by_distance.shape
    strides = rows * width, max(0, width - shift), 1  # of a single row the stride is of no account
    return by_distance.as_strided((g, rows, k_len), strides, by_distance.storage_offset() + shift * (rows - 1))


def keep_mask(shape: torch.Size, p: float, generator: torch.Generator) -> Tensor:
    """Which numbers dropout keeps (bool). Sixteen random bits decide, so p is taken to the next 1 / 65536; four times
    as fast as torch's bernoulli_.
    """
    bits = torch.empty(-(-shape.numel() // 4), dtype=torch.int64, device=generator.device).random_(
        -(2**63), None, generator=generator
    )
    return bits.view(torch.int16)[: shape.numel()].view(shape) >= round(p * 2**16) - 2**15


def keep_scale(p: float) -> float:
    """What dropout multiplies the kept numbers with."""
    return 2**16 / max(1, 2**16 - round(p * 2**16))


class _Attention(torch.autograd.Function):
    """Attention probabilities times values; everything that has a gradient is computed here."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, r: Tensor, layout: Layout) -> Tensor:
        """q (G, Tq, K), k (G, Tk, K), v (G, Tk, H), q_pos (G, Tq, H), r (N, R, H) -> (G, Tq, H)."""
        batch, k_len = len(q) // layout.n_head, k.size(1)
        out = torch.empty_like(q_pos)
        needed = any(ctx.needs_input_grad)
        kept: list[Tensor] = []
        keep = needed and q.size(0) * q.size(1) * k_len <= _KEPT_SCORES
        seed = int(torch.randint(2**62, ())) if layout.dropout else 0
        generator = torch.Generator(q.device).manual_seed(seed)
        for piece in pieces(layout.n_head, batch, q.size(1), k_len, layout.shift):
            p = _probabilities(q, k, q_pos, r, layout, piece)
            dropped = p
            if layout.dropout:
                mask = keep_mask(p.shape, layout.dropout, generator)
                dropped = (p * mask if keep else p.mul_(mask)).mul_(keep_scale(layout.dropout))
                kept += [mask] if keep else []
            kept += [p] if keep else []
            out[piece.group, piece.queries] = dropped @ v[piece.group]
        if needed:
            ctx.layout, ctx.seed, ctx.n_kept = layout, seed, len(kept)
            ctx.save_for_backward(q, k, v, q_pos, r, *kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, q_pos, r, *kept = ctx.saved_tensors
        layout: Layout = ctx.layout
        batch, k_len, shift = len(q) // layout.n_head, k.size(1), layout.shift
        generator = torch.Generator(q.device).manual_seed(ctx.seed)
        d_q, d_q_pos = torch.empty_like(q), torch.empty_like(q_pos)
        d_k, d_v, d_r = torch.zeros_like(k), torch.zeros_like(v), torch.zeros_like(r)
        grad, scale = grad.contiguous(), keep_scale(layout.dropout)
        kept.reverse()  # to be popped from the first on
        zeros: dict[tuple[int, ...], Tensor] = {}
        for piece in pieces(layout.n_head, batch, q.size(1), k_len, shift):
            group, queries, distances = piece.group, piece.queries, piece.distances
            mask = None
            if ctx.n_kept:
                mask = kept.pop() if layout.dropout else None
                p = kept.pop()
            else:
                p = _probabilities(q, k, q_pos, r, layout, piece)
                if layout.dropout:
                    mask = keep_mask(p.shape, layout.dropout, generator)
            d_out = grad[group, queries]
            d_p = d_out @ v[group].transpose(1, 2)
            dropped = p
            if mask is not None:
                d_p.mul_(mask).mul_(scale)
                dropped = (p * mask).mul_(scale)
            d_v[group].baddbmm_(dropped.transpose(1, 2), d_out)
            d_s = torch._softmax_backward_data(d_p, p, -1, p.dtype)
            d_q[group, queries] = d_s @ k[group]
            d_k[group].baddbmm_(d_s.transpose(1, 2), q[group, queries])

            shape = (len(d_s), d_s.size(1), distances.stop - distances.start)
            if shape not in zeros:
                zeros[shape] = d_s.new_zeros(shape)  # what is no score stays zero
            shifted(zeros[shape], k_len, shift).copy_(d_s)
            if layout.func_mask:
                shifted(zeros[shape], k_len, shift)[:, :, 0] = 0
            by_distance = zeros[shape].view(-1, batch * shape[1], shape[2])  # of a head, all rows
            window = r[piece.heads, distances]
            d_q_pos[group, queries] = (by_distance @ window).view(shape[0], shape[1], -1)
            rows = q_pos[group, queries].reshape(len(window), -1, r.size(2))
            d_r[piece.heads, distances].baddbmm_(by_distance.transpose(1, 2), rows)
        return d_q, d_k, d_v, d_q_pos, d_r, None


def _probabilities(q: Tensor, k: Tensor, q_pos: Tensor, r: Tensor, layout: Layout, piece: Piece) -> Tensor:
    """Softmax of the scores of one chunk (g, C, Tk)."""
    group, queries = piece.group, piece.queries
    window = r[piece.heads, piece.distances]
    rows = q_pos[group, queries]
    by_distance = rows.reshape(len(window), -1, rows.size(2)) @ window.transpose(1, 2)
    scores = shifted(by_distance.view(len(rows), rows.size(1), -1), k.size(1), layout.shift)
    if layout.func_mask:
        scores[:, :, 0] = 0
    return F.softmax(torch.baddbmm(scores, q[group, queries], k[group].transpose(1, 2)), dim=-1)


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, r: Tensor, layout: Layout) -> Tensor:
    """(q k^T + position term) -> softmax -> dropout -> times v; shapes as in the module's alphabet.

    q, k: (G, Tq, K), (G, Tk, K) with the columns of segments and padding; v: (G, Tk, H); q_pos: (G, Tq, H), the query
    of the position term; r: (N, R, H), the distances from the largest down. Returns (G, Tq, H).
    """
    with torch.autocast(q.device.type, enabled=False):  # going backward there is none either
        return _Attention.apply(q, k, v, q_pos, r, layout)
