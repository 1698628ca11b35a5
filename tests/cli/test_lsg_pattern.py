"""`funneltfm lsg-pattern`."""

from pathlib import Path

from funneltfm.cli.main import main


def test_a_picture_is_drawn(tmp_path, capsys):
    path = tmp_path / "pattern.png"
    words = ["--block_size=8", "--sparse_block_size=8", "--sparsity_type=stride", "--head=1", "-o", str(path)]
    assert main(["lsg-pattern", *words]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "96 tokens" in capsys.readouterr().out


def test_what_cannot_be_drawn_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["lsg-pattern", "--sparsity_type=norms"]) == 1
    assert "sparsity_type must be one of" in capsys.readouterr().err
    assert main(["lsg-pattern", "--length=5000"]) == 1
    assert "at most 4096 rows" in capsys.readouterr().err
    assert main(["lsg-pattern", "--block_size=8", "--sparse_block_size=8", "-o", "x.xyz"]) == 1
    assert "must end in one of" in capsys.readouterr().err
    assert not list(Path().iterdir())
