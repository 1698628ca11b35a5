"""Who takes part: models of one width with a classification head, all behind one call."""

import argparse
import contextlib
import ctypes
import platform
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funneltfm import FunnelTFM, ModelConfig
from funneltfm.training.speed import keep_freed_memory

from .flops import encoder_flops, funnel_flops

PRECISIONS = {"fp32": "highest", "fp32-medium": "medium", "fp32-tuned": "medium", "bf16": "medium"}
"""Name -> what torch.set_float32_matmul_precision gets; fp32-tuned also keeps freed memory, as our commands do on a
CPU; bf16 also runs under autocast.
"""


class Contender(NamedTuple):
    kind: str
    precision: str

    def __str__(self) -> str:
        return f"{self.kind} {self.precision}"


def contender(name: str) -> Contender:
    kind, _, precision = name.rpartition(" ")
    if kind not in KINDS or precision not in PRECISIONS:
        raise SystemExit(f"{name!r}: a contender is one of {', '.join(KINDS)}, a space, and {', '.join(PRECISIONS)}.")
    return Contender(kind, precision)


@contextlib.contextmanager
def freed_memory(kept: bool) -> Iterator[None]:
    """Within, freed memory stays with the process, or goes back to the system as it does where nobody has asked for
    anything else: glibc's thresholds once they have grown to their bound.
    """
    if kept:
        keep_freed_memory()
    elif platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**25)
        libc.mallopt(-1, 2**26)
    yield


@contextlib.contextmanager
def precision(name: str, device: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(PRECISIONS[name])
    try:
        autocast = torch.autocast(device, torch.bfloat16, enabled=name == "bf16")
        with autocast, freed_memory(kept=name == "fp32-tuned"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


# ---- models: flags -> (module, logits of (ids, mask), FLOPs of a shape); ids and mask (B, T), mask True = pad

Logits = Callable[[Tensor, Tensor], Tensor]


class Built(NamedTuple):
    model: nn.Module
    logits: Logits
    flops: Callable[..., int]


def net_config(flags: argparse.Namespace, **keys: Any) -> ModelConfig:
    published = {"separate_cls": True, "truncate_seq": True, "pool_q_only": True}
    widths = {"d_embed": flags.width, "d_model": flags.width, "n_head": flags.width // 64, "d_inner": 4 * flags.width}
    return ModelConfig(vocab_size=flags.vocab_size, block_size=flags.blocks, **(published | widths | keys))


def n_layers(flags: argparse.Namespace) -> int:
    return sum(n * repeats for n, repeats in net_config(flags).blocks)


def segments(ids: Tensor) -> Tensor:
    """Segment ids of single sentences: 2 for [CLS], 0 for the rest."""
    seg_id = torch.zeros_like(ids)
    seg_id[:, 0] = 2
    return seg_id


def _ours(flags: argparse.Namespace, path: Any = "auto", **keys: Any) -> Built:
    config = net_config(flags, **keys)
    model = FunnelTFM(config)
    model.attention_path = path

    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        return model(ids, input_mask=mask, seg_id=segments(ids))[1]["cls_logits"]

    return Built(model, logits, lambda *shape, **kwargs: funnel_flops(config, *shape, **kwargs))


def _hf_funnel(flags: argparse.Namespace) -> Built:
    import transformers

    config = net_config(flags)
    keys = {"block_sizes": [n for n, _ in config.blocks], "block_repeats": [r for _, r in config.blocks]}
    widths = {"d_model": config.d_model, "n_head": config.n_head, "d_head": config.d_head, "d_inner": config.d_inner}
    switches = {"separate_cls": True, "truncate_seq": True, "pool_q_only": True, "vocab_size": config.vocab_size}
    model = transformers.FunnelForSequenceClassification(transformers.FunnelConfig(**keys, **widths, **switches))

    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        return model(input_ids=ids, attention_mask=(~mask).long(), token_type_ids=segments(ids)).logits

    return Built(model, logits, lambda *shape, **kwargs: funnel_flops(config, *shape, **kwargs))


def _bert(flags: argparse.Namespace) -> Built:
    import transformers

    width, layers = flags.width, n_layers(flags)
    config = transformers.BertConfig(
        vocab_size=flags.vocab_size, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
        intermediate_size=4 * width, max_position_embeddings=max(512, flags.longest), attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)

    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        return model(input_ids=ids, attention_mask=(~mask).long()).logits

    return Built(model, logits, lambda *shape, **kwargs: encoder_flops(layers, width, 4 * width, *shape, **kwargs))


def _modernbert(flags: argparse.Namespace) -> Built:
    import transformers

    width = flags.width
    layers, inner = 22 * n_layers(flags) // 12, 3 * width // 2  # of its published base model, which is 768 wide
    config = transformers.ModernBertConfig(
        vocab_size=flags.vocab_size, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
        intermediate_size=inner, max_position_embeddings=max(8192, flags.longest), attn_implementation="sdpa",
        pad_token_id=0, bos_token_id=1, cls_token_id=1, eos_token_id=2, sep_token_id=2,
    )  # fmt: skip
    model = transformers.ModernBertForSequenceClassification(config)

    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        return model(input_ids=ids, attention_mask=(~mask).long()).logits

    return Built(
        model, logits, lambda *shape, **kwargs: encoder_flops(layers, width, inner, *shape, gated=True, **kwargs)
    )


class _TorchEncoder(nn.Module):
    def __init__(self, flags: argparse.Namespace):
        super().__init__()
        width = flags.width
        self.embedding = nn.Embedding(flags.vocab_size, width)
        self.positions = nn.Embedding(max(512, flags.longest), width)
        layer = nn.TransformerEncoderLayer(width, width // 64, 4 * width, 0.1, "gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, n_layers(flags), enable_nested_tensor=False)
        self.head = nn.Linear(width, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embedding(ids) + self.positions.weight[: ids.size(1)]
        return self.head(self.encoder(x, src_key_padding_mask=mask)[:, 0])


def _torch_encoder(flags: argparse.Namespace) -> Built:
    model, layers, width = _TorchEncoder(flags), n_layers(flags), flags.width
    return Built(model, model, lambda *shape, **kwargs: encoder_flops(layers, width, 4 * width, *shape, **kwargs))


KINDS: dict[str, Callable[[argparse.Namespace], Built]] = {
    "ours": _ours,
    "ours plain": lambda flags: _ours(flags, path="plain"),
    "ours factorized": lambda flags: _ours(flags, attn_type="factorized"),
    "HF funnel": _hf_funnel,
    "BERT": _bert,
    "ModernBERT": _modernbert,
    "torch encoder": _torch_encoder,
}


def build(kind: str, flags: argparse.Namespace) -> Built:
    """The same seed for every kind; models of one architecture do not get the same weights, which times do not need."""
    torch.manual_seed(0)
    built = KINDS[kind](flags)
    built.model.to(flags.device)
    return built


def random_batch(size: tuple[int, int], flags: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, mask, labels) without padding, the same for every contender."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, flags.vocab_size, size, generator=generator).to(flags.device)
    return ids, torch.zeros_like(ids, dtype=torch.bool), torch.zeros(size[0], dtype=torch.long, device=flags.device)


def step_of(built: Built, who: Contender, size: tuple[int, int], mode: str, flags: argparse.Namespace) -> Any:
    """A function that runs one forward pass, or a forward and a backward one, of `who`."""
    ids, mask, labels = random_batch(size, flags)

    def forward() -> None:
        built.model.eval()
        with torch.no_grad(), precision(who.precision, flags.device):
            built.logits(ids, mask)
        wait(flags.device)

    def train() -> None:
        built.model.train()
        with precision(who.precision, flags.device):
            loss = F.cross_entropy(built.logits(ids, mask).float(), labels)
            loss.backward()  # within: the backward pass asks for the matmul precision too
        wait(flags.device)
        built.model.zero_grad()

    return forward if mode == "forward" else train


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
