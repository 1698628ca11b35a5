"""Tasks together: what they share, and that a mixture is the weighted sum of its parts."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from funneltfm.data.columns import filtered
from funneltfm.data.sources import concatenate, open_rows, shard
from funneltfm.data.text import TextEncoder
from funneltfm.errors import InputError
from funneltfm.tasks.base import Collate, Prepare, Task, encode_rows, identity, make_tasks
from funneltfm.tasks.heads import Heads
from funneltfm.training.outputs import save_model
from funneltfm.training.task_module import TaskModule
from funneltfm.training.train import train
from funneltfm.training.train_config import make_train_args

ROWS = [
    {"id": "a", "text": "the quick brown fox", "words": ["the", "quick", "brown", "fox"], "label": "x",
     "labels": ["O", "B-A", "I-A", "O"]},
    {"id": "b", "text": "unbelievable tokenization in Paris", "words": ["unbelievable", "tokenization", "in", "Paris"],
     "label": "y", "labels": ["O", "O", "O", "B-A"]},
    {"id": "c", "text": "Mary", "words": ["Mary"], "label": "x", "labels": ["B-A"]},
]  # fmt: skip
MIXTURES = ("masked_lm+seq_class", "masked_lm+token_class", "seq_class+token_class", "token_class+masked_lm+seq_class")


def tasks_of(pipeline: str, **flags: Any) -> tuple[list[Task], Any]:
    args = make_train_args(pipeline=pipeline, **flags)
    tasks = make_tasks(pipeline, args)
    for task in tasks:
        task.learn(ROWS)
    return tasks, args


def batch_of(tasks: list[Task], tokenizer: Any, seed: int = 0, epoch: int = 0, **flags: Any) -> dict[str, Any]:
    """All rows as one batch, of a step of its own."""
    text = TextEncoder(tokenizer, 32)
    features = encode_rows(tasks, ROWS, text, "train")
    prepare = Prepare(tasks, text, seed)
    batch = Collate(tasks, tokenizer, **flags)([prepare(features[i], epoch) for i in range(len(features))])
    return batch | {"weight": 1.0, "step_sizes": batch["sizes"]}


def module_of(tasks: list[Task], args: Any, models: dict[str, Any]) -> TaskModule:
    module = TaskModule(Heads({task.name: models[task.name] for task in tasks}), tasks, args, {})
    module._trainer = SimpleNamespace(log_every_n_steps=10**9, global_step=0, accumulate_grad_batches=1)  # type: ignore
    return module.train()


def models_of(tasks: list[Task], config: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    return {t.name: t.make_model(None, type(config).from_dict(config.to_dict() | t.model_config())) for t in tasks}


# ---- mixtures


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "funnel_tfm"])
@pytest.mark.parametrize("pipeline", MIXTURES)
def test_gradients_of_a_mixture_are_the_weighted_sum(
    pipeline: str, model_type: str, tiny_tokenizer: Any, make_config: Any
) -> None:
    weights = {"masked_lm_weight": 0.5, "seq_class_weight": 2.0, "token_class_weight": 3.0}
    weights = {name: w for name, w in weights.items() if name.removesuffix("_weight") in pipeline.split("+")}
    tasks, args = tasks_of(pipeline, probability=0.5, **weights) if "lm" in pipeline else tasks_of(pipeline, **weights)
    models = models_of(tasks, make_config(model_type, len(tiny_tokenizer)))
    types = model_type != "distilbert"
    batch = batch_of(tasks, tiny_tokenizer, token_types=types)
    module = module_of(tasks, args, models)
    loss = module.training_step(batch, 0)
    loss.backward()
    together = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    expected: dict[str, torch.Tensor] = {}
    total = 0.0
    for task in tasks:  # the same input, the same encoder, one loss at a time, by the model itself
        module.zero_grad()
        model = module.heads.models[task.name]
        labels = batch[f"{task.name}_labels"]
        logits = model(**batch["inputs"]).logits
        alone = torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100)
        alone.backward()
        weight = weights[f"{task.name}_weight"]
        total += weight * alone.item()
        for name, p in module.named_parameters():
            if p.grad is not None:
                expected[name] = expected.get(name, torch.zeros_like(p)) + weight * p.grad
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert {name for name, grad in together.items() if grad.any()} == {n for n, grad in expected.items() if grad.any()}
    for name, grad in together.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_what_corrupts_comes_last(tiny_tokenizer: Any) -> None:
    for pipeline in ("masked_lm+seq_class", "seq_class+masked_lm", "masked_lm_and_seq_class"):
        assert [task.name for task in make_tasks(pipeline, make_train_args(pipeline=pipeline))] == [
            "seq_class", "masked_lm",
        ]  # fmt: skip


def test_a_mixture_with_words_reads_words_alone(tiny_tokenizer: Any) -> None:
    tasks, _ = tasks_of("seq_class+token_class+masked_lm")
    batch = batch_of(tasks, tiny_tokenizer)
    assert {"seq_class_labels", "token_class_labels", "masked_lm_labels"} <= batch.keys()
    apart = tiny_tokenizer(ROWS[1]["words"], is_split_into_words=True)["input_ids"]
    clean = torch.where(batch["masked_lm_labels"] >= 0, batch["masked_lm_labels"], batch["inputs"]["input_ids"])
    assert clean[1].tolist() == apart


def test_different_texts_cannot_be_mixed(tiny_tokenizer: Any) -> None:
    tasks, _ = tasks_of("seq_class+token_class")
    tasks[0].reader = tasks[0]
    rows = [row | {"text": "another"} for row in ROWS]
    with pytest.raises(InputError, match="seq_class and token_class read different texts of dev"):
        encode_rows(tasks, rows, TextEncoder(tiny_tokenizer), "dev")


@pytest.mark.parametrize("pipeline", MIXTURES)
def test_a_mixture_is_saved_as_a_folder_for_each_task(
    pipeline: str, tiny_tokenizer: Any, make_config: Any, tmp_path: Any
) -> None:
    tasks, args = tasks_of(pipeline)
    models = models_of(tasks, make_config("bert", len(tiny_tokenizer)))
    heads = Heads(models).eval()
    save_model(heads, tasks, tiny_tokenizer, args, tmp_path / "best")
    inputs = batch_of(tasks, tiny_tokenizer, epoch=-1)["inputs"]
    for task in tasks:
        again = getattr(transformers, task.auto).from_pretrained(tmp_path / "best" / task.name).eval()
        torch.testing.assert_close(again(**inputs).logits, heads.models[task.name](**inputs).logits)
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / "best" / task.name)("fox")["input_ids"]
        if task.name == "token_class":
            assert again.config.id2label == {0: "B-A", 1: "I-A", 2: "O"}


def test_tasks_of_a_mixture_have_labels_of_their_own() -> None:
    words = ("seq_class.label_column=id", "seq_class.num_labels=3", "named_entity_recognition.label_weights=1,2,.5")
    (seq, tag, _), args = tasks_of("seq_class+token_class+masked_lm", task_flags=words)
    assert (seq.label_column, seq.args.num_labels, seq.args.label_weights) == ("id", 3, None)
    assert (tag.label_column, tag.args.num_labels, tag.args.label_weights) == ("labels", None, (1.0, 2.0, 0.5))
    assert seq.labels.names == ["a", "b", "c"]
    assert (args.label_column, args.num_labels, args.label_weights) == (None, None, None)


@pytest.mark.parametrize(
    ("pipeline", "word", "message"),
    [
        ("seq_class", "seq_class.num_labels=2", "there is seq_class alone"),
        ("seq_class+token_class", "seq_class.num_labels", "NAME=VALUE, .*seq_class.label_column, seq_class.num_labels"),
        ("seq_class+token_class", "num_labels=2", "got 'num_labels=2'"),
        ("seq_class+token_class", "seq_class.num_labels=two", "a whole number"),
        ("seq_class+token_class", "token_class.label_weights=1,x", "numbers with commas"),
        ("seq_class+token_class", "seq_class.label_column=", "got 'seq_class.label_column='"),
        ("seq_class+token_class", "retrieval.label_column=x", "of seq_class.label_column"),
        ("seq_class+masked_lm", "masked_lm.num_labels=2", "of seq_class.label_column"),
        ("seq_class+token_class", "token_class.probability=.2", "of seq_class.label_column"),
    ],
)
def test_what_is_no_flag_of_a_task_of_the_mixture(pipeline: str, word: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_train_args(pipeline=pipeline, task_flags=(word,))


def test_flags_that_a_mixture_does_not_take() -> None:
    with pytest.raises(InputError, match="--packing is for tasks that need texts alone, but seq_class reads labels"):
        tasks_of("masked_lm+seq_class", packing=True)
    with pytest.raises(InputError, match="token_class reads one column"):
        tasks_of("seq_class+token_class", input_columns=["a", "b"])


# ---- exactness of what is dealt


@pytest.mark.parametrize("pipeline", ["masked_lm", "token_class", "masked_lm+token_class+seq_class"])
def test_a_step_in_parts_is_the_step(
    pipeline: str, tiny_tokenizer: Any, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of different lengths on two processes with two batches each: as one batch of all. A mean of means is not
    the mean over tokens."""
    tasks, args = tasks_of(pipeline, **({"label_weights": (1.0, 2.0, 0.5)} if pipeline == "token_class" else {}))
    models = models_of(tasks, make_config("bert", len(tiny_tokenizer)))
    module = module_of(tasks, args, models)
    text = TextEncoder(tiny_tokenizer, 32)
    features = encode_rows(tasks, ROWS, text, "train")
    prepare, collate = Prepare(tasks, text, 1), Collate(tasks, tiny_tokenizer)
    examples = [prepare(features[i], 0) for i in range(3)]
    whole = collate(examples)
    module.training_step(whole | {"weight": 1.0, "step_sizes": whole["sizes"]}, 0).backward()
    expected = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    # rank 0: row 0, then row 2; rank 1: row 1, then one that does not count
    parts = [(0, examples[0], 4 / 3), (0, examples[2], 4 / 3), (1, examples[1], 4 / 3), (1, examples[0], 0.0)]
    dealt = [(rank, collate([example]) | {"weight": weight}) for rank, example, weight in parts]
    steps = [
        {name: sum(b["sizes"][name] for r, b in dealt if r == rank and b["weight"]) for name in whole["sizes"]}
        for rank in (0, 1)
    ]
    monkeypatch.setattr("funneltfm.training.ranks.gather", lambda value: steps)
    module._trainer.accumulate_grad_batches = 2  # type: ignore[union-attr]
    for rank, batch in dealt:
        (module.training_step(batch | {"step_sizes": steps[rank]}, 0) / 4).backward()
    for name, p in module.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.slow
def test_processes_and_accumulation_change_nothing(tiny_tokenizer: Any, make_config: Any, tmp_path: Path) -> None:
    """A run in two processes that accumulate, and one of the same steps: token losses too are those of whole steps."""
    make_config("bert", len(tiny_tokenizer)).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    some = ["the", "quick", "brown", "fox", "unbelievable", "Paris"]
    words = [rng.choice(some, n).tolist() for n in rng.integers(1, 12, 22)]
    tags = [rng.choice(["O", "B-X", "I-X"], len(sentence)).tolist() for sentence in words]
    rows = [{"words": w, "labels": t, "label": len(w) % 2} for w, t in zip(words, tags, strict=True)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = str(tmp_path / "d.jsonl")
    outcomes = []
    for name, flags in {"one": {"batch_size": 8}, "dealt": {"batch_size": 2, "devices": "2"}}.items():
        results = train(
            pipeline="masked_lm+token_class+seq_class", name=name, output_dir=str(tmp_path), train_dataset=[data],
            pre_trained_config=str(tmp_path / "model"), valid_dataset=data, max_epochs=2, learning_rate=1e-2,
            max_sequence_length=32, log_every_n_steps=1, accelerator="cpu", masked_lm_weight=0.5,
            accumulate_grad_batches=1 if name == "one" else 2, **flags,
        )  # fmt: skip
        table = list(csv.DictReader((tmp_path / "runs" / name / "metrics.csv").read_text().splitlines()))
        losses = [float(row["train/loss"]) for row in table if row["train/loss"]]
        assert len(losses) == 6
        outcomes.append([*losses, *results["valid"].values()])
    assert outcomes[0] == pytest.approx(outcomes[1], rel=1e-5)


# ---- batches


def test_padding_changes_no_label(tiny_tokenizer: Any) -> None:
    tasks, _ = tasks_of("token_class+masked_lm")
    right = batch_of(tasks, tiny_tokenizer)
    assert right["inputs"]["input_ids"].shape == right["token_class_labels"].shape == right["masked_lm_labels"].shape
    tiny_tokenizer.padding_side = "left"
    try:
        left = batch_of(tasks, tiny_tokenizer, length=20)
    finally:
        tiny_tokenizer.padding_side = "right"
    assert left["inputs"]["input_ids"].shape[1] == 20
    for row in range(3):
        real = [b["inputs"]["attention_mask"][row].bool() for b in (right, left)]
        assert real[1][-1]
        assert real[0][0]
        for name in ("token_class_labels", "masked_lm_labels"):
            assert left[name][row][real[1]].tolist() == right[name][row][real[0]].tolist()
            assert (left[name][row][~real[1]] == -100).all()
        for name, filled in (("input_ids", 0), ("token_type_ids", 0)):
            both = left["inputs"][name][row], right["inputs"][name][row]
            assert both[0][real[1]].tolist() == both[1][real[0]].tolist()
            assert (both[0][~real[1]] == filled).all()


def test_types_are_left_out_for_models_without(tiny_tokenizer: Any) -> None:
    tasks, _ = tasks_of("seq_class")
    assert "token_type_ids" in batch_of(tasks, tiny_tokenizer)["inputs"]
    assert "token_type_ids" not in batch_of(tasks, tiny_tokenizer, token_types=False)["inputs"]


def test_examples_of_several_texts(tiny_tokenizer: Any) -> None:
    collate = Collate([], tiny_tokenizer)
    examples = [
        {"index": i, "input_ids": np.arange(n), "parts": np.array(parts)}
        for i, (n, parts) in enumerate([(5, [2, 3]), (4, [4, 0]), (1, [1])])
    ]
    batch = collate(examples)
    assert batch["inputs"]["attention_mask"].sum(1).tolist() == [2, 3, 4, 0, 1]
    assert batch["inputs"]["input_ids"][1].tolist() == [2, 3, 4, 0]


@pytest.mark.parametrize("number", [0, 1])
def test_what_is_random_depends_on_seed_epoch_and_example(number: int, tiny_tokenizer: Any) -> None:
    tasks, _ = tasks_of("masked_lm" if number == 0 else "seq_class+masked_lm", probability=0.5)

    def masks(seed: int, epoch: int) -> list[list[int]]:
        return batch_of(tasks, tiny_tokenizer, seed, epoch)["inputs"]["input_ids"].tolist()

    assert masks(1, 0) == masks(1, 0)
    assert len({str(masks(seed, epoch)) for seed in (1, 2, 3) for epoch in (-1, 0, 1)}) == 9


def test_no_rows(tiny_tokenizer: Any) -> None:
    tasks, _ = tasks_of("masked_lm")
    with pytest.raises(InputError, match="dev has no rows"):
        encode_rows(tasks, [], TextEncoder(tiny_tokenizer), "dev")


def test_both_names_of_the_columns() -> None:
    both: dict[str, Any] = {"input_columns": ["text"], "input_column": "text"}
    for pipeline in ("seq_class", "masked_lm"):
        (task,) = make_tasks(pipeline, make_train_args(pipeline=pipeline, **both))
        with pytest.raises(InputError, match="name the same thing; give one"):
            task.texts(ROWS, "train")
    with pytest.raises(InputError, match="token_class reads one column"):
        make_tasks("token_class", make_train_args(pipeline="token_class", **both))


def test_a_prediction_says_of_which_row_it_is(tmp_path: Path) -> None:
    """By its own id and by where it stands, whatever was skipped or left out before it."""
    assert identity([{}, {"id": 3, "text": "x"}], 1) == {"id": 3, "row": 2}
    words = [{"id": ["1", "2"]}, {"id": None}, {"text": "x"}]  # CoNLL-U numbers its words
    assert [identity(words, i) for i in range(3)] == [{"row": 1}, {"row": 2}, {"row": 3}]
    path = tmp_path / "rows.csv"
    path.write_text("id,text\na,one\nbad\nb,two\nc,three\n", encoding="utf-8")
    rows = open_rows(str(path), bad_rows="skip")
    kept = concatenate([filtered(rows, ["id != 'a'"]), shard(rows, 3)])
    found = [identity(kept, i) for i in range(3)]
    assert found == [{"id": "b", "row": 4}, {"id": "c", "row": 5}, {"id": "a", "row": 2}]
