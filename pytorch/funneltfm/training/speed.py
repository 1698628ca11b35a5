"""What a run sets for the whole process to be fast: the precision of fp32 products, and memory that is kept."""

import contextlib
import ctypes
import os
import platform
import statistics
import time
from collections.abc import Iterator
from typing import Literal

import torch

MatmulPrecision = Literal["highest", "high", "medium", "auto"]

_WORTH = 1.03  # a precision other than torch's default has to be faster by so much
_EXACT = 4.0  # and its error at most so many times that of the default, which is what another order of sums gives


def choose_matmul_precision(wanted: MatmulPrecision, device: str) -> Literal["highest", "high", "medium"]:
    """What torch.set_float32_matmul_precision is to get. "auto" measures products on this machine and takes "medium"
    where it is faster and yet as exact as fp32: on many CPUs it only means another library. Elsewhere than on a CPU
    (TF32, bf16) it would not be, so there "auto" is "highest".
    """
    if wanted != "auto":
        return wanted
    if device != "cpu":
        return "highest"
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) for shape in ((512, 768), (768, 1536)))
    exact = a.double() @ b.double()
    times: dict[str, list[float]] = {"highest": [], "medium": []}
    errors = {}
    for turn in range(8):
        for name, seconds in times.items():
            with matmul_precision(name):
                start = time.process_time()
                product = a @ b
                if turn:  # the first is to warm up
                    seconds.append(time.process_time() - start)
            errors[name] = float((product.double() - exact).abs().max())
    faster = statistics.median(times["highest"]) > _WORTH * statistics.median(times["medium"])
    return "medium" if faster and errors["medium"] <= _EXACT * errors["highest"] else "highest"


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
