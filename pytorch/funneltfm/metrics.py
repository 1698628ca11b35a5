"""Metrics over a whole split: accumulate predictions, then compute once."""

import warnings
from collections.abc import Callable, Sequence

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
    """Accuracy, macro F1 over the n classes, Matthews correlation, and for each class i the share of its examples that
    were found, `accuracy_class_i`, and its F1, `f1_class_i`; 0 for a class that neither is nor is predicted.
    """
    from sklearn.metrics import precision_recall_fscore_support

    _, recall, f1_scores, _ = precision_recall_fscore_support(target, pred, labels=range(n), zero_division=0.0)
    scores = {"accuracy": accuracy(pred, target), "f1": float(f1_scores.mean()), "mcc": mcc(pred, target)}
    for i in range(n):
        scores |= {f"accuracy_class_{i}": float(recall[i]), f"f1_class_{i}": float(f1_scores[i])}
    return scores


# ---- entities

Entity = tuple[str, int, int]  # (type, first word, last word)


def entities(labels: Sequence[str]) -> list[Entity]:
    """The entities that the labels of a sentence's words mark, read as the evaluation of CoNLL-2000 and 2003 does.

    labels: O, or one of B- I- E- S- (L- and U- are other names of the latter two) and a type. An entity begins at B-
    and S-, and at I- and E- where no entity of that type is open; it ends before the next one, before O, and with E-
    and S-. So BIO, IOB1, BIOES and BILOU are read alike, and every sequence has a meaning.

    >>> entities(["I-PER", "I-PER", "B-PER", "O", "B-LOC", "I-ORG"])
    [('PER', 0, 1), ('PER', 2, 2), ('LOC', 4, 4), ('ORG', 5, 5)]
    """
    found: list[Entity] = []
    is_open = False  # whether the next word may belong to the last entity found
    for i, label in enumerate(labels):
        mark, _, kind = label.partition("-")
        if not kind:
            is_open = False
            continue
        if is_open and mark not in "BSU" and found[-1][0] == kind:
            found[-1] = kind, found[-1][1], i
        else:
            found.append((kind, i, i))
        is_open = mark not in "ELSU"
    return found


def by_entity(pred: Sequence[Sequence[str]], target: Sequence[Sequence[str]], types: Sequence[str]) -> dict[str, float]:
    """`entity_precision`, `entity_recall` and `entity_f1` of exact entities (words and type) over all sentences, then
    the same for each type, `entity_f1_TYPE`; 0 where there is nothing to divide by.

    pred, target: the labels of each sentence's words. types: all that labels may have.
    """
    counts = {kind: [0, 0, 0] for kind in types}  # found rightly, found, there
    for one, other in zip(pred, target, strict=True):
        said, true = entities(one), entities(other)
        right = set(said) & set(true)
        for place, some in enumerate((right, said, true)):
            for kind, _, _ in some:
                counts[kind][place] += 1
    total = [sum(count[place] for count in counts.values()) for place in range(3)]
    scores = {}
    for suffix, (right_n, said_n, true_n) in [("", total), *((f"_{kind}", count) for kind, count in counts.items())]:
        scores[f"entity_precision{suffix}"] = right_n / said_n if said_n else 0.0
        scores[f"entity_recall{suffix}"] = right_n / true_n if true_n else 0.0
        scores[f"entity_f1{suffix}"] = 2 * right_n / (said_n + true_n) if said_n + true_n else 0.0
    return scores
