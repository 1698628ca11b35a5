"""Sparse training and distillation through `funneltfm train`: masks that hold through saving, resuming, two processes
and finetuning, on tiny models.
"""

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from funneltfm.errors import InputError
from funneltfm.sparse import load_sparse
from funneltfm.sparse.export import read_masks
from funneltfm.sparse.masks import densities, lot, sparse_weights
from funneltfm.training import train as train_module
from funneltfm.training.outputs import Outputs
from funneltfm.training.train import predict, train

WORDS = "good great bad awful the film was a story about people and places in town with some music yes no".split()  # noqa: SIM905
TINY = ("hidden_size=16", "num_hidden_layers=1", "num_attention_heads=2", "intermediate_size=32")
PAIR = {"pipeline": "answer_selection", "input_columns": ("text", "other"), "label_column": "right"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with vocab.txt and train and valid .jsonl: one word decides the label."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    for name, n in (("train", 64), ("valid", 16)):
        with open(folder / f"{name}.jsonl", "w") as handle:
            for i in range(n):
                label = rng.random() < 0.5
                words = [rng.choice(WORDS[4:]) for _ in range(rng.randint(2, 9))] + [WORDS[0 if label else 2]]
                tags = ["O" if word in WORDS[4:] else "B-X" for word in words]
                row = {"text": " ".join(words), "label": "pos" if label else "neg", "words": words, "tags": tags}
                row |= {"other": f"the film {i // 2}", "right": i % 2, "options": ["good", "bad"], "answer": i % 2}
                row |= {"question": "what was it ?", "article": row["text"], "context": row["text"]}
                row |= {"answers": {"text": [words[0]], "answer_start": [0]}, "text_of_query": f"a story {i // 4}"}
                handle.write(json.dumps(row) + "\n")
    return folder


def flags(data: Path, out: Path, **more: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "pipeline": "seq_class", "name": "run", "output_dir": str(out), "accelerator": "cpu",
        "train_dataset": (str(data / "train.jsonl"),), "valid_dataset": str(data / "valid.jsonl"), "batch_size": 8,
        "max_steps": 16, "learning_rate": 1e-2, "log_every_n_steps": 4, "num_sanity_val_steps": 0,
    }  # fmt: skip
    if "pre_trained_model" not in more:
        base |= {"model": "bert", "additional_config_kwargs": TINY, "pre_trained_tokenizer": str(data / "vocab.txt")}
    return base | more


METHODS: dict[str, dict[str, Any]] = {
    "static": {},
    "rigl": {"sparsity_method": "rigl", "sparsity_interval": 2, "rigl_drop": 0.5},
    "gradual": {"sparsity_method": "gradual", "sparsity_interval": 2, "sparsity_begin": 2, "sparsity_end": 0.75},
    "rigl_2021": {"sparsity_method": "rigl_2021", "sparsity_interval": 2, "rigl_drop": 0.5},
}


def masks_in(folder: Path) -> dict[str, Tensor]:
    return read_masks(folder)


def off_is_zero(folder: Path) -> None:
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    for name, mask in read_masks(folder).items():
        assert not state[name][~mask].any(), name


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rows(out: Path, name: str = "run") -> list[dict[str, str]]:
    with open(Outputs(out, name).run / "metrics.csv", newline="") as handle:
        return [{k: v for k, v in row.items() if not k.endswith("_per_second")} for row in csv.DictReader(handle)]


# ---- masks


@pytest.mark.parametrize("method", METHODS)
def test_a_sparse_run_and_a_finetuning_that_keeps_its_masks(method: str, data, tmp_path) -> None:
    results = train(**flags(data, tmp_path, sparsity=0.75, val_check_interval=2, **METHODS[method]))
    out = Outputs(tmp_path, "run")
    assert results["density"]["mask"] == pytest.approx(0.25, abs=0.002)
    assert results["density"]["model"] > 0.3  # tables and norms are dense
    assert json.loads(out.results.read_text())["density"] == results["density"]
    assert f"Sparse: {results['density']['mask']:.2%} of the weights" in (out.best / "README.md").read_text()
    off_is_zero(out.best)
    masks = masks_in(out.best)
    assert {"bert.encoder.layer.0.output.dense.weight", "classifier.weight"} <= masks.keys()
    model = load_sparse(transformers.AutoModelForSequenceClassification, out.best)
    assert densities(model).sparse.mask_density == pytest.approx(results["density"]["mask"])
    logged = [float(row["density/mask"]) for row in rows(tmp_path) if row["density/mask"]]
    assert logged[0] > logged[-1] if method == "gradual" else len(set(logged)) == 1
    if method == "gradual":  # earlier models are denser
        assert results["best_step"] >= 12
    if method == "static":
        drawn = lot((1, 512), 1337, 0, "heads.models.seq_class.bert.encoder.layer.0.output.dense.weight")
        name = "bert.encoder.layer.0.output.dense.weight"
        assert torch.equal(masks[name].flatten(), drawn[0] > drawn[0].kthvalue(384).values)

    for task, more in (
        ("seq_class", {}),
        ("masked_lm", {"precision": "16"}),
        ("token_class", {"label_column": "tags"}),
    ):
        again = train(**flags(data, tmp_path, pipeline=task, name=task, pre_trained_model=str(out.best), **more))
        best = Outputs(tmp_path, task).best
        kept = masks_in(best)
        if method != "rigl_2021":  # which moves weights between matrices, heads too
            assert again["density"]["mask"] == pytest.approx(0.25, abs=0.002)
        assert all(torch.equal(mask, masks[name]) for name, mask in kept.items())
        assert len(kept) >= 6
        off_is_zero(best)
    alone = train(
        pipeline="seq_class", pre_trained_model=str(out.best), test_dataset=str(data / "valid.jsonl"), name="alone",
        output_dir=str(tmp_path),
    )  # fmt: skip
    assert alone["density"] == results["density"]
    assert alone["test"] == pytest.approx(results["valid"], abs=1e-6)


def test_a_dense_run_says_nothing_of_density(data, tmp_path) -> None:
    assert "density" not in train(**flags(data, tmp_path, max_steps=1))
    assert "density/mask" not in rows(tmp_path)[0]


def test_the_heads_of_a_mixture_keep_their_masks(data, tmp_path) -> None:
    mixture = {"pipeline": "masked_lm+seq_class", "max_steps": 4}
    train(**flags(data, tmp_path, sparsity=0.2, sparsity_count="model", sparsity_embeddings=True, **mixture))
    first = Outputs(tmp_path, "run").best
    results = train(**flags(data, tmp_path, name="again", pre_trained_model=str(first), **mixture))
    again = Outputs(tmp_path, "again").best
    for task, own in (("masked_lm", "cls.predictions.transform.dense.weight"), ("seq_class", "classifier.weight")):
        assert same(masks_in(first / task), masks_in(again / task))
        assert {own, "bert.embeddings.word_embeddings.weight"} <= masks_in(again / task).keys()
        off_is_zero(again / task)
    assert results["density"]["model"] == pytest.approx(0.8, abs=1e-3)


def test_the_joint_head_is_sparse_too(data, tmp_path) -> None:
    more = PAIR | {"k": 2, "max_steps": 2, "input_columns": ("text_of_query", "other"), "pad_to_k": True}
    train(**flags(data, tmp_path, sparsity=0.5, **more))
    first = Outputs(tmp_path, "run").best
    masks = masks_in(first)
    assert {"head.W1.weight", "head.W2.weight", "encoder.layer.0.output.dense.weight"} <= masks.keys()
    train(**flags(data, tmp_path, name="again", pre_trained_model=str(first), **more))
    assert same(masks, masks_in(Outputs(tmp_path, "again").best))
    source = str(data / "valid.jsonl")
    lines = (Outputs(tmp_path, "run").predictions / "valid.jsonl").read_text().splitlines()
    found = predict(pre_trained_model=str(first), predict_dataset=source, batch_size=8)
    assert [row["score"] for row in found] == pytest.approx([json.loads(line)["score"] for line in lines], abs=1e-5)


def test_a_trained_model_is_made_sparse_by_magnitude(data, tmp_path) -> None:
    train(**flags(data, tmp_path, max_steps=4))
    dense = Outputs(tmp_path, "run").best
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    weight = transformers.AutoModelForSequenceClassification.from_pretrained(dense).get_parameter(name)
    train(**flags(data, tmp_path, name="pruned", pre_trained_model=str(dense), sparsity=0.5, max_steps=1))
    mask = masks_in(Outputs(tmp_path, "pruned").best)[name]
    assert weight.abs()[mask].min() >= weight.abs()[~mask].max()


def test_matrices_have_a_sparsity_of_their_own(data, tmp_path) -> None:
    train(**flags(data, tmp_path, sparsity=0.5, sparsity_of=("*query*=0.25", "*attention*=0.75"), max_steps=2))
    masks = masks_in(Outputs(tmp_path, "run").best)
    found = {name: 1 - mask.float().mean().item() for name, mask in masks.items()}
    for name, sparsity in found.items():
        wanted = 0.25 if "query" in name else 0.75 if "attention" in name else 0.5
        assert sparsity == pytest.approx(wanted, abs=0.01), name
    assert len({round(sparsity, 1) for sparsity in found.values()}) == 3


def test_masks_that_are_there_are_not_made_anew(data, tmp_path) -> None:
    train(**flags(data, tmp_path, sparsity=0.5, max_steps=2))
    sparse = str(Outputs(tmp_path, "run").best)
    again = {"pre_trained_model": sparse, "name": "again", "max_steps": 8}
    with pytest.raises(InputError, match=r"--sparsity=0.8, but the masks .* have 0.5"):
        train(**flags(data, tmp_path, sparsity=0.8, **again))
    with pytest.raises(InputError, match="--sparsity_init is about new masks"):
        train(**flags(data, tmp_path, sparsity=0.5, sparsity_init="random", **again))
    for method, option, value in (
        ("gradual", "include", ("*query*",)),
        ("gradual", "exclude", ("*query*",)),
        ("static", "include", ("*query*",)),
    ):
        more = {f"sparsity_{option}": value} | METHODS[method]
        with pytest.raises(InputError, match=f"--sparsity_{option} is about new masks"):
            train(**flags(data, tmp_path, sparsity=0.5, **more, **again))
    for method, pattern in (("static", "2x1"), ("static", "constant_fan_in"), ("gradual", "2x1")):
        more = {"sparsity_pattern": pattern} | METHODS[method]
        with pytest.raises(
            InputError, match=f"--sparsity_pattern={pattern}, but .* has masks, which stay; the mask of"
        ):
            train(**flags(data, tmp_path, sparsity=0.5, **more, **again))
    train(**flags(data, tmp_path, sparsity=0.5, **again, **METHODS["rigl"]))
    moved = masks_in(Outputs(tmp_path, "again").best)
    shared = {name: float((moved[name] != mask).float().mean()) for name, mask in masks_in(Path(sparse)).items()}
    assert 0 < max(shared.values()) < 0.5  # it began with those masks
    results = train(**flags(data, tmp_path, sparsity=0.75, **again | {"name": "more"}, **METHODS["gradual"]))
    assert results["density"]["mask"] == pytest.approx(0.25, abs=0.002)
    more = masks_in(Outputs(tmp_path, "more").best)
    assert all(not (more[name] & ~mask).any() for name, mask in masks_in(Path(sparse)).items())


def test_two_processes_have_the_same_masks(data, tmp_path) -> None:
    """They check it after each change; without dropout they move as one process does."""
    quiet = (*TINY, "hidden_dropout_prob=0.0", "attention_probs_dropout_prob=0.0")
    more = {"additional_config_kwargs": quiet, "sparsity": 0.75, "max_steps": 4, "learning_rate": 1e-3}
    more |= METHODS["rigl"] | {"sparsity_end": 2}
    train(**flags(data, tmp_path / "one", **more, batch_size=8))
    results = train(**flags(data, tmp_path / "two", **more | {"batch_size": 4}, devices="2"))
    assert results["processes"] == 2
    one, two = (masks_in(Outputs(tmp_path / name, "run").best) for name in ("one", "two"))
    differing = sum(int((one[name] != two[name]).sum()) for name in one)
    assert differing <= 4  # of equal scores, which rounding decides
    off_is_zero(Outputs(tmp_path / "two", "run").best)


# ---- resuming


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    """A folder with a classifier, by its tasks' names."""
    out = tmp_path_factory.mktemp("teacher")
    for pipeline in ("seq_class", "masked_lm+seq_class"):
        train(**flags(data, out, pipeline=pipeline, name=pipeline, max_steps=40, seed=5))
    return {pipeline: Outputs(out, pipeline).best for pipeline in ("seq_class", "masked_lm+seq_class")}


@pytest.mark.parametrize(
    ("at_step", "more"),
    [
        (5, METHODS["static"] | {"sparsity_rescale": True, "scheduler": "one_cycle"}),
        (7, METHODS["rigl"]),
        (7, METHODS["rigl"] | {"precision": "16", "accumulate_grad_batches": 2, "sparsity_interval": 1}),
        (5, METHODS["rigl"] | {"sparsity_pattern": "constant_fan_in", "rigl_moments": "mean", "devices": "1"}),
        (7, METHODS["gradual"]),
        (13, METHODS["gradual"] | {"val_check_interval": 3, "sparsity_distribution": "global"}),
        (7, {"distill": True, "distill_weight": (1.0, 0.25), "distill_temperature": (2.0,), "scheduler": "one_cycle"}),
    ],
)
def test_a_cut_run_ends_bit_equal(at_step: int, more: dict[str, Any], data, teacher, tmp_path, monkeypatch) -> None:
    more = {"sparsity": 0.75, "checkpoint_interval": 2} | more
    if more.pop("distill", False):
        more |= {"pipeline": "masked_lm+seq_class", "distill_from": (str(teacher["masked_lm+seq_class"]),)}
    whole = train(**flags(data, tmp_path / "whole", **more))
    with monkeypatch.context() as patch:

        def on_train_batch_start(self, batch, batch_idx):
            if self.global_step >= at_step:
                raise Stop

        patch.setattr(train_module.TaskModule, "on_train_batch_start", on_train_batch_start)
        with pytest.raises(Stop):
            train(**flags(data, tmp_path / "cut", **more))
    resumed = train(name="run", output_dir=str(tmp_path / "cut"), resume=True)
    states = [
        torch.load(Outputs(tmp_path / name, "run").checkpoints / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "cut")
    ]
    assert any(name.endswith("_mask") for name in states[0])
    assert same(*states)
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")
    for key in ("valid", "density", "best_step", "best"):
        assert resumed.get(key) == whole.get(key), key


# ---- distillation


def test_the_loss_is_that_of_the_formula(data, teacher, tmp_path, monkeypatch) -> None:
    """Without dropout the first step's loss can be computed from the models. The second teacher counts thrice."""
    seen: dict[str, Any] = {}
    step = train_module.TaskModule.training_step

    def training_step(self, batch, batch_idx):
        if not seen:
            with torch.no_grad():
                inputs = batch["inputs"]
                student = self.heads.models["seq_class"](**inputs).logits
                seen.update(student=student, inputs=inputs, labels=batch["seq_class_labels"])
            seen["loss"] = step(self, batch, batch_idx)
            return seen["loss"]
        return step(self, batch, batch_idx)

    monkeypatch.setattr(train_module.TaskModule, "training_step", training_step)
    quiet = (*TINY, "hidden_dropout_prob=0.0", "attention_probs_dropout_prob=0.0")
    train(**flags(data, tmp_path, name="second", max_steps=2, seed=9))
    seen.clear()
    teachers = (str(teacher["seq_class"]), str(Outputs(tmp_path, "second").best))
    more = {
        "distill_from": teachers,
        "distill_teachers": (1.0, 3.0),
        "distill_weight": (0.75, 0.0),
        "distill_temperature": (3.0,),
    }
    train(**flags(data, tmp_path, additional_config_kwargs=quiet, max_steps=4, log_every_n_steps=1, **more))
    models = [transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval() for folder in teachers]
    with torch.no_grad():
        first, second = ((model(**seen["inputs"]).logits / 3).softmax(-1) for model in models)
    target = (first + 3 * second) / 4
    assert not torch.allclose(first, second, atol=1e-3)
    log_p = (seen["student"] / 3).log_softmax(-1)
    soft = 9 * (target * (target.log() - log_p)).sum(-1).mean()
    hard = F.cross_entropy(seen["student"], seen["labels"])
    assert seen["loss"].item() == pytest.approx((0.75 * soft + 0.25 * hard).item(), rel=1e-5)
    begin, *_, last = (row for row in rows(tmp_path) if row["train/seq_class/loss"])
    assert float(begin["train/seq_class/soft_loss"]) == pytest.approx(soft.item(), rel=1e-5, abs=2e-7)
    assert float(last["train/seq_class/loss"]) == pytest.approx(float(last["train/seq_class/hard_loss"]))  # weight 0


def test_a_student_agrees_with_its_teacher(data, teacher, tmp_path) -> None:
    """Trained on the teacher alone, with labels turned round, it comes to say what the teacher says."""
    lines = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    other = {"pos": "neg", "neg": "pos"}
    turned = tmp_path / "turned.jsonl"
    turned.write_text("".join(json.dumps(line | {"label": other[line["label"]]}) + "\n" for line in lines))
    train(
        **flags(
            data, tmp_path, train_dataset=(str(turned),), distill_from=(str(teacher["seq_class"]),) * 2,
            max_steps=64,
        )
    )  # fmt: skip
    soft = [float(row["train/seq_class/soft_loss"]) for row in rows(tmp_path) if row["train/seq_class/soft_loss"]]
    assert soft[-1] < soft[0] / 2
    source = str(data / "valid.jsonl")
    said = [
        [row["scores"]["pos"] for row in predict(pre_trained_model=str(folder), predict_dataset=source)]
        for folder in (teacher["seq_class"], Outputs(tmp_path, "run").best)
    ]
    assert torch.corrcoef(torch.tensor(said))[0, 1] > 0.5


TASKS: dict[str, dict[str, Any]] = {
    "masked_lm": {},
    "masked_lm+seq_class": {},
    "token_class": {"label_column": "tags"},
    "multiple_choice": {},
    "question_answering": {},
    "answer_selection": PAIR | {"input_columns": ("text_of_query", "other")},
}


@pytest.mark.parametrize("student", ["bert", "distilbert"])
@pytest.mark.parametrize("pipeline", TASKS)
def test_every_task_with_classes_has_teachers(pipeline: str, student: str, data, tmp_path) -> None:
    """A distilbert has no token types, its teacher has."""
    more = TASKS[pipeline] | {"pipeline": pipeline}
    train(**flags(data, tmp_path, name="teacher", max_steps=1, **more))
    if student == "distilbert":
        sizes = ("dim=16", "n_layers=1", "n_heads=2", "hidden_dim=32")
        more |= {"model": "distilbert", "additional_config_kwargs": sizes}
    folder = str(Outputs(tmp_path, "teacher").best)
    train(**flags(data, tmp_path, name="student", max_steps=2, log_every_n_steps=1, distill_from=(folder,), **more))
    scored = [row for row in rows(tmp_path, "student") if row.get("train/loss")]
    for task in pipeline.split("+"):
        assert all(float(row[f"train/{task}/soft_loss"]) > 0 for row in scored)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"pipeline": "retrieval", "input_columns": ("text", "other"), "label_column": "right"},
            "no classes to distil",
        ),
        ({"regression": True, "label_column": "right"}, "no classes to distil"),
        ({"pipeline": "random_token_detection"}, "no classes to distil"),
        ({"pipeline": "masked_lm"}, "not trained for masked_lm: it lacks"),
        ({"label_column": "other"}, "has the classes neg, pos, the student"),
        ({"vocab": "x"}, "another vocabulary"),
        ({"max_sequence_length": 520, "additional_config_kwargs": (*TINY, "max_position_embeddings=600")}, "takes 512"),
        ({"label_weights": (1.0, 2.0)}, "--label_weights weighs rows"),
        ({"distill_temperature": (0.0,)}, "distill_temperature must be one number or two, more than 0"),
        ({"distill_teachers": (1.0, 2.0)}, "one positive number for each of the 1 teachers"),
        ({"distill_weight": (1.0, 0.5, 0.0)}, "distill_weight must be one number or two, from 0 to 1"),
        ({"distill_from": ("./no/where",)}, "no/where"),
        ({"distill_from": None, "distill_weight": (0.5,)}, "--distill_weight is read with --distill_from alone"),
    ],
)
def test_teachers_that_cannot_be(more: dict[str, Any], message: str, data, teacher, tmp_path) -> None:
    if "vocab" in more:
        vocabulary = tmp_path / "vocab.txt"
        vocabulary.write_text((data / "vocab.txt").read_text() + "more\n")
        more = {"pre_trained_tokenizer": str(vocabulary)}
    settings = flags(data, tmp_path, **{"distill_from": (str(teacher["seq_class"]),)} | more)
    with pytest.raises(InputError, match=message):
        train(**{name: value for name, value in settings.items() if value is not None})


# ---- what is refused


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"sparsity_method": "rigl"}, "--sparsity_method is read with --sparsity alone"),
        ({"sparsity": 0.5, "sparsity_interval": 5}, "read by --sparsity_method rigl or gradual or rigl_2021 alone"),
        ({"sparsity": 0.5, "rigl_drop": 0.3}, "read by --sparsity_method rigl or rigl_2021 alone"),
        ({"sparsity": 0.5, "sparsity_method": "gradual", "sparsity_init": "random"}, "or rigl or rigl_2021 alone"),
        ({"sparsity": 0.5, "sparsity_method": "gradual", "early_stopping": True}, "--early_stopping would end"),
        ({"sparsity": 1.0}, "from 0 to below 1"),
        ({"sparsity": 0.5, **METHODS["rigl"], "optimizer": "adamw8bit"}, "give --optimizer adamw, or"),
        ({"sparsity": 0.5, **METHODS["gradual"], "optimizer": "adam8bit"}, "keeps moments as 8-bit codes"),
        ({"sparsity": 0.5, "sparsity_exclude": ("*qurey*",)}, r"exclude has the glob '\*qurey\*'"),
        ({"sparsity": 0.5, "sparsity_of": ("*query*",)}, "takes GLOB=SPARSITY"),
        ({"sparsity": 0.5, "sparsity_of": ("*query*=half",)}, "takes GLOB=SPARSITY"),
        ({"sparsity": 0.5, "sparsity_of": ("*qurey*=0.2",)}, r"distribution has the glob '\*qurey\*'"),
        ({"sparsity": 0.5, "sparsity_of": ("*query*=0.2",), "sparsity_distribution": "erk"}, "leave one of them out"),
        ({"sparsity": 0.5, "sparsity_pattern": "3:2"}, "pattern must be"),
        ({"sparsity": 0.5, "sparsity_include": ("*nothing*",)}, "select no weight of the model"),
        ({"sparsity": 0.5, "sparsity_method": "rigl"}, "the masks would never change"),
        ({"sparsity": 0.5, "sparsity_method": "gradual", "sparsity_end": 100}, "the run ends at step 16"),
        ({"sparsity": 0.5, **METHODS["rigl"], "sparsity_schedule": "cubic"}, "anneal must be one of"),
        (
            {"sparsity": 0.5, **METHODS["rigl"], "stochastic_weight_averaging": True, "max_steps": -1, "max_epochs": 4},
            "averages models whose masks",
        ),
        ({"sparsity": 0.5, "sparsity_rescale": True, "sparsity_distribution": "global"}, "ranks the weights"),
    ],
)
def test_what_cannot_be_asked_for(more: dict[str, Any], message: str, data, tmp_path) -> None:
    with pytest.raises(InputError, match=message):
        train(**flags(data, tmp_path, **more))


def test_training_flags_without_training(data, tmp_path, teacher) -> None:
    more = {"pre_trained_model": str(teacher["seq_class"]), "test_dataset": str(data / "valid.jsonl"), "name": "x"}
    with pytest.raises(InputError, match="--sparsity is about training"):
        train(pipeline="seq_class", sparsity=0.5, output_dir=str(tmp_path), **more)


# ---- with LSG


def test_an_lsg_model_is_sparse_and_stays_it(data, tmp_path) -> None:
    from funneltfm.lsg.convert import LSGConverter

    train(**flags(data, tmp_path, pipeline="masked_lm", sparsity=0.5, max_steps=2, sparsity_embeddings=True))
    sizes = {"block_size": 4, "sparse_block_size": 4}
    base = Outputs(tmp_path, "run").best
    model, tokenizer = LSGConverter(64).convert_from_pretrained(base, **sizes)
    assert same(masks_in(base), {weight.name: weight.mask for weight in sparse_weights(model)})
    model.save_pretrained(tmp_path / "lsg")
    tokenizer.save_pretrained(tmp_path / "lsg")
    more = {"pre_trained_model": str(tmp_path / "lsg"), "name": "lsg", "sparsity": 0.5, "max_sequence_length": 60}
    train(**flags(data, tmp_path, pipeline="masked_lm", **more, **METHODS["rigl"]))
    best = Outputs(tmp_path, "lsg").best
    assert masks_in(best).keys() == masks_in(base).keys()
    assert not any("global" in name for name in masks_in(best))
    off_is_zero(best)
