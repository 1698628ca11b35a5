"""Masks beside weights: a bool buffer `weight_mask` next to the unchanged parameter `weight`.

Three things keep off weights at exactly 0: masking when attached or loaded, masking gradients before a step, masking
weights after it. A mask is never guessed from zeros, because a weight that has just been grown is 0 and on. Masks
travel in the state dict. True = on.

Alphabet: R rows (outputs), C columns (inputs), G groups, U units in a group.
"""

import contextlib
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from funneltfm.errors import InputError, brief
from funneltfm.funnel.ops import Dense, EmbeddingLookup
from funneltfm.sparse.config import Room, SparsityConfig, allocate, matches, total_on
from funneltfm.sparse.patterns import Pattern, largest

SUFFIX = "_mask"
_EMBEDDINGS = (nn.Embedding, EmbeddingLookup)
_LINEAR = (nn.Linear, Dense, nn.modules.conv._ConvNd)
_RAW = ("r_kernel", "in_proj_weight")  # matrices that modules hold without a module: Funnel's attention, torch's


@dataclass(frozen=True, eq=False)
class SparseWeight:
    """A matrix of a model that has a mask, or can have one."""

    name: str
    """Of the parameter in the model."""
    module: nn.Module
    attribute: str
    """Of the parameter in its module; the mask is `attribute` + "_mask"."""
    aliases: tuple[str, ...]
    """All names of the parameter; several where it is tied."""
    embedding: bool = False

    @property
    def weight(self) -> nn.Parameter:
        return getattr(self.module, self.attribute)

    @property
    def mask(self) -> Tensor:
        """Bool, of the weight's shape."""
        return getattr(self.module, self.attribute + SUFFIX)

    @property
    def leading_inputs(self) -> int:
        """How many of the first axes are inputs; with 0 the first axis is the output, as torch has it."""
        if isinstance(self.module, Dense):
            return len(self.module.d_in)
        return int(self.attribute == "r_kernel" or type(self.module).__name__ == "Conv1D")  # of transformers

    @property
    def rows(self) -> int:
        shape, n = self.weight.shape, self.leading_inputs
        return math.prod(shape[n:]) if n else shape[0]

    @property
    def columns(self) -> int:
        return self.weight.numel() // self.rows

    def matrix(self, x: Tensor) -> Tensor:
        """What has the weight's shape as (R, C), outputs by inputs."""
        return x.reshape(self.columns, self.rows).t() if self.leading_inputs else x.reshape(self.rows, self.columns)

    def scores(self, x: Tensor, pattern: Pattern) -> Tensor:
        """Mean magnitude (G, U) of the units of what has the weight's shape."""
        return pattern.to_units(self.matrix(x.detach()).float().abs()).mean(dim=2)

    def units_on(self, pattern: Pattern) -> Tensor:
        """The mask as units (G, U). InputError where it does not have the pattern."""
        units = pattern.to_units(self.matrix(self.mask))
        if not (units == units[:, :, :1]).all():
            raise InputError(f"the mask of {self.name} does not have the pattern {pattern.name}: blocks are cut.")
        return units[:, :, 0]

    def from_units(self, on: Tensor, pattern: Pattern) -> Tensor:
        """(G, U) bool -> a mask of the weight's shape."""
        matrix = pattern.to_matrix(on, self.rows, self.columns)
        return (matrix.t() if self.leading_inputs else matrix).reshape(self.weight.shape).contiguous()

    def room(self, pattern: Pattern) -> Room:
        dims = (self.rows, self.columns) if self.leading_inputs else tuple(self.weight.shape)
        return Room(self.aliases, dims, *pattern.shape(self.rows, self.columns, self.name))


def _owners(model: nn.Module) -> list[SparseWeight]:
    """Every parameter of two axes or more, once; one that is tied to an embedding belongs to that."""
    found: dict[int, SparseWeight] = {}
    for prefix, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.dim() < 2 or not parameter.is_floating_point():
                continue
            name = f"{prefix}.{attribute}" if prefix else attribute
            new = SparseWeight(name, module, attribute, (name,), isinstance(module, _EMBEDDINGS))
            old = found.get(id(parameter))
            if old is not None:
                new = replace(new if new.embedding and not old.embedding else old, aliases=(*old.aliases, name))
            found[id(parameter)] = new
    return list(found.values())


def candidates(model: nn.Module) -> list[SparseWeight]:
    """The weights that can be sparse: those of linear maps and convolutions, and tables of token embeddings (where a
    model does not say which table that is: all tables).
    """

    tables = _token_tables(model)

    def can_be(weight: SparseWeight) -> bool:
        if weight.embedding:
            return not tables or id(weight.weight) in tables
        linear = isinstance(weight.module, _LINEAR) or type(weight.module).__name__ == "Conv1D"
        return (linear and weight.attribute == "weight") or weight.attribute in _RAW

    return [weight for weight in _owners(model) if can_be(weight)]


def _token_tables(model: nn.Module) -> set[int]:
    """The tables that models of `transformers` name as theirs; those of positions and segments are not among them."""
    tables = set()
    for module in model.modules():
        with contextlib.suppress(NotImplementedError, AttributeError):
            tables |= {id(parameter) for parameter in module.get_input_embeddings().parameters()}  # type: ignore[operator]
    return tables


def sparse_weights(model: nn.Module) -> list[SparseWeight]:
    """The weights that have masks, in the model's order; none for a dense model."""
    found = []
    for weight in _owners(model):
        mask = dict(weight.module.named_buffers(recurse=False)).get(weight.attribute + SUFFIX)
        if mask is not None and mask.dtype == torch.bool and mask.shape == weight.weight.shape:
            found.append(weight)
    return found


# ---- attach, detach


def attach(model: nn.Module, config: SparsityConfig) -> list[SparseWeight]:
    """Give the weights that `config` selects masks, and set what is off to 0.

    The masks are a function of (config.seed, names of the weights), or of the weights themselves (init="magnitude").
    Raises InputError where nothing is selected, the target cannot be reached, or the model is sparse already.
    """
    if there := sparse_weights(model):
        raise InputError(f"the model is sparse already ({len(there)} masks, first {there[0].name}): detach it first.")
    weights = select(model, config)
    pattern = Pattern(config.pattern)
    for weight, on in zip(weights, first_masks(model, weights, config), strict=True):
        weight.module.register_buffer(weight.attribute + SUFFIX, weight.from_units(on, pattern))
        if config.rescale and (density := float(on.float().mean())):
            weight.weight.data *= density**-0.5
    apply_masks(weights)
    return weights


def select(model: nn.Module, config: SparsityConfig) -> list[SparseWeight]:
    """The weights that `config` would make sparse. InputError where there are none, or where a glob fits nothing: of
    include a weight that can be sparse, of exclude any parameter, of distribution a weight that is selected.
    """
    possible = candidates(model)
    weights = [weight for weight in possible if config.selects(weight.aliases, weight.embedding)]
    if not weights:
        names = ", ".join(weight.name for weight in possible[:4]) or "none"
        raise InputError(
            f"include={list(config.include)}, exclude={list(config.exclude)} select no weight of the model. Weights "
            f"that can be sparse: {brief(names)}{', ...' if len(possible) > 4 else ''}."
        )
    selected = [name for weight in weights for name in weight.aliases]
    sparse = [name for weight in possible for name in weight.aliases]
    every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    _check_globs("include", config.include, sparse)
    _check_globs("exclude", config.exclude, every)
    if isinstance(config.distribution, Mapping):
        _check_globs("distribution", tuple(config.distribution), selected)
    return weights


def _check_globs(option: str, globs: Sequence[str], names: Sequence[str]) -> None:
    for glob in globs:
        if not matches(names, (glob,)):
            raise InputError(
                f"{option} has the glob {glob!r}, which fits none of the {len(names)} names that it is about, such as "
                f"{brief(', '.join(names[:4]))}. Correct it, or leave it out."
            )


def model_size(model: nn.Module) -> int:
    """Parameters of a model, each counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def first_masks(model: nn.Module, weights: Sequence[SparseWeight], config: SparsityConfig) -> list[Tensor]:
    """Units (G, U) that are on at first, for each weight."""
    pattern = Pattern(config.pattern)
    rooms = [weight.room(pattern) for weight in weights]
    if config.distribution == "global":
        n = total_on(rooms, config, model_size(model)) // rooms[0].unit_size
        counts = [0] * len(rooms)
    else:
        counts = allocate(rooms, config, model_size(model))  # also where all begin on: can the target be reached?
    if config.init == "dense":
        return [torch.ones(room.groups, room.units, dtype=torch.bool, device=w.weight.device)
                for room, w in zip(rooms, weights, strict=True)]  # fmt: skip
    if config.distribution == "global":
        scores = [weight.scores(weight.weight, pattern) for weight in weights]
        joint = torch.cat(scores, dim=1)
        return cut(largest(joint, torch.ones_like(joint, dtype=torch.bool), n), scores)
    masks = []
    for weight, room, count in zip(weights, rooms, counts, strict=True):
        if config.init == "magnitude":
            score = weight.scores(weight.weight, pattern)
        else:
            score = lot((room.groups, room.units), config.seed, 0, weight.name).to(weight.weight.device)
        masks.append(largest(score, torch.ones_like(score, dtype=torch.bool), count))
    return masks


def cut(joint: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
    """Undo torch.cat(parts, dim=1)."""
    return list(joint.split([part.size(1) for part in parts], dim=1))


def lot(shape: Sequence[int], seed: int, step: int, name: str) -> Tensor:
    """Random scores that depend on (seed, step, name) alone: not on the machine's device, nor on other generators."""
    digest = hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest))
    return torch.rand(*shape, generator=generator)


def attach_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> list[SparseWeight]:
    """Give a model masks that are there already, by the names of their weights, and set what is off to 0."""
    owners = {alias: weight for weight in _owners(model) for alias in weight.aliases}
    for name, mask in masks.items():
        weight = owners.get(name)
        if weight is None or weight.weight.shape != mask.shape or mask.dtype != torch.bool:
            found = "no such weight" if weight is None else f"shape {tuple(weight.weight.shape)}"
            raise InputError(
                f"the mask of {name} ({mask.dtype}, shape {tuple(mask.shape)}) does not fit the model: {found}."
            )
        if isinstance(getattr(weight.module, weight.attribute + SUFFIX, None), Tensor):
            delattr(weight.module, weight.attribute + SUFFIX)
        weight.module.register_buffer(weight.attribute + SUFFIX, mask.to(weight.weight.device))
    weights = sparse_weights(model)
    apply_masks(weights)
    return weights


def detach(model: nn.Module) -> None:
    """Take the masks away. Weights that were off stay 0 until something trains them."""
    for weight in sparse_weights(model):
        delattr(weight.module, weight.attribute + SUFFIX)


# ---- keeping off weights at 0


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def zero_off(x: Tensor, mask: Tensor) -> None:
    """Set x to 0 (and not -0) in place where the mask is off, also where it was NaN; the rest keeps its bits.

    The bits are multiplied as a whole number: on a CPU a tenth of the time that masked_fill_ takes.
    """
    x.detach().view(_INTEGERS[x.element_size()]).mul_(mask)


def apply_masks(weights: Sequence[SparseWeight]) -> None:
    for weight in weights:
        zero_off(weight.weight, weight.mask)


def keep_masks(optimizer: Optimizer, weights: Sequence[SparseWeight]) -> list[Any]:
    """For a training loop of your own: off weights are 0 after every step of this optimizer, and their gradients
    before it. Returns handles whose remove() ends that. (The Lightning callbacks do it by themselves.)
    """

    def before(*_: Any) -> None:
        for weight in weights:
            if weight.weight.grad is not None:
                zero_off(weight.weight.grad, weight.mask)

    def after(*_: Any) -> None:
        apply_masks(weights)

    return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]


_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")  # names in torch's optimizers


@torch.no_grad()
def reset_moments(optimizer: Optimizer, parameter: Tensor, old: Tensor, new: Tensor, grown: str = "zero") -> None:
    """Forget what an optimizer remembers of weights that were dropped or grown; the others keep it bit for bit.

    parameter: as the optimizer holds it; old, new: its masks. grown: what second moments of grown weights begin with:
    "zero", or the "mean" of those that stay. With zero, Adam's first step for such a weight is up to
    (1 - beta1) / sqrt(1 - beta2) times the learning rate: 3.2 for (.9, .999), 0.7 for (.9, .98).

    Moments without a number for every weight stay: Adafactor's second one is of rows and columns, so a grown weight
    takes the steps of its row and column. InputError for 8-bit moments, whose codes 0 are no zeros.
    """
    state = optimizer.state.get(parameter, {})
    inner = [value for value in state.values() if isinstance(value, dict)]  # where bitsandbytes hides it from FSDP
    for value in (value for part in (state, *inner) for value in part.values()):
        if isinstance(value, Tensor) and value.dtype == torch.uint8 and value.shape == parameter.shape:
            raise InputError(
                f"{type(optimizer).__name__} keeps moments as 8-bit codes, which cannot be reset for single weights: "
                f"take an optimizer with moments in full (AdamW), or keep masks as they are with StaticSparsity."
            )
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.shape != parameter.shape:
            continue
        stays = old & new
        mean = value[stays].mean() if grown == "mean" and name in _SECOND_MOMENTS and stays.any() else 0.0
        value.masked_fill_(old ^ new, 0)
        if grown == "mean" and name in _SECOND_MOMENTS:
            value.masked_fill_(new & ~old, float(mean))


# ---- what there is


class Density(NamedTuple):
    """Counts of weights."""

    size: int
    on: int
    """By the mask: the truth."""
    nonzero: int
    """By value: less than `on` after growing, because grown weights begin at 0."""

    @property
    def mask_density(self) -> float:
        return self.on / self.size if self.size else 1.0

    @property
    def nonzero_density(self) -> float:
        return self.nonzero / self.size if self.size else 1.0


class Densities(NamedTuple):
    weights: dict[str, Density]
    """By name, of each sparse weight."""
    sparse: Density
    """Of all sparse weights together."""
    model: Density
    """Of the whole model; what has no mask counts as on."""


def densities(model: nn.Module) -> Densities:
    """How dense a model is."""
    weights = {
        weight.name: Density(
            weight.mask.numel(), int(weight.mask.sum()), int(torch.count_nonzero(weight.weight.detach()))
        )
        for weight in sparse_weights(model)
    }
    size, on, nonzero = (sum(density[i] for density in weights.values()) for i in range(3))
    total = model_size(model)
    all_nonzero = sum(int(torch.count_nonzero(parameter.detach())) for parameter in model.parameters())
    return Densities(weights, Density(size, on, nonzero), Density(total, total - size + on, all_nonzero))


def pack_bits(mask: Tensor) -> np.ndarray:
    """A mask as bytes, eight weights in each, in the order of memory."""
    return np.packbits(mask.cpu().numpy().reshape(-1))


def fingerprint(weights: Sequence[SparseWeight]) -> str:
    """The same for the same masks, on every machine."""
    digest = hashlib.blake2b(digest_size=16)
    for weight in weights:
        digest.update(f"{weight.name}{tuple(weight.mask.shape)}".encode())
        digest.update(pack_bits(weight.mask).tobytes())
    return digest.hexdigest()
