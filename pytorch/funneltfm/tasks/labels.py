"""The classes of a task: their names, in an order that the data alone decides."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funneltfm.data.sources import place
from funneltfm.errors import InputError, brief

_MANY = 10_000  # more different labels than this are no classes
_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,17}")


def labels_of(rows: Iterable[dict[str, Any]], column: str) -> Iterator[Any]:
    """The label of every row (or its list of labels); None where the column is missing, null or empty text.

    Where the source knows the names of numbers (a ClassLabel of the datasets library) the names come in their place,
    and None for its -1.
    """
    names = class_names(rows, column)

    def named(value: Any) -> Any:
        if isinstance(value, list):
            return [named(item) for item in value]
        if names is not None and type(value) is int and -1 <= value < len(names):
            return names[value] if value >= 0 else None
        return None if value == "" else value

    return (named(row.get(column)) for row in rows)


def class_names(rows: Iterable[dict[str, Any]], column: str) -> list[str] | None:
    """The names of the numbers in a column, where the source knows them."""
    return getattr(rows, "class_names", lambda column: None)(column)


def all_or_none(labels: Sequence[Any], rows: Sequence[dict[str, Any]], column: str, where: str) -> bool:
    """Whether the rows have labels; an InputError where some have and some have not."""
    missing = [i for i, label in enumerate(labels) if label is None]
    if missing and len(missing) < len(labels):
        raise InputError(
            f"{place(rows, missing[0], where)}: no {column}, but other rows have one. Label all rows, or none."
        )
    return not missing


class Labels:
    """Names of classes (text, whole numbers or truth values, as the data has them) and their numbers.

    num_labels: how many there must be; more than the training data has are filled up where labels are numbers.
    A number and the text that spells it, 1 and "1", are one class.
    """

    def __init__(self, num_labels: int | None = None):
        if num_labels is not None and num_labels < 1:
            raise InputError(f"num_labels must be at least 1; got {num_labels}.")
        self.num_labels = num_labels
        self.load([])

    def __len__(self) -> int:
        return len(self.names)

    def load(self, names: Sequence[Any]) -> None:
        """Take these classes."""
        self.names = list(names)
        self._index = {_key(name): i for i, name in enumerate(self.names)}

    def learn(
        self, values: Iterable[Any], column: str, names: Sequence[str] | None = None, stream: bool = False
    ) -> None:
        """Take the classes from the labels of the training data: numbers in their order, text in that of the
        alphabet; None is no label. names: all classes, where the source knows them. stream: the values come from
        one, which is read no further than names and num_labels leave something to find; what is none of the classes is
        met in training.
        """
        seen: dict[Any, Any] = {}
        told = stream and names is not None
        for value in () if told else values:
            if value is not None:
                seen.setdefault(_key(value), _plain(value))
            if stream and len(seen) == self.num_labels:
                break
        if not seen and not told:
            raise InputError(
                f"the training data has no labels in {column}. Name their column with --label_column, in a mixture "
                f"with --task_flags TASK.label_column=NAME."
            )
        if len(seen) > _MANY or any(isinstance(key, float) for key in seen):
            odd = next((key for key in seen if isinstance(key, float)), next(iter(seen)))
            raise InputError(
                f"{column} has {len(seen)} different values, such as {brief(repr(odd))}: these are no classes. For "
                f"numbers to predict, give --regression."
            )
        count = max(len(seen), self.num_labels or 0)
        if names is not None and all(name in names for name in seen.values()):
            self.load(names)
        elif all(isinstance(key, int) and 0 <= key < count for key in seen):
            text = all(isinstance(name, str) for name in seen.values())
            self.load([str(i) if text else i for i in range(count)])
        elif all(isinstance(key, int) for key in seen):
            self.load([seen[key] for key in sorted(seen)])
        else:
            self.load(sorted(map(str, seen.values())))
        if self.num_labels is not None and self.num_labels != len(self.names):
            raise InputError(
                f"--num_labels={self.num_labels}, but {column} has {len(self.names)} classes: "
                f"{brief(', '.join(map(str, self.names)))}."
            )

    def index(self, value: Any, where: str) -> int:
        """Number of a class; an InputError for a label that the training data does not have."""
        number = None if value is None else self._index.get(_key(value))
        if number is None:
            raise InputError(
                f"{where}: the label {value!r} is none of the {len(self.names)} classes of the training data: "
                f"{brief(', '.join(map(str, self.names)))}."
            )
        return number

    def check_weights(self, given: Sequence[float] | None) -> None:
        """An InputError for --label_weights that do not fit the classes."""
        if given is None:
            return
        if len(given) != len(self.names):
            raise InputError(
                f"--label_weights has {len(given)} weights, but there are {len(self.names)} classes: "
                f"{brief(', '.join(map(str, self.names)))}."
            )
        if min(given) < 0 or max(given) <= 0:
            raise InputError(f"--label_weights must not be negative, and not all 0; got {' '.join(map(str, given))}.")

    def weights(self, given: Sequence[float] | None, device: torch.device) -> Tensor | None:
        """--label_weights as a tensor (C,)."""
        self.check_weights(given)
        return None if given is None else torch.tensor(given, device=device)

    def size(self, labels: Tensor, given: Sequence[float] | None) -> float:
        """What labels (n,) count together in the loss, with --label_weights or without."""
        weights = self.weights(given, labels.device)
        return float(len(labels)) if weights is None else weights[labels].sum().item()

    def model_config(self) -> dict[str, Any]:
        names = [str(name) for name in self.names]
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
        }


def cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor | None, smoothing: float) -> tuple[Tensor, Tensor]:
    """The cross entropy of each of n predictions, and what it counts, both (n,) float32: the mean loss is the sum of
    the one divided by the sum of the other.

    logits: (n, C). labels: (n,) of classes. weight: (C,). smoothing: the share of the target that goes to all classes
    evenly (Szegedy et al. 2016, section 7), each by its weight.
    """
    losses = F.cross_entropy(logits.float(), labels, weight=weight, label_smoothing=smoothing, reduction="none")
    return losses, torch.ones_like(losses) if weight is None else weight[labels].float()


def mean(losses: Tensor, counts: Tensor) -> Tensor:
    """The weighted mean, a scalar; 0 where nothing counts."""
    return losses.sum() / counts.sum().clamp(min=torch.finfo(torch.float32).tiny)


def _plain(value: Any) -> Any:
    """A label as one of str, int or float; truth values are 0 and 1."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str | int | float):
        return value
    raise InputError(f"a label must be text or a number; got {brief(repr(value))}.")


def _key(value: Any) -> Any:
    """What is equal for equal labels: text that spells a whole number is that number."""
    plain = _plain(value)
    return int(plain) if isinstance(plain, str) and _WHOLE.fullmatch(plain) else plain
