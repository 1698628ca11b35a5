"""Flags of optimizers and schedules: names and defaults of the older framework, ranges, and who reads what."""

import dataclasses
from typing import Any, get_args

import pytest

from funneltfm.cli.flags import FlagParser
from funneltfm.errors import InputError
from funneltfm.training.config import Args, Group, typed_args
from funneltfm.training.optimizer_flags import READS, OptimizerFlags, SchedulerFlags, check_optimizer_flags

GROUPS: tuple[Group, ...] = (("Optimizer", OptimizerFlags, ()), ("Schedule", SchedulerFlags, ()))


def make(**flags: Any) -> Args:
    args = typed_args(GROUPS, "train", flags)
    check_optimizer_flags(args)
    return args


def test_the_defaults_are_those_of_the_older_framework_where_they_made_sense() -> None:
    args = make()
    assert (args.optimizer, args.scheduler, args.scheduler_interval) == ("adamw", "linear_decay", "step")
    assert (args.learning_rate, args.weight_decay, args.scheduler_frequency) == (1e-4, 0.0, 1)
    assert args.adamw_betas == args.fuse_adam_betas == args.tfadamw_betas == (0.9, 0.999)
    assert (args.adamw_epsilon, args.fuse_adam_epsilon, args.tfadamw_epsilon) == (1e-8, 1e-8, 1e-6)
    assert args.adamw_amsgrad is args.fuse_adam_amsgrad is args.tfadamw_amsgrad is False
    assert (args.adafactor_epsilon, args.adafactor_decay_rate) == ((1e-30, 1e-3), -0.8)
    assert (args.adafactor_clip_threshold, args.adafactor_beta1) == (1.0, None)  # theirs was -0.8, which is no beta
    assert (args.num_warmup_steps, args.num_cycles, args.decay_power) == (0, 1, 1.0)
    assert args.end_learning_rate == 0.0  # theirs was the default learning rate, so that nothing fell


@pytest.mark.parametrize("kind", ["optimizer", "scheduler"])
def test_every_choice_says_what_it_reads(kind: str) -> None:
    fields = {field.name: field for cls in (OptimizerFlags, SchedulerFlags) for field in dataclasses.fields(cls)}
    assert set(READS[kind]) == set(get_args(fields[kind].type))
    assert {name for names in READS[kind].values() for name in names} <= set(fields)


def test_what_is_not_said_to_be_read_by_some_is_read_by_all() -> None:
    fields = {field.name for cls in (OptimizerFlags, SchedulerFlags) for field in dataclasses.fields(cls)}
    some = {name for reads in READS.values() for names in reads.values() for name in names}
    assert fields - some == {*("optimizer", "learning_rate", "weight_decay", "layerwise_lr_decay", "scheduler")}


def test_on_the_command_line() -> None:
    parser = FlagParser(GROUPS, prog="train")
    older = ["--layerwise_lr_decay_power=0.9", "--lr_decay_power=2"]  # names of the older framework
    flags, given = parser.parse(["--adamw_betas", "0.8", "0.9", "--num_warmup_steps=0.1", *older])
    assert flags["adamw_betas"] == (0.8, 0.9)
    assert (flags["num_warmup_steps"], flags["layerwise_lr_decay"], flags["decay_power"]) == (0.1, 0.9, 2.0)
    assert given == {"adamw_betas", "num_warmup_steps", "layerwise_lr_decay", "decay_power"}
    assert parser.parse(["--num_warmup_steps", "10"])[0]["num_warmup_steps"] == 10


@pytest.mark.parametrize(
    ("flags", "readers"),
    [
        ({"adafactor_beta1": 0.9}, "--optimizer adafactor alone"),
        ({"adafactor_epsilon": (1e-30, 1e-3)}, "--optimizer adafactor alone"),  # the default, but on purpose
        ({"optimizer": "tf_adamw", "adamw_betas": (0.9, 0.99)}, "--optimizer adamw or adam8bit or adamw8bit alone"),
        ({"optimizer": "adam8bit", "adamw_amsgrad": True}, "--optimizer adamw alone"),
        ({"optimizer": "adamw8bit", "adamw_amsgrad": True}, "--optimizer adamw alone"),
        ({"optimizer": "adafactor", "tfadamw_epsilon": 1e-6}, "--optimizer tf_adamw alone"),
        ({"fuse_adam_amsgrad": True}, "--optimizer fuse_adam alone"),
        ({"num_cycles": 2}, "--scheduler cosine alone"),
        ({"decay_power": 2.0}, "--scheduler polynomial_decay_layerwise or polynomial_decay alone"),
        ({"num_constant_steps": 2}, "--scheduler sqrt_decay alone"),
        ({"one_cycle_pct_start": 0.5}, "--scheduler one_cycle alone"),
        ({"scheduler": "one_cycle", "num_warmup_steps": 5}, "--scheduler constant or cosine"),
        ({"scheduler": "one_cycle", "end_learning_rate": 1e-6}, "--scheduler cosine or"),
        ({"scheduler": "constant", "end_learning_rate": 1e-6}, "linear_decay or sqrt_decay"),
        ({"scheduler": "constant", "scheduler_interval": "epoch"}, "--scheduler cosine or"),
    ],
)
def test_a_flag_that_nothing_reads_is_an_error(flags: dict[str, Any], readers: str) -> None:
    with pytest.raises(InputError, match=readers) as caught:
        make(**flags)
    assert f"--{list(flags)[-1]} is read by" in str(caught.value)


@pytest.mark.parametrize("kind", ["optimizer", "scheduler"])
def test_every_flag_may_be_given_with_who_reads_it(kind: str) -> None:
    needed: dict[str, Any] = {"polynomial_decay_layerwise": {"layerwise_lr_decay": 0.9}}
    needed["sqrt_decay"] = {"num_warmup_steps": 5}
    for choice, names in READS[kind].items():
        values = {name: getattr(make(), name) for name in names}
        make(**({kind: choice} | values | needed.get(choice, {})))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be more than 0; got 0.0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0; got -0.1"),
        ({"layerwise_lr_decay": 0.0}, "layerwise_lr_decay must be more than 0 and at most 1"),
        ({"layerwise_lr_decay": 1.1}, "layerwise_lr_decay must be more than 0 and at most 1"),
        ({"adamw_epsilon": 0.0}, "adamw_epsilon must be more than 0"),
        ({"adamw_betas": (0.9, 1.0)}, "adamw_betas must be at least 0 and less than 1; got 1.0"),
        ({"adamw_betas": (0.9, 0.99, 0.999)}, "adamw_betas must be two numbers; got 3"),
        ({"optimizer": "adafactor", "adafactor_epsilon": (1e-30,)}, "adafactor_epsilon must be two numbers; got 1"),
        ({"optimizer": "adafactor", "adafactor_beta1": -0.8}, "adafactor_beta1 must be at least 0 and less than 1"),
        ({"optimizer": "adafactor", "adafactor_decay_rate": 0.8}, "adafactor_decay_rate must be less than 0"),
        ({"optimizer": "adafactor", "adafactor_epsilon": (1e-30, 1e-2)}, "--adafactor_scale_parameter alone"),
        ({"num_warmup_steps": -1}, "num_warmup_steps must be a whole number of steps, or a share"),
        ({"num_warmup_steps": 1.5}, "num_warmup_steps must be a whole number of steps, or a share"),
        ({"end_learning_rate": 1e-4}, "end_learning_rate must be less than learning_rate .0.0001.; got 0.0001"),
        ({"scheduler": "cosine", "num_cycles": 0}, "num_cycles must be more than 0"),
        ({"scheduler": "polynomial_decay", "decay_power": 0.0}, "decay_power must be more than 0"),
        ({"scheduler": "one_cycle", "one_cycle_betas": (0.9,)}, "one_cycle_betas must be two numbers; got 1"),
        ({"scheduler": "one_cycle", "one_cycle_betas": (0.9, 1.0)}, "one_cycle_betas must be at least 0 and less"),
        (
            {"scheduler": "one_cycle", "optimizer": "adafactor", "one_cycle_betas": (0.8, 0.9)},
            "one_cycle_betas moves beta1",
        ),
        ({"scheduler_frequency": 0}, "scheduler_frequency must be more than 0"),
        ({"scheduler": "polynomial_decay_layerwise"}, "needs --layerwise_lr_decay below 1"),
        ({"scheduler": "sqrt_decay"}, "give --num_warmup_steps or --num_constant_steps"),
        ({"scheduler": "nonsense"}, "scheduler must be one of constant, cosine"),
    ],
)
def test_a_value_out_of_range_is_named(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**flags)


def test_the_ends_of_the_ranges_are_fine() -> None:
    make(weight_decay=0.0, layerwise_lr_decay=1.0, adamw_betas=(0.0, 0.0), num_warmup_steps=1.0)
    make(optimizer="adafactor", adafactor_beta1=0.0, adafactor_scale_parameter=True, adafactor_epsilon=(1e-8, 1e-2))
