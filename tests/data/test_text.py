"""Texts to ids: as the tokenizer does it by itself, whatever its kind, and cut to fit."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from funneltfm.data.text import NO_WORD, TextEncoder, fit_lengths, get_text_tokenizer, special_ids, takes_words
from funneltfm.errors import InputError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "tokenizers"
SENTENCES = [
    "the quick brown fox jumps over the lazy dog.",
    "Mr. Smith's unbelievable tokenization isn't easy, is it?",
    "a b c 1 2 3 . , ? ! in 1999",
]
STRANGE = ["", " ", "fox", " two  blanks ", "\u200b", "na\u00efve \u4e2d\u6587 \u2603 co\u00f6p", "[MASK] <mask> x"]
TEXTS = [*SENTENCES, *STRANGE]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def _word_pieces(folder: Path) -> dict[str, int]:
    letters = sorted({c for text in SENTENCES for c in text.lower() if c != " "})
    pieces = [*BERT, *letters, *(f"##{c}" for c in letters), "the", "quick", "fox", "un", "##able", "token"]
    return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}


def _byte_level(folder: Path) -> dict[str, str]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=ROBERTA, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    tokenizer.model.save(str(folder))
    return {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}


def _pieces(folder: Path) -> list[tuple[str, float]]:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=ROBERTA, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return [tuple(piece) for piece in json.loads(tokenizer.to_str())["model"]["vocab"]]


def _modern(folder: Path) -> Any:
    """Like ModernBERT's: byte-level BPE in a bare tokenizer.json, special tokens and types like BERT's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=BERT, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_truncation(7)  # what such files keep of their training must not matter
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]", length=9)
    tokenizer.save(str(folder / "tokenizer.json"))
    return get_text_tokenizer(str(folder / "tokenizer.json"))


def _sentence_piece(folder: Path, cls: str, name: str) -> Any:
    kind = getattr(transformers, cls)
    source = SHARED / name
    if not source.is_file():
        pytest.skip(f"no {source}")
    shutil.copy(source, folder / kind.vocab_files_names["vocab_file"])
    return kind.from_pretrained(folder)


def _of_class(cls: str, vocab: Callable[[Path], Any], **more: Any) -> Callable[[Path], Any]:
    def make(folder: Path) -> Any:
        made = vocab(folder)
        files = made if vocab is _byte_level else {"vocab": made}
        return getattr(transformers, cls)(**files, **more)

    return make


KINDS: dict[str, Callable[[Path], Any]] = {
    "bert": _of_class("BertTokenizer", _word_pieces),
    "distilbert": _of_class("DistilBertTokenizer", _word_pieces),
    "funnel": lambda folder: transformers.FunnelTokenizer(
        vocab=_word_pieces(folder), cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]",
        mask_token="[MASK]",
    ),
    "roberta": _of_class("RobertaTokenizer", _byte_level),
    "roberta_spaced": _of_class("RobertaTokenizer", _byte_level, add_prefix_space=True),
    "deberta": _of_class("DebertaTokenizer", _byte_level),
    "modernbert": _modern,
    "camembert": _of_class("CamembertTokenizer", _pieces),
    "xlm_roberta": _of_class("XLMRobertaTokenizer", _pieces),
    "deberta_v2": _of_class("DebertaV2Tokenizer", _pieces),
    "albert": lambda folder: _sentence_piece(folder, "AlbertTokenizer", "albert_v1_30k-clean/30k-clean.model"),
    "xlm_roberta_file": lambda folder: _sentence_piece(
        folder, "XLMRobertaTokenizer", "sentencepiece_test_model/test_model.model"
    ),
    "bert_vocab_file": lambda folder: _vocab_file(),
}  # fmt: skip


def _vocab_file() -> Any:
    path = SHARED / "bert-base-uncased" / "vocab.txt"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return get_text_tokenizer(str(path))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    known: dict[str, Any] = {}

    def get(kind: str) -> Any:
        if kind not in known:
            known[kind] = KINDS[kind](tmp_path_factory.mktemp(kind))
        return known[kind]

    return get


def own(tokenizer: Any, *texts: Any, **more: Any) -> tuple[list[int], list[int], list[int]]:
    """What the tokenizer says: ids, types, word ids (those of a second text go on counting)."""
    encoding = tokenizer(*([text] for text in texts), return_token_type_ids=True, **more)  # a lone "" would be no pair
    sides, numbers = encoding.sequence_ids(0), encoding.word_ids(0)
    later = 1 + max((word for word, side in zip(numbers, sides, strict=True) if side == 0), default=-1)
    words = [NO_WORD if side is None else word + side * later for word, side in zip(numbers, sides, strict=True)]
    return encoding["input_ids"][0], encoding["token_type_ids"][0], words


@pytest.mark.parametrize("kind", KINDS)
def test_one_text_and_pairs_are_as_the_tokenizer_makes_them(kind: str, made: Callable[[str], Any]) -> None:
    tokenizer = made(kind)
    encoder = TextEncoder(tokenizer, 500)
    rows = [(text,) for text in TEXTS] + [(a, b) for a in TEXTS for b in TEXTS[:6]]
    typed = any(any(own(tokenizer, *row)[1]) for row in rows)
    for row, example in zip(rows, encoder.encode(rows), strict=True):
        ids, types, words = own(tokenizer, *row)
        assert example["input_ids"] == ids, row
        assert example["word_ids"] == words, row
        assert example.get("token_type_ids", [0] * len(ids)) == types, row
        assert ("token_type_ids" in example) == typed


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_as_in_their_text(kind: str, made: Callable[[str], Any], tmp_path: Path) -> None:
    """Byte-level BPE gets its prefix space, and keeps it in the folder that it is saved to."""
    tokenizer = made(kind)
    words = ["the", "quick", "unbelievable", "tokenization", "1", "2", "!"]
    joins = kind in ("roberta", "deberta", "modernbert")
    assert takes_words(tokenizer) != joins
    if joins:
        with pytest.raises(InputError, match="add_prefix_space"):
            TextEncoder(tokenizer).encode([[words]])
    for folder in (tmp_path / "a", tmp_path / "b"):
        tokenizer.save_pretrained(folder)
        tokenizer = get_text_tokenizer(str(folder), words=True)
    (one,), (other,) = TextEncoder(tokenizer).encode([[words]]), TextEncoder(tokenizer).encode([[" ".join(words)]])
    assert one["input_ids"] == other["input_ids"]
    pieces = list(dict.fromkeys(one["word_ids"]))
    assert pieces == [NO_WORD, *range(len(words))]
    ids, _, word_ids = own(tokenizer, words, is_split_into_words=True)
    assert (one["input_ids"], one["word_ids"]) == (ids, word_ids)
    second = TextEncoder(tokenizer).encode([[words, words[:2]]])[0]
    assert second["word_ids"] == own(tokenizer, words, words[:2], is_split_into_words=True)[2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [9, 13, 21])
def test_what_is_too_long_fits_exactly(kind: str, length: int, made: Callable[[str], Any]) -> None:
    tokenizer = made(kind)
    whole, cut = TextEncoder(tokenizer, 500), TextEncoder(tokenizer, length)
    rows = [[" ".join(SENTENCES * n) for n in counts] for counts in ((3,), (1, 3), (3, 1), (2, 2), (1, 2, 3))]
    rows += [["fox", SENTENCES[0] * 9], [SENTENCES[0] * 9, "fox"]]
    for row, example, full in zip(rows, cut.encode(rows), whole.encode(rows), strict=True):
        assert len(example["input_ids"]) == length < len(full["input_ids"])
        assert all(len(values) == length for values in example.values())
        alone = [pieces.ids for pieces in cut.pieces(row)]
        layout, n = cut.layout, len(row)
        kept = fit_lengths([len(ids) for ids in alone], length - layout.n_special(n))
        expected = list(layout.prefix)
        for i, (ids, keep) in enumerate(zip(alone, kept, strict=True)):
            expected += ids[:keep] + (layout.between if i < n - 1 else layout.suffix if n > 1 else layout.suffix_alone)
        assert example["input_ids"] == expected
    (single,) = cut.encode([rows[0]])
    assert single["input_ids"] == tokenizer(rows[0][0], truncation=True, max_length=length)["input_ids"]


def test_what_is_cut_is_told_once(made: Callable[[str], Any], caplog: pytest.LogCaptureFixture) -> None:
    text = TextEncoder(made("bert"), 9)
    text.encode([["fox " * 3], ["fox " * 7], ["fox " * 8], ["fox " * 20, "the"]])
    replace(text, max_length=12).encode([["fox " * 9], ["fox " * 11]])  # counts with it
    with caplog.at_level("INFO"):
        text.cuts.tell("x.csv")
        text.cuts.tell("x.csv")
    assert caplog.messages == [
        "x.csv: 3 of 6 inputs were longer than --max_sequence_length and are cut; the longest had 24 tokens"
    ]


def test_three_texts_go_on_as_two_do(made: Callable[[str], Any]) -> None:
    (example,) = TextEncoder(made("bert")).encode([["fox", "the", "quick"]])
    tokenizer = made("bert")
    assert tokenizer.convert_ids_to_tokens(example["input_ids"]) == [
        "[CLS]",
        "fox",
        "[SEP]",
        "the",
        "[SEP]",
        "quick",
        "[SEP]",
    ]
    assert example["token_type_ids"] == [0, 0, 0, 1, 1, 1, 1]
    assert example["word_ids"] == [-1, 0, -1, 1, -1, 2, -1]


def test_types_of_ones_own(made: Callable[[str], Any]) -> None:
    def types(kind: str, *wanted: int) -> list[int]:
        return TextEncoder(made(kind), token_types=wanted).encode([["fox", "the", "fox"]])[0]["token_type_ids"]

    assert types("bert", 0, 1, 2) == [0, 0, 0, 1, 1, 2, 2]
    assert types("bert", 3, 0, 3) == [3, 3, 3, 0, 0, 3, 3]
    assert types("funnel", 0, 1, 3)[:3] == [2, 0, 0]  # [CLS] has its own
    assert set(types("roberta", 1, 1, 1)) == {1}
    with pytest.raises(InputError, match="has 2 types, but there are 3 texts"):
        types("bert", 0, 1)


def test_types_that_the_model_must_know(made: Callable[[str], Any]) -> None:
    TextEncoder(made("bert")).check_types(2)
    TextEncoder(made("bert")).check_types(0)  # left out
    TextEncoder(made("roberta")).check_types(1)
    with pytest.raises(InputError, match="makes the token type 2, but the model knows 2"):
        TextEncoder(made("funnel")).check_types(2)
    for known in (0, 1, 2):
        with pytest.raises(InputError, match=f"the model knows {known} token types"):
            TextEncoder(made("bert"), token_types=(0, 2)).check_types(known)
    TextEncoder(made("bert"), token_types=(0, 2)).check_types(3)


def test_no_room(made: Callable[[str], Any]) -> None:
    encoder = TextEncoder(made("bert"), 4)
    assert encoder.room(1) == 2
    assert len(encoder.encode([[SENTENCES[0]]])[0]["input_ids"]) == 4
    with pytest.raises(InputError, match="leaves no room for 2 texts beside 3"):
        encoder.encode([["a", "b"]])


def test_texts_and_words_are_not_mixed(made: Callable[[str], Any]) -> None:
    with pytest.raises(InputError, match="give one kind"):
        TextEncoder(made("bert")).encode([["the fox"], [["the", "fox"]]])
    assert TextEncoder(made("bert")).encode([]) == []
    (empty,) = TextEncoder(made("bert")).encode([[[]]])
    assert empty["word_ids"] == [NO_WORD, NO_WORD]


def test_many_texts_are_taken_in_order(made: Callable[[str], Any]) -> None:
    """More than are tokenised together."""
    rows = [[f"{i} fox"] for i in range(1001)]
    examples = TextEncoder(made("bert")).encode(rows)
    for i in (0, 999, 1000):
        assert [examples[i]] == TextEncoder(made("bert")).encode([rows[i]])
    assert len(examples) == 1001


def test_offsets_name_the_characters(made: Callable[[str], Any]) -> None:
    for kind in ("bert", "roberta", "deberta"):
        (pieces,) = TextEncoder(made(kind)).pieces([SENTENCES[0]])
        seen = [SENTENCES[0][slice(*span)].strip() for span in pieces.offsets]
        assert "".join(seen) == SENTENCES[0].replace(" ", "")


def test_special_and_ordinary_ids_are_all(made: Callable[[str], Any]) -> None:
    for kind in ("bert", "roberta", "camembert", "deberta_v2", "funnel"):
        encoder = TextEncoder(made(kind))
        assert encoder.special_ids.tolist() == special_ids(made(kind)).tolist()
        both = np.concatenate([encoder.special_ids, encoder.ordinary_ids])
        assert sorted(both) == sorted(set(made(kind).get_vocab().values()))
        assert made(kind).mask_token_id in encoder.special_ids


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(1, 60))
def test_fit_lengths_takes_from_the_longest(lengths: list[int], room: int) -> None:
    expected = list(lengths)
    while sum(expected) > room:  # one by one, the last of the longest
        longest = max(i for i, n in enumerate(expected) if n == max(expected))
        expected[longest] -= 1
    assert fit_lengths(lengths, room) == expected


def test_what_is_no_tokenizer(tmp_path: Path, made: Callable[[str], Any]) -> None:
    with pytest.raises(InputError, match="cannot load a tokenizer from"):
        get_text_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="cannot load a tokenizer from"):
        get_text_tokenizer(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="not a fast tokenizer"):
        TextEncoder(object())
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=made("bert").backend_tokenizer)
    with pytest.raises(InputError, match="no padding token"):
        TextEncoder(bare)


def test_case_of_a_vocabulary_file(tmp_path: Path) -> None:
    for name, cased in (("vocab.txt", False), ("vocab.uncased.txt", False), ("vocab-cased.txt", True)):
        path = tmp_path / name
        path.write_text("\n".join([*BERT, "Fox", "fox"]))
        tokens = get_text_tokenizer(str(path)).tokenize("Fox")
        assert tokens == (["Fox"] if cased else ["fox"]), name


# ---- ids with a meaning


def test_sentinels_are_sorted_by_their_numbers() -> None:
    names = ["<pad>", "</s>", "<extra_id_2>", "<extra_id_10>", "<extra_id_0>", "<extra_id_1>", "a", "b."]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="a")),
        pad_token="<pad>",
        eos_token="</s>",
    )
    text = TextEncoder(tokenizer)
    assert text.sentinel_ids.tolist() == [4, 5, 2, 3]
    assert text.stop_ids.tolist() == [7]
    assert text.end_id == 1
    assert text.probe == "a"


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_ends_of_sentences_and_texts(kind: str, made: Callable[[str], Any]) -> None:
    text = TextEncoder(made(kind))
    assert not len(text.sentinel_ids)
    assert {"."} <= {text.tokenizer.convert_ids_to_tokens(int(i))[-1] for i in text.stop_ids} <= {".", "!", "?"}
    assert text.end_id == text.tokenizer.sep_token_id


def test_a_tokenizer_without_an_end() -> None:
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "<pad>": 1}, unk_token="a")), pad_token="<pad>"
    )
    with pytest.raises(InputError, match="no token that ends a text"):
        _ = TextEncoder(tokenizer).end_id
