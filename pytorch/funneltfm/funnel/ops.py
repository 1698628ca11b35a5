"""Small pure pieces of the Funnel-Transformer. Torch only.

Alphabet: B batch, T tokens (Tq of the query, Tk of the key), D d_model, N heads, H d_head, R relative distances.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funneltfm.funnel.config import ModelConfig

ACTIVATIONS = {"gelu": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}


class LayerNorm(nn.LayerNorm):
    """Layer normalisation with eps 1e-9, computed in fp32 for half precision too."""

    def __init__(self, d_model: int, eps: float = 1e-9):
        super().__init__(d_model, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class Dense(nn.Module):
    """A linear map between groups of axes: (..., *d_in) -> (..., *d_out). The weight is (*d_in, *d_out), as in
    TensorFlow.

    `Dense(D, (N, H))` makes heads, `Dense((N, H), D)` joins them.
    """

    def __init__(self, d_in: int | tuple[int, ...], d_out: int | tuple[int, ...], bias: bool = True):
        super().__init__()
        self.d_in = (d_in,) if isinstance(d_in, int) else d_in
        self.d_out = (d_out,) if isinstance(d_out, int) else d_out
        self.weight = nn.Parameter(torch.empty(*self.d_in, *self.d_out))
        self.bias = nn.Parameter(torch.empty(self.d_out)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        fan_in, fan_out = math.prod(self.d_in), math.prod(self.d_out)
        nn.init.normal_(self.weight, std=math.sqrt(1.0 / (fan_in + fan_out)))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        fan_in, fan_out = math.prod(self.d_in), math.prod(self.d_out)
        weight = self.weight.reshape(fan_in, fan_out)
        bias = None if self.bias is None else self.bias.reshape(fan_out)
        y = F.linear(x.flatten(-len(self.d_in)), weight.t(), bias)
        return y.unflatten(-1, self.d_out)

    def extra_repr(self) -> str:
        return f"{self.d_in} -> {self.d_out}, bias={self.bias is not None}"


class EmbeddingLookup(nn.Module):
    """ids (B, T) -> (B, T, d_embed). Its parameter is named `lookup_table`, as in the published checkpoints."""

    def __init__(self, vocab_size: int, d_embed: int):
        super().__init__()
        self.lookup_table = nn.Parameter(torch.empty(vocab_size, d_embed))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.lookup_table)

    @property
    def weight(self) -> nn.Parameter:
        """The table under the name that it has in torch.nn.Embedding."""
        return self.lookup_table

    @property
    def num_embeddings(self) -> int:
        return self.lookup_table.size(0)

    @property
    def embedding_dim(self) -> int:
        return self.lookup_table.size(1)

    def forward(self, inputs: Tensor) -> Tensor:
        return F.embedding(inputs, self.lookup_table)

    def extra_repr(self) -> str:
        return "{}, {}".format(*self.lookup_table.shape)


def sinusoids(pos: Tensor, d_model: int) -> tuple[Tensor, Tensor]:
    """Sine and cosine of positions or distances, computed in fp32 whatever precision the model has.

    pos: (T,) whole numbers. Returns two (T, D/2) of fp32: sin(p w) and cos(p w), w_i = 10000^(-i / (D/2)).
    """
    i = torch.arange(d_model // 2, device=pos.device, dtype=torch.float32)
    w = 10000.0 ** (-i / (d_model // 2))
    angle = pos.float()[:, None] * w
    return angle.sin(), angle.cos()


def rel_shift(x: Tensor, k_len: int, shift: int = 1) -> Tensor:
    """Turn scores by relative distance into scores by key position.

    x: (B, N, Tq, R), R = shift * Tq + Tk; going one row down moves the window `shift` columns to the left.
    Returns (B, N, Tq, k_len): row i, key j takes column shift * (Tq - i) + j. Paper, appendix A.1 (Transformer-XL's
    shift, with shift = pooling_size where a pooled query meets keys that are not pooled).

    >>> rel_shift(torch.arange(8).view(1, 1, 2, 4), k_len=2)[0, 0]  # columns score distances 2 1 0 -1... of Tq - r
    tensor([[2, 3],
            [5, 6]])
    """
    B, N, q_len, R = x.shape
    # Read row by row with rows shorter by `shift`, each row starts `shift` elements earlier than the one before.
    x = x.reshape(B, N, R, q_len)[:, :, shift:].reshape(B, N, q_len, R - shift)
    return x[..., :k_len]


def can_pool(length: int, config: ModelConfig) -> bool:
    """Whether pooling a sequence of `length` tokens leaves something of it beside [CLS]."""
    if not config.separate_cls:
        return length > 1
    return length > (config.pooling_size if config.truncate_seq else 2)


def pool_windows(x: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Split (B, T, ...) into the part kept aside (B, 0 or 1, ...) and the part to be pooled, truncated if the
    config says so.
    """
    if not config.separate_cls:
        return x[:, :0], x
    dropped = config.pooling_size - 1 if config.truncate_seq else 0
    return x[:, :1], x[:, 1 : x.size(1) - dropped]


def pool_hidden(x: Tensor, config: ModelConfig) -> Tensor:
    """Pool hidden states: (B, T, D) -> (B, T', D); a last window that is not full pools what it has.

    With separate_cls: [0 1 2 3 4 5 6 7] -> [0] [1 2] [3 4] [5 6] [7]; with truncate_seq too: [0] [1 2] [3 4] [5 6].
    """
    aside, x = pool_windows(x, config)
    x = x.transpose(1, 2)
    size = config.pooling_size
    if config.pooling_type == "mean":
        x = F.avg_pool1d(x, size, ceil_mode=True)
    elif config.pooling_type == "max":
        x = F.max_pool1d(x, size, ceil_mode=True)
    else:
        x = -F.max_pool1d(-x, size, ceil_mode=True)
    return torch.cat([aside, x.transpose(1, 2)], dim=1)


def pool_mask(input_mask: Tensor, config: ModelConfig) -> Tensor:
    """Pool a padding mask (B, T), True = pad: a window with one real token is real."""
    aside, x = pool_windows(input_mask, config)
    missing = -x.size(1) % config.pooling_size
    windows = F.pad(x, (0, missing), value=True).unflatten(1, (-1, config.pooling_size))
    return torch.cat([aside, windows.all(dim=-1)], dim=1)


def pool_stride(x: Tensor, config: ModelConfig) -> Tensor:
    """The first token of every window, for what cannot be averaged: segment ids (B, T) -> (B, T')."""
    aside, x = pool_windows(x, config)
    return torch.cat([aside, x[:, :: config.pooling_size]], dim=1)


def upsample(x: Tensor, length: int, factor: int, config: ModelConfig) -> Tensor:
    """Repeat pooled hidden states to full length: (B, T', D) -> (B, length, D), zeros where truncation dropped tokens.

    factor: how many tokens one pooled state stands for. [CLS] is not repeated when it was kept aside. Paper,
    section 2.3.
    """
    n_aside = 1 if config.separate_cls else 0
    aside, x = x[:, :n_aside], x[:, n_aside:]
    x = x.repeat_interleave(factor, dim=1)[:, : length - n_aside]
    missing = length - n_aside - x.size(1)
    return torch.cat([aside, F.pad(x, (0, 0, 0, missing))], dim=1)
