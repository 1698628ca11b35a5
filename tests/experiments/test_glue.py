"""GLUE in experiments: data of nine tasks, scores against numbers computed by hand, tables, finetuning."""

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from funneltfm.errors import InputError
from funneltfm.experiments.glue import GLUE, score, summary, task_flags, validation, write_data
from funneltfm.experiments.registry import Experiments
from funneltfm.experiments.runner import Runner, Settings
from funneltfm.experiments.tables import ORIGINAL, as_csv, markdown, summary_rows, tables

# Columns of GLUE's own files; None has no header.
HEADERS = {
    "CoLA": None,
    "MNLI": "index\tsentence1\tsentence2\tgold_label",
    "MRPC": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "QNLI": "index\tquestion\tsentence\tlabel",
    "QQP": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "RTE": "index\tsentence1\tsentence2\tlabel",
    "SST-2": "sentence\tlabel",
    "STS-B": "index\tsentence1\tsentence2\tscore",
    "WNLI": "index\tsentence1\tsentence2\tlabel",
}


def line(name: str, i: int) -> str:
    labels = GLUE[next(task for task in GLUE if GLUE[task].name == name)].spec.labels
    label = labels[i % len(labels)] if labels else f"{i % 6}.5"
    if name == "CoLA":
        return f"src\t{label}\t\tthe film {i}"
    header = HEADERS[name].split("\t")
    last = {"Quality", "gold_label", "label", "is_duplicate", "score"}
    return "\t".join(label if column in last else f"{column} {i}" for column in header)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/glue with all tasks: six rows to train on, four (and five) to validate."""
    folder = tmp_path_factory.mktemp("data")
    for name, header in HEADERS.items():
        splits = {"train": 6, "dev": 4} if name != "MNLI" else {"train": 6, "dev_matched": 4, "dev_mismatched": 5}
        (folder / "glue" / name).mkdir(parents=True)
        for split, n in splits.items():
            lines = [*([] if header is None else [header]), *(line(name, i) for i in range(n))]
            (folder / "glue" / name / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


# ---- data


@pytest.mark.parametrize("task", GLUE)
def test_data_of_the_files_of_glue(task: str, files: Path, tmp_path: Path) -> None:
    paths = write_data(task, str(files), None, tmp_path)
    assert set(paths) == {"train", "valid"} | ({"valid_mm"} if task == "mnli" else set())
    assert [len(rows_of(paths[split])) for split in paths] == [6, 4, 5][: len(paths)]
    row = rows_of(paths["train"])[1]
    assert ("text_b" in row) == (len(GLUE[task].columns) == 2)
    labels = GLUE[task].spec.labels
    assert row["label"] == (labels[1] if labels else "1.5")
    before = paths["train"].stat().st_mtime_ns
    write_data(task, str(files), None, tmp_path)
    assert paths["train"].stat().st_mtime_ns == before


@pytest.mark.parametrize("task", ["cola", "mnli", "qnli", "stsb"])
def test_data_of_a_folder_of_datasets_is_the_same(task: str, files: Path, tmp_path: Path) -> None:
    """As the hub has it: other names of columns, and labels that are numbers."""
    one = GLUE[task]
    own = write_data(task, str(files), None, tmp_path / "own")
    names = {"mnli": ["entailment", "neutral", "contradiction"], "cola": ["unacceptable", "acceptable"]}
    names["qnli"] = ["entailment", "not_entailment"]
    parts = {}
    for split, path in own.items():
        rows = rows_of(path)
        labels = [float(r["label"]) if task == "stsb" else r["label"] for r in rows]
        if task == "cola":
            labels = [int(label) for label in labels]
        columns = {c: [r[f"text_{x}"] for r in rows] for x, c in zip("ab", one.columns, strict=False)}
        data = datasets.Dataset.from_dict(columns | {"label": labels})
        if task != "stsb":
            data = data.cast_column("label", datasets.ClassLabel(names=names[task]))
        suffix = {"valid": "_matched", "valid_mm": "_mismatched"}.get(split, "") if task == "mnli" else ""
        parts["train" if split == "train" else f"validation{suffix}"] = data
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved" / task)
    found = write_data(task, str(tmp_path / "saved"), None, tmp_path / "found")
    assert {split: rows_of(path) for split, path in found.items()} == {s: rows_of(p) for s, p in own.items()}


def test_data_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no folder of RTE in .*download_glue.sh RTE.*--glue_hub"):
        write_data("rte", str(tmp_path), None, tmp_path)


# ---- scores


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def scored(task: str, folder: Path, pred: list[Any], labels: list[Any], mm: tuple[list[Any], list[Any]] | None = None):
    data = {"train": folder / "t", "valid": folder / "v"}
    write(data["valid"], [{"label": label} for label in labels])
    write(folder / "p" / "valid.jsonl", [{"prediction": one} for one in pred])
    if mm is not None:
        data["valid_mm"] = folder / "mm"
        write(data["valid_mm"], [{"label": label} for label in mm[1]])
        write(folder / "p" / "test.jsonl", [{"prediction": one} for one in mm[0]])
    return score(task, folder / "p", data)


def test_scores_by_hand(tmp_path: Path) -> None:
    """pred 1 1 1 0 0, labels 1 1 0 0 1: tp 2, fp 1, fn 1, tn 1."""
    pred, labels = ["1", "1", "1", "0", "0"], ["1", "1", "0", "0", "1"]
    mcc = (2 * 1 - 1 * 1) / (3 * 3 * 2 * 2) ** 0.5
    assert scored("cola", tmp_path, pred, labels) == {"mcc": pytest.approx(100 * mcc)}
    both = {"f1": pytest.approx(200 / 3), "accuracy": pytest.approx(60)}
    assert scored("mrpc", tmp_path, pred, labels) == both
    assert list(scored("mrpc", tmp_path, pred, labels)) == ["f1", "accuracy"]
    assert list(scored("qqp", tmp_path, pred, labels)) == ["accuracy", "f1"]
    x, y = [1.0, 2.0, 4.0], ["0", "2", "1.0"]
    pearson = np.corrcoef(x, [0, 2, 1])[0, 1]
    expected = {"pearson": pytest.approx(100 * pearson), "spearman": pytest.approx(50)}  # 1 - 6 (0 + 1 + 1) / 24
    assert scored("stsb", tmp_path, x, y) == expected
    n, c, e = "neutral", "contradiction", "entailment"
    found = scored("mnli", tmp_path, [n, c, e, e], [n, c, e, n], ([n, c], [n, e]))
    assert found == {"accuracy": 75.0, "accuracy_mm": 50.0}
    assert scored("rte", tmp_path, [e, "not_entailment"], [e, e]) == {"accuracy": 50.0}
    with pytest.raises(InputError, match=r"has 1 predictions, .* 2 rows: GLUE is scored over whole sets"):
        scored("sst2", tmp_path, ["1"], ["1", "0"])


def test_summary_by_hand() -> None:
    runs = {
        "cola": [{"mcc": 30.0}, {"mcc": 50.0}],
        "mnli": [{"accuracy": 70.0, "accuracy_mm": 80.0}, {"accuracy": 72.0, "accuracy_mm": 76.0}],
    }
    found = summary(runs)
    assert found["tasks"]["cola"]["mean"] == {"mcc": 40.0}
    assert found["tasks"]["cola"]["std"]["mcc"] == pytest.approx(200**0.5)
    assert found["tasks"]["mnli"]["max"] == {"accuracy": 70.0, "accuracy_mm": 80.0}  # one run's, not each one's
    assert found["average_bert"] == found["average_glue"] == {"mean": None, "max": None}
    one = {task: [dict.fromkeys(GLUE[task].metrics, 60.0)] for task in GLUE}
    all_of = summary(one | runs | {"wnli": [{"accuracy": 15.0}]})
    mean_bert = (40 + 74.5 + 6 * 60) / 8  # cola, mnli, mrpc qnli qqp rte sst2 stsb
    max_bert = (50 + 75 + 6 * 60) / 8
    assert all_of["average_bert"] == {"mean": pytest.approx(mean_bert), "max": pytest.approx(max_bert)}
    mean_glue = (mean_bert * 8 + 15) / 9
    assert all_of["average_glue"]["mean"] == pytest.approx(mean_glue)
    rows = summary_rows("ours", all_of)
    assert [row["of"] for row in rows] == ["mean over runs", "best run", "spread (standard deviation)"]
    assert rows[0]["mnli"] == "71.00/78.00"
    assert rows[0]["average_bert"] == f"{mean_bert:.2f}"
    assert rows[1]["cola"] == "50.00"
    assert (rows[2]["cola"], rows[2]["rte"], rows[2]["average_bert"]) == ("14.14", "", "")
    assert rows[0]["note"].startswith("runs: cola 2 mnli 2 mrpc 1")


def test_averages_of_the_original_are_these_averages() -> None:
    """Its rows have two digits, so the averages of what they show are right to about one."""
    with open(ORIGINAL, newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 13
    for row in rows:
        cells = {task: [float(x) for x in row[task].split("/")] for task in GLUE}
        assert all(len(cells[task]) == len(GLUE[task].metrics) for task in GLUE)
        runs = {task: [dict(zip(GLUE[task].metrics, cells[task], strict=True))] for task in GLUE}
        found = summary(runs)
        for average in ("average_bert", "average_glue"):
            assert found[average]["mean"] == pytest.approx(float(row[average]), abs=0.011), (row["model"], average)


# ---- the experiment

MORE = """
tiny_glue:
  about: tiny
  glue:
    model: "{model:tiny_sparse}"
    flags: {max_epochs: 1, batch_size: 4, max_sequence_length: 16, accelerator: cpu, learning_rate: 1e-3, seed: 3}
    tasks:
      cola: {num_runs: 2, max_steps: 3, eval_steps: 2}
      mnli: {}
      stsb: {max_steps: 2}
"""


@pytest.fixture
def runner(tiny_yaml: Path, corpus: Path, tmp_path: Path, files: Path) -> Any:
    tiny_yaml.write_text(tiny_yaml.read_text() + MORE)

    def make(**settings: Any) -> Runner:
        common = {"data_dir": str(corpus), "output_dir": str(tmp_path / "out")}
        return Runner(Experiments([tiny_yaml]), Settings(**(common | settings)))

    return make


def test_flags_of_tasks(runner: Any, tmp_path: Path) -> None:
    made = runner(dry_run=True, overrides={"glue": {"batch_size": 8}, "stsb": {"batch_size": 2, "max_steps": 4}})
    found = task_flags(made, made.experiments.get("tiny_glue"))
    assert {task: runs for task, (runs, _, _) in found.items()} == {"cola": 2, "mnli": 1, "stsb": 1}
    cola, mnli, stsb = (flags | validation(flags, every) for _, every, flags in found.values())
    assert "max_epochs" not in cola
    assert (cola["val_check_interval"], cola["check_val_every_n_epoch"], cola["batch_size"]) == (2, None, 8)
    assert (mnli["max_epochs"], mnli["check_val_every_n_epoch"]) == (1, 1)
    assert (stsb["batch_size"], stsb["val_check_interval"]) == (2, 4)
    assert stsb["pre_trained_model"].endswith("pre_trained_models/tiny_sparse-again/best")
    assert list(task_flags(made, made.experiments.get("tiny_glue"), ("stsb",))) == ["stsb"]
    found = task_flags(runner(dry_run=True, num_runs=4), made.experiments.get("tiny_glue"))
    assert [runs for runs, _, _ in found.values()] == [4, 4, 4]
    for number, name in ((0, "tiny_glue"), (2, "tiny_sparse")):
        with pytest.raises(InputError, match=f"--num_runs must be at least 1.* got {number}"):
            runner(dry_run=True, num_runs=number).run([name])
    with pytest.raises(InputError, match="needs the model of tiny_sparse"):
        runner().run(["tiny_glue"])


def test_best_hyper_parameters_win(runner: Any, tiny_yaml: Path, tmp_path: Path) -> None:
    best = tmp_path / "best.yaml"
    tiny_yaml.write_text(tiny_yaml.read_text() + f"\nread: {{extends: tiny_glue, glue: {{best: '{best}'}}}}\n")
    made = runner()
    (made.best("tiny_sparse-again")).mkdir(parents=True)
    with pytest.raises(InputError, match=r"read reads its hyper-parameters from .*best.yaml, which is not there"):
        task_flags(made, made.experiments.get("read"))
    best.write_text("cola: {learning_rate: 2e-3, max_steps: 7}\n")
    found = task_flags(made, made.experiments.get("read"))
    assert (found["cola"][2]["learning_rate"], found["cola"][2]["max_steps"], found["cola"][0]) == (2e-3, 7, 2)
    assert found["mnli"][2]["learning_rate"] == 1e-3
    best.write_text("colla: {learning_rate: 2e-3}\n")
    with pytest.raises(InputError, match="must hold flags by GLUE task"):
        task_flags(made, made.experiments.get("read"))


def test_what_is_shipped_has_the_settings_of_the_original() -> None:
    """Section 2.2 of the specification."""
    made = Runner(Experiments(), Settings(dry_run=True))
    found = {
        way: task_flags(made, made.experiments.get(f"glue-{way}-bert_100k"))
        for way in ("table", "simple", "get_info", "hp_chase")
    }
    for way, tasks in found.items():
        assert set(tasks) == set(GLUE)
        for _, _, flags in tasks.values():
            assert (flags["batch_size"], flags["max_sequence_length"]) == (32, [128])
            assert flags.get("num_warmup_steps", 0) == (0 if way == "table" else 0.1)
            if way != "hp_chase":
                assert flags["learning_rate"] == 2e-5
    runs = {task: runs for task, (runs, _, _) in found["table"].items()}
    assert runs == {
        "cola": 10, "mnli": 1, "mrpc": 3, "qnli": 1, "qqp": 1, "rte": 10, "sst2": 1, "stsb": 3, "wnli": 10
    }  # fmt: skip
    epochs = {task: flags["max_epochs"] for task, (_, _, flags) in found["table"].items()}
    assert {task for task in epochs if epochs[task] == 5} == {"cola", "mrpc", "wnli"}
    assert all(every is None for _, every, _ in found["table"].values())
    num_runs, every, flags = found["get_info"]["stsb"]
    assert (num_runs, every, flags["max_steps"]) == (10, 150, 3124)
    assert (found["simple"]["cola"][0], found["simple"]["mnli"][0], found["simple"]["mnli"][1]) == (5, 3, 1000)
    assert found["hp_chase"]["qnli"][2]["learning_rate"] == 1.78e-6
    assert found["hp_chase"]["qnli"][2]["max_steps"] == 92532


@pytest.mark.slow
def test_finetuning_of_a_sparse_model_keeps_its_masks(runner: Any, files: Path, corpus: Path, tmp_path: Path) -> None:
    runner().run(["tiny", "tiny_sparse"])
    runner(data_dir=str(files)).run(["tiny_glue"])
    out = tmp_path / "out"
    found = json.loads((out / "experiments" / "tiny_glue.glue.json").read_text())
    assert {task: len(of["runs"]) for task, of in found["tasks"].items()} == {"cola": 2, "mnli": 1, "stsb": 1}
    before = json.loads((out / "runs" / "tiny_sparse-pretrain" / "results.json").read_text())["density"]["mask"]
    for name in ("cola-run_1", "cola-run_2", "mnli-run_1", "stsb-run_1"):
        results = json.loads((out / "runs" / f"tiny_glue-{name}" / "results.json").read_text())
        assert results["density"]["mask"] == before
        assert not (out / "pre_trained_models" / f"tiny_glue-{name}").exists()
    seeds = [json.loads((out / f"runs/tiny_glue-cola-run_{i}/results.json").read_text())["seed"] for i in (1, 2)]
    assert seeds == [3, 4]
    results = json.loads((out / "runs" / "tiny_glue-mnli-run_1" / "results.json").read_text())
    assert found["tasks"]["mnli"]["runs"][0]["accuracy_mm"] == 100 * results["test"]["seq_class/accuracy"]
    assert found["tasks"]["mnli"]["runs"][0]["accuracy"] == 100 * results["valid"]["seq_class/accuracy"]
    assert "| tiny_glue | mean over runs |" in (out / "experiments" / "glue.md").read_text()
    with open(out / "experiments" / "glue.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 13 + 3
    assert rows[0]["of"] == "original"
    before_again = (out / "runs" / "tiny_glue-cola-run_1" / "results.json").stat().st_mtime_ns
    runner(data_dir=str(files), tasks=("cola",)).run(["tiny_glue"])  # nothing to do, and nothing lost
    again = json.loads((out / "experiments" / "tiny_glue.glue.json").read_text())
    assert again == found
    assert (out / "runs" / "tiny_glue-cola-run_1" / "results.json").stat().st_mtime_ns == before_again


def test_tables_without_results(runner: Any) -> None:
    text = tables(runner())
    assert "| bert_1mi |  |  |  |  |  | 1.612 | 5.013 |" in text
    assert "trifecta_80_hp_chase | original | 77.82" in text.replace("| trifecta", "trifecta")
    assert markdown([]) == as_csv([]) == ""
