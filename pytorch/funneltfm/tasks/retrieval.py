"""`retrieval`: two texts are embedded apart by one encoder, and compared."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from funneltfm import metrics
from funneltfm.data.columns import texts_of
from funneltfm.data.features import Batch, Example, Features
from funneltfm.data.sources import place
from funneltfm.data.text import TextEncoder
from funneltfm.errors import InputError
from funneltfm.ranking import best_threshold
from funneltfm.tasks.base import Record, Row, Task, own_id
from funneltfm.tasks.joint import encoder_of
from funneltfm.tasks.queries import check_answerable, mark_answerable, query_numbers, ranked, right_labels

RANKING = (
    *("mean_average_precision", "mean_reciprocal_rank", "precision_at_1", "precision_at_5", "precision_at_100"),
    *("hit_rate_at_5", "hit_rate_at_100"),
)


# ---- losses of pairs. cosine: (B,). labels: (B,), 1 = belong together, 0 = do not


def contrastive_loss(cosine: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Half the squared distance of right pairs, half the squared lack of distance of wrong ones (Hadsell et al. 2006,
    eq. 4); the distance is 1 - cosine.
    """
    distance = 1 - cosine
    return torch.where(labels == 1, distance**2, F.relu(margin - distance) ** 2).mean() / 2


def online_contrastive_loss(cosine: Tensor, labels: Tensor, margin: float) -> Tensor:
    """The squares of `contrastive_loss` for hard pairs alone, over the number of all pairs: wrong ones closer than the
    farthest right one, and right ones farther than the closest wrong one. Where one kind is missing all are hard.
    """
    distance, right = 1 - cosine, labels == 1
    farthest = distance.detach().masked_fill(~right, -torch.inf).max()
    closest = distance.detach().masked_fill(right, torch.inf).min()
    if right.all() or not right.any():
        hard = torch.ones_like(right)
    else:
        hard = torch.where(right, distance > closest, distance < farthest)
    return (torch.where(right, distance**2, F.relu(margin - distance) ** 2) * hard).mean()


def cosine_similarity_loss(cosine: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Mean squared difference between cosine and label. margin: not read."""
    return F.mse_loss(cosine, labels.to(cosine.dtype))


PAIR_LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "contrastive_loss": contrastive_loss,
    "online_contrastive_loss": online_contrastive_loss,
    "cosine_similarity_loss": cosine_similarity_loss,
}


def in_batch_negatives_loss(scores: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    """Cross entropy of finding the second text of every right pair among those of all pairs (Henderson et al. 2017,
    section 4): first texts look for second ones, not the other way round. Another right answer to the same query is no
    wrong answer and is left out; the second texts of wrong pairs are wrong answers.

    scores: (B, B), first texts by second texts, divided by the temperature. labels, queries: (B,). 0 where no pair is
    right.
    """
    right = labels == 1
    also_right = (queries[:, None] == queries) & right & ~torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    logits = scores.masked_fill(also_right, -torch.inf)
    losses = F.cross_entropy(logits, torch.arange(len(scores), device=scores.device), reduction="none")
    return losses.masked_fill(~right, 0).sum() / right.sum().clamp(min=1)


def similarity(a: Tensor, b: Tensor, kind: str) -> Tensor:
    """a: (B, D), b: (C, D). Returns (B, C): cosine_similarity or dot_product_similarity."""
    if kind == "cosine_similarity":
        a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    return a @ b.T


def pooled(hidden: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """Embeddings (texts, D) of states (texts, T, D): the mean over the real tokens, or the first one. attention_mask:
    (texts, T), 1 = real.
    """
    if pooling == "cls":
        if hidden.size(1) != attention_mask.size(1):  # a Funnel without its decoder, whose first state is [CLS]
            return hidden[:, 0]
        first = attention_mask.argmax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), first]
    if hidden.size(1) != attention_mask.size(1):
        raise InputError(
            f"the encoder makes {hidden.size(1)} states of {attention_mask.size(1)} tokens, so there is no mean over "
            f"the tokens. A Funnel needs its decoder (decoder_size), or --pooling cls."
        )
    weights = attention_mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


# ---- the pairs of all processes


def gathered(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    """The rows of all processes one after another, (sum of sizes, ...); gradients flow into the own ones. sizes: rows
    of each process, of which this one has sizes[rank] (or more, that are left out).
    """
    rank = dist.get_rank()
    padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
    padded[: sizes[rank]] = tensor.detach()[: sizes[rank]]
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    rows = [part[:size] for part, size in zip(parts, sizes, strict=True)]
    rows[rank] = tensor[: sizes[rank]]
    return torch.cat(rows)


class Retrieval(Task):
    """A shared encoder; its embeddings of two texts are compared by --scores_fn.

    An example has two parts, its texts. `logits` are the embeddings of both, (B, 2, D).
    """

    name = "retrieval"
    auto = "AutoModel"
    main_metric = "mean_average_precision"

    def __init__(self, args: Any):
        super().__init__(args)
        self.label_column = args.label_column or "label"
        if args.input_columns is None or len(args.input_columns) != 2:
            raise InputError("retrieval: name the columns of the two texts: --input_columns QUERY TEXT.")
        if args.k not in (None, 2):
            raise InputError(f"retrieval compares 2 texts; got -k {args.k}. Leave it out.")
        self.threshold: float | None = None

    # ---- data

    def encode(self, rows: Sequence[Row], text: TextEncoder, where: str) -> list[Example]:
        texts = [texts_of(row, self.args.input_columns, place(rows, i, where)) for i, row in enumerate(rows)]
        for i, pair in enumerate(texts):
            if len(pair) != 2:
                raise InputError(f"{place(rows, i, where)}: retrieval compares two texts; got {len(pair)}.")
        labels = right_labels(rows, self.label_column, where)
        queries = query_numbers(rows, [a for a, _ in texts], self.args.index_column, where)
        lengths = self.args.max_sequence_length
        of_second = replace(text, max_length=lengths[1]) if len(lengths) > 1 else text
        both = text.encode([[a] for a, _ in texts]), of_second.encode([[b] for _, b in texts])
        examples = []
        for i, (a, b) in enumerate(zip(*both, strict=True)):
            example: Example = {name: a[name] + b[name] for name in a}
            example["parts"] = [len(a["input_ids"]), len(b["input_ids"])]
            examples.append(example | {"row": i, "query": int(queries[i])})
            if labels is not None:
                examples[i]["retrieval_labels"] = int(labels[i])
        if labels is not None:
            mark_answerable(examples, queries.tolist(), labels == 1)
        return examples

    def collate(self, examples: list[Example], tokens: Callable[[str, int], Tensor]) -> Batch:
        names = {"query": "queries", "retrieval_labels": "retrieval_labels"}
        return {
            to: torch.tensor([int(example[name]) for example in examples])
            for name, to in names.items()
            if name in examples[0]
        }

    # ---- model

    def make_model(self, source: Any, config: Any) -> nn.Module:
        return encoder_of(source, config)

    def logits(self, model: nn.Module, hidden: Any, batch: Batch) -> Tensor:
        embeddings = pooled(hidden.last_hidden_state, batch["inputs"]["attention_mask"], self.args.pooling)
        return embeddings.view(len(embeddings) // 2, 2, -1)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """With --sync_devices the loss of the pairs of all processes, with gradients such that the mean over the
        processes is its gradient.
        """
        pairs, labels, queries = logits.float(), batch["retrieval_labels"], batch["queries"]
        if not (self.args.sync_devices and dist.is_available() and dist.is_initialized()):
            return self._loss(pairs, labels, queries)
        weights = self._gathered_sizes(len(pairs), batch["weight"], pairs.device)
        sizes = [int(size) for size, _ in weights]
        loss = self._loss(gathered(pairs, sizes), gathered(labels, sizes), gathered(queries, sizes))
        # Training multiplies the loss by this process's weight, and DDP takes the mean over the processes, each of
        # which has the gradient of its own embeddings alone.
        own = weights[dist.get_rank()][1]
        mean = sum(weight for _, weight in weights) / len(weights)
        scale = len(weights) * mean / own if own else 0.0
        return loss.detach() + scale * (loss - loss.detach())

    def _gathered_sizes(self, size: int, weight: float, device: torch.device) -> list[tuple[float, float]]:
        """Pairs and weight of every process's batch; one of weight 0 stands for no pair."""
        own = torch.tensor([size if weight else 0, weight], dtype=torch.float64, device=device)
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        return [(part[0].item(), part[1].item()) for part in parts]

    def _loss(self, pairs: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
        """pairs: (B, 2, D)."""
        a, b = pairs.unbind(dim=1)
        if self.args.loss_fn == "in_batch_negatives_loss":
            scores = similarity(a, b, self.args.scores_fn) / self.args.temperature
            return in_batch_negatives_loss(scores, labels, queries)
        return PAIR_LOSSES[self.args.loss_fn](F.cosine_similarity(a, b, dim=-1), labels, self.args.margin)

    # ---- scores

    def groups(self, features: Features) -> np.ndarray | None:
        return features.plain["query"]

    def record(self, logits: Tensor, batch: Batch) -> list[Record]:
        a, b = logits.double().unbind(dim=1)
        cosine = F.cosine_similarity(a, b, dim=-1)
        score = cosine if self.args.scores_fn == "cosine_similarity" else (a * b).sum(dim=-1)
        both = torch.stack([score, cosine], dim=1).cpu().tolist()
        return [{"score": score, "cosine": cosine} for score, cosine in both]

    def score(self, records: list[Record], features: Features, rows: Sequence[Row]) -> dict[str, float]:
        """Ranking metrics; accuracy and F1 at the threshold of the validation data, before that is known at the best
        one of these data; the loss, where it is one of pairs and not of batches.
        """
        action = self.args.metrics_empty_target_action
        check_answerable(features, rows, action)
        scores = np.array([record["score"] for record in records])
        labels = features.plain["retrieval_labels"]
        result = {}
        if self.args.loss_fn in PAIR_LOSSES:
            cosine = torch.tensor([record["cosine"] for record in records], dtype=torch.float64)
            loss = PAIR_LOSSES[self.args.loss_fn](cosine, torch.from_numpy(labels), self.args.margin)
            result["loss"] = loss.item()
        threshold = best_threshold(scores, labels) if self.threshold is None else self.threshold
        result |= metrics.compute(("accuracy", "f1"), (scores >= threshold).astype(int), labels)
        return result | {"threshold": threshold} | ranked(RANKING, scores, labels, features.plain["query"], action)

    def tune(self, records: list[Record], features: Features, rows: Sequence[Row]) -> None:
        if "retrieval_labels" in features.plain:
            scores = np.array([record["score"] for record in records])
            self.threshold = best_threshold(scores, features.plain["retrieval_labels"])

    def predict(self, records: list[Record], features: Features, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        """A line a row: its query (the value of the index column, else a number), the similarity, and where a threshold
        is known whether it reaches that.
        """
        for i, record in enumerate(records):
            row, column = int(features.plain["row"][i]), self.args.index_column
            query = int(features.plain["query"][i]) if column is None else rows[row][column]
            result = own_id(rows[row]) | {"row": row + 1, "query": query, "score": record["score"]}
            if self.threshold is not None:
                result["prediction"] = int(record["score"] >= self.threshold)
            if "retrieval_labels" in features.plain:
                result["label"] = int(features.plain["retrieval_labels"][i])
            yield result

    def state(self) -> dict[str, Any]:
        return {"threshold": self.threshold}

    def load_state(self, state: dict[str, Any]) -> None:
        self.threshold = state["threshold"]
