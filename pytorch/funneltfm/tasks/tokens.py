"""Tasks that predict tokens: cross entropy over those that have a label, accuracy and perplexity over a whole split."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from funneltfm.data.features import Batch, Features
from funneltfm.errors import InputError
from funneltfm.tasks.base import IGNORED, Record, Row, Task, identity


class PredictsTokens(Task):
    """batch["NAME_labels"] (texts, T) are the right tokens, IGNORED where none is to be predicted; `logits` (n, V) are
    those of the n others, text by text.
    """

    main_metric = "perplexity"

    def labels(self, batch: Batch) -> Tensor | None:
        return batch.get(f"{self.name}_labels")

    def _picked(self, batch: Batch) -> Tensor:
        """The right tokens, (n,)."""
        labels = batch[f"{self.name}_labels"]
        return labels[labels != IGNORED]

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The mean over tokens with a label; 0 where there is none."""
        labels = self._picked(batch)
        return F.cross_entropy(logits.float(), labels, reduction="sum") / max(1, len(labels))

    def size(self, batch: Batch) -> float | None:
        labels = self.labels(batch)
        return None if labels is None else float((labels != IGNORED).sum())

    # ---- scores

    def train_scores(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        labels = self._picked(batch)
        if not len(labels):
            return {}
        loss = F.cross_entropy(logits.float(), labels).item()
        accuracy = (logits.argmax(-1) == labels).float().mean().item()
        return {"accuracy": accuracy, "perplexity": float(np.exp(min(loss, 700.0)))}

    def record(self, logits: Tensor, batch: Batch) -> list[Record]:
        labels = batch[f"{self.name}_labels"]
        chosen = labels != IGNORED
        picked = labels[chosen]
        row = chosen.nonzero()[:, 0]
        zeros = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
        nll = F.cross_entropy(logits.float(), picked, reduction="none").double()
        found = (logits.argmax(-1) == picked).double()
        sums = torch.stack([zeros.index_add(0, row, x) for x in (nll, found, torch.ones_like(nll))], dim=1).cpu()
        return [{"nll": nll, "found": found, "count": count} for nll, found, count in sums.tolist()]

    def score(self, records: list[Record], features: Features, rows: Sequence[Row]) -> dict[str, float]:
        """Sums over the whole split: perplexity is exp of the mean over its tokens with a label."""
        nll, found, count = (sum(record[name] for record in records) for name in ("nll", "found", "count"))
        if count == 0:
            raise InputError(
                f"{self.name} has nothing to score: no token of {len(records)} examples was selected. Their texts are "
                f"empty, or so few and short that --exact_masking is needed."
            )
        return {"accuracy": found / count, "perplexity": float(np.exp(min(nll / count, 700.0))), "loss": nll / count}

    def predict(self, records: list[Record], features: Features, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        """The mean loss of each row's (block's) tokens with a label, null where there is none."""
        for record, row in zip(records, features.plain["row"], strict=True):
            loss = record["nll"] / record["count"] if record["count"] else None
            yield identity(rows, int(row)) | {"loss": loss, "selected": int(record["count"])}
