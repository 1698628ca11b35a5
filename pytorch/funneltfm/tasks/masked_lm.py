"""`masked_lm`: find the tokens that were masked, replaced or left (Devlin et al. 2019, section 3.1)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funneltfm.data.columns import texts_of
from funneltfm.data.corruption import masked
from funneltfm.data.features import Batch, Example, Features
from funneltfm.data.text import NO_WORD, TextEncoder, special_ids
from funneltfm.tasks.base import IGNORED, Record, Row, Task
from funneltfm.tasks.heads import replayed, selected


class MaskedLM(Task):
    """Cross entropy on the selected tokens. Only their logits are computed."""

    name = "masked_lm"
    auto = "AutoModelForMaskedLM"
    main_metric = "perplexity"
    lower_is_better = True
    corrupts = True

    # ---- data

    def encode(self, rows: Sequence[Row], text: TextEncoder, where: str) -> list[Example]:
        columns = self.args.input_columns or (self.args.input_column or "text",)
        texts = [texts_of(row, columns, f"{where}, row {i + 1}") for i, row in enumerate(rows)]
        if self.args.packing:
            return _packed(texts, text)
        return [example | {"row": i} for i, example in enumerate(text.encode(texts))]

    def prepare(self, example: Example, rng: np.random.Generator, text: TextEncoder) -> Example:
        args, ids = self.args, example["input_ids"]
        actions = (args.probability_masked, args.probability_replaced, args.probability_unchanged)
        words = example["word_ids"]
        corrupt, chosen = masked(
            ids,
            words != NO_WORD,
            rng,
            args.probability,
            actions,
            mask_id=text.tokenizer.mask_token_id,
            ordinary=self._ordinary(text),
            words=words if args.whole_word_masking else None,
            exact=args.exact_masking,
        )
        return example | {"input_ids": corrupt, "masked_lm_labels": np.where(chosen, ids, IGNORED)}

    def _ordinary(self, text: TextEncoder) -> np.ndarray:
        """Ids that stand for text: what a random token is drawn from."""
        if not hasattr(self, "_ids"):
            self._ids = np.setdiff1d(np.arange(len(text.tokenizer)), special_ids(text.tokenizer))
        return self._ids

    def collate(self, examples: list[Example], tokens: Callable[[str, int], Tensor]) -> Batch:
        return {"masked_lm_labels": tokens("masked_lm_labels", IGNORED)} if "masked_lm_labels" in examples[0] else {}

    # ---- model

    def logits(self, model: nn.Module, hidden: Any, batch: Batch) -> Tensor:
        """(n, V): of the selected tokens, text by text."""
        chosen = batch["masked_lm_labels"] != IGNORED
        few = {name: tensor[:1, :1] for name, tensor in batch["inputs"].items()}
        with replayed(model, selected(hidden, chosen)):
            return model(**few).logits[0]

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The mean over selected tokens; 0 where none is."""
        labels = batch["masked_lm_labels"]
        labels = labels[labels != IGNORED]
        return F.cross_entropy(logits.float(), labels, reduction="sum") / max(1, len(labels))

    # ---- scores

    def train_scores(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        labels = batch["masked_lm_labels"]
        labels = labels[labels != IGNORED]
        if not len(labels):
            return {}
        loss = F.cross_entropy(logits.float(), labels).item()
        accuracy = (logits.argmax(-1) == labels).float().mean().item()
        return {"accuracy": accuracy, "perplexity": float(np.exp(min(loss, 700.0)))}

    def record(self, logits: Tensor, batch: Batch) -> list[Record]:
        labels = batch["masked_lm_labels"]
        chosen = labels != IGNORED
        picked = labels[chosen]
        row = chosen.nonzero()[:, 0]
        zeros = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
        nll = F.cross_entropy(logits.float(), picked, reduction="none").double()
        found = (logits.argmax(-1) == picked).double()
        sums = torch.stack([zeros.index_add(0, row, x) for x in (nll, found, torch.ones_like(nll))], dim=1).cpu()
        return [{"nll": nll, "found": found, "count": count} for nll, found, count in sums.tolist()]

    def score(self, records: list[Record], features: Features, rows: Sequence[Row]) -> dict[str, float]:
        """Sums over the whole split: perplexity is exp of the mean over its selected tokens."""
        nll, found, count = (sum(record[name] for record in records) for name in ("nll", "found", "count"))
        loss = nll / max(count, 1)
        return {"accuracy": found / max(count, 1), "perplexity": float(np.exp(min(loss, 700.0))), "loss": loss}

    def predict(self, records: list[Record], features: Features, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        for record in records:
            yield {"loss": record["nll"] / max(record["count"], 1), "selected": int(record["count"])}


def _packed(texts: Sequence[Sequence[Any]], text: TextEncoder) -> list[Example]:
    """All texts one after another, each followed by the separator, cut into blocks of max_length tokens with the
    special tokens around; what is left at the end is a shorter block.
    """
    layout = text.layout
    ids: list[int] = []
    words: list[int] = []
    starts: list[int] = []  # of each row's first token
    first_word = 0
    for row in texts:
        starts.append(len(ids))
        for part in text.pieces(row):
            ids += part.ids + layout.suffix_alone[:1]
            words += [w if w == NO_WORD else w + first_word for w in part.word_ids]
            words += [NO_WORD] * len(layout.suffix_alone[:1])
            first_word += max(part.word_ids, default=-1) + 1
    room = text.max_length - layout.n_special(1)
    examples = []
    for start in range(0, len(ids), max(1, room)):
        block, block_words = ids[start : start + room], words[start : start + room]
        example: Example = {
            "input_ids": layout.prefix + block + layout.suffix_alone,
            "word_ids": [NO_WORD] * len(layout.prefix) + block_words + [NO_WORD] * len(layout.suffix_alone),
            "row": int(np.searchsorted(starts, start, side="right")) - 1,
        }
        if layout.types is not None:
            example["token_type_ids"] = [layout.types[0]] * len(example["input_ids"])
        examples.append(example)
    return examples
