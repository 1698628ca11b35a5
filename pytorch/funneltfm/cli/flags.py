"""Dataclass fields as flat command-line flags, with YAML files of flags.

argparse, not a parser that reads values as YAML: `--text_a=#5` and `block_size: 2_2_2` are text and stay so.
"""

import argparse
import dataclasses
import difflib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, get_args

import docstring_parser

from funneltfm.errors import InputError, brief
from funneltfm.training.config import Group, choices, item_type, other_names, read_yaml

_BOOL = {"true": True, "yes": True, "false": False, "no": False}


class FlagParser(argparse.ArgumentParser):
    """A parser of flat flags made from dataclasses.

    groups: (title, dataclass, names to leave out). A field's attribute docstring is its help, its default the flag's.
    bool fields take `--name`, `--name=true|false` or `--no_name`; tuple[T, ...] fields take several values, and lists
    in files; a field's metadata may name a second way to write it, {"alias": "-k"}; where None is allowed and not the
    default, it is written `none`. With config_file, `--config file.yaml` gives flags too; those on the command line
    win. elsewhere: what to say of names that people look for here.
    """

    debug = False  # of the last command line that was parsed: whether errors show their traceback

    def __init__(
        self,
        groups: Sequence[Group],
        config_file: bool = True,
        elsewhere: Mapping[str, str] = MappingProxyType({}),
        **kwargs: Any,
    ):
        self.elsewhere = elsewhere
        super().__init__(allow_abbrev=False, **({"usage": f"{kwargs['prog']} [flags]"} | kwargs))
        self.defaults: dict[str, Any] = {}
        self._item_readers: dict[str, Callable[[str], Any]] = {}  # of flags that take several values
        self._switches: set[str] = set()
        self.other_names = other_names(groups)
        if config_file:
            text = "YAML file of flags; those on the command line win"
            self.add_argument("--config", action="append", metavar="FILE", default=argparse.SUPPRESS, help=text)
        for title, cls, skip in groups:
            group = self.add_argument_group(title)
            docs = attribute_docs(cls)
            for field in dataclasses.fields(cls):
                if field.name not in skip:
                    self._add(group, field, docs[field.name])

    def _add(self, group: Any, field: dataclasses.Field, text: str) -> None:
        name = field.name.rstrip("_")  # from_: a field's name must not be a keyword
        self.defaults[name] = field.default
        shown = str(field.default).lower() if field.type is bool or field.default is None else field.default
        shown = " ".join(map(str, shown)) if isinstance(shown, tuple) else shown
        text += f" (default: {shown if shown != '' else 'none'})"
        # Absent unless given: this is how we know which flags were.
        common: dict[str, Any] = {"dest": name, "help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
        kinds = [kind for kind in get_args(field.type) if kind is not type(None)]
        names = [f"--{name}", *filter(None, [field.metadata.get("alias")])]
        if (item := item_type(field.type)) is not None:
            read, metavar = _reader([item])
            self._item_readers[name] = read
            group.add_argument(*names, nargs="+", type=read, metavar=metavar, **common)
        elif bool in (field.type, *kinds):
            self._switches |= {f"--{name}", f"--no_{name}"}
            group.add_argument(f"--{name}", type=_bool, nargs="?", const=True, metavar="true|false", **common)
            hidden = common | {"help": argparse.SUPPRESS}
            group.add_argument(f"--no_{name}", action="store_false", **hidden)
        elif (words := choices(field.type)) is not None:
            group.add_argument(*names, choices=words, **common)
        else:
            read, metavar = _reader(kinds or [field.type])
            if field.default is not None and len(kinds) < len(get_args(field.type)):
                read, metavar = _or_none(read), f"{metavar}|none"
            group.add_argument(*names, type=read, metavar=metavar, **common)

    @property
    def flag_names(self) -> list[str]:
        return list(self.defaults)

    def parse(self, argv: Sequence[str]) -> tuple[dict[str, Any], frozenset[str]]:
        """All flags (and positional arguments) by name, and the names of those that were given on purpose.

        A flag in a config file that says what is the default anyway does not count as given.
        """
        argv = self._separate_switches(argv)
        on_line = self._values(argv)
        in_file: dict[str, Any] = {}
        for path in on_line.pop("config", None) or ():
            in_file |= self._read_config(Path(path))
        changed = {name for name, value in in_file.items() if value != self.defaults[name]}
        flags = self.defaults | in_file | on_line
        FlagParser.debug = bool(flags.get("debug"))
        return flags, frozenset(changed | (on_line.keys() & self.defaults.keys()))

    def _values(self, words: Sequence[str]) -> dict[str, Any]:
        values = vars(self.parse_args(words))
        return values | {name: tuple(values[name]) for name in self._item_readers.keys() & values.keys()}

    def _separate_switches(self, argv: Sequence[str]) -> list[str]:
        """`--cased file` -> `--cased=true file`: a switch takes the next word only if that is a truth value."""
        words = list(argv)
        for i, word in enumerate(words):
            after = words[i + 1] if i + 1 < len(words) else ""
            if word in self._switches and not word.startswith("--no_") and after.lower() not in _BOOL:
                words[i] = f"{word}=true"
        return words

    def _read_config(self, path: Path) -> dict[str, Any]:
        """A file of flags. Its values are read as text, then as the flags' own types, like words of the command
        line.
        """
        try:
            content = read_yaml(path, "the config file", "BaseLoader")
        except InputError as error:
            raise BadFlag(str(error)) from error
        content = {} if content is None else content
        if not isinstance(content, dict):
            raise BadFlag(f"the config file {path} must hold a mapping: `name: value` lines, one for each flag.")
        words, lists = [], {}
        if twice := [name for name in content if self.other_names.get(name) in content]:
            raise BadFlag(f"the config file {path} gives {twice[0]} twice: {self.other_names[twice[0]]} is the same.")
        for given, value in content.items():
            name = self.other_names.get(given, given)
            if name not in self.defaults:
                raise BadFlag(f"the config file {path} has the unknown flag {brief(name)!r}.{self._close([name])}")
            if isinstance(value, list) and name in self._item_readers and value:
                lists[name] = tuple(self._read_item(path, name, item) for item in value)
                continue
            if not isinstance(value, str):
                raise BadFlag(f"the config file {path} gives {name} a {type(value).__name__}; expected one value.")
            if value in ("", "null", "~"):
                if self.defaults[name] not in (None, ""):
                    raise BadFlag(f"the config file {path} gives {name} no value.")
                continue
            if not _is_word(value):
                raise BadFlag(f"the config file {path} gives {name} what is no text: {brief(ascii(value))}.")
            words.append(f"--{name}={value}")
        try:
            return self._values(words) | lists
        except BadFlag as error:
            raise BadFlag(f"in the config file {path}: {error}") from None

    def _read_item(self, path: Path, name: str, item: Any) -> Any:
        if not isinstance(item, str) or not _is_word(item):
            raise BadFlag(f"the config file {path} gives {name} a list with {brief(ascii(item))}; expected values.")
        try:
            return self._item_readers[name](item)
        except argparse.ArgumentTypeError as error:
            raise BadFlag(f"in the config file {path}: {name}: {error}") from None

    def error(self, message: str) -> NoReturn:
        """Raise BadFlag: one paragraph, with the closest flag where one was misspelt."""
        unknown = re.findall(r"--(\w+)", message) if "unrecognized" in message else []
        unknown += re.findall(r"invalid choice: '(\w+)'", message)
        raise BadFlag(f"{brief(message.rstrip('.'), 1000)}.{self._close(unknown)} --help lists all flags.")

    def _close(self, names: Sequence[str]) -> str:
        if told := [f" {name}: {self.elsewhere[name]}." for name in names if name in self.elsewhere]:
            return "".join(told)
        close = [match for name in names for match in difflib.get_close_matches(name, self.defaults, n=1)]
        return f" Did you mean --{', --'.join(close)}?" if close else ""


class BadFlag(InputError):
    """A command line that cannot be understood."""


def _is_word(text: str) -> bool:
    """Whether a text could be a word of a command line; files and folders cannot have other names."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _bool(text: str) -> bool:
    if text.lower() not in _BOOL:
        raise argparse.ArgumentTypeError(f"expected true or false, got {brief(repr(text))}")
    return _BOOL[text.lower()]


# int and float alone would also take 1_000, blanks around, and digits of other scripts.
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,100}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def whole_number(text: str) -> int:
    """As in 12 or -3."""
    if not _WHOLE_NUMBER.fullmatch(text):
        raise argparse.ArgumentTypeError(f"expected a whole number, got {brief(repr(text))}")
    return int(text)


def _number(text: str) -> float:
    if not _NUMBER.fullmatch(text) or not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"expected a number, got {brief(repr(text))}")
    return float(text)


def _whole_or_number(text: str) -> int | float:
    return int(text) if _WHOLE_NUMBER.fullmatch(text) else _number(text)


def _reader(kinds: Sequence[Any]) -> tuple[Callable[[str], Any], str]:
    """What reads a word as one of these types, and what the help calls it."""
    if int in kinds and float in kinds:
        return _whole_or_number, "N|X"
    return {int: (whole_number, "N"), float: (_number, "X")}.get(kinds[0], (kinds[0], "TEXT"))


def _or_none(read: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text == "none" else read(text)


def attribute_docs(cls: type) -> dict[str, str]:
    """The strings below a dataclass's fields, by field, each on one line."""
    params = docstring_parser.parse_from_object(cls).params
    return {param.arg_name: " ".join((param.description or "").split()) for param in params}
