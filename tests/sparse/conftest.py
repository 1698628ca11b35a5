"""Small models of both kinds: one of `transformers`, one of ours."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from funneltfm.funnel.config import ModelConfig
from funneltfm.funnel.model import FunnelTFM

FUNNEL = {
    "vocab_size": 40, "d_embed": 8, "d_model": 8, "n_head": 2, "d_head": 4, "d_inner": 16, "block_size": "1_1",
    "dropout": 0.0, "dropatt": 0.0, "dropact": 0.0, "separate_cls": True, "truncate_seq": True, "pool_q_only": True,
}  # fmt: skip


def make_bert(kind: str = "BertForMaskedLM", **kwargs: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **kwargs,
    )  # fmt: skip
    torch.manual_seed(0)
    return getattr(transformers, kind)(config)


def make_funnel_lm() -> nn.Module:
    pytest.importorskip("transformers")
    from funneltfm.funnel.hf import FunnelTFMConfig, FunnelTFMForMaskedLM

    torch.manual_seed(0)
    return FunnelTFMForMaskedLM(FunnelTFMConfig.from_net_config(ModelConfig(**FUNNEL | {"decoder_size": "1"})))


@pytest.fixture
def bert() -> Callable[..., nn.Module]:
    """Makes a BERT of hidden size 32, with a masked language modelling head by default."""
    return make_bert


@pytest.fixture
def funnel() -> nn.Module:
    """The plain Funnel-Transformer: TensorFlow's layout of weights, matrices without a module."""
    torch.manual_seed(0)
    return FunnelTFM(ModelConfig(**FUNNEL))


@pytest.fixture
def funnel_lm() -> Callable[[], nn.Module]:
    """Makes a Funnel-Transformer with a masked language modelling head."""
    return make_funnel_lm
