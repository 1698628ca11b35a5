"""Tags of words: alignment with pieces, words that leave none, entities, and whole runs with every architecture."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sklearn.metrics import f1_score

from funneltfm import metrics
from funneltfm.data.features import Features
from funneltfm.data.text import TextEncoder, get_text_tokenizer
from funneltfm.errors import InputError
from funneltfm.tasks.base import Collate, Record, encode_rows
from funneltfm.tasks.token_class import TokenClass, label_scheme
from funneltfm.training.train import train
from funneltfm.training.train_config import make_train_args

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
ZERO_WIDTH = "\u200b"  # BERT's normaliser leaves nothing of it
ROWS: list[dict[str, Any]] = [
    {"id": "a", "words": ["Mary", "lives", "in", "New", "York", "."], "labels": ["B-P", "O", "O", "B-L", "I-L", "O"]},
    {"id": "b", "words": ["unbelievable", ZERO_WIDTH, "fox"], "labels": ["O", "B-L", "B-P"]},
    {"id": "c", "words": [], "labels": []},
    {"id": "d", "words": ["", "Acme", ""], "labels": ["O", "B-L", "I-L"]},
]
KINDS = ("word_piece", "byte_level", "unigram")
MODEL_TYPES = (
    *("bert", "roberta", "deberta", "deberta-v2", "electra", "albert", "distilbert", "camembert", "xlm-roberta"),
    *("modernbert", "funnel_tfm"),
)


@pytest.fixture(scope="module")
def spaced(tokenizers: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All kinds, loaded for words."""
    made = {}
    for kind, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(folder := tmp_path_factory.mktemp(kind))
        made[kind] = get_text_tokenizer(str(folder), words=True)
    return made


def task_of(rows: list[dict[str, Any]] = ROWS, **flags: Any) -> TokenClass:
    task = TokenClass(make_train_args(pipeline="token_class", **flags))
    task.learn(rows)
    return task


def features_of(task: TokenClass, tokenizer: Any, rows: list[dict[str, Any]] = ROWS, length: int = 64) -> Features:
    return encode_rows([task], rows, TextEncoder(tokenizer, length), "dev")


# ---- alignment


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_on_first_pieces(kind: str, spaced: dict[str, Any]) -> None:
    task = task_of()
    features = features_of(task, spaced[kind])
    assert task.labels.names == ["B-L", "B-P", "I-L", "O"]
    for i, row in enumerate(ROWS):
        own = spaced[kind](row["words"], is_split_into_words=True)
        assert features[i]["input_ids"].tolist() == own["input_ids"]
        expected, before = [], None
        for word in own.word_ids(0):
            first = word is not None and word != before
            expected.append(task.labels.names.index(row["labels"][word]) if first else -100)
            before = word
        assert features[i]["token_class_labels"].tolist() == expected
        assert [task.labels.names[c] for c in features[i]["token_class_words"]] == row["labels"]
    pieces = [label for label in features[1]["token_class_labels"] if label != -100]
    assert len(features[1]["input_ids"]) - 2 > len(pieces)  # of some words several


def records_of(task: TokenClass, features: Features, tokenizer: Any, said: Any) -> list[Record]:
    """Records of logits that say `said(example, word)` at the first piece of every word, and nonsense elsewhere."""
    n = len(task.labels)
    records: list[Record] = []
    for i in range(len(features)):
        batch = Collate([task], tokenizer)([features[i]])
        logits = torch.randn(*batch["inputs"]["input_ids"].shape, n)
        seen = set()
        for place, word in enumerate(batch["token_class_word_ids"][0].tolist()):
            if word >= 0 and word not in seen:
                seen.add(word)
                logits[0, place] = torch.nn.functional.one_hot(torch.tensor(said(i, word)), n) * 9.0
        records += task.record(logits, batch)
    return records


def test_words_without_a_piece_are_scored_as_outside(spaced: dict[str, Any]) -> None:
    """They are not dropped: with all others right, an entity of such words is missed, and O is right."""
    task = task_of()
    tokenizer = spaced["word_piece"]
    features = features_of(task, tokenizer)
    gold = [[task.labels.names.index(label) for label in row["labels"]] for row in ROWS]
    records = records_of(task, features, tokenizer, lambda i, word: gold[i][word])
    assert [len(record["words"]) for record in records] == [6, 2, 0, 1]
    scores = task.score(records, features, ROWS)
    assert scores["accuracy"] == pytest.approx(10 / 12)  # zero width B-L, and the last I-L
    assert scores["entity_precision"] == pytest.approx(3 / 4)  # L, P, P; Acme alone is not Acme + ""
    assert scores["entity_recall"] == pytest.approx(3 / 5)
    rows = list(task.predict(records, features, ROWS))
    assert [row["prediction"] for row in rows] == [
        ["B-P", "O", "O", "B-L", "I-L", "O"], ["O", "O", "B-P"], [], ["O", "B-L", "O"],
    ]  # fmt: skip
    assert rows[1]["scores"][1] is None
    assert rows[0]["scores"][0] == pytest.approx(np.exp(9) / (np.exp(9) + 3), abs=1e-5)
    assert [(row["id"], row["words"], row["label"]) for row in rows] == [
        (row["id"], row["words"], row["labels"]) for row in ROWS
    ]
    json.dumps(rows)


def test_without_entities_such_words_are_wrong(spaced: dict[str, Any]) -> None:
    rows = [{"words": ["the", ZERO_WIDTH, "fox"], "labels": ["DET", "NOUN", "NOUN"]}]
    task = task_of(rows)
    assert (task.scheme, task.main_metric) == ("none", "accuracy")
    features = features_of(task, spaced["word_piece"], rows)
    records = records_of(task, features, spaced["word_piece"], lambda i, word: [0, 1, 1][word])
    scores = task.score(records, features, rows)
    assert scores["accuracy"] == pytest.approx(2 / 3)
    assert scores["accuracy_class_1"] == 0.5
    assert scores["f1_class_1"] == pytest.approx(2 / 3)
    assert not [name for name in scores if name.startswith("entity")]
    (row,) = task.predict(records, features, rows)
    assert row["prediction"] == ["DET", None, "NOUN"]


def test_words_that_are_cut_off_count(spaced: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    task = task_of()
    tokenizer = spaced["word_piece"]
    with caplog.at_level(logging.WARNING):
        features = features_of(task, tokenizer, ROWS[:1], length=5)
    assert "dev: 3 of 6 words are beyond 5 tokens" in caplog.text
    assert len(features[0]["input_ids"]) == 5
    gold = [task.labels.names.index(label) for label in ROWS[0]["labels"]]
    records = records_of(task, features, tokenizer, lambda i, word: gold[word])
    scores = task.score(records, features, ROWS[:1])
    assert scores["accuracy"] == pytest.approx(4 / 6)
    assert (scores["entity_precision"], scores["entity_recall"]) == (1.0, 0.5)
    caplog.clear()
    features_of(task, tokenizer, ROWS[:1])
    assert not caplog.text


def test_left_padding(spaced: dict[str, Any]) -> None:
    task, tokenizer = task_of(), spaced["word_piece"]
    features = features_of(task, tokenizer)
    logits = {i: torch.randn(len(features[i]["input_ids"]), 4) for i in (0, 1)}
    outcomes = []
    for side in ("right", "left"):
        tokenizer.padding_side = side
        batch = Collate([task], tokenizer, 20)([features[0], features[1]])
        padded = torch.full((2, 20, 4), 50.0)
        for i in (0, 1):
            padded[i, batch["inputs"]["attention_mask"][i].bool()] = logits[i]
        outcomes.append((task.loss(padded, batch).item(), [r["pred"].tolist() for r in task.record(padded, batch)]))
    tokenizer.padding_side = "right"
    assert outcomes[0] == outcomes[1]
    assert np.isfinite(outcomes[0][0])


def test_loss_and_scores_of_random_predictions(spaced: dict[str, Any]) -> None:
    """Loss as torch has it over all words seen; scores as scikit-learn and nervaluate have them over all words."""
    tokenizer = spaced["byte_level"]
    for flags in ({}, {"label_weights": (1.0, 2.0, 0.5, 0.25), "label_smoothing": 0.1}):
        task = task_of(**flags)  # type: ignore[arg-type]
        features = features_of(task, tokenizer)
        batch = Collate([task], tokenizer)([features[i] for i in range(4)])
        logits = torch.randn(*batch["inputs"]["input_ids"].shape, 4, generator=torch.Generator().manual_seed(0))
        weight = None if not flags else torch.tensor(task.args.label_weights)
        expected = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1),
            batch["token_class_labels"].flatten(),
            weight,
            label_smoothing=task.args.label_smoothing,
        )
        torch.testing.assert_close(task.loss(logits, batch), expected)
        records = task.record(logits, batch)
        scores = task.score(records, features, ROWS)
        assert scores["loss"] == pytest.approx(expected.item(), rel=1e-6)
        labels = batch["token_class_labels"]
        chosen = labels != -100
        assert task.size(batch) == (chosen.sum() if weight is None else weight[labels[chosen]].sum())
        rows = list(task.predict(records, features, ROWS))
        pred, true = ([label for row in rows for label in row[side]] for side in ("prediction", "label"))
        assert scores["f1"] == pytest.approx(f1_score(true, pred, labels=task.labels.names, average="macro",
                                                      zero_division=0.0), abs=1e-12)  # fmt: skip
        assert scores["accuracy"] == pytest.approx(np.mean([p == t for p, t in zip(pred, true, strict=True)]))
    only_padding = {"token_class_labels": torch.full((2, 3), -100)}
    assert task.loss(torch.randn(2, 3, 4), only_padding).item() == 0
    assert task.train_scores(torch.randn(2, 3, 4), only_padding) == {}


def test_predictions_of_some_examples_are_of_their_rows(spaced: dict[str, Any]) -> None:
    task, tokenizer = task_of(), spaced["word_piece"]
    some = features_of(task, tokenizer).take([3, 0])
    records = records_of(task, some, tokenizer, lambda i, word: 3)
    assert [row["id"] for row in task.predict(records, some, ROWS)] == ["d", "a"]
    scores = task.score(records, some, ROWS)
    assert scores["accuracy"] == pytest.approx((1 + 3) / 9)


def test_prediction_without_labels(spaced: dict[str, Any]) -> None:
    first = task_of()
    task = TokenClass(first.args)
    task.load_state(json.loads(json.dumps(first.state())))
    assert (task.labels.names, task.scheme) == (first.labels.names, "bio")
    rows = [{"words": ["Acme", "fox"]}]
    features = features_of(task, spaced["unigram"], rows)
    batch = Collate([task], spaced["unigram"])([features[0]])
    assert "token_class_labels" not in batch
    records = task.record(torch.zeros(*batch["inputs"]["input_ids"].shape, 4), batch)
    (row,) = task.predict(records, features, rows)
    assert row.keys() == {"row", "words", "prediction", "scores"}


# ---- labels


@pytest.mark.parametrize(
    ("labels", "scheme"),
    [
        (["O", "B-PER", "I-PER"], "bio"),
        (["O", "B-PER"], "bio"),
        (["I-PER", "I-LOC", "O"], "iob1"),  # WikiGold
        (["B-PER", "I-PER", "E-PER", "S-PER", "O"], "bioes"),
        (["B-PER", "I-PER", "L-PER", "U-PER", "O"], "bioes"),
        (["S-PER", "O"], "bioes"),
        (["B-a-b", "O"], "bio"),
        (["NOUN", "VERB", "O"], "none"),
        (["B", "I", "O"], "none"),  # no types
        (["B-PER", "O", "X"], "none"),
        (["B-", "O"], "none"),
        (["-LRB-", "NN"], "none"),
        (["O"], "none"),
        (["0", "1"], "none"),
    ],
)
def test_scheme_by_its_labels(labels: list[str], scheme: str) -> None:
    assert label_scheme(labels) == scheme
    assert label_scheme(labels, "none") == "none"
    if scheme != "none":
        assert label_scheme(labels, scheme) == scheme


def test_labels_of_another_scheme() -> None:
    with pytest.raises(InputError, match=r"--label_scheme=bio has the labels O, and B-TYPE, I-TYPE; .* E-X, NN"):
        label_scheme(["B-X", "E-X", "NN", "O"], "bio")
    assert task_of(label_scheme="none").main_metric == "accuracy"
    with pytest.raises(InputError, match="--label_scheme=bioes"):
        task_of([{"words": ["a"], "labels": ["NN"]}], label_scheme="bioes")


def test_labels_by_number(spaced: dict[str, Any]) -> None:
    rows = [{"words": ["the", "fox"], "labels": [0, 2]}, {"words": ["dog"], "labels": [1]}]
    task = task_of(rows)
    assert task.labels.names == [0, 1, 2]
    assert features_of(task, spaced["word_piece"], rows).ragged["token_class_words"][0].tolist() == [0, 2, 1]
    assert task_of(rows, num_labels=5).labels.names == [0, 1, 2, 3, 4]


def test_numbers_whose_names_the_source_knows(spaced: dict[str, Any]) -> None:
    class Rows(list):
        def class_names(self, column: str) -> list[str]:
            return ["O", "B-PER", "I-PER", "B-LOC"]

    rows = Rows([{"words": ["Mary", "lives"], "labels": [1, 0]}])
    task = task_of(rows)
    assert (task.labels.names, task.scheme) == (["O", "B-PER", "I-PER", "B-LOC"], "bio")
    assert features_of(task, spaced["word_piece"], rows).ragged["token_class_words"][0].tolist() == [1, 0]
    named = [{"words": ["Mary"], "labels": ["B-LOC"]}]  # a file beside it
    assert features_of(task, spaced["word_piece"], named).ragged["token_class_words"][0].tolist() == [3]


def test_a_set_of_the_datasets_library(tiny_tokenizer: Any, make_config: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    tag, word = datasets.ClassLabel(names=["O", "B-LOC", "I-LOC"]), datasets.Value("string")
    features = {"words": datasets.List(word), "labels": datasets.List(tag)}
    rows = {"words": [["in", "New", "York"], ["Mary"]], "labels": [[0, 1, 2], [0]]}
    datasets.Dataset.from_dict(rows, datasets.Features(features)).save_to_disk(tmp_path / "set")
    make_config("bert", len(tiny_tokenizer)).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    results = run(tmp_path, str(tmp_path / "set"))
    assert results["monitor"] == "valid/token_class/entity_f1"
    assert [row["label"] for row in predictions(tmp_path, "valid")] == [["O", "B-LOC", "I-LOC"], ["O"]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"words": "the fox", "labels": ["O"]}, "dev, row 2: words must be a list of words; got 'the fox'"),
        ({"words": ["a", 1], "labels": ["O", "O"]}, "must be a list of words"),
        ({"tokens": ["a"], "labels": ["O"]}, "words must be a list of words; got columns tokens, labels"),
        ({"words": ["a", "b"], "labels": ["O"]}, "dev, row 2: 2 words in words, but 1 labels in labels"),
        ({"words": ["a"], "labels": "O"}, "labels must be a list, a label for each word; got 'O'"),
        ({"words": ["a", "b"], "labels": ["O", "B-X"]}, "dev, row 2, word 2: the label 'B-X' is none of the 4 classes"),
        ({"words": ["a"], "labels": [None]}, "row 2, word 1: the label None is none"),
        ({"words": ["a"]}, "dev, row 2: no labels, but other rows have one"),
    ],
)
def test_messages(row: dict[str, Any], message: str, spaced: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=message):
        features_of(task_of(), spaced["word_piece"], [ROWS[0], row])


def test_other_columns(spaced: dict[str, Any]) -> None:
    rows = [{"form": ["the", "fox"], "upos": ["DET", "NOUN"]}]
    for flag in ({"input_column": "form"}, {"input_columns": ["form"]}):
        task = task_of(rows, label_column="upos", **flag)
        assert len(features_of(task, spaced["word_piece"], rows)) == 1
    with pytest.raises(InputError, match=r"no labels in labels\. Name their column"):
        task_of(rows, input_column="form")


def test_no_words(spaced: dict[str, Any]) -> None:
    task, tokenizer = task_of(), spaced["word_piece"]
    features = features_of(task, tokenizer, [ROWS[2]])
    with pytest.raises(InputError, match="there is no word in the data"):
        task.score(records_of(task, features, tokenizer, lambda i, word: 0), features, [ROWS[2]])


# ---- whole runs


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(folder: Path, data: str, pipeline: str = "token_class", **flags: Any) -> dict[str, Any]:
    return train(**({
        "pipeline": pipeline, "name": "run", "output_dir": str(folder), "pre_trained_config": str(folder / "model"),
        "train_dataset": [data], "valid_dataset": data, "predict_dataset": data, "batch_size": 4, "max_steps": 2,
        "learning_rate": 1e-2, "max_sequence_length": 32,
    } | flags))  # fmt: skip


def predictions(folder: Path, stage: str) -> list[dict[str, Any]]:
    path = folder / "predictions" / "run" / f"{stage}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_architecture(model_type: str, tokenizers: dict[str, Any], make_config: Any, tmp_path: Path) -> None:
    """Trains, is scored, predicts, and is loaded again by the Auto classes with the same answers."""
    kinds = {"roberta": "byte_level", "deberta": "byte_level", "modernbert": "byte_level"}
    kinds |= dict.fromkeys(("camembert", "xlm-roberta", "albert", "deberta-v2"), "unigram")
    tokenizer = tokenizers[kinds.get(model_type, "word_piece")]
    make_config(model_type, len(tokenizer), tokenizer.pad_token_id).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    results = run(tmp_path, write(tmp_path / "d.jsonl", ROWS))
    assert results["monitor"] == "valid/token_class/entity_f1"
    assert {"token_class/entity_f1_L", "token_class/accuracy_class_3"} <= results["valid"].keys()
    rows = predictions(tmp_path, "predict")
    best = tmp_path / "pre_trained_models" / "run" / "best"
    model = transformers.AutoModelForTokenClassification.from_pretrained(best).eval()
    again = transformers.AutoTokenizer.from_pretrained(best)
    assert model.config.id2label == {0: "B-L", 1: "B-P", 2: "I-L", 3: "O"}
    encoded = again(ROWS[0]["words"], is_split_into_words=True, return_tensors="pt")
    logits = model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits[0]
    words = encoded.word_ids(0)
    first = [words.index(word) for word in range(6)]
    assert rows[0]["prediction"] == [model.config.id2label[int(i)] for i in logits[first].argmax(-1)]
    assert rows[0]["scores"] == pytest.approx(logits.softmax(-1).max(-1).values[first].tolist(), abs=1e-4)


def conll(path: Path) -> list[dict[str, Any]]:
    """Word and tag, a blank line between sentences; lines that mark documents are none."""
    blocks = path.read_text(encoding="utf-8").split("\n\n")
    blocks = [block for block in blocks if block.strip() and not block.strip().startswith("-DOCSTART-")]
    pairs = [[line.split() for line in block.strip().splitlines()] for block in blocks]
    return [{"words": [pair[0] for pair in block], "labels": [pair[-1] for pair in block]} for block in pairs]


def conllu(path: Path) -> list[dict[str, Any]]:
    blocks = [block for block in path.read_text(encoding="utf-8").split("\n\n") if block.strip()]
    lines = [[line.split("\t") for line in b.splitlines() if line.partition("\t")[0].isdigit()] for b in blocks]
    return [{"words": [cells[1] for cells in block], "labels": [cells[3] for cells in block]} for block in lines]


def losses_of(folder: Path) -> list[float]:
    table = [line.split(",") for line in (folder / "runs" / "run" / "metrics.csv").read_text().splitlines()]
    place = table[0].index("train/loss")
    return [float(row[place]) for row in table[1:] if row[place]]


@pytest.mark.parametrize("corpus", ["WikiGold", "UD_English-LinES"])
def test_real_data(corpus: str, make_config: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """The loss falls; scores are those of the written predictions by other implementations."""
    vocabulary = SHARED / "tokenizers" / "bert-base-uncased" / "vocab.txt"
    path = SHARED / corpus / ("wikigold.conll.txt" if corpus == "WikiGold" else "en_lines-ud-dev.conllu")
    if not path.is_file() or not vocabulary.is_file():
        pytest.skip(f"no {path} in ../shared/data")
    step = 12 if corpus == "WikiGold" else 6
    rows = (conll if corpus == "WikiGold" else conllu)(path)[::step]
    tokenizer = get_text_tokenizer(str(vocabulary))
    make_config("bert", len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags: dict[str, Any] = {"max_steps": 100, "batch_size": 8, "log_every_n_steps": 1, "max_sequence_length": 64}
    flags |= {f"{stage}_shard_dataset": step for stage in ("train", "valid", "predict")}
    results = run(tmp_path, str(path), **flags, **({} if corpus == "WikiGold" else {"label_column": "upos"}))
    losses = losses_of(tmp_path)
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])
    said = predictions(tmp_path, "valid")
    assert [row["words"] for row in said] == [row["words"] for row in rows]
    assert [row["label"] for row in said] == [row["labels"] for row in rows]
    pred, true = ([row[side] for row in said] for side in ("prediction", "label"))
    scores = {name.removeprefix("token_class/"): value for name, value in results["valid"].items()}
    flat = [[label or "" for sentence in side for label in sentence] for side in (pred, true)]
    assert scores["accuracy"] == pytest.approx(np.mean(np.array(flat[0]) == np.array(flat[1])), abs=1e-12)
    names = sorted({label for row in rows for label in row["labels"]})
    macro = f1_score(flat[1], flat[0], labels=names, average="macro", zero_division=0.0)
    assert scores["f1"] == pytest.approx(macro, abs=1e-9)
    if corpus == "WikiGold":
        nervaluate = pytest.importorskip("nervaluate")
        types = sorted({name[2:] for name in names if name != "O"})
        result = nervaluate.Evaluator(true, pred, tags=types, loader="list").evaluate()
        for suffix, strict in [("", result["overall"]["strict"]),
                               *((f"_{t}", result["entities"][t]["strict"]) for t in result["entities"])]:  # fmt: skip
            for name in ("precision", "recall", "f1"):
                assert scores[f"entity_{name}{suffix}"] == pytest.approx(getattr(strict, name), abs=1e-9)
        assert scores["entity_f1"] > 0
        assert math.isclose(metrics.by_entity(pred, true, types)["entity_f1"], scores["entity_f1"], abs_tol=1e-12)
    else:
        assert results["monitor"] == "valid/token_class/accuracy"
        assert scores["accuracy"] > 0.2
