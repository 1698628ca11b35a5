"""Texts to token ids with any fast tokenizer of `transformers`: one, two or more texts a row, cut to fit."""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from funneltfm.errors import InputError, brief

log = logging.getLogger(__name__)

Text = str | list[str]  # a text, or its words
NO_WORD = -1  # the word id of a special token
_SENTINEL = re.compile(r"<extra_id_(\d+)>")
_AT_ONCE = 1024  # texts that go through the tokenizer together: enough to be fast, few enough to take little memory


@dataclass(frozen=True)
class Pieces:
    """The pieces of one text, without special tokens."""

    ids: list[int]
    word_ids: list[int]
    """Which word of the text each piece belongs to, from 0."""
    offsets: list[tuple[int, int]]
    """Which characters of the text each piece is."""

    def __getitem__(self, part: slice) -> "Pieces":
        """Some of them."""
        return Pieces(self.ids[part], self.word_ids[part], self.offsets[part])


@dataclass(frozen=True)
class Layout:
    """Where a tokenizer puts its special tokens, read from what it does with a pair: `[CLS] a [SEP] b [SEP]`, say."""

    prefix: list[int]
    between: list[int]
    suffix: list[int]
    suffix_alone: list[int]
    """After a single text."""
    types: tuple[int, int] | None
    """Token types of the first and the second text; None where the tokenizer tells no tokens apart."""
    special_types: dict[str, list[int]]
    """Token types of prefix, between, suffix and suffix_alone."""

    def n_special(self, n_texts: int) -> int:
        if n_texts == 1:
            return len(self.prefix) + len(self.suffix_alone)
        return len(self.prefix) + len(self.between) * (n_texts - 1) + len(self.suffix)


@dataclass
class Cuts:
    """The inputs that a `TextEncoder` has joined."""

    inputs: int = 0
    cut: int = 0
    """Those that did not fit."""
    longest: int = 0
    """Tokens of the longest before it was cut, special ones included."""

    def count(self, length: int, most: int) -> None:
        self.inputs += 1
        self.cut += length > most
        self.longest = max(self.longest, length)

    def tell(self, where: str) -> None:
        """Log, if any was cut, what was; and count from 0 again."""
        if self.cut:
            log.info(
                "%s: %d of %d inputs were longer than --max_sequence_length and are cut; the longest had %d tokens",
                *(where, self.cut, self.inputs, self.longest),
            )
        self.inputs = self.cut = self.longest = 0


@dataclass(frozen=True)
class TextEncoder:
    """Rows of texts to ids.

    tokenizer: a fast tokenizer of `transformers`. max_length: longest row in tokens, special ones included; longer
    rows lose tokens at the end of their longest text first, which `cuts` counts. token_types: the type of each text, in
    place of the tokenizer's own.
    """

    tokenizer: Any
    max_length: int = 128
    token_types: tuple[int, ...] | None = field(default=None, kw_only=True)
    cuts: Cuts = field(default_factory=Cuts, kw_only=True, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "is_fast", False):
            raise InputError(
                f"{type(self.tokenizer).__name__} is not a fast tokenizer, so it cannot say which word a piece belongs "
                f"to. Give a folder with a tokenizer.json, a vocab.txt or a tokenizer.json."
            )
        if self.tokenizer.pad_token_id is None:
            raise InputError(f"the tokenizer {self.tokenizer.name_or_path} has no padding token; it needs one.")

    @cached_property
    def probe(self) -> str:
        """A word that has an id."""
        probe = next((word for word in ("a", "1", ".") if self._bare(word)), None)
        if probe is None:
            name = self.tokenizer.name_or_path
            raise InputError(f"the tokenizer {name} makes nothing of the texts 'a', '1' and '.'.")
        return probe

    @cached_property
    def layout(self) -> Layout:
        tokenizer = self.tokenizer
        probe = self.probe
        alone, pair = (tokenizer(*texts, return_token_type_ids=True) for texts in ((probe,), (probe, probe)))
        first, second = ([i for i, n in enumerate(pair.sequence_ids(0)) if n == side] for side in (0, 1))
        end = max(i for i, side in enumerate(alone.sequence_ids(0)) if side == 0) + 1
        spans = {
            "prefix": (pair, slice(0, first[0])),
            "between": (pair, slice(first[-1] + 1, second[0])),
            "suffix": (pair, slice(second[-1] + 1, None)),
            "suffix_alone": (alone, slice(end, None)),
        }
        types = pair["token_type_ids"]
        return Layout(
            **{name: encoding["input_ids"][span] for name, (encoding, span) in spans.items()},
            types=(types[first[0]], types[second[0]]) if any(types) else None,
            special_types={name: encoding["token_type_ids"][span] for name, (encoding, span) in spans.items()},
        )

    @cached_property
    def special_ids(self) -> np.ndarray:
        """Ids that stand for no text, sorted."""
        return special_ids(self.tokenizer)

    @cached_property
    def ordinary_ids(self) -> np.ndarray:
        """All other ids, sorted."""
        known = np.fromiter(self.tokenizer.get_vocab().values(), np.int64)
        return np.setdiff1d(known, self.special_ids)

    @cached_property
    def sentinel_ids(self) -> np.ndarray:
        """Ids of T5's sentinels, <extra_id_0>, <extra_id_1>, ..., in this order; empty where there are none."""
        known = self.tokenizer.get_vocab()
        numbers = {int(found[1]): id for token, id in known.items() if (found := _SENTINEL.fullmatch(token))}
        return np.array([numbers[number] for number in sorted(numbers)], np.int64)

    @cached_property
    def stop_ids(self) -> np.ndarray:
        """Ids of tokens that end with a full stop, an exclamation mark or a question mark, sorted."""
        known = self.tokenizer.get_vocab()
        stops = np.array([id for token, id in known.items() if token.endswith((".", "!", "?"))], np.int64)
        return np.setdiff1d(stops, self.special_ids)

    @cached_property
    def end_id(self) -> int:
        """The id that ends a text: that of the tokenizer's token for it, or of its separator."""
        own = (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id)
        end = next((id for id in own if id is not None), None)
        if end is None:
            raise InputError(
                f"the tokenizer {self.tokenizer.name_or_path} has no token that ends a text (eos_token or sep_token)."
            )
        return end

    @cached_property
    def fingerprint(self) -> str:
        """Equal for two encoders only if they make the same ids of the same texts."""
        import tokenizers

        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for name in ("truncation", "padding"):  # left behind by the last call
            backend.pop(name, None)
        parts = [tokenizers.__version__, backend, self.max_length, self.token_types, repr(self.layout)]
        return hashlib.sha256(json.dumps([*parts, self.special_ids.tolist()]).encode()).hexdigest()

    def _bare(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def pieces(self, texts: Sequence[Text]) -> Iterator[Pieces]:
        """Pieces of every text, in order; a text is a string or a list of words."""
        if not texts:
            return
        words = not isinstance(texts[0], str)
        if words and not takes_words(self.tokenizer):
            raise InputError(
                "this tokenizer joins words to the text before them unless it is loaded with add_prefix_space=True; "
                "words that are given one by one would come out wrong."
            )
        for start in range(0, len(texts), _AT_ONCE):
            encoding = self.tokenizer(
                list(texts[start : start + _AT_ONCE]),
                add_special_tokens=False,
                is_split_into_words=words,
                return_attention_mask=False,
                return_token_type_ids=False,
                return_offsets_mapping=True,
                verbose=False,
            )
            for i, ids in enumerate(encoding["input_ids"]):
                word_ids = [NO_WORD if word is None else word for word in encoding.word_ids(i)]
                yield Pieces(ids, word_ids, encoding["offset_mapping"][i])

    def encode(self, rows: Sequence[Sequence[Text]]) -> list[dict[str, Any]]:
        """Examples of rows of texts: "input_ids", "word_ids" (word_ids of later texts go on counting; NO_WORD for
        special tokens), and "token_type_ids" where the tokenizer has types. Lists of int of equal length.
        """
        flat = [text for row in rows for text in row]
        words = {isinstance(text, list) for text in flat}
        if len(words) > 1:
            raise InputError("some texts are lists of words and some are not; give one kind.")
        pieces = self.pieces(flat)
        return [self.join([next(pieces) for _ in row]) for row in rows]

    def check_types(self, known: int) -> None:
        """An InputError for token types that a model which knows so many does not have; with one or none it is given
        no types, so there must be none that were asked for.
        """
        if self.token_types is not None and max(self.token_types) >= known:
            raise InputError(
                f"--extended_token_type_ids {' '.join(map(str, self.token_types))}, but the model knows {known} token "
                f"types. From scratch, --additional_config_kwargs type_vocab_size=N may give it more."
            )
        layout = self.layout
        made = {*(layout.types or ()), *(t for types in layout.special_types.values() for t in types)}
        if 1 < known <= max(made):
            raise InputError(
                f"the tokenizer makes the token type {max(made)}, but the model knows {known} types: they do not "
                f"belong together."
            )

    def room(self, n: int) -> int:
        """Tokens that n texts may have together beside the special ones; an InputError where it is too small."""
        room = self.max_length - self.layout.n_special(n)
        if room < n:
            raise InputError(
                f"max_sequence_length {self.max_length} leaves no room for {n} texts beside {self.layout.n_special(n)} "
                f"special tokens."
            )
        return room

    def join(self, parts: Sequence[Pieces], first: int = 0, whole: int | None = None) -> dict[str, Any]:
        """One example of the pieces of a row's texts. first: the number of the first one, for its token type. whole:
        how many pieces there were, where some are cut off already.
        """
        room, n_pieces = self.room(len(parts)), [len(part.ids) for part in parts]
        self.cuts.count(self.max_length - room + (sum(n_pieces) if whole is None else whole), self.max_length)
        lengths = fit_lengths(n_pieces, room)
        words: list[list[int]] = []
        first_word = 0
        for part, length in zip(parts, lengths, strict=True):
            words.append([w if w == NO_WORD else w + first_word for w in part.word_ids[:length]])
            first_word += max(part.word_ids, default=-1) + 1
        return self.example([part.ids[:length] for part, length in zip(parts, lengths, strict=True)], words, first)

    def example(self, texts: Sequence[list[int]], words: Sequence[list[int]], first: int = 0) -> dict[str, Any]:
        """An example of the ids and the word ids of texts that fit: with the special tokens around, and types. first:
        the number of the first one.
        """
        layout, n = self.layout, len(texts)
        ids, word_ids = list(layout.prefix), [NO_WORD] * len(layout.prefix)
        types = self._special_types("prefix", 0, first)
        for number, (text, of_text) in enumerate(zip(texts, words, strict=True)):
            name = "between" if number < n - 1 else "suffix" if n > 1 else "suffix_alone"
            after: list[int] = getattr(layout, name)
            ids += text + after
            word_ids += of_text + [NO_WORD] * len(after)
            types += [self._type(first + number)] * len(text) + self._special_types(name, number, first)
        example = {"input_ids": ids, "word_ids": word_ids}
        return example if layout.types is None and self.token_types is None else example | {"token_type_ids": types}

    def _special_types(self, name: str, number: int, first: int) -> list[int]:
        """Token types of the special tokens beside a text. Where the tokenizer does not say (token_types, or a third
        text), they are the text's, but for those with a type of their own, such as [CLS] of Funnel.
        """
        types = self.layout.special_types[name]
        if self.token_types is None and first == 0 and not (name == "between" and number > 0):
            return list(types)
        return [self._type(first + number) if kind in (self.layout.types or (0,)) else kind for kind in types]

    def _type(self, number: int) -> int:
        """Token type of the text with this number."""
        if self.token_types is not None:
            if number >= len(self.token_types):
                raise InputError(
                    f"--extended_token_type_ids has {len(self.token_types)} types, but there are {number + 1} texts."
                )
            return self.token_types[number]
        types = self.layout.types or (0, 0)
        return types[min(number, 1)]


def fit_lengths(lengths: Sequence[int], room: int) -> list[int]:
    """Shorten the longest of several lengths, the last one where they are equal, one by one until all fit together.

    >>> fit_lengths([10, 3], 9), fit_lengths([10, 10], 9), fit_lengths([2, 9, 9], 12)
    ([6, 3], [5, 4], [2, 5, 5])
    """
    if sum(lengths) <= room:
        return list(lengths)
    low, high = 0, max(lengths)  # the highest level to which all can be cut and fit
    while low < high:
        level = (low + high + 1) // 2
        low, high = (level, high) if sum(min(n, level) for n in lengths) <= room else (low, level - 1)
    cut = [min(n, low) for n in lengths]
    spare = room - sum(cut)
    for i, n in enumerate(lengths):  # the first ones keep one token more
        if spare and n > low:
            cut[i] += 1
            spare -= 1
    return cut


def takes_words(tokenizer: Any) -> bool:
    """Whether the words of a text, given one by one, come out as in the text; byte-level BPE as RoBERTa has it needs
    add_prefix_space for that.
    """
    probe = ["a", "1", "."]
    apart = tokenizer(probe, is_split_into_words=True, add_special_tokens=False)["input_ids"]
    return apart[1:] == tokenizer(" ".join(probe), add_special_tokens=False)["input_ids"][1:]


def get_text_tokenizer(path: str, words: bool = False) -> Any:
    """A fast tokenizer of `transformers`: a folder or a name that AutoTokenizer knows, a tokenizer.json, or a
    vocab.txt with one piece a line (BERT's and Funnel's kind; lower case unless its name says cased).

    words: texts will be given word by word, so it must be one that `takes_words`; others get a prefix space.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise InputError(f"pipelines need `transformers` ({error}): pip install 'funneltfm[hf]'.") from error
    try:
        tokenizer = _loaded(path)
        if words and not takes_words(tokenizer):
            tokenizer = _loaded(path, add_prefix_space=True)
        if words and not takes_words(tokenizer):  # classes that know no such argument
            backend = tokenizer.backend_tokenizer
            state = json.loads(backend.to_str())
            _set_prefix_space(state["pre_tokenizer"])
            backend.pre_tokenizer = type(backend).from_str(json.dumps(state)).pre_tokenizer
        types = "token_type_ids"
        if types not in tokenizer.model_input_names and any(tokenizer("a", "a", return_token_type_ids=True)[types]):
            tokenizer.model_input_names = [*tokenizer.model_input_names, types]
            tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names  # saved: others get them as we do
        return tokenizer
    except InputError:
        raise
    except Exception as error:  # transformers, tokenizers and the hub raise all kinds
        raise InputError(f"cannot load a tokenizer from {path}: {brief(' '.join(str(error).split()), 500)}") from error


def _loaded(path: str, **more: Any) -> Any:
    import transformers

    file = Path(path)
    if file.is_file() and file.suffix == ".txt":
        cased = "cased" in file.name.lower().replace("uncased", "")
        return transformers.BertTokenizer(vocab=str(file), do_lower_case=not cased)
    if file.is_file() and file.suffix == ".json":
        return _with_specials(transformers.PreTrainedTokenizerFast(tokenizer_file=str(file), **more))
    return transformers.AutoTokenizer.from_pretrained(path, **more)


def _set_prefix_space(state: Any) -> None:
    """Put a space before every text, in the JSON of a byte-level pre-tokenizer or of a sequence with one."""
    for part in [state or {}, *((state or {}).get("pretokenizers", []))]:
        if part.get("type") == "ByteLevel":
            part["add_prefix_space"] = True


_SPECIAL = {
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]", "<s>", "<cls>"),
    "sep_token": ("[SEP]", "</s>", "<sep>"),
    "pad_token": ("[PAD]", "<pad>"),
    "mask_token": ("[MASK]", "<mask>"),
}


def _with_specials(tokenizer: Any) -> Any:
    """A bare tokenizer.json does not say which of its tokens are special: take them by their usual names."""
    known = tokenizer.get_vocab()
    for name, usual in _SPECIAL.items():
        found = next((token for token in usual if token in known), None)
        if getattr(tokenizer, name) is None and found is not None:
            setattr(tokenizer, name, found)
    return tokenizer


def special_ids(tokenizer: Any) -> np.ndarray:
    """Ids that stand for no text, sorted."""
    return np.array(sorted(set(tokenizer.all_special_ids)), np.int64)
