"""Denoising: what is corrupted, what the targets are, and whole runs of BART and T5."""

import copy
import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from tokenizers import processors

from funneltfm.data.features import Features
from funneltfm.data.text import NO_WORD, TextEncoder
from funneltfm.errors import InputError
from funneltfm.tasks.base import Collate, Prepare, encode_rows
from funneltfm.tasks.denoising import Denoising
from funneltfm.training.train import predict, train
from funneltfm.training.train_config import make_train_args

WIKITEXT = Path(__file__).resolve().parents[3] / "shared" / "data" / "wikitext-2" / "wiki.valid.tokens"
TEXTS = [
    "the quick brown fox jumps over the lazy dog . Mr. Smith's unbelievable tokenization isn't easy ! Paris ? fine",
    "Mary lives in New York , Paris and London . she works for Acme Corporation since 1999 .",
    "good",
    "",
    "fox dog",
] * 3
ROWS: list[dict[str, Any]] = [{"text": text, "id": i} for i, text in enumerate(TEXTS)]
INFILLING = ("byte_level", "word_piece", "unigram")


def task_of(**flags: Any) -> Denoising:
    return Denoising(make_train_args(pipeline="denoising", **{"max_sequence_length": 48, **flags}))


def features_of(task: Denoising, text: TextEncoder, rows: list[dict[str, Any]] = ROWS) -> Features:
    return encode_rows([task], rows, text, "rows")


# ---- infilling


@pytest.mark.parametrize("kind", INFILLING)
@pytest.mark.parametrize("flags", [{}, {"whole_word_denoising": True}, {"shuffle_sentences": True}], ids=str)
def test_infilling(kind: str, flags: dict[str, Any], tokenizers: dict[str, Any]) -> None:
    task, text = task_of(**flags), TextEncoder(tokenizers[kind], 48)
    assert not task.spans(text)
    features, prepare, mask = features_of(task, text), Prepare([task], text, 1), text.tokenizer.mask_token_id
    moved = 0
    for i in range(len(features)):
        for epoch in range(8):
            clean, example = features[i], prepare(features[i], epoch)
            ids, words = clean["input_ids"], clean["word_ids"]
            assert example["denoising_labels"].tolist() == ids.tolist()  # the whole text, with its ends
            assert ids[-1] == text.end_id
            seen = example["input_ids"]
            assert len(seen) <= 48
            assert (seen[0], seen[-1]) == (ids[0], ids[-1])
            may_go = (words != NO_WORD) & ~np.isin(ids, text.special_ids)
            left = seen[seen != mask]
            if not flags.get("whole_word_denoising"):
                assert len(ids) - len(left) == round(0.3 * may_go.sum())
            if flags.get("shuffle_sentences"):
                moved += left.tolist() != [i for i in ids.tolist() if i in left][: len(left)]
                assert not np.setdiff1d(left, ids).size
            else:
                steps = iter(ids.tolist())
                assert all(token in steps for token in left.tolist())  # a subsequence
    assert (moved > 0) == bool(flags.get("shuffle_sentences"))


def test_a_tokenizer_without_ends(tokenizers: dict[str, Any]) -> None:
    """The target has one all the same."""
    tokenizer = copy.deepcopy(tokenizers["byte_level"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
    text, task = TextEncoder(tokenizer, 48), task_of()
    example = features_of(task, text)[0]
    assert text.end_id not in example["input_ids"]
    target = Prepare([task], text, 0)(example, 0)["denoising_labels"]
    assert target.tolist() == [*example["input_ids"], text.end_id]


def test_shuffled_sentences_are_whole(tokenizers: dict[str, Any]) -> None:
    """With a budget of 0, what is left is the order."""
    text = TextEncoder(tokenizers["byte_level"], 200)
    task = task_of(shuffle_sentences=True, probability=1e-9, max_sequence_length=200)
    features, prepare = (
        features_of(task, text, [{"text": "One fox . two dogs ! three ? end"}]),
        Prepare([task], text, 0),
    )
    seen = {text.tokenizer.decode(prepare(features[0], epoch)["input_ids"][1:-1]) for epoch in range(200)}
    assert len(seen) == 24
    assert "One fox . two dogs ! three ? end" in seen
    parts = ["One fox .", " two dogs !", " three ?", " end"]
    assert all(sorted(part for part in parts if part in one) == sorted(parts) for one in seen)


# ---- span corruption


@pytest.mark.parametrize("flags", [{}, {"whole_word_denoising": True}, {"closing_sentinel": True}], ids=str)
@pytest.mark.parametrize("share", [0.15, 0.5])
def test_targets_rebuild_the_text_and_end(flags: dict[str, Any], share: float, tokenizers: dict[str, Any]) -> None:
    text = TextEncoder(tokenizers["sentinels"], 48)
    task = task_of(probability=share, **flags)
    assert task.spans(text)
    features, prepare = features_of(task, text), Prepare([task], text, 1)
    sentinels = text.sentinel_ids.tolist()
    for i in range(len(features)):
        for epoch in range(8):
            ids = features[i]["input_ids"].tolist()
            example = prepare(features[i], epoch)
            seen, target = example["input_ids"].tolist(), example["denoising_labels"].tolist()
            assert seen[-1] == target[-1] == text.end_id
            assert len(seen) <= 48
            used = [token for token in target if token in sentinels]
            assert used == sentinels[: len(used)]  # in order, the first is <extra_id_0>
            assert [token for token in seen if token in sentinels] == used[
                : len(used) - bool(flags.get("closing_sentinel"))
            ]
            parts = {token: [] for token in used}
            for token in target[:-1]:
                if token in sentinels:
                    at = token
                else:
                    parts[at].append(token)
            assert [y for x in seen for y in parts.get(x, [x])] == ids
            n = len(ids) - 1
            if n > 1 and not flags.get("whole_word_denoising"):
                assert sum(map(len, parts.values())) == min(max(1, round(share * n)), n - 1)


def test_a_target_that_ends_with_a_separator_has_an_end(tokenizers: dict[str, Any]) -> None:
    """A packed block may end where a document does, and the last token is noise."""
    text = TextEncoder(tokenizers["sentinels"], 48)
    ids = text.tokenizer("One fox two", add_special_tokens=False)["input_ids"]
    block = text.example([[*ids, text.end_id]], [[0] * len(ids) + [NO_WORD]])
    features = Features.of([block | {"row": 0}])
    target = Prepare([task_of()], text, 0)(features[0], 0)["denoising_labels"]
    assert target[-2:].tolist() == [text.end_id, text.end_id]


def test_long_texts_fill_the_encoder(tokenizers: dict[str, Any]) -> None:
    text, task = TextEncoder(tokenizers["sentinels"], 48), task_of()
    long = [{"text": " ".join(TEXTS[:2] * 5)}]
    features = features_of(task, text, long)
    assert len(features[0]["input_ids"]) > 48
    assert len(Prepare([task], text, 0)(features[0], 0)["input_ids"]) == 48
    packed = task_of(packing=True, across_documents=True)
    blocks = features_of(packed, text, ROWS)
    seen = [len(Prepare([packed], text, 0)(blocks[i], 0)["input_ids"]) for i in range(len(blocks))]
    assert seen[:-1] == [48] * (len(seen) - 1)
    assert len(seen) > 3


def test_sentinels_that_a_text_has_are_left_to_it(tokenizers: dict[str, Any]) -> None:
    text, task = TextEncoder(tokenizers["sentinels"], 48), task_of(probability=0.4)
    features = features_of(task, text, [{"text": "good <extra_id_0> fine <extra_id_2> fox"}])
    for epoch in range(20):
        example = Prepare([task], text, 0)(features[0], epoch)
        both = example["input_ids"].tolist() + example["denoising_labels"].tolist()
        assert both.count(text.sentinel_ids[0]) == both.count(text.sentinel_ids[2]) == 1
        assert text.sentinel_ids[1] in example["denoising_labels"]


# ---- what it depends on


def prepared(task: Denoising, text: TextEncoder, features: Features, seed: int, epoch: int) -> list[list[int]]:
    prepare = Prepare([task], text, seed)
    return [prepare(features[i], epoch)["input_ids"].tolist() for i in range(len(features))]


@pytest.mark.parametrize("kind", ["byte_level", "sentinels"])
def test_masks_are_of_seed_epoch_and_example_alone(kind: str, tokenizers: dict[str, Any]) -> None:
    flags = {"shuffle_sentences": True} if kind == "byte_level" else {}
    task, text = task_of(**flags), TextEncoder(tokenizers[kind], 48)
    features = features_of(task, text)
    first = prepared(task, text, features, 1, 0)
    assert first == prepared(task, text, features, 1, 0)
    others = [prepared(task, text, features, seed, epoch) for seed, epoch in ((2, 0), (1, 1), (1, -1))]
    for i in (0, 1, 5, 6):
        assert len({str(one[i]) for one in (first, *others)}) >= 3
    assert first[0] != first[5]  # an equal text, another example
    with multiprocessing.get_context("fork").Pool(2) as workers:
        assert workers.starmap(prepared, [(task, text, features, 1, 0)] * 2) == [first, first]


# ---- whole runs


def flags_of(tmp_path: Path, tokenizer: Any, model: str, make_writer: Any, **more: Any) -> dict[str, Any]:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {
        "pipeline": "denoising", "model": model, "additional_config_kwargs": make_writer(model),
        "pre_trained_tokenizer": str(tmp_path / "tokenizer"), "train_dataset": (str(data),),
        "valid_dataset": str(data), "name": "run", "output_dir": str(tmp_path), "accelerator": "cpu", "batch_size": 4,
        "max_sequence_length": 48, "log_every_n_steps": 1, "max_epochs": 2, "learning_rate": 3e-3,
        "num_sanity_val_steps": 0,
    } | more  # fmt: skip


@pytest.mark.parametrize("model", ["bart", "t5"])
def test_a_run(model: str, tokenizers: dict[str, Any], make_writer: Callable[..., Any], tmp_path: Path) -> None:
    tokenizer = tokenizers["sentinels" if model == "t5" else "byte_level"]
    flags = flags_of(tmp_path, tokenizer, model, make_writer, max_epochs=6, learning_rate=1e-2, seed=5)
    results = train(**flags)
    scores = results["valid"]
    assert set(scores) == {"denoising/accuracy", "denoising/perplexity", "denoising/loss"}
    assert scores["denoising/loss"] < 0.95 * np.log(len(tokenizer))
    best = tmp_path / "pre_trained_models/run/best"
    net = transformers.AutoModelForSeq2SeqLM.from_pretrained(best).eval()
    again = predict(pre_trained_model=str(best), predict_dataset=flags["valid_dataset"], accelerator="cpu")
    written = [json.loads(line) for line in (tmp_path / "predictions/run/valid.jsonl").read_text().splitlines()]
    assert [row["id"] for row in again] == list(range(len(ROWS)))
    assert [row["loss"] for row in again] == pytest.approx([row["loss"] for row in written], abs=1e-5)
    # The saved model says what the run says, on the same masks.
    task, text = task_of(), TextEncoder(transformers.AutoTokenizer.from_pretrained(best), 48)
    features = features_of(task, text)
    example = Prepare([task], text, 5)(features[0], -1)
    batch = Collate([task], text.tokenizer)([example])
    labels = batch["denoising_labels"]
    assert net(**batch["inputs"], labels=labels).loss.item() == pytest.approx(again[0]["loss"], abs=1e-5)
    assert again[0]["selected"] == labels.shape[1]


@pytest.mark.parametrize("more", [{}, {"packing": True, "across_documents": True}], ids=str)
@pytest.mark.parametrize("model", ["bart", "t5"])
def test_kept_tokens_train_as_those_in_memory(
    model: str, more: dict[str, Any], tokenizers: dict[str, Any], make_writer: Callable[..., Any], tmp_path: Path
) -> None:
    """Also where texts may be longer than what the encoder sees."""
    tokenizer = tokenizers["sentinels" if model == "t5" else "byte_level"]
    flags = flags_of(tmp_path, tokenizer, model, make_writer, max_epochs=1, **more)
    kept = {"tokenized_dir": str(tmp_path / "kept"), "prepare_data_workers": 1}
    results = [train(**flags), train(**flags | kept | {"name": "kept"})]
    n_kept = len(list((tmp_path / "kept").iterdir()))
    results.append(train(**flags | kept | {"name": "again"}))
    assert results[0]["valid"] == results[1]["valid"] == results[2]["valid"]
    assert len(list((tmp_path / "kept").iterdir())) == n_kept == 1  # for training and validation, of the same texts
    if model == "t5":
        train(**flags | kept | {"name": "other", "probability": 0.3})
        assert len(list((tmp_path / "kept").iterdir())) == 2  # other lengths


@pytest.mark.parametrize("model", ["bart", "t5"])
def test_a_cut_run_ends_bit_equal(
    model: str, tokenizers: dict[str, Any], make_writer: Any, train_cut: Callable[..., Any], tmp_path: Path
) -> None:
    """In the middle of the second of three epochs, with dropout and workers."""
    tokenizer = tokenizers["sentinels" if model == "t5" else "byte_level"]
    more = {"max_multi_token_predictions": 2} if model == "t5" else {"shuffle_sentences": True, "num_workers": 2}
    dropout = make_writer(model, **{"dropout_rate" if model == "t5" else "dropout": 0.2})
    flags = flags_of(tmp_path, tokenizer, model, make_writer, max_epochs=3, checkpoint_interval=5, **more)
    train_cut(flags | {"additional_config_kwargs": dropout}, at_step=6)


def test_what_does_not_go(tokenizers: dict[str, Any]) -> None:
    bare, with_mask, with_sentinels = (
        TextEncoder(tokenizers[kind]) for kind in ("sentinels", "byte_level", "sentinels")
    )
    with pytest.raises(InputError, match="needs a tokenizer with a mask token"):
        task_of(denoising_objective="infilling").spans(bare)
    with pytest.raises(InputError, match="span corruption needs 1 sentinels at least"):
        task_of(denoising_objective="span_corruption").spans(with_mask)
    with pytest.raises(InputError, match="--shuffle_sentences is for infilling"):
        task_of(shuffle_sentences=True).spans(with_sentinels)
    with pytest.raises(InputError, match="--closing_sentinel is for span corruption"):
        task_of(closing_sentinel=True).spans(with_mask)
    with pytest.raises(InputError, match="--probability is 1"):
        task_of(probability=1.0)
    with pytest.raises(InputError, match="--probability is 0"):
        task_of(probability=0.0)
    with pytest.raises(InputError, match="mean_span_length must be more than 0"):
        task_of(mean_span_length=0.0)
    with pytest.raises(InputError, match="--whole_word_denoising is read by denoising"):
        make_train_args(pipeline="masked_lm", whole_word_denoising=True)
