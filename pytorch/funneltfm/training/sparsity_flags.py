"""The flags of sparse training and of distillation, and which of them each method reads. No torch here."""

from dataclasses import dataclass
from typing import Any, Literal

from funneltfm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SparsityFlags:
    """Sparse training"""

    sparsity: float | None = None
    """Share of the weights that are off, such as 0.8 (with the pattern N:M, 1 - N/M). A sparse pre_trained_model keeps
    its masks without it.
    """
    sparsity_method: Literal["static", "rigl", "gradual", "rigl_2021"] = "static"
    """static: masks stay. rigl: the smallest weights are dropped, those with the largest gradients grow. gradual: from
    dense to sparse by magnitude; the best model is one of those after sparsity_end. rigl_2021: as the project that
    sparse training is measured against did RigL, to compare with.
    """
    sparsity_pattern: str = "unstructured"
    """unstructured, constant_fan_in, N:M such as 2:4, or blocks of outputs x inputs such as 4x1."""
    sparsity_distribution: Literal["uniform", "erk", "global"] = "uniform"
    """uniform: every matrix is as sparse as the others. erk: the larger, the sparser. global: all compete."""
    sparsity_of: tuple[str, ...] = ()
    """Matrices with a sparsity of their own, as GLOB=SPARSITY, such as "*query*=0.5"; of several globs the first that
    fits. The others are as --sparsity says.
    """
    sparsity_count: Literal["module", "model"] = "module"
    """What has the sparsity: the sparse matrices, or the whole model, exactly."""
    sparsity_include: tuple[str, ...] = ("*",)
    """Globs on names of weights that can be sparse, such as "*encoder*". Default: every linear map, heads included."""
    sparsity_exclude: tuple[str, ...] = ()
    """Globs on names of weights that stay dense."""
    sparsity_embeddings: bool = False
    """The table of token embeddings can be sparse too."""
    sparsity_init: Literal["random", "magnitude"] | None = None
    """All but gradual: which weights are on at first. Default: the largest (magnitude) of a pre_trained_model and with
    global, else by lot (random).
    """
    sparsity_rescale: bool = False
    """All but gradual: multiply fresh weights by 1/sqrt(density), so that outputs keep their variance."""
    sparsity_interval: int = 100
    """rigl, gradual, rigl_2021: steps between changes of the masks."""
    sparsity_begin: int | float | None = None
    """rigl, gradual: the first change, as a step or (with a point, 0.25) a share of the run. Default: rigl 0, gradual
    0.25.
    """
    sparsity_end: int | float | None = None
    """rigl, gradual: the last change. Default: 0.75."""
    sparsity_schedule: Literal["cosine", "linear", "constant", "cubic"] | None = None
    """rigl: how the share that is dropped falls (cosine, linear, constant; default cosine). gradual: how the sparsity
    rises (cubic, linear, cosine; default cubic).
    """
    rigl_drop: float = 0.3
    """rigl, rigl_2021: share of the weights that the first change drops and grows."""
    rigl_grow: Literal["gradient", "random"] = "gradient"
    """rigl: grow those with the largest gradient, or by lot."""
    rigl_scope: Literal["layer", "global"] = "layer"
    """rigl: every matrix keeps its density, or all compete."""
    rigl_moments: Literal["zero", "mean", "keep"] = "zero"
    """rigl: what the optimizer remembers of weights that have grown: nothing, the mean of the others', what it had."""


@dataclass(frozen=True, kw_only=True)
class DistillFlags:
    """Distillation"""

    distill_from: tuple[str, ...] | None = None
    """Teachers: folders or names of trained models with the head of the pipeline and the same tokenizer. Their
    probabilities are averaged.
    """
    distill_weight: tuple[float, ...] = (1.0,)
    """Weight of the teachers' loss, from 0 to 1; the labels have the rest. Two numbers: at the start and at the end."""
    distill_temperature: tuple[float, ...] = (1.0,)
    """Temperature of the softmax. Two numbers: at the start and at the end."""
    distill_teachers: tuple[float, ...] | None = None
    """How much each teacher counts in the average, positive numbers. Default: all the same."""


_FIRST_MASKS = ("sparsity_init", "sparsity_rescale")
_CHANGES = ("sparsity_interval", "sparsity_begin", "sparsity_end", "sparsity_schedule")
# Which flags are read by a method; what no line names is read by all.
READS: dict[str, tuple[str, ...]] = {
    "static": _FIRST_MASKS,
    "rigl": (*_FIRST_MASKS, *_CHANGES, "rigl_drop", "rigl_grow", "rigl_scope", "rigl_moments"),
    "gradual": _CHANGES,
    "rigl_2021": (*_FIRST_MASKS, "sparsity_interval", "rigl_drop"),
}
_SOME = {name for names in READS.values() for name in names}
_OF_SPARSITY = set(SparsityFlags.__dataclass_fields__) - {"sparsity"}
_OF_TEACHERS = set(DistillFlags.__dataclass_fields__) - {"distill_from"}


def check_sparsity_flags(args: Any) -> None:
    """Raises InputError for a flag that was given (args.given) and is not read, and for what does not go together."""
    for needed, flags in (("sparsity", _OF_SPARSITY), ("distill_from", _OF_TEACHERS)):
        given = sorted(flags & args.given)
        if given and getattr(args, needed) is None:
            raise InputError(f"--{given[0]} is read with --{needed} alone: give that too, or leave it out.")
    for name in sorted(_SOME & args.given - set(READS[args.sparsity_method])):
        readers = [method for method, names in READS.items() if name in names]
        raise InputError(
            f"--{name} is read by --sparsity_method {' or '.join(readers)} alone, and this run has "
            f"{args.sparsity_method}: leave it out, or choose another method."
        )
    for needed in ("sparsity", "distill_from"):
        if getattr(args, needed) is not None and args.train_dataset is None and not args.resume:
            raise InputError(f"--{needed} is about training: give --train_dataset, or leave it out.")
    if args.sparsity is not None and args.sparsity_method == "gradual" and args.early_stopping:
        raise InputError(
            "--early_stopping would end gradual pruning before the model is sparse, since scores fall with the density:"
            " leave it out."
        )
    if args.sparsity is not None and args.sparsity_method != "static" and args.optimizer.endswith("8bit"):
        raise InputError(
            f"--optimizer {args.optimizer} keeps moments as 8-bit codes, which cannot be reset for single weights, and "
            f"--sparsity_method {args.sparsity_method} changes masks: give --optimizer adamw, or --sparsity_method "
            f"static."
        )
    for name, fits, expected in (
        ("distill_weight", lambda x: 0 <= x <= 1, "from 0 to 1"),
        ("distill_temperature", lambda x: x > 0, "more than 0"),
    ):
        values = getattr(args, name)
        if len(values) > 2 or not all(map(fits, values)):
            raise InputError(f"{name} must be one number or two, {expected}; got {', '.join(map(str, values))}.")
    counts = args.distill_teachers
    if counts is not None and (len(counts) != len(args.distill_from) or min(counts) <= 0):
        raise InputError(
            f"distill_teachers must be one positive number for each of the {len(args.distill_from)} teachers of "
            f"--distill_from; got {', '.join(map(str, counts))}."
        )
    if args.sparsity_of and args.sparsity_distribution != "uniform":
        raise InputError(
            f"--sparsity_of gives matrices a sparsity of their own, --sparsity_distribution "
            f"{args.sparsity_distribution} shares it out among all: leave one of them out."
        )
    if args.distill_from is not None and args.label_weights is not None:
        raise InputError("--label_weights weighs rows by their labels, which teachers do not have: leave it out.")
