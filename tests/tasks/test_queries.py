import numpy as np
import pytest

from funneltfm.data.features import Features
from funneltfm.errors import InputError
from funneltfm.tasks.queries import check_answerable, mark_answerable, query_numbers, ranked, right_labels


def test_query_numbers_by_appearance():
    rows = [{"id": value} for value in (7, "7", 3, 7)]
    assert query_numbers(rows, "abca", None, "data").tolist() == [0, 1, 2, 0]
    assert query_numbers(rows, "aaaa", "id", "data").tolist() == [0, 1, 2, 0]
    for bad in (None, ["7"], {}):
        with pytest.raises(InputError, match=r"data, row 2: id must name the query"):
            query_numbers([{"id": 1}, {"id": bad}], "ab", "id", "data")


def test_labels_are_all_there_or_none():
    assert right_labels([{}, {"label": None}], "label", "data") is None
    assert right_labels([{"label": "1"}, {"label": 0.0}], "label", "data").tolist() == [1, 0]
    for bad in (-1, 0.5, "01", [1], "true"):
        with pytest.raises(InputError, match=r"data, row 1: label must be 1 for a right candidate"):
            right_labels([{"label": bad}], "label", "data")


def test_a_part_of_the_data_knows_which_of_its_queries_have_an_answer():
    examples = [{"row": i, "input_ids": [1]} for i in range(4)]
    mark_answerable(examples, [0, 1, 0, 1], [False, False, True, False])
    features = Features.of(examples)
    assert features.plain["answerable"].tolist() == [True, False, True, False]
    check_answerable(features.take([0]), [], "error")
    check_answerable(features, [], "skip")
    with pytest.raises(InputError, match="row 2: its query has no right candidate"):
        check_answerable(features, [], "error")
    one = ranked(("ndcg",), np.array([0.5]), np.array([0]), np.array([0]), "error")
    assert one["ndcg"] == 0.0
