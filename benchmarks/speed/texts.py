"""The cases on real sentences: finetune_epoch, predict_throughput, tokenize."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch

from funneltfm.data.batching import Collator, RunLoader, TokenBudget, epoch_batches, eval_batches, eval_loader
from funneltfm.data.encoding import EncodedSplit, EncodingConfig, encode_examples
from funneltfm.data.readers import DatasetSpec, Example
from funneltfm.data.tokenization import Tokenizer, get_tokenizer
from funneltfm.tasks.classification import Classification
from funneltfm.training.config import make_args
from funneltfm.training.pipeline import Pipeline
from funneltfm.training.setup import choose_devices, make_trainer
from funneltfm.training.speed import matmul_precision

from .contenders import build, freed_memory, net_config, precision
from .measure import AfterFirstStep, Seconds, take_turns

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
BATCH = 16


# ---- sentences


def prepare(flags: argparse.Namespace) -> None:
    cola, vocab = SHARED / "CoLA", SHARED / "tokenizers" / "bert-base-uncased" / "vocab.txt"
    if flags.data is None and cola.is_dir() and vocab.is_file():
        flags.data, flags.tokenizer = cola, flags.tokenizer or vocab
    if flags.data is not None and flags.tokenizer is None:
        raise SystemExit("--data needs --tokenizer, the vocabulary of its words.")
    flags.longest = 128


def read(flags: argparse.Namespace) -> tuple[list[str], Tokenizer]:
    """CoLA's training sentences, or those of the built-in sample."""
    if flags.data is not None:
        lines = (flags.data / "train.tsv").read_text(encoding="utf-8").splitlines()
        return [line.split("\t")[3] for line in lines], get_tokenizer("word_piece", flags.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, ROOT / "data-scripts/make_sample.py", folder], check=True, capture_output=True)
        rows = Path(folder, "train.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(row)["text_a"] for row in rows], get_tokenizer("word_piece", Path(folder, "vocab.txt"))


def encode(texts: list[str], tokenizer: Tokenizer) -> EncodedSplit:
    examples = [Example(str(i), text, None, str(i % 2)) for i, text in enumerate(texts)]
    return encode_examples(examples, ("0", "1"), tokenizer, EncodingConfig())


def part_of_an_epoch(texts: list[str], tokenizer: Tokenizer, wanted: int) -> list[str]:
    """Sentences of `wanted` / 16 batches of an epoch, evenly spaced from the shortest batch to the longest: the lengths
    are those of the whole, and so is how well they can be grouped.
    """
    lengths = encode(texts, tokenizer).lengths
    batches = epoch_batches(lengths, BATCH, seed=0, epoch=0)
    batches = sorted((batch for batch in batches if len(batch) == BATCH), key=lambda batch: lengths[batch].mean())
    count = min(len(batches), max(1, wanted // BATCH))
    chosen = [batches[int((i + 0.5) * len(batches) / count)] for i in range(count)]
    order = np.random.default_rng(0).permutation(np.concatenate(chosen))
    return [texts[i] for i in order]


def about(split: EncodedSplit, whole: int) -> dict[str, Any]:
    facts = {"sentences": len(split), "of": whole, "mean_tokens": float(split.lengths.mean())}
    return facts | {"longest": int(split.lengths.max())}


# ---- an epoch of finetuning

OURS: dict[str, dict[str, Any]] = {
    "ours fp32": {},
    "ours fp32-medium": {"matmul_precision": "medium"},
    "ours bf16": {"matmul_precision": "medium", "bf16": True, "amp_opt": "O1"},
    "ours fp32-medium, by tokens": {"matmul_precision": "medium", "max_tokens": 512},
}
"""Contender -> flags of `funneltfm classify`."""
TRAINER_128, TRAINER_DYNAMIC = "HF Trainer, padded to 128", "HF Trainer, dynamic padding"


def finetune_epoch(flags: argparse.Namespace) -> dict[str, Any]:
    texts, tokenizer = read(flags)
    flags.vocab_size = tokenizer.vocab_size
    chosen = part_of_an_epoch(texts, tokenizer, flags.sentences or 96)
    split = encode(chosen, tokenizer)
    steps: dict[str, Callable[[], Any]] = {}
    for name in flags.contenders or [*OURS, TRAINER_DYNAMIC, TRAINER_128]:
        if name in OURS:
            steps[name] = _ours(split, OURS[name], flags)
        elif name in (TRAINER_128, TRAINER_DYNAMIC):
            steps[name] = _trainer(split, tokenizer.pad_id, name == TRAINER_128, flags)
        else:
            raise SystemExit(f"{name!r}: a contender is one of {', '.join([*OURS, TRAINER_128, TRAINER_DYNAMIC])}.")
    rows = [{"contender": name, **times} for name, times in take_turns(steps, flags.reps, flags.seconds).items()]
    return {"data": about(split, len(texts)), "rows": rates(rows, len(split), len(texts))}


def rates(rows: list[dict[str, Any]], sentences: int, whole: int) -> list[dict[str, Any]]:
    """Rows with sentences per second, and how many times as fast as each older way a contender is."""
    for row in rows:
        row["per_s"], row["per_cpu_s"] = sentences / row["wall_s"], sentences / row["cpu_s"]
        row["epoch_s"] = whole / row["per_s"]
        row["spread"] = (row["cpu_quartiles"][1] - row["cpu_quartiles"][0]) / row["cpu_s"]
        for key, word in (("vs_padded", "padded to 128"), ("vs_dynamic", "dynamic")):
            other = next((r for r in rows if r["contender"].startswith("HF") and word in r["contender"]), None)
            if other:
                row[key], row[f"{key}_wall"] = other["cpu_s"] / row["cpu_s"], other["wall_s"] / row["wall_s"]
    return rows


def _ours(split: EncodedSplit, given: dict[str, Any], flags: argparse.Namespace) -> Callable[[], Seconds]:
    """The engine of `funneltfm classify`, without validation and checkpoints, with what it does to be fast."""
    args = make_args(**given, device_id=-1 if flags.device == "cpu" else 0)
    built = build("ours", flags)
    task = Classification(DatasetSpec("epoch", ("0", "1"), ("accuracy",), {}, {}))
    collator = Collator(built.model.net_config)

    def run() -> Seconds:
        batches = TokenBudget(args.max_tokens, collator.padded_length) if args.max_tokens else BATCH
        loader = RunLoader(split, collator, batches, epochs=1, seed=0)
        clock = AfterFirstStep(len(split))

        class Steps(lightning.Callback):
            def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, number: int) -> None:
                clock.step_done(len(batch["index"]))

        with warnings.catch_warnings(), matmul_precision(args.matmul_precision), freed_memory(kept=True):
            warnings.simplefilter("ignore")  # advice on training, which this is not
            trainer = make_trainer(
                args, choose_devices(args), max_epochs=1, gradient_clip_val=args.clip, enable_checkpointing=False,
                callbacks=[Steps()],
            )  # fmt: skip
            trainer.fit(Pipeline(built.model, task, args, loader.steps, ()), loader)
        seconds = clock.seconds()
        built.model.zero_grad()
        return seconds

    return run


def _trainer(split: EncodedSplit, pad_id: int, padded: bool, flags: argparse.Namespace) -> Callable[[], Seconds]:
    """transformers' Trainer as it comes, on FunnelForSequenceClassification, without evaluation and checkpoints."""
    import transformers

    model = build("HF funnel", flags).model
    folder = tempfile.mkdtemp()
    settings = transformers.TrainingArguments(
        output_dir=folder, per_device_train_batch_size=BATCH, num_train_epochs=1, save_strategy="no", report_to=[],
        disable_tqdm=True, logging_strategy="no", use_cpu=flags.device == "cpu",
    )  # fmt: skip
    examples = [
        {"input_ids": item["inputs"].tolist(), "token_type_ids": item["seg_id"].tolist(), "labels": int(item["label"])}
        for item in (split[i] for i in range(len(split)))
    ]

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        length = 128 if padded else max(len(row["input_ids"]) for row in rows)
        batch = {
            key: torch.tensor([row[key] + [fill] * (length - len(row[key])) for row in rows])
            for key, fill in (("input_ids", pad_id), ("token_type_ids", 0))
        }
        batch["attention_mask"] = torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows]
        )
        return batch | {"labels": torch.tensor([row["labels"] for row in rows])}

    def run() -> Seconds:
        clock = AfterFirstStep(len(split))

        class Steps(transformers.TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                clock.step_done(BATCH)

        with freed_memory(kept=False):
            trainer = transformers.Trainer(
                model, settings, data_collator=collate, train_dataset=examples, callbacks=[Steps()]
            )
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
        seconds = clock.seconds()
        model.zero_grad()
        return seconds

    os.rmdir(folder)
    return run


# ---- prediction


def predict_throughput(flags: argparse.Namespace) -> dict[str, Any]:
    texts, tokenizer = read(flags)
    flags.vocab_size = tokenizer.vocab_size
    split = encode(part_of_an_epoch(texts, tokenizer, flags.sentences or 256), tokenizer)
    models: dict[str, Any] = {}

    def model_of(kind: str) -> Any:
        if kind not in models:
            models[kind] = build(kind, flags)
        return models[kind]

    ours = {f"ours {name}": name for name in ("fp32", "fp32-tuned", "bf16")}
    steps: dict[str, Callable[[], None]] = {name: _predict(split, model_of("ours"), p) for name, p in ours.items()}
    for kind in ("HF funnel", "BERT"):
        for length, word in ((128, "padded to 128"), (0, "dynamic padding")):
            steps[f"{kind}, {word}"] = _predict_plainly(split, model_of(kind), length, tokenizer.pad_id)
    if flags.contenders:
        if unknown := set(flags.contenders) - set(steps):
            raise SystemExit(f"no contender {min(unknown)!r}; there are {', '.join(steps)}.")
        steps = {name: steps[name] for name in flags.contenders}
    rows = [{"contender": name, **times} for name, times in take_turns(steps, flags.reps, flags.seconds).items()]
    return {"data": about(split, len(texts)), "rows": rates(rows, len(split), len(texts))}


def _predict(split: EncodedSplit, built: Any, name: str) -> Callable[[], None]:
    """In batches by length, padded to the canonical one, as `funneltfm classify --test_only` does."""
    collator = Collator(built.model.net_config)

    def run() -> None:
        built.model.eval()
        with torch.inference_mode(), precision(name, "cpu"):
            for batch in eval_loader(split, collator, 32):
                built.logits(batch["inputs"], batch["input_mask"])

    return run


def _predict_plainly(split: EncodedSplit, built: Any, length: int, pad_id: int) -> Callable[[], None]:
    """In the order of the sentences, padded to the longest of the batch or to `length`."""

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for start in range(0, len(split), 32):
            rows = [split[i]["inputs"] for i in range(start, min(start + 32, len(split)))]
            ids = torch.full((len(rows), length or max(map(len, rows))), pad_id)
            mask = torch.ones_like(ids, dtype=torch.bool)
            for number, row in enumerate(rows):
                ids[number, : len(row)] = torch.from_numpy(row)
                mask[number, : len(row)] = False
            yield ids, mask

    def run() -> None:
        built.model.eval()
        with torch.inference_mode(), freed_memory(kept=False):
            for ids, mask in batches():
                built.logits(ids, mask)

    return run


# ---- text to ids


def tokenize(flags: argparse.Namespace) -> dict[str, Any]:
    """Sentences to ids and padded batches; transformers' fast tokenizer on the same vocabulary beside ours."""
    import transformers

    texts, tokenizer = read(flags)
    texts = texts[: flags.sentences or len(texts)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vocab.txt")
        path.write_bytes(tokenizer.path.read_bytes() if flags.data else "\n".join(_pieces(tokenizer)).encode())
        fast = transformers.BertTokenizer(str(path))
    flags.vocab_size = tokenizer.vocab_size
    collator = Collator(net_config(flags))
    split = encode(texts, tokenizer)
    cached = Path(tempfile.mkdtemp(), "split.npz")
    np.savez(cached, **{key: getattr(split, key) for key in ("inputs", "seg_id", "offsets", "labels", "ids")})

    def again() -> None:
        with np.load(cached) as arrays:
            EncodedSplit(**arrays)

    def collate() -> None:
        for batch in eval_batches(split.lengths, 32):
            collator([split[i] for i in batch])

    steps: dict[str, Callable[[], Any]] = {
        "ours": lambda: encode(texts, tokenizer),
        "ours, from the cache": again,
        "ours, ids to batches": collate,
        "transformers": lambda: fast(texts, truncation=True, max_length=128),
    }
    rows = [{"contender": name, **times} for name, times in take_turns(steps, flags.reps, flags.seconds).items()]
    cached.unlink()
    cached.parent.rmdir()
    return {"data": about(split, len(texts)), "rows": rates(rows, len(split), len(texts))}


def _pieces(tokenizer: Tokenizer) -> list[str]:
    return tokenizer.convert_ids_to_pieces(range(tokenizer.vocab_size))
