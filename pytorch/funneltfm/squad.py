"""The scores of SQuAD: exact match and F1 over words, as its official evaluation takes them, and the threshold from
which on a question is said to have no answer.
"""

import re
import string
from collections import Counter
from collections.abc import Iterable

import numpy as np

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalized(text: str) -> str:
    """What two answers are compared by: lower case, without ASCII punctuation, articles, and spaces in excess.

    >>> normalized(" The  Denver-Broncos, a team!")
    'denverbroncos team'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, gold: str) -> float:
    """1 or 0 (Rajpurkar et al. 2016, section 6.1)."""
    return float(normalized(prediction) == normalized(gold))


def f1(prediction: str, gold: str) -> float:
    """Harmonic mean of precision and recall of the words, with their counts (section 6.1). Where one side has no
    words it is 1 if both have none (SQuAD 2.0; the script of 1.1 says 0 there).
    """
    found, right = normalized(prediction).split(), normalized(gold).split()
    if not found or not right:
        return float(found == right)
    common = sum((Counter(found) & Counter(right)).values())
    return 2 * common / (len(found) + len(right))


def best_of(prediction: str, golds: Iterable[str]) -> tuple[float, float]:
    """Exact match and F1, each against the answer that suits it best; no answers at all are the answer ""."""
    golds = list(golds) or [""]
    return max(exact_match(prediction, gold) for gold in golds), max(f1(prediction, gold) for gold in golds)


def best_null_threshold(margins: np.ndarray, answered: np.ndarray, refused: np.ndarray) -> float:
    """The threshold with the highest total score; a question is answered where its margin is at most that.

    margins: (N,), how much higher "no answer" scores than the best answer; +inf where there is none. answered,
    refused: (N,), what each question scores with its answer, and without. It is the smallest of equally good ones
    (Rajpurkar et al. 2018 choose alike).
    """
    order = np.argsort(margins, kind="stable")
    margins = margins[order]
    totals = refused.sum() + np.concatenate([[0.0], np.cumsum((answered - refused)[order])])
    ends = np.concatenate([[True], margins[1:] > margins[:-1], [True]])  # equal margins go together
    ends[1:] &= np.isfinite(margins)
    if not ends[1:].any():
        return 0.0
    best = int(np.argmax(np.where(ends, totals, -np.inf)))
    return float(margins[best - 1]) if best else float(margins[0]) - 1.0
