"""`summarization`: write a short text for a long one; any pair of texts will do, a translation for one.

Trained by teacher forcing; scored by what the model writes (ROUGE, BLEU, BERTScore) and by the loss.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funneltfm import summaries
from funneltfm.data.columns import texts_of
from funneltfm.data.features import Batch, Example, Features
from funneltfm.data.sources import place
from funneltfm.data.text import Text, TextEncoder
from funneltfm.errors import InputError, brief
from funneltfm.tasks.base import IGNORED, Record, Row, identity
from funneltfm.tasks.multi_token import MultiToken
from funneltfm.tasks.seq2seq import Seq2Seq, decoder_positions, target_ids

_PREFIX = "generation_"  # of flags that are generation options of transformers
# Options that do nothing without another one, and their values that do nothing anyway.
_FOR_DRAWS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "typical_p": 1.0}
_FOR_BEAMS = {"length_penalty": 1.0, "early_stopping": False}


class Summarization(Seq2Seq):
    """A row's first summary is learned; all of them are references."""

    name = "summarization"

    def __init__(self, args: Any):
        super().__init__(args)
        self.main_metric = "rougeL_fmeasure" if args.valid_generation else "perplexity"
        self.tokenizer: Any = None  # of `encode`, for what is written
        self.beside: MultiToken | None = None
        self.options = {
            name.removeprefix(_PREFIX): value
            for name, value in args.flags().items()
            if name.startswith(_PREFIX) and (name in args.given or (value is not None and value is not False))
        }
        if words := self.options.get("bad_words_ids"):
            self.options["bad_words_ids"] = [_ids(word) for word in words]
        self._check()

    def _check(self) -> None:
        args, options = self.args, self.options
        if args.valid_bert_score and not args.valid_generation:
            raise InputError("--valid_bert_score scores what is written, and --valid_generation=false writes nothing.")
        if args.test_dataset is not None or (args.valid_dataset is not None and args.valid_generation):
            summaries.check_installed()  # now, not after the training
        if args.valid_bert_score or args.test_bert_score:
            summaries.check_encoder(args.bert_score_model, args.bert_score_layer)
        if None not in (options.get("max_length"), options.get("max_new_tokens")):
            raise InputError("--generation_max_length and --generation_max_new_tokens both limit the length; give one.")
        if args.max_multi_token_predictions is not None:
            for name in sorted(options.keys() - {"max_length", "max_new_tokens"}):
                if options[name] and (name, options[name]) != ("num_beams", 1):
                    raise InputError(
                        f"--generation_{name} does not go with --max_multi_token_predictions, which takes the "
                        f"likeliest tokens, several at a time."
                    )

    # ---- data

    def texts(self, rows: Sequence[Row], where: str) -> list[Sequence[Text]]:
        """The columns of the document, the first one with the prefix."""
        made = [texts_of(row, self.args.document_column, place(rows, i, where)) for i, row in enumerate(rows)]
        return [[self.args.prefix + text if n == 0 else text for n, text in enumerate(texts)] for texts in made]

    def encode(self, rows: Sequence[Row], text: TextEncoder, where: str) -> list[Example]:
        self.tokenizer = text.tokenizer
        examples: list[Example] = [
            example | {"row": i} for i, example in enumerate(text.encode(self.texts(rows, where)))
        ]
        missing = next((i for i, row in enumerate(rows) if not self._columns(row)), None)
        if missing is None:
            first = [self.references(row, place(rows, i, where))[0] for i, row in enumerate(rows)]
            for example, ids in zip(examples, target_ids(first, text, self.longest_target), strict=True):
                example["summarization_labels"] = ids
        elif any(map(self._columns, rows)):
            raise InputError(
                f"{place(rows, missing, where)}: expected a text in {self.args.summary_column}, as other rows have it, "
                f"got none. Leave the row out, or all summaries."
            )
        return examples

    def references(self, row: Row, where: str) -> list[str]:
        """The summaries of a row that has some."""
        columns = self._columns(row)
        found = texts_of(row, columns, where)
        if not found:
            raise InputError(f"{where}: expected texts in {', '.join(columns)}, got an empty list.")
        return found

    def _columns(self, row: Row) -> list[str]:
        """Those with a summary of the row."""
        columns = (self.args.summary_column, *self.args.additional_summaries_column)
        return [column for column in columns if _has(row, column)]

    # ---- model

    @property
    def longest_target(self) -> int:
        return self.args.max_target_length

    def make_beside(self, model: nn.Module, source: Any, tokenizer: Any) -> nn.Module | None:
        made = super().make_beside(model, source, tokenizer)
        self.beside = made if isinstance(made, MultiToken) else None
        limits: dict[str, Any] = {"max_length": self.longest_target + 1, "max_new_tokens": None}  # 1: the first token
        if self.options.get("max_new_tokens") is not None:
            limits["max_length"] = None
        given = {name: value for name, value in self.options.items() if name not in limits or value is not None}
        size: Any = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
        chosen = {name: self.options.get(name) or () for name in ("suppress_tokens", "begin_suppress_tokens")}
        chosen["bad_words_ids"] = [id for word in self.options.get("bad_words_ids") or () for id in word]
        for name, ids in chosen.items():
            if odd := [id for id in ids if not 0 <= id < size]:
                raise InputError(f"--generation_{name} must be ids from 0 to {size - 1}, the model's; got {odd[0]}.")
        generation: Any = model.generation_config
        generation.update(**(limits | given))
        for use, more, idle in (
            (generation.do_sample, "--generation_do_sample", _FOR_DRAWS),
            ((generation.num_beams or 1) > 1, "--generation_num_beams, more than 1", _FOR_BEAMS),
        ):
            for name, nothing in () if use else idle.items():
                if self.options.get(name) not in (None, nothing):
                    raise InputError(f"--generation_{name}={self.options[name]} does nothing without {more}.")
                setattr(generation, name, None)
        try:
            generation.validate(strict=True)
        except ValueError as error:
            raise InputError(f"the generation options do not go together: {' '.join(str(error).split())}") from error
        longest = self._longest(generation)
        shortest = max(generation.min_length or 0, (generation.min_new_tokens or 0) + 1)
        if shortest > longest:
            raise InputError(
                f"texts must have at least {shortest} tokens and at most {longest}, by the flags or the model's "
                f"generation_config.json. Give another --generation_min_length or --generation_max_length."
            )
        limit = decoder_positions(model.config)
        if limit is not None and longest - 1 > limit:  # the last token is written, and not read
            raise InputError(
                f"texts may have {longest} tokens, but the model's decoder takes {limit}. Lower "
                f"--generation_max_length or --generation_max_new_tokens, or from scratch give "
                f"--additional_config_kwargs max_position_embeddings=N."
            )
        return made

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        labels = batch["summarization_labels"]
        return F.cross_entropy(
            logits.float(), labels[labels != IGNORED], label_smoothing=self.args.label_smoothing
        )  # every text has an end

    @staticmethod
    def _longest(generation: Any) -> int:
        """Tokens of the longest text, with the decoder's first one."""
        new = generation.max_new_tokens
        return generation.max_length if new is None else new + 1

    # ---- scores

    def evaluated(self, model: nn.Module, hidden: Any, batch: Batch, stage: str) -> list[Record]:
        """The sums of the loss where there are labels; "generated", the ids of what the model has written, but where
        validation is without; and whether BERTScore is wanted of it.
        """
        labelled = self.labels(batch) is not None
        records = super().evaluated(model, hidden, batch, stage) if labelled else [{} for _ in batch["index"]]
        if stage != "valid" or self.args.valid_generation:
            wanted = self.args.valid_bert_score if stage == "valid" else self.args.test_bert_score
            written = self.generate(model, batch).cpu().numpy()
            for record, ids in zip(records, written, strict=True):
                record |= {"generated": ids[ids != self.tokenizer.pad_token_id], "bert_score": wanted}
        return records

    def generate(self, model: Any, batch: Batch) -> Tensor:
        """Ids that the model writes, (B, T). What is drawn depends on the seed and the batch alone, and takes nothing
        from the random numbers of the training.
        """
        inputs = batch["inputs"]
        if self.beside is not None:
            longest = self._longest(model.generation_config)
            return self.beside.generate(model, longest, model.get_encoder()(**inputs), inputs["attention_mask"])
        ids = inputs["input_ids"]
        with torch.random.fork_rng([ids.device] if ids.is_cuda else []):
            torch.manual_seed(int(np.random.default_rng([self.args.seed, int(batch["index"][0])]).integers(2**63)))
            try:
                return model.generate(**inputs)
            except ValueError as error:
                reason = brief(" ".join(str(error).split()), 500)
                raise InputError(f"the model cannot write with these generation options: {reason}") from error

    def score(self, records: list[Record], features: Features, rows: Sequence[Row]) -> dict[str, float]:
        scores = super().score(records, features, rows)
        if "generated" not in records[0]:
            return scores
        predictions = self._written(records)
        references = [self.references(rows[int(row)], "") for row in features.plain["row"]]
        scores |= summaries.rouge(predictions, references)
        scores["sacrebleu"] = summaries.sacrebleu(predictions, references)
        if records[0]["bert_score"]:
            args = self.args
            scores |= summaries.bert_score(predictions, references, args.bert_score_model, args.bert_score_layer)
        return scores

    def _written(self, records: Sequence[Record]) -> list[str]:
        ids = [record["generated"].tolist() for record in records]
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def predict(self, records: list[Record], features: Features, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        """Of each row what the model has written (null where validation is without), and its summaries."""
        written = self._written(records) if "generated" in records[0] else [None] * len(records)
        for text, i in zip(written, features.plain["row"], strict=True):
            row = rows[int(i)]
            label = {"label": self.references(row, "")} if "summarization_labels" in features.ragged else {}
            yield identity(rows, int(i)) | {"prediction": text} | label


def _ids(word: str) -> list[int]:
    """Of a word, from text.

    >>> _ids("5,99")
    [5, 99]
    """
    if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", word):
        raise InputError(
            f"--generation_bad_words_ids takes the ids of each word, with commas where it has several, as in 17 5,99; "
            f"got {brief(repr(word))}."
        )
    return [int(part) for part in word.split(",")]


def _has(row: Row, column: str) -> bool:
    """Whether a row has something in all columns that `column` names."""
    return all(row.get(part.lstrip("*+")) is not None for part in column.split(":"))
