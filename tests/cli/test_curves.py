"""`funneltfm curves`: a picture of metrics.csv, of what was asked for."""

from pathlib import Path

import pytest

from funneltfm.cli.main import main

TABLE = """step,epoch,lr,train/loss,train/seq_class/accuracy,valid/seq_class/accuracy,valid/seq_class/accuracy_class_0
1,0.5,0.1,1.5,0.5,,
2,1.0,0.1,1.25,0.75,,
2,1.0,,,,0.6,0.5
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "metrics.csv").write_text(TABLE)
    return tmp_path


def test_all_scores(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["curves", str(run)]) == 0
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.strip() == f"{run}/curves.png: loss, seq_class/accuracy"


def test_some_scores_elsewhere(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "sub" / "x.png"
    assert main(["curves", str(run), "-o", str(output), "--scores", "lr", "seq_class/accuracy_class_0"]) == 0
    assert output.read_bytes().startswith(b"\x89PNG")
    assert not (run / "curves.png").exists()


@pytest.mark.parametrize(
    ("table", "words", "message"),
    [
        (TABLE, ["--scores", "f1"], "has no f1. It has lr, loss, seq_class/accuracy"),
        ("step,epoch\n", [], "no scores to draw yet"),
        ("step,epoch,train/loss\n1,1,many\n", [], "must be a table of numbers"),
        (None, [], "cannot read the scores of the run"),
    ],
)
def test_what_cannot_be_drawn(
    run: Path, table: str | None, words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    if table is None:
        (run / "metrics.csv").unlink()
    else:
        (run / "metrics.csv").write_text(table)
    assert main(["curves", str(run), *words]) == 1
    assert message in capsys.readouterr().err
    assert not (run / "curves.png").exists()
