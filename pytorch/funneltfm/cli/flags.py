"""Dataclass fields as flat command-line flags, with YAML config files, through jsonargparse."""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from typing import Any, get_args, get_origin

import docstring_parser
from jsonargparse import ActionYesNo, ArgumentParser, Namespace

Group = tuple[str, type, tuple[str, ...]]


class FlagParser(ArgumentParser):
    """A parser of flat flags made from dataclasses.

    groups: (title, dataclass, names to leave out). A field's attribute docstring is its help, its default the flag's.
    bool fields take `--name`, `--name=true|false` or `--no_name`. `--config file.yaml` gives flags too; flags
    given after it win.
    """

    def __init__(self, groups: Sequence[Group], config_file: bool = True, **kwargs: Any):
        super().__init__(default_env=False, **({"usage": f"{kwargs['prog']} [flags]"} | kwargs))
        if config_file:
            self.add_argument("--config", action="config", help="YAML file of flags; those on the command line win.")
        self.flag_names: list[str] = []
        self.switches: set[str] = set()  # bool flags; written alone they take no value from the next word
        for title, cls, skip in groups:
            group = self.add_argument_group(title)
            docs = attribute_docs(cls)
            for field in dataclasses.fields(cls):
                if field.name in skip:
                    continue
                name = field.name.rstrip("_")  # from_: a field's name must not be a keyword
                self.flag_names.append(name)
                extra: dict[str, Any] = {"default": field.default, "help": docs[field.name]}
                if field.type is bool:
                    extra |= {"action": ActionYesNo(no_prefix="no_"), "nargs": "?"}
                    self.switches |= {f"--{name}", f"--no_{name}"}
                elif get_origin(field.type) is not None and not _optional(field.type):
                    extra["choices"] = list(get_args(field.type))
                else:
                    extra["type"] = field.type
                group.add_argument(f"--{name}", **extra)

    def parse(self, argv: Sequence[str]) -> tuple[Namespace, frozenset[str]]:
        """All flags, and the names of those that were given (on the command line or in a config file)."""
        followed = zip(argv, [*argv[1:], ""], strict=True)
        alone = [word in self.switches and after not in ("true", "false", "yes", "no") for word, after in followed]
        argv = _config_first([f"{word}=true" if is_alone else word for word, is_alone in zip(argv, alone, strict=True)])
        flags = self.parse_args(argv)
        given = self.parse_args(argv, defaults=False)
        return flags, frozenset(name for name in self.flag_names if name in given)

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        """One paragraph, with the closest flag where one was misspelt; exit code 2."""
        words = [
            re.split("[=:]", word)[0].lstrip("-") for word in message.replace("'", " ").split() if word.startswith("--")
        ]
        unknown = [word for word in words if word not in self.flag_names]
        close = [match for word in unknown for match in difflib.get_close_matches(word, self.flag_names, n=1)]
        hint = f" Did you mean --{', --'.join(close)}?" if close else ""
        text = " ".join(message.split())
        self.exit(2, f"{self.prog}: error: {text.rstrip('.')}.{hint} --help lists all flags.\n")


def _config_first(argv: Sequence[str]) -> list[str]:
    """The command line with --config in front, since what comes later wins."""
    config: list[str] = []
    rest = list(argv)
    for i in reversed(range(len(rest))):
        if rest[i] == "--config":
            config[:0] = rest[i : i + 2]
            del rest[i : i + 2]
        elif rest[i].startswith("--config="):
            config.insert(0, rest.pop(i))
    return config + rest


def _optional(annotation: Any) -> bool:
    return type(None) in get_args(annotation)


def attribute_docs(cls: type) -> dict[str, str]:
    """The strings below a dataclass's fields, by field."""
    params = docstring_parser.parse_from_object(cls).params
    return {param.arg_name: " ".join((param.description or "").split()) for param in params}
