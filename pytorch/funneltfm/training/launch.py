"""Start the processes of a run: on this machine with torch's own launcher (the engine of torchrun), or on Ray."""

import logging
import os
import signal
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from funneltfm.errors import Diverged, InputError, Stopped
from funneltfm.training.config import Args
from funneltfm.training.ranks import LAUNCHER

# Where this package is, for processes that may not have it installed.
_ROOT = str(Path(__file__).resolve().parents[2])
# What the launcher passes on to the processes.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


def classify_flags(args: Args, model_dir: Path) -> dict[str, Any]:
    """What the processes are told: what was set on purpose, the run's folder, and how many they are."""
    given = {name: getattr(args, name) for name in args.given}
    return given | {"model_dir": str(model_dir), "distributed_world_size": args.distributed_world_size}


def python_path() -> str:
    """PYTHONPATH of a new process."""
    return os.pathsep.join(filter(None, (_ROOT, os.environ.get("PYTHONPATH"))))


def classify_words(args: Args, model_dir: Path) -> list[str]:
    """The command line of each process of `funneltfm classify`."""
    return [
        "classify",
        *(f"--{name}={value}" for name, value in classify_flags(args, model_dir).items() if value is not None),
    ]


def start_here(words: list[str], n: int, port: int = 0) -> None:
    """Run `funneltfm WORDS` in n processes of this machine, which meet at `port` (0: a free one), and wait for them.

    A process that fails ends the others within seconds. Raises InputError where one failed; Stopped after a signal.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it is told below, in one line
    # Two minutes for saving, when a signal asks to stop.
    env = {"PYTHONPATH": python_path(), LAUNCHER: str(os.getpid()), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120"}
    if "OMP_NUM_THREADS" not in os.environ:  # as many threads in all as one process would have
        env["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // n))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n,
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{port}",
        local_addr="127.0.0.1",
        max_restarts=0,
        run_id=uuid.uuid4().hex,
        signals_to_handle=",".join(signum.name for signum in _SIGNALS),
    )
    had = {name: os.environ.get(name) for name in (*env, "TORCHELASTIC_SIGNALS_TO_HANDLE")}
    handlers = {signum: signal.getsignal(signum) for signum in _SIGNALS}
    os.environ.update(env)
    try:
        elastic_launch(config, sys.executable)("-m", "funneltfm", *words)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        if (signum := abs(code) - 128 * (code > 0)) in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            raise Stopped(signum) from None  # the main process has told what was saved
        if code == Diverged.exit_code:
            raise Diverged("the training loss is no number any more; process 0 has told where.") from None
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise InputError(f"process {rank} of {n} ended with {how}; the others were stopped.") from None
    except SignalException as error:
        raise Stopped(error.sigval) from None
    finally:
        if threading.current_thread() is threading.main_thread():  # torch leaves its own handlers behind
            for known, handler in handlers.items():
                if handler is not None:
                    signal.signal(known, handler)
        for name, value in had.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def start_on_ray(
    work: Callable[[dict[str, Any]], None],
    flags: dict[str, Any],
    processes: int,
    storage: Path,
    use_gpu: bool,
    name: str = "ray",
) -> None:
    """Do `work(flags)` in several processes of a Ray cluster, through Ray Train: the one that RAY_ADDRESS names, or one
    that is made on this machine. All its machines must see the data and the run's folder under the same paths.

    storage: folder in which Ray keeps its own files, under `name`. use_gpu: a GPU for each process, where there are.
    """
    try:
        import ray
        from ray.train import RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        raise InputError(f"--launcher=ray needs Ray ({error}): pip install 'funneltfm[ray]'.") from error

    if not ray.is_initialized():
        # Without an address Ray would also look for a cluster that somebody has left on this machine.
        ray.init(
            os.environ.get("RAY_ADDRESS", "local"),
            runtime_env={"env_vars": {"PYTHONPATH": python_path()}},
            log_to_driver=True,
        )
    use_gpu = use_gpu and ray.cluster_resources().get("GPU", 0) > 0
    trainer = TorchTrainer(
        _on_ray,
        train_loop_config={"work": work, "flags": flags},
        scaling_config=ScalingConfig(num_workers=processes, use_gpu=use_gpu),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo"),
        run_config=RunConfig(name=name, storage_path=str(storage)),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise InputError(f"the run on Ray failed: {error}") from error


def _on_ray(config: dict[str, Any]) -> None:
    """What each process on Ray does."""
    logger = logging.getLogger("funneltfm")
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False  # Ray has a handler at the root, which would say everything twice
    config["work"](config["flags"])
