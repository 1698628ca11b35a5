"""Precision of products, memory that is kept, compiled layers."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from funneltfm import FunnelTFM, ModelConfig
from funneltfm.errors import InputError
from funneltfm.training import speed
from funneltfm.training.speed import choose_matmul_precision, keep_freed_memory, matmul_precision, speed_up


@pytest.mark.parametrize("wanted", ["highest", "high", "medium"])
def test_what_is_asked_for_is_taken(wanted):
    assert choose_matmul_precision(wanted, "cpu") == wanted


def test_auto_elsewhere_than_on_a_cpu_is_exact():
    assert choose_matmul_precision("auto", "cuda") == "highest"


def test_auto_takes_what_is_exact_and_the_same_each_time(monkeypatch):
    assert len({choose_matmul_precision("auto", "cpu") for _ in range(3)}) == 1
    monkeypatch.setattr(speed, "_EXACT", 1e9)
    assert choose_matmul_precision("auto", "cpu") == "medium"
    monkeypatch.setattr(speed, "_EXACT", 0.0)
    assert choose_matmul_precision("auto", "cpu") == "highest"


def test_precision_is_what_it_was_afterwards():
    before = torch.get_float32_matmul_precision()
    with matmul_precision("medium"):
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == before


FAULTS = """
import resource, torch
from funneltfm.training.speed import keep_freed_memory
torch.set_num_threads(1)
def faults():
    for _ in range(3):
        torch.ones(16_000_000), torch.ones(16_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        a, b, c = torch.ones(16_000_000), torch.ones(16_000_000), torch.ones(16_000_000)
        del a, b, c
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), keep_freed_memory(), faults())
"""


@pytest.mark.parametrize("environment", [{}, {"MALLOC_ARENA_MAX": "2"}])
def test_freed_memory_is_taken_again(environment):
    """Counted in page faults; where the environment sets malloc up, it has its way. Tensors are above 32 MiB, beyond
    which glibc by itself never keeps what is freed.
    """
    if not keep_freed_memory():
        pytest.skip("not glibc")
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, env=os.environ | environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    before, kept, after = done.stdout.split()
    assert kept == str(not environment)
    assert int(before) > 1000
    assert (int(after) < int(before) / 3) is not bool(environment)


CONFIG = ModelConfig(
    vocab_size=50, d_embed=16, d_model=16, n_head=2, d_head=8, d_inner=32, block_size="2_1_2",
    separate_cls=True, truncate_seq=True, pool_q_only=True, dropout=0.0, dropatt=0.0,
)  # fmt: skip
SHAPES = [(4, 15, 11), (4, 19, 17), (3, 23, 20), (4, 67, 60), (7, 11, 8), (2, 11, 5), (4, 15, 0), (5, 131, 128)]


def run(model, shape, training):
    """Logits of a batch (rows, tokens, real ones), and the gradient of the table."""
    B, T, n = shape
    generator = torch.Generator().manual_seed(B * T)
    inputs = torch.randint(1, 50, (B, T), generator=generator)
    seg_id = torch.zeros_like(inputs)
    seg_id[:, 0] = 2
    model.train(training).zero_grad()
    with torch.set_grad_enabled(training):
        _, ret = model(inputs, input_mask=(torch.arange(T) >= n).expand(B, T), seg_id=seg_id)
        if training:
            ret["cls_logits"].square().sum().backward()
    return ret["cls_logits"].detach(), model.input_layer[0].lookup_table.grad


def compiled(model, monkeypatch, backend):
    whole = torch.nn.Module.compile
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", lambda self, **kwargs: whole(self, backend=backend, **kwargs))
        patch.setattr(speed, "_check_compiler", lambda: None)
        speed_up(model, SimpleNamespace(matmul_precision="auto", compile=True, attention_path="auto"))
    return model


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # that torch.compile looks at by itself
def test_other_lengths_and_batch_sizes_compile_nothing_anew(monkeypatch):
    """One row alone is another program, for torch's sake. The numbers are those of the model as it is."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = FunnelTFM(CONFIG)
    model = FunnelTFM(CONFIG)
    model.load_state_dict(plain.state_dict())
    compiled(model, monkeypatch, "aot_eager")
    assert model.state_dict().keys() == plain.state_dict().keys()
    for training in (True, False):
        for number, shape in enumerate(SHAPES):
            before = counters["stats"]["unique_graphs"]
            logits, grad = run(model, shape, training)
            expected, expected_grad = run(plain, shape, training)
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
            if training:
                torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-4)
            made = counters["stats"]["unique_graphs"] - before
            # attention to all tokens and to those before pooling, the feed-forward layers, each once by block and input
            assert made == 0 if number else 0 < made <= 6, (training, shape, made)
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of what torch imports for it
def test_compiled_to_the_end(monkeypatch):
    try:
        speed._check_compiler()
    except InputError:
        pytest.skip("no C++ compiler")
    torch._dynamo.reset()
    plain = FunnelTFM(CONFIG)
    model = FunnelTFM(CONFIG)
    model.load_state_dict(plain.state_dict())
    compiled(model, monkeypatch, "inductor")
    for training in (True, False):
        for shape in SHAPES:
            for one, other in zip(run(model, shape, training), run(plain, shape, training), strict=True):
                if one is not None:
                    torch.testing.assert_close(one, other, rtol=0, atol=1e-4 if training else 1e-5)


def test_a_machine_without_a_compiler_is_told(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("no g++")

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(InputError, match=r"--compile: .*no g\+\+.*C\+\+ compiler"):
        speed_up(FunnelTFM(CONFIG), SimpleNamespace(matmul_precision="auto", compile=True, attention_path="auto"))


def test_the_attention_path_is_for_funnel_models():
    model = FunnelTFM(CONFIG)
    speed_up(model, SimpleNamespace(matmul_precision="auto", compile=False, attention_path="chunked"))
    assert model.attention_path == "chunked"
    with pytest.raises(InputError, match="is for Funnel models"):
        speed_up(torch.nn.Linear(2, 2), SimpleNamespace(matmul_precision="auto", compile=False, attention_path="plain"))


def test_a_narrow_model_has_products_of_the_default():
    args = SimpleNamespace(matmul_precision="auto", compile=False, attention_path="auto")
    for width, expected in ((16, "highest"), (256, "medium")):
        model = torch.nn.Sequential(torch.nn.Embedding(1000, width), torch.nn.Linear(width, 4 * width))
        with matmul_precision("medium"):
            speed_up(model, args)
            assert torch.get_float32_matmul_precision() == expected
    with matmul_precision("medium"):
        speed_up(FunnelTFM(CONFIG), SimpleNamespace(matmul_precision="medium", compile=False, attention_path="auto"))
        assert torch.get_float32_matmul_precision() == "medium"
