"""Dataclass fields as flags: spellings of booleans, YAML files, what was given, what is said of a mistake."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from funneltfm.cli.flags import BadFlag, FlagParser, attribute_docs
from funneltfm.errors import InputError
from funneltfm.training.config import GROUPS, flag_fields, make_args, typed_args


@dataclass(frozen=True)
class Flags:
    """A few"""

    rate: float = 0.5
    """How fast it
    goes.
    """
    name: str | None = None
    """What it is called."""
    blocks: str = "1_1"
    """Text that looks like a number."""
    count: int = 3
    """How many."""
    kind: Literal["red", "blue"] = "red"
    """Which."""
    loud: bool = False
    """Whether it shouts."""
    quick: bool = True
    """Whether it hurries."""
    secret: int = 7
    """No flag."""


def parser() -> FlagParser:
    return FlagParser([("A few", Flags, ("secret",))], prog="funneltfm try", description="Try.")


def parse(*argv: str) -> tuple[dict, frozenset[str]]:
    one = parser()
    flags, given = one.parse(argv)
    return {name: flags[name] for name in one.flag_names}, given


DEFAULTS = {"rate": 0.5, "name": None, "blocks": "1_1", "count": 3, "kind": "red", "loud": False, "quick": True}


def test_defaults() -> None:
    assert parse() == (DEFAULTS, frozenset())


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--loud"], True),
        (["--loud=true"], True),
        (["--loud", "true"], True),
        (["--loud=True"], True),
        (["--loud=false"], False),
        (["--loud", "false"], False),
        (["--no_loud"], False),
        ([], False),
        (["--loud", "--no_loud"], False),
        (["--no_loud", "--loud"], True),
    ],
    ids=str,
)
def test_spellings_of_a_boolean(argv: list[str], value: bool) -> None:
    flags, given = parse(*argv)
    assert flags["loud"] is value
    assert given == ({"loud"} if argv else set())


def test_a_boolean_before_another_flag_takes_nothing_from_it() -> None:
    assert parse("--loud", "--count=5")[0] == DEFAULTS | {"loud": True, "count": 5}


def test_a_default_of_true_can_be_turned_off() -> None:
    assert parse("--no_quick")[0]["quick"] is False
    assert parse("--quick=false")[0]["quick"] is False


@pytest.mark.parametrize(
    ("argument", "name", "value"),
    [
        ("--rate=1e-3", "rate", 1e-3),
        ("--rate=2", "rate", 2.0),
        ("--count=12", "count", 12),
        ("--blocks=2_2", "blocks", "2_2"),
        ("--blocks=7", "blocks", "7"),
        ("--name=a b", "name", "a b"),
        ("--name=123", "name", "123"),
        ("--name=1e5", "name", "1e5"),
        ("--name=true", "name", "true"),
        ("--name=[x]", "name", "[x]"),
        ("--name={x: 1}", "name", "{x: 1}"),
        ("--name=a: b", "name", "a: b"),
        ("--name=#5", "name", "#5"),
        ("--kind=blue", "kind", "blue"),
    ],
)
def test_values(argument: str, name: str, value: object) -> None:
    flags, given = parse(argument)
    assert flags[name] == value
    assert type(flags[name]) is type(value)
    assert given == {name}


def test_the_last_of_two_wins() -> None:
    assert parse("--count=1", "--count=2")[0]["count"] == 2


def test_given_means_given_even_if_it_is_the_default() -> None:
    assert parse("--count=3")[1] == {"count"}


# ---- YAML


@pytest.fixture
def yaml(tmp_path: Path):
    def write(text: str, name: str = "my flags.yaml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize("spelling", ["separate", "joined"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_the_command_line_wins_over_the_file(yaml, spelling: str, order: str) -> None:
    path = yaml("rate: 0.25\ncount: 9\nloud: true\nkind: blue\nname: null\n")
    config = ["--config", path] if spelling == "separate" else [f"--config={path}"]
    mine = ["--count=4", "--no_loud"]
    flags, given = parse(*(config + mine if order == "before" else mine + config))
    assert flags == DEFAULTS | {"rate": 0.25, "count": 4, "kind": "blue"}
    assert given >= {"rate", "count", "loud", "kind"}
    assert "blocks" not in given


def test_two_files_the_later_wins(yaml) -> None:
    one, two = yaml("count: 1\nrate: 0.1\n", "one.yaml"), yaml("count: 2\n", "two.yaml")
    flags, _ = parse("--config", one, f"--config={two}")
    assert (flags["count"], flags["rate"]) == (2, 0.1)
    flags, _ = parse(f"--config={two}", "--config", one)
    assert flags["count"] == 1


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [("rate: 1e-3", "rate", 1e-3), ("rate: 1", "rate", 1.0), ("blocks: 2_2_2", "blocks", "2_2_2"),
     ("blocks: '2_2'", "blocks", "2_2"), ("blocks: 4", "blocks", "4"), ("name: 2024-01-02", "name", "2024-01-02"),
     ("name: 7", "name", "7"), ("loud: yes", "loud", True)],
)  # fmt: skip
def test_values_in_a_file_are_as_on_the_command_line(yaml, text: str, name: str, value: object) -> None:
    """YAML reads 2_2_2 as the number 222; the flag is text."""
    flags, _ = parse("--config", yaml(text + "\n"))
    assert flags[name] == value
    assert type(flags[name]) is type(value)


def error(*argv: str) -> str:
    with pytest.raises(BadFlag) as caught:
        parse(*argv)
    message = str(caught.value)
    assert len(message.splitlines()) == 1  # one paragraph
    assert len(message) < 2000
    return message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cuont: 5\n", "cuont"),
        ("count: [1\n", "flow sequence"),
        ("count: many\n", "count"),
        ("- 1\n- 2\n", "mapping"),
        ("just words\n", "mapping"),
        ("kind: green\n", "green"),
        ("secret: 1\n", "secret"),
        ("count: 1\ncount: 2\n", "count is there twice"),
        ("[]\n", "mapping"),
        ("[" * 5000, "recursion"),
        ('name: "\\UFFFFFFFF"\n', "cannot read"),
        ('name: "a\\0b"\n', "no text"),
        ('name: "\\uD800"\n', "no text"),
        ("? [a]\n: 1\n", "cannot read"),
        ("? " + "x" * 9000 + "\n: 1\n", "unknown flag"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_the_file(yaml, text: str, said: str) -> None:
    message = error("--config", yaml(text))
    assert said in message
    assert "my flags.yaml" in message


def test_an_empty_file_has_no_flags(yaml) -> None:
    assert parse("--config", yaml("# nothing yet\n"))[0] == DEFAULTS


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "none.yaml") in error("--config", str(tmp_path / "none.yaml"))


# ---- mistakes


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--cuont=5"], ["--cuont", "Did you mean --count?"]),
        (["--ratee", "5"], ["--ratee", "Did you mean --rate?"]),
        (["--coun=5"], ["--coun", "Did you mean --count?"]),  # no abbreviations: a new flag would change their meaning
        (["--kind=green"], ["kind", "green", "red", "blue"]),
        (["--count=many"], ["count", "many", "a whole number"]),
        (["--count=1.5"], ["count", "1.5"]),
        (["--count=1_0"], ["count", "1_0"]),
        (["--count= 1"], ["count", "whole number"]),
        (["--count=\u0661"], ["count", "whole number"]),
        ([f"--count={'9' * 5000}"], ["count", "whole number"]),
        (["--rate=1_0.5"], ["rate", "1_0.5"]),
        (["--rate=1e999"], ["rate", "1e999"]),
        (["--count"], ["--count"]),
        (["--loud=perhaps"], ["loud", "perhaps"]),
        (["--rate=nan"], ["rate", "nan"]),
        (["stray"], ["stray"]),
        (["--secret=1"], ["--secret"]),
        (["--zzz"], ["--zzz"]),
    ],
    ids=str,
)
def test_a_mistake_is_named(argv: list[str], said: list[str]) -> None:
    message = error(*argv)
    assert all(word in message for word in said), message
    assert "--help lists all flags." in message


def test_no_hint_where_nothing_is_close() -> None:
    assert "Did you mean" not in error("--zzz")


def test_attribute_docs_are_on_one_line() -> None:
    assert attribute_docs(Flags)["rate"] == "How fast it goes."


def test_every_flag_of_classify_has_a_help_text_and_a_type() -> None:
    classify = FlagParser(GROUPS, prog="funneltfm classify")
    assert classify.flag_names == list(flag_fields())
    for _, cls, skip in GROUPS:
        docs = attribute_docs(cls)
        for name in set(docs) - set(skip):
            assert docs[name].endswith("."), name
    flags, given = classify.parse([])
    assert {name: flags[name] for name in classify.flag_names} == make_args().flags()
    assert given == frozenset()


# ---- flags with several values


@dataclass(frozen=True, kw_only=True)
class Lists:
    columns: tuple[str, ...] = ("text",)
    """Columns."""
    betas: tuple[float, ...] | None = None
    """Two numbers."""
    every: int | float | None = None
    """Steps, or a share."""
    k: int = field(default=2, metadata={"alias": "-k"})
    """Neighbours."""


def lists(*words):
    parser = FlagParser([("Lists", Lists, ())], prog="test")
    flags, given = parser.parse(words)
    return flags, given


def test_a_flag_of_several_values():
    flags, given = lists("--columns", "question", "*answers", "+a:b", "--betas", ".9", "-.001")
    assert flags == {"columns": ("question", "*answers", "+a:b"), "betas": (0.9, -0.001), "every": None, "k": 2}
    assert given == {"columns", "betas"}
    assert lists("--columns=one")[0]["columns"] == ("one",)
    assert lists("-k", "5")[0]["k"] == lists("--k=5")[0]["k"] == 5
    for words in (["--columns"], ["--betas", ".9", "x"], ["--betas"]):
        with pytest.raises(BadFlag):
            lists(*words)


def test_a_whole_number_and_a_share_stay_apart():
    assert [type(lists(f"--every={text}")[0]["every"]) for text in ("1", "1.0", "0.25")] == [int, float, float]


def test_lists_in_a_config_file(tmp_path):
    path = tmp_path / "flags.yaml"
    path.write_text("columns: [a, '#5', '-x']\nbetas: [.9, -0.5]\nk: 3\n")
    flags, given = lists("--config", str(path))
    assert flags["columns"] == ("a", "#5", "-x")
    assert flags["betas"] == (0.9, -0.5)
    assert given == {"columns", "betas", "k"}
    assert lists("--config", str(path), "--columns", "b")[0]["columns"] == ("b",)
    path.write_text("columns: alone\n")
    assert lists("--config", str(path))[0]["columns"] == ("alone",)
    for text in ("betas: [.9, x]", "k: [1, 2]", "columns: [[a]]", "columns: []", "columns: {a: b}"):
        path.write_text(text)
        with pytest.raises(BadFlag, match=r"flags\.yaml"):
            lists("--config", str(path))


def test_values_given_from_python():
    args = typed_args([("Lists", Lists, ())], "test", {"columns": ["a", "b"], "betas": (1, 0.5), "every": 2})
    assert (args.columns, args.betas, args.every) == (("a", "b"), (1.0, 0.5), 2)
    assert type(args.every) is int
    assert args.flags() == {"columns": ("a", "b"), "betas": (1.0, 0.5), "every": 2, "k": 2}
    for bad in ({"columns": "a"}, {"columns": ()}, {"betas": [1, "x"]}, {"every": "2"}, {"columns": None}, {"x": 1}):
        with pytest.raises(InputError):
            typed_args([("Lists", Lists, ())], "test", bad)


def test_none_where_it_is_not_the_default() -> None:
    @dataclass(frozen=True)
    class Keep:
        """A few"""

        limit: int | None = 2
        """How many; none is all."""

    one = FlagParser([("A few", Keep, ())], prog="funneltfm try", description="Try.")
    assert one.parse(["--limit", "none"]) == ({"limit": None}, frozenset({"limit"}))
    assert one.parse(["--limit", "3"])[0] == {"limit": 3}
    with pytest.raises(BadFlag, match="expected a whole number"):
        one.parse(["--limit", "all"])
