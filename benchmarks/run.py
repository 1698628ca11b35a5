#!/usr/bin/env python
"""Speed and memory of FunnelTFM beside others, on this machine, in one run.

    python benchmarks/run.py funnel_forward
    python benchmarks/run.py funnel_train_step --sizes 8x128 --contenders "ours fp32-medium" "HF funnel fp32"

Contenders take turns in one process after a warm-up, so that what disturbs the machine disturbs all; medians of wall
and of process CPU time are reported. On a machine that does other work too, trust CPU time, ratios and repetition. Peak
memory, above the weights, is that of a process of its own for each contender. The best matmul rate is measured in the
same run; fractions of it are of the same precision. Precisions: fp32; fp32-medium, which is
torch.set_float32_matmul_precision("medium"); fp32-tuned, which also keeps freed memory, as our commands do; bf16, which
is autocast. A table is printed; JSON and a plot go to
benchmarks/results.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from speed import cases, report


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=cases.CASES)
    parser.add_argument("--sizes", nargs="*", help="batch x tokens, as in 8x128")
    parser.add_argument("--contenders", nargs="*", help="kind and precision; default: as the case has them")
    parser.add_argument("--reps", type=int, default=7, help="rounds in which each takes its turn")
    parser.add_argument("--seconds", type=float, default=40, help="no new round of a size after these")
    parser.add_argument("--no_memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--profile", action="store_true", help="print where the time of model cases goes, no more")
    parser.add_argument("--width", type=int, default=768, help="d_model; heads of 64, d_inner 4 times as wide")
    parser.add_argument("--blocks", default="4_4_4", help="block_size of the Funnels; others have as many layers")
    parser.add_argument("--vocab_size", type=int, default=30522)
    parser.add_argument("--sentences", type=int, default=None, help="of the cases on real text; default: by the case")
    parser.add_argument("--data", type=Path, help="folder of CoLA's train.tsv; default: ../shared/data/CoLA, else the "
                        "built-in sample")  # fmt: skip
    parser.add_argument("--tokenizer", type=Path, help="its vocabulary; default: as for --data")
    parser.add_argument("--threads", type=int, default=None, help="of torch; default: all cores")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="the JSON file; the plot stands beside it")
    parser.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    flags = parser.parse_args(words)
    flags.words = words[: words.index("--child")] if "--child" in words else words
    return flags


def main() -> None:
    flags = parse(sys.argv[1:])
    if flags.threads:
        torch.set_num_threads(flags.threads)
    case = cases.CASES[flags.name]
    case.prepare(flags)
    if flags.child is not None:
        print(json.dumps(case.child(flags)))
        return
    if flags.profile:
        if case.profile is None:
            sys.exit(f"--profile is for {', '.join(name for name, case in cases.CASES.items() if case.profile)}.")
        case.profile(flags)
        return
    result: dict[str, Any] = case.measure(flags)
    path = report.path_of(flags.name, flags)
    print(report.table(result["rows"], case.columns))
    report.write(path, flags.name, flags, result)
    report.plot(path.with_suffix(".png"), result["rows"], case.panels, case.over)
    print(f"\nwritten: {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
