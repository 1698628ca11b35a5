"""What a run says: to the terminal, to its log file, and by which of its processes."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

from funneltfm.training import ranks


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out what Lightning says that is of no use here: advice on workers, and a deprecation in its own code."""
    with warnings.catch_warnings():
        for message in (
            ".*have no `val_dataloader`.*",
            "Your `IterableDataset` has `__len__` defined.*",
            "SWA is currently only supported every epoch.*",
            ".*LeafSpec.*",
            ".*does not have many workers.*",
            "Checkpoint directory .* exists",
            ".*sync_dist=True.*",
            "The number of training batches .* is smaller than the logging interval.*",
        ):
            warnings.filterwarnings("ignore", message=message)
        yield


@contextlib.contextmanager
def log_ranks(everyone: bool) -> Iterator[None]:
    """The main process logs; the others where that was asked for, with their rank in front."""
    logger = logging.getLogger("funneltfm")
    rank = ranks.rank()

    def sieve(record: logging.LogRecord) -> bool:
        record.msg = f"[rank {rank}] {record.msg}" if rank else record.msg
        return everyone or rank == 0

    handlers = list(logger.handlers) if ranks.size() > 1 else []
    for handler in handlers:
        handler.addFilter(sieve)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(sieve)


class _LogFile(logging.FileHandler):
    """A full disk is an error, not a note on the terminal."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise  # called while the error is handled


@contextlib.contextmanager
def log_file(path: Path | None, append: bool) -> Iterator[None]:
    """Everything that is logged also goes into a file; None is no file."""
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _LogFile(path, mode="a" if append else "w", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("funneltfm")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        with contextlib.suppress(OSError):  # what could not be written was told already
            handler.close()
