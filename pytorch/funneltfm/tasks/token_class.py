"""`token_class`: a class for every word of a text: parts of speech, entities, chunks."""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funneltfm import metrics
from funneltfm.data.features import Batch, Example, Features
from funneltfm.data.sources import place
from funneltfm.data.text import NO_WORD, Cuts, Text, TextEncoder
from funneltfm.errors import InputError, brief
from funneltfm.tasks.base import IGNORED, Record, Row, Task, own_id
from funneltfm.tasks.labels import Labels, all_or_none, class_names, cross_entropy, labels_of, mean

log = logging.getLogger(__name__)

_MARKS = {"bio": "BI", "iob1": "BI", "bioes": "BIESLU"}  # of each label_scheme, what stands before the types


class TokenClass(Task):
    """Cross entropy on the first piece of each word (Devlin et al. 2019, section 5.3).

    A word without a piece (its tokenizer leaves nothing of it, or it is cut off at max_sequence_length) is not learned
    from, but scored all the same: what is said of it is "O", or, where labels mark no entities, nothing, which is
    wrong.
    """

    name = "token_class"
    auto = "AutoModelForTokenClassification"
    words = True
    distils = True

    def __init__(self, args: Any):
        super().__init__(args)
        if args.input_columns is not None and (len(args.input_columns) > 1 or args.input_column is not None):
            raise InputError("token_class reads one column, a list of words: --input_column NAME.")
        self.column = args.input_column or (args.input_columns or ("words",))[0]
        self.label_column = args.label_column or "labels"
        self.labels = Labels(args.num_labels)
        self.scheme = "none"
        self._told: set[str] = set()  # data of which was said that words are lost; a stream is encoded bit by bit

    @property
    def main_metric(self) -> str:  # type: ignore[override]
        return "accuracy" if self.scheme == "none" else "entity_f1"

    # ---- data

    def learn(self, rows: Iterable[Row]) -> None:
        column = self.label_column
        labels = (labels if isinstance(labels, list) else [labels] for labels in labels_of(rows, column))
        stream = not isinstance(rows, Sequence)
        self.labels.learn(chain.from_iterable(labels), column, class_names(rows, column), stream)
        self.labels.check_weights(self.args.label_weights)
        self.scheme = label_scheme([str(name) for name in self.labels.names], self.args.label_scheme)

    def texts(self, rows: Sequence[Row], where: str) -> list[Sequence[Text]]:
        """One text a row, a list of words."""
        texts: list[Sequence[Text]] = []
        for i, row in enumerate(rows):
            words = row.get(self.column)
            if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
                came = brief(repr(words)) if self.column in row else f"columns {brief(', '.join(row))}"
                raise InputError(
                    f"{place(rows, i, where)}: {self.column} must be a list of words; got {came}. Name the column with "
                    f"--input_column."
                )
            texts.append([words])
        return texts

    def encode(self, rows: Sequence[Row], text: TextEncoder, where: str) -> list[Example]:
        texts = self.texts(rows, where)
        examples: list[Example] = replace(text, cuts=Cuts()).encode(texts)  # what is cut is told below, in words
        labels = list(labels_of(rows, self.label_column))
        labelled = all_or_none(labels, rows, self.label_column, where)
        n_words = lost = 0
        for i, (example, (words,)) in enumerate(zip(examples, texts, strict=True)):
            first = _first_pieces(np.array(example["word_ids"]))
            n_words, lost = n_words + len(words), lost + len(words) - int(first.sum())
            example["row"] = i
            if labelled:
                classes = self._classes(labels[i], len(words), place(rows, i, where))
                example["token_class_words"] = classes
                example["token_class_labels"] = [
                    classes[word] if here else IGNORED for word, here in zip(example["word_ids"], first, strict=True)
                ]
        if lost and where not in self._told:
            self._told.add(where)
            log.warning(
                "%s: %d of %d words are beyond %d tokens (--max_sequence_length), or nothing to the tokenizer. They "
                "count in the scores, as %s.",
                *(where, lost, n_words, text.max_length, self._unseen or "wrong"),
            )
        return examples

    def _classes(self, labels: Any, n: int, where: str) -> list[int]:
        """Numbers of the classes of n words."""
        if not isinstance(labels, list):
            raise InputError(
                f"{where}: {self.label_column} must be a list, a label for each word; got {brief(repr(labels))}."
            )
        if len(labels) != n:
            raise InputError(
                f"{where}: {n} words in {self.column}, but {len(labels)} labels in {self.label_column}; each word must "
                f"have one."
            )
        return [self.labels.index(label, f"{where}, word {i + 1}") for i, label in enumerate(labels)]

    @property
    def _unseen(self) -> str | None:
        """What is said of a word without a piece."""
        return None if self.scheme == "none" or "O" not in self.labels.names else "O"

    def collate(self, examples: list[Example], tokens: Callable[[str, int], Tensor]) -> Batch:
        batch: Batch = {"token_class_word_ids": tokens("word_ids", NO_WORD)}
        if "token_class_labels" in examples[0]:
            batch["token_class_labels"] = tokens("token_class_labels", IGNORED)
        return batch

    # ---- model

    def model_config(self) -> dict[str, Any]:
        return self.labels.model_config()

    def _losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.labels.weights(self.args.label_weights, logits.device)
        return cross_entropy(logits, labels, weight, self.args.label_smoothing)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        labels = batch["token_class_labels"]
        chosen = labels != IGNORED
        return mean(*self._losses(logits[chosen], labels[chosen]))

    def taught(self, logits: Tensor, batch: Batch) -> Tensor:
        return logits[batch["token_class_labels"] != IGNORED]

    def size(self, batch: Batch) -> float | None:
        if (labels := batch.get("token_class_labels")) is None:
            return None
        return self.labels.size(labels[labels != IGNORED], self.args.label_weights)

    # ---- scores

    def train_scores(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        labels = batch["token_class_labels"]
        chosen = labels != IGNORED
        if not chosen.any():
            return {}
        return {"accuracy": (logits.argmax(-1) == labels)[chosen].float().mean().item()}

    def record(self, logits: Tensor, batch: Batch) -> list[Record]:
        """Of each text: the words that the model has seen, what it says of each, and how sure it is."""
        words = batch["token_class_word_ids"].cpu().numpy()
        best = logits.float().softmax(-1).max(-1)
        pred, score = best.indices.cpu().numpy(), best.values.cpu().numpy()
        records: list[Record] = []
        for row, ids in enumerate(words):
            first = _first_pieces(ids)
            records.append({"words": ids[first], "pred": pred[row, first], "score": score[row, first]})
        if (labels := batch.get("token_class_labels")) is not None:
            chosen = labels != IGNORED
            row_of = chosen.nonzero()[:, 0]
            zeros = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
            both = self._losses(logits[chosen], labels[chosen])
            sums = torch.stack([zeros.index_add(0, row_of, part.double()) for part in both], dim=1).tolist()
            for record, (loss, count) in zip(records, sums, strict=True):
                record |= {"loss": loss, "count": count}
        return records

    def score(self, records: list[Record], features: Features, rows: Sequence[Row]) -> dict[str, float]:
        """Scores of all words, and of the entities that they are part of. f1 is the mean over classes."""
        names = [str(name) for name in self.labels.names]
        values, offsets = features.ragged["token_class_words"]
        target = np.split(values, offsets[1:-1])
        unseen = -1 if self._unseen is None else names.index(self._unseen)
        pred = [self._of_words(record, len(words), unseen) for record, words in zip(records, target, strict=True)]
        if not len(values):
            raise InputError("token_class has nothing to score: there is no word in the data.")
        scores = metrics.by_class(np.concatenate(pred), values, len(names))
        if self.scheme != "none":
            said, true = ([[names[i] for i in sentence] for sentence in side] for side in (pred, target))
            types = sorted({name.partition("-")[2] for name in names} - {""})
            scores |= metrics.by_entity(said, true, types)
        loss, count = (sum(record[name] for record in records) for name in ("loss", "count"))
        return scores | {"loss": loss / count if count else 0.0}

    @staticmethod
    def _of_words(record: Record, n: int, unseen: int) -> np.ndarray:
        """(n,): the class of every word."""
        pred = np.full(n, unseen, np.int64)
        pred[record["words"]] = record["pred"]
        return pred

    def predict(self, records: list[Record], features: Features, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        """A list of words with, for each, the prediction, its probability (null for a word that the model has not
        seen), and the label.
        """
        names = self.labels.names
        for i, record in enumerate(records):
            row = rows[int(features.plain["row"][i])]
            words = row[self.column]
            prediction: list[Any] = [self._unseen] * len(words)
            scores: list[float | None] = [None] * len(words)
            for word, pred, score in zip(record["words"], record["pred"], record["score"], strict=True):
                prediction[word], scores[word] = names[pred], round(float(score), 6)
            result = own_id(row) | {"words": words, "prediction": prediction, "scores": scores}
            if "token_class_words" in features.ragged:
                result["label"] = [names[label] for label in features[i]["token_class_words"]]
            yield result

    # ---- what a trained task knows

    def state(self) -> dict[str, Any]:
        return {"labels": self.labels.names, "label_scheme": self.scheme}

    def load_state(self, state: dict[str, Any]) -> None:
        self.labels.load(state["labels"])
        self.scheme = state["label_scheme"]


def _first_pieces(word_ids: np.ndarray) -> np.ndarray:
    """Which tokens begin a word, (T,) bool."""
    return (word_ids != NO_WORD) & (np.diff(word_ids, prepend=NO_WORD) != 0)


def label_scheme(names: Sequence[str], wanted: str = "auto") -> str:
    """How labels mark entities: bio, iob1, bioes, or none (they mark no entities).

    wanted: "auto" looks at them; an InputError where they are not of the scheme that is wanted. iob1 is what has no
    B- (or B- only between neighbours, which cannot be seen here, and makes no difference to what the entities are).

    >>> label_scheme(["O", "B-PER", "I-PER"]), label_scheme(["I-PER", "O"]), label_scheme(["NOUN", "O"])
    ('bio', 'iob1', 'none')
    """
    marked = [name for name in names if name != "O"]

    def odd_in(scheme: str) -> list[str]:
        return [name for name in marked if not re.fullmatch(f"[{_MARKS[scheme]}]-.+", name)]

    if wanted == "auto":
        if not marked or odd_in("bioes"):
            return "none"
        if odd_in("bio"):
            return "bioes"
        return "bio" if any(name.startswith("B") for name in marked) else "iob1"
    if wanted != "none" and (odd := odd_in(wanted)):
        raise InputError(
            f"--label_scheme={wanted} has the labels O, and {', '.join(f'{m}-TYPE' for m in _MARKS[wanted])}; the "
            f"training data has {brief(', '.join(odd))}."
        )
    return wanted
