"""Windows, labels and answers against brute force; scores against the official rules; every model, end to end."""

import csv
import itertools
import json
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
from funneltfm.tasks.question_answering import (
    NO_ANSWER,
    QuestionAnswering,
)
from funneltfm.training.train import train
from funneltfm.training.train_config import make_train_args

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
MODELS = (
    *("bert", "roberta", "deberta", "deberta_v2", "electra", "albert", "distilbert", "camembert", "xlm_roberta"),
    *("modernbert", "funnel"),
)
COLOURS = ("red", "green", "blue", "big", "small")
THINGS = ("cat", "dog", "ball", "key", "box", "mat")


def task_of(**flags: Any) -> QuestionAnswering:
    (task,) = make_tasks("question_answering", make_train_args(pipeline="question_answering", **flags))
    assert isinstance(task, QuestionAnswering)
    return task


def row_of(context: str, answer: str | None, question: str = "where is the key ?", id: str = "q") -> dict[str, Any]:
    answers = [] if answer is None else [{"text": answer, "answer_start": context.index(answer)}]
    return {"id": id, "question": question, "context": context, "answers": answers}


def made_up(n: int, seed: int = 0, impossible: bool = False, length: int = 3) -> list[dict[str, Any]]:
    """What colour a thing has, in texts of things with colours."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        things = rng.permutation(THINGS)[:length]
        colours = [str(rng.choice(COLOURS)) for _ in things]
        context = " and ".join(f"the {thing} of {colour}" for thing, colour in zip(things, colours, strict=True))
        if impossible and i % 3 == 0:
            missing = next(thing for thing in THINGS if thing not in things)
            rows.append(row_of(context, None, f"the {missing} of ?", f"q{i}"))
        else:
            row = row_of(context, None, f"the {things[0]} of ?", f"q{i}")
            start = context.index(f"{things[0]} of ") + len(things[0]) + 4
            rows.append(row | {"answers": [{"text": colours[0], "answer_start": start}]})
    return rows


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# ---- windows


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize(("length", "stride"), [(30, 5), (24, 0), (40, 12), (200, 5)])
def test_windows_are_those_of_the_tokenizers_library(make_tokenizer: Any, kind: str, length: int, stride: int) -> None:
    tokenizer = make_tokenizer(kind)
    context = "the cat sat on the mat. Is caf\u00e9 big? " * 4
    question = "where is the small cat?"
    features = encode_rows(
        [task_of(doc_stride=stride)], [row_of(context, None, question)], TextEncoder(tokenizer, length), "data"
    )
    expected = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    assert [example["input_ids"].tolist() for example in features] == expected["input_ids"]
    for i, example in enumerate(features):
        assert (example["window"], example["windows"]) == (i, len(features))
        side = np.array([-1 if s is None else s for s in expected.sequence_ids(i)])
        offsets = np.array(expected["offset_mapping"][i])[side == 1]
        assert example["context_at"] == int((side == 1).argmax())
        assert np.array_equal(np.stack([example["starts"], example["ends"]], 1), offsets)


def test_a_stride_that_does_not_fit_is_an_error_only_where_a_text_needs_windows(make_tokenizer: Any) -> None:
    text, rows = TextEncoder(make_tokenizer("bert"), 32), [row_of("the cat sat on the mat", "mat")]
    assert len(encode_rows([task_of()], rows, text, "data")) == 1  # doc_stride 128
    rows.append(row_of("the cat sat on the mat " * 9, "mat", id="long"))
    with pytest.raises(InputError, match=r"data, row 2, question long.*room for 24 tokens.*has 54.*the 128 .*--doc_st"):
        encode_rows([task_of()], rows, text, "data")


def test_a_question_that_leaves_no_room(make_tokenizer: Any) -> None:
    text, rows = TextEncoder(make_tokenizer("bert"), 12), [row_of("the cat", "cat", question="the cat " * 8)]
    with pytest.raises(InputError, match=r"room for 0 tokens.*--max_query_length"):
        encode_rows([task_of()], rows, text, "data")
    (example,) = encode_rows([task_of(max_query_length=3)], rows, text, "data")
    assert text.tokenizer.decode(example["input_ids"]) == "[CLS] the cat the [SEP] the cat [SEP]"


# ---- labels


def label_texts(features: Features, rows: list[dict[str, Any]]) -> list[str | None]:
    texts = []
    for example in features:
        start, end = (int(example[f"question_answering_{side}"]) for side in ("start", "end"))
        context = rows[example["row"]]["context"]
        at = example["context_at"]
        texts.append(
            None if start == NO_ANSWER else context[example["starts"][start - at] : example["ends"][end - at]].strip()
        )
    return texts


@pytest.mark.parametrize("kind", ["bert", "roberta", "sentencepiece"])
def test_labels_are_the_tokens_of_the_answer(make_tokenizer: Any, kind: str) -> None:
    contexts = [
        "the cat sat on the mat",
        "caf\u00e9 d\u00e9j\u00e0 vu \U0001f600 \u4f60\u597d",
        "Big  Box,   small\tmat",
    ]
    rows = [
        row_of(context, context[a:b])
        for context in contexts
        for a, b in itertools.combinations(range(len(context) + 1), 2)
        if context[a:b].strip() == context[a:b] and context.index(context[a:b]) == a
    ]
    features = encode_rows([task_of()], rows, TextEncoder(make_tokenizer(kind), 100), "data")
    for text, row in zip(label_texts(features, rows), rows, strict=True):
        answer = row["answers"][0]["text"]
        start, length = row["answers"][0]["answer_start"], len(answer)
        assert answer in text
        # not more than the tokens that hold it: a token's inside is the most that is added on either side
        assert row["context"].index(text) >= start - 4
        assert len(text) <= length + 8


def test_the_windows_with_a_whole_answer_have_it_and_the_others_have_none(make_tokenizer: Any) -> None:
    words = [f"{a}{b}" for a in "abcd" for b in "efghij"]  # two pieces each
    context, text = " ".join(words), TextEncoder(make_tokenizer("bert"), 30)
    for first, n in itertools.product(range(len(words)), (1, 2, 5)):
        answer = " ".join(words[first : first + n])
        rows = [row_of(context, answer)]
        features = encode_rows([task_of(doc_stride=9)], rows, text, "data")
        held = [" ".join(f"{answer} ".replace(" ", "")) in e for e in _letters(features, text.tokenizer)]
        assert len(held) == 3
        assert label_texts(features, rows) == [answer if whole else None for whole in held]


def _letters(features: Features, tokenizer: Any) -> list[str]:
    """The context of each window, letter by letter."""
    contexts = (example["input_ids"][example["context_at"] : -1] for example in features)
    return [" ".join("".join(tokenizer.convert_ids_to_tokens(ids)).replace("##", "")) for ids in contexts]


def test_a_window_takes_the_first_answer_that_it_holds_whole(make_tokenizer: Any) -> None:
    context = "the cat " * 20 + "the dog"
    spans = [[context.index("dog"), context.index("dog") + 2], [4, 6]]
    entry = {"answers": ["dog", "cat"], "detected_answers": [{"text": "dog", "char_spans": spans}]}
    rows = [{"context": context, "qas": [{"qid": "q", "question": "?"} | entry]}]
    features = encode_rows([task_of(doc_stride=2)], rows, TextEncoder(make_tokenizer("bert"), 20), "data")
    found = label_texts(features, [{"context": context}])
    assert (found[0], found[-1]) == ("cat", "dog")
    assert set(found[1:-1]) == {None}


# ---- questions that cannot be used


def test_bad_questions_stop_or_are_left_out(caplog: pytest.LogCaptureFixture, make_tokenizer: Any) -> None:
    bad = row_of("the cat sat", "cat", id="bad") | {"answers": [{"text": "cat", "answer_start": 1}]}
    vanished = row_of("the \u200b\x01 cat", "\x01", id="gone")
    rows = [row_of("the cat", "cat"), bad, vanished, {"question": "who ?"}, row_of("the dog", "dog", id="last")]
    text = TextEncoder(make_tokenizer("bert"), 40)
    for n, message in (
        (2, "rows.jsonl, row 2, question bad: the answer 'cat' is not at"),
        (3, "rows.jsonl, row 2, question gone: the tokenizer makes no token of the answer"),
        (4, "rows.jsonl, row 2: no column 'context'"),
    ):
        with pytest.raises(InputError, match=message):
            encode_rows([task_of()], [rows[0], rows[n - 1]], text, "rows.jsonl")
    features = encode_rows([task_of(bad_rows="skip")], rows, text, "rows.jsonl")
    assert features.plain["row"].tolist() == [0, 4]
    assert "rows.jsonl: 3 questions left out; the first: rows.jsonl, row 2, question bad" in caplog.text
    with pytest.raises(InputError, match="no row makes an example"):
        encode_rows([task_of(bad_rows="skip")], rows[1:4], text, "rows.jsonl")


def test_answers_of_some_questions_only(make_tokenizer: Any) -> None:
    rows = [row_of("the cat", "cat"), {"id": "7", "question": "?", "context": "the cat"}]
    with pytest.raises(InputError, match="row 2, question 7: no answers, but other questions have some"):
        encode_rows([task_of()], rows, TextEncoder(make_tokenizer("bert"), 40), "data")


# ---- the best answer


def batch_of(task: QuestionAnswering, features: Features, tokenizer: Any, length: int | None = None) -> dict[str, Any]:
    return Collate([task], tokenizer, length)([features[i] for i in range(len(features))])


def best_by_hand(example: dict[str, Any], start: np.ndarray, end: np.ndarray, n: int, longest: int) -> dict[str, Any]:
    """Of one window, from logits (T,) of its own tokens: every pair, one by one."""
    at, size = example["context_at"], len(example["starts"])
    allowed = list(range(example["most_from"], example["most_to"]))
    starts = sorted(allowed, key=lambda i: -start[i])[:n]
    ends = sorted(range(at, at + size), key=lambda i: -end[i])[:n]
    best: dict[str, Any] = {"score": -np.inf}
    for i in starts:
        for j in ends:
            if i <= j < i + longest and start[i] + end[j] > best["score"]:
                best = {"start": i, "end": j, "score": start[i] + end[j]}
    return best | {"null": start[0] + end[0]}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("n", "longest"), [(20, 30), (3, 4), (1, 1), (100, 2)])
def test_the_best_answer_of_a_window(side: str, n: int, longest: int, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer("bert")
    tokenizer.padding_side = side
    task = task_of(doc_stride=4, n_best_size=n, max_answer_length=longest)
    rows = [row_of("the cat sat on the mat " * k, "mat", id=str(k)) for k in (1, 2, 6)] + [row_of("", None)]
    features = encode_rows([task], rows, TextEncoder(tokenizer, 24), "data")
    batch = batch_of(task, features, tokenizer, 27)
    logits = torch.randn(len(features), 2, 27, generator=torch.manual_seed(n))
    records = task.record(logits.masked_fill(batch["inputs"]["attention_mask"][:, None] == 0, -torch.inf), batch)
    assert len({record["start"] for record in records}) > 2
    for i, record in enumerate(records):
        example = features[i]
        size = len(example["input_ids"])
        own = logits[i, :, 27 - size :] if side == "left" else logits[i, :, :size]
        expected = best_by_hand(example, *own.numpy(), n, longest)
        if np.isfinite(expected["score"]):
            assert {name: record[name] for name in expected} == expected
        else:
            assert record["score"] == -np.inf
        for side_, row in zip(("start", "end"), own, strict=True):
            label = int(example[f"question_answering_{side_}"])
            label = 0 if label == NO_ANSWER else label
            assert record[f"{side_}_accuracy"] == (int(row.argmax()) == label)
        labels = [max(0, int(example[f"question_answering_{name}"])) for name in ("start", "end")]
        nll = [-row.log_softmax(0)[label].item() for row, label in zip(own, labels, strict=True)]
        assert record["loss"] == pytest.approx(np.mean(nll), rel=1e-5)
    assert records[-1]["score"] == -np.inf  # the empty text


def test_the_loss_is_the_mean_over_windows(make_tokenizer: Any) -> None:
    tokenizer, task = make_tokenizer("bert"), task_of()
    features = encode_rows([task], made_up(5, impossible=True), TextEncoder(tokenizer, 64), "data")
    batch = batch_of(task, features, tokenizer)
    logits = torch.randn(5, 2, batch["inputs"]["input_ids"].size(1))
    records = task.record(logits, batch)
    assert task.loss(logits, batch).item() == pytest.approx(np.mean([record["loss"] for record in records]), rel=1e-6)
    scores = task.train_scores(logits, batch)
    assert scores == pytest.approx({name: np.mean([record[name] for record in records]) for name in scores})


# ---- scores


def random_records(task: QuestionAnswering, features: Features, seed: int) -> list[dict[str, Any]]:
    """As if a model had spoken at random, more often right than wrong."""
    rng = np.random.default_rng(seed)
    records = []
    for example in features:
        start, end = (int(example[f"question_answering_{side}"]) for side in ("start", "end"))
        if start == NO_ANSWER or rng.random() < 0.4:
            start = example["context_at"] + int(rng.integers(len(example["starts"])))
            end = min(start + int(rng.integers(3)), example["context_at"] + len(example["starts"]) - 1)
        record = {"start": start, "end": end, "score": rng.normal(), "null": rng.normal()}
        records.append(record | {"loss": rng.random(), "start_accuracy": True, "end_accuracy": False})
    return records


def expected_of(task: QuestionAnswering, records: Any, features: Any, rows: Any, threshold: float | None) -> list[Any]:
    """(row, question, prediction), window by window."""
    by_question: dict[Any, Any] = {}
    for example, record in zip(features, records, strict=True):
        by_question.setdefault((int(example["row"]), int(example["question"])), []).append((example, record))
    result = []
    for key, windows in by_question.items():
        if len(windows) < windows[0][0]["windows"]:
            continue
        example, record = max(windows, key=lambda pair: pair[1]["score"])
        at = example["context_at"]
        context = rows[key[0]]["context"]
        text = context[example["starts"][record["start"] - at] : example["ends"][record["end"] - at]].strip()
        null = min(record["null"] for _, record in windows)
        refused = threshold is not None and null - record["score"] > threshold
        result.append((*key, "" if refused else text))
    return result


def official_words(text: str) -> list[str]:
    """Lower case, no punctuation, no articles, split at white space: letter by letter."""
    kept = "".join(c for c in text.lower() if c not in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
    words, word = [], ""
    for c in kept + " ":
        if c.isalnum():
            word += c
            continue
        words += [" " if word in ("a", "an", "the") else word, c]
        word = ""
    return "".join(words).split()


def official(prediction: str, answers: list[str]) -> tuple[float, float]:
    """Exact match and F1 by the rules of SQuAD's evaluation."""
    found, em, best = official_words(prediction), 0.0, 0.0
    for answer in answers or [""]:
        right = official_words(answer)
        same = sum(min(found.count(word), right.count(word)) for word in set(found))
        em = max(em, float(found == right))
        best = max(best, 2 * same / (len(found) + len(right)) if same else float(not found and not right))
    return em, best


@pytest.mark.parametrize("impossible", [False, True])
@pytest.mark.parametrize("whole", [True, False])
def test_scores_are_the_official_ones(impossible: bool, whole: bool, make_tokenizer: Any) -> None:
    rows = made_up(60, impossible=impossible, length=4)
    task = task_of(doc_stride=3)
    features = encode_rows([task], rows, TextEncoder(make_tokenizer("bert"), 20), "data")
    assert features.plain["windows"].max() > 1
    records = random_records(task, features, 1)
    if not whole:  # as the sanity validation leaves them
        kept = np.flatnonzero(np.random.default_rng(0).random(len(features)) < 0.8).tolist()
        features, records = features.take(kept), [records[i] for i in kept]
    task.tune(records, features, rows)
    assert (task.threshold is not None) == impossible
    expected = expected_of(task, records, features, rows, task.threshold)
    assert whole == (len(expected) == 60)
    pairs = [official(text, [answer["text"] for answer in rows[row]["answers"]]) for row, _, text in expected]
    scores = task.score(records, features, rows)
    assert scores["loss"] == pytest.approx(np.mean([record["loss"] for record in records]), abs=1e-9)
    assert (scores["start_accuracy"], scores["end_accuracy"]) == (1, 0)
    groups = {"": [True] * len(pairs)}
    if impossible:
        groups["_has_answer"] = [bool(rows[row]["answers"]) for row, _, _ in expected]
        groups["_no_answer"] = [not has for has in groups["_has_answer"]]
    for group, chosen in groups.items():
        em, f1 = np.mean(list(itertools.compress(pairs, chosen)), axis=0)
        assert scores[f"exact_match{group}"] == pytest.approx(em, abs=1e-9)
        assert scores[f"f1{group}"] == pytest.approx(f1, abs=1e-9)
    assert len(scores) == 3 + 2 * len(groups)
    said = list(task.predict(records, features, rows))
    assert [(one["id"], one["prediction"]) for one in said] == [(rows[row]["id"], text) for row, _, text in expected]
    assert all(one["answers"] == [a["text"] for a in rows[int(one["id"][1:])]["answers"]] for one in said)


def test_the_tuned_threshold_is_the_best_and_a_fixed_one_stays(make_tokenizer: Any) -> None:
    rows = made_up(60, impossible=True)
    task, fixed = task_of(), task_of(null_threshold=0.25)
    features = encode_rows([task], rows, TextEncoder(make_tokenizer("bert"), 64), "data")
    records = random_records(task, features, 2)
    for record, row in zip(records, rows, strict=True):  # a model that knows something of it
        record["null"] += 1.5 * (not row["answers"])
    untuned = task.score(records, features, rows)
    assert untuned["f1_no_answer"] == 0.0  # it always answers
    task.tune(records, features, rows)
    tuned = task.score(records, features, rows)["f1"]
    for threshold in np.linspace(-5, 5, 101):
        assert task_of(null_threshold=float(threshold)).score(records, features, rows)["f1"] <= tuned + 1e-12
    assert tuned > untuned["f1"]
    fixed.tune(records, features, rows)
    assert fixed.threshold == 0.25
    fixed.load_state(task.state())
    assert fixed.threshold == 0.25
    other = task_of()
    other.load_state(json.loads(json.dumps(task.state())))
    assert other.score(records, features, rows)["f1"] == tuned
    task.tune(records, features, [row | {"answers": [{"text": "the", "answer_start": 0}]} for row in rows])
    assert task.threshold is None  # where every question has an answer


def test_no_question_is_whole(make_tokenizer: Any) -> None:
    rows = [row_of("the cat sat on the mat " * 9, "mat")]
    task = task_of(doc_stride=4)
    features = encode_rows([task], rows, TextEncoder(make_tokenizer("bert"), 24), "data")
    records = random_records(task, features, 0)
    task.tune(records[:2], features.take([0, 1]), rows)
    assert set(task.score(records[:2], features.take([0, 1]), rows)) == {"loss", "start_accuracy", "end_accuracy"}
    assert list(task.predict(records[:2], features.take([0, 1]), rows)) == []


def test_a_question_without_a_possible_answer(make_tokenizer: Any) -> None:
    rows = [row_of("", None, id="empty"), row_of("the cat", None, id="b")]
    task = task_of()
    features = encode_rows([task], rows, TextEncoder(make_tokenizer("bert"), 24), "data")
    records = [{"start": 0, "end": 0, "score": -np.inf, "null": 1.0}, {"start": 6, "end": 7, "score": 2.0, "null": 1.0}]
    records = [{"start_accuracy": True, "end_accuracy": True, "loss": 0.0} | record for record in records]
    records[1] |= {"start": int(features[1]["context_at"]), "end": int(features[1]["context_at"]) + 1}
    task.tune(records, features, rows)
    said = list(task.predict(records, features, rows))
    assert said[0] == {"id": "empty", "prediction": "", "score": None, "null_score": 1.0, "answers": []}
    assert task.score(records, features, rows)["exact_match_no_answer"] == 1.0
    json.dumps(said, allow_nan=False)


def test_answers_that_normalise_to_nothing_are_none_beside_unanswerable_questions(make_tokenizer: Any) -> None:
    """SQuAD 2.0's evaluation drops them, 1.1's does not."""
    rows = [row_of("the cat", "the")]
    rows[0]["answers"].append({"text": "cat", "answer_start": 4})
    both = [*rows, row_of("the dog", None)]
    task = task_of()
    features = encode_rows([task], both, TextEncoder(make_tokenizer("bert"), 24), "data")
    at = int(features[0]["context_at"])
    record = {"start": at, "end": at, "score": 1.0, "null": 0.0}
    record |= {"start_accuracy": True, "end_accuracy": True, "loss": 0.0}
    assert task.score([record], features.take([0]), rows)["exact_match"] == 1.0  # said "the"
    assert task.score([record, record], features, both)["exact_match_has_answer"] == 0.0


# ---- the model


def bert_model(vocab_size: int) -> Any:
    config = transformers.BertConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=2,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForQuestionAnswering.from_config(config).eval()


@pytest.mark.parametrize("side", ["left", "right"])
def test_nothing_depends_on_the_padding(side: str, make_tokenizer: Any) -> None:
    tokenizer, task = make_tokenizer("bert"), task_of()
    model = bert_model(len(tokenizer))
    tokenizer.padding_side = side
    model.bert.embeddings.position_embeddings.weight.data.zero_()  # they count the padding on the left
    features = encode_rows([task], made_up(3, impossible=True), TextEncoder(tokenizer, 64), "data")
    together = batch_of(task, features, tokenizer, 50)
    with torch.no_grad():
        records = task.record(task.logits(model, model.bert(**together["inputs"]), together), together)
        for i, record in enumerate(records):
            alone = Collate([task], tokenizer)([features[i]])
            (expected,) = task.record(task.logits(model, model.bert(**alone["inputs"]), alone), alone)
            assert record == pytest.approx(expected, abs=1e-5)


def test_a_head_that_searches_ends_beside_starts_is_refused(make_tokenizer: Any) -> None:
    from funneltfm.funnel.hf import FunnelTFMConfig

    sizes = {"block_size": "1", "d_model": 32, "d_embed": 32, "n_head": 2, "d_head": 16, "d_inner": 64}
    config = FunnelTFMConfig(**sizes, vocab_size=len(make_tokenizer("bert")), qa_head="beam", num_labels=2)
    model, task = transformers.AutoModelForQuestionAnswering.from_config(config), task_of()
    features = encode_rows([task], made_up(2), TextEncoder(make_tokenizer("bert"), 64), "data")
    batch = batch_of(task, features, make_tokenizer("bert"))
    with pytest.raises(InputError, match="qa_head: plain"):
        task.logits(model, model.funnel(**batch["inputs"]), batch)


# ---- end to end


def run(tiny_kwargs: Any, folder: Path, model: str, tokenizer: Path, **flags: Any) -> dict[str, Any]:
    flags = {"name": "run", "output_dir": str(folder), "save_total_limit": 0, "max_sequence_length": 48} | flags
    flags = {"pipeline": "question_answering", "batch_size": 8, "doc_stride": 6, "enable_progress_bar": False} | flags
    return train(
        model=model, pre_trained_tokenizer=str(tokenizer), additional_config_kwargs=tiny_kwargs[model], **flags
    )


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("model", MODELS)
def test_every_model(model: str, tokenizer_folders: dict[str, Path], tiny_kwargs: Any, tmp_path: Path) -> None:
    """A step, an evaluation, a prediction without labels, and a folder that the Auto class reads."""
    rows = made_up(8, impossible=True)
    data = written(tmp_path / "train.jsonl", rows)
    bare = [{name: row[name] for name in ("id", "question", "context")} for row in rows]
    results = run(
        *(tiny_kwargs, tmp_path, model, tokenizer_folders[model]),
        train_dataset=[data],
        valid_dataset=data,
        max_steps=1,
        predict_dataset=written(tmp_path / "bare.jsonl", bare),
    )
    assert results["monitor"] == "valid/question_answering/f1"
    assert "predict" not in results
    said = lines_of(tmp_path / "predictions/run/predict.jsonl")
    assert [one["id"] for one in said] == [row["id"] for row in rows]
    best = tmp_path / "pre_trained_models/run/best"
    loaded = transformers.AutoModelForQuestionAnswering.from_pretrained(best).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(best)
    inputs = tokenizer(
        [row["question"] for row in rows], [row["context"] for row in rows], return_tensors="pt", padding=True
    )
    with torch.no_grad():
        output = loaded(**inputs)
    null = output.start_logits[:, 0] + output.end_logits[:, 0]
    assert [one["null_score"] for one in said] == pytest.approx(null.tolist(), abs=1e-4)
    state = json.loads((best / "hyperparameters.json").read_text())["tasks"]["question_answering"]
    assert isinstance(state["null_threshold"], float)


def test_it_learns_and_says_what_it_scores(
    tokenizer_folders: dict[str, Path], tiny_kwargs: Any, tmp_path: Path
) -> None:
    """A text and a question of which the model can learn the answer; every score is that of what it wrote."""
    rows = made_up(300, 1, impossible=True, length=2)
    valid, test = made_up(40, 2, impossible=True, length=2), made_up(40, 3, impossible=True, length=2)
    results = run(
        *(tiny_kwargs, tmp_path, "bert", tokenizer_folders["bert"]),
        train_dataset=[written(tmp_path / "train.jsonl", rows)],
        max_epochs=3,
        learning_rate=3e-3,
        valid_dataset=written(tmp_path / "valid.jsonl", valid),
        log_every_n_steps=10,
        test_dataset=written(tmp_path / "test.jsonl", test),
    )
    with open(tmp_path / "runs/run/metrics.csv", newline="") as handle:
        table = list(csv.DictReader(handle))
    losses = [float(row["train/loss"]) for row in table if row["train/loss"]]
    assert losses[-1] < 0.7 * losses[0]
    assert len([row for row in table if row["valid/question_answering/f1"]]) == 3
    threshold = json.loads((tmp_path / "pre_trained_models/run/best/hyperparameters.json").read_text())["tasks"][
        "question_answering"
    ]["null_threshold"]
    for split, data in (("valid", valid), ("test", test)):
        said = lines_of(tmp_path / f"predictions/run/{split}.jsonl")
        assert [one["id"] for one in said] == [row["id"] for row in data]
        pairs = [official(one["prediction"], one["answers"]) for one in said]
        assert results[split]["question_answering/exact_match"] == pytest.approx(np.mean(pairs, axis=0)[0], abs=1e-9)
        assert results[split]["question_answering/f1"] == pytest.approx(np.mean(pairs, axis=0)[1], abs=1e-9)
        assert all((one["prediction"] == "") == (one["null_score"] - one["score"] > threshold) for one in said)
    assert results["best"] == pytest.approx(results["valid"]["question_answering/f1"], abs=1e-6)


def test_evaluations_do_not_add_up(tokenizer_folders: dict[str, Path], tiny_kwargs: Any, tmp_path: Path) -> None:
    """Every validation of a model that stands still is the same: nothing is left of the one before."""
    data = written(tmp_path / "data.jsonl", made_up(10, length=4))
    run(
        *(tiny_kwargs, tmp_path, "bert", tokenizer_folders["bert"]),
        train_dataset=[data],
        valid_dataset=data,
        max_epochs=3,
        learning_rate=1e-30,
        max_sequence_length=24,
    )
    with open(tmp_path / "runs/run/metrics.csv", newline="") as handle:
        table = [row for row in csv.DictReader(handle) if row["valid/question_answering/f1"]]
    scores = [{name: row[name] for name in row if name.startswith("valid/")} for row in table]
    assert len(scores) == 3
    assert scores[0] == scores[1] == scores[2]


def test_a_limited_validation_has_whole_questions(
    tokenizer_folders: dict[str, Path], tiny_kwargs: Any, tmp_path: Path
) -> None:
    rows = [row_of("the cat sat on the mat " * 9, "mat", id=str(i)) for i in range(4)]
    data = written(tmp_path / "data.jsonl", rows)
    flags = {"train_dataset": [data], "valid_dataset": data, "max_epochs": 1, "max_sequence_length": 24}
    results = run(
        tiny_kwargs, tmp_path, "bert", tokenizer_folders["bert"], limit_val_batches=1, batch_size=2, **flags
    )  # fmt: skip
    assert "question_answering/f1" in results["valid"]
    said = (tmp_path / "predictions/run/valid.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in said] == ["0"]
    run(tiny_kwargs, tmp_path, "bert", tokenizer_folders["bert"], fast_dev_run=True, batch_size=2, **flags)


def test_a_mixture_with_masked_lm(tokenizer_folders: dict[str, Path], tiny_kwargs: Any, tmp_path: Path) -> None:
    data = written(tmp_path / "data.jsonl", made_up(12, impossible=True))
    results = run(
        *(tiny_kwargs, tmp_path, "funnel", tokenizer_folders["funnel"]),
        pipeline="masked_lm+question_answering",
        train_dataset=[data],
        valid_dataset=data,
        max_steps=4,
        masked_lm_weight=0.5,
        log_every_n_steps=1,
    )
    assert results["monitor"] == "valid/question_answering/f1"
    assert not any(name.startswith("masked_lm") for name in results["valid"])
    with open(tmp_path / "runs/run/metrics.csv", newline="") as handle:
        row = next(csv.DictReader(handle))
    parts = float(row["train/question_answering/loss"]) + 0.5 * float(row["train/masked_lm/loss"])
    assert float(row["train/loss"]) == pytest.approx(parts, rel=1e-5)
    for task, auto in (("masked_lm", "AutoModelForMaskedLM"), ("question_answering", "AutoModelForQuestionAnswering")):
        getattr(transformers, auto).from_pretrained(tmp_path / f"pre_trained_models/run/best/{task}")


@pytest.mark.slow
def test_windows_of_a_question_in_two_processes(
    tokenizer_folders: dict[str, Path], tiny_kwargs: Any, tmp_path: Path
) -> None:
    """The same model scores the same, however many processes share the windows."""
    data = written(tmp_path / "data.jsonl", made_up(21, impossible=True, length=5))
    both = []
    for devices in ("1", "2"):
        results = run(
            *(tiny_kwargs, tmp_path / devices, "bert", tokenizer_folders["bert"]),
            valid_dataset=data,
            batch_size=2,
            max_sequence_length=20,
            doc_stride=3,
            accelerator="cpu",
            devices=devices,
        )
        said = lines_of(tmp_path / devices / "predictions/run/valid.jsonl")
        both.append((results["processes"], results["valid"], [one["prediction"] for one in said]))
    assert (both[0][0], both[1][0]) == (1, 2)
    assert both[0][1] == pytest.approx(both[1][1], abs=1e-6)
    assert both[0][2] == both[1][2]
    assert len(both[0][2]) == 21


@pytest.mark.slow
def test_squad(tokenizer_folders: dict[str, Path], tiny_kwargs: Any, tmp_path: Path) -> None:
    """Real questions: the loss falls, the labels are the answers, and scores are those of what was written."""
    source = SHARED / "SQuAD-v1.1/dev-v1.1.32articles.json"
    if not source.exists():
        pytest.skip("needs ../shared/data/SQuAD-v1.1")
    articles = json.loads(source.read_text(encoding="utf-8"))["data"][:4]
    rows = [{"title": a["title"], "paragraphs": a["paragraphs"][:6]} for a in articles]
    data = written(tmp_path / "squad.jsonl", rows)
    results = run(
        *(tiny_kwargs, tmp_path, "bert", SHARED / "tokenizers/bert-base-uncased/vocab.txt"),
        train_dataset=[data],
        valid_dataset=data,
        max_steps=30,
        learning_rate=3e-3,
        max_sequence_length=160,
        doc_stride=32,
        log_every_n_steps=5,
    )
    with open(tmp_path / "runs/run/metrics.csv", newline="") as handle:
        losses = [float(row["train/loss"]) for row in csv.DictReader(handle) if row["train/loss"]]
    assert np.mean(losses[-2:]) < 0.95 * losses[0]
    said = lines_of(tmp_path / "predictions/run/valid.jsonl")
    golds = {q["id"]: [a["text"] for a in q["answers"]] for r in rows for p in r["paragraphs"] for q in p["qas"]}
    assert [one["id"] for one in said] == list(golds)
    scores = np.array([official(one["prediction"], golds[one["id"]]) for one in said]).mean(axis=0)
    assert results["valid"]["question_answering/exact_match"] == pytest.approx(scores[0], abs=1e-9)
    assert results["valid"]["question_answering/f1"] == pytest.approx(scores[1], abs=1e-9)
