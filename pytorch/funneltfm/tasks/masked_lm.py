"""`masked_lm`: find the tokens that were masked, replaced or left (Devlin et al. 2019, section 3.1)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from funneltfm.data.blocks import packed, paired, sentences, tokenized
from funneltfm.data.corruption import masked
from funneltfm.data.features import Batch, Example
from funneltfm.data.text import NO_WORD, Text, TextEncoder
from funneltfm.errors import InputError
from funneltfm.tasks.base import IGNORED, Row, Task
from funneltfm.tasks.heads import replayed, selected
from funneltfm.tasks.tokens import PredictsTokens


class Unlabelled(Task):
    """An objective that makes its own labels, of rows with texts alone or of blocks of them."""

    unlabelled = True

    def encode(self, rows: Sequence[Row], text: TextEncoder, where: str) -> list[Example]:
        return list(self.examples(self.reader.texts(rows, where), self.cutting(text)))

    def cutting(self, text: TextEncoder) -> TextEncoder:
        """What cuts texts to length for `examples`."""
        return text

    def examples(self, rows: Iterable[Sequence[Text]], text: TextEncoder) -> Iterator[Example]:
        """The examples of rows of texts, one after another: one a row, or with --packing or --sentence_pairs blocks of
        what the row, a document, holds.
        """
        args, workers = self.args, self.args.prepare_data_workers
        if args.packing:
            return packed(tokenized(map(sentences, rows), text, workers), text, args.across_documents)
        if args.sentence_pairs:
            return paired(tokenized(map(sentences, rows), text, workers), text, args.short_pairs)
        return (text.join(pieces) | {"row": i} for i, pieces in enumerate(tokenized(rows, text, workers)))


class Corrupting(Unlabelled):
    """An objective that selects tokens of its texts and corrupts them."""

    corrupts = True

    def __init__(self, args: Any):
        super().__init__(args)
        if args.probability == 0:
            raise InputError("--probability is 0: no token would be selected, so there is nothing to learn.")

    @staticmethod
    def selectable(example: Example, text: TextEncoder) -> np.ndarray:
        """(T,) bool: False for special tokens, also where a text spells one."""
        return (example["word_ids"] != NO_WORD) & ~np.isin(example["input_ids"], text.special_ids)


class MaskedLM(PredictsTokens, Corrupting):
    """Cross entropy on the selected tokens. Only their logits are computed."""

    name = "masked_lm"
    auto = "AutoModelForMaskedLM"
    masks = True
    distils = True

    # ---- data

    def prepare(self, example: Example, rng: np.random.Generator, text: TextEncoder) -> Example:
        args, ids, words = self.args, example["input_ids"], example["word_ids"]
        corrupt, chosen = masked(
            ids,
            self.selectable(example, text),
            rng,
            args.probability,
            (args.probability_masked, args.probability_replaced, args.probability_unchanged),
            mask_id=text.tokenizer.mask_token_id,
            ordinary=text.ordinary_ids,
            words=words if args.whole_word_masking else None,
            exact=args.exact_masking,
        )
        return example | {"input_ids": corrupt, "masked_lm_labels": np.where(chosen, ids, IGNORED)}

    def collate(self, examples: list[Example], tokens: Callable[[str, int], Tensor]) -> Batch:
        return {"masked_lm_labels": tokens("masked_lm_labels", IGNORED)} if "masked_lm_labels" in examples[0] else {}

    # ---- model

    def logits(self, model: nn.Module, hidden: Any, batch: Batch) -> Tensor:
        """(n, V): of the selected tokens, text by text."""
        chosen = batch["masked_lm_labels"] != IGNORED
        few = {name: tensor[:1, :1] for name, tensor in batch["inputs"].items()}
        with replayed(model, selected(hidden, chosen)):
            return model(**few).logits[0]
