"""Classes and numbers of texts: labels, losses, scores, predictions, and whole runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from scipy.special import logsumexp

from funneltfm.data.features import Features
from funneltfm.data.text import TextEncoder
from funneltfm.errors import InputError
from funneltfm.tasks.base import Collate, encode_rows
from funneltfm.tasks.seq_class import SeqClass
from funneltfm.training.train import train
from funneltfm.training.train_config import make_train_args

ROWS = [
    {"id": "p", "text": "good fox", "other": "quick", "label": "pos", "score": 1.5},
    {"id": "q", "text": "bad dog", "other": "lazy", "label": "neg", "score": -2},
    {"id": "r", "text": "fine", "other": "", "label": "pos", "score": "0.25"},
    {"id": "s", "text": "", "other": "bad", "label": "neg", "score": 3},
]


def task_of(rows: list[dict[str, Any]] = ROWS, **flags: Any) -> SeqClass:
    task = SeqClass(make_train_args(pipeline="seq_class", **flags))
    task.learn(rows)
    return task


def features_of(task: SeqClass, tokenizer: Any, rows: list[dict[str, Any]] = ROWS) -> Features:
    return encode_rows([task], rows, TextEncoder(tokenizer, 16), "dev")


def test_examples(tiny_tokenizer: Any) -> None:
    task = task_of(input_columns=["text", "other"])
    features = features_of(task, tiny_tokenizer)
    assert task.labels.names == ["neg", "pos"]
    assert features.plain["seq_class_labels"].tolist() == [1, 0, 1, 0]
    for i, row in enumerate(ROWS):
        own = tiny_tokenizer([row["text"]], [row["other"]])
        assert features[i]["input_ids"].tolist() == own["input_ids"][0]
    batch = Collate([task], tiny_tokenizer)([features[2], features[1]])
    assert batch["seq_class_labels"].tolist() == [1, 0]
    assert batch["index"].tolist() == [2, 1]


def test_loss_and_scores_by_their_formulas(tiny_tokenizer: Any) -> None:
    weights = (0.5, 2.0)
    task = task_of(label_weights=weights)
    features = features_of(task, tiny_tokenizer)
    logits = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    labels = features.plain["seq_class_labels"]
    nll = logsumexp(logits, axis=1) - logits[range(4), labels]
    expected = (nll * np.array(weights)[labels]).sum() / np.array(weights)[labels].sum()
    batch = {"seq_class_labels": torch.tensor(labels)}
    assert task.loss(torch.tensor(logits), batch).item() == pytest.approx(expected, rel=1e-6)
    assert task.size(batch) == 5.0
    assert task_of().size(batch) is None  # a mean over examples
    records = task.record(torch.tensor(logits), batch)
    scores = task.score(records, features, ROWS)
    assert scores["loss"] == pytest.approx(expected, rel=1e-6)
    pred = logits.argmax(1)
    assert scores["accuracy"] == (pred == labels).mean()
    for c in (0, 1):
        tp, said, there = ((pred == c) & (labels == c)).sum(), (pred == c).sum(), (labels == c).sum()
        assert scores[f"accuracy_class_{c}"] == tp / there
        assert scores[f"f1_class_{c}"] == pytest.approx(2 * tp / (said + there))
    assert scores["f1"] == pytest.approx((scores["f1_class_0"] + scores["f1_class_1"]) / 2)
    assert scores["mcc"] == pytest.approx(np.corrcoef(pred, labels)[0, 1])
    assert task.train_scores(torch.tensor(logits), batch) == {"accuracy": pytest.approx((pred == labels).mean())}


def test_label_smoothing_is_that_of_torch() -> None:
    task = task_of(label_smoothing=0.2)
    logits, labels = torch.randn(5, 2), torch.tensor([0, 1, 1, 0, 1])
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(task.loss(logits, {"seq_class_labels": labels}), expected)


def test_predictions(tiny_tokenizer: Any) -> None:
    task = task_of()
    features = features_of(task, tiny_tokenizer)
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 3.0], [0.0, 0.5]])
    rows = list(task.predict(task.record(logits, {}), features, ROWS))
    assert [row["id"] for row in rows] == ["p", "q", "r", "s"]
    assert [row["prediction"] for row in rows] == ["pos", "neg", "pos", "pos"]
    assert [row["label"] for row in rows] == ["pos", "neg", "pos", "neg"]
    assert rows[0]["scores"] == {"neg": pytest.approx(0.268941), "pos": pytest.approx(0.731059)}
    json.dumps(rows)


def test_predictions_of_some_examples_are_of_their_rows(tiny_tokenizer: Any) -> None:
    """As limit_test_batches leaves them."""
    task = task_of()
    features = features_of(task, tiny_tokenizer).take([3, 1])
    rows = list(task.predict(task.record(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), {}), features, ROWS))
    assert [(row["id"], row["label"], row["prediction"]) for row in rows] == [("s", "neg", "neg"), ("q", "neg", "pos")]


def test_prediction_without_labels(tiny_tokenizer: Any) -> None:
    task = task_of()
    again = SeqClass(task.args)
    again.load_state(json.loads(json.dumps(task.state())))
    for column in ({}, {"label": None}, {"label": ""}):  # as a table has it where there is none
        features = features_of(again, tiny_tokenizer, [{"text": "fox"} | column])
        batch = Collate([again], tiny_tokenizer)([features[0]])
        assert "seq_class_labels" not in batch
        (row,) = again.predict(again.record(torch.tensor([[0.0, 1.0]]), batch), features, [{"text": "fox"}])
        assert row == {"row": 1, "prediction": "pos", "scores": {"neg": 0.268941, "pos": 0.731059}}


def test_regression(tiny_tokenizer: Any) -> None:
    task = task_of(regression=True, label_column="score")
    assert task.main_metric == "pearson"
    assert task.model_config() == {"num_labels": 1, "problem_type": "regression"}
    features = features_of(task, tiny_tokenizer)
    assert features.plain["seq_class_labels"].tolist() == [1.5, -2.0, 0.25, 3.0]
    logits = torch.tensor([[1.0], [-1.0], [0.0], [2.5]])
    batch = Collate([task], tiny_tokenizer)([features[i] for i in range(4)])
    expected = np.mean((logits[:, 0].numpy() - [1.5, -2, 0.25, 3]) ** 2)
    assert task.loss(logits, batch).item() == pytest.approx(expected)
    scores = task.score(task.record(logits, batch), features, ROWS)
    assert scores["loss"] == pytest.approx(expected)
    assert scores["pearson"] == pytest.approx(np.corrcoef(logits[:, 0], features.plain["seq_class_labels"])[0, 1])
    assert scores["spearman"] == pytest.approx(1.0)
    assert list(task.predict(task.record(logits, batch), features, ROWS))[2] == {
        "id": "r", "row": 3, "prediction": 0.0, "label": 0.25,
    }  # fmt: skip


@pytest.mark.parametrize("value", ["x", float("nan"), "inf", [1.0]])
def test_what_is_no_number(value: Any, tiny_tokenizer: Any) -> None:
    task = task_of(regression=True, label_column="score")
    with pytest.raises(InputError, match="dev, row 2: score must be a number with --regression"):
        features_of(task, tiny_tokenizer, [ROWS[0], ROWS[1] | {"score": value}])


@pytest.mark.parametrize("flags", [{"num_labels": 2}, {"label_weights": (1.0,)}, {"label_smoothing": 0.1}])
def test_regression_has_no_classes(flags: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="about classes"):
        task_of(regression=True, label_column="score", **flags)


def test_messages(tiny_tokenizer: Any) -> None:
    task = task_of()
    with pytest.raises(InputError, match="dev, row 2: no label, but other rows have one"):
        features_of(task, tiny_tokenizer, [ROWS[0], {"text": "fox"}])
    with pytest.raises(InputError, match="dev, row 1: the label 'odd' is none of the 2 classes of the training data"):
        features_of(task, tiny_tokenizer, [ROWS[0] | {"label": "odd"}])
    with pytest.raises(InputError, match="has 3 weights, but there are 2 classes: neg, pos"):
        task_of(label_weights=(1.0, 1.0, 1.0))


# ---- whole runs


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def words_that_decide(n: int, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        label = int(rng.integers(2))
        words = [
            *rng.choice(["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"], 4),
            ("bad", "good")[label],
        ]
        rows.append({"id": i, "text": " ".join(rng.permutation(words)), "label": label, "score": 2.0 * label - 1})
    return rows


@pytest.mark.parametrize("regression", [False, True])
def test_a_run_learns_what_decides(regression: bool, tiny_tokenizer: Any, make_config: Any, tmp_path: Path) -> None:
    make_config("bert", len(tiny_tokenizer)).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    unlabelled = [{"id": row["id"], "text": row["text"]} for row in words_that_decide(5, 2)]
    results = train(
        pipeline="seq_class", name="run", output_dir=str(tmp_path), pre_trained_config=str(tmp_path / "model"),
        train_dataset=[write(tmp_path / "train.jsonl", words_that_decide(96, 0))],
        valid_dataset=write(tmp_path / "valid.jsonl", words_that_decide(40, 1)),
        test_dataset=write(tmp_path / "test.jsonl", words_that_decide(20, 2)),
        predict_dataset=write(tmp_path / "predict.jsonl", unlabelled),
        batch_size=16, max_epochs=8, learning_rate=2e-2, max_sequence_length=16, limit_test_batches=1,
        accumulate_grad_batches=2,
        **({"regression": True, "label_column": "score"} if regression else {}),
    )  # fmt: skip
    best = results["test"]["seq_class/pearson" if regression else "seq_class/accuracy"]
    assert best > 0.95
    rows = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in (tmp_path / "predictions" / "run").iterdir()
    }
    assert len(rows["valid"]) == 40
    assert len(rows["test"]) == 16
    truth = words_that_decide(20, 2)
    for row in rows["test"]:
        assert row["label"] == truth[row["id"]]["score" if regression else "label"]
    if not regression:
        hits = [row["prediction"] == row["label"] for row in rows["test"]]
        assert results["test"]["seq_class/accuracy"] == np.mean(hits)
    assert len(rows["predict"]) == 5
    assert "label" not in rows["predict"][0]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "pre_trained_models" / "run" / "best"
    ).eval()
    encoded = tiny_tokenizer([row["text"] for row in unlabelled], padding=True, return_tensors="pt")
    logits = model(**encoded).logits
    for row, own in zip(rows["predict"], logits.detach(), strict=True):
        if regression:
            assert row["prediction"] == pytest.approx(own[0].item(), abs=1e-5)
        else:
            assert row["scores"]["1"] == pytest.approx(own.softmax(-1)[1].item(), abs=2e-6)
