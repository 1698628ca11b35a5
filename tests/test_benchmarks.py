"""The benchmarks run, on sizes that take seconds; what they measure is in the documentation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_lsg(tmp_path: Path) -> None:
    words = ["--sizes", "1x704", "--lengths", "704", "--layers", "1", "--hidden", "32", "--heads", "2", "--reps", "1"]
    words += ["--contenders", "sdpa", "longformer", "lsg 128/128"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "pytorch"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "benchmarks/lsg.py", *words, "--out", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    measured = {(row["contender"], row["mode"]) for row in results["sizes"]}
    for name in ("sdpa", "longformer", "lsg 128/128"):
        assert {(name, "forward"), (name, "train")} <= measured
    assert {row["mode"] for row in results["sizes"] if row["contender"] == "sdpa"} >= {"core forward+backward"}
    assert all(row["peak_mib"] > row["built_mib"] > 0 for row in results["lengths"])
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert "lsg 128/128" in (tmp_path / "table.md").read_text()
