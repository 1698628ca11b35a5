"""The keys of an LSG model's config: what they mean, their defaults, and which of them go together."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from funneltfm.errors import InputError

SPARSITY_TYPES = ("none", "norm", "pooling", "lsh", "stride", "block_stride", "bos_pooling")
NUM_GLOBAL_ROWS = 512  # rows of the table of global tokens, however many of them are used


@dataclass(frozen=True, kw_only=True)
class LSGSettings:
    """LSG attention"""

    block_size: int = 128
    """Tokens in a block; a token sees its own block and the two beside it."""
    sparse_block_size: int = 128
    """Summaries of farther tokens that a token sees on either side of its blocks; 0 for none."""
    sparsity_factor: int = 2
    """Tokens per summary; 0 for no summaries, 1 for plain tokens. Divides block_size."""
    sparsity_type: str = "norm"
    """How tokens are summarised, in each head: none, norm (those with the longest keys), pooling (means), lsh (means of
    hashed buckets), stride, block_stride (every f-th token or run, from another start in each head), bos_pooling
    (means weighted by the first token's attention)."""
    num_global_tokens: int = 1
    """Learned tokens in front of the text, 1 to 512, which see all and are seen by all."""
    mask_first_token: bool = False
    """Hide the first token, of which the first global token is a copy. Implies pool_with_global."""
    pool_with_global: bool = True
    """Give the first token's row the output of the first global token."""
    pass_global_tokens_to_decoder: bool = True
    """Encoder-decoders: whether the decoder sees the global tokens too."""
    adaptive: bool = True
    """Take inputs of any length; otherwise long ones must be multiples of block_size."""
    lsh_num_pre_rounds: int = 1
    """lsh: rounds of hashing before the one that makes the summaries."""
    exact_short: bool = False
    """Inputs of at most two blocks go through the base model as it was: full attention, no global tokens."""
    lsh_seed: int | None = None
    """lsh: draw the hashes from this seed in evaluation, so that results repeat. Default: anew in every call."""

    def __post_init__(self) -> None:
        kinds = {"bool": (bool,), "int": (int,), "int | None": (int, type(None)), "str": (str,)}
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), getattr(field.type, "__name__", str(field.type))
            if not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind != "bool"):
                raise InputError(f"{field.name} must be {_SAID[kind]}, got {value!r}. Correct the LSG config.")
        self._check("sparsity_type", self.sparsity_type in SPARSITY_TYPES, f"one of {', '.join(SPARSITY_TYPES)}")
        self._check("block_size", self.block_size >= 1, "at least 1")
        self._check("num_global_tokens", 1 <= self.num_global_tokens <= NUM_GLOBAL_ROWS, f"1 to {NUM_GLOBAL_ROWS}")
        for name in ("sparse_block_size", "sparsity_factor", "lsh_num_pre_rounds"):
            self._check(name, getattr(self, name) >= 0, "at least 0")
        fits = self.lsh_seed is None or 0 <= self.lsh_seed < 2**62
        self._check("lsh_seed", fits, "null or 0 to 2**62 - 1")
        if not self.has_sparse:
            return
        factor, size = self.sparsity_factor, self.block_size
        self._check("sparsity_factor", size % factor == 0, f"a divisor of block_size {size}")
        if self.selection in ("norm", "lsh"):
            chunk = self.chunk
            fits = size % chunk == 0 and chunk % factor == 0
            want = f"at least block_size {size}, or a divisor of it that sparsity_factor {factor} divides"
            self._check("sparse_block_size", fits, f"{want} (for {self.sparsity_type})")
        if self.selection == "lsh":
            want = f"at most half of min(block_size, sparse_block_size) = {self.chunk} for lsh, or sparse_block_size"
            self._check("sparsity_factor", self.chunk // factor >= 2, want)

    def _check(self, name: str, fits: bool, want: str) -> None:
        if not fits:
            raise InputError(f"{name} must be {want}, got {getattr(self, name)!r}. Correct the LSG config.")

    @classmethod
    def of(cls, config: Any) -> "LSGSettings":
        """The settings in a model's config; keys that are absent have the original's defaults."""
        values = {name: getattr(config, name) for name in LSG_KEYS if hasattr(config, name)}
        if values.get("sparsity_type", "none") is None:
            values["sparsity_type"] = "none"
        return cls(**values)

    @property
    def has_sparse(self) -> bool:
        return self.sparsity_type != "none" and self.sparse_block_size > 0 and self.sparsity_factor > 0

    @property
    def selection(self) -> str:
        """The selection in use: plain tokens where one token makes a summary; lsh with a single bucket per chunk is
        bos_pooling, as in the original.
        """
        if not self.has_sparse:
            return "none"
        if self.sparsity_factor == 1:
            return "identity"
        if self.sparsity_type == "lsh" and self.sparsity_factor == self.sparse_block_size:
            return "bos_pooling"
        return self.sparsity_type

    @property
    def chunk(self) -> int:
        """Tokens among which norm and lsh choose."""
        return min(self.block_size, self.sparse_block_size)

    @property
    def pools(self) -> bool:
        return self.pool_with_global or self.mask_first_token

    def globals_in(self, length: int) -> int:
        """How many of a sequence's `length` rows are global tokens. Those of a short one in the exact mode: none."""
        return 0 if self.exact_short and length <= 2 * self.block_size else self.num_global_tokens


_SAID = {"bool": "true or false", "int": "a whole number", "int | None": "a whole number or null", "str": "text"}
LSG_KEYS = tuple(field.name for field in dataclasses.fields(LSGSettings))
