"""The benchmarks run, on sizes that take seconds, and their committed results are in one format."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from funneltfm import FunnelTFM, ModelConfig

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


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package that benchmarks/run.py measures with."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("speed.flops")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("switches", [{}, {"separate_cls": True, "pool_q_only": True, "truncate_seq": True}])
def test_funnel_flops_are_what_torch_counts(speed: Any, switches: dict[str, bool], training: bool) -> None:
    """Counted on the plain path with the attention call taken apart, because torch's counter leaves it out on CPU."""
    config = ModelConfig(
        vocab_size=50, d_embed=64, d_model=64, n_head=2, d_head=32, d_inner=96, block_size="2_1x2_1",
        dropout=0.0, dropatt=0.0, **switches,
    )  # fmt: skip
    model = FunnelTFM(config).train(training)
    model.attention_path = "plain"
    inputs = torch.randint(1, 50, (3, 33))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(training):
        _, ret = model(inputs, seg_id=torch.zeros_like(inputs), cls_target=torch.zeros(3, dtype=torch.long))
        if training:
            ret["cls_loss"].backward()
    expected = speed.funnel_flops(config, 3, 33, training=training, needed=False)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("training", [False, True])
def test_encoder_flops_are_what_torch_counts(speed: Any, training: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96,
        attn_implementation="eager",
    )  # fmt: skip
    model = transformers.BertModel(config, add_pooling_layer=False).train(training)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        hidden = model(torch.randint(1, 50, (3, 33))).last_hidden_state
        if training:
            hidden.sum().backward()
    assert counter.get_total_flops() == speed.encoder_flops(2, 64, 96, 3, 33, training=training)


TINY = ["--width=64", "--blocks=1_1", "--vocab_size=100", "--reps=2", "--threads=1"]


def run_case(name: str, out: Path, *words: str) -> dict[str, Any]:
    command = [sys.executable, ROOT / "benchmarks/run.py", name, *TINY, *words, "--out", out / "result.json"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "pytorch"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (out / "result.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert result["case"] == name
    assert all(row["contender"] in done.stdout for row in result["rows"])
    return result


@pytest.mark.parametrize("name", ["funnel_forward", "funnel_train_step", "scaling"])
def test_model_cases(tmp_path: Path, name: str) -> None:
    names = ["ours fp32", "torch encoder bf16"]
    result = run_case(name, tmp_path, "--sizes", "2x16", "1x128", "--contenders", *names)
    assert [(row["size"], row["contender"]) for row in result["rows"]] == [
        (size, who) for size in ("2x16", "1x128") for who in names
    ]
    for row in result["rows"]:
        assert row["rounds"] == 2
        assert row["cpu_s"] > 0
        assert 0 < row["of_best"] < 1
        assert row["before_mib"] > 0
    assert result["best_matmul_flop_per_s"]["fp32"]["cpu"] > 1e8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [
        ("finetune_epoch", ["--sentences=32"], {"ours fp32", "HF Trainer, dynamic padding"}),
        ("predict_throughput", ["--sentences=32"], {"ours fp32", "BERT, dynamic padding"}),
        ("tokenize", ["--sentences=200"], {"ours", "ours, from the cache", "transformers"}),
        ("startup", [], {"funneltfm --help", "import modeling"}),
    ],
)
def test_cases_on_the_built_in_sample(tmp_path: Path, name: str, words: list[str], expected: set[str]) -> None:
    pytest.importorskip("transformers")
    if name in ("finetune_epoch", "predict_throughput"):
        words = [*words, "--contenders", *sorted(expected)]
    folder = tmp_path / "sample"
    subprocess.run([sys.executable, ROOT / "data-scripts/make_sample.py", folder], check=True, capture_output=True)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = "".join(f"id\t1\t\t{row['text_a']}\n" for row in rows)
    (folder / "train.tsv").write_text(lines, encoding="utf-8")
    data = [] if name == "startup" else [f"--data={folder}", f"--tokenizer={folder / 'vocab.txt'}"]
    result = run_case(name, tmp_path, *data, *words)
    assert expected <= {row["contender"] for row in result["rows"]}
    assert all(row["wall_s"] > 0 and row["rounds"] == 2 for row in result["rows"])


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/results").glob("*.json")), ids=lambda path: path.name)
def test_results_name_their_settings_and_machine(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    assert {"benchmark", "settings", "machine"} < result.keys()
    assert (ROOT / "benchmarks" / f"{result['benchmark']}.py").is_file()
