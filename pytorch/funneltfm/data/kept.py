"""Features on the disk: written once, whole or not at all, checked and mapped into memory by every later run.

    FOLDER/NAME-KEY/    meta.json    FIELD.npy and, of lists, FIELD.offsets.npy

meta.json holds the key in full, the arrays of the folder with a checksum of each, the digest of all, and a note.
"""

import contextlib
import hashlib
import json
import logging
import os
import secrets
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from funneltfm.data.features import OFFSETS, Example, Features, joint_digest
from funneltfm.errors import InputError, brief
from funneltfm.files import read_json, write_json

log = logging.getLogger(__name__)

_FORMAT = 4  # raise it when what is stored changes
_AT_ONCE = 4096  # examples that are turned into arrays together
_HEADER = 128  # bytes before the numbers of an .npy file of one dimension


class Damaged(Exception):
    """A folder does not hold what was written into it, or something else."""


def kept(
    folder: Path,
    name: str,
    key: dict[str, Any],
    make: Callable[[], Iterable[Example]],
    note: Callable[[], dict[str, Any]] = dict,
) -> "Kept":
    """Features of what `make` gives; of a folder in `folder`, where an earlier call with the same key has left them.

    key: JSON, everything that decides what `make` gives. note: JSON to keep beside them, asked for when all are made.
    Of several writers at once each makes its own, and the first that ends puts its folder in place; all read that. What
    is damaged or foreign is made anew, with a warning.
    """
    whole_key = json.loads(json.dumps({"format": _FORMAT, **key}))
    digest = hashlib.sha256(json.dumps(whole_key, sort_keys=True).encode()).hexdigest()[:16]
    if Path(folder).exists() and not Path(folder).is_dir():
        raise InputError(f"--tokenized_dir={folder} must be a folder, or nothing yet; it is a file.")
    path = Path(folder) / f"{name}-{digest}"
    if path.exists():
        try:
            features = _read(path, whole_key)
            log.info("%s: %d examples are tokenised already, in %s", name, len(features), path)
            return features
        except Damaged as error:
            log.warning("%s is not what was written there (%s); it is made anew", path, error)
    start = time.perf_counter()
    features = _made(path, whole_key, make(), note)
    seconds = time.perf_counter() - start
    log.info("%s: %d examples, tokenised in %.0f s, are kept in %s", name, len(features), seconds, path)
    return features


def _made(path: Path, key: dict[str, Any], examples: Iterable[Example], note: Callable[[], dict[str, Any]]) -> "Kept":
    new = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    new.mkdir(parents=True)
    try:
        _write(new, key, examples, note)
        while True:
            try:
                os.rename(new, path)  # onto a folder that is not empty this fails
                break
            except OSError:
                if not path.exists():
                    raise
            try:
                return _read(path, key)  # another writer was first
            except Damaged:
                _remove(path)
        return _read(path, key)
    except Damaged as error:
        raise InputError(f"{path} cannot be read back: {error}. Is the disk sound?") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _remove(path: Path) -> None:
    """Out of the way in one step, so that nobody finds a half of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.old")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside) if aside.is_dir() else aside.unlink()


# ---- files


class _Array:
    """An .npy file of one dimension that grows."""

    def __init__(self, path: Path, dtype: np.dtype):
        self.dtype, self.size, self.crc, self.sha = dtype, 0, 0, hashlib.sha256()
        self.file: BinaryIO = open(path, "wb")  # noqa: SIM115  _write closes it
        self.file.write(bytes(_HEADER))

    def append(self, values: np.ndarray) -> None:
        assert values.dtype == self.dtype, "a field has one type in all examples"
        data = np.ascontiguousarray(values, self.dtype).data
        self.crc = zlib.crc32(data, self.crc)
        self.sha.update(data)
        self.size += len(data)
        self.file.write(data)

    def finish(self) -> list[Any]:
        """Write the header; what `_mapped` checks."""
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.size,)}
        self.file.seek(0)
        np.lib.format.write_array_header_1_0(self.file, header)
        assert self.file.tell() == _HEADER
        return [self.dtype.str, self.size, self.crc]


def _write(folder: Path, key: dict[str, Any], examples: Iterable[Example], note: Callable[[], dict[str, Any]]) -> None:
    arrays: dict[str, _Array] = {}
    size = 0
    with contextlib.ExitStack() as files:

        def append(name: str, values: np.ndarray) -> None:
            if name not in arrays:
                arrays[name] = _Array(folder / f"{name}.npy", values.dtype)
                files.callback(arrays[name].file.close)
            arrays[name].append(values)

        for some in _groups(examples):
            features = Features.of(some)
            size += len(features)
            for name, (values, offsets) in features.ragged.items():
                end = arrays[name].size if name in arrays else 0
                append(name, values)
                append(name + OFFSETS, offsets[1 if end else 0 :] + end)
            for name, values in features.plain.items():
                append(name, values)
        checks = {name: array.finish() for name, array in arrays.items()}
    digest = joint_digest({name: array.sha.hexdigest() for name, array in arrays.items()})
    meta = {"key": key, "size": size, "digest": digest, "arrays": checks, "note": note()}
    write_json(folder / "meta.json", meta)


def _groups(examples: Iterable[Example]) -> Iterator[list[Example]]:
    source = iter(examples)
    while group := list(islice(source, _AT_ONCE)):
        yield group


def _read(path: Path, key: dict[str, Any], check: bool = True) -> "Kept":
    try:
        meta = read_json(path / "meta.json", "what is known of the arrays")
        if meta["key"] != key:
            raise Damaged("it was made of something else")
        arrays = {name: _mapped(path / f"{name}.npy", *wanted, check=check) for name, wanted in meta["arrays"].items()}
        size, digest, note = int(meta["size"]), str(meta["digest"]), dict(meta["note"])
    except (InputError, OSError, EOFError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise Damaged(brief(f"{type(error).__name__}: {error}", 200)) from error
    lists = {name.removesuffix(OFFSETS) for name in arrays if name.endswith(OFFSETS)}
    ragged = {name: (arrays[name], arrays[name + OFFSETS]) for name in lists}
    plain = {name: array for name, array in arrays.items() if name.removesuffix(OFFSETS) not in lists}
    return Kept(path, digest, ragged, plain, size, note)


def _mapped(path: Path, dtype: str, size: int, crc: int, *, check: bool) -> np.ndarray:
    array = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)  # slices of a memmap are slow
    if array.dtype.str != dtype or array.shape != (size,):
        raise ValueError(f"{path.name} has another type or size")
    if check and zlib.crc32(array.data) != crc:
        raise ValueError(f"{path.name} has another checksum")
    return array


class Kept(Features):
    """Examples on the disk, and what was noted beside them. To another process they go as the name of their folder, not
    as all their numbers.
    """

    def __init__(
        self,
        path: Path,
        digest: str,
        ragged: dict[str, tuple[np.ndarray, np.ndarray]],
        plain: dict[str, np.ndarray],
        size: int,
        note: dict[str, Any],
    ):
        super().__init__(ragged, plain, size)
        self.path, self.note = path, note
        self._digest = digest

    def digest(self) -> str:
        """As it was when they were written: nothing is read."""
        return self._digest

    def __reduce__(self) -> Any:
        return _read, (self.path, read_json(self.path / "meta.json", "what is known of the arrays")["key"], False)
