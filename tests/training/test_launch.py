"""Several processes, however they are started: here, by torchrun on two nodes, by SLURM, by hand, on Ray."""

import csv
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from funneltfm.errors import InputError
from funneltfm.training.classify import classify
from funneltfm.training.config import make_args
from funneltfm.training.setup import choose_devices

pytestmark = pytest.mark.slow
SOURCE = Path(__file__).resolve().parents[2] / "pytorch"
WORDS = ("a", "bad", "cat", "dog", "good", "great", "man", "not", "old", "red", "story", "the", "was", "we")
MODEL = {
    "block_size": "1_1", "d_embed": 8, "d_model": 8, "n_head": 2, "d_head": 4, "d_inner": 16, "dropout": 0.0,
    "dropatt": 0.0, "separate_cls": True, "truncate_seq": True, "pool_q_only": True,
    "lr": 1e-3, "epochs": 2, "n_valid": 2, "n_log_epoch": 1, "seed": 1, "device_id": -1,
}  # fmt: skip


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """27 training sentences: the last step of an epoch cannot be dealt evenly."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    for split, n in (("train", 27), ("valid", 9), ("test", 5)):
        rows = [{"text": " ".join(rng.choices(WORDS, k=rng.randint(2, 9))), "label": i % 2} for i in range(n)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS)))
    paths = {name: str(folder / file) for name, file in (("data_dir", ""), ("tokenizer_path", "vocab.txt"))}
    return MODEL | {"dataset": "custom", "text_a": "text", "output_dir": str(folder / "proc")} | paths


@pytest.fixture(scope="module")
def alone(flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process with the whole batch."""
    root = tmp_path_factory.mktemp("alone") / "run"
    classify(**flags, train_bsz=4, model_dir=str(root))
    return root


def words_of(flags: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()]


def environment(**more: str) -> dict[str, str]:
    """Of a fresh process, without what a launcher of these tests may have left."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "RANK", "WORLD", "LOCAL_", "MASTER_"))}
    return own | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"} | more


def start(command: list[str], **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        command, env=environment(**env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def start_patched(flags: dict[str, Any], folder: Path) -> subprocess.Popen:
    """Two processes that import the folder's sitecustomize.py before anything else."""
    run = [*CLASSIFY, *words_of(flags), f"--model_dir={folder / 'run'}", "--distributed_world_size=2"]
    return start([*run, "--train_bsz=2"], PYTHONPATH=f"{folder}{os.pathsep}{SOURCE}")


def end(process: subprocess.Popen) -> str:
    """The output of a process that should be at its end soon."""
    try:
        return process.communicate(timeout=120)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"{process.args} hangs")


def left_of(root: Path) -> list[int]:
    """Processes of a run that are still there. (torch gives each a session of its own.)"""
    found = []
    for process in psutil.process_iter():
        try:
            if f"--model_dir={root}" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def no_orphans(root: Path) -> bool:
    deadline = time.monotonic() + 20
    while left_of(root) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not left_of(root)


def free_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def results_of(root: Path) -> dict[str, Any]:
    return json.loads((root / "results.json").read_text())


def assert_same_run(root: Path, alone: Path, processes: int = 2) -> None:
    """Two processes with half the batch do what one does with the whole, but for rounding."""
    ours, theirs = results_of(root), results_of(alone)
    assert ours["processes"] == processes
    assert ours["steps"] == theirs["steps"]
    with open(root / "metrics.csv") as a, open(alone / "metrics.csv") as b:
        rows = list(zip(csv.DictReader(a), csv.DictReader(b), strict=True))
    for mine, other in rows:
        for name in mine.keys() - {"examples_per_second"}:
            assert float(mine[name] or 0) == pytest.approx(float(other[name] or 0), abs=1e-6), (name, mine, other)
    one, two = (torch.load(r / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for r in (root, alone))
    assert one.keys() == two.keys()
    for name in one:
        if not name.endswith("k_head.bias"):  # its gradient is zero but for rounding, and AdamW divides by that
            torch.testing.assert_close(one[name], two[name], rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


CLASSIFY = [sys.executable, "-m", "funneltfm", "classify"]


def test_from_python(flags: dict[str, Any], alone: Path, tmp_path: Path) -> None:
    handlers = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)]
    env = dict(os.environ)
    results = classify(**flags, train_bsz=2, model_dir=str(tmp_path / "run"), distributed_world_size=2)
    assert results == results_of(tmp_path / "run")
    assert_same_run(tmp_path / "run", alone)
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)] == handlers
    assert dict(os.environ) == env
    again = classify(resume=True, model_dir=str(tmp_path / "run"))  # in as many processes as before
    assert again["processes"] == 2
    assert again["valid"] == results["valid"]
    with pytest.raises(InputError, match="--distributed_world_size=2, so it cannot go on with"):
        classify(resume=True, model_dir=str(tmp_path / "run"), distributed_world_size=3)


def test_doorstep_takes_two_processes_without_a_gpu(flags: dict[str, Any], alone: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(SOURCE / "multigpu_classifier.py")]
    process = start([*command, *words_of(flags), "--train_bsz=2", f"--model_dir={tmp_path / 'run'}"])
    output = end(process)
    assert process.returncode == 0, output
    assert output.count("2 processes, cpu, fp32") == 1  # the main process alone talks
    assert_same_run(tmp_path / "run", alone)


def test_two_nodes_of_torchrun(flags: dict[str, Any], alone: Path, tmp_path: Path) -> None:
    port = free_port()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    meet = ["--master_addr=127.0.0.1", f"--master_port={port}"]
    run = [str(SOURCE / "classifier.py"), *words_of(flags), "--train_bsz=2", f"--model_dir={tmp_path / 'run'}"]
    nodes = [start([*torchrun, f"--node_rank={rank}", *meet, *run]) for rank in (0, 1)]
    outputs = [end(node) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "everything is in" in outputs[0]
    assert "everything is in" not in outputs[1]
    assert_same_run(tmp_path / "run", alone)


def test_slurm(flags: dict[str, Any], alone: Path, tmp_path: Path) -> None:
    port = free_port()
    slurm = {
        "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1", "SLURM_NODEID": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    run = [*CLASSIFY, *words_of(flags), "--train_bsz=2", f"--model_dir={tmp_path / 'run'}"]
    tasks = [start(run, **slurm, SLURM_PROCID=rank, SLURM_LOCALID=rank) for rank in ("0", "1")]
    outputs = [end(task) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert_same_run(tmp_path / "run", alone)


def test_by_hand(flags: dict[str, Any], alone: Path, tmp_path: Path) -> None:
    run = [*CLASSIFY, *words_of(flags), "--train_bsz=2", f"--model_dir={tmp_path / 'run'}"]
    meet = ["--distributed_world_size=2", f"--distributed_init_method=tcp://127.0.0.1:{free_port()}"]
    hands = [start([*run, *meet, f"--distributed_rank={rank}"]) for rank in (0, 1)]
    outputs = [end(hand) for hand in hands]
    assert [hand.returncode for hand in hands] == [0, 0], outputs
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'funneltfm[ray]'")
def test_ray_cluster_of_two_nodes(flags: dict[str, Any], alone: Path, tmp_path: Path) -> None:
    program = tmp_path / "on_ray.py"
    program.write_text(
        "import os, sys\n"
        "import ray\n"
        "from ray.cluster_utils import Cluster\n"
        "cluster = Cluster(initialize_head=True, head_node_args={'num_cpus': 1, 'include_dashboard': False})\n"
        "cluster.add_node(num_cpus=1)\n"
        "os.environ['RAY_ADDRESS'] = cluster.address\n"
        "from funneltfm.cli.main import main\n"
        "code = main(sys.argv[1:])\n"
        "nodes = {node['NodeID'] for node in ray.nodes()}\n"
        "ray.shutdown()\n"
        "cluster.shutdown()\n"
        "print('nodes', len(nodes), 'code', code)\n"
    )
    command = [sys.executable, str(program), "classify", *words_of(flags), "--train_bsz=2", "--launcher=ray"]
    process = start([*command, "--distributed_world_size=2", f"--model_dir={tmp_path / 'run'}"], RAY_DEDUP_LOGS="0")
    output = end(process)
    assert "nodes 2 code 0" in output, output
    assert output.count("everything is in") == 1, output
    assert_same_run(tmp_path / "run", alone)


# ---- what goes wrong


def test_bad_data_is_told_once(flags: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "valid.jsonl").write_text('{"text": "a", "label": 1}\n')
    run = [*CLASSIFY, *words_of(flags | {"data_dir": str(tmp_path)}), f"--model_dir={tmp_path / 'run'}"]
    process = start([*run, "--distributed_world_size=2"])
    output = end(process)
    assert process.returncode == 1
    assert "Traceback" not in output, output
    assert output.count("train.jsonl") == 1, output
    assert "process 0 of 2 ended with exit code 1" in output or "process 1 of 2 ended with exit code 1" in output
    assert no_orphans(tmp_path / "run")


def training(flags: dict[str, Any], root: Path, *more: str) -> subprocess.Popen:
    """A long run of two processes, when its training is on the way."""
    run = [*CLASSIFY, *words_of(flags | {"epochs": 2000}), f"--model_dir={root}", "--distributed_world_size=2"]
    process = start([*run, "--train_bsz=2", "--save_steps=10", *more])
    deadline = time.monotonic() + 90
    while not (root / "checkpoints" / "last.ckpt").is_file():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the training does not start"
        time.sleep(0.05)
    return process


def test_launcher_killed_while_the_others_start_leaves_no_orphans(flags: dict[str, Any], tmp_path: Path) -> None:
    run = [*CLASSIFY, *words_of(flags), f"--model_dir={tmp_path / 'run'}", "--distributed_world_size=2"]
    process = start(run)
    while len(left_of(tmp_path / "run")) < 2:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.kill()
    assert no_orphans(tmp_path / "run")
    process.communicate()


def test_launcher_killed_leaves_no_orphans(flags: dict[str, Any], tmp_path: Path) -> None:
    process = training(flags, tmp_path / "run")
    assert len(left_of(tmp_path / "run")) == 3
    process.kill()
    assert no_orphans(tmp_path / "run")
    process.communicate()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_save_and_end_all(flags: dict[str, Any], tmp_path: Path, signum: int) -> None:
    """Of the launcher, which tells the others."""
    root = tmp_path / "run"
    process = training(flags, root)
    process.send_signal(signum)
    output = end(process)
    assert process.returncode == 128 + signum, output
    assert output.count("Saved after step") == 1, output
    assert "Traceback" not in output, output
    assert no_orphans(tmp_path / "run")
    step = int(output.split("Saved after step ")[1].split(";")[0])
    assert torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == step


def test_a_process_that_raises_ends_all_with_its_traceback(flags: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    from funneltfm.training.pipeline import Pipeline\n"
        "    def training_step(self, batch, batch_idx, whole=Pipeline.training_step):\n"
        "        if batch_idx == 3:\n"
        "            raise ZeroDivisionError('in one process alone')\n"
        "        return whole(self, batch, batch_idx)\n"
        "    Pipeline.training_step = training_step\n"
    )
    process = start_patched(flags, tmp_path)
    output = end(process)
    assert process.returncode == 1
    assert "ZeroDivisionError: in one process alone" in output, output
    assert no_orphans(tmp_path / "run")


def test_every_process_has_its_own_dropout(flags: dict[str, Any], tmp_path: Path) -> None:
    """Lightning would give all processes the seed of the first."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if 'RANK' in os.environ:\n"
        "    import torch\n"
        "    from funneltfm.training.pipeline import Pipeline\n"
        "    def on_train_start(self):\n"
        f"        open({str(tmp_path)!r} + '/seed' + os.environ['RANK'], 'w').write(str(torch.initial_seed()))\n"
        "    Pipeline.on_train_start = on_train_start\n"
    )
    process = start_patched(flags, tmp_path)
    output = end(process)
    assert process.returncode == 0, output
    assert [(tmp_path / f"seed{rank}").read_text() for rank in (0, 1)] == ["1", "2"]


def test_errors_before_anything_is_started(flags: dict[str, Any], tmp_path: Path) -> None:
    root = {"model_dir": str(tmp_path / "run")}
    with pytest.raises(InputError, match="--launcher=ray is for several processes"):
        classify(**flags, **root, launcher="ray")
    with pytest.raises(InputError, match="must look like tcp://HOST:PORT"):
        classify(**flags, **root, distributed_world_size=2, distributed_init_method="localhost:1")
    with pytest.raises(InputError, match="distributed_rank must be below distributed_world_size"):
        classify(**flags, **root, distributed_world_size=2, distributed_rank=2, distributed_init_method="tcp://a:1")
    assert not (tmp_path / "run").exists()


def test_a_launcher_with_another_number_of_processes(flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "a", "MASTER_PORT": 1}
    for name, value in env.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(InputError, match="distributed_world_size=3, but the launcher has started 2"):
        classify(**flags, distributed_world_size=3)
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(InputError, match="MASTER_PORT is missing or no number"):
        classify(**flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"device_id": 3}, "this machine has no GPU"),
        ({"distributed_backend": "nccl"}, "needs GPUs"),
        ({"amp_opt": "O1"}, "needs --fp16 or --bf16"),
    ],
)
def test_devices_that_are_not_there(more: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose_devices(make_args(**more))
