#!/usr/bin/env python
"""LSG attention against full attention, Longformer and BigBird: time and memory, forward and training steps.

    .venv/bin/python benchmarks/lsg.py                                                # hours: base models, 12 layers
    .venv/bin/python benchmarks/lsg.py --sizes 1x4096 --layers 3 --reps 3             # minutes
    .venv/bin/python benchmarks/lsg.py --sizes --layers 3 --contenders longformer "lsg 128/128"     # the plot alone

Measured as by benchmarks/run.py: contenders take turns in one process, medians of wall and of process CPU time. All is
measured twice: in "fp32", as torch and transformers run by default, then in "fp32-tuned", as our commands run on a CPU
(freed memory kept for the next tensor, products by what torch.set_float32_matmul_precision("medium") takes); not by
turns, for memory that was kept once is hardly ever given back. Ratios are of one precision, but times_default: how many
times as fast by the wall clock as Longformer in fp32, as it runs by default. The plot is of the first of --precisions.
Memory is that of a whole process at its peak (mib), and what of it a pass or step needs above the model (peak_mib); one
process for each contender, in fp32. Weights are random; the vocabulary is in proportion to the layers, so that the
embeddings have their share of a whole model. A table is printed; JSON and a plot against the length go to
benchmarks/results.
"""

import argparse
import gc
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from speed import report
from speed.contenders import precision, wait
from speed.measure import in_own_process, peak_of, take_turns
from speed.models import shape_of
from torch.nn import functional as F

OURS = {"lsg 256/0": (256, 0, 2), "lsg 128/128": (128, 128, 2), "lsg 32/32": (32, 32, 4)}  # block, sparse block, factor
CONTENDERS = ("sdpa", "eager", "longformer", "bigbird", *OURS)
MODES = ("forward", "train")
PRECISIONS = ("fp32", "fp32-tuned")
LONG = 16384  # tokens from which on one round without a warm-up has to do
COLUMNS = {
    "size": "", "mode": "", "contender": "", "precision": "", "wall_s": ".3f", "cpu_s": ".3f", "spread": ".0%",
    "times_wall": ".2f", "times_cpu": ".2f", "times_default": ".2f", "mib": ".0f", "of_memory": ".2f",
    "peak_mib": ".0f", "of_peak": ".2f",
}  # fmt: skip


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["1x4096", "4x4096", "1x16384"], help="batch x tokens")
    parser.add_argument("--lengths", nargs="*", type=int, default=[2**i for i in range(9, 16)], help="of the plot")
    parser.add_argument("--contenders", nargs="*", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=MODES)
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--reps", type=int, default=5, help="rounds, after one that does not count")
    parser.add_argument("--seconds", type=float, default=1e9, help="no new round of a size after these, from the third")
    parser.add_argument("--dropout", type=float, default=0.1, help="of weights and hidden states, in training")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None, help="of torch; default: all cores")
    parser.add_argument("--max_gib", type=float, default=16.0, help="skip what needs more for attention scores alone")
    parser.add_argument("--full_up_to", type=int, default=8192, help="tokens of the plot that full attention is given")
    parser.add_argument("--out", type=Path, help="the JSON file; the plot stands beside it")
    parser.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    flags = parser.parse_args(words)
    flags.words = words[: words.index("--child")] if "--child" in words else words
    return flags


# ---- models


def build(name: str, tokens: int, flags: argparse.Namespace) -> Any:
    """A classifier with random weights. All but the attention, and what Longformer adds to it, is the same."""
    import transformers

    from funneltfm.lsg.models import lsg_config

    shape = {
        "vocab_size": 50265 * flags.layers // 12, "hidden_size": flags.hidden, "num_attention_heads": flags.heads,
        "num_hidden_layers": flags.layers, "intermediate_size": 4 * flags.hidden, "max_position_embeddings": tokens + 2,
        "hidden_dropout_prob": flags.dropout, "attention_probs_dropout_prob": flags.dropout, "pad_token_id": 1,
        "type_vocab_size": 1, "hidden_act": "gelu",
    }  # fmt: skip
    torch.manual_seed(0)
    if name == "longformer":
        config = transformers.LongformerConfig(attention_window=512, **shape)
    elif name == "bigbird":
        config = transformers.BigBirdConfig(block_size=64, num_random_blocks=3, **shape)
    else:
        config = transformers.RobertaConfig(attn_implementation=name if name in ("sdpa", "eager") else None, **shape)
    if name in OURS:
        block, sparse, factor = OURS[name]
        config = lsg_config(config, block_size=block, sparse_block_size=sparse, sparsity_factor=factor)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    return model.to(flags.device, getattr(torch, flags.dtype))


def step_of(model: Any, size: str, mode: str, flags: argparse.Namespace) -> Any:
    """A function that runs one forward pass, or one training step with Adam."""
    ids = torch.randint(3, model.config.vocab_size, shape_of(size), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids.to(flags.device), "attention_mask": torch.ones_like(ids, device=flags.device)}
    labels = torch.zeros(len(ids), dtype=torch.long, device=flags.device)
    model.train(mode == "train")
    if mode == "forward":

        def step() -> None:
            with torch.no_grad():
                model(**inputs)
            wait(flags.device)

        return step
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)

    def train_step() -> None:
        F.cross_entropy(model(**inputs).logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        wait(flags.device)

    return train_step


def too_large(name: str, size: str, mode: str, flags: argparse.Namespace) -> bool:
    """Whether the scores of full attention are: in training those of all layers; sdpa makes them where it drops out,
    and transformers' BigBird makes room for them, layer by layer.
    """
    makes_scores = name in ("eager", "bigbird")
    makes_scores |= name == "sdpa" and mode == "train" and flags.dropout > 0 and flags.device == "cpu"
    batch, tokens = shape_of(size)
    kept = 3 * flags.layers if mode == "train" and name != "bigbird" else 2
    return makes_scores and 4 * batch * flags.heads * tokens**2 * kept > flags.max_gib * 2**30


def of_plot(length: int, flags: argparse.Namespace) -> list[str]:
    """The contenders at a length of the plot."""
    full = () if length <= flags.full_up_to else ("sdpa", "eager")
    return [
        name for name in flags.contenders if name not in full and not too_large(name, f"1x{length}", "forward", flags)
    ]


# ---- measuring


def measured(
    steps: dict[str, Any], size: str, mode: str, reps: int, warmup: int, seconds: float
) -> list[dict[str, Any]]:
    """A row for each step."""
    rows = []
    for name, times in take_turns(steps, reps, seconds, warmup).items():
        print(f"{size}  {mode}  {name}: {times['cpu_s']:.3f} CPU s", file=sys.stderr, flush=True)
        spread = (times["cpu_quartiles"][1] - times["cpu_quartiles"][0]) / times["cpu_s"]
        about = {"size": size, "tokens": shape_of(size)[1], "mode": mode, "contender": name}
        rows.append(about | times | {"spread": spread})
    return rows


def time_models(
    names: list[str], size: str, mode: str, flags: argparse.Namespace, reps: int, warmup: int = 1
) -> list[dict[str, Any]]:
    steps = {name: step_of(build(name, shape_of(size)[1], flags), size, mode, flags) for name in names}
    rows = measured(steps, size, mode, reps, warmup, flags.seconds)
    del steps
    gc.collect()
    return rows


def child(name: str, flags: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Peak memory of one contender, in everything that it is timed in; the training steps come last."""
    steps = [(f"1x{length}", "forward") for length in flags.lengths if name in of_plot(length, flags)]
    steps += [(size, mode) for mode in flags.modes for size in flags.sizes if not too_large(name, size, mode, flags)]
    peaks = {}
    for size, mode in dict.fromkeys(steps):
        step = step_of(build(name, shape_of(size)[1], flags), size, mode, flags)
        peaks[f"{size} {mode}"] = peak_of(step, flags.device)
        del step
    return peaks


def time_cores(size: str, flags: argparse.Namespace) -> list[dict[str, Any]]:
    """The attention alone, between the projections."""
    from funneltfm.lsg.attention import lsg_attention
    from funneltfm.lsg.settings import LSGSettings

    batch, tokens = shape_of(size)
    shape = (batch, tokens + 1, flags.heads, flags.hidden // flags.heads)
    inputs = [torch.randn(shape, dtype=getattr(torch, flags.dtype), device=flags.device) for _ in range(4)]
    weight = inputs.pop()

    def full(query: Any, key: Any, value: Any) -> Any:
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)

    functions = {"sdpa": full} if "sdpa" in flags.contenders else {}
    for name, (block, sparse, factor) in OURS.items():
        if name in flags.contenders:
            settings = LSGSettings(block_size=block, sparse_block_size=sparse, sparsity_factor=factor)
            functions[name] = lambda q, k, v, settings=settings: lsg_attention(q, k, v, settings)

    def forward(function: Any) -> Any:
        def step() -> None:
            with torch.no_grad():
                function(*(x.transpose(1, 2) for x in inputs))
            wait(flags.device)

        return step

    def both(function: Any) -> Any:
        def step() -> None:
            leaves = [x.detach().requires_grad_() for x in inputs]
            function(*(x.transpose(1, 2) for x in leaves)).backward(weight)
            wait(flags.device)

        return step

    rows = []
    for mode, make in (("core forward", forward), ("core forward+backward", both)):
        steps = {name: make(function) for name, function in functions.items()}
        rows += measured(steps, size, mode, flags.reps, 1, flags.seconds)
    return rows


def times_of_sizes(flags: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for size in flags.sizes:
        rows += time_cores(size, flags)
        for mode in flags.modes:
            names = [name for name in flags.contenders if not too_large(name, size, mode, flags)]
            rows += time_models(names, size, mode, flags, flags.reps)
    return rows


def times_of_lengths(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """For the plot: forward passes."""
    rows = []
    for length in flags.lengths:
        rounds = (1, 0) if length >= LONG else (min(3, flags.reps), 1)
        rows += time_models(of_plot(length, flags), f"1x{length}", "forward", flags, *rounds)
    return rows


# ---- results


def compare(rows: list[dict[str, Any]], peaks: dict[str, dict[str, dict[str, float]]]) -> None:
    """Give rows their memory, and how they stand to Longformer, or without it to the first of their kind."""
    for row in rows:
        peak = peaks[row["contender"]].get(f"{row['size']} {row['mode']}")
        if peak:
            row |= peak | {"mib": peak["before_mib"] + peak["peak_mib"]}
    for row in rows:
        same = [r for r in rows if all(r[key] == row[key] for key in ("size", "mode"))]
        name = "longformer" if any(r["contender"] == "longformer" for r in same) else same[0]["contender"]
        others = {r["precision"]: r for r in same if r["contender"] == name}
        other = others[row["precision"]]
        row["times_wall"], row["times_cpu"] = other["wall_s"] / row["wall_s"], other["cpu_s"] / row["cpu_s"]
        row["times_default"] = others["fp32"]["wall_s"] / row["wall_s"] if "fp32" in others else None
        for key, share in (("mib", "of_memory"), ("peak_mib", "of_peak")):
            row[share] = row[key] / other[key] if key in row else None


def slope(rows: list[dict[str, Any]], name: str) -> float | None:
    """The power of the length with which the CPU time grows from 2,048 tokens on (least squares of logarithms)."""
    points = [(row["tokens"], row["cpu_s"]) for row in rows if row["contender"] == name]
    logs = [(math.log(tokens), math.log(seconds)) for tokens, seconds in points if tokens >= 2048]
    if len(logs) < 2:
        return None
    x, y = (statistics.fmean(column) for column in zip(*logs, strict=True))
    return sum((a - x) * (b - y) for a, b in logs) / sum((a - x) ** 2 for a, _ in logs)


def main() -> None:
    flags = parse(sys.argv[1:])
    if flags.threads:
        torch.set_num_threads(flags.threads)
    if flags.child is not None:
        print(json.dumps(child(flags.child[0], flags)))
        return
    rows: list[dict[str, Any]] = []
    lengths: list[dict[str, Any]] = []
    for kind in flags.precisions:
        with precision(kind, flags.device):
            some = times_of_sizes(flags)
            if kind == flags.precisions[0]:
                lengths = times_of_lengths(flags)
        for row in some + lengths:
            row.setdefault("precision", kind)
        rows += some
    peaks = {name: in_own_process([name], flags) for name in flags.contenders}
    compare(rows, peaks)
    compare(lengths, peaks)
    found = {name: slope(lengths, name) for name in flags.contenders}
    powers = {name: power for name, power in found.items() if power is not None}
    print(report.table(rows + lengths, COLUMNS))
    path = report.path_of("lsg", flags)
    report.write(path, "lsg", flags, {"rows": rows, "lengths": lengths, "powers": powers})
    if lengths:
        panels = {"cpu_s": "seconds of CPU", "mib": "MiB of the process at its peak"}
        report.plot(path.with_suffix(".png"), lengths, panels, over="tokens")
        for name, power in powers.items():
            print(f"{name}: time grows with the length to the power of {power:.2f}")
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
