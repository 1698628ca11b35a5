"""Start the processes of a run on this machine, with torch's own launcher (the engine of torchrun)."""

import logging
import os
import signal
import sys
import uuid
from pathlib import Path

from funneltfm.errors import InputError, Stopped
from funneltfm.training.config import Args

log = logging.getLogger(__name__)


def start(args: Args, model_dir: Path) -> None:
    """Run `funneltfm classify` with these flags in several processes and wait for them.

    A process that fails ends the others within seconds. Raises InputError where one failed; Stopped after a signal.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    n = args.distributed_world_size
    flags = {name: getattr(args, name) for name in args.given} | {
        "model_dir": str(model_dir),
        "distributed_world_size": n,
    }
    words = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it is told below, in one line
    root = str(
        Path(__file__).resolve().parents[2]
    )  # where this package is, for a process that may not have it installed
    env = {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    if "OMP_NUM_THREADS" not in os.environ:  # as many threads in all as one process would have
        env["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // n))
    port = args.distributed_port if "distributed_port" in args.given else 0
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n,
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{port}",
        local_addr="127.0.0.1",
        max_restarts=0,
        run_id=uuid.uuid4().hex,
    )
    had = {name: os.environ.get(name) for name in env}
    os.environ.update(env)
    try:
        elastic_launch(config, sys.executable)("-m", "funneltfm", "classify", *words)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        stopped = {128 + int(s): s for s in (signal.SIGINT, signal.SIGTERM)}
        if code in stopped:
            raise Stopped(stopped[code]) from None
        raise InputError(f"process {rank} of {n} ended with {how}; the others were stopped.") from None
    except SignalException as error:
        raise Stopped(error.sigval, f"Go on with --resume --model_dir={model_dir}") from None
    finally:
        for name, value in had.items():
            if value is None:
                os.environ.pop(name, None)


def start_on_ray(args: Args, model_dir: Path) -> None:
    raise NotImplementedError
