"""Relative multi-head attention and its position term in two forms. Paper, section 2.2 and appendix A.

Alphabet: B batch, T tokens (Tq of the query, Tk of the key), D d_model, N heads, H d_head, R relative distances.
"""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funneltfm.errors import InputError
from funneltfm.funnel.chunked import Layout, chunked_attention
from funneltfm.funnel.ops import Dense, LayerNorm, rel_shift, sinusoids

AttentionPath = Literal["auto", "plain", "chunked"]
"""How attention is computed; the numbers are the same. plain: position and segment terms as the mask of one call of
scaled_dot_product_attention. chunked (rel_shift alone): `funnel.chunked`, made for CPUs. auto: chunked on a CPU, else
and under torch.compile plain.
"""


class Positions(NamedTuple):
    """Evenly spaced positions start, start + stride, ...: whole numbers, so that no precision can blur them."""

    start: int
    stride: int
    length: int

    def ids(self, device: torch.device) -> Tensor:
        return self.start + self.stride * torch.arange(self.length, device=device)


class _Once:
    """functools.cached_property without its lock, which torch.compile cannot take (until Python 3.12)."""

    def __init__(self, make: Callable[[Any], Any]):
        self.make, self.name = make, make.__name__

    def __get__(self, structure: Any, owner: type) -> Any:
        made = structure.__dict__[self.name] = self.make(structure)
        return made


@dataclass(frozen=True)
class AttentionStructure:
    """What the layers of one block share: who is where, in which segment, and which keys are padding."""

    pos_enc: tuple[Tensor, ...]
    """Encoded positions or distances, as the attention type makes them."""
    input_mask: Tensor
    """(B, Tk) bool, True = pad."""
    q_seg: Tensor | None
    """(B, Tq) segment ids of the query, or None to leave the segment term out."""
    k_seg: Tensor | None
    """(B, Tk) segment ids of the key."""
    seg_id_cls: int
    """Segment id of [CLS], which is in every segment."""
    func_mask: bool
    """Position and segment terms are zero in the row and the column of the first token."""
    path: AttentionPath = "auto"

    @_Once
    def same_segment(self) -> Tensor | None:
        """(B, Tq, Tk) bool, True where both are in one segment."""
        if self.q_seg is None or self.k_seg is None:
            return None
        q, k = self.q_seg[:, :, None], self.k_seg[:, None, :]
        return (q == k) | (q == self.seg_id_cls) | (k == self.seg_id_cls)

    @_Once
    def columns(self) -> tuple[Tensor | None, Tensor]:
        """The terms of segments and padding as products, for `funnel.chunked`.

        Query i has one coefficient for each segment S that occurs, for [CLS], and for padding; key j has the columns
        (B, Tk, S + 2): 1 where it is in the segment, 1 where it is [CLS], and the lowest number where it is padding.
        (B, Tq, S + 1) bool says which coefficient is that of the same segment; None leaves the segment term out.
        """
        padding = self.input_mask[..., None]
        lowest = torch.finfo(torch.float32).min / 2  # together with any score still a number
        if self.q_seg is None or self.k_seg is None:
            return None, padding * lowest
        cls = self.seg_id_cls
        found = self.k_seg.unique()
        segments = torch.cat([found[found != cls], found.new_tensor([cls])])
        of_key = self.k_seg[..., None] == segments
        if self.func_mask:
            of_key[:, 0] = False
        q = self.q_seg[..., None]
        return (q == segments) | (q == cls) | (segments == cls), torch.cat([of_key.float(), padding * lowest], dim=-1)

    @_Once
    def empty(self) -> Tensor | None:
        """(B, 1, 1) bool, True where a row is all padding; None where there is none such."""
        rows = self.input_mask.all(dim=1)
        return rows[:, None, None] if rows.any() else None


@lru_cache(maxsize=8)
def _distances(distances: Positions, d_model: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[sin, cos] of distances, (R, D). They depend on lengths alone, so they are made once."""
    with torch.inference_mode(False):  # what is kept must do for training too
        return torch.cat(sinusoids(distances.ids(device), d_model), dim=-1).to(dtype)


_MOST_KEPT = 4096  # distances: more are made each time, for they take much memory and little of the time


def encode_rel_shift(
    q_pos: Positions, k_pos: Positions, d_model: int, dropout: nn.Module, like: Tensor
) -> tuple[Tensor]:
    """The R = shift * Tq + Tk distances that rel_shift can need, from the largest down: one (R, D) tensor.

    Where no dropout acts on it, it is the same object each time.
    """
    shift = q_pos.stride // k_pos.stride
    first = q_pos.start - k_pos.start + q_pos.length * q_pos.stride
    distances = Positions(first, -k_pos.stride, shift * q_pos.length + k_pos.length)
    drops = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
    if not drops and distances.length <= _MOST_KEPT and not torch.compiler.is_compiling():
        return (_distances(distances, d_model, like.device, like.dtype),)
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
        self.attn_type = attn_type
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
        attend = self._chunked if self._goes_in_chunks(query, structure) else self._plain
        out = attend(query, key, value, structure)  # (B, Tq, N, H)
        return self.layer_norm(query + self.dropout(self.post_proj(out)))

    def _plain(self, query: Tensor, key: Tensor, value: Tensor, structure: AttentionStructure) -> Tensor:
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
        return out.transpose(1, 2)

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

    # ---- the same in chunks

    def _goes_in_chunks(self, query: Tensor, structure: AttentionStructure) -> bool:
        if query.size(0) == 0:
            return False
        if structure.path == "auto":
            can = self.attn_type == "rel_shift" and query.device.type == "cpu"
            return can and not torch.compiler.is_compiling() and not torch.jit.is_tracing()
        if structure.path == "chunked" and self.attn_type != "rel_shift":
            raise InputError(f"attention in chunks is for attn_type rel_shift; this model has {self.attn_type}.")
        return structure.path == "chunked"

    def _chunked(self, query: Tensor, key: Tensor, value: Tensor, structure: AttentionStructure) -> Tensor:
        # Heads first: (N, B, T, H), so that a head's distances serve all rows of the batch in one product.
        q = (self.q_head(query) * self.scale).permute(2, 0, 1, 3).contiguous()
        k = self.k_head(key).permute(2, 0, 1, 3)
        v = self.v_head(value).permute(2, 0, 1, 3).contiguous()
        n_head, batch, q_len, d_head = q.shape
        (distances,) = structure.pos_enc
        r = self._distance_keys(distances).to(q.dtype)

        same, of_key = structure.columns

        def biased(r_bias: Tensor) -> Tensor:
            return q + self._scaled(r_bias)[:, None].to(q.dtype)

        coefficients = [biased(self.r_w_bias)]
        if same is not None:
            q_s = biased(self.r_s_bias).view(n_head, -1, d_head)
            by_segment = (q_s @ self.seg_embed.transpose(0, 1).transpose(1, 2).to(q.dtype)).view(*q.shape[:3], 2)
            by_segment = torch.where(same, by_segment[..., 1:], by_segment[..., :1])
            coefficients.append(self._without_masked(by_segment, structure))
        coefficients.append(q.new_ones(()).expand(*q.shape[:3], 1))
        of_key = of_key.clamp(min=max(torch.finfo(q.dtype).min, torch.finfo(of_key.dtype).min) / 2).to(q.dtype)
        out = chunked_attention(
            torch.cat(coefficients, dim=-1).flatten(0, 1),
            torch.cat([k, of_key.expand(n_head, -1, -1, -1)], dim=-1).flatten(0, 1),
            v.flatten(0, 1),
            self._without_masked(biased(self.r_r_bias), structure).flatten(0, 1),
            r,
            Layout(
                n_head,
                shift=(r.size(1) - key.size(1)) // q_len,
                func_mask=structure.func_mask,
                dropout=self.dropatt if self.training else 0.0,
            ),
        )
        return out.view(n_head, batch, q_len, d_head).permute(1, 2, 0, 3)

    @staticmethod
    def _without_masked(x: Tensor, structure: AttentionStructure) -> Tensor:
        """x (N, B, Tq, ...) with zeros for the first query where func_mask says so, and where a row is all padding: its
        scores are the lowest number whatever its positions and segments are, and give these no gradient.
        """
        if structure.func_mask:
            x = F.pad(x[:, :, 1:], (0, 0, 1, 0))
        return x if structure.empty is None else x.masked_fill(structure.empty, 0)

    def _distance_keys(self, distances: Tensor) -> Tensor:
        """r = distances @ r_kernel, as (N, R, H). In evaluation it depends on the length alone, so the last is kept
        and taken again while the distances and the kernel are what they were.
        """
        keeps = not torch.is_grad_enabled() and len(distances) <= _MOST_KEPT
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else self.r_kernel.dtype
        last = _LAST_KEYS.get(self) if keeps else None
        if last is not None and last.distances is distances and last.keys.dtype == dtype:  # noqa: SIM102
            if torch.equal(last.kernel, self.r_kernel):
                return last.keys
        n_head, d_head = self.r_kernel.shape[1:]
        r = (distances @ self.r_kernel.flatten(1)).view(-1, n_head, d_head).transpose(0, 1).contiguous()
        if keeps:
            _LAST_KEYS[self] = _Keys(distances, self.r_kernel.clone(), r)
        return r


class _Keys(NamedTuple):
    distances: Tensor
    kernel: Tensor
    """A copy: a write to the parameter's data, which no counter notices, is noticed."""
    keys: Tensor


_LAST_KEYS: weakref.WeakKeyDictionary[RelMultiheadAttention, _Keys] = weakref.WeakKeyDictionary()
