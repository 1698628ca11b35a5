"""The majority class and a linear bag of words: what they score on data where the answer is known."""

import dataclasses

import numpy as np
import pytest

from funneltfm.data.readers import DATASETS, Example
from funneltfm.tasks.baselines import baselines
from funneltfm.tasks.classification import Classification

COLA, STSB = (Classification(DATASETS[name]) for name in ("CoLA", "STS-B"))
PAIRS = Classification(dataclasses.replace(DATASETS["RTE"], labels=("no", "yes")))


def examples(rows: list[tuple[str, str]]) -> list[Example]:
    return [Example(str(i), text, None, label) for i, (text, label) in enumerate(rows)]


def test_majority_is_that_of_train() -> None:
    train = examples([("a", "1"), ("b", "1"), ("c", "0")])
    valid = examples([("a", "0"), ("b", "0"), ("c", "1"), ("d", "0")])
    assert baselines(COLA, train, valid)["majority"]["accuracy"] == 0.25
    assert baselines(COLA, train, valid)["majority"]["mcc"] == 0.0


def test_bag_of_words_finds_a_word_that_decides() -> None:
    rows = [(f"the {thing} was {word}", label) for thing in "abcdefgh" for word, label in (("good", "1"), ("bad", "0"))]
    valid = examples([("a new thing , good", "1"), ("Bad indeed", "0"), ("so good", "1"), ("bad", "0")])
    scores = baselines(COLA, examples(rows), valid)
    assert scores["bag_of_words"] == {"mcc": 1.0, "accuracy": 1.0}
    assert scores["majority"]["accuracy"] == 0.5
    assert list(scores) == ["majority", "bag_of_words"]


def test_bag_of_words_cannot_see_order() -> None:
    rows = [("not good but bad", "0"), ("not bad but good", "1")] * 10
    assert baselines(COLA, examples(rows), examples(rows))["bag_of_words"]["accuracy"] == 0.5


def test_the_sides_of_a_pair_are_told_apart() -> None:
    rows = [Example("0", "red", "blue", "yes"), Example("1", "blue", "red", "no")] * 8
    assert baselines(PAIRS, rows, rows)["bag_of_words"]["accuracy"] == 1.0


def test_regression() -> None:
    rows = [Example(str(i), " ".join(["up"] * i + ["down"] * (5 - i)), "x", str(float(i))) for i in range(6)] * 5
    scores = baselines(STSB, rows, rows)
    assert scores["bag_of_words"]["pearson"] > 0.99
    assert scores["majority"] == {"pearson": 0.0, "spearman": 0.0}


@pytest.mark.parametrize("label", ["0", "1"])
def test_training_data_of_one_class(label: str) -> None:
    """Nothing to learn: both say that class."""
    valid = examples([("a", "1"), ("b", "0"), ("c", "1"), ("d", "1")])
    scores = baselines(COLA, examples([("a", label), ("b c", label)]), valid)
    expected = 0.75 if label == "1" else 0.25
    assert [scores[name]["accuracy"] for name in ("majority", "bag_of_words")] == [expected, expected]


def test_many_classes_and_one_example() -> None:
    ag = Classification(DATASETS["AG"])
    scores = baselines(ag, examples([("a", "3"), ("b", "4"), ("b c", "4")]), examples([("b", "4")]))
    assert scores == {"majority": {"accuracy": 1.0}, "bag_of_words": {"accuracy": 1.0}}


def test_the_same_twice() -> None:
    rng = np.random.default_rng(0)
    rows = [(" ".join(rng.choice(list("abcdefg"), 5)), str(rng.integers(0, 2))) for _ in range(60)]
    assert baselines(COLA, examples(rows[:40]), examples(rows[40:])) == baselines(
        COLA, examples(rows[:40]), examples(rows[40:])
    )
