"""The benchmarks run, on sizes that take seconds, and their committed results are in one format."""

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


def test_sparse_overhead(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    settings = [
        "--hidden=32",
        "--layers=1",
        "--vocab_size=4000",
        "--batch=1",
        "--length=8",
        "--pairs=2",
        "--sparsity=0.7",
    ]
    command = [sys.executable, ROOT / "benchmarks/sparse_overhead.py", *settings, f"--out={tmp_path / 'result.json'}"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "pytorch"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert json.loads(done.stdout) == result
    assert result["settings"]["hidden"] == 32
    assert result["overhead"]["masking_alone_cpu_s"] > 0
    assert result["sizes"]["model_sparsity"] == pytest.approx(0.7, abs=1e-4)
    assert result["sizes"]["fp32_times_smaller"] > 2.5


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/results").glob("*.json")), ids=lambda path: path.name)
def test_results_name_their_settings_and_machine(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    assert {"benchmark", "settings", "machine"} < result.keys()
    assert (ROOT / "benchmarks" / f"{result['benchmark']}.py").is_file()
