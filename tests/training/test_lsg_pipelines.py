"""An LSG folder is a `--pre_trained_model` like any other: every task with every encoder, on texts longer than the base
model took; saved, loaded by the Auto classes, resumed; offline, on tiny converted models.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from funneltfm.cli.main import main
from funneltfm.data.text import get_text_tokenizer
from funneltfm.errors import InputError
from funneltfm.lsg.convert import LSGConverter
from funneltfm.tasks.base import make_tasks
from funneltfm.training import train as train_module
from funneltfm.training.model_source import load_tokenizer, make_heads
from funneltfm.training.outputs import Outputs
from funneltfm.training.train import predict, train
from funneltfm.training.train_config import make_train_args

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TYPES: dict[str, dict[str, Any]] = {
    "albert": SMALL | {"embedding_size": 8},
    "bert": SMALL,
    "camembert": SMALL,
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    "electra": SMALL | {"embedding_size": 8},
    "roberta": SMALL,
    "xlm-roberta": SMALL,
}
SEQ2SEQ = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2,
    "forced_bos_token_id": None, "forced_eos_token_id": None,
}  # fmt: skip
COUNT_PADDING = ("camembert", "roberta", "xlm-roberta")
BASE, LONG, BLOCK = 20, 64, 4  # tokens that the base model takes, the LSG model takes, of a block
LINE = "the cat sat on a mat . one bird saw two dogs run home"
STORY = LINE.split() * 3  # more than BASE
WORDS = [*dict.fromkeys(STORY), "who", "what", "?", "yes", "no"]
TEXT = [{"text": " ".join(STORY), "label": "yes"}, {"text": " ".join(STORY[3:-2]), "label": "no"}] * 2
TAGS = [{"words": STORY, "labels": ["O", "B-X", "I-X"] * 14}, {"words": STORY[:6], "labels": ["O", "B-Y"] * 3}] * 2
PAIR = [{"q": f"who {a} ?", "a": " ".join(STORY[i:]), "label": i % 2} for a in ("sat", "run") for i in range(2)]
SPANS = [
    {"id": str(i), "question": "who ?", "context": " ".join(STORY), "answers": {"text": [a], "answer_start": [at]}}
    for i, (a, at) in enumerate((("the cat", 0), ("two dogs", 36)))
]
CHOICES = [{"article": " ".join(STORY), "question": "who run ?", "options": ["cat", "two dogs"], "answer": 1}] * 2
STORIES = [{"document": " ".join(STORY[i:]), "summary": "two dogs run"} for i in range(4)]
RANK = {"input_columns": ("q", "a")}
TASKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "seq_class": (TEXT, {}),
    "masked_lm": (TEXT, {}),
    "masked_lm+token_class": (TAGS, {}),
    "question_answering": (SPANS, {"doc_stride": 4, "max_query_length": 4, "max_sequence_length": 40}),
    "multiple_choice": (CHOICES, {}),
    "answer_selection": (PAIR, RANK),
    "answer_selection -k 2": (PAIR, RANK | {"k": 2, "max_sequence_length": LONG}),
    "retrieval": (PAIR, RANK),
}
ROUNDS = [(task, model_type) for task in TASKS for model_type in TYPES]
GENERATES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "summarization": (STORIES, {"max_target_length": 6, "generation_num_beams": 2}),
    "denoising": ([{"text": row["document"]} for row in STORIES], {}),
}
ROUNDS += [(task, model_type) for task in GENERATES for model_type in ("bart", "mbart", "pegasus")]
TASKS |= GENERATES
TYPES |= dict.fromkeys(("bart", "mbart", "pegasus"), SEQ2SEQ)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A converted model of each type, by its name."""
    home = tmp_path_factory.mktemp("lsg")
    vocabulary = home / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    tokenizer = get_text_tokenizer(str(vocabulary), words=False)
    made = {}
    for model_type, keys in TYPES.items():
        positions = BASE + 1 if model_type in COUNT_PADDING else BASE
        more = {"vocab_size": len(tokenizer), "pad_token_id": 0, "max_position_embeddings": positions}
        if model_type in COUNT_PADDING:
            more["type_vocab_size"] = 1
        torch.manual_seed(0)
        auto = transformers.AutoModelForSeq2SeqLM if keys is SEQ2SEQ else transformers.AutoModel
        base = auto.from_config(transformers.AutoConfig.for_model(model_type, **keys, **more))
        base.save_pretrained(home / model_type)
        tokenizer.save_pretrained(home / model_type)
        sizes = {"block_size": BLOCK, "sparse_block_size": BLOCK, "num_global_tokens": 2}
        model, of_model = LSGConverter(LONG).convert_from_pretrained(home / model_type, **sizes)
        made[model_type] = home / f"lsg-{model_type}"
        model.save_pretrained(made[model_type])
        of_model.save_pretrained(made[model_type])
    return made


def flags(folder: Path, task: str, out: Path, **more: Any) -> dict[str, Any]:
    rows, of_task = TASKS[task]
    data = out / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "pipeline": task.split(" ")[0], "pre_trained_model": str(folder), "name": "run", "output_dir": str(out / "out"),
        "max_sequence_length": 50, "batch_size": 2, "max_steps": 1, "accelerator": "cpu", "train_dataset": (str(data),),
        "valid_dataset": str(data), "num_sanity_val_steps": 0, "log_every_n_steps": 1, "no_epoch_checkpointing": True,
        "no_val_checkpointing": True,
    } | of_task | more  # fmt: skip


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(alike, one, other))
    return abs(one - other) < 1e-5 if isinstance(one, float) else one == other


@pytest.mark.parametrize(("task", "model_type"), ROUNDS)
def test_a_round(task: str, model_type: str, folders, tmp_path) -> None:
    settings = flags(folders[model_type], task, tmp_path)
    results = train(**settings)
    assert results["steps"] == 1
    assert results["valid"]
    out = Outputs(tmp_path / "out", "run")
    first = out.best / "masked_lm" if "+" in task else out.best
    assert transformers.AutoConfig.from_pretrained(first).model_type == f"lsg-{model_type}"
    assert (first / "modeling_lsg.py").is_file()  # loads without the package too
    if task == "masked_lm":
        return  # what it finds depends on the masks
    (written,) = out.predictions.iterdir()
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    # Batches as the run had them: a text is short or long with its neighbours.
    again = predict(
        pre_trained_model=str(out.best), predict_dataset=settings["valid_dataset"], accelerator="cpu", batch_size=2
    )
    for one, other in zip(rows, again, strict=True):
        assert alike(one, json.loads(json.dumps(other))), (one, other)


def test_the_classifier_takes_one(folders, tmp_path, monkeypatch) -> None:
    """`classifier.py --pre_trained_model` is `train --pipeline seq_class`, and takes its flags."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in TEXT))
    monkeypatch.chdir(tmp_path)
    words = [f"--pre_trained_model={folders['bert']}", "--train_dataset", str(data), "--max_steps=1", "--name=run"]
    assert main(["classify", *words, "--accelerator=cpu", "--batch_size=2", "--max_sequence_length=50"]) == 0
    best = Outputs(tmp_path / "outputs", "run").best
    assert transformers.AutoConfig.from_pretrained(best).architectures == ["LSGBertForSequenceClassification"]


def test_token_types_reach_the_encoder(folders, tmp_path, monkeypatch) -> None:
    seen = []
    forward = train_module.TaskModule.training_step

    def training_step(self, batch, batch_idx):
        seen.append(batch["inputs"])
        return forward(self, batch, batch_idx)

    monkeypatch.setattr(train_module.TaskModule, "training_step", training_step)
    for model_type, number in (("bert", 2), ("roberta", 0), ("distilbert", 0)):
        train(**flags(folders[model_type], "answer_selection", tmp_path, name=model_type))
        assert len(seen[-1].get("token_type_ids", torch.empty(0)).unique()) == number


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_as_long_as_the_positions_go_and_no_longer(model_type: str, folders, tmp_path) -> None:
    long = [{"text": " ".join(STORY * 2), "label": label} for label in ("yes", "no")]
    settings = flags(folders[model_type], "seq_class", tmp_path, max_sequence_length=LONG)
    Path(settings["train_dataset"][0]).write_text("".join(json.dumps(row) + "\n" for row in long))
    assert train(**settings)["steps"] == 1
    with pytest.raises(InputError, match=f"the model takes {LONG} tokens"):
        train(**settings | {"max_sequence_length": LONG + 1, "name": "longer"})


def test_logits_of_selected_tokens_are_those_of_the_whole_head(folders, tmp_path) -> None:
    """In a mixture, where one pass of the encoder serves both heads; on a text of many blocks."""
    settings = flags(folders["bert"], "masked_lm+token_class", tmp_path)
    args = make_train_args(**settings)
    tasks = make_tasks(args.pipeline, args)
    tasks[0].learn(TAGS)
    tokenizer = load_tokenizer(args, tasks)
    heads = make_heads(args, tasks, tokenizer).eval()
    ids = torch.randint(5, len(tokenizer), (2, 41), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    labels = torch.where((ids % 3 == 0) & (mask == 1), ids, -100)
    batch = {"inputs": {"input_ids": ids, "attention_mask": mask}, "masked_lm_labels": labels}
    with torch.no_grad():
        hidden = heads(batch["inputs"])
        found = {task.name: task.logits(heads.models[task.name], hidden, batch) for task in tasks}
        whole = {name: heads.models[name](**batch["inputs"]).logits for name in found}
    torch.testing.assert_close(found["masked_lm"], whole["masked_lm"][labels != -100])
    torch.testing.assert_close(found["token_class"], whole["token_class"])


def test_the_best_folder_is_an_lsg_model_for_the_auto_classes(folders, tmp_path) -> None:
    train(**flags(folders["electra"], "seq_class", tmp_path, batch_size=1))
    out = Outputs(tmp_path / "out", "run")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out.best).eval()
    assert type(model).__name__ == "LSGElectraForSequenceClassification"
    assert model.config.block_size == BLOCK
    tokenizer = transformers.AutoTokenizer.from_pretrained(out.best)
    lines = [json.loads(line) for line in (out.predictions / "valid.jsonl").read_text().splitlines()]
    for row, line in zip(TEXT, lines, strict=True):
        with torch.no_grad():
            scores = model(**tokenizer(row["text"], return_tensors="pt")).logits[0].softmax(-1)
        assert list(line["scores"].values()) == pytest.approx(scores.tolist(), abs=1e-5)


def test_from_scratch_with_the_config_of_a_folder(folders, tmp_path) -> None:
    """--pre_trained_config alone; keys of LSG's are set and checked like any others."""
    settings = flags(folders["bert"], "seq_class", tmp_path)
    settings |= {"pre_trained_config": settings.pop("pre_trained_model")}
    train(**settings, additional_config_kwargs=("sparsity_type=pooling",))
    config = transformers.AutoConfig.from_pretrained(Outputs(tmp_path / "out", "run").best)
    assert (config.model_type, config.sparsity_type) == ("lsg-bert", "pooling")
    with pytest.raises(InputError, match="sparsity_type must be one of"):
        train(**settings | {"name": "other"}, additional_config_kwargs=("sparsity_type=poling",))


class Stop(Exception):
    pass


@pytest.mark.parametrize("kind", ["norm", "lsh"])
def test_a_cut_run_ends_bit_equal(kind: str, folders, tmp_path, monkeypatch) -> None:
    """With dropout, whose seeds LSG attention draws by itself, and with lsh, which draws its directions."""
    more = {"max_steps": 6, "checkpoint_interval": 1, "additional_config_kwargs": (f"sparsity_type={kind}",)}
    more |= {"num_workers": 0, "gradient_checkpointing": kind == "norm"}
    whole = train(**flags(folders["bert"], "seq_class", tmp_path, **more, name="whole"))
    with monkeypatch.context() as patch:

        def on_train_batch_start(self, batch, batch_idx):
            if self.global_step >= 3:
                raise Stop

        patch.setattr(train_module.TaskModule, "on_train_batch_start", on_train_batch_start)
        with pytest.raises(Stop):
            train(**flags(folders["bert"], "seq_class", tmp_path, **more, name="cut"))
    resumed = train(name="cut", output_dir=str(tmp_path / "out"), resume=True)
    states = [
        torch.load(Outputs(tmp_path / "out", name).checkpoints / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "cut")
    ]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert resumed["steps"] == whole["steps"] == 6


def test_two_processes_train_on_short_texts_too(folders, tmp_path) -> None:
    """Short texts use no global tokens, and every weight must still have a gradient."""
    settings = flags(folders["bert"], "seq_class", tmp_path, devices="2", max_steps=2)
    rows = [{"text": "the cat", "label": "yes"}, {"text": "one bird", "label": "no"}, *TEXT] * 2
    Path(settings["train_dataset"][0]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train(**settings)["processes"] == 2
