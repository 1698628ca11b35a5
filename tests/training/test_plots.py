"""Pictures: real PNG files that show the numbers they were given, whatever the classes are called."""

from pathlib import Path

import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest

from funneltfm.training import plots


def picture(path: Path) -> np.ndarray:
    """The pixels of a PNG that is not blank."""
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) >= 200
    assert pixels[..., :3].std() > 0.01
    return pixels


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[matplotlib.figure.Figure]:
    """The figures that were saved, to look into."""
    seen: list[matplotlib.figure.Figure] = []
    original = plots._save

    def save(figure, path):
        seen.append(figure)
        original(figure, path)

    monkeypatch.setattr(plots, "_save", save)
    return seen


ROWS = [
    {"step": 1, "train/loss": 1.0},
    {"step": 2, "train/loss": 0.8},
    {"step": 2, "valid/accuracy": 0.5, "valid/loss": 0.9, "valid_mm/accuracy": 0.4, "valid_mm/loss": 1.1},
    {"step": 4, "valid/accuracy": 0.7, "valid/loss": 0.6, "valid_mm/accuracy": 0.6, "valid_mm/loss": 0.7},
]


def test_learning_curves(tmp_path: Path, figures: list) -> None:
    plots.learning_curves(ROWS, ["valid", "valid_mm"], "accuracy", 4, tmp_path / "sub" / "curves.png")
    picture(tmp_path / "sub" / "curves.png")
    left, right = figures[0].axes
    lines = {axis: {line.get_label(): line.get_xydata().tolist() for line in axis.lines} for axis in (left, right)}
    assert lines[left]["train"] == [[1, 1.0], [2, 0.8]]
    assert lines[left]["valid"] == [[2, 0.9], [4, 0.6]]
    assert lines[right]["valid"] == [[2, 0.5], [4, 0.7]]
    assert lines[right]["valid_mm"] == [[2, 0.4], [4, 0.6]]
    assert {x for x, _ in lines[right]["best"]} == {4}


def test_score_curves(tmp_path: Path, figures: list) -> None:
    rows = [row | {"lr": 0.1 * row["step"]} if "train/loss" in row else row for row in ROWS]
    plots.score_curves(rows, ["loss", "accuracy", "lr", "none"], tmp_path / "curves.png")
    picture(tmp_path / "curves.png")
    axes = figures[0].axes
    assert [axis.get_title() for axis in axes] == ["loss", "accuracy", "lr", "none"]
    lines = [{line.get_label(): line.get_xydata().tolist() for line in axis.lines} for axis in axes]
    assert lines[0] == {"train": [[1, 1.0], [2, 0.8]], "valid": [[2, 0.9], [4, 0.6]], "valid_mm": [[2, 1.1], [4, 0.7]]}
    assert lines[1] == {"valid": [[2, 0.5], [4, 0.7]], "valid_mm": [[2, 0.4], [4, 0.6]]}
    assert list(lines[2].values()) == [[[1, 0.1], [2, 0.2]]]
    assert lines[3] == {}


def test_learning_curves_of_one_step(tmp_path: Path) -> None:
    plots.learning_curves(ROWS[:1] + ROWS[2:3], ["valid"], "accuracy", 2, tmp_path / "curves.png")
    picture(tmp_path / "curves.png")


def test_confusion_matrix_has_true_classes_in_rows(tmp_path: Path, figures: list) -> None:
    pred, target = np.array([0, 1, 1, 1, 2, 0]), np.array([0, 0, 0, 1, 2, 2])
    plots.confusion_matrix(pred, target, ["a", "b", "c"], "set valid", tmp_path / "matrix.png")
    picture(tmp_path / "matrix.png")
    axis = figures[0].axes[0]
    counts = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in axis.texts}
    table = [[int(counts.get((row, column), "0") or 0) for column in range(3)] for row in range(3)]
    assert table == [[1, 2, 0], [0, 1, 0], [1, 0, 1]]
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_title()) == ("predicted", "true", "set valid")
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b", "c"]
    shares = axis.images[0].get_array()
    np.testing.assert_allclose(shares[0], [1 / 3, 2 / 3, 0])


def test_confusion_matrix_of_a_class_that_is_never_true(tmp_path: Path) -> None:
    plots.confusion_matrix(np.array([1, 1]), np.array([0, 0]), ["a", "b"], "t", tmp_path / "matrix.png")
    picture(tmp_path / "matrix.png")


@pytest.mark.parametrize(
    "names",
    [
        ["two words", "Sci/Tech"],
        ["costs $5", "costs $6 or $7"],
        ["$^$", "a_b^c"],
        ["\\frac{", "{}"],
        ["_hidden", ""],
        ["\u597d", "\u0434\u0430"],
        ["x" * 120, "y"],
    ],
    ids=["spaces", "dollars", "broken mathtext", "backslash", "underscore", "scripts", "long"],
)
def test_any_class_name_is_plain_text(tmp_path: Path, figures: list, names: list[str]) -> None:
    """No formula, no exception, no warning: results come after the pictures."""
    plots.confusion_matrix(np.array([0, 1]), np.array([0, 1]), names, f"{names[0]} valid", tmp_path / "matrix.png")
    picture(tmp_path / "matrix.png")


@pytest.mark.parametrize("n", [1, 20, 80])
def test_a_picture_of_many_classes_stays_a_picture(tmp_path: Path, n: int) -> None:
    target = np.arange(n)
    plots.confusion_matrix(target, target, [f"class {i}" for i in range(n)], "t", tmp_path / "matrix.png")
    pixels = picture(tmp_path / "matrix.png")
    assert max(pixels.shape[:2]) < 4000


def test_regression_scatter(tmp_path: Path, figures: list) -> None:
    pred, target = np.array([0.5, 2.0, 4.0], np.float32), np.array([0.0, 2.5, 5.0])
    plots.regression_scatter(pred, target, "STS-B valid", tmp_path / "scatter.png")
    picture(tmp_path / "scatter.png")
    axis = figures[0].axes[0]
    assert axis.collections[0].get_offsets().tolist() == [[0.0, 0.5], [2.5, 2.0], [5.0, 4.0]]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("true", "predicted")


def test_regression_scatter_of_one_point(tmp_path: Path) -> None:
    plots.regression_scatter(np.array([1.0]), np.array([1.0]), "t", tmp_path / "scatter.png")
    picture(tmp_path / "scatter.png")


def test_pyplot_is_left_alone(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    plots.regression_scatter(np.array([1.0]), np.array([1.0]), "t", tmp_path / "scatter.png")
    assert plt.get_fignums() == before
