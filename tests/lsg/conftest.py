"""LSG models small enough to test, and the reference outputs."""

from pathlib import Path

import pytest

FIXTURES = Path(__file__).resolve().parents[3] / "shared/fixtures/lsg"


@pytest.fixture(scope="session")
def fixtures() -> Path:
    if not FIXTURES.is_dir():
        pytest.skip("needs ../shared/fixtures/lsg")
    return FIXTURES


COMMON = {"vocab_size": 60, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "max_position_embeddings": 300}
ENCODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
SEQ2SEQ = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20, "decoder_ffn_dim": 20, "decoder_start_token_id": 2, "scale_embedding": True,
}  # fmt: skip
OWN = {
    "albert": {"embedding_size": 8, "num_hidden_groups": 1},
    "electra": {"embedding_size": 8},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 20},
}
SETTINGS = {"block_size": 8, "sparse_block_size": 8, "sparsity_factor": 2, "num_global_tokens": 2}


def make_base_config(model_type: str, **values):
    """A tiny config of a base model."""
    from transformers import AutoConfig

    shape = SEQ2SEQ if model_type in ("bart", "mbart", "pegasus") else {} if model_type == "distilbert" else ENCODER
    return AutoConfig.for_model(model_type, **(COMMON | shape | OWN.get(model_type, {}) | values))


def make_tiny(model_type: str, head: str = "AutoModel", **settings):
    """A tiny LSG model with random weights, none of them 0 or 1, in evaluation mode."""
    import torch
    import transformers

    from funneltfm.lsg.models import lsg_config

    config = lsg_config(make_base_config(model_type), **(SETTINGS | settings))
    torch.manual_seed(0)
    model = getattr(transformers, head).from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def make_texts(tokens: int, padding: int = 0, side: str = "right", batch: int = 2):
    """Ids and a mask; `padding` tokens of the last text are padding."""
    import torch

    ids = torch.randint(3, 60, (batch, tokens), generator=torch.Generator().manual_seed(tokens))
    mask = torch.ones_like(ids)
    if padding:
        where = slice(-padding, None) if side == "right" else slice(0, padding)
        ids[-1, where], mask[-1, where] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


# What makes them, for tests: test files cannot import from here.


@pytest.fixture(scope="session")
def base_config():
    return make_base_config


@pytest.fixture(scope="session")
def tiny():
    return make_tiny


@pytest.fixture(scope="session")
def texts():
    return make_texts
