"""Precision of products and memory that is kept."""

import os
import subprocess
import sys

import pytest
import torch

from funneltfm.training import speed
from funneltfm.training.speed import choose_matmul_precision, keep_freed_memory, matmul_precision


@pytest.mark.parametrize("wanted", ["highest", "high", "medium"])
def test_what_is_asked_for_is_taken(wanted):
    assert choose_matmul_precision(wanted, "cpu") == wanted


def test_auto_elsewhere_than_on_a_cpu_is_exact():
    assert choose_matmul_precision("auto", "cuda") == "highest"


def test_auto_takes_what_is_faster_and_exact(monkeypatch):
    assert choose_matmul_precision("auto", "cpu") in ("highest", "medium")
    monkeypatch.setattr(speed, "_WORTH", 0.0)  # medium is always faster
    monkeypatch.setattr(speed, "_EXACT", 1e9)  # and always exact
    assert choose_matmul_precision("auto", "cpu") == "medium"
    monkeypatch.setattr(speed, "_EXACT", 0.0)
    assert choose_matmul_precision("auto", "cpu") == "highest"
    monkeypatch.setattr(speed, "_EXACT", 1e9)
    monkeypatch.setattr(speed, "_WORTH", 1e9)
    assert choose_matmul_precision("auto", "cpu") == "highest"


def test_precision_is_what_it_was_afterwards():
    before = torch.get_float32_matmul_precision()
    with matmul_precision("medium"):
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == before


FAULTS = """
import resource, torch
from funneltfm.training.speed import keep_freed_memory
torch.set_num_threads(1)
def faults():
    for _ in range(3):
        torch.ones(8_000_000), torch.ones(8_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        a, b, c = torch.ones(8_000_000), torch.ones(8_000_000), torch.ones(8_000_000)
        del a, b, c
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), keep_freed_memory(), faults())
"""


@pytest.mark.parametrize("environment", [{}, {"MALLOC_ARENA_MAX": "2"}])
def test_freed_memory_is_taken_again(environment):
    """Counted in page faults; where the environment sets malloc up, it has its way."""
    if not keep_freed_memory():
        pytest.skip("not glibc")
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, env=os.environ | environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    before, kept, after = done.stdout.split()
    assert kept == str(not environment)
    assert int(before) > 1000
    assert (int(after) < int(before) / 3) is not bool(environment)
