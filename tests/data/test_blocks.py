"""Blocks of documents: together they are the tokens of the text; none is lost, none comes twice."""

import random
from itertools import pairwise
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from funneltfm.data.blocks import packed, paired, sentences, tokenized
from funneltfm.data.text import NO_WORD, TextEncoder
from funneltfm.errors import InputError

TEXT = "the unbelievable fox jumps over a lazy dog in New York and is not tired , . !"
WORDS = TEXT.split()
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def make_documents(seed: int = 0, n: int = 12) -> list[list[str]]:
    """Documents of sentences, of 0 to 40 words each; some documents are empty, some sentences too."""
    rng = random.Random(seed)
    return [
        [" ".join(rng.choices(WORDS, k=rng.choice([0, 1, 3, 8, 40]))) for _ in range(rng.choice([0, 1, 2, 5, 9]))]
        for _ in range(n)
    ]


def word_piece() -> Any:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=60, special_tokens=BERT, show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    return _bert(tokenizer)


def _bert(tokenizer: Tokenizer) -> Any:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), BERT, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def whole_words() -> Any:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*BERT, *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _bert(tokenizer)


def byte_level(prefix: bool = False) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=ROBERTA, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=prefix)
    return _roberta(tokenizer)


def unigram() -> Any:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=ROBERTA, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=False)
    return _roberta(tokenizer)


def _roberta(tokenizer: Tokenizer) -> Any:
    names = dict(zip(("cls_token", "pad_token", "sep_token", "unk_token", "mask_token"), ROBERTA, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


TOKENIZERS = {
    "word_piece": word_piece(),
    "byte_level": byte_level(),
    "byte_level with prefix": byte_level(True),
    "unigram": unigram(),
}


def of_text(tokenizer: Any, document: list[str]) -> list[int]:
    """The tokens of a document as one text."""
    return tokenizer(" ".join(filter(None, document)), add_special_tokens=False)["input_ids"]


def documents_of(text: TextEncoder, documents: list[list[str]]) -> list[Any]:
    return list(tokenized(map(sentences, documents), text))


def inside(example: dict[str, Any], text: TextEncoder) -> list[int]:
    """What stands between an example's first and last special tokens; separators too."""
    layout = text.layout
    return example["input_ids"][len(layout.prefix) : len(example["input_ids"]) - len(layout.suffix_alone)]


def check_words(example: dict[str, Any], text: TextEncoder) -> None:
    """Word ids are beside the tokens, count on through the example and are the tokens' own."""
    ids, words = example["input_ids"], example["word_ids"]
    assert len(ids) == len(words) == len(example.get("token_type_ids", ids)) <= text.max_length
    real = [word for word in words if word != NO_WORD]
    assert real == sorted(real)
    for before, after in pairwise(real):
        assert after - before <= 1


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("length", [4, 5, 16, 200])
@pytest.mark.parametrize("seed", [0, 1])
def test_packed_documents(kind: str, length: int, seed: int) -> None:
    documents, text = make_documents(seed), TextEncoder(TOKENIZERS[kind], length)
    blocks = list(packed(documents_of(text, documents), text))
    for row, document in enumerate(documents):
        own = [block for block in blocks if block["row"] == row]
        assert [i for block in own for i in inside(block, text)] == of_text(text.tokenizer, document)
        assert all(len(block["input_ids"]) == length for block in own[:-1])
    for block in blocks:
        check_words(block, text)
    assert [block["row"] for block in blocks] == sorted(block["row"] for block in blocks)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("length", [4, 5, 16, 200])
@pytest.mark.parametrize("seed", [0, 1])
def test_packed_across_documents(kind: str, length: int, seed: int) -> None:
    documents, text = make_documents(seed), TextEncoder(TOKENIZERS[kind], length)
    blocks = list(packed(documents_of(text, documents), text, across=True))
    assert all(len(block["input_ids"]) == length for block in blocks[:-1])
    separator = text.layout.suffix_alone[0]
    tokens = [of_text(text.tokenizer, document) for document in documents]
    got = [i for block in blocks for i in inside(block, text)]
    assert [i for i in got if i != separator] == [i for own in tokens for i in own]
    room, filled = length - text.layout.n_special(1), [(row, own) for row, own in enumerate(tokens) if own]
    # Written down once more, document by document: no separator where a block has just ended.
    expected: list[tuple[int, int]] = []
    for row, own in filled:
        if len(expected) % room:
            expected.append((separator, expected[-1][1]))
        expected += [(i, row) for i in own]
    assert got == [i for i, _ in expected]
    assert [block["row"] for block in blocks] == [row for _, row in expected[::room]]
    for block in blocks:
        check_words(block, text)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("length", [6, 7, 16, 64, 400])
@pytest.mark.parametrize("seed", [0, 1])
def test_pairs(kind: str, length: int, seed: int) -> None:
    documents, text = make_documents(seed), TextEncoder(TOKENIZERS[kind], length)
    layout, n_pairs = text.layout, 0
    room = text.room(2)
    by_row: dict[int, list[int]] = {row: [] for row in range(len(documents))}
    for example in paired(documents_of(text, documents), text):
        check_words(example, text)
        ids = inside(example, text)
        between = [i for i in range(len(ids)) if ids[i : i + len(layout.between)] == layout.between]
        halves = [ids[: between[0]], ids[between[0] + len(layout.between) :]] if between else [ids]
        assert len(between) <= 1
        assert all(halves)
        assert sum(map(len, halves)) <= room
        by_row[example["row"]] += [i for half in halves for i in half]
        n_pairs += len(halves) == 2
        if layout.types is not None:
            types = example["token_type_ids"]
            a = len(layout.prefix) + len(halves[0]) + len(layout.between)
            expected = [0] * a + [1] * (len(types) - a) if between else [0] * len(types)
            assert types == expected
    assert list(by_row.values()) == [of_text(text.tokenizer, document) for document in documents]
    assert n_pairs > 0 or length < 16


def test_pairs_are_of_whole_sentences() -> None:
    text = TextEncoder(whole_words(), 16)  # 13 beside special tokens
    document = ["fox", "a dog in", "the lazy fox jumps", "dog , dog", "a fox", "lazy dog", "over"]
    texts = [text.tokenizer.decode(example["input_ids"]) for example in paired(documents_of(text, [document]), text)]
    assert texts == [
        "[CLS] fox a dog in the lazy fox jumps [SEP] dog , dog a fox [SEP]",
        "[CLS] lazy dog [SEP] over [SEP]",
    ]


def test_a_sentence_that_is_too_long_is_cut() -> None:
    text = TextEncoder(whole_words(), 8)  # 5 beside special tokens
    document = ["fox dog fox dog fox dog fox", "a lazy dog", "over"]
    texts = [text.tokenizer.decode(example["input_ids"]) for example in paired(documents_of(text, [document]), text)]
    assert texts == ["[CLS] fox dog fox dog fox [SEP]", "[CLS] dog fox [SEP] a lazy dog [SEP]", "[CLS] over [SEP]"]


def test_short_pairs() -> None:
    """A share of the examples ends early, at any length, with whole sentences; nothing is lost; texts alone decide."""
    text, rng = TextEncoder(whole_words(), 64), random.Random(0)
    documents = [[" ".join(rng.choices(WORDS, k=rng.randint(2, 5))) for _ in range(200)] for _ in range(20)]

    def lengths(short: float, some: list[list[str]] = documents) -> list[int]:
        examples = list(paired(documents_of(text, some), text, short))
        halves = [i for example in examples for i in example["input_ids"] if i not in text.special_ids]
        assert halves == [i for document in some for i in of_text(text.tokenizer, document)]
        assert all(example["first_length"] for example in examples if len(example["input_ids"]) > 10)
        return [len(example["input_ids"]) - 3 for example in examples]

    full = [n for n in lengths(0.0) if n < 57]
    assert len(full) <= 20  # ends of documents
    some = lengths(0.3)
    early = [n for n in some if n < 57]
    assert 0.25 < len(early) / len(some) < 0.45  # with the ends of documents
    every = lengths(1.0)
    assert min(every) < 8 < 55 < max(every)
    assert 25 < sum(every) / len(every) < 40  # the middle of 2 to 61, and on to the end of a sentence
    assert lengths(0.3, documents[3:7]) == [
        n for document in documents[3:7] for n in lengths(0.3, [document])
    ]  # whatever is read beside it


def test_a_document_may_be_of_several_texts() -> None:
    assert sentences(["a\nb", "", "c \n\n d\r\n"]) == ["a", " b", " c", " d"]
    assert sentences(["  "]) == []


def test_no_room_is_said() -> None:
    with pytest.raises(InputError, match="leaves no room for 2 texts beside 3 special tokens"):
        list(paired([], TextEncoder(TOKENIZERS["word_piece"], 4)))


@pytest.mark.parametrize("kind", ["word_piece", "byte_level"])
def test_several_processes_make_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("funneltfm.data.blocks._CHARACTERS", 500)
    text = TextEncoder(TOKENIZERS[kind], 16)
    rows = [sentences(document) for document in make_documents(n=60)]
    assert list(tokenized(rows, text, workers=2)) == list(tokenized(rows, text))
    assert list(tokenized([], text, workers=1)) == []


def test_a_reader_that_fails_ends_the_processes() -> None:
    def rows() -> Any:
        yield ["a"]
        raise InputError("broken")

    with pytest.raises(InputError, match="broken"):
        list(tokenized(rows(), TextEncoder(TOKENIZERS["word_piece"], 16), workers=1))
