"""The cases that run models on random batches: funnel_forward, funnel_train_step, scaling."""

import argparse
import gc
import math
import sys
from typing import Any

import torch

from .contenders import build, contender, step_of
from .measure import best_matmul, in_own_process, peak_of, take_turns

REFERENCE = "HF funnel fp32"  # whose time over a contender's is its speedup
_CONTENDERS = [
    *("ours fp32", "ours fp32-medium", "ours fp32-tuned", "ours bf16", "ours plain fp32-medium"),
    *("HF funnel fp32", "HF funnel fp32-medium", "BERT fp32", "BERT fp32-medium", "ModernBERT fp32"),
    "torch encoder fp32",
]
# case -> (longest size, who takes part up to there), from short to long: what is slow and large makes room.
_BY_LENGTH: dict[str, list[tuple[float, list[str]]]] = {
    "funnel_forward": [(math.inf, _CONTENDERS)],
    "funnel_train_step": [
        (128, _CONTENDERS),
        (512, ["ours fp32", "ours fp32-tuned", "ours bf16", "HF funnel fp32", "HF funnel fp32-medium", "BERT fp32"]),
        (math.inf, ["ours fp32", "ours fp32-tuned", "HF funnel fp32", "BERT fp32"]),
    ],
    "scaling": [
        (
            2048,
            ["ours fp32-tuned", "ours plain fp32-medium", "HF funnel fp32", "BERT fp32", "torch encoder fp32"],
        ),
        (4096, ["ours fp32-tuned", "BERT fp32", "torch encoder fp32"]),
        (math.inf, ["ours fp32-tuned", "BERT fp32"]),
    ],
}
_MOST_SCORES = 4 << 30  # bytes of scores of one layer; what makes them and needs more is left out


def _prepare(flags: argparse.Namespace, mode: str, sizes: list[str], least: int) -> None:
    flags.mode, flags.least = mode, least
    flags.sizes = flags.sizes or sizes
    flags.longest = max(shape_of(size)[1] for size in flags.sizes)


def prepare_forward(flags: argparse.Namespace) -> None:
    _prepare(flags, "forward", ["8x128", "2x512", "1x2048"], least=3)


def prepare_train_step(flags: argparse.Namespace) -> None:
    _prepare(flags, "train", ["8x128", "2x512", "1x2048"], least=2)


def prepare_scaling(flags: argparse.Namespace) -> None:
    _prepare(flags, "forward", [f"1x{2**i}" for i in range(6, 14)], least=1)
    flags.seconds = min(flags.seconds, 10)


def contenders(size: str, flags: argparse.Namespace) -> list[str]:
    """Who takes part at a size."""
    by_length = _BY_LENGTH[flags.name]
    names = flags.contenders or next(names for most, names in by_length if shape_of(size)[1] <= most)
    return [name for name in names if not too_large(name, size, flags)]


def all_contenders(flags: argparse.Namespace) -> list[str]:
    return list(dict.fromkeys(name for size in flags.sizes for name in contenders(size, flags)))


def shape_of(size: str) -> tuple[int, int]:
    batch, tokens = size.split("x")
    return int(batch), int(tokens)


def too_large(name: str, size: str, flags: argparse.Namespace) -> bool:
    """Whether `name` makes a tensor of all scores of a layer that is too much for a common machine."""
    batch, tokens = shape_of(size)
    makes_scores = any(kind in name for kind in ("HF funnel", "factorized", "plain"))
    return makes_scores and 4 * batch * (flags.width // 64) * 2 * tokens**2 > _MOST_SCORES


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    built = {kind: build(kind, flags) for kind in {contender(name).kind for name in all_contenders(flags)}}
    before = best_matmul(flags.device)
    rows: list[dict[str, Any]] = []
    for size in flags.sizes:
        steps = {
            str(who): step_of(built[who.kind], who, shape_of(size), flags.mode, flags)
            for who in map(contender, contenders(size, flags))
        }
        for name, times in take_turns(steps, flags.reps, flags.seconds, least=flags.least).items():
            print(f"{size}  {name}: {times['cpu_s']:.3f} CPU s", file=sys.stderr, flush=True)
            flops = built[contender(name).kind].flops(*shape_of(size), training=flags.mode == "train")
            rows.append({"size": size, "tokens": shape_of(size)[1], "contender": name, "gflop": flops / 1e9, **times})
        del steps
        gc.collect()
    after = best_matmul(flags.device)
    best = {name: {clock: max(before[name][clock], after[name][clock]) for clock in before[name]} for name in before}
    del built
    if not flags.no_memory:
        peaks = {name: in_own_process([name], flags) for name in all_contenders(flags)}
        for row in rows:
            row |= peaks[row["contender"]][row["size"]]
    for row in rows:
        rate = best[contender(row["contender"]).precision]
        row["of_best"] = 1e9 * row["gflop"] / row["cpu_s"] / rate["cpu"]
        row["of_best_wall"] = 1e9 * row["gflop"] / row["wall_s"] / rate["wall"]
        row["spread"] = (row["cpu_quartiles"][1] - row["cpu_quartiles"][0]) / row["cpu_s"]
        other = next((r for r in rows if r["size"] == row["size"] and r["contender"] == REFERENCE), None)
        row["speedup"] = other["cpu_s"] / row["cpu_s"] if other else None
        row["speedup_wall"] = other["wall_s"] / row["wall_s"] if other else None
    return {"best_matmul_flop_per_s": best, "rows": rows}


def profile(flags: argparse.Namespace) -> None:
    """Print in which of torch's operators each contender spends its CPU time, in its second step of each size."""
    for size in flags.sizes:
        for who in map(contender, contenders(size, flags)):
            step = step_of(build(who.kind, flags), who, shape_of(size), flags.mode, flags)
            step()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
                step()
            print(f"{size}  {who}")
            print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=45))


def child(flags: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Peak memory of one contender at every size, from the smallest on, its weights' gradients there already."""
    who = contender(flags.child[0])
    built = build(who.kind, flags)
    peaks = {}
    for size in sorted(flags.sizes, key=lambda size: (shape_of(size)[1], shape_of(size)[0])):
        if str(who) in contenders(size, flags):
            peaks[size] = peak_of(step_of(built, who, shape_of(size), flags.mode, flags), flags.device)
    return peaks
