"""`denoising`: write a text that was corrupted as it was.

Infilling, with shuffled sentences, is BART's (Lewis et al. 2020, section 2.2): the target is the whole text. Span
corruption is T5's (Raffel et al. 2020, section 3.1.4): the target is what is missing.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from funneltfm.data.corruption import infilled, n_noise, noise_spans, permuted, spanned, unspanned_length
from funneltfm.data.features import Example
from funneltfm.data.text import NO_WORD, TextEncoder
from funneltfm.errors import InputError
from funneltfm.tasks.masked_lm import Corrupting
from funneltfm.tasks.seq2seq import Seq2Seq


class Denoising(Seq2Seq, Corrupting):
    """--denoising_objective; auto is span corruption where the tokenizer has sentinels, else infilling."""

    name = "denoising"

    def __init__(self, args: Any):
        super().__init__(args)
        self.max_length = args.max_sequence_length[0]
        self.infilling_share = args.probability if "probability" in args.given else 0.3
        if args.probability == 1 and args.denoising_objective != "infilling":
            raise InputError("--probability is 1, but span corruption must leave something of every text.")

    @property
    def longest_target(self) -> int:
        """Of infilling the whole text; of span corruption what is noise, with sentinels and the end."""
        args = self.args
        most = args.max_number_of_spans or self.max_length
        n = unspanned_length(self.max_length, args.probability, args.mean_span_length, most)
        return max(self.max_length, sum(n_noise(n, args.probability, args.mean_span_length, most)) + 2)

    def spans(self, text: TextEncoder) -> bool:
        """Whether it is span corruption."""
        objective = self.args.denoising_objective
        needed = 2 if self.args.closing_sentinel else 1
        if objective == "span_corruption" or (objective == "auto" and len(text.sentinel_ids)):
            if len(text.sentinel_ids) < needed:
                raise InputError(
                    f"span corruption needs {needed} sentinels at least, the tokenizer {text.tokenizer.name_or_path} "
                    f"has {len(text.sentinel_ids)}: take one with tokens <extra_id_0>, <extra_id_1>, ... "
                    f"(train-tokenizer --template t5), or --denoising_objective infilling."
                )
            if self.args.shuffle_sentences:
                raise InputError("--shuffle_sentences is for infilling; span corruption leaves the order as it is.")
            return True
        if text.tokenizer.mask_token_id is None:
            raise InputError(
                f"denoising needs a tokenizer with a mask token, for infilling, or with sentinels (<extra_id_0>, ...), "
                f"for span corruption; {text.tokenizer.name_or_path} has neither."
            )
        if self.args.closing_sentinel:
            raise InputError("--closing_sentinel is for span corruption; infilling has no sentinels.")
        return False

    def _most_spans(self, text: TextEncoder) -> int:
        own = len(text.sentinel_ids) - self.args.closing_sentinel
        return own if self.args.max_number_of_spans is None else min(own, self.args.max_number_of_spans)

    def cutting(self, text: TextEncoder) -> TextEncoder:
        """So that what the encoder sees fits into max_sequence_length: in span corruption texts may be longer."""
        if not self.spans(text) or self.args.whole_word_denoising:  # whole words: who knows how many tokens are noise
            return text
        args, n_special = self.args, text.layout.n_special(1)
        length = unspanned_length(text.room(1), args.probability, args.mean_span_length, self._most_spans(text))
        return replace(text, max_length=length + n_special)

    def prepare(self, example: Example, rng: np.random.Generator, text: TextEncoder) -> Example:
        ids, words = example["input_ids"], example["word_ids"]
        make = self._spanned if self.spans(text) else self._infilled
        inputs, target = make(ids, words, rng, text)
        if text.end_id not in target[-2:]:  # where a language follows it, that is the last one
            target = np.append(target, text.end_id)
        return {name: example[name] for name in ("index", "row")} | {"input_ids": inputs, "denoising_labels": target}

    def _infilled(
        self, ids: np.ndarray, words: np.ndarray, rng: np.random.Generator, text: TextEncoder
    ) -> tuple[np.ndarray, np.ndarray]:
        order = np.arange(len(ids))
        if self.args.shuffle_sentences:
            starts = np.append(words[1:] != words[:-1], True)  # a stop within a word, as in 3.14, ends nothing
            order = permuted(np.isin(ids, text.stop_ids) & starts, words == NO_WORD, rng)
        moved, moved_words = ids[order], words[order]
        inputs = infilled(
            moved,
            (moved_words != NO_WORD) & ~np.isin(moved, text.special_ids),
            moved_words,
            rng,
            self.infilling_share,
            self.args.mean_span_length,
            mask_id=text.tokenizer.mask_token_id,
            longest=self.max_length,
            max_spans=self.args.max_number_of_spans,
            whole_words=self.args.whole_word_denoising,
        )
        return inputs, ids

    def _spanned(
        self, ids: np.ndarray, words: np.ndarray, rng: np.random.Generator, text: TextEncoder
    ) -> tuple[np.ndarray, np.ndarray]:
        args = self.args
        before, after = len(text.layout.prefix), len(ids) - len(text.layout.suffix_alone)
        inner = ids[before:after]
        sentinels = text.sentinel_ids[~np.isin(text.sentinel_ids, inner)]  # not those that the text itself has
        most = max(0, min(self._most_spans(text), len(sentinels) - args.closing_sentinel))
        of_words = words[before:after] if args.whole_word_denoising else None
        noise = noise_spans(len(inner), rng, args.probability, args.mean_span_length, most, of_words)
        inputs, target = spanned(inner, noise, sentinels)
        n = int(np.isin(target, sentinels).sum())
        closing = sentinels[n : n + args.closing_sentinel]
        return np.concatenate([ids[:before], inputs, ids[after:]]), np.concatenate([target, closing, [text.end_id]])
