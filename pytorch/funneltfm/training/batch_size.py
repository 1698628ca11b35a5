"""The largest training batch that fits: real training steps are made and their memory is measured."""

import dataclasses
import gc
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from funneltfm.data.batching import Collator, RunLoader
from funneltfm.data.encoding import EncodedSplit
from funneltfm.data.readers import DatasetSpec
from funneltfm.errors import InputError
from funneltfm.funnel.config import ModelConfig, canonical_length, without_truncation
from funneltfm.funnel.model import FunnelTFM
from funneltfm.tasks.classification import Classification
from funneltfm.training.config import Args, make_args
from funneltfm.training.launch import python_path
from funneltfm.training.pipeline import Pipeline
from funneltfm.training.setup import Devices, choose_devices, make_trainer, warn_of_diverging

log = logging.getLogger(__name__)

GIB = 2**30
_TOO_LARGE = 77  # exit code of a process whose trial does not fit

# ---- the search; it knows nothing of models


def largest(trial: Callable[[int], int | None], limit: int, max_batch: int) -> dict[int, int | None]:
    """Find the largest batch size that fits, in few trials.

    trial: the peak memory of a batch size, or None if it does not fit into `limit`. A batch that fits is taken to fit
    at every smaller size too.
    Returns all trials, in the order in which they were made. The largest size that fits is among them (none: not even
    1 fits), and so is the next one, which does not, unless max_batch fits.
    """
    trials: dict[int, int | None] = {}
    fits, too_large = 0, max_batch + 1
    predictions = 0  # in a row, that led less far than doubling; after three the next size is chosen without one
    while too_large - fits > 1:
        guess = _where_it_is_full({b: peak for b, peak in trials.items() if peak is not None}, limit)
        if guess is not None and predictions < 3:
            predictions += guess < 2 * fits
            if guess >= too_large:  # the line was too low: a part of the way back
                guess = too_large - (too_large - fits) // 4
        else:
            upwards = 2 * fits if guess is None else fits + fits // 4
            guess = (fits + too_large) // 2 if too_large <= max_batch else upwards
            predictions = 0
        batch = min(max(guess, fits + 1), too_large - 1)
        trials[batch] = trial(batch)
        if trials[batch] is None:
            too_large = batch
        else:
            fits = batch
    return trials


def _where_it_is_full(peaks: Mapping[int, int], limit: int) -> int | None:
    """The batch size at which a line through two measured peaks reaches the limit, at most 8 times the larger one: with
    small batches what is measured is mostly the optimizer.
    """
    b = max(peaks, default=1)
    a = max((batch for batch in peaks if 2 * batch <= b), default=b)  # not too near: differences are noisy
    if a == b or peaks[a] >= peaks[b]:
        return None
    return b + int(min((limit - peaks[b]) * (b - a) / (peaks[b] - peaks[a]), 7 * b))


# ---- a trial


@dataclass(frozen=True)
class Case:
    """What is trained: `flags` are those of `funneltfm classify` (precision, device, gradient_checkpointing, ...)."""

    config: ModelConfig
    length: int
    flags: Mapping[str, Any]

    def args(self, batch_size: int = 1) -> Args:
        return make_args(**self.flags, train_bsz=batch_size)


def train_steps(case: Case, batch_size: int) -> None:
    """Two steps of finetuning a classifier, as a run makes them: in the second one AdamW has its states. Every example
    has `case.length` tokens; the batch is padded to their canonical length.
    """
    args = case.args(batch_size)
    accumulate = min(args.accumulate_grad_batches, 2)  # gradients wait for the next batch: more of them wait no longer
    model = FunnelTFM(case.config)
    model.gradient_checkpointing = args.gradient_checkpointing
    model.pooling = without_truncation(case.config)
    labels = None if case.config.num_class == 1 else tuple(str(i) for i in range(case.config.num_class))
    task = Classification(DatasetSpec("trial", labels, ("accuracy",), {}, {}))
    split = _random_split(case, batch_size * accumulate)
    loader = RunLoader(split, Collator(model.pooling), batch_size, epochs=2, seed=args.seed, accumulate=accumulate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on training, which this is not
        trainer = make_trainer(
            args,
            choose_devices(args),
            max_epochs=1,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=args.clip or None,
            enable_checkpointing=False,
        )
        try:
            trainer.fit(Pipeline(model, task, args, loader.steps, ()), loader)
        except SystemExit:  # how Lightning leaves after a KeyboardInterrupt
            raise KeyboardInterrupt from None


def _random_split(case: Case, n: int) -> EncodedSplit:
    rng = np.random.default_rng(0)
    tokens = n * case.length
    return EncodedSplit(
        inputs=rng.integers(case.config.vocab_size, size=tokens, dtype=np.int32),
        seg_id=np.zeros(tokens, np.int32),
        offsets=np.arange(n + 1, dtype=np.int64) * case.length,
        labels=rng.random(n) if case.config.num_class == 1 else rng.integers(case.config.num_class, size=n),
        ids=np.array([str(i) for i in range(n)]),
    )


def on_gpu(case: Case, batch_size: int, limit: int) -> int | None:
    """The peak of PyTorch's memory on the GPU in bytes, or None where it would be above the limit."""
    device = choose_devices(case.args()).index
    gc.collect()  # what a trial before, that failed, has left
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / _gpu_memory(device)), device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        train_steps(case, batch_size)
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated(device)


def _gpu_memory(device: int) -> int:
    return torch.cuda.get_device_properties(device).total_memory


def in_new_process(case: Case, batch_size: int, limit: int) -> int | None:
    """The peak of the resident memory in bytes of a process that does nothing else, or None where it passed the limit
    (and the process was ended at once).
    """
    words = {"config": case.config.to_dict(), "length": case.length, "flags": dict(case.flags)}
    done = subprocess.run(
        [sys.executable, "-m", "funneltfm.training.batch_size"],
        input=json.dumps(words | {"batch_size": batch_size, "limit": limit}),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": python_path()},
    )
    if done.returncode == _TOO_LARGE:
        return None
    if done.returncode == -signal.SIGKILL:
        raise InputError(
            f"the trial with batch size {batch_size} was killed from outside: most likely the system has less memory "
            f"left than --memory_limit={limit / GIB:g}. Give a smaller one."
        )
    if done.returncode:
        raise RuntimeError(f"the trial with batch size {batch_size} failed (exit {done.returncode}):\n{done.stderr}")
    return int(done.stdout.splitlines()[-1])


def _process_main() -> int:
    """The other side of `in_new_process`."""
    words = json.load(sys.stdin)
    end_above(words["limit"])
    case = Case(ModelConfig(**words["config"]), words["length"], words["flags"])
    try:
        train_steps(case, words["batch_size"])
    except RuntimeError as error:
        if "DefaultCPUAllocator: can't allocate memory" not in str(error):  # one tensor larger than all memory
            raise
        return _TOO_LARGE
    peak = resident_peak()
    print(peak)
    return _TOO_LARGE if peak > words["limit"] else 0


def end_above(limit: int) -> None:
    """From now on, end this process as soon as its resident memory has passed the limit, or its parent is gone."""
    parent = os.getppid()

    def watch() -> None:
        while resident_peak() <= limit and os.getppid() == parent:
            time.sleep(0.005)
        os._exit(_TOO_LARGE)

    threading.Thread(target=watch, daemon=True, name="memory-watch").start()


def resident_peak() -> int:
    """Bytes. Not ru_maxrss: a process inherits that from the one that started it."""
    return _kib(Path("/proc/self/status"), "VmHWM")


def _kib(path: Path, name: str) -> int:
    """The value of a `name: N kB` line, in bytes."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024
    except (OSError, StopIteration) as error:
        raise InputError(
            f"cannot read {name} in {path}: on the CPU memory can be measured on Linux alone. On a GPU it can be "
            "measured everywhere."
        ) from error


Measure = Callable[[Case, int, int], int | None]
MEASURE: dict[str, Measure] = {"cpu": in_new_process, "cuda": on_gpu}

# ---- the table


@dataclass(frozen=True)
class Cell:
    """The answer for a model and a length."""

    model: str
    length: int
    padded_length: int
    trials: Mapping[int, int | None]
    """Batch size -> peak in bytes, None where it does not fit; in the order in which they were made."""
    max_batch: int

    @property
    def batch_size(self) -> int:
        """The largest that fits; 0 where not even 1 does."""
        return max((batch for batch, peak in self.trials.items() if peak is not None), default=0)

    def __str__(self) -> str:
        """As in the table; with a + where larger ones were not looked for."""
        return f"{self.batch_size or '-'}{'+' if self.batch_size == self.max_batch else ''}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "length": self.length,
            "padded_length": self.padded_length,
            "batch_size": self.batch_size,
            "max_batch_reached": self.batch_size == self.max_batch,
            "peak_bytes": self.trials.get(self.batch_size),
            "trials": [{"batch_size": batch, "peak_bytes": peak} for batch, peak in self.trials.items()],
        }


@dataclass(frozen=True)
class Guideline:
    """The largest batch sizes that fit on a device. Its text is the table."""

    device: str
    memory_limit: int
    """Bytes."""
    precision: str
    gradient_checkpointing: bool
    accumulate_grad_batches: int
    cells: list[Cell]

    def __str__(self) -> str:
        notes = [self.precision, f"gradient checkpointing {'on' if self.gradient_checkpointing else 'off'}"]
        if self.accumulate_grad_batches > 1:
            notes.append("gradients accumulated")
        lengths = dict.fromkeys(cell.length for cell in self.cells)
        models = dict.fromkeys(cell.model for cell in self.cells)
        rows = [["sequence length", *map(str, lengths)]]
        rows += [[model, *(str(cell) for cell in self.cells if cell.model == model)] for model in models]
        first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"batch size guideline: {self.device}, {self.memory_limit / GIB:.4g} GiB, {', '.join(notes)}"]
        for name, *values in rows:
            cells = (f"{value:>{width}}" for value, width in zip(values, widths, strict=True))
            lines.append("  ".join([f"{name:{first}}", *cells]))
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"torch": torch.__version__, "cells": [cell.to_dict() for cell in self.cells]}


def find_batch_sizes(
    models: Mapping[str, ModelConfig],
    lengths: Sequence[int],
    memory_limit: float | None = None,
    max_batch: int = 1024,
    **flags: Any,
) -> Guideline:
    """The largest batch sizes with which these models can be finetuned.

    lengths: of the examples, in tokens. memory_limit: GiB; on a GPU None is all that it has. flags: those of `funneltfm
    classify` that matter here (device_id, fp16, bf16, amp_opt, gradient_checkpointing, accumulate_grad_batches).
    """
    if not models:
        raise InputError("name at least one model.")
    if not lengths or min(lengths) < 1:
        raise InputError(f"lengths must be whole numbers, at least 1; got {', '.join(map(str, lengths)) or 'none'}.")
    if max_batch < 1:
        raise InputError(f"max_batch must be at least 1; got {max_batch}.")
    args = make_args(**flags)
    devices = choose_devices(args)
    limit = _limit(memory_limit, devices)
    cells = []
    for name, config in models.items():
        warn_of_diverging(args, config)
        for length in dict.fromkeys(lengths):
            case = Case(config, length, flags)
            trial = partial(_trial, MEASURE[devices.accelerator], name, case, limit)
            trials = largest(trial, limit, max_batch)
            cells.append(Cell(name, length, canonical_length(length, without_truncation(config)), trials, max_batch))
            log.info("%s, length %d: batch size %s", name, length, cells[-1])
    return Guideline(
        device=_name(devices),
        memory_limit=limit,
        precision=devices.precision,
        gradient_checkpointing=args.gradient_checkpointing,
        accumulate_grad_batches=args.accumulate_grad_batches,
        cells=cells,
    )


def _trial(measure: Measure, name: str, case: Case, limit: int, batch_size: int) -> int | None:
    peak = measure(case, batch_size, limit)
    what = "does not fit" if peak is None else f"takes {peak / GIB:.2f} GiB"
    log.info("%s, length %d: %d %s", name, case.length, batch_size, what)
    return peak


def _limit(gib: float | None, devices: Devices) -> int:
    """The memory limit in bytes; no more than there is, so that nothing is swapped out."""
    if devices.accelerator not in MEASURE:
        raise InputError(f"memory is not measured on {devices.accelerator}; --device_id=-1 is the CPU.")
    if gib is not None and gib <= 0:
        raise InputError(f"memory_limit must be more than 0 GiB; got {gib:g}.")
    if devices.accelerator == "cuda":
        there_is = _gpu_memory(devices.index)
        limit = there_is if gib is None else int(gib * GIB)
    elif gib is None:
        raise InputError(
            "on the CPU say how much memory training may take: --memory_limit=8 is 8 GiB. (A GPU is used where there "
            "is one, unless --device_id is -1.)"
        )
    else:
        there_is, limit = _kib(Path("/proc/meminfo"), "MemAvailable"), int(gib * GIB)
    if limit > there_is:
        raise InputError(f"memory_limit must not be above what there is, {there_is / GIB:.1f} GiB; got {gib:g}.")
    return limit


def _name(devices: Devices) -> str:
    if devices.accelerator == "cuda":
        return torch.cuda.get_device_name(devices.index)
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"CPU ({model or platform.machine()})"


if __name__ == "__main__":
    sys.exit(_process_main())
