"""What defines a Funnel-Transformer: one frozen dataclass, saved beside every checkpoint."""

import dataclasses
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from funneltfm.errors import InputError, brief
from funneltfm.files import read_json, write_json

AttnType = Literal["rel_shift", "factorized"]
PoolingType = Literal["mean", "max", "min"]
Activation = Literal["gelu", "relu"]
FuncMask = Literal["separate_cls", "always"]

# Paper, table 1 and appendix: d_model by name; heads of 64, d_inner = 4 d_model.
WIDTHS: dict[str, dict[str, int]] = {
    f"H{d_model}": {
        "d_embed": d_model,
        "d_model": d_model,
        "n_head": d_model // 64,
        "d_head": 64,
        "d_inner": 4 * d_model,
    }
    for d_model in (768, 1024)
}
PUBLISHED_SIZES = ("B4-4-4H768", "B6-3x2-3x2H768", "B6-6-6H768", "B8-8-8H1024", "B10-10-10H1024")

# Keys of the TensorFlow code: its name for ours, and what only says how its training was initialised.
_ALIASES = {"rel_attn_type": "attn_type"}
_IGNORED_KEYS = {"init", "init_range", "init_std"}

_HIGHEST = 2**31 - 1  # of a whole number: ids and sizes are 32-bit in the files around a model
_MOST_LAYERS = 1000  # so that a slip of the finger is an error, not hours of making layers


def model_size(name: str) -> dict[str, Any]:
    """The config keys that a size name stands for: `H768` (widths only) or `B6-3x2-3x2H768` (blocks too).

    >>> model_size("B6-3x2-3x2H768")["block_size"]
    '6_3x2_3x2'
    """
    match = re.fullmatch(r"(?:B(?P<blocks>[1-9]\d*(?:x[1-9]\d*)?(?:-[1-9]\d*(?:x[1-9]\d*)?)*))?(?P<width>H\d+)", name)
    if match is None or match["width"] not in WIDTHS:
        raise InputError(
            f"model_size must be one of {', '.join(WIDTHS)}, alone or after blocks as in "
            f"{', '.join(PUBLISHED_SIZES)}; got {name!r}."
        )
    keys: dict[str, Any] = dict(WIDTHS[match["width"]])
    if match["blocks"]:
        keys["block_size"] = match["blocks"].replace("-", "_")
    return keys


def parse_blocks(block_size: str, key: str = "block_size") -> tuple[tuple[int, int], ...]:
    """`"6_3x2"` -> `((6, 1), (3, 2))`: a block of 6 layers, then one of 3 layers each applied twice in a row.

    `"0"` and `""` are no blocks at all (a model without a decoder).
    """
    if block_size in ("", "0"):
        return ()
    blocks = []
    for part in str(block_size).split("_"):
        match = re.fullmatch(r"([1-9][0-9]{0,8})(?:x([1-9][0-9]{0,8}))?", part)
        if match is None:
            raise InputError(
                f"{key} must be numbers of layers joined by '_', each with repeats if wanted, "
                f"as in '4_4_4' or '6_3x2_3x2'; got {brief(repr(block_size))}."
            )
        blocks.append((int(match[1]), int(match[2] or 1)))
    return tuple(blocks)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that defines the function a FunnelTFM computes.

    Files of the original (`net_config.pytorch.json`) and of its TensorFlow code (`net_config.json`) load unchanged.
    """

    vocab_size: int = 30522
    """Number of rows of the embedding table."""
    d_embed: int = 768
    """Width of the word embedding; a projection follows where it differs from d_model."""
    d_model: int = 768
    """Width of the hidden states (D); even, because positions are pairs of sine and cosine."""
    n_head: int = 12
    """Number of attention heads (N)."""
    d_head: int = 64
    """Width of one head (H)."""
    d_inner: int = 3072
    """Width of the feed-forward layer."""
    dropout: float = 0.1
    """Dropout on hidden states and on positions."""
    dropatt: float = 0.1
    """Dropout on attention probabilities."""
    dropact: float = 0.0
    """Dropout on the activations inside the feed-forward layer."""
    block_size: str = "4_4_4"
    """Layers of each block; '6_3x2_3x2' applies each layer of blocks 2 and 3 twice."""
    pooling_type: PoolingType = "mean"
    """How a window of hidden states becomes one."""
    pooling_size: int = 2
    """Width and stride of the pooling window."""
    pool_q_only: bool = False
    """Pool the query alone at the first layer of a block; keys and values stay long there."""
    separate_cls: bool = False
    """Keep the first token ([CLS]) out of pooling, and its position and segment out of attention."""
    attn_type: AttnType = "rel_shift"
    """How the relative position term is computed; both give the same numbers."""
    func_mask: FuncMask = "separate_cls"
    """When the position and segment terms of the first token are zero: with separate_cls, or always, as in the
    TensorFlow
    code. Only models of that code that were trained without separate_cls need 'always'."""
    truncate_seq: bool = False
    """With separate_cls: drop pooling_size - 1 tokens at the end before pooling, so that lengths stay even."""
    ff_activation: Activation = "gelu"
    """Activation of the feed-forward layers (gelu by its tanh formula)."""
    decoder_size: str = "0"
    """Layers of the decoder, as in block_size ('2', '1x2'); '0' is none."""
    num_class: int = 2
    """Outputs of the classification head; 1 is regression."""
    seg_id_cls: int = 2
    """Segment id of [CLS]; it counts as the same segment as every other."""
    pad_id: int = 0
    """Token id of padding, used where no input_mask is given."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field.name, field.type, getattr(self, field.name)))
        if self.d_model % 2:
            raise InputError(f"d_model must be even, since positions are pairs of sine and cosine; got {self.d_model}.")
        if not self.blocks:
            raise InputError(f"block_size must name at least one block, as in '4_4_4'; got {self.block_size!r}.")
        if len(decoder := parse_blocks(self.decoder_size, "decoder_size")) > 1:
            got = brief(repr(self.decoder_size))
            raise InputError(f"decoder_size must be one block, as in '2' or '1x2', or '0'; got {got}.")
        if (layers := sum(n * repeats for n, repeats in (*self.blocks, *decoder))) > _MOST_LAYERS:
            raise InputError(
                f"block_size and decoder_size must apply at most {_MOST_LAYERS} layers, repeats counted; they apply "
                f"{layers}."
            )
        if self.pad_id >= self.vocab_size:
            raise InputError(f"pad_id must be an id of the vocabulary, below {self.vocab_size}; got {self.pad_id}.")
        if self.pooling_size < 2:
            raise InputError(f"pooling_size must be at least 2; got {self.pooling_size}.")
        if self.pooling_size ** (len(self.blocks) - 1) > _HIGHEST:
            raise InputError(
                f"block_size has {len(self.blocks)} blocks, so that one state would stand for {self.pooling_size}^"
                f"{len(self.blocks) - 1} tokens (pooling_size {self.pooling_size}); give fewer blocks."
            )

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """(layers with parameters, times each is applied) of every encoder block."""
        return parse_blocks(self.block_size)

    @property
    def decoder(self) -> tuple[int, int]:
        """(layers with parameters, times each is applied) of the decoder; (0, 1) where there is none."""
        return (parse_blocks(self.decoder_size) or ((0, 1),))[0]

    @classmethod
    def init_from_json(cls, path: str | os.PathLike[str], args: Any = None) -> "ModelConfig":
        """Read a config file of ours, of the original, or of its TensorFlow code.

        path: the JSON file. Its keys win over `args`.
        args: any object with config keys as attributes, or None. It gives the keys that the file lacks, and those named
            in `args.overwrite_keys` (names separated by commas or spaces).
        Raises InputError for a file that is no such JSON, an unknown key, or a value out of range.
        """
        path = Path(path)
        saved = read_json(path, "the model config")
        if not isinstance(saved, dict):
            raise InputError(
                f"the model config {path} must be a JSON object of keys and values, got {type(saved).__name__}."
            )
        if twice := sorted(key for key, ours in _ALIASES.items() if key in saved and ours in saved):
            raise InputError(f"the model config {path} has both {twice[0]} and {_ALIASES[twice[0]]}; keep one.")
        saved = {_ALIASES.get(key, key): value for key, value in saved.items() if key not in _IGNORED_KEYS}
        names = cls.names()
        if unknown := sorted(set(saved) - set(names)):
            raise InputError(
                f"unknown key {brief(', '.join(unknown))} in the model config {path}; the keys are {', '.join(names)}."
            )

        overwrite = [key for key in re.split(r"[,\s]+", getattr(args, "overwrite_keys", None) or "") if key]
        if unknown := sorted(set(overwrite) - set(names)):
            raise InputError(
                f"overwrite_keys names {', '.join(unknown)}, which is no key of the model; the keys are "
                f"{', '.join(names)}."
            )
        given = cls._keys_of(args)
        if missing := sorted(set(overwrite) - set(given)):
            raise InputError(f"overwrite_keys names {', '.join(missing)}, but args does not hold it.")
        keys = given | saved | {key: given[key] for key in overwrite}
        try:
            return cls(**keys)
        except InputError as error:
            raise InputError(f"in the model config {path}: {error}") from error

    @classmethod
    def init_from_args(cls, args: Any) -> "ModelConfig":
        """Take every config key that `args` has as an attribute; `args.model_size`, where set, gives the widths
        (and blocks).
        """
        return cls(**cls._keys_of(args))

    @classmethod
    def _keys_of(cls, args: Any) -> dict[str, Any]:
        keys = {name: getattr(args, name) for name in cls.names() if hasattr(args, name)}
        size = getattr(args, "model_size", None)
        return keys | model_size(size) if size else keys

    @classmethod
    def from_size(cls, name: str, **keys: Any) -> "ModelConfig":
        """A published size by name, as it was published: separate_cls, pool_q_only and truncate_seq on, mean
        pooling.
        """
        published = {"separate_cls": True, "pool_q_only": True, "truncate_seq": True}
        return cls(**(published | model_size(name) | keys))

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The config keys, in order."""
        return tuple(field.name for field in dataclasses.fields(cls))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the config as JSON: complete or not at all."""
        write_json(path, self.to_dict())


def _checked(name: str, kind: Any, value: Any) -> Any:
    """`value` if it fits the field's type and range; a number for a block size becomes text."""
    got = brief(repr(value))
    if choices := get_args(kind):
        if value not in choices:
            raise InputError(f"{name} must be one of {', '.join(choices)}; got {got}.")
    elif kind is str:
        if type(value) is int and value <= _HIGHEST:  # "decoder_size": 2 is common in hand-written files
            value = str(value)
        if not isinstance(value, str):
            raise InputError(f"{name} must be text; got {got}.")
    elif kind is bool:
        if not isinstance(value, bool):
            raise InputError(f"{name} must be true or false; got {got}.")
    elif kind is float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise InputError(f"{name} must be a probability, at least 0 and below 1; got {got}.")
        value = float(value)
    else:
        lowest = 0 if name in ("seg_id_cls", "pad_id") else 1
        if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= _HIGHEST:
            raise InputError(f"{name} must be a whole number, at least {lowest} and below 2^31; got {got}.")
    return value


def without_truncation(config: ModelConfig) -> ModelConfig:
    """The config that pools what is padded to its canonical length as `config` pools what is padded to its own: all
    that truncation drops there is padding, which need not be made. Results are the same, of up to 2 tokens less.

    11 tokens: truncated 15 -> [0] [1 2] ... [11 12] [13] -> [0] [1 2] [3 4] [5 6], else 13 -> 7 -> the same 4.
    """
    return dataclasses.replace(config, truncate_seq=False)


def canonical_length(n: int, config: ModelConfig) -> int:
    """The shortest padded length at which a sequence of `n` tokens has its final hidden states.

    Pooling mixes the last real token with its neighbour, which may be padding, or missing. Padded to this length
    every window that holds a real token is complete, at every block, so more padding changes nothing: a sentence gets
    the same result alone and in any batch. For 3 blocks and pooling_size 2 with separate_cls: the next 4k+1, or with
    truncate_seq the next 4k+3 that is at least n+2; without separate_cls the next 4k.
    """
    if n < 1:
        raise InputError(f"a sequence has at least one token; got n = {n}.")
    size = config.pooling_size
    n_pool = len(config.blocks) - 1
    if not config.separate_cls:
        return size**n_pool * math.ceil(n / size**n_pool)
    k = math.ceil((n - 1) / size**n_pool)  # windows beside [CLS] that hold a real token after the last pooling
    length = k + 1
    if not config.truncate_seq:
        return size**n_pool * k + 1
    for level in range(n_pool - 1, -1, -1):  # from the last pooling to the first: at least this long going in
        complete = size ** (n_pool - level) * k + 1 + (size - 1)  # the windows, [CLS], and what truncation drops
        length = max(complete, size * (length - 1) + 1)  # a length L is pooled to ceil(L / size)
    return length
