"""Detection of replaced tokens: what is replaced, what counts, the counts of clusters, and whole runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from funneltfm.data.features import Features
from funneltfm.data.text import NO_WORD, TextEncoder
from funneltfm.errors import InputError
from funneltfm.tasks.base import IGNORED, Collate, Prepare, encode_rows, make_tasks
from funneltfm.tasks.heads import Heads
from funneltfm.tasks.token_detection import (
    CLUSTERS,
    Clusters,
    Detection,
    detection_labels,
    detection_scores,
    detector,
    read_clusters,
)
from funneltfm.training.train import predict, train
from funneltfm.training.train_config import make_train_args

TEXTS = ["the quick brown fox jumps over", "Mary lives in New York", "", "unbelievable tokenization isn't easy", "fox"]
ROWS: list[dict[str, Any]] = [{"text": text, "id": i} for i, text in enumerate(TEXTS * 4)]
KINDS = ("word_piece", "byte_level", "unigram")


def task_of(pipeline: str = "random_token_detection", **flags: Any) -> Detection:
    (task,) = make_tasks(pipeline, make_train_args(pipeline=pipeline, **flags))
    assert isinstance(task, Detection)
    return task


def features_of(task: Detection, text: TextEncoder, rows: list[dict[str, Any]] = ROWS) -> Features:
    return encode_rows([task], rows, text, "train")


def batch_of(task: Detection, text: TextEncoder, indices: list[int], epoch: int = 0) -> dict[str, Any]:
    features, prepare = features_of(task, text), Prepare([task], text, 3)
    return Collate([task], text.tokenizer)([prepare(features[i], epoch) for i in indices])


# ---- random tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flags", [{}, {"whole_word_detection": True}, {"exact_masking": True}], ids=str)
def test_labels_are_what_was_changed(kind: str, flags: dict[str, Any], tokenizers: dict[str, Any]) -> None:
    task, text = task_of(probability=0.4, **flags), TextEncoder(tokenizers[kind], 64)
    features = features_of(task, text)
    prepare, collate = Prepare([task], text, seed=1), Collate([task], text.tokenizer)
    n_replaced = n_tokens = 0
    for epoch in range(20):
        indices = range(len(features))
        batch = collate([prepare(features[i], epoch) for i in indices])
        labels, seen = detection_labels(batch).numpy(), batch["inputs"]["input_ids"].numpy()
        for i in indices:
            clean, words = features[i]["input_ids"], features[i]["word_ids"]
            n, special = len(clean), words == NO_WORD
            assert (labels[i, :n][~special] == (seen[i, :n] != clean)[~special]).all()
            assert (labels[i, :n][special] == IGNORED).all()
            assert (labels[i, n:] == IGNORED).all()
            assert (seen[i, :n][special] == clean[special]).all()
            assert (seen[i, n:] == text.tokenizer.pad_token_id).all()
            changed = labels[i, :n] == 1
            assert np.isin(seen[i, :n][changed], text.ordinary_ids).all()
            if flags.get("whole_word_detection"):
                assert all(len({*changed[words == word]}) == 1 for word in set(words) - {NO_WORD})
            if flags.get("exact_masking") and (~special).any():
                assert changed.sum() == max(1, round(0.4 * (~special).sum()))  # every draw is another token
            n_replaced, n_tokens = n_replaced + changed.sum(), n_tokens + (~special).sum()
    assert n_replaced / n_tokens == pytest.approx(0.4, abs=0.04)
    assert task.size(batch) == (labels != IGNORED).sum()


def test_special_tokens_that_a_text_spells_are_not_touched(tiny_tokenizer: Any) -> None:
    task, text = task_of(probability=1.0), TextEncoder(tiny_tokenizer, 64)
    features = features_of(task, text, [{"text": "fox [MASK] jumps [SEP] dog [UNK]"}])
    batch = Collate([task], tiny_tokenizer)([Prepare([task], text, 0)(features[0], 0)])
    labels = detection_labels(batch)[0].numpy()
    special = np.isin(features[0]["input_ids"], text.special_ids)
    assert special.sum() == 5
    assert (labels == np.where(special, IGNORED, 1)).all()


@pytest.mark.parametrize("pipeline", ["random_token_detection", "cluster_random_token_detection"])
def test_draws_depend_on_seed_and_epoch(pipeline: str, tiny_tokenizer: Any) -> None:
    task, text = task_of(pipeline, probability=0.5), TextEncoder(tiny_tokenizer, 64)
    features = features_of(task, text)

    def made(seed: int, epoch: int) -> str:
        return str(Prepare([task], text, seed)(features[0], epoch))

    assert made(1, 0) == made(1, 0)
    assert len({made(1, 0), made(2, 0), made(1, 1), made(1, -1)}) == 4


def test_loss_and_scores_by_their_formulas(tiny_tokenizer: Any) -> None:
    task, text = task_of(probability=0.4), TextEncoder(tiny_tokenizer, 64)
    rng = np.random.default_rng(0)
    records: list[Any] = []
    d: list[float] = []
    y: list[int] = []
    for indices in ([0], [1, 2, 3], [4, 5, 6, 7, 8]):
        batch = batch_of(task, text, indices)
        labels = detection_labels(batch)
        logits = torch.tensor(rng.normal(size=labels.shape), dtype=torch.float32)
        counted = (labels != IGNORED).numpy()
        own, true = logits.numpy()[counted].astype(np.float64), labels.numpy()[counted]
        p = 1 / (1 + np.exp(-own))
        expected = -(true * np.log(p) + (1 - true) * np.log(1 - p)).mean()
        assert task.loss(logits, batch).item() == pytest.approx(expected, rel=1e-5)
        junk = logits.masked_fill(torch.from_numpy(~counted), 1e4)  # special tokens and padding count nowhere
        assert task.loss(junk, batch).item() == task.loss(logits, batch).item()
        assert task.record(junk, batch) == task.record(logits, batch)
        records += task.record(logits, batch)
        d, y = d + own.tolist(), y + true.tolist()
    said = np.array(d) > 0
    scores = task.score(records, features_of(task, text).take(range(9)), ROWS)
    precision, recall, f1, _ = precision_recall_fscore_support(y, said, average="binary", zero_division=0.0)
    assert scores["accuracy"] == pytest.approx(accuracy_score(y, said), abs=1e-12)
    assert [scores[name] for name in ("precision", "recall", "f1")] == pytest.approx([precision, recall, f1], abs=1e-12)
    p = 1 / (1 + np.exp(-np.array(d)))
    assert scores["loss"] == pytest.approx(-np.where(y, np.log(p), np.log(1 - p)).mean(), rel=1e-6)
    rows = list(task.predict(records, features_of(task, text).take(range(9)), ROWS))
    assert sum(row["replaced"] for row in rows) == sum(y)
    assert rows[2] == {"id": 2, "row": 3, "loss": None, "count": 0, "replaced": 0, "found": 0, "false_alarms": 0}
    json.dumps(rows)


def test_scores_without_something_to_divide_by() -> None:
    with pytest.raises(InputError, match="nothing to detect: 1 examples"):
        detection_scores([{"count": 0.0, "replaced": 0.0, "found": 0.0, "false_alarms": 0.0}])
    scores = detection_scores([{"count": 4.0, "replaced": 0.0, "found": 0.0, "false_alarms": 0.0}])
    assert scores == {"accuracy": 1.0, "f1": 0.0, "precision": 0.0, "recall": 0.0}


# ---- the head


def test_the_head_is_a_detector_where_there_is_one(tiny: Any) -> None:
    model_type, config, _ = tiny
    model = detector(None, config)
    own = {"electra": "ElectraForPreTraining", "funnel_tfm": "FunnelTFMForPreTraining"}
    name = type(model).__name__
    assert name == own.get(model_type, name)
    assert name.endswith("ForTokenClassification") or model_type in own
    logits = model(torch.tensor([[5, 6, 7, 8]])).logits
    assert logits.shape in ((1, 4), (1, 4, 1))
    assert model.training


def test_an_odd_pretraining_head_is_none(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is not tied to the embeddings, and yet no detector."""
    monkeypatch.setattr(transformers.BertForPreTraining, "_tied_weights_keys", None)
    assert type(detector(None, make_config("bert", 40))).__name__ == "BertForTokenClassification"


# ---- clusters

CLUSTER = torch.tensor([0, 0, 1, 1, 1, 3, 3, 0, 1, 0])  # cluster 2 has no token
ORDINARY = torch.tensor([2, 3, 4, 5, 7, 8])  # of cluster 0: 7; 1: 2 3 4 8; 3: 5


def brute_probabilities(counts: np.ndarray, x: int, beta: float) -> np.ndarray:
    row = counts[CLUSTER[x]].astype(float)
    q = (row - row.min()) / (row.max() - row.min()) if row.max() > row.min() else np.zeros(len(row))
    weight = np.exp(beta * q)
    for b in range(len(row)):
        if not [t for t in ORDINARY.tolist() if CLUSTER[t] == b and t != x]:
            weight[b] = 0
    return weight / weight.sum()


@pytest.mark.parametrize("x", ORDINARY.tolist())
def test_probabilities_of_clusters(x: int) -> None:
    clusters = Clusters(CLUSTER, ORDINARY, beta=2.0)
    even = clusters.logits(torch.tensor([x])).softmax(-1)[0].numpy()
    np.testing.assert_allclose(even, brute_probabilities(np.ones((4, 4)), x, 2.0), atol=1e-6)
    assert len(set(even[even > 0].round(6))) == 1
    clusters.counts.copy_(torch.tensor([[3, -5, 0, 2], [1, 1, 1, 9], [0, 0, 0, 0], [7, 6, 5, 4]]))
    found = clusters.logits(torch.tensor([x])).softmax(-1)[0].numpy()
    np.testing.assert_allclose(found, brute_probabilities(clusters.counts.numpy(), x, 2.0), atol=1e-6)


def test_draws_have_the_probabilities_and_are_others() -> None:
    clusters = Clusters(CLUSTER, ORDINARY, beta=2.0)
    clusters.counts.copy_(torch.tensor([[3, -5, 0, 2], [1, 4, 1, 9], [0, 0, 0, 0], [7, 6, 5, 4]]))
    n = 20_000
    for x in ORDINARY.tolist():
        draws = torch.randint(2**31, (n,), generator=torch.Generator().manual_seed(x))
        drawn = clusters.draw(torch.full((n,), x), [n], [x], draws)
        assert set(drawn.tolist()) == set(ORDINARY.tolist()) - {x}
        by_cluster = brute_probabilities(clusters.counts.numpy(), x, 2.0)
        for t in set(ORDINARY.tolist()) - {x}:
            others = [o for o in ORDINARY.tolist() if CLUSTER[o] == CLUSTER[t] and o != x]
            expected = by_cluster[CLUSTER[t]] / len(others)
            assert (drawn == t).float().mean().item() == pytest.approx(expected, abs=4.5 * (0.25 / n) ** 0.5)


def test_duplicates_count_as_often_as_they_are() -> None:
    clusters = Clusters(CLUSTER, ORDINARY, beta=2.0)
    original, seen = torch.tensor([2, 3, 2, 7, 5, 5]), torch.tensor([5, 5, 5, 7, 2, 2])
    clusters.count(original, seen, torch.tensor([True, True, True, False, True, False]))
    expected = np.ones((4, 4), int)
    expected[1, 3] += 3
    expected[0, 0] -= 1
    assert clusters.counts.tolist() == expected.tolist()  # [3, 1] was wrong once and right once


@pytest.mark.parametrize("only", [False, True])
def test_what_is_counted(only: bool, tiny_tokenizer: Any, tmp_path: Path) -> None:
    path = write_clusters(tmp_path, len(tiny_tokenizer))
    flags = {"clusters_filename": str(path), "probability": 0.4, "update_only_on_predictions": only}
    task, text = task_of("cluster_random_token_detection", **flags), TextEncoder(tiny_tokenizer, 64)
    clusters = task.make_beside(torch.nn.Identity(), None, tiny_tokenizer)
    assert isinstance(clusters, Clusters)
    batch = task.corrupt(clusters, batch_of(task, text, [0, 1, 2, 3]) | {"weight": 1.0})
    labels = detection_labels(batch)
    assert (labels[batch["detection_draws"] != IGNORED] == 1).all()  # every draw is another token
    assert (labels[batch["detection_draws"] == IGNORED] != 1).all()
    logits = torch.randn(labels.shape, generator=torch.Generator().manual_seed(0))
    task.update(clusters, logits, batch | {"weight": 0.0})
    assert (clusters.counts == 1).all()
    task.update(clusters, logits, batch)
    expected = torch.ones_like(clusters.counts)
    for original, seen, label, logit in zip(
        *(x.flatten().tolist() for x in (batch["detection_originals"], batch["inputs"]["input_ids"], labels, logits)),
        strict=True,
    ):
        if label == 1 or (label == 0 and not only):
            wrong = (logit > 0) != (label == 1)
            expected[original % 5, seen % 5] += 1 if wrong else -1
    assert torch.equal(clusters.counts, expected)
    assert (expected != 1).any()


def write_clusters(folder: Path, n: int) -> Path:
    path = folder / "clusters.txt"
    path.write_text("".join(f"{i % 5}\n" for i in range(n)))
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("0\n1\nx\n", "line 3: a cluster is a whole number"),
        ("0\n-1\n", "line 2: a cluster is"),
        ("0\n99\n", "line 2: a cluster is"),
        ("", "is empty"),
        ("0\n1\n0\n", "3 clusters' numbers for"),
    ],
)
def test_files_that_are_no_clusters(content: str, message: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "clusters.txt"
    path.write_text(content)
    task = task_of("cluster_random_token_detection", clusters_filename=str(path))
    with pytest.raises(InputError, match=message):
        task.make_beside(torch.nn.Identity(), None, tiny_tokenizer)


def test_no_file_of_clusters(tiny_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--clusters_filename is missing"):
        task_of("cluster_random_token_detection").make_beside(torch.nn.Identity(), None, tiny_tokenizer)
    with pytest.raises(InputError, match="cannot be read"):
        read_clusters(tmp_path / "none.txt")
    (tmp_path / CLUSTERS).write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(InputError, match="is damaged"):
        task_of("cluster_random_token_detection").make_beside(torch.nn.Identity(), str(tmp_path), tiny_tokenizer)


# ---- whole runs


def run(tmp_path: Path, tokenizer: Any, config: Any, **flags: Any) -> dict[str, Any]:
    config.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return train(**({
        "pipeline": "random_token_detection", "name": "run", "output_dir": str(tmp_path), "batch_size": 5,
        "train_dataset": [str(data)], "pre_trained_config": str(tmp_path / "model"), "valid_dataset": str(data),
        "max_epochs": 15, "learning_rate": 1e-2, "max_sequence_length": 32, "probability": 0.3, "accelerator": "cpu",
    } | flags))  # fmt: skip


@pytest.mark.parametrize("flags", [{}, {"packing": True, "whole_word_detection": True}], ids=str)
def test_a_run_learns_to_detect(flags: dict[str, Any], tiny_tokenizer: Any, make_config: Any, tmp_path: Path) -> None:
    results = run(tmp_path, tiny_tokenizer, make_config("bert", len(tiny_tokenizer)), **flags)
    assert results["monitor"] == "valid/random_token_detection/f1"
    assert results["valid"]["random_token_detection/f1"] > 0.5
    transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "pre_trained_models" / "run" / "best")


def test_counts_are_kept_with_the_model(tiny_tokenizer: Any, make_config: Any, tmp_path: Path) -> None:
    path = write_clusters(tmp_path, len(tiny_tokenizer))
    flags = {"pipeline": "cluster_random_token_detection", "clusters_filename": str(path), "max_epochs": 3}
    run(tmp_path, tiny_tokenizer, make_config("bert", len(tiny_tokenizer)), **flags)
    best = tmp_path / "pre_trained_models" / "run" / "best"
    with np.load(best / CLUSTERS) as saved:
        counts = saved["counts"]
    assert (counts != 1).any()
    state = torch.load(tmp_path / "checkpoints" / "run" / "best.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(state["heads.beside.cluster_random_token_detection.counts"], torch.from_numpy(counts))
    path.unlink()  # the model's folder knows
    found = predict(pre_trained_model=str(best), predict_dataset=str(tmp_path / "data.jsonl"), accelerator="cpu")
    written = (tmp_path / "predictions" / "run" / "valid.jsonl").read_text().splitlines()
    assert [row["replaced"] for row in found] == [json.loads(line)["replaced"] for line in written]
    path.write_text("".join(f"{i % 2}\n" for i in range(len(tiny_tokenizer))))
    flags = {"pre_trained_model": str(best), "clusters_filename": str(path), "name": "other", "max_epochs": 1}
    flags |= {"pipeline": "cluster_random_token_detection", "output_dir": str(tmp_path), "accelerator": "cpu"}
    flags |= {"max_sequence_length": 32}
    with pytest.raises(InputError, match="has other clusters than the model was trained with"):
        train(train_dataset=[str(tmp_path / "data.jsonl")], **flags)


def test_two_processes_count_what_one_counts(tiny_tokenizer: Any, make_config: Any, tmp_path: Path) -> None:
    path = write_clusters(tmp_path, len(tiny_tokenizer))
    flags = {"pipeline": "cluster_random_token_detection", "clusters_filename": str(path), "max_epochs": 2}
    flags |= {"learning_rate": 1e-12, "num_sanity_val_steps": 0}  # so that rounding moves no answer
    counts = []
    for name, more in (("one", {"batch_size": 10}), ("two", {"batch_size": 5, "devices": "2"})):
        run(tmp_path, tiny_tokenizer, make_config("bert", len(tiny_tokenizer)), name=name, **flags, **more)
        state = torch.load(tmp_path / "checkpoints" / name / "last.ckpt", weights_only=True)["state_dict"]
        counts.append(state["heads.beside.cluster_random_token_detection.counts"])
    assert torch.equal(*counts)
    assert (counts[0] != 1).any()


def test_with_another_task_it_corrupts_the_training_alone(tiny_tokenizer: Any, make_config: Any) -> None:
    args = make_train_args(pipeline="random_token_detection+seq_class")
    tasks = make_tasks(args.pipeline, args)
    assert [task.name for task in tasks] == ["seq_class", "random_token_detection"]
    with pytest.raises(InputError, match="two tasks of it corrupt"):
        make_tasks("masked_lm+random_token_detection", args)
    text = TextEncoder(tiny_tokenizer, 64)
    rows = [{"text": "fox", "label": "a"}, {"text": "dog", "label": "b"}]
    tasks[0].learn(rows)
    features = encode_rows(tasks, rows, text, "train")
    clean = Collate(tasks, tiny_tokenizer)([features[0], features[1]])
    assert "detection_originals" not in clean
    assert set(clean["sizes"]) == set()
    corrupt = Collate(tasks, tiny_tokenizer)([Prepare(tasks, text, 0)(features[i], 0) for i in range(2)])
    assert corrupt["sizes"] == {"random_token_detection": 2.0}
    config = make_config("bert", len(tiny_tokenizer))
    heads = Heads({task.name: task.make_model(None, type(config).from_dict(config.to_dict())) for task in tasks})
    assert tasks[1].logits(heads.models["random_token_detection"], heads(corrupt["inputs"]), corrupt).shape == (2, 3)
