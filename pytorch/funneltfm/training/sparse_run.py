"""From the flags of `funneltfm train` to sparsity callbacks, and what a run tells of its density."""

from typing import Any

from torch import nn

from funneltfm.errors import InputError, brief
from funneltfm.sparse.config import SparsityConfig
from funneltfm.sparse.masks import densities, sparse_weights
from funneltfm.sparse.patterns import Pattern
from funneltfm.training.sparsity import GradualPruning, RigL, StaticSparsity, check_groups

# Of masks that are yet to be made; gradual pruning goes on to a distribution from masks that are there.
_FRESH = ("init", "rescale", "distribution", "of", "include", "exclude", "embeddings")
_FRESH_IF_GRADUAL = ("include", "exclude", "embeddings")


def sparsity_callbacks(args: Any, model: nn.Module) -> list[StaticSparsity]:
    """The callbacks of a run. model: what is trained; masks that it has stay, with or without flags. Raises InputError
    where the flags ask for other masks than these.
    """
    if args.sparsity is None:
        return [StaticSparsity()] if densities(model).weights else []
    config = sparsity_config(args)
    _check_masks(args, model)
    begin, end = args.sparsity_begin, args.sparsity_end
    end = 0.75 if end is None else end
    if args.sparsity_method == "gradual":
        begin, curve = 0.25 if begin is None else begin, args.sparsity_schedule or "cubic"
        return [GradualPruning(config, start=begin, end=end, every=args.sparsity_interval, curve=curve)]
    if args.sparsity_method == "static":
        return [StaticSparsity(config)]
    if args.sparsity_method == "rigl_2021":
        return [RigL.original(config, args.rigl_drop, args.sparsity_interval)]
    return [
        RigL(
            config,
            drop=args.rigl_drop,
            every=args.sparsity_interval,
            begin=0 if begin is None else begin,
            end=end,
            anneal=args.sparsity_schedule or "cosine",
            grow=args.rigl_grow,
            scope=args.rigl_scope,
            moments=args.rigl_moments,
        )
    ]


def sparsity_config(args: Any) -> SparsityConfig:
    """What the flags ask for."""
    init = args.sparsity_init
    if args.sparsity_method == "gradual":
        init = "dense"
    elif init is None:
        trained = args.pre_trained_model is not None or args.sparsity_distribution == "global"
        init = "magnitude" if trained and not args.sparsity_rescale else "random"
    return SparsityConfig(
        sparsity=args.sparsity,
        include=args.sparsity_include,
        exclude=args.sparsity_exclude,
        embeddings=args.sparsity_embeddings,
        distribution=dict(map(_own_sparsity, args.sparsity_of)) or args.sparsity_distribution,
        pattern=args.sparsity_pattern,
        count=args.sparsity_count,
        init=init,
        rescale=args.sparsity_rescale,
        seed=args.seed,
    )


def _own_sparsity(said: str) -> tuple[str, float]:
    """Of "*query*=0.5", the glob and the number."""
    glob, _, number = said.rpartition("=")
    try:
        if glob:
            return glob, float(number)
    except ValueError:
        pass
    raise InputError(f'--sparsity_of takes GLOB=SPARSITY, such as "*query*=0.5"; got {brief(repr(said))}.')


def _check_masks(args: Any, model: nn.Module) -> None:
    """Masks that are there must be what the flags ask for."""
    found = densities(model)
    if not found.weights:
        return
    gradual = args.sparsity_method == "gradual"
    fresh = _FRESH_IF_GRADUAL if gradual else _FRESH
    if given := [f"--sparsity_{name}" for name in fresh if f"sparsity_{name}" in args.given]:
        raise InputError(
            f"{given[0]} is about new masks, and {args.pre_trained_model} has masks, which stay. Leave it out."
        )
    try:
        for weight in sparse_weights(model):
            check_groups(weight, Pattern(args.sparsity_pattern))
    except InputError as error:
        raise InputError(
            f"--sparsity_pattern={args.sparsity_pattern}, but {args.pre_trained_model} has masks, which stay; {error} "
            f"Leave it out, or give the pattern that they have."
        ) from error
    has = 1 - (found.model if args.sparsity_count == "model" else found.sparse).mask_density
    if not gradual and abs(has - args.sparsity) > 0.01:
        raise InputError(
            f"--sparsity={args.sparsity:g}, but the masks of {args.pre_trained_model} have {has:.4f}, and they stay. "
            f"Give that, or prune further with --sparsity_method gradual."
        )


def density_of(model: nn.Module) -> dict[str, float]:
    """Shares that are on: "mask" of the weights with masks, "model" of the whole model; empty for a dense one."""
    found = densities(model)
    return {"mask": found.sparse.mask_density, "model": found.model.mask_density} if found.weights else {}
