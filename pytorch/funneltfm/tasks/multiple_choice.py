"""`multiple_choice`: which of several options answers a question about an article (Lai et al. 2017: RACE)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.special import log_softmax, softmax
from torch import Tensor, nn

from funneltfm.data.features import Batch, Example, Features
from funneltfm.data.sources import place
from funneltfm.data.text import NO_WORD, Pieces, TextEncoder
from funneltfm.errors import InputError, brief
from funneltfm.tasks.base import Record, Row, Task
from funneltfm.tasks.heads import replayed


@dataclass(frozen=True)
class Choice:
    """One question."""

    id: str
    article: str | None
    question: str
    options: tuple[str, ...]
    answer: int | None
    """Which option is right, from 0; None: not known."""


class MultipleChoice(Task):
    """Cross entropy over the options of a question. An example is a question, as many texts as it has options; the
    questions of one data set may have different numbers of them.

    A text is the pair (article, question and option), or (question, option) where there is no article. What is too
    long loses the end of its article, down to one token, and only then the beginning of the question. logits: (B, K),
    K the largest number of options in the batch, -inf where a question has fewer.
    """

    name = "multiple_choice"
    auto = "AutoModelForMultipleChoice"
    main_metric = "accuracy"
    distils = True
    blank: ClassVar[str | None] = "_"
    """Beside an article, the first blank of a question is replaced by the option; one without a blank is followed by
    the option, after a space. This is how XLNet was finetuned on RACE, and Funnel-Transformer after it. None: the
    option always comes after the question.
    """

    # ---- data

    def encode(self, rows: Sequence[Row], text: TextEncoder, where: str) -> list[Example]:
        """Examples with "question", its number in its row, and "multiple_choice_labels", the right option's."""
        asked = [
            (row, number, choice)
            for row in range(len(rows))
            for number, choice in enumerate(self._choices(rows[row], row, place(rows, row, where)))
        ]
        known = [choice.answer is not None for _, _, choice in asked]
        if any(known) and not all(known):
            row, _, choice = asked[known.index(False)]
            raise InputError(
                f"{place(rows, row, where)}, question {choice.id}: no answer, but other questions have one."
            )
        articles = dict.fromkeys(choice.article for _, _, choice in asked if choice.article is not None)
        article_pieces = dict(zip(articles, text.pieces(list(articles)), strict=True))
        pieces = text.pieces([side for _, _, choice in asked for side in self._sides(choice)])
        examples = []
        for row, number, choice in asked:
            article = None if choice.article is None else article_pieces[choice.article]
            texts = [_pair(article or next(pieces), next(pieces), text) for _ in choice.options]
            example = _together(texts) | {"row": row, "question": number}
            if choice.answer is not None:
                example["multiple_choice_labels"] = choice.answer
            examples.append(example)
        return examples

    def _sides(self, choice: Choice) -> Iterator[str]:
        """The texts of a question beside its article, option by option; without an article, two for each."""
        for option in choice.options:
            if choice.article is None:
                yield choice.question
                yield option
            elif self.blank is not None and self.blank in choice.question:
                yield choice.question.replace(self.blank, option, 1)
            else:
                yield f"{choice.question} {option}"

    def _choices(self, row: Row, number: int, at: str) -> list[Choice]:
        """The questions of a row: of one of RACE's (questions, options and answers: lists), or one."""
        args = self.args
        article = row.get(args.article_column) if args.article_column is not None else None
        if args.article_column is not None and not isinstance(article, str):
            raise InputError(
                f"{at}: {args.article_column} must be a text; got {brief(repr(article))}. Name its column with "
                f"--article_column; none says that there is no article."
            )
        own = row.get("id")
        if args.question_column in row or "questions" not in row:
            name = str(number + 1 if own is None else own)
            one = (row.get(args.question_column), row.get(args.options_column), row.get(args.answer_column))
            return [_choice(name, article, *one, f"{at}, question {name}")]
        questions, options, answers = (list(row.get(name) or ()) for name in ("questions", "options", "answers"))
        n = len(questions)
        if len(options) != n or len(answers) not in (0, n):
            raise InputError(f"{at}: {n} questions, but options for {len(options)} and answers to {len(answers)}.")
        choices = []
        for i, (question, of_question, answer) in enumerate(
            zip(questions, options, answers or [None] * n, strict=True)
        ):
            name = f"{number + 1 if own is None else own}-{i + 1}"
            choices.append(_choice(name, article, question, of_question, answer, f"{at}, question {name}"))
        return choices

    def collate(self, examples: list[Example], tokens: Callable[[str, int], Tensor]) -> Batch:
        """ "choices" (B, K) bool, False where a question has no such option; "multiple_choice_labels" (B,)."""
        counts = torch.tensor([len(example["parts"]) for example in examples])
        batch = {"choices": torch.arange(int(counts.max())) < counts[:, None]}
        if "multiple_choice_labels" in examples[0]:
            labels = [int(example["multiple_choice_labels"]) for example in examples]
            batch["multiple_choice_labels"] = torch.tensor(labels)
        return batch

    # ---- model

    def logits(self, model: nn.Module, hidden: Any, batch: Batch) -> Tensor:
        """(B, K): the head sees each text as a question with one option."""
        with replayed(model, hidden):
            scores = model(**{name: tensor[:, None] for name, tensor in batch["inputs"].items()}).logits[:, 0]
        logits = scores.new_full(batch["choices"].shape, -torch.inf)
        logits[batch["choices"]] = scores
        return logits

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """With label_smoothing e, e of the target is shared by the question's options."""
        choices, e = batch["choices"], self.args.label_smoothing
        nll = -logits.float().log_softmax(-1)
        right = nll.take_along_dim(batch["multiple_choice_labels"][:, None], 1)[:, 0]
        evenly = nll.masked_fill(~choices, 0).sum(-1) / choices.sum(-1)
        return ((1 - e) * right + e * evenly).mean()

    # ---- scores

    def train_scores(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        return {"accuracy": (logits.argmax(-1) == batch["multiple_choice_labels"]).float().mean().item()}

    def record(self, logits: Tensor, batch: Batch) -> list[Record]:
        rows = zip(logits.float().cpu().numpy(), batch["choices"].sum(-1).tolist(), strict=True)
        return [{"logits": row[:count].copy()} for row, count in rows]

    def score(self, records: list[Record], features: Features, rows: Sequence[Row]) -> dict[str, float]:
        labels = features.plain["multiple_choice_labels"]
        right = [int(record["logits"].argmax()) == label for record, label in zip(records, labels, strict=True)]
        loss = 0.0
        for record, label in zip(records, labels, strict=True):
            nll = -log_softmax(record["logits"].astype(np.float64))
            loss += (1 - self.args.label_smoothing) * nll[label] + self.args.label_smoothing * nll.mean()
        return {"accuracy": float(np.mean(right)), "loss": float(loss / len(records))}

    def predict(self, records: list[Record], features: Features, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        """One dict a question; options by their number, from 0."""
        for i, record in enumerate(records):
            row = int(features.plain["row"][i])
            choice = self._choices(rows[row], row, "the data")[int(features.plain["question"][i])]
            best = int(record["logits"].argmax())
            scores = softmax(record["logits"].astype(np.float64)).round(6).tolist()
            result = {"id": choice.id, "prediction": best, "text": choice.options[best], "scores": scores}
            if choice.answer is not None:
                result["label"] = choice.answer
            yield result


def _choice(id: str, article: str | None, question: Any, options: Any, answer: Any, where: str) -> Choice:
    if not isinstance(question, str):
        raise InputError(f"{where}: the question must be a text; got {brief(repr(question))}.")
    texts = [] if isinstance(options, str | Mapping) or options is None else list(options)
    if len(texts) < 2 or not all(isinstance(option, str) for option in texts):
        raise InputError(f"{where}: the options must be a list of at least two texts; got {brief(repr(options))}.")
    return Choice(
        id,
        article,
        question,
        tuple(texts),
        _answer(answer, texts, where),
    )


def _answer(value: Any, options: Sequence[str], where: str) -> int | None:
    """The number of the right option, given as such (from 0), as a letter, or as its text."""
    if value is None:
        return None
    n, readings = len(options), set[int]()
    if isinstance(value, str):
        readings = {i for i, option in enumerate(options) if option == value}
        letter = ord(value) - ord("A") if len(value) == 1 else -1
        readings |= {letter} & set(range(n))
        value = int(value) if value.isascii() and value.isdigit() else value
    if hasattr(value, "__index__") and not isinstance(value, bool):
        readings |= {int(value)} & set(range(n))
    if len(readings) != 1:
        problem = "is more than one of" if readings else "is none of"
        raise InputError(
            f"{where}: the answer {brief(repr(value))} {problem} the {n} options: {brief(repr(list(options)))}. "
            f"Expected an option's number from 0, its letter from A, or its text."
        )
    return readings.pop()


def _pair(first: Pieces, second: Pieces, text: TextEncoder) -> Example:
    """A text of two, cut to fit: the end of the first, and where that is not enough the beginning of the second."""
    room = text.max_length - text.layout.n_special(2)
    whole = len(first.ids) + len(second.ids)
    if whole > room > 1:
        keep = min(len(second.ids), room - min(1, len(first.ids)))
        second, first = second[len(second.ids) - keep :], first[: room - keep]
    return text.join([first, second], whole=whole)


def _together(texts: Sequence[Example]) -> Example:
    """One example of several texts; their words count on."""
    example: Example = {"parts": [len(text["input_ids"]) for text in texts]}
    first = 0
    for text in texts:
        words = np.array(text["word_ids"])
        text["word_ids"] = np.where(words == NO_WORD, NO_WORD, words + first)
        first += words.max() + 1
    return example | {name: np.concatenate([text[name] for text in texts], dtype=np.int32) for name in texts[0]}
