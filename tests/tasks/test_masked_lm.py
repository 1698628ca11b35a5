"""Masked language modelling: what is masked, what it costs, packing, and whole runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from funneltfm.data.features import Features
from funneltfm.data.text import NO_WORD, TextEncoder
from funneltfm.errors import InputError
from funneltfm.tasks.base import IGNORED, Collate, Prepare, encode_rows
from funneltfm.tasks.heads import Heads
from funneltfm.tasks.masked_lm import MaskedLM
from funneltfm.training.train import train
from funneltfm.training.train_config import make_train_args

WIKITEXT = Path(__file__).resolve().parents[3] / "shared" / "data" / "wikitext-2" / "wiki.valid.tokens"
TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "Mary lives in New York",
    "",
    "unbelievable tokenization isn't easy",
    "fox",
] * 4
ROWS: list[dict[str, Any]] = [{"text": text, "id": i} for i, text in enumerate(TEXTS)]
KINDS = ("word_piece", "byte_level", "unigram")


def task_of(**flags: Any) -> MaskedLM:
    return MaskedLM(make_train_args(pipeline="masked_lm", **flags))


def features_of(task: MaskedLM, text: TextEncoder, rows: list[dict[str, Any]] = ROWS) -> Features:
    return encode_rows([task], rows, text, "train")


# ---- what is masked


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flags", [{}, {"whole_word_masking": True}, {"exact_masking": True}], ids=str)
def test_labels_are_what_was_there(kind: str, flags: dict[str, Any], tokenizers: dict[str, Any]) -> None:
    task, text = task_of(probability=0.4, **flags), TextEncoder(tokenizers[kind], 64)
    features = features_of(task, text)
    prepare = Prepare([task], text, seed=1)
    n_selected = n_words = 0
    for epoch in range(30):
        for i in range(len(features)):
            clean, example = features[i], prepare(features[i], epoch)
            labels, chosen = example["masked_lm_labels"], example["masked_lm_labels"] != IGNORED
            assert (labels[chosen] == clean["input_ids"][chosen]).all()
            assert (example["input_ids"][~chosen] == clean["input_ids"][~chosen]).all()
            special = clean["word_ids"] == NO_WORD
            assert not chosen[special].any()
            replaced = example["input_ids"][chosen & (example["input_ids"] != clean["input_ids"])]
            assert np.isin(replaced, [text.tokenizer.mask_token_id, *text.ordinary_ids]).all()
            n_selected, n_words = n_selected + chosen.sum(), n_words + (~special).sum()
            words = clean["word_ids"]
            if flags.get("whole_word_masking"):
                assert all(len({*chosen[words == word]}) == 1 for word in set(words) - {NO_WORD})
            if flags.get("exact_masking") and (~special).any():
                assert chosen.sum() == max(1, round(0.4 * (~special).sum()))
    assert n_selected / n_words == pytest.approx(0.4, abs=0.04)


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_that_a_text_spells_are_not_touched(kind: str, tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers[kind]
    task, text = task_of(probability=1.0, probability_masked=0.0, probability_replaced=1.0,
                         probability_unchanged=0.0), TextEncoder(tokenizer, 64)  # fmt: skip
    rows = [{"text": f"fox {tokenizer.mask_token} jumps {tokenizer.sep_token} dog {tokenizer.unk_token}"}]
    (clean,) = (features_of(task, text, rows)[0],)
    example = Prepare([task], text, 0)(clean, 0)
    special = np.isin(clean["input_ids"], text.special_ids)
    assert special.sum() >= 5
    assert (example["masked_lm_labels"] != IGNORED).tolist() == (~special).tolist()
    assert not np.isin(example["input_ids"][~special], text.special_ids).any()


def test_probability_of_nothing() -> None:
    with pytest.raises(InputError, match="--probability is 0"):
        task_of(probability=0.0)


def test_other_shares_are_taken() -> None:
    task_of(probability_masked=0.7, probability_replaced=0.2, probability_unchanged=0.1)
    task_of(probability_masked=0.0, probability_replaced=1.0, probability_unchanged=0.0)  # swapped
    with pytest.raises(InputError, match="must add to 1"):
        task_of(probability_masked=0.7)


# ---- loss and scores


def batch_of(task: MaskedLM, text: TextEncoder, indices: list[int], epoch: int = 0) -> dict[str, Any]:
    features, prepare = features_of(task, text), Prepare([task], text, 3)
    return Collate([task], text.tokenizer)([prepare(features[i], epoch) for i in indices])


@pytest.mark.parametrize("model_type", ["bert", "deberta-v2", "electra", "modernbert", "funnel_tfm"])
def test_loss_is_that_of_the_model_itself(model_type: str, tiny_tokenizer: Any, make_config: Any) -> None:
    task, text = task_of(probability=0.3), TextEncoder(tiny_tokenizer, 64)
    torch.manual_seed(0)
    heads = Heads({"masked_lm": task.make_model(None, make_config(model_type, len(tiny_tokenizer)))}).eval()
    batch = batch_of(task, text, [0, 1, 2, 3])
    if model_type == "modernbert":
        del batch["inputs"]["token_type_ids"]
    logits = task.logits(heads.models["masked_lm"], heads(batch["inputs"]), batch)
    labels = batch["masked_lm_labels"]
    whole = heads.models["masked_lm"](**batch["inputs"], labels=labels)
    torch.testing.assert_close(logits, whole.logits[labels != IGNORED])
    torch.testing.assert_close(task.loss(logits, batch), whole.loss)
    assert task.size(batch) == (labels != IGNORED).sum()


def test_perplexity_is_that_of_all_tokens(tiny_tokenizer: Any) -> None:
    """Not a mean over batches: their numbers of tokens differ."""
    task, text = task_of(probability=0.5), TextEncoder(tiny_tokenizer, 64)
    records: list[Any] = []
    nll, hits = [], []
    rng = np.random.default_rng(0)
    for indices in ([0], [1, 2, 3], [4, 5, 6, 7, 8]):
        batch = batch_of(task, text, indices)
        labels = batch["masked_lm_labels"][batch["masked_lm_labels"] != IGNORED]
        logits = rng.normal(size=(len(labels), len(tiny_tokenizer))).astype(np.float32) * 3
        log_p = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
        nll += (-log_p[range(len(labels)), labels]).tolist()
        hits += (logits.argmax(1) == labels.numpy()).tolist()
        records += task.record(torch.tensor(logits), batch)
    assert len(records) == 9
    assert [record["count"] for record in records][2] == 0  # the empty text
    scores = task.score(records, features_of(task, text).take(range(9)), ROWS)
    assert scores["perplexity"] == pytest.approx(np.exp(np.mean(nll)), rel=1e-6)
    assert scores["loss"] == pytest.approx(np.mean(nll), rel=1e-6)
    assert scores["accuracy"] == np.mean(hits)
    rows = list(task.predict(records, features_of(task, text).take(range(9)), ROWS))
    assert [row["id"] for row in rows] == list(range(9))
    assert rows[2] == {"id": 2, "row": 3, "loss": None, "selected": 0}
    assert sum(row["loss"] * row["selected"] for row in rows if row["selected"]) == pytest.approx(sum(nll), rel=1e-6)
    json.dumps(rows)


def test_no_token_selected(tiny_tokenizer: Any, make_config: Any) -> None:
    task, text = task_of(probability=1e-9), TextEncoder(tiny_tokenizer, 64)
    heads = Heads({"masked_lm": task.make_model(None, make_config("bert", len(tiny_tokenizer)))})
    batch = batch_of(task, text, [0, 2])
    logits = task.logits(heads.models["masked_lm"], heads(batch["inputs"]), batch)
    assert logits.shape == (0, len(tiny_tokenizer))
    loss = task.loss(logits, batch)
    loss.backward()
    assert loss.item() == 0
    assert task.train_scores(logits, batch) == {}
    with pytest.raises(InputError, match="no token of 2 examples was selected"):
        task.score(task.record(logits, batch), features_of(task, text), ROWS)


# ---- blocks (tests/data/test_blocks.py has the rest)


@pytest.mark.parametrize(
    "flags", [{"packing": True, "across_documents": True}, {"packing": True}, {"sentence_pairs": True}]
)
def test_blocks_rebuild_the_text(flags: dict[str, Any], tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["word_piece"]
    task, text = task_of(**flags), TextEncoder(tokenizer, 16)
    features = features_of(task, text)
    kept = [i for n in range(len(features)) for i in features[n]["input_ids"] if i not in text.special_ids]
    expected = [i for row in ROWS for i in tokenizer(row["text"], add_special_tokens=False)["input_ids"]]
    assert kept == [i for i in expected if i not in text.special_ids]
    if flags == {"packing": True, "across_documents": True}:
        assert set(features.lengths[:-1]) == {16}
    else:  # an example has tokens of one row alone
        rows = features.plain["row"]
        for n in range(len(features)):
            of_row = tokenizer(ROWS[rows[n]]["text"], add_special_tokens=False)["input_ids"]
            assert set(features[n]["input_ids"]) <= {*of_row, *text.special_ids}


def test_packing_needs_room(tiny_tokenizer: Any) -> None:
    with pytest.raises(InputError, match="leaves no room for 1 texts beside 2 special tokens"):
        features_of(task_of(packing=True), TextEncoder(tiny_tokenizer, 2))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"packing": True, "sentence_pairs": True}, "two ways to make blocks"),
        ({"across_documents": True}, "--across_documents needs --packing"),
        ({"prepare_data_workers": -1}, "prepare_data_workers must not be negative"),
        ({"tokenized_dir": "x", "train_dataset": ["a", "b"], "train_weights": [1.0, 2.0]}, "Leave one out"),
        ({"tokenized_dir": "x", "streaming": True, "train_dataset": ["a"], "max_steps": 1}, "does not go with"),
        ({"prepare_data_workers": 1, "streaming": True, "train_dataset": ["a"], "max_steps": 1}, "does not go with"),
    ],
)  # fmt: skip
def test_flags_that_do_not_go_together(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_train_args(pipeline="masked_lm", **flags)
    with pytest.raises(InputError, match="is read by"):
        make_train_args(pipeline="seq_class", **flags)


# ---- whole runs


def run(tmp_path: Path, tokenizer: Any, config: Any, **flags: Any) -> dict[str, Any]:
    config.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    if not data.exists():
        data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return train(**({
        "pipeline": "masked_lm", "name": "run", "output_dir": str(tmp_path), "train_dataset": [str(data)],
        "pre_trained_config": str(tmp_path / "model"), "valid_dataset": str(data), "batch_size": 8, "max_epochs": 12,
        "learning_rate": 2e-2, "max_sequence_length": 32,
    } | flags))  # fmt: skip


@pytest.mark.parametrize(
    "flags", [{"packing": True, "across_documents": True}, {"whole_word_masking": True, "exact_masking": True}], ids=str
)
def test_a_run_learns_the_texts(flags: dict[str, Any], tiny_tokenizer: Any, make_config: Any, tmp_path: Path) -> None:
    results = run(tmp_path, tiny_tokenizer, make_config("bert", len(tiny_tokenizer)), **flags)
    assert results["monitor"] == "valid/masked_lm/perplexity"
    lines = (tmp_path / "runs" / "run" / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("valid/masked_lm/perplexity")
    seen = [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]]
    assert results["best"] == pytest.approx(min(seen))
    assert min(seen) < 0.7 * seen[0]
    best = tmp_path / "pre_trained_models" / "run" / "best"
    transformers.AutoModelForMaskedLM.from_pretrained(best)
    rows = [json.loads(line) for line in (tmp_path / "predictions" / "run" / "valid.jsonl").read_text().splitlines()]
    nll = sum(row["loss"] * row["selected"] for row in rows if row["selected"])
    count = sum(row["selected"] for row in rows)
    assert results["valid"]["masked_lm/perplexity"] == pytest.approx(np.exp(nll / count), rel=1e-9)


def test_workers_change_nothing(tiny_tokenizer: Any, make_config: Any, tmp_path: Path) -> None:
    config = make_config("bert", len(tiny_tokenizer))
    losses = []
    for workers in (0, 2):
        run(
            tmp_path, tiny_tokenizer, config, name=f"w{workers}", num_workers=workers, max_epochs=2, log_every_n_steps=1
        )
        lines = (tmp_path / "runs" / f"w{workers}" / "metrics.csv").read_text().splitlines()
        names = lines[0].split(",")
        kept = [i for i, name in enumerate(names) if not name.endswith("_per_second")]
        losses.append([[line.split(",")[i] for i in kept] for line in lines])
    assert losses[0] == losses[1]


@pytest.mark.skipif(not WIKITEXT.is_file(), reason="no wikitext-2 in ../shared/data")
def test_wikitext(tiny_tokenizer: Any, make_config: Any, tmp_path: Path) -> None:
    lines = [line.strip() for line in WIKITEXT.read_text(encoding="utf-8").splitlines() if line.strip()][:60]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    flags: dict[str, Any] = {
        "packing": True,
        "across_documents": True,
        "max_sequence_length": 64,
        "max_epochs": 3,
        "log_every_n_steps": 1,
    }
    results = run(tmp_path, tiny_tokenizer, make_config("bert", len(tiny_tokenizer)), **flags)
    table = [line.split(",") for line in (tmp_path / "runs" / "run" / "metrics.csv").read_text().splitlines()]
    losses = [float(row[table[0].index("train/loss")]) for row in table[1:] if row[table[0].index("train/loss")]]
    assert np.mean(losses[-5:]) < 0.9 * losses[0]

    # Scored again in float64, where logits are the same whatever the batches; and by transformers alone, text by text.
    best = tmp_path / "pre_trained_models" / "run" / "best"
    blocks = {name: flags[name] for name in ("packing", "across_documents", "max_sequence_length")}
    scores = train(
        **blocks, pipeline="masked_lm", name="again", output_dir=str(tmp_path), pre_trained_model=str(best),
        valid_dataset=str(tmp_path / "data.jsonl"), precision="64",
    )["valid"]  # fmt: skip
    task, text = task_of(packing=True, across_documents=True), TextEncoder(tiny_tokenizer, 64)
    features, prepare = features_of(task, text, [{"text": line} for line in lines]), Prepare([task], text, 1337)
    model = transformers.AutoModelForMaskedLM.from_pretrained(best, dtype=torch.float64).eval()
    said, right = [], []
    for i in range(len(features)):
        batch = Collate([task], tiny_tokenizer)([prepare(features[i], -1)])
        chosen = batch["masked_lm_labels"] != IGNORED
        with torch.no_grad():
            said.append(model(**batch["inputs"]).logits[chosen])
        right.append(batch["masked_lm_labels"][chosen])
    logits, labels = torch.cat(said), torch.cat(right)
    assert len(labels) > 300
    assert scores["masked_lm/accuracy"] == pytest.approx((logits.argmax(-1) == labels).double().mean().item(), abs=1e-9)
    # The loss of a token is a float32, the sum of them a float64: with each rounded like that it is the same to 1e-9,
    rounded = -logits.float().log_softmax(-1).take_along_dim(labels[:, None], 1).double().mean().item()
    assert scores["masked_lm/loss"] == pytest.approx(rounded, rel=1e-9)
    assert scores["masked_lm/perplexity"] == pytest.approx(np.exp(rounded), rel=1e-9)
    # without rounding to a bit of float32, and so is the score of the run itself, whose logits are float32 too.
    exact = -logits.log_softmax(-1).take_along_dim(labels[:, None], 1).mean().item()
    assert scores["masked_lm/loss"] == pytest.approx(exact, rel=2**-23)
    assert results["valid"]["masked_lm/loss"] == pytest.approx(exact, rel=1e-6)
