"""Every precision, in one process and in two, in one go and resumed: the sample is learned equally well.

    python tests/faults/test_matrix.py --epochs 5
    python tests/faults/test_matrix.py --epochs 5 --levels O3 bf16

trains all 20, or those of some levels, and prints a table; pytest trains two of them.
"""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEVELS: dict[str, dict[str, Any]] = {
    "O0": {"fp16": True, "amp_opt": "O0"},
    "O1": {"fp16": True, "amp_opt": "O1"},
    "O2": {"fp16": True, "amp_opt": "O2"},
    "O3": {"fp16": True, "amp_opt": "O3"},
    "bf16": {"bf16": True, "amp_opt": "O2"},
}
# Those of scripts/classifier.sh.
FLAGS = {
    "dataset": "custom", "block_size": "2_2_2", "d_embed": 64, "d_model": 64, "n_head": 2, "d_head": 32, "d_inner": 256,
    "separate_cls": True, "pool_q_only": True, "truncate_seq": True, "dropout": 0.0, "dropatt": 0.0, "lr": 5e-4,
    "n_log_epoch": 4, "n_valid": 4, "device_id": -1,
}  # fmt: skip
BAND = 0.9  # bag of words: .62


def train(data: Path, root: Path, level: str, processes: int, resumed: bool, epochs: int) -> dict[str, Any]:
    """Results of a run on the sample; a resumed one is stopped by SIGTERM in its second half."""
    flags: dict[str, Any] = FLAGS | LEVELS[level] | {"epochs": epochs, "model_dir": root, "data_dir": data}
    flags |= {"tokenizer_path": data / "vocab.txt", "output_dir": data / "proc"}
    flags |= {"distributed_world_size": processes, "train_bsz": 32 // processes}
    command = [sys.executable, "-m", "funneltfm", "classify"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "pytorch")}
    process = start = subprocess.Popen([*command, *(f"--{k}={v}" for k, v in flags.items())], env=env)
    if resumed:
        half = int(4 * epochs / 2)  # rows of the training loss
        while start.poll() is None and _rows(root) < half:
            time.sleep(0.2)
        start.send_signal(signal.SIGTERM)
        assert start.wait() == 128 + signal.SIGTERM
        process = subprocess.Popen([*command, "--resume", f"--model_dir={root}"], env=env)
    assert process.wait() == 0
    return json.loads((root / "results.json").read_text())


def _rows(root: Path) -> int:
    path = root / "metrics.csv"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def make_sample(folder: Path) -> Path:
    subprocess.run([sys.executable, ROOT / "data-scripts/make_sample.py", folder], check=True)
    return folder


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sample(tmp_path_factory.mktemp("data") / "sample")


@pytest.mark.slow
@pytest.mark.parametrize(("level", "processes", "resumed"), [("O2", 1, False), ("bf16", 2, True)])
def test_some_of_the_matrix(sample: Path, tmp_path: Path, level: str, processes: int, resumed: bool) -> None:
    results = train(sample, tmp_path / "run", level, processes, resumed, epochs=5)
    assert results["processes"] == processes
    assert results["precision"] == ("bf16 O2" if level == "bf16" else f"fp16 {level}")
    assert results["valid"]["accuracy"] > BAND
    assert results["test"]["accuracy"] > BAND


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--levels", nargs="+", default=list(LEVELS), choices=LEVELS)
    flags = parser.parse_args()
    lines, worst = [], 1.0
    with tempfile.TemporaryDirectory() as folder:
        data = make_sample(Path(folder) / "sample")
        for level, processes, resumed in itertools.product(flags.levels, (1, 2), (False, True)):
            root = Path(folder) / f"{level}_{processes}_{resumed}"
            scores = train(data, root, level, processes, resumed, flags.epochs)
            worst = min(worst, scores["valid"]["accuracy"], scores["test"]["accuracy"])
            lines.append(
                f"| {level} | {processes} | {'resumed' if resumed else 'fresh'} | {scores['valid']['accuracy']:.3f} | "
                f"{scores['test']['accuracy']:.3f} | {scores['examples_per_second']:.0f} |"
            )
            print(lines[-1], flush=True)
    print("\n| level | processes | | dev accuracy | test accuracy | examples/s |\n|---|---|---|---|---|---|")
    print("\n".join(lines))
    print(f"\nlowest accuracy {worst:.3f}")
    return worst <= BAND


if __name__ == "__main__":
    sys.exit(main())
