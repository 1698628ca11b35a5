"""Distillation: a student learns from the outputs of one or several teachers, whatever the task.

Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015.
Alphabet: B batch, T tokens, N positions that count, V classes or vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funneltfm.errors import InputError

IGNORED = -100  # the label of a position that does not count
Schedule = float | tuple[float, float] | Callable[[float], float]
"""A number; a first and a last one, linear between them; or a function of the progress from 0 to 1."""


def at(schedule: Schedule, progress: float) -> float:
    """The value of a schedule."""
    if callable(schedule):
        return float(schedule(progress))
    first, last = schedule if isinstance(schedule, tuple) else (schedule, schedule)
    return first + (last - first) * progress


def distillation_loss(
    student: Tensor, teachers: Sequence[Tensor], temperature: float = 1.0, weights: Sequence[float] | None = None
) -> Tensor:
    """T^2 KL(q || p), the mean over rows: p = softmax(student / T), q the mean of softmax(teacher / T).

    student and each teacher: logits (N, V). weights: of the teachers, any positive numbers; None = equal. T^2 keeps
    the size of the gradient whatever the temperature (section 2.1). No rows give 0.
    """
    if weights is None:
        weights = [1.0] * len(teachers)
    if not student.numel():
        return student.float().sum()
    p = F.log_softmax(student.float() / temperature, dim=-1)
    q = torch.stack(
        [w / sum(weights) * F.softmax(t.float() / temperature, dim=-1) for w, t in zip(weights, teachers, strict=True)]
    ).sum(dim=0)
    return F.kl_div(p, q, reduction="batchmean") * temperature**2


def encoder_of(model: nn.Module) -> nn.Module | None:
    """The part of a model of `transformers` that is below its head; None where a module has none."""
    encoder = getattr(model, "base_model", None)
    return encoder if isinstance(encoder, nn.Module) and encoder is not model else None


@contextlib.contextmanager
def heads_see(model: nn.Module, positions: Tensor) -> Iterator[bool]:
    """Within this context the model's head computes these positions alone: what it is given is (1, N, D), and logits
    are (1, N, V). Yields whether that is so; a module that has no encoder of its own computes all.

    positions: (B, T) bool. A masked language model spends most of its head on the 85 % of tokens that no loss sees.
    """
    encoder = encoder_of(model)
    if encoder is None:
        yield False
        return

    def cut(_: nn.Module, __: Any, output: Any) -> Any:
        hidden = output[0]
        if hidden.shape[:2] != positions.shape:
            raise InputError(
                f"the encoder's states {tuple(hidden.shape[:2])} are not those of the labels "
                f"{tuple(positions.shape)}: a loss at chosen tokens needs a state of every token."
            )
        chosen = hidden[positions][None]
        if isinstance(output, tuple):
            return chosen, *output[1:]
        output[next(iter(output))] = chosen
        return output

    handle = encoder.register_forward_hook(cut)
    try:
        yield True
    finally:
        handle.remove()


class DistilledOutput(NamedTuple):
    loss: Tensor
    logits: Tensor
    """The student's at what counts: (N, V)."""
    soft_loss: Tensor
    """Against the teachers."""
    hard_loss: Tensor
    """Against the labels."""


class Distilled(nn.Module):
    """A student with teachers. In training with labels it gives weight * soft + (1 - weight) * hard loss; without
    labels, and in evaluation, it is the student alone, so that evaluation means what it meant before.

    student, teachers: modules that take the same keywords and give logits, as `output.logits`, `output[0]` or a
        tensor. Teachers are frozen, stay in evaluation mode, and are in no state dict and no optimizer.
    weight: of the soft loss, in [0, 1]. temperature: above 0. Both are schedules over `progress`, which whoever trains
        sets (0 at the start, 1 at the end; training.sparsity.DistillProgress does).
    teacher_weights: one positive number a teacher; None = equal.
    hard_loss: (logits (N, V), labels (N,)) -> scalar; None = cross entropy.

    Labels of (B, T) mark what does not count with -100; those positions are left out before the heads, where a model
    has an encoder of its own (`heads_see`). Labels of (B,) count whole.
    Labels name one class each; regression and several classes at once are refused.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Sequence[nn.Module],
        weight: Schedule = 1.0,
        temperature: Schedule = 1.0,
        teacher_weights: Sequence[float] | None = None,
        hard_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        super().__init__()
        if not teachers:
            raise InputError("distillation needs at least one teacher.")
        if teacher_weights is not None and (len(teacher_weights) != len(teachers) or min(teacher_weights) <= 0):
            raise InputError(
                f"teacher_weights must be one positive number for each of the {len(teachers)} teachers; got "
                f"{list(teacher_weights)}."
            )
        for progress in (0.0, 1.0):
            if not 0 <= (value := at(weight, progress)) <= 1:
                raise InputError(f"the weight of distillation must be from 0 to 1; got {value} at progress {progress}.")
            if not (value := at(temperature, progress)) > 0:
                raise InputError(f"the temperature must be above 0; got {value} at progress {progress}.")
        self.student = student
        self.weight, self.temperature = weight, temperature
        self.teacher_weights = teacher_weights
        self.hard_loss = hard_loss or _cross_entropy
        self.progress = 0.0
        # In a list, so that they are no submodules: what is saved, trained and pruned is the student.
        self.teachers = [teacher.eval().requires_grad_(False) for teacher in teachers]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Teachers go to devices with the student; a teacher keeps its own type."""
        super()._apply(fn, recurse)
        device = next(self.student.parameters()).device
        for teacher in self.teachers:
            teacher.to(device)
        return self

    def forward(self, labels: Tensor | None = None, **inputs: Any) -> Any:
        if labels is None:
            return self.student(**inputs)
        if not self.training:
            return self.student(**inputs, labels=labels)
        if labels.is_floating_point():
            raise InputError(f"distillation is for labels that name a class; got {labels.dtype}.")
        chosen = labels != IGNORED if labels.dim() > 1 else None
        logits = logits_at(self.student, inputs, chosen)
        labels = labels if chosen is None else labels[chosen]
        hard = self.hard_loss(logits, labels)
        weight = at(self.weight, self.progress)
        soft = torch.zeros_like(hard)
        if weight:
            with torch.no_grad():
                targets = [logits_at(teacher, inputs, chosen) for teacher in self.teachers]
            for number, target in enumerate(targets):
                if target.shape != logits.shape:
                    raise InputError(
                        f"teacher {number} gives logits of the shape {tuple(target.shape)}, the student "
                        f"{tuple(logits.shape)}: both must have one vocabulary or one set of classes."
                    )
            soft = distillation_loss(logits, targets, at(self.temperature, self.progress), self.teacher_weights)
        return DistilledOutput(weight * soft + (1 - weight) * hard, logits, soft, hard)


def logits_at(model: nn.Module, inputs: dict[str, Any], chosen: Tensor | None) -> Tensor:
    """Logits (N, V): of the chosen positions (B, T), or of all rows."""
    if chosen is None:
        return _logits(model(**inputs))
    with heads_see(model, chosen) as cut:
        logits = _logits(model(**inputs))
    return logits.flatten(0, 1) if cut else logits[chosen]


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output.logits if hasattr(output, "logits") else output[0]


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """A mean, 0 where nothing counts."""
    return F.cross_entropy(logits.float(), labels, reduction="sum") / max(1, len(labels))
