"""`funneltfm export`: a finetuned model that plain transformers serves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from funneltfm import FunnelTFM, ModelConfig, get_tokenizer
from funneltfm.cli.main import main
from funneltfm.funnel.checkpoints import save_checkpoint

PIECES = ["<pad>", "<unk>", "<cls>", "<sep>", "<mask>", "the", "cat", "sat", "on", "mat", ".", "##s", "dog"]


def finished_run(folder: Path, labels: list[str] | None) -> Path:
    """What a run leaves in `best`. No truncation and short sentences of a canonical length: no padding is needed."""
    best = folder / "best"
    best.mkdir(parents=True)
    config = ModelConfig(
        vocab_size=len(PIECES), d_embed=16, d_model=16, n_head=2, d_head=8, d_inner=24, block_size="1_1",
        separate_cls=True, num_class=len(labels) if labels else 1,
    )  # fmt: skip
    torch.manual_seed(0)
    save_checkpoint(FunnelTFM(config), best / "model.pt")
    config.to_json(best / "net_config.json")
    (best / "labels.json").write_text(json.dumps(labels))
    (best / "vocab.txt").write_text("".join(f"{piece}\n" for piece in PIECES))
    text = {"tokenizer_type": "word_piece", "cased": False, "max_length": 32, "vocabulary": "vocab.txt"}
    (best / "text_config.json").write_text(json.dumps(text))
    return folder


SERVE = """
import json, sys
from transformers import pipeline
assert "funneltfm" not in sys.modules
classify = pipeline("text-classification", model=sys.argv[1])
print(json.dumps(classify({"text": "The cats sat.", "text_pair": "On the mat"}, top_k=None, function_to_apply="none")))
"""


@pytest.mark.parametrize("labels", [["bad", "so so", "good"], None], ids=["classes", "regression"])
def test_transformers_alone_gives_the_same_scores(tmp_path: Path, labels: list[str] | None) -> None:
    run = finished_run(tmp_path / "run", labels)
    assert main(["export", str(run), str(tmp_path / "hf")]) == 0
    done = subprocess.run(
        [sys.executable, "-c", SERVE, str(tmp_path / "hf")], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
    scores = {row["label"]: row["score"] for row in json.loads(done.stdout.splitlines()[-1])}

    tokenizer = get_tokenizer("word_piece", run / "best/vocab.txt")
    a, b = tokenizer.convert_texts_to_ids(["The cats sat.", "On the mat"])
    inputs = torch.tensor([[2, *a, 3, *b, 3]])
    seg_id = torch.tensor([[2] + [0] * (len(a) + 1) + [1] * (len(b) + 1)])
    model = FunnelTFM(ModelConfig.init_from_json(run / "best/net_config.json")).eval()
    model.load_state_dict(torch.load(run / "best/model.pt", weights_only=True))
    with torch.no_grad():
        logits = model(inputs, seg_id=seg_id)[1]["cls_logits"][0]
    names = labels or ["score"]
    assert scores == pytest.approx(dict(zip(names, logits.tolist(), strict=True)), abs=1e-5)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["export", str(tmp_path), str(tmp_path / "x")]) == 1
    assert "no finetuned model" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_sparse_models_of_train(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A compact folder beside its model; `train` says how to get back what it can read."""
    transformers = pytest.importorskip("transformers")
    from funneltfm.sparse import SparsityConfig, attach, load_sparse

    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
    )
    model = transformers.BertForMaskedLM(config)
    attach(model, SparsityConfig(sparsity=0.8, count="model", embeddings=True))
    best = tmp_path / "run/best"
    model.save_pretrained(best)
    (best / "vocab.txt").write_text(
        "".join(f"{piece}\n" for piece in ["a", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    )
    small, again = tmp_path / "small", tmp_path / "again"
    assert main(["export", "--to=compact", "--values=fp16", str(tmp_path / "run"), str(small)]) == 0
    assert "times as many" in capsys.readouterr().out
    assert main(["export", str(small), str(again)]) == 0
    loaded = load_sparse(transformers.AutoModelForMaskedLM, again)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value if value.dtype == torch.bool else value.half().float())

    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    learn = ["train", "--pipeline=masked_lm", f"--train_dataset={tmp_path / 'rows.jsonl'}", "--max_steps=1"]
    for words, said in (
        ([*learn, f"--pre_trained_model={small}"], "export --to hf"),
        (["export", str(again), str(tmp_path / "x")], "as it is"),
        (["export", "--to=compact", str(small), str(tmp_path / "x")], "already"),
        (["export", "--to=compact", str(finished_run(tmp_path / "funnel", None)), str(tmp_path / "x")], "is dense"),
        (["export", str(tmp_path), str(tmp_path / "x")], "models of again, small"),
    ):
        assert main(words) == 1, words
        assert said in capsys.readouterr().err
    assert main(["export", "--values=fp16", str(small), str(tmp_path / "x")]) == 2
    assert not (tmp_path / "x").exists()


def test_a_sentencepiece_vocabulary_is_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = finished_run(tmp_path / "run", ["a", "b"])
    text = json.loads((run / "best/text_config.json").read_text())
    (run / "best/text_config.json").write_text(json.dumps(text | {"tokenizer_type": "sent_piece"}))
    assert main(["export", str(run), str(tmp_path / "hf")]) == 1
    assert "word_piece" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("text_config.json", "{", "cannot read the text config"),
        ("text_config.json", "[]", "must say tokenizer_type"),
        ("text_config.json", {"cased": "no"}, "must say tokenizer_type"),
        ("text_config.json", {"max_length": 0}, "must say tokenizer_type"),
        ("text_config.json", {"vocabulary": "none.txt"}, "there is no such file"),
        ("labels.json", '["a", "b", "c"]', "distinct names of 2 classes"),
        ("labels.json", '["a", "a"]', "each once, or null"),
        ("labels.json", "null", "distinct names of 2 classes"),
        ("vocab.txt", "".join(f"{piece}\n" for piece in [*PIECES, "more"]), "has 14 pieces, but the model knows 13"),
    ],
)
def test_a_folder_whose_files_do_not_belong_together(
    tmp_path: Path, capsys: pytest.CaptureFixture, name: str, content: str | dict, said: str
) -> None:
    run = finished_run(tmp_path / "run", ["a", "b"])
    path = run / "best" / name
    path.write_text(content if isinstance(content, str) else json.dumps(json.loads(path.read_text()) | content))
    assert main(["export", str(run), str(tmp_path / "hf")]) == 1
    message = capsys.readouterr().err
    assert said in message
    assert name in message or "none.txt" in message
    assert not (tmp_path / "hf").exists()
