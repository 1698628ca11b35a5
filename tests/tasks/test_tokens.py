"""The loss and the scores of tasks that predict tokens."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from funneltfm.data.features import Features
from funneltfm.errors import InputError
from funneltfm.tasks.base import IGNORED
from funneltfm.tasks.tokens import PredictsTokens
from funneltfm.training.train_config import make_train_args


class Words(PredictsTokens):
    name = "words"


TASK = Words(make_train_args(pipeline="masked_lm"))
LABELS = torch.tensor([[3, IGNORED, 1, 4], [IGNORED, 2, IGNORED, IGNORED], [IGNORED] * 4])
LOGITS = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
BATCH: dict[str, Any] = {"words_labels": LABELS}
PICKED = LOGITS[LABELS != IGNORED]


def test_the_loss_is_the_mean_over_what_has_a_label() -> None:
    expected = F.cross_entropy(LOGITS.flatten(0, 1), LABELS.flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(TASK.loss(PICKED, BATCH), expected)
    assert TASK.size(BATCH) == 4
    assert TASK.size({}) is None
    assert TASK.train_scores(PICKED, BATCH)["perplexity"] == pytest.approx(expected.exp().item())
    empty = {"words_labels": LABELS[2:]}
    assert TASK.loss(PICKED[:0], empty) == 0
    assert TASK.train_scores(PICKED[:0], empty) == {}


def test_scores_are_of_all_tokens_together() -> None:
    records = TASK.record(PICKED, BATCH)
    assert [record["count"] for record in records] == [3, 1, 0]
    features = Features.of([{"input_ids": [1], "row": i} for i in range(3)])
    rows: list[Any] = [{}, {"id": "b"}, {}]
    nll = F.cross_entropy(PICKED, LABELS[LABELS != IGNORED], reduction="none").numpy()
    found = (PICKED.argmax(-1) == LABELS[LABELS != IGNORED]).numpy()
    scores = TASK.score(records, features, rows)
    assert scores == pytest.approx(
        {"accuracy": found.mean(), "loss": nll.mean(), "perplexity": np.exp(nll.mean())}, rel=1e-6
    )
    first, second, third = TASK.predict(records, features, rows)
    assert first == {"row": 1, "loss": pytest.approx(nll[:3].mean()), "selected": 3}
    assert second == {"id": "b", "row": 2, "loss": pytest.approx(nll[3]), "selected": 1}
    assert third == {"row": 3, "loss": None, "selected": 0}
    with pytest.raises(InputError, match="nothing to score"):
        TASK.score(records[2:], features.take([2]), rows)
