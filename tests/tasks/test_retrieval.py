import csv
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import funneltfm  # noqa: F401  registers our models
from funneltfm.data.text import TextEncoder
from funneltfm.errors import InputError
from funneltfm.tasks.base import Collate, Prepare, encode_rows, make_tasks
from funneltfm.tasks.heads import Heads
from funneltfm.tasks.retrieval import (
    PAIR_LOSSES,
    RANKING,
    contrastive_loss,
    cosine_similarity_loss,
    in_batch_negatives_loss,
    online_contrastive_loss,
    pooled,
    similarity,
)
from funneltfm.training.train import train
from funneltfm.training.train_config import make_train_args

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared/data"
LOSSES = (*PAIR_LOSSES, "in_batch_negatives_loss")


def task_of(pipeline="retrieval", **flags):
    tasks = make_tasks(pipeline, make_train_args(pipeline=pipeline, **({"input_columns": ("q", "a")} | flags)))
    return tasks[0] if len(tasks) == 1 else tasks


def rows_of(n=6):
    """Of every query "red x ?" one candidate "x city" and one with the next letter."""
    letters = "abcdefghijklmnop"
    pairs = itertools.product(range(n), (0, 1))
    return [{"q": f"red {letters[i]} ?", "a": f"{letters[i + j]} city", "label": 1 - j} for i, j in pairs]


# ---- losses


def brute(name, cosine, labels, margin):
    """Pair by pair."""
    d = [1 - c for c in cosine]
    square = [x**2 if y else max(0, margin - x) ** 2 for x, y in zip(d, labels, strict=True)]
    if name == "contrastive_loss":
        return sum(square) / 2 / len(d)
    if name == "cosine_similarity_loss":
        return sum((c - y) ** 2 for c, y in zip(cosine, labels, strict=True)) / len(d)
    right = [x for x, y in zip(d, labels, strict=True) if y]
    wrong = [x for x, y in zip(d, labels, strict=True) if not y]
    total = 0
    for x, y, s in zip(d, labels, square, strict=True):
        if not right or not wrong or (x > min(wrong) if y else x < max(right)):
            total += s
    return total / len(d)


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("labels", [[1, 0, 1, 0, 0, 1], [1] * 6, [0] * 6])
def test_losses_of_pairs(name, labels):
    for seed in range(5):
        cosine = np.random.default_rng(seed).uniform(-1, 1, 6)
        if seed == 0:
            cosine = np.where(labels, 0.9, 0.1)  # all easy
        value = PAIR_LOSSES[name](torch.tensor(cosine), torch.tensor(labels), 0.5)
        assert value.shape == ()  # the older framework's cosine loss gave a pair
        assert value.item() == pytest.approx(brute(name, cosine, labels, 0.5), abs=1e-12)


def test_losses_by_hand():
    cosine, labels = torch.tensor([0.8, 0.9]), torch.tensor([1, 0])
    assert contrastive_loss(cosine, labels, 0.5).item() == pytest.approx((0.2**2 + 0.4**2) / 4)
    assert online_contrastive_loss(cosine, labels, 0.5).item() == pytest.approx((0.2**2 + 0.4**2) / 2)
    assert online_contrastive_loss(cosine, labels.flip(0), 0.5).item() == 0.0
    assert cosine_similarity_loss(cosine, labels, 0.5).item() == pytest.approx((0.2**2 + 0.9**2) / 2)


def test_easy_pairs_alone_still_have_gradients():
    cosine = torch.tensor([0.9, 0.1], requires_grad=True)
    online_contrastive_loss(cosine, torch.tensor([1, 0]), 0.5).backward()
    assert cosine.grad.tolist() == [0.0, 0.0]


def test_in_batch_negatives():
    """Rows 0 and 2 are answers to one query, row 3 is a wrong pair: nobody looks for it, but it is found by others."""
    rng = np.random.default_rng(0)
    scores, labels, queries = rng.normal(size=(4, 4)), [1, 1, 1, 0], [5, 6, 5, 6]
    candidates = {0: [0, 1, 3], 1: [0, 1, 2, 3], 2: [1, 2, 3]}
    expected = [math.log(sum(math.exp(scores[i, j]) for j in js)) - scores[i, i] for i, js in candidates.items()]
    loss = in_batch_negatives_loss(torch.tensor(scores), torch.tensor(labels), torch.tensor(queries))
    assert loss.item() == pytest.approx(np.mean(expected), abs=1e-12)
    x = torch.tensor(scores, requires_grad=True)
    nothing = in_batch_negatives_loss(x, torch.zeros(4), torch.tensor(queries))
    nothing.backward()
    assert nothing.item() == 0
    assert not x.grad.any()


def test_similarity():
    a, b = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0]])
    torch.testing.assert_close(similarity(a, b, "cosine_similarity"), torch.tensor([[0.6], [0.0]]))
    torch.testing.assert_close(similarity(a, b, "dot_product_similarity"), torch.tensor([[3.0], [0.0]]))


def test_pooling_sees_real_tokens_alone():
    torch.manual_seed(0)
    hidden = torch.randn(2, 4, 3)
    right = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    left = right.flip(1)
    torch.testing.assert_close(pooled(hidden, right, "mean"), torch.stack([hidden[0, :2].mean(0), hidden[1].mean(0)]))
    torch.testing.assert_close(pooled(hidden, left, "mean")[0], hidden[0, 2:].mean(0))
    assert torch.equal(pooled(hidden, right, "cls"), hidden[:, 0])
    assert torch.equal(pooled(hidden, left, "cls"), torch.stack([hidden[0, 2], hidden[1, 0]]))
    assert torch.equal(pooled(hidden[:, :2], right, "cls"), hidden[:, 0])
    with pytest.raises(InputError, match=r"2 states of 4 tokens.*decoder_size\), or --pooling cls"):
        pooled(hidden[:, :2], right, "mean")


# ---- examples


def test_an_example_is_two_texts(tokenizers):
    task = task_of()
    text = TextEncoder(tokenizers["bert_like"], 6)
    features = encode_rows([task], [{"q": "who", "a": "red " * 9, "label": 1}], text, "data")
    example = features[0]
    ids = text.tokenizer.convert_ids_to_tokens(example["input_ids"])
    assert " ".join(ids) == "[CLS] who [SEP] [CLS] red red red red [SEP]"
    assert example["parts"].tolist() == [3, 6]
    batch = Collate([task], text.tokenizer)([example, example])
    assert batch["inputs"]["input_ids"].shape == (4, 6)
    assert batch["inputs"]["attention_mask"].sum(dim=1).tolist() == [3, 6, 3, 6]
    assert batch["retrieval_labels"].tolist() == [1, 1]
    hidden = transformers.modeling_outputs.BaseModelOutput(torch.arange(4.0)[:, None, None].expand(4, 6, 2))
    embeddings = task.logits(None, hidden, batch)
    assert embeddings[..., 0].tolist() == [[0.0, 1.0], [2.0, 3.0]]


def test_each_text_has_its_own_longest_length(tokenizers, tmp_path):
    rows = [{"q": "red " * 30, "a": "city " * 30}, {"q": "red", "a": "city"}]
    for lengths, expected in (((5, 9), [5, 9]), ((7,), [7, 7]), (7, [7, 7])):
        task = task_of(max_sequence_length=lengths)
        text = TextEncoder(tokenizers["bert_like"], task.args.max_sequence_length[0])
        features = encode_rows([task], rows, text, "data")
        assert features[0]["parts"].tolist() == expected
        assert features[1]["parts"].tolist() == [3, 3]
    flags = flags_of(tmp_path, tokenizers["bert_like"], rows_of(3), max_sequence_length=(8, 101), max_steps=1)
    with pytest.raises(InputError, match="--max_sequence_length=101, but the model takes 100 tokens"):
        train(**flags)
    assert "retrieval/loss" in train(**flags | {"max_sequence_length": (8, 32), "pad_to_max_length": True})["valid"]
    with pytest.raises(InputError, match="takes one number or two with --pipeline retrieval; got 1 2 3"):
        task_of(max_sequence_length=(1, 2, 3))
    with pytest.raises(InputError, match=r"one number with --pipeline seq_class; got 8 16\. Two are for retrieval"):
        make_train_args(pipeline="seq_class", max_sequence_length=(8, 16))
    with pytest.raises(InputError, match="max_sequence_length must be at least 1; got 0"):
        task_of(max_sequence_length=(8, 0))


def test_masked_lm_beside_it(tokenizers):
    tasks = task_of("masked_lm+retrieval", probability=0.5)
    text = TextEncoder(tokenizers["bert_like"], 16)
    features = encode_rows(tasks, rows_of(), text, "data")
    prepare = Prepare(tasks, text, 0)
    batch = Collate(tasks, text.tokenizer)([prepare(features[i], 0) for i in range(4)])
    assert (
        batch["masked_lm_labels"].shape
        == batch["inputs"]["input_ids"].shape
        == (8, batch["inputs"]["input_ids"].size(1))
    )
    chosen = batch["masked_lm_labels"] != -100
    assert chosen.any()
    assert batch["inputs"]["attention_mask"][chosen].all()


def test_bad_input(tokenizers):
    for flags, message in (
        ({"input_columns": ("q",)}, "--input_columns QUERY TEXT"),
        ({"k": 3}, "compares 2 texts; got -k 3"),
        ({"temperature": 0.0}, "temperature must be more than 0"),
        ({"separated": True}, "--separated is read by answer_selection"),
    ):
        with pytest.raises(InputError, match=message):
            task_of(**flags)
    text = TextEncoder(tokenizers["bert_like"], 16)
    with pytest.raises(InputError, match=r"data, row 2: label must be 1"):
        encode_rows([task_of()], [{"q": "a", "a": "b", "label": x} for x in (1, 5)], text, "data")


# ---- scores


def records_of(scores):
    return [{"score": float(score), "cosine": float(score)} for score in scores]


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_scores(tokenizers, loss_fn):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    rows = rows_of() + rows_of(3)
    task = task_of(loss_fn=loss_fn)
    features = encode_rows([task], rows, TextEncoder(tokenizers["bert_like"], 16), "data")
    scores, labels = rng.uniform(-1, 1, len(rows)), [row["label"] for row in rows]
    got = task.score(records_of(scores), features, rows)
    f1 = max(metrics.f1_score(labels, scores >= t) for t in scores)
    assert got["f1"] == pytest.approx(f1, abs=1e-12)
    assert got["accuracy"] == pytest.approx(np.mean((scores >= got["threshold"]) == labels), abs=1e-12)
    if loss_fn in PAIR_LOSSES:
        assert got["loss"] == pytest.approx(brute(loss_fn, scores, labels, 0.5), abs=1e-12)
    else:
        assert "loss" not in got  # it is one of batches
    for name, value in trec(scores, labels, [row["q"] for row in rows]).items():
        assert got[name] == pytest.approx(value, abs=1e-9), name


def trec(scores, right, queries):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    names = ("map", "recip_rank", "P_1", "P_5", "P_100", "success_5", "success_100")
    qrel, run = {}, {}
    for i, query in enumerate(queries):
        qrel.setdefault(str(query), {})[str(i)] = int(right[i])
        run.setdefault(str(query), {})[str(i)] = float(scores[i])
    results = pytrec_eval.RelevanceEvaluator(qrel, set(names)).evaluate(run)
    some = [q for q in qrel if any(qrel[q].values())]
    return {name: np.mean([results[q][key] for q in some]) for name, key in zip(RANKING, names, strict=True)}


def test_the_threshold_is_that_of_the_validation_data(tokenizers):
    rows = rows_of(2)
    task = task_of()
    features = encode_rows([task], rows, TextEncoder(tokenizers["bert_like"], 16), "data")
    task.tune(records_of([0.9, 0.5, 0.8, 0.4]), features, rows)
    assert task.threshold == pytest.approx(0.65)
    test = records_of([0.6, 0.1, 0.7, 0.2])
    scores = task.score(test, features, rows)  # at .4 they would be perfect
    assert (scores["accuracy"], scores["threshold"]) == (0.75, task.threshold)
    again = task_of()
    again.load_state(json.loads(json.dumps(task.state())))
    assert [line["prediction"] for line in again.predict(test, features, rows)] == [0, 0, 1, 0]
    assert "prediction" not in next(task_of().predict(test, features, rows))


# ---- every architecture


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_every_architecture(tiny, pooling, tmp_path):
    """A step in which every parameter learns, an evaluation, a prediction, saving and loading with AutoModel."""
    name, config, tokenizer = tiny
    task, rows = task_of(pooling=pooling), rows_of()
    text = TextEncoder(tokenizer, 24)
    features = encode_rows([task], rows, text, "data")
    torch.manual_seed(0)
    heads = Heads({"retrieval": task.make_model(None, config)})
    batch = Collate([task], tokenizer)([features[i] for i in range(len(features))])
    for loss_fn in LOSSES:
        task.args.loss_fn = loss_fn
        heads.zero_grad()
        task.loss(task.logits(heads.models["retrieval"], heads(batch["inputs"]), batch), batch).backward()
        idle = [key for key, p in heads.named_parameters() if p.requires_grad and p.grad is None]
        assert not idle, (name, idle)

    def evaluate(model):
        heads = Heads({"retrieval": model}).eval()
        with torch.no_grad():
            records = task.record(task.logits(model, heads(batch["inputs"]), batch), batch)
        return task.score(records, features, rows), list(task.predict(records, features, rows))

    scores, lines = evaluate(heads.models["retrieval"])
    assert set(RANKING) <= set(scores)
    assert [line["row"] for line in lines] == list(range(1, len(rows) + 1))
    heads.models["retrieval"].save_pretrained(tmp_path)
    assert evaluate(task.make_model(str(tmp_path), config)) == (scores, lines)
    transformers.AutoModel.from_pretrained(tmp_path)


def test_a_mixture_keeps_the_pooler_that_another_task_reads(tokenizers):
    """retrieval has none; seq_class trains that of BERT."""
    retrieval, seq_class = task_of("retrieval+seq_class")
    config = transformers.BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    heads = Heads({task.name: task.make_model(None, config) for task in (retrieval, seq_class)})
    assert heads.models["retrieval"] is heads.models["seq_class"].bert
    assert heads.backbone.pooler is not None


# ---- several processes


SYNC = """
import itertools, sys
from types import SimpleNamespace
import torch, torch.distributed as dist
from funneltfm.tasks.retrieval import Retrieval

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
data = torch.load(f"{folder}/data.pt")
results = []
for loss_fn, share in itertools.product(data["losses"], data["shares"]):  # a share without rows: a batch of weight 0
    model = torch.nn.Linear(4, 3).double()
    model.load_state_dict(data["model"])
    task = Retrieval(SimpleNamespace(
        input_columns=("q", "a"), label_column=None, k=None, loss_fn=loss_fn, scores_fn="cosine_similarity",
        temperature=0.3, margin=0.5, sync_devices=True,
    ))
    n = sum(map(len, share))
    rows = share[rank] or [0]
    weight = len(share[rank]) * 2 / n
    batch = {"retrieval_labels": data["labels"][rows], "queries": data["queries"][rows], "weight": weight}
    loss = task.loss(model(data["x"][rows]), batch) * weight
    model.zero_grad()
    loss.backward()
    gradient = model.weight.grad.clone()
    dist.all_reduce(gradient)  # DDP takes the mean
    results.append(gradient / 2)
if rank == 0:
    torch.save(results, f"{folder}/gradients.pt")
dist.barrier()
dist.destroy_process_group()
"""


def test_gradients_of_two_processes_are_those_of_one_with_all_the_pairs(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).double()
    x, labels = torch.randn(7, 2, 4, dtype=torch.double), torch.tensor([1, 0, 1, 1, 0, 1, 1])
    queries = torch.tensor([0, 0, 0, 1, 1, 2, 3])
    shares = [[[0, 1, 2], [3, 4, 5]], [[0, 1, 2, 3], [4, 5, 6]], [[3], []]]
    data = {"model": model.state_dict(), "x": x, "labels": labels, "queries": queries}
    torch.save(data | {"losses": LOSSES, "shares": shares}, tmp_path / "data.pt")
    env = {"PYTHONPATH": str(ROOT / "pytorch"), "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
    command = [sys.executable, "-c", SYNC]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=env) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    gradients = torch.load(tmp_path / "gradients.pt")
    for (loss_fn, share), gradient in zip(itertools.product(LOSSES, shares), gradients, strict=True):
        read = {"temperature": 0.3} if loss_fn == "in_batch_negatives_loss" else {}
        task = task_of(loss_fn=loss_fn, sync_devices=True, **read)  # alone there is nobody to gather from
        rows = [row for part in share for row in part]
        model.zero_grad()
        batch = {"retrieval_labels": labels[rows], "queries": queries[rows], "weight": 1.0}
        task.loss(model(x[rows]), batch).backward()
        torch.testing.assert_close(gradient, model.weight.grad, rtol=1e-5, atol=1e-6, msg=f"{loss_fn} {share}")


# ---- runs


def flags_of(tmp_path, tokenizer, rows, **flags):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    sizes = "hidden_size=32 num_hidden_layers=1 num_attention_heads=2 intermediate_size=64 max_position_embeddings=100"
    off = " hidden_dropout_prob=0.0 attention_probs_dropout_prob=0.0"
    data = str(tmp_path / "rows.jsonl")
    common = {
        "pipeline": "retrieval", "model": "bert", "pre_trained_tokenizer": str(tmp_path / "tokenizer"),
        "additional_config_kwargs": (sizes + off).split(), "input_columns": ("q", "a"), "max_sequence_length": 32,
        "train_dataset": (data,), "valid_dataset": data, "output_dir": str(tmp_path / "out"), "name": "run",
        "batch_size": 8, "learning_rate": 3e-3, "max_epochs": 3, "scheduler": "constant", "num_sanity_val_steps": 0,
    }  # fmt: skip
    return common | flags


def predictions(tmp_path, name="run", stage="valid"):
    path = tmp_path / f"out/predictions/{name}/{stage}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_a_run_learns(tokenizers, tmp_path, loss_fn):
    rows = rows_of(12)
    flags = flags_of(tmp_path, tokenizers["bert_like"], rows, max_epochs=12, loss_fn=loss_fn)
    unlabelled = tmp_path / "unlabelled.jsonl"
    unlabelled.write_text("".join(json.dumps({"q": row["q"], "a": row["a"]}) + "\n" for row in rows), encoding="utf-8")
    results = train(**flags, test_dataset=flags["valid_dataset"], predict_dataset=str(unlabelled))
    scores = {name.removeprefix("retrieval/"): value for name, value in results["valid"].items()}
    assert scores["mean_average_precision"] > 0.85  # guessing has .75
    assert results["test"] == results["valid"]
    lines = predictions(tmp_path)
    for name, value in trec(*([line[key] for line in lines] for key in ("score", "label", "query"))).items():
        assert scores[name] == pytest.approx(value, abs=1e-9), name
    decided = np.array([line["prediction"] for line in lines])
    assert scores["accuracy"] == pytest.approx(np.mean(decided == [line["label"] for line in lines]), abs=1e-12)
    more = predictions(tmp_path, stage="predict")
    assert [line["prediction"] for line in more] == decided.tolist()
    assert not any("label" in line for line in more)
    saved = json.loads((tmp_path / "out/pre_trained_models/run/best/hyperparameters.json").read_text(encoding="utf-8"))
    assert saved["tasks"]["retrieval"]["threshold"] == scores["threshold"]


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(tokenizers, tmp_path):
    more = {"loss_fn": "in_batch_negatives_loss", "sync_devices": True, "accelerator": "cpu", "learning_rate": 1e-3}
    flags = flags_of(tmp_path, tokenizers["bert_like"], rows_of(9), **more)
    alone = train(**flags | {"name": "alone"})
    together = train(**flags | {"name": "together", "devices": "2", "batch_size": 4})
    assert together["processes"] == 2
    assert alone["steps"] == together["steps"]
    for name, value in alone["valid"].items():
        assert together["valid"][name] == pytest.approx(value, rel=1e-3, abs=1e-3), name
    for one, other in zip(predictions(tmp_path, "alone"), predictions(tmp_path, "together"), strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=1e-3)


# ---- real data


@pytest.mark.skipif(not SHARED.is_dir(), reason="WikiQA is not here: ../shared/data")
def test_wikiqa(tmp_path):
    tokenizer = transformers.BertTokenizer(str(SHARED / "tokenizers/bert-base-uncased/vocab.txt"))
    with open(SHARED / "WikiQA/WikiQA-dev.tsv", encoding="utf-8", newline="") as handle:
        table = list(csv.DictReader(handle, delimiter="\t", quoting=csv.QUOTE_NONE))
    once = {(row["QuestionID"], row["Sentence"]): row for row in table}
    rows = [
        {"q": row["Question"], "a": row["Sentence"], "label": int(row["Label"]), "id": row["QuestionID"]}
        for row in list(once.values())[:400]
    ]
    flags = flags_of(tmp_path, tokenizer, rows, index_column="id", max_epochs=2, batch_size=16, max_sequence_length=64)
    results = train(**flags, log_every_n_steps=1)
    scores = {name.removeprefix("retrieval/"): value for name, value in results["valid"].items()}
    lines = predictions(tmp_path)
    with open(tmp_path / "out/runs/run/metrics.csv", encoding="utf-8", newline="") as handle:
        losses = [float(row["train/retrieval/loss"]) for row in csv.DictReader(handle) if row["train/retrieval/loss"]]
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) / 2
    for name, value in trec(*([line[key] for line in lines] for key in ("score", "label", "query"))).items():
        assert scores[name] == pytest.approx(value, abs=1e-9), name
