"""ELECTRA: samples and labels, gradients, shared embeddings, sizes of generators, and whole runs."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from funneltfm.data.features import Features
from funneltfm.data.text import TextEncoder
from funneltfm.errors import InputError
from funneltfm.tasks.base import IGNORED, Collate, Prepare, encode_rows, make_tasks
from funneltfm.tasks.electra import GENERATOR, Electra, scaled_config
from funneltfm.tasks.flags import task_names
from funneltfm.tasks.heads import Heads, backbone_of, n_token_types, save_pretrained
from funneltfm.tasks.token_detection import detection_labels
from funneltfm.training.train import predict, train
from funneltfm.training.train_config import make_train_args

TEXTS = ["the quick brown fox jumps over", "Mary lives in New York", "", "unbelievable tokenization isn't easy", "fox"]
ROWS: list[dict[str, Any]] = [{"text": text, "id": i, "label": "ab"[i % 2]} for i, text in enumerate(TEXTS * 4)]
SHARED = ("tied", "gdes")


def task_of(**flags: Any) -> Electra:
    (task,) = make_tasks("electra", make_train_args(**({"pipeline": "electra", "max_sequence_length": 32} | flags)))
    assert isinstance(task, Electra)
    return task


def features_of(task: Electra, text: TextEncoder) -> Features:
    return encode_rows([task], ROWS, text, "train")


def made(config: Any, tokenizer: Any, **flags: Any) -> tuple[Electra, Heads]:
    torch.manual_seed(0)
    task = task_of(probability=0.4, **flags)
    heads = Heads({"electra": task.make_model(None, config)})
    heads.beside["electra"] = task.make_beside(heads.models["electra"], None, tokenizer)
    return task, heads.eval()


def batch_of(task: Electra, heads: Heads, tokenizer: Any, indices: list[int], epoch: int = 0) -> dict[str, Any]:
    text = TextEncoder(tokenizer, 64)
    features, prepare = features_of(task, text), Prepare([task], text, 3)
    types = n_token_types(heads.backbone) > 1
    return Collate([task], tokenizer, token_types=types)([prepare(features[i], epoch) for i in indices])


def run_model(task: Electra, heads: Heads, batch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The corrupted batch, and both losses."""
    batch = task.corrupt(heads.beside["electra"], batch)
    logits = task.logits(heads.models["electra"], heads(batch["inputs"]), batch)
    return batch, task.losses(logits, batch)


# ---- samples and labels


@pytest.mark.parametrize("function", ["gumbel", "multinomial"])
def test_labels_are_what_differs_from_the_original(function: str, tiny: Any) -> None:
    _, config, tokenizer = tiny
    task, heads = made(config, tokenizer, sample_function=function)
    text, batch = TextEncoder(tokenizer, 64), batch_of(task, heads, tokenizer, list(range(10)))
    masked = batch["inputs"]["input_ids"].clone()
    out, _ = run_model(task, heads, batch)
    seen, labels = out["inputs"]["input_ids"], detection_labels(out)
    features = features_of(task, text)
    chosen = batch["masked_lm_labels"] != IGNORED
    for i in range(10):
        clean = torch.from_numpy(features[i]["input_ids"])
        n, special = len(clean), torch.from_numpy(np.isin(features[i]["input_ids"], text.special_ids))
        assert torch.equal(seen[i, :n][~chosen[i, :n]], clean[~chosen[i, :n]])  # masks and random tokens are gone
        assert torch.equal(labels[i, :n], (seen[i, :n] != clean).long())
        assert (labels[i, :n][special] == 0).all()  # originals, which count
        assert (labels[i, n:] == IGNORED).all()
        assert (seen[i, n:] == tokenizer.pad_token_id).all()
        assert not chosen[i, :n][special].any()
    assert (labels == 1).any()
    assert (masked == batch["inputs"]["input_ids"]).all()  # the batch itself is left alone
    again, _ = run_model(task, heads, batch)
    assert torch.equal(again["inputs"]["input_ids"], seen)
    alone, _ = run_model(task, heads, batch_of(task, heads, tokenizer, [3]))
    assert torch.equal(alone["inputs"]["input_ids"][0], seen[3, : alone["inputs"]["input_ids"].size(1)])


def test_a_sample_that_is_right_is_an_original(tiny_tokenizer: Any, make_config: Any) -> None:
    task, heads = made(make_config("bert", len(tiny_tokenizer)), tiny_tokenizer)
    batch = batch_of(task, heads, tiny_tokenizer, list(range(5)))
    labels = batch["masked_lm_labels"]

    class Knows(nn.Module):
        def forward(self, **inputs: Tensor) -> Any:
            return None

    task.mlm.logits = lambda *_: nn.functional.one_hot(labels[labels != IGNORED], len(tiny_tokenizer)) * 1e4  # type: ignore
    out = task.corrupt(Knows(), batch)
    assert (detection_labels(out) != 1).all()
    assert (detection_labels(out) == 0).sum() == task.size(batch)


@pytest.mark.parametrize("sharing", ["none", *SHARED])
def test_losses_by_their_formulas(sharing: str, tiny_tokenizer: Any, make_config: Any) -> None:
    config = make_config("electra", len(tiny_tokenizer))
    task, heads = made(config, tiny_tokenizer, embedding_sharing=sharing)
    batch = batch_of(task, heads, tiny_tokenizer, [0, 1, 2, 3])
    out, losses = run_model(task, heads, batch)
    generator, model = heads.beside["electra"], heads.models["electra"]
    log_p = generator(**batch["inputs"]).logits.double().log_softmax(-1)
    chosen = (batch["masked_lm_labels"] != IGNORED).nonzero().tolist()
    nll = [-log_p[i, j, batch["masked_lm_labels"][i, j]].item() for i, j in chosen]
    assert losses["masked_lm"].item() == pytest.approx(np.mean(nll), rel=1e-5)
    d = model(**out["inputs"]).logits.double().sigmoid()
    y = detection_labels(out)
    costs = [-(d[i, j] if y[i, j] else 1 - d[i, j]).log().item() for i, j in (y != IGNORED).nonzero().tolist()]
    assert losses["token_detection"].item() == pytest.approx(np.mean(costs), rel=1e-5)
    assert task.sizes(batch) == {"masked_lm": len(nll), "token_detection": len(costs)}
    assert len(costs) == batch["tokens"]  # all but padding


# ---- gradients


def touched(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


@pytest.mark.parametrize("sharing", ["none", *SHARED])
def test_no_gradient_goes_from_one_to_the_other(sharing: str, tiny: Any) -> None:
    """But into what they share when tied."""
    _, config, tokenizer = tiny
    task, heads = made(config, tokenizer, embedding_sharing=sharing)
    model, generator = heads.models["electra"], heads.beside["electra"]
    common = {id(p) for p in model.parameters()} & {id(p) for p in generator.parameters()}
    assert bool(common) == (sharing == "tied")
    for name, other in (("token_detection", generator), ("masked_lm", model)):
        heads.zero_grad()
        _, losses = run_model(task, heads, batch_of(task, heads, tokenizer, list(range(10))))
        losses[name].backward()
        parameters = dict(other.named_parameters())
        assert all(id(parameters[key]) in common for key in touched(other))
        assert touched(model if other is generator else generator)


def table_of(model: Any) -> Any:
    return backbone_of(model).get_input_embeddings()  # type: ignore[operator]


def test_gdes(tiny: Any, tmp_path: Path) -> None:
    """He et al. 2021: E_delta starts at 0, each loss has its own table, and the sum is what is saved."""
    _, config, tokenizer = tiny
    task, heads = made(config, tokenizer, embedding_sharing="gdes")
    model, generator = heads.models["electra"], heads.beside["electra"]
    table, base = table_of(model), table_of(generator).weight
    (delta,) = table.parameters()
    assert (delta == 0).all()
    assert torch.equal(table.weight, base)
    batch = batch_of(task, heads, tokenizer, list(range(10)))
    losses = run_model(task, heads, batch)[1]
    assert torch.autograd.grad(losses["token_detection"], base, allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.grad(losses["masked_lm"], delta, allow_unused=True, retain_graph=True) == (None,)
    optimizer = torch.optim.SGD(heads.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        losses = run_model(task, heads, batch)[1]
        (losses["masked_lm"] + 50 * losses["token_detection"]).backward()
        optimizer.step()
    assert (delta != 0).any()
    torch.testing.assert_close(table.weight, base + delta, atol=0, rtol=0)
    task.save(model, generator, tmp_path)
    auto = "AutoModelForPreTraining" if config.model_type in ("electra", "funnel_tfm") else task.auto
    exported = getattr(transformers, auto).from_pretrained(tmp_path).eval()
    assert not any("parametrizations" in name for name in exported.state_dict())
    with torch.no_grad():
        expected, found = model(**batch["inputs"]).logits, exported(**batch["inputs"]).logits
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        filled = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / GENERATOR).eval()
        inputs = batch["inputs"]
        torch.testing.assert_close(filled(**inputs).logits, generator(**inputs).logits, atol=1e-6, rtol=0)
    # and from there it goes on
    again = Heads({"electra": task.make_model(str(tmp_path), exported.config)})
    again.beside["electra"] = task.make_beside(again.models["electra"], str(tmp_path), tokenizer)
    (delta_again,) = table_of(again.models["electra"]).parameters()
    torch.testing.assert_close(delta_again, delta, atol=1e-6, rtol=0)
    assert torch.equal(table_of(again.beside["electra"]).weight, base)


def test_tied(tiny: Any) -> None:
    model_type, config, tokenizer = tiny
    _, heads = made(config, tokenizer, embedding_sharing="tied")
    model, generator = heads.models["electra"], heads.beside["electra"]
    assert table_of(model).weight is table_of(generator).weight
    output = generator.get_output_embeddings()  # type: ignore[operator]
    assert model_type == "funnel_tfm" or output.weight is table_of(model).weight  # there is none of its own there
    common = {id(p) for p in model.parameters()} & {id(p) for p in generator.parameters()}
    names = {name.partition("embeddings.")[2] for name, p in model.named_parameters() if id(p) in common}
    if model_type in ("bert", "electra", "albert"):
        expected = ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm")
        assert {name.partition(".")[0] for name in names} == set(expected)
    assert len(common) >= 2  # the norm too


@pytest.mark.parametrize("sharing", SHARED)
def test_whose_embeddings_are_taken(sharing: str, tiny_tokenizer: Any, make_config: Any, tmp_path: Path) -> None:
    config = make_config("electra", len(tiny_tokenizer))
    torch.manual_seed(1)
    save_pretrained(transformers.AutoModelForMaskedLM.from_config(config), tmp_path / "g")
    save_pretrained(transformers.AutoModelForPreTraining.from_config(config), tmp_path / "d")
    g, d = (transformers.AutoModel.from_pretrained(tmp_path / name).get_input_embeddings().weight for name in "gd")
    trained = task_of(embedding_sharing=sharing, pre_trained_generator_model=str(tmp_path / "g"))
    fresh = task_of(embedding_sharing=sharing)
    for task, source, of_g, of_d in (
        (trained, None, g, g),
        (fresh, str(tmp_path / "d"), d, d),
        (trained, str(tmp_path / "d"), g if sharing == "gdes" else d, d),
    ):
        model = task.make_model(source, config)
        generator = task.make_beside(model, source, tiny_tokenizer)
        assert torch.equal(table_of(generator).weight, of_g)
        torch.testing.assert_close(table_of(model).weight, of_d, atol=1e-7, rtol=0)


# ---- the generator's size


def test_a_generator_of_every_architecture(tiny: Any) -> None:
    config = tiny[1]
    keys = config.to_dict()
    for keep in (False, True):
        small = scaled_config(config, 0.5, keep)
        assert small.vocab_size == config.vocab_size
        own_width = "embedding_size" in keys or "d_embed" in keys
        if keep and not own_width:
            assert (small.hidden_size, small.num_hidden_layers) == (config.hidden_size, 1)
        else:
            assert (small.hidden_size, small.num_attention_heads) == (config.hidden_size // 2, 1)
            assert small.num_hidden_layers == config.num_hidden_layers
            inner = next(k for k in ("intermediate_size", "hidden_dim", "d_inner") if k in keys)
            assert getattr(small, inner) == keys[inner] // 2
        if own_width:
            width = next(k for k in ("embedding_size", "d_embed") if k in keys)
            assert getattr(small, width) == keys[width]
        transformers.AutoModelForMaskedLM.from_config(small)
    assert config.to_dict() == keys


def test_sizes_that_do_not_come_out(make_config: Any) -> None:
    config = transformers.BertConfig()  # 768 units, 12 heads
    assert scaled_config(config, 0.25, False).num_attention_heads == 3
    with pytest.raises(InputError, match=r"230 hidden units do not divide among 4 heads. Take 0.3333 \(4 of 12 heads"):
        scaled_config(config, 0.3, False)
    third = scaled_config(config, 0.3333, False)
    assert (third.hidden_size, third.num_attention_heads) == (256, 4)
    assert scaled_config(config, 0.3, True).num_hidden_layers == 4
    with pytest.raises(InputError, match="t5 has none of"):
        scaled_config(transformers.T5Config(), 0.5, False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"generator_size": 0.0}, "more than 0 and at most 1"),
        ({"generator_size": 0.5, "pre_trained_generator_model": "x"}, "all say what the generator is"),
        ({"tie_generator_discriminator_embeddings": True, "embedding_sharing": "gdes"}, "means --embedding_sharing"),
        ({"probability": 0.0}, "--probability is 0"),
    ],
)
def test_flags_that_contradict(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        task_of(**flags)
    with pytest.raises(InputError, match="generator_size is read by electra"):
        make_train_args(pipeline="masked_lm", generator_size=0.5)


def test_generators_that_do_not_fit(tiny_tokenizer: Any, make_config: Any, tmp_path: Path) -> None:
    config = make_config("bert", len(tiny_tokenizer))
    for name, keys, flags, message in (
        ("vocab", {"vocab_size": 99}, {}, "generator's vocab_size is 99"),
        ("short", {"max_position_embeddings": 16}, {}, "max_position_embeddings is 16, it must be at least 32"),
        ("wide", {"hidden_size": 32}, {"embedding_sharing": "gdes", "max_sequence_length": 8}, "the same shape"),
    ):
        other = type(config).from_dict(config.to_dict() | keys)
        save_pretrained(transformers.AutoModelForMaskedLM.from_config(other), tmp_path / name)
        task = task_of(pre_trained_generator_model=str(tmp_path / name), **flags)
        with pytest.raises(InputError, match=message):
            task.make_beside(task.make_model(None, config), None, tiny_tokenizer)


@pytest.mark.parametrize("flag", ["pre_trained_generator_model", "pre_trained_generator_config"])
def test_a_generator_that_is_not_there(flag: str, tiny_tokenizer: Any, make_config: Any, tmp_path: Path) -> None:
    task = task_of(**{flag: str(tmp_path / "none")})
    with pytest.raises(InputError, match=rf"--{flag}=.*none cannot be loaded.*Give a folder with a config.json"):
        task.make_beside(task.make_model(None, make_config("bert", len(tiny_tokenizer))), None, tiny_tokenizer)


def test_older_names() -> None:
    assert task_names("token_detection_and_masked_lm") == ["electra"]
    assert task_names("token_detection_and_masked_lm_and_seq_class") == ["electra", "seq_class"]
    assert task_of(tie_generator_discriminator_embeddings=True).sharing == "tied"


# ---- whole runs


def run(tmp_path: Path, tokenizer: Any, config: Any, **flags: Any) -> dict[str, Any]:
    config.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return train(**({
        "pipeline": "token_detection_and_masked_lm", "name": "run", "output_dir": str(tmp_path), "batch_size": 5,
        "train_dataset": [str(data)], "pre_trained_config": str(tmp_path / "model"), "valid_dataset": str(data),
        "max_epochs": 2, "learning_rate": 1e-2, "max_sequence_length": 32, "probability": 0.3, "accelerator": "cpu",
        "log_every_n_steps": 1, "no_val_checkpointing": True, "no_epoch_checkpointing": True,
    } | flags))  # fmt: skip


def table(tmp_path: Path, name: str = "run") -> list[dict[str, str]]:
    with open(tmp_path / "runs" / name / "metrics.csv", newline="") as handle:
        return list(csv.DictReader(handle))


@pytest.mark.parametrize(
    "flags",
    [
        {"embedding_sharing": "gdes", "packing": True, "precision": "bf16-mixed"},
        {"tie_generator_discriminator_embeddings": True, "masked_lm_weight": 2.0, "token_detection_weight": 7.0},
    ],
    ids=str,
)
def test_a_run_learns(flags: dict[str, Any], tiny_tokenizer: Any, make_config: Any, tmp_path: Path) -> None:
    results = run(tmp_path, tiny_tokenizer, make_config("electra", len(tiny_tokenizer)), max_epochs=15, **flags)
    assert results["monitor"] == "valid/token_detection/f1"
    names = [f"token_detection/{name}" for name in ("accuracy", "f1", "precision", "recall", "loss")]
    assert set(results["valid"]) == {*names, *(f"masked_lm/{name}" for name in ("accuracy", "perplexity", "loss"))}
    rows = table(tmp_path)
    scored = [float(row["valid/masked_lm/perplexity"]) for row in rows if row["valid/masked_lm/perplexity"]]
    assert min(scored) < 0.7 * scored[0]
    steps = [row for row in rows if row["train/loss"]]
    of_g, of_d = flags.get("masked_lm_weight", 1.0), flags.get("token_detection_weight", 50.0)
    for row in steps[:5]:
        parts = [float(row[f"train/{name}/loss"]) for name in ("masked_lm", "token_detection")]
        assert float(row["train/loss"]) == pytest.approx(of_g * parts[0] + of_d * parts[1], rel=1e-5)
    losses = [float(row["train/token_detection/loss"]) for row in steps]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])
    best = tmp_path / "pre_trained_models" / "run" / "best"
    transformers.AutoModelForPreTraining.from_pretrained(best)
    transformers.AutoModelForMaskedLM.from_pretrained(best / GENERATOR)
    tokenizer = transformers.AutoTokenizer.from_pretrained(best / GENERATOR)
    assert tokenizer("fox")["input_ids"] == tiny_tokenizer("fox")["input_ids"]


def test_a_size_for_a_generator_that_is_there(tiny_tokenizer: Any, make_config: Any, tmp_path: Path) -> None:
    """The run that has made it may have had one, as its predictions know."""
    run(tmp_path, tiny_tokenizer, make_config("electra", len(tiny_tokenizer)), max_epochs=1, generator_size=0.5)
    best, data = str(tmp_path / "pre_trained_models" / "run" / "best"), str(tmp_path / "data.jsonl")
    assert len(predict(pre_trained_model=best, predict_dataset=data, accelerator="cpu")) == len(ROWS)
    more: dict[str, Any] = {"pre_trained_model": best, "pre_trained_config": None, "name": "other"}
    with pytest.raises(InputError, match=r"--generator_size=0.5 does nothing: .*generator has a trained generator"):
        run(tmp_path, tiny_tokenizer, make_config("electra", len(tiny_tokenizer)), generator_size=0.5, **more)


def test_scores_are_of_the_whole_split_and_of_fixed_masks(
    tiny_tokenizer: Any, make_config: Any, tmp_path: Path
) -> None:
    """The same in batches of any size, and again from the folder that is left."""
    results = run(tmp_path, tiny_tokenizer, make_config("bert", len(tiny_tokenizer)), embedding_sharing="gdes")
    best, data = tmp_path / "pre_trained_models" / "run" / "best", tmp_path / "data.jsonl"
    lines = (tmp_path / "predictions" / "run" / "valid.jsonl").read_text().splitlines()
    written = [json.loads(line) for line in lines]
    counts = {name: sum(row[name] for row in written) for name in ("count", "replaced", "found", "false_alarms")}
    precision = counts["found"] / max(1, counts["found"] + counts["false_alarms"])
    recall = counts["found"] / counts["replaced"]
    assert results["valid"]["token_detection/recall"] == pytest.approx(recall)
    assert results["valid"]["token_detection/precision"] == pytest.approx(precision)
    nll = sum(row["masked_lm_loss"] * row["selected"] for row in written if row["selected"])
    perplexity = np.exp(nll / sum(row["selected"] for row in written))
    assert results["valid"]["masked_lm/perplexity"] == pytest.approx(perplexity)
    for batch_size in (3, 20):
        found = predict(
            pre_trained_model=str(best), predict_dataset=str(data), batch_size=batch_size, accelerator="cpu"
        )  # fmt: skip
        for one, other in zip(found, written, strict=True):
            assert one == pytest.approx(other, abs=1e-5)


def test_a_mixture_with_classes(tiny_tokenizer: Any, make_config: Any, tmp_path: Path) -> None:
    results = run(
        tmp_path, tiny_tokenizer, make_config("bert", len(tiny_tokenizer)), embedding_sharing="gdes",
        pipeline="token_detection_and_masked_lm_and_seq_class", seq_class_weight=3.0,
    )  # fmt: skip
    assert results["monitor"] == "valid/seq_class/accuracy"
    assert {name.partition("/")[0] for name in results["valid"]} == {"seq_class"}  # on clean texts
    row = next(row for row in table(tmp_path) if row["train/loss"])
    parts = [float(row[f"train/{name}/loss"]) for name in ("masked_lm", "token_detection", "seq_class")]
    assert float(row["train/loss"]) == pytest.approx(parts[0] + 50 * parts[1] + 3 * parts[2], rel=1e-5)
    best = tmp_path / "pre_trained_models" / "run" / "best"
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(best / "seq_class")
    detector = transformers.AutoModelForTokenClassification.from_pretrained(best / "electra")
    assert torch.equal(table_of(classifier).weight, table_of(detector).weight)
    assert detector.config.id2label == {0: "replaced"}
    again = train(
        pipeline="electra+seq_class", pre_trained_model=str(best), valid_dataset=str(tmp_path / "data.jsonl"),
        max_sequence_length=32,
        name="again", output_dir=str(tmp_path), embedding_sharing="gdes", accelerator="cpu",
    )  # fmt: skip
    assert again["valid"] == pytest.approx(results["valid"], abs=1e-5)
    finetuned = train(  # from the discriminator alone
        pipeline="seq_class", pre_trained_model=str(best / "electra"), train_dataset=[str(tmp_path / "data.jsonl")],
        name="fine", output_dir=str(tmp_path), max_steps=1, accelerator="cpu", max_sequence_length=32,
    )  # fmt: skip
    assert finetuned["steps"] == 1


def test_two_processes_learn_what_one_learns(tiny_tokenizer: Any, make_config: Any, tmp_path: Path) -> None:
    config = make_config("electra", len(tiny_tokenizer))
    flags: dict[str, Any] = {"embedding_sharing": "gdes", "num_sanity_val_steps": 0, "learning_rate": 1e-4}
    for name, more in (("one", {"batch_size": 10}), ("two", {"batch_size": 5, "devices": "2"})):
        run(tmp_path, tiny_tokenizer, config, name=name, **flags, **more)
    for one, two in zip(table(tmp_path, "one"), table(tmp_path, "two"), strict=True):
        for key in ("train/loss", *(key for key in one if key.startswith("valid/"))):
            assert (float(one[key]) if one[key] else None) == (
                pytest.approx(float(two[key]), rel=1e-4) if two[key] else None
            )
