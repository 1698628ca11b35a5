"""Teachers of a pipeline: trained models whose probabilities a run learns from, for every task with classes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from funneltfm.data.features import Batch
from funneltfm.data.text import TextEncoder, get_text_tokenizer
from funneltfm.errors import InputError, brief
from funneltfm.sparse.distill import Schedule, at, distillation_loss
from funneltfm.tasks.base import Task
from funneltfm.tasks.heads import Heads, n_token_types
from funneltfm.training.model_source import n_positions, of_task

_LOWEST = -1e4  # a logit of what cannot be; -inf would make 0 * inf of it


class Teachers:
    """Frozen models with the heads of `tasks`, in evaluation mode; no part of the module that is trained.

    sources: folders or names of models; for a mixture, folders as `train` leaves them. Raises InputError for tasks that
    have no classes, and for a teacher that has another tokenizer, other labels, or no trained head.
    """

    def __init__(self, args: Any, tasks: Sequence[Task], text: TextEncoder):
        for task in tasks:
            if not task.distils:
                raise InputError(f"--distill_from: {task.name}, as this run has it, has no classes to distil.")
        self.tasks = tasks
        self.weight, self.temperature = (_schedule(x) for x in (args.distill_weight, args.distill_temperature))
        self.counts = args.distill_teachers
        self.heads = [_load(source, args, tasks, text) for source in args.distill_from]

    @property
    def token_types(self) -> bool:
        """Whether one of them tells types of tokens apart."""
        return any(n_token_types(heads.backbone) > 1 for heads in self.heads)

    def to(self, device: torch.device) -> None:
        for heads in self.heads:
            heads.to(device)

    @torch.no_grad()
    def logits(self, batch: Batch) -> dict[str, list[Tensor]]:
        """What each teacher says, by task."""
        said: dict[str, list[Tensor]] = {task.name: [] for task in self.tasks}
        for heads in self.heads:
            own = for_encoder(heads, batch)
            hidden = heads(own["inputs"])
            for task in self.tasks:
                said[task.name].append(task.logits(heads.models[task.name], hidden, own))
        return said

    def loss(
        self, task: Task, logits: Tensor, said: Sequence[Tensor], hard: Tensor, batch: Batch, progress: float
    ) -> tuple[Tensor, Tensor]:
        """weight * soft + (1 - weight) * hard, and soft. logits: the student's; progress: of the run, from 0 to 1."""
        rows, *targets = (task.taught(x, batch).float().clamp(min=_LOWEST) for x in (logits, *said))
        for number, target in enumerate(targets, start=1):
            if target.shape != rows.shape:
                raise InputError(
                    f"teacher {number} gives {task.name} logits of the shape {tuple(target.shape)}, the student "
                    f"{tuple(rows.shape)}: both must have one vocabulary or one set of classes."
                )
        soft = distillation_loss(rows, targets, at(self.temperature, progress), self.counts)
        weight = at(self.weight, progress)
        return weight * soft + (1 - weight) * hard, soft


def for_encoder(heads: Heads, batch: Batch) -> Batch:
    """A batch without the token types, where the encoder knows none."""
    if n_token_types(heads.backbone) > 1:
        return batch
    return batch | {"inputs": {name: x for name, x in batch["inputs"].items() if name != "token_type_ids"}}


def _schedule(numbers: tuple[float, ...]) -> Schedule:
    return (numbers[0], numbers[-1])


def _load(source: str, args: Any, tasks: Sequence[Task], text: TextEncoder) -> Heads:
    import transformers

    models: dict[str, nn.Module] = {}
    for task in tasks:
        folder = of_task(source, task.name) or source
        if get_text_tokenizer(folder, task.words).get_vocab() != text.tokenizer.get_vocab():
            raise InputError(f"the teacher {source} has another vocabulary: its tokenizer must be that of the student.")
        try:
            config = transformers.AutoConfig.from_pretrained(folder)
            _check_labels(source, task.model_config(), config)
            model, info = getattr(transformers, task.auto).from_pretrained(folder, output_loading_info=True)
        except InputError:
            raise
        except Exception as error:  # transformers and the hub raise all kinds
            raise InputError(f"cannot load the teacher {source}: {brief(' '.join(str(error).split()), 500)}") from error
        if missing := sorted(info["missing_keys"]):
            raise InputError(
                f"the teacher {source} is not trained for {task.name}: it lacks {brief(', '.join(missing))}."
            )
        if 0 < (limit := n_positions(config)) < max(args.max_sequence_length):
            raise InputError(
                f"--max_sequence_length={max(args.max_sequence_length)}, but the teacher {source} takes {limit} tokens."
            )
        models[task.name] = model
    heads = Heads(models).eval().requires_grad_(False)
    if (types := n_token_types(heads.backbone)) > 1:
        text.check_types(types)
    return heads


def _check_labels(source: str, wanted: dict[str, Any], config: Any) -> None:
    """Classes must come in the same order; those of a teacher without names (LABEL_0, ...) are taken to."""
    names = wanted.get("id2label")
    if names is None:
        return
    has = dict(config.id2label)
    unnamed = all(name == f"LABEL_{i}" for i, name in has.items())
    if len(has) != len(names) or not (unnamed or has == names):
        raise InputError(
            f"the teacher {source} has the classes {brief(', '.join(map(str, has.values())))}, the student "
            f"{brief(', '.join(map(str, names.values())))}: they must be the same, in the same order."
        )
