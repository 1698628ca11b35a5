"""`random_token_detection` and `cluster_random_token_detection`: which tokens were replaced?

A detector's label is 1 where the token that it sees is not the one that was there. Special tokens and padding are never
replaced, so they have none, and count neither in the loss nor in the scores (ELECTRA leaves out padding alone).
"""

import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from funneltfm.data.corruption import replaced, select
from funneltfm.data.features import Batch, Example, Features
from funneltfm.data.text import TextEncoder
from funneltfm.errors import InputError, brief
from funneltfm.tasks.base import IGNORED, Record, Row, identity, load_model
from funneltfm.tasks.masked_lm import Corrupting
from funneltfm.tasks.sampling import sample

CLUSTERS = "clusters.npz"  # beside a model: the cluster of each token, and the counts


def detector(source: Any, config: Any) -> nn.Module:
    """A model with one logit a token, (B, T) or (B, T, 1): from a checkpoint, or where source is None from scratch.

    It is that of AutoModelForPreTraining where this is a detector (electra, funnel_tfm, funnel), elsewhere that of
    AutoModelForTokenClassification with one label; both load again with their Auto class.
    """
    import transformers

    mapping: Any = transformers.AutoModelForPreTraining._model_mapping
    # What ties its output to the embeddings is a language model: nothing has to be made to see that.
    if type(config) in mapping and not mapping[type(config)]._tied_weights_keys:
        model = load_model("AutoModelForPreTraining", source, config)
        if _detects(model):
            return model
    config.id2label, config.label2id = {0: "replaced"}, {"replaced": 0}
    return load_model("AutoModelForTokenClassification", source, config)


def _detects(model: nn.Module) -> bool:
    """Whether it says one number for each of three tokens."""
    was_training = model.training
    ids = torch.zeros(1, 3, dtype=torch.long)
    try:
        with torch.no_grad():
            return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.shape == ids.shape
    except (AttributeError, TypeError, ValueError):  # it takes other inputs, or says other things
        return False
    finally:
        model.train(was_training)


def detection_labels(batch: Batch) -> Tensor:
    """(texts, T): 1 where the token is not the original one, 0 where it is, IGNORED where none is to be found."""
    original = batch["detection_originals"]
    return (batch["inputs"]["input_ids"] != original).long().masked_fill(original == IGNORED, IGNORED)


def detection_scores(records: Sequence[Record]) -> dict[str, float]:
    """accuracy, and precision, recall and f1 of the replaced tokens, over all tokens of the records; 0 where there is
    nothing to divide by. records: with the sums "count" (tokens), "replaced", "found" and "false_alarms".
    """
    count, true, found, false = (
        sum(record[name] for record in records) for name in ("count", "replaced", "found", "false_alarms")
    )
    if count == 0:
        raise InputError(f"there is nothing to detect: {len(records)} examples have no token but special ones.")
    return {
        "accuracy": (count - false - (true - found)) / count,
        "f1": 2 * found / (true + found + false) if true + found + false else 0.0,
        "precision": found / (found + false) if found + false else 0.0,
        "recall": found / true if true else 0.0,
    }


class Detection(Corrupting):
    """Binary cross entropy over all tokens that have a label: all that are not special.

    `prepare` gives "detection_originals": the original tokens, IGNORED where there is no label.
    """

    auto = "AutoModelForTokenClassification"
    main_metric = "f1"

    def originals(self, example: Example, text: TextEncoder) -> Example:
        return {"detection_originals": np.where(self.selectable(example, text), example["input_ids"], IGNORED)}

    def choose(self, example: Example, rng: np.random.Generator, text: TextEncoder) -> np.ndarray:
        """(T,) bool: the tokens to replace."""
        args, words = self.args, example["word_ids"] if self.args.whole_word_detection else None
        return select(self.selectable(example, text), rng, args.probability, words, args.exact_masking)

    def collate(self, examples: list[Example], tokens: Callable[[str, int], Tensor]) -> Batch:
        if "detection_originals" not in examples[0]:  # the evaluation of a mixture, on clean input
            return {}
        return {"detection_originals": tokens("detection_originals", IGNORED)}

    # ---- model

    def make_model(self, source: Any, config: Any) -> nn.Module:
        return detector(source, config)

    def logits(self, model: nn.Module, hidden: Any, batch: Batch) -> Tensor:
        """(texts, T); more than 0 says replaced."""
        logits = super().logits(model, hidden, batch)
        return logits if logits.dim() == 2 else logits[..., 0]

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The mean over tokens with a label; 0 where there is none."""
        labels = detection_labels(batch)
        counted = labels != IGNORED
        losses = F.binary_cross_entropy_with_logits(logits[counted].float(), labels[counted].float(), reduction="sum")
        return losses / max(1, int(counted.sum()))

    def size(self, batch: Batch) -> float | None:
        originals = batch.get("detection_originals")
        return None if originals is None else float((originals != IGNORED).sum())

    # ---- scores

    def train_scores(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        records = self.record(logits, batch)
        return detection_scores(records) if any(record["count"] for record in records) else {}

    def record(self, logits: Tensor, batch: Batch) -> list[Record]:
        labels, said = detection_labels(batch), logits > 0
        counted, true = labels != IGNORED, labels == 1
        parts = {
            "loss": F.binary_cross_entropy_with_logits(logits.float(), true.float(), reduction="none"),
            "count": counted,
            "replaced": true,
            "found": true & said,
            "false_alarms": ~true & said,
        }
        sums = torch.stack([part.double().masked_fill(~counted, 0).sum(1) for part in parts.values()], dim=1)
        return [dict(zip(parts, row, strict=True)) for row in sums.tolist()]

    def score(self, records: list[Record], features: Features, rows: Sequence[Row]) -> dict[str, float]:
        scores = detection_scores(records)
        return scores | {"loss": sum(r["loss"] for r in records) / sum(r["count"] for r in records)}

    def predict(self, records: list[Record], features: Features, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        """Of each row (block): how many tokens were replaced, how many of them were found, how many others were taken
        for replaced, and the mean loss, null where there is no token.
        """
        for record, row in zip(records, features.plain["row"], strict=True):
            loss = record["loss"] / record["count"] if record["count"] else None
            counts = {name: int(record[name]) for name in ("count", "replaced", "found", "false_alarms")}
            yield identity(rows, int(row)) | {"loss": loss} | counts


class RandomTokenDetection(Detection):
    """Replacements are drawn uniformly from all other tokens that are not special."""

    name = "random_token_detection"

    def prepare(self, example: Example, rng: np.random.Generator, text: TextEncoder) -> Example:
        chosen = self.choose(example, rng, text)
        corrupt = replaced(example["input_ids"], chosen, rng, text.ordinary_ids)
        return example | self.originals(example, text) | {"input_ids": corrupt}


# ---- by cluster


class Clusters(nn.Module):
    """How often a detector took a token of one cluster, replaced by one of another, for what it is not: a wrong answer
    counts 1, a right one -1. What it fails on is drawn more often.

    cluster: (V,) int64, of each token; ordinary: ids that may be drawn. counts: (C, C) int64, by the clusters of the
    original and of what was seen; it starts at 1, and is a part of checkpoints.
    """

    counts: Tensor
    cluster: Tensor
    members: Tensor
    start: Tensor
    sizes: Tensor
    place: Tensor

    def __init__(self, cluster: Tensor, ordinary: Tensor, beta: float):
        super().__init__()
        n, of = int(cluster.max()) + 1, cluster[ordinary]
        sizes = torch.bincount(of, minlength=n)
        start = sizes.cumsum(0) - sizes
        members = ordinary[of.argsort(stable=True)]
        place = torch.full_like(cluster, len(cluster))  # of what is not a member: beyond all that can be drawn
        place[members] = torch.arange(len(members)) - start[cluster[members]]
        self.beta = beta
        self.register_buffer("counts", torch.ones(n, n, dtype=torch.long))
        parts = {"cluster": cluster, "members": members, "start": start, "sizes": sizes, "place": place}
        for name, tensor in parts.items():
            self.register_buffer(name, tensor, persistent=False)

    def logits(self, ids: Tensor) -> Tensor:
        """ids: (n,). (n, C): softmax gives the probabilities of the clusters that replacements come from. Clusters with
        nothing to draw, the token itself left out, are at -inf.
        """
        own = self.cluster[ids]
        counts = self.counts[own].double()
        low, high = counts.aminmax(dim=1, keepdim=True)
        scaled = (counts - low) / (high - low).clamp(min=1)  # whole numbers: 0 where all are equal
        return (self.beta * scaled).float().masked_fill(self._choices(ids) == 0, -torch.inf)

    def _choices(self, ids: Tensor) -> Tensor:
        """(n, C): members of each cluster but for the token itself, if it is one."""
        own = self.cluster[ids][:, None] == torch.arange(len(self.sizes), device=ids.device)
        return self.sizes - (own & (self.place[ids] < len(self.cluster))[:, None]).long()

    def draw(self, ids: Tensor, counts: Sequence[int], seeds: Sequence[int], draws: Tensor) -> Tensor:
        """Replacements (n,) of ids (n,): a cluster as `sample` draws it, then a token of it other than the one that was
        there, uniformly, by draws (n,), int64 in [0, 2^31).
        """
        chosen = sample(self.logits(ids), counts, seeds)
        n = self._choices(ids).gather(1, chosen[:, None])[:, 0]
        index = (draws * n) >> 31
        index += (chosen == self.cluster[ids]) & (index >= self.place[ids])
        return self.members[self.start[chosen] + index]

    def count(self, original: Tensor, seen: Tensor, wrong: Tensor) -> None:
        """original, seen: (n,) ids; wrong: (n,) bool. Sums what all processes have; each must call."""
        change = torch.zeros_like(self.counts)
        change.index_put_((self.cluster[original], self.cluster[seen]), torch.where(wrong, 1, -1), accumulate=True)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(change)
        self.counts += change


class ClusterRandomTokenDetection(Detection):
    """Replacements are drawn from clusters of tokens, more often from those with which the model fails: in the
    training step, by the counts as they are.
    """

    name = "cluster_random_token_detection"

    def prepare(self, example: Example, rng: np.random.Generator, text: TextEncoder) -> Example:
        chosen = self.choose(example, rng, text)
        draws = rng.integers(2**31, size=len(chosen))
        return example | self.originals(example, text) | {
            "detection_draws": np.where(chosen, draws, IGNORED),
            "detection_seed": int(rng.integers(2**63)),
        }  # fmt: skip

    def collate(self, examples: list[Example], tokens: Callable[[str, int], Tensor]) -> Batch:
        batch = super().collate(examples, tokens)
        if not batch:
            return {}
        return batch | {
            "detection_draws": tokens("detection_draws", IGNORED),
            "detection_counts": [int((example["detection_draws"] != IGNORED).sum()) for example in examples],
            "detection_seeds": [example["detection_seed"] for example in examples],
        }

    def make_beside(self, model: nn.Module, source: Any, tokenizer: Any) -> Clusters:
        path, saved = self.args.clusters_filename, Path(source or "") / CLUSTERS
        state = _read_state(saved) if source is not None and saved.is_file() else None
        if path is None and state is None:
            raise InputError(
                "--clusters_filename is missing: a file with the cluster of each token, a line a token "
                "(`funneltfm cluster-tokens` makes one)."
            )
        cluster = state["cluster"] if path is None and state is not None else read_clusters(Path(path))
        if state is not None and not np.array_equal(cluster, state["cluster"]):
            raise InputError(
                f"--clusters_filename={path} has other clusters than the model was trained with, which {saved} holds. "
                f"Leave the flag out, or remove that file to count anew."
            )
        if len(cluster) < len(tokenizer):
            raise InputError(
                f"there are {len(cluster)} clusters' numbers for {len(tokenizer)} tokens; --clusters_filename must "
                f"have a line for each."
            )
        ordinary = TextEncoder(tokenizer).ordinary_ids
        clusters = Clusters(torch.from_numpy(cluster), torch.from_numpy(ordinary), self.args.beta)
        if state is not None:
            clusters.counts.copy_(torch.from_numpy(state["counts"]))
        return clusters

    def save(self, model: nn.Module, beside: nn.Module | None, folder: Path) -> None:
        super().save(model, beside, folder)
        assert isinstance(beside, Clusters)
        np.savez_compressed(
            folder / CLUSTERS, cluster=beside.cluster.cpu().numpy(), counts=beside.counts.cpu().numpy()
        )  # fmt: skip

    def corrupt(self, beside: nn.Module | None, batch: Batch) -> Batch:
        assert isinstance(beside, Clusters)
        draws, ids = batch["detection_draws"], batch["inputs"]["input_ids"].clone()
        chosen = draws != IGNORED
        ids[chosen] = beside.draw(ids[chosen], batch["detection_counts"], batch["detection_seeds"], draws[chosen])
        return batch | {"inputs": batch["inputs"] | {"input_ids": ids}}

    def update(self, beside: nn.Module | None, logits: Tensor, batch: Batch) -> None:
        assert isinstance(beside, Clusters)
        labels = detection_labels(batch)
        counted = (labels == 1) if self.args.update_only_on_predictions else (labels != IGNORED)
        counted &= batch["weight"] > 0
        wrong = (logits > 0)[counted] != (labels == 1)[counted]
        beside.count(batch["detection_originals"][counted], batch["inputs"]["input_ids"][counted], wrong)


def read_clusters(path: Path) -> np.ndarray:
    """(lines,) int64: the cluster of each token; line i + 1 is of the token with the id i."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--clusters_filename={path} cannot be read: {error}") from error
    clusters = np.zeros(len(lines), np.int64)
    for i, line in enumerate(lines):
        if not line.strip().isdecimal() or int(line) > len(lines):
            raise InputError(
                f"{path}, line {i + 1}: a cluster is a whole number from 0, and there are no more than tokens "
                f"({len(lines)}); got {brief(repr(line))}."
            )
        clusters[i] = int(line)
    if not len(clusters):
        raise InputError(f"{path} is empty; it must have a line for each token, with the number of its cluster.")
    return clusters


def _read_state(path: Path) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as handle, np.load(handle) as file:
            return {name: file[name] for name in ("cluster", "counts")}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is damaged, or not written by this program: {error}") from error
