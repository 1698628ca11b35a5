"""Flags as data: every one documented and with a default, values out of range named, keys of the model not repeated."""

import dataclasses

import pytest

from funneltfm.errors import InputError
from funneltfm.funnel.config import ModelConfig
from funneltfm.training.config import GROUPS, MODEL_SKIP, flag_fields, make_args


def test_no_flag_is_there_twice() -> None:
    names = [field.name for _, cls, skip in GROUPS for field in dataclasses.fields(cls) if field.name not in skip]
    assert len(names) == len(set(names))
    assert list(flag_fields()) == names


def test_every_key_of_the_model_is_a_flag_or_left_out_on_purpose() -> None:
    assert set(ModelConfig.names()) - set(MODEL_SKIP) <= set(flag_fields())
    assert "vocab_size" in flag_fields()
    assert set(MODEL_SKIP) <= set(ModelConfig.names())


def test_make_args_puts_flags_over_defaults() -> None:
    args = make_args(lr=3e-4, block_size="2_2")
    assert (args.lr, args.block_size, args.epochs) == (3e-4, "2_2", 10)
    assert args.given == {"lr", "block_size"}
    assert args.flags() == {name: field.default for name, field in flag_fields().items()} | {
        "lr": 3e-4,
        "block_size": "2_2",
    }


def test_the_flags_of_a_run_make_the_same_run_again() -> None:
    args = make_args(seed=7, cased=True)
    assert make_args(**args.flags()).flags() == args.flags()


def test_unknown_flag() -> None:
    with pytest.raises(InputError, match="unknown flag learning_rate, sede"):
        make_args(learning_rate=1, sede=2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name in ("lr", "epochs", "train_bsz", "valid_bsz", "test_bsz", "n_valid", "n_log_epoch")),
        ("accumulate_grad_batches", 0),
        *((name, -1) for name in ("lr", "min_lr", "weight_decay", "clip", "seed", "num_workers", "save_steps")),
        ("seg_id_a", -1),
        ("seg_id_b", -1),
        ("seg_id_pad", -1),
        ("warmup_prop", -0.1),
        ("warmup_prop", 1.1),
        ("min_lr", 1.0),
        ("max_length", 4),
        ("device_id", -2),
        ("distributed_world_size", -1),
        ("distributed_rank", -1),
        ("distributed_port", 0),
        ("distributed_port", 2**16),
        ("seed", 2**32),
        *((name, float("nan")) for name in ("lr", "min_lr", "weight_decay", "clip", "warmup_prop")),
        *((name, float("inf")) for name in ("lr", "weight_decay")),
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: float) -> None:
    with pytest.raises(InputError, match=name) as caught:
        make_args(**{name: value})
    assert str(value) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 1e-12), ("warmup_prop", 0.0), ("warmup_prop", 1.0), ("clip", 0.0), ("max_length", 5), ("device_id", -1),
        ("seed", 0), ("seed", 2**32 - 1), ("min_lr", 1e-5), ("weight_decay", 0.0), ("num_workers", 0),
        ("save_steps", 0), ("distributed_world_size", 0), ("distributed_port", 2**16 - 1),
        ("accumulate_grad_batches", 1),
    ],
)  # fmt: skip
def test_the_ends_of_the_ranges_are_fine(name: str, value: float) -> None:
    assert getattr(make_args(**{name: value}), name) == value


@pytest.mark.parametrize("name", ["pad_to", "tokenizer_type", "bad_rows", "amp_opt", "ddp_backend", "launcher"])
def test_a_wrong_choice_from_python_is_named_too(name: str) -> None:
    """The parser of the command line does not stand between `classify(...)` and the run."""
    with pytest.raises(InputError, match=name):
        make_args(**{name: "nonsense"})


def test_every_level_of_precision_may_be_asked_for() -> None:
    for level in ("O0", "O1", "O2", "O3"):
        for kind in ("fp16", "bf16"):
            assert make_args(**{kind: True}, amp_opt=level).amp_opt == level
    assert make_args(fp16=True).amp_opt == "O2"  # the original's default


def test_fp16_and_bf16_exclude_each_other() -> None:
    with pytest.raises(InputError, match="fp16 and bf16 exclude each other"):
        make_args(fp16=True, bf16=True)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"num_workers": 2**31 - 1}, "num_workers must be at most"),
        ({"resume": True, "overwrite": True}, "--overwrite removes the run that --resume needs"),
        ({"test_only": True, "overwrite": True}, "--overwrite removes the run that --test_only needs"),
        *(({name: ""}, f"{name} is empty") for name in ("model_dir", "data_dir", "tokenizer_path", "init_ckpt")),
    ],
)
def test_what_cannot_be_meant_is_refused(flags: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        make_args(**flags)


@pytest.mark.parametrize("name", ["train_bsz", "valid_bsz", "test_bsz"])
def test_max_tokens_is_in_place_of_counts(name: str) -> None:
    with pytest.raises(InputError, match=f"leave out {name}"):
        make_args(**{"max_tokens": 100, name: 4})
    assert make_args(max_tokens=100).max_tokens == 100


def test_attention_in_chunks_is_for_rel_shift() -> None:
    with pytest.raises(InputError, match="attention_path chunked"):
        make_args(attention_path="chunked", attn_type="factorized")
