"""How long a fresh process takes to its first line of work."""

import argparse
import os
import resource
import subprocess
import sys
import time
from typing import Any

from .measure import summary
from .texts import ROOT

COMMANDS = {
    "python": ["-c", ""],
    "import torch": ["-c", "import torch"],
    "import modeling": ["-c", "import modeling"],
    "funneltfm --help": ["-m", "funneltfm", "--help"],
    "funneltfm classify --help": ["-m", "funneltfm", "classify", "--help"],
    "import funneltfm.training.classify": ["-c", "import funneltfm.training.classify"],
    "transformers: FunnelModel": ["-c", "from transformers import FunnelModel"],
}


def prepare(flags: argparse.Namespace) -> None:
    """Nothing to fill in."""


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "pytorch")}
    taken: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in COMMANDS}

    def run(name: str) -> tuple[float, float]:
        before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([sys.executable, *COMMANDS[name]], check=True, capture_output=True, env=environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.perf_counter() - wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    for turn in range(flags.reps + 1):
        for name in COMMANDS:
            wall, cpu = run(name)
            if turn:
                taken[name]["wall"].append(wall)
                taken[name]["cpu"].append(cpu)
    return {"rows": [{"contender": name, **summary(times)} for name, times in taken.items()]}
