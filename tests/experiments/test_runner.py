"""Running experiments: what is skipped, resumed, run anew, and what a failure does to the others."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from funneltfm.cli.main import main
from funneltfm.errors import InputError, Stopped
from funneltfm.experiments.registry import Experiments
from funneltfm.experiments.runner import Runner, Settings, _changes, accumulation, n_processes, run_here

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "pytorch"), "OMP_NUM_THREADS": "1"}


class FakeTrain:
    """Leaves what `funneltfm train` leaves, and remembers how it was called."""

    def __init__(self, output: Path):
        self.output, self.calls, self.fails, self.cut = output, [], set(), set()

    def __call__(self, words: Sequence[str], keep: Sequence[int]) -> int:
        name = next(word.partition("=")[2] for word in words if word.startswith("--name="))
        how = [word for word in words if word in ("--resume", "--overwrite")]
        self.calls.append((name, *how))
        if name in self.fails:
            return 1
        folder = self.output / "runs" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text("")
        if name in self.cut:
            (self.output / "checkpoints" / name).mkdir(parents=True)
            (self.output / "checkpoints" / name / "last.ckpt").write_text("")
            return 143
        (self.output / "pre_trained_models" / name / "best").mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps({"train_seconds": time.perf_counter()}))
        return 0


@pytest.fixture
def fake(tmp_path: Path) -> FakeTrain:
    return FakeTrain(tmp_path / "out")


@pytest.fixture
def runner(tiny_yaml: Path, corpus: Path, fake: FakeTrain) -> Any:
    def make(**settings: Any) -> Runner:
        common = {"data_dir": str(corpus), "output_dir": str(fake.output)}
        return Runner(Experiments([tiny_yaml]), Settings(**(common | settings)), fake)

    return make


def test_one_after_another_and_what_is_finished_is_skipped(runner: Any, fake: FakeTrain) -> None:
    runner().run(["tiny", "tiny_sparse"])
    assert fake.calls == [("tiny",), ("tiny_sparse-pretrain",), ("tiny_sparse-again",)]
    fake.calls.clear()
    runner().run(["tiny", "tiny_sparse"])
    assert fake.calls == []
    runner(overwrite=True).run(["tiny_sparse"])
    assert fake.calls == [("tiny_sparse-pretrain", "--overwrite"), ("tiny_sparse-again", "--overwrite")]


def test_other_settings_run_it_anew_and_what_began_with_its_model_too(
    runner: Any, fake: FakeTrain, caplog: pytest.LogCaptureFixture
) -> None:
    runner().run(["tiny", "tiny_sparse"])
    fake.calls.clear()
    runner(overrides={"": {"num_workers": 0}}).run(["tiny"])  # which changes nothing
    assert fake.calls == []
    runner(overrides={"pretrain": {"max_steps": 9}}).run(["tiny"])
    assert fake.calls == [("tiny", "--overwrite")]
    assert "tiny: max_steps was 8, is 9, so it is run anew" in caplog.text
    fake.calls.clear()
    runner().run(["tiny_sparse"])  # its teacher is another, and then so is the model of its first stage
    assert fake.calls == [("tiny_sparse-pretrain", "--overwrite"), ("tiny_sparse-again", "--overwrite")]
    assert "is another model than it was" in caplog.text


def test_a_run_that_was_cut_short_goes_on(runner: Any, fake: FakeTrain) -> None:
    fake.cut.add("tiny")
    with pytest.raises(InputError, match="the run tiny ended with exit code 143"):
        runner().run(["tiny"])
    fake.cut.clear()
    runner().run(["tiny"])
    assert fake.calls == [("tiny",), ("tiny", "--resume")]


def test_one_that_fails_does_not_keep_the_others_from_running(runner: Any, fake: FakeTrain, tiny_yaml: Path) -> None:
    tiny_yaml.write_text(tiny_yaml.read_text() + "\nother: {extends: tiny}\n")
    fake.fails.add("tiny")
    with pytest.raises(InputError, match=r"2 of 3 experiments failed. tiny: .*; tiny_sparse: .* Run tiny first"):
        runner().run(["tiny", "tiny_sparse", "other"])
    assert fake.calls == [("tiny",), ("other",)]


def test_what_is_missing_is_said_with_where_to_get_it(runner: Any, fake: FakeTrain, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"needs the model of tiny, .*--distill_from"):
        runner().run(["tiny_sparse"])
    with pytest.raises(InputError, match=r"tiny_sparse needs .*none/vocab.txt, which is not there. Make it with the"):
        runner(data_dir=str(tmp_path / "none"), dry_run=False).run(["tiny_sparse"])
    with pytest.raises(InputError, match=r"wiki_books/train.jsonl, which is not there. It is English Wikipedia"):
        runner().run(["bert_1mi"])
    assert fake.calls == []


def test_what_is_not_ours_is_left_alone(runner: Any, fake: FakeTrain) -> None:
    (fake.output / "runs" / "tiny").mkdir(parents=True)
    with pytest.raises(InputError, match="no experiment has made"):
        runner().run(["tiny"])
    record = fake.output / "experiments" / "tiny.run.lock"
    with open(record) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is at work on the run tiny"):
            runner(overwrite=True).run(["tiny"])
    runner(overwrite=True).run(["tiny"])
    assert fake.calls == [("tiny", "--overwrite")]


def test_flags_that_cannot_be_are_refused_before_anything_runs(runner: Any, fake: FakeTrain) -> None:
    with pytest.raises(InputError, match="tiny: --rigl_drop is read with --sparsity alone"):
        runner(overrides={"": {"rigl_drop": 0.1}}).run(["tiny"])
    with pytest.raises(InputError, match=r"--finetune.seed: no experiment .* there are again, pretrain"):
        runner(overrides={"finetune": {"seed": 1}}).run(["tiny", "tiny_sparse"])
    assert fake.calls == []


def test_global_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    flags = {"global_batch_size": 256, "batch_size": 8, "accelerator": "cpu"}
    assert accumulation(flags) == {"accumulate_grad_batches": 32}
    assert accumulation(flags | {"devices": "4"}) == {"accumulate_grad_batches": 8}
    assert accumulation({"batch_size": 8}) == {}
    assert n_processes({"devices": "0,2"}) == 2
    monkeypatch.setenv("WORLD_SIZE", "32")
    assert accumulation(flags) == {"accumulate_grad_batches": 1}
    with pytest.raises(InputError, match="global_batch_size=256 must be a multiple of batch_size=7 times 32"):
        accumulation(flags | {"batch_size": 7})
    with pytest.raises(InputError, match="give one of them"):
        accumulation(flags | {"accumulate_grad_batches": 2})


def test_a_signal_goes_on_to_the_process_and_ends_the_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = "import signal, sys, time; signal.signal(15, lambda *_: (open({!r}, 'w').close(), sys.exit(3)))\n"
    code = code.format(str(tmp_path / "got")) + "import os; os.kill(os.getppid(), 15); time.sleep(30)"
    monkeypatch.setattr(
        "funneltfm.experiments.runner.command", lambda words: ([sys.executable, "-c", code], os.environ)
    )
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as stopped:
        run_here([])
    assert stopped.value.signum == signal.SIGTERM
    assert (tmp_path / "got").exists()
    assert signal.getsignal(signal.SIGTERM) is before


# ---- from the command line


def test_the_command(
    tiny_yaml: Path, corpus: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--list"]) == 0
    listed = capsys.readouterr().out
    assert "sparse_80_kd_onecycle_lr_rigl " in listed
    assert listed.count("\nglue-{table,simple,get_info}-{bert_1mi,") == 1
    assert "\nglue-table-" not in listed
    assert main(["run", "glue-*-bert_1mi", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        f"glue-{way}-bert_1mi" for way in ("table", "simple", "get_info")
    ]
    words = ["--file", str(tiny_yaml), "--data_dir", str(corpus)]
    assert main(["run", "tiny", "--dry_run", *words, "--pretrain.max_steps", "3", "--loggers", "none"]) == 0
    shown = capsys.readouterr().out
    assert "--max_steps=3" in shown
    assert "--loggers none" in shown
    assert shown.count("funneltfm train ") == 1
    assert main(["run", "tinny", *words]) == 1
    assert "Did you mean tiny?" in capsys.readouterr().err
    assert main(["run", "tiny", *words, "--max_step", "3"]) == 2
    assert "Did you mean --max_steps?" in capsys.readouterr().err
    assert main(["run", *words]) == 2
    assert main(["run", "tiny", "--pretrain.overwrite", *words]) == 2
    assert "is not about a stage" in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()


def start(*words: str, cwd: Path) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "pytorch/run.py"), *words]
    return subprocess.Popen(
        command, cwd=cwd, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finished(process: subprocess.Popen) -> str:
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    return out


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_ends_as_one_that_is_not(
    tiny_yaml: Path, corpus: Path, tmp_path: Path
) -> None:
    long = ("--file", str(tiny_yaml), "--data_dir", str(corpus), "--max_steps", "40", "--checkpoint_interval", "1")
    killed = start("tiny", *long, "--output_dir", "a", cwd=tmp_path)
    while killed.poll() is None and not (tmp_path / "a/checkpoints/tiny/last.ckpt").exists():
        time.sleep(0.05)
    (child,) = psutil.Process(killed.pid).children()
    child.kill()
    out, _ = killed.communicate(timeout=60)
    assert killed.returncode == 1
    assert "the run tiny ended with exit code -9" in out
    assert not (tmp_path / "a/runs/tiny/results.json").exists()
    out = finished(start("tiny", *long, "--output_dir", "a", cwd=tmp_path))
    assert "tiny: goes on" in out
    finished(start("tiny", *long, "--output_dir", "b", cwd=tmp_path))
    one, other = (json.loads((tmp_path / x / "runs/tiny/results.json").read_text()) for x in "ab")
    assert one["valid"] == other["valid"]
    assert one["steps"] == other["steps"] == 40
    # a second experiment learns from it; its second stage keeps the masks of its first
    finished(start("tiny_sparse", *long[:4], "--output_dir", "b", cwd=tmp_path))
    runs = [json.loads((tmp_path / f"b/runs/tiny_sparse-{s}/results.json").read_text()) for s in ("pretrain", "again")]
    assert runs[0]["density"] == runs[1]["density"]
    assert runs[0]["density"]["mask"] == pytest.approx(0.5, abs=0.01)
    assert (tmp_path / "b/experiments/masked_lm.md").is_file()


def test_one_value_is_a_list_of_it() -> None:
    """As of a flag that takes more values than it did when the run was started."""
    now = {"flags": {"max_sequence_length": [16]}, "models": {}}
    assert _changes({"flags": {"max_sequence_length": 16}, "models": {}}, now) == []
    assert _changes({"flags": {"max_sequence_length": 8}, "models": {}}, now) == ["max_sequence_length was 8, is [16]"]
