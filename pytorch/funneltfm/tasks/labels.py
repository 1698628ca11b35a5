"""The classes of a task: their names, in an order that the data alone decides."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from funneltfm.errors import InputError, brief

_MANY = 10_000  # more different labels than this are no classes


class Labels:
    """Names of classes (text, whole numbers or truth values, as the data has them) and their numbers.

    num_labels: how many there must be; more than the training data has are filled up where labels are numbers.
    """

    def __init__(self, num_labels: int | None = None):
        if num_labels is not None and num_labels < 1:
            raise InputError(f"num_labels must be at least 1; got {num_labels}.")
        self.num_labels = num_labels
        self.load([])

    def __len__(self) -> int:
        return len(self.names)

    def load(self, names: list[Any]) -> None:
        """Take these classes."""
        self.names = names
        self._index = {name: i for i, name in enumerate(names)}

    def learn(self, values: Iterable[Any], column: str) -> None:
        """Take the classes from the labels of the training data: numbers in their order, text in that of the
        alphabet.
        """
        seen = {value for value in map(_plain, values) if value is not None}
        if not seen:
            raise InputError(f"the training data has no labels in {column}. Name their column with --label_column.")
        if len(seen) > _MANY or any(isinstance(value, float) for value in seen):
            raise InputError(
                f"{column} has {len(seen)} different values, such as {brief(repr(next(iter(seen))))}: these are no "
                f"classes. For numbers to predict, give --regression."
            )
        numbers = _as_numbers(seen)
        if numbers is not None and min(numbers) >= 0 and max(numbers) < max(len(seen), self.num_labels or 0):
            text = isinstance(next(iter(seen)), str)
            count = self.num_labels or len(seen)
            self.load([str(i) if text else i for i in range(count)])
        else:
            self.load(sorted(seen, key=lambda value: (str(type(value)), value)))
        if self.num_labels is not None and self.num_labels != len(self.names):
            raise InputError(
                f"--num_labels={self.num_labels}, but {column} has {len(self.names)} classes: "
                f"{brief(', '.join(map(str, self.names)))}."
            )

    def index(self, value: Any, where: str) -> int:
        """Number of a class; an InputError for a label that the training data does not have."""
        plain, index = _plain(value), self._index
        if plain not in index and isinstance(plain, int) and str(plain) in index:
            plain = str(plain)
        elif plain not in index and isinstance(plain, str) and plain.lstrip("-").isdigit() and int(plain) in index:
            plain = int(plain)
        if plain not in index:
            raise InputError(
                f"{where}: the label {value!r} is none of the {len(self.names)} classes of the training data: "
                f"{brief(', '.join(map(str, self.names)))}."
            )
        return index[plain]

    def weights(self, given: tuple[float, ...] | None, device: torch.device) -> Tensor | None:
        """--label_weights as a tensor (C,)."""
        if given is None:
            return None
        if len(given) != len(self.names):
            raise InputError(f"--label_weights has {len(given)} weights, but there are {len(self.names)} classes.")
        return torch.tensor(given, device=device)

    def model_config(self) -> dict[str, Any]:
        names = [str(name) for name in self.names]
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
        }


def _plain(value: Any) -> Any:
    """A label as one of str, int, float or None; truth values are 0 and 1."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if value is None or isinstance(value, str | int | float):
        return value
    raise InputError(f"a label must be text or a number; got {brief(repr(value))}.")


def _as_numbers(values: set[Any]) -> list[int] | None:
    """The values as whole numbers, where all of them are."""
    if all(isinstance(value, int) for value in values):
        return list(values)
    if all(isinstance(value, str) and value.isdigit() and str(int(value)) == value for value in values):
        return [int(value) for value in values]
    return None
