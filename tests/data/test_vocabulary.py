"""Learned tokenizers: what they make of texts, where their special tokens stand, the same ids every time."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from funneltfm.data.text import NO_WORD, TextEncoder, get_text_tokenizer
from funneltfm.data.tokenization import get_tokenizer
from funneltfm.data.vocabulary import TokenizerFlags, train_tokenizer, write_tokenizer
from funneltfm.errors import InputError

TEXTS = [
    "The quick brown fox jumps over the lazy dog. Caf\u00e9s aren't cheap, are they?",
    "Foxes, dogs and cats: the quickest ones jumped over lower fences, the lowest ones slept.",
    "Quick foxes are quicker than lazy dogs; the dogs were sleeping in caf\u00e9s.",
] * 5
TYPES = ("word_piece", "bpe", "unigram")
SIZES = {"word_piece": 150, "bpe": 330, "unigram": 90}


def learned(type_: str, texts: list[str] = TEXTS, **more: Any) -> Any:
    return train_tokenizer(lambda: iter(texts), TokenizerFlags(**({"type": type_, "vocab_size": SIZES[type_]} | more)))


@pytest.mark.parametrize("template", ["bert", "roberta"])
@pytest.mark.parametrize("type_", TYPES)
def test_the_folder_loads_and_is_as_the_template_says(type_: str, template: str, tmp_path: Path) -> None:
    made = learned(type_, template=template)
    write_tokenizer(made, tmp_path / "tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert tokenizer.is_fast
    assert tokenizer.get_vocab() == made.get_vocab()
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert len(tokenizer) <= SIZES[type_]
    pair = tokenizer("the dog", "foxes")
    tokens = tokenizer.convert_ids_to_tokens(pair["input_ids"])
    a, b = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("the dog", "foxes"))
    if template == "bert":
        assert pair["input_ids"] == [2, *a, 3, *b, 3]
        assert pair["token_type_ids"] == [0] * (len(a) + 2) + [1] * (len(b) + 1)
        assert [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.mask_token_id] == [0, 1, 4]
    else:
        assert pair["input_ids"] == [0, *a, 2, 2, *b, 2]
        assert "token_type_ids" not in pair
        assert tokenizer.bos_token == tokenizer.cls_token == tokens[0] == "<s>"
        assert [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.mask_token_id] == [1, 3, 4]
    assert tokenizer.model_max_length == 512
    assert (tmp_path / "tokenizer/vocab.txt").exists() == (type_ == "word_piece")
    text = TextEncoder(get_text_tokenizer(str(tmp_path / "tokenizer")), 64)
    (example,) = text.encode([["the quick caf\u00e9s"]])
    assert len({word for word in example["word_ids"] if word != NO_WORD}) == 3


@pytest.mark.parametrize("type_", TYPES)
def test_sentinels_of_t5(type_: str, tmp_path: Path) -> None:
    write_tokenizer(learned(type_, template="t5", vocab_size=SIZES[type_] + 100), tmp_path / "tokenizer")
    text = TextEncoder(get_text_tokenizer(str(tmp_path / "tokenizer")), 64)
    tokenizer = text.tokenizer
    assert len(tokenizer) <= SIZES[type_] + 100
    assert tokenizer.convert_ids_to_tokens(text.sentinel_ids.tolist()) == [f"<extra_id_{i}>" for i in range(100)]
    assert {0, 1, 2, *text.sentinel_ids} == {*text.special_ids}
    assert [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id] == [0, 1, 2]
    a, b = (tokenizer(one, add_special_tokens=False)["input_ids"] for one in ("the dog", "foxes"))
    assert tokenizer("the dog", "foxes")["input_ids"] == [*a, 1, *b, 1]
    ids = tokenizer("the <extra_id_0> dog", add_special_tokens=False)["input_ids"]
    assert text.sentinel_ids[0] in ids


@pytest.mark.parametrize("given", [{}, {"lower_case": True}, {"lower_case": False}], ids=str)
@pytest.mark.parametrize("type_", TYPES)
def test_texts_come_back(type_: str, given: dict[str, bool]) -> None:
    tokenizer = learned(type_, **given)
    lower_case = given.get("lower_case", type_ == "word_piece")
    for text in TEXTS[:3]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        wanted = text.lower() if lower_case else text
        if type_ == "word_piece":
            wanted = wanted.replace("\u00e9", "e") if lower_case else wanted
            assert tokenizer.decode(ids).replace(" ", "") == wanted.replace(" ", "")
        else:
            assert tokenizer.decode(ids) == wanted
    for text in ("low caf\u00e9s", "The fox"):  # bytes know every text, the others what they have seen
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) >= 2
    if type_ == "bpe":
        assert (
            tokenizer.decode(tokenizer("\u2603 \U0001f600", add_special_tokens=False)["input_ids"])
            == "\u2603 \U0001f600"
        )


def test_words_that_come_often_are_one_piece() -> None:
    for type_ in TYPES:
        tokenizer = learned(type_)
        assert len(tokenizer(" the", add_special_tokens=False)["input_ids"]) == 1, type_


def test_min_frequency() -> None:
    few, many = (learned(type_, min_frequency=100) for type_ in ("word_piece", "bpe"))
    assert len(many) == 256 + 5  # nothing was joined
    assert all(len(piece.removeprefix("##")) == 1 for piece in few.get_vocab() if piece[0] != "[")


def test_the_alphabet_is_limited_to_what_is_frequent() -> None:
    tokenizer = learned("word_piece", ["aaa bbb cc d"] * 3, alphabet_limit=2)
    characters = {piece.removeprefix("##")[0] for piece in tokenizer.get_vocab() if piece[0] != "["}
    assert characters == {"a", "b"}
    assert tokenizer("cc aaa", add_special_tokens=False)["input_ids"][0] == tokenizer.unk_token_id


def test_more_special_tokens() -> None:
    tokenizer = learned("bpe", special_tokens=("[ent]", "[rel]"))
    ids = tokenizer("fox [ent] dog", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_tokens_to_ids("[ent]") == 5
    assert 5 in ids
    assert {5, 6} <= {*tokenizer.all_special_ids}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"type_": "bpe", "vocab_size": 200}, "vocab_size must be at least 261"),
        ({"type_": "word_piece", "vocab_size": 10}, "vocab_size must be at least"),
        ({"type_": "bpe", "special_tokens": ("<s>",)}, "names <s>, which the template has"),
        ({"type_": "unigram", "template": "t5", "special_tokens": ("<extra_id_7>",)}, "names <extra_id_7>, which the"),
        ({"type_": "unigram", "texts": []}, "cannot be learned from these texts"),
        ({"type_": "bpe", "vocab_size": 0}, "must be at least 1"),
    ],
)
def test_what_cannot_be_learned(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        learned(**flags)


def test_classify_makes_the_same_of_its_vocab_txt(tmp_path: Path) -> None:
    tokenizer = learned("word_piece")
    write_tokenizer(tokenizer, tmp_path / "tokenizer")
    other = get_tokenizer("word_piece", tmp_path / "tokenizer/vocab.txt")
    for text in (*TEXTS[:3], "Unknown zebras, \u2603!"):
        assert other.convert_text_to_ids(text) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_folder_is_written_whole_and_replaced_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, folder = learned("bpe"), tmp_path / "tokenizer"
    write_tokenizer(tokenizer, folder)
    before = (folder / "tokenizer.json").read_bytes()
    with pytest.raises(InputError, match="exists and is not empty"):
        write_tokenizer(learned("word_piece"), folder)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "save_pretrained", full)
        with pytest.raises(OSError, match="full"):
            write_tokenizer(tokenizer, folder, overwrite=True)
    assert (folder / "tokenizer.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]
    write_tokenizer(learned("word_piece"), folder, overwrite=True)
    assert (folder / "vocab.txt").exists()


COMMAND = """
import sys
from funneltfm.cli.main import main
sys.exit(main(["train-tokenizer", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("type_", TYPES)
def test_other_processes_learn_the_same(type_: str, tmp_path: Path) -> None:
    """The library's tables are in another order in each."""
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"a": text, "b": "more"}) + "\n" for text in TEXTS))
    for name in ("one", "two"):
        words = [str(source), "-o", str(tmp_path / name), f"--type={type_}", f"--vocab_size={SIZES[type_]}"]
        command = [sys.executable, "-c", COMMAND, *words, "--input_columns", "a:b"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "pieces" in done.stdout
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
