#!/usr/bin/env python
"""LSG attention against full attention, Longformer and BigBird: time and memory, forward and training steps.

    .venv/bin/python benchmarks/lsg.py --out exp/benchmark-lsg                      # hours: base models, 12 layers
    .venv/bin/python benchmarks/lsg.py --sizes 1x4096 --layers 3 --lengths --reps 3   # minutes

Times are taken in one process in which the contenders take turns, so that what disturbs the machine disturbs all; the
least is reported, wall and CPU. Peak memory is that of a process of its own for each contender, size and mode. Weights
are random; the vocabulary is in proportion to the layers, so that the embeddings have their share of a whole model.
"""

import argparse
import gc
import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

OURS = {"lsg 256/0": (256, 0, 2), "lsg 128/128": (128, 128, 2), "lsg 32/32": (32, 32, 4)}  # block, sparse block, factor
CONTENDERS = ("sdpa", "eager", "longformer", "bigbird", *OURS)
MODES = ("forward", "train")
MIB = 2**20


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["1x4096", "4x4096", "1x16384"], help="batch x tokens")
    parser.add_argument("--lengths", nargs="*", type=int, default=[2**i for i in range(9, 16)], help="of the plot")
    parser.add_argument("--contenders", nargs="*", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=MODES)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument(
        "--dropout", type=float, default=0.1, help="of attention weights and hidden states, in training"
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--max_gib", type=float, default=16.0, help="skip what needs more for attention scores alone")
    parser.add_argument("--out", type=Path, default=Path("exp/benchmark-lsg"))
    parser.add_argument("--memory_of", nargs=3, metavar=("CONTENDER", "SIZE", "MODE"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def shape_of(size: str) -> tuple[int, int]:
    batch, tokens = size.split("x")
    return int(batch), int(tokens)


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
            _wait(flags)

        return step
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)

    def train_step() -> None:
        F.cross_entropy(model(**inputs).logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        _wait(flags)

    return train_step


def _wait(flags: argparse.Namespace) -> None:
    if flags.device != "cpu":
        torch.cuda.synchronize()


def too_large(name: str, size: str, mode: str, flags: argparse.Namespace) -> bool:
    """Whether the scores of full attention are: in training those of all layers; sdpa makes them where it drops out."""
    makes_scores = name == "eager" or (name == "sdpa" and mode == "train" and flags.dropout and flags.device == "cpu")
    batch, tokens = shape_of(size)
    kept = 3 * flags.layers if mode == "train" else 2
    return bool(makes_scores) and 4 * batch * flags.heads * tokens**2 * kept > flags.max_gib * 2**30


# ---- measuring


def take_turns(steps: dict[str, Any], reps: int) -> dict[str, dict[str, Any]]:
    """Wall and CPU seconds of each step, in rounds; the first round does not count."""
    taken: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in steps}
    for turn in range(reps + 1):
        for name, step in steps.items():
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            if turn:
                taken[name]["wall"].append(time.perf_counter() - wall)
                taken[name]["cpu"].append(time.process_time() - cpu)
    return {
        name: {
            "wall_s": min(t["wall"]),
            "cpu_s": min(t["cpu"]),
            "wall_median_s": statistics.median(t["wall"]),
            "all": t,
        }
        for name, t in taken.items()
    }


def time_models(size: str, mode: str, flags: argparse.Namespace) -> list[dict[str, Any]]:
    names = [name for name in flags.contenders if not too_large(name, size, mode, flags)]
    steps = {name: step_of(build(name, shape_of(size)[1], flags), size, mode, flags) for name in names}
    rows = [{"contender": name, "size": size, "mode": mode} | t for name, t in take_turns(steps, flags.reps).items()]
    del steps
    gc.collect()
    for row in rows:
        row |= memory_in_own_process(row["contender"], size, mode)
    return rows


def memory_in_own_process(name: str, size: str, mode: str) -> dict[str, float]:
    arguments = [argument for argument in sys.argv[1:] if argument != "--memory_of"]
    command = [sys.executable, __file__, *arguments, "--memory_of", name, size, mode]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def memory(name: str, size: str, mode: str, flags: argparse.Namespace) -> dict[str, float]:
    """MiB after the model was built, and at the peak of one step: resident memory, or the GPU's."""
    step = step_of(build(name, shape_of(size)[1], flags), size, mode, flags)
    if flags.device != "cpu":
        built = torch.cuda.memory_allocated()
        step()
        return {"built_mib": built / MIB, "peak_mib": torch.cuda.max_memory_allocated() / MIB}
    with open("/proc/self/statm", encoding="ascii") as handle:
        built = int(handle.read().split()[1]) * resource.getpagesize()
    step()
    return {"built_mib": built / MIB, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


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
            _wait(flags)

        return step

    def both(function: Any) -> Any:
        def step() -> None:
            leaves = [x.detach().requires_grad_() for x in inputs]
            function(*(x.transpose(1, 2) for x in leaves)).backward(weight)
            _wait(flags)

        return step

    rows = []
    for mode, make in (("core forward", forward), ("core forward+backward", both)):
        times = take_turns({name: make(function) for name, function in functions.items()}, flags.reps)
        rows += [{"contender": name, "size": size, "mode": mode} | taken for name, taken in times.items()]
    return rows


# ---- results


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: each size and mode, against Longformer where it takes part, else against the first."""
    lines = ["| size | mode | contender | wall s | CPU s | times faster | peak MiB | of its memory |", "|" + "---|" * 8]
    for size, mode in dict.fromkeys((row["size"], row["mode"]) for row in rows):
        group = [row for row in rows if (row["size"], row["mode"]) == (size, mode)]
        other = next((row for row in group if row["contender"] == "longformer"), group[0])
        for row in group:
            peak, share = "", ""
            if "peak_mib" in row:
                peak, share = f"{row['peak_mib']:.0f}", f"{row['peak_mib'] / other['peak_mib']:.2f}"
            times = f"{row['wall_s']:.3f} | {row['cpu_s']:.3f} | {other['cpu_s'] / row['cpu_s']:.2f}"
            lines.append(f"| {size} | {mode} | {row['contender']} | {times} | {peak} | {share} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time and memory of a forward pass against the length, both axes logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = zip(figure.subplots(1, 2), (("cpu_s", "seconds of CPU"), ("peak_mib", "peak MiB")), strict=True)
    for axes, (key, label) in panels:
        for name in dict.fromkeys(row["contender"] for row in rows):
            points = [(shape_of(row["size"])[1], row[key]) for row in rows if row["contender"] == name]
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axes.set_xticks(ticks := sorted({shape_of(row["size"])[1] for row in rows}), [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def slope(rows: list[dict[str, Any]], name: str) -> float:
    """The power of the length with which the CPU time grows from 2,048 tokens on (least squares of logarithms)."""
    points = [(shape_of(row["size"])[1], row["cpu_s"]) for row in rows if row["contender"] == name]
    logs = [(math.log(tokens), math.log(seconds)) for tokens, seconds in points if tokens >= 2048]
    if len(logs) < 2:
        return math.nan
    x, y = (statistics.fmean(column) for column in zip(*logs, strict=True))
    return sum((a - x) * (b - y) for a, b in logs) / sum((a - x) ** 2 for a, _ in logs)


def main() -> None:
    flags = parse()
    if flags.threads:
        torch.set_num_threads(flags.threads)
    if flags.memory_of:
        name, size, mode = flags.memory_of
        print(json.dumps(memory(name, size, mode, flags)))
        return
    flags.out.mkdir(parents=True, exist_ok=True)
    about = {key: str(value) for key, value in vars(flags).items()}
    about |= {
        "torch": torch.__version__,
        "processor": platform.processor(),
        "torch_threads": str(torch.get_num_threads()),
    }
    results: dict[str, Any] = {"about": about, "sizes": [], "lengths": []}

    def keep(part: str, rows: list[dict[str, Any]]) -> None:
        results[part] += rows
        (flags.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(table(rows), flush=True)

    for size in flags.sizes:
        keep("sizes", time_cores(size, flags))
        for mode in flags.modes:
            keep("sizes", time_models(size, mode, flags))
    for length in flags.lengths:
        keep("lengths", time_models(f"1x{length}", "forward", flags))
    if flags.lengths:
        plot(results["lengths"], flags.out / "lengths.png")
        for name in OURS:
            print(f"{name}: time grows with the length to the power of {slope(results['lengths'], name):.2f}")
    (flags.out / "table.md").write_text(table(results["sizes"]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
