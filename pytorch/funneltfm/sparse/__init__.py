"""Sparse training for any module: masks, RigL, gradual pruning. Knows no task and no loop."""

from funneltfm.sparse.config import SparsityConfig
from funneltfm.sparse.masks import attach, densities, detach, keep_masks, sparse_weights

__all__ = [
    "SparsityConfig",
    "attach",
    "densities",
    "detach",
    "keep_masks",
    "sparse_weights",
]
