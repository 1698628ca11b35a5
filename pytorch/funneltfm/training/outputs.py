"""The folders of a pipeline's run, and the models that it leaves in them."""

import logging
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from lightning import Callback

from funneltfm.errors import InputError
from funneltfm.files import write_json, write_text
from funneltfm.tasks.base import Task
from funneltfm.tasks.heads import Heads
from funneltfm.training import ranks
from funneltfm.training.config import Args

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outputs:
    """Where a run writes: output_dir/{checkpoints,pre_trained_models,predictions,runs,tensorboard}/NAME."""

    root: Path
    name: str

    @property
    def run(self) -> Path:
        """config.yaml, metrics.csv, results.json, log.txt."""
        return self.root / "runs" / self.name

    @property
    def config(self) -> Path:
        return self.run / "config.yaml"

    @property
    def results(self) -> Path:
        return self.run / "results.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints" / self.name

    @property
    def resumable(self) -> list[Path]:
        """Where a checkpoint to resume from may be, from new to old."""
        return [self.checkpoints / name for name in ("next.ckpt", "last.ckpt", "previous.ckpt")]

    @property
    def models(self) -> Path:
        return self.root / "pre_trained_models" / self.name

    @property
    def best(self) -> Path:
        return self.models / "best"

    @property
    def predictions(self) -> Path:
        return self.root / "predictions" / self.name

    def _folders(self) -> list[Path]:
        return [self.run, self.checkpoints, self.models, self.predictions, self.root / "tensorboard" / self.name]

    def prepare(self, resume: bool, overwrite: bool, needed: Path | None = None) -> None:
        """Make sure that a new run meets no old one, with which `needed` would go. Raises InputError where it would."""
        there = [folder for folder in self._folders() if folder.exists()]
        if resume:
            for folder in there:  # what a killed run has left half written
                for path in [*folder.glob(".*.tmp*"), *folder.glob("*.half")]:
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        elif overwrite:
            if needed is not None and any(needed.resolve().is_relative_to(folder.resolve()) for folder in there):
                raise InputError(
                    f"--overwrite would remove {needed}, from which the run is to go on. Give another --name."
                )
            for folder in there:
                shutil.rmtree(folder)
        elif there:
            raise InputError(
                f"there is a run named {self.name} in {self.root} already. Give --resume to go on with it, --overwrite "
                f"to remove it, or another --name."
            )


def check_name(name: str) -> str:
    """A name of one folder."""
    if not re.fullmatch(r"[\w.=+-]+", name) or name in (".", ".."):
        raise InputError(f"name must be usable as a folder: letters, digits and . _ - + =; got {name!r}.")
    return name


def save_model(heads: Heads, tasks: Sequence[Task], tokenizer: Any, args: Args, folder: Path) -> None:
    """Write a folder that AutoModelFor... and `funneltfm predict` load; of a mixture, one folder for each task in it.

    It appears under its name when it is whole.
    """
    half = folder.with_name(f"{folder.name}.half")
    shutil.rmtree(half, ignore_errors=True)
    for task in tasks:
        target = half if len(tasks) == 1 else half / task.name
        target.mkdir(parents=True)
        task.save(*heads.of_task(task.name), target)
        for config in sorted(target.rglob("config.json")):  # of what stands beside it too: ELECTRA's generator
            tokenizer.save_pretrained(config.parent)
    state: dict[str, Any] = {task.name: task.state() for task in tasks}
    write_json(half / "hyperparameters.json", {"flags": given_flags(args), "tasks": state})
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(half, folder)


def save_final_model(
    heads: Heads, tasks: Sequence[Task], tokenizer: Any, args: Args, outputs: Outputs, epoch: int, step: int
) -> None:
    """Write the model of the last step as ckpt_epoch_E_step_S_final, or rename it, where it is there already."""
    if any(outputs.models.glob(f"ckpt_epoch_*_step_{step}_final")):  # a finished run that is resumed
        return
    same = next(outputs.models.glob(f"ckpt_epoch_*_step_{step}"), None)
    if same is not None:
        os.replace(same, same.with_name(f"{same.name}_final"))
    else:
        save_model(heads, tasks, tokenizer, args, outputs.models / f"ckpt_epoch_{epoch}_step_{step}_final")


def given_flags(args: Args) -> dict[str, Any]:
    """The flags that were set on purpose; tuples as lists."""
    flags = {name: getattr(args, name) for name in sorted(args.given)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flags.items()}


class SaveModels(Callback):
    """Writes ckpt_epoch_E_step_S folders: at validations, at ends of epochs, and every `checkpoint_interval` steps."""

    def __init__(self, outputs: Outputs, tokenizer: Any, args: Args):
        self.outputs, self.tokenizer, self.args = outputs, tokenizer, args

    def on_validation_end(self, trainer: lightning.Trainer, module: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not self.args.no_val_checkpointing:
            self._save(trainer, module)

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: Any) -> None:
        if not self.args.no_epoch_checkpointing:
            self._save(trainer, module)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = self.args.checkpoint_interval
        if every and trainer.global_step and trainer.global_step % every == 0:
            self._save(trainer, module)

    def _save(self, trainer: lightning.Trainer, module: Any) -> None:
        if self.args.save_total_limit == 0:
            return
        heads = module.whole("heads")
        if not ranks.is_main():
            return
        folder = self.outputs.models / f"ckpt_epoch_{trainer.current_epoch}_step_{trainer.global_step}"
        if folder.exists() or folder.with_name(f"{folder.name}_final").exists():
            return
        save_model(heads, module.tasks, self.tokenizer, self.args, folder)
        if self.args.save_total_limit is not None:
            folders = self.outputs.models.iterdir()
            numbered = [(int(m[1]), path) for path in folders if (m := _STEP.fullmatch(path.name))]
            for _, path in sorted(numbered)[: -self.args.save_total_limit]:
                shutil.rmtree(path)


_STEP = re.compile(r"ckpt_epoch_\d+_step_(\d+)")


def model_card(args: Args, results: dict[str, Any]) -> str:
    """README.md of a model: what it does, how it was made, what it scores."""
    lines = [
        "---",
        "library_name: transformers",
        f"tags: [{', '.join(args.pipeline.replace('+', ' ').split())}]",
        "---",
        "",
        f"# {results['name']}",
        "",
        f"Trained by `funneltfm train --pipeline {args.pipeline}` from "
        f"{args.pre_trained_model or 'scratch'}: {results['parameters']:,} parameters, {results['steps']} steps.",
        "",
        *_density_lines(results),
        "| split | score | value |",
        "|---|---|---|",
    ]
    for split in ("valid", "test"):
        lines += [f"| {split} | {name} | {value:.4f} |" for name, value in results.get(split, {}).items()]
    flags = yaml.safe_dump(given_flags(args), sort_keys=False, allow_unicode=True)
    return "\n".join([*lines, "", "Flags:", "", "```yaml", flags + "```", ""])


def _density_lines(results: dict[str, Any]) -> list[str]:
    if not (density := results.get("density")):
        return []
    return [
        f"Sparse: {density['mask']:.2%} of the weights with masks are on, {density['model']:.2%} of the whole model. "
        "The masks are in the folder, beside exact zeros.",
        "",
    ]


def write_model_cards(folder: Path, tasks: Sequence[Task], args: Args, results: dict[str, Any]) -> None:
    """In the model's folder and, of a mixture, in that of each task."""
    for one in [folder, *(folder / task.name for task in tasks if (folder / task.name).is_dir())]:
        write_text(one / "README.md", model_card(args, results))


def best_state(outputs: Outputs) -> dict[str, torch.Tensor]:
    """Weights of the best model of a run, by their names in the training module."""
    from funneltfm.training.checkpoint_io import WholeCheckpoints

    path = outputs.checkpoints / "best.ckpt"
    return WholeCheckpoints().load_checkpoint(path, map_location="cpu", weights_only=True)["state_dict"]
