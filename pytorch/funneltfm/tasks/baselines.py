"""What a model must beat: the majority class, and a linear model that sees a bag of words."""

import numpy as np

from funneltfm import metrics
from funneltfm.data.readers import Example
from funneltfm.tasks.classification import Classification


def _words(example: Example) -> str:
    """Both texts as one bag; the words of the second are marked, so that a linear model can tell the sides apart."""
    second = " ".join(f"b_{word}" for word in (example.text_b or "").split())
    return f"{example.text_a} {second}"


def baselines(task: Classification, train: list[Example], valid: list[Example]) -> dict[str, dict[str, float]]:
    """Scores on `valid` of the majority class (or the mean) and of logistic (or ridge) regression on word counts
    of `train`.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge

    labels = task.spec.labels

    def targets(examples: list[Example]) -> np.ndarray:
        names = [example.label or "" for example in examples]
        return np.array([float(name) if labels is None else labels.index(name) for name in names])

    y_train, y_valid = targets(train), targets(valid)
    vectorizer = CountVectorizer(lowercase=True, token_pattern=r"\S+")
    x_train = vectorizer.fit_transform(map(_words, train))
    x_valid = vectorizer.transform(map(_words, valid))
    constant = y_train.mean() if task.regression else np.bincount(y_train.astype(int)).argmax()
    majority = np.full(len(y_valid), constant)
    linear = majority  # what a linear model says too where there is one class
    if len(set(y_train)) > 1:
        model = Ridge() if task.regression else LogisticRegression(max_iter=1000)
        linear = model.fit(x_train, y_train).predict(x_valid)
    predictions = {"majority": majority, "bag_of_words": linear}
    return {name: metrics.compute(task.spec.metrics, pred, y_valid) for name, pred in predictions.items()}
