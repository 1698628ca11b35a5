"""The search for hyper-parameters: what is asked for, what is held out, and a search that goes on."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from funneltfm.errors import Diverged, InputError
from funneltfm.experiments.glue import task_flags
from funneltfm.experiments.registry import Experiments
from funneltfm.experiments.runner import Runner, Settings
from funneltfm.experiments.search import _choice, _read, hold_out, search

MORE = """
tiny_glue:
  about: tiny
  glue: {model: "{model:tiny}", flags: {max_epochs: 2, batch_size: 4, seed: 3}, tasks: {cola: {}, rte: {}}}
tiny_search:
  about: a search
  search:
    glue: tiny_glue
    holdout: 0.25
    tasks:
      cola: {trials: 6, learning_rate: {low: 1e-5, high: 1e-1, log: true}, max_steps: {low: 5, high: 9},
             num_warmup_steps: [0.0, 0.1]}
      rte: {trials: 2, learning_rate: {low: 1e-5, high: 1e-2}}
tiny_tuned: {extends: tiny_glue, about: tuned, glue: {best: "{output_dir}/experiments/tiny_search.best.yaml"}}
"""


class FakeRunner(Runner):
    """Scores a trial by its learning rate: 1e-3 is best; above 3e-2 it diverges."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.trained: list[tuple[str, dict[str, Any]]] = []

    def train(self, experiment: Any, name: str, flags: Any) -> bool:
        if self.results(name).is_file():
            return False
        self.trained.append((name, dict(flags)))
        if flags["learning_rate"] > 3e-2:
            raise Diverged("no number")
        self.results(name).parent.mkdir(parents=True)
        score = -abs(flags["learning_rate"] - 1e-3)
        scores = {"seq_class/mcc": score, "seq_class/accuracy": score}
        self.results(name).write_text(json.dumps({"valid": scores}))
        return True


@pytest.fixture
def runner(tiny_yaml: Path, tmp_path: Path) -> Any:
    tiny_yaml.write_text(tiny_yaml.read_text() + MORE)
    folder = tmp_path / "data" / "CoLA"
    folder.mkdir(parents=True)
    for split in ("train", "dev"):
        (folder / f"{split}.tsv").write_text("".join(f"src\t{i % 2}\t\tthe film {i}\n" for i in range(8)))
    (tmp_path / "data" / "RTE").mkdir()
    for split in ("train", "dev"):
        lines = [f"{i}\ta {i}\tb\t{('entailment', 'not_entailment')[i % 2]}" for i in range(8)]
        text = "\n".join(["index\tsentence1\tsentence2\tlabel", *lines]) + "\n"
        (tmp_path / "data" / "RTE" / f"{split}.tsv").write_text(text)
    (tmp_path / "out" / "pre_trained_models" / "tiny" / "best").mkdir(parents=True)

    def make(**settings: Any) -> FakeRunner:
        common = {"data_dir": str(tmp_path / "data"), "output_dir": str(tmp_path / "out")}
        return FakeRunner(Experiments([tiny_yaml]), Settings(**(common | settings)))

    return make


def test_a_search_finds_the_best_goes_on_and_is_read(runner: Any, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    first = runner()
    first.execute(first.experiments.get("tiny_search"))
    assert [name for name, _ in first.trained if "cola" in name] == [
        f"tiny_search-cola-trial_{i + 1}" for i in range(6)
    ]
    for name, flags in first.trained:
        assert flags["train_dataset"] == [str(tmp_path / f"out/data/tiny_search/{name.split('-')[1]}/train.jsonl")]
        assert flags["valid_dataset"].endswith("held_out.jsonl")
        if "cola" in name:
            assert 5 <= flags["max_steps"] <= 9
            assert "max_epochs" not in flags
            assert flags["val_check_interval"] == flags["max_steps"]
            assert flags["num_warmup_steps"] in (0.0, 0.1)
        else:
            assert flags["check_val_every_n_epoch"] == flags["max_epochs"] == 2
    best = yaml.safe_load((tmp_path / "out/experiments/tiny_search.best.yaml").read_text())
    assert set(best) == {"cola", "rte"}
    rates = {name: flags["learning_rate"] for name, flags in first.trained if "cola" in name}
    assert best["cola"]["learning_rate"] == min(rates.values(), key=lambda rate: abs(rate - 1e-3))
    # what is finished is not trained again: the same trials are asked for
    lost = first.results("tiny_search-cola-trial_5")
    if lost.is_file():
        lost.unlink()
        lost.parent.rmdir()
    again = runner(tasks=("cola",))
    again.execute(again.experiments.get("tiny_search"))
    failed = {name for name, rate in rates.items() if rate > 3e-2}
    assert {name for name, _ in again.trained} == failed | {"tiny_search-cola-trial_5"}
    assert yaml.safe_load((tmp_path / "out/experiments/tiny_search.best.yaml").read_text()) == best
    tuned = task_flags(again, again.experiments.get("tiny_tuned"))
    assert tuned["cola"][2]["learning_rate"] == best["cola"]["learning_rate"]
    assert tuned["cola"][2]["max_steps"] == best["cola"]["max_steps"]
    assert "max_epochs" not in tuned["cola"][2]
    assert tuned["rte"][2]["max_epochs"] == 2


def test_all_trials_diverge(runner: Any, tiny_yaml: Path) -> None:
    pytest.importorskip("optuna")
    tiny_yaml.write_text(tiny_yaml.read_text().replace("{low: 1e-5, high: 1e-1, log: true}", "[0.1, 0.2]"))
    made = runner(tasks=("cola",))
    with pytest.raises(InputError, match="every trial of cola diverged"):
        search(made, made.experiments.get("tiny_search"))


def test_what_is_held_out(tmp_path: Path) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text("".join(f"{i}\n" for i in range(25)))
    parts = hold_out(train, 0.1, tmp_path / "parts")
    assert parts["valid"].read_text().split() == ["0", "10", "20"]
    assert sorted(map(int, (parts["train"].read_text() + parts["valid"].read_text()).split())) == list(range(25))
    with pytest.raises(InputError, match="Raise holdout"):
        hold_out(train, 0.01, tmp_path / "parts")


def test_ranges() -> None:
    assert _choice("here", "learning_rate", {"low": "1e-6", "high": 0.1, "log": True}) == ("float", (1e-6, 0.1, True))
    assert _choice("here", "max_steps", {"low": 1, "high": 9}) == ("int", (1, 9, False))
    assert _choice("here", "num_warmup_steps", [0, 0.1]) == ("list", (0, 0.1))
    for flag, value, said in (
        ("learning_rat", [1], "is no flag"),
        ("learning_rate", {"low": 1}, "needs a list of values, or low and high"),
        ("learning_rate", {"low": 2, "high": 1}, "low below high"),
        ("learning_rate", {"low": "x", "high": 1}, "low below high"),
        ("learning_rate", [], "needs a list"),
        ("learning_rate", 3, "needs a list"),
    ):
        with pytest.raises(InputError, match=said):
            _choice("here", flag, value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("glue: tiny_glue", "glue: tinyglue", "no experiment 'tinyglue'"),
        ("holdout: 0.25", "holdout: 2.0", "holdout must be"),
        ("holdout: 0.25", "hold: 0.25", "unknown key 'hold'"),
        ("trials: 6, ", "", "trials must be at least 1"),
        ("rte: {trials: 2, learning_rate: {low: 1e-5, high: 1e-2}}", "sst2: {trials: 2}", "no GLUE task 'sst2'"),
        ("learning_rate: {low: 1e-5, high: 1e-2}", "", "rte has no flag to search for"),
    ],
)
def test_what_is_refused(runner: Any, tiny_yaml: Path, old: str, new: str, said: str) -> None:
    assert old in tiny_yaml.read_text()
    tiny_yaml.write_text(tiny_yaml.read_text().replace(old, new))
    made = runner()
    with pytest.raises(InputError, match=said):
        _read(made, made.experiments.get("tiny_search"))


def test_tasks_that_are_none_are_refused_before_anything_runs(runner: Any) -> None:
    for tasks, name, there in (
        ("colla", "tiny_search", "cola, rte"),
        ("sst2", "tiny_search", "cola, rte"),
        ("cola", "tiny", "none"),
    ):
        with pytest.raises(InputError, match=rf"--tasks {tasks}: no experiment of these has .*; there are {there}\."):
            runner(tasks=(tasks,)).run([name])


def test_the_searches_that_are_shipped_can_be_read() -> None:
    experiments = Experiments()
    made = Runner(experiments, Settings(dry_run=True))
    for name in experiments.select(["search-*"]):
        spaces, source, holdout = _read(made, experiments.get(name))
        assert len(spaces) == 9
        assert holdout == 0.1
        assert len(task_flags(made, source)) == 9
        assert f"{name}.best.yaml" in experiments.get(f"glue-tuned-{name.removeprefix('search-')}").glue["best"]
