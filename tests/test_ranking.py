import itertools
import math

import numpy as np
import pytest

from funneltfm.ranking import METRICS, Ties, best_threshold, ranking_scores

NAMES = tuple(METRICS)


def of_order(right):
    """Every metric of one order of candidates, by the definitions."""
    ranks = [rank for rank, good in enumerate(right, 1) if good]
    gain = sum(1 / math.log2(rank + 1) for rank in ranks)
    best = sum(1 / math.log2(rank + 1) for rank in range(1, len(ranks) + 1))
    values = {
        "mean_average_precision": sum(i / rank for i, rank in enumerate(ranks, 1)) / len(ranks),
        "mean_reciprocal_rank": 1 / ranks[0],
        "ndcg": gain / best,
    }
    values |= {f"precision_at_{k}": sum(right[:k]) / k for k in (1, 5, 100)}
    return values | {f"hit_rate_at_{k}": float(any(right[:k])) for k in (5, 100)}


def by_all_orders(scores, right):
    """The mean over all orders of the candidates that respect the scores."""
    orders = [
        of_order([right[i] for i in order])
        for order in itertools.permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    return {name: np.mean([values[name] for values in orders]) for name in NAMES}


@pytest.mark.parametrize("seed", range(40))
def test_ties_count_their_expected_value(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 8))
    scores, right = rng.integers(0, 3, n).astype(float), rng.integers(0, 2, n)
    right[rng.integers(n)] = 1
    expected = by_all_orders(scores, right)
    got = ranking_scores(NAMES, scores, right, np.zeros(n, int))
    for name in NAMES:
        assert got[name] == pytest.approx(expected[name], abs=1e-12), name


def test_ties_do_not_depend_on_the_order_of_the_labels():
    """With constant scores an implementation that keeps the input's order says 1 for (1, 0) and .5 for (0, 1)."""
    rng = np.random.default_rng(0)
    queries = rng.integers(0, 30, 400)
    scores, right = rng.integers(0, 4, 400) / 4, rng.random(400) < 0.2
    expected = ranking_scores(NAMES, scores, right, queries)
    for _ in range(5):
        order = rng.permutation(400)
        assert ranking_scores(NAMES, scores[order], right[order], queries[order]) == pytest.approx(expected, abs=1e-12)
    first, last = (ranking_scores(NAMES, np.ones(2), np.array(x), np.zeros(2)) for x in ([1, 0], [0, 1]))
    assert first == last
    assert first["mean_average_precision"] == first["mean_reciprocal_rank"] == 0.75
    assert first["precision_at_1"] == 0.5


def test_equal_to_trec_eval_without_ties():
    pytrec_eval = pytest.importorskip("pytrec_eval")
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 150, 60)
    queries = np.repeat(np.arange(60), sizes)
    scores = rng.permutation(len(queries)) / 64
    right = rng.random(len(queries)) < 0.1
    right[queries == 7] = True
    right[queries == 8] = False
    got = ranking_scores(NAMES, scores, right, queries)
    expected = trec(pytrec_eval, scores, right, queries)
    for name in NAMES:
        for kind, value in expected[name].items():
            assert got[kind + name] == pytest.approx(value, abs=1e-9), kind + name
    assert len({kind["clean_"] for kind in expected.values()}) > 3


TREC = {
    "mean_average_precision": "map",
    "mean_reciprocal_rank": "recip_rank",
    "ndcg": "ndcg",
    **{f"precision_at_{k}": f"P_{k}" for k in (1, 5, 100)},
    **{f"hit_rate_at_{k}": f"success_{k}" for k in (5, 100)},
}


def trec(pytrec_eval, scores, right, queries):
    """Means over queries with right candidates, over all, and over those with both kinds."""
    qrel, run = {}, {}
    for i, query in enumerate(queries):
        qrel.setdefault(str(query), {})[str(i)] = int(right[i])
        run.setdefault(str(query), {})[str(i)] = float(scores[i])
    results = pytrec_eval.RelevanceEvaluator(qrel, set(TREC.values())).evaluate(run)
    some = [q for q in qrel if any(qrel[q].values())]
    both = [q for q in some if not all(qrel[q].values())]
    kinds = {"": some, "raw_": list(qrel), "clean_": both}
    return {
        name: {kind: np.mean([results[q][key] for q in chosen]) for kind, chosen in kinds.items()}
        for name, key in TREC.items()
    }


def test_queries_without_a_right_candidate():
    scores, right = np.array([0.9, 0.1, 0.5, 0.4, 0.3]), np.array([0, 1, 0, 0, 1])
    queries = np.array(["a", "a", "b", "b", "c"])  # second of two; none; all
    name = "mean_reciprocal_rank"
    for action, expected in (("skip", 0.75), ("neg", 0.5), ("pos", 2.5 / 3)):
        got = ranking_scores((name,), scores, right, queries, action)
        assert got == pytest.approx({name: expected, f"raw_{name}": 0.5, f"clean_{name}": 0.5})
    nothing = ranking_scores((name,), scores[2:4], right[2:4], queries[2:4])
    assert nothing == {name: 0.0, f"raw_{name}": 0.0, f"clean_{name}": 0.0}


def test_nan_is_no_order():
    got = ranking_scores(("ndcg",), np.array([0.5, np.nan]), np.array([1, 0]), np.array([0, 0]))
    assert all(math.isnan(value) for value in got.values())


def test_many_ties_are_quick_and_exact():
    n = 20_000
    ties = Ties.of(np.zeros(n), np.arange(n) < 3)
    values = {name: METRICS[name](ties) for name in NAMES}
    assert values["precision_at_100"] == pytest.approx(3 / n)
    assert values["hit_rate_at_5"] == pytest.approx(1 - math.comb(n - 3, 5) / math.comb(n, 5), rel=1e-9)


# ---- thresholds


def f1_accuracy(scores, right, threshold):
    pred = scores >= threshold
    hits = (pred & right).sum()
    return 2 * hits / max(pred.sum() + right.sum(), 1), (pred == right).mean()


@pytest.mark.parametrize("seed", range(30))
def test_best_threshold_is_best(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 12))
    scores, right = rng.integers(0, 6, n) / 7, rng.random(n) < 0.4
    best = f1_accuracy(scores, right, best_threshold(scores, right))
    assert best == max(f1_accuracy(scores, right, t) for t in (*scores, scores.max() + 1))


def test_best_threshold_lies_between_scores():
    assert best_threshold(np.array([0.2, 0.8]), np.array([0, 1])) == 0.5
    assert best_threshold(np.array([0.2, 0.8]), np.array([0, 0])) > 0.8
    assert best_threshold(np.array([0.2, 0.8]), np.array([1, 1])) == 0.2
    close = np.array([0.5, np.nextafter(0.5, 1)])
    assert best_threshold(close, np.array([0, 1])) == close[1]
