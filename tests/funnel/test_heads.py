"""Heads: shapes, the formulas by hand, masks."""

import copy

import pytest
import torch

from funneltfm.funnel.heads import BeamSpanHead, MaskedLMHead, SummaryHead, TokenDetectionHead, TokenHead

B, T, D, V = 2, 5, 8, 11


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def hidden() -> torch.Tensor:
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(0))


def test_summary_is_dense_and_tanh() -> None:
    head = SummaryHead(D, 3, dropout=0.0)
    cls = hidden()[:, 0]
    expected = torch.tanh(cls @ head[0].weight + head[0].bias)
    torch.testing.assert_close(head.summary(cls), expected)
    torch.testing.assert_close(head(cls), expected @ head[3].weight + head[3].bias)


def test_masked_lm_is_tied_and_transformed() -> None:
    table = torch.randn(V, 6)
    head = MaskedLMHead(D, 6, V, "relu")
    with torch.no_grad():
        head.bias += torch.arange(V)
    x = torch.relu(hidden() @ head.dense.weight + head.dense.bias)
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-9).sqrt()  # a row may be 0
    torch.testing.assert_close(head(hidden(), table), x @ table.t() + torch.arange(V), rtol=1e-4, atol=1e-5)


def test_masked_lm_without_transform_meets_the_table_directly() -> None:
    table = torch.randn(V, D)
    head = MaskedLMHead(D, D, V, "gelu", transform=False)
    torch.testing.assert_close(head(hidden(), table), hidden() @ table.t())
    assert [name for name, _ in head.named_parameters()] == ["bias"]


def test_token_detection_gives_one_logit_a_token() -> None:
    head = TokenDetectionHead(D, "relu")
    expected = torch.relu(hidden() @ head.dense.weight + head.dense.bias) @ head.logit.weight + head.logit.bias
    torch.testing.assert_close(head(hidden()), expected[..., 0])


def test_token_head() -> None:
    assert TokenHead(D, 4, dropout=0.1)(hidden()).shape == (B, T, 4)


def test_beam_span_end_depends_on_the_start_and_masks_hold() -> None:
    head = BeamSpanHead(D, dropout=0.0)
    p_mask = torch.zeros(B, T)
    p_mask[:, -1] = 1
    x = hidden()
    start = head.start_logits(x, p_mask)
    assert start.shape == (B, T)
    assert (start.argmax(-1) < T - 1).all()
    ends = head.end_logits(x, torch.tensor([[0, 2], [1, 3]]), p_mask)
    assert ends.shape == (B, 2, T)
    assert (ends.argmax(-1) < T - 1).all()
    assert not torch.allclose(ends[:, 0, :-1], ends[:, 1, :-1])
    by_hand = torch.cat([x[1, 2], x[1, 3]])  # end at token 2, start at token 3, in row 1
    y = head.end_layer_norm(torch.tanh(by_hand @ head.end_dense_0.weight + head.end_dense_0.bias))
    torch.testing.assert_close(ends[1, 1, 2], (y @ head.end_dense_1.weight + head.end_dense_1.bias)[0])


def test_beam_span_starts_and_ends_may_be_added_in_any_precision() -> None:
    head = BeamSpanHead(D, dropout=0.0)
    p_mask = torch.zeros(B, T, dtype=torch.bool)
    p_mask[:, 1] = True
    for dtype in (torch.float16, torch.bfloat16):
        half = copy.deepcopy(head).to(dtype)
        for run, x in ((half, hidden().to(dtype)), (head, hidden())):
            with torch.autocast("cpu", dtype, enabled=run is head):
                start, end = run.start_logits(x, p_mask), run.end_logits(x, torch.zeros(B, 1, dtype=torch.long), p_mask)
            total = start + end[:, 0]
            assert total.isfinite().all()
            assert not total.float().softmax(-1)[p_mask].any()


def test_beam_span_answerability() -> None:
    head = BeamSpanHead(D, dropout=0.0)
    x = hidden()
    weights = torch.zeros(B, T)
    weights[:, 3] = 1.0
    pair = torch.cat([x[:, 3], x[:, 0]], dim=-1)
    expected = torch.tanh(pair @ head.answer_dense_0.weight + head.answer_dense_0.bias) @ head.answer_dense_1.weight
    torch.testing.assert_close(head.answer_logits(x, weights, x[:, 0]), expected[:, 0])
    assert not torch.allclose(head.answer_logits(x, weights, x[:, 1]), expected[:, 0])
