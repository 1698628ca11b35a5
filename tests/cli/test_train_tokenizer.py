"""`funneltfm train-tokenizer`: every kind of source, what it refuses; tests/data/test_vocabulary.py has the rest."""

import json
from pathlib import Path

import pytest
import transformers

from funneltfm.cli.main import main

LINES = ["The quick brown fox", "jumps over the lazy dog", "the foxes and the dogs"]
FLAGS = ["--vocab_size", "100", "--min_frequency", "1"]


def sources(tmp_path: Path) -> list[str]:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "a.txt").write_text(LINES[0] + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": LINES[1]}) + "\n")
    datasets.Dataset.from_dict({"text": LINES[2:]}).save_to_disk(tmp_path / "c")
    return [str(tmp_path / name) for name in ("a.txt", "b.jsonl", "c")]


def test_sources_of_several_kinds(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "tokenizer"
    assert main(["train-tokenizer", *sources(tmp_path), "-o", str(output), *FLAGS]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    assert capsys.readouterr().out.startswith(f"{output}: {len(tokenizer)} pieces (word_piece)")
    assert tokenizer.unk_token_id not in tokenizer(" ".join(LINES))["input_ids"]
    assert {"the", "fox", "##es", "dog"} <= tokenizer.get_vocab().keys()
    # As one file of all texts.
    (tmp_path / "all.txt").write_text("".join(f"{line}\n" for line in LINES))
    assert main(["train-tokenizer", str(tmp_path / "all.txt"), "-o", str(tmp_path / "other"), *FLAGS]) == 0
    assert (tmp_path / "other/tokenizer.json").read_bytes() == (output / "tokenizer.json").read_bytes()


def test_a_folder_is_replaced_on_request(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("one two three\n" * 3)
    output = tmp_path / "tokenizer"
    output.mkdir()
    words = ["train-tokenizer", str(tmp_path / "a.txt"), "-o", str(output), *FLAGS]
    assert main(words) == 0
    assert main(words) == 1
    assert "exists and is not empty" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    (output / "mine.txt").write_text("")
    assert main([*words, "--overwrite"]) == 1
    assert "holds mine.txt." in capsys.readouterr().err
    assert {"mine.txt", "tokenizer.json"} <= {path.name for path in output.iterdir()}
    words[words.index(str(output))] = str(output / "mine.txt")
    assert main([*words, "--overwrite"]) == 1
    assert "it is a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words", "message", "code"),
    [
        ('{"text": "a"}\n{"text": 1.5, \n', [], "line 2", 1),
        ('{"title": "a"}\n', [], "row 1: expected a column 'text'", 1),
        ('{"text": "a"}\n', ["--vocab_size=3"], "vocab_size must be at least", 1),
        ('{"text": "a"}\n', ["--type=characters"], "invalid choice", 2),
        ("", [], "it is empty", 1),
    ],
)
def test_what_it_refuses(
    tmp_path: Path, content: str, words: list[str], message: str, code: int, capsys: pytest.CaptureFixture
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(content)
    assert main(["train-tokenizer", str(source), "-o", str(tmp_path / "out"), *words]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_broken_rows_may_be_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a b"}\n{"text": \n{"text": "b a"}\n')
    words = ["train-tokenizer", str(tmp_path / "a.jsonl"), "-o", str(tmp_path / "out"), "--bad_rows=skip"]
    assert main(words) == 0


def test_lower_case_by_default_and_by_flag(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A Fox\n" * 3)
    made = {}
    for number, words in enumerate(([], ["--no_lower_case"], ["--type=bpe"], ["--type=bpe", "--lower_case"])):
        output = tmp_path / str(number)
        assert main(["train-tokenizer", "-o", str(output), "--vocab_size=300", *words, str(tmp_path / "a.txt")]) == 0
        tokenizer = transformers.AutoTokenizer.from_pretrained(output)
        made[" ".join(words)] = tokenizer.decode(tokenizer("A Fox", add_special_tokens=False)["input_ids"])
    assert made == {"": "a fox", "--no_lower_case": "A Fox", "--type=bpe": "A Fox", "--type=bpe --lower_case": "a fox"}
