"""Every block of the README runs as printed, in a copy of the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models

from funneltfm import FunnelTFM, ModelConfig
from funneltfm.funnel.checkpoints import save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
PYTHON = [body for language, body in BLOCKS if language == "python"]
BASH = [body for language, body in BLOCKS if language == "bash"]

# Blocks that are not run here, and what runs them.
ELSEWHERE = {
    "pip install -c constraints.txt -e .\n": "scripts/setup.sh runs it",
    "bash scripts/classifier.sh\n": "tests/test_scripts.py runs it in full",
    "bash scripts/test.sh\n": "it runs this test",
}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The repository's files in a fresh folder, with this environment as its .venv and stand-ins for what the
    network gives.
    """
    if not (ROOT / ".venv/bin/python").exists():
        pytest.skip("no .venv: the README's commands run where scripts/setup.sh has been")
    for name in ("pytorch", "scripts", "data-scripts", "pyproject.toml", "constraints.txt", "download_all_ckpts.sh"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, tmp_path / name)
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    (tmp_path / "scripts/setup.sh").write_text("")  # it would install the copy into the environment that runs this test
    return tmp_path


def run(copy: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(copy / "pytorch"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tiny_checkpoint(folder: Path) -> None:
    """What the archive of a published checkpoint holds, in small."""
    folder.mkdir(parents=True)
    pieces = [
        "<pad>",
        "<unk>",
        "<cls>",
        "<sep>",
        "<mask>",
        *"abcdefghijklmnopqrstuvwxyz.,?",
        *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
    ]
    (folder / "vocab.uncased.txt").write_text("".join(f"{piece}\n" for piece in pieces))
    size = {"d_embed": 16, "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32, "block_size": "1_1_1"}
    config = ModelConfig(vocab_size=len(pieces), separate_cls=True, pool_q_only=True, truncate_seq=True, **size)
    config.to_json(folder / "net_config.pytorch.json")
    torch.manual_seed(0)
    save_checkpoint(FunnelTFM(config, cls_target="best" in folder.parts), folder / "model.pt")


def stand_ins(copy: Path) -> None:
    tiny_checkpoint(copy / "pretrained/B4-4-4H768-ELEC-PT")
    cola = copy / "data/glue/CoLA"
    cola.mkdir(parents=True)
    tiny_checkpoint(copy / "exp/sample/run_1/best")
    text = {"tokenizer_type": "word_piece", "cased": False, "max_length": 32, "vocabulary": "vocab.uncased.txt"}
    (copy / "exp/sample/run_1/best/text_config.json").write_text(json.dumps(text))
    (copy / "exp/sample/run_1/best/labels.json").write_text('["no", "yes"]')
    rows = [f"gj04\t{i % 2}\t\tSentence number {i}." for i in range(40)]
    (cola / "train.tsv").write_text("\n".join(rows) + "\n")
    (cola / "dev.tsv").write_text("\n".join(rows[:10]) + "\n")
    (cola / "test.tsv").write_text("index\tsentence\n" + "".join(f"{i}\tA sentence.\n" for i in range(10)))
    roberta = transformers.RobertaConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.RobertaForMaskedLM(roberta).save_pretrained(copy / "tiny-roberta")
    letters = {piece: i for i, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *"abcdefghij"])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", cls_token="<s>", sep_token="</s>", mask_token="<mask>"
    ).save_pretrained(copy / "tiny-roberta")
    texts = copy / "my_texts"
    texts.mkdir()
    for name in "ab":
        (texts / f"{name}.txt").write_text("".join(f"Sentence {i} of {name}.\n\n" for i in range(40)))
    own = copy / "my_data"
    own.mkdir()
    for split in ("train", "valid"):
        (own / f"{split}.csv").write_text("question,answer,good\n" + 'who?,me,yes\nwhere?,"here, there",no\n' * 8)


def test_every_block_has_a_test() -> None:
    assert set(ELSEWHERE) <= set(BASH)
    assert len(PYTHON) == 3
    assert len(BASH) == 8


def test_custom_usage_example(copy: Path) -> None:
    printed = run(copy, sys.executable, "-c", PYTHON[0])
    shapes = eval(printed)
    assert shapes == [(8, 35, 128)] * 3 + [(8, 18, 128)] * 2 + [(8, 9, 128)] * 2


def test_python_classify_example(copy: Path) -> None:
    run(copy, sys.executable, "data-scripts/make_sample.py", "data/sample", "--train=200")
    accuracy = float(run(copy, sys.executable, "-c", PYTHON[1]).splitlines()[-1])
    assert 0 <= accuracy <= 1
    assert (copy / "exp/tiny/results.json").exists()


def test_auto_class_example(copy: Path) -> None:
    stand_ins(copy)
    source = "pretrained/B4-4-4H768-ELEC-PT"
    run(copy, ".venv/bin/funneltfm", "convert-ckpt", "--to=funneltfm", source, "pretrained/B4-4-4H768")
    assert run(copy, sys.executable, "-c", PYTHON[2] + "print(type(model).__name__)").strip() == "FunnelTFMModel"


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for block in BASH if block not in ELSEWHERE], ids=lambda b: b.split()[0])
def test_bash_blocks(copy: Path, block: str) -> None:
    stand_ins(copy)
    commands = [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    for command in commands:
        # Downloads are listed only: tests/test_downloads.py runs them for real against a local server.
        command = command + " --list" if "download" in command.split()[1] else command
        command = command.replace("roberta-base", "tiny-roberta")
        command = f"{command} --max_steps=2" if "pretrain.sh" in command else command
        if "-ELEC-TF" in command:  # needs TensorFlow: tests/test_scripts.py runs it
            continue
        run(copy, "bash", "-c", command)
    left = ("exp/*/run_1/results.json", "exported/model.safetensors", "predictions.jsonl", "lsg-roberta/config.json")
    assert any(path for name in left for path in copy.glob(name))


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) <= 172
