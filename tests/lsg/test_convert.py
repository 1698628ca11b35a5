"""Conversion: the original's weights, every model type, and folders that load with and without this package."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from funneltfm.errors import InputError
from funneltfm.lsg.convert import LSGConverter, check_converted, save_converted
from funneltfm.lsg.models import ALIASES, AUTO_CLASSES, MODEL_TYPES, base_class
from funneltfm.lsg.remote import remote_code

SOURCE = Path(__file__).resolve().parents[2] / "pytorch"


def save_tokenizer(folder: Path) -> None:
    words = {
        word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *(f"w{i}" for i in range(55))])
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>",
        pad_token="<pad>", unk_token="<unk>", mask_token="<mask>", model_max_length=300,
    ).save_pretrained(folder)  # fmt: skip


@pytest.fixture
def save_base(base_config, tmp_path):
    """save_base("bert", "AutoModelForMaskedLM") -> folder of a base model with random weights, and the model."""

    def save(model_type: str, auto: str = "", **values):
        torch.manual_seed(1)
        seq2seq = MODEL_TYPES[model_type].is_encoder_decoder
        auto = auto or ("AutoModelForSeq2SeqLM" if seq2seq else "AutoModelForPreTraining")
        model = getattr(transformers, auto).from_config(base_config(model_type, **values)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        folder = tmp_path / f"base-{model_type}"
        model.save_pretrained(folder)
        save_tokenizer(folder)
        return folder, model

    return save


# ---- weights


@pytest.mark.parametrize(("name", "length"), [("bert", 2048), ("bart", 2048), ("electra", 128)])
def test_weights_are_the_original_s(fixtures, name, length):
    model, tokenizer = LSGConverter(max_sequence_length=length).convert_from_pretrained(fixtures / name / "base")
    want = load_file(fixtures / name / "lsg_weights.safetensors")
    got = model.state_dict()
    assert not want.keys() - got.keys()
    for key, value in want.items():
        rows = slice(None)
        if name == "electra" and "global" in key:  # the base has 64 positions; beyond them the original draws
            rows = slice(0, None, 8)
        assert torch.equal(got[key][rows], value[rows]), key
    assert model.config.max_position_embeddings == length
    assert tokenizer.model_max_length == length
    assert model.config.exact_short


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_positions_and_global_tokens(save_base, model_type):
    folder, base = save_base(model_type)
    model, _ = LSGConverter(max_sequence_length=700).convert_from_pretrained(folder)
    state, old = model.state_dict(), base.state_dict()
    seq2seq = MODEL_TYPES[model_type].is_encoder_decoder
    tables = [name for name in state if name.endswith(("position_embeddings.weight", "embed_positions.weight"))]
    assert len(tables) == 1 + seq2seq
    offset = 2 if MODEL_TYPES[model_type].counts_padding or model_type in ("bart", "mbart") else 0
    known = 300 - (2 if MODEL_TYPES[model_type].counts_padding else 0)
    for name in tables:
        assert len(state[name]) == 700 + offset
        if model_type == "pegasus":
            torch.testing.assert_close(state[name][:300], old[name])
            assert not torch.equal(state[name][300:600], old[name])
            continue
        assert torch.equal(state[name][: offset + known], old[name])
        assert torch.equal(state[name][offset + known : offset + 2 * known], old[name][offset:])
    assert model.config.max_position_embeddings == 700 + (2 if MODEL_TYPES[model_type].counts_padding else 0)
    (table,) = (value for name, value in state.items() if name.endswith("global_embeddings.weight"))
    words = base.get_input_embeddings().weight
    types = [value[0] for name, value in old.items() if name.endswith("token_type_embeddings.weight")]
    added = types[0] if types and MODEL_TYPES[model_type].token_types else 0
    positions = old[tables[0]][offset:]
    assert torch.equal(table[0], positions[0] + words[0] + added)
    assert torch.equal(table[1], positions[64] + words[4] + added)
    assert torch.equal(table[8], positions[1] + words[4] + added)
    assert torch.equal(table[7], positions[448 * known // 512] + words[4] + added)  # 448 is none of its positions
    assert len(torch.unique(table[:8], dim=0)) == 8
    without, _ = LSGConverter(use_token_ids=False).convert_from_pretrained(folder)
    (other,) = (value for name, value in without.state_dict().items() if name.endswith("global_embeddings.weight"))
    torch.testing.assert_close(table - other, torch.zeros_like(table) + added)


def test_random_global_tokens_have_the_words_distribution(save_base):
    folder, base = save_base("roberta")
    model, _ = LSGConverter(random_global_init=True).convert_from_pretrained(folder)
    plain, _ = LSGConverter().convert_from_pretrained(folder)
    again, _ = LSGConverter(random_global_init=True).convert_from_pretrained(folder)
    other, _ = LSGConverter(random_global_init=True, seed=5).convert_from_pretrained(folder)
    table, mask, same, differs = (
        m.roberta.embeddings.global_embeddings.weight.detach() for m in (model, plain, again, other)
    )
    words = base.get_input_embeddings().weight.detach()
    assert torch.equal(table, same)
    assert not torch.equal(table, differs)
    assert torch.equal(table[0], mask[0])
    drawn = (table - (mask - words[4]))[1:]  # without the positions
    torch.testing.assert_close(drawn.mean(0), words.mean(0), rtol=0, atol=0.1 * words.std().item() * 2)
    torch.testing.assert_close(drawn.T.cov(), words.T.cov(), rtol=0, atol=0.3 * words.var().item())


def test_an_lsg_source_is_resized_or_made_anew(save_base, tmp_path):
    folder, _ = save_base("bert")
    model, tokenizer = LSGConverter(max_sequence_length=600).convert_from_pretrained(folder, block_size=16)
    with torch.no_grad():
        model.bert.embeddings.global_embeddings.weight.normal_()
    save_converted(model, tokenizer, tmp_path / "lsg")
    trained = model.bert.embeddings.global_embeddings.weight

    def convert(**options):
        made, _ = LSGConverter(max_sequence_length=900, **options).convert_from_pretrained(tmp_path / "lsg")
        assert made.config.block_size == 16
        positions = made.bert.embeddings.position_embeddings.weight
        assert torch.equal(positions[:900], model.bert.embeddings.position_embeddings.weight.repeat(2, 1)[:900])
        return made.bert.embeddings.global_embeddings.weight

    assert torch.equal(convert(resize_lsg=True), trained)
    kept = convert(keep_first_global_token=True)
    assert torch.equal(kept[0], trained[0])
    assert not torch.isclose(kept[1:], trained[1:]).all(1).any()
    assert not torch.allclose(convert()[0], trained[0])


# ---- every type, in new processes


RUN = """
import json, sys
if sys.argv[1] == "without":
    sys.modules["funneltfm"] = None  # makes its import fail
else:
    import funneltfm
import torch, transformers
from transformers import AutoTokenizer
trust = {"trust_remote_code": True} if sys.argv[1] == "without" else {}
for folder, auto in json.loads(sys.argv[2]):
    model = getattr(transformers, auto).from_pretrained(folder, **trust).eval()
    assert type(model).__module__.startswith("funneltfm") == (sys.argv[1] == "with"), type(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == 700
    inputs = dict(torch.load(folder + "/inputs.pt"))
    with torch.no_grad():
        torch.save(model(**inputs).logits, folder + "/" + sys.argv[1] + ".pt")
    ids = tokenizer("w1 w2 w3", return_tensors="pt").input_ids
    if auto == "AutoModelForSeq2SeqLM":
        model.generate(ids, max_new_tokens=3)
    model.save_pretrained(folder + "/again-" + sys.argv[1])
"""


def test_every_type_loads_in_new_processes_with_and_without_the_package(save_base, tmp_path):
    """Same logits bit for bit; and what such a process saves loads here."""
    folders = []
    for model_type in [*MODEL_TYPES, *ALIASES]:
        real = ALIASES.get(model_type, model_type)
        seq2seq = MODEL_TYPES[real].is_encoder_decoder
        auto = "AutoModelForSeq2SeqLM" if seq2seq else "AutoModelForSequenceClassification"
        base, _ = save_base(real, auto)
        if model_type != real:
            config = json.loads((base / "config.json").read_text())
            (base / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
        converter = LSGConverter(max_sequence_length=700)
        model, tokenizer = converter.convert_from_pretrained(
            base, block_size=8, sparse_block_size=8, num_global_tokens=2
        )
        folder = tmp_path / f"lsg_{model_type}"
        save_converted(model, tokenizer, folder)
        inputs = {"input_ids": torch.randint(5, 60, (2, 45)), "attention_mask": torch.ones(2, 45, dtype=torch.long)}
        inputs["attention_mask"][1, 39:] = 0
        if seq2seq:
            inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]
        torch.save(inputs, folder / "inputs.pt")
        with torch.no_grad():
            torch.save(model(**inputs).logits, folder / "here.pt")
        folders.append((str(folder), auto))
    for how in ("with", "without"):
        path = {"PYTHONPATH": str(SOURCE)} if how == "with" else {}
        env = {
            "PATH": "/usr/bin:/bin",
            "OMP_NUM_THREADS": "1",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "1",
        } | path
        command = [sys.executable, "-W", "error", "-c", RUN, how, json.dumps(folders)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        for folder, auto in folders:
            here, there = (torch.load(f"{folder}/{name}.pt") for name in ("here", how))
            assert torch.equal(here, there), folder
            model = getattr(transformers, auto).from_pretrained(f"{folder}/again-{how}").eval()
            with torch.no_grad():
                assert torch.equal(model(**torch.load(f"{folder}/inputs.pt")).logits, here)


def test_a_folder_does_not_load_as_a_plain_model_by_mistake(save_base, tmp_path):
    """Without the package and without trust_remote_code, transformers says that it needs code."""
    folder, _ = save_base("bert")
    save_converted(*LSGConverter(700).convert_from_pretrained(folder), tmp_path / "lsg")
    code = "import sys, transformers as t; t.AutoModel.from_pretrained(sys.argv[1], trust_remote_code=False)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "lsg")], capture_output=True, text=True, timeout=300,
        env={"PATH": "/usr/bin:/bin"}, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode != 0
    assert "trust_remote_code" in done.stderr


def test_the_file_is_one_and_its_own():
    code = remote_code()
    assert "import funneltfm" not in code
    assert "from funneltfm" not in code
    names = [
        line.split()[1].split("(")[0].rstrip(":") for line in code.splitlines() if line.startswith(("def ", "class "))
    ]
    assert len(names) == len(set(names))
    assert 'ATTENTION = "lsg-' in code
    compile(code, "modeling_lsg.py", "exec")


# ---- sources that the original could not read, and what does not fit


def test_the_architecture_is_the_source_s_or_as_asked(save_base):
    folder, _ = save_base("bert", "AutoModelForTokenClassification")
    converter = LSGConverter(700)
    assert type(converter.convert_from_pretrained(folder)[0]).__name__ == "LSGBertForTokenClassification"
    for name in ("BertForMaskedLM", "LSGBertForMaskedLM"):
        model, _ = converter.convert_from_pretrained(folder, architecture=name)
        assert type(model).__name__ == "LSGBertForMaskedLM"
    heads = [
        converter.convert_from_pretrained(folder, "BertForQuestionAnswering")[0].qa_outputs.weight for _ in range(2)
    ]
    assert torch.equal(*heads)  # drawn from the seed
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": None}))
    assert type(converter.convert_from_pretrained(folder)[0]).__name__ == "LSGBertForPreTraining"
    with pytest.raises(InputError, match="architecture must be one of BertFor"):
        converter.convert_from_pretrained(folder, "BertForPoetry")


def test_half_precision_stays(save_base):
    folder, base = save_base("bert")
    base.to(torch.bfloat16).save_pretrained(folder)
    model, _ = LSGConverter(700).convert_from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"global_positional_stride": 48}, "must divide 512"),
        ({"global_positional_stride": 0}, "must divide 512"),
        ({"max_sequence_length": 0}, "at least 1"),
        ({"seed": 10**23}, "seed must be"),
        ({"resize_lsg": True, "keep_first_global_token": True}, "give one of them"),
    ],
)
def test_converters_that_cannot_work_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        LSGConverter(**options)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"num_global_tokens": 0}, "num_global_tokens must be 1 to 512"),
        ({"num_global_tokens": 1000}, "num_global_tokens must be 1 to 512"),
        ({"block_size": 8, "sparsity_factor": 3}, "a divisor of block_size 8"),
        ({"blok_size": 8}, "Did you mean block_size"),
        ({"hidden_dropout_prob": "much"}, "refuses model_kwargs"),
        ({"sparsity_type": "norms"}, "must be one of"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "not a multiple of the number of attention heads"),
        ({"hidden_size": -8}, r"model_kwargs \(hidden_size\)"),
        ({"hidden_size": 0}, r"model_kwargs \(hidden_size\)"),
        ({"vocab_size": -3}, r"model_kwargs \(vocab_size\)"),
        ({"id2label": 3}, "refuses model_kwargs"),
        ({"output_attentions": True}, "no weights to show"),
        ({"dtype": "bfloat16"}, "a converted model has its source's"),
        ({"torch_dtype": "bfloat16"}, "a converted model has its source's"),
        ({"pass_global_tokens_to_decoder": True}, "no key of LSG bert. It is for encoder-decoders"),
        ({"lsh_seed": 10**23}, "lsh_seed must be"),
        ({"num_lables": 3}, "Did you mean num_labels"),
        ({"num_labels": 0}, "num_labels must be"),
        ({"num_labels": None}, "num_labels must be"),
        ({"num_labels": 2, "id2label": {0: "a", 1: "b"}}, "num_labels must be"),
        ({"hidden_act": "soft"}, r"model_kwargs \(hidden_act\): 'soft'"),
    ],
)
def test_keys_that_do_not_fit_are_refused(save_base, keys, said):
    folder, _ = save_base("bert")
    with pytest.raises(InputError, match=said):
        LSGConverter(700).convert_from_pretrained(folder, **keys)


def test_keys_of_both_kinds_are_taken(save_base):
    folder, _ = save_base("bert")
    model, _ = LSGConverter(700).convert_from_pretrained(
        folder, hidden_dropout_prob=0.3, sparsity_type=None, exact_short=False
    )
    assert (model.config.hidden_dropout_prob, model.config.sparsity_type, model.config.exact_short) == (
        0.3,
        "none",
        False,
    )


def test_sources_that_do_not_fit_are_refused(save_base, tmp_path):
    folder, _ = save_base("bert")
    with pytest.raises(InputError, match="for sources that are LSG"):
        LSGConverter(resize_lsg=True).convert_from_pretrained(folder)
    with pytest.raises(InputError, match=r"there is no folder .*none"):
        LSGConverter().convert_from_pretrained(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty has no config[.]json"):
        LSGConverter().convert_from_pretrained(tmp_path / "empty")
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt/config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(InputError, match="model type 'gpt2'; LSG can be made of albert"):
        LSGConverter().convert_from_pretrained(tmp_path / "gpt")
    folder, _ = save_base("bart", max_position_embeddings=1100)
    with pytest.raises(InputError, match="a multiple of 2"):
        LSGConverter(global_positional_stride=1).convert_from_pretrained(folder)


def test_sources_that_are_not_whole_are_refused(save_base, tmp_path):
    folder, _ = save_base("bert")
    bare, short, cut = (shutil.copytree(folder, tmp_path / name) for name in ("bare", "short", "cut"))
    for path in bare.glob("tok*"):
        path.unlink()
    with pytest.raises(InputError, match=r"bare has no tokenizer.*vocab[.]txt"):
        LSGConverter(700).convert_from_pretrained(bare)
    weights = load_file(short / "model.safetensors")
    kept = {name: value for name, value in weights.items() if ".layer.1." not in name}
    save_file(kept, short / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"short lacks weights of BertForPreTraining.*layer\.1\."):
        LSGConverter(700).convert_from_pretrained(short)
    content = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"cannot load .*cut"):
        LSGConverter(700).convert_from_pretrained(cut)
    (cut / "model.safetensors").unlink()
    (cut / "pytorch_model.bin").write_bytes(b"abcdefg" * 100)
    with pytest.raises(InputError, match=r"cannot load .*cut"):
        LSGConverter(700).convert_from_pretrained(cut)
    shutil.copy(folder / "model.safetensors", cut)
    (cut / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"cannot load the tokenizer of .*cut"):
        LSGConverter(700).convert_from_pretrained(cut)
    given = json.loads((folder / "config.json").read_text())
    for config, said in (
        (given | {"intermediate_size": 28}, r"other shapes than BertForPreTraining.*bias is \(20,\), not \(28,\)"),
        (given | {"hidden_size": 0}, "cannot load"),
        (given | {"hidden_size": "x"}, "cannot read the config"),
        ([given], "cannot read the config"),
    ):
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=said):
            LSGConverter(700).convert_from_pretrained(folder)


def test_configs_of_sources_that_want_what_lsg_has_not(save_base):
    folder, _ = save_base("roberta", "AutoModel")
    given = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(given | {"output_attentions": True}))
    model, _ = LSGConverter(700).convert_from_pretrained(folder)
    assert not model.config.output_attentions
    model(torch.full((1, 5), 7))
    (folder / "config.json").write_text(json.dumps(given | {"pad_token_id": None}))
    with pytest.raises(InputError, match="no pad_token_id"):
        LSGConverter(700).convert_from_pretrained(folder)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_windows_as_wide_as_the_text_give_the_base_model(save_base, model_type):
    """The first token, masked, is also the first global token: blocks that see all are then full attention."""
    seq2seq = MODEL_TYPES[model_type].is_encoder_decoder
    # The original's global tokens are not scaled, and most have no token type.
    folder, base = save_base(model_type, **({"scale_embedding": False} if seq2seq else {"auto": "AutoModel"}))
    if not MODEL_TYPES[model_type].token_types:
        for name, parameter in base.named_parameters():
            if "token_type" in name:
                torch.nn.init.zeros_(parameter)
        base.save_pretrained(folder)
    wide = {"block_size": 8, "sparse_block_size": 48, "sparsity_factor": 1, "sparsity_type": "norm"}
    model, tokenizer = LSGConverter(512).convert_from_pretrained(
        folder, type(base).__name__, mask_first_token=True, exact_short=False, **wide
    )
    noise = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 60, (2, 43), generator=noise)
    ids[:, 0] = tokenizer.bos_token_id
    mask = torch.ones_like(ids)
    mask[1, 37:] = 0
    ids[1, 37:] = base.config.pad_token_id
    outputs = []
    for one in (base, model):
        core = one.get_encoder() if one.config.is_encoder_decoder else one
        with torch.no_grad():
            out = core(input_ids=ids, attention_mask=mask).last_hidden_state
        outputs.append(out[:, -43:][mask.bool()])  # behind the global token, where a decoder is to see it
    if model.config.is_encoder_decoder:  # whose encoder keeps it as a row of its own
        outputs = [out[[i for i in range(len(out)) if i not in (0, 43)]] for out in outputs]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5 * max(1, outputs[0].abs().max().item()))


def test_a_new_head_has_the_number_of_labels_that_was_asked_for(save_base):
    folder, _ = save_base("bert", "AutoModel")
    model, _ = LSGConverter(700).convert_from_pretrained(folder, "BertForSequenceClassification", num_labels=3)
    assert model.classifier.out_features == model.config.num_labels == 3
    assert model.config.label2id["LABEL_2"] == 2
    folder, _ = save_base("bert", "AutoModelForTokenClassification")
    with pytest.raises(InputError, match=r"classifier[.]bias is \(2,\), not \(5,\).*keeps its number of labels"):
        LSGConverter(700).convert_from_pretrained(folder, num_labels=5)


@pytest.mark.parametrize("head", sorted(name["bert"] for name in AUTO_CLASSES.values() if "bert" in name))
def test_every_head_is_read_back_as_it_was_written(save_base, tmp_path, head):
    folder, _ = save_base("bert")
    more = {"is_decoder": True} if head == "BertLMHeadModel" else {}
    made = LSGConverter(700).convert_from_pretrained(folder, head, block_size=8, sparse_block_size=8, **more)
    save_converted(*made, tmp_path / "lsg")
    assert len(check_converted(tmp_path / "lsg", folder, made[0])) == 3


def test_a_source_of_more_positions_is_subsampled(save_base):
    folder, base = save_base("bart", max_position_embeddings=1100)
    model, _ = LSGConverter().convert_from_pretrained(folder)
    positions = base.model.encoder.embed_positions.weight[2:]
    words = base.get_input_embeddings().weight
    table = model.model.encoder.global_embeddings.weight
    assert torch.equal(table[1], positions[64] + words[4])
    assert torch.equal(table[16], positions[2] + words[4])


def test_a_written_model_is_checked(save_base, tmp_path):
    folder, _ = save_base("bert")
    made = LSGConverter(700).convert_from_pretrained(folder, block_size=8, sparse_block_size=8)
    save_converted(*made, tmp_path / "lsg")
    lines = check_converted(tmp_path / "lsg", folder, made[0])
    assert len(lines) == 3
    assert all("bit for bit" in line for line in lines)
    assert sum("differ by at most 0.0e+00" in line for line in lines) == 2
    hook = made[0].get_output_embeddings().register_forward_hook(lambda module, args, out: out + 1)
    with pytest.raises(InputError, match="gives other outputs"):
        check_converted(tmp_path / "lsg", folder, made[0])
    hook.remove()
    with torch.no_grad():
        made[0].get_input_embeddings().weight.add_(1.0)
    with pytest.raises(InputError, match=r"has another .*word_embeddings"):
        check_converted(tmp_path / "lsg", folder, made[0])
    with pytest.raises(InputError, match="exists and is not empty"):
        save_converted(*made, tmp_path / "lsg")
    save_converted(*made, tmp_path / "lsg", overwrite=True)
    assert check_converted(tmp_path / "lsg", folder, made[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base-bert", "lsg"]
    assert isinstance(AutoModel.from_pretrained(tmp_path / "lsg"), base_class("bert", "Model"))
    assert AutoTokenizer.from_pretrained(tmp_path / "lsg").model_max_length == 700
