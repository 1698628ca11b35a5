"""ModelConfig: files of three origins, round trips, precedence, and an error for everything that does not fit."""

import dataclasses
import doctest
import json
from types import SimpleNamespace

import pytest

from funneltfm.errors import InputError
from funneltfm.funnel import config as module
from funneltfm.funnel.config import PUBLISHED_SIZES, ModelConfig, canonical_length, model_size, parse_blocks

KEYS = {  # key: (default, another value)
    "vocab_size": (30522, 97),
    "d_embed": (768, 128),
    "d_model": (768, 64),
    "n_head": (12, 4),
    "d_head": (64, 16),
    "d_inner": (3072, 128),
    "dropout": (0.1, 0.2),
    "dropatt": (0.1, 0.0),
    "dropact": (0.0, 0.3),
    "block_size": ("4_4_4", "6_3x2_3x2"),
    "pooling_type": ("mean", "min"),
    "pooling_size": (2, 3),
    "pool_q_only": (False, True),
    "separate_cls": (False, True),
    "attn_type": ("rel_shift", "factorized"),
    "func_mask": ("separate_cls", "always"),
    "truncate_seq": (False, True),
    "ff_activation": ("gelu", "relu"),
    "decoder_size": ("0", "1x2"),
    "num_class": (2, 1),
    "seg_id_cls": (2, 4),
    "pad_id": (0, 5),
}
OTHERS = {key: other for key, (_, other) in KEYS.items()}


def test_doctests():
    result = doctest.testmod(module)
    assert result.attempted >= 1
    assert result.failed == 0


def test_every_key_and_its_default():
    assert ModelConfig().to_dict() == {key: default for key, (default, _) in KEYS.items()}
    assert ModelConfig.names() == tuple(KEYS)


def test_is_frozen_and_takes_names_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().d_model = 1
    with pytest.raises(TypeError):
        ModelConfig(30522)
    with pytest.raises(TypeError):
        ModelConfig(d_modle=768)


# ---- round trips


def test_json_round_trip(tmp_path):
    config = ModelConfig(**OTHERS)
    config.to_json(tmp_path / "deep" / "net_config.json")
    assert json.loads((tmp_path / "deep" / "net_config.json").read_text()) == OTHERS
    assert ModelConfig.init_from_json(tmp_path / "deep" / "net_config.json") == config
    assert ModelConfig.init_from_json(str(tmp_path / "deep" / "net_config.json")) == config


@pytest.mark.parametrize("key", KEYS)
def test_each_key_survives_alone(write_config, key):
    config = ModelConfig.init_from_json(write_config({key: OTHERS[key]}))
    assert config == dataclasses.replace(ModelConfig(), **{key: OTHERS[key]})


def test_files_of_the_original_and_of_its_tensorflow_code(shared):
    folders = sorted(path.parent for path in (shared / "fixtures" / "funnel").glob("*/net_config.json"))
    assert len(folders) == 6
    for folder in folders:
        saved = json.loads((folder / "net_config.json").read_text())
        config = ModelConfig.init_from_json(folder / "net_config.json")
        assert config.attn_type == saved.pop("rel_attn_type") == "factorized"
        for key in ("init", "init_range", "init_std"):  # how TensorFlow began, nothing that defines the model
            saved.pop(key)
        assert {key: getattr(config, key) for key in saved} == saved

        pytorch = json.loads((folder / "net_config.pytorch.json").read_text())
        config = ModelConfig.init_from_json(folder / "net_config.pytorch.json")
        assert {key: getattr(config, key) for key in pytorch} == pytorch
        assert config.attn_type == "rel_shift"
        assert config.decoder_size == "0"


# ---- errors name the file and the key


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ({"d_modle": 768}, "d_modle"),
        ({"d_model": 768, "zz": 1, "aa": 2}, "aa, zz"),
        ({"d_model": "768"}, "d_model"),
        ({"d_model": 768.0}, "d_model"),
        ({"d_model": None}, "d_model"),
        ({"d_model": True}, "d_model"),
        ({"d_model": 0}, "d_model"),
        ({"d_model": 33}, "d_model must be even"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"pad_id": -1}, "pad_id"),
        ({"num_class": 0}, "num_class"),
        ({"dropout": 1}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"dropatt": "0.1"}, "dropatt"),
        ({"dropact": True}, "dropact"),
        ('{"dropout": NaN}', "dropout"),
        ({"separate_cls": 1}, "separate_cls"),
        ({"truncate_seq": "true"}, "truncate_seq"),
        ({"pooling_type": "sum"}, "pooling_type"),
        ({"pooling_type": ["mean"]}, "pooling_type"),
        ({"pooling_size": 1}, "pooling_size"),
        ({"attn_type": "absolute"}, "attn_type"),
        ({"rel_attn_type": "absolute"}, "attn_type"),
        ({"ff_activation": "swish"}, "ff_activation"),
        ({"block_size": "4-4-4"}, "block_size"),
        ({"block_size": "4_x2"}, "block_size"),
        ({"block_size": "4_0"}, "block_size"),
        ({"block_size": "4x0"}, "block_size"),
        ({"block_size": "4_"}, "block_size"),
        ({"block_size": "4_4\n"}, "block_size"),
        ({"block_size": ""}, "block_size"),
        ({"block_size": 0}, "block_size"),
        ({"block_size": [4, 4]}, "block_size"),
        ({"block_size": True}, "block_size"),
        ({"decoder_size": "1_1"}, "decoder_size"),
        ({"decoder_size": "two"}, "decoder_size"),
        ({"dropout": 10**400}, "dropout"),
        ({"d_model": 2**31}, "d_model"),
        ({"block_size": "1" * 5000}, "block_size"),
        ({"block_size": "1\u0662"}, "block_size"),
        ({"block_size": "9999999x99999999"}, "at most 1000 layers"),
        ({"block_size": "500", "decoder_size": "501"}, "at most 1000 layers"),
        ({"block_size": "1_" * 40 + "1"}, "fewer blocks"),
        ('{"d_model": 64, "d_model": 128}', "twice"),
        ({"n_\nhead": 1}, "n_\\nhead"),
        ([1, 2], "object"),
        ('"text"', "object"),
        ("", "cannot read"),
        ("{", "cannot read"),
        ("{'d_model': 768}", "cannot read"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_errors_name_file_and_key(write_config, value, word):
    path = write_config(value)
    with pytest.raises(InputError) as caught:
        ModelConfig.init_from_json(path)
    assert str(path) in str(caught.value)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)[:-1].replace("\\n", "")


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin").write_bytes(b'{"pooling_type": "\xe9"}')
    for path in (tmp_path, tmp_path / "none.json", tmp_path / "latin"):
        with pytest.raises(InputError, match=r"cannot read") as caught:
            ModelConfig.init_from_json(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [("d_model", 33), ("decoder_size", "x"), ("dropout", float("inf"))])
def test_errors_of_the_constructor(key, value):
    with pytest.raises(InputError, match=key):
        ModelConfig(**{key: value})


def test_numbers_for_text_as_in_files_written_by_hand(write_config):
    config = ModelConfig.init_from_json(write_config({"block_size": 4, "decoder_size": 2, "dropout": 0}))
    assert (config.blocks, config.decoder, config.dropout) == (((4, 1),), (2, 1), 0.0)
    assert isinstance(config.dropout, float)


# ---- args


def test_file_wins_over_args_unless_overwritten(write_config):
    path = write_config({"d_model": 64, "dropout": 0.5})
    args = SimpleNamespace(d_model=32, dropout=0.2, n_head=7, unrelated=1)
    config = ModelConfig.init_from_json(path, args)
    assert (config.d_model, config.dropout, config.n_head, config.d_head) == (64, 0.5, 7, 64)
    for text in ("dropout", "dropout,", " dropout ", "dropout,n_head", "n_head dropout"):
        args.overwrite_keys = text
        config = ModelConfig.init_from_json(path, args)
        assert (config.d_model, config.dropout, config.n_head) == (64, 0.2, 7)
    for text in ("", None):
        args.overwrite_keys = text
        assert ModelConfig.init_from_json(path, args).dropout == 0.5


def test_overwrite_keys_must_exist(write_config):
    path = write_config({})
    with pytest.raises(InputError, match="overwrite_keys names d_modle"):
        ModelConfig.init_from_json(path, SimpleNamespace(overwrite_keys="d_modle"))
    with pytest.raises(InputError, match="overwrite_keys names d_model"):
        ModelConfig.init_from_json(path, SimpleNamespace(overwrite_keys="d_model"))


def test_init_from_args():
    assert ModelConfig.init_from_args(SimpleNamespace(**OTHERS, lr=1)) == ModelConfig(**OTHERS)
    assert ModelConfig.init_from_args(SimpleNamespace()) == ModelConfig()
    assert ModelConfig.init_from_args(SimpleNamespace(model_size="", d_model=64)).d_model == 64


def test_model_size_sets_the_widths():
    config = ModelConfig.init_from_args(SimpleNamespace(model_size="H1024", d_model=5, block_size="2_2", vocab_size=9))
    assert (config.d_model, config.d_embed, config.n_head, config.d_head, config.d_inner) == (1024, 1024, 16, 64, 4096)
    assert (config.block_size, config.vocab_size) == ("2_2", 9)
    config = ModelConfig.init_from_args(SimpleNamespace(model_size="B6-3x2-3x2H768", block_size="2_2"))
    assert (config.block_size, config.d_model, config.n_head, config.d_inner) == ("6_3x2_3x2", 768, 12, 3072)


@pytest.mark.parametrize("name", ["", "H512", "h768", "B4-4-4", "B4_4_4H768", "B4-4-4H768 ", "B4-4-4H768\n", "XB4H768"])
def test_model_size_must_be_known(name):
    with pytest.raises(InputError, match="model_size"):
        model_size(name)


def test_published_sizes():
    assert PUBLISHED_SIZES == ("B4-4-4H768", "B6-3x2-3x2H768", "B6-6-6H768", "B8-8-8H1024", "B10-10-10H1024")
    blocks = {
        "B4-4-4H768": ((4, 1),) * 3,
        "B6-3x2-3x2H768": ((6, 1), (3, 2), (3, 2)),
        "B6-6-6H768": ((6, 1),) * 3,
        "B8-8-8H1024": ((8, 1),) * 3,
        "B10-10-10H1024": ((10, 1),) * 3,
    }
    for name in PUBLISHED_SIZES:
        config = ModelConfig.from_size(name)
        assert config.blocks == blocks[name]
        assert (config.separate_cls, config.pool_q_only, config.truncate_seq) == (True, True, True)
        assert (config.pooling_type, config.vocab_size, config.decoder_size) == ("mean", 30522, "0")
        assert config.d_model == int(name.split("H")[1]) == config.n_head * config.d_head == config.d_inner // 4
    assert ModelConfig.from_size("B4-4-4H768", truncate_seq=False, d_embed=128).d_embed == 128
    assert not ModelConfig.from_size("B4-4-4H768", truncate_seq=False).truncate_seq


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("4_4_4", ((4, 1), (4, 1), (4, 1))),
        ("6_3x2_3x2", ((6, 1), (3, 2), (3, 2))),
        ("12", ((12, 1),)),
        ("1x10", ((1, 10),)),
        ("0", ()),
        ("", ()),
    ],
)
def test_parse_blocks(text, blocks):
    assert parse_blocks(text) == blocks


# ---- canonical length: the formulas; that they are right is shown on models in test_model.py


def test_canonical_length_of_three_blocks(tiny):
    for n in range(1, 200):
        four_k_1 = next(length for length in range(n, n + 9) if length % 4 == 1)
        four_k_3 = next(length for length in range(n + 2, n + 9) if length % 4 == 3)
        assert canonical_length(n, tiny(truncate_seq=False)) == four_k_1
        assert canonical_length(n, tiny(truncate_seq=True)) == four_k_3
        assert canonical_length(n, tiny(separate_cls=False)) == -4 * (-n // 4)


def test_canonical_length_grows_and_stays(tiny):
    for n_block in range(1, 6):
        for pooling_size in (2, 3):
            for switches in ({}, {"truncate_seq": False}, {"separate_cls": False}):
                config = tiny(block_size="_".join("1" * n_block), pooling_size=pooling_size, **switches)
                lengths = [canonical_length(n, config) for n in range(1, 100)]
                assert lengths == sorted(lengths)
                assert all(length >= n for n, length in enumerate(lengths, start=1))
                if n_block == 1:
                    assert lengths == list(range(1, 100))
