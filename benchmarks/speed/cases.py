"""What is measured: one entry of CASES each."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import models, startup, texts


@dataclass(frozen=True)
class Case:
    prepare: Callable[[argparse.Namespace], None]
    """Fills in the flags' defaults."""
    measure: Callable[[argparse.Namespace], dict[str, Any]]
    """Returns "rows", one for each contender and size, and what else belongs into the JSON file."""
    child: Callable[[argparse.Namespace], Any]
    """What a process of its own measures, given flags.child."""
    columns: dict[str, str]
    """Of the printed table: key of a row -> format."""
    panels: dict[str, str]
    """Of the plot: key of a row -> label."""
    profile: Callable[[argparse.Namespace], None] | None = None
    """Prints where the time goes."""
    over: str | None = None
    """The key of a row that the plot's lines run over."""


def alone(flags: argparse.Namespace) -> None:
    raise SystemExit("this case measures nothing in processes of their own")


_MODEL_COLUMNS = {
    "size": "", "contender": "", "wall_s": ".3f", "cpu_s": ".3f", "spread": ".0%", "speedup": ".2f", "peak_mib": ".0f",
    "gflop": ".1f", "of_best": ".2f",
}  # fmt: skip
_RATE_COLUMNS = {
    "contender": "", "wall_s": ".2f", "cpu_s": ".2f", "spread": ".0%", "per_s": ".1f", "per_cpu_s": ".1f",
    "vs_padded": ".2f", "vs_dynamic": ".2f",
}  # fmt: skip
_MODEL_PANELS = {"cpu_s": "CPU seconds", "wall_s": "seconds", "peak_mib": "peak MiB above the weights"}

CASES = {
    "funnel_forward": Case(
        models.prepare_forward, models.measure, models.child, _MODEL_COLUMNS, _MODEL_PANELS, models.profile
    ),
    "funnel_train_step": Case(
        models.prepare_train_step, models.measure, models.child, _MODEL_COLUMNS, _MODEL_PANELS, models.profile
    ),
    "scaling": Case(
        models.prepare_scaling, models.measure, models.child, _MODEL_COLUMNS,
        {"cpu_s": "CPU seconds", "peak_mib": "peak MiB above the weights"}, models.profile, over="tokens",
    ),
    "finetune_epoch": Case(
        texts.prepare, texts.finetune_epoch, alone, _RATE_COLUMNS | {"epoch_s": ".0f"},
        {"per_cpu_s": "sentences per CPU second", "per_s": "sentences per second"},
    ),
    "predict_throughput": Case(
        texts.prepare, texts.predict_throughput, alone, _RATE_COLUMNS,
        {"per_cpu_s": "sentences per CPU second", "per_s": "sentences per second"},
    ),
    "tokenize": Case(
        texts.prepare, texts.tokenize, alone,
        {"contender": "", "wall_s": ".3f", "cpu_s": ".3f", "spread": ".0%", "per_s": ".0f"},
        {"per_s": "sentences per second"},
    ),
    "startup": Case(
        startup.prepare, startup.measure, alone, {"contender": "", "wall_s": ".2f", "cpu_s": ".2f"},
        {"wall_s": "seconds", "cpu_s": "CPU seconds"},
    ),
}  # fmt: skip
