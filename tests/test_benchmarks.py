"""The benchmarks run, on sizes that take seconds, and their committed results are in one format."""

import json
import os
import random
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


@pytest.mark.slow
def test_pretraining(tmp_path: Path) -> None:
    """All stages on a made-up corpus; what is finished is not done again."""
    words = ["the", "old", "fox", "saw", "a", "small", "dog", "in", "that", "garden", "and", "was", "happy"]
    rng = random.Random(0)
    lines = [" ".join(rng.choices(words, k=12)) for _ in range(60)]
    for name in ("wikitext-2", "CoLA", "SST-2"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for split in ("train", "valid"):
        (tmp_path / f"data/wikitext-2/wiki.{split}.tokens").write_text("\n\n".join(lines) + "\n")
    for split in ("train", "dev"):
        rows = [f"gj04\t{i % 2}\t\t{line}\n" for i, line in enumerate(lines)]
        (tmp_path / f"data/CoLA/{split}.tsv").write_text("".join(rows))
        rows = ["sentence\tlabel\n", *(f"{line}\t{i % 2}\n" for i, line in enumerate(lines))]
        (tmp_path / f"data/SST-2/{split}.tsv").write_text("".join(rows))
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "benchmarks/pretraining.py"), f"--data={tmp_path / 'data'}", f"--out={out}"]
    command += ["--smoke", "--threads=1", "--seeds", "1", "2", f"--results={tmp_path / 'results'}"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "pytorch"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run() -> str:
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout[done.stdout.index("| pretraining |") :]

    first = run()
    result = json.loads((out / "result.json").read_text())
    electra, mlm = result["pretraining"]["electra"], result["pretraining"]["mlm"]
    assert mlm["flops_of_a_step"] < electra["flops_of_a_step"]
    assert mlm["flops"] == pytest.approx(electra["flops"], rel=0.5 / mlm["steps"] + 1e-9)
    for task, metric in (("CoLA", "mcc"), ("SST-2", "accuracy")):
        for start in ("electra", "mlm", "scratch"):
            scores = result["finetuning"][task][start]
            assert scores["metric"] == metric
            assert scores["mean"] == pytest.approx(sum(scores["scores"]) / 2)
            assert len(scores["scores"]) == 2
    (written,) = (tmp_path / "results").iterdir()
    assert json.loads(written.read_text()) == result
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")}
    (out / "finetuned/mlm/CoLA/seed_2/results.json").unlink()  # as if it had been stopped
    assert run() == first
    changed = {path for path, at in before.items() if path.stat().st_mtime_ns != at}
    assert all("mlm/CoLA/seed_2" in str(path) for path in changed)
    other = subprocess.run([*command, "--pretrain_lr=1e-4"], capture_output=True, text=True, env=env, timeout=100)
    assert other.returncode == 1
    assert "has runs of other settings" in other.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/results").glob("*.json")), ids=lambda path: path.name)
def test_results_name_their_settings_and_machine(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    assert {"benchmark", "settings", "machine"} < result.keys()
    assert (ROOT / "benchmarks" / f"{result['benchmark']}.py").is_file()
