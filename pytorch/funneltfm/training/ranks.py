"""The processes of a run: who am I, and what do we agree on. With one process every answer is trivial."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from funneltfm.errors import InputError, brief

log = logging.getLogger(__name__)

T = TypeVar("T")
MEETING = timedelta(minutes=10)  # to wait for processes that are started by hand, or by SLURM
LAUNCHER = "FUNNELTFM_LAUNCHER"  # environment variable: the process that has started this one and watches it


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if size() > 1 else 0


def is_main() -> bool:
    """Whether this process writes files and talks."""
    return rank() == 0


def local_rank() -> int:
    """Which of this machine's processes this is."""
    return int(os.environ["LOCAL_RANK"]) if size() > 1 else 0


def local_size() -> int:
    """Number of processes on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if size() > 1 else 1


# ---- agreeing; every process must make the same calls in the same order


def broadcast(value: T) -> T:
    """The main process's value."""
    if size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def gather(value: T) -> list[T]:
    """Every process's value, by rank."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values


def mean(value: float) -> float:
    """The mean over the processes."""
    return sum(gather(value)) / size()


def any_rank(flag: bool) -> bool:
    """Whether the flag is set in some process."""
    if size() == 1:
        return flag
    votes = torch.tensor([int(flag)])  # a CPU tensor: no GPU has to wait for it
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())


def fail(error: BaseException) -> NoReturn:
    """Leave with an error that every process has: the main one tells it, the others wait for its end in silence."""
    if is_main():
        raise error
    with contextlib.suppress(RuntimeError):
        any_rank(True)  # returns or fails when the main process is gone
    raise SystemExit(128 + signum if (signum := getattr(error, "signum", 0)) else 1) from None


def main_decides(choose: Callable[[], T]) -> T:
    """What the main process chooses, in all of them."""
    value: Any = None
    failed = True
    if is_main():
        try:
            value, failed = choose(), False
        finally:
            broadcast((value, failed))
    else:
        value, failed = broadcast((value, failed))
        if failed:
            fail(InputError("the main process failed"))
    return value


def main_first(work: Callable[[], T]) -> T:
    """Do the work in the main process, then in the others, which find what it has left (a cache, a file).

    If it fails in the main process the others leave too, silently: the error is told once.
    """
    result: list[T] = []
    main_decides(lambda: result.append(work()))
    return result[0] if is_main() else work()


# ---- how processes find each other


@dataclass(frozen=True)
class Place:
    """Where a launcher has put this process."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int


def find_place(world_size: int, own_rank: int, init_method: str | None) -> Place | None:
    """This process's place, from the environment of torchrun (or Ray), from that of SLURM, or from flags; None where
    nothing has launched it.
    """
    env = os.environ
    if "RANK" in env and env.get("WORLD_SIZE", "1") != "1":
        try:
            rank, size, local_rank, local_size, port = (
                int(env[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
            )
            return Place(rank, size, local_rank, local_size, env["MASTER_ADDR"], port)
        except (KeyError, ValueError) as error:
            raise InputError(
                "the environment has RANK and WORLD_SIZE, but one of them, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR "
                "or MASTER_PORT is missing or no number. Launch with torchrun, or unset RANK."
            ) from error
    from lightning.fabric.plugins.environments import SLURMEnvironment

    if SLURMEnvironment.detect() and int(env.get("SLURM_NTASKS", 1)) > 1:
        # Lightning refuses a job that was started with --ntasks alone.
        tasks = env.setdefault(
            "SLURM_NTASKS_PER_NODE", str(int(env["SLURM_NTASKS"]) // int(env.get("SLURM_NNODES", 1)))
        )
        slurm = SLURMEnvironment(auto_requeue=False)
        return Place(
            slurm.global_rank(), slurm.world_size(), slurm.local_rank(), int(tasks), slurm.main_address, slurm.main_port
        )
    if init_method is not None:  # one process started by hand
        scheme, _, where = init_method.partition("://")
        host, _, host_port = where.rpartition(":")
        if scheme != "tcp" or not host or not host_port.isdigit():
            raise InputError(f"distributed_init_method must look like tcp://HOST:PORT; got {init_method!r}.")
        if not 0 <= own_rank < world_size:
            raise InputError(
                f"distributed_rank must be below distributed_world_size, {world_size}; got {own_rank}. With "
                f"--distributed_init_method every process is started by hand and has its own rank."
            )
        return Place(own_rank, world_size, 0, 1, host, int(host_port))  # alone on its machine, for all we know
    return None


@contextlib.contextmanager
def joined(place: Place | None, backend: str) -> Iterator[None]:
    """Meet the other processes, and leave them at the end. A process whose launcher (torchrun) dies ends too."""
    if place is None or (dist.is_available() and dist.is_initialized()):
        yield
        return
    env = {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.size),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.local_size),
        "GROUP_RANK": str(place.rank // place.local_size),
        "MASTER_ADDR": place.address,
        "MASTER_PORT": str(place.port),
    }
    had = {name: os.environ.get(name) for name in env}
    os.environ.update(env)
    if backend == "nccl":
        backend = "cpu:gloo,cuda:nccl"  # objects and votes travel over gloo and keep no GPU waiting
    if dist.is_torchelastic_launched():
        _end_with(int(os.environ.get(LAUNCHER, os.getppid())))
    # A process may wait for long while the main one encodes a large set; one that is gone is noticed at once.
    store = None if dist.is_torchelastic_launched() else _meet(place)
    dist.init_process_group(backend, None, timedelta(days=1), place.size, place.rank, store)
    try:
        yield
        dist.barrier()  # the store lives in the main process: none leaves before all are done
    except RuntimeError as error:
        if not any(word in str(error) for word in ("peer", "Broken pipe")):
            raise
        if is_main() or not dist.is_torchelastic_launched():  # the other process has said why, or its launcher will
            raise InputError("another process of the run has ended, so this one cannot go on.") from error
        raise SystemExit(1) from None
    finally:
        dist.destroy_process_group()
        for name, value in had.items():
            if value is None:
                del os.environ[name]


def _meet(place: Place) -> dist.Store:
    """Where processes that nobody watches find each other: one that does not come is an error after a while."""
    if place.rank:
        log.info("process %d of %d looks for the first one at %s:%d", place.rank, place.size, place.address, place.port)
    try:
        return dist.TCPStore(place.address, place.port, place.size, place.rank == 0, timeout=MEETING)
    except RuntimeError as error:
        raise InputError(
            f"the {place.size} processes of the run have not met at {place.address}:{place.port} within "
            f"{MEETING.total_seconds():.0f} s (this is rank {place.rank}). Start one for each rank from 0 on, all with "
            f"the same address, at which the first one must be able to listen. ({brief(str(error), 200)})"
        ) from error


def _end_with(parent: int) -> None:
    """End this process when its parent is gone, or was before it looked: no orphans after a kill -9 of the launcher,
    whose store they would wait for.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()
