"""The cases on real sentences: finetune_epoch, predict_throughput, tokenize."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch

from funneltfm.data.batching import (
    Collator,
    RunLoader,
    StepSampler,
    TokenBudget,
    epoch_batches,
    eval_batches,
    token_batches,
)
from funneltfm.data.encoding import EncodedSplit, EncodingConfig, encode_examples
from funneltfm.data.readers import DatasetSpec, Example
from funneltfm.data.tokenization import Tokenizer, get_tokenizer
from funneltfm.funnel.config import without_truncation
from funneltfm.tasks.classification import Classification
from funneltfm.training.config import make_args
from funneltfm.training.pipeline import Pipeline
from funneltfm.training.setup import choose_devices, make_trainer
from funneltfm.training.speed import fast, speed_up

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


Batches = list[np.ndarray]  # of indices


def some_of(batches: Batches, lengths: np.ndarray, count: int) -> Batches:
    """`count` of all the batches that a contender makes of the data, evenly spaced from the shortest to the longest:
    time and sentences are those of the whole in small. Their order is random.
    """
    batches = sorted(batches, key=lambda batch: int(lengths[batch].max()))
    chosen = [batches[int((i + 0.5) * len(batches) / count)] for i in range(min(count, len(batches)))]
    return [chosen[i] for i in np.random.default_rng(0).permutation(len(chosen))]


def in_random_order(lengths: np.ndarray, size: int) -> Batches:
    order = np.random.default_rng(0).permutation(len(lengths))
    return np.split(order, range(size, len(order), size))


def about(split: EncodedSplit, wanted: int) -> dict[str, Any]:
    facts = {"sentences": wanted, "of": len(split), "mean_tokens": float(split.lengths.mean())}
    return facts | {"longest": int(split.lengths.max())}


# ---- an epoch of finetuning

OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours fp32": {"matmul_precision": "highest"},
    "ours bf16": {"bf16": True, "amp_opt": "O1"},
    "ours, by tokens": {"max_tokens": 512},
    "ours bf16, by tokens": {"bf16": True, "amp_opt": "O1", "max_tokens": 512},
}
"""Contender -> flags of `funneltfm classify`."""
TRAINER_128, TRAINER_DYNAMIC = "HF Trainer, padded to 128", "HF Trainer, dynamic padding"


def finetune_epoch(flags: argparse.Namespace) -> dict[str, Any]:
    texts, tokenizer = read(flags)
    flags.vocab_size = tokenizer.vocab_size
    wanted = flags.sentences or 96
    split = encode(texts, tokenizer)
    steps: dict[str, Callable[[], Any]] = {}
    for name in flags.contenders or [*OURS, TRAINER_DYNAMIC, TRAINER_128]:
        if name in OURS:
            steps[name] = _ours(split, wanted, OURS[name], flags)
        elif name in (TRAINER_128, TRAINER_DYNAMIC):
            steps[name] = _trainer(split, wanted, tokenizer.pad_id, name == TRAINER_128, flags)
        else:
            raise SystemExit(f"{name!r}: a contender is one of {', '.join([*OURS, TRAINER_128, TRAINER_DYNAMIC])}.")
    rows = [{"contender": name, **times} for name, times in take_turns(steps, flags.reps, flags.seconds).items()]
    return {"data": about(split, wanted), "rows": rates(rows, wanted, len(texts))}


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


def after_one_more(batches: Batches) -> Batches:
    """The batches, and before them one in which the optimizer and the allocator get their memory."""
    return [batches[len(batches) // 2], *batches]


class Chosen(StepSampler):
    """Deals these batches, in this order."""

    def __init__(self, lengths: np.ndarray, batches: Batches):
        self.batches = batches
        super().__init__(lengths, BATCH, seed=0)

    def _steps(self, lengths: np.ndarray, epoch: int) -> Batches:
        return self.batches


def _ours(split: EncodedSplit, wanted: int, given: dict[str, Any], flags: argparse.Namespace) -> Callable[[], Seconds]:
    """The engine of `funneltfm classify`, without validation and checkpoints, with what it does to be fast."""
    args = make_args(**given, device_id=-1 if flags.device == "cpu" else 0)
    built, collator = _with_collator(flags)
    task = Classification(DatasetSpec("epoch", ("0", "1"), ("accuracy",), {}, {}))
    if args.max_tokens:
        batches = token_batches(split.lengths, TokenBudget(args.max_tokens, collator.padded_length), seed=0, epoch=0)
    else:
        batches = epoch_batches(split.lengths, BATCH, seed=0, epoch=0)
    count = max(1, round(wanted * len(batches) / len(split)))
    batches = after_one_more(some_of(batches, split.lengths, count))

    def run() -> Seconds:
        loader = RunLoader(split, collator, BATCH, epochs=1, seed=0)
        loader.run_sampler.batches = Chosen(split.lengths, batches)
        clock = AfterFirstStep(wanted)

        class Steps(lightning.Callback):
            def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, number: int) -> None:
                clock.step_done(len(batch["index"]))

        with warnings.catch_warnings(), fast(args, flags.device), freed_memory(kept=True):
            warnings.simplefilter("ignore")  # advice on training, which this is not
            speed_up(built.model, args)
            trainer = make_trainer(
                args, choose_devices(args), max_epochs=1, gradient_clip_val=args.clip, enable_checkpointing=False,
                callbacks=[Steps()],
            )  # fmt: skip
            trainer.fit(Pipeline(built.model, task, args, loader.steps, ()), loader)
        seconds = clock.seconds()
        built.model.zero_grad()
        return seconds

    return run


def _with_collator(flags: argparse.Namespace) -> tuple[Any, Collator]:
    """Our model, and what pads for it, as `funneltfm classify` has them."""
    built = build("ours", flags)
    built.model.pooling = without_truncation(built.model.net_config)
    return built, Collator(built.model.pooling)


def _trainer(
    split: EncodedSplit, wanted: int, pad_id: int, padded: bool, flags: argparse.Namespace
) -> Callable[[], Seconds]:
    """transformers' Trainer as it comes, on FunnelForSequenceClassification, without evaluation and checkpoints."""
    import transformers

    batches = some_of(in_random_order(split.lengths, BATCH)[:-1], split.lengths, max(1, wanted // BATCH))
    chosen = [int(i) for batch in after_one_more(batches) for i in batch]

    class Trainer(transformers.Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sequence[int]:
            return range(len(chosen))

    model = build("HF funnel", flags).model
    folder = tempfile.mkdtemp()
    settings = transformers.TrainingArguments(
        output_dir=folder, per_device_train_batch_size=BATCH, num_train_epochs=1, save_strategy="no", report_to=[],
        disable_tqdm=True, logging_strategy="no", use_cpu=flags.device == "cpu",
    )  # fmt: skip
    examples = [
        {"input_ids": item["inputs"].tolist(), "token_type_ids": item["seg_id"].tolist(), "labels": int(item["label"])}
        for item in (split[i] for i in chosen)
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
        clock = AfterFirstStep(wanted)

        class Steps(transformers.TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                clock.step_done(BATCH)

        with freed_memory(kept=False):
            trainer = Trainer(model, settings, data_collator=collate, train_dataset=examples, callbacks=[Steps()])
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
    wanted = flags.sentences or 4 * _EVAL_BATCH
    split = encode(texts, tokenizer)
    built, collator = _with_collator(flags)
    ours = {f"ours {name}": name for name in ("fp32", "fp32-tuned", "bf16")}
    count = max(1, wanted // _EVAL_BATCH)
    by_length = some_of([np.array(b) for b in eval_batches(split.lengths, _EVAL_BATCH)], split.lengths, count)
    steps: dict[str, Callable[[], None]] = {
        name: _predict(split, by_length, built, collator, precision) for name, precision in ours.items()
    }
    as_they_come = some_of(in_random_order(split.lengths, _EVAL_BATCH)[:-1], split.lengths, count)
    for kind in ("HF funnel", "BERT"):
        other = build(kind, flags)
        for length, word in ((128, "padded to 128"), (0, "dynamic padding")):
            steps[f"{kind}, {word}"] = _predict_plainly(split, as_they_come, other, length, tokenizer.pad_id)
    if flags.contenders:
        if unknown := set(flags.contenders) - set(steps):
            raise SystemExit(f"no contender {min(unknown)!r}; there are {', '.join(steps)}.")
        steps = {name: steps[name] for name in flags.contenders}
    rows = [{"contender": name, **times} for name, times in take_turns(steps, flags.reps, flags.seconds).items()]
    return {"data": about(split, wanted), "rows": rates(rows, count * _EVAL_BATCH, len(texts))}


_EVAL_BATCH = 32


def _predict(split: EncodedSplit, batches: Batches, built: Any, collator: Collator, name: str) -> Callable[[], None]:
    """Padded to the canonical length, as `funneltfm classify --test_only` does."""

    def run() -> None:
        built.model.eval()
        with torch.inference_mode(), precision(name, "cpu"):
            for indices in batches:
                batch = collator([split[int(i)] for i in indices])
                built.logits(batch["inputs"], batch["input_mask"])

    return run


def _predict_plainly(split: EncodedSplit, chosen: Batches, built: Any, length: int, pad_id: int) -> Callable[[], None]:
    """Padded to the longest of the batch, or to `length`."""

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for indices in chosen:
            rows = [split[int(i)]["inputs"] for i in indices]
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
    collator = Collator(without_truncation(net_config(flags)))
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
    return {"data": about(split, len(split)), "rows": rates(rows, len(split), len(texts))}


def _pieces(tokenizer: Tokenizer) -> list[str]:
    return tokenizer.convert_ids_to_pieces(range(tokenizer.vocab_size))
