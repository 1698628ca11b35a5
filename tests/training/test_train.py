"""`funneltfm train`: a run from flags to folders, resumed, shared by processes, repeated; what it refuses."""

import csv
import inspect
import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import numpy as np
import pytest
import torch
import transformers
import yaml

from funneltfm.cli.flags import FlagParser
from funneltfm.cli.main import main as run_command
from funneltfm.cli.train import main
from funneltfm.data.features import Features
from funneltfm.errors import InputError
from funneltfm.training import train as train_module
from funneltfm.training.config import flag_fields, other_names
from funneltfm.training.outputs import Outputs
from funneltfm.training.task_module import Split
from funneltfm.training.train import predict, train
from funneltfm.training.train_config import ELSEWHERE, TRAIN_GROUPS, make_predict_args, make_train_args

GOOD, BAD = ["good", "great", "fine", "lovely", "nice"], ["bad", "awful", "poor", "nasty", "ugly"]
FILL = ["the", "film", "was", "a", "story", "about", "people", "and", "places", "in", "town", "with", "some", "music"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *FILL]
TINY = ("hidden_size=16", "num_hidden_layers=1", "num_attention_heads=2", "intermediate_size=32")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with vocab.txt and train, valid and test .jsonl: one word decides the label."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "clusters.txt").write_text("".join(f"{i % 4}\n" for i in range(len(WORDS))))
    for name, n in (("train", 120), ("valid", 40), ("test", 40)):
        with open(folder / f"{name}.jsonl", "w") as handle:
            for i in range(n):
                label = rng.random() < 0.5
                words = [rng.choice(FILL) for _ in range(rng.randint(2, 12))] + [rng.choice(GOOD if label else BAD)]
                rng.shuffle(words)
                row = {"id": i, "text": " ".join(words), "label": "pos" if label else "neg"}
                handle.write(json.dumps(row) + "\n")
    return folder


def flags(data: Path, out: Path, **more: Any) -> dict[str, Any]:
    given = {
        "pipeline": "seq_class", "model": "bert", "name": "run", "output_dir": str(out), "accelerator": "cpu",
        "additional_config_kwargs": TINY, "pre_trained_tokenizer": str(data / "vocab.txt"),
        "train_dataset": [str(data / "train.jsonl")], "valid_dataset": str(data / "valid.jsonl"),
        "test_dataset": str(data / "test.jsonl"), "batch_size": 8, "max_epochs": 3, "learning_rate": 3e-3,
        "log_every_n_steps": 4,
    } | more  # fmt: skip
    return {name: value for name, value in given.items() if name != "batch_size" or "max_tokens" not in more}


def weights(out: Path, name: str = "run") -> dict[str, torch.Tensor]:
    state = torch.load(Outputs(out, name).checkpoints / "last.ckpt", weights_only=True)
    return state["state_dict"]


def rows(out: Path, name: str = "run") -> list[dict[str, str]]:
    with open(Outputs(out, name).run / "metrics.csv", newline="") as handle:
        return [
            {key: value for key, value in row.items() if not key.endswith("_per_second")}
            for row in csv.DictReader(handle)
        ]  # fmt: skip


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_what_the_layout_says(data, tmp_path):
    results = train(**flags(data, tmp_path, learning_rate=1e-2, max_epochs=6))
    out = Outputs(tmp_path, "run")
    assert json.loads(out.results.read_text()) == results
    assert results["steps"] == 90
    assert results["epochs"] == 6
    assert results["test"]["seq_class/accuracy"] > 0.9  # one word decides; chance is a half
    assert results["monitor"] == "valid/seq_class/accuracy"
    assert results["best"] == results["valid"]["seq_class/accuracy"]
    assert results["best"] == max(
        float(r["valid/seq_class/accuracy"]) for r in rows(tmp_path) if r["valid/seq_class/f1"]
    )
    assert {path.name for path in out.models.iterdir()} >= {"best", "ckpt_epoch_5_step_90_final"}
    assert len([path for path in out.models.iterdir() if path.name != "best"]) <= 3
    for split, n in (("valid", 40), ("test", 40)):
        lines = [json.loads(line) for line in (out.predictions / f"{split}.jsonl").read_text().splitlines()]
        source = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
        assert [line["label"] for line in lines] == [row["label"] for row in source]
        found = sum(line["prediction"] == line["label"] for line in lines) / n
        assert found == pytest.approx(results[split]["seq_class/accuracy"])
        assert all(sum(line["scores"].values()) == pytest.approx(1, abs=1e-5) for line in lines)
    card = (out.best / "README.md").read_text()
    assert "seq_class" in card
    assert f"{results['test']['seq_class/accuracy']:.4f}" in card
    assert yaml.safe_load(card.partition("```yaml")[2].partition("```")[0]) == yaml.safe_load(out.config.read_text())


def test_the_best_folder_reloads_with_the_auto_classes(data, tmp_path):
    train(**flags(data, tmp_path, learning_rate=1e-2))
    out = Outputs(tmp_path, "run")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out.best).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out.best)
    assert model.config.id2label == {0: "neg", 1: "pos"}
    source = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    lines = [json.loads(line) for line in (out.predictions / "test.jsonl").read_text().splitlines()]
    with torch.no_grad():
        for row, line in zip(source[:10], lines, strict=False):
            scores = model(**tokenizer(row["text"], return_tensors="pt")).logits[0].softmax(-1)
            assert list(line["scores"].values()) == pytest.approx(scores.tolist(), abs=1e-5)


# Those of the older framework's parsers, -k aside.
OLDER_FLAGS = """
pipeline model name seed early_stopping patience monitor monitor_direction output_dir ckpt_path
stochastic_weight_averaging dynamo_fallback_eager devices_stats shuffle_sentences max_multi_token_predictions
accelerator strategy devices num_nodes precision fast_dev_run max_epochs min_epochs max_steps min_steps
limit_train_batches limit_val_batches limit_test_batches limit_predict_batches val_check_interval
check_val_every_n_epoch num_sanity_val_steps log_every_n_steps accumulate_grad_batches gradient_clip_val
gradient_clip_algorithm deterministic benchmark barebones profiler reload_dataloaders_every_n_epochs
num_workers disable_memory_pinning batch_size eval_batch_size iterable prepare_data_per_node prepare_data_workers
prepare_data_batch_size prepare_data_do_not_use_cache temporary_data_folder keep_in_memory
train_dataset train_config train_shard_dataset reload_train_dataset_every_epoch
valid_dataset valid_config valid_shard_dataset reload_valid_dataset_every_epoch
test_dataset test_config test_shard_dataset reload_test_dataset_every_epoch
predict_dataset predict_config predict_shard_dataset reload_predict_dataset_every_epoch
checkpoint_interval no_val_checkpointing no_epoch_checkpointing
extended_token_type_ids pad_to_k input_columns input_column label_column index_column label_weights num_labels
metrics_empty_target_action separated grouping selection scores_column classification_head_type
probability probability_masked probability_replaced probability_unchanged whole_word_masking whole_word_detection
whole_word_denoising mean_span_length max_number_of_spans seq_class_weight masked_lm_weight token_class_weight
token_detection_weight beta update_only_on_predictions clusters_filename save_additional_data_interval
sample_function pre_trained_generator_config pre_trained_generator_model tie_generator_discriminator_embeddings
generator_size query_column context_column answers_column doc_stride max_query_length max_answer_length n_best_size
document_column summary_column additional_summaries_column prefix valid_bert_score test_bert_score
valid_bleurt_score test_bleurt_score
generation_min_length generation_max_length generation_min_new_tokens generation_max_new_tokens generation_do_sample
generation_early_stopping generation_num_beams generation_temperature generation_top_k generation_top_p
generation_typical_p generation_repetition_penalty generation_length_penalty generation_num_return_sequences
generation_num_beam_groups generation_diversity_penalty generation_penalty_alpha generation_bad_words_ids
generation_force_words_ids generation_no_repeat_ngram_size generation_encoder_no_repeat_ngram_size
generation_max_time generation_renormalize_logits generation_suppress_tokens generation_begin_suppress_tokens
generation_forced_decoder_ids
sync_devices loss_fn scores_fn max_sequence_length pre_trained_model pre_trained_tokenizer pre_trained_config
additional_config_kwargs compile temporary_models_folder optimizer scheduler scheduler_interval scheduler_frequency
learning_rate weight_decay adamw_epsilon adamw_betas adamw_amsgrad num_warmup_steps adafactor_epsilon adafactor_beta1
adafactor_decay_rate adafactor_clip_threshold fuse_adam_epsilon fuse_adam_betas fuse_adam_amsgrad tfadamw_epsilon
tfadamw_betas tfadamw_amsgrad num_cycles end_learning_rate lr_decay_power layerwise_lr_decay_power scheduler_cycle
num_constant_steps decay_power
"""


def test_every_older_flag_and_argument_of_the_trainer_is_a_flag_or_told_about():
    flags = flag_fields(TRAIN_GROUPS).keys() | other_names(TRAIN_GROUPS).keys()
    assert set(OLDER_FLAGS.split()) <= flags | ELSEWHERE.keys()
    assert set(inspect.signature(lightning.Trainer).parameters) <= flags | ELSEWHERE.keys()
    assert not flags & ELSEWHERE.keys()
    for name, told in ELSEWHERE.items():
        with pytest.raises(InputError, match=re.escape(told)):
            train(pipeline="seq_class", **{name: True})
    with pytest.raises(InputError, match=re.escape(told)):  # the last one, for a parser takes its time
        main(["--pipeline=seq_class", f"--{name}=1"])


def test_second_names_are_the_same_flag(tmp_path):
    decay = {"scheduler": "polynomial_decay", "lr_decay_power": 2.0}
    assert make_train_args(pipeline="seq_class", **decay).decay_power == 2
    with pytest.raises(InputError, match="lr_decay_power and decay_power are the same flag"):
        make_train_args(pipeline="seq_class", **decay, decay_power=3.0)
    parser = FlagParser(TRAIN_GROUPS, prog="train")
    config = tmp_path / "run.yaml"
    config.write_text("lr_decay_power: 2\n", encoding="utf-8")
    assert parser.parse([f"--config={config}"])[0]["decay_power"] == 2
    config.write_text("lr_decay_power: 2\ndecay_power: 2\n", encoding="utf-8")
    with pytest.raises(InputError, match="gives lr_decay_power twice: decay_power is the same"):
        parser.parse([f"--config={config}"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"margin": 0.3, "loss_fn": "in_batch_negatives_loss"}, "--margin is read by --loss_fn contrastive_loss or"),
        ({"temperature": 0.3}, "--temperature is read by --loss_fn in_batch_negatives_loss, not by contrastive_loss"),
    ],
)
def test_what_a_loss_does_not_read(more, message):
    with pytest.raises(InputError, match=message):
        make_train_args(pipeline="retrieval", **more)


def test_where_predictions_cannot_go(data, tmp_path):
    train(**flags(data, tmp_path, max_epochs=1))
    ask = {"pre_trained_model": str(Outputs(tmp_path, "run").best), "predict_dataset": str(data / "test.jsonl")}
    for place in (tmp_path, tmp_path / "no" / "file"):
        with pytest.raises(InputError, match="must be a file in a folder that is there"):
            predict(**ask, output_file=str(place))


def test_without_checkpoints_the_last_model_stays(data, tmp_path):
    results = train(**flags(data, tmp_path, enable_checkpointing=False, inference_mode=False, max_epochs=2))
    out = Outputs(tmp_path, "run")
    assert not out.checkpoints.exists()
    assert {path.name for path in out.models.iterdir()} == {"best", "ckpt_epoch_1_step_30_final"}
    assert "best_step" not in results
    last = [row for row in rows(tmp_path) if row["valid/seq_class/loss"]][-1]
    assert float(last["valid/seq_class/loss"]) == pytest.approx(results["valid"]["seq_class/loss"], abs=1e-6)
    with pytest.raises(InputError, match="there is nothing to resume"):
        train(name="run", output_dir=str(tmp_path), resume=True)


def test_a_run_shorter_than_an_epoch_is_validated_at_its_end(data, tmp_path):
    results = train(**flags(data, tmp_path, max_epochs=None, max_steps=3, accumulate_grad_batches=2))
    assert results["best_step"] == 3
    assert Outputs(tmp_path, "run").resumable[1].is_file()


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({"max_epochs": None, "max_steps": 13, "val_check_interval": 5, "check_val_every_n_epoch": None}, [5, 10, 13]),
        ({"max_epochs": None, "max_steps": 20, "accumulate_grad_batches": 2}, [8, 16, 20]),
        ({"max_epochs": 3, "check_val_every_n_epoch": 2}, [30, 45]),
        ({"max_epochs": 1, "val_check_interval": 0.4}, [6, 12, 15]),
        ({"max_epochs": 1, "val_check_interval": 5}, [5, 10, 15]),
    ],
    ids=str,
)
def test_the_last_step_is_validated_once(data, tmp_path, more, wanted):
    """Its model may be the best, wherever the interval ends."""
    results = train(**flags(data, tmp_path, **more))
    assert [int(row["step"]) for row in rows(tmp_path) if row["valid/seq_class/loss"]] == wanted
    assert results["steps"] == wanted[-1]


# ---- resuming


class Stop(Exception):
    pass


def cut(monkeypatch, at_step: int) -> None:
    """End the run hard, right after this step and before anything of the next."""

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step >= at_step:
            raise Stop

    monkeypatch.setattr(train_module.TaskModule, "on_train_batch_start", on_train_batch_start)


@pytest.mark.parametrize(
    ("at_step", "more"),
    [
        (7, {"checkpoint_interval": 5}),  # in the middle of the first epoch
        (15, {}),  # right after the validation at the end of an epoch
        (17, {}),
        (29, {"checkpoint_interval": 7}),
        (23, {"val_check_interval": 4}),  # after a validation in the middle of the second epoch
        (30, {"val_check_interval": 0.5, "num_workers": 2}),
        (11, {"accumulate_grad_batches": 2, "checkpoint_interval": 3}),
        (9, {"limit_train_batches": 5, "max_steps": 13, "max_epochs": None, "checkpoint_interval": 2}),
        (20, {"pipeline": "masked_lm+seq_class", "checkpoint_interval": 18}),
        (20, {"pipeline": "masked_lm", "checkpoint_interval": 18, "optimizer": "tf_adamw"}),
        (20, {"pipeline": "electra", "embedding_sharing": "gdes", "checkpoint_interval": 18}),
        (20, {"pipeline": "electra+seq_class", "embedding_sharing": "tied", "checkpoint_interval": 18}),
        (20, {"pipeline": "cluster_random_token_detection", "clusters_filename": "", "checkpoint_interval": 18}),
        (16, {"precision": "bf16-mixed"}),
        (20, {"valid_dataset": None, "overwrite": True}),  # saved at ends of epochs
        (44, {"log_every_n_steps": 4, "checkpoint_interval": 43}),  # the last step has a row of its own
        (16, {"early_stopping": True, "patience": 2, "learning_rate": 1e-12}),
        (17, {"streaming": True, "max_steps": 40, "max_epochs": None, "checkpoint_interval": 5}),
        (
            33,
            {
                "streaming": True,
                "max_steps": 40,
                "max_epochs": None,
                "val_check_interval": 10,
                "num_workers": 2,
                "pipeline": "masked_lm",
            },
        ),
        (
            11,
            {
                "streaming": True,
                "max_steps": 14,
                "max_epochs": None,
                "val_check_interval": 0.25,
                "num_workers": 2,
                "accumulate_grad_batches": 2,
                "checkpoint_interval": 2,
                "streaming_buffer": 20,
            },
        ),
        (16, {"precision": "16-mixed"}),
        (9, {"max_tokens": 100, "accumulate_grad_batches": 2, "checkpoint_interval": 2}),
    ],
)
def test_a_cut_run_ends_bit_equal(data, tmp_path, monkeypatch, at_step, more):
    more = {"num_sanity_val_steps": 0} | more
    if "clusters_filename" in more:
        more = more | {"clusters_filename": str(data / "clusters.txt")}
    whole = train(**flags(data, tmp_path / "whole", **more))
    with monkeypatch.context() as patch:
        cut(patch, at_step)
        with pytest.raises(Stop):
            train(**flags(data, tmp_path / "cut", **more))
    resumed = train(
        name="run", output_dir=str(tmp_path / "cut"), resume=True, pipeline=more.get("pipeline", "seq_class")
    )
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")
    for key in ("valid", "test", "steps", "epochs", "best_step", "best"):
        assert resumed.get(key) == whole.get(key), key
    for split in {"valid", "test"} & whole.keys():
        name = f"predictions/run/{split}.jsonl"
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


# ---- prediction


def test_predict_gives_what_the_run_gave(data, tmp_path):
    train(**flags(data, tmp_path, max_epochs=1))
    out = Outputs(tmp_path, "run")
    output = tmp_path / "p.jsonl"
    found = predict(
        pre_trained_model=str(out.best), predict_dataset=str(data / "test.jsonl"), output_file=str(output), batch_size=7
    )
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert lines == found
    of_run = [json.loads(line) for line in (out.predictions / "test.jsonl").read_text().splitlines()]
    for line, other in zip(lines, of_run, strict=True):
        assert line["prediction"] == other["prediction"]
        assert line["scores"] == pytest.approx(other["scores"], abs=1e-5)
    unlabelled = tmp_path / "plain.csv"
    unlabelled.write_text("text\nthe good film\n")
    (row,) = predict(pre_trained_model=str(out.best), predict_dataset=str(unlabelled))
    assert set(row) == {"row", "prediction", "scores"}


def test_predict_takes_data_with_other_columns(data, tmp_path):
    train(**flags(data, tmp_path, max_epochs=1, input_column="text"))
    best = str(Outputs(tmp_path, "run").best)
    source = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(
        json.dumps({"head": row["text"][:9], "rest": row["text"][9:], "all": row["text"], "class": row["label"]}) + "\n"
        for row in source
    ))  # fmt: skip
    expected = predict(pre_trained_model=best, predict_dataset=str(data / "test.jsonl"))
    found = predict(
        pre_trained_model=best, predict_dataset=str(other), input_columns=("all",), label_column="class",
        limit_predict_batches=1, batch_size=7,
    )  # fmt: skip
    assert [row["label"] for row in found] == [row["label"] for row in source[:7]]
    assert [row["prediction"] for row in found] == [row["prediction"] for row in expected[:7]]
    words = ["predict", "--pre_trained_model", best, "--predict_dataset", str(other), "--output_file"]
    assert run_command([*words, str(tmp_path / "p.jsonl"), "--input_columns", "head:rest"]) == 0
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 40
    for more, message in (
        ({}, "expected a column 'text'"),
        ({"question_column": "q"}, "--question_column is read by multiple_choice, not by seq_class"),
        ({"limit_predict_batches": 0}, "limit_predict_batches must be more than 0"),
    ):
        with pytest.raises(InputError, match=message):
            predict(pre_trained_model=best, predict_dataset=str(other), **more)


def test_columns_of_a_mixture_in_prediction():
    own = ("seq_class.label_column=topic", "token_class.label_column=tags", "seq_class.num_labels=3")
    saved = {"pipeline": "seq_class+token_class", "input_column": "words", "task_flags": list(own)}
    flags = {"pre_trained_model": "m", "predict_dataset": "x", "task_flags": ("seq_class.label_column=class",)}
    args = make_predict_args(saved, flags)
    assert set(args.task_flags) == {"seq_class.label_column=class", *own[1:]}
    with pytest.raises(InputError, match=r"--label_column=y, but .*\(seq_class.label_column=topic\).*--task_flags"):
        make_predict_args(saved, {"pre_trained_model": "m", "predict_dataset": "x", "label_column": "y"})


def test_a_trained_model_is_tested_alone(data, tmp_path):
    first = train(**flags(data, tmp_path, max_epochs=1))
    best = str(Outputs(tmp_path, "run").best)
    again = train(
        pipeline="seq_class", pre_trained_model=best, test_dataset=str(data / "test.jsonl"), name="again",
        output_dir=str(tmp_path),
    )  # fmt: skip
    assert again["test"] == pytest.approx(first["test"], abs=1e-6)
    with pytest.raises(InputError, match="trained for seq_class, not for token_class"):
        train(pipeline="token_class", pre_trained_model=best, test_dataset=str(data / "test.jsonl"), name="x")
    with pytest.raises(InputError, match=r"no hyperparameters\.json"):
        train(pipeline="seq_class", pre_trained_model=str(data), test_dataset=str(data / "test.jsonl"), name="x")


def test_a_mixture_is_saved_by_task_and_goes_on_from_there(data, tmp_path):
    results = train(**flags(data, tmp_path, pipeline="masked_lm+seq_class", max_epochs=1))
    best = Outputs(tmp_path, "run").best
    assert set(results["test"]) >= {"seq_class/accuracy"}
    masked = transformers.AutoModelForMaskedLM.from_pretrained(best / "masked_lm")
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(best / "seq_class")
    tables = [model.get_input_embeddings().weight for model in (masked, classifier)]
    assert torch.equal(*tables)  # one encoder
    assert {path.parent.name for path in best.rglob("README.md")} == {"best", "masked_lm", "seq_class"}
    again = train(
        pipeline="masked_lm+seq_class", pre_trained_model=str(best), test_dataset=str(data / "test.jsonl"),
        name="again", output_dir=str(tmp_path),
    )  # fmt: skip
    assert again["test"] == pytest.approx(results["test"], abs=1e-6)


def test_a_pretrained_model_is_trained_with_dropout(data, tmp_path, monkeypatch):
    """from_pretrained leaves models in evaluation mode, and Lightning leaves them as they are."""
    modes = []
    step = train_module.TaskModule.training_step

    def training_step(self, batch, batch_idx):
        modes.append(all(module.training for module in self.heads.modules()))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(train_module.TaskModule, "training_step", training_step)
    train(**flags(data, tmp_path, max_steps=2))
    trained = {"pre_trained_model": str(Outputs(tmp_path, "run").best), "model": None, "name": "again"}
    train(**flags(data, tmp_path, max_steps=2, additional_config_kwargs=("hidden_act=gelu",), **trained))
    assert modes == [True] * 4


# ---- several processes, several seeds


def test_two_processes_learn_what_one_learns(data, tmp_path):
    """Same global batch, no dropout: same scores, same predictions."""
    quiet = (*TINY, "hidden_dropout_prob=0.0", "attention_probs_dropout_prob=0.0")
    one = train(**flags(data, tmp_path / "one", additional_config_kwargs=quiet, batch_size=16))
    two = train(**flags(data, tmp_path / "two", additional_config_kwargs=quiet, batch_size=8, devices="2"))
    assert two["processes"] == 2
    assert two["steps"] == one["steps"]
    for split in ("valid", "test"):
        assert two[split] == pytest.approx(one[split], abs=1e-4)
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert {
            k: float(v) for k, v in a.items() if v and k.endswith("loss") and "/seq_class/" not in k
        } == pytest.approx(
            {k: float(v) for k, v in b.items() if v and k.endswith("loss") and "/seq_class/" not in k}, abs=1e-4
        )


def test_batches_by_tokens_are_shared_by_processes(data, tmp_path):
    """A step of two processes holds twice the tokens; each example is learnt from once an epoch."""
    quiet = (*TINY, "hidden_dropout_prob=0.0", "attention_probs_dropout_prob=0.0")
    two = train(**flags(data, tmp_path / "two", additional_config_kwargs=quiet, devices="2", max_tokens=60))
    more = {"accumulate_grad_batches": 2, "max_tokens": 60}
    one = train(**flags(data, tmp_path / "one", additional_config_kwargs=quiet, **more))
    assert two["processes"] == 2
    assert two["steps"] == one["steps"]
    for split in ("valid", "test"):
        assert two[split] == pytest.approx(one[split], abs=1e-4)


def test_speed_flags_of_prediction(data, tmp_path):
    train(**flags(data, tmp_path, max_epochs=1))
    out = Outputs(tmp_path, "run")
    kept = [json.loads(line) for line in (out.predictions / "test.jsonl").read_text().splitlines()]
    found = predict(
        pre_trained_model=str(out.best),
        predict_dataset=str(data / "test.jsonl"),
        accelerator="cpu",
        max_tokens=64,
        matmul_precision="highest",
    )
    assert [row["prediction"] for row in found] == [row["prediction"] for row in kept]
    for row, line in zip(found, kept, strict=True):
        assert list(row["scores"].values()) == pytest.approx(list(line["scores"].values()), abs=1e-5)
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"streaming": True, "max_steps": 5, "max_epochs": None}, "--max_tokens does not go with --streaming"),
        ({"overfit_batches": 2}, "--overfit_batches counts batches of --batch_size"),
        ({"group_by_length": False}, "leave out --group_by_length"),
        ({"max_tokens": 5}, r"must hold the longest example.*got 5"),
        ({"max_tokens": -1}, "must not be negative"),
        ({"compile": True, "attention_path": "chunked"}, "chunked is not for torch.compile"),
    ],
)
def test_where_batches_by_tokens_make_no_sense(data, tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        train(**flags(data, tmp_path, **({"max_tokens": 120} | more)))


def test_several_seeds_and_their_spread(data, tmp_path):
    results = train(**flags(data, tmp_path, max_epochs=1, seeds=(1, 2, 3)))
    singles = [json.loads(Outputs(tmp_path, f"run-seed_{seed}").results.read_text()) for seed in (1, 2, 3)]
    values = [one["test"]["seq_class/loss"] for one in singles]
    assert len(set(values)) == 3
    spread = results["test"]["seq_class/loss"]
    assert spread["mean"] == pytest.approx(sum(values) / 3)
    assert spread["std"] == pytest.approx((sum((v - sum(values) / 3) ** 2 for v in values) / 2) ** 0.5)
    assert (spread["min"], spread["max"]) == (min(values), max(values))
    assert "| test | seq_class/accuracy |" in (Outputs(tmp_path, "run").run / "results.md").read_text()


@pytest.mark.parametrize("kind", ["folder", "x.parquet"])
def test_a_stream_has_the_same_classes(data, tmp_path, kind):
    """Numbers that a source has names for, in an order of its own and one that no row has."""
    datasets = pytest.importorskip("datasets")
    source = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    names = datasets.ClassLabel(names=["pos", "neg", "none"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    own = [{"text": row["text"], "label": names.str2int(row["label"])} for row in source]
    table = datasets.Dataset.from_list(own, features=features)
    table.save_to_disk(tmp_path / kind) if kind == "folder" else table.to_parquet(tmp_path / kind)
    more = {"train_dataset": [str(tmp_path / kind)], "max_steps": 2, "max_epochs": None}
    for name, streaming in (("whole", False), ("stream", True)):
        train(**flags(data, tmp_path / "out", **more, name=name, streaming=streaming))
        config = transformers.AutoConfig.from_pretrained(Outputs(tmp_path / "out", name).best)
        assert config.id2label == {0: "pos", 1: "neg", 2: "none"}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_filtered(data, tmp_path, monkeypatch, workers):
    """Rows that are left out are nowhere: not in the batches, not in the classes."""
    seen = []
    step = train_module.TaskModule.training_step

    def training_step(self, batch, batch_idx):
        seen.extend(batch["inputs"]["input_ids"].tolist())
        return step(self, batch, batch_idx)

    monkeypatch.setattr(train_module.TaskModule, "training_step", training_step)
    odd = "".join(json.dumps({"text": "music music", "label": "odd"}) + "\n" for _ in range(50))
    (tmp_path / "odd.jsonl").write_text(odd)
    (tmp_path / "train.jsonl").write_text((data / "train.jsonl").read_text() + odd)
    both = [str(tmp_path / name) for name in ("odd.jsonl", "train.jsonl")]
    more = {"train_dataset": both, "train_filter": ("label != odd", "text ~ t")}
    more |= {"streaming": True, "streaming_buffer": 8, "max_steps": 30, "max_epochs": None, "num_workers": workers}
    train(**flags(data, tmp_path / "out", **more))
    config = transformers.AutoConfig.from_pretrained(Outputs(tmp_path / "out", "run").best)
    assert config.id2label == {0: "neg", 1: "pos"}
    assert len(seen) == 240
    odd_ids = [WORDS.index(word) for word in ("music", "music", "[SEP]")]
    assert not any(ids[1:4] == odd_ids for ids in seen)
    with pytest.raises(InputError, match=r"expected a column of .* in the condition 'lable != odd'"):
        train(**flags(data, tmp_path / "out", **more | {"train_filter": ("lable != odd",)}, overwrite=True))


# ---- what it refuses


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"pipeline": "seq_clas"}, "there is no task 'seq_clas'"),
        ({"k": 5}, "--k is read by"),
        ({"precision": "8"}, "precision must be one of"),
        ({"model": "roberta", "pre_trained_config": "BERT"}, "--model=roberta, but .* is of the type bert"),
        ({"model": "brt"}, "no such architecture.* Did you mean"),
        ({"additional_config_kwargs": ("hiden_size=3",)}, "has no 'hiden_size'.* hidden_size"),
        ({"max_sequence_length": 600}, "the model takes 512 tokens"),
        ({"max_epochs": None}, "say how long to train"),
        ({"label_column": "labl"}, "no labels in labl"),
        ({"input_columns": ("txt",)}, "txt.*text"),
        ({"train_dataset": ["nothing.jsonl"]}, "nothing.jsonl"),
        ({"early_stopping": True, "monitor": "valid/seq_class/acc"}, "valid/seq_class/acc"),
        ({"num_labels": 3}, "has 2 classes"),
        ({"strategy": "dpd"}, "strategy must be auto, ddp"),
        ({"strategy": "deepspeed"}, "strategy must be auto, ddp"),
        ({"strategy": "ddp_spawn"}, "strategy must be auto, ddp"),
        ({"optimizer": "fuse_adam", "precision": "16", "gradient_clip_val": 1.0}, "cannot be clipped"),
        ({"streaming": True}, "--streaming needs --max_steps"),
        ({"train_filter": ("label == maybe",)}, "label == maybe"),
        ({"train_weights": (1.0, 2.0)}, "has 2 numbers, --train_dataset 1"),
        ({"train_weights": (0.0,)}, "--train_weights must be more than 0; got 0.0"),
        ({"probability_masked": 0.5, "pipeline": "masked_lm"}, "must add to 1"),
        ({"name": "../x"}, "usable as a folder"),
        ({"accelerator": "gpu"}, "gpu"),
        ({"limit_val_batches": 1.5}, "limit_val_batches must be a number of batches, or a share; got 1.5"),
        ({"limit_test_batches": -1}, "limit_test_batches must be a number of batches, or a share; got -1"),
        ({"limit_train_batches": 0}, "limit_train_batches must be more than 0"),
        ({"val_check_interval": 1000}, "an epoch has 15 batches"),
        ({"monitor": "train/loss"}, "valid/TASK/METRIC"),
        ({"devices_stats": True}, "--loggers csv tensorboard"),
        ({"stochastic_weight_averaging": True, "max_steps": 10}, "it begins by epochs"),
        ({"stochastic_weight_averaging": True, "early_stopping": True}, "begins late"),
        ({"overfit_batches": 2, "train_weights": (1.0,)}, "--overfit_batches takes the first"),
        ({"overfit_batches": -1}, "overfit_batches must be"),
        ({"seed": 2**32}, "seeds must be from 0"),
        ({"seq_class_weight": 0.5}, "there is seq_class alone"),
        ({"num_nodes": 3}, "torchrun --nnodes=3"),
        ({"devices": "-1"}, "should be an int > 0"),
        ({"loggers": ("none", "csv")}, "none is no logger"),
        ({"streaming": True, "max_steps": 10, "max_epochs": 3}, "a stream has no epochs"),
        ({"patience": 3}, "--patience needs --early_stopping"),
        ({"dynamo_fallback_eager": True}, "needs --compile"),
        ({"seeds": (1, 2, 1)}, "--seeds must be different numbers"),
        ({"seeds": (1, 2), "seed": 3}, "takes the place of --seed"),
        ({"min_epochs": 2}, "--min_epochs holds back --early_stopping"),
        ({"test_dataset": None, "test_filter": ("label == pos",)}, "--test_filter needs --test_dataset"),
        ({"limit_predict_batches": 2}, "--limit_predict_batches needs --predict_dataset"),
        ({"valid_dataset": None, "monitor": "valid/seq_class/loss"}, "--monitor needs --valid_dataset"),
        ({"max_tokens": 100, "eval_batch_size": 4}, "leave out eval_batch_size"),
        ({"attention_path": "plain"}, "is for Funnel models"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_left(data, tmp_path, more, message):
    if more.get("pre_trained_config") == "BERT":
        transformers.BertConfig(vocab_size=100).save_pretrained(tmp_path / "bert")
        more = more | {"pre_trained_config": str(tmp_path / "bert")}
    with pytest.raises(InputError, match=message):
        train(**flags(data, tmp_path / "out", **more))
    assert not list((tmp_path / "out").glob("pre_trained_models/*/*"))


def test_a_second_run_of_a_name_needs_a_word(data, tmp_path):
    train(**flags(data, tmp_path, max_epochs=1))
    before = Outputs(tmp_path, "run").results.read_bytes()
    with pytest.raises(InputError, match=r"--resume .*--overwrite"):
        train(**flags(data, tmp_path, max_epochs=1))
    with pytest.raises(InputError, match="was started with --max_epochs=1"):
        train(name="run", output_dir=str(tmp_path), resume=True, max_epochs=2)
    with pytest.raises(InputError, match="no run named other"):
        train(name="other", output_dir=str(tmp_path), resume=True)
    assert Outputs(tmp_path, "run").results.read_bytes() == before
    train(**flags(data, tmp_path, max_epochs=1, overwrite=True))


def test_a_resumed_run_forgets_how_it_was_started(data, tmp_path):
    """--overwrite and --ckpt_path are of the start; a flag at its default is no other one; nothing comes twice."""
    first = train(**flags(data, tmp_path, max_epochs=1, overwrite=True))
    out = Outputs(tmp_path, "run")
    names = sorted(path.name for path in out.models.iterdir())
    again = train(name="run", output_dir=str(tmp_path), resume=True, seed=1337, weight_decay=0.0)
    assert again["test"] == first["test"]
    assert sorted(path.name for path in out.models.iterdir()) == names
    with pytest.raises(InputError, match=r"would remove .*last\.ckpt"):
        train(**flags(data, tmp_path, max_epochs=1, overwrite=True, ckpt_path=str(out.checkpoints / "last.ckpt")))
    assert out.results.is_file()
    started = train(**flags(data, tmp_path, max_epochs=1, name="b", ckpt_path=str(out.checkpoints / "last.ckpt")))
    assert started["test"] == first["test"]
    assert "ckpt_path" not in Outputs(tmp_path, "b").config.read_text()


def test_a_flag_that_takes_more_values_than_it_did_is_the_same(tmp_path):
    outputs = Outputs(tmp_path, "run")
    outputs.run.mkdir(parents=True)
    outputs.config.write_text("pipeline: seq_class\nmax_sequence_length: 16\n")
    given = {"pipeline": "seq_class", "name": "run", "output_dir": str(tmp_path), "resume": True}
    args = train_module.with_run_flags(make_train_args(**given, max_sequence_length=16), outputs)
    assert args.max_sequence_length == (16,)
    with pytest.raises(InputError, match=r"started with --max_sequence_length=16, so it cannot go on with .*32"):
        train_module.with_run_flags(make_train_args(**given, max_sequence_length=(32,)), outputs)


def test_a_table_of_seeds_takes_no_runs_folder(data, tmp_path):
    train(**flags(data, tmp_path, max_epochs=1))
    before = Outputs(tmp_path, "run").results.read_bytes()
    with pytest.raises(InputError, match="has a run of one seed"):
        train(**flags(data, tmp_path, max_epochs=1, seeds=(1, 2)))
    assert Outputs(tmp_path, "run").results.read_bytes() == before


def test_results_are_written_when_all_else_is(data, tmp_path, monkeypatch):
    """--resume of several seeds takes a run with results for a whole one."""

    def fail(*_: Any) -> None:
        raise Stop

    monkeypatch.setattr(train_module, "write_rows", fail)
    with pytest.raises(Stop):
        train(**flags(data, tmp_path, max_epochs=1))
    assert not Outputs(tmp_path, "run").results.exists()


def test_what_is_kept_as_asked(data, tmp_path):
    more = {"max_steps": 3, "loggers": ("none",), "profiler": "simple", "limit_val_batches": 0, "test_dataset": None}
    train(**flags(data, tmp_path, no_epoch_checkpointing=True, **more))
    out = Outputs(tmp_path, "run")
    assert not (out.run / "metrics.csv").exists()
    assert "training_step" in (out.run / "fit-profile.txt").read_text()
    assert {path.name for path in out.models.iterdir()} == {"best", "ckpt_epoch_0_step_3_final"}


def test_the_last_step_has_scores_of_its_own(data, tmp_path):
    train(**flags(data, tmp_path, max_epochs=1, log_every_n_steps=10))
    said = [row["train/seq_class/loss"] for row in rows(tmp_path) if row["train/loss"]]
    assert len(said) == 2
    assert said[0] != said[1]


def test_numbers_of_devices_are_those_of_the_gpus(monkeypatch):
    """--devices 2,3 in two processes is not the first two."""
    given = {}
    monkeypatch.setattr(train_module.ranks, "size", lambda: 2)
    monkeypatch.setattr(train_module.ranks, "local_size", lambda: 2)
    monkeypatch.setattr(train_module.lightning, "Trainer", lambda **kwargs: given.update(kwargs) or Stop)
    for accelerator, expected in (("gpu", [2, 3]), ("cpu", 2)):
        args = train_module.make_train_args(pipeline="seq_class", devices="2,3", accelerator=accelerator)
        with pytest.raises(AttributeError, match="_signal_connector"):
            train_module.make_trainer(args)
        assert given["devices"] == expected


def test_messages_name_the_line_of_a_filtered_row(data, tmp_path):
    path = tmp_path / "t.jsonl"
    lines = [{"text": "a", "label": "x"}, {"text": "b", "label": "neg"}, {"text": None, "label": "neg"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match=r"t\.jsonl, line 3"):
        train(**flags(data, tmp_path, test_dataset=str(path), test_filter=("label != x",)))


# ---- trainer, loggers, signals


def test_early_stopping_waits_as_long_as_its_patience(data, tmp_path):
    results = train(**flags(data, tmp_path, max_epochs=50, learning_rate=1e-12, early_stopping=True, patience=2))
    assert results["epochs"] == 3  # the first is the best, two do not improve
    assert results["best_step"] == 15


def test_a_run_that_stopped_early_stays_where_it_is(data, tmp_path, monkeypatch):
    more = {"max_epochs": 50, "learning_rate": 1e-12, "early_stopping": True, "patience": 2}
    whole = train(**flags(data, tmp_path / "whole", **more))

    def evaluate(*_: Any) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "evaluate", evaluate)
        with pytest.raises(Stop):
            train(**flags(data, tmp_path / "cut", **more))
    resumed = train(name="run", output_dir=str(tmp_path / "cut"), resume=True)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert resumed["steps"] == whole["steps"]
    assert resumed["test"] == whole["test"]


def test_a_monitor_of_the_other_direction(data, tmp_path):
    results = train(**flags(data, tmp_path, monitor="valid/seq_class/loss"))
    losses = [float(row["valid/seq_class/loss"]) for row in rows(tmp_path) if row["valid/seq_class/loss"]]
    assert results["best"] == min(losses)


def test_tensorboard_gets_the_rows_beside_a_folder_named_tensorflow(data, tmp_path, monkeypatch):
    """Run from a folder with a `tensorflow` in it, as the repository's root is."""
    (tmp_path / "tensorflow").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    train(**flags(data, tmp_path / "out", loggers=("csv", "tensorboard"), max_epochs=1))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (tmp_path / "out" / "tensorboard" / "run").glob("version_0")
    events = EventAccumulator(str(folder))
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars("valid/seq_class/accuracy")}
    written = {
        int(r["step"]): float(r["valid/seq_class/accuracy"]) for r in rows(tmp_path / "out") if r["valid/seq_class/f1"]
    }
    assert shown == pytest.approx(written)
    assert "train/loss" in events.Tags()["scalars"]
    (tested,) = events.Scalars("test/seq_class/accuracy")
    results = json.loads(Outputs(tmp_path / "out", "run").results.read_text(encoding="utf-8"))
    assert (tested.step, tested.value) == (results["steps"], pytest.approx(results["test"]["seq_class/accuracy"]))
    assert float(rows(tmp_path / "out")[-1]["test/seq_class/accuracy"]) == results["test"]["seq_class/accuracy"]


def test_wandb_has_a_run_for_each_seed(data, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="Weights & Biases is an extra")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(**flags(data, tmp_path, max_epochs=1, seeds=(1, 2), loggers=("csv", "wandb"), log_every_n_steps=50))
    assert wandb.run is None
    for seed in (1, 2):
        folder = Outputs(tmp_path, f"run-seed_{seed}").run / "wandb"
        (path,) = folder.glob("offline-run-*/run-*.wandb")
        for part in (
            f"run-seed_{seed}",
            "learning_rate",
            "train/loss",
            "valid/seq_class/accuracy",
            "test/seq_class/loss",
        ):
            assert part.encode() in path.read_bytes(), part


@pytest.mark.parametrize(
    "more",
    [
        {"precision": "16"},  # as the older framework's README says it; it refused it
        {"precision": "bf16"},
        {"precision": "64"},
        {"max_epochs": None, "max_steps": 3},
        {"max_epochs": None, "max_time": "00:00:00:02", "scheduler": "constant"},
        {"fast_dev_run": True},
        {"barebones": True, "max_steps": 3},
        {"stochastic_weight_averaging": True},
        {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value", "max_steps": 3},
        {"num_workers": 2, "max_steps": 3},
        {"limit_train_batches": 2, "limit_val_batches": 1, "limit_test_batches": 2},
        {"limit_train_batches": 0.2, "overfit_batches": 0.0},
        {"overfit_batches": 2, "max_steps": 4},
        {"gradient_checkpointing": True, "max_steps": 3},
        {"deterministic": True, "detect_anomaly": True, "max_steps": 3},
        {"profiler": "simple", "max_steps": 3},
        {"valid_dataset": None, "test_dataset": None, "max_steps": 3},
        {"check_val_every_n_epoch": 2},
        {"pad_to_max_length": True, "group_by_length": False, "max_sequence_length": 20, "max_steps": 3},
        {"scheduler_interval": "epoch"},
        {"no_val_checkpointing": True, "no_epoch_checkpointing": True, "save_total_limit": None},
        {"enable_model_summary": True, "devices_stats": False, "max_steps": 3},
    ],
    ids=lambda more: "-".join(more),
)
def test_the_trainers_flags(data, tmp_path, more):
    more = {"max_epochs": 2} | more
    results = train(**flags(data, tmp_path, **more))
    limit = more.get("max_steps", 30)
    assert 0 < results["steps"] <= limit or more.get("max_time")
    if not (more.get("fast_dev_run") or more.get("barebones") or "valid_dataset" in more):
        assert 0 <= results["valid"]["seq_class/accuracy"] <= 1


@pytest.mark.parametrize(
    ("more", "n"),
    [({"limit_test_batches": 2}, 16), ({"limit_test_batches": 0.3}, 12), ({"limit_test_batches": 0.001}, 1),
     ({"limit_test_batches": 2, "eval_batch_size": 3}, 6), ({"limit_test_batches": 9}, 40)],
)  # fmt: skip
def test_a_limited_evaluation_is_of_the_first_of_the_data(data, tmp_path, more, n):
    """Batches are sorted by length; the first of them are of the shortest texts."""
    results = train(**flags(data, tmp_path, **more, max_steps=2, max_epochs=None, name="few"))
    lines = (Outputs(tmp_path, "few").predictions / "test.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == list(range(n))
    assert "seq_class/accuracy" in results["test"]


def test_a_limited_evaluation_by_tokens(data, tmp_path):
    """So many batches have so many examples on average."""
    more = {"max_tokens": 64, "limit_test_batches": 4, "num_sanity_val_steps": 0}
    train(**flags(data, tmp_path, **more, max_steps=2, max_epochs=None))
    lines = (Outputs(tmp_path, "run").predictions / "test.jsonl").read_text().splitlines()
    ids = [json.loads(line)["id"] for line in lines]
    assert ids == list(range(len(ids)))
    assert 12 <= len(ids) <= 28


def test_a_limited_evaluation_takes_whole_groups():
    args = make_train_args(pipeline="retrieval", test_dataset="x", limit_test_batches=1)
    features = Features.of([{"row": i, "input_ids": [1] * (9 - i)} for i in range(6)])
    task = SimpleNamespace(groups=lambda features: np.array([0, 0, 1, 2, 1, 0]))
    module: Any = SimpleNamespace(splits={"test": Split("test", [], features)}, scored=lambda: [task])
    assert train_module._head(args, module, "test", 3).tolist() == [0, 1, 2, 4, 5]
    task.groups = lambda features: None
    assert train_module._head(args, module, "test", 3).tolist() == [0, 1, 2]


def test_the_sanity_validation_sees_the_longest_texts(data, tmp_path, monkeypatch):
    seen = []
    step = train_module.TaskModule.validation_step

    def validation_step(self, batch, batch_idx):
        if self.trainer.sanity_checking:
            seen.append(batch["inputs"]["input_ids"].shape[1])
        return step(self, batch, batch_idx)

    monkeypatch.setattr(train_module.TaskModule, "validation_step", validation_step)
    train(**flags(data, tmp_path, max_steps=1, max_epochs=None))
    texts = [json.loads(line)["text"] for line in (data / "valid.jsonl").read_text().splitlines()]
    assert len(seen) == 2
    assert seen[0] == max(len(text.split()) for text in texts) + 2


@pytest.mark.parametrize("kept", [False, True])
def test_each_split_tells_once_what_is_cut(data, tmp_path, caplog, kept):
    """Of kept data too, when they are read again."""
    more = {"pipeline": "masked_lm", "tokenized_dir": str(tmp_path / "kept")} if kept else {"pipeline": "seq_class"}
    more |= {"max_sequence_length": 8, "max_steps": 1, "max_epochs": None, "test_dataset": None}
    for name in ("one", "two"):
        caplog.clear()
        with caplog.at_level("INFO"):
            train(**flags(data, tmp_path / "out", **more, name=name))
        told = [message for message in caplog.messages if "longer than" in message]
        lengths = {
            split: [len(json.loads(line)["text"].split()) + 2 for line in (data / split).read_text().splitlines()]
            for split in ("train.jsonl", "valid.jsonl")
        }
        assert told == [
            f"{data / split}: {sum(n > 8 for n in of_split)} of {len(of_split)} inputs were longer than "
            f"--max_sequence_length and are cut; the longest had {max(of_split)} tokens"
            for split, of_split in lengths.items()
        ]


def test_the_mixture_of_datasets_keeps_its_shares(data, tmp_path, monkeypatch):
    seen = []
    step = train_module.TaskModule.training_step

    def training_step(self, batch, batch_idx):
        seen.append(batch["index"].tolist())
        return step(self, batch, batch_idx)

    monkeypatch.setattr(train_module.TaskModule, "training_step", training_step)
    both = [str(data / "train.jsonl"), str(data / "valid.jsonl")]
    train(**flags(data, tmp_path, train_dataset=both, train_weights=(1.0, 1.0), max_epochs=1))
    indices = [i for batch in seen for i in batch]
    assert len(indices) == 160
    assert sum(i < 120 for i in indices) == 80


def test_the_configuration_is_for_those_of_several_sets_that_are_on_the_hub(data, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append(args)
        return datasets.Dataset.from_list([{"text": "the good film", "label": "pos"}] * 3)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    more = {"train_config": "plain", "max_steps": 1, "max_epochs": None, "valid_dataset": None, "test_dataset": None}
    train(**flags(data, tmp_path, **more, train_dataset=["owner/name/train", str(data / "train.jsonl")]))
    assert calls == [("owner/name", "plain")]
    more |= {"train_dataset": [str(data / "valid.jsonl"), str(data / "train.jsonl")], "overwrite": True}
    with pytest.raises(InputError, match=r"a configuration \('plain'\) belongs to a set of the Hugging Face hub"):
        train(**flags(data, tmp_path, **more))


def command(data: Path, out: Path, **more: Any) -> list[str]:
    words = []
    for name, value in flags(data, out, **more).items():
        words += [f"--{name}", *([*value] if isinstance(value, list | tuple) else [str(value)])]
    return [sys.executable, "-m", "funneltfm", "train", *map(str, words)]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("devices", ["1", "2"])
def test_a_killed_run_goes_on_to_the_same_end(data, tmp_path, signum, devices):
    more = {"max_epochs": 6, "checkpoint_interval": 3, "devices": devices, "learning_rate": 1e-3}
    whole = train(**flags(data, tmp_path / "whole", **more))
    process = subprocess.Popen(command(data, tmp_path / "cut", **more), stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    out = Outputs(tmp_path / "cut", "run")
    deadline = time.time() + 120
    while not (out.checkpoints / "previous.ckpt").is_file() and time.time() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signum)
    _, said = process.communicate(timeout=120)
    if signum == signal.SIGTERM and process.returncode:
        assert process.returncode == 128 + signum, said
        assert "--resume" in said
    resumed = train(name="run", output_dir=str(tmp_path / "cut"), resume=True)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")
    assert resumed["test"] == whole["test"]
