"""Metrics over a whole split: accumulate predictions, then compute once."""

import warnings
from collections.abc import Callable

import numpy as np


def accuracy(pred: np.ndarray, target: np.ndarray) -> float:
    return float((pred == target).mean())


def f1(pred: np.ndarray, target: np.ndarray) -> float:
    """F1 of class 1, as GLUE takes it for MRPC and QQP; 0 where class 1 neither is nor is predicted."""
    from sklearn.metrics import f1_score

    return float(f1_score(target == 1, pred == 1, zero_division=0.0))


def mcc(pred: np.ndarray, target: np.ndarray) -> float:
    """Matthews correlation; 0 where one class alone is predicted."""
    from sklearn.metrics import matthews_corrcoef

    if np.ptp(pred) == 0 or np.ptp(target) == 0:
        return 0.0
    return float(matthews_corrcoef(target, pred))


def pearson(pred: np.ndarray, target: np.ndarray) -> float:
    """Pearson correlation; 0 where either side is constant."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, pred, target)


def spearman(pred: np.ndarray, target: np.ndarray) -> float:
    """Spearman rank correlation; 0 where either side is constant."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, pred, target)


def _correlation(function: Callable, pred: np.ndarray, target: np.ndarray) -> float:
    if len(pred) < 2 or np.ptp(pred) == 0 or np.ptp(target) == 0:
        return 0.0
    with warnings.catch_warnings():  # scipy warns of input that is nearly constant
        warnings.simplefilter("ignore")
        return float(np.nan_to_num(function(pred, target).statistic))


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "mcc": mcc,
    "pearson": pearson,
    "spearman": spearman,
}


def compute(names: tuple[str, ...], pred: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """The named metrics of (N,) predictions against (N,) targets."""
    return {name: METRICS[name](pred, target) for name in names}


def by_class(pred: np.ndarray, target: np.ndarray, n: int) -> dict[str, float]:
    """Accuracy, macro F1 over the n classes, and for each class i the share of its examples that were found,
    `accuracy_class_i`, and its F1, `f1_class_i`; 0 for a class that neither is nor is predicted.
    """
    from sklearn.metrics import precision_recall_fscore_support

    _, recall, f1_scores, _ = precision_recall_fscore_support(target, pred, labels=range(n), zero_division=0.0)
    scores = {"accuracy": accuracy(pred, target), "f1": float(f1_scores.mean())}
    for i in range(n):
        scores |= {f"accuracy_class_{i}": float(recall[i]), f"f1_class_{i}": float(f1_scores[i])}
    return scores
