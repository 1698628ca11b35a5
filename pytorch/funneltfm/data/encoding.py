"""Examples to token ids, once: the processed cache is keyed by everything that changes it."""

import dataclasses
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from funneltfm.data.readers import DatasetSpec, Example, read_split, source_files
from funneltfm.data.tokenization import Tokenizer
from funneltfm.errors import InputError
from funneltfm.files import atomic_path, file_digest

log = logging.getLogger(__name__)

_FORMAT = 1  # of the cache: raise it when what is stored changes


@dataclass(frozen=True)
class EncodingConfig:
    """How an example becomes ids: `[CLS] a [SEP]` or `[CLS] a [SEP] b [SEP]`, and the segment ids of its parts."""

    max_length: int = 128
    seg_id_a: int = 0
    seg_id_b: int = 1
    seg_id_cls: int = 2

    def __post_init__(self) -> None:
        for name in ("seg_id_a", "seg_id_b", "seg_id_cls"):
            if not 0 <= getattr(self, name) < 2**31:
                raise InputError(f"{name} must be a whole number from 0 to 2^31 - 1; got {getattr(self, name)}.")

    def encode(
        self, ids_a: list[int], ids_b: list[int] | None, cls_id: int, sep_id: int
    ) -> tuple[list[int], list[int]]:
        """Token ids and segment ids of one example, cut to max_length: a pair loses tokens of its longer side first."""
        if ids_b is None:
            ids_a = ids_a[: self.max_length - 2]
        else:
            n_a, n_b = fit_pair(len(ids_a), len(ids_b), self.max_length - 3)
            ids_a, ids_b = ids_a[:n_a], ids_b[:n_b]
        inputs = [cls_id, *ids_a, sep_id]
        seg_id = [self.seg_id_cls] + [self.seg_id_a] * (len(ids_a) + 1)
        if ids_b is not None:
            inputs += [*ids_b, sep_id]
            seg_id += [self.seg_id_b] * (len(ids_b) + 1)
        return inputs, seg_id


def fit_pair(n_a: int, n_b: int, limit: int) -> tuple[int, int]:
    """Shorten the longer of two lengths, the second where they are equal, one by one until both fit `limit` together.

    >>> fit_pair(10, 3, 9), fit_pair(10, 10, 9)
    ((6, 3), (5, 4))
    """
    excess = max(0, n_a + n_b - limit)
    level = min(excess, abs(n_a - n_b))  # tokens that only the longer side loses
    if n_a > n_b:
        n_a -= level
    else:
        n_b -= level
    both = excess - level  # then in turns, the second side first
    return n_a - both // 2, n_b - (both + 1) // 2


@dataclass(frozen=True)
class EncodedSplit:
    """One split as flat arrays: example i has tokens offsets[i] to offsets[i + 1]."""

    inputs: np.ndarray
    """(all tokens,) int32."""
    seg_id: np.ndarray
    """(all tokens,) int32."""
    offsets: np.ndarray
    """(examples + 1,) int64."""
    labels: np.ndarray
    """(examples,) int64 class indices, or float64 numbers; empty where the split has no labels."""
    ids: np.ndarray
    """(examples,) text: each example's own id."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def labelled(self) -> bool:
        return len(self.labels) > 0

    def __getitem__(self, i: int) -> dict[str, Any]:
        span = slice(self.offsets[i], self.offsets[i + 1])
        item = {"index": i, "inputs": self.inputs[span], "seg_id": self.seg_id[span]}
        return item | {"label": self.labels[i]} if self.labelled else item


def encode_examples(
    examples: list[Example], labels: tuple[str, ...] | None, tokenizer: Tokenizer, config: EncodingConfig
) -> EncodedSplit:
    """Tokenize examples. `labels` maps label names to class indices by position; None is regression."""
    ids_a = tokenizer.convert_texts_to_ids([example.text_a for example in examples])
    pairs = [i for i, example in enumerate(examples) if example.text_b is not None]
    ids_b = dict(zip(pairs, tokenizer.convert_texts_to_ids([examples[i].text_b or "" for i in pairs]), strict=True))
    encoded = [
        config.encode(a, ids_b.get(i), tokenizer.cls_id, tokenizer.sep_id) for i, a in enumerate(ids_a)
    ]  # fmt: skip
    lengths = [len(inputs) for inputs, _ in encoded]
    index = None if labels is None else {label: i for i, label in enumerate(labels)}
    given = [example.label for example in examples if example.label is not None]
    return EncodedSplit(
        inputs=np.fromiter((t for inputs, _ in encoded for t in inputs), np.int32, sum(lengths)),
        seg_id=np.fromiter((t for _, seg_id in encoded for t in seg_id), np.int32, sum(lengths)),
        offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        labels=np.array([float(g) for g in given]) if index is None else np.array([index[g] for g in given], np.int64),
        ids=np.array([example.id for example in examples]),
    )


def load_split(
    spec: DatasetSpec,
    data_dir: Path,
    split: str,
    tokenizer: Tokenizer,
    config: EncodingConfig,
    cache_dir: Path,
    overwrite: bool = False,
    bad_rows: str = "error",
) -> EncodedSplit:
    """Read and encode a split, or take it from the cache if data, tokenizer, lengths and labels are the same as
    then.
    """
    key = json.dumps(
        {
            "format": _FORMAT,
            "spec": repr(spec),
            "split": split,
            "bad_rows": bad_rows,
            "files": [file_digest(path) for path in source_files(spec, data_dir, split)],
            "tokenizer": tokenizer.fingerprint,
            "encoding": dataclasses.asdict(config),
        },
        sort_keys=True,
    )
    name = f"{spec.name}.{split}.{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    path = Path(cache_dir) / name
    if path.is_file() and not overwrite:
        try:
            with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as arrays:
                return EncodedSplit(**arrays)
        except Exception as error:  # a damaged zip file makes its reader raise almost anything
            log.warning("the processed file %s is damaged (%s); it is made anew", path, error)
    examples = read_split(spec, data_dir, split, bad_rows=bad_rows)
    labelled = sum(example.label is not None for example in examples)
    if 0 < labelled < len(examples):
        raise InputError(
            f"{spec.name} {split} in {data_dir}: {labelled} of {len(examples)} examples have a label; expected "
            f"all or none."
        )
    encoded = encode_examples(examples, spec.labels, tokenizer, config)
    with atomic_path(path) as temporary:
        np.savez(temporary, **{field.name: getattr(encoded, field.name) for field in dataclasses.fields(encoded)})
    return encoded
