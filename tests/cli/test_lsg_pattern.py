"""`funneltfm lsg-pattern`."""

from pathlib import Path

from matplotlib.image import imread

from funneltfm.cli.main import main


def test_a_picture_is_drawn(tmp_path, capsys):
    path = tmp_path / "pattern.png"
    words = ["--block_size=8", "--sparse_block_size=8", "--sparsity_type=stride", "--head=1", "-o", str(path)]
    assert main(["lsg-pattern", *words]) == 0
    picture = imread(path)
    assert (picture[[0, -1]] == 1).all()  # nothing is cut at the top, nor below
    assert (picture[:, [0, -1]] == 1).all()
    assert "96 tokens" in capsys.readouterr().out


def test_what_cannot_be_drawn_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["lsg-pattern", "--sparsity_type=norms"]) == 1
    assert "sparsity_type must be one of" in capsys.readouterr().err
    for length in (0, 5000):
        assert main(["lsg-pattern", f"--length={length}"]) == 1
        assert "at most 4096 rows" in capsys.readouterr().err
    assert main(["lsg-pattern", "--block_size=8", "--sparse_block_size=8", "-o", "x.xyz"]) == 1
    assert "must end in one of" in capsys.readouterr().err
    assert not list(Path().iterdir())
