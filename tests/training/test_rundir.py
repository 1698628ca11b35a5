"""Which folder a run uses, and that nothing in it is lost by accident."""

import json
from pathlib import Path

import pytest

from funneltfm.errors import InputError
from funneltfm.training.rundir import RunDir, find_run, read_labels


def find(model_dir: Path | None, **given: bool) -> RunDir:
    flags = {"going_on": False, "overwrite": False} | given
    return find_run(None if model_dir is None else str(model_dir), "CoLA", **flags)


def fill(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("precious", encoding="utf-8")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ---- without model_dir


def test_the_next_free_number(tmp_path: Path) -> None:
    assert find(None).root == Path("exp/CoLA/run_1")
    for name in ("run_1", "run_2", "run_10", "run_x", "other"):
        (tmp_path / "exp" / "CoLA" / name).mkdir(parents=True)
    (tmp_path / "exp" / "MNLI" / "run_99").mkdir(parents=True)
    assert find(None).root == Path("exp/CoLA/run_11")


def test_the_newest_to_go_on_with(tmp_path: Path) -> None:
    for number in (1, 2, 10):
        fill(tmp_path / f"exp/CoLA/run_{number}", "metrics.csv")
    assert find(None, going_on=True).root == Path("exp/CoLA/run_10")


def test_nothing_to_go_on_with() -> None:
    with pytest.raises(InputError, match=r"no run in exp/CoLA.*--model_dir"):
        find(None, going_on=True)


# ---- with model_dir


def test_a_new_or_empty_folder(tmp_path: Path) -> None:
    assert find(tmp_path / "a/b").root == tmp_path / "a/b"
    assert not (tmp_path / "a").exists()  # nothing is made before all flags are known to be good
    (tmp_path / "c").mkdir()
    fill(tmp_path / "c", "notes.txt")
    assert find(tmp_path / "c").root == tmp_path / "c"
    assert not RunDir(tmp_path / "c").exists()


@pytest.mark.parametrize("name", ["metrics.csv", "results.json", "checkpoints/last.ckpt", "best/model.pt"])
def test_a_folder_with_a_run_is_refused(tmp_path: Path, name: str) -> None:
    fill(tmp_path / "run", name)
    assert RunDir(tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"already holds a run.*--resume.*--overwrite.*another --model_dir") as caught:
        find(tmp_path / "run")
    assert str(tmp_path / "run") in str(caught.value)
    assert (tmp_path / "run" / name).read_text(encoding="utf-8") == "precious"
    for flag in ("going_on", "overwrite"):
        assert find(tmp_path / "run", **{flag: True}).root == tmp_path / "run"
    assert (tmp_path / "run" / name).read_text(encoding="utf-8") == "precious"  # the caller clears it, when all is well


def test_a_file_as_folder(tmp_path: Path) -> None:
    fill(tmp_path, "run")
    for flag in ("going_on", "overwrite"):
        with pytest.raises(InputError, match="is a file; it must be a folder"):
            find(tmp_path / "run", **{flag: True})
    assert (tmp_path / "run").read_text(encoding="utf-8") == "precious"


RUN = (
    "config.yaml", "metrics.csv", "results.json", "log.txt", "checkpoints/last.ckpt", "checkpoints/best.ckpt",
    "best/model.pt", "best/vocab.txt", "predictions/valid.jsonl", "plots/learning_curves.png",
)  # fmt: skip


def test_clear_removes_the_run_and_nothing_else(tmp_path: Path) -> None:
    fill(tmp_path / "run", *RUN, "notes.txt", "data/train.tsv", ".hidden")
    RunDir(tmp_path / "run").clear()
    left = sorted(str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert left == [".hidden", "data/train.tsv", "notes.txt"]
    assert not RunDir(tmp_path / "run").exists()


def test_paths_are_where_the_documents_say(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    paths = (run.config, run.metrics, run.results, run.last, run.model, run.net_config, run.labels, run.predictions)
    assert [str(path.relative_to(tmp_path)) for path in (*paths, run.plots, run.checkpoints)] == [
        "config.yaml", "metrics.csv", "results.json", "checkpoints/last.ckpt", "best/model.pt", "best/net_config.json",
        "best/labels.json", "predictions", "plots", "checkpoints",
    ]  # fmt: skip


def test_labels_beside_a_model(tmp_path: Path) -> None:
    assert read_labels(tmp_path / "model.pt") is None
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(["no", "yes, but"]), encoding="utf-8")
    assert read_labels(tmp_path / "model.pt") == ("no", "yes, but")
    path.write_text("null", encoding="utf-8")  # regression
    assert read_labels(tmp_path / "model.pt") is None


def test_sweep_removes_leftovers_of_this_run_alone(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    mine = [
        tmp_path / ".metrics.17.tmp.csv",
        tmp_path / "checkpoints" / ".next.17.tmp.ckpt",
        tmp_path / "best/.model.9.tmp.pt",
    ]
    others = [tmp_path / ".vimrc.tmp", tmp_path / "notes" / ".text.3.tmp", tmp_path / "checkpoints" / "last.ckpt"]
    for path in (*mine, *others):
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    (tmp_path / ".folder.5.tmp").mkdir()
    run.sweep()
    assert not any(path.exists() for path in mine)
    assert all(path.exists() for path in others)
