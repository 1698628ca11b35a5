"""`sentence_order`: do the two segments of a pair stand as in the text, or are they swapped? (Lan et al. 2020, 3.1)"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from funneltfm.data.blocks import sentences, swapped
from funneltfm.data.features import Batch, Example, Features
from funneltfm.data.text import TextEncoder
from funneltfm.errors import InputError
from funneltfm.tasks.base import IGNORED, Record, Row, identity
from funneltfm.tasks.masked_lm import Unlabelled

NAMES = ("in_order", "swapped")


class SentenceOrder(Unlabelled):
    """Cross entropy over NAMES. Half of the pairs are swapped, others in every epoch; what has one segment alone counts
    neither in the loss nor in the scores.
    """

    name = "sentence_order"
    auto = "AutoModelForSequenceClassification"
    main_metric = "accuracy"

    def __init__(self, args: Any):
        super().__init__(args)
        if not args.sentence_pairs:
            raise InputError("sentence_order is about pairs of segments: give --sentence_pairs too.")

    # ---- data

    def learn(self, rows: Iterable[Row]) -> None:
        """Nothing, but there must be a pair."""
        if not any(len(sentences(texts)) > 1 for row in rows for texts in self.texts([row], "training data")):
            raise InputError(
                "no row of the training data has two sentences (lines), so there is no order to learn. A row must be a "
                "document; in .txt and .tokens an empty line ends one."
            )

    def prepare(self, example: Example, rng: np.random.Generator, text: TextEncoder) -> Example:
        label = int(rng.integers(2)) if example["first_length"] else IGNORED
        return (swapped(example, text) if label == 1 else example) | {"sentence_order_labels": label}

    def collate(self, examples: list[Example], tokens: Callable[[str, int], Tensor]) -> Batch:
        if "sentence_order_labels" not in examples[0]:
            return {}
        return {"sentence_order_labels": torch.tensor([example["sentence_order_labels"] for example in examples])}

    # ---- model

    def model_config(self) -> dict[str, Any]:
        names = dict(enumerate(NAMES))
        return {
            "num_labels": len(NAMES),
            "id2label": names,
            "label2id": {name: i for i, name in names.items()},
            "problem_type": "single_label_classification",
        }

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The mean over pairs; 0 where there is none."""
        losses = F.cross_entropy(
            logits.float(), batch["sentence_order_labels"], ignore_index=IGNORED, reduction="sum"
        )  # fmt: skip
        return losses / max(1.0, self.size(batch) or 0.0)

    def size(self, batch: Batch) -> float | None:
        labels = batch.get("sentence_order_labels")
        return None if labels is None else float((labels != IGNORED).sum())

    # ---- scores

    def record(self, logits: Tensor, batch: Batch) -> list[Record]:
        labels = batch["sentence_order_labels"]
        scores = logits.float().softmax(-1)[:, 1].tolist()
        losses = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none").tolist()
        parts = zip(labels.tolist(), scores, losses, strict=True)
        return [{"label": label, "swapped": score, "loss": loss} for label, score, loss in parts]

    def score(self, records: list[Record], features: Features, rows: Sequence[Row]) -> dict[str, float]:
        pairs = [record for record in records if record["label"] != IGNORED]
        if not pairs:
            raise InputError(
                f"none of {len(records)} examples has two segments, so there is no order to tell: documents need two "
                f"sentences (lines) or more, and --max_sequence_length room for them."
            )
        right = [(record["swapped"] > 0.5) == record["label"] for record in pairs]
        return {"accuracy": float(np.mean(right)), "loss": float(np.mean([record["loss"] for record in pairs]))}

    def train_scores(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        records = self.record(logits, batch)
        none = all(record["label"] == IGNORED for record in records)
        return {} if none else {"accuracy": self.score(records, Features.of([]), [])["accuracy"]}

    def predict(self, records: list[Record], features: Features, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        """Of each example what its segments are said to be, the score of swapped, and what they are; null where there
        is one segment alone.
        """
        for record, row in zip(records, features.plain["row"], strict=True):
            said: dict[str, Any] = {"prediction": None, "score": None, "label": None}
            if record["label"] != IGNORED:
                score = record["swapped"]
                said = {"prediction": NAMES[score > 0.5], "score": round(score, 6), "label": NAMES[record["label"]]}
            yield identity(rows, int(row)) | said
