"""Text to ids with the vocabularies of the checkpoints: WordPiece (by BERT's rules) and SentencePiece (by XLNet's).

The rules per character are in Python, because the ids must be the original's: the normalizer of `tokenizers` knows
no final sigma, deletes private-use characters and follows older Unicode tables. Greedy matching is the library's.
"""

import hashlib
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import ClassVar

from funneltfm.errors import InputError, brief
from funneltfm.files import read_json

SYMBOLS = {role: (f"<{role}>", f"[{role.upper()}]") for role in ("pad", "unk", "cls", "sep", "mask")}
"""Role -> the names that a vocabulary may give it, the preferred one first."""

_NEVER_FROM_TEXT = {name for names in SYMBOLS.values() for name in names} | {"<s>", "</s>", "<eod>", "<eop>"}
_CHUNK = 1024  # texts given to a library at once: its own records of a text are far larger than the ids
_CJK = (
    *((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF)),
    *((0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0x2F800, 0x2FA1F)),
)
_PLAIN_QUOTES = (("``", '"'), ("''", '"'), ("\u201c", '"'), ("\u201d", '"'), ("\u2018", "'"), ("\u2019", "'"))
_SPACE = "\u2581"  # SentencePiece's visible space


class Tokenizer(ABC):
    """Turns text into ids. No symbol is added to a text, and no text becomes a symbol other than unk.

    `pad_id`, `unk_id`, `cls_id`, `sep_id` and `mask_id` (None if the vocabulary has no mask) belong to the caller.
    `fingerprint` is equal for two tokenizers only if all their ids are: type, file content and `cased` are the same.
    """

    kind: ClassVar[str]

    def __init__(self, path: str | Path, cased: bool = False) -> None:
        self.path, self.cased = Path(path), cased
        content = _read(self.path)
        self.fingerprint = hashlib.sha256(f"{self.kind} cased={cased}\n".encode() + content).hexdigest()
        self._pieces = self._load(content)
        ids = {piece: i for i, piece in enumerate(self._pieces)}
        symbols = {role: next((ids[n] for n in names if n in ids), None) for role, names in SYMBOLS.items()}
        self.mask_id = symbols.pop("mask")
        self.pad_id, self.unk_id, self.cls_id, self.sep_id = (self._required(*item) for item in symbols.items())

    @property
    def vocab_size(self) -> int:
        """How many pieces the vocabulary has, symbols included."""
        return len(self._pieces)

    def convert_text_to_ids(self, text: str) -> list[int]:
        """The ids of one text: (T,), empty for an empty text."""
        return self.convert_texts_to_ids([text])[0]

    def convert_texts_to_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, the same as one by one but faster."""
        ids: list[list[int]] = []
        for start in range(0, len(texts), _CHUNK):
            chunk = texts[start : start + _CHUNK]
            _check_unicode(chunk)
            ids += self._encode(chunk)
        return ids

    def convert_ids_to_pieces(self, ids: Iterable[int]) -> list[str]:
        """The pieces of the vocabulary that have these ids."""
        ids = list(ids)
        if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise InputError(f"ids must be 0 to {self.vocab_size - 1}, the pieces of {self.path}; got {wrong[0]}.")
        return [self._pieces[i] for i in ids]

    def _required(self, role: str, found: int | None) -> int:
        if found is None:
            raise InputError(
                f"The vocabulary {self.path} has no {role} symbol: expected the piece {' or '.join(SYMBOLS[role])} "
                f"among its {self.vocab_size}. Give the vocabulary that belongs to the checkpoint, or add the piece."
            )
        return found

    @abstractmethod
    def _load(self, content: bytes) -> list[str]:
        """Set up the library from the file and return the pieces in the order of their ids."""

    @abstractmethod
    def _encode(self, texts: Sequence[str]) -> list[list[int]]: ...


class WordPieceTokenizer(Tokenizer):
    """BERT's rules: clean, split CJK characters and punctuation, unaccent and lower-case if uncased, match greedily."""

    kind = "word_piece"

    def _load(self, content: bytes) -> list[str]:
        from tokenizers import Tokenizer as Matcher
        from tokenizers import models, pre_tokenizers

        vocab = _read_vocabulary(self.path, content)
        unk = next((name for name in SYMBOLS["unk"] if name in vocab), "<unk>")
        self._matcher = Matcher(models.WordPiece(vocab, unk_token=unk, max_input_chars_per_word=200))
        self._matcher.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        self._clean = _CharTable(_clean)
        self._split = _CharTable(_split if self.cased else _unaccent_and_split)
        return list(vocab)

    def _normalize(self, text: str) -> str:
        """The text with one space at least between words and around punctuation: "Na\u00efve!" => "naive !"."""
        text = text.translate(self._clean)
        if not self.cased:
            text = unicodedata.normalize("NFD", text.lower())
        return text.translate(self._split)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        normal = [self._normalize(text) for text in texts]
        return [encoding.ids for encoding in self._matcher.encode_batch_fast(normal, add_special_tokens=False)]


class SentencePieceTokenizer(Tokenizer):
    """XLNet's rules: collapse spaces, make quotes plain, unaccent (cased or not), lower-case if uncased, split "5,"."""

    kind = "sent_piece"

    def _load(self, content: bytes) -> list[str]:
        from sentencepiece import SentencePieceProcessor

        try:
            self._model = SentencePieceProcessor(model_proto=content)
            pieces: list[str] = self._model.id_to_piece(list(range(self._model.get_piece_size())))
        except (RuntimeError, UnicodeDecodeError) as error:  # a piece may have lost its UTF-8
            raise InputError(
                f"Expected a SentencePiece model (a binary .model file) for sent_piece, but {self.path} is not one or "
                "is damaged. Check tokenizer_path; for a vocabulary of one piece a line use tokenizer_type word_piece."
            ) from error
        self._rewrites = {i: new for i, piece in enumerate(pieces) if (new := self._rewrite(piece)) is not None}
        return pieces

    def _rewrite(self, piece: str) -> list[int] | None:
        """The ids that stand for a piece the model may choose and we do not want, or None. "1990," => "1990" ",".

        A user-defined symbol such as [MASK] is always found in text; cut in two, "[MASK" "]", it is text.
        """
        if piece in _NEVER_FROM_TEXT and piece != self._model.id_to_piece(self._model.unk_id()):
            return self._encode_inside(piece[:-1]) + self._encode_inside(piece[-1])
        if piece[-1:] == "," and piece[-2:-1].isdigit():
            number = piece[:-1].replace(_SPACE, "")
            encode = self._model.encode if piece[0] == _SPACE else self._encode_inside
            return [*encode(number), self._model.piece_to_id(",")]
        return None

    def _encode_inside(self, text: str) -> list[int]:
        """The ids of a text that goes on without a space: the one that the model puts in front is taken away."""
        first, *rest = self._model.encode(text, out_type=str) or [""]
        return [self._model.piece_to_id(piece) for piece in (first.removeprefix(_SPACE), *rest) if piece]

    def _normalize(self, text: str) -> str:
        text = " ".join(text.split())
        for quote, plain in _PLAIN_QUOTES:
            text = text.replace(quote, plain)
        if not text.isascii():
            text = unicodedata.normalize("NFKD", text)
            text = "".join(char for char in text if not unicodedata.combining(char))
        return text if self.cased else text.lower()

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        chosen: list[list[int]] = self._model.encode([self._normalize(text) for text in texts])
        return [[new for i in ids for new in self._rewrites.get(i, (i,))] for ids in chosen]


TOKENIZERS: dict[str, type[Tokenizer]] = {cls.kind: cls for cls in (WordPieceTokenizer, SentencePieceTokenizer)}
"""tokenizer_type -> the class that reads its file."""


def get_tokenizer(tokenizer_type: str, tokenizer_path: str | Path, cased: bool = False) -> Tokenizer:
    """The tokenizer of a vocabulary: `word_piece` reads one piece a line, `sent_piece` a SentencePiece model."""
    if tokenizer_type not in TOKENIZERS:
        raise InputError(f"tokenizer_type must be one of {sorted(TOKENIZERS)}, got {tokenizer_type!r}.")
    return TOKENIZERS[tokenizer_type](tokenizer_path, cased)


def check_case(vocabulary: Path, cased: bool) -> None:
    """An InputError where a tokenizer.json beside a WordPiece vocabulary says otherwise: ids would be wrong."""
    path = vocabulary.with_name("tokenizer.json")
    if not path.is_file():
        return
    content = read_json(path, "the tokenizer")
    rules = content.get("normalizer") if isinstance(content, dict) else None
    parts = [rules, *(rules.get("normalizers") or ())] if isinstance(rules, dict) else []
    lowers = any(part.get("lowercase") or part.get("type") == "Lowercase" for part in parts if isinstance(part, dict))
    if lowers == cased:
        raise InputError(
            f"{path} says that the pieces of {vocabulary.name} are {'of lower case' if lowers else 'cased'}. "
            f"{'Leave out' if lowers else 'Give'} --cased."
        )


class _CharTable(dict[int, str]):
    """A table for str.translate that asks a rule once per character: rules in Python at the speed of C."""

    def __init__(self, rule: Callable[[str], str]) -> None:
        self._rule = rule

    def __missing__(self, code: int) -> str:
        self[code] = value = self._rule(chr(code))
        return value


def _clean(char: str) -> str:
    category = unicodedata.category(char)
    if char in "\t\n\r" or category == "Zs":
        return " "
    if char == "\ufffd" or category in ("Cc", "Cf"):
        return ""
    return f" {char} " if any(low <= ord(char) <= high for low, high in _CJK) else char


def _split(char: str) -> str:
    ascii_symbol = "!" <= char <= "~" and not char.isalnum()  # `$+<=>^|~ are not punctuation for Unicode
    return f" {char} " if ascii_symbol or unicodedata.category(char).startswith("P") else char


def _unaccent_and_split(char: str) -> str:
    return "" if unicodedata.category(char) == "Mn" else _split(char)


def _check_unicode(texts: Iterable[str]) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            near = ascii(text[max(0, error.start - 20) : error.end + 20])
            raise InputError(
                f"Text must be valid Unicode, but there is half of a surrogate pair at character {error.start}, in "
                f"{near}. Remove it, or read the text again with its true encoding."
            ) from error


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"Expected a vocabulary file, but {path} does not exist. Check tokenizer_path.") from error
    except IsADirectoryError as error:
        raise InputError(
            f"Expected a vocabulary file, but {path} is a folder. Give the file in it, such as vocab.uncased.txt."
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        why = getattr(error, "strerror", None) or error
        raise InputError(f"Cannot read the vocabulary file {path}: {why}. Check tokenizer_path.") from error
    if not content.strip():
        raise InputError(f"Expected a vocabulary, but {path} is empty. Copy or download the file again.")
    return content


def _read_vocabulary(path: Path, content: bytes) -> dict[str, int]:
    """Piece -> id: the first line has id 0."""
    try:
        lines = content.decode("utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"Expected one piece a line in UTF-8, but {path}, line {line} is not UTF-8. Check tokenizer_path; "
            "for a SentencePiece model use tokenizer_type sent_piece."
        ) from error
    vocab: dict[str, int] = {}
    for i, line_text in enumerate(lines):
        piece = line_text.strip(" \t\r")
        if not piece:
            raise InputError(f"Expected one piece a line, but {path}, line {i + 1} is empty. Remove the line.")
        if (first := vocab.setdefault(piece, i)) != i:
            raise InputError(
                f"Expected every piece once, but {path}, line {i + 1} repeats the piece {brief(repr(piece))} of line "
                f"{first + 1}. Remove one: ids are counted by line."
            )
    return vocab
