"""`seq_class`: a class or a number for every row of texts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import softmax
from torch import Tensor

from funneltfm import metrics
from funneltfm.data.features import Batch, Example, Features
from funneltfm.data.sources import place
from funneltfm.data.text import TextEncoder
from funneltfm.errors import InputError
from funneltfm.tasks.base import Record, Row, Task, own_id
from funneltfm.tasks.labels import Labels, all_or_none, class_names, cross_entropy, labels_of, mean


class SeqClass(Task):
    """Cross entropy over classes, or mean squared error with --regression."""

    name = "seq_class"
    auto = "AutoModelForSequenceClassification"

    def __init__(self, args: Any):
        super().__init__(args)
        self.label_column = args.label_column or "label"
        self.labels = Labels(args.num_labels)
        if args.regression:
            for name, unset in (("num_labels", None), ("label_weights", None), ("label_smoothing", 0.0)):
                if getattr(args, name) != unset:
                    raise InputError(f"--{name} is about classes, and with --regression there are none. Give one.")

    @property
    def main_metric(self) -> str:  # type: ignore[override]
        return "pearson" if self.args.regression else "accuracy"

    @property
    def distils(self) -> bool:  # type: ignore[override]
        return not self.args.regression

    # ---- data

    def learn(self, rows: Iterable[Row]) -> None:
        if not self.args.regression:
            column = self.label_column
            stream = not isinstance(rows, Sequence)
            self.labels.learn(labels_of(rows, column), column, class_names(rows, column), stream)
            self.labels.check_weights(self.args.label_weights)

    def encode(self, rows: Sequence[Row], text: TextEncoder, where: str) -> list[Example]:
        examples: list[Example] = text.encode(self.reader.texts(rows, where))
        labels = list(labels_of(rows, self.label_column))
        labelled = all_or_none(labels, rows, self.label_column, where)
        for i, example in enumerate(examples):
            example["row"] = i
            if labelled:
                example["seq_class_labels"] = self._label(labels[i], place(rows, i, where))
        return examples

    def _label(self, value: Any, where: str) -> float:
        if not self.args.regression:
            return self.labels.index(value, where)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if not np.isfinite(number):
            raise InputError(f"{where}: {self.label_column} must be a number with --regression; got {value!r}.")
        return number

    def collate(self, examples: list[Example], tokens: Callable[[str, int], Tensor]) -> Batch:
        if "seq_class_labels" not in examples[0]:
            return {}
        return {"seq_class_labels": torch.tensor(np.array([example["seq_class_labels"] for example in examples]))}

    # ---- model

    def model_config(self) -> dict[str, Any]:
        if self.args.regression:
            return {"num_labels": 1, "problem_type": "regression"}
        return self.labels.model_config() | {"problem_type": "single_label_classification"}

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        labels = batch["seq_class_labels"]
        if self.args.regression:
            return F.mse_loss(logits[:, 0].float(), labels.float())
        weight = self.labels.weights(self.args.label_weights, logits.device)
        return mean(*cross_entropy(logits, labels, weight, self.args.label_smoothing))

    def size(self, batch: Batch) -> float | None:
        if self.args.label_weights is None or "seq_class_labels" not in batch:
            return None
        return self.labels.size(batch["seq_class_labels"], self.args.label_weights)

    # ---- scores

    def train_scores(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        if self.args.regression:
            return {}
        return {"accuracy": (logits.argmax(-1) == batch["seq_class_labels"]).float().mean().item()}

    def record(self, logits: Tensor, batch: Batch) -> list[Record]:
        return [{"logits": row} for row in logits.float().cpu().numpy()]

    def score(self, records: list[Record], features: Features, rows: Sequence[Row]) -> dict[str, float]:
        logits = np.stack([record["logits"] for record in records])
        labels = features.plain["seq_class_labels"]
        batch = {"seq_class_labels": torch.from_numpy(labels)}
        loss = self.loss(torch.from_numpy(logits), batch).item()
        if self.args.regression:
            return metrics.compute(("pearson", "spearman"), logits[:, 0], labels) | {"loss": loss}
        return metrics.by_class(logits.argmax(-1), labels, len(self.labels)) | {"loss": loss}

    def predict(self, records: list[Record], features: Features, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        names, labels = self.labels.names, features.plain.get("seq_class_labels")
        for i, record in enumerate(records):
            logits = record["logits"]
            result = own_id(rows[int(features.plain["row"][i])])
            if self.args.regression:
                result["prediction"] = float(logits[0])
            else:
                scores = softmax(logits.astype(np.float64)).round(6).tolist()
                result["prediction"] = names[int(logits.argmax())]
                result["scores"] = dict(zip(map(str, names), scores, strict=True))
            if labels is not None:
                result["label"] = float(labels[i]) if self.args.regression else names[int(labels[i])]
            yield result

    # ---- what a trained task knows

    def state(self) -> dict[str, Any]:
        return {"labels": self.labels.names}

    def load_state(self, state: dict[str, Any]) -> None:
        self.labels.load(state["labels"])
