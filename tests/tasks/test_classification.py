"""A task: loss, predictions and scores of logits, for classes and for numbers."""

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from funneltfm.data.readers import DATASETS
from funneltfm.tasks.classification import Classification

MNLI, STSB, COLA, AG = (Classification(DATASETS[name]) for name in ("MNLI", "STS-B", "CoLA", "AG"))


def test_what_the_row_of_the_table_says() -> None:
    assert [task.num_class for task in (MNLI, STSB, COLA, AG)] == [3, 1, 2, 4]
    assert [task.regression for task in (MNLI, STSB, COLA, AG)] == [False, True, False, False]
    assert [task.main_metric for task in (MNLI, STSB, COLA, AG)] == ["accuracy", "pearson", "mcc", "accuracy"]


def test_cross_entropy_by_its_formula() -> None:
    logits = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    labels = np.array([0, 2, 1, 1, 0])
    expected = (logsumexp(logits, axis=1) - logits[range(5), labels]).mean()
    assert MNLI.loss(torch.tensor(logits), torch.tensor(labels)).item() == pytest.approx(expected, abs=1e-6)
    assert MNLI.score(logits, labels)["loss"] == pytest.approx(expected, abs=1e-6)


def test_squared_error_by_its_formula() -> None:
    logits, labels = np.array([[1.0], [2.5], [-1.0]], np.float32), np.array([0.0, 5.0, 1.0])
    expected = (1 + 6.25 + 4) / 3
    assert STSB.loss(torch.tensor(logits), torch.tensor(labels)).item() == pytest.approx(expected)
    assert STSB.score(logits, labels)["loss"] == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("task", [MNLI, STSB], ids=["classes", "numbers"])
def test_loss_of_half_precision_is_computed_in_fp32(task: Classification, dtype: torch.dtype) -> None:
    logits = torch.tensor([[300.0, 1.0, 2.0], [0.5, 200.0, 1.0]])[:, : task.num_class].to(dtype)
    labels = torch.tensor([1, 0])
    loss = task.loss(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, task.loss(logits.float(), labels))
    assert loss.isfinite()


def test_loss_has_a_gradient() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    MNLI.loss(logits, torch.tensor([0, 1])).backward()
    torch.testing.assert_close(logits.grad[0], torch.tensor([1 / 3 - 1, 1 / 3, 1 / 3]) / 2)


def test_predictions_and_their_names() -> None:
    logits = np.array([[0.1, 0.9, 0.3], [2.0, 1.0, 0.0], [0.0, 0.0, 0.5]], np.float32)
    pred = MNLI.predict(logits)
    assert pred.tolist() == [1, 0, 2]
    assert [MNLI.label_name(p) for p in pred] == ["entailment", "contradiction", "neutral"]
    numbers = STSB.predict(np.array([[3.14159], [-0.5]], np.float32))
    assert numbers.tolist() == pytest.approx([3.14159, -0.5])
    assert [STSB.label_name(number) for number in numbers] == ["3.1416", "-0.5000"]


def test_scores_are_the_datasets_metrics_and_the_loss() -> None:
    logits = np.array([[2.0, 0.0], [0.0, 2.0], [0.0, 2.0], [2.0, 0.0]], np.float32)
    scores = COLA.score(logits, np.array([0, 1, 0, 0]))
    assert list(scores) == ["mcc", "accuracy", "loss"]
    assert scores["accuracy"] == 0.75
    assert scores["mcc"] == pytest.approx((1 * 2 - 1 * 0) / np.sqrt(2 * 1 * 3 * 2))
    assert all(type(value) is float for value in scores.values())
