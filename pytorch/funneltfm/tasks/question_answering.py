"""`question_answering`: where in a text the answer is (Devlin et al. 2019, sections 4.2 and 4.3)."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funneltfm import squad
from funneltfm.data.features import Batch, Example, Features
from funneltfm.data.questions import Question, QuestionColumns, entries_of, question_of
from funneltfm.data.sources import place
from funneltfm.data.text import Layout, Pieces, TextEncoder
from funneltfm.data.windows import most_context, split_windows, token_spans
from funneltfm.errors import InputError, brief
from funneltfm.tasks.base import Record, Row, Task
from funneltfm.tasks.heads import replayed

log = logging.getLogger(__name__)

NO_ANSWER = -1  # the label of a window without the answer
_PADDING = -2  # where word_ids have a number from 0, or -1


@dataclass(frozen=True)
class Found:
    """What the model says to a question. Scores are sums of a start's and an end's logit."""

    question: Question
    text: str
    """The best answer; "" where no window has a pair of a start and an end that could be one."""
    score: float
    """Of that answer; -inf where there is none."""
    null_score: float
    """Of no answer, in the window where that is lowest."""

    def said(self, threshold: float | None) -> str:
        """The answer, or "" where no answer scores more than `threshold` higher; None: always the answer."""
        refused = threshold is not None and self.null_score - self.score > threshold
        return "" if refused else self.text


class QuestionAnswering(Task):
    """Cross entropy of the answer's first and last token.

    A question with a text that is too long becomes several examples, one for each window of the text; a window
    without a whole answer has the label "no answer", which is the place of [CLS]. Of several right answers (or
    places), the first that a window holds is its label. Exact match and F1 are between 0 and 1, and those of
    questions all of whose windows were evaluated: the sanity validation may leave some out, and where it leaves no
    question whole there is no exact match and no F1. The accuracies of start and end, and the loss, are over windows.
    """

    name = "question_answering"
    auto = "AutoModelForQuestionAnswering"
    main_metric = "f1"
    distils = True

    def __init__(self, args: Any):
        super().__init__(args)
        self.columns = QuestionColumns(args.query_column, args.context_column, args.answers_column, args.label_column)
        self.threshold: float | None = args.null_threshold

    # ---- data

    def encode(self, rows: Sequence[Row], text: TextEncoder, where: str) -> list[Example]:
        """Examples with "question" (its number in its row), "window" and "windows" (the window's number, and how many
        the question has), "context_at" (where in the example the context begins), "starts" and "ends" (the
        characters of its tokens), "most_from" and "most_to" (the tokens that have more context here than in other
        windows, places in the example), "null_at" (the place of [CLS]) and, where answers are known,
        "question_answering_start" and "question_answering_end" (places, the end inclusive, or NO_ANSWER).
        """
        bad = _Bad(self.args.bad_rows, where)
        asked = self._asked(rows, where, bad)
        known = [question.answers is not None for _, _, question in asked]
        if any(known) and not all(known):
            missing = asked[known.index(False)]
            raise InputError(
                f"{place(rows, missing[0], where)}, question {missing[2].id}: no answers, but other questions have "
                f"some."
            )
        contexts = dict.fromkeys(question.context for _, _, question in asked)  # in order
        read = zip(contexts, text.pieces(list(contexts)), strict=True)
        pieces = {context: (part, *_offsets(part)) for context, part in read}
        queries = text.pieces([question.text for _, _, question in asked])
        examples: list[Example] = []
        for (row, number, question), query in zip(asked, queries, strict=True):
            at = f"{place(rows, row, where)}, question {question.id}"
            windows = self._windows(question, query, *pieces[question.context], text, at, bad)
            examples += [window | {"row": row, "question": number} for window in windows]
        bad.tell()
        return examples

    def _asked(self, rows: Sequence[Row], where: str, bad: "_Bad") -> list[tuple[int, int, Question]]:
        """All questions, each with its row's index and its number in the row."""
        asked = []
        for row in range(len(rows)):
            at = place(rows, row, where)
            try:
                entries = entries_of(rows[row], self.columns, at)
            except InputError as error:
                bad(error)
                continue
            for number, entry in enumerate(entries):
                try:
                    asked.append((row, number, question_of(entry, at, _number(row, number, entries))))
                except InputError as error:
                    bad(error)
        return asked

    def _windows(
        self,
        question: Question,
        query: Pieces,
        context: Pieces,
        starts: np.ndarray,
        ends: np.ndarray,
        text: TextEncoder,
        where: str,
        bad: "_Bad",
    ) -> Iterator[Example]:
        query = query[: self.args.max_query_length]
        room = text.max_length - text.layout.n_special(2) - len(query.ids)
        windows = split_windows(len(context.ids), room, self.args.doc_stride, where)
        spans = token_spans(question.spans, starts, ends)
        if question.spans and not spans:
            bad(InputError(f"{where}: the tokenizer makes no token of the answer {brief(repr(question.answers))}."))
            return
        most = most_context(len(context.ids), windows)
        context_at = len(text.layout.prefix) + len(query.ids) + len(text.layout.between)
        for number, (first, last) in enumerate(windows):
            example: Example = text.join([query, context[first:last]])
            shift = context_at - first  # from a token of the context to its place in the example
            example |= {"window": number, "windows": len(windows), "context_at": context_at}
            example |= {"starts": starts[first:last], "ends": ends[first:last]}
            example |= {"most_from": most[number][0] + shift, "most_to": most[number][1] + shift}
            example["null_at"] = _null_at(example["input_ids"], text.layout, text.tokenizer.cls_token_id)
            if question.answers is not None:
                whole = ((a + shift, b + shift) for a, b in spans if first <= a and b < last)
                label = next(whole, (NO_ANSWER, NO_ANSWER))
                example["question_answering_start"], example["question_answering_end"] = label
            yield example

    def collate(self, examples: list[Example], tokens: Callable[[str, int], Tensor]) -> Batch:
        """ "text_at" (B,), where in its row each text begins (after padding on the left); "null_at" (B,), the place of
        [CLS] in the row; "may_start" and "may_end" (B, T) bool, True where an answer may; and with labels
        "question_answering_start" and "question_answering_end" (B,), places in the row.
        """

        def field(name: str) -> Tensor:
            return torch.tensor([int(example[name]) for example in examples])

        text_at = (tokens("word_ids", _PADDING) != _PADDING).int().argmax(dim=1)
        place = torch.arange(tokens("word_ids", _PADDING).size(1)) - text_at[:, None]  # in the example
        begin = field("context_at")
        end = begin + torch.tensor([len(example["starts"]) for example in examples])
        null_at = text_at + field("null_at")
        batch = {
            "text_at": text_at,
            "null_at": null_at,
            "may_start": (place >= field("most_from")[:, None]) & (place < field("most_to")[:, None]),
            "may_end": (place >= begin[:, None]) & (place < end[:, None]),
        }
        if "question_answering_start" in examples[0]:
            for name in ("question_answering_start", "question_answering_end"):
                label = field(name)
                batch[name] = torch.where(label == NO_ANSWER, null_at, text_at + label)
        return batch

    # ---- model

    def model_config(self) -> dict[str, Any]:
        return {"num_labels": 2}

    def logits(self, model: nn.Module, hidden: Any, batch: Batch) -> Tensor:
        """(B, 2, T): of start and end; -inf at padding, so that none of it changes with the batch."""
        with replayed(model, hidden):
            output = model(**batch["inputs"])
        if "start_top_index" in output:
            raise InputError(
                f"{type(model).__name__} searches the end of an answer beside each start, which this pipeline does not "
                f"train. Take a head with one start and one end logit a token (a Funnel config: qa_head: plain)."
            )
        both = torch.stack([output.start_logits, output.end_logits], dim=1)
        return both.masked_fill(batch["inputs"]["attention_mask"][:, None] == 0, -torch.inf)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return self._losses(logits, batch).mean()

    def taught(self, logits: Tensor, batch: Batch) -> Tensor:
        """Starts and ends, each among the tokens."""
        return logits.flatten(0, 1)

    def _losses(self, logits: Tensor, batch: Batch) -> Tensor:
        """(B,): mean of start and end."""
        labels = (batch["question_answering_start"], batch["question_answering_end"])
        sides = (F.cross_entropy(logits[:, i].float(), label, reduction="none") for i, label in enumerate(labels))
        return sum(sides, torch.zeros((), device=logits.device)) / 2

    # ---- scores

    def groups(self, features: Features) -> np.ndarray | None:
        """By question, whose windows follow one another."""
        return np.cumsum(features.plain["window"] == 0)

    def train_scores(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        return {name: right.float().mean().item() for name, right in _right(logits, batch).items()}

    def record(self, logits: Tensor, batch: Batch) -> list[Record]:
        """Of each window: "start" and "end" (places in the example, inclusive) and "score" of its best answer, of the
        n_best_size best starts and ends (-inf where none of them fit together); "null", the score of no answer; and
        with labels the loss and whether start and end are right.
        """
        logits = logits.float()
        start, end = logits[:, 0], logits[:, 1]
        null_at = batch["null_at"][:, None]
        n = min(self.args.n_best_size, logits.size(2))
        starts = start.masked_fill(~batch["may_start"], -torch.inf).topk(n)
        ends = end.masked_fill(~batch["may_end"], -torch.inf).topk(n)
        length = ends.indices[:, None] - starts.indices[..., None] + 1  # (B, n, n)
        fits = (length >= 1) & (length <= self.args.max_answer_length)
        pairs = (starts.values[..., None] + ends.values[:, None]).masked_fill(~fits, -torch.inf).flatten(1)
        best = pairs.max(dim=1)
        columns = {
            "start": starts.indices.take_along_dim((best.indices // n)[:, None], 1)[:, 0] - batch["text_at"],
            "end": ends.indices.take_along_dim((best.indices % n)[:, None], 1)[:, 0] - batch["text_at"],
            "score": best.values,
            "null": (start.take_along_dim(null_at, 1) + end.take_along_dim(null_at, 1))[:, 0],
        }
        if "question_answering_start" in batch:
            columns |= {"loss": self._losses(logits, batch), **_right(logits, batch)}
        values = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in values]

    def score(self, records: list[Record], features: Features, rows: Sequence[Row]) -> dict[str, float]:
        """Exact match and F1 of questions, loss and accuracies of windows; where some questions have no answer, exact
        match and F1 of those and of the others too.
        """
        scores = {
            name: float(np.mean([record[name] for record in records], dtype=np.float64))
            for name in ("start_accuracy", "end_accuracy", "loss")
        }
        found = self.found(records, features, rows)
        if not found:
            return scores
        golds = _golds(found)
        pairs = (squad.best_of(one.said(self.threshold), gold) for one, gold in zip(found, golds, strict=True))
        values = np.array(list(pairs))  # (questions, 2)
        answerable = np.array([bool(one.question.answers) for one in found])
        groups = {"": np.ones_like(answerable)}
        if not answerable.all():
            groups |= {"_has_answer": answerable, "_no_answer": ~answerable}
        means = {
            f"{name}{group}": float(values[chosen, column].mean())
            for group, chosen in groups.items()
            for column, name in enumerate(("exact_match", "f1"))
            if chosen.any()
        }
        return means | scores

    def tune(self, records: list[Record], features: Features, rows: Sequence[Row]) -> None:
        """The threshold of no answer with the best F1, where there are questions without one."""
        if self.args.null_threshold is not None:
            return
        self.threshold = None
        found = self.found(records, features, rows)
        if all(one.question.answers for one in found):
            return
        golds = _golds(found)
        answered = np.array([squad.best_of(one.text, gold)[1] for one, gold in zip(found, golds, strict=True)])
        refused = np.array([squad.best_of("", gold)[1] for gold in golds])
        margins = np.array([one.null_score - one.score for one in found])
        self.threshold = squad.best_null_threshold(margins, answered, refused)

    def predict(self, records: list[Record], features: Features, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        """One dict a question; "score" is None where no window has an answer."""
        for one in self.found(records, features, rows):
            result: dict[str, Any] = {
                "id": one.question.id,
                "prediction": one.said(self.threshold),
                "score": one.score if np.isfinite(one.score) else None,
                "null_score": one.null_score,
            }
            if one.question.answers is not None:
                result["answers"] = list(one.question.answers)
            yield result

    def found(self, records: list[Record], features: Features, rows: Sequence[Row]) -> list[Found]:
        """What the windows of each question say together, for questions of which all windows are there."""
        plain = features.plain
        result: list[Found] = []
        entries: list[dict[str, Any]] = []
        entries_row = -1
        size = len(records)
        first = 0
        while first < size:
            row, number, windows = (int(plain[name][first]) for name in ("row", "question", "windows"))
            last = first + 1
            while last < size and plain["row"][last] == row and plain["question"][last] == number:
                last += 1
            if last - first == windows:
                if row != entries_row:
                    entries, entries_row = entries_of(rows[row], self.columns, f"row {row + 1}"), row
                question = question_of(entries[number], f"row {row + 1}", _number(row, number, entries))
                best = max(range(first, last), key=lambda i: records[i]["score"])
                null = min(records[i]["null"] for i in range(first, last))
                score = records[best]["score"]
                text = "" if score == -np.inf else _answer(records[best], features, best, question.context)
                result.append(Found(question, text, score, null))
            first = last
        return result

    # ---- what a trained task knows

    def state(self) -> dict[str, Any]:
        return {"null_threshold": self.threshold}

    def load_state(self, state: dict[str, Any]) -> None:
        if self.args.null_threshold is None:
            self.threshold = state["null_threshold"]


def _offsets(pieces: Pieces) -> tuple[np.ndarray, np.ndarray]:
    """First character and the one after the last of each piece."""
    both = np.array(pieces.offsets, np.int32).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _null_at(ids: list[int], layout: Layout, cls_id: int | None) -> int:
    """Where [CLS] is; the first place where the tokenizer puts none."""
    return ids.index(cls_id) if cls_id in (*layout.prefix, *layout.suffix) else 0


def _number(row: int, number: int, entries: Sequence[Any]) -> str:
    """The name of a question without an id: row and question, from 1."""
    return str(row + 1) if len(entries) == 1 else f"{row + 1}-{number + 1}"


def _answer(record: Record, features: Features, i: int, context: str) -> str:
    """The text of the best answer in window i."""
    places = {}
    for side, name in (("start", "starts"), ("end", "ends")):
        values, offsets = features.ragged[name]
        places[side] = int(values[offsets[i] + record[side] - features.plain["context_at"][i]])
    return context[places["start"] : places["end"]].strip()


def _golds(found: Sequence[Found]) -> list[Sequence[str]]:
    """Right answers to score with. In data with unanswerable questions an answer that normalises to nothing is none,
    as the official evaluation of SQuAD 2.0 has it (that of 1.1 takes all).
    """
    golds: list[Sequence[str]] = [one.question.answers or () for one in found]
    return golds if all(golds) else [[text for text in gold if squad.normalized(text)] for gold in golds]


def _right(logits: Tensor, batch: Batch) -> dict[str, Tensor]:
    """(B,) bool: whether the best start and end are the label's."""
    sides = (("start_accuracy", "question_answering_start"), ("end_accuracy", "question_answering_end"))
    return {name: logits[:, i].argmax(-1) == batch[label] for i, (name, label) in enumerate(sides)}


class _Bad:
    """What to do with a question that cannot be used: raise its error, or count it."""

    def __init__(self, policy: str, where: str):
        self.policy, self.where = policy, where
        self.errors: list[InputError] = []

    def __call__(self, error: InputError) -> None:
        if self.policy != "skip":
            raise error
        self.errors.append(error)

    def tell(self) -> None:
        if self.errors:
            log.warning("%s: %d questions left out; the first: %s", self.where, len(self.errors), self.errors[0])
