"""`funneltfm convert-lsg` and its doorstep."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from funneltfm.cli.convert_lsg import read_model_kwargs
from funneltfm.cli.main import main
from funneltfm.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("{}", {}),
        ("", {}),
        ('{"block_size": 64, "sparsity_type": "lsh"}', {"block_size": 64, "sparsity_type": "lsh"}),
        ("{'block_size': 64, 'pool_with_global': False}", {"block_size": 64, "pool_with_global": False}),
        ("{sparsity_type: null, a: 0.5}", {"sparsity_type": None, "a": 0.5}),
        ("{'sparsity_type': None}", {"sparsity_type": None}),
        ("block_size=64 sparsity_type=pooling", {"block_size": 64, "sparsity_type": "pooling"}),
        ("block_size=64,exact_short=false", {"block_size": 64, "exact_short": False}),
    ],
)
def test_keys_are_read(text, values):
    assert read_model_kwargs(text) == values


@pytest.mark.parametrize("name", ["keys.json", "keys.yaml"])
def test_keys_are_read_from_files(tmp_path, name):
    path = tmp_path / name
    path.write_text('{"block_size": 64}' if name.endswith("json") else "block_size: 64\n")
    assert read_model_kwargs(str(path)) == {"block_size": 64}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{block_size: 64", "neither YAML nor JSON"),
        ("block_size", "key=value pairs"),
        ("=3", "key=value pairs"),
        ("a=1 a=2", "twice"),
        ("{1: 2}", "values to keys"),
        ("none.json", "cannot read none.json"),
    ],
)
def test_keys_that_cannot_be_read(text, said):
    with pytest.raises(InputError, match=said):
        read_model_kwargs(text)


@pytest.fixture
def base(tmp_path):
    """A folder of a base model with a tokenizer."""
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    config = BertConfig(vocab_size=60, max_position_embeddings=100, pad_token_id=1, eos_token_id=2, **shape)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    words = {word: i for i, word in enumerate(["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]", *map(str, range(55))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    special = {"cls_token": "[CLS]", "pad_token": "[PAD]", "mask_token": "[MASK]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_checkpoint_is_converted_and_checked(base, tmp_path, capsys):
    words = [f"--initial_model={base}", f"--model_name={tmp_path / 'lsg'}", "--max_sequence_length=200"]
    words += ["--model_kwargs", "{'block_size': 8, 'sparse_block_size': 8}", "--run_test"]
    assert main(["convert-lsg", *words]) == 0
    out = capsys.readouterr().out
    assert "LSGBertForSequenceClassification for 200 tokens" in out
    assert out.count("bit for bit") == 3
    assert out.count("differ by at most 0.0e+00") == 2
    config = json.loads((tmp_path / "lsg/config.json").read_text())
    assert (config["block_size"], config["max_position_embeddings"]) == (8, 200)
    assert (tmp_path / "lsg/modeling_lsg.py").is_file()
    assert main(["convert-lsg", *words]) == 1
    assert "exists and is not empty" in capsys.readouterr().err


def test_nothing_is_written_where_a_key_does_not_fit(base, tmp_path, capsys):
    words = [
        f"--initial_model={base}",
        f"--model_name={tmp_path / 'lsg'}",
        "--model_kwargs=block_size=8 sparsity_factor=3",
    ]
    assert main(["convert-lsg", *words]) == 1
    assert "sparsity_factor must be a divisor of block_size 8" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_required_flags(capsys):
    assert main(["convert-lsg", "--model_name=x"]) == 2
    assert "--initial_model is required" in capsys.readouterr().err


def test_the_doorstep_takes_a_file_of_flags(base, tmp_path):
    flags = {"initial_model": str(base), "model_name": "out", "max_sequence_length": 150, "use_token_ids": False}
    (tmp_path / "flags.json").write_text(json.dumps(flags))
    command = [sys.executable, str(ROOT / "pytorch/convert_checkpoint.py"), "flags.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/config.json").read_text())["max_position_embeddings"] == 150
