"""What can be asked for, and how many weights it leaves on."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from funneltfm.errors import InputError
from funneltfm.sparse.config import Room, SparsityConfig, allocate, total_on


def room(rows: int, columns: int, name: str = "w", groups: int = 1, unit_size: int = 1) -> Room:
    return Room((name,), (rows, columns), groups, rows * columns // groups // unit_size, unit_size)


def on(rooms: list[Room], counts: list[int]) -> int:
    return sum(room.quantum * count for room, count in zip(rooms, counts, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "sparsity must be the share"),
        ({"sparsity": 1.0}, "from 0 to below 1; got 1.0"),
        ({"sparsity": -0.1}, "from 0 to below 1; got -0.1"),
        ({"sparsity": "0.8"}, "from 0 to below 1; got '0.8'"),
        ({"sparsity": True}, "from 0 to below 1; got True"),
        ({"sparsity": 0.8, "distribution": "erdos"}, "distribution must be one of uniform, erk, global"),
        ({"sparsity": 0.8, "distribution": {"*": 1.5}}, r"distribution\['\*'\] must be the share"),
        ({"sparsity": 0.8, "count": "all"}, "count must be one of"),
        ({"sparsity": 0.8, "init": "zero"}, "init must be one of"),
        ({"sparsity": 0.8, "pattern": "4:2"}, "pattern must be"),
        ({"sparsity": 0.8, "include": "*encoder*"}, "include must be a list of globs"),
        ({"sparsity": 0.8, "pattern": "2:4"}, "fixes the sparsity of every matrix at 0.5"),
        ({"pattern": "2:4", "count": "model"}, "fixes the sparsity"),
        ({"pattern": "2:4", "distribution": "erk"}, "fixes the sparsity"),
        ({"sparsity": 0.8, "distribution": "global"}, "give init='magnitude'"),
        (
            {"sparsity": 0.8, "distribution": "global", "init": "magnitude", "pattern": "constant_fan_in"},
            "lets them move freely",
        ),
        ({"sparsity": 0.8, "init": "magnitude", "rescale": True}, "rescale is for fresh weights"),
    ],
)
def test_what_cannot_be_asked_for(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SparsityConfig(**settings)


def test_n_of_m_knows_its_sparsity() -> None:
    assert SparsityConfig(pattern="1:4").sparsity == 0.75
    assert SparsityConfig(pattern="2:4", sparsity=0.5).sparsity == 0.5


def test_a_config_survives_json() -> None:
    config = SparsityConfig(
        sparsity=0.8, include=["*encoder*"], exclude=("*pooler*",), distribution={"*query*": 0.5}, seed=7
    )
    assert SparsityConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_what_is_selected() -> None:
    config = SparsityConfig(sparsity=0.8, include=["encoder.*"], exclude=["*.key.*"])
    assert config.selects(("encoder.query.weight",), embedding=False)
    assert not config.selects(("encoder.key.weight",), embedding=False)
    assert not config.selects(("head.weight",), embedding=False)
    assert not config.selects(("encoder.table.weight",), embedding=True)
    tied = ("encoder.table.weight", "head.weight")
    assert SparsityConfig(sparsity=0.8, embeddings=True, include=["head.*"]).selects(tied, embedding=True)
    assert not SparsityConfig(sparsity=0.8, embeddings=True, exclude=["head.*"]).selects(tied, embedding=True)


# ---- allocation


def allocated(rooms: list[Room], config: SparsityConfig, size: int) -> list[int] | None:
    """None where a matrix would have no weight on."""
    try:
        return allocate(rooms, config, size)
    except InputError as error:
        if "no weight that is on" not in str(error):
            raise
        return None


SIZES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6)


@given(SIZES, st.floats(0, 0.99))
def test_uniform_is_nearest_in_every_matrix(sizes: list[tuple[int, int]], sparsity: float) -> None:
    rooms = [room(*size) for size in sizes]
    counts = allocated(rooms, SparsityConfig(sparsity=sparsity), 10**6)
    if counts is None:
        assert any(round((1 - sparsity) * one.size) == 0 for one in rooms)
        return
    for one, count in zip(rooms, counts, strict=True):
        assert abs(count - (1 - sparsity) * one.size) <= 0.5


@given(SIZES, st.floats(0, 0.99), st.sampled_from(["uniform", "erk"]), st.integers(0, 500))
def test_totals_are_exact(sizes: list[tuple[int, int]], sparsity: float, distribution: str, dense: int) -> None:
    rooms = [room(*size) for size in sizes]
    size = sum(one.size for one in rooms)
    config = SparsityConfig(sparsity=sparsity, distribution=distribution, count="model")
    target = round((1 - sparsity) * (size + dense))
    if target < dense:
        with pytest.raises(InputError, match="the whole model cannot have the sparsity"):
            allocate(rooms, config, size + dense)
        return
    counts = allocated(rooms, config, size + dense)
    if counts is None:
        return
    assert on(rooms, counts) + dense == target == total_on(rooms, config, size + dense) + dense
    assert all(0 < count <= one.units for one, count in zip(rooms, counts, strict=True))


@given(SIZES, st.floats(0, 0.95), st.sampled_from(["uniform", "erk"]))
def test_rows_that_move_as_one_come_as_near_as_they_can(
    sizes: list[tuple[int, int]], sparsity: float, distribution: str
) -> None:
    rooms = [room(rows, columns, groups=rows) for rows, columns in sizes]
    size = sum(one.size for one in rooms)
    counts = allocated(rooms, SparsityConfig(sparsity=sparsity, distribution=distribution, count="model"), size)
    if counts is None:
        return
    missing = round((1 - sparsity) * size) - on(rooms, counts)
    can_move = [one.quantum for one, count in zip(rooms, counts, strict=True) if count < one.units]
    assert 0 <= missing < max(can_move, default=1)


def test_erk_is_in_proportion_to_the_sum_over_the_product() -> None:
    rooms = [room(100, 100), room(400, 100), room(300, 20)]
    counts = allocate(rooms, SparsityConfig(sparsity=0.9, distribution="erk"), 0)
    assert on(rooms, counts) == round(0.1 * sum(one.size for one in rooms))
    scales = [
        count / one.size * (one.dims[0] * one.dims[1]) / sum(one.dims) for one, count in zip(rooms, counts, strict=True)
    ]
    assert max(scales) / min(scales) == pytest.approx(1, abs=2e-3)


def test_erk_makes_no_matrix_denser_than_dense() -> None:
    rooms = [room(2, 2), room(200, 200)]
    counts = allocate(rooms, SparsityConfig(sparsity=0.5, distribution="erk"), 0)
    assert counts == [4, round(0.5 * 40004) - 4]


def test_sparsities_by_glob() -> None:
    rooms = [room(10, 10, "a.query"), room(10, 10, "a.key"), room(10, 10, "b.out")]
    config = SparsityConfig(sparsity=0.8, distribution={"*.query": 0.5, "a.*": 0.9})
    assert allocate(rooms, config, 0) == [50, 10, 20]
    globs = {"*.query": 0.5, "a.*": 0.9}
    # 93 of 310 parameters stay on, 10 of them without a mask; the last matrix makes up for the others.
    assert allocate(rooms, SparsityConfig(sparsity=0.7, distribution=globs, count="model"), 310) == [50, 10, 23]
    with pytest.raises(InputError, match="leave -8 weights on for the 1 matrices without one"):
        allocate(rooms, SparsityConfig(sparsity=0.8, distribution=globs, count="model"), 310)


@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 0.95},
        {"sparsity": 0.95, "count": "model"},
        {"sparsity": 0.5, "distribution": {"big": 0.5, "*": 0.95}},
    ],
)
def test_no_matrix_is_all_off(settings: dict[str, Any]) -> None:
    """Four blocks of 16x16 at 95 % are 0.2 of a block."""
    rooms = [room(320, 320, "big", unit_size=256), room(32, 32, "small", unit_size=256)]
    with pytest.raises(
        InputError, match=r"the sparsity 0\.95 leaves small no weight .* 1024 weights .* 256 at a time in"
    ):
        allocate(rooms, SparsityConfig(pattern="16x16", **settings), 320 * 320 + 32 * 32)


def test_the_original_s_80_percent() -> None:
    """Encoder and word table of BERT-base at exactly 80 % each leave the whole at 79.6 %; count="model" does not."""
    hidden, inner, words, size = 768, 3072, 28996, 107_719_680
    rooms = [room(hidden, hidden) for _ in range(48)] + [room(inner, hidden) for _ in range(24)] + [room(words, hidden)]
    module = allocate(rooms, SparsityConfig(sparsity=0.8), size)
    dense = size - sum(one.size for one in rooms)
    assert 1 - (on(rooms, module) + dense) / size == pytest.approx(0.796, abs=5e-4)
    model = allocate(rooms, SparsityConfig(sparsity=0.8, count="model"), size)
    assert on(rooms, model) + dense == round(0.2 * size)
