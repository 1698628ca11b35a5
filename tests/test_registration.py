"""`import funneltfm` makes the Auto classes know us, in every order of imports, and costs nothing without them."""

import subprocess
import sys

import pytest

USE = "AutoConfig.for_model('lsg-bert') and AutoConfig.for_model('funnel_tfm', d_model=32).model_type"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "imports",
    [
        "import funneltfm; from transformers import AutoConfig",
        "from transformers import AutoConfig; import funneltfm",
        "import funneltfm; from transformers import AutoTokenizer, AutoConfig",
        "import funneltfm; from transformers import PreTrainedModel, AutoConfig",
        "import modeling; from transformers import AutoModel, AutoConfig",
        "import funneltfm; import funneltfm.funnel.hf; from transformers import AutoConfig",
        "import funneltfm; from transformers import BertConfig, BertForMaskedLM, AutoConfig",
        "import funneltfm; from transformers import BartForConditionalGeneration, AutoConfig",
        "import funneltfm, transformers.models.xlm_roberta.modeling_xlm_roberta; from transformers import AutoConfig",
        "import funneltfm; from transformers import Trainer, AutoConfig",
        "import funneltfm; from transformers import pipeline, AutoConfig",
    ],
)
def test_the_auto_classes_know_us(imports: str) -> None:
    pytest.importorskip("transformers")
    assert run(f"{imports}; print({USE})") == "funnel_tfm"


def test_an_auto_class_makes_our_model() -> None:
    pytest.importorskip("transformers")
    code = f"""
import funneltfm
from transformers import AutoModelForMaskedLM, AutoConfig
assert {USE} == "funnel_tfm"
keys = dict(vocab_size=50, d_embed=16, d_model=16, n_head=2, d_head=8, d_inner=24, block_size="1_1", decoder_size="1")
model = AutoModelForMaskedLM.from_config(AutoConfig.for_model("funnel_tfm", **keys))
print(type(model) is funneltfm.FunnelTFMForMaskedLM)
"""
    assert run(code) == "True"


def test_importing_twice_adds_one_finder() -> None:
    code = """
import sys, funneltfm
before = len(sys.meta_path)
funneltfm.register_with_transformers()
print(len(sys.meta_path) - before)
"""
    assert run(code) == "0"


def test_an_older_transformers_goes_on_working() -> None:
    """hf cannot be imported: transformers still can, and one line says what is missing."""
    pytest.importorskip("transformers")
    code = """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(message)s")
import funneltfm
sys.modules["funneltfm.funnel.hf"] = None  # makes its import fail
from transformers import AutoModel
print(AutoModel.__name__)
"""
    out = run(code)
    assert out.splitlines()[-1] == "AutoModel"
    assert "not registered" in out
