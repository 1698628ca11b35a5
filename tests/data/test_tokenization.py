"""Text to ids: the original's ids, the symbols, the errors."""

import io
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from funneltfm.data.tokenization import SYMBOLS, TOKENIZERS, Tokenizer, check_case, get_tokenizer
from funneltfm.errors import InputError

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
FILES = {
    "word_piece": SHARED / "fixtures/tokenization/vocab.uncased.txt",
    "sent_piece": SHARED / "data/tokenizers/albert_v1_30k-clean/30k-clean.model",
}
ANGLE = ["<pad>", "<unk>", "<cls>", "<sep>", "<mask>"]
SQUARE = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
OTHERS = ["<s>", "</s>", "<eod>", "<eop>"]
LETTERS = list("abcdefghijklmnopqrstuvwxyz0123456789[]<>/,.!\"'|")
WORDS = [
    *LETTERS,
    *(f"##{letter}" for letter in LETTERS),
    "cls",
    "mask",
    "sep",
    "pad",
    "na",
    "##ive",
    "##\u03c3",
    "\u03c3",
    "##\u03c2",
]
CORPUS = ["the cat sat on the mat in 1990, and 2015, too", "abcdefghijklm nopqrstuvwxyz 0123456789", "[]<>/,.!\"'| a b"]

fixtures_present = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent: no ids of the original")


def write_vocabulary(path: Path, symbols: list[str], words: list[str] = WORDS) -> Path:
    path.write_text("\n".join([*symbols, *words]) + "\n", encoding="utf-8")
    return path


def train_model(path: Path, user_defined: list[str], **options: Any) -> Path:
    """A SentencePiece model of single characters and little more, with symbols that it finds in text."""
    import sentencepiece

    defaults: dict[str, Any] = {
        "bos_id": -1,
        "eos_id": -1,
        "pad_id": 1,
        "vocab_size": 70,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=model,
        user_defined_symbols=user_defined,
        **(defaults | options),
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """Small ones of each type, style and case; the symbols of the SentencePiece models are user-defined, the worst."""
    folder = tmp_path_factory.mktemp("vocabularies")
    files = {
        ("word_piece", "angle"): write_vocabulary(folder / "angle.txt", [*ANGLE, *OTHERS]),
        ("word_piece", "square"): write_vocabulary(folder / "square.txt", SQUARE),
        ("sent_piece", "angle"): train_model(folder / "angle.model", ["<cls>", "<sep>", "<mask>", "5,", *OTHERS]),
        ("sent_piece", "square"): train_model(
            folder / "square.model", ["[CLS]", "[SEP]", "[MASK]"], unk_piece="[UNK]", pad_piece="[PAD]"
        ),
    }
    return {
        f"{kind} {style} {'cased' if cased else 'uncased'}": get_tokenizer(kind, path, cased)
        for (kind, style), path in files.items()
        for cased in (False, True)
    }


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return tokenizer.convert_ids_to_pieces(tokenizer.convert_text_to_ids(text))


@fixtures_present
@pytest.mark.parametrize("cased", [False, True], ids=["uncased", "cased"])
@pytest.mark.parametrize("kind", FILES)
def test_ids_are_those_of_the_original(kind: str, cased: bool) -> None:
    lines = (SHARED / "fixtures/tokenization/ids.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    ids = get_tokenizer(kind, FILES[kind], cased).convert_texts_to_ids([row["text"] for row in rows])
    key = f"{kind}_{'cased' if cased else 'uncased'}"
    assert len(rows) == 783
    assert [row["text"] for row, got in zip(rows, ids, strict=True) if got != row[key]] == []


@pytest.mark.parametrize("style", ["angle", "square"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_both_symbol_styles(tokenizers: dict[str, Tokenizer], kind: str, style: str) -> None:
    tokenizer = tokenizers[f"{kind} {style} uncased"]
    ids = [tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id]
    assert tokenizer.convert_ids_to_pieces(i for i in ids if i is not None) == (ANGLE if style == "angle" else SQUARE)
    assert tokenizer.convert_text_to_ids("\u0e01")[-1:] == [tokenizer.unk_id]


def test_a_vocabulary_without_mask(tmp_path: Path) -> None:
    assert get_tokenizer("word_piece", write_vocabulary(tmp_path / "v.txt", ANGLE[:4])).mask_id is None


FRAGMENTS = [*ANGLE, *SQUARE, *OTHERS, *(s.lower() for s in SQUARE), *(s.upper() for s in ANGLE), "5,", "1", "\u200b"]
texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=8).map("".join)


@settings(max_examples=400, deadline=None)
@given(texts)
def test_text_never_becomes_a_symbol(tokenizers: dict[str, Tokenizer], text: str) -> None:
    for name, tokenizer in tokenizers.items():
        ids = tokenizer.convert_text_to_ids(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        found = set(tokenizer.convert_ids_to_pieces(i for i in ids if i != tokenizer.unk_id))
        assert not found & {*ANGLE, *SQUARE, *OTHERS}, name


@settings(max_examples=100, deadline=None)
@given(st.lists(texts, max_size=5))
def test_batch_equals_single(tokenizers: dict[str, Tokenizer], batch: list[str]) -> None:
    for tokenizer in tokenizers.values():
        assert tokenizer.convert_texts_to_ids(batch) == [tokenizer.convert_text_to_ids(text) for text in batch]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_batch_larger_than_a_chunk(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[f"{kind} angle uncased"]
    batch = [f"cat {i}" for i in range(3000)]
    assert tokenizer.convert_texts_to_ids(batch) == [tokenizer.convert_text_to_ids(text) for text in batch]


@pytest.mark.parametrize(
    ("text", "cased", "expected"),
    [
        ("", False, []),
        (" \t\n\u3000\x00\u200b", False, []),
        ("Na\u00efve!", False, ["na", "##ive", "!"]),
        ("Na\u00efve!", True, ["<unk>", "!"]),
        ("a\u0301", True, ["<unk>"]),
        ("a$b", False, ["a", "$", "b"]),
        ("a\x0bb\u00adc\ufffdd", False, ["a", "##b", "##c", "##d"]),  # control characters are deleted, not spaces
        (
            "\u03a3\u03a3 \u03a3\u200b\u03a3",
            False,
            ["\u03c3", "##\u03c2", "\u03c3", "##\u03c2"],
        ),  # final sigma, control characters aside
        ("a\u4e2db", False, ["a", "<unk>", "b"]),
        ("a\ue000b", False, ["<unk>"]),  # private use is kept; the normalizer of the Rust library deletes it
        ("a" * 200, False, ["a", *["##a"] * 199]),
        ("a" * 201, False, ["<unk>"]),
        ("[CLS] <sep>", False, ["[", "cls", "]", "<", "sep", ">"]),
    ],
)
def test_word_piece_rules(tmp_path: Path, text: str, cased: bool, expected: list[str]) -> None:
    tokenizer = get_tokenizer("word_piece", write_vocabulary(tmp_path / "v.txt", ANGLE, [*WORDS, "$"]), cased)
    assert pieces(tokenizer, text) == expected


def test_windows_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "v.txt"
    path.write_bytes(("\ufeff" + "\r\n".join([*ANGLE, "a"]) + "\r\n").encode())
    tokenizer = get_tokenizer("word_piece", path)
    assert (tokenizer.pad_id, tokenizer.vocab_size, tokenizer.convert_text_to_ids("A")) == (0, 6, [5])


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("  the \t cat\n", "the cat"),
        ("``a'' \u201cb\u201d \u2018c\u2019", '"a" "b" \'c\''),
        ("n\u00e4\u00efve \uff41\ufb01", "naive afi"),
    ],
)
@pytest.mark.parametrize("case", ["uncased", "cased"])
def test_sent_piece_makes_text_plain(tokenizers: dict[str, Tokenizer], text: str, plain: str, case: str) -> None:
    tokenizer = tokenizers[f"sent_piece angle {case}"]
    assert tokenizer.convert_text_to_ids(text) == tokenizer.convert_text_to_ids(plain)


def test_sent_piece_lower_cases_only_uncased(tokenizers: dict[str, Tokenizer]) -> None:
    uncased, cased = (tokenizers[f"sent_piece angle {case}"] for case in ("uncased", "cased"))
    assert uncased.convert_text_to_ids("CAT") == cased.convert_text_to_ids("cat") != cased.convert_text_to_ids("CAT")


def test_sent_piece_splits_a_comma_after_a_digit(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["sent_piece angle uncased"]  # its piece "5," is always found
    found = pieces(tokenizer, "in 2015, too")
    assert "5," not in found
    assert found[found.index(",") - 1] == "5"
    assert "".join(found) == "\u2581in\u25812015,\u2581too"


@pytest.mark.parametrize("symbol", ["[MASK]", "[SEP]"])
def test_a_user_defined_symbol_in_text_stays_text(tokenizers: dict[str, Tokenizer], symbol: str) -> None:
    from sentencepiece import SentencePieceProcessor

    tokenizer = tokenizers["sent_piece square cased"]
    text = f"the{symbol}cat {symbol}"
    assert symbol in SentencePieceProcessor(model_file=str(tokenizer.path)).encode(text, out_type=str)
    found = pieces(tokenizer, text)
    assert symbol not in found
    assert (found.count("["), found.count("]")) == (2, 2)
    assert "".join(pieces(tokenizer, text.lower())) == f"\u2581{text.lower()}".replace(" ", "\u2581")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_fingerprint_changes_with_what_changes_the_ids(
    tokenizers: dict[str, Tokenizer], tmp_path: Path, kind: str
) -> None:
    tokenizer = tokenizers[f"{kind} angle uncased"]
    copy = tmp_path / "elsewhere"
    copy.write_bytes(tokenizer.path.read_bytes())
    assert get_tokenizer(kind, str(copy)).fingerprint == tokenizer.fingerprint
    assert len({t.fingerprint for t in tokenizers.values()}) == len(tokenizers)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pickle(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[f"{kind} square uncased"]
    copy = pickle.loads(pickle.dumps(tokenizer))
    text = "The c\u00e4t, [MASK] \u4e2d 15, ok"
    assert copy.convert_text_to_ids(text) == tokenizer.convert_text_to_ids(text)
    assert copy.fingerprint == tokenizer.fingerprint


def test_import_is_light() -> None:
    heavy = "{'tokenizers', 'sentencepiece', 'torch'}"
    code = f"import sys, funneltfm.data.tokenization; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, check=True)


# Errors.


def message(kind: str, path: Path) -> str:
    with pytest.raises(InputError) as error:
        get_tokenizer(kind, path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_unknown_type() -> None:
    with pytest.raises(InputError, match=r"\['sent_piece', 'word_piece'\], got 'wordpiece'"):
        get_tokenizer("wordpiece", "v.txt")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_files_that_are_none(tmp_path: Path, kind: str) -> None:
    empty = tmp_path / "empty"
    empty.write_bytes(b"\n")
    assert "does not exist" in message(kind, tmp_path / "missing")
    assert "is a folder" in message(kind, tmp_path)
    assert "is empty" in message(kind, empty)


@pytest.mark.parametrize("role", ["pad", "unk", "cls", "sep"])
def test_missing_symbol(tmp_path: Path, role: str) -> None:
    symbols = [symbol for symbol in ANGLE if symbol != f"<{role}>"]
    text = message("word_piece", write_vocabulary(tmp_path / "v.txt", symbols))
    assert f"has no {role} symbol" in text
    assert " or ".join(SYMBOLS[role]) in text


def test_missing_symbol_in_a_model(tmp_path: Path) -> None:
    assert "has no cls symbol" in message("sent_piece", train_model(tmp_path / "m.model", ["<sep>"]))


def test_duplicate_piece_names_both_lines(tmp_path: Path) -> None:
    text = message("word_piece", write_vocabulary(tmp_path / "v.txt", ANGLE, ["a", "b", "a"]))
    assert "line 8 repeats the piece 'a' of line 6" in text


@pytest.mark.parametrize("words", [["a", "", "b"], ["a", "b", ""]])
def test_empty_line(tmp_path: Path, words: list[str]) -> None:
    text = message("word_piece", write_vocabulary(tmp_path / "v.txt", ANGLE, words))
    assert f"line {6 + words.index('')} is empty" in text


def test_a_file_of_the_other_type(tmp_path: Path) -> None:
    vocabulary = write_vocabulary(tmp_path / "v.txt", ANGLE)
    assert "tokenizer_type word_piece" in message("sent_piece", vocabulary)
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"<pad>\n<unk>\ncaf\xe9\n")
    assert "line 3 is not UTF-8" in message("word_piece", latin)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_half_a_surrogate_pair(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    with pytest.raises(InputError, match=r"character 1, in 'a\\ud83d'"):
        tokenizers[f"{kind} angle uncased"].convert_texts_to_ids(["ok", "a\ud83d"])


@pytest.mark.parametrize("wrong", [-100, 10_000_000])
def test_ids_outside_the_vocabulary(tokenizers: dict[str, Tokenizer], wrong: int) -> None:
    with pytest.raises(InputError, match=f"got {wrong}"):
        tokenizers["word_piece angle uncased"].convert_ids_to_pieces([0, wrong])


def test_a_piece_that_is_not_text(tmp_path: Path) -> None:
    """The library reads such a model, and fails when it is asked for the piece."""
    path = train_model(tmp_path / "m.model", ["<cls>", "<sep>", "zzqq"])
    content = path.read_bytes()
    assert b"\x04zzqq" in content
    path.write_bytes(content.replace(b"\x04zzqq", b"\x04zzq\xff"))
    assert "is damaged" in message("sent_piece", path)


def test_long_pieces_are_shortened_in_the_message(tmp_path: Path) -> None:
    assert len(message("word_piece", write_vocabulary(tmp_path / "v.txt", ANGLE, ["a" * 9999] * 2))) < 1000


def test_a_path_that_no_file_can_have() -> None:
    with pytest.raises(InputError, match="Cannot read the vocabulary file"):
        get_tokenizer("word_piece", "vocab\0.txt")


@pytest.mark.parametrize("lower_case", [True, False])
def test_a_tokenizer_beside_a_vocabulary_says_whether_it_is_cased(lower_case: bool, tmp_path: Path) -> None:
    vocabulary = tmp_path / "vocab.txt"
    check_case(vocabulary, lower_case)  # there is none
    normalizer: Any = {"type": "BertNormalizer", "lowercase": lower_case, "strip_accents": None}
    for rules in (normalizer, {"type": "Sequence", "normalizers": [{"type": "NFKC"}, normalizer]}):
        (tmp_path / "tokenizer.json").write_text(json.dumps({"normalizer": rules}))
        check_case(vocabulary, not lower_case)
        with pytest.raises(InputError, match=r"vocab.txt are .*\. (Leave out|Give) --cased"):
            check_case(vocabulary, lower_case)
    (tmp_path / "tokenizer.json").write_text('{"normalizer": null}')
    check_case(vocabulary, True)
