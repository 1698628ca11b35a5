"""Text classification and regression: labels, loss, predictions, metrics. It knows no trainer."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from funneltfm import metrics
from funneltfm.data.readers import DatasetSpec


@dataclass(frozen=True)
class Classification:
    """A dataset's row of the table as something to learn."""

    spec: DatasetSpec

    @property
    def regression(self) -> bool:
        return self.spec.labels is None

    @property
    def num_class(self) -> int:
        """Outputs of the head: classes, or 1 for regression."""
        return 1 if self.spec.labels is None else len(self.spec.labels)

    @property
    def main_metric(self) -> str:
        """The metric that selects the best checkpoint; more is better."""
        return self.spec.metrics[0]

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy, or mean squared error. logits: (B, C); labels: (B,)."""
        if self.regression:
            return F.mse_loss(logits[:, 0].float(), labels.float())
        return F.cross_entropy(logits.float(), labels)

    def predict(self, logits: np.ndarray) -> np.ndarray:
        """(N, C) logits to (N,) class indices or numbers."""
        return logits[:, 0] if self.regression else logits.argmax(axis=-1)

    def score(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """The dataset's metrics, and the mean loss."""
        loss = self.loss(torch.from_numpy(logits), torch.from_numpy(labels)).item()
        return metrics.compute(self.spec.metrics, self.predict(logits), labels) | {"loss": loss}

    def label_name(self, pred: float) -> str:
        """What a prediction is called in a file."""
        return f"{pred:.4f}" if self.spec.labels is None else self.spec.labels[int(pred)]
