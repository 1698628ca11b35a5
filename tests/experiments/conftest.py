"""A tiny corpus and tiny experiments."""

import json
import random
from pathlib import Path

import pytest

WORDS = "good great bad awful the film was a story about people and places in town with some music yes no".split()  # noqa: SIM905
EXPERIMENTS = """
_tiny:
  stages:
    pretrain:
      pipeline: masked_lm
      model: bert
      additional_config_kwargs: [hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32]
      pre_trained_tokenizer: "{data_dir}/vocab.txt"
      train_dataset: "{data_dir}/train.jsonl"
      valid_dataset: "{data_dir}/valid.jsonl"
      input_columns: text
      max_sequence_length: 16
      batch_size: 8
      max_steps: 8
      learning_rate: 1e-3
      seed: 1
      accelerator: cpu
      save_total_limit: 0
      probability: 0.3

tiny:
  about: a tiny one
  extends: _tiny
  original: {loss: 2.0, perplexity: 7.389}

tiny_sparse:
  about: a tiny sparse one, that learns from tiny
  extends: tiny
  data: Make it with the test.
  stages:
    pretrain: {sparsity: 0.5, sparsity_include: ["*encoder*"], distill_from: ["{model:tiny}"]}
    again: {pipeline: masked_lm, pre_trained_model: "{stage:pretrain}", train_dataset: "{data_dir}/train.jsonl",
            valid_dataset: "{data_dir}/valid.jsonl", max_steps: 2, max_sequence_length: 16, accelerator: cpu}
"""


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with vocab.txt, and train and valid .jsonl with a text and a label."""
    folder, rng = tmp_path_factory.mktemp("corpus"), random.Random(0)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    for name, n in (("train", 64), ("valid", 16)):
        rows = [{"text": " ".join(rng.choices(WORDS, k=rng.randint(4, 12)))} for _ in range(n)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def tiny_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(EXPERIMENTS)
    return path
