"""`seq_class`: a class or a number for every row of texts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import softmax
from torch import Tensor

from funneltfm import metrics
from funneltfm.data.columns import texts_of
from funneltfm.data.features import Batch, Example, Features
from funneltfm.data.text import TextEncoder
from funneltfm.errors import InputError
from funneltfm.tasks.base import Record, Row, Task
from funneltfm.tasks.labels import Labels


class SeqClass(Task):
    """Cross entropy over classes, or mean squared error with --regression."""

    name = "seq_class"
    auto = "AutoModelForSequenceClassification"

    def __init__(self, args: Any):
        super().__init__(args)
        self.label_column = args.label_column or "label"
        self.labels = Labels(args.num_labels)

    @property
    def main_metric(self) -> str:  # type: ignore[override]
        return "pearson" if self.args.regression else "accuracy"

    # ---- data

    def learn(self, rows: Iterable[Row]) -> None:
        if not self.args.regression:
            self.labels.learn((row.get(self.label_column) for row in rows), self.label_column)

    def encode(self, rows: Sequence[Row], text: TextEncoder, where: str) -> list[Example]:
        columns = self.args.input_columns or (self.args.input_column or "text",)
        texts = [texts_of(row, columns, f"{where}, row {i + 1}") for i, row in enumerate(rows)]
        examples = text.encode(texts)
        labelled = [row.get(self.label_column) is not None for row in rows]
        if any(labelled) and not all(labelled):
            missing = labelled.index(False)
            raise InputError(f"{where}, row {missing + 1}: no {self.label_column}, but other rows have one.")
        for i, example in enumerate(examples):
            example["row"] = i
            if labelled[i]:
                example["seq_class_labels"] = self._label(rows[i][self.label_column], f"{where}, row {i + 1}")
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
        return F.cross_entropy(logits.float(), labels, weight=weight, label_smoothing=self.args.label_smoothing)

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
        for i, record in enumerate(records):
            logits = record["logits"]
            if self.args.regression:
                result: dict[str, Any] = {"prediction": float(logits[0])}
            else:
                scores = softmax(logits.astype(np.float64))
                names = map(str, self.labels.names)
                result = {"prediction": self.labels.names[int(logits.argmax())]}
                result["scores"] = dict(zip(names, scores.round(6).tolist(), strict=True))
            if "seq_class_labels" in features.plain:
                result["label"] = rows[i][self.label_column]
            yield result

    # ---- what a trained task knows

    def state(self) -> dict[str, Any]:
        return {"labels": self.labels.names}

    def load_state(self, state: dict[str, Any]) -> None:
        self.labels.load(state["labels"])
