"""Samples from a softmax whose random numbers belong to the examples, not to their batch."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

SampleFunction = Literal["gumbel", "multinomial"]


@torch.no_grad()
def sample(logits: Tensor, counts: Sequence[int], seeds: Sequence[int], function: SampleFunction = "gumbel") -> Tensor:
    """An index of each row of logits (n, V), drawn from its softmax: (n,) int64.

    The first counts[0] rows are of one example, the next counts[1] of another. An example's draws depend on its seed
    alone, so they are the same in every batch and process, and again after resuming. gumbel takes the highest of
    logits + Gumbel noise, -log(-log U) (Maddison et al. 2014); multinomial asks torch.multinomial.
    """
    logits = logits.float()
    generator = torch.Generator(logits.device)
    if function == "multinomial":
        parts = [
            torch.multinomial(part.softmax(-1), 1, generator=generator.manual_seed(seed))[:, 0]
            for part, seed in zip(logits.split(list(counts)), seeds, strict=True)
            if len(part)
        ]
        return torch.cat(parts) if parts else logits.new_zeros(0, dtype=torch.long)
    noise = torch.empty_like(logits)  # -log U
    for part, seed in zip(noise.split(list(counts)), seeds, strict=True):
        part.exponential_(generator=generator.manual_seed(seed))
    # A float is 0 more often than an exponential number is as small: 2^-25 is the mean of those below the step, 2^-24.
    return (logits - noise.clamp_(min=2**-25).log_()).argmax(-1)
