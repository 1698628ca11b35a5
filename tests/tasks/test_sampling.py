"""Samples have the softmax's distribution, and depend on their example alone."""

import pytest
import torch

from funneltfm.tasks.sampling import SampleFunction, sample

FUNCTIONS: tuple[SampleFunction, ...] = ("gumbel", "multinomial")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_frequencies_are_the_probabilities(function: SampleFunction) -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0, 1.0, -torch.inf], [0.0, 0.0, 0.0, 0.0, 5.0]])
    n = 20_000
    rows = logits.repeat_interleave(n, 0)
    drawn = sample(rows, [n, n], [3, 4], function)
    for i in range(2):
        found = torch.bincount(drawn[i * n : (i + 1) * n], minlength=5) / n
        p = logits[i].softmax(-1)
        assert (found - p).abs().max() < 4.5 * (0.25 / n) ** 0.5
    assert not (drawn[:n] == 4).any()  # probability 0


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_example_has_its_draws_in_every_batch(function: SampleFunction) -> None:
    torch.manual_seed(0)
    logits, counts, seeds = torch.randn(9, 50), [3, 0, 4, 2], [11, 12, 2**62, 0]
    together = sample(logits, counts, seeds, function)
    state = torch.get_rng_state()
    apart = [
        sample(part, [len(part)], [seed], function) for part, seed in zip(logits.split(counts), seeds, strict=True)
    ]
    assert torch.equal(torch.cat(apart), together)
    assert torch.equal(torch.get_rng_state(), state)  # takes nothing from the stream that dropout uses
    other = sample(logits, counts, [seed + 1 for seed in seeds], function)
    assert not torch.equal(other, together)
    assert sample(logits[:0], [0, 0], [1, 2], function).shape == (0,)
    assert sample(logits.requires_grad_(), counts, seeds, function).requires_grad is False


def test_gumbel_is_the_highest_of_logits_and_noise() -> None:
    """By its formula, on the same random numbers."""
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(1))
    uniform = torch.exp(-torch.empty(4, 30).exponential_(generator=torch.Generator().manual_seed(7)))
    expected = (logits - torch.log(-torch.log(uniform))).argmax(-1)
    assert torch.equal(sample(logits, [4], [7]), expected)
