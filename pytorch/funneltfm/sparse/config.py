"""What a sparse model is to be, and how many weights that leaves on in each matrix."""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from funneltfm.errors import InputError
from funneltfm.sparse.patterns import Pattern

DISTRIBUTIONS = ("uniform", "erk", "global")


@dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """Which weights of a model are sparse, how sparse, and in which pattern.

    Sparsity is the share of weights that are off: 0.8 leaves a fifth on.
    """

    sparsity: float | None = None
    """The target, from 0 to below 1. With an N:M pattern it is 1 - N/M and need not be given."""
    include: Sequence[str] = ("*",)
    """Globs on parameter names; a weight that one matches can be sparse. By default every linear map and convolution.
    Norms, biases and position tables never are."""
    exclude: Sequence[str] = ()
    """Globs on parameter names that stay dense, whatever include says."""
    embeddings: bool = False
    """Whether the table of token embeddings (and what is tied to it) can be sparse too."""
    distribution: str | Mapping[str, float] = "uniform"
    """uniform: every matrix is as sparse as the others. erk: Erdos-Renyi-Kernel, the larger the sparser. global: the
    weights of all matrices compete by magnitude. Or sparsities by glob, the first that matches; what matches none is
    uniform."""
    pattern: str = "unstructured"
    """unstructured, constant_fan_in, N:M (2:4), or blocks of outputs x inputs (4x1, 16x16)."""
    count: Literal["module", "model"] = "module"
    """module: the sparsity is that of the sparse matrices. model: it is that of the whole model, whose dense parts
    the sparse ones make up for."""
    init: Literal["random", "magnitude", "dense"] = "random"
    """Which weights are on at first: some by lot, the largest, or all (for GradualPruning)."""
    rescale: bool = False
    """Multiply fresh weights by 1/sqrt(density), so that an output has the variance it would have if dense."""
    seed: int = 0
    """Of the lot, and of RigL's where it grows by lot."""

    def __post_init__(self) -> None:
        pattern = Pattern(self.pattern)
        if pattern.n_of_m:
            n, m = pattern.n_of_m
            if self.sparsity is None:
                object.__setattr__(self, "sparsity", 1 - n / m)
            if abs(self.wanted - (1 - n / m)) > 1e-9 or self.distribution != "uniform" or self.count != "module":
                raise InputError(
                    f"the pattern {self.pattern} fixes the sparsity of every matrix at {1 - n / m:g}: leave out "
                    f"sparsity, distribution and count, or choose another pattern."
                )
        _check_sparsity("sparsity", self.sparsity)
        for name, globs in (("include", self.include), ("exclude", self.exclude)):
            if isinstance(globs, str) or not all(isinstance(glob, str) for glob in globs):
                raise InputError(f"{name} must be a list of globs; got {globs!r}.")
            object.__setattr__(self, name, tuple(globs))
        choices: dict[str, tuple[str, ...]] = {
            "distribution": DISTRIBUTIONS,
            "count": ("module", "model"),
            "init": ("random", "magnitude", "dense"),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed and not (name == "distribution" and isinstance(value, Mapping)):
                raise InputError(f"{name} must be one of {', '.join(allowed)}; got {value!r}.")
        if isinstance(self.distribution, Mapping):
            for glob, sparsity in self.distribution.items():
                _check_sparsity(f"distribution[{glob!r}]", sparsity)
        if self.distribution == "global" and (self.init == "random" or pattern.grouped):
            raise InputError(
                "distribution='global' ranks the weights of all matrices by magnitude: give init='magnitude' (or "
                "'dense', to prune gradually), and a pattern that lets them move freely (unstructured, or blocks)."
            )
        if self.rescale and self.init != "random":
            raise InputError("rescale is for fresh weights: give init='random', or leave rescale out.")

    @property
    def wanted(self) -> float:
        assert self.sparsity is not None
        return self.sparsity

    def selects(self, names: Sequence[str], embedding: bool) -> bool:
        """Whether a weight that goes by these names (several where it is tied) can be sparse."""
        if embedding and not self.embeddings:
            return False
        return matches(names, self.include) and not matches(names, self.exclude)

    def to_dict(self) -> dict[str, Any]:
        """For JSON and YAML; SparsityConfig(**it) is equal."""
        values = asdict(self)
        return values | {name: list(values[name]) for name in ("include", "exclude")}


def _check_sparsity(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise InputError(f"{name} must be the share of weights that are off, from 0 to below 1; got {value!r}.")


def matches(names: Sequence[str], globs: Sequence[str]) -> bool:
    """Whether a glob fits one of the names of a weight."""
    return any(fnmatch.fnmatchcase(name, glob) for name in names for glob in globs)


# ---- how many are on in each matrix


class Room(NamedTuple):
    """A matrix as `allocate` sees it."""

    names: Sequence[str]
    dims: Sequence[int]
    """Sizes of its axes (outputs, inputs, kernel), for ERK."""
    groups: int
    units: int
    """In a group."""
    unit_size: int

    @property
    def quantum(self) -> int:
        """Weights that one more unit in every group turns on."""
        return self.groups * self.unit_size

    @property
    def size(self) -> int:
        return self.quantum * self.units


def total_on(rooms: Sequence[Room], config: SparsityConfig, model_size: int) -> int:
    """Weights that are on in all the matrices together. model_size: parameters of the whole model."""
    size = sum(room.size for room in rooms)
    if config.count == "module":
        return round((1 - config.wanted) * size)
    on = round((1 - config.wanted) * model_size) - (model_size - size)
    if not 0 <= on <= size:
        raise InputError(
            f"the whole model cannot have the sparsity {config.wanted:g}: {size} of its {model_size} parameters can be "
            f"sparse, so at most {size / model_size:.4f} can be off. Lower sparsity, widen include (or embeddings=True)"
            f", or give count='module'."
        )
    return on


def allocate(rooms: Sequence[Room], config: SparsityConfig, model_size: int) -> list[int]:
    """Units that are on in every group of each matrix, at least one. InputError where a matrix would have none.

    With count="module" and uniform, every matrix has the number nearest to its own target. Else the numbers add up to
    `total_on`; where a pattern moves several weights at once, to the nearest below that it can make.
    """
    counts = _nearest(rooms, config, model_size)
    for room, count in zip(rooms, counts, strict=True):
        if room.units and not count:
            own = _own_sparsity(room, config)
            of = "" if config.pattern == "unstructured" else f" in the pattern {config.pattern}"
            raise InputError(
                f"the sparsity {config.wanted if own is None else own:g} leaves {room.names[0]} no weight that is on: "
                f"its {room.size} weights are on or off {room.quantum} at a time{of}. Lower the sparsity, leave the "
                f"matrix out with exclude, or choose another pattern."
            )
    return counts


def _nearest(rooms: Sequence[Room], config: SparsityConfig, model_size: int) -> list[int]:
    fixed = {i: value for i, room in enumerate(rooms) if (value := _own_sparsity(room, config)) is not None}
    wanted = {i: (1 - value) * rooms[i].units for i, value in fixed.items()}
    if config.count == "module" and config.distribution != "erk":
        return [min(room.units, round(wanted.get(i, (1 - config.wanted) * room.units))) for i, room in enumerate(rooms)]
    counts = [min(room.units, round(wanted.get(i, 0))) for i, room in enumerate(rooms)]
    free = [i for i in range(len(rooms)) if i not in fixed]
    left = total_on(rooms, config, model_size) - sum(counts[i] * rooms[i].quantum for i in fixed)
    if not 0 <= left <= sum(rooms[i].size for i in free):
        raise InputError(
            f"the sparsities in distribution leave {left} weights on for the {len(free)} matrices without one, so the "
            f"whole cannot have the sparsity {config.wanted:g}. Change one of them."
        )
    densities = _erk([rooms[i] for i in free], left) if config.distribution == "erk" else _even(rooms, free, left)
    exact = {i: density * rooms[i].units for i, density in zip(free, densities, strict=True)}
    for i in free:
        counts[i] = min(rooms[i].units, math.floor(exact[i] + 1e-9))
        left -= counts[i] * rooms[i].quantum
    # What rounding down has left goes where it took most, for as long as a matrix can take it.
    for i in sorted(free, key=lambda i: (counts[i] - exact[i], i)) * 2:
        if left >= rooms[i].quantum and counts[i] < rooms[i].units:
            counts[i] += 1
            left -= rooms[i].quantum
    return counts


def _own_sparsity(room: Room, config: SparsityConfig) -> float | None:
    if isinstance(config.distribution, str):
        return None
    return next((value for glob, value in config.distribution.items() if matches(room.names, (glob,))), None)


def _even(rooms: Sequence[Room], free: Sequence[int], on: int) -> list[float]:
    size = sum(rooms[i].size for i in free)
    return [on / size if size else 0.0] * len(free)


def _erk(rooms: Sequence[Room], on: int) -> list[float]:
    """Densities in proportion to (sum of dims) / (product of dims), none above 1, `on` weights in all. Evci et al.,
    Rigging the Lottery, 2020, section 3.
    """
    shares = [sum(room.dims) / math.prod(room.dims) for room in rooms]
    full: set[int] = set()
    while True:
        rest = [i for i in range(len(rooms)) if i not in full]
        if not rest:
            return [1.0] * len(rooms)
        left = on - sum(rooms[i].size for i in full)
        scale = left / sum(shares[i] * rooms[i].size for i in rest)
        above = {i for i in rest if scale * shares[i] > 1}
        if not above:
            return [1.0 if i in full else scale * shares[i] for i in range(len(rooms))]
        full |= above
