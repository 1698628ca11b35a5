"""Every task with every architecture: a training step, an evaluation, a prediction, saving and loading; offline, on
tiny random models. Run as a program it goes round and prints the table; with --table it only prints what the tests go
through.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto

from funneltfm.errors import InputError
from funneltfm.tasks.base import make_tasks
from funneltfm.training.outputs import Outputs
from funneltfm.training.train import predict, train
from funneltfm.training.train_config import make_train_args

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
MODELS: dict[str, dict[str, Any]] = {
    "bert": SMALL,
    "roberta": SMALL,
    "deberta": SMALL | {"relative_attention": True, "pos_att_type": "['c2p', 'p2c']"},
    "deberta_v2": SMALL | {"relative_attention": True, "pos_att_type": "['c2p', 'p2c']"},
    "electra": SMALL | {"embedding_size": 8},
    "albert": SMALL | {"embedding_size": 8},
    "distilbert": {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32},
    "camembert": SMALL,
    "xlm_roberta": SMALL,
    "modernbert": SMALL,
    "funnel": {
        "block_size": "1_1", "d_model": 16, "d_embed": 16, "n_head": 2, "d_head": 8, "d_inner": 32, "decoder_size": 1,
    },
}  # fmt: skip
# Encoder-decoders, for the tasks that write.
SIDES = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
}  # fmt: skip
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
WRITERS: dict[str, dict[str, Any]] = {
    "bart": SIDES,
    "t5": T5,
    "mbart": SIDES,
    "pegasus": SIDES,
    "longt5": T5 | {"local_radius": 3},
    "mt5": T5,
    "led": SIDES | {"attention_window": 4},
    "m2m_100": SIDES,
}
SENTENCES = ["the cat sat on a mat .", "one bird saw two dogs run home", "who had seen and ? yes no"]
WORDS = list(dict.fromkeys(" ".join(SENTENCES).split()))
PAIR = [
    {"q": "who saw one bird ?", "a": "the cat saw one bird .", "label": 1},
    {"q": "who saw one bird ?", "a": "two dogs run home .", "label": 0},
    {"q": "who had seen two dogs ?", "a": "the cat sat on a mat", "label": 0},
    {"q": "who had seen two dogs ?", "a": "one bird had seen two dogs", "label": 1},
]
TEXT = [{"text": "the cat sat on a mat", "label": "yes"}, {"text": "two dogs run home .", "label": "no"}] * 2
DOCUMENTS = [{"text": "\n".join(SENTENCES)}] * 4
TAGS = [
    {"words": ["the", "cat", "saw", "dogs"], "labels": ["O", "B-X", "O", "B-Y"], "label": "yes"},
    {"words": ["one", "bird", "run"], "labels": ["B-X", "I-X", "O"], "label": "no"},
] * 2
SPANS = [
    {"id": str(i), "question": question, "context": SENTENCES[i], "answers": {"text": [text], "answer_start": [start]}}
    for i, question, text, start in ((0, "who sat ?", "the cat", 0), (1, "who run ?", "two dogs", 13))
]
CHOICES = [
    {"article": "the cat sat on a mat .", "question": "who sat ?", "options": ["cat", "bird", "two dogs"], "answer": 0},
    {"article": "two dogs run home .", "question": "who run ?", "options": ["cat", "bird", "two dogs"], "answer": "C"},
] * 2
PAIRS = [{"document": text, "summary": text[:7], "id": i} for i, text in enumerate(SENTENCES[:2])] * 2
RANK = {"input_columns": ("q", "a")}
# task -> rows, flags
TASKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "seq_class": (TEXT, {}),
    "token_class": (TAGS, {}),
    "question_answering": (SPANS * 2, {"doc_stride": 2, "max_query_length": 4}),
    "multiple_choice": (CHOICES, {}),
    "answer_selection": (PAIR, RANK),
    "retrieval": (PAIR, RANK),
    "masked_lm": (TEXT, {}),
    "sentence_order": (DOCUMENTS, {"sentence_pairs": True}),
    "random_token_detection": (TEXT, {}),
    "cluster_random_token_detection": (TEXT, {"clusters_filename": "clusters.txt"}),
    "electra": (TEXT, {}),
    "electra tied": (TEXT, {"embedding_sharing": "tied"}),
    "electra gdes": (TEXT, {"embedding_sharing": "gdes"}),
    "electra+seq_class": (TEXT, {"embedding_sharing": "gdes"}),
    "masked_lm+seq_class": (TEXT, {}),
    "masked_lm+token_class": (TAGS, {}),
    "masked_lm+answer_selection": (PAIR, RANK),
    "denoising": (TEXT, {}),
    "denoising spans": (TEXT, {"denoising_objective": "span_corruption"}),
    "denoising several": (TEXT, {"max_multi_token_predictions": 2}),
    "summarization": (PAIRS, {"max_target_length": 8}),
    "summarization several": (PAIRS, {"max_target_length": 8, "max_multi_token_predictions": 2}),
    "answer_selection -k 2": (PAIR, RANK | {"k": 2, "classification_head_type": "AE_k"}),
    **{
        f"answer_selection -k 2 {head}": (PAIR, RANK | {"k": 2, "classification_head_type": head})
        for head in ("IE_1", "IE_k", "AE_1", "RE_k")
    },
    "answer_selection -k 2 --separated": (PAIR, RANK | {"k": 2, "separated": True}),
    "masked_lm+answer_selection -k 2": (PAIR, RANK | {"k": 2}),
    "masked_lm+question_answering": (SPANS * 2, {"doc_stride": 2, "max_query_length": 4}),
    "masked_lm+multiple_choice": (CHOICES, {}),
    "masked_lm+retrieval": (PAIR, RANK),
    "masked_lm+seq_class+token_class": (TAGS, {}),
}
# Tasks that are more of what others are, and the models that they are run with.
FEW = {
    **{name: ("bert",) for name in TASKS if name.startswith("answer_selection -k 2 ")},
    "answer_selection -k 2 --separated": ("roberta", "funnel"),
    "masked_lm+answer_selection -k 2": ("roberta",),
    "masked_lm+question_answering": ("bert", "funnel"),
    "masked_lm+multiple_choice": ("bert", "funnel"),
    "masked_lm+retrieval": ("electra", "funnel"),
    "masked_lm+seq_class+token_class": ("roberta", "funnel"),
}


def flags(task: str, model: str, folder: Path) -> dict[str, Any]:
    rows, more = TASKS[task]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "vocab.txt"
    marks = ["<extra_id_0>", "<extra_id_1>"] if task == "denoising spans" else []
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *marks]) + "\n")
    if "clusters_filename" in more:
        clusters = folder / "clusters.txt"
        clusters.write_text("".join(f"{i % 3}\n" for i in range(len(WORDS) + 5)))
        more = more | {"clusters_filename": str(clusters)}
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return more | {
        "pipeline": task.split(" ")[0], "model": model, "name": "run", "output_dir": str(folder / "out"),
        "additional_config_kwargs": tuple(f"{key}={value}" for key, value in (MODELS | WRITERS)[model].items()),
        "pre_trained_tokenizer": str(vocabulary), "max_sequence_length": 24, "batch_size": 2, "max_steps": 1,
        "accelerator": "cpu", "train_dataset": (str(data),), "valid_dataset": str(data), "num_sanity_val_steps": 0,
        "log_every_n_steps": 1, "no_epoch_checkpointing": True, "no_val_checkpointing": True, "seed": 3,
    }  # fmt: skip


def has_head(task: str, model: str) -> bool:
    """Whether transformers has a model of this type with the heads that the task needs."""
    tasks = make_tasks(task.split(" ")[0], make_train_args(pipeline=task.split(" ")[0], **TASKS[task][1]))
    if model == "funnel":
        return not tasks[0].alone
    kind = {"deberta_v2": "deberta-v2", "xlm_roberta": "xlm-roberta"}.get(model, model)
    mappings = {
        "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
        "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "AutoModelForMultipleChoice": modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
        "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    }
    return all(kind in mappings[one.auto] for one in tasks)


def go_round(task: str, model: str, folder: Path) -> None:
    """Train a step, evaluate, predict, save, load, predict again."""
    settings = flags(task, model, folder)
    results = train(**settings)
    assert results["steps"] == 1
    assert results["valid"]
    out = Outputs(folder / "out", "run")
    rows = [json.loads(line) for file in sorted(out.predictions.iterdir()) for line in file.read_text().splitlines()]
    again = predict(pre_trained_model=str(out.best), predict_dataset=settings["valid_dataset"], accelerator="cpu")
    again.sort(key=lambda row: row.get("task", ""))  # as the names of the files, one a task
    assert len(again) == len(rows) > 0
    for one, other in zip(rows, again, strict=True):
        other.pop("task", None)
        assert alike(one, json.loads(json.dumps(other))), (one, other)


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(alike, one, other))
    return abs(one - other) < 1e-5 if isinstance(one, float) else one == other


CASES = [
    *((task, model) for task in TASKS for model in FEW.get(task, MODELS)),
    *((task, model) for task in TASKS for model in WRITERS if task.startswith(("denoising", "summarization"))),
]


@pytest.mark.parametrize(("task", "model"), CASES)
def test_a_round(task: str, model: str, tmp_path: Path) -> None:
    if task.startswith("summarization"):
        pytest.importorskip("rouge_score")
        pytest.importorskip("sacrebleu")
    if not has_head(task, model):
        with pytest.raises(InputError, match="cannot make a model"):
            train(**flags(task, model, tmp_path))
        pytest.skip(f"transformers has no {model} with this head, and the error says so")
    go_round(task, model, tmp_path)


def main(run: bool) -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    models = [*MODELS, *WRITERS]
    print("| task | " + " | ".join(models) + " |")
    print("|---" * (len(models) + 1) + "|")
    for task in TASKS:
        cells = []
        for model in models:
            with tempfile.TemporaryDirectory() as folder:
                cells.append("" if (task, model) not in CASES else "x" if has_head(task, model) else "-")
                if run and cells[-1] == "x":
                    go_round(task, model, Path(folder))
        print(f"| {task} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(run="--table" not in sys.argv)
