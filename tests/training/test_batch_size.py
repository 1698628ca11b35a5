"""The largest batch that fits: the search on made-up memory, the trials on real memory."""

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning import Trainer

from funneltfm.errors import InputError
from funneltfm.funnel.config import ModelConfig, canonical_length, without_truncation
from funneltfm.training import batch_size
from funneltfm.training.batch_size import (
    GIB,
    Case,
    Cell,
    Guideline,
    find_batch_sizes,
    in_new_process,
    largest,
    on_gpu,
    train_steps,
)
from funneltfm.training.pipeline import Pipeline
from funneltfm.training.precision import AmpPrecision

TINY = ModelConfig(
    vocab_size=50, d_embed=16, d_model=16, n_head=2, d_head=8, d_inner=32, block_size="1_1", separate_cls=True,
    pool_q_only=True, truncate_seq=True, num_class=3,
)  # fmt: skip

# ---- the search

Memory = Callable[[int], int]


def line(batch: int) -> int:
    return 5000 + 37 * batch


def noisy(batch: int) -> int:
    return 1000 + 40 * batch + random.Random(batch).randrange(30)  # still rising


MEMORY: dict[str, Memory] = {
    "linear": line,
    "without a base": lambda b: 50 * b,
    "noisy": noisy,
    "steps": lambda b: 1000 + 500 * (b // 16),
    "stairs": lambda b: 1000 + 2 ** (b.bit_length() + 4),
    "flat at first": lambda b: max(3000, 500 + 30 * b),  # the optimizer takes more than small batches do
    "bent upwards": lambda b: 1000 + b * b,
    "bent downwards": lambda b: 1000 + int(300 * b**0.5),
    "a wall": lambda b: 1000 + b if b < 77 else 10**9,
    "flat": lambda b: 1000,
}


def search(memory: Memory, limit: int, max_batch: int) -> dict[int, int | None]:
    """The trials; each size is tried once, and what does not fit has no peak, as on a GPU."""
    asked: list[int] = []

    def trial(batch: int) -> int | None:
        assert 1 <= batch <= max_batch
        assert batch not in asked
        asked.append(batch)
        return memory(batch) if memory(batch) <= limit else None

    trials = largest(trial, limit, max_batch)
    assert list(trials) == asked
    return trials


@pytest.mark.parametrize("name", list(MEMORY))
def test_the_answer_fits_and_the_next_one_does_not(name: str) -> None:
    memory = MEMORY[name]
    for max_batch in (1, 2, 3, 64, 100, 1024):
        for limit in (999, 1000, 1001, 1040, 1500, 2024, 3000, 5036, 5037, 8000, 20000, 10**8):
            trials = search(memory, limit, max_batch)
            expected = max((b for b in range(1, max_batch + 1) if memory(b) <= limit), default=0)
            fits = [batch for batch, peak in trials.items() if peak is not None]
            assert max(fits, default=0) == expected
            assert not fits or trials[expected] == memory(expected)
            assert expected == max_batch or trials[expected + 1] is None  # both were really tried
            assert len(trials) <= 40


def test_a_line_is_found_in_few_trials() -> None:
    for answer in range(1001):
        trials = search(line, 5000 + 37 * answer + 20, 1024)
        assert max((b for b, peak in trials.items() if peak is not None), default=0) == answer
        assert len(trials) <= 6  # halving alone would take up to 20


def test_noise_costs_few_trials() -> None:
    assert max(len(search(noisy, 1000 + 40 * answer, 1024)) for answer in range(1, 301)) <= 9


# ---- what a trial trains


@pytest.mark.parametrize(
    "flags", [{}, {"gradient_checkpointing": True}, {"bf16": True}, {"accumulate_grad_batches": 9}]
)
@pytest.mark.parametrize("num_class", [3, 1])
def test_a_trial_is_finetuning(monkeypatch: pytest.MonkeyPatch, flags: dict, num_class: int) -> None:
    config = ModelConfig(**(TINY.to_dict() | {"num_class": num_class}))
    batches, trainers = [], []
    step, fit = Pipeline.training_step, Trainer.fit

    def training_step(self: Pipeline, batch: dict, batch_idx: int) -> torch.Tensor:
        batches.append((self.model.gradient_checkpointing, self.model.training, batch))
        return step(self, batch, batch_idx)

    def fit_(self: Trainer, *args: object, **kwargs: object) -> None:
        trainers.append(self)
        fit(self, *args, **kwargs)

    monkeypatch.setattr(Pipeline, "training_step", training_step)
    monkeypatch.setattr(Trainer, "fit", fit_)
    train_steps(Case(config, 6, {"device_id": -1, **flags}), batch_size=5)
    (trainer,) = trainers
    assert trainer.global_step == 2
    assert trainer.gradient_clip_val == 1.0
    assert len(batches) == (4 if "accumulate_grad_batches" in flags else 2)
    for checkpointing, training, batch in batches:
        assert training
        assert checkpointing == bool(flags.get("gradient_checkpointing"))
        assert batch["inputs"].shape == (5, canonical_length(6, without_truncation(config)))
        assert (~batch["input_mask"]).sum(dim=1).tolist() == [6] * 5
        assert batch["labels"].is_floating_point() == (num_class == 1)
    (optimizer,) = trainer.optimizers
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert all("exp_avg_sq" in optimizer.state[parameter] for parameter in parameters)
    assert isinstance(trainer.precision_plugin, AmpPrecision) == ("bf16" in flags)


# ---- on the CPU: resident memory, in processes of their own

BIG = 4096  # examples of 256 tokens: gigabytes, even in a tiny model


def test_a_process_is_measured_and_ended_at_the_limit() -> None:
    case = Case(TINY, 256, {"device_id": -1})
    peak = in_new_process(case, 1, 8 * GIB)
    assert peak is not None
    assert GIB / 8 < peak < 2 * GIB  # torch and Lightning
    assert in_new_process(case, BIG, peak + GIB // 8) is None


def test_the_guard_is_quick_enough() -> None:
    """A process that takes memory as fast as it can ends soon after the limit, and long before all is taken."""
    code = """
import torch
from funneltfm.training import batch_size
batch_size.end_above(batch_size.resident_peak() + 2**28)
start, kept = batch_size.resident_peak(), []
for _ in range(200):
    kept.append(torch.ones(2**22))  # 16 MiB
    print(batch_size.resident_peak() - start, flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == batch_size._TOO_LARGE, done.stderr
    assert 2**27 < int(done.stdout.splitlines()[-1]) < 2**30  # of 200 * 2^24


@pytest.mark.parametrize(
    ("code", "error", "said"),
    [
        ("import os; os.kill(os.getpid(), 9)", InputError, "killed from outside.*--memory_limit=8"),
        ("raise ZeroDivisionError", RuntimeError, "(?s)batch size 7 failed.*ZeroDivisionError"),
    ],
)
def test_a_process_that_fails_is_no_batch_that_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, code: str, error: type[Exception], said: str
) -> None:
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda argv, **kwargs: run([argv[0], "-c", code], **kwargs))
    with pytest.raises(error, match=said):
        in_new_process(Case(TINY, 8, {}), 7, 8 * GIB)


@pytest.mark.parametrize(
    ("message", "code"), [("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried", 77), ("other", None)]
)
def test_a_tensor_larger_than_all_memory_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, message: str, code: int | None
) -> None:
    words = {"config": TINY.to_dict(), "length": 8, "flags": {}, "batch_size": 1, "limit": 1}

    def fail(*_: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(batch_size, "train_steps", fail)
    monkeypatch.setattr(batch_size, "end_above", lambda limit: None)
    monkeypatch.setattr(batch_size.json, "load", lambda handle: words)
    if code is None:
        with pytest.raises(RuntimeError, match="other"):
            batch_size._process_main()
    else:
        assert batch_size._process_main() == code


# ---- on a GPU, with a made-up one


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """16 GiB, of which a trial takes 1 GiB and 1/2 GiB for every example."""
    seen = SimpleNamespace(fraction=None, peak=0, emptied=0)

    def train(case: Case, batch_size: int) -> None:
        assert seen.peak == 0, "peaks of the trial before"
        seen.peak = (2 + batch_size) * GIB // 2
        if seen.peak > seen.fraction * 16 * GIB:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def set_fraction(fraction: float, device: int) -> None:
        assert 0 < fraction <= 1
        seen.fraction = fraction

    def empty() -> None:
        seen.emptied += 1

    monkeypatch.setattr(batch_size, "train_steps", train)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=16 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", set_fraction)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(seen, "peak", 0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: seen.peak)
    return seen


def test_a_gpu_is_filled(gpu: SimpleNamespace) -> None:
    guideline = find_batch_sizes({"tiny": TINY}, [8, 16], device_id=1, fp16=True)
    assert [cell.batch_size for cell in guideline.cells] == [30, 30]
    assert guideline.cells[0].trials[30] == 16 * GIB
    assert guideline.cells[0].trials[31] is None
    assert gpu.emptied == sum(len(cell.trials) for cell in guideline.cells)
    assert str(guideline).splitlines() == [
        "batch size guideline: Card 1, 16 GiB, fp16 O2, gradient checkpointing off",
        "sequence length   8  16",
        "tiny             30  30",
    ]


@pytest.mark.usefixtures("gpu")
def test_a_gpu_with_a_limit() -> None:
    guideline = find_batch_sizes({"tiny": TINY}, [8], memory_limit=4)
    assert guideline.cells[0].batch_size == 6
    with pytest.raises(InputError, match=r"above what there is, 16\.0 GiB; got 17"):
        find_batch_sizes({"tiny": TINY}, [8], memory_limit=17)


@pytest.mark.usefixtures("gpu")
def test_other_errors_on_a_gpu_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(batch_size, "train_steps", fail)
    with pytest.raises(RuntimeError, match="device-side"):
        on_gpu(Case(TINY, 8, {}), 1, GIB)


# ---- the table


def test_the_table() -> None:
    cells = [
        Cell("B8-8-8H1024", 64, 67, {1: 5, 2: 6, 3: None}, 1024),
        Cell("B8-8-8H1024", 512, 515, {1: None}, 1024),
        Cell("B1H768", 64, 67, {1: 5, 128: 9}, 128),
        Cell("B1H768", 512, 515, {1: 7, 2: None}, 128),
    ]
    guideline = Guideline("Card", 16 * GIB, "fp32", True, 2, cells)
    assert str(guideline).splitlines() == [
        "batch size guideline: Card, 16 GiB, fp32, gradient checkpointing on, gradients accumulated",
        "sequence length    64  512",
        "B8-8-8H1024         2    -",
        "B1H768           128+    1",
    ]
    assert [cell["peak_bytes"] for cell in guideline.to_dict()["cells"]] == [6, None, 9, 7]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lengths": [8, 0]}, "lengths must be .* at least 1; got 8, 0"),
        ({"lengths": []}, "lengths must be .* got none"),
        ({"models": {}}, "at least one model"),
        ({"max_batch": 0}, "max_batch must be at least 1; got 0"),
        ({"memory_limit": 0}, "memory_limit must be more than 0 GiB; got 0"),
        ({"memory_limit": 10**6}, "memory_limit must not be above what there is, .* GiB; got 1e[+]06"),
        ({"memory_limit": None}, "on the CPU .* --memory_limit=8"),
        ({"fp16": True, "bf16": True}, "exclude each other"),
        ({"amp_opt": "O1"}, "needs --fp16 or --bf16"),
        ({"device_id": -2}, "device_id"),
    ],
)
def test_what_cannot_be_is_refused(given: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        find_batch_sizes(**({"models": {"tiny": TINY}, "lengths": [8], "memory_limit": 1, "device_id": -1} | given))


def test_where_memory_is_not_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="on Linux alone"):
        batch_size._kib(tmp_path / "status", "VmHWM")
