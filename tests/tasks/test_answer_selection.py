import csv
import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

import funneltfm  # noqa: F401  registers our models
from funneltfm.cli.flags import FlagParser
from funneltfm.data.text import NO_WORD, TextEncoder
from funneltfm.errors import InputError
from funneltfm.tasks.answer_selection import RANKING, AnswerSelection
from funneltfm.tasks.base import Collate, Prepare, encode_rows, make_tasks
from funneltfm.tasks.heads import Heads
from funneltfm.training.train import train
from funneltfm.training.train_config import TRAIN_GROUPS, make_train_args

SHARED = Path(__file__).resolve().parents[3] / "shared/data"
KINDS = ("IE_1", "IE_k", "AE_1", "AE_k", "RE_k")


def rows_of(sizes, right=()):
    """Queries "red a ?", "red b ?", ... of so many candidates, those with these row numbers right."""
    rows = []
    for q, size in enumerate(sizes):
        for c in range(size):
            letters = "abcdefghij"
            answer = f"{letters[c]} sea " + "big " * (c % 3)
            rows.append({"q": f"red {letters[q]} ?", "a": answer, "label": int(len(rows) in right)})
    return rows


def task_of(pipeline="answer_selection", **flags):
    args = make_train_args(pipeline=pipeline, **({"input_columns": ("q", "a")} | flags))
    tasks = make_tasks(pipeline, args)
    return tasks[0] if len(tasks) == 1 else tasks


def features_of(task, rows, tokenizer, training=True, length=24, types=None):
    text = TextEncoder(tokenizer, length, token_types=types)
    if training:
        task.learn(rows)
    return encode_rows([task], rows, text, "data.tsv"), text


def members(features):
    return [example["members"].tolist() for example in (features[i] for i in range(len(features)))]


# ---- grouping


def test_fixed_grouping_takes_candidates_in_the_order_of_the_data(tokenizers):
    rows = rows_of([4, 2])
    mixed = [rows[i] for i in (0, 4, 1, 2, 5, 3)]  # queries need not be together
    features, _ = features_of(task_of(k=2), mixed, tokenizers["bert_like"])
    assert members(features) == [[0, 2], [3, 5], [1, 4]]
    assert features.plain["query"].tolist() == [0, 0, 1]


def test_ragged_groups_are_an_error_or_filled_up(tokenizers):
    rows = rows_of([3, 1], right=(0, 3))
    with pytest.raises(InputError, match=r"data.tsv, row 1: its query has 3 candidates.*-k 2.*--pad_to_k"):
        features_of(task_of(k=2), rows, tokenizers["bert_like"])
    for separated in (False, True):
        task = task_of(k=2, pad_to_k=True, separated=separated)
        features, _ = features_of(task, rows, tokenizers["bert_like"])
        assert members(features) == [[0, 1], [2, -1], [3, -1]]
        labels = features.ragged["answer_selection_labels"][0].reshape(-1, 2)
        assert labels.tolist() == [[1, 0], [0, -100], [1, -100]]


def test_selection_takes_the_best_or_worst_by_score(tokenizers):
    scores = ["3", "9", "9", "1", ".5", -1, "1e3", 0]
    rows = [row | {"s": score} for row, score in zip(rows_of([4, 4]), scores, strict=True)]
    for selection, expected in (("best", [[1, 2], [4, 6]]), ("worst", [[0, 3], [5, 7]])):
        task = task_of(k=2, selection=selection, scores_column="s")
        assert members(features_of(task, rows, tokenizers["bert_like"])[0]) == expected
    rows[2]["s"] = "high"
    with pytest.raises(InputError, match=r"row 3: s must be a number; got 'high'"):
        features_of(task, rows, tokenizers["bert_like"])


def test_queries_are_equal_texts_or_the_index_column(tokenizers):
    """The older framework had a KeyError without the column."""
    rows = [row | {"id": i % 2} for i, row in enumerate(rows_of([2, 2]))]
    assert features_of(task_of(), rows, tokenizers["bert_like"])[0].plain["query"].tolist() == [0, 0, 1, 1]
    task = task_of(index_column="id")
    assert features_of(task, rows, tokenizers["bert_like"])[0].plain["query"].tolist() == [0, 1, 0, 1]
    with pytest.raises(InputError, match=r"rows 1 and 3: one query by id, but with different texts"):
        features_of(task_of(index_column="id", k=2), rows, tokenizers["bert_like"])
    with pytest.raises(InputError, match=r"row 1: qid must name the query of the row.*got None"):
        features_of(task_of(index_column="qid"), rows, tokenizers["bert_like"])


# ---- random grouping


def test_random_grouping_deals_every_candidate_once_an_epoch(tokenizers):
    rows = rows_of([7, 3, 6], right=(2, 9, 13))
    task = task_of(k=3, grouping="random", pad_to_k=True)
    features, text = features_of(task, rows, tokenizers["bert_like"])
    prepare = Prepare([task], text, seed=1)
    in_a_worker = pickle.loads(pickle.dumps(prepare))
    deals = []
    for epoch in (-1, 0, 0, 1):
        examples = [prepare(features[i], epoch) for i in range(len(features))]
        deals.append([example["members"].tolist() for example in examples])
        for example, again in zip(
            examples, (in_a_worker(features[i], epoch) for i in range(len(features))), strict=True
        ):
            assert all(np.array_equal(example[name], again[name]) for name in example)
        dealt = [(int(e["query"]), row) for e in examples for row in e["members"] if row >= 0]
        assert sorted(dealt) == [
            (q, row) for q, start, end in ((0, 0, 7), (1, 7, 10), (2, 10, 16)) for row in range(start, end)
        ]
        for example in examples:
            known = example["members"] >= 0
            labels = [rows[row]["label"] for row in example["members"][known]]
            assert example["answer_selection_labels"][known].tolist() == labels
            assert (example["answer_selection_labels"][~known] == -100).all()
    evaluation, first, again, second = deals
    assert evaluation == members(features)  # fixed, in the order of the data
    assert first == again
    assert len({str(deal) for deal in (evaluation, first, second)}) == 3
    other = Prepare([task], text, seed=2)
    assert [other(features[i], 0)["members"].tolist() for i in range(len(features))] != first


@pytest.mark.parametrize("separated", [False, True])
def test_what_is_drawn_is_what_that_order_of_the_data_would_give(tokenizers, separated):
    rows = rows_of([5], right=(1,))
    task = task_of(k=2, grouping="random", pad_to_k=True, separated=separated)
    features, text = features_of(task, rows, tokenizers["bert_like"], length=14)
    drawn = [Prepare([task], text, 0)(features[i], 4) for i in range(len(features))]
    order = [row for example in drawn for row in example["members"] if row >= 0]
    plain = task_of(k=2, pad_to_k=True, separated=separated)
    expected, _ = features_of(plain, [rows[row] for row in order], tokenizers["bert_like"], length=14)
    for i, example in enumerate(drawn):
        names = ("input_ids", "token_type_ids", "word_ids", "segment_starts", "answer_selection_labels")
        for name in (*names, *(["attention_mask"] if separated else [])):
            assert np.array_equal(example[name], expected[i][name]), name


def test_validation_data_are_never_drawn_from(tokenizers):
    task = task_of(k=2, grouping="random")
    features_of(task, rows_of([4]), tokenizers["bert_like"])
    pool = task._candidates
    features_of(task, rows_of([2, 2]), tokenizers["bert_like"], training=False)
    assert task._candidates is pool


# ---- loss


def test_loss_is_cross_entropy_over_the_candidates_that_are_there():
    torch.manual_seed(0)
    task = task_of(k=3, label_weights=(0.5, 2.0))
    logits, labels = torch.randn(2, 3, 2), torch.tensor([[0, 1, 0], [1, -100, -100]])
    log_p = logits.log_softmax(-1)
    picked = [(log_p[0, 0, 0], 0.5), (log_p[0, 1, 1], 2.0), (log_p[0, 2, 0], 0.5), (log_p[1, 0, 1], 2.0)]
    expected = -sum(p * w for p, w in picked) / sum(w for _, w in picked)
    torch.testing.assert_close(task.loss(logits, {"answer_selection_labels": labels}), expected)
    task = task_of()
    torch.testing.assert_close(
        task.loss(logits[0], {"answer_selection_labels": labels[0]}), F.cross_entropy(logits[0], labels[0])
    )


def test_one_label_says_whether_any_candidate_is_right(tokenizers):
    rows = rows_of([3, 2], right=(1,))
    task = task_of(k=2, classification_head_type="IE_1", pad_to_k=True)
    features, text = features_of(task, rows, tokenizers["bert_like"])
    batch = Collate([task], text.tokenizer)([features[i] for i in range(3)])
    assert batch["answer_selection_labels"].tolist() == [1, 0, 0]
    records = [{"logits": np.array(pair, np.float32)} for pair in ([0.0, 1.0], [0.0, 2.0], [1.0, 0.0])]
    scores = task.score(records, features, rows)
    assert scores["accuracy"] == pytest.approx(2 / 3)  # of rows, not of candidates
    # query 0: candidate 2 with the score of row 1 is first, then the tie of 0 and 1, of which 1 is right
    assert scores["mean_reciprocal_rank"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    lines = list(task.predict(records, features, rows))
    assert [line["row"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[0]["score"] == lines[1]["score"] != lines[2]["score"]


# ---- scores


def orders(own):
    """The labels of (score, label) pairs, the best score first, in every order that equal scores leave open."""
    each = []
    for level in sorted({score for score, _ in own}, reverse=True):
        labels = [label for score, label in own if score == level]
        places = itertools.combinations(range(len(labels)), sum(labels))
        each.append([[int(i in right) for i in range(len(labels))] for right in places])
    return [[*itertools.chain(*order)] for order in itertools.product(*each)]


def trec(scores, right, queries):
    """The same metrics by trec_eval, over queries with a right candidate, all queries, and those with both kinds. It
    orders equal scores by names; so it is shown every order that they may have, and the mean is taken, as RANKING does.
    """
    pytrec_eval = pytest.importorskip("pytrec_eval")
    names = dict(zip(RANKING, ("map", "recip_rank", "P_1", "success_5", "ndcg"), strict=True))
    own = {}
    for score, label, query in zip(scores, right, queries, strict=True):
        own.setdefault(str(query), []).append((float(score), int(label)))
    shown = {f"{query} {n}": order for query in own for n, order in enumerate(orders(own[query]))}
    assert len(shown) < 10_000
    qrel = {name: {str(i): label for i, label in enumerate(order)} for name, order in shown.items()}
    run = {name: {str(i): float(-i) for i in range(len(order))} for name, order in shown.items()}
    of_orders = {query: [] for query in own}
    for name, values in pytrec_eval.RelevanceEvaluator(qrel, set(names.values())).evaluate(run).items():
        of_orders[name.rpartition(" ")[0]].append(values)
    some = [query for query in own if any(label for _, label in own[query])]
    both = [query for query in some if not all(label for _, label in own[query])]
    kinds = {"": some, "raw_": list(own), "clean_": both}
    return {
        prefix + name: np.mean([np.mean([values[key] for values in of_orders[query]]) for query in of])
        for name, key in names.items()
        for prefix, of in kinds.items()
    }


@pytest.mark.parametrize("k", [None, 3])
def test_scores_equal_trec_eval_and_sklearn(tokenizers, k):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    rows = rows_of(rng.integers(1, 9, 10))
    for row in rows:
        row["label"] = int(rng.random() < 0.3) if row["q"] != "red b ?" else 1
    task = task_of() if k is None else task_of(k=k, pad_to_k=True)
    features, _ = features_of(task, rows, tokenizers["bert_like"])
    logits = rng.normal(size=(len(features), 2) if k is None else (len(features), k, 2)).astype(np.float32)
    records = [{"logits": one} for one in logits]
    got = task.score(records, features, rows)
    lines = list(task.predict(records, features, rows))
    assert [line["row"] for line in lines] == list(range(1, len(rows) + 1))
    assert [line["label"] for line in lines] == [row["label"] for row in rows]
    scores = [line["score"] for line in lines]
    for name, value in trec(scores, [row["label"] for row in rows], [row["q"] for row in rows]).items():
        assert got[name] == pytest.approx(value, abs=1e-9), name
    labels, decisions = ([line[name] for line in lines] for name in ("label", "prediction"))
    assert got["accuracy"] == pytest.approx(metrics.accuracy_score(labels, decisions), abs=1e-12)
    assert got["f1"] == pytest.approx(metrics.f1_score(labels, decisions), abs=1e-12)
    flat = logits[:, None] if k is None else logits
    expected = flat[features.ragged["members"][0].reshape(-1, k) >= 0] if k else flat[:, 0]
    p = np.exp(expected.astype(np.float64))
    assert sorted(scores) == pytest.approx(sorted(p[:, 1] / p.sum(-1)), abs=1e-12)


def test_a_part_of_the_data_can_be_scored(tokenizers):
    """limit_val_batches: some examples, and so some queries, are not there."""
    rows = rows_of([2, 2, 2], right=(0, 3, 4))
    task = task_of(metrics_empty_target_action="error")
    features, _ = features_of(task, rows, tokenizers["bert_like"])
    records = [{"logits": np.array([0.0, x], np.float32)} for x in (1, 2, 3)]
    scores = task.score(records, features.take([1, 2, 3]), rows)  # a query's wrong candidate alone is no error
    assert scores["mean_reciprocal_rank"] == 1.0
    assert [line["row"] for line in task.predict(records, features.take([1, 2, 3]), rows)] == [2, 3, 4]


def test_a_query_without_an_answer_is_an_error_on_demand(tokenizers):
    rows = rows_of([2, 2], right=(0,))
    task = task_of(metrics_empty_target_action="error")
    features, _ = features_of(task, rows, tokenizers["bert_like"])
    records = [{"logits": np.zeros(2, np.float32)}] * 4
    with pytest.raises(InputError, match=r"row 3: its query has no right candidate.*skip, neg or pos"):
        task.score(records, features, rows)
    for action, expected in (("skip", 0.75), ("neg", 0.375), ("pos", 0.875)):
        task = task_of(metrics_empty_target_action=action)
        assert task.score(records, features, rows)["mean_average_precision"] == expected


# ---- mixtures


@pytest.mark.parametrize("flags", [{}, {"k": 2}, {"k": 2, "separated": True, "grouping": "random"}])
def test_masked_lm_beside_it_corrupts_the_text_alone(tokenizers, flags):
    rows = rows_of([4, 2], right=(0, 5))
    tasks = task_of("masked_lm_and_answer_selection", probability=0.5, **flags)
    text = TextEncoder(tokenizers["bert_like"], 16)
    tasks[0].learn(rows)
    features = encode_rows(tasks, rows, text, "data.tsv")
    corrupt = Prepare(tasks, text, 0)
    clean = Prepare(tasks[:1], text, 0)
    examples = [corrupt(features[i], 0) for i in range(len(features))]
    for i, example in enumerate(examples):
        before = clean(features[i], 0)
        special = before["word_ids"] == NO_WORD
        chosen = example["masked_lm_labels"] != -100
        assert not (chosen & special).any()
        assert np.array_equal(example["input_ids"][~chosen], before["input_ids"][~chosen])
        assert np.array_equal(example["masked_lm_labels"][chosen], before["input_ids"][chosen])
        assert np.array_equal(example["answer_selection_labels"], before["answer_selection_labels"])
    batch = Collate(tasks, text.tokenizer)(examples)
    assert (batch["masked_lm_labels"] != -100).any()
    assert batch["masked_lm_labels"].shape == batch["inputs"]["input_ids"].shape
    if flags.get("separated"):
        assert not batch["inputs"]["attention_mask"].all(dim=1).any()  # the padding between texts


# ---- bad input


def test_flags_that_do_not_fit():
    for flags, message in (
        ({"separated": True}, "--separated is for rows of k candidates: give -k"),
        ({"classification_head_type": "AE_k"}, "give -k"),
        ({"k": 2, "selection": "best"}, "--selection needs --scores_column"),
        ({"k": 2, "scores_column": "s"}, "--scores_column needs --selection"),
        ({"label_weights": (1.0, 2.0, 3.0)}, "has 3 weights, but there are 2 classes: wrong, right"),
        ({"input_columns": None}, "--input_columns Q A"),
        ({"k": 0}, "k must be at least 1"),
        ({"num_labels": 2}, "--num_labels is read by"),
        ({"k": 2, "selection": "all"}, "selection must be one of best, worst; got 'all'"),
    ):
        with pytest.raises(InputError, match=message):
            task_of(**flags)


def test_rows_that_do_not_fit(tokenizers):
    rows = rows_of([2])
    for change, flags, message in (
        ({"label": 2}, {}, r"data.tsv, row 2: label must be 1 for a right candidate or 0 .*got 2"),
        ({"label": "yes"}, {}, r"got 'yes'"),
        ({"label": None}, {}, r"row 2: no label, but other rows have one"),
        ({}, {"input_columns": ("q",)}, r"two texts or more; --input_columns q gives 1"),
        ({}, {"input_columns": ("q", "a", "a"), "k": 2}, r"two texts with -k.*a:b.* gives 3"),
    ):
        with pytest.raises(InputError, match=message):
            features_of(task_of(**flags), [rows[0], rows[1] | change], tokenizers["bert_like"])
    for value in (1, "1", True, 1.0):
        features, _ = features_of(task_of(), [rows[0], rows[1] | {"label": value}], tokenizers["bert_like"])
        assert features.plain["answer_selection_labels"].tolist() == [0, 1]


# ---- every architecture


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_every_architecture(tiny, kind, tmp_path):
    """A step, an evaluation, a prediction, saving and loading."""
    _, config, tokenizer = tiny
    rows = rows_of([3, 2], right=(1, 3))
    flags = {} if kind is None else {"k": 2, "pad_to_k": True, "classification_head_type": kind}
    task = task_of(**flags)
    features, text = features_of(task, rows, tokenizer, length=24)
    torch.manual_seed(0)
    config = type(config).from_dict(config.to_dict() | task.model_config())
    heads = Heads({task.name: task.make_model(None, config)})
    batch = Collate([task], text.tokenizer)([features[i] for i in range(len(features))])
    losses = []
    optimizer = torch.optim.Adam(heads.parameters(), 1e-3)
    for _ in range(3):
        loss = task.loss(task.logits(heads.models[task.name], heads(batch["inputs"]), batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(map(np.isfinite, losses))
    assert {"accuracy", "f1"} <= set(
        task.train_scores(task.logits(heads.models[task.name], heads(batch["inputs"]), batch), batch)
    )

    def evaluate(model):
        heads = Heads({task.name: model}).eval()
        with torch.no_grad():
            records = task.record(task.logits(heads.models[task.name], heads(batch["inputs"]), batch), batch)
        return task.score(records, features, rows), list(task.predict(records, features, rows))

    scores, lines = evaluate(heads.models[task.name])
    assert {"loss", "accuracy", "f1", *RANKING} <= set(scores)
    assert [line["row"] for line in lines] == [1, 2, 3, 4, 5]
    heads.models[task.name].save_pretrained(tmp_path)
    assert evaluate(task.make_model(str(tmp_path), config)) == (scores, lines)
    unlabelled, _ = features_of(task, [{"q": row["q"], "a": row["a"]} for row in rows], tokenizer)
    assert not any(name.startswith("answer_selection_") for name in (*unlabelled.plain, *unlabelled.ragged))


# ---- runs


def run(tmp_path, tokenizer, rows, **flags):
    """A run of a tiny BERT on the rows, with which it is scored too."""
    tmp_path.mkdir(parents=True, exist_ok=True)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    sizes = "hidden_size=32 num_hidden_layers=1 num_attention_heads=2 intermediate_size=64 max_position_embeddings=200"
    data = str(tmp_path / "rows.jsonl")
    common = {
        "pipeline": "answer_selection", "model": "bert", "pre_trained_tokenizer": str(tmp_path / "tokenizer"),
        "additional_config_kwargs": sizes.split(), "input_columns": ("q", "a"), "max_sequence_length": 32,
        "train_dataset": (data,), "valid_dataset": data, "output_dir": str(tmp_path / "out"), "name": "run",
        "batch_size": 8, "learning_rate": 3e-3, "max_epochs": 4, "scheduler": "constant", "num_sanity_val_steps": 0,
        "save_total_limit": 0,
    }  # fmt: skip
    results = train(**(common | flags))
    path = tmp_path / "out/predictions/run/valid.jsonl"
    return results, [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


MIXED = {"pipeline": "masked_lm+answer_selection", "masked_lm_weight": 0.02}


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"k": 3, "pad_to_k": True, "grouping": "random", "classification_head_type": "AE_k"},
        {"k": 2, "pad_to_k": True, "separated": True, "max_sequence_length": 12, "max_epochs": 40} | MIXED,
        MIXED | {"pipeline": "masked_lm_and_answer_selection"},
    ],
)
def test_a_run_learns_and_its_predictions_have_its_scores(tokenizers, tmp_path, flags):
    rows = rows_of([4, 3, 5, 2, 4, 1])
    for row in rows:
        row["label"] = int("big" in row["a"])
    flags = {"max_epochs": 16, "batch_size": 4, "monitor": "valid/answer_selection/loss"} | flags
    results, lines = run(tmp_path, tokenizers["bert_like"], rows, **flags)
    scores = {name.removeprefix("answer_selection/"): value for name, value in results["valid"].items()}
    assert scores["loss"] < 0.5  # log 2 = .69 is not to know
    assert scores["mean_average_precision"] > 0.7
    assert [line["row"] for line in lines] == list(range(1, len(rows) + 1))
    columns = ([line[name] for line in lines] for name in ("score", "label", "query"))
    for name, value in trec(*columns).items():
        assert scores[name] == pytest.approx(value, abs=1e-9), name


def test_bad_flags_of_a_run(tokenizers, tmp_path):
    rows = rows_of([2, 2], right=(0,))
    for flags, message in (
        ({"k": 2, "separated": True, "max_sequence_length": 100}, "100 for each of 3 texts, but the model takes 200"),
        ({"extended_token_type_ids": (0, 5)}, "0 5, but the model knows 2 token types"),
        (
            {"extended_token_type_ids": (0, 1), "model": "distilbert", "additional_config_kwargs": ("n_layers=1",)},
            "the model knows 0 token types",
        ),
        ({"metrics_empty_target_action": "error"}, "line 3: its query has no right candidate"),
    ):
        with pytest.raises(InputError, match=message):
            run(tmp_path, tokenizers["bert_like"], rows, **flags)


# ---- real data


def wikiqa(split, n):
    """The first n rows."""
    with open(SHARED / f"WikiQA/WikiQA-{split}.tsv", encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle, delimiter="\t", quoting=csv.QUOTE_NONE))
    names = {"q": "Question", "a": "Sentence", "label": "Label", "id": "QuestionID"}
    return [{name: row[column] for name, column in names.items()} for row in rows[:n]]


JOINT = {"k": 5, "pad_to_k": True, "grouping": "random"}


@pytest.mark.skipif(not SHARED.is_dir(), reason="WikiQA is not here: ../shared/data")
@pytest.mark.parametrize("flags", [{}, JOINT, JOINT | {"label_weights": (1.0, 40.0)}])
def test_wikiqa(tmp_path, flags):
    metrics = pytest.importorskip("sklearn.metrics")
    tokenizer = transformers.BertTokenizer(str(SHARED / "tokenizers/bert-base-uncased/vocab.txt"))
    rows = wikiqa("dev", 500)
    doubles = [row | {"label": "0"} for row in rows if row["label"] == "1"]  # right and wrong ones with equal scores
    valid = tmp_path / "valid.jsonl"
    valid.write_text("".join(json.dumps(row) + "\n" for row in rows + doubles), encoding="utf-8")
    more = {"index_column": "id", "max_sequence_length": 96, "max_epochs": 2, "valid_dataset": str(valid)}
    results, lines = run(tmp_path, tokenizer, rows, **more, **flags)
    scores = {name.removeprefix("answer_selection/"): value for name, value in results["valid"].items()}
    assert [line["query"] for line in lines] == [row["id"] for row in rows + doubles]
    assert [line["label"] for line in lines] == [int(row["label"]) for row in rows + doubles]
    assert scores["f1"] > 0 if "label_weights" in flags else scores["loss"] < 0.5  # log 2 = .69 is not to know
    columns = {name: [line[name] for line in lines] for name in ("score", "label", "query", "prediction")}
    if not flags:
        labels = {}
        for query, score, label in zip(columns["query"], columns["score"], columns["label"], strict=True):
            labels.setdefault((query, score), set()).add(label)
        assert sum(len(of_score) == 2 for of_score in labels.values()) > 3
    expected = trec(columns["score"], columns["label"], columns["query"])
    expected["accuracy"] = metrics.accuracy_score(columns["label"], columns["prediction"])
    expected["f1"] = metrics.f1_score(columns["label"], columns["prediction"])
    assert expected.keys() == scores.keys() - {"loss"}
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, abs=1e-9), name
    weights = [flags.get("label_weights", (1, 1))[label] for label in columns["label"]]
    loss = metrics.log_loss(columns["label"], columns["score"], sample_weight=weights)
    assert scores["loss"] == pytest.approx(loss, rel=1e-5)  # ours is a mean of float32


def test_flags_of_the_command_line():
    parser = FlagParser(TRAIN_GROUPS, prog="funneltfm train")
    types = ["--extended_token_type_ids", "0", "1", "1"]
    flags, given = parser.parse(["-k", "5", "--selection", "worst", "--scores_column", "s", *types])
    assert (flags["k"], flags["selection"], flags["extended_token_type_ids"]) == (5, "worst", (0, 1, 1))
    assert given == {"k", "selection", "scores_column", "extended_token_type_ids"}
    with pytest.raises(InputError, match=r"selection.*all"):
        parser.parse(["--selection", "all"])


@pytest.mark.parametrize("weights", [None, (0.5, 2.0)])
def test_parts_of_a_step_weigh_what_they_have(weights):
    """The loss of a whole is the mean of its parts' by their sizes, also with missing candidates."""
    flags = {"k": 3, "pad_to_k": True, "input_columns": ("q", "a"), "label_weights": weights}
    task = AnswerSelection(make_train_args(pipeline="answer_selection", **flags))
    logits, labels = torch.randn(4, 3, 2), torch.tensor([[1, 0, 0], [0, 1, -100], [1, -100, -100], [0, 0, 1]])

    def part(rows):
        batch = {"answer_selection_labels": labels[rows]}
        return task.loss(logits[rows], batch), task.size(batch)

    (whole, size), (one, of_one), (other, of_other) = part(slice(4)), part(slice(1)), part(slice(1, 4))
    assert whole.item() == pytest.approx(((one * of_one + other * of_other) / size).item(), rel=1e-6)
    expected = torch.nn.functional.cross_entropy(
        logits.view(-1, 2), labels.view(-1), weight=weights and torch.tensor(weights), ignore_index=-100
    )
    assert whole.item() == pytest.approx(expected.item(), rel=1e-6)
