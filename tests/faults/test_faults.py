"""Hard days: runs are killed, their checkpoints damaged, their disk filled, one of their processes shot. Every one must
go on to the very numbers of the run that nothing happened to.

    python tests/faults/test_faults.py --kills 50 --corruptions 30 --ranks 10 --disks 5 --seed 1

tries that many faults and prints a table; pytest tries a few.
"""

import argparse
import contextlib
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

SOURCE = Path(__file__).resolve().parents[2] / "pytorch"
WORDS = ("a", "bad", "cat", "dog", "good", "great", "man", "not", "old", "red", "story", "the", "was", "we")
FLAGS = {
    "dataset": "custom", "text_a": "text", "block_size": "2_2", "d_embed": 16, "d_model": 16, "n_head": 2, "d_head": 8,
    "d_inner": 32, "separate_cls": True, "pool_q_only": True, "truncate_seq": True, "lr": 1e-3, "train_bsz": 4,
    "n_valid": 6, "n_log_epoch": 3, "epochs": 6, "seed": 3, "write_prediction": True, "device_id": -1,
}  # fmt: skip
# What is trained when the fault comes: plain, with half of everything, in windows of batches, in two processes.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fp16 O2": {"fp16": True, "amp_opt": "O2", "save_steps": 7},
    "accumulation": {"accumulate_grad_batches": 3, "save_steps": 5},
    "two processes": {"distributed_world_size": 2, "train_bsz": 2, "save_steps": 9},
}
HANG = 120  # seconds after which a run counts as hanging


def write_data(folder: Path) -> None:
    """150 sentences whose label is whether `good` stands before `bad`."""
    rng = random.Random(0)
    folder.mkdir(parents=True)
    for split, n in (("train", 150), ("valid", 40), ("test", 20)):
        rows = []
        for _ in range(n):
            words = [*rng.choices(WORDS, k=rng.randint(1, 8)), "good", "bad"]
            rng.shuffle(words)
            rows.append({"text": " ".join(words), "label": int(words.index("good") < words.index("bad"))})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pieces = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS)
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces))


@dataclass
class Hospital:
    """Runs faults on copies of one run and compares the outcomes with the run that had none."""

    home: Path
    rng: random.Random
    healthy: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    n_run: int = 0

    def __post_init__(self) -> None:
        write_data(self.home / "data")

    def command(self, root: Path, variant: str, resume: bool) -> list[str]:
        python = [sys.executable, "-m", "funneltfm", "classify", f"--model_dir={root}"]
        if resume:
            return [*python, "--resume"]
        data = self.home / "data"
        paths = {"data_dir": data, "tokenizer_path": data / "vocab.txt", "output_dir": self.home / "proc"}
        return [*python, *(f"--{k}={v}" for k, v in (FLAGS | VARIANTS[variant] | paths | {"overwrite": True}).items())]

    def start(self, root: Path, variant: str, resume: bool = False) -> subprocess.Popen:
        env = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
        command = self.command(root, variant, resume)
        return subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    def finish(self, process: subprocess.Popen) -> tuple[int, str]:
        """Exit code and output. A run that hangs fails here; so does one that leaves processes behind."""
        try:
            output, _ = process.communicate(timeout=HANG)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(f"a run hangs: {process.args}") from None
        deadline = time.monotonic() + 10
        own = next(word for word in process.args if word.startswith("--model_dir="))
        while left := [other for other in psutil.process_iter() if own in _words(other)]:
            assert time.monotonic() < deadline, f"orphans: {left}"
            time.sleep(0.1)
        return process.returncode, output

    def new_root(self) -> Path:
        self.n_run += 1
        return self.home / f"run_{self.n_run}"

    def reference(self, variant: str) -> dict[str, Any]:
        """What the run without a fault ends with."""
        if variant not in self.healthy:
            root, began = self.new_root(), time.monotonic()
            code, output = self.finish(self.start(root, variant))
            assert code == 0, output
            self.seconds[variant] = time.monotonic() - began
            self.bytes[variant] = (root / "checkpoints" / "last.ckpt").stat().st_size
            self.healthy[variant] = outcome(root)
        return self.healthy[variant]

    def resume(self, root: Path, variant: str) -> None:
        """Go on to the end; from the start where nothing was saved yet."""
        code, output = self.finish(self.start(root, variant, resume=True))
        if code and ("nothing to resume" in output or "name the data" in output):
            assert not any((root / "checkpoints").glob("*.ckpt")), output
            code, output = self.finish(self.start(root, variant))
        assert code == 0, output

    def check(self, root: Path, variant: str) -> None:
        assert_equal(outcome(root), self.reference(variant))
        shutil.rmtree(root)

    # ---- faults

    def killed(self, variant: str, kills: int) -> None:
        """kill -9 at random moments, again and again, each time going on."""
        self.reference(variant)
        root, resume = self.new_root(), False
        for _ in range(kills):
            process = self.start(root, variant, resume)
            # The processes need time to start; half of the kills come when the training is certainly on its way.
            if self.rng.random() < 0.5:
                wait_for(process, lambda: (root / "checkpoints" / "last.ckpt").is_file())
                time.sleep(self.rng.uniform(0, 0.3 * self.seconds[variant]))
            else:
                time.sleep(self.rng.uniform(0, 1.1 * self.seconds[variant]))
            process.kill()
            self.finish(process)
            resume = bool(list((root / "checkpoints").glob("*.ckpt")))
        if resume:
            self.resume(root, variant)
        else:
            code, output = self.finish(self.start(root, variant))
            assert code == 0, output
        self.check(root, variant)

    def corrupted(self, variant: str) -> None:
        """The last checkpoint is damaged somehow; the one before must do."""
        self.reference(variant)
        root = self.new_root()
        process = self.start(root, variant)
        wait_for(process, lambda: (root / "checkpoints" / "previous.ckpt").is_file())
        process.kill()
        self.finish(process)
        newest = next(path for name in ("next", "last") if (path := root / "checkpoints" / f"{name}.ckpt").is_file())
        what = damage(newest, self.rng)
        process = self.start(root, variant, resume=True)
        code, output = self.finish(process)
        assert code == 0, output
        assert f"{newest} is damaged" in output, f"{what} of {newest} went unnoticed:\n{output}"
        self.check(root, variant)

    def shot(self) -> None:
        """One of two processes is killed; the run must end at once, with an error, leaving none behind."""
        variant = "two processes"
        self.reference(variant)
        root = self.new_root()
        process = self.start(root, variant)
        wait_for(process, lambda: (root / "checkpoints" / "last.ckpt").is_file())
        time.sleep(self.rng.uniform(0, 1))
        workers = psutil.Process(process.pid).children()
        if len(workers) == 2:  # or the run has come to its end already
            self.rng.choice(workers).kill()
            began = time.monotonic()
            code, output = self.finish(process)
            assert code != 0, output
            assert "SIGKILL" in output or "exit code" in output, output
            assert time.monotonic() - began < 30, "a run without one of its processes did not end"
        else:
            self.finish(process)
        self.resume(root, variant)
        self.check(root, variant)

    def disk_full(self, variant: str) -> None:
        """The disk of the run is full at some time; with more space it goes on."""
        self.reference(variant)
        root = self.new_root()
        # A run needs room for the last two checkpoints, the one being written, and the best model: less than that.
        with small_disk(root, size=self.rng.randint(40_000, int(2.9 * self.bytes[variant]))) as resize:
            code, output = self.finish(self.start(root, variant))
            assert code == 1, output
            assert "No space left on device" in output, output
            assert "Traceback" not in output, output
            resize(100_000_000)
            self.resume(root, variant)
            assert_equal(outcome(root), self.reference(variant))

    def read_only(self, variant: str) -> None:
        """The disk becomes read-only while the run is on; afterwards it goes on."""
        self.reference(variant)
        root = self.new_root()
        with small_disk(root, size=100_000_000) as resize:
            process = self.start(root, variant)
            wait_for(process, lambda: (root / "checkpoints" / "last.ckpt").is_file())
            made = resize(None)
            code, output = self.finish(process)
            resize(100_000_000)
            if made and code:  # else the run was at its end already, or a file was just open for writing
                assert code == 1, output
                assert "Read-only file system" in output, output
                assert "Traceback" not in output, output
            self.resume(root, variant)
            assert_equal(outcome(root), self.reference(variant))


def _words(process: psutil.Process) -> list[str]:
    """The command line of a process that runs."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def wait_for(process: subprocess.Popen, happened: Any) -> None:
    """Until it has happened, or the process has ended."""
    deadline = time.monotonic() + HANG
    while process.poll() is None and not happened():
        assert time.monotonic() < deadline, f"nothing happens: {process.args}"
        time.sleep(0.01)


def damage(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    what = rng.choice(("a flipped bit", "a cut", "zeros", "an appended byte", "a foreign file", "an empty file"))
    place = rng.randrange(len(content))
    if what == "a flipped bit":
        content[place] ^= 1 << rng.randrange(8)
    elif what == "a cut":
        del content[place:]
    elif what == "zeros":  # at least one byte that was none
        content[place : place + 4096] = bytes(len(content[place : place + 4096]))
        content[-1] ^= 1
    elif what == "an appended byte":
        content += b"0"
    elif what == "a foreign file":
        torch.save({"state_dict": {}, "global_step": 3}, path)
        return what
    else:
        content.clear()
    path.write_bytes(content)
    return f"{what} at byte {place} of {len(content)}"


@contextlib.contextmanager
def small_disk(root: Path, size: int) -> Iterator[Any]:
    """A file system of `size` bytes at `root`; yields what changes its size, or (None) makes it read-only."""
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", root], check=True)

    def resize(new: int | None) -> bool:
        options = "remount,ro" if new is None else f"remount,rw,size={new}"
        return subprocess.run(["mount", "-o", options, root], capture_output=True).returncode == 0

    try:
        yield resize
    finally:
        subprocess.run(["umount", "-l", root], check=True)


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        done = (
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True)
            if shutil.which("mount")
            else None
        )
        return done is not None and done.returncode == 0 and subprocess.run(["umount", folder]).returncode == 0


def outcome(root: Path) -> dict[str, Any]:
    """Everything that a run ends with, but for the times."""
    with open(root / "metrics.csv", newline="") as handle:
        rows = [{k: v for k, v in row.items() if k != "examples_per_second"} for row in csv.DictReader(handle)]
    results = json.loads((root / "results.json").read_text())
    last = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    return {
        "rows": rows,
        "results": {k: v for k, v in results.items() if k not in ("train_seconds", "examples_per_second")},
        "weights": last["state_dict"],
        "optimizer": last["optimizer_states"][0]["state"],
        "scaler": last.get("AmpPrecision", {}),
        "model": torch.load(root / "best" / "model.pt", weights_only=True),
        "predictions": {path.name: path.read_bytes() for path in sorted((root / "predictions").iterdir())},
    }


def assert_equal(one: Any, other: Any, where: str = "") -> None:
    """Bit for bit."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


# ---- a few of each, in the tests


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    return Hospital(tmp_path_factory.mktemp("faults") / "home", random.Random(0))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["accumulation", "fp16 O2"])
def test_kills(hospital: Hospital, variant: str) -> None:
    hospital.killed(variant, kills=2)


@pytest.mark.slow
def test_damaged_checkpoint(hospital: Hospital) -> None:
    hospital.corrupted("plain")


@pytest.mark.slow
def test_one_of_two_processes_dies(hospital: Hospital) -> None:
    hospital.shot()


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="mounting a small disk needs to be root")
def test_full_disk(hospital: Hospital) -> None:
    hospital.disk_full("plain")


def test_every_damage_is_noticed(tmp_path: Path) -> None:
    """The damages of `damage` are damages: none leaves the bytes as they were."""
    path, rng = tmp_path / "file", random.Random(1)
    for _ in range(200):
        path.write_bytes(before := rng.randbytes(300) + bytes(300))
        damage(path, rng)
        assert path.read_bytes() != before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--corruptions", type=int, default=30)
    parser.add_argument("--ranks", type=int, default=10, help="times that one of two processes is killed")
    parser.add_argument("--disks", type=int, default=5, help="full disks, and as many read-only ones")
    parser.add_argument("--seed", type=int, default=1)
    counts = parser.parse_args()
    rng = random.Random(counts.seed)
    variants = list(VARIANTS)
    jobs: list[tuple[str, int, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        hospital = Hospital(Path(folder) / "home", rng)
        left = counts.kills
        while left > 0:
            kills = min(left, rng.randint(1, 4))
            left -= kills
            jobs.append(("kill -9 of the run", kills, partial(hospital.killed, rng.choice(variants), kills)))
        damaged = [partial(hospital.corrupted, rng.choice(variants)) for _ in range(counts.corruptions)]
        jobs += [("damaged checkpoint", 1, job) for job in damaged]
        jobs += [("kill -9 of one process of two", 1, hospital.shot) for _ in range(counts.ranks)]
        if counts.disks and not can_mount():
            print("full and read-only disks are left out: mounting a small disk needs to be root")
            counts.disks = 0
        for _ in range(counts.disks):
            jobs.append(("full disk", 1, partial(hospital.disk_full, rng.choice(variants[:3]))))
            jobs.append(("read-only disk", 1, partial(hospital.read_only, rng.choice(variants[:3]))))
        table: dict[str, list[int]] = {}
        began, failed = time.monotonic(), 0
        for number, (kind, faults, job) in enumerate(jobs, 1):
            row = table.setdefault(kind, [0, 0, 0])
            row[0] += faults
            row[1] += 1
            try:
                job()
                row[2] += 1
            except AssertionError as error:
                failed += 1
                print(f"{kind}: {error}", flush=True)
            print(f"[{number}/{len(jobs)}] {time.monotonic() - began:.0f} s  {kind}: {row}", flush=True)
    print(f"\n{'fault':32}{'faults':>8}{'runs':>8}{'recovered, bit-equal':>24}")
    for kind, row in table.items():
        print(f"{kind:32}{row[0]:8}{row[1]:8}{row[2]:24}")
    print(f"{time.monotonic() - began:.0f} s, seed {counts.seed}")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
