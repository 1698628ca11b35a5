"""Sentence order: what is swapped and when, and whole runs, alone and with masked words."""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from funneltfm.data.text import TextEncoder
from funneltfm.errors import InputError
from funneltfm.tasks.base import IGNORED, Collate, Prepare, encode_rows, make_tasks
from funneltfm.tasks.sentence_order import NAMES, SentenceOrder
from funneltfm.training.train import load_splits, predict, train
from funneltfm.training.train_config import make_train_args

# The last sentence of a document has London; so order can be learned.
ROWS = [
    {"text": f"the {a} {b} fox\nMary lives in New York\nshe {c} London", "id": f"d{a}{b}{c}"}
    for a in ("quick", "lazy", "brown")
    for b in ("quick", "lazy", "brown", "")
    for c in ("works", "lives", "jumps")
] + [{"text": "a fox", "id": "alone"}]


def task_of(**flags: Any) -> SentenceOrder:
    return SentenceOrder(make_train_args(pipeline="sentence_order", sentence_pairs=True, **flags))


@pytest.mark.parametrize("kind", ["word_piece", "byte_level"])
def test_half_of_the_pairs_are_swapped(kind: str, tokenizers: dict[str, Any]) -> None:
    """Others in every epoch and with every seed; a segment that is alone has no label."""
    task, text = task_of(), TextEncoder(tokenizers[kind], 64)
    features = encode_rows([task], ROWS, text, "rows")
    labels = {}
    for seed, epoch in ((0, -1), (0, 0), (0, 1), (1, 0)):
        prepare = Prepare([task], text, seed)
        made = [prepare(features[i], epoch) for i in range(len(features))]
        labels[seed, epoch] = [example["sentence_order_labels"] for example in made]
        for i, example in enumerate(made):
            halves = _halves(features[i], text)
            assert _halves(example, text) == (halves[::-1] if example["sentence_order_labels"] == 1 else halves)
            assert len(example["input_ids"]) == len(features[i]["input_ids"])
            of_words = np.asarray(example["word_ids"]) >= 0  # they have moved with their tokens
            assert (of_words == ~np.isin(example["input_ids"], text.special_ids)).all()
            if "token_type_ids" in example:
                b = len(text.layout.prefix) + example["first_length"] + len(text.layout.between)
                pair = example["first_length"] > 0
                assert set(example["token_type_ids"][b:].tolist()) == ({1} if pair else {0})
                assert not example["token_type_ids"][: b if pair else None].any()
    assert all(drawn[-1] == IGNORED and drawn.count(IGNORED) == 1 for drawn in labels.values())
    assert all(10 <= drawn.count(1) <= 26 for drawn in labels.values())  # of 36
    assert len({tuple(drawn) for drawn in labels.values()}) == 4
    assert labels[0, 0] == [Prepare([task], text, 0)(features[i], 0)["sentence_order_labels"] for i in range(37)]


def _halves(example: dict[str, Any], text: TextEncoder) -> list[str]:
    """The texts of the two segments; of one alone it and nothing."""
    layout, ids = text.layout, list(example["input_ids"])
    start, first = len(layout.prefix), int(example["first_length"])
    if not first:
        return [text.tokenizer.decode(ids, skip_special_tokens=True), ""]
    between = ids[start + first : start + first + len(layout.between)]
    assert between == layout.between
    rest = ids[start + first + len(between) : len(ids) - len(layout.suffix)]
    return [text.tokenizer.decode(part).strip() for part in (ids[start : start + first], rest)]


def test_loss_and_scores_are_of_pairs_alone(tokenizers: dict[str, Any]) -> None:
    task, text = task_of(), TextEncoder(tokenizers["word_piece"], 64)
    features = encode_rows([task], ROWS[-3:], text, "rows")
    prepare = Prepare([task], text, 0)
    batch = Collate([task], text.tokenizer)([prepare(features[i], 0) for i in range(3)])
    labels = batch["sentence_order_labels"]
    assert labels[2] == IGNORED
    assert batch["sizes"] == {"sentence_order": 2.0}
    logits = torch.tensor([[0.0, 3.0], [2.0, 1.0], [5.0, -5.0]])
    by_hand = -logits.log_softmax(1)[[0, 1], labels[:2]]
    assert task.loss(logits, batch).item() == pytest.approx(by_hand.mean().item())
    records = task.record(logits, batch)
    right = [labels[0] == 1, labels[1] == 0]
    assert task.score(records, features, ROWS[-3:]) == pytest.approx(
        {"accuracy": np.mean(right), "loss": by_hand.mean().item()}
    )
    assert task.train_scores(logits, batch) == {"accuracy": np.mean(right)}
    said = list(task.predict(records, features, ROWS[-3:]))
    assert said[0] == {
        "id": ROWS[-3]["id"], "row": 1, "prediction": "swapped", "score": round(float(logits[0].softmax(0)[1]), 6),
        "label": NAMES[int(labels[0])],
    }  # fmt: skip
    assert said[2] == {"id": "alone", "row": 3, "prediction": None, "score": None, "label": None}
    only = {"sentence_order_labels": torch.tensor([IGNORED])}
    assert task.loss(logits[:1], only).item() == 0
    assert task.train_scores(logits[:1], only) == {}
    with pytest.raises(InputError, match="none of 1 examples has two segments"):
        task.score(task.record(logits[:1], only), features, ROWS)


@pytest.mark.parametrize(
    ("pipeline", "flags", "message"),
    [
        ("sentence_order", {}, "give --sentence_pairs too"),
        ("sentence_order", {"probability": 0.3}, "--probability is read by"),
        ("masked_lm+sentence_order", {"packing": True}, "give --sentence_pairs too"),
        ("sentence_order+seq_class", {"sentence_pairs": True}, "but seq_class reads labels of rows"),
        ("masked_lm", {"short_pairs": 0.1}, "--short_pairs needs --sentence_pairs"),
        ("masked_lm", {"short_pairs": 1.1, "sentence_pairs": True}, "short_pairs must be between 0 and 1; got 1.1"),
        ("denoising", {"short_pairs": 0.1}, "--short_pairs is read by masked_lm, sentence_order"),
    ],
)
def test_wrong_flags_are_said(pipeline: str, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_tasks(pipeline, make_train_args(pipeline=pipeline, **flags))


@pytest.mark.parametrize("streaming", [False, True])
def test_data_without_pairs_are_said(streaming: bool, tokenizers: dict[str, Any], tmp_path: Path) -> None:
    """Lines that are rows, each alone; documents of a text file are none such."""
    lines = [text for row in ROWS[:2] for text in row["text"].split("\n")]
    (tmp_path / "alone.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (tmp_path / "text.txt").write_text("\n\n".join(row["text"] for row in ROWS[:2]))
    text = TextEncoder(tokenizers["word_piece"], 64)
    for name, fails in (("alone.jsonl", True), ("text.txt", False)):
        args = make_train_args(
            pipeline="sentence_order", sentence_pairs=True, train_dataset=[str(tmp_path / name)], streaming=streaming,
            max_steps=1,
        )  # fmt: skip
        expected = pytest.raises(InputError, match="two sentences") if fails else contextlib.nullcontext()
        with expected:
            load_splits(args, make_tasks("sentence_order", args), text)


@pytest.mark.parametrize("pipeline", ["sentence_order", "masked_lm+sentence_order", "electra+sentence_order"])
def test_whole_runs(pipeline: str, tokenizers: dict[str, Any], tmp_path: Path) -> None:
    """It learns the order; all losses and scores are there; from kept tokens and a stream; it predicts."""
    tokenizers["word_piece"].save_pretrained(tmp_path / "tokenizer")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    flags: dict[str, Any] = {
        "pipeline": pipeline, "sentence_pairs": True, "model": "bert",
        "pre_trained_tokenizer": str(tmp_path / "tokenizer"),
        "additional_config_kwargs": (
            "hidden_size=32", "num_hidden_layers=1", "num_attention_heads=2", "intermediate_size=64",
            "hidden_dropout_prob=0.0", "attention_probs_dropout_prob=0.0",
        ),
        "train_dataset": (str(data),), "output_dir": str(tmp_path), "accelerator": "cpu", "batch_size": 8,
        "max_sequence_length": 32, "learning_rate": 5e-3, "log_every_n_steps": 5,
    }  # fmt: skip
    steps, least = (60, 0.9) if pipeline == "sentence_order" else (4, 0.2)
    flags |= {"monitor": "valid/sentence_order/accuracy", "valid_dataset": str(data)}
    scores = train(**flags, name="run", max_steps=steps, tokenized_dir=str(tmp_path / "kept"))["valid"]
    assert scores["sentence_order/accuracy"] >= least
    others = {"masked_lm": "masked_lm/perplexity", "electra": "token_detection/f1"}
    assert all(name in scores for task, name in others.items() if task in pipeline)
    (written,) = (tmp_path / "predictions/run").glob("valid-sentence_order.jsonl" if "+" in pipeline else "valid.jsonl")
    said = [json.loads(line) for line in written.read_text().splitlines()]
    right = [row["prediction"] == row["label"] for row in said if row["label"] is not None]
    assert np.mean(right) == pytest.approx(scores["sentence_order/accuracy"])
    best = tmp_path / "pre_trained_models/run/best"
    again = predict(pre_trained_model=str(best), predict_dataset=str(data), accelerator="cpu")
    assert said == [
        {name: value for name, value in row.items() if name != "task"}
        for row in again
        if row.get("task", "sentence_order") == "sentence_order"
    ]
    config = json.loads((best / ("sentence_order" if "+" in pipeline else "") / "config.json").read_text())
    assert config["id2label"] == {"0": "in_order", "1": "swapped"}
    train(**flags, name="stream", max_steps=2, streaming=True, short_pairs=0.5)
