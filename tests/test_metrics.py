"""Metrics against their formulas, counted by hand, and against degenerate input."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from funneltfm import metrics


def counts(pred: list[int], target: list[int]) -> tuple[int, int, int, int]:
    """tp, fp, fn, tn of class 1."""
    pairs = Counter(zip(pred, target, strict=True))
    return pairs[1, 1], pairs[1, 0], pairs[0, 1], pairs[0, 0]


def mcc_by_hand(pred: list[int], target: list[int]) -> float:
    tp, fp, fn, tn = counts(pred, target)
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(product) if product else 0.0


def f1_by_hand(pred: list[int], target: list[int]) -> float:
    tp, fp, fn, _ = counts(pred, target)
    return 2 * tp / (2 * tp + fp + fn) if tp else 0.0


def pearson_by_hand(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()))


def ranks(x: np.ndarray) -> np.ndarray:
    """1-based; equals share the mean of their ranks."""
    return np.array([(x < value).sum() + ((x == value).sum() + 1) / 2 for value in x])


binary = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=60)


@given(binary)
def test_binary_metrics_equal_counts_by_hand(rows: list[tuple[int, int]]) -> None:
    pred, target = ([row[side] for row in rows] for side in (0, 1))
    tp, _, _, tn = counts(pred, target)
    scores = metrics.compute(("accuracy", "f1", "mcc"), np.array(pred), np.array(target))
    assert scores["accuracy"] == pytest.approx((tp + tn) / len(rows))
    assert scores["f1"] == pytest.approx(f1_by_hand(pred, target))
    assert scores["mcc"] == pytest.approx(mcc_by_hand(pred, target), abs=1e-12)


def test_f1_counts_class_one_with_both_kinds_of_mistakes() -> None:
    """2 tp / (2 tp + fp + fn); it is symmetric in the mistakes, so here they differ and so do the two classes."""
    pred, target = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0]), np.array([1, 1, 0, 0, 1, 0, 0, 0, 0])
    assert counts(pred.tolist(), target.tolist()) == (2, 2, 1, 4)
    assert metrics.f1(pred, target) == pytest.approx(4 / 7)
    assert metrics.f1(target, pred) == pytest.approx(4 / 7)
    assert metrics.f1(1 - pred, 1 - target) == pytest.approx(8 / 11)


def test_f1_is_that_of_class_one_whatever_other_classes_there_are() -> None:
    pred, target = np.array([0, 1, 2, 2, 1, 0]), np.array([0, 1, 2, 1, 1, 2])
    by_hand = f1_by_hand((pred == 1).astype(int).tolist(), (target == 1).astype(int).tolist())
    assert metrics.f1(pred, target) == pytest.approx(by_hand)


def test_mcc_of_more_classes() -> None:
    """Gorodkin's R_K: the correlation of the one-hot tables."""
    rng = np.random.default_rng(0)
    pred, target = rng.integers(0, 4, 80), rng.integers(0, 4, 80)
    pred[:40] = target[:40]
    x, y = (np.eye(4)[side] - np.eye(4)[side].mean(axis=0) for side in (pred, target))
    expected = (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())
    assert metrics.mcc(pred, target) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
def test_correlations_equal_their_formulas(seed: int) -> None:
    rng = np.random.default_rng(seed)
    target = rng.integers(0, 26, 50) / 5  # with ties, as STS-B has
    pred = target + rng.normal(0, 1, 50).round(1)
    scores = metrics.compute(("pearson", "spearman"), pred.astype(np.float32), target)
    assert scores["pearson"] == pytest.approx(pearson_by_hand(pred, target), abs=1e-6)
    assert scores["spearman"] == pytest.approx(pearson_by_hand(ranks(pred.astype(np.float32)), ranks(target)), abs=1e-9)


def test_correlations_have_a_sign_and_a_scale() -> None:
    x = np.array([0.0, 1.0, 2.0, 4.0])
    assert metrics.pearson(-3 * x + 1, x) == pytest.approx(-1)
    assert metrics.spearman(np.exp(x), x) == pytest.approx(1)
    assert metrics.pearson(np.exp(x), x) < 0.95


@pytest.mark.parametrize("name", ["f1", "mcc"])
@pytest.mark.parametrize(
    ("pred", "target"),
    [([0], [0]), ([1], [0]), ([0, 0, 0], [0, 0, 0]), ([0, 0], [0, 1]), ([0, 1], [0, 0]), ([1, 1], [0, 0])],
)
def test_degenerate_classes_are_zero_without_a_warning(name: str, pred: list[int], target: list[int]) -> None:
    assert metrics.METRICS[name](np.array(pred), np.array(target)) == 0.0


def test_all_of_class_one() -> None:
    ones = np.ones(4, int)
    assert metrics.compute(("accuracy", "f1", "mcc"), ones, ones) == {"accuracy": 1.0, "f1": 1.0, "mcc": 0.0}


@pytest.mark.parametrize("name", ["pearson", "spearman"])
@pytest.mark.parametrize(
    ("pred", "target"),
    [
        ([1.0], [2.0]),
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]),
        ([1.0, 2.0, 3.0], [4.0, 4.0, 4.0]),
        ([1.0, 1.0], [2.0, 2.0]),
    ],
)
def test_degenerate_correlations_are_zero_without_a_warning(name: str, pred: list[float], target: list[float]) -> None:
    assert metrics.METRICS[name](np.array(pred, np.float32), np.array(target)) == 0.0


def test_nearly_constant_predictions_do_not_warn() -> None:
    pred = np.full(20, 1.0)
    pred[3] += 1e-15
    for name in ("pearson", "spearman"):
        assert -1 <= metrics.METRICS[name](pred, np.arange(20.0)) <= 1


def test_scores_are_plain_floats_in_the_order_asked() -> None:
    scores = metrics.compute(("mcc", "accuracy"), np.array([0, 1]), np.array([0, 1]))
    assert list(scores) == ["mcc", "accuracy"]
    assert all(type(value) is float for value in scores.values())
