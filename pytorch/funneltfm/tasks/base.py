"""What a task is: its columns, its head and loss, its scores. It knows no trainer and no model by name.

A row of the data becomes one or more examples (`encode`), examples become a batch (`collate`), the encoder turns the
batch's texts into hidden states once, and every task of the pipeline reads its logits from them.
"""

import copy
import importlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from funneltfm.data.columns import texts_of
from funneltfm.data.features import Batch, Example, Features, pad
from funneltfm.data.sources import place
from funneltfm.data.text import Cuts, Text, TextEncoder
from funneltfm.errors import InputError
from funneltfm.tasks.flags import TASKS, own_flags
from funneltfm.tasks.heads import replayed, save_pretrained

log = logging.getLogger(__name__)

IGNORED = -100  # the label of what has none
Row = dict[str, Any]
Record = dict[str, Any]  # what is kept of one example of an evaluation: numbers and numpy arrays


class Task:
    """One thing to learn. A subclass fills in what is marked with "must"; the rest has a usable default.

    args: a namespace with the flags that `tasks.flags.TASKS` lists for it.
    """

    name: ClassVar[str]
    """Must. The group in logs: valid/NAME/accuracy."""
    auto: ClassVar[str]
    """Must. The Auto class of `transformers` whose head it trains."""
    main_metric: str
    """Must. What selects the best checkpoint, a key of `score`."""
    words: ClassVar[bool] = False
    """The texts are lists of words; tasks that are mixed with it read the same."""
    unlabelled: ClassVar[bool] = False
    """It makes its own labels in `prepare`, so rows need texts alone."""
    corrupts: ClassVar[bool] = False
    """It is unlabelled and corrupts its input; in a mixture it works on what the others encode."""
    masks: ClassVar[bool] = False
    """It needs a mask token."""
    alone: ClassVar[bool] = False
    """It has the whole model for itself, a decoder too, so it goes into no mixture."""

    distils: bool = False
    """`taught` gives what teachers can be compared by."""

    def __init__(self, args: Any):
        self.args = args
        self.reader: Task = self  # of a mixture, the task whose texts all read

    # ---- data

    def texts(self, rows: Sequence[Row], where: str) -> list[Sequence[Text]]:
        """The texts of every row, from --input_columns (or --input_column, default: text)."""
        if self.args.input_columns is not None and self.args.input_column is not None:
            raise InputError("--input_columns and --input_column name the same thing; give one of them.")
        columns = self.args.input_columns or (self.args.input_column or "text",)
        return [texts_of(row, columns, place(rows, i, where)) for i, row in enumerate(rows)]

    def learn(self, rows: Iterable[Row]) -> None:
        """Take from the training rows what the task has to know beforehand (the names of the labels)."""

    def encode(self, rows: Sequence[Row], text: TextEncoder, where: str) -> list[Example]:
        """Must. Examples, row by row, each with "row" (its row's index), "input_ids", "word_ids" and, where the
        tokenizer has them, "token_type_ids"; "attention_mask" (1 = real) where it has padding of its own; labels under
        names of the task's own, such as "seq_class_labels", where the rows have them. An example of several texts that
        go through the encoder apart has them one after another, and their lengths under "parts".

        where: the data's name, for messages. Raises InputError for rows that cannot be used.
        """
        raise NotImplementedError

    def redraw(self, example: Example, draw: Callable[[int], np.random.Generator], text: TextEncoder) -> Example:
        """In training, what is taken in place of `example` in this epoch (for data that is grouped anew); every task's
        `prepare` works on it. draw(n) depends on the seed, the epoch and n alone: examples that share an n agree.
        """
        return example

    def prepare(self, example: Example, rng: np.random.Generator, text: TextEncoder) -> Example:
        """What is trained on in place of `example` (for objectives that corrupt it); `rng` depends on the seed, the
        epoch and the example alone.
        """
        return example

    def collate(self, examples: list[Example], tokens: Callable[[str, int], Tensor]) -> Batch:
        """The task's own tensors of a batch: labels, where the examples have them. `tokens(name, fill)` is a field
        with a number for every token as (texts, T) int64, filled up with `fill` where input_ids are padding.
        """
        return {}

    # ---- model

    def model_config(self) -> dict[str, Any]:
        """Keys of the model's config that the task decides: num_labels, id2label, ..."""
        return {}

    def make_model(self, source: Any, config: Any) -> nn.Module:
        """The model with this task's head. source: a checkpoint (folder or name) or None, from scratch; config: its
        config, with `model_config` in it.
        """
        return load_model(self.auto, source, config)

    def make_beside(self, model: nn.Module, source: Any, tokenizer: Any) -> nn.Module | None:
        """What the task has beside its model, which is trained, moved and checkpointed with it: another model, counts.
        model: that with this task's head, on the encoder that all share; source: the checkpoint that it came from.
        """
        return None

    def save(self, model: nn.Module, beside: nn.Module | None, folder: Path) -> None:
        """Write what `make_model` and `make_beside` load."""
        save_pretrained(model, folder)

    def corrupt(self, beside: nn.Module | None, batch: Batch) -> Batch:
        """What the encoder sees in place of `batch`, for objectives whose corruption is computed on the device. Random
        numbers must come from what `prepare` has drawn.
        """
        return batch

    def inputs(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        """What the model's encoder takes (of a task that is `alone`: what the model takes)."""
        return batch["inputs"]

    def logits(self, model: nn.Module, hidden: Any, batch: Batch) -> Tensor:
        """What the task's head says. hidden: the output of the encoder for batch["inputs"]."""
        with replayed(model, hidden):
            return model(**batch["inputs"]).logits

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Must. The mean loss, a scalar."""
        raise NotImplementedError

    def taught(self, logits: Tensor, batch: Batch) -> Tensor:
        """Logits (N, C): of each choice among C classes that the loss counts."""
        return logits

    def size(self, batch: Batch) -> float | None:
        """How much of what the loss is a mean over is in a batch (tokens, say); None: its examples."""
        return None

    def losses(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The loss by name, or several; each is logged under its name and weighted by its --NAME_weight."""
        return {self.name: self.loss(logits, batch)}

    def sizes(self, batch: Batch) -> dict[str, float]:
        """The sizes of the losses that have one."""
        size = self.size(batch)
        return {} if size is None else {self.name: size}

    def update(self, beside: nn.Module | None, logits: Tensor, batch: Batch) -> None:
        """After the forward pass of a training batch, in all processes together: what is kept without gradients. A
        batch of weight 0 counts for nothing.
        """

    # ---- scores

    def groups(self, features: Features) -> np.ndarray | None:
        """(N,) int: equal for examples that are scored together, of which an evaluation that is limited takes all or
        none; None: each alone.
        """
        return None

    def train_scores(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        """Scores of a training batch, now and then, for the log."""
        return {}

    def record(self, logits: Tensor, batch: Batch) -> list[Record]:
        """Must. What to keep of each example of an evaluation batch, small and on the CPU."""
        raise NotImplementedError

    def evaluated(self, model: nn.Module, hidden: Any, batch: Batch, stage: str) -> list[Record]:
        """The records of a batch; stage: valid, test or predict."""
        return self.record(self.logits(model, hidden, batch), batch)

    def score(self, records: list[Record], features: Features, rows: Sequence[Row]) -> dict[str, float]:
        """Must. The metrics of a whole split; GROUP/METRIC where it is not in the task's own group. records: one for
        each example, in order.
        """
        raise NotImplementedError

    def predict(self, records: list[Record], features: Features, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        """Must. What is written for each row: its prediction, scores, and its label where it has one."""
        raise NotImplementedError

    def tune(self, records: list[Record], features: Features, rows: Sequence[Row]) -> None:
        """Choose on the validation set what is not learned (a threshold). Called at every validation before `score`, so
        the last call has the best model's records.
        """

    # ---- what a trained task knows, for prediction

    def state(self) -> dict[str, Any]:
        """JSON."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """The state of the run that has trained the model."""


def own_id(row: Row) -> dict[str, Any]:
    """{"id": the row's own}, for predictions; empty where it has none."""
    return {"id": row["id"]} if isinstance(row.get("id"), str | int) else {}


def full_name(task: Task, metric: str) -> str:
    """GROUP/METRIC."""
    return metric if "/" in metric else f"{task.name}/{metric}"


def load_model(auto: str, source: Any, config: Any) -> nn.Module:
    """A model by its Auto class: from a checkpoint (folder or name), or where that is None from scratch."""
    import transformers

    cls = getattr(transformers, auto)
    if source is None:
        return cls.from_config(config)
    model, info = cls.from_pretrained(source, config=config, output_loading_info=True, ignore_mismatched_sizes=True)
    fresh = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    log.info("loaded %s%s", source, f"; new: {', '.join(fresh)}" if fresh else "")
    return model


def make_tasks(pipeline: str, args: Any) -> list[Task]:
    """The tasks of a pipeline, those that corrupt last: they work on what the others have made."""
    tasks = []
    for name, own in own_flags(args.task_flags, pipeline).items():
        module, _, cls = TASKS[name][0].partition(":")
        of_task = copy.copy(args)
        vars(of_task).update(own)
        tasks.append(getattr(importlib.import_module(module), cls)(of_task))
    own_rows = [
        name for name in ("packing", "sentence_pairs", "tokenized_dir", "prepare_data_workers") if getattr(args, name)
    ]
    if own_rows and (labelled := next((task.name for task in tasks if not task.unlabelled), None)):
        raise InputError(
            f"--{own_rows[0]} is for tasks that need texts alone, but {labelled} reads labels of rows. Leave it out."
        )
    if len(tasks) > 1 and (alone := next((task for task in tasks if task.alone), None)):
        raise InputError(f"pipeline {pipeline!r}: {alone.name} needs a model of its own. Train it alone.")
    if sum(task.corrupts for task in tasks) > 1:
        raise InputError(f"pipeline {pipeline!r}: two tasks of it corrupt the texts. Take one of them.")
    for task in tasks:
        task.reader = next((other for other in tasks if other.words), task)
    return sorted(tasks, key=lambda task: task.corrupts)


# ---- all tasks of a pipeline together


def encode_rows(
    tasks: Sequence[Task], rows: Sequence[Row], text: TextEncoder, where: str, may_be_none: bool = False
) -> Features:
    """Examples that all tasks of a pipeline share. Tasks with labels must read the same texts. may_be_none: whether it
    is no error that there is no example.
    """
    if not len(rows):
        raise InputError(f"{where} has no rows.")
    leads = [task for task in tasks if not task.corrupts] or list(tasks)
    examples = leads[0].encode(rows, text, where)
    for task in leads[1:]:
        more = task.encode(rows, replace(text, cuts=Cuts()), where)  # the same texts, counted once
        same = len(more) == len(examples) and all(
            np.array_equal(a["input_ids"], b["input_ids"]) for a, b in zip(examples, more, strict=True)
        )
        if not same:
            raise InputError(
                f"{leads[0].name} and {task.name} read different texts of {where}, so they cannot be mixed. Give them "
                f"the same columns."
            )
        examples = [a | b for a, b in zip(examples, more, strict=True)]
    if not examples and not may_be_none:
        raise InputError(f"{where}: no row makes an example.")
    return Features.of(examples)


class Prepare:
    """Prepares examples for a pass over the data, the same whichever process does it."""

    def __init__(self, tasks: Sequence[Task], text: TextEncoder, seed: int):
        self.tasks, self.text, self.seed = tasks, text, seed

    def __call__(self, example: Example, epoch: int) -> Example:
        if epoch >= 0:  # it is -1 in evaluation
            for number, task in enumerate(self.tasks):
                example = task.redraw(example, self._draw(epoch, number), self.text)
        for number, task in enumerate(self.tasks):
            # numpy takes no negative seeds
            rng = np.random.default_rng([self.seed, epoch + 1, example["index"], number])
            example = task.prepare(example, rng, self.text)
        return example

    def _draw(self, epoch: int, number: int) -> Callable[[int], np.random.Generator]:
        return lambda n: np.random.default_rng([self.seed, epoch + 1, n, number, 1])


class Collate:
    """Examples to a batch: "index" (B,), "inputs" (what the encoder takes: input_ids, attention_mask with 1 = real,
    token_type_ids, each (texts, T) int64), "tokens" (how many are real), the tasks' own tensors, and "sizes", those of
    losses that have one.

    length: pad every batch to this many tokens; None pads to its longest text. token_types: whether the encoder knows
    types of tokens; otherwise it gets none.
    """

    def __init__(self, tasks: Sequence[Task], tokenizer: Any, length: int | None = None, token_types: bool = True):
        self.tasks, self.length, self.token_types = tasks, length, token_types
        self.pad_id, self.pad_type = tokenizer.pad_token_id, tokenizer.pad_token_type_id
        self.left = tokenizer.padding_side == "left"

    def padded_length(self, longest: int) -> int:
        return max(self.length or 0, longest)

    def __call__(self, examples: list[Example]) -> Batch:
        ids = _texts(examples, "input_ids")
        length = self.padded_length(max(map(len, ids)))

        def tokens(name: str, fill: int) -> Tensor:
            return pad(_texts(examples, name), fill, length, self.left)

        inputs = {
            "input_ids": pad(ids, self.pad_id, length, self.left),
            "attention_mask": pad([np.ones_like(row) for row in ids], 0, length, self.left),
        }
        if "attention_mask" in examples[0]:
            inputs["attention_mask"] = tokens("attention_mask", 0)
        if self.token_types and "token_type_ids" in examples[0]:
            inputs["token_type_ids"] = tokens("token_type_ids", self.pad_type)
        batch: Batch = {"index": torch.tensor([int(example["index"]) for example in examples]), "inputs": inputs}
        batch["tokens"] = int(inputs["attention_mask"].sum())
        for task in self.tasks:
            batch |= task.collate(examples, tokens)
        return batch | {"sizes": {name: size for task in self.tasks for name, size in task.sizes(batch).items()}}


def _texts(examples: list[Example], name: str) -> list[np.ndarray]:
    """The texts of all examples, one after another."""
    rows: list[np.ndarray] = []
    for example in examples:
        parts = example.get("parts")
        rows += [example[name]] if parts is None else np.split(example[name], np.cumsum(parts)[:-1])
    return rows
