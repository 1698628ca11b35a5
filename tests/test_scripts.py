"""The shell scripts, as a stranger calls them."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted([*ROOT.glob("*.sh"), *ROOT.glob("scripts/*.sh"), *ROOT.glob("data-scripts/*.sh"), ROOT / ".ci/run"])
NEEDS_VENV = pytest.mark.skipif(
    not (ROOT / ".venv/bin/python").exists(), reason="no .venv: these tests run where scripts/setup.sh has been"
)


def bash(*words: object, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    command = ["bash", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_bash_and_strict(script: Path) -> None:
    assert bash("-n", script, cwd=ROOT).returncode == 0
    assert "set -euo pipefail" in script.read_text(encoding="utf-8")


@pytest.mark.slow
@NEEDS_VENV
def test_classifier_sh_learns_the_sample_from_any_folder(tmp_path: Path) -> None:
    done = bash(ROOT / "scripts/classifier.sh", cwd=tmp_path, data_dir=str(tmp_path / "sample"))
    assert done.returncode == 0, done.stderr
    run = tmp_path / "exp/sample/run_1"
    results = json.loads((run / "results.json").read_text())
    assert results["valid"]["accuracy"] > 0.95
    assert results["test"]["accuracy"] > 0.95
    assert results["baselines"]["bag_of_words"]["accuracy"] < 0.70
    assert f"{results['valid']['accuracy']:.4f}" in done.stderr  # the table
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert files >= {
        "config.yaml",
        "metrics.csv",
        "results.json",
        "log.txt",
        "best/model.pt",
        "best/net_config.json",
        "predictions/test.jsonl",
        "plots/learning_curves.png",
        "plots/confusion_matrix_valid.png",
    }


@pytest.mark.slow
@NEEDS_VENV
def test_multigpu_classifier_sh_takes_all_devices(tmp_path: Path) -> None:
    sample = [ROOT / "data-scripts/make_sample.py", tmp_path / "sample", "--train=200"]
    subprocess.run([ROOT / ".venv/bin/python", *sample], check=True)
    script = ROOT / "scripts/multigpu_classifier.sh"
    done = bash(script, "--epochs=1", "--n_valid=1", cwd=tmp_path, data_dir=str(tmp_path / "sample"))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "exp/sample/run_1/results.json").read_text())
    assert results["processes"] == (torch.cuda.device_count() or 2)
    assert results["steps"] == -(-200 // (16 * results["processes"]))  # 16 examples in each process


@pytest.mark.slow
@NEEDS_VENV
def test_pretrain_sh_makes_what_classifier_sh_finetunes(tmp_path: Path) -> None:
    sample = [ROOT / "data-scripts/make_sample.py", tmp_path / "sample", "--train=200"]
    subprocess.run([ROOT / ".venv/bin/python", *sample], check=True)
    short = ("--max_steps=6", "--log_every_n_steps=2", "--val_check_interval=3", "--batch_size=8")
    env = {"data_dir": str(tmp_path / "sample"), "HF_HUB_OFFLINE": "1"}
    done = bash(ROOT / "scripts/pretrain.sh", *short, cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    for word in ("loss", "token_detection/f1", "masked_lm/perplexity", "tokens/s", "left"):
        assert f" {word}" in done.stderr
    run, pretrained = tmp_path / "outputs/runs/sample-electra", tmp_path / "pretrained/sample-electra"
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((run / "results.json").read_text())["steps"] == 6
    assert {"model.pt", "net_config.pytorch.json", "vocab.txt"} <= {path.name for path in pretrained.iterdir()}
    finetune = ("--epochs=1", "--n_valid=1")
    done = bash(ROOT / "scripts/classifier.sh", *finetune, cwd=tmp_path, pretrain_dir=str(pretrained), **env)
    assert done.returncode == 0, done.stderr
    assert f"loaded {pretrained}/model.pt; new: cls_head" in done.stderr
    assert (tmp_path / "exp/sample/run_1/results.json").is_file()


@pytest.mark.slow
@NEEDS_VENV
def test_pretrain_sh_takes_text_files(tmp_path: Path) -> None:
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text("The old fox ran.\nIt was late.\n\nThe dog slept.\n" * 10)
    words = (
        "one.txt",
        "two.txt",
        "--max_steps=2",
        "--max_sequence_length=16",
        "--batch_size=4",
        "--num_warmup_steps=0",
    )
    env = {"name": "mine", "vocab_size": "60", "pretrain_dir": "made", "HF_HUB_OFFLINE": "1"}
    done = bash(ROOT / "scripts/pretrain.sh", *words, cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "made/model.pt").is_file()
    assert (tmp_path / "outputs/tokenizers/mine/tokenizer.json").is_file()
    again = bash(ROOT / "scripts/pretrain.sh", *words, cwd=tmp_path, **env)
    assert again.returncode == 1
    assert "there is a run named mine" in again.stderr
    assert "using the tokenizer outputs/tokenizers/mine, which is there" in again.stderr
    (tmp_path / "one.txt").write_text("Zebras came.\n" * 20)
    anew = bash(ROOT / "scripts/pretrain.sh", *words, "--overwrite", cwd=tmp_path, **env)
    assert anew.returncode == 0, anew.stderr
    assert "using the tokenizer" not in anew.stderr
    assert "z" in (tmp_path / "made/vocab.txt").read_text().split()  # it was learned anew


@NEEDS_VENV
def test_pretrain_sh_wants_a_tokenizer_that_is_there(tmp_path: Path) -> None:
    done = bash(ROOT / "scripts/pretrain.sh", "a.txt", cwd=tmp_path, tokenizer="none", HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert "tokenizer=none must be the folder of a tokenizer" in done.stderr


@pytest.mark.slow
@NEEDS_VENV
def test_pretrain_sh_reads_other_columns_as_a_stream_for_masked_words(tmp_path: Path) -> None:
    rows = [{"title": "The old fox", "body": "ran. It was late."}, {"title": "The dog", "body": "slept."}] * 10
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--max_steps=2", "--max_sequence_length=16", "--batch_size=4", "--num_warmup_steps=0", "--streaming")
    env = {"columns": "title body", "objective": "mlm", "vocab_size": "60", "HF_HUB_OFFLINE": "1"}
    done = bash(ROOT / "scripts/pretrain.sh", "texts.jsonl", *words, cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    vocab = (tmp_path / "pretrained/small-mlm/vocab.txt").read_text().split()
    assert {"x", "w"} <= {*vocab}  # of fox and was
    assert not (tmp_path / "outputs/tokenized").exists()


@NEEDS_VENV
def test_classifier_sh_passes_flags_on(tmp_path: Path) -> None:
    done = bash(ROOT / "scripts/classifier.sh", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "--pool_q_only" in done.stdout
    done = bash(ROOT / "scripts/classifier.sh", "--epoch=3", cwd=tmp_path)
    assert done.returncode == 2
    assert "Did you mean --epochs?" in done.stderr


@NEEDS_VENV
@pytest.mark.parametrize("name", ["data_dir", "pretrain_dir"])
def test_classifier_sh_says_what_is_missing(tmp_path: Path, name: str) -> None:
    given = {"data_dir": "x", "pretrain_dir": "y"}
    del given[name]
    done = bash(ROOT / "scripts/classifier.sh", cwd=tmp_path, task_name="CoLA", **given)
    assert done.returncode != 0
    assert f"{name}=..." in done.stderr


@NEEDS_VENV
def test_setup_sh_is_quick_and_silent_when_nothing_has_changed(tmp_path: Path) -> None:
    bash(ROOT / "scripts/setup.sh", cwd=tmp_path, EXTRAS="test")
    again = bash(ROOT / "scripts/setup.sh", cwd=tmp_path, EXTRAS="test")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")


@pytest.mark.slow
@NEEDS_VENV
@pytest.mark.skipif(not (ROOT / ".venv-tf/bin/python").exists(), reason="no .venv-tf: bash scripts/setup_tf.sh")
def test_convert_ckpt2pt_sh(tmp_path: Path) -> None:
    case = ROOT.parent / "shared/fixtures/funnel/enc_2_2_2"
    if not case.is_dir():
        pytest.skip("needs ../shared/fixtures/funnel")
    done = bash(ROOT / "scripts/convert_ckpt2pt.sh", case, "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "123 tensors" in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.pt", "net_config.pytorch.json"}
    done = bash(ROOT / "scripts/convert_ckpt2pt.sh", cwd=tmp_path)
    assert done.returncode == 2
    assert "usage" in done.stderr


def test_setup_sh_refuses_a_python_that_does_not_fit(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    copy = tmp_path / "scripts/setup.sh"
    copy.write_text((ROOT / "scripts/setup.sh").read_text())
    done = bash(copy, cwd=tmp_path, PYTHON="/nonexistent/python")
    assert done.returncode == 1
    assert "Python 3.11 or newer" in done.stderr
    assert not (tmp_path / ".venv").exists()
