"""Experiments by name: YAML files in which one extends another.

    name:
      about: one line for --list
      extends: another, or several (the later wins)
      stages: {pretrain: {flags of funneltfm train}, ...}    run in this order
      glue: ...                                              finetuning on GLUE (experiments.glue)
      search: ...                                            a search for hyper-parameters (experiments.search)
      data: where to get what is in {data_dir}
      original: the numbers of the project that it repeats
      grid: [{label: part of an experiment, ...}, ...]       one experiment for each combination, NAME-LABEL-LABEL

Mappings are merged key by key, all else is replaced, and null removes a key. `about` and `original` are not inherited.
A name that begins with _ is there to be extended alone.
"""

import difflib
import fnmatch
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from funneltfm.errors import InputError, brief
from funneltfm.training.config import flag_fields, item_type, read_yaml
from funneltfm.training.train_config import TRAIN_GROUPS

SHIPPED = Path(__file__).parent
_OWN = ("about", "original")  # not inherited
_NAME = re.compile(r"[\w.+=-]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
# Keys of a stage that are no flags of `funneltfm train`.
STAGE_KEYS = ("global_batch_size",)


@dataclass(frozen=True)
class Experiment:
    """One experiment, with all that it extends merged in."""

    name: str
    about: str = ""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    glue: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    data: str = ""
    original: dict[str, Any] = field(default_factory=dict)

    def run_name(self, stage: str) -> str:
        """The name of a stage's run: the experiment's own where there is one stage."""
        return self.name if len(self.stages) == 1 else f"{self.name}-{stage}"


_KEYS = {
    "about": str,
    "extends": (str, list),
    "stages": dict,
    "glue": dict,
    "search": dict,
    "data": str,
    "original": dict,
    "grid": list,
}


class Experiments:
    """All experiments of some YAML files.

    Raises InputError for a file, an experiment or a key that cannot be used; what extends what is checked when it is
    asked for.
    """

    def __init__(self, files: Iterable[str | Path] = ()):
        self._parts: dict[str, list[tuple[str, dict[str, Any]]]] = {}  # name -> parts to merge, with their places
        self.grids: dict[str, list[str]] = {}  # names that a grid stands for, by "NAME-{LABEL,LABEL}-..."
        for path in [*sorted(SHIPPED.glob("*.yaml")), *map(Path, files)]:
            content = read_yaml(path, "the experiments in")
            if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
                raise InputError(f"{path} must hold a mapping: names, and under each an experiment.")
            for name, raw in content.items():
                self._add(path, name, raw)

    def _add(self, path: Path, name: str, raw: Any) -> None:
        where = f"{path}: {name}"
        if not _NAME.fullmatch(name):
            raise InputError(f"{path}: a name has letters, digits and . _ - + = alone; got {name!r}.")
        if name in self._parts:
            raise InputError(f"{path}: there is an experiment {name} already. Give another name, and extend that one.")
        _check_part(where, raw)
        grid = raw.get("grid", [])
        if not grid:
            self._parts[name] = [(where, raw)]
        for axis in grid:
            if not isinstance(axis, dict) or not axis:
                raise InputError(f"{where}: an axis of grid is a mapping of labels to parts; got {brief(repr(axis))}.")
            for label, part in axis.items():
                _check_part(f"{where}: grid: {label}", {} if part is None else part)
        if grid:
            axes = ["{" + ",".join(map(str, axis)) + "}" for axis in grid]
            made = self.grids["-".join([name, *axes])] = list[str]()
        for labels in itertools.product(*grid) if grid else ():
            parts = [(where, axis[label] or {}) for axis, label in zip(grid, labels, strict=True)]
            full = "-".join([name, *map(str, labels)])
            if full in self._parts:
                raise InputError(f"{where}: its grid makes {full}, which is there already.")
            self._parts[full] = [(where, raw), *parts]
            made.append(full)

    @property
    def names(self) -> list[str]:
        """What can be run."""
        return [name for name in self._parts if not name.startswith("_")]

    def select(self, patterns: Sequence[str]) -> list[str]:
        """Names by names and globs, each once, in the order asked for."""
        found: dict[str, None] = {}
        for pattern in patterns:
            matches = [pattern] if pattern in self.names else fnmatch.filter(self.names, pattern)
            if not matches:
                raise self._unknown(pattern)
            found |= dict.fromkeys(matches)
        return list(found)

    def _unknown(self, name: str) -> InputError:
        close = difflib.get_close_matches(name, self.names, n=3)
        hint = f" Did you mean {', '.join(close)}?" if close else ""
        return InputError(f"there is no experiment {name!r}.{hint} --list shows all; --file adds a file of your own.")

    def get(self, name: str) -> Experiment:
        if name not in self.names:
            raise self._unknown(name)
        merged = _without_null(self._merged(name, ()))
        stages = {stage: typed(flags, f"{name}: {stage}") for stage, flags in merged.pop("stages", {}).items()}
        if not (stages or "glue" in merged or "search" in merged):
            raise InputError(f"the experiment {name} has neither stages nor glue nor search: there is nothing to run.")
        return Experiment(name, stages=stages, **merged)

    def _merged(self, name: str, trail: tuple[str, ...]) -> dict[str, Any]:
        if name in trail:
            raise InputError(f"experiments extend each other in a circle: {' -> '.join((*trail, name))}.")
        merged: dict[str, Any] = {}
        for where, part in self._parts[name]:
            parents = part.get("extends", [])
            for parent in [parents] if isinstance(parents, str) else parents:
                if parent not in self._parts:
                    close = difflib.get_close_matches(str(parent), self._parts, n=1)
                    hint = f" Did you mean {close[0]}?" if close else ""
                    raise InputError(f"{where}: extends {parent!r}, which is not there.{hint}")
                inherited = self._merged(parent, (*trail, name))
                merged = merge(merged, {key: value for key, value in inherited.items() if key not in _OWN})
            merged = merge(merged, {key: value for key, value in part.items() if key not in ("extends", "grid")})
        return merged


def _check_part(where: str, raw: Any) -> None:
    if not isinstance(raw, dict):
        raise InputError(f"{where} must be a mapping with some of {', '.join(_KEYS)}; got {brief(repr(raw))}.")
    for key, value in raw.items():
        if key not in _KEYS:
            close = difflib.get_close_matches(str(key), _KEYS, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise InputError(f"{where}: unknown key {key!r}; an experiment has {', '.join(_KEYS)}.{hint}")
        if value is not None and not isinstance(value, _KEYS[key]):  # type: ignore[arg-type]
            raise InputError(f"{where}: {key} must be {_a(_KEYS[key])}; got {brief(repr(value))}.")
    for stage, flags in (raw.get("stages") or {}).items():
        if not _NAME.fullmatch(str(stage)) or not isinstance(flags, dict | None):
            raise InputError(f"{where}: stages: {stage} must be a mapping of flags; got {brief(repr(flags))}.")


def _a(kind: Any) -> str:
    names = {str: "text", dict: "a mapping", list: "a list"}
    return " or ".join(names[one] for one in (kind if isinstance(kind, tuple) else (kind,)))


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`: mappings key by key, all else replaced.

    >>> merge({"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 3, "c": None}, "d": [2]})
    {'a': {'b': 3, 'c': None}, 'd': [2]}
    """
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(old, Mapping)
        merged[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _without_null(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_null(value) if isinstance(value, Mapping) else value
        for key, value in mapping.items()
        if value is not None
    }


def typed(flags: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Flags of a stage. YAML 1.1 takes 1e-4 for text; where the flag is a number it is one here, and `none` is None."""
    fields = flag_fields(TRAIN_GROUPS)
    for name in flags:
        if name not in fields and name not in STAGE_KEYS:
            close = difflib.get_close_matches(str(name), [*fields, *STAGE_KEYS], n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise InputError(f"{where}: {name!r} is no flag of `funneltfm train`.{hint}")
    return {name: _number(fields[name].type, value) if name in fields else value for name, value in flags.items()}


def _number(kind: Any, value: Any) -> Any:
    item = item_type(kind)
    if item is not None and isinstance(value, list):
        return [_number(item, one) for one in value]
    if item is not None and not isinstance(value, list):
        return [_number(item, value)]  # one value for a flag that takes several
    kinds = get_args(kind) or (kind,)
    if value == "none" and type(None) in kinds and str not in kinds:  # as on the command line: null removes a key
        return None
    is_float = float in kinds
    return float(value) if is_float and isinstance(value, str) and _NUMBER.fullmatch(value) else value
