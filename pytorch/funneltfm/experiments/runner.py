"""Run experiments one after another, each run in a process of its own; what is finished is skipped."""

import contextlib
import fcntl
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import funneltfm
from funneltfm.errors import Diverged, InputError, Stopped
from funneltfm.experiments.registry import STAGE_KEYS, Experiment, Experiments
from funneltfm.files import file_digest, read_json, write_json
from funneltfm.training.train_config import flag_words, make_train_args

log = logging.getLogger(__name__)

_PLACEHOLDER = re.compile(r"\{(data_dir|output_dir|model|stage)(?::([\w.+=-]+))?\}")
_FILES = ("train_dataset", "valid_dataset", "test_dataset", "predict_dataset", "pre_trained_tokenizer")
_MODELS = ("pre_trained_model", "pre_trained_generator_model", "distill_from")
# Decided here, or about several runs at once.
RESERVED = ("name", "resume", "ckpt_path", "seeds", "output_dir", "overwrite", "fast_dev_run", "barebones")
# What may change without making a run another one.
_FREE = {"num_workers", "disable_memory_pinning", "debug", "enable_progress_bar", "loggers", "profiler"}
_FREE |= {"launcher", "devices_stats", "eval_batch_size", "checkpoint_interval", "save_total_limit"}
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Busy(InputError):
    """Another process is at work on a run."""


@dataclass(frozen=True)
class Settings:
    """Of a call of `funneltfm run`, for all its experiments."""

    data_dir: str = "data"
    output_dir: str = "outputs"
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Flags of `funneltfm train` by the stage (or GLUE task) that they are for; "" is all."""
    overwrite: bool = False
    tasks: tuple[str, ...] | None = None
    """GLUE tasks; None is all that an experiment has."""
    num_runs: int | None = None
    """Of each GLUE task; None is what an experiment says."""
    glue_hub: str | None = None
    """GLUE on the Hugging Face hub, in place of folders in data_dir."""
    dry_run: bool = False


class Runner:
    """Runs experiments. launch: what runs `funneltfm WORDS` and returns the exit code."""

    def __init__(
        self,
        experiments: Experiments,
        settings: Settings,
        launch: Callable[[Sequence[str], Sequence[int]], int] | None = None,
    ):
        self.experiments, self.settings = experiments, settings
        self.launch = launch or run_here
        self.output = Path(settings.output_dir)

    # ---- several

    def run(self, names: Sequence[str]) -> None:
        """All of them. One that fails does not keep the others from running, unless they need its model; then an
        InputError names all that failed. A signal ends the run that is on, and all.
        """
        failed = {}
        chosen = [self.experiments.get(name) for name in names]
        self._check_overrides(chosen)
        for experiment in chosen:
            try:
                self.execute(experiment)
            except InputError as error:
                failed[experiment.name] = str(error)
                if len(names) > 1:
                    log.error("%s failed: %s", experiment.name, error)
        if not self.settings.dry_run:
            from funneltfm.experiments.tables import tables

            tables(self)
            log.info("tables: %s/experiments/masked_lm.md and glue.md", self.output)
        if len(names) == 1 and failed:
            raise InputError(next(iter(failed.values())))
        if failed:
            told = "; ".join(f"{name}: {why}" for name, why in failed.items())
            raise InputError(f"{len(failed)} of {len(names)} experiments failed. {told}")

    def _check_overrides(self, chosen: Sequence[Experiment]) -> None:
        tasks = {task for one in chosen for kind in (one.glue, one.search) for task in kind.get("tasks") or ()}
        if unknown := sorted(set(self.settings.tasks or ()) - tasks):
            raise InputError(
                f"--tasks {unknown[0]}: no experiment of these has such a GLUE task; there are "
                f"{', '.join(sorted(tasks)) or 'none'}."
            )
        if self.settings.num_runs is not None and (self.settings.num_runs < 1 or not any(one.glue for one in chosen)):
            raise InputError(
                f"--num_runs must be at least 1, with an experiment that has GLUE tasks; got {self.settings.num_runs}."
            )
        known = tasks.union(*(one.stages for one in chosen))
        known |= {kind for one in chosen for kind in ("glue", "search") if getattr(one, kind)}
        if unknown := sorted(set(self.settings.overrides) - known - {""}):
            raise InputError(
                f"--{unknown[0]}.{next(iter(self.settings.overrides[unknown[0]]))}: no experiment of these has a stage "
                f"{unknown[0]!r}; there are {', '.join(sorted(known))}."
            )

    def execute(self, experiment: Experiment) -> None:
        """Run one experiment to its end. Raises InputError where it cannot, or fails."""
        for stage in experiment.stages:
            self.train(experiment, experiment.run_name(stage), self.stage_flags(experiment, stage))
        if experiment.glue:
            from funneltfm.experiments.glue import finetune

            finetune(self, experiment)
        if experiment.search:
            from funneltfm.experiments.search import search

            search(self, experiment)

    # ---- flags

    def overridden(self, flags: Mapping[str, Any], *stages: str) -> dict[str, Any]:
        """Flags with those of the command line over them; later stages win."""
        for stage in ("", *stages):
            flags = {**flags, **self.settings.overrides.get(stage, {})}
        return dict(flags)

    def stage_flags(self, experiment: Experiment, stage: str) -> dict[str, Any]:
        """Flags of a stage, as they are given to train."""
        return self.filled(experiment, self.overridden(experiment.stages[stage], stage))

    def filled(self, experiment: Experiment, flags: Mapping[str, Any]) -> dict[str, Any]:
        """Flags with their {placeholders} filled in. Raises InputError for data and models that are not there."""
        filled = {name: self._fill(experiment, name, value) for name, value in flags.items()}
        for name in RESERVED:
            if name in filled:
                raise InputError(f"{experiment.name}: {name} is not for an experiment to set; `funneltfm run` does.")
        return filled

    def _fill(self, experiment: Experiment, name: str, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [self._fill(experiment, name, one) for one in value]
        if not isinstance(value, str):
            return value

        def by(match: re.Match[str]) -> str:
            kind, of = match.groups()
            if kind in ("data_dir", "output_dir"):
                return getattr(self.settings, kind)
            if of is None:
                raise InputError(f"{experiment.name}: {name}: {{{kind}}} needs a name: {{{kind}:NAME}}.")
            return str(self._model(experiment, of) if kind == "model" else self._of_stage(experiment, of))

        text = _PLACEHOLDER.sub(by, value)
        ours = name in _FILES and ("{data_dir}" in value or "{output_dir}" in value)
        if ours and not self.settings.dry_run and not Path(text).exists():
            how = experiment.data or "Put it there, or give another --data_dir."
            raise InputError(f"{experiment.name} needs {text}, which is not there. {' '.join(how.split())}")
        return text

    def _model(self, experiment: Experiment, other: str) -> Path:
        """The folder of the model that another experiment has left."""
        source = self.experiments.get(other)
        if not source.stages:
            raise InputError(f"{experiment.name} needs a model of {other}, which has no stages that make one.")
        folder = self.best(source.run_name(list(source.stages)[-1]))
        if not self.settings.dry_run and not folder.is_dir():
            raise InputError(
                f"{experiment.name} needs the model of {other}, and there is none in {folder}. Run {other} first, or "
                f"give the folder (or name on the hub) of such a model in its place, with --pre_trained_model or "
                f"--distill_from."
            )
        return folder

    def _of_stage(self, experiment: Experiment, stage: str) -> Path:
        if stage not in experiment.stages:
            raise InputError(f"{experiment.name} has no stage {stage!r}; it has {', '.join(experiment.stages)}.")
        return self.best(experiment.run_name(stage))

    def best(self, run: str) -> Path:
        return self.output / "pre_trained_models" / run / "best"

    # ---- one run

    def train(self, experiment: Experiment, name: str, flags: Mapping[str, Any]) -> bool:
        """`funneltfm train` under a name, unless it is finished. Whether it was run. Raises InputError where it fails.

        flags: with placeholders filled in. A run that was cut short goes on; one whose settings, or whose model to
        start from or to learn from, are others than they were is run anew, and that is said.
        """
        given = {key: value for key, value in flags.items() if key not in STAGE_KEYS}
        try:
            make_train_args(**given, **accumulation(flags), name=name, output_dir=str(self.output))
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        if self.settings.dry_run:
            print(shlex.join(["funneltfm", *self._command(name, given | accumulation(flags))]))
            return False
        record = self.output / "experiments" / f"{name}.run.json"
        now = {
            "flags": {k: list(v) if isinstance(v, tuple) else v for k, v in flags.items()},
            "models": _digests(given),
        }
        with _locked(record.with_suffix(".lock"), name) as lock:
            how = self._how(name, record, now)
            if how is None:
                return False
            if how != "--resume":
                write_json(record, now)
            words = [*self._command(name, given | accumulation(flags)), *filter(None, [how])]
            log.info("%s: %s", name, {"--resume": "goes on", "--overwrite": "starts anew"}.get(how, "starts"))
            code = self.launch(words, [lock])
        if code == Diverged.exit_code:
            raise Diverged(f"the run {name} has diverged; what it said is above.")
        if code != 0 or not self.results(name).is_file():
            raise InputError(f"the run {name} ended with exit code {code}; what it said is above, and in its log.txt.")
        return True

    def _command(self, name: str, flags: Mapping[str, Any]) -> list[str]:
        return ["train", *flag_words(flags), *flag_words({"name": name, "output_dir": str(self.output)})]

    def results(self, name: str) -> Path:
        return self.output / "runs" / name / "results.json"

    def _how(self, name: str, record: Path, now: dict[str, Any]) -> str | None:
        """How a run is to be started: None not at all, "" for the first time, --resume, or --overwrite."""
        folder, checkpoints = self.results(name).parent, self.output / "checkpoints" / name
        if not folder.exists():
            return "--overwrite" if checkpoints.exists() else ""
        if self.settings.overwrite:
            return "--overwrite"
        if not record.is_file():
            raise InputError(
                f"{folder} is of a run that no experiment has made. Give --overwrite to remove it, or another "
                "--output_dir."
            )
        changes = _changes(read_json(record, "the settings of the run in"), now)
        if changes:
            log.warning("%s: %s, so it is run anew", name, "; ".join(changes))
            return "--overwrite"
        if self.results(name).is_file():
            log.info("%s: finished before (%s)", name, self.results(name))
            return None
        return "--resume" if any(checkpoints.glob("*.ckpt")) else "--overwrite"


def accumulation(flags: Mapping[str, Any]) -> dict[str, int]:
    """accumulate_grad_batches for the global_batch_size of a stage, by its batch_size and the number of processes."""
    total = flags.get("global_batch_size")
    if total is None:
        return {}
    if "accumulate_grad_batches" in flags:
        raise InputError("global_batch_size decides accumulate_grad_batches: give one of them.")
    batch, processes = flags.get("batch_size", 32), n_processes(flags)
    if not isinstance(total, int) or total < 1 or total % (batch * processes):
        raise InputError(
            f"global_batch_size={total} must be a multiple of batch_size={batch} times {processes} processes: change "
            f"--batch_size."
        )
    return {"accumulate_grad_batches": total // (batch * processes)}


def n_processes(flags: Mapping[str, Any]) -> int:
    """How many processes a run with these flags will have."""
    if (size := os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", ""))).isdigit():
        return int(size)
    devices = str(flags.get("devices", "auto"))
    if devices.isdigit():
        return max(1, int(devices))
    if "," in devices:
        return devices.strip(",").count(",") + 1
    if flags.get("accelerator", "auto") in ("cpu", "mps"):
        return 1
    import torch  # only now: this process has nothing else to do with it

    return max(1, torch.cuda.device_count())


def _digests(flags: Mapping[str, Any]) -> dict[str, str]:
    """Which models a run begins with, or learns from: for each folder that a run has left, the digest of its
    results.json, which no two runs have in common.
    """
    found = {}
    for name in _MODELS:
        value = flags.get(name)
        for source in value if isinstance(value, list | tuple) else [value]:
            if source is not None and Path(source).name == "best":
                folder = Path(source).parent
                results = folder.parents[1] / "runs" / folder.name / "results.json"
                if results.is_file():
                    found[str(source)] = file_digest(results)
    return found


def _changes(then: Any, now: dict[str, Any]) -> list[str]:
    """What is different from the time when a run was started, for a message."""
    if not isinstance(then, dict) or not all(isinstance(then.get(key), dict) for key in ("flags", "models")):
        return ["its record cannot be read"]
    old, new = then["flags"], now["flags"]
    keys = [key for key in sorted({*old, *new} - _FREE) if new.get(key) not in (old.get(key), [old.get(key)])]
    changes = [f"{key} was {old.get(key, 'not given')}, is {new.get(key, 'not given')}" for key in keys]
    models = [path for path in now["models"] if path in then["models"] and now["models"][path] != then["models"][path]]
    return changes + [f"{path} is another model than it was" for path in models]


@contextlib.contextmanager
def _locked(path: Path, name: str) -> Iterator[int]:
    """Hold a lock as long as this process, or one that inherits its descriptor, lives: no two work on one run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Busy(f"another process is at work on the run {name}. Wait for its end, or stop it.") from error
        yield handle.fileno()


def command(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The command line and environment of `funneltfm WORDS` in a new process, installed or not."""
    path = os.pathsep.join(filter(None, (str(Path(funneltfm.__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    return [sys.executable, "-m", "funneltfm", *words], os.environ | {"PYTHONPATH": path}


def run_here(words: Sequence[str], keep: Sequence[int] = ()) -> int:
    """Run `funneltfm WORDS` in a process; its exit code. keep: descriptors that it inherits. A signal goes on to it,
    and when it has ended (it saves first) Stopped is raised.
    """
    argv, env = command(words)
    with passing_signals() as child:
        process = subprocess.Popen(argv, env=env, pass_fds=tuple(keep), stdin=subprocess.DEVNULL, process_group=0)
        child.append(process)
        return process.wait()


@contextlib.contextmanager
def passing_signals() -> Iterator[list[subprocess.Popen]]:
    """Send signals on to the processes that are put into the list; at the end raise Stopped if there was one."""
    children: list[subprocess.Popen] = []
    got: list[int] = []

    def pass_on(signum: int, frame: Any) -> None:
        got.append(signum)
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signum)

    had = {signum: signal.signal(signum, pass_on) for signum in _SIGNALS}
    try:
        yield children
    finally:
        for signum, handler in had.items():
            signal.signal(signum, handler)
    if got:
        raise Stopped(got[0], "The same command goes on from there.")
