"""Experiments in several processes: started by torchrun, on Ray."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
PROGRAM = str(ROOT / "pytorch" / "run.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def start(*command: str, cwd: Path) -> subprocess.Popen:
    own = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "RANK", "WORLD", "LOCAL_", "MASTER_"))}
    env = own | {"PYTHONPATH": str(ROOT / "pytorch"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def end(process: subprocess.Popen, seconds: float = 240) -> str:
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"{process.args} hangs: {process.communicate()[0]}")


def results(folder: Path, name: str) -> dict:
    return json.loads((folder / "runs" / name / "results.json").read_text())


def test_torchrun_runs_all_stages_in_all_processes(tiny_yaml: Path, corpus: Path, tmp_path: Path) -> None:
    words = ["--file", str(tiny_yaml), "--data_dir", str(corpus), "--batch_size", "4"]
    process = start(*TORCHRUN, PROGRAM, "tiny", "tiny_sparse", *words, "--output_dir", "two", cwd=tmp_path)
    out = end(process)
    assert process.returncode == 0, out
    for name in ("tiny", "tiny_sparse-pretrain", "tiny_sparse-again"):
        assert results(tmp_path / "two", name)["processes"] == 2
        assert out.count(f"{name}: starts") == 1
    alone = start(sys.executable, PROGRAM, "tiny", *words[:4], "--output_dir", "one", cwd=tmp_path)
    out = end(alone)
    assert alone.returncode == 0, out
    one, two = (results(tmp_path / folder, "tiny") for folder in ("one", "two"))
    assert one["steps"] == two["steps"]
    assert one["valid"]["masked_lm/loss"] == pytest.approx(two["valid"]["masked_lm/loss"], rel=0.05)


def test_a_process_that_fails_ends_the_others_and_the_next_experiment_runs(
    tiny_yaml: Path, corpus: Path, tmp_path: Path
) -> None:
    text = tiny_yaml.read_text()
    tiny_yaml.write_text(text + "\nbad: {extends: tiny, stages: {pretrain: {train_filter: [\"text == 'none'\"]}}}\n")
    words = ["--file", str(tiny_yaml), "--data_dir", str(corpus), "--output_dir", "out"]
    process = start(*TORCHRUN, PROGRAM, "bad", "tiny", *words, cwd=tmp_path)
    begun = time.monotonic()
    out = end(process)
    assert process.returncode == 1, out
    assert "1 of 2 experiments failed. bad: the run bad ended with exit code 1" in out
    assert results(tmp_path / "out", "tiny")["processes"] == 2
    assert time.monotonic() - begun < 200


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'funneltfm[ray]'")
def test_an_experiment_on_ray(tiny_yaml: Path, corpus: Path, tmp_path: Path) -> None:
    words = ["--file", str(tiny_yaml), "--data_dir", str(corpus), "--output_dir", "out", "--batch_size", "4"]
    process = start(sys.executable, PROGRAM, "tiny", *words, "--launcher", "ray", "--devices", "2", cwd=tmp_path)
    out = end(process)
    assert process.returncode == 0, out
    assert results(tmp_path / "out", "tiny")["processes"] == 2
