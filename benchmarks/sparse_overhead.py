"""What masks cost in training, and what they save on disk.

    python benchmarks/sparse_overhead.py --out benchmarks/results/sparse_overhead.json

Steps of a dense and of a sparse BERT are taken in turn, on the same batches, so that what else the machine does hits
both; the overhead is the median over the pairs of the ratio of their process CPU times (wall times stand beside it). On
a busy machine that ratio is noisy, so masking is also timed alone. A RigL update is timed by itself and shared out over
the steps between two updates.
"""

import argparse
import copy
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from funneltfm.sparse.config import SparsityConfig
from funneltfm.sparse.export import write_compact
from funneltfm.sparse.masks import attach, densities, keep_masks, sparse_weights, zero_off
from funneltfm.training.sparsity import Held, RigL


def make_model(args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=args.vocab_size, hidden_size=args.hidden, num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // 64), intermediate_size=4 * args.hidden,
    )  # fmt: skip
    return BertForMaskedLM(config)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.01, fused=True)


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of this process's CPU, and of the clock."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def overhead(args: argparse.Namespace) -> dict[str, Any]:
    dense, sparse = make_model(args), make_model(args)
    attach(sparse, config_of(args))
    optimizers = {"dense": adamw(dense), "sparse": adamw(sparse)}
    keep_masks(optimizers["sparse"], sparse_weights(sparse))
    models = {"dense": dense.train(), "sparse": sparse.train()}
    batches = torch.randint(1, args.vocab_size, (args.pairs + 2, args.batch, args.length))

    def step(name: str, ids: torch.Tensor) -> None:
        optimizers[name].zero_grad()
        models[name](input_ids=ids, labels=ids).loss.backward()
        optimizers[name].step()

    rows: dict[str, list[tuple[float, float]]] = {"dense": [], "sparse": []}
    for number, ids in enumerate(batches):
        order = ("dense", "sparse") if number % 2 else ("sparse", "dense")
        for name in order:
            rows[name].append(timed(lambda name=name, ids=ids: step(name, ids)))
    pairs = list(zip(rows["dense"][2:], rows["sparse"][2:], strict=True))  # the first two warm up
    ratios = [[s[i] / d[i] - 1 for d, s in pairs] for i in range(2)]
    step_cpu = statistics.median(d[0] for d, _ in pairs)
    masking_cpu = masking(sparse, args)
    update_cpu = {scope: rigl_update(sparse, optimizers["sparse"], args, scope) for scope in ("layer", "global")}
    return {
        "step_dense_cpu_s": step_cpu,
        "step_dense_wall_s": statistics.median(d[1] for d, _ in pairs),
        "overhead_cpu": statistics.median(ratios[0]),
        "overhead_cpu_quartiles": statistics.quantiles(ratios[0], n=4),
        "overhead_wall": statistics.median(ratios[1]),
        "masking_alone_cpu_s": masking_cpu,
        "masking_alone_overhead_cpu": masking_cpu / step_cpu,
        "rigl_update_cpu_s": update_cpu,
        "rigl_overhead_cpu": {scope: seconds / args.every / step_cpu for scope, seconds in update_cpu.items()},
    }


def masking(model: nn.Module, args: argparse.Namespace) -> float:
    """CPU seconds of masking every gradient and every weight once, the median of the pairs' number."""
    weights = sparse_weights(model)

    def work() -> None:
        for weight in weights:
            assert weight.weight.grad is not None
            zero_off(weight.weight.grad, weight.mask)
            zero_off(weight.weight, weight.mask)

    return statistics.median(timed(work)[0] for _ in range(args.pairs))


def rigl_update(model: nn.Module, optimizer: torch.optim.Optimizer, args: argparse.Namespace, scope: Any) -> float:
    """CPU seconds of one update, the median of three."""
    ids = torch.randint(1, args.vocab_size, (1, args.length))
    held = [Held(weight, weight.weight) for weight in sparse_weights(model)]
    rigl = RigL(config_of(args), every=1, begin=0, end=10**6, scope=scope)
    rigl.last = 10**6
    seconds = []
    for number in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        seconds.append(timed(lambda number=number: rigl.update(number + 1, held, optimizer))[0])
    return statistics.median(seconds)


def config_of(args: argparse.Namespace) -> SparsityConfig:
    return SparsityConfig(sparsity=args.sparsity, embeddings=True, count="model")


def sizes(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes of the whole model on disk: dense, and compact with values of both types."""
    model = make_model(args)
    dense = copy.deepcopy(model)
    attach(model, config_of(args))
    with tempfile.TemporaryDirectory() as folder:
        save_model(dense, str(Path(folder, "dense")))
        found: dict[str, Any] = {"dense_fp32": Path(folder, "dense").stat().st_size}
        for values in ("fp32", "fp16"):
            write_compact(model, Path(folder, values), values)  # type: ignore[arg-type]
            found[values] = Path(folder, values).stat().st_size
    ratios = {f"{values}_times_smaller": found["dense_fp32"] / found[values] for values in ("fp32", "fp16")}
    return found | ratios | {"model_sparsity": 1 - densities(model).model.mask_density}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value, text in (
        ("hidden", 256, "hidden size of the BERT"),
        ("layers", 4, "its layers"),
        ("vocab_size", 8000, "its vocabulary"),
        ("batch", 8, "sentences in a batch"),
        ("length", 128, "tokens in a sentence"),
        ("pairs", 20, "pairs of steps"),
        ("every", 100, "steps between two RigL updates"),
        ("threads", 1, "threads of torch"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default {value})")
    parser.add_argument("--sparsity", type=float, default=0.8, help="of the whole model (default 0.8)")
    parser.add_argument("--out", type=Path, help="a JSON file for the result; it is printed in any case")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {
        "benchmark": "sparse_overhead",
        "settings": {name: value for name, value in vars(args).items() if name != "out"},
        "machine": {"cpu": cpu_name(), "torch": torch.__version__, "python": platform.python_version()},
        "overhead": overhead(args),
        "sizes": sizes(args),
    }
    text = json.dumps(result, indent=2)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")
    print(text)


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
