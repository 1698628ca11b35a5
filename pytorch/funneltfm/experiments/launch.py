"""Run experiments in one process, or in the processes that torchrun or SLURM has started, on one machine or several.

Of several processes the first decides what is run, and does what comes between; each of the others starts the same
command as the first, so that all take part in every run. They meet at the address that the launcher gives.
"""

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from funneltfm.experiments.registry import Experiments
from funneltfm.experiments.runner import Runner, Settings, command, passing_signals, run_here

if TYPE_CHECKING:
    from torch.distributed import Store

    from funneltfm.training.ranks import Place

_GRACE = 120  # seconds that a process has to end by itself after another one has failed
_AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"


def run(experiments: Experiments, settings: Settings, names: Sequence[str]) -> None:
    """Run experiments. In processes that were launched all call this."""
    place = None
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 or int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        from funneltfm.training.ranks import find_place  # torch, only now

        place = find_place(1, 0, None)
    if place is None or settings.dry_run:
        if place is None or place.rank == 0:
            Runner(experiments, settings, run_here).run(names)
        return
    team = Team(place)
    if place.rank > 0:
        team.follow()
        return
    try:
        Runner(experiments, settings, team.lead).run(names)
    finally:
        team.dismiss()


class Team:
    """The processes of a launcher, which run one command after another together."""

    def __init__(self, place: "Place"):
        from torch.distributed import PrefixStore, TCPStore

        hosted = os.environ.get(_AGENT_STORE) == "True"  # torchrun keeps one at this address itself
        whole = TCPStore(
            place.address,
            place.port,
            is_master=place.rank == 0 and not hosted,
            wait_for_workers=False,
            timeout=timedelta(minutes=10),
        )
        self.store: Store = PrefixStore("funneltfm.experiments", whole)
        self.place, self.number = place, 0

    def lead(self, words: Sequence[str], keep: Sequence[int] = ()) -> int:
        """Run `funneltfm WORDS` in all processes; the first exit code that is not 0, or 0."""
        self.number += 1
        task = {"words": list(words), "port": _free_port()}
        self.store.set(f"task {self.number}", json.dumps(task))
        code = self._work(task, keep)
        codes = [code, *(int(self._get(f"code {self.number} {rank}")) for rank in range(1, self.place.size))]
        return next((one for one in codes if one), 0)

    def follow(self) -> None:
        """Run what the first process says, until it says that there is no more."""
        while True:
            self.number += 1
            task = json.loads(self._get(f"task {self.number}"))
            if task is None:
                self.store.set(f"bye {self.place.rank}", "")
                return
            self._work(task)

    def dismiss(self) -> None:
        """Tell the others that there is no more, and wait until they have heard it: the store may be kept here."""
        self.store.set(f"task {self.number + 1}", json.dumps(None))
        deadline = time.monotonic() + 30
        others = [f"bye {rank}" for rank in range(1, self.place.size)]
        with contextlib.suppress(RuntimeError):  # one that is gone
            while time.monotonic() < deadline and not self.store.check(others):
                time.sleep(0.1)

    def _work(self, task: dict, keep: Sequence[int] = ()) -> int:
        """This process's part of a task. Another one that fails ends this one too."""
        argv, env = command(task["words"])
        env |= {"MASTER_PORT": str(task["port"]), _AGENT_STORE: "False"}  # a place of its own for every run
        failed, deadline = f"failed {self.number}", float("inf")
        try:
            with passing_signals() as children:
                process = subprocess.Popen(
                    argv, env=env, pass_fds=tuple(keep), stdin=subprocess.DEVNULL, process_group=0
                )
                children.append(process)
                while (code := process.poll()) is None:
                    time.sleep(0.2)
                    if deadline == float("inf") and self.store.check([failed]):
                        deadline = time.monotonic() + _GRACE
                    if time.monotonic() > deadline:
                        process.kill()
        finally:
            if process.returncode:
                self.store.set(failed, "")
            self.store.set(f"code {self.number} {self.place.rank}", str(process.returncode))
        return code

    def _get(self, key: str) -> bytes:
        """The value of a key, however long it takes until it is there."""
        while not self.store.check([key]):
            time.sleep(0.2)
        return self.store.get(key)


def _free_port() -> int:
    """A port of this machine, which is the one where processes meet."""
    with socket.socket() as sock:
        sock.bind(("", 0))
        return sock.getsockname()[1]
