"""Which devices and processes the flags ask for, and what is refused where a machine has none of them."""

import logging

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from funneltfm.errors import InputError
from funneltfm.funnel.config import ModelConfig
from funneltfm.training import ranks
from funneltfm.training.config import make_args
from funneltfm.training.precision import AmpPrecision
from funneltfm.training.setup import Devices, backend, choose_devices, make_trainer, take_place, warn_of_diverging

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


def machine(monkeypatch: pytest.MonkeyPatch, gpus: int = 0, mps: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def processes(monkeypatch: pytest.MonkeyPatch, size: int, local_size: int, local_rank: int = 0) -> list[int]:
    """Returns the GPUs that are then chosen."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(ranks, "size", lambda: size)
    monkeypatch.setattr(ranks, "local_size", lambda: local_size)
    monkeypatch.setattr(ranks, "local_rank", lambda: local_rank)
    return chosen


# ---- how many processes


@pytest.mark.parametrize(("gpus", "device_id", "expected"), [(0, 0, 2), (0, -1, 2), (4, 0, 4), (4, -1, 2), (1, 0, 1)])
def test_as_many_processes_as_gpus(gpus: int, device_id: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpus)
    args = make_args(distributed_world_size=0, device_id=device_id)
    assert take_place(args) is None
    assert args.distributed_world_size == expected


def test_a_launcher_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(LAUNCHERS, ("2", "3", "0", "1", "node7", "29400"), strict=False):
        monkeypatch.setenv(name, value)
    for args in (make_args(), make_args(distributed_world_size=3), make_args(distributed_world_size=0)):
        place = take_place(args)
        assert place is not None
        assert (place.rank, args.distributed_world_size) == (2, 3)
        assert "distributed_world_size" in args.given  # as if it had been given: it is what the run has
    with pytest.raises(InputError, match="--distributed_world_size=2, but the launcher has started 3 processes"):
        take_place(make_args(distributed_world_size=2))


def test_how_processes_talk(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpus=0)
    assert backend(make_args()) == "gloo"
    machine(monkeypatch, gpus=2)
    assert backend(make_args()) == "nccl"
    assert backend(make_args(distributed_backend="gloo")) == "gloo"
    assert backend(make_args(device_id=-1)) == "gloo"


# ---- which device


@pytest.mark.parametrize(
    ("gpus", "mps", "flags", "expected"),
    [
        (0, False, {}, "cpu"),
        (0, False, {"device_id": -1}, "cpu"),
        (0, True, {}, "mps"),
        (0, True, {"device_id": -1}, "cpu"),
        (2, False, {}, "cuda"),
        (2, True, {"device_id": 1}, "cuda"),
        (2, False, {"device_id": -1}, "cpu"),
    ],
)
def test_the_device(gpus: int, mps: bool, flags: dict, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpus, mps)
    devices = choose_devices(make_args(**flags))
    assert (devices.accelerator, devices.level, devices.precision) == (expected, None, "fp32")


@pytest.mark.parametrize(
    ("gpus", "mps", "flags", "message"),
    [
        (2, False, {"device_id": 2}, "device_id 2: this machine has 2 GPUs"),
        (0, False, {"device_id": 1}, "device_id 1: this machine has no GPU"),
        (0, False, {"amp_opt": "O1"}, "--amp_opt=O1 needs --fp16 or --bf16"),
        (0, True, {"fp16": True}, "not on MPS"),
        (0, True, {"bf16": True}, "not on MPS"),
        (0, False, {"distributed_backend": "nccl"}, "nccl needs GPUs"),
    ],
)
def test_what_the_machine_lacks(
    gpus: int, mps: bool, flags: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, gpus, mps)
    with pytest.raises(InputError, match=message):
        choose_devices(make_args(**flags))


def test_each_process_has_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpus=2)
    for rank in range(2):
        chosen = processes(monkeypatch, size=4, local_size=2, local_rank=rank)
        assert choose_devices(make_args()).accelerator == "cuda"
        assert chosen == [rank]
    for rank in range(3):  # also the first ones say so, not the third alone
        processes(monkeypatch, size=6, local_size=3, local_rank=rank)
        with pytest.raises(InputError, match="3 processes: this machine has 2 GPUs"):
            choose_devices(make_args())


def test_alone_on_its_machine_a_process_has_the_gpu_that_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpus=2)
    chosen = processes(monkeypatch, size=4, local_size=1)
    assert choose_devices(make_args(device_id=1)).index == 1
    assert chosen == [1]
    with pytest.raises(InputError, match="device_id 2: this machine has 2 GPUs"):
        choose_devices(make_args(device_id=2))


# ---- precision


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"fp16": True}, "fp16 O2"),
        ({"bf16": True}, "bf16 O2"),
        ({"fp16": True, "amp_opt": "O1"}, "fp16 O1"),
        ({"bf16": True, "amp_opt": "O3"}, "bf16 O3"),
        ({"fp16": True, "amp_opt": "O0"}, "fp32"),
        ({"amp_opt": "O0"}, "fp32"),
    ],
)
def test_precision_as_asked(flags: dict, expected: str) -> None:
    devices = choose_devices(make_args(device_id=-1, **flags))
    assert devices.precision == expected
    plugin = devices.plugin()
    assert (plugin is None) == (expected == "fp32")
    assert plugin is None or devices.plugin() is not plugin  # it has the state of one training


def test_the_largest_model_in_o2_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    large = ModelConfig(block_size="10_10_10", d_model=1024, d_embed=1024, n_head=16, d_inner=4096)
    for flags in ({}, {"fp16": True, "amp_opt": "O1"}, {"bf16": True}):
        warn_of_diverging(make_args(**flags), large)
    warn_of_diverging(make_args(fp16=True), ModelConfig(block_size="10_10_10"))
    warn_of_diverging(make_args(fp16=True), ModelConfig(block_size="4_4_4", d_model=1024, d_embed=1024, n_head=16))
    assert caplog.messages == []
    warn_of_diverging(make_args(fp16=True), large)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "B10-10-10H1024 with --amp_opt=O2" in record.getMessage()
    assert "--amp_opt=O1" in record.getMessage()


def test_the_trainer_of_one_process() -> None:
    trainer = make_trainer(make_args(device_id=-1), Devices("cpu", -1, "O2", torch.float16), max_epochs=1)
    assert isinstance(trainer.precision_plugin, AmpPrecision)
    assert (trainer.precision_plugin.level, trainer.precision_plugin.device) == ("O2", "cpu")
    assert isinstance(trainer.strategy, SingleDeviceStrategy)
    plain = make_trainer(make_args(device_id=-1), Devices("cpu", -1, None, torch.float16), max_epochs=1)
    assert not isinstance(plain.precision_plugin, AmpPrecision)
