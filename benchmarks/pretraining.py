#!/usr/bin/env python
"""What pretraining is worth: a small Funnel pretrained on wikitext-2 by ELECTRA and by masked words at equal compute,
then finetuned on CoLA and SST-2 beside the same model from scratch, several seeds each.

    .venv/bin/python benchmarks/pretraining.py --data DATA --out exp/pretraining --results benchmarks/results
    .venv/bin/python benchmarks/pretraining.py --data DATA --out exp/short --steps 600 --rows 20000   # half of that
    .venv/bin/python benchmarks/pretraining.py --data DATA --out exp/smoke --smoke                    # two minutes

DATA holds wikitext-2/, CoLA/ and SST-2/. Equal compute are equal FLOPs of all matrix products of the training steps,
forward and backward, counted on a batch of each; masked words get as many more steps as their step is cheaper. What was
measured of time goes into the result too. Stages that are finished are skipped, a run that was stopped goes on: start
the same command again. The result is printed, and written into --out and, with --results, into that folder.
"""

import argparse
import datetime
import platform
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import funneltfm
from funneltfm.cli.main import main as command
from funneltfm.data.text import TextEncoder
from funneltfm.files import read_json, write_json, write_text
from funneltfm.tasks.base import Collate, Prepare, make_tasks
from funneltfm.training.model_source import load_tokenizer, make_heads
from funneltfm.training.task_module import TaskModule
from funneltfm.training.train import load_splits
from funneltfm.training.train_config import make_train_args

PIPELINES = {"electra": "token_detection_and_masked_lm", "mlm": "masked_lm"}
TASKS = {"CoLA": "mcc", "SST-2": "accuracy"}
FILES = (
    "wikitext-2/wiki.train.tokens",
    "wikitext-2/wiki.valid.tokens",
    *(f"{t}/{s}.tsv" for t in TASKS for s in ("train", "dev")),
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with wikitext-2, CoLA and SST-2")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--results", type=Path, help="folder for the dated result, benchmarks/results")
    parser.add_argument("--smoke", action="store_true", help="so small that it shows nothing but that all stages work")
    for name, value, text in (
        ("steps", 1200, "steps of ELECTRA"),
        ("batch", 32, "blocks in a batch"),
        ("length", 128, "tokens in a block"),
        ("vocab_size", 8000, "pieces of the tokenizer"),
        ("d_model", 128, "width of the model"),
        ("cola_epochs", 5, "epochs of finetuning on CoLA"),
        ("sst2_epochs", 1, "epochs of finetuning on SST-2"),
        ("threads", 2, "threads of torch"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default {value})")
    parser.add_argument(
        "--rows", type=int, help="of the training data of CoLA and SST-2, the first so many (default: all)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of finetuning (default 1 2 3)")
    parser.add_argument("--pretrain_lr", type=float, default=1e-3, help="default 1e-3")
    parser.add_argument("--finetune_lr", type=float, default=3e-4, help="default 3e-4, the same for all three")
    args = parser.parse_args()
    if missing := [name for name in FILES if not (args.data / name).is_file()]:
        parser.error(f"--data {args.data} has no {', '.join(missing)}")
    if args.smoke:
        small = {"steps": 4, "batch": 4, "length": 32, "vocab_size": 1000, "d_model": 32, "cola_epochs": 1, "rows": 64}
        vars(args).update(small | {"seeds": args.seeds[:2]})
    return args


# ---- pretraining


def pretraining_flags(args: argparse.Namespace, objective: str, steps: int) -> dict[str, Any]:
    d, corpus = args.d_model, args.data / "wikitext-2"
    flags: dict[str, Any] = {
        "pipeline": PIPELINES[objective],
        "name": objective,
        "output_dir": str(args.out),
        "model": "funnel",
        "additional_config_kwargs": (
            *("block_size=2_2_2", "decoder_size=1", f"d_model={d}", f"d_embed={d}", "n_head=2", f"d_head={d // 2}"),
            *(f"d_inner={4 * d}", "separate_cls=true", "pool_q_only=true", "truncate_seq=true"),
        ),
        "pre_trained_tokenizer": str(args.out / "tokenizer"),
        "train_dataset": (str(corpus / "wiki.train.tokens"),),
        "test_dataset": str(corpus / "wiki.valid.tokens"),  # scored once, by the last model
        "packing": True,
        "across_documents": True,
        "tokenized_dir": str(args.out / "tokenized"),
        "max_sequence_length": args.length,
        "batch_size": args.batch,
        "max_steps": steps,
        "learning_rate": args.pretrain_lr,
        "weight_decay": 0.01,
        "num_warmup_steps": 0.1,
        "gradient_clip_val": 1.0,
        "checkpoint_interval": max(1, steps // 10),
        "save_total_limit": 0,
        "log_every_n_steps": max(1, steps // 60),
    }
    if args.smoke:
        flags["limit_test_batches"] = 2
    return flags | ({"embedding_sharing": "gdes", "generator_size": 0.5} if objective == "electra" else {})


def step_flops(args: argparse.Namespace, objective: str) -> int:
    """FLOPs of one training step, forward and backward."""
    train_only = {"test_dataset": None, "limit_test_batches": None}
    flags = make_train_args(**pretraining_flags(args, objective, 1) | train_only)
    tasks = make_tasks(flags.pipeline, flags)
    tokenizer = load_tokenizer(flags, tasks)
    text = TextEncoder(tokenizer, args.length)
    features = load_splits(flags, tasks, text)[0]["train"].features
    prepare = Prepare(tasks, text, seed=0)
    batch = Collate(tasks, tokenizer)([prepare(features[i], 0) for i in range(args.batch)])
    module = TaskModule(make_heads(flags, tasks, tokenizer), tasks, flags, {})
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused kernels are not counted
        (task,) = tasks
        seen, hidden = module.encode(tasks, batch)
        losses = task.losses(task.logits(module.heads.models[task.name], hidden, seen), seen)
        torch.stack(list(losses.values())).sum().backward()
    return counter.get_total_flops()


def pretrain(args: argparse.Namespace, objective: str, steps: int) -> dict[str, Any]:
    """One run, gone on with or done already, and its checkpoint as `funneltfm classify` takes it."""
    run = args.out / "runs" / objective
    if not (run / "results.json").is_file():
        fresh = not (args.out / "checkpoints" / objective).is_dir()
        funneltfm.train(
            **pretraining_flags(args, objective, steps), **({"overwrite": True} if fresh else {"resume": True})
        )
    results = read_json(run / "results.json", "the result of the run")
    target = args.out / "pretrained" / objective
    if not (target / "vocab.txt").is_file():
        funneltfm.convert_checkpoint(
            args.out / "pre_trained_models" / objective / "best", target, to="pt", kind="funneltfm", overwrite=True
        )
        shutil.copy(args.out / "tokenizer" / "vocab.txt", target)
    if not (run / "curves.png").is_file():
        command(["curves", str(run)])
    return {name: results[name] for name in ("steps", "train_seconds", "tokens_per_second", "parameters", "test")}


# ---- finetuning


def task_data(args: argparse.Namespace, task: str) -> Path:
    """The folder of a task, or one with the first rows of its training data."""
    source = args.data / task
    if args.rows is None:
        return source
    folder = args.out / "data" / task
    folder.mkdir(parents=True, exist_ok=True)
    lines = (source / "train.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    write_text(folder / "train.tsv", "".join(lines[: args.rows + (task == "SST-2")]))  # which has a header
    shutil.copy(source / "dev.tsv", folder)
    return folder


def finetune(args: argparse.Namespace, start: str, task: str, seed: int) -> float:
    """The score on the dev set, of the best of the validations."""
    run = args.out / "finetuned" / start / task / f"seed_{seed}"
    if not (run / "results.json").is_file():
        d = args.d_model
        if start == "scratch":
            model = {"block_size": "2_2_2", "d_model": d, "d_embed": d, "n_head": 2, "d_head": d // 2, "d_inner": 4 * d}
            model |= {"separate_cls": True, "pool_q_only": True, "truncate_seq": True}
        else:
            model = {"init_ckpt": str(args.out / "pretrained" / start / "model.pt")}
        going_on = (run / "checkpoints" / "last.ckpt").is_file()
        funneltfm.classify(
            **model,
            dataset=task,
            data_dir=str(task_data(args, task)),
            output_dir=str(args.out / "proc_data"),
            tokenizer_path=str(args.out / "tokenizer" / "vocab.txt"),
            model_dir=str(run),
            max_length=64,
            train_bsz=32,
            lr=args.finetune_lr,
            epochs=args.cola_epochs if task == "CoLA" else args.sst2_epochs,
            n_valid=1 if args.smoke else 5,
            n_log_epoch=1,
            seed=seed,
            **({"resume": True} if going_on else {"overwrite": True}),
        )
    return read_json(run / "results.json", "the result of the run")["valid"][TASKS[task]]


# ---- all


def main() -> None:
    args = parse()
    settings = {name: value for name, value in vars(args).items() if name not in ("data", "out", "results")}
    plan = args.out / "settings.json"
    if plan.is_file() and read_json(plan, "the settings of") != settings:
        sys.exit(f"pretraining: {args.out} has runs of other settings ({plan}). Name another --out.")
    write_json(plan, settings)
    torch.set_num_threads(args.threads)
    tokenizer = args.out / "tokenizer"
    if not tokenizer.is_dir():
        texts = str(args.data / "wikitext-2/wiki.train.tokens")
        if command(["train-tokenizer", texts, "-o", str(tokenizer), f"--vocab_size={args.vocab_size}"]):
            sys.exit(1)
    counts = args.out / "flops.json"
    if not counts.is_file():
        write_json(counts, {objective: step_flops(args, objective) for objective in PIPELINES})
    flops = read_json(counts, "the FLOPs of a step")
    steps = {"electra": args.steps, "mlm": round(args.steps * flops["electra"] / flops["mlm"])}
    pretrained = {
        name: {"flops_of_a_step": flops[name], "flops": flops[name] * steps[name]} | pretrain(args, name, steps[name])
        for name in PIPELINES
    }
    scores = {
        task: {start: [finetune(args, start, task, seed) for seed in args.seeds] for start in (*PIPELINES, "scratch")}
        for task in TASKS
    }
    result = {
        "benchmark": "pretraining",
        "settings": settings,
        "machine": {"cpu": cpu_name(), "torch": torch.__version__, "python": platform.python_version()},
        "pretraining": pretrained,
        "finetuning": {
            task: {start: {"metric": TASKS[task], **spread(values)} for start, values in by_start.items()}
            for task, by_start in scores.items()
        },
    }
    write_json(args.out / "result.json", result)
    if args.results:
        write_json(args.results / f"{datetime.date.today()}-pretraining{'-smoke' if args.smoke else ''}.json", result)
    print(table(result))


def spread(values: list[float]) -> dict[str, Any]:
    """Mean and sample standard deviation."""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": std, "scores": values}


def table(result: dict[str, Any]) -> str:
    lines = ["", "| pretraining | steps | PFLOPs | seconds | tokens/s | held out |", "|---|---|---|---|---|---|"]
    for name, run in result["pretraining"].items():
        held = ", ".join(
            f"{score} {run['test'][score]:.3f}"
            for score in ("token_detection/f1", "masked_lm/perplexity")
            if score in run["test"]
        )
        lines.append(
            f"| {name} | {run['steps']} | {run['flops'] / 1e15:.2f} | {run['train_seconds']:.0f} | "
            f"{run['tokens_per_second']:.0f} | {held} |"
        )
    starts = (*PIPELINES, "scratch")
    lines += ["", f"| finetuned, dev set | {' | '.join(starts)} |", "|---" * (len(starts) + 1) + "|"]
    for task, by_start in result["finetuning"].items():
        cells = (f"{by_start[start]['mean']:.4f} +- {by_start[start]['std']:.4f}" for start in starts)
        lines.append(f"| {task} ({TASKS[task]}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
