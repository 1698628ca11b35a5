"""`funneltfm cluster-tokens`: near embeddings are one cluster, and the file is what the pipeline reads."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from funneltfm.cli.main import main
from funneltfm.tasks.token_detection import read_clusters


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Of twelve tokens, whose embeddings are near one of three points."""
    config = transformers.BertConfig(
        vocab_size=12, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
    )
    made = transformers.BertModel(config)
    with torch.no_grad():
        made.embeddings.word_embeddings.weight.copy_(
            10 * torch.eye(4)[[i % 3 for i in range(12)]] + 0.1 * torch.rand(12, 4)
        )
    made.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_near_tokens_are_together(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "clusters.txt"
    assert main(["cluster-tokens", str(model), "-o", str(output), "-k", "3"]) == 0
    assert capsys.readouterr().out == f"{output}: 12 tokens in 3 clusters of 4 to 4\n"
    clusters = read_clusters(output)
    assert len(set(clusters[:3].tolist())) == 3
    assert np.array_equal(clusters, np.tile(clusters[:3], 4))


@pytest.mark.parametrize(
    ("words", "message"),
    [(["-k", "13"], "clusters must be from 1 to 12"), (["-k", "0"], "from 1 to 12"), ([], "from 1 to 12")],
)
def test_more_clusters_than_tokens(
    model: Path, words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["cluster-tokens", str(model), "-o", str(tmp_path / "x.txt"), *words]) == 1
    assert message in capsys.readouterr().err


def test_no_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["cluster-tokens", str(tmp_path), "-o", str(tmp_path / "x.txt")]) == 1
    assert "cannot be loaded" in capsys.readouterr().err
