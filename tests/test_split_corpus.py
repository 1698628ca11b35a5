"""The script that holds out a part of a corpus."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def split(*words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "data-scripts/split_corpus.py", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "pytorch")}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_document_is_in_one_part(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"document {i}\n" for i in range(300)))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": f"book {i}\nwith lines"}) + "\n" for i in range(100)))
    done = split(tmp_path / "out", tmp_path / "a.txt", tmp_path / "b.jsonl", "--valid", "0.25")
    assert done.returncode == 0, done.stderr
    train, valid = (texts(tmp_path / "out" / f"{part}.jsonl") for part in ("train", "valid"))
    assert done.stdout == f"train: {len(train)} documents, valid: {len(valid)} documents\n"
    assert not set(train) & set(valid)
    assert len(set(train) | set(valid)) == 400
    assert 70 < len(valid) < 130
    again = split(tmp_path / "again", tmp_path / "a.txt", tmp_path / "b.jsonl", "--valid", "0.25")
    assert again.returncode == 0
    assert texts(tmp_path / "again" / "valid.jsonl") == valid


def test_mistakes_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    for words, said in (
        ((tmp_path / "a.txt", "--column", "words"), "row 1: expected text in the column 'words'"),
        ((tmp_path / "a.txt", "--valid", "1.5"), "--valid must be between 0 and 1"),
        ((tmp_path / "none.txt",), "none.txt"),
        ((tmp_path / "a.txt", "--valid", "0.0001"), "one part got none"),
    ):
        done = split(tmp_path / "out", *words)
        assert done.returncode == 1
        assert said in done.stderr
        assert not list((tmp_path / "out").glob("*"))
