"""`answer_selection`: which candidates answer a query, each scored alone or, with -k, k of them together."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from torch import Tensor, nn

from funneltfm import metrics
from funneltfm.data.columns import texts_of
from funneltfm.data.features import Batch, Example, Features
from funneltfm.data.sources import place
from funneltfm.data.text import TextEncoder
from funneltfm.errors import InputError
from funneltfm.tasks.base import IGNORED, Record, Row, Task, own_id
from funneltfm.tasks.joint import NO_ROW, Candidates, JointModel, encoder_of, first_states
from funneltfm.tasks.labels import Labels, cross_entropy, mean
from funneltfm.tasks.queries import check_answerable, mark_answerable, query_numbers, ranked, right_labels

RANKING = ("mean_average_precision", "mean_reciprocal_rank", "precision_at_1", "hit_rate_at_5", "ndcg")


@dataclass(frozen=True)
class _Scored:
    """An evaluation. M inputs of the encoder that have a decision of their own, N candidates."""

    logits: np.ndarray
    """(M, 2)."""
    labels: np.ndarray | None
    """(M,)."""
    rows: np.ndarray
    """(N,): the row of each candidate."""
    queries: np.ndarray
    """(N,)."""
    scores: np.ndarray
    """(N,): the probability of being right."""
    right: np.ndarray | None
    """(N,)."""


class AnswerSelection(Task):
    """Cross entropy over wrong (0) and right (1); the score of a candidate is the probability of 1.

    With k, rows of one query become examples of k candidates: see `tasks.joint`. Heads with one score a row (IE_1,
    AE_1) learn whether any of its candidates is right, and the row's score is that of all of them.
    """

    name = "answer_selection"
    auto = "AutoModelForSequenceClassification"
    main_metric = "mean_average_precision"

    def __init__(self, args: Any):
        super().__init__(args)
        self.label_column = args.label_column or "label"
        if not args.input_columns:
            raise InputError("answer_selection: name the columns of the query and the candidate: --input_columns Q A.")
        self.labels = Labels()
        self.labels.load(["wrong", "right"])
        self.labels.check_weights(args.label_weights)
        self.one_label = args.k is not None and args.classification_head_type in ("IE_1", "AE_1")
        self._training_rows: Iterable[Row] | None = None
        self._candidates: Candidates | None = None  # of the training data, to draw from

    @property
    def distils(self) -> bool:  # type: ignore[override]
        return self.args.k is None

    # ---- data

    def learn(self, rows: Iterable[Row]) -> None:
        self._training_rows = rows

    def encode(self, rows: Sequence[Row], text: TextEncoder, where: str) -> list[Example]:
        texts = [texts_of(row, self.args.input_columns, place(rows, i, where)) for i, row in enumerate(rows)]
        self._check_texts(rows, texts, where)
        labels = right_labels(rows, self.label_column, where)
        queries = query_numbers(rows, [row[0] for row in texts], self.args.index_column, where)
        if self.args.k is None:
            examples = text.encode(texts)
            for i, example in enumerate(examples):
                example |= {"row": i, "query": int(queries[i])}
                if labels is not None:
                    example["answer_selection_labels"] = int(labels[i])
        else:
            members = self._members(rows, texts, queries, where)
            chosen = Candidates.of(texts, queries, members, labels, self.args.k, self.args.separated, text)
            examples = chosen.examples(text)
            if self.args.grouping == "random" and rows is self._training_rows:
                self._candidates = chosen
        if labels is not None:
            right = [np.max(example["answer_selection_labels"]) == 1 for example in examples]
            mark_answerable(examples, [example["query"] for example in examples], right)
        return examples

    def _check_texts(self, rows: Sequence[Row], texts: Sequence[list[Any]], where: str) -> None:
        for i, row in enumerate(texts):
            if len(row) < 2 or (self.args.k is not None and len(row) > 2):
                many = "two texts with -k, the query and the candidate (a:b joins a context to it)"
                raise InputError(
                    f"{place(rows, i, where)}: answer_selection takes {many if self.args.k else 'two texts or more'}; "
                    f"--input_columns {' '.join(self.args.input_columns)} gives {len(row)}."
                )

    def _members(
        self, rows: Sequence[Row], texts: Sequence[list[Any]], queries: np.ndarray, where: str
    ) -> list[np.ndarray]:
        """The rows of every query that are taken, in the order of the data."""
        k, order = self.args.k, np.argsort(queries, kind="stable")
        members = np.split(order, np.unique(queries[order], return_index=True)[1][1:])
        for query, of_query in enumerate(members):
            first = of_query[0]
            for row in of_query:
                if texts[row][0] != texts[first][0]:
                    raise InputError(
                        f"{where}, rows {first + 1} and {row + 1}: one query by {self.args.index_column}, but with "
                        f"different texts, so they cannot share a row of candidates."
                    )
            if self.args.selection is not None:
                of_query = members[query] = self._selected(rows, of_query, where)
            if len(of_query) % k and not self.args.pad_to_k:
                raise InputError(
                    f"{place(rows, first, where)}: its query has {len(of_query)} candidates, which do not make rows of "
                    f"-k {k}. Give --pad_to_k to fill the last row up with empty ones, or another -k."
                )
        return members

    def _selected(self, rows: Sequence[Row], of_query: np.ndarray, where: str) -> np.ndarray:
        """The k best or worst; of equal ones the first."""
        scores = []
        for row in of_query:
            value: Any = rows[row].get(self.args.scores_column)
            try:
                scores.append(float(value))
            except (TypeError, ValueError):
                scores.append(float("nan"))
            if np.isnan(scores[-1]):
                raise InputError(
                    f"{place(rows, row, where)}: {self.args.scores_column} must be a number; got {value!r}."
                )
        keys = np.array(scores) if self.args.selection == "worst" else -np.array(scores)
        return np.sort(of_query[np.argsort(keys, kind="stable")[: self.args.k]])

    def redraw(self, example: Example, draw: Callable[[int], np.random.Generator], text: TextEncoder) -> Example:
        if self._candidates is None:
            return example
        return self._candidates.redrawn(example, draw(int(example["query"])), text)

    def collate(self, examples: list[Example], tokens: Callable[[str, int], Tensor]) -> Batch:
        batch: Batch = {}
        if self.args.k is not None:
            batch["segment_starts"] = tokens("segment_starts", 0)
            batch["members"] = torch.from_numpy(np.stack([example["members"] for example in examples]))
        if "answer_selection_labels" in examples[0]:
            labels = np.array([example["answer_selection_labels"] for example in examples])
            batch["answer_selection_labels"] = torch.from_numpy(labels.max(axis=1) if self.one_label else labels)
        return batch

    # ---- model

    def model_config(self) -> dict[str, Any]:
        config = self.labels.model_config() | {"problem_type": "single_label_classification"}
        if self.args.k is not None:
            config |= {"classification_head_type": self.args.classification_head_type, "joint_k": self.args.k}
        return config

    def make_model(self, source: Any, config: Any) -> nn.Module:
        if self.args.k is None:
            return super().make_model(source, config)
        return JointModel(encoder_of(None, config)) if source is None else JointModel.from_pretrained(source, config)

    def logits(self, model: nn.Module, hidden: Any, batch: Batch) -> Tensor:
        """(B, 2); with k (B, k, 2), or (B, 2) of heads with one label."""
        if self.args.k is None:
            return super().logits(model, hidden, batch)
        real = batch["members"] != NO_ROW
        real = torch.cat([torch.ones_like(real[:, :1]), real], dim=1)
        head: Any = model.head
        return head(first_states(hidden.last_hidden_state, batch["segment_starts"], self.args.k), real)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The mean over candidates, without those that are missing."""
        labels = batch["answer_selection_labels"].flatten()
        known = labels != IGNORED
        weight = self.labels.weights(self.args.label_weights, logits.device)
        return mean(*cross_entropy(logits.flatten(0, -2)[known], labels[known], weight, self.args.label_smoothing))

    def size(self, batch: Batch) -> float | None:
        labels = batch.get("answer_selection_labels")
        if labels is None or (self.args.label_weights is None and not self.args.pad_to_k):
            return None
        return self.labels.size(labels[labels != IGNORED], self.args.label_weights)

    # ---- scores

    def groups(self, features: Features) -> np.ndarray | None:
        return features.plain["query"]

    def train_scores(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        labels = batch["answer_selection_labels"].flatten()
        known = labels != IGNORED
        pred = logits.flatten(0, -2).argmax(-1)[known].cpu().numpy()
        return metrics.compute(("accuracy", "f1"), pred, labels[known].cpu().numpy())

    def record(self, logits: Tensor, batch: Batch) -> list[Record]:
        return [{"logits": row} for row in logits.float().cpu().numpy()]

    def _scored(self, records: list[Record], features: Features) -> _Scored:
        logits = np.stack([record["logits"] for record in records])
        k = 1 if self.args.k is None else self.args.k
        labels = features.plain.get("answer_selection_labels")
        members = features.plain["row"][:, None]
        if self.args.k is not None:
            members = features.ragged["members"][0].reshape(-1, k)
            if "answer_selection_labels" in features.ragged:
                labels = features.ragged["answer_selection_labels"][0]
        real = members != NO_ROW
        right = None if labels is None else labels.reshape(-1, k)[real]
        if self.one_label:
            of_all = np.broadcast_to(logits[:, None], (len(logits), k, 2))
            own, labels = logits, None if labels is None else labels.reshape(-1, k).max(axis=1)
        else:
            of_all = logits.reshape(-1, k, 2)
            own, labels = of_all[real], right
        scores = softmax(of_all[real].astype(np.float64), axis=-1)[:, 1]
        queries = np.broadcast_to(features.plain["query"][:, None], members.shape)[real]
        return _Scored(own, labels, members[real], queries, scores, right)

    def score(self, records: list[Record], features: Features, rows: Sequence[Row]) -> dict[str, float]:
        check_answerable(features, rows, self.args.metrics_empty_target_action)
        scored = self._scored(records, features)
        assert scored.labels is not None
        assert scored.right is not None
        labels = torch.from_numpy(scored.labels.astype(np.int64))
        loss = self.loss(torch.from_numpy(scored.logits), {"answer_selection_labels": labels}).item()
        decisions = metrics.compute(("accuracy", "f1"), scored.logits.argmax(-1), scored.labels)
        action = self.args.metrics_empty_target_action
        return {"loss": loss} | decisions | ranked(RANKING, scored.scores, scored.right, scored.queries, action)

    def predict(self, records: list[Record], features: Features, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        """A line for every candidate that was scored, in the order of the data: its id, its row (from 1), its query
        (the value of the index column, else a number), its score, and the decision.
        """
        scored = self._scored(records, features)
        for i in np.argsort(scored.rows, kind="stable"):
            row = int(scored.rows[i])
            column = self.args.index_column
            query = int(scored.queries[i]) if column is None else rows[row][column]
            score = float(scored.scores[i])
            result = own_id(rows[row]) | {"row": row + 1, "query": query}
            result |= {"prediction": int(score > 0.5), "score": score}
            if scored.right is not None:
                result["label"] = int(scored.right[i])
            yield result
