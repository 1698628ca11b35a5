"""What a run sets to be fast: the precision of fp32 products, memory that is kept, a compiled encoder."""

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from funneltfm.errors import InputError, brief
from funneltfm.funnel.model import FunnelTFM
from funneltfm.training import ranks
from funneltfm.training.sharding import layers_of

MatmulPrecision = Literal["highest", "high", "medium", "auto"]

_EXACT = 4.0  # times the error of the default: what another order of sums gives, and half precision by far does not
_WIDE = 256  # from here on products gain more from oneDNN than its calls cost, about 15 us each


@contextlib.contextmanager
def fast(args: Any, device: str) -> Iterator[None]:
    """Within, this process, one of a run, computes as its flags say."""
    precision = ranks.main_decides(partial(choose_matmul_precision, args.matmul_precision, device))
    if device == "cpu":
        keep_freed_memory()
    with matmul_precision(precision):
        yield


def choose_matmul_precision(wanted: MatmulPrecision, device: str) -> Literal["highest", "high", "medium"]:
    """What torch.set_float32_matmul_precision is to get. "auto" is "medium" on a CPU where a product is as exact with
    it as without: on many it only means another library (oneDNN, not MKL), which is faster but for narrow models (see
    `speed_up`). No clock decides: a run would not be the same twice. Elsewhere than on a CPU (TF32, bf16) it would not
    be exact, so there "auto" is "highest".
    """
    if wanted != "auto":
        return wanted
    if device != "cpu":
        return "highest"
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) for shape in ((512, 768), (768, 1536)))
    exact = a.double() @ b.double()
    errors = {}
    for name in ("highest", "medium"):
        with matmul_precision(name):
            errors[name] = float(((a @ b).double() - exact).abs().max())
    return "medium" if errors["medium"] <= _EXACT * errors["highest"] else "highest"


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Products of fp32 matrices of this precision, for torch's name of it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the next tensor of that size. Without it glibc gives large tensors back
    to the system and gets them as new pages, which the system fills with zeros, at every step. The peak stays what it
    is. Returns whether it was done: not where another C library is in use, or where the environment sets malloc up.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, 2**30) and libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def speed_up(encoder: nn.Module, args: Any) -> None:
    """Let a model compute attention as --attention_path says, and with --compile its layers compiled (where there is a
    decoder beside an encoder, the encoder's: what generates has another shape at every token). Within `fast`, for a
    narrow model --matmul_precision auto becomes highest.
    """
    if args.matmul_precision == "auto" and _width(encoder) < _WIDE:
        torch.set_float32_matmul_precision("highest")
    path = "plain" if args.compile else args.attention_path
    funnels = [module for module in encoder.modules() if isinstance(module, FunnelTFM)]
    if args.attention_path != "auto" and not funnels:
        raise InputError(f"--attention_path={args.attention_path} is for Funnel models, which this is not.")
    for funnel in funnels:
        funnel.attention_path = path  # type: ignore[assignment]
    if args.compile:
        compile_layers(getattr(encoder, "encoder", encoder), getattr(args, "dynamo_fallback_eager", False))


def _width(encoder: nn.Module) -> int:
    """The smaller side of the largest matrix."""
    return max((min(p.shape) for p in encoder.parameters() if p.dim() == 2), default=0)


def compile_layers(encoder: nn.Module, fallback: bool = False) -> None:
    """From now on the layers of `encoder` run compiled: layers that are alike share one compilation, in which lengths
    and batch sizes are symbols, so others need no new one. They stay the modules that they were, with their names.
    fallback: uncompiled where that fails.
    """
    if fallback:
        torch._dynamo.config.suppress_errors = True
    else:
        _check_compiler()
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # beyond it nothing is
    for layer in layers_of(encoder):
        layer.compile(dynamic=True)


def _check_compiler() -> None:
    try:
        torch.compile(torch.neg)(torch.zeros(2))
    except Exception as error:  # of any kind, by what is missing
        raise InputError(
            f"--compile: torch.compile does not work here: {brief(' '.join(str(error).split()), 300)}. On a CPU it "
            "needs a C++ compiler (g++) and Python's headers. Leave the flag out, or install them."
        ) from error
