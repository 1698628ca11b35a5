#!/usr/bin/env python
"""Sparse against dense masked language modelling at the size of a CPU, cell by cell.

    python benchmarks/sparse_replication.py --data_dir DATA                      # all cells: hours on a CPU
    python benchmarks/sparse_replication.py --data_dir DATA 'bert-*_80-*-0' 'bert-dense-*-0'
    python benchmarks/sparse_replication.py --table                              # of what is finished

DATA has wikitext-2/wiki.{train,test}.tokens. A cell is MODEL-ARM-RECIPE-SEED: bert or funnel; dense, or static,
rescaled (static, weights rescaled at the start), rigl_2021 (as the original did it), rigl (as its paper), gradual,
gradual_global (the matrices compete), each _80 or _90; plain, kd, onecycle, kd_onecycle; 0, 1, 2. The cells are the
experiments replication-* of `funneltfm run`, with the teacher of a model trained before its first cell with kd. They
are run in this process, which saves each the seconds that one takes to start. What is finished is skipped, and what
another process is at work on is left to it, so the command may be called for any cells at any time.

Of the finished cells the table gives the perplexity on the test text (mean and spread over seeds), and over the
seeds that both have:
  R_recipe   perplexity / that of the plain dense model    (what the original reported)
  R_equal    perplexity / that of the dense model with the same recipe
"""

import argparse
import fnmatch
import json
import logging
import platform
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sparse_overhead import cpu_name

from funneltfm.cli.main import main as funneltfm
from funneltfm.data.sources import open_rows
from funneltfm.errors import InputError, Stopped
from funneltfm.experiments.registry import Experiments
from funneltfm.experiments.runner import Busy, Runner, Settings
from funneltfm.files import atomic_path, read_json

PREFIX = "replication-"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SMOKE: dict[str, dict[str, Any]] = {  # sizes of a test of the code
    "bert": {
        "additional_config_kwargs": [
            *("hidden_size=32", "num_hidden_layers=1", "num_attention_heads=2", "intermediate_size=64"),
            "max_position_embeddings=64",
        ]
    },
    "funnel": {
        "additional_config_kwargs": [
            *("block_size=1_1", "d_model=32", "d_embed=32", "n_head=2", "d_head=16", "d_inner=64", "decoder_size=1")
        ]
    },
}
Cells = dict[tuple[str, str, str], dict[int, float]]  # (model, arm, recipe) -> perplexity by seed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", default=["*"], help="cells by name, or globs")
    parser.add_argument("--data_dir", default="data", help="folder with wikitext-2 in it (default data)")
    parser.add_argument("--output_dir", default="outputs/replication", help="of the runs (default outputs/replication)")
    parser.add_argument("--steps", type=int, default=1200, help="of a cell; a teacher takes three times as many")
    parser.add_argument("--vocab_size", type=int, default=4000, help="pieces of the vocabulary (default 4000)")
    parser.add_argument("--accelerator", default="cpu", help="as of funneltfm train (default cpu)")
    parser.add_argument("--smoke", action="store_true", help="tiny models on a little text: a test of the code")
    parser.add_argument("--keep", action="store_true", help="keep the models of cells, not scores alone")
    parser.add_argument("--table", action="store_true", help="run nothing: the table of what is finished")
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    args = parser.parse_args()
    try:
        experiments = Experiments()
        if not args.table:
            make_vocabulary(args)
            for name in chosen(experiments, args.cells):
                try:
                    run(experiments, name, args)
                except Busy as error:
                    logging.warning("%s is left out: %s", name, error)
        result = report(experiments, args)
    except (InputError, OSError) as error:
        print(f"sparse_replication: error: {error}", file=sys.stderr)
        return 1
    except Stopped as stop:
        print(f"\nsparse_replication: stopped. {stop}", file=sys.stderr)
        return 128 + stop.signum
    print(result["table"])
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def chosen(experiments: Experiments, patterns: list[str]) -> list[str]:
    """Experiments by the names of cells or globs of them."""
    names = [name for name in experiments.names if name.startswith(PREFIX)]
    found: dict[str, None] = {}
    for pattern in patterns:
        matches = fnmatch.filter(names, PREFIX + pattern)
        if not matches:
            raise InputError(f"there is no cell {pattern!r}; the first of {len(names)} is {names[0][len(PREFIX) :]}.")
        found |= dict.fromkeys(matches)
    return list(found)


def parts(name: str) -> tuple[str, str, str, int]:
    """Model, arm, recipe and seed of a cell."""
    model, arm, recipe, seed = name.removeprefix(PREFIX).split("-")
    return model, arm, recipe, int(seed)


def make_vocabulary(args: argparse.Namespace) -> None:
    """WordPiece of the training text, as BERT's, unless it is there."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    path = Path(args.output_dir, "replication", "vocab.txt")
    if path.is_file():
        return
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=args.vocab_size, special_tokens=list(SPECIAL), show_progress=False)
    rows = open_rows(str(Path(args.data_dir, "wikitext-2", "wiki.train.tokens")))
    tokenizer.train_from_iterator((row["text"].replace("<unk>", "[UNK]") for row in rows), trainer)
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{piece}\n" for piece, _ in pieces), encoding="utf-8")


def run(experiments: Experiments, name: str, args: argparse.Namespace) -> None:
    """One cell, and before it its teacher where it has one."""
    model, arm, recipe, _ = parts(name)
    if recipe.startswith("kd"):
        train(experiments, f"replication_teacher-{model}", 3 * args.steps, {}, args)
    moves = arm.startswith(("rigl", "gradual"))
    train(experiments, name, args.steps, {"sparsity_interval": max(1, args.steps // 40)} if moves else {}, args)
    if not args.keep:
        shutil.rmtree(Path(args.output_dir, "pre_trained_models", name), ignore_errors=True)


def train(experiments: Experiments, name: str, steps: int, more: Mapping[str, Any], args: argparse.Namespace) -> None:
    overrides: dict[str, Any] = {"max_steps": steps, "accelerator": args.accelerator, **more}
    if args.smoke:
        overrides |= {"train_shard_dataset": 100, "test_shard_dataset": 200, **SMOKE[name.split("-")[1]]}
    settings = Settings(data_dir=args.data_dir, output_dir=args.output_dir, overrides={"": overrides})
    Runner(experiments, settings, run_in_process).execute(experiments.get(name))


def run_in_process(words: Sequence[str], keep: Sequence[int] = ()) -> int:
    """Run `funneltfm WORDS` here; its exit code. Raises Stopped where a signal ended it."""
    code = funneltfm(words)
    if code > 128:
        raise Stopped(code - 128, "The same command begins with the cell that was cut short.")
    return code


# ---- the table


def finished(experiments: Experiments, output: Path) -> tuple[Cells, dict[str, dict[str, Any]]]:
    """Perplexities of the finished cells, and the results of every cell. Raises InputError where cells have not the
    same number of steps.
    """
    cells: Cells = {}
    results: dict[str, dict[str, Any]] = {}
    for name in chosen(experiments, ["*"]):
        path = output / "runs" / name / "results.json"
        if path.is_file():
            model, arm, recipe, seed = parts(name)
            results[name] = read_json(path, "the results of")
            cells.setdefault((model, arm, recipe), {})[seed] = results[name]["test"]["masked_lm/perplexity"]
    if len({one["steps"] for one in results.values()}) > 1:
        steps = {name: one["steps"] for name, one in results.items()}
        raise InputError(f"the cells in {output} have not the same number of steps: {steps}. Use one folder for each.")
    return cells, results


def ratio(cells: Cells, cell: tuple[str, str, str], other: tuple[str, str, str]) -> dict[str, Any] | None:
    """Mean perplexity of a cell / that of another, over the seeds that both have, and the spread of their ratios."""
    seeds = sorted(cells[cell].keys() & cells.get(other, {}).keys())
    if not seeds:
        return None
    value = statistics.fmean(cells[cell][s] for s in seeds) / statistics.fmean(cells[other][s] for s in seeds)
    each = [cells[cell][s] / cells[other][s] for s in seeds]
    return {"ratio": value, "spread": statistics.stdev(each) if len(each) > 1 else None, "seeds": len(seeds)}


def table_rows(cells: Cells) -> list[dict[str, Any]]:
    """One row for each (model, arm, recipe)."""
    rows = []
    for cell, by_seed in cells.items():
        model, arm, recipe = cell
        values = list(by_seed.values())
        rows.append(
            {
                "model": model,
                "arm": arm,
                "recipe": recipe,
                "perplexity": statistics.fmean(values),
                "spread": statistics.stdev(values) if len(values) > 1 else None,
                "seeds": len(values),
                "R_recipe": ratio(cells, cell, (model, "dense", "plain")),
                "R_equal": ratio(cells, cell, (model, "dense", recipe)),
            }
        )
    return rows


def as_markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| model | arm | recipe | seeds | perplexity | R_recipe | R_equal |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        ratios = [_pm(one["ratio"], one["spread"], 3) if (one := row[name]) else "" for name in _RATIOS]
        cells = [row["model"], row["arm"], row["recipe"], str(row["seeds"]), _pm(row["perplexity"], row["spread"], 2)]
        lines.append("| " + " | ".join(cells + ratios) + " |")
    return "\n".join(lines)


_RATIOS = ("R_recipe", "R_equal")


def _pm(value: float, spread: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if spread is None else f" +- {spread:.{digits}f}")


def report(experiments: Experiments, args: argparse.Namespace) -> dict[str, Any]:
    cells, results = finished(experiments, Path(args.output_dir))
    rows = table_rows(cells)
    first = next(iter(results.values()), {})
    return {
        "benchmark": "sparse_replication",
        "settings": {"steps": first.get("steps"), "vocab_size": args.vocab_size, "smoke": args.smoke},
        "machine": {
            "cpu": cpu_name(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "rows": rows,
        "cells": {
            name: {key: one[key] for key in ("steps", "train_seconds", "test", "density") if key in one}
            for name, one in results.items()
        },
        "table": as_markdown(rows),
    }


if __name__ == "__main__":
    sys.exit(main())
