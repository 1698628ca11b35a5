"""Texts of questions and options, ragged choices against single ones, and every model, end to end."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from funneltfm.data.features import Features
from funneltfm.data.text import TextEncoder
from funneltfm.errors import InputError
from funneltfm.tasks.base import Collate, encode_rows, make_tasks
from funneltfm.tasks.multiple_choice import MultipleChoice
from funneltfm.training.train import train
from funneltfm.training.train_config import make_train_args

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
MODELS = (
    *("bert", "roberta", "deberta_v2", "electra", "albert", "distilbert", "camembert", "xlm_roberta", "modernbert"),
    "funnel",
)
ARTICLE = "the cat has the red ball and the dog ran to the house"
ROW = {"id": "a", "article": ARTICLE, "question": "who ran ?", "options": ["cat", "dog", "box"], "answer": "B"}
RACE = {
    "id": "high1.txt",
    "article": ARTICLE,
    "questions": ["who ran ?", "the cat has _ ."],
    "options": [["cat", "dog", "box", "mat"], ["a box", "a mat", "a ball", "a key"]],
    "answers": ["B", "C"],
}


def task_of(**flags: Any) -> MultipleChoice:
    (task,) = make_tasks("multiple_choice", make_train_args(pipeline="multiple_choice", **flags))
    assert isinstance(task, MultipleChoice)
    return task


def texts_of(example: dict[str, Any], tokenizer: Any) -> list[str]:
    parts = np.split(example["input_ids"], np.cumsum(example["parts"])[:-1])
    return [tokenizer.decode(part).replace("[CLS] ", "").removesuffix(" [SEP]") for part in parts]


def encoded(tokenizer: Any, rows: list[dict[str, Any]], length: int = 64, **flags: Any) -> Features:
    return encode_rows([task_of(**flags)], rows, TextEncoder(tokenizer, length), "data")


def made_up(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Which of two to four things is an animal."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        things = rng.permutation(["ball", "key", "box", "mat"])[: 2 + i % 3].tolist()
        right = int(rng.integers(len(things)))
        things[right] = str(rng.choice(["cat", "dog"]))
        row = {"id": f"q{i}", "article": "the house", "question": "who is _ ?", "options": things}
        rows.append(row | {"answer": right})
    return rows


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# ---- texts


def test_a_row_of_race_is_taken_apart(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer("bert")
    features = encoded(tokenizer, [RACE, RACE | {"id": "2"}])
    assert features.plain["row"].tolist() == [0, 0, 1, 1]
    assert features.plain["question"].tolist() == [0, 1, 0, 1]
    assert features.plain["multiple_choice_labels"].tolist() == [1, 2, 1, 2]
    assert texts_of(features[0], tokenizer) == [
        f"{ARTICLE} [SEP] who ran? {option}" for option in ("cat", "dog", "box", "mat")
    ]
    assert texts_of(features[1], tokenizer)[2] == f"{ARTICLE} [SEP] the cat has a ball."


def test_without_an_article(make_tokenizer: Any) -> None:
    tokenizer, row = make_tokenizer("bert"), {name: value for name, value in ROW.items() if name != "article"}
    with pytest.raises(InputError, match=r"data, row 1: article must be a text; got None.*--article_column"):
        encoded(tokenizer, [row])
    (example,) = encoded(tokenizer, [row | {"question": "who _ ?"}], article_column=None)
    assert texts_of(example, tokenizer) == [f"who _? [SEP] {option}" for option in ("cat", "dog", "box")]


def test_only_the_first_blank_is_filled_and_none_where_the_task_has_no_blank(
    make_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, row = make_tokenizer("bert"), ROW | {"question": "the _ has _"}
    assert texts_of(encoded(tokenizer, [row])[0], tokenizer)[0].endswith("[SEP] the cat has _")
    monkeypatch.setattr(MultipleChoice, "blank", None)
    assert texts_of(encoded(tokenizer, [row])[0], tokenizer)[0].endswith("[SEP] the _ has _ cat")


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_what_is_too_long_loses_its_article_then_the_beginning_of_the_question(make_tokenizer: Any, kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    row = ROW | {
        "question": "where is the key of number one two three four ?",
        "options": ["red", "the small blue box"],
    }
    bare = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    article = bare(ARTICLE)
    for length in range(6, 40):
        (example,) = encoded(tokenizer, [row], length)
        texts = np.split(example["input_ids"], np.cumsum(example["parts"])[:-1])
        for ids, option in zip(texts, row["options"], strict=True):
            side = bare(f"{row['question']} {option}")
            room = length - tokenizer.num_special_tokens_to_add(pair=True)
            left = max(1, min(len(article), room - len(side)))
            expected = tokenizer.decode(article[:left]), tokenizer.decode(side[-(room - left) :])
            layout = TextEncoder(tokenizer).layout
            inner = ids.tolist()[len(layout.prefix) : len(ids) - len(layout.suffix)]
            got = inner[:left], inner[left + len(layout.between) :]
            assert (tokenizer.decode(got[0]), tokenizer.decode(got[1])) == expected
            assert len(ids) <= length


def test_what_is_cut_is_counted(make_tokenizer: Any) -> None:
    text = TextEncoder(make_tokenizer("bert"), 16)
    row = {"article": "the house " * 20, "question": "who is _ ?", "options": ["cat", "dog", "ball"], "answer": 0}
    encode_rows([task_of()], [row, row | {"article": "the house"}], text, "data")
    assert (text.cuts.inputs, text.cuts.cut) == (6, 3)
    assert text.cuts.longest > 40


def test_words_of_the_texts_of_an_example_are_different_words(make_tokenizer: Any) -> None:
    """So that masking whole words takes each by itself."""
    (example,) = encoded(make_tokenizer("bert"), [ROW])
    parts = np.split(example["word_ids"], np.cumsum(example["parts"])[:-1])
    words = [set(part[part >= 0].tolist()) for part in parts]
    assert not words[0] & words[1]
    assert not words[1] & words[2]


# ---- answers


@pytest.mark.parametrize(
    ("options", "answer", "expected"),
    [
        (["cat", "dog"], "B", 1),
        (["cat", "dog"], 1, 1),
        (["cat", "dog"], np.int64(0), 0),
        (["cat", "dog"], "0", 0),
        (["cat", "dog"], "dog", 1),
        (["A", "B"], "B", 1),
        (["3", "4", "7"], "3", 0),
        (["cat", "dog"], "C", "'C' is none of the 2 options"),
        (["cat", "dog"], 2, "2 is none of"),
        (["cat", "dog"], -1, "-1 is none of"),
        (["cat", "dog"], True, "True is none of"),
        (["cat", "dog"], "", "'' is none of"),
        (["B", "A"], "B", "'B' is more than one of the 2 options"),
        (["1", "0"], "1", "1 is more than one of"),
        (["cat", "cat"], "cat", "'cat' is more than one of"),
        (["cat"], 0, "at least two texts"),
        ("cat", 0, "at least two texts; got 'cat'"),
        (None, 0, "at least two texts; got None"),
        (["cat", 3], 0, "at least two texts"),
    ],
)
def test_answers(make_tokenizer: Any, options: Any, answer: Any, expected: Any) -> None:
    rows = [ROW, ROW | {"id": "x", "options": options, "answer": answer}]
    if isinstance(expected, int):
        assert encoded(make_tokenizer("bert"), rows).plain["multiple_choice_labels"].tolist() == [1, expected]
        return
    with pytest.raises(InputError, match=f"data, row 2, question x: .*{expected}"):
        encoded(make_tokenizer("bert"), rows)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (RACE | {"answers": ["A"]}, "2 questions, but options for 2 and answers to 1"),
        (RACE | {"options": [["a", "b"]]}, "2 questions, but options for 1"),
        (RACE | {"questions": ["x", None]}, "question high1.txt-2: the question must be a text; got None"),
        (RACE | {"answers": ["A", "E"]}, "question high1.txt-2: the answer 'E' is none of the 4"),
        (ROW | {"question": 3}, "question a: the question must be a text; got 3"),
        (ROW | {"answer": None}, "question a: no answer, but other questions have one"),
        (RACE | {"questions": [], "options": [], "answers": []} | {"article": 3}, "article must be a text; got 3"),
    ],
)
def test_rows_that_cannot_be_used(make_tokenizer: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"data, row 2.*{message}"):
        encoded(make_tokenizer("bert"), [ROW, row])


def test_columns_of_other_names(make_tokenizer: Any) -> None:
    row = {"ctx": ARTICLE, "q": "who ?", "endings": ["cat", "dog"], "label": 1}
    names = {"article_column": "ctx", "question_column": "q", "options_column": "endings", "answer_column": "label"}
    features = encoded(make_tokenizer("bert"), [row], **names)
    assert features.plain["multiple_choice_labels"].tolist() == [1]


# ---- the model


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_choices_score_as_each_question_alone(make_tokenizer: Any, side: str) -> None:
    tokenizer = make_tokenizer("bert")
    tokenizer.padding_side = side
    task = task_of(label_smoothing=0.2)
    features = encode_rows([task], made_up(6), TextEncoder(tokenizer, 32), "data")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=len(tokenizer), **sizes)
    model = transformers.AutoModelForMultipleChoice.from_config(config).eval()
    batch = Collate([task], tokenizer)([features[i] for i in range(6)])
    assert batch["choices"].sum(-1).tolist() == [2, 3, 4, 2, 3, 4]
    logits = task.logits(model, model.bert(**batch["inputs"]), batch)
    loss = task.loss(logits, batch)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    nll = []
    with torch.no_grad():
        for i, start in enumerate((0, 2, 5, 9, 11, 14)):
            k = 2 + i % 3
            rows = {name: value[start : start + k][None] for name, value in batch["inputs"].items()}
            alone = model(**rows).logits[0]  # as the model itself takes them, (1, K, T)
            assert torch.allclose(logits[i, :k], alone, atol=1e-6)
            assert (logits[i, k:] == -torch.inf).all()
            label = int(batch["multiple_choice_labels"][i])
            log_probs = alone.log_softmax(-1)
            nll.append(-0.8 * log_probs[label].item() - 0.2 * log_probs.mean().item())
    assert loss.item() == pytest.approx(np.mean(nll), rel=1e-5)
    records = task.record(logits.detach(), batch)
    scores = task.score(records, features, made_up(6))
    assert scores["loss"] == pytest.approx(np.mean(nll), rel=1e-5)
    right = [int(record["logits"].argmax()) == row["answer"] for record, row in zip(records, made_up(6), strict=True)]
    assert scores["accuracy"] == np.mean(right)
    assert task.train_scores(logits, batch)["accuracy"] == pytest.approx(np.mean(right))


def test_predictions(make_tokenizer: Any) -> None:
    task, rows = task_of(), [RACE, ROW]
    rows = [rows[0], {name: value for name, value in ROW.items() if name != "id"}]
    features = encode_rows([task], rows, TextEncoder(make_tokenizer("bert"), 64), "data")
    logits = [[0.0, 1.0, 2.0, 0.0], [0.0, 0.0, 3.0, 0.0], [1.0, 0.0, -1.0]]
    records = [{"logits": np.array(row, np.float32)} for row in logits]
    said = list(task.predict(records, features, rows))
    assert [(one["id"], one["prediction"], one["text"], one["label"]) for one in said] == [
        ("high1.txt-1", 2, "box", 1),
        ("high1.txt-2", 2, "a ball", 2),
        ("2", 0, "cat", 1),
    ]
    total = sum(math.exp(x) for x in logits[0])
    assert said[0]["scores"] == pytest.approx([math.exp(x) / total for x in logits[0]], abs=1e-6)
    assert len(said[2]["scores"]) == 3
    expected = [
        -math.log(math.exp(row[label]) / sum(map(math.exp, row))) for row, label in zip(logits, (1, 2, 1), strict=True)
    ]
    assert task.score(records, features, rows) == pytest.approx(
        {"accuracy": 1 / 3, "loss": np.mean(expected)}, abs=1e-9
    )


# ---- end to end


def run(tiny_kwargs: Any, folder: Path, model: str, tokenizer: Path, **flags: Any) -> dict[str, Any]:
    flags = {"name": "run", "output_dir": str(folder), "save_total_limit": 0, "max_sequence_length": 32} | flags
    flags = {"pipeline": "multiple_choice", "batch_size": 8, "enable_progress_bar": False} | flags
    return train(
        model=model, pre_trained_tokenizer=str(tokenizer), additional_config_kwargs=tiny_kwargs[model], **flags
    )


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("model", MODELS)
def test_every_model(model: str, tokenizer_folders: dict[str, Path], tiny_kwargs: Any, tmp_path: Path) -> None:
    """A step, an evaluation, a prediction without labels, and a folder that the Auto class reads."""
    rows = made_up(8)
    data = written(tmp_path / "train.jsonl", rows)
    bare = [{name: row[name] for name in row if name != "answer"} for row in rows]
    results = run(
        *(tiny_kwargs, tmp_path, model, tokenizer_folders[model]),
        train_dataset=[data],
        valid_dataset=data,
        max_steps=1,
        predict_dataset=written(tmp_path / "bare.jsonl", bare),
    )
    assert results["monitor"] == "valid/multiple_choice/accuracy"
    assert "predict" not in results
    said = lines_of(tmp_path / "predictions/run/predict.jsonl")
    best = tmp_path / "pre_trained_models/run/best"
    loaded = transformers.AutoModelForMultipleChoice.from_pretrained(best).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(best)
    for row, one in zip(rows, said, strict=True):
        assert one["id"] == row["id"]
        k = len(row["options"])
        sides = [row["question"].replace("_", option) for option in row["options"]]
        inputs = tokenizer([row["article"]] * k, sides, return_tensors="pt", padding=True)
        with torch.no_grad():
            logits = loaded(**{name: value[None] for name, value in inputs.items()}).logits[0]
        assert one["scores"] == pytest.approx(logits.softmax(-1).tolist(), abs=1e-4)


def test_deberta_has_no_such_head(tokenizer_folders: dict[str, Path], tiny_kwargs: Any, tmp_path: Path) -> None:
    data = written(tmp_path / "train.jsonl", made_up(8))
    with pytest.raises(InputError, match="cannot make a model for multiple_choice of deberta"):
        run(tiny_kwargs, tmp_path, "deberta", tokenizer_folders["deberta"], train_dataset=[data], max_steps=1)


def test_it_learns(tokenizer_folders: dict[str, Path], tiny_kwargs: Any, tmp_path: Path) -> None:
    results = run(
        *(tiny_kwargs, tmp_path, "bert", tokenizer_folders["bert"]),
        train_dataset=[written(tmp_path / "train.jsonl", made_up(300, 1))],
        valid_dataset=written(tmp_path / "valid.jsonl", made_up(60, 2)),
        max_epochs=4,
        learning_rate=3e-3,
        log_every_n_steps=10,
    )
    with open(tmp_path / "runs/run/metrics.csv", newline="") as handle:
        losses = [float(row["train/loss"]) for row in csv.DictReader(handle) if row["train/loss"]]
    assert losses[-1] < 0.7 * losses[0]
    said = lines_of(tmp_path / "predictions/run/valid.jsonl")
    assert results["valid"]["multiple_choice/accuracy"] == np.mean([one["prediction"] == one["label"] for one in said])
    assert results["valid"]["multiple_choice/accuracy"] > 0.8


def test_a_mixture_with_masked_lm(tokenizer_folders: dict[str, Path], tiny_kwargs: Any, tmp_path: Path) -> None:
    data = written(tmp_path / "data.jsonl", made_up(12))
    results = run(
        *(tiny_kwargs, tmp_path, "bert", tokenizer_folders["bert"]),
        pipeline="masked_lm+multiple_choice",
        train_dataset=[data],
        valid_dataset=data,
        max_steps=2,
        whole_word_masking=True,
    )
    assert results["monitor"] == "valid/multiple_choice/accuracy"


@pytest.mark.slow
def test_race(tiny_kwargs: Any, tmp_path: Path) -> None:
    """Real questions: their texts hold question and option whole, and the loss of a tiny_kwargs model falls."""
    source = SHARED / "RACE/dev_middle.jsonl"
    if not source.exists():
        pytest.skip("needs ../shared/data/RACE")
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()[:4]]
    tokenizer = SHARED / "tokenizers/bert-base-uncased/vocab.txt"
    results = run(
        *(tiny_kwargs, tmp_path, "bert", tokenizer),
        train_dataset=[written(tmp_path / "race.jsonl", rows)],
        valid_dataset=written(tmp_path / "race.jsonl", rows),
        max_epochs=30,
        check_val_every_n_epoch=15,
        learning_rate=5e-3,
        max_sequence_length=96,
        log_every_n_steps=6,
    )
    with open(tmp_path / "runs/run/metrics.csv", newline="") as handle:
        losses = [float(row["train/loss"]) for row in csv.DictReader(handle) if row["train/loss"]]
    assert losses[0] == pytest.approx(math.log(4), abs=0.2)
    assert np.mean(losses[-3:]) < 0.9 * losses[0]
    said = lines_of(tmp_path / "predictions/run/valid.jsonl")
    answers = ["ABCD".index(answer) for row in rows for answer in row["answers"]]
    assert [one["label"] for one in said] == answers
    assert results["valid"]["multiple_choice/accuracy"] == np.mean([one["prediction"] == one["label"] for one in said])
