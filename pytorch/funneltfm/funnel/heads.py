"""Heads on a Funnel-Transformer's hidden states. Torch only; each takes numbers, none knows a loss.

Alphabet: B batch, T tokens, D d_model, V vocab_size, C classes. Masks: 1 (or True) = pad.
"""

import torch
from torch import Tensor, nn

from funneltfm.funnel.ops import ACTIVATIONS, Dense, LayerNorm


class SummaryHead(nn.Sequential):
    """[CLS] (B, D) -> (B, C): dense, tanh, dropout, dense."""

    def __init__(self, d_model: int, num_class: int, dropout: float):
        super().__init__(Dense(d_model, d_model), nn.Tanh(), nn.Dropout(dropout), Dense(d_model, num_class))

    def summary(self, cls: Tensor) -> Tensor:
        """The summary vector (B, D): dense and tanh alone."""
        return self[1](self[0](cls))


class MaskedLMHead(nn.Module):
    """Hidden states (..., D) -> scores of the vocabulary (..., V), tied to the embedding table.

    transform: dense, activation and LayerNorm come first, as in the original; without it (as in `transformers`'
    Funnel) the hidden states meet the table directly, so that D must be d_embed.
    """

    def __init__(self, d_model: int, d_embed: int, vocab_size: int, activation: str, transform: bool = True):
        super().__init__()
        self.activation = activation
        self.transform = transform
        if transform:
            self.dense = Dense(d_model, d_embed)
            self.layer_norm = LayerNorm(d_embed)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden: Tensor, lookup_table: Tensor) -> Tensor:
        """lookup_table: (V, d_embed), the model's own."""
        if self.transform:
            hidden = self.layer_norm(ACTIVATIONS[self.activation](self.dense(hidden)))
        return hidden @ lookup_table.t() + self.bias


class TokenDetectionHead(nn.Module):
    """Hidden states (B, T, D) -> one logit a token (B, T): above 0 says replaced. ELECTRA's discriminator head."""

    def __init__(self, d_model: int, activation: str):
        super().__init__()
        self.activation = activation
        self.dense = Dense(d_model, d_model)
        self.logit = Dense(d_model, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.logit(ACTIVATIONS[self.activation](self.dense(hidden))).squeeze(-1)


class TokenHead(nn.Module):
    """Hidden states (B, T, D) -> (B, T, C): dropout, dense. Tagging, and the plain start/end head (C = 2)."""

    def __init__(self, d_model: int, num_class: int, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.dense = Dense(d_model, num_class)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dense(self.dropout(hidden))


def rule_out(logits: Tensor, p_mask: Tensor) -> Tensor:
    """p_mask: 1 = no answer can be here. Half of the lowest number there, because a start and an end are added."""
    return logits.masked_fill(p_mask.bool(), torch.finfo(logits.dtype).min / 2)


class BeamSpanHead(nn.Module):
    """The original's head for SQuAD 2.0: start, then end given start, then whether there is an answer at all."""

    def __init__(self, d_model: int, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.start = Dense(d_model, 1)
        self.end_dense_0 = Dense(2 * d_model, d_model)
        self.end_layer_norm = LayerNorm(d_model)
        self.end_dense_1 = Dense(d_model, 1)
        self.answer_dense_0 = Dense(2 * d_model, d_model)
        self.answer_dense_1 = Dense(d_model, 1, bias=False)

    def start_logits(self, hidden: Tensor, p_mask: Tensor) -> Tensor:
        """hidden: (B, T, D); p_mask: (B, T), 1 = no answer can be here. Returns (B, T)."""
        return rule_out(self.start(hidden).squeeze(-1), p_mask)

    def end_logits(self, hidden: Tensor, start: Tensor, p_mask: Tensor) -> Tensor:
        """start: (B, K) token indices of K starts. Returns (B, K, T), the ends given each start."""
        B, T, D = hidden.shape
        K = start.size(1)
        at_start = hidden.gather(1, start[..., None].expand(B, K, D))  # (B, K, D)
        pair = torch.cat([hidden[:, None].expand(B, K, T, D), at_start[:, :, None].expand(B, K, T, D)], dim=-1)
        x = self.end_layer_norm(torch.tanh(self.end_dense_0(pair)))
        return rule_out(self.end_dense_1(x).squeeze(-1), p_mask[:, None])

    def answer_logits(self, hidden: Tensor, start: Tensor, cls: Tensor) -> Tensor:
        """start: (B, T) weights over start positions, adding up to 1; cls: (B, D) of [CLS], wherever it stands.

        Returns (B,): more than 0 says unanswerable.
        """
        at_start = (start[:, None] @ hidden).squeeze(1)  # (B, D)
        x = self.dropout(torch.tanh(self.answer_dense_0(torch.cat([at_start, cls], dim=-1))))
        return self.answer_dense_1(x).squeeze(-1)
