"""FSDP: two processes that each hold half of the weights learn, save and resume what two with whole ones do."""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from funneltfm.errors import InputError
from funneltfm.training import ranks
from funneltfm.training.classify import classify
from funneltfm.training.config import make_args
from funneltfm.training.task_module import TaskModule
from funneltfm.training.train import predict, train
from funneltfm.training.train_config import make_train_args

WORDS = ["the", "cat", "sat", "on", "a", "mat", ".", "one", "bird", "saw", "two", "dogs", "run", "home"]
FUNNEL = {
    "block_size": "1_1", "d_model": 16, "d_embed": 16, "n_head": 2, "d_head": 8, "d_inner": 32,
}  # fmt: skip
# With a large epsilon AdamW does not turn the rounding of a gradient that should be 0 into a step.
RUNS: dict[str, dict[str, Any]] = {
    "mixture": {
        "pipeline": "masked_lm+seq_class", "model": "funnel", "accumulate_grad_batches": 2, "adamw_epsilon": 1e-3,
        "additional_config_kwargs": [*(f"{name}={value}" for name, value in FUNNEL.items()), "decoder_size=1"],
    },
    "electra": {
        "pipeline": "electra", "model": "electra", "embedding_sharing": "gdes", "adamw_epsilon": 1e-3,
        "additional_config_kwargs": [
            "hidden_size=32", "embedding_size=16", "num_hidden_layers=2", "num_attention_heads=4",
            "intermediate_size=64",
        ],
    },
    "albert": {  # one layer, used twice
        "pipeline": "seq_class", "model": "albert", "precision": "bf16-mixed", "adamw_epsilon": 1e-3,
        "additional_config_kwargs": [
            "hidden_size=16", "embedding_size=8", "num_hidden_layers=2", "num_attention_heads=2",
            "intermediate_size=32",
        ],
    },
}  # fmt: skip


class Stop(Exception):
    pass


def flags(folder: Path, name: str, strategy: str) -> dict[str, Any]:
    data = str(folder / "rows.jsonl")
    return {
        "pre_trained_tokenizer": str(folder / "vocab.txt"), "input_columns": ["text"], "train_dataset": [data],
        "valid_dataset": data, "max_epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "gradient_clip_val": 0.5,
        "accelerator": "cpu", "output_dir": str(folder / strategy), "strategy": strategy, "name": name,
        "checkpoint_interval": 4, "max_sequence_length": 16,
    } | RUNS[name]  # fmt: skip


def make_data(folder: Path) -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(3, 9))) for _ in range(41)]
    rows = [{"text": text, "label": "yes" if text.split()[0] < "on" else "no"} for text in texts]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for name, part in (("train", rows[:24]), ("dev", rows[24:])):
        lines = (f"x\t{int(row['label'] == 'yes')}\t\t{row['text']}\n" for row in part)
        (folder / f"{name}.tsv").write_text("".join(lines))
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")


def two(folder: Path) -> None:
    """What each of the two processes does."""
    rank = int(os.environ["RANK"])
    held: dict[str, int] = {}
    seen = TaskModule.training_step

    def training_step(self: TaskModule, batch: Any, batch_idx: int) -> Any:
        states = self.optimizers().optimizer.state.values()
        moments = [state["exp_avg"] for state in states]
        held["here"] = sum(getattr(m, "_local_tensor", m).numel() for m in moments)
        held["all"] = sum(m.numel() for m in moments)
        return seen(self, batch, batch_idx)

    for name in RUNS:
        train(**flags(folder, name, "ddp"))
        train(**flags(folder, name, "fsdp"))
    TaskModule.training_step = training_step  # type: ignore[method-assign]

    def on_train_batch_start(self: TaskModule, batch: Any, batch_idx: int) -> None:
        if self.global_step >= 5:
            raise Stop

    TaskModule.on_train_batch_start = on_train_batch_start  # type: ignore[assignment]
    with contextlib.suppress(Stop):
        train(**flags(folder, "mixture", "fsdp") | {"output_dir": str(folder / "cut")})
    del TaskModule.on_train_batch_start
    train(name="mixture", output_dir=str(folder / "cut"), resume=True)
    (folder / f"held.{rank}.json").write_text(json.dumps(held))
    for strategy in ("ddp", "fsdp"):
        classify(
            dataset="CoLA", data_dir=str(folder), tokenizer_path=str(folder / "vocab.txt"),
            output_dir=str(folder / "processed"), epochs=2, train_bsz=4, lr=1e-2, device_id=-1, strategy=strategy,
            model_dir=str(folder / f"classify-{strategy}"), clip=0.5, **FUNNEL,
        )  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    make_data(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, text
    return folder


def models(root: Path, name: str) -> dict[str, dict[str, torch.Tensor]]:
    """All weights of a run's folders of models."""
    folder = root / "pre_trained_models" / name
    return {str(path.relative_to(folder)): load_file(path) for path in sorted(folder.rglob("*.safetensors"))}


def assert_close(one: dict[str, Any], other: dict[str, Any], atol: float) -> None:
    assert one.keys() == other.keys()
    assert one
    for path in one:
        assert one[path].keys() == other[path].keys()
        for key, tensor in one[path].items():
            torch.testing.assert_close(tensor, other[path][key], atol=atol, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RUNS))
def test_shards_learn_what_whole_weights_do(pair: Path, name: str) -> None:
    assert_close(models(pair / "fsdp", name), models(pair / "ddp", name), atol=1e-5 if name != "albert" else 2e-3)
    one, other = (json.loads((pair / s / "runs" / name / "results.json").read_text()) for s in ("fsdp", "ddp"))
    assert one["steps"] == other["steps"] > 5
    if name != "albert":
        assert one["valid"] == pytest.approx(other["valid"], abs=1e-5)
    vocabulary = {"predict_dataset": str(pair / "rows.jsonl"), "accelerator": "cpu"}
    if name == "albert":
        folder = pair / "fsdp" / "pre_trained_models" / name / "best"
        assert len(predict(pre_trained_model=str(folder), **vocabulary)) == 41


@pytest.mark.slow
def test_each_holds_a_half(pair: Path) -> None:
    held = [json.loads((pair / f"held.{rank}.json").read_text()) for rank in range(2)]
    here, everywhere = ([one[key] for one in held] for key in ("here", "all"))
    assert everywhere[0] == everywhere[1] == sum(here) > 1000
    assert all(0.4 * sum(here) < part < 0.6 * sum(here) for part in here)


@pytest.mark.slow
def test_a_cut_run_ends_bit_equal(pair: Path) -> None:
    assert_close(models(pair / "cut", "mixture"), models(pair / "fsdp", "mixture"), atol=0.0)
    one, other = (json.loads((pair / s / "runs/mixture/results.json").read_text()) for s in ("cut", "fsdp"))
    assert (one["valid"], one["steps"]) == (other["valid"], other["steps"])


@pytest.mark.slow
def test_classify_in_shards(pair: Path) -> None:
    one, other = (torch.load(pair / f"classify-{s}" / "best" / "model.pt", weights_only=True) for s in ("fsdp", "ddp"))
    assert_close({"": one}, {"": other}, atol=1e-4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"precision": "16"}, "fsdp goes with fp32 and bf16"),
        ({"compile": True}, "fsdp does not go with --compile"),
        ({"strategy": "deepspeed"}, "What DeepSpeed shards, fsdp does too"),
    ],
)
def test_what_train_refuses(more: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_train_args(**{"pipeline": "seq_class", "strategy": "fsdp"} | more)


@pytest.mark.parametrize(
    "more", [{"fp16": True}, {"bf16": True}, {"launcher": "ray"}, {"ddp_backend": "apex"}]
)  # the level of bf16 is O2
def test_what_classify_refuses(more: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="--strategy fsdp goes with fp32 weights"):
        make_args(strategy="fsdp", **more)
    make_args(strategy="fsdp", bf16=True, amp_opt="O1")


if __name__ == "__main__":
    with ranks.joined(ranks.find_place(1, 0, None), "gloo"):
        two(Path(sys.argv[1]))
