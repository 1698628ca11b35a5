"""Files that are written whole or not at all."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from funneltfm.errors import InputError, brief


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it becomes `path`, else it is removed.

    The suffix is kept, since writers of pictures and arrays choose their format by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None:  # a full disk does not say whose
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_target(folder: str | os.PathLike[str], overwrite: bool) -> None:
    """Raises InputError where a new folder would take the place of something."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]) and not overwrite:
        raise InputError(f"{folder} exists and is not empty. Name another folder, or give --overwrite.")


@contextlib.contextmanager
def atomic_folder(folder: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield the path of a folder to be made beside `folder`; when the block ends well it becomes `folder`, else it is
    removed. Raises InputError as `check_target`.
    """
    folder = Path(folder)
    check_target(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        fresh = Path(scratch, "new")
        yield fresh
        if folder.exists():
            os.replace(folder, Path(scratch, "old"))
        os.replace(fresh, folder)


def torch_save(value: Any, path: str | os.PathLike[str]) -> None:
    """torch.save with errors that name their reason; its own, of a full disk, says "unexpected pos"."""
    import torch  # reading files needs no torch

    try:
        with open(path, "wb") as handle:
            torch.save(value, handle)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str], what: str) -> Any:
    """The content of a JSON file; an InputError that says `what` it should be where it cannot be read."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=each_key_once)
        json.dumps(value, ensure_ascii=False).encode()  # "\\ud800", half a character, is JSON but no text
        return value
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {what} {path}: {brief(str(error), 400)}.") from error


def each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; json.loads alone would keep the last of two values and say nothing."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"a key is there twice among {[key for key, _ in pairs]}")
    return values


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def existing_file(path: str | os.PathLike[str], what: str) -> Path:
    """`path` if it is a file; else an InputError that says `what` was looked for."""
    path = Path(path)
    try:
        is_file, found = path.is_file(), "it is a folder" if path.is_dir() else "there is no such file"
    except OSError as error:  # a name that is too long
        raise InputError(f"cannot read {what} {brief(str(path), 300)}: {error.strerror}. Check the path.") from error
    if not is_file:
        raise InputError(f"cannot read {what} {path}: {found}. Check the path.")
    return path
