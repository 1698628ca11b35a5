"""Pictures of a run, as PNG files."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from funneltfm.files import atomic_path

# Beyond these many classes a matrix shows colours alone: no counts, then no names.
_COUNTED, _NAMED = 30, 60


def _figure(**kwargs: Any) -> tuple[Any, Any]:
    """A figure that needs no display and leaves pyplot's global state alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", **kwargs)
    FigureCanvasAgg(figure)
    return figure, figure.subplots


def _save(figure: Any, path: Path) -> None:
    with atomic_path(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # class names in scripts the font lacks
        figure.savefig(temporary, dpi=120, bbox_inches="tight")


def learning_curves(
    rows: Sequence[dict[str, float]], splits: Sequence[str], metric: str, best_step: int, path: Path
) -> None:
    """Loss (left) and the main metric (right) over the steps; a dotted line marks the best checkpoint."""
    figure, subplots = _figure(figsize=(10, 4))
    left, right = subplots(1, 2)
    for key, label, axis in [
        ("train/loss", "train", left),
        *((f"{split}/loss", split, left) for split in splits),
        *((f"{split}/{metric}", split, right) for split in splits),
    ]:
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 30 else None)
    for axis, title in ((left, "loss"), (right, metric)):
        axis.axvline(best_step, color="gray", linestyle=":", label="best")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend()
    _save(figure, path)


def score_curves(rows: Sequence[dict[str, float]], scores: Sequence[str], path: Path) -> None:
    """A panel for each of `scores` over the steps, with a line for each split. rows: of metrics.csv; a column is a
    score, or SPLIT/SCORE.
    """
    across = min(3, len(scores))
    down = -(-len(scores) // across)
    figure, subplots = _figure(figsize=(5 * across, 3.5 * down))
    axes = np.atleast_1d(subplots(down, across)).ravel()
    for axis, score in zip(axes, scores, strict=False):
        for column in dict.fromkeys(column for row in rows for column in row):
            points = [(row["step"], row[column]) for row in rows if column in row]
            if score_of(column) == score:
                label = column.removesuffix(score).rstrip("/")
                axis.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 30 else None)
        axis.set_title(score, parse_math=False)
        axis.set(xlabel="step")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:  # there is none for lines without a split
            axis.legend()
    for axis in axes[len(scores) :]:
        axis.remove()
    _save(figure, path)


def score_of(column: str) -> str:
    """What a column of metrics.csv measures, without the split.

    >>> score_of("valid/token_detection/f1"), score_of("train/loss"), score_of("lr")
    ('token_detection/f1', 'loss', 'lr')
    """
    return column.partition("/")[2] or column


def confusion_matrix(pred: np.ndarray, target: np.ndarray, labels: Sequence[str], title: str, path: Path) -> None:
    """Rows are the true classes, columns the predicted ones; colours are shares of a row, numbers (of few classes)
    counts.
    """
    n = len(labels)
    counts = np.zeros((n, n), np.int64)
    np.add.at(counts, (target, pred), 1)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = min(max(4.0, 0.6 * n + 2), 14.0)
    figure, subplots = _figure(figsize=(size + 1, size))
    axis = subplots()
    image = axis.imshow(share, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, label="share of the true class")
    axis.set(xlabel="predicted", ylabel="true")
    axis.set_title(title, parse_math=False)
    if n <= _NAMED:
        names = [label if len(label) <= 20 else f"{label[:19]}~" for label in labels]
        axis.set_xticks(range(n), names, parse_math=False, **({"rotation": 45, "ha": "right"} if n > 3 else {}))
        axis.set_yticks(range(n), names, parse_math=False)
    if n <= _COUNTED:
        for row, column in np.ndindex(n, n):
            color = "white" if share[row, column] > 0.5 else "black"
            axis.text(column, row, counts[row, column], ha="center", va="center", color=color)
    _save(figure, path)


def regression_scatter(pred: np.ndarray, target: np.ndarray, title: str, path: Path) -> None:
    """Predicted against true numbers."""
    figure, subplots = _figure(figsize=(5, 5))
    axis = subplots()
    axis.scatter(target, pred, s=6, alpha=0.5)
    ends = [min(target.min(), pred.min()), max(target.max(), pred.max())]
    axis.plot(ends, ends, color="gray", linestyle=":")
    axis.set(xlabel="true", ylabel="predicted")
    axis.set_title(title, parse_math=False)
    _save(figure, path)
