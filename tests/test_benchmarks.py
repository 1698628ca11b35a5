"""The benchmarks run, on sizes that take seconds, and their committed results are in one format."""

import importlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from funneltfm import FunnelTFM, ModelConfig

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_lsg(tmp_path: Path) -> None:
    words = ["--sizes", "1x704", "--lengths", "512", "704", "--layers", "1", "--hidden", "32", "--heads", "2"]
    words += ["--reps", "1", "--full_up_to", "512", "--contenders", "sdpa", "longformer", "lsg 128/128"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "pytorch"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "benchmarks/lsg.py", *words, "--out", tmp_path / "result.json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["benchmark"], result["settings"]["layers"]) == ("lsg", 1)
    measured = {(row["contender"], row["mode"], row["precision"]) for row in result["rows"]}
    for precision in ("fp32", "fp32-tuned"):
        for name in ("sdpa", "longformer", "lsg 128/128"):
            assert {(name, "forward", precision), (name, "train", precision)} <= measured
        assert {("sdpa", "core forward", precision), ("lsg 128/128", "core forward+backward", precision)} <= measured
    assert [(row["tokens"], row["contender"]) for row in result["lengths"]] == [
        (512, "sdpa"), (512, "longformer"), (512, "lsg 128/128"), (704, "longformer"), (704, "lsg 128/128")
    ]  # fmt: skip
    forward = [row for row in result["rows"] if (row["mode"], row["precision"]) == ("forward", "fp32")]
    peaks = {row["contender"]: row["peak_mib"] for row in forward}
    assert peaks["longformer"] > 2 * peaks["lsg 128/128"] > 0  # each its own, not the parent's
    assert all(row["times_cpu"] == 1 for row in result["rows"] if row["contender"] == "longformer")
    assert all(row["times_default"] > 0 for row in result["rows"])
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
    assert "lsg 128/128" in done.stdout


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


def replication() -> ModuleType:
    """benchmarks/sparse_replication.py as a module."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("sparse_replication")
    finally:
        sys.path.pop(0)


def test_ratios_of_the_replication_by_hand() -> None:
    module = replication()
    cells = {
        ("bert", "dense", "plain"): {0: 10.0, 1: 20.0},
        ("bert", "dense", "kd"): {0: 8.0},
        ("bert", "rigl_80", "kd"): {0: 9.0, 1: 30.0, 2: 1.0},
    }
    rows = {(row["arm"], row["recipe"]): row for row in module.table_rows(cells)}
    row = rows["rigl_80", "kd"]
    assert (row["perplexity"], row["seeds"]) == (40 / 3, 3)
    assert row["R_recipe"]["ratio"] == pytest.approx(39 / 30)  # seeds 0 and 1, which both have
    assert row["R_recipe"]["spread"] == pytest.approx(0.6 / 2**0.5)  # of 0.9 and 1.5
    assert row["R_equal"] == {"ratio": pytest.approx(9 / 8), "spread": None, "seeds": 1}
    assert "| bert | rigl_80 | kd | 3 | 13.33 +- 14.98 | 1.300 +- 0.424 | 1.125 |" in module.as_markdown([row])
    assert module.table_rows({("bert", "dense", "kd"): {0: 8.0}})[0]["R_recipe"] is None


def test_cells_of_the_replication() -> None:
    from funneltfm.experiments.registry import Experiments

    module, experiments = replication(), Experiments()
    names = module.chosen(experiments, ["*"])
    assert len(names) == 2 * 13 * 4 * 3
    assert len(module.chosen(experiments, ["bert-*_80-kd-0"])) == 6
    assert module.parts("replication-bert-rigl_2021_80-kd_onecycle-2") == ("bert", "rigl_2021_80", "kd_onecycle", 2)
    plain = experiments.get("replication-bert-static_80-plain-1").stages["pretrain"]
    both = experiments.get("replication-bert-static_80-kd_onecycle-1").stages["pretrain"]
    assert "distill_from" not in plain
    assert both["distill_from"] == ["{model:replication_teacher-bert}"]
    assert (plain["scheduler"], both["scheduler"], both["seed"], both["sparsity"]) == (
        "linear_decay",
        "one_cycle",
        1,
        0.8,
    )
    different = {"distill_from", "distill_weight", "distill_temperature", "scheduler", "learning_rate"}
    assert {key: plain[key] for key in plain if key not in different | {"num_warmup_steps"}} == {
        key: both[key] for key in both if key not in different
    }


@pytest.mark.slow
def test_sparse_replication(tmp_path: Path) -> None:
    (tmp_path / "wikitext-2").mkdir()
    rng = random.Random(0)
    for split, n in (("train", 3000), ("test", 600)):
        lines = (" ".join(rng.choices(["a", "film", "of", "the", "town", "<unk>", "music"], k=12)) for _ in range(n))
        (tmp_path / "wikitext-2" / f"wiki.{split}.tokens").write_text("\n".join(lines) + "\n")
    words = ["--data_dir", tmp_path, "--output_dir", tmp_path / "out", "--steps", "8", "--smoke", "--vocab_size", "60"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "pytorch"), "OMP_NUM_THREADS": "1"}

    def call(*more: str) -> dict:
        out = f"--out={tmp_path / 'result.json'}"
        command = [sys.executable, ROOT / "benchmarks/sparse_replication.py", *words, *more, out]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / "result.json").read_text())

    result = call("bert-dense-plain-0", "bert-gradual_80-kd-0")
    assert [(row["arm"], row["recipe"]) for row in result["rows"]] == [("dense", "plain"), ("gradual_80", "kd")]
    sparse = result["cells"]["replication-bert-gradual_80-kd-0"]
    assert sparse["density"]["model"] == pytest.approx(0.2, abs=0.001)
    assert sparse["steps"] == 8
    assert not (tmp_path / "out/pre_trained_models/replication-bert-gradual_80-kd-0").exists()
    before = (tmp_path / "out/runs/replication-bert-gradual_80-kd-0/results.json").stat().st_mtime_ns
    again = call("bert-gradual_80-kd-0")  # nothing to do
    assert again == result
    assert (tmp_path / "out/runs/replication-bert-gradual_80-kd-0/results.json").stat().st_mtime_ns == before


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
        assert row["rounds"] == 2 or name == "scaling"  # which takes one where that takes long
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


def test_lead(tmp_path: Path) -> None:
    """The scores of the first sentence and of the first three, against the better one of two references."""
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")
    row = {
        "text": ["One fox ran.", "It met a dog. They", "slept.", "The end."],
        "said": ["fox ran", "one fox ran it met a dog"],
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    command = [sys.executable, str(ROOT / "benchmarks/lead.py"), str(tmp_path / "rows.jsonl")]
    columns = ["--document_column", "+text", "--summary_column", "*said"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "pytorch")}
    done = subprocess.run([*command, *columns], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    table = [[cell.strip() for cell in line.split("|")[1:4]] for line in done.stdout.splitlines()[2:]]
    assert table == [["1", "0.800", "0.667"], ["3", f"{14 / 16:.3f}", f"{12 / 14:.3f}"]]
