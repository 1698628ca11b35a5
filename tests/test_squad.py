"""SQuAD's scores against the rules of its official evaluation, written down once more; the threshold by trying all."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from funneltfm import squad


def official_words(text: str) -> list[str]:
    """Lower case, no punctuation, no articles, split at white space: letter by letter."""
    kept = "".join(c for c in text.lower() if c not in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
    words, word = [], ""
    for c in kept + " ":
        if c.isalnum():
            word += c
            continue
        words.append(" " if word in ("a", "an", "the") else word)
        words.append(c)
        word = ""
    return "".join(words).split()


def official_f1(prediction: str, gold: str) -> float:
    found, right = official_words(prediction), official_words(gold)
    if len(found) == 0 or len(right) == 0:
        return float(found == right)
    left, same = list(right), 0
    for word in found:
        if word in left:
            left.remove(word)
            same += 1
    if same == 0:
        return 0.0
    precision, recall = same / len(found), same / len(right)
    return 2 * precision * recall / (precision + recall)


WORDS = st.lists(
    st.sampled_from(["The", "a", "an", "cat", "cats.", "U.S.", "it's", "theatre", "--", "Caf\u00e9", "\u2013"])
)
TEXTS = st.builds(" ".join, WORDS) | st.text("aAnthe .,-'\t\n\u00e9")


@given(TEXTS, TEXTS)
def test_exact_match_and_f1(prediction: str, gold: str) -> None:
    assert squad.normalized(prediction).split() == official_words(prediction)
    assert squad.exact_match(prediction, gold) == (official_words(prediction) == official_words(gold))
    assert squad.f1(prediction, gold) == pytest.approx(official_f1(prediction, gold), abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "gold", "em", "f1"),
    [
        ("Denver Broncos", "the denver broncos.", 1, 1),
        ("the big cat", "big dog", 0, 0.5),
        ("cat cat", "cat", 0, 2 / 3),  # words count as often as they come
        ("", "", 1, 1),
        ("", "cat", 0, 0),
        ("the", "", 1, 1),
        ("anthem", "them", 0, 0),  # articles are whole words
    ],
)
def test_by_hand(prediction: str, gold: str, em: float, f1: float) -> None:
    assert squad.exact_match(prediction, gold) == em
    assert squad.f1(prediction, gold) == pytest.approx(f1)


def test_the_best_gold_counts_for_each_score() -> None:
    assert squad.best_of("red cat", ["dog", "a red cat on a mat", "red"]) == (0, pytest.approx(2 / 3))
    assert squad.best_of("dog", ["cat", "dog"]) == (1, 1)
    assert squad.best_of("", []) == (1, 1)
    assert squad.best_of("dog", []) == (0, 0)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([-2.0, -1.0, 0.0, 0.5, 3.0, float("inf")]),
            st.sampled_from([0.0, 0.25, 0.5, 1.0]),
            st.sampled_from([0.0, 1.0]),
        ),
        min_size=1,
    )
)
def test_no_other_threshold_is_better(rows: list[tuple[float, float, float]]) -> None:
    margins, answered, refused = np.array(rows).T

    def total(threshold: float) -> float:
        return float(np.where(margins > threshold, refused, answered).sum())

    chosen = squad.best_null_threshold(margins, answered, refused)
    assert np.isfinite(chosen)
    assert total(chosen) >= max(total(t) for t in (-9.0, -2.0, -1.5, -1.0, 0.0, 0.5, 1.0, 3.0, 9.0)) - 1e-9
