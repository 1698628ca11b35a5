"""From raw text to a finetuned Funnel: blocks, kept tokens, streams, and the way into `funneltfm classify`."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

from funneltfm.cli.main import main
from funneltfm.data.features import Features
from funneltfm.data.text import TextEncoder
from funneltfm.errors import InputError
from funneltfm.funnel.config import canonical_length
from funneltfm.funnel.formats import convert_checkpoint
from funneltfm.tasks.base import make_tasks
from funneltfm.tasks.masked_lm import Unlabelled
from funneltfm.training import classify as classify_module
from funneltfm.training import train as train_module
from funneltfm.training.config import make_args
from funneltfm.training.model_source import load_tokenizer
from funneltfm.training.outputs import Outputs
from funneltfm.training.rundir import RunDir
from funneltfm.training.setup import load_data, make_model
from funneltfm.training.train import load_splits, train
from funneltfm.training.train_config import make_train_args

TEXT = "the old fox saw a small dog in that garden and was very happy but they ran away from it so soon"
WORDS = TEXT.split()
FUNNEL = (
    *("block_size=1_1", "d_model=16", "d_embed=16", "n_head=2", "d_head=8", "d_inner=32", "decoder_size=1"),
    *("separate_cls=true", "pool_q_only=true", "truncate_seq=true", "dropout=0.0", "dropatt=0.0"),
)
BERT = ("hidden_size=16", "num_hidden_layers=1", "num_attention_heads=2", "intermediate_size=32")


def write_corpus(path: Path, seed: int = 0, n: int = 40) -> None:
    rng = random.Random(seed)
    documents = (
        "\n".join(" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) for _ in range(rng.randint(1, 8)))
        for _ in range(n)
    )
    path.write_text("\n\n".join(documents) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """corpus.txt, held-out.txt and tokenizer/."""
    folder = tmp_path_factory.mktemp("raw")
    write_corpus(folder / "corpus.txt")
    write_corpus(folder / "held-out.txt", seed=1, n=10)
    words = ["train-tokenizer", str(folder / "corpus.txt"), "-o", str(folder / "tokenizer"), "--vocab_size=70"]
    assert main(words) == 0
    return folder


def flags(folder: Path, out: Path, **more: Any) -> dict[str, Any]:
    return {
        "pipeline": "masked_lm", "model": "bert", "additional_config_kwargs": BERT, "name": "run",
        "output_dir": str(out), "pre_trained_tokenizer": str(folder / "tokenizer"), "accelerator": "cpu",
        "train_dataset": [str(folder / "corpus.txt")], "valid_dataset": str(folder / "held-out.txt"),
        "max_sequence_length": 16, "batch_size": 8, "max_steps": 12, "learning_rate": 1e-2, "log_every_n_steps": 3,
    } | more  # fmt: skip


def weights(out: Path, name: str = "run") -> dict[str, torch.Tensor]:
    return load_file(Outputs(out, name).best / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train_features(folder: Path, **more: Any) -> Features:
    args = make_train_args(**flags(folder, folder, **more))
    tasks = make_tasks(args.pipeline, args)
    text = TextEncoder(load_tokenizer(args, tasks), args.max_sequence_length[0])
    return load_splits(args, tasks, text)[0]["train"].features


@pytest.mark.parametrize(
    "blocks", [{"packing": True}, {"packing": True, "across_documents": True}, {"sentence_pairs": True}]
)
def test_weights_are_shares_of_blocks(blocks: dict[str, Any], folder: Path) -> None:
    both = [str(folder / "corpus.txt"), str(folder / "held-out.txt")]
    args = make_train_args(**flags(folder, folder, train_dataset=both, train_weights=(1.0, 3.0), **blocks))
    tasks = make_tasks(args.pipeline, args)
    splits, draw = load_splits(args, tasks, TextEncoder(load_tokenizer(args, tasks), args.max_sequence_length[0]))
    rows = splits["train"].features.plain["row"]
    assert len(rows) > 60  # of 40 and 10 documents
    assert draw is not None
    epoch = draw.epoch(args.seed, 0)
    assert len(epoch) == len(rows)
    assert abs((rows[epoch] >= 40).mean() - 0.75) < 1 / len(rows)


# ---- kept tokens

BLOCKS: dict[str, dict[str, Any]] = {
    "lines": {},
    "packed": {"packing": True},
    "packed across": {"packing": True, "across_documents": True},
    "pairs": {"sentence_pairs": True},
}


@pytest.mark.parametrize("blocks", BLOCKS)
def test_kept_tokens_train_as_those_in_memory(
    blocks: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train(**flags(folder, tmp_path, **BLOCKS[blocks]))
    kept = {"tokenized_dir": str(tmp_path / "kept"), **BLOCKS[blocks]}
    first = train(**flags(folder, tmp_path, name="first", prepare_data_workers=1, **kept))
    monkeypatch.setattr(Unlabelled, "examples", None)  # from here on nothing is tokenised
    original = train_module.open_rows

    def not_for_training(source: str, *args: Any) -> Any:
        assert not source.endswith("corpus.txt")
        return original(source, *args)

    monkeypatch.setattr(train_module, "open_rows", not_for_training)
    second = train(**flags(folder, tmp_path, name="second", **kept, num_workers=1))
    assert first["valid"] == second["valid"] == plain["valid"]
    assert equal(weights(tmp_path), weights(tmp_path, "first"))
    assert equal(weights(tmp_path), weights(tmp_path, "second"))


def test_kept_tokens_are_for_one_key(folder: Path, tmp_path: Path) -> None:
    """Whatever changes the examples makes another folder; the task and its masks do not."""
    text = (folder / "corpus.txt").read_text()
    corpus, other = tmp_path / "a.txt", tmp_path / "b.txt"
    corpus.write_text(text)
    other.write_text(text.replace("fox", "dog", 1))
    assert main(["train-tokenizer", str(corpus), "-o", str(tmp_path / "tokenizer"), "--vocab_size=60"]) == 0
    kept = tmp_path / "kept"

    def make(**more: Any) -> int:
        settings = {"tokenized_dir": str(kept), "train_dataset": [str(corpus)], "valid_dataset": None, "packing": True}
        features = train_features(folder, **(settings | more))
        in_memory = train_features(folder, **(settings | more | {"tokenized_dir": None}))
        assert len(features) == len(in_memory)
        assert all(np.array_equal(features[i]["input_ids"], in_memory[i]["input_ids"]) for i in range(len(features)))
        return len(list(kept.iterdir()))

    assert make() == 1
    changes: list[dict[str, Any]] = [
        {"train_dataset": [str(other)]},
        {"train_dataset": [str(corpus), str(other)]},
        {"train_dataset": [str(other), str(corpus)]},
        {"pre_trained_tokenizer": str(tmp_path / "tokenizer")},
        {"max_sequence_length": 17},
        {"packing": False},
        {"packing": False, "sentence_pairs": True},
        {"packing": False, "sentence_pairs": True, "short_pairs": 0.5},
        {"across_documents": True},
        {"train_filter": ("len(text) > 60",)},
        {"train_shard_dataset": 2},
        {"bad_rows": "skip"},
    ]
    for number, change in enumerate(changes, 2):
        assert make(**change) == number, change
    assert make(probability=0.3, whole_word_masking=True, seed=3) == len(changes) + 1
    assert make(pipeline="electra") == len(changes) + 1
    (tmp_path / "again.txt").write_text(text)  # the content counts, not the name
    train_features(folder, tokenized_dir=str(kept), train_dataset=[str(tmp_path / "again.txt")], valid_dataset=None,
                   packing=True)  # fmt: skip
    assert len(list(kept.iterdir())) == len(changes) + 2  # but a folder has its name


def test_a_text_without_examples_is_said(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": " "}\n')
    for more in ({}, {"tokenized_dir": str(tmp_path / "kept")}):
        with pytest.raises(InputError, match=r"empty\.jsonl: no row makes an example"):
            train_features(folder, train_dataset=[str(tmp_path / "empty.jsonl")], packing=True, **more)


def test_messages_name_the_line_of_kept_texts(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": 5.5}\n{"text": null}\n')
    with pytest.raises(InputError, match=r"a\.jsonl, line 4: expected a text in column 'text', got null"):
        train_features(folder, train_dataset=[str(tmp_path / "a.jsonl")], tokenized_dir=str(tmp_path / "kept"))
    assert not list((tmp_path / "kept").iterdir())


def test_hugging_face_folders(folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    documents = (folder / "corpus.txt").read_text().strip().split("\n\n")
    datasets.Dataset.from_dict({"text": documents}).save_to_disk(tmp_path / "set")
    more = {"packing": True, "valid_dataset": None, "tokenized_dir": str(tmp_path / "kept")}
    features = train_features(folder, train_dataset=[str(tmp_path / "set")], **more)
    wanted = train_features(folder, **more)
    assert len(features) == len(wanted)
    assert all(np.array_equal(features[i]["input_ids"], wanted[i]["input_ids"]) for i in range(len(wanted)))


# ---- streams


@pytest.mark.parametrize("blocks", ["packed", "packed across", "pairs"])
def test_a_stream_of_blocks_is_resumed(
    blocks: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("funneltfm.data.streaming._GROUP", 8)
    more: dict[str, Any] = {"streaming": True, "checkpoint_interval": 5, "valid_dataset": None, **BLOCKS[blocks]}
    whole = train(**flags(folder, tmp_path, max_steps=20, **more))
    assert whole["steps"] == 20

    class Stop(Exception):
        pass

    original = train_module.TaskModule.training_step

    def stops(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 12:
            raise Stop
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(train_module.TaskModule, "training_step", stops)
        with pytest.raises(Stop):
            train(**flags(folder, tmp_path, name="cut", max_steps=20, **more))
    train(name="cut", output_dir=str(tmp_path), resume=True)
    assert equal(weights(tmp_path), weights(tmp_path, "cut"))


# ---- the whole way


def test_pretrained_with_electra_then_finetuned(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What scripts/pretrain.sh and then scripts/classifier.sh do."""
    monkeypatch.chdir(tmp_path)
    results = train(**flags(
        folder, tmp_path, pipeline="token_detection_and_masked_lm", model="funnel", additional_config_kwargs=FUNNEL,
        packing=True, across_documents=True, embedding_sharing="gdes", tokenized_dir=str(tmp_path / "kept"),
        monitor="valid/masked_lm/perplexity", loggers=("csv",),
    ))  # fmt: skip
    assert {"token_detection/f1", "masked_lm/perplexity", "masked_lm/loss"} <= results["valid"].keys()
    assert results["tokens_per_second"] > 0
    log = (Outputs(tmp_path, "run").run / "log.txt").read_text()
    for word in ("loss ", "token_detection/f1 ", "masked_lm/perplexity ", " tokens/s", " left"):
        assert word in log
    assert main(["curves", str(Outputs(tmp_path, "run").run)]) == 0
    best = Outputs(tmp_path, "run").best
    convert_checkpoint(best, tmp_path / "pt", to="pt", kind="funneltfm")
    (tmp_path / "pt/vocab.txt").write_bytes((folder / "tokenizer/vocab.txt").read_bytes())

    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "valid"):
        rows = [{"text_a": "the old fox ran away" + " so soon" * (i % 3), "text_b": "they saw a dog", "label": i % 2}
                for i in range(20)]  # fmt: skip
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {
        "dataset": "custom", "data_dir": str(data), "tokenizer_path": str(tmp_path / "pt/vocab.txt"),
        "text_b": "text_b", "init_ckpt": str(tmp_path / "pt/model.pt"), "model_dir": str(tmp_path / "exp"),
        "max_length": 32,
    }  # fmt: skip
    args = make_args(**settings)
    args.given = frozenset(settings)
    loaded = load_data(args)
    net = make_model(args, loaded, RunDir(tmp_path / "exp")).eval()
    model = transformers.AutoModelForPreTraining.from_pretrained(best).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(best)
    for i in range(4):
        row = rows[i]
        mine = loaded.splits["train"][i]
        inputs, seg_id = (torch.from_numpy(mine[name].astype(np.int64))[None] for name in ("inputs", "seg_id"))
        pair = tokenizer(row["text_a"], row["text_b"], return_tensors="pt")
        assert torch.equal(pair["input_ids"], inputs)
        n = inputs.size(1)
        more = canonical_length(n, net.net_config) - n  # as both pad by themselves
        mask = torch.arange(n + more)[None] >= n
        with torch.no_grad():
            padded, segments = F.pad(inputs, (0, more), value=tokenizer.pad_token_id), F.pad(seg_id, (0, more))
            hiddens, _ = net.extract_hiddens(padded, seg_id=segments, input_mask=mask)
            theirs = model.funnel(**pair, output_hidden_states=True).hidden_states
        assert len(hiddens) == 3
        for full, (a, b) in zip((True, True, False), zip(hiddens, theirs, strict=False), strict=True):
            torch.testing.assert_close(a[:, :n] if full else a, b)
        assert hiddens[-1].std() > 0.1
    finetuned = classify_module.classify(**settings, epochs=1, lr=1e-3)
    assert 0 <= finetuned["valid"]["accuracy"] <= 1
    assert (tmp_path / "exp/best/model.pt").is_file()
