"""Several processes: where they are, what they agree on, and that what they compute together is what one would have.

The tests of two processes run this file as a program, twice at a time, and look at what it has left.
"""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from funneltfm.data.batching import Collator, RunLoader
from funneltfm.data.encoding import EncodedSplit
from funneltfm.data.readers import DATASETS
from funneltfm.errors import InputError
from funneltfm.funnel.config import ModelConfig
from funneltfm.funnel.model import FunnelTFM
from funneltfm.tasks.classification import Classification
from funneltfm.training import classify as engine
from funneltfm.training import ranks
from funneltfm.training.classify import classify
from funneltfm.training.config import make_args
from funneltfm.training.pipeline import Pipeline
from funneltfm.training.setup import Devices, make_trainer

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "pytorch"), "OMP_NUM_THREADS": "1"}
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
MODEL = {
    "block_size": "1_1", "d_embed": 8, "d_model": 8, "n_head": 2, "d_head": 4, "d_inner": 16,
    "separate_cls": True, "truncate_seq": True, "pool_q_only": True,
}  # fmt: skip
WORDS = ("a", "bad", "cat", "dog", "good", "great", "man", "not", "old", "red", "story", "the", "was", "we")


# ---- one process


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*LAUNCHERS, *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.setenv(name, "")  # so that it is put back if a test sets it
        monkeypatch.delenv(name)


def test_one_process_agrees_with_itself() -> None:
    assert (ranks.size(), ranks.rank(), ranks.is_main()) == (1, 0, True)
    assert (ranks.local_size(), ranks.local_rank()) == (1, 0)
    value = {"a": [1]}
    assert ranks.broadcast(value) is value
    assert ranks.gather(value) == [value]
    assert ranks.mean(2.5) == 2.5
    assert (ranks.any_rank(True), ranks.any_rank(False)) == (True, False)
    assert ranks.main_first(lambda: 7) == ranks.main_decides(lambda: 7) == 7


@pytest.mark.parametrize("agree", [ranks.main_first, ranks.main_decides])
def test_an_error_of_one_process_is_that_error(agree: Callable) -> None:
    def broken() -> None:
        raise OSError("no such disk")

    with pytest.raises(OSError, match="no such disk"):
        agree(broken)
    with pytest.raises(InputError, match="mine"):
        ranks.fail(InputError("mine"))


def test_nothing_to_join() -> None:
    with ranks.joined(None, "gloo"):
        assert ranks.size() == 1
    assert "RANK" not in os.environ


# ---- places


def place(world_size: int = 1, rank: int = 0, init_method: str | None = None) -> ranks.Place | None:
    return ranks.find_place(world_size, rank, init_method)


TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node7",
    "MASTER_PORT": "29400",
}  # fmt: skip
SLURM = {
    "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "1234567", "SLURM_NTASKS": "4", "SLURM_NNODES": "2",
    "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_NODELIST": "gpu[07-08]",
}  # fmt: skip


def set_env(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_launched_by_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place() is None
    assert place(world_size=4) is None  # they are still to be started
    set_env(monkeypatch, TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"})
    assert place() is None  # torchrun with one process is one process
    set_env(monkeypatch, {"SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1"})
    assert place() is None


def test_launched_by_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    set_env(monkeypatch, TORCHRUN | SLURM)  # torchrun inside of a SLURM job: the inner one is meant
    assert place() == ranks.Place(5, 8, 1, 4, "node7", 29400)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, None) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")),
        *((name, "many") for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")),  # an address is any word
    ],
)
def test_half_an_environment_is_named(name: str, value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    set_env(monkeypatch, TORCHRUN)
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=rf"{name}.* Launch with torchrun, or unset RANK"):
        place()


def test_launched_by_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    set_env(monkeypatch, SLURM)
    found = place()
    assert found is not None
    assert (found.rank, found.size, found.local_rank, found.local_size) == (3, 4, 1, 2)
    assert (found.address, found.port) == ("gpu07", 19567)  # the port comes from the job's number
    set_env(monkeypatch, {"SLURM_JOB_NAME": "interactive"})
    assert place() is None


def test_launched_by_slurm_with_ntasks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    set_env(monkeypatch, SLURM)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    assert place() == ranks.Place(3, 4, 1, 2, "gpu07", 19567)


def test_started_by_hand() -> None:
    """Whether two of them share a machine is not known: each counts as alone on its own."""
    assert place(4, 3, "tcp://10.0.0.5:1234") == ranks.Place(3, 4, 0, 1, "10.0.0.5", 1234)
    assert place(2, 0, "tcp://[::1]:9") == ranks.Place(0, 2, 0, 1, "[::1]", 9)


@pytest.mark.parametrize("method", ["env://", "tcp://", "tcp://host", "tcp://host:", "tcp://:80", "tcp://h:x", "h:80"])
def test_a_place_to_meet_that_is_none(method: str) -> None:
    with pytest.raises(InputError, match=r"tcp://HOST:PORT; got") as caught:
        place(2, 0, method)
    assert repr(method) in str(caught.value)


@pytest.mark.parametrize(("world_size", "rank"), [(2, 2), (2, 5), (1, 1), (0, 0)])
def test_a_rank_beyond_the_last(world_size: int, rank: int) -> None:
    with pytest.raises(InputError, match=rf"distributed_rank must be below distributed_world_size, {world_size}; got"):
        place(world_size, rank, "tcp://127.0.0.1:1")


def test_a_process_that_does_not_come_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "MEETING", timedelta(seconds=1))
    place = ranks.Place(1, 2, 0, 1, "127.0.0.1", free_port())
    with pytest.raises(InputError, match=r"the 2 processes .* have not met at 127.0.0.1:.* within 1 s .* rank 1"):
        ranks.joined(place, "gloo").__enter__()


# ---- two processes: what they do (this part runs in each of them)


def sentences(n: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(2, 12))) for _ in range(n)]


# name: (examples, batch size of a process, batches of a step, level of fp16)
STEPS: dict[str, tuple[int, int, int, str | None]] = {
    "whole": (8, 4, 1, None),
    "uneven": (7, 4, 1, None),
    "one alone": (1, 4, 1, None),  # the second process has nothing to learn from
    "accumulation": (12, 2, 3, None),
    "uneven accumulation": (11, 2, 3, None),
    "accumulation of less than a batch each": (4, 2, 3, None),
    "two steps": (13, 2, 2, None),
    "fp16 O2": (11, 2, 3, "O2"),
    "fp16 O1": (11, 2, 3, "O1"),
}


def train(name: str, alone: bool, spoiled_rank: int | None = None, **more: Any) -> dict[str, Any]:
    """The gradients of each step before clipping, the weights after the last one, and what wrapped the model."""
    n, size, accumulate, level = STEPS[name]
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 20, n)
    split = EncodedSplit(
        inputs=rng.integers(1, 30, lengths.sum()).astype(np.int32),
        seg_id=rng.integers(0, 3, lengths.sum()).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        labels=rng.integers(0, 2, n),
        ids=np.array([str(i) for i in range(n)]),
    )
    config = ModelConfig(**MODEL, vocab_size=30, dropout=0.0, dropatt=0.0)
    torch.manual_seed(0)
    model = FunnelTFM(config)
    collator = Collator(config, "max_length", max_length=32)
    if alone:  # the whole step is one batch
        loader = RunLoader(split, collator, size * accumulate * 2, 1, seed=1)
        accumulate = 1
    else:
        loader = RunLoader(split, collator, size, 1, 1, accumulate, rank=ranks.rank(), ranks=2)
    args = make_args(device_id=-1, lr=1e-3, clip=0.1, **more)
    gradients: list[list[Tensor]] = []

    class Noting(Pipeline):
        def on_after_backward(self) -> None:
            if spoiled_rank == ranks.rank():
                self.model.cls_head[3].weight.grad[0, 0] = float("inf")

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            gradients.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])

    pipeline = Noting(model, Classification(DATASETS["CoLA"]), args, loader.steps, ())
    trainer = make_trainer(
        args, Devices("cpu", -1, level, torch.float16), max_epochs=1, accumulate_grad_batches=accumulate,
        gradient_clip_val=args.clip, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(pipeline, loader)
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return {
        "gradients": gradients,
        "weights": {key: value.float() for key, value in model.state_dict().items()},
        "scale": scaler.get_scale() if scaler is not None else None,
        "wrapper": type(trainer.strategy.model).__name__,
    }


class Averaging(torch.nn.Module):
    """In place of apex's DistributedDataParallel: gradients are averaged over two processes when they are there."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(self.average)

    @staticmethod
    def average(parameter: Tensor) -> None:
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad.div_(2)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@contextlib.contextmanager
def installed_apex() -> Iterator[None]:
    """One that has a DistributedDataParallel and nothing else."""
    package, parallel = ModuleType("apex"), ModuleType("apex.parallel")
    parallel.DistributedDataParallel = Averaging  # type: ignore[attr-defined]
    package.__path__ = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "apex", package)
        patch.setitem(sys.modules, "apex.parallel", parallel)
        yield


class PowerCut(RuntimeError):
    pass


def agreements() -> dict[str, Any]:
    """What two processes agree on."""
    rank = ranks.rank()
    order: list[float] = []

    def work() -> str:
        order.append(rank)
        Path("cache").open("x").close() if rank == 0 else Path("cache").stat()  # the main one has been here before
        return f"work of {rank}"

    def broken() -> None:
        raise OSError("no such disk")

    found: dict[str, Any] = {
        "place": (ranks.size(), rank, ranks.local_size(), ranks.local_rank(), ranks.is_main()),
        "broadcast": ranks.broadcast({"from": rank}),
        "gather": ranks.gather({"from": rank}),
        "mean": ranks.mean(float(rank)),
        "any": [ranks.any_rank(rank == 0), ranks.any_rank(rank == 1), ranks.any_rank(False), ranks.any_rank(True)],
        "main_first": ranks.main_first(work),
        "main_decides": ranks.main_decides(lambda: f"decided by {rank}"),
    }
    return found | {"order": order}


def two(folder: Path) -> None:
    """All that the tests below look at."""
    os.chdir(folder)
    with ranks.joined(ranks.find_place(1, 0, None), "gloo"), engine.quiet():
        rank = ranks.rank()
        Path(f"agreements.{rank}.json").write_text(json.dumps(agreements()), encoding="utf-8")
        steps = {name: train(name, alone=False) for name in STEPS}
        steps["skipped"] = train("fp16 O2", alone=False, spoiled_rank=1)
        with installed_apex():
            steps["apex"] = train("accumulation", alone=False, ddp_backend="apex")
        torch.save(steps, f"steps.{rank}.pt")

        flags = json.loads(Path("flags.json").read_text(encoding="utf-8"))
        results = classify(**flags, model_dir="tested", test_only=True, init_ckpt="alone/best/model.pt",
                           write_prediction=True)  # fmt: skip
        Path(f"results.{rank}.json").write_text(json.dumps(results), encoding="utf-8")

        train_flags = flags | {"accumulate_grad_batches": 2, "train_bsz": 2}
        classify(**train_flags, model_dir="whole")
        original = engine.Progress.on_train_batch_end

        def cut(self: Any, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx + 1 == 7:
                raise PowerCut
            original(self, trainer, module, outputs, batch, batch_idx)

        engine.Progress.on_train_batch_end = cut
        with contextlib.suppress(PowerCut):
            classify(**train_flags, model_dir="cut", save_steps=1)
        engine.Progress.on_train_batch_end = original
        classify(model_dir="cut", resume=True)


# ---- two processes: what is expected of them


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_pair(*argv: str) -> list[tuple[int, str]]:
    """Run this file in two processes: the exit code of each, and what it said."""
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=ENVIRONMENT | {
                "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            },
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def make_data(folder: Path) -> dict[str, Any]:
    """CoLA's layout, of 24, 11 and 5 sentences; flags of a small run on it."""
    rng = random.Random(0)
    for name, n, seed in (("train", 23, 1), ("dev", 11, 2)):
        rows = [f"gj04\t{rng.randint(0, 1)}\t\t{text}\n" for text in sentences(n, seed)]
        (folder / f"{name}.tsv").write_text("".join(rows), encoding="utf-8")
    rows = [f"{i}\t{text}\n" for i, text in enumerate(sentences(5, 3))]
    (folder / "test.tsv").write_text("index\tsentence\n" + "".join(rows), encoding="utf-8")
    pieces = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS)
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")
    return {
        "dataset": "CoLA", "data_dir": str(folder), "tokenizer_path": str(folder / "vocab.txt"),
        "output_dir": str(folder / "processed"), "epochs": 2, "train_bsz": 4, "valid_bsz": 3, "test_bsz": 2, "lr": 1e-2,
        "n_valid": 3, "n_log_epoch": 50, "dropatt": 0.2, "device_id": -1, **MODEL,
    }  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which one process has trained, and then two have done all that `two` does."""
    folder = tmp_path_factory.mktemp("pair")
    flags = make_data(folder)
    classify(**flags, model_dir=str(folder / "alone"))
    classify(model_dir=str(folder / "alone"), test_only=True, write_prediction=True)
    (folder / "flags.json").write_text(json.dumps(flags), encoding="utf-8")
    for code, said in run_pair(str(folder)):
        assert code == 0, said
    return folder


def by_rank(folder: Path, name: str) -> list[dict[str, Any]]:
    if name.endswith(".json"):
        files = [folder / name.replace(".json", f".{rank}.json") for rank in range(2)]
        return [json.loads(path.read_text(encoding="utf-8")) for path in files]
    return [torch.load(folder / name.replace(".pt", f".{rank}.pt"), weights_only=True) for rank in range(2)]


@pytest.mark.slow
def test_what_two_processes_agree_on(pair: Path) -> None:
    main, other = by_rank(pair, "agreements.json")
    assert (main["place"], other["place"]) == ([2, 0, 2, 0, True], [2, 1, 2, 1, False])
    for found in (main, other):
        assert found["broadcast"] == {"from": 0}
        assert found["gather"] == [{"from": 0}, {"from": 1}]
        assert found["mean"] == 0.5
        assert found["any"] == [True, True, False, True]
        assert found["main_decides"] == "decided by 0"
    assert (main["main_first"], other["main_first"]) == ("work of 0", "work of 1")
    assert (main["order"], other["order"]) == ([0], [1])


@pytest.mark.slow
@pytest.mark.parametrize("name", list(STEPS))
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec")
@pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`:UserWarning")
def test_two_with_half_the_batch_learn_what_one_does(pair: Path, name: str) -> None:
    alone = train(name, alone=True)
    main, other = (steps[name] for steps in by_rank(pair, "steps.pt"))
    half = STEPS[name][3] is not None
    assert len(alone["gradients"]) == len(main["gradients"]) == len(other["gradients"])
    for step, gradients in enumerate(alone["gradients"]):
        norm = float(torch.stack([g.norm() for g in gradients]).norm())
        assert norm > 0.1  # clipping has something to do
        for expected, one, two_ in zip(gradients, main["gradients"][step], other["gradients"][step], strict=True):
            assert torch.equal(one, two_)
            torch.testing.assert_close(one, expected, atol=2e-3 * norm if half else 1e-6, rtol=0)
    for key, expected in alone["weights"].items():
        assert torch.equal(main["weights"][key], other["weights"][key])
        torch.testing.assert_close(main["weights"][key], expected, atol=2e-3 if half else 1e-6, rtol=0)
    assert main["scale"] == other["scale"] == alone["scale"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec")
@pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`:UserWarning")
def test_an_apex_that_has_data_parallelism_is_used(pair: Path) -> None:
    alone = train("accumulation", alone=True)
    for steps in by_rank(pair, "steps.pt"):
        assert steps["apex"]["wrapper"] == "Averaging"
        for key, expected in alone["weights"].items():
            torch.testing.assert_close(steps["apex"]["weights"][key], expected, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_in_one_process_skips_the_step_in_both(pair: Path) -> None:
    main, other = (steps["skipped"] for steps in by_rank(pair, "steps.pt"))
    assert main["scale"] == other["scale"] == 2.0**15
    torch.manual_seed(0)
    before = FunnelTFM(ModelConfig(**MODEL, vocab_size=30, dropout=0.0, dropatt=0.0))
    norms = {f"{n}.{p}" for n, m in before.named_modules() if isinstance(m, torch.nn.LayerNorm) for p in m._parameters}
    for key, value in before.state_dict().items():
        expected = value if key in norms else value.half().float()
        assert torch.equal(main["weights"][key], expected), key
        assert torch.equal(other["weights"][key], expected), key


@pytest.mark.slow
def test_two_processes_score_and_predict_as_one(pair: Path) -> None:
    """The splits are dealt to them, 11 and 5 examples in batches of 3 and 2: every example counts once."""
    main, other = by_rank(pair, "results.json")
    alone = json.loads((pair / "alone" / "results.json").read_text(encoding="utf-8"))
    assert main["valid"] == other["valid"] == alone["valid"]
    assert (main["processes"], alone["processes"]) == (2, 1)
    assert json.loads((pair / "tested" / "results.json").read_text(encoding="utf-8")) == main
    one, two_ = (sorted((pair / name / "predictions").iterdir()) for name in ("alone", "tested"))
    assert [path.name for path in one] == [path.name for path in two_] == ["CoLA.tsv", "test.jsonl", "valid.jsonl"]
    for path, other_path in zip(one, two_, strict=True):
        assert path.read_bytes() == other_path.read_bytes()


def table(root: Path) -> list[str]:
    """metrics.csv without the speed."""
    rows = (root / "metrics.csv").read_text(encoding="utf-8").splitlines()
    column = rows[0].split(",").index("examples_per_second")
    return [",".join(cell for i, cell in enumerate(row.split(",")) if i != column) for row in rows]


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(pair: Path) -> None:
    """Cut in the middle of a window of accumulation, with dropout of its own in each process."""
    whole, cut = pair / "whole", pair / "cut"
    assert table(cut) == table(whole)
    assert len(table(whole)) > 6
    one, other = (torch.load(root / "best" / "model.pt", weights_only=True) for root in (cut, whole))
    assert all(torch.equal(one[name], other[name]) for name in other)
    one, other = (torch.load(root / "checkpoints" / "last.ckpt", weights_only=True) for root in (cut, whole))
    assert all(torch.equal(one["state_dict"][name], tensor) for name, tensor in other["state_dict"].items())
    for mine, theirs in zip(one["rng"], other["rng"], strict=True):
        assert torch.equal(mine["cpu"], theirs["cpu"])
    assert not torch.equal(other["rng"][0]["cpu"], other["rng"][1]["cpu"])
    results = [json.loads((root / "results.json").read_text(encoding="utf-8")) for root in (cut, whole)]
    assert results[0]["valid"] == results[1]["valid"]
    assert results[0]["steps"] == 6  # of 2 * 2 * 2 examples of 23, twice


if __name__ == "__main__":
    two(Path(sys.argv[1]))
