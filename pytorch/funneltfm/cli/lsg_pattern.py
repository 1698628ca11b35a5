"""`funneltfm lsg-pattern -o pattern.png`: a picture of what sees what in LSG attention."""

from collections.abc import Sequence
from dataclasses import dataclass

from funneltfm.cli.flags import FlagParser
from funneltfm.lsg.settings import LSGSettings


@dataclass(frozen=True, kw_only=True)
class PatternFlags:
    """Picture"""

    length: int | None = None
    """Tokens of the text. Default: 12 blocks."""
    head: int = 0
    """Which head is drawn; stride and block_stride differ between heads."""
    causal: bool = False
    """Draw the attention of a decoder."""
    seed: int = 0
    """Of the random keys among which norm and lsh choose."""
    debug: bool = False
    """Show where in the code an error arises."""


# What these do is not in the picture.
NOT_DRAWN = (
    "mask_first_token", "pool_with_global", "pass_global_tokens_to_decoder", "adaptive", "exact_short", "lsh_seed",
)  # fmt: skip


def main(argv: Sequence[str]) -> None:
    parser = FlagParser(
        [("LSG attention", LSGSettings, NOT_DRAWN), ("Picture", PatternFlags, ())],
        prog="funneltfm lsg-pattern",
        description="Draw what sees what in LSG attention.",
    )
    parser.add_argument("-o", "--output", default="lsg_pattern.png", help="file to write (default: lsg_pattern.png)")
    flags, _ = parser.parse(argv)

    from funneltfm.lsg.pattern import attention_pattern, draw_pattern

    of_picture = {name: flags.pop(name) for name in ("length", "head", "causal", "seed", "debug", "output")}
    settings = LSGSettings(**flags)
    length = 12 * settings.block_size if of_picture["length"] is None else of_picture["length"]
    pattern = attention_pattern(settings, length, of_picture["head"], of_picture["causal"], of_picture["seed"])
    draw_pattern(pattern, settings, of_picture["output"])
    seen = (pattern != 0).float().mean()
    print(f"{of_picture['output']}: {length} tokens, {seen:.1%} of all pairs")
