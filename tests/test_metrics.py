"""Metrics against their formulas, counted by hand, and against degenerate input."""

import math
import re
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


# ---- entities


def entities_by_pattern(labels: list[str], types: str) -> list[tuple[str, int, int]]:
    """By regular expressions over one letter a word, type by type: an entity is a run of words of its type that begins
    with any of them and goes on with I and E as long as none was E or S."""
    found = []
    for kind in types:
        line = "".join(label[0] if label[1:] == f"-{kind}" else "." for label in labels)
        found += [(kind, m.start(), m.end() - 1) for m in re.finditer("[BI]I*E?|S|E", line)]
    return sorted(found, key=lambda entity: entity[1])


ANY_LABELS = st.lists(st.sampled_from(["O", *(f"{mark}-{kind}" for mark in "BIES" for kind in "XY")]), max_size=12)


@given(ANY_LABELS)
def test_entities_equal_patterns(labels: list[str]) -> None:
    assert metrics.entities(labels) == entities_by_pattern(labels, "XY")
    other = str.maketrans("ES", "LU")
    assert metrics.entities([label[0].translate(other) + label[1:] for label in labels]) == metrics.entities(labels)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("O O", []),
        ("", []),
        ("B-X I-X O B-X", [("X", 0, 1), ("X", 3, 3)]),
        ("B-X B-X", [("X", 0, 0), ("X", 1, 1)]),  # neighbours
        ("I-X I-X O I-X", [("X", 0, 1), ("X", 3, 3)]),  # IOB1: B only between neighbours
        ("I-X B-X I-X", [("X", 0, 0), ("X", 1, 2)]),
        ("B-X I-Y I-Y", [("X", 0, 0), ("Y", 1, 2)]),  # another type begins another entity
        ("S-X S-X B-X E-X I-X", [("X", 0, 0), ("X", 1, 1), ("X", 2, 3), ("X", 4, 4)]),
        ("U-X B-X L-X", [("X", 0, 0), ("X", 1, 2)]),
        ("B-a-b I-a-b", [("a-b", 0, 1)]),
    ],
)
def test_entities(labels: str, expected: list[tuple[str, int, int]]) -> None:
    assert metrics.entities(labels.split()) == expected


def test_the_same_entities_in_every_scheme() -> None:
    for labels in ("I-X B-X I-X O I-Y", "B-X B-X I-X O B-Y", "S-X B-X E-X O S-Y", "U-X B-X L-X O U-Y"):
        assert metrics.entities(labels.split()) == [("X", 0, 0), ("X", 1, 2), ("Y", 4, 4)]


def random_sentences(seed: int, marks: str) -> tuple[list[list[str]], list[list[str]]]:
    rng = np.random.default_rng(seed)
    names = ["O", *(f"{mark}-{kind}" for mark in marks for kind in ("PER", "LOC", "ORG"))]
    true = [rng.choice(names, rng.integers(1, 15)).tolist() for _ in range(60)]
    pred = [[label if rng.random() < 0.7 else str(rng.choice(names)) for label in sentence] for sentence in true]
    return pred, true


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("marks", ["BI", "I"])
def test_entity_scores_are_the_strict_ones_of_nervaluate(seed: int, marks: str) -> None:
    nervaluate = pytest.importorskip("nervaluate")
    pred, true = random_sentences(seed, marks)
    types = ["LOC", "ORG", "PER"]
    result = nervaluate.Evaluator(true, pred, tags=types, loader="list").evaluate()
    scores = metrics.by_entity(pred, true, types)
    for suffix, expected in {"": result["overall"], **{f"_{kind}": result["entities"][kind] for kind in types}}.items():
        for name in ("precision", "recall", "f1"):
            assert scores[f"entity_{name}{suffix}"] == pytest.approx(getattr(expected["strict"], name), abs=1e-9)
    assert 0.1 < scores["entity_f1"] < 0.9


@pytest.mark.parametrize("marks", ["BI", "I", "BIES"])
def test_entity_scores_by_counting(marks: str) -> None:
    pred, true = random_sentences(9, marks)
    said, there = (
        {(n, *entity) for n, labels in enumerate(side) for kind in ("PER", "LOC", "ORG", "NONE")
         for entity in entities_by_pattern([f"{x[0]}-{'K' if x[2:] == kind else '?'}" for x in labels], "K")
         for entity in [(kind, *entity[1:])]}
        for side in (pred, true)
    )  # fmt: skip
    scores = metrics.by_entity(pred, true, ["PER", "LOC", "ORG", "NONE"])
    for kind in ("", "PER", "LOC", "ORG", "NONE"):
        own, gold = ({e for e in side if kind in ("", e[1])} for side in (said, there))
        right = len(own & gold)
        precision, recall = right / len(own) if own else 0.0, right / len(gold) if gold else 0.0
        f1 = 2 * precision * recall / (precision + recall) if right else 0.0
        for name, value in (("precision", precision), ("recall", recall), ("f1", f1)):
            assert scores[f"entity_{name}" + (f"_{kind}" if kind else "")] == pytest.approx(value, abs=1e-12)


def test_no_entities() -> None:
    assert set(metrics.by_entity([["O"], []], [["O"], []], ["X"]).values()) == {0.0}
    assert set(metrics.by_entity([], [], []).values()) == {0.0}
    only_missed = metrics.by_entity([["O"]], [["B-X"]], ["X"])
    assert (only_missed["entity_precision"], only_missed["entity_recall"], only_missed["entity_f1"]) == (0.0, 0.0, 0.0)
