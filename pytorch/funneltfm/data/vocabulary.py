"""A tokenizer learned from texts: WordPiece, byte-level BPE or Unigram, as a folder that AutoTokenizer loads."""

import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from funneltfm.errors import InputError, brief


@dataclass(frozen=True, kw_only=True)
class TokenizerFlags:
    """The tokenizer"""

    type: Literal["word_piece", "bpe", "unigram"] = "word_piece"
    """Model: word_piece (BERT, ELECTRA, Funnel), bpe on bytes (RoBERTa), or unigram (ALBERT, XLM-R)."""
    template: Literal["bert", "roberta", "t5"] | None = None
    """Special tokens: bert has [CLS] a [SEP] b [SEP] and token types, roberta <s> a </s></s> b </s> and none, t5 a </s>
    b </s> and the sentinels <extra_id_0> to <extra_id_99>. Default: bert for word_piece, roberta for the others.
    """
    vocab_size: int = 30_000
    """Pieces at most, special tokens included."""
    min_frequency: int = 2
    """How often two pieces must come together to become one; not for unigram."""
    lower_case: bool | None = None
    """Turn texts into lower case; word_piece takes accents away with it. Default: word_piece does, as BERT; bpe and
    unigram do not, for what is lower case cannot be written with capitals again.
    """
    alphabet_limit: int = 1000
    """word_piece: characters that the vocabulary has, the most frequent ones; a word with another one is unknown."""
    special_tokens: tuple[str, ...] = ()
    """More tokens that are never split, and stand for no text."""
    model_max_length: int = 512
    """Longest input of the models that it is for; the folder says so."""


@dataclass(frozen=True)
class Template:
    """Special tokens, and where they stand."""

    tokens: dict[str, str]
    """Role -> token, in the order of their ids."""
    single: str
    pair: str
    more: tuple[str, ...] = ()
    """Tokens without a role."""


TEMPLATES = {
    "bert": Template(
        {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
        "[CLS] $A [SEP]",
        "[CLS] $A [SEP] $B:1 [SEP]:1",
    ),
    "roberta": Template(
        {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"},
        "<s> $A </s>",
        "<s> $A </s> </s> $B </s>",
    ),
    "t5": Template(
        {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"},
        "$A </s>",
        "$A </s> $B </s>",
        tuple(f"<extra_id_{i}>" for i in range(100)),
    ),
}
_PREFIX = "##"  # of pieces inside of a word


def train_tokenizer(texts: Callable[[], Iterable[str]], flags: Any) -> Any:
    """A fast tokenizer of `transformers`. texts: called once or twice, what to learn from. flags: TokenizerFlags.

    The same texts give the same ids, in whatever order the library meets them. (Scores of unigram are rounded: the
    library adds them up in an order of its own.)
    """
    import transformers
    from tokenizers import AddedToken, processors

    template = TEMPLATES[flags.template or ("bert" if flags.type == "word_piece" else "roberta")]
    special = list(template.tokens.values())
    if clash := {*special, *template.more} & {*flags.special_tokens}:
        raise InputError(f"special_tokens names {', '.join(sorted(clash))}, which the template has anyway.")
    more = list(dict.fromkeys([*template.more, *flags.special_tokens]))
    if flags.vocab_size < 1 or flags.min_frequency < 0 or flags.alphabet_limit < 1 or flags.model_max_length < 1:
        raise InputError(
            f"vocab_size, alphabet_limit and model_max_length must be at least 1 and min_frequency not negative; got "
            f"{flags.vocab_size}, {flags.alphabet_limit}, {flags.model_max_length} and {flags.min_frequency}."
        )
    try:
        tokenizer = _TYPES[flags.type](texts, flags, [*special, *more], template.tokens["unk"])
    except InputError:
        raise
    except Exception as error:  # the library raises all kinds
        raise InputError(
            f"a {flags.type} vocabulary of {flags.vocab_size} pieces cannot be learned from these texts: "
            f"{brief(' '.join(str(error).split()), 400)}. Give more text, or fewer pieces."
        ) from error
    if tokenizer.get_vocab_size() > flags.vocab_size:
        raise InputError(
            f"vocab_size must be at least {tokenizer.get_vocab_size()}, as many as special tokens and characters "
            f"alone are; got {flags.vocab_size}."
        )
    places = processors.TemplateProcessing(
        single=template.single,
        pair=template.pair,
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in special],
    )
    of_bytes = [processors.ByteLevel(trim_offsets=True)] if flags.type == "bpe" else []
    tokenizer.post_processor = processors.Sequence([*of_bytes, places]) if of_bytes else places
    named: dict[str, Any] = {f"{role}_token": token for role, token in template.tokens.items()}
    if template is TEMPLATES["roberta"]:
        named |= {"bos_token": template.tokens["cls"], "eos_token": template.tokens["sep"]}
        named["mask_token"] = AddedToken(template.tokens["mask"], lstrip=True, special=True)
    types = ["token_type_ids"] if ":1" in template.pair else []
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=flags.model_max_length,
        model_input_names=["input_ids", *types, "attention_mask"],
        clean_up_tokenization_spaces=False,
        **(named | ({"additional_special_tokens": more} if more else {})),
    )


# ---- the models


def _lowers(flags: Any) -> bool:
    """Whether texts are turned into lower case."""
    return flags.type == "word_piece" if flags.lower_case is None else flags.lower_case


def _word_piece(texts: Callable[[], Iterable[str]], flags: Any, special: list[str], unk: str) -> Any:
    """With all characters, alone and inside of a word. The library numbers the latter as it meets them, which is never
    the same; so they are given to it like special tokens, and a model is made anew of the pieces that it finds.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    lower = _lowers(flags)

    def make(model: Any) -> Any:
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower, strip_accents=lower)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        return tokenizer

    learner = make(models.WordPiece(unk_token=unk, max_input_chars_per_word=200))
    counts: Counter[str] = Counter()
    for text in texts():
        counts.update(text)
    normal: Counter[str] = Counter()
    for char, count in counts.items():
        for one in learner.normalizer.normalize_str(char):
            normal[one] += 0 if one.isspace() else count
    ranked = sorted(normal.items(), key=lambda item: (-item[1], item[0]))
    alphabet = sorted(char for char, count in ranked[: flags.alphabet_limit] if count)
    trainer = trainers.WordPieceTrainer(
        vocab_size=flags.vocab_size,
        min_frequency=flags.min_frequency,
        special_tokens=[*special, *(f"{_PREFIX}{char}" for char in alphabet)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix=_PREFIX,
        show_progress=False,
    )
    learner.train_from_iterator(texts(), trainer)
    return make(models.WordPiece(learner.get_vocab(), unk_token=unk, max_input_chars_per_word=200))


def _bpe(texts: Callable[[], Iterable[str]], flags: Any, special: list[str], unk: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    if _lowers(flags):
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=flags.vocab_size,
        min_frequency=flags.min_frequency,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def _unigram(texts: Callable[[], Iterable[str]], flags: Any, special: list[str], unk: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    def make(model: Any) -> Any:
        tokenizer = Tokenizer(model)
        lower = [normalizers.Lowercase()] if _lowers(flags) else []
        blanks = normalizers.Replace(Regex(r"\s+"), " ")
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), *lower, blanks, normalizers.Strip()])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        return tokenizer

    learner = make(models.Unigram())
    trainer = trainers.UnigramTrainer(
        vocab_size=flags.vocab_size, special_tokens=special, unk_token=unk, show_progress=False
    )
    learner.train_from_iterator(texts(), trainer)
    vocab: list[list[Any]] = json.loads(learner.to_str())["model"]["vocab"]
    scores = {piece: score for piece, score in vocab if piece not in special}
    # Characters that no other piece needs stand at the end, 0.0001 apart, in no order: they get one score.
    lowest, chars = min(scores.values()), [piece for piece in scores if len(piece) == 1]
    scores |= {char: lowest for char in chars if scores[char] < lowest + 0.0001 * len(chars)}
    pieces = sorted(((piece, round(score, 4)) for piece, score in scores.items()), key=lambda one: (-one[1], one[0]))
    whole = [*((token, 0.0) for token in special), *pieces]
    return make(models.Unigram(whole, unk_id=special.index(unk)))


_TYPES: dict[str, Callable[[Callable[[], Iterable[str]], Any, list[str], str], Any]] = {
    "word_piece": _word_piece,
    "bpe": _bpe,
    "unigram": _unigram,
}


# ---- the folder


# What a folder of a tokenizer may hold, by this and earlier versions of transformers.
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt")


def check_folder(folder: Path, overwrite: bool) -> None:
    """An InputError where writing would replace what is there; with overwrite, what is more than a tokenizer."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder} must be a folder, or nothing yet; it is a file.")
    held = sorted(path.name for path in folder.iterdir())
    if held and not overwrite:
        raise InputError(f"{folder} exists and is not empty. Name another folder, or give --overwrite.")
    foreign = [name for name in held if name not in _FILES] if "tokenizer.json" in held else held
    if foreign:
        raise InputError(
            f"--overwrite replaces a tokenizer alone, but {folder} holds {brief(foreign[0])}. Name another folder, "
            f"or remove that yourself."
        )


def write_tokenizer(tokenizer: Any, folder: Path, overwrite: bool = False) -> None:
    """Write a folder that AutoTokenizer loads; it appears whole or not at all. Of word_piece there is a vocab.txt too,
    which `funneltfm classify` reads.
    """
    check_folder(folder, overwrite)
    new = folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    new.mkdir(parents=True)
    try:
        tokenizer.save_pretrained(new)
        if type(tokenizer.backend_tokenizer.model).__name__ == "WordPiece":
            ids = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
            (new / "vocab.txt").write_text("".join(f"{piece}\n" for piece, _ in ids), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
