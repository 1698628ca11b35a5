"""Relative multi-head attention and its position term in two forms. Paper, section 2.2 and appendix A.

Alphabet: B batch, T tokens (Tq of the query, Tk of the key), D d_model, N heads, H d_head, R relative distances.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funneltfm.funnel.ops import Dense, LayerNorm, rel_shift, sinusoids


class Positions(NamedTuple):
    """Evenly spaced positions start, start + stride, ...: whole numbers, so that no precision can blur them."""

    start: int
    stride: int
    length: int

    def ids(self, device: torch.device) -> Tensor:
        return self.start + self.stride * torch.arange(self.length, device=device)


@dataclass(frozen=True)
class AttentionStructure:
    """What the layers of one block share: who is where, in which segment, and which keys are padding."""

    pos_enc: tuple[Tensor, ...]
    """Encoded positions or distances, as the attention type makes them."""
    input_mask: Tensor
    """(B, Tk) bool, True = pad."""
    same_segment: Tensor | None
    """(B, Tq, Tk) bool, or None to leave the segment term out."""
    func_mask: bool
    """Position and segment terms are zero in the row and the column of the first token."""


def encode_rel_shift(
    q_pos: Positions, k_pos: Positions, d_model: int, dropout: nn.Module, like: Tensor
) -> tuple[Tensor]:
    """The R = shift * Tq + Tk distances that rel_shift can need, from the largest down: one (R, D) tensor."""
    shift = q_pos.stride // k_pos.stride
    first = q_pos.start - k_pos.start + q_pos.length * q_pos.stride
    distances = Positions(first, -k_pos.stride, shift * q_pos.length + k_pos.length)
    sin, cos = sinusoids(distances.ids(like.device), d_model)
    return (torch.cat([dropout(sin), dropout(cos)], dim=-1).to(like.dtype),)


def score_rel_shift(q: Tensor, r_kernel: Tensor, pos_enc: tuple[Tensor, ...], k_len: int) -> Tensor:
    """q . r[distance(i, j)] with r = pos_enc @ r_kernel. q: (B, N, Tq, H), already scaled. Returns (B, N, Tq, Tk)."""
    (distances,) = pos_enc
    r = torch.einsum("rd,dnh->nrh", distances, r_kernel)
    shift = (r.size(1) - k_len) // q.size(2)
    return rel_shift(q @ r.transpose(1, 2), k_len, shift)


def encode_factorized(
    q_pos: Positions, k_pos: Positions, d_model: int, dropout: nn.Module, like: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """phi1, phi2 (Tq, D) of the query and psi1, psi2 (Tk, D) of the key. Paper, appendix A.2."""
    sin_q, cos_q = map(dropout, sinusoids(q_pos.ids(like.device), d_model))
    sin_k, cos_k = map(dropout, sinusoids(k_pos.ids(like.device), d_model))
    pairs = (sin_q, sin_q), (cos_q, cos_q), (cos_k, sin_k), (-sin_k, cos_k)
    phi1, phi2, psi1, psi2 = (torch.cat(pair, dim=-1).to(like.dtype) for pair in pairs)
    return phi1, phi2, psi1, psi2


def score_factorized(q: Tensor, r_kernel: Tensor, pos_enc: tuple[Tensor, ...], k_len: int) -> Tensor:
    """The same numbers as score_rel_shift without any shift: sin and cos of a difference are sums of products."""
    phi1, phi2, psi1, psi2 = pos_enc
    q = torch.einsum("bnqh,dnh->bnqd", q, r_kernel)
    return (q * phi1) @ psi1.t() + (q * phi2) @ psi2.t()


class _Type(NamedTuple):
    encode: Callable[[Positions, Positions, int, nn.Module, Tensor], tuple[Tensor, ...]]
    score: Callable[[Tensor, Tensor, tuple[Tensor, ...], int], Tensor]


ATTN_TYPES = {
    "rel_shift": _Type(encode_rel_shift, score_rel_shift),
    "factorized": _Type(encode_factorized, score_factorized),
}


class RelMultiheadAttention(nn.Module):
    """Multi-head attention with content, position and segment terms, then a residual connection and a LayerNorm.

    score(i, j) = (q_i + r_w_bias) . k_j  +  (q_i + r_r_bias) . r[distance(i, j)]  +  (q_i + r_s_bias) .
    seg_embed[same],
    with q and the three biases scaled by 1 / sqrt(H), and same = 1 where i and j are of one segment, else 0.
    """

    def __init__(self, d_model: int, n_head: int, d_head: int, dropout: float, dropatt: float, attn_type: str):
        super().__init__()
        self.scale = 1.0 / math.sqrt(d_head)
        self.dropatt = dropatt
        self.score_positions = ATTN_TYPES[attn_type].score

        self.q_head = Dense(d_model, (n_head, d_head), bias=False)
        self.k_head = Dense(d_model, (n_head, d_head))
        self.v_head = Dense(d_model, (n_head, d_head))
        self.r_w_bias = nn.Parameter(torch.empty(n_head, d_head))
        self.r_r_bias = nn.Parameter(torch.empty(n_head, d_head))
        self.r_s_bias = nn.Parameter(torch.empty(n_head, d_head))
        self.r_kernel = nn.Parameter(torch.empty(d_model, n_head, d_head))
        self.seg_embed = nn.Parameter(torch.empty(2, n_head, d_head))
        self.post_proj = Dense((n_head, d_head), d_model)
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = LayerNorm(d_model)
        for parameter in (self.r_w_bias, self.r_r_bias, self.r_s_bias, self.r_kernel, self.seg_embed):
            nn.init.uniform_(parameter, b=0.1)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, structure: AttentionStructure) -> Tensor:
        """query: (B, Tq, D); key, value: (B, Tk, D). Returns (B, Tq, D)."""
        q = self.q_head(query).transpose(1, 2) * self.scale  # (B, N, Tq, H)
        k = self.k_head(key).transpose(1, 2)  # (B, N, Tk, H)
        v = self.v_head(value).transpose(1, 2)

        bias = self._position_and_segment(q, k.size(2), structure)  # (B, N, Tq, Tk)
        # The lowest number rather than -inf: a row that is all padding stays finite.
        bias = bias.masked_fill(structure.input_mask[:, None, None, :], torch.finfo(bias.dtype).min)
        dropatt = self.dropatt if self.training else 0.0
        out = F.scaled_dot_product_attention(
            q + self._scaled(self.r_w_bias), k, v, attn_mask=bias, dropout_p=dropatt, scale=1.0
        )  # (B, N, Tq, H)
        out = self.dropout(self.post_proj(out.transpose(1, 2)))
        return self.layer_norm(query + out)

    def _scaled(self, r_bias: Tensor) -> Tensor:
        return (r_bias * self.scale)[:, None]  # (N, 1, H)

    def _position_and_segment(self, q: Tensor, k_len: int, structure: AttentionStructure) -> Tensor:
        bias = self.score_positions(q + self._scaled(self.r_r_bias), self.r_kernel, structure.pos_enc, k_len)
        if structure.same_segment is not None:
            by_segment = (q + self._scaled(self.r_s_bias)) @ self.seg_embed.permute(1, 2, 0)  # (B, N, Tq, 2)
            different, same = by_segment.chunk(2, dim=-1)
            bias = bias + torch.where(structure.same_segment[:, None], same, different)
        if structure.func_mask:
            bias = F.pad(bias[:, :, 1:, 1:], (1, 0, 1, 0))
        return bias
