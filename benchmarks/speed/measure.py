"""Clocks and memory."""

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .contenders import PRECISIONS, precision, wait

MIB = 2**20


def take_turns(
    steps: dict[str, Callable[[], Any]], reps: int, seconds: float = 1e9, warmup: int = 1, least: int = 3
) -> dict[str, dict[str, Any]]:
    """Every step once in each round, after warm-up rounds that do not count, so that what disturbs the machine disturbs
    all. A step that returns `Seconds` has taken its own time. It stops after `reps` rounds, or after `seconds`, but not
    before round `least`.

    Returns for each step the medians and quartiles of its seconds, of the wall clock and of this process's CPUs.
    """
    taken: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in steps}
    start = time.perf_counter()
    for turn in range(reps + warmup):
        if turn >= warmup + min(least, reps) and time.perf_counter() - start > seconds:
            break
        for name, step in steps.items():
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            own = step()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if isinstance(own, Seconds):
                wall, cpu = own
            if turn >= warmup:
                taken[name]["wall"].append(wall)
                taken[name]["cpu"].append(cpu)
    return {name: summary(times) for name, times in taken.items()}


class Seconds(NamedTuple):
    wall: float
    cpu: float


class AfterFirstStep:
    """Seconds from the end of the first optimizer step on, for so many sentences as are wanted."""

    def __init__(self, wanted: int):
        self.wanted, self.sentences = wanted, 0
        self.start: tuple[float, float] | None = None

    def step_done(self, sentences: int) -> None:
        if self.start is None:
            self.start = time.perf_counter(), time.process_time()
        else:
            self.sentences += sentences

    def seconds(self) -> Seconds:
        assert self.start is not None
        wall, cpu = self.start
        stretch = self.wanted / self.sentences
        return Seconds((time.perf_counter() - wall) * stretch, (time.process_time() - cpu) * stretch)


def summary(times: dict[str, list[float]]) -> dict[str, Any]:
    row: dict[str, Any] = {"rounds": len(times["wall"])}
    for clock, values in times.items():
        low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
        row |= {f"{clock}_s": statistics.median(values), f"{clock}_quartiles": [low, high], f"{clock}_all": values}
    return row


def best_matmul(device: str, reps: int = 5) -> dict[str, dict[str, float]]:
    """The highest rate, in FLOP per second of wall and of CPU time, of products as large as those of a base model."""
    shapes = [(1024, 768, 3072), (1024, 3072, 768), (512, 768, 768), (2048, 1024, 1024)]
    found = {}
    for name in PRECISIONS:
        if name == "fp32-tuned":  # whose products are those of fp32-medium
            found[name] = found["fp32-medium"]
            continue
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        wall_best = cpu_best = 0.0
        with precision(name, device):
            for m, k, n in shapes:
                a, b = torch.randn(m, k, dtype=dtype, device=device), torch.randn(k, n, dtype=dtype, device=device)
                for turn in range(reps + 1):
                    wall, cpu = time.perf_counter(), time.process_time()
                    for _ in range(3):
                        torch.mm(a, b)
                    wait(device)
                    if turn:
                        wall_best = max(wall_best, 6 * m * k * n / (time.perf_counter() - wall))
                        cpu_best = max(cpu_best, 6 * m * k * n / (time.process_time() - cpu))
        found[name] = {"wall": wall_best, "cpu": cpu_best}
    return found


# ---- memory


def _status(key: str) -> float:
    """MiB of VmRSS or VmHWM (the peak of the former)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key + ":"))


def peak_of(step: Callable[[], Any], device: str) -> dict[str, float]:
    """MiB that a step needs above what is there before it: resident memory, or the GPU's. Linux alone."""
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return {"before_mib": before / MIB, "peak_mib": (torch.cuda.max_memory_allocated() - before) / MIB}
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is from now on
    before = _status("VmRSS")
    step()
    return {"before_mib": before, "peak_mib": _status("VmHWM") - before}


def in_own_process(what: list[str], flags: argparse.Namespace) -> Any:
    """What this program prints as JSON in its last line, given the flags of this run and `--child` with these words."""
    command = [sys.executable, sys.argv[0], *flags.words, "--child", *what]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])
