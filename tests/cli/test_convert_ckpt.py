"""`funneltfm convert-ckpt`: what it prints, and what it refuses."""

from pathlib import Path

import pytest
import torch

from funneltfm import FunnelTFM, ModelConfig
from funneltfm.cli.main import main
from funneltfm.funnel.checkpoints import save_checkpoint

TINY = ModelConfig(
    vocab_size=19, d_embed=16, d_model=16, n_head=2, d_head=8, d_inner=24, block_size="1_1", separate_cls=True
)  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    folder = tmp_path / "source"
    folder.mkdir()
    save_checkpoint(FunnelTFM(TINY, cls_target=False), folder / "model.pt")
    TINY.to_json(folder / "net_config.json")
    return folder


def test_it_says_what_it_did(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["convert-ckpt", "--to=hf", str(source), str(tmp_path / "hf")]) == 0
    out = capsys.readouterr().out
    assert "43 tensors of the encoder (2 layers)" in out
    assert "every tensor bit-equal" in out
    assert main(["convert-ckpt", "--verify", str(tmp_path / "hf"), str(tmp_path / "pt")]) == 0
    assert "differ by at most" in capsys.readouterr().out


def test_verify_without_a_second_model_says_so(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["convert-ckpt", "--verify", str(source), str(tmp_path / "pt")]) == 0
    assert "no second model to run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["{source}"], 2, "required: target"),
        (["--to=onnx", "{source}", "{tmp}/x"], 2, "onnx"),
        (["{tmp}/none", "{tmp}/x"], 1, "no checkpoint"),
        (["--from=hf", "{source}", "{tmp}/x"], 1, "config.json"),
        (["--net_config={tmp}/none.json", "{source}", "{tmp}/x"], 1, "none.json"),
        (["{source}", "{source}"], 1, "--overwrite"),
        (["--tf_python=/bin/false", "--to=tf", "{source}", "{tmp}/x"], 1, "TensorFlow"),
    ],
    ids=str,
)
def test_mistakes(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture, argv: list[str], code: int, said: str
) -> None:
    words = [word.format(source=source, tmp=tmp_path) for word in argv]
    assert main(["convert-ckpt", *words]) == code
    message = capsys.readouterr().err
    assert said in message
    assert len(message.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
