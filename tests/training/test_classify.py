"""Whole runs on tiny data: every layout, what is in the folder, the same again, resumed, tested, finetuned."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
import yaml

from funneltfm.cli.main import main
from funneltfm.data.batching import Collator
from funneltfm.data.encoding import EncodingConfig, encode_examples
from funneltfm.data.readers import custom_dataset, get_dataset, read_split
from funneltfm.data.tokenization import get_tokenizer
from funneltfm.errors import InputError, Stopped
from funneltfm.funnel.checkpoints import load_checkpoint
from funneltfm.funnel.config import ModelConfig
from funneltfm.funnel.model import FunnelTFM
from funneltfm.training import classify as engine
from funneltfm.training import speed
from funneltfm.training.checkpoint_io import is_whole
from funneltfm.training.classify import classify

ROOT = Path(__file__).resolve().parents[2]
FIXTURE = ROOT.parent / "shared" / "fixtures" / "funnel" / "enc_2_2_2"
WORDS = ("a", "bad", "cat", "dog", "good", "great", "man", "not", "old", "red", "story", "the", "was", "we")
MODEL = {
    "block_size": "1_1", "d_embed": 8, "d_model": 8, "n_head": 2, "d_head": 4, "d_inner": 16,
    "separate_cls": True, "truncate_seq": True, "pool_q_only": True,
}  # fmt: skip


def sentences(n: int, seed: int) -> list[str]:
    """Sentences of 2 to 12 words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(2, 12))) for _ in range(n)]


# ---- layouts


def custom_jsonl(folder: Path) -> dict[str, Any]:
    """Three classes whose names have blanks; a test file with labels."""
    for split, n, seed in (("train", 20, 1), ("valid", 9, 2), ("test", 5, 3)):
        names = ["very good", "so so", "not good"]
        rows = [{"text": text, "mood": names[i % 3]} for i, text in enumerate(sentences(n, seed))]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"dataset": "custom", "text_a": "text", "label": "mood"}


def custom_csv_pair(folder: Path) -> dict[str, Any]:
    for split, n, seed in (("train", 18, 1), ("dev", 7, 2)):
        with open(folder / f"{split}.csv", "w", newline="", encoding="utf-8") as handle:
            writer = csv.writer(handle)
            writer.writerow(["q1", "q2", "same"])
            for i, (a, b) in enumerate(zip(sentences(n, seed), sentences(n, seed + 10), strict=True)):
                writer.writerow([a + ', "so"', b, "yes" if i % 2 else "no"])
    return {"dataset": "custom", "text_a": "q1", "text_b": "q2", "label": "same"}


def stsb(folder: Path) -> dict[str, Any]:
    header = ["index", *(f"other{i}" for i in range(6)), "sentence1", "sentence2"]
    rng = random.Random(0)
    for name, n, seed in (("train", 20, 1), ("dev", 8, 2), ("test", 4, 3)):
        labelled = name != "test"
        lines = ["\t".join(header + ["score"] * labelled)]
        for i, (a, b) in enumerate(zip(sentences(n, seed), sentences(n, seed + 10), strict=True)):
            lines.append("\t".join([str(i), *["x"] * 6, a, b] + [f"{rng.uniform(0, 5):.3f}"] * labelled))
        (folder / f"{name}.tsv").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return {"dataset": "STS-B"}


def cola_files(folder: Path) -> dict[str, Any]:
    rng = random.Random(0)
    for name, n, seed in (("train", 24, 1), ("dev", 11, 2)):
        rows = [f"gj04\t{rng.randint(0, 1)}\t\t{text}\n" for text in sentences(n, seed)]
        (folder / f"{name}.tsv").write_text("".join(rows), encoding="utf-8")
    rows = [f"{i}\t{text}\n" for i, text in enumerate(sentences(5, 3))]
    (folder / "test.tsv").write_text("index\tsentence\n" + "".join(rows), encoding="utf-8")
    return {"dataset": "CoLA"}


def mnli(folder: Path) -> dict[str, Any]:
    names = ["neutral", "entailment", "contradiction"]
    for name, n, seed in (
        ("train", 21, 1), ("dev_matched", 8, 2), ("dev_mismatched", 6, 3), ("test_matched", 5, 4),
        ("test_mismatched", 4, 5),
    ):  # fmt: skip
        labelled = not name.startswith("test")
        lines = ["\t".join(["index", "sentence1", "sentence2"] + ["gold_label"] * labelled)]
        for i, (a, b) in enumerate(zip(sentences(n, seed), sentences(n, seed + 10), strict=True)):
            lines.append("\t".join([str(i), a, b] + [names[i % 3]] * labelled))
        (folder / f"{name}.tsv").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return {"dataset": "MNLI"}


def ag(folder: Path) -> dict[str, Any]:
    for name, n, seed in (("train", 20, 1), ("test", 9, 2)):
        rows = [f'"{i % 4 + 1}","{text}","{text} too"\n' for i, text in enumerate(sentences(n, seed))]
        (folder / f"{name}.csv").write_text("".join(rows), encoding="utf-8")
    return {"dataset": "AG"}


@dataclass
class Layout:
    write: Callable[[Path], dict[str, Any]]
    sizes: dict[str, int]
    """Split -> examples, of those that are evaluated or predicted."""
    metrics: tuple[str, ...]
    submissions: dict[str, str]

    @property
    def labelled(self) -> list[str]:
        return [s for s in self.sizes if not s.startswith("test") or self.write in (custom_jsonl, ag)]


LAYOUTS = {
    "jsonl": Layout(custom_jsonl, {"valid": 9, "test": 5}, ("accuracy",), {}),
    "csv pair": Layout(custom_csv_pair, {"valid": 7}, ("accuracy",), {}),
    "STS-B": Layout(stsb, {"valid": 8, "test": 4}, ("pearson", "spearman"), {"test": "STS-B.tsv"}),
    "CoLA": Layout(cola_files, {"valid": 11, "test": 5}, ("mcc", "accuracy"), {"test": "CoLA.tsv"}),
    "MNLI": Layout(
        mnli, {"valid": 8, "valid_mm": 6, "test": 5, "test_mm": 4}, ("accuracy",),
        {"test": "MNLI-m.tsv", "test_mm": "MNLI-mm.tsv"},
    ),
    "AG": Layout(ag, {"valid": 9, "test": 9}, ("accuracy",), {}),
}  # fmt: skip


@dataclass
class Run:
    """A finished run of a layout."""

    layout: Layout
    root: Path
    data_dir: Path
    flags: dict[str, Any]
    results: dict[str, Any]

    @property
    def labels(self) -> tuple[str, ...] | None:
        return self.spec.labels

    @property
    def spec(self):
        if self.flags["dataset"] != "custom":
            return get_dataset(self.flags["dataset"])
        return custom_dataset(
            self.data_dir, self.flags["text_a"], self.flags.get("text_b"), self.flags.get("label", "label")
        )

    def scored_by_hand(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Logits of every example of a split, each alone through the exported model; and the labels."""
        config = ModelConfig.init_from_json(self.root / "best" / "net_config.json")
        model = FunnelTFM(config).eval()
        assert load_checkpoint(model, self.root / "best" / "model.pt") == []
        tokenizer = get_tokenizer("word_piece", self.root / "best" / "vocab.txt")
        encoded = encode_examples(
            read_split(self.spec, self.data_dir, split), self.spec.labels, tokenizer, EncodingConfig()
        )
        collator, logits = Collator(config), []
        for i in range(len(encoded)):
            batch = collator([encoded[i]])
            with torch.no_grad():
                ret = model(batch["inputs"], input_mask=batch["input_mask"], seg_id=batch["seg_id"])[1]
            logits.append(ret["cls_logits"][0].numpy())
        return np.stack(logits), encoded.labels


def rows_of(root: Path, speed: bool = False) -> list[dict[str, str]]:
    """metrics.csv, without the one column that no two runs share."""
    with open(root / "metrics.csv", newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    return rows if speed else [{k: v for k, v in row.items() if k != "examples_per_second"} for row in rows]


def weights(root: Path) -> dict[str, torch.Tensor]:
    return torch.load(root / "best" / "model.pt", weights_only=True)


def last_weights(root: Path) -> dict[str, torch.Tensor]:
    return torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- what the runs need


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("".join(f"{piece}\n" for piece in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def cola(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training sentences in CoLA's layout, labels by chance."""
    folder = tmp_path_factory.mktemp("cola")
    cola_files(folder)
    return folder


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Numbers by chance: the correlation on the dev set goes up and down, never twice the same."""
    folder, rng = tmp_path_factory.mktemp("numbers"), random.Random(0)
    for name, n, seed in (("train", 24, 1), ("valid", 15, 2)):
        rows = [{"text_a": text, "label": rng.uniform(-1, 1)} for text in sentences(n, seed)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture
def flags(tmp_path: Path, vocab: Path) -> Callable[..., dict]:
    """Flags of a run of one epoch on CoLA's layout; more of them by name."""

    def make(**more: object) -> dict:
        return {
            "dataset": "CoLA", "tokenizer_path": str(vocab), "output_dir": str(tmp_path / "processed"),
            "epochs": 1, "train_bsz": 4, "valid_bsz": 3, "lr": 1e-2, "device_id": -1, **MODEL,
        } | more  # fmt: skip

    return make


_RUNS: dict[str, Run] = {}


@pytest.fixture(params=list(LAYOUTS))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, vocab: Path) -> Run:
    """Each layout is trained once for the whole module."""
    if request.param not in _RUNS:
        layout = LAYOUTS[request.param]
        folder = tmp_path_factory.mktemp("run")
        data_dir = folder / "my data"
        data_dir.mkdir()
        flags = layout.write(data_dir) | {
            "data_dir": str(data_dir), "model_dir": str(folder / "out put"), "output_dir": str(folder / "processed"),
            "tokenizer_path": str(vocab), "epochs": 1, "train_bsz": 4, "valid_bsz": 3, "test_bsz": 2, "lr": 1e-2,
            "device_id": -1, "n_valid": 3, "n_log_epoch": 2, "write_prediction": True, "baselines": True, **MODEL,
        }  # fmt: skip
        results = classify(**flags)
        _RUNS[request.param] = Run(layout, Path(flags["model_dir"]), data_dir, flags, results)
    return _RUNS[request.param]


# ---- the folder of a run


def test_files_of_a_run(run: Run) -> None:
    files = {str(path.relative_to(run.root)) for path in run.root.rglob("*") if path.is_file()}
    kind = "scatter" if run.labels is None else "confusion_matrix"
    assert files == {
        "config.yaml", "metrics.csv", "results.json", "log.txt", "checkpoints/best.ckpt", "checkpoints/last.ckpt",
        "checkpoints/previous.ckpt", "best/model.pt", "best/net_config.json", "best/labels.json",
        "best/text_config.json", "best/vocab.txt",
        "plots/learning_curves.png",
        *(f"plots/{kind}_{split}.png" for split in run.layout.labelled),
        *(f"predictions/{split}.jsonl" for split in run.layout.sizes),
        *(f"predictions/{name}" for name in run.layout.submissions.values()),
    }  # fmt: skip
    for path in (run.root / "plots").iterdir():
        pixels = matplotlib.image.imread(path)
        assert pixels[..., :3].std() > 0.01


def test_results(run: Run) -> None:
    results = json.loads((run.root / "results.json").read_text(encoding="utf-8"))
    assert results == run.results
    for split in run.layout.labelled:
        assert list(results[split]) == [*run.layout.metrics, "loss"]
    assert not {split for split in ("test", "test_mm") if split in results} - set(run.layout.labelled)
    assert set(results) - set(run.layout.sizes) == {
        "task", "best_step", "steps", "epochs", "train_seconds", "examples_per_second", "baselines", "parameters",
        "seed", "device", "processes", "precision", "versions",
    }  # fmt: skip
    assert (results["device"], results["processes"], results["precision"]) == ("cpu", 1, "fp32")
    assert set(results["baselines"]) == {"majority", "bag_of_words"}
    assert results["examples_per_second"] > 0
    assert results["parameters"] == sum(tensor.numel() for tensor in weights(run.root).values())


def test_results_equal_an_evaluation_example_by_example(run: Run) -> None:
    for split in run.layout.labelled:
        logits, labels = run.scored_by_hand(split)
        assert len(logits) == run.layout.sizes[split]
        scores = run.results[split]
        if run.labels is None:
            pred = logits[:, 0].astype(float)
            assert scores["pearson"] == pytest.approx(np.corrcoef(pred, labels)[0, 1], abs=1e-4)
            assert scores["loss"] == pytest.approx(((pred - labels) ** 2).mean(), rel=1e-4)
        else:
            right = sum(int(row.argmax()) == label for row, label in zip(logits, labels, strict=True))
            assert scores["accuracy"] == pytest.approx(right / run.layout.sizes[split])
            shifted = logits - logits.max(axis=1, keepdims=True)
            log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
            assert scores["loss"] == pytest.approx(-log_p[range(len(labels)), labels].mean(), rel=1e-4)


def test_predictions_are_those_of_the_exported_model(run: Run) -> None:
    for split, size in run.layout.sizes.items():
        lines = (run.root / "predictions" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        assert len(rows) == size
        examples = read_split(run.spec, run.data_dir, split)
        assert [row["id"] for row in rows] == [example.id for example in examples]
        logits, _ = run.scored_by_hand(split)
        if run.labels is None:
            assert [row["prediction"] for row in rows] == pytest.approx(logits[:, 0].tolist(), abs=1e-3)
        else:
            assert [row["prediction"] for row in rows] == [run.labels[i] for i in logits.argmax(axis=1)]
            p = np.exp(logits - logits.max(axis=1, keepdims=True))
            p /= p.sum(axis=1, keepdims=True)
            assert [list(row["scores"].values()) for row in rows] == pytest.approx(p, abs=1e-5)
            assert all(tuple(row["scores"]) == run.labels for row in rows)
        if split in run.layout.labelled:
            given = [float(e.label) if run.labels is None else e.label for e in examples]
            assert [row["label"] for row in rows] == given


def test_submission_files(run: Run) -> None:
    for split, name in run.layout.submissions.items():
        lines = (run.root / "predictions" / name).read_text(encoding="utf-8").splitlines()
        assert lines[0] == "index\tprediction"
        assert [line.split("\t")[0] for line in lines[1:]] == [str(i) for i in range(run.layout.sizes[split])]
        for line in lines[1:]:
            value = line.split("\t")[1]
            assert 0 <= float(value) <= 5 if run.labels is None else value in run.labels


def test_labels_and_metrics_files(run: Run) -> None:
    saved = json.loads((run.root / "best" / "labels.json").read_text(encoding="utf-8"))
    assert saved == (None if run.labels is None else list(run.labels))
    rows = rows_of(run.root, speed=True)
    main_metric = f"valid/{run.layout.metrics[0]}"
    scored = [row for row in rows if row[main_metric]]
    steps = run.results["steps"]
    assert [int(row["step"]) for row in scored] == sorted({max(1, round(steps * i / 3)) for i in (1, 2, 3)})
    best = max(scored, key=lambda row: float(row[main_metric]))  # the first of equals
    assert int(best["step"]) == run.results["best_step"]
    assert float(best[main_metric]) == pytest.approx(run.results["valid"][run.layout.metrics[0]], abs=1e-5)
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert losses
    assert np.isfinite(losses).all()
    if run.layout.write is mnli:
        assert all(row["valid_mm/accuracy"] for row in scored)


def test_the_config_makes_the_same_run_again(run: Run, tmp_path: Path) -> None:
    """config.yaml through --config, from another folder of results."""
    code = main(["classify", "--config", str(run.root / "config.yaml"), f"--model_dir={tmp_path / 'again'}"])
    assert code == 0
    assert equal(weights(run.root), weights(tmp_path / "again"))
    assert rows_of(run.root) == rows_of(tmp_path / "again")
    same = [
        yaml.safe_load((root / "config.yaml").read_text(encoding="utf-8")) for root in (run.root, tmp_path / "again")
    ]
    assert same[0] | {"model_dir": ""} == same[1] | {"model_dir": ""}


def test_log_file_holds_what_was_said(cola: Path, flags: Callable, tmp_path: Path) -> None:
    """From Python too, where nobody has set up logging."""
    classify(**flags(data_dir=str(cola), model_dir=str(tmp_path / "run"), n_valid=1))
    text = (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
    assert "valid/mcc" in text
    assert "FunnelTFM" in text


# ---- the best checkpoint


def test_the_best_checkpoint_has_the_best_score(uninterrupted: tuple[Path, dict], tmp_path: Path) -> None:
    root, flags = uninterrupted
    results = json.loads((root / "results.json").read_text(encoding="utf-8"))
    scored = [(int(row["step"]), float(row["valid/pearson"])) for row in rows_of(root) if row["valid/pearson"]]
    steps, scores = zip(*scored, strict=True)
    assert len(scored) == 5
    best = max(scores)
    # The case would prove nothing if the best were the first or the last.
    assert 0 < scores.index(best) < 4
    assert scores[-1] < best - 0.01
    assert results["best_step"] == steps[scores.index(best)]
    assert results["valid"]["pearson"] == pytest.approx(best, abs=1e-5)
    checkpoint = torch.load(root / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["global_step"] == results["best_step"]
    assert equal({k.removeprefix("model."): v for k, v in checkpoint["state_dict"].items()}, weights(root))
    # Evaluated on their own, each has its own score.
    last = tmp_path / "last.pt"
    torch.save({k.removeprefix("model."): v for k, v in last_weights(root).items()}, last)
    for ckpt, score in ((root / "best" / "model.pt", best), (last, scores[-1])):
        tested = classify(
            **flags, model_dir=str(tmp_path / ckpt.stem), test_only=True, init_ckpt=str(ckpt),
            init_ckpt_config=str(root / "best" / "net_config.json"),
        )  # fmt: skip
        assert tested["valid"]["pearson"] == pytest.approx(score, abs=1e-5)


# ---- very small


@pytest.mark.parametrize(
    ("n_train", "more"),
    [
        (1, {}),
        (2, {}),
        (3, {}),
        (5, {"train_bsz": 64}),
        (1, {"epochs": 3, "train_bsz": 1}),
        (3, {"train_bsz": 2, "n_valid": 50, "n_log_epoch": 50}),
        (9, {"train_bsz": 2, "n_valid": 1, "n_log_epoch": 1}),
    ],
    ids=str,
)
def test_very_small_data(n_train: int, more: dict, flags: Callable, tmp_path: Path) -> None:
    lines = [f"x\t{i % 2}\t\t{text}\n" for i, text in enumerate(sentences(n_train, 0))]
    (tmp_path / "train.tsv").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "dev.tsv").write_text("x\t1\t\ta good dog\n", encoding="utf-8")
    settings = flags(data_dir=str(tmp_path), model_dir=str(tmp_path / "run"), write_prediction=False, **more)
    results = classify(**settings)
    per_epoch = -(-n_train // settings["train_bsz"])
    assert results["steps"] == per_epoch * settings["epochs"]
    rows = rows_of(tmp_path / "run")
    scored = [int(row["step"]) for row in rows if row["valid/mcc"]]
    assert len(scored) == min(results["steps"], more.get("n_valid", 10))
    assert scored[-1] == results["steps"]
    assert all(row["train/loss"] for row in rows if not row["valid/mcc"])


# ---- the same again


def test_the_same_seed_gives_the_same_bits_and_another_does_not(cola: Path, flags: Callable, tmp_path: Path) -> None:
    roots = [tmp_path / name for name in ("one", "two", "other")]
    for root, seed in zip(roots, (7, 7, 8), strict=True):
        torch.rand(random.randrange(9))  # what came before does not matter
        classify(**flags(data_dir=str(cola), model_dir=str(root), seed=seed, epochs=2, n_valid=4))
    assert equal(last_weights(roots[0]), last_weights(roots[1]))
    assert equal(weights(roots[0]), weights(roots[1]))
    assert rows_of(roots[0]) == rows_of(roots[1])
    assert not equal(last_weights(roots[0]), last_weights(roots[2]))
    assert rows_of(roots[0]) != rows_of(roots[2])


def test_workers_change_nothing(cola: Path, flags: Callable, tmp_path: Path) -> None:
    for workers in (0, 2):
        classify(**flags(data_dir=str(cola), model_dir=str(tmp_path / str(workers)), num_workers=workers, n_valid=2))
    assert equal(last_weights(tmp_path / "0"), last_weights(tmp_path / "2"))
    assert rows_of(tmp_path / "0") == rows_of(tmp_path / "2")


# ---- resume


class PowerCut(RuntimeError):
    pass


def cut_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The run breaks off at the end of this step."""
    original = engine.Progress.on_train_batch_end

    def broken(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx + 1 == step:
            raise PowerCut
        original(self, trainer, module, outputs, batch, batch_idx)

    monkeypatch.setattr(engine.Progress, "on_train_batch_end", broken)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, numbers: Path, vocab: Path) -> tuple[Path, dict]:
    """18 steps with dropout, five validations of which the third is the best, log intervals that validations fall
    into.
    """
    folder = tmp_path_factory.mktemp("whole")
    flags = {
        "dataset": "custom", "regression": True, "data_dir": str(numbers), "tokenizer_path": str(vocab),
        "output_dir": str(folder / "processed"), "epochs": 3, "train_bsz": 4, "valid_bsz": 3, "lr": 3e-2, "seed": 10,
        "device_id": -1, "n_valid": 5, "n_log_epoch": 1, "dropatt": 0.3, **MODEL,
    }  # fmt: skip
    classify(**flags, model_dir=str(folder / "run"))
    return folder / "run", flags


def assert_same_run(root: Path, whole: Path) -> None:
    assert equal(last_weights(root), last_weights(whole))
    assert equal(weights(root), weights(whole))
    assert rows_of(root) == rows_of(whole)
    one, other = (json.loads((r / "results.json").read_text(encoding="utf-8")) for r in (root, whole))
    for key in ("valid", "best_step", "steps", "parameters"):
        assert one[key] == other[key]


@pytest.mark.parametrize("step", [5, 8, 14, 18])
def test_resumed_equals_uninterrupted(
    step: int, uninterrupted: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole, flags = uninterrupted
    root = tmp_path / "run"
    with monkeypatch.context() as patch:
        cut_at(patch, step)
        with pytest.raises(PowerCut):
            classify(**flags, model_dir=str(root))
    assert (root / "checkpoints" / "last.ckpt").is_file()
    assert not (root / "results.json").exists()
    torch.rand(5)
    classify(model_dir=str(root), resume=True)  # the folder says the rest
    assert_same_run(root, whole)


def test_resumed_twice_with_workers(
    uninterrupted: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole, flags = uninterrupted
    root = tmp_path / "run"
    for step, resume in ((6, False), (12, True)):
        with monkeypatch.context() as patch:
            cut_at(patch, step)
            with pytest.raises(PowerCut):
                classify(**flags, model_dir=str(root), resume=resume, num_workers=2)
    classify(**flags, model_dir=str(root), resume=True, num_workers=1)
    assert_same_run(root, whole)


def test_killed_and_resumed_equals_uninterrupted(uninterrupted: tuple[Path, dict], tmp_path: Path) -> None:
    """SIGKILL at some moment after the first checkpoint: in a step, in a validation, in a write."""
    whole, flags = uninterrupted
    root = tmp_path / "run"
    words = [f"--{name}={value}" for name, value in flags.items()] + [f"--model_dir={root}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "pytorch"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "pytorch" / "classifier.py"), *words], env=environment, stderr=subprocess.DEVNULL
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (root / "checkpoints" / "last.ckpt").is_file() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(random.random() * 0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    classify(**flags, model_dir=str(root), resume=True)
    assert_same_run(root, whole)


def state_of(root: Path) -> dict[str, Any]:
    """All of last.ckpt that decides how a run goes on."""
    checkpoint = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    keys = ("state_dict", "optimizer_states", "lr_schedulers", "AmpPrecision", "rng", "global_step")
    return {key: checkpoint[key] for key in keys if key in checkpoint}


def same_state(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_state(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same_state, one, other))
    return one == other


MODES: dict[str, dict[str, Any]] = {
    "accumulation": {"accumulate_grad_batches": 2, "train_bsz": 2},
    "fp16 O1": {"fp16": True, "amp_opt": "O1"},
    "fp16 O2": {"fp16": True},
    "fp16 O2, accumulation": {"fp16": True, "accumulate_grad_batches": 3, "train_bsz": 2},
    "fp16 O3": {"fp16": True, "amp_opt": "O3"},
    "bf16 O2": {"bf16": True},
    "recomputing": {"gradient_checkpointing": True},
}
_WHOLE: dict[str, Path] = {}


@pytest.fixture
def mode(
    request: pytest.FixtureRequest, uninterrupted: tuple[Path, dict], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict]:
    """An uninterrupted run in one of MODES, made once, and its flags."""
    flags = uninterrupted[1] | MODES[request.param]
    if request.param not in _WHOLE:
        _WHOLE[request.param] = tmp_path_factory.mktemp("mode") / "run"
        classify(**flags, model_dir=str(_WHOLE[request.param]))
    return _WHOLE[request.param], flags


@pytest.mark.parametrize(
    ("mode", "batch"),
    [
        ("accumulation", 15),  # in the middle of a window
        ("accumulation", 16),
        ("fp16 O1", 8),
        ("fp16 O2", 8),
        ("fp16 O2, accumulation", 25),
        ("fp16 O3", 8),
        ("bf16 O2", 8),
        ("recomputing", 8),
    ],
    indirect=["mode"],
)
def test_every_way_to_train_resumes_bit_for_bit(
    mode: tuple[Path, dict], batch: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole, flags = mode
    root = tmp_path / "run"
    with monkeypatch.context() as patch:
        cut_at(patch, batch)
        with pytest.raises(PowerCut):
            classify(**flags, model_dir=str(root), save_steps=3)
    torch.rand(5)
    classify(model_dir=str(root), resume=True)
    assert_same_run(root, whole)
    assert same_state(state_of(root), state_of(whole))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # that torch.compile looks at by itself
def test_compiled_layers_give_the_same_numbers(
    uninterrupted: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And the same names, and a run that resumes. Without the last stage of torch.compile, which takes long."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **kwargs: compile_module(self, backend="aot_eager", **kwargs)
    )
    monkeypatch.setattr(speed, "_check_compiler", lambda: None)
    flags = uninterrupted[1] | {"dropout": 0.0, "dropatt": 0.0}
    plain, compiled, cut = (tmp_path / name for name in ("plain", "compiled", "cut"))
    expected = classify(**flags, model_dir=str(plain))
    results = classify(**flags, model_dir=str(compiled), compile=True)
    assert results["valid"] == pytest.approx(expected["valid"], abs=1e-5)
    for root in (weights, last_weights):
        one, other = root(compiled), root(plain)
        assert one.keys() == other.keys()
        for name in one:
            if not name.endswith("k_head.bias"):  # has no gradient but rounding, which AdamW takes for one
                torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-4)
    with monkeypatch.context() as patch:
        cut_at(patch, 8)
        with pytest.raises(PowerCut):
            classify(**flags, model_dir=str(cut), compile=True)
    classify(model_dir=str(cut), resume=True)
    assert_same_run(cut, compiled)


@pytest.mark.parametrize("mode", ["fp16 O2", "bf16 O2"], indirect=True)
def test_what_is_exported_of_o2_are_the_masters(mode: tuple[Path, dict], uninterrupted: tuple[Path, dict]) -> None:
    root, flags = mode
    half = torch.float16 if "fp16" in flags else torch.bfloat16
    exported = weights(root)
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}
    best = torch.load(root / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert equal(exported, {name.removeprefix("model."): tensor for name, tensor in best.items()})
    finer = [name for name, tensor in exported.items() if not torch.equal(tensor.to(half).float(), tensor)]
    assert len(finer) > 0.7 * len(exported)
    assert not equal(exported, weights(uninterrupted[0]))
    results = json.loads((root / "results.json").read_text(encoding="utf-8"))
    assert results["precision"] == ("fp16 O2" if "fp16" in flags else "bf16 O2")
    # The scores are those of the weights that were validated: the masters in half.
    scored = {int(row["step"]): row for row in rows_of(root) if row["valid/pearson"]}
    assert results["valid"]["pearson"] == float(scored[results["best_step"]]["valid/pearson"])


@pytest.mark.parametrize("mode", ["fp16 O1", "fp16 O2"], indirect=True)
def test_the_table_tells_the_scale(mode: tuple[Path, dict]) -> None:
    rows = [row for row in rows_of(mode[0]) if row["train/loss"]]
    assert len(rows) == 3
    for row in rows:  # every skipped step has halved it
        assert float(row["loss_scale"]) == 2.0 ** (16 - int(row["skipped_steps"]))


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_o0_is_a_run_in_fp32(kind: str, uninterrupted: tuple[Path, dict], tmp_path: Path) -> None:
    whole, flags = uninterrupted
    results = classify(**flags, model_dir=str(tmp_path / "run"), **{kind: True}, amp_opt="O0")
    assert_same_run(tmp_path / "run", whole)
    assert same_state(state_of(tmp_path / "run"), state_of(whole))
    assert results["precision"] == "fp32"


@pytest.mark.parametrize("mode", ["recomputing"], indirect=True)
def test_gradient_checkpointing_changes_no_number(mode: tuple[Path, dict], uninterrupted: tuple[Path, dict]) -> None:
    assert_same_run(mode[0], uninterrupted[0])


@pytest.mark.parametrize("more", [{}, {"fp16": True}, {"fp16": True, "amp_opt": "O3"}], ids=str)
def test_a_window_learns_from_all_its_batches(
    more: dict, uninterrupted: tuple[Path, dict], cola: Path, flags: Callable, tmp_path: Path
) -> None:
    """Two batches of 2 are one step of 4: the same losses but for the last digits, where nothing is random."""
    still = {"dropout": 0.0, "dropatt": 0.0, "epochs": 2, "n_valid": 2, "n_log_epoch": 50, "lr": 1e-3} | more
    for name, size, accumulate in (("one", 4, 1), ("two", 2, 2)):
        shape = {"train_bsz": size, "accumulate_grad_batches": accumulate}
        classify(**flags(data_dir=str(cola), model_dir=str(tmp_path / name), **still, **shape))
    one, two = (
        [float(row["train/loss"]) for row in rows_of(tmp_path / name) if row["train/loss"]] for name in ("one", "two")
    )
    assert len(one) == 12
    assert two == pytest.approx(one, abs=2e-3 if more else 1e-6)
    limit = 2e-3 if more else 1e-5  # Adam divides by gradients that are nearly 0
    for name, tensor in weights(tmp_path / "two").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "one")[name], atol=limit, rtol=0)


# ---- saving, and signals


def test_save_steps_saves_between_validations(
    uninterrupted: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Validations come at 4, 7, ...; a save comes at 6 too, and the one before is kept."""
    whole, flags = uninterrupted
    root = tmp_path / "run"
    with monkeypatch.context() as patch:
        cut_at(patch, 7)
        with pytest.raises(PowerCut):
            classify(**flags, model_dir=str(root), save_steps=3)
    folder = root / "checkpoints"
    steps = {path.name: torch.load(path, weights_only=True)["global_step"] for path in folder.iterdir()}
    assert steps == {"last.ckpt": 6, "previous.ckpt": 4, "best.ckpt": 4}
    classify(model_dir=str(root), resume=True)
    assert_same_run(root, whole)
    assert same_state(state_of(root), state_of(whole))


def signal_at(monkeypatch: pytest.MonkeyPatch, batch: int, *signums: int) -> None:
    """Signals come during this batch (1-based)."""
    original = engine.Pipeline.training_step

    def struck(self, of_batch, batch_idx):
        loss = original(self, of_batch, batch_idx)
        if batch_idx + 1 == batch:
            for signum in signums:
                os.kill(os.getpid(), signum)
        return loss

    monkeypatch.setattr(engine.Pipeline, "training_step", struck)


@pytest.mark.parametrize(
    ("mode", "batch", "saved"),
    [
        ("fp16 O2, accumulation", 14, 5),  # in the middle of a window: at its end
        ("accumulation", 1, 1),
        ("recomputing", 7, 7),  # a step with a validation: after it
        ("recomputing", 18, 18),  # the last of all
        ("fp16 O1", 9, 9),
    ],
    indirect=["mode"],
)
@pytest.mark.parametrize("signum", [signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(
    mode: tuple[Path, dict], batch: int, saved: int, signum: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole, flags = mode
    root = tmp_path / "run"
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with monkeypatch.context() as patch:
        signal_at(patch, batch, signum)
        with pytest.raises(
            Stopped, match=f"Saved after step {saved}; go on with --resume --model_dir={root}"
        ) as caught:
            classify(**flags, model_dir=str(root))
    assert caught.value.signum == signum
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == handlers
    assert torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == saved
    assert is_whole(root / "checkpoints" / "last.ckpt")
    classify(model_dir=str(root), resume=True)
    assert_same_run(root, whole)
    assert same_state(state_of(root), state_of(whole))


@pytest.mark.parametrize("step", [9, 15])  # the best of five validations comes after step 11
def test_a_run_whose_folder_has_moved_knows_its_best(
    step: int, uninterrupted: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole, flags = uninterrupted
    with monkeypatch.context() as patch:
        cut_at(patch, step)
        with pytest.raises(PowerCut):
            classify(**flags, model_dir=str(tmp_path / "here"))
    (tmp_path / "here").rename(tmp_path / "there")
    classify(model_dir=str(tmp_path / "there"), resume=True)
    assert_same_run(tmp_path / "there", whole)
    assert not (tmp_path / "here").exists()


def test_a_signal_during_the_last_save_counts(
    uninterrupted: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole, flags = uninterrupted
    root, save = tmp_path / "run", engine.SaveRun._save

    def struck(self, trainer, leaves):
        save(self, trainer, leaves)
        if trainer.global_step == 18:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(engine.SaveRun, "_save", struck)
        with pytest.raises(Stopped, match="Saved after step 18"):
            classify(**flags, model_dir=str(root))
    classify(model_dir=str(root), resume=True)
    assert_same_run(root, whole)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_training_ends_the_run_as_signals_do(
    signum: int, uninterrupted: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole, flags = uninterrupted
    root, step = tmp_path / "run", engine.Pipeline.test_step
    came: list[int] = []

    def struck(self, batch, batch_idx):
        os.kill(os.getpid(), signum)
        return step(self, batch, batch_idx)

    def by_default(number: int, frame: Any) -> None:
        came.append(number)
        raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(engine.Pipeline, "test_step", struck)
        before = signal.signal(signal.SIGTERM, by_default)  # the default would end the tests
        try:
            with pytest.raises(KeyboardInterrupt if signum == signal.SIGINT else PowerCut):
                classify(**flags, model_dir=str(root))
        finally:
            signal.signal(signal.SIGTERM, before)
    assert came == [signum] * (signum == signal.SIGTERM)
    assert not (root / "results.json").exists()
    classify(model_dir=str(root), resume=True)
    assert_same_run(root, whole)


def test_a_second_ctrl_c_leaves_at_once(
    uninterrupted: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    _, flags = uninterrupted
    root = tmp_path / "run"
    handler = signal.getsignal(signal.SIGINT)
    words = [f"--{name}={value}" for name, value in flags.items()]
    for batch, hint in ((2, "Nothing was saved yet"), (6, f"Go on with --resume --model_dir={root}")):
        with monkeypatch.context() as patch:
            signal_at(patch, batch, signal.SIGINT, signal.SIGINT)
            assert main(["classify", *words, f"--model_dir={root}", "--overwrite"]) == 130
        said = capfd.readouterr().err
        assert said.count("stopping after this step") == 1
        assert said.splitlines()[-1] == f"funneltfm classify: stopped. {hint}."
    assert torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4  # not 6: at once
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_run_in_a_thread_leaves_signals_alone(cola: Path, flags: Callable, tmp_path: Path) -> None:
    """Python allows handlers in the main thread alone."""
    settings = flags(data_dir=str(cola), model_dir=str(tmp_path / "run"), n_valid=1)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(classify, **settings).result()["steps"] == 6


STRUCK = """
import os, sys
from funneltfm.cli.main import main
from funneltfm.training.pipeline import Pipeline

original = Pipeline.training_step

def struck(self, batch, batch_idx):
    if batch_idx + 1 == int(sys.argv[1]):
        os.kill(os.getpid(), int(sys.argv[2]))
    return original(self, batch, batch_idx)

Pipeline.training_step = struck
sys.exit(main(["classify", *sys.argv[3:]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_program_with_its_code(signum: int, uninterrupted: tuple[Path, dict], tmp_path: Path) -> None:
    whole, flags = uninterrupted
    root = tmp_path / "run"
    words = [f"--{name}={value}" for name, value in flags.items()] + [f"--model_dir={root}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "pytorch"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STRUCK, "9", str(int(signum)), *words], env=environment, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 128 + signum, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last == f"funneltfm classify: stopped. Saved after step 9; go on with --resume --model_dir={root}"
    classify(model_dir=str(root), resume=True)
    assert_same_run(root, whole)


def test_a_loss_that_is_no_number_leaves_the_checkpoint_before(
    uninterrupted: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole, flags = uninterrupted
    root = tmp_path / "run"
    original, ids = engine.Pipeline.training_step, []

    def poisoned(self, batch, batch_idx):
        loss = original(self, batch, batch_idx)
        if batch_idx + 1 == 9:
            ids.extend(batch["index"].tolist())
            return loss * float("nan")
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(engine.Pipeline, "training_step", poisoned)
        with pytest.raises(InputError, match=r"loss is nan at step 9 \(epoch 1\.50\).*--lr") as caught:
            classify(**flags, model_dir=str(root), save_steps=1)
    examples = read_split(custom_dataset(flags["data_dir"], "text_a", None, "label", True), flags["data_dir"], "train")
    assert f"the ids {', '.join(str(examples[i].id) for i in ids)}. " in str(caught.value)
    assert torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 8
    classify(model_dir=str(root), resume=True)  # had it been a passing fault
    assert_same_run(root, whole)


def test_resuming_a_finished_run_does_no_harm(uninterrupted: tuple[Path, dict]) -> None:
    whole, _ = uninterrupted
    before = weights(whole), last_weights(whole), rows_of(whole, speed=True)
    results = json.loads((whole / "results.json").read_text(encoding="utf-8"))
    again = classify(model_dir=str(whole), resume=True)
    assert equal(before[0], weights(whole))
    assert equal(before[1], last_weights(whole))
    assert before[2] == rows_of(whole, speed=True)
    assert again == results


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("train.jsonl", '"mood": "so so"', '"mood": "not good"'),
        ("train.jsonl", "the", "cat"),
        ("valid.jsonl", "the", "cat"),
        ("train.jsonl", "very good", "zzz"),
        ("vocab.txt", "cat\ndog", "dog\ncat"),
    ],
)
def test_a_run_does_not_go_on_with_other_data(
    file: str, old: str, new: str, flags: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels, texts, what the best is chosen by, the order of the classes, the ids of words."""
    data = tmp_path / "data"
    data.mkdir()
    given = flags(data_dir=str(data), **custom_jsonl(data), model_dir=str(tmp_path / "run"), epochs=2)
    vocabulary = data / "vocab.txt"
    vocabulary.write_bytes(Path(given["tokenizer_path"]).read_bytes())
    given["tokenizer_path"] = str(vocabulary)
    with monkeypatch.context() as patch:
        cut_at(patch, 6)
        with pytest.raises(PowerCut):
            classify(**given)
    before = (data / file).read_text(encoding="utf-8")
    assert old in before
    for path in data.glob("*.jsonl" if new == "zzz" else file):  # a class that has another name has it everywhere
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(old, new, -1 if new == "zzz" else 1), encoding="utf-8")
    with pytest.raises(InputError, match="not those that the run began with"):
        classify(model_dir=given["model_dir"], resume=True)
    if new == "zzz":
        for path in data.glob("*.jsonl"):
            path.write_text(path.read_text(encoding="utf-8").replace(new, old), encoding="utf-8")
    (data / file).write_text(before, encoding="utf-8")
    classify(model_dir=given["model_dir"], resume=True)


def test_a_sealed_checkpoint_of_something_else_is_passed_over(
    uninterrupted: tuple[Path, dict],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole, flags = uninterrupted
    root = tmp_path / "run"
    with monkeypatch.context() as patch:
        cut_at(patch, 14)
        with pytest.raises(PowerCut):
            classify(**flags, model_dir=str(root))
    last, best = root / "checkpoints" / "last.ckpt", root / "checkpoints" / "best.ckpt"
    good = last.read_bytes()
    last.write_bytes(best.read_bytes())  # weights alone
    classify(model_dir=str(root), resume=True)
    assert f"the checkpoint {last} is not of a training that can go on; trying previous.ckpt" in caplog.messages
    assert_same_run(root, whole)

    config = root / "config.yaml"
    config.write_text(config.read_text(encoding="utf-8").replace("d_inner: 16", "d_inner: 8"), encoding="utf-8")
    last.write_bytes(good)
    with pytest.raises(InputError, match=r"foreign or damaged.*--overwrite"):
        classify(model_dir=str(root), resume=True)
    assert f"the checkpoint {last} is of another model; trying previous.ckpt" in caplog.messages


def test_max_tokens_from_the_command_line_and_resumed(
    cola: Path, flags: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what was typed counts as given."""
    given = flags(data_dir=str(cola), epochs=2, max_tokens=60)
    for name in ("train_bsz", "valid_bsz", "test_bsz"):
        given.pop(name, None)
    words = [f"--{name}={value}" for name, value in given.items() if name != "model_dir"]
    assert main(["classify", *words, f"--model_dir={tmp_path / 'whole'}"]) == 0
    root = tmp_path / "run"
    with monkeypatch.context() as patch:
        cut_at(patch, 5)
        with pytest.raises(PowerCut):
            main(["classify", *words, f"--model_dir={root}"])
    assert main(["classify", "--resume", f"--model_dir={root}"]) == 0
    assert_same_run(root, tmp_path / "whole")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": 5}, "a table that is meant to be larger"),
        ({"overwrite_keys": "d_model"}, "--overwrite_keys is about the config of --init_ckpt"),
        ({"distributed_rank": 1, "distributed_world_size": 2}, "--distributed_init_method"),
        ({"distributed_world_size": 1000000}, "distributed_world_size must be at most"),
        ({"accumulate_grad_batches": 1000000}, "as many examples at least"),
        ({"log_path": "data"}, "is there already"),
    ],
    ids=str,
)
def test_flags_that_cannot_be_meant(
    more: dict[str, Any], says: str, cola: Path, flags: Callable, tmp_path: Path
) -> None:
    if "log_path" in more:
        more = {"log_path": str(cola / "train.tsv")}
    before = (cola / "train.tsv").read_bytes()
    with pytest.raises(InputError, match=says):
        classify(**flags(data_dir=str(cola), model_dir=str(tmp_path / "run"), **more))
    assert (cola / "train.tsv").read_bytes() == before


def test_validations_are_at_most_as_many_as_steps() -> None:
    assert engine.validation_steps(30, 2**31 - 1) == engine.validation_steps(30, 30) == set(range(1, 31))


def test_going_on_where_nothing_is(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no run to go on with in .*nowhere"):
        classify(resume=True, model_dir=str(tmp_path / "nowhere"))


def test_memory_that_does_not_suffice_is_said(
    cola: Path, flags: Callable, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    given = flags(data_dir=str(cola), model_dir=str(tmp_path / "run"), d_model=2**20, d_inner=2**31 - 1)
    assert main(["classify", *(f"--{name}={value}" for name, value in given.items())]) == 1
    said = capsys.readouterr().err
    assert "error: out of memory" in said
    assert "Traceback" not in said


def test_resuming_with_other_settings_is_refused(uninterrupted: tuple[Path, dict]) -> None:
    whole, flags = uninterrupted
    config = (whole / "config.yaml").read_bytes()
    for name, value in (("lr", 1e-3), ("epochs", 4), ("train_bsz", 8), ("seed", 1), ("d_inner", 32), ("n_valid", 3)):
        with pytest.raises(InputError, match=rf"started with --{name}=.*--{name}={value}"):
            classify(**(flags | {name: value}), model_dir=str(whole), resume=True)
    assert (whole / "config.yaml").read_bytes() == config


def test_nothing_to_resume(cola: Path, flags: Callable, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing to resume.*checkpoints") as caught:
        classify(**flags(data_dir=str(cola), model_dir=str(tmp_path / "none")), resume=True)
    assert str(tmp_path / "none") in str(caught.value)
    assert not (tmp_path / "none").exists()  # a mistyped name leaves no trace


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 half a zip"])
def test_of_a_damaged_last_checkpoint_the_one_before_is_used(
    content: bytes,
    uninterrupted: tuple[Path, dict],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole, flags = uninterrupted
    root = tmp_path / "run"
    with monkeypatch.context() as patch:
        cut_at(patch, 8)
        with pytest.raises(PowerCut):
            classify(**flags, model_dir=str(root))
    (root / "checkpoints" / "last.ckpt").write_bytes(content)
    classify(**flags, model_dir=str(root), resume=True)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warned == [f"the checkpoint {root / 'checkpoints' / 'last.ckpt'} is damaged; trying previous.ckpt"]
    assert_same_run(root, whole)


def test_where_no_checkpoint_is_whole_it_is_said(
    uninterrupted: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, flags = uninterrupted
    root = tmp_path / "run"
    cut_at(monkeypatch, 8)
    with pytest.raises(PowerCut):
        classify(**flags, model_dir=str(root))
    for name in ("last.ckpt", "previous.ckpt"):
        (root / "checkpoints" / name).write_bytes((root / "checkpoints" / name).read_bytes()[:-1])
    with pytest.raises(InputError, match=r"damaged \(.*last\.ckpt, .*previous\.ckpt\).*--overwrite"):
        classify(**flags, model_dir=str(root), resume=True)


# ---- a run that is there already


def test_a_run_is_not_overwritten_by_accident(cola: Path, flags: Callable, tmp_path: Path) -> None:
    settings = flags(data_dir=str(cola), model_dir=str(tmp_path / "run"), n_valid=1)
    classify(**settings)
    before = weights(tmp_path / "run")
    with pytest.raises(InputError, match="already holds a run"):
        classify(**settings)
    assert equal(before, weights(tmp_path / "run"))
    (tmp_path / "run" / "notes.txt").write_text("mine", encoding="utf-8")
    classify(**settings, overwrite=True, seed=1)
    assert not equal(before, weights(tmp_path / "run"))
    assert (tmp_path / "run" / "notes.txt").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("mistake", [{"d_model": 7}, {"model_size": "H5"}, {"init_ckpt": "none.pt"}], ids=str)
def test_overwrite_removes_nothing_before_the_new_run_can_start(
    mistake: dict, cola: Path, flags: Callable, tmp_path: Path
) -> None:
    settings = flags(data_dir=str(cola), model_dir=str(tmp_path / "run"), n_valid=1)
    classify(**settings)
    before = weights(tmp_path / "run")
    with pytest.raises(InputError):
        classify(**(settings | {"overwrite": True} | mistake))
    assert equal(before, weights(tmp_path / "run"))


def test_overwrite_may_start_from_the_run_that_it_replaces(cola: Path, flags: Callable, tmp_path: Path) -> None:
    settings = flags(data_dir=str(cola), model_dir=str(tmp_path / "run"), n_valid=1)
    classify(**settings)
    best = tmp_path / "run" / "best"
    more = {"init_ckpt": str(best / "model.pt"), "tokenizer_path": str(best / "vocab.txt"), "overwrite": True}
    assert classify(**(settings | more))["steps"] == 6


def test_the_default_folder_counts_up(
    cola: Path, flags: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        classify(**flags(data_dir=str(cola), n_valid=1))
        assert (tmp_path / f"exp/CoLA/run_{number}/results.json").is_file()


# ---- test only


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cola: Path, vocab: Path) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("trained")
    flags = {
        "dataset": "CoLA", "data_dir": str(cola), "tokenizer_path": str(vocab), "output_dir": str(folder / "processed"),
        "epochs": 2, "train_bsz": 4, "lr": 1e-2, "device_id": -1, "n_valid": 2, **MODEL,
    }  # fmt: skip
    classify(**flags, model_dir=str(folder / "run"))
    return folder / "run", flags


def test_test_only_from_the_folder_alone(trained: tuple[Path, dict]) -> None:
    root, _ = trained
    before = json.loads((root / "results.json").read_text(encoding="utf-8"))
    files = {name: (root / name).read_bytes() for name in ("metrics.csv", "config.yaml", "best/model.pt")}
    results = classify(model_dir=str(root), test_only=True, write_prediction=True)
    assert results["valid"] == pytest.approx(before["valid"])
    after = json.loads((root / "results.json").read_text(encoding="utf-8"))
    assert after["best_step"] == before["best_step"]  # what training wrote is still there
    assert after["train_seconds"] == before["train_seconds"]
    assert {name: (root / name).read_bytes() for name in files} == files
    assert (root / "predictions" / "CoLA.tsv").is_file()


def test_test_only_from_a_checkpoint(trained: tuple[Path, dict], tmp_path: Path) -> None:
    root, flags = trained
    before = json.loads((root / "results.json").read_text(encoding="utf-8"))
    more = {"init_ckpt": str(root / "best" / "model.pt"), "model_dir": str(tmp_path / "out"), "test_only": True}
    results = classify(**flags, **more)
    assert results["valid"] == pytest.approx(before["valid"])
    assert "best_step" not in results
    assert not (tmp_path / "out" / "best").exists()
    for name in ("metrics.csv", "checkpoints"):
        assert not (tmp_path / "out" / name).exists()


def test_test_only_of_a_checkpoint_leaves_other_runs_alone(
    trained: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without model_dir its results are not put into the newest run, which is another model's."""
    root, flags = trained
    monkeypatch.chdir(tmp_path)
    classify(**(flags | {"seed": 3}))
    before = (tmp_path / "exp/CoLA/run_1/results.json").read_bytes()
    classify(**flags, init_ckpt=str(root / "best" / "model.pt"), test_only=True)
    assert (tmp_path / "exp/CoLA/run_1/results.json").read_bytes() == before


def test_test_only_without_a_model(cola: Path, flags: Callable, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--test_only needs a trained model.*--init_ckpt.*--model_dir"):
        classify(**flags(data_dir=str(cola), model_dir=str(tmp_path / "none")), test_only=True)
    assert not (tmp_path / "none").exists()


def test_test_only_on_other_classes_is_refused(trained: tuple[Path, dict], flags: Callable, tmp_path: Path) -> None:
    """As many classes, but other ones: the numbers would be nonsense."""
    root, _ = trained
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_text(
            '{"text_a": "a dog", "label": "no"}\n{"text_a": "a cat", "label": "yes"}\n', encoding="utf-8"
        )
    more = {"init_ckpt": str(root / "best" / "model.pt"), "model_dir": str(tmp_path / "out"), "test_only": True}
    with pytest.raises(InputError, match=r"trained for the classes 0, 1, but .* has no, yes"):
        classify(**flags(dataset="custom", data_dir=str(tmp_path)), **more)


def test_a_model_that_gives_no_numbers_is_named(trained: tuple[Path, dict], tmp_path: Path) -> None:
    root, flags = trained
    state = weights(root)
    state["cls_head.0.bias"].fill_(100.0)  # finite, as a checkpoint must be, but tanh of it times these is not
    state["cls_head.3.weight"].fill_(3e38)
    torch.save(state, tmp_path / "model.pt")
    (tmp_path / "net_config.json").write_bytes((root / "best" / "net_config.json").read_bytes())
    with pytest.raises(InputError, match="gives no numbers"):
        classify(**flags, init_ckpt=str(tmp_path / "model.pt"), model_dir=str(tmp_path / "out"), test_only=True)


# ---- finetuning


def test_finetuning_with_another_number_of_classes_has_a_new_head(
    trained: tuple[Path, dict], flags: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = trained
    before = weights(root)
    started: dict[str, torch.Tensor] = {}
    original = engine.make_model

    def caught(*args):
        model = original(*args)
        started.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return model

    monkeypatch.setattr(engine, "make_model", caught)
    (tmp_path / "data").mkdir()
    settings = flags(**custom_jsonl(tmp_path / "data"), data_dir=str(tmp_path / "data"))
    for name in MODEL:  # the config beside the checkpoint says it all
        settings.pop(name)
    classify(**settings, model_dir=str(tmp_path / "run"), init_ckpt=str(root / "best" / "model.pt"))
    new = {name for name in started if not torch.equal(started[name], before[name])}
    assert new == {"cls_head.3.weight", "cls_head.3.bias"}
    assert started["cls_head.3.weight"].shape == (8, 3)
    config = ModelConfig.init_from_json(tmp_path / "run" / "best" / "net_config.json")
    assert (config.num_class, config.d_model, config.block_size) == (3, 8, "1_1")
    assert json.loads((tmp_path / "run" / "best" / "labels.json").read_text(encoding="utf-8")) == [
        "not good", "so so", "very good",
    ]  # fmt: skip


def test_overwrite_keys(trained: tuple[Path, dict], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, flags = trained
    more = {"init_ckpt": str(root / "best" / "model.pt"), "dropout": 0.4, "dropatt": 0.3, "overwrite_keys": "dropout"}
    classify(**flags, **more, model_dir=str(tmp_path / "run"))
    config = ModelConfig.init_from_json(tmp_path / "run" / "best" / "net_config.json")
    assert (config.dropout, config.dropatt) == (0.4, 0.1)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 1
    assert "--dropatt=0.3 is not used" in warned[0]
    assert "--overwrite_keys=dropatt" in warned[0]
    with pytest.raises(InputError, match="overwrite_keys names dropuot"):
        classify(**flags, **(more | {"overwrite_keys": "dropuot"}), model_dir=str(tmp_path / "other"))


@pytest.mark.skipif(not FIXTURE.is_dir(), reason="the fixtures are not there")
def test_starting_from_the_originals_checkpoint(cola: Path, flags: Callable, tmp_path: Path) -> None:
    """Weights that the original's converter wrote, with the config that it wrote beside them."""
    pieces = ["<pad>", "<unk>", "<cls>", "<sep>", *WORDS]
    pieces += [f"[unused{i}]" for i in range(97 - len(pieces))]
    (tmp_path / "vocab97.txt").write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")
    settings = flags(data_dir=str(cola), model_dir=str(tmp_path / "run"), n_valid=1, lr=1e-9, weight_decay=0.0)
    for name in MODEL:
        settings.pop(name)
    more = {
        "init_ckpt": str(FIXTURE / "converted.pt"), "init_ckpt_config": str(FIXTURE / "net_config.pytorch.json"),
        "tokenizer_path": str(tmp_path / "vocab97.txt"), "truncate_seq": True,
    }  # fmt: skip
    classify(**(settings | more))
    original = torch.load(FIXTURE / "converted.pt", map_location="cpu", weights_only=True)
    tuned = weights(tmp_path / "run")
    assert {name for name in original if not name.startswith("cls_head")} <= set(tuned)
    for name, tensor in original.items():
        if not name.startswith("cls_head"):
            torch.testing.assert_close(tuned[name], tensor, atol=1e-6, rtol=0)
    assert ModelConfig.init_from_json(tmp_path / "run" / "best" / "net_config.json").truncate_seq
    with pytest.raises(InputError, match="vocabulary does not match"):
        classify(**(settings | more | {"tokenizer_path": settings["tokenizer_path"], "model_dir": str(tmp_path / "b")}))


# ---- learning


def test_it_learns(flags: Callable, tmp_path: Path) -> None:
    """One word decides: after a few epochs the dev set is right."""
    for name, n, seed in (("train", 160, 1), ("dev", 40, 2)):
        rows = [f"x\t{int('good' in text.split())}\t\t{text}\n" for text in sentences(n, seed)]
        (tmp_path / f"{name}.tsv").write_text("".join(rows), encoding="utf-8")
    results = classify(
        **flags(data_dir=str(tmp_path), model_dir=str(tmp_path / "run"), epochs=8, train_bsz=8, n_valid=2, lr=1e-2)
    )
    assert results["valid"]["accuracy"] > 0.95


def test_a_loss_that_is_not_finite_is_an_error(cola: Path, flags: Callable, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"loss is nan at step 2 .* ids \d+, \d+, \d+, \d+\. .*lower --lr"):
        classify(**flags(data_dir=str(cola), model_dir=str(tmp_path / "run"), lr=1e38, clip=0.0, epochs=3))


def test_one_class_alone_is_refused(flags: Callable, tmp_path: Path) -> None:
    """Custom data whose labels are all the same: there is nothing to learn, most likely the wrong column."""
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_text('{"text_a": "a dog", "label": "no"}\n' * 4, encoding="utf-8")
    with pytest.raises(InputError, match="label"):
        classify(**flags(dataset="custom", data_dir=str(tmp_path), model_dir=str(tmp_path / "run")))
