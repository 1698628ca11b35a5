"""Prediction files: one row per example in the order of the split, label names, GLUE's form."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from funneltfm.data.encoding import EncodedSplit
from funneltfm.data.readers import DATASETS
from funneltfm.tasks.classification import Classification
from funneltfm.training.predictions import write_predictions


def split_of(ids: list[str], labels: list[float] | None) -> EncodedSplit:
    n = len(ids)
    tokens = np.ones(3 * n, np.int32)
    return EncodedSplit(tokens, tokens, np.arange(n + 1) * 3, np.array([] if labels is None else labels), np.array(ids))


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_classes(tmp_path: Path) -> None:
    task = Classification(DATASETS["MNLI"])
    logits = np.log(np.array([[0.2, 0.5, 0.3], [0.7, 0.2, 0.1]], np.float32))
    paths = write_predictions(task, "valid", split_of(["17", "4"], [1, 2]), logits, tmp_path / "new")
    assert paths == [tmp_path / "new" / "valid.jsonl"]
    rows = rows_of(paths[0])
    assert [(row["id"], row["prediction"], row["label"]) for row in rows] == [
        ("17", "entailment", "entailment"),
        ("4", "contradiction", "neutral"),
    ]
    assert rows[0]["scores"] == {"contradiction": 0.2, "entailment": 0.5, "neutral": 0.3}


@pytest.mark.parametrize(("split", "name"), [("test", "MNLI-m.tsv"), ("test_mm", "MNLI-mm.tsv")])
def test_submission(tmp_path: Path, split: str, name: str) -> None:
    task = Classification(DATASETS["MNLI"])
    logits = np.array([[0, 0, 1], [1, 0, 0], [0, 3, 2]], np.float32)
    paths = write_predictions(task, split, split_of(["0", "1", "2"], None), logits, tmp_path)
    assert [path.name for path in paths] == [f"{split}.jsonl", name]
    assert paths[1].read_bytes() == b"index\tprediction\n0\tneutral\n1\tcontradiction\n2\tentailment\n"
    assert all("label" not in row for row in rows_of(paths[0]))


def test_binary_labels_are_as_the_files_write_them(tmp_path: Path) -> None:
    logits = np.array([[0, 1], [1, 0]], np.float32)
    paths = write_predictions(Classification(DATASETS["CoLA"]), "test", split_of(["0", "1"], None), logits, tmp_path)
    assert paths[1].name == "CoLA.tsv"
    assert paths[1].read_text(encoding="utf-8") == "index\tprediction\n0\t1\n1\t0\n"


def test_regression_is_clipped_for_the_server_alone(tmp_path: Path) -> None:
    task = Classification(DATASETS["STS-B"])
    logits = np.array([[-0.5], [2.34567], [5.5]], np.float32)
    paths = write_predictions(task, "test", split_of(["0", "1", "2"], None), logits, tmp_path)
    assert paths[1].name == "STS-B.tsv"
    assert paths[1].read_text(encoding="utf-8") == "index\tprediction\n0\t0.000\n1\t2.346\n2\t5.000\n"
    assert [row["prediction"] for row in rows_of(paths[0])] == pytest.approx([-0.5, 2.34567, 5.5], abs=1e-4)
    assert all("scores" not in row for row in rows_of(paths[0]))
    (path,) = write_predictions(task, "valid", split_of(["0", "1", "2"], [0.0, 2.5, 5.0]), logits, tmp_path)
    assert [row["label"] for row in rows_of(path)] == [0.0, 2.5, 5.0]


def test_names_in_any_script(tmp_path: Path) -> None:
    names = ("gut so", 'with "quotes"\tand tab', "\u597d")
    task = Classification(
        dataclasses.replace(DATASETS["AG"], name="x", labels=names, submission={"test": "x.tsv"}, class_names=None)
    )
    logits = np.eye(3, dtype=np.float32)
    paths = write_predictions(task, "test", split_of(["a", "b", "\u00e9"], None), logits, tmp_path)
    assert [row["prediction"] for row in rows_of(paths[0])] == list(names)
    assert [row["id"] for row in rows_of(paths[0])] == ["a", "b", "\u00e9"]
    assert "\u597d" in paths[0].read_text(encoding="utf-8")  # not \u escapes


def test_scores_of_huge_logits_are_numbers(tmp_path: Path) -> None:
    logits = np.array([[1000.0, -1000.0]], np.float32)
    (path,) = write_predictions(Classification(DATASETS["CoLA"]), "valid", split_of(["0"], [1]), logits, tmp_path)
    assert rows_of(path)[0]["scores"] == {"0": 1.0, "1": 0.0}


def test_written_again_replaces(tmp_path: Path) -> None:
    task, split = Classification(DATASETS["CoLA"]), split_of(["0"], [1])
    write_predictions(task, "valid", split, np.array([[1.0, 0.0]], np.float32), tmp_path)
    (path,) = write_predictions(task, "valid", split, np.array([[0.0, 1.0]], np.float32), tmp_path)
    assert [row["prediction"] for row in rows_of(path)] == ["1"]
    assert list(tmp_path.iterdir()) == [path]
