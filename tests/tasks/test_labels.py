"""Classes: which, in which order, under which names; and the loss over them."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funneltfm.errors import InputError
from funneltfm.tasks.labels import Labels, all_or_none, class_names, cross_entropy, labels_of, mean


def learned(values: list[Any], num_labels: int | None = None, **more: Any) -> list[Any]:
    labels = Labels(num_labels)
    labels.learn(values, "label", **more)
    return labels.names


@pytest.mark.parametrize(
    ("values", "num_labels", "names"),
    [
        ([1, 0, 1], None, [0, 1]),
        (["1", "0"], None, ["0", "1"]),
        ([True, False], None, [0, 1]),
        ([1.0, 0.0, 1], None, [0, 1]),
        ([0, 0], 3, [0, 1, 2]),  # those that the training data does not have
        (["2", "0"], 3, ["0", "1", "2"]),
        ([3, 1, 2], None, [1, 2, 3]),
        ([-1, 1], None, [-1, 1]),
        ([str(i) for i in range(1, 12)], None, [str(i) for i in range(1, 12)]),  # 2 before 10
        (["b", "a", None], None, ["a", "b"]),
        (["a", 1], None, ["1", "a"]),
        ([1, "1", 0], None, [0, 1]),
        (["\u00b2", "--1", "007", "7", "-0"], None, ["--1", "-0", "007", "7", "\u00b2"]),  # no numbers, but digits
        (["9" * 5000, "a"], None, ["9" * 5000, "a"]),
        (["O", "B-PER", "I-PER"], None, ["B-PER", "I-PER", "O"]),
    ],
)
def test_classes_of_the_training_data(values: list[Any], num_labels: int | None, names: list[Any]) -> None:
    assert learned(values, num_labels) == names
    assert learned(values[::-1], num_labels) == names
    assert [type(name) for name in learned(values, num_labels)] == [type(name) for name in names]
    labels = Labels(num_labels)
    labels.learn(values, "label")
    assert [labels.index(name, "here") for name in names] == list(range(len(names)))
    config = labels.model_config()
    assert config["num_labels"] == len(names) == len(config["id2label"]) == len(config["label2id"])
    assert [config["label2id"][config["id2label"][i]] for i in range(len(names))] == list(range(len(names)))


def test_a_stream_is_read_no_further_than_it_must() -> None:
    def then_nothing(*values: Any) -> Any:
        yield from values
        raise AssertionError("all was found")

    assert learned(then_nothing("b", None, "b", "a"), 2, stream=True) == ["a", "b"]
    assert learned(then_nothing(1, 0, 2), 3, stream=True) == [0, 1, 2]
    assert learned(then_nothing(), names=["x", "y"], stream=True) == ["x", "y"]
    assert learned(["a", "c", "b"], None, stream=True) == ["a", "b", "c"]
    with pytest.raises(AssertionError, match="all was found"):
        learned(then_nothing("a", "b"), 2)
    with pytest.raises(InputError, match="num_labels=3, but label has 2 classes"):
        learned(["a", "b"], 3, stream=True)
    with pytest.raises(InputError, match="num_labels=3, but label has 2 classes"):
        learned(then_nothing(), 3, names=["x", "y"], stream=True)


@given(st.lists(st.one_of(st.integers(-20, 20), st.booleans(), st.text(max_size=3), st.none()), min_size=1))
def test_every_label_has_its_class(values: list[Any]) -> None:
    if all(value is None for value in values):
        return
    labels = Labels()
    labels.learn(values, "label")
    numbers = {labels.index(value, "here") for value in values if value is not None}
    assert numbers == set(range(len(labels)))


@pytest.mark.parametrize(
    ("values", "num_labels", "message"),
    [
        ([None], None, "no labels in label"),
        ([], None, "--label_column"),
        ([0.5, 1], None, "such as 0.5: these are no classes. For numbers to predict, give --regression"),
        ([float("nan")], None, "no classes"),
        (list(range(10_001)), None, "10001 different values"),
        ([0, 1, 2], 2, "--num_labels=2, but label has 3 classes: 0, 1, 2"),
        (["a", "b"], 3, "--num_labels=3, but label has 2 classes: a, b"),
        ([["a"]], None, "must be text or a number"),
    ],
)
def test_what_are_no_classes(values: list[Any], num_labels: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        learned(values, num_labels)


def test_num_labels_out_of_range() -> None:
    with pytest.raises(InputError, match="at least 1; got 0"):
        Labels(0)


def test_labels_of_other_data() -> None:
    labels = Labels()
    labels.learn(["0", "1", "2"], "label")
    assert [labels.index(value, "here") for value in (0, "1", 2.0, True)] == [0, 1, 2, 1]
    for strange in (3, "x", "01", -1, None, "\u00b2"):
        with pytest.raises(InputError, match=r"dev, row 4: the label .* is none of the 3 classes .*: 0, 1, 2"):
            labels.index(strange, "dev, row 4")


def test_state_goes_through_json() -> None:
    for values in ([0, 1], ["x", "y"], ["0", "1"], [5, "x"]):
        labels, again = Labels(), Labels()
        labels.learn(values, "label")
        again.load(json.loads(json.dumps(labels.names)))
        assert [again.index(value, "") for value in values] == [labels.index(value, "") for value in values]


class Rows(list):
    """As data.sources gives them, of a set that knows the names of its numbers."""

    def __init__(self, rows: list[dict[str, Any]], names: list[str] | None):
        super().__init__(rows)
        self.names = names

    def class_names(self, column: str) -> list[str] | None:
        return self.names if column == "label" else None


def test_names_that_the_source_knows() -> None:
    rows = Rows([{"label": 2}, {"label": 0}, {"label": -1}, {"label": [0, 2]}, {"label": "no"}], ["no", "maybe", "yes"])
    assert list(labels_of(rows, "label")) == ["yes", "no", None, ["no", "yes"], "no"]
    assert class_names(rows, "other") is None
    values = list(labels_of(Rows(rows[:2], rows.names), "label"))
    assert learned(values, names=class_names(rows, "label")) == ["no", "maybe", "yes"]  # in the source's order


def test_missing_labels() -> None:
    rows = [{"label": ""}, {}, {"label": None}, {"label": 0}, {"label": "x"}]
    assert list(labels_of(rows, "label")) == [None, None, None, 0, "x"]
    assert all_or_none([0, "x"], [{}] * 5, "label", "train")
    assert not all_or_none([None, None], [{}] * 5, "label", "test")
    with pytest.raises(InputError, match="train, row 2: no label, but other rows have one"):
        all_or_none([0, None], [{}] * 5, "label", "train")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_by_its_formula(smoothing: float, weighted: bool) -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(7, 3)), rng.integers(0, 3, 7)
    weight = np.array([0.5, 2.0, 1.0]) if weighted else np.ones(3)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    target = (1 - smoothing) * np.eye(3)[labels] + smoothing / 3
    expected = -(target * log_p * weight).sum() / weight[labels].sum()
    given_weight = torch.tensor(weight, dtype=torch.float32) if weighted else None
    losses, counts = cross_entropy(torch.tensor(logits), torch.tensor(labels), given_weight, smoothing)
    assert mean(losses, counts).item() == pytest.approx(expected, abs=1e-6)
    assert counts.tolist() == pytest.approx(weight[labels].tolist())
    torch_mean = torch.nn.functional.cross_entropy(
        torch.tensor(logits, dtype=torch.float32), torch.tensor(labels), given_weight, label_smoothing=smoothing
    )
    torch.testing.assert_close(mean(losses, counts), torch_mean)


def test_a_batch_that_does_not_count_costs_nothing() -> None:
    """All of its labels have the weight 0: torch's own mean is not a number."""
    logits = torch.zeros(2, 2, requires_grad=True)
    loss = mean(*cross_entropy(logits, torch.tensor([0, 0]), torch.tensor([0.0, 1.0]), 0.0))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0, 0], [0, 0]]
    empty = mean(*cross_entropy(logits[:0], torch.tensor([], dtype=torch.long), None, 0.1))
    assert empty.item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_of_half_precision_is_computed_in_fp32(dtype: torch.dtype) -> None:
    losses, _ = cross_entropy(torch.tensor([[300.0, 1.0]], dtype=dtype), torch.tensor([1]), None, 0.0)
    assert losses.dtype == torch.float32
    assert losses.item() == pytest.approx(299, rel=1e-2)


def test_label_weights() -> None:
    labels = Labels()
    labels.learn(["a", "b"], "label")
    assert labels.weights(None, torch.device("cpu")) is None
    weights = labels.weights((0.5, 2.0), torch.device("cpu"))
    assert weights is not None
    assert weights.tolist() == [0.5, 2.0]
    for wrong, message in (((1.0,), "has 1 weights, but there are 2 classes: a, b"), ((1.0, -1.0), "not be negative"),
                           ((0.0, 0.0), "not all 0")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            labels.check_weights(wrong)
