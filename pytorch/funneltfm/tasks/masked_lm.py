"""`masked_lm`: find the tokens that were masked, replaced or left (Devlin et al. 2019, section 3.1)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funneltfm.data.corruption import masked
from funneltfm.data.features import Batch, Example, Features
from funneltfm.data.text import NO_WORD, Text, TextEncoder
from funneltfm.errors import InputError
from funneltfm.tasks.base import IGNORED, Record, Row, Task, own_id
from funneltfm.tasks.heads import replayed, selected


class Corrupting(Task):
    """An objective that selects tokens of its texts and corrupts them."""

    corrupts = True

    def __init__(self, args: Any):
        super().__init__(args)
        if args.probability == 0:
            raise InputError("--probability is 0: no token would be selected, so there is nothing to learn.")

    def encode(self, rows: Sequence[Row], text: TextEncoder, where: str) -> list[Example]:
        texts = self.reader.texts(rows, where)
        if self.args.packing:
            return _packed(texts, text)
        return [example | {"row": i} for i, example in enumerate(text.encode(texts))]

    @staticmethod
    def selectable(example: Example, text: TextEncoder) -> np.ndarray:
        """(T,) bool: False for special tokens, also where a text spells one."""
        return (example["word_ids"] != NO_WORD) & ~np.isin(example["input_ids"], text.special_ids)


class MaskedLM(Corrupting):
    """Cross entropy on the selected tokens. Only their logits are computed."""

    name = "masked_lm"
    auto = "AutoModelForMaskedLM"
    main_metric = "perplexity"
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

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The mean over selected tokens; 0 where none is."""
        labels = batch["masked_lm_labels"]
        labels = labels[labels != IGNORED]
        return F.cross_entropy(logits.float(), labels, reduction="sum") / max(1, len(labels))

    def size(self, batch: Batch) -> float | None:
        labels = batch.get("masked_lm_labels")
        return None if labels is None else float((labels != IGNORED).sum())

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
        if count == 0:
            raise InputError(
                f"masked_lm has nothing to score: no token of {len(records)} examples was selected. Their texts are "
                f"empty, or so few and short that --exact_masking is needed."
            )
        return {"accuracy": found / count, "perplexity": float(np.exp(min(nll / count, 700.0))), "loss": nll / count}

    def predict(self, records: list[Record], features: Features, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        """The mean loss of each row's (block's) selected tokens, null where none was."""
        for record, row in zip(records, features.plain["row"], strict=True):
            loss = record["nll"] / record["count"] if record["count"] else None
            yield own_id(rows[int(row)]) | {"loss": loss, "selected": int(record["count"])}


def _packed(rows: Sequence[Sequence[Text]], text: TextEncoder) -> list[Example]:
    """All texts one after another, each followed by the separator, cut into blocks of max_length tokens with the
    special tokens around; what is left at the end is a shorter block. A block's row is that of its first token.
    """
    layout = text.layout
    separator = layout.suffix_alone[:1]
    room = text.room(1)
    ids: list[int] = []
    words: list[int] = []
    starts: list[int] = []  # of each row's first token
    first_word = 0
    pieces = text.pieces([part for row in rows for part in row])
    for row in rows:
        starts.append(len(ids))
        for part in (next(pieces) for _ in row):
            ids += part.ids + separator
            words += [w if w == NO_WORD else w + first_word for w in part.word_ids] + [NO_WORD] * len(separator)
            first_word += max(part.word_ids, default=-1) + 1
    blocks = range(0, len(ids), room)
    row_of = np.searchsorted(np.array(starts), np.array(blocks), side="right") - 1
    return [
        text.example([ids[i : i + room]], [words[i : i + room]]) | {"row": row}
        for i, row in zip(blocks, row_of.tolist(), strict=True)
    ]
