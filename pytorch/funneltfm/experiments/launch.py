"""Start the experiments of a call."""

from collections.abc import Sequence

from funneltfm.experiments.registry import Experiments
from funneltfm.experiments.runner import Runner, Settings


def run(experiments: Experiments, settings: Settings, names: Sequence[str]) -> None:
    Runner(experiments, settings).run(names)
