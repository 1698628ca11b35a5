"""Summarization: what is read, written and scored, and whole runs, on real data too."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from funneltfm.data.text import TextEncoder
from funneltfm.errors import InputError
from funneltfm.tasks.base import Collate, encode_rows
from funneltfm.tasks.summarization import Summarization
from funneltfm.training.model_source import make_heads
from funneltfm.training.train import predict, train
from funneltfm.training.train_config import make_train_args

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
ROUGES = [
    f"{kind}_{part}"
    for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum")
    for part in ("precision", "recall", "fmeasure")
]
TEXTS = [
    ("the quick brown fox jumps over the lazy dog", "fox jumps"),
    ("Mary lives in New York", "Mary lives"),
    ("she works for Acme Corporation since 1999", "she works"),
    ("Paris and London", "good"),
]
ROWS: list[dict[str, Any]] = [
    {"document": text, "summary": said, "id": f"r{i}"} for i, (text, said) in enumerate(TEXTS * 2)
]


@pytest.fixture(autouse=True)
def packages() -> None:
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")


def task_of(**flags: Any) -> Summarization:
    return Summarization(make_train_args(pipeline="summarization", **flags))


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def flags_of(tmp_path: Path, tokenizer: Any, model: str, make_writer: Any, **more: Any) -> dict[str, Any]:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = write(tmp_path / "rows.jsonl", ROWS)
    return {
        "pipeline": "summarization", "model": model, "additional_config_kwargs": make_writer(model, d_model=32),
        "pre_trained_tokenizer": str(tmp_path / "tokenizer"), "train_dataset": (data,), "valid_dataset": data,
        "name": "run", "output_dir": str(tmp_path), "accelerator": "cpu", "batch_size": 4, "max_sequence_length": 48,
        "max_target_length": 16, "log_every_n_steps": 1, "max_epochs": 2, "num_sanity_val_steps": 0,
        "learning_rate": 3e-3,
    } | more  # fmt: skip


def tokenizer_for(model: str, tokenizers: dict[str, Any]) -> Any:
    return tokenizers["sentinels" if model == "t5" else "byte_level"]


# ---- columns


def test_columns(tokenizers: dict[str, Any]) -> None:
    """A list of sentences, a list of summaries, more summaries in columns of their own, a prefix."""
    row = {"source": ["the fox", "the dog"], "target": ["fox", "dog"], "more": ["lazy"], "title": "Mary"}
    task = task_of(
        document_column=("title", "+source"), summary_column="*target", prefix="fine : ",
        additional_summaries_column=("*more", "other"),
    )  # fmt: skip
    assert task.texts([row], "rows") == [["fine : Mary", "the fox the dog"]]
    assert task.references(row, "rows") == ["fox", "dog", "lazy"]
    text = TextEncoder(tokenizers["byte_level"], 32)
    (example,) = task.encode([row], text, "rows")
    assert text.tokenizer.decode(example["summarization_labels"], skip_special_tokens=True) == "fox"
    (example,) = task.encode([{"source": ["the"], "title": "Mary"}], text, "rows")
    assert "summarization_labels" not in example
    (example,) = task.encode([{"source": ["the"], "title": "Mary", "other": "lazy"}], text, "rows")
    assert text.tokenizer.decode(example["summarization_labels"], skip_special_tokens=True) == "lazy"


def test_rows_that_cannot_be_used(tokenizers: dict[str, Any]) -> None:
    text = TextEncoder(tokenizers["byte_level"], 32)
    with pytest.raises(InputError, match="row 2: expected a text in summary, as other rows have it"):
        task_of().encode([{"document": "a", "summary": "b"}, {"document": "a", "summary": None}], text, "rows")
    with pytest.raises(InputError, match=r"row 1.*document"):
        task_of().encode([{"text": "a", "summary": "b"}], text, "rows")
    with pytest.raises(InputError, match=r"row 1.*\*summary.*empty list"):
        task_of(summary_column="*summary").encode([{"document": "a", "summary": []}], text, "rows")


# ---- generation


def test_options_reach_the_model(tokenizers: dict[str, Any], make_writer: Any) -> None:
    options = {
        "num_beams": 3, "length_penalty": 0.5, "no_repeat_ngram_size": 2, "min_length": 4, "do_sample": True,
        "top_k": 7, "top_p": 0.9, "temperature": 0.7, "repetition_penalty": 1.2, "early_stopping": True,
        "suppress_tokens": (5, 6), "max_length": 9,
    }  # fmt: skip
    args = make_train_args(
        pipeline="summarization", model="bart", additional_config_kwargs=make_writer("bart"), max_sequence_length=32,
        max_target_length=20, **{f"generation_{name}": value for name, value in options.items()},
    )  # fmt: skip
    task = Summarization(args)
    config = make_heads(args, [task], tokenizers["byte_level"]).models["summarization"].generation_config
    assert {name: getattr(config, name) for name in options} == options
    for flags, wanted in (({}, (21, None)), ({"generation_max_new_tokens": 5}, (None, 5))):
        own = make_train_args(
            pipeline="summarization", model="bart", additional_config_kwargs=make_writer("bart"),
            max_sequence_length=32, max_target_length=20, **flags,
        )  # fmt: skip
        config = (
            make_heads(own, [Summarization(own)], tokenizers["byte_level"]).models["summarization"].generation_config
        )
        assert (config.max_length, config.max_new_tokens) == wanted


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"generation_temperature": 0.5}, "temperature=0.5 does nothing without --generation_do_sample"),
        ({"generation_top_k": 5}, "top_k=5 does nothing without --generation_do_sample"),
        ({"generation_length_penalty": 2.0}, "length_penalty=2.0 does nothing without --generation_num_beams"),
        ({"generation_early_stopping": True, "generation_num_beams": 1}, "early_stopping=True does nothing without"),
        ({"generation_suppress_tokens": (3, 99999)}, "suppress_tokens must be ids from 0 to .*; got 99999"),
        ({"generation_bad_words_ids": ("3", "4,99999")}, "bad_words_ids must be ids from 0 to .*; got 99999"),
        ({"generation_temperature": 1.0, "generation_top_k": 0, "generation_length_penalty": 1.0}, None),
        ({"generation_length_penalty": 2.0, "generation_num_beams": 2}, None),
    ],
    ids=str,
)
def test_options_that_need_another(
    flags: dict[str, Any], message: str | None, tokenizers: dict[str, Any], make_writer: Any
) -> None:
    args = make_train_args(
        pipeline="summarization", model="bart", additional_config_kwargs=make_writer("bart"), max_sequence_length=32,
        max_target_length=20, **flags,
    )  # fmt: skip
    task = Summarization(args)
    if message is None:
        net = make_heads(args, [task], tokenizers["byte_level"]).models["summarization"]
        assert net.generation_config.temperature is None
        return
    with pytest.raises(InputError, match=message):
        make_heads(args, [task], tokenizers["byte_level"])


def test_lengths_that_do_not_go(tokenizers: dict[str, Any], make_writer: Any) -> None:
    for flags in ({"generation_min_length": 22}, {"generation_min_new_tokens": 6, "generation_max_new_tokens": 5}):
        args = make_train_args(
            pipeline="summarization", model="bart", additional_config_kwargs=make_writer("bart"),
            max_sequence_length=32, max_target_length=20, **flags,
        )  # fmt: skip
        with pytest.raises(InputError, match=r"at least (22|7) tokens and at most (21|6)"):
            make_heads(args, [Summarization(args)], tokenizers["byte_level"])


def test_lengths_that_the_decoder_does_not_take(tokenizers: dict[str, Any], make_writer: Any) -> None:
    keys = make_writer("bart", max_position_embeddings=24)

    def make(**flags: Any) -> Any:
        args = make_train_args(
            pipeline="summarization", model="bart", additional_config_kwargs=keys, max_sequence_length=16,
            max_target_length=20, **flags,
        )  # fmt: skip
        return make_heads(args, [Summarization(args)], tokenizers["byte_level"]).eval().models["summarization"]

    net = make(generation_max_length=25, generation_min_length=25)
    ids = torch.tensor([[0, 9, 10, 2]])
    assert net.generate(ids, attention_mask=torch.ones_like(ids)).shape == (1, 25)  # the longest that goes
    for flags in ({"generation_max_length": 26}, {"generation_max_new_tokens": 25}):
        with pytest.raises(InputError, match="texts may have 26 tokens, but the model's decoder takes 24"):
            make(**flags)


@pytest.mark.parametrize("model", ["bart", "t5"])
def test_what_is_written_is_what_transformers_writes(model: str, tokenizers: dict[str, Any], make_writer: Any) -> None:
    """Row by row, without padding; and limits hold."""
    tokenizer = tokenizer_for(model, tokenizers)
    for options in ({}, {"num_beams": 2, "no_repeat_ngram_size": 1}, {"min_length": 6, "max_length": 8}):
        args = make_train_args(
            pipeline="summarization", model=model, max_sequence_length=32, max_target_length=10,
            additional_config_kwargs=make_writer(model), **{f"generation_{name}": v for name, v in options.items()},
        )  # fmt: skip
        task = Summarization(args)
        features = encode_rows([task], ROWS[:4], TextEncoder(tokenizer, 32), "rows")
        torch.manual_seed(2)
        net = make_heads(args, [task], tokenizer).eval().models["summarization"]
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(4)
        batch = Collate([task], tokenizer)([features[i] for i in range(4)])
        with torch.no_grad():
            written = task.generate(net, batch)
            for i in range(4):
                ids = torch.from_numpy(features[i]["input_ids"])[None]
                limits = {"max_length": 11, "num_beams": 1} | options
                own = net.generate(ids, attention_mask=torch.ones_like(ids), **limits)[0]
                assert written[i][: len(own)].tolist() == own.tolist()
                assert (written[i][len(own) :] == tokenizer.pad_token_id).all()
                assert options.get("min_length", 1) <= len(own) <= limits["max_length"]


def test_bad_words_are_not_written(tokenizers: dict[str, Any], make_writer: Any) -> None:
    tokenizer = tokenizers["byte_level"]

    def written(**flags: Any) -> list[int]:
        args = make_train_args(
            pipeline="summarization", model="bart", max_sequence_length=32, max_target_length=8,
            additional_config_kwargs=make_writer("bart"), generation_min_length=8, **flags,
        )  # fmt: skip
        task = Summarization(args)
        features = encode_rows([task], ROWS[:1], TextEncoder(tokenizer, 32), "rows")
        torch.manual_seed(2)
        net = make_heads(args, [task], tokenizer).eval().models["summarization"]
        return task.generate(net, Collate([task], tokenizer)([features[0]]))[0, 1:].tolist()

    first = written()
    second = written(generation_bad_words_ids=(str(first[0]), "7,8"))
    assert first[0] not in second


def test_sampling_takes_no_random_numbers_from_the_training(tokenizers: dict[str, Any], make_writer: Any) -> None:
    args = make_train_args(
        pipeline="summarization", model="bart", additional_config_kwargs=make_writer("bart"), max_sequence_length=32,
        generation_do_sample=True, generation_temperature=5.0, max_target_length=20,
    )  # fmt: skip
    task, tokenizer = Summarization(args), tokenizers["byte_level"]
    features = encode_rows([task], ROWS[:4], TextEncoder(tokenizer, 32), "rows")
    net = make_heads(args, [task], tokenizer).eval().models["summarization"]
    batches = [Collate([task], tokenizer)([features[i] for i in some]) for some in ((0, 1), (2, 3))]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = [task.generate(net, batch) for batch in batches]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert all(torch.equal(a, task.generate(net, batch)) for a, batch in zip(first, batches, strict=True))
    assert not torch.equal(first[0][:, 1:5], first[1][:, 1:5])
    task.args.seed = 7
    assert not torch.equal(task.generate(net, batches[0])[:, :5], first[0][:, :5])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"generation_max_length": 9, "generation_max_new_tokens": 9}, "both limit the length"),
        ({"max_multi_token_predictions": 2, "generation_num_beams": 3}, "num_beams does not go with"),
        ({"max_multi_token_predictions": 2, "generation_do_sample": True}, "do_sample does not go with"),
        ({"valid_bert_score": True, "valid_generation": False}, "writes nothing"),
        ({"test_bert_score": True, "bert_score_model": "/nowhere"}, "BERTScore cannot load the encoder"),
        ({"generation_num_beams": 0}, "at least 1"),
        ({"generation_bad_words_ids": ("3", "4,")}, "takes the ids of each word, with commas .*; got '4,'"),
        ({"generation_num_beam_groups": 2}, "no flag generation_num_beam_groups: .* give --generation_num_beams"),
        ({"valid_bleurt_score": True}, "no flag valid_bleurt_score: .*--valid_bert_score"),
        ({"generation_top_p": 1.5, "generation_do_sample": True}, "between 0 and 1"),
        ({"max_target_length": 0}, "at least 1"),
    ],
    ids=str,
)
def test_options_that_do_not_go(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        task_of(**flags)


# ---- whole runs


@pytest.mark.parametrize(
    ("model", "more"),
    [("bart", {}), ("t5", {"max_multi_token_predictions": 3}), ("t5", {"generation_num_beams": 2})],
    ids=str,
)
def test_what_was_learned_is_written(
    model: str, more: dict[str, Any], tokenizers: dict[str, Any], make_writer: Any, tmp_path: Path
) -> None:
    """Four texts are learned by heart; scores, folders and predictions say so."""
    flags = flags_of(tmp_path, tokenizer_for(model, tokenizers), model, make_writer, **more)
    flags |= {
        "max_epochs": None,
        "max_steps": 150,
        "learning_rate": 1e-2,
        "num_warmup_steps": 10,
        "val_check_interval": 150,
    }
    results = train(**flags | {"check_val_every_n_epoch": None, "test_dataset": flags["valid_dataset"]})
    for split in ("valid", "test"):
        scores = results[split]
        assert set(scores) == {
            f"summarization/{name}" for name in (*ROUGES, "sacrebleu", "accuracy", "loss", "perplexity")
        }
        assert scores["summarization/rougeL_fmeasure"] == 1
        assert scores["summarization/accuracy"] == 1
    assert results["monitor"] == "valid/summarization/rougeL_fmeasure"
    written = lines(tmp_path / "predictions/run/valid.jsonl")
    assert written == [
        {"id": row["id"], "row": i, "prediction": row["summary"], "label": [row["summary"]]}
        for i, row in enumerate(ROWS, 1)
    ]
    best = tmp_path / "pre_trained_models/run/best"
    bare = [{"document": row["document"]} for row in ROWS]
    again = predict(
        pre_trained_model=str(best), predict_dataset=write(tmp_path / "bare.jsonl", bare), accelerator="cpu",
        output_file=str(tmp_path / "said.jsonl"),
    )  # fmt: skip
    assert (
        again
        == lines(tmp_path / "said.jsonl")
        == [{"row": i, "prediction": row["summary"]} for i, row in enumerate(ROWS, 1)]
    )
    if not more.get("max_multi_token_predictions"):
        net = transformers.AutoModelForSeq2SeqLM.from_pretrained(best)
        tokenizer = transformers.AutoTokenizer.from_pretrained(best)
        ids = net.generate(**tokenizer(ROWS[0]["document"], return_tensors="pt", return_token_type_ids=False))
        assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == ROWS[0]["summary"]


def test_predicting_otherwise(tokenizers: dict[str, Any], make_writer: Any, tmp_path: Path) -> None:
    """Options of generation may be given to `funneltfm predict`."""
    flags = flags_of(tmp_path, tokenizers["byte_level"], "bart", make_writer, generation_do_sample=True, max_epochs=1)
    train(**flags | {"generation_temperature": 3.0})
    of_run = {
        "pre_trained_model": str(tmp_path / "pre_trained_models/run/best"),
        "predict_dataset": flags["valid_dataset"],
    }
    same = predict(**of_run, accelerator="cpu", batch_size=4)
    assert same == lines(tmp_path / "predictions/run/valid.jsonl")
    greedy = {"generation_do_sample": False, "generation_temperature": 1.0}
    short = predict(**of_run, accelerator="cpu", **greedy, generation_max_new_tokens=1)
    assert all(len(one["prediction"]) < len(other["prediction"]) for one, other in zip(short, same, strict=True))
    assert short == predict(**of_run, accelerator="cpu", batch_size=1, **greedy, generation_max_new_tokens=1)
    with pytest.raises(InputError, match="does nothing without --generation_do_sample"):
        predict(**of_run, accelerator="cpu", generation_do_sample=False)


def test_validation_without_writing(tokenizers: dict[str, Any], make_writer: Any, tmp_path: Path) -> None:
    flags = flags_of(tmp_path, tokenizers["byte_level"], "bart", make_writer, valid_generation=False, max_epochs=1)
    results = train(**flags, test_dataset=flags["valid_dataset"])
    assert set(results["valid"]) == {f"summarization/{name}" for name in ("accuracy", "loss", "perplexity")}
    assert "summarization/rouge1_fmeasure" in results["test"]
    assert results["monitor"] == "valid/summarization/perplexity"
    assert lines(tmp_path / "predictions/run/valid.jsonl")[0]["prediction"] is None
    assert isinstance(lines(tmp_path / "predictions/run/test.jsonl")[0]["prediction"], str)


def test_a_cut_run_ends_bit_equal(
    tokenizers: dict[str, Any], make_writer: Any, train_cut: Callable[..., None], tmp_path: Path
) -> None:
    """With dropout, and with a validation that samples before the cut."""
    flags = flags_of(tmp_path, tokenizers["byte_level"], "bart", make_writer, generation_do_sample=True, max_epochs=4)
    keys = make_writer("bart", dropout=0.2)
    train_cut(flags | {"additional_config_kwargs": keys, "checkpoint_interval": 5, "label_smoothing": 0.1}, at_step=7)


def test_two_processes_write_what_one_writes(tokenizers: dict[str, Any], make_writer: Any, tmp_path: Path) -> None:
    """And learn what it learns; sampled texts too, and with a limit on the batches of the validation."""
    flags = flags_of(tmp_path, tokenizers["byte_level"], "bart", make_writer, max_epochs=1, learning_rate=1e-3)
    data = write(tmp_path / "odd.jsonl", ROWS[:7])
    flags |= {"valid_dataset": data, "generation_do_sample": True, "eval_batch_size": 2, "adamw_epsilon": 1e-3}
    flags |= {"group_by_length": False}
    one = train(**flags | {"name": "one"})
    two = train(**flags | {"name": "two", "devices": "2", "batch_size": 2})
    assert one["valid"] == pytest.approx(two["valid"], rel=1e-6)
    states = [
        torch.load(tmp_path / "checkpoints" / name / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("one", "two")
    ]
    assert all((states[0][name] - states[1][name]).abs().max() < 1e-6 for name in states[0])
    of_one, of_two = (lines(tmp_path / f"predictions/{name}/valid.jsonl") for name in ("one", "two"))
    assert [row["id"] for row in of_two] == [row["id"] for row in ROWS[:7]]
    assert of_one == of_two
    train(**flags | {"name": "few", "limit_val_batches": 2, "valid_generation": True})
    few = lines(tmp_path / "predictions/few/valid.jsonl")
    assert [row["id"] for row in few] == [row["id"] for row in ROWS[:4]]  # drawn by batch, and these are others


def test_bert_score_in_a_run(tokenizers: dict[str, Any], make_writer: Any, tmp_path: Path) -> None:
    tokenizer = tokenizers["word_piece"]
    encoder = tmp_path / "encoder"
    tokenizer.save_pretrained(encoder)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(encoder)
    flags = flags_of(tmp_path, tokenizers["byte_level"], "bart", make_writer, max_epochs=1, test_bert_score=True)
    flags |= {"generation_min_new_tokens": 5}
    flags |= {"test_dataset": flags["valid_dataset"], "bert_score_model": str(encoder), "bert_score_layer": 1}
    results = train(**flags)
    assert 0 < results["test"]["summarization/bert_score_fmeasure"] <= 1
    assert "summarization/bert_score_fmeasure" not in results["valid"]


# ---- real data


def small_tokenizer(texts: list[str], model: str) -> Any:
    """Byte-level BPE of 2000 pieces, with the ends that BART or T5 has."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, special_tokens=special, show_progress=False),
    )
    if model == "bart":
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    else:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)]
        )
    start = {"bos_token": "<s>"} if model == "bart" else {}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", mask_token="<mask>", **start
    )


@pytest.mark.parametrize("model", ["bart", "t5"])
@pytest.mark.parametrize("name", ["DialogSum", "SciTLDR"])
def test_real_data(name: str, model: str, make_writer: Any, tmp_path: Path) -> None:
    """Trains, writes and scores; the scores of the written file are those of the package."""
    from rouge_score.rouge_scorer import RougeScorer

    if name == "DialogSum":
        files = [SHARED / "DialogSum" / f"dialogsum.{split}.jsonl" for split in ("dev", "test")]
        columns: dict[str, Any] = {"document_column": ("dialogue",)}
    else:
        files = [SHARED / "SciTLDR-A" / f"{split}.jsonl" for split in ("train", "test")]
        columns = {"document_column": ("+source",), "summary_column": "*target"}
    if not all(path.is_file() for path in files):
        pytest.skip(f"{name} is not there")
    rows, others = lines(files[0])[:240], lines(files[1])[:12]
    if name == "DialogSum":  # its test set has three summaries of each
        columns |= {"additional_summaries_column": ("summary1", "summary2", "summary3")}
    texts = [" ".join(row.get("source") or [row["dialogue"]]) for row in rows]
    flags = flags_of(tmp_path, small_tokenizer(texts, model), model, make_writer, **columns)
    results = train(
        **flags
        | {
            "train_dataset": (write(tmp_path / "train.jsonl", rows),), "valid_dataset": None,
            "test_dataset": write(tmp_path / "test.jsonl", others), "max_sequence_length": 64, "batch_size": 8,
            "max_target_length": 32, "learning_rate": 1e-2, "generation_no_repeat_ngram_size": 3,
            "generation_min_new_tokens": 5,
        }
    )  # fmt: skip
    logged = (tmp_path / "runs/run/metrics.csv").read_text().splitlines()
    column = logged[0].split(",").index("train/summarization/loss")
    losses = [float(line.split(",")[column]) for line in logged[1:] if line.split(",")[column]]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    written = lines(tmp_path / "predictions/run/test.jsonl")
    assert len(written) == 12
    assert any(row["prediction"] for row in written)
    assert max(len(row["label"]) for row in written) > 1
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for kind in ("rouge1", "rouge2", "rougeL"):
        own = [max(scorer.score(one, row["prediction"])[kind].fmeasure for one in row["label"]) for row in written]
        assert results["test"][f"summarization/{kind}_fmeasure"] == pytest.approx(np.mean(own), abs=1e-9)
