"""The picture is of the attention itself; here it is compared with the definition."""

import pytest
import torch

from funneltfm.lsg.pattern import GLOBAL, LOCAL, NOTHING, SPARSE, attention_pattern
from funneltfm.lsg.settings import SPARSITY_TYPES, LSGSettings


def test_the_pattern_is_the_definition_s():
    at = LSGSettings(block_size=4, sparse_block_size=4, sparsity_factor=2, sparsity_type="stride", num_global_tokens=2)
    pattern = attention_pattern(at, 40, head=1)
    want = torch.full((42, 42), NOTHING, dtype=torch.uint8)
    want[:2], want[:, :2] = GLOBAL, GLOBAL
    for t in range(40):
        i = t // 4
        for s in range(40):
            if abs(s // 4 - i) <= 1:
                want[2 + t, 2 + s] = LOCAL
            elif s % 2 == 1 and abs(s // 4 - i) <= 3:  # 4 summaries of 2 tokens: two blocks farther
                want[2 + t, 2 + s] = SPARSE
    assert torch.equal(pattern, want)


@pytest.mark.parametrize("kind", SPARSITY_TYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_every_type_can_be_drawn(kind, causal):
    at = LSGSettings(block_size=8, sparse_block_size=8, sparsity_type=kind)
    pattern = attention_pattern(at, 75, causal=causal)
    assert pattern.shape == (76, 76)
    assert (SPARSE in pattern) == (kind != "none")
    tokens = pattern[1:, 1:]
    assert bool(tokens.triu(1).any()) != causal
    if kind in ("norm", "stride", "block_stride") and not causal:  # one of two tokens
        seen = (tokens[40] == SPARSE).sum()
        assert seen == 16 if kind == "norm" else 14 <= seen <= 16
