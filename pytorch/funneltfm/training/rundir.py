"""The folder of a run: where it is, what is in it, and that nothing in it is lost by accident."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from funneltfm.errors import InputError, brief
from funneltfm.files import read_json

# What a run writes; `overwrite` removes these and nothing else.
_FILES = ("config.yaml", "metrics.csv", "results.json", "log.txt")
_FOLDERS = ("checkpoints", "best", "predictions", "plots", "ray")


@dataclass(frozen=True)
class RunDir:
    """Paths in the folder of a run."""

    root: Path

    @property
    def config(self) -> Path:
        """The flags of the run; `--config` reads it."""
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.csv"

    @property
    def results(self) -> Path:
        return self.root / "results.json"

    @property
    def checkpoints(self) -> Path:
        """`last.ckpt`, from which a run resumes, and `best.ckpt`."""
        return self.root / "checkpoints"

    @property
    def last(self) -> Path:
        return self.checkpoints / "last.ckpt"

    @property
    def resumable(self) -> list[Path]:
        """Where a checkpoint to resume from may be, from new to old. next.ckpt is only there after a kill between
        writing and renaming.
        """
        return [self.checkpoints / name for name in ("next.ckpt", "last.ckpt", "previous.ckpt")]

    @property
    def model(self) -> Path:
        """The best model under the original's names."""
        return self.root / "best" / "model.pt"

    @property
    def net_config(self) -> Path:
        return self.root / "best" / "net_config.json"

    @property
    def labels(self) -> Path:
        """Class names of the best model, in order."""
        return self.root / "best" / "labels.json"

    @property
    def text_config(self) -> Path:
        """How text becomes ids for the best model: kind of vocabulary, its file, cased, longest input."""
        return self.root / "best" / "text_config.json"

    @property
    def predictions(self) -> Path:
        return self.root / "predictions"

    @property
    def plots(self) -> Path:
        return self.root / "plots"

    def exists(self) -> bool:
        """Whether there is anything here to lose."""
        return any(path.exists() for path in (self.metrics, self.results, self.checkpoints, self.model.parent))

    def sweep(self) -> None:
        """Remove what this run has left where it was killed while it wrote."""
        for folder in (self.root, *(self.root / name for name in _FOLDERS)):
            for path in folder.glob(".*.tmp*"):
                if path.is_file() and re.search(r"\.\d+\.tmp(\.|$)", path.name):
                    path.unlink(missing_ok=True)

    def clear(self) -> None:
        for name in _FILES:
            (self.root / name).unlink(missing_ok=True)
        for name in _FOLDERS:
            shutil.rmtree(self.root / name, ignore_errors=True)


def find_run(model_dir: str | None, dataset: str, going_on: bool, overwrite: bool) -> RunDir:
    """The folder to use; an InputError where it would be the wrong one.

    going_on: the run exists (to be resumed or tested). overwrite: it may exist (the caller clears it).
    Without model_dir: the newest exp/DATASET/run_N to go on with, else the next free number.
    """
    if model_dir is None:
        parent = Path("exp") / dataset
        numbers = [int(m[1]) for p in parent.glob("run_*") if (m := re.fullmatch(r"run_(\d+)", p.name))]
        if going_on and not numbers:
            raise InputError(f"there is no run in {parent} to go on with. Name the run's folder with --model_dir.")
        return RunDir(parent / f"run_{max(numbers, default=0) + (not going_on)}")
    run = RunDir(Path(model_dir))
    if run.root.exists() and not run.root.is_dir():
        raise InputError(f"model_dir {run.root} is a file; it must be a folder, or the name of a new one.")
    if going_on or overwrite or not run.exists():
        return run
    raise InputError(
        f"{run.root} already holds a run. Give --resume to go on with it, --overwrite to remove it and start anew, "
        f"or another --model_dir."
    )


def read_labels(ckpt: Path) -> tuple[str, ...] | None:
    """Class names that a model was trained with, from the labels.json beside it; None where nothing says so."""
    path = ckpt.with_name("labels.json")
    if not path.is_file():
        return None
    names = read_json(path, "the class names")
    if names is None:
        return None
    whole = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    if not whole or len(set(names)) < len(names):
        raise InputError(f"{path} must hold the model's class names, each once, or null; got {brief(repr(names))}.")
    return tuple(names)
